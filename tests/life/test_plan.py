"""What a plan says of a table: each note, each warning, and when it says nothing."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import rows, value

import arbiter_db
from arbiter_db import Adoption

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

APP = """
create table public.traders (id integer primary key, user_id uuid);
create table public.cloud_machines (
  id uuid primary key default gen_random_uuid(), user_id uuid, status text,
  last_health_check timestamptz);
create index on public.cloud_machines (user_id);
create table public.signals (
  id integer generated always as identity primary key,
  trader_id integer references public.traders,
  twin_id integer references public.traders);
insert into public.traders values
  (1, '00000000-0000-0000-0000-000000000001'),
  (2, '00000000-0000-0000-0000-000000000002'),
  (3, null);
"""

MACHINES, SIGNALS = "public.cloud_machines", "public.signals"
BY_TRADER = Adoption(protect=[SIGNALS], user_path="trader_id.user_id")


@pytest.fixture
def app(bare_db: Database) -> Conn:
    owner = bare_db.connect()
    owner.execute(APP.encode())
    return owner


def said(db: Database, table: str, adoption: Adoption = BY_TRADER) -> list[tuple[Any, ...]]:
    """Step, finding and remedy of each line on a table but the first."""
    lines = arbiter_db.plan(db.conninfo(), adoption=adoption)
    return [(n.step, n.finding, n.remedy) for n in lines if n.table == table][1:]


SILENT = (
    "arbiter rejects the writes of such a machine (WX004) until it sends heartbeats:"
    " arbiter.heartbeat()."
)


def silent(count: int, seconds: str = "30") -> tuple[str, str, str]:
    return (
        "warning",
        "machines whose status says that they run, without a heartbeat in the last"
        f" {seconds} s: {count}",
        SILENT,
    )


def machines(count: int, columns: str = "id, user_id, status, last_health_check") -> Any:
    return ("note", f"machines: {count}; columns {columns}", None)


REGISTRIES = {
    "none": ("", [machines(0)]),
    "one that runs and is fresh": (
        "insert into cloud_machines (status, last_health_check) values ('running', now())",
        [machines(1)],
    ),
    "one whose heartbeat is nearly too old": (
        "insert into cloud_machines (status, last_health_check)"
        " values ('running', now() - interval '25 s')",
        [machines(1)],
    ),
    "one whose heartbeat is too old": (
        "insert into cloud_machines (status, last_health_check)"
        " values ('active', now() - interval '31 s')",
        [machines(1), silent(1)],
    ),
    "one that never sent any, and one without a status": (
        "insert into cloud_machines (status) values ('running'), (null)",
        [machines(2), silent(2)],
    ),
    "those that do not run": (
        "insert into cloud_machines (status) values"
        " ('provisioning'), ('starting'), ('stopping'), ('deprovisioning'), ('stopped'),"
        " ('deleted'), ('suspended'), ('error'), ('failed')",
        [machines(9)],
    ),
    "words that are not mapped": (
        "insert into cloud_machines (status, last_health_check) values"
        " ('zombie', now()), ('it''s', now()), ('zombie', now()), ('started', now())",
        [
            machines(4),
            (
                "warning",
                "status words that are not mapped count as running: 'it''s', 'zombie'",
                "Map them: arbiter-db register-machines --states.",
            ),
        ],
    ),
    "indexes that read the heartbeat": (
        "create index zeta on cloud_machines (last_health_check);"
        "create index alpha on cloud_machines (user_id) where last_health_check is not null",
        [
            machines(0),
            (
                "warning",
                "no heartbeat can be a HOT update while an index reads last_health_check:"
                " public.alpha, public.zeta",
                "Drop it if you can.",
            ),
        ],
    ),
    "no index on the user": (
        "drop index cloud_machines_user_id_idx;"
        "create index on cloud_machines (status, user_id);"
        "create index on cloud_machines (user_id) where status = 'running'",
        [
            machines(0),
            (
                "warning",
                "no index begins with user_id, so looking up the machines of a user reads the"
                " whole table",
                "create index on public.cloud_machines (user_id);",
            ),
        ],
    ),
    "no column for the heartbeat": (
        "alter table cloud_machines drop last_health_check;"
        "insert into cloud_machines (status) values ('running'), ('stopped')",
        [machines(2, "id, user_id, status, last_health_check (is added)"), silent(1)],
    ),
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_of_a_registry(bare_db: Database, app: Conn, name: str) -> None:
    setup, expected = REGISTRIES[name]
    app.execute(setup.encode())
    first = arbiter_db.plan(bare_db.conninfo(), adoption=BY_TRADER)[0]
    assert astuple(first) == ("register", MACHINES, "becomes the registry of machines", None)
    assert said(bare_db, MACHINES) == expected


def test_of_a_registry_that_is_one(bare_db: Database, app: Conn) -> None:
    """By the columns, the words and the timeout that were declared."""
    arbiter_db.install(bare_db.conninfo(), adoption=Adoption(adopt=False))
    app.execute(
        "alter table cloud_machines rename id to key;"
        "alter table cloud_machines rename user_id to owner;"
        "alter table cloud_machines rename status to word;"
        "alter table cloud_machines rename last_health_check to beat;"
        "select arbiter.register_machines('public.cloud_machines', 'key', 'owner', 'word', 'beat',"
        """ '{"up": "running", "down": "stopped"}');"""
        "update arbiter.settings set heartbeat_interval = '1 s', heartbeat_timeout = '4.5 s';"
        "alter table cloud_machines disable trigger all;"
        "insert into cloud_machines (word, beat) values"
        " ('up', now() - interval '10 s'), ('down', null)"
    )
    first = arbiter_db.plan(bare_db.conninfo())[0]
    assert astuple(first) == ("keep", MACHINES, "is the registry of machines", None)
    assert said(bare_db, MACHINES, Adoption()) == [
        machines(2, "key, owner, word, beat"),
        silent(1, "4.5"),
    ]
    app.execute("alter table cloud_machines rename word to state")
    assert said(bare_db, MACHINES, Adoption()) == [
        (
            "warning",
            "table public.cloud_machines has no column word",
            "Name the column in the call.",
        )
    ]


LOCKED = (
    "note",
    "is locked for a moment, without a rewrite; after 5 s of waiting the installation gives up",
    "Afterwards, each in a transaction of its own: an index on the machine column, for which"
    " writers wait while it reads the table, and the validation of constraints, for which they do"
    " not.",
)


def old(count: int) -> Any:
    return ("note", f"rows: {count}, 8192 bytes; they stay as they are and count as local", None)


TWO_WAYS = Adoption(protect=[SIGNALS], user_path="trader_id.user_id, twin_id.user_id")
ALLOWED = Adoption(protect=[SIGNALS], user_path="trader_id.user_id", unowned="allow")
WITHOUT = "insert into signals (trader_id, twin_id) values (1, 1), (null, null), (3, null), (2, 2)"
TABLES = {
    "no rows": ("", BY_TRADER, [LOCKED]),
    "rows without a user": (
        WITHOUT,
        BY_TRADER,
        [
            old(4),
            (
                "warning",
                "rows without a user: 2",
                "New ones are rejected (WX005). If your backend writes them: --unowned allow.",
            ),
            LOCKED,
        ],
    ),
    "rows without a user, allowed": (
        WITHOUT,
        ALLOWED,
        [
            old(4),
            ("note", "rows without a user: 2", "New ones are admitted from trusted roles."),
            LOCKED,
        ],
    ),
    "rows that lead to two users": (
        "insert into signals (trader_id, twin_id)"
        " values (1, 2), (1, 1), (1, null), (null, 2), (1, 3)",
        TWO_WAYS,
        [
            old(5),
            (
                "warning",
                "rows that lead to two users: 1, by trader_id.user_id, twin_id.user_id",
                "New ones are rejected (WX005).",
            ),
            LOCKED,
        ],
    ),
    "users that are no uuids, which the registry's are": (
        "alter table signals add symbol varchar(60);"
        "insert into signals (symbol) values ('BTC'), ('ETH'), (null),"
        " ('{ABCDEF00-0000-0000-0000-000000000001}')",
        Adoption(protect=[SIGNALS], user_path="symbol", unowned="allow"),
        [
            old(4),
            ("note", "rows without a user: 1", "New ones are admitted from trusted roles."),
            (
                "warning",
                "rows whose user is no uuid, as the users of the registry are: 2, by symbol",
                "Such a user never has a machine. If another column holds the user, name it:"
                " --user-path.",
            ),
            LOCKED,
        ],
    ),
    "a text that names the same uuid": (
        "insert into traders values (4, 'abcdef00-0000-0000-0000-000000000001');"
        "alter table signals add owner varchar(50);"
        "insert into signals (trader_id, owner) values (1, '00000000-0000-0000-0000-000000000001'),"
        " (4, 'ABCDEF00-0000-0000-0000-000000000001'), (1, 'ABCDEF00-0000-0000-0000-000000000001')",
        Adoption(protect=[SIGNALS], user_path="trader_id.user_id, owner"),
        [
            old(3),
            (
                "warning",
                "rows that lead to two users: 1, by trader_id.user_id, owner",
                "New ones are rejected (WX005).",
            ),
            LOCKED,
        ],
    ),
    "triggers": (
        "create function f() returns trigger language plpgsql as 'begin return null; end';"
        "create trigger zeta after insert on signals for each row execute function f();"
        'create trigger "Al pha" after update on signals for each row execute function f()',
        BY_TRADER,
        [
            (
                "note",
                'has triggers: "Al pha" on public.signals, zeta on public.signals',
                "They go on as before. What a trigger after insert does outside the database has"
                " happened when a write is rejected.",
            ),
            LOCKED,
        ],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_of_a_table_to_protect(bare_db: Database, app: Conn, name: str) -> None:
    setup, adoption, expected = TABLES[name]
    app.execute(setup.encode())
    assert said(bare_db, SIGNALS, adoption) == expected
    arbiter_db.install(bare_db.conninfo(), adoption=adoption)
    [kept] = [n for n in arbiter_db.plan(bare_db.conninfo()) if n.table == SIGNALS]
    assert kept.step == "keep"


def test_of_a_partitioned_table(bare_db: Database, app: Conn) -> None:
    """All its partitions count."""
    app.execute(
        "create table public.ticks (user_id uuid, n integer) partition by list (n);"
        "create table public.ticks_1 partition of public.ticks for values in (1);"
        "create table public.ticks_2 partition of public.ticks for values in (2);"
        "insert into public.ticks values (gen_random_uuid(), 1), (gen_random_uuid(), 2)"
    )
    assert said(bare_db, "public.ticks", Adoption(protect=["public.ticks"])) == [
        ("note", "rows: 2, 16 kB; they stay as they are and count as local", None),
        LOCKED,
    ]


CANDIDATES = """
create table public.trades (id integer, user_id uuid not null);
create table public.orders (id integer);
create table public.of_machines (
  machine uuid references public.cloud_machines, user_id uuid not null);
