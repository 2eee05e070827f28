"""Names of the app that look like something in the code that arbiter generates."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from psycopg import sql
from story import add_user, one, rejection, value

if TYPE_CHECKING:
    from conftest import Database

#: Words of the templates, quotes, and placeholders of format().
NAMES = [
    "__machine",
    "__key",
    "__user_of(n)",
    "__rows as n --",
    "it's",
    'a "b"',
    "$tg$",
    "$$",
    "%s",
]

PARTS = ("fleet", "id", "owner", "status", "beat", "owners", "orders", "key", "machine")

#: Words that plpgsql reads as its own, and SQL as names: all that there are.
OF_PLPGSQL = ["strict", "begin", "declare", "execute", "foreach", "loop", "while", "by", "if"]

NAMED = {name: {part: f"{name} {part}" for part in PARTS} for name in NAMES}
NAMED["words of plpgsql"] = dict(zip(PARTS, OF_PLPGSQL, strict=True))
NAMED["the same of the other columns"] = dict(zip(PARTS, reversed(OF_PLPGSQL), strict=True))

TABLES = """
create table public.{fleet} (
  {id} uuid primary key, {owner} uuid not null, {status} text not null, {beat} timestamptz);
create table public.{owners} ({id} uuid primary key, {owner} uuid);
create table public.{orders} (
  {key} uuid references public.{owners} ({id}), {machine} uuid references public.{fleet} ({id}));
"""
REGISTER = """
select arbiter.unprotect('public.signals');
select arbiter.register_machines(
  format('public.%%I', %(fleet)s::text)::regclass, %(id)s, %(owner)s, %(status)s, %(beat)s)
"""
PROTECT = """
select arbiter.protect(format('public.%%I', %(orders)s::text)::regclass,
  format('%%I.%%I', %(key)s::text, %(owner)s::text), %(verbs)s, %(machine)s)
"""


@pytest.mark.parametrize("verbs", [["insert"], ["insert", "update"]])
@pytest.mark.parametrize("named", NAMED)
def test_names_are_only_names(db: Database, named: str, verbs: list[str]) -> None:
    """The guard works as for other names, and doctor() has nothing to say."""
    names = NAMED[named]
    quoted = {part: sql.Identifier(text) for part, text in names.items()}
    owner = db.connect()
    owner.execute(sql.SQL(TABLES).format(**quoted))
    for statement in REGISTER.split(";"):
        owner.execute(statement.encode(), names)
    owner.execute(PROTECT.encode(), {**names, "verbs": verbs})

    user, machine, trader = add_user(owner), str(uuid4()), str(uuid4())
    owner.execute(
        sql.SQL("insert into public.{fleet} values ({}, {}, 'running', now())").format(
            machine, user.id, **quoted
        )
    )
    owner.execute(sql.SQL("update public.{fleet} set {beat} = now()").format(**quoted))
    assert value(owner, "select holder from arbiter.leases") == "cloud"
    owner.execute(
        sql.SQL("insert into public.{owners} values ({}, {})").format(trader, user.id, **quoted)
    )
    insert = sql.SQL("insert into public.{orders} ({key}, {machine}, source) values ({}, {}, {})")
    local = insert.format(trader, None, "local", **quoted)
    assert rejection(owner.execute, local).sqlstate == "WX001"
    owner.execute(insert.format(trader, machine, "cloud", **quoted))
    keep = sql.SQL("update public.{orders} set {machine} = {machine}").format(**quoted)
    assert owner.execute(keep).rowcount == 1
    change = sql.SQL("update public.{orders} set {key} = null").format(**quoted)
    assert rejection(owner.execute, change).sqlstate == "WX006"
    assert (
        one(
            owner,
            "select count(*) as n from arbiter.doctor() where state not in ('ok', 'note')"
            " and object !~ '^(index|alter)'",
        ).n
        == 0
    )
