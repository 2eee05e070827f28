"""The functions that arbiter.expose() makes in a schema that an API serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from story import (
    SETTINGS,
    activate,
    add_user,
    age,
    backend,
    browser,
    rejection,
    rows,
    set_status,
    value,
)
from story import status as ask

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

FUNCTIONS = """
select p.oid::regprocedure::text
  from pg_proc p
  join pg_namespace n on n.oid = p.pronamespace
 where p.proname in ('execution_status', 'confirm_takeover')
   and n.nspname <> 'arbiter'
 order by 1
"""


def exposed(db: Database) -> list[str]:
    """The functions of those names outside arbiter."""
    return [row[0] for row in rows(db.connect(), FUNCTIONS)]


def test_nothing_is_exposed_unasked(db: Database) -> None:
    """Opt-in."""
    assert exposed(db) == []


def test_a_browser_asks_for_itself(db: Database) -> None:
    """The same answer as arbiter.status(), and the same rejection for another user."""
    owner = db.connect()
    owner.execute("select arbiter.expose()")
    user, other = add_user(owner), add_user(owner)
    activate(backend(db), user)
    conn = browser(db, user)
    found = ask(conn)
    query = "select environment, can_write_local, message, epoch from public.execution_status()"
    assert tuple(rows(conn, query)[0]) == ("cloud", False, "Cloud active", found["epoch"])
    forged = "select public.execution_status(%s)"
    assert rejection(conn.execute, forged, (other.id,)).sqlstate == "42501"
    assert rejection(db.connect(role="anon").execute, query).sqlstate == "42501"
    assert value(backend(db), "select environment from public.execution_status(%s)", user.id)


def test_the_users_yes(db: Database) -> None:
    """It performs the takeover, for that user only."""
    owner = db.connect()
    owner.execute("select arbiter.expose('public')")
    user, other = add_user(owner), add_user(owner)
    machine = activate(backend(db), user)
    set_status(backend(db), machine, "error")
    long_ago = 2 * SETTINGS["error_takeover_delay"]
    age(owner, machine, heartbeat=long_ago, left_running=long_ago, entered_error=long_ago)
    forged = "select public.confirm_takeover(%s)"
    stranger = browser(db, other)
    assert rejection(stranger.execute, forged, (user.id,)).sqlstate == "42501"
    assert rejection(stranger.execute, "select public.confirm_takeover()").sqlstate == "55000"
    assert value(browser(db, user), "select environment from public.confirm_takeover()") == "local"


def test_exposing_twice_changes_nothing(db: Database) -> None:
    """And an install keeps what was exposed."""
    owner = db.connect()
    query = "select oid, proacl, prosrc from pg_proc where pronamespace = 'public'::regnamespace"
    owner.execute("select arbiter.expose()")
    before = sorted(map(str, rows(owner, query)))
    owner.execute("select arbiter.expose()")
    arbiter_db.install(db.conninfo())
    assert sorted(map(str, rows(owner, query))) == before


def test_another_schema(db: Database) -> None:
    """Each schema by itself."""
    owner = db.connect()
    owner.execute('create schema "My API"')
    owner.execute("select arbiter.expose('My API')")
    owner.execute("select arbiter.expose()")
    assert len(exposed(db)) == 4
    owner.execute("select arbiter.unexpose()")
    assert exposed(db) == ['"My API".confirm_takeover(text)', '"My API".execution_status(text)']


@pytest.mark.parametrize("name", ["execution_status", "confirm_takeover"])
def test_a_function_of_the_app_is_not_replaced(db: Database, name: str) -> None:
    """It is named, and stays."""
    owner = db.connect()
    owner.execute(
        f"create function public.{name}(p_user_id text) returns text return 'the app''s'".encode()
    )
    error = rejection(owner.execute, "select arbiter.expose()")
    assert error.sqlstate == "42723"
    assert f"public.{name}(text)" in str(error)
    assert exposed(db) == [f"{name}(text)"]
    arbiter_db.uninstall(db.conninfo())
    assert exposed(db) == [f"{name}(text)"]


@pytest.mark.parametrize("schema", ["nowhere", "arbiter", None])
def test_a_schema_that_will_not_do(db: Database, schema: str | None) -> None:
    """Missing, arbiter's own, null."""
    error = rejection(db.connect().execute, "select arbiter.expose(%s)", (schema,))
    assert error.sqlstate == "3F000"
    assert error.diag.message_hint == (
        "Name a schema of the app that its API serves, such as public."
    )


