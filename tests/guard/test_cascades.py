"""What a foreign key does to who wrote a row is not a write: on update cascade, on delete set null.

A client cannot pass its own update for one.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from story import (
    activate,
    add_machine,
    add_signal,
    add_trader,
    add_user,
    age,
    backend,
    browser,
    one,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: The app's keys, as an app has them that renames what it refers to.
CASCADE = """
alter table public.signals
  drop constraint signals_trader_id_fkey,
  add constraint signals_trader_id_fkey foreign key (trader_id) references public.traders (id)
    on update cascade on delete cascade,
  drop constraint arbiter_machine_id_fkey,
  add constraint signals_machine_id_fkey foreign key (machine_id)
    references public.cloud_machines (id) on update cascade on delete set null;
alter table public.traders
  drop constraint traders_user_id_fkey,
  add constraint traders_user_id_fkey foreign key (user_id) references auth.users (id)
    on update cascade;
alter table public.cloud_machines
  drop constraint cloud_machines_user_id_fkey,
  add constraint cloud_machines_user_id_fkey foreign key (user_id) references auth.users (id)
    on update cascade;
select arbiter.protect('public.signals');
"""
ROW = "select trader_id, source, machine_id, arbiter_xid from public.signals where id = %s"


class Stage:
    """Ada is local, Bob's machine holds; each has a signal."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.owner.execute(CASCADE.encode())
        self.conn = backend(db)
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas = add_signal(self.conn, self.ada.trader)
        self.machine = activate(self.owner, self.bob)
        self.bobs = add_signal(self.conn, self.bob.trader, "cloud", self.machine)

    def row(self, signal: str) -> Any:
        return one(self.owner, ROW, signal)


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


def rename(conn: Conn, table: str, old: str) -> str:
    new = str(uuid4())
    cur = conn.execute(f"update {table} set id = %s where id = %s".encode(), (new, old))
    assert cur.rowcount == 1
    return new


# What keys do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("savepoint", [False, True])
def test_the_parents_new_key_replaces_the_old_one(at: Stage, savepoint: bool) -> None:
    """Rows of the machine and of the browser, whoever holds; nothing else of them changes."""
    adas, bobs = at.row(at.adas), at.row(at.bobs)
    with at.conn.transaction():
        if savepoint:
            at.conn.execute("select pg_current_xact_id()")
            with at.conn.transaction():
                trader = rename(at.conn, "public.traders", at.bob.trader)
        else:
            trader = rename(at.conn, "public.traders", at.bob.trader)
    assert at.row(at.bobs) == bobs._replace(trader_id=trader)
    trader = rename(at.owner, "public.traders", at.ada.trader)
    assert at.row(at.adas) == adas._replace(trader_id=trader)


def test_the_machines_new_key_replaces_the_old_one(at: Stage) -> None:
    before = at.row(at.bobs)
    set_status(at.owner, at.machine, "stopped")
    machine = rename(at.conn, "public.cloud_machines", at.machine)
    assert at.row(at.bobs) == before._replace(machine_id=machine)


def test_a_user_with_a_new_id(at: Stage) -> None:
    """The rows lead to the user over the trader, whose key stays; its user is the new one."""
    before = at.row(at.bobs)
    rename(at.conn, "auth.users", at.bob.id)
    assert at.row(at.bobs) == before


def test_the_user_is_a_column_of_the_row(at: Stage) -> None:
    at.owner.execute("""
        create table public.notes (
          id integer primary key,
          user_id uuid not null references auth.users (id) on update cascade);
        select arbiter.protect('public.notes');
        grant all on public.notes to service_role""")
    at.conn.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    user = rename(at.conn, "auth.users", at.ada.id)
    assert value(at.owner, "select user_id from public.notes") == user


