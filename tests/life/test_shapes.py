"""Databases of the kinds that apps really have: plan, install, and then a day in their life.

What each plan says is a golden file, which must read well: ``RENEW_GOLDEN=1`` writes them anew.
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner
from story import rejection, rows, value

import arbiter_db
from arbiter_db import Adoption
from arbiter_db.cli import main
from arbiter_db.demo.embedded import EmbeddedServer
from arbiter_db.install import migration_texts

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]
GOLDEN = Path(__file__).parent / "golden"

TRADERS = """
create table public.traders (id uuid primary key default gen_random_uuid(), user_id uuid);
"""
MACHINES = """
create table public.cloud_machines (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null unique,
  status text not null,
  last_health_check timestamptz);
"""
SIGNALS = """
create table public.signals (
  id uuid primary key default gen_random_uuid(),
  trader_id uuid not null references public.traders (id));
"""
#: What was written before: a signal of a built-in trader, and machines of other users.
BEFORE = (
    "insert into public.signals (trader_id) values (%(trader)s), (%(builtin)s)",
    "insert into public.cloud_machines (user_id, status) values (%(other)s, 'running')",
    "insert into public.cloud_machines (user_id, status) values (%(foreign)s, 'hibernating')",
)
OWNED = "insert into public.traders (id, user_id) values (%(trader)s, %(user)s)"
UNOWNED = "insert into public.traders (id) values (%(builtin)s)"
#: What was written before: a signal of a built-in trader, and machines of other users.
BEFORE = (
    "insert into public.signals (trader_id) values (%(trader)s), (%(builtin)s)",
    "insert into public.cloud_machines (user_id, status) values (%(other)s, 'running')",
    "insert into public.cloud_machines (user_id, status) values (%(foreign)s, 'hibernating')",
)


@dataclass(frozen=True)
class Shape:
    """An app's schema, and its statements; `%(user)s` and so on are the ids of one user.

    `columns` and `values` are those that lead to the user; `builtin` are values that lead to none.
    """

    ddl: str
    options: Adoption = field(default_factory=Adoption)
    data: tuple[str, ...] = (OWNED, UNOWNED)
    columns: str = "trader_id"
    values: str = "%(trader)s"
    builtin: str | None = "%(builtin)s"
    registry: str = "public.cloud_machines"
    signals: str = "public.signals"
    machine_column: str = "machine_id"
    running: str = "running"
    #: Rows that lead to two users: their values.
    two_users: str | None = None
    ids: dict[str, Any] = field(
        default_factory=lambda: {
            name: UUID(int=n)
            for n, name in enumerate(("user", "other", "trader", "foreign", "builtin", "machine"))
        }
    )


SHAPES = {
    "first life of the app": Shape(
        TRADERS + MACHINES.replace(",\n  last_health_check timestamptz", "") + SIGNALS,
        data=(OWNED, UNOWNED, *BEFORE),
    ),
    "second life of the app": Shape(
        TRADERS
        + """
        create table public.user_fly_apps (
          id uuid primary key default gen_random_uuid(),
          user_id uuid not null unique,
          status text not null
            check (status in ('provisioning', 'active', 'error', 'deprovisioning', 'deleted')),
          last_health_check timestamptz);
        create index user_fly_apps_health_idx on public.user_fly_apps (last_health_check);
        """
        + SIGNALS
        + """
        alter table public.signals
          add source text not null default 'local' check (source in ('local', 'cloud')),
          add fly_app_id uuid references public.user_fly_apps (id) on delete set null,
          add machine_id text;
        """,
        Adoption(registry="public.user_fly_apps", protect=["public.signals"]),
        registry="public.user_fly_apps",
        machine_column="fly_app_id",
        running="active",
    ),
    "owner under another name": Shape(
        MACHINES
        + "create table public.signals (id bigint generated always as identity primary key,"
        " owner_id uuid)",
        Adoption(protect=["public.signals"], user_path="owner_id", unowned="allow"),
        data=(),
        columns="owner_id",
        values="%(user)s",
        builtin="null",
    ),
    "two ways": Shape(
        TRADERS
        + MACHINES
        + SIGNALS
        + "alter table public.signals add copied_from uuid references public.traders (id)",
        Adoption(protect=["public.signals"], user_path="trader_id.user_id, copied_from.user_id"),
        data=(OWNED, UNOWNED, "insert into public.traders values (%(foreign)s, %(other)s)"),
        columns="trader_id, copied_from",
        values="%(trader)s, %(trader)s",
        builtin="%(builtin)s, %(builtin)s",
        two_users="%(trader)s, %(foreign)s",
    ),
    "nullable user beside a path": Shape(
        TRADERS + MACHINES + SIGNALS + "alter table public.signals add user_id uuid",
        columns="trader_id, user_id",
        values="%(trader)s, null",
        builtin="%(builtin)s, null",
        two_users="%(trader)s, %(other)s",
    ),
    "another schema with quoted names": Shape(
        """
        create schema "Trading App";
        create table "Trading App"."Machines; of us" (
          id uuid primary key, user_id uuid not null, status text not null,
          last_health_check timestamptz);
        create index on "Trading App"."Machines; of us" (user_id);
        create table "Trading App"."Signals $(date)" (
          "Id" uuid primary key default gen_random_uuid(),
          user_id uuid not null,
          "Machine's" uuid references "Trading App"."Machines; of us" (id));
        """,
        Adoption(
            registry='"Trading App"."Machines; of us"',
            protect=['"Trading App"."Signals $(date)"'],
            mode="enforce",
        ),
        data=(),
        columns="user_id",
        values="%(user)s",
        builtin=None,
        registry='"Trading App"."Machines; of us"',
        signals='"Trading App"."Signals $(date)"',
        machine_column='"Machine\'s"',
    ),
    "registry with a health column": Shape(
        TRADERS
        + MACHINES
        + SIGNALS
        + "create type public.health as enum ('unknown', 'healthy', 'unhealthy');"
        "alter table public.cloud_machines"
        " add health_status public.health not null default 'unknown'",
    ),
    "Clerk text ids": Shape(
        TRADERS.replace("user_id uuid", "user_id text")
        + MACHINES.replace(
            "id uuid primary key default gen_random_uuid()", "id text primary key"
        ).replace("user_id uuid", "user_id text")
        + SIGNALS,
        ids={
            "user": "user_2abcDEF",
            "trader": UUID(int=1),
            "builtin": UUID(int=2),
            "machine": "3d8d9930b32489",
        },
    ),
    "bigint bot ids": Shape(
        """
        create table public.bots (id bigint primary key, name text);
        create table public.cloud_machines (
          id integer primary key,
          user_id bigint not null unique references public.bots (id),
          status text not null,
          last_health_check timestamptz);
        create table public.signals (
          id bigint generated always as identity primary key,
          bot_id bigint not null references public.bots (id));
        """,
        Adoption(protect=["public.signals"], user_path="bot_id"),
        data=("insert into public.bots (id) values (%(user)s)",),
        columns="bot_id",
        values="%(user)s",
        builtin=None,
        ids={"user": 9223372036854775807, "machine": 42},
    ),
    "one strategy for each organization": Shape(
        MACHINES.replace("user_id uuid not null unique", "user_id text not null unique")
        + """
        create table public.strategies (id integer primary key, org_id varchar(40) not null);
        create table public.signals (
          id bigint generated always as identity primary key,
          strategy_id integer references public.strategies (id),
          by_user uuid);
        """,
        Adoption(protect=["public.signals"], user_path="strategy_id.org_id"),
        data=("insert into public.strategies values (%(trader)s, %(user)s)",),
        columns="strategy_id, by_user",
        values="%(trader)s, gen_random_uuid()",
        builtin="null, gen_random_uuid()",
        ids={"user": "org_2xyz", "trader": 1, "machine": UUID(int=5)},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_day_in_the_life_of(bare_db: Database, name: str) -> None:
    shape = SHAPES[name]
    owner = bare_db.connect()
    owner.execute(shape.ddl.encode())
    for statement in shape.data:
        owner.execute(statement.encode(), shape.ids)

    reviewed(bare_db, name, shape.options)
    arbiter_db.install(bare_db.conninfo(), adoption=shape.options)
    assert rows(owner, "select registry::text from arbiter.registry") == [
        (value(owner, f"select '{shape.registry.replace(chr(39), chr(39) * 2)}'::regclass::text"),)
    ]

    into = f"{shape.signals} ({shape.columns}, source, {shape.machine_column})"

    def insert(values: str, source: str, machine: Any = None) -> Any:
        statement = f"insert into {into} values ({values}, %(source)s, %(of)s)"
        return owner.execute(statement.encode(), {**shape.ids, "source": source, "of": machine})

    machine = shape.ids["machine"]
    insert(shape.values, "local")
    owner.execute(
        f"insert into {shape.registry} (id, user_id, status, last_health_check)"
        f" values (%(machine)s, %(user)s, '{shape.running}', now())".encode(),
        shape.ids,
    )
    insert(shape.values, "cloud", machine)
    assert rejection(insert, shape.values, "local").sqlstate == "WX001"
    if shape.builtin is not None:
        if shape.options.unowned == "allow":
            insert(shape.builtin, "local")
        else:
            assert rejection(insert, shape.builtin, "local").sqlstate == "WX005"
    if shape.two_users is not None:
        assert rejection(insert, shape.two_users, "local").sqlstate == "WX005"
    status = arbiter_db.status(owner, shape.ids["user"])
    assert (status.environment, status.machine_id) == ("cloud", str(machine))
    [audit] = [arbiter_db.audit(owner, table) for table in arbiter_db.protected_tables(owner)]
    assert (audit.findings, audit.proved) == ([], 2)
    wrong = "select remedy from arbiter.doctor() where state not in ('ok', 'note')"
    for (remedy,) in rows(owner, wrong):
        owner.execute(remedy.encode())
    assert rows(owner, wrong) == []


def reviewed(db: Database, name: str, options: Adoption) -> None:
    """The plan as the command line prints it is that of the golden file, and changes nothing."""
    arguments = ["install", "--plan", "--dsn", db.conninfo()]
    arguments += [] if options.adopt else ["--no-adopt"]
    arguments += ["--registry", options.registry] if options.registry else []
    for table in options.protect:
        arguments += ["--protect", table]
    for option in ("user_path", "machine_column", "mode", "unowned"):
        if (chosen := getattr(options, option)) is not None:
            arguments += ["--" + option.replace("_", "-"), chosen]
    before = db.connect().execute("select max(oid) from pg_class").fetchone()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert db.connect().execute("select max(oid) from pg_class").fetchone() == before
    said = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    path = GOLDEN / f"plan-{name.replace(' ', '-')}.txt"
    if os.environ.get("RENEW_GOLDEN"):
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")


TICKERS = "create table public.signals (id bigint primary key, ticker text not null)"


def test_a_table_of_tickers_is_left_alone(bare_db: Database) -> None:
    """It only has the name."""
    owner = bare_db.connect()
    owner.execute((MACHINES + TICKERS).encode())
    reviewed(bare_db, "ticker only", Adoption())
    arbiter_db.install(bare_db.conninfo())
    owner.execute("insert into public.signals values (1, 'BTC')")
    assert rows(owner, "select registry::text from arbiter.registry") == [("cloud_machines",)]
    assert rows(owner, "select from arbiter.protections") == []
    assert arbiter_db.summary(owner)[-1] == (
        "no table is protected, so no write is rejected;"
        " next: arbiter-db install --plan, then arbiter-db protect TABLE"
    )
    with pytest.raises(arbiter_db.InstallError, match="signals has no obvious way to a user"):
        arbiter_db.install(bare_db.conninfo(), adoption=Adoption(protect=["public.signals"]))


def test_an_empty_database(bare_db: Database) -> None:
    reviewed(bare_db, "nothing", Adoption())
    arbiter_db.install(bare_db.conninfo())
    assert [line.split(",")[0] for line in arbiter_db.summary(bare_db.connect())] == [
        "no table is the registry of machines",
        "no table is protected",
    ]


def test_two_registries_are_one_too_many(bare_db: Database) -> None:
    """An abandoned table beside the new one: which one it is, the app's owner says."""
    owner = bare_db.connect()
    owner.execute((TRADERS + MACHINES + MACHINES.replace("cloud_machines", "fleet")).encode())
    owner.execute(
        (SIGNALS + "alter table public.signals add machine uuid references fleet").encode()
    )
    reviewed(bare_db, "two registries", Adoption())
    arbiter_db.install(bare_db.conninfo())
    assert rows(owner, "select from arbiter.registry") == []
    assert rows(owner, "select from arbiter.protections") == []
    columns = "select attname from pg_attribute where attrelid = 'signals'::regclass and attnum > 0"
    assert rows(owner, columns) == [("id",), ("trader_id",), ("machine",)]

    arbiter_db.install(bare_db.conninfo(), adoption=Adoption(registry="public.fleet"))
    assert rows(owner, "select machine_column from arbiter.protections") == [("machine",)]
    assert rows(owner, columns) == [
        ("id",), ("trader_id",), ("machine",), ("source",), ("arbiter_xid",)
    ]  # fmt: skip


