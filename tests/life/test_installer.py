"""The installer's Python: what it refuses and says, which texts it makes of the files, what yoyo's
records hold. What an install does to a database is in test_install.py."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

import arbiter_db
from arbiter_db import InstallError, OutdatedSchema
from arbiter_db.adoption import Adoption
from arbiter_db.install import migration_texts, sql_text
from arbiter_db.queries import QUERIES
from arbiter_db.supabase import export

if TYPE_CHECKING:
    from conftest import Database

#: The module; the package's attribute of that name is the function.
installer = import_module("arbiter_db.install")

ROOT = Path(__file__).parents[2]
SQL = sorted((ROOT / "sql").glob("*.sql"))
MIGRATIONS = [p for p in sorted((ROOT / "migrations").glob("*.sql")) if "rollback" not in p.name]
CHECKS = [path for path in SQL if path.name.startswith("0")]

VERSION = arbiter_db.__version__


def let_version_be(db: Database, version: str) -> None:
    db.connect().execute(
        "create or replace function arbiter.version() returns text language sql immutable"
        f" return '{version}'".encode()
    )


# Versions -----------------------------------------------------------------------------------------

UPGRADE = "Upgrade the database: arbiter-db install"


@pytest.mark.parametrize(
    ("installed", "package", "hint"),
    [
        ("0.0.9", "0.1.0", UPGRADE),
        ("0.1.0", "0.10.0", UPGRADE),
        ("0.9.0", "0.10.0", UPGRADE),
        ("0.10.0", "0.9.0", "Upgrade the package."),
        ("1.0.0", "0.9.9", "Upgrade the package."),
        ("0.1.1", "0.1.0", "Upgrade the package."),
        ("0.1", "0.1.0", UPGRADE),
    ],
)
def test_another_version_is_refused_with_what_to_upgrade(
    db: Database, monkeypatch: pytest.MonkeyPatch, installed: str, package: str, hint: str
) -> None:
    let_version_be(db, installed)
    monkeypatch.setattr(installer, "__version__", package)
    with pytest.raises(OutdatedSchema) as caught:
        arbiter_db.check_version(db.connect())
    error = caught.value
    assert (error.installed, error.expected, error.hint) == (installed, package, hint)
    assert str(error) == f"this database has arbiter {installed}, this package is {package}"


def test_the_same_version_is_fine(db: Database) -> None:
    arbiter_db.check_version(db.connect())
    let_version_be(db, "0.0.9")
    with pytest.raises(OutdatedSchema):
        arbiter_db.check_version(db.connect())


def test_a_database_without_arbiter_is_refused(bare_db: Database) -> None:
    with pytest.raises(OutdatedSchema) as caught:
        arbiter_db.check_version(bare_db.connect())
    assert (caught.value.installed, caught.value.expected) == (None, VERSION)
    assert caught.value.hint == "Run: arbiter-db install"


@pytest.mark.parametrize("call", [arbiter_db.install, arbiter_db.uninstall])
def test_a_newer_database_is_left_alone(db: Database, call: Callable[[str], object]) -> None:
    let_version_be(db, "99.0.0")
    with pytest.raises(OutdatedSchema) as caught:
        call(db.conninfo())
    assert (caught.value.installed, caught.value.expected) == ("99.0.0", VERSION)
    assert caught.value.hint == "Use the newer package."


def test_an_older_database_is_upgraded(db: Database) -> None:
    let_version_be(db, "0.0.9")
    steps: list[str] = []
    arbiter_db.install(db.conninfo(), on_step=steps.append)
    assert arbiter_db.version(db.connect()) == VERSION
    # The checks are a trial here, and no migration is missing.
    assert steps[: len(SQL)] == [path.name for path in SQL]


# Errors -------------------------------------------------------------------------------------------


def test_an_error_has_all_that_the_database_said(
    trading_db: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "00_broken.sql"
    broken.write_text(
        "do $$ begin raise exception using errcode = '22023', message = 'no such thing',"
        " hint = 'Do that.', detail = 'Because.'; end $$"
    )
    monkeypatch.setattr(installer, "_sql_files", lambda: [broken])
    with pytest.raises(InstallError) as caught:
        arbiter_db.install(trading_db.conninfo())
    error = caught.value
    assert (str(error), error.hint, error.detail, error.sqlstate) == (
        "00_broken.sql: no such thing",
        "Do that.",
        "Because.",
        "22023",
    )
    assert isinstance(error.__cause__, psycopg.Error)


def test_the_step_that_fails_is_named(
    trading_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    trading_db.connect().execute("create schema arbiter")
    trading_db.connect().execute("create view arbiter.settings as select 1 as one")
    with pytest.raises(InstallError, match=r"^0001\.schema: "):
        arbiter_db.install(trading_db.conninfo())


def test_a_statement_that_reads_a_table_is_named_when_it_fails(db: Database) -> None:
    conn = db.connect()
    conn.execute("alter table public.signals drop constraint arbiter_source_check")
    conn.execute("insert into auth.users (email) values ('x@y')")
    conn.execute("alter table public.signals disable trigger user")
    conn.execute("insert into public.traders (name, is_builtin) values ('M', true)")
    conn.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time, source)"
        " select id, 'X', '1h', 'buy', now(), 'other' from public.traders"
    )
    conn.execute(
        "alter table public.signals add constraint arbiter_source_check"
        " check (source in ('local', 'cloud')) not valid"
    )
    steps: list[str] = []
    statement = "alter table public.signals validate constraint arbiter_source_check"
    with pytest.raises(InstallError, match=rf"^{statement}: ") as caught:
        arbiter_db.finish(conn, on_step=steps.append)
    assert caught.value.sqlstate == "23514"
    assert steps == []
    conn.execute("delete from public.signals")
    arbiter_db.finish(conn, on_step=steps.append)
    assert steps == [statement]
    arbiter_db.finish(conn)


def test_who_waits_too_long_for_another_installer_is_told(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUERIES["lock_settings"].replace(b"'5min'", b"'100ms'")
    assert settings != QUERIES["lock_settings"]
    monkeypatch.setitem(QUERIES, "lock_settings", settings)
    with db.connect(autocommit=False, application_name="theirs") as other:
        other.execute(QUERIES["lock"])
        for call in (arbiter_db.install, arbiter_db.uninstall):
            with pytest.raises(InstallError) as caught:
                call(db.conninfo())
            assert caught.value.sqlstate == "55P03"
            session = f"pid {other.info.backend_pid}, role {other.info.user}, application theirs"
            assert str(caught.value).startswith(
                f"waited too long for another install; {session}, since "
            )
            assert "pg_terminate_backend" in str(caught.value.hint)


def test_an_uninstall_names_what_the_app_uses(db: Database) -> None:
    conn = db.connect()
    conn.execute("create view public.one as select * from arbiter.handovers")
    conn.execute("create view public.two as select * from arbiter.settings")
    with pytest.raises(InstallError) as caught:
        arbiter_db.uninstall(db.conninfo())
    assert str(caught.value) == "these objects use arbiter: " + ", ".join(
        f"rule _RETURN on view public.{name}" for name in ("one", "two")
    )
    assert caught.value.hint == "Drop or change them first; nothing was changed."


# Records ------------------------------------------------------------------------------------------


def test_yoyos_records_say_who_and_where(trading_db: Database) -> None:
    before = datetime.now(UTC).replace(tzinfo=None)
    arbiter_db.install(trading_db.conninfo())
    after = datetime.now(UTC).replace(tzinfo=None)
    conn = trading_db.connect()
    rows = conn.execute(
        "select id, migration_id, migration_hash, username, hostname, created_at_utc, operation"
        " from arbiter._yoyo_log order by created_at_utc"
    ).fetchall()
    assert [row[1] for row in rows] == [path.name.removesuffix(".sql") for path in MIGRATIONS]
    marked = conn.execute(
        "select migration_id, migration_hash from arbiter._yoyo_migration order by 1"
    ).fetchall()
    assert [(row[1], row[2]) for row in rows] == marked
    assert {row[3:5] for row in rows} == {("app_owner", socket.gethostname())}
    assert {row[6] for row in rows} == {"apply"}
    assert len({str(row[0]) for row in rows}) == len(rows)
    assert all(before - timedelta(seconds=1) <= row[5] <= after for row in rows)


def test_no_session_setting_is_left_to_a_pooler(db: Database) -> None:
    """yoyo's connection alone has settings of its own, and it is closed."""
    conn = db.connect()
    mine = conn.execute("show search_path").fetchone()
    arbiter_db.finish(conn)
    assert conn.execute("show search_path").fetchone() == mine
    assert conn.execute("show lock_timeout").fetchone() == ("0",)


