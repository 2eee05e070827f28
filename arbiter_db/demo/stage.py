"""The parts of the story: clients that run and print statements, checks, and waits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.resources import files
from threading import Event
from time import monotonic
from typing import Any

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.text import Text

import arbiter_db
import arbiter_db.console
from arbiter_db.console import DataTable, data
from arbiter_db.queries import cut
from arbiter_db.text import printable

WIDTH = 100
MARGIN = 9  # the widest client name, its prompt and a space
SQL_COLORS = Syntax("", "postgresql", theme="ansi_dark", background_color="default")

Row = tuple[Any, ...]


class UnexpectedError(Exception):
    """The server answered otherwise than the story expects."""


def sql_file(name: str) -> bytes:
    """The text of one of the demo's SQL files, as psycopg executes it."""
    return files(__package__).joinpath(name).read_bytes()


STATEMENTS = cut(sql_file("story.sql").decode())


@dataclass(frozen=True)
class Client:
    """A client of the app on a connection of its own. Each of its statements is a transaction."""

    name: str
    color: str
    connection: psycopg.Connection[Row]

    def statement(self, name: str, params: Mapping[str, Any]) -> str:
        """The statement as it goes to the server, parameters filled in."""
        return psycopg.ClientCursor(self.connection).mogrify(STATEMENTS[name], params)

    def execute(self, name: str, params: Mapping[str, Any]) -> psycopg.Cursor[Row]:
        return psycopg.ClientCursor(self.connection).execute(STATEMENTS[name], params)

    def value(self, name: str, **params: Any) -> Any:
        """The single value that a statement gives, without printing anything."""
        row = self.execute(name, params).fetchone()
        if row is None:
            raise UnexpectedError(f"{name}: no row")
        return row[0]


