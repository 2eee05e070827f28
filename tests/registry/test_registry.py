"""The registry: whose clock counts, what its changes mean for the lease, and replacing it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    as_detail,
    backend,
    beat,
    browser,
    clock,
    count_rows,
    detail_of,
    handovers,
    lease,
    one,
    rejection,
    rows,
    set_status,
    status,
    value,
)

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

S = timedelta(seconds=1)
DAY = timedelta(days=1)
TIMEOUT = SETTINGS["heartbeat_timeout"]
GRACE = SETTINGS["stop_grace"]
DELAY = SETTINGS["error_takeover_delay"]


def stored(conn: Conn, machine: str) -> datetime | None:
    """The heartbeat in the registry."""
    found: datetime | None = value(
        conn, "select last_health_check from public.cloud_machines where id = %s", machine
    )
    return found


def notes(conn: Conn, machine: str) -> Any:
    """What the database noted of a machine, for its only user."""
    return one(conn, "select * from arbiter.machine_notes where machine_id = %s", machine)


def holder(conn: Conn, user: User) -> tuple[str, str | None, str | None]:
    now = lease(conn, user)
    return now.holder, now.machine_id, now.draining_to


# Whose clock counts ------------------------------------------------------------------------------

#: What a client may send as its clock.
CLOCKS = {
    "a day ahead": "now() + interval '1 day'",
    "a day behind": "now() - interval '1 day'",
    "the same twice": "timestamptz '2026-01-01 00:00Z'",
    "the end of time": "'infinity'",
    "before all time": "'-infinity'",
    "none at all": "null",
    "what is there": "last_health_check",
}


@pytest.mark.parametrize("sent", CLOCKS.values(), ids=CLOCKS)
def test_heartbeat_is_the_databases_clock(db: Database, sent: str) -> None:
    machine_conn = backend(db)
    machine = add_machine(machine_conn, add_user(db.connect()), "running")
    previous = clock(machine_conn)
    for _ in range(2):
        machine_conn.execute(f"update public.cloud_machines set last_health_check = {sent}")
        now = stored(machine_conn, machine)
        assert now is not None
        assert previous < now <= clock(machine_conn)
        previous = now


#: Statements that write a machine %(id)s of %(user)s with a heartbeat a day ahead.
AHEAD = "now() + interval '1 day'"
INSERT = f"""
insert into public.cloud_machines (id, user_id, status, last_health_check)
values (%(id)s, %(user)s, 'running', {AHEAD})
"""
MERGE = f"""
merge into public.cloud_machines as m
using (values (%(id)s::uuid, %(user)s::uuid)) as v (id, user_id) on m.id = v.id
when matched then update set last_health_check = {AHEAD}
when not matched then
  insert (id, user_id, status, last_health_check) values (v.id, v.user_id, 'running', {AHEAD})
"""
WRITES = {
    "insert": (INSERT, False),
    "insert ... select": (
        "insert into public.cloud_machines (id, user_id, status, last_health_check)"
        f" select %(id)s, %(user)s, 'running', {AHEAD}",
        False,
    ),
    "upsert that inserts": (INSERT + " on conflict (id) do nothing", False),
    "upsert that updates": (
        INSERT + " on conflict (id) do update set last_health_check = excluded.last_health_check",
        True,
    ),
    "merge that inserts": (MERGE, False),
    "merge that updates": (MERGE, True),
    "update of everything": (
        f"update public.cloud_machines set status = 'running', last_health_check = {AHEAD}"
        " where id = %(id)s and user_id = %(user)s",
        True,
    ),
}


@pytest.mark.parametrize(("statement", "exists"), WRITES.values(), ids=WRITES)
def test_heartbeat_is_stamped_by_every_kind_of_write(
    db: Database, statement: str, exists: bool
) -> None:
    machine_conn = backend(db)
    user = add_user(db.connect())
    machine = add_machine(machine_conn, user, "running") if exists else str(uuid4())
    began = clock(machine_conn)
    cur = machine_conn.execute(statement.encode(), {"id": machine, "user": user.id})
    assert cur.rowcount == 1
    now = stored(machine_conn, machine)
    assert now is not None
    assert began < now < clock(machine_conn)
    # It is a heartbeat: the machine is healthy.
    assert holder(machine_conn, user) == ("local", None, machine)


def test_heartbeat_is_stamped_by_copy(db: Database) -> None:
    conn = db.connect()
    user, machine = add_user(conn), str(uuid4())
    began = clock(conn)
    with (
        conn.cursor() as cur,
        cur.copy(
            "copy public.cloud_machines (id, user_id, status, last_health_check) from stdin"
        ) as copy,
    ):
        copy.write_row((machine, user.id, "running", began + DAY))
    now = stored(conn, machine)
    assert now is not None
    assert began < now < clock(conn)
    assert holder(conn, user) == ("local", None, machine)


def test_heartbeat_is_stamped_past_session_replication_role(db: Database) -> None:
    conn = db.connect("postgres")
    machine = add_machine(conn, add_user(conn), "running")
    conn.execute("set session_replication_role = replica")
    began = clock(conn)
    assert began < beat(conn, machine) < clock(conn)


def test_heartbeats_of_many_machines_in_one_statement(db: Database) -> None:
    owner, machine_conn = db.connect(), backend(db)
    users = [add_user(owner) for _ in range(3)]
    machines = [add_machine(machine_conn, user, "running") for user in users]
    began = clock(owner)
    for _ in range(2):
        machine_conn.execute(f"update public.cloud_machines set last_health_check = {AHEAD}")
    for user, machine in zip(users, machines, strict=True):
        assert holder(owner, user) == ("cloud", machine, None)
        now = stored(owner, machine)
        assert now is not None
        assert began < now < clock(owner)


def test_heartbeat_is_of_its_own_instant(db: Database) -> None:
    """Not of the transaction's start, which may be long ago."""
    conn = db.connect()
    machine = add_machine(conn, add_user(conn), "starting")
    with conn.transaction():
        began = clock(conn)
        beat_at = beat(conn, machine)
        assert began < beat_at
        set_status(conn, machine, "error")
        noted = notes(conn, machine)
        assert beat_at < noted.entered_error_at


