"""The Python functions on a real database: what they return, and that they leave the rest alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, namedtuple_row

import arbiter_db
from arbiter_db import api

if TYPE_CHECKING:
    from conftest import Database

ADA = "ada00000-0000-4000-8000-000000000001"
BOB = "b0b00000-0000-4000-8000-000000000002"
ADAS_TRADER = "ada00000-0000-4000-8000-00000000007a"
ADAS_MACHINE = "ada00000-0000-4000-8000-0000000000c1"
BOBS_MACHINE = "b0b00000-0000-4000-8000-0000000000c2"
NOBODY = str(UUID(int=0))

Connection = psycopg.Connection[Any]


@pytest.fixture
def conn(db: Database) -> Connection:
    """The owner's connection to a database with two users, each with a machine that is starting."""
    conn = db.connect()
    people = Path(arbiter_db.__file__).parent / "demo" / "people.sql"
    conn.execute(people.read_text(encoding="utf-8"))
    conn.execute(
        "insert into public.cloud_machines (id, user_id, status) values (%s, %s, %s), (%s, %s, %s)",
        (ADAS_MACHINE, ADA, "starting", BOBS_MACHINE, BOB, "starting"),
    )
    return conn


def insert_signal(conn: Connection) -> None:
    conn.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, 'BTCUSDT', '1h', 'buy', clock_timestamp())",
        (ADAS_TRADER,),
    )


def set_machine(conn: Connection, status: str) -> None:
    conn.execute(
        "update public.cloud_machines set status = %s where id = %s", (status, ADAS_MACHINE)
    )


def activate(conn: Connection) -> None:
    """Ada's machine becomes healthy and, with its second heartbeat, the holder."""
    set_machine(conn, "running")
    api.heartbeat(conn, ADAS_MACHINE)
    api.heartbeat(conn, ADAS_MACHINE)


def test_status_before_anything_happened(conn: Connection) -> None:
    status = api.status(conn, BOB)

    assert (status.environment, status.can_write_local) == ("local", True)
    assert (status.code, status.retry_at, status.draining) == (None, None, False)
    assert status.poll_interval == timedelta(seconds=5)
    assert status.as_of.tzinfo is not None


def test_status_while_the_cloud_holds(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)

    status = api.status(conn, str(ADA))

    assert (status.environment, status.can_write_local) == ("cloud", False)
    assert (status.code, status.message) == ("cloud_active", "Cloud active")
    assert (status.machine_id, status.machine_state) == (ADAS_MACHINE, "running")
    assert status.heartbeat_age is not None
    assert timedelta() <= status.heartbeat_age < timedelta(seconds=30)
    assert status.epoch == 2


