"""The README's decision table end to end: real writes, as the roles that write.

A browser writes as ``authenticated`` with the user's claims, a machine as ``service_role``. The
periods are the real ones; time passes by ageing what the database noted, as its owner. A rejected
write is asserted whole: SQLSTATE, message, every field of DETAIL, hint, and that nothing changed.
Each write must get the answer that ``arbiter.status`` gave right before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from codes import BADGES, MESSAGES, SQLSTATES
from story import (
    SETTINGS,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    as_detail,
    backend,
    beat,
    browser,
    clock,
    detail_of,
    handovers,
    lease,
    one,
    rejection,
    rows,
    set_status,
    sign_in,
    status,
    value,
)

if TYPE_CHECKING:
    from conftest import Database, Templates

S = timedelta(seconds=1)
TIMEOUT = SETTINGS["heartbeat_timeout"]
GRACE = SETTINGS["stop_grace"]
DELAY = SETTINGS["error_takeover_delay"]
#: So much before a period has passed; a test does not take that long.
SHORTLY = 5 * S

HINTS = {
    "cloud_active": "Switch to monitoring, or stop the cloud machine to write from the browser.",
    "cooling_down": "Try again at retry_at, when its last writes can no longer be in flight.",
    "takeover_unconfirmed": "Ask the user, then call arbiter.confirm_takeover().",
    "not_holder": (
        "Stop trading, keep sending heartbeats, and write again once arbiter.status() names this"
        " machine."
    ),
}

NOT_RUNNING = (
    "Stop trading: the status of this machine means {}. It can get the lease once its status means"
    " running and it sends heartbeats."
)
NOT_FRESH = (
    "Stop trading: this machine has sent no heartbeat in time. Send heartbeats, and write again"
    " once arbiter.status() names this machine."
)
TOO_EARLY = "Too early: ask the user at retry_at, then call arbiter.confirm_takeover()."


@dataclass(frozen=True)
class Case:
    """What happened to the machine since it was healthy, and what a local write then gets."""

    id: str
    #: the status words that the app has set since, in order; DELETE: it deleted the row
    words: tuple[str, ...] = ()
    #: how long ago the last heartbeat was, it left running, it entered error
    heartbeat: timedelta | None = None
    left: timedelta | None = None
    error: timedelta | None = None
    #: settings that differ from the defaults
    settings: str | None = None
    #: the rejection's code, or the takeover's reason
    code: str | None = None
    reason: str | None = None
    #: which instants of the machine lead to retry_at: the latest of these
    retry: tuple[str, ...] = ()
    state: str = "running"


DELETE = "<deleted>"
STOPPED = {
    "stopped": ("stopping", "stopped"),
    "stopped at once": ("stopped",),
    "starting": ("stopping", "stopped", "starting"),
    "provisioning": ("stopped", "provisioning"),
    "deleted": (DELETE,),
    "stopping, deleted": ("stopping", DELETE),
}
STATE_OF = {
    "provisioning": "starting",
    "stopped at once": "stopped",
    "stopping, deleted": "deleted",
}
NO_CONFIRM = "error_takeover_confirm = false"

CASES = [
    Case("running, fresh", heartbeat=TIMEOUT - SHORTLY, code="cloud_active"),
    Case("running, stale", heartbeat=TIMEOUT, reason="heartbeat_lapsed"),
    Case(
        "stopping, fresh, left long ago",
        ("stopping",),
        heartbeat=TIMEOUT - SHORTLY,
        left=GRACE * 2,
        code="cooling_down",
        retry=("heartbeat", "left"),
        state="stopping",
    ),
    Case(
        "stopping, fresh, left just now",
        ("stopping",),
        heartbeat=TIMEOUT - SHORTLY,
        left=1 * S,
        code="cooling_down",
        retry=("heartbeat", "left"),
        state="stopping",
    ),
    Case(
        "stopping, stale, left just now",
        ("stopping",),
        heartbeat=TIMEOUT,
        left=GRACE - SHORTLY,
        code="cooling_down",
        retry=("heartbeat", "left"),
        state="stopping",
    ),
    Case(
        "stopping, stale, left long ago",
        ("stopping",),
        heartbeat=TIMEOUT,
        left=GRACE,
        reason="stop_stalled",
        state="stopping",
    ),
    *[
        Case(
            f"{name}, {when}",
            words,
            heartbeat=None if DELETE in words else heartbeat,
            left=left,
            code=code,
            reason=reason,
            retry=("left",) if code else (),
            state=STATE_OF.get(name, name),
        )
        for name, words in STOPPED.items()
        for when, heartbeat, left, code, reason in [
            ("too soon", 0 * S, GRACE - SHORTLY, "cooling_down", None),
            ("later", 0 * S, GRACE, None, "machine_stopped"),
            ("later, stale", TIMEOUT, GRACE, None, "machine_stopped"),
        ]
    ],
    *[
        Case(
            f"{', '.join(words)}, {when}, {how}",
            words,
            heartbeat=heartbeat,
            left=error,
            error=error,
            settings=settings,
            code=code,
            reason=reason,
            retry=("error",) if error < DELAY else (),
            state="starting" if words[-1] == "provisioning" else words[-1],
        )
        # Starting again does not end an error, and the first one counts.
        for words in (("error",), ("error", "provisioning"), ("error", "starting", "error"))
        for how, heartbeat in [("fresh", 0 * S), ("stale", TIMEOUT)]
        for when, error, settings, code, reason in [
            ("too early", DELAY - SHORTLY, None, "takeover_unconfirmed", None),
            ("unconfirmed", DELAY, None, "takeover_unconfirmed", None),
            ("too early, no yes needed", DELAY - SHORTLY, NO_CONFIRM, "takeover_unconfirmed", None),
            ("no yes needed", DELAY, NO_CONFIRM, None, "error_elapsed"),
        ]
    ],
]
REJECTED = [c for c in CASES if c.code]
ADMITTED = [c for c in CASES if c.reason]

HOLDS, DRAINS = "holds", "drains"


class Theatre:
    """A database with a connection for each role; every test brings a user of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.browser = db.connect(role="authenticated")
        self.backend = backend(db)


