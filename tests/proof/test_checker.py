"""The checker reports every violation and no correct history: handmade and simulated histories.

In the handmade ones the test names the instant at which an operation takes effect; its client saw
a window of ``MS`` before and after it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal
from uuid import UUID

import pytest

from proof.checker import Report, check, render, shrink
from proof.history import LOST, History, Level, RegistryWrite, Settings, Transaction, Write

SETTINGS = Settings(
    heartbeat_timeout=30.0, stop_grace=20.0, error_takeover_delay=120.0, drain_timeout=2.0
)
#: The window of an operation begins and ends this long before and after its instant, in seconds.
MS = 0.001

M1 = UUID(int=0xC1)
M2 = UUID(int=0xC2)

RC: Level = "read committed"
RR: Level = "repeatable read"

#: All answers that a write can get without a fault, and 40P01, which it must not get.
VERDICTS = (None, "WX001", "WX002", "WX003", "WX004", "WX005", "WX006", "WX007", "40001", "40P01")


@dataclass
class Tale:
    """A history of one user in the making."""

    settings: Settings = SETTINGS
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self.history = History("handmade", self.settings)
        self._tags = count(1)

    def registry(
        self,
        verb: Literal["create", "status", "heartbeat", "delete", "confirm"],
        at: float,
        status: str | None = None,
        machine: UUID = M1,
        answer: str | None = None,
        lasts: float = 2 * MS,
    ) -> RegistryWrite:
        """A write of the registry around that instant."""
        invoked = at - MS
        who = "person" if verb == "confirm" else "fly"
        entry = RegistryWrite(0, who, verb, machine, invoked, invoked + lasts, status, answer)
        self.history.registry.append(entry)
        return entry

    def activate(self, at: float, machine: UUID = M1) -> None:
        """A machine appears, and is healthy from that instant on."""
        self.registry("create", at - 1.0, "provisioning", machine)
        self.registry("status", at - 0.5, "running", machine)
        self.registry("heartbeat", at, None, machine)

    def write(
        self,
        at: float,
        machine: UUID | None = None,
        *,
        end: float | None = None,
        level: Level = RC,
        began: float | None = None,
        answer: str | None = None,
        outcome: Literal["committed", "rolled back", "failed", "lost"] | None = None,
        rows: int = 1,
        found: int | None = None,
        stamp: float | None = None,
        lasts: float = 2 * MS,
        more: tuple[float, ...] = (),
    ) -> Transaction:
        """A transaction with a write of ``rows`` rows at that instant, and more at others.

        It commits at ``end``; without one each statement commits by itself. Its rows are found
        when it did, unless told otherwise.
        """
        outcome = outcome or ("committed" if answer is None else "failed")
        writes = [
            Write(instant - MS, instant - MS + lasts, machine, rows, "insert", answer)
            for instant in (at, *more)
        ]
        first, last = writes[0], writes[-1]
        transaction = Transaction(
            next(self._tags),
            0,
            "tab" if machine is None else "writer",
            level,
            "direct",
            first.invoked if began is None else began,
            writes,
            last.invoked if end is None else end - MS,
            last.returned if end is None else end + MS,
            outcome,
            answer,
        )
        self.history.transactions.append(transaction)
        if found is None and outcome == "committed" and answer is None:
            found = rows * len(writes)
        if found:
            self.history.found[transaction.tag] = found
            if stamp is not None:
                self.history.committed_at[transaction.tag] = stamp
        return transaction

    def check(self) -> Report:
        """The checker's report on it."""
        return check(self.history)

    def kinds(self) -> set[str]:
        """The kinds of violations in it."""
        return set(self.check().kinds)


# Overlap -----------------------------------------------------------------------------------------


def test_two_environments_open_at_one_instant_are_an_overlap() -> None:
    tale = Tale()
    local = tale.write(1.0, end=3.0)
    cloud = tale.write(2.0, M1, end=4.0)
    (overlap,) = [v for v in tale.check().violations if v.kind == "overlap"]
    assert overlap.tags == (local.tag, cloud.tag)


def test_two_machines_open_at_one_instant_are_an_overlap() -> None:
    tale = Tale()
    tale.write(1.0, M1, end=3.0)
    tale.write(2.0, M2, end=4.0)
    assert "overlap" in tale.kinds()


@pytest.mark.parametrize("other", [None, M1])
def test_one_environment_does_not_overlap_with_itself(other: UUID | None) -> None:
    tale = Tale()
    tale.write(1.0, other, end=3.0)
    tale.write(2.0, other, end=4.0)
    assert "overlap" not in tale.kinds()


def test_transactions_of_two_users_do_not_overlap() -> None:
    tale = Tale()
    tale.write(1.0, end=3.0)
    tale.write(2.0, M1, end=4.0).user = 1
    assert "overlap" not in tale.kinds()


@pytest.mark.parametrize("gap", [-1.9 * MS, 0.0, MS])
def test_adjacent_transactions_do_not_overlap(gap: float) -> None:
    # The first may have committed as soon as its commit was invoked, 1 ms before.
    tale = Tale()
    tale.write(1.0, end=3.0)
    tale.write(3.0 + gap, M1, end=4.0)
    assert "overlap" not in tale.kinds()


def test_a_write_that_returned_before_the_other_commit_was_invoked_overlaps() -> None:
    tale = Tale()
    tale.write(1.0, end=3.0)
    tale.write(3.0 - 2.1 * MS, M1, end=4.0)
    assert "overlap" in tale.kinds()


