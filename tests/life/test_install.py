"""Install and uninstall: twice, twenty at once, on live data, as any role, after a crash, over an
older or damaged installation, on tables that fit in part or not at all.

Databases are compared by their dumps (see ``catalog``): the same text, the same database.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from catalog import WITHOUT_YOYO, assert_same, difference, dump, schema
from conftest import OWNER, Database, Templates
from psycopg import sql
from psycopg.rows import scalar_row
from sessions import TIMEOUT_S
from story import add_user, rejection
from yoyo import get_backend, read_migrations

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer

# By this way, because the package's attribute `install` is the function.
installer = importlib.import_module("arbiter_db.install")

MIGRATIONS = Path(__file__).parents[2] / "migrations"
TRADING = Path(arbiter_db.__file__).parent / "demo" / "trading.sql"

USER = "00000000-0000-0000-0000-00000000000a"
TRADER = "00000000-0000-0000-0000-00000000000b"
MACHINE = "00000000-0000-0000-0000-00000000000c"

PEOPLE = f"""
insert into auth.users (id, email) values ('{USER}', 'a@example.com');
insert into public.traders (id, user_id, name) values ('{TRADER}', '{USER}', 'a');
insert into public.cloud_machines (id, user_id, status) values ('{MACHINE}', '{USER}', 'stopped');
"""

# A signal of its own for each symbol.
SIGNAL = f"""
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values ('{TRADER}', %s, '1m', 'buy', '2025-01-01')
"""

SIGNALS = f"""
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select '{TRADER}', 'old ' || n, '1m', 'buy', '2025-01-01' from generate_series(1, %s) as n
"""

# What the app's own migration may have added already.
APPS_OWN_COLUMNS = """
alter table public.signals
  add column source text not null default 'local',
  add column machine_id uuid,
  add constraint signals_source_check check (source in ('local', 'cloud')),
  add constraint signals_machine_id_fkey
    foreign key (machine_id) references public.cloud_machines (id) on delete set null;
comment on column public.signals.source is 'Where the strategy ran.';
alter table public.cloud_machines add column last_health_check timestamptz;
create index cloud_machines_health_idx on public.cloud_machines (last_health_check)
  where last_health_check is not null;
"""


def column(conn: psycopg.Connection[Any], query: str, *params: object) -> list[Any]:
    with conn.cursor(row_factory=scalar_row) as cur:
        return cur.execute(query.encode(), params or None).fetchall()


def value(conn: psycopg.Connection[Any], query: str, *params: object) -> Any:
    [only] = column(conn, query, *params)
    return only


@pytest.fixture(scope="module")
def fresh(templates: Templates) -> str:
    """The schema that a first install on the trading app gives."""
    with templates.clone("installed") as database:
        text = schema(database.conninfo())
    for part in ("CREATE FUNCTION arbiter.protect(", "arbiter_guard_insert", "_yoyo_migration"):
        assert part in text
    return text


@pytest.fixture
def populated(trading_db: Database) -> Database:
    """The trading app with a user, its trader and machine, and ten signals; no arbiter."""
    conn = trading_db.connect()
    conn.execute(PEOPLE.encode())
    conn.execute(SIGNALS.encode(), (10,))
    return trading_db


# -- what an install leaves -----------------------------------------------------------------------


def test_puts_nothing_into_the_apps_schemas(populated: Database) -> None:
    conn = populated.connect()
    objects = """
        select format('%s.%s', n.nspname, x.name)
          from pg_namespace n
          join (select relnamespace, relname from pg_class
                union all select pronamespace, proname from pg_proc
                union all select typnamespace, typname from pg_type) as x (namespace, name)
            on x.namespace = n.oid
         where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'"""
    before = set(column(conn, objects))
    assert "public.signals" in before
    arbiter_db.install(populated.conninfo())
    new = set(column(conn, objects)) - before
    assert {name for name in new if not name.startswith("arbiter.")} == {
        "public.arbiter_signals_machine_idx"
    }
    assert {name for name in new if "yoyo" in name} >= {
        "arbiter._yoyo_log",
        "arbiter._yoyo_migration",
        "arbiter._yoyo_version",
        "arbiter.yoyo_lock",
    }
    schemas = "select nspname from pg_namespace where nspname !~ '^pg_(toast|temp)'"
    assert set(column(conn, schemas)) == {
        "arbiter", "auth", "information_schema", "pg_catalog", "public"
    }  # fmt: skip


def test_leaves_no_constraint_unvalidated(populated: Database) -> None:
    arbiter_db.install(populated.conninfo())
    conn = populated.connect()
    query = "select conname from pg_constraint where convalidated = %s and conname like 'arbiter%%'"
    assert column(conn, query, False) == []
    assert set(column(conn, query, True)) == {"arbiter_machine_id_fkey", "arbiter_source_check"}
    assert column(conn, "select * from arbiter._finish_statements()") == []


def test_tells_its_steps_in_order(trading_db: Database) -> None:
    steps: list[str] = []
    arbiter_db.install(trading_db.conninfo(), on_step=steps.append)
    checks = [
        "00_owner.sql",
        "01_basics.sql",
        "02_record.sql",
        "03_trust.sql",
        "04_ways.sql",
        "05_checks.sql",
        "06_adoption.sql",
        "07_plan.sql",
    ]
    assert steps[:10] == [*checks, "0001.schema", "0002.columns"]
    files = [step for step in steps[10:] if step.endswith(".sql")]
    assert files == sorted(files)
    assert files[:8] == checks, "again, in the transaction of the others"
    assert steps[-3:] == [
        "select arbiter._add_machine_index('public.signals')",
        "alter table public.signals validate constraint arbiter_machine_id_fkey",
        "alter table public.signals validate constraint arbiter_source_check",
    ]


