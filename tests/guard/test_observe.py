"""Mode observe: everything is written, and what enforce would have rejected is recorded."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    SETTINGS,
    activate,
    add_machine,
    add_signal,
    add_trader,
    add_user,
    age,
    backend,
    beat,
    browser,
    detail_of,
    handovers,
    lease,
    rejection,
    rows,
    set_status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]


class Stage:
    """Ada is local, her machine is starting; Bob's machine holds."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.conn = backend(db)
        self.ada, self.bob = add_user(self.owner), add_user(self.owner)
        self.adas_machine = add_machine(self.owner, self.ada, "starting")
        self.machine = activate(self.owner, self.bob)
        self.first = add_signal(self.owner, self.ada.trader)
        self.builtin = add_trader(self.owner, None)

    def protect(self, mode: str, more: str = "") -> None:
        """Protect signals in that mode."""
        self.owner.execute(f"select arbiter.protect('public.signals', p_mode => %s{more})", (mode,))

    def observations(self) -> list[Any]:
        """What was recorded."""
        return rows(
            self.owner,
            "select code, detail, protected_table::text as table_name, xid, observed_at"
            " from arbiter.observations order by observation_id",
        )

    def update(self, change: str) -> None:
        """Change the first signal."""
        self.conn.execute(
            f"update public.signals set {change} where id = %s".encode(), (self.first,)
        )


@pytest.fixture
def at(db: Database) -> Stage:
    return Stage(db)


def stopped(at: Stage) -> None:
    set_status(at.owner, at.machine, "stopped")


def failed(at: Stage) -> None:
    set_status(at.owner, at.machine, "error")


def failed_long_ago(at: Stage) -> None:
    failed(at)
    age(at.owner, at.machine, entered_error=SETTINGS["error_takeover_delay"])


def lapsed(at: Stage) -> None:
    age(at.owner, at.machine, heartbeat=SETTINGS["heartbeat_timeout"])


def nothing(at: Stage) -> None:
    pass


Write = Callable[[Stage], object]

#: What has happened, what is written then, and the code that enforce has for it.
CASES: dict[str, tuple[Callable[[Stage], None], Write, str]] = {
    "cloud active": (nothing, lambda at: add_signal(at.conn, at.bob.trader), "cloud_active"),
    "stopped": (stopped, lambda at: add_signal(at.conn, at.bob.trader), "cooling_down"),
    "error": (failed, lambda at: add_signal(at.conn, at.bob.trader), "takeover_unconfirmed"),
    "error, long ago": (
        failed_long_ago,
        lambda at: add_signal(at.conn, at.bob.trader),
        "takeover_unconfirmed",
    ),
    "not holder": (
        nothing,
        lambda at: add_signal(at.conn, at.ada.trader, "cloud", at.adas_machine),
        "not_holder",
    ),
    "stale holder": (
        lapsed,
        lambda at: add_signal(at.conn, at.bob.trader, "cloud", at.machine),
        "not_holder",
    ),
    "another user's machine": (
        nothing,
        lambda at: add_signal(at.conn, at.ada.trader, "cloud", at.machine),
        "wrong_identity",
    ),
    "local with a machine": (
        nothing,
        lambda at: add_signal(at.conn, at.bob.trader, "local", at.machine),
        "wrong_identity",
    ),
    "no user": (nothing, lambda at: add_signal(at.conn, at.builtin), "wrong_identity"),
    "forged evidence": (
        nothing,
        lambda at: at.conn.execute(
            "insert into public.signals"
            " (trader_id, symbol, interval, signal, bar_time, arbiter_xid)"
            " values (%s, 'F', '1m', 'buy', now(), '3')",
            (at.ada.trader,),
        ),
        "wrong_identity",
    ),
    "source changed": (
        nothing,
        lambda at: at.update("source = 'cloud', symbol = symbol || '2'"),
        "provenance_immutable",
    ),
    "evidence changed": (
        nothing,
        lambda at: at.update("arbiter_xid = '3', symbol = symbol || '2'"),
        "provenance_immutable",
    ),
}