class Stage:
    """One user with browser and machine. ``how``: the machine holds, or the lease drains to it."""

    def __init__(self, theatre: Theatre) -> None:
        self.db = theatre.db
        self.owner = theatre.owner
        self.browser = theatre.browser
        self.backend = theatre.backend
        self.user = add_user(self.owner)
        sign_in(self.browser, self.user)

    def play(self, case: Case, how: str) -> str:
        """Bring a machine of the user to where the case begins."""
        if how == HOLDS:
            machine = activate(self.backend, self.user)
        else:
            machine = add_machine(self.backend, self.user, "running")
            beat(self.backend, machine)
            assert lease(self.owner, self.user).draining_to == machine
        if case.settings:
            self.owner.execute(f"update arbiter.settings set {case.settings}".encode())
        for word in case.words:
            if word == DELETE:
                self.backend.execute("delete from public.cloud_machines where id = %s", (machine,))
            else:
                set_status(self.backend, machine, word)
        age(
            self.owner,
            machine,
            heartbeat=case.heartbeat,
            left_running=case.left,
            entered_error=case.error,
        )
        return machine

    def retry_at(self, case: Case, machine: str) -> Any:
        """When the case's rejection ends, from what the database has noted."""
        at = one(
            self.owner,
            "select n.left_running_at as left, n.entered_error_at as error,"
            "       m.last_health_check as heartbeat"
            "  from (select) as one"
            "  left join arbiter.machine_notes n on n.machine_id = %s"
            "  left join public.cloud_machines m on m.id = %s",
            machine,
            machine,
        )
        ends = {"left": GRACE, "error": DELAY, "heartbeat": TIMEOUT}
        return max((getattr(at, name) + ends[name] for name in case.retry), default=None)

    def everything(self) -> Any:
        """What a rejected write or call must leave as it was, each row with its version."""
        params = {"user": self.user.id, "trader": str(self.user.trader)}
        return self.owner.execute(EVERYTHING, params).fetchall()


EVERYTHING = """
select t.xmin::text, t.ctid::text, t::text from arbiter.leases t where user_id = %(user)s
union all
select t.xmin::text, t.ctid::text, t::text from arbiter.handovers t where user_id = %(user)s
union all
select t.xmin::text, t.ctid::text, t::text from arbiter.machine_notes t where user_id = %(user)s
union all
select t.xmin::text, t.ctid::text, t::text from public.cloud_machines t
 where user_id::text = %(user)s
union all
select t.xmin::text, t.ctid::text, t::text from public.signals t where trader_id = %(trader)s::uuid
union all
select t.xmin::text, t.ctid::text, t::text from public.webhook_queue t
 where body ->> 'trader_id' = %(trader)s::text
order by 1, 2, 3
"""


@pytest.fixture(scope="module")
def theatre(templates: Templates) -> Iterator[Theatre]:
    with templates.clone("installed") as database:
        yield Theatre(database)


@pytest.fixture(scope="module")
def crowded_theatre(templates: Templates) -> Iterator[Theatre]:
    with templates.clone("installed") as database:
        found = Theatre(database)
        found.owner.execute(
            "alter table public.cloud_machines drop constraint cloud_machines_user_id_key"
        )
        yield found


