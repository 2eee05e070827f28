"""Every verb and every path by which a row gets into a protected table, as every role.

Each path is one entry of ``PATHS``; it is run as each role, from the browser's environment and from
the cloud's, by a user who may write and by one who may not. What arbiter rejects here, the same
statement writes in a database without it (the twins), and past each naive guard of naive.sql there
is a path, too.

Ada is local: her machine is not up yet. Bob's machine holds and is healthy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import (
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    count_rows,
    detail_of,
    lease,
    next_bar,
    one,
    rejection,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

NAIVE = Path(__file__).with_name("naive.sql")

ROLES = ["superuser", "owner", "service_role", "browser"]

#: What a session is for a role: who logs in, and the role that it then takes.
LOGINS = {
    "superuser": ("postgres", None),
    "owner": ("app_owner", None),
    "service_role": ("authenticator", "service_role"),
    "browser": ("authenticator", "authenticated"),
}

TABLES = ["public.signals", "public.ticks", "public.webhook_queue"]

#: The paths that need more than the trading schema has.
SCHEMA = """
create table public.ticks (
  trader_id uuid not null references public.traders (id),
  symbol text not null,
  interval text not null,
  signal text not null,
  bar_time timestamptz not null,
  source text not null default 'local',
  machine_id uuid
) partition by range (bar_time);
create table public.ticks_old partition of public.ticks
  for values from ('2025-01-01') to ('2026-01-01');
create table public.ticks_new partition of public.ticks
  for values from ('2026-01-01') to ('2036-01-01');

-- With the rights of its owner, so that row security does not apply behind it.
create view public.signal_entry as
  select trader_id, symbol, interval, signal, bar_time, source, machine_id from public.signals;

create view public.signal_all as select * from public.signals;

create view public.signal_form as select * from public.signal_entry;
create rule signal_form_insert as on insert to public.signal_form do instead
  insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
  values (new.trader_id, new.symbol, new.interval, new.signal, new.bar_time, new.source,
          new.machine_id);

create table public.inbox (like public.signal_entry);
create function public.tg_inbox()
returns trigger
language plpgsql
as $$
begin
  insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
  values (new.trader_id, new.symbol, new.interval, new.signal, new.bar_time, new.source,
          new.machine_id);
  return null;
end
$$;
create trigger inbox_forward before insert on public.inbox
  for each row execute function public.tg_inbox();

create function public.write_signal(p_row public.signal_entry)
returns void
language plpgsql
as $$
begin
  insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
  values (p_row.*);
end
$$;
create function public.write_signal_definer(p_row public.signal_entry)
returns void
language sql
security definer
begin atomic
  insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
  values (p_row.trader_id, p_row.symbol, p_row.interval, p_row.signal, p_row.bar_time,
          p_row.source, p_row.machine_id);
end;
grant all on public.ticks, public.ticks_old, public.ticks_new, public.signal_entry,
  public.signal_form, public.signal_all, public.inbox to authenticated, service_role;
"""

COLUMNS = "(trader_id, symbol, interval, signal, bar_time, source, machine_id)"
ROW = (
    "%(trader)s::uuid, 'ETHUSDT', '1m', 'buy', %(bar)s::timestamptz, %(source)s::text,"
    " %(machine)s::uuid"
)
HUNDRED = "values " + ", ".join(
    f"({ROW})".replace("::timestamptz", f"::timestamptz + interval '{n} ms'") for n in range(100)
)
INSERT = f"insert into public.signals {COLUMNS}"


@dataclass(frozen=True)
class Claim:
    """What a row says: whose trader, from where, and by which machine."""

    user: User
    source: str
    machine: str | None

    def params(self) -> dict[str, Any]:
        """Its parameters, with a bar of its own."""
        return {
            "trader": self.user.trader,
            "source": self.source,
            "machine": self.machine,
            "bar": next_bar(),
        }


Write = Callable[[Conn, Claim], None]


def execute(query: str, **kw: Any) -> Write:
    """A path that is one statement."""

    def write(conn: Conn, claim: Claim) -> None:
        conn.execute(query.encode(), claim.params(), **kw)

    return write


def copy(table: str, rows_count: int = 1) -> Write:
    """A path that is a COPY of so many rows."""

    def write(conn: Conn, claim: Claim) -> None:
        copy_rows(conn, table, [claim] * rows_count)

    return write


def copy_rows(conn: Conn, table: str, claims: list[Claim]) -> None:
    """COPY one row for each claim."""
    with conn.cursor().copy(f"copy {table} {COLUMNS} from stdin".encode()) as out:
        for claim in claims:
            p = claim.params()
            row = (p["trader"], "ETHUSDT", "1m", "buy", p["bar"], p["source"], p["machine"])
            out.write_row(row)


@dataclass(frozen=True)
class Way:
    """A path into a table: how, where to, how many rows, and whether it is a replica's session."""

    write: Write
    table: str = "public.signals"
    rows: int = 1
    replica: bool = False


