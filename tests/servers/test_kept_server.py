"""Servers kept between runs: each run finds one as after its start, and none runs for ever."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kept_server
import psycopg
import pytest
from kept_server import IDLE_S, KeptServer, folder
from sessions import TIMEOUT_S

from arbiter_db.demo.embedded import EmbeddedServerError

pytestmark = pytest.mark.slow

MAJOR = int(os.environ.get("PG") or "18")
SETUP = "create role kept_owner"
KEEP = "_abc"

Claim = Callable[[], KeptServer]


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Claim]:
    """Claims servers that no other run knows of."""
    before = folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not (cache := before.parents[1] / "postgresql").exists():
        cache.mkdir(parents=True)
    (tmp_path / "arbiter-db").mkdir()
    (tmp_path / "arbiter-db" / "postgresql").symlink_to(cache)  # servers that were fetched
    claimed: list[KeptServer] = []

    def claim() -> KeptServer:
        server = kept_server.claim(MAJOR, SETUP, KEEP)
        assert server is not None
        claimed.append(server)
        return server

    yield claim
    for server in claimed:
        server.close()
    kept_server.stop()


def run(server: KeptServer, *statements: str) -> None:
    with psycopg.connect(server.conninfo(), autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def databases(server: KeptServer) -> set[str]:
    with psycopg.connect(server.conninfo()) as conn:
        names = {name for (name,) in conn.execute("select datname from pg_database")}
    return names - {"postgres", "template0", "template1"}


def holder() -> int:
    [file] = folder().glob("*.json")
    return int(json.loads(file.read_text())["holder_pid"])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_the_next_run_finds_it_without_what_an_interrupted_one_left(claim: Claim) -> None:
    first = claim()
    assert first.is_new
    run(
        first,
        "create database test_left",
        "create database template_half_abc",
        "create database template_old is_template true",
        "create database template_new_abc is_template true",
    )
    with psycopg.connect(first.conninfo("test_left")) as left:
        first.close()
        second = claim()
        assert not second.is_new
        assert second.pid == first.pid
        with pytest.raises(psycopg.OperationalError):
            left.execute("select 1")
    assert databases(second) == {"template_new_abc"}


def test_two_runs_at_once_have_two_servers(claim: Claim) -> None:
    first, second = claim(), claim()
    assert first.host != second.host
    for server in (first, second):
        run(server, "create database test_mine")


@pytest.mark.parametrize(
    "change",
    ["create role other", "alter role kept_owner superuser", "alter system set work_mem = '1MB'"],
)
def test_a_server_that_is_not_as_it_was_is_replaced(claim: Claim, change: str) -> None:
    first = claim()
    run(first, change, "select pg_reload_conf()")
    if "system" in change:
        with psycopg.connect(first.conninfo(), autocommit=True) as conn:
            wait_for(lambda: conn.execute("show work_mem").fetchone() == ("1MB",))
    first.close()
    assert claim().is_new


def test_a_server_of_other_options_is_replaced(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claim()
    first.close()
    monkeypatch.setitem(globals(), "SETUP", "create role another_owner")
    second = claim()
    assert second.is_new
    assert not Path(first.host).exists()


@pytest.mark.parametrize("who", ["holder", "server"])
def test_a_crash_between_runs_is_made_good(claim: Claim, who: str) -> None:
    first = claim()
    first.close()
    assert first.pid is not None
    os.kill(holder() if who == "holder" else first.pid, signal.SIGKILL)
    second = claim()
    assert second.is_new
    run(second, "create database test_fresh")


def test_a_holder_without_use_ends_and_leaves_nothing(claim: Claim) -> None:
    server = claim()
    server.close()
    [lock] = folder().glob("*.lock")
    long_ago = time.time() - IDLE_S - 60
    os.utime(lock, (long_ago, long_ago))
    wait_for(lambda: not Path(server.host).exists() and not server.data_directory.exists())
    assert claim().is_new


def test_what_a_run_uses_is_not_stopped(claim: Claim, capsys: pytest.CaptureFixture[str]) -> None:
    used, unused = claim(), claim()
    unused.close()
    kept_server.stop()
    assert capsys.readouterr().out == f"in use: {MAJOR}-0\nended: {MAJOR}-1\n"
    run(used, "select 1")
    assert not Path(unused.host).exists()


def test_it_cannot_be_stopped_by_a_test(claim: Claim) -> None:
    server = claim()
    for stop in (server.stop, server.kill):
        with pytest.raises(EmbeddedServerError, match="take one of your own"):
            stop()


def test_where_no_holder_starts_there_is_none(
    claim: Claim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert kept_server.claim(MAJOR, SETUP, KEEP) is None
    assert "a holder did not start" in capsys.readouterr().err
