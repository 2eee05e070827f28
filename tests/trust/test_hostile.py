"""Installing onto a database in which another role could create objects.

The role has a schema and tables of its own. It tries to make arbiter's owner, here a superuser, run
its functions, and to stand in the way of an installation with objects that look like arbiter's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import column, value

import arbiter_db

from .spy import MALLORY, RAN, SPY

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

#: Objects that mallory has made before the first installation, and what the installer calls them.
PLANTED = {
    "a schema": ("create schema arbiter", "schema arbiter belongs to authenticator"),
    "a version": (
        """
        create schema arbiter;
        create function arbiter.version() returns text language sql
          as $f$ select '0.1.0' where lair.spy('') $f$;
        """,
        "schema arbiter belongs to authenticator",
    ),
    "what an uninstall calls": (
        """
        create schema arbiter;
        create table arbiter.protections (n integer);
        create function arbiter._detach_all(boolean) returns setof text language sql
          as $f$ select '' where lair.spy('') $f$;
        """,
        "schema arbiter belongs to authenticator",
    ),
    "the tables of the migrations": (
        """
        create schema arbiter;
        create table arbiter.yoyo_lock (locked integer primary key, ctime timestamp, pid integer);
        create trigger spy before insert or delete on arbiter.yoyo_lock
          for each row execute function lair.tg_spy();
        """,
        "schema arbiter belongs to authenticator",
    ),
    "the settings": (
        "create schema arbiter; create table arbiter.settings (n integer)",
        "schema arbiter belongs to authenticator",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_was_planted_is_refused_and_does_not_run(hostile: Database, what: str) -> None:
    ddl, problem = PLANTED[what]
    mallory = hostile.connect(MALLORY)
    mallory.execute(ddl.encode())
    for attempt in (arbiter_db.install, arbiter_db.uninstall):
        if attempt is arbiter_db.uninstall and "schema arbiter" not in ddl:
            continue
        with pytest.raises(arbiter_db.InstallError, match=problem) as caught:
            attempt(hostile.conninfo("postgres"))
        assert caught.value.sqlstate == "42501"
        assert caught.value.hint
    assert not value(mallory, RAN)
    schema = "select count(*) from pg_namespace where nspname = 'arbiter' and nspowner = 10"
    assert value(hostile.connect("postgres"), schema) == 0


#: Tables by the usual names, and what the plan says of them.
PLANTED_TABLES = {
    "the signals": (
        "create table public.signals (id uuid, user_id uuid,"
        " source text not null default 'local' check (lair.spy(source)))",
        "table public.signals belongs to authenticator",
    ),
    "the machines": (
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text,"
        " last_health_check timestamptz check (lair.spy('')))",
        "table public.cloud_machines belongs to authenticator",
    ),
    "a view in place of the machines": (
        "create view public.cloud_machines as select gen_random_uuid() as id,"
        " null::uuid as user_id, 'running' as status, now() as last_health_check"
        " where lair.spy('')",
        "table public.cloud_machines belongs to authenticator",
    ),
    "a table that names machines": (
        "create table public.trades (id uuid primary key, user_id uuid,"
        " source text not null default 'local' check (lair.spy(source)))",
        "table public.trades belongs to authenticator",
    ),
}


@pytest.mark.parametrize("what", PLANTED_TABLES)
def test_a_table_that_was_planted_is_skipped_and_does_not_run(hostile: Database, what: str) -> None:
    ddl, problem = PLANTED_TABLES[what]
    mallory = hostile.connect(MALLORY)
    mallory.execute(ddl.encode())
    plan: list[arbiter_db.PlanLine] = []
    arbiter_db.install(hostile.conninfo("postgres"), on_plan=plan.extend)
    [line] = plan
    assert line.step == "skip"
    assert problem in line.finding
    assert line.remedy
    asked = {"registry": line.table} if "_machines" in line.table else {"protect": [line.table]}
    with pytest.raises(arbiter_db.InstallError, match="belongs to authenticator") as caught:
        arbiter_db.install(hostile.conninfo("postgres"), adoption=arbiter_db.Adoption(**asked))
    assert caught.value.sqlstate == "42501"
    assert not value(mallory, RAN)
    admin = hostile.connect("postgres")
    assert value(admin, "select count(*) from arbiter.protections") == 0
    assert value(admin, "select count(*) from arbiter.registry") == 0


def test_a_table_that_looks_like_the_machines_raises_no_doubt(hostile: Database) -> None:
    """Any role that may create a table could otherwise keep an install from protecting anything."""
    admin, mallory = hostile.connect("postgres"), hostile.connect(MALLORY)
    shape = "(id uuid primary key, user_id uuid, status text, last_health_check timestamptz"
    admin.execute(f"create table public.cloud_machines {shape})".encode())
    admin.execute("create table public.signals (user_id uuid not null)")
    mallory.execute(f"create table public.robots {shape} check (lair.spy('')))".encode())
    arbiter_db.install(hostile.conninfo("postgres"))
    assert value(admin, "select registry::text from arbiter.registry") == "cloud_machines"
    assert value(admin, "select count(*) from arbiter.protections") == 1
    assert not value(mallory, RAN)


def test_no_other_role_may_create_in_the_schema(hostile: Database) -> None:
    """A schema that a DBA has made beforehand, and opened."""
    admin, mallory = hostile.connect("postgres"), hostile.connect(MALLORY)
    admin.execute("create schema arbiter")
    admin.execute(f"grant usage, create on schema arbiter to {MALLORY}".encode())
    message = f"{MALLORY} may create objects in schema arbiter"
    with pytest.raises(arbiter_db.InstallError, match=message) as caught:
        arbiter_db.install(hostile.conninfo("postgres"))
    assert caught.value.hint == (
        f"Run: revoke create on schema arbiter from {MALLORY}. Nothing was changed."
    )
    mallory.execute("create function arbiter.later() returns integer language sql return 1")
    admin.execute(f"revoke create on schema arbiter from {MALLORY}".encode())
    message = r"arbiter\.later\(\) belongs to authenticator"
    with pytest.raises(arbiter_db.InstallError, match=message):
        arbiter_db.install(hostile.conninfo("postgres"))
    admin.execute("drop function arbiter.later()")
    arbiter_db.install(hostile.conninfo("postgres"))
    assert value(admin, "select arbiter.version()") == arbiter_db.__version__


LOOK_ALIKES = """
create table public.mine (
  id uuid primary key,
  machine_id uuid,
  source text constraint arbiter_source_check check (lair.spy(source)));