def test_heartbeat_never_moves_back(db: Database) -> None:
    """Not even when the server's clock does a little: here it is behind the last heartbeat."""
    conn = db.connect()
    machine = add_machine(conn, add_user(conn), "running")
    age(conn, machine, heartbeat=-timedelta(seconds=25))
    before = stored(conn, machine)
    assert beat(conn, machine) == before
    with conn.transaction():
        in_one_transaction = [beat(conn, machine) for _ in range(3)]
    assert in_one_transaction == [before] * 3


def test_a_heartbeat_follows_a_clock_that_was_set_back(db: Database) -> None:
    """By more than the timeout: otherwise a machine that dies would be fresh for that long."""
    conn = db.connect()
    machine = add_machine(conn, add_user(conn), "running")
    age(conn, machine, heartbeat=-timedelta(seconds=31))
    began = clock(conn)
    assert began <= beat(conn, machine) <= clock(conn)


def test_other_updates_are_no_heartbeat(db: Database) -> None:
    conn = db.connect()
    machine = add_machine(conn, add_user(conn), "running")
    conn.execute("update public.cloud_machines set region = 'ams', started_at = now()")
    assert stored(conn, machine) is None
    first = beat(conn, machine)
    conn.execute("update public.cloud_machines set region = 'fra', status = 'stopping'")
    assert stored(conn, machine) == first


def test_machine_without_a_heartbeat_is_inserted_without_one(db: Database) -> None:
    conn = db.connect()
    assert stored(conn, add_machine(conn, add_user(conn), "running")) is None


# arbiter.heartbeat() -----------------------------------------------------------------------------


def test_heartbeat_of_one(db: Database) -> None:
    conn = backend(db)
    user = add_user(db.connect())
    machine = add_machine(conn, user, "running")
    began = clock(conn)
    at = value(conn, "select arbiter.heartbeat(%s::uuid)", machine)
    assert began < at < clock(conn)
    assert at == stored(conn, machine)
    assert holder(conn, user) == ("local", None, machine)
    value(conn, "select arbiter.heartbeat(%s::uuid)", machine)
    assert holder(conn, user) == ("cloud", machine, None)


def test_heartbeat_of_many(db: Database) -> None:
    conn, owner = backend(db), db.connect()
    users = [add_user(owner) for _ in range(3)]
    machines = [add_machine(conn, user, "running") for user in users]
    silent = add_machine(conn, add_user(owner), "running")
    for _ in range(2):
        assert value(conn, "select arbiter.heartbeats(%s::text[])", machines) == 3
    assert [holder(conn, u)[1] for u in users] == machines
    assert stored(conn, silent) is None


@pytest.mark.parametrize(("times", "beaten"), [(0, 0), (1, 1), (2, 1), (5, 1)])
def test_heartbeat_counts_each_machine_once(db: Database, times: int, beaten: int) -> None:
    conn = backend(db)
    machine = add_machine(conn, add_user(db.connect()), "running")
    assert value(conn, "select arbiter.heartbeats(%s::text[])", [machine] * times) == beaten
    assert (stored(conn, machine) is not None) is bool(beaten)


# Changes of the registry -------------------------------------------------------------------------


def test_stop_endpoint(db: Database) -> None:
    """`stopping` with the app's own stopped_at, the provider's call, then `stopped` alone."""
    owner, app = db.connect(), backend(db)
    user = add_user(owner)
    web = browser(db, user)
    machine = activate(app, user)

    began = clock(owner)
    app.execute(
        "update public.cloud_machines"
        " set status = 'stopping', stopped_at = now() - interval '1 day' where id = %s",
        (machine,),
    )
    left = notes(owner, machine).left_running_at
    assert began < left < clock(owner)
    assert rejection(add_signal, web, user.trader).sqlstate == "WX002"
    add_signal(app, user.trader, "cloud", machine)  # in flight while it stops

    set_status(app, machine, "stopped")
    assert notes(owner, machine).left_running_at == left
    error = rejection(add_signal, web, user.trader)
    assert (error.sqlstate, detail_of(error)["retry_at"]) == ("WX002", as_detail(left + GRACE))
    age(owner, machine, left_running=GRACE)
    add_signal(web, user.trader)
    assert handovers(owner, user)[-1].reason == "machine_stopped"


