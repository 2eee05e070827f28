"""Who can do what, tried: role x function x table x verb, compared with a golden file.

Each statement runs as each role in a transaction that is rolled back. A cell is what came of it:
``ok``, the number of rows, or an SQLSTATE. ``42501`` is: no right. This writes the file anew::

    RENEW_GOLDEN=1 .venv/bin/python -m pytest tests/access/test_matrix.py -k reviewed
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from story import activate, add_signal, add_user, age, rows, set_status

if TYPE_CHECKING:
    from conftest import Database

Conn = psycopg.Connection[Any]

GOLDEN = Path(__file__).parent / "golden" / "matrix.txt"

ROLES = """
create role stranger login;
create role monitor login;
grant pg_monitor to monitor;
create role table_owner login;
create table public.theirs (user_id uuid not null);
alter table public.theirs owner to table_owner;
"""

DROPPED = """
drop owned by stranger, monitor, table_owner cascade;
drop role stranger, monitor, table_owner;
"""


class Actor(NamedTuple):
    """A column of the matrix; ``sub`` and ``machine`` are names of the stage, for its token."""

    role: str | None = None
    login: str | None = None
    sub: str | None = None
    machine: str | None = None


#: The logins without a role of the API set request.jwt.claims themselves.
ACTORS = {
    "anon": Actor("anon"),
    "browser": Actor("authenticated", sub="me"),
    "machine": Actor("authenticated", sub="me", machine="my_machine"),
    "backend": Actor("service_role"),
    "login": Actor(login="stranger", sub="me"),
    "table owner": Actor(login="table_owner", sub="me"),
    "monitor": Actor(login="monitor", sub="me"),
    "owner": Actor(login="app_owner"),
}
LEGEND = """\
anon         role anon, without a token
browser      role authenticated, with the token of a user
machine      role authenticated, with the token of that user's machine
backend      role service_role
login        a login without grants, which says of itself whose session it is
table owner  the same, and owns a table of its own, public.theirs
monitor      a member of pg_monitor
owner        arbiter's owner, who owns the app's tables, too

"I" is the user of the token: local holds the lease where the actor is no machine. ok: it ran; a
number: so many rows; otherwise an SQLSTATE: 42501 is no right, WX... a rejection, 55000 and others
come from what was asked for and not from who asks. Of a table, trigger: create a trigger on it,
disable: disable its triggers, policy: create a policy.

"""

CALLS = {
    "status()": "select arbiter.status()",
    "status(another user)": "select arbiter.status(%(other)s)",
    "confirm_takeover()": "select arbiter.confirm_takeover()",
    "confirm_takeover(another user, after an error)": "select arbiter.confirm_takeover(%(failed)s)",
    "heartbeat(my machine)": "select arbiter.heartbeat(%(my_machine)s::uuid)",
    "heartbeat(another machine)": "select arbiter.heartbeat(%(other_machine)s::uuid)",
    "heartbeats(both)": (
        "select arbiter.heartbeats(array[%(my_machine)s, %(other_machine)s]::text[])"
    ),
    "claimed_user_id()": "select arbiter.claimed_user_id()",
    "claimed_machine_id()": "select arbiter.claimed_machine_id()",
    "version()": "select arbiter.version()",
    "execution_status() in public": "select public.execution_status()",
    "confirm_takeover() in public": "select public.confirm_takeover()",
    "register_machines()": "select arbiter.register_machines('public.cloud_machines')",
    "protect(signals)": "select arbiter.protect('public.signals')",
    "protect(a table of the table owner)": "select arbiter.protect('public.theirs')",
    "unprotect(signals)": "select arbiter.unprotect('public.signals')",
    "amend()": "select arbiter.amend('public.signals', 'why')",
    "audit()": "select arbiter.audit('public.signals')",
    "doctor()": "select arbiter.doctor()",
    "expose()": "select arbiter.expose()",
    "unexpose()": "select arbiter.unexpose()",
    "add_client_role(stranger)": "select arbiter.add_client_role('stranger')",
    "remove_client_role(stranger)": "select arbiter.remove_client_role('stranger')",
}
SIGNAL = (
    "insert into public.signals"
    " (trader_id, symbol, interval, signal, bar_time, source, machine_id)"
    " values (%({})s, 'BTCUSDT', '1m', 'buy', now(), {})"
)
MACHINE = "insert into public.cloud_machines (user_id, machine_id) values (%(new)s, 'x')"
POSITION = (
    "update public.positions set quantity = 2, source = 'local', machine_id = null"
    " where user_id = %(other)s"
)
HIDDEN = "select from arbiter.leases where user_id <> %(me)s"

#: What a statement of a client says, besides those that are made for each table and column.
WRITES = {
    "signals: insert as local, mine": SIGNAL.format("my_trader", "'local', null"),
    "signals: insert as local, another user's": SIGNAL.format("other_trader", "'local', null"),
    "signals: insert as my machine": SIGNAL.format("my_trader", "'cloud', %(my_machine)s"),
    "signals: insert as my machine, another user's": SIGNAL.format(
        "other_trader", "'cloud', %(my_machine)s"
    ),
    "signals: insert as another machine": SIGNAL.format(
        "other_trader", "'cloud', %(other_machine)s"
    ),
    "signals: insert without a user": SIGNAL.format("no_trader", "'local', null"),
    "positions: update another user's to local": POSITION,
    "cloud_machines: insert": MACHINE,
    "leases: select another user's": HIDDEN,
}
DDL = {
    "trigger": (
        "create trigger mine before update on {} for each row"
        " execute function suppress_redundant_updates_trigger()"
    ),
    "disable": "alter table {} disable trigger user",
    "policy": "create policy mine on {} using (true)",
    "drop": "drop table {} cascade",
}

TABLES = """
select c.oid::regclass::text as name, c.relkind::text as kind,
       array_agg(quote_ident(a.attname) order by a.attnum) as columns
  from pg_class c
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where a.attgenerated = ''
   and (c.relnamespace = 'arbiter'::regnamespace and c.relkind in ('r', 'v')
        or c.oid in (select registry from arbiter.registry
                     union select protected_table from arbiter.protections))
 group by c.oid, c.relkind
 order by c.relnamespace::regnamespace::text, c.relname
