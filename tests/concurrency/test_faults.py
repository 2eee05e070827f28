"""Faults in the middle of transactions: every moment at which a transaction may be cut short, times
every way to cut it short.

A moment is a list of steps of two sessions, ``tab`` (the user's browser) and ``fly`` (her machine),
and the answers that each environment gets once the transaction of its victim has gone. A fault that
ends only the victim leaves the other session at work; one that ends the server ends both. After
each fault the same is checked:

- the lease, the history and the rows are as before, but for what was acknowledged since: an
  acknowledged write is there, all of its rows, and one that got no answer is there whole or not at
  all;
- the environment that must not write is rejected, and the other one writes;
- ``arbiter.audit`` proves every row of the database.

The server is the module's own: most of these faults end it.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
import story
from conftest import LOGIN, OWNER, ROLES, Database, Templates
from proof import faults
from proof.faults import ClientProcess
from proof.pgbouncer import PgBouncer
from psycopg import sql
from sessions import TIMEOUT_S, Session, wait_until_blocked, watch_with

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer, find_installation

pytestmark = pytest.mark.slow

MAJOR = int(os.environ.get("PG") or "18")
AN_HOUR = timedelta(hours=1)

#: Longer than anything here takes, so that a wait ends because of what is tested and not by itself.
DRAIN_TIMEOUT = timedelta(seconds=15)
#: Where a wait is to end by itself.
SHORT = timedelta(milliseconds=100)

#: Transactions can be prepared, and the database's clock be replaced.
OPTIONS = {"max_prepared_transactions": "10", "allow_system_table_mods": "on"}

#: Every write has as many rows: a half of one would show.
ROWS = 3
WRITE = sql.SQL("""
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
select {}, {}, '1m', 'buy', timestamptz '2026-01-01' + n * interval '1 minute', {}, {}
  from generate_series(1, {}) as n
""")
ACTIVATE = sql.SQL("""
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()
 where id = {}
