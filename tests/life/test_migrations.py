"""Rules for the files in migrations/ and sql/, and for each object that they make.

The catalog's tests run on a database that has one of everything: a registry, a table protected for
inserts, one for updates too, a partitioned one with a partition that came later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from catalog import assert_same, difference, schema
from conftest import Database, Templates
from psycopg.rows import scalar_row
from sql_files import FILES, functions
from yoyo.migrations import read_sql_migration

import arbiter_db

REPOSITORY = Path(__file__).parents[2]
MIGRATIONS = REPOSITORY / "migrations"
SQL = REPOSITORY / "sql"
RELEASED = MIGRATIONS / "SHA256SUMS"

FORWARD = sorted(p for p in MIGRATIONS.glob("*.sql") if not p.name.endswith(".rollback.sql"))
BACKWARD = sorted(MIGRATIONS.glob("*.rollback.sql"), reverse=True)
REPEATABLE = sorted(SQL.glob("*.sql"))

OPEN_TO_CLIENTS = {
    "arbiter.status(text)",
    "arbiter.status(uuid)",
    "arbiter.confirm_takeover(text)",
    "arbiter.confirm_takeover(uuid)",
    "arbiter.heartbeat(text)",
    "arbiter.heartbeat(uuid)",
    "arbiter.heartbeats(text[])",
    "arbiter.claimed_user_id()",
    "arbiter.claimed_machine_id()",
    "arbiter.version()",
    # heartbeats() finds machines by this, and the package the handovers of a user.
    "arbiter._machine_keys(text[])",
    "arbiter._user_text(text)",
    # heartbeat() runs as its caller, and fails with these.
    "arbiter._fail(text,text,text)",
    "arbiter._error(text,text,text,jsonb,integer)",
}

PARTITIONED = """
create table public.trades (
  user_id uuid not null, day date not null, symbol text not null
) partition by range (day);
create table public.trades_2024 partition of public.trades
  for values from ('2024-01-01') to ('2025-01-01');
select arbiter.protect('public.trades', p_verbs => '{insert,update}');
create table public.trades_2025 partition of public.trades
  for values from ('2025-01-01') to ('2026-01-01');
