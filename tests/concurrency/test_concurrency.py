"""Two and more sessions that get in each other's way, step by step.

A scenario is a table: a line is one statement of one named session, followed by its outcome under
arbiter and under a naive rule (``naive_locks.sql``) that goes wrong in the very same steps.

===========  =================================================================================
outcome      meaning
===========  =================================================================================
``ok``       it succeeded without waiting
``waits``    it was seen waiting in pg_stat_activity; a line ``ends`` says how it ended
``void``     a commit that rolled back, because the transaction had failed
``WX007:x``  that SQLSTATE, and the detail names the session ``x`` as the one in the way
``a/b/c``    by the isolation level of the session: read committed, repeatable read, serializable
             (the last one counts for the levels that are left out)
``a,b``      either
``=``        in the naive column: the same as arbiter's
``.``        the line is not played in that world
===========  =================================================================================

The actors: ``tab`` and ``phone`` are browsers of the user ada, ``fly`` and ``fly2`` her machines,
``east`` and ``west`` backends that write for ada and bob, ``solo`` a program that writes as both.
``owner`` lets ada's machine lapse, or lengthens the drain timeout for all writes from then on.
After each scenario exclusion is proven twice: from what the sessions saw, and from the rows and
the handovers alone (``EVIDENCE``).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import story
from conftest import ROLES, Templates
from sessions import TIMEOUT_S, Result, Session, orders, wait_until_blocked

from arbiter_db.demo.embedded import EmbeddedServer

if TYPE_CHECKING:
    from conftest import Database

LEVELS = ("read committed", "repeatable read", "serializable")
ABOVE = LEVELS[1:]
NAIVE_SQL = (Path(__file__).parents[1] / "naive_locks.sql").read_text(encoding="utf-8")
AN_HOUR = timedelta(hours=1)

#: The drain_timeout of a scenario that sets no other one.
DRAIN_TIMEOUT = timedelta(seconds=4)

#: How long after drain_timeout a wait must have ended, on a busy machine.
SLACK = timedelta(seconds=2)

#: The epochs that a row may be of, by its transaction and the handovers alone, as in
#: sql/32_audit.sql: from the highest exact handover that the row comes after to the one before the
#: lowest that it comes before. Returns the rows whose writer held none of them.
EVIDENCE = """
with rows as (
  select s.id, t.user_id::text, s.source, s.machine_id::text, s.arbiter_xid as xid
    from public.signals s
    join public.traders t on t.id = s.trader_id
   where s.arbiter_xid is not null
), known as (
  select r.*,
         (select coalesce(max(h.epoch), 0)
            from arbiter.handovers h
           where h.user_id = r.user_id
             and (h.xid = r.xid
               or (h.exact and not pg_visible_in_snapshot(r.xid, h.snapshot)))) as first_epoch,
         (select coalesce(min(h.epoch) - 1, 9223372036854775807)
            from arbiter.handovers h
           where h.user_id = r.user_id
             and h.xid <> r.xid
             and pg_visible_in_snapshot(r.xid, h.snapshot)) as last_epoch
    from rows r
)
select k.* from known k
 where not exists (
   select from arbiter.handovers h
    where h.user_id = k.user_id
      and h.epoch between k.first_epoch and k.last_epoch
      and h.to_holder = k.source
      -- The machine of a cloud row is null once the machine was deleted.
      and (h.to_machine_id = k.machine_id or k.machine_id is null))
"""

#: Handovers that do not follow from the one before, and leases that are not the last handover.
HISTORY = """
select h.user_id, h.epoch, 'follows' as flaw
  from arbiter.handovers h
  left join arbiter.handovers b on b.user_id = h.user_id and b.epoch = h.epoch - 1
 where (h.from_holder, h.from_machine_id) is distinct from (b.to_holder, b.to_machine_id)
union all
select l.user_id, l.epoch, 'lease'
  from arbiter.leases l
 where not exists (
   select from arbiter.handovers h
    where h.user_id = l.user_id
      and h.epoch = l.epoch
      and h.to_holder = l.holder
      and h.to_machine_id is not distinct from l.machine_id
      and not exists (
        select from arbiter.handovers n where n.user_id = h.user_id and n.epoch > h.epoch))
"""

WRITE = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
select w.trader_id, %s, '1m', 'buy', timestamptz '2026-01-01', %s, %s
  from unnest(%s::uuid[]) with ordinality as w (trader_id, n)
 order by w.n
"""
HEARTBEAT = "update public.cloud_machines set last_health_check = clock_timestamp() where id = %s"
ACTIVATE = """
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()
 where id = %s
"""
PROVISION = """
insert into public.cloud_machines (user_id, id, machine_id, status, last_health_check)
values (%s, %s, gen_random_uuid()::text, 'running', clock_timestamp())
"""
#: For the owner, inside a transaction: makes the notes about a machine an hour older.
FORGET = """
update arbiter.machine_notes set left_running_at = left_running_at - interval '1 hour'
 where machine_id = %s
"""

_symbols = count(1)


# The stage ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Deed:
    """A write that the database admitted; ``committed_at`` stays None unless it was committed."""

    user: str
    source: str
    machine: str | None
    wrote_at: float
    committed_at: float | None = None

    @property
    def holder(self) -> tuple[str, str | None]:
        return self.source, self.machine


def overlaps(deeds: list[Deed]) -> list[tuple[Deed, Deed]]:
    """Pairs of committed writes of one user, by two holders, each made before the other's commit.

    A write counts from when it was known to be admitted to when its commit was sent, so that
    every pair found really overlapped.
    """
    done = [d for d in deeds if d.committed_at is not None]
    return [
        (a, b)
        for n, a in enumerate(done)
        for b in done[:n]
        if a.user == b.user
        and a.holder != b.holder
        and a.wrote_at <= (b.committed_at or 0)
        and b.wrote_at <= (a.committed_at or 0)
    ]


