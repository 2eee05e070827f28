"""Code of a role that has not the rights of arbiter's owner never runs with them.

confirm_takeover() writes the registry as arbiter's owner, and that runs the registry's triggers,
checks and generated columns. Mallory is a login that may create triggers there.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_user,
    age,
    backend,
    browser,
    lease,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

MALLORY = """
create role mallory login;
create schema mallory authorization mallory;
grant trigger, references on public.cloud_machines to mallory;
"""

#: What mallory's code does when it runs with the rights of arbiter's owner.
EVIL = """
create function mallory.take() returns void language plpgsql as $$
begin
  grant update on arbiter.leases to mallory;
exception
  when insufficient_privilege then null;
end
$$;
create function mallory.tg() returns trigger language plpgsql
  as $$ begin perform mallory.take(); return coalesce(new, old); end $$;
create function mallory.holds(text) returns boolean language plpgsql immutable
  as $$ begin perform mallory.take(); return true; end $$;
create function mallory.differs(text, text) returns boolean language plpgsql
  as $$ begin perform mallory.take(); return true; end $$;
create operator mallory.<<>> (function = mallory.differs, leftarg = text, rightarg = text);
grant usage on schema mallory to public;
"""

TRIGGER = "create trigger of_mallory {} on public.cloud_machines {} execute function {}()"
BUILT_IN = "pg_catalog.suppress_redundant_updates_trigger"

#: What mallory, or the table's owner, has on the registry; and the object that doctor() names.
CODE = {
    "before": ("mallory", TRIGGER.format("before update", "for each row", "mallory.tg")),
    "after": ("mallory", TRIGGER.format("after update", "for each statement", "mallory.tg")),
    "of the column": (
        "mallory",
        TRIGGER.format("before update of status", "for each row", "mallory.tg"),
    ),
    "deferred": (
        "mallory",
        "create constraint trigger of_mallory after update on public.cloud_machines"
        " deferrable initially deferred for each row execute function mallory.tg()",
    ),
    "condition": (
        "mallory",
        TRIGGER.format("before update", "for each row when (mallory.holds(new.status))", BUILT_IN),
    ),
    "operator": (
        "mallory",
        TRIGGER.format(
            "before update",
            "for each row when (new.status operator(mallory.<<>>) old.status)",
            BUILT_IN,
        ),
    ),
    "definer": (
        "mallory",
        "alter function mallory.tg() security definer;"
        + TRIGGER.format("before update", "for each row", "mallory.tg"),
    ),
    "called by the owner": (
        "app_owner",
        TRIGGER.format("before update", "for each row", "mallory.tg"),
    ),
    "check": (
        "app_owner",
        "alter table public.cloud_machines add constraint of_mallory"
        " check (mallory.holds(status)) not valid",
    ),
    "generated column": (
        "app_owner",
        "alter table public.cloud_machines"
        " add column of_mallory boolean generated always as (mallory.holds(status)) stored",
    ),
    "index": (
        "app_owner",
        "create index of_mallory on public.cloud_machines (mallory.holds(status))",
    ),
    "domain": (
        "app_owner",
        "create domain public.word as text constraint of_mallory check (mallory.holds(value));"
        "alter table public.cloud_machines add column of_mallory public.word",
    ),
}

#: Takes what CODE has made away again, where doctor()'s remedy is no statement.
REMOVED = {
    "check": "alter table public.cloud_machines drop constraint of_mallory",
    "generated column": "alter table public.cloud_machines drop column of_mallory",
    "index": "drop index public.of_mallory",
    "domain": "alter table public.cloud_machines drop column of_mallory",
}


@pytest.fixture
def mallory(db: Database) -> Iterator[Conn]:
    """Mallory's connection, with her functions made."""
    superuser = db.connect("postgres")
    superuser.execute(MALLORY)
    conn = db.connect("mallory")
    conn.execute(EVIL)
    yield conn
    db.close()  # a test that fails may have left a transaction open
    db.connect("postgres").execute("drop owned by mallory cascade; drop role mallory")


def has_taken(db: Database) -> bool:
    """Whether her code has run with the rights of arbiter's owner."""
    query = "select has_table_privilege('mallory', 'arbiter.leases', 'update')"
    return bool(value(db.connect("postgres"), query))


