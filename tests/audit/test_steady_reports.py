"""A report, or a message, lists the same things in the same order, wherever the server finds them.

The rows of the catalog and of arbiter's tables lie in the order in which they were written, until
an update or a dump puts them elsewhere; and a plan may read them by an index or not. So each is
asked for, the rows are moved, and it is asked for again under other plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from story import add_machine, add_signal, add_user, rows

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

#: Plans that give no order by themselves: what is off is not used where another way leads there.
PLANS = {
    "as ever": "",
    "in the order of the rows": "indexscan indexonlyscan bitmapscan",
    "by hashes": "indexscan indexonlyscan bitmapscan nestloop mergejoin sort",
    "by sorting": "hashagg hashjoin nestloop presorted_aggregate incremental_sort",
}

MOVE = """
do $$
declare
  v_place tid;
begin
  for v_place in select t.ctid from {0} t order by t.ctid desc loop
    update {0} set {1} = {1} where ctid = v_place;
  end loop;
end $$
"""
TABLES = (
    ("pg_catalog.pg_attribute", "attname"),
    ("pg_catalog.pg_class", "relname"),
    ("pg_catalog.pg_constraint", "conname"),
    ("pg_catalog.pg_depend", "deptype"),
    ("pg_catalog.pg_index", "indrelid"),
    ("pg_catalog.pg_inherits", "inhseqno"),
    ("pg_catalog.pg_policy", "polname"),
    ("pg_catalog.pg_proc", "proname"),
    ("pg_catalog.pg_trigger", "tgname"),
    ("arbiter.attachments", "shape"),
    ("arbiter.handovers", "reason"),
    ("arbiter.leases", "holder"),
    ("arbiter.observations", "code"),
    ("arbiter.protections", "mode"),
)


def move_rows(db: Database) -> None:
    """Write each row anew, the last one first."""
    admin = db.connect("postgres")
    admin.execute("set allow_system_table_mods = on")
    with admin.transaction():
        admin.execute("set local session_replication_role = replica")
        admin.execute("alter table arbiter.handovers disable trigger user")
        for table, column in TABLES:
            admin.execute(MOVE.format(table, column).encode())
        for name in ("arbiter_append_only", "arbiter_append_only_truncate"):
            admin.execute(f"alter table arbiter.handovers enable always trigger {name}".encode())


def under_each_plan(db: Database) -> Iterator[Conn]:
    """Sessions of the owner in which the server plans in these ways.

    Before version 18 it plans as ever: what is off has a cost there beside which no other counts,
    and a plan that is made so may take minutes.
    """
    for ways in PLANS.values():
        conn = db.connect()
        if conn.info.server_version >= 180000:
            for way in ways.split():
                conn.execute(f"set enable_{way} = off".encode())
        yield conn


# -- what is attached -----------------------------------------------------------------------------

SCENE = """
-- Protected tables, three of which others have replaced.
do $$ begin
  for n in 1 .. 6 loop
    execute format('create table public.t%s (user_id uuid not null)', n);
    execute format('select arbiter.protect(%L)', 'public.t' || n);
  end loop;
  for n in 1 .. 3 loop
    execute format('alter table public.t%s rename to old%1$s', n);
    execute format('create table public.t%s (user_id uuid not null)', n);
  end loop;
end $$;

-- Partitions that came in another order than they were made, and some that left.
create table public.ticks (user_id uuid not null, day integer not null) partition by list (day);
do $$ begin
  for n in 1 .. 8 loop
    execute format('create table public.ticks_%s (like public.ticks)', n);
  end loop;
  for n in reverse 8 .. 1 loop
    execute format('alter table public.ticks attach partition public.ticks_%s'
      ' for values in (%1$s)', n);
  end loop;
end $$;
select arbiter.protect('public.ticks', p_verbs => '{insert,update}');
alter table public.ticks detach partition public.ticks_4;
alter table public.ticks detach partition public.ticks_2;
alter table public.ticks detach partition public.ticks_7;

-- Paths over tables whose policies bind the owner, too.
do $$ begin
  for n in 1 .. 4 loop
    execute format('create table public.parent%s (id integer primary key, user_id uuid)', n);
    execute format('create table public.child%s (p integer references public.parent%1$s)', n);
    execute format('select arbiter.protect(%L, %L)', 'public.child' || n, 'p.user_id');
  end loop;
  for n in reverse 4 .. 1 loop
    execute format('alter table public.parent%s enable row level security', n);
    execute format('alter table public.parent%s force row level security', n);
  end loop;
end $$;

