"""Bad input: each a clear error that says what, where and what to do next; and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from story import (
    User,
    activate,
    add_signal,
    add_trader,
    add_user,
    age,
    backend,
    beat,
    browser,
    detail_of,
    handovers,
    lease,
    rejection,
    rows,
    status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

NOBODY = str(UUID(int=0))

# What must not change -----------------------------------------------------------------------------

#: Catalogs of what a database consists of, each with the expression that names its rows.
CATALOGS = {
    **dict.fromkeys(
        ["class", "constraint", "trigger", "proc", "policy", "type", "namespace", "attrdef"], "oid"
    ),
    "attribute": "attrelid::text || '.' || attnum",
    "description": "objoid::text || '.' || objsubid",
}
CATALOG = " union all ".join(
    f"select 'pg_{name}' as catalog, ({key})::text as object, xmin::text as version from pg_{name}"
    f" where {key.split(':')[0]} >= 16384"
    for name, key in CATALOGS.items()
)


def everything(conn: Conn) -> dict[tuple[str, ...], str]:
    """The version of each object of the database, and of each row of the app and of arbiter."""
    tables = rows(
        conn,
        "select c.oid::regclass::text from pg_class c"
        "  join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname in ('public', 'auth', 'arbiter') and c.relkind = 'r'"
        "   and c.relname !~ '^_?yoyo' order by 1",
    )
    data = [f"select '{name}', t::text, xmin::text from {name} t" for (name,) in tables]
    found = conn.execute(" union all ".join([CATALOG, *data]).encode()).fetchall()
    return {tuple(row[:2]): row[2] for row in found}


def assert_rejected(
    conn: Conn,
    owner: Conn,
    statement: str,
    sqlstate: str,
    message: str,
    hint: str = ".",
    params: Any = None,
) -> psycopg.Error:
    """The statement fails with that SQLSTATE, message and hint; nothing changed."""
    before = everything(owner)
    error = rejection(conn.execute, statement, params)
    assert error.sqlstate == sqlstate, error
    text = error.diag.message_primary or ""
    assert re.search(message, text), text
    assert re.search(hint, error.diag.message_hint or ""), error.diag.message_hint
    assert everything(owner) == before
    return error


# Rows ---------------------------------------------------------------------------------------------


class Rows:
    """What a row can name: users, traders and machines that fit together, and some that do not."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.user = add_user(self.owner)
        self.browser = browser(db, self.user)
        self.backend = backend(db)
        self.machine = activate(self.backend, self.user)
        self.other_machine = activate(self.backend, add_user(self.owner))
        self.builtin = add_trader(self.owner, None)
        self.local = add_user(self.owner)
        add_signal(self.owner, self.local.trader)


@pytest.fixture(scope="module")
def shared(templates: Templates) -> Iterator[Rows]:
    """For tests that change nothing, as each of them checks."""
    with templates.clone("installed") as database:
        yield Rows(database)


@pytest.fixture
def named(db: Database) -> Rows:
    return Rows(db)


INSERT = """
insert into public.signals
  (trader_id, symbol, interval, signal, bar_time, source, machine_id, arbiter_xid)
values (%(trader)s, 'BTCUSDT', '1m', 'buy', now(), %(source)s, %(machine)s, {xid})
"""


@dataclass(frozen=True)
class Row:
    """A row that must be rejected, by the names in Rows, and the hint that says why."""

    id: str
    hint: str
    trader: str = "user"
    source: str | None = "cloud"
    machine: str | None = "machine"
    xid: str = "default"
    sqlstate: str = "WX005"


ROWS = [
    Row("local with a machine", "A local write has no machine", source="local"),
    Row("cloud without one", "A cloud write names its machine", machine=None),
    Row("another user's machine", "no such machine of this user", machine="other_machine"),
    Row("a machine of a user without one", "no such machine of this user", trader="local"),
    Row("no owner, by the cloud", r"no user.*p_unowned => 'allow'", trader="builtin", machine=None),
    Row("no owner, by a machine", "no user", trader="builtin"),
    Row("no owner, local", "no user", "builtin", "local", None),
    Row("a forged xid", "leave it to its default", xid="'3'::xid8"),
    Row("an empty xid", "leave it to its default", xid="null"),
    Row("a future xid", "leave it to its default", xid="'9999999999999'::xid8"),
    Row("a forged xid, local", "default", "local", "local", None, xid="'3'::xid8"),
    Row("an unknown machine", "", machine="unknown", sqlstate="23503"),
    Row("an unknown trader", "", trader="unknown", sqlstate="23503"),
    Row("an unknown trader, local", "", "unknown", "local", None, sqlstate="23503"),
    Row("no trader", "", trader="null", sqlstate="23502"),
    Row("no source", "", source=None, sqlstate="23502"),
    Row("another source", "", source="Local", sqlstate="23514"),
    Row("an empty source", "", source="", machine=None, sqlstate="23514"),
]


def params_of(row: Row, named: Rows) -> dict[str, Any]:
    traders = {
        "user": named.user.trader,
        "local": named.local.trader,
        "builtin": named.builtin,
        "unknown": str(uuid4()),
        "null": None,
    }
    machines = {
        "machine": named.machine,
        "other_machine": named.other_machine,
        "unknown": str(uuid4()),
    }
    return {
        "trader": traders[row.trader],
        "source": row.source,
        "machine": row.machine and machines[row.machine],
    }


