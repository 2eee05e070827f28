"""What arbiter has attached is recorded, and recognised by that: here, and in a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import column, value

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

UNRECORDED = """
select format('%s %s of %s', found.kind, found.name, found.attached_to::regclass)
  from (
    select 'trigger' as kind, tgname::text as name, tgrelid as attached_to from pg_trigger
     where tgname ~ '^arbiter_' and tgparentid = 0
    union all
    select 'policy', polname, polrelid from pg_policy where polname ~ '^arbiter_'
    union all
    select 'constraint', conname, conrelid from pg_constraint
     where conname ~ '^arbiter_' and coninhcount = 0
    union all
    select 'index', c.relname, i.indrelid
      from pg_index i join pg_class c on c.oid = i.indexrelid where c.relname ~ '^arbiter_'
    union all
    select 'column', attname, attrelid from pg_attribute
     where attname in ('source', 'machine_id', 'arbiter_xid', 'last_health_check')
       and attrelid in ('public.signals'::regclass, 'public.positions'::regclass,
                        'public.ticks'::regclass)
    union all
    select 'function', oid::regprocedure::text, 0 from pg_proc
     where pronamespace = 'public'::regnamespace
       and proname in ('execution_status', 'confirm_takeover')
  ) as found
 where not exists (
   select from arbiter.attachments a
    where (a.kind, a.name, a.attached_to) = (found.kind, found.name, found.attached_to)
      and arbiter._ownership(a.kind, a.attached_to, a.name) = 'ours')
