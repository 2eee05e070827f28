"""Measures what a statement costs the server, under arbiter and under what a user would pick.

PYTHONPATH=tests python -m bench
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from arbiter_db.embedded import EmbeddedServer, EmbeddedServerError
from bench import (
    audit,
    bulk,
    clients,
    cpu,
    growth,
    handover,
    heartbeats,
    load,
    polling,
    rejects,
    report,
)
from bench.samples import Comparison, Plan
from bench.stage import Stage

COMPARISONS: dict[str, Comparison] = {
    **cpu.COMPARISONS,
    **load.COMPARISONS,
    **clients.COMPARISONS,
    **bulk.COMPARISONS,
    **rejects.COMPARISONS,
    **heartbeats.COMPARISONS,
    **polling.COMPARISONS,
    **handover.COMPARISONS,
    **growth.COMPARISONS,
    **audit.COMPARISONS,
}

#: Commits reach the disk, unless a session says otherwise; the data is on one.
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
@click.option(
    "--report",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep JSON, tables and plots there; figures of other comparisons in it stay.",
)
def main(
    names: tuple[str, ...], rounds: int, seconds: int, scale: float, pg: int, folder: Path | None
) -> None:
    console = Console(stderr=True)
    plan = Plan(rounds, seconds, scale)
    found: dict[str, report.Figures] = {}
    try:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg, OPTIONS, in_memory=False))
            about = f"PostgreSQL {server.version}"
            stage = Stage(server, stack)
            progress = stack.enter_context(
                Progress(console=console, transient=True, disable=not console.is_terminal)
            )
            for name in names or COMPARISONS:
                task = progress.add_task(name, total=rounds + 1)
                advance = partial(progress.advance, task)
                samples = COMPARISONS[name].measure(stage, plan, advance)
                found[name] = report.as_figures(COMPARISONS[name], samples, about)
                progress.remove_task(task)
    except (EmbeddedServerError, load.BenchError) as error:
        sys.exit(f"bench: {error}")
    for title, table in report.tables(found):
        click.echo(f"\n{title}\n\n{table}")
    for name, figures in found.items():
        for fact, value in figures["facts"].items():
            click.echo(f"{name}: {fact}: {value}")
    if folder:
        report.keep(found, folder)


if __name__ == "__main__":
    main(prog_name="python -m bench")
