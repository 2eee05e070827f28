"""What is announced at once: handovers and drains, and nothing else."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    backend,
    beat,
    browser,
    count_rows,
    lease,
    rows,
    set_status,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: As Supabase has it: a row in a partitioned table, and a warning instead of an error.
REALTIME = """
create schema realtime;
create table realtime.messages (
  topic text not null, event text, payload jsonb, private boolean, extension text not null
);
create function realtime.send(payload jsonb, event text, topic text, private boolean default true)
returns void language plpgsql as $$
begin
  insert into realtime.messages (payload, event, topic, private, extension)
  values (payload, event, topic, private, 'broadcast');
end
$$
"""


@pytest.fixture
def listener(db: Database) -> Conn:
    """A connection that listens."""
    conn = db.connect()
    conn.execute("listen arbiter")
    return conn


def heard(listener: Conn) -> list[dict[str, Any]]:
    """What has been announced since the last call, up to now."""
    listener.execute("notify arbiter, 'end'")
    found: list[dict[str, Any]] = []
    for notify in listener.notifies(timeout=10):
        if notify.payload == "end":
            return found
        found.append(json.loads(notify.payload))
    raise AssertionError("the own notification did not come")


def test_a_drain_and_a_handover_are_announced(db: Database, listener: Conn) -> None:
    """Each names the holder from then on."""
    user = add_user(db.connect())
    add_signal(browser(db, user), user.trader)
    assert heard(listener) == []  # a lease that begins changes no environment
    machine = add_machine(backend(db), user, "running")
    beat(backend(db), machine)
    before = {"user_id": str(user.id), "holder": "local", "machine_id": None}
    drain = {"event": "drain", "epoch": 1, "draining": True, "draining_to": str(machine)}
    assert heard(listener) == [before | drain]
    beat(backend(db), machine)
    after = {"user_id": str(user.id), "holder": "cloud", "machine_id": str(machine)}
    handover = {"event": "handover", "epoch": 2, "draining": False, "draining_to": None}
    assert heard(listener) == [after | handover]


def test_heartbeats_and_writes_are_not_announced(db: Database, listener: Conn) -> None:
    """They come every few seconds, for every machine."""
    user = add_user(db.connect())
    machine = activate(backend(db), user)
    heard(listener)
    for _ in range(3):
        beat(backend(db), machine)
        add_signal(backend(db), user.trader, "cloud", machine)
    set_status(backend(db), machine, "stopping")
    assert heard(listener) == []


def test_a_takeover_is_announced(db: Database, listener: Conn) -> None:
    """By the write that takes over."""
    owner = db.connect()
    user = add_user(owner)
    activate(backend(db), user)
    _lapse(owner, user)
    heard(listener)
    add_signal(browser(db, user), user.trader)
    (found,) = heard(listener)
    assert (found["event"], found["epoch"], found["holder"]) == ("handover", 3, "local")


def test_what_is_rolled_back_is_not_announced(db: Database, listener: Conn) -> None:
    """A notification is part of its transaction."""
    owner = db.connect()
    user = add_user(owner)
    activate(backend(db), user)
    _lapse(owner, user)
    heard(listener)
    conn = browser(db, user)
    with conn.transaction(force_rollback=True):
        add_signal(conn, user.trader)
    assert heard(listener) == []


def test_supabase_broadcasts_to_the_user(db: Database) -> None:
    """On a private topic of that user."""
    owner = db.connect()
    owner.execute(REALTIME)
    user = add_user(owner)
    machine = activate(backend(db), user)
    found = rows(owner, "select * from realtime.messages order by event")
    assert [(row.event, row.topic, row.private) for row in found] == [
        ("drain", f"arbiter:{user.id}", True),
        ("handover", f"arbiter:{user.id}", True),
    ]
    assert found[1].payload["machine_id"] == str(machine)


@pytest.mark.parametrize(
    "breakage",
    [
        "drop table realtime.messages",
        "alter table realtime.messages add check (topic is null)",
        "revoke execute on function realtime.send from public, app_owner",
        "create or replace function realtime.send(payload jsonb, event text, topic text,"
        " private boolean default true) returns void language plpgsql as"
        " $$ begin raise exception 'down'; end $$",
    ],
)
def test_a_broadcast_that_fails_fails_no_write(db: Database, breakage: str) -> None:
    """The handover takes place all the same."""
    owner = db.connect()
    owner.execute(REALTIME)
    owner.execute(breakage.encode())
    user = add_user(owner)
    machine = activate(backend(db), user)
    add_signal(backend(db), user.trader, "cloud", machine)
    assert lease(owner, user).epoch == 2
    assert count_rows(owner, "public.signals") == 1


def test_a_strangers_function_of_that_name_is_not_called(db: Database) -> None:
    """A function runs with the rights of arbiter's owner, so only the owner's own is called."""
    superuser = db.connect("postgres")
    superuser.execute(REALTIME)
    superuser.execute(
        "alter function realtime.send owner to authenticator;"
        "alter table realtime.messages owner to app_owner;"
        "grant usage on schema realtime to app_owner"
    )
    owner = db.connect()
    activate(backend(db), add_user(owner))
    assert count_rows(owner, "realtime.messages") == 0
    superuser.execute("alter function realtime.send owner to app_owner")
    activate(backend(db), add_user(owner))
    assert count_rows(owner, "realtime.messages") == 2


def _lapse(owner: Conn, user: User) -> None:
    """The user's machine has been silent for long."""
    machine = lease(owner, user).machine_id
    age(owner, machine, heartbeat=timedelta(minutes=5))
