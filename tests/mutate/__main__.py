"""The command line of the mutation tests; see the package."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import report
from .mutants import AREAS, Mutant, draw, numbered
from .others import javascript_mutants, python_mutants
from .sql import sql_mutants
from .trials import ROOT, Copy, Result, copies

KEPT = ROOT / "build" / "mutate"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
FILES = {"sql": ["sql/*.sql"], "python": ["arbiter_db/**/*.py"], "js": ["arbiter_db/web/*.js"]}

console = Console()


def texts_of(language: str) -> dict[str, str]:
    """The files of a language, by their paths."""
    paths = sorted(path for pattern in FILES[language] for path in ROOT.glob(pattern))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def all_mutants(language: str, texts: dict[str, str]) -> list[Mutant]:
    """All mutants of the files of a language."""
    if language == "js":
        return numbered(javascript_mutants(ROOT, texts))
    make = sql_mutants if language == "sql" else python_mutants
    return numbered(mutant for path, text in texts.items() for mutant in make(path, text))


class Area:
    """The mutants of one area, those that were drawn, and what is known of them.

    Results are kept in a file, a line each, and not asked for again by the next run.
    """

    def __init__(
        self, name: str, seed: int, number: int, mutants: list[Mutant], argued: set[Mutant]
    ) -> None:
        self.name = name
        self.number = number
        self._lock = threading.Lock()
        self._drawn = draw((m for m in mutants if m.area == name), seed)
        self._argued = argued
        self._file = KEPT / f"{name}-{seed}.jsonl"
        self._known: dict[str, Result] = {}
        self.results: dict[Mutant, Result] = {}
        self._open = 0
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = Result(**entry["result"])

    def next(self, again: bool) -> Mutant | None:
        """The next mutant to try; None when enough valid ones have been drawn.

        One that is being tried counts as valid, so that any number of workers draws the same. One
        that is argued to be equivalent counts as a survivor and is tried only again.
        """
        with self._lock:
            while self.valid + self._open < self.number:
                mutant = next(self._drawn, None)
                if mutant is None:
                    return None
                result = self._known.get(mutant.key)
                if result is None and mutant in self._argued:
                    result = Result("survived", ["not tried: argued in equivalent.toml"])
                if result is None or (again and result.status == "survived"):
                    self._open += 1
                    return mutant
                self.results[mutant] = result
        return None

    @property
    def valid(self) -> int:
        return sum(result.status != "invalid" for result in self.results.values())

    def note(self, mutant: Mutant, result: Result, text: str) -> None:
        """Keep a result."""
        entry = {
            "key": mutant.key,
            "place": f"{mutant.path}:{mutant.line(text)}",
            "kind": mutant.kind,
            "old": mutant.old,
            "new": mutant.new,
            "result": asdict(result),
        }
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            self.results[mutant] = result
            self._open -= 1

    def give_up(self) -> None:
        """Forget a mutant whose trial was interrupted."""
        with self._lock:
            self._open -= 1


def work(copy: Copy, area: Area, again: bool, texts: dict[str, str], bar: Progress) -> None:
    """Try mutants of an area in one copy until enough are known."""
    (task,) = (task.id for task in bar.tasks if task.fields["area"] == area.name)
    while mutant := area.next(again):
        try:
            result = copy.try_out(mutant)
        except BaseException:
            area.give_up()
            raise
        area.note(mutant, result, texts[mutant.path])
        bar.update(task, completed=area.valid)
        colour = {"killed": "green", "survived": "red"}.get(result.status, "yellow")
        line = f"{mutant.path}:{mutant.line(texts[mutant.path])}"
        bar.console.print(
            f"[{colour}]{result.status:9}[/] {result.seconds:6.1f} s  {mutant.kind}, {line}"
        )
        if result.status == "survived":
            bar.console.print(mutant.diff(texts[mutant.path], 1), markup=False, highlight=False)


def check_baseline(copy: Copy, areas: list[Area], mutants: list[Mutant]) -> None:
    """Run the tests without a mutant: what fails then says nothing of a mutant."""
    seen = set()
    for area in areas:
        language = "sql" if area.name.startswith("sql") else area.name
        if language in seen:
            continue
        seen.add(language)
        sample = next(mutant for mutant in mutants if mutant.area == area.name)
        result = copy.baseline(sample)
        console.print(f"without a mutant, {language}: {result.seconds:.0f} s")
        if result.status != "survived":
            failed = "\n  ".join(result.by)
            raise click.ClickException(f"these tests fail without a mutant:\n  {failed}")


@click.command()
@click.option("--area", "names", multiple=True, type=click.Choice(AREAS), help="All by default.")
@click.option("--seed", default=1, show_default=True, help="The same seed draws the same mutants.")
@click.option("--number", default=20, show_default=True, help="Valid mutants for each area.")
@click.option("--workers", default=2, show_default=True, help="Mutants that are tried at once.")
@click.option("--jobs", default=2, show_default=True, help="Processes of pytest for each of them.")
@click.option("--again", is_flag=True, help="Try those again that have survived before.")
@click.option("--list", "only_list", is_flag=True, help="Show what is drawn, and try nothing.")
@click.option(
    "--baseline/--no-baseline", default=True, help="First run the tests without a mutant."
)
@click.option(
    "--at-least", type=int, help="Exit with 1 when an area's score is lower, in per cent."
)
def main(
    names: tuple[str, ...],
    seed: int,
    number: int,
    workers: int,
    jobs: int,
    again: bool,
    only_list: bool,
    baseline: bool,
    at_least: int | None,
) -> None:
    """Change the code at random places and see whether a test notices."""
    texts: dict[str, str] = {}
    mutants: list[Mutant] = []
    for language in FILES:
        if any(name.startswith(language) for name in names or AREAS):
            found = texts_of(language)
            texts |= found
            mutants += all_mutants(language, found)
    KEPT.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in report.equivalents(EQUIVALENT) if entry.path in texts]
    argued = report.matched(entries, mutants, texts)
    areas = [Area(name, seed, number, mutants, set(argued)) for name in names or AREAS]
    if only_list:
        for area in areas:
            show(area, draw((m for m in mutants if m.area == area.name), seed), texts)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    columns = (
        TextColumn("{task.fields[area]:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with copies(workers, jobs) as made, Progress(*columns, console=console) as bar:
        if baseline:
            check_baseline(made[0], areas, mutants)
        for area in areas:
            bar.add_task("", total=number, area=area.name)
        with ThreadPoolExecutor(workers) as pool:
            try:
                for area in areas:
                    running = [pool.submit(work, copy, area, again, texts, bar) for copy in made]
                    for one in running:
                        one.result()
            except BaseException:
                for copy in made:
                    copy.close()
                raise
    stale = [entry for entry in entries if entry not in argued.values()]
    conclude(areas, seed, texts, argued, stale, at_least)


def show(area: Area, drawn: Iterator[Mutant], texts: dict[str, str]) -> None:
    for _, mutant in zip(range(area.number), drawn, strict=False):
        text = texts[mutant.path]
        console.print(
            f"{mutant.path}:{mutant.line(text)} {mutant.kind}", style="bold", highlight=False
        )
        console.print(mutant.diff(text, 0), markup=False, highlight=False)


def conclude(
    areas: list[Area],
    seed: int,
    texts: dict[str, str],
    argued: dict[Mutant, report.Equivalent],
    stale: list[report.Equivalent],
    at_least: int | None,
) -> None:
    """Show the table, and write the page with the survivors."""
    scores = []
    survivors = []
    for area in areas:
        results = area.results.items()
        scores.append(report.Score.of(area.name, [(r, m in argued) for m, r in results]))
        for mutant, result in results:
            if result.status == "survived":
                survivors.append((mutant, texts[mutant.path], argued.get(mutant)))
    title = f"Mutations drawn with seed {seed}"
    page = KEPT / f"report-{seed}.md"
    page.write_text(report.markdown(title, scores, survivors, stale), encoding="utf-8")
    console.print(report.table(scores, title))
    for entry in stale:
        console.print(f"equivalent.toml: no mutant of {entry.path} is like this: {entry.old}")
    console.print(f"The survivors are in {page.relative_to(ROOT)}")
    low = [
        s
        for s in scores
        if at_least is not None and s.killed * 100 < at_least * (s.valid - s.equivalent)
    ]
    if low or stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
