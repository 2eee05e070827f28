"""Tools for comparisons with databases of their own that take their samples from one play."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

import arbiter_db
from bench.samples import Comparison, Conn, Group, Plan, Samples
from bench.stage import DEMO, SQL, Stage

__all__ = ["Together", "connect", "database", "install", "make_app", "run_script"]

Play = Callable[[Stage, Plan, Callable[[], None]], dict[str, Samples]]


# Databases ---------------------------------------------------------------------------------------


@contextmanager
def database(stage: Stage, name: str, template: str = "template1") -> Iterator[str]:
    """Make a database of the app's owner, yield how to reach it, and drop it at the end."""
    names = [sql.Identifier(name), sql.Identifier(template)]
    create = sql.SQL("create database {} template {} strategy file_copy owner app_owner")
    with psycopg.connect(stage.server.conninfo(), autocommit=True) as conn:
        conn.execute(create.format(*names))
        try:
            yield stage.server.conninfo(name, "app_owner")
        finally:
            conn.execute(sql.SQL("drop database {} with (force)").format(*names[:1]))


def connect(conninfo: str) -> Conn:
    """A connection like the stage's: it prepares statements and does not wait for the disk."""
    conn = psycopg.connect(conninfo, autocommit=True)
    conn.execute("set synchronous_commit = off")
    conn.prepare_threshold = 0
    return conn


def run_script(conn: Conn, script: bytes, **values: object) -> None:
    """Run several statements in one transaction."""
    with conn.transaction():
        psycopg.ClientCursor(conn).execute(script, values or None, prepare=False)


def make_app(conn: Conn) -> None:
    """Create the demo's app, as lean as on the stage."""
    run_script(conn, (DEMO / "trading.sql").read_bytes())
    run_script(conn, SQL["lean"])


def install(conninfo: str) -> None:
    """Install arbiter, with the stage's settings."""
    arbiter_db.install(conninfo)
    with connect(conninfo) as conn:
        conn.execute(SQL["settings"])


# Plays -------------------------------------------------------------------------------------------


@dataclass
class Together:
    """Comparisons that one play measures: the first one plays, the others use its samples."""

    play: Play
    group: Group
    titles: Mapping[str, str]
    _stage: Stage | None = field(default=None, init=False)
    _found: dict[str, Samples] = field(default_factory=dict, init=False)

    def found(self, name: str, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        if self._stage is not stage:
            self._found = self.play(stage, plan, on_round)
            self._stage = stage
        return self._found[name]

    def comparisons(self) -> dict[str, Comparison]:
        """The comparisons, by name."""
        return {name: _Part(name, title, self) for name, title in self.titles.items()}


@dataclass(frozen=True)
class _Part:
    name: str
    title: str
    together: Together

    @property
    def group(self) -> Group:
        return self.together.group

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        return self.together.found(self.name, stage, plan, on_round)
