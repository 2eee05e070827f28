"""The output of a run: one JSON file, its tables in Markdown, and a picture.

``python -m bench.report`` makes tables and picture anew from the JSON, also those of docs/cost.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import picture
from bench.samples import Comparison, Samples

__all__ = ["PAGE", "RESULTS", "as_figures", "keep", "renew", "tables"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "cost.md"

#: The figures of a comparison, as JSON has them.
Figures = dict[str, Any]


def as_figures(comparison: Comparison, samples: Samples, server: str) -> Figures:
    """A measured comparison as JSON has it."""
    return {
        "group": comparison.group.title,
        "ratios": comparison.group.ratios,
        "title": samples.title,
        "unit": samples.unit,
        "server": server,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "variants": list(samples.variants),
        "rounds": samples.rounds,
        "median": {variant: samples.median(variant) for variant in samples.variants},
        "spread": {variant: samples.spread(variant) for variant in samples.variants},
        "ratio": {variant: samples.ratio(variant) for variant in samples.variants},
        "facts": samples.facts,
    }


def tables(found: Mapping[str, Figures]) -> Iterator[tuple[str, str]]:
    """The title of each group, and its table: medians, or ratios of medians to the first one.

    Behind a figure of several rounds stands half the range between their quartiles.
    """
    for title, members in _groups(found):
        columns = list(dict.fromkeys(variant for one in members for variant in one["variants"]))
        rows = [[one["title"], *(_cell(one, variant) for variant in columns)] for one in members]
        align = ("left", *("right" for _ in columns))
        yield (
            title,
            tabulate(
                rows, ["", *columns], tablefmt="github", colalign=align, disable_numparse=True
            ),
        )


def keep(found: Mapping[str, Figures], folder: Path) -> None:
    """Write all of it into a folder; other comparisons there stay and are shown, too."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"
    kept: dict[str, Figures] = json.loads(file.read_text()) if file.exists() else {}
    kept.update(found)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    parts = [f"### {title}\n\n{table}" for title, table in tables(kept)]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")
    if all(name in kept for name in picture.NEEDED):
        picture.draw(kept, folder / picture.NAME)


def renew(page: str, found: Mapping[str, Figures]) -> str:
    """The page with its tables as they are now: each follows a comment that is its title."""
    current = dict(tables(found))
    return re.sub(
        r"^<!-- (.*) -->\n\n(?:\|.*\n)*",
        lambda match: f"<!-- {match[1]} -->\n\n{current[match[1]]}\n",
        page,
        flags=re.MULTILINE,
    )


def _groups(found: Mapping[str, Figures]) -> Iterator[tuple[str, list[Figures]]]:
    order = list(dict.fromkeys(one["group"] for one in found.values()))
    members = sorted(found.values(), key=lambda one: order.index(one["group"]))
    for title, group in groupby(members, key=lambda one: str(one["group"])):
        yield title, list(group)


def _cell(one: Figures, variant: str) -> str:
    if variant not in one["variants"]:
        return ""
    if one["ratios"] and variant != one["variants"][0]:
        value = f"{one['ratio'][variant]:.2f}"
    else:
        median = one["median"][variant]
        value = f"{median:,.0f}" if median >= 1_000 else f"{median:.4g}"
        if one["unit"] not in one["group"].lower():
            value += f" {one['unit']}"
    if len(one["rounds"][variant]) > 1:
        value += f" ±{one['spread'][variant]:.0%}"
    return value


if __name__ == "__main__":
    keep({}, RESULTS)
    kept = json.loads((RESULTS / "bench.json").read_text())
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")