def test_stop_endpoint_whose_provider_call_fails(db: Database) -> None:
    """`error` while the machine still runs: it may go on, and a browser must not join in."""
    owner, app = db.connect(), backend(db)
    user = add_user(owner)
    web = browser(db, user)
    machine = activate(app, user)
    set_status(app, machine, "stopping")
    left = notes(owner, machine).left_running_at
    began = clock(owner)
    set_status(app, machine, "error")
    noted = notes(owner, machine)
    assert began < noted.entered_error_at < clock(owner)
    assert noted.left_running_at == left

    beat(app, machine)
    add_signal(app, user.trader, "cloud", machine)
    error = rejection(add_signal, web, user.trader)
    assert error.sqlstate == "WX003"
    assert detail_of(error)["retry_at"] == as_detail(noted.entered_error_at + DELAY)
    # Two minutes on, the user has not said yes, and the machine trades on.
    age(owner, machine, left_running=DELAY, entered_error=DELAY)
    assert rejection(add_signal, web, user.trader).sqlstate == "WX003"
    add_signal(app, user.trader, "cloud", machine)


@pytest.mark.parametrize(
    ("words", "left", "error"),
    [
        (["stopping", "stopped"], 1, None),
        (["stopped", "starting"], 1, None),
        (["stopped", "starting", "provisioning", "stopping"], 1, None),
        (["stopping", "running"], None, None),
        (["error"], 1, 1),
        (["error", "error"], 1, 1),
        (["stopping", "error"], 1, 2),
        (["error", "stopping"], 1, None),
        (["error", "running"], None, None),
        (["error", "running", "error"], 3, 3),
        (["error", "stopped", "error"], 1, 3),
    ],
    ids=lambda words: ", ".join(words) if isinstance(words, list) else None,
)
def test_notes(db: Database, words: list[str], left: int | None, error: int | None) -> None:
    """left, error: the step at which the noted instant lies; None: there is no note (any more)."""
    conn = db.connect()
    machine = activate(conn, add_user(conn))
    instants = [clock(conn)]
    for word in words:
        set_status(conn, machine, word)
        instants.append(clock(conn))
    found = notes(conn, machine)
    for at, step in [(found.left_running_at, left), (found.entered_error_at, error)]:
        if step is None:
            assert at is None
        else:
            assert at is not None
            assert instants[step - 1] < at < instants[step]


def delete(conn: Conn, machine: str) -> None:
    conn.execute("delete from public.cloud_machines where id = %s", (machine,))


def truncate(conn: Conn, machine: str) -> None:
    conn.execute("truncate public.cloud_machines cascade")


def give_away(conn: Conn, machine: str) -> None:
    other = add_user(conn)
    conn.execute("update public.cloud_machines set user_id = %s where id = %s", (other.id, machine))


def disown(conn: Conn, machine: str) -> None:
    conn.execute("alter table public.cloud_machines alter column user_id drop not null")
    conn.execute("update public.cloud_machines set user_id = null where id = %s", (machine,))


@pytest.mark.parametrize("how", ["holds", "drains"])
@pytest.mark.parametrize("end", [delete, truncate, give_away, disown])
def test_machine_that_goes_ends_its_claim_like_a_stop(
    db: Database, end: Callable[[Conn, str], None], how: str
) -> None:
    owner = db.connect()
    user = add_user(owner)
    web = browser(db, user)
    if how == "holds":
        machine = activate(owner, user)
    else:
        machine = add_machine(owner, user, "running")
        beat(owner, machine)
    began = clock(owner)
    end(owner, machine)
    noted = one(
        owner,
        "select * from arbiter.machine_notes where user_id = %s and machine_id = %s",
        user.id,
        machine,
    )
    assert began < noted.left_running_at < clock(owner)
    assert noted.entered_error_at is None

    error = rejection(add_signal, web, user.trader)
    assert error.sqlstate == "WX002"
    assert detail_of(error)["machine_id"] == str(machine)
    assert detail_of(error)["retry_at"] == as_detail(noted.left_running_at + GRACE)
    said = status(web)
    assert (said["environment"], said["machine_state"]) == ("none", "deleted")

    # Neither the machine nor its new owner can write for this user any more. Of a machine without
    # a row the foreign key says so first.
    if end in (delete, truncate):
        assert rejection(add_signal, owner, user.trader, "cloud", machine).sqlstate == "23503"
        owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    assert rejection(add_signal, owner, user.trader, "cloud", machine).sqlstate == "WX005"

    age_note(owner, user, machine)
    add_signal(web, user.trader)
    last = handovers(owner, user)[-1]
    assert last.reason == ("machine_stopped" if how == "holds" else "registered")
    assert holder(owner, user) == ("local", None, None)


