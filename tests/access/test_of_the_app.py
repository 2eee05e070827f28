"""What the app or Supabase has of its own decides what arbiter adds beside it, and calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import activate, add_user, backend, rows, value

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: A policy of the app on the registry, and whether arbiter adds one for machines beside it.
POLICIES = {
    "": True,
    "for update to authenticated using (true)": False,
    "for all to authenticated using (true)": False,
    "for update to service_role, authenticated using (true)": False,
    "for update using (true)": False,
    "for update to service_role, anon using (true)": True,
    "for insert to authenticated with check (true)": True,
    "as restrictive for update to authenticated using (true)": True,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_machines_way_is_added_where_there_is_none(db: Database, policy: str) -> None:
    owner = db.connect()
    if policy:
        owner.execute(f"create policy app on public.cloud_machines {policy}".encode())
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    found = {
        name
        for (name,) in rows(
            owner,
            "select polname from pg_policy where polrelid = 'public.cloud_machines'::regclass",
        )
    }
    assert ("arbiter_machine_update" in found) is POLICIES[policy]
    assert found >= {
        "arbiter_registry_insert",
        "arbiter_registry_update",
        "arbiter_registry_delete",
    }


REALTIME = """
create schema realtime;
create table realtime.messages (event text);
create function realtime.send(payload jsonb, event text, topic text, private boolean default true)
returns void language sql security definer
as $$ insert into realtime.messages values (event) $$;
grant usage on schema realtime to public;
"""


@contextmanager
def owner_of_realtime(conn: Conn, role: str) -> Iterator[None]:
    """The role, which is made where it does not exist, owns what broadcasts."""
    is_new = not value(conn, "select count(*) from pg_roles where rolname = %s", role)
    if is_new:
        conn.execute(f"create role {role}".encode())
    conn.execute(f"alter table realtime.messages owner to {role}".encode())
    conn.execute(f"grant usage, create on schema realtime to {role}".encode())
    conn.execute(f"alter function realtime.send owner to {role}".encode())
    yield
    if is_new:
        conn.execute(f"drop owned by {role}; drop role {role}".encode())


@pytest.mark.parametrize(
    ("role", "broadcasts"),
    [
        ("postgres", 2),
        ("supabase_admin", 0),
        ("supabase_realtime_admin", 0),
        ("app_owner", 2),
        ("service_role", 0),
        ("supabase_storage_admin", 0),
    ],
)
def test_only_a_trusted_owners_function_is_called(db: Database, role: str, broadcasts: int) -> None:
    """It runs with the rights of arbiter's owner."""
    superuser = db.connect("postgres")
    superuser.execute(REALTIME)
    with owner_of_realtime(superuser, role):
        activate(backend(db), add_user(db.connect()))
        assert value(superuser, "select count(*) from realtime.messages") == broadcasts


def test_a_role_of_supabase_is_trusted_on_supabase(db: Database) -> None:
    """There supabase_admin is a superuser. A role that may create roles cannot make that."""
    superuser = db.connect("postgres")
    superuser.execute(REALTIME)
    superuser.execute("create role supabase_admin superuser")
    try:
        with owner_of_realtime(superuser, "supabase_realtime_admin"):
            activate(backend(db), add_user(db.connect()))
            assert value(superuser, "select count(*) from realtime.messages") == 2
    finally:
        superuser.execute("drop role supabase_admin")
