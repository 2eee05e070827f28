"""SQL as tokens, by PostgreSQL's own scanner (pglast), and what is around a token.

The tokens know where they stand in the file, on every level of quoting: at the top, in a
dollar-quoted body, and in a literal that holds generated SQL (``format('select ...')``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pglast.parser import ParseError, scan

__all__ = ["Code", "Token", "is_plpgsql", "unquoted", "words"]

#: A literal with generated SQL begins like this.
GENERATED = re.compile(
    r"\(?(?:select|update|insert into|delete from|create|alter|drop|lock|grant|revoke|on \{table\}"
    r"|before|after|coalesce\(|case|using|with check|and |new\.|old\.|null::|r\.|\(select|\(%"
    r"|%1\$s)(?=[ (%a-z{])"
)
PLACEHOLDER = re.compile(r"%(?:\d+\$)?[sIL]")
PLPGSQL = re.compile(r"\s*(?:#\w+[^\n]*\s*)*(?:--[^\n]*\s*)*(?:begin(?! atomic)|declare)\b")


def words(text: str) -> frozenset[str]:
    """A set of words."""
    return frozenset(text.split())


def is_plpgsql(text: str) -> bool:
    """Whether the body of a function is PL/pgSQL: it begins with declare, begin or an option."""
    return PLPGSQL.match(text) is not None


@dataclass(frozen=True)
class Token:
    text: str
    #: In lower case; of a literal only its quotes.
    word: str
    start: int
    end: int
    #: How many brackets, cases and blocks are open around it.
    depth: int


def unquoted(text: str) -> str:
    """The content of a literal as code, in which everything stays where it is."""
    halves = re.split("''", text)
    return "".join(
        half + ("" if n == len(halves) - 1 else " '" if n % 2 == 0 else "' ")
        for n, half in enumerate(halves)
    )


class Code:
    """Code of one level of quoting.

    ``outer`` says what it is: the ``file``, a body in ``plpgsql``, another ``body``, a ``literal``.
    """

    def __init__(self, root: str, text: str, offset: int, outer: str) -> None:
        self.root = root
        self.offset = offset
        self.outer = outer
        self.tokens = list(self._scan(text))
        self.words = [token.word for token in self.tokens]

    def _scan(self, text: str) -> Iterator[Token]:
        # The scanner does not know the placeholders of format().
        code = PLACEHOLDER.sub(lambda found: "x" * len(found[0]), text)
        try:
            found = [t for t in scan(code) if t.name not in ("SQL_COMMENT", "C_COMMENT")]
        except ParseError:
            return
        opened: list[str] = []
        previous = ""
        for number, token in enumerate(found):
            part = text[token.start : token.end + 1]
            word = part.lower()
            if token.name == "SCONST":
                word = "$$" if part.startswith("$") else "''"
            follows = found[number + 1 : number + 2]
            next_word = code[follows[0].start : follows[0].end + 1].lower() if follows else ""
            is_end = word == "end" and next_word not in ("if", "loop")
            if opened and (is_end or word in (")", "]")):
                opened.pop()
            yield Token(
                part, word, token.start + self.offset, token.end + 1 + self.offset, len(opened)
            )
            if word in ("(", "[", "begin") or (word == "case" and previous != "end"):
                opened.append(word)
            previous = word

    def at(self, number: int) -> str:
        """The word of a token; empty before the first and after the last."""
        return self.words[number] if 0 <= number < len(self.words) else ""

    def statement(self, number: int) -> tuple[int, int]:
        """The numbers of the statement's first token and of the one after its last."""
        first = number
        while first > 0 and self.at(first - 1) != ";":
            first -= 1
        end = number
        while end < len(self.words) and self.at(end) != ";":
            end += 1
        return first, end

    def text_of(self, first: int, end: int) -> str:
        """The tokens from first to before end, with a space between them."""
        return " ".join(token.text for token in self.tokens[first:end])

    def is_documentation(self, token: Token) -> bool:
        """The text of a comment on an object."""
        number = self.tokens.index(token)
        return self.at(self.statement(number)[0]) == "comment"

    def holds_sql(self, token: Token) -> bool:
        """Whether a literal is generated SQL."""
        return bool(GENERATED.match(token.text[1:-1])) and not self.is_documentation(token)

    def back(self, number: int, stops: frozenset[str]) -> int:
        """The number of the nearest token before at this depth that is one of the stops, or -1."""
        depth = self.tokens[number].depth
        for n in range(number - 1, -1, -1):
            if self.tokens[n].depth < depth:
                return n
            if self.tokens[n].depth == depth and self.words[n] in stops | {";"}:
                return n
        return -1

    def ahead(self, number: int, stops: frozenset[str]) -> int:
        """The number of the nearest token after it at this depth that is one of the stops."""
        depth = self.tokens[number].depth
        for n in range(number + 1, len(self.words)):
            if self.tokens[n].depth < depth:
                return n
            is_part = self.words[n] == "from" and self.words[n - 1] == "distinct"
            if self.tokens[n].depth == depth and self.words[n] in stops | {";"} and not is_part:
                return n
        return len(self.words)

    def call_of(self, number: int) -> str:
        """The function in whose arguments the token stands."""
        depth = self.tokens[number].depth
        for n in range(number - 1, 0, -1):
            if self.tokens[n].depth < depth:
                return self.at(n - 1) if self.words[n] == "(" else ""
        return ""

    def branch_end(self, number: int) -> int:
        """Where the branch that begins with this `elsif` or `else` ends."""
        depth, nested = self.tokens[number].depth, 0
        for n in range(number + 1, len(self.words)):
            if self.tokens[n].depth != depth:
                continue
            if self.words[n] == "end" and self.at(n + 1) == "if":
                if nested == 0:
                    return n
                nested -= 1
            elif self.words[n] == "if" and self.at(n - 1) != "end":
                nested += 1
            elif self.words[n] in ("elsif", "else") and nested == 0:
                return n
        return len(self.words)

    def enclosing(self, number: int) -> int:
        """The number of the bracket, case or begin in which the token stands."""
        depth = self.tokens[number].depth
        for n in range(number - 1, -1, -1):
            if self.tokens[n].depth < depth:
                return n
        return -1

    def source(self, first: int, end: int) -> str:
        """The tokens as they stand in the file."""
        return self.root[self.tokens[first].start : self.tokens[end - 1].end]

    def closed(self, number: int) -> int:
        """The number after the bracket that closes this one."""
        depth = self.tokens[number].depth
        for n in range(number + 1, len(self.words)):
            if self.tokens[n].depth == depth:
                return n + 1
        return len(self.words)

    def is_header(self, number: int) -> bool:
        """Whether the token stands in the head of a function."""
        first, _ = self.statement(number)
        return self.at(first) == "create" and "function" in self.words[first : first + 5]
