"""The answers that a write may have got, given only what clients saw: the tables over intervals.

Clients know no instant at which something happened, only a window around it. So everything here is
a set: the states that a machine may be in at a time, those that the user's lease may be in, and so
the answers that a write may get between its invocation and its return. The sets contain the truth
whenever the database keeps its promise. Where the history leaves no doubt they have one element,
and then an answer can be right or wrong.

This states the README's decision table anew and shares nothing with the SQL. In one point it is
stricter: the cloud is rejected from the instant at which a takeover by the browser is possible.

An answer is believed until it is found wrong: an admitted write narrows what the lease may be. The
sets go on without one that was wrong, so what follows from a user's first violation may look like
further ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf
from typing import ClassVar, Generic, NamedTuple, TypeVar
from uuid import UUID

from codes import SQLSTATES

from proof.history import LOST, RegistryWrite, Settings, Transaction, Write

__all__ = [
    "CLOCK_ERROR",
    "Expected",
    "Machine",
    "Oracle",
    "first_admitted",
    "is_committed",
    "is_no_verdict",
    "may_have_committed",
]

#: How far two readings of the run's clocks may be apart, in seconds: the commit timestamps are of
#: another clock than the rest, and both have a resolution. Every comparison leaves this much doubt.
CLOCK_ERROR = 0.0005

#: The answers that are right, each with its reason; None is admission (and success).
Expected = frozenset[tuple[str | None, str]]

Window = tuple[float, float]
S = TypeVar("S", bound=Hashable)

_STATES = {
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

# Answers ----------------------------------------------------------------------------------------


def may_have_committed(answer: str | None) -> bool:
    """Whether an operation with this answer may have taken effect although no answer said so."""
    return answer is not None and (answer == LOST or answer[:4] == "57P0" or answer[:2] == "08")


def is_no_verdict(answer: str | None) -> bool:
    """Whether the answer comes from a fault and does not tell who may write."""
    return may_have_committed(answer) or answer in ("57014", "55P03")


def is_committed(transaction: Transaction, rows_found: int) -> bool:
    """Whether the transaction committed, as far as it was acknowledged or its rows were found."""
    if transaction.outcome == "committed":
        return True
    return rows_found > 0 and (
        transaction.outcome == "lost"
        or (transaction.outcome == "failed" and may_have_committed(transaction.answer))
    )


def first_admitted(transaction: Transaction, committed: bool) -> Write | None:
    """The first write that was admitted. Without an answer it was if the transaction committed."""
    for write in transaction.writes:
        if write.answer is None or (committed and may_have_committed(write.answer)):
            return write
    return None


# Possible states over time ----------------------------------------------------------------------


class Timeline(Generic[S]):
    """The states that one thing may have been in, from each instant at which that changed."""

    def __init__(self, initial: S) -> None:
        self._from = [-inf]
        self._states: list[frozenset[S]] = [frozenset((initial,))]

    def add(self, at: float, states: frozenset[S]) -> None:
        """From now on it may be in these."""
        if states != self._states[-1]:
            self._from.append(at)
            self._states.append(states)

    def between(self, start: float, end: float) -> frozenset[S]:
        """All that it may have been in at some instant from start to end."""
        first = bisect_right(self._from, start) - 1
        last = bisect_right(self._from, end)
        if last - first <= 1:
            return self._states[first]
        return frozenset().union(*self._states[first:last])


class _Operation(Generic[S]):
    """Something that took effect at one instant between ``invoked`` and ``returned``, if at all.

    ``certain``: it did take effect, so every state after its return includes it. Otherwise it
    may have happened at any instant of the window, or not.
    """

    def __init__(self, invoked: float, returned: float, certain: bool) -> None:
        self.invoked = invoked
        self.returned = returned
        self.certain = certain

    def enter(self, timeline: Timeline[S], now: frozenset[S]) -> None:
        """It has been invoked while the states now were possible."""

    def look(self, state: S) -> bool:
        """A state that is possible while it is under way; whether that gives it more to do."""
        return False

    def apply(self, state: S) -> Iterable[S]:
        """The states after its effect; none when it can't take effect in this state."""
        return ()

    def settle(self, state: S) -> S:
        """The state that this one must be once it has returned."""
        return state

    #: Whether ``settle`` changes any.
    settles: ClassVar[bool] = False


