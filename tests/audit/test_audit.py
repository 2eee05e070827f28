"""audit(): it reports every row that came past the guard, and nothing else, and counts the rows
that it cannot prove.

The attacks are what a table's owner can do: switch the guard off, write, switch it on again, and
tamper with the history.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
import story
from psycopg import sql
from story import User, backend, browser, rejection, rows, value

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

AN_HOUR = timedelta(hours=1)
LEVELS = ["repeatable read", "serializable"]


# What the audit says ------------------------------------------------------------------------------


def audit(conn: Conn, table: str = "public.signals") -> list[Any]:
    """Its findings; none when everything is proved."""
    return rows(conn, "select * from arbiter.audit(%s::text::regclass)", table)


def contradictions(conn: Conn, table: str = "public.signals") -> dict[str, str]:
    """Reason by the id of the row; there must be nothing else."""
    found = audit(conn, table)
    assert {f.finding for f in found} <= {"contradiction"}
    return {str(f.row_key["id"]): f.reason for f in found}


def not_provable(conn: Conn, table: str = "public.signals") -> dict[str, int]:
    """Rows by reason; there must be nothing else."""
    found = audit(conn, table)
    assert {f.finding for f in found} <= {"not_provable"}
    return {f.reason: f.row_count for f in found}


def proved(conn: Conn, table: str = "public.signals") -> int:
    """How many rows are proved."""
    found = rows(conn, "select * from arbiter.audit(%s::text::regclass, true)", table)
    (count,) = [f.row_count for f in found if f.finding == "proved"] or [0]
    return int(count)


# What the owner did -----------------------------------------------------------------------------


@contextmanager
def unguarded(conn: Conn, table: str = "public.signals") -> Iterator[None]:
    """The guard of the table is off, which its owner can do."""
    name = sql.Identifier(*table.split("."))
    conn.execute(sql.SQL("alter table {} disable trigger user").format(name))
    yield
    conn.execute(sql.SQL("alter table {} enable trigger user").format(name))
    for (trigger,) in conn.execute(
        "select tgname from pg_trigger where tgrelid = %s::text::regclass"
        " and tgname like 'arbiter%%' and tgparentid = 0",
        (table,),
    ).fetchall():
        conn.execute(
            sql.SQL("alter table {} enable always trigger {}").format(name, sql.Identifier(trigger))
        )


def force(conn: Conn, trader: str, source: str = "local", machine: str | None = None) -> str:
    """A row that no guard has seen."""
    with unguarded(conn):
        return story.add_signal(conn, trader, source, machine)


@contextmanager
def tampering(conn: Conn) -> Iterator[None]:
    """The history can be changed."""
    conn.execute("alter table arbiter.handovers disable trigger user")
    yield
    conn.execute("alter table arbiter.handovers enable trigger user")


def take_over(conn: Conn, user: User, machine: str) -> None:
    """The machine has been silent for an hour, and the browser goes on."""
    story.age(conn, machine, heartbeat=AN_HOUR)
    story.add_signal(conn, user.trader)


@pytest.fixture
def owner(db: Database) -> Conn:
    return db.connect()


# Everything proved --------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_written(owner: Conn) -> None:
    assert audit(owner) == []
    assert proved(owner) == 0


def test_every_kind_of_handover_is_proved(db: Database, owner: Conn) -> None:
    ada, bob = story.add_user(owner), story.add_user(owner)
    story.add_signal(owner, ada.trader)
    machine = story.activate(owner, ada)
    story.add_signal(owner, ada.trader, "cloud", machine)
    take_over(owner, ada, machine)  # heartbeat_lapsed
    for word in ("stopped", "stopping", "error"):
        story.set_status(owner, machine, "running")
        story.beat(owner, machine)
        story.add_signal(owner, ada.trader, "cloud", machine)
        story.set_status(owner, machine, word)
        story.age(owner, machine, heartbeat=AN_HOUR, left_running=AN_HOUR)
        if word == "error":
            story.age(owner, machine, entered_error=AN_HOUR)
            browser(db, ada).execute("select arbiter.confirm_takeover()")
        story.add_signal(owner, ada.trader)
    story.add_signal(owner, bob.trader)
    reasons = [h.reason for h in story.handovers(owner, ada)]
    takeovers = {"heartbeat_lapsed", "machine_stopped", "stop_stalled", "confirmed"}
    assert set(reasons) == {"first_write", "activated"} | takeovers
    assert audit(owner) == []
    assert proved(owner) == story.count_rows(owner, "public.signals")


def test_a_row_in_flight_is_proved_by_the_snapshot(db: Database, owner: Conn) -> None:
    """Its transaction id is smaller than that of the handover that it came after."""
    ada = story.add_user(owner)
    machine = story.add_machine(owner, ada, "running")
    early = backend(db)
    with early.transaction():
        early.execute("select pg_current_xact_id()")
        story.add_signal(owner, ada.trader)
        story.beat(owner, machine)
        story.beat(owner, machine)
        assert story.lease(owner, ada).holder == "cloud"
        written = story.add_signal(early, ada.trader, "cloud", machine)
    row = story.one(
        owner, "select arbiter_xid::text::bigint as xid from public.signals where id = %s", written
    )
    assert row.xid < int(story.handovers(owner, ada)[-1].frontier)
    assert audit(owner) == []
    assert proved(owner) == 2


def test_the_transaction_that_hands_over_is_proved(db: Database, owner: Conn) -> None:
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    story.age(owner, machine, heartbeat=AN_HOUR)
    tab = backend(db)
    with tab.transaction():
        tab.execute("select pg_current_xact_id()")
        story.add_signal(owner, story.add_user(owner).trader)
        story.add_signal(tab, ada.trader)
    assert audit(owner) == []
    assert proved(owner) == 2


def test_savepoints_are_proved(db: Database, owner: Conn) -> None:
    ada = story.add_user(owner)
    tab = backend(db)
    with tab.transaction():
        with tab.transaction():
            story.add_signal(tab, ada.trader)
        with tab.transaction():
            story.add_signal(tab, ada.trader)
    assert audit(owner) == []


def test_rows_may_be_changed_where_provenance_is_kept(owner: Conn) -> None:
    ada = story.add_user(owner)
    signal = story.add_signal(owner, ada.trader)
    machine = story.activate(owner, ada)
    story.add_signal(owner, ada.trader, "cloud", machine)
    owner.execute("update public.signals set price = 1 where id = %s", (signal,))
    owner.execute("vacuum full public.signals")
    assert audit(owner) == []


# What came past the guard -----------------------------------------------------------------------


def test_a_forced_row_is_reported_with_who_held(owner: Conn) -> None:
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    written = story.add_signal(owner, ada.trader, "cloud", machine)
    intruder = force(owner, ada.trader)
    (found,) = audit(owner)
    assert (found.finding, found.reason) == ("contradiction", "wrong_environment")
    assert (found.user_id, found.row_table) == (ada.id, "signals")
    assert found.row_key == {"id": str(intruder)}
    assert (found.source, found.machine_id) == ("local", None)
    assert (found.epoch, found.holder, found.holder_machine_id) == (2, "cloud", machine)
    assert found.xid is not None
    assert found.row_count is None
    assert written != intruder
    assert proved(owner) == 1


def test_every_forced_row_is_reported_and_no_other(owner: Conn) -> None:
    """In each epoch of a long history, for each environment and machine that did not hold it."""
    ada, bob = story.add_user(owner), story.add_user(owner)
    strange = story.add_machine(owner, bob, "running")
    expected: dict[str, str] = {}
    rightful = 0
    machine = None
    for _ in range(4):
        story.add_signal(owner, ada.trader)
        rightful += 1
        expected[force(owner, ada.trader, "cloud", strange)] = "wrong_environment"
        if machine is None:
            machine = story.activate(owner, ada)
        else:
            story.beat(owner, machine)
        story.add_signal(owner, ada.trader, "cloud", machine)
        rightful += 1
        expected[force(owner, ada.trader)] = "wrong_environment"
        expected[force(owner, ada.trader, "cloud", strange)] = "wrong_machine"
        story.age(owner, machine, heartbeat=AN_HOUR)
        # The cloud still holds the lease until a takeover.
        expected[force(owner, ada.trader)] = "wrong_environment"
    expected[force(owner, story.add_user(owner).trader)] = "no_lease"
    assert contradictions(owner) == expected
    assert proved(owner) == rightful


def test_a_row_from_before_the_lease_is_reported(owner: Conn) -> None:
    ada = story.add_user(owner)
    intruder = force(owner, ada.trader)
    story.add_signal(owner, ada.trader)
    assert contradictions(owner) == {intruder: "no_lease"}


def test_a_transaction_that_began_before_does_not_hide_a_forced_row(
    db: Database, owner: Conn
) -> None:
    """Its id is small enough for the epoch before; the snapshot shows that it was in flight."""
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    machine = story.add_machine(owner, ada, "running")
    early = db.connect()
    with early.transaction():
        early.execute("select pg_current_xact_id()")
        story.beat(owner, machine)
        story.beat(owner, machine)
        early.execute("alter table public.signals disable trigger user")
        intruder = story.add_signal(early, ada.trader)
        early.execute("alter table public.signals enable trigger user")
    assert contradictions(owner) == {intruder: "wrong_environment"}


def test_a_later_handover_does_not_launder_a_forced_row(owner: Conn) -> None:
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    intruder = force(owner, ada.trader)
    take_over(owner, ada, machine)
    late = force(owner, ada.trader, "cloud", machine)
    assert contradictions(owner) == {intruder: "wrong_environment", late: "wrong_environment"}


def test_a_local_row_that_names_a_machine_is_reported(owner: Conn) -> None:
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    machine = story.add_machine(owner, ada)
    intruder = force(owner, ada.trader, "local", machine)
    assert contradictions(owner) == {intruder: "wrong_machine"}


def test_no_machine_has_an_id_that_stands_for_none(owner: Conn) -> None:
    ada = story.add_user(owner)
    signal = story.add_signal(owner, ada.trader)
    owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    with unguarded(owner):
        owner.execute(
            "update public.signals set source = 'cloud', machine_id = %s", (str(UUID(int=0)),)
        )
    assert contradictions(owner) == {signal: "wrong_environment"}


def test_what_observe_admitted_is_reported(owner: Conn) -> None:
    owner.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
    ada = story.add_user(owner)
    story.activate(owner, ada)
    admitted = story.add_signal(owner, ada.trader)
    assert contradictions(owner) == {admitted: "wrong_environment"}


def test_a_table_without_a_key_names_the_place_of_the_row(owner: Conn) -> None:
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    owner.execute("alter table public.signals drop constraint signals_pkey")
    force(owner, ada.trader)
    (found,) = audit(owner)
    place = value(owner, "select ctid::text from public.signals where source = 'local'")
    assert found.row_key == {"ctid": place}
    assert found.holder_machine_id == machine


def test_partitions_are_audited(owner: Conn) -> None:
    owner.execute(
        """
        create table public.fills (
          id uuid not null default gen_random_uuid(), user_id uuid not null, day int not null,
          constraint fills_pkey primary key (id, day)) partition by list (day);
        create table public.fills_1 partition of public.fills for values in (1);
        create table public.fills_2 partition of public.fills for values in (2);
        """
    )
    owner.execute("select arbiter.protect('public.fills')")
    ada = story.add_user(owner)
    story.activate(owner, ada)
    owner.execute("create table public.fills_3 partition of public.fills for values in (3)")
    intruders = set()
    for day, partition in enumerate(("fills_1", "fills_2", "fills_3"), start=1):
        name = sql.Identifier(partition)
        owner.execute(sql.SQL("alter table public.{} disable trigger user").format(name))
        insert = "insert into public.{} (user_id, day) values (%s, %s) returning id"
        (row,) = owner.execute(sql.SQL(insert).format(name), (ada.id, day)).fetchall()
        intruders.add((partition, day, row[0]))
    found = audit(owner, "public.fills")
    assert {(f.row_table, f.row_key["day"], str(f.row_key["id"])) for f in found} == intruders
    assert {f.reason for f in found} == {"wrong_environment"}


def test_updates_name_the_last_writer(owner: Conn) -> None:
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    ada = story.add_user(owner)
    position = value(
        owner,
        "insert into public.positions (user_id, symbol) values (%s, 'BTC') returning id",
        ada.id,
    )
    machine = story.activate(owner, ada)
    owner.execute(
        "update public.positions set quantity = 1, source = 'cloud', machine_id = %s", (machine,)
    )
    assert audit(owner, "public.positions") == []
    with unguarded(owner, "public.positions"):
        owner.execute(
            "update public.positions set quantity = 2, source = 'local', machine_id = null,"
            " arbiter_xid = pg_current_xact_id()"
        )
    assert contradictions(owner, "public.positions") == {position: "wrong_environment"}


def test_tables_larger_than_one_step_are_audited(owner: Conn) -> None:
    """A scan goes in steps of some thousand blocks; a row in each, and in the last, is found."""
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    owner.execute("alter table public.signals alter column signal set storage plain")
    owner.execute("drop trigger signals_queue_webhook on public.signals")
    owner.execute(
        """
        insert into public.signals
          (trader_id, symbol, interval, signal, bar_time, source, machine_id)
        select %s, 'X', '1m', repeat('x', 7000),
               timestamptz '2026-01-01' + n * interval '1 min', 'cloud', %s
          from generate_series(1, 4200) n
        """,
        (ada.trader, machine),
    )
    with unguarded(owner):
        owner.execute(
            """
            update public.signals set source = 'local', machine_id = null, arbiter_xid = default
             where bar_time in (timestamptz '2026-01-01 00:01', timestamptz '2026-01-02 20:00')
            """
        )
    assert set(contradictions(owner).values()) == {"wrong_environment"}
    assert len(contradictions(owner)) == 2
    assert proved(owner) == 4198


# What cannot be proved --------------------------------------------------------------------------


def test_rows_older_than_protection_are_counted(trading_db: Database) -> None:
    owner = trading_db.connect()
    ada = story.add_user(owner)
    owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " select %s, 'X', '1m', 'buy', now() + n * interval '1 min' from generate_series(1, 3) n",
        (ada.trader,),
    )
    arbiter_db.install(trading_db.conninfo())
    story.add_signal(owner, ada.trader)
    assert not_provable(owner) == {"older_than_protection": 3}
    assert proved(owner) == 1


def test_rows_without_a_user_are_counted(owner: Conn) -> None:
    owner.execute("select arbiter.protect('public.signals', p_unowned => 'allow')")
    story.add_signal(owner, story.add_trader(owner, None))
    assert not_provable(owner) == {"unowned": 1}


def test_rows_of_a_deleted_machine_are_counted(owner: Conn) -> None:
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    story.add_signal(owner, ada.trader, "cloud", machine)
    owner.execute("delete from public.cloud_machines")
    assert not_provable(owner) == {"machine_forgotten": 1}


def test_a_row_without_its_machine_is_no_excuse_in_a_local_epoch(owner: Conn) -> None:
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    intruder = force(owner, ada.trader, "cloud")
    assert contradictions(owner) == {intruder: "wrong_environment"}


def test_a_transaction_id_of_the_future_is_of_another_cluster(owner: Conn) -> None:
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    with unguarded(owner):
        owner.execute("update public.signals set arbiter_xid = '4294967299'")
    assert not_provable(owner) == {"other_cluster": 1}
    assert proved(owner) == 0


def test_a_history_of_another_cluster_proves_nothing_here(db: Database, owner: Conn) -> None:
    """As after a restore: its transaction ids belong to the other cluster."""
    ada, bob = story.add_user(owner), story.add_user(owner)
    machine = story.activate(owner, ada)
    story.add_signal(owner, ada.trader, "cloud", machine)
    story.add_signal(owner, bob.trader)
    with tampering(owner):
        owner.execute("update arbiter.handovers set cluster = 1")
    force(owner, ada.trader)
    assert not_provable(owner) == {"other_cluster": 3}
    # From the first handover here on, there is something to compare with, for its user.
    take_over(owner, ada, machine)
    intruder = force(owner, ada.trader, "cloud", machine)
    found = audit(owner)
    assert [(f.reason, f.row_count) for f in found if f.finding == "not_provable"] == [
        ("other_cluster", 3)
    ]
    assert [f.row_key for f in found if f.finding == "contradiction"] == [{"id": str(intruder)}]
    assert proved(owner) == 1


def test_a_restored_row_is_not_taken_for_one_of_here(owner: Conn) -> None:
    """Its number may lie in the range of this cluster's: then its own xmin gives it away."""
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    with tampering(owner):
        owner.execute("update arbiter.handovers set cluster = 1")
    take_over(owner, ada, machine)
    story.add_signal(owner, ada.trader)
    with unguarded(owner):
        # As pg_restore does it: the row is of a new transaction, its arbiter_xid is copied.
        owner.execute(
            "insert into public.signals"
            " (trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
            " select trader_id, 'Y', interval, signal, bar_time, arbiter_xid"
            " from public.signals order by arbiter_xid desc limit 1"
        )
    assert not_provable(owner) == {"other_cluster": 1}
    assert proved(owner) == 2


