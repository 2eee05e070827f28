"""Row security for browsers and machines' tokens: who may claim what, and read what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    backend,
    beat,
    browser,
    count_rows,
    rejection,
    rows,
    status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: The app lets owners do anything, as many apps do.
GENEROUS = """
create policy machines_own on public.cloud_machines for all to authenticated
  using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
grant all on public.cloud_machines, public.signals to anon, authenticated
"""

NAMES = "select polname || ' on ' || polrelid::regclass from pg_policy where polname ~ '^arbiter_'"


def token(db: Database, user: str | None, machine: object, role: str = "authenticated") -> Conn:
    """A connection with the claims of a machine's token."""
    claims = {"role": role, "machine_id": str(machine)}
    if user is not None:
        claims["sub"] = str(user)
    return db.connect(role=role, claims=claims)


def names(conn: Conn) -> set[str]:
    """The policies of arbiter, with their tables."""
    return {row[0] for row in rows(conn, NAMES)}


# Protected tables --------------------------------------------------------------------------------


def test_a_browser_cannot_claim_to_be_its_running_machine(db: Database) -> None:
    """Without the policy it can: the guard sees a machine that holds, and a row of its user."""
    owner = db.connect()
    user = add_user(owner)
    machine = activate(backend(db), user)
    error = rejection(add_signal, browser(db, user), user.trader, "cloud", machine)
    assert error.sqlstate == "42501"
    assert "arbiter_claim" in str(error)
    assert count_rows(owner, "public.signals") == 0

    owner.execute("drop policy arbiter_claim on public.signals")
    add_signal(browser(db, user), user.trader, "cloud", machine)
    assert count_rows(owner, "public.signals") == 1


def test_a_generous_policy_of_the_app_changes_nothing(db: Database) -> None:
    """No permissive policy of the app undoes a restrictive one."""
    owner = db.connect()
    user = add_user(owner)
    owner.execute(
        "create policy anything on public.signals to anon, authenticated"
        " using (true) with check (true)"
    )
    machine = activate(backend(db), user)
    for role in ("anon", "authenticated"):
        owner.execute(f"grant insert on public.signals to {role}".encode())
        conn = db.connect(role=role, claims={"sub": str(user.id), "role": role})
        assert rejection(add_signal, conn, user.trader, "cloud", machine).sqlstate == "42501"
        assert rejection(add_signal, conn, user.trader, "local", machine).sqlstate == "42501"
    assert count_rows(owner, "public.signals") == 0


def test_updates_are_the_apps_business_where_only_inserts_are_arbitrated(db: Database) -> None:
    """A user dismisses the machine's signal while it holds, and deletes it, as the app allows."""
    owner = db.connect()
    user, other = add_user(owner), add_user(owner)
    machine = activate(backend(db), user)
    signal = add_signal(backend(db), user.trader, "cloud", machine)
    dismiss = "update public.signals set signal = 'dismissed' where id = %s"
    conn = browser(db, user)
    assert browser(db, other).execute(dismiss, (signal,)).rowcount == 0
    assert conn.execute(dismiss, (signal,)).rowcount == 1
    # Who wrote it stays.
    for claim in ("source = 'local'", "machine_id = null", "arbiter_xid = pg_current_xact_id()"):
        error = rejection(conn.execute, f"update public.signals set {claim}".encode())
        assert error.sqlstate == "WX006"
    assert value(owner, "select signal || source from public.signals") == "dismissedcloud"
    owner.execute("grant delete on public.signals to authenticated")
    owner.execute("create policy away on public.signals for delete to authenticated using (true)")
    assert conn.execute("delete from public.signals where id = %s", (signal,)).rowcount == 1