# -- again ----------------------------------------------------------------------------------------

# A second install must not touch these rows: one that it writes again gets another xmin.
APPS_CATALOG = """
with apps as (
  select c.oid, c.oid::regclass::text as name, c.relfilenode, c.xmin
    from pg_class c
   where c.relnamespace in ('public'::regnamespace, 'auth'::regnamespace)
)
select format('relation %s %s %s %s', a.oid, a.name, a.relfilenode, a.xmin) from apps a
union all
select format('column %s.%s %s', a.name, c.attname, c.xmin)
  from apps a join pg_attribute c on c.attrelid = a.oid and c.attnum > 0
union all
select format('trigger %s %s %s', t.oid, t.tgname, t.xmin)
  from apps a join pg_trigger t on t.tgrelid = a.oid
union all
select format('constraint %s %s %s', k.oid, k.conname, k.xmin)
  from apps a join pg_constraint k on k.conrelid = a.oid
union all
select format('arbiter''s table or view %s %s %s', c.oid, c.relname, c.relfilenode)
  from pg_class c where c.relnamespace = 'arbiter'::regnamespace
union all
select format('function %s', p.oid) from pg_proc p where p.pronamespace = 'arbiter'::regnamespace
order by 1
"""


def test_again_changes_nothing(populated: Database) -> None:
    arbiter_db.install(populated.conninfo())
    conn = populated.connect()
    conn.execute("update arbiter.settings set stop_grace = '7 seconds'")
    conn.execute(SIGNAL.encode(), ("new",))
    catalog, everything = column(conn, APPS_CATALOG), dump(populated.conninfo())
    assert "arbiter_guard_insert" in "\n".join(catalog)
    arbiter_db.install(populated.conninfo())
    assert_same(everything, dump(populated.conninfo()))
    assert_same("\n".join(catalog), "\n".join(column(conn, APPS_CATALOG)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        SIGNAL.replace("%s", "'in flight'"),
        "update public.cloud_machines set region = 'ams'",
        "update public.cloud_machines set status = 'starting'",
    ],
    ids=["a signal", "a machine", "a machine's state"],
)
def test_again_does_not_wait_for_writes_in_flight(populated: Database, write: str) -> None:
    arbiter_db.install(populated.conninfo())
    with populated.session(name="writer") as writer:
        writer.run("begin")
        assert writer.run(write).rowcount == 1
        arbiter_db.install(populated.conninfo())
        writer.run("commit")


@pytest.mark.slow
def test_again_keeps_what_a_dba_decided_since(populated: Database) -> None:
    """The first install adopts tables by name; none after it does."""
    arbiter_db.install(populated.conninfo())
    conn = populated.connect()
    conn.execute("select arbiter.unprotect('public.signals')")
    conn.execute("select arbiter.protect('public.positions', p_mode => 'observe')")
    arbiter_db.finish(conn)
    before = dump(populated.conninfo())
    arbiter_db.install(populated.conninfo())
    assert_same(before, dump(populated.conninfo()))


@pytest.mark.slow
def test_twenty_at_once_are_one_installation(trading_db: Database, fresh: str) -> None:
    start = threading.Barrier(20)

    def install(number: int) -> None:
        start.wait(TIMEOUT_S)
        arbiter_db.install(trading_db.conninfo())

    with ThreadPoolExecutor(max_workers=20) as pool:
        list(pool.map(install, range(20)))  # raises what any of them raised
    assert_same(fresh, schema(trading_db.conninfo()))
    conn = trading_db.connect()
    applied = "select migration_id from arbiter._yoyo_log where operation = 'apply' order by 1"
    assert column(conn, applied) == ["0001.schema", "0002.columns"]
    assert column(conn, "select protected_table::text from arbiter.protections") == ["signals"]


# -- live data ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_does_not_rewrite_existing_rows(trading_db: Database) -> None:
    conn = trading_db.connect()
    conn.execute(PEOPLE.encode())
    with trading_db.connect("postgres") as loader, loader.transaction():
        loader.execute("set local session_replication_role = replica")
        loader.execute(SIGNALS.encode(), (200_000,))
    files = """
        select format('%s %s', c.relname, pg_relation_filenode(c.oid))
          from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'i')
           and c.relname !~ '^arbiter_'
         order by 1"""
    # A row that is written again gets the number of the transaction that does it.
    rows = "select count(*), min(xmin::text::bigint), max(xmin::text::bigint) from public.signals"
    before = column(conn, files), conn.execute(rows).fetchall()
    assert before[1][0][0] == 200_000

    arbiter_db.install(trading_db.conninfo())

    assert (column(conn, files), conn.execute(rows).fetchall()) == before
    provenance = "select distinct source, machine_id::text, arbiter_xid::text from signals"
    assert conn.execute(provenance).fetchall() == [("local", None, None)]
    conn.execute(SIGNAL.encode(), ("new",))
    new = "select arbiter_xid::text from signals where symbol = 'new'"
    assert value(conn, new) is not None