def test_a_commit_timestamp_shows_an_overlap_that_the_invocations_do_not() -> None:
    for stamp, caught in ((None, False), (4.5, True)):
        tale = Tale()
        local = tale.write(1.0, end=3.0, stamp=stamp)
        local.ended = 5.0  # the commit took that long
        tale.write(4.0, M1, end=6.0)
        assert ("overlap" in tale.kinds()) is caught


def test_a_statement_that_commits_by_itself_overlaps_with_the_transaction_around_it() -> None:
    tale = Tale()
    tale.write(1.0, end=3.0)
    tale.write(2.0, M1)
    assert "overlap" in tale.kinds()


def test_statements_that_commit_by_themselves_do_not_overlap() -> None:
    # Their windows do, but each may have been over before the other began.
    tale = Tale()
    tale.write(1.0, lasts=2.0)
    tale.write(1.5, M1, lasts=2.0)
    assert "overlap" not in tale.kinds()


def test_a_commit_timestamp_after_the_end_is_not_believed() -> None:
    tale = Tale()
    tale.write(1.0, end=2.0, stamp=9.0)
    tale.write(5.0, M1, end=9.5)
    assert "overlap" not in tale.kinds()


@pytest.mark.parametrize("outcome", ["rolled back", "failed"])
def test_what_did_not_commit_does_not_overlap(outcome: Literal["rolled back", "failed"]) -> None:
    tale = Tale()
    tale.write(1.0, end=3.0, outcome=outcome)
    tale.write(2.0, M1, end=4.0)
    assert "overlap" not in tale.kinds()


@pytest.mark.parametrize(("found", "caught"), [(0, False), (1, True)])
def test_a_lost_commit_counts_when_its_rows_are_found(found: int, caught: bool) -> None:
    tale = Tale()
    tale.write(1.0, end=3.0, outcome="lost", found=found)
    tale.write(2.0, M1, end=4.0)
    assert ("overlap" in tale.kinds()) is caught


def test_every_transaction_that_overlaps_is_found_among_many() -> None:
    rng = random.Random("overlaps")
    for _ in range(50):
        tale = Tale()
        for _ in range(12):
            at = rng.uniform(0, 20)
            tale.write(at, rng.choice([None, M1, M2]), end=at + rng.uniform(0.1, 3))
        found = {v.tags for v in tale.check().violations if v.kind == "overlap"}
        spans = [(t.writes[0].returned, t.ending, t) for t in tale.history.transactions]
        expected = {
            frozenset((a.tag, b.tag))
            for since_a, until_a, a in spans
            for since_b, until_b, b in spans
            if a.machine != b.machine and since_a < until_b and since_b < until_a
        }
        # The checker need not report every pair, but every transaction that overlaps another.
        assert {frozenset(tags) for tags in found} <= expected
        assert {t for tags in found for t in tags} == {t for tags in expected for t in tags}


# Admitted while fresh ----------------------------------------------------------------------------


def test_a_local_write_that_is_admitted_while_the_machine_is_fresh() -> None:
    tale = Tale()
    tale.activate(10.0)
    wrong = tale.write(15.0)
    (violation,) = tale.check().violations
    assert (violation.kind, violation.tags) == ("admitted while fresh", (wrong.tag,))


def test_a_later_write_of_a_transaction_is_rejected_once_the_machine_has_reported() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(9.8, end=12.0, more=(11.0,))
    assert tale.kinds() == {"admitted while fresh"}


def test_who_creates_the_lease_has_it_locked() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(9.0, end=12.0, more=(11.0,))  # as early as the machine's row
    assert tale.kinds() == set()


def test_a_write_that_is_admitted_and_rolled_back_is_a_wrong_answer_all_the_same() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(15.0, end=16.0, outcome="rolled back")
    assert tale.kinds() == {"wrong answer"}


def test_a_write_while_the_report_is_under_way_may_be_admitted() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(10.0 + 1.5 * MS)
    assert tale.kinds() == set()


def test_a_write_that_was_admitted_during_the_report_does_not_undo_it() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.history.registry[-1].returned = 10.5
    tale.write(10.2, end=10.4)
    tale.write(11.0, answer="WX001")
    assert tale.kinds() == set()
    # It may have kept the report from taking effect; the next one has.
    tale.registry("heartbeat", 12.0)
    tale.write(13.0)
    assert tale.kinds() == {"admitted while fresh"}


@pytest.mark.parametrize(("lost", "caught"), [(False, True), (True, False)])
def test_a_report_whose_connection_was_lost_may_not_have_arrived(lost: bool, caught: bool) -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.history.registry[-1].answer = LOST if lost else None
    tale.write(15.0)
    assert bool(tale.kinds()) is caught


@pytest.mark.parametrize(("began", "caught"), [(9.0, False), (11.0, True)])
def test_an_old_snapshot_counts_as_in_flight(began: float, caught: bool) -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(15.0, end=16.0, level=RR, began=began)
    assert bool(tale.kinds()) is caught


@pytest.mark.parametrize(("after", "caught"), [(29.9, True), (30.0, False), (30.1, False)])
def test_a_takeover_is_possible_as_soon_as_the_heartbeat_may_have_lapsed(
    after: float, caught: bool
) -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(10.0 + after)
    assert bool(tale.kinds()) is caught


