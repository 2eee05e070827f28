"""Tables protected with {insert,update}: each write says who writes; the row names the last writer.

The table is the demo's ``positions``: the user is a column of it, and a trigger of the app keeps
its ``updated_at``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_user,
    age,
    backend,
    beat,
    browser,
    detail_of,
    lease,
    one,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

NAIVE = Path(__file__).with_name("naive.sql")

PROTECT = "select arbiter.protect('public.positions', p_verbs => '{insert,update}')"


class Stage:
    """Ada is local and Bob's machine holds; each has positions, written by who may write them."""

    def __init__(self, db: Database, protect: str = PROTECT) -> None:
        self.db = db
        self.owner = db.connect()
        self.owner.execute(protect.encode())
        self.conn = backend(db)
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas_machine = add_machine(self.owner, self.ada, "starting")
        self.machine = activate(self.owner, self.bob)
        for symbol in ("BTC", "ETH"):
            self.insert(self.ada, symbol)
            self.insert(self.bob, symbol, "cloud", self.machine)

    def insert(
        self, user: User, symbol: str, source: str = "local", machine: str | None = None
    ) -> None:
        """A new position."""
        self.conn.execute(
            "insert into public.positions (user_id, symbol, source, machine_id)"
            " values (%s, %s, %s, %s)",
            (user.id, symbol, source, machine),
        )

    def update(self, change: str, user: User | None = None, symbol: str = "BTC") -> int:
        """Change a user's position, or everybody's."""
        names = {"machine": self.machine, "adas_machine": self.adas_machine, "bob": self.bob.id}
        return self.conn.execute(
            f"update public.positions set {change}"
            " where symbol = %(symbol)s and user_id = coalesce(%(user)s, user_id)".encode(),
            names | {"symbol": symbol, "user": user and user.id},
        ).rowcount

    def row(self, user: User, symbol: str = "BTC") -> Any:
        """A position as it is."""
        return one(
            self.owner,
            "select p.*, xmin::text from public.positions p where user_id = %s and symbol = %s",
            user.id,
            symbol,
        )

    def look(self) -> list[Any]:
        """All positions."""
        return rows(self.owner, "select * from public.positions order by user_id, symbol")

    def rejected(self, run: Callable[..., object], *args: Any) -> tuple[str | None, str]:
        """SQLSTATE and code of the rejection; nothing may have been written."""
        before = self.look()
        error = rejection(run, *args)
        assert self.look() == before
        return error.sqlstate, detail_of(error)["code"]


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


CLOUD_ACTIVE = ("WX001", "cloud_active")
NOT_HOLDER = ("WX004", "not_holder")
IDENTITY = ("WX005", "wrong_identity")
IMMUTABLE = ("WX006", "provenance_immutable")

AS_LOCAL = "source = 'local', machine_id = null"
AS_CLOUD = "source = 'cloud', machine_id = %(machine)s"


def test_each_write_names_its_writer(at: Stage) -> None:
    at.update("quantity = 1", at.ada)
    assert (at.row(at.ada).source, at.row(at.ada).machine_id) == ("local", None)

    beat(at.owner, at.adas_machine)
    set_status(at.owner, at.adas_machine, "running")
    beat(at.owner, at.adas_machine)
    beat(at.owner, at.adas_machine)
    assert lease(at.owner, at.ada).holder == "cloud"
    assert at.rejected(at.update, "quantity = 2", at.ada) == CLOUD_ACTIVE  # the row says local
    at.update("quantity = 2, source = 'cloud', machine_id = %(adas_machine)s", at.ada)
    row = at.row(at.ada)
    assert (row.quantity, row.source, row.machine_id) == (2, "cloud", at.adas_machine)


def test_the_other_environment_is_rejected(at: Stage) -> None:
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}", at.bob) == CLOUD_ACTIVE
    assert at.rejected(at.update, AS_LOCAL, at.bob) == CLOUD_ACTIVE
    as_hers = "quantity = 1, source = 'cloud', machine_id = %(adas_machine)s"
    assert at.rejected(at.update, as_hers, at.ada) == NOT_HOLDER
    assert at.rejected(at.insert, at.bob, "SOL") == CLOUD_ACTIVE


