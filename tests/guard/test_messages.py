"""Every error that arbiter raises, in two tables: what is called, and exactly what is said then.

That no error is left out is checked against sql/ itself, read by the server's parser: each call of
``_fail`` and each text of a hint must be one that a row of a table gets to see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pglast
import psycopg
import pytest
from codes import MESSAGES, SQLSTATES
from pglast import ast
from sql_files import FILES, calls, literals, statements
from story import (
    User,
    activate,
    add_machine,
    add_signal,
    add_trader,
    add_user,
    age,
    as_detail,
    beat,
    browser,
    detail_of,
    lease,
    one,
    rejection,
    set_status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

# -- errors outside the class WX ------------------------------------------------------------------

TABLES = """
create table public.apart (user_id uuid, n integer);
create table public.wide (user_id uuid, trader_id uuid references public.traders, plain uuid);
create table public.loose (n integer);
create table public.of_two (
  trader_id uuid references public.traders, copied_from uuid references public.traders);
create table public.names (id uuid primary key, user_id numeric);
create table public.of_text (name_id uuid references public.names);
create table public.words (user_id uuid, source integer);
create table public.by_default (user_id uuid, source text default 'binance');
create table public.by_key (user_id uuid, source text references public.feeds);
create table public.by_check (user_id uuid, source text, constraint feed check (source <> 'cloud'));
create table public.by_data (user_id uuid, source text);
insert into public.by_data values (gen_random_uuid(), 'binance');
create table public.elsewhere (user_id uuid, machine_id uuid references public.traders);
create table public.parent (user_id uuid not null);
create table public.child () inherits (public.parent);
create table public.twice (
  id uuid, user_id uuid, status text, last_health_check timestamptz);
create table public.parted (id uuid primary key, user_id uuid, status text) partition by hash (id);
select arbiter.protect('public.child');
select arbiter.protect('public.apart', p_evidence => false);
"""
FOREIGN = """
create table public.not_ours (user_id uuid);
create table public.feeds (word text primary key);
create function public.tg_foreign() returns trigger language plpgsql
  as 'begin return new; end';
alter function public.tg_foreign() owner to service_role;
"""


@dataclass(frozen=True)
class Failure:
    """A call and what it says. ``{user}`` and ``{machine}`` stand for the ids of the stage."""

    call: str
    sqlstate: str
    message: str
    hint: str
    setup: str = ""
    by: str = "app_owner"
    between: str = ""  # done by another session, after the snapshot of the caller
    detail: str | None = None
    since: int = 15


NEW_KEY = """
alter table public.wide drop constraint wide_trader_id_fkey,
  add constraint wide_trader_id_fkey foreign key (trader_id) references public.traders
