"""Transaction ids past 2^32: the server's counter goes on, what a row shows of it begins anew.

A server of its own is set to a few transactions before that. What was written before, across and
after it must be judged and proved like anything else.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import ROLES, Database, Templates
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    beat,
    detail_of,
    handovers,
    lease,
    one,
    rejection,
    rows,
    set_status,
    value,
)

from arbiter_db.demo.embedded import EmbeddedServer

if TYPE_CHECKING:
    Conn = psycopg.Connection[Any]

pytestmark = pytest.mark.slow

MAJOR = int(os.environ.get("PG") or "18")

#: The second turn of the 32 bits, so that neither half of an id is 0 or 1 by chance.
TURN = 2 << 32
#: So many transactions before it the server begins again.
BEFORE = 400


def freeze(server: EmbeddedServer) -> None:
    """No row may need the status of an old transaction, whose id will be given out again."""
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute("alter database template0 allow_connections true")
        names = [name for (name,) in rows(conn, "select datname from pg_database")]
    for name in names:
        with psycopg.connect(server.conninfo(dbname=name), autocommit=True) as conn:
            conn.execute("vacuum (freeze)")


def set_next_transaction(server: EmbeddedServer, next_xid: int) -> None:
    """Of a server that does not run."""
    epoch, xid, pages = next_xid >> 32, next_xid & 0xFFFFFFFF, 32
    segment = server.data_directory / "pg_xact" / f"{xid // (8192 * 4) // pages:04X}"
    segment.write_bytes(bytes(pages * 8192))
    server._account.own(segment)
    command: list[str | Path] = [server.bindir / "pg_resetwal", "--pgdata", server.data_directory]
    command += [f"--epoch={epoch}", f"--next-transaction-id={xid}"]
    command += [f"--oldest-transaction-id={xid - 1000}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        **server._account.popen_arguments(Path("/")),
    )
    assert done.returncode == 0, done.stderr


def next_xid(conn: Conn) -> int:
    """The id of the next transaction, without taking it."""
    return int(value(conn, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint"))


def go_on_to(conn: Conn, xid: int) -> None:
    """Take transaction ids until that one is the next."""
    while next_xid(conn) < xid:
        conn.execute("select pg_current_xact_id()")
    assert next_xid(conn) == xid


class Stage:
    """What crosses the turn, all of it in one go, as there is one only.

    Before the server is set, ada is local and has a machine that holds her lease by now.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        owner = db.connect()
        self.ada, self.bob, self.carol, self.dave = (add_user(owner) for _ in range(4))
        add_signal(owner, self.ada.trader)
        self.machine = activate(owner, self.ada)
        add_signal(owner, self.ada.trader, "cloud", self.machine)
        # Local, each with a machine that is on its way.
        self.machines = {}
        for user in (self.bob, self.carol, self.dave):
            add_signal(owner, user.trader)
            self.machines[user] = add_machine(owner, user, "running")
        db.close()

    def cross(self) -> None:
        self.owner = self.db.connect()
        self.owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
        beat(self.owner, self.machine)
        beat(self.owner, self.machines[self.carol])  # marks the drain
        # Two transactions that have their ids from before the turn.
        bob, carol = self.db.connect(), self.db.connect()
        bob.execute("begin")
        carol.execute("begin isolation level repeatable read")
        self.before = [
            int(value(conn, "select pg_current_xact_id()::text")) for conn in (bob, carol)
        ]
        go_on_to(self.owner, TURN + 10)

        # Bob writes in a savepoint, whose id is the only one that the lease then shows; and then
        # as his machine, in the same transaction.
        with bob.transaction():
            add_signal(bob, self.bob.trader)
        beat(self.owner, self.machines[self.bob])
        self.bobs_error = rejection(
            add_signal, bob, self.bob.trader, "cloud", self.machines[self.bob]
        )
        bob.execute("rollback")

        # Carol's machine gets the lease, by a snapshot that cannot tell before from after.
        add_signal(carol, self.carol.trader, "cloud", self.machines[self.carol])
        carol.execute("commit")