class _Witnessed(_Operation[S]):
    """One that is certain only because of the state that it must have met."""

    def is_witnessed_by(self, state: S) -> bool:
        """Whether the state is one that it can have met."""
        raise NotImplementedError

    def enter(self, timeline: Timeline[S], now: frozenset[S]) -> None:
        # If every state now would do, the operation proves nothing about the state that it met.
        self.certain = self.certain and not all(map(self.is_witnessed_by, now))


#: With more worlds than this no further orders of the operations under way are explored.
_TOO_MANY = 256

_World = tuple[S, frozenset[int]]


class _Worlds(Generic[S]):
    """Every order that operations with overlapping windows may take effect in, at once.

    A world is a state and those operations under way that are certain and have happened in it. When
    an operation returns, the worlds that it has not happened in are dropped.
    """

    def __init__(self, initial: S) -> None:
        self._worlds: set[_World[S]] = {(initial, frozenset())}
        self._pending: dict[int, _Operation[S]] = {}
        self._witnessed: dict[int, _Witnessed[S]] = {}
        #: The states that are possible now.
        self.states: frozenset[S] = frozenset((initial,))

    def invoke(self, number: int, operation: _Operation[S]) -> None:
        """An operation is under way from now on."""
        self._pending[number] = operation
        if operation.certain and isinstance(operation, _Witnessed):
            self._witnessed[number] = operation
            self._worlds = {self._world(*world) for world in self._worlds}
        before = len(self._worlds)
        self._grow(number)
        if len(self._worlds) > _TOO_MANY:
            for other in self._pending.values():
                other.certain = False
            self._witnessed.clear()
            self._worlds = {(state, frozenset()) for state, _ in self._worlds}
            for other_number in self._pending:
                self._grow(other_number, inf)
        if len(self._worlds) != before:
            self.states = frozenset([state for state, _ in self._worlds])

    def give_back(self, number: int) -> None:
        """An operation is over."""
        operation = self._pending.pop(number)
        self._witnessed.pop(number, None)
        if operation.certain:
            # None left: the answer cannot be right, and the checker reports that.
            kept = {world for world in self._worlds if number in world[1]}
            self._worlds = {(state, done - {number}) for state, done in kept or self._worlds}
        if operation.settles:
            self._worlds = {(operation.settle(state), done) for state, done in self._worlds}
        if operation.certain or operation.settles:
            self.states = frozenset([state for state, _ in self._worlds])

    def _world(self, state: S, done: frozenset[int]) -> _World[S]:
        more = {n for n, operation in self._witnessed.items() if operation.is_witnessed_by(state)}
        return state, done | more

    def _grow(self, number: int, limit: float = _TOO_MANY) -> None:
        """Add every world that the operations under way lead to, now that there is one more."""
        for state, _ in self._worlds:
            self._pending[number].look(state)
        # A world that witnesses it is new, so all other operations may still happen in it.
        numbers: Iterable[int] = self._pending if number in self._witnessed else (number,)
        todo = [(world, numbers) for world in self._worlds]
        while todo and len(self._worlds) <= limit:
            (state, done), numbers = todo.pop()
            for each in numbers:
                if each in done and each not in self._witnessed:
                    continue
                operation = self._pending[each]
                is_tracked = operation.certain and each not in self._witnessed
                for after in operation.apply(state):
                    world = self._world(after, done | {each} if is_tracked else done)
                    if world in self._worlds:
                        continue
                    self._worlds.add(world)
                    todo.append((world, self._pending))
                    for other, waiting in self._pending.items():
                        if waiting.look(after):
                            todo += [(known, (other,)) for known in self._worlds]


def _explore(initial: S, operations: Sequence[_Operation[S]]) -> Timeline[S]:
    """Its possible states over time, after these operations."""
    timeline = Timeline(initial)
    events = [(op.invoked, 0, number) for number, op in enumerate(operations)]
    events += [(op.returned, 1, number) for number, op in enumerate(operations)]
    worlds = _Worlds(initial)
    for at, is_over, number in sorted(events):
        if is_over:
            worlds.give_back(number)
        else:
            operations[number].enter(timeline, worlds.states)
            worlds.invoke(number, operations[number])
        timeline.add(at, worlds.states)
    return timeline


