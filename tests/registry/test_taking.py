"""Registering takes machines as they are: what was noted stays, what was missed is noted now.

Rows that the registry's triggers have not seen come from a dump, or from another registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    activate,
    add_signal,
    add_user,
    age,
    backend,
    clock,
    one,
    rejection,
    rows,
    set_status,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

TRIGGERS = """
select tgname from pg_trigger
 where tgrelid = 'public.cloud_machines'::regclass and starts_with(tgname, 'arbiter_')
"""
REGISTER = "select arbiter.register_machines('public.cloud_machines')"


@contextmanager
def unseen(conn: Conn) -> Iterator[None]:
    """The registry's triggers are off, and at the end as they were."""
    conn.execute("alter table public.cloud_machines disable trigger user")
    yield
    conn.execute("alter table public.cloud_machines enable trigger user")
    for (name,) in rows(conn, TRIGGERS):
        conn.execute(f"alter table public.cloud_machines enable always trigger {name}".encode())


@pytest.mark.parametrize(
    ("seen", "then", "keeps_left", "error"),
    [
        ("stopped", "stopped", True, None),
        ("stopped", "error", True, "now"),
        ("stopped", "running", None, None),
        ("error", "error", True, "kept"),
        ("error", "running", None, None),
        ("running", "stopped", False, None),
        ("running", "error", False, "now"),
    ],
)
def test_what_was_noted_stays(
    db: Database, seen: str, then: str, keeps_left: bool | None, error: str | None
) -> None:
    owner = db.connect()
    machine = activate(owner, add_user(owner))
    if seen != "running":
        set_status(owner, machine, seen)
    look = "select * from arbiter.machine_notes where machine_id = %s"
    before = one(owner, look, machine)
    with unseen(owner):
        set_status(owner, machine, then)
    assert one(owner, look, machine) == before

    began = clock(owner)
    owner.execute(REGISTER)
    noted = one(owner, look, machine)
    if keeps_left is None:
        assert noted.left_running_at is None
    elif keeps_left:
        assert noted.left_running_at == before.left_running_at
    else:
        assert began < noted.left_running_at < clock(owner)
    if error is None:
        assert noted.entered_error_at is None
    elif error == "kept":
        assert noted.entered_error_at == before.entered_error_at
    else:
        assert began < noted.entered_error_at < clock(owner)
    owner.execute(REGISTER)
    assert one(owner, look, machine) == noted


OTHER_WORDS = '{"error": "stopped", "provisioning": "error", "starting": "starting"}'


@pytest.mark.parametrize("since", ["the words were changed", "a change was missed"])
@pytest.mark.parametrize("then", ["error", "starting"])
def test_an_earlier_error_does_not_count(db: Database, then: str, since: str) -> None:
    """The machine has been stopped in between, so the delay is that of its new error."""
    owner = db.connect()
    owner.execute("update arbiter.settings set error_takeover_confirm = false")
    user = add_user(owner)
    machine = activate(owner, user)
    set_status(owner, machine, "error")
    age(owner, machine, left_running=timedelta(hours=1), entered_error=timedelta(hours=1))
    if since == "the words were changed":
        owner.execute(REGISTER.replace("')", "', p_states => %s)"), (OTHER_WORDS,))
        word = {"error": "provisioning"}.get(then, then)
    else:
        with unseen(owner):
            set_status(owner, machine, "stopped")
        word = then
    began = clock(owner)
    set_status(owner, machine, word)
    noted = one(owner, "select * from arbiter.machine_notes where machine_id = %s", machine)
    if then == "starting":
        assert noted.entered_error_at is None
    else:
        assert began < noted.entered_error_at < clock(owner)
        error = rejection(add_signal, backend(db), user.trader)
        assert error.sqlstate == "WX003"