"""
TICKS = """
create table public.ticks (user_id uuid not null, day integer not null) partition by range (day);
create table public.ticks_a partition of public.ticks for values from (0) to (10);
select arbiter.protect('public.ticks', p_verbs => '{insert,update}');
select arbiter.protect('public.positions', p_verbs => '{insert,update}');
select arbiter.expose();
set search_path = pg_catalog;
"""


def test_all_that_is_attached_is_recorded(db: Database) -> None:
    owner = db.connect()
    owner.execute(TICKS.encode())
    arbiter_db.finish(owner)
    owner.execute("set search_path = pg_catalog")
    assert column(owner, UNRECORDED) == []
    kinds = "select distinct kind from arbiter.attachments order by kind"
    assert column(owner, kinds) == [
        "column", "constraint", "function", "index", "policy", "trigger"
    ]  # fmt: skip
    foreign = (
        "select name from arbiter.attachments where arbiter._ownership(kind, attached_to, name)"
    )
    assert column(owner, foreign + " <> 'ours'") == []
    owner.execute("select arbiter.unexpose()")
    owner.execute("select arbiter.unprotect('public.ticks')")
    left = "select distinct kind from arbiter.attachments where attached_to ="
    assert column(owner, left + " 'public.ticks'::regclass order by 1") == ["column", "constraint"]
    assert column(owner, "select name from arbiter.attachments where kind = 'function'") == []
    owner.execute("drop table public.ticks")
    arbiter_db.install(db.conninfo())
    assert value(owner, "select count(*) from arbiter.attachments where name ~ 'ticks'") == 0
    # Nor of a table that is dropped while it is protected, after the next call.
    owner.execute("create table public.bids (user_id uuid)")
    owner.execute("select arbiter.protect('public.bids')")
    owner.execute("drop table public.bids")
    owner.execute("select arbiter.protect('public.signals')")
    dropped = (
        "select count(*) from arbiter.attachments a where a.kind <> 'function'"
        " and not exists (select from pg_class c where c.oid = a.attached_to)"
    )
    assert value(owner, dropped) == 0


def test_a_copied_database_recognises_them_by_name_and_shape(
    templates: Templates, db: Database
) -> None:
    """Its numbers are those of the database that was copied, and prove nothing."""
    owner = db.connect()
    here = "select count(*) from arbiter.attachments a join pg_database d on d.oid = a.database_id"
    assert value(owner, here + " where d.datname = current_database()") == 0
    # Made anew under the same name, with another meaning: the shape tells, and nothing else does.
    owner.execute(
        "alter table public.signals drop constraint arbiter_source_check,"
        " add constraint arbiter_source_check check (source in ('local', 'cloud', 'paper')),"
        " drop column arbiter_xid cascade, add column arbiter_xid text"
    )
    ownership = "select arbiter._ownership({}, 'public.signals', {})"
    for kind, name, expected in (
        ("constraint", "arbiter_source_check", "foreign"),
        ("column", "arbiter_xid", "foreign"),
        ("column", "source", "ours"),
        ("constraint", "arbiter_machine_id_fkey", "ours"),
        ("trigger", "arbiter_guard_insert", "ours"),
        ("index", "arbiter_signals_machine_idx", "ours"),
        ("policy", "arbiter_claim", "ours"),
        ("policy", "arbiter_other", "missing"),
    ):
        call = sql.SQL(ownership).format(sql.Literal(kind), sql.Literal(name))
        assert owner.execute(call).fetchone() == (expected,), name
    owner.execute("alter table public.signals drop column arbiter_xid, drop column source cascade")
    owner.execute("alter table public.signals add source text not null default 'local'")
    arbiter_db.install(db.conninfo())
    everywhere = value(owner, "select count(*) from arbiter.attachments")
    assert value(owner, here + " where d.datname = current_database()") == everywhere
    # From here on the numbers count: a column of the same name and type is another one.
    owner.execute("alter table public.signals drop column source cascade")
    owner.execute("alter table public.signals add source text not null default 'local'")
    call = sql.SQL(ownership).format(sql.Literal("column"), sql.Literal("source"))
    assert owner.execute(call).fetchone() == ("foreign",)


def test_a_check_that_calls_a_function_of_the_app_has_another_shape(db: Database) -> None:
    owner = db.connect()
    owner.execute(
        """
        create function public.same(text) returns text language sql immutable return $1;
        alter table public.signals drop constraint arbiter_source_check,
          add constraint arbiter_source_check check (public.same(source) in ('local', 'cloud'))
          not valid
        """
    )
    call = "select arbiter._ownership('constraint', 'public.signals', 'arbiter_source_check')"
    assert value(owner, call) == "foreign"
    assert column(owner, "select * from arbiter._finish_statements()") == []


def test_the_machine_column_can_be_changed_and_changed_back(db: Database) -> None:
    """The key moves with it."""
    owner = db.connect()
    key = """
        select a.attname from pg_constraint k
          join pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]
         where k.conrelid = 'public.signals'::regclass and k.conname = 'arbiter_machine_id_fkey'
    """
    for machine_column in ("fly_app_id", "machine_id", "fly_app_id"):
        owner.execute(
            "select arbiter.protect('public.signals', p_machine_column => %s)", (machine_column,)
        )
        arbiter_db.finish(owner)
        assert column(owner, key) == [machine_column]
    # The column that is not used any more is no way to a user.
    assert value(owner, "select user_path from arbiter.protections") == "trader_id.user_id"


def test_two_tables_with_the_same_first_letters(db: Database) -> None:
    owner = db.connect()
    names = [f"{'of_the_strategies_that_run_at_night_' * 2}"[:50] + end for end in ("_a", "_b")]
    for name in names:
        owner.execute(f"create table public.{name} (user_id uuid)".encode())
        owner.execute("select arbiter.protect(%s::text::regclass)", (f"public.{name}",))
    arbiter_db.finish(owner)
    indexes = """
        select count(*) from arbiter.attachments
         where kind = 'index' and arbiter._ownership(kind, attached_to, name) = 'ours'
           and attached_to::text ~ 'of_the_strategies'
    """
    assert value(owner, indexes) == 2
    report = arbiter_db.uninstall(db.conninfo(), drop_columns=True)
    assert len([line for line in report if "of_the_strategies" in line]) == 6


def test_a_machine_column_with_other_constraints_needs_no_index(db: Database) -> None:
    """Only a foreign key looks up the machine's rows."""
    owner = db.connect()
    owner.execute(
        "create table public.plain (user_id uuid, machine_id uuid check (machine_id is not null))"
    )
    owner.execute("select arbiter.protect('public.plain')")
    missing = "select object from arbiter.doctor() where object ~ 'index' and state <> 'ok'"
    assert column(owner, missing) == []


def test_a_guard_is_made_for_a_protected_table_only(db: Database) -> None:
    with pytest.raises(psycopg.errors.NoDataFound):
        db.connect().execute("select arbiter._build_guard(0)")