@pytest.fixture
def stage(theatre: Theatre) -> Iterator[Stage]:
    yield Stage(theatre)
    theatre.owner.execute("update arbiter.settings set error_takeover_confirm = default")


@pytest.fixture
def crowded(crowded_theatre: Theatre) -> Stage:
    """Some apps let a user have more than one machine."""
    return Stage(crowded_theatre)


def ids(cases: list[Case]) -> list[str]:
    return [c.id for c in cases]


def what_the_machine_lacks(stage: Stage) -> str | None:
    """The hint for the user's only machine: its status, or a heartbeat; None if it has both."""
    machine = one(
        stage.owner,
        "select status, last_health_check > clock_timestamp() - %s as fresh"
        "  from public.cloud_machines where user_id = %s",
        TIMEOUT,
        stage.user.id,
    )
    if (state := STATE_OF.get(machine.status, machine.status)) != "running":
        return NOT_RUNNING.format(state)
    return None if machine.fresh else NOT_FRESH


def assert_rejected(
    stage: Stage,
    write: Callable[[], object],
    code: str,
    detail: dict[str, Any],
    hint: str | None = None,
) -> None:
    """That write must be rejected exactly so, and leave everything as it was."""
    before = stage.everything()
    error = rejection(write)
    sqlstate, message = SQLSTATES[code], MESSAGES[code]
    assert (error.sqlstate, error.diag.message_primary) == (sqlstate, message)
    assert detail_of(error) == {"code": code, "user_id": str(stage.user.id), **detail}
    if code == "not_holder" and hint is None:
        hint = what_the_machine_lacks(stage)
    assert error.diag.message_hint == (hint or HINTS[code])
    assert len((error.diag.context or "").splitlines()) <= 2
    assert stage.everything() == before


# A local write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", REJECTED, ids=ids(REJECTED))
def test_local_write_is_rejected(stage: Stage, case: Case, how: str) -> None:
    machine = stage.play(case, how)
    epoch = 2 if how == HOLDS else 1
    retry_at = stage.retry_at(case, machine)

    said = status(stage.browser)
    fresh = case.state != "deleted" and case.heartbeat is not None and case.heartbeat < TIMEOUT
    assert said["environment"] == ("cloud" if fresh else "none")
    assert said["can_write_local"] is False
    assert said["code"] == case.code
    assert said["message"] == BADGES[case.code]
    assert said["retry_at"] == retry_at
    assert (said["machine_id"], said["machine_state"]) == (machine, case.state)
    assert (said["epoch"], said["draining"]) == (epoch, how == DRAINS)
    assert said["poll_interval"] == 5 * S
    assert case.code is not None
    assert_rejected(
        stage,
        lambda: add_signal(stage.browser, stage.user.trader),
        case.code,
        {
            "holder": "cloud",
            "machine_id": str(machine),
            "epoch": epoch,
            "retry_at": as_detail(retry_at),
        },
        TOO_EARLY if case.code == "takeover_unconfirmed" and retry_at else None,
    )


@pytest.mark.parametrize("case", ADMITTED, ids=ids(ADMITTED))
def test_local_write_takes_over(stage: Stage, case: Case) -> None:
    machine = stage.play(case, HOLDS)
    said = status(stage.browser)
    assert said == {
        **said,
        "environment": "local",
        "can_write_local": True,
        "code": None,
        "message": "Browser mode",
        "retry_at": None,
        "machine_id": machine,
        "machine_state": case.state,
        "epoch": 2,
        "draining": False,
    }
    began = clock(stage.owner)
    signal = add_signal(stage.browser, stage.user.trader)

    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.machine_id, now.draining_to) == (3, "local", None, None)
    history = handovers(stage.owner, stage.user)
    assert [(h.epoch, h.reason) for h in history] == [
        (1, "registered"),
        (2, "activated"),
        (3, case.reason),
    ]
    last = history[-1]
    assert (last.from_holder, last.from_machine_id) == ("cloud", machine)
    assert (last.to_holder, last.to_machine_id) == ("local", None)
    assert last.xid == value(
        stage.owner, "select arbiter_xid from public.signals where id = %s", signal
    )
    assert last.exact is True
    assert began <= last.handed_over_at <= clock(stage.owner)
    assert now.held_since >= began
    # What the machine says of itself has not changed; who may write has.
    said = status(stage.browser)
    assert (said["environment"], said["epoch"], said["can_write_local"]) == ("local", 3, True)


