"""Arbiter's promises once more in Python: the model that test_model.py compares it with.

Written from the decision tables and the lease protocol, not from the SQL. Everything here is a
value: an operation takes a world and the instant, and returns the world afterwards, or raises
``Rejected`` and has changed nothing. A machine of ``None`` is the browser: it stands for ``local``.

Sessions. A ``Tx`` is what one open transaction has done and no other sees yet. At most one is
open beside the operation at hand, the ``rival``: what it has locked is in the way. Each operation
sees what is committed at its start.

Left out, because other tests cover it: roles, snapshots that are older than their statement, a
registry write that stays uncommitted, partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import codes

__all__ = [
    "FORGED",
    "NOBODY",
    "OPEN",
    "SQLSTATES",
    "STATES",
    "Change",
    "Handover",
    "Lease",
    "Machine",
    "Note",
    "Protection",
    "Rejected",
    "Row",
    "Settings",
    "Tx",
    "Verdict",
    "World",
    "audit",
    "beat",
    "commit",
    "confirm",
    "insert",
    "judge",
    "machines_of",
    "may_show",
    "pass_time",
    "put_machine",
    "register",
    "source_of",
    "stamp",
    "status",
    "update",
]

#: The default meaning of the registry's status words; any other word means running.
STATES: Mapping[str, str] = {
    "provisioning": "starting",
    "starting": "starting",
    "running": "running",
    "active": "running",
    "started": "running",
    "stopping": "stopping",
    "deprovisioning": "stopping",
    "stopped": "stopped",
    "deleted": "stopped",
    "suspended": "stopped",
    "error": "error",
    "failed": "error",
}

SQLSTATES: Mapping[str, str] = {
    **codes.SQLSTATES,
    # Not arbiter's codes, but the server's conditions in the same place.
    "check_violation": "23514",
    "not_protected": "42704",
    "nothing_to_confirm": "55000",
    "unknown_machine": "P0002",
    "foreign_key_violation": "23503",
}

Blocker = Literal["self", "rival"]


@dataclass(frozen=True)
class Settings:
    """``arbiter.settings``, as far as decisions depend on it."""

    heartbeat_timeout: timedelta
    stop_grace: timedelta
    error_takeover_delay: timedelta
    error_takeover_confirm: bool


@dataclass(frozen=True)
class Machine:
    """A row of the registry."""

    user: str | None
    word: str
    heartbeat: datetime | None = None


@dataclass(frozen=True)
class Note:
    """When the database saw a user's machine leave running, or enter error."""

    left_running: datetime | None = None
    entered_error: datetime | None = None


@dataclass(frozen=True)
class Lease:
    """Who may write: the machine, or the browser (None). Draining, the next one may."""

    epoch: int = 1
    machine: str | None = None
    draining: bool = False
    draining_to: str | None = None

    @property
    def claimant(self) -> str | None:
        """The machine that the lease is for; None: the browser."""
        return self.draining_to if self.draining else self.machine


@dataclass(frozen=True)
class Handover:
    """An entry of the history: who holds from then on.

    ``at`` is when it happened; its snapshot is as old as that if it is ``exact``, which it is not
    at repeatable read.
    """

    epoch: int
    machine: str | None
    reason: str
    at: datetime
    exact: bool = True


@dataclass(frozen=True)
class Protection:
    """How a table is guarded."""

    verbs: tuple[str, ...] = ("insert",)
    mode: str = "enforce"
    unowned: str = "reject"

    @property
    def updates(self) -> bool:
        """Whether each update says who writes."""
        return "update" in self.verbs


OPEN = datetime.max.replace(tzinfo=UTC)
FORGED = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Row:
    """A row of a protected table.

    ``written`` and ``begun`` stand for its ``arbiter_xid``: when that transaction was committed
    and when it began. None: it has none. ``FORGED``: that of a transaction before everything else.
    ``OPEN``: not committed yet.
    """

    table: str
    user: str | None
    source: str
    machine: str | None
    written: datetime | None = OPEN
    begun: datetime = FORGED


