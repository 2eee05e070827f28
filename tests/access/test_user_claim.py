"""Who the session's user is: the claim that arbiter.settings.user_claim names.

Usually that is the signed-in user (``sub``), whose id may be any text. Some apps run one strategy
for each organization: then it is the organization's id, and the lease, the badge and the user's yes
are the organization's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import User, activate, add_signal, add_user, browser, lease, rejection, rows, value

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def owner(templates: Templates) -> Iterator[Conn]:
    """For tests that change nothing but the claim."""
    with templates.clone("installed") as database:
        yield database.connect()


def claimed(conn: Conn, claims: object, path: str = "sub") -> Any:
    """Whom the claims name by that path."""
    with conn.transaction(force_rollback=True):
        conn.execute("update arbiter.settings set user_claim = %s", (path,))
        conn.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))
        return value(conn, "select arbiter.claimed_user_id()")


NAMED = {
    "a uuid": (
        "sub",
        {"sub": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"},
        "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    ),
    "a text": ("sub", {"sub": "auth0|64f1 ü'\"\\{}"}, "auth0|64f1 ü'\"\\{}"),
    "a number": ("sub", {"sub": 42}, "42"),
    "a great number": ("sub", {"sub": 9223372036854775807}, "9223372036854775807"),
    "another claim": ("org_id", {"sub": "ada", "org_id": "org_1"}, "org_1"),
    "a path": ("app_metadata.org_id", {"sub": "ada", "app_metadata": {"org_id": "org_1"}}, "org_1"),
    "a deep path": ("o.1.id", {"o": {"1": {"id": 7}}}, "7"),
    "the short claim of Clerk": ("o.id", {"o": {"id": "org_2abc", "rol": "admin"}}, "org_2abc"),
    "a name with dots": (
        '"https://example.com/claims".org',
        {"https://example.com/claims": {"org": "org_1"}},
        "org_1",
    ),
    "only a name with dots": ('"https://e.com/org"', {"https://e.com/org": "org_1"}, "org_1"),
    "upper and lower case": ("orgId", {"orgid": "wrong", "orgId": "right"}, "right"),
    "a name like SQL": ("x'||'{y},\\", {"x'||'{y},\\": "org_1"}, "org_1"),
    "a name like a word of a template": ("__user(id)", {"__user(id)": "org_1"}, "org_1"),
    # no user
    "missing": ("org_id", {"sub": "ada"}, None),
    "null": ("sub", {"sub": None}, None),
    "empty": ("sub", {"sub": ""}, None),
    "an object": ("app_metadata", {"app_metadata": {"org_id": "org_1"}}, None),
    "a list": ("sub", {"sub": ["ada"]}, None),
    "a list like a uuid": ("sub", {"sub": ["234567-1234-1234-1234-1234567890"]}, None),
    "an object like a uuid": ("sub", {"sub": {"3": "7-9abc-1234-1234-1234567890"}}, None),
    "true": ("sub", {"sub": True}, None),
    "below a text": ("sub.id", {"sub": "ada"}, None),
    "no object": ("sub", ["sub"], None),
    "a name as a path": ("app_metadata.org_id", {"app_metadata.org_id": "org_1"}, None),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_claim_names_the_user(owner: Conn, case: str) -> None:
    path, claims, user = NAMED[case]
    assert claimed(owner, claims, path) == user


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        " ",
        "a b",
        "a\n",
        '"',
        '""',
        '"a',
        'a"b"',
        '"a"b',
        "x" * 201,
        None,
    ],
)
def test_a_path_that_is_none(owner: Conn, path: str | None) -> None:
    call = "update arbiter.settings set user_claim = %s"
    assert rejection(owner.execute, call, (path,)).sqlstate in ("23514", "23502")


def test_without_claims_there_is_no_user(owner: Conn) -> None:
    for claims in ("", "{}"):
        with owner.transaction(force_rollback=True):
            owner.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
            assert value(owner, "select arbiter.claimed_user_id()") is None
            assert value(owner, "select arbiter.claimed_machine_id()") is None


def test_a_machines_claim_is_never_nothing(owner: Conn) -> None:
    """Else its token would be a browser's. Only null and a missing claim are."""
    for claim, machine in (
        ("m-1", "m-1"),
        ("", ""),
        (7, "7"),
        ({}, "{}"),
        (False, "false"),
        (None, None),
        ("C10D0000-0000-4000-8000-000000000001", "c10d0000-0000-4000-8000-000000000001"),
    ):
        with owner.transaction(force_rollback=True):
            claims = json.dumps({"sub": "ada", "machine_id": claim})
            owner.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
            assert value(owner, "select arbiter.claimed_machine_id()") == machine


