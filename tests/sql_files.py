"""The files of sql/, read by the server's own parser (pglast), so that a rule for them does not
depend on blank lines, line breaks or what a comment or a text says.

A file's statements have code inside of texts: the bodies of functions and of ``do``, and
definitions that are filled in and executed. ``codes`` yields all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pglast
from pglast import ast

__all__ = [
    "FILES",
    "Function",
    "Statement",
    "Token",
    "calls",
    "codes",
    "functions",
    "literals",
    "statements",
    "tokens",
]

FILES = sorted((Path(__file__).parents[1] / "sql").glob("*.sql"))

#: What stands in a text for a name and for anything else, when format() fills it in.
BLANKS = [(r"%(?:\d+\$)?I", "app"), (r"%(?:\d+\$)?[sL]", "x integer")]


@dataclass(frozen=True)
class Token:
    """A token: its kind, as the parser calls it, its text and where it begins."""

    kind: str
    text: str
    start: int


@dataclass(frozen=True)
class Statement:
    """A statement of a file: its tree, its text, and the comment right above it."""

    path: Path
    tree: Any
    text: str
    above: str


@dataclass(frozen=True)
class Function:
    """A definition of a function, at the top of a file or in a text that is executed."""

    #: The statement that is the definition, or has its text.
    statement: Statement
    tree: Any
    #: From ``create`` to the end; offsets in the tree count from its beginning.
    text: str

    @property
    def name(self) -> str:
        """With its schema."""
        return ".".join(part.sval for part in self.tree.funcname)

    @property
    def returns(self) -> str:
        return self.tree.returnType.names[-1].sval if self.tree.returnType else ""

    def options(self) -> list[tuple[str, Any, int]]:
        """Attributes but for the body: name, value, and where each begins."""
        return [(o.defname, o.arg, o.location) for o in self.tree.options if o.defname != "as"]

    def body(self) -> str:
        """The text between the quotes; of a function without quotes its statements."""
        for option in self.tree.options:
            if option.defname == "as":
                return str(option.arg[0].sval)
        last = max(location for _, _, location in self.options())
        return self.text[last:].split("\n", 1)[1]


@cache
def tokens(code: str, comments: bool = False) -> tuple[Token, ...]:
    """The tokens of some code."""
    found = (Token(t.name, code[t.start : t.end + 1], t.start) for t in pglast.parser.scan(code))
    return tuple(t for t in found if comments or t.kind not in ("SQL_COMMENT", "C_COMMENT"))


def unquoted(literal: str) -> str:
    """What stands between the quotes of a literal."""
    dollar = re.match(r"\$\w*\$", literal)
    if dollar:
        return literal[len(dollar[0]) : -len(dollar[0])]
    return literal[1:-1].replace("''", "'")


def literals(code: str) -> list[str]:
    """The texts in some code, also in those that are code."""
    found = []
    for token in tokens(code):
        if token.kind == "SCONST":
            text = unquoted(token.text)
            found += literals(text) if is_code(token.text) else [text]
    return found


def is_code(literal: str) -> bool:
    """Whether a literal is code: it has quotes of its own."""
    return literal.startswith("$")


def codes(code: str) -> Iterator[str]:
    """The code, and all code in its texts."""
    yield code
    for token in tokens(code):
        if token.kind == "SCONST" and is_code(token.text):
            yield from codes(unquoted(token.text))


@cache
def statements(path: Path) -> tuple[Statement, ...]:
    """The statements of a file in order."""
    code = path.read_text(encoding="ascii")
    found, end = [], 0
    for raw in pglast.parse_sql(code):
        start = raw.stmt_location or 0
        between = code[end:start].split("\n\n")[-1]
        end = start + (raw.stmt_len or len(code) - start)
        found.append(Statement(path, raw.stmt, code[start:end], between.strip(";\n ")))
    return tuple(found)


@cache
def functions(path: Path) -> tuple[Function, ...]:
    """The functions that a file defines, also in texts that it executes."""
    found = []
    for statement in statements(path):
        for code in codes(statement.text):
            text = code.strip()
            if not re.match(r"create (or replace )?function\b", text):
                continue
            if code is not statement.text:
                for blank, stand_in in BLANKS:
                    text = re.sub(blank, stand_in, text)
            (raw,) = pglast.parse_sql(text)
            assert isinstance(raw.stmt, ast.CreateFunctionStmt)
            found.append(Function(statement, raw.stmt, text))
    return tuple(found)


def calls(code: str, name: str) -> Iterator[str]:
    """The arguments of each call of the function arbiter.<name>, as one text."""
    for part in codes(code):
        found = tokens(part)
        for n in range(1, len(found) - 3):
            is_call = [t.text for t in found[n : n + 4]] == ["arbiter", ".", name, "("]
            if is_call and found[n - 1].text not in ("function", ","):
                depth, start = 1, found[n + 3].start + 1
                for token in found[n + 4 :]:
                    depth += {"(": 1, ")": -1}.get(token.text, 0)
                    if depth == 0:
                        yield part[start : token.start]
                        break
