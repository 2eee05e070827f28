"""How many transactions a second: pgbench, with the variants taking turns."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.samples import Comparison, Group, Plan, Samples
from bench.stage import SQL, USERS, VARIANTS, Stage

__all__ = ["COMPARISONS", "BenchError", "Load"]

GROUP = Group("Single-row inserts, throughput as a part of unguarded")

#: What the client of a variant sends for one signal.
SENDS = {
    "check": ("load_ask", "load_insert"),
    "advisory": ("load_begin", "load_lock", "load_ask", "load_insert", "load_commit"),
}
ALONE = ("load_insert",)

#: Users without a machine have odd numbers.
MANY = rf"\set user random(0, {USERS // 2 - 1}) * 2 + 1"
ONE = r"\set user 1"


class BenchError(Exception):
    """pgbench is missing or failed; says what it said."""


@dataclass(frozen=True)
class Load:
    """Single-row local inserts by so many clients at once."""

    title: str
    clients: int
    users: str = MANY
    durable: bool = False
    group: Group = GROUP

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "transactions per second", VARIANTS)
        for number in range(plan.rounds + 1):
            for variant in VARIANTS:
                rate = self._run(stage, variant, plan.seconds)
                if number > 0:
                    samples.rounds[variant].append(rate)
            on_round()
        return samples

    def _run(self, stage: Stage, variant: str, seconds: int) -> float:
        lines = [self.users, *(SQL[name].decode() + ";" for name in SENDS.get(variant, ALONE))]
        info = stage.connection(variant).info
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "script.sql")
            script.write_text("\n".join(lines))
            done = subprocess.run(
                [
                    *(stage.server.bindir / "pgbench", "--no-vacuum", "--protocol=prepared"),
                    *("-h", info.host, "-p", str(info.port), "-U", info.user),
                    *("-c", str(self.clients), "-j", "2", "-T", str(seconds), "-f", script),
                    info.dbname,
                ],
                env={
                    **os.environ,
                    "PGOPTIONS": f"-c synchronous_commit={'on' if self.durable else 'off'}",
                },
                capture_output=True,
                text=True,
                timeout=seconds + 60,
            )
        found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        if done.returncode != 0 or found is None:
            raise BenchError(f"pgbench, {variant}, {self.title}: {done.stderr.strip()}")
        return float(found[1])


COMPARISONS: dict[str, Comparison] = {
    "load1": Load("1 client", 1),
    "load8": Load("8 clients", 8),
    "load32": Load("32 clients", 32),
    "hot16": Load("16 clients, one user", 16, ONE),
    "durable8": Load("8 clients, durable commit", 8, durable=True),
}
