"""A registry that says whether its machines are well: whose heartbeats count then.

The attack is a monitor that stamps `last_health_check` every few minutes, also when its probe has
failed: it keeps the lease of a machine that is dead.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, LiteralString
from uuid import uuid4

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    backend,
    beat,
    browser,
    clock,
    column,
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

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

TIMEOUT = SETTINGS["heartbeat_timeout"]
ADD = "alter table public.cloud_machines add health_status text default 'healthy'"
REGISTER = (
    "select arbiter.register_machines('public.cloud_machines',"
    " p_health_column => 'health_status', p_healthy => '{healthy,degraded}')"
)
#: What the monitor writes after a probe.
PROBE = "update public.cloud_machines set last_health_check = now(), health_status = %s"


@pytest.fixture
def owner(db: Database) -> Conn:
    """The owner's connection. The registry has a health column, and it is declared."""
    conn = db.connect()
    conn.execute(ADD)
    conn.execute(REGISTER)
    return conn


@pytest.fixture
def user(owner: Conn) -> User:
    return add_user(owner)


@pytest.fixture
def machine(db: Database, user: User) -> str:
    """A machine that is well and holds the user's lease."""
    return activate(backend(db), user)


def stored(conn: Conn, machine: str) -> datetime | None:
    found: datetime | None = value(
        conn, "select last_health_check from public.cloud_machines where id = %s", machine
    )
    return found


def say(conn: Conn, word: str | None) -> None:
    """The health word of all machines, and nothing else."""
    conn.execute("update public.cloud_machines set health_status = %s", (word,))


# The attack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_monitor_keeps_no_dead_machines_lease(db: Database, is_declared: bool) -> None:
    """The twin does not declare the column: its browser waits for as long as the monitor runs."""
    owner = db.connect()
    owner.execute(ADD)
    if is_declared:
        owner.execute(REGISTER)
    user = add_user(owner)
    machine = activate(backend(db), user)
    web, monitor = browser(db, user), backend(db)
    monitor.execute(PROBE, ("unhealthy",))
    # Its last heartbeat is fresh, with either.
    assert rejection(add_signal, web, user.trader).sqlstate == "WX001"
    add_signal(owner, user.trader, "cloud", machine)

    age(owner, machine, heartbeat=TIMEOUT)
    monitor.execute(PROBE, ("unhealthy",))
    if not is_declared:
        assert rejection(add_signal, web, user.trader).sqlstate == "WX001"
        return
    assert status(web)["can_write_local"] is True
    add_signal(web, user.trader)
    assert handovers(owner, user)[-1].reason == "heartbeat_lapsed"
    error = rejection(add_signal, owner, user.trader, "cloud", machine)
    assert error.sqlstate == "WX004"
    assert "or its registry says that it is not well, in column health_status." in str(error)

    # Nor does it get the lease back while the probe fails, but with the first that succeeds.
    for _ in range(3):
        monitor.execute(PROBE, ("unhealthy",))
    assert (lease(owner, user).holder, lease(owner, user).draining_to) == ("local", None)
    add_signal(web, user.trader)
    monitor.execute(PROBE, ("healthy",))
    assert rejection(add_signal, web, user.trader).sqlstate == "WX001"
    add_signal(owner, user.trader, "cloud", machine)


def test_an_unhealthy_machine_never_activates(db: Database, owner: Conn, user: User) -> None:
    """Not by any write that leaves its status running, and names its heartbeat or does not."""
    conn = backend(db)
    machine = add_machine(conn, user)
    conn.execute(PROBE, ("unhealthy",))
    set_status(conn, machine, "running")
    conn.execute(PROBE, ("unhealthy",))
    conn.execute("update public.cloud_machines set region = 'iad', last_health_check = now()")
    assert stored(conn, machine) is None
    assert (lease(owner, user).holder, lease(owner, user).draining_to) == ("local", None)
    add_signal(browser(db, user), user.trader)
    assert rejection(add_signal, conn, user.trader, "cloud", machine).sqlstate == "WX004"


# What counts -------------------------------------------------------------------------------------

