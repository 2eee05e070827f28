"""Plain lines for a terminal or a pipe, in which strings are data: control characters are shown
instead of obeyed. Only this module and console.py print."""

from __future__ import annotations

import sys

import click

from .text import printable

__all__ = ["say", "say_file", "show_all_characters"]


def say(value: object = "", *, lines: bool = False, err: bool = False) -> None:
    """Print a line; with `lines`, the value's own line ends stay."""
    click.echo(printable(value, lines=lines), err=err)


def say_file(content: bytes) -> None:
    """Print a file of this package as it is."""
    click.echo(content, nl=False)


def show_all_characters() -> None:
    """Let a terminal that lacks a character show its number, where Python would fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
