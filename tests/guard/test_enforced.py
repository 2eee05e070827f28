"""While every protected table is only observed, status is neutral: the browser may write.

Whether a table is in mode enforce is a constant in a function, which must be true to
arbiter.protections after each change, and doctor() must see when it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from codes import WATCHING
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    browser,
    rejection,
    rows,
    set_status,
    status,
    value,
)

import arbiter_db
from arbiter_db import Adoption

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: What changes in the answer while nothing is enforced.
NEUTRAL = {
    "environment": "local",
    "can_write_local": True,
    "enforced": False,
    "code": None,
    "message": WATCHING,
    "retry_at": None,
}


def set_mode(conn: Conn, mode: str, table: str = "public.signals") -> None:
    conn.execute("select arbiter.protect(%s::regclass, p_mode => %s)", (table, mode))


def said(conn: Conn, user: User) -> dict[str, Any]:
    """The status, with the instant of the last heartbeat in the place of its age."""
    found = dict(status(conn, user.id))
    as_of, ago = found.pop("as_of"), found.pop("heartbeat_age")
    return {**found, "heartbeat_at": None if ago is None else as_of - ago}


def starting(conn: Conn, user: User) -> None:
    add_machine(conn, user, "starting")


def nothing(conn: Conn, user: User) -> None:
    pass


def written(conn: Conn, user: User) -> None:
    add_signal(conn, user.trader)


def active(conn: Conn, user: User) -> str:
    return activate(conn, user)


def lapsed(conn: Conn, user: User) -> None:
    age(conn, activate(conn, user), heartbeat=SETTINGS["heartbeat_timeout"])


def stopped(conn: Conn, user: User) -> None:
    set_status(conn, activate(conn, user), "stopped")


def failed(conn: Conn, user: User) -> None:
    set_status(conn, activate(conn, user), "error")


def failed_long_ago(conn: Conn, user: User) -> None:
    machine = activate(conn, user)
    set_status(conn, machine, "error")
    age(conn, machine, entered_error=SETTINGS["error_takeover_delay"])


def deleted(conn: Conn, user: User) -> None:
    activate(conn, user)
    conn.execute("delete from public.cloud_machines where user_id = %s", (user.id,))


#: What has happened to a user, and what the badge says where it is enforced.
CASES: dict[str, tuple[Callable[[Conn, User], object], str]] = {
    "nothing yet": (nothing, "Browser mode"),
    "a write": (written, "Browser mode"),
    "machine starting": (starting, "Cloud starting"),
    "machine active": (active, "Cloud active"),
    "machine silent": (lapsed, "Browser mode"),
    "machine stopped": (stopped, "Cooling down"),
    "machine failed": (failed, "Cloud failed"),
    "machine failed long ago": (failed_long_ago, "Cloud failed"),
    "machine deleted": (deleted, "Cooling down"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_status_is_neutral_and_says_so(db: Database, case: str) -> None:
    """All that is not about who may write stays."""
    owner = db.connect()
    happen, badge = CASES[case]
    happen(owner, user := add_user(owner))
    asking = browser(db, user)
    before = said(asking, user)
    assert (before["enforced"], before["message"]) == (True, badge)
    for _ in range(2):
        set_mode(owner, "observe")
        assert said(asking, user) == {**before, **NEUTRAL}
        set_mode(owner, "enforce")
        assert said(asking, user) == before


def test_a_drain_is_told(db: Database) -> None:
    owner, writer = db.connect(), db.connect(autocommit=False)
    user = add_user(owner)
    add_signal(owner, user.trader)
    add_signal(writer, user.trader)
    machine = add_machine(owner, user, "running")
    beat(owner, machine)
    before = said(owner, user)
    assert (before["draining"], before["machine_id"]) == (True, machine)
    owner.execute("update arbiter.protections set mode = 'observe'")
    assert said(owner, user) == {**before, **NEUTRAL}
    writer.rollback()


def test_a_yes_is_answered_in_the_same_way(db: Database) -> None:
    owner = db.connect()
    failed_long_ago(owner, user := add_user(owner))
    set_mode(owner, "observe")
    with browser(db, user).cursor(row_factory=psycopg.rows.dict_row) as asking:
        answer = asking.execute("select * from arbiter.confirm_takeover()").fetchone()
    assert answer == {**(answer or {}), **NEUTRAL, "machine_state": "stopped"}


def test_observing_can_be_the_first_step(trading_db: Database) -> None:
    conninfo = trading_db.conninfo()
    arbiter_db.install(conninfo, adoption=Adoption(protect=("public.signals",), mode="observe"))
    owner = trading_db.connect()
    user = add_user(owner)
    asking = browser(trading_db, user)
    assert said(asking, user) == {**said(asking, user), **NEUTRAL, "machine_id": None}
    machine = activate(owner, user)
    assert said(asking, user) == {**said(asking, user), **NEUTRAL, "machine_id": machine}
    add_signal(asking, user.trader)

    arbiter_db.protect(owner, "public.signals", mode="enforce")
    now = said(asking, user)
    assert (now["code"], now["enforced"]) == ("cloud_active", True)
    assert rejection(add_signal, asking, user.trader).sqlstate == "WX001"
    arbiter_db.install(conninfo)  # which leaves it so
    assert said(asking, user) == now


def test_one_table_is_enough_to_enforce(db: Database) -> None:
    owner = db.connect()
    activate(owner, user := add_user(owner))
    set_mode(owner, "observe")
    set_mode(owner, "enforce", "public.positions")
    assert said(owner, user)["code"] == "cloud_active"
    owner.execute("select arbiter.unprotect('public.signals')")
    assert said(owner, user)["code"] == "cloud_active"
    owner.execute("select arbiter.unprotect('public.positions')")
    assert said(owner, user) == {**said(owner, user), **NEUTRAL}


def test_a_change_that_is_rolled_back_is_none(db: Database) -> None:
    owner = db.connect()
    activate(owner, user := add_user(owner))
    before = said(owner, user)
    with owner.transaction(force_rollback=True):
        set_mode(owner, "observe")
        assert said(owner, user)["message"] == WATCHING
    assert said(owner, user) == before


def test_a_snapshot_that_is_too_old_ends_nothing(db: Database) -> None:
    """It does not show the table that another session has protected since."""
    owner = db.connect()
    activate(owner, user := add_user(owner))
    set_mode(owner, "observe")
    owner.execute("create table public.orders (user_id uuid)")
    with db.connect() as late, late.transaction():
        late.execute("set transaction isolation level repeatable read")
        value(late, "select count(*) from arbiter.protections")
        set_mode(owner, "enforce", "public.positions")
        set_mode(late, "observe", "public.orders")
    assert said(owner, user)["code"] == "cloud_active"


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_enforcing_begins_at_every_isolation_level(db: Database, isolation: str) -> None:
    owner = db.connect()
    activate(owner, user := add_user(owner))
    set_mode(owner, "observe")
    with owner.transaction():
        owner.execute(f"set transaction isolation level {isolation}".encode())
        set_mode(owner, "enforce")
    assert said(owner, user)["code"] == "cloud_active"


def test_a_replica_changes_it_too(db: Database) -> None:
    conn = db.connect("postgres")
    activate(conn, user := add_user(conn))
    conn.execute("set session_replication_role = replica")
    for change in ("update {} set mode = 'observe'", "delete from {}"):
        conn.execute("update arbiter.protections set mode = 'enforce'")
        assert said(conn, user)["enforced"] is True
        conn.execute(change.format("arbiter.protections").encode())
        assert said(conn, user)["enforced"] is False


def test_the_common_answers_pay_nothing_for_it(db: Database) -> None:
    """The server computes it when it plans a query, so that the plan has no trace of it."""
    owner = db.connect()
    query = "explain (costs off) select from arbiter.leases where user_id = '' "
    (plain, asked) = (rows(owner, query + more) for more in ("", "and arbiter._is_enforced()"))
    assert plain == asked
    set_mode(owner, "observe")
    assert ("  One-Time Filter: false",) in rows(owner, query + "and arbiter._is_enforced()")


def test_doctor_sees_a_change_past_the_trigger_and_install_mends_it(db: Database) -> None:
    owner = db.connect()
    activate(owner, user := add_user(owner))
    doctor = (
        "select state, problem, remedy from arbiter.doctor()"
        " where object = 'generated function arbiter._is_enforced'"
    )
    assert rows(owner, doctor) == []
    owner.execute("alter table arbiter.protections disable trigger user")
    owner.execute("update arbiter.protections set mode = 'observe'")
    problem = "It does not say whether arbiter.protections has a table in mode enforce."
    assert rows(owner, doctor) == [("outdated", problem, "Run: arbiter-db install")]
    assert said(owner, user)["code"] == "cloud_active"
    arbiter_db.install(db.conninfo())
    assert rows(owner, doctor) == []
    assert said(owner, user)["message"] == WATCHING
    # The trigger is enabled again, too.
    set_mode(owner, "enforce")
    assert said(owner, user)["code"] == "cloud_active"