#: A health word, and whether a heartbeat of a row with it counts.
WORDS = {
    "healthy": True,
    "degraded": True,
    "unhealthy": False,
    "Healthy": False,
    "healthy ": False,
    "healthy,degraded": False,
    "": False,
    None: False,
}
#: Writes of a machine %(id)s of %(user)s with a heartbeat and the word %(word)s; whether its row
#: is there before, and what that says then.
INSERT = """
insert into public.cloud_machines (id, user_id, status, last_health_check, health_status)
values (%(id)s, %(user)s, 'running', now(), %(word)s)
"""
UPSERT = f"{INSERT} on conflict (id) do update set last_health_check = excluded.last_health_check"
MERGE = """
merge into public.cloud_machines as m
using (values (%(id)s::uuid, %(user)s::uuid, %(word)s)) as v (id, user_id, word) on m.id = v.id
when matched then update set last_health_check = now(), health_status = v.word
when not matched then insert (id, user_id, status, last_health_check, health_status)
  values (v.id, v.user_id, 'running', now(), v.word)
"""
WRITES: dict[str, tuple[LiteralString, str | None]] = {
    "insert": (INSERT, None),
    "upsert that inserts": (UPSERT, None),
    "merge that inserts": (MERGE, None),
    "update of both": (PROBE.replace("%s", "%(word)s"), "unhealthy"),
    "update of both, well before": (PROBE.replace("%s", "%(word)s"), "healthy"),
    "update of a null heartbeat": (
        "update public.cloud_machines set health_status = %(word)s, last_health_check = null",
        "healthy",
    ),
    "upsert that updates": (
        UPSERT + ", health_status = excluded.health_status",
        "unhealthy",
    ),
    "merge that updates": (MERGE, "healthy"),
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("statement", "before"), WRITES.values(), ids=WRITES)
def test_a_heartbeat_counts_by_the_word_of_its_row(
    db: Database,
    owner: Conn,
    user: User,
    statement: LiteralString,
    before: str | None,
    word: str | None,
) -> None:
    conn = backend(db)
    machine, first = str(uuid4()), None
    if before is not None:
        machine = add_machine(conn, user, "running")
        first = beat(conn, machine)
        say(conn, before)
    began = clock(conn)
    cur = conn.execute(statement, {"id": machine, "user": user.id, "word": word})
    assert cur.rowcount == 1
    now = stored(conn, machine)
    if WORDS[word]:
        assert now is not None
        assert began < now < clock(conn)
    else:
        assert now == first
    said = value(conn, "select health_status from public.cloud_machines where id = %s", machine)
    assert said == word


@pytest.mark.parametrize("excluded", ["healthy", "unhealthy"])
def test_an_upsert_counts_by_the_row_that_it_leaves(
    db: Database, owner: Conn, user: User, machine: str, excluded: str
) -> None:
    """Not by the one that it would have inserted."""
    conn = backend(db)
    params = {"id": machine, "user": user.id, "word": excluded}
    first = stored(conn, machine)
    say(conn, "unhealthy")
    conn.execute(UPSERT, params)
    assert stored(conn, machine) == first
    say(conn, "healthy")
    conn.execute(UPSERT, params)
    assert stored(conn, machine) != first


def test_a_word_alone_is_no_heartbeat(db: Database, owner: Conn, user: User, machine: str) -> None:
    conn = backend(db)
    conn.execute(PROBE, ("unhealthy",))
    age(owner, machine, heartbeat=TIMEOUT)
    say(conn, "healthy")
    add_signal(browser(db, user), user.trader)
    beat(conn, machine)
    assert rejection(add_signal, browser(db, user), user.trader).sqlstate == "WX001"


