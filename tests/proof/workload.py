"""A random workload of browsers, machines and their owners, and the history that they saw.

    history = play(Round(seed="7.1", rule="arbiter", place=place, users=(0, 1, 2, 3), seconds=5))

``steps`` says who they are and what they do, by the seed only. The timing is up to the operating
system.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import NAMESPACE_OID, UUID, uuid5

import psycopg
from psycopg import sql

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer
from proof.clients import TIMEOUT_S, Admin, Client, Place, User
from proof.history import LOST, History, RegistryWrite, Settings, Transaction, Write
from proof.steps import (
    ACTORS,
    Deed,
    Plan,
    Statement,
    dice,
    machine_steps,
    own_level,
    person_steps,
    writer_steps,
)

__all__ = [
    "RULES",
    "SERVER_OPTIONS",
    "SETTINGS",
    "Round",
    "Rule",
    "create_database",
    "create_roles",
    "play",
]

Rule = Literal["arbiter", "client", "exists", "policy", "advisory", "one_step"]

#: Who decides. All but arbiter are naive: ``client`` asks before it writes, the others are those of
#: naive_locks.sql.
RULES: tuple[Rule, ...] = get_args(Rule)

#: Short, so that much happens: some two handovers a second for each user.
SETTINGS = Settings(
    heartbeat_timeout=0.25, stop_grace=0.15, error_takeover_delay=0.2, drain_timeout=0.3
)
HEARTBEAT_INTERVAL_S = 0.1

#: The options that a server needs.
SERVER_OPTIONS = {
    "track_commit_timestamp": "on",
    "max_wal_size": "4GB",
    "statement_timeout": "20s",
}

REPORT_EVERY_S = 0.2

_TESTS = Path(__file__).parent.parent
_PACKAGE = Path(arbiter_db.__file__).parent

clock = time.monotonic


# Databases ---------------------------------------------------------------------------------------


def create_roles(server: EmbeddedServer) -> None:
    """Create the app's roles, once on a server."""
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute((_PACKAGE / "demo" / "roles.sql").read_text())


def create_database(server: EmbeddedServer, name: str, rule: Rule) -> None:
    """Create a database with the demo's trading schema in which that rule decides.

    It is a copy of ``template_<rule>``, which is made when it is not there.
    """
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        template = f"template_{rule}"
        if not conn.execute("select from pg_database where datname = %s", (template,)).rowcount:
            _create(conn, template, "template0")
            _fill(server.conninfo(template, "app_owner"), rule)
        _create(conn, name, template)


def _create(conn: psycopg.Connection[Any], name: str, template: str) -> None:
    conn.execute(
        sql.SQL("create database {} owner app_owner template {} strategy file_copy").format(
            sql.Identifier(name), sql.Identifier(template)
        )
    )


def _fill(conninfo: str, rule: Rule) -> None:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute((_PACKAGE / "demo" / "trading.sql").read_text())
        if rule == "arbiter":
            arbiter_db.install(conninfo)
            conn.execute(
                "update arbiter.settings set heartbeat_timeout = %s * interval '1 s',"
                " stop_grace = %s * interval '1 s', error_takeover_delay = %s * interval '1 s',"
                " drain_timeout = %s * interval '1 s', heartbeat_interval = %s * interval '1 s'",
                (
                    SETTINGS.heartbeat_timeout,
                    SETTINGS.stop_grace,
                    SETTINGS.error_takeover_delay,
                    SETTINGS.drain_timeout,
                    HEARTBEAT_INTERVAL_S,
                ),
            )
        else:
            conn.execute((_TESTS / "naive_locks.sql").read_text())
            conn.execute(
                "update naive.settings set heartbeat_timeout = %s * interval '1 s'",
                (SETTINGS.heartbeat_timeout,),
            )
            if rule != "client":
                conn.execute("select naive.use(%s)", (rule,))
        conn.execute((Path(__file__).parent / "workload.sql").read_text())


# A round -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """A round to play: it ends after ``seconds``, or ``writes`` write statements."""

    seed: str
    rule: Rule
    place: Place
    users: tuple[int, ...]
    seconds: float
    writes: int = 1_000_000


def play(round_: Round, report: Callable[[int], None] = lambda writes: None) -> History:
    """Play a round and return its history; ``report`` gets the writes so far, now and then.

    Raises TimeoutError when it does not come to an end.
    """
    # A pipeline that fails, as many must, would be logged each time.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    return asyncio.run(_Play(round_).run(report))


