"""The command line, word by word: what each command prints and passes on, and what it says when it
is called wrongly."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from story import add_signal, add_user
from test_cli import ADA, ADAS_MACHINE, activate, dsn, fine, not_fine, owner, run

import arbiter_db
from arbiter_db import InstallError, api
from arbiter_db.demo.embedded import EmbeddedServerError
from arbiter_db.install import sql_text

if TYPE_CHECKING:
    from conftest import Database

__all__ = ["dsn", "owner"]  # the fixtures of test_cli, used here too

VERSION = arbiter_db.__version__

AS_OF = "2026-01-05 09:20:00.5+00"
RETRY_AT = "2026-01-05 09:20:27+00"


def shown(instant: str) -> str:
    """An instant as the command line prints it: in the zone of the one who reads."""
    return datetime.fromisoformat(instant).astimezone().isoformat(sep=" ", timespec="milliseconds")


def let_status_be(conn: psycopg.Connection[Any], columns: str) -> None:
    """From now on `arbiter.status()` gives this row."""
    conn.execute(
        "create or replace function arbiter.status(p_user_id text default null)"
        " returns arbiter.execution_status language sql as"
        f" $$ select row({columns})::arbiter.execution_status $$".encode()
    )


COOLING = (
    f"'none', false, true, 'cooling_down', 'Cooling down', '{RETRY_AT}', '{ADAS_MACHINE}',"
    f" 'stopped', '00:01:02.34', 7, true, '{AS_OF}', '00:00:01.5'"
)
QUIET = (
    f"'local', true, true, null, 'Browser mode', null, null, null, null, null, false, '{AS_OF}',"
    " '00:00:05'"
)


# Status -------------------------------------------------------------------------------------------


def test_status_shows_every_column(db: Database, dsn: str) -> None:
    let_status_be(db.connect(), COOLING)
    lines = [line.rstrip() for line in fine("status", dsn).splitlines()]
    assert lines == [
        "Cooling down",
        "environment      none",
        "can write local  no",
        "enforced         yes",
        "code             cooling_down",
        f"retry at         {shown(RETRY_AT)}",
        f"machine id       {ADAS_MACHINE}",
        "machine state    stopped",
        "heartbeat age    62.3 s",
        "epoch            7",
        "draining         yes",
        f"as of            {shown(AS_OF)}",
        "poll interval    1.5 s",
    ]


def test_status_as_json_has_every_column(db: Database, dsn: str) -> None:
    let_status_be(db.connect(), COOLING)
    assert json.loads(fine("status", dsn, "--json")) == {
        "environment": "none",
        "can_write_local": False,
        "enforced": True,
        "code": "cooling_down",
        "message": "Cooling down",
        "retry_at": "2026-01-05T09:20:27+00:00",
        "machine_id": str(ADAS_MACHINE),
        "machine_state": "stopped",
        "heartbeat_age": 62.34,
        "epoch": 7,
        "draining": True,
        "as_of": "2026-01-05T09:20:00.500000+00:00",
        "poll_interval": 1.5,
    }
    let_status_be(db.connect(), QUIET)
    (line,) = fine("status", dsn, "--json").splitlines()
    empty = [name for name, value in json.loads(line).items() if value is None]
    assert empty == ["code", "retry_at", "machine_id", "machine_state", "heartbeat_age", "epoch"]


@pytest.mark.parametrize(
    ("environment", "colour"), [("local", 32), ("cloud", 36), ("none", 33), ("other", None)]
)
def test_a_terminal_shows_the_environment_as_a_colour(
    db: Database, dsn: str, environment: str, colour: int | None
) -> None:
    let_status_be(db.connect(), COOLING.replace("'none'", f"'{environment}'"))
    env = {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": None, "COLUMNS": "200"}
    first, second, *_ = fine("status", dsn, env=env).splitlines()
    style = "1" if colour is None else f"1;{colour}"
    assert first == f"\x1b[{style}mCooling down\x1b[0m"
    assert second.startswith("\x1b[2menvironment")


def test_a_terminal_shows_no_colour_while_arbiter_only_watches(db: Database, dsn: str) -> None:
    watching = QUIET.replace("true, true, null, 'Browser mode'", "true, false, null, 'Watching'")
    let_status_be(db.connect(), watching)
    env = {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": None, "COLUMNS": "200"}
    assert fine("status", dsn, env=env).splitlines()[0] == "\x1b[1mWatching\x1b[0m"
    assert [line.rstrip() for line in fine("status", dsn).splitlines()][:4] == [
        "Watching",
        "environment      local",
        "can write local  yes",
        "enforced         no",
    ]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets --watch look twice; the pauses that it makes, in seconds."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("arbiter_db.cli.time.sleep", pause)
    return pauses


def test_watch_prints_a_line_for_each_look(db: Database, dsn: str, looks: list[float]) -> None:
    let_status_be(db.connect(), COOLING)
    line = (
        f"Cooling down: environment none, machine {ADAS_MACHINE} stopped, heartbeat 62.3 s ago,"
        f" retry at {shown(RETRY_AT)}"
    )
    assert fine("status", dsn, "--watch").splitlines() == [line, line]
    assert looks == [1.5, 1.5]
    looks.clear()
    let_status_be(db.connect(), QUIET)
    assert fine("status", dsn, "--watch") == 2 * "Browser mode: environment local\n"
    assert looks == [5.0, 5.0]


@pytest.mark.parametrize(
    ("interval", "pause"),
    [("-1 hour", 0.1), ("0", 0.1), ("50 ms", 0.1), ("60 s", 60.0), ("61 s", 60.0),
     ("100000 years", 60.0)],
)  # fmt: skip
def test_watch_looks_within_reason(
    db: Database, dsn: str, looks: list[float], interval: str, pause: float
) -> None:
    """arbiter's settings have bounds of their own; a function in their place might not."""
    let_status_be(db.connect(), QUIET.replace("'00:00:05'", f"'{interval}'"))
    fine("status", dsn, "--watch")
    assert looks == [pause, pause]