@pytest.mark.parametrize("who", ["backend", "owner"])
@pytest.mark.parametrize("row", ROWS, ids=[r.id for r in ROWS])
def test_row_that_does_not_fit_together(shared: Rows, row: Row, who: str) -> None:
    params = params_of(row, shared)
    error = assert_rejected(
        getattr(shared, who),
        shared.owner,
        INSERT.format(xid=row.xid),
        row.sqlstate,
        "source, machine and user of the row do not fit together"
        if row.sqlstate == "WX005"
        else "violates",
        row.hint,
        params,
    )
    if row.sqlstate == "WX005":
        user_id = {"user": str(shared.user.id), "local": str(shared.local.id), "builtin": None}
        assert detail_of(error) == {
            "code": "wrong_identity",
            "user_id": user_id[row.trader],
            "holder": None,
            "machine_id": params["machine"] and str(params["machine"]),
            "epoch": None,
            "retry_at": None,
            "source": row.source,
        }


#: Above, the table's own constraints reject these rows. Without them, or when they are checked
#: later, the guard must.
UNCONSTRAINED = """
alter table public.signals
  drop constraint arbiter_source_check,
  drop constraint arbiter_machine_id_fkey,
  alter constraint signals_trader_id_fkey deferrable initially deferred,
  alter column trader_id drop not null,
  alter column source drop not null
"""
HINTS = {
    "an unknown machine": "no such machine of this user",
    "an unknown trader": "no user",
    "an unknown trader, local": "no user",
    "no trader": "no user",
    "no source": "source is null",
    "another source": "source must be local or cloud",
    "an empty source": "source must be local or cloud",
}
CONSTRAINED = [r for r in ROWS if r.sqlstate != "WX005"]


@pytest.mark.parametrize("unowned", ["reject", "allow"])
@pytest.mark.parametrize("row", CONSTRAINED, ids=[r.id for r in CONSTRAINED])
def test_row_that_no_constraint_of_the_table_catches(named: Rows, row: Row, unowned: str) -> None:
    named.owner.execute("select arbiter.protect('public.signals', p_unowned => %s)", (unowned,))
    named.owner.execute(UNCONSTRAINED.encode())
    params = params_of(row, named)
    if unowned == "allow" and row.trader == "null":
        params["machine"] = named.machine  # a row without a user is allowed, but not with a machine
    hint = HINTS[row.id]
    if unowned == "allow":
        hint = {
            "an unknown trader": "does not exist",
            "an unknown trader, local": "does not exist",
        }.get(row.id, "without a user" if row.trader == "null" else hint)
    assert_rejected(
        named.backend,
        named.owner,
        INSERT.format(xid="default"),
        "WX005",
        "fit together",
        hint,
        params,
    )


def test_unowned_rows_where_they_are_allowed(named: Rows) -> None:
    """Each environment may write them, but no machine, and nothing else about them is checked."""
    named.owner.execute("select arbiter.protect('public.signals', p_unowned => 'allow')")
    add_signal(named.backend, named.builtin)
    add_signal(named.backend, named.builtin, "cloud")
    for source, machine, hint in [
        ("cloud", named.machine, "A row without a user cannot have a machine"),
        ("local", named.machine, "A local write has no machine"),
    ]:
        params = {"trader": named.builtin, "source": source, "machine": machine}
        assert_rejected(
            named.backend,
            named.owner,
            INSERT.format(xid="default"),
            "WX005",
            "fit together",
            hint,
            params,
        )


@pytest.mark.parametrize("position", ["first", "last"])
def test_one_bad_row_among_many(shared: Rows, position: str) -> None:
    good = ["(%(good)s, 'ETHUSDT', '1m', 'buy', now())"] * 1
    bad = ["(%(bad)s, 'BTCUSDT', '1m', 'buy', now())"]
    values = ", ".join(bad + good if position == "first" else good + bad)
    assert_rejected(
        shared.backend,
        shared.owner,
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        f" values {values}",
        "WX005",
        "fit together",
        "no user",
        {"good": shared.local.trader, "bad": shared.builtin},
    )


# Heartbeats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("arbiter.heartbeat(%(unknown)s::uuid)", "no machine %(unknown)s"),
        ("arbiter.heartbeats(array[%(unknown)s]::text[])", "no machine %(unknown)s"),
        ("arbiter.heartbeats(array[%(known)s, %(unknown)s]::text[])", "no machine %(unknown)s"),
        ("arbiter.heartbeats(array[%(unknown)s, %(known)s]::text[])", "no machine %(unknown)s"),
        ("arbiter.heartbeat(null::uuid)", "no machine null"),
        ("arbiter.heartbeats(null::text[])", "no machine null"),
        ("arbiter.heartbeats(array[null]::text[])", "no machine null"),
        ("arbiter.heartbeats(array[%(known)s, null]::text[])", "no machine null"),
    ],
)
def test_heartbeat_of_no_machine(shared: Rows, call: str, message: str) -> None:
    """The app lost a day to an update that matched zero rows."""
    params = {"known": shared.machine, "unknown": str(uuid4())}
    assert_rejected(
        shared.backend,
        shared.owner,
        f"select {call}",
        "P0002",
        message % params,
        "registry's id column",
        params,
    )