class _Span(NamedTuple):
    """When an operation was under way, and of which machine it was."""

    invoked: float
    returned: float
    machine: UUID | None


class _Spans:
    """Operations, by when they were under way."""

    def __init__(self, spans: Iterable[_Span]) -> None:
        self._spans = sorted(spans, key=lambda span: span.invoked)
        self._invoked = [span.invoked for span in self._spans]
        # The latest return up to each span: a search backwards ends where it is too early.
        self._last = list(accumulate((span.returned for span in self._spans), max))

    def overlapping(self, start: float, end: float) -> Iterator[_Span]:
        """Those that may have been under way at some instant from start to end."""
        at = bisect_right(self._invoked, end) - 1
        while at >= 0 and self._last[at] >= start:
            if self._spans[at].returned >= start:
                yield self._spans[at]
            at -= 1


# A machine --------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """A possible state of a machine: ``state`` is None without a row; the others are the windows of
    its last heartbeat, of when it left running, and of when it entered error."""

    state: str | None = None
    heartbeat: Window | None = None
    left_running: Window | None = None
    entered_error: Window | None = None

    def become(self, state: str, at: Window) -> Machine:
        """The machine with another status."""
        if state == self.state:
            return self
        left_running = None
        if self.state == "running":
            left_running = at
        elif state != "running":
            left_running = self.left_running or at
        return self._replace(
            state=state,
            left_running=left_running,
            entered_error=(self.entered_error or at)
            if state == "error"
            else self.entered_error
            if state == "starting"
            else None,
        )


def _after(window: Window | None, period: float, unknown: float) -> Window:
    if window is None:
        return unknown, unknown
    return window[0] + period - CLOCK_ERROR, window[1] + period + CLOCK_ERROR


def _lapses(machine: Machine, settings: Settings) -> Window:
    """From when on its last heartbeat is stale; for ever without one."""
    return _after(machine.heartbeat, settings.heartbeat_timeout, -inf)


def _takeover(machine: Machine, settings: Settings) -> tuple[str, str, Window]:
    """For the browser, while the lease is for this machine: the code until a takeover is
    possible, the reason of the takeover, and from when on it is."""
    lapses = _lapses(machine, settings)
    # When it left running is noted whenever it is not running.
    cooled = _after(machine.left_running, settings.stop_grace, inf)
    if machine.state == "running":
        return "WX001", "heartbeat_lapsed", lapses
    if machine.state == "stopping":
        both = max(lapses[0], cooled[0]), max(lapses[1], cooled[1])
        return "WX002", "stop_stalled", both
    if machine.state == "error" or (machine.state == "starting" and machine.entered_error):
        elapses = _after(machine.entered_error, settings.error_takeover_delay, inf)
        never = inf, inf
        return "WX003", "error_elapsed", never if settings.error_takeover_confirm else elapses
    return "WX002", "machine_stopped", cooled


def _rejected_from(machine: Machine, settings: Settings) -> Window:
    """From when on the machine is rejected although the lease is for it."""
    lapses = _lapses(machine, settings)
    _, _, takeover = _takeover(machine, settings)
    return min(lapses[0], takeover[0]), min(lapses[1], takeover[1])


class _OnMachine(_Operation[Machine]):
    """A registry write, as its machine sees it.

    ``leaves_healthy``: whether the machine is healthy after it, both values when either may be.
    """

    def __init__(self, write: RegistryWrite, settings: Settings) -> None:
        super().__init__(write.invoked, write.returned, write.answer is None)
        self.write = write
        self.at = write.invoked, write.returned
        self.timeout = settings.heartbeat_timeout
        self.leaves_healthy: set[bool] = set()

    def apply(self, state: Machine) -> Iterable[Machine]:
        after = self._change(state)
        if self.write.verb != "delete":
            self._note_health(after)
        return (after,)

    def _change(self, machine: Machine) -> Machine:
        verb, at = self.write.verb, self.at
        if verb == "create":
            if machine.state is not None:
                return machine
            state = _STATES.get(self.write.status or "", "running")
            # From an earlier life only the instant of its end is left.
            return machine.become(state, at)
        if machine.state is None:
            return machine
        if verb == "heartbeat":
            return machine._replace(heartbeat=at)
        if verb == "delete":
            left_running = machine.left_running or at
            return Machine(left_running=left_running)
        word = "stopped" if verb == "confirm" else self.write.status
        return machine.become(_STATES.get(word or "", "running"), at)

    def _note_health(self, machine: Machine) -> None:
        if machine.state != "running" or machine.heartbeat is None:
            self.leaves_healthy.add(False)
            return
        earliest, latest = _after(machine.heartbeat, self.timeout, -inf)
        if self.write.invoked < latest:
            self.leaves_healthy.add(True)
        if self.write.returned >= earliest:
            self.leaves_healthy.add(False)


# The lease --------------------------------------------------------------------------------------

#: The claimants of a lease that are no machine. UNBORN: no write needed it yet. LOCAL: only the
#: browser had it. AGAIN: it took it back. CONFIRMED: its next write completes a takeover.
UNBORN, LOCAL, CONFIRMED, AGAIN = "unborn", "local", "confirmed", "local again"


class _Lease(NamedTuple):
    """A possible state of a lease, as committed: whom it is for, and the tag of the local
    transaction that has it locked for a handover (which no activation waits for), if one has."""

    claimant: str | UUID
    locked_by: int | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it is the browser's and needs no handover."""
        return isinstance(self.claimant, str) and self.claimant in (LOCAL, AGAIN)


