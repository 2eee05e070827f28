"""What a rejected write costs, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.load import BenchError
from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import UNGUARDED, USERS, Stage, load_sql

__all__ = ["COMPARISONS", "Rejects"]

SQL = load_sql("rejects.sql")

GROUP = Group("Server CPU per rejected insert, as a multiple of one that unguarded accepts")

#: The facts are given for this many rejects.
MILLION = 1_000_000
REJECTS = 100_000


@dataclass(frozen=True)
class Rejects:
    """Single-row local inserts of users whose machine is active."""

    title: str = "rejected single-row insert, local"
    count: int = 400
    group: Group = GROUP

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "us", (UNGUARDED, "exists", "arbiter"))
        random = Random(self.title)
        for variant in samples.variants:
            stage.connection(variant).execute(SQL["insert"], {"user": 1})
        for number in range(plan.rounds + 1):
            users = _users(random, self.count)
            for variant in samples.variants:
                conn = stage.connection(variant)
                with cpu_time(conn) as cost:
                    rejected = _insert(conn, users)
                if rejected != (0 if variant == UNGUARDED else self.count):
                    raise BenchError(f"{variant}: {rejected} of {self.count} inserts rejected")
                _restore(conn)
                if number > 0:
                    samples.rounds[variant].append(cost.spent / self.count)
            on_round()
        count = max(self.count, int(REJECTS * plan.scale))
        for variant in samples.variants:
            samples.facts[variant] = _leave_behind(stage.connection(variant), _users(random, count))
        return samples


def _users(random: Random, count: int) -> list[int]:
    """Random users with a machine: these have even numbers."""
    return [random.randrange(2, USERS + 1, 2) for _ in range(count)]


def _insert(conn: Conn, users: list[int]) -> int:
    """Try an insert for each user; return how many were rejected."""
    rejected = 0
    for user in users:
        try:
            conn.execute(SQL["insert"], {"user": user})
        except psycopg.Error as error:
            # The code for a browser's write while the cloud is active.
            if error.sqlstate != "WX001":
                raise
            rejected += 1
    return rejected


def _restore(conn: Conn) -> None:
    conn.execute(SQL["forget"])
    conn.execute(SQL["vacuum"])


def _leave_behind(conn: Conn, users: list[int]) -> dict[str, float]:
    """The traces of these inserts, with no vacuum in between."""
    conn.execute(SQL["keep_dead"])
    try:
        before = _traces(conn)
        _insert(conn, users)
        after = _traces(conn)
        conn.execute(SQL["forget"])
    finally:
        conn.execute(SQL["keep_none"])
        _restore(conn)
    left = {name: (after[name] - before[name]) / len(users) for name in after}
    return {
        "inserts": len(users),
        "table bytes per million": left["table_bytes"] * MILLION,
        "index bytes per million": left["index_bytes"] * MILLION,
        "bytes of arbiter's tables per million": left["arbiter_bytes"] * MILLION,
        "xids each": left["xids"],
        "WAL bytes each": left["wal_bytes"],
    }


def _traces(conn: Conn) -> dict[str, Any]:
    with conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(SQL["traces"]).fetchone()
    assert row is not None
    return row


COMPARISONS: dict[str, Comparison] = {"rejects": Rejects()}
