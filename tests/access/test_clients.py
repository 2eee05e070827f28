"""Who is a client: Supabase's roles and those that the owner has named; PUBLIC may do nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from catalog import assert_same, dump, schema
from click.testing import CliRunner
from psycopg import sql
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    backend,
    beat,
    lease,
    rejection,
    rows,
    set_status,
    value,
)

import arbiter_db
from arbiter_db.cli import main

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: A login of no meaning to Supabase, with a name that has to be quoted.
LOGIN = "My client"

HASH = re.compile(r" \[[0-9a-f]{32}\]")

#: What PUBLIC may do with arbiter's objects; a null ACL gives it every function.
PUBLIC = """
select p.oid::regprocedure::text as object, a.privilege_type as privilege
  from pg_proc p
  cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
 where a.grantee = 0
   and (p.pronamespace = 'arbiter'::regnamespace
        or p.oid in (select e.function_name from arbiter._exposed() e))
union all
select c.oid::regclass::text, a.privilege_type
  from pg_class c
  cross join aclexplode(c.relacl) a
 where a.grantee = 0 and c.relnamespace = 'arbiter'::regnamespace
union all
select format('%s.%s', t.attrelid::regclass, t.attname), a.privilege_type
  from pg_attribute t
  join pg_class c on c.oid = t.attrelid and c.relnamespace = 'arbiter'::regnamespace
  cross join aclexplode(t.attacl) a
 where a.grantee = 0
union all
select 'schema arbiter', a.privilege_type
  from pg_namespace n
  cross join aclexplode(n.nspacl) a
 where a.grantee = 0 and n.nspname = 'arbiter'
"""

#: What an earlier version gave to PUBLIC.
GIVEN = """
grant usage on schema arbiter to public;
grant execute on function arbiter.status(text), arbiter.confirm_takeover(text),
  arbiter.heartbeat(text), arbiter.heartbeats(text[]), arbiter.claimed_user_id(),
  arbiter.claimed_machine_id(), arbiter.version() to public;
grant select on arbiter.settings, arbiter.registry to public;
grant select, update (heartbeat_at) on arbiter.machines to public;
"""


@contextmanager
def role_named(db: Database, name: str, attributes: str = "login") -> Iterator[None]:
    """The role exists until the end, or until the test drops it."""
    superuser = db.connect("postgres")
    role = sql.Identifier(name)
    superuser.execute(sql.SQL("create role {} " + attributes).format(role))
    try:
        yield
    finally:
        if value(superuser, "select to_regrole(%s) is not null", f'"{name}"'):
            superuser.execute(sql.SQL("drop owned by {}").format(role))
            superuser.execute(sql.SQL("drop role {}").format(role))


@pytest.fixture
def login(db: Database) -> Iterator[str]:
    """A plain login without any rights."""
    with role_named(db, LOGIN):
        yield LOGIN


def claiming(db: Database, user: User, **claims: str) -> Conn:
    """The login's connection; it says itself whose session it is."""
    return db.connect(LOGIN, claims={"sub": str(user.id), **claims})