class Actor:
    """A named session that plays one line after the other."""

    def __init__(self, stage: Stage, name: str, session: Session) -> None:
        self.stage = stage
        self.name = name
        self.session = session
        self.error: psycopg.Error | None = None
        self.took = 0.0
        self._open: list[Deed] = []
        self._marks: dict[str, int] = {}
        self.in_transaction = False
        self._deeds: list[Deed] = []
        self._verb = ""
        self._started_at = self._sent_at = self._ended_at = 0.0

    @property
    def pending(self) -> bool:
        """Whether a statement was started whose outcome was not asked for."""
        return bool(self._verb)

    def start(self, verb: str, *args: str) -> None:
        """Start the statement that the verb means."""
        assert not self.pending, f"{self.name} still waits"
        sql, params = self._statement(verb, args)
        self._verb = verb
        self._started_at = time.monotonic()
        future = self.session.start(sql, params)
        future.add_done_callback(self._note_end)

    def outcome(self, timeout: float = TIMEOUT_S) -> str:
        """``ok``, ``void``, an SQLSTATE, or ``hangs`` when it has not ended by then."""
        last = self.session.last
        assert last is not None
        wait([last], timeout)
        if not last.done():
            return "hangs"
        verb, self._verb = self._verb, ""
        self.took = self._ended_at - self._started_at
        self.error = None
        try:
            result = last.result()
        except psycopg.Error as error:
            self.error = error
            self._deeds = []
            if error.sqlstate is None or self.session.conn.closed or not self.in_transaction:
                self.leave()
            if verb == "commit":
                self.leave()
            return error.sqlstate or "lost"
        return self._keep_books(verb, result)

    def play(self, verb: str, *args: str) -> str:
        """Run the statement to its end."""
        self.start(verb, *args)
        return self.outcome()

    def _note_end(self, _: object) -> None:
        self._ended_at = time.monotonic()

    def _statement(self, verb: str, args: tuple[str, ...]) -> tuple[str, list[Any] | None]:
        stage = self.stage
        me = stage.machine_of(self.name)
        match verb:
            case "write" | "trade":
                machine = me if self.name.startswith("fly") or verb == "trade" else None
                source = "cloud" if machine else "local"
                users = [stage.users[name] for name in args or ("ada",)]
                self._deeds = [Deed(u.id, source, machine, 0.0) for u in users]
                return WRITE, [f"S{next(_symbols)}", source, machine, [u.trader for u in users]]
            case "heartbeat":
                return HEARTBEAT, [me]
            case "activate":
                return ACTIVATE, [me]
            case "provision":
                return PROVISION, [stage.users["ada"].id, me]
            case "set":
                return "update public.cloud_machines set status = %s where id = %s", [args[0], me]
            case "forget":
                return FORGET, [me]
            case "confirm":
                return f"select {stage.schema}.confirm_takeover()", None
            case "look":
                return "select 1", None
            case "number":
                return "select pg_current_xact_id()", None
            case "savepoint":
                return "savepoint s", None
            case "release":
                return "release savepoint s", None
            case "undo":
                return "rollback to savepoint s", None
            case "begin" | "commit" | "rollback":
                if verb == "commit":
                    self._sent_at = time.monotonic()
                return verb, None
            case "prepare":
                return "prepare transaction 'x'", None
            case "commit_prepared":
                return "commit prepared 'x'", None
        raise ValueError(verb)

    def _keep_books(self, verb: str, result: Result) -> str:
        match verb:
            case "begin":
                self.in_transaction = True
            case "savepoint":
                self._marks["s"] = len(self._open)
            case "undo":
                del self._open[self._marks["s"] :]
            case "rollback":
                self.leave()
            case "prepare":
                # Neither committed nor gone; the log knows it as open until commit_prepared.
                self.stage.prepared = self._open
                self._open = []
                self.leave()
            case "commit_prepared":
                for deed in self.stage.prepared:
                    deed.committed_at = self._started_at
            case "commit":
                if result.status != "COMMIT":
                    self.leave()
                    return "void"
                for deed in self._open:
                    deed.committed_at = self._sent_at
                self.leave()
            case "write" | "trade":
                for deed in self._deeds:
                    deed.wrote_at = self._ended_at
                    if not self.in_transaction:
                        deed.committed_at = self._ended_at
                self.stage.deeds += self._deeds
                self._open += self._deeds
                self._deeds = []
        return "ok"

    def leave(self) -> None:
        """The transaction is over."""
        self._open = []
        self.in_transaction = False


class Stage:
    """Ada, bob and their sessions, in a database with arbiter or with a naive rule."""

    def __init__(
        self,
        db: Database,
        rule: str = "arbiter",
        level: str = "read committed",
        machine_level: str | None = None,
    ) -> None:
        self.db = db
        self.rule = rule
        self.schema = "arbiter" if rule == "arbiter" else "naive"
        self.level = level
        self.machine_level = machine_level or level
        self.owner = db.connect()
        self.users: dict[str, story.User] = {}
        self.machines: dict[str, str] = {}
        self.actors: dict[str, Actor] = {}
        self.deeds: list[Deed] = []
        self.prepared: list[Deed] = []
        self.drain_timeout = DRAIN_TIMEOUT
        if rule == "arbiter":
            # One machine per user is the app's rule, not arbiter's.
            self.owner.execute(
                "alter table public.cloud_machines drop constraint cloud_machines_user_id_key"
            )
            self.set(drain_timeout=DRAIN_TIMEOUT)
        else:
            self.owner.execute(NAIVE_SQL)
            self.owner.execute("select naive.use(%s)", (rule,))
        self.new_users()

    def new_users(self) -> None:
        """Two users without anything; ada sorts before bob."""
        pair = [story.add_user(self.owner) for _ in range(2)]
        self.users = dict(zip(("ada", "bob"), sorted(pair, key=lambda u: u.id), strict=True))
        self.machines = {name: str(uuid4()) for name in ("fly", "fly2", "flybob")}

    def set(self, **settings: Any) -> None:
        """Change arbiter's settings."""
        self.drain_timeout = settings.get("drain_timeout", self.drain_timeout)
        for name, value in settings.items():
            self.owner.execute(f"update arbiter.settings set {name} = %s", (value,))

    def machine_of(self, actor: str) -> str:
        """The machine that an actor speaks for; ada's first unless it has one of its own."""
        if actor.startswith("flybob"):
            return self.machines["flybob"]
        return self.machines.get(actor, self.machines["fly"])

    def given(self, state: str, user: str = "ada") -> None:
        """Bring a user without anything into a state."""
        if state == "nothing":
            return
        owner, who = self.owner, self.users[user]
        machine = self.machines["fly" if user == "ada" else "flybob"]
        owner.execute(
            "insert into public.cloud_machines (id, user_id, machine_id) values (%s, %s, %s)",
            (machine, who.id, str(machine)),
        )
        story.add_signal(owner, who.trader)
        if state == "local":
            return
        owner.execute(ACTIVATE, (machine,))
        story.beat(owner, machine)
        story.add_signal(owner, who.trader, "cloud", machine)
        match state:
            case "cloud":
                pass
            case "stale":
                story.age(owner, machine, heartbeat=AN_HOUR)
            case "stopped" | "error":
                story.set_status(owner, machine, state)
                if self.rule == "arbiter":
                    story.age(owner, machine, left_running=AN_HOUR)
                    if state == "error":
                        story.age(owner, machine, entered_error=AN_HOUR)
            case "deleted":
                owner.execute("delete from public.cloud_machines where id = %s", (machine,))
                if self.rule == "arbiter":
                    story.age(owner, machine, left_running=AN_HOUR)
            case _:
                raise ValueError(state)

    def add_machine(self, name: str) -> None:
        """One more machine of ada's, which does not run."""
        machine = self.machines[name]
        self.owner.execute(
            "insert into public.cloud_machines (id, user_id, machine_id) values (%s, %s, %s)",
            (machine, self.users["ada"].id, str(machine)),
        )

    def __getitem__(self, name: str) -> Actor:
        """The actor of that name, who enters when first asked for."""
        if name not in self.actors:
            if name.startswith(("tab", "phone")):
                session = self.db.session(
                    role="authenticated", name=name, claims={"sub": str(self.users["ada"].id)}
                )
            elif name == "solo":
                session = self.db.session(name=name)
            else:
                session = self.db.session(role="service_role", name=name)
            level = self.machine_level if name.startswith("fly") else self.level
            session.run("select set_config('default_transaction_isolation', %s, false)", (level,))
            self.actors[name] = Actor(self, name, session)
        return self.actors[name]

    def admin(self) -> psycopg.Connection[Any]:
        """A superuser's connection, which can see and end all sessions."""
        return self.db.connect("postgres")

    def kill(self, name: str) -> None:
        """End the backend of a session and wait until it is gone."""
        pid = self.actors[name].session.pid
        with self.admin() as conn:
            conn.execute("select pg_terminate_backend(%s, 10000)", (pid,))
        self.actors[name].leave()

    def lapse(self) -> None:
        """The heartbeat of ada's first machine was an hour ago."""
        story.age(self.owner, self.machines["fly"], heartbeat=AN_HOUR)

    def leave(self) -> None:
        """End all sessions."""
        for actor in self.actors.values():
            actor.session.close()

    def deadlocks(self) -> int:
        """Deadlocks of this database so far. Ends all sessions: they report when they leave."""
        self.leave()
        self.owner.close()
        pause = threading.Event()
        with self.admin() as conn:
            for _ in range(2000):
                others = story.value(
                    conn,
                    "select count(*) from pg_stat_activity"
                    " where datname = current_database() and pid <> pg_backend_pid()"
                    " and backend_type = 'client backend'",
                )
                if not others:
                    break
                pause.wait(0.005)
            found: int = story.value(
                conn, "select deadlocks from pg_stat_database where datname = current_database()"
            )
        return found

    def evidence(self) -> list[Any]:
        """The rows and the handovers that contradict exclusion."""
        return story.rows(self.owner, EVIDENCE) + story.rows(self.owner, HISTORY)

    def settle(self) -> None:
        """The end of a scenario under arbiter: exclusion held, and there was no deadlock."""
        for actor in self.actors.values():
            assert not actor.pending, f"{actor.name} still waits"
        self.leave()
        assert overlaps(self.deeds) == []
        assert self.evidence() == []
        committed = sum(d.committed_at is not None for d in self.deeds)
        rows = story.value(
            self.owner, "select count(*) from public.signals where symbol <> 'BTCUSDT'"
        )
        assert rows == committed, "the rows are not those of the acknowledged writes"
        assert self.deadlocks() == 0