"""
TOKEN = (
    "select set_config('request.jwt.claims',"
    """ '{{"sub": "{user}", "machine_id": "{machine}"}}', true);"""
    " update public.cloud_machines set "
)
NO_REGISTRY = "delete from arbiter.registry"
PROTECT_HINT = (
    "p_verbs is {{insert}} or {{insert,update}}; p_mode enforce or observe; p_unowned reject or"
    " allow. What is left out stays as it is."
)
RENAME = "Rename that column; nothing was changed."


def until(name: str) -> str:
    """The files of an install up to this one."""
    assert name in [path.name for path in FILES]
    return "".join(path.read_text("ascii") for path in FILES if path.name <= name)


FAILURES = {
    # 00_owner
    "another owner": Failure(
        until("00_owner.sql"),
        "42501",
        "arbiter: schema arbiter belongs to app_owner, who has not the rights of postgres",
        "If arbiter was installed as app_owner, connect as app_owner. If not, find out who made it,"
        " and drop it. Nothing was changed.",
        by="postgres",
    ),
    # 01_basics
    "another type": Failure(
        "select arbiter.protect('public.words')",
        "42804",
        "arbiter: column source of table public.words is integer, it must be text or character"
        " varying",
        "Rename that column, or name another one in the call; nothing was changed.",
    ),
    "ids of another type": Failure(
        "select arbiter.protect('public.names')",
        "42804",
        "arbiter: column user_id of table public.names is numeric, an id must be uuid or text or"
        " character varying or smallint or integer or bigint",
        "arbiter compares the text of ids. Change the type of that column, or name another one in"
        " the call; nothing was changed.",
    ),
    "ids that the registry cannot have": Failure(
        "select arbiter.protect('public.apart', p_user_path => 'n')",
        "42804",
        "arbiter: column n of table public.apart is integer, but column user_id of the registry"
        " public.cloud_machines is uuid",
        "Give both the same type. A column that arbiter has added: unprotect the table, drop the"
        " column, register the machines, protect again. Nothing was changed.",
    ),
    "virtual column": Failure(
        "select arbiter.protect('public.loose')",
        "0A000",
        "arbiter: column user_id of table public.loose is a virtual generated column",
        "Make it stored, or name another one in the call; nothing was changed.",
        setup="alter table public.loose"
        " add user_id uuid generated always as ('00000000-0000-0000-0000-000000000000') virtual",
        since=18,
    ),
    "no column": Failure(
        "select arbiter.protect('public.wide', 'nobody')",
        "42703",
        "arbiter: table public.wide has no column nobody",
        "Name the column in the call; nothing was changed.",
    ),
    # 02_record
    "a name that is taken": Failure(
        "select arbiter.protect('public.wide', 'user_id')",
        "42710",
        "arbiter: table public.wide has a trigger arbiter_guard_insert that arbiter has not made",
        "Drop that trigger, or rename it; nothing was changed.",
        setup="create trigger arbiter_guard_insert before insert on public.wide"
        " for each row execute function suppress_redundant_updates_trigger()",
    ),
    # 03_trust
    "no such table": Failure(
        "select arbiter.protect(0::regclass)",
        "42P01",
        "arbiter: there is no table with the number 0",
        "Name the table in the call; nothing was changed.",
    ),
    "not ours": Failure(
        "select arbiter.protect('public.not_ours')",
        "42501",
        "arbiter: table public.not_ours belongs to postgres, not to app_owner",
        "Connect as postgres; nothing was changed.",
    ),
    "of a role with fewer rights": Failure(
        "select arbiter.protect('public.theirs')",
        "42501",
        "arbiter: table public.theirs belongs to anon, who has not the rights of app_owner,"
        " arbiter's owner",
        "What anon writes into its triggers and checks could run as app_owner. Give the table to"
        " app_owner, or install arbiter as anon; nothing was changed.",
        setup="grant anon to app_owner; create table public.theirs (user_id uuid);"
        " alter table public.theirs owner to anon",
        by="postgres",
    ),
    "a type of a role with fewer rights": Failure(
        "select arbiter.register_machines('public.moody')",
        "42501",
        "arbiter: column status of table public.moody has the type public.mood of anon, who has not"
        " the rights of app_owner, arbiter's owner",
        "Run as anon: alter type public.mood owner to app_owner; nothing was changed.",
        setup="create type public.mood as enum ('running');"
        " create table public.moody (id uuid primary key, user_id uuid, status public.mood);"
        " alter table public.moody owner to app_owner; alter type public.mood owner to anon",
        by="postgres",
    ),
    "a condition that calls functions": Failure(
        "select arbiter._need_trusted_code('public.cloud_machines')",
        "55000",
        "arbiter: the condition of trigger q on public.cloud_machines does more than compare"
        " columns",
        "It would run with the rights of arbiter's owner. Move it into the function of the trigger;"
        " nothing was changed.",
        setup="create trigger q before update on public.cloud_machines for each row"
        " when (lower(new.status) = 'x') execute function suppress_redundant_updates_trigger()",
    ),
    "a temporary object": Failure(
        "select arbiter._need_trusted_code('public.cloud_machines')",
        "55000",
        "arbiter: trigger q on public.cloud_machines could take temporary objects of this session"
        " for those of the app",
        "Give its function a search_path of its own, or call this from a session without temporary"
        " objects; nothing was changed.",
        setup="create function public.tg_q() returns trigger language plpgsql as"
        " 'begin return null; end';"
        " create trigger q after update on public.cloud_machines for each row"
        " execute function public.tg_q(); create temporary table t ()",
    ),
    # 04_ways, 05_checks
    "no foreign key": Failure(
        "select arbiter.protect('public.wide', 'plain.user_id')",
        "22023",
        "arbiter: column plain of table public.wide is not a foreign key of one column",
        "In the path plain.user_id every step but the last must be one.",
    ),
    "machine of another table": Failure(
        "select arbiter.protect('public.elsewhere')",
        "42830",
        "arbiter: column machine_id of table public.elsewhere leads to public.traders, not to the"
        " registry public.cloud_machines",
        "Drop constraint elsewhere_machine_id_fkey, or name another column in p_machine_column;"
        " nothing was changed.",
    ),
    "no way": Failure(
        "select arbiter.protect('public.loose')",
        "22023",
        "arbiter: table public.loose has no obvious way to a user",
        "Name it in p_user_path: a column with the user's id ('owner_id') or a path over foreign"
        " keys ('trader_id.user_id').",
    ),
    # Its owner's user has another type, and so is none.
    "no way by text": Failure(
        "select arbiter.protect('public.of_text')",
        "22023",
        "arbiter: table public.of_text has no obvious way to a user",
        "Name it in p_user_path: a column with the user's id ('owner_id') or a path over foreign"
        " keys ('trader_id.user_id').",
    ),
    "two ways": Failure(
        "select arbiter.protect('public.of_two')",
        "22023",
        "arbiter: table public.of_two has more than one way to a user",
        "Choose one in p_user_path, or several that must agree: trader_id.user_id,"
        " copied_from.user_id",
    ),
    "source by default": Failure(
        "select arbiter.protect('public.by_default')",
        "23514",
        "arbiter: column source of table public.by_default does not mean the environment: its"
        " default is 'binance'::text",
        "Rename that column, or make its default local; nothing was changed.",
    ),
    "source by key": Failure(
        "select arbiter.protect('public.by_key')",
        "23514",
        "arbiter: column source of table public.by_key does not mean the environment: it is in"
        " foreign key by_key_source_fkey",
        RENAME,
    ),
    "source by check": Failure(
        "select arbiter.protect('public.by_check')",
        "23514",
        "arbiter: column source of table public.by_check does not mean the environment:"
        " constraint feed forbids local or cloud",
        RENAME,
    ),
    "source by data": Failure(
        "select arbiter.protect('public.by_data')",
        "23514",
        "arbiter: column source of table public.by_data does not mean the environment: it holds"
        " 'binance'",
        RENAME,
    ),
    "registry that is partitioned": Failure(
        "select arbiter.register_machines('public.parted')",
        "42809",
        "arbiter: public.parted is not an ordinary table",
        "Register the table that holds one row per machine; nothing was changed.",
    ),
    "registry without a key": Failure(
        "select arbiter.register_machines('public.twice')",
        "22023",
        "arbiter: column id of table public.twice is not unique",
        "One row must be one machine: name its primary key in p_id_column; nothing was changed.",
    ),
    "registry with a key of two columns": Failure(
        "select arbiter.register_machines('public.twice')",
        "22023",
        "arbiter: column id of table public.twice is not unique",
        "One row must be one machine: name its primary key in p_id_column; nothing was changed.",
        setup="create unique index on public.twice (id, user_id)",
    ),
    "registry with a key of some rows": Failure(
        "select arbiter.register_machines('public.twice')",
        "22023",
        "arbiter: column id of table public.twice is not unique",
        "One row must be one machine: name its primary key in p_id_column; nothing was changed.",
        setup="create unique index on public.twice (id) where status is not null",
    ),
    "no table": Failure(
        "select arbiter.protect('public.a_view')",
        "42809",
        "arbiter: public.a_view cannot be protected",
        "Protect an ordinary or a partitioned table; of partitions, the table at the root.",
        setup="create view public.a_view as select * from public.wide",
    ),
    "no path": Failure(
        "select arbiter.protect('public.wide', 'user_id.')",
        "22023",
        "arbiter: p_user_path is not a path: 'user_id.'",
        "It is a column with the user's id ('user_id'), columns over foreign keys joined by dots"
        " ('trader_id.user_id'), or several of these with commas.",
    ),
    "machine column of another use": Failure(
        "select arbiter.protect('public.wide', p_machine_column => 'user_id')",
        "22023",
        "arbiter: column user_id of table public.wide cannot name the machine",
        "p_machine_column is a column of its own; it is added when it is missing.",
    ),
    "not one transaction": Failure(
        until("07_plan.sql").removeprefix(until("03_trust.sql")),
        "55000",
        "arbiter: the files of an installation do not run in one transaction",
        "Run them all between begin and commit, in order; nothing of the app was changed.",
    ),
    # No such server is here: the same code asks for a later one.
    "an old server": Failure(
        until("07_plan.sql").replace("150000", "990000"),
        "0A000",
        "arbiter: needs PostgreSQL 15 or later, this is {version}",
        "Upgrade the server first; nothing was changed.",
    ),
    # 06_adoption, 07_plan
    "a table that is not there": Failure(
        "select arbiter._need_table('public.nowhere')",
        "42P01",
        "arbiter: there is no table public.nowhere",
        "Name it with its schema, such as public.signals; nothing was changed.",
    ),
    "a name that is none": Failure(
        "select arbiter._need_table('a.b.c.d')",
        "42P01",
        "arbiter: there is no table a.b.c.d",
        "Name it with its schema, such as public.signals; nothing was changed.",
    ),
    "two keys to the registry": Failure(
        "select arbiter.protect('public.elsewhere')",
        "22023",
        "arbiter: table public.elsewhere has several foreign keys to the registry"
        " public.cloud_machines",
        "Name the column of the machine that wrote the row in p_machine_column: bought_by or"
        " sold_by.",
        setup="alter table public.elsewhere"
        " add bought_by uuid references public.cloud_machines,"
        " add sold_by uuid references public.cloud_machines",
    ),
    "options without a table": Failure(
        until("07_plan.sql").replace(
            "set local lock_timeout = '5s';",
            """set local arbiter.install_options = '{"mode": "observe"}';""",
            1,
        ),
        "22023",
        "arbiter: this installation protects no table, and was told how to",
        "Name the table: --protect public.signals; nothing was changed.",
    ),
    # 11_identity
    "another user": Failure(
        "select arbiter.status('{other}')",
        "42501",
        "arbiter: only a trusted role may ask about another user",
        "Leave p_user_id out: the user is the one of request.jwt.claims.",
        by="authenticated",
    ),
    "no user": Failure(
        "select arbiter.status()",
        "22023",
        "arbiter: no user",
        "Pass p_user_id, or set request.jwt.claims with the claim of arbiter.settings.user_claim.",
    ),
    # 30_status
    "confirmed by a machine": Failure(
        "select arbiter.confirm_takeover('{user}')",
        "42501",
        "arbiter: a machine's token cannot confirm a takeover",
        "Ask the user, and call it with the user's token or as the backend.",
        setup="select set_config('request.jwt.claims',"
        " json_build_object('machine_id', gen_random_uuid())::text, true)",
    ),
    # 25_protect
    "a parent that is not protected": Failure(
        "select arbiter.protect('public.child', p_verbs => '{{insert,update}}')",
        "42809",
        "arbiter: public.child cannot be protected against updates below public.parent, which is"
        " not protected",
        "An update of public.parent would not be arbitrated: protect that table.",
    ),
    # 20_generate, 21_paths
    "a word that nothing stands for": Failure(
        "select arbiter._instantiate('arbiter._stamp_template()', 'new', '{{}}')",
        "XX000",
        "arbiter: nothing stands for the word __heartbeat of template arbiter._stamp_template()",
        "Add it where the template's words are listed: _id_words(), _guard_words()"
        " or _registry_words().",
    ),
    "a correction of a table that is not protected": Failure(
        "select arbiter.amend('public.traders', 'why')",
        "42704",
        "arbiter: table public.traders is not protected",
        "Update it: nothing keeps you from it.",
    ),
    "a correction without a reason": Failure(
        "select arbiter.amend('public.signals', '')",
        "22023",
        "arbiter: the correction of public.signals has no reason",
        "Say in p_reason why; it is kept in arbiter.amendments.",
    ),
    "a user who would be another one": Failure(
        "select arbiter._need_same_users('text')",
        "55000",
        "arbiter: user 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11' of public.by_name would become"
        " another user: the registry's users were of another type",
        "Register a table whose users have the type of before, or give these rows and their leases"
        " up: arbiter-db uninstall. Nothing was changed.",
        setup="create table public.by_name (user_id text);"
        " select arbiter.protect('public.by_name');"
        " insert into public.by_name values ('A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11')",
    ),
    "a table that is not known by its name": Failure(
        "select arbiter._columns_stand(arbiter._protected_table(0, 'public.before'), '{{source}}')",
        "55000",
        "arbiter: the guard does not know its table, which was renamed: this is a copy of the"
        " schema, or the snapshot of this transaction is older than the protection",
        "In a copy run arbiter-db install; otherwise try again in a new transaction.",
    ),
    "a key that is newer": Failure(
        "select arbiter._key_stands('public.wide', 'wide_trader_id_fkey', 'public.traders')",
        "55000",
        "arbiter: foreign key wide_trader_id_fkey of public.wide was made after the snapshot of"
        " this transaction",
        "Try again in a new transaction.",
        between=NEW_KEY,
    ),
    # 25_protect
    "verbs": Failure(
        "select arbiter.protect('public.wide', p_verbs => '{{delete}}')",
        "22023",
        "arbiter: protect(public.wide) with p_verbs {{delete}}, p_mode enforce, p_unowned reject",
        PROTECT_HINT,
    ),
    "nulls": Failure(
        "select arbiter.protect(null, null, null, null, null, null, null)",
        "22023",
        "arbiter: protect(null) with p_verbs {{insert}}, p_mode enforce, p_unowned reject",
        PROTECT_HINT,
    ),
    "the registry protected": Failure(
        "select arbiter.protect('public.cloud_machines')",
        "42809",
        "arbiter: public.cloud_machines cannot be protected",
        "arbiter judges by the registry and its own tables; protect a table that clients write to.",
    ),
    "a relative": Failure(
        "select arbiter.protect('public.parent')",
        "42809",
        "arbiter: public.parent cannot be protected beside public.child, which inherits from it or"
        " the other way round",
        "Unprotect public.child first: one guard is enough for both.",
    ),
    "unprotect": Failure(
        "select arbiter.unprotect('public.loose')",
        "42704",
        "arbiter: table public.loose is not protected",
        "See arbiter.protections for the tables that are.",
    ),
    # 23_registry
    "a machine's other columns": Failure(
        TOKEN + "region = 'iad'",
        "42501",
        "arbiter: a machine's token may not change column region of public.cloud_machines",
        "It may send heartbeats, and set the status words that the app lists for machines; let the"
        " backend do the rest.",
        by="authenticated",
    ),
    "a machine's status": Failure(
        TOKEN + "status = 'stopped'",
        "42501",
        "arbiter: a machine's token may not set the status 'stopped' of public.cloud_machines",
        "Let the backend set it, or list the word: arbiter.register_machines(),"
        " p_machine_statuses.",
        by="authenticated",
    ),
    # 26_register
    "no table of machines": Failure(
        "select arbiter.register_machines(null)",
        "22004",
        "arbiter: register_machines() with a null for the table or one of its columns",
        "Name the app's table of machines and its columns, or leave the defaults.",
    ),
    "states of another type": Failure(
        "select arbiter.register_machines('public.cloud_machines', p_states => '[]')",
        "22023",
        "arbiter: p_states is a JSON array, it must be an object",
        'For example {{"active": "running", "deleted": "stopped"}}.',
    ),
    "an unknown state": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        """ p_states => '{{"up": "alive", "down": "stopped"}}')""",
        "22023",
        'arbiter: p_states maps a status word to no machine state: up: "alive"',
        "The machine states are starting, running, stopping, stopped, error.",
    ),
    "no word for stopped": Failure(
        """select arbiter.register_machines('public.cloud_machines', p_states => '{{}}')""",
        "22023",
        "arbiter: p_states maps no status word to stopped",
        "arbiter.confirm_takeover() needs a word that says so.",
    ),
    "a word for machines without a state": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_machine_statuses => '{{running,runing}}')",
        "22023",
        "arbiter: p_machine_statuses has a status word that p_states does not map: runing",
        "Map the word to a machine state in p_states, too.",
    ),
    "a health column without words": Failure(
        "select arbiter.register_machines('public.cloud_machines', p_health_column => 'region')",
        "22023",
        "arbiter: register_machines() with one of p_health_column and p_healthy, and not with the"
        " other",
        "For example p_health_column => 'health_status', p_healthy => '{{healthy}}'.",
    ),
    "no word for well": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'region', p_healthy => '{{}}')",
        "22023",
        "arbiter: p_healthy is empty, or has a null",
        "List the words that the health column has while the machine is well.",
    ),
    "a status that says whether it is well": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'status', p_healthy => '{{running}}')",
        "22023",
        "arbiter: column status of table public.cloud_machines cannot say whether a machine is"
        " well",
        "p_health_column is a column of its own, beside status and heartbeat; nothing was changed.",
    ),
    "a heartbeat that is never null": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'region', p_healthy => '{{fra}}')",
        "42P16",
        "arbiter: column last_health_check of table public.cloud_machines is not null, and a"
        " machine that has never been well has no heartbeat",
        "Run: alter table public.cloud_machines alter column last_health_check drop not null;"
        " nothing was changed.",
        setup="alter table public.cloud_machines alter column last_health_check set not null",
    ),
    "a health column that is generated": Failure(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'well', p_healthy => '{{true}}')",
        "0A000",
        "arbiter: column well of table public.cloud_machines is a generated column",
        "Name a column from which it is generated; nothing was changed.",
        setup="alter table public.cloud_machines"
        " add column well boolean generated always as (error_message is null) stored",
    ),
    "a machine that is not well": Failure(
        "select arbiter.heartbeat('{machine}'::uuid)",
        "55000",
        "arbiter: the heartbeat of machine {machine} does not count",
        "Column region of public.cloud_machines says that the machine is not well. Words for well:"
        " iad, lhr.",
        setup="select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'region', p_healthy => '{{iad,lhr}}')",
        detail='{{"code": "machine_unhealthy", "machine_id": "{machine}"}}',
    ),
    "no registry": Failure(
        "select arbiter.heartbeat('{machine}'::uuid)",
        "55000",
        "arbiter: no registry of machines",
        "Call arbiter.register_machines() first.",
        setup=NO_REGISTRY,
    ),
    "an unknown machine": Failure(
        "select arbiter.heartbeat('{other}'::uuid)",
        "P0002",
        "arbiter: no machine {other}",
        "Check the id against the registry's id column; no heartbeat of this call was written.",
        detail='{{"code": "unknown_machine", "machine_id": "{other}"}}',
    ),
    # 30_status
    "nothing to confirm": Failure(
        "select arbiter.confirm_takeover('{other}')",
        "55000",
        "arbiter: there is nothing to confirm",
        "The browser may write already.",
        detail='{{"code": "nothing_to_confirm", "epoch": null, "holder": null, "user_id":'
        ' "{other}", "retry_at": null, "machine_id": null}}',
    ),
    "no word for stopped is taken": Failure(
        "select arbiter.confirm_takeover('{user}')",
        "55000",
        "arbiter: the registry takes none of the words that mean stopped",
        "Call arbiter.register_machines() with p_states that has the table's own words.",
        setup="""
            update public.cloud_machines set status = 'error';
            update arbiter.machine_notes set entered_error_at = clock_timestamp() - interval '1 h';
            alter table public.cloud_machines add check (status <> 'stopped')
        """,
    ),
    # 31_announce
    "no settings": Failure(
        "delete from arbiter.settings",
        "55000",
        "arbiter: the row of arbiter.settings cannot be deleted",
        "Update it: every decision needs it. docs/reference.md has the defaults.",
        by="postgres",
    ),
    # 32_audit
    "audit": Failure(
        "select arbiter.audit('public.loose')",
        "42704",
        "arbiter: table public.loose is not protected",
        "See arbiter.protections for the tables that are.",
    ),
    "audit without evidence": Failure(
        "select arbiter.audit('public.apart')",
        "55000",
        "arbiter: table public.apart is protected without evidence",
        "Its rows carry no arbiter_xid, so nothing can be proved from them; protect it with"
        " p_evidence => true.",
    ),
    # 33_expose
    "no schema": Failure(
        "select arbiter.expose('nowhere')",
        "3F000",
        "arbiter: cannot expose functions in schema nowhere",
        "Name a schema of the app that its API serves, such as public.",
    ),
    "a function of the app": Failure(
        "select arbiter.expose()",
        "42723",
        "arbiter: there is a function public.execution_status(uuid) already,"
        " and it is not arbiter's",
        "Rename it, or expose into another schema; nothing was changed.",
        setup="create function public.execution_status(uuid) returns int language sql return 1",
    ),
    # 03_trust
    "foreign code": Failure(
        "select arbiter._need_trusted_code('public.parent')",
        "55000",
        "arbiter: trigger watch on table public.parent would run function public.tg_foreign() of"
        " service_role with the rights of arbiter's owner",
        "The owner of the table must drop it, or make it call functions of its own; nothing was"
        " changed.",
        setup="create trigger watch before update on public.parent for each row"
        " execute function public.tg_foreign()",
    ),
    "triggers of later": Failure(
        "select arbiter._need_trusted_code('public.parent')",
        "0A000",
        "arbiter: above read committed it cannot be told which triggers there are on public.parent",
        "Call it at read committed; nothing was changed.",
        setup="grant trigger on public.parent to service_role",
        between="select",
    ),
    # 34_clients
    "no role": Failure(
        "select arbiter.add_client_role('ghost')",
        "42704",
        "arbiter: there is no role ghost",
        "Create the role first, or name another one; nothing was changed.",
    ),
    # 40_left_over
    "no installation": Failure(
        "select * from arbiter._left_over()",
        "55000",
        "arbiter: nothing was noted at the start of this installation",
        "Run all files of sql/ in order and in one transaction.",
    ),
    "a function that is used": Failure(
        "select arbiter._drop_left_over()",
        "2BP01",
        "arbiter: something uses what this version does not have any more: view public.user_of_old"
        " depends on function arbiter.old()",
        "Drop or change what uses it, then install again; until then functions, guards and"
        " policies are those of before.",
        setup="""
            create function arbiter.old() returns integer language sql return 1;
            create view public.user_of_old as select arbiter.old() as n;
            select set_config('arbiter.documented_before', '(0,0)', true)
        """,
    ),
}


class Shared:
    """One database for all of them, as each is rolled back."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner, self.admin = db.connect(), db.connect("postgres")
        self.admin.execute(FOREIGN)
        self.admin.execute("grant references on public.feeds to app_owner")
        self.owner.execute(TABLES.encode())
        self.user = add_user(self.owner)
        self.names = {
            "user": str(self.user.id),
            "machine": str(activate(self.owner, self.user)),
            "other": str(UUID(int=7)),
            "version": value(self.owner, "show server_version"),
        }


