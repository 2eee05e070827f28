"""The output of a run: one JSON file, its tables in Markdown, and plots of them."""

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

from bench.samples import Comparison, Samples

__all__ = ["SHOWN", "as_figures", "draw", "keep", "tables"]

#: The figures of a comparison, as JSON has them.
Figures = dict[str, Any]

#: The groups whose plots the README shows.
SHOWN = ("Server CPU per statement, as a multiple of unguarded",)

#: The height of a bar, and of the rest of a plot, in inches.
BAR, MARGIN = 0.16, 1.1

#: Figures that are this many times apart do not fit on a linear scale.
WIDE = 100

#: The baseline is gray and arbiter stands out; the others get a color each.
COLORS = {"unguarded": "0.55", "unguarded again": "0.75", "arbiter": "tab:blue"}


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

    Behind a figure stands half the range between the quartiles of its rounds.
    """
    for title, members in _groups(found):
        columns = list(dict.fromkeys(variant for one in members for variant in one["variants"]))
        rows = [[one["title"], *(_cell(one, variant) for variant in columns)] for one in members]
        align = ("left", *("right" for _ in columns))
        yield title, tabulate(rows, ["", *columns], tablefmt="github", colalign=align)


def keep(found: Mapping[str, Figures], folder: Path) -> None:
    """Write all of it into a folder; other comparisons there stay and are shown, too.

    Draws only the plots that the README shows; ``draw`` makes the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.json"
    kept: dict[str, Figures] = json.loads(file.read_text()) if file.exists() else {}
    kept.update(found)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    parts = []
    for title, table in tables(kept):
        parts += [f"### {title}", table]
        if title in SHOWN:
            parts.append(f"![{title}]({_plot_name(title)})")
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")
    draw({name: one for name, one in kept.items() if one["group"] in SHOWN}, folder)


def draw(found: Mapping[str, Figures], folder: Path) -> None:
    """Draw a plot of each table into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, members in _groups(found):
        _plot(title, members, folder / _plot_name(title))


def _plot_name(title: str) -> str:
    """The part of a group's title before its unit."""
    about = re.split(r":|,? as an? ", title)[0]
    return re.sub(r"\W+", "-", about.lower()) + ".svg"


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
        value = f"{value} {one['unit']}"
    return f"{value} ±{one['spread'][variant]:.0%}"


def _plot(title: str, members: list[Figures], file: Path) -> None:
    """Bars of what the table shows, for each comparison one of each variant."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "arbiter"})
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys(variant for one in members for variant in one["variants"]))
    others = iter(plt.get_cmap("Set2")(range(8)))
    colors = {variant: COLORS.get(variant) or next(others) for variant in columns}
    bars = sum(len(one["variants"]) + 1 for one in members)
    figure, axes = plt.subplots(figsize=(9, MARGIN + BAR * bars), layout="constrained")
    position = 0.0
    ticks = []
    for one in members:
        key = "ratio" if one["ratios"] else "median"
        first = position
        for variant in one["variants"]:
            value = one[key][variant]
            label = None if variant in axes.get_legend_handles_labels()[1] else variant
            error = value * one["spread"][variant]
            axes.barh(position, value, xerr=error, color=colors[variant], label=label, height=0.9)
            position += 1
        ticks.append((first + position - 1) / 2)
        position += 1
    axes.set_yticks(ticks, [one["title"] for one in members])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    if members[0]["ratios"]:
        axes.axvline(1, color="black", linewidth=0.8)
    else:
        axes.set_xlabel(members[0]["unit"])
        values = [value for one in members for value in one["median"].values()]
        if max(values) > WIDE * min(values):
            axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
