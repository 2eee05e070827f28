"""The way into production: a million signals, a browser and a machine that never stop writing, an
install that watches first, and the switch to enforce. No insert fails that should pass."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S
from story import add_user, backend, browser, rejection, rows, value

import arbiter_db
from arbiter_db import Adoption

if TYPE_CHECKING:
    from conftest import Database
    from story import User

ROWS = 1_000_000

OLD = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select %s, 'old', '1m', 'buy', timestamptz '2020-01-01' + n * interval '1 s'
  from generate_series(1, %s) n
"""
PLAIN = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (%(trader)s, %(symbol)s, '1m', 'buy', now())
"""
CLOUD = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%(trader)s, %(symbol)s, '1m', 'buy', now(), 'cloud', %(machine)s)
"""
MACHINE = """
insert into public.cloud_machines (user_id, status) values (%s, 'running') returning id
"""


class Writer:
    """Writes one signal after the other, and counts; an insert that fails ends it."""

    def __init__(self, name: str, conn: psycopg.Connection[Any], user: User) -> None:
        self.name, self.conn = name, conn
        self.statement, self.params = PLAIN, {"trader": user.trader, "machine": None}
        self.beats = False
        self.written = 0
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._progress = threading.Condition()

    def run(self) -> None:
        while not self._stop.is_set():
            if self.beats:
                beat = "update public.cloud_machines set last_health_check = now() where id = %s"
                self.conn.execute(beat, (self.params["machine"],))
            begun = time.monotonic()
            symbol = f"{self.name} {self.written}"
            self.conn.execute(self.statement.encode(), {**self.params, "symbol": symbol})
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            with self._progress:
                self.written += 1
                self._progress.notify_all()

    def stop(self) -> None:
        self._stop.set()

    def wait_for_more(self) -> None:
        with self._progress:
            seen = self.written
            assert self._progress.wait_for(lambda: self.written > seen + 1, TIMEOUT_S)


@pytest.mark.slow
def test_watch_first_and_enforce_on_a_table_in_use(trading_db: Database) -> None:
    owner = trading_db.connect()
    trader = add_user(owner)
    owner.execute("alter table public.signals disable trigger user")
    owner.execute(OLD.encode(), (trader.trader, ROWS))
    owner.execute("alter table public.signals enable trigger user")
    tabs, fleet = add_user(owner), add_user(owner)
    machine = value(owner, MACHINE, fleet.id)
    writers = [
        Writer("tab", browser(trading_db, tabs), tabs),
        Writer("machine", backend(trading_db), fleet),
    ]
    _, cloud = writers

    def step(name: str, change: Any) -> None:
        for writer in writers:
            writer.wait_for_more()
            writer.longest_s = 0.0
        change()
        for writer in writers:
            writer.wait_for_more()
        waits = ", ".join(f"{w.name} {w.longest_s * 1000:.0f} ms" for w in writers)
        print(f"{name}: the longest insert: {waits}")

    def deploy() -> None:
        cloud.params["machine"] = machine
        cloud.statement, cloud.beats = CLOUD, True

    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(writer.run) for writer in writers]
        try:
            step("before", lambda: None)
            step(
                "install --mode observe",
                lambda: arbiter_db.install(
                    trading_db.conninfo(),
                    adoption=Adoption(mode="observe"),
                    on_plan=lambda lines: None,
                ),
            )
            step("the machine says that it is one", deploy)
            step("enforce", lambda: arbiter_db.protect(owner, "public.signals", mode="enforce"))
            step("after", lambda: None)
        finally:
            for writer in writers:
                writer.stop()
        for future in running:
            future.result(TIMEOUT_S)  # raises what an insert has raised

    stored = "select count(*) from public.signals where symbol like %s"
    for writer in writers:
        assert value(owner, stored, f"{writer.name} %") == writer.written
    assert value(owner, "select count(*) from public.signals where symbol = 'old'") == ROWS
    modes = rows(owner, "select mode from arbiter.protections")
    assert modes == [("enforce",)]
    assert arbiter_db.status(owner, fleet.id).environment == "cloud"
    params = {"trader": fleet.trader, "symbol": "by a browser"}
    assert rejection(owner.execute, PLAIN.encode(), params).sqlstate == "WX001"
    assert arbiter_db.audit(owner, "public.signals").findings == []