def signals(conn: Conn) -> list[Any]:
    return rows(conn, "select * from public.signals order by id")


@pytest.mark.parametrize("case", CASES)
def test_what_enforce_rejects_is_written_and_recorded(at: Stage, case: str) -> None:
    happen, write, code = CASES[case]
    happen(at)
    before = signals(at.owner)
    history = rows(at.owner, "select * from arbiter.handovers order by user_id, epoch")
    error = rejection(write, at)
    assert signals(at.owner) == before
    assert at.observations() == []

    at.protect("observe")
    with at.conn.transaction():
        write(at)
        xid = value(at.conn, "select pg_current_xact_id()::text")

    assert signals(at.owner) != before
    (seen,) = at.observations()
    assert (seen.code, seen.table_name, seen.xid) == (code, "signals", xid)
    assert seen.detail == detail_of(error)
    assert seen.observed_at.tzinfo is not None
    # A write that would have been rejected hands nothing over.
    assert rows(at.owner, "select * from arbiter.handovers order by user_id, epoch") == history


def test_what_enforce_admits_is_not_recorded(at: Stage) -> None:
    at.protect("observe")
    add_signal(at.conn, at.ada.trader)
    add_signal(at.conn, at.bob.trader, "cloud", at.machine)
    add_signal(at.conn, add_user(at.owner).trader)
    at.update("price = 1")
    lapsed(at)
    add_signal(at.conn, at.bob.trader)  # a takeover

    assert at.observations() == []
    assert [row.reason for row in handovers(at.owner, at.bob)][-1] == "heartbeat_lapsed"


def test_a_statement_is_recorded_once_for_each_claim(at: Stage) -> None:
    at.protect("observe")
    at.conn.execute(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " select case n %% 3 when 0 then %(ada)s::uuid else %(bob)s end, 'S', '1m', 'buy',"
        "        timestamptz '2026-01-01' + n * interval '1 minute',"
        "        case n %% 3 when 2 then 'cloud' else 'local' end,"
        "        case n %% 3 when 2 then %(machine)s::uuid end"
        "   from generate_series(1, 99) n",
        {"ada": at.ada.trader, "bob": at.bob.trader, "machine": at.machine},
    )

    assert [seen.code for seen in at.observations()] == ["cloud_active"]
    assert value(at.owner, "select count(*) from public.signals where symbol = 'S'") == 99


def test_a_browser_is_observed_and_does_not_see_it(at: Stage) -> None:
    at.protect("observe")
    conn = browser(at.db, at.bob)

    add_signal(conn, at.bob.trader)

    assert [seen.code for seen in at.observations()] == ["cloud_active"]
    for attempt in (
        "select from arbiter.observations",
        "delete from arbiter.observations",
        "insert into arbiter.observations (code) values ('x')",
    ):
        assert rejection(conn.execute, attempt).sqlstate == "42501"


def test_a_record_goes_with_its_transaction(at: Stage) -> None:
    at.protect("observe")
    at.conn.execute("begin")
    add_signal(at.conn, at.bob.trader)
    at.conn.execute("rollback")
    assert at.observations() == []


def test_updates_are_observed_where_they_are_judged(at: Stage) -> None:
    at.owner.execute(
        "select arbiter.protect("
        "'public.positions', p_verbs => '{insert,update}', p_mode => 'observe')"
    )
    insert = (
        "insert into public.positions (user_id, symbol, source, machine_id) values (%s, %s, %s, %s)"
    )
    at.conn.execute(insert, (at.bob.id, "A", "local", None))
    at.conn.execute("update public.positions set quantity = 1")
    at.conn.execute("update public.positions set source = 'cloud', quantity = 2")
    at.conn.execute("update public.positions set user_id = %s, quantity = 3", (at.ada.id,))

    codes = [seen.code for seen in at.observations()]
    assert codes[:2] == ["cloud_active", "cloud_active"]
    assert set(codes[2:]) == {"wrong_identity", "provenance_immutable"}
    assert value(at.owner, "select quantity from public.positions") == 3