def test_a_browser_is_rejected_as_well(at: Stage) -> None:
    at.conn = browser(at.db, at.bob)
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}", at.bob) == CLOUD_ACTIVE
    at.conn = browser(at.db, at.ada)
    assert at.update("quantity = 1", at.ada) == 1


@pytest.mark.parametrize("role", ["origin", "replica"])
def test_a_superusers_session_is_rejected_as_well(at: Stage, role: str) -> None:
    at.conn = at.db.connect("postgres")
    at.conn.execute(f"set session_replication_role = {role}".encode())
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}", at.bob) == CLOUD_ACTIVE
    assert at.rejected(at.update, "user_id = %(bob)s, symbol = 'NEW'", at.ada) == IMMUTABLE
    # The updated row gets the id of its transaction in these sessions, too.
    before = at.row(at.ada).arbiter_xid
    at.update("quantity = 1, arbiter_xid = '3'", at.ada)
    assert int(at.row(at.ada).arbiter_xid) > int(before)


@pytest.mark.naive
def test_a_naive_guard_of_inserts_lets_updates_pass(trading_db: Database) -> None:
    owner = trading_db.connect()
    owner.execute(NAIVE.read_bytes())
    owner.execute(
        "alter table public.positions add column trader_id uuid,"
        " add column source text default 'local', add column machine_id uuid"
    )
    owner.execute("select naive.guard('row', 'public.positions')")
    user = add_user(owner)
    machine = add_machine(owner, user, "running")
    beat(owner, machine)
    insert = (
        "insert into public.positions (user_id, trader_id, symbol, source, machine_id)"
        " values (%s, %s, 'BTC', %s, %s)"
    )
    error = rejection(owner.execute, insert, (user.id, user.trader, "local", None))
    assert error.sqlstate == "WX001"
    owner.execute(insert, (user.id, user.trader, "cloud", machine))

    owner.execute("update public.positions set source = 'local', quantity = 1")

    assert value(owner, "select source from public.positions") == "local"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("source = 'local'", IDENTITY),
        ("source = 'cloud', machine_id = null", IDENTITY),
        ("machine_id = null", IDENTITY),
        ("machine_id = %(adas_machine)s", IDENTITY),
        ("user_id = gen_random_uuid()", IMMUTABLE),
    ],
)
def test_a_claim_that_does_not_fit_is_rejected(
    at: Stage, change: str, expected: tuple[str, str]
) -> None:
    before = at.look()
    error = rejection(at.update, change, at.bob)
    assert at.look() == before
    assert (error.sqlstate, detail_of(error)["code"]) == expected


def test_a_machine_that_does_not_exist_is_rejected_without_its_foreign_key(at: Stage) -> None:
    unknown = "machine_id = gen_random_uuid()"
    assert rejection(at.update, unknown, at.bob).sqlstate == "23503"
    at.owner.execute("alter table public.positions drop constraint arbiter_machine_id_fkey")
    assert at.rejected(at.update, unknown, at.bob) == IDENTITY


def test_the_user_of_a_row_stays(at: Stage) -> None:
    assert at.rejected(at.update, "user_id = %(bob)s, symbol = 'NEW'", at.ada) == IMMUTABLE
    to_cloud = f"user_id = %(bob)s, symbol = 'NEW', {AS_CLOUD}"
    assert at.rejected(at.update, to_cloud, at.ada) == IMMUTABLE
    detail = detail_of(rejection(at.update, to_cloud, at.ada))
    assert detail["user_id"] == str(at.ada.id)


def test_the_evidence_is_of_the_last_write(at: Stage) -> None:
    first = at.row(at.ada)
    for forged in ("'3'", "null", f"'{first.arbiter_xid}'", "pg_current_xact_id()"):
        with at.conn.transaction():
            at.update(f"quantity = quantity + 1, arbiter_xid = {forged}", at.ada)
            xid = value(at.conn, "select pg_current_xact_id()::text")
        assert at.row(at.ada).arbiter_xid == xid
    assert at.row(at.ada).quantity == 4
    assert at.row(at.ada, "ETH").arbiter_xid != xid


