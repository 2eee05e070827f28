"""Forced row security on what arbiter reads is an error, never a row that is not there.

Definer functions run as arbiter's owner. Where that is no superuser, ``force row level security``
binds it on its own tables, and a machine that a policy hides would count as deleted. So each of
them sets ``row_security = off``, with which the server fails instead of hiding rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from story import activate, add_signal, add_user, backend, rows, value

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

DEFINERS = """
select p.oid::regprocedure::text, p.proconfig
  from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace and p.prosecdef
 order by 1
"""

TABLES = """
create table public.feeds (user_id uuid not null, source text not null default 'local');
create table public.ticks (
  trader_id uuid not null references public.traders (id), day integer not null
) partition by range (day);
create table public.ticks_a partition of public.ticks for values from (0) to (10);
select arbiter.protect('public.ticks');
create table public.ticks_b partition of public.ticks for values from (10) to (20);
grant all on all tables in schema public to service_role;
"""


class Case(NamedTuple):
    """A function, the table whose rows are hidden from it, and a call that must then fail."""

    function: str
    hidden: str
    call: str
    by: str = "client"  # one whom row security does not bind
    before: str = ""


AHEAD = """
alter table public.cloud_machines disable trigger user;
update public.cloud_machines set last_health_check = clock_timestamp() + interval '1 hour';
alter table public.cloud_machines enable trigger user;
"""
MACHINES = "public.cloud_machines"
TRADERS = "public.traders"
CASES = [
    Case("status(text)", MACHINES, "select arbiter.status(%(bob)s)"),
    Case("confirm_takeover(text)", MACHINES, "select arbiter.confirm_takeover(%(bob)s)"),
    Case(
        "register_machines(regclass,name,name,name,name,jsonb,text[],name,text[])",
        MACHINES,
        "select arbiter.register_machines('public.cloud_machines')",
        by="owner",
    ),
    Case(
        "protect(regclass,text,text[],name,text,text,boolean)",
        "public.feeds",
        "select arbiter.protect('public.feeds')",
        by="owner",
    ),
    Case(
        "unprotect(regclass)",
        "arbiter.protections",
        "select arbiter.unprotect('public.signals')",
        by="owner",
    ),
    # A role that the hiding does not bind: a statement that finds no row fires no row trigger.
    Case(
        "tg_settings()",
        "arbiter.settings",
        "update arbiter.settings set poll_interval = '6 s'",
        before="grant select, update on arbiter.settings to service_role",
    ),
    Case(
        "tg_protections()",
        "arbiter.protections",
        "update arbiter.protections set mode = 'observe'",
        before="grant select, update on arbiter.protections to service_role",
    ),
    Case("tg_registry_note()", MACHINES, "truncate public.cloud_machines cascade"),
    # A clock that was set back: by less than the timeout?
    Case(
        "tg_registry_stamp()",
        "arbiter.settings",
        "update public.cloud_machines set last_health_check = now()",
        before=AHEAD,
    ),
    # Another machine than the one that holds: is the holder still healthy?
    Case(
        "tg_registry_activate()",
        MACHINES,
        "insert into public.cloud_machines (user_id, status, last_health_check)"
        " values (%(bob)s, 'running', now())",
        before="alter table public.cloud_machines drop constraint cloud_machines_user_id_key",
    ),
    Case(
        "_guard_1()",
        TRADERS,
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%(adas)s, 'BTCUSDT', '1h', 'buy', now())",
    ),
    Case("_guard_2()", TRADERS, "insert into public.ticks (trader_id, day) values (%(adas)s, 1)"),
    Case(
        "_guard_row_2()",
        TRADERS,
        "insert into public.ticks_b (trader_id, day) values (%(adas)s, 11)",
    ),
    # With the traders hidden both rows would lead to no user, hence to the same one.
    Case("_provenance_1()", TRADERS, "update public.signals set trader_id = %(bobs)s"),
    Case("_provenance_2()", TRADERS, "update public.ticks set trader_id = %(bobs)s"),
]
#: Never called; the functions that are made from them have their settings.
TEMPLATES = {f"_{name}_template()" for name in ("guard", "provenance", "stamp", "note", "activate")}


class Stage:
    """Ada's browser may write and has; bob's machine holds his lease."""

    def __init__(self, db: Database) -> None:
        self.owner = db.connect()
        self.client = backend(db)
        ada, bob = add_user(self.owner), add_user(self.owner)
        add_signal(self.owner, ada.trader)
        self.machine = activate(self.owner, bob)
        self.owner.execute(TABLES.encode())
        self.owner.execute("insert into public.ticks values (%s, 1)", (ada.trader,))
        self.ids = {"bob": bob.id, "adas": ada.trader, "bobs": bob.trader}

    def hide(self, table: str) -> None:
        """From now on those whom row security binds, its owner too, see no row of the table."""
        policies = "select polname from pg_policy where polrelid = %s::regclass"
        for (name,) in rows(self.owner, policies, table):
            self.owner.execute(f'drop policy "{name}" on {table}'.encode())
        self.owner.execute(
            f"alter table {table} enable row level security, force row level security".encode()
        )
        assert value(self.owner, f"select count(*) from {table}") == 0

    def fails(self, case: Case) -> bool:
        """Whether the call fails because of row security."""
        conn = self.owner if case.by == "owner" else self.client
        said, sqlstate = "", None
        try:
            with conn.transaction(force_rollback=True):
                conn.execute(case.call.encode(), self.ids)
        except psycopg.Error as error:
            said, sqlstate = str(error), error.sqlstate
        because = "query would be affected by row-level security policy" in said
        assert because is (sqlstate == "42501"), said
        return because


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


def test_each_definer_function_is_tried(at: Stage) -> None:
    """So that a new one is not forgotten; and each pins what it must."""
    found = {name.removeprefix("arbiter."): settings for name, settings in rows(at.owner, DEFINERS)}
    assert set(found) == {case.function for case in CASES} | TEMPLATES
    for name, settings in found.items():
        assert "row_security=off" in settings, name
        assert "search_path=pg_catalog, pg_temp" in settings, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.split("(")[0])
def test_hidden_rows_are_an_error(at: Stage, case: Case) -> None:
    at.owner.execute(case.before.encode())
    at.hide(case.hidden)
    assert at.fails(case)
    # The twin: it is this setting that makes the call fail.
    at.owner.execute(f"alter function arbiter.{case.function} reset row_security".encode())
    assert not at.fails(case)