def test_a_report_during_a_takeover_takes_effect_with_the_next_heartbeat() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(45.0, end=47.0, more=(46.5,))  # its heartbeat lapsed at 40
    tale.registry("heartbeat", 46.0)  # does not wait, so it changes nothing
    tale.write(48.0)
    assert tale.kinds() == set()
    tale.registry("heartbeat", 49.0)
    tale.write(50.0)
    assert tale.kinds() == {"admitted while fresh"}


def test_who_came_for_a_takeover_keeps_the_lease_locked_when_another_was_first() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(45.0, end=46.0)
    tale.write(45.5, end=50.0, lasts=0.6)
    tale.registry("heartbeat", 48.0)
    tale.write(51.0)
    assert tale.kinds() == set()


def test_a_takeover_by_an_old_snapshot_goes_by_the_newest_heartbeat() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.registry("heartbeat", 42.0)
    tale.write(45.0, end=46.0, level=RR, began=41.0)  # in its snapshot the first one has lapsed
    assert tale.kinds() == {"admitted while fresh"}


def test_a_takeover_that_was_rolled_back_leaves_the_lease_to_the_machine() -> None:
    tale = Tale()
    tale.activate(10.0)
    tale.write(45.0, end=46.0, outcome="rolled back")
    tale.registry("heartbeat", 47.0)
    tale.write(48.0)
    assert tale.kinds() == {"admitted while fresh"}


def test_a_takeover_by_a_later_write_of_a_transaction_is_one_too() -> None:
    tale = Tale()
    tale.activate(10.0)
    # Admitted before the machine came, and again when its heartbeat had lapsed.
    tale.write(9.0, end=46.0, more=(45.0,))
    tale.write(48.0)
    tale.registry("status", 50.0, "stopped")
    tale.write(51.0)
    assert tale.kinds() == set()


@pytest.mark.parametrize(("strangers", "caught"), [([], True), ([(9.5, 10.5)], False)])
def test_a_stranger_may_have_kept_the_lease_from_the_machine(
    strangers: list[tuple[float, float]], caught: bool
) -> None:
    tale = Tale()
    tale.history.strangers = strangers
    tale.activate(10.0)
    tale.write(15.0)
    assert bool(tale.kinds()) is caught


# Answers: every row of the decision tables --------------------------------------------------------


Setup = Callable[[Tale], None]


def _no_machine(tale: Tale) -> None:
    tale.write(1.0)


def _silent(tale: Tale) -> None:
    tale.registry("create", 9.0, "running")


def _running(tale: Tale) -> None:
    tale.activate(10.0)


def _unmapped(tale: Tale) -> None:
    tale.activate(10.0)
    tale.registry("status", 11.0, "hibernating")


def _left(word: str) -> Setup:
    """It left running at 15; its last heartbeat is of 10."""

    def setup(tale: Tale) -> None:
        tale.activate(10.0)
        tale.registry("status", 15.0, word)

    return setup


def _beating(word: str) -> Setup:
    """The same, and it sends a heartbeat at 20."""

    def setup(tale: Tale) -> None:
        _left(word)(tale)
        tale.registry("heartbeat", 20.0)

    return setup


def _started_again(tale: Tale) -> None:
    _left("stopped")(tale)
    tale.registry("status", 20.0, "starting")


def _restarted(tale: Tale) -> None:
    _left("error")(tale)
    tale.registry("status", 20.0, "starting")


def _failed_after_stop(tale: Tale) -> None:
    _left("stopping")(tale)
    tale.registry("status", 20.0, "error")


def _recovered(tale: Tale) -> None:
    _left("error")(tale)
    tale.registry("status", 20.0, "running")


def _deleted(tale: Tale) -> None:
    tale.activate(10.0)
    tale.registry("delete", 15.0)


def _deleted_after_stop(tale: Tale) -> None:
    _left("stopped")(tale)
    tale.registry("delete", 20.0)


def _replaced(tale: Tale) -> None:
    _deleted(tale)
    tale.activate(17.0, M2)


def _challenged(tale: Tale) -> None:
    tale.activate(10.0)
    tale.activate(17.0, M2)


def _confirmed(tale: Tale) -> None:
    _left("error")(tale)
    tale.registry("confirm", 140.0)


def _confirmed_in_vain(tale: Tale) -> None:
    _confirmed(tale)
    tale.registry("status", 141.0, "running")
    tale.registry("heartbeat", 142.0)


def _taken_over(tale: Tale) -> None:
    _left("stopped")(tale)
    tale.write(40.0)


ADMIT = frozenset({None})
ABSENT = frozenset({"WX005", "23503"})


def _only(code: str) -> frozenset[str | None]:
    return frozenset({code})


