"""The server the tests run on, and a fresh database for each test.

The server is an embedded one of the major version in the environment variable PG (default 18). It
is kept for the next run (see ``kept_server``), unless the environment variable CI is set.
A database is cloned from a template, which is built when the first test asks for it, and anew when
something that it is made from has changed:

``bare_db``     an empty database
``trading_db``  the demo's trading schema, created by ``app_owner``
``db``          the same with arbiter installed by ``app_owner``, who is no superuser

The roles are Supabase's: ``app_owner`` owns databases and tables; ``authenticator`` logs in and
becomes ``anon``, ``authenticated`` or ``service_role``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import kept_server
import psycopg
import pytest
from kept_server import KeptServer
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.types.string import TextLoader
from pytest_postgresql.janitor import DatabaseJanitor
from sessions import Session, watch_with

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer, EmbeddedServerError, find_installation

# The tests must not depend on how the shell that runs them reaches some other server.
for _name in [n for n in os.environ if (n.startswith("PG") and n != "PG") or n == "DATABASE_URL"]:
    del os.environ[_name]

# Nor on whether that shell runs them in the background: what they start would inherit an interrupt
# that is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: The version on which everything runs.
NEWEST = 18

OWNER = "app_owner"
LOGIN = "authenticator"

ROLES = """
create role app_owner login nosuperuser nocreaterole;
create role anon nologin;
create role authenticated nologin;
create role service_role nologin bypassrls;
create role authenticator login noinherit;
grant anon, authenticated, service_role to authenticator;
"""

_SERVER = pytest.StashKey[EmbeddedServer]()


def _major() -> int:
    """The major version to test on."""
    wanted = os.environ.get("PG") or str(NEWEST)
    if not wanted.isdigit():
        raise pytest.UsageError(f"PG is not a major version of PostgreSQL: {wanted}")
    return int(wanted)


def _server(config: pytest.Config) -> EmbeddedServer:
    """The session's server, taken or started when it is asked for the first time."""
    if _SERVER not in config.stash:
        try:
            server = _kept_server() or _new_server()
        except EmbeddedServerError as error:
            raise pytest.UsageError(str(error)) from error
        config.stash[_SERVER] = server
        watch_with(server.conninfo())
    return config.stash[_SERVER]


def _kept_server() -> EmbeddedServer | None:
    if os.environ.get("CI"):
        return None
    return kept_server.claim(_major(), setup=ROLES, keep=template_hash())


def _new_server() -> EmbeddedServer:
    server = EmbeddedServer(_major())
    server.start()
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        conn.execute(ROLES)
    return server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what says nothing of arbiter on this version; the header names it."""
    if _major() == NEWEST:
        return
    naive = [item for item in items if item.get_closest_marker("naive")]
    if naive:
        config.hook.pytest_deselected(items=naive)
        items[:] = [item for item in items if item not in set(naive)]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the server that is tested, in its own words, and what is not run on it."""
    if config.option.collectonly:
        return []
    lines = _server_lines(config)
    if _major() != NEWEST:
        lines.append(
            "not run on this version: the tests that show only that a naive rule goes wrong;"
            f" they run on PostgreSQL {NEWEST} (there `-m naive` runs them alone)"
        )
    return lines