def test_an_upsert_is_an_update_of_the_older_row(db: Database) -> None:
    """Nothing tells the server's triggers which of both it was; {insert,update} arbitrates it."""
    owner = db.connect()
    user = add_user(owner)
    conn = browser(db, user)
    add_signal(conn, user.trader)
    activate(backend(db), user)
    again = (
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " select trader_id, symbol, interval, 'sell', bar_time from public.signals"
        " on conflict on constraint signals_bar_key do update set signal = excluded.signal"
    )
    assert conn.execute(again).rowcount == 1
    assert value(owner, "select signal from public.signals") == "sell"
    assert rejection(add_signal, conn, user.trader).sqlstate == "WX001"

    owner.execute("update public.signals set signal = 'buy'")
    owner.execute("select arbiter.protect('public.signals', p_verbs => '{insert,update}')")
    assert rejection(conn.execute, again).sqlstate == "WX001"
    assert value(owner, "select signal from public.signals") == "buy"


def test_a_browser_takes_over_a_row_by_saying_so(db: Database) -> None:
    """Where updates are arbitrated, the new row says who writes."""
    owner = db.connect()
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    user = add_user(owner)
    machine = activate(backend(db), user)
    backend(db).execute(
        "insert into public.positions (user_id, symbol, source, machine_id)"
        " values (%s, 'BTC', 'cloud', %s)",
        (user.id, machine),
    )
    conn = browser(db, user)
    # Not even a column that says nothing about who wrote it.
    assert rejection(conn.execute, "update public.positions set quantity = 1").sqlstate == "42501"
    claim = "update public.positions set quantity = 1, source = 'local', machine_id = null"
    assert rejection(conn.execute, claim).sqlstate == "WX001"
    assert value(owner, "select quantity from public.positions") == 0


def test_a_partition_has_the_policy_too(db: Database) -> None:
    """The API serves partitions like tables."""
    owner = db.connect()
    owner.execute("""
        create table public.trades (user_id uuid not null, day date not null)
          partition by range (day);
        create table public.trades_2026 partition of public.trades
          for values from ('2026-01-01') to ('2027-01-01');
        alter table public.trades_2026 enable row level security;
        create policy own on public.trades_2026 using (true) with check (true);
        grant all on public.trades, public.trades_2026 to authenticated;
        select arbiter.protect('public.trades')""")
    user = add_user(owner)
    machine = activate(backend(db), user)
    insert = (
        "insert into public.trades_2026 (user_id, day, source, machine_id)"
        " values (%s, '2026-03-01', 'cloud', %s)"
    )
    error = rejection(browser(db, user).execute, insert, (user.id, machine))
    assert error.sqlstate == "42501"
    assert count_rows(owner, "public.trades") == 0


# Tokens of machines ------------------------------------------------------------------------------


def test_a_machines_token_writes_as_that_machine(db: Database) -> None:
    """It writes neither as a browser nor as another machine."""
    owner = db.connect()
    user, other = add_user(owner), add_user(owner)
    machine, stranger = activate(backend(db), user), activate(backend(db), other)
    conn = token(db, user.id, machine)
    add_signal(conn, user.trader, "cloud", machine)
    assert rejection(add_signal, conn, user.trader).sqlstate == "42501"
    assert rejection(add_signal, conn, user.trader, "cloud", stranger).sqlstate == "42501"
    assert rejection(add_signal, conn, other.trader, "cloud", machine).sqlstate == "42501"
    assert count_rows(owner, "public.signals") == 1


def test_a_made_up_machine_gets_nothing(db: Database) -> None:
    """A token of an unknown machine, of another user's machine, and one that is no uuid."""
    owner = db.connect()
    user, other = add_user(owner), add_user(owner)
    machine = activate(backend(db), other)
    unknown = str(uuid4())
    error = rejection(add_signal, token(db, user.id, unknown), user.trader, "cloud", unknown)
    assert error.sqlstate == "23503"  # the foreign key is asked first
    error = rejection(add_signal, token(db, user.id, machine), user.trader, "cloud", machine)
    assert error.sqlstate == "WX005"
    no_machines: list[object] = ["me", "", {}, [], 0, False]
    for no_machine in no_machines:
        claims = {"role": "authenticated", "sub": user.id, "machine_id": no_machine}
        conn = db.connect(role="authenticated", claims=claims)
        assert rejection(add_signal, conn, user.trader).sqlstate == "42501"
    assert count_rows(owner, "public.signals") == 0