""")

_tags = count(1)


@pytest.fixture(scope="module")
def own() -> Iterator[EmbeddedServer]:
    """A server to break."""
    with EmbeddedServer(MAJOR, OPTIONS) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        yield server


@pytest.fixture(scope="module")
def own_templates(own: EmbeddedServer) -> Iterator[Templates]:
    """The template databases on it."""
    with closing(Templates(own)) as templates:
        yield templates


@pytest.fixture(scope="module")
def arena(own_templates: Templates) -> Iterator[str]:
    """The database of all cases, each with a user of its own."""
    with own_templates.clone("installed") as database:
        with database.connect() as conn:
            _set(conn, heartbeat_timeout=timedelta(minutes=10), drain_timeout=DRAIN_TIMEOUT)
        database.close()
        yield database.name


@pytest.fixture(autouse=True)
def _watch(own: EmbeddedServer, server: EmbeddedServer) -> Iterator[None]:
    """``wait_until_blocked`` looks at the server of this module, for as long as it is its turn."""
    watch_with(own.conninfo())
    yield
    watch_with(server.conninfo())


def _set(conn: psycopg.Connection[Any], **settings: timedelta | bool) -> None:
    for name, setting in settings.items():
        conn.execute(
            sql.SQL("update arbiter.settings set {} = %s").format(sql.Identifier(name)), (setting,)
        )


# The stage ---------------------------------------------------------------------------------------


class Case:
    """One user with a trader and a machine, what was done in her name, and who was told so.

    ``victim`` is the actor whose transaction is cut short. With ``victim_is`` ``process`` its
    client is a process that can be killed, with ``pooled`` it comes through a pooler.
    ``restored`` is the case whose user this is, in a database restored from a dump.
    """

    def __init__(
        self,
        server: EmbeddedServer,
        dbname: str,
        victim: str = "",
        victim_is: str = "session",
        restored: Case | None = None,
    ) -> None:
        self.server = server
        self.db = Database(server, dbname)
        self.owner = self.db.connect()
        self.user: story.User = restored.user if restored else story.add_user(self.owner)
        self.machine: str = (
            restored.machine if restored else story.add_machine(self.owner, self.user)
        )
        self.bouncer: PgBouncer | None = None
        self.actors: dict[str, Session | ClientProcess] = {}
        self.victim_name = victim
        self.victim_is = victim_is
        #: The tags of writes whose client knows that they were committed.
        self.acknowledged: set[str] = set(restored.acknowledged) if restored else set()
        #: And of those whose client will never know it.
        self.in_doubt: set[str] = set()
        self.open: dict[str, list[str]] = {}
        self.waiting: dict[str, tuple[Future[Any], str]] = {}
        self._comers: dict[str, psycopg.Connection[Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors.values():
            actor.kill() if isinstance(actor, ClientProcess) else actor.close()
        self._stack.close()
        self.db.close()
        with faults.connect(self.server, self.db.name) as conn:
            # A case that failed must not keep the others from the server.
            for (gid,) in conn.execute(
                "select gid from pg_prepared_xacts where database = current_database()"
            ).fetchall():
                conn.execute(sql.SQL("rollback prepared {}").format(gid))

    @property
    def victim(self) -> Session | ClientProcess:
        """Whose transaction is cut short."""
        return self.actors[self.victim_name]

    # What they do

    def write(self, source: str) -> tuple[str, str]:
        """A write of that environment: its SQL, and the tag that its rows carry."""
        tag = f"W{next(_tags)}"
        machine = self.machine if source == "cloud" else None
        return WRITE.format(self.user.trader, tag, source, machine, ROWS).as_string(), tag

    def _become(self, name: str, scope: str) -> str:
        """SQL that turns the API's login into that actor, for the ``session`` or ``local``ly."""
        role = "authenticated" if name == "tab" else "service_role"
        return (
            sql.SQL("set {} role {}; select set_config('request.jwt.claims', {}, {})")
            .format(
                sql.SQL(scope),
                sql.Identifier(role),
                f'{{"sub": "{self.user.id}"}}' if name == "tab" else "",
                scope == "local",
            )
            .as_string()
        )

    def enter(self, name: str) -> Session | ClientProcess:
        """The session of an actor, who enters when first asked for."""
        if name in self.actors:
            return self.actors[name]
        kind = self.victim_is if name == self.victim_name else "session"
        actor: Session | ClientProcess
        if kind == "process":
            actor = ClientProcess(self.server, self.db.name, LOGIN)
        elif kind == "pooled":
            self.bouncer = self._stack.enter_context(PgBouncer(self.server))
            conn = psycopg.connect(
                self.bouncer.conninfo(self.db.name, LOGIN), autocommit=True, prepare_threshold=None
            )
            actor = Session(conn, name)
        else:
            actor = self.db.session(LOGIN, name=name)
        if kind != "pooled":
            actor.run(self._become(name, "session"))
        self.actors[name] = actor
        return actor

    def play(self, steps: str) -> None:
        """Do steps that all succeed: ``tab begin; tab write``."""
        for step in steps.split(";"):
            name, verb = step.split()
            if name == "machine":
                story.set_status(self.owner, self.machine, verb)
                story.age(self.owner, self.machine, left_running=AN_HOUR)
                if verb == "error":
                    story.age(self.owner, self.machine, entered_error=AN_HOUR)
                continue
            actor = self.enter(name)
            source = "local" if name == "tab" else "cloud"
            match verb:
                case "begin":
                    self.open[name] = []
                    self._begin(name, actor)
                case "write":
                    query, tag = self.write(source)
                    actor.run(query)
                    self.open[name].append(tag)
                case "waits":
                    query, tag = self.write(source)
                    self.waiting[name] = actor.start(query), tag
                    wait_until_blocked(actor.pid)
                case "activate":
                    self._run(name, actor, ACTIVATE.format(self.machine).as_string())
                case "confirm":
                    self._run(name, actor, "select arbiter.confirm_takeover()")
                case "commit":
                    actor.run("commit")
                    self.acknowledged.update(self.open.pop(name))
                case _:
                    raise ValueError(step)

    def end_wait(self, name: str, *, may_fail: bool = False) -> None:
        """The write that the actor waited with is admitted, and committed, or else fails."""
        future, tag = self.waiting[name]
        try:
            future.result(TIMEOUT_S)
            self.acknowledged.add(tag)
        except (psycopg.Error, ConnectionError) as error:
            if not may_fail:
                raise
            if getattr(error, "sqlstate", None) is None:
                self.in_doubt.add(tag)

    def _begin(self, name: str, actor: Session | ClientProcess) -> None:
        actor.run("begin")
        if isinstance(actor, Session) and self._is_pooled(name):
            actor.run(self._become(name, "local"))
            # Behind a pooler the backend is the transaction's, not the client's.
            ((actor.pid,),) = actor.run("select pg_backend_pid()")

    def _run(self, name: str, actor: Session | ClientProcess, query: str) -> None:
        """Run a statement in the open transaction, or else in one of its own."""
        if name in self.open or not self._is_pooled(name):
            actor.run(query)
        else:
            self._begin(name, actor)
            actor.run(query)
            actor.run("commit")

    def _is_pooled(self, name: str) -> bool:
        return name == self.victim_name and self.victim_is == "pooled"

    def given(self, state: str) -> None:
        """Bring the user there, each environment's last write acknowledged."""
        self.probe("local ok")
        if state == "local":
            return
        self.probe("activate ok, cloud ok")
        if state == "lapsed":
            story.age(self.owner, self.machine, heartbeat=AN_HOUR)
        elif state == "error":
            self.play("machine error")
            story.age(self.owner, self.machine, heartbeat=AN_HOUR)

    def answer(self, verb: str) -> str:
        """The answer to a new client's call: ``ok``, or an SQLSTATE."""
        conn = self._comer("authenticated" if verb in ("local", "confirm") else "service_role")
        query, tag = "select arbiter.confirm_takeover()", ""
        if verb == "activate":
            query = ACTIVATE.format(self.machine).as_string()
        elif verb != "confirm":
            query, tag = self.write(verb)
        try:
            conn.execute(query)
        except psycopg.Error as error:
            return error.sqlstate or "lost"
        if tag:
            self.acknowledged.add(tag)
        return "ok"

    def _comer(self, role: str) -> psycopg.Connection[Any]:
        conn = self._comers.get(role)
        if conn is None:
            claims = {"sub": str(self.user.id)} if role == "authenticated" else None
            conn = self._comers[role] = self.db.connect(role=role, claims=claims)
        return conn

    def probe(self, expected: str) -> None:
        """The answers to new clients' calls, one after the other: ``local WX001, cloud ok``."""
        asked = [line.split() for line in expected.split(", ")]
        got = [[verb, self.answer(verb)] for verb, _ in asked]
        assert got == asked, f"expected {asked}, got {got}"

    # What they leave

    def look(self) -> tuple[Any, ...]:
        """Everything of the user that is committed."""
        return (
            story.rows(self.owner, "select * from arbiter.leases where user_id = %s", self.user.id),
            story.handovers(self.owner, self.user),
            story.rows(
                self.owner, "select * from public.cloud_machines where id = %s", self.machine
            ),
            self.rows(),
        )

    def rows(self) -> dict[str, int]:
        """How many rows each write has in the table."""
        found = story.rows(
            self.owner,
            "select symbol, count(*) from public.signals where trader_id = %s group by symbol",
            self.user.trader,
        )
        return {row.symbol: row.count for row in found}

    def reconnect(self) -> None:
        """The owner comes back to a server that was gone."""
        self.owner.close()
        self._comers.clear()
        faults.connect(self.server).close()
        self.owner = self.db.connect()

    def settle(self, audited: dict[str, int] | None = None) -> None:
        """Nothing acknowledged is lost, nothing else is there, nothing by halves; all is proved."""
        rows = self.rows()
        assert rows == dict.fromkeys(self.acknowledged | self.in_doubt & rows.keys(), ROWS)
        lease = story.lease(self.owner, self.user)
        *_, last = story.handovers(self.owner, self.user)
        assert (last.epoch, last.to_holder, last.to_machine_id) == (
            lease.epoch,
            lease.holder,
            lease.machine_id,
        )
        assert audit(self.owner) == (audited or {})


