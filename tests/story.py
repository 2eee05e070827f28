"""The people, machines and writes of a test on the demo's trading schema.

Each function takes the connection that it uses: ``db.connect()`` is the owner of the
database, ``browser(db, user)`` a signed-in browser, ``backend(db)`` the service role, which is also
what a machine uses. Nothing here waits: ``age`` moves what happened into the past instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row, namedtuple_row

if TYPE_CHECKING:
    from conftest import Database

__all__ = [
    "SETTINGS",
    "User",
    "activate",
    "add_machine",
    "add_signal",
    "add_trader",
    "add_user",
    "age",
    "as_detail",
    "backend",
    "beat",
    "browser",
    "clock",
    "count_rows",
    "detail_of",
    "handovers",
    "lease",
    "next_bar",
    "one",
    "rejection",
    "rows",
    "set_status",
    "sign_in",
    "status",
    "value",
]

Conn = psycopg.Connection[Any]

#: The default settings, which the tests use as they are.
SETTINGS = {
    "heartbeat_timeout": timedelta(seconds=30),
    "stop_grace": timedelta(seconds=30),
    "error_takeover_delay": timedelta(minutes=2),
}

_bars = count(1)


@dataclass(frozen=True)
class User:
    """A user with one trader."""

    id: str
    trader: str


# Who ---------------------------------------------------------------------------------------------


def browser(db: Database, user: User) -> Conn:
    """A connection of the user's browser: role authenticated, with the user's claims."""
    conn = db.connect(role="authenticated")
    sign_in(conn, user)
    return conn


def sign_in(conn: Conn, user: User) -> None:
    """From now on the connection is that user's, as the API says after checking a token."""
    claims = {"sub": str(user.id), "role": "authenticated"}
    conn.execute("select set_config('request.jwt.claims', %s, false)", (json.dumps(claims),))


def backend(db: Database) -> Conn:
    """A connection with the service-role key: the app's backend, or a machine."""
    return db.connect(role="service_role")


def add_user(conn: Conn) -> User:
    """A new user with a trader."""
    user_id = value(
        conn,
        "insert into auth.users (email) values (gen_random_uuid() || '@example.com') returning id",
    )
    return User(user_id, add_trader(conn, user_id))


def add_trader(conn: Conn, user_id: str | None) -> str:
    """A new trader; without a user a built-in one."""
    trader: str = value(
        conn,
        "insert into public.traders (user_id, name, is_builtin)"
        " values (%s, 'Momentum', %s) returning id",
        user_id,
        user_id is None,
    )
    return trader


# Machines ----------------------------------------------------------------------------------------


def add_machine(conn: Conn, user: User, status: str = "provisioning") -> str:
    """A new machine of the user in that status, without a heartbeat."""
    machine: str = value(
        conn,
        "insert into public.cloud_machines (user_id, machine_id, status)"
        " values (%s, gen_random_uuid()::text, %s) returning id",
        user.id,
        status,
    )
    return machine


def set_status(conn: Conn, machine: str, status: str) -> None:
    """Set the machine's status word, and nothing else."""
    cur = conn.execute(
        "update public.cloud_machines set status = %s where id = %s", (status, machine)
    )
    assert cur.rowcount == 1


def beat(conn: Conn, machine: str) -> datetime:
    """One heartbeat as a machine sends it, with a clock of its own; returns what was stored."""
    stored: datetime = value(
        conn,
        "update public.cloud_machines set last_health_check = now() + interval '1 hour'"
        " where id = %s returning last_health_check",
        machine,
    )
    return stored


def activate(conn: Conn, user: User) -> str:
    """A new machine of the user that runs and holds the lease."""
    machine = add_machine(conn, user, "running")
    beat(conn, machine)  # marks the drain
    beat(conn, machine)  # ends it
    now = lease(conn, user)
    assert (now.holder, now.machine_id, now.draining_to) == ("cloud", machine, None)
    return machine


def age(
    conn: Conn,
    machine: str,
    *,
    heartbeat: timedelta | None = None,
    left_running: timedelta | None = None,
    entered_error: timedelta | None = None,
) -> None:
    """Make what happened to the machine happened that long ago. Needs the owner's connection."""
    with conn.transaction():
        if heartbeat is not None:
            _set_heartbeat(conn, machine, heartbeat)
        for column, ago in (("left_running_at", left_running), ("entered_error_at", entered_error)):
            if ago is None:
                continue
            cur = conn.execute(
                sql.SQL(
                    "update arbiter.machine_notes set {0} = clock_timestamp() - %s"
                    " where machine_id = %s and {0} is not null"
                ).format(sql.Identifier(column)),
                (ago, machine),
            )
            assert cur.rowcount == 1, f"{column} was never noted"