@pytest.mark.parametrize("case", ADMITTED, ids=ids(ADMITTED))
def test_local_write_ends_a_drain_to_a_machine_that_is_not_entitled(
    stage: Stage, case: Case
) -> None:
    """The holder stays, so it is no handover."""
    stage.play(case, DRAINS)
    said = status(stage.browser)
    assert (said["environment"], said["can_write_local"], said["code"]) == ("local", True, None)
    assert (said["epoch"], said["draining"]) == (1, True)

    add_signal(stage.browser, stage.user.trader)

    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.draining_to, now.draining_since) == (1, "local", None, None)
    assert [h.reason for h in handovers(stage.owner, stage.user)] == ["registered"]
    assert status(stage.browser)["draining"] is False


def test_decision_is_of_its_own_instant(stage: Stage) -> None:
    """Not of the transaction's start: here the timeout passes in between."""
    machine = activate(stage.backend, stage.user)
    with stage.browser.transaction():
        value(stage.browser, "select now()")
        age(stage.owner, machine, heartbeat=TIMEOUT)
        assert status(stage.browser)["can_write_local"] is True
        add_signal(stage.browser, stage.user.trader)
    last = handovers(stage.owner, stage.user)[-1]
    assert last.reason == "heartbeat_lapsed"
    began = value(
        stage.owner,
        "select min(created_at) from public.signals where trader_id = %s",
        stage.user.trader,
    )
    assert began < last.handed_over_at


def test_first_local_write_creates_the_lease(stage: Stage) -> None:
    said = status(stage.browser)
    assert said == {
        "environment": "local",
        "can_write_local": True,
        "enforced": True,
        "code": None,
        "message": "Browser mode",
        "retry_at": None,
        "machine_id": None,
        "machine_state": None,
        "heartbeat_age": None,
        "epoch": None,
        "draining": False,
        "as_of": said["as_of"],
        "poll_interval": 5 * S,
    }
    signal = add_signal(stage.browser, stage.user.trader)
    add_signal(stage.browser, stage.user.trader)  # and a second one finds it

    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.machine_id) == (1, "local", None)
    (first,) = handovers(stage.owner, stage.user)
    assert (first.epoch, first.reason, first.to_holder) == (1, "first_write", "local")
    assert (first.from_holder, first.from_machine_id, first.to_machine_id) == (None, None, None)
    xid = value(stage.owner, "select arbiter_xid from public.signals where id = %s", signal)
    assert first.xid == xid
    assert status(stage.browser)["epoch"] == 1


@pytest.mark.parametrize(
    ("word", "badge"),
    [
        ("provisioning", "Cloud starting"),
        ("starting", "Cloud starting"),
        ("running", "Browser mode"),
        ("stopping", "Browser mode"),
        ("stopped", "Browser mode"),
        ("error", "Browser mode"),
    ],
)
def test_local_write_beside_a_machine_that_never_was_healthy(
    stage: Stage, word: str, badge: str
) -> None:
    machine = add_machine(stage.backend, stage.user, word)
    said = status(stage.browser)
    assert (said["environment"], said["code"], said["message"]) == ("local", None, badge)
    assert (said["machine_id"], said["epoch"]) == (machine, 1)

    add_signal(stage.browser, stage.user.trader)

    assert lease(stage.owner, stage.user).holder == "local"
    assert [h.reason for h in handovers(stage.owner, stage.user)] == ["registered"]


def test_status_says_how_old_the_heartbeat_is(stage: Stage) -> None:
    machine = activate(stage.backend, stage.user)
    age(stage.owner, machine, heartbeat=20 * S)
    beaten_at = value(
        stage.owner, "select last_health_check from public.cloud_machines where id = %s", machine
    )
    before, said, after = clock(stage.owner), status(stage.browser), clock(stage.owner)
    assert before <= said["as_of"] <= after
    assert said["as_of"] - said["heartbeat_age"] == beaten_at


# A cloud write -----------------------------------------------------------------------------------

CLOUD_CASES = [c for c in CASES if c.state != "deleted" and c.settings is None]
STALE = [c for c in CLOUD_CASES if c.heartbeat is not None and c.heartbeat >= TIMEOUT]
FRESH = [c for c in CLOUD_CASES if c not in STALE and not c.reason]
FRESH_BUT_LATE = [c for c in CLOUD_CASES if c not in STALE and c.reason]


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", STALE, ids=ids(STALE))
def test_cloud_write_of_a_stale_machine(stage: Stage, case: Case, how: str) -> None:
    machine = stage.play(case, how)
    assert status(stage.browser)["environment"] != "cloud"
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {
            "holder": "cloud",
            "machine_id": str(machine),
            "epoch": 2 if how == HOLDS else 1,
            "retry_at": None,
        },
    )


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", FRESH, ids=ids(FRESH))
def test_cloud_write_of_a_fresh_machine(stage: Stage, case: Case, how: str) -> None:
    """It is admitted in every status, and ends a drain."""
    machine = stage.play(case, how)
    assert status(stage.browser)["environment"] == "cloud"
    assert_cloud_writes(stage, machine, how)


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", FRESH_BUT_LATE, ids=ids(FRESH_BUT_LATE))
def test_cloud_write_before_a_takeover_that_is_possible(stage: Stage, case: Case, how: str) -> None:
    """A browser may take over now: the machine is rejected, fresh or not, even if none does."""
    machine = stage.play(case, how)
    assert status(stage.browser)["environment"] == "local"
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {
            "holder": "cloud",
            "machine_id": str(machine),
            "epoch": 2 if how == HOLDS else 1,
            "retry_at": None,
        },
    )