@dataclass(frozen=True)
class World:
    """Everything that is committed."""

    settings: Settings
    #: without an entry: the table is not protected
    protections: Mapping[str, Protection]
    #: tables whose machine column is a foreign key to the registry, on delete set null
    keyed: frozenset[str]
    states: Mapping[str, str] = field(default_factory=lambda: STATES)
    machines: Mapping[str, Machine] = field(default_factory=dict)
    notes: Mapping[tuple[str, str], Note] = field(default_factory=dict)
    leases: Mapping[str, Lease] = field(default_factory=dict)
    handovers: Mapping[str, tuple[Handover, ...]] = field(default_factory=dict)
    rows: Mapping[int, Row] = field(default_factory=dict)
    observed: tuple[str, ...] = ()

    def state(self, user: str, machine: str) -> str:
        """The machine's state, deleted when this user has none such."""
        known = self.machines.get(machine)
        return self.meaning(known.word) if known and known.user == user else "deleted"

    def meaning(self, word: str) -> str:
        """The state that a status word means: unknown means possibly alive."""
        return self.states.get(word, "running")

    def is_fresh(self, machine: str | None, now: datetime) -> bool:
        """Whether its last heartbeat is younger than the timeout, and no further in the future."""
        known = self.machines.get(machine) if machine else None
        heartbeat = known.heartbeat if known else None
        return heartbeat is not None and abs(now - heartbeat) < self.settings.heartbeat_timeout


@dataclass(frozen=True)
class Tx:
    """The locks and the changes of an open transaction; ``exact`` at read committed."""

    begun: datetime = FORGED
    exact: bool = True

    #: leases it writes under, which cannot change hands before it ends
    shared: frozenset[str] = frozenset()
    #: leases it has changed, which no other transaction can use before it ends
    leases: Mapping[str, Lease] = field(default_factory=dict)
    handovers: Mapping[str, tuple[Handover, ...]] = field(default_factory=dict)
    rows: Mapping[int, Row] = field(default_factory=dict)
    observed: tuple[str, ...] = ()

    def sees(self, world: World) -> World:
        """The world as this transaction sees it."""
        return replace(
            world,
            leases={**world.leases, **self.leases},
            handovers={**world.handovers, **self.handovers},
            rows={**world.rows, **self.rows},
            observed=world.observed + self.observed,
        )


#: A transaction that has done nothing yet; also the rival when there is none.
NOBODY = Tx()


