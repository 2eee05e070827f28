"""No session queues on a lease row that another one has locked: it looks again, or answers at once.

A queue is served one at a time, and new writers overtake it, so its wait would have no bound.
"""

from __future__ import annotations

from collections.abc import Callable
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
    beat,
    detail_of,
    lease,
    next_bar,
    rejection,
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
        self.eve, self.newcomer = add_user(self.owner), add_user(self.owner)
        add_signal(self.owner, self.eve.trader)  # local, too
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


def write_for(at: Stage, *users: User) -> None:
    """One statement for several users."""
    at.owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " select id, 'B', '1m', 'buy', %s from unnest(%s::uuid[]) as t (id)",
        (next_bar(), [user.trader for user in users]),
    )


WAITS: dict[str, Callable[[Stage], object]] = {
    "local write": lambda at: add_signal(at.owner, at.ada.trader),
    "write for two who hold": lambda at: write_for(at, at.ada, at.eve),
    "write for one who holds and one without a lease": lambda at: write_for(
        at, at.ada, at.newcomer
    ),
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


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
@pytest.mark.parametrize("name", WAITS)
def test_a_write_gives_up_in_time_and_names_who_is_in_the_way(
    db: Database, name: str, level: str
) -> None:
    """Also where the server waits in spite of `skip locked`: for one that has written already."""
    at = Stage(db)
    at.owner.execute(f"set default_transaction_isolation = '{level}'".encode())
    if level != "read committed":
        at.other.execute("update arbiter.leases set epoch = epoch + 1")
    with pytest.raises(psycopg.Error) as caught:
        WAITS[name](at)
    assert caught.value.sqlstate == "WX007"
    assert detail_of(caught.value)["blockers"] == [at.other.info.backend_pid]
    at.other.rollback()
    WAITS[name](at)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_where_the_server_waits_it_does_so_for_drain_timeout(db: Database, level: str) -> None:
    """And not for the setting of the function, 2 s, which only ends with it.

    The snapshot is older than a change of the lease that locks no writer out, and the row of after
    that change is being handed over.
    """
    at = Stage(db)
    at.other.rollback()
    at.owner.execute("update arbiter.settings set drain_timeout = '1 min'")
    with db.session() as writer:
        writer.run(f"begin isolation level {level}")
        writer.run("select from public.traders")
        at.owner.execute("update arbiter.leases set held_since = held_since")
        at.other.execute("update arbiter.leases set epoch = epoch + 1")
        written = writer.start(
            "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
            " values (%s, 'A', '1m', 'buy', now())",
            (at.ada.trader,),
        )
        assert wait_until_blocked(writer).wait_event_type == "Lock"
        at.other.execute("select pg_sleep(2.2)")
        at.other.rollback()
        assert written.result(TIMEOUT_S).rowcount == 1
        writer.run("commit")


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_write_waits_for_no_lease(db: Database, name: str) -> None:
    at = Stage(db)
    before = [lease(at.owner, user) for user in (at.ada, at.bob, at.carol, at.dave)]
    ANSWERS[name](at)
    at.other.rollback()
    assert [lease(at.owner, user) for user in (at.ada, at.bob, at.carol, at.dave)] == before


# -- what a write in flight locks -----------------------------------------------------------------

LOCK = "select from arbiter.leases where user_id = %s for {} nowait"


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
@pytest.mark.parametrize(
    "name", ["local write", "machine's write", *(w for w in WAITS if "for" in w)]
)
def test_a_write_in_flight_keeps_off_a_handover_and_no_mark(
    db: Database, name: str, level: str
) -> None:
    """The mark of a drain changes no key column, and so conflicts with no writer."""
    at = Stage(db)
    at.other.rollback()
    at.owner.execute(f"begin isolation level {level}".encode())
    WAITS[name](at)
    users = [at.bob] if name.startswith("machine") else [at.ada]
    users += [at.eve] if "two" in name else []
    for user in users:
        with at.other.transaction(force_rollback=True):
            at.other.execute(LOCK.format("no key update").encode(), (str(user.id),))
        with at.other.transaction(force_rollback=True):
            error = rejection(at.other.execute, LOCK.format("update").encode(), (str(user.id),))
            assert error.sqlstate == "55P03"
    at.owner.execute("commit")
    for user in users:
        at.other.execute(LOCK.format("update").encode(), (str(user.id),))