#: Asked again when the answer was lost.
_USERS = """
with u as (
  insert into auth.users (id, email)
  select u.id, u.id || '@example.com' from unnest(%s::uuid[]) as u (id)
  on conflict do nothing
), t as (
  insert into public.traders (id, user_id, name)
  select t.id, t.user_id, 'Momentum' from unnest(%s::uuid[], %s::uuid[]) as t (id, user_id)
  on conflict do nothing
)
select 1
"""

_INSERT = """
insert into public.signals
  (trader_id, symbol, interval, signal, price, bar_time, source, machine_id)
values (%s, 'BTCUSDT', '1m', 'buy', %s, to_timestamp(%s), %s, %s)
"""
_BATCH = """
insert into public.signals
  (trader_id, symbol, interval, signal, price, bar_time, source, machine_id)
select %s, 'BTCUSDT', '1m', 'buy', %s, to_timestamp(%s + g.n), %s, %s
  from generate_series(0, %s - 1) as g (n)
"""
_COPY = """
copy public.signals (trader_id, symbol, interval, signal, price, bar_time, source, machine_id)
from stdin
"""
_ASK = "select naive.is_running(%s, %s)"

_CREATE = """
insert into public.cloud_machines (id, user_id, machine_id, status) values (%s, %s, %s, %s)
"""
_STATUS = "update public.cloud_machines set status = %s where id = %s"
_HEARTBEAT = "update public.cloud_machines set last_health_check = clock_timestamp() where id = %s"
_DELETE = "delete from public.cloud_machines where id = %s"
_EXISTS = "select from public.cloud_machines where id = %s"

#: Rows by tag. The foreign key of a machine that was deleted has rewritten its rows: their xmin
#: is the deletion's.
_FOUND = """
select s.price::bigint, count(*),
       extract(epoch from min(pg_xact_commit_timestamp(s.xmin))
         filter (where s.source = 'local' or s.machine_id is not null))::float8
  from public.signals s
 where s.trader_id = any (%s)
 group by 1
"""

#: An actor's tags begin at its number times this: so they too depend on the seed only.
_TAGS = 100_000
#: A transaction's rows begin at its tag times this; each row has a bar of its own.
_ROWS = 1_000


class _Rejected(Exception):
    """The client's own check rejected the write."""