def age_note(conn: Conn, user: User, machine: str) -> None:
    """A machine that changed hands has a note for each user: age the one of this user."""
    conn.execute(
        "update arbiter.machine_notes set left_running_at = clock_timestamp() - %s"
        " where user_id = %s and machine_id = %s",
        (GRACE, user.id, machine),
    )


def test_machine_that_is_given_away_serves_its_new_user(db: Database) -> None:
    owner = db.connect()
    old, new = add_user(owner), add_user(owner)
    machine = activate(owner, old)
    owner.execute("update public.cloud_machines set user_id = %s", (new.id,))
    assert holder(owner, new) == ("local", None, machine)  # it is healthy
    add_signal(owner, new.trader, "cloud", machine)
    assert holder(owner, new) == ("cloud", machine, None)
    assert rejection(add_signal, owner, old.trader, "cloud", machine).sqlstate == "WX005"

    # And back again: the note of its absence is gone.
    owner.execute("update public.cloud_machines set user_id = %s", (old.id,))
    add_signal(owner, old.trader, "cloud", machine)
    assert rejection(add_signal, browser(db, old), old.trader).sqlstate == "WX001"
    assert rejection(add_signal, browser(db, new), new.trader).sqlstate == "WX002"


def test_machine_that_changes_its_id_is_another_machine(db: Database) -> None:
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    began = clock(owner)
    owner.execute("update public.cloud_machines set id = gen_random_uuid()")
    renamed = value(owner, "select id from public.cloud_machines")
    assert began < notes(owner, machine).left_running_at < clock(owner)
    assert holder(owner, user) == ("cloud", machine, renamed)
    add_signal(owner, user.trader, "cloud", renamed)
    assert holder(owner, user) == ("cloud", renamed, None)


def test_user_who_goes_takes_everything_along(db: Database) -> None:
    """The machine first, which sets its rows' machine to null on their way out."""
    owner = db.connect()
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    user = add_user(owner)
    machine = activate(owner, user)
    add_signal(owner, user.trader, "cloud", machine)
    add_position(owner, user, machine)
    owner.execute("delete from auth.users where id = %s", (user.id,))
    for table in ("cloud_machines", "traders", "signals", "positions"):
        assert count_rows(owner, f"public.{table}") == 0


def add_position(conn: Conn, user: User, machine: str) -> None:
    conn.execute(
        "insert into public.positions (user_id, symbol, source, machine_id)"
        " values (%s, 'BTCUSDT', 'cloud', %s)",
        (user.id, machine),
    )


def test_on_delete_set_null_keeps_signals(db: Database) -> None:
    owner = db.connect()
    user = add_user(owner)
    machine = activate(owner, user)
    signal = add_signal(owner, user.trader, "cloud", machine)
    before = one(owner, "select source, arbiter_xid from public.signals where id = %s", signal)
    delete(owner, machine)
    after = one(
        owner, "select source, arbiter_xid, machine_id from public.signals where id = %s", signal
    )
    assert after == (*before, None)
    assert before.source == "cloud"


def test_on_delete_set_null_is_no_write_of_a_table_that_records_its_last_writer(
    db: Database,
) -> None:
    """`{insert,update}`: neither rejected while the lease is another's nor stamped as a write.

    Not even when the app's own triggers change the row, too, before or after arbiter's.
    """
    owner = db.connect()
    owner.execute(
        "create trigger a_touch before update on public.positions"
        " for each row execute function public.tg_touch_updated_at()"
    )
    user = add_user(owner)
    web = browser(db, user)
    owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    machine = activate(owner, user)
    add_position(owner, user, machine)
    before = one(owner, "select source, arbiter_xid from public.positions")
    age(owner, machine, heartbeat=TIMEOUT)
    add_signal(web, user.trader)  # the browser holds now
    delete(owner, machine)
    after = one(owner, "select source, arbiter_xid, machine_id from public.positions")
    assert after == (*before, None)

    # The browser's own next write of the row is one, and says so.
    web.execute("update public.positions set quantity = 1, source = 'local'")
    now = one(owner, "select source, arbiter_xid, machine_id from public.positions")
    assert (now.source, now.machine_id) == ("local", None)
    assert now.arbiter_xid != before.arbiter_xid


# Status words and types --------------------------------------------------------------------------


def test_unmapped_word_counts_as_running(db: Database) -> None:
    owner = db.connect()
    user = add_user(owner)
    owner.execute("alter table public.cloud_machines drop constraint cloud_machines_status_check")
    machine = add_machine(owner, user, "hibernating")
    beat(owner, machine)
    beat(owner, machine)
    assert holder(owner, user) == ("cloud", machine, None)
    error = rejection(add_signal, browser(db, user), user.trader)
    assert error.sqlstate == "WX001"
    assert status(browser(db, user))["machine_state"] == "running"
    # To leave one such word for another is not to leave running.
    set_status(owner, machine, "dreaming")
    assert notes(owner, machine).left_running_at is None
    age(owner, machine, heartbeat=TIMEOUT)
    add_signal(browser(db, user), user.trader)
    assert handovers(owner, user)[-1].reason == "heartbeat_lapsed"


