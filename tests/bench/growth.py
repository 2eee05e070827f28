"""What a statement costs as tables grow: more leases, a longer history, more protected rows.

The app's own statements also cost more with each level of an index and with each page that is no
longer cached, so the same is measured without arbiter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random

import psycopg

from bench.load import BenchError
from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import SQL as STAGE_SQL
from bench.stage import UNGUARDED, Stage, load_sql
from bench.together import Together, connect, database, install, make_app, run_script

__all__ = ["COMPARISONS"]

SQL = load_sql("growth.sql")

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
#: Users of the databases whose leases do not grow.
USERS = 1_000
#: Statements in a turn. A quarter as many run before it, to cache the pages that they need.
STATEMENTS = 400
#: Up to this size arbiter's audit checks the data.
AUDITED_SIZE = 10_000

#: The statements that are measured. Users with a machine send all but the first.
LOCAL, CLOUD, STATUS, HEARTBEAT = "local", "cloud", "status", "heartbeat"
TITLES = {
    LOCAL: "single-row insert, local",
    CLOUD: "single-row insert, cloud",
    STATUS: "status",
    HEARTBEAT: "heartbeat by UPDATE",
}
NAMES = {LOCAL: "insert_local", CLOUD: "insert_cloud", STATUS: "status", HEARTBEAT: "heartbeat"}

_bars = count(1)


@dataclass(frozen=True)
class Kind:
    """A kind of growth: what to measure, under which schemes, and the bytes on disk of an item."""

    name: str
    what: str
    statements: tuple[str, ...]
    schemes: tuple[str, ...]
    bytes_each: int


KINDS = (
    Kind("leases", "leases", tuple(TITLES), ("arbiter", UNGUARDED), 1_200),
    Kind("history", "handovers of 1,000 leases", tuple(TITLES), ("arbiter",), 250),
    Kind("rows", "rows in the protected table", (LOCAL, CLOUD), ("arbiter", UNGUARDED), 450),
)


# Databases ---------------------------------------------------------------------------------------


def _sizes(plan: Plan) -> list[int]:
    largest = max(SIZES[0], int(SIZES[-1] * plan.scale))
    return sorted({min(size, largest) for size in SIZES})


def _users(kind: Kind, size: int) -> int:
    return size if kind.name == "leases" else USERS


def _make(stage: Stage, stack: ExitStack, kind: Kind, size: int) -> dict[str, Conn]:
    """The databases of one size, by scheme, with the same app."""
    users = _users(kind, size)
    # Every tenth user has one epoch more than the others.
    epochs = 1 if kind.name != "history" else max(1, size // (2 * USERS))
    name = f"bench_{kind.name}_{size}"
    places = {}
    with database(stage, f"{name}_app") as app:
        with connect(app) as conn:
            make_app(conn)
            run_script(conn, SQL["people"], users=users)
            if kind.name == "rows":
                run_script(conn, SQL["rows"], users=users, rows=size)
        for scheme in kind.schemes:
            places[scheme] = stack.enter_context(
                database(stage, f"{name}_{scheme}", template=f"{name}_app")
            )
    connections = {}
    for scheme, conninfo in places.items():
        if scheme == "arbiter":
            install(conninfo)
        conn = connections[scheme] = stack.enter_context(connect(conninfo))
        if scheme == "arbiter":
            run_script(conn, SQL["leases"], users=users, epochs=epochs)
        else:
            run_script(conn, STAGE_SQL["columns"])
        run_script(conn, SQL["machines"], users=users)
        conn.execute("vacuum analyze")
        # A small registry would be scanned, with md5() for each row, unlike the bigger ones.
        conn.execute("set enable_seqscan = off")
    return connections


def _need_room(stage: Stage, kind: Kind, sizes: list[int]) -> None:
    free = shutil.disk_usage(stage.server.data_directory).free
    needed = sum(sizes) * kind.bytes_each + (3 << 30)
    if free < needed:
        raise BenchError(
            f"{kind.what}: needs {needed >> 30} GB where the server's data is, and there are"
            f" {free >> 30}: a smaller --scale will do"
        )


# Rounds ------------------------------------------------------------------------------------------


def _play(kind: Kind, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> dict[str, Samples]:
    sizes = _sizes(plan)
    labels = tuple(f"{size:,}" for size in sizes)
    samples = {name: Samples(title, "us", labels) for name, title in _titles(kind).items()}
    random = Random(kind.name)
    _need_room(stage, kind, sizes)
    with ExitStack() as stack:
        # All sizes exist at once, so that they can take turns. The smaller ones add a tenth.
        standing = {size: _make(stage, stack, kind, size) for size in sizes}
        with psycopg.connect(stage.server.conninfo(), autocommit=True) as conn:
            conn.execute("checkpoint")
        for number in range(plan.rounds + 1):
            for statement in kind.statements:
                for size, label in zip(sizes, labels, strict=True):
                    users = _users(kind, size)
                    turns = [_turn(random, statement, users) for _ in range(STATEMENTS * 5 // 4)]
                    for scheme, conn in standing[size].items():
                        spent = _spend(conn, _sql(statement, scheme), turns)
                        if number > 0:
                            one = samples[_name(kind, statement, scheme)]
                            one.rounds[label].append(spent)
            on_round()
        # The data was not made by arbiter, so audit it, at sizes for which that is quick.
        flaws = {
            label: _flaws(standing[size]["arbiter"])
            for size, label in zip(sizes, labels, strict=True)
            if size <= AUDITED_SIZE and _users(kind, size) <= USERS
        }
        for one in samples.values():
            one.facts["audit findings"] = flaws
    return samples


def _turn(random: Random, statement: str, users: int) -> dict[str, int]:
    """A user drawn from all that have a machine, or have none."""
    tenth = random.randrange(users // 10) * 10
    user = tenth + (random.randrange(1, 10) if statement == LOCAL else 10)
    return {"user": user, "bar": next(_bars)}


def _spend(conn: Conn, statement: bytes, turns: list[dict[str, int]]) -> float:
    """The CPU time of each, in microseconds, after the first fifth of them."""
    warm_up = len(turns) // 5
    for turn in turns[:warm_up]:
        conn.execute(statement, turn)
    with cpu_time(conn) as cost:
        for turn in turns[warm_up:]:
            conn.execute(statement, turn)
    return cost.spent / (len(turns) - warm_up)


def _sql(statement: str, scheme: str) -> bytes:
    if statement == STATUS and scheme == UNGUARDED:
        return STAGE_SQL["probe"]
    return STAGE_SQL[NAMES[statement]]


def _flaws(conn: Conn) -> int:
    """The number of findings, except those about rows from before arbiter."""
    found = conn.execute("select reason from arbiter.audit('public.signals')").fetchall()
    return sum(reason != "older_than_protection" for (reason,) in found)


def _name(kind: Kind, statement: str, scheme: str) -> str:
    return f"{kind.name}_{statement}{'' if scheme == 'arbiter' else '_' + scheme}"


def _titles(kind: Kind) -> dict[str, str]:
    return {
        _name(kind, statement, scheme): f"{TITLES[statement]}, {scheme}"
        for statement in kind.statements
        for scheme in kind.schemes
    }


def _group(kind: Kind) -> Group:
    return Group(f"Server CPU per statement by {kind.what}, as a multiple of the fewest")


COMPARISONS: dict[str, Comparison] = {
    name: comparison
    for kind in KINDS
    for name, comparison in Together(partial(_play, kind), _group(kind), _titles(kind))
    .comparisons()
    .items()
}