def test_a_trigger_of_the_app_cannot_forge_the_evidence(at: Stage) -> None:
    at.owner.execute(
        """
        create function public.tg_forge() returns trigger language plpgsql as
          $$ begin new.arbiter_xid := '3'; return new; end $$;
        create trigger zz_forge before update on public.positions
          for each row execute function public.tg_forge();
        """
    )
    assert at.rejected(at.update, "quantity = 1", at.ada) == IDENTITY


@pytest.mark.parametrize("name", ["aa_rewrite", "zz_rewrite"])
def test_what_a_trigger_of_the_app_has_made_of_the_row_is_judged(at: Stage, name: str) -> None:
    at.owner.execute(
        f"""
        create function public.tg_rewrite() returns trigger language plpgsql as
          $$ begin new.source := 'local'; new.machine_id := null; return new; end $$;
        create trigger {name} before update on public.positions
          for each row execute function public.tg_rewrite();
        """.encode()
    )
    assert at.rejected(at.update, f"quantity = 1, {AS_CLOUD}", at.bob) == CLOUD_ACTIVE
    assert at.update("quantity = 1", at.ada) == 1


def test_an_old_machines_row_is_not_written_in_its_name(at: Stage) -> None:
    set_status(at.owner, at.machine, "stopped")
    age(
        at.owner,
        at.machine,
        heartbeat=SETTINGS["heartbeat_timeout"],
        left_running=SETTINGS["stop_grace"],
    )
    # Nothing said about the writer leaves the machine's claim, and it is not fresh.
    assert at.rejected(at.update, "quantity = 1", at.bob) == NOT_HOLDER

    assert at.update(f"quantity = 1, {AS_LOCAL}", at.bob) == 1

    assert at.rejected(at.update, "quantity = 2", at.bob, "ETH") == NOT_HOLDER
    assert at.update("quantity = 2", at.bob) == 1
    held = lease(at.owner, at.bob)
    assert (held.holder, held.epoch) == ("local", 3)


# Rows that a deleted machine leaves behind --------------------------------------------------------


def delete_machine(at: Stage) -> None:
    """Bob's machine goes; its rows stay, without it."""
    before = at.look()
    at.owner.execute("delete from public.cloud_machines where id = %s", (at.machine,))
    bobs = [row for row in before if row.user_id == at.bob.id]
    for old, new in zip(bobs, (row for row in at.look() if row.user_id == at.bob.id), strict=True):
        assert new == old._replace(machine_id=None, updated_at=new.updated_at)
        assert (new.source, new.arbiter_xid) == ("cloud", old.arbiter_xid)


def test_a_deleted_machine_leaves_its_rows(at: Stage) -> None:
    delete_machine(at)
    assert lease(at.owner, at.bob).machine_id == at.machine


def test_a_row_of_a_deleted_machine_is_written_by_who_says_who_writes(at: Stage) -> None:
    delete_machine(at)
    assert at.rejected(at.update, "quantity = 1", at.bob) == IDENTITY
    assert at.rejected(at.update, AS_LOCAL, at.bob) == ("WX002", "cooling_down")
    age(at.owner, at.machine, left_running=SETTINGS["stop_grace"])

    assert at.rejected(at.update, "quantity = 1", at.bob) == IDENTITY
    assert at.update(f"quantity = 1, {AS_LOCAL}", at.bob) == 1
    assert at.row(at.bob).source == "local"


