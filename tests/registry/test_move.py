"""The walk of docs/operations.md from one registry to another, with a browser and a machine that
write all the time: other names, other words, a column renamed."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from sessions import TIMEOUT_S
from story import (
    activate,
    add_machine,
    add_user,
    backend,
    browser,
    handovers,
    lease,
    rejection,
    rows,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

OPERATIONS = Path(arbiter_db.__file__).parents[1] / "docs" / "operations.md"

SIGNAL = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (%(trader)s, %(symbol)s, '1m', 'buy', now())
"""
OF_MACHINE = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, {column})
values (%(trader)s, %(symbol)s, '1m', 'buy', now(), 'cloud', %(machine)s)
"""
BEAT = "update public.{table} set last_health_check = now() where id = %(machine)s"
OLD = [BEAT.format(table="cloud_machines"), OF_MACHINE.format(column="machine_id")]
NEW = [BEAT.format(table="user_fly_apps"), OF_MACHINE.format(column="fly_app_id")]


def walk() -> str:
    text = OPERATIONS.read_text(encoding="utf-8")
    section = text.partition("\n## Moving to another registry\n")[2].partition("\n## ")[0]
    [found] = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    return str(found)


class Writer:
    """Runs its statements again and again, each in a transaction of its own, and counts."""

    def __init__(self, conn: psycopg.Connection[Any], statements: list[str], **params: Any) -> None:
        self.conn, self.statements, self.params = conn, statements, params
        self.written = 0
        self.failed: list[str | None] = []
        self._stop = threading.Event()
        self._progress = threading.Condition()

    def run(self) -> None:
        while not self._stop.is_set():
            statements, symbol = self.statements, f"{self.params['name']} {self.written}"
            try:
                for statement in statements:
                    self.conn.execute(statement.encode(), {**self.params, "symbol": symbol})
            except psycopg.Error as error:
                self.failed.append(error.sqlstate)
                if statements is not NEW:
                    self.statements = NEW  # the new version of the program
                continue
            with self._progress:
                self.written += 1
                self._progress.notify_all()

    def wait_for_more(self) -> None:
        with self._progress:
            seen = self.written
            assert self._progress.wait_for(lambda: self.written > seen + 2, TIMEOUT_S), self.failed

    def stop(self) -> None:
        self._stop.set()


def move(owner: psycopg.Connection[Any]) -> None:
    """As the page says: again where the locks were not there in time."""
    moving, after = walk().split("commit;\n")
    for _ in range(50):
        try:
            owner.execute(f"{moving} commit".encode())
        except psycopg.errors.LockNotAvailable:
            owner.execute("rollback")
            continue
        owner.execute(after.encode())
        return
    raise AssertionError("the locks were never there in time")


def test_the_documented_walk_with_writers(db: Database) -> None:
    owner = db.connect()
    ada, bob, carol = add_user(owner), add_user(owner), add_user(owner)
    machine = activate(backend(db), bob)
    stopped = add_machine(owner, carol, "stopped")
    tab = Writer(browser(db, ada), [SIGNAL], trader=ada.trader, name="tab")
    cloud = Writer(backend(db), OLD, trader=bob.trader, machine=machine, name="machine")
    before = lease(owner, bob)

    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(tab.run), pool.submit(cloud.run)]
        try:
            for writer in (tab, cloud):
                writer.wait_for_more()
            move(owner)
            for writer in (tab, cloud):
                writer.wait_for_more()
        finally:
            tab.stop()
            cloud.stop()
        for future in running:
            future.result(TIMEOUT_S)

    # The browser noticed nothing; the machine once, that its column has another name.
    assert tab.failed == []
    assert cloud.failed == ["42703"]
    assert tab.written + cloud.written == value(owner, "select count(*) from public.signals")
    rejected = rejection(owner.execute, SIGNAL.encode(), {"trader": bob.trader, "symbol": "x"})
    assert rejected.sqlstate == "WX001"
    # The same lease as before, and no handover by the move.
    assert (lease(owner, bob).machine_id, lease(owner, bob).holder) == (machine, "cloud")
    assert lease(owner, bob).epoch == max(before.epoch, 2)
    assert [h.reason for h in handovers(owner, bob)] == ["registered", "activated"]
    assert rows(owner, "select registry::text from arbiter.registry") == [("user_fly_apps",)]
    states = dict(rows(owner, "select machine_id, state from arbiter.machines"))
    assert states == {machine: "running", stopped: "stopped"}
    # All rows are proved, those of before by the column's new name.
    audit = arbiter_db.audit(owner, "public.signals")
    assert (audit.findings, audit.not_provable) == ([], {})
    assert audit.proved == tab.written + cloud.written
    wrong = rows(owner, "select * from arbiter.doctor() where state not in ('ok', 'note')")
    assert wrong == []
    # The old table is the app's alone.
    attached = "select tgname from pg_trigger where tgrelid = 'cloud_machines'::regclass"
    assert not [name for (name,) in rows(owner, attached) if "arbiter" in name]
    owner.execute("drop table public.cloud_machines")
    assert rows(owner, "select * from arbiter.doctor() where state not in ('ok', 'note')") == []
