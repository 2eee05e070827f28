"""Every pair of operations in every order of their steps, over two sessions, at all levels.

Nothing here is picked by hand. A case is generated from the product of

===========  =====================================================================================
pair         two of ``OPERATIONS``, which may be the same
situation    who holds the lease, whether it drains, and how the machine is (``SITUATIONS``)
levels       an isolation level for each session
ends         commit or rollback for each session
order        a merge of the two sequences of steps
===========  =====================================================================================

and the product is pruned only by the rules that the functions ``makes_sense``, ``applies``,
``look_matters`` and ``is_told_apart`` state. A takeover is a local write where the machine is
lapsed or long stopped; the end of a drain is a heartbeat or a write of the machine while it drains.

The steps of a session: ``look`` at the status, which fixes the snapshot (above read committed);
``act``; for writes ``again``, the same once more; ``end``; and for what makes a holder ``use``,
that holder's write in a transaction of its own. A step that is kept waiting stays pending: the
other session goes on, and the waiting session's next steps come after the answer.

``judge`` says what must hold in each case. The short id of a case replays it alone::

    python -m proof.interleavings --case 'local+heartbeat/cloud-lapsed/rr+rc/commit+commit/BABBAAA'
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations_with_replacement, pairwise, product
from pathlib import Path
from uuid import uuid4

import click
import psycopg
from conftest import ROLES, Database, Templates
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sessions import TIMEOUT_S, Result, Session, orders, watch_with

from arbiter_db.demo.embedded import EmbeddedServer

__all__ = [
    "PAIRS",
    "Arena",
    "Case",
    "Group",
    "Outcome",
    "Played",
    "groups",
    "judge",
    "parse",
    "replay",
    "run",
    "sample",
]

HERE = Path(__file__).parent
NAIVE_SQL = HERE.parent / "naive_locks.sql"

LEVELS = {"rc": "read committed", "rr": "repeatable read", "se": "serializable"}
EVERY_LEVEL = tuple(product(LEVELS, LEVELS))
ENDS = ("commit", "rollback")
SIDES = "AB"

#: So long that no machine lapses while a case runs; ageing goes back two hours.
PERIOD = "1 hour"
#: The shortest that the settings allow: how long two sessions may keep each other waiting.
DRAIN_TIMEOUT = "100 ms"

#: How long a statement runs before it is checked whether it waits for a lock.
QUICK_S = 0.004
#: How long a session that was kept waiting may take to notice that the other's transaction is over.
NOTICE_S = 0.02

#: One process drives it all; more sessions at once than this only wait for it.
WORKERS = 3

#: How many failures a report prints.
SHOWN = 10


# Operations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """What a session does in a transaction, by whom, and as which environment it writes.

    ``used_by`` is the environment that the operation makes the holder, or keeps: its write
    follows in a transaction of its own.
    """

    name: str
    actor: str
    writes: str = ""
    used_by: str = ""

    @property
    def is_ddl(self) -> bool:
        """Whether it changes the table instead of a user's lease."""
        return self.actor == "owner"

    def steps(self, level: str) -> tuple[str, ...]:
        """Its steps at an isolation level; at read committed a look would fix nothing."""
        return (
            *(() if level == "rc" else ("look",)),
            "act",
            *(("again",) if self.writes else ()),
            "end",
            *(("use",) if self.used_by else ()),
        )


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("local", "browser", writes="local"),
        Operation("cloud", "machine", writes="cloud"),
        Operation("activation", "machine", used_by="cloud"),
        Operation("heartbeat", "machine", used_by="cloud"),
        Operation("confirm", "browser", used_by="local"),
        Operation("delete", "machine"),
        Operation("protect", "owner"),
        Operation("unprotect", "owner"),
    )
}

Pair = tuple[Operation, Operation]
PAIRS: tuple[Pair, ...] = tuple(combinations_with_replacement(OPERATIONS.values(), 2))


@dataclass(frozen=True)
class Situation:
    """``holder`` of the lease, the environment it ``drains`` to, and how the machine is."""

    holder: str
    drain: str
    machine: str

    @property
    def name(self) -> str:
        """``local``, ``local-to-cloud`` or such, and the machine."""
        to = f"-to-{self.drain}" if self.drain != "none" else ""
        return f"{self.holder}{to}-{self.machine}"

    @property
    def has_machine(self) -> bool:
        """Whether the registry has the machine."""
        return self.machine not in ("absent", "deleted")


