"""Upgrades: an install drops what an earlier version has left over, and no write fails meanwhile.

There is no earlier version yet. These tests make one: the installed one with an object more, or
with a function of the guard that has another parameter.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
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
    assert "Drop or change what uses it" in str(caught.value.hint)
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
    names = ("22_admit.sql", "22_guard.sql")
    paths = [path for path in installer._sql_files() if path.name in names]
    text = "".join(path.read_text(encoding="ascii") for path in paths)
    for now, before in (
        ("v_write.machine_id, v_write.flaw);", "v_write.machine_id, v_write.flaw, 1);"),
        ("  p_machine_id text,\n  p_flaw text)\nreturns arbiter.error",
         "  p_machine_id text,\n  p_flaw text,\n  p_older integer)\nreturns arbiter.error"),
        ("_admit(integer, text, text, text, text, text, text) is",
         "_admit(integer, text, text, text, text, text, text, integer) is"),
    ):  # fmt: skip
        assert text.count(now) == 1
        text = text.replace(now, before)
    conn = db.connect()
    with conn.transaction():
        conn.execute("drop function arbiter._admit(integer, text, text, text, text, text, text)")
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
    lock = "    perform arbiter._lock_tables(v_tables, 'share row exclusive');\n"
    assert text.count(lock) == 1
    path.write_text(text.replace(lock, "    perform v_tables;\n"), encoding="ascii")

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


# -- what must not be in the way ------------------------------------------------------------------


def test_a_reader_does_not_hold_an_upgrade_up_and_does_not_wait(db: Database) -> None:
    """A dump, or a long query. Nor does a client deadlock that reads first and then writes."""
    downgrade(db)
    owner = db.connect()
    user = add_user(owner)
    client = db.session(role="service_role", name="reader")
    client.run("begin")
    client.run("select count(*) from public.signals")
    arbiter_db.install(db.conninfo())
    client.run(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'AFTER', '1m', 'buy', '2025-01-01')",
        (user.trader,),
    )
    client.run("commit")
    assert one_signature(owner)


def test_a_reader_that_goes_on_to_write_waits_for_the_upgrade(db: Database) -> None:
    """With a lock that conflicts with readers it would be a deadlock."""
    downgrade(db)
    owner = db.connect()
    user = add_user(owner)
    owner.execute("comment on trigger arbiter_guard_insert on public.signals is 'Older.'")
    insert = (
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, %s, '1m', 'buy', '2025-01-01')"
    )
    writer = db.session(role="service_role", name="writer")
    writer.run("begin")
    writer.run(insert, (user.trader, "FIRST"))
    client = db.session(role="service_role", name="reader")
    client.run("begin")
    client.run("select count(*) from public.signals")
    client.run("select count(*) from public.cloud_machines")
    with ThreadPoolExecutor(max_workers=1) as pool:
        install = pool.submit(arbiter_db.install, db.conninfo())
        wait_until_an_install_waits(db)
        second = client.start(insert, (user.trader, "SECOND"))
        wait_until_blocked(client)
        writer.run("commit")
        second.result(TIMEOUT_S)
        client.run("commit")
        install.result(TIMEOUT_S)
    assert one_signature(owner)


def test_a_refused_upgrade_leaves_every_function_as_it_was(db: Database) -> None:
    """Also those that a first install commits before the migrations."""
    conn = db.connect()
    conn.execute(OBJECTS["view"][0].encode())
    conn.execute(OBJECTS["view"][1].encode())
    conn.execute(
        "create or replace function arbiter._columns() returns table"
        " (kind text, types text[], definition text, meaning text) language sql immutable"
        " set search_path = pg_catalog, pg_temp"
        " begin atomic select 'older', '{}'::text[], 'b', 'c'; end"
    )
    before = dump(db.conninfo())
    with pytest.raises(arbiter_db.InstallError):
        arbiter_db.install(db.conninfo())
    assert_same(before, dump(db.conninfo()))


#: Old signatures whose calls would be ambiguous, of functions that an install calls itself.
CALLED_BY_AN_INSTALL = [
    "arbiter._build_policies(p_table regclass default null, p_level integer default 1)",
    "arbiter._build_registry(p_level integer default 1)",
    "arbiter.protect(p_table regclass, p_level integer default 1)",
    "arbiter._attach(a regclass, b name, c text, d text, p_level integer default 1)",
]


@pytest.mark.parametrize("signature", CALLED_BY_AN_INSTALL)
def test_an_old_signature_is_gone_before_an_install_calls_it(
    db: Database, fresh: str, signature: str
) -> None:
    conn = db.connect()
    conn.execute("create view public.app as select 1 as n")
    conn.execute(f"create function {signature} returns void language sql as 'select'".encode())
    arbiter_db.install(db.conninfo())
    conn.execute("drop view public.app")
    assert_same(fresh, schema(db.conninfo()))


def test_extensions_and_what_belongs_to_a_type_are_left_alone(db: Database, fresh: str) -> None:
    superuser = db.connect("postgres")
    superuser.execute("create type arbiter.old as range (subtype = integer)")
    superuser.execute("alter type arbiter.old owner to app_owner")
    superuser.execute("create function arbiter.tool() returns integer language sql as 'select 1'")
    superuser.execute("alter extension plpgsql add function arbiter.tool()")
    arbiter_db.install(db.conninfo())
    assert value(superuser, "select arbiter.tool()") == 1
    superuser.execute("alter extension plpgsql drop function arbiter.tool()")
    superuser.execute("drop function arbiter.tool()")
    assert_same(fresh, schema(db.conninfo()))


def test_triggers_of_an_earlier_version_go_with_their_functions(db: Database, fresh: str) -> None:
    conn = db.connect()
    conn.execute(
        "create function arbiter.tg_old() returns trigger language plpgsql as"
        " 'begin return null; end'"
    )
    for table in ("public.cloud_machines", "public.signals", "arbiter.leases"):
        conn.execute(
            f"create trigger arbiter_old after update on {table}"
            " for each row execute function arbiter.tg_old()".encode()
        )
    arbiter_db.install(db.conninfo())
    assert_same(fresh, schema(db.conninfo()))


def test_says_what_it_dropped(db: Database) -> None:
    db.connect().execute(OBJECTS["function"][0].encode())
    steps: list[str] = []
    arbiter_db.install(db.conninfo(), on_step=steps.append)
    assert "dropped routine arbiter.old(integer)" in steps


def test_another_role_must_not_upgrade(db: Database) -> None:
    """Functions that are new would be its own, and closed to the owner of the others."""
    before = dump(db.conninfo("postgres"))
    with pytest.raises(arbiter_db.InstallError, match="schema arbiter belongs to app_owner"):
        arbiter_db.install(db.conninfo("postgres"))
    assert_same(before, dump(db.conninfo("postgres")))


def test_a_dropped_root_whose_partition_was_detached_stays_known(db: Database) -> None:
    """Until it is unprotected by its number: otherwise a swapped table would look well."""
    conn = db.connect()
    conn.execute("create table public.bars (user_id uuid, day date) partition by range (day)")
    conn.execute(
        "create table public.bars_1 partition of public.bars"
        " for values from ('2025-01-01') to ('2026-01-01')"
    )
    conn.execute("select arbiter.protect('public.bars')")
    conn.execute("alter table public.bars detach partition public.bars_1")
    conn.execute("drop table public.bars")
    arbiter_db.install(db.conninfo())
    found = conn.execute("select object, state, problem, remedy from arbiter.doctor()"
                         " where object ~ 'bars'").fetchall()  # fmt: skip
    remedy = found[0][3]
    assert found == [("protection of public.bars", "missing", "The table was dropped.", remedy)]
    left = "select count(*) from pg_trigger where tgrelid = 'public.bars_1'::regclass"
    assert value(conn, left) > 0
    conn.execute(remedy.encode())
    assert value(conn, left) == 0
    assert value(conn, "select count(*) from arbiter.doctor() where object ~ 'bars'") == 0


@pytest.mark.parametrize("call", ["protect", "register_machines", "install"])
def test_with_backslashes_as_escapes(db: Database, call: str) -> None:
    conn = db.connect()
    setting = "standard_conforming_strings"
    try:
        conn.execute(f"alter database {db.name} set {setting} = off".encode())
    except psycopg.Error:
        pytest.fail("this server has no such setting any more: remove the test")
    again = db.connect()
    assert value(again, f"show {setting}") == "off"
    if call == "protect":
        again.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    elif call == "register_machines":
        again.execute("select arbiter.register_machines('public.cloud_machines')")
    else:
        arbiter_db.install(db.conninfo())
    add_signal(again, add_user(again).trader)
    found = (
        "select state from arbiter.doctor()"
        " where object ~ '^(trigger|policy|generated function|protection) '"
    )
    assert {row.state for row in rows(again, found)} == {"ok"}


POLICY = (
    "comment on policy arbiter_claim on public.signals is"
    " 'Older [00000000000000000000000000000000]'"
)


@pytest.mark.parametrize("way", ["install", "script", "export"])
def test_no_reader_waits_where_only_functions_change(db: Database, way: str) -> None:
    downgrade(db)
    reader = db.session(role="service_role", name="reader")
    reader.run("begin")
    reader.run("select count(*) from public.signals")
    reader.run("select count(*) from public.cloud_machines")
    if way == "install":
        arbiter_db.install(db.conninfo())
    elif way == "export":
        conn = db.connect()
        with conn.transaction():
            conn.execute(installer.migration_texts()[0].encode())
    else:
        assert db.server.psql is not None
        command = [db.server.psql, "-X", "-q", "-d", db.conninfo()]
        done = subprocess.run(
            command, input=arbiter_db.sql_text(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    reader.run("commit")
    assert one_signature(db.connect())


def test_a_reader_that_writes_is_no_victim_when_a_policy_changes(db: Database) -> None:
    """The strongest lock comes first, and the server lets a client pass that waits behind it."""
    owner = db.connect()
    user = add_user(owner)
    owner.execute(OBJECTS["function"][0].encode())
    owner.execute(POLICY.encode())
    client = db.session(role="service_role", name="reader")
    client.run("begin")
    client.run("select count(*) from public.signals")
    with ThreadPoolExecutor(max_workers=1) as pool:
        install = pool.submit(arbiter_db.install, db.conninfo())
        wait_until_an_install_waits(db)
        client.run(
            "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
            " values (%s, 'AFTER', '1m', 'buy', '2025-01-01')",
            (user.trader,),
        )
        client.run("commit")
        install.result(TIMEOUT_S)
    wrong = "select count(*) from arbiter._wrong_policies(null)"
    assert value(owner, wrong) == 0


def test_a_trigger_on_a_detached_partition_goes_with_its_function(db: Database) -> None:
    conn = db.connect()
    conn.execute("create table public.bars (user_id uuid, day date) partition by range (day)")
    conn.execute(
        "create table public.bars_1 partition of public.bars"
        " for values from ('2025-01-01') to ('2026-01-01')"
    )
    conn.execute("select arbiter.protect('public.bars')")
    conn.execute("alter table public.bars detach partition public.bars_1")
    conn.execute(
        "create function arbiter.tg_old() returns trigger language plpgsql as"
        " 'begin return null; end'"
    )
    conn.execute(
        "create trigger arbiter_old after update on public.bars_1"
        " for each row execute function arbiter.tg_old()"
    )
    arbiter_db.install(db.conninfo())
    left = "select count(*) from pg_trigger where tgname = 'arbiter_old'"
    assert value(conn, left) == 0