def in_error(db: Database) -> User:
    """A user who may confirm a takeover."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(backend(db), user)
    set_status(backend(db), machine, "error")
    long_ago = 2 * SETTINGS["error_takeover_delay"]
    age(owner, machine, heartbeat=long_ago, left_running=long_ago, entered_error=long_ago)
    return user


def give_back(db: Database) -> None:
    """What her code has got in a test of its own."""
    db.connect("postgres").execute("revoke update on arbiter.leases from mallory")


def foreign(db: Database) -> list[Any]:
    return rows(db.connect(), "select * from arbiter.doctor() where state = 'foreign'")


@pytest.mark.parametrize("kind", CODE)
def test_a_confirmation_runs_no_foreign_code(db: Database, mallory: Conn, kind: str) -> None:
    """Rejected with nothing changed, found by doctor(), and possible again without it."""
    user = in_error(db)
    assert foreign(db) == []
    who, code = CODE[kind]
    db.connect(who).execute(code.encode())
    give_back(db)  # the owner's own statements have run it, too
    error = rejection(browser(db, user).execute, "select arbiter.confirm_takeover()")
    assert error.sqlstate == "55000"
    assert "of mallory with the rights of arbiter's owner" in str(error)
    assert not has_taken(db)
    assert lease(db.connect(), user).holder == "cloud"
    status = "select status from public.cloud_machines where user_id = %s"
    assert value(db.connect(), status, user.id) == "error"

    (row,) = foreign(db)
    assert "of_mallory" in row.object
    assert "mallory" in row.problem
    db.connect().execute(REMOVED.get(kind, row.remedy).encode())
    give_back(db)
    assert foreign(db) == []
    browser(db, user).execute("select arbiter.confirm_takeover()")
    assert not has_taken(db)
    assert value(db.connect(), status, user.id) == "stopped"


def test_the_twin_an_update_of_the_owner_runs_it(db: Database, mallory: Conn) -> None:
    """This is what arbiter must not do: PostgreSQL itself asks nothing."""
    in_error(db)
    mallory.execute(CODE["before"][1].encode())
    assert not has_taken(db)
    db.connect().execute("update public.cloud_machines set status = 'stopped'")
    assert has_taken(db)


def test_nor_that_of_a_temporary_function(db: Database, mallory: Conn) -> None:
    """Every login may make one; it needs no schema of its own."""
    user = in_error(db)
    superuser = db.connect("postgres")
    superuser.execute("grant authenticated to mallory")
    mallory.execute(
        "create function pg_temp.tg() returns trigger language plpgsql"
        " as 'begin perform mallory.take(); return new; end'"
    )
    mallory.execute(TRIGGER.format("before update", "for each row", "pg_temp.tg").encode())
    mallory.execute("set role authenticated")
    claims = f'{{"sub": "{user.id}"}}'
    mallory.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
    assert rejection(mallory.execute, "select arbiter.confirm_takeover()").sqlstate == "55000"
    assert not has_taken(db)
    mallory.execute("reset role")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_nor_a_trigger_that_is_newer_than_the_snapshot(
    db: Database, mallory: Conn, level: str
) -> None:
    """It fires, though no query of the transaction sees it."""
    user = in_error(db)
    tab = browser(db, user)
    tab.execute(f"begin isolation level {level}".encode())
    tab.execute("select 1 from pg_catalog.pg_class limit 1")
    mallory.execute(CODE["before"][1].encode())
    error = rejection(tab.execute, "select arbiter.confirm_takeover()")
    assert error.sqlstate == "0A000"
    tab.execute("rollback")
    assert not has_taken(db)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_where_only_the_owner_creates_triggers_any_level_will_do(db: Database, level: str) -> None:
    user = in_error(db)
    tab = browser(db, user)
    tab.execute(f"begin isolation level {level}".encode())
    tab.execute("select arbiter.confirm_takeover()")
    tab.execute("commit")
    assert lease(db.connect(), user).holder == "local"


def test_no_trigger_comes_between_the_question_and_the_write(db: Database, mallory: Conn) -> None:
    """Until the confirmation has ended, nobody can create one."""
    user = in_error(db)
    tab = browser(db, user)
    with tab.transaction():
        tab.execute("select arbiter.confirm_takeover()")
        mallory.execute("set lock_timeout = '100ms'")
        error = rejection(mallory.execute, CODE["before"][1])
        assert error.sqlstate == "55P03"


def test_a_member_of_the_owner_is_trusted(db: Database, mallory: Conn) -> None:
    """It has these rights anyway."""
    user = in_error(db)
    db.connect("postgres").execute("grant app_owner to mallory")
    mallory.execute(CODE["before"][1].encode())
    assert foreign(db) == []
    browser(db, user).execute("select arbiter.confirm_takeover()")
    assert has_taken(db)
    db.connect("postgres").execute("revoke app_owner from mallory")


def test_a_registration_runs_none_either(db: Database, mallory: Conn) -> None:
    """It mends heartbeats of the future, once: when the heartbeat column is another one."""
    owner = db.connect()
    owner.execute("alter table public.cloud_machines add column beat timestamptz")
    machine = add_machine(owner, add_user(owner), "running")
    mallory.execute(CODE["before"][1].encode())
    register = (
        "select arbiter.register_machines('public.cloud_machines', p_heartbeat_column => 'beat')"
    )
    with owner.transaction(force_rollback=True):
        owner.execute(register.encode())  # no heartbeat to mend
        assert not has_taken(db)
    owner.execute("alter table public.cloud_machines disable trigger of_mallory")
    ahead = "update public.cloud_machines set beat = now() + %s where id = %s"
    owner.execute(ahead, (timedelta(hours=1), machine))
    owner.execute("alter table public.cloud_machines enable trigger of_mallory")
    error = rejection(owner.execute, register)
    assert error.sqlstate == "55000"
    assert not has_taken(db)


# -- grants ---------------------------------------------------------------------------------------


def notes(db: Database) -> list[Any]:
    wrong = "select * from arbiter.doctor() where state <> 'ok' and object ~ 'trigger'"
    return rows(db.connect(), wrong)


def test_a_grant_alone_is_a_note(db: Database, mallory: Conn) -> None:
    """With one remedy for all who have it, also through PUBLIC."""
    owner = db.connect()
    owner.execute("grant trigger on public.cloud_machines to anon, authenticated, service_role")
    owner.execute("grant trigger on public.cloud_machines to public")
    (row,) = notes(db)
    assert (row.object, row.state) == ("grants of trigger on public.cloud_machines", "note")
    assert "anon" in row.problem
    owner.execute(row.remedy.encode())
    assert notes(db) == []