def makes_sense(situation: Situation) -> bool:
    """Whether a user with one machine can be there, and no other situation stands for it."""
    match situation.holder, situation.drain:
        case "none", "none":
            return situation.machine == "absent"  # a machine brings a lease
        case "local", "none":
            # A fresh one would have marked the drain; else the machine is not asked.
            return situation.machine in ("absent", "stopped")
        case ("local", "cloud") | ("cloud", "none"):
            return situation.machine != "absent"
        case "cloud", "local":
            return situation.machine == "stopped"  # what confirm_takeover leaves
    return False


SITUATIONS = {
    situation.name: situation
    for situation in (
        Situation(*parts)
        for parts in product(
            ("none", "local", "cloud"),
            ("none", "cloud", "local"),
            ("absent", "fresh", "lapsed", "stopped", "error", "deleted"),
        )
    )
    if makes_sense(situation)
}

#: One for each answer that a write can get: protection knows tables, not users.
DDL_SITUATIONS = ("local-stopped", "cloud-fresh", "cloud-lapsed", "cloud-error")
#: The situations for a rule that has no drain, no grace and no confirmation.
NAIVE_SITUATIONS = ("local-stopped", "cloud-fresh", "cloud-lapsed", "cloud-stopped")
NAIVE_OPERATIONS = ("local", "cloud", "activation", "heartbeat", "delete")


def applies(operation: Operation, other: Operation, situation: Situation) -> bool:
    """Whether an operation can do something there, rather than only read and be rejected."""
    if operation.is_ddl and situation.name not in DDL_SITUATIONS:
        return False
    if operation.is_ddl and other.is_ddl:
        return situation.name == DDL_SITUATIONS[0]
    match operation.name:
        case "cloud" | "heartbeat" | "delete":
            return situation.has_machine or other.name == "activation"
        case "confirm":
            return situation.machine == "error"
    return True


Step = tuple[str, str]


def look_matters(order: Sequence[Step]) -> bool:
    """Whether each look is where it makes a difference.

    A look sees what was committed, so it can be moved along the order, past everything but the
    other session's commit. Of those orders, the one is kept in which it comes last.
    """
    return all(
        verb != "look" or order[n + 1][0] == side or order[n + 1][1] in ("end", "use")
        for n, (side, verb) in enumerate(order)
    )


def is_serial(order: Sequence[Step]) -> bool:
    """Whether no transaction has a step inside another one."""
    transactions = [(side, verb == "use") for side, verb in order]
    changes = sum(a != b for a, b in pairwise(transactions))
    return changes + 1 == len(set(transactions))


@cache
def merges(first: tuple[str, ...], second: tuple[str, ...]) -> list[tuple[Step, ...]]:
    """The orders of two sequences of steps, serial ones first, without those that look in vain."""
    sequences = [tuple(f"A {verb}" for verb in first), tuple(f"B {verb}" for verb in second)]
    every = (tuple((text[0], text[2:]) for text in order) for order in orders(*sequences))
    return sorted(filter(look_matters, every), key=lambda order: not is_serial(order))


@dataclass(frozen=True)
class Group:
    """The cases that differ in nothing but the order of their steps."""

    pair: Pair
    situation: Situation
    levels: tuple[str, str]
    ends: tuple[str, str]

    @property
    def id(self) -> str:
        """What the ids of its cases begin with."""
        pair = "+".join(operation.name for operation in self.pair)
        return "/".join((pair, self.situation.name, "+".join(self.levels), "+".join(self.ends)))

    @property
    def is_symmetric(self) -> bool:
        """Whether both sessions do the same."""
        same_levels, same_ends = (a == b for a, b in (self.levels, self.ends))
        return self.pair[0] is self.pair[1] and same_levels and same_ends

    @cached_property
    def cases(self) -> list[Case]:
        """Its cases, the serial ones first."""
        steps = [o.steps(level) for o, level in zip(self.pair, self.levels, strict=True)]
        return [case for order in merges(*steps) if is_told_apart(case := Case(self, order))]


@dataclass(frozen=True)
class Case:
    """One order of the steps of a group; a step is a session and what it does."""

    group: Group
    order: tuple[Step, ...]

    @property
    def id(self) -> str:
        """Names the case; ``parse`` gives it back."""
        return f"{self.group.id}/{''.join(side for side, _ in self.order)}"

    @property
    def is_serial(self) -> bool:
        """Whether no transaction has a step inside another one."""
        return is_serial(self.order)


def is_told_apart(case: Case) -> bool:
    """Of two cases whose sessions have just changed places, the one where A begins is played."""
    return not case.group.is_symmetric or case.order[0][0] == "A"