create table public.others (id integer, user_id uuid not null);
create temporary table positions (id integer, user_id uuid not null);
create table public.parted (id integer, user_id uuid not null, machine uuid) partition by list (id);
create table public.trades_of_parted partition of public.parted for values in (1);
alter table public.trades_of_parted add foreign key (machine) references public.cloud_machines;
"""


def test_of_tables_that_could_be_protected(bare_db: Database, app: Conn) -> None:
    """Those that name machines, and those of the usual names; nothing is done to them."""
    app.execute(CANDIDATES.encode())
    lines = arbiter_db.plan(bare_db.conninfo(), adoption=BY_TRADER)
    assert [astuple(n) for n in lines if n.step == "skip"] == [
        (
            "skip",
            "public.of_machines",
            "is not protected",
            "arbiter-db install --protect public.of_machines",
        ),
        (
            "skip",
            "public.orders",
            "table public.orders has no obvious way to a user",
            "Name it in p_user_path: a column with the user's id ('owner_id') or a path over"
            " foreign keys ('trader_id.user_id').",
        ),
        ("skip", "public.trades", "is not protected", "arbiter-db install --protect public.trades"),
    ]
    before = value(app, "select count(*) from pg_attribute")
    arbiter_db.install(bare_db.conninfo(), adoption=Adoption(registry=MACHINES, adopt=False))
    assert rows(app, "select from arbiter.protections") == []
    skipped = {n.table: n.finding for n in arbiter_db.plan(bare_db.conninfo())}
    assert skipped["public.trades"] == "is not protected; by default only public.signals is"
    assert before


NUMBERS = """
create table public.trades (user_id bigint not null);
create table public.orders (user_id uuid not null, machine_id integer);
create table public.positions (user_id numeric not null);
"""


def test_a_registry_that_is_named_again_keeps_its_options(app: Conn, bare_db: Database) -> None:
    """An exported migration names it each time, and a DBA has told arbiter more of it since."""
    adoption = Adoption(registry=MACHINES)
    arbiter_db.install(bare_db.conninfo(), adoption=adoption)
    app.execute("alter table public.cloud_machines rename status to phase")
    app.execute(
        "select arbiter.register_machines('public.cloud_machines', p_status_column => 'phase',"
        ' p_states => \'{"up": "running", "down": "stopped"}\', p_machine_statuses => \'{up}\')'
    )
    known = rows(app, "select * from arbiter.registry")
    plan = arbiter_db.plan(bare_db.conninfo(), adoption=adoption)
    assert [line.step for line in plan if line.finding == "is the registry of machines"] == ["keep"]
    arbiter_db.install(bare_db.conninfo(), adoption=adoption)
    assert rows(app, "select * from arbiter.registry") == known


def test_of_tables_whose_ids_are_never_those_of_the_registry(bare_db: Database, app: Conn) -> None:
    """They are skipped; asked for by name they are an error, and nothing was changed."""
    app.execute(NUMBERS.encode())
    said = {
        "public.orders": "column machine_id of table public.orders is integer,"
        " but column id of the registry public.cloud_machines is uuid",
        "public.positions": "column user_id of table public.positions is numeric, an id must be"
        " uuid or text or character varying or smallint or integer or bigint",
        "public.trades": "column user_id of table public.trades is bigint,"
        " but column user_id of the registry public.cloud_machines is uuid",
    }
    plan = arbiter_db.plan(bare_db.conninfo(), adoption=BY_TRADER)
    assert {n.table: n.finding for n in plan if n.step == "skip"} == said
    # Also beside a registry that there is already.
    arbiter_db.install(bare_db.conninfo(), adoption=BY_TRADER)
    plan = arbiter_db.plan(bare_db.conninfo())
    assert {n.table: n.finding for n in plan if n.step == "skip"} == said
    for table, finding in said.items():
        with pytest.raises(arbiter_db.InstallError) as caught:
            arbiter_db.install(bare_db.conninfo(), adoption=Adoption(protect=[table]))
        # Errors name a table by the search_path of the session, the plan in full.
        assert finding.replace("public.", "") in f"{caught.value}".replace("public.", "")
    assert rows(app, "select protected_table::text from arbiter.protections") == [("signals",)]


LOOK_ALIKES = """
create schema other;
create table other.cloud_machines (id uuid primary key, user_id uuid, status text);
create table other.bots (
  id uuid primary key, user_id uuid, status text, last_health_check timestamptz);
