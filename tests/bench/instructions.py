"""How many instructions a statement takes: almost the same each time, also on a busy machine.

valgrind counts what a server without clients executes, a single process that reads statements from
its standard input. Instructions of the kernel are not counted. The figure is the difference between
a run with a few statements and a run with many more. So what precedes them is not in it: the start,
the plans that a session makes with its first statements, and the writes that are rejected before.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from arbiter_db.demo.embedded import EmbeddedServer
from bench.load import BenchError
from bench.samples import Comparison, Group, Plan, Samples
from bench.stage import SQL as STAGE_SQL
from bench.stage import UNGUARDED, USERS, Stage, load_sql

__all__ = ["COMPARISONS", "Instructions"]

SQL = STAGE_SQL | load_sql("instructions.sql")

WRITES = Group("Instructions per statement, outside the kernel, as a multiple of unguarded")
READS = Group("Instructions of status, outside the kernel, as a multiple of a row by primary key")
GUARD = Group("What a guard is made of: instructions per insert, as a multiple of unguarded")
SIZES = Group("Instructions by the rows of a local insert, as a multiple of unguarded")

#: A few are enough: rounds differ only in where pages split.
ROUNDS = 3
#: Statements in both of two runs. A session may settle on a plan after five of them.
FIRST = 10
#: Rows that only the longer run has, in so many statements at most and at least.
ROWS = 2_400
MOST, LEAST = 150, 24
#: For all of them; valgrind makes each fifty times slower.
TIMEOUT_S = 300.0

#: A commit that waits for the disk executes nothing, so it need not wait. An error in the log
#: begins with its SQLSTATE.
OPTIONS = ("-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "log_line_prefix=%e ")

INSERTS = (UNGUARDED, "exists", "policy", "arbiter")
MADE_OF = (UNGUARDED, "exists", "trigger", "owner", "lease", "decided", "each_row", "arbiter")
#: With which SQLSTATE they reject; the other variants let everything pass.
REJECTIONS = {"exists": "WX001", "policy": "42501", "decided": "WX001", "arbiter": "WX001"}

_bars = count(1)


@dataclass(frozen=True)
class Instructions:
    """Statements of one kind, prepared, by users with a machine or by those without."""

    title: str
    #: The name of one, or one for each variant.
    statement: str | Mapping[str, str]
    variants: tuple[str, ...] = INSERTS
    machines: bool = False
    rows: int = 1
    #: Local inserts of users with a machine that come first and are not counted.
    rejected_before: int = 0
    #: Whether all but unguarded reject the statements themselves.
    is_rejected: bool = False
    group: Group = WRITES

    def measure(self, stage: Stage, plan: Plan, on_round: Callable[[], None]) -> Samples:
        samples = Samples(self.title, "instructions", self.variants)
        counted = max(LEAST, min(MOST, ROWS // self.rows))
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer(stage.server.major, in_memory=False))
            own = Stage(server, stack)
            names = {variant: own.connection(variant).info.dbname for variant in self.variants}
            server.stop()
            for _ in range(min(plan.rounds, ROUNDS)):
                for variant, name in names.items():
                    short = self._executed(server, name, variant, FIRST)
                    long = self._executed(server, name, variant, FIRST + counted)
                    samples.rounds[variant].append((long - short) / counted)
                on_round()
        samples.facts["instructions"] = {v: round(samples.median(v)) for v in self.variants}
        return samples

    def _executed(self, server: EmbeddedServer, dbname: str, variant: str, number: int) -> int:
        errors = []
        if variant in REJECTIONS:
            rejected = self.rejected_before + (number if self.is_rejected else 0)
            errors = [REJECTIONS[variant]] * rejected
        return _executed(server, dbname, self._statements(variant, number), errors)

    def _statements(self, variant: str, number: int) -> Iterator[str]:
        """The statements, one a line."""
        name = self.statement if isinstance(self.statement, str) else self.statement[variant]
        yield "set session authorization app_owner"
        yield f"prepare before (int, int) as {self._text('insert_local')}"
        yield f"prepare counted (int, int) as {self._text(name)}"
        for turn in range(self.rejected_before):
            yield f"execute before ({_user(True, turn)}, {next(_bars)})"
        for turn in range(number):
            yield f"execute counted ({_user(self.machines, turn)}, {next(_bars)})"

    def _text(self, name: str) -> str:
        values = {"user": "$1", "bar": "$2", "rows": self.rows}
        lines = (SQL[name].decode() % values).splitlines()
        return " ".join(line.strip() for line in lines if not line.startswith("--"))


def _user(has_machine: bool, turn: int) -> int:
    """Users in turn; those with a machine have even numbers."""
    return (2 if has_machine else 1) + 2 * turn % USERS


def _executed(
    server: EmbeddedServer, dbname: str, statements: Iterator[str], errors: list[str]
) -> int:
    """How many instructions a process executes that starts, plays these statements, and ends.

    It must report exactly these errors.
    """
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
    reported = re.findall(r"^(\w*) *(?:ERROR|FATAL|PANIC): ", done.stderr, re.MULTILINE)
    if done.returncode != 0 or found is None or reported != errors:
        raise BenchError(
            f"valgrind, {dbname}: {len(reported)} errors instead of {len(errors)}, "
            f"exit code {done.returncode}: {done.stderr.strip()[-2_000:]}"
        )
    return int(found[1].replace(",", ""))


#: What status is compared with, and status.
ACTIVE, BROWSER = ({UNGUARDED: probe, "arbiter": "status"} for probe in ("probe", "probe_trader"))

COMPARISONS: dict[str, Comparison] = {
    "instructions_local": Instructions("insert, local", "insert_local"),
    "instructions_cloud": Instructions("insert, cloud", "insert_cloud", machines=True),
    "instructions_cloud_after": Instructions(
        "insert, cloud, after 100 rejections", "insert_cloud", machines=True, rejected_before=100
    ),
    "instructions_batch_local": Instructions("batch of 100, local", "batch_local", rows=100),
    "instructions_batch_cloud": Instructions(
        "batch of 100, cloud", "batch_cloud", machines=True, rows=100
    ),
    "instructions_rejection": Instructions(
        "rejected insert, local",
        "insert_local",
        machines=True,
        is_rejected=True,
    ),
    "instructions_heartbeat": Instructions(
        "heartbeat by UPDATE", "heartbeat", (UNGUARDED, "arbiter"), machines=True
    ),
    "instructions_status": Instructions(
        "a machine is active", ACTIVE, tuple(ACTIVE), machines=True, group=READS
    ),
    "instructions_status_browser": Instructions(
        "the browser may write", BROWSER, tuple(BROWSER), group=READS
    ),
    "instructions_steps_local": Instructions("local", "insert_local", MADE_OF, group=GUARD),
    "instructions_steps_cloud": Instructions(
        "cloud", "insert_cloud", MADE_OF, machines=True, group=GUARD
    ),
    "instructions_steps_batch": Instructions(
        "batch of 100, local", "batch_local", MADE_OF, rows=100, group=GUARD
    ),
}
for _rows in (1, 3, 10, 30, 100):
    COMPARISONS[f"instructions_rows_{_rows}"] = Instructions(
        str(_rows), "batch_local", rows=_rows, group=SIZES
    )