@pytest.fixture(scope="module")
def shared(templates: Templates) -> Iterator[Shared]:
    with templates.clone("installed") as database:
        yield Shared(database)


def fill_in(text: str, names: dict[str, str]) -> str:
    return text.format(**names)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_says_what_and_what_to_do(shared: Shared, name: str) -> None:
    failure = FAILURES[name]
    if shared.owner.info.server_version < failure.since * 10000:
        return  # what fails does not exist yet
    conn = shared.admin if failure.by == "postgres" else shared.owner
    is_file = failure.call.startswith("--")
    call = failure.call if is_file else fill_in(failure.call, shared.names)
    with conn.transaction(force_rollback=True):
        if failure.between:
            conn.execute("set transaction isolation level repeatable read")
            conn.execute("select")
            shared.db.connect().execute(failure.between.encode())
        conn.execute(failure.setup.encode())
        if failure.by == "authenticated":
            conn = shared.db.connect(role="authenticated")
        with pytest.raises(psycopg.Error) as caught, conn.transaction():
            conn.execute(call.encode())
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_primary, diag.message_hint, diag.message_detail) == (
        failure.sqlstate,
        fill_in(failure.message, shared.names),
        fill_in(failure.hint, shared.names),
        failure.detail and fill_in(failure.detail, shared.names),
    )


