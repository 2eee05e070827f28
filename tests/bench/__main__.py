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
from bench.samples import Samples
from bench.stage import UNGUARDED, VARIANTS, Stage

#: Commits reach the disk, unless a session says otherwise.
DURABLE = {"fsync": "on", "full_page_writes": "on"}


@click.command(help=__doc__.partition("\n")[0])
@click.argument(
    "names",
    metavar="[COMPARISON]...",
    nargs=-1,
    type=click.Choice([*cpu.COMPARISONS, *load.LOADS]),
)
@click.option("--rounds", type=click.IntRange(2, 1000), default=7, show_default=True)
@click.option(
    "--seconds", type=click.IntRange(1, 60), default=4, show_default=True, help="A run of pgbench."
)
@click.option("--pg", default=18, show_default=True, help="Major version of PostgreSQL: 16 or 18.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    names: tuple[str, ...], rounds: int, seconds: int, pg: int, json_file: Path | None
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = names or (*cpu.COMPARISONS, *load.LOADS)
    costs, rates = {}, {}
    try:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg, DURABLE))
            console.print(f"PostgreSQL {server.version}, {platform.machine()}, {rounds} rounds")
            stage = Stage(server, stack)
            progress = stack.enter_context(
                Progress(console=console, transient=True, disable=not console.is_terminal)
            )
            for name in chosen:
                task = progress.add_task(name, total=rounds + 1)
                advance = partial(progress.advance, task)
                if name in cpu.COMPARISONS:
                    costs[name] = cpu.measure(stage, cpu.COMPARISONS[name], rounds, advance)
                else:
                    rates[name] = load.measure(stage, load.LOADS[name], rounds, seconds, advance)
                progress.remove_task(task)
    except (EmbeddedServerError, load.BenchError) as error:
        sys.exit(f"bench: {error}")
    if costs:
        console.print(_table("Server CPU per statement, as a multiple of unguarded", costs))
    if rates:
        console.print(_table("Single-row local inserts, throughput as a part of unguarded", rates))
    if json_file:
        json_file.write_text(json.dumps(_figures({**costs, **rates}), indent=2) + "\n")


def _table(title: str, found: dict[str, Samples]) -> Table:
    """Ratios of the medians to unguarded, with the spread of the rounds."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(f"{UNGUARDED}, {next(iter(found.values())).unit}", justify="right")
    for variant in VARIANTS[1:]:
        table.add_column(variant, justify="right")
    for samples in found.values():
        cells = [
            f"{samples.ratio(variant):.2f} ±{samples.spread(variant):.0%}"
            if variant in samples.rounds
            else ""
            for variant in VARIANTS[1:]
        ]
        table.add_row(samples.title, f"{samples.median(UNGUARDED):,.0f}", *cells)
    return table


def _figures(found: dict[str, Samples]) -> dict[str, object]:
    return {
        name: {
            "title": samples.title,
            "unit": samples.unit,
            "rounds": samples.rounds,
            "median": {variant: samples.median(variant) for variant in samples.rounds},
            "ratio": {variant: samples.ratio(variant) for variant in samples.rounds},
        }
        for name, samples in found.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m bench")
