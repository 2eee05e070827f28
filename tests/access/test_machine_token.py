"""What a machine's token may change in its row of the registry: its heartbeat, and listed words.

Each attack is one that row security alone lets pass, as the twins show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import User, activate, add_machine, add_user, backend, beat, one, rejection, rows, value

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

REGISTER = "select arbiter.register_machines('public.cloud_machines', p_machine_statuses => %s)"


@pytest.fixture
def user(db: Database) -> User:
    return add_user(db.connect())


@pytest.fixture
def machine(db: Database, user: User) -> str:
    """A machine that holds the user's lease."""
    return activate(backend(db), user)


def claims(user: User, machine: str) -> dict[str, str]:
    return {"sub": str(user.id), "role": "authenticated", "machine_id": str(machine)}


def token(db: Database, user: User, machine: str) -> Conn:
    return db.connect(role="authenticated", claims=claims(user, machine))


def allow(db: Database, *words: str) -> None:
    """The app lists these words for machines."""
    db.connect().execute(REGISTER, (list(words),))


def unlimited(db: Database) -> None:
    """The twin: nothing but row security."""
    db.connect().execute('drop trigger "!arbiter_limit" on public.cloud_machines')


def registry(db: Database) -> Any:
    return one(db.connect(), "select * from public.cloud_machines")


# What it may not ---------------------------------------------------------------------------------

ATTACKS: dict[str, LiteralString] = {
    "the provider's id": "update public.cloud_machines set machine_id = 'stolen'",
    "its status": "update public.cloud_machines set status = 'stopped'",
    "its region": "update public.cloud_machines set region = 'iad'",
    "a null": "update public.cloud_machines set machine_id = null",
    "beside its heartbeat": "update public.cloud_machines"
    " set last_health_check = now(), stopped_at = now()",
    "by MERGE": "merge into public.cloud_machines m using (values (1)) as v on true"
    " when matched then update set machine_id = 'stolen'",
}


@pytest.mark.parametrize("value_of", ["1.49::float8", "1.2600", "'{\"a\":  1}'::json"])
def test_no_setting_hides_a_change(
    db: Database, user: User, machine: str, value_of: LiteralString
) -> None:
    """extra_float_digits changes the text of a number, and text says little of json and scale."""
    kind = {"1.49": "float8", "1.26": "numeric", "'{\"a": "json"}[value_of[:4]]
    first = "'{\"a\": 1}'" if kind == "json" else "1.26"
    db.connect().execute(
        f"alter table public.cloud_machines add column price {kind} default {first}".encode()
    )
    conn = token(db, user, machine)
    conn.execute("set extra_float_digits = -15")
    error = rejection(conn.execute, f"update public.cloud_machines set price = {value_of}")
    assert error.sqlstate == "42501"
    assert "column price of public.cloud_machines" in str(error)
    conn.execute("update public.cloud_machines set last_health_check = now(), price = price")


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_other_columns_are_closed(
    db: Database, user: User, machine: str, attack: LiteralString
) -> None:
    before = registry(db)
    error = rejection(token(db, user, machine).execute, attack)
    assert error.sqlstate == "42501"
    assert (error.diag.message_primary or "").startswith("arbiter: a machine's token may not ")
    assert registry(db) == before
    # Those that are not clients of the API are not limited, and their own claims change nothing.
    backend(db).execute(attack)
    unlimited(db)
    token(db, user, machine).execute(attack)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (
            "set region = 'iad'",
            "a machine's token may not change column region of public.cloud_machines",
        ),
        ("set status = 'error'", "a machine's token may not set the status 'error'"),
    ],
)
def test_the_error_says_which(
    db: Database, user: User, machine: str, attack: str, said: str
) -> None:
    statement = f"update public.cloud_machines {attack}"
    error = rejection(token(db, user, machine).execute, statement.encode())
    assert (error.diag.message_primary or "").startswith(f"arbiter: {said}")


def test_an_upsert_is_an_insert(db: Database, user: User, machine: str) -> None:
    """PostgREST's merge-duplicates; a machine's token inserts no machine."""
    db.connect().execute(
        "create policy generous on public.cloud_machines to authenticated"
        " using (true) with check (true);"
        " grant all on public.cloud_machines to authenticated"
    )
    upsert = (
        "insert into public.cloud_machines (id, user_id, last_health_check) values (%s, %s, now())"
        " on conflict (id) do update set last_health_check = excluded.last_health_check"
    )
    error = rejection(token(db, user, machine).execute, upsert, (machine, user.id))
    assert error.sqlstate == "42501"
    assert "arbiter_registry_insert" in str(error)


