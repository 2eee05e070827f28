"""The verdict as a table of cases: every row of the README's, on both sides of each boundary.

The function is pure: lease, machine, settings and the instant are its arguments, so each boundary
is hit to the microsecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
from story import one, value

if TYPE_CHECKING:
    from conftest import Templates

AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
US = timedelta(microseconds=1)
S = timedelta(seconds=1)
TIMEOUT = 30 * S
GRACE = 30 * S
DELAY = 120 * S

USER = str(UUID(int=0xADA))
MACHINE = str(UUID(int=0xC1))
OTHER = str(UUID(int=0xC2))

#: The leases by which MACHINE counts as the holder: it holds, or the lease drains to it.
DRAIN = {"draining_to": MACHINE, "draining_since": AT - S}
MACHINE_HOLDS: dict[str, dict[str, Any]] = {
    "holds": {"holder": "cloud", "machine_id": MACHINE},
    "drain from local": {"holder": "local", **DRAIN},
    "drain from another machine": {"holder": "cloud", "machine_id": OTHER, **DRAIN},
}
#: MACHINE holds, and the user has said yes to a takeover that waits for writes in flight.
DRAIN_TO_LOCAL = {"holder": "cloud", "machine_id": MACHINE, "draining_since": AT - S}

SETTINGS: dict[str, Any] = {
    "singleton": True,
    "heartbeat_timeout": TIMEOUT,
    "stop_grace": GRACE,
    "error_takeover_delay": DELAY,
    "error_takeover_confirm": True,
    "drain_timeout": 2 * S,
    "heartbeat_interval": 10 * S,
    "poll_interval": 5 * S,
}


@dataclass(frozen=True)
class Machine:
    """A machine, by how long ago things happened to it; None: never, as far as is known."""

    state: str | None
    heartbeat: timedelta | None = None
    left: timedelta | None = None
    error: timedelta | None = None

    def as_record(self) -> dict[str, Any]:
        return {
            "machine_id": MACHINE,
            "user_id": USER,
            "state": self.state,
            "heartbeat_at": _ago(self.heartbeat),
            "left_running_at": _ago(self.left),
            "entered_error_at": _ago(self.error),
        }


def _ago(ago: timedelta | None) -> datetime | None:
    return None if ago is None else AT - ago


@pytest.fixture(scope="module")
def conn(templates: Templates) -> Iterator[psycopg.Connection[Any]]:
    with templates.clone("installed") as database:
        yield database.connect()


def verdict(
    conn: psycopg.Connection[Any],
    source: str | None,
    machine_id: str | None,
    lease: dict[str, Any] | None,
    machine: Machine | None,
    settings: dict[str, Any] | None = None,
) -> Verdict:
    """Code, takeover, and how long after the instant retry_at is."""
    row = one(
        conn,
        """
        select v.code, v.takeover, v.retry_at
          from arbiter._verdict(%s, %s,
            jsonb_populate_record(null::arbiter.leases, %s::jsonb),
            jsonb_populate_record(null::arbiter.machine, %s::jsonb),
            jsonb_populate_record(null::arbiter.settings, %s::jsonb), %s) as v
        """,
        source,
        machine_id,
        _lease(lease),
        _record(machine.as_record() if machine else None),
        _record({**SETTINGS, **(settings or {})}),
        AT,
    )
    return row.code, row.takeover, row.retry_at and row.retry_at - AT


def _record(record: dict[str, Any] | None) -> str:
    """The record as JSON; an absent one is a record of nulls, which is what the callers pass."""
    return json.dumps(record or {}, default=str)


def _lease(lease: dict[str, Any] | None) -> str:
    """A lease as it stands in the table, which generates the claimant."""
    if lease is None:
        return _record(None)
    claimant = lease.get("draining_to" if lease.get("draining_since") else "machine_id")
    return _record(
        {"user_id": USER, "epoch": 7, "held_since": AT - DELAY, "claimant": claimant, **lease}
    )


# A local write -----------------------------------------------------------------------------------

Verdict = tuple[str | None, str | None, timedelta | None]
Cases = list[tuple[Machine, Verdict]]

ADMIT: Verdict = (None, None, None)
ACTIVE: Verdict = ("cloud_active", None, None)
UNCONFIRMED: Verdict = ("takeover_unconfirmed", None, None)


def cooling(retry_in: timedelta) -> Verdict:
    return ("cooling_down", None, retry_in)


def too_early(retry_in: timedelta) -> Verdict:
    return ("takeover_unconfirmed", None, retry_in)


def takeover(reason: str) -> Verdict:
    return (None, reason, None)


RUNNING: Cases = [
    (Machine("running", heartbeat=-US), ACTIVE),
    (Machine("running", heartbeat=0 * S), ACTIVE),
    (Machine("running", heartbeat=TIMEOUT - US), ACTIVE),
    (Machine("running", heartbeat=TIMEOUT), takeover("heartbeat_lapsed")),
    (Machine("running", heartbeat=TIMEOUT + US), takeover("heartbeat_lapsed")),
    (Machine("running"), takeover("heartbeat_lapsed")),
    # What it noted in an earlier life does not count while it runs.
    (Machine("running", heartbeat=TIMEOUT - US, left=99 * S, error=999 * S), ACTIVE),
    (Machine("running", heartbeat=TIMEOUT, left=0 * S, error=0 * S), takeover("heartbeat_lapsed")),
]

STOPPING: Cases = [
    # Fresh: rejected however long ago it left running; retry_at is when both have passed.
    (Machine("stopping", heartbeat=0 * S, left=5 * S), cooling(TIMEOUT)),
    (Machine("stopping", heartbeat=TIMEOUT - US, left=99 * S), cooling(US)),
    (Machine("stopping", heartbeat=TIMEOUT - US, left=0 * S), cooling(GRACE)),
    (Machine("stopping", heartbeat=10 * S, left=10 * S), cooling(20 * S)),
    # Stale: rejected while it left running less than stop_grace ago.
    (Machine("stopping", heartbeat=TIMEOUT, left=GRACE - US), cooling(US)),
    (Machine("stopping", heartbeat=TIMEOUT, left=GRACE), takeover("stop_stalled")),
    (Machine("stopping", heartbeat=TIMEOUT + US, left=GRACE + US), takeover("stop_stalled")),
    (Machine("stopping", heartbeat=None, left=GRACE - US), cooling(US)),
    (Machine("stopping", heartbeat=None, left=GRACE), takeover("stop_stalled")),
    # Never noted: this very moment.
    (Machine("stopping", heartbeat=99 * S, left=None), cooling(GRACE)),
    (Machine("stopping", heartbeat=None, left=None), cooling(GRACE)),
]

GONE: Cases = [
    (Machine(state, heartbeat=heartbeat, left=left), expected)
    for state in ("stopped", "starting", "deleted")
    for heartbeat, left, expected in [
        (TIMEOUT, 0 * S, cooling(GRACE)),
        (TIMEOUT, GRACE - US, cooling(US)),
        (TIMEOUT, GRACE, takeover("machine_stopped")),
        (TIMEOUT, GRACE + US, takeover("machine_stopped")),
        # It is not running, so its heartbeats do not count, and a missing one neither.
        (0 * S, GRACE - US, cooling(US)),
        (0 * S, GRACE, takeover("machine_stopped")),
        (None, GRACE - US, cooling(US)),
        (None, GRACE, takeover("machine_stopped")),
        (99 * S, None, cooling(GRACE)),
    ]
]

ERROR: Cases = [
    (Machine(state, heartbeat=heartbeat, left=left, error=error), expected)
    for state in ("error", "starting")
    for heartbeat, left in [(0 * S, 0 * S), (999 * S, 999 * S), (None, None)]
    for error, expected in [
        (0 * S, too_early(DELAY)),
        (DELAY - US, too_early(US)),
        (DELAY, UNCONFIRMED),
        (DELAY + US, UNCONFIRMED),
        (999 * S, UNCONFIRMED),
        (None, too_early(DELAY)),
    ]
    # One that starts out of an error has its instant; without one it starts after a stop (GONE).
    if (state, error) != ("starting", None)
]

# An unmapped state counts as running: unknown means possibly alive.
UNKNOWN: Cases = [
    (Machine(state, heartbeat=heartbeat, left=999 * S), expected)
    for state in (None, "hibernating")
    for heartbeat, expected in [
        (TIMEOUT - US, ACTIVE),
        (TIMEOUT, takeover("heartbeat_lapsed")),
    ]
]

# Noted before the clock was set back by more than the period: its time is over.
CLOCK_SET_BACK: Cases = [
    (Machine("running", heartbeat=-TIMEOUT + US), ACTIVE),
    (Machine("running", heartbeat=-TIMEOUT), takeover("heartbeat_lapsed")),
    (Machine("stopping", heartbeat=-TIMEOUT + US, left=99 * S), cooling(2 * TIMEOUT - US)),
    (Machine("stopping", heartbeat=-TIMEOUT, left=99 * S), takeover("stop_stalled")),
    (Machine("stopping", heartbeat=-TIMEOUT, left=5 * S), cooling(25 * S)),
    (Machine("stopped", heartbeat=None, left=-GRACE), cooling(2 * GRACE)),
    (Machine("stopped", heartbeat=None, left=-GRACE - US), takeover("machine_stopped")),
    (Machine("error", heartbeat=None, left=None, error=-DELAY), too_early(2 * DELAY)),
    (Machine("error", heartbeat=None, left=None, error=-DELAY - US), UNCONFIRMED),
]


@pytest.mark.parametrize("lease", MACHINE_HOLDS.values(), ids=MACHINE_HOLDS)
@pytest.mark.parametrize(
    ("machine", "expected"), RUNNING + STOPPING + GONE + ERROR + UNKNOWN + CLOCK_SET_BACK
)
def test_local_write_while_the_cloud_holds(
    conn: psycopg.Connection[Any],
    lease: dict[str, Any],
    machine: Machine,
    expected: Verdict,
) -> None:
    assert verdict(conn, "local", None, lease, machine) == expected


@pytest.mark.parametrize(
    "machine",
    [
        None,
        Machine("running", heartbeat=0 * S),
        Machine("error", heartbeat=0 * S, left=0 * S, error=0 * S),
        Machine("stopped", left=0 * S),
    ],
)
@pytest.mark.parametrize(
    "lease", [None, {"holder": "local"}, DRAIN_TO_LOCAL], ids=["no lease", "local", "to local"]
)
def test_local_write_while_no_machine_holds(
    conn: psycopg.Connection[Any], lease: dict[str, Any] | None, machine: Machine | None
) -> None:
    assert verdict(conn, "local", None, lease, machine) == ADMIT


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DELAY - US, too_early(US)),
        (DELAY, takeover("error_elapsed")),
        (DELAY + US, takeover("error_elapsed")),
        (None, too_early(DELAY)),
    ],
)
@pytest.mark.parametrize("lease", MACHINE_HOLDS.values(), ids=MACHINE_HOLDS)
def test_local_write_after_an_error_that_needs_no_confirmation(
    conn: psycopg.Connection[Any],
    lease: dict[str, Any],
    error: timedelta | None,
    expected: Verdict,
) -> None:
    machine = Machine("error", heartbeat=0 * S, left=error, error=error)
    settings = {"error_takeover_confirm": False}
    assert verdict(conn, "local", None, lease, machine, settings) == expected


# A cloud write -----------------------------------------------------------------------------------

NOT_HOLDER: Verdict = ("not_holder", None, None)
STATES = ["starting", "running", "stopping", "stopped", "error", "deleted", None]


@pytest.mark.parametrize(
    ("heartbeat", "expected"),
    [
        (-TIMEOUT, NOT_HOLDER),
        (-TIMEOUT + US, ADMIT),
        (-US, ADMIT),
        (0 * S, ADMIT),
        (TIMEOUT - US, ADMIT),
        (TIMEOUT, NOT_HOLDER),
        (TIMEOUT + US, NOT_HOLDER),
        (None, NOT_HOLDER),
    ],
)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("lease", MACHINE_HOLDS.values(), ids=MACHINE_HOLDS)
def test_cloud_write_of_the_holder(
    conn: psycopg.Connection[Any],
    lease: dict[str, Any],
    state: str | None,
    heartbeat: timedelta | None,
    expected: Verdict,
) -> None:
    """Its status does not count: signals in flight may complete during a stop."""
    machine = Machine(state, heartbeat=heartbeat, left=0 * S, error=0 * S)
    assert verdict(conn, "cloud", MACHINE, lease, machine) == expected


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("lease", MACHINE_HOLDS.values(), ids=MACHINE_HOLDS)
def test_cloud_write_of_the_holder_after_a_takeover_became_possible(
    conn: psycopg.Connection[Any], lease: dict[str, Any], state: str | None
) -> None:
    """Fresh or not, it is rejected from then on: at no instant are both admitted."""
    machine = Machine(state, heartbeat=TIMEOUT - US, left=999 * S, error=999 * S)
    _, takeover, _ = verdict(conn, "local", None, lease, machine)
    assert (takeover is not None) is (state in ("stopped", "deleted"))
    rejected = ("not_holder", None, None)
    assert verdict(conn, "cloud", MACHINE, lease, machine) == (rejected if takeover else ADMIT)


@pytest.mark.parametrize(
    ("writer", "lease"),
    [
        (MACHINE, None),
        (MACHINE, {"holder": "local"}),
        (MACHINE, {"holder": "cloud", "machine_id": OTHER}),
        (MACHINE, {"holder": "local", **DRAIN, "draining_to": OTHER}),
        (MACHINE, {"holder": "cloud", "machine_id": MACHINE, **DRAIN, "draining_to": OTHER}),
        (MACHINE, DRAIN_TO_LOCAL),
        # A null machine does not match the null of a lease without a machine.
        (None, None),
        (None, {"holder": "local"}),
        (None, DRAIN_TO_LOCAL),
        (None, {"holder": "cloud", "machine_id": MACHINE}),
    ],
)
def test_cloud_write_of_another_machine(
    conn: psycopg.Connection[Any], writer: str | None, lease: dict[str, Any] | None
) -> None:
    """It is rejected even when the verdict is given a healthy machine."""
    healthy = Machine("running", heartbeat=0 * S)
    assert verdict(conn, "cloud", writer, lease, healthy) == NOT_HOLDER


# The settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({"heartbeat_timeout": S}, Machine("running", heartbeat=S - US), ACTIVE),
        ({"heartbeat_timeout": S}, Machine("running", heartbeat=S), takeover("heartbeat_lapsed")),
        ({"heartbeat_timeout": S}, Machine("stopping", heartbeat=S, left=0 * S), cooling(GRACE)),
        ({"heartbeat_timeout": 60 * S}, Machine("stopping", 0 * S, left=0 * S), cooling(60 * S)),
        ({"stop_grace": S}, Machine("stopping", heartbeat=TIMEOUT, left=S - US), cooling(US)),
        ({"stop_grace": S}, Machine("stopping", TIMEOUT, left=S), takeover("stop_stalled")),
        ({"stop_grace": S}, Machine("stopped", left=S - US), cooling(US)),
        ({"stop_grace": S}, Machine("stopped", left=S), takeover("machine_stopped")),
        ({"error_takeover_delay": S}, Machine("error", error=S - US), too_early(US)),
        ({"error_takeover_delay": S}, Machine("error", error=S), UNCONFIRMED),
    ],
)
def test_each_period_is_the_settings_own(
    conn: psycopg.Connection[Any],
    settings: dict[str, Any],
    machine: Machine,
    expected: Verdict,
) -> None:
    assert verdict(conn, "local", None, MACHINE_HOLDS["holds"], machine, settings) == expected


def test_timeout_of_a_cloud_write_is_the_settings_own(conn: psycopg.Connection[Any]) -> None:
    found = {
        ago: verdict(
            conn,
            "cloud",
            MACHINE,
            MACHINE_HOLDS["holds"],
            Machine("running", heartbeat=ago),
            {"heartbeat_timeout": S},
        )
        for ago in (S - US, S)
    }
    assert found == {S - US: ADMIT, S: NOT_HOLDER}


# Words and purity --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "state"),
    [
        *[(word, "starting") for word in ("provisioning", "starting")],
        *[(word, "running") for word in ("running", "active", "started")],
        *[(word, "stopping") for word in ("stopping", "deprovisioning")],
        *[(word, "stopped") for word in ("stopped", "deleted", "suspended")],
        *[(word, "error") for word in ("error", "failed")],
        *[(word, "running") for word in ("hibernating", "Stopped", " stopped", "", None)],
    ],
)
def test_word_of_the_registry_means_a_state(
    conn: psycopg.Connection[Any], word: str | None, state: str
) -> None:
    """An unmapped word counts as running."""
    expression = value(
        conn, "select arbiter._state_expression(r, 'm') from arbiter.registry r where r.singleton"
    )
    assert value(conn, f"select {expression} from (select %s::text as status) m", word) == state


def test_verdict_is_pure(conn: psycopg.Connection[Any]) -> None:
    """Declared so, and it says the same when no table has a row."""
    declared = "select array_agg(distinct provolatile::text) from pg_proc where oid = any (%s)"
    functions = ["arbiter._verdict", "arbiter._is_fresh"]
    oids = [value(conn, "select %s::regproc::oid", function) for function in functions]
    assert value(conn, declared, oids) == ["i"]

    machine = Machine("stopping", heartbeat=TIMEOUT, left=GRACE - US)
    with conn.transaction(force_rollback=True):
        conn.execute("alter table arbiter.settings rename to settings_of_before")
        conn.execute("alter table arbiter.machine_notes rename to machine_notes_of_before")
        conn.execute("alter view arbiter.machines rename to machines_of_before")
        found = one(
            conn,
            """
            select v.code, v.retry_at
              from arbiter._verdict('local', null,
                jsonb_populate_record(null::arbiter.leases, %s::jsonb),
                jsonb_populate_record(null::arbiter.machine, %s::jsonb),
                jsonb_populate_record(null::arbiter.settings_of_before, %s::jsonb), %s) as v
            """,
            _lease(MACHINE_HOLDS["holds"]),
            _record(machine.as_record()),
            _record(SETTINGS),
            AT,
        )
        assert found == ("cooling_down", AT + US)
