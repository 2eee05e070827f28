"""Rows that lead to their user in several ways, which must agree.

Ada is local; Bob's machine holds and is healthy. An order names its user, its trader, both or none;
arbiter has found both ways by itself.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import (
    activate,
    add_machine,
    add_signal,
    add_trader,
    add_user,
    browser,
    detail_of,
    rejection,
    rows,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

ORDERS = """
create table public.orders (
  id bigint generated always as identity primary key,
  trader_id uuid,
  user_id uuid,
  quantity integer not null default 0,
  constraint orders_trader_id_fkey foreign key (trader_id) references public.traders (id)
    on update cascade deferrable initially deferred
);
grant all on public.orders to authenticated, service_role;
"""
BOTH = "user_id, trader_id.user_id"
DIFFERENT = "The row leads to different users: all ways of p_user_path must agree."
NO_USER = "The row has no user; a table with such rows is protected with p_unowned => 'allow'."
BROKEN = "The row does not lead to a user: the row that it names does not exist."


class Stage:
    def __init__(self, db: Database, options: str = "") -> None:
        self.db = db
        self.owner = db.connect()
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.bobs_machine = activate(self.owner, self.bob)
        add_signal(self.owner, self.ada.trader)
        builtin = add_trader(self.owner, None)
        self.owner.execute(ORDERS.encode())
        self.owner.execute(f"select arbiter.protect('public.orders'{options})".encode())
        self.users = {"ada": self.ada.id, "bob": self.bob.id, "null": None}
        self.traders = {
            "ada": self.ada.trader,
            "bob": self.bob.trader,
            "built in": builtin,
            "null": None,
        }

    def insert(self, *orders: tuple[str, str]) -> None:
        """Orders, each as the user and the trader that it names, in one statement."""
        self.owner.execute(
            sql.SQL("insert into public.orders (user_id, trader_id) values {}").format(
                sql.SQL(", ").join(
                    sql.SQL("({}, {})").format(self.users[user], self.traders[trader])
                    for user, trader in orders
                )
            )
        )

    def said(self, *orders: tuple[str, str]) -> tuple[str, str | None]:
        """Code and hint of the rejection of these orders; none is written."""
        before = value(self.owner, "select count(*) from public.orders")
        error = rejection(self.insert, *orders)
        assert value(self.owner, "select count(*) from public.orders") == before
        return detail_of(error)["code"], error.diag.message_hint


def path(conn: Conn, table: str) -> str:
    found: str = value(
        conn,
        "select user_path from arbiter.protections where protected_table = %s::regclass",
        table,
    )
    return found


def expected(user: str, trader: str, unowned: str) -> str | None:
    """The hint of the rejection of an order, None when it is admitted, WX001 for Bob's."""
    named = {user, trader} - {"null", "built in"}
    if len(named) == 2:
        return DIFFERENT
    if not named:
        return None if unowned == "allow" else NO_USER
    return None if named == {"ada"} else "cloud_active"


# Which ways --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ("user_id uuid, trader_id uuid references public.traders", BOTH),
        ("trader_id uuid references public.traders, user_id uuid", BOTH),
        ("user_id uuid not null, trader_id uuid references public.traders", "user_id"),
        ("user_id uuid", "user_id"),
        ("user_id uuid, trader_id uuid", "user_id"),
        ("trader_id uuid references public.traders", "trader_id.user_id"),
        ("user_id uuid references auth.users, trader_id uuid references public.traders", BOTH),
    ],
)
def test_a_user_that_may_be_null_is_not_the_only_way(
    db: Database, columns: str, found: str
) -> None:
    owner = db.connect()
    owner.execute(f"create table public.found ({columns})".encode())
    owner.execute("select arbiter.protect('public.found')")
    assert path(owner, "public.found") == found


def test_more_than_one_key_beside_it_is_not_obvious(db: Database) -> None:
    owner = db.connect()
    owner.execute(
        "create table public.found (user_id uuid, trader_id uuid references public.traders,"
        " copied_from uuid references public.traders)"
    )
    error = rejection(owner.execute, "select arbiter.protect('public.found')")
    assert error.sqlstate == "22023"
    ways = "user_id, trader_id.user_id, copied_from.user_id"
    assert error.diag.message_hint == (
        f"Choose one in p_user_path, or several that must agree: {ways}"
    )
    owner.execute("select arbiter.protect('public.found', %s)", (ways,))
    assert path(owner, "public.found") == ways


@pytest.mark.parametrize("wrong", ["", ",", "user_id,", ", user_id", "user_id,,user_id", "a b, c"])
def test_what_is_no_path_is_said(db: Database, wrong: str) -> None:
    owner = db.connect()
    owner.execute(ORDERS.encode())
    error = rejection(owner.execute, "select arbiter.protect('public.orders', %s)", (wrong,))
    assert error.sqlstate == "22023"
    assert str(error.diag.message_primary).startswith("arbiter: p_user_path is not a path: ")