def assert_cloud_writes(stage: Stage, machine: str, how: str) -> None:
    signal = add_signal(stage.backend, stage.user.trader, "cloud", machine)
    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.machine_id, now.draining_to) == (2, "cloud", machine, None)
    last = handovers(stage.owner, stage.user)[-1]
    assert (last.epoch, last.reason, last.to_machine_id) == (2, "activated", machine)
    assert (last.from_holder, last.from_machine_id, last.to_holder) == ("local", None, "cloud")
    xid = value(stage.owner, "select arbiter_xid from public.signals where id = %s", signal)
    assert (last.xid == xid) is (how == DRAINS)


def test_cloud_write_after_a_takeover(stage: Stage) -> None:
    """The machine wakes up: rejected, until a heartbeat has given it the lease again."""
    machine = activate(stage.backend, stage.user)
    age(stage.owner, machine, heartbeat=TIMEOUT)
    add_signal(stage.browser, stage.user.trader)
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {"holder": "local", "machine_id": None, "epoch": 3, "retry_at": None},
    )
    beat(stage.backend, machine)
    add_signal(stage.backend, stage.user.trader, "cloud", machine)
    assert_rejected(
        stage,
        lambda: add_signal(stage.browser, stage.user.trader),
        "cloud_active",
        {"holder": "cloud", "machine_id": str(machine), "epoch": 4, "retry_at": None},
    )


@pytest.mark.parametrize("word", ["provisioning", "starting", "running", "stopped", "error"])
def test_cloud_write_by_a_machine_that_never_was_healthy(stage: Stage, word: str) -> None:
    machine = add_machine(stage.backend, stage.user, word)
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {"holder": "local", "machine_id": None, "epoch": 1, "retry_at": None},
    )


def test_cloud_write_without_a_lease(stage: Stage) -> None:
    machine = add_machine(stage.backend, stage.user, "running")
    stage.owner.execute("delete from arbiter.leases where user_id = %s", (stage.user.id,))
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {"holder": None, "machine_id": None, "epoch": None, "retry_at": None},
    )


def test_cloud_write_while_another_machine_holds(crowded: Stage) -> None:
    holder = activate(crowded.backend, crowded.user)
    other = add_machine(crowded.backend, crowded.user, "running")
    for _ in range(3):
        beat(crowded.backend, other)
    assert_rejected(
        crowded,
        lambda: add_signal(crowded.backend, crowded.user.trader, "cloud", other),
        "not_holder",
        {"holder": "cloud", "machine_id": str(holder), "epoch": 2, "retry_at": None},
        HINTS["not_holder"],
    )
    add_signal(crowded.backend, crowded.user.trader, "cloud", holder)


# Activation --------------------------------------------------------------------------------------


def write_registry(stage: Stage, assignment: str) -> None:
    statement = f"update public.cloud_machines set {assignment} where user_id = %s"
    assert stage.backend.execute(statement.encode(), (stage.user.id,)).rowcount == 1


@pytest.mark.parametrize(
    ("first", "healthy_write"),
    [
        ("running", "last_health_check = now()"),
        ("starting", "status = 'running', last_health_check = now()"),
        ("stopped", "status = 'running', last_health_check = now()"),
        ("error", "status = 'running', last_health_check = now()"),
    ],
)
def test_any_healthy_write_activates(stage: Stage, first: str, healthy_write: str) -> None:
    """The first healthy write marks the drain, the next registry write ends it."""
    machine = add_machine(stage.backend, stage.user, first)
    began = clock(stage.owner)
    write_registry(stage, healthy_write)
    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.machine_id, now.draining_to) == (1, "local", None, machine)
    assert began <= now.draining_since <= clock(stage.owner)
    assert status(stage.browser)["draining"] is True

    # Not a heartbeat; but it leaves the machine healthy.
    write_registry(stage, "region = 'ams'")
    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.machine_id, now.draining_to) == (2, "cloud", machine, None)
    last = handovers(stage.owner, stage.user)[-1]
    assert (last.reason, last.to_machine_id, last.exact) == ("activated", machine, True)


