"""Ids of any type: the whole life of users and machines whose ids are texts or numbers.

arbiter compares the texts of ids. What is tried here is that nothing depends on their being uuids,
that the types are refused whose equal values have different texts, and that a search by an id
stays an index probe and never fails on a text that is no such id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sessions import TIMEOUT_S, wait_until_blocked
from story import backend, clock, detail_of, rejection, rows, value

import arbiter_db
from arbiter_db import errors

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

LONG_AGO = timedelta(hours=1)


@dataclass(frozen=True)
class Kind:
    """An app: its types, and the ids of ada, bob and their machines."""

    user_type: str
    machine_type: str
    ada: str
    bob: str
    adas: str
    bobs: str
    #: No id of that type.
    stranger: str = "nobody"


KINDS = {
    "uuid": Kind("uuid", "uuid", *(f"a000000{n}-0000-4000-8000-00000000000b" for n in range(4))),
    "text": Kind(
        "text", "text", "user_2abcDEF", "auth0|64f1'; \"x", "3d8d9930b32489", "5683d4c9a1e018"
    ),
    "varchar": Kind("varchar(64)", "varchar(64)", "ADA", "Ada", "m-1", "M-1"),
    "bigint": Kind("bigint", "bigint", "42", "-9223372036854775808", "9223372036854775807", "7"),
    "integer": Kind("integer", "smallint", "42", "2147483647", "1", "-32768"),
    "domain": Kind("public.clerk_id", "public.fly_id", "user_1", "user_2", "m1", "m2"),
    "users texts, machines uuids": Kind(
        "text", "uuid", "user_1", "user_2", str(UUID(int=1)), str(UUID(int=2))
    ),
    "collation": Kind('text collate "C"', 'text collate "POSIX"', "user_1", "user_2", "m1", "m2"),
}

APP = """
create domain public.clerk_id as text not null check (value ~ '^user_');
create domain public.fly_id as varchar(40) not null check (value ~ '^m');
create table public.cloud_machines (
  id {machine_type} primary key,
  user_id {user_type} unique,
  status text not null default 'provisioning',
  last_health_check timestamptz);
create table public.bots (id {user_type} primary key, note text);
create table public.traders (id integer primary key, bot_id {user_type} references public.bots);
create table public.signals (
  id bigint generated always as identity primary key, user_id {user_type} not null, n integer);
create table public.positions (
  id bigint generated always as identity primary key,
  trader_id integer references public.traders, n integer);
insert into public.bots values ({ada}), ({bob});
insert into public.traders values (1, {ada}), (2, {bob});
insert into public.signals (user_id) values ({ada});
alter table public.cloud_machines enable row level security;
alter table public.signals enable row level security;
alter table public.positions enable row level security;
create policy mine on public.cloud_machines for select to authenticated using (true);
create policy mine on public.signals to authenticated
  using (user_id::text = current_setting('request.jwt.claims')::jsonb ->> 'sub');
create policy mine on public.positions to authenticated using (true);
grant usage on schema public to authenticated, service_role;
grant all on all tables in schema public to authenticated, service_role;
"""


def make(db: Database, kind: Kind) -> Conn:
    owner = db.connect()
    values = {"ada": f"'{kind.ada}'", "bob": "'" + kind.bob.replace("'", "''") + "'"}
    app = APP.format(user_type=kind.user_type, machine_type=kind.machine_type, **values)
    owner.execute(app.encode())
    return owner


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def sign(conn: Conn, user: str) -> None:
    conn.execute("select set_config('request.jwt.claims', %s, false)", (json.dumps({"sub": user}),))


def beat(conn: Conn, machine: str) -> None:
    """As a machine does it."""
    cur = conn.execute(
        "update public.cloud_machines set last_health_check = now(), status = 'running'"
        " where id = %s",
        (machine,),
    )
    assert cur.rowcount == 1


def write(conn: Conn, user: str, machine: str | None = None) -> None:
    """Two rows, of which the second one has its user over a foreign key."""
    source = "cloud" if machine else "local"
    conn.execute(
        "insert into public.signals (user_id, source, machine_id) values (%s, %s, %s)",
        (user, source, machine),
    )
    conn.execute(
        "insert into public.positions (trader_id, source, machine_id)"
        " select t.id, %s, %s from public.traders t where t.bot_id = %s",
        (source, machine, user),
    )


def age(owner: Conn, machine: str) -> None:
    """The machine's error was long ago."""
    owner.execute(
        "update arbiter.machine_notes set left_running_at = left_running_at - %s,"
        " entered_error_at = entered_error_at - %s where machine_id = %s",
        (LONG_AGO, LONG_AGO, machine),
    )


