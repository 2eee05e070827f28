"""What a statement costs the server: CPU time of its backend, side by side.

The time is the kernel's, from ``/proc/<pid>/schedstat``: what the client, the network and other
processes do is not in it, but for what they do to caches. Variants take turns, round by round, and
the first round, which warms up, does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

from bench.samples import Samples
from bench.stage import AGAIN, SQL, UNGUARDED, USERS, VARIANTS, Conn, Stage

__all__ = ["COMPARISONS", "Comparison", "measure"]

_bars = count(1)


@dataclass(frozen=True)
class Comparison:
    """Statements of one kind, under all variants or some.

    ``statement`` is the name of one in ``bench.sql``, or one for each variant; ``machines`` says
    that it is about users with a machine, otherwise those without.
    """

    title: str
    statement: str | dict[str, str]
    variants: tuple[str, ...] = VARIANTS
    machines: bool = False
    writes: bool = True
    count: int = 400

    def of(self, variant: str) -> bytes:
        """The statement under that variant."""
        name = self.statement if isinstance(self.statement, str) else self.statement[variant]
        return SQL[name]


OWN = (UNGUARDED, AGAIN, "arbiter")

COMPARISONS = {
    "local": Comparison("single-row insert, local", "insert_local"),
    "cloud": Comparison("single-row insert, cloud", "insert_cloud", machines=True),
    "batch": Comparison("batch of 100, local", "batch_local", count=40),
    "heartbeat": Comparison("heartbeat by UPDATE", "heartbeat", OWN, machines=True, writes=False),
    "status": Comparison(
        "status, against a row by primary key",
        {UNGUARDED: "probe", AGAIN: "probe", "arbiter": "status"},
        OWN,
        machines=True,
        writes=False,
    ),
}


# Playing -----------------------------------------------------------------------------------------


def measure(
    stage: Stage,
    comparison: Comparison,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> Samples:
    """Let the variants take turns; each plays ``comparison.count`` statements a round."""
    samples = Samples(comparison.title, "us of server CPU", comparison.variants)
    random = Random(comparison.title)
    first = 2 if comparison.machines else 1
    for number in range(rounds + 1):
        # The same users for all variants, each signal for a bar of its own.
        users = [random.randrange(first, USERS + 1, 2) for _ in range(comparison.count)]
        turns = [{"user": user, "bar": next(_bars)} for user in users]
        for variant in comparison.variants:
            conn = stage.connections[variant]
            play = _plays(conn, variant, comparison)
            before = _cpu_time(conn)
            for turn in turns:
                play(turn)
            spent = (_cpu_time(conn) - before) / len(turns)
            if number > 0:
                samples.rounds[variant].append(spent)
        on_round()
    return samples


def _plays(conn: Conn, variant: str, comparison: Comparison) -> Callable[[dict[str, int]], None]:
    """One statement, with what the variant's client sends around it."""
    write = comparison.of(variant)

    def alone(turn: dict[str, int]) -> None:
        conn.execute(write, turn)

    def after_asking(turn: dict[str, int]) -> None:
        conn.execute(SQL["ask"], turn).fetchone()
        conn.execute(write, turn)

    def under_lock(turn: dict[str, int]) -> None:
        with conn.transaction():
            conn.execute(SQL["lock"], turn)
            conn.execute(SQL["ask"], turn).fetchone()
            conn.execute(write, turn)

    if not comparison.writes:
        return alone
    return {"check": after_asking, "advisory": under_lock}.get(variant, alone)


def _cpu_time(conn: Conn) -> float:
    """What the connection's backend has spent on a CPU, in microseconds."""
    text = Path(f"/proc/{conn.info.backend_pid}/schedstat").read_text()
    return int(text.split()[0]) / 1_000
