"""amend(): the owner corrects who wrote rows, and the audit knows which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    activate,
    add_signal,
    add_user,
    backend,
    browser,
    count_rows,
    one,
    rejection,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

AMEND = "select arbiter.amend('public.signals', 'the machines get another column')"
TO_LOCAL = "update public.signals set source = 'local', machine_id = null"
MARKED = TO_LOCAL + ", arbiter_xid = default"
AUDIT = "select finding, reason, row_count from arbiter.audit('public.signals', true)"


class Stage:
    """Ada's browser has written a row; Bob's machine has written two, and holds."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas = add_signal(browser(db, self.ada), self.ada.trader)
        self.machine = activate(self.owner, self.bob)
        for _ in range(2):
            add_signal(backend(db), self.bob.trader, "cloud", self.machine)

    def audit(self) -> list[Any]:
        return rows(self.owner, AUDIT)


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


def test_the_owner_corrects_rows_in_one_transaction(at: Stage) -> None:
    for change in (TO_LOCAL, MARKED):
        assert rejection(at.owner.execute, change).sqlstate == "WX006"
    with at.owner.transaction():
        at.owner.execute(AMEND)
        at.owner.execute(f"{MARKED} where source = 'cloud'")
        xid = value(at.owner, "select pg_current_xact_id()")
    assert count_rows(at.owner, "public.signals") == 3
    assert value(at.owner, "select count(*) from public.signals where source = 'cloud'") == 0
    assert at.audit() == [("not_provable", "amended", 2), ("proved", None, 1)]
    known = one(at.owner, "select * from arbiter.amendments")
    assert (known.protected_table, known.amended_by, known.xid, known.reason) == (
        "signals",
        value(at.owner, "select current_user"),
        xid,
        "the machines get another column",
    )
    # Not in the next one.
    assert rejection(at.owner.execute, MARKED).sqlstate == "WX006"


def test_a_correction_that_fits_the_history_counts_as_one_all_the_same(at: Stage) -> None:
    with at.owner.transaction():
        at.owner.execute(AMEND)
        at.owner.execute(
            "update public.signals set trader_id = %s, arbiter_xid = default where id = %s",
            (at.bob.trader, at.adas),
        )
        at.owner.execute(
            "update public.signals set source = 'cloud', machine_id = %s, arbiter_xid = default"
            " where id = %s",
            (at.machine, at.adas),
        )
    assert at.audit() == [("not_provable", "amended", 1), ("proved", None, 2)]


def test_a_row_is_marked_in_the_update_that_corrects_it(at: Stage) -> None:
    at.owner.execute("begin")
    at.owner.execute(AMEND)
    error = rejection(at.owner.execute, TO_LOCAL)
    assert (error.sqlstate, error.diag.message_hint) == (
        "WX006",
        "A correction says so in each row: set arbiter_xid = default in the same update.",
    )
    at.owner.execute("rollback")
    assert at.audit() == [("proved", None, 3)]


def test_it_is_of_this_transaction_and_of_this_table(at: Stage) -> None:
    other = at.db.connect()
    at.owner.execute("create table public.orders (user_id uuid)")
    at.owner.execute("select arbiter.protect('public.orders')")
    at.owner.execute("begin")
    at.owner.execute("select arbiter.amend('public.orders', 'another one')")
    assert rejection(in_a_savepoint, at.owner, MARKED).sqlstate == "WX006"
    at.owner.execute("savepoint before")
    at.owner.execute(AMEND)
    at.owner.execute("rollback to before")
    assert rejection(in_a_savepoint, at.owner, MARKED).sqlstate == "WX006"
    at.owner.execute(AMEND)
    assert rejection(other.execute, MARKED).sqlstate == "WX006"
    in_a_savepoint(at.owner, MARKED)
    at.owner.execute("rollback")
    assert rows(at.owner, "select * from arbiter.amendments") == []


def test_a_restored_record_opens_nothing(at: Stage) -> None:
    """This cluster will count up to the transaction ids that a dump of another one brings."""
    at.owner.execute("begin")
    at.owner.execute(
        "insert into arbiter.amendments"
        " (protected_table, reason, amended_by, amended_at, xid, cluster)"
        " values ('public.signals', 'elsewhere', 'x', now(), pg_current_xact_id(), 42)"
    )
    assert rejection(at.owner.execute, MARKED).sqlstate == "WX006"
    at.owner.execute("rollback")


