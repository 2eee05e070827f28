"""The SQL API as Python functions, for a connection of the caller's.

No function opens, commits or closes the connection, and none depends on its row factory. Rejections
by arbiter are raised as their class from `arbiter_db.errors`, everything else as psycopg's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar, overload
from uuid import UUID

import psycopg
from psycopg.rows import RowFactory, class_row, dict_row, scalar_row, tuple_row
from psycopg.types.json import Jsonb

from .errors import translated
from .queries import QUERIES

__all__ = [
    "Audit",
    "Finding",
    "Handover",
    "Id",
    "Observation",
    "ObservedTable",
    "Status",
    "audit",
    "confirm_takeover",
    "handovers",
    "heartbeat",
    "lost_protections",
    "observations",
    "observed_tables",
    "protect",
    "protected_tables",
    "protection",
    "register_machines",
    "status",
    "unprotect",
    "version",
]

_Row = TypeVar("_Row")

Id = UUID | str | int
"""The id of a user or a machine. What the database returns is its text."""

_AUDITED = re.compile(r"arbiter: audited (\d+) of (\d+) blocks")


@dataclass(frozen=True, slots=True)
class Status:
    """The answer that a write at the instant `as_of` would get (`arbiter.status`).

    All instants are aware datetimes by the database's clock.
    """

    environment: str
    """Who may write: `local`, `cloud`, or `none` while neither may."""
    can_write_local: bool
    """Whether a local write would be admitted."""
    enforced: bool
    """False while no table is in mode `enforce`: local writes are then admitted."""
    code: str | None
    """Why not: the code of the rejection, such as `cloud_active`."""
    message: str
    """The text for a badge, such as `Cloud active`."""
    retry_at: datetime | None
    """When a local write may be admitted, where that is known."""
    machine_id: str | None
    """The machine concerned, if there is one."""
    machine_state: str | None
    """Its state: `starting`, `running`, `stopping`, `stopped`, `error`, or `deleted`."""
    heartbeat_age: timedelta | None
    """How long ago its last heartbeat was."""
    epoch: int | None
    """The lease's epoch, the fencing token; None before the first write."""
    draining: bool
    """Whether a handover waits for writes in flight."""
    as_of: datetime
    """The instant that this is about."""
    poll_interval: timedelta
    """How often to ask, at most."""


@dataclass(frozen=True, slots=True)
class ObservedTable:
    """A table in mode `observe`. Instants by the database's clock."""

    table: str
    since: datetime
    """Since when it is observed."""
    writes: int
    """How many writes since then `enforce` would have rejected; the newest 1,000 are kept."""
    last_at: datetime | None
    """The last of them."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Writes of one user within one hour that `enforce` would have rejected with one code."""

    table: str
    hour: datetime
    user_id: str | None
    """None for rows without a user, and for those that lead to two."""
    code: str
    writes: int
    last_at: datetime


@dataclass(frozen=True, slots=True)
class Handover:
    """A change of a lease's holder (`arbiter.handovers`); epoch 1 is the lease's creation."""

    user_id: str
    """The user whose lease changed hands; of a uuid its text in lower case, as all ids."""
    epoch: int
    """The epoch that it began."""
    from_holder: str | None
    """The holder before, `local` or `cloud`; None for the first epoch."""
    from_machine_id: str | None
    """Its machine, when it was `cloud`."""
    to_holder: str
    """The holder from then on, `local` or `cloud`."""
    to_machine_id: str | None
    """Its machine, when it is `cloud`."""
    reason: str
    """Why, such as `activated` or `heartbeat_lapsed`."""
    handed_over_at: datetime
    """When, by the database's clock."""
    xid: int
    """The transaction (`xid8`) that made it."""
    snapshot: str
    """Its `pg_current_snapshot()`, as text."""
    exact: bool
    """Whether the snapshot is as old as the handover; False at REPEATABLE READ or above."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row, or a flaw of the handover history, that contradicts exclusion (`arbiter.audit`)."""

    finding: str
    """`contradiction` for a row, `history` for a handover."""
    reason: str
    """`wrong_environment`, `wrong_machine`, `no_lease`, `two_users`; `missing_epoch`,
    `two_holders`, `out_of_order`, `lease_differs`."""
    user_id: str
    """The user of the row or handover."""
    row_table: str | None
    """The table or partition that has the row."""
    row_key: Mapping[str, Any] | None
    """The row's primary key; its `ctid` where there is none."""
    source: str | None
    """The environment that the row names."""
    machine_id: str | None
    """The machine that the row names."""
    xid: int | None
    """The transaction (`xid8`) that wrote the row or made the handover."""
    epoch: int | None
    """The epoch that the row was written in; 0 before the first."""
    holder: str | None
    """Who held that epoch, `local` or `cloud`; None when there was none."""
    holder_machine_id: str | None
    """The machine that held it, when it was `cloud`."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit of one table."""

    table: str
    """The table, as it was asked for."""
    proved: int
    """Rows that the holder of their epoch wrote."""
    not_provable: Mapping[str, int]
    """Rows without enough evidence, counted by reason, such as `older_than_protection`."""
    findings: list[Finding]
    """What contradicts exclusion; empty when it held."""