@pytest.mark.parametrize(
    ("setup", "at", "local", "cloud"),
    [
        pytest.param(_no_machine, 2.0, ADMIT, ABSENT, id="no machine"),
        pytest.param(_silent, 10.0, ADMIT, _only("WX004"), id="never a heartbeat"),
        pytest.param(_running, 39.9, _only("WX001"), ADMIT, id="running, fresh"),
        pytest.param(_running, 40.0, {None, "WX001"}, {None, "WX004"}, id="running, boundary"),
        pytest.param(_running, 40.1, ADMIT, _only("WX004"), id="running, stale"),
        pytest.param(_unmapped, 39.9, _only("WX001"), ADMIT, id="unmapped word, fresh"),
        pytest.param(_unmapped, 40.1, ADMIT, _only("WX004"), id="unmapped word, stale"),
        pytest.param(_left("stopping"), 34.9, _only("WX002"), ADMIT, id="stopping, grace"),
        pytest.param(_left("stopping"), 39.9, _only("WX002"), ADMIT, id="stopping, fresh"),
        pytest.param(_left("stopping"), 40.1, ADMIT, _only("WX004"), id="stopping, stalled"),
        pytest.param(_beating("stopping"), 49.9, _only("WX002"), ADMIT, id="stopping, beats on"),
        pytest.param(_left("stopped"), 34.9, _only("WX002"), ADMIT, id="stopped, grace"),
        pytest.param(_left("stopped"), 35.0, {None, "WX002"}, {None, "WX004"}, id="boundary"),
        pytest.param(_left("stopped"), 35.1, ADMIT, _only("WX004"), id="stopped, over"),
        pytest.param(_beating("stopped"), 35.1, ADMIT, _only("WX004"), id="stopped, beats on"),
        pytest.param(_started_again, 34.9, _only("WX002"), ADMIT, id="starting again, grace"),
        pytest.param(_started_again, 35.1, ADMIT, _only("WX004"), id="starting again, over"),
        pytest.param(_restarted, 35.1, _only("WX003"), ADMIT, id="starting out of an error"),
        pytest.param(_restarted, 135.1, _only("WX003"), _only("WX004"), id="the same, longer"),
        pytest.param(_deleted, 34.9, _only("WX002"), ABSENT, id="deleted, grace"),
        pytest.param(_deleted, 35.1, ADMIT, ABSENT, id="deleted, over"),
        pytest.param(_deleted_after_stop, 35.1, ADMIT, ABSENT, id="stopped before deleted"),
        pytest.param(_left("error"), 39.9, _only("WX003"), ADMIT, id="error, fresh"),
        pytest.param(_left("error"), 134.9, _only("WX003"), _only("WX004"), id="error, stale"),
        pytest.param(_left("error"), 135.1, _only("WX003"), _only("WX004"), id="error, longer"),
        pytest.param(_failed_after_stop, 39.9, _only("WX003"), ADMIT, id="error after a stop"),
        pytest.param(_recovered, 39.9, _only("WX001"), ADMIT, id="recovered"),
        pytest.param(_confirmed, 140.1, ADMIT, _only("WX004"), id="confirmed"),
        pytest.param(_confirmed_in_vain, 143.0, _only("WX001"), ADMIT, id="yes made void"),
        pytest.param(_taken_over, 41.0, ADMIT, _only("WX004"), id="taken over"),
        pytest.param(_replaced, 18.0, _only("WX001"), ABSENT, id="replaced"),
        pytest.param(_challenged, 18.0, _only("WX001"), ADMIT, id="challenged while entitled"),
    ],
)
@pytest.mark.parametrize("level", [RC, RR])
def test_the_decision_tables(
    setup: Setup,
    at: float,
    local: frozenset[str | None],
    cloud: frozenset[str | None],
    level: Level,
) -> None:
    for machine, right in ((None, local), (M1, cloud)):
        for answer in (*VERDICTS, "23503"):
            tale = Tale()
            setup(tale)
            tale.write(at, machine, level=level, answer=answer)
            may = answer in right or (answer == "40001" and level == RR)
            assert bool(tale.kinds()) is not may, (machine, answer)


def test_the_decision_tables_without_confirmation() -> None:
    for at, right in ((134.9, "WX003"), (135.1, None)):
        for answer in VERDICTS:
            tale = Tale(replace(SETTINGS, error_takeover_confirm=False))
            _left("error")(tale)
            tale.write(at, answer=answer)
            assert bool(tale.kinds()) is (answer != right), (at, answer)


def test_the_replacing_machine_holds() -> None:
    tale = Tale()
    _replaced(tale)
    tale.write(18.0, M2)
    assert tale.kinds() == set()


def test_the_challenger_does_not_hold_while_the_other_machine_is_entitled() -> None:
    tale = Tale()
    _challenged(tale)
    tale.write(18.0, M2)
    assert tale.kinds() == {"wrong answer"}


def test_the_challenger_holds_once_the_other_machine_is_not_entitled_any_more() -> None:
    tale = Tale()
    _challenged(tale)
    tale.registry("heartbeat", 41.0, machine=M2)
    tale.write(42.0, M2)
    assert tale.kinds() == set()


@pytest.mark.parametrize(
    ("setup", "at", "right"),
    [
        pytest.param(_no_machine, 2.0, "55000", id="no machine"),
        pytest.param(_running, 20.0, "WX001", id="running"),
        pytest.param(_running, 50.0, "55000", id="lapsed"),
        pytest.param(_left("stopped"), 20.0, "WX002", id="cooling down"),
        pytest.param(_left("stopped"), 50.0, "55000", id="stopped"),
        pytest.param(_left("error"), 134.9, "WX003", id="too early"),
        pytest.param(_left("error"), 135.1, None, id="error"),
        pytest.param(_restarted, 135.1, None, id="starting out of an error"),
        pytest.param(_confirmed, 141.0, "55000", id="confirmed already"),
    ],
)
def test_a_yes_is_for_a_machine_that_has_been_in_error_long_enough(
    setup: Setup, at: float, right: str | None
) -> None:
    for answer in (*VERDICTS, "55000"):
        tale = Tale()
        setup(tale)
        tale.registry("confirm", at, answer=answer)
        assert tale.kinds() == (set() if answer == right else {"wrong answer"}), answer