# Texts --------------------------------------------------------------------------------------------


def headed(path: Path) -> str:
    """A file below the line that names it."""
    return f"-- {path.parent.name}/{path.name}\n\n{path.read_text('utf-8').strip()}"


def joined(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def query(name: str) -> str:
    return QUERIES[name].decode()


BEGIN = [query("script_lock"), query("unit_settings")]
OPTIONS = "set local arbiter.install_options to '{}';"
SAY_PLAN, SAY_SUMMARY = query("say_plan") + ";", query("say_summary") + ";"


def test_the_exported_files_are_the_units_of_an_install_each_file_once() -> None:
    change, finish = migration_texts()
    others = [path for path in SQL if path not in CHECKS]
    parts = [*map(headed, CHECKS), SAY_PLAN, *map(headed, [*MIGRATIONS, *others]), SAY_SUMMARY]
    save, restore = (query(f"{name}_settings") + ";" for name in ("save", "restore"))
    assert change == joined(save, *BEGIN, OPTIONS, *parts, restore)
    assert finish == joined(save, *BEGIN, query("finish") + ";", restore)


def test_the_script_is_the_units_of_an_install_each_in_a_transaction() -> None:
    units = [[path] for path in MIGRATIONS] + [SQL]
    transactions = [
        part
        for unit in units
        for part in ("begin;", *BEGIN, OPTIONS, *map(headed, unit), "commit;")
    ]
    head, *rest = sql_text().split("\n\n", 3)
    assert head == f"-- arbiter {VERSION}: what `arbiter-db install` runs, for psql."
    assert rest[0] == ("-- Run it as the owner of the tables to be protected; it can run again.")
    assert rest[1] == "\\set ON_ERROR_STOP on"
    assert rest[2] == joined(
        query("has_version") + " \\gset",
        "begin;",
        *BEGIN,
        OPTIONS,
        *map(headed, CHECKS),
        SAY_PLAN,
        "\\if :has_version",
        "rollback;",
        "\\else",
        "commit;",
        "\\endif",
        *transactions,
        "-- What reads a whole table, each in a transaction of its own.",
        query("finish_statements") + " \\gexec",
        SAY_SUMMARY,
    )


def test_options_are_in_the_script_and_in_the_exported_file() -> None:
    chosen = Adoption(adopt=False, protect=["public.it's"], mode="observe")
    setting = (
        "set local arbiter.install_options to"
        """ '{"adopt": false, "protect": ["public.it''s"], "mode": "observe"}';"""
    )
    assert migration_texts(chosen)[0].count(setting) == 1
    transactions = sql_text(chosen).count("begin;\n")
    assert sql_text(chosen).count(setting) == transactions == len(MIGRATIONS) + 2


def test_what_an_installed_package_has_inside_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "arbiter_db"
    beside, inside = package.parent / "sql", package / "sql"
    package.mkdir(parents=True)
    beside.mkdir()
    (beside / "00_beside.sql").write_text("select 'beside'")
    monkeypatch.setattr(installer, "__file__", str(package / "install.py"))
    monkeypatch.setattr(installer, "_migrations", list)
    assert re.findall(r"select '\w+'", migration_texts()[0]) == ["select 'beside'"]
    inside.mkdir()
    (inside / "00_inside.sql").write_text("select 'inside'")
    assert re.findall(r"select '\w+'", migration_texts()[0]) == ["select 'inside'"]


# The hashes of migrations -------------------------------------------------------------------------

Damage = Callable[[Path], object]

EVIL = "create table public.evil ()"

DAMAGES: dict[str, tuple[Damage, str]] = {
    "changed": (
        lambda folder: _append(folder / "0001.schema.sql", f"\n{EVIL};\n"), "0001.schema.sql"
    ),
    "a rollback": (
        lambda folder: _append(folder / "0002.columns.rollback.sql", " "),
        "0002.columns.rollback.sql",
    ),
    "missing": (lambda folder: (folder / "0002.columns.sql").unlink(), "0002.columns.sql"),
    "more": (lambda folder: (folder / "0003.evil.sql").write_text(EVIL), "0003.evil.sql"),
    "code": (
        lambda folder: (folder / "0003.evil.py").write_text("raise SystemExit('evil')"),
        "0003.evil.py",
    ),
    "not listed": (
        lambda folder: (folder / "SHA256SUMS").write_text(""),
        "0001.schema.rollback.sql, 0001.schema.sql,",
    ),
    "no list": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS"),
    "nothing": (lambda folder: list(map(Path.unlink, folder.glob("*.sql"))), "0001.schema"),
}  # fmt: skip


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text("ascii") + text, "ascii")


