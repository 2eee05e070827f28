"""Measures what a statement costs the server, under arbiter and under what a user would pick.

A NAME is a comparison or a suite of them; without one all are played, which takes hours.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError
from bench import (
    audit,
    bulk,
    clients,
    cpu,
    growth,
    handover,
    heartbeats,
    instructions,
    load,
    polling,
    rejects,
    report,
)
from bench.samples import Comparison, Plan
from bench.stage import Stage

SUITES: dict[str, dict[str, Comparison]] = {
    module.__name__.removeprefix("bench."): module.COMPARISONS
    for module in (
        *(cpu, instructions, load, clients, bulk, rejects),
        *(heartbeats, polling, handover, growth, audit),
    )
}
COMPARISONS = {name: one for suite in SUITES.values() for name, one in suite.items()}

#: The data is on a disk, and commits reach it unless a session sets otherwise.
OPTIONS = {"fsync": "on", "full_page_writes": "on"}


@click.command(help=__doc__)
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice([*SUITES, *COMPARISONS]))
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
@click.option("--pg", default=18, show_default=True, help="Major version of PostgreSQL.")
@click.option(
    "--report",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep JSON, tables and the picture there; figures of other comparisons in it stay.",
)
def main(
    names: tuple[str, ...],
    rounds: int,
    seconds: int,
    scale: float,
    pg: int,
    folder: Path | None,
) -> None:
    console = Console(stderr=True)
    plan = Plan(rounds, seconds, scale)
    chosen = dict.fromkeys(
        name for given in names or SUITES for name in SUITES.get(given, {given: None})
    )
    found: dict[str, report.Figures] = {}
    failure = ""
    try:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg, OPTIONS, in_memory=False))
            about = f"PostgreSQL {server.version}"
            click.echo(f"{about}, arbiter in {Path(arbiter_db.__file__).parents[1]}", err=True)
            stage = Stage(server, stack)
            progress = stack.enter_context(
                Progress(console=console, transient=True, disable=not console.is_terminal)
            )
            for name in chosen:
                task = progress.add_task(name, total=rounds + 1)
                advance = partial(progress.advance, task)
                samples = COMPARISONS[name].measure(stage, plan, advance)
                progress.remove_task(task)
                found[name] = report.as_figures(COMPARISONS[name], samples, about)
                if folder:  # at once: what comes next may take hours, and fail
                    report.keep(found, folder)
    except (EmbeddedServerError, load.BenchError) as error:
        failure = f"bench: {error}"
    for title, table in report.tables(found):
        click.echo(f"\n{title}\n\n{table}")
    for name, figures in found.items():
        for fact, value in figures["facts"].items():
            click.echo(f"{name}: {fact}: {value}")
    sys.exit(failure or None)


if __name__ == "__main__":
    main(prog_name="python -m bench")
