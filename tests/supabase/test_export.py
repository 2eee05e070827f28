"""`arbiter-db supabase export`: the files that it writes, and what the Supabase CLI makes of them.

The CLI reaches databases over TCP only, so it gets a server of its own. A database there has what
Supabase's platform puts in before an app's first migration: the roles, and schema auth. The app's
tables are the project's first migration.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from catalog import WITHOUT_YOYO, assert_same, dump, schema
from click.testing import CliRunner, Result
from conftest import OWNER, ROLES, Database
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sessions import TIMEOUT_S
from story import (
    activate,
    add_machine,
    add_signal,
    add_user,
    backend,
    browser,
    column,
    rejection,
    rows,
    value,
)

import arbiter_db
from arbiter_db.cli import main
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.install import migration_texts
from arbiter_db.queries import QUERIES

from .supabase_cli import TIMEOUT_S as COMMAND_TIMEOUT_S
from .supabase_cli import Project, SupabaseError

TRADING = Path(arbiter_db.__file__).parent / "demo" / "trading.sql"
PLATFORM, TABLES, REST = TRADING.read_text(encoding="utf-8").partition("-- Tables -")

#: A schema of supabase_admin's is the platform's: `db reset` leaves it.
ADMIN = f"""
alter schema auth owner to supabase_admin;
grant usage on schema auth to {OWNER};
grant all on auth.users to {OWNER};
"""

#: What the CLI and yoyo write down for themselves.
WITHOUT_RECORDS = ("--exclude-schema=supabase_migrations", *WITHOUT_YOYO)

NEWER = "99.0.0"

MARK = re.compile(r"-- arbiter (\S+), export ([0-9a-f]{64})\.\n")


class Hosted(NamedTuple):
    """A project, and the database that its CLI works on."""

    project: Project
    db: Database

    def run(self, *command: str) -> str:
        return self.project.run(self.url, *command)

    @property
    def url(self) -> str:
        server, name = self.db.server, self.db.name
        password = conninfo_to_dict(server.conninfo(name, OWNER, tcp=True))["password"]
        return f"postgresql://{OWNER}:{password}@127.0.0.1:{server.port}/{name}?sslmode=disable"

    def migrations(self) -> list[tuple[str, str]]:
        """The numbers of the migrations: in the project, in the database."""
        listed = json.loads(self.run("migration", "list", "--output-format=json"))["migrations"]
        return [(each["local"], each["remote"]) for each in listed]

    def findings(self) -> set[str]:
        """The advisors' findings, by their unique names."""
        found = self.run("db", "advisors", "--level=info", "--fail-on=none", "--output-format=json")
        return {each["cacheKey"] for each in json.loads(found)["results"]}


Host = Callable[[Path], Hosted]


@pytest.fixture(scope="module")
def host(server: EmbeddedServer) -> Iterator[Host]:
    """Makes a project in a folder, and a database of the platform."""
    numbers = count(1)
    with ExitStack() as stack:
        platform = stack.enter_context(EmbeddedServer(server.major, tcp=True))
        admin = stack.enter_context(psycopg.connect(platform.conninfo(), autocommit=True))
        admin.execute(ROLES.encode() + b"create role supabase_admin nologin")

        def make(folder: Path) -> Hosted:
            db = Database(platform, f"project_{next(numbers)}")
            stack.callback(db.close)
            name, owner = sql.Identifier(db.name), sql.Identifier(OWNER)
            admin.execute(sql.SQL("create database {} owner {}").format(name, owner))
            db.connect("postgres").execute(PLATFORM.encode() + ADMIN.encode())
            project = Project(folder)
            project.add("20260101000000_app.sql", TABLES + REST)
            return Hosted(project, db)

        yield make


@pytest.fixture
def hosted(host: Host, tmp_path: Path) -> Hosted:
    """A project whose database has none of its migrations yet."""
    return host(tmp_path)