@pytest.mark.parametrize(("lasts", "may"), [(1.9, False), (2.0, True), (9.0, True)])
@pytest.mark.parametrize("machine", [None, M1])
def test_only_who_has_waited_is_told_of_writes_in_flight(
    lasts: float, may: bool, machine: UUID | None
) -> None:
    tale = Tale()
    _running(tale)
    tale.write(45.0 if machine is None else 11.0, machine, answer="WX007", lasts=lasts)
    assert tale.kinds() == (set() if may else {"wrong answer"})


def test_who_is_rejected_anyway_does_not_wait() -> None:
    tale = Tale()
    _running(tale)
    tale.write(11.0, answer="WX007", lasts=3.0)
    assert tale.kinds() == {"wrong answer"}


def test_a_machine_is_not_admitted_while_a_takeover_is_open() -> None:
    tale = Tale()
    _running(tale)
    tale.write(45.0, end=50.0)
    tale.registry("heartbeat", 46.0)
    tale.write(47.0, M1)
    assert "wrong answer" in tale.kinds()


@pytest.mark.parametrize("answer", [LOST, "57014", "55P03", "57P01", "57P02", "08006", "08P01"])
@pytest.mark.parametrize("machine", [None, M1])
def test_a_fault_says_nothing_and_is_counted(answer: str, machine: UUID | None) -> None:
    tale = Tale()
    _running(tale)
    tale.write(15.0, machine, answer=answer, outcome="lost" if answer == LOST else "failed")
    tale.registry("heartbeat", 16.0, answer=answer)
    report = tale.check()
    assert report.violations == []
    assert report.no_verdict == Counter({answer: 2})


@pytest.mark.parametrize("answer", ["WX007", "40001", "40P01"])
def test_a_heartbeat_is_never_rejected(answer: str) -> None:
    tale = Tale()
    _running(tale)
    tale.registry("heartbeat", 12.0, answer=answer)
    assert tale.kinds() == {"wrong answer"}


def test_a_registry_write_that_failed_has_changed_nothing() -> None:
    tale = Tale()
    _running(tale)
    tale.registry("status", 15.0, "stopped", answer="57014")
    tale.write(36.0, answer="WX001")
    assert tale.kinds() == set()


def test_a_registry_write_that_was_lost_may_have_changed_something() -> None:
    for answer in ("WX001", "WX002", None):
        tale = Tale()
        _running(tale)
        tale.registry("status", 15.0, "stopped", answer=LOST)
        tale.write(34.0 if answer else 36.0, answer=answer)
        assert tale.kinds() == set()


def test_most_answers_of_a_plain_history_have_one_right_value() -> None:
    tale = Tale()
    _running(tale)
    tale.write(11.0, M1)
    tale.write(12.0, answer="WX001")
    tale.write(40.0, answer="WX001")
    report = tale.check()
    assert (report.sharp, report.loose) == (2, 1)
    assert (report.writes, report.admitted, report.rejected["WX001"]) == (3, 1, 2)


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [0, 2, 4])
def test_acknowledged_rows_that_are_not_there_are_a_lost_write(found: int) -> None:
    tale = Tale()
    tale.write(1.0, rows=3, found=found)
    assert tale.kinds() == {"lost write"}


@pytest.mark.parametrize(("found", "kinds"), [(0, set()), (3, {"lost write"}), (6, set())])
def test_a_commit_without_an_answer_leaves_all_rows_or_none(found: int, kinds: set[str]) -> None:
    tale = Tale()
    tale.write(1.0, end=3.0, rows=3, more=(2.0,), outcome="lost", found=found)
    assert tale.kinds() == kinds


@pytest.mark.parametrize("answer", [LOST, "57P01", "08006"])
@pytest.mark.parametrize(("found", "kinds"), [(0, set()), (3, set()), (2, {"lost write"})])
def test_a_statement_without_an_answer_leaves_all_rows_or_none(
    answer: str, found: int, kinds: set[str]
) -> None:
    tale = Tale()
    outcome: Literal["lost", "failed"] = "lost" if answer == LOST else "failed"
    tale.write(1.0, rows=3, answer=answer, outcome=outcome, found=found)
    assert tale.kinds() == kinds


@pytest.mark.parametrize(
    ("outcome", "answer"), [("rolled back", None), ("failed", "40001"), ("failed", "57014")]
)
def test_rows_of_a_transaction_that_did_not_commit_are_ghosts(
    outcome: Literal["rolled back", "failed"], answer: str | None
) -> None:
    tale = Tale()
    tale.write(1.0, level=RR, answer=answer, outcome=outcome, found=1)
    assert tale.kinds() == {"ghost"}


def test_rows_that_no_client_wrote_are_ghosts() -> None:
    tale = Tale()
    tale.history.found[77] = 2
    (violation,) = tale.check().violations
    assert violation.kind == "ghost"
    assert "77" in render(violation)


def test_every_operation_has_an_answer() -> None:
    tale = Tale()
    tale.write(1.0).writes[0].returned = 0.0
    assert tale.kinds() == {"no answer"}
    tale = Tale()
    tale.write(1.0, outcome="lost", found=0).ended = 0.0
    assert tale.kinds() == {"no answer"}
    tale = Tale()
    tale.registry("create", 1.0, "running").returned = 0.0
    assert tale.kinds() == {"no answer"}


# For people --------------------------------------------------------------------------------------


def _noise(tale: Tale) -> None:
    """Operations of another machine, and others that do not matter."""
    tale.write(0.1)
    tale.activate(2.0, M2)
    for at in (2.2, 2.4, 2.6):
        tale.write(at, M2)
        tale.write(at + 0.1, answer="WX001")
    tale.registry("delete", 3.0, machine=M2)
    tale.write(30.0)