# The scenarios -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Steps with their outcomes under arbiter and under the naive rule ``twin``.

    ``wrong`` says what the twin lets happen: ``overlap`` (both holders committed in overlap),
    ``twice`` (one epoch was handed over twice), ``deadlock``, or ``blocked`` and ``error``, which
    the naive column itself shows. ``levels`` are those of the browsers; ``twin_levels`` those at
    which the naive rule goes wrong, for browser and machine alike.
    """

    name: str
    steps: str
    twin: str
    wrong: str = "overlap"
    given: str = "local"
    bob: str = "nothing"
    fly2: bool = False
    drain_timeout: timedelta = DRAIN_TIMEOUT
    levels: tuple[str, ...] = LEVELS
    machine_levels: tuple[str, ...] = LEVELS
    twin_levels: tuple[str, ...] = LEVELS


SHORT = timedelta(milliseconds=300)

SCENARIOS = [
    Scenario(
        "a local write is open while the machine activates",
        """
        tab   begin     | ok    | =
        tab   write     | ok    | =
        fly   activate  | ok    | =
        fly   heartbeat | ok    | =
        phone write     | WX001 | =
        fly   begin     | ok    | =
        fly   write     | waits | ok
        phone write     | WX001 | =
        tab   commit    | ok    | =
        fly   ends      | ok    | .
        fly   commit    | ok    | =
        phone write     | WX001 | =
        fly   write     | ok    | =
        """,
        twin="exists",
    ),
    Scenario(
        "the same against a policy",
        """
        tab   begin     | ok    | =
        tab   write     | ok    | =
        fly   activate  | ok    | =
        phone write     | WX001 | 42501
        fly   write     | waits | ok
        tab   commit    | ok    | =
        fly   ends      | ok    | .
        """,
        twin="policy",
    ),
    Scenario(
        "the open local write wants to write once more",
        """
        tab   begin     | ok       | =
        tab   write     | ok       | =
        fly   activate  | ok       | =
        fly   begin     | ok       | =
        fly   write     | waits    | ok
        tab   write     | WX001/ok | =
        tab   commit    | void/ok  | =
        fly   ends      | ok       | .
        fly   commit    | ok       | =
        """,
        twin="exists",
        twin_levels=ABOVE,
    ),
    Scenario(
        "the open local write does not end",
        """
        tab   begin     | ok        | =
        tab   write     | ok        | =
        fly   activate  | ok        | =
        fly   write     | WX007:tab | ok
        fly   heartbeat | ok        | =
        tab   commit    | ok        | =
        fly   write     | ok        | =
        """,
        twin="exists",
        drain_timeout=SHORT,
    ),
    Scenario(
        "the open local write does not end and its backend is terminated",
        """
        tab   begin     | ok        | =
        tab   write     | ok        | =
        fly   activate  | ok        | waits
        fly   heartbeat | ok        | .
        fly   write     | WX007:tab | .
        phone write     | WX001     | ok
        tab   killed    | ok        | =
        fly   ends      | .         | ok
        fly   write     | ok        | =
        phone write     | WX001     | =
        """,
        twin="one_step",
        wrong="blocked",
        drain_timeout=SHORT,
    ),
    Scenario(
        "a local write comes while the activation is open",
        """
        fly   begin     | ok    | =
        fly   activate  | ok    | =
        tab   begin     | ok    | =
        tab   write     | ok    | =
        fly   commit    | ok    | =
        phone write     | WX001 | =
        fly   begin     | ok    | =
        fly   write     | waits | ok
        tab   commit    | ok    | =
        fly   ends      | ok    | .
        fly   commit    | ok    | =
        """,
        twin="exists",
    ),
    Scenario(
        "the activation is rolled back",
        """
        fly   begin     | ok    | =
        fly   activate  | ok    | =
        tab   write     | ok    | waits
        fly   rollback  | ok    | =
        tab   ends      | .     | ok
        tab   write     | ok    | =
        phone write     | ok    | =
        fly   write     | WX004 | =
        """,
        twin="one_step",
        wrong="blocked",
    ),
    Scenario(
        "two first writers",
        """
        tab   begin     | ok       | =
        tab   write     | ok       | =
        phone write     | waits    | =
        tab   commit    | ok       | =
        phone ends      | ok/40001 | 23505,40001
        phone write     | ok       | =
        """,
        twin="plain",
        wrong="error",
        given="nothing",
    ),
    Scenario(
        "two first writers, the first rolls back",
        """
        tab   begin     | ok    | =
        tab   write     | ok    | =
        phone write     | waits | =
        fly   provision | ok    | waits
        tab   rollback  | ok    | =
        phone ends      | ok    | ok,23505,40001
        fly   ends      | .     | ok,23505,40001
        fly   heartbeat | ok    | .
        phone write     | WX001 | .
        """,
        twin="plain",
        wrong="error",
        given="nothing",
    ),
    Scenario(
        "the first writer does not end",
        """
        tab   begin     | ok        | =
        tab   write     | ok        | =
        phone write     | WX007:tab | waits
        fly   provision | ok        | .
        tab   killed    | ok        | =
        phone ends      | .         | ok
        fly   heartbeat | ok        | =
        phone write     | WX001     | ok
        """,
        twin="plain",
        wrong="blocked",
        given="nothing",
        drain_timeout=SHORT,
    ),
    Scenario(
        "a first writer, and the machine is inserted",
        """
        tab   begin     | ok       | =
        tab   write     | ok       | =
        fly   provision | ok       | =
        fly   write     | WX004    | ok
        tab   commit    | ok       | =
        fly   heartbeat | ok       | =
        phone write     | WX001    | =
        fly   write     | ok       | =
        """,
        twin="exists",
        given="nothing",
    ),
    Scenario(
        "the machine is inserted, and a first writer comes",
        """
        fly   begin     | ok          | =
        fly   provision | ok          | =
        tab   begin     | ok          | =
        tab   write     | waits       | ok
        fly   commit    | ok          | =
        tab   ends      | WX001/40001 | .
        fly   heartbeat | ok          | =
        fly   write     | ok          | =
        tab   commit    | void        | ok
        tab   write     | WX001       | =
        """,
        twin="exists",
        given="nothing",
    ),
    Scenario(
        "first leases in opposite order",
        """
        east  begin     | ok        | =
        east  write ada | ok        | =
        west  begin     | ok        | =
        west  write bob | ok        | =
        east  write bob | waits     | =
        owner lengthens | ok        | .
        west  write ada | waits     | =
        east  ends      | WX007     | 40P01,ok,23505
        east  rollback  | ok        | =
        west  ends      | ok,WX007  | 40P01,ok,23505
        west  rollback  | ok        | =
        """,
        twin="plain",
        wrong="deadlock",
        given="nothing",
        drain_timeout=timedelta(seconds=1.5),
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "the machine wakes up while a takeover is open",
        """
        tab   begin     | ok          | =
        tab   write     | ok          | =
        fly   heartbeat | ok          | =
        fly   begin     | ok          | =
        fly   write     | waits       | ok
        tab   commit    | ok/ok/ok,40001       | =
        fly   ends      | WX004/40001/40001,ok | .
        fly   commit    | void/void/void,ok    | ok
        fly   heartbeat | ok          | =
        phone write     | WX001       | =
        fly   write     | ok          | =
        """,
        twin="exists",
        given="stale",
    ),
    Scenario(
        "a takeover comes while the heartbeat is open",
        """
        fly   begin     | ok          | =
        fly   heartbeat | ok          | =
        tab   begin     | ok          | =
        tab   write     | ok          | =
        fly   commit    | ok          | =
        fly   begin     | ok          | =
        fly   write     | waits       | ok
        tab   commit    | ok          | =
        fly   ends      | WX004/40001 | .
        fly   commit    | void        | ok
        fly   heartbeat | ok          | =
        phone write     | WX001       | =
        fly   write     | ok          | =
        """,
        twin="exists",
        given="stale",
        levels=LEVELS[:1],
        twin_levels=LEVELS[:1],
    ),
    Scenario(
        "a takeover comes while the heartbeat is open, with a snapshot",
        """
        fly   begin     | ok    | =
        fly   heartbeat | ok    | =
        tab   begin     | ok    | =
        tab   write     | waits | ok
        fly   commit    | ok    | =
        tab   ends      | 40001 | .
        fly   begin     | ok    | =
        fly   write     | ok    | ok
        tab   commit    | void  | ok
        fly   commit    | ok    | =
        """,
        twin="exists",
        given="stale",
        levels=ABOVE,
        twin_levels=ABOVE,
    ),
    Scenario(
        "a takeover comes while the heartbeat is open, with a snapshot, and it is rolled back",
        """
        fly   begin     | ok    | =
        fly   heartbeat | ok    | =
        tab   begin     | ok    | =
        tab   write     | waits | ok
        fly   rollback  | ok    | =
        tab   ends      | ok    | .
        tab   commit    | ok    | =
        """,
        twin="exists",
        wrong="",
        given="stale",
        levels=ABOVE,
    ),
    Scenario(
        "a takeover whose snapshot is older than the heartbeat",
        """
        tab   begin     | ok          | =
        tab   look      | ok          | =
        fly   heartbeat | ok          | =
        fly   begin     | ok          | =
        fly   write     | ok          | =
        fly   commit    | ok          | =
        fly   begin     | ok          | =
        tab   write     | WX001/40001 | ok
        fly   write     | ok          | =
        tab   commit    | void        | ok
        fly   commit    | ok          | =
        """,
        twin="exists",
        given="stale",
        twin_levels=ABOVE,
    ),
    Scenario(
        "a takeover whose snapshot is older than the return of a deleted machine",
        """
        tab   begin     | ok                | =
        tab   look      | ok                | =
        fly   provision | ok                | =
        fly   write     | ok                | =
        tab   write     | WX001/40001,WX007 | ok
        fly   write     | ok                | =
        tab   commit    | void              | ok
        """,
        twin="exists",
        given="deleted",
        twin_levels=ABOVE,
        drain_timeout=SHORT,
    ),
    Scenario(
        "a machine's write whose snapshot is older than a takeover",
        """
        fly   begin     | ok          | =
        fly   look      | ok          | =
        owner lapses    | ok          | =
        tab   write     | ok          | =
        tab   begin     | ok          | =
        tab   write     | ok          | =
        fly   write     | WX004/40001 | ok
        tab   commit    | ok          | =
        fly   commit    | void        | ok
        """,
        twin="exists",
        given="cloud",
        twin_levels=ABOVE,
    ),
    Scenario(
        "a local write whose snapshot is older than the activation counts as in flight",
        """
        tab   begin     | ok    | =
        tab   look      | ok    | =
        fly   activate  | ok    | =
        tab   write     | ok    | =
        phone write     | WX001 | =
        fly   begin     | ok    | =
        fly   write     | waits | ok
        tab   commit    | ok    | =
        fly   ends      | ok    | .
        fly   commit    | ok    | =
        """,
        twin="exists",
        levels=ABOVE,
        twin_levels=ABOVE,
    ),
    Scenario(
        "a local write whose snapshot is older than a completed handover",
        """
        tab   begin     | ok          | =
        tab   look      | ok          | =
        fly   activate  | ok          | =
        fly   write     | ok          | =
        fly   begin     | ok          | =
        fly   write     | ok          | =
        tab   write     | WX001/40001 | ok
        fly   commit    | ok          | =
        tab   commit    | void        | ok
        """,
        twin="advisory",
        twin_levels=ABOVE,
    ),
    Scenario(
        "a local write whose snapshot is older than a handover that is open",
        """
        tab   begin     | ok                | =
        tab   look      | ok                | =
        fly   activate  | ok                | =
        fly   begin     | ok                | =
        fly   write     | ok                | =
        tab   write     | WX001/WX007,40001 | ok
        fly   commit    | ok                | =
        tab   commit    | void              | ok
        """,
        twin="advisory",
        twin_levels=ABOVE,
        drain_timeout=SHORT,
    ),
    Scenario(
        "two browsers take over",
        """
        tab   begin     | ok       | =
        tab   write     | ok       | =
        phone begin     | ok       | =
        phone write     | waits    | =
        tab   commit    | ok       | =
        phone ends      | ok/40001 | =
        phone commit    | ok/void  | =
        phone write     | ok       | =
        """,
        twin="plain",
        wrong="twice",
        given="stale",
        twin_levels=LEVELS[:1],
    ),
    Scenario(
        "a takeover does not end",
        """
        tab   begin     | ok        | =
        tab   write     | ok        | =
        phone write     | WX007:tab | waits
        fly   heartbeat | ok        | =
        fly   write     | WX007:tab | .
        tab   killed    | ok        | =
        phone ends      | .         | ok,40001
        fly   heartbeat | ok        | =
        fly   write     | ok        | =
        phone write     | WX001     | =
        """,
        twin="plain",
        wrong="blocked",
        given="stale",
        drain_timeout=SHORT,
    ),
    Scenario(
        "two machines activate",
        """
        fly   begin     | ok    | =
        fly   activate  | ok    | =
        fly2  activate  | ok    | =
        fly   commit    | ok    | =
        fly2  heartbeat | ok    | =
        fly   begin     | ok    | =
        fly   write     | ok    | =
        fly2  write     | WX004 | ok
        fly   commit    | ok    | =
        fly2  heartbeat | ok    | =
        fly2  write     | WX004 | ok
        tab   write     | WX001 | =
        """,
        twin="exists",
        fly2=True,
        machine_levels=LEVELS[:2],
    ),
    Scenario(
        # The server finds that one of them read what the other one changed.
        "two machines activate, serializable",
        """
        fly   begin     | ok    | =
        fly   activate  | ok    | =
        fly2  activate  | ok    | =
        fly   commit    | 40001 | ok
        fly2  heartbeat | ok    | =
        fly2  begin     | ok    | =
        fly2  write     | ok    | =
        fly   write     | WX004 | ok
        fly2  commit    | ok    | =
        tab   write     | WX001 | =
        """,
        twin="exists",
        fly2=True,
        machine_levels=LEVELS[2:],
    ),
    Scenario(
        "two machines activate, the first rolls back",
        """
        fly   begin     | ok    | =
        fly   activate  | ok    | =
        fly2  activate  | ok    | waits
        fly   rollback  | ok    | =
        fly2  ends      | .     | ok
        fly2  heartbeat | ok    | =
        fly2  write     | ok    | =
        tab   write     | WX001 | =
        """,
        twin="one_step",
        wrong="blocked",
        fly2=True,
    ),
    Scenario(
        "two devices confirm",
        """
        tab   begin     | ok          | =
        tab   confirm   | ok          | =
        phone confirm   | waits       | =
        tab   commit    | ok          | =
        phone ends      | 55000/40001 | ok
        phone write     | ok          | .
        """,
        twin="plain",
        wrong="twice",
        given="error",
        twin_levels=LEVELS[:1],
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "a confirmation does not end",
        """
        tab   begin     | ok        | =
        tab   confirm   | ok        | =
        phone confirm   | WX007:tab | waits
        phone write     | WX003     | .
        tab   killed    | ok        | =
        phone ends      | .         | ok
        phone confirm   | ok        | .
        phone write     | ok        | .
        """,
        twin="plain",
        wrong="blocked",
        given="error",
        drain_timeout=SHORT,
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "a confirmation comes while the recovery is open",
        """
        fly   begin     | ok          | =
        fly   activate  | ok          | =
        tab   confirm   | waits       | =
        fly   commit    | ok          | =
        tab   ends      | WX001/40001 | ok
        fly   begin     | ok          | =
        tab   begin     | ok          | =
        fly   write     | ok          | WX004
        tab   write     | WX001       | ok
        fly   commit    | ok          | void
        tab   commit    | void        | ok
        """,
        twin="exists",
        wrong="usurped",
        given="error",
        twin_levels=LEVELS[:1],
    ),
    Scenario(
        "a confirmation comes while a write of the machine is open",
        """
        fly   begin     | ok          | =
        fly   write     | ok          | .
        app   activate  | .           | ok
        fly   write     | .           | ok
        app   set error | .           | ok
        tab   confirm   | ok          | =
        phone begin     | ok          | =
        phone write     | waits       | ok
        fly   commit    | ok          | =
        phone ends      | ok          | .
        phone commit    | ok          | =
        fly   write     | WX004       | =
        """,
        twin="exists",
        given="error",
    ),
    Scenario(
        "the machine recovers before the confirmed takeover is complete",
        """
        fly   begin     | ok    | =
        fly   write     | ok    | .
        tab   confirm   | ok    | =
        app   activate  | ok    | =
        phone write     | WX001 | =
        fly   write     | ok    | =
        fly   commit    | ok    | =
        fly   write     | ok    | =
        """,
        twin="exists",
        wrong="",
        given="error",
        levels=LEVELS[:1],
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "a confirmation comes while a heartbeat is open",
        """
        fly   begin     | ok       | =
        fly   heartbeat | ok       | =
        tab   confirm   | waits    | =
        fly   commit    | ok       | =
        tab   ends      | ok/40001 | =
        """,
        twin="exists",
        wrong="",
        given="error",
    ),
    Scenario(
        # Both change the machine's row: the one statement of a browser that a machine can meet.
        "the machine recovers while a confirmation is open",
        """
        tab   begin     | ok       | =
        tab   confirm   | ok       | =
        fly   activate  | waits    | =
        tab   commit    | ok       | =
        fly   ends      | ok/40001 | =
        fly   activate  | ok       | =
        phone write     | WX001    | =
        fly   write     | ok       | =
        """,
        twin="exists",
        wrong="",
        given="error",
    ),
    Scenario(
        "users in opposite order, one statement each",
        """
        fly   begin         | ok    | =
        fly   write         | ok    | =
        owner lapses        | ok    | =
        east  begin         | ok    | =
        east  write ada bob | waits | =
        west  write bob ada | waits | =
        fly   commit        | ok    | =
        east  ends          | ok/ok,40001 | 40P01,40001,ok
        east  commit        | ok/ok,void  | void,ok
        west  ends          | ok/ok,40001 | 40P01,40001,ok
        """,
        twin="one_step",
        wrong="deadlock",
        given="cloud",
        bob="stale",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "users in opposite order, two statements each",
        """
        east  begin     | ok       | =
        east  write ada | ok       | =
        west  begin     | ok       | =
        west  write bob | ok       | =
        east  write bob | waits    | =
        west  write ada | waits    | =
        east  ends      | WX007:west | 40P01,40001,ok
        east  rollback  | ok       | =
        west  ends      | ok,WX007 | 40P01,40001,ok
        west  rollback  | ok       | =
        """,
        twin="one_step",
        wrong="deadlock",
        given="stale",
        bob="stale",
        drain_timeout=timedelta(seconds=1.5),
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "a local write in a savepoint that is rolled back",
        """
        tab   begin     | ok    | =
        tab   savepoint | ok    | =
        tab   write     | ok    | =
        tab   undo      | ok    | =
        fly   activate  | ok    | waits
        fly   write     | ok    | .
        tab   commit    | ok    | =
        tab   killed    | ok    | =
        fly   ends      | .     | ok
        """,
        twin="session",
        wrong="blocked",
    ),
    Scenario(
        "a local write in a savepoint that is released",
        """
        tab   begin     | ok        | =
        tab   savepoint | ok        | =
        tab   write     | ok        | =
        tab   release   | ok        | =
        fly   activate  | ok        | =
        fly   write     | WX007     | ok
        fly   heartbeat | ok        | =
        tab   commit    | ok        | =
        fly   write     | ok        | =
        """,
        twin="exists",
        drain_timeout=SHORT,
    ),
    Scenario(
        "a local write in a savepoint that is still open",
        """
        tab   begin     | ok        | =
        tab   savepoint | ok        | =
        tab   write     | ok        | =
        fly   activate  | ok        | =
        fly   write     | WX007:tab | ok
        tab   undo      | ok        | =
        fly   write     | ok        | =
        tab   commit    | ok        | =
        """,
        twin="session",
        wrong="blocked",
        drain_timeout=SHORT,
        twin_levels=(),
    ),
    Scenario(
        "one transaction writes local, then as cloud",
        """
        solo  begin     | ok    | =
        solo  write     | ok    | =
        solo  activate  | ok    | =
        solo  trade     | WX007 | ok
        solo  commit    | void  | ok
        """,
        twin="exists",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "one transaction writes local in a released savepoint, then as cloud",
        """
        solo  begin     | ok    | =
        solo  savepoint | ok    | =
        solo  write     | ok    | =
        solo  release   | ok    | =
        solo  activate  | ok    | =
        solo  trade     | WX007 | ok
        solo  commit    | void  | ok
        """,
        twin="exists",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        # The transaction that marks the drain does not end it, even if it need not wait.
        "one transaction takes its local write back, then writes as cloud",
        """
        solo  begin     | ok    | =
        solo  savepoint | ok    | =
        solo  write     | ok    | =
        solo  undo      | ok    | =
        solo  activate  | ok    | =
        solo  trade     | WX007:solo | ok
        solo  commit    | void | ok
        tab   write     | ok | WX001
        tab   begin     | ok | .
        tab   savepoint | ok | .
        tab   write     | ok | .
        tab   undo      | ok | .
        app   activate  | ok | .
        fly   write     | ok | .
        """,
        twin="exists",
        wrong="",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "one transaction brings the user's first machine and writes as cloud",
        """
        solo  begin     | ok    | =
        solo  provision | ok    | =
        solo  trade     | WX007:solo | ok
        solo  commit    | void | ok
        solo  provision | ok | .
        solo  trade     | ok | .
        tab   write     | WX001 | =
        """,
        twin="exists",
        wrong="",
        given="nothing",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "one transaction writes as cloud, then local",
        """
        solo  begin       | ok    | =
        solo  trade       | ok    | =
        solo  set stopped | ok    | =
        solo  forget      | ok    | .
        solo  write       | WX007 | ok
        solo  commit      | void  | ok
        """,
        twin="exists",
        given="cloud",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "one transaction takes over and writes as cloud again",
        """
        solo  begin     | ok    | =
        solo  write     | ok    | =
        solo  heartbeat | ok    | =
        solo  trade     | WX007 | ok
        solo  commit    | void  | ok
        """,
        twin="exists",
        given="stale",
        machine_levels=LEVELS[:1],
    ),
    Scenario(
        "a machine takes over from a machine that lapsed",
        """
        fly   begin     | ok    | =
        fly   write     | ok    | =
        owner lapses    | ok    | =
        fly2  activate  | ok    | =
        fly2  write     | waits | ok
        phone write     | WX001 | =
        fly   commit    | ok    | =
        fly2  ends      | ok    | .
        fly   heartbeat | ok    | =
        fly   write     | WX004 | ok
        fly2  write     | ok    | =
        """,
        twin="exists",
        given="cloud",
        fly2=True,
    ),
    Scenario(
        "the machine lapses before it has written",
        """
        tab   begin     | ok    | =
        tab   write     | ok    | =
        fly   activate  | ok    | waits
        owner lapses    | ok    | .
        phone write     | waits | .
        tab   commit    | ok    | =
        phone ends      | ok    | .
        fly   ends      | .     | ok
        fly   heartbeat | ok    | =
        phone write     | WX001 | =
        fly   write     | ok    | =
        """,
        twin="one_step",
        wrong="blocked",
    ),
    Scenario(
        "activation and first write are one open transaction",
        """
        fly   begin     | ok        | =
        fly   activate  | ok        | =
        fly   write     | WX007:fly | ok
        tab   write     | ok        | waits
        fly   rollback  | ok        | =
        tab   ends      | .         | ok
        tab   write     | ok        | =
        """,
        twin="one_step",
        wrong="blocked",
        drain_timeout=SHORT,
    ),
    Scenario(
        # This one tests the evidence: the transactions' numbers are in another order than the
        # writes.
        "transactions that were numbered long before they write",
        """
        tab   begin     | ok | =
        tab   number    | ok | =
        fly   begin     | ok | =
        fly   number    | ok | =
        phone write     | ok | =
        app   activate  | ok | =
        fly   write     | ok | =
        fly   commit    | ok | =
        fly   write     | ok | =
        owner lapses    | ok | =
        phone write     | ok | =
        tab   write     | ok | =
        tab   commit    | ok | =
        """,
        twin="exists",
        wrong="",
        levels=LEVELS[:1],
        machine_levels=LEVELS[:1],
    ),
]


@dataclass(frozen=True)
class Line:
    """One line of a scenario for one world."""

    actor: str
    verb: str
    args: tuple[str, ...]
    expected: str


def lines(scenario: Scenario, world: str) -> Iterator[Line]:
    """The lines that are played in the world ``arbiter`` or ``naive``."""
    for text in scenario.steps.strip().splitlines():
        step, arbiter, naive = (cell.strip() for cell in text.split("|"))
        actor, verb, *args = step.split()
        expected = arbiter if world == "arbiter" or naive == "=" else naive
        if expected != ".":
            yield Line(actor, verb, tuple(args), expected)


def play(stage: Stage, script: Iterator[Line]) -> list[str]:
    """Play the lines, and fail at the first one whose outcome is another than the expected."""
    seen: list[str] = []
    outcomes: list[str] = []
    for line in script:
        by_level = line.expected.split("/")
        match line.verb:
            case "killed":
                stage.kill(line.actor)
                continue
            case "lapses":
                stage.lapse()
                continue
            case "lengthens":
                stage.set(drain_timeout=DRAIN_TIMEOUT)
                continue
        actor = stage[line.actor]
        level = stage.machine_level if line.actor.startswith("fly") else stage.level
        expected = by_level[min(LEVELS.index(level), len(by_level) - 1)]
        if line.verb != "ends":
            actor.start(line.verb, *line.args)
        found = _observe(stage, actor, expected)
        outcomes.append(found)
        seen.append(f"  {line.actor:5} {' '.join([line.verb, *line.args]):14} {found}")
        if not any(_matches(stage, actor, found, e) for e in expected.split(",")):
            transcript = "\n".join(seen)
            pytest.fail(f"expected {expected}: {actor.error}\n{transcript}", pytrace=False)
    return outcomes


def _observe(stage: Stage, actor: Actor, expected: str) -> str:
    if expected == "waits":
        try:
            wait_until_blocked(actor.session)
        except AssertionError:
            return actor.outcome()
        return "waits"
    limit = (stage.drain_timeout + SLACK).total_seconds()
    found = actor.outcome(limit)
    if found == "WX007":
        # It may have been started some lines ago, but never ends later than this.
        assert actor.took < limit
    return found


def _matches(stage: Stage, actor: Actor, found: str, expected: str) -> bool:
    code, _, blocker = expected.partition(":")
    if found != code:
        return False
    if stage.rule == "arbiter" and code.startswith("WX"):
        assert actor.error is not None
        detail = story.detail_of(actor.error)
        assert detail["user_id"] in {str(u.id) for u in stage.users.values()}
        if blocker:
            in_the_way = stage[blocker].session
            # One that has itself given up in that very moment is not in the way any more.
            gave_up = in_the_way.last and in_the_way.last.done() and in_the_way.last.exception()
            assert detail["blockers"] == [in_the_way.pid] or (gave_up and not detail["blockers"])
    return True


def cast(db: Database, scenario: Scenario, rule: str, level: str, machine_level: str) -> Stage:
    """The stage as it is before the first line."""
    stage = Stage(db, rule, level, machine_level)
    stage.given(scenario.given)
    stage.given(scenario.bob, "bob")
    stage.owner.execute("select pg_advisory_unlock_all()")  # what the rule `session` left behind
    if scenario.fly2:
        stage.add_machine("fly2")
    if rule == "arbiter":
        stage.set(drain_timeout=scenario.drain_timeout)
    return stage


def short(level: str) -> str:
    """A level in two letters, for test ids."""
    return "".join(word[0] for word in level.split()) if " " in level else level[:2]


#: The levels of browsers and of machines: the same, and a snapshot on one side only.
PAIRS = [
    *((level, level) for level in LEVELS),
    ("read committed", "repeatable read"),
    ("repeatable read", "read committed"),
]
WITH_ARBITER = [
    pytest.param(
        s,
        level,
        m,
        id=f"{s.name}-{short(level)}-{short(m)}",
        marks=() if level == m == LEVELS[0] else pytest.mark.slow,
    )
    for s in SCENARIOS
    for level, m in PAIRS
    if level in s.levels and m in s.machine_levels
]
NAIVELY = [
    pytest.param(s, level, id=f"{s.name}-{short(level)}")
    for s in SCENARIOS
    if s.wrong
    for level in s.twin_levels
]


@pytest.mark.parametrize(("scenario", "level", "machine_level"), WITH_ARBITER)
def test_exclusion_holds(db: Database, scenario: Scenario, level: str, machine_level: str) -> None:
    stage = cast(db, scenario, "arbiter", level, machine_level)
    play(stage, lines(scenario, "arbiter"))
    stage.settle()


@pytest.mark.naive
@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "level"), NAIVELY)
def test_the_naive_rule_goes_wrong(trading_db: Database, scenario: Scenario, level: str) -> None:
    stage = cast(trading_db, scenario, scenario.twin, level, level)
    outcomes = play(stage, lines(scenario, "naive"))
    expected = [(e.actor, e.verb, e.expected) for e in lines(scenario, "arbiter")]
    naive = [(e.actor, e.verb, e.expected) for e in lines(scenario, "naive")]
    match scenario.wrong:
        case "overlap":
            assert overlaps(stage.deeds)
        case "twice":
            twice = "select from naive.handovers group by user_id, epoch having count(*) > 1"
            assert story.rows(stage.owner, twice)
        case "usurped":
            # The machine had recovered, and the yes stopped it all the same.
            word = "select status from public.cloud_machines where id = %s"
            assert story.value(stage.owner, word, stage.machines["fly"]) == "stopped"
        case "error":
            assert {"23505", "40001"} & set(outcomes)
        case "deadlock":
            assert stage.deadlocks() == 1
    assert scenario.wrong == "twice" or naive != expected


# Every order -------------------------------------------------------------------------------------


def run_in_order(stage: Stage, order: list[str]) -> dict[str, list[str]]:
    """Play ``actor verb`` steps. The steps of a session that waits come later."""
    outcomes: dict[str, list[str]] = {}
    waiting: list[tuple[str, str]] = []

    def step(name: str, verb: str) -> None:
        actor = stage[name]
        actor.start(verb)
        assert actor.session.last is not None
        if not wait([actor.session.last], 0.02).done:
            try:
                wait_until_blocked(actor.session)
            except AssertionError:
                pass  # it ended
            else:
                outcomes.setdefault(name, []).append("waits")
                return
        outcomes.setdefault(name, []).append(actor.outcome())

    def catch_up(timeout: float) -> None:
        for item in list(waiting):
            name, verb = item
            actor = stage[name]
            if actor.pending:
                assert actor.session.last is not None
                if not wait([actor.session.last], timeout).done:
                    continue
                outcomes[name].append(actor.outcome())
            waiting.remove(item)
            step(name, verb)

    for text in order:
        name, verb = text.split()
        catch_up(0)
        if stage[name].pending:
            waiting.append((name, verb))
        else:
            step(name, verb)
    while waiting:
        left = len(waiting)
        catch_up(TIMEOUT_S)
        assert len(waiting) < left, f"no session moves: {waiting}"
    return outcomes


@dataclass(frozen=True)
class Race:
    """Steps to be played in every order; at ``look_at`` the browser's snapshot is one of them."""

    name: str
    given: str
    machine_verb: str
    look_at: str = ""


