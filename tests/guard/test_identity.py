"""The identity that a write claims, and attempts of clients to make the guard believe another.

Ada is local and has a machine that is not up; Bob's machine holds. The tests write as the owner
of the tables unless they say otherwise: what the owner cannot do, no role below can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_trader,
    add_user,
    age,
    backend,
    beat,
    browser,
    count_rows,
    detail_of,
    handovers,
    lease,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

NAIVE = Path(__file__).with_name("naive.sql")

SIGNALS = "public.signals"


class Stage:
    """The database with its people."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas_machine = add_machine(self.owner, self.ada, "starting")
        self.bobs_machine = activate(self.owner, self.bob)
        add_signal(self.owner, self.ada.trader)
        self.builtin = add_trader(self.owner, None)

    def rejected(self, run: Callable[..., object], *args: Any) -> tuple[str | None, str | None]:
        """SQLSTATE and code of the rejection; no signal may have been written."""
        before = rows(self.owner, "select * from public.signals order by id")
        error = rejection(run, *args)
        assert rows(self.owner, "select * from public.signals order by id") == before
        code = detail_of(error)["code"] if (error.sqlstate or "").startswith("WX") else None
        return error.sqlstate, code


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


@pytest.fixture(scope="module")
def one_for_all(templates: Templates) -> Iterator[Stage]:
    with templates.clone("installed") as database:
        yield Stage(database)


@pytest.fixture
def shared(one_for_all: Stage) -> Stage:
    """One stage for all the tests that do not change more than rows."""
    beat(one_for_all.owner, one_for_all.bobs_machine)
    return one_for_all


CLOUD_ACTIVE = ("WX001", "cloud_active")
NOT_HOLDER = ("WX004", "not_holder")
IDENTITY = ("WX005", "wrong_identity")


# The claim ---------------------------------------------------------------------------------------

