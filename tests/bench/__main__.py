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
from bench.cpu import COMPARISONS, VARIANTS, Samples, Stage, measure


@click.command(help=__doc__.partition("\n")[0])
@click.argument("names", metavar="[COMPARISON]...", nargs=-1, type=click.Choice([*COMPARISONS]))
@click.option("--rounds", type=click.IntRange(2, 1000), default=11, show_default=True)
@click.option("--pg", default=18, show_default=True, help="Major version of PostgreSQL.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures.")
def main(names: tuple[str, ...], rounds: int, pg: int, json_file: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg))
            console.print(f"PostgreSQL {server.version}, {platform.machine()}, {rounds} rounds")
            stage = Stage(server, stack)
            found = {}
            progress = stack.enter_context(
                Progress(console=console, transient=True, disable=not console.is_terminal)
            )
            for name in names or COMPARISONS:
                comparison = COMPARISONS[name]
                task = progress.add_task(comparison.title, total=rounds + 1)
                found[name] = measure(stage, comparison, rounds, partial(progress.advance, task))
                progress.remove_task(task)
    except EmbeddedServerError as error:
        sys.exit(f"bench: {error}")
    console.print(_table(found))
    if json_file:
        json_file.write_text(json.dumps(_figures(found), indent=2) + "\n")


def _table(found: dict[str, Samples]) -> Table:
    """Ratios of the medians to unguarded, with the spread of the rounds."""
    table = Table(
        title="Server CPU per statement, as a multiple of unguarded", title_justify="left"
    )
    table.add_column("statement")
    table.add_column("unguarded, us", justify="right")
    for variant in VARIANTS[1:]:
        table.add_column(variant, justify="right")
    for samples in found.values():
        cells = [
            f"{samples.ratio(variant):.2f} ±{samples.spread(variant):.0%}"
            if variant in samples.rounds
            else ""
            for variant in VARIANTS[1:]
        ]
        table.add_row(samples.comparison.title, f"{samples.median('unguarded'):.0f}", *cells)
    return table


def _figures(found: dict[str, Samples]) -> dict[str, object]:
    return {
        name: {
            "title": samples.comparison.title,
            "unit": "us of server CPU per statement",
            "rounds": samples.rounds,
            "median": {variant: samples.median(variant) for variant in samples.rounds},
            "ratio": {variant: samples.ratio(variant) for variant in samples.rounds},
        }
        for name, samples in found.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m bench")
