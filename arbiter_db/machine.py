"""A cloud worker's heartbeats, and whether it may trade while the database does not answer."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import UUID

import psycopg
from psycopg.rows import args_row

from . import api
from .queries import QUERIES
from .text import one_line

__all__ = ["Machine"]

_logger = logging.getLogger(__name__)


def _uptime() -> float:
    """Seconds on a clock that is never set and that, on Linux, goes on while the host is suspended.

    `time.monotonic()` stops while it is suspended: the machine would miss that time at wake-up.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _shown(period: timedelta) -> str:
    return f"{period.total_seconds():g} s"


class _Settings(NamedTuple):
    """The part of `arbiter.settings` that machines need; read with every heartbeat."""

    heartbeat_interval: timedelta
    heartbeat_timeout: timedelta


class _Link(NamedTuple):
    """A connection and a second handle of its socket, by which another thread can end a call."""

    conn: psycopg.Connection[Any]
    tap: socket.socket

    def break_off(self) -> None:
        with suppress(OSError):  # it may have ended already
            self.tap.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.conn.close()
        self.tap.close()


class Machine:
    """Sends a machine's heartbeats from a thread and says whether it may go on trading::

        with Machine(lambda: psycopg.connect(dsn), machine_id, on_loss=stop_trading) as machine:
            while machine.may_execute():
                trade()

    **It fences the client, the database fences the writes.** The database rejects the writes of a
    machine that is not the holder. But an order at an exchange is not a write to the database, and
    a machine that cannot reach its database cannot ask. So it must stop by itself before the
    browser may take over: `may_execute()` turns false `margin` before the last successful
    heartbeat is `heartbeat_timeout` old. The age counts from when that heartbeat *began*, since the
    database may have stamped it that early, and on a clock that is never set. True does not mean
    that this machine holds the lease: write the intent to a protected table first, and send the
    order only when that write was admitted.

    * `connect` opens a connection, for the heartbeats alone: give it a `connect_timeout`. It is
      called again, with growing pauses, when a connection failed.
    * `margin` must cover the time between `may_execute()` and the order's arrival at the exchange,
      so it is more than zero.
    * `on_loss` is called once each time `may_execute()` turns false by itself, also while a
      heartbeat hangs; from a thread of its own, whose exceptions are logged. After a loss the
      heartbeats go on, and `may_execute()` turns true again with the next success.
    * `clock` returns seconds; for tests.

    The periods come from `arbiter.settings`, read anew with each heartbeat.

    Raises `ValueError` when `margin` is not more than zero, and `TypeError` for a parameter of
    another type.
    """

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        machine_id: api.Id,
        *,
        margin: timedelta = timedelta(seconds=5),
        on_loss: Callable[[], None] | None = None,
        clock: Callable[[], float] = _uptime,
    ) -> None:
        if not isinstance(margin, timedelta):
            raise TypeError(f"margin is a timedelta, not {margin!r}")
        if margin <= timedelta():
            # Otherwise may_execute() would be true while the browser may write already.
            raise ValueError(f"margin must be more than zero, it is {_shown(margin)}")
        if not isinstance(machine_id, (UUID, str, int)):
            raise TypeError(f"machine_id is a uuid, a text or a number, not {machine_id!r}")
        if not callable(connect):
            raise TypeError("connect is a function that opens a connection")
        if on_loss is not None and not callable(on_loss):
            raise TypeError("on_loss is a function, or None")
        self.machine_id = str(machine_id)
        self._connect = connect
        self._margin = margin
        self._on_loss = on_loss
        self._clock = clock
        self._threads: list[threading.Thread] = []

        self._beating = threading.Lock()  # one heartbeat at a time; taken before _state

        self._state = threading.Condition()  # guards all below; never held while anything blocks
        self._settings = _Settings(timedelta(), timedelta())
        self._link: _Link | None = None
        self._call_began: float | None = None  # of the heartbeat under way
        self._began: float | None = None  # of the last successful heartbeat
        self._armed = False  # may_execute() was true, its end is not noted yet
        self._losses = 0  # noted, on_loss not called yet
        self._stopped = False

    def start(self) -> None:
        """Send the first heartbeat, then go on from a thread.

        Raises what the first heartbeat raises: an unknown machine, one that its registry calls
        unhealthy, no database, or `ValueError`, without a heartbeat, when `margin` leaves less than
        a heartbeat interval to trade in.
        """
        if self._threads or self._stopped:
            raise RuntimeError("a Machine starts once")
        self.beat_now()
        for work in (self._beat_on, self._watch):
            name = f"arbiter {work.__name__.strip('_')} {self.machine_id}"
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Send no more heartbeats; `may_execute()` is false from now on. Ends the threads.

        The database is not told: set the machine's status in the registry for that.
        """
        with self._state:
            self._note_loss()
            self._armed = False
            self._stopped = True
            self._state.notify_all()
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(timeout=1)
        if not self._beating.acquire(timeout=1):  # a heartbeat hangs
            with self._state:
                if self._link:
                    self._link.break_off()
            for thread in others:
                thread.join(timeout=1)
            if not self._beating.acquire(timeout=1):
                _logger.warning("machine %s: stopped while it was connecting", self.machine_id)
                return
        try:
            self._hang_up()
        finally:
            self._beating.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def may_execute(self) -> bool:
        """Whether the last successful heartbeat began recently enough. Never waits."""
        with self._state:
            self._note_loss()
            return self._is_fresh()

    def beat_now(self) -> datetime:
        """Send a heartbeat and return the instant that the database stored.

        For use between two heartbeats, after a wake-up for instance. Waits for a heartbeat under
        way; raises what the database raises.
        """
        with self._beating:
            began = self._clock()
            try:
                link = self._dial()
                with self._state:
                    self._call_began = began
                    self._state.notify_all()
                with link.conn.transaction():
                    with psycopg.Cursor(link.conn, row_factory=args_row(_Settings)) as cur:
                        settings = cur.execute(QUERIES["machine_settings"]).fetchone()
                    assert settings is not None  # a constraint keeps that row
                    if self._began is None:
                        self._need_time_to_trade(settings)
                    stored = api.heartbeat(link.conn, self.machine_id)
            except BaseException:
                self._hang_up()
                raise
            finally:
                with self._state:
                    self._call_began = None
            with self._state:
                self._note_loss()  # the previous heartbeat's time may have run out
                self._settings, self._began = settings, began
                self._armed = self._is_fresh()
                self._state.notify_all()
            return stored

    def _need_time_to_trade(self, settings: _Settings) -> None:
        """Before the first heartbeat: it could take the lease for a machine that cannot trade."""
        if self._margin > settings.heartbeat_timeout - settings.heartbeat_interval:
            raise ValueError(
                f"margin is {_shown(self._margin)}, more than heartbeat_timeout "
                f"{_shown(settings.heartbeat_timeout)} less heartbeat_interval "
                f"{_shown(settings.heartbeat_interval)}"
            )

    def _is_fresh(self) -> bool:
        if self._stopped or self._began is None:
            return False
        window = self._settings.heartbeat_timeout - self._margin
        return self._clock() - self._began <= window.total_seconds()

    def _note_loss(self) -> None:
        """Note, once, that `may_execute()` has turned false."""
        if self._armed and not self._is_fresh():
            self._armed = False
            self._losses += 1
            self._state.notify_all()

    def _beat_on(self) -> None:
        failures = 0
        while not self._stops_within(self._pause(failures)):
            try:
                self.beat_now()
                failures = 0
            except Exception as exc:
                failures += 1
                _logger.warning("machine %s: heartbeat failed: %s", self.machine_id, one_line(exc))

    def _pause(self, failures: int) -> float:
        """Seconds to the next heartbeat: intervals count from begin to begin."""
        interval = self._settings.heartbeat_interval.total_seconds()
        if failures:
            return min(interval, interval / 32 * 2.0 ** min(failures, 5))
        return max(0.0, interval - (self._clock() - (self._began or 0.0)))

    def _stops_within(self, seconds: float) -> bool:
        with self._state:
            return self._state.wait_for(lambda: self._stopped, seconds)

    def _watch(self) -> None:
        """Call `on_loss`. A thread of its own, because a heartbeat that hangs must not delay it."""
        while self._wait_for_loss():
            if self._on_loss:
                try:
                    self._on_loss()
                except Exception:
                    _logger.exception("machine %s: on_loss failed", self.machine_id)

    def _wait_for_loss(self) -> bool:
        """True when a loss is to be reported, False when stopped. Ends calls that hang."""
        with self._state:
            while True:
                self._note_loss()
                if self._losses:
                    self._losses -= 1
                    return True
                if self._stopped:
                    return False
                self._state.wait(self._until_something_is_due())

    def _until_something_is_due(self) -> float | None:
        timeout = self._settings.heartbeat_timeout.total_seconds()
        now = self._clock()
        due = []
        if self._armed and self._began is not None:
            due.append(self._began + timeout - self._margin.total_seconds() - now)
        if self._call_began is not None:
            due.append(self._call_began + timeout - now)
            if due[-1] < 0 and self._link:
                self._call_began = None
                self._link.break_off()  # beat_now() raises, the next one connects anew
        return max(0.001, min(due)) if due else None

    def _dial(self) -> _Link:
        if self._link is None:
            conn = self._connect()
            try:
                conn.autocommit = True
                conn.prepare_threshold = None  # prepared statements fail behind some poolers
                tap = socket.fromfd(conn.fileno(), socket.AF_INET, socket.SOCK_STREAM)
            except BaseException:
                conn.close()
                raise
            with self._state:
                self._link = _Link(conn, tap)
        if self._stopped:
            raise RuntimeError("this machine was stopped")
        return self._link

    def _hang_up(self) -> None:
        with self._state:
            link, self._link = self._link, None
        if link:
            link.close()