@pytest.mark.usefixtures("looks")
def test_watch_prints_json_in_lines(db: Database, dsn: str) -> None:
    let_status_be(db.connect(), COOLING)
    expected = json.loads(fine("status", dsn, "--json"))
    lines = fine("status", dsn, "--watch", "--json").splitlines()
    assert [json.loads(line) for line in lines] == [expected, expected]


def test_status_is_of_the_user_that_is_named(owner: psycopg.Connection[Any], dsn: str) -> None:
    activate(owner)
    assert json.loads(fine("status", ADA, dsn, "--json"))["epoch"] == 2
    other = "b0b00000-0000-4000-8000-000000000002"
    assert json.loads(fine("status", other, dsn, "--json"))["epoch"] is None


# Handovers and audits -----------------------------------------------------------------------------


def test_handovers_show_every_column(
    db: Database, owner: psycopg.Connection[Any], dsn: str
) -> None:
    with db.connect(autocommit=False) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.execute(
            "insert into public.cloud_machines (id, user_id, status) values (%s, %s, 'running')",
            (ADAS_MACHINE, ADA),
        )
        api.heartbeat(conn, ADAS_MACHINE)
    with db.connect(autocommit=False) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        api.heartbeat(conn, ADAS_MACHINE)
    owner.execute("update public.cloud_machines set status = 'stopped'")
    owner.execute("update arbiter.machine_notes set left_running_at = now() - interval '1 hour'")
    (trader,) = owner.execute("select id from public.traders where user_id = %s", (ADA,)).fetchall()
    add_signal(owner, *trader)
    first, second, third = api.handovers(owner)
    lines = [line.split() for line in fine("handovers", dsn).splitlines()]
    assert lines[1:] == [
        [*shown(str(first.handed_over_at)).split(), str(ADA), "1", "-", "local", "first_write",
         "yes"],
        [*shown(str(second.handed_over_at)).split(), str(ADA), "2", "local", "cloud",
         str(ADAS_MACHINE), "activated", "no"],
        [*shown(str(third.handed_over_at)).split(), str(ADA), "3", "cloud", str(ADAS_MACHINE),
         "local", "machine_stopped", "yes"],
    ]  # fmt: skip
    rows = json.loads(fine("handovers", dsn, "--json"))
    assert rows[1] == {
        "user_id": str(ADA),
        "epoch": 2,
        "from_holder": "local",
        "from_machine_id": None,
        "to_holder": "cloud",
        "to_machine_id": str(ADAS_MACHINE),
        "reason": "activated",
        "handed_over_at": second.handed_over_at.isoformat(),
        "xid": second.xid,
        "snapshot": second.snapshot,
        "exact": False,
    }
    assert json.loads(fine("handovers", dsn, "--json", "--limit", "1")) == rows[2:]
    assert fine("handovers", dsn, "--limit", "1").splitlines()[1].split()[3] == "3"