def audit(conn: psycopg.Connection[Any]) -> dict[str, int]:
    """What the audit of the signals finds, counted by reason."""
    found: dict[str, int] = {}
    for row in story.rows(conn, "select * from arbiter.audit('public.signals')"):
        key = f"{row.finding} {row.reason}"
        found[key] = found.get(key, 0) + (row.row_count or 1)
    return found


# The moments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A state in which the transaction of ``victim`` is open, or its write waits.

    ``gone`` are the answers to new clients after it has gone uncommitted, ``prepared`` those while
    it stands prepared instead, and ``committed`` those after it was committed.
    """

    name: str
    given: str
    steps: str
    victim: str
    gone: str
    prepared: str = ""
    committed: str = ""

    @property
    def waits(self) -> bool:
        """Whether the victim is waiting, and not idle."""
        return f"{self.victim} waits" in self.steps


MOMENTS = [
    Moment(
        "a local write is not committed",
        given="local",
        steps="tab begin; tab write",
        victim="tab",
        gone="cloud WX004, local ok, activate ok, local WX001, cloud ok",
        prepared="cloud WX004, local ok",
        committed="cloud WX004, local ok",
    ),
    Moment(
        "a cloud write is not committed",
        given="cloud",
        steps="fly begin; fly write",
        victim="fly",
        gone="local WX001, cloud ok",
        prepared="local WX001, cloud ok",
        committed="local WX001, cloud ok",
    ),
    Moment(
        "an activation is not committed",
        given="local",
        steps="fly begin; fly activate",
        victim="fly",
        gone="cloud WX004, local ok, activate ok, local WX001, cloud ok",
        prepared="cloud WX004, local ok",
        committed="local WX001, cloud ok",
    ),
    Moment(
        "the activation is committed while a local write is in flight",
        given="local",
        steps="tab begin; tab write; fly activate",
        victim="tab",
        gone="local WX001, cloud ok",
        prepared="local WX001, cloud WX007",
        committed="local WX001, cloud ok",
    ),
    Moment(
        "the machine waits for the local write in flight, which goes",
        given="local",
        steps="tab begin; tab write; fly activate; fly waits",
        victim="tab",
        gone="local WX001, cloud ok",
    ),
    Moment(
        "the machine waits for the local write in flight, and goes",
        given="local",
        steps="tab begin; tab write; fly activate; fly waits",
        victim="fly",
        gone="local WX001, cloud ok",
    ),
    Moment(
        "the end of the drain is not committed",
        given="local",
        steps="fly activate; fly begin; fly write",
        victim="fly",
        gone="local WX001, cloud ok",
        prepared="local WX001, cloud WX007",
        committed="local WX001, cloud ok",
    ),
    Moment(
        "a takeover is not committed",
        given="lapsed",
        steps="tab begin; tab write",
        victim="tab",
        gone="cloud WX004, local ok, cloud WX004",
        prepared="cloud WX004, local WX007",
        committed="cloud WX004, local ok",
    ),
    Moment(
        "a takeover waits for the cloud write in flight, which goes",
        given="cloud",
        steps="fly begin; fly write; machine stopped; tab waits",
        victim="fly",
        gone="cloud WX004, local ok",
    ),
    Moment(
        "a takeover waits for the cloud write in flight, and goes",
        given="cloud",
        steps="fly begin; fly write; machine stopped; tab waits",
        victim="tab",
        gone="cloud WX004, local ok",
    ),
    Moment(
        "the user's yes is not committed",
        given="error",
        steps="tab begin; tab confirm",
        victim="tab",
        gone="cloud WX004, local WX003, confirm ok, cloud WX004, local ok",
        prepared="cloud WX004, local WX003",
        committed="cloud WX004, local ok",
    ),
    Moment(
        "the user's yes is committed while a cloud write is in flight",
        given="cloud",
        steps="fly begin; fly write; machine error; tab confirm",
        victim="fly",
        gone="cloud WX004, local ok",
        prepared="cloud WX004, local WX007",
        committed="cloud WX004, local ok",
    ),
    Moment(
        "the write that ends the drain to the browser is not committed",
        given="cloud",
        steps="fly begin; fly write; machine error; tab confirm; fly commit; tab begin; tab write",
        victim="tab",
        gone="cloud WX004, local ok",
        prepared="cloud WX004, local WX007",
        committed="cloud WX004, local ok",
    ),
]


# The faults --------------------------------------------------------------------------------------


def _kill_client(case: Case) -> None:
    assert isinstance(case.victim, ClientProcess)
    case.victim.kill()


def _cut(case: Case) -> None:
    assert isinstance(case.victim, Session)
    faults.cut(case.victim.conn)


def _kill_pooler(case: Case) -> None:
    assert case.bouncer is not None
    case.bouncer.kill()
    case.bouncer.start()
    with psycopg.connect(
        case.bouncer.conninfo(case.db.name, LOGIN), prepare_threshold=None
    ) as conn:
        conn.execute("select 1")


def _terminate(case: Case) -> None:
    with case.db.connect("postgres") as conn:
        conn.execute("select pg_terminate_backend(%s)", (case.victim.pid,))


def _cancel(case: Case) -> None:
    with case.db.connect("postgres") as conn:
        conn.execute("select pg_cancel_backend(%s)", (case.victim.pid,))


def _idle_too_long(case: Case) -> None:
    case.victim.run("set local idle_in_transaction_session_timeout = '10ms'")


def _statement_too_long(case: Case) -> None:
    case.victim.run("set local statement_timeout = '10ms'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        case.victim.run("select pg_sleep(60)")


def _lock_too_long(case: Case) -> None:
    with case.db.connect("postgres", autocommit=False) as conn:
        conn.execute("lock table public.positions")
        case.victim.run("set local lock_timeout = '10ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            case.victim.run("select from public.positions")


def _stop_at_once(case: Case) -> None:
    case.server.kill()
    case.server.start()


@dataclass(frozen=True)
class Fault:
    """A way to cut a transaction short.

    ``ends`` is what has gone with it: the ``server``, the victim's ``session``, or its
    ``statement`` (its session stays, in a transaction that has failed). ``hits`` are idle victims,
    waiting ones, or both.
    """

    name: str
    strike: Callable[[Case], None]
    ends: str
    hits: str = "idle waiting"
    victim_is: str = "session"


FAULTS = [
    Fault("its client is killed", _kill_client, "session", victim_is="process"),
    Fault("its connection is cut", _cut, "session"),
    Fault("the pooler is killed", _kill_pooler, "session", hits="idle", victim_is="pooled"),
    Fault("its backend is terminated", _terminate, "session"),
    Fault("it is idle for too long", _idle_too_long, "session", hits="idle"),
    Fault("its next statement takes too long", _statement_too_long, "statement", hits="idle"),
    Fault("its next statement waits too long", _lock_too_long, "statement", hits="idle"),
    Fault("its statement is cancelled", _cancel, "statement", hits="waiting"),
    Fault(
        "its backend is killed",
        lambda case: faults.kill_backend(case.server, case.victim.pid),
        "server",
    ),
    Fault("the server is stopped at once", _stop_at_once, "server"),
    Fault("the postmaster is killed", lambda case: faults.kill_postmaster(case.server), "server"),
]


CASES = [
    pytest.param(moment, fault, id=f"{moment.name} and {fault.name}")
    for moment in MOMENTS
    for fault in FAULTS
    if ("waiting" if moment.waits else "idle") in fault.hits
]


@pytest.mark.parametrize(("moment", "fault"), CASES)
def test_cut_short(own: EmbeddedServer, arena: str, moment: Moment, fault: Fault) -> None:
    with Case(own, arena, moment.victim, fault.victim_is) as case:
        case.given(moment.given)
        case.play(moment.steps)
        before = case.look()
        fault.strike(case)
        if fault.ends == "server":
            case.reconnect()
            for name in case.waiting:
                # Rarely admitted: backends that outlive their postmaster for a moment end one after
                # the other, and the write in flight may go before the one that waits for it.
                case.end_wait(name, may_fail=True)
        else:
            carry_on(case, fault)
        waited = {tag for _, tag in case.waiting.values()}
        if (fault.ends == "server" or not waited) and not waited & case.rows().keys():
            assert case.look() == before
        case.probe(moment.gone)
        case.settle()


def carry_on(case: Case, fault: Fault) -> None:
    """After a fault that took the victim only: the others come to their end, as if nothing was."""
    if case.victim_name in case.waiting:
        # First, because its backend knows that its client has gone only when it wants to answer.
        for name in list(case.open):
            case.play(f"{name} commit")
    if fault.ends == "session":
        faults.wait_until_gone(case.server, case.victim.pid)
    for name in case.waiting:
        case.end_wait(name, may_fail=name == case.victim_name)


PREPARED = [pytest.param(moment, id=moment.name) for moment in MOMENTS if moment.prepared]


@pytest.mark.parametrize("moment", PREPARED)
def test_prepared_and_crashed_then_committed(
    own: EmbeddedServer, arena: str, moment: Moment
) -> None:
    """A prepared transaction survives the crash, and so does its lock on the lease."""
    with Case(own, arena, moment.victim) as case, drain_timeout(own, arena, SHORT):
        prepare(case, moment)
        before = case.look()
        _stop_at_once(case)
        case.reconnect()
        assert case.look() == before
        case.probe(moment.prepared)
        end_prepared(case, "commit prepared {}")
        case.acknowledged.update(case.open.pop(moment.victim))
        case.probe(moment.committed)
        case.settle()


@pytest.mark.parametrize("moment", PREPARED)
def test_prepared_and_rolled_back(own: EmbeddedServer, arena: str, moment: Moment) -> None:
    with Case(own, arena, moment.victim) as case, drain_timeout(own, arena, SHORT):
        prepare(case, moment)
        case.probe(moment.prepared)
        end_prepared(case, "rollback prepared {}")
        case.probe(moment.gone)
        case.settle()


def prepare(case: Case, moment: Moment) -> None:
    case.given(moment.given)
    case.play(moment.steps)
    case.victim.run(f"prepare transaction '{case.user.id}'")


def end_prepared(case: Case, command: str) -> None:
    with case.db.connect("postgres") as conn:
        conn.execute(sql.SQL(command).format(str(case.user.id)))


@contextmanager
def drain_timeout(server: EmbeddedServer, dbname: str, timeout: timedelta) -> Iterator[None]:
    """Another drain_timeout for a while."""
    with faults.connect(server, dbname, OWNER) as conn:
        _set(conn, drain_timeout=timeout)
    try:
        yield
    finally:
        with faults.connect(server, dbname, OWNER) as conn:
            _set(conn, drain_timeout=DRAIN_TIMEOUT)


LEVELS = ("read committed", "repeatable read", "serializable")


@pytest.mark.parametrize("level", LEVELS)
def test_a_statement_timeout_ends_the_wait_for_a_write_in_flight(
    own: EmbeddedServer, arena: str, level: str
) -> None:
    with Case(own, arena) as case:
        case.given("local")
        case.play("tab begin; tab write; fly activate")
        fly = case.enter("fly")
        fly.run(f"begin isolation level {level}; set local statement_timeout = '50ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            fly.run(case.write("cloud")[0])
        case.play("tab commit")
        case.probe("local WX001, cloud ok")
        case.settle()


def test_a_lock_timeout_does_not_shorten_the_wait_for_a_write_in_flight(
    own: EmbeddedServer, arena: str
) -> None:
    """The bound is drain_timeout: the wait is not one for a lock."""
    with Case(own, arena) as case:
        case.given("local")
        case.play("tab begin; tab write; fly activate")
        case.enter("fly").run("set lock_timeout = '1ms'")
        case.play("fly waits; tab commit")
        case.end_wait("fly")
        case.probe("local WX001, cloud ok")
        case.settle()


def test_the_checks_find_a_row_that_was_forced_in(own_templates: Templates) -> None:
    """Otherwise all of the above would prove nothing."""
    with own_templates.clone("installed") as db, Case(db.server, db.name) as case:
        case.given("cloud")
        case.settle()
        query, tag = case.write("local")
        case.owner.execute("alter table public.signals disable trigger user")
        case.owner.execute(query)
        with pytest.raises(AssertionError):
            case.settle()
        case.acknowledged.add(tag)
        with pytest.raises(AssertionError, match="wrong_environment"):
            case.settle()


# The injectors of the random workload -----------------------------------------------------------


def inject(case: Case, name: str, bouncer: PgBouncer | None = None) -> str:
    """One fault against the database of the case."""
    target = faults.Target(case.server, case.db.name, bouncer)
    return faults.inject(name, target, random.Random("seed"))


ENDS_THE_SERVER = ("kill_backend", "immediate_stop", "kill_postmaster")
ENDS_THE_WRITE = ("terminate_backend", *ENDS_THE_SERVER)


@pytest.mark.parametrize(
    "name", [n for n in faults.NAMES if n not in ("cancel_backend", "cut_bouncer")]
)
def test_injected(own_templates: Templates, name: str) -> None:
    """The victim is the writing session, not the idle one, and the injector leaves nothing."""
    with own_templates.clone("installed") as db, Case(db.server, db.name) as case:
        case.given("cloud")
        case.play("tab begin; fly begin; fly write")
        before = case.look()
        log = db.server.log_file.stat().st_size
        assert inject(case, name).startswith(f"{name}: ")
        if name in ENDS_THE_WRITE:
            with pytest.raises(psycopg.OperationalError):
                case.enter("fly").run("commit")
            case.reconnect()
            assert case.look() == before
        else:
            case.play("fly commit")
        crashed = b"automatic recovery in progress" in db.server.log_file.read_bytes()[log:]
        assert crashed == (name in ENDS_THE_SERVER)
        case.probe("local WX001, cloud ok")
        case.settle()
        left = "select * from pg_stat_activity where application_name = %s"
        assert story.rows(case.owner, left, faults.APPLICATION_NAME) == []


def test_injected_cancel(own: EmbeddedServer, arena: str) -> None:
    with Case(own, arena) as case:
        case.given("cloud")
        case.play("fly begin; fly write")
        fly = case.enter("fly")
        sleeping = fly.start("select pg_sleep(60)")
        wait_until_blocked(fly.pid)
        assert f"backend {fly.pid}, active" in inject(case, "cancel_backend")
        with pytest.raises(psycopg.errors.QueryCanceled):
            sleeping.result(TIMEOUT_S)
        assert inject(case, "cancel_backend") == "cancel_backend: no backend was active"
        case.probe("local WX001, cloud ok")
        case.settle()


@pytest.mark.parametrize("holder", ["local", "cloud"])
@pytest.mark.parametrize("name", ["idle_in_transaction", "kill_client"])
def test_injected_writes_hold_the_lease_of_the_one_that_may_write(
    own_templates: Templates, name: str, holder: str
) -> None:
    with own_templates.clone("installed") as db, Case(db.server, db.name) as case:
        case.given(holder)
        assert f"a {holder} write for trader {case.user.trader}" in inject(case, name)
        case.settle()


def test_injected_into_the_pooler(own_templates: Templates) -> None:
    with (
        own_templates.clone("installed") as db,
        Case(db.server, db.name, "tab", "pooled") as case,
    ):
        case.given("local")
        case.play("tab begin; tab write")
        assert inject(case, "cut_bouncer", case.bouncer).startswith("cut_bouncer: ")
        with pytest.raises(psycopg.OperationalError):
            case.victim.run("commit")
        case.probe("cloud WX004, local ok")
        case.settle()


def test_what_cannot_be_injected_is_said(own: EmbeddedServer, arena: str) -> None:
    with Case(own, arena) as case:
        with pytest.raises(ValueError, match="no such fault: sunspots"):
            inject(case, "sunspots")
        with pytest.raises(ValueError, match="needs a pooler"):
            inject(case, "cut_bouncer")


# The clock ---------------------------------------------------------------------------------------

#: Run before arbiter is installed: the clock that its functions find is wrong by the value of a
#: sequence, which no snapshot hides. What the server does by its own clock (pg_sleep, its timeouts)
#: goes on as before.
STEPPED_CLOCK = """
create sequence public.clock_step minvalue -1000000000 start 0;
alter function pg_catalog.clock_timestamp() rename to unstepped_clock_timestamp;
create function pg_catalog.clock_timestamp()
returns timestamptz
language sql
volatile
security definer
begin atomic
  select unstepped_clock_timestamp() + s.last_value * interval '1 second' from public.clock_step s;
