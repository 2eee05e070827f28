"""The random workload, in short: arbiter passes, and the checker catches the naive rules.

The long version, with faults, is ``make prove``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from typing import get_args

import psycopg
import pytest

from arbiter_db.demo.embedded import EmbeddedServer
from proof.checker import check, render
from proof.clients import Place
from proof.history import History, Level, Transaction
from proof.pgbouncer import PgBouncer, fetch
from proof.rounds import ONLY_ARBITERS, UNSAFE, Tally
from proof.steps import ACTORS, Plan, dice, machine_steps, person_steps, writer_steps
from proof.workload import SERVER_OPTIONS, Round, Rule, create_database, create_roles, play

pytestmark = pytest.mark.slow

MAJOR = int(os.environ.get("PG") or "18")
ROUND_S = 2.0
UNSAFE_ROUND_S = 1.0
USERS = tuple(range(4))
#: At most this many rounds are played until everything expected was seen.
ROUNDS = 20

#: Everything that a complete workload has; 40001 is the server's own.
EXPECTED: dict[str, set[str | None]] = {
    "via": {"direct", "pgbouncer"},
    "level": set(get_args(Level)),
    "how": {"insert", "batch", "copy"},
    "rejected": {"WX001", "WX002", "WX003", "WX004", "WX007", "40001"},
    "admitted": {"local", "cloud"},
    "actor": set(ACTORS),
    "outcome": {"committed", "rolled back", "failed"},
    "verb": {"create", "status", "heartbeat", "delete", "confirm"},
    "confirm": {None, "55000", "WX001"},
}

_numbers = count(1)


class Stage:
    """A server and a pooler of this module's own: commit timestamps must be on."""

    def __init__(self, server: EmbeddedServer, bouncer: PgBouncer) -> None:
        self.server = server
        self.bouncer = bouncer

    def place(self, rule: Rule) -> Place:
        """A fresh database in which that rule decides."""
        name = f"round_{next(_numbers)}"
        create_database(self.server, name, rule)
        return Place.of(self.server, self.bouncer, name)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    fetch()
    with EmbeddedServer(MAJOR, SERVER_OPTIONS) as server, PgBouncer(server) as bouncer:
        create_roles(server)
        yield Stage(server, bouncer)


def played(stage: Stage, rule: Rule, seed: str, seconds: float = ROUND_S) -> tuple[Place, History]:
    place = stage.place(rule)
    return place, play(Round(seed, rule, place, USERS, seconds))


# Arbiter -----------------------------------------------------------------------------------------


def left_out(histories: list[History]) -> dict[str, set[str | None]]:
    """The part of EXPECTED that appears in none of them."""
    seen: dict[str, set[str | None]] = {kind: set() for kind in EXPECTED}
    for history in histories:
        for transaction in history.transactions:
            seen["via"].add(transaction.via)
            seen["level"].add(transaction.level)
            seen["actor"].add(transaction.actor)
            seen["outcome"].add(transaction.outcome)
            for write in transaction.writes:
                seen["how"].add(write.how)
                seen["rejected"].add(write.answer)
                if write.answer is None:
                    seen["admitted"].add(write.source)
        for entry in history.registry:
            seen["actor"].add(entry.actor)
            seen["verb"].add(entry.verb)
            if entry.verb == "confirm":
                seen["confirm"].add(entry.answer)
    return {kind: missing for kind in EXPECTED if (missing := EXPECTED[kind] - seen[kind])}


@pytest.fixture(scope="module")
def rounds(stage: Stage) -> list[tuple[Place, History]]:
    """Two rounds of different seeds by arbiter, and more as long as something is left out."""
    found: list[tuple[Place, History]] = []
    while len(found) < 2 or (left_out([h for _, h in found]) and len(found) < ROUNDS):
        found.append(played(stage, "arbiter", f"arbiter {len(found)}"))
    return found


def test_arbiter_stands_the_workload(rounds: list[tuple[Place, History]]) -> None:
    sharp = 0
    for _, history in rounds:
        report = check(history)
        assert not report.violations, render(report.violations[0])
        sharp += report.sharp
    assert sharp > 100, "there was hardly anything to judge"


def test_the_rows_agree_with_the_history_of_handovers(
    stage: Stage, rounds: list[tuple[Place, History]]
) -> None:
    holders: set[str] = set()
    for place, _ in rounds:
        with psycopg.connect(stage.server.conninfo(place.dbname)) as conn:
            findings = conn.execute(
                "select a from arbiter.audit('public.signals') a where finding <> 'not_provable'"
            ).fetchall()
            handovers = conn.execute("select to_holder from arbiter.handovers where epoch > 1")
            holders |= {holder for (holder,) in handovers}
        assert findings == []
    assert holders == {"local", "cloud"}