def forget_heartbeat(owner: Conn, machine: str) -> None:
    with owner.transaction():
        owner.execute("alter table public.cloud_machines disable trigger user")
        owner.execute(
            "update public.cloud_machines set last_health_check = now() - interval '1 hour'"
            " where id = %s",
            (machine,),
        )
        for (name,) in rows(
            owner,
            "select tgname from pg_trigger where tgrelid = 'public.cloud_machines'::regclass"
            " and not tgisinternal",
        ):
            owner.execute(
                f'alter table public.cloud_machines enable always trigger "{name}"'.encode()
            )


def test_the_whole_life(bare_db: Database, kind: Kind) -> None:
    """Adopted by an install, written by browser and machine, failed, confirmed, proved, removed."""
    owner = make(bare_db, kind)
    arbiter_db.install(bare_db.conninfo())
    arbiter_db.protect(owner, "public.positions", user_path="trader_id.bot_id")
    for table in ("signals", "positions"):
        assert value(
            owner,
            "select format_type(atttypid, null) from pg_attribute"
            " where attrelid = %s::regclass and attname = 'machine_id'",
            f"public.{table}",
        ) == {"varchar(64)": "character varying", "public.fly_id": "character varying"}.get(
            kind.machine_type, kind.machine_type.split(" ")[0]
        )
    arbiter_db.finish(owner)
    assert rows(owner, "select * from arbiter.doctor() where state not in ('ok', 'note')") == []

    machine, browser = backend(bare_db), bare_db.connect(role="authenticated")
    sign(browser, kind.ada)
    for id_, user in ((kind.adas, kind.ada), (kind.bobs, kind.bob)):
        machine.execute(
            "insert into public.cloud_machines (id, user_id) values (%s, %s)", (id_, user)
        )
    write(browser, kind.ada)
    before = arbiter_db.status(browser)
    assert (before.environment, before.message) == ("local", "Cloud starting")
    assert before.machine_id == kind.adas

    # The machine takes over.
    beat(machine, kind.adas)
    assert arbiter_db.heartbeat(machine, kind.adas) <= clock(owner)
    status = arbiter_db.status(browser)
    assert (status.environment, status.code) == ("cloud", "cloud_active")
    assert (status.machine_id, status.machine_state) == (kind.adas, "running")
    error = rejection(write, browser, kind.ada)
    detail = detail_of(error)
    assert error.sqlstate == "WX001"
    assert (detail["user_id"], detail["machine_id"]) == (kind.ada, kind.adas)
    rejected = errors.from_psycopg(error)
    assert rejected is not None
    assert (rejected.user_id, rejected.machine_id) == (kind.ada, kind.adas)
    write(machine, kind.ada, kind.adas)
    assert rejection(write, machine, kind.ada, kind.bobs).sqlstate == "WX005"
    assert rejection(write, machine, kind.bob, kind.bobs).sqlstate == "WX004"
    write(machine, kind.bob)  # another user's browser is not concerned

    # With a token of the machine's, which row security binds.
    token = bare_db.connect(role="authenticated", claims={"sub": kind.ada, "machine_id": kind.adas})
    assert arbiter_db.heartbeat(token, kind.adas) <= clock(owner)
    write(token, kind.ada, kind.adas)
    assert rejection(write, token, kind.ada).sqlstate == "42501"
    assert (
        rejection(token.execute, "select arbiter.heartbeat(%s)", (kind.bobs,)).sqlstate == "P0002"
    )
    sign(token, kind.ada)  # a browser again
    assert rejection(write, token, kind.ada, kind.adas).sqlstate == "42501"

    # Many heartbeats in one statement.
    machine.execute("update public.cloud_machines set status = 'running'")
    assert arbiter_db.heartbeat(machine, [kind.adas, kind.bobs]) == 2
    assert arbiter_db.heartbeat(machine, [kind.adas, kind.bobs]) == 2
    batch = (
        "insert into public.signals (user_id, source, machine_id)"
        " select %s, 'cloud', %s from generate_series(1, 100)"
    )
    machine.execute(batch, (kind.bob, kind.bobs))
    machine.execute(
        "insert into public.signals (user_id, source, machine_id)"
        " values (%s, 'cloud', %s), (%s, 'cloud', %s)",
        (kind.ada, kind.adas, kind.bob, kind.bobs),
    )
    for unknown in (kind.stranger, "", "9223372036854775808", str(uuid4())):
        found = rejection(machine.execute, "select arbiter.heartbeat(%s)", (unknown,))
        assert found.sqlstate == "P0002"
        assert found.diag.message_primary == f"arbiter: no machine {unknown}"
        assert arbiter_db.status(machine, unknown).epoch is None

    # One stops, the other one fails.
    machine.execute(
        "update public.cloud_machines set status = 'stopped' where id = %s", (kind.adas,)
    )
    assert rejection(write, browser, kind.ada).sqlstate == "WX002"
    age(owner, kind.adas)
    write(browser, kind.ada)
    machine.execute("update public.cloud_machines set status = 'error' where id = %s", (kind.bobs,))
    age(owner, kind.bobs)
    his = bare_db.connect(role="authenticated")
    sign(his, kind.bob)
    assert rejection(write, his, kind.bob).sqlstate == "WX003"
    assert rejection(his.execute, "select arbiter.status(%s)", (kind.ada,)).sqlstate == "42501"
    assert arbiter_db.confirm_takeover(his).can_write_local
    assert (
        value(owner, "select status from public.cloud_machines where id = %s", kind.bobs)
        == "stopped"
    )
    write(his, kind.bob)
    reasons = {row.reason for row in arbiter_db.handovers(owner, kind.bob)}
    assert {"registered", "activated", "confirmed"} <= reasons
    assert rows(his, "select distinct user_id from arbiter.leases") == [(kind.bob,)]

    # A silent one.
    beat(machine, kind.adas)
    beat(machine, kind.adas)
    forget_heartbeat(owner, kind.adas)
    assert rejection(write, machine, kind.ada, kind.adas).sqlstate == "WX004"
    write(browser, kind.ada)
    assert arbiter_db.handovers(owner, kind.ada)[-1].reason == "heartbeat_lapsed"

    for table in ("public.signals", "public.positions"):
        audit = arbiter_db.audit(owner, table)
        assert audit.findings == []
        assert audit.proved >= 4
    # A row that the guard did not see.
    owner.execute("alter table public.positions disable trigger arbiter_guard_insert")
    owner.execute(
        "insert into public.positions (trader_id, source, machine_id) values (1, 'cloud', %s)",
        (kind.bobs,),
    )
    owner.execute("alter table public.positions enable always trigger arbiter_guard_insert")
    (finding,) = arbiter_db.audit(owner, "public.positions").findings
    assert (finding.user_id, finding.machine_id) == (kind.ada, kind.bobs)
    owner.execute("delete from public.positions where machine_id = %s", (kind.bobs,))

    # Away and back again.
    machine.execute("delete from public.cloud_machines where id = %s", (kind.adas,))
    arbiter_db.uninstall(bare_db.conninfo())
    arbiter_db.install(bare_db.conninfo())
    write(browser, kind.ada)
    beat(machine, kind.bobs)
    beat(machine, kind.bobs)
    write(machine, kind.bob, kind.bobs)
    assert rejection(write, his, kind.bob).sqlstate == "WX001"


