"""Upgrades: an install drops what an earlier version has left over, and no write fails meanwhile.

There is no earlier version yet. These tests make one: the installed one with an object more, or
with a function of the guard that has another parameter.
"""

from __future__ import annotations

import importlib
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from catalog import assert_same, dump, schema
from conftest import Database, Templates
from sessions import TIMEOUT_S, Session, wait_until_blocked
from story import User, activate, add_machine, add_signal, add_user, backend, beat, rows, value

import arbiter_db

# By this way, because the package's attribute `install` is the function.
installer = importlib.import_module("arbiter_db.install")

#: What an earlier version may have had, and how the app may use it.
OBJECTS = {
    "old signature": (
        "create function arbiter.protect(p_table regclass, p_level integer default 1)"
        " returns integer language sql as 'select 1'",
        "create view public.app as select arbiter.protect('public.signals', 1) as done",
        "view public.app",
    ),
    "function": (
        "create function arbiter.old(n integer) returns integer language sql as 'select n';"
        " comment on function arbiter.old(integer) is 'Of an earlier version.'",
        "alter table public.traders add column n integer default arbiter.old(1)",
        "default value for column n of table public.traders",
    ),
    "aggregate": (
        "create aggregate arbiter.old(integer) (sfunc = int4pl, stype = integer)",
        "create view public.app as select arbiter.old(1)",
        "view public.app",
    ),
    "view": (
        "create view arbiter.old as select user_id, epoch from arbiter.leases",
        "create view public.app as select epoch from arbiter.old",
        "view public.app",
    ),
    "composite type": (
        "create type arbiter.old as (n integer)",
        "alter table public.traders add column n arbiter.old",
        "column n of table public.traders",
    ),
    "enum": (
        "create type arbiter.old as enum ('a', 'b')",
        "create function public.app(arbiter.old) returns void language sql as 'select'",
        "function public.app(arbiter.old)",
    ),
    "domain": (
        "create domain arbiter.old as integer check (value > 0)",
        "alter table public.traders add column n arbiter.old",
        "column n of table public.traders",
    ),
}

#: Each of these needs the one before.
CHAIN = """
create type arbiter.old_type as (n integer);
create function arbiter.old_function(arbiter.old_type) returns integer language sql
  begin atomic select ($1).n; end;
create view arbiter.old_view as select arbiter.old_function(row(1)) as n;
"""


@pytest.fixture(scope="module")
def fresh(templates: Templates) -> str:
    """The schema that an install gives."""
    with templates.clone("installed") as database:
        return schema(database.conninfo())


@pytest.mark.parametrize("kind", OBJECTS)
def test_drops_what_this_version_does_not_define(db: Database, fresh: str, kind: str) -> None:
    db.connect().execute(OBJECTS[kind][0].encode())
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


def test_drops_a_procedure(db: Database, fresh: str) -> None:
    """No object can use one but at run time."""
    db.connect().execute("create procedure arbiter.old() language sql as 'select'")
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


def test_drops_what_needs_each_other(db: Database, fresh: str) -> None:
    db.connect().execute(CHAIN)
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


def test_by_the_script_and_by_the_exported_migration(db: Database, fresh: str) -> None:
    conn = db.connect()
    for _ in range(2):
        conn.execute(CHAIN)
        with conn.transaction():
            conn.execute(installer.migration_texts()[0].encode())
        assert_same(fresh, schema(db.conninfo()))


def test_an_old_signature_makes_calls_ambiguous_until_then(db: Database) -> None:
    conn = db.connect()
    conn.execute(OBJECTS["old signature"][0].encode())
    with pytest.raises(psycopg.errors.AmbiguousFunction):
        conn.execute("select arbiter.protect('public.signals')")
    arbiter_db.install(db.conninfo())
    conn.execute("select arbiter.protect('public.signals')")


@pytest.mark.parametrize("kind", OBJECTS)
def test_rejects_while_the_app_uses_it_and_changes_nothing(
    db: Database, fresh: str, kind: str
) -> None:
    create, use, user = OBJECTS[kind]
    conn = db.connect()
    conn.execute(create.encode())
    conn.execute(use.encode())
    before = dump(db.conninfo())
    with pytest.raises(arbiter_db.InstallError) as caught:
        arbiter_db.install(db.conninfo())
    assert caught.value.sqlstate == "2BP01"
    assert user in str(caught.value)
    assert "Drop or change these objects" in str(caught.value.hint)
    assert_same(before, dump(db.conninfo()))


def test_what_the_app_uses_of_this_version_stays(db: Database) -> None:
    conn = db.connect()
    conn.execute("create view public.app as select * from arbiter.status(null)")
    conn.execute("create table public.log (verdict arbiter.execution_status)")
    before = schema(db.conninfo())
    arbiter_db.install(db.conninfo())
    assert_same(before, schema(db.conninfo()))


def test_files_that_run_one_by_one_drop_nothing(db: Database) -> None:
    """Without what the first file notes nothing tells old from new."""
    conn = db.connect()
    before = schema(db.conninfo())
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="nothing was noted"):
        conn.execute("select arbiter._drop_left_over()")
    assert_same(before, schema(db.conninfo()))


# -- under load -----------------------------------------------------------------------------------


