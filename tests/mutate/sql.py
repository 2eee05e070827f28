"""Mutants of SQL and PL/pgSQL, by operators of our own on the tokens of ``tokens``.

Comments and the texts of ``comment on`` are left alone. Templates are code like any other.

The edits are of the text, so that a mutant differs in one place and nothing else; whether the
server accepts it is found out by an install.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .mutants import Mutant
from .tokens import Code, is_plpgsql, unquoted, words

__all__ = ["sql_mutants"]


MESSAGE = re.compile(r"'.*[A-Za-z%]+ [A-Za-z%,.]+ [A-Za-z%].*'", re.DOTALL)
LOCKS = re.compile(r"\b_lock|\block_|\block table|advisory")
DURATION = re.compile(r"'(\d+) ?(ms|s|min|h|day|days|seconds?|minutes?)'")

#: Where an operand of and/or ends, and where one begins, at the depth of the operator.
AFTER = words(
    "and or then loop ; , order group limit else when union offset returning having window left"
    " right full cross join inner as into using do set from where for"
)
BEFORE = words(
    "and or where on if elsif when select := return , having while then else perform using values"
    " =>"
)
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "=": "<>", "<>": "=",
    "and": "or", "or": "and", "+": "-", "-": "+", "<<": ">>", ">>": "<<", "&": "|", "/": "*",
    "true": "false", "false": "true", "greatest": "least", "least": "greatest",
    "min": "max", "max": "min", "bool_and": "bool_or", "bool_or": "bool_and",
    "any": "all", "some": "all", "all": "any",
}  # fmt: skip
KINDS = {
    **dict.fromkeys(("<", "<=", ">", ">=", "=", "<>"), "comparison"),
    **dict.fromkeys(("and", "or"), "and or"),
    **dict.fromkeys(("+", "-", "<<", ">>", "&", "/"), "arithmetic"),
    **dict.fromkeys(("true", "false"), "true false"),
}
WORDS = {
    "local": "cloud", "cloud": "local", "enforce": "observe", "observe": "enforce",
    "allow": "reject", "reject": "allow", "running": "stopped", "stopped": "running",
    "starting": "running", "stopping": "running", "error": "running", "deleted": "running",
    "INSERT": "UPDATE", "UPDATE": "INSERT", "ROW": "STATEMENT", "AFTER": "BEFORE",
}  # fmt: skip
WEAKER = {
    "access exclusive": "share row exclusive",
    "share row exclusive": "row exclusive",
    "exclusive": "row exclusive",
    "share": "access share",
}
FUNCTIONS = {
    "clock_timestamp": ("clock", "now"),
    "pg_current_xact_id": ("transaction id", "pg_current_xact_id_if_assigned"),
    "pg_snapshot_xmax": ("transaction id", "pg_snapshot_xmin"),
    "pg_snapshot_xmin": ("transaction id", "pg_snapshot_xmax"),
    "pg_visible_in_snapshot": ("transaction id", "not pg_visible_in_snapshot"),
}
#: Row locks, the longest first: without it, and one that is stronger or weaker.
ROW_LOCKS = (
    (("for", "no", "key", "update"), "for update"),
    (("for", "key", "share"), "for no key update"),
    (("for", "update"), "for no key update"),
    (("for", "share"), "for key share"),
)
EVENTS = words("insert update delete truncate")
STATEMENTS = words("perform execute insert update delete return raise continue exit")


def sql_mutants(path: str, text: str) -> list[Mutant]:
    """All mutants of a file, those of locks and security in an area of their own."""
    return [
        Mutant(area, kind, path, start, text[start:end], new)
        for piece in pieces(text, text)
        for area, kind, start, end, new in piece.edits()
        if text[start:end] != new
    ]


#: area, kind, where from and to in the file, what instead
Edit = tuple[str, str, int, int, str]


def pieces(root: str, text: str, offset: int = 0, outer: str = "file") -> Iterator[Piece]:
    """The code in a text, which stands at an offset of the file, and that in its literals."""
    piece = Piece(root, text, offset, outer)
    yield piece
    for token in piece.tokens:
        if token.word == "$$" and not piece.is_documentation(token):
            quotes = token.text.index("$", 1) + 1
            inner = token.text[quotes:-quotes]
            kind = "plpgsql" if is_plpgsql(inner) else "body"
            yield from pieces(root, inner, token.start + quotes, kind)
        elif token.word == "''" and piece.holds_sql(token):
            yield from pieces(root, unquoted(token.text[1:-1]), token.start + 1, "literal")


class Piece(Code):
    """Code of one level of quoting, and the edits of it."""

    def edits(self) -> Iterator[Edit]:
        """All edits of this piece's own tokens."""
        for number, token in enumerate(self.tokens):
            if self.at(self.statement(number)[0]) == "comment" or token.word.startswith("#"):
                continue
            if token.word == "''":
                yield from self._literal(number)
            elif token.word != "$$":
                yield from self._swap(number)
                yield from self._token(number)
                yield from self._clause(number)
                yield from self._security(number)
                yield from self._lock(number)
                if self.outer == "plpgsql":
                    yield from self._plpgsql(number)

    def _cut(self, area: str, kind: str, first: int, end: int, new: str = "") -> Edit:
        """Replace the tokens from first to before end."""
        return area, kind, self.tokens[first].start, self.tokens[end - 1].end, new

    def _swap(self, number: int) -> Iterator[Edit]:
        """An operator, constant or function by its counterpart."""
        word, previous, follows = self.words[number], self.at(number - 1), self.at(number + 1)
        area, kind = "sql", KINDS.get(word, "function")
        if word not in SWAPS:
            return
        if word in ("any", "all", "some"):
            if follows != "(" or previous not in ("=", "<>", "<", ">"):
                return
            kind = "any all"
        elif (
            (word == "=" and self._assigns(number))
            or (word in ("+", "-") and not self._is_operand(number - 1))
            or (kind == "function" and follows != "(")
            or (kind == "and or" and not self._joins(number))
        ):
            return
        elif word in ("true", "false") and self.call_of(number) == "set_config":
            area, kind = "sql-locks", "local setting"
        elif word in ("true", "false") and self.call_of(number) == "current_setting":
            kind = "missing setting"
        elif "transaction_isolation" in self.text_of(number - 4, number):
            area, kind = "sql-locks", "isolation level"
        yield self._cut(area, kind, number, number + 1, SWAPS[word])

    def _token(self, number: int) -> Iterator[Edit]:
        """A token by another one, or by none."""
        word, previous, follows = self.words[number], self.at(number - 1), self.at(number + 1)
        if word in FUNCTIONS and follows == "(":
            name, new = FUNCTIONS[word]
            yield self._cut("sql-locks", name, number, number + 1, new)
        elif word.isdigit() and not self._is_position(number):
            yield self._cut("sql", "number", number, number + 1, str(int(word) + 1))
        elif word == "is":
            yield from self._null_test(number)
        elif word == "not" and self._negates(number):
            yield self._cut("sql", "not", number, number + 1)
        elif word == "found" and previous != "not":
            yield self._cut("sql", "not", number, number + 1, "not found")

    def _assigns(self, number: int) -> bool:
        """Whether this = is not a comparison: `update ... set`, a setting, an option of raise."""
        clause = self.back(
            number,
            words("set where on and or if when select having using elsif return"),
        )
        return self.at(clause) in ("set", "using")

    def _negates(self, number: int) -> bool:
        """Whether this `not` belongs to a condition: no `is not`, `if not exists`, `not valid`."""
        previous, follows = self.at(number - 1), self.at(number + 1)
        if self.outer == "literal" and previous == "if" and follows == "exists":
            return False
        return previous != "is" and follows not in ("null", "valid", "materialized")

    def _is_operand(self, number: int) -> bool:
        word = self.at(number)
        return word in (")", "]", "''") or bool(re.fullmatch(r"[\w.]+", word))

    def _joins(self, number: int) -> bool:
        """Whether this joins conditions: no `between`, `create or replace`, events of a trigger."""
        if self.at(self.back(number, words("and or between"))) == "between":
            return False
        return not {self.at(number - 1), self.at(number + 1)} & {"replace", *EVENTS}

    def _is_position(self, number: int) -> bool:
        """A column's number in `order by 1, 2`."""
        return self.at(self.back(number, words("by limit select"))) == "by"

    def _null_test(self, number: int) -> Iterator[Edit]:
        """`is null`, `is distinct from`, `is true`, with and without not."""
        kind = "distinct" if "distinct" in self.words[number + 1 : number + 3] else "null test"
        if self.at(number + 1) == "not":
            yield self._cut("sql", kind, number, number + 2, "is")
        elif self.at(number + 1) in ("null", "distinct", "true", "false"):
            yield self._cut("sql", kind, number, number + 1, "is not")

    def _clause(self, number: int) -> Iterator[Edit]:
        """Clauses, conditions and arguments that are left out or change places."""
        word, previous, follows = self.words[number], self.at(number - 1), self.at(number + 1)
        if word in ("and", "or") and self._joins(number):
            looser = {"and"} if word == "or" else set()
            end = self.ahead(number, AFTER - looser)
            yield self._cut("sql", "condition", number, end)
            first = self.back(number, BEFORE - looser) + 1
            if self.at(first - 1) not in ("and", "or") and first < number:
                yield self._cut("sql", "condition", first, number + 1)
        elif word == "coalesce" and follows == "(":
            comma = self.ahead(number + 2, words(","))
            end = self.ahead(comma, words(",")) if self.at(comma) == "," else comma
            if self.at(comma) == ",":
                one, other = self.source(number + 2, comma), self.source(comma + 1, end)
                unclear = "'" if self.outer == "literal" else "--"
                if unclear not in one + other:
                    yield self._cut("sql", "coalesce", number + 2, end, f"{other}, {one}")
        elif word == "distinct" and previous not in ("is", "not") and follows != "on":
            yield self._cut("sql", "clause", number, number + 1)
        elif word == "limit":
            yield self._cut("sql", "clause", number, number + 2)
        elif word == "union" and follows == "all":
            yield self._cut("sql", "clause", number, number + 2, "union")
        elif word in ("left", "full") and follows == "join":
            yield self._cut("sql", "clause", number, number + 1)
        elif word == "on" and self.words[number + 1 : number + 4] == ["conflict", "do", "nothing"]:
            yield self._cut("sql", "clause", number, number + 4)
        elif word == "into" and follows == "strict":
            yield self._cut("sql", "clause", number + 1, number + 2)
        elif word in EVENTS and self.outer == "literal":
            if follows == "or":  # the events of a trigger
                yield self._cut("sql", "event", number, number + 2)
            elif previous == "or":
                yield self._cut("sql", "event", number - 1, number + 1)
        elif word == "order" and follows == "by":
            stops = words("limit for loop offset union into rows filter")
            end = self.ahead(number, stops)
            yield self._cut("sql-locks", "order", number, end)
        elif word == "desc":
            yield self._cut("sql-locks", "order", number, number + 1)
        elif word == "when" and self.at(self.enclosing(number)) in ("case", "begin"):
            end = self.ahead(number, words("when else end"))
            if "when" in (self.at(end), self.at(self.back(number, words("when")))):
                yield self._cut("sql", "branch", number, end)

    def _security(self, number: int) -> Iterator[Edit]:
        """Attributes of functions, settings, privileges, policies."""
        word, previous, follows = self.words[number], self.at(number - 1), self.at(number + 1)
        if word == "security" and follows == "definer":
            yield self._cut("sql-locks", "definer", number, number + 2)
        elif word == "set" and follows == "local":
            yield self._cut("sql-locks", "local setting", number, number + 2, "set")
        elif word == "set" and self.at(number + 2) == "=" and self.is_header(number):
            end = self.ahead(number, words("set as begin return language"))
            yield self._cut("sql-locks", f"set {follows}", number, end)
        elif word in ("grant", "revoke") and previous in ("", ";", "then", "begin", "else"):
            end = self.statement(number)[1]
            nothing = "null" if self.outer == "plpgsql" else "select"
            if self.outer != "literal":
                yield self._cut("sql-locks", "privilege", number, end, nothing)
        elif word == "as" and follows == "restrictive":
            yield self._cut("sql-locks", "policy", number, number + 2)
        elif word == "with" and follows == "check" and self.at(number + 2) == "(":
            yield self._cut("sql-locks", "policy", number + 2, self.closed(number + 2), "(true)")
        elif word == "using" and follows == "(" and self.outer == "literal":
            yield self._cut("sql-locks", "policy", number + 1, self.closed(number + 1), "(true)")
        elif word == "always" and previous == "enable":
            yield self._cut("sql-locks", "enable always", number, number + 1)

    def _lock(self, number: int) -> Iterator[Edit]:
        """Locks on rows and tables."""
        word = self.words[number]
        if word == "for":
            for lock, other in ROW_LOCKS:
                end = number + len(lock)
                if tuple(self.words[number:end]) == lock and self.at(end) != "to":
                    yield self._cut("sql-locks", "row lock", number, end, other)
                    if tuple(self.words[end : end + 2]) == ("skip", "locked"):
                        yield self._cut("sql-locks", "skip locked", end, end + 2)
                        end += 2
                    yield self._cut("sql-locks", "row lock", number, end)
                    return
        elif word == "mode" and "lock" in self.words[:number]:
            for mode, weaker in WEAKER.items():
                size = len(mode.split())
                if self.words[number - size : number] == mode.split():
                    yield self._cut("sql-locks", "table lock", number - size, number, weaker)
                    return

    def _plpgsql(self, number: int) -> Iterator[Edit]:
        """Statements and branches of PL/pgSQL."""
        word, previous, follows = self.words[number], self.at(number - 1), self.at(number + 1)
        begins = previous in (";", "then", "else", "loop", "begin")
        if begins and (word in STATEMENTS or follows == ":=" or self._assigns_field(number)):
            end = self.ahead(number, words(""))
            last = self.words[end + 1 : end + 3] in (["end"], ["end", ";"])
            if not (word == "return" and last):
                locks = LOCKS.search(self.text_of(number, end)) is not None
                area, kind = ("sql-locks", "lock statement") if locks else ("sql", "statement")
                yield self._cut(area, kind, number, end, "null")
        if (word == "if" and begins) or word == "elsif":
            then = self.ahead(number, words("then"))
            condition = self.source(number + 1, then)
            yield self._cut("sql", "negated if", number + 1, then, f"not ({condition})")
        if word == "elsif" or (word == "else" and self.at(self.branch_end(number)) == "end"):
            end = self.branch_end(number)
            if self.at(end + 1) == "if" or self.at(end) in ("elsif", "else"):
                yield self._cut("sql", "branch", number, end)
        if word == "when" and previous in ("exit", "continue"):
            end = self.ahead(number, words(""))
            condition = self.source(number + 1, end)
            yield self._cut("sql", "negated if", number + 1, end, f"not ({condition})")

    def _assigns_field(self, number: int) -> bool:
        return self.words[number + 1 : number + 4 : 2] == [".", ":="]

    def _literal(self, number: int) -> Iterator[Edit]:
        """Constants: words, durations, conditions of errors, messages, locks."""
        token = self.tokens[number]
        content, call = token.text[1:-1], self.call_of(number)
        previous = self.at(number - 1)
        if self.at(number + 1) == "::" and self.at(number + 2).startswith("reg"):
            return
        if found := DURATION.fullmatch(token.text):
            area = "sql-locks" if self.at(number - 2) == "lock_timeout" else "sql"
            new = f"'{int(found[1]) * 10}{found[2]}'"
            yield self._cut(area, "duration", number, number + 1, new)
        elif content in ("read committed", "repeatable read", "serializable"):
            new = "'serializable'" if content != "serializable" else "'read committed'"
            yield self._cut("sql-locks", "isolation level", number, number + 1, new)
        elif content in WEAKER and "lock" in self.text_of(*self.statement(number)).lower():
            yield self._cut("sql-locks", "table lock", number, number + 1, f"'{WEAKER[content]}'")
        elif (call, previous) == ("_fail", "(") or self.at(number - 2) == "errcode":
            yield self._cut("sql", "condition name", number, number + 1, "'data_exception'")
        elif found := re.fullmatch(r"'\{(\w+(?:,\w+)+)\}'", token.text):
            shorter = ",".join(found[1].split(",")[:-1])
            yield self._cut("sql", "list", number, number + 1, f"'{{{shorter}}}'")
        elif re.fullmatch(r"[A-Za-z_]\w*", content) and not self._is_name(number):
            # Of the type "char" the server keeps the first letter.
            new = WORDS.get(content, f"{content}_x" if len(content) > 1 else "x")
            inner = token.start + 1
            yield "sql", "word", inner, token.end - 1, new
        elif self._is_message(number):
            yield self._cut("sql", "message", number, number + 1, "'changed'")

    def _is_name(self, number: int) -> bool:
        """The name of something in the catalog, which the server would not find."""
        of_catalog = words("obj_description to_regrole")
        return self.at(number + 1) == "::" or self.call_of(number) in of_catalog

    def _is_message(self, number: int) -> bool:
        """A text of an error or its hint; not the meaning of something, which becomes a comment."""
        if not MESSAGE.fullmatch(self.tokens[number].text) or self.holds_sql(self.tokens[number]):
            return False
        said = words("_fail raise _reject message hint v_hint")
        return not said.isdisjoint(self.words[slice(*self.statement(number))])
