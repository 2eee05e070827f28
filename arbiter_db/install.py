"""Install, upgrade and uninstall: the only functions of the package that take a connection string.

An install is four steps, each of which can be repeated:

1. `sql/0*.sql` in a transaction of its own: refuses, before anything is changed, when another role
   could have made objects in schema `arbiter`, or when a table that was asked for does not fit, and
   makes the plan; rolled back where arbiter is installed already, so that functions of two versions
   are never mixed;
2. the migrations, by yoyo, whose own tables live in schema `arbiter` too;
3. all `sql/*.sql`, in order, in one transaction: clients see the old functions or the new. What
   this version does not have any more is dropped; when an object of the app uses some of it, the
   install refuses and functions, guards and policies stay as they were;
4. what reads a whole table, one transaction each: an index on the column that names the machine,
   for which writers wait, and the validation of constraints, for which they do not.

Installs of one database queue behind an advisory lock, which a crash releases.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import class_row, scalar_row
from psycopg.sql import Literal
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI
from yoyo.migrations import default_migration_table, read_migrations, topological_sort

from ._version import __version__
from .adoption import Adoption, PlanLine
from .errors import InstallError, OutdatedSchema
from .queries import QUERIES

__all__ = [
    "check_version",
    "connect",
    "finish",
    "install",
    "migration_texts",
    "plan",
    "sql_text",
    "summary",
    "uninstall",
]

_OLDEST_SERVER = 15

_DAMAGED = (
    "Nothing was run. Install the package arbiter-db anew; who writes a migration lists its hash in"
    " migrations/SHA256SUMS."
)

_DROPPED = re.compile(r"arbiter: (dropped .*)")


def install(
    conninfo: str = "",
    *,
    adoption: Adoption | None = None,
    client_roles: Sequence[str] = (),
    on_plan: Callable[[list[PlanLine]], None] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> None:
    """Install arbiter, or upgrade it, or mend an install that was cut short.

    `conninfo` is anything libpq takes (a URI, `key=value` pairs); what it leaves out comes from
    libpq's environment variables. Connect as the owner of the tables to be protected, directly or
    through a session pooler (a transaction pooler loses yoyo's session settings). `adoption` says
    which tables become the registry and protected ones. `client_roles` are named as
    `arbiter.add_client_role` does; those that were named before stay. `on_plan` is called with the
    plan before any table of the app is locked, `on_step` with the name of each step that has just
    been committed.

    Raises `InstallError` when the database refuses, or a shipped migration is not as released, and
    `psycopg.OperationalError` when it cannot be reached.
    """
    migrations = _migrations()
    options = adoption or Adoption()
    with _installer(conninfo) as conn:
        _refuse_newer(conn)
        is_first = _installed_version(conn) is None
        roles = [{"role": role} for role in client_roles]
        with conn.transaction(force_rollback=not is_first):
            _execute(conn, _checks(), options)
            columns = _scalar(conn, "adopt_columns")
            if on_plan is not None:
                on_plan(_plan(conn))
            for role in roles:
                with _naming("client role"):
                    conn.execute(QUERIES["need_client_role"], role)
        _report(_checks() if is_first else (), on_step)
        with _yoyo(conninfo, columns) as backend:
            for migration in backend.to_apply(migrations):
                with _naming(migration.id):
                    backend.apply_one(migration)
                on_step(migration.id)
        dropped: list[str] = []
        conn.add_notice_handler(
            lambda notice: dropped.extend(_DROPPED.findall(str(notice.message_primary)))
        )
        with conn.transaction():
            for role in roles:
                with _naming("client role"):
                    conn.execute(QUERIES["name_client_role"], role)
            _execute(conn, _sql_files(), options)
        _report(_sql_files(), on_step)
        for objects in dropped:
            on_step(objects)
        finish(conn, on_step=on_step)


def plan(conninfo: str = "", *, adoption: Adoption | None = None) -> list[PlanLine]:
    """What `install` would find and do; changes nothing.

    Takes the same `conninfo` and `adoption`, and raises the same errors. Reads the tables that
    would be protected.
    """
    with _installer(conninfo) as conn:
        _refuse_newer(conn)
        with conn.transaction(force_rollback=True):
            _execute(conn, _checks(), adoption or Adoption())
            return _plan(conn)


def summary(conn: psycopg.Connection[Any]) -> list[str]:
    """The registry, the protected tables with their options, and what to do next, a line each."""
    return _column(conn, "summary")


def uninstall(conninfo: str = "", *, drop_columns: bool = False) -> list[str]:
    """Remove schema `arbiter` and everything that it attached to the app's tables.

    The app's rows stay, and so do the columns that arbiter added unless `drop_columns`. Returns one
    line for each thing left in place or dropped, nothing when arbiter was not installed. Raises
    `InstallError`, with nothing changed, when objects of the app use arbiter.
    """
    migrations = _migrations()
    with _installer(conninfo) as conn:
        if not _scalar(conn, "has_schema"):
            return []
        _refuse_newer(conn)
        report = _detach(conn, drop_columns)
        with _yoyo(conninfo) as backend:
            # All, and not only those marked: a crash may have prevented a mark.
            for migration in reversed(migrations):
                with _naming(f"rollback of {migration.id}"):
                    backend.rollback_one(migration)
        with _naming("drop schema"), conn.transaction():
            conn.execute(QUERIES["unit_settings"])
            conn.execute(QUERIES["drop_schema"])
        return report


def finish(
    conn: psycopg.Connection[Any], *, on_step: Callable[[str], None] = lambda step: None
) -> None:
    """Finish what `protect` has begun: an index, and the validation of constraints.

    Each in a transaction of its own, which reads the table once. Writers wait for the index only.
    Needs a connection in autocommit mode.
    """
    for statement in _column(conn, "finish_statements"):
        with _naming(statement), conn.transaction():
            conn.execute(QUERIES["unit_settings"])
            conn.execute(statement.encode())
        on_step(statement)


def sql_text(adoption: Adoption | None = None) -> str:
    """What `install` runs, as one script for psql.

    yoyo's bookkeeping is not in it; a later `install` adds it, since every migration can run twice.
    """
    parts = [
        f"-- arbiter {__version__}: what `arbiter-db install` runs, for psql.",
        "-- Run it as the owner of the tables to be protected; it can run again.",
        "\\set ON_ERROR_STOP on",
    ]
    options = adoption or Adoption()
    checks, *others = _units()
    parts += [QUERIES["has_version"].decode() + " \\gset", *_script(checks, options)]
    parts += [_query("say_plan")]
    parts += ["\\if :has_version", "rollback;", "\\else", "commit;", "\\endif"]
    for unit in others:
        parts += [*_script(unit, options), "commit;"]
    parts += [
        "-- What reads a whole table, each in a transaction of its own.",
        QUERIES["finish_statements"].decode() + " \\gexec",
        _query("say_summary"),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _script(unit: Sequence[Path], options: Adoption) -> list[str]:
    """The files of one transaction, without its end."""
    parts = ["begin;", *_beginning(), _option_setting(options)]
    for path in unit:
        parts += [f"-- {path.parent.name}/{path.name}", path.read_text(encoding="utf-8")]
    return parts


def migration_texts(adoption: Adoption | None = None) -> tuple[str, str]:
    """The same for tools that run a file in one transaction: two files, to be run in that order.

    The first changes tables and functions, the second reads whole tables. Both can run again, and
    leave the settings of the transaction as they were.
    """
    save, restore = _query("save_settings"), _query("restore_settings")
    parts = [save, *_beginning(), _option_setting(adoption or Adoption())]
    for path in dict.fromkeys(path for unit in _units() for path in unit):
        parts += [f"-- {path.parent.name}/{path.name}", path.read_text(encoding="utf-8")]
        if path == _checks()[-1]:
            parts.append(_query("say_plan"))
    parts += [_query("say_summary"), restore]
    last = [save, *_beginning(), _query("finish"), restore]
    first, second = ("\n\n".join(part.strip() for part in unit) + "\n" for unit in (parts, last))
    return first, second


def _beginning() -> list[str]:
    return [QUERIES["script_lock"].decode(), QUERIES["unit_settings"].decode()]


def _option_setting(options: Adoption) -> str:
    literal = Literal(options.as_json()).as_string()
    return f"set local arbiter.install_options to {literal.strip()};"


def _query(name: str) -> str:
    return QUERIES[name].decode().rstrip() + ";"


def check_version(conn: psycopg.Connection[Any]) -> None:
    """Raise `OutdatedSchema` unless the database has arbiter in exactly this package's version.

    Raises `InstallError` before anything of it runs when arbiter belongs to a role that neither
    owns the database nor has the rights of the connection's role; for a superuser, when it belongs
    to anyone but a superuser.
    """
    for stranger in _column(conn, "stranger"):
        raise InstallError(
            f"schema arbiter belongs to {stranger}, whose functions would run with your rights",
            hint=f"Connect as {stranger}, if arbiter was installed by that role.",
            sqlstate="42501",
        )
    installed = _installed_version(conn)
    if installed is None:
        raise OutdatedSchema(installed, __version__, hint="Run: arbiter-db install")
    if installed != __version__:
        newer = _release(installed) > _release(__version__)
        hint = "Upgrade the package." if newer else "Upgrade the database: arbiter-db install"
        raise OutdatedSchema(installed, __version__, hint=hint)


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]  # yoyo has no types
    """yoyo on the caller's connection string, which libpq parses and not yoyo's URI parser."""

    # yoyo creates its lock table every time and ignores the error, but the server's log keeps it.
    create_lock_table_sql = PostgresqlPsycopgBackend.create_lock_table_sql.replace(
        "CREATE TABLE", "CREATE TABLE IF NOT EXISTS"
    )

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[Any]:
        return connect(dburi.args["conninfo"])

    def init_connection(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute(QUERIES["session_settings"])
        connection.execute(QUERIES["set_adopt_columns"], self.uri.args)

    def _check_transactional_ddl(self) -> bool:
        return True  # yoyo finds out by provoking another error

    def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
        # yoyo's own version asks for an account, which a container's user may lack, and for a name
        # in the DNS, which may take seconds to fail.
        return {
            "id": str(uuid4()),
            "migration_id": migration.id if migration else None,
            "migration_hash": migration.hash if migration else None,
            "username": self.connection.info.user,
            "hostname": socket.gethostname(),
            "created_at_utc": datetime.now(UTC).replace(tzinfo=None),
            "operation": operation,
        }


@contextmanager
def _yoyo(conninfo: str, adopt_columns: str = "") -> Iterator[_Backend]:
    args = {"conninfo": conninfo, "adopt_columns": adopt_columns}
    uri = DatabaseURI("postgresql+psycopg", None, None, None, None, None, args)
    with _Backend(uri, default_migration_table) as backend:
        backend.init_database()
        # A row in yoyo's own lock table was left by a crash: the installers' lock is held here.
        backend.break_lock()
        with backend.lock():
            yield backend


def _units() -> list[list[Path]]:
    """The files of an install, by transaction."""
    return [_checks(), *([Path(m.path)] for m in _migrations()), _sql_files()]


def _checks() -> list[Path]:
    return [path for path in _sql_files() if path.name.startswith("0")]


def _migrations() -> Any:
    """In order, each of them and each rollback as it was released."""
    folder = _folder("migrations")
    _check_hashes(folder)
    source = read_migrations(escape(str(folder)))
    return source.replace(topological_sort(source))


def _check_hashes(folder: Path) -> None:
    """Raise `InstallError` unless the files that yoyo would run are those in SHA256SUMS."""
    try:
        sums = (folder / "SHA256SUMS").read_text(encoding="ascii")
        there = {
            path.name: sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir()
            if path.suffix in (".sql", ".py")
        }
    except (OSError, UnicodeError) as exc:
        raise InstallError(f"the package is damaged: {exc}", hint=_DAMAGED) from exc
    listed = {name: sum_ for sum_, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", sums, re.M)}
    wrong = [n for n in sorted(listed | there) if listed.get(n) != there.get(n)]
    if wrong or not listed:
        names = ", ".join(wrong) or "SHA256SUMS"
        raise InstallError(f"these migrations are not as released: {names}", hint=_DAMAGED)


def _sql_files() -> list[Path]:
    return sorted(_folder("sql").glob("*.sql"))


def _folder(name: str) -> Path:
    """Where the SQL is: inside the installed package, or beside it in the repository."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


@contextmanager
def _installer(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to work with, while another one holds the lock against other installers.

    yoyo alone is no guard: it creates its tables before it takes its lock.
    """
    with connect(conninfo) as holder, holder.transaction():
        if holder.info.server_version < _OLDEST_SERVER * 10000:
            raise InstallError(
                f"arbiter needs PostgreSQL {_OLDEST_SERVER} or newer, "
                f"this server is {holder.info.parameter_status('server_version')}"
            )
        _wait_for_others(holder, conninfo)
        with connect(conninfo) as conn:
            # Before any function of the schema is called.
            if _scalar(conn, "has_schema"):
                with conn.transaction(force_rollback=True):
                    _execute(conn, _sql_files()[:1])
            yield conn


def _wait_for_others(holder: psycopg.Connection[Any], conninfo: str) -> None:
    """Take the installers' lock.

    Any role may take an advisory lock, so the error of a wait that took too long names the session.
    """
    with _naming("waiting for another install"):
        holder.execute(QUERIES["lock_settings"])
        try:
            holder.execute(QUERIES["lock"])
        except psycopg.errors.LockNotAvailable as exc:
            with connect(conninfo) as conn:
                sessions = _column(conn, "lock_holders")
            raise InstallError(
                "; ".join(["waited too long for another install", *sessions]),
                hint="Wait until that session has ended, or end it with pg_terminate_backend().",
                sqlstate=exc.sqlstate,
            ) from exc


def connect(conninfo: str) -> psycopg.Connection[Any]:
    """A connection in autocommit mode, as the functions of this package that open one use it."""
    # No prepared statements: they fail behind some poolers, and nothing here runs often. Without an
    # encoding psycopg returns bytes from a database in SQL_ASCII.
    return psycopg.connect(
        conninfo, autocommit=True, prepare_threshold=None, client_encoding="utf8"
    )


def _execute(
    conn: psycopg.Connection[Any], paths: Sequence[Path], options: Adoption | None = None
) -> None:
    """Run files in the caller's transaction."""
    conn.execute(QUERIES["unit_settings"])
    if options is not None:
        conn.execute(_option_setting(options).encode())
    for path in paths:
        with _naming(path.name):
            conn.execute(path.read_bytes())


def _plan(conn: psycopg.Connection[Any]) -> list[PlanLine]:
    with conn.cursor(row_factory=class_row(PlanLine)) as cur:
        return cur.execute(QUERIES["plan"]).fetchall()


def _report(paths: Sequence[Path], on_step: Callable[[str], None]) -> None:
    for path in paths:
        on_step(path.name)


def _detach(conn: psycopg.Connection[Any], drop_columns: bool) -> list[str]:
    """Take arbiter off the app's tables; refuse when the app's own objects need arbiter."""
    with _naming("detach"), conn.transaction():
        conn.execute(QUERIES["unit_settings"])
        report = []
        if _scalar(conn, "is_attached"):
            report = _column(conn, "detach_all", drop_columns=drop_columns)
        elif _scalar(conn, "has_leave_columns"):  # an install was cut short, or an uninstall
            report = _column(conn, "leave_columns", drop_columns=drop_columns)
        if dependents := _column(conn, "dependents"):
            raise InstallError(
                f"these objects use arbiter: {', '.join(dependents)}",
                hint="Drop or change them first; nothing was changed.",
            )
    return report


def _refuse_newer(conn: psycopg.Connection[Any]) -> None:
    installed = _installed_version(conn)
    if installed and _release(installed) > _release(__version__):
        raise OutdatedSchema(installed, __version__, hint="Use the newer package.")


def _installed_version(conn: psycopg.Connection[Any]) -> str | None:
    return str(_scalar(conn, "version")) if _scalar(conn, "has_version") else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _scalar(conn: psycopg.Connection[Any], query: str) -> Any:
    return _column(conn, query)[0]


def _column(conn: psycopg.Connection[Any], query: str, **params: object) -> list[Any]:
    with conn.cursor(row_factory=scalar_row) as cur:
        return cur.execute(QUERIES[query], params).fetchall()


@contextmanager
def _naming(step: str) -> Iterator[None]:
    """Turn the database's error into one that names the step; one of arbiter's own says enough."""
    try:
        yield
    except psycopg.Error as exc:
        diag = exc.diag
        message = diag.message_primary or str(exc)
        own = message.startswith("arbiter: ")
        raise InstallError(
            message.removeprefix("arbiter: ") if own else f"{step}: {message}",
            hint=diag.message_hint,
            detail=diag.message_detail,
            sqlstate=exc.sqlstate,
        ) from exc
