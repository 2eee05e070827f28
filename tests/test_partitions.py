"""Protected tables that are partitioned, and tables with inheritance children.

A statement trigger fires for the table that a statement names, and a row that moves to another
partition fires other triggers than one that stays. So everything is tried over the root, over the
partitions between, and on the leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from story import (
    User,
    activate,
    add_machine,
    add_user,
    backend,
    beat,
    count_rows,
    detail_of,
    one,
    refusal,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

NAIVE = Path(__file__).with_name("naive.sql")

COLUMNS = """
  trader_id uuid not null references public.traders (id),
  venue text not null,
  day integer not null,
  quantity integer not null default 0,
  source text not null default 'local',
  machine_id uuid
"""

#: Every shape has leaves for days 1 to 9 and 10 to 19, and a default for what is left.
SHAPES = {
    "range": f"""
        create table public.ticks ({COLUMNS}) partition by range (day);
        create table public.ticks_a partition of public.ticks for values from (1) to (10);
        create table public.ticks_b partition of public.ticks for values from (10) to (20);
    """,
    "list": f"""
        create table public.ticks ({COLUMNS}) partition by list ((day / 10));
        create table public.ticks_a partition of public.ticks for values in (0);
        create table public.ticks_b partition of public.ticks for values in (1);
    """,
    "deep": f"""
        create table public.ticks ({COLUMNS}) partition by list (venue);
        create table public.ticks_x partition of public.ticks for values in ('x')
          partition by range (day);
        create table public.ticks_a partition of public.ticks_x for values from (1) to (10);
        create table public.ticks_b partition of public.ticks_x for values from (10) to (20);
    """,
    "reordered": f"""
        create table public.ticks ({COLUMNS}) partition by range (day);
        create table public.ticks_a (
          extra integer, machine_id uuid, source text not null default 'local', day integer not null,
          quantity integer not null default 0, venue text not null, trader_id uuid not null
        );
        alter table public.ticks_a drop column extra;
        alter table public.ticks attach partition public.ticks_a for values from (1) to (10);
        create table public.ticks_b partition of public.ticks for values from (10) to (20);
    """,
    "inheritance": f"""
        create table public.ticks ({COLUMNS});
        create table public.ticks_a (note text) inherits (public.ticks);
        create table public.ticks_b () inherits (public.ticks_a);
    """,
}

PARTITIONED = [shape for shape in SHAPES if shape != "inheritance"]

#: What a write may name, from the root to the leaf.
NAMES = {"deep": ["ticks", "ticks_x", "ticks_a"]}

#: What may be asked of the catalog about a table and its children, but for the columns.
OBJECTS = """
with family as (
  select relid from pg_partition_tree('public.ticks')
  union select 'public.ticks'::regclass
  union select inhrelid from pg_inherits where inhparent in (
    select 'public.ticks'::regclass union select 'public.ticks_a'::regclass)
)
select 'trigger' as kind, tgrelid::regclass::text as on_table, tgname::text as name, tgenabled::text
  from pg_trigger where tgrelid in (select relid from family) and not tgisinternal
union all
select 'default', adrelid::regclass::text, attname, pg_get_expr(adbin, adrelid)
  from pg_attrdef join pg_attribute on attrelid = adrelid and attnum = adnum
 where adrelid in (select relid from family) and attname <> 'source'
union all
select 'function', '', p.oid::regprocedure::text, ''
  from pg_proc p where pronamespace = 'arbiter'::regnamespace
union all
select 'protection', '', protected_table::text, '' from arbiter.protections
order by 1, 2, 3
"""


@dataclass(frozen=True)
class Stage:
    """Ada is local; Bob's machine holds. The service role writes."""

    owner: Conn
    conn: Conn
    ada: User
    bob: User
    machine: UUID

    def insert(self, table: str, user: User, day: int = 5, source: str = "local") -> None:
        """One row into a table by its name."""
        machine = self.machine if source == "cloud" else None
        self.conn.execute(
            sql.SQL(
                "insert into {} (trader_id, venue, day, source, machine_id)"
                " values (%s, 'x', %s, %s, %s)"
            ).format(sql.Identifier("public", table)),
            (user.trader, day, source, machine),
        )

    def copy(self, table: str, user: User, day: int = 5) -> None:
        """One local row by COPY."""
        query = sql.SQL("copy {} (trader_id, venue, day) from stdin").format(
            sql.Identifier("public", table)
        )
        with self.conn.cursor().copy(query) as out:
            out.write_row((user.trader, "x", day))

    def update(self, table: str, change: str, day: int = 5) -> int:
        """Change the rows of a day; how many there were."""
        query = f"update public.{table} set {change} where day = {day}"
        params = {"machine": self.machine, "bobs_trader": self.bob.trader}
        return self.conn.execute(query.encode(), params).rowcount

    def look(self) -> list[Any]:
        """All rows."""
        return rows(self.owner, "select * from public.ticks order by trader_id, day")


def code(run: Any, *args: Any) -> str:
    """The SQLSTATE of the refusal, with which its DETAIL must agree."""
    error = refusal(run, *args)
    codes = {
        "WX001": "cloud_active",
        "WX004": "not_holder",
        "WX005": "wrong_identity",
        "WX006": "provenance_immutable",
    }
    assert error.sqlstate is not None
    assert detail_of(error)["code"] == codes[error.sqlstate]
    return error.sqlstate


def stage(db: Database, shape: str, protect: str | None = "public.ticks") -> Stage:
    """A table of that shape, protected unless ``protect`` is None (more arguments may follow)."""
    owner = db.connect()
    owner.execute(SHAPES[shape].encode())
    grant(owner)
    if protect:
        owner.execute(f"select arbiter.protect('{protect}')" if "'" not in protect else protect)
    ada, bob = add_user(owner), add_user(owner)
    return Stage(owner, backend(db), ada, bob, activate(owner, bob))


def grant(owner: Conn) -> None:
    owner.execute("grant all on all tables in schema public to service_role")