class _Play:
    """A round while it is played."""

    def __init__(self, round_: Round) -> None:
        self.round = round_
        self.admin = Admin(round_.place)
        self.history = History(round_.seed, SETTINGS)
        self.writes = 0
        self._end = 0.0
        # How far ahead the server's clock is of ours: the same machine's other clock.
        self._ahead = time.time() - clock()

    async def run(self, report: Callable[[int], None]) -> History:
        users = [self._user(number) for number in self.round.users]
        await self.admin.ask(
            _USERS, [u.id for u in users], [u.trader for u in users], [u.id for u in users]
        )
        clients = [self._client(user, name) for user in users for name in ACTORS]
        await asyncio.gather(*(client.open() for client in clients))
        self._end = clock() + self.round.seconds
        reporter = asyncio.create_task(self._report(report))
        try:
            async with (
                asyncio.timeout(self.round.seconds + 2 * TIMEOUT_S),
                asyncio.TaskGroup() as group,
            ):
                for client in clients:
                    group.create_task(self._act(client))
        finally:
            reporter.cancel()
            for client in clients:
                await client.close()
        report(self.writes)
        await self._look([user.trader for user in users])
        await self.admin.close()
        self.history.transactions.sort(key=lambda t: t.began)
        self.history.registry.sort(key=lambda r: r.invoked)
        return self.history

    def _user(self, number: int) -> User:
        name = f"{self.round.seed}/{number}"
        return User(number, uuid5(NAMESPACE_OID, name), uuid5(NAMESPACE_OID, f"{name}/trader"))

    def _client(self, user: User, name: str) -> Client:
        rng = dice(self.round.seed, user.number, name)
        return Client(self.round.place, self.admin, user, name, own_level(rng, ACTORS[name]))

    @property
    def _over(self) -> bool:
        return clock() >= self._end or self.writes >= self.round.writes

    async def _report(self, report: Callable[[int], None]) -> None:
        while True:
            report(self.writes)
            self._ahead = max(self._ahead, time.time() - clock())
            await asyncio.sleep(REPORT_EVERY_S)

    async def _look(self, traders: list[UUID]) -> None:
        """Complete the history with what the table holds."""
        # Never later than it was, however the machine's clock was adjusted meanwhile.
        ahead = max(self._ahead, time.time() - clock())
        for tag, rows, committed in await self.admin.ask(_FOUND, traders):
            self.history.found[tag] = rows
            if committed is not None:
                self.history.committed_at[tag] = committed - ahead

    async def _act(self, client: Client) -> None:
        rng = dice(self.round.seed, client.user.number, client.name)
        if client.actor.environment is not None:
            await self._write_on(client, writer_steps(rng, client.actor))
        elif client.name == "fly":
            await self._live_on(client, machine_steps(rng))
        else:
            await self._confirm_on(client, person_steps(rng))

    # --------------------------------------------------------------------------- who writes

    async def _write_on(self, client: Client, steps: Iterator[Plan]) -> None:
        user = client.user
        cloud = client.actor.environment == "cloud"
        if cloud:
            await self._until(user.has_machine)
        place = list(ACTORS).index(client.name) + user.number * len(ACTORS)
        for tag, plan in enumerate(steps, place * _TAGS):
            if self._over:
                return
            machine = user.machine if cloud else None
            admitted = await self._transact(client, plan, tag, machine)
            await asyncio.sleep(plan.rest if admitted else plan.patience)

    async def _until(self, event: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(self._end - clock(), 0.0)):
                await event.wait()

    async def _transact(self, client: Client, plan: Plan, tag: int, machine: UUID | None) -> bool:
        """Do what the plan says, up to an error; whether there was none."""
        done = Transaction(
            tag, client.user.number, client.name, plan.level, client.actor.via, began=clock()
        )
        try:
            if plan.pipelined:
                await self._write_pipelined(client, plan, done, machine)
            else:
                await self._write_one_by_one(client, plan, done, machine)
            if plan.begins:
                if plan.pause:
                    await asyncio.sleep(plan.pause)
                done.ending = clock()
                await client.cursor.execute("commit" if plan.commits else "rollback")
                done.ended = clock()
            done.outcome = "committed" if plan.commits or not plan.begins else "rolled back"
        except (psycopg.Error, _Rejected) as error:
            await self._fail(client, plan, done, error)
        if done.writes:
            self.history.transactions.append(done)
        self.writes += len(done.writes)
        return done.answer is None

    async def _write_one_by_one(
        self, client: Client, plan: Plan, done: Transaction, machine: UUID | None
    ) -> None:
        if plan.begins:
            await client.cursor.execute(client.begin[plan.level])
        rows = 0
        for statement in plan.statements:
            if statement.pause:
                await asyncio.sleep(statement.pause)
            write = Write(clock(), 0.0, machine, statement.rows, statement.how, None)
            done.writes.append(write)
            done.ending = write.invoked
            await self._write(client, statement, machine, done.tag, rows)
            done.ended = write.returned = clock()
            rows += statement.rows

    async def _write_pipelined(
        self, client: Client, plan: Plan, done: Transaction, machine: UUID | None
    ) -> None:
        """All inserts in one message. The inserts after a failed one were never tried."""
        if self.round.rule == "client":
            await self._ask(client, machine)
        cursors = [client.connection.cursor() for _ in plan.statements]
        invoked = clock()
        try:
            async with client.connection.pipeline():
                # Not prepared: what a pipeline prepares and then aborts is missing the next time.
                await client.cursor.execute(client.begin[plan.level], prepare=False)
                for n, cursor in enumerate(cursors):
                    row = self._row(client, machine, done.tag, n)
                    await cursor.execute(_INSERT, row, prepare=False)
        finally:
            returned = clock()
            admitted = sum(cursor.rowcount == 1 for cursor in cursors)
            done.writes = [
                Write(invoked, returned, machine, 1, "insert", None) for _ in range(admitted)
            ]
            if admitted < len(cursors):
                done.writes.append(Write(invoked, 0.0, machine, 1, "insert", None))
            done.ending, done.ended = invoked, returned

    async def _fail(
        self, client: Client, plan: Plan, done: Transaction, error: psycopg.Error | _Rejected
    ) -> None:
        """Note the answer of what has failed, and end the transaction."""
        if isinstance(error, psycopg.Error):
            done.answer = await self._answer(client, error)
        else:
            done.answer = str(error)
        done.ended = clock()
        done.outcome = "lost" if done.answer == LOST else "failed"
        if done.writes and not done.writes[-1].returned:
            done.writes[-1].returned = done.ended
            done.writes[-1].answer = done.answer
        if not plan.begins:
            await self._undo(client)
            return
        if done.outcome == "failed":
            done.ending = clock()
        await self._undo(client)
        done.ended = clock()

    async def _write(
        self, client: Client, statement: Statement, machine: UUID | None, tag: int, first: int
    ) -> None:
        if self.round.rule == "client":
            await self._ask(client, machine)
        row = self._row(client, machine, tag, first)
        match statement.how:
            case "insert":
                await client.cursor.execute(_INSERT, row)
            case "batch":
                await client.cursor.execute(_BATCH, (*row, statement.rows))
            case "copy":
                trader, _, number, source, _ = row
                bars = (
                    datetime.fromtimestamp(n, UTC) for n in range(number, number + statement.rows)
                )
                try:
                    async with client.cursor.copy(_COPY) as copy:
                        for bar in bars:
                            await copy.write_row(
                                (trader, "BTCUSDT", "1m", "buy", tag, bar, source, machine)
                            )
                except ValueError as error:
                    # An answer and, at once behind it, the session's end are two results, and the
                    # driver expects one: the answer is lost with the session.
                    raise psycopg.OperationalError("the session ended as COPY did") from error

    def _row(
        self, client: Client, machine: UUID | None, tag: int, number: int
    ) -> tuple[UUID, int, int, str, UUID | None]:
        source = "local" if machine is None else "cloud"
        return client.user.trader, tag, tag * _ROWS + number, source, machine

    async def _ask(self, client: Client, machine: UUID | None) -> None:
        await client.cursor.execute(_ASK, (client.user.id, machine))
        row = await client.cursor.fetchone()
        assert row is not None
        if row[0] != (machine is not None):
            raise _Rejected("WX001" if machine is None else "WX004")

    # ------------------------------------------------------------------------- the registry

    async def _live_on(self, client: Client, steps: Iterator[Deed]) -> None:
        user = client.user
        machine = user.id
        for deed in steps:
            if self._over:
                return
            match deed.verb:
                case "create":
                    user.lives += 1
                    machine = uuid5(NAMESPACE_OID, f"{user.id}/{user.lives}")
                    params = (machine, user.id, str(machine), deed.status)
                    while not await self._exists(machine):
                        await self._register(client, deed, machine, _CREATE, params)
                    user.machine = machine
                    user.has_machine.set()
                case "status":
                    await self._register(client, deed, machine, _STATUS, (deed.status, machine))
                case "heartbeat":
                    await self._register(client, deed, machine, _HEARTBEAT, (machine,))
                case "delete":
                    while await self._exists(machine):
                        await self._register(client, deed, machine, _DELETE, (machine,))
                case "confirm":
                    raise ValueError(deed.verb)
            await asyncio.sleep(deed.rest)

    async def _exists(self, machine: UUID) -> bool:
        return bool(await self.admin.ask(_EXISTS, machine))

    async def _confirm_on(self, client: Client, steps: Iterator[Deed]) -> None:
        await self._until(client.user.has_machine)
        schema = "arbiter" if self.round.rule == "arbiter" else "naive"
        query = (
            sql.SQL("{}; select {}.confirm_takeover(); commit")
            .format(sql.SQL(client.begin["read committed"]), sql.Identifier(schema))
            .as_string()
        )
        for deed in steps:
            if self._over:
                return
            assert client.user.machine is not None
            await self._register(client, deed, client.user.machine, query, None)
            await asyncio.sleep(deed.rest)

    async def _register(
        self,
        client: Client,
        deed: Deed,
        machine: UUID,
        query: str,
        params: tuple[Any, ...] | None,
    ) -> None:
        """Do it and note the answer."""
        done = RegistryWrite(
            client.user.number, client.name, deed.verb, machine, clock(), 0.0, deed.status
        )
        try:
            await client.cursor.execute(query, params)
            done.returned = clock()
        except psycopg.Error as error:
            done.answer = await self._answer(client, error)
            done.returned = clock()
            await self._undo(client)
        self.history.registry.append(done)

    # ------------------------------------------------------------------------------ errors

    async def _answer(self, client: Client, error: psycopg.Error) -> str:
        """What an error says: LOST once nothing of a lost connection is left on the server."""
        if error.sqlstate is None:
            # The error is not the server's, whose answer is lost: hang up.
            await client.close()
        if client.broken:
            await client.recover(error)
            return LOST
        assert error.sqlstate is not None
        return error.sqlstate

    async def _undo(self, client: Client) -> None:
        """Leave the connection as new after an error."""
        if not client.broken and client.in_transaction:
            try:
                await client.cursor.execute("rollback")
            except psycopg.Error as error:
                await self._answer(client, error)
        if client.broken:
            await client.open()
