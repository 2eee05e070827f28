"""Protected tables that are partitioned, and tables with inheritance children.

A statement trigger fires for the table that a statement names, and a row that moves to another
partition fires other triggers than one that stays. So everything is tried over the root, over the
partitions between, and on the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import (
    User,
    activate,
    add_user,
    backend,
    count_rows,
    detail_of,
    one,
    rejection,
    rows,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

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

#: Every shape has leaves a and b, for days 1 to 9 and 10 to 19.
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
          extra integer, machine_id uuid, source text not null default 'local',
          day integer not null,
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

#: What may be asked of the catalog about a table and its children, but for the columns.
OBJECTS = """
with family as (
  select relid from pg_partition_tree('public.ticks')
  union select 'public.ticks'::regclass
  union select inhrelid from pg_inherits where inhparent in (
    select 'public.ticks'::regclass union select 'public.ticks_a'::regclass)
)
select 'trigger' as kind, tgrelid::regclass::text as on_table, tgname::text as name,
       tgenabled::text as state
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

    db: Database
    owner: Conn
    conn: Conn
    ada: User
    bob: User
    machine: str

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
    """The SQLSTATE of the rejection, with which its DETAIL must agree."""
    error = rejection(run, *args)
    codes = {
        "WX001": "cloud_active",
        "WX004": "not_holder",
        "WX005": "wrong_identity",
        "WX006": "provenance_immutable",
    }
    assert error.sqlstate is not None
    assert detail_of(error)["code"] == codes[error.sqlstate]
    return error.sqlstate


def stage(db: Database, shape: str, protect: str | None = "'public.ticks'") -> Stage:
    """A table of that shape, protected with these arguments; None: not protected."""
    owner = db.connect()
    owner.execute(SHAPES[shape].encode())
    owner.execute("grant all on all tables in schema public to service_role")
    owner.execute("update arbiter.settings set heartbeat_timeout = interval '1 hour'")
    if protect is not None:
        owner.execute(f"select arbiter.protect({protect})".encode())
    ada, bob = add_user(owner), add_user(owner)
    return Stage(db, owner, backend(db), ada, bob, activate(owner, bob))


Stages = Callable[..., Stage]


@pytest.fixture(scope="module")
def stages(templates: Templates) -> Iterator[Stages]:
    """Stages by shape and protection, each made once; the table is empty when it is asked for."""
    with ExitStack() as stack:

        @cache
        def make(shape: str, protect: str) -> Stage:
            return stage(stack.enter_context(templates.clone("installed")), shape, protect)

        def emptied(shape: str, protect: str = "'public.ticks'") -> Stage:
            at = make(shape, protect)
            at.owner.execute("delete from public.ticks")
            return at

        yield emptied


def names(shape: str) -> list[str]:
    """What a write may name, from the root to the leaf of day 5."""
    return ["ticks", "ticks_x", "ticks_a"] if shape == "deep" else ["ticks", "ticks_a"]


UPDATES = "'public.ticks', p_verbs => '{insert,update}'"

EACH_NAME = [
    pytest.param(shape, name, id=f"{shape}-{name}") for shape in SHAPES for name in names(shape)
]
EACH_NAME_PARTITIONED = [p for p in EACH_NAME if p.values[0] in PARTITIONED]


# Inserts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["insert", "copy"])
@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_inserts_are_judged_on_each_table_that_they_may_name(
    stages: Stages, shape: str, name: str, verb: str
) -> None:
    at = stages(shape)
    write = {"insert": at.insert, "copy": at.copy}[verb]
    write(name, at.ada)

    assert code(write, name, at.bob) == "WX001"
    assert count_rows(at.owner, "public.ticks") == 1
    at.insert(name, at.bob, source="cloud")
    stamped = rows(at.owner, "select arbiter_xid is not null from public.ticks")
    assert stamped == [(True,), (True,)]


@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_evidence_cannot_be_forged_in_a_partition(stages: Stages, shape: str, name: str) -> None:
    at = stages(shape)
    query = (
        f"insert into public.{name} (trader_id, venue, day, arbiter_xid) values (%s, 'x', 5, {{}})"
    )

    for forged in ("'3'", "null"):
        assert code(at.conn.execute, query.format(forged).encode(), (at.ada.trader,)) == "WX005"

    assert at.look() == []