def test_a_transaction_id_of_another_cluster_is_not_taken_for_the_own(
    db: Database, owner: Conn
) -> None:
    """By chance it is the id of the transaction that takes over here. That must not reject it."""
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    story.age(owner, machine, heartbeat=AN_HOUR)
    tab = backend(db)
    with tab.transaction():
        xid = value(tab, "select pg_current_xact_id()::text")
        with tampering(owner):
            owner.execute(
                "update arbiter.handovers set cluster = 1, xid = %s::text::xid8 where epoch = 2",
                (xid,),
            )
        story.add_signal(tab, ada.trader)
    assert story.lease(owner, ada).holder == "local"


@pytest.mark.parametrize("level", LEVELS)
def test_rows_around_an_inexact_handover(db: Database, owner: Conn, level: str) -> None:
    """Those of transactions that were in flight are counted, if they are right before or after."""
    ada = story.add_user(owner)
    machine = story.activate(owner, ada)
    story.add_signal(owner, ada.trader, "cloud", machine)
    story.age(owner, machine, heartbeat=AN_HOUR)
    tab, early = backend(db), backend(db)
    with early.transaction():
        with tab.transaction():
            tab.execute(sql.SQL("set transaction isolation level {}").format(sql.SQL(level)))
            tab.execute("select from public.cloud_machines")
            early.execute("select pg_current_xact_id()")
            story.add_signal(tab, ada.trader)
        assert not story.handovers(owner, ada)[-1].exact
        story.add_signal(early, ada.trader)  # in flight at the handover, and after it
    story.add_signal(owner, ada.trader)  # begun after it, which the frontier proves
    assert not_provable(owner) == {"inexact_handover": 1}
    assert proved(owner) == 3
    late = force(owner, ada.trader, "cloud", machine)
    assert {str(f.row_key["id"]) for f in audit(owner) if f.finding == "contradiction"} == {late}


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_that_is_wrong_on_both_sides_is_reported(
    db: Database, owner: Conn, level: str
) -> None:
    ada, bob = story.add_user(owner), story.add_user(owner)
    strange = story.add_machine(owner, bob)
    machine = story.activate(owner, ada)
    story.age(owner, machine, heartbeat=AN_HOUR)
    tab, early = backend(db), db.connect()
    with early.transaction():
        with tab.transaction():
            tab.execute(sql.SQL("set transaction isolation level {}").format(sql.SQL(level)))
            tab.execute("select from public.cloud_machines")
            early.execute("select pg_current_xact_id()")
            story.add_signal(tab, ada.trader)
        early.execute("alter table public.signals disable trigger user")
        intruder = story.add_signal(early, ada.trader, "cloud", strange)
        early.execute("alter table public.signals enable trigger user")
    assert contradictions(owner) == {intruder: "wrong_environment"}