def test_a_comma_may_stand_in_a_name(db: Database) -> None:
    owner = db.connect()
    ada, bob = add_user(owner), add_user(owner)
    owner.execute('create table public.odd ("a,b" uuid, "c""d," uuid)')
    owner.execute("""select arbiter.protect('public.odd', '"a,b", "c""d,"')""")
    owner.execute('insert into public.odd ("a,b", "c""d,") values (%s, %s)', (ada.id, ada.id))
    error = rejection(
        owner.execute,
        'insert into public.odd ("a,b", "c""d,") values (%s, %s)',
        (ada.id, bob.id),
    )
    assert error.diag.message_hint == DIFFERENT


# Inserts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_each_pair(db: Database, unowned: str) -> None:
    """Alone, behind a row that is admitted, and twice."""
    at = Stage(db, f", p_unowned => '{unowned}'")
    assert path(at.owner, "public.orders") == BOTH
    for user, trader in product(at.users, at.traders):
        hint = expected(user, trader, unowned)
        batches: list[list[tuple[str, str]]] = [
            [(user, trader)],
            [("ada", "ada"), (user, trader)],
            [(user, trader), (user, trader)],
        ]
        for batch in batches:
            if hint is None:
                at.insert(*batch)
            elif hint == "cloud_active":
                assert at.said(*batch)[0] == hint
            else:
                assert at.said(*batch) == ("wrong_identity", hint)


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_user_that_is_left_out_is_that_of_the_trader(db: Database, isolation: str) -> None:
    """The attack: a row that says nothing of its user counts as one of a built-in trader."""
    at = Stage(db, ", p_unowned => 'allow'")
    conn = browser(db, at.bob)
    conn.execute(f"set default_transaction_isolation = '{isolation}'".encode())
    error = rejection(
        conn.execute, "insert into public.orders (trader_id) values (%s)", (at.bob.trader,)
    )
    assert error.sqlstate == "WX001"


def test_a_way_that_comes_later_is_not_believed(db: Database) -> None:
    """The key is checked at commit: until then the trader may be made, and be that of Bob."""
    at = Stage(db)
    at.traders["later"] = value(at.owner, "select gen_random_uuid()")
    assert at.said(("ada", "later")) == ("wrong_identity", NO_USER)
    assert at.said(("null", "later")) == ("wrong_identity", NO_USER)
    at.owner.execute("select arbiter.protect('public.orders', p_unowned => 'allow')")
    assert at.said(("ada", "later")) == ("wrong_identity", BROKEN)
    assert at.said(("null", "later")) == ("wrong_identity", BROKEN)


def test_a_machine_writes_by_either_way(db: Database) -> None:
    at = Stage(db)
    insert = (
        "insert into public.orders (user_id, trader_id, source, machine_id)"
        " values (%s, %s, 'cloud', %s)"
    )
    for user, trader in (("bob", "null"), ("null", "bob"), ("bob", "bob"), ("bob", "built in")):
        at.owner.execute(insert, (at.users[user], at.traders[trader], at.bobs_machine))
    error = rejection(at.owner.execute, insert, (at.bob.id, at.ada.trader, at.bobs_machine))
    assert (error.sqlstate, error.diag.message_hint) == ("WX005", DIFFERENT)


def test_three_ways(db: Database) -> None:
    owner = db.connect()
    ada, bob = add_user(owner), add_user(owner)
    owner.execute(
        "create table public.copies (user_id uuid, trader_id uuid references public.traders,"
        " copied_from uuid references public.traders)"
    )
    owner.execute(
        "select arbiter.protect('public.copies', 'user_id, trader_id.user_id, copied_from.user_id')"
    )
    insert = "insert into public.copies values (%s, %s, %s)"
    people = (None, ada, bob)
    for one, two, three in product(people, people, people):
        row = (one and one.id, two and two.trader, three and three.trader)
        named = {person.id for person in (one, two, three) if person}
        if len(named) == 1:
            owner.execute(insert, row)
        else:
            hint = rejection(owner.execute, insert, row).diag.message_hint
            assert hint == (DIFFERENT if named else NO_USER)


def test_keys_of_several_types(db: Database) -> None:
    owner = db.connect()
    ada, bob = add_user(owner), add_user(owner)
    activate(owner, bob)
    owner.execute(
        "create table public.bots (id bigint primary key, user_id uuid);"
        "create table public.fills (user_id uuid, bot_id bigint references public.bots)"
    )
    owner.execute("insert into public.bots values (1, %s), (2, %s)", (ada.id, bob.id))
    owner.execute("select arbiter.protect('public.fills')")
    assert path(owner, "public.fills") == "user_id, bot_id.user_id"
    owner.execute("insert into public.fills values (%s, null), (null, 1), (%s, 1)", (ada.id,) * 2)
    insert = "insert into public.fills values (null, 1), (null, 2)"
    assert rejection(owner.execute, insert).sqlstate == "WX001"
    assert rejection(
        owner.execute, "insert into public.fills values (%s, 2)", (ada.id,)
    ).diag.message_hint == DIFFERENT  # fmt: skip


