"""The README's picture: who holds a lease over time, drawn from a run on a real server.

    PYTHONPATH=tests python -m docs.picture

plays the run, which takes some seconds, and writes docs/lease-light.svg and docs/lease-dark.svg.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import matplotlib
import psycopg

import arbiter_db
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.demo.stage import STATEMENTS, sql_file
from arbiter_db.demo.story import DATABASE, MACHINE, TRADER, USER, create_app

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

__all__ = ["FILES", "Run", "description", "draw", "play"]

FOLDER = Path(__file__).parents[2] / "docs"

#: Seconds instead of half-minutes; the picture has no scale.
SETTINGS = """
update arbiter.settings
set heartbeat_interval = '0.5 seconds', heartbeat_timeout = '1.5 seconds', stop_grace = '1 second'
"""

#: What happens when, in seconds: the browser or the machine writes, or the machine's heartbeat.
SCRIPT = [
    (0.3, "browser"), (0.9, "browser"), (1.5, "browser"),
    (2.0, "heartbeat"), (2.1, "machine"), (2.5, "browser"),
    (2.5, "heartbeat"), (2.7, "machine"), (3.0, "heartbeat"), (3.3, "machine"),
    (3.5, "heartbeat"), (3.9, "machine"), (4.0, "heartbeat"),
    (4.4, "browser"), (6.0, "browser"), (6.5, "machine"), (6.7, "browser"), (7.4, "browser"),
]  # fmt: skip

SIGNAL = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%s, 'BTCUSDT', '1m', 'buy', clock_timestamp(), %s, %s)
"""

END = 8.0


class Step(NamedTuple):
    """Something that a client did, and the SQLSTATE of its rejection."""

    at: float
    who: str
    code: str | None


class Term(NamedTuple):
    """An epoch of the lease."""

    begins: float
    epoch: int
    holder: str
    reason: str


@dataclass(frozen=True)
class Run:
    """What happened: the steps, and the history of the lease."""

    steps: list[Step]
    terms: list[Term]


def play() -> Run:
    """Play the script with real clients, each on a connection of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        create_app(server)
        conninfo = server.conninfo(DATABASE, "app_owner")
        arbiter_db.install(conninfo)

        def connect() -> psycopg.Connection[Any]:
            return stack.enter_context(psycopg.connect(conninfo, autocommit=True))

        owner, browser, machine = connect(), connect(), connect()
        owner.execute(sql_file("people.sql"))
        owner.execute(SETTINGS)
        provisioned = {"machine": MACHINE, "user": USER, "provider_id": "e286de4f711e86"}
        owner.execute(STATEMENTS["provision"], provisioned)
        began = _clock(owner)
        steps = []
        for due, who in sorted(SCRIPT):
            Event().wait(max(0.0, due - (_clock(owner) - began).total_seconds()))
            code = None
            try:
                if who == "heartbeat":
                    machine.execute(
                        "update public.cloud_machines set status = 'running',"
                        " last_health_check = now() where id = %s",
                        (MACHINE,),
                    )
                elif who == "machine":
                    machine.execute(SIGNAL, (TRADER, "cloud", MACHINE))
                else:
                    browser.execute(SIGNAL, (TRADER, "local", None))
            except psycopg.Error as error:
                code = error.sqlstate
            steps.append(Step((_clock(owner) - began).total_seconds(), who, code))
        terms = [
            Term((h.handed_over_at - began).total_seconds(), h.epoch, h.to_holder, h.reason)
            for h in arbiter_db.handovers(owner, USER)
        ]
    return Run(steps, terms)


def _clock(conn: psycopg.Connection[Any]) -> datetime:
    row = conn.execute("select clock_timestamp()").fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def description(run: Run) -> str:
    """The run in one line, without its instants; the picture carries it."""
    writes = [
        f"{step.who} {step.code or 'admitted'}" for step in run.steps if step.who != "heartbeat"
    ]
    terms = [f"epoch {term.epoch} {term.holder} ({term.reason})" for term in run.terms]
    return "; ".join([*writes, *terms])


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, on GitHub's background."""

    ink: str
    track: str
    local: str
    cloud: str
    rejected: str
    on_bar: str


THEMES = {
    "light": Theme("#1f2328", "#eaeef2", "#1a7f37", "#0969da", "#d1242f", "#ffffff"),
    "dark": Theme("#f0f6fc", "#21262d", "#3fb950", "#58a6ff", "#ff7b72", "#0d1117"),
}
FILES = {name: FOLDER / f"lease-{name}.svg" for name in THEMES}