RACES = [
    Race("takeover against heartbeat", "stale", "heartbeat", look_at="repeatable read"),
    Race("local write against activation", "local", "activate"),
    Race("takeover against restart", "stopped", "activate"),
]


def _old_snapshot(order: list[str]) -> bool:
    """Whether something happens between the browser's look and its write that it does not see."""
    looked, wrote = order.index("east look"), order.index("east write")
    return any(not step.startswith("east") for step in order[looked:wrote])


def race(stage: Stage, given: str, verb: str, *, look: bool) -> int:
    """East writes local, the machine sends ``verb`` and writes; returns how many orders overlap."""
    wrong = 0
    east = ("east look",) * look + ("east write", "east commit")
    for order in orders(east, ("flybeat " + verb, "flybeat commit"), ("fly write", "fly commit")):
        if look and not _old_snapshot(order):
            continue
        stage.new_users()
        stage.given(given)
        stage.deeds.clear()
        for name in ("east", "flybeat", "fly"):
            assert stage[name].play("begin") == "ok"
        outcomes = run_in_order(stage, order)
        if overlaps(stage.deeds):
            wrong += 1
        if stage.rule != "arbiter":
            continue
        told = f"{order}: {outcomes}"
        assert overlaps(stage.deeds) == [], told
        # A heartbeat does not wait, and the next one gives the machine the lease back.
        assert "waits" not in outcomes["flybeat"], told
        assert stage["fly"].play(verb) == "ok", told
        assert stage["east"].play("write") == "WX001", told
        assert stage["fly"].play("write") == "ok", told
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("what", RACES, ids=lambda r: r.name)
def test_exclusion_holds_in_every_order(db: Database, what: Race, level: str) -> None:
    stage = Stage(db, level=level)
    race(stage, what.given, what.machine_verb, look=level == what.look_at)
    assert stage.evidence() == []
    assert stage.deadlocks() == 0


