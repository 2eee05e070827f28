"""Somebody who types a page's blocks, one after the other, and compares what the page shows.

Output in a page is real. What differs from run to run (times, random ids, ports, folders) is
compared as a pattern. With RENEW_DOCS=1 in the environment output that differs is written into the
page instead.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from threading import Timer

from .pages import REPOSITORY, Block, commands

__all__ = ["Page", "Reader", "same"]

#: How long a command may take; the quickstart installs the package.
TIMEOUT_S = 180.0

RENEW = bool(os.environ.get("RENEW_DOCS"))

#: The users and machines of the examples; any other uuid is a random one.
KNOWN = r"(?!ada00000|b0b00000|b0000000|c10d0000)"

#: What differs from run to run, and what stands for it in a comparison.
VARIES = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)?", "<time>"),
    (r"\b\d{4}-\d\d-\d\d \d\d:00\b", "<hour>"),
    (r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "<time>"),
    (rf"\b{KNOWN}[0-9a-f]{{8}}-[0-9a-f]{{4}}-4[0-9a-f]{{3}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}", "<id>"),
    (r"\b20\d{12}_", "<stamp>_"),
    (r"\b127\.0\.0\.1:\d+", "127.0.0.1:<port>"),
    (r"\b\d+\.\d+ s\b", "<seconds>"),
    (r"(postgrest/)[\d.]+", r"\1<version>"),
    (r"(Retry-After: )\d+", r"\1<seconds>"),
    # The width of a column depends on what is in it.
    (r"-{3,}", "---"),
    (r" {2,}", "  "),
    (r"\r", ""),
    (r"[ \t]+$", ""),
]


def _pattern(text: str) -> list[str]:
    for varies, stands in VARIES:
        text = re.sub(varies, stands, text, flags=re.MULTILINE)
    # A column's heading may be wider than a page shows it, on either side.
    return [line.strip() for line in text.strip().splitlines()]


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for what varies."""
    return _pattern(shown) == _pattern(printed)


@dataclass(frozen=True)
class Page:
    """What a page needs besides its blocks."""

    #: SQL, as the owner of the tables, before the first block.
    prepare: str = ""
    #: Python before a python block, which then may be in need of names.
    python: str = ""
    #: What a python block without output in the page prints.
    prints: str = ""
    #: Text in the page that stands for something else.
    stands_for: Mapping[str, str] = field(default_factory=dict)
    #: Folders of the visitor's project, made where the visitor is.
    folders: tuple[str, ...] = ()
    #: Commands that go on until they are interrupted: they are left running until the last block.
    goes_on: tuple[str, ...] = ()


