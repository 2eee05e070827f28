"""What the database says is data for a terminal and a log: no markup, no control characters. And no
connection string is quoted back, since a password may be in it."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sessions import TIMEOUT_S
from test_cli import ADA, ADAS_MACHINE, COMMAND, activate, dsn, fine, not_fine, owner, run

import arbiter_db
from arbiter_db import cli
from arbiter_db import console as consoles
from arbiter_db.demo import shell
from arbiter_db.demo.processes import last_lines
from arbiter_db.demo.stage import Client, Stage, make_console
from arbiter_db.text import one_line, printable, without_password

if TYPE_CHECKING:
    from conftest import Database

__all__ = ["dsn", "owner"]  # the fixtures of test_cli, used here too

PACKAGE = Path(arbiter_db.__file__).parent

#: Ends a console's markup that was never begun, colours what follows, and is an emoji's name.
MARKUP = "[/red][red]x :smile:"
#: Clears the screen; the same with a C1 control; paints over a line; hides; turns the order around.
CONTROLS = "\x1b[2J\x9b2J\r\x07\x7f\u202e\u2066\u200b\u2028"
EVIL = MARKUP + CONTROLS
SHOWN = MARKUP + r"\x1b[2J\x9b2J\r\x07\x7f\u202e\u2066\u200b\u2028"
#: As it is after a message's lines were made one.
SHOWN_IN_A_LINE = MARKUP + r"\x1b[2J\x9b2J \x07\x7f\u202e\u2066\u200b"


def assert_plain(text: str) -> None:
    """Nothing in the text but its line ends is more than a character to be seen."""
    assert [char for char in text if not char.isprintable() and char != "\n"] == []


# The rule -----------------------------------------------------------------------------------------


def test_what_is_no_character_to_be_seen_is_shown_as_an_escape() -> None:
    assert printable(EVIL) == SHOWN
    for text in ("abc \\x [red] äß日本 😀 שלום", ""):
        assert printable(text) == text
    assert printable(7) == "7"
    assert printable("a\nb\tc\ud800") == r"a\nb\tc\ud800"
    assert printable("a\nb\r\n", lines=True) == "a\nb\\r\n"
    assert one_line("a\n  b\x1b\r\nc ") == r"a b\x1b c"
    assert printable(SHOWN) == SHOWN
    for code in [*range(32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]:
        assert_plain(printable(chr(code)).replace("\n", "?"))
    for code in (0x34F, 0x115F, 0x17B4, 0x180B, 0x2800, 0x3164, 0xFE0F, 0xFFA0, 0xE0100, 0xE01EF):
        assert printable(f"a{chr(code)}") == "a" + chr(code).encode("unicode_escape").decode()


def test_a_console_and_a_table_take_strings_as_data() -> None:
    out = io.StringIO()
    console = consoles.make_console(file=out, width=1000)
    table = consoles.DataTable(box=None, pad_edge=False)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(consoles.data(EVIL, "red"))
    console.print(table)
    console.print(MARKUP)
    assert out.getvalue().split("\n") == [SHOWN, SHOWN, SHOWN, MARKUP, ""]


def test_only_two_modules_write_to_a_terminal() -> None:
    """The others have neither print nor click.echo, and no console, table or text of rich's own."""
    forbidden = {"print", "Console", "Table", "Text", "from_markup", "from_ansi", "echo", "secho"}
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            seen.add(called)
            if path.name in ("terminal.py", "console.py"):
                continue
            where = f"{path.relative_to(PACKAGE)}:{node.lineno} calls {called}"
            if isinstance(node.func, ast.Attribute) and called == "print":
                # A console's print: markup is off, but a string would keep its control characters.
                is_text = isinstance(node.args[0], ast.JoinedStr) if node.args else False
                assert not is_text, where
            else:
                assert called not in forbidden, where
    assert {"say", "data", "make_console", "Text"} <= seen


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def evil(owner: psycopg.Connection[Any]) -> str:
    """A protected table that is named and keyed to deceive, with a row past its guard; its name."""
    activate(owner)
    name = sql.Identifier("public", EVIL)
    owner.execute(
        sql.SQL("create table {} (key text primary key, user_id uuid not null)").format(name)
    )
    table = name.as_string(owner)
    owner.execute("select arbiter.protect(%s, 'user_id')", (table,))
    owner.execute(sql.SQL("alter table {} disable trigger user").format(name))
    owner.execute(sql.SQL("insert into {} values (%s, %s)").format(name), (EVIL, ADA))
    return table