@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
@pytest.mark.parametrize("kind", ["plain", "partitioned"])
def test_a_change_of_provenance_is_recorded_once(at: Stage, kind: str, verbs: str) -> None:
    at.owner.execute(
        b"create table public.notes (id integer, user_id uuid, note text)"
        + (b" partition by range (id)" if kind == "partitioned" else b"")
    )
    if kind == "partitioned":
        at.owner.execute("create table public.some partition of public.notes default")
    at.owner.execute(
        "select arbiter.protect('public.notes', 'user_id', p_verbs => %s, p_mode => 'observe')",
        (verbs,),
    )
    at.owner.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    at.owner.execute("update public.notes set user_id = %s", (add_user(at.owner).id,))
    assert [seen.code for seen in at.observations()] == ["provenance_immutable"]
    at.owner.execute("alter table public.notes rename source to origin")
    at.owner.execute("update public.notes set note = 'x'")
    codes = [seen.code for seen in at.observations()][1:]
    # The guard of a partitioned table judges an update by the statement and by the row.
    both = (kind, verbs) == ("partitioned", "{insert,update}")
    assert codes == ["wrong_identity"] * (2 if both else 1)


#: Updates that the trigger for provenance lets pass at once, and others.
UPDATES = ["note = note", "user_id = null", "source = 'cloud'", "machine_id = null"]


@pytest.mark.parametrize("mode", ["enforce", "observe"])
@pytest.mark.parametrize("verbs", ["{insert}", "{insert,update}"])
@pytest.mark.parametrize("gone", ["user_id", "source", "machine_id", "arbiter_xid"])
def test_an_update_by_a_session_that_knew_the_columns(
    at: Stage, gone: str, verbs: str, mode: str
) -> None:
    at.owner.execute("""
        create table public.notes (id integer, user_id uuid, note text);
        grant all on public.notes to service_role""")
    at.owner.execute(
        "select arbiter.protect('public.notes', 'user_id', p_verbs => %s, p_mode => %s)",
        (verbs, mode),
    )
    at.conn.execute("insert into public.notes values (1, %s)", (at.ada.id,))
    at.conn.execute("update public.notes set note = 'x'")
    rejection(
        at.conn.execute,
        "do $$ begin update public.notes set user_id = null;"
        " update public.notes set source = 'cloud'; raise exception 'undone'; end $$",
    )
    at.owner.execute(f"alter table public.notes rename {gone} to other".encode())
    for update in UPDATES:
        if update.startswith(gone):
            continue
        statement = f"update public.notes set {update}"
        if mode == "observe":
            assert at.conn.execute(statement.encode()).rowcount == 1
        else:
            assert rejection(at.conn.execute, statement).sqlstate == "WX005"


def test_enforce_and_back(at: Stage) -> None:
    add_signal(at.conn, at.ada.trader)
    for _ in range(2):
        recorded = len(at.observations())
        assert rejection(add_signal, at.conn, at.bob.trader).sqlstate == "WX001"
        assert len(at.observations()) == recorded
        at.protect("observe")
        add_signal(at.conn, at.bob.trader)
        assert len(at.observations()) == recorded + 1
        at.protect("enforce")
    at.owner.execute("select arbiter.protect('public.signals')")  # which leaves it as it is
    assert rejection(add_signal, at.conn, at.bob.trader).sqlstate == "WX001"


def test_only_the_observed_table_is_observed(at: Stage) -> None:
    at.owner.execute("select arbiter.protect('public.positions', p_mode => 'observe')")
    assert rejection(add_signal, at.conn, at.bob.trader).sqlstate == "WX001"


# Nothing waits, nothing fails --------------------------------------------------------------------


