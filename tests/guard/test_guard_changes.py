"""The table changes under its guard: until protect() is called again writes are rejected.

And the guard's plans do not change with the statistics: it finds the user, the lease and the
machine by a probe of an index, even when the statistics are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from story import (
    User,
    activate,
    add_signal,
    add_user,
    browser,
    count_rows,
    rejection,
    rows,
    value,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

NAIVE = Path(__file__).with_name("naive.sql")

SCHEMA = """
create schema other;
create table public.owners (
  id uuid not null default gen_random_uuid() primary key,
  user_id uuid not null
);
create table public.orders (
  id integer not null generated always as identity primary key,
  owner_id uuid not null references public.owners (id)
);
select arbiter.protect('public.orders');
"""


class Stage:
    """Ada is local, Bob's machine holds; each owns something that orders are for.

    ``old`` is a session that has written before the change, so that its plans are made; ``new`` is
    one that comes afterwards.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.owner.execute(SCHEMA.encode())
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.machine = activate(self.owner, self.bob)
        self.adas, self.bobs = (
            value(
                self.owner,
                "insert into public.owners (user_id) values (%s) returning id",
                user.id,
            )
            for user in (self.ada, self.bob)
        )
        # Only the guard may keep plans, so the driver prepares no statements.
        self.old = db.connect(prepare_threshold=None)
        self.insert(self.old, self.adas)
        self.insert(self.old, self.bobs, "cloud")
        assert rejection(self.insert, self.old, self.bobs).sqlstate == "WX001"

    def insert(self, conn: Conn, whose: str, claim: str = "local", **names: str) -> None:
        """An order; columns and table by the names that they have now."""
        machine = self.machine if claim == "cloud" else None
        table = names.get("table", "public.orders")
        columns: dict[str, object] = {names.get("owner_id", "owner_id"): whose}
        if "source" not in names.get("without", ""):
            columns[names.get("source", "source")] = claim
        if "machine_id" not in names.get("without", ""):
            columns[names.get("machine_id", "machine_id")] = machine
        conn.execute(
            f"insert into {table} ({', '.join(columns)})"
            f" values ({', '.join(['%s'] * len(columns))})".encode(),
            list(columns.values()),
        )

    def protect(self, call: str = "'public.orders'") -> None:
        """Protect again."""
        self.owner.execute(f"select arbiter.protect({call})".encode())


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


@dataclass(frozen=True)
class Change:
    """A change, the SQLSTATE that writes get then, and how it is made good."""

    ddl: str
    rejected: str
    mend: str = ""
    protect: str = "'public.orders'"
    names: tuple[tuple[str, str], ...] = ()
    mended_names: tuple[tuple[str, str], ...] = ()


def named(**names: str) -> tuple[tuple[str, str], ...]:
    return tuple(names.items())


UNDEFINED_TABLE = "42P01"

#: There is no operator for that type.
OTHER_TYPE = "42883"

