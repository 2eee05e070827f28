"""Text for people: what a database or another program says is data, never an instruction."""

from __future__ import annotations

import re

__all__ = ["one_line", "printable", "without_password"]

_PASSWORD = re.compile(
    r"(?P<uri>://[^:/@\s]*:)\S*(?=@)"
    r"|(?P<key>\b(?:ssl)?password\s*=\s*)(?:'(?:[^'\\]|\\.)*'?|\S+)",
    re.IGNORECASE,
)


def printable(value: object, *, lines: bool = False) -> str:
    r"""The value as text that a terminal and a log show as it is.

    What they would obey (an escape sequence), what changes the order of other characters and what
    cannot be seen is shown as Python writes it: `\x1b`, `\u202e`, `\n`. With `lines`, line ends
    stay.
    """
    if lines:
        return "\n".join(map(printable, str(value).split("\n")))
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(value)
    )


def one_line(value: object) -> str:
    """The same for a message that may have several lines: they become one."""
    return printable(" ".join(str(value).split()))


def without_password(text: str) -> str:
    """The text with `***` in the place of a password that a connection string in it has."""
    return _PASSWORD.sub(lambda found: f"{found['uri'] or found['key']}***", text)
