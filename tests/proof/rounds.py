"""Rounds of the workload: played by worker processes, broken into by faults, judged, summed up."""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from multiprocessing.sharedctypes import SynchronizedArray

from psycopg import sql

from arbiter_db.demo.embedded import EmbeddedServer
from proof import faults
from proof.checker import check, render
from proof.clients import Place
from proof.history import History
from proof.pgbouncer import PgBouncer
from proof.workload import Round, Rule, create_database, play

__all__ = ["ONLY_ARBITERS", "UNSAFE", "Goal", "Prover", "Tally", "play_and_check"]

#: The naive rules that break exclusion. one_step does not, but its sessions deadlock.
UNSAFE: tuple[Rule, ...] = ("client", "exists", "policy", "advisory")

WORKERS = 2
#: Users of a round: enough to keep two cores busy, few enough to meet often.
USERS = 12
ROUND_S = 25.0
OPPONENTS_ROUND_S = 8.0
#: A naive rule that was caught is not tried for longer than this.
OPPONENT_S = 20.0
LOOK_EVERY_S = 0.1
COUNT_EVERY_S = 2.0

#: Faults after which all clients have to connect again; the others come three times as often.
HEAVY = frozenset({"kill_backend", "immediate_stop", "kill_postmaster", "cut_bouncer"})

#: Faults whose own sessions write for users of the workload; and how often in a round at most.
STRANGERS = frozenset({"idle_in_transaction", "kill_client"})
STRANGERS_AT_MOST = 1000

#: The violations that audit() found; a row that is not_provable has no evidence.
AUDIT = """
select a.finding, a.reason, a.user_id, a.row_key, a.epoch
  from arbiter.audit('public.signals') a
 where a.finding <> 'not_provable'
"""
HANDOVERS = {
    "arbiter": "select count(*) from arbiter.handovers where epoch > 1",
    "naive": "select count(*) from naive.handovers where epoch > 1",
}

#: The naive rules have no decision tables, so most of their answers cannot be judged. No rule may
#: give the answers of NEVER_RIGHT, at any level. (From arbiter they are wrong answers.)
ONLY_ARBITERS = frozenset({"wrong answer"})
NEVER_RIGHT = {"40P01": "deadlock"}


