"""doctor(): what is attached against what should be, and statements that mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from psycopg.rows import namedtuple_row

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

#: Advice about the app's own schema, which a fresh installation has, too.
ADVICE = {
    "triggers of service_role on public.cloud_machines": "foreign",
}


class Damage(NamedTuple):
    """What is done to an installation, and what the doctor must say of it."""

    ddl: str
    object: str
    state: str
    mendable: bool = True


GUARD = "trigger arbiter_guard_insert on public.signals"
DAMAGES = {
    "guard dropped": Damage(
        "drop trigger arbiter_guard_insert on public.signals", GUARD, "missing"
    ),
    "guard disabled": Damage(
        "alter table public.signals disable trigger arbiter_guard_insert", GUARD, "disabled"
    ),
    "guard not always": Damage(
        "alter table public.signals enable trigger arbiter_guard_insert", GUARD, "disabled"
    ),
    "guard replaced": Damage(
        """
        create or replace trigger arbiter_guard_insert after delete on public.signals
          for each statement execute function arbiter._guard_1();
        alter table public.signals enable always trigger arbiter_guard_insert;
        """,
        GUARD,
        "outdated",
    ),
    "guard of another": Damage(
        """
        create or replace trigger arbiter_guard_insert after insert on public.signals
          for each row execute function public.tg_queue_webhook();
        """,
        GUARD,
        "foreign",
    ),
    "stamp dropped": Damage(
        "drop trigger arbiter_stamp_update on public.cloud_machines",
        "trigger arbiter_stamp_update on public.cloud_machines",
        "missing",
    ),
    "heartbeat indexed": Damage(
        "create index hot on public.cloud_machines (id) where last_health_check is not null",
        "index public.hot",
        "foreign",
    ),
    "owners swapped": Damage(
        """
        create table public.owners (id uuid primary key, user_id uuid);
        alter table public.signals drop constraint signals_trader_id_fkey,
          add constraint signals_trader_id_fkey
          foreign key (trader_id) references public.owners (id);
        """,
        "protection of public.signals",
        "outdated",
    ),
    "machine column renamed": Damage(
        "alter table public.signals rename machine_id to fly_app_id",
        "protection of public.signals",
        "outdated",
        mendable=False,
    ),
    "status column renamed": Damage(
        "alter table public.cloud_machines rename status to word",
        "registry public.cloud_machines",
        "outdated",
        mendable=False,
    ),
    "history opened": Damage(
        "alter table arbiter.handovers disable trigger arbiter_append_only",
        "trigger arbiter_append_only on arbiter.handovers",
        "disabled",
    ),
    "constraint not validated": Damage(
        """
        alter table public.signals drop constraint arbiter_source_check,
          add constraint arbiter_source_check check (source in ('local', 'cloud')) not valid
        """,
        "alter table public.signals",
        "outdated",
    ),
}


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


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_found_and_its_remedy_mends_it(db: Database, name: str) -> None:
    damage = DAMAGES[name]
    owner = db.connect()
    if name == "guard of another":
        owner.execute(
            "create function public.tg_queue_webhook() returns trigger language plpgsql"
            " as $$ begin return null; end $$"
        )
        owner.execute("drop trigger arbiter_guard_insert on public.signals")
    owner.execute(damage.ddl.encode())

    row = findings(owner)[damage.object]
    assert row.state == damage.state, row

    if damage.mendable:
        owner.execute(row.remedy.encode())
        assert {n: r.state for n, r in findings(owner).items() if r.state != "ok"} == ADVICE
    else:
        assert "again" in row.remedy or "names" in row.remedy


def test_advice_can_be_followed(db: Database) -> None:
    owner = db.connect()
    for row in findings(owner).values():
        if row.state != "ok":
            owner.execute(row.remedy.encode())
    assert [r for r in findings(owner).values() if r.state != "ok"] == []


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