alter table public.mine drop constraint arbiter_source_check;
insert into public.mine values (gen_random_uuid(), null, 'x');
alter table public.mine add constraint arbiter_source_check check (lair.spy(source)) not valid;
alter table public.mine add constraint arbiter_machine_id_fkey
  foreign key (machine_id) references public.mine not valid;
comment on column public.mine.source is 'arbiter: mine';
create index arbiter_signals_machine_idx on public.mine (machine_id);
create index arbiter_mine_machine_idx on public.mine (machine_id);
create policy arbiter_claim on public.mine using (lair.spy(''));
comment on policy arbiter_claim on public.mine is 'Mine. [00000000000000000000000000000000]';
create policy arbiter_own on public.mine using (true);
create trigger arbiter_guard_insert before insert on public.mine
  for each row execute function lair.tg_spy();
create function lair.execution_status(uuid) returns integer language sql return 1;
comment on function lair.execution_status(uuid) is 'arbiter: mine';
create function lair.confirm_takeover(uuid) returns integer language sql return 1;
comment on function lair.confirm_takeover(uuid) is 'arbiter: mine';
"""
OF_MALLORY = """
select 'constraint ' || conname || ' ' || convalidated from pg_constraint
 where conrelid = 'public.mine'::regclass and contype <> 'n'
union all
select 'index ' || indexrelid::regclass from pg_index where indrelid = 'public.mine'::regclass
union all
select 'policy ' || polname from pg_policy where polrelid = 'public.mine'::regclass
union all
select 'trigger ' || tgname from pg_trigger
 where tgrelid = 'public.mine'::regclass and not tgisinternal
union all
select 'column ' || attname from pg_attribute
 where attrelid = 'public.mine'::regclass and attnum > 0 and not attisdropped
union all
select 'function ' || oid::regprocedure from pg_proc
 where pronamespace = 'lair'::regnamespace
 order by 1
"""


def test_objects_that_look_like_arbiters_are_left_alone(templates: Templates) -> None:
    """Nothing of another role's table is touched, evaluated or reported, and nothing is blocked."""
    with templates.clone("trading") as database:
        admin = database.connect("postgres")
        admin.execute("reassign owned by app_owner to postgres")
        admin.execute(
            sql.SQL("grant create on database {} to authenticator").format(
                sql.Identifier(database.name)
            )
        )
        admin.execute("grant create on schema public to authenticator")
        mallory = database.connect(MALLORY)
        mallory.execute((SPY + LOOK_ALIKES).encode())
        before = column(mallory, OF_MALLORY)
        assert len(before) == 16

        arbiter_db.install(database.conninfo("postgres"))
        arbiter_db.install(database.conninfo("postgres"))
        admin.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
        arbiter_db.finish(admin)
        admin.execute("select arbiter.unprotect('public.positions')")
        admin.execute("select arbiter.register_machines('public.cloud_machines')")
        doctor = "select object from arbiter.doctor() where state not in ('ok', 'note')"
        assert column(admin, doctor) == []
        report = arbiter_db.uninstall(database.conninfo("postgres"), drop_columns=True)
        assert "dropped column source of public.signals" in report
        assert "mine" not in "".join(report)

        assert column(mallory, OF_MALLORY) == before
        assert not value(mallory, RAN)