PATHS = {
    "insert": Way(execute(f"{INSERT} values ({ROW})")),
    "insert 100 rows": Way(execute(f"{INSERT} {HUNDRED}"), rows=100),
    "insert returning": Way(execute(f"{INSERT} values ({ROW}) returning id, arbiter_xid")),
    "insert select": Way(execute(f"{INSERT} select {ROW} from generate_series(1, 1)")),
    "insert overriding": Way(execute(f"{INSERT} overriding system value values ({ROW})")),
    "copy": Way(copy("public.signals")),
    "copy 100 rows": Way(copy("public.signals", 100), rows=100),
    "cte": Way(execute(f"with w as ({INSERT} values ({ROW}) returning id) select from w")),
    "cte not read": Way(execute(f"with w as ({INSERT} values ({ROW})) select 1")),
    "do nothing": Way(execute(f"{INSERT} values ({ROW}) on conflict do nothing")),
    "do update": Way(
        execute(
            f"{INSERT} values ({ROW}) on conflict (trader_id, symbol, interval, bar_time)"
            " do update set source = excluded.source, machine_id = excluded.machine_id"
        )
    ),
    "merge": Way(
        execute(
            f"merge into public.signals s using (select {ROW}) as"
            f" n {COLUMNS} on s.trader_id = n.trader_id and s.bar_time = n.bar_time"
            " when matched then update set source = n.source, machine_id = n.machine_id"
            f" when not matched then insert {COLUMNS} values (n.trader_id, n.symbol, n.interval,"
            " n.signal, n.bar_time, n.source, n.machine_id)"
        )
    ),
    "view": Way(execute(f"insert into public.signal_entry {COLUMNS} values ({ROW})")),
    "rule": Way(execute(f"insert into public.signal_form {COLUMNS} values ({ROW})")),
    "trigger": Way(execute(f"insert into public.inbox {COLUMNS} values ({ROW})")),
    "prepared": Way(execute(f"{INSERT} values ({ROW})", prepare=True)),
    "function": Way(execute(f"select public.write_signal(row({ROW}))")),
    "definer function": Way(execute(f"select public.write_signal_definer(row({ROW}))")),
    "replica": Way(execute(f"{INSERT} values ({ROW})"), replica=True),
    "replica copy": Way(copy("public.signals"), replica=True),
    "partitioned": Way(
        execute(f"insert into public.ticks {COLUMNS} values ({ROW})"), table="public.ticks"
    ),
    "partitioned copy": Way(copy("public.ticks"), table="public.ticks"),
    "partition": Way(
        execute(f"insert into public.ticks_new {COLUMNS} values ({ROW})"), table="public.ticks"
    ),
    "partition copy": Way(copy("public.ticks_new"), table="public.ticks"),
    "partition replica": Way(
        execute(f"insert into public.ticks_new {COLUMNS} values ({ROW})"),
        table="public.ticks",
        replica=True,
    ),
}

#: COPY FROM is not there for a role that row security applies to: the server says so by itself.
CLOSED = [("browser", "copy"), ("browser", "copy 100 rows"), ("browser", "replica copy")]

MATRIX = [
    pytest.param(role, path, id=f"{role}-{path.replace(' ', '_')}")
    for role in ROLES
    for path in PATHS
    if (role, path) not in CLOSED
]