@dataclass
class Stage:
    """Prints each step and compares it with the expectation.

    `browser` is asked for the badge; `owner` counts signals behind the scenes, those for bars from
    `since` on.
    """

    console: Console
    owner: Client
    browser: Client
    since: datetime
    title_count: int = 0
    admitted_count: int = 0
    rejected_count: int = 0

    # The parts of the story ----------------------------------------------------------------------

    def title(self, title: str, why: str = "") -> None:
        self.title_count += 1
        self.console.print()
        heading = data(f"{self.title_count}. {title}", "bold")
        self.console.rule(heading, align="left", characters="-", style="dim")
        if why:
            _print_block(self.console, "", data(why, "italic"), indent=0)

    def busy(self, text: str) -> AbstractContextManager[object]:
        """A spinner while something takes its time, on a terminal."""
        return self.console.status(text) if self.console.is_terminal else nullcontext()

    def headline(self, text: str) -> None:
        self.console.print()
        _print_block(self.console, "", data(text, "bold"), indent=0)

    def failure(self, text: str) -> None:
        self.console.print()
        _print_block(self.console, "", data(text, "bold red", lines=True), indent=0)

    def called(self, client: Client, call: str, result: str) -> None:
        """A call of the Python package, and its result in words."""
        self.console.print()
        _print_block(self.console, f"{client.name}> ", data(call), style=f"bold {client.color}")
        _print_block(self.console, "", data(result, "green"))

    def note(self, text: str) -> None:
        self.console.print()
        _print_block(self.console, "", data(text, "italic"), indent=0)

    def do(self, client: Client, name: str, rows: int | None = None, **params: Any) -> list[Row]:
        """A statement that must succeed and, when `rows` is given, affect that many rows."""
        self._print_statement(client, name, params)
        try:
            cursor = client.execute(name, params)
        except psycopg.Error as error:
            self._print_error(error)
            raise UnexpectedError(f"{client.name} was rejected, expected success") from error
        result = self._print_result(cursor)
        if rows is not None and cursor.rowcount != rows:
            raise UnexpectedError(f"{cursor.rowcount} rows affected, expected {rows}")
        return result

    def admitted(self, client: Client, name: str, rows: int, **params: Any) -> None:
        """A write of signals that must be admitted: as many more of them afterwards."""
        before = self._count_signals(params)
        self.do(client, name, rows, **params)
        self._expect_signals(before + rows, params)
        self.admitted_count += 1

    def rejected(self, client: Client, name: str, sqlstate: str, **params: Any) -> datetime | None:
        """A write of signals that must be rejected with this SQLSTATE and leave no row.

        Returns the `retry_at` of the error's DETAIL.
        """
        before = self._count_signals(params)
        self._print_statement(client, name, params)
        try:
            cursor = client.execute(name, params)
        except psycopg.Error as error:
            self._print_error(error)
            if error.sqlstate != sqlstate:
                raise UnexpectedError(f"SQLSTATE {error.sqlstate}, expected {sqlstate}") from error
            rejection = arbiter_db.from_psycopg(error)
        else:
            self._print_result(cursor)
            raise UnexpectedError(f"{client.name} was admitted, expected {sqlstate}")
        self._expect_signals(before, params)
        self.rejected_count += 1
        return None if rejection is None else rejection.retry_at

    def badge(self, expected: str) -> None:
        """What `arbiter.status()` tells the browser to show."""
        status = arbiter_db.status(self.browser.connection)
        color = {"local": "green", "cloud": "cyan"}.get(status.environment, "yellow")
        text = data(status.message, f"bold {color}")
        for name in ("environment", "can_write_local", "epoch"):
            text += data(f"   {name} {_shown(getattr(status, name))}", "not bold default")
        _print_block(self.console, "badge: ", text)
        self.check(status.message == expected, f"badge {status.message!r}, expected {expected!r}")

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise UnexpectedError(otherwise)

    def table(self, columns: Sequence[str], rows: Sequence[Row], indent: int = MARGIN) -> None:
        table = DataTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for number, column in enumerate(columns):
            numeric = all(type(row[number]) is int for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_shown(value) for value in row))
        lines = self.console.render_lines(
            table, self.console.options.update_width(self.console.width - indent), pad=False
        )
        for line in lines:
            text = Text.assemble(*((segment.text, segment.style or "") for segment in line))
            text.rstrip()
            self.console.print(data(" " * indent) + text, soft_wrap=True)

    # Waits ---------------------------------------------------------------------------------------

    def wait_until(self, instant: datetime, what: str) -> None:
        """Waits until the server's clock has passed the instant."""
        seconds = self.owner.value("seconds_until", instant=instant)
        self.note(f"... {seconds:.1f} s pass, until {what} by the server's clock")
        while seconds > 0:
            self._wait(seconds)
            seconds = self.owner.value("seconds_until", instant=instant)

    def poll_until_may_write(self) -> None:
        """The browser polls its status, as an app does, until it may write."""
        begin = monotonic()
        patience = 10 + 2 * float(self.owner.value("patience"))
        polls = 1
        interval = arbiter_db.status(self.browser.connection).poll_interval
        self.note(
            f"... the browser asks arbiter.status() every {_shown(interval)}, until it may write"
        )
        with self.busy("waiting ..."):
            while not (status := arbiter_db.status(self.browser.connection)).can_write_local:
                if monotonic() - begin > patience:
                    raise UnexpectedError(f"still {status.message!r} after {patience:.0f} s")
                Event().wait(interval.total_seconds())
                polls += 1
        age = _shown(status.heartbeat_age)
        self.note(f"... it may, says answer {polls}. The last heartbeat was {age} ago.")

    def _wait(self, seconds: float) -> None:
        if not self.console.is_terminal:
            Event().wait(seconds)
            return
        columns = (TextColumn(" " * (MARGIN - 1)), BarColumn(40), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=seconds)
            begin = monotonic()
            while (passed := monotonic() - begin) < seconds:
                progress.update(task, completed=passed)
                Event().wait(min(0.05, seconds - passed))

    # Printing and counting -----------------------------------------------------------------------

    def _print_statement(self, client: Client, name: str, params: Mapping[str, Any]) -> None:
        self.console.print()
        sql = SQL_COLORS.highlight(printable(client.statement(name, params), lines=True))
        sql.rstrip()
        sql.no_wrap = False
        _print_block(self.console, f"{client.name}> ", sql, style=f"bold {client.color}")

    def _print_result(self, cursor: psycopg.Cursor[Row]) -> list[Row]:
        rows: list[Row] = []
        if cursor.description is not None:
            rows = cursor.fetchall()
            if any(value not in (None, "") for row in rows for value in row):
                self.table([column.name for column in cursor.description], rows)
        _print_block(self.console, "", data(cursor.statusmessage or "", "green"))
        return rows

    def _print_error(self, error: psycopg.Error) -> None:
        diag = error.diag
        head = Text.assemble(
            data(f"ERROR {error.sqlstate}: ", "bold red"),
            data(diag.message_primary or error, "red", lines=True),
        )
        _print_block(self.console, "", head)
        if diag.message_detail:
            _print_block(self.console, "", _labelled("DETAIL", diag.message_detail))
        if diag.message_hint:
            _print_block(self.console, "", _labelled("HINT", diag.message_hint))

    def _count_signals(self, params: Mapping[str, Any]) -> int:
        trader = params["trader"]
        return int(self.owner.value("story_signals", trader=trader, since=self.since))

    def _expect_signals(self, expected: int, params: Mapping[str, Any]) -> None:
        count = self._count_signals(params)
        self.check(count == expected, f"{count} signals in the table, expected {expected}")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble(data(f"{label}: ", "bold"), data(text, lines=True))


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case datetime():
            return value.isoformat(sep=" ", timespec="milliseconds")
        case timedelta():
            return f"{round(value.total_seconds(), 2):g} s"
        case _:
            return str(value)


def _print_block(
    console: Console, label: str, text: Text, style: str = "bold", indent: int = MARGIN
) -> None:
    """Prints the text with a hanging indent, the label in front of its first line."""
    gutter = (label.rjust(indent), style)
    for line in text.wrap(console, console.width - indent):
        line.rstrip()
        console.print(Text.assemble(gutter, line), soft_wrap=True)
        gutter = (" " * indent, "")


def make_console() -> Console:
    """At most 100 columns wide, so that the output can be pasted; exactly 100 when piped."""
    console = arbiter_db.console.make_console()
    if not console.is_terminal:
        return arbiter_db.console.make_console(width=WIDTH, file=sys.stdout)
    console.width = min(console.width, WIDTH)
    return console