@pytest.mark.naive
@pytest.mark.slow
@pytest.mark.parametrize("what", RACES, ids=lambda r: r.name)
def test_the_naive_rule_goes_wrong_in_some_order(trading_db: Database, what: Race) -> None:
    stage = Stage(trading_db, "exists")
    assert race(stage, what.given, what.machine_verb, look=False) > 0


# A stream of writers -----------------------------------------------------------------------------

TABS = ("tab1", "tab2", "tab3")
ROUNDS_BEFORE, ROUNDS_AFTER = 8, 60
PACE_S = 0.025


@contextmanager
def stream(stage: Stage) -> Iterator[Callable[[int], None]]:
    """Three tabs write in transactions that overlap without a gap, each open for about 75 ms.

    Yields what plays some rounds; a round ends the oldest transaction while the other two are
    open, and begins the next.
    """
    pace = threading.Event()
    rounds = count()

    def play_rounds(number: int) -> None:
        for _ in range(number):
            tab = stage[TABS[next(rounds) % len(TABS)]]
            if tab.in_transaction:
                assert tab.play("commit") in ("ok", "void")
            assert tab.play("begin") == "ok"
            assert tab.play("write") in ("ok", "WX001")
            pace.wait(PACE_S)

    yield play_rounds
    for name in TABS:
        assert stage[name].play("commit") in ("ok", "void")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_stream_of_writers_does_not_hold_the_machine_up(db: Database, level: str) -> None:
    stage = Stage(db, level=level)
    stage.given("local")
    ada = stage.users["ada"]
    with stream(stage) as play_rounds:
        play_rounds(ROUNDS_BEFORE)
        assert stage["fly"].play("activate") == "ok"
        since = story.lease(stage.owner, ada).draining_since
        stage["fly"].start("write")
        play_rounds(ROUNDS_AFTER)
    assert stage["fly"].outcome() == "ok"
    longest = max(d.committed_at - d.wrote_at for d in stage.deeds if d.committed_at is not None)
    handover = story.handovers(stage.owner, ada)[-1]
    assert handover.to_holder == "cloud"
    assert (handover.handed_over_at - since).total_seconds() < longest + 1
    rejected = sum(d.source == "local" for d in stage.deeds)
    assert rejected < ROUNDS_BEFORE + ROUNDS_AFTER, "no write was rejected: that was no stream"
    stage.settle()