select arbiter.protect('public.positions', p_verbs => '{insert,update}', p_mode => 'observe');
"""

Ask = Callable[[str], list[Any]]


def column(conn: psycopg.Connection[Any], query: str) -> list[Any]:
    with conn.cursor(row_factory=scalar_row) as cur:
        return cur.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def ask(templates: Templates) -> Iterator[Ask]:
    """Asks a database that has one of everything for a column."""
    with templates.clone("installed") as db:
        conn = db.connect()
        conn.execute(PARTITIONED)
        yield lambda query: column(conn, query)


def statements(path: Path) -> list[str]:
    """The statements of a migration, separated as yoyo separates them."""
    found: list[str] = read_sql_migration(str(path))[2]
    return found


# -- migrations/: the files -----------------------------------------------------------------------


def test_released_migrations_never_change() -> None:
    listed = re.findall(
        r"^([0-9a-f]{64})  (\S+)$", RELEASED.read_text(encoding="ascii"), re.MULTILINE
    )
    released = {name: sha256 for sha256, name in listed}
    actual = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in MIGRATIONS.glob("*.sql")}
    changed = {name for name in released if actual.get(name) != released[name]}
    assert not changed, "released migrations differ: undo that, and write a new migration instead"
    new = set(actual) - set(released)
    assert not new, "a new migration has to be added to migrations/SHA256SUMS, see its first line"
    assert [name for _, name in listed] == sorted(actual), "listed once, in order"


def test_names_tell_the_order_and_every_migration_has_its_rollback() -> None:
    names = [path.name for path in MIGRATIONS.iterdir() if path != RELEASED]
    for name in names:
        assert re.fullmatch(r"\d{4}\.[a-z0-9_]+(\.rollback)?\.sql", name), name
    forward = [path.name for path in FORWARD]
    assert [name[:4] for name in forward] == [f"{n:04}" for n in range(1, len(forward) + 1)]
    assert {name.replace(".rollback.sql", ".sql") for name in names} == set(forward)
    assert len(names) == 2 * len(forward)


@pytest.mark.parametrize("path", [*FORWARD, *BACKWARD, *REPEATABLE], ids=lambda path: path.name)
def test_sql_is_ascii(path: Path) -> None:
    path.read_bytes().decode("ascii")


@pytest.mark.parametrize("path", [*FORWARD, *BACKWARD], ids=lambda path: path.name)
def test_a_migration_gives_up_on_a_busy_table(path: Path) -> None:
    first = re.sub(r"^(--.*)?\n", "", statements(path)[0], flags=re.MULTILINE)
    assert re.fullmatch(r"set local lock_timeout = '\d+m?s';", first.strip())


# -- migrations/: what they do --------------------------------------------------------------------


def run(db: Database, paths: list[Path], times: int) -> None:
    """Each file in a transaction, each of its statements that many times, and the files again."""
    conn = db.connect()
    for _ in range(times):
        for path in paths:
            with conn.transaction():
                for statement in statements(path):
                    for _ in range(times):
                        conn.execute(statement.encode())


@pytest.mark.parametrize("kind", ["bare", "trading"])
def test_every_statement_can_run_twice(templates: Templates, kind: str) -> None:
    with templates.clone(kind) as once, templates.clone(kind) as twice:
        untouched = schema(once.conninfo())
        run(once, FORWARD, times=1)
        run(twice, FORWARD, times=2)
        applied = schema(once.conninfo())
        assert difference(untouched, applied), "the migrations did something"
        assert_same(applied, schema(twice.conninfo()))

        run(once, BACKWARD, times=1)
        run(twice, BACKWARD, times=2)
        assert difference(applied, schema(once.conninfo())), "the rollbacks did something"
        assert_same(schema(once.conninfo()), schema(twice.conninfo()))


@pytest.mark.parametrize("kind", ["bare", "trading"])
def test_rollbacks_leave_an_empty_schema_and_no_constraint(templates: Templates, kind: str) -> None:
    with templates.clone(kind) as db:
        run(db, FORWARD, times=1)
        run(db, BACKWARD, times=1)
        conn = db.connect()
        left = """
            with ours as (select oid from pg_namespace where nspname = 'arbiter')
            select c.oid::regclass::text from pg_class c join ours o on o.oid = c.relnamespace
            union all
            select t.oid::regtype::text from pg_type t join ours o on o.oid = t.typnamespace
            union all
            select p.oid::regproc::text from pg_proc p join ours o on o.oid = p.pronamespace
            union all
            select conname from pg_constraint where conname like 'arbiter%'"""
        assert column(conn, left) == []


def test_the_columns_of_the_migration_are_those_that_functions_add(db: Database) -> None:
    """A migration is frozen and stands alone, so the definitions are there a second time."""
    conn = db.connect()
    conn.execute("create table public.machines (like public.cloud_machines including indexes)")
    conn.execute("alter table public.machines drop column last_health_check")
    conn.execute("create table public.ticks (user_id uuid)")
    conn.execute("select arbiter.protect('public.ticks')")
    conn.execute("select arbiter.register_machines('public.machines')")
    told = """
        select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum)
          from pg_attribute a
          left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
         where a.attrelid = %s::regclass and col_description(a.attrelid, a.attnum) like 'arbiter:%%'
         order by 1"""

    def columns(table: str) -> list[Any]:
        return conn.execute(told, (table,)).fetchall()

    assert [row[0] for row in columns("public.signals")] == ["arbiter_xid", "machine_id", "source"]
    assert columns("public.signals") == columns("public.ticks")
    assert [row[0] for row in columns("public.cloud_machines")] == ["last_health_check"]
    assert columns("public.cloud_machines") == columns("public.machines")


# -- sql/: the files; test_style has the style of its functions ------------------------------------

#: Under names that are filled in: what expose() makes in a schema of the app.
EXPOSED = {"app.execution_status", "app.confirm_takeover"}


def test_the_lint_of_functions_sees_them_all(ask: Ask) -> None:
    """Each function of the database is one that test_style has read."""
    read = {function.name for path in FILES for function in functions(path)}
    generated = re.compile(
        r"arbiter\.(_[a-z_]+_\d+|tg_registry_[a-z]+|_heartbeat_timeout|_poll_interval|_is_enforced|claimed_[a-z]+_id"
        r"|_is_(user|machine|active)|_user_text|_machine_keys)"
    )
    names = ask("select format('arbiter.%I', p.proname) from pg_proc p "
                "where p.pronamespace = 'arbiter'::regnamespace")  # fmt: skip
    assert {name for name in names if not generated.fullmatch(name)} == read - EXPOSED
    assert read > EXPOSED


# -- the objects ----------------------------------------------------------------------------------

WITHOUT_COMMENT = """
-- The tool's own tables, its sequences' and indexes' names say all.
with ours as (
  select c.oid, c.relkind, c.reltype, c.oid::regclass::text as name
    from pg_class c
   where c.relnamespace = 'arbiter'::regnamespace
     and c.relname !~ '^_?yoyo_'
     and c.relkind not in ('i', 'S')
)
select format('schema %s', n.nspname)
  from pg_namespace n
 where n.nspname = 'arbiter' and obj_description(n.oid, 'pg_namespace') is null