def in_error(db: Database) -> User:
    """A user whose machine has failed so long ago that a takeover can be confirmed."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(backend(db), user)
    set_status(backend(db), machine, "error")
    long_ago = 2 * SETTINGS["error_takeover_delay"]
    age(owner, machine, heartbeat=long_ago, left_running=long_ago, entered_error=long_ago)
    return user


CALLS = [
    "select * from arbiter.status()",
    "select * from arbiter.confirm_takeover()",
    "select arbiter.heartbeat(gen_random_uuid())",
    "select arbiter.heartbeats(array[gen_random_uuid()::text])",
    "select arbiter.version()",
    "select arbiter.claimed_user_id()",
    "select * from arbiter.settings",
    "select * from arbiter.registry",
    "select * from arbiter.machines",
    "select * from arbiter.leases",
    "select * from arbiter.client_roles",
]


@pytest.mark.parametrize("call", CALLS)
def test_a_plain_login_calls_nothing(db: Database, login: str, call: str) -> None:
    """It can set request.jwt.claims itself, and so would speak for any user."""
    user = in_error(db)
    assert rejection(claiming(db, user).execute, call).sqlstate == "42501"
    assert lease(db.connect(), user).holder == "cloud"


def test_a_named_role_speaks_for_the_user_of_its_claims(db: Database, login: str) -> None:
    """The twin of the test above, and only for that user."""
    db.connect().execute("select arbiter.add_client_role(%s)", (login,))
    user = in_error(db)
    other = add_user(db.connect())
    conn = claiming(db, user)
    forged = "select arbiter.confirm_takeover(%s)"
    assert rejection(conn.execute, forged, (other.id,)).sqlstate == "42501"
    assert value(conn, "select environment from arbiter.confirm_takeover()") == "local"
    assert [row.user_id for row in rows(conn, "select * from arbiter.leases")] == [user.id]
    assert value(conn, "select arbiter.version()") == arbiter_db.__version__
    for closed in ("machine_notes", "observations", "protections", "client_roles"):
        error = rejection(conn.execute, f"select * from arbiter.{closed}")
        assert error.sqlstate == "42501", closed


def test_public_may_do_nothing(db: Database) -> None:
    owner = db.connect()
    owner.execute("select arbiter.expose()")
    assert rows(owner, PUBLIC) == []


def test_an_install_takes_back_what_an_earlier_version_gave_to_public(db: Database) -> None:
    owner = db.connect()
    before = schema(db.conninfo())
    owner.execute(GIVEN.encode())
    assert len(rows(owner, PUBLIC)) >= 11
    arbiter_db.install(db.conninfo())
    assert rows(owner, PUBLIC) == []
    assert_same(before, schema(db.conninfo()))


def test_a_heartbeat_needs_no_rights_on_arbiter(db: Database, login: str) -> None:
    """A role that the app lets update its registry, with a clock that was set back."""
    owner = db.connect()
    user = add_user(owner)
    machine = add_machine(owner, user, "running")
    superuser = db.connect("postgres")
    superuser.execute(
        sql.SQL(
            "grant select, update on public.cloud_machines to {0};"
            "create policy login on public.cloud_machines to {0} using (true)"
        ).format(sql.Identifier(login))
    )
    beat(owner, machine)
    owner.execute("alter table public.cloud_machines disable trigger user")
    owner.execute(
        "update public.cloud_machines set last_health_check = clock_timestamp() + interval '1 s'"
    )
    owner.execute("alter table public.cloud_machines enable trigger user")
    owner.execute('alter table public.cloud_machines enable always trigger "~arbiter_stamp_update"')
    later = value(owner, "select last_health_check from public.cloud_machines")
    assert beat(db.connect(login), machine) == later


# -- the policies ---------------------------------------------------------------------------------

OPEN = """
grant usage on schema public to {0};
grant select, insert, update, delete on all tables in schema public to {0};
create policy of_the_app on public.signals to {0} using (true) with check (true);
create policy of_the_app on public.cloud_machines to {0} using (true) with check (true);
create policy of_the_app on public.traders to {0} using (true) with check (true);
"""


@pytest.mark.parametrize("is_named", [False, True])
def test_a_named_role_claims_what_its_token_says(db: Database, login: str, is_named: bool) -> None:
    """As a browser it is never the cloud, in spite of the app's policies."""
    owner = db.connect()
    db.connect("postgres").execute(sql.SQL(OPEN).format(sql.Identifier(login)))
    if is_named:
        owner.execute("select arbiter.add_client_role(%s)", (login,))
    user = add_user(owner)
    machine = activate(backend(db), user)

    def cloud_write() -> None:
        add_signal(claiming(db, user), user.trader, "cloud", machine)

    def status_word() -> None:
        set_status(claiming(db, user), machine, "running")

    for attack in (cloud_write, status_word):
        if is_named:
            assert rejection(attack).sqlstate == "42501"
        else:  # the app's own policies are all there is
            attack()
    add_signal(claiming(db, user, machine_id=str(machine)), user.trader, "cloud", machine)


# -- install, upgrade, uninstall ------------------------------------------------------------------


def test_updates_by_a_named_role_are_noted(db: Database, login: str) -> None:
    """As those by Supabase's, where only inserts are arbitrated."""
    owner = db.connect()
    owner.execute("revoke update on public.signals from anon, authenticated")
    owner.execute(sql.SQL("grant update on public.signals to {}").format(sql.Identifier(login)))
    owner.execute(
        sql.SQL("create policy mine on public.signals for update to {} using (true)").format(
            sql.Identifier(login)
        )
    )
    noted = "select count(*) from arbiter.doctor() where object = 'updates of public.signals'"
    assert value(owner, noted) == 0
    owner.execute("select arbiter.add_client_role(%s)", (login,))
    assert value(owner, noted) == 1


def named(db: Database) -> list[str]:
    return [row.role for row in rows(db.connect(), "select * from arbiter.client_roles order by 1")]


def test_the_installer_names_roles_and_keeps_them(trading_db: Database) -> None:
    with role_named(trading_db, LOGIN), role_named(trading_db, "reader", "nologin"):
        arbiter_db.install(trading_db.conninfo(), client_roles=[LOGIN])
        user = add_user(trading_db.connect())
        conn = claiming(trading_db, user)
        assert value(conn, "select environment from arbiter.status()") == "local"
        first = dump(trading_db.conninfo(), "--schema-only")
        arbiter_db.install(trading_db.conninfo())
        assert_same(first, schema(trading_db.conninfo()))
        named_too = ["--client-role", "reader", "--client-role", LOGIN]
        result = CliRunner().invoke(main, ["install", "--dsn", trading_db.conninfo(), *named_too])
        assert result.exit_code == 0, result.output
        assert named(trading_db) == [LOGIN, "reader"]
        trading_db.connect().execute("select arbiter.remove_client_role('reader')")
        assert_same(first, schema(trading_db.conninfo()))