# -- types that are refused ------------------------------------------------------------------------

REFUSED = """
create collation public.any_case from "C";
create domain public.folded as text collate public.any_case;
create domain public.amount as numeric;
"""
#: With what the message says of it.
TYPES = {
    "numeric": "numeric",
    "real": "real",
    "timestamptz": "timestamp with time zone",
    "char(8)": "character",
    "name": "name",
    "text[]": "text[]",
    "jsonb": "jsonb",
    "public.amount": "public.amount",
    "text collate public.any_case": "text with the nondeterministic collation any_case",
    "public.folded": "public.folded with the nondeterministic collation any_case",
}


@pytest.fixture(scope="module")
def odd(templates: Templates) -> Iterator[Conn]:
    with templates.clone("installed") as database:
        owner = database.connect()
        owner.execute(REFUSED.encode())
        # As one of ICU's may be, which not every server has.
        database.connect("postgres").execute(
            "update pg_collation set collisdeterministic = false where collname = 'any_case'"
        )
        yield owner


@pytest.mark.parametrize("type_name", TYPES)
def test_a_type_whose_equal_values_have_different_texts_is_refused(
    odd: Conn, type_name: str
) -> None:
    """As the user of a table, its machine, the user of the registry and the id of a machine."""
    said = TYPES[type_name]
    must = (
        "of a deterministic one"
        if "collation" in said
        else ("uuid or text or character varying or smallint or integer or bigint")
    )
    hint = (
        "arbiter compares the text of ids. Change the type of that column, or name another one in"
        " the call; nothing was changed."
    )
    calls = {
        ("user_id", "public.odd"): "select arbiter.protect('public.odd')",
        ("machine", "public.odd"): (
            "select arbiter.protect('public.odd', 'owner', p_machine_column => 'machine')"
        ),
        (
            "user_id",
            "public.odd_machines",
        ): "select arbiter.register_machines('public.odd_machines')",
        ("fly", "public.odd_machines"): (
            "select arbiter.register_machines('public.odd_machines', 'fly')"
        ),
    }
    for (column, table), call in calls.items():
        with odd.transaction(force_rollback=True):
            odd.execute(f"create table public.odd (user_id {type_name}, owner uuid)".encode())
            odd.execute(f"alter table public.odd add machine {type_name}".encode())
            odd.execute(
                f"create table public.odd_machines (id uuid primary key, user_id {type_name},"
                f" fly {type_name}, status text)".encode()
            )
            before = value(odd, "select count(*) from arbiter.protections")
            error = rejection(within, odd, call)
            assert error.sqlstate == "42804"
            assert error.diag.message_primary == (
                f"arbiter: column {column} of table {table} is {said}, an id must be {must}"
            )
            assert error.diag.message_hint == hint
            assert value(odd, "select count(*) from arbiter.protections") == before