@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_without_evidence_there_is_no_column_and_the_guard_all_the_same(
    stages: Stages, shape: str, name: str
) -> None:
    at = stages(shape, "'public.ticks', p_evidence => false")
    at.insert(name, at.ada)

    assert code(at.insert, name, at.bob) == "WX001"
    assert "arbiter_xid" not in one(at.owner, "select * from public.ticks")._fields


def test_one_statement_over_many_partitions(stages: Stages) -> None:
    at = stages("deep")
    query = (
        "insert into public.ticks (trader_id, venue, day)"
        " select u.trader, 'x', d from unnest(%s::uuid[]) u (trader), generate_series(1, 19) d"
    )
    at.conn.execute(query, ([at.ada.trader],))

    assert code(at.conn.execute, query, ([at.ada.trader, at.bob.trader],)) == "WX001"

    assert count_rows(at.owner, "public.ticks") == 19


def test_an_upsert_is_judged_in_its_partition(db: Database) -> None:
    at = stage(db, "range", None)
    at.owner.execute("alter table public.ticks add primary key (trader_id, day)")
    at.owner.execute(f"select arbiter.protect({UPDATES})".encode())
    upsert = (
        "insert into public.{} (trader_id, venue, day, source, machine_id)"
        " values (%s, 'x', 5, %s, %s) on conflict (trader_id, day) do update"
        " set quantity = ticks.quantity + 1, source = excluded.source,"
        "     machine_id = excluded.machine_id"
    )
    for name in ("ticks", "ticks_a"):
        query = upsert.format(name).replace("ticks.quantity", f"{name}.quantity").encode()
        before = at.look()
        assert code(at.conn.execute, query, (at.bob.trader, "local", None)) == "WX001"
        assert at.look() == before
        at.conn.execute(query, (at.bob.trader, "cloud", at.machine))

    assert [(row.quantity, row.source) for row in at.look()] == [(1, "cloud")]


# Rows that stay where they are -------------------------------------------------------------------