def test_an_unnamed_role_gets_nothing(trading_db: Database) -> None:
    """And with a named one only that one gets what it needs."""
    with role_named(trading_db, LOGIN), role_named(trading_db, "reader"):
        arbiter_db.install(trading_db.conninfo(), client_roles=[LOGIN])
        error = rejection(trading_db.connect("reader").execute, "select arbiter.version()")
        assert error.sqlstate == "42501"


def test_the_uninstaller_leaves_nothing_of_a_named_role(trading_db: Database) -> None:
    with role_named(trading_db, LOGIN):
        before = schema(trading_db.conninfo())
        arbiter_db.install(trading_db.conninfo(), client_roles=[LOGIN])
        trading_db.connect().execute("select arbiter.expose()")
        arbiter_db.uninstall(trading_db.conninfo(), drop_columns=True)
        assert_same(before, schema(trading_db.conninfo()))
        # Nothing depends on it any more.
        drop = sql.SQL("drop role {}").format(sql.Identifier(LOGIN))
        trading_db.connect("postgres").execute(drop)


def test_a_role_that_does_not_exist(trading_db: Database) -> None:
    """Nothing was changed: not even the schema is there."""
    before = dump(trading_db.conninfo())
    with pytest.raises(arbiter_db.InstallError) as caught:
        arbiter_db.install(trading_db.conninfo(), client_roles=["nobody"])
    assert caught.value.sqlstate == "42704"
    assert "there is no role nobody" in str(caught.value)
    assert_same(before, dump(trading_db.conninfo()))


@pytest.mark.parametrize("role", ["nobody", "public", None])
def test_a_role_that_cannot_be_named(db: Database, role: str | None) -> None:
    before = dump(db.conninfo())
    error = rejection(db.connect().execute, "select arbiter.add_client_role(%s)", (role,))
    assert error.sqlstate == "42704"
    with pytest.raises(arbiter_db.InstallError):
        arbiter_db.install(db.conninfo(), client_roles=["nobody"])
    assert_same(before, dump(db.conninfo()))


def test_a_role_that_is_dropped_later(db: Database) -> None:
    """doctor() says so, an install goes on, and a new role of that name is named again."""
    owner = db.connect()
    with role_named(db, LOGIN):
        owner.execute("select arbiter.add_client_role(%s)", (LOGIN,))
        before = schema(db.conninfo())
        assert [r for r in rows(owner, "select * from arbiter.doctor()") if LOGIN in r.object] == []
    found = [r for r in rows(owner, "select * from arbiter.doctor()") if r.state != "ok"]
    (row,) = [r for r in found if r.object == f'client role "{LOGIN}"']
    assert row.state == "missing"
    arbiter_db.install(db.conninfo())
    assert named(db) == [LOGIN]
    with role_named(db, LOGIN):
        arbiter_db.install(db.conninfo())
        # The hash of a policy has the ids of its roles.
        assert_same(HASH.sub("", before), HASH.sub("", schema(db.conninfo())))
    owner.execute(row.remedy.encode())
    assert named(db) == []


def test_only_the_owner_names_roles(db: Database) -> None:
    for role in ("anon", "authenticated", "service_role"):
        for call in ("add_client_role", "remove_client_role"):
            conn = db.connect(role=role)
            error = rejection(conn.execute, f"select arbiter.{call}('anon')")
            assert error.sqlstate == "42501"


def test_without_the_roles_of_supabase(db: Database) -> None:
    """Only what was named: no policy and no grant before, and none of the roles' names counts."""
    superuser = db.connect("postgres")
    counts = """
        select (select count(*) from arbiter._policies()) as policies,
               (select count(*) from arbiter._client_roles()) as roles
    """
    with superuser.transaction(force_rollback=True):
        superuser.execute("alter role anon rename to was_anon")
        superuser.execute("alter role service_role rename to was_service_role")
        assert tuple(rows(superuser, counts)[0]) == (0, 0)
        superuser.execute("select arbiter.add_client_role('was_anon')")
        assert value(superuser, "select role from arbiter._client_roles()") == "was_anon"
        roles = rows(
            superuser,
            "select distinct polroles::regrole[]::text as r from pg_policy p"
            " where starts_with(polname, 'arbiter')",
        )
        assert [row.r for row in roles] == ["{was_anon}"]
        may = "select has_function_privilege('authenticated', 'arbiter.status(uuid)', 'execute')"
        assert value(superuser, may) is False
