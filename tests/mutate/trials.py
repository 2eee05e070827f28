"""Tries mutants: each in a copy of the tree, until the first test fails.

A mutant is *invalid* when the server does not accept it at install, or it does not compile. It is
*killed* when a test fails, and fails again when it is repeated; or when the tests do not come to an
end. Otherwise it has *survived*: all tests of `make test` were run, the slow ones too, and those
against Supabase's programs.

The copies keep their test servers from one mutant to the next; templates of databases that belong
to the mutant before are dropped when a run of the tests takes its server (``kept_server.claim``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from pglast import parse_sql
from pglast.parser import ParseError
from psycopg import sql as pgsql

from arbiter_db.demo.embedded import EmbeddedServer

from .mutants import Mutant

__all__ = ["Copy", "Result", "copies", "stages"]

ROOT = Path(__file__).parents[2]

#: How long one test, one run of pytest and one install may take on a busy machine.
TEST_TIMEOUT_S = 900
RUN_TIMEOUT_S = 3600.0
INSTALL_TIMEOUT_S = 60.0
#: How often a run is repeated because its failure was not.
REPEATS = 3

#: The tests that are most likely to notice a change of a file; they come first.
NEAR = {
    "sql/00": ["tests/trust/test_owner.py", "tests/trust/test_hostile.py"],
    "sql/01": ["tests/guard/test_bad_input.py", "tests/life/test_install.py"],
    "sql/02": ["tests/trust", "tests/life/test_install.py"],
    "sql/03": ["tests/trust", "tests/access/test_foreign_code.py"],
    "sql/04": ["tests/guard/test_bad_input.py", "tests/guard/test_paths.py"],
    "sql/05": ["tests/guard/test_bad_input.py", "tests/trust", "tests/guard/test_guard_changes.py"],
    "sql/06": [
        "tests/life/test_plan.py",
        "tests/life/test_shapes.py",
        "tests/life/test_install.py",
    ],
    "sql/07": ["tests/life/test_plan.py", "tests/life/test_shapes.py"],
    "sql/10": ["tests/rules", "tests/access/test_rpc.py", "tests/guard/test_messages.py"],
    "sql/11": ["tests/access"],
    "sql/12": ["tests/rules"],
    "sql/13": ["tests/audit", "tests/concurrency"],
    "sql/14": ["tests/rules", "tests/concurrency"],
    "sql/15": ["tests/guard/test_observe.py"],
    "sql/20": ["tests/audit", "tests/trust", "tests/guard/test_guard_changes.py"],
    "sql/21": ["tests/guard"],
    "sql/22": ["tests/guard", "tests/rules/test_one_rule.py"],
    "sql/23": ["tests/registry", "tests/access/test_machine_token.py"],
    "sql/24": ["tests/access", "tests/audit", "tests/guard/test_bad_input.py"],
    "sql/25": ["tests/guard", "tests/trust"],
    "sql/26": ["tests/registry", "tests/guard/test_bad_input.py"],
    "sql/27": ["tests/registry", "tests/rules"],
    "sql/30": ["tests/rules", "tests/python/test_api.py", "tests/access/test_rpc.py"],
    "sql/31": ["tests/access"],
    "sql/32": ["tests/audit/test_audit.py"],
    "sql/33": ["tests/access"],
    "sql/34": ["tests/access/test_clients.py", "tests/life/test_install.py"],
    "sql/35": ["tests/audit", "tests/trust"],
    "sql/36": ["tests/life/test_plan.py", "tests/life/test_shapes.py"],
    "sql/40": ["tests/life/test_upgrade.py", "tests/life/test_install.py"],
    "sql/4": ["tests/life/test_install.py", "tests/access/test_privileges.py"],
    "sql/9": ["tests/life/test_install.py"],
    "arbiter_db/cli": ["tests/python"],
    "arbiter_db/adoption": ["tests/life/test_shapes.py", "tests/life/test_installer.py"],
    "arbiter_db/install": ["tests/life", "tests/trust"],
    "arbiter_db/supabase": ["tests/python", "tests/supabase/test_export.py"],
    "arbiter_db/demo/downloads": ["tests/python/test_downloads.py"],
    "arbiter_db/demo/embedded": ["tests/servers", "tests/python/test_downloads.py"],
    "arbiter_db/demo/processes": ["tests/servers"],
    "arbiter_db/demo/story": ["tests/python/test_demo.py"],
    "arbiter_db/demo/stage": ["tests/python/test_demo.py", "tests/python/test_stage.py"],
    "arbiter_db/demo/gateway": ["tests/python", "tests/supabase/test_gateway.py"],
    "arbiter_db/demo/web": ["tests/supabase/test_web.py"],
    "arbiter_db/demo/": ["tests/servers", "tests/python"],
    "arbiter_db/web/": ["tests/supabase/test_module.py"],
    "arbiter_db/": ["tests/python"],
}


def stages(mutant: Mutant, jobs: int) -> list[list[str]]:
    """pytest's arguments, run after run, until one fails. Together they run every test that could
    notice the mutant, and none of those that the next run repeats."""
    near = next((tests for start, tests in NEAR.items() if mutant.path.startswith(start)), [])
    near = [path for path in near if (ROOT / path).exists()]
    rest = [f"--ignore={path}" for path in [*near, "tests/mutate"]]
    if mutant.area.startswith("sql"):  # these run no SQL of arbiter's
        rest += [f"--ignore=tests/{path}" for path in ("bench", "servers", "proof/test_checker.py")]
    quick, slow = ["-m", "not slow"], ["-m", "slow"]
    everything = [[*quick, *rest, "tests"], [*slow, *rest, "tests"], [*rest, "tests/supabase"]]
    if mutant.area == "js":
        runs = [near, [*rest, "tests/supabase"], [*rest, *_of_web()]]
    elif mutant.area.startswith("sql") and near:
        runs = [[*quick, *near], everything[0], [*slow, *near], *everything[1:]]
    else:
        runs = [near, *everything]
    return [["-n", str(jobs), *arguments] for arguments in runs if arguments]


def _of_web() -> list[str]:
    """The files of tests, outside tests/supabase, that have to do with JavaScript."""
    files = (ROOT / "tests").rglob("test_*.py")
    script = re.compile(r"\.m?js\b")
    names = [path.relative_to(ROOT) for path in files if script.search(path.read_text("utf-8"))]
    outside = [str(name) for name in sorted(names) if name.parts[1] not in ("supabase", "mutate")]
    return outside or ["tests/python"]


@dataclass
class Result:
    """What became of a mutant. status: killed, survived, invalid."""

    status: str
    #: The tests that failed, or what else has happened.
    by: list[str] = field(default_factory=list)
    #: Tests that failed once and then not again.
    unsteady: list[str] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def copies(number: int, jobs: int) -> Iterator[list[Copy]]:
    """Copies of the tree, and a server on which installs are tried; all removed at the end."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(18))
        with psycopg.connect(server.conninfo(), autocommit=True) as conn:
            conn.execute((ROOT / "arbiter_db" / "demo" / "roles.sql").read_bytes())
        # Not in TMPDIR, which may be too long for the sockets of the servers within.
        folder = tempfile.TemporaryDirectory(prefix="mutate-", dir="/tmp")
        top = Path(stack.enter_context(folder))
        top.chmod(0o755)
        made = []
        for n in range(number):
            made.append(Copy(top / str(n), server, jobs))
            stack.callback(made[-1].close)
        yield made