@pytest.mark.parametrize("two_ways", [False, True])
@pytest.mark.parametrize("kind", ["plain", "partitioned"])
def test_a_user_who_is_deleted_leaves_the_rows(at: Stage, kind: str, two_ways: bool) -> None:
    """Rows of the machine and of the browser, with all that they say of who wrote them."""
    at.owner.execute(
        f"""
        create table public.notes (
          id integer,
          user_id uuid references auth.users (id) on delete set null,
          trader_id uuid references public.traders (id) on delete set null)
          {"partition by range (id)" if kind == "partitioned" else ""};
        grant all on public.notes to service_role""".encode()
    )
    if kind == "partitioned":
        at.owner.execute("create table public.some partition of public.notes default")
    path = "user_id, trader_id.user_id" if two_ways else "user_id"
    at.owner.execute("select arbiter.protect('public.notes', %s)", (path,))
    at.conn.execute("insert into public.notes values (1, %s, %s)", (at.ada.id, at.ada.trader))
    at.conn.execute(
        "insert into public.notes values (2, %s, %s, 'cloud', %s)",
        (at.bob.id, at.bob.trader, at.machine),
    )
    row = "select * from public.notes where id = %s"
    before = [one(at.owner, row, 1), one(at.owner, row, 2)]

    def is_rejected(change: str, *params: object) -> None:
        for conn in (at.conn, at.owner):
            error = rejection(conn.execute, f"update public.notes set {change}", params)
            assert error.sqlstate == "WX006"

    is_rejected("user_id = null" if not two_ways else "user_id = null, trader_id = null")
    at.owner.execute("delete from public.signals where trader_id = %s", (at.ada.trader,))
    at.owner.execute("delete from public.traders where id = %s", (at.ada.trader,))
    at.owner.execute("delete from auth.users where id = %s", (at.ada.id,))
    assert one(at.owner, row, 1) == before[0]._replace(user_id=None, trader_id=None)
    assert one(at.owner, row, 2) == before[1]
    # And nobody gets it now.
    is_rejected("user_id = %s where id = 1", at.bob.id)
    audit = "select finding, reason, row_count from arbiter.audit('public.notes')"
    assert rows(at.owner, audit) == [("not_provable", "unowned", 1)]


MACHINES_GO = """
alter table public.cloud_machines
  drop constraint cloud_machines_user_id_fkey,
  add constraint cloud_machines_user_id_fkey foreign key (user_id) references auth.users (id)
    on delete cascade
"""


@pytest.mark.parametrize("kind", ["plain", "partitioned"])
@pytest.mark.parametrize("unowned", ["reject", "allow"])
@pytest.mark.parametrize("first", ["machine", "row"])
def test_where_updates_are_arbitrated_it_is_nobodys_write(
    at: Stage, first: str, unowned: str, kind: str
) -> None:
    """Whoever holds, and also when the machine is deleted with its user, in either order."""
    if first == "machine":  # keys act in the order in which they were made
        at.owner.execute(MACHINES_GO)
    at.owner.execute(
        f"""
        create table public.notes (
          id integer, user_id uuid references auth.users (id) on delete set null, note text)
          {"partition by range (id)" if kind == "partitioned" else ""};
        grant all on public.notes to service_role, authenticated""".encode()
    )
    if kind == "partitioned":
        at.owner.execute("create table public.some partition of public.notes default")
    if first == "row":
        at.owner.execute(MACHINES_GO)
    at.owner.execute(
        "select arbiter.protect('public.notes', p_verbs => '{insert,update}', p_unowned => %s)",
        (unowned,),
    )
    at.conn.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    mine = "insert into public.notes values (%s, %s, null, 'cloud', %s)"
    at.conn.execute(mine, (2, at.bob.id, at.machine))
    row = "select id, user_id, note, source, machine_id from public.notes where id = %s"
    before = [one(at.owner, row, 1), one(at.owner, row, 2)]
    for user in (at.ada, at.bob):
        at.owner.execute("delete from public.signals where trader_id = %s", (user.trader,))
        at.owner.execute("delete from public.traders where id = %s", (user.trader,))
    # A machine of Ada's is active: it is not asked.
    activate(at.owner, at.ada)

    at.owner.execute("delete from auth.users where id = %s", (at.ada.id,))
    assert one(at.owner, row, 1) == before[0]._replace(user_id=None)
    at.owner.execute("delete from auth.users where id = %s", (at.bob.id,))
    # protect() adds no foreign key for the machine to a partitioned table.
    machine = None if kind == "plain" else at.machine
    assert one(at.owner, row, 2) == before[1]._replace(user_id=None, machine_id=machine)

    # A write to such a row is one to a row without a user.
    write = "update public.notes set note = 'x', source = 'local', machine_id = null"
    if unowned == "reject":
        for conn in (at.conn, at.owner):
            assert rejection(conn.execute, write).sqlstate == "WX005"
            assert rejection(conn.execute, "update public.notes set note = 'x'").sqlstate == "WX005"
    else:
        at.conn.execute(write)
        browser = at.db.connect(role="authenticated")
        assert rejection(browser.execute, write).sqlstate == "WX005"
    take = "update public.notes set user_id = %s, source = 'local', machine_id = null"
    eve = add_user(at.owner)
    assert rejection(at.conn.execute, take, (eve.id,)).sqlstate == "WX006"
    audit = "select finding, reason, row_count from arbiter.audit('public.notes')"
    assert rows(at.owner, audit) == [("not_provable", "unowned", 2)]


