"""How long a handover takes: from the machine's activation to the first rejected write of the
browser and to the first admitted write of the machine, idle and with the browser's transactions
always open."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from threading import Event

import psycopg
from psycopg.errors import QueryCanceled

from bench.samples import Comparison, Conn, Group, Plan, Samples
from bench.stage import SQL as STAGE_SQL
from bench.stage import Stage, load_sql
from bench.together import Together, connect, database, install, make_app, run_script

__all__ = ["COMPARISONS"]

SQL = load_sql("handover.sql")
NAIVE_SQL = Path(__file__).parent.parent / "naive_locks.sql"

GROUP = Group("A handover, step by step", ratios=False)

#: One update that waits for the writers, against a mark that does not.
ONE_STEP = "one_step"
VARIANTS = (ONE_STEP, "arbiter")

WRITERS = 8
#: How long a writer keeps its transaction open.
HOLD_S = 0.05
#: An activation, or a write after it, that takes longer is given up, and counts as this.
PATIENCE_S = 5.0
#: Handovers in a round, for each variant. One that is given up takes PATIENCE_S.
HANDOVERS = {0: 10, WRITERS: 3}

_bars = count(1)


# One handover ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Write:
    """A local write: when it was sent, and when it was rejected or its transaction had ended."""

    sent: float
    ended: float
    admitted: bool


@dataclass
class _Handover:
    """The instants of one handover, in seconds of one clock; infinite where it was given up."""

    sent: float = 0.0
    committed: float = float("inf")
    admitted: float = float("inf")
    writes: list[_Write] = field(default_factory=list)

    @property
    def gave_up(self) -> bool:
        return self.admitted == float("inf")

    @property
    def rejected(self) -> float:
        return min((w.ended for w in self.writes if not w.admitted), default=float("inf"))

    @property
    def late(self) -> int:
        """Local writes that were sent after the commit, and admitted."""
        return sum(w.admitted and w.sent > self.committed for w in self.writes)

    @property
    def open_until(self) -> float:
        """The end of the longest transaction that was open at the commit, or the commit."""
        ends = [w.ended for w in self.writes if w.admitted and w.sent < self.committed]
        return max([self.committed, *ends])


#: The steps by name: a title, and how long they took.
STEPS: dict[str, tuple[str, Callable[[_Handover], float]]] = {
    "heartbeat": ("heartbeat that activates, sent to commit", lambda h: h.committed - h.sent),
    "rejected": ("first rejected local write, from the commit", lambda h: h.rejected - h.committed),
    "admitted": (
        "first admitted machine write, from the commit",
        lambda h: h.admitted - h.committed,
    ),
    "whole": ("first admitted machine write, from the sending", lambda h: h.admitted - h.sent),
    "drain": (
        "the same, from the end of the longest open transaction",
        lambda h: h.admitted - h.open_until,
    ),
}


class _Clients:
    """The sessions of a machine and its user's browser tabs, on the database of one variant."""

    def __init__(self, conninfo: str, writers: int, stack: ExitStack) -> None:
        self.machine, self.probe, *self.tabs = (
            stack.enter_context(connect(conninfo)) for _ in range(2 + writers)
        )
        for conn in (self.machine, self.probe, *self.tabs):
            psycopg.ClientCursor(conn).execute(
                SQL["patience"], {"milliseconds": int(PATIENCE_S * 1000)}
            )
        self._pool = stack.enter_context(ThreadPoolExecutor(2 + writers))
        self._numbers = count(1)

    def fresh_users(self, number: int) -> list[int]:
        users = [next(self._numbers) for _ in range(number)]
        run_script(self.machine, SQL["fresh"], first=users[0], last=users[-1])
        return users

    def hand_over(self, user: int, wait_s: float) -> _Handover:
        """Let the tabs write, after a while activate the machine, until its first write."""
        found = _Handover()
        committed, over = Event(), Event()
        tabs = [
            self._pool.submit(self._write_on, tab, user, over, n * HOLD_S / len(self.tabs), HOLD_S)
            for n, tab in enumerate(self.tabs)
        ]
        probe = self._pool.submit(self._probe, user, committed, over)
        if tabs:
            over.wait(HOLD_S + wait_s)
        try:
            found.sent = time.perf_counter()
            self.machine.execute(SQL["activate"], {"user": user})
            found.committed = time.perf_counter()
            committed.set()
            while time.perf_counter() < found.committed + PATIENCE_S:
                if self._write(self.machine, user, "insert_cloud", over).admitted:
                    found.admitted = time.perf_counter()
                    break
        except QueryCanceled:
            pass
        over.set()
        committed.set()
        for client in (probe, *tabs):
            found.writes.extend(client.result())
        return found

    def _write_on(
        self, tab: Conn, user: int, over: Event, after_s: float = 0.0, hold_s: float = 0.0
    ) -> Iterable[_Write]:
        """One transaction after the other, until the first that is rejected."""
        over.wait(after_s)
        writes = []
        while not over.is_set():
            writes.append(self._write(tab, user, "insert_local", over, hold_s))
            if not writes[-1].admitted:
                break
        return writes

    def _probe(self, user: int, committed: Event, over: Event) -> Iterable[_Write]:
        """The very next writes after the commit."""
        committed.wait()
        return () if over.is_set() else self._write_on(self.probe, user, over)

    @staticmethod
    def _write(conn: Conn, user: int, statement: str, over: Event, hold_s: float = 0.0) -> _Write:
        turn = {"user": user, "bar": next(_bars)}
        sent = time.perf_counter()
        try:
            if not hold_s:
                conn.execute(STAGE_SQL[statement], turn)
                return _Write(sent, time.perf_counter(), admitted=True)
            with conn.transaction():
                try:
                    conn.execute(STAGE_SQL[statement], turn)
                finally:
                    answered = time.perf_counter()
                over.wait(hold_s - (answered - sent))
            return _Write(sent, time.perf_counter(), admitted=True)
        except psycopg.Error as error:
            if not (error.sqlstate or "").startswith("WX"):
                raise
            return _Write(sent, answered if hold_s else time.perf_counter(), admitted=False)


