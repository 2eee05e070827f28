"""The command line: exit codes, what goes to which stream, and that no traceback comes through."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import conninfo_to_dict
from sessions import TIMEOUT_S
from story import activate as start_machine
from story import add_signal, add_user

import arbiter_db
from arbiter_db import api
from arbiter_db.cli import main

if TYPE_CHECKING:
    from conftest import Database

ADA = "ada00000-0000-4000-8000-000000000001"
ADAS_TRADER = "ada00000-0000-4000-8000-00000000007a"
ADAS_MACHINE = "ada00000-0000-4000-8000-0000000000c1"

COMMAND = [sys.executable, "-c", "from arbiter_db.cli import main; main(prog_name='arbiter-db')"]

COMMANDS = [
    "audit",
    "demo",
    "handovers",
    "install",
    "observations",
    "protect",
    "register-machines",
    "sql",
    "status",
    "supabase",
    "uninstall",
    "unprotect",
    "web",
]


def run(*args: object, **kw: Any) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="arbiter-db", **kw)


def fine(*args: object, **kw: Any) -> str:
    """Run the command, which must be fine; return what it printed."""
    result = run(*args, **kw)
    assert result.stderr == ""
    assert result.exit_code == 0
    return result.stdout


def not_fine(*args: object, **kw: Any) -> list[str]:
    """Run the command, which must not be fine; return the lines that say why."""
    result = run(*args, **kw)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert lines[0].startswith("arbiter-db: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    return lines


@pytest.fixture
def dsn(db: Database) -> str:
    return f"--dsn={db.conninfo()}"


@pytest.fixture
def owner(db: Database) -> psycopg.Connection[Any]:
    """The owner's connection to a database in which Ada's browser has written."""
    conn = db.connect()
    people = Path(arbiter_db.__file__).parent / "demo" / "people.sql"
    conn.execute(people.read_text(encoding="utf-8"))
    conn.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'BTCUSDT', '1h', 'buy', clock_timestamp())",
        (ADAS_TRADER,),
    )
    return conn


def activate(conn: psycopg.Connection[Any]) -> None:
    """Ada's machine becomes healthy and the holder."""
    conn.execute(
        "insert into public.cloud_machines (id, user_id, status) values (%s, %s, 'running')",
        (ADAS_MACHINE, ADA),
    )
    api.heartbeat(conn, ADAS_MACHINE)
    api.heartbeat(conn, ADAS_MACHINE)


# --------------------------------------------------------------------------- usage


def test_help_and_version() -> None:
    overview = fine("-h")
    assert overview == fine("--help")
    for command in COMMANDS:
        assert command in overview
        assert f"Usage: arbiter-db {command}" in fine(command, "-h")
    assert fine("--version") == f"arbiter-db, version {arbiter_db.__version__}\n"