CHANGES = {
    "column renamed, path": Change(
        "alter table public.orders rename owner_id to account_id",
        "WX005",
        protect="'public.orders', 'account_id.user_id'",
        names=named(owner_id="account_id"),
        mended_names=named(owner_id="account_id"),
    ),
    "column renamed, machine": Change(
        "alter table public.orders rename machine_id to fly_app_id",
        "WX005",
        protect="'public.orders', p_machine_column => 'fly_app_id'",
        names=named(machine_id="fly_app_id"),
        mended_names=named(machine_id="fly_app_id"),
    ),
    "foreign key dropped": Change(
        "alter table public.orders drop constraint orders_owner_id_fkey",
        "WX005",
        mend="""alter table public.orders add constraint orders_owner_id_fkey
          foreign key (owner_id) references public.owners (id)""",
    ),
    "column renamed, source": Change(
        "alter table public.orders rename source to origin",
        "WX005",
        mend="alter table public.orders rename origin to source",
        names=named(source="origin"),
    ),
    "column renamed, evidence": Change(
        "alter table public.orders rename arbiter_xid to xid8",
        "WX005",
        mend="alter table public.orders rename xid8 to arbiter_xid",
    ),
    "column dropped, machine": Change(
        "alter table public.orders drop column machine_id cascade",
        "WX005",
        names=named(without="machine_id"),
    ),
    "column dropped, source": Change(
        "alter table public.orders drop column source cascade",
        "WX005",
        names=named(without="source machine_id"),
    ),
    "column dropped, evidence": Change(
        "alter table public.orders drop column arbiter_xid cascade", "WX005"
    ),
    "default dropped, evidence": Change(
        "alter table public.orders alter column arbiter_xid drop default", "WX005"
    ),
    "type changed, evidence": Change(
        "alter table public.orders alter column arbiter_xid type text",
        OTHER_TYPE,
        mend="alter table public.orders alter column arbiter_xid drop default,"
        " alter column arbiter_xid type xid8 using arbiter_xid::xid8",
    ),
    "parent dropped": Change(
        "drop table public.owners cascade",
        UNDEFINED_TABLE,
        mend="create table public.owners (id uuid primary key, user_id uuid);"
        "insert into public.owners select case holder when 'local' then %(adas)s::uuid"
        "  else %(bobs)s::uuid end, user_id::uuid from arbiter.leases;"
        "alter table public.orders add foreign key (owner_id) references public.owners (id)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_writes_are_rejected_until_protect_is_called_again(at: Stage, change: str) -> None:
    now = CHANGES[change]
    names, mended = dict(now.names), dict(now.mended_names)
    params = {"adas": at.adas, "bobs": at.bobs}
    at.owner.execute(now.ddl.encode())

    before = count_rows(at.owner, "public.orders")
    for conn in (at.old, at.db.connect()):
        for _ in range(2):  # the second time from the plans of the first
            for whose, source in ((at.adas, "local"), (at.bobs, "local"), (at.bobs, "cloud")):
                error = rejection(lambda c, w, s: at.insert(c, w, s, **names), conn, whose, source)
                assert error.sqlstate == now.rejected
    assert count_rows(at.owner, "public.orders") == before

    for statement in now.mend.split(";"):
        at.owner.execute(statement.encode(), params if "%(" in statement else None)
    at.protect(now.protect)

    for conn in (at.old, at.db.connect()):
        at.insert(conn, at.adas, **mended)
        at.insert(conn, at.bobs, "cloud", **mended)
        error = rejection(lambda c: at.insert(c, at.bobs, **mended), conn)
        assert error.sqlstate == "WX001"
    assert count_rows(at.owner, "public.orders") == before + 4


@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_a_rejection_says_that_a_foreign_key_of_the_path_has_changed(
    at: Stage, unowned: str
) -> None:
    """And does not recommend rows without a user for it. An ORM makes keys anew under its names."""
    at.protect(f"'public.orders', p_unowned => '{unowned}'")
    at.owner.execute("alter table public.orders drop constraint orders_owner_id_fkey")
    error = rejection(at.insert, at.old, at.adas)
    assert (error.sqlstate, error.diag.message_hint) == (
        "WX005",
        "A foreign key of the path 'owner_id.user_id' is gone. The owner of the table makes it"
        " again, then calls arbiter.protect('public.orders').",
    )
    at.owner.execute(
        "alter table public.orders add constraint of_an_orm foreign key (owner_id)"
        " references public.owners (id)"
    )
    for conn in (at.old, at.db.connect()):
        error = rejection(at.insert, conn, at.adas)
        assert (error.sqlstate, error.diag.message_hint) == (
            "WX005",
            "A foreign key of the path 'owner_id.user_id' has changed. The owner of the table calls"
            " arbiter.protect('public.orders').",
        )
    at.protect()
    at.insert(at.old, at.adas)


def test_a_machine_column_of_another_type_is_no_machines_any_more(at: Stage) -> None:
    """A browser names no machine, so it writes on."""
    at.owner.execute(
        "alter table public.orders drop constraint arbiter_machine_id_fkey;"
        "drop trigger arbiter_provenance on public.orders;"
        "drop policy arbiter_claim on public.orders;"
        "alter table public.orders alter column machine_id type text"
    )
    for conn in (at.old, at.db.connect()):
        at.insert(conn, at.adas)
        assert rejection(at.insert, conn, at.bobs).sqlstate == "WX001"
        assert rejection(at.insert, conn, at.bobs, "cloud").sqlstate == OTHER_TYPE
    at.protect()
    at.insert(at.old, at.bobs, "cloud")


PROTECT_AGAIN = "select arbiter.protect('public.orders', '{path}', '{{insert}}', '{machine}'"

#: A change, and what mends it.
GONE = {
    "path": (
        "rename owner_id to account_id",
        "owner_id",
        PROTECT_AGAIN.format(path="account_id.user_id", machine="machine_id"),
    ),
    "machine": (
        "rename machine_id to fly_app_id",
        "machine_id",
        PROTECT_AGAIN.format(path="owner_id.user_id", machine="fly_app_id"),
    ),
    "source": (
        "rename source to origin",
        "source",
        "If it was renamed, rename it to source again; if it was dropped: "
        + PROTECT_AGAIN.format(path="owner_id.user_id", machine="machine_id"),
    ),
    "evidence": (
        "drop column arbiter_xid",
        "arbiter_xid",
        "If it was renamed, rename it to arbiter_xid again; if it was dropped: "
        + PROTECT_AGAIN.format(path="owner_id.user_id", machine="machine_id"),
    ),
    "machine dropped": (
        "drop column machine_id cascade",
        "machine_id",
        "Call arbiter.protect() with the names that the table has now.",
    ),
}

#: One row, rows of one writer, and rows of several.
ROWS = {
    "one": "insert into public.orders ({column}) values (%(adas)s)",
    "many": "insert into public.orders ({column}) select %(adas)s from generate_series(1, 3)",
    "several": "insert into public.orders ({column}) values (%(adas)s), (%(eves)s)",
    "update": "update public.orders set {column} = {column}",
}


@pytest.mark.parametrize("mode", ["enforce", "observe"])
@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
@pytest.mark.parametrize("change", GONE)
def test_writers_are_told_what_mends_a_column_that_is_gone(
    at: Stage, change: str, verbs: str, mode: str
) -> None:
    """Sessions with plans of before, too, and by any statement; doctor() says the same."""
    ddl, column, remedy = GONE[change]
    remedy = remedy.replace("{insert}", verbs)
    eve = add_user(at.owner)
    at.protect(f"'public.orders', p_verbs => '{verbs}', p_mode => '{mode}'")
    now = "account_id" if change == "path" else "owner_id"
    eves = value(at.owner, "insert into public.owners (user_id) values (%s) returning id", eve.id)
    writes = {name: sql.format(column="owner_id") for name, sql in ROWS.items()}
    old = at.db.connect(prepare_threshold=None)
    for write in writes.values():
        old.execute(write.encode(), {"adas": at.adas, "eves": eves})
    before = count_rows(at.owner, "public.orders")

    at.owner.execute(f"alter table public.orders {ddl}".encode())
    for conn in (old, at.db.connect()):
        for sql in ROWS.values():
            write = sql.format(column=now)
            params = {"adas": at.adas, "eves": eves}
            if mode == "observe":
                conn.execute(write.encode(), params)
                continue
            error = rejection(conn.execute, write, params)
            assert error.sqlstate == "WX005"
            assert (error.diag.message_hint or "").startswith(
                f"Table public.orders has no column {column} any more. What mends it: {remedy}"
            )
    if mode == "enforce":
        assert count_rows(at.owner, "public.orders") == before
    (found,) = rows(
        at.owner,
        "select remedy from arbiter.doctor() where object = 'protection of public.orders'",
    )
    assert found[0].startswith(remedy)
    if found[0].startswith("select"):
        at.owner.execute(found[0].encode())
        old.execute(ROWS["several"].format(column=now).encode(), {"adas": at.adas, "eves": eves})


def test_a_snapshot_older_than_the_change_is_told_less(at: Stage) -> None:
    at.old.execute("begin isolation level repeatable read")
    at.old.execute("select 1")
    at.owner.execute("alter table public.orders rename machine_id to fly_app_id")
    error = rejection(lambda: at.insert(at.old, at.adas, without="machine_id"))
    assert (error.sqlstate, error.diag.message_hint) == (
        "WX005",
        "A column that the guard needs was renamed or dropped: the owner of the table calls"
        " arbiter.protect().",
    )


@pytest.mark.parametrize("kind", ["partition", "child"])
@pytest.mark.parametrize("renamed", ["user_id", "machine_id"])
def test_a_part_that_was_taken_off_is_not_read_by_names_that_it_lost(
    db: Database, renamed: str, kind: str
) -> None:
    """It keeps the guard's triggers, while the table itself has all columns."""
    owner, writer = db.connect(), db.connect(role="service_role")
    user = add_user(owner)
    by = {"partition": "partition by list (id)", "child": ""}
    of = {
        "partition": "partition of public.notes default",
        "child": "() inherits (public.notes)",
    }
    off = {
        "partition": "alter table public.notes detach partition public.part",
        "child": "alter table public.part no inherit public.notes",
    }
    owner.execute(f"create table public.notes (id integer, user_id uuid) {by[kind]}".encode())
    owner.execute(f"create table public.part {of[kind]}".encode())
    owner.execute("select arbiter.protect('public.notes', 'user_id', p_unowned => 'allow')")
    owner.execute("grant all on public.notes, public.part to service_role")
    into = "insert into public.part (id, {user_id}, {machine_id}) "
    one = into + "values (1, %s, null)"
    many = into + "select g, %s::uuid, null::uuid from generate_series(1, 2) g"
    names = {"user_id": "user_id", "machine_id": "machine_id"}
    for sql in (one, many):
        for _ in range(6):  # until the server keeps a plan
            writer.execute(sql.format(**names).encode(), (user.id,))
    owner.execute(off[kind].encode())
    for sql in (one, many):
        writer.execute(sql.format(**names).encode(), (user.id,))
    owner.execute(f"alter table public.part rename {renamed} to other".encode())
    before = count_rows(owner, "public.part")
    for conn in (writer, db.connect(role="service_role")):
        for sql in (one, many):
            write = sql.format(**(names | {renamed: "other"})).encode()
            assert rejection(conn.execute, write, (user.id,)).sqlstate == "WX005"
    assert count_rows(owner, "public.part") == before


#: As what the trigger for rows would tell from what foreign keys do.
LIKE_A_KEY = ["user_id = null", "source = 'cloud', machine_id = null"]


@pytest.mark.parametrize("unowned", ["reject", "allow"])
@pytest.mark.parametrize("change", LIKE_A_KEY)
def test_an_update_of_a_part_that_was_taken_off_is_judged(
    db: Database, change: str, unowned: str
) -> None:
    """It has no trigger for its rows any more. A row without a user is for the backend alone."""
    owner = db.connect()
    user = add_user(owner)
    owner.execute(
        """
        create table public.notes (id integer, user_id uuid, note text) partition by list (id);
        create table public.part partition of public.notes default;
        grant all on public.notes, public.part to authenticated"""
    )
    owner.execute(
        "select arbiter.protect('public.notes', 'user_id', '{insert,update}',"
        " p_unowned => %s, p_evidence => false)",
        (unowned,),
    )
    owner.execute("insert into public.notes values (1, %s)", (user.id,))
    owner.execute("alter table public.notes detach partition public.part")
    client = browser(db, user)
    client.execute("update public.part set note = 'mine'")
    write = f"update public.part set note = 'x', {change}"
    assert rejection(client.execute, write).sqlstate == "WX005"
    assert value(owner, "select note from public.part") == "mine"


#: After these the guard still knows what it guards, by what the tables are and not by their names.
HARMLESS = {
    "table renamed": ("alter table public.orders rename to old_orders", "public.old_orders"),
    "table moved": ("alter table public.orders set schema other", "other.orders"),
    "column added": ("alter table public.orders add note text", "public.orders"),
    "column dropped": (
        "alter table public.orders drop constraint orders_pkey, drop column id",
        "public.orders",
    ),
    "source of another type": (
        "drop trigger arbiter_provenance on public.orders;"
        "drop policy arbiter_claim on public.orders;"
        "alter table public.orders alter source type varchar(10)",
        "public.orders",
    ),
    "parent renamed": ("alter table public.owners rename to accounts", "public.orders"),
    "parent moved": ("alter table public.owners set schema other", "public.orders"),
    "parent's user renamed": (
        "alter table public.owners rename user_id to holder_id",
        "public.orders",
    ),
    "parent's key renamed": ("alter table public.owners rename id to owner_id", "public.orders"),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_who_is_rejected_stays_rejected(at: Stage, change: str) -> None:
    ddl, table = HARMLESS[change]
    at.owner.execute(ddl.encode())

    before = count_rows(at.owner, table)
    for conn in (at.old, at.db.connect()):
        error = rejection(lambda c: at.insert(c, at.bobs, table=table), conn)
        assert error.sqlstate == "WX001"
        error = rejection(lambda c: at.insert(c, str(UUID(int=1)), table=table), conn)
        assert error.sqlstate == "23503"  # by the key to the owners; the guard comes after it
    assert count_rows(at.owner, table) == before
    for conn in (at.old, at.db.connect()):
        at.insert(conn, at.adas, table=table)
        at.insert(conn, at.bobs, "cloud", table=table)


#: The guard depends on these, so the server itself must reject them.
PREVENTED = {
    "type of the parent's user": ("alter table public.owners alter user_id type text", "0A000"),
    "parent's user": ("alter table public.owners drop column user_id", "2BP01"),
    "parent": ("drop table public.owners", "2BP01"),
    "type of the machine": ("alter table public.orders alter machine_id type text", "0A000"),
}


@pytest.mark.parametrize("change", PREVENTED)
def test_what_the_guard_depends_on_stays(at: Stage, change: str) -> None:
    ddl, sqlstate = PREVENTED[change]
    assert rejection(at.owner.execute, ddl.encode()).sqlstate == sqlstate
    at.insert(at.old, at.adas)


#: The name that the guard reads leads to another table than the foreign key does: what is Ada's by
#: the one is Bob's by the other.
SWAPS = {
    "table": """
        alter table public.owners rename to owners_old;
        create table public.owners (id uuid primary key, user_id uuid);
        insert into public.owners select id, %(ada)s from public.owners_old;
    """,
    "view": """
        alter table public.owners rename to owners_old;
        create view public.owners as select id, %(ada)s::uuid as user_id from public.owners_old;
    """,
    "foreign key": """
        create table public.accounts (id uuid primary key, user_id uuid);
        insert into public.accounts select id, %(bob)s from public.owners;
        alter table public.orders drop constraint orders_owner_id_fkey,
          add constraint orders_owner_id_fkey foreign key (owner_id)
            references public.accounts (id);
    """,
}


@pytest.mark.parametrize("swap", SWAPS)
def test_another_owner_table_is_not_believed(at: Stage, swap: str) -> None:
    params = {"ada": at.ada.id, "bob": at.bob.id}
    for statement in SWAPS[swap].strip().split(";"):
        at.owner.execute(
            psycopg.ClientCursor(at.owner).mogrify(statement, params).encode()
            if "%(" in statement
            else statement.encode()
        )
    # By the foreign key it is Bob's, whose machine holds.
    whose = at.adas if swap == "foreign key" else at.bobs

    before = count_rows(at.owner, "public.orders")
    for conn in (at.old, at.db.connect()):
        rejection(at.insert, conn, whose)
    assert count_rows(at.owner, "public.orders") == before

    at.protect()
    assert rejection(at.insert, at.db.connect(), whose).sqlstate == "WX001"


#: A change, what a snapshot from before it gets, and what the session gets afterwards.
KEYS = {
    "dropped": ("drop constraint orders_owner_id_fkey", "WX005", "WX005"),
    "made anew": (
        "drop constraint orders_owner_id_fkey, add constraint orders_owner_id_fkey"
        " foreign key (owner_id) references public.owners (id)",
        "55000",
        None,
    ),
}


@pytest.mark.parametrize("change", KEYS)
def test_an_old_snapshot_does_not_bring_a_key_back(at: Stage, change: str) -> None:
    """Nor does what a session plans under one stay with it."""
    ddl, by_old_snapshot, afterwards = KEYS[change]
    before = count_rows(at.owner, "public.orders")
    at.old.execute("begin isolation level repeatable read")
    at.old.execute("select 1")  # takes the snapshot, and no lock that would keep the change waiting
    at.owner.execute(f"alter table public.orders {ddl}".encode())

    assert rejection(at.insert, at.old, at.adas).sqlstate == by_old_snapshot
    at.old.execute("rollback")

    if afterwards:
        assert rejection(at.insert, at.old, at.adas).sqlstate == afterwards
    else:
        at.insert(at.old, at.adas)
    assert count_rows(at.owner, "public.orders") == before + (afterwards is None)


@pytest.mark.parametrize("column", ["machine_id", "owner_id", "arbiter_xid"])
def test_provenance_is_not_left_open_by_a_column_that_goes(at: Stage, column: str) -> None:
    # The remaining columns of a row's provenance must stay protected when one is dropped.
    at.owner.execute(f"alter table public.orders drop column {column} cascade".encode())
    look = "select id, source from public.orders order by id"
    before = rows(at.owner, look)

    rejection(at.owner.execute, "update public.orders set source = 'cloud'")

    assert rows(at.owner, look) == before


# Plans -------------------------------------------------------------------------------------------

TRADERS = 3000

#: Statistics that a table with many rows may have.
STATISTICS = {
    "analysed": "analyze {table}",
    "never analysed": """
        delete from pg_statistic where starelid = '{table}'::regclass;
        update pg_class set reltuples = -1, relpages = 0, relallvisible = 0
         where oid = '{table}'::regclass;
    """,
    "empty": """
        delete from pg_statistic where starelid = '{table}'::regclass;
        update pg_class set reltuples = 0, relpages = 0, relallvisible = 0
         where oid = '{table}'::regclass;
    """,
    "one row": """
        update pg_class set reltuples = 1, relpages = 1, relallvisible = 0
         where oid = '{table}'::regclass;
    """,
    "far too many": """
        update pg_class set reltuples = 1e9, relpages = 10000000 where oid = '{table}'::regclass;
    """,
    # A restored table has its rows and pages, but no statistics yet.
    "restored": """
        delete from pg_statistic where starelid = '{table}'::regclass;
        update pg_class set reltuples = -1,
               relpages = pg_relation_size(oid) / current_setting('block_size')::integer
         where oid = '{table}'::regclass;
    """,
}

PROBED = [
    "public.traders",
    "public.cloud_machines",
    "arbiter.leases",
    "arbiter.machine_notes",
]

WRITES = {
    "local": ("one", "local"),
    "local, 100 rows": ("many", "local"),
    "local, 100 users": ("users", "local"),
    "cloud": ("one", "cloud"),
    "cloud, 100 rows": ("many", "cloud"),
    "rejected": ("rejected", "local"),
    "position": ("position", "local"),
}


@dataclass(frozen=True)
class Crowd:
    """A database with many users, each with a lease, and a superuser's session of a replica.

    In such a session foreign keys are not checked, so that all that is counted is the guard's.
    """

    conn: Conn
    ada: User
    bob: User
    machine: str


def crowd(conn: Conn) -> None:
    """Many users, each with a trader and a machine."""
    conn.execute(
        f"""
        insert into auth.users (email) select 'user' || n from generate_series(1, {TRADERS}) n;
        insert into public.traders (user_id, name) select id, 'T' from auth.users;
        insert into public.cloud_machines (user_id, status) select id, 'stopped' from auth.users;
        """.encode()
    )


@pytest.fixture(scope="module")
def many(templates: Templates) -> Iterator[Crowd]:
    with templates.clone("installed") as database:
        conn = database.connect()
        crowd(conn)
        conn.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
        ada, bob = add_user(conn), add_user(conn)
        machine = activate(conn, bob)
        add_signal(conn, ada.trader)
        superuser = database.connect("postgres")
        superuser.execute("set session_replication_role = replica")
        for table in PROBED:
            superuser.execute(f"alter table {table} set (autovacuum_enabled = off)".encode())
        superuser.execute("update arbiter.settings set heartbeat_timeout = '1 hour'")
        yield Crowd(superuser, ada, bob, machine)


def scans(conn: Conn) -> dict[str, tuple[int, int]]:
    """Sequential and index scans of this transaction, by table."""
    return {
        row.name: (row.seq_scan, row.idx_scan)
        for row in rows(
            conn,
            "select schemaname || '.' || relname as name, seq_scan,"
            "       coalesce(idx_scan, 0) as idx_scan"
            "  from pg_stat_xact_all_tables where schemaname in ('public', 'arbiter')",
        )
    }


def write(conn: Conn, kind: str, claim: tuple[Any, ...], count: int) -> None:
    """So many signals, one for each of the traders."""
    conn.execute(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " select (%s::uuid[])[1 + n %% cardinality(%s::uuid[])], %s, '1m', 'buy',"
        "        timestamptz '2026-01-01' + n * interval '1 minute', %s, %s"
        "   from generate_series(1, %s) n",
        (claim[0], claim[0], kind, claim[1], claim[2], count),
    )


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", WRITES)
def test_the_guard_probes_indexes_with_any_statistics(
    many: Crowd, kind: str, statistics: str
) -> None:
    how, source = WRITES[kind]
    conn = many.conn
    users = [row[0] for row in rows(conn, "select id from public.traders limit 100")]
    user, machine = (many.ada, None) if source == "local" else (many.bob, many.machine)
    with conn.transaction(force_rollback=True):
        for table in PROBED:
            for statement in STATISTICS[statistics].format(table=table).split(";"):
                conn.execute(statement.encode())
        conn.execute("discard plans")
        before = scans(conn)

        if how == "position":
            insert = "insert into public.positions (user_id, symbol) values (%s, 'X')"
            conn.execute(insert, (user.id,))
        elif how == "rejected":
            with pytest.raises(psycopg.Error) as caught, conn.transaction():
                write(conn, kind, ([many.bob.trader], "local", None), 1)
            assert caught.value.sqlstate == "WX001"
        else:
            traders = users if how == "users" else [user.trader]
            write(conn, kind, (traders, source, machine), 1 if how == "one" else 100)

        after = scans(conn)
    assert [table for table in PROBED if after[table][0] != before[table][0]] == []
    expected = {"arbiter.leases"} if how == "position" else {"arbiter.leases", "public.traders"}
    if how != "rejected":  # what a savepoint rolled back is not counted
        assert {table for table in PROBED if after[table][1] > before[table][1]} >= expected


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("whose", ["ada", "bob"])
def test_status_probes_indexes_with_any_statistics(
    many: Crowd, whose: str, statistics: str
) -> None:
    conn = many.conn
    user = many.ada if whose == "ada" else many.bob
    with conn.transaction(force_rollback=True):
        for table in PROBED:
            for statement in STATISTICS[statistics].format(table=table).split(";"):
                conn.execute(statement.encode())
        conn.execute("discard plans")
        before = scans(conn)
        environment = value(conn, "select (arbiter.status(%s)).environment", user.id)
        after = scans(conn)
    assert environment == {"ada": "local", "bob": "cloud"}[whose]
    assert [table for table in PROBED if after[table][0] != before[table][0]] == []
    assert after["arbiter.leases"][1] > before["arbiter.leases"][1]


def scans_of_a_plan_made_while_the_table_was_small(conn: Conn, user: User) -> int:
    """Scans of the owners' table by a write whose guard made its plans when there was one owner."""
    conn.execute("set session_replication_role = replica")
    conn.execute("alter table public.traders set (autovacuum_enabled = off)")
    conn.execute("analyze public.traders")
    for _ in range(10):
        write(conn, "SMALL", ([user.trader], "local", None), 1)
        conn.execute("delete from public.signals where symbol = 'SMALL'")
    crowd(conn)
    with conn.transaction():
        before = scans(conn)
        write(conn, "LARGE", ([user.trader], "local", None), 1)
        return scans(conn)["public.traders"][0] - before["public.traders"][0]


def test_a_plan_made_while_the_table_was_small_probes_as_well(db: Database) -> None:
    user = add_user(db.connect())
    assert scans_of_a_plan_made_while_the_table_was_small(db.connect("postgres"), user) == 0


@pytest.mark.naive
def test_a_naive_join_scans_the_owners_table(trading_db: Database) -> None:
    conn = trading_db.connect("postgres")
    conn.execute(NAIVE.read_bytes())
    user = add_user(conn)
    conn.execute("select naive.guard('join', 'public.signals')")
    conn.execute("alter table public.signals enable always trigger naive_guard")
    assert scans_of_a_plan_made_while_the_table_was_small(conn, user) > 0


def test_another_machine_column_gets_the_foreign_key(db: Database) -> None:
    """The column of before keeps its rows and loses the key, which has one name."""
    owner = db.connect()
    ada, bob = add_user(owner), add_user(owner)
    machine = activate(owner, bob)
    add_signal(owner, bob.trader, "cloud", machine)
    add_signal(owner, ada.trader)
    keys = (
        "select a.attname, k.confrelid::regclass::text from pg_constraint k"
        " join pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]"
        " where k.conrelid = 'public.signals'::regclass and k.conname = 'arbiter_machine_id_fkey'"
    )
    assert rows(owner, keys) == [("machine_id", "cloud_machines")]
    for column in ("fly_id", "machine_id", "fly_id"):
        owner.execute(
            "select arbiter.protect('public.signals', 'trader_id.user_id', p_machine_column => %s)",
            (column,),
        )
        # On the column of before rows name machines already, so it gets no key again.
        expected = [("fly_id", "cloud_machines")] if column == "fly_id" else []
        assert rows(owner, keys) == expected
    assert rows(owner, "select count(*) from public.signals where machine_id is not null") == [(1,)]
    add_signal(owner, ada.trader)
    assert rejection(add_signal, owner, bob.trader).sqlstate == "WX001"


# Snapshots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_snapshot_older_than_an_unprotect_can_protect_again(db: Database, level: str) -> None:
    """It still sees the triggers and the policy that were dropped since, beside its own."""
    owner, other = db.connect(), db.connect()
    other.execute(f"begin isolation level {level}".encode())
    other.execute("select from public.traders")
    owner.execute("select arbiter.unprotect('public.signals')")
    other.execute("select arbiter.protect('public.signals')")
    other.execute("commit")
    query = "select object, state from arbiter.doctor() where object ~ 'guard|policy'"
    found = owner.execute(query).fetchall()
    assert {state for (_, state) in found} == {"ok"}, found
    policies = "select count(*) from pg_policy where polname = 'arbiter_claim'"
    assert value(owner, policies) == 1


def test_no_call_of_the_owner_speaks_of_arbiters_own_objects(db: Database) -> None:
    """A notice that a view of arbiter does not exist yet looks like a fault."""
    owner = db.connect()
    said: list[str | None] = []
    owner.add_notice_handler(lambda diagnostic: said.append(diagnostic.message_primary))
    owner.execute(
        "create table public.orders (user_id uuid, trader_id uuid references public.traders)"
    )
    for call in (
        "arbiter.protect('public.orders')",
        "arbiter.protect('public.orders', 'trader_id.user_id')",
        "arbiter.protect('public.orders', 'user_id')",
        "arbiter.unprotect('public.orders')",
        "arbiter.protect('public.positions', p_verbs => '{insert,update}')",
        "arbiter.register_machines('public.cloud_machines')",
        "arbiter.expose()",
        "arbiter.unexpose()",
        "arbiter.add_client_role('authenticator')",
        "arbiter.remove_client_role('authenticator')",
        "arbiter._detach_all(true)",
    ):
        owner.execute(f"select {call}".encode())
    assert said == []