def test_temporary_objects_do_not_stand_in_for_arbiters(templates: Templates) -> None:
    """A session's own temporary tables come first where names are looked up, but not in these."""
    with templates.clone("trading") as database:
        conninfo = database.conninfo()
        arbiter_db.install(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute("create temporary table protections (n integer)")
            conn.execute("create temporary table signals (n integer)")
            conn.execute("create temporary table attachments (n integer)")
            conn.execute("set search_path = pg_temp, public")
            conn.execute("select arbiter.protect('public.signals')")
            protected = "select protected_table::oid = 'public.signals'::regclass"
            assert value(conn, protected + " from arbiter.protections")


def test_a_copy_of_a_protected_table_keeps_its_columns(db: Database) -> None:
    """`like … including all` copies checks, comments and defaults, without malice."""
    owner = db.connect()
    owner.execute("create table public.copied (like public.signals including all)")
    owner.execute("alter table public.copied add foreign key (trader_id) references public.traders")
    owner.execute("alter table public.copied drop constraint arbiter_source_check")
    owner.execute(
        "alter table public.copied add constraint arbiter_source_check"
        " check (source in ('local', 'cloud')) not valid"
    )
    arbiter_db.install(db.conninfo())
    valid = "select convalidated from pg_constraint where conrelid = 'public.copied'::regclass"
    assert column(owner, valid + " and conname = 'arbiter_source_check'") == [False]
    for call in ("protect('public.copied')", "unprotect('public.copied')"):
        if call.startswith("unprotect"):
            owner.execute("select arbiter.unprotect('public.copied')")
        else:
            with pytest.raises(psycopg.errors.DuplicateObject, match="that arbiter has not made"):
                owner.execute("select arbiter.protect('public.copied')")
            owner.execute("alter table public.copied validate constraint arbiter_source_check")
            owner.execute("select arbiter.protect('public.copied')")
    report = arbiter_db.uninstall(db.conninfo(), drop_columns=True)
    assert [line for line in report if "copied" in line] == []
    names = "select attname from pg_attribute where attrelid = 'public.copied'::regclass"
    assert {"source", "machine_id", "arbiter_xid"} <= set(column(owner, names))


#: Each is the name of a column; with the checks of function bodies off a body that ends early would
#: run what follows it.
NAMES = [
    "*/select $tg$;create table public.broken_out ();/*",
    "$$; create table public.broken_out (); --",
    "'; create table public.broken_out (); --",
    '"; create table public.broken_out (); --',
    "{table}",
    "__machine",
    "__user_of(n)",
    "%I",
    "%1$s",
    "arbiter_machine",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_out_of_what_is_generated(db: Database, name: str) -> None:
    owner = db.connect()
    owner.execute("set check_function_bodies = off")
    owner.execute(
        sql.SQL(
            "create table public.odd (id uuid primary key, {0} uuid);"
            "create table public.odder (id uuid primary key, {1} uuid, {2} text, {3} timestamptz)"
        ).format(
            sql.Identifier(name),
            sql.Identifier(f"u{name}"),
            sql.Identifier(f"s{name}"),
            sql.Identifier(name),
        )
    )
    machine = f"m{name}"
    for verbs in ("{insert}", "{insert,update}"):
        owner.execute(
            "select arbiter.protect('public.odd', p_user_path => %s, p_machine_column => %s,"
            " p_verbs => %s::text[])",
            (sql.Identifier(name).as_string(), machine, verbs),
        )
    owner.execute(
        "select arbiter.register_machines('public.odder', 'id', %s, %s, %s)",
        (f"u{name}", f"s{name}", name),
    )
    arbiter_db.install(db.conninfo())
    assert value(owner, "select to_regclass('public.broken_out') is null")
    wrong = "select object from arbiter.doctor() where object ~ 'odd' and state <> 'ok'"
    assert column(owner, wrong) == []
    user = sql.Literal("00000000-0000-4000-8000-000000000001")
    row = sql.SQL("insert into public.odd (id, {}) values (gen_random_uuid(), {})")
    owner.execute(row.format(sql.Identifier(name), user))
    assert value(owner, "select count(*) from arbiter.leases") == 1
    machines = sql.SQL("insert into public.odder values (gen_random_uuid(), {}, 'running', now())")
    owner.execute(machines.format(user))
    with pytest.raises(psycopg.Error, match="a healthy cloud machine is active"):
        owner.execute(row.format(sql.Identifier(name), user))
