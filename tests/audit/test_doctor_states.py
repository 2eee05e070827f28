"""Each check of doctor() in both directions: a row with exactly this state, problem and remedy once
something is wrong, none before; and the remedy runs and mends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from story import rows

import arbiter_db

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

TABLES = """
select arbiter.protect('public.positions', p_verbs => '{insert,update}');
create table public.ticks (user_id uuid not null, day integer not null) partition by range (day);
create table public.ticks_a partition of public.ticks for values from (0) to (10);
select arbiter.protect('public.ticks', p_verbs => '{insert,update}', p_evidence => false);
create table public.bars (user_id uuid not null, day integer not null) partition by range (day);
create table public.bars_a partition of public.bars for values from (0) to (10);
select arbiter.protect('public.bars', p_evidence => false);
create function public.tg_of_the_app() returns trigger language plpgsql
  as $$ begin return null; end $$;
select arbiter.expose();
revoke update on public.signals from authenticated;
"""

INSTALL = "Run: arbiter-db install"


def ill(conn: Conn) -> dict[str, tuple[str, str, str]]:
    """What is not as it should be: object to state, problem and remedy."""
    found = rows(conn, "select * from arbiter.doctor()")
    assert len({row.object for row in found}) == len(found)
    for row in found:
        assert (row.state == "ok") is (row.problem is None) is (row.remedy is None), row
    return {r.object: (r.state, r.problem, r.remedy) for r in found if r.state != "ok"}


def prepare(db: Database) -> None:
    owner = db.connect()
    owner.execute(TABLES.encode())
    arbiter_db.finish(owner)
    assert ill(owner) == {}


@pytest.fixture(scope="module")
def shared(templates: Templates) -> Iterator[Conn]:
    """The owner's connection, for tests that roll back."""
    with templates.clone("installed") as database:
        prepare(database)
        yield database.connect()


# -- triggers -------------------------------------------------------------------------------------

TRIGGERS = """
select format('%I', t.tgname) as name,
       format('%I.%I', c.relnamespace::regnamespace, c.relname) as "table",
       obj_description(t.oid, 'pg_trigger') as comment
  from pg_trigger t
  join pg_class c on c.oid = t.tgrelid
  join pg_proc p on p.oid = t.tgfoid and p.pronamespace = 'arbiter'::regnamespace
 where t.tgparentid = 0
 order by 2, 1
"""

REPLACED = """
drop trigger {0} on {1};
create trigger {0} after delete on {1} for each statement execute function {2}();
alter table {1} enable always trigger {0};
"""
SAME_COMMENT = "comment on trigger {0} on {1} is {3}"

UNARBITRATED = "Writes to this table are not arbitrated as they should be."
NOT_ALWAYS = "It does not fire always."
ANOTHER = "It was made from another definition."