-- What may run in the registry, and slows its heartbeats.
create function public.of_the_app() returns trigger language plpgsql
  as $$ begin return null; end $$;
create function public.of_another() returns trigger language plpgsql
  as $$ begin return null; end $$;
do $$ begin
  for n in reverse 6 .. 1 loop
    execute format('create trigger opaque%s after delete on public.cloud_machines for each row '
      'when (length(old.region) > 9) execute function public.of_the_app()', n);
    execute format('create trigger foreign%s after delete on public.cloud_machines for each row '
      'execute function public.of_another()', n);
    execute format('create index beats%s on public.cloud_machines (last_health_check)', n);
  end loop;
end $$;
select arbiter.protect('public.traders');  -- which is older than the registry
grant trigger
  on public.traders, public.cloud_machines, public.signals, public.ticks_1, public.t4, public.old2,
     public.child3
  to authenticator, service_role, authenticated, anon;

-- Beside what is exposed.
select arbiter.expose();
do $$
declare v_type text;
begin
  foreach v_type in array '{uuid,integer,bigint,numeric,boolean,date}'::text[] loop
    execute format('create function public.confirm_takeover(%s) returns void language sql'
      ' begin atomic end', v_type);
  end loop;
end $$;

-- Several ways to a user, and several keys of one column.
create table public.several (c1 integer, c2 integer, c3 integer, c4 integer, kept integer);
do $$ begin
  for n in reverse 4 .. 1 loop
    execute format('alter table public.several'
      ' add foreign key (c%s) references public.parent%1$s,'
      ' add constraint kept%1$s foreign key (kept) references public.parent%1$s', n);
  end loop;
end $$;
insert into arbiter.client_roles (role) values
  ('pg_monitor'), ('pg_signal_backend'), ('pg_checkpoint'), ('authenticator'), ('pg_read_all_data');
"""

DOCTOR = "select * from arbiter.doctor()"
#: Its rows whose objects begin so.
PARTS = {
    "protections": "protection of ",
    "row security": "row security ",
    "privileges": "grants of trigger ",
    "indexes": "index ",
}
REPORTS = {
    "left on partitions": "select * from arbiter._left_on_others()",
    "partitions": "select * from arbiter._family('public.ticks')",
    "code of another role": "select * from arbiter._foreign_code('public.cloud_machines')",
    "conditions": "select tgname from arbiter._opaque_triggers('public.cloud_machines')",
    "functions of the app": "select * from arbiter._beside_exposed('public')",
    "what is left to finish": "select * from arbiter._finish_statements()",
    "client roles": "select arbiter._grantees('{visitor,user,backend}')",
    "keys": "select * from arbiter._keys('e.x, d.x, f.x, a.x, c.x, b.x, d.y')",
    "ways to a user": "select arbiter._find_user_path('public.several', 'machine_id')",
    "the parent of a column": "select arbiter._need_foreign_key('public.several', 'kept', '')",
    "columns that stay": "select * from arbiter._detach_all(false)",
    # Fails when the columns would be others than those of the function that is there.
    "columns of a function": "select arbiter._expose('public')",
}


Scene = tuple["Database", dict[str, object]]


@pytest.fixture(scope="module")
def scene(templates: Templates) -> Iterator[Scene]:
    """A database whose rows have moved, and what it reported before."""
    with templates.clone("installed") as db:
        arbiter_db.install(db.conninfo())  # which recognises what it has copied
        owner = db.connect()
        owner.execute(SCENE.encode())
        db.connect("postgres").execute("alter function public.of_another() owner to authenticated")
        before = answers(owner, REPORTS) | parts_of_doctor(owner)
        move_rows(db)
        yield db, before


def answers(conn: Conn, reports: dict[str, str]) -> dict[str, object]:
    """What they say, an error for a report too; nothing of it stays."""
    found: dict[str, object] = {}
    for name, query in reports.items():
        try:
            with conn.transaction(force_rollback=True):
                found[name] = rows(conn, query)
        except psycopg.Error as error:
            found[name] = (error.diag.message_primary, error.diag.message_hint)
    return found


def parts_of_doctor(conn: Conn) -> dict[str, object]:
    found = rows(conn, DOCTOR)
    return {
        name: [row for row in found if row.object.startswith(begin)]
        for name, begin in PARTS.items()
    }


def test_reports_of_what_is_attached(scene: Scene) -> None:
    db, before = scene
    for conn in under_each_plan(db):
        assert answers(conn, REPORTS) | parts_of_doctor(conn) == before
    assert all(len(before[part]) > 3 for part in PARTS)  # type: ignore[arg-type]


def test_the_registry_comes_first_and_roles_by_their_names(scene: Scene) -> None:
    _, before = scene
    privileges: Any = before["privileges"]
    tables = [row.object.removeprefix("grants of trigger on public.") for row in privileges]
    assert tables[:3] == ["cloud_machines", "traders", "signals"]
    for row in privileges:
        assert ": anon, authenticated, authenticator, service_role. " in row.problem


def notices(conn: Conn) -> list[str | None]:
    """What it will have been told."""
    said: list[str | None] = []
    conn.add_notice_handler(lambda diag: said.append(diag.message_primary))
    return said


def test_what_an_upgrade_drops(db: Database) -> None:
    functions = ", ".join(f"arbiter.old_{name}()" for name in "abcd")
    for conn in under_each_plan(db):
        said = notices(conn)
        with conn.transaction(force_rollback=True):
            # As at the start of an installation: what has no comment is of no version.
            conn.execute("select set_config('arbiter.documented_before', '(0,0)', true)")
            for name in "dbca":
                conn.execute(
                    f"create function arbiter.old_{name}() returns void language sql"
                    " begin atomic end".encode()
                )
            conn.execute("select arbiter._drop_left_over()")
        assert said == [f"arbiter: dropped routine {functions}"]


# -- audit ----------------------------------------------------------------------------------------

#: Each in a transaction of its own: handovers to and fro, and a write of each holder.
HANDOVERS = """
do $$
declare
  v_machine arbiter.leases.machine_id%type := '{machine}';