def test_an_audit_shows_a_table_and_a_key_as_they_are(
    owner: psycopg.Connection[Any], evil: str, dsn: str
) -> None:
    found = run("audit", dsn)
    assert (found.exit_code, found.stderr) == (1, "")
    assert_plain(found.stdout)
    lines = found.stdout.splitlines()
    assert f'"{SHOWN}": 0 rows proved, 1 contradict the handovers' in lines
    (row,) = [line for line in lines if line.startswith(MARKUP)]
    assert row.startswith(f"{SHOWN}  local ")
    owner.execute("select arbiter.protect(%s, 'user_id', p_evidence => false)", (evil,))
    assert f'"{SHOWN}": not audited' in fine("audit", dsn)


def test_an_audit_as_json_has_the_data_and_no_control_character(evil: str, dsn: str) -> None:
    printed = run("audit", dsn, "--json").stdout
    assert_plain(printed)
    found = [audit for audit in json.loads(printed) if audit["table"] == f'"{EVIL}"']
    assert found[0]["findings"][0]["row_key"] == {"key": EVIL}


def test_the_name_of_the_table_in_the_progress_bar(evil: str, dsn: str) -> None:
    """On a terminal, which a bar needs; what rich itself sends there is no part of the name."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(
        [*COMMAND, "audit", dsn], stdout=subprocess.DEVNULL, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # its other end is closed
            pass
        assert process.wait(timeout=TIMEOUT_S) == 1
    os.close(ours)
    assert rf'auditing "{SHOWN}"'.encode() in seen
    assert b"\x1b[2J" not in seen
    assert "\x9b".encode() not in seen


def test_protect_and_its_steps(evil: str, dsn: str) -> None:
    assert_plain(fine("unprotect", evil, dsn))
    printed = fine("protect", evil, dsn, "--user-path", "user_id")
    assert_plain(printed)
    assert printed.splitlines()[0].startswith(f'public."{SHOWN}" is protected: mode enforce, ')
    assert any(line.startswith("alter table") and SHOWN in line for line in printed.splitlines())


def test_status_and_handovers(owner: psycopg.Connection[Any], db: Database, dsn: str) -> None:
    conn = db.connect()
    values = [f"$${EVIL}$$"] * 2
    columns = (
        f"{values[0]}, false, true, {values[0]}, {values[1]}, null, null, {values[0]}, null, 7,"
        " true, clock_timestamp(), '00:00:05'"
    )
    conn.execute(
        "create or replace function arbiter.status(p_user_id text default null)"
        " returns arbiter.execution_status language sql as"
        f" $f$ select row({columns})::arbiter.execution_status $f$".encode()
    )
    printed = fine("status", ADA, dsn)
    assert_plain(printed)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert lines[0] == SHOWN
    for name in ("environment", "code", "machine state"):
        assert f"{name:15}  {SHOWN}" in lines
    assert json.loads(fine("status", ADA, dsn, "--json"))["message"] == EVIL
    conn.execute("alter table arbiter.handovers disable trigger user")
    conn.execute("alter table arbiter.handovers drop constraint handovers_reason_check")
    conn.execute("update arbiter.handovers set reason = %s", (EVIL,))
    printed = fine("handovers", dsn)
    assert_plain(printed)
    assert SHOWN in printed


def test_a_status_that_is_watched(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    badge = cli._badge(
        SimpleNamespace(  # type: ignore[arg-type]
            message=EVIL, environment=EVIL, enforced=True, machine_id=ADAS_MACHINE,
            machine_state=EVIL, heartbeat_age=None, retry_at=None,
        )
    )  # fmt: skip
    assert badge.plain == f"{SHOWN}: environment {SHOWN}, machine {ADAS_MACHINE} {SHOWN}"


@pytest.mark.parametrize(
    "using",
    [
        "message = %s, hint = %s",
        "errcode = '42501', message = %s, hint = %s",
        "errcode = 'WX001', message = %s, hint = %s, detail = '{}'",
    ],
)
def test_an_error_and_its_hint(db: Database, dsn: str, using: str) -> None:
    conn = db.connect()
    literal = sql.Literal(EVIL).as_string(conn)
    conn.execute(
        "create or replace function arbiter.status(p_user_id text default null)"
        " returns arbiter.execution_status language plpgsql as"
        f" $f$ begin raise exception using {using % (literal, literal)}; end $f$".encode()
    )
    message, hint = not_fine("status", ADA, dsn)
    assert SHOWN_IN_A_LINE in message
    assert hint.startswith(f"hint: {SHOWN_IN_A_LINE}")


def test_a_preflight_names_what_does_not_fit(trading_db: Database) -> None:
    conn = trading_db.connect()
    conn.execute(
        sql.SQL(
            "alter table public.signals add column source text not null default 'local'"
            " constraint {} check (source in ('local', 'web'))"
        ).format(sql.Identifier(EVIL))
    )
    result = run("install", "--dsn", trading_db.conninfo())
    assert_plain(result.stdout + result.stderr)


def test_what_an_install_dropped_and_what_uses_arbiter(db: Database, dsn: str) -> None:
    conn = db.connect()
    name = sql.Identifier(EVIL)
    conn.execute(sql.SQL("create view public.{} as select * from arbiter.leases").format(name))
    lines = not_fine("uninstall", "--yes", dsn)
    assert SHOWN_IN_A_LINE in lines[0]
    conn.execute(sql.SQL("drop view public.{}").format(name))
    conn.execute(
        sql.SQL("create function arbiter.{}() returns int language sql return 1").format(name)
    )
    printed = fine("install", dsn)
    assert_plain(printed)
    assert SHOWN in printed


def test_a_terminal_that_lacks_a_character(owner: psycopg.Connection[Any], dsn: str) -> None:
    owner.execute('create table public."日本" (user_id uuid not null)')
    done = subprocess.run(
        [*COMMAND, "protect", 'public."日本"', dsn, "--user-path=user_id"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb'public."\u65e5\u672c" is protected' in done.stdout
    module = subprocess.run(
        [*COMMAND, "web"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert module.stdout == (PACKAGE / "web" / "arbiter.js").read_bytes()


@pytest.mark.parametrize("args", [[f"--{EVIL}"], ["install", f"--{EVIL}"], [EVIL], ["audit", EVIL]])
def test_a_wrong_word_is_quoted_as_it_is(args: list[str], db: Database) -> None:
    result = run(*args, env={"DATABASE_URL": db.conninfo()})
    assert result.exit_code in (1, 2)
    assert_plain(result.stderr)


@pytest.mark.parametrize(
    "args",
    [["protect", "a\udcff"], ["audit", "a\udcff"], ["register-machines", "a\udcff"],
     ["supabase", "export", ".", "--expose", "a\udcff"]],
)  # fmt: skip
def test_an_argument_that_is_no_text_is_named(
    db: Database, args: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell passes any bytes on; Python has those that are no text as half a character."""
    monkeypatch.chdir(tmp_path)
    (line,) = not_fine(*args, env={"DATABASE_URL": db.conninfo()})
    assert line == r"arbiter-db: not a valid text: a\udcff"
    assert list(tmp_path.iterdir()) == []
    assert run("status", "--dsn", "host=\udcff").exit_code == 2