def test_the_record_stays(at: Stage) -> None:
    at.owner.execute("begin")
    at.owner.execute(AMEND)
    at.owner.execute(MARKED.encode())
    for forget in (
        "delete from arbiter.amendments",
        "update arbiter.amendments set reason = 'none'",
        "truncate arbiter.amendments",
    ):
        assert rejection(in_a_savepoint, at.owner, forget).sqlstate == "WX008"
    at.owner.execute("commit")
    assert rejection(at.owner.execute, "delete from arbiter.amendments").sqlstate == "WX008"
    assert at.audit() == [("not_provable", "amended", 3)]


@pytest.mark.parametrize("updates", [False, True])
def test_a_partitioned_table(at: Stage, updates: bool) -> None:
    """An update that moves a row to another partition is an insert where updates are arbitrated."""
    at.owner.execute("""
        create table public.ticks (user_id uuid, day integer) partition by range (day);
        create table public.ticks_a partition of public.ticks for values from (0) to (10);
        create table public.ticks_b partition of public.ticks for values from (10) to (20)""")
    verbs = "{insert,update}" if updates else "{insert}"
    at.owner.execute("select arbiter.protect('public.ticks', p_verbs => %s)", (verbs,))
    insert = "insert into public.ticks values (%s, 1, 'cloud', %s)"
    at.owner.execute(insert, (at.bob.id, at.machine))
    correct = "update public.ticks set source = 'local', machine_id = null, arbiter_xid = default"
    at.owner.execute("begin")
    at.owner.execute("select arbiter.amend('public.ticks', 'why')")
    in_a_savepoint(at.owner, correct)
    move = correct + ", day = 11"
    if updates:
        assert rejection(in_a_savepoint, at.owner, move).sqlstate == "WX001"
    else:
        in_a_savepoint(at.owner, move)
    at.owner.execute("commit")
    audit = "select finding, reason, row_count from arbiter.audit('public.ticks', true)"
    assert rows(at.owner, audit) == [("not_provable", "amended", 1)]


def test_a_table_without_evidence(at: Stage) -> None:
    at.owner.execute("create table public.orders (user_id uuid)")
    at.owner.execute("select arbiter.protect('public.orders', p_evidence => false)")
    at.owner.execute("insert into public.orders (user_id) values (%s)", (at.ada.id,))
    with at.owner.transaction():
        at.owner.execute("select arbiter.amend('public.orders', 'why')")
        at.owner.execute("update public.orders set user_id = %s", (at.bob.id,))
    assert (
        rejection(at.owner.execute, "update public.orders set user_id = null").sqlstate == "WX006"
    )


def in_a_savepoint(conn: Conn, statement: str) -> None:
    with conn.transaction():
        conn.execute(statement.encode())


@pytest.mark.parametrize("updates", [False, True])
def test_an_insert_is_arbitrated_as_ever(at: Stage, updates: bool) -> None:
    verbs = "{insert,update}" if updates else "{insert}"
    at.owner.execute("select arbiter.protect('public.signals', p_verbs => %s)", (verbs,))
    with at.owner.transaction():
        at.owner.execute(AMEND)
        at.owner.execute(MARKED.encode())
        with pytest.raises(psycopg.Error) as caught, at.owner.transaction():
            add_signal(at.owner, at.bob.trader)
        assert caught.value.sqlstate == "WX001"
    assert at.audit() == [("not_provable", "amended", 3)]
    # What only a correction may do here, too.
    with at.owner.transaction():
        at.owner.execute(AMEND)
        at.owner.execute("update public.signals set source = 'cloud', arbiter_xid = default")
    assert at.audit() == [("not_provable", "amended", 3)]
    if updates:  # and without a correction an update says who writes
        assert rejection(at.owner.execute, TO_LOCAL).sqlstate == "WX001"


def test_who_may_not(at: Stage) -> None:
    record = (
        "insert into arbiter.amendments (protected_table, reason, amended_by, amended_at, xid)"
        " values ('public.signals', 'x', 'x', now(), pg_current_xact_id())"
    )
    for conn in (browser(at.db, at.bob), backend(at.db)):
        for statement in (AMEND, record):
            assert rejection(conn.execute, statement).sqlstate == "42501"


@pytest.mark.parametrize(
    ("call", "sqlstate"),
    [
        ("'public.traders', 'why'", "42704"),
        ("'public.signals', ' '", "22023"),
        ("'public.signals', null", "22023"),
        ("null, 'why'", "42P01"),
    ],
)
def test_bad_input(at: Stage, call: str, sqlstate: str) -> None:
    error = rejection(at.owner.execute, f"select arbiter.amend({call})")
    assert error.sqlstate == sqlstate
    assert error.diag.message_hint
    assert rows(at.owner, "select * from arbiter.amendments") == []
