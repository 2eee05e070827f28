"""Attempts to write as somebody else, or to read another user's data: over HTTP, with supabase-js,
and in plain SQL as the API's roles where HTTP has no words for it.

Ada's and Bob's machines hold; Carol and Dave write from their browsers. Each attack has a control:
the same request by a caller who may send it, which shows that the caller is why the attack fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import jwt
import psycopg
import pytest
from psycopg import sql
from story import (
    SETTINGS,
    User,
    activate,
    add_user,
    age,
    next_bar,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from .conftest import App, Node

Conn = psycopg.Connection[Any]
Tokens = Callable[["Stage"], str]

#: The app lets users do anything with what is theirs, as many apps do, and even create functions.
GENEROUS = """
create policy machines_own on public.cloud_machines for all to authenticated
  using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
grant all on public.cloud_machines, public.signals to anon, authenticated;
grant create on schema public to authenticated
"""

#: What no attack may change.
TABLES = (
    "public.signals",
    "public.traders",
    "public.cloud_machines",
    "arbiter.leases",
    "arbiter.handovers",
    "arbiter.settings",
    "arbiter.registry",
    "arbiter.protections",
    "arbiter.machine_notes",
)


class Stage:
    """The app and its people."""

    def __init__(self, app: App) -> None:
        self.app = app
        owner = app.owner
        self.ada, self.bob = add_user(owner), add_user(owner)
        self.carol, self.dave = add_user(owner), add_user(owner)
        self.adas_machine = activate(app.backend, self.ada)
        self.bobs_machine = activate(app.backend, self.bob)

    @cached_property
    def nobodys_machine(self) -> str:
        """An id that no machine has."""
        return str(uuid4())

    def rows(self) -> dict[str, list[Any]]:
        """All there is."""
        return {
            table: rows(self.app.owner, f"select * from {table} order by 1, 2") for table in TABLES
        }

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Nothing may have been written when that ends."""
        before = self.rows()
        yield
        assert self.rows() == before

    def browser(self, user: User) -> Conn:
        """A connection as PostgREST has it in that user's request."""
        claims = {"sub": str(user.id), "role": "authenticated"}
        return self.app.db.connect(role="authenticated", claims=claims)


@pytest.fixture(scope="module")
def generous_app(app: App) -> App:
    app.owner.execute(GENEROUS)
    return app


@pytest.fixture
def at(generous_app: App) -> Stage:
    return Stage(generous_app)


def signal(user: User, machine: str | None = None, **columns: Any) -> dict[str, Any]:
    """A signal for a bar of its own: of the machine, or local."""
    return {
        "trader_id": str(user.trader),
        "symbol": "BTCUSDT",
        "interval": "1m",
        "signal": "buy",
        "bar_time": next_bar().isoformat(),
        "source": "local" if machine is None else "cloud",
        "machine_id": machine and str(machine),
        **columns,
    }


# Over HTTP ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A token, and what is sent with it."""

    token: Tokens
    method: str
    path: str | Callable[[Stage], str]
    body: Callable[[Stage], object] = lambda _: None
    headers: tuple[tuple[str, str], ...] = (("Prefer", "return=representation"),)

    def send(self, at: Stage) -> httpx.Response:
        path = self.path if isinstance(self.path, str) else self.path(at)
        return at.app.send(self.token(at), self.method, path, self.body(at), **dict(self.headers))


@dataclass(frozen=True)
class Attack:
    """A request, what it gets, and the one that is allowed. ``code`` None: no row is found."""

    attack: Request
    status: int
    code: str | None
    control: Request


def insert(token: Tokens, body: Callable[[Stage], object]) -> Request:
    return Request(token, "POST", "/signals", body)


def patch(token: Tokens, machine: Callable[[Stage], str], **change: Any) -> Request:
    return Request(
        token, "PATCH", lambda at: f"/cloud_machines?id=eq.{machine(at)}", lambda at: change
    )


def call(
    token: Tokens, name: str, user: Callable[[Stage], User | None] = lambda _: None
) -> Request:
    def body(at: Stage) -> dict[str, str]:
        found = user(at)
        return {} if found is None else {"p_user_id": str(found.id)}

    return Request(token, "POST", f"/rpc/{name}", body)