def test_status_alone_activates_when_the_heartbeat_is_fresh(stage: Stage) -> None:
    machine = add_machine(stage.backend, stage.user, "starting")
    beat(stage.backend, machine)
    assert lease(stage.owner, stage.user).draining_to is None
    set_status(stage.backend, machine, "running")
    assert lease(stage.owner, stage.user).draining_to == machine


def test_a_row_inserted_healthy_activates(stage: Stage) -> None:
    stage.backend.execute(
        "insert into public.cloud_machines (user_id, status, last_health_check)"
        " values (%s, 'running', now())",
        (stage.user.id,),
    )
    now = lease(stage.owner, stage.user)
    machine = value(
        stage.owner, "select id from public.cloud_machines where user_id = %s", stage.user.id
    )
    assert (now.holder, now.draining_to) == ("local", machine)


@pytest.mark.parametrize("word", ["provisioning", "starting", "stopping", "stopped", "error"])
def test_heartbeats_of_a_machine_that_does_not_run_activate_nothing(
    stage: Stage, word: str
) -> None:
    machine = add_machine(stage.backend, stage.user, word)
    beat(stage.backend, machine)
    beat(stage.backend, machine)
    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.draining_to) == (1, "local", None)


@pytest.mark.parametrize("heartbeat", [None, TIMEOUT], ids=["none", "stale"])
def test_running_without_a_fresh_heartbeat_is_not_healthy(
    stage: Stage, heartbeat: timedelta | None
) -> None:
    machine = add_machine(stage.backend, stage.user, "starting")
    if heartbeat:
        beat(stage.backend, machine)
        age(stage.owner, machine, heartbeat=heartbeat)
    set_status(stage.backend, machine, "running")
    write_registry(stage, "region = 'ams'")
    now = lease(stage.owner, stage.user)
    assert (now.epoch, now.holder, now.draining_to) == (1, "local", None)
    add_signal(stage.browser, stage.user.trader)


def test_heartbeats_of_the_holder_leave_the_lease_alone(stage: Stage) -> None:
    machine = activate(stage.backend, stage.user)
    version = "select xmin::text, xmax::text, ctid::text from arbiter.leases where user_id = %s"
    before = rows(stage.owner, version, stage.user.id)
    for _ in range(5):
        beat(stage.backend, machine)
    assert rows(stage.owner, version, stage.user.id) == before


#: What the incumbent does, and whether it is still entitled: it may write and a browser may not.
INCUMBENTS = [
    ("running, fresh", (), TIMEOUT - SHORTLY, None, None, True),
    ("running, stale", (), TIMEOUT, None, None, False),
    ("stopping, fresh", ("stopping",), 0 * S, GRACE, None, True),
    ("stopping, stale", ("stopping",), TIMEOUT, GRACE - SHORTLY, None, False),
    ("stopped, too soon", ("stopped",), 0 * S, GRACE - SHORTLY, None, True),
    ("stopped, too soon, stale", ("stopped",), TIMEOUT, GRACE - SHORTLY, None, False),
    ("stopped, later", ("stopped",), 0 * S, GRACE, None, False),
    ("deleted", (DELETE,), None, 0 * S, None, False),
    ("error, fresh", ("error",), 0 * S, DELAY, DELAY, True),
    ("error, stale", ("error",), TIMEOUT, DELAY, DELAY, False),
]


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize(
    ("words", "heartbeat", "left", "error", "entitled"),
    [i[1:] for i in INCUMBENTS],
    ids=[i[0] for i in INCUMBENTS],
)
def test_second_machine(
    crowded: Stage,
    words: tuple[str, ...],
    heartbeat: timedelta | None,
    left: timedelta | None,
    error: timedelta | None,
    entitled: bool,
    how: str,
) -> None:
    """It gets the lease exactly when the incumbent is not entitled any more."""
    first = crowded.play(Case("", words, heartbeat, left, error), how)
    second = add_machine(crowded.backend, crowded.user, "running")
    before = lease(crowded.owner, crowded.user)
    beat(crowded.backend, second)
    if entitled:
        beat(crowded.backend, second)
        assert lease(crowded.owner, crowded.user) == before
        return
    assert lease(crowded.owner, crowded.user).draining_to == second
    beat(crowded.backend, second)
    now = lease(crowded.owner, crowded.user)
    assert (now.holder, now.machine_id, now.draining_to) == ("cloud", second, None)
    last = handovers(crowded.owner, crowded.user)[-1]
    assert (last.epoch, last.reason, last.to_machine_id) == (now.epoch, "activated", second)
    assert last.from_machine_id == (first if how == HOLDS else None)