@pytest.mark.naive
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_stream_of_writers_starves_the_one_step_lock(trading_db: Database, level: str) -> None:
    stage = Stage(trading_db, "one_step", level)
    stage.given("local")
    with stream(stage) as play_rounds:
        play_rounds(ROUNDS_BEFORE)
        stage["fly"].start("activate")
        wait_until_blocked(stage["fly"].session)
        play_rounds(ROUNDS_AFTER)
        last = stage["fly"].session.last
        # It waits longer than the longest transaction plus a second, and no write was rejected.
        assert last is not None
        assert not last.done()
        assert len(stage.deeds) == ROUNDS_BEFORE + ROUNDS_AFTER
    assert stage["fly"].outcome() == "ok"


# Prepared transactions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preparing(server: EmbeddedServer) -> Iterator[Templates]:
    """Databases of a server that takes prepared transactions (by default none do)."""
    with ExitStack() as stack:
        other = stack.enter_context(
            EmbeddedServer(server.major, {"max_prepared_transactions": "5"})
        )
        with psycopg.connect(other.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        templates = Templates(other)
        stack.callback(templates.close)
        yield templates


PREPARED = Scenario(
    "a prepared local write counts as in flight",
    """
    tab   begin           | ok    | =
    tab   write           | ok    | =
    tab   prepare         | ok    | =
    fly   activate        | ok    | =
    phone write           | WX001 | =
    fly   write           | WX007 | ok
    fly   heartbeat       | ok    | =
    tab   commit_prepared | ok    | =
    fly   write           | ok    | =
    phone write           | WX001 | =
    """,
    twin="exists",
    drain_timeout=SHORT,
)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_prepared_write_counts_as_in_flight(preparing: Templates, level: str) -> None:
    with preparing.clone("installed") as db:
        stage = cast(db, PREPARED, "arbiter", level, level)
        play(stage, lines(PREPARED, "arbiter"))
        stage.settle()


def test_a_prepared_write_that_blocks_is_looked_for_where_it_is(preparing: Templates) -> None:
    """It belongs to no session, so there is no process id to name."""
    with preparing.clone("installed") as db:
        owner = db.connect()
        owner.execute("update arbiter.settings set drain_timeout = '100 milliseconds'")
        ada = story.add_user(owner)
        story.add_signal(owner, ada.trader)
        tab = db.connect(autocommit=False)
        story.add_signal(tab, ada.trader)
        tab.execute("prepare transaction 'x'")
        tab.close()
        machine = story.add_machine(owner, ada, "running")
        story.beat(owner, machine)
        error = story.rejection(story.add_signal, owner, ada.trader, "cloud", machine)
        assert error.sqlstate == "WX007"
        assert story.detail_of(error)["blockers"] == []
        assert error.diag.message_hint is not None
        assert "pg_prepared_xacts" in error.diag.message_hint
        owner.execute("rollback prepared 'x'")
        story.add_signal(owner, ada.trader, "cloud", machine)


@pytest.mark.naive
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_the_naive_rule_does_not_see_a_prepared_write(preparing: Templates, level: str) -> None:
    with preparing.clone("trading") as db:
        stage = cast(db, PREPARED, PREPARED.twin, level, level)
        play(stage, lines(PREPARED, "naive"))
        assert overlaps(stage.deeds)


# At random ---------------------------------------------------------------------------------------

CHAOS_S = 3.0
CHAOS_SETTINGS = {
    "heartbeat_interval": timedelta(milliseconds=100),
    "heartbeat_timeout": timedelta(milliseconds=200),
    "stop_grace": timedelta(milliseconds=100),
    "error_takeover_delay": timedelta(milliseconds=100),
    "drain_timeout": timedelta(milliseconds=200),
}
#: The outcomes that every actor may get at any time; 40001 is the server's own.
CHAOS_OUTCOMES = {"ok", "void", "WX001", "WX002", "WX003", "WX004", "WX007", "55000", "40001"}


def chaos(stage: Stage, seed: str) -> set[str]:
    """Random operations of browsers, machines and the app's backend for a while, at all levels."""
    end = time.monotonic() + CHAOS_S
    seen: set[str] = set()

    def act(actor: Actor, verb: str, *args: str) -> str:
        outcome = actor.play(verb, *args)
        seen.add(outcome)
        return outcome

    def writer(name: str, *users: str) -> None:
        actor, dice, pause = stage[name], random.Random(seed + name), threading.Event()
        while time.monotonic() < end:
            level = dice.choice(LEVELS)
            actor.session.run(
                "select set_config('default_transaction_isolation', %s, false)", (level,)
            )
            act(actor, "begin")
            if dice.random() < 0.3:
                act(actor, "look")
                pause.wait(dice.random() * 0.05)
            for _ in range(dice.choice((1, 1, 2))):
                if act(actor, "write", *dice.sample(users, len(users))) != "ok":
                    break
                pause.wait(dice.random() * 0.03)
            act(actor, dice.choice(("commit", "commit", "commit", "rollback")))
            if name.startswith("tab") and dice.random() < 0.2:
                act(actor, "confirm")

    def registry(name: str) -> None:
        actor, dice, pause = stage[name], random.Random(seed + name), threading.Event()
        while time.monotonic() < end:
            act(actor, "activate")
            for _ in range(dice.choice((2, 4))):
                pause.wait(0.04)
                act(actor, "heartbeat")
            match dice.choice(("lapse", "stopped", "error", "undone")):
                case "lapse":
                    pause.wait(0.35)
                case "stopped" | "error" as word:
                    act(actor, "set", word)
                    pause.wait(0.25)
                case "undone":
                    act(actor, "set", "stopped")
                    pause.wait(0.25)
                    act(actor, "begin")
                    act(actor, "activate")
                    pause.wait(0.03)
                    act(actor, "rollback")

    work: list[tuple[Any, ...]] = [
        (writer, "tab1", "ada"),
        (writer, "tab2", "ada"),
        (writer, "fly", "ada"),
        (writer, "flybob", "bob"),
        (writer, "east", "ada", "bob"),
        (writer, "west", "bob", "ada"),
        (registry, "app"),
        (registry, "flybob2"),
    ]
    for _, name, *_ in work:
        stage[name]  # enters
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(function, *args) for function, *args in work]:
            done.result()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["one", "two"])