end;
"""


@pytest.fixture(scope="module")
def stepped(own_templates: Templates) -> Iterator[str]:
    """A database whose clock can be stepped."""
    with own_templates.clone("trading") as database:
        with database.connect("postgres") as conn:
            conn.execute(STEPPED_CLOCK)
        arbiter_db.install(database.conninfo())
        database.close()
        yield database.name


@pytest.fixture
def case(own: EmbeddedServer, stepped: str) -> Iterator[Case]:
    """A user there; the clock is right at first."""
    with Case(own, stepped) as case:
        step(case, 0)
        yield case


def step(case: Case, seconds: int) -> None:
    """From now on the clock is wrong by that many seconds."""
    with case.db.connect("postgres") as conn:
        conn.execute("select setval('public.clock_step', %s)", (seconds,))


HOUR = 3600


class TestClock:
    """The database's clock is set forward or back, as by an operator or a bad time source.

    Settings are the defaults: heartbeat_timeout and stop_grace 30 s, error_takeover_delay 120 s.
    """

    def test_forward_an_hour_a_machine_is_rejected_until_its_next_heartbeat(
        self, case: Case
    ) -> None:
        case.given("cloud")
        step(case, HOUR)
        case.probe("cloud WX004, activate ok, local WX001, cloud ok")
        case.settle()

    def test_forward_an_hour_a_browser_may_take_over_until_the_next_heartbeat(
        self, case: Case
    ) -> None:
        case.given("cloud")
        step(case, HOUR)
        case.probe("local ok, cloud WX004, activate ok, local WX001, cloud ok")
        case.settle()

    def test_forward_an_hour_a_takeover_still_waits_for_the_write_in_flight(
        self, case: Case
    ) -> None:
        case.given("cloud")
        case.play("fly begin; fly write")
        step(case, HOUR)
        case.play("tab waits; fly commit")
        case.end_wait("tab")
        case.probe("cloud WX004, local ok")
        case.settle()

    def test_forward_an_hour_a_stop_and_an_error_count_as_an_hour_old(self, case: Case) -> None:
        case.given("cloud")
        story.set_status(case.owner, case.machine, "error")
        case.probe("local WX003, confirm WX003")
        step(case, HOUR)
        case.probe("cloud WX004, local WX003, confirm ok, cloud WX004, local ok")
        case.settle()

    def test_forward_and_back_again_the_machine_writes_from_its_next_heartbeat_on(
        self, case: Case
    ) -> None:
        case.given("cloud")
        step(case, HOUR)
        case.probe("activate ok, cloud ok")
        step(case, 0)
        case.probe("activate ok, local WX001, cloud ok")
        case.settle()

    def test_back_an_hour_a_live_machine_writes_on_with_its_next_heartbeat(
        self, case: Case
    ) -> None:
        case.given("cloud")
        step(case, -HOUR)
        case.probe("activate ok, local WX001, cloud ok")
        step(case, -HOUR + 20)
        case.probe("activate ok, local WX001, cloud ok")
        case.settle()

    def test_back_an_hour_a_dead_machine_has_lapsed_after_two_timeouts(self, case: Case) -> None:
        case.given("cloud")
        step(case, -HOUR + 61)
        case.probe("cloud WX004, local ok")

    def test_back_an_hour_a_machine_that_beats_again_lapses_in_time_when_it_dies(
        self, case: Case
    ) -> None:
        case.given("cloud")
        step(case, -HOUR)
        case.probe("activate ok, cloud ok")
        step(case, -HOUR + 31)
        case.probe("cloud WX004, local ok")

    def test_back_an_hour_after_a_stop_the_grace_ends_in_time(self, case: Case) -> None:
        case.given("cloud")
        story.set_status(case.owner, case.machine, "stopped")
        step(case, -HOUR + 61)
        case.probe("cloud WX004, local ok")

    def test_back_an_hour_after_an_error_the_user_may_confirm_in_time(self, case: Case) -> None:
        case.given("cloud")
        story.set_status(case.owner, case.machine, "error")
        step(case, -HOUR + 241)
        case.probe("confirm ok, local ok")

    def test_back_an_hour_the_history_stays_in_order(self, case: Case) -> None:
        case.given("cloud")
        step(case, HOUR)
        case.probe("local ok")
        step(case, 0)
        case.probe("activate ok, cloud ok")
        instants = [h.handed_over_at for h in story.handovers(case.owner, case.user)]
        assert instants != sorted(instants), "the clock was not stepped back: this proves nothing"
        case.settle()

    @pytest.mark.parametrize("seed", range(3))
    def test_however_it_steps_never_are_both_admitted(self, case: Case, seed: int) -> None:
        rng = random.Random(seed)
        case.given("cloud")
        admitted = set()
        for _ in range(60):
            step(case, rng.choice((0, 20, 31, 130, HOUR, -20, -31, -130, -HOUR)))
            doing = rng.choice(("activate", "activate", "confirm", "stopping", "stopped", "error"))
            if doing in ("activate", "confirm"):
                case.answer(doing)
            else:
                story.set_status(case.owner, case.machine, doing)
            # Twice, since the first may begin with a handover.
            asked = rng.choice((("local", "cloud"), ("cloud", "local"))) * 2
            may = {source for source in asked if case.answer(source) == "ok"}
            assert len(may) <= 1
            admitted |= may
        assert admitted == {"local", "cloud"}
        case.settle()


# Dump and restore --------------------------------------------------------------------------------


def client_program(server: EmbeddedServer, name: str) -> Path:
    """pg_dump or pg_restore of the server's version; of the newest one where it comes without."""
    for folder in (server.bindir, find_installation(18).bindir):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(name)