@pytest.mark.parametrize("amends", [False, True])
def test_where_updates_are_arbitrated_a_row_that_keeps_its_user_is_written(
    at: Stage, amends: bool
) -> None:
    at.owner.execute("""
        create table public.notes (
          id integer, user_id uuid references auth.users (id) on update cascade);
        alter table public.traders drop constraint traders_user_id_fkey;
        select arbiter.protect('public.notes', 'user_id', '{insert,update}');
        grant all on public.notes to service_role""")
    at.conn.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    ada = rename(at.owner, "auth.users", at.ada.id)
    assert value(at.owner, "select user_id from public.notes") == ada
    at.owner.execute("update auth.users set id = %s where id = %s", (at.ada.id, ada))
    activate(at.owner, at.ada)
    with at.owner.transaction():
        if amends:
            at.owner.execute("select arbiter.amend('public.notes', 'a new key')")
            ada = rename(at.owner, "auth.users", at.ada.id)
            assert value(at.owner, "select user_id from public.notes") == ada
        else:
            assert rejection(rename, at.owner, "auth.users", at.ada.id).sqlstate == "WX001"


@pytest.mark.parametrize("name", ["aa_touch", "zz_touch"])
def test_other_triggers_may_change_more_of_such_a_row(at: Stage, name: str) -> None:
    """And the database has values of its own in it."""
    at.owner.execute(
        f"""
        create table public.notes (
          id integer,
          user_id uuid references auth.users (id) on delete set null on update cascade,
          twice integer generated always as (id * 2) stored,
          changes integer not null default 0);
        create function public.tg_touch() returns trigger language plpgsql as
          $$ begin new.changes := new.changes + 1; return new; end $$;
        create trigger {name} before update on public.notes
          for each row execute function public.tg_touch();
        select arbiter.protect('public.notes', p_verbs => '{{insert,update}}');
        grant all on public.notes to service_role;
        alter table public.traders drop constraint traders_user_id_fkey""".encode()
    )
    mine = "insert into public.notes (id, user_id, source, machine_id) values (%s, %s, %s, %s)"
    at.conn.execute(mine, (1, at.ada.id, "local", None))
    at.conn.execute(mine, (2, at.bob.id, "cloud", at.machine))
    # Long before its user, so that the row says cloud and names no machine when the user goes.
    at.owner.execute("delete from public.cloud_machines where id = %s", (at.machine,))
    bob = rename(at.owner, "auth.users", at.bob.id)
    look = "select user_id, twice, changes, source, machine_id from public.notes order by id"
    assert rows(at.owner, look) == [
        (at.ada.id, 2, 0, "local", None),
        (bob, 4, 2, "cloud", None),
    ]
    at.owner.execute("delete from auth.users where id in (%s, %s)", (at.ada.id, bob))
    assert rows(at.owner, look) == [
        (None, 2, 1, "local", None),
        (None, 4, 3, "cloud", None),
    ]


