"""Ways to take the guard off a table without saying so: by a parent, by a copy, by a restore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from story import activate, add_signal, add_user, count_rows, one, rejection, rows, value

import arbiter_db
from arbiter_db.cli import main

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

BLOCKER = "arbiter_unprotect_it_first_then_protect_what_it_is_attached_to"


def held_by_cloud(owner: Conn) -> Any:
    """A user whose machine holds the lease."""
    user = add_user(owner)
    activate(owner, user)
    return user


@pytest.mark.parametrize("disabled", [False, True])
def test_a_protected_table_cannot_become_a_partition(db: Database, disabled: bool) -> None:
    """As when a live table is partitioned: rename it, attach it to a new root of its name."""
    owner = db.connect()
    user = held_by_cloud(owner)
    if disabled:
        owner.execute(f"alter table public.signals disable trigger {BLOCKER}".encode())
    with owner.transaction(force_rollback=True):
        owner.execute(
            """
            alter table public.signals rename to signals_before;
            create table public.signals (like public.signals_before including defaults)
              partition by range (bar_time);
            """
        )
        with pytest.raises(psycopg.Error, match=BLOCKER), owner.transaction():
            owner.execute(
                "alter table public.signals attach partition public.signals_before"
                " for values from (minvalue) to (maxvalue)"
            )
    # The documented way: no write between the old guard and the new one.
    with owner.transaction():
        owner.execute(
            """
            select arbiter.unprotect('public.signals');
            alter table public.signals rename to signals_before;
            alter table public.signals_before alter bar_time set not null;
            create table public.signals (like public.signals_before including defaults,
              foreign key (trader_id) references public.traders) partition by range (bar_time);
            alter table public.signals attach partition public.signals_before
              for values from (minvalue) to (maxvalue);
            select arbiter.protect('public.signals');
            """
        )
    assert rejection(lambda: add_signal(owner, user.trader)).sqlstate == "WX001"
    assert count_rows(owner, "public.signals") == 0


def test_a_protected_table_cannot_inherit(db: Database) -> None:
    owner = db.connect()
    owner.execute("create table public.parent (id uuid not null)")
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    with pytest.raises(psycopg.Error, match=BLOCKER):
        owner.execute("alter table public.positions inherit public.parent")
    owner.execute("select arbiter.unprotect('public.positions')")
    owner.execute("alter table public.positions inherit public.parent")


ROOTS = """
create table public.ticks (trader_id uuid not null references public.traders, day integer not null,
  venue text not null) partition by range (day);
