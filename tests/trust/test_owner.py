"""Ways to make arbiter's owner, or who uses its command line, run a function of somebody else."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from story import activate, add_user, age, rows, set_status, value

import arbiter_db
from arbiter_db.cli import main
from arbiter_db.queries import QUERIES

from .spy import MALLORY, RAN, SPY

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]


@pytest.fixture
def mallory(db: Database) -> Conn:
    """A login that may create schemas and tables, and triggers on the registry."""
    database = sql.Identifier(db.name)
    db.connect("postgres").execute(
        sql.SQL("grant create on database {} to authenticator").format(database)
    )
    db.connect("postgres").execute("grant create on schema public to authenticator")
    db.connect().execute("grant trigger on public.cloud_machines to authenticator")
    conn = db.connect(MALLORY)
    conn.execute(SPY.encode())
    return conn


def failed_long_ago(owner: Conn) -> Any:
    """A user whose machine failed, so that a takeover can be confirmed."""
    user = add_user(owner)
    machine = activate(owner, user)
    set_status(owner, machine, "error")
    age(owner, machine, entered_error=timedelta(hours=1))
    return user


CONDITIONS = {
    "SQL in a string": "ts_rewrite('a'::tsquery,"
    " 'select lair.spy('''')::text::tsquery, ''b''::tsquery') is not null",
    "a domain behind a cast": "new.status::lair.word is not null",
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_may_only_compare_columns(db: Database, mallory: Conn, condition: str) -> None:
    mallory.execute("create domain lair.word as text check (lair.spy(value))")
    mallory.execute("grant usage on type lair.word to public")
    mallory.execute(
        f"create trigger q before update on public.cloud_machines for each row"
        f" when ({CONDITIONS[condition]}) execute function suppress_redundant_updates_trigger()"
        .encode()
    )  # fmt: skip
    owner = db.connect()
    user = failed_long_ago(owner)
    ran = value(mallory, "select last_value from lair.runs_of_others")
    client = db.connect(role="authenticated", claims={"sub": str(user.id)})
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
        client.execute("select arbiter.confirm_takeover()")
    assert "the condition of trigger q on public.cloud_machines" in str(caught.value)
    assert value(mallory, "select last_value from lair.runs_of_others") == ran
    query = "select object from arbiter.doctor() where state = 'foreign'"
    found = rows(owner, query)
    assert ("condition of trigger q on public.cloud_machines",) in found


def test_a_condition_that_compares_columns_is_no_obstacle(db: Database) -> None:
    owner = db.connect()
    owner.execute(
        "create trigger q before update on public.cloud_machines for each row"
        " when (old.status is distinct from new.status and new.status in ('stopped', 'error')"
        " and old.* is distinct from new.*)"
        " execute function suppress_redundant_updates_trigger()"
    )
    user = failed_long_ago(owner)
    client = db.connect(role="authenticated", claims={"sub": str(user.id)})
    confirm = "select environment from arbiter.confirm_takeover()"
    assert value(client, confirm) == "local"


def test_no_temporary_table_stands_in_for_one_of_the_app(db: Database) -> None:
    """A trigger function without a search_path looks its tables up by that of arbiter."""
    owner = db.connect()
    owner.execute(
        """
        create table public.machine_log (id uuid);
        create function public.tg_log() returns trigger language plpgsql as
          $$ begin insert into machine_log values (new.id); return null; end $$;
        create trigger log after update on public.cloud_machines
          for each row execute function public.tg_log();
        """
    )
    user = failed_long_ago(owner)
    client = db.connect(role="authenticated", claims={"sub": str(user.id)})
    client.execute(
        """
        create temporary table machine_log (id uuid);
        grant all on machine_log to public;
        create function pg_temp.evil() returns trigger language plpgsql as
          $$ begin update arbiter.settings set stop_grace = '101 ms'; return new; end $$;
        create trigger evil before insert on machine_log
          for each row execute function pg_temp.evil();
        """
    )
    message = "trigger log on public.cloud_machines could take temporary objects"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=message):
        client.execute("select arbiter.confirm_takeover()")
    assert value(owner, "select stop_grace = '30 seconds' from arbiter.settings")
    owner.execute("alter function public.tg_log() set search_path = public, pg_temp")
    confirm = "select environment from arbiter.confirm_takeover()"
    logged = value(owner, "select count(*) from public.machine_log")
    assert value(client, confirm) == "local"
    assert value(owner, "select count(*) from public.machine_log") == logged + 1


@pytest.mark.parametrize("kind", ["status", "health"])
def test_a_domain_over_a_domain_of_another_role_is_not_trusted(
    db: Database, mallory: Conn, kind: str
) -> None:
    mallory.execute("create domain lair.word as text")
    mallory.execute("grant usage on type lair.word to public")
    owner = db.connect()
    owner.execute(
        """
        create domain public.word as lair.word;
        create table public.apps (id uuid primary key, user_id uuid, status text, health text)
        """
    )
    owner.execute(f"alter table public.apps alter {kind} type public.word".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"lair\.word of authenticator"):
        owner.execute(
            "select arbiter.register_machines('public.apps', p_health_column => 'health',"
            " p_healthy => '{well}')"
        )


def test_no_operator_of_another_role_runs_in_a_query(db: Database, mallory: Conn) -> None:
    """A schema of the login's name comes first in its search_path, and may be made by others."""
    user = failed_long_ago(db.connect())
    mallory.execute("create schema app_owner")
    mallory.execute("grant usage on schema app_owner to public")
    mallory.execute(
        """
        create function app_owner.eq(oid, regclass) returns boolean language plpgsql as
          $$ begin perform lair.spy(''); return $1 = $2::oid; end $$;
        create operator app_owner.= (leftarg = oid, rightarg = regclass, function = app_owner.eq);
        create function app_owner.times(numeric, integer) returns numeric language plpgsql as
          $$ begin perform lair.spy(''); return $1 * $2::numeric; end $$;
        create operator app_owner.* (
          leftarg = numeric, rightarg = integer, function = app_owner.times);
        create function app_owner.concat(text, text, text, text, text) returns text
          language plpgsql as $$ begin perform lair.spy(''); return $1; end $$;
        """
    )
    for command in (["audit", "--strict"], ["handovers"], ["status", str(user.id)]):
        result = CliRunner().invoke(main, [*command, "--dsn", db.conninfo()])
        assert result.exit_code == 0, result.output
    with db.connect() as conn:  # as a machine asks
        assert len(conn.execute(QUERIES["machine_settings"]).fetchall()) == 1
    assert not value(mallory, RAN)