class Copy:
    """A copy of the tree in which mutants are tried, one after the other."""

    def __init__(self, folder: Path, server: EmbeddedServer, jobs: int) -> None:
        self.tree = folder / "tree"
        self.jobs = jobs
        self._temporary = folder / "t"
        self._server = server
        self._running: subprocess.Popen[str] | None = None
        self._is_closed = False
        self._writes = 0
        self._mark = f"ARBITER_MUTATE={folder}"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        (self.tree / ".venv").symlink_to(Path(sys.prefix))
        self._temporary.mkdir(mode=0o755)
        self._temporary.chmod(0o1777)

    def baseline(self, mutant: Mutant) -> Result:
        """What the same runs say of the tree without a mutant: it must survive."""
        return self._test(mutant, time.monotonic())

    def try_out(self, mutant: Mutant) -> Result:
        """Run the tests against the mutant until one fails."""
        begun = time.monotonic()
        path = self.tree / mutant.path
        original = path.read_text(encoding="utf-8")
        self._write(path, mutant.apply(original))
        try:
            result = self._invalid(mutant, path) or self._test(mutant, begun)
        finally:
            self._write(path, original)
            if mutant.area == "python":
                self._sweep()
        result.seconds = round(time.monotonic() - begun, 1)
        return result

    def close(self) -> None:
        """End what runs, and the servers that the tests have kept."""
        self._is_closed = True
        self._end()
        self._python(60, str(self.tree / "tests" / "kept_server.py"), "stop")
        self._sweep()

    def _write(self, path: Path, text: str) -> None:
        """Write a file with a time of its own: Python compares it with that of its cache."""
        path.write_text(text, encoding="utf-8")
        self._writes += 1
        moment = time.time() + self._writes
        os.utime(path, (moment, moment))

    def _invalid(self, mutant: Mutant, path: Path) -> Result | None:
        """Why this is no mutant at all."""
        text = path.read_text(encoding="utf-8")
        if mutant.area == "python":
            try:
                compile(text, mutant.path, "exec")
            except (SyntaxError, ValueError) as error:
                return Result("invalid", [str(error)])
        if mutant.area == "js":
            module = self._temporary / "module.mjs"
            module.write_text(text, encoding="utf-8")
            done = subprocess.run(["node", "--check", module], capture_output=True, text=True)
            return Result("invalid", [done.stderr]) if done.returncode else None
        if mutant.area.startswith("sql"):
            try:
                parse_sql(text)
            except ParseError as error:
                return Result("invalid", [str(error)])
            return self._not_installed()
        return None

    def _not_installed(self) -> Result | None:
        name = f"install_{os.getpid()}_{threading.get_ident()}"
        database = pgsql.Identifier(name)
        with psycopg.connect(self._server.conninfo(), autocommit=True) as conn:
            drop = pgsql.SQL("drop database if exists {} with (force)").format(database)
            conn.execute(drop)
            conn.execute(pgsql.SQL("create database {}").format(database))
            try:
                install = "import sys, arbiter_db; arbiter_db.install(sys.argv[1])"
                conninfo = self._server.conninfo(dbname=name)
                code, output = self._python(INSTALL_TIMEOUT_S, "-c", install, conninfo)
            finally:
                conn.execute(drop)
        if code is None:
            return Result("killed", ["the install does not end"])
        return Result("invalid", output.strip().splitlines()[-1:]) if code else None

    def _test(self, mutant: Mutant, begun: float) -> Result:
        unsteady: list[str] = []
        for arguments in stages(mutant, self.jobs):
            for _ in range(REPEATS):
                left_out = [f"--deselect={test}" for test in unsteady]
                failed = self._pytest(mutant, [*arguments, *left_out])
                if not failed:
                    break
                again = self._pytest(
                    mutant, ["-n", "0", *failed] if _are_tests(failed) else arguments
                )
                if again:
                    return Result("killed", again, unsteady, time.monotonic() - begun)
                unsteady += failed
        return Result("survived", [], unsteady, time.monotonic() - begun)

    def _pytest(self, mutant: Mutant, arguments: Sequence[str]) -> list[str]:
        """The tests that failed, or a line that says why there was no answer."""
        if self._is_closed:
            raise InterruptedError
        cache = self.tree / ".pytest_cache" / "v" / "cache" / "lastfailed"
        cache.unlink(missing_ok=True)
        options = ["-m", "pytest", "-q", "-x", "--tb=line", f"--timeout={TEST_TIMEOUT_S}"]
        # A mutant of what starts servers may leave one behind that cannot be used again.
        environment = {"CI": "1"} if mutant.area == "python" else {}
        code, output = self._python(RUN_TIMEOUT_S, *options, *arguments, **environment)
        if code is None:
            return ["the tests do not end"]
        if code in (0, 5):
            return []
        if cache.exists():
            return sorted(json.loads(cache.read_text(encoding="utf-8")))
        return [f"pytest ended with {code}: {output.strip()[-500:]}"]

    def _python(self, timeout_s: float, *arguments: str, **extra: str) -> tuple[int | None, str]:
        """Run Python in the copy; its exit status, null when it took too long, and its output."""
        name, value = self._mark.split("=", 1)
        paths = os.pathsep.join((str(self.tree), str(self.tree / "tests")))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "TMPDIR": str(self._temporary),
            name: value,
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            self._running = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.tree,
                env=environment | extra,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                code: int | None = self._running.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self._end()
            output.seek(0)
            return code, output.read()

    def _end(self) -> None:
        """End the process that runs, and those of its group."""
        running, self._running = self._running, None
        if running is not None and running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()

    def _sweep(self) -> None:
        """End the processes that tests of this copy have left, and remove their files."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if self._mark.encode() in variables:
                    os.kill(int(folder.name), signal.SIGKILL)
        for left in self._temporary.iterdir():
            shutil.rmtree(left, ignore_errors=True)


def _are_tests(failed: Sequence[str]) -> bool:
    return all(name.startswith("tests/") for name in failed)