def test_heartbeat_by_those_who_may_not(shared: Rows) -> None:
    """A browser sees a machine but may not update it, others may not touch the registry at all."""
    call, params = "select arbiter.heartbeat(%s::uuid)", (shared.machine,)
    said = f"no machine {shared.machine}"
    assert_rejected(shared.browser, shared.owner, call, "P0002", said, ".", params)
    anon = shared.db.connect(role="anon")
    assert_rejected(anon, shared.owner, call, "42501", "permission denied", "", params)


def test_heartbeat_without_a_registry(bare_db: Database) -> None:
    arbiter_db.install(bare_db.conninfo())
    owner = bare_db.connect()
    call, params = "select arbiter.heartbeat(%s::uuid)", (NOBODY,)
    assert_rejected(owner, owner, call, "55000", "no registry", r"register_machines\(\)", params)


# Settings -----------------------------------------------------------------------------------------

PERIODS = [
    "heartbeat_timeout",
    "stop_grace",
    "error_takeover_delay",
    "drain_timeout",
    "heartbeat_interval",
    "poll_interval",
]


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize(
    ("nonsense", "sqlstate"),
    [
        ("'0'", "23514"),
        ("'-1 second'", "23514"),
        ("'99.999 milliseconds'", "23514"),
        ("'24 hours 1 microsecond'", "23514"),
        ("'10 years'", "23514"),
        ("'-10 years 1000000 days'", "23514"),
        ("null", "23502"),
        ("'soon'", "22007"),
    ],
)
def test_period_that_makes_no_sense(
    shared: Rows, period: str, nonsense: str, sqlstate: str
) -> None:
    conn = shared.owner
    error = assert_rejected(
        conn, conn, f"update arbiter.settings set {period} = {nonsense}", sqlstate, ".", ""
    )
    if sqlstate == "23514":
        # It names the rule: the period's own, or that a timeout covers two heartbeats.
        assert error.diag.constraint_name in (
            f"settings_{period}_check",
            "settings_timeout_covers_two_heartbeats_check",
        )
    elif sqlstate == "23502":
        assert error.diag.column_name == period


@pytest.mark.parametrize(
    ("statement", "sqlstate", "message"),
    [
        ("set error_takeover_confirm = null", "23502", "error_takeover_confirm"),
        ("set heartbeat_timeout = '19.999999 s'", "23514", "two_heartbeats"),
        ("set heartbeat_interval = '15.000001 s'", "23514", "two_heartbeats"),
        ("set singleton = false", "23514", "singleton"),
        ("set singleton = null", "23502", "singleton"),
    ],
)
def test_settings_that_make_no_sense(
    shared: Rows, statement: str, sqlstate: str, message: str
) -> None:
    conn = shared.owner
    assert_rejected(conn, conn, f"update arbiter.settings {statement}", sqlstate, message, "")


@pytest.mark.parametrize(
    "edge",
    [
        "heartbeat_timeout = '20 s'",
        "heartbeat_timeout = '200 ms', heartbeat_interval = '100 ms'",
        "stop_grace = '100 ms', error_takeover_delay = '100 ms', drain_timeout = '100 ms'",
        "heartbeat_timeout = '24 hours', stop_grace = '24 hours'",
    ],
)
def test_settings_at_the_edge_of_sense(db: Database, edge: str) -> None:
    assert db.connect().execute(f"update arbiter.settings set {edge}").rowcount == 1


@pytest.mark.parametrize(
    ("values", "sqlstate"),
    [
        ("default values", "23505"),
        ("(singleton) values (false)", "23514"),
        ("(stop_grace) values ('5 s')", "23505"),
    ],
)
def test_second_row_of_settings(shared: Rows, values: str, sqlstate: str) -> None:
    conn = shared.owner
    error = rejection(conn.execute, f"insert into arbiter.settings {values}")
    assert error.sqlstate == sqlstate
    assert value(conn, "select count(*) from arbiter.settings") == 1


@pytest.mark.parametrize("statement", ["delete from arbiter.settings", "truncate arbiter.settings"])
@pytest.mark.parametrize("role", ["app_owner", "postgres"])
def test_settings_cannot_be_deleted(db: Database, role: str, statement: str) -> None:
    """Each later decision would fail."""
    conn = db.connect(role)
    before = everything(conn)
    assert rejection(conn.execute, statement).sqlstate == "55000"
    if role == "postgres":
        conn.execute("set session_replication_role = replica")
        assert rejection(conn.execute, statement).sqlstate == "55000"
    assert everything(conn) == before


