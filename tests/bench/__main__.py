"""Measures what a statement costs the server, under arbiter and under what a user would pick.

PYTHONPATH=tests python -m bench
"""

from __future__ import annotations

import json
import platform
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from arbiter_db.embedded import EmbeddedServer, EmbeddedServerError
from bench import cpu, load
from bench.samples import Comparison, Group, Plan, Samples
from bench.stage import Stage

COMPARISONS: dict[str, Comparison] = {**cpu.COMPARISONS, **load.COMPARISONS}

#: Commits reach the disk, unless a session says otherwise.
OPTIONS = {"fsync": "on", "full_page_writes": "on"}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("names", metavar="[COMPARISON]...", nargs=-1, type=click.Choice([*COMPARISONS]))
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, show_default=True)
@click.option(
    "--seconds", type=click.IntRange(1, 3600), default=4, show_default=True, help="A turn by time."
)
@click.option(
    "--scale",
    type=click.FloatRange(0.0001, 1),
    default=1.0,
    show_default=True,
    help="Size of big tables, as a part of the full size.",
)
@click.option("--pg", default=18, show_default=True, help="Major version of PostgreSQL: 16 or 18.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    names: tuple[str, ...], rounds: int, seconds: int, scale: float, pg: int, json_file: Path | None
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = Plan(rounds, seconds, scale)
    found: dict[str, Samples] = {}
    try:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg, OPTIONS))
            console.print(f"PostgreSQL {server.version}, {platform.machine()}, {rounds} rounds")
            stage = Stage(server, stack)
            progress = stack.enter_context(
                Progress(console=console, transient=True, disable=not console.is_terminal)
            )
            for name in names or COMPARISONS:
                task = progress.add_task(name, total=rounds + 1)
                advance = partial(progress.advance, task)
                found[name] = COMPARISONS[name].measure(stage, plan, advance)
                progress.remove_task(task)
    except (EmbeddedServerError, load.BenchError) as error:
        sys.exit(f"bench: {error}")
    groups = {COMPARISONS[name].group: None for name in found}
    for group in groups:
        members = [samples for name, samples in found.items() if COMPARISONS[name].group == group]
        console.print(_table(group, members))
    if json_file:
        json_file.write_text(json.dumps(_figures(found), indent=2) + "\n")


def _table(group: Group, members: list[Samples]) -> Table:
    """The medians, as ratios where the group has them so, with the spread of the rounds."""
    table = Table(title=group.title, title_justify="left")
    table.add_column("")
    columns = list(dict.fromkeys(variant for samples in members for variant in samples.variants))
    for variant in columns:
        table.add_column(variant, justify="right")
    for samples in members:
        cells = []
        for variant in columns:
            if variant not in samples.variants:
                cells.append("")
            elif group.ratios and variant != samples.base:
                cells.append(f"{samples.ratio(variant):.2f} ±{samples.spread(variant):.0%}")
            else:
                cells.append(f"{samples.median(variant):,.4g} {samples.unit}")
        table.add_row(samples.title, *cells)
    return table


def _figures(found: dict[str, Samples]) -> dict[str, object]:
    return {
        name: {
            "title": samples.title,
            "unit": samples.unit,
            "rounds": samples.rounds,
            "median": {variant: samples.median(variant) for variant in samples.variants},
            "ratio": {variant: samples.ratio(variant) for variant in samples.variants},
            "facts": samples.facts,
        }
        for name, samples in found.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m bench")