def test_yes_says_stopped_where_any_word_may_be_said(db: Database) -> None:
    """Of the words that mean stopped: `deleted` may make the app forget the machine."""
    owner = db.connect()
    user = add_user(owner)
    owner.execute("alter table public.cloud_machines drop constraint cloud_machines_status_check")
    machine = activate(owner, user)
    set_status(owner, machine, "failed")
    age(owner, machine, entered_error=DELAY)
    value(browser(db, user), "select (arbiter.confirm_takeover()).code")
    assert value(owner, "select status from public.cloud_machines") == "stopped"


ENUM = """
alter table public.cloud_machines drop constraint cloud_machines_status_check;
create type public.machine_status as enum
  ('provisioning', 'starting', 'running', 'stopping', 'stopped', 'error');
alter table public.cloud_machines
  alter column status drop default,
  alter column status type public.machine_status using status::public.machine_status;
"""


@pytest.mark.parametrize(
    "change",
    [
        ENUM,
        "alter table public.cloud_machines alter column status type varchar(20)",
        "create domain public.word as text;"
        "alter table public.cloud_machines alter column status type public.word",
    ],
    ids=["enum", "varchar", "domain"],
)
def test_status_column_of_another_type(trading_db: Database, change: str) -> None:
    owner = trading_db.connect()
    owner.execute(change.encode())
    arbiter_db.install(trading_db.conninfo())
    user = add_user(owner)
    web = browser(trading_db, user)
    machine = activate(backend(trading_db), user)
    assert rejection(add_signal, web, user.trader).sqlstate == "WX001"
    set_status(owner, machine, "stopping")
    assert rejection(add_signal, web, user.trader).sqlstate == "WX002"
    set_status(owner, machine, "error")
    age(owner, machine, entered_error=DELAY)
    assert one(web, "select * from arbiter.confirm_takeover()").machine_state == "stopped"
    add_signal(web, user.trader)


# Registering -------------------------------------------------------------------------------------

BEFORE_INSTALL = "alter table public.cloud_machines add last_health_check timestamptz"


@pytest.mark.parametrize("skew", ["0", "1 day"], ids=["now", "a day ahead"])
def test_registering_gives_leases_to_healthy_machines(trading_db: Database, skew: str) -> None:
    """A client's clock counts for nothing here, either: a future heartbeat is one of now."""
    owner = trading_db.connect()
    owner.execute(BEFORE_INSTALL)
    users = {
        word: add_user(owner) for word in ("running", "starting", "stopping", "stopped", "error")
    }
    machines = {word: add_machine(owner, user, word) for word, user in users.items()}
    stale = add_user(owner)
    machines["stale"] = add_machine(owner, stale, "running")
    owner.execute(
        "update public.cloud_machines set last_health_check = clock_timestamp() + %s::interval",
        (skew,),
    )
    owner.execute(
        "update public.cloud_machines set last_health_check = now() - interval '31 seconds'"
        " where id = %s",
        (machines["stale"],),
    )
    arbiter_db.install(trading_db.conninfo())

    assert holder(owner, users["running"]) == ("local", None, machines["running"])
    heartbeat = stored(owner, machines["running"])
    assert heartbeat is not None
    assert heartbeat < clock(owner)
    web = browser(trading_db, users["running"])
    assert rejection(add_signal, web, users["running"].trader).sqlstate == "WX001"
    add_signal(owner, users["running"].trader, "cloud", machines["running"])
    for word in ("starting", "stopping", "stopped", "error"):
        leases = rows(owner, "select holder from arbiter.leases where user_id = %s", users[word].id)
        assert leases == [("local",)], word
        add_signal(browser(trading_db, users[word]), users[word].trader)
    add_signal(browser(trading_db, stale), stale.trader)


def test_future_heartbeats_of_another_column_of_the_registry(db: Database) -> None:
    """The registry stays, its heartbeat column changes: a client wrote that one until now."""
    owner = db.connect()
    user = add_user(owner)
    machine = add_machine(owner, user, "running")
    owner.execute("alter table public.cloud_machines add seen_at timestamptz")
    owner.execute("update public.cloud_machines set seen_at = now() + interval '1 day'")
    owner.execute(
        "select arbiter.register_machines('public.cloud_machines', p_heartbeat_column => 'seen_at')"
    )
    assert value(owner, "select seen_at from public.cloud_machines") < clock(owner)
    assert holder(owner, user) == ("local", None, machine)


def notices(conn: Conn, statement: str) -> list[tuple[str | None, str | None]]:
    """Message and hint of each notice."""
    found: list[tuple[str | None, str | None]] = []

    def note(diag: psycopg.errors.Diagnostic) -> None:
        found.append((diag.message_primary, diag.message_hint))

    conn.add_notice_handler(note)
    conn.execute(statement.encode())
    conn.remove_notice_handler(note)
    return found


