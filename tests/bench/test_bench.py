"""The benchmark measures what it says: a short one for real, and a report of known figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import picture, report
from bench.__main__ import COMPARISONS, main
from bench.report import PAGE, RESULTS
from bench.samples import Comparison, Group, Plan, Samples
from bench.stage import Stage

INSERTS = Group("Inserts, as a multiple of unguarded")
STEPS = Group("Steps", ratios=False)


@dataclass(frozen=True)
class Known:
    """A comparison whose figures are known beforehand."""

    group: Group
    title: str

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        raise NotImplementedError


def figures(group: Group, title: str, **rounds: list[float]) -> dict[str, object]:
    samples = Samples(title, "us", tuple(rounds))
    for variant, values in rounds.items():
        samples.rounds[variant] += values
    samples.facts["server"] = "idle"
    known: Comparison = Known(group, title)
    return report.as_figures(known, samples, "PostgreSQL 18.4")


def words(svg: str) -> list[str]:
    """What is written in a picture."""
    return re.findall(r">([^<>]+)</(?:text|tspan)>", svg)


ONE = figures(INSERTS, "one", unguarded=[100.0, 90.0, 110.0], arbiter=[150.0, 165.0, 135.0])
MANY = figures(INSERTS, "many", unguarded=[10.0], exists=[20.0], arbiter=[12.5])
DRAIN = figures(STEPS, "drain", one_step=[5.0], arbiter=[2.0])


def test_a_table_has_medians_ratios_and_spreads() -> None:
    (table,) = report.tables({"one": ONE, "many": MANY})
    assert table[0] == INSERTS.title
    header, _, one, many = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()
    )
    assert header == ["", "unguarded", "arbiter", "exists"]
    assert one == ["one", "100 us ±10%", "1.50 ±10%", ""]
    assert many == ["many", "10 us", "1.25", "2.00"]


def test_a_title_need_not_repeat_its_unit() -> None:
    ((_, table),) = report.tables({"one": ONE | {"group": "Work, in us", "unit": "us"}})
    row = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert row == ["one", "100 ±10%", "1.50 ±10%"]


def test_a_table_of_figures_has_no_ratios() -> None:
    ((_, table),) = report.tables({"drain": DRAIN})
    row = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert row == ["drain", "5 us", "2 us"]


def test_what_was_kept_of_others_stays(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    report.keep({"one": ONE, "drain": DRAIN}, folder)
    report.keep({"one": ONE | {"title": "again"}, "many": MANY}, folder)
    kept = json.loads((folder / "bench.json").read_text())
    assert list(kept) == ["one", "drain", "many"]
    assert kept["one"]["title"] == "again"
    assert kept["drain"]["facts"] == {"server": "idle"}
    assert kept["many"]["rounds"] == {"unguarded": [10.0], "exists": [20.0], "arbiter": [12.5]}
    text = (folder / "tables.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        f"### {INSERTS.title}",
        f"### {STEPS.title}",
    ]
    assert {file.name for file in folder.iterdir()} == {"bench.json", "tables.md"}


def test_the_picture_has_the_figures(tmp_path: Path) -> None:
    ratios = dict(zip(picture.SIZES.values(), (1.72, 1.6, 1.4, 1.2, 1.04), strict=True))
    found: dict[str, report.Figures] = {
        name: figures(INSERTS, name, unguarded=[1.0], exists=[1.5], policy=[1.5], arbiter=[ratio])
        for name, ratio in ratios.items()
    }
    rates = {name: [100.0 + n] for n, name in enumerate(picture.BARS)}
    found[picture.AWAY] = figures(STEPS, "away", **rates)
    report.keep(found, tmp_path)
    drawn = set(words((tmp_path / picture.NAME).read_text()))
    assert {"+72 %", "+4 %", "+50 %", *picture.BARS.values()} <= drawn
    assert {"100", "101", "102", "103", "104"} <= drawn


@pytest.mark.slow
def test_a_short_run_measures_each_variant(tmp_path: Path) -> None:
    names = ["status", "rejects"]
    short = ["--rounds", "2", "--seconds", "1", "--scale", "0.001", "--report", str(tmp_path)]
    done = CliRunner().invoke(main, [*names, *short])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found) == names
    for name in names:
        assert found[name]["variants"][-1] == "arbiter"
        for rounds in found[name]["rounds"].values():
            assert len(rounds) == 2
            assert min(rounds) > 0
        assert found[name]["title"] in done.output
    # All are rejected: by the naive trigger before the row is written, by arbiter after it.
    left = found["rejects"]["facts"]
    # Autovacuum may take a transaction id meanwhile.
    assert left["exists"]["xids each"] == pytest.approx(0, abs=0.05)
    assert left["arbiter"]["xids each"] == pytest.approx(1, abs=0.05)


def test_the_results_are_those_of_every_comparison(tmp_path: Path) -> None:
    kept = json.loads((RESULTS / "bench.json").read_text())
    assert list(kept) == list(COMPARISONS)
    report.keep(kept, tmp_path)
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert made["tables.md"] == (RESULTS / "tables.md").read_text()
    assert words(made[picture.NAME]) == words((RESULTS / picture.NAME).read_text())
    assert set(made) == {file.name for file in RESULTS.iterdir()}


def test_the_page_shows_tables_and_the_picture_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    kept = json.loads((RESULTS / "bench.json").read_text())
    assert report.renew(page, kept) == page
    titles = re.findall(r"^<!-- (.*) -->$", page, re.MULTILINE)
    assert len(titles) > 3
    assert set(titles) <= {title for title, _ in report.tables(kept)}
    links = re.findall(r"\]\((\.\./tests/.*?)\)", page)
    assert f"../tests/bench/results/{picture.NAME}" in links
    for link in links:
        assert (PAGE.parent / link).exists()


def test_a_page_gets_the_tables_of_now() -> None:
    ((title, table),) = report.tables({"many": MANY})
    page = f"Before.\n\n<!-- {title} -->\n\n{{}}\nAfter, with another | table:\n\n| a |\n"
    renewed = page.format(f"{table}\n")
    assert report.renew(page.format("| old |\n|---|\n"), {"many": MANY}) == renewed
    assert report.renew(page.format(""), {"many": MANY}) == renewed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "'nothing' is not one of"),
        (["local", "--rounds", "0"], "0 is not in the range"),
        (["local", "--scale", "2"], "2.0 is not in the range"),
        (["local", "--pg", "9"], "9"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code != 0
    assert said in done.output