def test_without_settings_nothing_is_admitted_that_needs_them(db: Database) -> None:
    """Their owner can switch the trigger off. Then decisions fail, closed, until an install."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(backend(db), user)
    owner.execute(
        "update arbiter.settings set poll_interval = '7 s';"
        " alter table arbiter.settings disable trigger arbiter_keep_settings;"
        " delete from arbiter.settings;"
        " alter table arbiter.settings enable always trigger arbiter_keep_settings"
    )
    before = everything(owner)
    conn = browser(db, user)
    assert rejection(add_signal, conn, user.trader).sqlstate == "P0002"
    assert rejection(conn.execute, "select arbiter.confirm_takeover()").sqlstate == "P0002"
    assert everything(owner) == before
    # What is active needs none of them.
    assert status(owner, user.id)["code"] == "cloud_active"
    age(owner, machine, heartbeat=timedelta(seconds=40))
    assert rejection(conn.execute, "select arbiter.status()").sqlstate == "P0002"
    wrong = "select state, remedy from arbiter.doctor() where object = 'settings'"
    assert rows(owner, wrong) == [("missing", "Run: arbiter-db install")]

    arbiter_db.install(db.conninfo())
    assert rows(owner, wrong) == []
    beat(backend(db), machine)
    assert rejection(add_signal, conn, user.trader).sqlstate == "WX001"
    add_signal(backend(db), user.trader, "cloud", machine)


# protect() ----------------------------------------------------------------------------------------

#: Tables beside the trading schema's that cannot be protected as they are.
TABLES = """
create table public.loose (id int primary key, note text);
create table public.of_two (
  id int primary key,
  trader_id uuid references public.traders (id),
  machine_id uuid references public.cloud_machines (id),
  copied_from uuid references public.traders (id));
create table public.number_user (user_id numeric);
create table public.wide (user_id uuid, trader_id uuid references public.traders (id), plain uuid);
create table public.pair (a uuid, b uuid, primary key (a, b));
create table public.of_pair (a uuid, b uuid, foreign key (a, b) references public.pair);
create table public.wrong_source (user_id uuid, source integer);
create table public.wrong_source_array (user_id uuid, source text[]);
create table public.wrong_machine (user_id uuid, machine_id integer);
create table public.wrong_xid (user_id uuid, arbiter_xid bigint);
create table public.feed_by_check (
  user_id uuid, source text constraint feed_check check (source in ('binance', 'kraken')));
create table public.feed_by_data (user_id uuid, source text);
insert into public.feed_by_data values (null, 'local'), (null, 'binance');
create table public.feed_by_default (user_id uuid, source text default 'binance');
create table public.feeds (name text primary key);
insert into public.feeds values ('local');
create table public.feed_by_key (user_id uuid, source text references public.feeds);
create table public.machine_elsewhere (user_id uuid, machine_id uuid references public.traders);
create table public.parted (user_id uuid, n int) partition by list (n);
create table public.parted_1 partition of public.parted for values in (1);
create view public.a_view as select * from public.wide;
create materialized view public.a_matview as select * from public.wide;
create sequence public.a_sequence;
create schema other_owner;
"""
#: Made by a superuser: what does not belong to the owner of arbiter.
FOREIGN = """
create table public.not_ours (user_id uuid);
grant all on public.not_ours to app_owner;
"""


@pytest.fixture(scope="module")
def odd(templates: Templates) -> Iterator[Conn]:
    """The owner's connection to a database with odd tables, for tests that change nothing."""
    with templates.clone("installed") as database:
        owner = database.connect()
        owner.execute(TABLES.encode())
        database.connect("postgres").execute(FOREIGN.encode())
        yield owner