class Reader:
    """Types blocks in a folder, with these variables in the environment.

    ``psql`` runs SQL: it takes the words of the block, and returns a command and more variables.
    """

    def __init__(
        self,
        page: Page,
        folder: Path,
        env: Mapping[str, str],
        psql: Callable[[tuple[str, ...]], tuple[list[str], Mapping[str, str]]],
    ) -> None:
        self._page = page
        self._folder = folder
        self._state = folder / ".state"
        self.env = dict(env)
        self._psql = psql
        self._stands_for = dict(page.stands_for)
        self._changes: list[tuple[Path, int, int, list[str]]] = []
        self._running = ExitStack()
        self.cwd = folder

    def read(self, blocks: list[Block]) -> None:
        """Type all blocks of a page."""
        with self._running:
            self.type(blocks)
        self.renew()

    def type(self, blocks: list[Block]) -> None:
        """Type some of them."""
        assert not blocks or "typed" not in blocks[0].words, f"{blocks[0].name}: typed into what?"
        for block, following in zip_longest(blocks, blocks[1:]):
            typed = following if following and "typed" in following.words else None
            assert typed is None or block.language == "console", f"{typed.name}: typed into what?"
            match block.language:
                case "console":
                    self._console(block, typed)
                case "sql" if "typed" not in block.words:
                    self._sql(block)
                case "python":
                    self._python(block)

    # What a block is -----------------------------------------------------------------------------

    def _console(self, block: Block, typed: Block | None) -> None:
        found = commands(block.text)
        shown = block.text.splitlines()
        for name in self._page.folders:
            (self.cwd / name).mkdir(parents=True, exist_ok=True)
        for number, command in enumerate(found):
            last = number == len(found) - 1
            text = self._meant(command.text)
            if any(text.startswith(start) for start in self._page.goes_on):
                self._leave_running(text)
                continue
            printed = self._shell(text, typed.text if typed and last else "", block)
            shows = typed.output.text if typed and typed.output and last else block.text
            if "ERROR: " not in shows:  # psql's exit code does not tell
                assert "ERROR: " not in printed, f"{block.name}: {text}\n{printed}"
            if typed and last:
                if typed.output:
                    # Before the first answer the program may have greeted.
                    lines = len(typed.output.text.splitlines())
                    self._compare(typed.output, typed.output.text, printed, tail=lines)
            elif command.ends > command.begins:
                expected = "\n".join(shown[command.begins : command.ends])
                at = (block.begins + command.begins, block.begins + command.ends)
                self._compare(block, expected, printed, at=at)

    def _sql(self, block: Block) -> None:
        command, more = self._psql(block.words)
        done = self._run([*command, "-v", "ON_ERROR_STOP=1"], block.text, more)
        fails = block.output is not None and re.search(r"^ERROR: ", block.output.text, re.M)
        assert done.returncode == (3 if fails else 0), f"{block.name}\n{done.stdout}"
        if block.output:
            self._compare(block.output, block.output.text, done.stdout)

    def _python(self, block: Block) -> None:
        code = self._page.python + block.text
        done = self._run([sys.executable, "-W", "error", "-c", code], "", {})
        assert done.returncode == 0, f"{block.name}\n{done.stdout}"
        if block.output:
            self._compare(block.output, block.output.text, done.stdout)
        else:
            assert done.stdout == self._page.prints, block.name

    # How it is run -------------------------------------------------------------------------------

    def _shell(self, command: str, stdin: str, block: Block) -> str:
        """Run a command in the folder and with the variables that the last one has left."""
        quoted = shlex.quote(str(self._state))
        script = (
            f"{{ {command}\n}} 2>&1; done=$?; export -p >{quoted}; pwd >{quoted}.cwd; exit $done"
        )
        if self._state.exists():
            script = f". {quoted}; {script}"
        script = f"set -a; {script}"  # a variable that one command sets is there in the next
        done = self._run(["bash", "-c", script], stdin, {})
        if (left := Path(f"{self._state}.cwd")).exists():
            self.cwd = Path(left.read_text().strip())
        allowed = (0, 3) if stdin else (0,)
        assert done.returncode in allowed, f"{block.name}: {command}\n{done.stdout}"
        return done.stdout

    def _run(
        self, command: list[str], stdin: str, more: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            input=stdin,
            cwd=self.cwd,
            env=self.env | dict(more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )

    def _leave_running(self, command: str) -> None:
        """Start it, wait for the second line that it prints, and learn what is in that line."""
        process = subprocess.Popen(
            shlex.split(command), cwd=self.cwd, env=self.env, stdout=subprocess.PIPE, text=True
        )
        self._running.enter_context(process)
        self._running.callback(process.send_signal, signal.SIGINT)
        late = Timer(TIMEOUT_S, process.kill)
        late.start()
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        late.cancel()
        found = re.search(r"host=(\S+)", lines[1])
        assert found, lines
        self._stands_for["/tmp/arbiter-pg-..."] = found[1]

    def _meant(self, text: str) -> str:
        for shown, meant in self._stands_for.items():
            text = text.replace(shown, meant)
        return text

    # What a page shows ---------------------------------------------------------------------------

    def _compare(
        self,
        block: Block,
        shown: str,
        printed: str,
        *,
        at: tuple[int, int] | None = None,
        tail: int = 0,
    ) -> None:
        if tail:
            printed = "\n".join(printed.splitlines()[-tail:])
        if same(shown, printed):
            return
        if RENEW:
            lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
            begins, ends = at or (block.begins, block.ends)
            self._changes.append((REPOSITORY / block.page, begins, ends, lines))
            return
        assert _pattern(printed) == _pattern(shown), (
            f"{block.name} shows otherwise; RENEW_DOCS=1 writes what is printed into the page"
        )

    def renew(self) -> None:
        """Write into the page what RENEW_DOCS asks for."""
        for path in {path for path, *_ in self._changes}:
            lines = path.read_text(encoding="utf-8").splitlines()
            for at, begins, ends, new in sorted(self._changes, reverse=True):
                if at == path:
                    lines[begins:ends] = new
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._changes.clear()
