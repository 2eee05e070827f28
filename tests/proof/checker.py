"""Checks whether the answers that clients saw can be right in any order of events.

    report = check(history)
    for violation in report.violations:
        print(render(violation))

The checker uses the history and the commit order only, nothing from arbiter. It accuses only where
the windows of the history leave no doubt, so a correct database is never accused.
``Report.sharp`` counts the answers where one answer alone could be right.

====================  ==============================================================================
kind                  what went wrong
====================  ==============================================================================
overlap               two committed transactions of a user, of different environments or machines,
                      were both between their first admitted write and their commit at one instant
admitted while fresh  a local write was admitted while the lease was for a machine that had
                      reported healthy, ran, and was fresh, from before the write to after it
wrong answer          an answer that the decision tables can't give at any instant of the operation
lost write            rows of an acknowledged transaction are missing, or rows are there twice, or
                      some rows of a transaction without an answer are there and some are not
ghost                 rows of a transaction that failed or was rolled back, or of none at all
no answer             an operation that neither got an answer nor lost its connection
====================  ==============================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import groupby
from math import inf
from typing import Literal, TypeVar
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proof.history import LOST, History, RegistryWrite, Transaction, Write
from proof.oracle import (
    CLOCK_ERROR,
    Expected,
    Oracle,
    first_admitted,
    is_committed,
    is_no_verdict,
    may_have_committed,
)

__all__ = ["Kind", "Report", "Violation", "check", "render", "shrink"]

Kind = Literal[
    "overlap", "admitted while fresh", "wrong answer", "lost write", "ghost", "no answer"
]
Operation = Transaction | RegistryWrite


@dataclass(frozen=True, slots=True)
class Violation:
    """A result that no correct database gives.

    ``operations`` are those that it is about, ``write`` the number of the write in the first one,
    ``expected`` the answers that would have been right, with their reasons. ``history`` shows it:
    the whole run's, and after ``shrink`` no more than is needed.
    """

    kind: Kind
    user: int
    message: str
    operations: tuple[Operation, ...]
    history: History = field(repr=False)
    write: int | None = None
    expected: Expected = frozenset()

    @property
    def tags(self) -> tuple[int, ...]:
        """The tags of the transactions that it is about."""
        return tuple(op.tag for op in self.operations if isinstance(op, Transaction))

    @property
    def identity(self) -> object:
        """The parts that stay the same while the history around it shrinks."""
        instants = [op.invoked for op in self.operations if isinstance(op, RegistryWrite)]
        return self.kind, self.user, self.tags, instants, self.write, self.expected


@dataclass(slots=True)
class Report:
    """The result of a check, and how much it could decide.

    ``sharp`` counts the writes and the yeses for which one answer alone was right, ``loose`` those
    for which several were (a serialization failure above read committed aside), ``no_verdict``
    those whose answer does not tell who may write. The longest durations are in seconds and of
    operations that were answered.
    """

    violations: list[Violation] = field(default_factory=list)
    transactions: int = 0
    committed: int = 0
    writes: int = 0
    admitted: int = 0
    sharp: int = 0
    loose: int = 0
    no_verdict: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    registry_writes: int = 0
    longest_write: float = 0.0
    longest_registry_write: float = 0.0

    @property
    def kinds(self) -> Counter[str]:
        """How many violations of each kind."""
        return Counter(violation.kind for violation in self.violations)


@dataclass(frozen=True, slots=True)
class _User:
    number: int
    transactions: list[Transaction] = field(default_factory=list)
    registry: list[RegistryWrite] = field(default_factory=list)


def check(history: History) -> Report:
    """Everything that is certainly wrong in a history. Takes n log n time in its operations."""
    report = Report()
    users: dict[int, _User] = {}
    for transaction in history.transactions:
        user = users.setdefault(transaction.user, _User(transaction.user))
        user.transactions.append(transaction)
    for write in history.registry:
        users.setdefault(write.user, _User(write.user)).registry.append(write)
    for _, user in sorted(users.items()):
        _Check(history, user, report).run()
    tags = {transaction.tag for transaction in history.transactions}
    for tag, rows in history.found.items():
        if tag not in tags:
            message = f"{rows} rows of a transaction {tag} that no client made"
            report.violations.append(Violation("ghost", -1, message, (), history))
    return report


class _Check:
    """The check of one user."""

    def __init__(self, history: History, user: _User, report: Report) -> None:
        self.history = history
        self.user = user
        self.report = report

    def run(self) -> None:
        self._find_unanswered()
        self._compare_rows()
        self._find_overlaps()
        self._judge_answers()

    def _accuse(
        self,
        kind: Kind,
        message: str,
        *operations: Operation,
        write: int | None = None,
        expected: Expected = frozenset(),
    ) -> None:
        self.report.violations.append(
            Violation(kind, self.user.number, message, operations, self.history, write, expected)
        )

    def _found(self, transaction: Transaction) -> int:
        return self.history.found.get(transaction.tag, 0)

    def _is_committed(self, transaction: Transaction) -> bool:
        return is_committed(transaction, self._found(transaction))

    # -------------------------------------------------------------------------- completeness

    def _find_unanswered(self) -> None:
        for transaction in self.user.transactions:
            for number, write in enumerate(transaction.writes):
                if not _is_answered(write.invoked, write.returned):
                    self._accuse("no answer", "a write has no answer", transaction, write=number)
            if not _is_answered(transaction.began, transaction.ended):
                self._accuse("no answer", "a transaction has no end", transaction)
        for entry in self.user.registry:
            if not _is_answered(entry.invoked, entry.returned):
                self._accuse("no answer", f"a {entry.verb} has no answer", entry)

    def _compare_rows(self) -> None:
        for transaction in self.user.transactions:
            found = self._found(transaction)
            admitted = sum(w.rows for w in transaction.writes if w.answer is None)
            maybe = sum(w.rows for w in transaction.writes if may_have_committed(w.answer))
            if transaction.outcome == "committed":
                if found != admitted:
                    message = f"{found} rows found of {admitted} that were acknowledged"
                    self._accuse("lost write", message, transaction)
            elif self._is_committed(transaction):
                if found != admitted + maybe:
                    message = f"{found} rows found of {admitted + maybe}, which commit together"
                    self._accuse("lost write", message, transaction)
            elif found:
                message = f"{found} rows found of a transaction that {_ENDED[transaction.outcome]}"
                self._accuse("ghost", message, transaction)

    # ------------------------------------------------------------------------------- overlap

    def _find_overlaps(self) -> None:
        """One pass over the transactions by the instant that each was surely not yet over.

        ``since``: it was admitted by then. ``until``: it had not committed before. Two were open at
        once when each was admitted before the other had committed. For each transaction, of those
        admitted before its commit the one that committed last decides; two are kept, of different
        writers, so that one of them is another writer's.
        """
        spans: list[tuple[float, float, Transaction]] = []
        for transaction in self.user.transactions:
            committed = self._is_committed(transaction)
            first = first_admitted(transaction, committed)
            if committed and first is not None:
                stamp = self.history.committed_at.get(transaction.tag, -inf) - CLOCK_ERROR
                until = min(max(transaction.ending, stamp), transaction.ended)
                spans.append((first.returned, until, transaction))
        by_since = sorted(spans, key=lambda span: span[0])
        last: list[tuple[float, Transaction]] = []
        seen: set[frozenset[int]] = set()
        started = 0
        for since, until, transaction in sorted(spans, key=lambda span: span[1]):
            while started < len(by_since) and by_since[started][0] < until:
                last = _last_two(last, by_since[started][1], by_since[started][2])
                started += 1
            for other_until, other in last:
                if other.machine == transaction.machine or other_until <= since:
                    continue
                pair = frozenset((transaction.tag, other.tag))
                if pair not in seen:
                    seen.add(pair)
                    both = sorted((transaction, other), key=lambda t: (t.began, t.tag))
                    message = "two writers of one user had admitted writes open at one instant"
                    self._accuse("overlap", message, *both)

    # ------------------------------------------------------------------------------- answers

    def _judge_answers(self) -> None:
        report = self.report
        transactions = [_complete(t) for t in self.user.transactions]
        registry = [_completed(entry) for entry in self.user.registry]
        oracle = Oracle(
            self.history.settings,
            transactions,
            registry,
            self.history.found,
            self.history.committed_at,
            self.history.strangers,
        )
        for original, transaction in zip(self.user.transactions, transactions, strict=True):
            committed = self._is_committed(original)
            report.transactions += 1
            report.committed += committed
            for number, write in enumerate(transaction.writes):
                report.writes += 1
                if write.answer is None:
                    report.admitted += 1
                elif is_no_verdict(write.answer):
                    report.no_verdict[write.answer] += 1
                    continue
                else:
                    report.rejected[write.answer] += 1
                report.longest_write = max(report.longest_write, write.returned - write.invoked)
                expected = oracle.answers(transaction, write)
                right = {answer for answer, _ in expected}
                self._count(right)
                if write.answer in right:
                    continue
                is_active = right - {"40001"} == {"WX001"}
                kind: Kind = "wrong answer"
                if committed and write.answer is None and write.machine is None and is_active:
                    kind = "admitted while fresh"
                message = f"a {write.source} write {_judged(write.answer, expected, 'admission')}"
                self._accuse(kind, message, original, write=number, expected=expected)
        for first, entry in zip(self.user.registry, registry, strict=True):
            report.registry_writes += 1
            if entry.answer is not None and is_no_verdict(entry.answer):
                report.no_verdict[entry.answer] += 1
                continue
            waited = entry.returned - entry.invoked
            report.longest_registry_write = max(report.longest_registry_write, waited)
            expected = oracle.registry_answers(entry)
            right = {answer for answer, _ in expected}
            if entry.verb == "confirm":
                self._count(right)
            if entry.answer not in right:
                message = f"a {entry.verb} {_judged(entry.answer, expected, 'done')}"
                self._accuse("wrong answer", message, first, expected=expected)

    def _count(self, right: set[str | None]) -> None:
        """Note how many answers would have been right."""
        # The foreign key and the guard both reject a machine that does not exist.
        is_sharp = len(right - {"40001", "23503"}) == 1
        self.report.sharp += is_sharp
        self.report.loose += not is_sharp


_ENDED = {"rolled back": "was rolled back", "failed": "failed", "lost": "never committed"}


def _last_two(
    last: list[tuple[float, Transaction]], until: float, transaction: Transaction
) -> list[tuple[float, Transaction]]:
    """The two that committed last, of different writers, with one more to choose from."""
    for kept_until, kept in last:
        if kept.machine == transaction.machine:
            if until <= kept_until:
                return last
            last = [pair for pair in last if pair[1] is not kept]
            break
    return sorted([*last, (until, transaction)], key=lambda pair: -pair[0])[:2]


def _is_answered(invoked: float, returned: float) -> bool:
    return invoked <= returned < inf


def _complete(transaction: Transaction) -> Transaction:
    """The transaction with its unanswered operations taken as lost and never ended."""
    has_ended = _is_answered(transaction.began, transaction.ended)
    if has_ended and all(_is_answered(w.invoked, w.returned) for w in transaction.writes):
        return transaction
    writes = [_completed(write) for write in transaction.writes]
    return replace(transaction, writes=writes, ended=transaction.ended if has_ended else inf)


_W = TypeVar("_W", Write, RegistryWrite)


def _completed(write: _W) -> _W:
    if _is_answered(write.invoked, write.returned):
        return write
    return replace(write, returned=inf, answer=LOST)


def _judged(answer: str | None, expected: Expected, success: str) -> str:
    right = " or ".join(sorted(f"{answer or success} ({reason})" for answer, reason in expected))
    return f"got {answer or success}, could only get {right or 'to wait'}"


# The shortest history --------------------------------------------------------------------------


def shrink(violation: Violation) -> Violation:
    """The same violation, with the shortest history that shows it.

    Operations of the user are dropped while a check of the others finds the same: the same
    kind, of the same operations, with the same answers that would have been right.
    """
    whole = violation.history
    needed = violation.operations
    if not needed:
        return replace(violation, history=_part(whole, ()))
    operations: list[Operation] = [t for t in whole.transactions if t.user == violation.user]
    operations += [entry for entry in whole.registry if entry.user == violation.user]
    # Operations that began after the last of these had returned cannot matter.
    end = max(_last_instant(op) for op in needed)
    others = sorted(
        (op for op in operations if not _is_in(op, needed) and _start(op) <= end), key=_start
    )

    def shows(kept: Sequence[Operation]) -> Violation | None:
        found = check(_part(whole, [*kept, *needed])).violations
        return next((v for v in found if v.identity == violation.identity), None)

    # Mostly the last few before them are enough.
    few = 0
    while few < len(others) and not shows(others[len(others) - few :]):
        few = max(8, 4 * few)
    kept = others[max(len(others) - few, 0) :]
    size = max(len(kept), 1)
    while True:
        shorter = kept
        # The latest first: later operations depend on earlier ones.
        for at in range((len(kept) - 1) // size * size, -1, -size):
            without = shorter[:at] + shorter[at + size :]
            if len(without) < len(shorter) and shows(without):
                shorter = without
        if size == 1 and len(shorter) == len(kept):
            break
        kept, size = shorter, max(size // 2, 1)
    return shows(kept) or violation


def _part(history: History, operations: Sequence[Operation]) -> History:
    transactions = [op for op in operations if isinstance(op, Transaction)]
    tags = {transaction.tag for transaction in transactions}
    return replace(
        history,
        transactions=sorted(transactions, key=_start),
        registry=sorted((op for op in operations if isinstance(op, RegistryWrite)), key=_start),
        found={tag: rows for tag, rows in history.found.items() if tag in tags},
        committed_at={tag: at for tag, at in history.committed_at.items() if tag in tags},
    )


def _is_in(operation: Operation, operations: Sequence[Operation]) -> bool:
    return any(operation is other for other in operations)


def _start(operation: Operation) -> float:
    return operation.began if isinstance(operation, Transaction) else operation.invoked


def _last_instant(operation: Operation) -> float:
    return operation.ended if isinstance(operation, Transaction) else operation.returned


# Output ---------------------------------------------------------------------------------------


def render(violation: Violation) -> str:
    """The violation and the shortest history that shows it, one line for each step.

    Times are in seconds from the first step: of invocation and return. The accused operation
    is marked.
    """
    short = shrink(violation)
    first = [entry.invoked for entry in short.history.registry]
    first += [write.invoked for t in short.history.transactions for write in t.writes]
    zero = min(first, default=0.0)
    steps = sorted(_steps(short, zero), key=lambda step: step.invoked)
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for step in steps:
        cells = (
            ">" if step.accused else "",
            f"{step.invoked - zero:.4f}",
            f"{step.returned - zero:.4f}" if step.returned >= step.invoked else "?",
            step.who,
            step.what,
            step.answer,
        )
        table.add_row(*(Text(cell) for cell in cells))
    output = StringIO()
    Console(file=output, width=200, color_system=None).print(table)
    whose = "" if short.user < 0 else f", user {short.user}"
    tags = "".join(f" #{tag}" for tag in short.tags)
    title = f"{short.kind}{whose}{tags}: {short.message} (seed {short.history.seed})"
    lines = (line.rstrip() for line in output.getvalue().splitlines())
    return "\n".join([title, *(f"  {line}" for line in lines if line)])


@dataclass(frozen=True, slots=True)
class _Step:
    invoked: float
    returned: float
    who: str
    what: str
    answer: str
    accused: bool


def _steps(violation: Violation, zero: float) -> Iterator[_Step]:
    history, accused = violation.history, violation.operations
    names = _machine_names(history)
    for entry in history.registry:
        what = " ".join(filter(None, (entry.verb, names[entry.machine], entry.status)))
        answer = "done" if entry.answer is None else entry.answer
        is_accused = _is_in(entry, accused)
        yield _Step(entry.invoked, entry.returned, entry.actor, what, answer, is_accused)
    for transaction in history.transactions:
        who = f"{transaction.actor} #{transaction.tag}"
        is_accused = _is_in(transaction, accused)
        level = f", {transaction.level}"
        number = 0
        # Statements that were sent together share a line.
        for write, alike in groupby(transaction.writes):
            times = len(list(alike))
            source = "local" if write.machine is None else f"cloud {names[write.machine]}"
            what = f"{source} {write.how} of {write.rows}{f', {times} times' * (times > 1)}{level}"
            level = ""
            is_it = violation.write is None or number <= violation.write < number + times
            number += times
            answer = "admitted" if write.answer is None else f"rejected: {write.answer}"
            yield _Step(write.invoked, write.returned, who, what, answer, is_accused and is_it)
        answer = transaction.outcome
        if transaction.tag in history.committed_at:
            answer += f", stamped {history.committed_at[transaction.tag] - zero:.4f}"
        answer += f", {history.found.get(transaction.tag, 0)} rows found"
        is_accused = is_accused and violation.write is None
        yield _Step(transaction.ending, transaction.ended, who, "end", answer, is_accused)


def _machine_names(history: History) -> dict[UUID, str]:
    """Short names for the machines of a history, in the order of their appearance."""
    seen = [(entry.invoked, entry.machine) for entry in history.registry]
    seen += [
        (write.invoked, write.machine)
        for transaction in history.transactions
        for write in transaction.writes
        if write.machine is not None
    ]
    names: dict[UUID, str] = {}
    for _, machine in sorted(seen):
        names.setdefault(machine, f"m{len(names) + 1}")
    return names