def status(conn: psycopg.Connection[Any], user_id: Id | None = None) -> Status:
    """Who may write for a user: the session's own, or any for a trusted role."""
    return _one(conn, class_row(Status), "status", user_id=_text(user_id))


def confirm_takeover(conn: psycopg.Connection[Any], user_id: Id | None = None) -> Status:
    """Confirm, as the user, a takeover after a machine error; return the new status.

    Raises the `ArbiterError` that a local write would get when there is nothing to confirm or it is
    too soon. Counts when the caller commits.
    """
    return _one(conn, class_row(Status), "confirm_takeover", user_id=_text(user_id))


@overload
def heartbeat(  # type: ignore[overload-overlap]  # a str is an iterable of str
    conn: psycopg.Connection[Any], machine_id: Id
) -> datetime: ...
@overload
def heartbeat(conn: psycopg.Connection[Any], machine_id: Iterable[Id]) -> int: ...
def heartbeat(conn: psycopg.Connection[Any], machine_id: Id | Iterable[Id]) -> datetime | int:
    """Send the heartbeat of one machine, or of many in one statement.

    Returns the instant that the database stored for one, and for many the number of those that
    count. An unknown machine is an error, and so is one machine that its registry calls unhealthy;
    of many, those do not count. Counts when the caller commits, so commit at once.
    """
    if isinstance(machine_id, (UUID, str, int)):
        stamped: datetime = _one(conn, scalar_row, "heartbeat", machine_id=str(machine_id))
        return stamped
    ids = [str(each) for each in machine_id]
    beaten: int = _one(conn, scalar_row, "heartbeats", machine_ids=ids)
    return beaten


def handovers(
    conn: psycopg.Connection[Any], user_id: Id | None = None, *, limit: int | None = None
) -> list[Handover]:
    """The handover history of one user or of all, newest last; with `limit` only the newest."""
    return _all(conn, class_row(Handover), "handovers", user_id=_text(user_id), limit=limit)