class World:
    """A database with Ada and Bob, and its connections, one for each role."""

    def __init__(self, db: Database, *, guarded: bool) -> None:
        self._db = db
        self._connections: dict[tuple[str, str, bool], Conn] = {}
        self.owner = db.connect()
        if not guarded:
            self.owner.execute(NAIVE.read_bytes())
            self.owner.execute("alter table public.signals add column arbiter_xid xid8")
        self.owner.execute(SCHEMA.encode())
        if not guarded:
            self.owner.execute("alter table public.ticks add column arbiter_xid xid8")
        self.ada = add_user(self.owner)
        self.bob = add_user(self.owner)
        self.adas_machine = add_machine(self.owner, self.ada, "starting")
        if guarded:
            self.owner.execute("update arbiter.settings set heartbeat_timeout = interval '1 hour'")
            self.owner.execute("select arbiter.protect('public.ticks')")
            self.bobs_machine = activate(self.owner, self.bob)
            add_signal(self.owner, self.ada.trader)
        else:
            self.bobs_machine = add_machine(self.owner, self.bob, "running")
            beat(self.owner, self.bobs_machine)

    def claim(self, source: str, *, admitted: bool) -> Claim:
        """Ada writes as local, Bob's machine as cloud; the other way round they are rejected."""
        ada = (source == "local") == admitted
        user, machine = (self.ada, self.adas_machine) if ada else (self.bob, self.bobs_machine)
        return Claim(user, source, machine if source == "cloud" else None)

    def connect(self, role: str, claim: Claim, *, replica: bool = False) -> Conn:
        """The role's connection, with the claims that its token would have."""
        login, become = LOGINS[role]
        key = (role, f"{claim.user.id} {claim.machine}", replica)
        if key in self._connections:
            return self._connections[key]
        token = {"sub": str(claim.user.id), "role": "authenticated"}
        if claim.machine is not None:
            token["machine_id"] = str(claim.machine)
        claims = token if role == "browser" else None
        if replica:
            # Only a superuser may say so, but the role it becomes then is in that session, too.
            conn = self._db.connect("postgres", claims=claims)
            conn.execute("set session_replication_role = replica")
            if role != "superuser":
                conn.execute(sql.SQL("set role {}").format(sql.Identifier(become or login)))
        else:
            conn = self._db.connect(login, become, claims=claims)
        self._connections[key] = conn
        return conn

    def rejection_of(self, claim: Claim) -> tuple[str, dict[str, Any]]:
        """SQLSTATE and DETAIL that the rejected claim must get."""
        held = lease(self.owner, claim.user)
        machine = held.machine_id and str(held.machine_id)
        sqlstate, code = (
            ("WX001", "cloud_active") if claim.source == "local" else ("WX004", "not_holder")
        )
        return sqlstate, {
            "code": code,
            "user_id": str(claim.user.id),
            "holder": held.holder,
            "machine_id": machine,
            "epoch": held.epoch,
            "retry_at": None,
        }

    def counts(self) -> list[int]:
        """How many rows there are of everything that a write may leave behind."""
        return [count_rows(self.owner, table) for table in TABLES]


@pytest.fixture(scope="module")
def world(templates: Templates) -> Iterator[World]:
    with templates.clone("installed") as database:
        yield World(database, guarded=True)


@pytest.fixture(scope="module")
def unguarded(templates: Templates) -> Iterator[World]:
    with templates.clone("trading") as database:
        yield World(database, guarded=False)


@pytest.fixture
def naive(trading_db: Database) -> World:
    return World(trading_db, guarded=False)


# Inserts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["local", "cloud"])
@pytest.mark.parametrize(("role", "path"), MATRIX)
def test_who_may_write_is_admitted(world: World, role: str, path: str, source: str) -> None:
    way = PATHS[path]
    claim = world.claim(source, admitted=True)
    conn = world.connect(role, claim, replica=way.replica)
    before = value(world.owner, f"select count(*) from {way.table}")

    with conn.transaction():
        way.write(conn, claim)
        xid = value(conn, "select pg_current_xact_id()::text")

    assert value(world.owner, f"select count(*) from {way.table}") == before + way.rows
    written = rows(
        world.owner,
        f"select trader_id, source, machine_id from {way.table} where arbiter_xid = %s::text::xid8",
        xid,
    )
    assert written == [(claim.user.trader, claim.source, claim.machine)] * way.rows