def test_options_say_what_is_adopted(trading_db: Database) -> None:
    """Nothing by default; then a table by name; what a table has already stays."""
    owner = trading_db.connect()
    reviewed(trading_db, "no adoption", Adoption(adopt=False))
    arbiter_db.install(trading_db.conninfo(), adoption=Adoption(adopt=False))
    assert rows(owner, "select from arbiter.registry") == []
    columns = "select attname from pg_attribute where attrelid = 'signals'::regclass"
    assert ("source",) not in rows(owner, columns)
    with pytest.raises(arbiter_db.InstallError, match="protects no table, and was told how to"):
        arbiter_db.install(trading_db.conninfo(), adoption=Adoption(adopt=False, mode="observe"))

    chosen = Adoption(protect=["public.positions"], mode="observe", unowned="allow")
    arbiter_db.install(trading_db.conninfo(), adoption=chosen)
    protections = "select protected_table::text, mode, unowned from arbiter.protections order by 1"
    assert rows(owner, protections) == [("positions", "observe", "allow")]
    assert rows(owner, "select registry::text from arbiter.registry") == [("cloud_machines",)]
    kept = (
        "is protected: mode observe, user by 'user_id', machine in machine_id, rows without a user:"
        " allow"
    )
    plan = arbiter_db.plan(trading_db.conninfo())
    assert ("keep", "public.positions", kept, None) in map(astuple, plan)
    assert arbiter_db.summary(owner)[2:3] == [
        "public.positions is only observed; next: look at arbiter.observations,"
        " then arbiter-db protect public.positions --mode enforce"
    ]
    arbiter_db.install(
        trading_db.conninfo(),
        adoption=Adoption(protect=["public.signals", "public.positions"], mode="enforce"),
    )
    assert rows(owner, protections) == [
        ("positions", "enforce", "allow"),
        ("signals", "enforce", "reject"),
    ]