def test_web_prints_the_module_as_it_is() -> None:
    module = Path(arbiter_db.__file__).parent / "web" / "arbiter.js"
    assert fine("web") == module.read_text("utf-8")
    assert "export class Arbiter" in fine("web")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["protect"],
        ["unprotect"],
        ["register-machines"],
        ["status", "--nonsense"],
        ["install", "--dsn", "nonsense"],
        ["handovers", "--limit", "0"],
        ["register-machines", "t", "--states", "{"],
        ["register-machines", "t", "--states", "[]"],
    ],
)
def test_wrong_usage_is_2(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


# --------------------------------------------------------------------------- not fine


def test_a_database_that_cannot_be_reached(tmp_path: Path) -> None:
    for command in (["install"], ["uninstall", "--yes"], ["status"], ["handovers"]):
        (line,) = not_fine(*command, "--dsn", f"host={tmp_path} dbname=nothing")
        assert "cannot reach the database" in line
        assert str(tmp_path) in line


def test_a_database_without_arbiter(bare_db: Database) -> None:
    for command in (["status"], ["handovers"], ["protect", "t"], ["register-machines", "t"]):
        message, hint = not_fine(*command, "--dsn", bare_db.conninfo())
        assert message == "arbiter-db: arbiter is not installed in this database"
        assert "arbiter-db install" in hint


@pytest.mark.parametrize(
    ("version", "hint"), [("0.0.9", "arbiter-db install"), ("99.0.0", "Upgrade the package")]
)
def test_a_database_of_another_version(db: Database, dsn: str, version: str, hint: str) -> None:
    db.connect().execute(
        "create or replace function arbiter.version() returns text language sql immutable"
        f" return '{version}'"
    )

    lines = not_fine("status", ADA, dsn)

    assert f"this database has arbiter {version}, this package is " in lines[0]
    assert hint in lines[1]


def test_a_newer_database_is_not_downgraded(db: Database, dsn: str) -> None:
    db.connect().execute(
        "create or replace function arbiter.version() returns text language sql immutable"
        " return '99.0.0'"
    )
    for command in (["install"], ["uninstall", "--yes"]):
        assert "99.0.0" in not_fine(*command, dsn)[0]
    assert api.version(db.connect()) == "99.0.0"


def test_missing_rights(db: Database) -> None:
    dsn = f"--dsn={db.conninfo('authenticator')}"
    for command in (["handovers"], ["protect", "public.positions"], ["status", ADA]):
        lines = not_fine(*command, dsn)
        assert lines[0].startswith("arbiter-db: missing rights: ")
        assert len(lines) == 2


def test_an_install_without_rights_names_the_step(bare_db: Database) -> None:
    lines = not_fine("install", "--dsn", bare_db.conninfo("authenticator"))
    assert re.match(r"arbiter-db: 00_owner\.sql: permission denied ", lines[0])


def test_a_rejection_is_one_line_with_its_code(db: Database, dsn: str) -> None:
    db.connect().execute(
        """
        create or replace function arbiter.status(p_user_id text default null)
        returns arbiter.execution_status language plpgsql as $$
        begin
          raise exception using errcode = 'WX002', message = 'too recently', hint = 'Wait.',
            detail = '{"code": "cooling_down", "retry_at": "2026-01-02T03:04:05Z"}';
        end $$
        """
    )
    message, hint = not_fine("status", ADA, dsn)
    assert re.search(r"\(WX002 cooling_down, retry at \d\d:\d\d:\d\d\)$", message)
    assert hint.startswith("hint: ")


def test_a_table_that_does_not_exist(dsn: str) -> None:
    for command in (["protect", "public.no"], ["unprotect", "no"], ["register-machines", "no"]):
        assert "does not exist" in not_fine(*command, dsn)[0]


def test_a_server_that_the_demo_does_not_find() -> None:
    (line,) = not_fine("demo", "--major", "9")
    assert "PostgreSQL 9" in line


# --------------------------------------------------------------------------- install


def test_install_says_its_plan_its_steps_and_what_holds(trading_db: Database) -> None:
    lines = fine("install", "--dsn", trading_db.conninfo()).splitlines()

    assert lines[0].split() == ["plan", "table", "finding"]
    assert lines[1].split(maxsplit=2)[:2] == ["register", "public.cloud_machines"]
    assert "select arbiter._add_machine_index('public.signals')" in lines
    assert not [line for line in lines if line.endswith(".sql")]
    assert lines[-4:] == [
        f"arbiter {arbiter_db.__version__} is installed",
        "public.cloud_machines is the registry of machines",
        "public.signals is protected: mode enforce, user by 'trader_id.user_id', machine in"
        " machine_id, rows without a user: reject",
        "next: arbiter-db doctor",
    ]
    assert api.status(trading_db.connect(), ADA).environment == "local"


def test_libpqs_environment_variables_are_enough(trading_db: Database) -> None:
    params = conninfo_to_dict(trading_db.conninfo())
    names = {"dbname": "PGDATABASE", "host": "PGHOST", "port": "PGPORT", "user": "PGUSER"}
    env = {names[key]: str(value) for key, value in params.items() if key in names}

    fine("install", env=env)

    assert "local" in fine("status", ADA, env=env)
    tables = trading_db.connect().execute(
        "select schemaname from pg_tables where tablename like '%%yoyo%%' group by 1"
    )
    assert tables.fetchall() == [("arbiter",)]


def test_uninstall_asks(db: Database, dsn: str) -> None:
    for answer in ("n\n", ""):
        result = run("uninstall", dsn, input=answer)
        assert result.exit_code == 1
    assert api.version(db.connect()) == arbiter_db.__version__


@pytest.mark.parametrize("drop", [False, True])
def test_uninstall_says_what_it_leaves(db: Database, dsn: str, drop: bool) -> None:
    lines = fine("uninstall", "--yes", dsn, *["--drop-columns"] * drop).splitlines()

    assert any("signals" in line and "source" in line for line in lines)
    conn = db.connect()
    assert conn.execute("select to_regnamespace('arbiter')").fetchone() == (None,)
    columns = conn.execute(
        "select column_name from information_schema.columns where table_name = 'signals'"
    ).fetchall()
    assert (("source",) in columns) is not drop
    assert fine("uninstall", "--yes", dsn).splitlines() == lines[-1:]


def test_sql_prints_the_script_as_it_is() -> None:
    assert fine("sql") == arbiter_db.sql_text()
    assert "\x1b" not in fine("sql")


def test_a_pipe_that_closes_early_is_no_traceback() -> None:
    with subprocess.Popen(
        [*COMMAND, "sql"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


# --------------------------------------------------------------------------- status


def test_status_when_piped_is_plain(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)

    lines = fine("status", ADA, dsn).splitlines()

    assert lines[0] == "Cloud active"
    values = dict(re.split(r"\s{2,}", line.rstrip(), maxsplit=1) for line in lines[1:])
    assert values["environment"] == "cloud"
    assert values["machine id"] == str(ADAS_MACHINE)
    assert values["epoch"] == "2"
    assert values["can write local"] == "no"
    assert values["retry at"] == "-"
    assert values["poll interval"] == "5.0 s"


def test_status_as_json(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)

    status = json.loads(fine("status", ADA, dsn, "--json"))

    assert status["environment"] == "cloud"
    assert status["can_write_local"] is False
    assert status["retry_at"] is None
    assert status["machine_id"] == str(ADAS_MACHINE)
    assert 0 <= status["heartbeat_age"] < 30
    assert status["poll_interval"] == 5.0
    assert status["as_of"].startswith("20")


def test_status_without_a_user_is_an_error(dsn: str) -> None:
    assert "no user" in not_fine("status", dsn)[0]


@contextmanager
def watching(*args: str, **kw: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*COMMAND, "status", str(ADA), "--watch", *args], **kw)
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def quick_polls(owner: psycopg.Connection[Any]) -> None:
    owner.execute("update arbiter.settings set poll_interval = '100 milliseconds'")


@pytest.mark.usefixtures("quick_polls")
@pytest.mark.parametrize("as_json", [False, True])
def test_watch_when_piped_prints_a_line_per_look_until_ctrl_c(
    owner: psycopg.Connection[Any], dsn: str, as_json: bool
) -> None:
    args = [dsn, *["--json"] * as_json]
    with watching(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None

        def next_environment() -> str:
            line = process.stdout.readline().decode()  # type: ignore[union-attr]
            if as_json:
                return str(json.loads(line)["environment"])
            return line.partition("environment ")[2].partition(",")[0].strip()

        assert next_environment() == "local"
        assert next_environment() == "local"
        activate(owner)
        while next_environment() != "cloud":
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.usefixtures("quick_polls")
def test_watch_on_a_terminal_refreshes(owner: psycopg.Connection[Any], dsn: str) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    with watching(dsn, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        seen = b""
        while b"Browser mode" not in seen:
            seen += os.read(ours, 4096)
        activate(owner)
        while b"Cloud active" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=TIMEOUT_S) == 0
    os.close(ours)
    assert b"\x1b[" in seen


# --------------------------------------------------------------------------- the rest


def test_handovers(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)

    heading, first, second = fine("handovers", ADA, dsn).splitlines()

    assert heading.split() == ["when", "user", "epoch", "from", "to", "reason", "exact"]
    assert first.split()[-4:] == ["-", "local", "first_write", "yes"]
    assert second.split()[-6:] == [
        "2",
        "local",
        "cloud",
        str(ADAS_MACHINE),
        "activated",
        "yes",
    ]
    assert len(fine("handovers", dsn, "--limit", "1").splitlines()) == 2


def test_handovers_as_json(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)

    history = json.loads(fine("handovers", ADA, dsn, "--json"))

    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1]["to_machine_id"] == str(ADAS_MACHINE)
    assert json.loads(fine("handovers", str(UUID(int=0)), dsn, "--json")) == []


@pytest.fixture
def intruder(owner: psycopg.Connection[Any]) -> str:
    """A row of Ada's browser that came past the guard while her machine holds: its id."""
    activate(owner)
    owner.execute("alter table public.signals disable trigger user")
    (row,) = owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'BTCUSDT', '1h', 'sell', clock_timestamp()) returning id",
        (ADAS_TRADER,),
    ).fetchall()
    return str(row[0])


