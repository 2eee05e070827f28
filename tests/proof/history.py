"""What clients saw of a run: its transactions and registry writes, each with its instants.

The checker uses this and the table's rows after the run, nothing else. From arbiter it holds only
the answers (SQLSTATE) that clients got.

Instants are ``time.monotonic()`` of the clients' machine, in seconds; all clients of a run are on
one machine. An operation took effect, if at all, between its ``invoked`` and its ``returned``. When
a connection is lost, ``returned`` is the instant from which the server's side of it is known to
have ended, so this holds then too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

__all__ = ["LOST", "History", "RegistryWrite", "Settings", "Transaction", "Write"]

#: The answer of an operation whose connection was lost before there was one.
LOST = "lost"

Level = Literal["read committed", "repeatable read", "serializable"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The periods that the run was made with, in seconds, as in ``arbiter.settings``."""

    heartbeat_timeout: float
    stop_grace: float
    error_takeover_delay: float
    drain_timeout: float
    error_takeover_confirm: bool = True


@dataclass(slots=True)
class Write:
    """One write statement of ``rows`` rows.

    ``answer`` is None when it was admitted, else the SQLSTATE of its error, or LOST. ``how`` is
    insert, batch or copy. ``machine`` is None for a local write.
    """

    invoked: float
    returned: float
    machine: UUID | None
    rows: int
    how: str
    answer: str | None

    @property
    def source(self) -> str:
        """The environment that the write claims."""
        return "local" if self.machine is None else "cloud"


@dataclass(slots=True)
class Transaction:
    """The writes of one transaction, all of one user and one environment.

    ``tag`` is unique in the run and stands in every row of the transaction, which is how the look
    after the run finds them. ``began`` is when its first statement was invoked: no snapshot of it
    is older. ``ending`` and ``ended`` are the invocation and the return of its end (of its only
    statement, when it commits by itself). ``outcome``: ``committed`` was acknowledged; ``failed``
    and ``rolled back`` left nothing; ``lost`` got no answer.
    """

    tag: int
    user: int
    actor: str
    level: Level
    via: str
    began: float
    writes: list[Write] = field(default_factory=list)
    ending: float = 0.0
    ended: float = 0.0
    outcome: Literal["committed", "rolled back", "failed", "lost"] = "lost"
    answer: str | None = None

    @property
    def machine(self) -> UUID | None:
        """The machine that wrote, None when the browser did."""
        return self.writes[0].machine if self.writes else None


@dataclass(slots=True)
class RegistryWrite:
    """One write of the registry, by itself a transaction, or a user's yes.

    ``verb``: ``create`` a machine's row with a status and no heartbeat, ``status`` sets the word,
    ``heartbeat`` names the heartbeat column, ``delete`` its row, ``confirm`` calls
    ``confirm_takeover``. ``answer`` as in Write.
    """

    user: int
    actor: str
    verb: Literal["create", "status", "heartbeat", "delete", "confirm"]
    machine: UUID
    invoked: float
    returned: float
    status: str | None = None
    answer: str | None = None


@dataclass(slots=True)
class History:
    """A run: the operations of its clients, and the rows of the table afterwards.

    ``found`` maps the tag of a transaction to the rows of it that were in the table after the run,
    and ``committed_at`` to the server's commit timestamp of them, on the clients' clock.

    ``strangers`` are the windows in which sessions that are not of this history (a fault's own)
    may have had transactions open that wrote for its users: an operation that does not wait may
    have found a lease locked then. Nothing that they wrote was committed.
    """

    seed: str
    settings: Settings
    transactions: list[Transaction] = field(default_factory=list)
    registry: list[RegistryWrite] = field(default_factory=list)
    found: dict[int, int] = field(default_factory=dict)
    committed_at: dict[int, float] = field(default_factory=dict)
    strangers: list[tuple[float, float]] = field(default_factory=list)