@pytest.mark.parametrize("source", ["local", "cloud"])
@pytest.mark.parametrize(("role", "path"), MATRIX)
def test_who_may_not_write_is_rejected(world: World, role: str, path: str, source: str) -> None:
    way = PATHS[path]
    claim = world.claim(source, admitted=False)
    conn = world.connect(role, claim, replica=way.replica)
    before = world.counts()

    error = rejection(way.write, conn, claim)

    assert (error.sqlstate, detail_of(error)) == world.rejection_of(claim)
    assert world.counts() == before


@pytest.mark.parametrize("source", ["local", "cloud"])
@pytest.mark.parametrize(("role", "path"), MATRIX)
def test_without_a_guard_the_same_is_written(
    unguarded: World, role: str, path: str, source: str
) -> None:
    way = PATHS[path]
    claim = unguarded.claim(source, admitted=False)
    conn = unguarded.connect(role, claim, replica=way.replica)
    before = value(unguarded.owner, f"select count(*) from {way.table}")

    way.write(conn, claim)

    assert value(unguarded.owner, f"select count(*) from {way.table}") == before + way.rows


@pytest.mark.parametrize("admitted", [True, False], ids=["admitted", "rejected"])
@pytest.mark.parametrize(("role", "path"), CLOSED)
def test_copy_is_closed_to_whom_row_security_applies(
    world: World, role: str, path: str, admitted: bool
) -> None:
    claim = world.claim("local", admitted=admitted)
    before = world.counts()

    error = rejection(PATHS[path].write, world.connect(role, claim), claim)

    assert error.sqlstate == "0A000"
    assert world.counts() == before


# Past a naive guard ------------------------------------------------------------------------------

#: Each naive guard, and the ways past it: (guard, table, role, path).
PAST = [
    ("policy", "public.signals", "superuser", "insert"),
    ("policy", "public.signals", "owner", "copy"),
    ("policy", "public.signals", "service_role", "merge"),
    ("policy", "public.signals", "browser", "view"),
    ("policy", "public.signals", "browser", "definer function"),
    ("policy", "public.ticks", "browser", "partition"),
    ("row", "public.signals", "owner", "replica"),
    ("row", "public.ticks", "service_role", "partition replica"),
    ("statement", "public.ticks", "owner", "partition"),
    ("statement", "public.ticks", "browser", "partition copy"),
    ("statement", "public.signals", "superuser", "replica copy"),
]


@pytest.mark.naive
@pytest.mark.parametrize(("guard", "table", "role", "path"), PAST)
def test_a_way_past_a_naive_guard(
    naive: World, guard: str, table: str, role: str, path: str
) -> None:
    naive.owner.execute("select naive.guard(%s, %s::regclass)", (guard, table))
    naive.owner.execute("alter table public.ticks enable row level security")
    naive.owner.execute("create policy ticks_all on public.ticks using (true)")
    way = PATHS[path]
    for source in ("local", "cloud"):
        rejected = naive.claim(source, admitted=False)
        conn = naive.connect(role, rejected, replica=way.replica)
        before = value(naive.owner, f"select count(*) from {table}")

        way.write(conn, rejected)

        assert value(naive.owner, f"select count(*) from {table}") == before + way.rows

        # The naive guard does close the plain way.
        plain = PATHS["insert" if table == "public.signals" else "partitioned"]
        error = rejection(plain.write, naive.connect("browser", rejected), rejected)
        assert error.sqlstate == ("42501" if guard == "policy" else "WX001")


def lapse_within_a_transaction(world: World, claim: Claim, make_old: Callable[[], None]) -> None:
    """A machine writes, its heartbeat lapses, and it writes again, in one transaction."""
    conn = world.connect("service_role", claim)
    with conn.transaction():
        PATHS["insert"].write(conn, claim)
        make_old()
        PATHS["insert"].write(conn, claim)


def test_the_time_is_that_of_the_write(world: World) -> None:
    user = add_user(world.owner)
    machine = activate(world.owner, user)
    claim = Claim(user, "cloud", machine)
    timeout = value(world.owner, "select heartbeat_timeout from arbiter.settings")
    before = world.counts()

    error = rejection(
        lapse_within_a_transaction,
        world,
        claim,
        lambda: age(world.owner, machine, heartbeat=timeout),
    )

    assert (error.sqlstate, detail_of(error)["code"]) == ("WX004", "not_holder")
    assert world.counts() == before


