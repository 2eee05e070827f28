"""What was measured, and what is said about it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.stage import UNGUARDED

__all__ = ["Samples"]


@dataclass
class Samples:
    """One value a round for each variant, in ``unit``."""

    title: str
    unit: str
    variants: Sequence[str]
    rounds: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = {variant: [] for variant in self.variants}

    def median(self, variant: str) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds[variant])

    def ratio(self, variant: str) -> float:
        """Of the medians, to unguarded."""
        return self.median(variant) / self.median(UNGUARDED)

    def spread(self, variant: str) -> float:
        """Half the range between the quartiles, as a part of the median."""
        low, _, high = statistics.quantiles(self.rounds[variant], n=4)
        return (high - low) / 2 / self.median(variant)
