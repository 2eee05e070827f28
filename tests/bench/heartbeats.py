"""What heartbeats cost: many in one statement, by many clients, and a steady stream of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from psycopg.errors import LockNotAvailable
from psycopg.rows import dict_row

from bench.load import BenchError
from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import AGAIN, UNGUARDED, Stage, load_sql
from bench.stage import SQL as STAGE_SQL
from bench.together import connect, database, install, make_app, run_script

__all__ = ["COMPARISONS", "Script", "start_pgbench", "wait_for_pgbench"]

SQL = load_sql("heartbeats.sql")

CALL = "arbiter.heartbeat"

MANY = Group("Heartbeats in one statement: server CPU of each, as a multiple of a plain UPDATE")
THROUGHPUT = Group("Heartbeats by many clients, throughput as a part of a plain UPDATE")
STEADY = Group("Heartbeats, 1,000 a second: the share of HOT updates", ratios=False)


# Databases ---------------------------------------------------------------------------------------


@contextmanager
def _machines(stage: Stage, variant: str, machines: int) -> Iterator[str]:
    """A database with so many machines, each holding its user's lease; as many users have none.

    Yields how to reach it, as the app's owner.
    """
    name = f"bench_heartbeats_{variant.replace(' ', '_')}"
    with database(stage, name) as conninfo:
        with connect(conninfo) as conn:
            make_app(conn)
            run_script(conn, STAGE_SQL["people"], users=2 * machines)
            if variant == "arbiter":
                install(conninfo)
            else:
                run_script(conn, STAGE_SQL["columns"])
            conn.execute(STAGE_SQL["run"])
            conn.execute(STAGE_SQL["run"])  # the second heartbeat ends the drain
            conn.execute(STAGE_SQL["first"])
            conn.execute("vacuum analyze")
        yield conninfo


# Many in one statement ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Many:
    """So many machines' heartbeats in one statement, by UPDATE and by arbiter's own call."""

    machines: int
    group: Group = MANY

    @property
    def title(self) -> str:
        return f"{self.machines:,} in one statement"

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        machines = max(10, int(self.machines * plan.scale))
        samples = Samples(self.title, "us", (UNGUARDED, AGAIN, "arbiter", CALL))
        samples.facts["machines"] = machines
        with ExitStack() as stack:
            conns = {
                variant: stack.enter_context(
                    connect(stack.enter_context(_machines(stage, variant, machines)))
                )
                for variant in (UNGUARDED, AGAIN, "arbiter")
            }
            conns[CALL] = conns["arbiter"]
            row = conns[UNGUARDED].execute(SQL["ids"], {"users": 2 * machines}).fetchone()
            assert row is not None
            for number in range(plan.rounds + 1):
                for variant, conn in conns.items():
                    # Each turn finds the room that the dead rows of the one before have left.
                    conn.execute(SQL["vacuum"])
                    statement = SQL["call_many" if variant == CALL else "update_many"]
                    with cpu_time(conn) as cost:
                        conn.execute(statement, {"ids": row[0]})
                    if number > 0:
                        samples.rounds[variant].append(cost.spent / machines)
                on_round()
        return samples


# pgbench -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """The transaction that clients of pgbench repeat."""

    statements: tuple[bytes, ...]
    clients: int
    #: Sets :user.
    users: str
    #: Transactions a second, of all clients together; None: as many as possible.
    rate: int | None = None


def start_pgbench(
    stage: Stage, conninfo: str, script: Script, seconds: int, stack: ExitStack
) -> subprocess.Popen[str]:
    """Start it; it ends by itself, and at the latest with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    file = folder / "script.sql"
    file.write_text("\n".join([script.users, *(s.decode() + ";" for s in script.statements)]))
    command = [
        *(str(stage.server.bindir / "pgbench"), "--no-vacuum", "--protocol=prepared"),
        *("-c", str(script.clients), "-j", str(min(2, script.clients)), "-T", str(seconds)),
        *(["--rate", str(script.rate)] if script.rate else []),
        *("-f", str(file), conninfo),
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PGOPTIONS": "-c synchronous_commit=off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.communicate()


def wait_for_pgbench(process: subprocess.Popen[str], seconds: int, what: str) -> dict[str, float]:
    """Its final report: transactions, a second and in all, and their latency in ms."""
    out, err = process.communicate(timeout=seconds + 60)
    found = {
        "tps": re.search(r"^tps = ([\d.]+)", out, re.MULTILINE),
        "transactions": re.search(r"actually processed: (\d+)", out),
        "latency_ms": re.search(r"^latency average = ([\d.]+)", out, re.MULTILINE),
    }
    if process.returncode != 0 or not all(found.values()):
        raise BenchError(f"pgbench, {what}: {err.strip()}")
    return {name: float(match[1]) for name, match in found.items() if match is not None}


# By many clients ---------------------------------------------------------------------------------

#: Machines have even numbers.
MACHINES = 1_000
BY_MACHINE = rf"\set user random(1, {MACHINES}) * 2"
BY_BROWSER = rf"\set user random(1, {MACHINES}) * 2 - 1"


@dataclass(frozen=True)
class Throughput:
    """One heartbeat a transaction, by so many clients at once."""

    clients: int
    group: Group = THROUGHPUT

    @property
    def title(self) -> str:
        return f"{self.clients} clients"

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        variants = (UNGUARDED, AGAIN, "arbiter")
        samples = Samples(self.title, "transactions/s", variants)
        script = Script((SQL["load_heartbeat"],), self.clients, BY_MACHINE)
        with ExitStack() as stack:
            places = {v: stack.enter_context(_machines(stage, v, MACHINES)) for v in variants}
            for number in range(plan.rounds + 1):
                for variant, conninfo in places.items():
                    with connect(conninfo) as conn:
                        conn.execute(SQL["vacuum"])
                    with ExitStack() as turn:
                        process = start_pgbench(stage, conninfo, script, plan.seconds, turn)
                        said = wait_for_pgbench(process, plan.seconds, f"{variant}, {self.title}")
                    if number > 0:
                        samples.rounds[variant].append(said["tps"])
                on_round()
        return samples


# A steady stream ---------------------------------------------------------------------------------

RATE = 1_000
WRITES_RATE = 50
STEADY_S = 600
#: Users whose machine starts while their browser's transaction is open, and statements for each.
PROBES, STATEMENTS = 20, 20
LOCK_TIMEOUT_MS = 50

HEARTBEATS = Script((SQL["load_heartbeat"],), 4, BY_MACHINE, RATE)
WRITERS = {
    "local": Script((STAGE_SQL["load_local"],), 2, BY_BROWSER, WRITES_RATE),
    "cloud": Script((STAGE_SQL["load_cloud"],), 2, BY_MACHINE, WRITES_RATE),
}


@dataclass
class _Waits:
    """How long statements took beside an open transaction, in ms."""

    latencies: list[float] = field(default_factory=list)
    failures: int = 0

    def time(self, conn: Conn, statement: bytes, values: dict[str, int]) -> None:
        begin = time.perf_counter()
        try:
            conn.execute(statement, values)
        except LockNotAvailable:
            self.failures += 1
        self.latencies.append((time.perf_counter() - begin) * 1_000)

    def facts(self) -> dict[str, float]:
        latencies = sorted(self.latencies)
        return {
            "statements": len(latencies),
            "lock timeouts": self.failures,
            "median ms": latencies[len(latencies) // 2],
            "max ms": latencies[-1],
        }


@dataclass(frozen=True)
class Steady:
    """1,000 heartbeats a second for ten minutes, with writers beside them."""

    title: str = "10 minutes, with 100 writes a second"
    group: Group = STEADY

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "%", (UNGUARDED, "arbiter"))
        seconds = max(5, round(STEADY_S * plan.scale))
        samples.facts["seconds"] = seconds
        # The variants take no turns: each run takes long, and leaves dead rows that are measured.
        for variant in samples.variants:
            with _machines(stage, variant, MACHINES) as conninfo:
                facts = _steady(stage, conninfo, seconds)
            machines = facts["tables"]["public.cloud_machines"]
            samples.rounds[variant].append(100 * machines["hot"] / machines["updates"])
            samples.facts[variant] = facts
            on_round()
        return samples


def _steady(stage: Stage, conninfo: str, seconds: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    first = 2 * MACHINES + 1
    with connect(conninfo) as conn, ExitStack() as stack:
        run_script(conn, SQL["probes"], first=first, last=first + PROBES - 1)
        facts["autovacuum"] = dict(conn.execute(SQL["autovacuum"]).fetchall())
        before = _tables(conn)
        streams = {
            name: start_pgbench(stage, conninfo, script, seconds, stack)
            for name, script in {"heartbeats": HEARTBEATS, **WRITERS}.items()
        }
        facts["waits"] = _wait_for_each_other(
            conninfo, range(first, first + PROBES), seconds / 2 / PROBES
        )
        for name, process in streams.items():
            facts[name] = wait_for_pgbench(process, seconds, name)
        # A backend reports its statistics a moment after its client has disconnected.
        deadline = time.monotonic() + 10
        updates = before["public.cloud_machines"]["updates"] + facts["heartbeats"]["transactions"]
        while (after := _tables(conn))["public.cloud_machines"]["updates"] < updates:
            if time.monotonic() > deadline:
                raise BenchError("the statistics lack heartbeats")
            Event().wait(0.1)
    facts["tables"] = {name: _change(before[name], after[name]) for name in after}
    return facts


def _tables(conn: Conn) -> dict[str, dict[str, Any]]:
    conn.execute("select pg_stat_clear_snapshot()")
    with conn.cursor(row_factory=dict_row) as cursor:
        return {row.pop("name"): row for row in cursor.execute(SQL["tables"]).fetchall()}


def _change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Counts of the run, sizes before and after it, and dead rows at its end."""
    change: dict[str, Any] = {
        name: after[name] - before[name] for name in ("updates", "hot", "autovacuums")
    }
    for name in ("table_bytes", "index_bytes"):
        change[name] = {"before": before[name], "after": after[name]}
    change["dead"] = after["dead"]
    change["dead share"] = after["dead"] / max(1, after["dead"] + after["live"])
    return change


def _wait_for_each_other(
    conninfo: str, users: range, pause_s: float
) -> dict[str, dict[str, float]]:
    """Heartbeats beside the browser's open write, and writes of the machine beside an open
    heartbeat; user by user, with a pause before each."""
    heartbeats, writes = _Waits(), _Waits()
    with connect(conninfo) as one, connect(conninfo) as other:
        for conn in (one, other):
            conn.execute(f"set lock_timeout = {LOCK_TIMEOUT_MS}".encode())
        for user in users:
            Event().wait(pause_s)
            with one.transaction():
                one.execute(STAGE_SQL["insert_local"], {"user": user, "bar": user})
                # The first one starts the drain, which cannot end during this transaction.
                heartbeats.time(other, SQL["start"], {"user": user})
                for _ in range(STATEMENTS - 1):
                    heartbeats.time(other, STAGE_SQL["heartbeat"], {"user": user})
            other.execute(STAGE_SQL["heartbeat"], {"user": user})
            with one.transaction():
                one.execute(STAGE_SQL["heartbeat"], {"user": user})
                for bar in range(STATEMENTS):
                    writes.time(other, STAGE_SQL["insert_cloud"], {"user": user, "bar": bar})
    return {"heartbeats": heartbeats.facts(), "cloud writes": writes.facts()}


COMPARISONS: dict[str, Comparison] = {
    "heartbeat1000": Many(1_000),
    "heartbeat100000": Many(100_000),
    "heartbeat8": Throughput(8),
    "heartbeats_steady": Steady(),
}