"""

#: All that clients are not meant to call, with a null for each parameter. For any type it is one of
#: text: without a type the call fails before the server asks for the right to make it.
INTERNAL = """
select p.oid::regprocedure::text as name,
       format('select %s(%s)', p.oid::regproc,
         (select string_agg('null::' || replace(format_type(t.type, null), 'anyelement', 'text'),
                            ', ' order by t.n)
            from unnest(p.proargtypes::oid[]) with ordinality as t (type, n))) as call
  from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace and p.proname ~ '^(_|tg_)'
 order by 1
"""
OTHERS = "every other function of arbiter"


class Stage:
    """Bob is local, ada's machine holds, carol's has failed long ago; each has a row."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.owner = db.connect()
        self.owner.execute("update arbiter.settings set heartbeat_timeout = '24 hours'")
        self.owner.execute("select arbiter.expose()")
        self.owner.execute(
            "select arbiter.protect('public.positions', p_verbs => '{insert,update}')"
        )
        bob, ada, carol, new = (add_user(self.owner) for _ in range(4))
        bobs_machine = self.machine_of(bob.id)
        add_signal(self.owner, bob.trader)
        adas, carols = activate(self.owner, ada), activate(self.owner, carol)
        add_signal(self.owner, ada.trader, "cloud", adas)
        set_status(self.owner, carols, "error")
        age(self.owner, carols, entered_error=timedelta(hours=1))
        self.owner.execute(
            "insert into public.positions (user_id, symbol, source, machine_id)"
            " values (%s, 'ETH', 'local', null), (%s, 'ETH', 'cloud', %s)",
            (bob.id, ada.id, adas),
        )
        # What the app forgets is held by restrictive policies.
        self.owner.execute(
            "create policy app on public.cloud_machines for update to authenticated using (true)"
        )
        browser = {
            "me": bob.id,
            "my_trader": bob.trader,
            "my_machine": bobs_machine,
            "other": ada.id,
            "other_trader": ada.trader,
            "other_machine": adas,
        }
        machine = {
            "me": ada.id,
            "my_trader": ada.trader,
            "my_machine": adas,
            "other": bob.id,
            "other_trader": bob.trader,
            "other_machine": bobs_machine,
        }
        both = {"failed": carol.id, "new": new.id, "no_trader": None}
        self.names = {
            name: {**(machine if name == "machine" else browser), **both} for name in ACTORS
        }
        self.conns = {name: self.connect(name) for name in ACTORS}

    def machine_of(self, user_id: object) -> object:
        """A machine that stopped long ago."""
        (row,) = rows(
            self.owner,
            "insert into public.cloud_machines (user_id, machine_id, status)"
            " values (%s, 'bobs', 'stopped') returning id",
            user_id,
        )
        return row.id

    def connect(self, name: str) -> Conn:
        actor = ACTORS[name]
        claims: dict[str, str] = {}
        if actor.sub:
            claims["sub"] = str(self.names[name][actor.sub])
        if actor.machine:
            claims["machine_id"] = str(self.names[name][actor.machine])
        return self.db.connect(actor.login, actor.role, claims=claims or None)

    def outcome(self, actor: str, statement: str, *, counts: bool = False) -> str:
        """What comes of a statement of that actor; nothing of it stays."""
        conn = self.conns[actor]
        try:
            with conn.transaction(force_rollback=True):
                conn.execute("set local lock_timeout = '5 s'")
                cur = conn.execute(statement.encode(), self.names[actor])
                return str(cur.rowcount) if counts else "ok"
        except psycopg.Error as error:
            return error.sqlstate or "?"

    def line(self, statement: str, *, counts: bool = False) -> list[str]:
        return [self.outcome(actor, statement, counts=counts) for actor in ACTORS]