def test_holder_that_comes_back_during_a_drain_to_another_machine(crowded: Stage) -> None:
    """The other one has gone silent: the lease, which never left, stays. No handover."""
    first = activate(crowded.backend, crowded.user)
    age(crowded.owner, first, heartbeat=TIMEOUT)
    second = add_machine(crowded.backend, crowded.user, "running")
    beat(crowded.backend, second)
    assert lease(crowded.owner, crowded.user).draining_to == second
    age(crowded.owner, second, heartbeat=TIMEOUT)

    beat(crowded.backend, first)

    now = lease(crowded.owner, crowded.user)
    assert (now.epoch, now.machine_id, now.draining_to) == (2, first, None)
    add_signal(crowded.backend, crowded.user.trader, "cloud", first)
    assert [h.epoch for h in handovers(crowded.owner, crowded.user)] == [1, 2]


def test_one_users_machine_is_nothing_to_another(stage: Stage) -> None:
    other = add_user(stage.owner)
    activate(stage.backend, stage.user)
    add_signal(browser(stage.db, other), other.trader)
    assert lease(stage.owner, other).holder == "local"


# confirm_takeover --------------------------------------------------------------------------------


def confirm(conn: psycopg.Connection[Any], user_id: str | None = None) -> Any:
    return one(conn, "select * from arbiter.confirm_takeover(%s)", user_id)


CONFIRMABLE = [c for c in CASES if c.code == "takeover_unconfirmed" and not c.retry]
NOT_CONFIRMABLE = [c for c in CASES if c not in CONFIRMABLE]


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", CONFIRMABLE, ids=ids(CONFIRMABLE))
def test_confirm(stage: Stage, case: Case, how: str) -> None:
    machine = stage.play(case, how)
    said = confirm(stage.browser)

    now = lease(stage.owner, stage.user)
    assert (now.holder, now.machine_id, now.draining_to) == ("local", None, None)
    history = handovers(stage.owner, stage.user)
    if how == HOLDS:
        last = history[-1]
        assert (now.epoch, last.epoch, last.reason) == (3, 3, "confirmed")
        assert (last.from_holder, last.from_machine_id) == ("cloud", machine)
        assert (last.to_holder, last.to_machine_id, last.exact) == ("local", None, True)
    else:
        assert (now.epoch, len(history)) == (1, 1)
    word = value(stage.owner, "select status from public.cloud_machines where id = %s", machine)
    assert word == "stopped"
    assert (said.environment, said.can_write_local, said.code) == ("local", True, None)
    assert (said.machine_state, said.epoch, said.draining) == ("stopped", now.epoch, False)

    add_signal(stage.browser, stage.user.trader)
    assert lease(stage.owner, stage.user).epoch == now.epoch
    assert_rejected(
        stage,
        lambda: add_signal(stage.backend, stage.user.trader, "cloud", machine),
        "not_holder",
        {"holder": "local", "machine_id": None, "epoch": now.epoch, "retry_at": None},
    )
    # The yes is used up.
    assert rejection(confirm, stage.browser).sqlstate == "55000"


@pytest.mark.parametrize("how", [HOLDS, DRAINS])
@pytest.mark.parametrize("case", NOT_CONFIRMABLE, ids=ids(NOT_CONFIRMABLE))
def test_confirm_where_there_is_nothing_to_confirm(stage: Stage, case: Case, how: str) -> None:
    machine = stage.play(case, how)
    retry_at = stage.retry_at(case, machine)
    before = stage.everything()
    error = rejection(confirm, stage.browser)
    if case.code:
        said = (error.sqlstate, error.diag.message_primary)
        assert said == (SQLSTATES[case.code], MESSAGES[case.code])
    else:
        assert error.sqlstate == "55000"
    detail = {
        "code": case.code or "nothing_to_confirm",
        "user_id": str(stage.user.id),
        "holder": "cloud",
        "machine_id": str(machine),
        "epoch": 2 if how == HOLDS else 1,
        "retry_at": as_detail(retry_at),
    }
    assert detail_of(error) == detail
    assert error.diag.message_hint == (
        "The browser may write already."
        if case.reason
        else "Too early: the machine may recover; confirm at retry_at."
        if case.code == "takeover_unconfirmed"
        else "There is nothing to confirm: the machine is not in error."
    )
    assert stage.everything() == before


@pytest.mark.parametrize("has_lease", [False, True])
def test_confirm_without_a_machine(stage: Stage, has_lease: bool) -> None:
    if has_lease:
        add_signal(stage.browser, stage.user.trader)
    before = stage.everything()
    error = rejection(confirm, stage.browser)
    assert error.sqlstate == "55000"
    assert error.diag.message_hint == "The browser may write already."
    assert stage.everything() == before