def test_loses_no_write_of_clients_that_never_stop(populated: Database) -> None:
    """Several clients write all the time, in transactions of several statements."""
    stop = threading.Event()
    written: dict[str, list[str]] = {"one": [], "two": []}
    progress = threading.Condition()

    def write(name: str) -> None:
        conn = populated.connect()
        number = 0
        while not stop.is_set():
            number += 1
            symbols = [f"{name} {number}", f"{name} {number} again"]
            with conn.transaction():
                conn.execute("update public.cloud_machines set region = %s", (name,))
                for symbol in symbols:
                    conn.execute(SIGNAL.encode(), (symbol,))
            with progress:
                written[name] += symbols
                progress.notify_all()

    def wait_for_more() -> None:
        with progress:
            so_far = {name: len(symbols) for name, symbols in written.items()}
            assert progress.wait_for(
                lambda: all(len(written[name]) > n for name, n in so_far.items()), TIMEOUT_S
            ), "the clients stopped writing"

    with ThreadPoolExecutor(max_workers=2) as pool:
        clients = [pool.submit(write, name) for name in written]
        try:
            wait_for_more()
            arbiter_db.install(populated.conninfo())
            wait_for_more()
            wait_for_more()
        finally:
            stop.set()
        for client in clients:
            client.result(TIMEOUT_S)

    conn = populated.connect()
    stored = "select symbol from public.signals where symbol not like 'old%'"
    assert sorted(column(conn, stored)) == sorted(written["one"] + written["two"])
    assert column(conn, "select distinct source from public.signals") == ["local"]
    # Some before the install, some after it, as the evidence says.
    evidence = (
        "select distinct arbiter_xid is null from public.signals where symbol not like 'old%'"
    )
    assert sorted(column(conn, evidence)) == [False, True]


@pytest.mark.slow
def test_gives_up_on_a_table_that_is_busy_for_long(templates: Templates, fresh: str) -> None:
    """The limit is 5 seconds for each: they are waited for at the same time."""

    def install(busy: str) -> None:
        with templates.clone("trading") as db, db.session(name="long transaction") as long:
            before = dump(db.conninfo(), "--schema=public", "--schema=auth")
            long.run("begin")
            long.run(f"lock table public.{busy} in row exclusive mode")
            with pytest.raises(
                arbiter_db.InstallError, match=r"lock timeout|lock on relation"
            ) as caught:
                arbiter_db.install(db.conninfo())
            assert caught.value.sqlstate == "55P03"
            assert_same(before, dump(db.conninfo(), "--schema=public", "--schema=auth"))
            long.run("commit")
            arbiter_db.install(db.conninfo())
            assert_same(fresh, schema(db.conninfo()))

    def uninstall(busy: str) -> None:
        with templates.clone("installed") as db, db.session(name="long transaction") as long:
            before = dump(db.conninfo())
            long.run("begin")
            long.run(f"lock table public.{busy} in row exclusive mode")
            with pytest.raises(
                arbiter_db.InstallError, match=r"lock timeout|lock on relation"
            ) as caught:
                arbiter_db.uninstall(db.conninfo())
            assert caught.value.sqlstate == "55P03"
            assert_same(before, dump(db.conninfo()))
            long.run("commit")
            arbiter_db.uninstall(db.conninfo())
            assert value(db.connect(), "select to_regnamespace('arbiter') is null")

    with ThreadPoolExecutor(max_workers=3) as pool:
        waiting = [
            pool.submit(install, "signals"),
            pool.submit(install, "cloud_machines"),
            pool.submit(uninstall, "signals"),
        ]
        for future in waiting:
            future.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    "writes",
    [
        [SIGNAL.replace("%s", "'both'"), "update public.cloud_machines set region = 'ams'"],
        ["update public.cloud_machines set region = 'ams'", SIGNAL.replace("%s", "'both'")],
    ],
    ids=["signal first", "machine first"],
)
@pytest.mark.parametrize("step", ["01_basics.sql", "0002.columns"])
def test_does_not_deadlock_with_a_client_of_both_tables(
    populated: Database, step: str, writes: list[str]
) -> None:
    """Before an install, no client knows of a lock order; two of its steps lock both tables."""
    install_until(populated, step)
    with populated.session(name="client") as client, ThreadPoolExecutor(max_workers=1) as pool:
        client.run("begin")
        client.run(writes[0])
        install = pool.submit(arbiter_db.install, populated.conninfo())
        wait_until_an_install_waits(populated)
        client.run(writes[1])
        client.run("commit")
        install.result(TIMEOUT_S)
    signals = "select count(*) from public.signals where symbol = 'both'"
    assert value(populated.connect(), signals) == 1


def wait_until_an_install_waits(db: Database) -> None:
    """Until some connection of the package to that database waits for somebody else's."""
    conn, pause = db.connect("postgres"), threading.Event()
    waiting = """
        select count(*) > 0
          from pg_stat_activity
         where datname = current_database()
           and application_name = ''
           and (wait_event_type = 'Lock' or wait_event = 'PgSleep')"""
    for _ in range(int(TIMEOUT_S / 0.01)):
        if value(conn, waiting):
            return
        pause.wait(0.01)
    raise AssertionError("the install did not wait")


# -- as whom --------------------------------------------------------------------------------------


def test_a_superuser_does_not_adopt_the_tables_of_another_role(populated: Database) -> None:
    """Its owner could make the superuser run functions: in checks and triggers."""
    skipped = arbiter_db.plan(populated.conninfo("postgres"))
    assert {(line.step, line.table) for line in skipped} == {
        ("skip", f"public.{table}") for table in ("cloud_machines", "positions", "signals")
    }
    assert "belongs to app_owner, who has not the rights of postgres" in skipped[0].finding
    assert "or install arbiter as app_owner." in str(skipped[0].remedy)
    assert_adopts_nothing(populated, "postgres")
    with pytest.raises(arbiter_db.InstallError, match="cloud_machines belongs to app_owner") as e:
        arbiter_db.install(
            populated.conninfo("postgres"),
            adoption=arbiter_db.Adoption(registry="public.cloud_machines"),
        )
    assert e.value.sqlstate == "42501"


def assert_adopts_nothing(db: Database, user: str) -> None:
    """An install leaves the app's schemas as they are, and protects nothing."""
    before = dump(db.conninfo("postgres"), "--schema=public", "--schema=auth")
    arbiter_db.install(db.conninfo(user))
    assert_same(before, dump(db.conninfo("postgres"), "--schema=public", "--schema=auth"))
    owner = db.connect("postgres")
    assert column(owner, "select registry from arbiter.registry") == []
    assert column(owner, "select protected_table from arbiter.protections") == []