create view other.seen as select * from other.bots;
create temporary table bots (id uuid, user_id uuid, status text, last_health_check timestamptz);
create table other.dropped (user_id uuid, status text, last_health_check timestamptz);
alter table other.dropped drop status;
create table other.parts (user_id uuid, status text, last_health_check timestamptz, n integer)
  partition by list (n);
create table other.part partition of other.parts for values in (1);
"""


def test_of_tables_that_look_like_a_registry(bare_db: Database) -> None:
    owner = bare_db.connect()
    owner.execute(LOOK_ALIKES.encode())
    named = "looks like the registry of machines, and so does "
    assert [astuple(n) for n in arbiter_db.plan(bare_db.conninfo())] == [
        ("skip", "other.bots", f"{named}other.parts", "arbiter-db install --registry other.bots"),
        ("skip", "other.parts", f"{named}other.bots", "arbiter-db install --registry other.parts"),
    ]
    owner.execute("drop table other.parts")
    unusual = (
        "looks like the registry of machines, but has not the usual name, public.cloud_machines"
    )
    assert [n.finding for n in arbiter_db.plan(bare_db.conninfo())] == [unusual]
    arbiter_db.install(bare_db.conninfo())
    assert rows(owner, "select from arbiter.registry") == []

    # Once there is one, others are no matter; when it is gone, it is asked anew.
    arbiter_db.install(bare_db.conninfo(), adoption=Adoption(registry="other.bots"))
    assert [n.step for n in arbiter_db.plan(bare_db.conninfo())][:1] == ["keep"]
    owner.execute(
        "create table public.cloud_machines (id uuid primary key, user_id uuid, status text)"
    )
    assert [n.table for n in arbiter_db.plan(bare_db.conninfo()) if n.step == "register"] == []
    owner.execute("drop table other.bots cascade")
    arbiter_db.install(bare_db.conninfo())
    assert rows(owner, "select registry::text from arbiter.registry") == [("cloud_machines",)]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("trades", "public.trades"),
        ("Trades", "'public.\"Trades\"'"),
        ("it's $(date)", """'public."it'"'"'s $(date)"'"""),
    ],
)
def test_a_command_of_the_plan_can_be_pasted(
    bare_db: Database, app: Conn, name: str, word: str
) -> None:
    """A table may be named by a role that means harm."""
    quoted = '"' + name + '"'
    app.execute(
        f"create table public.{quoted}"
        " (user_id uuid not null, m uuid references public.cloud_machines)".encode()
    )
    [line] = [
        n for n in arbiter_db.plan(bare_db.conninfo(), adoption=BY_TRADER) if n.step == "skip"
    ]
    assert line.remedy == f"arbiter-db install --protect {word}"


def test_what_holds_at_the_end(bare_db: Database, app: Conn) -> None:
    arbiter_db.install(
        bare_db.conninfo(), adoption=Adoption(protect=[SIGNALS], user_path="twin_id.user_id")
    )
    app.execute("create table public.bids (user_id uuid not null)")
    app.execute("select arbiter.protect('public.bids', p_mode => 'observe')")
    assert arbiter_db.summary(app) == [
        "public.cloud_machines is the registry of machines",
        "public.bids is protected: mode observe, user by 'user_id', machine in machine_id, rows"
        " without a user: reject",
        "public.signals is protected: mode enforce, user by 'twin_id.user_id', machine in"
        " machine_id, rows without a user: reject",
        "public.bids is only observed; next: look at arbiter.observations, then arbiter-db protect"
        " public.bids --mode enforce",
        "next: arbiter-db doctor",
    ]
    app.execute("drop table public.bids, public.cloud_machines cascade")
    assert arbiter_db.summary(app) == [
        "no table is the registry of machines, so cloud writes are rejected; next: arbiter-db"
        " register-machines TABLE",
        "public.signals is protected: mode enforce, user by 'twin_id.user_id', machine in"
        " machine_id, rows without a user: reject",
        "next: arbiter-db doctor",
    ]