def fail(stage: Stage, machine: str) -> None:
    set_status(stage.backend, machine, "error")
    age(stage.owner, machine, heartbeat=TIMEOUT, left_running=DELAY, entered_error=DELAY)


def recover(stage: Stage, machine: str) -> None:
    set_status(stage.backend, machine, "running")
    beat(stage.backend, machine)
    beat(stage.backend, machine)


def test_machine_that_recovers_makes_an_earlier_yes_void(stage: Stage) -> None:
    machine = activate(stage.backend, stage.user)
    fail(stage, machine)
    confirm(stage.browser)
    recover(stage, machine)
    assert lease(stage.owner, stage.user).machine_id == machine
    assert rejection(add_signal, stage.browser, stage.user.trader).sqlstate == "WX001"

    set_status(stage.backend, machine, "error")
    early = rejection(add_signal, stage.browser, stage.user.trader)
    assert (early.sqlstate, detail_of(early)["retry_at"] is None) == ("WX003", False)
    age(stage.owner, machine, left_running=DELAY, entered_error=DELAY)
    late = rejection(add_signal, stage.browser, stage.user.trader)
    assert (late.sqlstate, detail_of(late)["retry_at"]) == ("WX003", None)
    confirm(stage.browser)
    add_signal(stage.browser, stage.user.trader)
    reasons = [h.reason for h in handovers(stage.owner, stage.user)]
    assert reasons == ["registered", "activated", "confirmed", "activated", "confirmed"]


def test_delay_begins_anew_with_each_error(stage: Stage) -> None:
    """Without any yes in between."""
    machine = activate(stage.backend, stage.user)
    fail(stage, machine)
    recover(stage, machine)
    began = clock(stage.owner)
    set_status(stage.backend, machine, "error")
    said = status(stage.browser)
    assert said["code"] == "takeover_unconfirmed"
    assert began + DELAY <= said["retry_at"] <= clock(stage.owner) + DELAY
    # Said twice, it is still the same error.
    set_status(stage.backend, machine, "error")
    assert status(stage.browser)["retry_at"] == said["retry_at"]
    assert rejection(confirm, stage.browser).sqlstate == "WX003"


# Who may ask -------------------------------------------------------------------------------------

CALLS = ["arbiter.status", "arbiter.confirm_takeover"]


def call(conn: psycopg.Connection[Any], function: str, user_id: str | None = None) -> Any:
    return one(conn, f"select * from {function}(%s)", user_id)


@pytest.mark.parametrize("function", CALLS)
def test_browser_may_not_ask_about_another_user(stage: Stage, function: str) -> None:
    stage.play(CONFIRMABLE[0], HOLDS)
    before = stage.everything()
    other = browser(stage.db, add_user(stage.owner))
    error = rejection(call, other, function, stage.user.id)
    assert error.sqlstate == "42501"
    assert error.diag.message_primary == "arbiter: only a trusted role may ask about another user"
    assert error.diag.message_hint is not None
    visitor = stage.db.connect(role="anon")
    assert rejection(call, visitor, function, stage.user.id).sqlstate == "42501"
    assert stage.everything() == before


@pytest.mark.parametrize("function", CALLS)
def test_user_may_name_itself(stage: Stage, function: str) -> None:
    stage.play(CONFIRMABLE[0], HOLDS)
    assert call(stage.browser, function, stage.user.id).epoch is not None


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("who", ["service_role", "owner", "superuser"])
def test_trusted_role_may_name_a_user(stage: Stage, function: str, who: str) -> None:
    stage.play(CONFIRMABLE[0], HOLDS)
    conn = {
        "service_role": stage.backend,
        "owner": stage.owner,
        "superuser": stage.db.connect("postgres"),
    }[who]
    expected = {"arbiter.status": 2, "arbiter.confirm_takeover": 3}[function]
    assert call(conn, function, stage.user.id).epoch == expected


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("role", ["authenticated", "service_role"])
def test_a_question_without_a_user_is_an_error(stage: Stage, function: str, role: str) -> None:
    before = stage.everything()
    error = rejection(call, stage.db.connect(role=role), function)
    assert error.sqlstate == "22023"
    assert error.diag.message_primary == "arbiter: no user"
    hint = (
        "Pass p_user_id, or set request.jwt.claims with the claim of arbiter.settings.user_claim."
    )
    assert error.diag.message_hint == hint
    assert stage.everything() == before


def test_unknown_user_is_one_without_lease_or_machine(stage: Stage) -> None:
    said = status(stage.backend, str(uuid4()))
    assert (said["environment"], said["machine_id"], said["epoch"]) == ("local", None, None)