def test_what_a_user_may_edit_makes_no_machine(db: Database) -> None:
    """Only the claim itself counts, not the metadata beside it."""
    user = add_user(db.connect())
    machine = activate(backend(db), user)
    metadata = {"machine_id": str(machine)}
    claims = {"sub": str(user.id), "user_metadata": metadata, "app_metadata": metadata}
    conn = db.connect(role="authenticated", claims=claims)
    assert rejection(add_signal, conn, user.trader, "cloud", machine).sqlstate == "42501"


def test_a_machines_token_sends_its_heartbeat(db: Database) -> None:
    """By a plain update and by the function; the machine then holds the lease."""
    user = add_user(db.connect())
    machine = add_machine(backend(db), user, "running")
    conn = token(db, user.id, machine)
    beat(conn, machine)
    conn.execute("select arbiter.heartbeat(%s::uuid)", (machine,))
    assert status(conn)["environment"] == "cloud"


def test_a_machines_token_touches_no_other_machine(db: Database) -> None:
    """Nor does it move its own to another user, whose lease it would take.

    The app's own policy allows everything, so each of these works without arbiter's policies.
    """
    owner = db.connect()
    owner.execute(
        "create policy anything on public.cloud_machines to authenticated"
        " using (true) with check (true)"
    )
    user, other, third = add_user(owner), add_user(owner), add_user(owner)
    machine, stranger = activate(backend(db), user), activate(backend(db), other)
    conn = token(db, user.id, machine)
    error = rejection(conn.execute, "select arbiter.heartbeat(%s::uuid)", (stranger,))
    assert error.sqlstate == "P0002"
    stop = "update public.cloud_machines set status = 'stopped' where id = %s"
    assert conn.execute(stop, (stranger,)).rowcount == 0
    move = "update public.cloud_machines set user_id = %s where id = %s"
    assert rejection(conn.execute, move, (third.id, machine)).sqlstate == "42501"
    found = rows(owner, "select id, user_id, status from public.cloud_machines")
    assert {tuple(row) for row in found} == {
        (machine, user.id, "running"),
        (stranger, other.id, "running"),
    }

    owner.execute("drop policy arbiter_registry_update on public.cloud_machines")
    owner.execute('drop trigger "!arbiter_limit" on public.cloud_machines')
    conn.execute("select arbiter.heartbeat(%s::uuid)", (stranger,))
    assert conn.execute(stop, (stranger,)).rowcount == 1
    assert conn.execute(move, (third.id, machine)).rowcount == 1


# The registry ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "update public.cloud_machines set status = 'stopped'",
        "update public.cloud_machines set last_health_check = now()",
        "update public.cloud_machines set region = 'iad'",
        "update arbiter.machines set heartbeat_at = now()",
        "select arbiter.heartbeat(id) from public.cloud_machines",
        "insert into public.cloud_machines (user_id, status, last_health_check)"
        " values ((select auth.uid()), 'running', now())",
    ],
)
def test_a_browser_cannot_write_the_registry(db: Database, statement: str) -> None:
    """Although the app's own policy lets owners do anything; without ours it works."""
    owner = db.connect()
    owner.execute(GENEROUS)
    user = add_user(owner)
    if "insert" not in statement:
        activate(backend(db), user)
    before = rows(owner, "select id, status, last_health_check, region from public.cloud_machines")
    conn = browser(db, user)
    assert rejection(conn.execute, statement).sqlstate == "42501"
    after = rows(owner, "select id, status, last_health_check, region from public.cloud_machines")
    assert after == before

    for name in ("insert", "update", "delete"):
        owner.execute(f"drop policy arbiter_registry_{name} on public.cloud_machines".encode())
    conn.execute(statement.encode())