def write_at_once(at: Stage, trader: Any) -> None:
    """A local write that must not wait for any lock, nor in a loop of its own."""
    conn = at.db.connect(role="service_role")
    at.owner.execute("update arbiter.settings set drain_timeout = interval '1 hour'")
    conn.execute("set statement_timeout = %s" % int(TIMEOUT_S * 1000 / 2))  # noqa: UP031
    add_signal(conn, trader)


def test_observe_does_not_wait_for_a_handover(at: Stage) -> None:
    at.protect("observe")
    other = at.db.connect()
    other.execute("begin")
    other.execute("select from arbiter.leases where user_id = %s for update", (at.ada.id,))

    write_at_once(at, at.ada.trader)

    other.execute("rollback")
    assert [seen.code for seen in at.observations()] == ["handover_draining"]


def test_observe_does_not_wait_for_writes_in_flight(at: Stage) -> None:
    at.protect("observe")
    other = at.db.connect()
    other.execute("begin")
    add_signal(other, at.bob.trader, "cloud", at.machine)
    lapsed_elsewhere = at.db.connect()
    age(lapsed_elsewhere, at.machine, heartbeat=timedelta(minutes=1))

    write_at_once(at, at.bob.trader)

    other.execute("rollback")
    (seen,) = at.observations()
    assert seen.code == "handover_draining"
    assert seen.detail["blockers"] == [other.info.backend_pid]


def test_observe_does_not_wait_for_another_first_write(at: Stage) -> None:
    at.protect("observe")
    carol = add_user(at.owner)
    other = at.db.connect()
    other.execute("begin")
    add_signal(other, carol.trader)

    write_at_once(at, carol.trader)

    other.execute("commit")
    assert {seen.code for seen in at.observations()} <= {"handover_draining"}
    assert lease(at.owner, carol).epoch == 1


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_observe_does_not_fail_on_an_old_snapshot(at: Stage, isolation: str) -> None:
    at.protect("observe")
    conn = at.db.connect(role="service_role")
    conn.execute(f"begin isolation level {isolation}".encode())
    conn.execute("select count(*) from public.signals")
    set_status(at.owner, at.adas_machine, "running")
    beat(at.owner, at.adas_machine)
    beat(at.owner, at.adas_machine)
    assert lease(at.owner, at.ada).holder == "cloud"

    add_signal(conn, at.ada.trader)  # enforce: 40001, from the server itself
    conn.execute("commit")

    (seen,) = at.observations()
    assert seen.detail["user_id"] == str(at.ada.id)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_enforce_does_fail_on_an_old_snapshot(at: Stage, isolation: str) -> None:
    conn = at.db.connect(role="service_role")
    conn.execute(f"begin isolation level {isolation}".encode())
    conn.execute("select count(*) from public.signals")
    set_status(at.owner, at.adas_machine, "running")
    beat(at.owner, at.adas_machine)
    beat(at.owner, at.adas_machine)

    assert rejection(add_signal, conn, at.ada.trader).sqlstate == "40001"


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("before", ["observe", None])
def test_a_snapshot_older_than_the_switch_to_enforce_is_rejected(
    at: Stage, level: str, before: str | None
) -> None:
    """It saw the table observed, or not protected at all, and writes after that has changed."""
    if before is None:
        at.owner.execute("select arbiter.unprotect('public.signals')")
    else:
        at.protect(before)
    at.conn.execute(f"begin isolation level {level}".encode())
    at.conn.execute("select from public.traders")
    at.protect("enforce")
    assert rejection(add_signal, at.conn, at.bob.trader).sqlstate == "WX001"
    at.conn.execute("rollback")
    assert at.observations() == []
    assert value(at.owner, "select count(*) from public.signals") == 1