REGISTER = "select arbiter.register_machines('public.cloud_machines')"


@pytest.mark.parametrize(
    "index",
    [
        "create index beat_idx on public.cloud_machines (last_health_check)",
        "create index beat_idx on public.cloud_machines (status, last_health_check)",
        "create index beat_idx on public.cloud_machines (id) where last_health_check is not null",
        "create index beat_idx on public.cloud_machines ((last_health_check is null))",
    ],
    ids=["alone", "second", "predicate", "expression"],
)
def test_notice_about_an_index_on_the_heartbeat_column(db: Database, index: str) -> None:
    conn = db.connect()
    assert notices(conn, REGISTER) == []
    conn.execute(index.encode())
    assert notices(conn, REGISTER) == [
        (
            "arbiter: no heartbeat can be a HOT update while an index reads last_health_check: "
            "public.beat_idx",
            "Drop it if you can.",
        )
    ]


def test_heartbeats_are_hot_and_leave_the_lease_alone(db: Database) -> None:
    """By the server's own count; with an index on the column none is."""
    conn = db.connect()
    machine = activate(conn, add_user(conn))

    def counted() -> dict[str, list[int]]:
        found = rows(
            conn,
            "select relname::text, n_tup_upd, n_tup_hot_upd, n_tup_ins"
            "  from pg_stat_xact_user_tables"
            " where relname in ('cloud_machines', 'leases', 'handovers', 'machine_notes')",
        )
        return {name: counts for name, *counts in found}

    def five_beats() -> dict[str, list[int]]:
        """Updates, HOT updates and inserts of five heartbeats, by table."""
        with conn.transaction():
            before = counted()
            for _ in range(5):
                beat(conn, machine)
            after = counted()
        return {
            name: [a - b for a, b in zip(after[name], before[name], strict=True)] for name in after
        }

    idle = {"leases": [0, 0, 0], "handovers": [0, 0, 0], "machine_notes": [0, 0, 0]}
    assert five_beats() == {"cloud_machines": [5, 5, 0], **idle}
    conn.execute("create index beat_idx on public.cloud_machines (last_health_check)")
    assert five_beats() == {"cloud_machines": [5, 0, 0], **idle}


CATALOG = """
select t.tgrelid::regclass || '.' || t.tgname, t.xmin::text from pg_trigger t
 where not t.tgisinternal
union all
select c.oid::regclass::text, c.relfilenode::text from pg_class c
  join pg_namespace n on n.oid = c.relnamespace and n.nspname in ('public', 'arbiter')
union all
select p.oid::regprocedure::text, p.oid::text from pg_proc p
  join pg_namespace n on n.oid = p.pronamespace and n.nspname = 'arbiter'
union all
select k.conrelid::regclass || '.' || k.conname, k.xmin::text from pg_constraint k
 where k.conname like 'arbiter%'
order by 1
"""


def test_registering_and_protecting_again_changes_nothing(db: Database) -> None:
    conn = db.connect()
    user = add_user(conn)
    machine = activate(conn, user)
    set_status(conn, machine, "stopping")
    data = "select l::text, n::text, m::text from arbiter.leases l, arbiter.machine_notes n, " + (
        "public.cloud_machines m"
    )
    before = rows(conn, CATALOG), rows(conn, data)
    # A session that reads the registry at that time is not in the way.
    with backend(db) as busy, busy.transaction():
        busy.execute("select from arbiter.machines")
        for _ in range(2):
            conn.execute(REGISTER)
            conn.execute("select arbiter.protect('public.signals')")
    assert (rows(conn, CATALOG), rows(conn, data)) == before


# Replacing the registry --------------------------------------------------------------------------

FLY_APPS = """
create table public.user_fly_apps (
  app_uuid uuid primary key default gen_random_uuid(),
  owner_id uuid not null references auth.users (id) on delete cascade,
  state varchar(20) not null default 'provisioning'
    check (state in ('provisioning', 'active', 'error', 'deprovisioning', 'deleted')),
  seen_at timestamptz
);
grant all on public.user_fly_apps to service_role
"""
#: The app's own migration, statement by statement. Old rows keep the ids of old machines.
MOVE = [
    "alter table public.signals drop constraint arbiter_machine_id_fkey",
    "alter table public.signals rename column machine_id to fly_app_id",
    "alter table public.signals add constraint signals_fly_app_id_fkey foreign key (fly_app_id)"
    " references public.user_fly_apps (app_uuid) on delete set null not valid",
]
REGISTER_APPS = """
select arbiter.register_machines('public.user_fly_apps', 'app_uuid', 'owner_id', 'state', 'seen_at')
"""
PROTECT_APPS = "select arbiter.protect('public.signals', p_machine_column => 'fly_app_id')"


def add_app(conn: Conn, user: User, word: str) -> str:
    app: str = value(
        conn,
        "insert into public.user_fly_apps (owner_id, state) values (%s, %s) returning app_uuid",
        user.id,
        word,
    )
    return app