def within(conn: Conn, statement: str) -> None:
    with conn.transaction():
        conn.execute(statement.encode())


def test_a_domain_of_another_role_is_refused(odd: Conn, db: Database) -> None:
    """Its owner writes what its checks run."""
    superuser, owner = db.connect("postgres"), db.connect()
    superuser.execute(
        "create domain public.theirs as text; alter domain public.theirs owner to service_role"
    )
    owner.execute("create table public.odd (user_id public.theirs not null)")
    error = rejection(owner.execute, "select arbiter.protect('public.odd')")
    assert error.sqlstate == "42501"
    assert "has the type public.theirs of service_role" in str(error)


# -- ids of two types ------------------------------------------------------------------------------


def test_texts_beside_uuids_name_the_same_users(db: Database) -> None:
    """signals.user_id is a text, which some clients write in upper case: still one lease."""
    owner, user = db.connect(), str(uuid4())
    owner.execute("insert into auth.users (id, email) values (%s, 'ada@example.com')", (user,))
    owner.execute("create table public.orders (id serial primary key, user_id text not null)")
    arbiter_db.protect(owner, "public.orders")
    insert = "insert into public.orders (user_id, source, machine_id) values (%s, %s, %s)"
    forms = [user, user.upper(), "{" + user + "}", user.replace("-", "").upper()]
    for form in forms:
        owner.execute(insert, (form, "local", None))
    assert rows(owner, "select user_id, epoch from arbiter.leases") == [(user, 1)]
    machine = value(
        owner,
        "insert into public.cloud_machines (user_id, machine_id, status)"
        " values (%s, 'x', 'running') returning id",
        user,
    )
    for _ in range(2):
        owner.execute("update public.cloud_machines set last_health_check = now()")
    for form in forms:
        error = rejection(owner.execute, insert, (form, "local", None))
        assert error.sqlstate == "WX001"
        assert detail_of(error)["user_id"] == user
        owner.execute(insert, (form, "cloud", machine))
        assert arbiter_db.status(owner, form).machine_id == machine
        assert len(arbiter_db.handovers(owner, form)) == 2
    # All rows of one statement, in all forms.
    owner.execute(
        "insert into public.orders (user_id, source, machine_id)"
        " select f, 'cloud', %s from unnest(%s::text[]) f",
        (machine, forms),
    )
    # Another text is another user, who has no machine.
    owner.execute(insert, ("guest", "local", None))
    assert rejection(owner.execute, insert, ("guest", "cloud", machine)).sqlstate == "WX005"
    audit = arbiter_db.audit(owner, "public.orders")
    assert (audit.findings, audit.not_provable, audit.proved) == ([], {}, 13)


def test_texts_that_look_like_uuids_stay_two_users(bare_db: Database) -> None:
    """Where the app's ids are texts nothing is read as a uuid."""
    lower = str(uuid4())
    kind = Kind("text", "text", lower, lower.upper(), "m-a", "M-A")
    owner = make(bare_db, kind)
    arbiter_db.install(bare_db.conninfo())
    owner.execute(
        "insert into public.cloud_machines values ('m-a', %s), ('M-A', %s)", (kind.ada, kind.bob)
    )
    for _ in range(2):
        beat(owner, "m-a")
    assert arbiter_db.status(owner, kind.ada).environment == "cloud"
    assert arbiter_db.status(owner, kind.bob).environment == "local"
    owner.execute("insert into public.signals (user_id) values (%s)", (kind.bob,))
    error = rejection(
        owner.execute, "insert into public.signals (user_id) values (%s)", (kind.ada,)
    )
    assert error.sqlstate == "WX001"
    for ada in (kind.ada, kind.bob):
        browser = bare_db.connect(role="authenticated", claims={"sub": ada})
        assert rows(browser, "select user_id from arbiter.leases") == [(ada,)]
        other = kind.bob if ada == kind.ada else kind.ada
        assert rejection(browser.execute, "select arbiter.status(%s)", (other,)).sqlstate == "42501"