PROTECT = [
    # no way, or two, to a user
    ("'public.loose'", "22023", "table public.loose has no obvious way to a user", "p_user_path"),
    ("'public.pair'", "22023", "table public.pair has no obvious way", "p_user_path"),
    (
        "'public.number_user'",
        "42804",
        "column user_id of table public.number_user is numeric.*uuid",
        "compares the text of ids",
    ),
    (
        "'public.of_two'",
        "22023",
        "table public.of_two has more than one way",
        "trader_id.user_id, copied_from.user_id",
    ),
    # a path that leads nowhere
    ("'public.wide', 'nobody'", "42703", "table public.wide has no column nobody", "."),
    (
        "'public.wide', 'trader_id.nobody'",
        "42703",
        "table public.traders has no column nobody",
        ".",
    ),
    (
        "'public.wide', 'trader_id.is_builtin'",
        "42804",
        "is_builtin of table public.traders is boolean.*uuid",
        ".",
    ),
    (
        "'public.wide', 'plain.user_id'",
        "22023",
        "plain of table public.wide is not a foreign key",
        ".",
    ),
    (
        "'public.wide', 'nobody.user_id'",
        "22023",
        "nobody of table public.wide is not a foreign key",
        ".",
    ),
    (
        "'public.wide', 'user_id.id'",
        "22023",
        "user_id of table public.wide is not a foreign key",
        ".",
    ),
    (
        "'public.wide', 'trader_id.user_id.created_at'",
        "42804",
        "created_at of table auth.users is timestamp with time zone",
        ".",
    ),
    ("'public.of_pair', 'a.b'", "22023", "a of table public.of_pair is not a foreign key", "."),
    ("'public.wide', ''", "22023", "p_user_path|path", "."),
    ("'public.wide', 'user_id.'", "22023", "p_user_path|path", "."),
    ("'public.wide', '.user_id'", "22023", "p_user_path|path", "."),
    ("'public.wide', 'user_id; drop table public.wide'", "22023", "p_user_path|path", "."),
    ("'public.wide', '\"user_id'", "22023", "p_user_path|path", "."),
    # columns of another type or meaning
    (
        "'public.wrong_source'",
        "42804",
        "source of table public.wrong_source is integer, .*text",
        ".",
    ),
    ("'public.wrong_source_array'", "42804", r"source .* is text\[\], .*text", "."),
    (
        "'public.wrong_machine'",
        "42804",
        "machine_id of table public.wrong_machine is integer, but column id of .* is uuid",
        ".",
    ),
    ("'public.wrong_xid'", "42804", "arbiter_xid of table public.wrong_xid is bigint, .*xid8", "."),
    (
        "'public.feed_by_check'",
        "23514",
        "source of table public.feed_by_check does not mean the environment: constraint feed_check",
        "Rename that column; nothing was changed",
    ),
    (
        "'public.feed_by_data'",
        "23514",
        "source of table public.feed_by_data does not mean the environment: it holds 'binance'",
        "Rename that column; nothing was changed",
    ),
    (
        "'public.feed_by_default'",
        "23514",
        "source of table public.feed_by_default.*binance",
        "Rename",
    ),
    ("'public.feed_by_key'", "23514", "source of table public.feed_by_key.*foreign key", "Rename"),
    (
        "'public.machine_elsewhere'",
        "42830",
        "machine_id of table public.machine_elsewhere leads to public.traders",
        "p_machine_column",
    ),
    (
        "'public.wide', p_machine_column => 'source'",
        "22023",
        "column source .* cannot name the machine",
        ".",
    ),
    (
        "'public.wide', p_machine_column => 'arbiter_xid'",
        "22023",
        "arbiter_xid .* cannot name",
        ".",
    ),
    ("'public.wide', p_machine_column => 'user_id'", "22023", "user_id .* cannot name", "."),
    ("'public.wide', p_machine_column => ''", "42601", "zero-length delimited identifier", ""),
    # not a table that can be
    ("'public.parted_1'", "42809", "parted_1 cannot be protected", "the table at the root"),
    ("'public.a_view'", "42809", "a_view cannot be protected", "ordinary or a partitioned table"),
    ("'public.a_matview'", "42809", "a_matview cannot be protected", "ordinary or a partitioned"),
    ("'public.a_sequence'", "42809", "a_sequence cannot be protected", "ordinary or a partitioned"),
    ("'public.loose_pkey'", "42809", "loose_pkey cannot be protected", "root"),
    ("'public.cloud_machines'", "42809", "cloud_machines cannot be protected", "judges by"),
    ("'arbiter.leases'", "42809", "arbiter.leases cannot be protected", "judges by"),
    ("'arbiter.handovers'", "42809", "arbiter.handovers cannot be protected", "judges by"),
    ("'pg_catalog.pg_class', 'oid'", "42501", "pg_class belongs to", "."),
    ("'public.not_ours'", "42501", "not_ours belongs to postgres, not to app_owner", "."),
    ("'public.missing'", "42P01", "missing", ""),
    ("0::regclass", "42P01", "no table with the number 0", "Name the table"),
    # options
    ("null", "22023", r"protect\(null\)", "What is left out"),
    ("'public.wide', p_verbs => '{delete}'", "22023", r"\{delete\}", "{insert}"),
    ("'public.wide', p_verbs => '{update}'", "22023", r"\{update\}", "{insert}"),
    ("'public.wide', p_verbs => '{INSERT}'", "22023", r"\{INSERT\}", "{insert}"),
    ("'public.wide', p_verbs => '{insert,update,delete}'", "22023", "delete", "{insert}"),
    ("'public.wide', p_verbs => '{}'", "22023", r"\{\}", "{insert}"),
    ("'public.wide', p_verbs => '{insert,null}'", "22023", "NULL", "{insert}"),
    ("'public.wide', p_mode => 'off'", "22023", "p_mode off", "enforce or observe"),
    ("'public.wide', p_unowned => 'ignore'", "22023", "p_unowned ignore", "reject or allow"),
]


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message", "hint"), PROTECT, ids=[p[0] for p in PROTECT]
)
def test_protect(odd: Conn, arguments: str, sqlstate: str, message: str, hint: str) -> None:
    assert_rejected(odd, odd, f"select arbiter.protect({arguments})", sqlstate, message, hint)


def test_protect_of_a_temporary_table(odd: Conn) -> None:
    odd.execute("create temporary table brief (user_id uuid)")
    assert_rejected(
        odd, odd, "select arbiter.protect('brief')", "42809", "brief cannot be protected"
    )


def test_protect_that_fails_leaves_an_earlier_protection(named: Rows) -> None:
    """Protected already, called again with nonsense: the guard stays as it was, and works."""
    call = "select arbiter.protect('public.signals', 'bar_time')"
    assert_rejected(named.owner, named.owner, call, "42804", "bar_time")
    assert rejection(add_signal, named.browser, named.user.trader).sqlstate == "WX001"
    add_signal(named.backend, named.user.trader, "cloud", named.machine)


@pytest.mark.parametrize(
    "table", ["'public.loose'", "'public.parted_1'", "null", "'arbiter.leases'"]
)
def test_unprotect_of_a_table_that_is_not_protected(odd: Conn, table: str) -> None:
    assert_rejected(
        odd,
        odd,
        f"select arbiter.unprotect({table})",
        "42704",
        f"table {table.strip(chr(39))} is not protected",
        "arbiter.protections",
    )


def test_unprotect_twice(db: Database) -> None:
    owner = db.connect()
    call = "select arbiter.unprotect('public.signals')"
    owner.execute(call)
    assert_rejected(owner, owner, call, "42704", "signals is not protected")


# register_machines() ------------------------------------------------------------------------------

