"""How many instructions a statement takes: almost the same each time, also on a busy machine.

valgrind counts what a server without clients executes, a single process that reads statements from
its standard input. Instructions of the kernel are not counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from arbiter_db.demo.embedded import EmbeddedServer
from bench.load import BenchError
from bench.samples import Comparison, Group, Plan, Samples
from bench.stage import SQL, STEPS, UNGUARDED, USERS, Stage

__all__ = ["COMPARISONS", "Instructions"]

GROUP = Group("Instructions per insert, outside the kernel, as a multiple of unguarded")

#: A few are enough: rounds differ only in where pages split.
ROUNDS = 3
#: Statements in the shorter of two runs. The longer has twice as many; both start a server.
STATEMENTS = 150
#: For all of them; valgrind makes each fifty times slower.
TIMEOUT_S = 120.0

#: A commit that waits for the disk executes nothing, so it need not wait.
OPTIONS = ("-c", "fsync=off", "-c", "synchronous_commit=off")

_bars = count(1)


@dataclass(frozen=True)
class Instructions:
    """A single-row insert, prepared, by users with a machine or by those without."""

    title: str
    statement: str
    machines: bool = False
    variants: tuple[str, ...] = (UNGUARDED, "exists", *STEPS, "arbiter")
    group: Group = GROUP

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "instructions", self.variants)
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(stage.server.major, in_memory=False))
            own = Stage(server, stack)
            names = {variant: own.connection(variant).info.dbname for variant in self.variants}
            server.stop()
            for _ in range(min(plan.rounds, ROUNDS)):
                for variant, name in names.items():
                    once = _executed(server, name, self._statements(STATEMENTS))
                    twice = _executed(server, name, self._statements(2 * STATEMENTS))
                    samples.rounds[variant].append((twice - once) / STATEMENTS)
                on_round()
        return samples

    def _statements(self, number: int) -> Iterator[str]:
        """The statements, one a line."""
        insert = SQL[self.statement].decode() % {"user": "$1", "bar": "$2"}
        yield "set session authorization app_owner"
        yield f"prepare signal (int, int) as {' '.join(insert.split())}"
        first = 2 if self.machines else 1
        for turn in range(number):
            yield f"execute signal ({first + 2 * turn % USERS}, {next(_bars)})"


def _executed(server: EmbeddedServer, dbname: str, statements: Iterator[str]) -> int:
    """How many instructions a process executes that starts, plays these statements, and ends."""
    program = shutil.which("valgrind")
    if program is None:
        raise BenchError("valgrind is needed: install the Debian package valgrind")
    done = subprocess.run(
        [
            *(program, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"),
            *(server.bindir / "postgres", "--single", "-D", server.data_directory, *OPTIONS),
            dbname,
        ],
        input="\n".join(statements) + "\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        **server._account.popen_arguments(Path(server.host)),
    )
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    if done.returncode != 0 or found is None or re.search(r"(ERROR|FATAL|PANIC): ", done.stderr):
        raise BenchError(f"valgrind, {dbname}: {done.stderr.strip()[-2_000:]}")
    return int(found[1].replace(",", ""))


COMPARISONS: dict[str, Comparison] = {
    "instructions_local": Instructions("local", "insert_local"),
    "instructions_cloud": Instructions("cloud", "insert_cloud", machines=True),
}