#: What an update may try to change; each is rejected on a table protected for inserts.
CHANGES = {
    "source": "source = 'cloud'",
    "machine": "machine_id = %(machine)s",
    "source and machine": "source = 'cloud', machine_id = %(machine)s",
    "user": "trader_id = %(bobs_trader)s",
    "xid": "arbiter_xid = '3'",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_provenance_stays_in_a_partition(
    stages: Stages, shape: str, name: str, change: str
) -> None:
    at = stages(shape)
    at.insert("ticks_a", at.ada)
    before = at.look()

    assert code(at.update, name, CHANGES[change]) == "WX006"

    assert at.look() == before
    assert at.update(name, "quantity = 7") == 1


@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_a_replica_session_is_guarded_in_a_partition(stages: Stages, shape: str, name: str) -> None:
    at = stages(shape)
    at.insert("ticks_a", at.ada)
    before = at.look()
    there = replace(at, conn=at.db.connect("postgres"))
    there.conn.execute("set session_replication_role = replica")

    assert code(there.update, name, CHANGES["source and machine"]) == "WX006"
    assert code(there.insert, name, at.bob) == "WX001"

    assert at.look() == before


# Rows that move ----------------------------------------------------------------------------------

MOVES = {
    "update": "update public.{name} set day = 15, {change} where day = 5",
    "merge": "merge into public.{name} t using (select 5 as day) n on t.day = n.day"
    " when matched then update set day = 15, {change}",
}


def move(at: Stage, how: str, name: str, change: str) -> None:
    """Move the rows of day 5 to another partition and change them in the same statement."""
    query = MOVES[how].format(name=name, change=change)
    at.conn.execute(query.encode(), {"machine": at.machine, "bobs_trader": at.bob.trader})


def above_the_leaf(shape: str) -> list[str]:
    return names(shape)[:-1]


EACH_MOVE = [
    pytest.param(shape, name, how, id=f"{shape}-{name}-{how}")
    for shape in PARTITIONED
    for name in above_the_leaf(shape)
    for how in MOVES
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("shape", "name", "how"), EACH_MOVE)
def test_a_row_that_moves_keeps_its_provenance(
    stages: Stages, shape: str, name: str, how: str, change: str
) -> None:
    at = stages(shape)
    at.insert("ticks_a", at.ada)
    (before,) = at.look()

    assert code(move, at, how, name, CHANGES[change]) == "WX006"

    assert at.look() == [before]
    move(at, how, name, "quantity = 7")
    assert at.look() == [before._replace(day=15, quantity=7)]
    assert count_rows(at.owner, "public.ticks_b") == 1


@pytest.mark.naive
def test_a_naive_guard_of_updates_lets_a_row_that_moves_change(trading_db: Database) -> None:
    owner = trading_db.connect()
    owner.execute(NAIVE.read_bytes())
    owner.execute(SHAPES["range"].encode())
    owner.execute("select naive.guard('immutable', 'public.ticks')")
    user = add_user(owner)
    owner.execute(
        "insert into public.ticks (trader_id, venue, day) values (%s, 'x', 5)", (user.trader,)
    )
    assert rejection(owner.execute, "update public.ticks set source = 'cloud'").sqlstate == "WX006"

    owner.execute("update public.ticks set source = 'cloud', day = 15")

    assert one(owner, "select source, day from public.ticks") == ("cloud", 15)


@pytest.mark.parametrize(("shape", "name", "how"), EACH_MOVE)
def test_a_move_is_a_write_where_updates_are_judged(
    stages: Stages, shape: str, name: str, how: str
) -> None:
    at = stages(shape, UPDATES)
    at.insert("ticks_a", at.bob, source="cloud")
    (before,) = at.look()

    assert code(move, at, how, name, "source = 'local', machine_id = null") == "WX001"
    assert code(move, at, how, name, "machine_id = null") == "WX005"
    assert (
        code(
            move,
            at,
            how,
            name,
            "trader_id = (select id from public.traders"
            " where user_id <> (select user_id from public.cloud_machines))",
        )
        == "WX006"
    )
    assert at.look() == [before]

    move(at, how, name, "quantity = 7, arbiter_xid = '3'")
    (after,) = at.look()
    assert after == before._replace(day=15, quantity=7, arbiter_xid=after.arbiter_xid)
    assert int(after.arbiter_xid) > int(before.arbiter_xid)


@pytest.mark.parametrize(("shape", "name"), EACH_NAME)
def test_an_update_in_a_partition_is_a_write_where_updates_are_judged(
    stages: Stages, shape: str, name: str
) -> None:
    at = stages(shape, UPDATES)
    at.insert("ticks_a", at.ada)
    at.insert("ticks_a", at.bob, day=6, source="cloud")
    ada, bob = sorted(at.look(), key=lambda row: row.day)

    assert code(at.update, name, "source = 'local', machine_id = null", 6) == "WX001"
    assert code(at.update, name, "source = 'cloud', machine_id = %(machine)s", 5) == "WX005"
    assert code(at.update, name, "trader_id = %(bobs_trader)s", 5) == "WX006"
    assert sorted(at.look(), key=lambda row: row.day) == [ada, bob]

    assert at.update(name, "quantity = 7, arbiter_xid = '3'", 5) == 1
    assert at.update(name, "quantity = 8", 6) == 1
    again = sorted(at.look(), key=lambda row: row.day)
    assert [(row.quantity, row.source) for row in again] == [(7, "local"), (8, "cloud")]
    assert int(again[0].arbiter_xid) > int(bob.arbiter_xid)


# Partitions that come and go ---------------------------------------------------------------------

NEW_PARTITION = {
    "create": "create table public.ticks_c partition of public.ticks for values from (20) to (30)",
    "attach": """
        create table public.ticks_c (like public.ticks including constraints);
        alter table public.ticks_c alter column source set default 'local',
          alter column quantity set default 0;
        alter table public.ticks attach partition public.ticks_c for values from (20) to (30);
    """,
    "attach a tree": """
        create table public.ticks_c (like public.ticks including constraints)
          partition by list (venue);
        alter table public.ticks_c alter column source set default 'local',
          alter column quantity set default 0;
        create table public.ticks_c_x partition of public.ticks_c for values in ('x');
        alter table public.ticks attach partition public.ticks_c for values from (20) to (30);
    """,
}


@pytest.mark.parametrize("protect", ["'public.ticks'", UPDATES], ids=["insert", "insert,update"])
@pytest.mark.parametrize("how", NEW_PARTITION)
def test_a_new_partition_is_guarded_after_protect(db: Database, how: str, protect: str) -> None:
    at = stage(db, "range", protect)
    at.owner.execute(NEW_PARTITION[how].encode())
    at.owner.execute("grant all on all tables in schema public to service_role")
    # Over the root it is guarded at once.
    assert code(at.insert, "ticks", at.bob, 25) == "WX001"

    at.owner.execute(f"select arbiter.protect({protect})".encode())

    for name in ["ticks_c", *(["ticks_c_x"] if how == "attach a tree" else [])]:
        assert code(at.insert, name, at.bob, 25) == "WX001"
        assert code(at.copy, name, at.bob, 25) == "WX001"
        at.insert(name, at.ada, 25)
        if protect == UPDATES:
            change = "trader_id = %(bobs_trader)s"
        else:
            change = CHANGES["source and machine"]
        assert code(at.update, name, change, 25) == "WX006"
        at.update(name, "quantity = 7", 25)
    assert {row.source for row in at.look()} == {"local"}


def test_a_detached_partition_does_not_hold_unprotect_up(db: Database) -> None:
    at = stage(db, "range", UPDATES)
    at.owner.execute("alter table public.ticks detach partition public.ticks_b")

    at.owner.execute("select arbiter.unprotect('public.ticks')")

    at.insert("ticks_b", at.bob, 15)  # a table of its own now, and not protected
    at.update("ticks_b", "quantity = 7", 15)
    assert one(at.owner, "select source, quantity from public.ticks_b") == ("local", 7)


def test_a_partition_cannot_be_protected_by_itself(db: Database) -> None:
    at = stage(db, "range", None)
    error = rejection(at.owner.execute, "select arbiter.protect('public.ticks_a')")
    assert error.sqlstate == "42809"


# The triggers themselves -------------------------------------------------------------------------

PROTECTIONS = {
    f"{verbs}, {mode}, {'' if evidence else 'no '}evidence": (
        f"'public.ticks', p_verbs => '{{{verbs}}}', p_mode => '{mode}', p_evidence => {evidence}"
    )
    for verbs, mode, evidence in (
        ("insert", "enforce", True),
        ("insert,update", "enforce", True),
        ("insert", "enforce", False),
        ("insert", "observe", True),
    )
}


def objects(conn: Conn) -> list[Any]:
    """Everything of arbiter on the table and its children."""
    return rows(conn, OBJECTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_unprotect_leaves_nothing_but_the_columns(db: Database, shape: str) -> None:
    at = stage(db, shape, None)
    before = objects(at.owner)

    for number, protection in enumerate(PROTECTIONS.values()):
        at.owner.execute(f"select arbiter.protect({protection})".encode())
        assert objects(at.owner) != before
        at.owner.execute("select arbiter.unprotect('public.ticks')")

        assert objects(at.owner) == before
        at.insert("ticks", at.bob, 2 * number + 1)
        at.insert("ticks_a", at.bob, 2 * number + 2)
        assert at.update("ticks", "source = 'cloud'", 2 * number + 1) == 1


@pytest.mark.parametrize("last", PROTECTIONS)
def test_unprotect_removes_what_earlier_calls_have_left(db: Database, last: str) -> None:
    at = stage(db, "range", None)
    before = objects(at.owner)

    for protection in [*PROTECTIONS.values(), PROTECTIONS[last]]:
        at.owner.execute(f"select arbiter.protect({protection})".encode())
    at.owner.execute("select arbiter.unprotect('public.ticks')")

    assert objects(at.owner) == before


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_last_protect_counts(db: Database, shape: str) -> None:
    at = stage(db, shape, None)
    for last in PROTECTIONS.values():
        at.owner.execute(f"select arbiter.protect({last})".encode())
        first = objects(at.owner)

        for protection in [*PROTECTIONS.values(), last]:
            at.owner.execute(f"select arbiter.protect({protection})".encode())
            states = {row.state for row in objects(at.owner) if row.kind == "trigger"}
            assert states == {"A"}

        # The functions are numbered by protection, which stays the same.
        assert objects(at.owner) == first
        at.owner.execute("select arbiter.unprotect('public.ticks')")


@pytest.mark.parametrize("how", ["disable", "enable replica"])
@pytest.mark.parametrize("shape", ["deep", "inheritance"])
def test_protect_mends_what_was_switched_off(db: Database, shape: str, how: str) -> None:
    at = stage(db, shape, UPDATES)
    whole = objects(at.owner)
    for name in names(shape):
        for row in whole:
            if row.kind == "trigger" and row.on_table == name:
                statement = f'alter table public.{name} {how} trigger "{row.name}"'
                at.owner.execute(statement.encode())
        assert objects(at.owner) != whole

        at.owner.execute(f"select arbiter.protect({UPDATES})".encode())

        assert objects(at.owner) == whole