@dataclass(slots=True)
class Tally:
    """The counts of one round or of many.

    ``writes`` are write statements, ``rows`` the rows that they tried to write, ``rejected`` the
    SQLSTATEs of those that were not admitted. ``late_heartbeats`` were kept waiting for longer than
    heartbeat_timeout. ``violations`` are counted by kind; ``first`` is one of them, rendered.
    Durations are in seconds.
    """

    writes: int = 0
    rows: int = 0
    admitted: int = 0
    transactions: int = 0
    committed: int = 0
    registry_writes: int = 0
    handovers: int = 0
    rounds: int = 0
    seconds: float = 0.0
    heartbeats: int = 0
    late_heartbeats: int = 0
    longest_heartbeat: float = 0.0
    longest_write: float = 0.0
    sharp: int = 0
    loose: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    via: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    how: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    first: str | None = None
    first_seed: str | None = None
    first_after: float | None = None

    def add(self, history: History) -> None:
        """Count what a history holds."""
        for transaction in history.transactions:
            self.transactions += 1
            self.committed += transaction.outcome == "committed"
            self.via[transaction.via] += len(transaction.writes)
            self.levels[transaction.level] += len(transaction.writes)
            for write in transaction.writes:
                self.writes += 1
                self.rows += write.rows
                self.how[write.how] += 1
                self.longest_write = max(self.longest_write, write.returned - write.invoked)
                if write.answer is None:
                    self.admitted += 1
                else:
                    self.rejected[write.answer] += 1
        for entry in history.registry:
            self.registry_writes += 1
            # One whose connection was lost has waited for a fault, not for a write.
            if entry.verb == "heartbeat" and entry.answer is None:
                waited = entry.returned - entry.invoked
                self.heartbeats += 1
                self.late_heartbeats += waited > history.settings.heartbeat_timeout
                self.longest_heartbeat = max(self.longest_heartbeat, waited)

    def merge(self, other: Tally) -> None:
        """Add another one."""
        for name in (figure.name for figure in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if name.startswith("first"):
                setattr(self, name, others if mine is None else mine)
            elif name.startswith("longest"):
                setattr(self, name, max(mine, others))
            else:
                setattr(self, name, mine + others)


def play_and_check(
    round_: Round,
    report: Callable[[int], None] = lambda writes: None,
    strangers: Callable[[], list[tuple[float, float]]] = list,
) -> Tally:
    """Play a round, and check what its clients saw.

    ``report`` is told now and then of the writes so far; ``strangers`` is asked afterwards when
    others have written meanwhile (see History).
    """
    history = play(round_, report)
    history.strangers = strangers()
    tally = Tally(rounds=1)
    tally.add(history)
    checked = check(history)
    tally.sharp, tally.loose = checked.sharp, checked.loose
    for violation in checked.violations:
        if round_.rule == "arbiter" or violation.kind not in ONLY_ARBITERS:
            tally.violations[violation.kind] += 1
            if tally.first is None:
                tally.first, tally.first_seed = render(violation), round_.seed
    if round_.rule != "arbiter":
        answers = [w.answer for t in history.transactions for w in t.writes]
        answers += [entry.answer for entry in history.registry]
        tally.violations.update(NEVER_RIGHT[a] for a in answers if a in NEVER_RIGHT)
    return tally


# The workers -------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("spawn")


class _Board:
    """What the processes tell each other during a round."""

    def __init__(self) -> None:
        #: Write statements so far, by each worker.
        self.writes: SynchronizedArray[int] = CONTEXT.Array("q", WORKERS)
        #: Begin and end of each time that a fault wrote for a user; 0 and 0 when there was none.
        self.strangers: SynchronizedArray[float] = CONTEXT.Array("d", 2 * STRANGERS_AT_MOST)

    def clear(self) -> None:
        """Begin a new round."""
        self.writes[:] = [0] * WORKERS
        self.strangers[:] = [0.0] * (2 * STRANGERS_AT_MOST)

    @contextmanager
    def stranger(self) -> Iterator[None]:
        """While that lasts, a fault may write for a user."""
        place = 2 * sum(begin > 0 for begin in self.strangers[::2])
        self.strangers[place : place + 2] = [time.monotonic(), math.inf]
        yield
        self.strangers[place + 1] = time.monotonic()

    def windows(self) -> list[tuple[float, float]]:
        """When a fault may have written for a user."""
        pairs = zip(self.strangers[::2], self.strangers[1::2], strict=True)
        return [(begin, end) for begin, end in pairs if begin > 0]


_board: _Board | None = None


def _share(board: _Board) -> None:
    global _board
    _board = board


def _work(round_: Round, worker: int) -> Tally:
    board = _board
    assert board is not None

    def report(writes: int) -> None:
        board.writes[worker] = writes

    return play_and_check(round_, report, board.windows)


@dataclass(frozen=True, slots=True)
class Goal:
    """Ends a run when all of these counts are reached; ``seconds`` ends it in any case."""

    writes: int
    handovers: int
    faults: int
    seconds: float


class Prover:
    """Plays rounds under one rule.

    Attributes: ``tally``, of the rounds that have ended; ``note``, the last fault.
    """

    def __init__(self, rule: Rule, seed: str, server: EmbeddedServer, bouncer: PgBouncer) -> None:
        self.rule: Rule = rule
        self.seed = seed
        self.server = server
        self.bouncer = bouncer
        self.tally = Tally()
        self.note = ""
        self._board = _Board()
        self._began = time.monotonic()
        self._rng = random.Random(f"{seed}/faults")
        self._names = sorted(faults.NAMES)
        self._weights = [1 if name in HEAVY else 3 for name in self._names]
        self._handovers = 0
        self._counted_at = 0.0

    def prove(self, seeds: Iterable[str], goal: Goal) -> None:
        """Play a round per seed until the goal is reached, or a rule was caught."""
        with ProcessPoolExecutor(
            WORKERS, CONTEXT, initializer=_share, initargs=(self._board,)
        ) as pool:
            for seed in seeds:
                if self._is_enough(goal):
                    return
                self._round(pool, seed, goal)

    def reaches(self, goal: Goal) -> bool:
        """Whether the counts of the goal are reached."""
        return (
            self.tally.writes >= goal.writes
            and self.tally.handovers >= goal.handovers
            and self.tally.faults.total() >= goal.faults
        )

    def _is_enough(self, goal: Goal) -> bool:
        if self.elapsed > goal.seconds - 1:
            return True
        caught = bool(self.tally.violations)
        if self.rule == "arbiter":
            return caught or self.reaches(goal)
        return caught and self.elapsed > OPPONENT_S

    @property
    def elapsed(self) -> float:
        """Seconds since the first round began."""
        return time.monotonic() - self._began

    @property
    def writes(self) -> int:
        """Write statements so far, with those of the round that is played."""
        return self.tally.writes + sum(self._board.writes[:])

    @property
    def handovers(self) -> int:
        """Handovers so far, with about those of the round that is played."""
        return self.tally.handovers + self._handovers

    def _round(self, pool: ProcessPoolExecutor, seed: str, goal: Goal) -> None:
        name = f"{self.rule}_{seed}"
        own = self.rule == "arbiter"
        ends = min(self.elapsed + (ROUND_S if own else OPPONENTS_ROUND_S), goal.seconds)
        create_database(self.server, name, self.rule)
        place = Place.of(self.server, self.bouncer, name)
        running = set()
        for worker in range(WORKERS):
            users = tuple(range(worker, USERS, WORKERS))
            round_ = Round(seed, self.rule, place, users, ends - self.elapsed)
            running.add(pool.submit(_work, round_, worker))
        target = faults.Target(self.server, name, self.bouncer)
        while not all(future.done() for future in running):
            # Faults are spread like the writes, between the first and the last one.
            due = goal.faults * self.writes / goal.writes
            playing = sum(self._board.writes[:]) > 0 and self.elapsed < ends
            if playing and self.tally.faults.total() < due:
                self._inject(target)
            self._count_handovers(name)
            wait(running, timeout=LOOK_EVERY_S)
        self._finish(name, seed, running)
        if self.tally.violations and self.tally.first_after is None:
            self.tally.first_after = self.elapsed

    def _inject(self, target: faults.Target) -> None:
        (name,) = self._rng.choices(self._names, self._weights)
        with self._board.stranger() if name in STRANGERS else nullcontext():
            self.note = faults.inject(name, target, self._rng)
        # A fault that found no victim does not count.
        if not self.note.startswith((f"{name}: no backend", f"{name}: not granted")):
            self.tally.faults[name] += 1

    def _count_handovers(self, name: str) -> None:
        if time.monotonic() - self._counted_at > COUNT_EVERY_S:
            self._counted_at = time.monotonic()
            self._handovers = self._ask_handovers(name)

    def _ask_handovers(self, name: str) -> int:
        query = HANDOVERS["arbiter" if self.rule == "arbiter" else "naive"]
        with faults.connect(self.server, name) as conn:
            row = conn.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    def _finish(self, name: str, seed: str, running: set[Future[Tally]]) -> None:
        for future in running:
            self.tally.merge(future.result())
        self.tally.rounds -= WORKERS - 1  # each worker has played a part of it
        self._board.clear()
        self._handovers = 0
        self.tally.handovers += self._ask_handovers(name)
        with faults.connect(self.server, name) as conn:
            if self.rule == "arbiter":
                conn.execute("set statement_timeout = 0")
                for finding, reason, *where in conn.execute(AUDIT).fetchall():
                    self.tally.violations[f"audit: {finding}"] += 1
                    if self.tally.first is None:
                        user, row, epoch = where
                        self.tally.first = f"audit: {reason}, user {user}, row {row}, epoch {epoch}"
                        self.tally.first_seed = seed
        with faults.connect(self.server) as conn:
            # PgBouncer keeps connections to it.
            conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
        self.tally.seconds = self.elapsed