REGISTRIES = """
create table public.good (id uuid primary key, user_id uuid, status text);
create table public.no_key (id uuid, user_id uuid, status text);
create table public.partly_unique (id uuid, user_id uuid, status text);
create unique index on public.partly_unique (id) where status <> 'deleted';
create table public.unique_pair (id uuid, user_id uuid, status text, unique (id, user_id));
create table public.text_id (id text primary key, user_id uuid, status text);
create table public.text_owner (id uuid primary key, user_id text, status text);
create table public.naive_clock (
  id uuid primary key, user_id uuid, status text, last_health_check timestamp);
create table public.bool_status (id uuid primary key, user_id uuid, status boolean);
create table public.parted (id uuid, user_id uuid, status text) partition by hash (id);
create view public.a_view as select * from public.good;
insert into public.good (id, user_id, status) values (gen_random_uuid(), null, 'running');
"""
REGISTER = [
    ("null", "22004", "a null for the table", "table of machines|."),
    ("'public.missing'", "42P01", "missing", ""),
    ("'public.a_view'", "42809", "a_view is not an ordinary table", "one row per machine"),
    ("'public.parted'", "42809", "parted is not an ordinary table", "one row per machine"),
    ("'public.not_ours'", "42501", "not_ours belongs to postgres", "."),
    ("'public.no_key'", "22023", "column id of table public.no_key is not unique", "primary key"),
    (
        "'public.partly_unique'",
        "22023",
        "column id of table public.partly_unique is not unique",
        ".",
    ),
    ("'public.unique_pair'", "22023", "column id of table public.unique_pair is not unique", "."),
    (
        "'public.text_id'",
        "42804",
        "machine_id of table public.signals is uuid, but column id of the registry .* is text",
        "Give both the same type",
    ),
    (
        "'public.text_owner'",
        "42804",
        "user_id of table public.traders is uuid, but column user_id of the registry .* is text",
        "Give both the same type",
    ),
    (
        "'public.naive_clock'",
        "42804",
        "last_health_check of table public.naive_clock is timestamp",
        ".",
    ),
    ("'public.good', 'machine'", "42703", "table public.good has no column machine", "."),
    ("'public.good', 'id', 'owner'", "42703", "table public.good has no column owner", "."),
    (
        "'public.good', 'id', 'user_id', 'word'",
        "42703",
        "table public.good has no column word",
        ".",
    ),
    (
        "'public.good', p_heartbeat_column => 'status'",
        "42804",
        "status of table public.good is text",
        ".",
    ),
    (
        "'public.good', p_id_column => null",
        "22004",
        "a null for the table or one of its columns",
        ".",
    ),
    (
        "'public.good', p_user_column => null",
        "22004",
        "a null for the table or one of its columns",
        ".",
    ),
    (
        "'public.good', p_status_column => null",
        "22004",
        "a null for the table or one of its columns",
        ".",
    ),
    (
        "'public.good', p_heartbeat_column => null",
        "22004",
        "a null for the table or one of its columns",
        ".",
    ),
    ("'public.good', p_states => '[]'", "22023", "JSON array.*object", "For example"),
    ("'public.good', p_states => '\"running\"'", "22023", "JSON string.*object", "For example"),
    ("'public.good', p_states => 'null'", "22023", "JSON null.*object", "For example"),
    ("'public.good', p_states => '{}'", "22023", "no status word to stopped", "confirm_takeover"),
    ("'public.good', p_states => '{\"up\": \"running\"}'", "22023", "to stopped", "."),
    (
        '\'public.good\', p_states => \'{"up": "alive", "down": "stopped"}\'',
        "22023",
        'no machine state: up: "alive"',
        "starting, running, stopping, stopped, error",
    ),
    (
        '\'public.good\', p_states => \'{"up": null, "down": "stopped"}\'',
        "22023",
        "no machine state: up: null",
        "starting, running",
    ),
    (
        '\'public.good\', p_states => \'{"up": ["running"], "down": "stopped"}\'',
        "22023",
        "no machine state: up: ",
        "starting, running",
    ),
    (
        '\'public.good\', p_states => \'{"up": "Running", "down": "stopped"}\'',
        "22023",
        'no machine state: up: "Running"',
        "starting, running",
    ),
    ("'public.good', p_states => 'up'", "22P02", "json", ""),
    ("'public.good', p_health_column => 'health'", "22023", "one of p_health_column", "example"),
    ("'public.good', p_healthy => '{ok}'", "22023", "one of p_health_column", "For example"),
    (
        "'public.good', p_health_column => 'health', p_healthy => '{}'",
        "22023",
        "p_healthy is empty",
        "List the words",
    ),
    (
        "'public.good', p_health_column => 'health', p_healthy => '{ok,null}'",
        "22023",
        "or has a null",
        "List the words",
    ),
    (
        "'public.good', p_health_column => 'health', p_healthy => '{ok}'",
        "42703",
        "table public.good has no column health",
        ".",
    ),
    (
        "'public.good', p_health_column => 'status', p_healthy => '{running}'",
        "22023",
        "column status of table public.good cannot say",
        "beside status and heartbeat",
    ),
    (
        "'public.good', p_heartbeat_column => 'seen', p_health_column => 'seen',"
        " p_healthy => '{ok}'",
        "22023",
        "column seen of table public.good cannot say",
        "beside status and heartbeat",
    ),
]


