"""arbiter's rejections in Python: one exception class per SQLSTATE of class WX.

The database raises them: MESSAGE is one constant line per code, HINT is the next thing to do,
DETAIL is one JSON object on one line. This module is the only place that maps SQLSTATEs to classes
and reads that JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeVar

import psycopg

__all__ = [
    "AppendOnly",
    "ArbiterError",
    "CloudActive",
    "CoolingDown",
    "HandoverDraining",
    "InstallError",
    "NotHolder",
    "OutdatedSchema",
    "ProvenanceImmutable",
    "TakeoverUnconfirmed",
    "WrongIdentity",
    "from_psycopg",
    "translated",
]

_T = TypeVar("_T")


class ArbiterError(psycopg.DatabaseError):
    """A rejection by arbiter; each SQLSTATE of class WX has a subclass.

    It is a `psycopg.DatabaseError`, because the database sent it: code that already handles
    database errors keeps working, and `diag` is complete. Nothing was written: the statement
    has failed, and with it its transaction.

    Attributes, each None when the database did not say:

    * `sqlstate`: `WX001` to `WX008`
    * `code`: the same as a word, such as `cloud_active`
    * `user_id`: the user whose lease decided
    * `holder`: who holds the lease, `local` or `cloud`
    * `machine_id`: the machine concerned
    * `epoch`: the lease's epoch, the fencing token
    * `retry_at`: when to try again, an aware datetime by the database's clock
    * `hint`: what to do next
    * `detail`: the whole DETAIL as a dictionary, empty when it was no JSON object
    """

    code: str | None = None
    user_id: str | None = None
    holder: str | None = None
    machine_id: str | None = None
    epoch: int | None = None
    retry_at: datetime | None = None
    hint: str | None = None
    detail: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.detail = {}


class CloudActive(ArbiterError):
    """A local write while the cloud holds the lease and its machine is healthy."""

    sqlstate = "WX001"
    code = "cloud_active"


class CoolingDown(ArbiterError):
    """A local write too soon after the machine left `running`; `retry_at` says when."""

    sqlstate = "WX002"
    code = "cooling_down"


class TakeoverUnconfirmed(ArbiterError):
    """A local write after a machine error: too soon (`retry_at`), or not confirmed (`hint`)."""

    sqlstate = "WX003"
    code = "takeover_unconfirmed"


class NotHolder(ArbiterError):
    """A cloud write by a machine that does not hold the lease, or whose heartbeat is stale."""

    sqlstate = "WX004"
    code = "not_holder"


class WrongIdentity(ArbiterError):
    """The row names another user or machine than it may, or the caller is another user."""

    sqlstate = "WX005"
    code = "wrong_identity"


class ProvenanceImmutable(ArbiterError):
    """An UPDATE of who wrote a protected row."""

    sqlstate = "WX006"
    code = "provenance_immutable"


class HandoverDraining(ArbiterError):
    """The new holder waited `drain_timeout` for the old holder's writes in flight."""

    sqlstate = "WX007"
    code = "handover_draining"


class AppendOnly(ArbiterError):
    """A change to the handover history."""

    sqlstate = "WX008"
    code = "append_only"


_CLASSES: Mapping[str | None, type[ArbiterError]] = MappingProxyType(
    {cls.sqlstate: cls for cls in ArbiterError.__subclasses__()}
)


def from_psycopg(exc: BaseException) -> ArbiterError | None:
    """The arbiter error that a psycopg exception carries, or None when it carries none.

    A WX code that this version of the package does not know becomes a plain `ArbiterError`.
    """
    if isinstance(exc, ArbiterError):
        return exc
    if not isinstance(exc, psycopg.Error) or not (exc.sqlstate or "").startswith("WX"):
        return None
    diag = exc.diag
    error = _CLASSES.get(exc.sqlstate, ArbiterError)(
        diag.message_primary or str(exc), info=exc.pgresult
    )
    detail = _json_object(diag.message_detail)
    error.sqlstate = exc.sqlstate
    error.detail = detail
    error.hint = diag.message_hint
    error.code = detail.get("code", error.code)
    error.user_id = _parsed(_id, detail.get("user_id"))
    error.holder = detail.get("holder")
    error.machine_id = _parsed(_id, detail.get("machine_id"))
    error.epoch = _parsed(int, detail.get("epoch"))
    error.retry_at = _parsed(_aware, detail.get("retry_at"))
    return error


@contextmanager
def translated() -> Iterator[None]:
    """Raise the arbiter class instead of psycopg's generic one, around the caller's own writes.

    Put it outside the transaction block, so that the block sees the error first and rolls back::

        with translated(), conn.transaction():
            conn.execute("insert into signals …")
    """
    try:
        yield
    except psycopg.Error as exc:
        error = from_psycopg(exc)
        if error is None or error is exc:
            raise
        raise error from exc


class InstallError(Exception):
    """An install or uninstall that failed; its uncommitted work is undone.

    `hint` says what to do, `detail` and `sqlstate` come from the database's error (else None).
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        detail: str | None = None,
        sqlstate: str | None = None,
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.detail = detail
        self.sqlstate = sqlstate


class OutdatedSchema(InstallError):
    """The database's schema and this package are not of the same version.

    `installed` is the database's version (None: arbiter is not installed there), `expected` is
    this package's.
    """

    def __init__(self, installed: str | None, expected: str, *, hint: str) -> None:
        if installed is None:
            message = "arbiter is not installed in this database"
        else:
            message = f"this database has arbiter {installed}, this package is {expected}"
        super().__init__(message, hint=hint)
        self.installed = installed
        self.expected = expected


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _aware(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _id(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("an id in a DETAIL is a text")
    return value


def _parsed(parse: Callable[[Any], _T], value: object) -> _T | None:
    """The value parsed, or None where that fails: a rejection with an odd DETAIL must not become a
    parse error."""
    try:
        return None if value is None else parse(value)
    except (TypeError, ValueError, AttributeError):
        return None