@pytest.fixture(scope="module")
def pushed(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Hosted:
    """A project that was exported to, with the calls of the API, and pushed."""
    hosted = host(tmp_path_factory.mktemp("pushed"))
    exported(hosted.project, "--expose=public")
    hosted.run("db", "push")
    return hosted


def export(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["supabase", "export", str(directory), *options], prog_name="arbiter-db"
    )


def exported(project: Project, *options: str) -> list[Path]:
    """The files that an export has written."""
    result = export(project.migrations, *options)
    assert result.exit_code == 0, result.stderr
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert [path.parent for path in paths] == [project.migrations] * 2
    return paths


def stamp(name: str) -> str:
    """The number of a migration, which orders it."""
    return name.partition("_")[0]


def release_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be a later release, whose SQL differs in the version it tells."""
    change, finish = migration_texts()
    newer = change.replace(f"return '{arbiter_db.__version__}';", f"return '{NEWER}';")
    assert newer != change
    monkeypatch.setattr("arbiter_db.supabase.migration_texts", lambda _: (newer, finish))
    monkeypatch.setattr("arbiter_db.supabase.__version__", NEWER)


def version(db: Database) -> Any:
    return value(db.connect(), "select arbiter.version()")


def check_guard(db: Database) -> None:
    """A browser is rejected while its user's machine holds, which writes."""
    service = backend(db)
    user = add_user(db.connect())
    machine = activate(service, user)
    assert rejection(add_signal, browser(db, user), user.trader).sqlstate == "WX001"
    assert add_signal(service, user.trader, "cloud", machine)


# -- the files ------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_writes_two_migrations_that_say_what_they_are(project: Project) -> None:
    change, finish = exported(project)
    assert re.fullmatch(r"\d{14}_arbiter\.sql", change.name)
    assert re.fullmatch(r"\d{14}_arbiter_finish\.sql", finish.name)
    assert change.name < finish.name
    marks = [MARK.match(path.read_text(encoding="utf-8")) for path in (change, finish)]
    assert marks[0] is not None
    assert marks[1] is not None
    assert marks[0].groups() == marks[1].groups()
    assert marks[0][1] == arbiter_db.__version__
    assert project.files() == [change.name, finish.name]


@pytest.mark.parametrize(
    ("newest", "stamps"),
    [
        ("29990101000000", ["29990101000001", "29990101000002"]),
        ("29991231235959", ["30000101000000", "30000101000001"]),
    ],
)
def test_comes_after_what_is_stamped_with_the_future(
    project: Project, newest: str, stamps: list[str]
) -> None:
    project.add("20260101000000_app.sql", "")
    project.add(f"{newest}_far.sql", "")
    assert [stamp(path.name) for path in exported(project)] == stamps


@pytest.mark.parametrize(
    "name",
    [
        "29990101000000.sql",
        "29990101000000_notes.txt",
        ".29990101000000_arbiter.sql.part",
        "v29990101000000_other.sql",
    ],
)
def test_passes_over_what_is_no_migration(project: Project, name: str) -> None:
    project.add(name, "")
    assert exported(project)[0].name < "2999"


@pytest.mark.parametrize(
    "name", ["99_last.sql", "30001399000000_no_month.sql", "99991231235959_end.sql"]
)
def test_rejects_what_nothing_can_come_after(project: Project, name: str) -> None:
    project.add(name, "")
    result = export(project.migrations)
    assert result.exit_code == 1
    assert stamp(name) in result.stderr.splitlines()[0]
    assert result.stderr.splitlines()[1].startswith("hint: ")
    assert project.files() == [name]


def test_the_past_may_be_numbered_as_it_likes(project: Project) -> None:
    project.add("0001_first.sql", "")
    project.add("20240230000000_no_day.sql", "")
    assert exported(project)[0].name > "2026"


def test_writes_nothing_again(project: Project) -> None:
    exported(project)
    project.add("29990101000000_app.sql", "")
    before = project.files()
    result = export(project.migrations)
    assert result.exit_code == 0
    assert result.stdout == f"{project.migrations} has arbiter {arbiter_db.__version__} already\n"
    assert project.files() == before


def test_writes_further_files_when_something_changes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[str, str] = {}
    for step in ("first", "exposed", "newer"):
        if step == "newer":
            release_newer(monkeypatch)
        paths = exported(project, *([] if step == "first" else ["--expose=public"]))
        texts |= {path.name: path.read_text(encoding="utf-8") for path in paths}
    assert project.files() == sorted(texts)
    assert len(texts) == 6
    for name, text in texts.items():
        assert (project.migrations / name).read_text(encoding="utf-8") == text


def test_writes_all_or_nothing(project: Project) -> None:
    project.add("29990101000000_app.sql", "")
    in_the_way = project.migrations / "29990101000002_arbiter_finish.sql"
    in_the_way.mkdir()
    # A folder is no obstacle to the first file, and the second cannot be put in its place.
    (in_the_way / "file").touch()
    before = project.files()
    result = export(project.migrations)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"arbiter-db: cannot write to {project.migrations}: ")
    assert project.files() == before


@pytest.mark.parametrize("name", ["missing", "file"])
def test_wants_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    result = export(tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"arbiter-db: {tmp_path / name} is not a directory",
        "hint: Name the project's supabase/migrations; `supabase init` makes a project.",
    ]


# -- the CLI --------------------------------------------------------------------------------------