def break_history(conn: psycopg.Connection[Any], users: int) -> None:
    """Leave that many users without their first epoch."""
    conn.execute("alter table arbiter.handovers disable trigger user")
    for _ in range(1, users):
        add_signal(conn, add_user(conn).trader)
    conn.execute("delete from arbiter.handovers")


@pytest.mark.parametrize(("users", "listed", "more"), [(20, 20, 0), (21, 20, 1)])
def test_audit_lists_twenty_flaws(
    db: Database, owner: psycopg.Connection[Any], dsn: str, users: int, listed: int, more: int
) -> None:
    break_history(owner, users)
    found = run("audit", dsn)
    assert found.exit_code == 1
    summary, history, heading, *rows = found.stdout.splitlines()
    assert summary == (
        f"signals: 0 rows proved, 0 contradict the handovers, {users} not provable (broken_history)"
    )
    assert history == f"handover history: {users} flaws"
    assert heading.split() == ["user", "epoch", "holder", "reason"]
    if more:
        assert rows.pop() == f"... and {more} more: --json lists them all"
    assert len(rows) == listed
    assert all(row.split()[1:] == ["1", "local", "missing_epoch"] for row in rows), rows[0]


# Usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["status", "postgresql://u:secret@h/d"],
            "Invalid value for '[USER]': a connection string is given by --dsn.",
        ),
        (["handovers", "--limit", "0"], "Invalid value for '--limit': 0 is not in the range x>=1."),
        (
            ["status", "--dsn", "nonsense"],
            "Invalid value for '--dsn' (env var: 'DATABASE_URL'): not a connection string: a URI",
        ),
        (["install", "--dsn", "a=b"], "not a connection string: a URI (postgresql://user@host/"),
        (["install", "--dsn", "postgresql://u:a@b@h/d"], "this URI has no valid host, port and "),
        (["protect"], "Missing argument 'TABLE'."),
        (["register-machines", "t", "--states", "{"], "Invalid value for '--states': not JSON: "),
        (["register-machines", "t", "--states", "1"], "'--states': not a JSON object"),
        (["demo", "--rows", "-1"], "Invalid value for '--rows': -1 is not in the range x>=0."),
        (["demo", "--port", "65536"], "65536 is not in the range 0<=x<=65535."),
        (["supabase", "export"], "Missing argument 'DIRECTORY'."),
        (["nonsense"], "No such command 'nonsense'."),
    ],
)
def test_wrong_usage_is_named(args: list[str], said: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["Per user, browser xor cloud", "Install arbiter, or upgrade it.", "Say who may"]),
        (["install"], ["--dsn DSN", "The rest comes from PGHOST, PGUSER, PGPASSWORD", "cut short",
                       "DATABASE_URL", "Other users of this machine can see what is written here"]),
        (["uninstall"], ["--drop-columns", "Also drop the columns", "--yes", "Do not ask."]),
        (["status"], ["[USER]", "--watch", "Go on until Ctrl-C", "--json", "intervals in seconds"]),
        (["handovers"], ["--limit", "Only the newest ones.", "newest last"]),
        (["audit"], ["[TABLE]...", "--strict", "Exit 1 also when", "--json"]),
        (["protect"], ["A column, or a path", "[first: insert]", "insert, or insert,update.",
                       "[first: machine_id]", "[first: enforce]", "enforce or observe.",
                       "[first: reject]", "reject or allow.", "--no-evidence", "[first: with]",
                       "An option that is left out keeps the value that it has"]),
        (["register-machines"], ["[default: id]", "[default: user_id]", "[default: status]",
                                 "[default: last_health_check]", "--states JSON",
                                 '{"up": "running"}']),
        (["supabase", "export"], ["--expose SCHEMA", "execution_status()", "DIRECTORY"]),
        (["demo"], ["--real-time", "Keep the default periods", "[default: 10000", "[default: 18]",
                    "Serve a page instead", "a free one if left out", "PostgreSQL's version."]),
        (["web"], ["src/arbiter.js"]),
    ],
)  # fmt: skip
def test_help_tells_the_options(args: list[str], words: list[str]) -> None:
    said = " ".join(fine(*args, "--help", terminal_width=200).split())
    missing = [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said)]
    assert missing == []


