"""A user with several machines: which of them is shown, and which gets the lease."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import User, add_machine, add_signal, add_user, age, beat, lease, status

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]


@pytest.fixture
def owner(db: Database) -> Conn:
    conn = db.connect()
    conn.execute("alter table public.cloud_machines drop constraint cloud_machines_user_id_key")
    return conn


@pytest.mark.parametrize("newest", [0, 1, 2])
def test_the_one_that_beat_last_is_shown(owner: Conn, newest: int) -> None:
    user = add_user(owner)
    add_signal(owner, user.trader)
    machines = [add_machine(owner, user, "starting") for _ in range(3)]
    silent = add_machine(owner, user, "starting")
    for n, machine in enumerate(machines):
        beat(owner, machine)
        age(owner, machine, heartbeat=timedelta(hours=1 + (n - newest) % 3))
    assert str(status(owner, user.id)["machine_id"]) == str(machines[newest])
    owner.execute("delete from public.cloud_machines where id = any (%s)", (machines,))
    assert str(status(owner, user.id)["machine_id"]) == str(silent)


def test_registering_gives_the_lease_to_the_first_by_id(owner: Conn) -> None:
    """As a heartbeat for both does, in whichever order their rows lie."""
    users: list[User] = [add_user(owner) for _ in range(3)]
    machines = {user: [add_machine(owner, user, "running") for _ in range(3)] for user in users}
    owner.execute("truncate public.cloud_machines cascade")
    triggers = owner.execute(
        "select tgname from pg_trigger where tgrelid = 'public.cloud_machines'::regclass"
        " and starts_with(tgname, 'arbiter_')"
    ).fetchall()
    owner.execute("alter table public.cloud_machines disable trigger user")
    for user in users:  # as from a dump: rows that the triggers have not seen
        for machine in sorted(machines[user], reverse=True):
            owner.execute(
                "insert into public.cloud_machines (id, user_id, status, last_health_check)"
                " values (%s, %s, 'running', now())",
                (machine, user.id),
            )
    for (name,) in triggers:
        enable = "alter table public.cloud_machines enable always trigger {}"
        owner.execute(sql.SQL(enable).format(sql.Identifier(name)))
    for way in ("indexscan", "bitmapscan", "sort"):  # unless an order is asked for
        owner.execute(f"set enable_{way} = off".encode())
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    for user in users:
        assert str(lease(owner, user).draining_to) == min(map(str, machines[user]))