def test_shrinking_leaves_the_machine_that_was_fresh() -> None:
    tale = Tale()
    _noise(tale)
    tale.activate(40.0)
    for at in range(50, 200, 10):
        tale.registry("heartbeat", at)
        tale.write(at + 1, M1)
    wrong = tale.write(197.0)
    tale.write(198.0, answer="WX001")
    (violation,) = tale.check().violations
    short = shrink(violation).history
    assert short.transactions == [wrong]
    assert [(e.verb, e.status) for e in short.registry] == [
        ("create", "provisioning"),
        ("status", "running"),
        ("heartbeat", None),
    ]
    assert [v.identity for v in check(short).violations] == [violation.identity]


def test_shrinking_leaves_why_local_should_have_been_admitted() -> None:
    tale = Tale()
    _noise(tale)
    tale.activate(40.0)
    tale.registry("status", 50.0, "stopped")
    takeover = tale.write(71.0)
    tale.write(72.0)
    wrong = tale.write(73.0, answer="WX001")
    (violation,) = tale.check().violations
    assert violation.expected == {(None, "local holds again")}
    short = shrink(violation).history
    assert wrong in short.transactions
    assert len(short.transactions) == 2
    assert takeover.began <= short.transactions[0].began
    assert {e.verb for e in short.registry} >= {"create", "heartbeat"}


def test_shrinking_leaves_the_two_that_overlap() -> None:
    tale = Tale()
    _noise(tale)
    tale.write(41.0, end=43.0)
    tale.write(42.0, M1, end=44.0)
    tale.write(50.0)
    (overlap,) = [v for v in tale.check().violations if v.kind == "overlap"]
    short = shrink(overlap).history
    assert [t.tag for t in short.transactions] == list(overlap.tags)
    assert short.registry == []


def test_a_violation_reads_as_a_story() -> None:
    tale = Tale()
    tale.write(1.0)
    tale.activate(10.0)
    tale.write(15.0, end=17.0, more=(16.0,), stamp=17.0)
    first, second = tale.check().violations
    assert (first.write, second.write) == (0, 1)
    assert render(second) == "\n".join(
        [
            "admitted while fresh, user 0 #2: a local write got admission,"
            " could only get WX001 (cloud_active) (seed handmade)",
            "     0.0000  0.0020  fly     create m1 provisioning             done",
            "     0.5000  0.5020  fly     status m1 running                  done",
            "     1.0000  1.0020  fly     heartbeat m1                       done",
            "     6.0000  6.0020  tab #2  local insert of 1, read committed  admitted",
            "  >  7.0000  7.0020  tab #2  local insert of 1                  admitted",
            "     8.0000  8.0020  tab #2  end                                "
            "committed, stamped 8.0010, 2 rows found",
        ]
    )


def test_statements_that_were_sent_together_share_a_line() -> None:
    tale = Tale()
    tale.write(1.0, end=2.0, more=(1.0, 1.0), rows=5, found=0)
    (violation,) = tale.check().violations
    assert render(violation).splitlines()[1:] == [
        "  >  0.0000  0.0020  tab #1  local insert of 5, 3 times, read committed  admitted",
        "  >  1.0000  1.0020  tab #1  end                                         "
        "committed, 0 rows found",
    ]


# Simulated histories -----------------------------------------------------------------------------

SHORT = Settings(heartbeat_timeout=3.0, stop_grace=2.0, error_takeover_delay=4.0, drain_timeout=1.0)


@dataclass(frozen=True)
class Seen:
    """What a snapshot shows: the lease, and every machine's status and instants."""

    epoch: int = 0  # no lease yet
    holder: UUID | None = None
    claimant: UUID | None = None
    version: int = 0  # of the registry
    status: dict[UUID, str] = field(default_factory=dict)
    heartbeat: dict[UUID, float] = field(default_factory=dict)
    left: dict[UUID, float] = field(default_factory=dict)
    failed: dict[UUID, float] = field(default_factory=dict)

    def local_answer(self, at: float) -> str | None:
        """What the table says to a local write."""
        machine = self.claimant
        if machine is None:
            return None
        fresh = at - self.heartbeat.get(machine, -99.0) < SHORT.heartbeat_timeout
        cooling = at - self.left.get(machine, -99.0) < SHORT.stop_grace
        match self.status.get(machine):
            case "running":
                return "WX001" if fresh else None
            case "stopping":
                return "WX002" if fresh or cooling else None
            case "error":
                return "WX003"
            case "starting" if machine in self.failed:
                return "WX003"
            case _:
                return "WX002" if cooling else None

    def cloud_answer(self, machine: UUID, at: float) -> str | None:
        """What the table says to a cloud write."""
        if machine not in self.status:
            return "WX005"
        fresh = at - self.heartbeat.get(machine, -99.0) < SHORT.heartbeat_timeout
        takeover = self.local_answer(at) is None
        return None if self.claimant == machine and fresh and not takeover else "WX004"


@dataclass
class Open:
    """A transaction that is open, and what it saw when it began."""

    transaction: Transaction
    snapshot: Seen
    locked: bool = False


