"""What stands side by side: a database for each variant, on one server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

import arbiter_db
from arbiter_db.embedded import EmbeddedServer
from arbiter_db.queries import _load

__all__ = ["AGAIN", "SQL", "UNGUARDED", "USERS", "VARIANTS", "Conn", "Stage"]

DEMO = Path(arbiter_db.__file__).parent / "demo"
SQL = _load((Path(__file__).parent / "bench.sql").read_text(encoding="utf-8"))

#: Each with a trader, every second one with a machine that runs.
USERS = 1_000

#: Plays twice: how far the two differ is the machine's noise.
UNGUARDED, AGAIN = "unguarded", "unguarded again"

#: Who decides. The client-side schemes ask, or lock, in a statement of their own before the write.
VARIANTS = (UNGUARDED, AGAIN, "exists", "check", "advisory", "arbiter")

Conn = psycopg.Connection[Any]


class Stage:
    """A database for each variant, on one server, with a connection to each."""

    def __init__(self, server: EmbeddedServer, stack: ExitStack) -> None:
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute((DEMO / "roles.sql").read_bytes())
        self.bindir = server.bindir
        self.connections = {
            variant: stack.enter_context(_prepare(server, variant)) for variant in VARIANTS
        }


def _prepare(server: EmbeddedServer, variant: str) -> Conn:
    """Make the database of a variant; returns a connection that does not wait for the disk."""
    name = f"bench_{variant.replace(' ', '_')}"
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute(f"create database {name} owner app_owner".encode())
    conninfo = server.conninfo(name, "app_owner")
    conn = psycopg.connect(conninfo, autocommit=True)
    conn.execute((DEMO / "trading.sql").read_bytes())
    conn.execute(SQL["lean"])
    psycopg.ClientCursor(conn).execute(SQL["people"], {"users": USERS})  # several statements
    if variant == "arbiter":
        arbiter_db.install(conninfo)
        conn.execute(SQL["settings"])
    else:
        conn.execute(SQL["columns"])
        if variant == "exists":
            conn.execute(SQL["exists"])
    conn.execute(SQL["run"])
    conn.execute(SQL["run"])  # the second heartbeat ends the drain
    conn.execute(SQL["first"])
    conn.execute("vacuum analyze")
    # The commit is the same for all of them, and disks are noisy.
    conn.execute("set synchronous_commit = off")
    conn.prepare_threshold = 0
    return conn
