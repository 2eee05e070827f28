"""psql on a server of its own: the demo's trading app with arbiter, to try statements by hand."""

from __future__ import annotations

import signal
import subprocess

import psycopg

import arbiter_db
from arbiter_db.terminal import say

from .embedded import EmbeddedServer, EmbeddedServerError
from .stage import STATEMENTS, sql_file
from .story import DATABASE, MACHINE, USER, create_app

__all__ = ["run"]

_OWNER = "app_owner"

_GREETING = """\
PostgreSQL {version} with a trading app and arbiter, thrown away at the end (\\q).
You own the tables: traders, signals, positions, cloud_machines."""


def run(major: int = 18) -> int:
    """Start the server, open psql as the owner of the tables, return psql's exit code."""
    with EmbeddedServer(major) as server:
        if server.psql is None:
            raise EmbeddedServerError("there is no psql on this machine: install postgresql-client")
        create_app(server)
        conninfo = server.conninfo(DATABASE, _OWNER)
        arbiter_db.install(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute(sql_file("people.sql"))
            provisioned = {"machine": MACHINE, "user": USER, "provider_id": "e286de4f711e86"}
            conn.execute(STATEMENTS["provision"], provisioned)
        say(_GREETING.format(version=server.version), lines=True)
        # Ctrl-C is psql's: it cancels a statement, and must not end the server below it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            # The functions in which a rejection was raised tell a visitor nothing.
            command = [server.psql, "-X", "-q", "-v", "QUIET=off", "-v", "SHOW_CONTEXT=never"]
            return subprocess.run([*command, conninfo], check=False).returncode
        finally:
            signal.signal(signal.SIGINT, before)