@pytest.mark.parametrize("kind", DAMAGES)
def test_migrations_that_are_not_as_released_are_not_run(
    trading_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Neither by an install nor by an export, and nothing before them is."""
    damage, name = DAMAGES[kind]
    real = installer._folder
    folder = tmp_path / "migrations"
    shutil.copytree(real("migrations"), folder)
    monkeypatch.setattr(installer, "_folder", lambda n: folder if n == "migrations" else real(n))
    arbiter_db.sql_text()
    damage(folder)
    exported = tmp_path / "exported"
    exported.mkdir()
    steps: list[str] = []
    for call in (
        lambda: arbiter_db.install(trading_db.conninfo(), on_step=steps.append),
        lambda: arbiter_db.uninstall(trading_db.conninfo()),
        lambda: export(exported),
        arbiter_db.sql_text,
        migration_texts,
    ):
        with pytest.raises(arbiter_db.InstallError) as caught:
            call()
        assert name in str(caught.value)
        assert caught.value.hint is not None
        assert "Nothing was run." in caught.value.hint
    assert (steps, list(exported.iterdir())) == ([], [])
    conn = trading_db.connect()
    query = "select to_regnamespace('arbiter') is null and to_regclass('public.evil') is null"
    assert conn.execute(query).fetchone() == (True,)


def test_a_damaged_package_cannot_uninstall(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = installer._folder
    folder = tmp_path / "migrations"
    shutil.copytree(real("migrations"), folder)
    _append(folder / "0001.schema.rollback.sql", f"\n{EVIL};\n")
    monkeypatch.setattr(installer, "_folder", lambda n: folder if n == "migrations" else real(n))
    with pytest.raises(arbiter_db.InstallError, match=r"0001\.schema\.rollback\.sql"):
        arbiter_db.uninstall(db.conninfo())
    assert arbiter_db.version(db.connect()) == arbiter_db.__version__
