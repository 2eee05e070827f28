"""What a statement costs the server: CPU time of its backend, side by side.

The time is the kernel's, from ``/proc/<pid>/schedstat``: what the client, the network and other
processes do is not in it, but for what they do to caches. Variants take turns, round by round, and
the first round, which warms up, does not count. ``unguarded`` plays twice: how far the two differ
is the machine's noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import psycopg

import arbiter_db
from arbiter_db.embedded import EmbeddedServer
from arbiter_db.queries import _load

__all__ = ["COMPARISONS", "VARIANTS", "Comparison", "Samples", "Stage", "measure"]

DEMO = Path(arbiter_db.__file__).parent / "demo"
SQL = _load((Path(__file__).parent / "bench.sql").read_text(encoding="utf-8"))

#: Each with a trader, every second one with a machine that runs.
USERS = 1_000

#: Who decides. The client-side schemes ask, or lock, in a statement of their own before the write.
VARIANTS = ("unguarded", "unguarded again", "exists", "check", "advisory", "arbiter")

Conn = psycopg.Connection[Any]

_bars = count(1)


@dataclass(frozen=True)
class Comparison:
    """Statements of one kind, under all variants or some.

    ``statement`` is the name of one in ``bench.sql``, or one for each variant; ``machines`` says
    that it is about users with a machine, otherwise those without.
    """

    title: str
    statement: str | dict[str, str]
    variants: tuple[str, ...] = VARIANTS
    machines: bool = False
    writes: bool = True
    count: int = 400

    def of(self, variant: str) -> bytes:
        """The statement under that variant."""
        name = self.statement if isinstance(self.statement, str) else self.statement[variant]
        return SQL[name]


OWN = ("unguarded", "unguarded again", "arbiter")

COMPARISONS = {
    "local": Comparison("single-row insert, local", "insert_local"),
    "cloud": Comparison("single-row insert, cloud", "insert_cloud", machines=True),
    "batch": Comparison("batch of 100, local", "batch_local", count=40),
    "heartbeat": Comparison("heartbeat by UPDATE", "heartbeat", OWN, machines=True, writes=False),
    "status": Comparison(
        "status, against a row by primary key",
        {"unguarded": "probe", "unguarded again": "probe", "arbiter": "status"},
        OWN,
        machines=True,
        writes=False,
    ),
}


@dataclass
class Samples:
    """CPU time in microseconds per statement, one value a round, by variant."""

    comparison: Comparison
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, variant: str) -> float:
        """Of the rounds that count."""
        return statistics.median(self.rounds[variant])

    def ratio(self, variant: str) -> float:
        """Of the medians, to unguarded."""
        return self.median(variant) / self.median("unguarded")

    def spread(self, variant: str) -> float:
        """Half the range between the quartiles, as a part of the median."""
        low, _, high = statistics.quantiles(self.rounds[variant], n=4)
        return (high - low) / 2 / self.median(variant)


class Stage:
    """A database for each variant, on one server, with a connection to each."""

    def __init__(self, server: EmbeddedServer, stack: ExitStack) -> None:
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute((DEMO / "roles.sql").read_bytes())
        self.connections: dict[str, Conn] = {}
        for variant in VARIANTS:
            conn = stack.enter_context(_prepare(server, variant))
            self.connections[variant] = conn


def _prepare(server: EmbeddedServer, variant: str) -> Conn:
    """Make the database of a variant; returns a connection that does not wait for the disk."""
    name = f"bench_{variant.replace(' ', '_')}"
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute(f"create database {name} owner app_owner".encode())
    conninfo = server.conninfo(name, "app_owner")
    conn = psycopg.connect(conninfo, autocommit=True)
    conn.execute((DEMO / "trading.sql").read_bytes())
    conn.execute(SQL["lean"])
    psycopg.ClientCursor(conn).execute(SQL["people"], {"users": USERS})  # several statements
    if variant == "arbiter":
        arbiter_db.install(conninfo)
        conn.execute(SQL["settings"])
    else:
        conn.execute(SQL["columns"])
        if variant == "exists":
            conn.execute(SQL["exists"])
    conn.execute(SQL["run"])
    conn.execute(SQL["run"])  # the second heartbeat ends the drain
    conn.execute(SQL["first"])
    conn.execute("vacuum analyze")
    # The commit is the same for all of them, and disks are noisy.
    conn.execute("set synchronous_commit = off")
    conn.prepare_threshold = 0
    return conn


# Playing -----------------------------------------------------------------------------------------


def measure(
    stage: Stage,
    comparison: Comparison,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> Samples:
    """Let the variants take turns; each plays ``comparison.count`` statements a round."""
    samples = Samples(comparison, {variant: [] for variant in comparison.variants})
    random = Random(comparison.title)
    first = 2 if comparison.machines else 1
    for number in range(rounds + 1):
        # The same users for all variants, each signal for a bar of its own.
        users = [random.randrange(first, USERS + 1, 2) for _ in range(comparison.count)]
        turns = [{"user": user, "bar": next(_bars)} for user in users]
        for variant in comparison.variants:
            conn = stage.connections[variant]
            play = _plays(conn, variant, comparison)
            before = _cpu_time(conn)
            for turn in turns:
                play(turn)
            spent = (_cpu_time(conn) - before) / len(turns)
            if number > 0:
                samples.rounds[variant].append(spent)
        on_round()
    return samples


def _plays(conn: Conn, variant: str, comparison: Comparison) -> Callable[[dict[str, int]], None]:
    """One statement, with what the variant's client sends around it."""
    write = comparison.of(variant)

    def alone(turn: dict[str, int]) -> None:
        conn.execute(write, turn)

    def after_asking(turn: dict[str, int]) -> None:
        conn.execute(SQL["ask"], turn).fetchone()
        conn.execute(write, turn)

    def under_lock(turn: dict[str, int]) -> None:
        with conn.transaction():
            conn.execute(SQL["lock"], turn)
            conn.execute(SQL["ask"], turn).fetchone()
            conn.execute(write, turn)

    if not comparison.writes:
        return alone
    return {"check": after_asking, "advisory": under_lock}.get(variant, alone)


def _cpu_time(conn: Conn) -> float:
    """What the connection's backend has spent on a CPU, in microseconds."""
    text = Path(f"/proc/{conn.info.backend_pid}/schedstat").read_text()
    return int(text.split()[0]) / 1_000