def test_ways_of_different_types_agree_by_their_texts(bare_db: Database) -> None:
    owner = make(bare_db, KINDS["text"])
    arbiter_db.install(bare_db.conninfo())
    owner.execute(
        "create table public.orders (user_id varchar, trader_id integer references public.traders)"
    )
    arbiter_db.protect(owner, "public.orders", user_path="user_id, trader_id.bot_id")
    insert = "insert into public.orders (user_id, trader_id) values (%s, %s)"
    ada, bob = KINDS["text"].ada, KINDS["text"].bob
    for row in ((ada, 1), (None, 1), (ada, None), (bob, 2)):
        owner.execute(insert, row)
    error = rejection(owner.execute, insert, (ada, 2))
    assert (error.sqlstate, error.diag.message_hint) == (
        "WX005",
        "The row leads to different users: all ways of p_user_path must agree.",
    )


def test_another_registry_with_another_type(bare_db: Database) -> None:
    """The functions that find machines follow it, and a column that no longer fits is named."""
    kind = KINDS["users texts, machines uuids"]
    owner = make(bare_db, kind)
    arbiter_db.install(bare_db.conninfo())
    owner.execute(
        "create table public.apps (id text primary key, user_id text unique, status text)"
    )
    error = rejection(owner.execute, "select arbiter.register_machines('public.apps')")
    assert error.sqlstate == "42804"
    assert "column machine_id of table public.signals is uuid" in str(error)
    # As the hint says.
    owner.execute("select arbiter.unprotect('public.signals')")
    owner.execute("alter table public.signals drop machine_id")
    owner.execute("select arbiter.register_machines('public.apps')")
    owner.execute("select arbiter.protect('public.signals')")
    owner.execute("insert into public.apps values ('fly-1', %s, 'running')", (kind.ada,))
    machine = backend(bare_db)
    owner.execute("grant all on public.apps to service_role")
    for _ in range(2):
        assert arbiter_db.heartbeat(machine, "fly-1") <= clock(owner)
    machine.execute(
        "insert into public.signals (user_id, source, machine_id) values (%s, 'cloud', 'fly-1')",
        (kind.ada,),
    )
    arbiter_db.finish(owner)
    assert rows(owner, "select * from arbiter.doctor() where state not in ('ok', 'note')") == []


# -- calls -----------------------------------------------------------------------------------------

CALLS = ["status", "confirm_takeover", "heartbeat"]


@pytest.mark.parametrize("name", CALLS)
def test_no_call_is_ambiguous(db: Database, name: str) -> None:
    """Literals and what drivers send: each finds its function, or the id that is not there."""
    unknown = uuid4()
    with psycopg.connect(db.conninfo(), autocommit=True) as conn:
        calls: list[tuple[str, tuple[object, ...]]] = [
            (f"select arbiter.{name}('{unknown}')", ()),
            (f"select arbiter.{name}(null)", ()),
            (f"select arbiter.{name}('{unknown}'::uuid)", ()),
            (f"select arbiter.{name}('{unknown}'::text)", ()),
            (f"select arbiter.{name}('{unknown}'::varchar)", ()),
            (f"select * from arbiter.{name}('{unknown}')", ()),
            (f"select arbiter.{name}(%s)", (str(unknown),)),
            (f"select arbiter.{name}(%s)", (unknown,)),
            (f"select arbiter.{name}(%b)", (str(unknown),)),
            (f"select arbiter.{name}(%b)", (unknown,)),
            (f"select arbiter.{name}(%s)", (None,)),
            (f"select * from arbiter.{name}(%s)", (unknown,)),
        ]
        found: set[str | None] = set()
        for call, params in calls:
            try:
                conn.execute(call.encode(), params)
                found.add(None)
            except psycopg.Error as error:
                found.add(error.sqlstate)
        expected = {
            "status": {None, "22023"},
            "heartbeat": {"P0002"},
            "confirm_takeover": {"55000", "22023"},
        }
        assert found == expected[name]
        # psql sends such a literal without a type; node-postgres every parameter.
        untyped = conn.pgconn.exec_params(
            f"select arbiter.{name}($1)".encode(), [str(unknown).encode()], param_types=[0]
        )
        assert (untyped.error_field(psycopg.pq.DiagnosticField.SQLSTATE) or b"") != b"42725"
    names = rows(
        db.connect(),
        "select proargnames[1] from pg_proc where proname = %s"
        " and pronamespace = 'arbiter'::regnamespace",
        name,
    )
    # An API that chooses by the names of arguments finds one.
    assert len({row[0] for row in names}) == 2


