"""A project as Supabase makes it: its default privileges open each new object to its roles."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from story import activate, add_user, age, backend, browser, rows, set_status, value

import arbiter_db

from .test_export import PLATFORM, REST, TABLES

if TYPE_CHECKING:
    from conftest import Database

#: As the platform sets them for the role that owns the app's tables, here app_owner.
DEFAULTS = """
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public
  grant all on functions to anon, authenticated, service_role;
alter default privileges in schema public
  grant all on sequences to anon, authenticated, service_role;
"""


def test_doctor_finds_nothing_in_a_fresh_project(bare_db: Database) -> None:
    """TRIGGER for all roles is a note. The user confirms a takeover all the same."""
    owner = bare_db.connect()
    bare_db.connect("postgres").execute(PLATFORM.encode())
    bare_db.connect("postgres").execute("grant usage on schema auth to app_owner")
    bare_db.connect("postgres").execute("grant all on auth.users to app_owner")
    owner.execute(DEFAULTS.encode())
    owner.execute((TABLES + REST).encode())
    arbiter_db.install(bare_db.conninfo())
    owner.execute("select arbiter.expose()")
    may = "select has_table_privilege('anon', 'public.cloud_machines', 'trigger')"
    assert value(owner, may) is True
    found = rows(owner, "select * from arbiter.doctor() where state <> 'ok'")
    assert [(row.object, row.state) for row in found] == [
        ("updates of public.signals", "note"),
        ("grants of trigger on public.cloud_machines", "note"),
        ("grants of trigger on public.signals", "note"),
    ]

    user = add_user(owner)
    machine = activate(backend(bare_db), user)
    set_status(backend(bare_db), machine, "error")
    age(owner, machine, entered_error=timedelta(hours=1))
    confirm = "select environment from public.confirm_takeover()"
    assert value(browser(bare_db, user), confirm) == "local"

    for note in found:
        owner.execute(note.remedy.encode())
    arbiter_db.finish(owner)
    assert rows(owner, "select * from arbiter.doctor() where state <> 'ok'") == []