def write_app(conn: Conn, app: str, assignment: str) -> None:
    statement = f"update public.user_fly_apps set {assignment} where app_uuid = %s"
    assert conn.execute(statement.encode(), (app,)).rowcount == 1


def add_app_signal(conn: Conn, user: User, source: str = "local", app: str | None = None) -> None:
    conn.execute(
        "insert into public.signals"
        " (trader_id, symbol, interval, signal, bar_time, source, fly_app_id)"
        " values (%s, 'BTCUSDT', '1m', 'buy', clock_timestamp(), %s, %s)",
        (user.trader, source, app),
    )


def test_replacing_the_registry(db: Database) -> None:
    """The app moves to a table with other words and column names, and renames machine_id."""
    owner, app_conn = db.connect(), backend(db)
    cloudy, local = add_user(owner), add_user(owner)
    web, web_of_local = browser(db, cloudy), browser(db, local)
    machine = activate(app_conn, cloudy)
    add_signal(web_of_local, local.trader)

    owner.execute(FLY_APPS)
    app = add_app(app_conn, cloudy, "active")
    owner.execute("update public.user_fly_apps set seen_at = now() + interval '1 day'")

    owner.execute(MOVE[0])
    add_signal(app_conn, cloudy.trader, "cloud", machine)  # the guard still knows its table
    for statement in [*MOVE[1:], REGISTER_APPS]:
        owner.execute(statement)
        assert_guard_rejects(owner, app_conn, web_of_local, cloudy, local, app)
    owner.execute(PROTECT_APPS)

    # The old machine's claim has ended; the new one is healthy and gets the lease.
    assert holder(owner, cloudy) == ("cloud", machine, app)
    assert rejection(add_app_signal, web, cloudy).sqlstate == "WX001"
    add_app_signal(app_conn, cloudy, "cloud", app)
    assert holder(owner, cloudy) == ("cloud", app, None)
    last = handovers(owner, cloudy)[-1]
    assert (last.reason, last.from_machine_id, last.to_machine_id) == ("activated", machine, app)
    add_app_signal(web_of_local, local)

    # Its words, its columns: stop, error, yes.
    began = clock(owner)
    write_app(app_conn, app, "seen_at = now() - interval '1 day'")
    assert value(owner, "select seen_at from public.user_fly_apps") > began
    write_app(app_conn, app, "state = 'deprovisioning'")
    assert rejection(add_app_signal, web, cloudy).sqlstate == "WX002"
    write_app(app_conn, app, "state = 'error'")
    age(owner, app, entered_error=DELAY)
    assert rejection(add_app_signal, web, cloudy).sqlstate == "WX003"
    value(web, "select (arbiter.confirm_takeover()).code")
    assert value(owner, "select state from public.user_fly_apps") == "deleted"
    add_app_signal(web, cloudy)

    # Deleted, its rows stay.
    owner.execute("delete from public.user_fly_apps")
    assert rows(
        owner, "select distinct source, fly_app_id from public.signals order by 1, 2 nulls last"
    ) == [("cloud", machine), ("cloud", None), ("local", None)]
    # The old registry is an ordinary table again.
    left = "select from pg_trigger where tgrelid = %s::regclass and tgname like %s"
    assert rows(owner, left, "public.cloud_machines", "arbiter%") == []
    owner.execute("drop table public.cloud_machines")


def assert_guard_rejects(
    owner: Conn, app_conn: Conn, web: Conn, cloudy: User, local: User, app: str
) -> None:
    """A guard whose table changed under it rejects all writes, also the holder's."""
    before = rows(owner, "select * from public.signals order by id")
    for write in (
        lambda: add_app_signal(web, local),
        lambda: add_app_signal(owner, local),
        lambda: add_app_signal(app_conn, cloudy, "cloud", app),
        lambda: add_app_signal(app_conn, cloudy, "cloud"),
    ):
        error = rejection(write)
        assert error.sqlstate == "WX005"
        hint = error.diag.message_hint or ""
        assert "has no column machine_id any more. What mends it: " in hint
        assert "arbiter.protect(" in hint
    assert rows(owner, "select * from public.signals order by id") == before


def test_holder_whose_registry_was_replaced_without_a_successor(db: Database) -> None:
    owner = db.connect()
    user = add_user(owner)
    web = browser(db, user)
    machine = activate(owner, user)
    owner.execute(FLY_APPS)
    began = clock(owner)
    owner.execute(REGISTER_APPS)
    assert holder(owner, user) == ("cloud", machine, None)
    assert began < notes(owner, machine).left_running_at < clock(owner)
    assert rejection(add_signal, web, user.trader).sqlstate == "WX002"
    # Rejected by arbiter's own foreign key, which leads elsewhere now, and without it by the guard.
    assert rejection(add_signal, owner, user.trader, "cloud", machine).sqlstate == "23503"
    owner.execute("alter table public.signals drop constraint arbiter_machine_id_fkey")
    assert rejection(add_signal, owner, user.trader, "cloud", machine).sqlstate == "WX005"
    beat(owner, machine)  # of a table that is no registry any more
    age_note(owner, user, machine)
    add_signal(web, user.trader)
    assert handovers(owner, user)[-1].reason == "machine_stopped"