class Simulation:
    """One user's database, as it should be. It does one thing at each instant.

    An operation that would have to wait does nothing instead. Clients know only the windows of
    their operations, and now and then a connection is lost.
    """

    def __init__(self, rng: random.Random, user: int = 0) -> None:
        self.rng = rng
        self.user = user
        self.history = History("simulated", SHORT)
        self.now = Seen()
        self.at = 0.0
        self.blur = rng.choice([0.0005, 0.01, 0.1])
        self.machine = UUID(int=user << 32)
        self.locked_by: int | None = None
        self.open: dict[str, Open] = {}
        self.free: defaultdict[str, float] = defaultdict(float)
        self.tags = count(user << 32)

    def run(self, steps: int) -> History:
        """A history of so many steps."""
        acts: list[tuple[str, Callable[[str], None]]] = [
            ("fly", self._live),
            ("fly", self._live),
            ("person", self._confirm),
            *((name, self._write) for name in ("tab", "phone", "tablet", "writer", "relay")),
        ]
        for _ in range(steps):
            self.at += self.rng.expovariate(10.0)
            actor, act = self.rng.choice(acts)
            if self.at > self.free[actor]:
                act(actor)
        for actor in list(self.open):
            self.at = max(self.at, self.free[actor]) + 0.1
            self._end(actor)
        return self.history

    def _window(self, actor: str) -> tuple[float, float]:
        earlier, later = self.rng.uniform(0, self.blur), self.rng.uniform(0, self.blur)
        invoked = max(self.at - earlier, self.free[actor])
        self.free[actor] = self.at + later
        return invoked, self.at + later

    # ------------------------------------------------------------------------- the registry

    def _live(self, actor: str) -> None:
        status = self.now.status.get(self.machine)
        verb: Literal["create", "status", "heartbeat", "delete", "confirm"] = "heartbeat"
        word = None
        if status is None:
            self.machine = UUID(int=self.machine.int + 1)
            verb, word = "create", "starting"
        elif self.rng.random() < 0.4:
            verb = "status"
            word = self.rng.choice(["running"] * 3 + ["stopping", "stopped", "error", "starting"])
        elif self.rng.random() < 0.03:
            verb = "delete"
        self._register(actor, verb, word)

    def _confirm(self, actor: str) -> None:
        machine = self.now.claimant
        if machine is None or machine not in self.now.failed:
            return
        early = self.at - self.now.failed[machine] < SHORT.error_takeover_delay
        if early:
            self._register(actor, "confirm", None, "WX003")
        elif self.locked_by is None and not self.open.keys() & {"writer", "relay"}:
            self._register(actor, "confirm", "stopped")
            self.now = replace(self.now, claimant=None, holder=None, epoch=self.now.epoch + 1)

    def _register(
        self,
        actor: str,
        verb: Literal["create", "status", "heartbeat", "delete", "confirm"],
        word: str | None,
        answer: str | None = None,
    ) -> None:
        lost = answer is None and verb != "confirm" and self.rng.random() < 0.02
        happens = answer is None and not (lost and self.rng.random() < 0.5)
        self.history.registry.append(
            RegistryWrite(
                self.user,
                actor,
                verb,
                self.machine,
                *self._window(actor),
                word if verb != "confirm" else None,
                LOST if lost else answer,
            )
        )
        if happens:
            self._happen(verb, word)

    def _happen(self, verb: str, word: str | None) -> None:
        now = replace(deepcopy(self.now), version=self.now.version + 1)
        machine, at = self.machine, self.at
        old = now.status.get(machine)
        if verb == "heartbeat":
            now.heartbeat[machine] = at
        elif verb == "delete":
            del now.status[machine]
            now.heartbeat.pop(machine, None)
            now.failed.pop(machine, None)
            now.left.setdefault(machine, at)
        elif word is not None and word != old:
            now.status[machine] = word
            if verb == "create" and self.locked_by is None:
                now = replace(now, epoch=max(now.epoch, 1))
            if word == "running":
                now.left.pop(machine, None)
            elif old == "running":
                now.left[machine] = at
            else:
                now.left.setdefault(machine, at)
            if word == "error":
                now.failed.setdefault(machine, at)
            elif word != "starting":
                now.failed.pop(machine, None)
        self.now = now
        fresh = at - now.heartbeat.get(machine, -99.0) < SHORT.heartbeat_timeout
        if now.status.get(machine) == "running" and fresh and self.locked_by is None:
            incumbent = now.claimant
            if incumbent is None or now.cloud_answer(incumbent, at) is not None:
                self.now = replace(now, claimant=machine, epoch=max(now.epoch, 1))

    # --------------------------------------------------------------------------- who writes

    def _write(self, actor: str) -> None:
        rng = self.rng
        machine = self.machine if actor in ("writer", "relay") else None
        if actor in self.open:
            if rng.random() < 0.5:
                self._end(actor)
            else:
                self._statement(actor, self.open[actor])
            return
        level = rng.choice([RC, RC, RR])
        begun = Open(Transaction(next(self.tags), self.user, actor, level, "direct", 0.0), self.now)
        if rng.random() < 0.5 and level == RR:
            begun.transaction.began, _ = self._window(actor)
            begun.transaction.writes = []
            self.open[actor] = begun
            return
        self._statement(actor, begun, machine=machine)
        if actor in self.open and rng.random() < 0.5:
            self._end(actor, at_once=True)

    def _statement(self, actor: str, begun: Open, machine: UUID | None = None) -> None:
        transaction = begun.transaction
        if actor in ("writer", "relay"):
            machine = transaction.machine or self.machine
        answer, waits = self._decide(begun, machine)
        if waits:
            return
        first = not transaction.writes and actor not in self.open
        window = self._window(actor)
        if first:
            transaction.began = window[0]
        transaction.writes.append(
            Write(*window, machine, self.rng.choice([1, 100]), "insert", answer)
        )
        if answer is None:
            self.open[actor] = begun
            return
        if not first:
            del self.open[actor]
        transaction.outcome, transaction.answer = "failed", answer
        transaction.ending, transaction.ended = window
        if self.locked_by == transaction.tag:
            self.locked_by = None
        self.history.transactions.append(transaction)

    def _decide(self, begun: Open, machine: UUID | None) -> tuple[str | None, bool]:
        """The answer, and whether there is none yet."""
        tag = begun.transaction.tag
        by_snapshot = begun.transaction.level == RR
        seen = begun.snapshot if by_snapshot else self.now
        if self.locked_by == tag:
            seen = replace(seen, claimant=machine)
        if machine is None:
            answer = seen.local_answer(self.at)
        else:
            answer = seen.cloud_answer(machine, self.at)
        if answer is not None or self.locked_by == tag:
            return answer, False
        now = self.now
        holds = seen.epoch > 0 and seen.holder == machine and seen.claimant == machine
        # The holder may write by an old snapshot; a handover needs the newest state.
        is_newest = (now.claimant, now.version) == (seen.claimant, seen.version)
        if by_snapshot and (now.epoch != seen.epoch or not (holds or is_newest)):
            return "40001", False
        if self.locked_by is not None:
            return None, True
        if not holds:
            # A handover, or the end of a drain: no other transaction may be writing.
            if any(other.locked for other in self.open.values() if other is not begun):
                return None, True
            self.locked_by = tag
        begun.locked = True
        return None, False

    def _end(self, actor: str, at_once: bool = False) -> None:
        begun = self.open.pop(actor)
        transaction = begun.transaction
        if not transaction.writes:
            return
        last = transaction.writes[-1]
        window = (last.invoked, last.returned) if at_once else self._window(actor)
        transaction.ending, transaction.ended = window
        commits = at_once or self.rng.random() < 0.8
        lost = not at_once and self.rng.random() < 0.05
        transaction.outcome = "lost" if lost else "committed" if commits else "rolled back"
        if commits:
            self.history.found[transaction.tag] = sum(w.rows for w in transaction.writes)
            self.history.committed_at[transaction.tag] = self.at
        if self.locked_by == transaction.tag:
            self.locked_by = None
            if commits:
                machine = transaction.machine
                epoch = max(self.now.epoch + (self.now.holder != machine), 1)
                self.now = replace(self.now, epoch=epoch, holder=machine, claimant=machine)
        self.history.transactions.append(transaction)


