"""Child processes that end with their owner and leave nothing behind.

A ChildProcess is a program that runs in directories of its own. Three things end it and remove
them: ``close()`` or the end of the ``with`` block; the interpreter's exit; and, when the owner is
killed, a small watching shell that sees its pipe close. A forked copy of the owner ends nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from arbiter_db.text import printable

__all__ = ["Account", "ChildProcess", "free_port", "last_lines", "run", "until_interrupted"]

#: The account that runs programs which root starts.
UNPRIVILEGED_USER = "nobody"

STOP_TIMEOUT_S = 30.0
LOG_LINES_SHOWN = 20

# Its arguments are a signal and directories; it reads the child's process id, "none" when the child
# has ended, and "done". When the pipe closes without that word, the owner is gone.
_WATCHER = """
signal=$1
shift
pid=
while read -r word; do
  case $word in
    done) exit 0 ;;
    none) pid= ;;
    *) pid=$word ;;
  esac
done
if [ -n "$pid" ]; then
  kill -s "$signal" "$pid"
  n=0
  while kill -0 "$pid" && [ "$n" -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
fi
rm -rf "$@"
"""


@dataclass(frozen=True)
class Account:
    """The user that runs a program: ``name`` is None for the user that we are."""

    uid: int
    gid: int
    name: str | None = None

    @classmethod
    def current(cls) -> Account:
        """The user that we are."""
        return cls(os.geteuid(), os.getegid())

    @classmethod
    def unprivileged(cls) -> Account:
        """The user that we are, or UNPRIVILEGED_USER for root; KeyError when there is no such."""
        if os.geteuid() != 0:
            return cls.current()
        entry = pwd.getpwnam(UNPRIVILEGED_USER)
        return cls(entry.pw_uid, entry.pw_gid, UNPRIVILEGED_USER)

    def popen_arguments(self, cwd: Path) -> dict[str, Any]:
        """Start as this account, without the caller's environment (libpq reads PG* variables), and
        in a session of its own, so that Ctrl-C in a terminal reaches us and not the program."""
        who = {} if self.name is None else {"user": self.uid, "group": self.gid, "extra_groups": []}
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C",
            "HOME": str(cwd),
            "TZ": "UTC",
        }
        return {**who, "env": environment, "cwd": cwd, "start_new_session": True}

    def reaches(self, directory: Path) -> bool:
        """Whether this account may enter the directory."""
        command = ["/bin/sh", "-c", '[ -x "$1" ]', "sh", str(directory)]
        return subprocess.run(command, **self.popen_arguments(Path("/"))).returncode == 0

    def own(self, *paths: Path) -> None:
        """Give files and directories to this account."""
        if self.name is not None:
            for path in paths:
                os.chown(path, self.uid, self.gid, follow_symlinks=False)


class ChildProcess(ABC):
    """One program in directories of its own, thrown away at the end.

    A subclass gives ``program``, its name in messages; ``error``, the exception that it raises;
    ``prefix`` and ``log``, the names of its directories and of its log file; ``kill_signal``, which
    ends it at once; and ``account``, Account.unprivileged() if left out. It says how to prepare the
    directories (``_create``) and how to run the program in them (``_run``).

    One thread at a time may start and stop it.
    """

    def __init__(
        self,
        program: str,
        error: type[Exception],
        *,
        prefix: str,
        log: str,
        kill_signal: signal.Signals = signal.SIGKILL,
        account: Account | None = None,
    ) -> None:
        self._program = program
        self._error = error
        self._prefix = prefix
        self._log = log
        self._log_start = 0
        self._kill_signal = kill_signal
        try:
            self._account = account or Account.unprivileged()
        except KeyError:
            raise error(
                f"{program} does not run as root, and there is no user {UNPRIVILEGED_USER!r}: "
                "start as an ordinary user"
            ) from None
        self._directories: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._open = False
        self._owner_pid = os.getpid()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """Its own directory, with mode 0700."""
        if not self._directories:
            raise self._error(f"{self._program} was not started yet")
        return self._directories[0]

    @property
    def log_file(self) -> Path:
        """The program's log."""
        return self.directory / self._log

    @property
    def pid(self) -> int | None:
        """The process id, None when it is not running."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready; after ``kill()`` it starts again at the same place.

        Raises the class's error, with the last lines of its log, when it does not get ready.
        """
        if self.pid is not None:
            return
        first = not self._open
        try:
            if first:
                self._create()
            self._run()
        except BaseException:
            if first:
                self.close()
            else:
                self.kill()
            raise

    def kill(self) -> None:
        """End it at once, as a crash would; its files stay, for ``start()``."""
        self._stop(self._kill_signal)

    def close(self) -> None:
        """End it and remove everything it has on disk. Harmless when repeated."""
        if not self._open or os.getpid() != self._owner_pid:  # a forked child does not own it
            return
        self._open = False
        atexit.unregister(self.close)
        try:
            self._end()
        finally:
            for directory in self._directories:
                shutil.rmtree(directory, ignore_errors=True)
            if self._watcher is not None:
                self._watcher.communicate(b"done\n", STOP_TIMEOUT_S)
                self._watcher = None

    # --------------------------------------------------------------------- for the subclasses

    @abstractmethod
    def _create(self) -> None:
        """Make the directories, with what the program needs in them."""

    @abstractmethod
    def _run(self) -> None:
        """Launch the program and wait until it is ready."""

    def _end(self) -> None:
        """End the program when it is closed."""
        self.kill()

    def _make_directories(self, *parents: Path) -> None:
        """Make a directory in each of these, and start the shell that removes them."""
        self._open = True
        atexit.register(self.close)
        self._directories = []
        for parent in parents:
            made = Path(tempfile.mkdtemp(prefix=self._prefix, dir=parent))  # mode 0700
            self._directories.append(made)
        self._account.own(*self._directories)
        command = ["/bin/sh", "-c", _WATCHER, f"{self._prefix}watcher"]
        command += [self._kill_signal.name.removeprefix("SIG"), *map(str, self._directories)]
        self._watcher = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._account.popen_arguments(Path("/")),
        )

    def _launch(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the program with its log file, as its account."""
        arguments = self._account.popen_arguments(self.directory)
        arguments["env"].update(environment or {})
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **arguments
                )
            except OSError as error:
                raise self._error(f"{self._program} cannot be run: {error}") from error
        self._tell_watcher(str(self._process.pid))

    def _wait_until_ready(self, problem: Callable[[], str], timeout_s: float) -> None:
        """Wait until ``problem`` returns nothing; raise an error when the program ends before that,
        or with the last problem when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while said := problem():
            if ended := self._how_it_ended():
                said = ended
            elif time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            with self.log_file.open("rb") as log:
                log.seek(self._log_start)
                lines = last_lines(log.read().decode(errors="replace"))
            raise self._error(f"{self._program} {said}; its log ends: {lines}")

    def _how_it_ended(self) -> str:
        status = None if self._process is None else self._process.poll()
        return "" if status is None else f"ended with status {status}"

    def _stop(self, *signals: signal.Signals) -> None:
        """Send the signals one after another until it ends, SIGKILL after them."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (*signals, signal.SIGKILL):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_TIMEOUT_S)
                break
        self._tell_watcher("none")

    def _tell_watcher(self, word: str) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            with contextlib.suppress(OSError):  # the watcher was killed
                self._watcher.stdin.write(f"{word}\n".encode())


def run(
    command: Sequence[str | Path], error: type[Exception], timeout_s: float, **options: Any
) -> str:
    """Run a program to its end and return its output; raise ``error``, with its last lines, when
    it cannot be run, fails or takes too long. ``options`` go to ``subprocess.run``."""
    name = Path(command[0]).name
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            **options,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise error(f"{name} failed: {problem}") from problem
    if done.returncode != 0:
        raise error(f"{name} failed: {last_lines(done.stdout + done.stderr)}")
    return done.stdout


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def last_lines(text: str) -> str:
    """The end of a program's output, for an error message."""
    lines = [printable(line) for line in text.strip().splitlines()[-LOG_LINES_SHOWN:]]
    return "\n  ".join(["", *lines]) if len(lines) > 1 else "".join(lines)


def until_interrupted() -> NoReturn:
    """Do nothing until KeyboardInterrupt, which Ctrl-C raises."""
    # A wait without limit misses an interrupt that comes just before it, or to another thread.
    while True:
        threading.Event().wait(1.0)