def parse(case_id: str) -> Case:
    """The case of an id, also of one that the rules prune. Raises ValueError when there is none."""
    try:
        pair, situation, levels, ends, _ = case_id.split("/")
        first, second = (OPERATIONS[name] for name in pair.split("+"))
        first_level, second_level = levels.split("+")
        first_end, second_end = ends.split("+")
        group = Group(
            (first, second),
            SITUATIONS[situation],
            (first_level, second_level),
            (first_end, second_end),
        )
        (case,) = (case for case in group.cases if case.id == case_id)
    except (KeyError, ValueError):
        raise ValueError(f"no such case: {case_id}") from None
    return case


def _groups_of(pair: Pair, levels: Sequence[tuple[str, str]]) -> Iterator[Group]:
    first, second = pair
    for situation in SITUATIONS.values():
        if not (applies(first, second, situation) and applies(second, first, situation)):
            continue
        for pair_of_levels, ends in product(levels, product(ENDS, ENDS)):
            if ends == ("rollback", "rollback"):
                continue  # it commits nothing that the other session could have seen
            if first is second and (pair_of_levels, ends) > (pair_of_levels[::-1], ends[::-1]):
                continue  # the sessions have just changed places
            yield Group(pair, situation, pair_of_levels, ends)


def groups(seed: str, pairs: Iterable[Pair] = PAIRS, *, every_level: bool = False) -> list[Group]:
    """The groups of those pairs, in an order that the seed shuffles.

    All at read committed, at repeatable read and at one of each. Serializable locks as repeatable
    read does and only fails more: of its five pairs of levels one is drawn for each group of the
    others, or with ``every_level`` none is left out.
    """
    dice = random.Random(seed)
    with_serializable = [levels for levels in EVERY_LEVEL if "se" in levels]
    without = [levels for levels in EVERY_LEVEL if "se" not in levels]
    found = []
    for pair in pairs:
        found += list(_groups_of(pair, without))
        if every_level:
            found += list(_groups_of(pair, with_serializable))
            continue
        drawn = defaultdict(list)
        for group in _groups_of(pair, with_serializable):
            drawn[group.situation, group.ends].append(group)
        found += [dice.choice(choices) for choices in drawn.values()]
    dice.shuffle(found)
    return found


def for_rule(chosen: Iterable[Group], rule: str) -> list[Group]:
    """The groups that mean something to a naive rule; to arbiter all do."""
    return [
        group
        for group in chosen
        if rule == "arbiter"
        or (
            group.situation.name in NAIVE_SITUATIONS
            and all(operation.name in NAIVE_OPERATIONS for operation in group.pair)
        )
    ]