def test_audit_of_what_held(owner: psycopg.Connection[Any], dsn: str) -> None:
    proved = "signals: 1 rows proved, 0 contradict the handovers\nhandover history: 0 flaws\n"
    assert fine("audit", dsn) == proved
    assert fine("audit", dsn, "--strict") == proved
    assert fine("audit", dsn, "public.signals") == f"public.{proved}"


def test_audit_of_what_did_not_hold(intruder: str, dsn: str) -> None:
    result = run("audit", dsn)
    assert (result.exit_code, result.stderr) == (1, "")
    summary, heading, row, history = result.stdout.splitlines()
    assert summary == "signals: 1 rows proved, 1 contradict the handovers"
    assert heading.split() == ["row", "source", "epoch", "holder", "reason", "user"]
    holder = ["cloud", str(ADAS_MACHINE)]
    assert row.split() == [intruder, "local", "2", *holder, "wrong_environment", str(ADA)]
    assert history == "handover history: 0 flaws"


def test_audit_of_many_rows_shows_some(
    owner: psycopg.Connection[Any], intruder: str, dsn: str
) -> None:
    owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " select %s, 'X', '1h', 'sell', clock_timestamp() + n * interval '1 hour'"
        " from generate_series(1, 24) n",
        (ADAS_TRADER,),
    )
    lines = run("audit", dsn).stdout.splitlines()
    assert lines[0] == "signals: 1 rows proved, 25 contradict the handovers"
    assert lines[-2:] == ["... and 5 more: --json lists them all", "handover history: 0 flaws"]
    assert len(lines) == 1 + 1 + 20 + 2
    (audit,) = json.loads(run("audit", dsn, "--json").stdout)
    assert len(audit["findings"]) == 25