#: A client deletes what its row names, and changes the row in the same statement as the key would.
WRITTEN_BESIDE = """
with gone as (delete from public.{parent} where id = %(parent)s returning id)
update public.notes set {column} = null, note = 'x', {writer}
  where id = %(row)s and (select count(*) from gone) = 1
"""
#: The same from inside a trigger of the client's own.
WRITTEN_INSIDE = """
with gone as (delete from public.{parent} where id = %(parent)s returning id)
insert into lever select count(*) from gone
"""


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("unowned", ["reject", "allow"])
@pytest.mark.parametrize("gone", ["trader", "machine"])
def test_a_client_does_not_write_while_the_key_acts(
    at: Stage, gone: str, unowned: str, nested: bool
) -> None:
    at.owner.execute(
        """
        create table public.notes (
          id integer, trader_id uuid references public.traders (id) on delete set null, note text);
        grant all on public.notes to service_role, authenticated;
        grant delete on public.traders to authenticated;
        create policy mine on public.traders for delete to authenticated using (true)"""
    )
    at.owner.execute(
        "select arbiter.protect('public.notes', 'trader_id.user_id', '{insert,update}',"
        " p_unowned => %s)",
        (unowned,),
    )
    trader = add_trader(at.owner, at.bob.id)
    at.conn.execute(
        "insert into public.notes values (1, %s, null, 'cloud', %s)", (trader, at.machine)
    )
    before = one(at.owner, "select * from public.notes")
    conn = at.conn
    if gone == "trader":
        conn = browser(at.db, at.bob)
        names = {"parent": "traders", "column": "trader_id"}
        writer = "source = 'local', machine_id = null"
    else:
        names = {"parent": "cloud_machines", "column": "machine_id"}
        writer = "source = 'cloud'"
    values = {"parent": trader if gone == "trader" else at.machine, "row": 1}
    statement = WRITTEN_BESIDE.format(writer=writer, **names)
    if nested:
        name, role = at.db.name, "authenticated" if gone == "trader" else "service_role"
        at.owner.execute(f'grant temporary on database "{name}" to {role}'.encode())
        conn.execute("create temp table lever (n integer)")
        conn.execute(
            f"""
            create function pg_temp.pull() returns trigger language plpgsql as $$
            begin
              update public.notes set {names["column"]} = null, note = 'x', {writer};
              return new;
            end $$""".encode()
        )
        conn.execute(
            "create trigger pull before insert on lever"
            " for each row execute function pg_temp.pull()"
        )
        statement = WRITTEN_INSIDE.format(**names)
    assert rejection(conn.execute, statement.encode(), values).sqlstate == "WX005"
    assert one(at.owner, "select * from public.notes") == before


#: Prints as the same text as 1.1 where extra_float_digits is -15.
BLURRED = "1.4"


@pytest.mark.parametrize("gone", ["trader", "machine"])
@pytest.mark.parametrize("value", [f"price = {BLURRED}", "said = '{\"a\":1}'", "size = 1.00"])
def test_no_setting_hides_what_a_client_changes_beside_the_key(
    at: Stage, value: str, gone: str
) -> None:
    """Nor does a type whose texts, or values, are the same for different ones."""
    at.owner.execute("""
        create table public.notes (
          id integer, trader_id uuid references public.traders (id) on delete set null,
          price double precision, said json, size numeric)
          partition by range (id);
        create table public.some partition of public.notes default;
        grant all on public.notes to service_role;
        select arbiter.protect('public.notes', 'trader_id.user_id', '{insert,update}')""")
    trader = add_trader(at.owner, at.bob.id)
    at.conn.execute(
        """insert into public.notes values (1, %s, 1.1, '{"a":2,"a":1}', 1.0, 'cloud', %s)""",
        (trader, at.machine),
    )
    before = one(at.owner, "select n::text from public.notes n")
    at.conn.execute("set extra_float_digits = -15")
    if gone == "trader":
        write = f"""
            with gone as (delete from public.traders where id = '{trader}' returning id)
            update public.notes set trader_id = null, {value} where (select count(*) from gone) = 1
            """
    else:
        at.owner.execute("delete from public.cloud_machines where id = %s", (at.machine,))
        write = f"update public.notes set machine_id = null, {value}"
    assert rejection(at.conn.execute, write.encode()).sqlstate == "WX005"
    assert one(at.owner, "select n::text from public.notes n") == before


