"""Text for people: what a database or another program says is data, never an instruction."""

from __future__ import annotations

import re

__all__ = ["one_line", "printable", "without_password"]

#: Letters, marks and symbols that are shown as nothing or as a blank, and are not separators by
#: their category: those that Unicode calls default ignorable, and the empty Braille pattern.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

_PASSWORD = re.compile(
    r"(?P<uri>://[^:/@\s]*:)\S*(?=@)"
    r"|(?P<key>\b(?:ssl)?password\s*=\s*)(?:'(?:[^'\\]|\\.)*'?|\S+)",
    re.IGNORECASE,
)


def printable(value: object, *, lines: bool = False) -> str:
    r"""The value as text that a terminal and a log show as it is.

    What they would obey (an escape sequence), the marks that change the direction of a text and
    what cannot be seen are shown as Python writes them: `\x1b`, `\u202e`, `\n`. With `lines`, line
    ends stay.
    """
    if lines:
        return "\n".join(map(printable, str(value).split("\n")))
    return "".join(
        char
        if char.isprintable() and not _INVISIBLE.match(char)
        else char.encode("unicode_escape").decode("ascii")
        for char in str(value)
    )


def one_line(value: object) -> str:
    """The same for a message that may have several lines: they become one."""
    return printable(" ".join(str(value).split()))


def without_password(text: str) -> str:
    """The text with `***` in the place of a password that a connection string in it has."""
    return _PASSWORD.sub(lambda found: f"{found['uri'] or found['key']}***", text)