# Outcomes --------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The outcome of a step; ``sent`` and ``answered`` number all such events of a case.

    ``outcome``: ``ok``, ``none`` when no row was there, an SQLSTATE, or ``void`` for what comes
    after an error in the session.
    """

    side: str
    verb: str
    outcome: str
    sent: int
    answered: int
    waited: bool

    def __str__(self) -> str:
        waited = "waits, then " if self.waited else ""
        return f"{self.side} {self.verb}: {waited}{self.outcome}"


@dataclass
class Played:
    """A case as it was played; ``flaws`` are what did not hold in it."""

    case: Case
    answers: list[Answer]
    flaws: list[str] = field(default_factory=list)

    def of(self, side: str, *verbs: str) -> list[Answer]:
        """The answers of a session, in its order."""
        return [a for a in self.answers if a.side == side and a.verb in verbs]

    def transactions(self, side: str) -> list[list[Answer]]:
        """The answers of a session by transaction."""
        first, second = self.of(side, "look", "act", "again", "end"), self.of(side, "use")
        return [answers for answers in (first, second) if answers]

    def level(self, side: str) -> str:
        """The level of a session, in two letters."""
        return self.case.group.levels[SIDES.index(side)]

    def operation(self, side: str) -> Operation:
        """The operation of a session."""
        return self.case.group.pair[SIDES.index(side)]

    def wrote(self, side: str) -> str:
        """The environment that the writes of a session are of."""
        return self.operation(side).writes or self.operation(side).used_by

    def is_write(self, answer: Answer) -> bool:
        """Whether the step writes to the protected table for a user."""
        return answer.verb == "use" or bool(
            self.operation(answer.side).writes and answer.verb in ("act", "again")
        )

    def committed_writes(self, side: str) -> list[Span]:
        """When, at the least, each of its committed transactions was in the midst of writing."""
        spans = []
        for answers in self.transactions(side):
            writes = [a for a in answers if self.is_write(a) and a.outcome == "ok"]
            last = answers[-1]
            ends_well = last.outcome == "ok" and (
                last.verb == "use" or self.case.group.ends[SIDES.index(side)] == "commit"
            )
            if writes and ends_well:
                spans.append(Span(writes[0].answered, last.sent, len(writes)))
        return spans

    def meets(self, side: str, since: int, until: int) -> bool:
        """Whether a transaction of the other session was open at some time between."""
        return any(
            answers[0].sent < until and answers[-1].answered > since
            for answers in self.transactions(_other(side))
        )

    def __str__(self) -> str:
        """The id, the steps as they were answered, what did not hold."""
        steps = sorted(self.answers, key=lambda answer: answer.answered)
        return "\n".join(
            [self.case.id, *(f"    {step}" for step in steps), *(f"  ! {f}" for f in self.flaws)]
        )


@dataclass(frozen=True)
class Span:
    """From the answer to the first write until the commit was sent, with so many ``writes``."""

    since: int
    until: int
    writes: int


@dataclass
class Outcome:
    """What a run found. ``answers`` counts outcomes by operation and step."""

    seed: str
    cases: int = 0
    waits: int = 0
    seconds: float = 0.0
    failures: list[Played] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, played: Iterable[Played]) -> None:
        """Count the cases that were played."""
        for one in played:
            self.cases += 1
            if one.flaws:
                self.failures.append(one)
            for answer in one.answers:
                self.waits += answer.waited
                self.answers[one.operation(answer.side).name, answer.verb, answer.outcome] += 1

    @property
    def is_clean(self) -> bool:
        """Whether everything held."""
        return not self.failures and not self.findings


def _other(side: str) -> str:
    return SIDES[side == "A"]


# Judgement ------------------------------------------------------------------------------------


def judge(played: Played, serial: Sequence[Played]) -> list[str]:
    """What did not hold in a case, compared with the ``serial`` cases of its group.

    * Committed writes of both environments never overlap.
    * An answer is one that the step gets in some serial order, or one that ``is_documented`` allows
      for a step that meets a transaction of the other session.
    * While protection comes or goes, a write waits. Before that it gets the old answer, and after
      the commit of the change the new one.
    """
    return [*overlaps(played), *strangers(played, serial), *let_through(played)]


def overlaps(played: Played) -> Iterator[str]:
    """Committed writes of the two sessions, as two environments, each before the other's commit."""
    if played.wrote("A") == played.wrote("B") or any(o.is_ddl for o in played.case.group.pair):
        return
    for a, b in product(played.committed_writes("A"), played.committed_writes("B")):
        if a.since < b.until and b.since < a.until:
            yield f"writes of {played.wrote('A')} and {played.wrote('B')} overlap"


def strangers(played: Played, serial: Sequence[Played]) -> Iterator[str]:
    """Answers that neither a serial order nor being concurrent explains."""
    for side in SIDES:
        failed = False
        for answers in played.transactions(side):
            for answer in answers:
                outcome = answer.outcome
                known = failed if outcome == "void" else not failed
                if answer.verb in ("look", "end"):
                    known = known and outcome in ("ok", "void")
                elif outcome != "void":
                    known = outcome in _serial_outcomes(played, answer, serial)
                if not (known or is_documented(played, answer, answers[0].sent)):
                    yield f"{answer} is what no serial order gives"
                failed = failed or outcome not in ("ok", "none")


def is_documented(played: Played, answer: Answer, began: int) -> bool:
    """Whether an answer is one of those that only concurrency gives; ``began``: its transaction."""
    side = answer.side
    match answer.outcome:
        case "WX007":
            # A heartbeat does not wait and is never rejected.
            patient = played.is_write(answer) or played.operation(side).name == "confirm"
            return patient and played.meets(side, answer.sent, answer.answered)
        case "40001":
            return played.level(side) != "rc" and played.meets(side, began, answer.answered)
        case "WX004":
            # A heartbeat that meets a handover, or does not see it yet, leaves it: the machine gets
            # the lease with the next one.
            heartbeat = played.transactions(side)[0]
            return answer.verb == "use" and played.meets(
                side, heartbeat[0].sent, heartbeat[-1].answered
            )
    return False


def _serial_outcomes(played: Played, answer: Answer, serial: Sequence[Played]) -> set[str]:
    # A second write in a transaction may get any answer of the first: the lease may have changed.
    verbs = ("act", "again") if answer.verb == "again" else (answer.verb,)
    # Where both do the same, A alone is played first.
    sides = SIDES if played.case.group.is_symmetric else answer.side
    found = set()
    for other, side in product(serial, sides):
        here = other.of(side, answer.verb)[0]
        if _is_after_ddl(played, answer) in (None, _is_after_ddl(other, here)):
            found |= {a.outcome for a in other.of(side, *verbs)}
    return found