@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_a_row_of_no_user_is_not_written_by_taking_its_key_away(at: Stage, unowned: str) -> None:
    """A built-in trader has no user, so the row has none before and after."""
    at.owner.execute("""
        create table public.notes (
          id integer, trader_id uuid references public.traders (id) on delete set null, note text);
        grant all on public.notes to service_role, authenticated""")
    at.owner.execute("insert into public.notes values (1, %s)", (add_trader(at.owner, None),))
    at.owner.execute(
        "select arbiter.protect('public.notes', 'trader_id.user_id', '{insert,update}',"
        " p_unowned => %s)",
        (unowned,),
    )
    write = "update public.notes set trader_id = null, note = 'x', source = %s, machine_id = %s"
    client = browser(at.db, at.bob)
    assert rejection(client.execute, write, ("local", None)).sqlstate == "WX005"
    assert rejection(at.conn.execute, write, ("cloud", at.machine)).sqlstate == "WX005"
    if unowned == "reject":
        assert rejection(at.conn.execute, write, ("local", None)).sqlstate == "WX005"
    else:
        assert at.conn.execute(write, ("local", None)).rowcount == 1


def test_an_observed_write_to_rows_without_a_user_is_recorded_once_for_each(at: Stage) -> None:
    at.owner.execute("""
        create table public.notes (id integer, user_id uuid, note text);
        insert into public.notes values (1), (2);
        select arbiter.protect('public.notes', p_verbs => '{insert,update}', p_mode => 'observe');
        grant all on public.notes to service_role""")
    assert at.conn.execute("update public.notes set note = 'x'").rowcount == 2
    found = "select code, count(*) from arbiter.observations group by code"
    assert rows(at.owner, found) == [("wrong_identity", 2)]


def test_a_row_without_a_user_is_not_made_by_hand(at: Stage) -> None:
    """Not while the user is there, nor by a key that does something else."""
    at.owner.execute("""
        create table public.notes (id integer, user_id uuid references auth.users (id));
        select arbiter.protect('public.notes');
        grant all on public.notes to service_role""")
    at.conn.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    drop = "update public.notes set user_id = null"
    assert rejection(at.conn.execute, drop).sqlstate == "WX006"
    at.owner.execute("alter table public.notes drop constraint notes_user_id_fkey")
    at.owner.execute("delete from public.traders where id <> %s", (at.bob.trader,))
    at.owner.execute("delete from auth.users where id = %s", (at.ada.id,))
    assert rejection(at.conn.execute, drop).sqlstate == "WX006"


def test_a_deferred_key_makes_no_row_without_a_user(at: Stage) -> None:
    """Such a row may name a user who is not there."""
    at.owner.execute("""
        create table public.notes (id integer,
          user_id uuid references auth.users (id) on delete set null deferrable initially deferred);
        select arbiter.protect('public.notes');
        grant all on public.notes to service_role""")
    at.conn.execute("begin")
    at.conn.execute("insert into public.notes values (1, gen_random_uuid())")
    drop = "update public.notes set user_id = null"
    assert rejection(at.conn.execute, drop).sqlstate == "WX006"
    at.conn.execute("rollback")


