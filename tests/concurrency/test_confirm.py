"""A user's yes while a transaction of the machine that failed is still open."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    browser,
    detail_of,
    lease,
    rejection,
    set_status,
)

if TYPE_CHECKING:
    from conftest import Database


def test_confirm_does_not_queue_behind_a_handover_in_flight(db: Database) -> None:
    """The machine has just got the lease, in a transaction that stays open. The browser looks again
    for `drain_timeout`, and is told who is in the way; a queue would wait for as long as that."""
    owner = db.connect()
    user = add_user(owner)
    tab = browser(db, user)
    add_signal(tab, user.trader)
    machine = add_machine(owner, user, "running")
    beat(owner, machine)  # marks the drain
    fly = db.connect(role="service_role", autocommit=False)
    add_signal(fly, user.trader, "cloud", machine)  # ends it, and holds the row exclusively
    set_status(owner, machine, "error")
    age(owner, machine, entered_error=timedelta(minutes=3))
    before = lease(owner, user)
    assert (before.holder, before.draining_to) == ("local", machine)

    tab.execute("set statement_timeout = '20s'")
    error = rejection(tab.execute, "select arbiter.confirm_takeover()")
    assert error.sqlstate == "WX007"
    assert detail_of(error)["blockers"] == [fly.info.backend_pid]
    assert lease(owner, user) == before

    fly.commit()
    tab.execute("select arbiter.confirm_takeover()")
    assert lease(owner, user).holder == "local"


def test_confirm_does_not_wait_for_a_recovery_in_flight(db: Database) -> None:
    """Nor does it confirm what may be over: the machine's row is being written."""
    owner = db.connect()
    owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
    user = add_user(owner)
    machine = activate(owner, user)
    set_status(owner, machine, "error")
    age(owner, machine, entered_error=timedelta(minutes=3))
    fly = db.connect(role="service_role", autocommit=False)
    set_status(fly, machine, "running")
    tab = browser(db, user)
    tab.execute("set statement_timeout = '15s'")
    assert rejection(tab.execute, "select arbiter.confirm_takeover()").sqlstate == "WX007"
    beat(fly, machine)
    fly.commit()
    assert rejection(tab.execute, "select arbiter.confirm_takeover()").sqlstate == "WX001"
    now = lease(owner, user)
    assert (str(now.machine_id), now.draining_since) == (str(machine), None)
