"""rich's consoles, texts and tables, for strings that are data: no markup, and control characters
are shown instead of obeyed. See terminal.py for plain lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .text import printable

__all__ = ["DataTable", "data", "make_console"]


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