def test_audit_of_a_broken_history(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)
    owner.execute("alter table arbiter.handovers disable trigger user")
    owner.execute("delete from arbiter.handovers where epoch = 1")
    owner.execute("select arbiter.protect('public.positions')")
    result = run("audit", dsn)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        "signals: 0 rows proved, 0 contradict the handovers, 1 not provable (broken_history)",
        "positions: 0 rows proved, 0 contradict the handovers",
        "handover history: 1 flaws",
        f"user{' ' * 34}epoch  holder{' ' * 38}reason       ",
        f"{ADA}  2      cloud {ADAS_MACHINE}  missing_epoch",
    ]


def test_audit_as_json(intruder: str, dsn: str) -> None:
    result = run("audit", dsn, "--json")
    assert result.exit_code == 1
    (audit,) = json.loads(result.stdout)
    (found,) = audit.pop("findings")
    assert audit == {"table": "signals", "proved": 1, "not_provable": {}}
    assert found["row_key"] == {"id": intruder}
    assert found["holder_machine_id"] == str(ADAS_MACHINE)


def test_audit_says_what_it_cannot_prove(db: Database, dsn: str) -> None:
    owner = db.connect()
    owner.execute("select arbiter.protect('public.signals', p_unowned => 'allow')")
    owner.execute("insert into public.traders (name, is_builtin) values ('Momentum', true)")
    owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " select id, 'X', '1h', 'sell', clock_timestamp() from public.traders"
    )
    expected = "signals: 0 rows proved, 0 contradict the handovers, 1 not provable (unowned)\n"
    assert fine("audit", dsn) == expected + "handover history: 0 flaws\n"
    assert run("audit", dsn, "--strict").exit_code == 1
    owner.execute("select arbiter.protect('public.signals', p_evidence => false)")
    without = "signals: not audited, because it is protected without evidence\n"
    assert fine("audit", dsn) == without
    assert run("audit", dsn, "--strict").exit_code == 1
    assert "without evidence" in not_fine("audit", dsn, "signals")[0]
    owner.execute("select arbiter.unprotect('public.signals')")
    assert fine("audit", dsn) == "no table is protected\n"
    assert not_fine("audit", dsn, "signals") == [
        "arbiter-db: table public.signals is not protected",
        "hint: See arbiter.protections for the tables that are.",
    ]