def test_a_browser_cannot_delete_its_machine(db: Database) -> None:
    """A deletion would free the lease after the stop's grace while the machine trades on."""
    owner = db.connect()
    owner.execute(GENEROUS)
    user = add_user(owner)
    activate(backend(db), user)
    conn = browser(db, user)
    assert conn.execute("delete from public.cloud_machines").rowcount == 0
    owner.execute("drop policy arbiter_registry_delete on public.cloud_machines")
    assert conn.execute("delete from public.cloud_machines").rowcount == 1


def test_the_apps_own_way_for_machines_stays_the_only_one(db: Database) -> None:
    """Two permissive policies would both be checked for each row."""
    owner = db.connect()
    assert "arbiter_machine_update on cloud_machines" in names(owner)
    owner.execute(GENEROUS)
    arbiter_db.install(db.conninfo())
    assert "arbiter_machine_update on cloud_machines" not in names(owner)
    user = add_user(owner)
    machine = add_machine(backend(db), user, "running")
    beat(token(db, user.id, machine), machine)


# Leases and handovers ----------------------------------------------------------------------------


def test_users_read_what_is_theirs(db: Database) -> None:
    """Users read only their own lease and handovers; visitors read none."""
    owner = db.connect()
    user, other = add_user(owner), add_user(owner)
    for one in (user, other):
        activate(backend(db), one)
    for table in ("leases", "handovers"):
        query = f"select distinct user_id from arbiter.{table}"
        assert [row[0] for row in rows(browser(db, user), query)] == [user.id]
        assert {row[0] for row in rows(backend(db), query)} == {user.id, other.id}
        assert rejection(db.connect(role="anon").execute, query).sqlstate == "42501"


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize(
    "statement",
    [
        "update arbiter.leases set holder = 'local', machine_id = null, epoch = epoch + 1",
        "delete from arbiter.handovers",
        "insert into arbiter.leases (user_id, epoch, holder, held_since)"
        " values (gen_random_uuid(), 1, 'local', now())",
        "update arbiter.settings set heartbeat_timeout = '100 ms', heartbeat_interval = '50 ms'",
        "update arbiter.protections set mode = 'observe'",
        "update arbiter.registry set states = '{}'",
        "update arbiter.machine_notes set left_running_at = null",
        "select arbiter.unprotect('public.signals')",
        "select arbiter.expose()",
        "truncate arbiter.leases",
    ],
)
def test_browsers_write_nothing_of_arbiter(db: Database, role: str, statement: str) -> None:
    """The lease, the history, the settings."""
    user = add_user(db.connect())
    activate(backend(db), user)
    conn = db.connect(role=role, claims={"sub": str(user.id)})
    assert rejection(conn.execute, statement).sqlstate == "42501"


# In place ----------------------------------------------------------------------------------------


def test_policies_come_and_go_with_what_they_are_for(db: Database) -> None:
    """protect, unprotect and a new registry; an uninstall leaves none."""
    owner = db.connect()
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    assert "arbiter_claim on positions" in names(owner)
    owner.execute("select arbiter.unprotect('public.positions')")
    assert "arbiter_claim on positions" not in names(owner)
    owner.execute("create table public.user_fly_apps (like public.cloud_machines including all)")
    owner.execute("select arbiter.unprotect('public.signals')")
    owner.execute("select arbiter.register_machines('public.user_fly_apps')")
    assert names(owner) == {
        "arbiter_machine_update on user_fly_apps",
        "arbiter_registry_delete on user_fly_apps",
        "arbiter_registry_insert on user_fly_apps",
        "arbiter_registry_update on user_fly_apps",
        "arbiter_own on arbiter.leases",
        "arbiter_own on arbiter.handovers",
    }
    arbiter_db.uninstall(db.conninfo())
    assert names(owner) == set()