#: What a row says: whose trader, source, whose machine; and the sentence that the hint must have.
CLAIMS = {
    "local with a machine": ("ada", "local", "ada", "A local write has no machine"),
    "local with the holder": ("bob", "local", "bob", "A local write has no machine"),
    "cloud without a machine": ("bob", "cloud", None, "A cloud write names its machine"),
    "another user's machine": ("ada", "cloud", "bob", "no such machine of this user"),
    "another user's holder": ("bob", "cloud", "ada", "no such machine of this user"),
    "row without a user": ("builtin", "local", None, "The row has no user"),
    "row without a user, cloud": ("builtin", "cloud", None, "The row has no user"),
    "row without a user, machine": ("builtin", "cloud", "bob", "The row has no user"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_does_not_fit_is_rejected(shared: Stage, claim: str) -> None:
    whose, source, machine, hint = CLAIMS[claim]
    trader = {"ada": shared.ada.trader, "bob": shared.bob.trader, "builtin": shared.builtin}[whose]
    user = {"ada": str(shared.ada.id), "bob": str(shared.bob.id), "builtin": None}[whose]
    machine_id = {"ada": shared.adas_machine, "bob": shared.bobs_machine, None: None}[machine]
    before = count_rows(shared.owner, SIGNALS)

    error = rejection(add_signal, shared.owner, trader, source, machine_id)

    assert error.sqlstate == "WX005"
    assert detail_of(error) == {
        "code": "wrong_identity",
        "user_id": user,
        "holder": None,
        "machine_id": machine_id and str(machine_id),
        "epoch": None,
        "retry_at": None,
        "source": source,
    }
    assert hint in (error.diag.message_hint or "")
    assert count_rows(shared.owner, SIGNALS) == before


def test_other_words_for_source_are_rejected_by_its_constraint(shared: Stage) -> None:
    for word, sqlstate in (("browser", "23514"), ("LOCAL", "23514"), (None, "23502")):
        assert shared.rejected(add_signal, shared.owner, shared.ada.trader, word) == (
            sqlstate,
            None,
        )


@pytest.mark.parametrize("word", [None, "browser", "LOCAL", "local ", ""])
def test_other_words_for_source_are_rejected_by_the_guard(at: Stage, word: str | None) -> None:
    at.owner.execute(
        "alter table public.signals drop constraint arbiter_source_check,"
        " alter column source drop not null"
    )
    assert at.rejected(add_signal, at.owner, at.ada.trader, word) == IDENTITY


def test_a_machine_that_does_not_exist_is_rejected_without_its_foreign_key(at: Stage) -> None:
    unknown = str(UUID(int=1))
    assert at.rejected(add_signal, at.owner, at.bob.trader, "cloud", unknown) == ("23503", None)
    at.owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    assert at.rejected(add_signal, at.owner, at.bob.trader, "cloud", unknown) == IDENTITY


def test_a_machine_that_changed_its_user_writes_for_neither(at: Stage) -> None:
    carol = add_user(at.owner)
    at.owner.execute(
        "update public.cloud_machines set user_id = %s where id = %s", (carol.id, at.bobs_machine)
    )
    assert at.rejected(add_signal, at.owner, at.bob.trader, "cloud", at.bobs_machine) == IDENTITY


@pytest.mark.naive
def test_a_naive_guard_takes_any_machine_that_runs(trading_db: Database) -> None:
    owner = trading_db.connect()
    owner.execute(NAIVE.read_bytes())
    owner.execute("select naive.guard('foreign', 'public.signals')")
    ada, bob = add_user(owner), add_user(owner)
    machine = add_machine(owner, bob, "running")
    beat(owner, machine)
    assert rejection(add_signal, owner, bob.trader, "local").sqlstate == "WX001"

    add_signal(owner, ada.trader, "cloud", machine)

    assert count_rows(owner, SIGNALS) == 1


# Rows without a user -----------------------------------------------------------------------------

ALLOW = "select arbiter.protect('public.signals', p_unowned => 'allow')"


def test_rows_of_built_in_traders_are_written_where_they_are_allowed(at: Stage) -> None:
    at.owner.execute(ALLOW)
    conn = backend(at.db)
    add_signal(conn, at.builtin)
    add_signal(conn, at.builtin, "cloud")

    assert at.rejected(add_signal, conn, at.builtin, "cloud", at.bobs_machine) == IDENTITY
    assert at.rejected(add_signal, conn, at.builtin, "local", at.bobs_machine) == IDENTITY
    assert at.rejected(add_signal, conn, at.bob.trader) == CLOUD_ACTIVE
    assert value(at.owner, "select count(*) from arbiter.leases where user_id is null") == 0

    at.owner.execute("select arbiter.protect('public.signals', p_unowned => 'reject')")
    assert at.rejected(add_signal, conn, at.builtin) == IDENTITY


DEFINER = """
create function public.add_signal_of(p_trader_id uuid) returns void
language sql security definer set search_path = '' as $$
  insert into public.signals (trader_id, symbol, interval, signal, bar_time)
  values (p_trader_id, 'BTCUSDT', '1m', 'buy', clock_timestamp())
$$
"""


def test_a_client_writes_no_row_without_a_user(at: Stage) -> None:
    """The app's policies let it, or a function of the app, or row security that is off."""
    at.owner.execute(ALLOW)
    at.owner.execute(DEFINER)
    at.owner.execute("create policy anything on public.signals to anon, authenticated"
                     " using (true) with check (true)")  # fmt: skip
    at.owner.execute("grant insert on public.signals to anon")
    machine = at.db.connect(
        role="authenticated", claims={"sub": str(at.ada.id), "machine_id": str(at.adas_machine)}
    )
    clients = [browser(at.db, at.ada), at.db.connect(role="anon"), machine]
    for security in ("enable", "disable"):
        at.owner.execute(f"alter table public.signals {security} row level security".encode())
        for conn in clients:
            call = "select public.add_signal_of(%s)"
            assert at.rejected(conn.execute, call, (at.builtin,)) == IDENTITY
    for conn in clients:
        assert at.rejected(add_signal, conn, at.builtin) == IDENTITY
        assert at.rejected(add_signal, conn, at.builtin, "cloud") == IDENTITY


def test_a_member_of_a_clients_role_is_a_client(at: Stage) -> None:
    """Unless row security does not bind it; other roles are no clients."""
    at.owner.execute(ALLOW)
    superuser = at.db.connect("postgres")
    with superuser.transaction(force_rollback=True):  # roles are those of other tests, too
        for role, options, group in (
            ("member", "", "authenticated"),
            ("worker", "bypassrls", "authenticated"),
            ("plain", "", "app_readers"),
        ):
            superuser.execute("create role app_readers" if group == "app_readers" else "select")
            superuser.execute(f"create role {role} {options} in role {group}".encode())
            superuser.execute(f"grant select, insert on public.signals to {role}".encode())
            superuser.execute(f"grant usage on schema public to {role}".encode())
        superuser.execute("alter table public.signals disable row level security")

        def write(role: str) -> None:
            with superuser.transaction():
                superuser.execute(f"set local role {role}".encode())
                add_signal(superuser, at.builtin)

        error = rejection(write, "member")
        assert (error.sqlstate, str(error.diag.message_hint)[:24]) == (
            "WX005",
            "A browser cannot write a",
        )
        write("worker")
        write("plain")


@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_a_path_that_is_not_there_yet_is_no_way_in(at: Stage, unowned: str) -> None:
    # With a deferred key the signal may come first, and its trader, with a user, afterwards.
    at.owner.execute(
        "alter table public.signals alter constraint signals_trader_id_fkey"
        " deferrable initially deferred"
    )
    at.owner.execute("select arbiter.protect('public.signals', p_unowned => %s)", (unowned,))
    trader = str(UUID(int=7))

    def smuggle() -> None:
        with at.owner.transaction():
            add_signal(at.owner, trader)
            at.owner.execute(
                "insert into public.traders (id, user_id, name) values (%s, %s, 'late')",
                (trader, at.bob.id),
            )

    assert at.rejected(smuggle) == IDENTITY
    assert value(at.owner, "select count(*) from public.traders where name = 'late'") == 0


@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_nor_is_an_update_to_one(at: Stage, unowned: str, verbs: str) -> None:
    """A row without a user stays one: its new trader comes later, and is Bob's."""
    at.owner.execute(
        "alter table public.signals alter constraint signals_trader_id_fkey"
        " deferrable initially deferred"
    )
    at.owner.execute(ALLOW)
    signal = add_signal(at.owner, at.builtin)
    at.owner.execute(
        "select arbiter.protect('public.signals', p_verbs => %s, p_unowned => %s)", (verbs, unowned)
    )
    trader = str(UUID(int=7))

    def smuggle() -> None:
        with at.owner.transaction():
            at.owner.execute(
                "update public.signals set trader_id = %s where id = %s", (trader, signal)
            )
            at.owner.execute(
                "insert into public.traders (id, user_id, name) values (%s, %s, 'late')",
                (trader, at.bob.id),
            )

    assert at.rejected(smuggle) == ("WX006", "provenance_immutable")


@pytest.mark.parametrize("unowned", ["reject", "allow"])
def test_a_row_without_a_trader_has_no_user(at: Stage, unowned: str) -> None:
    at.owner.execute("alter table public.signals alter column trader_id drop not null")
    at.owner.execute("select arbiter.protect('public.signals', p_unowned => %s)", (unowned,))
    if unowned == "allow":
        add_signal(at.owner, None)
        signal = add_signal(at.owner, None)
        at.owner.execute("update public.signals set price = 1 where id = %s", (signal,))

        def adopt() -> None:
            at.owner.execute(
                "update public.signals set trader_id = %s where id = %s", (at.bob.trader, signal)
            )

        assert at.rejected(adopt) == ("WX006", "provenance_immutable")
    else:
        assert at.rejected(add_signal, at.owner, None) == IDENTITY


# Forged evidence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("forged", ["3", None, "next", "other"])
@pytest.mark.parametrize("verb", ["insert", "copy"])
def test_the_evidence_cannot_be_forged(shared: Stage, verb: str, forged: str | None) -> None:
    xid = forged
    if forged == "next":
        xid = str(value(shared.owner, "select pg_current_xact_id()::text::bigint + 1000"))
    if forged == "other":
        xid = value(shared.owner, "select arbiter_xid::text from public.signals")
    columns = "(trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
    row = (shared.ada.trader, "X", "1m", "buy", "2026-01-01 00:00+00", xid)

    def write() -> None:
        if verb == "insert":
            shared.owner.execute(
                f"insert into public.signals {columns} values (%s, %s, %s, %s, %s, %s)".encode(),
                row,
            )
        else:
            with shared.owner.cursor().copy(f"copy public.signals {columns} from stdin") as out:
                out.write_row(row)

    assert shared.rejected(write) == IDENTITY


def test_one_forged_row_among_a_hundred_rejects_all(shared: Stage) -> None:
    assert (
        shared.rejected(
            shared.owner.execute,
            "insert into public.signals"
            " (trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
            " select %s, 'X', '1m', 'buy', timestamptz '2026-01-01' + n * interval '1 minute',"
            "        case when n = 77 then xid8 '3' else pg_current_xact_id() end"
            "   from generate_series(1, 100) n",
            (shared.ada.trader,),
        )
        == IDENTITY
    )


# What a client may set, create or shadow ---------------------------------------------------------

#: Each is tried before a local write for Bob, whose machine holds. None of it may open the way.
TRICKS = {
    "custom settings": """
        set arbiter.mode = 'observe'; set arbiter.now = '2099-01-01'; set arbiter.disabled = 'on';
        set request.jwt.claims = '{"role": "service_role", "machine_id": "x"}';
    """,
    "temporary tables": """
        create temp table leases (like arbiter.leases);
        create temp table settings (like arbiter.settings);
        create temp table protections (like arbiter.protections);
        create temp table machines (machine_id uuid, user_id uuid, status text, state text,
                                    heartbeat_at timestamptz);
        create temp table traders (like public.traders);
        create temp table signals (like public.signals);
    """,
    "temporary transition table": """
        create temp table arbiter_rows (like public.signals);
    """,
    "temporary catalog": """
        create temp table pg_class (like pg_catalog.pg_class);
        create temp table pg_constraint (like pg_catalog.pg_constraint);
        create temp view pg_trigger as select * from pg_catalog.pg_trigger where false;
        create domain pg_temp.uuid as pg_catalog.uuid check (value is null);
        create domain pg_temp.text as pg_catalog.text check (value is null);
    """,
    "search path": """
        create schema evil; set search_path = evil, pg_temp, public, arbiter, pg_catalog;
        create table evil.leases (like arbiter.leases);
        create function evil.clock_timestamp() returns timestamptz language sql
          as 'select ''infinity''::timestamptz';
        create function evil._admit(integer, text, text, text, text, text, text) returns void
          language sql as '';
    """,
    "functions": """
        set search_path = public, pg_catalog;
        create function public.clock_timestamp() returns timestamptz language sql
          as 'select ''infinity''::timestamptz';
        create function public.pg_current_xact_id() returns xid8 language sql
          as 'select ''3''::xid8';
        create function public.pg_sleep(double precision) returns void language sql as '';
        create function public.greatest(timestamptz) returns timestamptz language sql
          as 'select ''infinity''::timestamptz';
    """,
    "operators": """
        set search_path = public, pg_catalog;
        create function public.never(uuid, uuid) returns boolean language sql as 'select false';
        create function public.never(text, text) returns boolean language sql as 'select false';
        create function public.always(interval, interval) returns boolean language sql
          as 'select true';
        create operator public.= (leftarg = uuid, rightarg = uuid, function = public.never);
        create operator public.= (leftarg = text, rightarg = text, function = public.never);
        create operator public.<
          (leftarg = interval, rightarg = interval, function = public.always);
    """,
    "planner": """
        set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off;
        set plan_cache_mode = force_generic_plan; set row_security = off;
        set transform_null_equals = on; set standard_conforming_strings = on;
    """,
    "constraints": "set constraints all deferred",
    "isolation": "set default_transaction_isolation = 'repeatable read'",
    "serializable": "set default_transaction_isolation = 'serializable'",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_opens_the_way(at: Stage, trick: str) -> None:
    tricky = at.db.connect()
    tricky.execute(TRICKS[trick].encode())

    assert at.rejected(add_signal, tricky, at.bob.trader) == CLOUD_ACTIVE
    assert at.rejected(add_signal, tricky, at.ada.trader, "cloud", at.adas_machine) == NOT_HOLDER
    assert at.rejected(add_signal, tricky, at.ada.trader, "cloud", at.bobs_machine) == IDENTITY
    assert at.rejected(add_signal, tricky, at.builtin) == IDENTITY
    add_signal(tricky, at.ada.trader)  # and none closes it
    add_signal(tricky, at.bob.trader, "cloud", at.bobs_machine)


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role", "app_owner"])
def test_set_role_changes_what_is_allowed_and_not_what_is_judged(at: Stage, role: str) -> None:
    conn = at.db.connect("postgres")
    at.owner.execute("grant insert, select on public.signals to anon")
    at.owner.execute("create policy signals_any on public.signals using (true) with check (true)")
    with conn.transaction():
        conn.execute(f"set local role {role}".encode())
        conn.execute("set local role none")
        with pytest.raises(psycopg.Error) as caught, conn.transaction():
            add_signal(conn, at.bob.trader)
        assert caught.value.sqlstate == "WX001"
    conn.execute(f"set role {role}".encode())
    assert at.rejected(add_signal, conn, at.bob.trader) == CLOUD_ACTIVE
    forged = at.rejected(add_signal, conn, at.ada.trader, "cloud", at.bobs_machine)
    browser_role = role in ("anon", "authenticated")  # whose row security says it first
    assert forged == (("42501", None) if browser_role else IDENTITY)
    add_signal(conn, at.ada.trader)


def test_a_client_cannot_write_what_arbiter_judges_by(shared: Stage) -> None:
    for conn in (backend(shared.db), browser(shared.db, shared.bob)):
        for attempt in (
            "update arbiter.leases set holder = 'local', machine_id = null",
            "delete from arbiter.leases",
            "update arbiter.settings set heartbeat_timeout = '100 ms'",
            "update arbiter.protections set mode = 'observe'",
            "delete from arbiter.protections",
            "update arbiter.registry set states = '{}'",
            "delete from arbiter.machine_notes",
            "insert into arbiter.handovers select * from arbiter.handovers",
            "select arbiter._admit(1, 'enforce', 'reject', null, 'local', null, null)",
            "select arbiter._hand_over(null, false, 'local', null, 'confirmed')",
            "select arbiter.protect('public.signals', p_mode => 'observe')",
            "select arbiter.unprotect('public.signals')",
            "alter table public.signals disable trigger all",
            "create trigger arbiter_guard_insert before insert on arbiter.leases"
            " for each row execute function arbiter._guard_1()",
        ):
            assert rejection(conn.execute, attempt).sqlstate == "42501", attempt


# Row security on what the guard reads ------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "nothing is visible", "all is visible"])
@pytest.mark.parametrize("table", ["public.traders", "public.cloud_machines"])
def test_forced_row_security_rejects_and_does_not_hide(at: Stage, table: str, policy: str) -> None:
    # The guard runs as the tables' owner, to whom forced row security applies.
    at.owner.execute(f"alter table {table} force row level security".encode())
    if policy != "none":
        visible = policy == "all is visible"
        at.owner.execute(f"create policy forced on {table} using ({visible})".encode())
    for conn in (at.owner, backend(at.db), at.db.connect("postgres")):
        for trader, *claim in (
            (at.bob.trader,),
            (at.ada.trader, "cloud", at.bobs_machine),
            (at.ada.trader, "cloud", at.adas_machine),
        ):
            assert at.rejected(add_signal, conn, trader, *claim) == ("42501", None)
    assert value(at.owner, "select count(*) from arbiter.handovers") == 3


# Triggers of the app -----------------------------------------------------------------------------


def rewrite(at: Stage, name: str, verb: str, assignments: str) -> None:
    """A trigger of the app that changes rows before they are written."""
    at.owner.execute(
        f"""
        create function public.tg_{name}() returns trigger language plpgsql as
          $$ begin {assignments} return new; end $$;
        create trigger {name} before {verb} on public.signals
          for each row execute function public.tg_{name}();
        """.encode()
    )


@pytest.mark.parametrize("name", ["aa_rewrite", "zz_rewrite"])
def test_what_is_written_is_judged_and_not_what_was_sent(at: Stage, name: str) -> None:
    rewrite(at, name, "insert", "new.source := 'local'; new.machine_id := null;")

    # The holder's own write becomes a local one on its way.
    assert (
        at.rejected(add_signal, at.owner, at.bob.trader, "cloud", at.bobs_machine) == CLOUD_ACTIVE
    )
    add_signal(at.owner, at.ada.trader, "cloud", at.adas_machine)
    assert {row.source for row in rows(at.owner, "select source from public.signals")} == {"local"}


@pytest.mark.parametrize("name", ["aa_rewrite", "zz_rewrite"])
def test_a_row_that_a_trigger_gives_to_somebody_else_is_judged_as_theirs(
    at: Stage, name: str
) -> None:
    rewrite(at, name, "insert", f"new.trader_id := '{at.bob.trader}';")
    assert at.rejected(add_signal, at.owner, at.ada.trader) == CLOUD_ACTIVE


@pytest.mark.parametrize("name", ["aa_rewrite", "zz_rewrite"])
def test_a_trigger_that_rewrites_an_update_is_rejected(at: Stage, name: str) -> None:
    rewrite(at, name, "update", f"new.source := 'cloud'; new.machine_id := '{at.bobs_machine}';")
    assert at.rejected(at.owner.execute, "update public.signals set price = 1") == (
        "WX006",
        "provenance_immutable",
    )


def test_a_trigger_that_changes_the_row_afterwards_is_rejected(at: Stage) -> None:
    at.owner.execute(
        f"""
        create function public.tg_after() returns trigger language plpgsql as
          $$ begin update public.signals set trader_id = '{at.bob.trader}' where id = new.id;
             return null; end $$;
        create trigger aa_after after insert on public.signals
          for each row execute function public.tg_after();
        """.encode()
    )
    assert at.rejected(add_signal, at.owner, at.ada.trader) == ("WX006", "provenance_immutable")


def test_a_write_from_a_deferred_trigger_is_judged_at_the_commit(at: Stage) -> None:
    at.owner.execute(
        f"""
        create function public.tg_late() returns trigger language plpgsql as
          $$ begin
               insert into public.signals (trader_id, symbol, interval, signal, bar_time)
               values ('{at.bob.trader}', 'LATE', '1m', 'buy', clock_timestamp());
               return null;
             end $$;
        create constraint trigger late after insert on public.webhook_queue
          deferrable initially deferred for each row execute function public.tg_late();
        """.encode()
    )

    def write() -> None:
        with at.owner.transaction():
            add_signal(at.owner, at.ada.trader)  # its webhook starts the other one

    assert at.rejected(write) == CLOUD_ACTIVE


# Both environments in one transaction ------------------------------------------------------------


@pytest.fixture
def carol(shared: Stage) -> User:
    """A user whose machine is about to run; the browser has written."""
    carol = add_user(shared.owner)
    add_signal(shared.owner, carol.trader)
    return carol


@pytest.fixture
def conn(shared: Stage) -> Iterator[Conn]:
    """A session whose transaction ends with the test, however that ends."""
    conn = shared.db.connect()
    yield conn
    conn.close()


def epochs_of(conn: Conn, user: User) -> None:
    """No transaction may have written for both environments in one epoch.

    The epoch of a row is the number of handovers that it comes after: those whose snapshot does
    not show its transaction, and those of its own transaction.
    """
    mixed = rows(
        conn,
        "select s.arbiter_xid, array_agg(distinct s.source) as sources"
        "  from public.signals s where s.trader_id = %s group by s.arbiter_xid"
        " having count(distinct s.source) > 1",
        user.trader,
    )
    assert mixed == []
    wrong = rows(
        conn,
        "select s.source, s.machine_id, h.to_holder, h.to_machine_id, h.epoch"
        "  from public.signals s"
        "  cross join lateral ("
        "    select * from arbiter.handovers h"
        "     where h.user_id = %s"
        "       and (h.xid = s.arbiter_xid"
        "            or not pg_visible_in_snapshot(s.arbiter_xid, h.snapshot))"
        "     order by h.epoch desc limit 1) h"
        " where s.trader_id = %s"
        "   and (s.source, s.machine_id::text) is distinct from (h.to_holder, h.to_machine_id)",
        user.id,
        user.trader,
    )
    assert wrong == []


#: Statements before and after each of the two writes of a transaction.
AROUND = {
    "plain": ("", ""),
    "savepoints kept": ("savepoint s", ""),
    "savepoints released": ("savepoint s", "release s"),
    "nested and released": ("savepoint s; savepoint t", "release t; release s"),
    "nested, one released": ("savepoint s; savepoint t", "release t"),
    "in and out": ("savepoint s; savepoint t; rollback to t; release t", "release s"),
}


ISOLATION = ["read committed", "repeatable read", "serializable"]


@pytest.mark.parametrize("isolation", ISOLATION)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("course", ["local first", "local first, marked elsewhere", "cloud first"])
def test_a_transaction_does_not_write_for_both(
    shared: Stage, conn: Conn, carol: User, course: str, around: str, isolation: str
) -> None:
    before, after = AROUND[around]
    machine = add_machine(shared.owner, carol, "running")
    if course == "cloud first":
        beat(shared.owner, machine)
        beat(shared.owner, machine)
    epoch = lease(shared.owner, carol).epoch
    expected = "WX007"
    second: tuple[str, str | None]

    def write(source: str) -> None:
        conn.execute(before.encode())
        add_signal(conn, carol.trader, source, machine if source == "cloud" else None)
        conn.execute(after.encode())

    conn.execute(f"begin isolation level {isolation}".encode())
    if course == "cloud first":
        write("cloud")
        set_status(conn, machine, "stopped")
        conn.execute(
            "update arbiter.machine_notes set left_running_at = left_running_at - %s"
            " where machine_id = %s",
            (SETTINGS["stop_grace"], machine),
        )
        second = ("local", None)
    else:
        write("local")
        # Both would end the drain, were it not for the write of this transaction.
        for _ in range(2):
            beat(conn if course == "local first" else shared.owner, machine)
        second = ("cloud", machine)
        if course != "local first" and isolation != "read committed":
            expected = "WX004"  # what this transaction sees is older than the mark
    assert lease(conn, carol).epoch == epoch
    conn.execute("savepoint attempt")
    assert rejection(add_signal, conn, carol.trader, *second).sqlstate == expected
    conn.execute("rollback to attempt")
    conn.execute("commit")

    epochs_of(shared.owner, carol)
    assert lease(shared.owner, carol).epoch == epoch
    add_signal(conn, carol.trader, *second)  # in the next transaction
    assert lease(shared.owner, carol).epoch == epoch + 1
    epochs_of(shared.owner, carol)


def test_a_write_that_was_rolled_back_does_not_count(
    shared: Stage, conn: Conn, carol: User
) -> None:
    machine = add_machine(shared.owner, carol, "running")
    conn.execute("begin; savepoint s")
    add_signal(conn, carol.trader)
    conn.execute("rollback to s")
    beat(shared.owner, machine)
    add_signal(conn, carol.trader, "cloud", machine)
    conn.execute("commit")

    assert lease(shared.owner, carol).holder == "cloud"
    epochs_of(shared.owner, carol)


def test_a_machine_activates_in_one_transaction_and_writes_in_the_next(
    shared: Stage, carol: User
) -> None:
    # Else its mark and the end of its drain would become visible at once, and a browser that met
    # the open transaction would have to wait for it.
    machine = add_machine(shared.owner, carol, "starting")
    conn = backend(shared.db)
    conn.execute("begin")
    set_status(conn, machine, "running")
    beat(conn, machine)
    conn.execute("savepoint s")
    error = rejection(add_signal, conn, carol.trader, "cloud", machine)
    assert error.sqlstate == "WX007"
    assert detail_of(error)["blockers"] == [conn.info.backend_pid]
    assert "commit it first" in (error.diag.message_hint or "")
    conn.execute("rollback to s; commit")
    add_signal(conn, carol.trader, "cloud", machine)

    assert lease(shared.owner, carol).machine_id == machine
    epochs_of(shared.owner, carol)


def test_the_first_write_ever_and_the_machines_in_one_transaction(
    shared: Stage, conn: Conn
) -> None:
    dora = add_user(shared.owner)
    conn.execute("begin")
    add_signal(conn, dora.trader)  # creates the lease
    machine = add_machine(conn, dora, "running")
    beat(conn, machine)
    beat(conn, machine)
    conn.execute("savepoint attempt")
    assert rejection(add_signal, conn, dora.trader, "cloud", machine).sqlstate == "WX007"
    conn.execute("rollback to attempt")
    conn.execute("commit")
    epochs_of(shared.owner, dora)


@pytest.mark.parametrize("around", AROUND)
def test_a_registration_and_both_writes_in_one_transaction(
    shared: Stage, conn: Conn, around: str
) -> None:
    before, after = AROUND[around]
    dora = add_user(shared.owner)
    conn.execute("begin")
    conn.execute(before.encode())
    machine = add_machine(conn, dora, "running")  # creates the lease
    add_signal(conn, dora.trader)
    conn.execute(after.encode())
    beat(conn, machine)
    beat(conn, machine)
    conn.execute("savepoint attempt")
    assert rejection(add_signal, conn, dora.trader, "cloud", machine).sqlstate == "WX007"
    conn.execute("rollback to attempt")
    conn.execute("commit")
    epochs_of(shared.owner, dora)


def test_a_takeover_and_the_machines_return_in_one_transaction(at: Stage) -> None:
    conn = at.db.connect()
    age(at.owner, at.bobs_machine, heartbeat=SETTINGS["heartbeat_timeout"])
    conn.execute("begin")
    add_signal(conn, at.bob.trader)  # takes over
    beat(conn, at.bobs_machine)
    beat(conn, at.bobs_machine)
    conn.execute("savepoint attempt")
    error = rejection(add_signal, conn, at.bob.trader, "cloud", at.bobs_machine)
    assert error.sqlstate == "WX007"
    conn.execute("rollback to attempt")
    conn.execute("commit")
    epochs_of(at.owner, at.bob)
    assert [row.reason for row in handovers(at.owner, at.bob)][-1] == "heartbeat_lapsed"


def test_a_drain_that_is_called_off_and_the_machines_return_in_one_transaction(
    shared: Stage, conn: Conn, carol: User
) -> None:
    machine = add_machine(shared.owner, carol, "running")
    beat(shared.owner, machine)
    assert lease(shared.owner, carol).draining_to == machine
    age(shared.owner, machine, heartbeat=SETTINGS["heartbeat_timeout"])
    conn.execute("begin")
    add_signal(conn, carol.trader)  # no handover: local holds still
    assert lease(conn, carol).epoch == 1
    beat(conn, machine)
    beat(conn, machine)
    conn.execute("savepoint attempt")
    assert rejection(add_signal, conn, carol.trader, "cloud", machine).sqlstate == "WX007"
    conn.execute("rollback to attempt")
    conn.execute("commit")
    epochs_of(shared.owner, carol)


def test_a_write_and_a_confirmed_takeover_in_one_transaction(at: Stage) -> None:
    conn = at.db.connect()
    conn.execute("begin")
    add_signal(conn, at.bob.trader, "cloud", at.bobs_machine)
    set_status(conn, at.bobs_machine, "error")
    conn.execute(
        "update arbiter.machine_notes set entered_error_at = entered_error_at - %s",
        (SETTINGS["error_takeover_delay"],),
    )
    conn.execute("select arbiter.confirm_takeover(%s)", (at.bob.id,))
    for source, machine in (("local", None), ("cloud", at.bobs_machine)):
        conn.execute("savepoint attempt")
        error = rejection(add_signal, conn, at.bob.trader, source, machine)
        assert error.sqlstate == {"local": "WX007", "cloud": "WX004"}[source]
        conn.execute("rollback to attempt")
    conn.execute("commit")
    assert lease(at.owner, at.bob).epoch == 2

    add_signal(conn, at.bob.trader)
    assert [row.reason for row in handovers(at.owner, at.bob)][-1] == "confirmed"
    epochs_of(at.owner, at.bob)


def test_both_environments_in_one_statement(shared: Stage, carol: User) -> None:
    machine = add_machine(shared.owner, carol, "running")
    both = (
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " values (%(trader)s, 'A', '1m', 'buy', now(), 'local', null),"
        "        (%(trader)s, 'B', '1m', 'buy', now(), 'cloud', %(machine)s)"
    )
    for _ in range(3):  # local holds, it drains, the machine holds
        error, _ = shared.rejected(
            shared.owner.execute, both, {"trader": carol.trader, "machine": machine}
        )
        assert error in ("WX001", "WX004", "WX007")
        beat(shared.owner, machine)
    epochs_of(shared.owner, carol)