def _is_after_ddl(played: Played, answer: Answer) -> bool | None:
    """Whether a write came after the other session's change of protection; None: it is open."""
    other = _other(answer.side)
    if not played.operation(other).is_ddl or not played.is_write(answer):
        return None
    end = played.of(other, "end")[0]
    if answer.answered < end.sent:
        return False
    return True if answer.sent > end.answered else None


def let_through(played: Played) -> Iterator[str]:
    """Writes that were answered while the other session was changing the protection."""
    for side in SIDES:
        other = _other(side)
        if not played.operation(other).is_ddl:
            continue
        act, end = played.of(other, "act")[0], played.of(other, "end")[0]
        for answer in played.answers:
            if (
                answer.side == side
                and played.is_write(answer)
                and act.outcome == answer.outcome == "ok"
                and act.answered < answer.answered < end.sent
            ):
                yield f"{answer} passed while {played.operation(other).name} was in flight"


# Playing ----------------------------------------------------------------------------------------

_INSERT = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%(trader)s, gen_random_uuid()::text, '1m', 'buy', clock_timestamp(), {})
"""
WRITES = {
    "local": _INSERT.replace("{}", "'local', null"),
    "cloud": _INSERT.replace("{}", "'cloud', %(machine)s"),
}
PROVISION = """
insert into public.cloud_machines (id, user_id, status, last_health_check)
values (%(machine)s, %(user)s, 'running', clock_timestamp())
"""
ACTS = {
    **WRITES,
    "activation": """
        update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()
         where id = %(machine)s
    """,
    "heartbeat": """
        update public.cloud_machines set last_health_check = clock_timestamp()
         where id = %(machine)s
    """,
    "confirm": "select arbiter.confirm_takeover()",
    "delete": "delete from public.cloud_machines where id = %(machine)s",
    "protect": "select arbiter.protect('public.signals')",
    "unprotect": "select arbiter.unprotect('public.signals')",
}
LOOK = "select environment from arbiter.status(%(user)s)"
NAIVE_LOOK = "select naive.is_running(%(user)s)"
SIGN_IN = """
select set_config('request.jwt.claims', %s, false),
       set_config('default_transaction_isolation', %s, false)
"""
IS_BLOCKED = """
select wait_event_type = 'Lock' or wait_event = 'PgSleep'
  from pg_stat_get_activity(%s)
 where state = 'active'
"""
ROWS = """
select s.trader_id, count(*)
  from public.signals s
 where s.trader_id = any (%s)
 group by s.trader_id
"""
#: Whether the table is protected: its row, its triggers, the default of its evidence.
PROTECTION = """
select (select count(*) from arbiter.protections),
       (select count(*)
          from pg_trigger t
         where t.tgrelid = 'public.signals'::regclass
           and t.tgname in ('arbiter_guard_insert', 'arbiter_provenance')
           and t.tgenabled = 'A'),
       (select count(*)
          from pg_attribute a
         where a.attrelid = 'public.signals'::regclass
           and a.attname = 'arbiter_xid'
           and a.atthasdef)