def it_was_crossed(at: Stage) -> None:
    assert all(TURN - BEFORE <= xid < TURN for xid in at.before)
    assert next_xid(at.owner) > TURN + 10


def a_write_of_ones_own_is_seen_from_before_the_turn(at: Stage) -> None:
    assert at.bobs_error.sqlstate == "WX007"
    assert "This transaction itself" in (at.bobs_error.diag.message_hint or "")
    assert lease(at.owner, at.bob).holder == "local"


def an_inexact_handover_has_a_whole_transaction_id(at: Stage) -> None:
    last = handovers(at.owner, at.carol)[-1]
    assert (last.reason, last.exact, int(last.xid)) == ("activated", False, at.before[1])
    assert TURN + 10 <= int(last.frontier) < next_xid(at.owner)


def everything_is_proved(at: Stage) -> None:
    machine = at.machine
    add_signal(at.owner, at.ada.trader, "cloud", machine)
    set_status(at.owner, machine, "stopped")
    at.owner.execute("update arbiter.machine_notes set left_running_at = now() - interval '1 h'")
    add_signal(at.owner, at.ada.trader)  # takes over
    last = handovers(at.owner, at.ada)[-1]
    assert last.exact
    assert int(last.xid) > TURN
    found = rows(at.owner, "select * from arbiter.audit('public.signals', true)")
    assert {(row.finding, row.reason) for row in found} <= {
        ("proved", None),
        ("not_provable", "inexact_handover"),
    }
    assert sum(row.row_count for row in found if row.finding == "proved") >= 7


def half_an_id_is_a_forged_one(at: Stage) -> None:
    insert = (
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
        " values (%s, 'BTCUSDT', '1h', 'buy', now(),"
        " (pg_current_xact_id()::text::bigint - (2::bigint << 32))::text::xid8)"
    )
    error = rejection(at.owner.execute, insert, (at.bob.trader,))
    assert error.sqlstate == "WX005"


def a_write_in_flight_is_named(at: Stage) -> None:
    writer = at.db.connect(autocommit=False)
    add_signal(writer, at.dave.trader)
    beat(at.owner, at.machines[at.dave])
    error = rejection(add_signal, at.owner, at.dave.trader, "cloud", at.machines[at.dave])
    writer.rollback()
    assert error.sqlstate == "WX007"
    assert detail_of(error)["blockers"] == [writer.info.backend_pid]
    add_signal(at.owner, at.dave.trader, "cloud", at.machines[at.dave])
    assert lease(at.owner, at.dave).holder == "cloud"


def what_was_forced_in_is_found(at: Stage) -> None:
    at.owner.execute("alter table public.signals disable trigger user")
    add_signal(at.owner, at.bob.trader, "cloud", at.machines[at.bob])
    found = one(
        at.owner, "select * from arbiter.audit('public.signals') where finding = 'contradiction'"
    )
    assert (found.user_id, found.reason) == (at.bob.id, "wrong_environment")
    assert int(found.xid) > TURN


def test_transactions_on_both_sides_of_the_turn() -> None:
    """One test, because the server is set only once; what it looks at stands above."""
    with EmbeddedServer(MAJOR) as server:
        if not (server.bindir / "pg_resetwal").exists():
            pytest.skip("the package of this server has no pg_resetwal; tested on 15, 16 and 18")
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        with closing(Templates(server)) as templates, templates.clone("installed") as db:
            at = Stage(db)
            freeze(server)
            server.stop()
            set_next_transaction(server, TURN - BEFORE)
            server.start()
            at.cross()
            it_was_crossed(at)
            a_write_of_ones_own_is_seen_from_before_the_turn(at)
            an_inexact_handover_has_a_whole_transaction_id(at)
            half_an_id_is_a_forged_one(at)
            a_write_in_flight_is_named(at)
            everything_is_proved(at)
            what_was_forced_in_is_found(at)