def test_an_uninstall_takes_them_along(db: Database) -> None:
    """They would be left without what they call."""
    db.connect().execute("select arbiter.expose()")
    arbiter_db.uninstall(db.conninfo())
    assert exposed(db) == []


def test_only_the_owner_exposes(db: Database) -> None:
    """Not a browser, nor the backend."""
    for role in ("anon", "authenticated", "service_role"):
        for call in ("expose", "unexpose"):
            conn = db.connect(role=role)
            assert rejection(conn.execute, f"select arbiter.{call}()").sqlstate == "42501"


OVERLOADS = [
    "function public.{}() returns text language sql as 'select 1::text'",
    "function public.{}(p_user_id uuid default null) returns uuid language sql as 'select $1'",
    "function public.{}(uuid, integer default 1) returns uuid language sql as 'select $1'",
    "procedure public.{}(n integer default 1) language sql as 'select 1'",
]


@pytest.mark.parametrize("name", ["execution_status", "confirm_takeover"])
@pytest.mark.parametrize("overload", OVERLOADS)
def test_a_function_beside_them_is_not_accepted(db: Database, name: str, overload: str) -> None:
    """PostgREST would answer every call with HTTP 300."""
    owner = db.connect()
    owner.execute(f"create {overload.format(name)}".encode())
    owner.execute(f"comment on routine public.{name} is 'arbiter: says the app'".encode())
    error = rejection(owner.execute, "select arbiter.expose()")
    assert error.sqlstate == "42723"
    assert f"public.{name}(" in str(error)
    assert len(exposed(db)) == 1


@pytest.mark.parametrize("name", ["execution_status", "confirm_takeover"])
@pytest.mark.parametrize("overload", OVERLOADS)
def test_one_that_comes_later_is_found_and_stops_no_install(
    db: Database, name: str, overload: str
) -> None:
    owner = db.connect()
    owner.execute("select arbiter.expose()")
    owner.execute(f"create {overload.format(name)}".encode())
    arbiter_db.install(db.conninfo())
    (row,) = rows(owner, "select * from arbiter.doctor() where state = 'foreign'")
    assert f"{name}(" in row.object
    assert "HTTP 300" in row.problem
    owner.execute(row.remedy.encode())
    assert rows(owner, "select * from arbiter.doctor() where state = 'foreign'") == []
    owner.execute("select arbiter.expose()")


def test_one_in_the_place_of_arbiters_own_stays(db: Database) -> None:
    """The app has replaced it: an install goes on, and leaves it."""
    owner = db.connect()
    owner.execute("select arbiter.expose()")
    owner.execute("drop function public.confirm_takeover(text)")
    owner.execute("create function public.confirm_takeover(p_user_id text) returns text return 'x'")
    arbiter_db.install(db.conninfo())
    assert value(owner, "select public.confirm_takeover(null)") == "x"
    assert (
        value(owner, "select count(*) from public.execution_status(gen_random_uuid()::text)") == 1
    )
    (row,) = rows(owner, "select * from arbiter.doctor() where state = 'foreign'")
    assert "confirm_takeover(text)" in row.object


def test_one_elsewhere_is_the_apps_business(db: Database) -> None:
    """Another schema is another API."""
    owner = db.connect()
    owner.execute("create schema app")
    owner.execute("create function app.execution_status() returns text return 'the app''s'")
    owner.execute("select arbiter.expose()")
    assert rows(owner, "select * from arbiter.doctor() where state = 'foreign'") == []