def test_the_cli_lists_all_as_applied_and_has_no_more(pushed: Hosted) -> None:
    listed = pushed.migrations()
    assert [local for local, _ in listed] == [stamp(name) for name in pushed.project.files()]
    assert all(local == remote for local, remote in listed)
    assert "up to date" in pushed.run("db", "push")


def test_a_push_gives_what_install_gives(pushed: Hosted, hosted: Hosted) -> None:
    conn = hosted.db.connect()
    conn.execute((TABLES + REST).encode())
    arbiter_db.install(hosted.db.conninfo())
    conn.execute("select arbiter.expose('public')")
    installed = schema(hosted.db.conninfo(), *WITHOUT_RECORDS)
    assert_same(installed, schema(pushed.db.conninfo(), *WITHOUT_RECORDS))


def test_an_install_later_only_adds_its_own_records(hosted: Hosted) -> None:
    exported(hosted.project)
    hosted.run("db", "push")
    before = dump(hosted.db.conninfo(), *WITHOUT_RECORDS)
    arbiter_db.install(hosted.db.conninfo())
    assert_same(before, dump(hosted.db.conninfo(), *WITHOUT_RECORDS))
    applied = "select array_agg(migration_id order by 1) from arbiter._yoyo_migration"
    assert value(hosted.db.connect(), applied) == ["0001.schema", "0002.columns"]


def test_the_advisors_find_nothing_of_arbiters(pushed: Hosted, hosted: Hosted) -> None:
    hosted.db.connect().execute((TABLES + REST).encode())
    without = hosted.findings()
    # A finding about the app's own tables shows that the advisors work.
    assert "rls_enabled_no_policy_public_webhook_queue" in without
    # In every new database the advisors report an index that was never read; this reads it.
    conn = pushed.db.connect()
    machine = add_machine(conn, add_user(conn))
    conn.execute("delete from public.cloud_machines where id = %s", (machine,))
    conn.execute("select pg_stat_force_next_flush()")
    # Functions without a search_path, which the advisors take for a danger. The server read their
    # bodies when they were made, so none matters; one has that of the guards, its only callers.
    # tests/life/test_migrations.py sees to both.
    read = rows(
        conn,
        "select distinct p.proname from pg_proc p where p.pronamespace = 'arbiter'::regnamespace"
        " and p.proconfig is null and p.prosqlbody is not null",
    )
    unpinned = {"_machine_may_write", *(name for (name,) in read)}
    assert len(unpinned) == 13
    found = {re.sub("_[0-9a-f]{32}$", "", name) for name in pushed.findings() - without}
    assert found == {f"function_search_path_mutable_arbiter_{name}" for name in unpinned}


def test_types_for_clients_have_the_columns(pushed: Hosted) -> None:
    types = pushed.run("gen", "types", "--lang=typescript", "--schema=public")
    # The generator does not format its output, so ignore blanks.
    types = re.sub(r"\s+", "", types)
    for name in ("confirm_takeover", "execution_status"):
        call = re.search(rf'"{name}":{{Args:{{(.*?)}};Returns:{{(.*?)}}(\[\])?}}', types)
        assert call is not None
        assert call[1] == '"p_user_id"?:string'
        columns = dict(re.findall(r'"(\w+)":(\w+)', call[2]))
        assert columns == {
            "as_of": "string",
            "can_write_local": "boolean",
            "code": "string",
            "draining": "boolean",
            "enforced": "boolean",
            "environment": "string",
            "epoch": "number",
            "heartbeat_age": "string",
            "machine_id": "string",
            "machine_state": "string",
            "message": "string",
            "poll_interval": "string",
            "retry_at": "string",
        }


