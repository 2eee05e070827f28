"""What many rows at once cost the server: batches, COPY, and the first write of many users."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import md5
from itertools import count
from random import Random
from time import perf_counter
from uuid import UUID

from arbiter_db.queries import QUERIES
from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import AGAIN, UNGUARDED, Stage, load_sql
from bench.together import run_script

__all__ = ["COMPARISONS"]

SQL = load_sql("bulk.sql")

VARIANTS = (UNGUARDED, AGAIN, "exists", "arbiter")

BATCHES = Group("Batches: server CPU per row, as a multiple of unguarded")
COPIES = Group("COPY of 1,000,000 rows: server CPU per row, as a multiple of unguarded")
FIRST = Group("First write: server CPU per user, as a multiple of unguarded")

#: The table, with the owner over a foreign key or in a column.
TABLES = {"signals": "owner over a foreign key", "alerts": "owner by column"}

#: Rows of a COPY and users, at full size.
ROWS = 1_000_000
MANY = 100_000
#: Rows of a batch, and the least number of users.
SOME = 1_000
#: Rows in a round of batches, for every size of a batch.
BATCHED_ROWS = 10_000
#: Rounds of the big loads, which take long and have little noise.
LONG_ROUNDS = 3

#: Users with a lease, and users without one.
CROWD, NEWCOMERS = "crowd", "newcomer"

_bars = count(1)


# The stage ---------------------------------------------------------------------------------------


def _many(plan: Plan) -> int:
    return max(SOME, round(MANY * plan.scale))


def _prepare(stage: Stage, plan: Plan, kind: str) -> None:
    """Add the table whose rows name their user, and users of that kind, where they are missing."""
    for variant in VARIANTS:
        conn = stage.connection(variant)
        if not _value(conn, b"select to_regclass('public.alerts') is not null"):
            conn.execute(SQL["alerts"])
            if variant == "arbiter":
                conn.execute(SQL["protect"])
                conn.execute(QUERIES["finish"])
            else:
                run_script(conn, SQL["columns"])
                if variant == "exists":
                    run_script(conn, SQL["exists"])
        people: dict[str, str | int] = {"kind": kind, "users": _many(plan)}
        if not _value(conn, SQL["has_users"], people):
            run_script(conn, SQL["users"], **people)
            if kind == CROWD:
                conn.execute(SQL["first_signals"], people)
            conn.execute("vacuum analyze")


def _value(conn: Conn, query: bytes, values: dict[str, str | int] | None = None) -> bool:
    row = conn.execute(query, values).fetchone()
    return row is not None and bool(row[0])


def _clear(conn: Conn, table: str) -> None:
    conn.execute(SQL[f"clear_{table}"])


# Comparisons -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """Statements that insert so many rows of so many users; the samples are for a row."""

    title: str
    table: str
    rows: int
    users: int = 1
    group: Group = BATCHES

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        _prepare(stage, plan, CROWD)
        samples = Samples(self.title, "us", VARIANTS)
        random = Random(self.title)
        insert = SQL[f"batch_{self.table}"]
        statements = max(5, BATCHED_ROWS // self.rows)
        for number in range(plan.rounds + 1):
            batches = [
                {
                    **{"kind": CROWD, "rows": self.rows, "users": self.users, "bar": next(_bars)},
                    "first": random.randint(1, _many(plan) - self.users + 1),
                }
                for _ in range(statements)
            ]
            for variant in VARIANTS:
                conn = stage.connection(variant)
                _clear(conn, self.table)
                with cpu_time(conn) as cost:
                    for batch in batches:
                        conn.execute(insert, batch)
                if number > 0:
                    samples.rounds[variant].append(cost.spent / (statements * self.rows))
                _clear(conn, self.table)
            on_round()
        return samples


@dataclass(frozen=True)
class Copies:
    """COPY of many rows, their users in turn; the samples are for a row.

    ``users`` None: as many as there are. The facts have the time on the wall, for a row, too.
    """

    title: str
    table: str
    users: int | None
    group: Group = COPIES

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        _prepare(stage, plan, CROWD)
        samples = Samples(self.title, "us", VARIANTS)
        walls: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        rows = round(ROWS * plan.scale)
        data = _rows(self.table, rows, self.users or _many(plan))
        for number in range(min(plan.rounds, LONG_ROUNDS) + 1):
            for variant in VARIANTS:
                conn = stage.connection(variant)
                _clear(conn, self.table)
                began = perf_counter()
                load = SQL[f"copy_{self.table}"]
                with cpu_time(conn) as cost, conn.cursor().copy(load) as copy:
                    copy.write(data)
                if number > 0:
                    samples.rounds[variant].append(cost.spent / rows)
                    walls[variant].append((perf_counter() - began) * 1e6 / rows)
                _clear(conn, self.table)
            on_round()
        samples.facts["wall, us"] = {
            name: statistics.median(times) for name, times in walls.items()
        }
        return samples


def _rows(table: str, rows: int, users: int) -> bytes:
    """Rows for COPY, each with a minute of its own."""
    prefix = CROWD + ("trader" if table == "signals" else "")
    owners = [UUID(md5(f"{prefix}{n + 1}".encode()).hexdigest()) for n in range(users)]
    start, minute = datetime(2020, 1, 1), timedelta(minutes=1)
    lines = (
        f"{owners[n % users]}\tBTCUSDT\t1m\tbuy\t{start + n * minute}+00\n" for n in range(rows)
    )
    return "".join(lines).encode()


@dataclass(frozen=True)
class FirstWrites:
    """One statement with a row for each of many users who never wrote; the samples are for a user.

    It is rolled back, so that it is the first one in every round.
    """

    title: str
    table: str
    group: Group = FIRST

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        _prepare(stage, plan, NEWCOMERS)
        samples = Samples(self.title, "us", VARIANTS)
        users = _many(plan)
        for number in range(min(plan.rounds, LONG_ROUNDS) + 1):
            for variant in VARIANTS:
                conn = stage.connection(variant)
                with cpu_time(conn) as cost, conn.transaction(force_rollback=True):
                    conn.execute(SQL[f"first_{self.table}"], {"kind": NEWCOMERS, "users": users})
                if number > 0:
                    samples.rounds[variant].append(cost.spent / users)
                _clear(conn, self.table)
                conn.execute("vacuum")
            on_round()
        return samples


COMPARISONS: dict[str, Comparison] = {}
for _table, _owner in TABLES.items():
    for _size in (10, 100, 1_000):
        COMPARISONS[f"batch_{_size}_{_table}"] = Batches(
            f"batch of {_size:,}, {_owner}", _table, _size
        )
    COMPARISONS[f"batch_users_{_table}"] = Batches(
        f"batch of {SOME:,} over as many users, {_owner}", _table, SOME, SOME
    )
    for _users in (1, SOME, None):
        COMPARISONS[f"copy_{_users or MANY}_{_table}"] = Copies(
            f"COPY, {_users or MANY:,} user{'s' * (_users != 1)}, {_owner}", _table, _users
        )
COMPARISONS["first_writes"] = FirstWrites(f"first write of {MANY:,} users", "signals")