def run(*command: object) -> None:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


#: A user's state in the source database, and the first answers in the restored one.
STATES = {
    "local": ("local", "", "cloud WX004, local ok"),
    "cloud": ("cloud", "", "local WX001, cloud ok"),
    "draining to the machine": ("local", "fly activate", "local WX001, cloud ok"),
    "draining to the browser": (
        "cloud",
        "fly begin; fly write; machine error; tab confirm; fly commit",
        "cloud WX004, local ok",
    ),
    "heartbeat lapsed": ("lapsed", "", "cloud WX004, local ok"),
    "stopped": ("cloud", "machine stopped", "cloud WX004, local ok"),
    "error": ("error", "", "local WX003, cloud WX004, confirm ok, local ok"),
}


@pytest.fixture(scope="module")
def dumped(
    own_templates: Templates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Case], Path]]:
    """A user in each state, and a dump of their database made while a write was in flight."""
    file = tmp_path_factory.mktemp("dump") / "database.dump"
    with ExitStack() as stack:
        db = stack.enter_context(own_templates.clone("installed"))
        with db.connect() as conn:
            _set(conn, heartbeat_timeout=timedelta(minutes=10))
        cases = {}
        for state, (given, steps, _) in STATES.items():
            case = cases[state] = stack.enter_context(Case(db.server, db.name))
            case.given(given)
            if steps:
                case.play(steps)
        cases["cloud"].play("fly begin; fly write")
        run(client_program(db.server, "pg_dump"), "-Fc", "-f", file, db.conninfo("postgres"))
        yield cases, file