# The demo, other programs and logs ----------------------------------------------------------------


def test_the_demo_shows_what_a_statement_gives(bare_db: Database) -> None:
    conn = bare_db.connect()
    out = io.StringIO()
    console = make_console()
    console.file = out
    console.width = 300
    client = Client("owner", "magenta", conn)
    stage = Stage(console, client, client, since=arbiter_db.demo.story.FIRST_BAR)
    quoted = sql.Literal(EVIL).as_string(conn)
    name = sql.Identifier(EVIL).as_string(conn)
    arbiter_db.demo.stage.STATEMENTS["evil"] = f"select {quoted} as {name}".encode()
    failing = f"do $f$ begin raise using message={quoted},detail={quoted},hint={quoted}; end $f$"
    arbiter_db.demo.stage.STATEMENTS["evil_error"] = failing.encode()
    try:
        stage.do(client, "evil")
        with pytest.raises(arbiter_db.demo.stage.UnexpectedError):
            stage.do(client, "evil_error")
        stage.failure(f"This must not happen: {EVIL}")
        stage.note(EVIL)
        stage.headline(EVIL)
        stage.called(client, EVIL, EVIL)
        stage.title(EVIL, EVIL)
    finally:
        del arbiter_db.demo.stage.STATEMENTS["evil"], arbiter_db.demo.stage.STATEMENTS["evil_error"]
    assert_plain(out.getvalue())
    assert out.getvalue().count(SHOWN) >= 13