union all
select format('relation %s', o.name)
  from ours o
 where o.relkind <> 'c' and obj_description(o.oid, 'pg_class') is null
union all
select format('type %s', t.oid::regtype)
  from pg_type t
 where t.typnamespace = 'arbiter'::regnamespace
   and (t.typtype <> 'c' or t.typrelid in (select o.oid from ours o where o.relkind = 'c'))
   and t.typelem = 0
   and obj_description(t.oid, 'pg_type') is null
union all
select format('column %s.%s', o.name, a.attname)
  from ours o
  join pg_attribute a on a.attrelid = o.oid and a.attnum > 0 and not a.attisdropped
 where o.relkind <> 'c' and col_description(o.oid, a.attnum) is null
union all
select format('function %s', p.oid::regprocedure)
  from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace and obj_description(p.oid, 'pg_proc') is null
union all
-- A partition's copy of a row trigger has none: the server makes it.
select format('trigger %s on %s', t.tgname, t.tgrelid::regclass)
  from pg_trigger t
  join pg_proc p on p.oid = t.tgfoid and p.pronamespace = 'arbiter'::regnamespace
 where t.tgparentid = 0 and obj_description(t.oid, 'pg_trigger') is null
union all
select format('policy %s on %s', p.polname, p.polrelid::regclass)
  from pg_policy p
 where p.polname like 'arbiter%' and obj_description(p.oid, 'pg_policy') is null
order by 1
"""


def test_every_object_has_a_comment(ask: Ask) -> None:
    assert ask(WITHOUT_COMMENT) == []


def test_every_object_has_a_comment_before_there_is_a_registry(bare_db: Database) -> None:
    arbiter_db.install(bare_db.conninfo())
    assert column(bare_db.connect(), WITHOUT_COMMENT) == []


def test_definers_pin_their_search_path(ask: Ask) -> None:
    """A caller's temporary table must not shadow the catalog."""
    definers = ask(
        "select p.oid::regprocedure::text from pg_proc p "
        "where p.pronamespace = 'arbiter'::regnamespace and p.prosecdef"
    )
    pinned = ask(
        "select p.oid::regprocedure::text from pg_proc p "
        "where p.pronamespace = 'arbiter'::regnamespace "
        "and 'search_path=pg_catalog, pg_temp' = any (p.proconfig)"
    )
    assert {"arbiter.status(text)", "arbiter._guard_1()", "arbiter._provenance_1()"} < set(definers)
    assert set(definers) <= set(pinned)


def test_what_clients_may_call_pins_its_search_path(ask: Ask) -> None:
    """The caller of a function chooses its search_path, unless it has one."""
    unpinned = ask(
        "select p.oid::regprocedure::text from pg_proc p "
        "where p.pronamespace = 'arbiter'::regnamespace and p.prolang <> "
        "(select l.oid from pg_language l where l.lanname = 'sql') "
        "and has_function_privilege('authenticated', p.oid, 'execute') and p.proconfig is null"
    )
    assert unpinned == []


def test_what_pins_no_search_path_was_read_when_it_was_made(ask: Ask) -> None:
    """No search_path matters then; only so the server puts a body into a query."""
    unpinned = ask(
        "select p.proname from pg_proc p where p.pronamespace = 'arbiter'::regnamespace"
        " and not coalesce('search_path=pg_catalog, pg_temp' = any (p.proconfig), false)"
        " and p.proname <> '_machine_may_write'"  # has that of the guards, which alone call it
    )
    names = [
        *("_heartbeat_timeout", "_is_active", "_is_enforced", "_is_machine"),
        *("_is_owner_session", "_is_user", "_poll_interval", "_session_role", "_user_text"),
        *("confirm_takeover", "heartbeat", "status"),
    ]
    assert sorted(unpinned) == names
    read = ask(
        "select p.proname from pg_proc p where p.pronamespace = 'arbiter'::regnamespace"
        " and p.proconfig is null and p.prosqlbody is not null"
    )
    assert sorted(read) == names