@pytest.mark.parametrize(
    "command",
    [["status", "00000000-0000-4000-8000-000000000001"], ["audit"], ["handovers"],
     ["protect", "public.mine"], ["unprotect", "public.mine"],
     ["register-machines", "public.mine"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_no_command_runs_what_was_planted(
    hostile: Database,
    command: list[str],
) -> None:
    mallory = hostile.connect(MALLORY)
    mallory.execute(
        """
        create table public.mine (id uuid);
        create schema arbiter;
        grant usage on schema arbiter to public;
        create function arbiter.version() returns text language sql
          as $f$ select '0.1.0' where lair.spy('') $f$;
        """
    )
    result = CliRunner().invoke(main, [*command, "--dsn", hostile.conninfo("postgres")])
    assert result.exit_code == 1
    assert "schema arbiter belongs to authenticator" in result.output
    assert not value(mallory, RAN)


def test_nobody_makes_the_schema_between_the_question_and_the_install(
    hostile: Database,
) -> None:
    """The schema is made first, and is closed from the first moment."""
    admin, mallory = hostile.connect("postgres"), hostile.connect(MALLORY)
    admin.execute(
        "alter default privileges grant all on schemas to authenticator;"
        "alter default privileges grant all on tables to authenticator"
    )
    mallory.execute("set lock_timeout = '100 ms'")
    question = arbiter_db.sql_text().split("-- sql/00_owner.sql")[1].split("-- sql/01")[0]
    with admin.transaction(force_rollback=True):
        admin.execute("set local search_path to arbiter")
        admin.execute(question.encode())
        for privilege in ("usage", "create"):
            may = f"select has_schema_privilege('{MALLORY}', 'arbiter', '{privilege}')"
            assert value(admin, may) is False
        with pytest.raises(psycopg.errors.LockNotAvailable):
            mallory.execute("create schema arbiter")
    arbiter_db.install(hostile.conninfo("postgres"))
    may = f"select has_table_privilege('{MALLORY}', 'arbiter.leases', 'trigger')"
    assert value(admin, may) is False


def test_no_operator_of_another_role_is_in_the_schema(hostile: Database) -> None:
    admin, mallory = hostile.connect("postgres"), hostile.connect(MALLORY)
    admin.execute(f"create schema arbiter; grant all on schema arbiter to {MALLORY}".encode())
    mallory.execute(
        """
        create function lair.times(integer, interval) returns interval language plpgsql as
          $$ begin perform lair.spy(''); return $2; end $$;
        create operator arbiter.* (
          leftarg = integer, rightarg = interval, function = lair.times)
        """
    )
    admin.execute(f"revoke all on schema arbiter from {MALLORY}".encode())
    with pytest.raises(arbiter_db.InstallError, match=r"operator arbiter\.\* belongs to"):
        arbiter_db.install(hostile.conninfo("postgres"))
    assert not value(mallory, RAN)


def test_of_several_objects_of_another_role_the_first_by_name_is_named(hostile: Database) -> None:
    admin, mallory = hostile.connect("postgres"), hostile.connect(MALLORY)
    admin.execute(f"create schema arbiter; grant all on schema arbiter to {MALLORY}".encode())
    mallory.execute(
        "create table arbiter.a ();"
        "create function arbiter.z() returns void language sql begin atomic end;"
        "create function arbiter.y() returns void language sql begin atomic end"
    )
    with pytest.raises(arbiter_db.InstallError, match=r"function arbiter\.y\(\) belongs to"):
        arbiter_db.install(hostile.conninfo("postgres"))


def test_the_name_of_an_index_that_is_taken_stops_no_install(db: Database, mallory: Conn) -> None:
    owner = db.connect()
    owner.execute("drop index public.arbiter_signals_machine_idx")
    oid = value(owner, "select 'public.signals'::regclass::oid")
    mallory.execute(
        sql.SQL(
            "create table public.mine (id uuid);"
            "create index arbiter_signals_machine_idx on public.mine (id);"
            "create index {} on public.mine (id)"
        ).format(sql.Identifier(f"arbiter_{oid}_machine_idx"))
    )
    arbiter_db.install(db.conninfo())
    missing = "select count(*) from arbiter.doctor() where object ~ '^index' and state = 'missing'"
    assert value(owner, missing) == 0


@pytest.mark.parametrize(
    ("table", "grant"),
    [
        ("arbiter.leases", "select"),
        ("public.cloud_machines", "revoke insert, update on {} from anon, authenticated"),
    ],
)
def test_row_security_that_is_off_is_seen(db: Database, table: str, grant: str) -> None:
    """Also where clients may only read leases, or only delete machines."""
    owner = db.connect()
    if grant.startswith("revoke"):
        owner.execute(grant.format(table).encode())
        owner.execute(f"grant delete on {table} to authenticated".encode())
    owner.execute(f"alter table {table} disable row level security".encode())
    query = f"select object from arbiter.doctor() where state = 'disabled' and object ~ '{table}'"
    assert len(rows(owner, query)) >= 1