def test_an_export_has_the_options_and_says_its_plan(trading_db: Database) -> None:
    """The migration does the same in one transaction, and leaves no setting behind."""
    chosen = Adoption(protect=["public.positions"], mode="observe")
    change, finish = migration_texts(chosen)
    conn = trading_db.connect()
    said: list[str] = []
    conn.add_notice_handler(lambda notice: said.append(f"{notice.message_primary}"))
    settings = "select current_setting(n) from unnest('{search_path,lock_timeout}'::text[]) n"
    conn.execute("set search_path = auth, public")
    before = rows(conn, settings)
    for text in (change, finish):
        with conn.transaction():
            conn.execute(text.encode())
            # What dbmate and alembic do next: write into a table of their own.
            assert rows(conn, settings) == before
    conn.execute("reset search_path")
    assert rows(conn, "select protected_table::text, mode from arbiter.protections") == [
        ("positions", "observe")
    ]
    steps = [line.split(" ")[1:3] for line in said if line.startswith("arbiter: ")]
    assert ["register:", "public.cloud_machines"] in steps
    assert ["protect:", "public.positions"] in steps
    assert said[-1] == "arbiter: next: arbiter-db doctor"
    assert not value(conn, "select current_setting('arbiter.adopt_columns', true)")
    assert not value(conn, "select current_setting('arbiter.install_options', true)")


def test_a_database_without_an_encoding(server: EmbeddedServer) -> None:
    """psycopg returns bytes there, unless it is told otherwise."""
    admin = psycopg.connect(server.conninfo(), autocommit=True)
    admin.execute("drop database if exists ascii with (force)")
    admin.execute("create database ascii encoding 'SQL_ASCII' template template0 locale 'C'")
    try:
        conninfo = server.conninfo(dbname="ascii")
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute((MACHINES + TRADERS + SIGNALS).encode())
        arbiter_db.install(conninfo)
        for command in ("status", "handovers", "audit", "observations"):
            user = [str(uuid4())] if command == "status" else []
            done = CliRunner().invoke(main, [command, *user, "--dsn", conninfo])
            assert done.exit_code == 0, done.output
        assert (
            "signals: 0 rows proved"
            in CliRunner().invoke(main, ["audit", "--dsn", conninfo]).stdout
        )
        assert arbiter_db.uninstall(conninfo)
    finally:
        admin.execute("drop database ascii with (force)")
        admin.close()