@pytest.fixture
def stage(db: Database) -> Iterator[Stage]:
    superuser = db.connect("postgres")
    superuser.execute(ROLES)
    stage = Stage(db)
    yield stage
    for conn in stage.conns.values():
        conn.close()
    superuser.execute(DROPPED)


def table_lines(stage: Stage) -> Iterator[tuple[str, list[str]]]:
    """Each table; verbs that are the same for all are one line, and so are columns."""
    for table in rows(stage.owner, TABLES):
        name = table.name
        lines = {
            "select": stage.line(f"select from {name}", counts=True),
            "insert": stage.line(f"insert into {name} default values", counts=True),
        }
        updates = {
            column: stage.line(f"update {name} set {column} = {column}", counts=True)
            for column in table.columns
        }
        usual = max(updates.values(), key=list(updates.values()).count)
        lines["update"] = usual
        for column, line in updates.items():
            if line != usual:
                lines[f"update {column}"] = line
        lines["delete"] = stage.line(f"delete from {name}", counts=True)
        if table.kind == "r":
            lines["truncate"] = stage.line(f"truncate {name} cascade")
            for what, ddl in DDL.items():
                lines[what] = stage.line(ddl.format(name))
        together: dict[tuple[str, ...], list[str]] = {}
        for verb, line in lines.items():
            together.setdefault(tuple(line), []).append(verb)
        for cells, verbs in together.items():
            yield f"{name}: {', '.join(verbs)}", list(cells)


def internal_lines(stage: Stage) -> Iterator[tuple[str, list[str]]]:
    """One line for all that no client may call, and one for each that some may."""
    clients = [actor for actor in ACTORS if actor != "owner"]
    closed = ["42501"] * len(clients)
    others = 0
    for function in rows(stage.owner, INTERNAL):
        line = [stage.outcome(actor, function.call) for actor in clients]
        if line != closed:
            yield function.name.removeprefix("arbiter."), [*line, "ok"]
        else:
            others += 1
    if others > 50:
        yield OTHERS, [*closed, "ok"]


def matrix(stage: Stage) -> str:
    """The matrix as the golden file has it."""
    parts = {
        "functions": [(name, stage.line(call)) for name, call in CALLS.items()]
        + list(internal_lines(stage)),
        "writes": [(name, stage.line(call, counts=True)) for name, call in WRITES.items()],
        "tables": list(table_lines(stage)),
    }
    width = max(len(name) for lines in parts.values() for name, _ in lines)
    columns = [max(5, len(actor)) for actor in ACTORS]

    def row(name: str, cells: list[str]) -> str:
        padded = (cell.ljust(size) for cell, size in zip(cells, columns, strict=True))
        return f"{name.ljust(width)}  {'  '.join(padded)}".rstrip() + "\n"

    text = LEGEND
    for title, lines in parts.items():
        text += row(title.upper(), list(ACTORS)) + "".join(row(*line) for line in lines) + "\n"
    return text.rstrip("\n") + "\n"


def test_who_can_do_what_is_what_was_reviewed(stage: Stage) -> None:
    found = matrix(stage)
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")


def test_each_function_is_tried(stage: Stage) -> None:
    """All that has no underscore, in a call of its own."""
    names = rows(
        stage.owner,
        "select distinct proname as name from pg_proc"
        " where pronamespace = 'arbiter'::regnamespace and proname !~ '^(_|tg_)'",
    )
    assert {row.name for row in names} == {
        name.split("(")[0] for name in CALLS if "in public" not in name
    }


OPENED = [
    "grant usage on schema arbiter to public",
    "grant execute on function arbiter._columns to service_role",
    "grant select on arbiter.machine_notes to authenticated",
    "grant update (epoch) on arbiter.leases to service_role",
    "drop policy arbiter_claim on public.signals",
    "drop policy arbiter_registry_update on public.cloud_machines",
    "alter table public.positions disable trigger arbiter_guard_update",
    "alter table arbiter.handovers disable trigger user",
    "grant app_owner to stranger",
]


@pytest.mark.parametrize("statement", OPENED)
def test_the_matrix_sees_what_was_opened_by_hand(stage: Stage, statement: str) -> None:
    stage.db.connect("postgres").execute(statement.encode())
    assert matrix(stage) != GOLDEN.read_text(encoding="utf-8")
