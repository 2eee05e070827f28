"""Child processes in general, with shell scripts as programs: what they get, how they end, and what
is said when they do not start."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arbiter_db.demo import processes
from arbiter_db.demo.processes import Account, ChildProcess, free_port, last_lines, run

TIMEOUT_S = 20.0


class ProgramError(Exception):
    """What these programs raise."""


class Program(ChildProcess):
    """A shell script, which is ready when it has made the file `ready`."""

    def __init__(self, tmp: Path, script: str, **options: object) -> None:
        super().__init__("a script", ProgramError, prefix="t-", log="its.log", **options)  # type: ignore[arg-type]
        self.tmp = tmp
        self.script = script
        self.patience = TIMEOUT_S

    def _create(self) -> None:
        self._make_directories(self.tmp, self.tmp)

    def _run(self) -> None:
        self._launch(["/bin/sh", "-c", self.script], {"GIVEN": "by the test"})
        self._wait_until_ready(self.problem, self.patience)

    def problem(self) -> str:
        return "" if (self.directory / "ready").exists() else "is not ready"


#: It ends by itself, if a test forgets it.
SLEEPS = "touch ready; exec sleep 60"


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    """A directory like /tmp: every account may make files there, and remove its own."""
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == pwd.getpwuid(os.geteuid()).pw_name and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    tmp_path.chmod(0o1777)
    return tmp_path


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {what}"
        pause.wait(0.01)


def test_it_runs_in_directories_of_its_own_until_it_is_closed(tmp: Path) -> None:
    program = Program(tmp, SLEEPS)
    with pytest.raises(ProgramError, match=r"^a script was not started yet$"):
        _ = program.directory
    assert program.pid is None
    with program as same:
        assert same is program
        pid = program.pid
        assert pid is not None
        own = sorted(path for path in tmp.iterdir() if path.name.startswith("t-"))
        assert len(own) == 2
        assert program.directory in own
        assert {path.stat().st_mode & 0o777 for path in own} == {0o700}
        assert program.log_file == program.directory / "its.log"
        program.start()  # harmless while it runs
        assert program.pid == pid
    assert program.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp.iterdir()) == []
    program.close()
    program.kill()


def test_it_starts_again_at_the_same_place_after_a_kill(tmp: Path) -> None:
    with Program(tmp, SLEEPS) as program:
        pid, place = program.pid, program.directory
        program.kill()
        assert program.pid is None
        assert (place / "ready").exists()
        program.start()
        assert program.pid not in (None, pid)
        assert program.directory == place


def test_what_it_gets_of_the_callers_environment(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere")
    with Program(tmp, f"pwd; env | sort; {SLEEPS}") as program:
        lines = program.log_file.read_text().splitlines()
        place = str(program.directory)
        assert program.pid is not None
        assert os.getsid(program.pid) == program.pid  # an interrupt of a terminal is not for it
    environment = dict(line.split("=", 1) for line in lines[1:])
    assert lines[0] == place
    for name in ("_", "SHLVL", "PWD", "OLDPWD"):  # the shell's own
        environment.pop(name, None)
    assert environment == {
        "GIVEN": "by the test",
        "HOME": place,
        "LC_ALL": "C",
        "PATH": os.environ["PATH"],
        "TZ": "UTC",
    }


def test_one_that_ends_at_its_start_says_its_last_words_and_leaves_nothing(tmp: Path) -> None:
    program = Program(tmp, "echo first words; echo last words >&2; exit 7")
    with pytest.raises(ProgramError) as caught:
        program.start()
    assert str(caught.value) == (
        "a script ended with status 7; its log ends: \n  first words\n  last words"
    )
    assert program.pid is None
    assert list(tmp.iterdir()) == []


def test_one_that_does_not_get_ready_in_time_is_ended(tmp: Path) -> None:
    program = Program(tmp, "echo busy; echo $$ > pid; exec sleep 60")
    program.patience = 1.0
    with pytest.raises(ProgramError, match=r"^a script is not ready; its log ends: busy$"):
        program.start()
    assert program.pid is None
    assert list(tmp.iterdir()) == []


def test_a_restart_that_fails_says_only_its_own_words_and_keeps_the_files(tmp: Path) -> None:
    with Program(tmp, f"echo it was fine; {SLEEPS}") as program:
        program.kill()
        (program.directory / "ready").unlink()
        program.script = "echo no luck; exit 1"
        with pytest.raises(
            ProgramError, match=r"^a script ended with status 1; its log ends: no luck$"
        ):
            program.start()
        assert program.pid is None
        assert "it was fine" in program.log_file.read_text()
        program.script = SLEEPS
        program.start()
        assert program.pid is not None


def test_a_program_that_is_not_there(tmp: Path) -> None:
    class Missing(Program):
        def _run(self) -> None:
            self._launch([tmp / "no such program"])

    with pytest.raises(ProgramError, match=r"^a script cannot be run: .*no such program"):
        Missing(tmp, "").start()
    assert list(tmp.iterdir()) == []


def test_signals_come_one_after_another_and_the_last_cannot_be_ignored(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 1.0)

    class Stubborn(Program):
        def _end(self) -> None:
            self._stop(signal.SIGINT, signal.SIGTERM)

    heard = tmp / "heard"
    heard.touch(0o666)
    heard.chmod(0o666)
    script = f"trap 'echo int >> {heard}' INT; trap 'echo term >> {heard}' TERM; touch ready; "
    script += "n=0; while [ $n -lt 400 ]; do sleep 0.05; n=$((n + 1)); done"
    with Stubborn(tmp, script) as program:
        process = program._process
        assert process is not None
    assert heard.read_text().split() == ["int", "term"]
    assert process.returncode == -signal.SIGKILL


def test_the_watcher_removes_what_a_killed_owner_leaves(tmp: Path) -> None:
    """As when the owner is killed: its end of the pipe closes without a word."""
    program = Program(tmp, SLEEPS)
    program.start()
    assert program._watcher is not None
    assert program._watcher.stdin is not None
    assert program._process is not None
    program._watcher.stdin.close()
    assert program._process.wait(TIMEOUT_S) == -signal.SIGKILL
    until(lambda: list(tmp.iterdir()) == [], "the directories go")
    program._watcher.wait(TIMEOUT_S)
    program._watcher = None  # it cannot be told that all is done
    program.close()


def test_the_watcher_knows_which_process_there_is(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not send a signal to a process that got the number of one that has ended."""
    said: list[str] = []
    monkeypatch.setattr(Program, "_tell_watcher", lambda self, word: said.append(word))
    with Program(tmp, SLEEPS) as program:
        pid = str(program.pid)
        program.kill()
        assert said == [pid, "none"]