@pytest.mark.parametrize("key", ["foreign key", "no foreign key"])
@pytest.mark.parametrize("change", ["quantity = quantity + 1", "machine_id = null, quantity = 1"])
def test_a_trigger_of_the_app_does_not_write_a_row_of_a_deleted_machine_unjudged(
    at: Stage, change: str, key: str
) -> None:
    # It updates from within a trigger, as the foreign key does, but must be judged as a write.
    at.owner.execute(
        f"""
        create function public.tg_fill() returns trigger language plpgsql as
          $$ begin update public.positions set {change} where symbol = 'BTC'; return null; end $$;
        create trigger signals_fill after insert on public.signals
          for each row execute function public.tg_fill();
        """.encode()
    )
    if key == "foreign key":
        delete_machine(at)
    else:  # as on a partitioned table, or after the registry was replaced
        at.owner.execute("alter table public.positions drop constraint arbiter_machine_id_fkey")
        at.owner.execute("delete from public.cloud_machines where id = %s", (at.machine,))
    at.owner.execute("delete from public.positions where user_id = %s", (at.ada.id,))

    error = at.rejected(
        at.conn.execute,
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'BTC', '1m', 'buy', now())",
        (at.ada.trader,),
    )

    assert error == IDENTITY


def test_the_old_machine_cannot_be_taken_off_while_it_is_there(at: Stage) -> None:
    assert at.rejected(at.update, "machine_id = null", at.bob) == IDENTITY
    at.owner.execute(
        """
        create function public.tg_nested() returns trigger language plpgsql as
          $$ begin update public.positions set machine_id = null where source = 'cloud';
             return null; end $$;
        create trigger nested after insert on public.webhook_queue
          for each row execute function public.tg_nested();
        """
    )
    insert = "insert into public.webhook_queue (url, body) values ('x', '{}')"
    assert at.rejected(at.conn.execute, insert) == IDENTITY


def test_a_source_that_the_app_allows_to_be_null_is_still_needed(db: Database) -> None:
    # Adopted as the app's own migration made it: nullable.
    at = Stage(db, "alter table public.positions add column source text default 'local';" + PROTECT)

    assert at.rejected(at.update, "source = null", at.ada) == IDENTITY
    assert at.rejected(at.update, "source = null, machine_id = null, quantity = 9", at.bob) == (
        IDENTITY
    )


# Many rows, and statements that insert and update ------------------------------------------------


def test_one_rejected_user_among_many_rejects_the_update(at: Stage) -> None:
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}") == CLOUD_ACTIVE
    others = [add_user(at.owner) for _ in range(20)]
    for user in others:
        at.insert(user, "BTC")
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}") == CLOUD_ACTIVE

    assert at.update("quantity = 1") == 22  # each row in the name of who wrote it last

    assert {row.source for row in at.look() if row.symbol == "BTC"} == {"local", "cloud"}
    assert {row.arbiter_xid for row in at.look() if row.symbol == "BTC"} == {
        at.row(at.ada).arbiter_xid
    }


UPSERTS = {
    "do update": "insert into public.positions (user_id, symbol, quantity, source, machine_id)"
    " values (%(user)s, %(symbol)s, 1, %(source)s, %(machine)s)"
    " on conflict (user_id, symbol) do update"
    " set quantity = positions.quantity + 1, source = excluded.source,"
    "     machine_id = excluded.machine_id",
    "do update, silent": "insert into public.positions (user_id, symbol, quantity, source,"
    " machine_id) values (%(user)s, %(symbol)s, 1, %(source)s, %(machine)s)"
    " on conflict (user_id, symbol) do update set quantity = positions.quantity + 1",
    "merge": "merge into public.positions p using (select %(user)s::uuid as u, %(symbol)s as s) n"
    " on p.user_id = n.u and p.symbol = n.s"
    " when matched then update set quantity = p.quantity + 1, source = %(source)s,"
    "   machine_id = %(machine)s::uuid"
    " when not matched then insert (user_id, symbol, quantity, source, machine_id)"
    "   values (n.u, n.s, 1, %(source)s, %(machine)s::uuid)",
    "merge update": "merge into public.positions p using (select %(user)s::uuid as u,"
    " %(symbol)s as s) n on p.user_id = n.u and p.symbol = n.s"
    " when matched then update set quantity = p.quantity + 1, source = %(source)s,"
    "   machine_id = %(machine)s::uuid",
}