# -- rejections -----------------------------------------------------------------------------------


class Stage:
    """Ada is local and has a machine that is up but does not hold; bob's machine holds."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner, self.other = db.connect(), db.connect(autocommit=False)
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas, self.bobs = self.ada.trader, self.bob.trader
        add_signal(self.owner, self.adas)
        self.adas_machine = add_machine(self.owner, self.ada, "running")
        self.machine = activate(self.owner, self.bob)
        self.builtin = add_trader(self.owner, None)
        self.long = User("x" * 1001, self.adas)
        self.owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
        self.owner.execute("set statement_timeout = '20 s'")  # should that bound fail

    def note(self) -> Any:
        return one(
            self.owner, "select * from arbiter.machine_notes where machine_id = %s", self.machine
        )

    def loosen(self) -> None:
        """The table's own constraints speak before the guard."""
        self.owner.execute(
            "alter table public.signals drop constraint arbiter_source_check,"
            " alter column source drop not null,"
            " alter constraint signals_trader_id_fkey deferrable initially deferred"
        )

    def allow_unowned(self) -> None:
        self.owner.execute("select arbiter.protect('public.signals', p_unowned => 'allow')")

    def write_for_two(self) -> None:
        self.owner.execute(
            "alter table public.signals add user_id uuid;"
            "select arbiter.protect('public.signals', 'user_id, trader_id.user_id')"
        )
        self.owner.execute(
            "insert into public.signals (trader_id, user_id, symbol, interval, signal, bar_time)"
            " values (%s, gen_random_uuid(), 'BTCUSDT', '1m', 'buy', now())",
            (self.adas,),
        )

    def write_of_no_user(self) -> None:
        self.owner.execute("alter table public.signals disable row level security")
        add_signal(browser(self.db, self.ada), self.builtin)

    def forge(self) -> None:
        self.owner.execute(
            "insert into public.signals"
            " (trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
            " values (%s, 'BTCUSDT', '1m', 'buy', now(), '3')",
            (self.adas,),
        )

    def confirm(self) -> None:
        self.owner.execute("select arbiter.confirm_takeover(%s)", (self.bob.id,))


