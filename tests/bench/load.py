"""Transactions a second by pgbench; the variants take turns."""

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

LOCAL, CLOUD = "local", "cloud"
GROUPS = {
    source: Group(f"Single-row inserts, {source}: throughput as a part of unguarded")
    for source in (LOCAL, CLOUD)
}

#: The statements that a variant's client sends before each signal.
BEFORE = {"check": ("load_ask",), "advisory": ("load_begin", "load_lock", "load_ask")}
AFTER = {"advisory": ("load_commit",)}

#: Users with a machine have even numbers.
MANY = {
    LOCAL: rf"\set user random(0, {USERS // 2 - 1}) * 2 + 1",
    CLOUD: rf"\set user random(1, {USERS // 2}) * 2",
}
ONE = {LOCAL: r"\set user 1", CLOUD: r"\set user 2"}


class BenchError(Exception):
    """pgbench is missing or failed; the message has its output."""


@dataclass(frozen=True)
class Load:
    """Single-row inserts by so many clients at once."""

    clients: int
    source: str = LOCAL
    is_hot: bool = False
    is_durable: bool = False

    @property
    def group(self) -> Group:
        return GROUPS[self.source]

    @property
    def title(self) -> str:
        clients = f"{self.clients} client{'s' if self.clients > 1 else ''}"
        users = ", one user" if self.is_hot else ""
        return f"{clients}{users}{', durable commit' if self.is_durable else ''}"

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "transactions/s", VARIANTS)
        for number in range(plan.rounds + 1):
            for variant in VARIANTS:
                rate = self._run(stage, variant, plan.seconds)
                if number > 0:
                    samples.rounds[variant].append(rate)
            on_round()
        return samples

    def _run(self, stage: Stage, variant: str, seconds: int) -> float:
        sends = (*BEFORE.get(variant, ()), f"load_{self.source}", *AFTER.get(variant, ()))
        users = (ONE if self.is_hot else MANY)[self.source]
        lines = [users, *(SQL[name].decode() + ";" for name in sends)]
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
                    "PGOPTIONS": f"-c synchronous_commit={'on' if self.is_durable else 'off'}",
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
    "local1": Load(1),
    "local8": Load(8),
    "local32": Load(32),
    "local_hot16": Load(16, is_hot=True),
    "local_durable1": Load(1, is_durable=True),
    "local_durable8": Load(8, is_durable=True),
    "local_durable32": Load(32, is_durable=True),
    "cloud1": Load(1, CLOUD),
    "cloud8": Load(8, CLOUD),
    "cloud32": Load(32, CLOUD),
    "cloud_hot16": Load(16, CLOUD, is_hot=True),
    "cloud_durable8": Load(8, CLOUD, is_durable=True),
}