def _set_heartbeat(conn: Conn, machine: str, ago: timedelta) -> None:
    # Past the stamp, which takes no client's word: its triggers are off in this transaction, and
    # then as they were (alter table ... enable trigger user would forget `always`).
    triggers = conn.execute(
        "select tgname, tgenabled from pg_trigger"
        " where tgrelid = 'public.cloud_machines'::regclass and not tgisinternal"
    ).fetchall()
    states = {"O": "enable", "A": "enable always", "R": "enable replica", "D": "disable"}
    conn.execute("alter table public.cloud_machines disable trigger user")
    cur = conn.execute(
        "update public.cloud_machines set last_health_check = clock_timestamp() - %s where id = %s",
        (ago, machine),
    )
    assert cur.rowcount == 1
    for name, state in triggers:
        state = state if isinstance(state, str) else state.decode()
        conn.execute(
            sql.SQL("alter table public.cloud_machines {} trigger {}").format(
                sql.SQL(states[state]), sql.Identifier(name)
            )
        )


# Writes ------------------------------------------------------------------------------------------


def next_bar() -> datetime:
    """When a bar begins that no other signal here has: one signal a trader and bar is the rule."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=next(_bars))


def add_signal(
    conn: Conn, trader: str | None, source: str = "local", machine: str | None = None
) -> str:
    """Insert a signal for a bar of its own."""
    signal: str = value(
        conn,
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
        " values (%s, 'BTCUSDT', '1m', 'buy', %s, %s, %s) returning id",
        trader,
        next_bar(),
        source,
        machine,
    )
    return signal


def rejection(run: Callable[..., object], *args: Any) -> psycopg.Error:
    """The database's error when that is run; it must be one.

    People read it, so the CONTEXT of a rejection names at most one function of arbiter.
    """
    with pytest.raises(psycopg.Error) as caught:
        run(*args)
    if (caught.value.sqlstate or "").startswith("WX"):
        assert (caught.value.diag.context or "").count(" function arbiter.") <= 1
    return caught.value


def detail_of(error: psycopg.Error) -> dict[str, Any]:
    """The JSON object in the error's DETAIL, which must be one line."""
    text = error.diag.message_detail
    assert text is not None
    assert "\n" not in text
    detail = json.loads(text)
    assert isinstance(detail, dict)
    return detail


def as_detail(instant: datetime | None) -> str | None:
    """How a DETAIL prints an instant: UTC, microseconds."""
    if instant is None:
        return None
    utc = (instant - (instant.utcoffset() or timedelta())).replace(tzinfo=None)
    return utc.isoformat(timespec="microseconds") + "Z"


# Looks -------------------------------------------------------------------------------------------


def rows(conn: Conn, query: str, *params: Any) -> list[Any]:
    """All rows, as named tuples."""
    return conn.cursor(row_factory=namedtuple_row).execute(query, params or None).fetchall()


def one(conn: Conn, query: str, *params: Any) -> Any:
    """The one row, as a named tuple."""
    (row,) = rows(conn, query, *params)
    return row


def column(conn: Conn, query: str, *params: Any) -> list[Any]:
    """The first value of each row."""
    return [first for (first, *_) in rows(conn, query, *params)]


def value(conn: Conn, query: str, *params: Any) -> Any:
    """The one value."""
    (found,) = one(conn, query, *params)
    return found


def clock(conn: Conn) -> datetime:
    """The database's clock."""
    now: datetime = value(conn, "select clock_timestamp()")
    return now


def count_rows(conn: Conn, table: str) -> int:
    """How many rows a table has."""
    name = sql.Identifier(*table.split("."))
    row = conn.execute(sql.SQL("select count(*) from {}").format(name)).fetchone()
    return int(row[0]) if row else 0


def lease(conn: Conn, user: User) -> Any:
    """The user's lease, which must exist. Needs the owner's connection or the service role's."""
    return one(conn, "select * from arbiter.leases where user_id = %s", user.id)


def handovers(conn: Conn, user: User) -> list[Any]:
    """The user's handovers, oldest first."""
    return rows(conn, "select * from arbiter.handovers where user_id = %s order by epoch", user.id)


def status(conn: Conn, user_id: str | None = None) -> Mapping[str, Any]:
    """What ``arbiter.status`` says, by column."""
    cur = conn.cursor(row_factory=dict_row).execute("select * from arbiter.status(%s)", (user_id,))
    (row,) = cur.fetchall()
    found: Mapping[str, Any] = row
    return found