@pytest.mark.naive
def test_a_naive_guard_takes_the_start_of_the_transaction_for_the_time(naive: World) -> None:
    naive.owner.execute("select naive.guard('row', 'public.signals')")
    claim = naive.claim("cloud", admitted=True)

    def make_old() -> None:
        naive.owner.execute(
            "update public.cloud_machines"
            " set last_health_check = clock_timestamp() - interval '30 seconds' where id = %s",
            (claim.machine,),
        )

    lapse_within_a_transaction(naive, claim, make_old)

    assert count_rows(naive.owner, "public.signals") == 2
    error = rejection(lapse_within_a_transaction, naive, claim, make_old)
    assert error.sqlstate == "WX001"  # it does look, once the transaction is younger


# Many users in one statement ---------------------------------------------------------------------


def insert_many(conn: Conn, claims: list[Claim]) -> None:
    """One INSERT with a row for each claim."""
    values, params = [], []
    for claim in claims:
        p = claim.params()
        values.append("(%s, 'ETHUSDT', '1m', 'buy', %s, %s, %s)")
        params += [p["trader"], p["bar"], p["source"], p["machine"]]
    conn.execute(f"{INSERT} values {', '.join(values)}".encode(), params)


def copy_many(conn: Conn, claims: list[Claim]) -> None:
    """One COPY with a row for each claim."""
    copy_rows(conn, "public.signals", claims)


MANY = {"insert": insert_many, "copy": copy_many}


@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("source", ["local", "cloud"])
@pytest.mark.parametrize("many", MANY)
def test_one_rejected_user_among_many_rejects_the_statement(
    world: World, many: str, source: str, place: int
) -> None:
    rejected = world.claim(source, admitted=False)
    users = [add_user(world.owner) for _ in range(3)]
    claims = [Claim(users[n % 3], "local", None) for n in range(99)]
    conn = world.connect("service_role", rejected)
    before = world.counts()

    error = rejection(MANY[many], conn, [*claims[:place], rejected, *claims[place:]])

    assert (error.sqlstate, detail_of(error)) == world.rejection_of(rejected)
    assert world.counts() == before
    MANY[many](conn, claims)
    assert world.counts()[0] == before[0] + 99


@pytest.mark.parametrize("many", MANY)
def test_what_was_written_before_the_savepoint_stays(world: World, many: str) -> None:
    admitted = world.claim("local", admitted=True)
    rejected = world.claim("local", admitted=False)
    conn = world.connect("service_role", rejected)
    before = world.counts()

    with conn.transaction():
        MANY[many](conn, [admitted] * 2)
        with pytest.raises(psycopg.Error) as caught, conn.transaction():
            MANY[many](conn, [admitted, rejected, admitted])
        MANY[many](conn, [admitted] * 3)

    assert caught.value.sqlstate == "WX001"
    assert world.counts()[0] == before[0] + 5


def test_a_loop_that_catches_each_rejection_writes_only_what_is_admitted(world: World) -> None:
    conn = world.connect("service_role", world.claim("local", admitted=True))
    before = world.counts()

    conn.execute(
        """
        create function pg_temp.write_all(variadic p_traders uuid[])
        returns text[]
        language plpgsql
        as $$
        declare
          v_trader uuid;
          v_codes text[];
        begin
          foreach v_trader in array p_traders loop
            begin
              insert into public.signals (trader_id, symbol, interval, signal, bar_time)
              values (v_trader, 'LOOP', '1m', 'buy', clock_timestamp());
              v_codes := v_codes || '00000'::text;
            exception
              when others then v_codes := v_codes || sqlstate;
            end;
          end loop;
          return v_codes;
        end
        $$
        """
    )
    codes = value(
        conn,
        "select pg_temp.write_all(%s, %s, %s, %s)",
        *[world.ada.trader, world.bob.trader, world.ada.trader, world.bob.trader],
    )

    assert codes == ["00000", "WX001", "00000", "WX001"]
    assert world.counts()[0] == before[0] + 2


# Updates of provenance ---------------------------------------------------------------------------

#: What a client may try to change, as the right side of SET.
CHANGES = {
    "source and machine": "source = 'cloud', machine_id = %(own_machine)s",
    "source": "source = 'cloud'",
    "machine": "machine_id = %(machine)s",
    "user": "trader_id = %(trader)s",
    "xid": "arbiter_xid = '3'",
    "xid to null": "arbiter_xid = null",
}