def test_as_superuser(populated: Database, db: Database) -> None:
    """Arbiter then belongs to the superuser, as the tables; the rest is the same."""
    populated.connect("postgres").execute("reassign owned by app_owner to postgres")
    arbiter_db.install(populated.conninfo("postgres"))
    arbiter_db.install(populated.conninfo("postgres"))
    assert value(populated.connect(), "select nspowner::regrole::text from pg_namespace "
                 "where nspname = 'arbiter'") == "postgres"  # fmt: skip
    without_roles = ("--no-owner", "--no-privileges")
    by_owner = schema(db.conninfo("postgres"), *without_roles)
    assert_same(by_owner, schema(populated.conninfo("postgres"), *without_roles))

    client = populated.connect(role="authenticated", claims={"sub": USER})
    client.execute(SIGNAL.encode(), ("by the browser",))
    assert value(client, "select environment from arbiter.status()") == "local"

    before = schema(populated.conninfo("postgres"))
    with pytest.raises(arbiter_db.InstallError) as caught:
        arbiter_db.install(populated.conninfo())
    assert caught.value.sqlstate == "42501"
    assert_same(before, schema(populated.conninfo("postgres")))


def test_rejects_who_may_not_create_a_schema(populated: Database) -> None:
    before = dump(populated.conninfo())
    with pytest.raises(arbiter_db.InstallError, match=r"permission denied for database") as caught:
        arbiter_db.install(populated.conninfo("authenticator"))
    assert caught.value.sqlstate == "42501"
    assert_same(before, dump(populated.conninfo()))


def test_skips_tables_that_the_role_does_not_own(populated: Database) -> None:
    grant = sql.SQL("grant create on database {} to authenticator")
    populated.connect().execute(grant.format(sql.Identifier(populated.name)))
    skipped = arbiter_db.plan(populated.conninfo("authenticator"))
    assert [(line.step, line.finding, line.remedy) for line in skipped[:1]] == [
        (
            "skip",
            "table public.cloud_machines belongs to app_owner, not to authenticator",
            "Connect as app_owner.",
        )
    ]
    assert_adopts_nothing(populated, "authenticator")


# -- what was there before ------------------------------------------------------------------------

OLDER = """
do $$
begin
  execute replace(pg_get_functiondef('{function}'::regproc), $new${new}$new$, $new${old}$new$);
end
$$
"""