# Accounts -----------------------------------------------------------------------------------------


def test_who_runs_what_root_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    assert Account.current() == Account(os.geteuid(), os.getegid(), None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Account.unprivileged() == Account(nobody.pw_uid, nobody.pw_gid, "nobody")
    arguments = Account.unprivileged().popen_arguments(Path("/"))
    assert (arguments["user"], arguments["group"]) == (nobody.pw_uid, nobody.pw_gid)
    assert arguments["extra_groups"] == []
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert Account.unprivileged() == Account(1234, os.getegid(), None)
    assert "user" not in Account.unprivileged().popen_arguments(Path("/"))


def test_root_without_such_an_account_is_told(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(processes, "UNPRIVILEGED_USER", "no-such-account")
    with pytest.raises(ProgramError) as caught:
        Program(tmp, "")
    assert str(caught.value) == (
        "a script does not run as root, and there is no user 'no-such-account': "
        "start as an ordinary user"
    )


def test_whether_an_account_reaches_a_directory(tmp: Path) -> None:
    account = Account.unprivileged()
    assert account.reaches(tmp)
    assert not account.reaches(tmp / "missing")
    (tmp / "closed").mkdir(0o700)
    assert account.reaches(tmp / "closed") is (account.name is None)
    account.own(tmp / "closed")
    assert account.reaches(tmp / "closed")


# Programs that run to their end -------------------------------------------------------------------


def test_run_returns_what_is_printed() -> None:
    assert run(["/bin/sh", "-c", "echo out; echo err >&2"], ProgramError, 9) == "out\n"
    assert run(["/bin/sh", "-c", "pwd"], ProgramError, 9, cwd="/") == "/\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "sh failed: "),
        ("echo why; exit 3", "sh failed: why"),
        ("echo why >&2; exit 3", "sh failed: why"),
        ("printf '\\377'; exit 3", "sh failed: \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_run_says_what_a_failing_program_said(script: str, said: str) -> None:
    with pytest.raises(ProgramError) as caught:
        run(["/bin/sh", "-c", script], ProgramError, 9)
    assert str(caught.value) == said


def test_run_names_what_is_missing_or_too_slow(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"^tool failed: .*No such file"):
        run([tmp_path / "tool"], ProgramError, 9)
    with pytest.raises(ProgramError, match=r"^sleep failed: .*timed out after 0\.1 seconds"):
        run(["sleep", "9"], ProgramError, 0.1)


def test_the_last_lines_of_a_text() -> None:
    assert last_lines("") == ""
    assert last_lines("\n one \n\n") == "one"
    assert last_lines("one\ntwo\n") == "\n  one\n  two"
    lines = [str(n) for n in range(30)]
    assert last_lines("\n".join(lines)).split() == lines[10:]


def test_a_free_port_can_be_had() -> None:
    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        assert free_port() != port


def test_waiting_for_an_interrupt_ends_with_it() -> None:
    script = (
        "import os, signal\n"
        "from arbiter_db.demo.processes import until_interrupted\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        "try:\n"
        "    until_interrupted()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