def test_partitions(at: Stage) -> None:
    at.owner.execute("""
        create table public.ticks (
          trader_id uuid not null references public.traders (id) on update cascade,
          day integer not null) partition by range (day);
        create table public.ticks_a partition of public.ticks for values from (0) to (10);
        select arbiter.protect('public.ticks');
        grant all on public.ticks to service_role""")
    at.conn.execute("insert into public.ticks values (%s, 1)", (at.ada.trader,))
    trader = rename(at.conn, "public.traders", at.ada.trader)
    assert value(at.owner, "select trader_id from public.ticks") == trader


def test_where_updates_are_arbitrated_it_is_judged_as_one(at: Stage) -> None:
    """By what the row says; who wrote it is not asked again."""
    at.owner.execute("select arbiter.protect('public.signals', p_verbs => '{insert,update}')")
    trader = rename(at.conn, "public.traders", at.ada.trader)
    assert at.row(at.adas).trader_id == trader
    trader = rename(at.conn, "public.traders", at.bob.trader)
    assert at.row(at.bobs).trader_id == trader
    age(at.owner, at.machine, heartbeat=timedelta(minutes=5))
    error = rejection(rename, at.conn, "public.traders", trader)
    assert error.sqlstate == "WX004"


# What clients do ---------------------------------------------------------------------------------


def test_a_client_cannot_do_it_itself(at: Stage) -> None:
    other = add_trader(at.owner, at.ada.id)
    machine = add_machine(at.owner, at.ada)
    for change, new in (("trader_id", at.ada.trader), ("machine_id", machine)):
        statement = f"update public.signals set {change} = %s where id = %s".encode()
        assert rejection(at.conn.execute, statement, (new, at.bobs)).sqlstate == "WX006"
    # Another trader of the same user is the same user.
    at.conn.execute("update public.signals set trader_id = %s where id = %s", (other, at.adas))


RENAMED_BESIDE = """
with renamed as (
  update public.traders set id = gen_random_uuid() where id = %(own)s returning id)
update public.signals set trader_id = %(others)s where id = %(signal)s
  and (select count(*) from renamed) = 1
"""

#: From inside a trigger of the client's own, on a table of its own.
NESTED = """
create temp table lever (n integer);
create function pg_temp.pull() returns trigger language plpgsql as $$
begin
  update public.signals set trader_id = '{others}' where id = '{signal}';
  return new;
end $$;
create trigger pull before insert on lever for each row execute function pg_temp.pull();
"""
PULLED = """
with renamed as (
  update public.traders set id = gen_random_uuid() where id = %(own)s returning id)
insert into lever select count(*) from renamed
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_client_cannot_act_while_the_key_does(at: Stage, nested: bool) -> None:
    """It renames its trader, and in the same statement gives the row to another user's trader."""
    names = {"own": at.bob.trader, "others": at.ada.trader, "signal": at.bobs}
    before = at.row(at.bobs)
    statement = RENAMED_BESIDE
    if nested:
        at.owner.execute(
            "grant temporary on database {} to service_role".format(f'"{at.db.name}"').encode()
        )
        at.conn.execute(NESTED.format(**names).encode())
        statement = PULLED
    assert rejection(at.conn.execute, statement.encode(), names).sqlstate == "WX006"
    assert at.row(at.bobs) == before


def test_without_such_a_key_the_row_stays(at: Stage) -> None:
    """The parent is gone and another one was written, but the key waits for the row to follow."""
    at.owner.execute(
        "alter table public.signals drop constraint signals_trader_id_fkey,"
        " add constraint signals_trader_id_fkey foreign key (trader_id)"
        " references public.traders (id) deferrable initially deferred;"
        " select arbiter.protect('public.signals')"
    )
    with at.conn.transaction(force_rollback=True):
        trader = rename(at.conn, "public.traders", at.bob.trader)
        follow = "update public.signals set trader_id = %s where id = %s"
        assert rejection(at.conn.execute, follow, (trader, at.bobs)).sqlstate == "WX006"