def test_a_lease_that_another_session_has_created_meanwhile_decides(at: Stage) -> None:
    """Between the look for it and its creation. Observing waits for nothing, and need not."""
    user = add_user(at.owner)
    at.protect("observe")
    admin = at.db.connect("postgres")
    admin.execute(
        """
        create function public.tg_wait() returns trigger language plpgsql as $$
        begin
          for n in 1 .. 2000 loop
            exit when exists (select from arbiter.leases l where l.user_id = new.user_id);
            perform pg_sleep(0.01);
          end loop;
          return new;
        end $$;
        create trigger wait before insert on arbiter.leases
          for each row execute function public.tg_wait();
        set session_replication_role = replica
        """
    )
    with at.db.session() as writer:
        writing = writer.start(
            "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
            f" values ('{user.trader}', 'BTC', '1m', 'buy', now())"
        )
        wait_until_blocked(writer)
        admin.execute(
            "insert into arbiter.leases (user_id, epoch, holder, held_since)"
            " values (%s, 1, 'local', now())",
            (str(user.id),),
        )
        writing.result(TIMEOUT_S)
    assert at.observations() == []
    assert value(at.owner, "select count(*) from public.signals") == 2


# No more than 1,000 of a table --------------------------------------------------------------------

KEPT = 1_000

MANY = """
do $$ begin
  for n in 1 .. {number} loop
    insert into public.signals (trader_id, symbol, interval, signal, bar_time)
      values ('{trader}', 'FLOOD', '1m', 'buy', timestamptz '2000-01-01' + {first} * interval '1 h'
        + n * interval '1 min');
  end loop;
end $$
"""


def flood(conn: Conn, at: Stage, number: int, first: int = 0) -> None:
    """So many writes that enforce would reject, each a statement of its own."""
    conn.execute(MANY.format(number=number, trader=at.bob.trader, first=first).encode())


def ids(at: Stage, table: str = "public.signals") -> list[int]:
    found = rows(
        at.owner,
        "select observation_id from arbiter.observations where protected_table = %s::regclass"
        " order by 1",
        table,
    )
    return [row[0] for row in found]


def test_only_the_newest_are_kept(at: Stage) -> None:
    """Any user can make as many as they like."""
    at.owner.execute("select arbiter.protect('public.positions', p_mode => 'observe')")
    at.protect("observe")
    at.conn.execute(
        "insert into public.positions (user_id, symbol) values (%s, 'BTC')", (at.bob.id,)
    )
    conn = browser(at.db, at.bob)
    flood(conn, at, KEPT)
    before = ids(at)
    assert len(before) == KEPT
    flood(conn, at, 10, first=1_000)
    after = ids(at)
    assert len(after) == KEPT
    assert after[:-10] == before[10:]
    assert len(ids(at, "public.positions")) == 1  # another table has its own


def test_what_is_too_much_goes_step_by_step(at: Stage) -> None:
    """A database that has many already; no single write pays for all of it."""
    at.protect("observe")
    at.owner.execute(
        "insert into arbiter.observations (observed_at, protected_table, code, detail, xid)"
        " select now(), 'public.signals'::regclass, 'cloud_active', '{}', '3'"
        " from generate_series(1, 1150)"
    )
    flood(at.conn, at, 1)
    assert len(ids(at)) == 1_051
    flood(at.conn, at, 2, first=1_000)
    assert len(ids(at)) == KEPT