def read(token: Tokens, path: str, **headers: str) -> Request:
    names = tuple((name.replace("_", "-"), text) for name, text in headers.items())
    return Request(token, "GET", path, headers=names)


def ada(at: Stage, **claims: Any) -> str:
    return at.app.user_token(at.ada, **claims)


def bob(at: Stage) -> str:
    return at.app.user_token(at.bob)


def carol(at: Stage) -> str:
    return at.app.user_token(at.carol)


def anon(at: Stage) -> str:
    return at.app.gateway.anon_key


def service(at: Stage) -> str:
    return at.app.gateway.service_key


def adas_machine(at: Stage) -> str:
    return at.app.machine_token(at.ada, at.adas_machine)


def bobs_machine(at: Stage) -> str:
    return at.app.machine_token(at.bob, at.bobs_machine)


def forged(**change: Any) -> Tokens:
    """Ada's machine's own token, but for what is changed."""
    return lambda at: ada(at, **{"machine_id": str(at.adas_machine), **change})


def signed_otherwise(algorithm: str, key: str) -> Tokens:
    """A token that would be accepted if it had the right signature."""

    def token(at: Stage) -> str:
        claims = jwt.decode(adas_machine(at), options={"verify_signature": False})
        return jwt.encode(claims, key, algorithm=algorithm)

    return token


def of_ada(at: Stage) -> object:
    return signal(at.ada, at.adas_machine)


MACHINE_WRITES = insert(adas_machine, of_ada)
CAROL_WRITES = insert(carol, lambda at: signal(at.carol))
ADA_BEATS = patch(adas_machine, lambda at: at.adas_machine, last_health_check="2026-01-01T00:00Z")

