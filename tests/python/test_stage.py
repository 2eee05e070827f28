"""The demo's stage: what it says when the server answers otherwise than the story expects, and what
it prints on a terminal. test_demo.py has the story itself, as it is printed into a pipe."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from rich.console import Console

from arbiter_db.demo import stage as stage_module
from arbiter_db.demo.stage import Client, Stage, UnexpectedError, make_console

if TYPE_CHECKING:
    from conftest import Database

SINCE = datetime(2026, 1, 5, 9, tzinfo=UTC)

STATEMENTS = {
    "story_signals": b"select count(*) from t where %(trader)s is not null",
    "write": b"insert into t values (1)",
    "write_two": b"insert into t values (1), (2)",
    "fail": b"select 1 / 0",
    "reject": b"do $$ begin raise exception using errcode = 'WX002', message = 'no',"
    b" detail = '{\"retry_at\": \"2026-01-02T03:04:05Z\"}', hint = 'wait'; end $$",
    "show": b"select 7 as number, 'x' as word, null as nothing, true as yes",
    "empty": b"select null::text as nothing",
    "seconds_until": b"select extract(epoch from %(instant)s - clock_timestamp())::float8",
}


@pytest.fixture
def conn(bare_db: Database, monkeypatch: pytest.MonkeyPatch) -> psycopg.Connection[Any]:
    for name, text in STATEMENTS.items():
        monkeypatch.setitem(stage_module.STATEMENTS, name, text)
    conn = bare_db.connect()
    conn.execute("create table t (n int)")
    return conn


def make(conn: psycopg.Connection[Any], **options: Any) -> tuple[Stage, Client, io.StringIO]:
    out = io.StringIO()
    client = Client("owner", "magenta", conn)
    console = Console(file=out, highlight=False, **{"width": 60, **options})
    return Stage(console, client, client, since=SINCE), client, out


def test_what_was_not_expected_is_named(conn: psycopg.Connection[Any]) -> None:
    stage, client, out = make(conn)
    trader = {"trader": "x"}
    for call, said in (
        (lambda: stage.do(client, "write", 2), "1 rows affected, expected 2"),
        (lambda: stage.do(client, "fail"), "owner was rejected, expected success"),
        (lambda: stage.rejected(client, "write", "WX001", **trader),
         "owner was admitted, expected WX001"),
        (lambda: stage.rejected(client, "fail", "WX001", **trader),
         "SQLSTATE 22012, expected WX001"),
        (lambda: stage.admitted(client, "show", 1, **trader),
         "2 signals in the table, expected 3"),
        (lambda: stage.check(False, "so it is"), "so it is"),
        (lambda: client.value("write"), "the last operation didn't produce records"),
    ):  # fmt: skip
        with pytest.raises((UnexpectedError, psycopg.Error)) as caught:
            call()
        assert said in str(caught.value)
    stage.check(True, "so it is not")
    assert (stage.admitted_count, stage.rejected_count) == (0, 0)
    assert "ERROR 22012: division by zero" in out.getvalue()


def test_what_was_expected_is_counted(conn: psycopg.Connection[Any]) -> None:
    stage, client, _ = make(conn)
    stage.admitted(client, "write", 1, trader="x")
    stage.admitted(client, "write_two", 2, trader="x")
    retry_at = stage.rejected(client, "reject", "WX002", trader="x")
    assert retry_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (stage.admitted_count, stage.rejected_count) == (2, 1)


def test_a_statement_its_rows_and_its_end(conn: psycopg.Connection[Any]) -> None:
    stage, client, out = make(conn)
    assert stage.do(client, "show", 1) == [(7, "x", None, True)]
    assert stage.do(client, "empty", 1) == [(None,)]
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "",
        "  owner> select 7 as number, 'x' as word, null as nothing,",
        "         true as yes",
        "         number  word  nothing  yes",
        "              7  x     -        true",
        "         SELECT 1",
        "",
        "  owner> select null::text as nothing",
        "         SELECT 1",
    ]


def test_values_are_shown_for_people(conn: psycopg.Connection[Any]) -> None:
    stage, _, out = make(conn)
    rows = [
        (None, 1, datetime(2026, 1, 5, 9, 20, 0, 123456, UTC), timedelta(seconds=1.256)),
        ("x", 22, datetime(2026, 1, 5, tzinfo=UTC), timedelta(minutes=2)),
    ]
    stage.table(("a", "n", "at", "for"), rows, indent=2)
    assert out.getvalue().splitlines() == [
        "  a   n  at                             for",
        "  -   1  2026-01-05 09:20:00.123+00:00  1.26 s",
        "  x  22  2026-01-05 00:00:00.000+00:00  120 s",
    ]


def test_a_terminal_has_colours(conn: psycopg.Connection[Any]) -> None:
    stage, client, out = make(conn, force_terminal=True, color_system="standard", width=60)
    stage.title("Title", "Why.")
    stage.headline("Head")
    stage.failure("Bad")
    stage.note("Note")
    stage.called(client, "call()", "done")
    stage.do(client, "empty")
    stage.rejected(client, "reject", "WX002", trader="x")
    text = out.getvalue()
    for styled in (
        "\x1b[1m1. Title\x1b[0m \x1b[2m-----",
        "\x1b[94;49mselect\x1b[0m",
        "\x1b[3mWhy.\x1b[0m",
        "\x1b[1mHead\x1b[0m",
        "\x1b[1;31mBad\x1b[0m",
        "\x1b[3mNote\x1b[0m",
        "\x1b[1;35m  owner> \x1b[0mcall()",
        "\x1b[32mdone\x1b[0m",
        "\x1b[32mSELECT 1\x1b[0m",
        "\x1b[1;31mERROR WX002: \x1b[0m\x1b[31mno\x1b[0m",
        "\x1b[1mDETAIL: \x1b[0m",
        "\x1b[1mHINT: \x1b[0mwait",
    ):
        assert styled in text, repr(text)


def test_titles_are_numbered(conn: psycopg.Connection[Any]) -> None:
    stage, _, out = make(conn)
    stage.title("One")
    stage.title("Two", "A reason that is so long that it does not fit into a line of sixty.")
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "",
        f"1. One {'-' * 53}",
        "",
        f"2. Two {'-' * 53}",
        "A reason that is so long that it does not fit into a line of",
        "sixty.",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_wait_is_the_servers(conn: psycopg.Connection[Any], is_terminal: bool) -> None:
    stage, _, out = make(conn, force_terminal=is_terminal)
    (now,) = conn.execute("select clock_timestamp()").fetchone() or (None,)
    assert now is not None
    stage.wait_until(now + timedelta(seconds=0.3), "then")
    (after,) = conn.execute("select clock_timestamp()").fetchone() or (None,)
    assert after >= now + timedelta(seconds=0.3)
    assert re.search(r"\.\.\. -?\d\.\d s pass, until then by the server's clock", out.getvalue())


def test_a_console_for_a_pipe_is_as_wide_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    assert (console.width, console.is_terminal) == (100, False)
    console.print("1 " * 60)
    assert [len(line.rstrip()) for line in capsys.readouterr().out.splitlines()] == [99, 19]


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("100", 100), ("240", 100)])
def test_a_console_on_a_terminal_is_at_most_that_wide(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == width