def test_status_of_the_sessions_own_user(db: Database, conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    browser = db.connect(role="authenticated", claims={"sub": str(ADA)})

    assert api.status(browser).code == "cloud_active"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        api.status(browser, BOB)


def test_a_heartbeat_returns_the_databases_instant(conn: Connection) -> None:
    first = api.heartbeat(conn, ADAS_MACHINE)
    second = api.heartbeat(conn, str(ADAS_MACHINE))

    row = conn.execute(
        "select last_health_check from public.cloud_machines where id = %s", (ADAS_MACHINE,)
    ).fetchone()
    assert row == (second,)
    assert second > first


def test_heartbeats_of_many_machines_at_once(conn: Connection) -> None:
    machines: list[str] = [ADAS_MACHINE, str(BOBS_MACHINE)]

    assert api.heartbeat(conn, machines) == 2
    assert api.heartbeat(conn, iter(machines[:1])) == 1
    assert api.heartbeat(conn, []) == 0


def test_an_unknown_machine_is_an_error_and_writes_nothing(conn: Connection) -> None:
    with pytest.raises(psycopg.errors.NoDataFound, match=str(NOBODY)):
        api.heartbeat(conn, NOBODY)
    with pytest.raises(psycopg.errors.NoDataFound, match=str(NOBODY)):
        api.heartbeat(conn, [ADAS_MACHINE, NOBODY])

    row = conn.execute("select count(last_health_check) from public.cloud_machines").fetchone()
    assert row == (0,)


def test_confirm_takeover_hands_the_lease_to_the_browser(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    set_machine(conn, "error")
    with pytest.raises(arbiter_db.TakeoverUnconfirmed) as caught:
        api.confirm_takeover(conn, ADA)
    assert caught.value.retry_at is not None
    conn.execute(
        "update arbiter.machine_notes"
        " set entered_error_at = entered_error_at - interval '2 minutes'"
    )

    status = api.confirm_takeover(conn, ADA)

    assert (status.environment, status.can_write_local, status.epoch) == ("local", True, 3)
    assert status.machine_state == "stopped"
    insert_signal(conn)


def test_a_rejection_is_raised_as_its_class(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)

    with pytest.raises(arbiter_db.CloudActive) as caught:
        api.confirm_takeover(conn, ADA)
    with pytest.raises(arbiter_db.CloudActive), arbiter_db.translated():
        insert_signal(conn)

    error = caught.value
    assert (error.user_id, error.holder, error.machine_id) == (ADA, "cloud", ADAS_MACHINE)
    assert error.epoch == 2
    assert error.hint


def test_handovers_come_newest_last(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    conn.execute(
        "update public.cloud_machines set status = 'running' where id = %s", (BOBS_MACHINE,)
    )
    api.heartbeat(conn, BOBS_MACHINE)
    api.heartbeat(conn, BOBS_MACHINE)

    history = api.handovers(conn, ADA)

    assert [(row.epoch, row.to_holder) for row in history] == [(1, "local"), (2, "cloud")]
    first, second = history
    assert (first.from_holder, first.from_machine_id, first.to_machine_id) == (None, None, None)
    assert (second.from_holder, second.to_machine_id) == ("local", ADAS_MACHINE)
    assert second.reason == "activated"
    assert second.exact
    assert second.xid > first.xid
    assert second.snapshot.count(":") == 2
    assert second.handed_over_at > first.handed_over_at
    assert api.handovers(conn, ADA, limit=1) == [second]
    everybodys = api.handovers(conn)
    assert sorted(str(row.user_id) for row in everybodys) == [str(ADA)] * 2 + [str(BOB)] * 2
    assert everybodys == sorted(everybodys, key=lambda row: row.handed_over_at)
    assert api.handovers(conn, limit=3) == everybodys[1:]
    assert api.handovers(conn, NOBODY) == []


def test_an_audit_counts_and_tells_how_far_it_is(conn: Connection) -> None:
    insert_signal(conn)
    heard: list[tuple[int, int]] = []
    audit = api.audit(conn, "public.signals", on_progress=lambda *at: heard.append(at))
    assert audit == api.Audit("public.signals", proved=1, not_provable={}, findings=[])
    assert heard == [(0, 1)]
    assert api.protected_tables(conn) == {"signals": True}
    assert api.protection(conn, "public.signals") == (
        "public.signals is protected: mode enforce, user by 'trader_id.user_id', machine in"
        " machine_id, rows without a user: reject"
    )


def test_an_audit_lists_what_contradicts(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    conn.execute("alter table public.signals disable trigger user")
    insert_signal(conn)
    audit = api.audit(conn, "public.signals")
    assert audit.proved == 1
    (found,) = audit.findings
    assert (found.finding, found.reason, found.row_table) == (
        "contradiction",
        "wrong_environment",
        "signals",
    )
    assert (found.source, found.machine_id, found.epoch, found.holder) == (
        "local",
        None,
        2,
        "cloud",
    )


def test_protect_and_unprotect_a_table(conn: Connection) -> None:
    api.protect(
        conn,
        "public.positions",
        user_path="user_id",
        verbs=("insert", "update"),
        machine_column="written_by",
        mode="observe",
        unowned="allow",
        evidence=False,
    )

    row = conn.execute(
        "select user_path, verbs, machine_column, mode, unowned, evidence from arbiter.protections"
        " where protected_table = 'public.positions'::regclass"
    ).fetchone()
    assert row == ("user_id", ["insert", "update"], "written_by", "observe", "allow", False)

    # What is left out stays as it is.
    api.protect(conn, "public.positions", mode="enforce")
    row = conn.execute(
        "select user_path, verbs, machine_column, mode, unowned, evidence from arbiter.protections"
        " where protected_table = 'public.positions'::regclass"
    ).fetchone()
    assert row == ("user_id", ["insert", "update"], "written_by", "enforce", "allow", False)
    api.protect(conn, "public.positions", verbs=["insert"], unowned="reject", evidence=True)
    row = conn.execute(
        "select verbs, machine_column, mode, unowned, evidence from arbiter.protections"
        " where protected_table = 'public.positions'::regclass"
    ).fetchone()
    assert row == (["insert"], "written_by", "enforce", "reject", True)

    api.unprotect(conn, "public.positions")
    row = conn.execute(
        "select array_agg(protected_table::text) from arbiter.protections"
    ).fetchone()
    assert row == (["signals"],)


def test_protect_passes_the_databases_rejection_on(conn: Connection) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable):
        api.protect(conn, "public.nothing")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_mode sometimes"):
        api.protect(conn, "public.positions", mode="sometimes")


def test_register_machines_with_other_names(conn: Connection) -> None:
    conn.execute(
        "create table public.user_apps (app_id uuid primary key, owner uuid not null, phase text,"
        " probe text)"
    )

    api.register_machines(
        conn,
        "public.user_apps",
        id_column="app_id",
        user_column="owner",
        status_column="phase",
        heartbeat_column="seen_at",
        states={"up": "running", "down": "stopped"},
        health_column="probe",
        healthy=iter(["passing", "warning"]),
    )

    row = conn.execute(
        "select registry::text, id_column, user_column, status_column, heartbeat_column, states,"
        " health_column, healthy from arbiter.registry"
    ).fetchone()
    assert row is not None
    assert row[:5] == ("user_apps", "app_id", "owner", "phase", "seen_at")
    assert (row[5]["up"], row[5]["down"]) == ("running", "stopped")
    assert row[6:] == ("probe", ["passing", "warning"])


def test_heartbeats_of_a_machine_that_is_not_well(conn: Connection) -> None:
    conn.execute("alter table public.cloud_machines add health_status text")
    api.register_machines(
        conn, "public.cloud_machines", health_column="health_status", healthy=["healthy"]
    )
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="does not count"):
        api.heartbeat(conn, ADAS_MACHINE)
    assert api.heartbeat(conn, [ADAS_MACHINE]) == 0
    conn.execute("update public.cloud_machines set health_status = 'healthy'")
    assert api.heartbeat(conn, [ADAS_MACHINE]) == 1


def test_the_database_has_the_packages_version(conn: Connection) -> None:
    assert api.version(conn) == arbiter_db.__version__


@pytest.mark.parametrize("row_factory", [dict_row, namedtuple_row])
@pytest.mark.parametrize(
    "cursor_factory", [psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor]
)
def test_results_do_not_depend_on_the_callers_factories(
    db: Database, conn: Connection, row_factory: Any, cursor_factory: Any
) -> None:
    insert_signal(conn)
    yours = db.connect(row_factory=row_factory, cursor_factory=cursor_factory)

    assert api.status(yours, ADA).epoch == 1
    assert api.heartbeat(yours, [ADAS_MACHINE]) == 1
    assert api.heartbeat(yours, ADAS_MACHINE).tzinfo is not None
    assert [row.epoch for row in api.handovers(yours, ADA)] == [1]
    assert api.version(yours) == arbiter_db.__version__


CALLS: dict[str, Callable[[Connection], object]] = {
    "status": lambda conn: api.status(conn, ADA),
    "heartbeat": lambda conn: api.heartbeat(conn, ADAS_MACHINE),
    "heartbeats": lambda conn: api.heartbeat(conn, [ADAS_MACHINE]),
    "handovers": lambda conn: api.handovers(conn),
    "protect": lambda conn: api.protect(conn, "public.positions"),
    "unprotect": lambda conn: api.unprotect(conn, "public.signals"),
    "register_machines": lambda conn: api.register_machines(conn, "public.cloud_machines"),
    "version": lambda conn: api.version(conn),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_transaction_stays_the_callers(db: Database, conn: Connection, call: str) -> None:
    yours = db.connect(autocommit=False)
    watched = (
        "select (select last_health_check from public.cloud_machines where id = %s),"
        " (select array_agg(protected_table::text) from arbiter.protections)"
    )
    before = conn.execute(watched, (ADAS_MACHINE,)).fetchone()

    CALLS[call](yours)

    assert yours.info.transaction_status == TransactionStatus.INTRANS
    yours.rollback()
    assert not yours.closed
    assert conn.execute(watched, (ADAS_MACHINE,)).fetchone() == before


def test_protect_takes_the_path_to_the_user(conn: Connection) -> None:
    conn.execute(
        "create table public.notes (id uuid primary key default gen_random_uuid(),"
        " user_id uuid, author uuid references auth.users)"
    )
    api.protect(conn, "public.notes", user_path="author")
    row = conn.execute(
        "select user_path from arbiter.protections where protected_table = 'public.notes'::regclass"
    ).fetchone()
    assert row == ("author",)


@pytest.mark.parametrize("cls", [api.Status, api.Handover, api.Finding, api.Audit])
def test_rows_are_frozen(cls: Any) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    row = cls(**dict.fromkeys(fields))
    assert row == cls(*[None] * len(fields))
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(row, field, 1)
    assert not hasattr(row, "__dict__")


def test_a_status_has_every_column_of_the_databases(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    conn.execute("begin isolation level repeatable read")
    status = dataclasses.asdict(api.status(conn, ADA))
    row = (
        conn.cursor(row_factory=dict_row)
        .execute("select * from arbiter.status(%s)", (ADA,))
        .fetchone()
    )
    assert row is not None
    differs = {"as_of", "heartbeat_age"}  # the clock goes on
    assert {name: status[name] for name in row if name not in differs} == {
        name: value for name, value in row.items() if name not in differs
    }
    assert list(status) == list(row)


def test_a_finding_has_what_the_database_knows(conn: Connection) -> None:
    insert_signal(conn)
    activate(conn)
    conn.execute("alter table public.signals disable trigger user")
    insert_signal(conn)
    (found,) = api.audit(conn, "public.signals").findings
    (expected,) = (
        conn.cursor(row_factory=dict_row)
        .execute(
            "select s.id, s.arbiter_xid::text::bigint as xid from public.signals s"
            " order by s.arbiter_xid desc limit 1"
        )
        .fetchall()
    )
    assert found == api.Finding(
        finding="contradiction",
        reason="wrong_environment",
        user_id=ADA,
        row_table="signals",
        row_key={"id": str(expected["id"])},
        source="local",
        machine_id=None,
        xid=expected["xid"],
        epoch=2,
        holder="cloud",
        holder_machine_id=ADAS_MACHINE,
    )


def test_an_audit_listens_only_while_it_runs(conn: Connection) -> None:
    heard: list[tuple[int, int]] = []
    api.audit(conn, "public.signals", on_progress=lambda *at: heard.append(at))
    before = list(heard)
    with pytest.raises(psycopg.Error):
        api.audit(conn, "public.positions", on_progress=lambda *at: heard.append(at))
    conn.execute("do $$ begin raise notice 'arbiter: audited 1 of 2 blocks'; end $$")
    assert heard == before