LANES = {"browser": 1.0, "machine": 0.0}
HOLDERS = {"local": "browser", "cloud": "machine"}

#: Half the height of a bar, and of the room that a mark needs in it.
HALF, ROOM = 0.25, 0.16


def draw(run: Run, theme: Theme, path: Path) -> None:
    """Draw the run: a lane for each environment, and a bar in it while it may write."""
    style: Any = {"font.size": 14.5, "font.family": "DejaVu Sans", "svg.hashsalt": "lease"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(8.4, 4.1))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-1.45, END + 0.1)
        axes.set_ylim(-1.36, 1.72)
        axes.axis("off")
        _lanes(axes, run, theme)
        _handovers(axes, run, theme)
        _steps(axes, run, theme)
        _key(axes, theme)
        metadata = {"Date": None, "Title": "A lease over time", "Description": description(run)}
        figure.savefig(path, format="svg", transparent=True, metadata=metadata)
        plt.close(figure)


def _lanes(axes: Axes, run: Run, theme: Theme) -> None:
    for name, y in LANES.items():
        axes.text(-1.38, y, name, color=theme.ink, weight="bold", va="center")
        axes.barh(y, END, height=2 * HALF, color=theme.track, zorder=0)
    edges = [0.0, *(term.begins for term in run.terms[1:]), END]
    for term, (begins, ends) in zip(run.terms, pairwise(edges), strict=True):
        y = LANES[HOLDERS[term.holder]]
        colour = theme.local if term.holder == "local" else theme.cloud
        # While the lease drains to the machine the browser is rejected already.
        drained = next(step.at for step in run.steps if step.who == "heartbeat")
        shown = min(ends, drained) if term.epoch == 1 else ends
        axes.barh(y, shown - begins, left=begins, height=2 * HALF, color=colour)
        middle = (begins + ends) / 2
        axes.text(
            middle, y + HALF + 0.05, "may write",
            color=colour, ha="center", va="bottom", weight="bold", size=13,
        )  # fmt: skip
        axes.text(middle, -0.86, f"epoch {term.epoch}", color=theme.ink, ha="center", va="center")


def _handovers(axes: Axes, run: Run, theme: Theme) -> None:
    texts = {
        "activated": "the machine starts",
        "heartbeat_lapsed": "the machine is silent too long",
    }
    for term in run.terms[1:]:
        axes.plot([term.begins] * 2, [-1.0, 1.48], color=theme.ink, lw=1.3, ls=(0, (3, 3)))
        axes.text(term.begins, 1.53, texts[term.reason], color=theme.ink, ha="center", va="bottom")


def _steps(axes: Axes, run: Run, theme: Theme) -> None:
    begins = [term.begins for term in run.terms]
    for step in run.steps:
        if step.who == "heartbeat":
            axes.plot([step.at] * 2, [-0.50, -0.34], color=theme.cloud, lw=3.5)
            continue
        y = LANES[step.who]
        if step.code is None:
            # A write that hands over stands just inside its epoch.
            at = max(step.at, max(b for b in begins if b <= step.at) + ROOM)
            axes.plot(at, y, "o", color=theme.on_bar, ms=10)
        else:
            axes.plot(step.at, y, "x", color=theme.rejected, ms=16, mew=4.5)
            axes.text(
                step.at + 0.26, y, f"rejected\n{step.code}", color=theme.rejected,
                va="center", weight="bold", size=13, linespacing=1.2,
            )  # fmt: skip


def _key(axes: Axes, theme: Theme) -> None:
    y = -1.2
    text: dict[str, Any] = {"color": theme.ink, "va": "center", "size": 12.5}
    axes.plot(0.1, y, "o", color="none", mec=theme.ink, mew=1.6, ms=9)
    axes.text(0.3, y, "write", **text)
    axes.plot(1.35, y, "x", color=theme.rejected, ms=11, mew=3.5)
    axes.text(1.55, y, "rejected write", **text)
    axes.plot([3.7, 3.7], [y - 0.08, y + 0.08], color=theme.cloud, lw=3.5)
    axes.text(3.85, y, "heartbeat", **text)
    axes.annotate(
        "time", (END, y), (END - 1.15, y), color=theme.ink, size=12.5, va="center",
        arrowprops={"arrowstyle": "->", "color": theme.ink, "lw": 1.4},
    )  # fmt: skip


def main() -> None:
    """Play the run and draw both pictures."""
    run = play()
    print(description(run))
    for name, theme in THEMES.items():
        draw(run, theme, FILES[name])
        print(FILES[name])


if __name__ == "__main__":
    main()