def test_the_oldest_go_first(at: Stage) -> None:
    """By their numbers, wherever the rows lie and however they are found."""
    at.owner.execute(
        "insert into arbiter.observations"
        "   (observation_id, observed_at, protected_table, code, detail, xid)"
        " overriding system value"
        " select 2000 - n, now(), 'public.signals'::regclass, 'cloud_active', '{}', '3'"
        "   from generate_series(0, 1149) n"
    )
    for way in ("indexscan", "indexonlyscan", "bitmapscan"):
        at.owner.execute(f"set enable_{way} = off".encode())
    at.owner.execute("select arbiter._trim_observations('public.signals')")
    assert ids(at) == list(range(2000 - KEPT - 49, 2001))


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
def test_trimming_neither_waits_nor_fails(at: Stage, level: str) -> None:
    """Another session trims at the same time, and has done so since the snapshot."""
    at.protect("observe")
    flood(at.conn, at, KEPT)
    other = at.db.connect(role="service_role", autocommit=False)
    late = at.db.connect(role="service_role", autocommit=False)
    late.execute(f"set transaction isolation level {level}".encode())
    late.execute("set local lock_timeout = '5 s'")
    late.execute("select count(*) from public.signals")  # its snapshot
    flood(other, at, 5, first=1_000)
    flood(late, at, 5, first=2_000)
    other.commit()
    flood(late, at, 5, first=3_000)
    late.commit()
    assert len([row for row in signals(at.owner) if row.symbol == "FLOOD"]) == KEPT + 15
    flood(at.conn, at, 1, first=4_000)
    assert len(ids(at)) == KEPT


def test_serializable_transactions_record_while_there_is_room(at: Stage) -> None:
    """They trim nothing, because two that do conflict."""
    at.protect("observe")
    flood(at.conn, at, KEPT)
    one, two = (at.db.connect(role="service_role", autocommit=False) for _ in "ab")
    for number, conn in enumerate((one, two), 1):
        conn.execute("set transaction isolation level serializable")
        flood(conn, at, 1, first=1_000 * number)
    one.commit()
    two.commit()
    assert len(ids(at)) == KEPT + 2
    at.owner.execute(
        "insert into arbiter.observations (observed_at, protected_table, code, detail, xid)"
        " select now(), 'public.positions'::regclass, 'x', to_jsonb(repeat(md5(n::text), 40)), '3'"
        " from generate_series(1, 16000) as n"
    )
    before = len(ids(at))
    one.execute("set transaction isolation level serializable")
    flood(one, at, 1, first=5_000)
    one.commit()
    assert len(ids(at)) == before


def test_what_was_observed_is_told_per_hour_user_and_code(db: Database) -> None:
    """Since the table has the mode, and again from the start when it gets it anew."""
    stage = Stage(db)
    stage.protect("observe", ", p_unowned => 'reject'")
    [watched] = arbiter_db.observed_tables(stage.owner)
    assert (watched.table, watched.writes, watched.last_at) == ("public.signals", 0, None)
    assert arbiter_db.observations(stage.owner) == []

    for _ in range(2):
        add_signal(stage.conn, stage.bob.trader)
    add_signal(stage.conn, stage.builtin)
    add_signal(stage.conn, stage.ada.trader)  # admitted, so not observed
    stage.owner.execute(
        "update arbiter.observations set observed_at = observed_at + interval '1 hour'"
        " where observation_id = (select min(observation_id) from arbiter.observations)"
    )
    found = arbiter_db.observations(stage.owner)
    assert [(o.table, o.user_id, o.code, o.writes) for o in found] == [
        ("public.signals", str(stage.bob.id), "cloud_active", 1),
        ("public.signals", None, "wrong_identity", 1),
        ("public.signals", str(stage.bob.id), "cloud_active", 1),
    ]
    assert found[2].hour - found[0].hour == timedelta(hours=1)
    assert all(o.hour <= o.last_at < o.hour + timedelta(hours=1) for o in found)
    [watched] = arbiter_db.observed_tables(stage.owner)
    assert (watched.writes, watched.last_at) == (3, found[2].last_at)

    # The same mode again changes nothing; another one and back does.
    stage.protect("observe")
    assert arbiter_db.observed_tables(stage.owner) == [watched]
    stage.owner.execute("update arbiter.observations set observed_at = now() - interval '1 day'")
    stage.protect("enforce")
    assert arbiter_db.observed_tables(stage.owner) == []
    assert sum(o.writes for o in arbiter_db.observations(stage.owner)) == 3
    stage.protect("observe")
    [again] = arbiter_db.observed_tables(stage.owner)
    assert (again.writes, again.since > watched.since) == (0, True)
    assert arbiter_db.observations(stage.owner) == []
