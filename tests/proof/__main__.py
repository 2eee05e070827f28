"""The long proof: the workload against arbiter, with faults, and against naive rules.

    PYTHONPATH=tests python -m proof
    PYTHONPATH=tests python -m proof --replay 7.3 --against arbiter

Exit status 1 when arbiter let a violation through or the run was smaller than asked for; also when
the checker did not catch a rule that is known to be unsafe, because it then proves nothing.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError
from proof.pgbouncer import PgBouncer, PgBouncerError, fetch
from proof.rounds import UNSAFE, Goal, Prover, Tally
from proof.workload import RULES, SERVER_OPTIONS, create_roles

WITH_LEASES = ("arbiter", "advisory", "one_step")

# Output ------------------------------------------------------------------------------------------


def _table(provers: Sequence[Prover]) -> Table:
    """The figures of all rules, side by side."""
    table = Table(title="Same workload, same seed", title_justify="left")
    table.add_column()
    for prover in provers:
        table.add_column(prover.rule, justify="right")
    tallies = [prover.tally for prover in provers]

    def row(label: str, cells: list[str], style: str | None = None) -> None:
        table.add_row(label, *cells, style=style)

    def counts(label: str, name: str) -> None:
        row(label, [f"{getattr(tally, name):,}" for tally in tallies])

    counts("writes attempted", "writes")
    counts("rows attempted", "rows")
    counts("admitted", "admitted")
    for code in sorted({code for tally in tallies for code in tally.rejected}):
        row(f"  rejected {code}", [f"{tally.rejected[code]:,}" for tally in tallies])
    counts("registry writes", "registry_writes")
    # The naive rules have no lease to hand over and no decision tables to compare answers with.
    row(
        "handovers",
        [
            f"{prover.tally.handovers:,}" if prover.rule in WITH_LEASES else "-"
            for prover in provers
        ],
    )
    row("faults", [f"{tally.faults.total():,}" for tally in tallies])
    counts("heartbeats", "heartbeats")
    counts("  late", "late_heartbeats")
    row("  longest, s", [f"{tally.longest_heartbeat:.2f}" for tally in tallies])
    row("longest write, s", [f"{tally.longest_write:.2f}" for tally in tallies])
    for label, name in (("one right answer", "sharp"), ("several", "loose")):
        row(
            label,
            [
                f"{getattr(prover.tally, name):,}" if prover.rule == "arbiter" else "-"
                for prover in provers
            ],
        )
    row("played, s", [f"{tally.seconds:.0f}" for tally in tallies])
    table.add_section()
    kinds = sorted({kind for tally in tallies for kind in tally.violations})
    for kind in kinds:
        row(kind, [f"{tally.violations[kind]:,}" for tally in tallies])
    row("violations", [f"{tally.violations.total():,}" for tally in tallies], "bold")
    row("per million writes", [f"{_rate(tally):,.0f}" for tally in tallies], "bold")
    row(
        "first caught after, s",
        ["-" if tally.first_after is None else f"{tally.first_after:.0f}" for tally in tallies],
    )
    return table


def _rate(tally: Tally) -> float:
    return 1e6 * tally.violations.total() / max(tally.writes, 1)


def _line(prover: Prover) -> Text:
    """The progress in one line."""
    tally = prover.tally
    return Text(
        f"{prover.rule}: {prover.elapsed:.0f} s, {prover.writes:,} writes,"
        f" {prover.handovers:,} handovers, {tally.faults.total()} faults,"
        f" {tally.violations.total()} violations   {prover.note}",
        no_wrap=True,
        overflow="ellipsis",
    )


@contextmanager
def _watching(prover: Prover, console: Console) -> Iterator[None]:
    """Show the progress while it runs, on a terminal."""
    if not console.is_terminal:
        yield
    else:
        with Live(console=console, get_renderable=lambda: _line(prover), transient=True):
            yield
    console.print(_line(prover))


@click.command(help=__doc__.partition("\n")[0])
@click.option("--seed", help="Of everything; one is drawn and printed when it is not given.")
@click.option("--replay", metavar="SEED", help="Play the one round of that seed.")
@click.option(
    "--against",
    "rules",
    multiple=True,
    type=click.Choice([*RULES, "all"]),
    default=["all"],
    help="Who decides; may be repeated.",
)
@click.option("--writes", default=1_000_000, show_default=True, help="At least, by arbiter.")
@click.option("--handovers", default=10_000, show_default=True, help="At least, by arbiter.")
@click.option("--faults", "wanted", default=200, show_default=True, help="For arbiter.")
@click.option("--rounds", default=1_000, show_default=True, help="At most, for each rule.")
@click.option("--seconds", default=3600.0, show_default=True, help="At most, for arbiter.")
@click.option(
    "--opponent-seconds", default=60.0, show_default=True, help="At most, for every other rule."
)
@click.option("--pg", default=18, show_default=True, help="Major version of PostgreSQL.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    seed: str | None,
    replay: str | None,
    rules: tuple[str, ...],
    writes: int,
    handovers: int,
    wanted: int,
    rounds: int,
    seconds: float,
    opponent_seconds: float,
    pg: int,
    json_file: Path | None,
) -> None:
    console = Console()
    seed = replay or seed or secrets.token_hex(4)
    console.print(f"seed {seed}")
    provers: list[Prover] = []
    short = False
    try:
        fetch()
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(pg, SERVER_OPTIONS))
            bouncer = stack.enter_context(PgBouncer(server))
            create_roles(server)
            console.print(f"PostgreSQL {server.version}, PgBouncer {bouncer.version}")
            for rule in RULES:
                if not {"all", rule} & set(rules):
                    continue
                prover = Prover(rule, seed, server, bouncer)
                provers.append(prover)
                own = rule == "arbiter"
                goal = Goal(
                    writes,
                    handovers,
                    faults=wanted if own else 0,
                    seconds=seconds if own else opponent_seconds,
                )
                seeds = [replay] if replay else [f"{seed}.{n}" for n in range(rounds)]
                with _watching(prover, console):
                    prover.prove(seeds, goal)
                if own and prover.tally.violations:
                    _explain(prover, console)
                elif own and not replay and not prover.reaches(goal):
                    short = True
                    console.print("[bold red]that was less than was asked for")
    except (EmbeddedServerError, PgBouncerError) as error:
        raise click.ClickException(str(error)) from error
    console.print(_table(provers))
    if json_file is not None:
        json_file.write_text(json.dumps(_as_json(seed, provers), indent=1) + "\n")
    sys.exit(not _verdict(provers, console) or short)


def _explain(prover: Prover, console: Console) -> None:
    tally = prover.tally
    console.print(tally.first or "", markup=False, highlight=False)
    again = tally.first_seed or prover.seed
    console.print(
        f"again: PYTHONPATH=tests {Path(sys.executable).name} -m proof"
        f" --replay {again} --against {prover.rule}",
        markup=False,
        highlight=False,
    )


def _as_json(seed: str, provers: Sequence[Prover]) -> dict[str, Any]:
    return {
        "seed": seed,
        "server": provers[0].server.version if provers else None,
        "rules": {
            prover.rule: {
                **{figure.name: getattr(prover.tally, figure.name) for figure in fields(Tally)},
                "violations_per_million_writes": _rate(prover.tally),
            }
            for prover in provers
        },
    }


def _verdict(provers: Sequence[Prover], console: Console) -> bool:
    """Say whether the proof holds."""
    holds = True
    for prover in provers:
        caught = bool(prover.tally.violations)
        if prover.rule == "arbiter" and caught:
            console.print("[bold red]arbiter let violations through")
            holds = False
        if prover.rule in UNSAFE and not caught:
            console.print(f"[bold red]{prover.rule} is unsafe, and the checker did not catch it")
            holds = False
    return holds


if __name__ == "__main__":
    main()