def audit(
    conn: psycopg.Connection[Any],
    table: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Prove exclusion from the rows of a protected table and the handovers (`arbiter.audit`).

    Reads the whole table, in one snapshot. `on_progress` is called now and then with the numbers
    of finished and of all blocks; never when the connection's `client_min_messages` hides notices.
    """

    def listen(notice: psycopg.errors.Diagnostic) -> None:
        match = _AUDITED.fullmatch(notice.message_primary or "")
        if match and on_progress:
            on_progress(int(match[1]), int(match[2]))

    conn.add_notice_handler(listen)
    try:
        rows = _all(conn, dict_row, "audit", table=table)
    finally:
        conn.remove_notice_handler(listen)
    counts: dict[tuple[str, str], int] = {}
    findings = []
    for row in rows:
        row_count = row.pop("row_count")
        if row_count is None:
            findings.append(Finding(**row))
        else:
            counts[row["finding"], row["reason"]] = row_count
    proved = sum(n for (finding, _), n in counts.items() if finding == "proved")
    not_provable = {reason: n for (finding, reason), n in counts.items() if finding != "proved"}
    return Audit(table, proved, not_provable, findings)


def protected_tables(conn: psycopg.Connection[Any]) -> dict[str, bool]:
    """The tables under arbitration, and whether their rows carry evidence (`arbiter_xid`)."""
    return dict(_all(conn, tuple_row, "protected_tables"))


def protection(conn: psycopg.Connection[Any], table: str) -> str:
    """How a table is protected, for people: its mode, its path to the user and so on."""
    [(text,)] = _all(conn, tuple_row, "protection", table=table)
    return str(text)


def observed_tables(conn: psycopg.Connection[Any]) -> list[ObservedTable]:
    """The tables in mode `observe`, and how many writes `enforce` would have rejected."""
    return _all(conn, class_row(ObservedTable), "observed_tables")


def observations(conn: psycopg.Connection[Any]) -> list[Observation]:
    """What `enforce` would have rejected, per table, hour, user and code, the oldest first.

    Of each table the newest 1,000 writes are kept (`arbiter.observations`).
    """
    return _all(conn, class_row(Observation), "observations")


def lost_protections(conn: psycopg.Connection[Any]) -> list[str]:
    """Protected tables that are not guarded any more: dropped, or another one has their name.

    A line for each, with the remedy; none when all is well.
    """
    return [str(line) for (line,) in _all(conn, tuple_row, "lost_protections")]


def protect(
    conn: psycopg.Connection[Any],
    table: str,
    *,
    user_path: str | None = None,
    verbs: Iterable[str] | None = None,
    machine_column: str | None = None,
    mode: str | None = None,
    unowned: str | None = None,
    evidence: bool | None = None,
) -> None:
    """Put a table under arbitration, or change how it is (`arbiter.protect`).

    `table` is a name as SQL writes it (`public.signals`). What is left out keeps the value that it
    has. The first time, `user_path` (a column, or a path over foreign keys as `trader_id.user_id`)
    is found by itself when there is one obvious answer, and the others are: verbs `insert`, machine
    column `machine_id`, mode `enforce`, unowned rows `reject`, with evidence.

    Constraints are added `not valid`: after the commit, `finish` or the next install checks the
    rows that exist.
    """
    _one(
        conn,
        scalar_row,
        "protect",
        table=table,
        user_path=user_path,
        verbs=None if verbs is None else list(verbs),
        machine_column=machine_column,
        mode=mode,
        unowned=unowned,
        evidence=evidence,
    )


def unprotect(conn: psycopg.Connection[Any], table: str) -> None:
    """End the arbitration of a table; its columns and rows stay (`arbiter.unprotect`)."""
    _one(conn, scalar_row, "unprotect", table=table)


def register_machines(
    conn: psycopg.Connection[Any],
    registry: str,
    *,
    id_column: str = "id",
    user_column: str = "user_id",
    status_column: str = "status",
    heartbeat_column: str = "last_health_check",
    states: Mapping[str, str] | None = None,
    machine_statuses: Iterable[str] = (),
    health_column: str | None = None,
    healthy: Iterable[str] | None = None,
) -> None:
    """Make a table the registry of machines, in place of any other (`arbiter.register_machines`).

    `states` maps the table's status words to `starting`, `running`, `stopping`, `stopped` and
    `error`; None keeps the usual words. `machine_statuses` are the words that a machine's token may
    set. With `health_column` and `healthy` a heartbeat counts only if the row then has one of these
    words in that column.
    """
    _one(
        conn,
        scalar_row,
        "register_machines",
        registry=registry,
        id_column=id_column,
        user_column=user_column,
        status_column=status_column,
        heartbeat_column=heartbeat_column,
        states=None if states is None else Jsonb(dict(states)),
        machine_statuses=list(machine_statuses),
        health_column=health_column,
        healthy=None if healthy is None else list(healthy),
    )


def version(conn: psycopg.Connection[Any]) -> str:
    """The version of arbiter that the database has (`arbiter.version`)."""
    installed: str = _one(conn, scalar_row, "version")
    return installed


def _text(of_id: Id | None) -> str | None:
    return None if of_id is None else str(of_id)


def _one(
    conn: psycopg.Connection[Any], row_factory: RowFactory[_Row], query: str, **params: object
) -> _Row:
    (row,) = _all(conn, row_factory, query, **params)
    return row


def _all(
    conn: psycopg.Connection[Any], row_factory: RowFactory[_Row], query: str, **params: object
) -> list[_Row]:
    # The queries are written for psycopg's own cursor; the connection may make another class.
    with translated(), psycopg.Cursor(conn, row_factory=row_factory) as cur:
        return cur.execute(QUERIES[query], params).fetchall()
