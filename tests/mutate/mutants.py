"""What a mutant is: one small change of a file; and how mutants are drawn.

A mutant belongs to an *area* (what is measured: ``sql``, ``sql-locks``, ``python``, ``js``) and has
a *kind* (the operator that made it). Mutants that change the same place are one *site*, of which a
draw takes at most one.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import log, sqrt

__all__ = ["AREAS", "Mutant", "draw", "numbered"]

AREAS = ("sql", "sql-locks", "python", "js")


@dataclass(frozen=True)
class Mutant:
    """One change: ``old``, at ``start`` of the file ``path``, becomes ``new``."""

    area: str
    kind: str
    path: str
    start: int
    old: str
    new: str
    #: The mutants with the same path and change before this one in the file.
    number: int = 0

    @property
    def key(self) -> str:
        """An id that survives changes elsewhere in the file."""
        text = "\0".join((self.kind, self.path, self.old, self.new, str(self.number)))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def apply(self, text: str) -> str:
        """The mutated text of the file; ValueError when it is not the text that was mutated."""
        end = self.start + len(self.old)
        if text[self.start : end] != self.old:
            raise ValueError(f"{self.path} has changed since its mutants were listed")
        return text[: self.start] + self.new + text[end:]

    def line(self, text: str) -> int:
        """The number of the line in which the change begins, from 1."""
        return text.count("\n", 0, self.start) + 1

    def lines(self, text: str) -> tuple[str, str]:
        """The lines around the change, before and after it, each without the spaces around it."""
        first = text.rfind("\n", 0, self.start) + 1
        end = self.start + len(self.old)
        last = text.find("\n", end)
        before, after = text[first : self.start], text[end : last if last >= 0 else None]
        return _stripped(before + self.old + after), _stripped(before + self.new + after)

    def diff(self, text: str, context: int = 2) -> str:
        """The change as a unified diff."""
        before, after = text.splitlines(), self.apply(text).splitlines()
        lines = difflib.unified_diff(
            before, after, f"a/{self.path}", f"b/{self.path}", lineterm="", n=context
        )
        return "\n".join(lines)


def _stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def numbered(mutants: Iterable[Mutant]) -> list[Mutant]:
    """In the order of the files, those with the same change told apart by a number."""
    seen: dict[tuple[str, ...], int] = defaultdict(int)
    result = []
    for mutant in sorted(set(mutants), key=lambda m: (m.path, m.start, m.old, m.new, m.kind)):
        same = (mutant.kind, mutant.path, mutant.old, mutant.new)
        result.append(replace(mutant, number=seen[same]))
        seen[same] += 1
    return result


def draw(mutants: Iterable[Mutant], seed: int) -> Iterator[Mutant]:
    """Mutants of one area in a random order, the same for the same seed, one for each site.

    Some kinds are a hundred times as frequent as others and say the same each time. So the chance
    of a kind grows with the square root of its sites only. The place of a mutant in the order
    depends on itself: a change elsewhere in the code leaves the others nearly as they are.
    """
    found = list(mutants)
    at_site = Counter(map(_site, found))
    sites = Counter(kind for kind, *_ in at_site)

    def rank(mutant: Mutant) -> float:
        """A random number whose mean is larger the smaller the chance (Efraimidis, Spirakis)."""
        digest = hashlib.sha256(f"{seed} {mutant.key}".encode()).digest()
        chance = (int.from_bytes(digest[:8]) + 1) / 2**64
        return -log(chance) * at_site[_site(mutant)] * sqrt(sites[mutant.kind])

    seen = set()
    for mutant in sorted(found, key=rank):
        if _site(mutant) not in seen:
            seen.add(_site(mutant))
            yield mutant


def _site(mutant: Mutant) -> tuple[str, str, int, int]:
    return mutant.kind, mutant.path, mutant.start, len(mutant.old)