def test_the_last_heartbeat_that_counted_is_good_for_its_time(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    """Also beside a word that says otherwise: the machine may act until then."""
    conn = backend(db)
    conn.execute(PROBE, ("unhealthy",))
    conn.execute(PROBE, ("unhealthy",))
    add_signal(conn, user.trader, "cloud", machine)
    assert rejection(add_signal, browser(db, user), user.trader).sqlstate == "WX001"


def test_heartbeats_in_one_statement_count_each_for_itself(db: Database, owner: Conn) -> None:
    conn = backend(db)
    users = [add_user(owner) for _ in range(4)]
    words = ["healthy", "unhealthy", None, "degraded"]
    machines = [add_machine(conn, user, "running") for user in users]
    for machine, word in zip(machines, words, strict=True):
        conn.execute(
            "update public.cloud_machines set health_status = %s where id = %s", (word, machine)
        )
    for _ in range(2):
        conn.execute("update public.cloud_machines set last_health_check = now()")
    assert [lease(owner, user).holder for user in users] == ["cloud", "local", "local", "cloud"]
    assert [stored(conn, machine) is None for machine in machines] == [False, True, True, False]


def test_a_heartbeat_that_waited_counts_by_what_it_found(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    first = stored(owner, machine)
    with db.session() as probe, db.session() as heartbeat:
        probe.run("begin")
        probe.run("update public.cloud_machines set health_status = 'unhealthy'")
        waiting = heartbeat.start("update public.cloud_machines set last_health_check = now()")
        wait_until_blocked(heartbeat)
        probe.run("commit")
        assert waiting.result(TIMEOUT_S).rowcount == 1
    assert stored(owner, machine) == first


#: Names of a trigger of the app, before and after arbiter's.
@pytest.mark.parametrize("name", ["!!", "a_probe", "set_health", "zzz", "~"])
@pytest.mark.parametrize("verb", ["insert", "update"])
def test_a_trigger_of_the_app_may_say_it(
    db: Database, owner: Conn, user: User, name: str, verb: str
) -> None:
    """The row counts as it is stored, and not as the statement wrote it."""
    owner.execute(
        f"""
        create function public.tg_probe() returns trigger language plpgsql as $$
        begin
          new.health_status := case when new.error_message is null then 'healthy' else 'bad' end;
          return new;
        end $$;
        create trigger "{name}" before insert or update on public.cloud_machines
          for each row execute function public.tg_probe();
        """.encode()
    )
    conn = backend(db)
    machine, first = str(uuid4()), None
    if verb == "update":
        machine = add_machine(conn, user, "running")
        first = beat(conn, machine)
        conn.execute(
            "update public.cloud_machines"
            " set last_health_check = now(), health_status = 'healthy', error_message = 'timeout'"
        )
    else:
        conn.execute(
            "insert into public.cloud_machines"
            " (id, user_id, status, last_health_check, health_status, error_message)"
            " values (%s, %s, 'running', now(), 'healthy', 'timeout')",
            (machine, user.id),
        )
    assert stored(conn, machine) == first
    conn.execute(
        "update public.cloud_machines"
        " set last_health_check = now(), health_status = 'bad', error_message = null"
    )
    assert stored(conn, machine) not in (None, first)


#: Types of a health column: its definition, the words for well, and a value that is not.
TYPES: dict[str, tuple[LiteralString, LiteralString, LiteralString, LiteralString]] = {
    "boolean": ("boolean", "{true}", "true", "false"),
    "enum": ("public.health", "{good}", "'good'", "'bad'"),
    "domain": ("public.word", "{good}", "'good'", "'bad'"),
    "varchar": ("varchar(9)", "{good}", "'good'", "'bad'"),
    "char": ("char(9)", "{good}", "'good'", "'bad'"),
    "integer": ("integer", "{200,204}", "204", "503"),
}


@pytest.mark.parametrize(("kind", "healthy", "good", "bad"), TYPES.values(), ids=TYPES)
def test_a_column_of_any_type(
    db: Database,
    kind: LiteralString,
    healthy: LiteralString,
    good: LiteralString,
    bad: LiteralString,
) -> None:
    owner = db.connect()
    owner.execute("create type public.health as enum ('good', 'bad')")
    owner.execute("create domain public.word as text")
    owner.execute(f"""alter table public.cloud_machines add "Is it's well?" {kind}""".encode())
    owner.execute(
        "select arbiter.register_machines('public.cloud_machines',"
        f""" p_health_column => 'Is it''s well?', p_healthy => '{healthy}')""".encode()
    )
    machine = add_machine(owner, add_user(owner), "running")

    def probe(word: str) -> datetime | None:
        owner.execute(
            "update public.cloud_machines"
            f""" set last_health_check = now(), "Is it's well?" = {word}""".encode()
        )
        return stored(owner, machine)

    assert probe(bad) is None
    first = probe(good)
    assert first is not None
    assert probe("null") == first
    assert probe(good) != first


def test_words_that_need_quoting(db: Database) -> None:
    words = ["it's", 'a "word"', "a,b", "{}", "$$", "__heartbeat", "null", "a\\b"]
    owner = db.connect()
    owner.execute(ADD)
    owner.execute(
        "select arbiter.register_machines('public.cloud_machines',"
        " p_health_column => 'health_status', p_healthy => %s)",
        (words,),
    )
    machine = add_machine(owner, add_user(owner), "running")
    seen = set()
    for word in words:
        owner.execute(PROBE, (word,))
        seen.add(stored(owner, machine))
    assert None not in seen
    assert len(seen) == len(words)
    owner.execute(PROBE, (None,))
    assert stored(owner, machine) in seen


# arbiter.heartbeat() -----------------------------------------------------------------------------


def test_heartbeat_of_an_unhealthy_machine_is_an_error(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    """A machine that took it for a success would go on trading when the browser may write."""
    conn = backend(db)
    say(conn, "unhealthy")
    before = one(owner, "select * from public.cloud_machines")
    error = rejection(conn.execute, "select arbiter.heartbeat(%s::uuid)", (machine,))
    assert error.sqlstate == "55000"
    assert detail_of(error) == {"code": "machine_unhealthy", "machine_id": str(machine)}
    assert one(owner, "select * from public.cloud_machines") == before
    say(conn, "degraded")
    assert value(conn, "select arbiter.heartbeat(%s::uuid)", machine) == stored(conn, machine)


def test_heartbeats_return_how_many_count(db: Database, owner: Conn) -> None:
    """One that is unhealthy does not end those of the others."""
    conn = backend(db)
    users = [add_user(owner) for _ in range(3)]
    machines = [add_machine(conn, user, "running") for user in users]
    conn.execute(
        "update public.cloud_machines set health_status = 'unhealthy' where id = %s",
        (machines[1],),
    )
    for _ in range(2):
        assert value(conn, "select arbiter.heartbeats(%s::text[])", machines) == 2
    assert [lease(owner, user).holder for user in users] == ["cloud", "local", "cloud"]
    assert stored(conn, machines[1]) is None
    assert value(conn, "select arbiter.heartbeats(%s::text[])", [machines[1]]) == 0


def test_heartbeats_name_the_unknown_machine_and_not_the_unhealthy_one(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    other = activate(backend(db), add_user(owner))
    say(owner, "unhealthy")
    unknown = str(uuid4())
    calls = [(backend(db), [machine, unknown, other], unknown)]
    # A token of this machine does not see the other one; with a policy it does, and may not update.
    claims = {"sub": str(user.id), "role": "authenticated", "machine_id": str(machine)}
    token = db.connect(role="authenticated", claims=claims)
    calls.append((token, [machine, other], other))
    for conn, ids, named in calls:
        error = rejection(conn.execute, "select arbiter.heartbeats(%s::text[])", (ids,))
        assert error.sqlstate == "P0002"
        assert detail_of(error)["machine_id"] == str(named)
    owner.execute("create policy seen on public.cloud_machines for select using (true)")
    assert column(token, "select id from public.cloud_machines where id = %s", other) != []
    error = rejection(token.execute, "select arbiter.heartbeats(%s::text[])", ([machine, other],))
    assert (error.sqlstate, detail_of(error)["machine_id"]) == ("P0002", str(other))


# Tokens ------------------------------------------------------------------------------------------


def test_a_machines_token_may_not_say_that_its_machine_is_well(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    owner.execute(REGISTER.replace("')", "', p_machine_statuses => '{stopped}')"))
    assert value(owner, "select health_column from arbiter.registry") == "health_status"
    say(owner, "unhealthy")
    first = stored(owner, machine)
    claims = {"sub": str(user.id), "role": "authenticated", "machine_id": str(machine)}
    token = db.connect(role="authenticated", claims=claims)
    for attack in (
        "set health_status = 'healthy'",
        "set last_health_check = now(), health_status = 'healthy'",
        "set status = 'stopped', health_status = 'healthy'",
    ):
        error = rejection(token.execute, f"update public.cloud_machines {attack}".encode())
        assert error.sqlstate == "42501"
        assert "may not change column health_status" in str(error)
    assert beat(token, machine) == first
    assert rejection(token.execute, "select arbiter.heartbeat(%s)", (machine,)).sqlstate == "55000"
    say(owner, "healthy")
    assert beat(token, machine) != first


# Registering -------------------------------------------------------------------------------------


def declared(conn: Conn) -> tuple[Any, ...]:
    found: tuple[Any, ...] = one(conn, "select health_column, healthy from arbiter.registry")
    return tuple(found)


def test_registering_again_says_all_anew(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    """As with the status words, a call that leaves the health column out has none."""
    assert declared(owner) == ("health_status", ["healthy", "degraded"])
    owner.execute(REGISTER.replace("healthy,degraded", "good"))
    assert declared(owner) == ("health_status", ["good"])
    first = stored(owner, machine)
    assert beat(owner, machine) == first
    say(owner, "good")
    assert beat(owner, machine) != first

    say(owner, "unhealthy")
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    assert declared(owner) == (None, None)
    first = stored(owner, machine)
    assert beat(owner, machine) != first
    assert value(owner, "select arbiter.heartbeat(%s::uuid)", machine) == stored(owner, machine)


def test_registering_again_changes_nothing(db: Database, owner: Conn, machine: str) -> None:
    triggers = "select tgname, xmin from pg_trigger where tgrelid = 'cloud_machines'::regclass"
    before = rows(owner, triggers)
    assert count_rows(owner, "arbiter.handovers") == 2
    owner.execute(REGISTER)
    assert rows(owner, triggers) == before
    assert count_rows(owner, "arbiter.handovers") == 2


def test_a_heartbeat_from_before_ends_by_itself(db: Database) -> None:
    """It may have been a good one, so a call takes it from no machine."""
    owner = db.connect()
    owner.execute(ADD)
    user = add_user(owner)
    machine = activate(backend(db), user)
    owner.execute(PROBE, ("unhealthy",))
    first = stored(owner, machine)
    owner.execute(REGISTER)
    assert stored(owner, machine) == first
    add_signal(owner, user.trader, "cloud", machine)
    owner.execute(PROBE, ("unhealthy",))
    assert stored(owner, machine) == first


def test_another_registry_has_a_health_column_of_its_own(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    owner.execute(
        """
        create table public.user_fly_apps (
          id uuid primary key, user_id uuid, status text, last_health_check timestamptz,
          probe text);
        insert into public.user_fly_apps
          select id, user_id, 'active', last_health_check, 'failing' from public.cloud_machines;
        select arbiter.register_machines('public.user_fly_apps',
          p_health_column => 'probe', p_healthy => '{passing}');
        """
    )
    beating = "update public.user_fly_apps set last_health_check = now() returning 1"
    beat_at = "select last_health_check from public.user_fly_apps"
    first = value(owner, beat_at)
    value(owner, beating)
    assert value(owner, beat_at) == first
    add_signal(owner, user.trader, "cloud", machine)
    owner.execute("update public.user_fly_apps set probe = 'passing'")
    value(owner, beating)
    assert value(owner, beat_at) != first
    # The old one has no trigger any more, and keeps what a client writes.
    assert beat(owner, machine) > clock(owner)


def test_the_record_has_both_or_neither(owner: Conn) -> None:
    for half in ("health_column = null", "healthy = null"):
        error = rejection(owner.execute, f"update arbiter.registry set {half}".encode())
        assert error.diag.constraint_name == "registry_health_check"


def test_a_column_that_is_renamed_stops_heartbeats_and_doctor_says_so(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    """An error for the machine, and not a heartbeat that counts."""
    owner.execute("alter table public.cloud_machines rename health_status to probe")
    first = stored(owner, machine)
    assert rejection(beat, backend(db), machine).sqlstate == "42703"
    assert stored(owner, machine) == first
    wrong = "select object, problem from arbiter.doctor() where state not in ('ok', 'note')"
    assert [tuple(row) for row in rows(owner, wrong)] == [
        (
            "registry public.cloud_machines",
            "arbiter: table public.cloud_machines has no column health_status",
        )
    ]
    owner.execute(REGISTER.replace("'health_status'", "'probe'"))
    assert rows(owner, wrong) == []
    assert beat(backend(db), machine) != first


def test_what_mends_a_trigger_keeps_the_health_column(
    db: Database, owner: Conn, machine: str
) -> None:
    owner.execute('drop trigger "~arbiter_stamp_update" on public.cloud_machines')
    remedies = rows(owner, "select object, remedy from arbiter.doctor() where state = 'missing'")
    assert [row.object for row in remedies] == [
        'trigger "~arbiter_stamp_update" on public.cloud_machines'
    ]
    before = one(owner, "select * from arbiter.registry")
    owner.execute(remedies[0].remedy.encode())
    assert one(owner, "select * from arbiter.registry") == before
    first = stored(owner, machine)
    owner.execute(PROBE, ("unhealthy",))
    assert stored(owner, machine) == first


@pytest.mark.parametrize("name", ["health", "health_status"])
@pytest.mark.parametrize("kind", ["text", "public.health", "boolean", "jsonb"])
def test_the_plan_asks_about_a_column_of_that_name(
    db: Database, name: LiteralString, kind: LiteralString
) -> None:
    owner = db.connect()
    owner.execute("create type public.health as enum ('good', 'bad')")
    owner.execute(f"alter table public.cloud_machines add {name} {kind}".encode())
    notes = (
        "select finding, remedy from"
        " arbiter._registry_notes('public.cloud_machines', true) where finding ~ 'well'"
    )
    asked = [tuple(row) for row in rows(owner, notes)]
    if kind in ("boolean", "jsonb"):
        assert asked == []
        return
    assert asked == [
        (
            f"column {name} may say that a machine is not well, and every heartbeat counts all"
            " the same",
            "If a monitor stamps last_health_check then, too: call arbiter.register_machines()"
            " again with p_health_column and p_healthy, and with the other options as they are.",
        )
    ]
    owner.execute(
        "select arbiter.register_machines('public.cloud_machines',"
        f" p_health_column => '{name}', p_healthy => '{{good}}')".encode()
    )
    assert rows(owner, notes) == []
    shown = f"machines: 0; columns id, user_id, status, {name}, last_health_check"
    every = "select finding from arbiter._registry_notes('public.cloud_machines', true)"
    assert column(owner, every) == [shown]


def test_the_plan_does_not_ask_about_a_status_of_that_name(db: Database) -> None:
    owner = db.connect()
    owner.execute("alter table public.cloud_machines rename status to health")
    owner.execute(
        "select arbiter.register_machines('public.cloud_machines', p_status_column => 'health')"
    )
    notes = "select step, finding from arbiter._registry_notes('public.cloud_machines', true)"
    assert [tuple(row) for row in rows(owner, notes)] == [
        ("note", "machines: 0; columns id, user_id, health, last_health_check")
    ]


def test_the_error_reaches_an_api_as_409(
    db: Database, owner: Conn, user: User, machine: str
) -> None:
    say(owner, "unhealthy")
    conn = backend(db)
    conn.execute("select set_config('request.method', 'POST', false)")
    error = rejection(conn.execute, "select arbiter.heartbeat(%s::uuid)", (machine,))
    assert error.sqlstate == "PGRST"
    assert json.loads(error.diag.message_primary or "")["code"] == "55000"
    assert detail_of(error)["status"] == 409