@dataclass(frozen=True)
class Rejected:
    """What is said: the code, its hint, and in DETAIL whose write, and what depends on the code."""

    code: str
    hint: str
    run: Callable[[Stage], object]
    #: None where the row has no user.
    whose: str | None = "bob"
    by_lease: bool = True
    retry_at: Callable[[Stage], str | None] = lambda at: None
    more: Callable[[Stage], dict[str, Any]] = lambda at: {}


def in_status(word: str, run: Callable[[Stage], object], **ago: Any) -> Callable[[Stage], object]:
    def prepared(at: Stage) -> object:
        set_status(at.owner, at.machine, word)
        age(at.owner, at.machine, **ago)
        return run(at)

    return prepared


def write(trader: str, source: Any = "local", machine: str | None = None) -> Any:
    def run(at: Stage) -> None:
        add_signal(at.owner, getattr(at, trader), source, getattr(at, machine) if machine else None)

    return run


def after(*steps: Callable[[Stage], object]) -> Callable[[Stage], object]:
    def run(at: Stage) -> None:
        for step in steps:
            step(at)

    return run


def said(source: str | None, machine: str | None = None) -> Callable[[Stage], dict[str, Any]]:
    def more(at: Stage) -> dict[str, Any]:
        return {"source": source, "machine_id": machine and str(getattr(at, machine))}

    return more


