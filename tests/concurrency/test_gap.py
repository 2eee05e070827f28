"""What another session commits between the snapshot of the guard's query and its lock.

That is one query, so a test makes it wait in between: on an advisory lock, in the view of the path
or in the function that asks for the machine.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S, Session, wait_until_blocked
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    beat,
    lease,
    next_bar,
    rejection,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

SECOND = timedelta(seconds=1)
GATE = 4711

PATH = f"""
create function public.gate() returns boolean language plpgsql as $$
begin
  perform pg_advisory_xact_lock_shared({GATE});
  return true;
end $$;
create or replace view arbiter._path_1_1 as
  select t.id as key, t.user_id as value from public.traders t where public.gate();
"""
MACHINE = f"""
create or replace function arbiter._machine_may_write(
  p_machine_id anyelement, p_holder text, p_user_id text)
returns boolean language plpgsql stable as $$
begin
  perform pg_advisory_xact_lock_shared({GATE});
  return coalesce(p_machine_id::text = p_holder, false);
end $$;
"""
INSERT = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%s, 'BTCUSDT', '1m', 'buy', %s, %s, %s)
"""


class Gap:
    """A writer who waits in the gap until ``go`` is called."""

    def __init__(self, db: Database, gate: str) -> None:
        self.db, self.owner, self.keeper = db, db.connect(), db.connect()
        self.user = add_user(self.owner)
        add_signal(self.owner, self.user.trader)
        self._gate = gate

    def shut(self) -> None:
        self.owner.execute(self._gate.encode())
        self.keeper.execute("select pg_advisory_lock(%s)", (GATE,))

    def go(self) -> None:
        self.keeper.execute("select pg_advisory_unlock(%s)", (GATE,))


def start(at: Gap, session: Session, *claim: object) -> Any:
    session.run("begin")
    waiting = session.start(INSERT, (at.user.trader, next_bar(), *claim))
    assert wait_until_blocked(session).wait_event == "advisory"
    return waiting


def test_a_takeover_in_the_gap_rejects_the_machine(db: Database) -> None:
    at = Gap(db, MACHINE)
    machine = activate(at.owner, at.user)
    age(at.owner, machine, heartbeat=31 * SECOND)
    at.shut()
    with db.session() as session:
        waiting = start(at, session, "cloud", machine)
        add_signal(db.connect(), at.user.trader)
        at.go()
        assert rejection(waiting.result, TIMEOUT_S).sqlstate == "WX004"
    assert lease(at.owner, at.user).holder == "local"


def test_a_handover_in_the_gap_rejects_the_browser(db: Database) -> None:
    at = Gap(db, PATH)
    machine = add_machine(at.owner, at.user, "running")
    at.shut()
    with db.session() as session:
        waiting = start(at, session, "local", None)
        beat(at.owner, machine)
        beat(at.owner, machine)
        assert lease(at.owner, at.user).machine_id == machine
        at.go()
        assert rejection(waiting.result, TIMEOUT_S).sqlstate == "WX001"


def test_a_drain_that_is_marked_in_the_gap_waits_for_the_write(db: Database) -> None:
    at = Gap(db, PATH)
    machine = add_machine(at.owner, at.user, "running")
    at.shut()
    with db.session() as session:
        waiting = start(at, session, "local", None)
        beat(at.owner, machine)
        assert lease(at.owner, at.user).draining_to == machine
        at.go()
        assert waiting.result(TIMEOUT_S).rowcount == 1
        beat(at.owner, machine)
        assert lease(at.owner, at.user).holder == "local"
        session.run("commit")
    beat(at.owner, machine)
    assert lease(at.owner, at.user).machine_id == machine


def test_a_handover_in_flight_in_the_gap_decides(db: Database) -> None:
    at = Gap(db, PATH)
    machine = add_machine(at.owner, at.user, "running")
    beats = db.connect(autocommit=False)
    at.shut()
    with db.session() as session:
        waiting = start(at, session, "local", None)
        beat(at.owner, machine)
        beat(beats, machine)
        at.go()
        wait_until_blocked(session)
        beats.commit()
        assert rejection(waiting.result, TIMEOUT_S).sqlstate == "WX001"


@pytest.mark.parametrize("end", ["deleted", "given away", "stopped"])
def test_a_machine_that_ends_in_the_gap_keeps_the_browser_out(db: Database, end: str) -> None:
    """The write came first: the browser is admitted once it has committed and the grace is over."""
    at = Gap(db, MACHINE)
    machine, other = activate(at.owner, at.user), add_user(at.owner)
    at.owner.execute("update arbiter.settings set stop_grace = '100 ms', drain_timeout = '100 ms'")
    at.owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    at.shut()
    table, where = "public.cloud_machines", "where id = %s"
    with db.session() as session:
        waiting = start(at, session, "cloud", machine)
        at.owner.execute(
            {
                "deleted": f"delete from {table} {where}",
                "given away": f"update {table} set user_id = '{other.id}' {where}",
                "stopped": f"update {table} set status = 'stopped' {where}",
            }[end].encode(),
            (machine,),
        )
        at.go()
        assert waiting.result(TIMEOUT_S).rowcount == 1
        age(at.owner, machine, left_running=9 * SECOND)
        browser = db.connect()
        assert rejection(add_signal, browser, at.user.trader).sqlstate == "WX007"
        session.run("commit")
        add_signal(browser, at.user.trader)
    assert value(at.owner, "select count(*) from public.signals where source = 'cloud'") == 1