DAMAGES = {
    "an older verdict": OLDER.format(
        function="arbiter._verdict", new="'not_holder'", old="'no_holder'"
    ),
    "an older guard": OLDER.format(
        function="arbiter._guard_1", new="return null", old="return new"
    ),
    "an older registry trigger function": OLDER.format(
        function="arbiter.tg_registry_stamp", new="clock_timestamp()", old="now()"
    ),
    "a definer with another search_path":
        "alter function arbiter.status(text) set search_path = public",
    "a definer that has become an invoker": "alter function arbiter._guard_1() security invoker",
    "a function that is missing": "drop function arbiter._rejection(text)",
    "an older comment": "comment on function arbiter.version() is 'older'",
    "a function that everybody may call":
        "grant execute on function arbiter._create_lease(text, text) to public",
    "a function that no role may call any more":
        "revoke execute on function arbiter.status(uuid) from authenticated",
    "a guard that is missing": "drop trigger arbiter_guard_insert on public.signals",
    "a guard that is disabled":
        "alter table public.signals disable trigger arbiter_guard_insert",
    "a guard that a replica does not fire":
        "alter table public.signals enable trigger arbiter_guard_insert",
    "a registry trigger that is missing":
        "drop trigger arbiter_activate_update on public.cloud_machines",
    "a history that can be changed": "drop trigger arbiter_append_only on arbiter.handovers",
    "a trigger of an older version": """
        create or replace trigger arbiter_provenance after update of source on public.signals
          for each row execute function arbiter._provenance_1();
        alter table public.signals enable always trigger arbiter_provenance;
        comment on trigger arbiter_provenance on public.signals is 'Older. [0123456789abcdef]'""",
    "a trigger that was replaced under its comment": """
        create or replace trigger arbiter_provenance after update of signal on public.signals
          for each row execute function arbiter._provenance_1();
        alter table public.signals enable always trigger arbiter_provenance""",
    "a trigger that is not in this version": """
        create trigger arbiter_older before insert on public.signals
          for each row execute function arbiter.tg_stamp_xid()""",
    "an older view": """
        drop view arbiter.machines;
        create view arbiter.machines as select r.id as machine_id from public.cloud_machines r;
        comment on view arbiter.machines is 'Older. [0123456789abcdef]'""",
    "a constraint that was never validated": """
        alter table public.signals
          drop constraint arbiter_source_check,
          add constraint arbiter_source_check check (source in ('local', 'cloud')) not valid""",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_over_an_older_one_equals_a_fresh_one(db: Database, fresh: str, damage: str) -> None:
    db.connect().execute(damage.encode())
    assert difference(fresh, schema(db.conninfo())), "the damage shows"
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


def test_over_a_release_of_the_first_migration_only(trading_db: Database, fresh: str) -> None:
    """Its functions are older ones, and it has not adopted the tables."""
    conn = trading_db.connect()
    conn.execute("create schema arbiter")
    with stock_yoyo(trading_db) as backend:
        [first] = [m for m in read_migrations(str(MIGRATIONS)) if m.id == "0001.schema"]
        with backend.lock():
            backend.apply_one(first)
    conn.execute(
        "create function arbiter.version() returns text language sql immutable return '0.0.9';"
        "create function arbiter._rejection(p_code text, out sqlstate text, out message text, "
        "out hint text) returns record language sql immutable return ('a', 'b', 'c');"
        "create function arbiter.tg_append_only() returns trigger language plpgsql as "
        "'begin return new; end'"
    )
    arbiter_db.install(trading_db.conninfo())
    assert_same(fresh, schema(trading_db.conninfo()))


def test_rejects_an_installation_of_a_newer_package(db: Database) -> None:
    db.connect().execute(
        "create or replace function arbiter.version() returns text language sql immutable "
        "security invoker return '99.1'"
    )
    before = dump(db.conninfo())
    for call in (arbiter_db.install, arbiter_db.uninstall):
        with pytest.raises(arbiter_db.OutdatedSchema, match=r"99\.1"):
            call(db.conninfo())
    assert_same(before, dump(db.conninfo()))


# -- cut short ------------------------------------------------------------------------------------

CRASH = """
import importlib, os, sys

installer = importlib.import_module("arbiter_db.install")
mark = installer._Backend.mark_one

def mark_or_die(backend, migration, log=True):
    if migration.id == sys.argv[2]:
        os._exit(9)
    mark(backend, migration, log=log)

installer._Backend.mark_one = mark_or_die
installer.install(sys.argv[1])
"""


def crash_before_mark(db: Database, migration: str) -> None:
    """An install whose process ends after that migration was applied, before it is marked: the tool
    marks it in a transaction of its own, and its lock outlives it."""
    crashed = subprocess.run([sys.executable, "-c", CRASH, db.conninfo(), migration], check=False)
    assert crashed.returncode == 9
    conn = db.connect()
    assert column(conn, "select locked from arbiter.yoyo_lock") == [1]
    marked = column(conn, "select migration_id from arbiter._yoyo_migration order by 1")
    assert marked == [m for m in ("0001.schema",) if m < migration]
    effect = {
        "0001.schema": "select to_regclass('arbiter.leases') is not null",
        "0002.columns": "select bool_and(source = 'local') from public.signals",
    }
    assert value(conn, effect[migration]) is True


@pytest.mark.slow
@pytest.mark.parametrize("migration", ["0001.schema", "0002.columns"])
def test_mends_a_crash_between_a_migration_and_its_mark(
    populated: Database, fresh: str, migration: str
) -> None:
    crash_before_mark(populated, migration)
    arbiter_db.install(populated.conninfo())
    assert_same(fresh, schema(populated.conninfo()))
    assert column(populated.connect(), "select locked from arbiter.yoyo_lock") == []


@pytest.mark.slow
@pytest.mark.parametrize("drop_columns", [True, False], ids=["columns too", "columns stay"])
@pytest.mark.parametrize("migration", ["0001.schema", "0002.columns"])
def test_uninstalls_what_a_crash_has_left(
    populated: Database, migration: str, drop_columns: bool
) -> None:
    before = dump(populated.conninfo())
    crash_before_mark(populated, migration)
    report = arbiter_db.uninstall(populated.conninfo(), drop_columns=drop_columns)
    if drop_columns or migration == "0001.schema":
        assert_same(before, dump(populated.conninfo()))
    else:
        assert "left column source of public.signals" in report
    conn = populated.connect()
    assert value(conn, "select to_regnamespace('arbiter') is null")
    assert column(conn, "select conname from pg_constraint where conname like 'arbiter%'") == []


def install_until(db: Database, step: str) -> None:
    """An install that ends, in an orderly way, after that step."""

    class Interrupted(Exception):
        pass

    def interrupt(done: str) -> None:
        if done == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        arbiter_db.install(db.conninfo(), on_step=interrupt)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["01_basics.sql", "0001.schema", "0002.columns", "99_adopt.sql"])
def test_mends_an_install_that_ended_after(populated: Database, fresh: str, step: str) -> None:
    install_until(populated, step)
    assert difference(fresh, schema(populated.conninfo())), "something is missing"
    # Clients go on as before, or arbitrated already.
    populated.connect().execute(SIGNAL.encode(), ("meanwhile",))
    arbiter_db.install(populated.conninfo())
    assert_same(fresh, schema(populated.conninfo()))


def test_breaks_a_lock_that_a_crash_left(db: Database) -> None:
    conn = db.connect()
    lock = "insert into arbiter.yoyo_lock (locked, ctime, pid) values (1, now(), 1)"
    conn.execute(lock.encode())
    arbiter_db.install(db.conninfo())
    assert column(conn, "select locked from arbiter.yoyo_lock") == []
    conn.execute(lock.encode())
    arbiter_db.uninstall(db.conninfo())
    assert value(conn, "select to_regnamespace('arbiter') is null")


# -- which tables there are -----------------------------------------------------------------------


def test_adopts_tables_that_come_later(bare_db: Database, fresh: str) -> None:
    arbiter_db.install(bare_db.conninfo())
    conn = bare_db.connect()
    assert column(conn, "select count(*) from arbiter.protections") == [0]
    conn.execute(TRADING.read_bytes())
    arbiter_db.install(bare_db.conninfo())
    assert_same(fresh, schema(bare_db.conninfo()))


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["signals", "cloud_machines"])
def test_adopts_the_one_table_and_the_other_when_it_comes(
    trading_db: Database, fresh: str, missing: str
) -> None:
    conn = trading_db.connect()
    definition = schema(trading_db.conninfo(), f"--table=public.{missing}")
    conn.execute(f"drop table public.{missing}".encode())
    arbiter_db.install(trading_db.conninfo())
    attached = """
        select distinct c.relname::text
          from pg_trigger t
          join pg_class c on c.oid = t.tgrelid and c.relnamespace = 'public'::regnamespace
         where t.tgname like 'arbiter%'"""
    assert set(column(conn, attached)) == {"signals", "cloud_machines"} - {missing}

    # Without psql's own commands, and without settings that this server may not know.
    comes = [line for line in definition.splitlines() if not line.startswith(("\\", "SET "))]
    trading_db.connect().execute("\n".join(comes).encode())
    arbiter_db.install(trading_db.conninfo())
    assert set(column(conn, attached)) == {"signals", "cloud_machines"}
    assert_same(fresh, schema(trading_db.conninfo()))


