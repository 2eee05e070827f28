"""Comparisons, their samples, and the groups in which they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psycopg

if TYPE_CHECKING:
    from bench.stage import Stage

__all__ = ["Comparison", "Conn", "Cost", "Group", "Plan", "Samples", "cpu_time"]

Conn = psycopg.Connection[Any]


@dataclass(frozen=True)
class Group:
    """Comparisons that belong in one table.

    With ``ratios`` the table shows the first variant's figure and the others as multiples of it,
    otherwise every figure.
    """

    title: str
    ratios: bool = True


@dataclass(frozen=True)
class Plan:
    """How often the variants take turns, and how long a turn by time lasts.

    ``scale`` is the part of their full size that big tables are played with.
    """

    rounds: int = 7
    seconds: int = 4
    scale: float = 1.0


@dataclass
class Samples:
    """One value a round for each variant, in ``unit``; the others are compared with the first."""

    title: str
    unit: str
    variants: tuple[str, ...]
    rounds: dict[str, list[float]] = field(init=False)
    #: Other findings, by name, that are not values of a round.
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rounds = {variant: [] for variant in self.variants}

    @property
    def base(self) -> str:
        return self.variants[0]

    def median(self, variant: str) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds[variant])

    def ratio(self, variant: str) -> float:
        """The median as a multiple of the first variant's."""
        return self.median(variant) / self.median(self.base)

    def spread(self, variant: str) -> float:
        """Half the range between the quartiles, as a part of the median."""
        if len(self.rounds[variant]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds[variant], n=4)
        return (high - low) / 2 / self.median(variant)


class Comparison(Protocol):
    """Something that is measured under several variants, which take turns."""

    @property
    def group(self) -> Group: ...

    @property
    def title(self) -> str: ...

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        """Play a round that warms up and does not count, then ``plan.rounds`` that do.

        Calls ``on_round`` after each of them.
        """
        ...


# The server's CPU time ---------------------------------------------------------------------------


@dataclass
class Cost:
    """CPU time in microseconds, once it is known."""

    spent: float = 0.0


@contextmanager
def cpu_time(conn: Conn) -> Iterator[Cost]:
    """The CPU time that the connection's backend spends inside the ``with`` block.

    The time is the kernel's, from ``/proc/<pid>/schedstat``. The client, the network and other
    processes are not counted, though they may evict caches.
    """
    file = Path(f"/proc/{conn.info.backend_pid}/schedstat")
    cost = Cost()
    before = int(file.read_text().split()[0])
    yield cost
    cost.spent = (int(file.read_text().split()[0]) - before) / 1_000