def _simulate(seed: object, steps: int = 600) -> History:
    return Simulation(random.Random(f"simulation/{seed}")).run(steps)


@pytest.mark.parametrize("seed", range(20))
def test_a_correct_history_is_not_accused(seed: int) -> None:
    report = check(_simulate(seed))
    assert report.violations == [], render(report.violations[0])
    assert report.sharp > 50


def test_simulated_histories_have_everything_in_them() -> None:
    reports = [check(_simulate(seed)) for seed in range(20)]
    rejected = sum((report.rejected for report in reports), Counter[str]())
    assert rejected.keys() >= {"WX001", "WX002", "WX003", "WX004", "40001"}
    assert sum(report.sharp for report in reports) > sum(report.loose for report in reports)


def test_a_write_moved_into_the_other_environment_is_caught() -> None:
    moved = 0
    for seed in range(20):
        history = _simulate(seed)
        by_cloud = [
            t
            for t in history.transactions
            if t.machine is not None
            and t.outcome == "committed"
            and t.writes[0].returned + 0.01 < t.ending
        ]
        by_local = [
            t for t in history.transactions if t.machine is None and t.outcome == "committed"
        ]
        if not by_cloud or not by_local:
            continue
        rng = random.Random(seed)
        cloud, local = rng.choice(by_cloud), rng.choice(by_local)
        middle = (cloud.writes[0].returned + cloud.ending) / 2
        _move(history, local, middle)
        found = [v for v in check(history).violations if v.kind == "overlap"]
        assert any(local.tag in violation.tags for violation in found)
        moved += 1
    assert moved > 5


def _move(history: History, transaction: Transaction, to: float) -> None:
    """Let it happen at another time, within a millisecond."""
    transaction.began = transaction.ending = to
    for write in transaction.writes:
        write.invoked, write.returned = to, to + MS
    transaction.ended = to + 2 * MS
    history.committed_at[transaction.tag] = to + MS


def test_an_answer_that_is_replaced_is_caught() -> None:
    caught = Counter[bool]()
    for seed in range(20):
        history = _simulate(seed)
        rng = random.Random(seed)
        rejected = [
            t
            for t in history.transactions
            if t.level == RC and t.outcome == "failed" and len(t.writes) == 1
        ]
        wrong = rng.choice(rejected)
        wrong.writes[0].answer = {"WX001": "WX002", "WX002": "WX003", "WX003": "WX001"}.get(
            str(wrong.answer), "WX001"
        )
        violations = check(history).violations
        caught[any(wrong.tag in violation.tags for violation in violations)] += 1
    assert caught[True] > 4 * caught[False]


def test_many_users_are_checked_each_by_their_own() -> None:
    whole = History("simulated", SHORT)
    for user in range(20):
        part = Simulation(random.Random(f"users/{user}"), user).run(600)
        whole.transactions += part.transactions
        whole.registry += part.registry
        whole.found |= part.found
        whole.committed_at |= part.committed_at
    report = check(whole)
    assert report.violations == []
    assert report.transactions == len(whole.transactions) > 2000