def test_many_heartbeats_without_a_type(db: Database) -> None:
    conn = db.connect()
    assert value(conn, "select arbiter.heartbeats('{}')") == 0
    assert rejection(conn.execute, "select arbiter.heartbeats('{x}')").sqlstate == "P0002"
    assert rejection(conn.execute, "select arbiter.heartbeat('{x}')").sqlstate == "P0002"


def test_a_collation_of_the_caller_counts_for_nothing(db: Database) -> None:
    """Otherwise the comparison with a lease would be an error, or another user the same."""
    owner = db.connect()
    owner.execute('create collation public.other from "C"')
    for user in ("ada", "ADA"):
        owner.execute(
            "insert into arbiter.leases (user_id, epoch, holder, held_since)"
            " values (%s, 1, 'local', now())",
            (user,),
        )
    browser = db.connect(role="authenticated", claims={"sub": "ada"})
    call = "select (arbiter.status(%s collate {})).epoch"
    for collation in ("public.other", '"C"', '"POSIX"'):
        assert value(browser, call.format(collation), "ada") == 1
        assert rejection(value, browser, call.format(collation), "ADA").sqlstate == "42501"
        beat_ = f"select arbiter.heartbeat('x' collate {collation})"
        assert rejection(owner.execute, beat_).sqlstate == "P0002"


# -- plans -----------------------------------------------------------------------------------------

MANY = """
insert into public.cloud_machines (id, user_id)
select {machine}, {user} from generate_series(1, 10000) n;
"""
OF_TYPE = {
    "uuid": ("md5('m' || n)::uuid", "md5('u' || n)::uuid"),
    "text": ("'m' || n", "'u' || n"),
    "varchar": ("'m' || n", "'u' || n"),
    "bigint": ("n", "n"),
    "integer": ("n", "n"),
    "collation": ("'m' || n", "'u' || n"),
}


@pytest.mark.parametrize("analysed", [True, False])
@pytest.mark.parametrize("name", ["uuid", "text", "varchar", "bigint", "collation"])
def test_a_search_by_an_id_is_an_index_probe(bare_db: Database, name: str, analysed: bool) -> None:
    """Of the registry, by the machine and by the user; by the statistics of scans."""
    kind = KINDS[name]
    owner = make(bare_db, kind)
    arbiter_db.install(bare_db.conninfo())
    machine, user = OF_TYPE[name]
    owner.execute(MANY.format(machine=machine, user=user).encode())
    if analysed:
        owner.execute("analyze public.cloud_machines")
    one, his = rows(owner, "select id::text, user_id::text from public.cloud_machines limit 1")[0]
    owner.execute("update public.cloud_machines set status = 'running' where id = %s", (one,))
    calls = {
        "heartbeat": ("select arbiter.heartbeat(%s)", one),
        "many heartbeats": ("select arbiter.heartbeats(array[%s, %s])", one, one),
        "of a lease": ('select arbiter.heartbeat(%s::text collate "C")', one),
        "status, local": ("select arbiter.status(%s)", his),
        "the machine of a lease": ("select arbiter._machine(%s, %s)", his, one),
        "the machine of a write": (
            "select arbiter._identity_flaw(%s, 'cloud', %s, null, 'reject')",
            his,
            one,
        ),
        "a cloud write": (
            "insert into public.signals (user_id, source, machine_id) values (%s, 'cloud', %s)",
            his,
            one,
        ),
    }
    for call, (statement, *ids) in calls.items():
        if call == "a cloud write":
            for _ in range(2):
                owner.execute("select arbiter.heartbeat(%s)", (one,))
        before = scans(owner)
        for _ in range(7):  # also by a generic plan
            owner.execute(statement.encode(), ids)
        after = scans(owner)
        assert after.seq_scan == before.seq_scan, call
        assert after.idx_scan > before.idx_scan, call
    before = scans(owner)
    for _ in range(7):
        assert arbiter_db.status(owner, his).environment == "cloud"
    assert scans(owner).seq_scan == before.seq_scan
    # Such a scan would have been seen.
    owner.execute("select from public.cloud_machines where status = 'x'")
    assert scans(owner).seq_scan == before.seq_scan + 1


def scans(conn: Conn) -> Any:
    """How often this session has read the registry, by its own counters."""
    return rows(
        conn,
        "select pg_stat_get_xact_numscans(c.oid) + coalesce(s.seq_scan, 0) as seq_scan,"
        " (select sum(pg_stat_get_xact_numscans(i.indexrelid) + pg_stat_get_numscans(i.indexrelid))"
        "    from pg_index i where i.indrelid = c.oid) as idx_scan"
        "  from pg_class c"
        "  cross join lateral (select pg_stat_force_next_flush()) f"
        "  left join pg_stat_user_tables s on s.relid = c.oid"
        " where c.oid = 'public.cloud_machines'::regclass",
    )[0]