#: How: every way that an UPDATE gets to a row.
UPDATES = {
    "update": "update public.signals set {change} where bar_time = %(bar)s",
    "update from": "update public.signals s set {change} from (select) x where bar_time = %(bar)s",
    "cte": "with w as (update public.signals set {change} where bar_time = %(bar)s"
    " returning 1) select from w",
    "view": "update public.signal_all set {change} where bar_time = %(bar)s",
    "do update": "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
    " select trader_id, symbol, interval, signal, bar_time from public.signals"
    " where bar_time = %(bar)s"
    " on conflict (trader_id, symbol, interval, bar_time) do update set {change}",
    "merge": "merge into public.signals s using (select %(bar)s::timestamptz as b) n"
    " on s.bar_time = n.b when matched then update set {change}",
    "partitioned": "update public.ticks set {change} where bar_time = %(bar)s",
    "partition": "update public.ticks_new set {change} where bar_time = %(bar)s",
}

FULL_ROW = "select * from {} where bar_time = %s"


def try_update(
    world: World, role: str, update: str, change: str, *, replica: bool = False
) -> tuple[psycopg.Error | None, Any, Any]:
    """Change the provenance of a row of Ada's; the error if any, and the row before and after."""
    claim = Claim(world.ada, "local", None)
    params = claim.params()
    table = "public.ticks" if update.startswith("partition") else "public.signals"
    world.owner.execute(f"insert into {table} {COLUMNS} values ({ROW})".encode(), params)
    look = FULL_ROW.format(table)
    before = one(world.owner, look, params["bar"])
    conn = world.connect(role, claim, replica=replica)
    params |= {
        "trader": world.bob.trader,
        "machine": world.bobs_machine,
        "own_machine": world.adas_machine,
    }
    query = UPDATES[update].format(change=CHANGES[change])
    error = None
    try:
        conn.execute(query.encode(), params)
    except psycopg.Error as caught:
        error = caught
    return error, before, one(world.owner, look, params["bar"])


#: Each change by each update, and each role, in an ordinary and in a replica's session, by each.
TRIES = [
    *((role, change, "update", False) for role in ROLES for change in CHANGES),
    *(("owner", change, update, False) for change in CHANGES for update in UPDATES),
    *((role, "source and machine", update, True) for role in ROLES for update in UPDATES),
]


@pytest.mark.parametrize(
    ("role", "change", "update", "replica"),
    [pytest.param(*case, id="-".join(map(str, case)).replace(" ", "_")) for case in TRIES],
)
def test_provenance_cannot_be_changed(
    world: World, role: str, change: str, update: str, replica: bool
) -> None:
    error, before, after = try_update(world, role, update, change, replica=replica)

    assert error is not None
    assert after == before
    if role == "browser" and change != "xid to null" and error.sqlstate == "42501":
        return  # row security says it first: of another's row, or one that claims the cloud
    assert error.sqlstate == "WX006"
    assert detail_of(error) == {
        "code": "provenance_immutable",
        "user_id": str(world.ada.id),
        "holder": None,
        "machine_id": None,
        "epoch": None,
        "retry_at": None,
    }


@pytest.mark.naive
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_naive_guard_of_inserts_lets_provenance_change(
    unguarded: World, update: str, change: str
) -> None:
    table = "ticks" if update.startswith("partition") else "signals"
    unguarded.owner.execute(f"select naive.guard('row', 'public.{table}')".encode())
    try:
        error, before, after = try_update(unguarded, "service_role", update, change)
    finally:
        unguarded.owner.execute(f"drop trigger naive_guard on public.{table}".encode())

    assert error is None
    assert after != before or change == "xid to null"


@pytest.mark.parametrize("role", ROLES)
def test_other_columns_can_be_updated_without_the_lease(world: World, role: str) -> None:
    claim = world.claim("cloud", admitted=True)
    params = claim.params()
    world.owner.execute(f"{INSERT} values ({ROW})".encode(), params)

    conn = world.connect(role, Claim(claim.user, "local", None))
    change = "update public.signals set price = 1 where bar_time = %s"
    cur = conn.execute(change.encode(), (params["bar"],))

    assert cur.rowcount == 1
