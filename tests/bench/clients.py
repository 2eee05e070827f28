"""Throughput of clients that arbitrate among themselves, or leave it to the database.

pgbench speaks to PostgreSQL only, so here all variants are driven by the same Python clients, each
a process with a connection of its own. Clients are seldom on the server's machine, so a round trip
is simulated, too: the client waits once for each message that needs an answer. Nothing else of a
network is imitated.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random
from threading import Event

import redis

from bench.load import BenchError
from bench.samples import Comparison, Conn, Group, Plan, Samples
from bench.stage import AGAIN, SQL, UNGUARDED, USERS, Stage
from bench.together import connect

__all__ = ["COMPARISONS", "Clients"]

GROUP = Group("Schemes of clients, Python clients: inserts a second as a part of unguarded")

REDIS = "redis"
VARIANTS = (UNGUARDED, AGAIN, "check", "advisory", REDIS, "arbiter")

#: A Redis lock expires after the one; a client waits for a lock no longer than the other.
LOCK_S, PATIENCE_S = 10, 5
START_S = 10

Write = Callable[[dict[str, object]], None]


@dataclass(frozen=True)
class Clients:
    """Single-row local inserts, many users; ``away`` is the time of a round trip, in ms."""

    clients: int
    away: int = 0
    group: Group = GROUP

    @property
    def title(self) -> str:
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return f"{clients}, {self.away} ms away" if self.away else clients

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "inserts/s", VARIANTS)
        with _redis() as socket:
            for number in range(plan.rounds + 1):
                for variant in VARIANTS:
                    rate = self._play(stage, variant, plan.seconds, socket)
                    if number > 0:
                        samples.rounds[variant].append(rate)
                on_round()
        return samples

    def _play(self, stage: Stage, variant: str, seconds: int, socket: str) -> float:
        conn = stage.connection(variant)
        before = _count(conn)
        start = multiprocessing.Barrier(self.clients)
        jobs = [
            (variant, stage.conninfo(variant), socket, client, self.away / 1_000, seconds)
            for client in range(self.clients)
        ]
        with multiprocessing.Pool(self.clients, _meet, (start,)) as pool:
            done = sum(pool.starmap_async(_run, jobs, chunksize=1).get(seconds + 60))
        if _count(conn) - before != done:
            raise BenchError(f"{variant}: {done} inserts said, {_count(conn) - before} there")
        return done / seconds


def _count(conn: Conn) -> int:
    (found,) = conn.execute("select count(*) from public.signals").fetchone() or (0,)
    return int(found)


# A client ----------------------------------------------------------------------------------------

_start: Barrier


def _meet(start: Barrier) -> None:
    global _start
    _start = start


def _run(variant: str, conninfo: str, socket: str, client: int, away: float, seconds: int) -> int:
    """Insert for that many seconds; return the number of inserts."""
    random = Random(client)
    with connect(conninfo) as conn, redis.Redis(unix_socket_path=socket) as lock_server:
        write = _scheme(variant, conn, lock_server, away)
        _start.wait(START_S)
        end = time.monotonic() + seconds
        done = 0
        while time.monotonic() < end:
            write({"user": random.randrange(1, USERS + 1, 2), "client": client})
            done += 1
        return done


def _scheme(variant: str, conn: Conn, lock_server: redis.Redis, away: float) -> Write:
    """One signal, with what the variant's client says around it."""

    def travel() -> None:
        if away:
            Event().wait(away)

    def insert(turn: dict[str, object]) -> None:
        conn.execute(SQL["insert_now"], turn)
        travel()

    def after_asking(turn: dict[str, object]) -> None:
        conn.execute(SQL["ask"], turn).fetchone()
        travel()
        insert(turn)

    def under_advisory_lock(turn: dict[str, object]) -> None:
        with conn.transaction():
            travel()
            conn.execute(SQL["lock"], turn)
            travel()
            after_asking(turn)
        travel()

    def under_redis_lock(turn: dict[str, object]) -> None:
        with lock_server.lock(f"{turn['user']}", timeout=LOCK_S, blocking_timeout=PATIENCE_S):
            travel()
            after_asking(turn)
        travel()

    schemes: dict[str, Write] = {
        "check": after_asking,
        "advisory": under_advisory_lock,
        REDIS: under_redis_lock,
    }
    return schemes.get(variant, insert)


# Redis -------------------------------------------------------------------------------------------


@contextmanager
def _redis() -> Iterator[str]:
    """A Redis server that keeps nothing; yields its socket."""
    program = shutil.which("redis-server")
    if program is None:
        raise BenchError("redis-server is needed: install the Debian package redis-server")
    with tempfile.TemporaryDirectory() as folder:
        socket = str(Path(folder, "redis.sock"))
        command = [program, "--port", "0", "--unixsocket", socket, "--dir", folder]
        process = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL
        )
        try:
            _wait_for(socket)
            yield socket
        finally:
            process.terminate()
            process.wait(START_S)


def _wait_for(socket: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with redis.Redis(unix_socket_path=socket) as client:
                client.ping()
            return
        except redis.ConnectionError as error:
            if time.monotonic() > deadline:
                raise BenchError(f"redis-server does not answer: {error}") from None
            Event().wait(0.05)


COMPARISONS: dict[str, Comparison] = {
    "clients1": Clients(1),
    "clients8": Clients(8),
    "clients1_away": Clients(1, away=1),
    "clients8_away": Clients(8, away=1),
}
