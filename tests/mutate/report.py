"""What the trials say: a table, the survivors as diffs, and the entries of equivalent.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from .mutants import Mutant
from .trials import Result

__all__ = ["Equivalent", "Score", "equivalents", "markdown", "matched", "table"]

DEFINITION = re.compile(
    r"^\s*(?:create (?:or replace )?function \w+\.|(?:async )?def |class )(\w+)", re.MULTILINE
)


@dataclass(frozen=True)
class Equivalent:
    """A mutation that no test can notice, because it changes nothing that anybody could see."""

    path: str
    old: str
    new: str
    reason: str
    #: The function in which it stands, where the same lines stand in several.
    within: str = ""

    def matches(self, mutant: Mutant, text: str) -> bool:
        if mutant.path != self.path or (self.old, self.new) != mutant.lines(text):
            return False
        return self.within in ("", function_of(mutant, text))


def function_of(mutant: Mutant, text: str) -> str:
    """The function, or class, whose definition begins last before the mutant."""
    names = DEFINITION.findall(text[: mutant.start])
    return names[-1] if names else ""


def equivalents(path: Path) -> list[Equivalent]:
    """The entries of the file; ValueError when one gives no reason."""
    entries = []
    for raw in tomllib.loads(path.read_text(encoding="utf-8")).get("mutation", []):
        lines = {
            name: "\n".join(map(str.strip, raw.pop(name).strip().splitlines()))
            for name in ("old", "new")
        }
        entry = Equivalent(**lines, **raw)
        if len(entry.reason.split()) < 5:
            raise ValueError(f"say why this mutation of {entry.path} is equivalent: {entry.old}")
        entries.append(entry)
    return entries


def matched(
    entries: Iterable[Equivalent], mutants: Iterable[Mutant], texts: Mapping[str, str]
) -> dict[Mutant, Equivalent]:
    """The mutants that an entry argues to be equivalent. An entry that is not among these matches
    no mutant any more, because the code has changed."""
    by_path: dict[str, list[Equivalent]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    found = {}
    for mutant in mutants:
        for entry in by_path.get(mutant.path, []):
            if entry.matches(mutant, texts[mutant.path]):
                found[mutant] = entry
    return found


@dataclass(frozen=True)
class Score:
    """The counts of one area."""

    area: str
    invalid: int
    killed: int
    survived: int
    equivalent: int

    @classmethod
    def of(cls, area: str, trials: Iterable[tuple[Result, bool]]) -> Score:
        """From the results, each with whether an entry argues that the mutant is equivalent."""
        found = list(trials)
        count = {name: sum(r.status == name for r, _ in found) for name in ("invalid", "killed")}
        survivors = [argued for result, argued in found if result.status == "survived"]
        return cls(area, count["invalid"], count["killed"], len(survivors), sum(survivors))

    @property
    def drawn(self) -> int:
        return self.invalid + self.valid

    @property
    def valid(self) -> int:
        return self.killed + self.survived

    @property
    def all(self) -> str:
        """The share that was killed, of all valid mutants."""
        return _percent(self.killed, self.valid)

    @property
    def without_equivalent(self) -> str:
        """The share that was killed, of those that a test could have noticed."""
        return _percent(self.killed, self.valid - self.equivalent)

    def cells(self) -> list[str]:
        numbers = (self.drawn, self.invalid, self.killed, self.survived, self.equivalent)
        return [self.area, *map(str, numbers), self.all, self.without_equivalent]


COLUMNS = (
    "area", "drawn", "invalid", "killed", "survived", "of these equivalent", "score",
    "without equivalent",
)  # fmt: skip


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def table(scores: Iterable[Score], title: str) -> Table:
    made = Table(title=title)
    for name in COLUMNS:
        made.add_column(name, justify="left" if name == "area" else "right")
    for score in scores:
        made.add_row(*score.cells())
    return made


def markdown(
    title: str,
    scores: Iterable[Score],
    survivors: Iterable[tuple[Mutant, str, Equivalent | None]],
    stale: Iterable[Equivalent],
) -> str:
    """The report as a page. survivors: each with the text of its file, and the entry about it."""
    parts = [f"# {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    parts += ["| " + " | ".join(score.cells()) + " |" for score in scores]
    parts += ["", "## Survivors"]
    for mutant, text, entry in survivors:
        parts += ["", f"### {mutant.area}: {mutant.path}:{mutant.line(text)} ({mutant.kind})", ""]
        parts += [f"Equivalent: {entry.reason}", ""] if entry else []
        parts += ["```diff", mutant.diff(text), "```"]
    gone = [f"- {entry.path}: `{entry.old}`" for entry in stale]
    if gone:
        parts += ["", "## Entries of equivalent.toml that match no mutant any more", "", *gone]
    return "\n".join(parts) + "\n"