# -- a column that gets another type ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_type", "machine_type", "new_type", "user", "machine", "others"),
    [
        ("uuid", "text", "text", str(UUID(int=10)), "m-1", [str(UUID(int=10)).upper()]),
        ("uuid", "text", "varchar", str(UUID(int=10)), "m-1", ["{" + str(UUID(int=10)) + "}"]),
        ("bigint", "bigint", "text", "42", "7", ["042", "+42"]),
        ("bigint", "bigint", "numeric", "42", "7", ["42.0"]),
    ],
)
def test_a_user_column_of_another_type_leads_to_the_same_lease(
    bare_db: Database,
    user_type: str,
    machine_type: str,
    new_type: str,
    user: str,
    machine: str,
    others: list[str],
) -> None:
    """Changed past protect(): another spelling must not be another user, who may write."""
    owner = make(
        bare_db,
        Kind(
            user_type, machine_type, user, str(UUID(int=9)) if user_type == "uuid" else "9", "", ""
        ),
    )
    arbiter_db.install(bare_db.conninfo())
    owner.execute(
        "insert into public.cloud_machines (id, user_id) values (%s, %s)", (machine, user)
    )
    for _ in range(2):
        beat(owner, machine)
    owner.execute("drop policy mine on public.signals")
    owner.execute(f"alter table public.signals alter user_id type {new_type}".encode())
    insert = "insert into public.signals (user_id, source, machine_id) values (%s, %s, %s)"
    for spelling in (user, *others):
        assert rejection(owner.execute, insert, (spelling, "local", None)).sqlstate == "WX001"
    owner.execute(insert, (others[0], "cloud", machine))
    assert rejection(owner.execute, insert, ("nobody", "local", None)).sqlstate in ("22P02",)
    assert rows(owner, "select user_id from arbiter.leases") == [(user,)]


@pytest.mark.parametrize("new_type", ["numeric", "integer", "timestamptz", "uuid"])
def test_a_user_column_that_is_no_text_any_more_fails_the_write(
    bare_db: Database, new_type: str
) -> None:
    """1.0 is the user 1 of the table, and would be another one of the registry of texts."""
    owner = make(bare_db, KINDS["text"])
    arbiter_db.install(bare_db.conninfo())
    owner.execute("drop policy mine on public.signals")
    change = f"alter table public.signals alter user_id type {new_type}"
    owner.execute("delete from public.signals")
    owner.execute(f"{change} using null::{new_type}".encode())
    insert = "insert into public.signals (user_id, source, machine_id) values (%s, %s, %s)"
    users = {"uuid": str(UUID(int=1)), "timestamptz": "2026-01-01"}
    for _ in range(2):
        error = rejection(owner.execute, insert, (users.get(new_type, "1"), "local", None))
        assert error.sqlstate == "42883"
    wrong = "select state from arbiter.doctor() where object = 'protection of public.signals'"
    assert value(owner, wrong) == "outdated"


def test_texts_of_an_earlier_registry_beside_uuids(bare_db: Database) -> None:
    """The column that arbiter added is a text; a foreign key to uuids cannot be made for it."""
    owner = make(bare_db, KINDS["text"])
    arbiter_db.install(bare_db.conninfo())
    owner.execute("create table public.apps (id uuid primary key, user_id uuid, status text)")
    owner.execute("select arbiter.register_machines('public.apps')")
    user, machine = str(uuid4()), str(uuid4())
    owner.execute("insert into public.apps values (%s, %s, 'running')", (machine, user))
    for _ in range(2):
        owner.execute("update public.apps set last_health_check = now()")
    insert = "insert into public.signals (user_id, source, machine_id) values (%s, 'cloud', %s)"
    owner.execute(insert, (user.upper(), machine))


def test_a_registry_of_texts_after_one_of_uuids_was_dropped(bare_db: Database) -> None:
    """The guards of tables with texts read their machines as uuids until then."""
    owner = bare_db.connect()
    owner.execute(
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text)"
    )
    owner.execute("create table public.signals (user_id text not null, machine_id text)")
    arbiter_db.install(bare_db.conninfo())
    owner.execute("drop table public.cloud_machines cascade")
    owner.execute(
        "create table public.cloud_machines (id text primary key, user_id text, status text)"
    )
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    owner.execute("insert into public.cloud_machines values ('m-1', 'ada', 'running')")
    for _ in range(2):
        beat(owner, "m-1")
    write = (
        "insert into public.signals (user_id, source, machine_id) values ('ada', 'cloud', 'm-1')"
    )
    owner.execute(write)


UPPER = "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"