# Where the database is ----------------------------------------------------------------------------


def environment(db: Database) -> dict[str, str]:
    """How libpq reaches a database, by its variables."""
    names = {"dbname": "PGDATABASE", "host": "PGHOST", "port": "PGPORT", "user": "PGUSER"}
    found = conninfo_to_dict(db.conninfo())
    return {variable: str(found[name]) for name, variable in names.items()}


def test_what_the_dsn_says_wins_and_the_rest_comes_from_the_environment(
    db: Database, bare_db: Database, tmp_path: Path
) -> None:
    there = environment(db)
    assert "local" in fine("status", ADA, f"--dsn=dbname={db.name}", env=environment(bare_db))
    elsewhere = {**there, "PGHOST": str(tmp_path), "PGDATABASE": "nothing"}
    assert "local" in fine("status", ADA, f"--dsn={db.conninfo()}", env=elsewhere)
    host = there["PGHOST"].replace("/", "%2F")
    uri = f"postgresql://{there['PGUSER']}@{host}:{there['PGPORT']}/{db.name}"
    assert "local" in fine("status", ADA, "--dsn", uri, env=elsewhere)


def test_no_other_variable_names_the_database(db: Database, tmp_path: Path) -> None:
    env = {"SUPABASE_DB_URL": db.conninfo(), "PGHOST": str(tmp_path)}
    (line,) = not_fine("status", ADA, env=env)
    assert line.startswith("arbiter-db: cannot reach the database: ")


# What the database says ---------------------------------------------------------------------------


def let_status_fail(conn: psycopg.Connection[Any], using: str) -> None:
    conn.execute(
        "create or replace function arbiter.status(p_user_id text default null)"
        " returns arbiter.execution_status language plpgsql as"
        f" $$ begin raise exception using {using}; end $$".encode()
    )


