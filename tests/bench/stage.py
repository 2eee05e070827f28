"""The databases that are compared: one for each variant, on one server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import psycopg

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.queries import cut
from bench.samples import Conn

__all__ = [
    "AGAIN",
    "ANATOMY",
    "HEARTBEAT_STEPS",
    "SQL",
    "STATUS_STEPS",
    "STEPS",
    "UNGUARDED",
    "USERS",
    "VARIANTS",
    "Stage",
    "load_sql",
]

DEMO = Path(arbiter_db.__file__).parent / "demo"


def load_sql(name: str) -> dict[str, bytes]:
    """The statements of a file beside this one, by name."""
    return cut((Path(__file__).parent / name).read_text(encoding="utf-8"))


SQL = load_sql("bench.sql")

#: Users, each with a trader, every second one with a machine that runs.
USERS = 1_000

#: The same database twice: the difference between the two is the machine's noise.
UNGUARDED, AGAIN = "unguarded", "unguarded again"

#: Who decides. The client-side schemes ask, or lock, in a statement of their own before the write.
VARIANTS = (UNGUARDED, AGAIN, "exists", "policy", "check", "advisory", "arbiter")

#: Guards, heartbeats and status in steps: each does what the one before does, and more.
#: ``each_row`` is the guard's step ``lease`` as a trigger for each row.
STEPS = ("column", "trigger", "rows", "owner", "lease", "decided")
HEARTBEAT_STEPS = ("stamped", "told", "held")
STATUS_STEPS = ("call", "reads")

ANATOMY = load_sql("anatomy.sql")

#: The scripts that turn an unguarded database into a variant's.
_SCRIPTS = {
    "exists": (SQL["exists"],),
    "policy": (SQL["policy"],),
    "each_row": tuple(ANATOMY[name] for name in ("leases", "column", "each_row")),
    **{
        step: tuple(ANATOMY[name] for name in ("leases", *steps[:number]))
        for steps in (STEPS, HEARTBEAT_STEPS, STATUS_STEPS)
        for number, step in enumerate(steps, 1)
    },
}


class Stage:
    """A server, with a database for each variant that is asked for."""

    def __init__(self, server: EmbeddedServer, stack: ExitStack) -> None:
        self.server = server
        self._stack = stack
        self._connections: dict[str, Conn] = {}
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute((DEMO / "roles.sql").read_bytes())

    def conninfo(self, variant: str) -> str:
        """How to reach the database of a variant, as the app's owner."""
        self.connection(variant)
        return self.server.conninfo(_name(variant), "app_owner")

    def connection(self, variant: str) -> Conn:
        """The stage's own connection to a variant's database; it does not wait for the disk."""
        if variant not in self._connections:
            self._connections[variant] = self._stack.enter_context(_prepare(self.server, variant))
        return self._connections[variant]


def _name(variant: str) -> str:
    return f"bench_{variant.replace(' ', '_')}"


def _prepare(server: EmbeddedServer, variant: str) -> Conn:
    """Make the database of a variant."""
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute(f"create database {_name(variant)} owner app_owner".encode())
    conninfo = server.conninfo(_name(variant), "app_owner")
    conn = psycopg.connect(conninfo, autocommit=True)
    conn.execute((DEMO / "trading.sql").read_bytes())
    conn.execute(SQL["lean"])
    psycopg.ClientCursor(conn).execute(SQL["people"], {"users": USERS})  # several statements
    if variant == "arbiter":
        arbiter_db.install(conninfo)
        conn.execute(SQL["settings"])
    else:
        conn.execute(SQL["columns"])
        for script in _SCRIPTS.get(variant, ()):
            conn.execute(script)
    conn.execute(SQL["run"])
    conn.execute(SQL["run"])  # the second heartbeat ends the drain
    conn.execute(SQL["first"])
    conn.execute("vacuum analyze")
    # The commit costs the same in all variants, and disks are noisy.
    conn.execute("set synchronous_commit = off")
    conn.prepare_threshold = 0
    return conn