@pytest.mark.parametrize("before", ["text", "uuid", "dropped"])
def test_no_user_becomes_another_one_with_the_types_of_the_registry(
    bare_db: Database, before: str
) -> None:
    """By one spelling the user has a lease, and by the other one rows."""
    owner = bare_db.connect()
    first, then = ("text", "uuid") if before == "text" else ("uuid", "text")
    create = "create table public.{} (id {} primary key, user_id {}, status text)"
    owner.execute(create.format("cloud_machines", first, first).encode())
    owner.execute("create table public.signals (user_id text not null, machine_id text)")
    arbiter_db.install(bare_db.conninfo())
    owner.execute("insert into public.signals (user_id) values (%s)", (UPPER,))
    known = UPPER if before == "text" else UPPER.lower()
    assert rows(owner, "select user_id from arbiter.leases") == [(known,)]
    owner.execute(create.format("apps", then, then).encode())
    if before == "dropped":
        owner.execute("drop table public.cloud_machines cascade")
    register = "select arbiter.register_machines('public.apps')"
    error = rejection(owner.execute, register)
    place = "arbiter.leases" if before == "text" else "public.signals"
    assert (error.sqlstate, error.diag.message_primary) == (
        "55000",
        f"arbiter: user '{UPPER}' of {place} would become another user: the registry's users were"
        " of another type",
    )
    # One who is spelled as arbiter knows him is the same user.
    if before != "text":
        with owner.transaction():
            owner.execute("select arbiter.amend('public.signals', 'spelling')")
            owner.execute(
                "update public.signals set user_id = lower(user_id), arbiter_xid = default"
            )
        owner.execute(register)


def test_settings_change_while_there_is_no_registry(bare_db: Database) -> None:
    """What is known of its types stays: a uuid in upper case is still the same user."""
    owner = bare_db.connect()
    owner.execute(
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text)"
    )
    owner.execute("create table public.signals (user_id text not null)")
    arbiter_db.install(bare_db.conninfo())
    owner.execute("drop table public.cloud_machines cascade")
    owner.execute("update arbiter.settings set user_claim = 'id', poll_interval = '1 s'")
    arbiter_db.install(bare_db.conninfo())
    for user in (UPPER, UPPER.lower()):
        owner.execute("insert into public.signals (user_id) values (%s)", (user,))
    assert rows(owner, "select user_id from arbiter.leases") == [(UPPER.lower(),)]
    owner.execute(
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text)"
    )
    owner.execute("select arbiter.register_machines('public.cloud_machines')")
    claims = json.dumps({"id": UPPER})
    owner.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
    assert value(owner, "select arbiter.claimed_user_id()") == UPPER.lower()


def test_a_new_type_waits_for_writes_and_holds_no_lock_meanwhile(bare_db: Database) -> None:
    """A write that is in flight still reads the old registry."""
    owner = make(bare_db, KINDS["text"])
    arbiter_db.install(bare_db.conninfo())
    owner.execute("create table public.apps (id uuid primary key, user_id uuid, status text)")
    owner.execute("insert into public.cloud_machines (id, user_id) values ('m-1', 'ada')")
    writer = bare_db.connect(autocommit=False)
    insert = "insert into public.signals (user_id, source, machine_id) values ('ada', %s, %s)"
    writer.execute(insert, ("local", None))
    registering = bare_db.session()
    registered = registering.start("select arbiter.register_machines('public.apps')")
    wait_until_blocked(registering)
    assert arbiter_db.status(writer, "ada").environment == "local"
    assert rejection(writer.execute, insert, ("cloud", "m-1")).sqlstate == "WX004"
    writer.rollback()
    assert registered.result(TIMEOUT_S)


def test_doctor_names_a_guard_for_another_type(bare_db: Database) -> None:
    """The column is right, so nothing else is wrong; and the call that it names mends it."""
    owner = bare_db.connect()
    owner.execute(
        "create table public.cloud_machines (id text primary key, user_id uuid, status text)"
    )
    owner.execute("create table public.signals (user_id uuid not null)")
    arbiter_db.install(bare_db.conninfo())
    doctor = (
        "select state, problem, remedy from arbiter.doctor() where object like 'protection of%'"
    )
    assert [row.state for row in rows(owner, doctor)] == ["ok"]
    owner.execute("alter table public.signals alter user_id type text")
    (found,) = rows(owner, doctor)
    assert (found.state, found.problem) == (
        "outdated",
        "Its guard is not the one that protect() would make now: columns have other types, or"
        " arbiter.protections was changed past it.",
    )
    owner.execute(found.remedy)
    assert [row.state for row in rows(owner, doctor)] == ["ok"]
    owner.execute("insert into public.signals (user_id) values ('guest')")