@pytest.mark.parametrize(
    ("using", "lines"),
    [
        ("message = 'arbiter: a\n b', hint = 'do\n this'", ["arbiter-db: a b", "hint: do this"]),
        ("message = 'not of arbiter: this'", ["arbiter-db: not of arbiter: this"]),
        ("errcode = '55P03', message = 'it is busy'", ["arbiter-db: it is busy"]),
        (
            "errcode = '42501', message = 'permission denied'",
            ["arbiter-db: missing rights: permission denied",
             "hint: Connect as a role that has the right (--dsn, PGUSER)."],
        ),
        (
            "errcode = '42501', message = 'no', hint = 'Ask.'",
            ["arbiter-db: missing rights: no", "hint: Ask."],
        ),
        (
            "errcode = 'WX001', message = 'arbiter: cloud active', detail = '{}'",
            ["arbiter-db: cloud active (WX001 cloud_active)"],
        ),
        (
            "errcode = 'WX002', message = 'arbiter: cooling', hint = 'Wait.',"
            f" detail = '{{\"retry_at\": \"{RETRY_AT.replace(' ', 'T')}:00\"}}'",
            ["arbiter-db: cooling (WX002 cooling_down, retry at"
             f" {datetime.fromisoformat(RETRY_AT).astimezone():%H:%M:%S})", "hint: Wait."],
        ),
    ],
)  # fmt: skip
def test_an_error_is_a_line_and_its_hint_another(
    db: Database, dsn: str, using: str, lines: list[str]
) -> None:
    let_status_fail(db.connect(), using)
    assert not_fine("status", ADA, dsn) == lines


def test_an_error_of_the_client_is_a_line_too(dsn: str) -> None:
    (line,) = not_fine("protect", "a\0b", dsn)
    assert line == "arbiter-db: PostgreSQL text fields cannot contain NUL (0x00) bytes"


# What is passed on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "question"),
    [
        ([], "Drop the handover history? [y/N]: "),
        (
            ["--drop-columns"],
            "Drop the handover history and the columns that arbiter added to your tables? [y/N]: ",
        ),
    ],
)
def test_uninstall_asks_before_it_does_anything(
    db: Database, dsn: str, options: list[str], question: str
) -> None:
    result = run("uninstall", dsn, *options, input="\n")
    assert (result.exit_code, result.stdout) == (1, question + "\n")
    assert result.stderr == "Aborted!\n"
    assert api.version(db.connect()) == VERSION
    said = fine("uninstall", dsn, *options, input="y\n")
    assert said.startswith(question + "y\n" if "\ny" in said else question)
    assert said.splitlines()[-1] == "arbiter is not installed any more"
    row = db.connect().execute("select to_regnamespace('arbiter')").fetchone()
    assert row == (None,)


def test_protect_has_the_databases_defaults(db: Database, dsn: str) -> None:
    conn = db.connect()
    conn.execute("select arbiter.unprotect('public.signals')")
    lines = fine("protect", "public.signals", dsn).splitlines()
    assert lines[0] == (
        "public.signals is protected: mode enforce, user by 'trader_id.user_id', machine in"
        " machine_id, rows without a user: reject"
    )
    row = conn.execute(
        "select user_path, verbs, machine_column, mode, unowned, evidence from arbiter.protections"
    ).fetchone()
    assert row == ("trader_id.user_id", ["insert"], "machine_id", "enforce", "reject", True)
    assert fine("unprotect", "public.signals", dsn) == (
        "public.signals is not protected any more\n"
    )


def test_protect_takes_verbs_with_spaces(db: Database, dsn: str) -> None:
    fine("protect", "public.signals", dsn, "--verbs", " insert , update ")
    row = db.connect().execute("select verbs from arbiter.protections").fetchone()
    assert row == (["insert", "update"],)


def test_register_machines_passes_every_name_on(db: Database, dsn: str) -> None:
    conn = db.connect()
    query = (
        "select registry::text, id_column, user_column, status_column, heartbeat_column, states,"
        " health_column, healthy from arbiter.registry"
    )
    before = conn.execute(query).fetchone()
    assert fine("register-machines", "public.cloud_machines", dsn) == (
        "public.cloud_machines is the registry of machines\n"
    )
    assert conn.execute(query).fetchone() == before
    conn.execute(
        "create table public.apps (app uuid primary key, who uuid not null, phase text, probe text)"
    )
    fine(
        "register-machines", "public.apps", dsn, "--id-column=app", "--user-column=who",
        "--status-column=phase", "--heartbeat-column=seen",
        "--states", '{"up": "running", "down": "stopped"}',
        "--health-column=probe", "--healthy=passing", "--healthy=warning",
    )  # fmt: skip
    row = conn.execute(query).fetchone()
    assert row is not None
    assert row[:5] == ("apps", "app", "who", "phase", "seen")
    assert row[5]["up"] == "running"
    assert row[6:] == ("probe", ["passing", "warning"])