def beat_while_provisioning(at: Stage) -> None:
    set_status(at.owner, at.adas_machine, "provisioning")
    beat(at.owner, at.adas_machine)


def write_by_a_second_machine(at: Stage) -> None:
    at.owner.execute("alter table public.cloud_machines drop constraint cloud_machines_user_id_key")
    second = add_machine(at.owner, at.bob, "running")
    beat(at.owner, second)
    add_signal(at.owner, at.bobs, "cloud", second)


def write_for_both(at: Stage) -> None:
    with at.owner.transaction():
        add_signal(at.owner, at.adas)
        beat(at.owner, at.adas_machine)
        add_signal(at.owner, at.adas, "cloud", at.adas_machine)


def write_in_flight(at: Stage) -> None:
    add_signal(at.other, at.adas)


def write_in_a_savepoint(at: Stage) -> None:
    """Its lock is not to be seen in pg_locks."""
    at.other.execute("savepoint one")
    add_signal(at.other, at.adas)
    at.other.execute("release one")


def write_of_the_next_holder(at: Stage) -> None:
    beat(at.owner, at.adas_machine)
    add_signal(at.owner, at.adas, "cloud", at.adas_machine)


def drop_the_key(at: Stage) -> None:
    at.owner.execute("alter table public.signals drop constraint signals_trader_id_fkey")


def make_another_key(at: Stage) -> None:
    at.owner.execute(
        "alter table public.signals add constraint of_an_orm foreign key (trader_id)"
        " references public.traders (id)"
    )


def rename_the_machine(at: Stage) -> None:
    at.owner.execute("alter table public.signals rename machine_id to fly_app_id")


def drop_the_machine(at: Stage) -> None:
    at.owner.execute("alter table public.signals drop column machine_id cascade")


WRITE = (
    "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
    " values (%s, 'BTCUSDT', '1m', 'buy', now())"
)


def write_without_machine(at: Stage) -> None:
    at.owner.execute(WRITE, (at.adas,))


def write_by_an_old_snapshot(at: Stage) -> None:
    at.other.execute("set transaction isolation level repeatable read")
    at.other.execute("select 1")
    drop_the_machine(at)
    at.other.execute(WRITE, (at.adas,))


def correct_unmarked(at: Stage) -> None:
    with at.owner.transaction():
        at.owner.execute("select arbiter.amend('public.signals', 'why')")
        at.owner.execute("update public.signals set source = 'cloud'")


def write_as_a_long_id(at: Stage) -> None:
    at.owner.execute("create table public.notes (user_id text)")
    at.owner.execute("select arbiter.protect('public.notes')")
    at.owner.execute("insert into public.notes values (%s)", ("x" * 1000,))
    at.owner.execute("insert into public.notes values (%s)", (at.long.id,))


def take_the_machine_away(at: Stage) -> None:
    at.owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    at.owner.execute(
        "insert into public.positions (user_id, symbol, source, machine_id)"
        " values (%s, 'BTC', 'cloud', %s)",
        (at.bob.id, at.machine),
    )
    at.owner.execute("update public.positions set machine_id = null")


def lock_the_machine(at: Stage) -> None:
    at.other.execute("select from public.cloud_machines for no key update")


