"""All that the command line and the demo print. Only this module writes to a terminal.

Strings are data here: no markup, and control characters are shown instead of obeyed.
"""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .text import printable

__all__ = ["DataTable", "data", "make_console", "say", "say_file", "show_all_characters"]


def say(value: object = "", *, lines: bool = False, err: bool = False) -> None:
    """Print a line; with `lines`, the value's own line ends stay."""
    click.echo(printable(value, lines=lines), err=err)


def say_file(content: bytes) -> None:
    """Print a file of this package as it is."""
    click.echo(content, nl=False)


def data(value: object, style: str = "", *, lines: bool = False) -> Text:
    """A value for a console; the style is ours, the text is not."""
    return Text(printable(value, lines=lines), style=style)


class DataTable(Table):
    """A table whose headings and cells are data."""

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        super().add_column(_shown(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_shown, cells), **options)


def _shown(cell: object) -> Text:
    return cell if isinstance(cell, Text) else data(cell)


def make_console(**options: Any) -> Console:
    """A console on which a string is no markup."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def show_all_characters() -> None:
    """Let a terminal that lacks a character show its number, where Python would fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
