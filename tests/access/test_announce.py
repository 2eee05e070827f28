"""What is announced at once: handovers and drains, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import ROLES, Templates
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
    rejection,
    rows,
    set_status,
    value,
)

from arbiter_db.demo.embedded import EmbeddedServer

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


def heard(listener: Conn) -> list[str]:
    """What has been announced since the last call, up to now."""
    listener.execute("notify arbiter, 'end'")
    found: list[str] = []
    for notify in listener.notifies(timeout=10):
        if notify.payload == "end":
            return found
        found.append(notify.payload)
    raise AssertionError("the own notification did not come")


def test_a_drain_and_a_handover_are_announced(db: Database, listener: Conn) -> None:
    """Only that they are: any login may listen, so nothing names the user or the machine."""
    user = add_user(db.connect())
    add_signal(browser(db, user), user.trader)
    assert heard(listener) == []  # a lease that begins changes no environment
    machine = add_machine(backend(db), user, "running")
    beat(backend(db), machine)
    assert heard(listener) == ["drain"]
    beat(backend(db), machine)
    assert heard(listener) == ["handover"]


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
    assert heard(listener) == ["handover"]
    assert (lease(owner, user).epoch, lease(owner, user).holder) == (3, "local")


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
    assert found[1].payload == {
        "event": "handover",
        "user_id": str(user.id),
        "epoch": 2,
        "holder": "cloud",
        "machine_id": str(machine),
        "draining": False,
        "draining_to": None,
    }


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


def test_a_broadcast_that_waits_delays_no_write_for_long(db: Database) -> None:
    """Another session holds the lock on Realtime's table for as long as it likes."""
    owner = db.connect()
    owner.execute(REALTIME)
    user = add_user(owner)
    with db.connect(autocommit=False) as other:
        other.execute("lock table realtime.messages in access exclusive mode")
        machine = activate(backend(db), user)
        other.rollback()
    assert lease(owner, user).machine_id == machine
    assert count_rows(owner, "realtime.messages") == 0


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


@pytest.mark.parametrize("role", ["superuser", "nosuperuser", None])
def test_supabases_own_role_counts_where_supabase_is(db: Database, role: str | None) -> None:
    """Another role could call itself so; only a superuser makes one called supabase_admin."""
    superuser = db.connect("postgres")
    superuser.execute(REALTIME)
    superuser.execute(
        "alter table realtime.messages owner to app_owner; grant usage on schema realtime to public"
    )
    user = add_user(superuser)
    with superuser.transaction(force_rollback=True):  # roles are those of other tests, too
        superuser.execute("create role supabase_realtime_admin")
        superuser.execute("grant all on realtime.messages to supabase_realtime_admin")
        superuser.execute("alter function realtime.send owner to supabase_realtime_admin")
        if role:
            superuser.execute(f"create role supabase_admin {role}".encode())
        beat(superuser, add_machine(superuser, user, "running"))
        announced = value(superuser, "select draining_since is not null from arbiter.leases"
                          " where user_id = %s", user.id)  # fmt: skip
        assert announced
        sent = 1 if role == "superuser" else 0
        assert count_rows(superuser, "realtime.messages") == sent


# A queue that is full ----------------------------------------------------------------------------

#: The smallest queue. Before PostgreSQL 17 it has 8 GB on every server, so there the part of it
#: that must be free is made almost all of it.
PAGES = {"max_notify_queue_pages": "64"}
LIMIT = re.compile(r"(pg_notification_queue_usage\(\) <) [0-9.]+")


@pytest.fixture(scope="module")
def small_queue(server: EmbeddedServer) -> Iterator[Templates]:
    """Databases of a server whose queue of notifications is soon full."""
    with EmbeddedServer(server.major, PAGES if server.major >= 17 else {}) as own:
        with psycopg.connect(own.conninfo(), autocommit=True) as conn:
            conn.execute(ROLES)
        with closing(Templates(own)) as templates:
            yield templates


def _change_limit(owner: Conn, limit: str) -> None:
    text = value(owner, "select pg_get_functiondef('arbiter.tg_announce'::regproc)")
    changed, count = LIMIT.subn(rf"\1 {limit}", text)
    assert count == 1
    owner.execute(changed.encode())


def _fill(db: Database) -> None:
    """Any login can: it listens and stays in a transaction, and another one notifies."""
    lazy = db.connect("authenticator", autocommit=False)
    lazy.execute("listen anything")
    lazy.commit()
    lazy.execute("select 1")
    noisy = db.connect("authenticator")
    send = "select pg_notify('anything', n || repeat('x', 7900)) from generate_series(1, 10) as n"
    for _ in range(20):
        try:
            noisy.execute(send)
        except psycopg.errors.ProgramLimitExceeded:
            break


def test_a_full_queue_fails_no_heartbeat(small_queue: Templates) -> None:
    """The commit of whatever notifies then fails."""
    with small_queue.clone("installed") as db:
        owner = db.connect()
        user, other = add_user(owner), add_user(owner)
        _fill(db)
        if owner.info.server_version >= 170000:
            said = rejection(owner.execute, "select pg_notify('full', repeat('x', 7900))")
            assert said.sqlstate == "54000"
        else:
            _change_limit(owner, "0.000001")
        listener = db.connect()
        listener.execute("listen arbiter")
        machine = activate(backend(db), user)
        add_signal(backend(db), user.trader, "cloud", machine)
        assert lease(owner, user).machine_id == machine

        # The twin: with a limit that is never reached it notifies.
        _change_limit(owner, "2")
        running = add_machine(backend(db), other, "running")
        if owner.info.server_version >= 170000:
            assert rejection(beat, backend(db), running).sqlstate == "54000"
        else:
            beat(backend(db), running)
            assert heard(listener) == ["drain"]


def _lapse(owner: Conn, user: User) -> None:
    """The user's machine has been silent for long."""
    machine = lease(owner, user).machine_id
    age(owner, machine, heartbeat=timedelta(minutes=5))