# Rounds ------------------------------------------------------------------------------------------


def _prepare(stage: Stage, variant: str, stack: ExitStack) -> str:
    """Make the database of a variant; returns how to reach it."""
    conninfo = stack.enter_context(database(stage, f"bench_handover_{variant}"))
    with connect(conninfo) as conn:
        make_app(conn)
        if variant == ONE_STEP:
            run_script(conn, NAIVE_SQL.read_bytes())
            run_script(conn, SQL["keys"])
            conn.execute("select naive.use('one_step')")
    if variant == "arbiter":
        install(conninfo)
    return conninfo


def _play(
    writers: int, stage: Stage, plan: Plan, on_round: Callable[[], None]
) -> dict[str, Samples]:
    titles = _titles(writers)
    samples = {name: Samples(title, "ms", VARIANTS) for name, title in titles.items()}
    every: dict[str, list[_Handover]] = {variant: [] for variant in VARIANTS}
    random = Random(writers)
    with ExitStack() as stack:
        clients = {v: _Clients(_prepare(stage, v, stack), writers, stack) for v in VARIANTS}
        for number in range(plan.rounds + 1):
            for variant in VARIANTS:
                users = clients[variant].fresh_users(HANDOVERS[writers])
                # Start each at a random point of the writers' transactions.
                waits = [random.uniform(0, HOLD_S) for _ in users]
                found = list(map(clients[variant].hand_over, users, waits))
                every[variant] += found
                if number > 0:
                    for step, (_, length) in STEPS.items():
                        if one := samples.get(_name(step, writers)):
                            seconds = statistics.median(_length(length, h) for h in found)
                            one.rounds[variant].append(seconds * 1000)
            on_round()
    counted = every["arbiter"][HANDOVERS[writers] :]  # without the round that warms up
    drains = [h.admitted - h.open_until for h in counted if not h.gave_up]
    facts = {
        "gave up": {
            variant: f"{sum(h.gave_up for h in found)} of {len(found)}"
            for variant, found in every.items()
        },
        "local writes admitted that were sent after the commit": {
            variant: sum(h.late for h in found) for variant, found in every.items()
        },
        "slowest end of arbiter's drain, ms": max(drains, default=PATIENCE_S) * 1000,
    }
    for one in samples.values():
        one.facts.update(facts)
    return samples


def _length(length: Callable[[_Handover], float], handover: _Handover) -> float:
    return PATIENCE_S if handover.gave_up else length(handover)


def _name(step: str, writers: int) -> str:
    return f"handover_{step}{writers or ''}"


def _titles(writers: int) -> dict[str, str]:
    load = f"{writers} overlapping writers" if writers else "idle"
    return {
        _name(step, writers): f"{title}, {load}"
        for step, (title, _) in STEPS.items()
        if writers or step != "drain"
    }


COMPARISONS: dict[str, Comparison] = {
    name: comparison
    for writers in HANDOVERS
    for name, comparison in Together(partial(_play, writers), GROUP, _titles(writers))
    .comparisons()
    .items()
}