class Rejected(Exception):
    """The rejection of an operation, with what DETAIL says (None where it says nothing)."""

    def __init__(
        self,
        code: str,
        user: str | None = None,
        lease: Lease | None = None,
        retry_at: datetime | None = None,
        **more: Any,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.retry_at = retry_at
        self.blockers: tuple[Blocker, ...] = more.pop("blockers", ())
        self.detail: dict[str, Any] = {
            "code": code,
            "user_id": user,
            "holder": lease and source_of(lease.claimant),
            "machine_id": lease and lease.claimant,
            "epoch": lease and lease.epoch,
            **more,
        }


def source_of(machine: str | None) -> str:
    """The environment."""
    return "local" if machine is None else "cloud"


def machines_of(world: World, user: str) -> list[str]:
    """The machines that the registry has of a user."""
    return [name for name, machine in world.machines.items() if machine.user == user]


# The verdict -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A rejection's code and when to try again, or why the lease goes to the browser first."""

    code: str | None = None
    retry_at: datetime | None = None
    takeover: str | None = None


ADMITTED = Verdict()


def judge(world: World, user: str, machine: str | None, now: datetime) -> Verdict:
    """What a write of the browser (None) or of a machine gets: the README's decision table."""
    lease = world.leases.get(user)
    claimant = lease.claimant if lease else None
    browser = ADMITTED if claimant is None else _judge_browser(world, user, claimant, now)
    if machine is None:
        return browser
    # Its status does not count until a takeover is possible: signals in flight may complete.
    entitled = (
        machine == claimant
        and world.state(user, machine) != "deleted"
        and world.is_fresh(machine, now)
        and browser.takeover is None
    )
    return ADMITTED if entitled else Verdict("not_holder")


def _judge_browser(world: World, user: str, machine: str, now: datetime) -> Verdict:
    rules = world.settings
    state = world.state(user, machine)
    note = world.notes.get((user, machine), Note())
    grace = _end(note.left_running, rules.stop_grace, now)
    fresh = state != "deleted" and world.is_fresh(machine, now)
    if state == "running":
        return Verdict("cloud_active") if fresh else Verdict(takeover="heartbeat_lapsed")
    if state == "stopping":
        heartbeat = world.machines[machine].heartbeat
        if heartbeat is not None and fresh:
            grace = max(grace, heartbeat + rules.heartbeat_timeout)
        return Verdict("cooling_down", grace) if now < grace else Verdict(takeover="stop_stalled")
    if state == "error" or (state == "starting" and note.entered_error is not None):
        delay = _end(note.entered_error, rules.error_takeover_delay, now)
        if now < delay:
            return Verdict("takeover_unconfirmed", delay)
        if rules.error_takeover_confirm:
            return Verdict("takeover_unconfirmed")
        return Verdict(takeover="error_elapsed")
    # Stopped, starting again (not out of an error), or deleted.
    return Verdict("cooling_down", grace) if now < grace else Verdict(takeover="machine_stopped")


def _end(noted: datetime | None, period: timedelta, now: datetime) -> datetime:
    # Further in the future than its period: noted before the clock was set back, and over.
    return now if noted and noted - period > now else (noted or now) + period


def may_show(world: World, user: str) -> set[str | None]:
    """The machines that ``arbiter.status`` may name: more than one when their heartbeats tie."""
    lease = world.leases.get(user)
    if lease and lease.claimant is not None:
        return {lease.claimant}
    beats = {name: world.machines[name].heartbeat for name in machines_of(world, user)}
    latest = max((instant for instant in beats.values() if instant), default=None)
    return {name for name, instant in beats.items() if instant == latest} or {None}


def status(world: World, user: str, shown: str | None, now: datetime) -> dict[str, Any]:
    """The columns of ``arbiter.status`` when it names that machine, but for those of the clock."""
    lease = world.leases.get(user)
    claimant = lease.claimant if lease else None
    browser = judge(world, user, None, now)
    state = world.state(user, shown) if shown else None
    enforced = any(one.mode == "enforce" for one in world.protections.values())
    if not enforced:
        browser, environment, message = Verdict(), "local", codes.WATCHING
    elif browser.code is None:
        environment = "local"
        starting = claimant is None and state == "starting"
        message = "Cloud starting" if starting else codes.BADGES[None]
    else:
        environment = "cloud" if judge(world, user, claimant, now).code is None else "none"
        message = codes.BADGES[browser.code]
    heartbeat = world.machines[shown].heartbeat if shown and state != "deleted" else None
    return {
        "environment": environment,
        "can_write_local": browser.code is None,
        "enforced": enforced,
        "code": browser.code,
        "message": message,
        "retry_at": browser.retry_at,
        "machine_id": shown,
        "machine_state": state,
        "heartbeat_age": now - heartbeat if heartbeat else None,
        "epoch": lease.epoch if lease else None,
        "draining": lease is not None and lease.draining,
    }


# Writes ------------------------------------------------------------------------------------------


def commit(world: World, tx: Tx, now: datetime) -> World:
    """The world once the transaction has ended."""
    rows = {
        key: replace(row, written=now, begun=tx.begun) if row.written == OPEN else row
        for key, row in tx.rows.items()
    }
    return replace(tx, rows=rows).sees(world)


#: How the guard groups a statement's rows: user, environment, machine, forged.
Claim = tuple[str | None, str, str | None, bool]


def insert(
    world: World, tx: Tx, rival: Tx, table: str, rows: Mapping[int, Row], now: datetime
) -> Tx:
    """One statement that inserts rows, by key."""
    for row in rows.values():
        if table in world.keyed and row.machine and row.machine not in world.machines:
            raise Rejected("foreign_key_violation")
    protection = world.protections.get(table)
    if protection is None:
        rows = {key: replace(row, written=None) for key, row in rows.items()}
    else:
        tx = _arbitrate(world, tx, rival, protection, rows.values(), now)
    return replace(tx, rows={**tx.rows, **rows})


@dataclass(frozen=True)
class Change:
    """What an update sets: another user, who writes, or arbiter_xid. Else: some other column."""

    user: str | None = None
    forges: bool = False
    claims: bool = False
    machine: str | None = None
    source: str = ""

    def of(self, row: Row) -> Row:
        """The row afterwards."""
        if self.user is not None:
            row = replace(row, user=self.user)
        if self.forges:
            row = replace(row, written=FORGED)
        return replace(row, source=self.source, machine=self.machine) if self.claims else row


def update(
    world: World, tx: Tx, rival: Tx, keys: Iterable[int], change: Change, now: datetime
) -> Tx:
    """One statement that updates rows of one table."""
    seen = tx.sees(world)
    old = {key: seen.rows[key] for key in keys}
    new = {key: change.of(row) for key, row in old.items()}
    (table,) = {row.table for row in old.values()}
    protection = world.protections.get(table)
    for key, row in new.items():
        known = row.machine is None or row.machine in world.machines
        if table in world.keyed and not known and row.machine != old[key].machine:
            raise Rejected("foreign_key_violation")
        if protection:
            tx = _keep_provenance(world, tx, protection, old[key], row)
            if protection.updates:  # looked at before the update and after it
                tx = _keep_provenance(world, tx, protection, old[key], row)
    if protection and protection.updates:
        # A row whose machine has gone gets no writer.
        writes = {
            key: replace(row, written=OPEN)
            for key, row in new.items()
            if (row.source, row.machine) != ("cloud", None)
        }
        tx = _arbitrate(world, tx, rival, protection, writes.values(), now)
        new |= writes
    return replace(tx, rows={**tx.rows, **new})


def _keep_provenance(world: World, tx: Tx, protection: Protection, old: Row, new: Row) -> Tx:
    machine_gone = (
        (new.source, new.machine) == (old.source, None)
        and old.machine is not None
        and old.machine not in world.machines
    )
    claim_changed = (
        new.source != old.source
        or (new.machine != old.machine and not machine_gone)
        or new.written != old.written
    )
    if new.user != old.user or (claim_changed and not protection.updates):
        return _reject(tx, protection, Rejected("provenance_immutable", old.user))
    if protection.updates and (new.source, new.machine) == ("cloud", None) and not machine_gone:
        return _reject(
            tx, protection, Rejected("wrong_identity", old.user, source="cloud", machine_id=None)
        )
    return tx


def _reject(tx: Tx, protection: Protection, rejection: Rejected) -> Tx:
    if protection.mode == "enforce":
        raise rejection
    return replace(tx, observed=(*tx.observed, rejection.code))


def _arbitrate(
    world: World, tx: Tx, rival: Tx, protection: Protection, rows: Iterable[Row], now: datetime
) -> Tx:
    claims = {(r.user, r.source, r.machine, r.written == FORGED) for r in rows}
    for claim in sorted(claims, key=_order):
        try:
            tx = _admit(world, tx, rival, protection, claim, now)
        except Rejected as rejection:
            tx = _reject(
                _hold_all_the_same(world, tx, rival, claim, rejection), protection, rejection
            )
    return tx


def _order(claim: Claim) -> tuple[tuple[bool, str], ...]:
    # As the database sorts: nulls last.
    user, source, machine, forged = claim
    return (
        (user is None, str(user)),
        (False, source),
        (machine is None, str(machine)),
        (not forged, ""),
    )


def _hold_all_the_same(world: World, tx: Tx, rival: Tx, claim: Claim, rejection: Rejected) -> Tx:
    # That this transaction is itself in the way turns out under the lock. It stays only where a
    # rejection is observed.
    user, _, _, _ = claim
    lease = tx.sees(world).leases.get(user) if user else None
    if user is None or lease is None or user in rival.leases or rejection.blockers != ("self",):
        return tx
    return replace(tx, leases={**tx.leases, user: lease})


def _admit(
    world: World, tx: Tx, rival: Tx, protection: Protection, claim: Claim, now: datetime
) -> Tx:
    seen = tx.sees(world)
    user, source, machine, forged = claim
    if (
        forged
        or (source == "local" and machine is not None)
        or (user is None and (protection.unowned == "reject" or machine is not None))
        or (user is not None and source == "cloud" and machine not in machines_of(world, user))
    ):
        raise Rejected("wrong_identity", user, source=source, machine_id=machine)
    if user is None:
        return tx

    verdict = judge(seen, user, machine, now)
    lease = seen.leases.get(user)
    if verdict.code:
        raise Rejected(verdict.code, user, lease, verdict.retry_at)

    wrote = user in tx.shared or user in tx.leases
    own: tuple[Blocker, ...] = ("self",) if wrote else ()
    if user in rival.leases or (
        user in rival.shared and lease and (lease.draining or verdict.takeover)
    ):
        raise Rejected("handover_draining", user, lease, blockers=(*own, "rival"))
    if lease is None:
        return _own(seen, tx, user, Lease(), now, "first_write")
    if not lease.draining and not verdict.takeover:
        return replace(tx, shared=tx.shared | {user})
    if lease.machine == machine:  # the drain just ends
        return _own(seen, tx, user, replace(lease, draining=False, draining_to=None), now)
    if wrote:
        raise Rejected("handover_draining", user, lease, blockers=own)
    reason = verdict.takeover or ("confirmed" if machine is None else "activated")
    return _own(seen, tx, user, Lease(lease.epoch + 1, machine), now, reason)


def _own(
    seen: World, tx: Tx, user: str, lease: Lease, now: datetime, reason: str | None = None
) -> Tx:
    tx = replace(tx, leases={**tx.leases, user: lease})
    if reason:
        entry = Handover(lease.epoch, lease.machine, reason, now, tx.exact)
        history = (*seen.handovers.get(user, ()), entry)
        tx = replace(tx, handovers={**tx.handovers, user: history})
    return tx


# The registry ------------------------------------------------------------------------------------


def put_machine(
    world: World,
    rival: Tx,
    name: str,
    change: Callable[[Machine | None], Machine | None],
    now: datetime,
) -> World:
    """One write of a machine's row; None is no row. A heartbeat in it is stamped already."""
    old = world.machines.get(name)
    new = change(old)
    machines = {key: machine for key, machine in world.machines.items() if key != name}
    if new:
        machines[name] = new
    world = _note(replace(world, machines=machines), rival, name, old, new, now)
    if new is None:
        rows = {
            key: replace(row, machine=None)
            for key, row in world.rows.items()
            if row.machine == name and row.table in world.keyed
        }
        return replace(world, rows={**world.rows, **rows})
    return _activate_healthy(world, rival, [name], now)


def stamp(world: World, name: str, now: datetime) -> datetime:
    """What a heartbeat stores: never less than before, unless the clock was set back for long."""
    old = world.machines[name].heartbeat
    ahead = old - now if old else timedelta()
    return old if old and timedelta() < ahead < world.settings.heartbeat_timeout else now


def beat(world: World, rival: Tx, names: Sequence[str], now: datetime) -> World:
    """One statement that is a heartbeat of these machines."""
    if not all(name in world.machines for name in names):
        raise Rejected("unknown_machine")
    beaten = {
        name: replace(world.machines[name], heartbeat=stamp(world, name, now)) for name in names
    }
    world = replace(world, machines={**world.machines, **beaten})
    return _activate_healthy(world, rival, names, now)


def register(world: World, rival: Tx, states: Mapping[str, str], now: datetime) -> World:
    """The registry's words get another meaning; the states that they now mean begin now."""
    world = replace(world, states=states)
    notes = dict(world.notes)
    for name, machine in world.machines.items():
        if machine.user is None:
            continue
        world = _create_lease(world, rival, machine.user, now)
        note = notes.get((machine.user, name), Note())
        state = world.meaning(machine.word)
        if state == "running":
            note = Note()
        else:
            note = replace(note, left_running=note.left_running or now)
            if state == "error":
                note = replace(note, entered_error=note.entered_error or now)
        notes[machine.user, name] = note
    return _activate_healthy(replace(world, notes=notes), rival, list(world.machines), now)


def _note(
    world: World, rival: Tx, name: str, old: Machine | None, new: Machine | None, now: datetime
) -> World:
    notes = dict(world.notes)
    same = old is not None and new is not None and old.user == new.user
    if old and old.user and not same:  # its claim ends like a stop
        left = notes.get((old.user, name), Note()).left_running
        notes[old.user, name] = Note(left_running=left or now)
    was = world.meaning(old.word) if old and same else None
    state = world.meaning(new.word) if new else None
    if new and new.user and state != was:
        noted = notes.get((new.user, name), Note())
        left = now if was == "running" else noted.left_running or now
        goes_on = {was, state} == {"error", "starting"}
        error = noted.entered_error if goes_on else None
        notes[new.user, name] = Note(
            left_running=None if state == "running" else left,
            entered_error=error or now if state == "error" else error,
        )
    world = replace(world, notes=notes)
    if new and new.user and not same:
        world = _create_lease(world, rival, new.user, now)
    return world


def _create_lease(world: World, rival: Tx, user: str, now: datetime) -> World:
    if user in world.leases or user in rival.leases:
        return world
    return _give(world, user, Lease(), now, "registered")


def _give(world: World, user: str, lease: Lease, now: datetime, reason: str | None = None) -> World:
    return _own(world, NOBODY, user, lease, now, reason).sees(world)


def _activate_healthy(world: World, rival: Tx, names: Iterable[str], now: datetime) -> World:
    """A healthy machine gets the lease, or its drain: never waiting for the rival."""
    healthy = [
        (machine.user, name)
        for name, machine in ((name, world.machines[name]) for name in names)
        if machine.user and world.meaning(machine.word) == "running" and world.is_fresh(name, now)
    ]
    # The end of a drain comes first: a look at the lease before it is too old to end it.
    ending = {
        name for _, name in healthy if any(x.draining_to == name for x in world.leases.values())
    }
    for user, name in sorted(
        healthy, key=lambda found: (found[0], found[1] not in ending, found[1])
    ):
        world = _activate(world, rival, user, name, now)
    return world


def _activate(world: World, rival: Tx, user: str, name: str, now: datetime) -> World:
    world = _create_lease(world, rival, user, now)
    if user in rival.leases:
        return world
    lease = world.leases[user]
    if lease.draining_to == name:
        if user in rival.shared:
            return world
        return _give(world, user, Lease(lease.epoch + 1, name), now, "activated")
    claimant = lease.claimant
    if claimant == name or (claimant and judge(world, user, claimant, now).code is None):
        return world
    if lease.machine == name:  # an earlier yes to a takeover is void
        return _give(world, user, replace(lease, draining=False, draining_to=None), now)
    return _give(world, user, replace(lease, draining=True, draining_to=name), now)


def confirm(world: World, rival: Tx, user: str, now: datetime) -> World:
    """The user's yes after an error."""
    lease = world.leases.get(user)
    verdict = judge(world, user, None, now)
    if verdict.code is None:
        raise Rejected("nothing_to_confirm", user, lease)
    if verdict.code != "takeover_unconfirmed" or verdict.retry_at:
        raise Rejected(verdict.code, user, lease, verdict.retry_at)
    assert lease is not None
    assert lease.claimant is not None
    if user in rival.leases:
        # A yes that waits for a lease does not see how another transaction has changed it.
        raise Rejected("handover_draining", user, None, blockers=("rival",))
    machine = lease.claimant
    if lease.machine is None:
        world = _give(world, user, replace(lease, draining=False, draining_to=None), now)
    elif user in rival.shared:  # the next local write ends it
        world = _give(world, user, replace(lease, draining=True, draining_to=None), now)
    else:
        world = _give(world, user, Lease(lease.epoch + 1), now, "confirmed")

    def stop(found: Machine | None) -> Machine:
        assert found is not None
        return replace(found, word="stopped")

    return put_machine(world, rival, machine, stop, now)


def pass_time(world: World, by: timedelta) -> World:
    """Everything happened that much longer ago."""

    def older(instant: datetime | None) -> datetime | None:
        return instant - by if instant else None

    return replace(
        world,
        machines={k: replace(m, heartbeat=older(m.heartbeat)) for k, m in world.machines.items()},
        notes={
            k: Note(older(n.left_running), older(n.entered_error)) for k, n in world.notes.items()
        },
    )


# The audit ---------------------------------------------------------------------------------------


def audit(world: World, table: str) -> tuple[dict[int, str], dict[str, int]]:
    """What ``arbiter.audit`` finds: rows that contradict, by key, and how many cannot be proved."""
    contradictions: dict[int, str] = {}
    not_provable: dict[str, int] = {}
    for key, row in world.rows.items():
        if row.table != table:
            continue
        reason = _doubt(world, row)
        if reason in ("no_lease", "wrong_environment", "wrong_machine"):
            contradictions[key] = reason
        elif reason:
            not_provable[reason] = not_provable.get(reason, 0) + 1
    return contradictions, not_provable


def _doubt(world: World, row: Row) -> str | None:
    if row.user is None:
        return "unowned"
    if row.written is None:
        return "older_than_protection"
    past = [entry for entry in world.handovers.get(row.user, ()) if entry.at <= row.written]
    # The last one that the row was written after; or any of several, where the last ones were
    # inexact and made while the row's transaction was open.
    first = len(past) - 1
    while first >= 0 and not past[first].exact and row.begun < past[first].at:
        first -= 1
    holders = [past[n].machine for n in range(max(first, 0), len(past))]
    forgotten = row.source == "cloud" and row.machine is None
    if any(
        source_of(holder) == row.source and (forgotten or holder == row.machine)
        for holder in holders
    ):
        if first < len(past) - 1:
            return "inexact_handover"
        return "machine_forgotten" if forgotten else None
    if not holders:
        return "no_lease"
    return "wrong_machine" if source_of(holders[-1]) == row.source else "wrong_environment"
