"""Rows of one writer take one query: it locks the first row's lease, and compares the others.

So each row that is not like the first must be found, with keys of any type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from story import activate, add_signal, add_user, count_rows, rejection, value

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: Type of the key by which a row leads to its user, and two keys: of ada, who may write, and of
#: bob, whose machine holds. The last ones are equal by a comparison that is not the key's own.
KEYS = {
    "uuid": ("uuid", str(uuid4()), str(uuid4())),
    "bigint": ("bigint", "1", "2"),
    "text": ("text", "ada", "bob"),
    "varchar": ("varchar(9)", "ada", "bob"),
    "numeric": ("numeric", "1", "1.1"),
    "date": ("date", "2026-01-01", "2026-01-02"),
    "domain": ("public.key", "1", "2"),
    "floats of the same short text": ("float8", "1", "1.0000000000000002"),
    "intervals of the same text": ("interval", "1 day", "24 hours 0.000001 s"),
}


def stage(conn: Conn, kind: str) -> tuple[str, str]:
    """A protected table whose rows lead to their user by a key of that type; the two keys."""
    of_type, adas, bobs = KEYS[kind]
    ada, bob = add_user(conn), add_user(conn)
    add_signal(conn, ada.trader)
    activate(conn, bob)
    conn.execute("create domain public.key as integer")
    conn.execute(
        f"""
        create table public.bots (id {of_type} primary key, user_id uuid not null);
        create table public.orders (bot_id {of_type}, n integer);
        """.encode()
    )
    conn.execute("insert into public.bots values (%s, %s), (%s, %s)", (adas, ada.id, bobs, bob.id))
    conn.execute("alter table public.orders add foreign key (bot_id) references public.bots (id)")
    conn.execute("select arbiter.protect('public.orders', 'bot_id.user_id')")
    return adas, bobs


@pytest.mark.parametrize("order", ["the other last", "the other first"])
@pytest.mark.parametrize("kind", KEYS)
def test_a_row_of_another_user_is_found(db: Database, kind: str, order: str) -> None:
    conn = db.connect()
    adas, bobs = stage(conn, kind)
    # As short as a client can make the texts of numbers.
    conn.execute("set extra_float_digits = -15")
    conn.execute("insert into public.orders values (%s, 1), (%s, 2)", (adas, adas))
    keys = (adas, adas, bobs) if order == "the other last" else (bobs, adas, adas)
    error = rejection(
        conn.execute, "insert into public.orders values (%s, 1), (%s, 2), (%s, 3)", keys
    )
    assert error.sqlstate == "WX001"
    assert count_rows(conn, "public.orders") == 2


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", KEYS)
def test_who_holds_is_admitted_without_the_slow_path(db: Database, kind: str, rows: int) -> None:
    """That takes the lock in a savepoint, which costs several times as much."""
    conn = db.connect()
    adas, _ = stage(conn, kind)
    conn.execute(
        "create or replace function arbiter._admit(p_protection_id integer, p_mode text,"
        " p_unowned text, p_user_id text, p_source text, p_machine_id text, p_flaw text)"
        " returns arbiter.error language plpgsql as $$ begin raise exception 'slow path'; end $$"
    )
    conn.execute(
        "insert into public.orders (bot_id)"
        " select b.id from public.bots b, generate_series(1, %s) where b.id = %s",
        (rows, adas),
    )
    assert count_rows(conn, "public.orders") == rows


#: What the third row says of itself, beside two of a machine that holds.
OTHERS = {
    "local": ("local", "null", "WX001"),
    "another machine": ("cloud", "%(other)s", "WX005"),
    "no machine": ("cloud", "null", "WX005"),
    "local with the machine": ("local", "%(machine)s", "WX005"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_row_that_says_something_else_is_found(db: Database, kind: str, place: int) -> None:
    conn = db.connect()
    bob, eve = add_user(conn), add_user(conn)
    machine, other = activate(conn, bob), activate(conn, eve)
    add_signal(conn, bob.trader, "cloud", machine)
    source, named, sqlstate = OTHERS[kind]
    claims = ["('cloud', %(machine)s::uuid)"] * 2
    claims.insert(place, f"('{source}', {named}::uuid)")
    insert = (
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " select %(trader)s, 'BTCUSDT', '1m', 'buy',"
        "        timestamptz '2026-02-01' + row_number() over () * interval '1 min', c.*"
        f"   from (values {', '.join(claims)}) as c"
    )
    params = {"machine": machine, "other": other, "trader": bob.trader}
    before = count_rows(conn, "public.signals")
    assert rejection(conn.execute, insert, params).sqlstate == sqlstate
    assert count_rows(conn, "public.signals") == before


def test_rows_of_several_who_all_hold_are_admitted(db: Database) -> None:
    conn = db.connect()
    ada, bob = add_user(conn), add_user(conn)
    add_signal(conn, ada.trader)
    machine = activate(conn, bob)
    add_signal(conn, bob.trader, "cloud", machine)
    conn.execute(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id) values"
        " (%s, 'A', '1m', 'buy', now(), 'local', null), (%s, 'A', '1m', 'buy', now(), 'cloud', %s)",
        (ada.trader, bob.trader, machine),
    )
    assert value(conn, "select count(*) from public.signals where symbol = 'A'") == 2