def test_exclusion_holds_in_chaos(db: Database, seed: str) -> None:
    stage = Stage(db)
    stage.given("local")
    stage.given("local", "bob")
    stage.set(**CHAOS_SETTINGS)
    assert chaos(stage, seed) <= CHAOS_OUTCOMES
    for user in stage.users.values():
        epochs = story.handovers(stage.owner, user)
        assert len(epochs) > 3, [h.reason for h in epochs]
        assert {h.to_holder for h in epochs} == {"local", "cloud"}
    stage.settle()


@pytest.mark.naive
@pytest.mark.slow
def test_the_naive_rule_goes_wrong_in_chaos(trading_db: Database) -> None:
    stage = Stage(trading_db, "exists")
    stage.given("local")
    stage.given("local", "bob")
    chaos(stage, "one")
    assert overlaps(stage.deeds)


# First writes ------------------------------------------------------------------------------------

FIRST_WRITES = 300
WRITERS = 4


@pytest.mark.slow
def test_simultaneous_first_writes_do_not_fail_on_the_second_unique_index(db: Database) -> None:
    """About one in a hundred did: the insertion of the lease knew of the other index only."""
    owner = db.connect()
    users = [story.add_user(owner) for _ in range(FIRST_WRITES)]
    start = threading.Barrier(WRITERS)
    errors: list[psycopg.Error] = []

    def write(conn: psycopg.Connection[Any]) -> None:
        for user in users:
            start.wait(TIMEOUT_S)
            try:
                story.add_signal(conn, user.trader)
            except psycopg.Error as error:
                errors.append(error)

    writers = [threading.Thread(target=write, args=(db.connect(),)) for _ in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(10 * TIMEOUT_S)
    assert errors == []
    assert story.count_rows(owner, "public.signals") == FIRST_WRITES * WRITERS


# What the proofs above are worth -----------------------------------------------------------------


def test_the_evidence_finds_what_a_guard_let_in(db: Database) -> None:
    stage = Stage(db)
    stage.given("cloud")
    assert stage.evidence() == []
    ada, fly = stage.users["ada"], stage.machines["fly"]
    stage.owner.execute("alter table public.signals disable trigger user")
    intruder = story.add_signal(stage.owner, ada.trader)
    assert [row.id for row in stage.evidence()] == [intruder]
    # A handover that is made afterwards does not hide it.
    stage.lapse()
    stage.owner.execute("delete from public.signals where id = %s", (intruder,))
    stage.owner.execute("alter table public.signals enable always trigger arbiter_guard_insert")
    assert stage["tab"].play("write") == "ok"
    assert stage.evidence() == []
    stage.owner.execute("alter table public.signals disable trigger user")
    late = story.add_signal(stage.owner, ada.trader, "cloud", fly)
    assert [row.id for row in stage.evidence()] == [late]


def test_the_evidence_finds_a_gap_in_the_history(db: Database) -> None:
    stage = Stage(db)
    stage.given("stale")
    assert stage["tab"].play("write") == "ok"
    assert stage.evidence() == []
    stage.owner.execute("alter table arbiter.handovers disable trigger user")
    stage.owner.execute("delete from arbiter.handovers where epoch = 2")
    assert {row.flaw for row in story.rows(stage.owner, HISTORY)} == {"follows"}


def test_overlaps_are_found() -> None:
    user = str(uuid4())

    def deed(source: str, wrote: float, committed: float | None) -> Deed:
        return Deed(user, source, None, wrote, committed)

    assert overlaps([deed("local", 1, 3), deed("cloud", 2, 4)])
    assert overlaps([deed("local", 1, 4), deed("cloud", 2, 3)])
    assert overlaps([deed("local", 1, 4), deed("cloud", 2, 2)])
    for apart in pairwise([deed("local", 1, 2), deed("cloud", 3, 4), deed("local", 5, 6)]):
        assert not overlaps(list(apart))
    assert not overlaps([deed("local", 1, 3), deed("local", 2, 4)])
    assert not overlaps([deed("local", 1, 3), deed("cloud", 2, None)])
