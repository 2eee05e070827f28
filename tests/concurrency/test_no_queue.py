"""No session queues on a lease row that another one has locked: it looks again, or answers at once.

A queue is served one at a time, and new writers overtake it, so its wait would have no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    detail_of,
    lease,
    set_status,
    status,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

MINUTES = timedelta(minutes=10)


class Stage:
    """Users in each state, and a session that holds the locks of all their leases."""

    def __init__(self, db: Database) -> None:
        self.owner, self.other = db.connect(), db.connect(autocommit=False)
        self.ada, self.bob, self.carol, self.dave = (add_user(self.owner) for _ in range(4))
        add_signal(self.owner, self.ada.trader)  # local
        self.adas = add_machine(self.owner, self.ada, "running")
        self.bobs = activate(self.owner, self.bob)  # his machine holds
        self.carols = activate(self.owner, self.carol)  # hers has failed
        set_status(self.owner, self.carols, "error")
        age(self.owner, self.carols, entered_error=MINUTES)
        add_signal(self.owner, self.dave.trader)  # drains to his machine
        self.daves = add_machine(self.owner, self.dave, "running")
        beat(self.owner, self.daves)
        self.owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
        self.owner.execute("set statement_timeout = '15 s'")  # where it would queue
        # A handover in flight, but for what it will write.
        self.other.execute("select from arbiter.leases for update")


WAITS: dict[str, Callable[[Stage], object]] = {
    "local write": lambda at: add_signal(at.owner, at.ada.trader),
    "machine's write": lambda at: add_signal(at.owner, at.bob.trader, "cloud", at.bobs),
    "write that ends a drain": lambda at: add_signal(at.owner, at.dave.trader, "cloud", at.daves),
    "yes to a takeover": lambda at: at.owner.execute(
        "select arbiter.confirm_takeover(%s)", (at.carol.id,)
    ),
}
ANSWERS: dict[str, Callable[[Stage], object]] = {
    "heartbeat of the holder": lambda at: beat(at.owner, at.bobs),
    "heartbeat that would mark a drain": lambda at: beat(at.owner, at.adas),
    "heartbeat that would end a drain": lambda at: beat(at.owner, at.daves),
    "machine that stops": lambda at: set_status(at.owner, at.bobs, "stopped"),
    "machine that goes": lambda at: at.owner.execute("delete from public.cloud_machines"),
    "status": lambda at: status(at.owner, at.bob.id),
    "registering": lambda at: at.owner.execute(
        "select arbiter.register_machines('public.cloud_machines')"
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_write_gives_up_in_time_and_names_who_is_in_the_way(db: Database, name: str) -> None:
    at = Stage(db)
    with pytest.raises(psycopg.Error) as caught:
        WAITS[name](at)
    assert caught.value.sqlstate == "WX007"
    assert detail_of(caught.value)["blockers"] == [at.other.info.backend_pid]
    at.other.rollback()
    WAITS[name](at)


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_write_waits_for_no_lease(db: Database, name: str) -> None:
    at = Stage(db)
    before = [lease(at.owner, user) for user in (at.ada, at.bob, at.carol, at.dave)]
    ANSWERS[name](at)
    at.other.rollback()
    assert [lease(at.owner, user) for user in (at.ada, at.bob, at.carol, at.dave)] == before