def test_migration_up_upgrade_and_reset(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    first = exported(hosted.project)
    hosted.run("migration", "up")
    assert version(hosted.db) == arbiter_db.__version__
    check_guard(hosted.db)

    release_newer(monkeypatch)
    second = exported(hosted.project)
    hosted.run("migration", "up")
    assert version(hosted.db) == NEWER
    check_guard(hosted.db)
    upgraded = schema(hosted.db.conninfo(), *WITHOUT_RECORDS)

    hosted.run("db", "reset")
    assert_same(upgraded, schema(hosted.db.conninfo(), *WITHOUT_RECORDS))
    assert value(hosted.db.connect(), "select count(*) from public.signals") == 0
    check_guard(hosted.db)
    stamps = ["20260101000000", *(stamp(path.name) for path in [*first, *second])]
    assert hosted.migrations() == [(each, each) for each in stamps]


def test_a_push_that_is_rejected_leaves_nothing(hosted: Hosted) -> None:
    hosted.project.add(
        "20260102000000_feed.sql", "alter table public.signals add column source integer"
    )
    hosted.run("db", "push")
    before = dump(hosted.db.conninfo())
    asked = exported(hosted.project, "--protect=public.signals")
    with pytest.raises(SupabaseError) as caught:
        hosted.run("db", "push")
    said = "column source of table public.signals is integer, it must be text"
    assert said in str(caught.value)
    assert_same(before, dump(hosted.db.conninfo()))

    # What was not asked for is skipped. The CLI shows no notices, so the plan is asked for.
    for path in asked:
        path.unlink()
    exported(hosted.project)
    hosted.run("db", "push")
    plan = {line.table: line for line in arbiter_db.plan(hosted.db.conninfo())}
    assert plan["public.signals"].step == "skip"
    assert plan["public.signals"].finding.startswith(said)
    assert column(hosted.db.connect(), "select protected_table from arbiter.protections") == []


def test_a_plan_of_an_export_writes_nothing(project: Project) -> None:
    planned = export(project.migrations, "--plan", "--mode=observe")
    assert planned.exit_code == 0
    paths = [Path(line.removeprefix("would write ")) for line in planned.stdout.splitlines()]
    names = [path.name.partition("_")[2] for path in paths]
    assert names == ["arbiter.sql", "arbiter_finish.sql"]
    assert not [path for path in project.migrations.iterdir() if "arbiter" in path.name]


def test_a_push_gives_up_on_a_busy_table_and_can_be_repeated(hosted: Hosted) -> None:
    hosted.run("db", "push")
    before = dump(hosted.db.conninfo())
    exported(hosted.project)
    with hosted.db.connect(autocommit=False) as writer:
        writer.execute("lock table public.signals in row exclusive mode")
        with pytest.raises(SupabaseError, match="55P03"):
            hosted.run("db", "push")
        assert_same(before, dump(hosted.db.conninfo()))
        writer.rollback()
    hosted.run("db", "push")
    check_guard(hosted.db)


def test_a_push_waits_for_an_install(hosted: Hosted) -> None:
    hosted.run("db", "push")
    exported(hosted.project)
    with hosted.db.connect() as installer, ThreadPoolExecutor(max_workers=1) as pool:
        with installer.transaction():
            installer.execute(QUERIES["lock"])
            push = pool.submit(hosted.run, "db", "push")
            wait_until_a_push_waits(hosted.db)
        push.result(TIMEOUT_S)
    check_guard(hosted.db)


def wait_until_a_push_waits(db: Database) -> None:
    """Until somebody waits for the lock of installs, as long as the CLI takes to start."""
    conn, pause = db.connect("postgres"), threading.Event()
    waiting = """
        select exists (
          select from pg_locks l join pg_database d on d.oid = l.database
           where l.locktype = 'advisory' and not l.granted and d.datname = current_database())"""
    for _ in range(int(COMMAND_TIMEOUT_S / 0.05)):
        if value(conn, waiting):
            return
        pause.wait(0.05)
    raise AssertionError("the push did not wait")


def test_a_push_loses_no_write_of_clients_that_never_stop(hosted: Hosted) -> None:
    hosted.run("db", "push")
    owner = hosted.db.connect()
    user = add_user(owner)
    machine = add_machine(owner, user, "stopped")
    exported(hosted.project)
    stop = threading.Event()
    progress = threading.Condition()
    written = {"one": 0, "two": 0}

    def write(name: str) -> None:
        conn = backend(hosted.db)
        while not stop.is_set():
            with conn.transaction():
                conn.execute(
                    "update public.cloud_machines set region = %s where id = %s", (name, machine)
                )
                for part in ("a", "b"):
                    conn.execute(
                        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
                        " values (%s, %s, '1m', 'buy', '2026-01-01')",
                        (user.trader, f"{name} {written[name]} {part}"),
                    )
            with progress:
                written[name] += 1
                progress.notify_all()

    def wait_for_more() -> None:
        with progress:
            so_far = dict(written)
            assert progress.wait_for(
                lambda: all(written[name] > n for name, n in so_far.items()), TIMEOUT_S
            ), "the clients stopped writing"

    with ThreadPoolExecutor(max_workers=2) as pool:
        clients = [pool.submit(write, name) for name in written]
        try:
            wait_for_more()
            hosted.run("db", "push")
            wait_for_more()
            wait_for_more()
        finally:
            stop.set()
        for client in clients:
            client.result(TIMEOUT_S)

    assert value(owner, "select count(*) from public.signals") == 2 * sum(written.values())
    # Some before the push, some after it, as the evidence says.
    evidence = "select array_agg(distinct arbiter_xid is null) from public.signals"
    assert sorted(value(owner, evidence)) == [False, True]