"""
PROTECTED, UNPROTECTED = (1, 2, 1), (0, 0, 0)


@dataclass(frozen=True)
class Person:
    """A user with a trader and the id of a machine, all of one case."""

    user: str = field(default_factory=lambda: str(uuid4()))
    trader: str = field(default_factory=lambda: str(uuid4()))
    machine: str = field(default_factory=lambda: str(uuid4()))

    @property
    def params(self) -> dict[str, str]:
        """For statements."""
        return {"user": self.user, "trader": self.trader, "machine": self.machine}


class Player:
    """One of the two sessions while it plays its part of a case."""

    def __init__(self, arena: Arena, case: Case, side: str, person: Person) -> None:
        self.arena = arena
        self.side = side
        self.operation = case.group.pair[SIDES.index(side)]
        self.end = case.group.ends[SIDES.index(side)]
        self.has_machine = case.group.situation.has_machine
        self.person = person
        self.session = arena.session(side, self.operation.actor)
        self.todo: deque[str] = deque()
        self.answers: list[Answer] = []
        #: The statement that is pending.
        self.future: Future[Result] | None = None
        self._open = self._failed = False
        level = LEVELS[case.group.levels[SIDES.index(side)]]
        arena.sign_in(self.session, person if self.operation.actor == "browser" else None, level)

    def start(self) -> None:
        """Send the next step."""
        verb = self.todo.popleft()
        answer = Answer(self.side, verb, "void", self.arena.tick(), 0, False)
        self.answers.append(answer)
        if self._failed and not (verb == "end" and self._open):
            answer.answered = self.arena.tick()
            return
        if verb not in ("end", "use") and not self._open:
            # By itself it takes no snapshot and no lock, so it is no step.
            self.session.start("begin")
            self._open = True
        self.future = self.session.start(self._statement(verb), self.person.params)

    def _statement(self, verb: str) -> str:
        match verb:
            case "look":
                return self.arena.look
            case "end":
                return self.end
            case "use":
                return WRITES[self.operation.used_by]
        if self.operation.name == "activation" and not self.has_machine:
            return PROVISION
        return ACTS[self.operation.name]

    def poll(self, timeout: float) -> bool:
        """Whether there is an answer by then, which is noted."""
        if self.future is None:
            return True
        if not self.future.done():
            try:
                self.future.exception(timeout)
            except TimeoutError:
                return False
        answer, future, self.future = self.answers[-1], self.future, None
        answer.answered = self.arena.tick()
        error = future.exception()
        if error is not None and not isinstance(error, psycopg.Error):
            raise error
        if isinstance(error, psycopg.Error):
            answer.outcome = error.sqlstate or "lost"
            self._failed = True
        elif answer.verb != "end" or not self._failed:
            answer.outcome = "ok" if answer.verb == "end" or future.result().rowcount else "none"
        if answer.verb == "end":
            self._open = False
        return True

    def advance(self) -> bool:
        """Play on until nothing is left to do or the session is kept waiting; whether it moved."""
        moved = False
        while self.poll(0) and self.todo:
            moved = True
            self.start()
            if not self.poll(QUICK_S) and self.arena.is_kept_waiting(self):
                self.answers[-1].waited = True
                break
        return moved


class Arena:
    """A database in which cases are played, one after the other, each by a user of its own."""

    def __init__(self, db: Database, rule: str = "arbiter") -> None:
        self.db = db
        self.rule = rule
        self.owner = db.connect()
        self.look = LOOK
        if rule != "arbiter":
            self.look = NAIVE_LOOK
            self.owner.execute(NAIVE_SQL.read_text(encoding="utf-8"))
            self.owner.execute("select naive.use(%s)", (rule,))
        else:
            self.owner.execute(
                """
                update arbiter.settings
                   set heartbeat_timeout = %(p)s, stop_grace = %(p)s, error_takeover_delay = %(p)s,
                       drain_timeout = %(d)s
                """,
                {"p": PERIOD, "d": DRAIN_TIMEOUT},
            )
        self.owner.execute((HERE / "interleavings.sql").read_text(encoding="utf-8"))
        self._watcher = db.connect("postgres")
        self._sessions: dict[tuple[str, str], Session] = {}
        self._signed_in: dict[Session, tuple[str, str]] = {}
        self._ticks = 0
        self.cases: dict[str, Case] = {}

    def session(self, side: str, actor: str) -> Session:
        """The session of that side and actor."""
        if (side, actor) not in self._sessions:
            role = {"browser": "authenticated", "machine": "service_role"}.get(actor)
            name = f"{side} {actor}"
            self._sessions[side, actor] = self.db.session(role=role, name=name)
        return self._sessions[side, actor]

    def sign_in(self, session: Session, person: Person | None, level: str) -> None:
        """From now on the session is that person's, as the API says, and of that level."""
        claims = json.dumps({"sub": str(person.user)}) if person else ""
        if self._signed_in.get(session) != (claims, level):
            session.start(SIGN_IN, (claims, level))
            self._signed_in[session] = claims, level

    def tick(self) -> int:
        """The next number of an event."""
        self._ticks += 1
        return self._ticks

    def is_kept_waiting(self, player: Player) -> bool:
        """Wait until the session is kept waiting, or was answered after all."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            row = self._watcher.execute(IS_BLOCKED, (player.session.pid,)).fetchone()
            if row is not None and row[0]:
                return True
            if player.poll(0.001):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{player.session} neither ends nor waits")

    def play_group(self, cases: Sequence[Case]) -> list[Played]:
        """Play cases of one group, each with a new user; the serial ones must be among them."""
        people = [Person() for _ in cases]
        self.cases |= {person.user: case for person, case in zip(people, cases, strict=True)}
        ids = (
            [p.user for p in people],
            [p.trader for p in people],
            [p.machine for p in people],
        )
        situation = cases[0].group.situation
        staged = (situation.holder, situation.drain, situation.machine)
        self.owner.execute("call proof.stage(%s, %s, %s, %s, %s, %s)", (*ids, *staged))
        before = self._rows(people)
        played = [self._play(case, person) for case, person in zip(cases, people, strict=True)]
        serial = [one for one in played if one.case.is_serial]
        after = self._rows(people)
        for person, one in zip(people, played, strict=True):
            one.flaws += judge(one, serial)
            committed = sum(s.writes for side in SIDES for s in one.committed_writes(side))
            appeared = after[person.trader] - before[person.trader]
            if appeared != committed:
                one.flaws.append(f"{committed} writes were acknowledged, {appeared} rows are there")
        if self.rule == "arbiter":
            self._protect(True)
            self.owner.execute("call proof.settle(%s, %s, %s)", ids)
            told = self.owner.execute("delete from proof.flaws returning user_id, flaw").fetchall()
            by_user = dict(zip((p.user for p in people), played, strict=True))
            for user, flaw in told:
                by_user[user].flaws.append(flaw)
        return played

    def _rows(self, people: Sequence[Person]) -> Counter[str]:
        return Counter(dict(self.owner.execute(ROWS, ([p.trader for p in people],)).fetchall()))

    def _protection(self) -> tuple[int, int, int]:
        ((rows, triggers, defaults),) = self.owner.execute(PROTECTION).fetchall()
        return rows, triggers, defaults

    def _protect(self, wanted: bool) -> None:
        if self._protection() != (PROTECTED if wanted else UNPROTECTED):
            self.owner.execute(ACTS["protect" if wanted else "unprotect"])

    def _play(self, case: Case, person: Person) -> Played:
        touches_table = any(operation.is_ddl for operation in case.group.pair)
        if touches_table:
            self._protect(OPERATIONS["unprotect"] in case.group.pair)
        self._ticks = 0
        players = {side: Player(self, case, side, person) for side in SIDES}
        for side, verb in case.order:
            players[side].todo.append(verb)
            self._advance(players)
            if verb in ("end", "use"):
                players[_other(side)].poll(NOTICE_S)  # which may have been waiting for that
        while pending := self._advance(players):
            if not wait(pending, TIMEOUT_S, FIRST_COMPLETED).done:
                raise TimeoutError(f"{case.id}: both sessions wait")
        played = Played(case, [answer for p in players.values() for answer in p.answers])
        if touches_table and self._protection() not in (PROTECTED, UNPROTECTED):
            played.flaws.append("the table is protected by halves")
        return played

    def _advance(self, players: Mapping[str, Player]) -> list[Future[Result]]:
        """Let both play on as far as they can; return the steps that still wait."""
        while any(player.advance() for player in players.values()):
            pass  # a step of one may let the other go on
        return [player.future for player in players.values() if player.future is not None]

    def findings(self) -> list[str]:
        """After all cases: the audit's findings, and deadlocks. Ends all sessions."""
        found: list[str] = []
        if self.rule == "arbiter":
            rows = self.owner.execute(
                """
                select a.finding, a.reason, a.user_id, a.epoch, a.source
                  from arbiter.audit('public.signals') a
                 where a.finding <> 'not_provable'
                """
            ).fetchall()
            for finding, reason, user, epoch, source in rows:
                case = self.cases.get(user)
                found.append(
                    f"audit: {finding} {reason}, epoch {epoch}, {source or 'no row'}, "
                    f"of {case.id if case else user}"
                )
        for session in self._sessions.values():
            session.close()
        self.owner.close()
        if self.rule == "arbiter":
            found += self._deadlocks()
        return found

    def _deadlocks(self) -> list[str]:
        # A session reports its statistics when it ends.
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
        while self._watcher.execute(
            """
            select from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()
               and backend_type = 'client backend'
            """
        ).fetchall():
            if time.monotonic() > deadline:
                raise TimeoutError("sessions do not end")
            pause.wait(0.005)
        row = self._watcher.execute(
            "select deadlocks from pg_stat_database where datname = current_database()"
        ).fetchone()
        return [f"{row[0]} deadlocks"] if row is not None and row[0] else []