def downgrade(db: Database) -> None:
    """The guard of an earlier version, which calls _admit() with one parameter more."""
    (path,) = [path for path in installer._sql_files() if path.name == "22_guard.sql"]
    text = path.read_text(encoding="ascii")
    for now, before in (
        ("v_write.machine_id, v_write.flaw);", "v_write.machine_id, v_write.flaw, 1);"),
        ("  p_machine_id uuid,\n  p_flaw text)\nreturns void",
         "  p_machine_id uuid,\n  p_flaw text,\n  p_older integer)\nreturns void"),
        ("_admit(integer, text, text, uuid, text, uuid, text) is",
         "_admit(integer, text, text, uuid, text, uuid, text, integer) is"),
    ):  # fmt: skip
        assert text.count(now) == 1
        text = text.replace(now, before)
    conn = db.connect()
    with conn.transaction():
        conn.execute("drop function arbiter._admit(integer, text, text, uuid, text, uuid, text)")
        conn.execute(text.encode())
        conn.execute("select arbiter._build_guard(protection_id) from arbiter.protections")


def two_users(db: Database) -> tuple[User, User]:
    """In the order in which a statement judges them."""
    conn = db.connect()
    first, second = sorted((add_user(conn) for _ in range(2)), key=lambda user: user.id)
    return first, second


def batch_that_waits(
    db: Database, first: User, second: User
) -> tuple[Session, Session, Future[Any]]:
    """One statement that waits for a drain with its first row, and has yet to judge its second.

    The first session holds the drain up until it commits.
    """
    owner = db.connect()
    owner.execute("update arbiter.settings set drain_timeout = '20 s'")
    add_signal(owner, first.trader)  # creates the lease
    machine = add_machine(owner, first, "running")
    slow = db.session(role="service_role", name="writer in flight")
    slow.run("begin")
    slow.run(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'SLOW', '1m', 'buy', '2025-01-01')",
        (first.trader,),
    )
    beat(owner, machine)  # marks the drain
    batch = db.session(role="service_role", name="batch")
    done = batch.start(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " values (%s, 'BATCH', '1m', 'buy', '2025-01-01', 'cloud', %s),"
        " (%s, 'BATCH', '1m', 'buy', '2025-01-01', 'local', null)",
        (first.trader, machine, second.trader),
    )
    wait_until_blocked(batch)
    return slow, batch, done


def test_a_write_in_progress_ends_before_what_it_calls_is_dropped(db: Database) -> None:
    downgrade(db)
    slow, _, batch = batch_that_waits(db, *two_users(db))
    with ThreadPoolExecutor(max_workers=1) as pool:
        install = pool.submit(arbiter_db.install, db.conninfo())
        wait_until_an_install_waits(db)
        assert not install.done()
        slow.run("commit")
        batch.result(TIMEOUT_S)
        install.result(TIMEOUT_S)
    conn = db.connect()
    assert value(conn, "select count(*) from public.signals where symbol = 'BATCH'") == 2
    assert one_signature(conn)


def test_without_that_lock_the_write_fails(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an install that drops at once breaks the statement that is under way."""
    folder = tmp_path / "sql"
    shutil.copytree(installer._folder("sql"), folder)
    path = folder / "40_left_over.sql"
    text = path.read_text(encoding="ascii")
    lock = "  perform arbiter._lock_tables(array(\n"
    assert text.count(lock) == 1
    path.write_text(text.replace(lock, "  perform cardinality(array(\n"), encoding="ascii")

    downgrade(db)
    slow, _, batch = batch_that_waits(db, *two_users(db))
    real: Callable[[str], Path] = installer._folder
    monkeypatch.setattr(installer, "_folder", lambda name: folder if name == "sql" else real(name))
    arbiter_db.install(db.conninfo())
    slow.run("commit")
    with pytest.raises(psycopg.errors.UndefinedFunction, match="_admit"):
        batch.result(TIMEOUT_S)


def test_an_upgrade_under_load_fails_no_write(db: Database) -> None:
    """Four writers of new users, whose first write takes the slow path, and a machine."""
    downgrade(db)
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    users = [add_user(owner) for _ in range(400)]
    started, stop = threading.Barrier(6), threading.Event()

    def write(own: list[User]) -> int:
        conn, written = backend(db), 0
        started.wait(TIMEOUT_S)
        for each in own:
            if stop.is_set() and written > 20:
                break
            add_signal(conn, each.trader)
            written += 1
        return written

    def run_machine() -> int:
        conn, written = backend(db), 0
        started.wait(TIMEOUT_S)
        while not stop.is_set() and written < 2000:
            beat(conn, machine)
            add_signal(conn, user.trader, "cloud", machine)
            written += 1
        return written

    with ThreadPoolExecutor(max_workers=5) as pool:
        writers = [pool.submit(write, users[n::4]) for n in range(4)]
        cloud = pool.submit(run_machine)
        started.wait(TIMEOUT_S)
        arbiter_db.install(db.conninfo())
        stop.set()
        written = sum(future.result(TIMEOUT_S) for future in [*writers, cloud])
    assert written > 20
    assert value(owner, "select count(*) from public.signals") == written
    assert rows(owner, "select * from arbiter.audit('public.signals')") == []
    assert one_signature(owner)


def one_signature(conn: psycopg.Connection[Any]) -> bool:
    count = "select count(*) = 1 from pg_proc where oid::regproc::text = 'arbiter._admit'"
    return bool(value(conn, count))


def wait_until_an_install_waits(db: Database) -> None:
    """Until a connection of the package waits for a lock on a table of another session."""
    conn, pause = db.connect("postgres"), threading.Event()
    waiting = """
        select count(*) > 0
          from pg_stat_activity
         where datname = current_database()
           and application_name = ''
           and wait_event_type = 'Lock'"""
    for _ in range(int(TIMEOUT_S / 0.01)):
        if value(conn, waiting):
            return
        pause.wait(0.01)
    raise AssertionError("the install did not wait")