def test_clients_may_call_the_public_api_and_nothing_else(ask: Ask) -> None:
    callable_ = ask(
        "select distinct p.oid::regprocedure::text from pg_proc p "
        "cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a "
        "where p.pronamespace = 'arbiter'::regnamespace "
        "and a.grantee <> p.proowner and a.privilege_type = 'EXECUTE'"
    )
    assert sorted(callable_) == sorted(OPEN_TO_CLIENTS)


def test_clients_may_read_settings_and_registry_and_nothing_else(ask: Ask) -> None:
    granted = ask(
        "select c.relname || ' ' || lower(a.privilege_type) || ' ' || "
        "  case a.grantee when 0 then 'public' else a.grantee::regrole::text end "
        "from pg_class c cross join aclexplode(c.relacl) a "
        "where c.relnamespace = 'arbiter'::regnamespace and a.grantee <> c.relowner "
        "union all "
        "select c.relname || '.' || t.attname || ' ' || lower(a.privilege_type) || ' ' || "
        "  case a.grantee when 0 then 'public' else a.grantee::regrole::text end "
        "from pg_class c join pg_attribute t on t.attrelid = c.oid "
        "cross join aclexplode(t.attacl) a "
        "where c.relnamespace = 'arbiter'::regnamespace and a.grantee <> c.relowner"
    )
    assert sorted(granted) == [
        "amendments select service_role",
        "handovers select authenticated",  # their own, by row security
        "handovers select service_role",
        "leases select authenticated",
        "leases select service_role",
        "machine_notes select service_role",
        "machines select authenticated",  # with the reader's own rights on the registry
        "machines select service_role",
        "machines.heartbeat_at update authenticated",
        "machines.heartbeat_at update service_role",
        "observations select service_role",
        "protections select service_role",
        "registry select authenticated",
        "registry select service_role",
        "settings select authenticated",
        "settings select service_role",
    ]


def test_constraints_and_indexes_are_named(ask: Ask) -> None:
    text = "\n".join(path.read_text(encoding="ascii") for path in [*FORWARD, *REPEATABLE])
    ours = "c.relnamespace = 'arbiter'::regnamespace and c.relname !~ '^_?yoyo_'"
    # not null has had an entry, with a name by the server, since PostgreSQL 18.
    constraints = ask(
        "select k.conname from pg_constraint k left join pg_class c on c.oid = k.conrelid "
        f"where (({ours}) or k.conname like 'arbiter%') and k.contype not in ('n', 't')"
    )
    assert {"settings_pkey", "leases_machine_check", "arbiter_source_check"} < set(constraints)
    named = set(re.findall(r"\bconstraint (\w+)", text)) | {"arbiter_machine_id_fkey"}
    assert set(constraints) - named == set()

    indexes = ask(
        "select i.indexrelid::regclass::text from pg_index i join pg_class c on c.oid = i.indrelid "
        f"where {ours} and not exists "
        "(select from pg_constraint k where k.conindid = i.indexrelid)"
    )
    assert set(indexes) - set(re.findall(r"\bindex (?:if not exists )?([\w.]+)", text)) == set()


def test_triggers_fire_always_and_bear_our_name(ask: Ask) -> None:
    ours = (
        "from pg_trigger t join pg_proc p on p.oid = t.tgfoid "
        "where p.pronamespace = 'arbiter'::regnamespace and not t.tgisinternal"
    )
    named = "t.tgrelid::regclass::text || ' ' || t.tgname"
    triggers = ask(f"select {named} {ours}")
    for expected in (
        "cloud_machines ~arbiter_stamp_update",
        "signals arbiter_guard_insert",
        "positions arbiter_guard_update",
        "trades_2024 arbiter_guard_insert",
        "trades_2025 arbiter_provenance",  # the partition that came later
        "arbiter.handovers arbiter_append_only",
    ):
        assert expected in triggers
    assert [name for name in triggers if not re.match(r"[!~]?arbiter_", name.split()[1])] == []
    # Otherwise session_replication_role = replica passes it.
    assert ask(f"select {named} {ours} and t.tgenabled <> 'A'") == []