# Running ----------------------------------------------------------------------------------------


def sample(
    chosen: Sequence[Group], seed: str, limit: int | None, orders_each: int | None
) -> list[list[Case]]:
    """The cases to play, by group: the serial ones and up to ``orders_each`` others.

    Not more than ``limit`` cases in all, but one group at least.
    """
    dice = random.Random(seed)
    plan: list[list[Case]] = []
    left = limit
    for group in chosen:
        cases = group.cases
        if orders_each is not None:
            serial = [case for case in cases if case.is_serial]
            others = [case for case in cases if not case.is_serial]
            cases = serial + dice.sample(others, min(orders_each, len(others)))
        if left is not None and left < len(cases) and plan:
            break
        left = None if left is None else left - len(cases)
        plan.append(cases)
    return plan


def run(
    templates: Templates,
    seed: str,
    limit: int | None = None,
    *,
    orders_each: int | None = None,
    every_level: bool = False,
    rule: str = "arbiter",
    workers: int = WORKERS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Outcome:
    """Play all cases that ``groups`` and ``sample`` choose, under arbiter or a naive rule.

    Several databases are used at once, since a case spends much of its time waiting.
    """
    outcome = Outcome(seed)
    chosen = for_rule(groups(seed, every_level=every_level), rule)
    queue = deque(sample(chosen, seed, limit, orders_each))
    total = sum(len(cases) for cases in queue)
    began_at = time.monotonic()
    lock = threading.Lock()

    def work() -> None:
        with lock:
            db = stack.enter_context(
                templates.clone("installed" if rule == "arbiter" else "trading")
            )
        arena = Arena(db, rule)
        while True:
            with lock:
                if not queue:
                    break
                cases = queue.popleft()
            played = arena.play_group(cases)
            with lock:
                outcome.add(played)
                progress(outcome.cases, total)
        findings = arena.findings()
        with lock:
            outcome.findings += findings

    def work_or_stop() -> None:
        try:
            work()
        except BaseException:
            queue.clear()  # the others need not go on
            raise

    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work_or_stop) for _ in range(workers)]:
            done.result()
    outcome.seconds = time.monotonic() - began_at
    return outcome