ATTACKS = {
    # A browser that says it is the cloud.
    "cloud, own machine": Attack(insert(ada, of_ada), 403, "42501", MACHINE_WRITES),
    "cloud, another's machine": Attack(
        insert(ada, lambda at: signal(at.ada, at.bobs_machine)), 403, "42501", MACHINE_WRITES
    ),
    "cloud, no machine": Attack(
        insert(carol, lambda at: signal(at.carol, source="cloud")), 403, "42501", CAROL_WRITES
    ),
    "local, with a machine": Attack(
        insert(ada, lambda at: signal(at.ada, at.adas_machine, source="local")),
        403,
        "42501",
        MACHINE_WRITES,
    ),
    "cloud among local ones": Attack(
        insert(carol, lambda at: [signal(at.carol), signal(at.carol, at.adas_machine)]),
        403,
        "42501",
        insert(carol, lambda at: [signal(at.carol), signal(at.carol)]),
    ),
    "local while the cloud holds": Attack(
        insert(ada, lambda at: signal(at.ada)), 409, "WX001", CAROL_WRITES
    ),
    # Another user.
    "another user's trader": Attack(
        insert(carol, lambda at: signal(at.dave)), 403, "42501", CAROL_WRITES
    ),
    "another user's trader, by a machine": Attack(
        insert(adas_machine, lambda at: signal(at.bob, at.adas_machine)),
        403,
        "42501",
        MACHINE_WRITES,
    ),
    "status of another user": Attack(
        call(ada, "execution_status", lambda at: at.bob),
        403,
        "42501",
        call(ada, "execution_status", lambda at: at.ada),
    ),
    "status of another user, by GET": Attack(
        Request(ada, "GET", lambda at: f"/rpc/execution_status?p_user_id={at.bob.id}"),
        403,
        "42501",
        Request(service, "GET", lambda at: f"/rpc/execution_status?p_user_id={at.bob.id}"),
    ),
    "status of another user, by a machine": Attack(
        call(adas_machine, "execution_status", lambda at: at.bob),
        403,
        "42501",
        call(adas_machine, "execution_status"),
    ),
    "status without a user": Attack(
        call(anon, "execution_status"), 401, "42501", call(carol, "execution_status")
    ),
    "a visitor writes": Attack(
        insert(anon, lambda at: signal(at.carol)), 401, "42501", CAROL_WRITES
    ),
    # Made-up machines.
    "a machine that is none": Attack(
        insert(
            lambda at: at.app.machine_token(at.ada, at.nobodys_machine),
            lambda at: signal(at.ada, at.nobodys_machine),
        ),
        409,
        "23503",
        MACHINE_WRITES,
    ),
    "a token of no machine, writing as a real one": Attack(
        insert(lambda at: at.app.machine_token(at.ada, at.nobodys_machine), of_ada),
        403,
        "42501",
        MACHINE_WRITES,
    ),
    "another user's machine": Attack(
        insert(
            lambda at: at.app.machine_token(at.ada, at.bobs_machine),
            lambda at: signal(at.ada, at.bobs_machine),
        ),
        409,
        "WX005",
        MACHINE_WRITES,
    ),
    "another user's machine, for that user": Attack(
        insert(
            lambda at: at.app.machine_token(at.ada, at.bobs_machine),
            lambda at: signal(at.bob, at.bobs_machine),
        ),
        403,
        "42501",
        insert(bobs_machine, lambda at: signal(at.bob, at.bobs_machine)),
    ),
    "another secret": Attack(
        insert(signed_otherwise("HS256", "a secret of somebody else, and long"), of_ada),
        401,
        "PGRST301",
        MACHINE_WRITES,
    ),
    "no signature": Attack(
        insert(signed_otherwise("none", ""), of_ada), 401, "PGRST301", MACHINE_WRITES
    ),
    "expired": Attack(insert(forged(expires_in=-3600), of_ada), 401, "PGRST301", MACHINE_WRITES),
    "machine in the metadata": Attack(
        insert(
            lambda at: ada(
                at,
                user_metadata={"machine_id": str(at.adas_machine)},
                app_metadata={"machine_id": str(at.adas_machine)},
            ),
            of_ada,
        ),
        403,
        "42501",
        MACHINE_WRITES,
    ),
    "machine is no uuid": Attack(
        insert(forged(machine_id="mine"), of_ada), 403, "42501", MACHINE_WRITES
    ),
    "machine is empty": Attack(insert(forged(machine_id=""), of_ada), 403, "42501", MACHINE_WRITES),
    "machine is a list": Attack(
        insert(lambda at: ada(at, machine_id=[str(at.adas_machine)]), of_ada),
        403,
        "42501",
        MACHINE_WRITES,
    ),
    "machine is null": Attack(
        insert(forged(machine_id=None), of_ada), 403, "42501", MACHINE_WRITES
    ),
    "a machine writes local": Attack(
        insert(adas_machine, lambda at: signal(at.ada)), 403, "42501", MACHINE_WRITES
    ),
    # The registry.
    "a machine moves to another user": Attack(
        Request(
            adas_machine,
            "PATCH",
            lambda at: f"/cloud_machines?id=eq.{at.adas_machine}",
            lambda at: {"user_id": str(at.dave.id)},
        ),
        403,
        "42501",
        ADA_BEATS,
    ),
    "a machine takes another provider's id": Attack(
        patch(adas_machine, lambda at: at.adas_machine, machine_id="fly-of-bob"),
        403,
        "42501",
        ADA_BEATS,
    ),
    "a machine stops itself": Attack(
        patch(adas_machine, lambda at: at.adas_machine, status="stopped"),
        403,
        "42501",
        patch(service, lambda at: at.adas_machine, status="stopped"),
    ),
    "a machine sends more than its heartbeat": Attack(
        patch(adas_machine, lambda at: at.adas_machine, last_health_check="now", region="iad"),
        403,
        "42501",
        ADA_BEATS,
    ),
    "a machine adds itself again": Attack(
        Request(
            adas_machine,
            "POST",
            "/cloud_machines",
            lambda at: {"id": str(at.adas_machine), "user_id": str(at.ada.id)},
            (("Prefer", "resolution=merge-duplicates"),),
        ),
        403,
        "42501",
        ADA_BEATS,
    ),
    "a machine stops another": Attack(
        patch(adas_machine, lambda at: at.bobs_machine, status="stopped"), 200, None, ADA_BEATS
    ),
    "a machine beats for another": Attack(
        patch(adas_machine, lambda at: at.bobs_machine, last_health_check="2126-01-01T00:00Z"),
        200,
        None,
        ADA_BEATS,
    ),
    "a browser stops its machine": Attack(
        patch(ada, lambda at: at.adas_machine, status="stopped"), 403, "42501", ADA_BEATS
    ),
    "a browser beats for its machine": Attack(
        patch(ada, lambda at: at.adas_machine, last_health_check="2126-01-01T00:00Z"),
        403,
        "42501",
        ADA_BEATS,
    ),
    "a browser adds a machine": Attack(
        Request(
            carol,
            "POST",
            "/cloud_machines",
            lambda at: {"user_id": str(at.carol.id), "status": "running"},
        ),
        403,
        "42501",
        Request(
            service,
            "POST",
            "/cloud_machines",
            lambda at: {"user_id": str(at.carol.id), "status": "starting"},
        ),
    ),
    "a browser deletes its machine": Attack(
        Request(ada, "DELETE", lambda at: f"/cloud_machines?id=eq.{at.adas_machine}"),
        200,
        None,
        Request(service, "DELETE", lambda at: f"/cloud_machines?id=eq.{at.adas_machine}"),
    ),
    # The tables of arbiter, under names that the API might serve; and rows that only others see.
    "schema by header": Attack(
        read(ada, "/leases", Accept_Profile="arbiter"),
        406,
        "PGRST106",
        read(ada, "/signals", Accept_Profile="public"),
    ),
    "schema by header, writing": Attack(
        Request(
            ada,
            "PATCH",
            "/settings?singleton=is.true",
            lambda at: {"heartbeat_timeout": "1 s"},
            (("Content-Profile", "arbiter"),),
        ),
        406,
        "PGRST106",
        read(ada, "/signals", Accept_Profile="public"),
    ),
    "a table of arbiter": Attack(read(ada, "/leases"), 404, "42P01", read(ada, "/signals")),
    "another's machines": Attack(
        Request(ada, "GET", lambda at: f"/cloud_machines?id=eq.{at.bobs_machine}"),
        200,
        None,
        Request(bob, "GET", lambda at: f"/cloud_machines?id=eq.{at.bobs_machine}"),
    ),
    "a function of arbiter": Attack(
        call(ada, "heartbeat"), 404, "PGRST202", call(ada, "execution_status")
    ),
    # Roles that a token may not name.
    "the owner's role": Attack(
        insert(lambda at: at.app.gateway.token("app_owner", at.ada.id), of_ada),
        403,
        "42501",
        MACHINE_WRITES,
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_over_http_is_rejected(at: Stage, name: str) -> None:
    found = ATTACKS[name]
    with at.unchanged():
        answer = found.attack.send(at)
        if found.code is None:
            assert (answer.status_code, answer.json()) == (found.status, [])
        else:
            assert (answer.status_code, answer.json()["code"]) == (found.status, found.code)
    allowed = found.control.send(at)
    assert allowed.status_code in (200, 201), allowed.text
    if found.code is None:
        assert len(allowed.json()) == 1


def test_no_user_confirms_for_another_one(at: Stage) -> None:
    """Bob's machine has failed long ago, so that Bob can confirm."""
    set_status(at.app.backend, at.bobs_machine, "error")
    long_ago = SETTINGS["error_takeover_delay"] * 2
    age(at.app.owner, at.bobs_machine, entered_error=long_ago, heartbeat=long_ago)
    for token, status_code in ((ada, 403), (adas_machine, 403), (anon, 401)):
        with at.unchanged():
            answer = call(token, "confirm_takeover", lambda at: at.bob).send(at)
            assert (answer.status_code, answer.json()["code"]) == (status_code, "42501")
    answer = call(bob, "confirm_takeover").send(at)
    assert answer.status_code == 200
    assert [row["can_write_local"] for row in answer.json()] == [True]


def test_supabase_js_is_no_way_around(at: Stage, node: Node) -> None:
    """A page's own tools: another schema, another user, another machine."""
    with at.unchanged():
        schema, asked, wrote, moved = node.call(
            at.app,
            ada(at),
            [["schema", "arbiter"], ["from", "leases"], ["select", "*"]],
            [["rpc", "execution_status", {"p_user_id": str(at.bob.id)}]],
            [["from", "signals"], ["insert", signal(at.ada, at.adas_machine)]],
            [
                ["from", "cloud_machines"],
                ["update", {"status": "stopped"}],
                ["eq", "id", str(at.bobs_machine)],
                ["select"],
            ],
        )
    assert (schema["status"], schema["error"]["code"]) == (406, "PGRST106")
    assert (asked["status"], asked["error"]["code"]) == (403, "42501")
    assert (wrote["status"], wrote["error"]["code"]) == (403, "42501")
    assert (moved["status"], moved["data"]) == (200, [])

    asked, wrote = node.call(
        at.app,
        adas_machine(at),
        [["rpc", "execution_status"]],
        [["from", "signals"], ["insert", signal(at.ada, at.adas_machine)]],
    )
    assert [row["machine_id"] for row in asked["data"]] == [str(at.adas_machine)]
    assert wrote["status"] == 201


# In SQL ------------------------------------------------------------------------------------------

#: Statements before a write that try to mislead the guard. They succeed and do not help.
#: ``{machine}`` is the machine that the session would like to be.
TRICKS = {
    "request.method": "set request.method = 'POST'",
    "periods": """
        set arbiter.heartbeat_timeout = '1 ms';
        set arbiter.stop_grace = '0';
        set arbiter.mode = 'observe';
        set arbiter.enabled = off""",
    "time zone and style": """
        set timezone = 'Pacific/Kiritimati';
        set datestyle = 'sql, dmy';
        set intervalstyle = 'iso_8601'""",
    "isolation": "set default_transaction_isolation = 'serializable'",
    "row security": "set row_security = off; set row_security = on",
    "tables": """
        create temp table leases as select null::uuid as user_id, 'local' as holder where false;
        create temp table settings as
          select true as singleton, interval '0' as heartbeat_timeout, interval '0' as stop_grace;
        create temp table machine_notes (machine_id uuid);
        create temp view machines as select null::uuid as machine_id;
        create temp table protections (mode text);
        create temp table traders (id uuid, user_id uuid);
        create temp table registry (singleton boolean)""",
    "catalogs": """
        create temp table pg_roles as
          select 1::oid as oid, 'authenticated'::name as rolname, true as rolsuper,
            true as rolbypassrls;
        create temp table pg_proc (proname name);
        create temp table pg_class (relname name);
        create temp table pg_policy (polname name)""",
    "types": """
        create type pg_temp.timestamptz as (at text);
        create domain pg_temp.interval as pg_catalog.text;
        create domain pg_temp.name as pg_catalog.text;
        create type pg_temp.machine as (machine_id text);
        create type pg_temp.leases as (user_id text);
        create type pg_temp.verdict as (code text)""",
    "functions of one's own": """
        create function pg_temp.clock_timestamp() returns timestamptz
          language sql as $$ select timestamptz '2126-01-01' $$;
        create function pg_temp.pg_has_role(oid, name, text) returns boolean
          language sql as $$ select true $$;
        create function pg_temp.current_setting(text, boolean) returns text
          language sql as $$ select 'service_role' $$""",
    "functions in public": """
        create or replace function public.clock_timestamp() returns timestamptz
          language sql as $$ select timestamptz '2126-01-01' $$;
        create or replace function public.format(text, variadic text[]) returns text
          language sql as $$ select 'select 1' $$;
        create or replace function public.jsonb_build_object(variadic text[]) returns jsonb
          language sql as $$ select 'null'::jsonb $$;
        create or replace function public.current_setting(text, boolean) returns text language sql
          as $$
            select case $1 when 'request.jwt.claims'
              then (pg_catalog.current_setting($1)::jsonb || '{"machine_id": "{machine}"}')::text
              else pg_catalog.current_setting($1, $2) end
          $$;
        create or replace function public._rejected(text, jsonb, text) returns arbiter.error
          language sql as $$ select null::arbiter.error $$;
        create or replace function public._error(text, text, text, jsonb, integer)
          returns arbiter.error language sql as $$ select null::arbiter.error $$;
        create or replace function public.uuid_always(uuid, uuid) returns boolean
          language sql as $$ select true $$;
        do $do$ begin
          create operator public.= (leftarg = uuid, rightarg = uuid, function = public.uuid_always);
        exception when duplicate_function then null; end $do$""",
}

SEARCH_PATHS = ("public", "pg_temp, public, pg_catalog", "public, pg_temp, pg_catalog, arbiter")


def write(conn: Conn, row: dict[str, Any]) -> None:
    """Insert a signal in words that mean the same under any search_path and style of dates."""
    query = sql.SQL("insert into public.signals ({}) values ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, row)),
        sql.SQL(", ").join(map(sql.Placeholder, row)),
    )
    conn.execute(query, {**row, "bar_time": datetime.fromisoformat(row["bar_time"])})


def environment(conn: Conn, user_id: str | None = None) -> str:
    """The environment that arbiter.status() tells the session for that user."""
    found: str = value(conn, "select (arbiter.status(%s)).environment", user_id)
    return found


@pytest.mark.parametrize("search_path", SEARCH_PATHS)
@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_in_a_session_helps(at: Stage, trick: str, search_path: str) -> None:
    """Ada is rejected, and not told of Bob; Carol writes in a session that did the same."""
    adas, carols = at.browser(at.ada), at.browser(at.carol)
    for session in (adas, carols):
        session.execute(TRICKS[trick].replace("{machine}", str(at.adas_machine)).encode())
        session.execute(f"set search_path = {search_path}".encode())

    with at.unchanged():
        error = rejection(write, adas, signal(at.ada))
        if trick == "request.method":
            assert error.sqlstate == "PGRST"
            assert error.diag.message_primary is not None
            assert json.loads(error.diag.message_primary)["code"] == "WX001"
        else:
            assert error.sqlstate == "WX001"
        forged = rejection(write, adas, signal(at.ada, at.adas_machine))
        assert forged.sqlstate == "42501"
        assert rejection(environment, adas, at.bob.id).sqlstate == "42501"
        assert environment(adas) == "cloud"

    write(carols, signal(at.carol))
    assert environment(carols) == "local"


#: Statements that the server itself rejects for the roles of the API.
SETTINGS_OF_THE_SERVER = {
    "replication role": "set session_replication_role = replica",
    "the owner": "set role app_owner",
    "the superuser": "set role postgres",
    "authorization": "set session authorization app_owner",
    "a trigger": "alter table public.signals disable trigger all",
    "a policy": "drop policy arbiter_claim on public.signals",
    "a function": "create or replace function arbiter.version() returns text return 'mine'",
    "the schema": "create table arbiter.leases_2 (user_id uuid)",
}


@pytest.mark.parametrize("role", ["anon", "authenticated", "authenticator"])
@pytest.mark.parametrize("name", SETTINGS_OF_THE_SERVER)
def test_the_roles_of_the_api_switch_nothing_off(at: Stage, role: str, name: str) -> None:
    statement = SETTINGS_OF_THE_SERVER[name].encode()
    conn = at.app.db.connect("authenticator", None if role == "authenticator" else role)
    with at.unchanged():
        assert rejection(conn.execute, statement).sqlstate == "42501"
    # The superuser can; it is rolled back.
    superuser = at.app.db.connect("postgres", autocommit=False)
    superuser.execute(statement)
    superuser.rollback()


def test_another_role_of_the_login_is_judged_alike(at: Stage) -> None:
    """The login may become the backend's role, which for the browser may not write either."""
    conn = at.browser(at.ada)
    conn.execute("set role service_role")
    with at.unchanged():
        assert rejection(write, conn, signal(at.ada)).sqlstate == "WX001"
    write(conn, signal(at.carol))


WRITES = {
    "arbiter.leases": "update arbiter.leases set holder = 'local', machine_id = null",
    "arbiter.handovers": "delete from arbiter.handovers",
    "arbiter.settings": "update arbiter.settings set heartbeat_timeout = '1 hour'",
    "arbiter.registry": "update arbiter.registry set states = '{}'",
    "arbiter.protections": "update arbiter.protections set mode = 'observe'",
    "arbiter.machine_notes": "delete from arbiter.machine_notes",
    "arbiter.observations": "delete from arbiter.observations",
}


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize("table", WRITES)
def test_no_browser_writes_what_arbiter_judges_by(at: Stage, role: str, table: str) -> None:
    conn = at.app.db.connect(role=role, claims={"sub": str(at.ada.id), "role": role})
    with at.unchanged():
        assert rejection(conn.execute, WRITES[table].encode()).sqlstate == "42501"
    # The superuser can, without what makes history append-only; it is rolled back.
    superuser = at.app.db.connect("postgres", autocommit=False)
    superuser.execute(f"alter table {table} disable trigger user".encode())
    superuser.execute(WRITES[table].encode())
    superuser.rollback()


def test_a_browser_reads_its_own_lease_and_history_only(at: Stage) -> None:
    for table in ("arbiter.leases", "arbiter.handovers"):
        query = sql.SQL("select distinct user_id from {}").format(sql.Identifier(*table.split(".")))
        assert at.browser(at.ada).execute(query).fetchall() == [(at.ada.id,)]
        everybody = {row[0] for row in at.app.backend.execute(query).fetchall()}
        assert {at.ada.id, at.bob.id} <= everybody
        visitor = at.app.db.connect(role="anon", claims={"sub": str(at.ada.id), "role": "anon"})
        assert rejection(visitor.execute, query).sqlstate == "42501"


# Overloads in the exposed schema ----------------------------------------------------------------

OVERLOADS = {
    "another name": "execution_status(p_user uuid)",
    "another type": "execution_status(p_user_id uuid)",
    "no argument": "execution_status()",
    "a default": "execution_status(p_user_id uuid default null)",
}


@pytest.mark.parametrize("name", OVERLOADS)
def test_an_overload_does_not_answer_for_arbiter(at: Stage, name: str) -> None:
    """Where an app lets its users create functions, the API may call a call ambiguous: not more."""
    function = OVERLOADS[name].encode()
    creator = at.browser(at.carol)
    creator.execute(
        b"create function public." + function + b" returns jsonb language sql"
        b""" as $$ select '{"can_write_local": true, "forged": true}'::jsonb $$"""
    )
    at.app.gateway.reload_schema()
    try:
        for user in (lambda _: None, lambda at: at.ada):
            with at.unchanged():
                answer = call(ada, "execution_status", user).send(at)
                if answer.status_code == 200:
                    assert [row["can_write_local"] for row in answer.json()] == [False]
                else:
                    assert (answer.status_code, answer.json()["code"]) == (300, "PGRST203")
        with at.unchanged():
            answer = insert(ada, lambda at: signal(at.ada)).send(at)
            assert (answer.status_code, answer.json()["code"]) == (409, "WX001")
    finally:
        drop = b"drop function public." + function.replace(b" default null", b"")
        creator.execute(drop)
        at.app.gateway.reload_schema()
    answer = call(ada, "execution_status").send(at)
    assert [row["code"] for row in answer.json()] == ["cloud_active"]


# Through a pooler ---------------------------------------------------------------------------------


def test_a_pooled_connection_forgets_whose_it_was(pooled_app: App) -> None:
    """An identity is a setting of one transaction, so the next request does not inherit it."""
    at = Stage(pooled_app)
    expected = {ada: ["cloud"], carol: ["local"], bobs_machine: ["cloud"]}
    for token in (ada, carol, bobs_machine, carol, ada, bobs_machine) * 5:
        answer = call(token, "execution_status").send(at)
        assert [row["environment"] for row in answer.json()] == expected[token]
        nobody = call(anon, "execution_status").send(at)
        assert (nobody.status_code, nobody.json()["code"]) == (401, "42501")
        with at.unchanged():
            answer = insert(carol, of_ada).send(at)
            assert (answer.status_code, answer.json()["code"]) == (403, "42501")
    assert insert(adas_machine, of_ada).send(at).status_code == 201