def test_export_prints_what_it_has_written(tmp_path: Path) -> None:
    lines = fine("supabase", "export", tmp_path, "--expose", "api").splitlines()
    assert lines == sorted(map(str, tmp_path.iterdir()))
    assert len(lines) == 2
    assert "select arbiter.expose('api');" in Path(lines[0]).read_text("utf-8")
    assert fine("supabase", "export", tmp_path, "--expose", "api") == (
        f"{tmp_path} has arbiter {VERSION} already\n"
    )
    assert not_fine("supabase", "export", tmp_path / "no") == [
        f"arbiter-db: {tmp_path / 'no'} is not a directory",
        "hint: Name the project's supabase/migrations; `supabase init` makes a project.",
    ]


def test_the_script_is_printed_without_a_further_line_end() -> None:
    assert fine("sql") == sql_text()
    assert not sql_text().endswith("\n\n")


# The demo -----------------------------------------------------------------------------------------


class Played:
    """A demo that notes how it is started."""

    def __init__(self, answer: int | Exception) -> None:
        self.answer = answer
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> int:
        self.calls.append(options)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int | Exception], Played]:
    def replace(target: str, answer: int | Exception) -> Played:
        player = Played(answer)
        monkeypatch.setattr(target, player)
        return player

    return replace


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_options_and_its_exit_code_on(
    played: Callable[[str, int | Exception], Played], code: int
) -> None:
    player = played("arbiter_db.demo.story.run", code)
    assert run("demo").exit_code == code
    assert run("demo", "--real-time", "--rows", "0", "--major", "15").exit_code == code
    assert player.calls == [
        {"real_time": False, "rows": 10_000, "major": 18},
        {"real_time": True, "rows": 0, "major": 15},
    ]


@pytest.mark.parametrize("code", [0, 1])
def test_demo_as_a_page_fetches_and_passes_its_options_on(
    played: Callable[[str, int | Exception], Played], code: int
) -> None:
    fetch = played("arbiter_db.demo.gateway.fetch", 0)
    player = played("arbiter_db.demo.web.run", code)
    assert run("demo", "--web").exit_code == code
    options = ["--port", "8123", "--real-time", "--major", "17"]
    assert run("demo", "--web", *options).exit_code == code
    assert player.calls == [
        {"port": 0, "real_time": False, "major": 18},
        {"port": 8123, "real_time": True, "major": 17},
    ]
    assert len(fetch.calls) == 2


def test_demo_says_in_a_line_what_is_missing(
    played: Callable[[str, int | Exception], Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    from arbiter_db.demo.gateway import GatewayError

    played("arbiter_db.demo.story.run", EmbeddedServerError("no server"))
    assert not_fine("demo") == ["arbiter-db: no server"]
    played("arbiter_db.demo.story.run", InstallError("no install", hint="Try."))
    assert not_fine("demo") == ["arbiter-db: no install", "hint: Try."]
    played("arbiter_db.demo.web.run", EmbeddedServerError("no server"))
    played("arbiter_db.demo.gateway.fetch", GatewayError("no npm"))
    assert not_fine("demo", "--web") == ["arbiter-db: no npm"]
    played("arbiter_db.demo.gateway.fetch", 0)
    assert not_fine("demo", "--web") == ["arbiter-db: no server"]
    monkeypatch.delitem(sys.modules, "arbiter_db.demo.gateway")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert not_fine("demo", "--web") == [
        "arbiter-db: --web needs aiohttp: pip install 'arbiter-db[demo]'"
    ]
