"""The one picture of the results: what arbiter costs and saves, by rows and by round trips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BARS", "NAME", "NEEDED", "SIZES", "draw"]

NAME = "cost.svg"

#: The comparisons of the left panel, by rows of a statement, and the one of the right.
SIZES = {rows: f"instructions_rows_{rows}" for rows in (1, 3, 10, 30, 100)}
AWAY = "clients1_away"
NEEDED = (*SIZES.values(), AWAY)

BARS = {
    "unguarded": "unguarded",
    "arbiter": "arbiter",
    "check": "client asks first",
    "redis": "Redis lock",
    "advisory": "advisory lock",
}

#: Each is legible on white and on black, because a page may be either.
TEXT, UNGUARDED, ARBITER, OTHERS = "#757e88", "#8b949e", "#2f81f7", "#d97706"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "axes.edgecolor": UNGUARDED,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "savefig.transparent": True,
    # Text stays text, and the same figures make the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "arbiter",
}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw it from the figures of the comparisons in ``NEEDED``."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        _draw_rows(left, found)
        _draw_rates(right, found[AWAY]["median"])
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _draw_rows(axes: Axes, found: Mapping[str, Any]) -> None:
    """The work that is added to unguarded, in percent, by the rows of a statement."""
    sizes = list(SIZES)
    exists, policy, arbiter = (
        [100 * (found[name]["ratio"][variant] - 1) for name in SIZES.values()]
        for variant in ("exists", "policy", "arbiter")
    )
    is_less = [own <= other for own, other in zip(arbiter, exists, strict=True)]
    axes.fill_between(
        sizes, exists, arbiter, where=is_less, interpolate=True, color=ARBITER, alpha=0.15, lw=0
    )
    for values, color in ((exists, OTHERS), (policy, OTHERS), (arbiter, ARBITER)):
        axes.plot(sizes, values, color=color, linewidth=3, marker="o", markersize=5)
    for values, color in ((exists, OTHERS), (arbiter, ARBITER)):
        for end, shift, side in ((0, -8, "right"), (-1, 8, "left")):
            _write(
                axes,
                f"+{values[end]:.0f} %",
                (sizes[end], values[end]),
                (shift, -5),
                ha=side,
                color=color,
            )
    top = (sizes[2], max(exists[2], policy[2]))
    _write(axes, "trigger or policy\nthat asks for each row", top, (-8, 10), color=OTHERS)
    low = (sizes[2], arbiter[2])
    _write(axes, "arbiter", low, (-4, -20), color=ARBITER, fontweight="bold")
    middle = (sizes[3], (exists[3] + arbiter[3]) / 2)
    _write(axes, "saved", middle, (0, 0), ha="center", color=ARBITER)
    axes.set_title("Extra server work per row", loc="left", fontsize=14)
    axes.set_xlabel("rows in an INSERT")
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] * 0.6, sizes[-1] * 2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * max(exists))
    axes.set_yticks([])
    axes.spines[["left", "top", "right"]].set_visible(False)


def _write(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], **how: Any
) -> None:
    how = {"ha": "right", **how}
    axes.annotate(text, at, shift, textcoords="offset points", annotation_clip=False, **how)


def _draw_rates(axes: Axes, rates: Mapping[str, float]) -> None:
    """Inserts a second of a client that is a network hop away."""
    colors = {"unguarded": UNGUARDED, "arbiter": ARBITER}
    bars = axes.barh(
        list(BARS.values()),
        [rates[name] for name in BARS],
        color=[colors.get(name, OTHERS) for name in BARS],
        height=0.7,
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=5)
    axes.set_title("Inserts per second, client 1 ms away", loc="left", fontsize=14)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines[["bottom", "top", "right"]].set_visible(False)