# The history ------------------------------------------------------------------------------------


@pytest.fixture
def long(owner: Conn) -> User:
    """A user with three handovers and two rows."""
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    machine = story.activate(owner, ada)
    take_over(owner, ada, machine)
    assert [h.epoch for h in story.handovers(owner, ada)] == [1, 2, 3]
    return ada


TAMPERED = {
    "first": ("delete from arbiter.handovers where epoch = 1", [(2, "missing_epoch")]),
    "middle": ("delete from arbiter.handovers where epoch = 2", [(3, "missing_epoch")]),
    "last": ("delete from arbiter.handovers where epoch = 3", [(2, "lease_differs")]),
    "all": ("delete from arbiter.handovers", [(3, "missing_epoch")]),
    "lease": ("delete from arbiter.leases", [(3, "lease_differs")]),
    "lease's epoch": ("update arbiter.leases set epoch = 4", [(3, "lease_differs")]),
    "from": (
        "update arbiter.handovers set from_machine_id = gen_random_uuid() where epoch = 3",
        [(3, "two_holders")],
    ),
    "twice": (
        "alter table arbiter.handovers drop constraint handovers_pkey;"
        "insert into arbiter.handovers select * from arbiter.handovers where epoch = 2",
        [(2, "two_holders")],
    ),
    "swapped": (
        "update arbiter.handovers h set xid = o.xid, snapshot = o.snapshot, frontier = o.frontier"
        " from arbiter.handovers o where o.epoch = 5 - h.epoch and h.epoch > 1",
        [(3, "out_of_order")],
    ),
    # It sees all that the handover before it did, and one older transaction not any more.
    "older snapshot": (
        "update arbiter.handovers h set snapshot = format('%s:%s:%s', o.older, "
        " pg_snapshot_xmax(h.snapshot), o.older)::pg_snapshot from (select"
        " pg_snapshot_xmin(b.snapshot)::text::bigint - 1 as older"
        " from arbiter.handovers b where b.epoch = 2) o where h.epoch = 3",
        [(3, "out_of_order")],
    ),
    "another transaction": (
        "update arbiter.handovers set xid = (select o.xid from arbiter.handovers o"
        " where o.epoch = 1) where epoch = 3",
        [(3, "out_of_order")],
    ),
    "future": (
        "update arbiter.handovers set xid = '9223372036854775800' where epoch = 3",
        [(3, "out_of_order")],
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_broken_history_is_reported_and_proves_nothing(owner: Conn, long: User, how: str) -> None:
    statement, expected = TAMPERED[how]
    with tampering(owner):
        owner.execute(statement)
    bob = story.add_user(owner)
    story.add_signal(owner, bob.trader)
    found = audit(owner)
    assert [(f.user_id, f.epoch, f.reason) for f in found if f.finding == "history"] == [
        (long.id, epoch, reason) for epoch, reason in expected
    ]
    assert [(f.finding, f.reason, f.row_count) for f in found if f.finding != "history"] == [
        ("not_provable", "broken_history", 2)
    ]
    assert proved(owner) == 1


def test_a_transaction_that_is_open_all_the_while_is_no_flaw(db: Database) -> None:
    """The snapshots of all handovers then begin with it, though each sees more than the last."""
    owner, early = db.connect(), db.connect()
    with early.transaction():
        early.execute("select pg_current_xact_id()")
        ada = story.add_user(owner)
        story.add_signal(owner, ada.trader)
        machine = story.activate(owner, ada)
        take_over(owner, ada, machine)
        assert [h.epoch for h in story.handovers(owner, ada)] == [1, 2, 3]
        assert audit(owner) == []
    assert proved(owner) == 2


def test_a_row_of_a_transaction_that_began_two_handovers_before_is_proved(db: Database) -> None:
    """Its id comes before theirs, and each of their snapshots says that it had not ended."""
    owner, early = db.connect(), db.connect()
    ada = story.add_user(owner)
    story.add_signal(owner, ada.trader)
    with early.transaction():
        early.execute("select pg_current_xact_id()")
        take_over(owner, ada, story.activate(owner, ada))
        assert [h.epoch for h in story.handovers(owner, ada)] == [1, 2, 3]
        story.add_signal(early, ada.trader)
    assert audit(owner) == []
    assert proved(owner) == 3


def test_a_forged_holder_contradicts_the_rows(owner: Conn, long: User) -> None:
    """A history that is forged without a flaw is contradicted by the rows."""
    with tampering(owner):
        owner.execute(
            "update arbiter.handovers set to_machine_id = %(m)s where epoch = 2",
            {"m": str(uuid4())},
        )
        owner.execute(
            "update arbiter.handovers n set from_machine_id = h.to_machine_id"
            " from arbiter.handovers h where h.epoch = 2 and n.epoch = 3"
        )
    assert audit(owner) == []  # no row is of that epoch
    machine = value(owner, "select id from public.cloud_machines")
    story.beat(owner, machine)
    story.beat(owner, machine)
    signal = story.add_signal(owner, long.trader, "cloud", machine)
    with tampering(owner):
        owner.execute(
            "update arbiter.handovers set to_machine_id = %(m)s where epoch = 4",
            {"m": str(uuid4())},
        )
        owner.execute(
            "update arbiter.leases set machine_id = h.to_machine_id"
            " from arbiter.handovers h where h.epoch = 4"
        )
    assert contradictions(owner) == {signal: "wrong_machine"}


# Who may ask, and what ---------------------------------------------------------------------------


def test_an_unprotected_table_cannot_be_audited(owner: Conn) -> None:
    error = rejection(owner.execute, "select * from arbiter.audit('public.traders')")
    assert error.sqlstate == "42704"
    assert error.diag.message_primary == "arbiter: table public.traders is not protected"
    error = rejection(owner.execute, "select * from arbiter.audit(null)")
    assert error.diag.message_primary == "arbiter: table null is not protected"


def test_a_table_without_evidence_cannot_be_audited(owner: Conn) -> None:
    owner.execute("select arbiter.protect('public.signals', p_evidence => false)")
    error = rejection(owner.execute, "select * from arbiter.audit('public.signals')")
    assert error.sqlstate == "55000"
    assert error.diag.message_hint is not None
    assert "p_evidence => true" in error.diag.message_hint


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_others_than_the_owner_may_not_audit(db: Database, role: str) -> None:
    error = rejection(
        db.connect(role=role).execute, "select * from arbiter.audit('public.signals')"
    )
    assert error.sqlstate == "42501"


def test_rows_that_a_policy_hides_are_an_error(owner: Conn) -> None:
    owner.execute("alter table public.signals force row level security")
    error = rejection(owner.execute, "select * from arbiter.audit('public.signals')")
    assert error.sqlstate == "42501"


def test_a_changed_table_is_an_error(owner: Conn) -> None:
    owner.execute("alter table public.signals drop constraint signals_trader_id_fkey")
    error = rejection(owner.execute, "select * from arbiter.audit('public.signals')")
    assert error.sqlstate == "22023"


def test_an_audit_reads_only(owner: Conn) -> None:
    story.add_signal(owner, story.add_user(owner).trader)
    with owner.transaction():
        owner.execute("set transaction read only")
        assert audit(owner) == []


def test_it_tells_how_far_it_is_when_asked(owner: Conn) -> None:
    notices: list[str | None] = []
    owner.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    story.add_signal(owner, story.add_user(owner).trader)
    audit(owner)
    assert notices == []
    assert proved(owner) == 1
    assert notices == ["arbiter: audited 0 of 1 blocks"]


def test_no_plan_of_it_is_compiled(db: Database, owner: Conn) -> None:
    """Compiling takes seconds a query and saves nothing here; before 18 it was done for all."""
    story.add_signal(owner, story.add_user(owner).trader)
    said: list[str] = []
    with db.connect() as conn:  # in which nothing has been compiled yet
        conn.execute("set client_min_messages = debug1")
        conn.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
        assert proved(conn) == 1
        assert not [text for text in said if "JIT" in text]
        conn.execute(
            "set jit = on; set jit_above_cost = 0; select sum(n) from generate_series(1, 9) n"
        )
        assert [text for text in said if "JIT" in text]  # what that would have looked like


def test_findings_are_json(owner: Conn) -> None:
    """The key of a row is what a client can put into a where clause."""
    ada = story.add_user(owner)
    story.activate(owner, ada)
    intruder = force(owner, ada.trader)
    key = value(owner, "select row_key::text from arbiter.audit('public.signals')")
    assert json.loads(key) == {"id": str(intruder)}