@contextmanager
def restored(server: EmbeddedServer, name: str, file: Path) -> Iterator[Database]:
    """A new database of that name, restored from the dump."""
    with faults.connect(server) as conn:
        conn.execute(
            sql.SQL("create database {} owner {}").format(
                sql.Identifier(name), sql.Identifier(OWNER)
            )
        )
    db = Database(server, name)
    with closing(db):
        restore = client_program(server, "pg_restore")
        run(restore, "--exit-on-error", "-d", db.conninfo("postgres"), file)
        yield db


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[EmbeddedServer]:
    """Another cluster."""
    with EmbeddedServer(MAJOR) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        yield server


class TestRestore:
    def test_into_another_cluster(
        self, dumped: tuple[dict[str, Case], Path], elsewhere: EmbeddedServer
    ) -> None:
        cases, file = dumped
        old = ROWS * sum(len(case.acknowledged) for case in cases.values())
        unproved = {"not_provable other_cluster": old}
        with restored(elsewhere, "moved", file) as db, ExitStack() as stack:
            for state, source in cases.items():
                case = stack.enter_context(Case(elsewhere, db.name, restored=source))
                assert case.look() == source.look(), state
                case.settle(unproved)
                handed_over = len(story.handovers(case.owner, case.user))
                case.probe(STATES[state][-1])
                # Rows written here are proved only after the first handover here: before it, the
                # newest handover is one of the other cluster.
                new = sum(case.rows().values()) - sum(source.rows().values())
                if len(story.handovers(case.owner, case.user)) == handed_over:
                    unproved["not_provable other_cluster"] += new
                case.settle(unproved)
                if story.lease(case.owner, case.user).holder == "cloud":
                    case.play("machine stopped")
                    case.probe("cloud WX004, local ok")
                else:
                    case.probe("activate ok, local WX001, cloud ok")
                case.settle(unproved)

    def test_into_the_same_cluster_under_another_name(
        self, dumped: tuple[dict[str, Case], Path], own: EmbeddedServer
    ) -> None:
        cases, file = dumped
        with restored(own, "copied", file) as db, ExitStack() as stack:
            for state, source in cases.items():
                case = stack.enter_context(Case(own, db.name, restored=source))
                assert case.look() == source.look(), state
                case.settle()
                case.probe(STATES[state][-1])
                case.probe("activate ok, local WX001, cloud ok")
                case.settle()

    def test_what_is_forced_in_after_it_is_found(
        self, dumped: tuple[dict[str, Case], Path], elsewhere: EmbeddedServer
    ) -> None:
        cases, file = dumped
        with (
            restored(elsewhere, "forced", file) as db,
            Case(elsewhere, db.name, restored=cases["local"]) as case,
        ):
            case.probe("activate ok, cloud ok")
            case.owner.execute("alter table public.signals disable trigger user")
            case.owner.execute(case.write("local")[0])
            assert audit(case.owner).get("contradiction wrong_environment") == ROWS
