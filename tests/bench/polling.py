"""What a poll of the status costs: by many clients, and with a long history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from bench.heartbeats import Script, start_pgbench, wait_for_pgbench
from bench.samples import Comparison, Group, Plan, Samples, cpu_time
from bench.stage import AGAIN, UNGUARDED, USERS, Stage, load_sql
from bench.stage import SQL as STAGE_SQL
from bench.together import connect, database, install, make_app, run_script

__all__ = ["COMPARISONS", "History", "Polling"]

SQL = load_sql("polling.sql")

THROUGHPUT = Group("status, throughput as a part of a row by primary key")
HISTORY = Group("Server CPU of status, as a multiple of that without a history")

CLIENTS = 32
#: Machines have even numbers.
BY_MACHINE = rf"\set user random(1, {USERS // 2}) * 2"


def _request(statement: str) -> tuple[bytes, ...]:
    """A statement in a request of a browser."""
    return SQL["load_begin"], SQL["load_claims"], SQL[statement], SQL["load_commit"]


@dataclass(frozen=True)
class Polling:
    """32 clients that ask about users with machines, as a role that may log in."""

    title: str
    role: str
    #: What a poll sends: a row by primary key, and arbiter's status.
    probe: tuple[bytes, ...]
    status: tuple[bytes, ...]
    group: Group = THROUGHPUT

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        sends = {UNGUARDED: self.probe, AGAIN: self.probe, "arbiter": self.status}
        samples = Samples(self.title, "transactions/s", tuple(sends))
        for number in range(plan.rounds + 1):
            for variant, rate in self._play(stage, sends, plan.seconds).items():
                if number > 0:
                    samples.rounds[variant].append(rate)
            on_round()
        return samples

    def _play(
        self, stage: Stage, sends: Mapping[str, tuple[bytes, ...]], seconds: int
    ) -> dict[str, float]:
        rates = {}
        for variant, statements in sends.items():
            script = Script(statements, CLIENTS, BY_MACHINE)
            name = stage.connection(variant).info.dbname
            conninfo = stage.server.conninfo(name, self.role)
            with ExitStack() as stack:
                process = start_pgbench(stage, conninfo, script, seconds, stack)
                said = wait_for_pgbench(process, seconds, f"{variant}, {self.title}")
            rates[variant] = said["tps"]
        return rates


@dataclass(frozen=True)
class History:
    """``status`` of users of one database, each with a history of another length."""

    title: str = "status, with so many handovers of that user"
    lengths: tuple[int, ...] = (0, 1_000, 100_000)
    count: int = 400
    group: Group = HISTORY

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        # Even numbers, so that the machine holds after each history.
        lengths = [0, *(max(2, int(n * plan.scale) // 2 * 2) for n in self.lengths[1:])]
        users = {f"{length:,}": 2 * n for n, length in enumerate(lengths, start=1)}
        samples = Samples(self.title, "us", tuple(users))
        with database(stage, "bench_polling") as conninfo, connect(conninfo) as conn:
            make_app(conn)
            run_script(conn, STAGE_SQL["people"], users=USERS)
            install(conninfo)
            conn.execute(STAGE_SQL["run"])
            conn.execute(STAGE_SQL["run"])  # the second heartbeat ends the drain
            for user, length in zip(users.values(), lengths, strict=True):
                run_script(conn, SQL["history"], user=user, handovers=length)
            conn.execute("vacuum analyze")
            for number in range(plan.rounds + 1):
                for variant, user in users.items():
                    with cpu_time(conn) as cost:
                        for _ in range(self.count):
                            conn.execute(STAGE_SQL["status"], {"user": user})
                    if number > 0:
                        samples.rounds[variant].append(cost.spent / self.count)
                on_round()
        return samples


COMPARISONS: dict[str, Comparison] = {
    "polls": Polling(
        "32 clients, a trusted role", "app_owner", (SQL["load_probe"],), (SQL["load_status"],)
    ),
    "polls_browser": Polling(
        "32 clients, browsers' requests",
        "authenticator",
        _request("load_probe"),
        _request("load_own_status"),
    ),
    "status_history": History(),
}