@pytest.mark.parametrize("symbol", ["BTC", "NEW"])
@pytest.mark.parametrize("upsert", UPSERTS)
def test_upserts_are_judged_in_both_arms(at: Stage, upsert: str, symbol: str) -> None:
    query = UPSERTS[upsert].encode()

    def write(user: User, source: str, machine: str | None) -> None:
        at.conn.execute(
            query, {"user": user.id, "symbol": symbol, "source": source, "machine": machine}
        )

    if (upsert, symbol) == ("merge update", "NEW"):
        before = at.look()
        write(at.bob, "local", None)  # nothing matches, nothing is written
        assert at.look() == before
        return
    if (upsert, symbol) == ("do update, silent", "BTC"):
        # The row keeps the name of its writer, and is judged by it.
        write(at.bob, "local", None)
        assert (at.row(at.bob).source, at.row(at.bob).machine_id) == ("cloud", at.machine)
        age(at.owner, at.machine, heartbeat=timedelta(minutes=1))
        assert at.rejected(write, at.bob, "local", None) == NOT_HOLDER
        return
    assert at.rejected(write, at.bob, "local", None) == CLOUD_ACTIVE
    assert at.rejected(write, at.ada, "cloud", at.adas_machine) == NOT_HOLDER
    write(at.bob, "cloud", at.machine)
    write(at.ada, "local", None)
    for user in (at.bob, at.ada):
        row = at.row(user, symbol)
        assert (row.quantity, row.arbiter_xid) == (1, row.xmin)


def test_one_statement_that_inserts_and_updates_for_many(at: Stage) -> None:
    query = (
        "insert into public.positions (user_id, symbol, quantity)"
        " select u.id, s.name, 1 from unnest(%s::uuid[]) u (id), (values ('BTC'), ('NEW')) s (name)"
        " on conflict (user_id, symbol) do update"
        " set quantity = 5, source = excluded.source, machine_id = excluded.machine_id"
    )
    assert at.rejected(at.conn.execute, query, ([at.ada.id, at.bob.id],)) == CLOUD_ACTIVE
    at.conn.execute(query, ([at.ada.id],))
    assert [at.row(at.ada, s).quantity for s in ("BTC", "NEW")] == [5, 1]


# Without evidence, and back ----------------------------------------------------------------------


def test_without_evidence_updates_are_judged_all_the_same(db: Database) -> None:
    at = Stage(db, PROTECT.replace(")", ", p_evidence => false)"))
    assert "arbiter_xid" not in at.look()[0]._fields
    assert at.rejected(at.update, f"quantity = 1, {AS_LOCAL}", at.bob) == CLOUD_ACTIVE
    assert at.rejected(at.update, "user_id = %(bob)s, symbol = 'NEW'", at.ada) == IMMUTABLE
    assert at.update("quantity = 1") == 2
    delete_machine_without_evidence = "delete from public.cloud_machines where id = %s"
    at.owner.execute(delete_machine_without_evidence, (at.machine,))
    assert at.rejected(at.update, "quantity = 2", at.bob) == IDENTITY


def test_back_to_inserts_only(at: Stage) -> None:
    at.owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert}')")
    assert at.update("quantity = 1") == 2
    assert at.rejected(at.update, AS_LOCAL, at.bob) == IMMUTABLE
    at.owner.execute(PROTECT)
    assert at.rejected(at.update, f"quantity = 2, {AS_LOCAL}", at.bob) == CLOUD_ACTIVE


def test_rows_older_than_protection_are_written_like_others(db: Database) -> None:
    owner = db.connect()
    ada = add_user(owner)
    owner.execute("insert into public.positions (user_id, symbol) values (%s, 'OLD')", (ada.id,))
    at = Stage(db)
    assert (at.row(ada, "OLD").source, at.row(ada, "OLD").arbiter_xid) == ("local", None)

    assert at.update("quantity = 1", ada, "OLD") == 1

    row = at.row(ada, "OLD")
    assert (row.quantity, row.source, row.arbiter_xid) == (1, "local", row.xmin)