def _server_lines(config: pytest.Config) -> list[str]:
    if getattr(config.option, "numprocesses", None):  # each worker has a server of its own
        try:
            postgres = find_installation(_major()).bindir / "postgres"
        except EmbeddedServerError as error:
            raise pytest.UsageError(str(error)) from error
        done = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=True)
        return [f"servers: {done.stdout.strip()}"]
    server = _server(config)
    with psycopg.connect(server.conninfo()) as conn:
        row = conn.execute("select version()").fetchone()
    assert row is not None
    how = "kept from an earlier run" if isinstance(server, KeptServer) else "of this run alone"
    if isinstance(server, KeptServer) and server.is_new:
        how = "new, kept for later runs"
    return [
        f"server: {row[0]}, {how}",
        f"server's files: {server.bindir}, data: {server.data_directory}",
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Spare a run without hypothesis the half second in which its plugin imports all of it."""
    config = session.config
    if "hypothesis" not in sys.modules and not getattr(config.option, "numprocesses", None):
        config.pluginmanager.unregister(name="hypothesispytest")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server, or leave it to the next run."""
    if _SERVER in config.stash:
        watch_with(None)
        config.stash[_SERVER].close()


class Janitor(DatabaseJanitor):
    """Creates a database that ``app_owner`` owns; drops it even while sessions are connected."""

    def init(self) -> None:
        """Create the database. Copying its files takes a third of the default's time."""
        with self.cursor() as cur:
            cur.execute(
                sql.SQL("create database {} owner {} template {} strategy file_copy").format(
                    sql.Identifier(self.dbname),
                    sql.Identifier(OWNER),
                    sql.Identifier(self.template_dbname or "template1"),
                )
            )

    def make_template(self) -> None:
        """Mark the database as a template, now that it is complete."""
        self.as_template = True
        with self.cursor() as cur:
            name = sql.Identifier(self.dbname)
            cur.execute(sql.SQL("alter database {} is_template true").format(name))

    def drop(self) -> None:
        """Drop the database, ending the sessions in it."""
        name = sql.Identifier(self.dbname)
        with self.cursor() as cur:
            if self.is_template():
                cur.execute(sql.SQL("alter database {} is_template false").format(name))
            cur.execute(sql.SQL("drop database if exists {} with (force)").format(name))


class _UntypedId(Dumper):
    """Sends a uuid without a type, so that the server reads it as what it is compared with."""

    def dump(self, obj: Any) -> bytes:
        return str(obj).encode()


def _ids_as_texts(conn: psycopg.Connection[Any]) -> None:
    """Ids are texts in arbiter's tables and uuids in the demo's: for tests both are strings."""
    conn.adapters.register_dumper(UUID, _UntypedId)
    conn.adapters.register_loader("uuid", TextLoader)


class Database:
    """A database of one test. What it opened is closed when the test ends, however it ends."""

    def __init__(self, server: EmbeddedServer, name: str) -> None:
        self.server = server
        self.name = name
        self._opened = ExitStack()
        self._session_numbers = count(1)

    def conninfo(self, user: str = OWNER) -> str:
        """A connection string for that user."""
        return self.server.conninfo(dbname=self.name, user=user)

    def connect(
        self,
        user: str | None = None,
        role: str | None = None,
        autocommit: bool = True,
        *,
        claims: dict[str, Any] | None = None,
        **kw: Any,
    ) -> psycopg.Connection[Any]:
        """Open a connection.

        ``role`` is set for the session, as PostgREST does it for a request. Without ``user`` a
        connection with a role logs in as ``authenticator``, one without as ``app_owner``.
        ``claims`` become the session's ``request.jwt.claims``. ``kw`` goes to psycopg.connect.
        """
        user = user or (LOGIN if role else OWNER)
        conn = psycopg.connect(self.conninfo(user), autocommit=True, **kw)
        _ids_as_texts(conn)
        self._opened.callback(conn.close)
        if role is not None:
            conn.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
        if claims is not None:
            conn.execute(
                "select set_config('request.jwt.claims', %s, false)", (json.dumps(claims),)
            )
        conn.autocommit = autocommit
        return conn

    def session(
        self, user: str | None = None, role: str | None = None, *, name: str = "", **kw: Any
    ) -> Session:
        """Open a connection that runs its statements in a thread (see ``sessions``)."""
        name = name or f"session {next(self._session_numbers)}"
        session = Session(self.connect(user, role, application_name=name, **kw), name)
        self._opened.callback(session.close)
        return session

    def close(self) -> None:
        """Close all connections that were opened here."""
        self._opened.close()


@cache
def template_hash() -> str:
    """A hash of all that the templates are made from, but for the server."""
    root, package = Path(__file__).parents[1], Path(arbiter_db.__file__).parent
    files = [Path(__file__), *package.rglob("*.sql")]
    files += [path for path in package.rglob("*.py") if path.parent.name != "demo"]
    for folder in ("migrations", "sql"):
        files += (root / folder).rglob("*.sql")
    found = hashlib.sha256(version("yoyo-migrations").encode())
    for path in sorted(files):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


class Templates:
    """The template databases, each built when it is asked for and not there.

    On a server that is kept they stay for the next run.
    """

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self._stack = ExitStack()
        self._known: set[str] = set()
        self._numbers = count(1)
        self._build: dict[str, tuple[str | None, Callable[[str], None]]] = {
            "bare": (None, lambda conninfo: None),
            "trading": ("bare", _create_trading),
            "installed": ("trading", lambda conninfo: arbiter_db.install(conninfo)),
        }

    def close(self) -> None:
        """Drop the templates, unless the server is kept."""
        self._stack.close()

    @contextmanager
    def clone(self, kind: str) -> Iterator[Database]:
        """A fresh database made from the template ``kind``, dropped at the end."""
        name = f"test_{kind}_{next(self._numbers)}"
        with ExitStack() as stack:
            self._create(stack, name, self._template(kind))
            database = Database(self._server, name)
            stack.callback(database.close)
            yield database

    def _template(self, kind: str) -> str:
        name = f"template_{kind}_{template_hash()}"
        if name not in self._known and not self._is_there(name):
            parent, build = self._build[kind]
            source = self._template(parent) if parent else None
            with ExitStack() as stack:  # a template that cannot be built is dropped again
                janitor = self._create(stack, name, source)
                build(self._server.conninfo(dbname=name, user=OWNER))
                janitor.make_template()
                made = stack.pop_all()
                if not isinstance(self._server, KeptServer):
                    self._stack.push(made)
        self._known.add(name)
        return name

    def _is_there(self, name: str) -> bool:
        with psycopg.connect(self._server.conninfo(), autocommit=True) as conn:
            query = "select from pg_database where datname = %s and datistemplate"
            return conn.execute(query, (name,)).rowcount == 1

    def _create(self, stack: ExitStack, name: str, template: str | None) -> Janitor:
        janitor = Janitor(
            user="postgres",
            host=self._server.host,
            port=self._server.port,
            dbname=name,
            template_dbname=template,
        )
        stack.callback(janitor.drop)
        janitor.init()
        return janitor


def _create_trading(conninfo: str) -> None:
    script = Path(arbiter_db.__file__).parent / "demo" / "trading.sql"
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute(script.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer]:
    """The server that all tests share. A test that stops it, or changes its options, takes its own.

    What concerns all databases must be at the end as it was: roles, settings, tablespaces.
    """
    server = _server(pytestconfig)
    before = kept_server.state_of(server)
    yield server
    assert kept_server.state_of(server) == before


@pytest.fixture(scope="session")
def templates(server: EmbeddedServer) -> Iterator[Templates]:
    """The template databases."""
    templates = Templates(server)
    yield templates
    templates.close()


@pytest.fixture
def bare_db(templates: Templates) -> Iterator[Database]:
    """An empty database that ``app_owner`` owns."""
    with templates.clone("bare") as database:
        yield database


@pytest.fixture
def trading_db(templates: Templates) -> Iterator[Database]:
    """A database with the demo's trading schema, without arbiter."""
    with templates.clone("trading") as database:
        yield database


@pytest.fixture
def db(templates: Templates) -> Iterator[Database]:
    """A database with the demo's trading schema and arbiter installed by ``app_owner``."""
    with templates.clone("installed") as database:
        yield database