def test_protect_and_unprotect(db: Database, dsn: str) -> None:
    options = ["--user-path", "user_id", "--verbs", "insert,update", "--machine-column", "by"]
    options += ["--mode", "observe", "--unowned", "allow", "--no-evidence"]

    lines = fine("protect", "public.positions", dsn, *options).splitlines()

    conn = db.connect()
    assert lines[0] == (
        "public.positions is protected: mode observe, user by 'user_id', machine in by,"
        " rows without a user: allow"
    )
    row = conn.execute(
        "select user_path, verbs, machine_column, mode, unowned, evidence from arbiter.protections"
        " where protected_table = 'public.positions'::regclass"
    ).fetchone()
    assert row == ("user_id", ["insert", "update"], "by", "observe", "allow", False)
    assert any("validate constraint" in line for line in lines[1:])
    assert conn.execute("select from pg_constraint where not convalidated").fetchall() == []

    assert "not protected any more" in fine("unprotect", "public.positions", dsn)
    assert conn.execute("select protected_table::text from arbiter.protections").fetchall() == [
        ("signals",)
    ]


def test_protect_passes_the_databases_hint_on(dsn: str) -> None:
    assert len(not_fine("protect", "public.positions", dsn, "--mode", "sometimes")[0]) > 20


def test_register_machines(db: Database, dsn: str) -> None:
    conn = db.connect()
    conn.execute("create table public.apps (app uuid primary key, owner uuid not null, phase text)")

    columns = ["--id-column=app", "--user-column=owner", "--status-column=phase"]
    (line, hint) = not_fine("register-machines", "public.apps", dsn, *columns, "--states", "{}")
    assert line.startswith("arbiter-db: p_states ")
    assert hint.startswith("hint: ")
    states = json.dumps({"up": "running", "down": "stopped"})
    fine("register-machines", "public.apps", dsn, *columns, "--states", states)

    row = conn.execute(
        "select registry::text, id_column, states ->> 'up' from arbiter.registry"
    ).fetchone()
    assert row == ("apps", "app", "running")


# --------------------------------------------------------------------------- observations


def test_observations_says_what_enforce_would_have_rejected(db: Database) -> None:
    owner = db.connect()
    dsn = ["--dsn", db.conninfo()]
    assert fine("observations", *dsn).splitlines() == ["no table is in mode observe"]

    fine("protect", "public.signals", "--mode", "observe", *dsn)
    since, following = fine("observations", *dsn).splitlines()
    assert re.fullmatch(
        r"public\.signals: observed since \S+ \S+; writes that enforce would have rejected: none",
        since,
    )
    assert following == "next: arbiter-db protect public.signals --mode enforce"

    user = add_user(owner)
    start_machine(owner, user)
    for _ in range(2):
        add_signal(owner, user.trader)
    heading, row, said = fine("observations", *dsn).splitlines()
    assert heading.split() == ["table", "hour", "user", "code", "writes", "last"]
    assert row.split()[0] == "public.signals"
    assert row.split()[3:6] == [str(user.id), "cloud_active", "2"]
    assert "; writes that enforce would have rejected: 2, the last at " in said

    shown = json.loads(fine("observations", "--json", *dsn))
    assert [(t["table"], t["writes"]) for t in shown["tables"]] == [("public.signals", 2)]
    assert [(o["user_id"], o["writes"]) for o in shown["observations"]] == [(str(user.id), 2)]


# --------------------------------------------------------------------------- changed tables


def test_an_audit_of_all_goes_on_after_a_table_that_has_changed(db: Database) -> None:
    owner = db.connect()
    dsn = ["--dsn", db.conninfo()]
    fine("protect", "public.positions", "--verbs", "insert,update", *dsn)
    owner.execute("alter table public.signals rename machine_id to fly_id")

    everything = run("audit", *dsn)
    assert everything.exit_code == 1
    assert (
        everything.stdout.splitlines()[0] == "positions: 0 rows proved, 0 contradict the handovers"
    )
    problem = "table public.signals has no column machine_id"
    assert everything.stderr == f"signals: {problem}; not audited, see arbiter.doctor()\n"
    only = run("audit", "public.signals", *dsn)
    assert (only.exit_code, only.stdout) == (1, "")
    assert only.stderr.startswith(f"arbiter-db: {problem}")


def test_an_audit_does_not_ask_what_new_rows_get_for_a_source(db: Database) -> None:
    """A default of the app that is neither local nor cloud is doctor's to find."""
    owner = db.connect()
    add_signal(owner, add_user(owner).trader)
    owner.execute("alter table public.signals alter source set default 'binance'")
    assert "signals: 1 rows proved" in fine("audit", "--dsn", db.conninfo())
    problems = owner.execute("select problem from arbiter.doctor() where state = 'outdated'")
    assert "its default is 'binance'::text" in str(problems.fetchall())