MINUTES = timedelta(minutes=10)
SOON = "Too early: the machine may recover; confirm at retry_at."
REJECTIONS = {
    "healthy": Rejected(
        "cloud_active",
        "Switch to monitoring, or stop the cloud machine to write from the browser.",
        write("bobs"),
    ),
    "just stopped": Rejected(
        "cooling_down",
        "Try again at retry_at, when its last writes can no longer be in flight.",
        in_status("stopped", write("bobs")),
        retry_at=lambda at: as_detail(at.note().left_running_at + timedelta(seconds=30)),
    ),
    "just failed": Rejected(
        "takeover_unconfirmed",
        "Too early: ask the user at retry_at, then call arbiter.confirm_takeover().",
        in_status("error", write("bobs")),
        retry_at=lambda at: as_detail(at.note().entered_error_at + timedelta(minutes=2)),
    ),
    "failed": Rejected(
        "takeover_unconfirmed",
        "Ask the user, then call arbiter.confirm_takeover().",
        in_status("error", write("bobs"), entered_error=MINUTES),
    ),
    "no heartbeat": Rejected(
        "not_holder",
        "Stop trading: this machine has sent no heartbeat in time. Send heartbeats, and write again"
        " once arbiter.status() names this machine.",
        write("adas", "cloud", "adas_machine"),
        whose="ada",
    ),
    "no status that says running": Rejected(
        "not_holder",
        "Stop trading: the status of this machine means starting. It can get the lease once its"
        " status means running and it sends heartbeats.",
        after(beat_while_provisioning, write("adas", "cloud", "adas_machine")),
        whose="ada",
    ),
    "not the holder": Rejected(
        "not_holder",
        "Stop trading, keep sending heartbeats, and write again once arbiter.status() names this"
        " machine.",
        write_by_a_second_machine,
    ),
    "forged evidence": Rejected(
        "wrong_identity",
        "arbiter_xid is not the transaction that writes the row: leave it to its default.",
        Stage.forge,
        whose="ada",
        by_lease=False,
        more=said("local"),
    ),
    "no parent": Rejected(
        "wrong_identity",
        "The row does not lead to a user: the row that it names does not exist.",
        after(Stage.allow_unowned, Stage.loosen, lambda at: add_signal(at.owner, str(UUID(int=1)))),
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "a key of the path that is gone": Rejected(
        "wrong_identity",
        "A foreign key of the path 'trader_id.user_id' is gone. The owner of the table makes it"
        " again, then calls arbiter.protect('public.signals').",
        after(drop_the_key, write("adas")),
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "a key of the path that has changed": Rejected(
        "wrong_identity",
        "A foreign key of the path 'trader_id.user_id' has changed. The owner of the table calls"
        " arbiter.protect('public.signals').",
        after(drop_the_key, make_another_key, write("adas")),
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "a column that was renamed": Rejected(
        "wrong_identity",
        "Table public.signals has no column machine_id any more. What mends it: select"
        " arbiter.protect('public.signals', 'trader_id.user_id', '{insert}', 'fly_app_id',"
        " 'enforce', 'reject', 't')",
        after(rename_the_machine, write_without_machine),
        whose="ada",
        by_lease=False,
        more=said("local"),
    ),
    "a column that was dropped": Rejected(
        "wrong_identity",
        "Table public.signals has no column machine_id any more. What mends it: Call"
        " arbiter.protect() with the names that the table has now.",
        after(drop_the_machine, write_without_machine),
        whose="ada",
        by_lease=False,
        more=said("local"),
    ),
    "a column that an old snapshot still has": Rejected(
        "wrong_identity",
        "A column that the guard needs was renamed or dropped: the owner of the table calls"
        " arbiter.protect().",
        write_by_an_old_snapshot,
        whose="ada",
        by_lease=False,
        more=said("local"),
    ),
    "a long id": Rejected(
        "wrong_identity",
        "The id of the user is longer than 1,000 bytes.",
        write_as_a_long_id,
        whose="long",
        by_lease=False,
        more=said("local"),
    ),
    "two users": Rejected(
        "wrong_identity",
        "The row leads to different users: all ways of p_user_path must agree.",
        Stage.write_for_two,
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "a browser's row without a user": Rejected(
        "wrong_identity",
        "A browser cannot write a row without a user, nor can a machine's token: write it as the"
        " backend.",
        after(Stage.allow_unowned, Stage.write_of_no_user),
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "no source": Rejected(
        "wrong_identity",
        "source is null: write local, or cloud with a machine.",
        after(Stage.loosen, write("adas", None)),
        whose="ada",
        by_lease=False,
        more=said(None),
    ),
    "another source": Rejected(
        "wrong_identity",
        "source must be local or cloud.",
        after(Stage.loosen, write("adas", "tab")),
        whose="ada",
        by_lease=False,
        more=said("tab"),
    ),
    "local with a machine": Rejected(
        "wrong_identity",
        "A local write has no machine: leave it null, or write cloud.",
        write("bobs", "local", "machine"),
        by_lease=False,
        more=said("local", "machine"),
    ),
    "no user": Rejected(
        "wrong_identity",
        "The row has no user; a table with such rows is protected with p_unowned => 'allow'.",
        write("builtin"),
        whose=None,
        by_lease=False,
        more=said("local"),
    ),
    "a machine without a user": Rejected(
        "wrong_identity",
        "A row without a user cannot have a machine.",
        after(Stage.allow_unowned, write("builtin", "cloud", "machine")),
        whose=None,
        by_lease=False,
        more=said("cloud", "machine"),
    ),
    "cloud without a machine": Rejected(
        "wrong_identity",
        "A cloud write names its machine.",
        write("bobs", "cloud"),
        by_lease=False,
        more=said("cloud"),
    ),
    "another user's machine": Rejected(
        "wrong_identity",
        "The registry has no such machine of this user.",
        write("adas", "cloud", "machine"),
        whose="ada",
        by_lease=False,
        more=said("cloud", "machine"),
    ),
    "an update without a machine": Rejected(
        "wrong_identity",
        "A cloud write names its machine.",
        take_the_machine_away,
        by_lease=False,
        more=said("cloud"),
    ),
    "provenance": Rejected(
        "provenance_immutable",
        "Update the other columns, or insert a new row. The owner of the table corrects rows after"
        " arbiter.amend().",
        lambda at: at.owner.execute("update public.signals set source = 'cloud'"),
        whose="ada",
        by_lease=False,
    ),
    "a correction that does not say so": Rejected(
        "provenance_immutable",
        "A correction says so in each row: set arbiter_xid = default in the same update.",
        correct_unmarked,
        whose="ada",
        by_lease=False,
    ),
    "a write in flight": Rejected(
        "handover_draining",
        "Try again; if it lasts, end the transactions of the blockers named in the detail.",
        after(write_in_flight, write_of_the_next_holder),
        whose="ada",
        more=lambda at: {"blockers": [at.other.info.backend_pid]},
    ),
    "a write of one's own": Rejected(
        "handover_draining",
        "This transaction itself keeps the lease from being handed over: commit it first.",
        write_for_both,
        whose="ada",
        # Of the drain that it has marked itself, which is rolled back.
        more=lambda at: {
            "holder": "cloud",
            "machine_id": str(at.adas_machine),
            "blockers": [at.owner.info.backend_pid],
        },
    ),
    "a write that no session shows": Rejected(
        "handover_draining",
        "Try again; if it lasts, look into pg_prepared_xacts: no open session was found that locks"
        " the lease.",
        after(write_in_a_savepoint, write_of_the_next_holder),
        whose="ada",
        more=lambda at: {"blockers": []},
    ),
    "history": Rejected(
        "append_only",
        "Leave it as it is: arbiter.audit() proves exclusion from it.",
        lambda at: at.owner.execute("delete from arbiter.handovers where reason = 'activated'"),
        by_lease=False,
        more=lambda at: {"operation": "DELETE", "epoch": 2},
    ),
    "all of the history": Rejected(
        "append_only",
        "Leave it as it is: arbiter.audit() proves exclusion from it.",
        lambda at: at.owner.execute("truncate arbiter.handovers"),
        whose=None,
        by_lease=False,
        more=lambda at: {"operation": "TRUNCATE"},
    ),
    "a yes to a healthy machine": Rejected(
        "cloud_active",
        "There is nothing to confirm: the machine is not in error.",
        Stage.confirm,
    ),
    "a yes to a machine that stops": Rejected(
        "cooling_down",
        "There is nothing to confirm: the machine is not in error.",
        in_status("stopped", Stage.confirm),
        retry_at=lambda at: as_detail(at.note().left_running_at + timedelta(seconds=30)),
    ),
    "a yes too soon": Rejected(
        "takeover_unconfirmed",
        SOON,
        in_status("error", Stage.confirm),
        retry_at=lambda at: as_detail(at.note().entered_error_at + timedelta(minutes=2)),
    ),
    "a yes while the machine writes": Rejected(
        "handover_draining",
        "Try again; if it lasts, end the transactions of the blockers named in the detail.",
        after(
            in_status("error", lambda at: None, entered_error=MINUTES),
            lock_the_machine,
            Stage.confirm,
        ),
        more=lambda at: {"blockers": []},
    ),
}
RULES = {
    **MESSAGES,
    "wrong_identity": "source, machine and user of the row do not fit together",
    "provenance_immutable": "source, machine, user and arbiter_xid of a protected row cannot be"
    " changed",
    "handover_draining": "writes in flight keep the lease from being handed over",
    "append_only": "the history of handovers and corrections is append-only",
}


@pytest.mark.parametrize("name", REJECTIONS)
def test_a_rejection_says_all_that_is_known(db: Database, name: str) -> None:
    """SQLSTATE, message and hint of its code, and in DETAIL all keys, also without a value."""
    rejected = REJECTIONS[name]
    at = Stage(db)
    error = rejection(rejected.run, at)
    assert (error.sqlstate, error.diag.message_primary, error.diag.message_hint) == (
        SQLSTATES[rejected.code],
        RULES[rejected.code],
        rejected.hint,
    )
    user: User | None = getattr(at, rejected.whose) if rejected.whose else None
    held = lease(at.owner, user) if rejected.by_lease and user else None
    assert detail_of(error) == {
        "code": rejected.code,
        "user_id": user and str(user.id),
        "holder": held and ("cloud" if held.claimant else "local"),
        "machine_id": held and held.claimant and str(held.claimant),
        "epoch": held and held.epoch,
        "retry_at": rejected.retry_at(at),
        **rejected.more(at),
    }


# -- nothing is left out --------------------------------------------------------------------------


def patterns(node: Any) -> list[str]:
    """What an expression for a text can become, as regular expressions: one for each branch."""
    match type(node).__name__:
        case "A_Const":
            return [re.escape(node.val.sval)]
        case "FuncCall" if node.funcname[-1].sval == "format":
            (template,) = patterns(node.args[0])
            return [re.sub(r"%[ILs]", ".*", template)]
        case "CaseExpr":
            branches = [when.result for when in node.args] + [node.defresult]
            return [pattern for branch in branches for pattern in patterns(branch)]
        case "A_Expr" if node.name[0].sval == "||":
            return [a + b for a in patterns(node.lexpr) for b in patterns(node.rexpr)]
    return [".*"]


def raised(name: str) -> Iterator[tuple[str, str, str]]:
    """SQLSTATE or condition, message and hint of each call, the last two as regular expressions."""
    for path in FILES:
        for statement in statements(path):
            if isinstance(statement.tree, ast.CommentStmt | ast.GrantStmt):
                continue
            for arguments in calls(statement.text, name):
                if arguments.startswith("p_"):
                    continue  # the definition itself
                parsed: Any = pglast.parse_sql(f"select f({arguments})")[0].stmt
                condition, message, hint, *_ = parsed.targetList[0].val.args
                (said_condition,) = patterns(condition)
                for message_pattern in patterns(message):
                    for hint_pattern in patterns(hint):
                        yield said_condition, message_pattern, hint_pattern


def sqlstate_of(condition: str) -> str:
    if re.fullmatch("[0-9A-Z]{5}", condition):
        return condition
    name = "".join(word.capitalize() for word in condition.split("_"))
    known = {"InternalError": "XX000"}
    return known.get(name) or str(getattr(psycopg.errors, name).sqlstate)


def is_in_the_table(condition: str, message: str, hint: str) -> bool:
    sqlstate = sqlstate_of(condition)
    return any(
        failure.sqlstate == sqlstate
        and re.fullmatch(message, failure.message.removeprefix("arbiter: "))
        and re.fullmatch(hint, failure.hint.replace("{{", "{").replace("}}", "}"))
        for failure in FAILURES.values()
    )


def test_each_failure_in_sql_is_in_the_table() -> None:
    found = list(raised("_fail"))
    assert len(found) >= 35
    assert [call for call in found if not is_in_the_table(*call)] == []


def test_each_failure_with_a_detail_is_in_the_table() -> None:
    found = [
        (condition, message.removeprefix("arbiter:\\ "), hint)
        for name in ("_fail_with_detail", "_error")
        for condition, message, hint in raised(name)
        if condition != ".*"
    ]
    assert {condition for condition, _, _ in found} == {"P0002", "55000"}
    assert [call for call in found if not is_in_the_table(*call)] == []


#: Where the hints of rejections are.
SAID = ("10_errors.sql", "21_renamed.sql", "22_admit.sql", "22_guard.sql", "30_status.sql")


def test_each_code_and_each_hint_of_a_rejection_is_in_the_table() -> None:
    assert {rejected.code for rejected in REJECTIONS.values()} == set(SQLSTATES)
    hints = {rejected.hint for rejected in REJECTIONS.values()}
    hints |= {failure.hint for failure in FAILURES.values()}
    sentences = {
        text
        for path in FILES
        if path.name in SAID
        for statement in statements(path)
        if not isinstance(statement.tree, ast.CommentStmt)
        for text in literals(statement.text)
        if re.fullmatch(r"\w+ .*\.", text)
    }
    assert len(sentences) >= 20
    # What mends a table that has changed is the end of a hint; every other sentence is a whole one.
    begins = "(?:Table .* What mends it: )?"
    patterns = {text: begins + re.sub("%[sLI]", ".*", re.escape(text)) for text in sentences}
    (never_said,) = [
        text for text in sentences if not any(re.fullmatch(patterns[text], hint) for hint in hints)
    ]
    assert never_said.startswith("Write local without a machine")  # each such row has a better one