def test_what_other_programs_print_is_data_too() -> None:
    assert last_lines("a\x1b[2J\nb\x9b") == "\n  a\\x1b[2J\n  b\\x9b"
    assert_plain(last_lines(EVIL))
    assert "{version}" in shell._GREETING


def test_a_machines_log_has_one_line_for_an_error(
    owner: psycopg.Connection[Any], db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    activate(owner)
    owner.execute(
        "update arbiter.settings set heartbeat_interval = '100 milliseconds',"
        " heartbeat_timeout = '10 seconds'"
    )
    with (
        caplog.at_level(logging.WARNING, logger="arbiter_db.machine"),
        arbiter_db.Machine(lambda: psycopg.connect(db.conninfo()), ADAS_MACHINE),
    ):
        quoted = sql.Literal(f"a\n{EVIL}").as_string(owner)
        owner.execute(
            "create function public.tg_fail() returns trigger language plpgsql as"
            f" $f$ begin raise exception using message = {quoted}; end $f$;"
            " create trigger fail before update on public.cloud_machines"
            " for each row execute function public.tg_fail()".encode()
        )
        waited = threading.Event()
        for _ in range(int(TIMEOUT_S / 0.01)):
            if caplog.records or waited.wait(0.01):
                break
    logged = caplog.records[0].getMessage()
    assert_plain(logged)
    assert "\n" not in logged
    assert f"heartbeat failed: a {SHOWN_IN_A_LINE}" in logged


# Connection strings -------------------------------------------------------------------------------

SECRET = "geheim"

#: Connection strings of which libpq's own error would quote a part, or connect to it.
MALFORMED = [
    SECRET,
    f"host=h password=pa {SECRET}",
    f"passwd={SECRET}",
    f"{SECRET}=x",
    f"postgresql://u:pa%{SECRET}@h/d",
    f"postgresql://u:pa@{SECRET}@127.0.0.1/d",
    f"postgresql://u:{SECRET}/w@127.0.0.1/d",
    f"postgresql://u:p@{SECRET}/w@127.0.0.1:1/d",
    f"postgresql://u:12/{SECRET}@127.0.0.1:1/d",
    f"postgresql+psycopg://u:{SECRET}@h/d",
    f"postgresql://u:{SECRET}@h/d?nonsense=1",
]


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_malformed_connection_string_is_not_quoted(text: str, by: str) -> None:
    for command in (["install"], ["status"], ["uninstall", "--yes"], ["audit"]):
        if by == "option":
            result = run(*command, "--dsn", text)
        else:
            result = run(*command, env={"DATABASE_URL": text})
        assert result.exit_code == 2
        assert "'--dsn' (env var: 'DATABASE_URL')" in result.stderr
        assert SECRET not in result.stderr + result.stdout


def test_a_connection_string_in_the_wrong_place_is_not_quoted() -> None:
    for args in (
        ["install", "--dsn", "host=h", f"password={SECRET}"],
        ["install", "--dsn", "host=h", f"password='{SECRET} {SECRET}'"],
        ["status", f"postgresql://u:{SECRET}@h/d"],
        [f"postgresql://u:{SECRET}@h/d", "install"],
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert SECRET not in result.stderr
    assert without_password("a b=c postgresql://u@h/d") == "a b=c postgresql://u@h/d"
    assert without_password("://u:p@q@h sslpassword = x y") == "://u:***@h sslpassword = *** y"


def test_a_database_that_cannot_be_reached_is_named_without_the_password() -> None:
    uri = f"postgresql://u:{SECRET}@127.0.0.1:1/d"
    (line,) = not_fine("status", env={"DATABASE_URL": uri})
    assert "127.0.0.1" in line
    assert SECRET not in line


def test_a_connection_string_in_the_place_of_a_name_is_not_quoted(db: Database) -> None:
    uri = f"postgresql://u:{SECRET}@h/d"
    parts = conninfo_to_dict(db.conninfo())
    there = {"PGHOST": str(parts["host"]), "PGUSER": str(parts["user"])}
    (line,) = not_fine("status", ADA, env={**there, "PGDATABASE": uri})
    assert 'database "postgresql://u:***@h/d" does not exist' in line
    lines = not_fine("audit", f'"{uri}"', "--dsn", db.conninfo())
    assert SECRET not in "".join(lines)


def test_a_password_among_the_arguments_gets_a_warning(db: Database) -> None:
    """Others see it in the list of processes. A variable shows it to no other user."""
    there = f"{db.conninfo()} password={SECRET}"
    result = run("status", ADA, "--dsn", there)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "Browser mode")
    (warning,) = result.stderr.splitlines()
    assert re.search(r"other users of this machine can see the password .*DATABASE_URL", warning)
    assert SECRET not in warning
    assert fine("status", ADA, env={"DATABASE_URL": there})
    assert fine("status", ADA, "--dsn", db.conninfo(), env={"PGPASSWORD": SECRET})


def test_every_way_of_libpq_names_the_database(db: Database, tmp_path: Path) -> None:
    services = tmp_path / "services"
    services.write_text("[mine]\n" + "\n".join(db.conninfo().split()) + "\n")
    env = {"PGSERVICEFILE": str(services), "PGHOST": str(tmp_path)}
    assert "Browser mode" in fine("status", ADA, env={**env, "PGSERVICE": "mine"})
    assert "Browser mode" in fine("status", ADA, "--dsn=service=mine", env=env)
    assert "Browser mode" in fine("status", ADA, env={**env, "DATABASE_URL": "service=mine"})
    assert "Browser mode" in fine("status", ADA, env={**env, "DATABASE_URL": db.conninfo()})
    # What is typed wins.
    elsewhere = {"DATABASE_URL": f"host={tmp_path}"}
    assert "Browser mode" in fine("status", ADA, "--dsn", db.conninfo(), env=elsewhere)


# Pages --------------------------------------------------------------------------------------------

#: What makes markup or code of a string.
MAKES_MARKUP = re.compile(
    r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|srcdoc|createContextualFragment"
    r"|parseFromString|setHTML|\beval\b|\bFunction\(|javascript:|setAttribute\('on"
    r"|set(?:Timeout|Interval)\(['\"`]"
)


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.js"), *PACKAGE.rglob("*.html")], ids=str)
def test_a_page_makes_no_markup_of_data(path: Path) -> None:
    """It sets textContent. tests/supabase/ has the pages with such data in them."""
    text = path.read_text("utf-8")
    assert MAKES_MARKUP.findall(text) == []
    if path.suffix == ".html":
        assert "Content-Security-Policy\" content=\"default-src 'self'" in text
        assert re.findall(r"<script(?![^>]* src=)|\son\w+=", text) == []
    else:
        assert "textContent" in text
