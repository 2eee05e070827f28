"""A sample of the interleavings of ``proof.interleavings``, by pair of operations.

``python -m proof.interleavings`` plays all of them; a failure here prints the id that replays its
case there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import comb

import pytest
from conftest import Database, Templates

from proof.interleavings import (
    DDL_SITUATIONS,
    ENDS,
    EVERY_LEVEL,
    LEVELS,
    OPERATIONS,
    PAIRS,
    SITUATIONS,
    Answer,
    Arena,
    Group,
    Pair,
    Played,
    for_rule,
    groups,
    judge,
    look_matters,
    merges,
    parse,
    replay,
    run,
    sample,
)

SEED = "1"
OLD_SNAPSHOT = "local+heartbeat/cloud-lapsed/rr+rc/commit+commit/BABBAAA"

#: How many cases a pair plays here, and how many of a group beside its serial ones.
CASES, ORDERS = 12, 4


def name(pair: Pair) -> str:
    """The pair as ids have it."""
    return "+".join(operation.name for operation in pair)


# The generator -----------------------------------------------------------------------------------


def test_all_orders_are_generated_where_no_look_is_among_the_steps() -> None:
    write, move = OPERATIONS["local"].steps("rc"), OPERATIONS["delete"].steps("rc")
    assert (write, move) == (("act", "again", "end"), ("act", "end"))
    assert len(set(merges(write, move))) == comb(5, 2)
    assert len(set(merges(write, write))) == comb(6, 3)


def test_a_look_is_played_where_it_can_be_told_from_one_elsewhere() -> None:
    """Of the orders in which a look has the same snapshot, the one with the last look is kept."""
    look_after = (("B", "act"), ("A", "look"), ("A", "act"), ("B", "end"), ("A", "end"))
    look_first = (("A", "look"), ("B", "act"), ("A", "act"), ("B", "end"), ("A", "end"))
    old = (("B", "act"), ("A", "look"), ("B", "end"), ("A", "act"), ("A", "end"))
    new = (("B", "act"), ("B", "end"), ("A", "look"), ("A", "act"), ("A", "end"))
    assert [look_matters(order) for order in (look_after, look_first, old, new)] == [
        True,
        False,
        True,
        True,
    ]


def test_the_product_is_complete() -> None:
    everything = groups(SEED, every_level=True)
    assert {g.pair for g in everything} == set(PAIRS)
    assert {g.situation.name for g in everything} == set(SITUATIONS)
    for pair in PAIRS:
        mine = [g for g in everything if g.pair == pair]
        levels = {g.levels for g in mine} | {g.levels[::-1] for g in mine if pair[0] is pair[1]}
        assert levels == set(EVERY_LEVEL)
        ends = {g.ends for g in mine}
        assert ends <= set(product(ENDS, ENDS))
        assert ("commit", "commit") in ends
        assert ("commit", "rollback") in ends
    ids = [case.id for group in everything[::9] for case in group.cases]
    assert len(ids) == len(set(ids)) > 9_000


def test_every_pair_is_drawn_at_read_committed_repeatable_read_and_serializable() -> None:
    drawn = groups(SEED)
    for pair in PAIRS:
        levels = {level for g in drawn if g.pair == pair for level in g.levels}
        assert levels == set(LEVELS)


def test_an_id_names_its_case() -> None:
    for group in groups(SEED)[::97]:
        for case in group.cases:
            assert parse(case.id) == case
    with pytest.raises(ValueError, match="no such case"):
        parse("local+local/none-absent/rc+rc/commit+commit/ABABABAB")


# The judge ---------------------------------------------------------------------------------------


def played(pair: str, order: str, *outcomes: str, level: str = "rc") -> Played:
    """A case whose steps were answered one after the other."""
    first, second = pair.split("+")
    group = Group(
        (OPERATIONS[first], OPERATIONS[second]),
        SITUATIONS[DDL_SITUATIONS[0]],
        (level, level),
        ("commit", "commit"),
    )
    (case,) = (c for c in group.cases if c.id.endswith("/" + order))
    answers = [
        Answer(side, verb, outcome, 2 * n, 2 * n + 1, False)
        for n, ((side, verb), outcome) in enumerate(zip(case.order, outcomes, strict=True))
    ]
    return Played(case, answers)


OK = ("ok",) * 6
CLOUD_LAST = played("local+cloud", "AAABBB", "ok", "ok", "ok", "WX004", "void", "void")


def test_the_judge_finds_an_overlap() -> None:
    serial = [played("local+cloud", "AAABBB", *OK), played("local+cloud", "BBBAAA", *OK)]
    assert judge(played("local+cloud", "ABABAB", *OK), serial) == [
        "writes of local and cloud overlap"
    ]
    for apart in serial:
        assert judge(apart, serial) == []
    undone = played("local+cloud", "ABABAB", *OK[:5], "void")
    assert "writes of local and cloud overlap" not in judge(undone, serial)


@pytest.mark.parametrize(
    ("order", "outcomes", "level"),
    [
        # Nothing is in flight any more.
        ("AAABBB", ("ok", "ok", "ok", "WX007", "void", "void"), "rc"),
        # The server has no reason to say so.
        ("AABABB", ("ok", "ok", "40001", "ok", "void", "void"), "rc"),
        ("AABABB", ("ok", "ok", "40P01", "ok", "void", "void"), "rc"),
        # After nothing that failed.
        ("AAABBB", ("ok", "ok", "void", "WX004", "void", "void"), "rc"),
        # What no serial order gives.
        ("AAABBB", ("WX001", "void", "void", "WX004", "void", "void"), "rc"),
    ],
)
def test_the_judge_finds_an_answer_without_a_reason(
    order: str, outcomes: tuple[str, ...], level: str
) -> None:
    found = judge(played("local+cloud", order, *outcomes, level=level), [CLOUD_LAST])
    assert [flaw for flaw in found if "no serial order" in flaw]


def test_the_judge_takes_what_concurrency_gives() -> None:
    waited = played("local+cloud", "AABBAB", "ok", "ok", "WX007", "void", "ok", "void")
    assert judge(waited, [CLOUD_LAST]) == []
    failed = ("ok", "ok", "ok", "ok", "40001", "void", "ok", "void")
    assert judge(played("local+cloud", "AAABBBAB", *failed, level="rr"), [CLOUD_LAST]) == []


def test_the_judge_finds_a_write_that_no_guard_has_seen() -> None:
    judged = played("local+unprotect", "AAABB", "WX001", "void", "void", "ok", "ok")
    free = played("local+unprotect", "BBAAA", *OK[:5])
    serial = [judged, free]
    assert [judge(one, serial) for one in serial] == [[], []]
    before = played("local+unprotect", "AABAB", "ok", "ok", "ok", "ok", "ok")
    assert judge(before, serial)
    meanwhile = played("local+unprotect", "BAABA", "ok", "ok", "ok", "ok", "ok")
    assert [flaw for flaw in judge(meanwhile, serial) if "in flight" in flaw]


# The database ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arena(templates: Templates) -> Iterator[Arena]:
    """A database for all pairs; in the end it must pass the audit, without a deadlock."""
    with templates.clone("installed") as db:
        arena = Arena(db)
        yield arena
        assert arena.findings() == []


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_two_operations_in_any_order(arena: Arena, pair: Pair) -> None:
    for cases in sample(groups(SEED, [pair]), SEED, CASES, ORDERS):
        for one in arena.play_group(cases):
            assert one.flaws == [], f"seed {SEED}: {one}"


@pytest.mark.naive
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["exists", "advisory"])
def test_a_naive_rule_lets_writes_overlap(trading_db: Database, rule: str) -> None:
    pairs = [pair for pair in PAIRS if name(pair) in ("local+cloud", "local+activation")]
    arena = Arena(trading_db, rule)
    assert any(
        "writes of local and cloud overlap" in one.flaws
        for group in for_rule(groups(SEED, pairs), rule)
        for one in arena.play_group(group.cases)
    )


def test_an_old_snapshot_is_among_what_is_played(templates: Templates) -> None:
    """A browser that looked before the heartbeat must not take the lease of a live machine."""
    *_, found = replay(templates, parse(OLD_SNAPSHOT))
    assert found.flaws == []
    assert [str(answer) for answer in found.of("A", "look", "act")] == [
        "A look: ok",
        "A act: 40001",
    ]


@pytest.mark.slow
def test_all_that_can_be_drawn_is_played_by_run(templates: Templates) -> None:
    seen: list[tuple[int, int]] = []
    outcome = run(templates, SEED, 60, orders_each=1, workers=2, progress=lambda *n: seen.append(n))
    assert outcome.is_clean, [str(one) for one in outcome.failures]
    assert 0 < outcome.cases <= 60
    assert seen[-1] == (outcome.cases, outcome.cases)
    assert sum(outcome.answers.values()) > 4 * outcome.cases