@pytest.mark.slow
def test_adopts_the_apps_own_columns(trading_db: Database) -> None:
    conn = trading_db.connect()
    conn.execute(PEOPLE.encode())
    conn.execute(APPS_OWN_COLUMNS.encode())
    conn.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, "
        "machine_id) values (%s, 'by the cloud', '1m', 'buy', now(), 'cloud', %s)",
        (TRADER, MACHINE),
    )
    everything = dump(trading_db.conninfo())

    arbiter_db.install(trading_db.conninfo())
    ours = "select conname from pg_constraint where conname like 'arbiter%'"
    assert column(conn, ours) == [], "the app's own constraints say it already"
    kept = "select source, machine_id::text, arbiter_xid::text from public.signals"
    assert conn.execute(kept).fetchall() == [("cloud", MACHINE, None)]
    comment = "select col_description('public.signals'::regclass, attnum) from pg_attribute " \
              "where attrelid = 'public.signals'::regclass and attname = 'source'"  # fmt: skip
    assert value(conn, comment) == "Where the strategy ran."
    # The guard is attached and judges by these columns.
    conn.execute(SIGNAL.encode(), ("by the browser",))
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(
            "insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, "
            "machine_id) values (%s, 'late', '1m', 'buy', now(), 'cloud', %s)",
            (TRADER, MACHINE),
        )
    assert caught.value.sqlstate == "WX004"

    conn.execute("delete from public.signals where symbol = 'by the browser'")
    conn.execute("delete from public.webhook_queue where body ->> 'symbol' = 'by the browser'")
    assert arbiter_db.uninstall(trading_db.conninfo(), drop_columns=True) == [
        "dropped column arbiter_xid of public.signals"
    ]
    assert_same(without_sequences(everything), without_sequences(dump(trading_db.conninfo())))


def without_sequences(text: str) -> str:
    """A dump without how far the sequences have come."""
    return "\n".join(line for line in text.splitlines() if "pg_catalog.setval(" not in line)


ALTER_SIGNALS = "alter table public.signals "
ALTER_MACHINES = "alter table public.cloud_machines "

