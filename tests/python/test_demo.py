"""The demo, played for real in a process of its own, with its output piped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata

import pytest

pytestmark = pytest.mark.slow

#: The story itself waits for ten seconds; the rest is for slow machines.
TIMEOUT_S = 240

SQLSTATES = ["WX001", "WX002", "WX002", "WX001", "WX004", "WX003", "WX003", "WX004"]

REASONS = [
    "first_write",
    "activated",
    "machine_stopped",
    "activated",
    "heartbeat_lapsed",
    "activated",
    "confirmed",
]

BADGES = [
    "Browser mode",
    "Cloud active",
    "Cloud active",
    "Cooling down",
    "Browser mode",
    "Browser mode",
    "Cloud active",
    "Cloud failed",
    "Browser mode",
]

PLAY = """
import os, sys
from arbiter_db.demo.story import run

sys.exit(run(real_time=False, rows=1234, major=int(os.environ.get("PG") or 18)))
"""

# The same with every trigger of the table switched off once arbiter is installed: no guard.
PLAY_WITHOUT_GUARD = (
    """
from arbiter_db.demo import story

scene = story._browser_trades

def sabotaged(stage, cast):
    cast.owner.connection.execute("alter table public.signals disable trigger user")
    scene(stage, cast)

story._browser_trades = sabotaged
"""
    + PLAY
)


def play(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that no variable asks for colours or another width."""
    asking = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
    env = {name: value for name, value in os.environ.items() if name not in asking}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=env | {"PYTHONIOENCODING": "utf-8"},
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def demo() -> subprocess.CompletedProcess[str]:
    """The result of the whole demo, on the server version under test."""
    return play(PLAY)


def test_everything_happens_as_it_must(demo: subprocess.CompletedProcess[str]) -> None:
    assert (demo.returncode, demo.stderr) == (0, ""), demo.stdout
    assert re.findall(r"ERROR (\w+):", demo.stdout) == SQLSTATES
    assert re.findall(r"^ *badge: (\w+ \w+)", demo.stdout, re.MULTILINE) == BADGES
    rejected = len(SQLSTATES)
    assert f" admitted, {rejected} rejected." in demo.stdout
    assert re.search(r"^ +local +1234 ", demo.stdout, re.MULTILINE)  # what install found


def test_handovers_are_listed_in_order(demo: subprocess.CompletedProcess[str]) -> None:
    rows = re.findall(
        r"^ +(\d+) +(?:-|local|cloud \w{8}) +(?:local|cloud \w{8}) +(\w+) ",
        demo.stdout,
        re.MULTILINE,
    )
    assert rows == [(str(epoch), reason) for epoch, reason in enumerate(REASONS, start=1)]


def test_piped_output_can_be_pasted(demo: subprocess.CompletedProcess[str]) -> None:
    text = demo.stdout
    assert {c for c in text if unicodedata.category(c).startswith("C")} == {"\n"}
    assert [line for line in text.splitlines() if len(line) > 100 or line != line.rstrip()] == []


def test_without_the_guard_the_demo_fails() -> None:
    demo = play(PLAY_WITHOUT_GUARD)
    assert demo.returncode == 1, demo.stdout
    assert "This must not happen: browser was admitted, expected WX001" in demo.stdout
    assert "rejected." not in demo.stdout  # no summary