def test_replacing_a_registry_that_was_dropped(db: Database) -> None:
    """Dropped with cascade, which takes arbiter's view along: no machine can be read."""
    owner = db.connect()
    user = add_user(owner)
    web = browser(db, user)
    machine = activate(owner, user)
    owner.execute("drop table public.cloud_machines cascade")
    before = rows(owner, "select * from public.signals")
    rejection(add_signal, web, user.trader)
    rejection(add_signal, owner, user.trader, "cloud", machine)
    assert rows(owner, "select * from public.signals") == before

    owner.execute(FLY_APPS)
    owner.execute(REGISTER_APPS)
    assert rejection(add_signal, web, user.trader).sqlstate == "WX002"
    age_note(owner, user, machine)
    add_signal(web, user.trader)


def test_heartbeat_column_is_added(db: Database) -> None:
    owner = db.connect()
    owner.execute("create table public.apps (id uuid primary key, user_id uuid, status text)")
    owner.execute("select arbiter.register_machines('public.apps')")
    column = one(
        owner,
        "select format_type(atttypid, atttypmod) as type, col_description(attrelid, attnum) as said"
        "  from pg_attribute"
        " where attrelid = 'public.apps'::regclass and attname = 'last_health_check'",
    )
    assert column.type == "timestamp with time zone"
    assert column.said.startswith("arbiter: ")


#: Names and words with everything in them that needs quoting.
QUOTED = r"""
create schema "My App";
create table "My App"."User""s machines"
  ("The Id" uuid primary key, "select" uuid, "Zustand's" text, "at\" timestamptz);
select arbiter.register_machines('"My App"."User""s machines"', 'The Id', 'select', 'Zustand''s',
  'at\', '{"l''\\u00e4uft": "running", "x": "stopped"}');
"""


def test_names_that_need_quoting(db: Database) -> None:
    owner = db.connect()
    user, machine = add_user(owner), str(uuid4())
    owner.execute(QUOTED.encode())
    for _ in range(2):
        owner.execute(
            """insert into "My App"."User""s machines" values (%s, %s, 'l''äuft', '2026-01-01')"""
            """ on conflict ("The Id") do update set "at\\" = excluded."at\\" """,
            (machine, user.id),
        )
    assert holder(owner, user) == ("cloud", machine, None)
    assert rejection(add_signal, browser(db, user), user.trader).sqlstate == "WX001"


def test_heartbeats_in_one_statement_end_a_drain_in_any_order(db: Database) -> None:
    """The look at the lease for the first machine is not taken for a write in the epoch."""
    conn = db.connect()
    conn.execute("alter table public.cloud_machines drop constraint cloud_machines_user_id_key")
    ada = add_user(conn)
    first, second = sorted(add_machine(conn, ada, "running") for _ in range(2))
    beat(conn, first)
    beat(conn, first)
    assert lease(conn, ada).machine_id == first
    age(conn, first, heartbeat=timedelta(hours=1))
    beat(conn, second)
    assert lease(conn, ada).draining_to == second
    conn.execute("select arbiter.heartbeats(%s)", ([first, second],))
    assert (lease(conn, ada).machine_id, lease(conn, ada).draining_to) == (second, None)


def test_a_machine_that_an_old_local_row_names_can_be_deleted(db: Database) -> None:
    """A row from before protection may say local and name a machine; its foreign key still acts."""
    conn = db.connect()
    ada = add_user(conn)
    machine = add_machine(conn, ada)
    conn.execute("select arbiter.unprotect('public.signals')")
    signal = add_signal(conn, ada.trader, "local", machine)
    conn.execute("select arbiter.protect('public.signals')")
    conn.execute("delete from public.cloud_machines where id = %s", (machine,))
    row = one(conn, "select source, machine_id from public.signals where id = %s", signal)
    assert (row.source, row.machine_id) == ("local", None)


def test_an_error_that_was_missed_leaves_the_instant_of_the_stop(db: Database) -> None:
    """The grace after the stop goes on from there; a stop that was missed begins it now."""
    owner = db.connect()
    machine = activate(owner, add_user(owner))
    set_status(owner, machine, "stopped")
    left = notes(owner, machine).left_running_at
    owner.execute("alter table public.cloud_machines disable trigger user")
    set_status(owner, machine, "error")
    owner.execute(REGISTER)
    noted = notes(owner, machine)
    assert noted.left_running_at == left
    assert noted.entered_error_at > left
    # And the instant of the error stays, where only the stop is not known.
    owner.execute("update arbiter.machine_notes set left_running_at = null")
    owner.execute(REGISTER)
    again = notes(owner, machine)
    assert again.entered_error_at == noted.entered_error_at
    assert again.left_running_at > left