def test_arbiter_does_not_deadlock(rounds: list[tuple[Place, History]]) -> None:
    tally = Tally()
    for _, history in rounds:
        tally.add(history)
    assert tally.rejected["40P01"] == 0


def test_the_workload_leaves_nothing_out(rounds: list[tuple[Place, History]]) -> None:
    assert left_out([history for _, history in rounds]) == {}


def test_every_commit_is_dated_within_its_transaction(
    rounds: list[tuple[Place, History]],
) -> None:
    for _, history in rounds:
        by_tag = {t.tag: t for t in history.transactions}
        assert len(by_tag) == len(history.transactions)
        assert history.committed_at
        for tag, committed_at in history.committed_at.items():
            transaction = by_tag[tag]
            assert transaction.began <= committed_at <= transaction.ended


# The naive rules ---------------------------------------------------------------------------------


@pytest.mark.naive
@pytest.mark.parametrize("rule", UNSAFE)
def test_the_checker_catches_the_unsafe_rule(stage: Stage, rule: Rule) -> None:
    for number in range(ROUNDS):
        _, history = played(stage, rule, f"unsafe {number}", UNSAFE_ROUND_S)
        found = [v for v in check(history).violations if v.kind not in ONLY_ARBITERS]
        if found:
            break
    assert {violation.kind for violation in found} <= {"overlap", "admitted while fresh"}
    assert found, "the checker proves nothing of arbiter when this one passes"


@pytest.mark.naive
def test_the_one_step_lock_deadlocks(stage: Stage) -> None:
    # It keeps exclusion, but its handovers and the open transactions of others wait for each other.
    one_step = Tally()
    for number in range(ROUNDS):
        one_step.add(played(stage, "one_step", f"one_step {number}")[1])
        if one_step.rejected["40P01"]:
            break
    assert one_step.rejected["40P01"] > 0


# The steps ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_steps() -> None:
    def steps(seed: str, user: int) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for name, actor in ACTORS.items():
            rng = dice(seed, user, name)
            if actor.environment is not None:
                found[name] = list(islice(writer_steps(rng, actor), 300))
            else:
                makers = {"fly": machine_steps, "person": person_steps}
                found[name] = list(islice(makers[name](rng), 300))
        return found

    assert steps("a", 1) == steps("a", 1)
    for other in (steps("b", 1), steps("a", 2)):
        assert all(other[name] != mine for name, mine in steps("a", 1).items())


def test_what_was_done_is_what_was_drawn(rounds: list[tuple[Place, History]]) -> None:
    _, history = rounds[0]
    for user in USERS:
        for name, actor in ACTORS.items():
            if actor.environment is None:
                continue
            done = sorted(
                (t for t in history.transactions if (t.user, t.actor) == (user, name)),
                key=lambda t: t.tag,
            )
            drawn = islice(writer_steps(dice("arbiter 0", user, name), actor), len(done))
            for transaction, plan in zip(done, drawn, strict=True):
                assert follows(transaction, plan)


def follows(transaction: Transaction, plan: Plan) -> bool:
    """Whether the transaction is the plan's, as far as it went before it failed."""
    written = [(w.how, w.rows) for w in transaction.writes]
    planned = [(s.how, s.rows) for s in plan.statements]
    whole = transaction.outcome != "failed" or transaction.writes[-1].answer is None
    return (
        transaction.level == plan.level
        and planned[: len(written)] == written
        and (not whole or len(written) == len(planned))
    )


# PgBouncer ---------------------------------------------------------------------------------------


def test_the_pooler_pools_transactions_and_comes_back(stage: Stage) -> None:
    def connect() -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            bouncer.conninfo(user="app_owner"), autocommit=True, prepare_threshold=None
        )

    with PgBouncer(stage.server, pool_size=1) as bouncer:
        first, second = connect(), connect()
        backends = {conn.execute("select pg_backend_pid()").fetchone() for conn in (first, second)}
        assert len(backends) == 1, "two clients share the one connection of the pool"
        assert re.fullmatch(r"\d+\.\d+", bouncer.version)
        first.execute("begin")
        bouncer.kill()
        assert bouncer.pid is None
        with pytest.raises(psycopg.OperationalError):
            first.execute("commit")
        assert first.closed
        second.close()
        bouncer.start()
        with connect() as third:
            assert third.execute("select 1").fetchone() == (1,)
        place = bouncer.host
    assert not os.path.exists(place)


def test_the_actors_are_spread(rounds: list[tuple[Place, History]]) -> None:
    by_actor = Counter(t.actor for _, h in rounds for t in h.transactions)
    assert min(by_actor.values()) > 20, by_actor