def test_upper_case_finds_the_same_user(db: Database) -> None:
    """In a claim and in an argument, also of a function for a uuid."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    upper = User(user.id.upper(), user.trader)
    for conn in (browser(db, user), browser(db, upper)):
        found = arbiter_db.status(conn)
        assert (found.environment, found.machine_id) == ("cloud", machine)
        assert arbiter_db.status(conn, upper.id).epoch == found.epoch
        assert value(conn, "select (arbiter.status(%s::uuid)).epoch", upper.id) == found.epoch
        assert rows(conn, "select user_id from arbiter.leases") == [(user.id,)]
        assert len(arbiter_db.handovers(conn, upper.id)) == 2
    claims = {"sub": user.id.upper(), "machine_id": machine.upper()}
    token = db.connect(role="authenticated", claims=claims)
    arbiter_db.heartbeat(token, machine.upper())
    add_signal(token, user.trader, "cloud", machine)


ORGANIZATIONS = """
create table public.machines (
  id text primary key, org_id text unique, status text, last_health_check timestamptz);
create table public.signals (id serial primary key, org_id text not null, by_user text, n integer);
grant usage on schema public to authenticated;
grant all on all tables in schema public to authenticated;
grant all on all sequences in schema public to authenticated;
"""


def test_one_strategy_for_each_organization(bare_db: Database) -> None:
    """Each member sees the organization's state, and may say its yes; others may not."""
    owner = bare_db.connect()
    arbiter_db.install(bare_db.conninfo())
    owner.execute(ORGANIZATIONS)
    arbiter_db.register_machines(owner, "public.machines", user_column="org_id")
    arbiter_db.protect(owner, "public.signals", user_path="org_id")
    owner.execute("update arbiter.settings set user_claim = 'o.id'")
    ada, bob, eve, none = (
        bare_db.connect(role="authenticated", claims={"sub": sub, "o": o})
        for sub, o in (
            ("user_ada", {"id": "org_1"}),
            ("user_bob", {"id": "org_1"}),
            ("user_eve", {"id": "org_2"}),
            ("user_none", None),
        )
    )
    insert = "insert into public.signals (org_id, by_user) values ('org_1', %s)"
    ada.execute(insert, ("user_ada",))
    bob.execute(insert, ("user_bob",))
    owner.execute("insert into public.machines values ('m-1', 'org_1', 'running')")
    for _ in range(2):
        owner.execute("update public.machines set last_health_check = now()")
    for member in (ada, bob):
        found = arbiter_db.status(member)
        assert (found.environment, found.machine_id, found.message) == (
            "cloud",
            "m-1",
            "Cloud active",
        )
        assert rejection(member.execute, insert, ("x",)).sqlstate == "WX001"
        assert rows(member, "select user_id, machine_id from arbiter.leases") == [("org_1", "m-1")]
    assert arbiter_db.status(eve).environment == "local"
    assert rows(eve, "select * from arbiter.leases") == []
    assert rejection(eve.execute, "select arbiter.status('org_1')").sqlstate == "42501"
    assert rejection(none.execute, "select arbiter.status()").sqlstate == "22023"
    # The user's own id means nothing any more.
    assert rejection(ada.execute, "select arbiter.status('user_ada')").sqlstate == "42501"

    owner.execute("update public.machines set status = 'error'")
    owner.execute(
        "update arbiter.machine_notes set entered_error_at = entered_error_at - %s,"
        " left_running_at = left_running_at - %s",
        (timedelta(hours=1), timedelta(hours=1)),
    )
    assert arbiter_db.status(bob).code == "takeover_unconfirmed"
    assert rejection(eve.execute, "select arbiter.confirm_takeover('org_1')").sqlstate == "42501"
    assert rejection(eve.execute, "select arbiter.confirm_takeover()").sqlstate == "55000"
    confirmed = value(bob, "select arbiter.confirm_takeover()")
    assert "Browser mode" in str(confirmed)
    ada.execute(insert, ("user_ada",))
    audit = arbiter_db.audit(owner, "public.signals")
    assert (audit.findings, audit.proved) == ([], 3)


def test_a_change_of_the_claim_counts_at_once(db: Database) -> None:
    """In open sessions, too; and it takes no privilege from clients."""
    owner = db.connect()
    user = add_user(owner)
    activate(owner, user)
    claims = {"sub": "nobody", "org_id": user.id}
    conn = db.connect(role="authenticated", claims=claims)
    assert arbiter_db.status(conn).environment == "local"
    owner.execute("update arbiter.settings set user_claim = 'org_id'")
    assert arbiter_db.status(conn).environment == "cloud"
    assert rows(conn, "select user_id from arbiter.leases") == [(user.id,)]
    machine = lease(owner, user).machine_id
    backend = db.connect(role="service_role")
    arbiter_db.heartbeat(backend, machine)
    assert len(arbiter_db.handovers(backend, user.id)) == 2
    # An install keeps it.
    arbiter_db.install(db.conninfo())
    assert arbiter_db.status(conn).environment == "cloud"


def test_doctor_sees_a_change_past_the_trigger(db: Database) -> None:
    owner = db.connect()
    doctor = "select state, problem, remedy from arbiter.doctor() where object = %s"
    function = "generated function arbiter.claimed_user_id"
    assert rows(owner, doctor, function) == []
    owner.execute("alter table arbiter.settings disable trigger user")
    owner.execute("update arbiter.settings set user_claim = 'org_id'")
    said = ("outdated", "It does not hold the user_claim of arbiter.settings.")
    assert rows(owner, doctor, function) == [(*said, "Run: arbiter-db install")]
    arbiter_db.install(db.conninfo())
    assert rows(owner, doctor, function) == []
