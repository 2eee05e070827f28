"""The connections of the workload. A lost one is opened again, once its unanswered statement cannot
take effect any more."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from arbiter_db.demo.embedded import EmbeddedServer
from proof.history import Level
from proof.pgbouncer import PgBouncer
from proof.steps import ACTORS, LEVELS

__all__ = ["TIMEOUT_S", "Admin", "Client", "Place", "User"]

#: How long anything here waits before it raises TimeoutError.
TIMEOUT_S = 60.0
LOOK_EVERY_S = 0.01

clock = time.monotonic

_BACKENDS = """
select a.pid, a.xact_start
  from pg_stat_activity a
 where a.datname = current_database() and (a.pid = %s or a.application_name = %s)
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a round is played: a database, and how it is reached. Travels between processes."""

    host: str
    port: int
    dbname: str
    bouncer_host: str
    bouncer_port: int

    @classmethod
    def of(cls, server: EmbeddedServer, bouncer: PgBouncer, dbname: str) -> Place:
        """The database of that name."""
        return cls(server.host, server.port, dbname, bouncer.host, bouncer.port)

    def conninfo(self, user: str, via: str = "direct", **more: str) -> str:
        """How that user connects."""
        direct = via == "direct"
        return make_conninfo(
            "",
            host=self.host if direct else self.bouncer_host,
            port=self.port if direct else self.bouncer_port,
            dbname=self.dbname,
            user=user,
            connect_timeout=20,
            **more,
        )

    @property
    def bouncer_pid(self) -> int:
        """The process id of the PgBouncer that runs; 0 when there is none."""
        try:
            return int((Path(self.bouncer_host) / "pgbouncer.pid").read_text())
        except (OSError, ValueError):
            return 0


@dataclass(slots=True)
class User:
    """A user with a trader; ``machine`` is the latest machine, of ``lives`` so far."""

    number: int
    id: UUID
    trader: UUID
    machine: UUID | None = None
    has_machine: asyncio.Event = field(default_factory=asyncio.Event)
    lives: int = 0

    @property
    def claims(self) -> str:
        return json.dumps({"sub": str(self.id), "role": "authenticated"}, separators=(",", ":"))


class Admin:
    """A superuser's connection, to ask about the server's side of a lost connection."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    async def ask(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, once the server can be asked."""
        async with self._lock, asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    if self._conn is None:
                        self._conn = await psycopg.AsyncConnection.connect(
                            self._place.conninfo("postgres"), autocommit=True
                        )
                    return await (await self._conn.execute(query, params)).fetchall()
                except psycopg.OperationalError:
                    await self.close()
                    await asyncio.sleep(LOOK_EVERY_S)

    async def close(self) -> None:
        if self._conn is not None:
            await self._conn.close()
            self._conn = None


class Client:
    """An actor's connection, which is opened again whenever it is lost."""

    def __init__(self, place: Place, admin: Admin, user: User, name: str, level: Level) -> None:
        self.actor = ACTORS[name]
        self.name = name
        self.user = user
        self.level = level
        self._place = place
        self._admin = admin
        self._pid = 0
        self._label = ""
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self.cursor: psycopg.AsyncCursor[Any]
        role: sql.Composable = sql.SQL("")
        if self.actor.begins:
            # All in one message: a pooler keeps nothing of it after the transaction.
            role = sql.SQL("; set local role {}; set local request.jwt.claims = {}").format(
                sql.Identifier(self.actor.role or ""), sql.Literal(user.claims)
            )
        #: How a transaction begins, by its level.
        self.begin = {
            level: sql.SQL("begin isolation level {}{}").format(sql.SQL(level), role).as_string()
            for level in LEVELS
        }

    async def open(self) -> None:
        """Connect, as soon as the server can be reached."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    await self._connect()
                    return
                except psycopg.OperationalError:
                    await asyncio.sleep(LOOK_EVERY_S)

    async def _connect(self) -> None:
        place, actor = self._place, self.actor
        user = "app_owner" if actor.role is None else "authenticator"
        while True:
            if actor.via == "direct":
                options = {"default_transaction_isolation": self.level.replace(" ", "\\ ")}
                if actor.role is not None:
                    options |= {"role": actor.role, "request.jwt.claims": self.user.claims}
                conninfo = place.conninfo(
                    user, options=" ".join(f"-c {name}={value}" for name, value in options.items())
                )
            else:
                # A pooler does not tell its backend's process id, so label the backends.
                self._pid = place.bouncer_pid
                self._label = f"through {self._pid}"
                conninfo = place.conninfo(user, actor.via, application_name=self._label)
            conn = await psycopg.AsyncConnection.connect(
                conninfo,
                autocommit=True,
                prepare_threshold=5 if actor.via == "direct" else None,
            )
            if actor.via == "direct":
                self._pid = conn.info.backend_pid
            elif self._pid != place.bouncer_pid:
                await conn.close()
                continue
            self._conn, self.cursor = conn, conn.cursor()
            return

    @property
    def connection(self) -> psycopg.AsyncConnection[Any]:
        """The connection as it is now."""
        assert self._conn is not None
        return self._conn

    @property
    def broken(self) -> bool:
        """Whether the connection is lost."""
        return self._conn is None or self._conn.closed

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, failed or not."""
        return self.connection.info.transaction_status != TransactionStatus.IDLE

    async def recover(self, error: psycopg.Error) -> None:
        """Wait until nothing of the lost connection runs on the server any more."""
        ask = self._admin.ask
        async with asyncio.timeout(TIMEOUT_S):
            if self.actor.via == "direct":
                while await ask(_BACKENDS, self._pid, None):
                    await asyncio.sleep(LOOK_EVERY_S)
                return
            # Without an error of its own PgBouncer has died, which may show a little later.
            patience = clock() + 1.0
            while error.sqlstate is None and _is_alive(self._pid) and clock() < patience:
                await asyncio.sleep(LOOK_EVERY_S)
            waits = set(await ask(_BACKENDS, None, self._label))
            if _is_alive(self._pid):
                # It is one of many: wait for all transactions that may be ours.
                waits = {seen for seen in waits if seen[1] is not None}
                while waits := waits & set(await ask(_BACKENDS, None, self._label)):
                    await asyncio.sleep(LOOK_EVERY_S)
            else:
                # A statement that was passed on may begin late: wait until all backends have ended.
                while await ask(_BACKENDS, None, self._label):
                    await asyncio.sleep(LOOK_EVERY_S)

    async def close(self) -> None:
        """Disconnect."""
        if self._conn is not None:
            await self._conn.close()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
