"""``arbiter.status`` has the same columns and words in SQL, Python and TypeScript."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from codes import BADGES
from story import activate, add_user, backend, rejection, set_status

import arbiter_db
from arbiter_db import Status

if TYPE_CHECKING:
    from conftest import Database

#: The words of the columns that have few.
WORDS = {
    "environment": {"local", "cloud", "none"},
    "code": {code for code in BADGES if code is not None},
    "machine_state": {"starting", "running", "stopping", "stopped", "error", "deleted"},
}

#: The status word of the demo's app that stands for each state; a machine that is gone has none.
APPS_WORDS = {
    "starting": "provisioning",
    "running": "running",
    "stopping": "stopping",
    "stopped": "stopped",
    "error": "error",
}


def columns_of(db: Database, query: str) -> list[str]:
    cur = db.connect("postgres").execute(query.encode())
    assert cur.description is not None
    return [column.name for column in cur.description]


def typescript() -> dict[str, str]:
    """The columns of ExecutionStatus with their types."""
    file = Path(arbiter_db.__file__).parent / "web" / "arbiter.d.ts"
    [body] = re.findall(r"interface ExecutionStatus \{(.*?)\n\}", file.read_text("utf-8"), re.S)
    return dict(re.findall(r"readonly (\w+): (.*?);", body))


def python_docs() -> dict[str, str]:
    """The text below each field of Status."""
    source = inspect.getsource(Status)
    return dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.M | re.S))


def test_the_columns_are_the_same(db: Database) -> None:
    columns = columns_of(db, "select (s).* from (select null::arbiter.execution_status) as t (s)")
    assert [field.name for field in dataclasses.fields(Status)] == columns
    assert list(typescript()) == columns
    db.connect().execute("select arbiter.expose('public')")
    user = add_user(db.connect())
    for function in ("arbiter.status", "public.execution_status"):
        assert columns_of(db, f"select * from {function}('{user.id}')") == columns


def test_what_may_be_missing_is_the_same() -> None:
    optional = {f.name for f in dataclasses.fields(Status) if "None" in str(f.type)}
    assert {name for name, text in typescript().items() if "| null" in text} == optional


@pytest.mark.parametrize("column", WORDS)
def test_typescript_names_the_words(column: str) -> None:
    assert set(re.findall(r"'(\w+)'", typescript()[column])) == WORDS[column]


@pytest.mark.parametrize("column", ["environment", "machine_state"])
def test_python_names_the_words(column: str) -> None:
    assert set(re.findall(r"`(\w+)`", python_docs()[column])) == WORDS[column]


def test_sql_says_each_machine_state(db: Database) -> None:
    owner = db.connect()
    user = add_user(owner)
    machine = activate(backend(db), user)
    seen = set()
    for state, word in APPS_WORDS.items():
        set_status(owner, machine, word)
        assert arbiter_db.status(owner, user_id=user.id).machine_state == state
        seen.add(state)
    owner.execute("delete from public.cloud_machines where id = %s", (machine,))
    assert arbiter_db.status(owner, user_id=user.id).machine_state == "deleted"
    assert seen | {"deleted"} == WORDS["machine_state"]


def test_sql_names_the_machine_states_that_an_app_may_map_to(db: Database) -> None:
    def register(conn: psycopg.Connection[object]) -> None:
        arbiter_db.register_machines(conn, "public.cloud_machines", states={"up": "flying"})

    error = rejection(register, db.connect())
    assert error.sqlstate == "22023"
    named = re.findall(r"\w+", (error.diag.message_hint or "").split("are ")[1])
    assert set(named) == WORDS["machine_state"] - {"deleted"}