def replay(templates: Templates, case: Case, rule: str = "arbiter") -> list[Played]:
    """Play one case, after the serial ones that it is compared with."""
    with templates.clone("installed" if rule == "arbiter" else "trading") as db:
        cases = [c for c in case.group.cases if c.is_serial and c != case]
        return Arena(db, rule).play_group([*cases, case])


# By hand ----------------------------------------------------------------------------------------


@click.command()
@click.option("--seed", default="1", show_default=True, help="Draws and shuffles.")
@click.option("--limit", type=click.IntRange(min=1), help="Not more cases than this.")
@click.option(
    "--orders",
    "orders_each",
    type=click.IntRange(min=0),
    help="Of each group, beside the serial ones.",
)
@click.option("--every-level", is_flag=True, help="Serializable with every other level, too.")
@click.option("--case", "case_id", help="Only this case, by its id.")
@click.option(
    "--against", "rule", default="arbiter", show_default=True, help="Or a rule of naive_locks.sql."
)
def main(
    seed: str,
    limit: int | None,
    orders_each: int | None,
    every_level: bool,
    case_id: str | None,
    rule: str,
) -> None:
    """Play all interleavings of two operations on a server of its own (PG names the version)."""
    console = Console()
    try:
        case = parse(case_id) if case_id else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(int(os.environ.get("PG") or "18")))
        watch_with(server.conninfo())
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        templates = Templates(server)
        stack.callback(templates.close)
        if case is not None:
            played = replay(templates, case, rule)
            for one in played:
                console.print(str(one), markup=False, highlight=False)
            sys.exit(any(one.flaws for one in played))
        console.print(f"seed {seed}, against {rule}", highlight=False)
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("")
            outcome = run(
                templates,
                seed,
                limit,
                orders_each=orders_each,
                every_level=every_level,
                rule=rule,
                progress=lambda done, of: bar.update(task, completed=done, total=of),
            )
        _report(console, outcome)
    sys.exit(not outcome.is_clean)


def _report(console: Console, outcome: Outcome) -> None:
    for one in outcome.failures[:SHOWN]:
        console.print(str(one), markup=False, highlight=False)
    for finding in outcome.findings[:SHOWN]:
        console.print(finding, markup=False, highlight=False)
    steps: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (name, verb, answer), number in sorted(outcome.answers.items()):
        steps[name, verb].append(f"{number} {answer}")
    table = Table("operation", "step", "answers")
    for (name, verb), answers in steps.items():
        table.add_row(name, verb, ", ".join(answers))
    console.print(table)
    console.print(
        f"seed {outcome.seed}: {outcome.cases} cases in {outcome.seconds:.0f} s, "
        f"{outcome.waits} steps waited, {len(outcome.failures)} cases failed, "
        f"{len(outcome.findings)} findings",
        highlight=False,
    )


if __name__ == "__main__":
    main()