create table public.ticks_a partition of public.ticks for values from (0) to (10);
select arbiter.protect('public.ticks', p_verbs => '{verbs}');
create table public.venues (like public.ticks including defaults) partition by list (venue);
alter table public.venues attach partition public.ticks for values in ('x');
"""
TICK = "insert into public.{} ({}) values ({})"


@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
def test_a_protected_root_below_another_one_stays_guarded(db: Database, verbs: str) -> None:
    """No statement trigger of the lower root fires for rows that come over the upper one."""
    owner = db.connect()
    user = held_by_cloud(owner)
    owner.execute(ROOTS.replace("{verbs}", verbs).encode())
    columns = [c for (c,) in rows(owner, "select attname from pg_attribute where attnum > 0 and "
               "attrelid = 'public.venues'::regclass")]  # fmt: skip
    insert = sql.SQL(
        "insert into public.{} (trader_id, day, venue, source) values (%s, %s, 'x', %s)"
    )
    assert "source" in columns
    for table, day in (("venues", 1), ("ticks", 2), ("ticks_a", 3)):
        attempt = insert.format(sql.Identifier(table))
        assert (
            rejection(
                lambda attempt=attempt, day=day: owner.execute(attempt, (user.trader, day, "local"))
            ).sqlstate
            == "WX001"
        ), table
    assert count_rows(owner, "public.ticks") == 0
    found = one(owner, "select state, problem from arbiter.doctor() where object = %s",
                "protection of public.ticks")  # fmt: skip
    assert found.state == "outdated"


def test_no_number_of_a_table_stands_in_a_condition(db: Database) -> None:
    """After a restore it would be the number of another table, whose rows would not be judged."""
    owner = db.connect()
    owner.execute(ROOTS.replace("{verbs}", "{insert}").encode())
    owner.execute(
        ROOTS.split(";")[1].replace("_a", "_b").replace("(0) to (10)", "(10) to (20)").encode()
    )
    owner.execute("alter table public.venues detach partition public.ticks")
    owner.execute("select arbiter.protect('public.ticks')")
    owner.execute("set search_path = pg_catalog")  # as pg_dump
    for name, definition in rows(
        owner,
        "select t.tgname, pg_get_triggerdef(t.oid) from pg_trigger t"
        " where t.tgname ~ '^arbiter_' and t.tgqual is not null",
    ):
        for number in rows(owner, "select oid::text from pg_class where relname ~ '^ticks'"):
            assert number[0] not in definition, name
    condition = one(
        owner,
        "select pg_get_triggerdef(oid) as text from pg_trigger"
        " where tgname = 'arbiter_guard_row' and tgrelid = 'public.ticks'::regclass",
    ).text
    assert "{public.ticks,public.ticks_a,public.ticks_b}" in condition


def strict(db: Database, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["audit", "--dsn", db.conninfo(), "--strict", *options])
    return result.exit_code, result.output


SWAPS = {
    "renamed away": """
        create table public.copied (like public.signals including all);
        alter table public.signals rename to signals_old;
        alter table public.copied rename to signals;
    """,
    "dropped": """
        create table public.copied (like public.signals including all);
        drop table public.signals;
        alter table public.copied rename to signals;
    """,
    "another schema": """
        create schema old;
        create table public.copied (like public.signals including all);
        alter table public.signals set schema old;
        alter table public.copied rename to signals;
    """,
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_table_that_was_swapped_for_a_copy_is_found(db: Database, swap: str) -> None:
    owner = db.connect()
    user = held_by_cloud(owner)
    assert strict(db)[0] == 0
    owner.execute(SWAPS[swap].encode())
    add_signal(owner, user.trader)  # the copy has no guard: nothing but a report can help
    arbiter_db.install(db.conninfo())  # and an installation does not make it look well

    found = one(
        owner,
        "select * from arbiter.doctor()"
        " where object = 'protection of public.signals' and state = 'missing'",
    )
    assert found.problem.endswith(
        "and writes to the table that has its name now are not arbitrated."
    )
    code, output = strict(db)
    assert (code, "protection of public.signals: The protected table was" in output) == (1, True)
    owner.execute(
        "alter table public.signals add foreign key (trader_id) references public.traders not valid"
    )
    owner.execute(found.remedy.encode())
    assert rejection(lambda: add_signal(owner, user.trader)).sqlstate == "WX001"
    left = (
        "select count(*) from arbiter.doctor() where state = 'missing' and object ~ '^protection'"
    )
    assert value(owner, left) == 0


def test_a_dropped_table_and_none_at_all_are_found(db: Database) -> None:
    owner = db.connect()
    owner.execute("create table public.orders (user_id uuid)")
    owner.execute("select arbiter.protect('public.orders')")
    owner.execute("drop table public.signals")
    for _ in range(2):
        code, output = strict(db)
        assert code == 1
        assert "protection of public.signals: The table was dropped." in output
        assert "orders: 0 rows proved" in output  # is audited all the same
        arbiter_db.install(db.conninfo())
    owner.execute("select arbiter.unprotect('public.orders')")
    remedy = value(owner, "select remedy from arbiter.doctor() where state = 'missing'")
    owner.execute(remedy.encode())
    assert strict(db) == (1, "no table is protected\n")
    assert strict(db, "--json") == (1, "[]\n")


def test_a_view_that_was_replaced_is_found(db: Database) -> None:
    """With the comment and the dependencies of the one that arbiter has made."""
    owner = db.connect()
    owner.execute(
        """
        create or replace view arbiter._path_1_1 as
          select p.id as key, '00000000-0000-4000-8000-000000000001'::uuid as value
            from public.traders p where p.user_id is not null
        """
    )
    found = "select state from arbiter.doctor() where object = 'protection of public.signals'"
    assert value(owner, found) == "outdated"
    arbiter_db.install(db.conninfo())
    assert value(owner, found) == "ok"
    owner.execute("alter view arbiter.machines reset (security_invoker)")
    found = "select state from arbiter.doctor() where object = 'view arbiter.machines'"
    assert value(owner, found) == "outdated"
    arbiter_db.install(db.conninfo())
    assert rows(owner, found) == []


def test_a_second_parent_is_found(db: Database) -> None:
    """Updates over it fire no statement trigger of the child."""
    owner = db.connect()
    owner.execute(
        """
        create table public.base (user_id uuid, qty integer);
        create table public.kid () inherits (public.base);
        select arbiter.protect('public.base', p_verbs => '{insert,update}');
        create table public.other (qty integer);
        alter table public.kid inherit public.other;
        """
    )
    found = one(owner, "select * from arbiter.doctor() where object ~ '^parent'")
    assert (found.object, found.state) == ("parent public.other of public.base", "outdated")
    owner.execute("alter table public.kid no inherit public.other")
    assert rows(owner, "select * from arbiter.doctor() where object ~ '^parent'") == []


def test_a_partition_that_was_given_away_stops_no_unprotect(db: Database) -> None:
    owner, admin = db.connect(), db.connect("postgres")
    owner.execute(
        """
        create table public.ticks (user_id uuid not null, day integer) partition by range (day);
        create table public.ticks_a partition of public.ticks for values from (0) to (10);
        select arbiter.protect('public.ticks');
        alter table public.ticks detach partition public.ticks_a;
        """
    )
    admin.execute("alter table public.ticks_a owner to authenticator")
    owner.execute("select arbiter.unprotect('public.ticks')")
    left = "select count(*) from pg_trigger where tgrelid = 'public.ticks_a'::regclass"
    assert value(owner, left) == 0
    with pytest.raises(arbiter_db.InstallError, match="policy arbiter_claim on table"):
        arbiter_db.uninstall(db.conninfo())  # the policy uses arbiter's functions
    admin.execute("drop policy arbiter_claim on public.ticks_a")
    arbiter_db.uninstall(db.conninfo())


def test_views_and_temporary_tables_of_others_stop_no_uninstall(db: Database) -> None:
    client = db.connect(role="authenticated")
    client.execute("create temporary table held (status arbiter.execution_status)")
    admin = db.connect("postgres")
    admin.execute("grant create on schema public to authenticator")
    admin.execute("grant select on public.cloud_machines to authenticator")
    other = db.connect("authenticator")
    other.execute("create view public.beats as select last_health_check from public.cloud_machines")
    report = arbiter_db.uninstall(db.conninfo(), drop_columns=True)
    (kept,) = [line for line in report if "last_health_check" in line]
    assert kept.startswith("left column last_health_check of public.cloud_machines, which is used:")
    assert "view public.beats" in kept or "view beats" in kept
    assert "dropped column source of public.signals" in report
    assert value(db.connect(), "select to_regnamespace('arbiter') is null")


def test_a_registry_that_was_swapped_for_a_copy_is_found(db: Database) -> None:
    """The machines of the copy are not known, and the browser would take over from them."""
    owner = db.connect()
    owner.execute(
        """
        create table public.copied (like public.cloud_machines including all);
        alter table public.cloud_machines rename to machines_old;
        alter table public.copied rename to cloud_machines;
        alter table public.cloud_machines enable row level security;
        """
    )
    code, output = strict(db)
    assert (code, "registry public.cloud_machines: The registered table was" in output) == (1, True)
    found = "select remedy from arbiter.doctor() where object = 'registry public.cloud_machines'"
    owner.execute(value(owner, found + " and state = 'missing'").encode())
    assert rows(owner, found + " and state <> 'ok'") == []
    assert strict(db)[0] == 0


def test_a_policy_that_was_written_anew_word_by_word_is_foreign(db: Database) -> None:
    """Neither its text nor its comment says who has made it."""
    arbiter_db.install(db.conninfo())  # which records the oids of this database
    owner = db.connect()
    owner.execute("""
        do $copy$
        declare
          v_policy record;
          v_comment text;
        begin
          select * into v_policy from arbiter._policies()
           where table_name = 'public.signals'::regclass and policy_name = 'arbiter_claim';
          select obj_description(oid, 'pg_policy') into v_comment from pg_policy
           where polrelid = 'public.signals'::regclass and polname = 'arbiter_claim';
          drop policy arbiter_claim on public.signals;
          execute 'create policy arbiter_claim ' || v_policy.definition;
          execute format('comment on policy arbiter_claim on public.signals is %L', v_comment);
        end
        $copy$""")
    query = (
        "select state from arbiter.doctor() where object = 'policy arbiter_claim on public.signals'"
    )
    assert value(owner, query) == "foreign"
    with pytest.raises(
        arbiter_db.InstallError, match="a policy arbiter_claim that arbiter has not"
    ):
        arbiter_db.install(db.conninfo())


def test_a_policy_of_another_hand_is_foreign(db: Database) -> None:
    """An install does not replace it, so the remedy says what to do first."""
    owner = db.connect()
    query = "select * from arbiter.doctor() where object = 'policy arbiter_claim on public.signals'"
    assert rows(owner, query) == []
    owner.execute("drop policy arbiter_claim on public.signals")
    owner.execute("create policy arbiter_claim on public.signals as restrictive using (true)")
    found = one(owner, query)
    assert (found.state, found.remedy) == (
        "foreign",
        "Drop or rename it first. Run: arbiter-db install",
    )
    with pytest.raises(
        arbiter_db.InstallError, match="a policy arbiter_claim that arbiter has not"
    ):
        arbiter_db.install(db.conninfo())
    owner.execute("alter policy arbiter_claim on public.signals rename to mine")
    arbiter_db.install(db.conninfo())
    assert rows(owner, query) == []