# Updates -----------------------------------------------------------------------------------------


def test_who_wrote_a_row_can_be_completed_and_not_changed(db: Database) -> None:
    at = Stage(db)
    at.insert(("null", "ada"))
    update = "update public.orders set user_id = %s, trader_id = %s"
    for user, trader in (("ada", "ada"), ("ada", "null"), ("null", "ada")):
        at.owner.execute(update, (at.users[user], at.traders[trader]))
    for user, trader in (("bob", "ada"), ("null", "bob"), ("bob", "bob"), ("null", "null")):
        error = rejection(at.owner.execute, update, (at.users[user], at.traders[trader]))
        assert error.sqlstate == "WX006"
    assert rows(at.owner, "select user_id, trader_id from public.orders") == [(None, at.ada.trader)]


def test_an_update_that_is_arbitrated_must_agree_too(db: Database) -> None:
    at = Stage(db, ", p_verbs => '{insert,update}'")
    at.insert(("ada", "ada"))
    at.owner.execute("update public.orders set quantity = 1, source = 'local'")
    error = rejection(at.owner.execute, "update public.orders set trader_id = %s", (at.bob.trader,))
    assert error.sqlstate == "WX006"


@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
def test_a_row_without_a_user_does_not_come_to_lead_to_two(db: Database, verbs: str) -> None:
    """Neither way counts where they disagree, so the row would go on without a user."""
    at = Stage(db, f", p_verbs => '{verbs}', p_unowned => 'allow'")
    at.insert(("null", "built in"))
    error = rejection(
        at.owner.execute,
        "update public.orders set user_id = %s, trader_id = %s",
        (at.ada.id, at.bob.trader),
    )
    assert error.sqlstate == "WX006"


@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
def test_a_parents_new_key_is_followed(db: Database, verbs: str) -> None:
    at = Stage(db, f", p_verbs => '{verbs}'")
    at.insert(("ada", "ada"), ("null", "ada"), ("ada", "null"))
    at.owner.execute("delete from public.signals")  # their key does not cascade
    new = value(
        at.owner,
        "update public.traders set id = gen_random_uuid() where id = %s returning id",
        at.ada.trader,
    )
    found = [
        trader for (trader,) in rows(at.owner, "select trader_id from public.orders order by id")
    ]
    assert found == [new, new, None]


# Afterwards --------------------------------------------------------------------------------------


def test_the_audit_takes_either_way_and_finds_what_disagrees(db: Database) -> None:
    at = Stage(db)
    at.insert(("ada", "ada"), ("null", "ada"), ("ada", "built in"))
    assert rows(at.owner, "select * from arbiter.audit('public.orders')") == []
    at.owner.execute("alter table public.orders disable trigger arbiter_guard_insert")
    at.insert(("ada", "bob"), ("bob", "null"), ("null", "bob"), ("null", "built in"))
    found = rows(at.owner, "select * from arbiter.audit('public.orders', true) order by reason")
    assert [(f.finding, f.reason, f.row_count) for f in found] == [
        ("contradiction", "two_users", None),
        ("not_provable", "unowned", 1),
        ("contradiction", "wrong_environment", None),
        ("contradiction", "wrong_environment", None),
        ("proved", None, 3),
    ]
    assert found[0].user_id == at.ada.id
    assert found[0].row_key == {"id": 4}


def test_a_way_that_is_gone_is_an_error_and_doctor_says_which(db: Database) -> None:
    at = Stage(db)
    at.owner.execute("alter table public.orders drop constraint orders_trader_id_fkey")
    assert rejection(at.insert, ("ada", "ada")).sqlstate == "WX005"
    at.insert(("ada", "null"))
    (ill,) = rows(
        at.owner, "select * from arbiter.doctor() where object = 'protection of public.orders'"
    )
    assert ill.problem == (
        "arbiter: column trader_id of table public.orders is not a foreign key of one column"
    )


def test_an_install_leaves_it_as_it_is_and_an_uninstall_nothing(db: Database) -> None:
    at = Stage(db)
    views = "select relname from pg_class where relname ~ '^_path_2_' order by 1"
    assert rows(at.owner, views) == [("_path_2_1",)]
    arbiter_db.install(db.conninfo())
    assert rows(at.owner, views) == [("_path_2_1",)]
    assert at.said(("ada", "bob")) == ("wrong_identity", DIFFERENT)
    at.owner.execute("select arbiter.unprotect('public.orders')")
    assert rows(at.owner, views) == []
    add_machine(at.owner, at.ada, "starting")
    at.insert(("ada", "bob"))