@pytest.fixture(scope="module")
def registries(templates: Templates) -> Iterator[Rows]:
    """A database with other registries, for tests that change nothing."""
    with templates.clone("installed") as database:
        found = Rows(database)
        found.owner.execute(REGISTRIES.encode())
        database.connect("postgres").execute(FOREIGN.encode())
        yield found


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message", "hint"), REGISTER, ids=[r[0] for r in REGISTER]
)
def test_register_machines(
    registries: Rows, arguments: str, sqlstate: str, message: str, hint: str
) -> None:
    owner = registries.owner
    beat(owner, registries.machine)
    assert_rejected(
        owner, owner, f"select arbiter.register_machines({arguments})", sqlstate, message, hint
    )
    # The registry that there is goes on.
    assert rejection(add_signal, registries.browser, registries.user.trader).sqlstate == "WX001"


# Installing on a database that does not fit -------------------------------------------------------

INSTALLS = [
    ("signals", "add source integer", "source.*signals.*integer"),
    ("signals", "add source text check (source in ('binance'))", "source.*signals"),
    ("signals", "add machine_id integer", "machine_id.*signals.*integer"),
    ("signals", "add arbiter_xid bigint", "arbiter_xid.*signals.*bigint"),
    ("signals", "drop column trader_id cascade", "signals has no obvious way"),
    ("cloud_machines", "add last_health_check timestamp", "last_health_check.*cloud_machines"),
    ("cloud_machines", "drop column status cascade", "cloud_machines has no column status"),
    ("cloud_machines", "drop constraint cloud_machines_pkey cascade", "id.*not unique"),
]


@pytest.mark.parametrize(("table", "change", "message"), INSTALLS, ids=[i[1] for i in INSTALLS])
def test_install_on_a_database_that_does_not_fit(
    trading_db: Database, table: str, change: str, message: str
) -> None:
    """What was asked for and does not fit is an error, before anything is changed. What was not
    asked for is left as it is, and the plan says why."""
    owner = trading_db.connect()
    owner.execute(f"alter table public.{table} {change}".encode())
    before = everything(owner)
    asked = (
        arbiter_db.Adoption(protect=["public.signals"])
        if table == "signals"
        else arbiter_db.Adoption(registry="public.cloud_machines")
    )
    for call in (arbiter_db.install, arbiter_db.plan):
        with pytest.raises(arbiter_db.InstallError) as caught:
            call(trading_db.conninfo(), adoption=asked)
        assert re.search(message, str(caught.value)), caught.value
        assert caught.value.hint
        assert everything(owner) == before

    columns = (
        "select array_agg(attname order by attnum) from pg_attribute where attrelid = %s::regclass"
    )
    before_columns = value(owner, columns, f"public.{table}")
    plan: list[arbiter_db.PlanLine] = []
    arbiter_db.install(trading_db.conninfo(), on_plan=plan.extend)
    [skipped] = [line for line in plan if line.table == f"public.{table}"]
    assert skipped.step == "skip"
    assert re.search(message, skipped.finding), skipped
    assert "nothing was changed" not in f"{skipped.remedy}"
    assert value(owner, columns, f"public.{table}") == before_columns
    # Without a registry it is not known who writes, so nothing is protected either.
    assert rows(owner, "select from arbiter.protections") == []
    adopted = rows(owner, "select registry::text from arbiter.registry")
    assert adopted == ([("cloud_machines",)] if table == "signals" else [])


# Rights -------------------------------------------------------------------------------------------

OWNERS_CALLS = [
    "arbiter.protect('public.positions')",
    "arbiter.unprotect('public.signals')",
    "arbiter.register_machines('public.cloud_machines')",
    "arbiter._verdict('local', null, null, null, null, now())",
    "arbiter._rejected('cloud_active', '{}')",
    "arbiter._admit(1, 'enforce', 'reject', null, 'local', null, null)",
    "arbiter._hand_over(null, false, 'local', null, 'confirmed')",
    "arbiter._create_lease('a', 'registered')",
    "arbiter._activate('a', 'b')",
    "arbiter._decide('a', 'local', null, false)",
    "arbiter._uncommon_status('a')",
    "arbiter._build_registry()",
    "arbiter._detach_all(true)",
]
OWNERS_WRITES = [
    "update arbiter.settings set stop_grace = '100 ms'",
    "insert into arbiter.leases (user_id, epoch, holder, held_since)"
    " values (gen_random_uuid(), 1, 'local', now())",
    "update arbiter.leases set holder = 'local', machine_id = null",
    "delete from arbiter.leases",
    "truncate arbiter.leases",
    "update arbiter.machine_notes set left_running_at = '2000-01-01'",
    "delete from arbiter.machine_notes",
    "update arbiter.registry set states = '{}'",
    "update arbiter.protections set mode = 'observe'",
    "delete from arbiter.protections",
    "delete from arbiter.handovers",
    "insert into arbiter.observations (observed_at, protected_table, code, detail, xid)"
    " values (now(), 'public.signals', 'x', '{}', '1')",
    "alter table public.signals disable trigger user",
    "drop trigger arbiter_guard_insert on public.signals",
    "select from arbiter.leases for update",
    "set session_replication_role = replica",
]


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
@pytest.mark.parametrize("statement", [f"select {call}" for call in OWNERS_CALLS] + OWNERS_WRITES)
def test_what_only_the_owner_may_do(shared: Rows, role: str, statement: str) -> None:
    conn = {"authenticated": shared.browser, "service_role": shared.backend}.get(role)
    conn = conn or shared.db.connect(role=role)
    assert_rejected(conn, shared.owner, statement, "42501", "permission denied|must be owner", "")


