"""The exported migrations under other people's tools: each runs a file in a transaction and then
writes its own history in it, by the search_path that it has."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import OWNER, ROLES, Database
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import MetaData, create_engine
from story import activate, add_signal, add_user, backend, rejection, rows

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.supabase import export

from .dbmate import DBMATE

TIMEOUT_S = 120
TRADING = Path(arbiter_db.__file__).parent / "demo" / "trading.sql"
LATER = "create table public.later (id integer primary key)"


@pytest.fixture(scope="module")
def tcp(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(server.major, tcp=True) as started:
        with psycopg.connect(started.conninfo(), autocommit=True) as admin:
            admin.execute(ROLES.encode())
        yield started


@pytest.fixture
def app(tcp: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[Database]:
    """The trading app on a server that listens on TCP, without arbiter."""
    name = f"of_{request.node.name}"
    with psycopg.connect(tcp.conninfo(), autocommit=True) as admin:
        admin.execute(f"create database {name} owner {OWNER}".encode())
    db = Database(tcp, name)
    db.connect().execute(TRADING.read_bytes())
    yield db
    db.close()


def url(db: Database, scheme: str) -> str:
    parts = conninfo_to_dict(db.server.conninfo(db.name, OWNER, tcp=True))
    host = f"{OWNER}:{parts['password']}@127.0.0.1:{db.server.port}"
    return f"{scheme}://{host}/{db.name}?sslmode=disable"


def run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_guarded(db: Database) -> None:
    owner = db.connect()
    assert rows(owner, "select to_regclass('public.later')::text") == [("later",)]
    user = add_user(owner)
    activate(backend(db), user)
    assert rejection(add_signal, owner, user.trader).sqlstate == "WX001"
    wrong = "select * from arbiter.doctor() where state not in ('ok', 'note')"
    assert rows(owner, wrong) == []


def test_dbmate(app: Database, tmp_path: Path) -> None:
    """It wants a line before the SQL and one after it; the project counts its migrations."""
    (tmp_path / "001_app.sql").write_text("-- migrate:up\n-- migrate:down\n")
    written = export(tmp_path)
    assert [path.name for path in written] == ["002_arbiter.sql", "003_arbiter_finish.sql"]
    for path in written:
        text = f"-- migrate:up\n{path.read_text('utf-8')}-- migrate:down\n"
        path.write_text(text, "utf-8")
    (tmp_path / "004_later.sql").write_text(f"-- migrate:up\n{LATER};\n-- migrate:down\n")
    options = ("--no-dump-schema", "--migrations-dir", tmp_path, "--url", url(app, "postgres"))
    run(tmp_path, DBMATE.find(), *options, "up")
    assert_guarded(app)
    versions = rows(app.connect(), "select version from public.schema_migrations order by 1")
    assert versions == [("001",), ("002",), ("003",), ("004",)]
    # It is not exported again because of these lines.
    assert export(tmp_path) == []


REVISION = """
from pathlib import Path
from alembic import op
revision, down_revision = {revision!r}, {before!r}
def upgrade():
    cursor = op.get_bind().connection.cursor()
    cursor.execute(Path({path!r}).read_text(encoding="utf-8"))
"""


def test_alembic(app: Database, tmp_path: Path) -> None:
    """By the driver's cursor: SQLAlchemy's own would take percent signs for parameters."""
    alembic = [sys.executable, "-m", "alembic"]
    run(tmp_path, *alembic, "init", "migrations")
    config = tmp_path / "alembic.ini"
    address = f"sqlalchemy.url = {url(app, 'postgresql+psycopg')}"
    text = re.sub(r"^sqlalchemy\.url .*$", address, config.read_text("utf-8"), flags=re.MULTILINE)
    config.write_text(text, "utf-8")
    (tmp_path / "later.sql").write_text(LATER)
    before = None
    for path in [*export(tmp_path), tmp_path / "later.sql"]:
        text = REVISION.format(revision=path.stem, before=before, path=str(path))
        (tmp_path / "migrations" / "versions" / f"{path.stem}.py").write_text(text, "utf-8")
        before = path.stem
    run(tmp_path, *alembic, "upgrade", "head")
    assert_guarded(app)
    assert rows(app.connect(), "select version_num from public.alembic_version") == [(before,)]
    run(tmp_path, *alembic, "upgrade", "head")


#: The app's models have what it reads itself, without the comments.
ENVIRONMENT = """
import pickle
from pathlib import Path
from alembic import context
from sqlalchemy import Column, Text, Uuid, create_engine

models = pickle.loads(Path({models!r}).read_bytes())
signals = models.tables["signals"]
signals.append_column(Column("source", Text, nullable=False, server_default="local"))
signals.append_column(Column("machine_id", Uuid))

def include_object(item, name, kind, reflected, other):
    return name != "users" and ({include})  # that table belongs to Supabase

with create_engine({url!r}).connect() as connection:
    context.configure(connection=connection, target_metadata=models, include_object=include_object)
    context.run_migrations()
"""


def test_alembic_autogenerate(app: Database, tmp_path: Path) -> None:
    """It would drop what its models do not have, so it is told not to look at it."""
    engine = create_engine(url(app, "postgresql+psycopg"))
    models = MetaData()
    models.reflect(engine)
    engine.dispose()
    (tmp_path / "models").write_bytes(pickle.dumps(models))
    arbiter_db.install(app.server.conninfo(app.name, OWNER))
    alembic = [sys.executable, "-m", "alembic"]
    run(tmp_path, *alembic, "init", "migrations")

    def check(include: str) -> tuple[int, str]:
        text = ENVIRONMENT.format(
            models=str(tmp_path / "models"), url=url(app, "postgresql+psycopg"), include=include
        )
        (tmp_path / "migrations" / "env.py").write_text(text, "utf-8")
        command = [*alembic, "check"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, output = check("True")
    assert code != 0
    assert "arbiter_xid" in output
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    (include,) = re.findall(
        "include_object=lambda item, name, kind, reflected, other: (.*?)`", page
    )
    code, output = check(include)
    assert (code, "No new upgrade operations" in output) == (0, True), output