# The app's odd schema, and the words that the error must have.
MISFITS = {
    "heartbeat is text": (
        ALTER_MACHINES + "add column last_health_check text",
        ["cloud_machines", "last_health_check", "text"],
    ),
    "heartbeat has no time zone": (
        ALTER_MACHINES + "add column last_health_check timestamp",
        ["cloud_machines", "last_health_check", "timestamp without time zone"],
    ),
    "source is a number": (
        ALTER_SIGNALS + "add column source integer",
        ["signals", "source", "integer"],
    ),
    "source is an enum": (
        "create type public.origin as enum ('local', 'cloud');"
        + ALTER_SIGNALS + "add column source public.origin",
        ["signals", "source", "origin"],
    ),
    "source has other words": (
        ALTER_SIGNALS + "add column source text; update public.signals set source = 'binance'",
        ["signals", "source", "binance"],
    ),
    "source demands other words": (
        ALTER_SIGNALS + "add column source text constraint feed check (source in ('nyse', 'lse'))",
        ["signals", "source", "feed"],
    ),
    "source forbids one of the two": (
        ALTER_SIGNALS + "add column source text constraint one check (source = 'local')",
        ["signals", "source", "one"],
    ),
    "source becomes another word by default": (
        "truncate public.signals;"
        + ALTER_SIGNALS + "add column source text not null default 'binance'",
        ["signals", "source", "binance"],
    ),
    "source is a key of other words": (
        "create table public.feeds (name text primary key);"
        + ALTER_SIGNALS + "add column source text constraint feed_fkey references public.feeds",
        ["signals", "source", "feed_fkey"],
    ),
    "machine is a number": (
        ALTER_SIGNALS + "add column machine_id integer",
        ["signals", "machine_id", "integer"],
    ),
    "machine is a key of another table": (
        "create table public.devices (id uuid primary key);"
        + ALTER_SIGNALS
        + "add column machine_id uuid constraint device_fkey references public.devices",
        ["signals", "machine_id", "devices"],
    ),
    "transaction is a number": (
        ALTER_SIGNALS + "add column arbiter_xid bigint",
        ["signals", "arbiter_xid", "bigint"],
    ),
    "transaction is short": (
        ALTER_SIGNALS + "add column arbiter_xid xid",
        ["signals", "arbiter_xid", "xid"],
    ),
    "signals have no way to a user": (
        ALTER_SIGNALS + "drop constraint signals_trader_id_fkey",
        ["signals", "no obvious way to a user"],
    ),
    "signals have two ways to a user": (
        ALTER_SIGNALS + "add column other_id uuid references public.traders",
        ["signals", "more than one way to a user"],
    ),
    "signals are a view": (
        ALTER_SIGNALS + "rename to all_signals;"
        "create view public.signals as select * from public.all_signals",
        ["signals", "cannot be protected"],
    ),
    "machines are a view": (
        ALTER_MACHINES + "rename to machines;"
        "create view public.cloud_machines as select * from public.machines",
        ["cloud_machines", "not an ordinary table"],
    ),
    "machines have no id": (
        ALTER_MACHINES + "rename column id to key", ["cloud_machines", "column id"]
    ),
    "machines have no user": (
        ALTER_MACHINES + "rename column user_id to owner", ["cloud_machines", "column user_id"]
    ),
    "machines have no status": (
        ALTER_MACHINES + "rename column status to phase", ["cloud_machines", "column status"]
    ),
    "a machine's user is text": (
        "drop policy cloud_machines_read on public.cloud_machines;"
        + ALTER_MACHINES
        + "drop constraint cloud_machines_user_id_fkey, alter column user_id type text",
        ["traders", "user_id", "uuid", "cloud_machines", "text"],
    ),
    "a machine has many rows": (
        ALTER_MACHINES + "drop constraint cloud_machines_pkey",
        ["cloud_machines", "id", "not unique"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("misfit", "named"), MISFITS.values(), ids=MISFITS)
def test_rejects_what_does_not_fit_and_changes_nothing(
    populated: Database, misfit: str, named: list[str]
) -> None:
    """Where it was asked for. Else it is skipped, and the plan says the same."""
    populated.connect().execute(misfit.encode())
    before = dump(populated.conninfo())
    asked = (
        arbiter_db.Adoption(registry="public.cloud_machines")
        if named[0] == "cloud_machines"
        else arbiter_db.Adoption(protect=["public.signals"])
    )
    with pytest.raises(arbiter_db.InstallError) as caught:
        arbiter_db.install(populated.conninfo(), adoption=asked)
    for part in named:
        assert part in str(caught.value)
    assert caught.value.hint
    assert_same(before, dump(populated.conninfo()))

    table = asked.registry or asked.protect[0]
    skipped = [line for line in arbiter_db.plan(populated.conninfo()) if line.table == table]
    assert [line.step for line in skipped] == ["skip"]
    assert skipped[0].finding == str(caught.value)
    assert skipped[0].remedy
    assert_same(before, dump(populated.conninfo()))


@pytest.mark.slow
def test_skips_what_does_not_fit_until_it_does(bare_db: Database) -> None:
    """An installation that has adopted nothing yet adopts what comes later and fits."""
    arbiter_db.install(bare_db.conninfo())
    conn = bare_db.connect()
    conn.execute(TRADING.read_bytes())
    conn.execute(b"alter table public.signals add column source integer")
    before = dump(bare_db.conninfo(), "--table=public.signals")
    arbiter_db.install(bare_db.conninfo())
    assert_same(before, dump(bare_db.conninfo(), "--table=public.signals"))
    assert column(conn, "select registry::text from arbiter.registry") == ["cloud_machines"]
    assert column(conn, "select protected_table::text from arbiter.protections") == []
    conn.execute(b"alter table public.signals drop column source")
    arbiter_db.install(bare_db.conninfo())
    assert column(conn, "select protected_table::text from arbiter.protections") == ["signals"]


# -- uninstall ------------------------------------------------------------------------------------


def work(db: Database) -> None:
    """Some life: a user, a write, a machine that gets the lease, another table protected."""
    conn = db.connect()
    conn.execute(PEOPLE.encode())
    conn.execute(SIGNAL.encode(), ("first",))
    conn.execute("update public.cloud_machines set status = 'running', last_health_check = now()")
    conn.execute("select arbiter.heartbeat(%s::uuid)", (MACHINE,))
    assert value(conn, "select holder from arbiter.leases") == "cloud"
    conn.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")


@pytest.mark.slow
def test_up_down_up(db: Database, fresh: str) -> None:
    work(db)
    report = arbiter_db.uninstall(db.conninfo())
    assert "left column source of public.signals" in report
    assert "left column arbiter_xid of public.positions" in report
    conn = db.connect()
    assert value(conn, "select to_regnamespace('arbiter') is null")
    assert column(conn, "select tgname from pg_trigger where tgname like 'arbiter%'") == []
    assert column(conn, "select conname from pg_constraint where conname like 'arbiter%'") == []
    rows = conn.execute("select symbol, source from public.signals").fetchall()
    assert rows == [("first", "local")]
    conn.execute(SIGNAL.encode(), ("without arbiter",))

    # The columns that were left are the app's now. Without them all is made as the first time.
    assert value(conn, "select to_regclass('arbiter.attachments') is null")
    for table in ("positions", "signals"):
        for name in ("source", "machine_id", "arbiter_xid"):
            conn.execute(f"alter table public.{table} drop column {name}".encode())
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


@pytest.mark.slow
@pytest.mark.parametrize("apps_own", ["select", APPS_OWN_COLUMNS], ids=["nothing", "columns"])
def test_uninstall_with_its_columns_leaves_what_was_there(
    trading_db: Database, apps_own: str
) -> None:
    trading_db.connect().execute(apps_own.encode())
    before = schema(trading_db.conninfo())
    arbiter_db.install(trading_db.conninfo())
    work(trading_db)
    report = arbiter_db.uninstall(trading_db.conninfo(), drop_columns=True)
    assert "dropped column arbiter_xid of public.signals" in report
    assert_same(before, schema(trading_db.conninfo()))
    symbols = column(trading_db.connect(), "select symbol from public.signals")
    assert symbols == ["first"], "the rows stay"
    assert arbiter_db.uninstall(trading_db.conninfo(), drop_columns=True) == []


def test_uninstall_of_nothing_does_nothing(trading_db: Database) -> None:
    before = dump(trading_db.conninfo())
    assert arbiter_db.uninstall(trading_db.conninfo()) == []
    assert_same(before, dump(trading_db.conninfo()))


def test_uninstall_rejects_while_the_app_uses_arbiter(db: Database) -> None:
    db.connect().execute("create view public.history as select * from arbiter.handovers")
    before = dump(db.conninfo())
    with pytest.raises(arbiter_db.InstallError, match=r"history"):
        arbiter_db.uninstall(db.conninfo(), drop_columns=True)
    assert_same(before, dump(db.conninfo()))


# -- other tools ----------------------------------------------------------------------------------


def stock_yoyo(db: Database) -> Any:
    """yoyo as its own command line has it, with its tables in schema arbiter."""
    host, port = quote(db.server.host, safe=""), db.server.port
    return get_backend(
        f"postgresql+psycopg://{OWNER}@/{db.name}?host={host}&port={port}&schema=arbiter"
    )


@pytest.mark.slow
def test_migrations_up_down_up_by_yoyo_alone(trading_db: Database) -> None:
    """The columns are those that an installation has decided on, and left in a setting."""
    trading_db.connect().execute("create schema arbiter")
    columns = '[{"table": "public.signals", "column": "source", "kind": "source"}]'
    setting = sql.SQL("alter role app_owner in database {} set arbiter.adopt_columns = {}")
    trading_db.connect("postgres").execute(
        setting.format(sql.Identifier(trading_db.name), sql.Literal(columns))
    )
    migrations = read_migrations(str(MIGRATIONS))
    with stock_yoyo(trading_db) as backend, backend.lock():
        backend.apply_migrations(backend.to_apply(migrations))
        up = schema(trading_db.conninfo())
        assert "COLUMN public.signals.source IS 'arbiter: " in up
        backend.rollback_migrations(backend.to_rollback(migrations))
        down = schema(trading_db.conninfo(), *WITHOUT_YOYO)
        assert "CREATE TABLE arbiter." not in down
        assert "COLUMN public.signals.source IS 'arbiter: " in down, "the app's record stays"
        backend.apply_migrations(backend.to_apply(migrations))
    assert_same(up, schema(trading_db.conninfo()))


@pytest.mark.slow
def test_the_script_gives_what_install_gives(populated: Database, fresh: str) -> None:
    for _ in range(2):  # it can run again
        done = run_script(populated, arbiter_db.sql_text())
        assert done.returncode == 0, done.stderr
        assert "ERROR" not in done.stderr
    by_script = schema(populated.conninfo(), *WITHOUT_YOYO)
    assert "yoyo" not in by_script
    arbiter_db.install(populated.conninfo())
    by_both = schema(populated.conninfo())
    assert_same(fresh, by_both)
    assert_same(by_script, schema(populated.conninfo(), *WITHOUT_YOYO))


def run_script(db: Database, text: str) -> subprocess.CompletedProcess[str]:
    assert db.server.psql is not None
    return subprocess.run(
        [db.server.psql, "-X", "-q", "-d", db.conninfo()],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_says_what_it_skips_and_stops_at_what_was_asked_for(populated: Database) -> None:
    populated.connect().execute("alter table public.signals add column source integer")
    before = dump(populated.conninfo())
    asked = arbiter_db.sql_text(arbiter_db.Adoption(protect=["public.signals"]))
    done = run_script(populated, asked)
    assert done.returncode == 3, "psql's code for a script that failed"
    assert "column source of table public.signals is integer" in done.stderr
    assert_same(before, dump(populated.conninfo()))

    done = run_script(populated, arbiter_db.sql_text())
    assert done.returncode == 0, done.stderr
    said = [line.partition("NOTICE:  ")[2] for line in done.stderr.splitlines()]
    assert (
        "arbiter: skip: public.signals column source of table public.signals is integer, it must be"
        " text or character varying. Rename that column, or name another one in the call." in said
    )
    assert said[-1].startswith("arbiter: no table is protected, so no write is rejected;")


# -- servers that are too old ---------------------------------------------------------------------
# No test downloads a PostgreSQL 14, so the limit is raised over the server that is there: same
# code, same message, same way out.


def test_rejects_an_older_server(
    trading_db: Database, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "_OLDEST_SERVER", server.major + 1)
    before = dump(trading_db.conninfo())
    for call in (arbiter_db.install, arbiter_db.uninstall):
        with pytest.raises(arbiter_db.InstallError) as caught:
            call(trading_db.conninfo())
        assert f"needs PostgreSQL {server.major + 1} or newer" in str(caught.value)
        assert server.version in str(caught.value)
    assert_same(before, dump(trading_db.conninfo()))


def test_the_script_rejects_an_older_server(trading_db: Database, server: EmbeddedServer) -> None:
    text = "".join(path.read_text(encoding="ascii") for path in installer._checks())
    limit = f"{installer._OLDEST_SERVER}0000"
    assert text.count(limit) == 1, "one limit, in Python and in SQL"
    before = dump(trading_db.conninfo())
    conn = trading_db.connect()
    with pytest.raises(psycopg.errors.FeatureNotSupported) as caught, conn.transaction():
        conn.execute(text.replace(limit, f"{server.major + 1}0000").encode())
    assert server.version in str(caught.value)
    assert_same(before, dump(trading_db.conninfo()))


def test_goes_on_where_the_column_of_a_user_was_renamed(db: Database) -> None:
    """Writes to that table fail until protect() is called again, and doctor() says so."""
    conn = db.connect()
    conn.execute("select arbiter.protect('public.positions', 'user_id')")
    conn.execute("alter table public.positions rename user_id to owner_id")
    arbiter_db.install(db.conninfo())
    add_user(conn)
    write = "insert into public.positions (owner_id, symbol) select id, '' from auth.users"
    assert rejection(conn.execute, write).sqlstate == "WX005"
    problem = "select problem from arbiter.doctor() where object = 'protection of public.positions'"
    assert column(conn, problem) == ["arbiter: table public.positions has no column user_id"]