begin
  for n in 1 .. 30 loop
    perform arbiter._hand_over(l, false, case n % 2 when 1 then 'cloud' else 'local' end,
              case n % 2 when 1 then v_machine end,
              case n % 2 when 1 then 'activated' else 'machine_stopped' end)
       from arbiter.leases l where l.user_id = '{user}';
    insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
    select '{trader}', 'A', '1m', 'buy', timestamptz '2000-01-01' + n * interval '1 min',
           l.holder, l.machine_id::uuid
      from arbiter.leases l where l.user_id = '{user}';
    commit;
  end loop;
end $$
"""
WRONG = """
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (%s, 'B', '1m', 'buy', now(), 'cloud', %s)
"""
AUDITS = {
    "audit": "select * from arbiter.audit('public.signals')",
    "proved": "select row_count from arbiter.audit('public.signals', true)"
    " where finding = 'proved'",
    "history": "select * from arbiter._audit_history()",
}


@pytest.fixture(scope="module")
def audited(templates: Templates) -> Iterator[Scene]:
    """Rows that are proved, contradictions, and flaws in the history, of several users."""
    with templates.clone("installed") as db:
        owner = db.connect()
        users = sorted((add_user(owner) for _ in range(15)), key=lambda user: user.id)
        lost, kept, broken = users[:5], users[5:11], users[11:]
        for user in reversed(users):
            add_signal(owner, user.trader)
        machines = {user: add_machine(owner, user, "stopped") for user in users}
        owner.execute("alter table public.signals disable trigger user")
        for user in reversed(kept + broken):
            names = {"user": user.id, "trader": user.trader, "machine": machines[user]}
            owner.execute(HANDOVERS.format(**names).encode())
        for user in reversed(kept):
            owner.execute(WRONG, (user.trader, machines[user]))
        owner.execute("alter table arbiter.handovers disable trigger user")
        # Of some all handovers are gone, of others one.
        owner.execute(
            "delete from arbiter.handovers where user_id::text = any (%s)"
            " or user_id::text = any (%s) and epoch = 9",
            ([str(user.id) for user in lost], [str(user.id) for user in broken]),
        )
        for name in ("arbiter_append_only", "arbiter_append_only_truncate"):
            owner.execute(f"alter table arbiter.handovers enable always trigger {name}".encode())
        before = answers(owner, AUDITS)
        move_rows(db)
        yield db, before


def test_audits(audited: Scene) -> None:
    db, before = audited
    for conn in under_each_plan(db):
        assert answers(conn, AUDITS) == before


def test_what_an_audit_finds_is_in_order(audited: Scene) -> None:
    _, before = audited
    found: Any = before["audit"]
    history = [(row.user_id, row.epoch) for row in found if row.finding == "history"]
    assert len(history) == 5 + 4
    assert history == sorted(history)
    contradictions = [row.user_id for row in found if row.finding == "contradiction"]
    assert len(contradictions) == 6
    assert contradictions == sorted(contradictions)
    assert before["proved"] == [(6 * 31,)]