#: What is done to a trigger, and what doctor says of it.
WRONGS = {
    "dropped": ("drop trigger {0} on {1}", "missing", UNARBITRATED),
    "disabled": ("alter table {1} disable trigger {0}", "disabled", NOT_ALWAYS),
    "not for replicas": ("alter table {1} enable trigger {0}", "disabled", NOT_ALWAYS),
    "only for replicas": ("alter table {1} enable replica trigger {0}", "disabled", NOT_ALWAYS),
    "replaced": (
        REPLACED.replace("{2}", "arbiter.tg_no_parent") + SAME_COMMENT,
        "outdated",
        ANOTHER,
    ),
    "without its hash": ("comment on trigger {0} on {1} is 'Mine.'", "outdated", ANOTHER),
    "without a comment": ("comment on trigger {0} on {1} is null", "outdated", ANOTHER),
    "of the app": (
        REPLACED.replace("{2}", "public.tg_of_the_app") + SAME_COMMENT,
        "foreign",
        "A trigger of this name calls a function that is not arbiter's.",
    ),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_each_trigger(shared: Conn, wrong: str) -> None:
    damage, state, problem = WRONGS[wrong]
    triggers = rows(shared, TRIGGERS)
    assert len(triggers) >= 25
    with shared.transaction(force_rollback=True):
        for name, table, comment in triggers:
            shared.execute(
                sql.SQL(damage).format(
                    sql.SQL(name), sql.SQL(table), sql.SQL(""), sql.Literal(comment)
                )
            )
        found = ill(shared)
        assert set(found) == {f"trigger {name} on {table}" for name, table, _ in triggers}
        assert {(said[0], said[1]) for said in found.values()} == {(state, problem)}
        if state == "foreign":
            for name, table, _ in triggers:
                shared.execute(f"drop trigger {name} on {table}".encode())
        for name, table, _ in triggers:
            remedy = found[f"trigger {name} on {table}"][2]
            if state == "foreign":
                assert remedy.startswith("Drop or rename it first. ")
                remedy = remedy.removeprefix("Drop or rename it first. ")
            if state == "disabled":
                assert remedy == f"alter table {table} enable always trigger {name}"
            elif table.startswith("arbiter."):
                assert remedy == INSTALL
                continue
            shared.execute(remedy.encode())
        left = ill(shared)
        own = {f"trigger {name} on {table}" for name, table, _ in triggers if "arbiter." in table}
        assert set(left) == (set() if state == "disabled" else own)


@pytest.mark.parametrize("trigger", ["arbiter_provenance", "arbiter_guard_row"])
def test_the_copy_of_a_trigger_in_a_partition(shared: Conn, trigger: str) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute(f"alter table public.ticks_a disable trigger {trigger}".encode())
        remedy = f"alter table public.ticks enable always trigger {trigger}"
        assert ill(shared) == {
            f"trigger {trigger} on public.ticks": ("disabled", NOT_ALWAYS, remedy)
        }
        shared.execute(remedy.encode())
        assert ill(shared) == {}


# -- everything else ------------------------------------------------------------------------------

REGISTER = "Call arbiter.register_machines() with the names that the table has now."
PROTECT = "Call arbiter.protect() with the names that the table has now."
MACHINES = "registry public.cloud_machines"
SIGNALS = "protection of public.signals"
PROTECT_SIGNALS = (
    "select arbiter.protect('public.signals', 'trader_id.user_id', '{insert}', 'machine_id',"
    " 'enforce', 'reject', 't')"
)
PROTECT_POSITIONS = (
    "select arbiter.protect('public.positions', 'user_id', '{insert,update}', 'machine_id',"
    " 'enforce', 'reject', 't')"
)
PATH_LEADS_ELSEWHERE = "The path from a row to its user leads elsewhere now."
CLAIM = "Browsers may claim to be what they are not."


@dataclass(frozen=True)
class Damage:
    """What is done, the one row that doctor() then has, and what mends it if not its remedy."""

    ddl: str
    object: str
    state: str
    problem: str
    remedy: str
    mend: str = ""
    #: Other objects that have a row because of the same damage.
    besides: tuple[str, ...] = ()


def renamed(column: str, argument: str) -> Damage:
    """A column of the registry under another name."""
    register = "select arbiter.register_machines('public.cloud_machines', {} => 'renamed')"
    return Damage(
        f"alter table public.cloud_machines rename {column} to renamed",
        MACHINES,
        "outdated",
        f"arbiter: table public.cloud_machines has no column {column}",
        REGISTER,
        register.format(argument),
    )


def hidden(table: str) -> Damage:
    """A table that arbiter reads, and whose policies bind arbiter's owner, too."""
    return Damage(
        f"alter table {table} enable row level security, force row level security",
        f"row security of {table}",
        "outdated",
        "Its policies bind arbiter's owner: every write that has to read this table fails.",
        f"alter table {table} no force row level security",
    )


#: As protect() leaves a constraint to the end of an installation.
UNVALIDATED = """
do $unvalidated$
declare
  v_definition text := (
    select pg_get_constraintdef(oid) from pg_constraint
     where conrelid = 'public.positions'::regclass and conname = '{0}');
begin
  alter table public.positions drop constraint {0};
  execute 'alter table public.positions add constraint {0} ' || v_definition || ' not valid';
  perform arbiter._record('constraint', 'public.positions', '{0}');
end
$unvalidated$
"""


#: Go with what they lead to.
KEYS = (
    "constraint arbiter_machine_id_fkey of public.signals",
    "constraint arbiter_machine_id_fkey of public.positions",
)

DAMAGES = {
    "no registry": Damage(
        "delete from arbiter.registry",
        "registry",
        "missing",
        "No table of machines is registered: nothing can be cloud.",
        "select arbiter.register_machines('public.cloud_machines')",
    ),
    "registry dropped": Damage(
        "alter table public.cloud_machines rename to gone; drop table public.gone cascade",
        "registry",
        "missing",
        "The registered table of machines does not exist any more: writes of machines fail.",
        "select arbiter.register_machines('<the new table>')",
        """
        create table public.fly_apps (id uuid primary key, user_id uuid, status text);
        alter table public.fly_apps enable row level security;
        select arbiter.register_machines('public.fly_apps');
        """,
        besides=KEYS,
    ),
    "registry dropped, and another has its name": Damage(
        """
        alter table public.cloud_machines rename to gone; drop table public.gone cascade;
        create table public.cloud_machines (id uuid primary key, user_id uuid, status text);
        alter table public.cloud_machines enable row level security;
        """,
        "registry",
        "missing",
        "The registered table of machines does not exist any more: writes of machines fail.",
        "select arbiter.register_machines('<the new table>')",
        "select arbiter.register_machines('public.cloud_machines')",
        besides=KEYS,
    ),
    "id renamed": renamed("id", "p_id_column"),
    "user renamed": renamed("user_id", "p_user_column"),
    "status renamed": renamed("status", "p_status_column"),
    "heartbeat renamed": renamed("last_health_check", "p_heartbeat_column"),
    "health renamed": Damage(
        "select arbiter.register_machines('public.cloud_machines', p_health_column => 'region',"
        " p_healthy => '{fra}'); alter table public.cloud_machines rename region to renamed",
        MACHINES,
        "outdated",
        "arbiter: table public.cloud_machines has no column region",
        REGISTER,
        "select arbiter.register_machines('public.cloud_machines', p_health_column => 'renamed',"
        " p_healthy => '{fra}')",
    ),
    "heartbeat not null beside health": Damage(
        "select arbiter.register_machines('public.cloud_machines', p_health_column => 'region',"
        " p_healthy => '{fra}');"
        "alter table public.cloud_machines alter column last_health_check set not null",
        MACHINES,
        "outdated",
        "arbiter: column last_health_check of table public.cloud_machines is not null, and a"
        " machine that has never been well has no heartbeat",
        REGISTER,
        "alter table public.cloud_machines alter column last_health_check drop not null",
    ),
    "id not unique": Damage(
        "alter table public.cloud_machines drop constraint cloud_machines_pkey cascade",
        MACHINES,
        "outdated",
        "arbiter: column id of table public.cloud_machines is not unique",
        REGISTER,
        "alter table public.cloud_machines add primary key (id);"
        "select arbiter.protect('public.signals');"
        "select arbiter.protect('public.positions', p_verbs => '{insert,update}')",
        besides=KEYS,
    ),
    "heartbeat indexed": Damage(
        "create index hot on public.cloud_machines (last_health_check)",
        "index public.hot",
        "foreign",
        "While it reads last_health_check no heartbeat is a HOT update.",
        "drop index concurrently public.hot",
    ),
    "path renamed": Damage(
        "alter table public.signals rename trader_id to whose",
        SIGNALS,
        "outdated",
        "arbiter: column trader_id of table public.signals is not a foreign key of one column",
        PROTECT_SIGNALS.replace("trader_id", "whose"),
    ),
    "user of the path renamed": Damage(
        "alter table public.traders rename user_id to owner_id",
        SIGNALS,
        "outdated",
        "arbiter: table public.traders has no column user_id",
        PROTECT,
        "select arbiter.protect('public.signals', 'trader_id.owner_id')",
    ),
    "source renamed": Damage(
        "alter table public.signals rename source to origin",
        SIGNALS,
        "outdated",
        "arbiter: table public.signals has no column source",
        "If it was renamed, rename it to source again; if it was dropped: " + PROTECT_SIGNALS,
        "alter table public.signals rename origin to source",
    ),
    "machine renamed": Damage(
        "alter table public.signals rename machine_id to fly_id",
        SIGNALS,
        "outdated",
        "arbiter: table public.signals has no column machine_id",
        PROTECT_SIGNALS.replace("machine_id", "fly_id"),
    ),
    "evidence renamed": Damage(
        "alter table public.signals rename arbiter_xid to xid",
        SIGNALS,
        "outdated",
        "arbiter: table public.signals has no column arbiter_xid",
        "If it was renamed, rename it to arbiter_xid again; if it was dropped: " + PROTECT_SIGNALS,
        "alter table public.signals rename xid to arbiter_xid",
    ),
    "path of another key": Damage(
        """
        create table public.owners (id uuid primary key, user_id uuid);
        alter table public.signals drop constraint signals_trader_id_fkey,
          add constraint signals_trader_id_fkey
          foreign key (trader_id) references public.owners (id);
        """,
        SIGNALS,
        "outdated",
        PATH_LEADS_ELSEWHERE,
        PROTECT_SIGNALS,
    ),
    "path's view dropped": Damage(
        "drop view arbiter._path_1_1",
        SIGNALS,
        "outdated",
        PATH_LEADS_ELSEWHERE,
        PROTECT_SIGNALS,
    ),
    "path's view of another query": Damage(
        "create or replace view arbiter._path_1_1 as"
        " select gen_random_uuid() as key, user_id as value from public.traders;"
        "comment on view arbiter._path_1_1 is 'Mine.'",
        SIGNALS,
        "outdated",
        PATH_LEADS_ELSEWHERE,
        PROTECT_SIGNALS,
    ),
    "guard's function dropped": Damage(
        "drop function arbiter._guard_1() cascade",
        SIGNALS,
        "missing",
        "The function of its guard is gone: every write fails.",
        PROTECT_SIGNALS,
        besides=("trigger arbiter_guard_insert on public.signals",),
    ),
    "index dropped": Damage(
        "drop index public.arbiter_signals_machine_idx",
        "index on public.signals (machine_id)",
        "missing",
        "Deleting a machine reads the whole table.",
        "create index concurrently on public.signals (machine_id) where machine_id is not null",
    ),
    "trigger granted": Damage(
        "grant trigger on public.cloud_machines to service_role",
        "grants of trigger on public.cloud_machines",
        "note",
        "May create triggers there: service_role. One that calls a function of such a role makes"
        " confirm_takeover() fail.",
        "revoke trigger on public.cloud_machines from service_role",
    ),
    "policy dropped": Damage(
        "drop policy arbiter_claim on public.signals",
        "policy arbiter_claim on public.signals",
        "missing",
        CLAIM,
        INSTALL,
    ),
    "policy changed": Damage(
        "alter policy arbiter_registry_insert on public.cloud_machines with check (true)",
        "policy arbiter_registry_insert on public.cloud_machines",
        "outdated",
        ANOTHER,
        INSTALL,
    ),
    "policy of other roles": Damage(
        "alter policy arbiter_own on arbiter.leases to service_role",
        "policy arbiter_own on arbiter.leases",
        "outdated",
        ANOTHER,
        INSTALL,
    ),
    "row security off": Damage(
        "alter table public.positions disable row level security",
        "policy arbiter_claim on public.positions",
        "disabled",
        f"Row security is off: {CLAIM[0].lower()}{CLAIM[1:]}",
        "alter table public.positions enable row level security",
    ),
    "source not validated": Damage(
        UNVALIDATED.format("arbiter_source_check"),
        "alter table public.positions",
        "outdated",
        "A constraint is not validated.",
        "alter table public.positions validate constraint arbiter_source_check",
    ),
    "machine not validated": Damage(
        UNVALIDATED.format("arbiter_machine_id_fkey"),
        "alter table public.positions",
        "outdated",
        "A constraint is not validated.",
        "alter table public.positions validate constraint arbiter_machine_id_fkey",
    ),
    "constraint dropped": Damage(
        "alter table public.positions drop constraint arbiter_source_check",
        "constraint arbiter_source_check of public.positions",
        "missing",
        "It was dropped.",
        PROTECT_POSITIONS,
    ),
    "machine's key dropped": Damage(
        "alter table public.positions drop constraint arbiter_machine_id_fkey",
        "constraint arbiter_machine_id_fkey of public.positions",
        "missing",
        "It was dropped.",
        PROTECT_POSITIONS,
    ),
    "constraint of the app": Damage(
        "alter table public.positions drop constraint arbiter_machine_id_fkey,"
        " add constraint arbiter_machine_id_fkey check (machine_id is null)",
        "constraint arbiter_machine_id_fkey of public.positions",
        "foreign",
        "It was dropped, and the one that has its name now is not arbiter's.",
        "Drop or rename it first, then: " + PROTECT_POSITIONS,
        mend="alter table public.positions drop constraint arbiter_machine_id_fkey;"
        + PROTECT_POSITIONS,
    ),
    "guard without its record": Damage(
        "delete from arbiter.protections where protected_table = 'public.positions'::regclass",
        "table public.positions",
        "foreign",
        "It is guarded, but not in arbiter.protections, for example by a copy of the schema: the"
        " audit does not know it.",
        "Drop its policies whose names begin with arbiter_, then: select"
        " arbiter.protect('public.positions')",
        # Of a copy they are not in arbiter.attachments; here they are arbiter's own.
        mend=PROTECT_POSITIONS,
    ),
    "exposed function dropped": Damage(
        "drop function public.confirm_takeover(text)",
        "function public.confirm_takeover(text)",
        "missing",
        "It was dropped.",
        INSTALL,
    ),
    "registry hidden": hidden("public.cloud_machines"),
    "path hidden": hidden("public.traders"),
    "observed": Damage(
        "select arbiter.protect('public.signals', p_mode => 'observe')",
        "mode of public.signals",
        "note",
        "The table is observed: nothing is rejected.",
        PROTECT_SIGNALS,
    ),
    "history's trigger dropped": Damage(
        "drop trigger arbiter_append_only_truncate on arbiter.handovers",
        "trigger arbiter_append_only_truncate on arbiter.handovers",
        "missing",
        UNARBITRATED,
        INSTALL,
    ),
}
GENERATED = """
select p.proname from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace
   and p.proname ~ '^(_(guard|guard_row|provenance)_[0-9]+|tg_registry_[a-z]+)$'
"""


def assert_found(conn: Conn, damage: Damage) -> None:
    found = ill(conn)
    assert found[damage.object] == (damage.state, damage.problem, damage.remedy)
    assert {o for o in found if not is_consequence(o, damage)} == {damage.object, *damage.besides}


@pytest.mark.parametrize("name", [n for n in DAMAGES if DAMAGES[n].remedy != INSTALL])
def test_a_damage_has_one_row_and_is_mended(shared: Conn, name: str) -> None:
    damage = DAMAGES[name]
    with shared.transaction(force_rollback=True):
        shared.execute(damage.ddl.encode())
        assert_found(shared, damage)
        # What is built concurrently is so in the next test: here a transaction is open.
        shared.execute((damage.mend or damage.remedy.replace(" concurrently", "")).encode())
        for (statement,) in rows(shared, "select * from arbiter._finish_statements()"):
            shared.execute(statement.encode())
        assert ill(shared) == {}


def test_what_an_installation_mends(db: Database) -> None:
    """And indexes are built and dropped without a lock that writers wait for."""
    prepare(db)
    owner = db.connect()
    by_install = [damage for damage in DAMAGES.values() if damage.remedy == INSTALL]
    concurrent = [damage for damage in DAMAGES.values() if " concurrently " in damage.remedy]
    assert (len(by_install), len(concurrent)) == (5, 2)
    for damage in by_install:
        with owner.transaction(force_rollback=True):
            owner.execute(damage.ddl.encode())
            assert_found(owner, damage)
    for damage in by_install + concurrent:
        owner.execute(damage.ddl.encode())
    assert set(ill(owner)) == {damage.object for damage in by_install + concurrent}
    for damage in concurrent:
        owner.execute(damage.remedy.encode())
    arbiter_db.install(db.conninfo())
    assert ill(owner) == {}


def is_consequence(found: str, damage: Damage) -> bool:
    """Triggers and policies whose definition names what has changed."""
    return (
        damage.object in (MACHINES, SIGNALS, "registry")
        and found.startswith(("trigger ", "policy "))
        and found not in damage.besides
    )


def test_a_partition_that_was_detached(shared: Conn) -> None:
    """What was attached to it, and not to the whole table, stays."""
    with shared.transaction(force_rollback=True):
        shared.execute("alter table public.ticks detach partition public.ticks_a")
        found = ill(shared)
        assert found == {
            f"trigger {name} on public.ticks_a": (
                "outdated",
                "The table is not part of public.ticks any more, and is guarded in part only.",
                f"drop trigger {name} on public.ticks_a",
            )
            for name in ("arbiter_guard_insert", "arbiter_guard_update")
        }
        for _, _, remedy in found.values():
            shared.execute(remedy.encode())
        assert ill(shared) == {}
        shared.execute("alter table public.ticks attach partition public.ticks_a"
                       " for values from (0) to (10)")  # fmt: skip
        assert set(ill(shared)) == {f"trigger {name} on public.ticks_a" for name in
                                    ("arbiter_guard_insert", "arbiter_guard_update")}  # fmt: skip


def test_a_detached_partition_may_be_protected_by_itself(shared: Conn) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute("alter table public.ticks detach partition public.ticks_a")
        shared.execute("select arbiter.protect('public.ticks_a', p_verbs => '{insert,update}')")
        for (statement,) in rows(shared, "select * from arbiter._finish_statements()"):
            shared.execute(statement.encode())
        assert ill(shared) == {}


def test_a_table_of_a_superuser_hides_rows_without_being_forced_to(db: Database) -> None:
    prepare(db)
    owner = db.connect()
    with db.connect("postgres") as superuser:
        superuser.execute("alter table public.traders owner to postgres")
        superuser.execute("grant select on public.traders to app_owner")
        superuser.execute("alter table public.traders disable row level security")
        assert ill(owner) == {}
        superuser.execute("alter table public.traders enable row level security")
        found = ill(owner)
        remedy = "alter table public.traders owner to app_owner"
        assert found["row security of public.traders"][2] == remedy
        with superuser.transaction(force_rollback=True):  # the role is that of other tests, too
            superuser.execute("alter role app_owner bypassrls")
            assert ill(superuser) == {}
        assert set(ill(owner)) == {"row security of public.traders"}
        superuser.execute(remedy.encode())
        assert ill(owner) == {}


def test_a_generated_function_that_was_changed(db: Database) -> None:
    prepare(db)
    owner = db.connect()
    names = [name for (name,) in rows(owner, GENERATED)]
    assert len(names) >= 12
    for name in names:
        owner.execute(f"alter function arbiter.{name}() set work_mem = '1 MB'".encode())
    assert ill(owner) == {
        f"generated function arbiter.{name}": (
            "outdated",
            "Its body is not the one that arbiter generated.",
            INSTALL,
        )
        for name in names
    }
    arbiter_db.install(db.conninfo())
    assert ill(owner) == {}


def test_row_security_is_no_matter_where_browsers_have_no_rights(shared: Conn) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute("alter table public.positions disable row level security")
        shared.execute("revoke insert, update on public.positions from authenticated")
        assert ill(shared) == {}
        shared.execute("grant update (symbol) on public.positions to anon")
        assert set(ill(shared)) == {"policy arbiter_claim on public.positions"}


def test_a_table_without_evidence_needs_no_column_for_it(shared: Conn) -> None:
    with shared.transaction(force_rollback=True):
        shared.execute("select arbiter.protect('public.signals', p_evidence => false)")
        shared.execute("alter table public.signals drop column arbiter_xid")
        assert ill(shared) == {}


def test_a_table_with_arbiters_columns_and_no_guard_is_noted(shared: Conn) -> None:
    """Until it is protected again, or its columns are gone."""
    noted = "select object, state, problem, remedy from arbiter.doctor() where object ~ '^table '"
    with shared.transaction(force_rollback=True):
        assert rows(shared, noted) == []
        shared.execute("select arbiter.unprotect('public.signals')")
        [(*said, remedy)] = rows(shared, noted)
        problem = "It has columns of arbiter and is not protected."
        assert said == ["table public.signals", "note", problem]
        shared.execute(remedy.encode())
        assert rows(shared, noted) == []
        shared.execute("select arbiter.unprotect('public.signals')")
        shared.execute("alter table public.signals drop source, drop arbiter_xid")
        assert rows(shared, noted) == []
