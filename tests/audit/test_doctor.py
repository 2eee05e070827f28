"""doctor(): who may ask, what a fresh installation gets; test_doctor_states has each check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import namedtuple_row

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: Advice about the app's own schema, which a fresh installation has, too.
ADVICE = {"updates of public.signals": "note"}


GUARD = "trigger arbiter_guard_insert on public.signals"


def findings(conn: Conn) -> dict[str, Any]:
    with conn.cursor(row_factory=namedtuple_row) as cur:
        rows: list[Any] = cur.execute("select * from arbiter.doctor()").fetchall()
    for row in rows:
        assert (row.state == "ok") is (row.problem is None) is (row.remedy is None), row
    return {row.object: row for row in rows}


def test_a_fresh_installation_is_well(db: Database) -> None:
    found = findings(db.connect())
    assert {name: row.state for name, row in found.items() if row.state != "ok"} == ADVICE
    assert found[GUARD].state == "ok"
    assert found["registry public.cloud_machines"].state == "ok"


def test_advice_can_be_followed(db: Database) -> None:
    owner = db.connect()
    owner.execute("grant trigger on public.cloud_machines to service_role, anon")
    assert [row.state for row in findings(owner).values() if row.state != "ok"] == ["note"] * 2
    for row in findings(owner).values():
        if row.state != "ok":
            owner.execute(row.remedy.encode())
    assert [r for r in findings(owner).values() if r.state != "ok"] == []


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        ("select 1", True),
        ("revoke update on public.signals from authenticated", False),
        ("drop policy signals_change on public.signals", False),
        (
            "revoke update on public.signals from authenticated;"
            " grant update (signal) on public.signals to anon;"
            " alter policy signals_change on public.signals to public",
            True,
        ),
        ("alter policy signals_change on public.signals to service_role", False),
        (
            "drop policy signals_change on public.signals;"
            " alter table public.signals disable row level security",
            True,
        ),
        ("select arbiter.protect('public.signals', p_verbs => '{insert,update}')", False),
    ],
)
def test_updates_by_browsers_are_noted(db: Database, change: str, noted: bool) -> None:
    """Where only inserts are arbitrated, and browsers may update at all."""
    owner = db.connect()
    owner.execute(change.encode())
    row = findings(owner).get("updates of public.signals")
    assert (row is not None) is noted
    if row is not None:
        assert "'{insert,update}'" in row.remedy


def test_a_partition_that_came_later_is_found(db: Database) -> None:
    owner = db.connect()
    owner.execute(
        """
        create table public.ticks (user_id uuid not null, day integer not null)
          partition by range (day);
        create table public.ticks_a partition of public.ticks for values from (0) to (10);
        select arbiter.protect('public.ticks');
        alter table public.ticks validate constraint arbiter_source_check;
        create table public.ticks_b partition of public.ticks for values from (10) to (20);
        """
    )
    row = findings(owner)["trigger arbiter_guard_insert on public.ticks_b"]
    assert row.state == "missing"
    owner.execute(row.remedy.encode())
    assert {n: r.state for n, r in findings(owner).items() if r.state != "ok"} == ADVICE


def test_a_database_without_a_registry(bare_db: Database) -> None:
    arbiter_db.install(bare_db.conninfo())
    assert findings(bare_db.connect())["registry"].state == "missing"


def test_only_the_owner_may_ask(db: Database) -> None:
    conn = db.connect(role="authenticated")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select * from arbiter.doctor()")
