"""The demo, played for real in a process of its own, with its output piped.

What it prints is in `demo.txt`, without what differs each time. After a change of the demo::

    .venv/bin/python tests/python/test_demo.py > tests/python/demo.txt
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

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


def constant(text: str) -> str:
    """What a run prints, without what differs each time, and without arbiter's own messages."""
    for pattern, instead in (
        (r"(ERROR WX\d+): .*?\n +DETAIL: \{.*?\}\n +HINT: .*?(?=\n\n|\n  badge)", r"\1"),
        (r"\b20(?!26-01-05)\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\+00:00", "now"),
        (r"(?<=  )\d{5}$", "16459"),  # a filenode
        (r"\d+\.\d\d? s( |\.|$)", r"0 s\1"),  # how long something has taken
        (r"answer \d+", "answer 7"),
    ):
        text = re.sub(pattern, instead, text, flags=re.DOTALL | re.MULTILINE)
    # The server's version decides where the lines of its paragraph break.
    head, version, rest = re.split(
        r"(?<=A PostgreSQL) (.*?)(?= of\s+its own)", text, flags=re.DOTALL
    )
    assert re.match(r"\(?(Debian )?\d+\.\d", version)
    paragraph, end, rest = rest.partition("to show.")
    return head + " " + " ".join(paragraph.split()) + " " + end + rest


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


def test_every_word_is_as_written_down(demo: subprocess.CompletedProcess[str]) -> None:
    expected = Path(__file__).with_name("demo.txt").read_text(encoding="utf-8")
    assert constant(demo.stdout) == expected
    assert demo.stdout.count("HINT: ") == demo.stdout.count("DETAIL: {") == len(SQLSTATES)


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


# psql on the demo's server ------------------------------------------------------------------------


class Terminal:
    """A program on a terminal of its own, which a person types into."""

    def __init__(self, master: int) -> None:
        self._master = master

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until the program has written that, after what was waited for before."""
        end = monotonic() + TIMEOUT_S
        read = ""
        while text not in read:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - monotonic()))
            assert ready, f"no {text!r} in {read!r}"
            read += os.read(self._master, 65536).decode()


@contextmanager
def psql() -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """`arbiter-db demo --psql` on a terminal."""
    master, slave = pty.openpty()
    code = "from arbiter_db.cli import main; main(['demo', '--psql'])"
    env = os.environ | {"PAGER": "cat", "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=slave, stdout=slave, stderr=slave, env=env,
        # Ctrl-C on this terminal reaches all programs that run on it.
        preexec_fn=lambda: os.login_tty(0), start_new_session=False,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(master), process
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_ctrl_c_in_psql_cancels_a_statement_and_not_the_server() -> None:
    with psql() as (terminal, process):
        terminal.wait_for("trading=> ")
        terminal.type("do $$ begin raise notice 'asleep'; perform pg_sleep(300); end $$;\r")
        terminal.wait_for("NOTICE:  asleep")
        terminal.type("\x03")
        terminal.wait_for("canceling statement due to user request")
        terminal.type("select count(*) as leases from arbiter.leases;\r")
        terminal.wait_for("(1 row)")
        terminal.type("\\q\r")
        assert process.wait(TIMEOUT_S) == 0


def test_one_demo_at_a_time() -> None:
    done = play("from arbiter_db.cli import main; main(['demo', '--psql', '--web'])")
    assert done.returncode == 2
    assert "--psql and --web are two demos: give one of them" in done.stderr


if __name__ == "__main__":
    sys.stdout.write(constant(play(PLAY).stdout))