class _Activation(_Operation[_Lease]):
    """A registry write, as the lease sees it.

    It does not wait: while another transaction has the lease locked it changes nothing, and the
    next heartbeat changes it.
    """

    def __init__(self, change: _OnMachine, oracle: Oracle) -> None:
        super().__init__(change.invoked, change.returned, change.certain)
        self.write = change.write
        self.leaves_healthy = change.leaves_healthy or {False}
        self.oracle = oracle
        self.may_find_locked = False

    def enter(self, timeline: Timeline[_Lease], now: frozenset[_Lease]) -> None:
        oracle, window = self.oracle, (self.invoked, self.returned)
        # The lease may be locked by another session: a cloud write that took the lease to be its
        # machine's, for one, locks it before it looks again.
        self.may_find_locked = (
            self.returned - self.invoked
            >= min(oracle.settings.heartbeat_timeout, oracle.settings.stop_grace)
            or any(oracle.strangers.overlapping(*window))
            or any(
                lease.claimant == span.machine
                for span in oracle.cloud_writes.overlapping(*window)
                for lease in timeline.between(min(span.invoked, self.invoked), self.invoked)
            )
        )

    def apply(self, state: _Lease) -> Iterable[_Lease]:
        machine, incumbent = self.write.machine, state.claimant
        if self.write.verb == "create" and state == (UNBORN, None):
            state = _Lease(LOCAL)
        if False in self.leaves_healthy or state.locked_by is not None:
            yield state
        if True not in self.leaves_healthy or state.locked_by is not None:
            return
        if not isinstance(incumbent, UUID):
            yield _Lease(machine)
            if self.may_find_locked:
                yield state
        elif incumbent == machine:
            yield state
        else:
            yield from self._challenge(state, incumbent)

    def _challenge(self, state: _Lease, incumbent: UUID) -> Iterable[_Lease]:
        earliest = inf
        for machine in self.oracle.machine(incumbent).between(self.invoked, self.returned):
            rejected_from = _rejected_from(machine, self.oracle.settings)
            earliest = min(earliest, rejected_from[0])
            if self.invoked < rejected_from[1]:
                yield state
        if self.returned >= earliest:
            yield _Lease(self.write.machine)
            if any(self.oracle.everything.overlapping(self.invoked, self.returned)):
                yield state


class _Confirmation(_Operation[_Lease]):
    """The user's yes."""

    def apply(self, state: _Lease) -> Iterable[_Lease]:
        if isinstance(state.claimant, UUID) and state.locked_by is None:
            yield _Lease(CONFIRMED)
            yield _Lease(AGAIN)


