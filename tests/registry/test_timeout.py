"""heartbeat_timeout and poll_interval are constants in functions, for guards and for status.

They must be those of arbiter.settings after each change of them, and doctor() must see when not.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    backend,
    count_rows,
    one,
    rejection,
    rows,
    status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

OUTDATED = "select count(*) from arbiter._outdated_constants()"
SECOND = timedelta(seconds=1)


def set_timeout(conn: Conn, seconds: int) -> None:
    conn.execute(
        "update arbiter.settings set heartbeat_timeout = make_interval(secs => %s)", (seconds,)
    )


@pytest.mark.parametrize("state", ["running", "active", "error", "stopped", "a new word"])
@pytest.mark.parametrize("beat", [None, -31, -29, 0, 29, 31], ids=lambda s: f"{s} s")
def test_a_machine_may_write_as_the_verdict_says(
    db: Database, state: str, beat: int | None
) -> None:
    """For a machine that runs; the slow path judges the others."""
    conn = db.connect()
    conn.execute("alter table public.cloud_machines drop constraint cloud_machines_status_check")
    user, other = add_user(conn), add_user(conn)
    machine = activate(conn, user)
    add_signal(conn, user.trader, "cloud", machine)
    conn.execute("alter table public.cloud_machines disable trigger user")
    conn.execute(
        "update public.cloud_machines set status = %s, last_health_check = clock_timestamp() + %s",
        (state, None if beat is None else beat * SECOND),
    )
    verdict = value(
        conn,
        "select (arbiter._verdict('cloud', l.machine_id, l, arbiter._machine(l.user_id,"
        " l.machine_id), s, clock_timestamp())).code from arbiter.leases l, arbiter.settings s"
        " where l.user_id = %s",
        user.id,
    )
    ask = "select arbiter._machine_may_write(%s::uuid, %s, %s)"
    runs = state not in ("error", "stopped")
    assert value(conn, ask, machine, machine, user.id) is (runs and verdict is None)
    assert (verdict is None) is (beat is not None and abs(beat) < 30)
    assert value(conn, ask, machine, machine, other.id) is False
    assert value(conn, ask, machine, machine.upper(), user.id) is False

    # Status answers without the verdict while the machine is active.
    said = status(conn, user.id)
    at = "arbiter._machine(l.user_id, l.machine_id), s, %s)"
    local, cloud, retry_at = one(
        conn,
        f"select (arbiter._verdict('local', null, l, {at}).code as local,"
        f" (arbiter._verdict('cloud', l.machine_id, l, {at}).code as cloud,"
        f" (arbiter._verdict('local', null, l, {at}).retry_at"
        "  from arbiter.leases l, arbiter.settings s where l.user_id = %s",
        *[said["as_of"]] * 3,
        user.id,
    )
    environment = "local" if local is None else "cloud" if cloud is None else "none"
    assert (said["environment"], said["code"], said["retry_at"]) == (environment, local, retry_at)


@pytest.mark.parametrize(
    ("timeout", "hours"),
    [("1 year -359 days", 24), ("24 hours", 24), ("1 mon -30 days 5 hours", 5)],
)
def test_any_interval_is_the_one_that_the_verdict_compares(
    db: Database, timeout: str, hours: int
) -> None:
    """A year counts 360 days when intervals are compared, and more in seconds."""
    owner = db.connect()
    machine = activate(owner, user := add_user(owner))
    owner.execute("update arbiter.settings set heartbeat_timeout = %s::interval", (timeout,))
    ask = "select arbiter._machine_may_write(%s::uuid, %s, %s)"
    for ago, fresh in ((3600 * hours * SECOND - 9 * SECOND, True), (3600 * hours * SECOND, False)):
        age(owner, machine, heartbeat=ago)
        assert value(owner, ask, machine, machine, user.id) is fresh
        assert status(owner, user.id)["environment"] == ("cloud" if fresh else "local")


def test_a_change_counts_from_the_next_transaction_on(db: Database) -> None:
    owner, machines = db.connect(), backend(db)
    user = add_user(owner)
    machine = activate(owner, user)
    add_signal(machines, user.trader, "cloud", machine)
    age(owner, machine, heartbeat=40 * SECOND)
    assert rejection(add_signal, machines, user.trader, "cloud", machine).sqlstate == "WX004"
    with owner.transaction():
        set_timeout(owner, 60)
        assert value(owner, OUTDATED) == 0
        # Not committed yet.
        assert rejection(add_signal, machines, user.trader, "cloud", machine).sqlstate == "WX004"
    add_signal(machines, user.trader, "cloud", machine)
    with owner.transaction(force_rollback=True):
        set_timeout(owner, 20)
        assert rejection(add_signal, owner, user.trader, "cloud", machine).sqlstate == "WX004"
    add_signal(machines, user.trader, "cloud", machine)
    set_timeout(owner, 20)
    assert rejection(add_signal, machines, user.trader, "cloud", machine).sqlstate == "WX004"


def test_a_transaction_that_knows_the_timeout_of_before_excludes_the_browser(db: Database) -> None:
    """It may not hear of the change before it ends; who holds a lease it always sees."""
    owner, machines, browsers = db.connect(), db.connect(), db.connect()
    owner.execute(
        "create table public.orders (user_id uuid, source text not null default 'local',"
        " machine_id uuid)"
    )
    owner.execute("select arbiter.protect('public.orders')")
    owner.execute(
        "update arbiter.settings set drain_timeout = '100 ms', heartbeat_interval = '1 s'"
    )
    ada, bob = add_user(owner), add_user(owner)
    adas, bobs = activate(owner, ada), activate(owner, bob)
    for machine in (adas, bobs):
        age(owner, machine, heartbeat=15 * SECOND)

    local = "insert into public.orders (user_id) values (%s)"
    cloud = "insert into public.orders values (%s, 'cloud', %s)"

    def write(user: User, machine: str) -> None:
        with machines.transaction():
            machines.execute(cloud, (user.id, machine))

    with machines.transaction():
        for _ in range(12):  # from now on its plans and locks are there
            machines.execute(cloud, (ada.id, adas))
        set_timeout(owner, 10)
        browsers.execute(local, (bob.id,))
        assert rejection(write, bob, bobs).sqlstate == "WX004"
        assert rejection(browsers.execute, local, (ada.id,)).sqlstate == "WX007"
    assert rejection(write, ada, adas).sqlstate == "WX004"
    browsers.execute(local, (ada.id,))
    assert count_rows(owner, "public.orders") == 14


@pytest.mark.parametrize(
    "other",
    [
        "update arbiter.settings set heartbeat_timeout = '50 s'",
        "select arbiter._build_settings()",  # as an installation does
    ],
)
def test_two_at_once(db: Database, other: str) -> None:
    """The second waits for the row of settings, and both succeed."""
    with db.session() as one, db.session() as two:
        one.run("begin")
        one.run("update arbiter.settings set heartbeat_timeout = '40 s'")
        waiting = two.start(other)
        wait_until_blocked(two)
        one.run("commit")
        waiting.result(TIMEOUT_S)
    assert value(db.connect(), OUTDATED) == 0


def test_a_role_that_may_only_change_the_settings(db: Database) -> None:
    owner = db.connect()
    owner.execute("grant update on arbiter.settings to service_role")
    set_timeout(backend(db), 40)
    assert value(owner, OUTDATED) == 0


def test_a_replica_changes_it_too(db: Database) -> None:
    conn = db.connect("postgres")
    conn.execute("set session_replication_role = replica")
    set_timeout(conn, 40)
    assert value(conn, OUTDATED) == 0


@pytest.mark.parametrize("style", ["iso_8601", "sql_standard", "postgres_verbose"])
def test_the_text_of_intervals_does_not_matter(db: Database, style: str) -> None:
    owner = db.connect()
    owner.execute(f"set intervalstyle = {style}".encode())
    owner.execute(
        "update arbiter.settings set heartbeat_timeout = '90.5 s', heartbeat_interval = '1 s'"
    )
    owner.execute("reset intervalstyle")
    assert value(owner, OUTDATED) == 0


@pytest.mark.parametrize(
    ("name", "interval"), [("heartbeat_timeout", "40 s"), ("poll_interval", "7 s")]
)
def test_doctor_sees_a_change_past_the_trigger_and_install_mends_it(
    db: Database, name: str, interval: str
) -> None:
    owner = db.connect()
    doctor = "select state, problem, remedy from arbiter.doctor() where object = %s"
    change = f"update arbiter.settings set {name} = %s::interval"
    function = f"generated function arbiter._{name}"
    problem = f"It does not hold the {name} of arbiter.settings."
    assert rows(owner, doctor, function) == []
    owner.execute("alter table arbiter.settings disable trigger user")
    owner.execute(change, (interval,))
    assert rows(owner, doctor, function) == [("outdated", problem, "Run: arbiter-db install")]
    arbiter_db.install(db.conninfo())
    assert rows(owner, doctor, function) == []
    # The trigger is enabled again, too.
    owner.execute(change, ("50 s",))
    assert rows(owner, doctor, function) == []
    user = add_user(owner)
    said = status(owner, user.id)
    assert said["poll_interval"] == (50 * SECOND if name == "poll_interval" else 5 * SECOND)


def test_a_constant_cannot_be_dropped_while_it_is_used(db: Database) -> None:
    owner = db.connect()
    for name in ("heartbeat_timeout", "poll_interval", "is_enforced"):
        error = rejection(owner.execute, f"drop function arbiter._{name}()")
        assert error.sqlstate == "2BP01"


def test_no_other_role_may_ask(db: Database) -> None:
    """Only a guard calls it, as arbiter's owner."""
    machine = add_machine(db.connect(), add_user(db.connect()))
    for role in ("anon", "authenticated", "service_role"):
        conn = db.connect(role=role)
        ask = "select arbiter._machine_may_write(%s::uuid, null, null)"
        assert rejection(conn.execute, ask, (machine,)).sqlstate == "42501"
        for name in ("heartbeat_timeout", "poll_interval", "is_enforced"):
            assert rejection(conn.execute, f"select arbiter._{name}()").sqlstate == "42501"
