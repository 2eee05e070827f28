"""Rules that stand twice, for speed: the two copies must say the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from uuid import uuid4

import psycopg
import pytest
from conftest import Database
from story import User, add_machine, add_signal, add_user, backend, beat, value

#: Each state that a lease can be in, as the columns that tell: holder, machine, drain to.
LEASES = {
    "local": ("local", None, None, False),
    "local, draining to the machine": ("local", None, "mine", True),
    "cloud": ("cloud", "mine", None, False),
    "cloud, another machine": ("cloud", "other", None, False),
    "cloud, draining to local": ("cloud", "mine", None, True),
    "cloud, draining to the machine": ("cloud", "other", "mine", True),
}

#: A row of the user's, and one of a user whose browser holds.
TWO = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%(hers)s, 'TWO', '1m', 'buy', now(), 'local', null),
       (%(ours)s, 'TWO', '1m', 'buy', now(),
        case when %(machine)s::uuid is null then 'local' else 'cloud' end, %(machine)s)
"""

WRITERS = {"local": ("local", None), "cloud": ("cloud", "mine")}


def put_lease(conn: psycopg.Connection[object], user: User, machine: str, lease: str) -> None:
    """Give the user's lease that state, past all rules."""
    holder, holding, draining, drains = LEASES[lease]
    machines = {"mine": machine, "other": str(uuid4()), None: None}
    conn.execute(
        "update arbiter.leases set epoch = epoch + 1, holder = %s, machine_id = %s,"
        " draining_to = %s, draining_since = case when %s then clock_timestamp() end"
        " where user_id = %s",
        (holder, machines[holding], machines[draining], drains, user.id),
    )


@pytest.mark.parametrize(("lease", "writer"), list(product(LEASES, WRITERS)))
def test_the_guard_takes_the_lock_of_share_lease(db: Database, lease: str, writer: str) -> None:
    owner, app = db.connect(), backend(db)
    user, eve = add_user(owner), add_user(owner)
    add_signal(owner, user.trader)
    add_signal(owner, eve.trader)
    machine = add_machine(owner, user, "running")
    beat(owner, machine)
    put_lease(owner, user, machine, lease)
    source, named = WRITERS[writer]
    mine = machine if named else None
    with owner.transaction(force_rollback=True):
        shared = value(owner, "select arbiter._share_lease(%s, %s, %s)", user.id, source, mine)
    expected = (lease, writer) in {("local", "local"), ("cloud", "cloud")}
    assert shared is expected

    # Without the slow path, which would share the lease by that very function.
    owner.execute(
        "create or replace function arbiter._share_lease(p_user_id text, p_source text,"
        " p_machine_id text) returns boolean language sql as 'select false'"
    )
    owner.execute(
        "create or replace function arbiter._admit(p_protection_id integer, p_mode text,"
        " p_unowned text, p_user_id text, p_source text, p_machine_id text, p_flaw text)"
        " returns arbiter.error language plpgsql as $$ begin raise exception 'slow path'; end $$"
    )
    writes: list[Callable[[], object]] = [
        lambda: add_signal(app, user.trader, source, mine),
        # Rows of several writers take a query of their own, with the same lock.
        lambda: app.execute(TWO, {"ours": user.trader, "hers": eve.trader, "machine": mine}),
    ]
    for write in writes:
        if shared:
            write()
        else:
            with pytest.raises(psycopg.errors.RaiseException, match="slow path"):
                write()


def test_the_settled_machine_is_the_one_of_each_heartbeat(db: Database) -> None:
    """The trigger's functions have the expression written out; this is the function of it."""
    conn = db.connect()
    expression = value(conn, "select arbiter._settled_machine_expression('p_user_id')")
    source = "select prosrc from pg_proc where oid::regproc::text = %s"
    assert expression in value(conn, source, "arbiter._settled_machine")
    written_out = expression.replace("p_user_id", 'n.user_id::text collate "C"')
    assert value(conn, source, "arbiter.tg_registry_activate").count(written_out) == 2