class _Admission(_Witnessed[_Lease]):
    """A local write that was admitted, or may have been before it failed of something else.

    Those of one window count as one.
    """

    def __init__(
        self, transaction: Transaction, window: Window, certain: bool, oracle: Oracle
    ) -> None:
        super().__init__(*window, certain)
        self.transaction = transaction
        self.oracle = oracle
        self.saw_takeover = False
        self._takes: dict[UUID, bool] = {}

    def is_witnessed_by(self, state: _Lease) -> bool:
        return state.is_settled or state.locked_by == self.transaction.tag

    def enter(self, timeline: Timeline[_Lease], now: frozenset[_Lease]) -> None:
        super().enter(timeline, now)
        if self.transaction.level != "read committed":
            # Its snapshot may show an older state.
            before = timeline.between(self.transaction.began, self.invoked)
            self.certain = self.certain and not any(map(self.is_witnessed_by, before))

    def look(self, state: _Lease) -> bool:
        if self.saw_takeover or state.is_settled or not self._can_take(state.claimant):
            return False
        self.saw_takeover = True
        return True

    def apply(self, state: _Lease) -> Iterable[_Lease]:
        if state.locked_by is not None:
            return
        # The browser has it already: this one came for a takeover, and another one just committed.
        if self.saw_takeover if state.is_settled else self._can_take(state.claimant):
            yield state._replace(locked_by=self.transaction.tag)

    def _can_take(self, claimant: str | UUID) -> bool:
        if not isinstance(claimant, UUID):
            return True
        if claimant not in self._takes:
            self._takes[claimant] = any(
                self.returned >= _takeover(machine, self.oracle.settings)[2][0]
                for machine in self.oracle.machine(claimant).between(self.invoked, self.returned)
            )
        return self._takes[claimant]


class _End(_Operation[_Lease]):
    """The end of a local transaction: a lease that it had locked is handed over or unlocked."""

    settles = True

    def __init__(self, tag: int, committed: bool, invoked: float, returned: float) -> None:
        super().__init__(invoked, returned, False)
        self.tag = tag
        self.committed = committed

    def apply(self, state: _Lease) -> Iterable[_Lease]:
        if state.locked_by != self.tag:
            return
        if not self.committed or state.is_settled:
            yield _Lease(state.claimant)
        else:
            yield _Lease(LOCAL if state.claimant == UNBORN else AGAIN)

    def settle(self, state: _Lease) -> _Lease:
        return next(iter(self.apply(state)), state)


class _Evidence(_Witnessed[_Lease]):
    """An admitted cloud write: at some instant of it the lease was for its machine."""

    def __init__(self, write: Write) -> None:
        super().__init__(write.invoked, write.returned, True)
        self.machine = write.machine

    def is_witnessed_by(self, state: _Lease) -> bool:
        return state.locked_by is None and state.claimant == self.machine


# The oracle -------------------------------------------------------------------------------------


