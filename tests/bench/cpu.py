"""What a statement costs the server: CPU time of its backend, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random

from bench.samples import Comparison, Conn, Group, Plan, Samples, cpu_time
from bench.stage import (
    AGAIN,
    ANATOMY,
    HEARTBEAT_STEPS,
    SQL,
    STATUS_STEPS,
    STEPS,
    UNGUARDED,
    USERS,
    VARIANTS,
    Stage,
)

__all__ = ["COMPARISONS", "Statements"]

GROUP = Group("Server CPU per statement, as a multiple of unguarded")
GUARD = Group("What a guard is made of: server CPU per insert, as a multiple of unguarded")
HEARTBEAT = Group("What a heartbeat is made of: server CPU, as a multiple of a plain UPDATE")
STATUS = Group("What status is made of: server CPU, as a multiple of a row by primary key")

_bars = count(1)


@dataclass(frozen=True)
class Statements:
    """Statements of one kind, under all variants or some.

    ``statement`` is the name of one in ``bench.sql`` or ``anatomy.sql``, or one for each variant;
    ``machines`` says that it is about users with a machine, otherwise those without. A round is
    ``count`` of them.
    """

    title: str
    statement: str | dict[str, str]
    variants: tuple[str, ...] = VARIANTS
    machines: bool = False
    writes: bool = True
    count: int = 400
    group: Group = GROUP

    def of(self, variant: str) -> bytes:
        """The statement under that variant."""
        name = self.statement if isinstance(self.statement, str) else self.statement[variant]
        return (SQL | ANATOMY)[name]

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "us", self.variants)
        random = Random(self.title)
        first = 2 if self.machines else 1
        for number in range(plan.rounds + 1):
            # The same users for all variants, each signal for a bar of its own.
            users = [random.randrange(first, USERS + 1, 2) for _ in range(self.count)]
            turns = [{"user": user, "bar": next(_bars)} for user in users]
            for variant in self.variants:
                conn = stage.connection(variant)
                play = self._plays(conn, variant)
                with cpu_time(conn) as cost:
                    for turn in turns:
                        play(turn)
                if number > 0:
                    samples.rounds[variant].append(cost.spent / len(turns))
            on_round()
        return samples

    def _plays(self, conn: Conn, variant: str) -> Callable[[dict[str, int]], None]:
        """One statement, with what the variant's client sends around it."""
        write = self.of(variant)

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

        if not self.writes:
            return alone
        return {"check": after_asking, "advisory": under_lock}.get(variant, alone)


TWICE = (UNGUARDED, AGAIN)
MADE_OF = (*TWICE, "exists", *STEPS, "each_row", "arbiter")
ASKED = {
    **dict.fromkeys(TWICE, "probe"),
    **dict.fromkeys(STATUS_STEPS, "ask_status"),
    "arbiter": "status",
}

COMPARISONS: dict[str, Comparison] = {
    "local": Statements("single-row insert, local", "insert_local"),
    "cloud": Statements("single-row insert, cloud", "insert_cloud", machines=True),
    "batch": Statements("batch of 100, local", "batch_local", count=40),
    "anatomy_local": Statements("local", "insert_local", MADE_OF, group=GUARD),
    "anatomy_cloud": Statements("cloud", "insert_cloud", MADE_OF, machines=True, group=GUARD),
    "heartbeat": Statements(
        "heartbeat by UPDATE",
        "heartbeat",
        (*TWICE, *HEARTBEAT_STEPS, "arbiter"),
        machines=True,
        writes=False,
        group=HEARTBEAT,
    ),
    "status": Statements("status", ASKED, tuple(ASKED), machines=True, writes=False, group=STATUS),
}