def test_a_policy_of_the_app_with_such_a_name_is_left_alone(db: Database) -> None:
    """Only what was made here is dropped."""
    owner = db.connect()
    owner.execute("create policy arbiter_of_the_app on public.positions using (true)")
    arbiter_db.install(db.conninfo())
    assert "arbiter_of_the_app on positions" in names(owner)


@pytest.mark.parametrize(
    ("statement", "state", "remedy"),
    [
        ("drop policy arbiter_claim on public.signals", "missing", "Run: arbiter-db install"),
        (
            "alter policy arbiter_claim on public.signals with check (true)",
            "outdated",
            "Run: arbiter-db install",
        ),
        (
            "alter policy arbiter_claim on public.signals to anon",
            "outdated",
            "Run: arbiter-db install",
        ),
        (
            "alter table public.signals disable row level security",
            "disabled",
            "alter table public.signals enable row level security",
        ),
    ],
)
def test_drift_is_reported_and_mended(
    db: Database, statement: str, state: str, remedy: str
) -> None:
    """By the doctor, with the statement that mends it."""
    owner = db.connect()
    query = "select state, remedy from arbiter.doctor() where object ~ '^policy '"
    assert rows(owner, query) == []
    owner.execute(statement.encode())
    assert [tuple(row) for row in rows(owner, query)] == [(state, remedy)]
    if remedy.startswith("alter"):
        owner.execute(remedy.encode())
    else:
        arbiter_db.install(db.conninfo())
    assert rows(owner, query) == []


def test_an_install_that_changes_nothing_makes_no_policy_anew(db: Database) -> None:
    """Creating a policy would wait for every session that uses the table."""
    owner = db.connect()
    query = "select oid, polname from pg_policy order by oid"
    before = rows(owner, query)
    assert {"arbiter_claim", "arbiter_own"} < {row.polname for row in before}
    arbiter_db.install(db.conninfo())
    assert rows(owner, query) == before


def test_without_the_roles_there_are_no_policies(db: Database) -> None:
    """Plain PostgreSQL has no browser roles; nothing is granted then, and nothing hidden."""
    conn = db.connect("postgres", autocommit=False)
    conn.execute("alter role anon rename to nobody_else")
    conn.execute("select arbiter._build_policies()")
    assert names(conn) == set()
    conn.rollback()
    assert names(conn) != set()


# Errors inside a request of PostgREST ------------------------------------------------------------


def test_a_request_gets_the_rejection_in_postgrests_words(db: Database) -> None:
    """What PostgREST makes an HTTP 409 of; in plain SQL it stays what it is."""
    user = add_user(db.connect())
    activate(backend(db), user)
    plain = rejection(add_signal, browser(db, user), user.trader)
    assert plain.sqlstate == "WX001"

    conn = browser(db, user)
    conn.execute("select set_config('request.method', 'POST', false)")
    error = rejection(add_signal, conn, user.trader)
    assert error.sqlstate == "PGRST"
    body = json.loads(error.diag.message_primary or "")
    assert json.loads(error.diag.message_detail or "") == {"status": 409, "headers": {}}
    assert body["details"] == plain.diag.message_detail
    assert (body["code"], body["message"], body["hint"]) == (
        "WX001",
        plain.diag.message_primary,
        plain.diag.message_hint,
    )
    assert count_rows(db.connect(), "public.signals") == 0


def test_user_of_another_name(db: Database) -> None:
    """A sub that is no uuid is a user like any other, without a lease where ids are uuids."""
    user = add_user(db.connect())
    add_signal(browser(db, user), user.trader)
    conn = db.connect(role="authenticated", claims={"sub": "auth0|ada"})
    assert value(conn, "select (arbiter.status()).epoch") is None
    assert rows(conn, "select * from arbiter.leases") == []