class Oracle:
    """The answers that the operations of one user may get.

    ``found`` maps the tags of transactions to their rows in the table after the run, and
    ``committed_at`` to their commit timestamps.
    """

    _NEVER: ClassVar[Timeline[Machine]] = Timeline(Machine())

    def __init__(
        self,
        settings: Settings,
        transactions: Sequence[Transaction],
        registry: Sequence[RegistryWrite],
        found: dict[int, int],
        committed_at: dict[int, float],
        strangers: Sequence[Window] = (),
    ) -> None:
        self.settings = settings
        self.strangers = _Spans(_Span(began, ended, None) for began, ended in strangers)
        self._machines: dict[UUID, Timeline[Machine]] = {}
        self.cloud_writes = _Spans(
            _Span(write.invoked, write.returned, write.machine)
            for transaction in transactions
            if transaction.machine is not None
            for write in transaction.writes
        )
        # These may have the lease locked: transactions until they end, and confirmations.
        self.everything = _Spans(
            [
                *(_Span(t.writes[0].invoked, t.ended, t.machine) for t in transactions if t.writes),
                *(_Span(w.invoked, w.returned, w.machine) for w in registry if w.verb == "confirm"),
                *(_Span(began, ended, None) for began, ended in strangers),
            ]
        )
        changes = self._explore_machines(registry)
        self._lease = _explore(
            _Lease(UNBORN),
            [
                *self._by_registry(changes),
                *self._by_transactions(transactions, found, committed_at),
            ],
        )

    def machine(self, machine: UUID) -> Timeline[Machine]:
        """The possible states of the machine over time."""
        return self._machines.get(machine, self._NEVER)

    def _explore_machines(self, registry: Sequence[RegistryWrite]) -> list[_OnMachine]:
        by_machine: dict[UUID, list[_OnMachine]] = {}
        for write in registry:
            # Any other error: nothing was written.
            if write.answer is None or may_have_committed(write.answer):
                change = _OnMachine(write, self.settings)
                by_machine.setdefault(write.machine, []).append(change)
        for machine, changes in by_machine.items():
            self._machines[machine] = _explore(Machine(), changes)
        return [change for changes in by_machine.values() for change in changes]

    def _by_registry(self, changes: Iterable[_OnMachine]) -> Iterable[_Operation[_Lease]]:
        for change in changes:
            if change.write.verb == "confirm":
                yield _Confirmation(change.invoked, change.returned, change.write.answer is None)
            elif change.write.verb == "create" or True in change.leaves_healthy:
                yield _Activation(change, self)

    def _by_transactions(
        self,
        transactions: Sequence[Transaction],
        found: dict[int, int],
        committed_at: dict[int, float],
    ) -> Iterable[_Operation[_Lease]]:
        for transaction in transactions:
            committed = is_committed(transaction, found.get(transaction.tag, 0))
            if transaction.machine is not None:
                admitted = first_admitted(transaction, committed)
                if admitted is not None and transaction.level == "read committed":
                    yield _Evidence(admitted)
                continue
            windows: dict[Window, bool] = {}
            for write in transaction.writes:
                # A write that failed without a verdict may have locked the lease before.
                if write.answer is None or write.answer[:2] != "WX":
                    window = write.invoked, write.returned
                    is_admitted = write.answer is None or (
                        committed and may_have_committed(write.answer)
                    )
                    windows[window] = windows.get(window, False) or is_admitted
            for window, is_admitted in windows.items():
                yield _Admission(transaction, window, is_admitted, self)
            if windows:
                invoked = min(windows)[0]
                if committed:
                    stamp = committed_at.get(transaction.tag, -inf) - CLOCK_ERROR
                    invoked = max(invoked, transaction.ending, stamp)
                invoked = min(invoked, transaction.ended)
                yield _End(transaction.tag, committed, invoked, transaction.ended)

    def answers(self, transaction: Transaction, write: Write) -> Expected:
        """The answers that a write of a transaction may get, as far as it is for the tables."""
        if write.machine is None:
            expected = self._local(transaction, write)
        else:
            expected = self._cloud(transaction, write, write.machine)
        if transaction.level != "read committed":
            expected.add(("40001", "an old snapshot"))
        return self._answered(expected, write.invoked, write.returned)

    def _answered(
        self, expected: set[tuple[str | None, str]], invoked: float, returned: float
    ) -> Expected:
        """The answers after a wait: only a write that could be admitted waits for others."""
        if returned - invoked >= self.settings.drain_timeout - 2 * CLOCK_ERROR and any(
            answer in (None, "blocked") for answer, _ in expected
        ):
            expected.add(("WX007", "handover_draining"))
        return frozenset([pair for pair in expected if pair[0] != "blocked"])

    def _snapshot(self, transaction: Transaction, write: Write) -> Window:
        """When the state that the write sees was committed, at its snapshot."""
        if transaction.level == "read committed":
            return write.invoked, write.returned
        return transaction.began, transaction.writes[0].returned

    def _local(self, transaction: Transaction, write: Write) -> set[tuple[str | None, str]]:
        start, end = write.invoked, write.returned
        seen = self._snapshot(transaction, write)
        current = transaction.level == "read committed"
        expected: set[tuple[str | None, str]] = set()
        now = self._lease.between(start, end)
        for lease in now:
            if lease.locked_by == transaction.tag:
                expected.add((None, "this transaction holds"))
        for lease in now if current else self._lease.between(*seen):
            if lease.locked_by == transaction.tag:
                continue
            locked = current and lease.locked_by is not None
            if not isinstance(lease.claimant, UUID):
                reason = _LOCAL[lease.claimant]
                expected.add(("blocked" if locked else None, reason))
                continue
            timeline = self.machine(lease.claimant)
            # A takeover is decided by the newest state, or is blocked.
            newest = inf if locked else -inf
            if not current:
                newest = self._taken_by_newest(lease.claimant, start, end)
            for machine in timeline.between(*seen):
                code, reason, (earliest, latest) = _takeover(machine, self.settings)
                if start < latest:
                    expected.add((code, _REASONS[code]))
                if end >= earliest:
                    expected.add((None if end >= newest else "blocked", reason))
        return expected

    def _taken_by_newest(self, claimant: UUID, start: float, end: float) -> float:
        """From when on a local write between these may take over from this machine."""
        if all(lease.claimant != claimant for lease in self._lease.between(start, end)):
            return inf
        machines = self.machine(claimant).between(start, end)
        return min(_takeover(machine, self.settings)[2][0] for machine in machines)

    def _cloud(
        self, transaction: Transaction, write: Write, own: UUID
    ) -> set[tuple[str | None, str]]:
        start, end = write.invoked, write.returned
        seen = self._snapshot(transaction, write)
        expected: set[tuple[str | None, str]] = set()
        machines = self.machine(own).between(*seen)
        present = [machine for machine in machines if machine.state is not None]
        # The foreign key looks at the current row, and may look before the guard does.
        if len(present) < len(machines) or any(
            machine.state is None for machine in self.machine(own).between(start, end)
        ):
            expected |= {("WX005", "no such machine"), ("23503", "no such machine")}
        if present and len(present) < len(machines):
            expected.add(("WX004", "not entitled any more"))
        for lease in self._lease.between(*seen):
            if lease.claimant != own and present:
                expected.add(("WX004", "not_holder"))
                continue
            locked = transaction.level == "read committed" and lease.locked_by is not None
            for machine in present:
                earliest, latest = _rejected_from(machine, self.settings)
                if start < latest:
                    expected.add(("blocked" if locked else None, "holder"))
                if end >= earliest:
                    expected.add(("WX004", "not entitled any more"))
        return expected

    def registry_answers(self, write: RegistryWrite) -> Expected:
        """The answers that a write of the registry, or a user's yes, may get."""
        start, end = write.invoked, write.returned
        if write.verb == "confirm":
            return self._answered(self._confirm(start, end), start, end)
        expected: set[tuple[str | None, str]] = {(None, "never rejected")}
        if write.verb == "create":
            # Its keys are the app's.
            expected.add(("23505", "a machine already"))
        if write.verb == "heartbeat" and any(
            machine.state is None for machine in self.machine(write.machine).between(start, end)
        ):
            expected.add(("P0002", "no such machine"))
        return frozenset(expected)

    def _confirm(self, start: float, end: float) -> set[tuple[str | None, str]]:
        expected: set[tuple[str | None, str]] = set()
        for lease in self._lease.between(start, end):
            if not isinstance(lease.claimant, UUID):
                expected.add(("55000", "nothing to confirm"))
                continue
            for machine in self.machine(lease.claimant).between(start, end):
                code, _, (earliest, latest) = _takeover(machine, self.settings)
                if code == "WX003" and self.settings.error_takeover_confirm:
                    earliest, latest = _takeover(
                        machine, replace(self.settings, error_takeover_confirm=False)
                    )[2]
                    yes: str | None = "blocked" if lease.locked_by is not None else None
                    passed = (yes, "confirmed")
                else:
                    passed = ("55000", "nothing to confirm")
                if start < latest:
                    expected.add((code, _REASONS[code]))
                if end >= earliest:
                    expected.add(passed)
        return expected


_LOCAL = {
    UNBORN: "no machine ever held",
    LOCAL: "no machine ever held",
    CONFIRMED: "takeover was confirmed",
    AGAIN: "local holds again",
}
_REASONS = {
    SQLSTATES[code]: code for code in ("cloud_active", "cooling_down", "takeover_unconfirmed")
}
