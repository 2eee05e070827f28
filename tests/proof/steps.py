"""The steps of the workload's actors, drawn at random: pure, and the same for the same seed.

Per user: a machine (``fly``, which alone writes the registry), its two writers, three browsers, and
a person who says yes after errors. Each of these actors draws all its steps from a generator of its
own, seeded by ``seed/user/actor``: the steps depend on the seed only, never on an answer.

==========  ===========  ==========================  =====================================
actor       connection   acts as                     writes
==========  ===========  ==========================  =====================================
``tab``     direct       authenticated, with claims  local
``phone``   direct       owner of the tables         local; COPY too
``tablet``  PgBouncer    authenticated, with claims  local, in transactions only
``fly``     direct       service_role                the registry
``writer``  direct       service_role                cloud; COPY too
``relay``   PgBouncer    owner of the tables         cloud; COPY too
``person``  PgBouncer    authenticated, with claims  says yes (confirm_takeover)
==========  ===========  ==========================  =====================================

Writers write even when their machine is not entitled, like a machine that was frozen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from proof.history import Level

__all__ = [
    "ACTORS",
    "LEVELS",
    "Actor",
    "Deed",
    "Plan",
    "Statement",
    "dice",
    "machine_steps",
    "own_level",
    "person_steps",
    "writer_steps",
]

LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class Statement:
    """One write statement. ``pause`` seconds pass before it, inside the transaction."""

    how: str
    rows: int
    pause: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction of a writer; without ``begins`` its only statement commits by itself.

    ``pipelined``: all statements, single rows, are sent at once, without waiting for their answers.
    ``pause`` seconds pass before its end, ``rest`` after it, ``patience`` when it was rejected.
    """

    level: Level
    begins: bool
    pipelined: bool
    statements: tuple[Statement, ...]
    pause: float
    commits: bool
    rest: float
    patience: float


@dataclass(frozen=True, slots=True)
class Deed:
    """One write of the registry, or a yes; ``rest`` seconds pass after it."""

    verb: Literal["create", "status", "heartbeat", "delete", "confirm"]
    status: str | None
    rest: float


@dataclass(frozen=True, slots=True)
class Actor:
    """How an actor connects, and as which role; None is the owner of the tables."""

    via: Literal["direct", "pgbouncer"]
    role: str | None
    environment: Literal["local", "cloud"] | None = None

    @property
    def begins(self) -> bool:
        """Whether each of its writes needs a transaction: a pooler keeps no role and no claims."""
        return self.via == "pgbouncer" and self.role is not None

    @property
    def copies(self) -> bool:
        """Whether it may COPY, which row level security does not allow."""
        return self.role != "authenticated"


ACTORS = {
    "tab": Actor("direct", "authenticated", "local"),
    "phone": Actor("direct", None, "local"),
    "tablet": Actor("pgbouncer", "authenticated", "local"),
    "fly": Actor("direct", "service_role"),
    "writer": Actor("direct", "service_role", "cloud"),
    "relay": Actor("pgbouncer", None, "cloud"),
    "person": Actor("pgbouncer", "authenticated"),
}


def dice(seed: str, user: int, actor: str) -> random.Random:
    """The generator of an actor."""
    return random.Random(f"{seed}/{user}/{actor}")


def own_level(rng: random.Random, actor: Actor) -> Level:
    """The level of a writer's statements outside of transactions; a pooler keeps no setting."""
    level: Level = rng.choices(LEVELS, (6, 3, 2))[0]
    keeps = actor.via == "direct" and actor.environment is not None
    return level if keeps else "read committed"


def writer_steps(rng: random.Random, actor: Actor) -> Iterator[Plan]:
    """The steps of a writer, without end."""
    level = own_level(rng, actor)
    while True:
        # Roles and claims of a transaction do not go into a pipeline.
        pipelined = not actor.begins and rng.random() < 0.45
        begins = pipelined or actor.begins or rng.random() < 0.25
        if pipelined:
            statements = (Statement("insert", 1, 0.0),) * rng.randint(5, 60)
        else:
            number = rng.choice((1, 1, 1, 2, 3)) if begins else 1
            statements = tuple(_statement(rng, actor, begins) for _ in range(number))
        yield Plan(
            level=rng.choices(LEVELS, (5, 3, 2))[0] if begins else level,
            begins=begins,
            pipelined=pipelined,
            statements=statements,
            # Now and then a tab falls asleep in the middle of a transaction.
            pause=rng.uniform(0.3, 0.5) if rng.random() < 0.01 else rng.random() ** 2 * 0.02,
            commits=rng.random() < 0.9,
            rest=rng.random() * 0.012,
            patience=rng.uniform(0.005, 0.03),
        )


def _statement(rng: random.Random, actor: Actor, begins: bool) -> Statement:
    how = rng.choices(("insert", "batch", "copy"), (94, 4, 2 if actor.copies else 0))[0]
    rows = 1 if how == "insert" else rng.choice((2, 3, 5, 8, 13, 40, 100))
    return Statement(how, rows, rng.random() * 0.005 if begins and rng.random() < 0.5 else 0.0)


def machine_steps(rng: random.Random) -> Iterator[Deed]:
    """The steps of a machine and of the app with it: life after life, each created and deleted."""
    while True:
        yield Deed("create", "provisioning", rng.random() * 0.1)
        for _ in range(rng.randint(3, 12)):
            if rng.random() < 0.5:
                yield Deed("status", "starting", rng.random() * 0.05)
            yield Deed("status", "running", rng.random() * 0.02)
            yield from _beats(rng, rng.randint(2, 6))
            yield from _ending(rng)
        yield Deed("delete", None, rng.random() * 0.4)


def _beats(rng: random.Random, number: int) -> Iterator[Deed]:
    for _ in range(number):
        yield Deed("heartbeat", None, rng.uniform(0.02, 0.1))


def _ending(rng: random.Random) -> Iterator[Deed]:
    match rng.choices(("stopped", "stalled", "crashed", "failed", "deleted"), (2, 2, 4, 4, 1))[0]:
        case "stopped":
            yield Deed("status", "stopping", rng.random() * 0.1)
            yield from _beats(rng, rng.choice((0, 0, 1, 2)))
            yield Deed("status", "stopped", rng.uniform(0.05, 0.35))
        case "stalled":
            yield Deed("status", "stopping", rng.uniform(0.2, 0.5))
        case "crashed":
            yield Deed("heartbeat", None, rng.uniform(0.22, 0.5))
            yield from _beats(rng, rng.choice((0, 1, 2)))  # wakes up and goes on
        case "failed":
            yield Deed("status", "error", rng.uniform(0.05, 0.3))
            yield from _beats(rng, rng.choice((0, 0, 1, 2)))
            if rng.random() < 0.8:
                yield Deed("status", "error", rng.uniform(0.1, 0.5))
        case "deleted":
            yield Deed("delete", None, rng.random() * 0.4)
            yield Deed("create", "provisioning", rng.random() * 0.05)


def person_steps(rng: random.Random) -> Iterator[Deed]:
    """The steps of a person who confirms takeovers, mostly when there is none to confirm."""
    while True:
        yield Deed("confirm", None, rng.uniform(0.03, 0.3))