@pytest.mark.parametrize(
    "table", ["leases", "handovers", "machine_notes", "protections", "observations", "machines"]
)
def test_what_browsers_may_not_read(shared: Rows, table: str) -> None:
    """The view of the machines opens no more than the registry: a browser sees its own."""
    for conn in (shared.browser, shared.db.connect(role="anon")):
        if table == "machines" and conn is shared.browser:
            found = rows(conn, "select machine_id from arbiter.machines")
            assert found == [(shared.machine,)]
        elif table in ("leases", "handovers") and conn is shared.browser:
            found = rows(conn, f"select distinct user_id from arbiter.{table}")
            assert found == [(shared.user.id,)]
        else:
            assert rejection(conn.execute, f"select from arbiter.{table}").sqlstate == "42501"


def test_history_is_append_only(shared: Rows) -> None:
    """For the owner, too."""
    for statement in (
        "update arbiter.handovers set reason = 'first_write'",
        "delete from arbiter.handovers",
        "truncate arbiter.handovers",
    ):
        error = assert_rejected(
            shared.owner,
            shared.owner,
            statement,
            "WX008",
            "the history of handovers and corrections is append-only",
            r"arbiter\.audit\(\)",
        )
        operation = statement.split()[0].upper()
        by_row = operation != "TRUNCATE"
        detail = detail_of(error)
        assert (detail["user_id"] is not None, detail["epoch"] is not None) == (by_row, by_row)
        assert detail | {"user_id": None, "epoch": None} == {
            "code": "append_only",
            "operation": operation,
            "user_id": None,
            "holder": None,
            "machine_id": None,
            "epoch": None,
            "retry_at": None,
        }


def test_browser_cannot_write_for_another_user(shared: Rows) -> None:
    """The app's own policies: arbiter neither opens nor closes what they say."""
    params = {"trader": shared.local.trader, "source": "local", "machine": None}
    assert_rejected(
        shared.browser,
        shared.owner,
        INSERT.format(xid="default"),
        "42501",
        "row-level security",
        "",
        params,
    )


def test_unknown_user_has_no_lease_and_no_history(shared: Rows) -> None:
    """A question about an unknown user creates nothing."""
    stranger = User(str(uuid4()), str(uuid4()))
    before = everything(shared.owner)
    value(shared.backend, "select (arbiter.status(%s)).code", stranger.id)
    error = rejection(shared.backend.execute, "select arbiter.confirm_takeover(%s)", (stranger.id,))
    assert error.sqlstate == "55000"
    assert handovers(shared.owner, stranger) == []
    assert everything(shared.owner) == before


@pytest.mark.parametrize(
    ("claims", "sqlstate"),
    [
        ({"sub": ""}, "22023"),
        ({"sub": {"id": "ada"}}, "22023"),
        ({"sub": ["ada"]}, "22023"),
        ({"sub": True}, "22023"),
        ({"sub": None}, "22023"),
        ({}, "22023"),
    ],
)
def test_claims_that_are_no_claims(shared: Rows, claims: dict[str, Any], sqlstate: str) -> None:
    conn = shared.db.connect(role="authenticated", claims=claims)
    for call in ("arbiter.status()", "arbiter.confirm_takeover()"):
        assert rejection(conn.execute, f"select {call}").sqlstate == sqlstate


def test_machine_without_a_user(named: Rows) -> None:
    """A machine without a user gets no lease, and its writes are rejected."""
    owner = named.owner
    owner.execute("alter table public.cloud_machines alter column user_id drop not null")
    machine = value(
        owner,
        "insert into public.cloud_machines (status, last_health_check)"
        " values ('running', now()) returning id",
    )
    owner.execute("update public.cloud_machines set last_health_check = now()")
    assert rows(owner, "select * from arbiter.leases where machine_id = %s", machine) == []
    params = {"trader": named.user.trader, "source": "cloud", "machine": machine}
    assert_rejected(
        named.backend,
        owner,
        INSERT.format(xid="default"),
        "WX005",
        "fit together",
        "no such machine of this user",
        params,
    )
    assert lease(owner, named.user).machine_id == named.machine


def test_lease_that_would_make_no_sense(shared: Rows) -> None:
    """The tables themselves reject what the protocol never writes, to their owner, too."""
    of_cloud = [
        "holder = 'browser'",
        "holder = 'local'",
        "machine_id = null",
        "epoch = 0",
        "epoch = null",
        "draining_to = machine_id, draining_since = now()",
        "draining_to = gen_random_uuid()::text",
    ]
    of_local = ["holder = 'cloud'", "machine_id = gen_random_uuid()", "draining_since = now()"]
    for user, changes in ((shared.user, of_cloud), (shared.local, of_local)):
        for change in changes:
            assert_rejected(
                shared.owner,
                shared.owner,
                f"update arbiter.leases set {change} where user_id = '{user.id}'",
                "23502" if change == "epoch = null" else "23514",
                "leases",
                "",
            )