def test_a_stop_that_comes_first_is_not_undone(db: Database, user: User, machine: str) -> None:
    """The machine saves its row as it knows it while the app stops it.

    The new row is the one that the statement began with, so a policy sees no change.
    """
    save = (
        "update public.cloud_machines set status = 'running', last_health_check = now()"
        " where id = %s"
    )
    token(db, user, machine).execute(save, (machine,))  # no change, no harm
    app = db.session(role="service_role", name="app")
    client = db.session(role="authenticated", name="machine", claims=claims(user, machine))
    app.run("begin")
    app.run("update public.cloud_machines set status = 'stopped'")
    saving = client.start(save, (machine,))
    wait_until_blocked(client)
    app.run("commit")
    error = rejection(saving.result, TIMEOUT_S)
    assert (error.sqlstate, registry(db).status) == ("42501", "stopped")


# What it may -------------------------------------------------------------------------------------


def test_heartbeats_pass(db: Database, user: User, machine: str) -> None:
    """By each of the ways to send one."""
    conn = token(db, user, machine)
    before = registry(db).last_health_check
    for statement in (
        "update public.cloud_machines set last_health_check = now()",
        "update public.cloud_machines set last_health_check = last_health_check",
        "update arbiter.machines set heartbeat_at = now()",
        "select arbiter.heartbeat(machine_id) from arbiter.machines",
        "select arbiter.heartbeats(array_agg(machine_id::text)) from arbiter.machines",
        "merge into public.cloud_machines m using (values (1)) as v on true"
        " when matched then update set last_health_check = now()",
    ):
        conn.execute(statement.encode())
        after = registry(db).last_health_check
        assert after > before, statement
        before = after


@pytest.mark.parametrize("name", ["a_first", "arbiter_zz", "Zz", "zz"])
def test_triggers_of_the_app_may_change_more(
    db: Database, user: User, machine: str, name: str
) -> None:
    """Only what the statement asks for counts, whichever trigger the server runs first."""
    owner = db.connect()
    owner.execute(
        f"""
        create function public.tg_more() returns trigger language plpgsql as
          $$ begin new.region := 'seen'; new.updated_at := now(); return new; end $$;
        create trigger "{name}" before update on public.cloud_machines
          for each row execute function public.tg_more()""".encode()
    )
    beat(token(db, user, machine), machine)
    assert registry(db).region == "seen"


def test_generated_columns_do_not_count(db: Database, user: User, machine: str) -> None:
    """They follow the heartbeat; before the update they have no value."""
    owner = db.connect()
    owner.execute(
        "alter table public.cloud_machines add column gone integer, add column beats boolean"
        " generated always as (last_health_check is not null) stored"
    )
    owner.execute("alter table public.cloud_machines drop column gone, add column plan json")
    owner.execute("update public.cloud_machines set plan = '{}'")
    conn = token(db, user, machine)
    beat(conn, machine)
    error = rejection(conn.execute, "update public.cloud_machines set plan = '[]'")
    assert "may not change column plan" in str(error)


def test_listed_words_may_be_set(db: Database, user: User) -> None:
    machine = add_machine(backend(db), user, "starting")
    allow(db, "running", "error")
    conn = token(db, user, machine)
    conn.execute("update public.cloud_machines set status = 'running', last_health_check = now()")
    conn.execute("update public.cloud_machines set status = 'error'")
    error = rejection(conn.execute, "update public.cloud_machines set status = 'stopped'")
    assert (error.sqlstate, registry(db).status) == ("42501", "error")


def test_the_words_are_a_declaration(db: Database, user: User, machine: str) -> None:
    """A call without them sets the default again, none; a null status is no word."""
    owner = db.connect()
    owner.execute("alter table public.cloud_machines alter column status drop not null")
    allow(db, "error")
    assert value(owner, "select machine_statuses from arbiter.registry") == ["error"]
    said = "update public.cloud_machines set status = null"
    assert "may not set the status null" in str(rejection(token(db, user, machine).execute, said))
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    said = "update public.cloud_machines set status = 'error'"
    assert rejection(token(db, user, machine).execute, said).sqlstate == "42501"


@pytest.mark.parametrize("word", ["runing", None])
def test_a_word_without_a_state_is_refused(db: Database, word: str | None) -> None:
    """It would count as running."""
    owner = db.connect()
    error = rejection(owner.execute, REGISTER, ([word],))
    assert error.sqlstate == "22023"
    assert value(owner, "select machine_statuses from arbiter.registry") == []


# Where it is ------------------------------------------------------------------------------------


def test_it_is_the_first_trigger_and_goes_with_the_others(db: Database) -> None:
    owner = db.connect()
    names = (
        "select tgname, tgenabled from pg_trigger"
        " where tgrelid = 'public.cloud_machines'::regclass and not tgisinternal"
        " and tgname ~ 'arbiter_' order by 1"
    )
    assert rows(owner, names)[0] == ("!arbiter_limit", "A")
    owner.execute("create table public.fleet (like public.cloud_machines including all)")
    owner.execute("select arbiter.unprotect('public.signals')")
    owner.execute("select arbiter.register_machines('public.fleet')")
    assert rows(owner, names) == []
