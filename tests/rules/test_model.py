"""Arbiter against its model (model.py): random operations, every answer and every row compared.

A machine run uses users of its own in one shared database. Time passes only by ageing: whole
minutes, as all periods of the settings are, so that the milliseconds that really pass never carry
an instant over a boundary. Beside the session that does everything there is a second one, which
may hold a transaction open: then drains and WX007 appear.

``HYPOTHESIS_PROFILE=prove`` plays the long version with new random choices; pytest's
``--hypothesis-seed`` repeats one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import hypothesis
import hypothesis.strategies as st
import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from model import (
    FORGED,
    NOBODY,
    SQLSTATES,
    STATES,
    Change,
    Lease,
    Machine,
    Note,
    Protection,
    Rejected,
    Row,
    Settings,
    Tx,
    World,
    audit,
    beat,
    commit,
    confirm,
    insert,
    judge,
    machines_of,
    may_show,
    pass_time,
    put_machine,
    register,
    source_of,
    stamp,
    status,
    update,
)
from psycopg import IsolationLevel, sql
from psycopg.rows import namedtuple_row
from story import as_detail, detail_of, rows, value

if TYPE_CHECKING:
    from conftest import Database, Templates

Conn = psycopg.Connection[Any]

COMMON = hypothesis.settings(
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
PROFILES = {
    "test": hypothesis.settings(COMMON, derandomize=True, max_examples=25, stateful_step_count=40),
    "prove": hypothesis.settings(COMMON, max_examples=2000, stateful_step_count=60),
}
PROFILE = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "test")]

MINUTE = timedelta(minutes=1)
DEFAULTS = Settings(3 * MINUTE, 3 * MINUTE, 5 * MINUTE, error_takeover_confirm=True)

#: signals lead to their user over the trader, and to their machine by a foreign key
SIGNALS = "public.signals"
#: positions name their user, and their machine without a key
POSITIONS = "public.positions"
PROTECTIONS = {
    SIGNALS: Protection(unowned="allow"),
    POSITIONS: Protection(verbs=("insert", "update")),
}

INSERT = {
    SIGNALS: sql.SQL(
        "insert into public.signals (id, trader_id, symbol, interval, signal, price, bar_time,"
        " source, machine_id{more})"
        " select r.id, r.owner, 'BTCUSDT', '1m', 'buy', r.key,"
        " timestamptz '2026-01-01' + r.key * interval '1 minute', r.source, r.machine{values}"
        " from unnest(%s::uuid[], %s::uuid[], %s::int[], %s::text[], %s::uuid[], %s::bool[])"
        " as r (id, owner, key, source, machine, forged)"
    ),
    POSITIONS: sql.SQL(
        "insert into public.positions (id, user_id, symbol, quantity, source, machine_id{more})"
        " select r.id, r.owner, r.key::text, r.key, r.source, r.machine{values}"
        " from unnest(%s::uuid[], %s::uuid[], %s::int[], %s::text[], %s::uuid[], %s::bool[])"
        " as r (id, owner, key, source, machine, forged)"
    ),
}
FORGERY = sql.SQL(", case when r.forged then xid8 '3' else pg_current_xact_id() end")
COPY = {
    SIGNALS: (
        "copy public.signals (id, trader_id, symbol, interval, signal, price, bar_time, source,"
        " machine_id) from stdin"
    ),
    POSITIONS: (
        "copy public.positions (id, user_id, symbol, quantity, source, machine_id) from stdin"
    ),
}
OWNER_COLUMN = {SIGNALS: "trader_id", POSITIONS: "user_id"}
OTHER_COLUMN = {SIGNALS: "symbol", POSITIONS: "entry_price"}

WORDS = ["provisioning", "running", "stopping", "stopped", "error", "error", "hibernating"]

#: Everything that is compared after each step.
LOOK = {
    "machines": "select id, user_id, status, last_health_check from public.cloud_machines",
    "notes": "select * from arbiter.machine_notes where user_id = any (%(users)s)",
    "leases": (
        "select user_id, holder, machine_id, epoch, draining_since is not null as draining,"
        " draining_to from arbiter.leases where user_id = any (%(users)s)"
    ),
    "handovers": (
        "select user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason"
        " from arbiter.handovers where user_id = any (%(users)s) order by user_id, epoch"
    ),
    "rows": (
        "select 'public.signals' as table_name, s.id, t.user_id, s.source, s.machine_id"
        " from public.signals s join public.traders t on t.id = s.trader_id"
        " union all"
        " select 'public.positions', p.id, p.user_id, p.source, p.machine_id"
        " from public.positions p"
    ),
    "observations": "select code from arbiter.observations where observation_id > %(first)s",
    # After what is stamped, before what depends on the time.
    "clock": "select clock_timestamp() as now",
    "verdicts": (
        "select u.id as user_id, w.machine_id, v.code, v.retry_at, v.takeover"
        " from unnest(%(users)s::text[]) as u (id)"
        " cross join arbiter.settings s"
        " left join arbiter.leases l on l.user_id = u.id"
        " cross join unnest(array_append(%(machines)s::text[], null)) as w (machine_id)"
        " cross join lateral arbiter._verdict("
        "   case when w.machine_id is null then 'local' else 'cloud' end, w.machine_id, l,"
        "   arbiter._machine(u.id, l.claimant), s, clock_timestamp()) as v"
    ),
    "status": (
        "select u.id as user_id, s.* from unnest(%(users)s::text[]) as u (id)"
        " cross join lateral arbiter.status(u.id) as s"
    ),
}


class Stage:
    """The database that all runs share, and its two sessions."""

    def __init__(self, db: Database) -> None:
        self.db = db
        options = "-c lock_timeout=5s -c statement_timeout=20s"
        self.conn = db.connect(options=options)
        self.held = db.connect(options=options)
        self.runs = 0
        self.answers: Counter[str | None] = Counter()
        # Allows machines without a user, several for one user, and unknown status words.
        self.conn.execute(
            "alter table public.cloud_machines"
            " alter column user_id drop not null,"
            " drop constraint cloud_machines_user_id_key,"
            " drop constraint cloud_machines_status_check"
        )
        self.conn.execute("alter table public.positions add column machine_id uuid")
        self.conn.execute("update arbiter.settings set drain_timeout = '100 ms'")

    def reset(self) -> None:
        """Begin anew. Users of earlier runs stay, but no operation uses them."""
        self.runs += 1
        self.held.rollback()
        self.conn.execute("delete from public.signals")
        self.conn.execute("delete from public.positions")
        self.conn.execute("delete from public.cloud_machines")
        self.register(STATES)
        self.set(DEFAULTS)
        for table, protection in PROTECTIONS.items():
            self.protect(table, protection)

    def set(self, settings: Settings) -> None:
        """Change the settings."""
        self.conn.execute(
            "update arbiter.settings set heartbeat_timeout = %s, stop_grace = %s,"
            " error_takeover_delay = %s, error_takeover_confirm = %s",
            (
                settings.heartbeat_timeout,
                settings.stop_grace,
                settings.error_takeover_delay,
                settings.error_takeover_confirm,
            ),
        )

    def register(self, states: Mapping[str, str]) -> None:
        """Give the registry's words that meaning."""
        self.conn.execute(
            "select arbiter.register_machines('public.cloud_machines', p_states => %s)",
            (psycopg.types.json.Jsonb(states),),
        )

    def protect(self, table: str, protection: Protection) -> None:
        """Protect the table in that way."""
        self.conn.execute(
            "select arbiter.protect(%s::regclass, p_verbs => %s, p_mode => %s, p_unowned => %s)",
            (table, list(protection.verbs), protection.mode, protection.unowned),
        )


# The random choices. Indexes mean one of what there is, counted round.
someone = st.integers(0, 1)
some_settings = st.builds(
    Settings,
    st.sampled_from([2 * MINUTE, 3 * MINUTE, 6 * MINUTE]),
    st.sampled_from([2 * MINUTE, 3 * MINUTE, 6 * MINUTE]),
    st.sampled_from([3 * MINUTE, 5 * MINUTE, 8 * MINUTE]),
    st.booleans(),
)
some_states: st.SearchStrategy[Mapping[str, str]] = st.sampled_from(
    [
        STATES,
        {**STATES, "hibernating": "stopped"},
        {**STATES, "stopping": "running", "error": "running"},
    ]
)
#: below zero: the machine that the lease of a user is for
some_machine = st.integers(-2, 2)
tables = st.sampled_from([SIGNALS, SIGNALS, POSITIONS])
UNKNOWN = 99
sometimes = st.sampled_from([False, False, False, True])
isolations = st.sampled_from([IsolationLevel.READ_COMMITTED] * 3 + [IsolationLevel.REPEATABLE_READ])


#: What may happen next: how often compared with others, and what is chosen for it.
ACTIONS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "add_machine": (
        1,
        {
            "user": someone,
            "word": st.sampled_from(WORDS),
            "beats": st.booleans(),
            "back": st.booleans(),
        },
    ),
    "live": (
        3,
        {
            "user": someone,
            "beats": st.integers(0, 1),
            "words": st.lists(st.sampled_from(WORDS), max_size=2),
            "minutes": st.sampled_from([0, 0, 3, 8, -8]),
            "held": sometimes,
            "then": st.sampled_from([None, "confirm", "local", "cloud", "hold"]),
        },
    ),
    "fail": (
        2,
        {"user": someone, "held": sometimes, "late": st.booleans(), "recovers": st.booleans()},
    ),
    "recover": (1, {"user": someone, "beats": st.booleans()}),
    "change_machine": (
        2,
        {
            "machine": some_machine,
            "word": st.one_of(st.none(), st.sampled_from(WORDS)),
            "beats": st.booleans(),
            "user": st.sampled_from([None, None, None, None, None, 0, 1, "nobody"]),
            "undo": sometimes,
        },
    ),
    "beat": (
        2,
        {
            "machines": st.lists(some_machine, min_size=1, max_size=4),
            "how": st.sampled_from(["function", "update", "update", "unknown"]),
        },
    ),
    "delete_machine": (1, {"machine": some_machine}),
    "confirm": (1, {"user": someone}),
    "pass_time": (2, {"minutes": st.sampled_from([1, 1, 2, 3, 3, 5, -1, -4])}),
    "write_local": (
        3,
        {
            "table": tables,
            "user": st.one_of(someone, someone, st.none()),
            "size": st.integers(1, 3),
            "how": st.sampled_from(["insert", "insert", "copy", "held"]),
            "isolation": isolations,
            "undo": sometimes,
            "forged": st.sampled_from([False] * 7 + [True]),
        },
    ),
    "hold": (2, {"table": tables, "user": someone}),
    "write_cloud": (
        3,
        {
            "table": tables,
            "user": st.one_of(st.none(), st.none(), st.none(), someone),
            "machine": some_machine,
            "size": st.integers(1, 3),
            "how": st.sampled_from(["insert", "insert", "copy", "held"]),
            "isolation": isolations,
            "undo": sometimes,
        },
    ),
    "write_mixed": (
        2,
        {
            "table": tables,
            "claims": st.lists(
                st.tuples(
                    st.sampled_from([0, 1, None]),
                    st.sampled_from(["local", "cloud"]),
                    st.one_of(st.none(), some_machine, st.just(UNKNOWN)),
                    st.sampled_from([False, False, False, False, True]),
                ),
                min_size=1,
                max_size=4,
            ),
            "how": st.sampled_from(["insert", "insert", "held"]),
        },
    ),
    "end": (2, {"keep": st.sampled_from([True, True, False])}),
    "update_row": (
        2,
        {
            "row": st.integers(0, 9),
            "what": st.sampled_from(["other", "claim", "forget", "user", "xid"]),
            "cloud": st.booleans(),
            "user": someone,
        },
    ),
    "update_all": (1, {"table": tables, "user": someone}),
    "protect": (
        1,
        {
            "table": tables,
            "protection": st.one_of(
                st.none(),
                st.builds(
                    Protection,
                    st.sampled_from([("insert",), ("insert", "update")]),
                    st.sampled_from(["enforce", "enforce", "observe"]),
                    st.sampled_from(["allow", "reject"]),
                ),
            ),
        },
    ),
    "change_settings": (1, {"settings": some_settings}),
    "register": (1, {"states": some_states}),
    "spoil": (
        1,
        {
            "change": st.sampled_from(
                [
                    ("check_violation", "update arbiter.settings set stop_grace = '50 ms'"),
                    ("check_violation", "update arbiter.settings set heartbeat_timeout = '11 s'"),
                    ("append_only", "update arbiter.handovers set to_holder = 'local'"),
                    ("append_only", "delete from arbiter.handovers"),
                    ("append_only", "truncate arbiter.handovers"),
                ]
            )
        },
    ),
    "audit": (1, {"table": tables}),
}

an_action = st.one_of(
    [
        st.tuples(st.just(name), st.fixed_dictionaries(choices))
        for name, (weight, choices) in ACTIONS.items()
        for _ in range(weight)
    ]
)


class Arbiter(RuleBasedStateMachine):
    """Random operations of users, machines and DBAs."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.conn, self.held = stage.conn, stage.held
        stage.reset()
        self.users: list[str] = []
        self.traders: dict[str | None, str] = {}
        self.machines: list[str] = []
        self.names = 0
        self.open: Tx | None = None
        #: whether the open transaction has locked something in a savepoint that it released
        self.nameless = False
        #: whether the last step ended as the model had said
        self.agrees = True
        self.first_observation = value(
            self.conn, "select coalesce(max(observation_id), 0) from arbiter.observations"
        )
        self.world = World(DEFAULTS, dict(PROTECTIONS), frozenset({SIGNALS}))
        self.now: datetime = value(self.conn, "select clock_timestamp()")
        self.look()

    @property
    def rival(self) -> Tx:
        """The transaction that is in the way of the first session."""
        return self.open or NOBODY

    def name(self) -> str:
        """An id that no other run uses, greater than all before."""
        self.names += 1
        return str(UUID(int=(self.stage.runs << 64) | self.names))

    # One rule for all: hypothesis leaves out many of several rules in each run, and few get far.
    @rule(action=an_action)
    def act(self, action: tuple[str, dict[str, Any]]) -> None:
        """Do one of the things below, if there is anything to do it with."""
        name, choices = action
        possible = {
            "change_machine": self.world.machines,
            "beat": self.world.machines,
            "end": self.open,
            "update_row": self.world.rows,
            # Their locks would wait for the open transaction's.
            "protect": self.open is None,
            "register": self.open is None,
            "spoil": self.open is None and self.world.handovers,
        }
        if possible.get(name, True):
            getattr(self, name)(**choices)

    # People and machines -------------------------------------------------------------------------

    @initialize(active=st.booleans(), observed=sometimes)
    def start(self, active: bool, observed: bool) -> None:
        """Two users, and a trader without a user."""
        self.add_trader(None)
        for _ in range(2):
            user = self.name()
            self.conn.execute(
                "insert into auth.users (id, email) values (%s, %s)", (user, str(user))
            )
            self.users.append(user)
            self.add_trader(user)
        self.look()
        if observed:
            self.protect(SIGNALS, Protection(mode="observe"))
        if active:
            self.live(0, beats=1, words=[], minutes=0, held=False, then=None)

    def add_trader(self, user: str | None) -> None:
        self.traders[user] = self.name()
        self.conn.execute(
            "insert into public.traders (id, user_id, name, is_builtin) values (%s, %s, 'T', %s)",
            (self.traders[user], user, user is None),
        )

    def add_machine(self, user: int, word: str, beats: bool, back: bool) -> None:
        gone = [name for name in self.machines if name not in self.world.machines]
        if back and gone:
            name = gone[0]
        else:
            name = self.name()
            self.machines.append(name)
        owner = self.user(user)
        self.step(
            lambda: put_machine(
                self.world,
                self.rival,
                name,
                lambda old: Machine(owner, word, self.now if beats else None),
                self.now,
            ),
            lambda: self.conn.execute(
                "insert into public.cloud_machines"
                " (id, user_id, machine_id, status, last_health_check)"
                " values (%s, %s, %s, %s, %s)",
                (name, owner, str(name), word, datetime.max if beats else None),
            ),
        )

    def live(
        self, user: int, beats: int, words: list[str], minutes: int, held: bool, then: str | None
    ) -> None:
        """The usual course: a machine gets the lease, and then something else happens."""
        claimant = -1 - user
        owner = self.user(user)
        if held:
            self.hold(SIGNALS, user)
        if self.world.leases.get(owner, Lease()).claimant is None:
            mine = machines_of(self.world, owner)
            if mine:
                self.change_machine(self.index(mine[0]), "running", beats=True)
            else:
                self.add_machine(user, "running", True, False)
        if beats:
            self.beat([claimant], "update")
        for word in words:
            self.change_machine(claimant, word)
        if minutes:
            self.pass_time(minutes)
        if then == "confirm":
            self.confirm(user)
        elif then == "hold":
            self.hold(SIGNALS, user)
        elif then == "local":
            self.insert(SIGNALS, [Row(SIGNALS, owner, "local", None)])
        elif then == "cloud":
            machine = self.world.leases.get(owner, Lease()).claimant
            self.insert(SIGNALS, [Row(SIGNALS, owner, "cloud", machine)])

    def fail(self, user: int, held: bool, late: bool, recovers: bool) -> None:
        """A machine fails and its user says yes; in time or too early, and perhaps in vain."""
        self.live(user, 1, ["error"], minutes=8 if late else 0, held=held, then="confirm")
        if recovers:
            self.recover(user, beats=True)

    def recover(self, user: int, beats: bool) -> None:
        """The machine that holds runs, also while the lease drains to another."""
        lease = self.world.leases.get(self.user(user), Lease())
        if lease.machine and lease.machine in self.world.machines:
            self.change_machine(self.index(lease.machine), "running", beats)

    def change_machine(
        self,
        machine: int,
        word: str | None = None,
        beats: bool = False,
        user: int | Literal["nobody"] | None = None,
        undo: bool = False,
    ) -> None:
        """One update of its row; of another column when there is nothing else."""
        name = self.machine(machine)
        if name not in self.world.machines:
            return
        owner = self.user(user) if isinstance(user, int) else None
        assignments: list[sql.Composable] = [sql.SQL("region = 'ams'")]
        if word is not None:
            assignments.append(sql.SQL("status = {}").format(word))
        if beats:
            assignments.append(sql.SQL("last_health_check = '2000-01-01'"))
        if user is not None:
            assignments.append(sql.SQL("user_id = {}").format(owner))

        def change(old: Machine | None) -> Machine:
            assert old is not None
            return Machine(
                old.user if user is None else owner,
                word or old.word,
                stamp(self.world, name, self.now) if beats else old.heartbeat,
            )

        def run() -> None:
            with self.conn.transaction(force_rollback=undo):
                self.conn.execute(
                    sql.SQL("update public.cloud_machines set {} where id = {}").format(
                        sql.SQL(", ").join(assignments), name
                    )
                )

        self.step(
            lambda: (
                self.world if undo else put_machine(self.world, self.rival, name, change, self.now)
            ),
            run,
        )

    def beat(self, machines: list[int], how: str) -> None:
        names = sorted({self.machine(machine) for machine in machines})
        if how == "unknown":
            names.append(self.name())
        known = all(name in self.world.machines for name in names)

        def run() -> None:
            if how == "update" and known:
                self.conn.execute(
                    "update public.cloud_machines set last_health_check = 'infinity'"
                    " where id = any (%s)",
                    (names,),
                )
            elif len(names) == 1:
                self.conn.execute("select arbiter.heartbeat(%s)", (names[0],))
            else:
                self.conn.execute("select arbiter.heartbeats(%s)", (names,))

        self.step(lambda: beat(self.world, self.rival, names, self.now), run)

    def delete_machine(self, machine: int) -> None:
        name = self.machine(machine)
        if name not in self.world.machines or any(
            row.machine == name for row in self.rival.rows.values()
        ):
            return  # their foreign key would wait
        signals = self.world.protections.get(SIGNALS)
        if (
            signals
            and signals.updates
            and any(
                (row.table, row.source, row.machine) == (SIGNALS, "local", name)
                for row in self.world.rows.values()
            )
        ):
            return  # what the foreign key does to such a row counts as a local write
        self.step(
            lambda: put_machine(self.world, self.rival, name, lambda old: None, self.now),
            lambda: self.conn.execute("delete from public.cloud_machines where id = %s", (name,)),
        )

    def confirm(self, user: int) -> None:
        """The user's yes, most likely of one who is asked."""
        asked = [
            owner
            for owner in self.users
            if judge(self.world, owner, None, self.now).code == "takeover_unconfirmed"
        ]
        owner = asked[user % len(asked)] if asked else self.user(user)
        self.step(
            lambda: confirm(self.world, self.rival, owner, self.now),
            lambda: self.conn.execute("select arbiter.confirm_takeover(%s)", (owner,)),
        )

    def pass_time(self, minutes: int) -> None:
        """Everything becomes that much older; younger when the clock was set back."""
        by = minutes * MINUTE

        def run() -> None:
            # Past the stamp, which believes no client's heartbeat.
            with self.conn.transaction():
                self.conn.execute(
                    "alter table public.cloud_machines"
                    ' disable trigger "~arbiter_stamp_update",'
                    " disable trigger arbiter_activate_update"
                )
                self.conn.execute(
                    "update public.cloud_machines set last_health_check = last_health_check - %s",
                    (by,),
                )
                self.conn.execute(
                    "alter table public.cloud_machines"
                    ' enable always trigger "~arbiter_stamp_update",'
                    " enable always trigger arbiter_activate_update"
                )
                self.conn.execute(
                    "update arbiter.machine_notes set left_running_at = left_running_at - %(by)s,"
                    " entered_error_at = entered_error_at - %(by)s"
                    " where user_id = any (%(users)s)",
                    {"by": by, "users": self.users},
                )

        self.step(lambda: pass_time(self.world, by), run)

    # Writes --------------------------------------------------------------------------------------

    def write_local(
        self,
        table: str,
        user: int | None,
        size: int,
        how: str,
        isolation: IsolationLevel,
        undo: bool,
        forged: bool,
    ) -> None:
        """As a user's browser; without a user as the backend that runs built-in traders."""
        owner = None if user is None and table == SIGNALS else self.user(user or 0)
        row = Row(table, owner, "local", None)
        if forged and table in self.world.protections and how != "copy":
            row = replace(row, written=FORGED)
        self.insert(table, [row] * size, how, isolation, undo)

    def hold(self, table: str, user: int) -> None:
        """The environment that may write does, and leaves the transaction open."""
        owner = self.user(user)
        lease = self.world.leases.get(owner, Lease())
        row = Row(table, owner, source_of(lease.claimant), lease.claimant)
        self.insert(table, [row], "held")

    def write_cloud(
        self,
        table: str,
        user: int | None,
        machine: int,
        size: int,
        how: str,
        isolation: IsolationLevel,
        undo: bool,
    ) -> None:
        """As any machine, for its own user or for any."""
        name = self.machine(machine)
        known = self.world.machines.get(name)
        owner = self.user(user or 0)
        if user is None and known and known.user:
            owner = known.user
        self.insert(table, [Row(table, owner, "cloud", name)] * size, how, isolation, undo)

    def write_mixed(
        self, table: str, claims: list[tuple[int | None, str, int | None, bool]], how: str
    ) -> None:
        """Several users, environments and mistakes in one statement."""
        written = []
        for user, source, machine, forged in claims:
            owner = None if user is None and table == SIGNALS else self.user(user or 0)
            name = None
            if machine is not None:
                name = self.name() if machine == UNKNOWN else self.machine(machine)
            row = Row(table, owner, source, name)
            if forged and table in self.world.protections:
                row = replace(row, written=FORGED)
            written.append(row)
        self.insert(table, written, how)

    def end(self, keep: bool) -> None:
        """The open transaction ends."""
        tx = self.rival

        def run() -> None:
            if keep:
                self.held.commit()
            else:
                self.held.rollback()

        self.open, self.nameless = None, False
        self.step(lambda: commit(self.world, tx, self.now) if keep else self.world, run)

    def update_row(self, row: int, what: str, cloud: bool, user: int) -> None:
        """Another column, or who wrote it, or whose it is."""
        key = sorted(self.world.rows)[row % len(self.world.rows)]
        old = self.world.rows[key]
        change = Change()
        assignment: sql.Composable = sql.SQL("{} = '1'").format(
            sql.Identifier(OTHER_COLUMN[old.table])
        )
        if what == "user":
            owner = self.user(user)
            change = Change(user=owner)
            assignment = sql.SQL("{} = {}").format(
                sql.Identifier(OWNER_COLUMN[old.table]), self.owner_key(old.table, owner)
            )
        elif what == "xid":
            if old.table not in self.world.protections:
                return
            change = Change(forges=True)
            assignment = sql.SQL("arbiter_xid = '3'")
        elif what != "other":
            lease = self.world.leases.get(old.user) if old.user else None
            machine = lease.claimant if what == "claim" and cloud and lease else None
            source = "cloud" if what == "forget" else source_of(machine)
            change = Change(claims=True, source=source, machine=machine)
            assignment = sql.SQL("source = {}, machine_id = {}").format(source, machine)
        self.update(old.table, [key], change, assignment)

    def update_all(self, table: str, user: int) -> None:
        """Another column of all rows of a user that name a machine, or are local."""
        owner = self.user(user)
        keys = [
            key
            for key, row in self.world.rows.items()
            if (row.table, row.user) == (table, owner) and (row.source == "local" or row.machine)
        ]
        if keys:
            column = sql.Identifier(OTHER_COLUMN[table])
            self.update(table, keys, Change(), sql.SQL("{} = '1'").format(column))

    def update(
        self, table: str, keys: list[int], change: Change, assignment: sql.Composable
    ) -> None:
        query = sql.SQL("update {} set {} where id = any ({})").format(
            sql.Identifier(*table.split(".")), assignment, [self.row_id(key) for key in keys]
        )
        self.step(
            lambda: commit(
                self.world,
                update(self.world, Tx(self.now), self.rival, keys, change, self.now),
                self.now,
            ),
            lambda: self.conn.execute(query),
        )

    def insert(
        self,
        table: str,
        written: list[Row],
        how: str = "insert",
        isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
        undo: bool = False,
    ) -> None:
        """Insert rows in one statement; ``held``: in the transaction that is kept open."""
        new = {}
        for row in written:
            self.names += 1
            new[self.names] = row
        if how == "held":
            self.insert_held(table, new, undo)
            return

        def run() -> None:
            self.conn.isolation_level = isolation
            try:
                with self.conn.transaction(force_rollback=undo):
                    self.send(self.conn, table, new, by_copy=how == "copy")
            finally:
                self.conn.isolation_level = None

        def expect() -> World:
            tx = Tx(self.now, exact=isolation == IsolationLevel.READ_COMMITTED)
            tx = insert(self.world, tx, self.rival, table, new, self.now)
            return self.world if undo else commit(self.world, tx, self.now)

        user = written[0].user
        said = self.said[user].can_write_local if user else None
        rejection = self.step(expect, run)
        protection = self.world.protections.get(table)
        enforced = protection is not None and protection.mode == "enforce"
        local = Row(table, user, "local", None)
        if enforced and user and not self.open and all(row == local for row in written):
            assert said == (rejection is None)

    def insert_held(self, table: str, new: dict[int, Row], undo: bool) -> None:
        if self.open is None:
            self.held.execute("begin")
            self.open = Tx(self.now)
        tx = self.open
        rejected = False

        def expect() -> World:
            nonlocal rejected
            rejected = True
            after = insert(self.world, tx, NOBODY, table, new, self.now)
            rejected = False
            self.open = tx if undo else after
            return self.world

        def run() -> None:
            if undo or rejected or len(new) > 1:
                with self.held.transaction(force_rollback=undo):
                    self.send(self.held, table, new, by_copy=False)
                self.nameless |= not undo
            else:
                self.send(self.held, table, new, by_copy=False)
            # Where it observes, arbiter itself makes one.
            protection = self.world.protections.get(table)
            self.nameless |= protection is not None and protection.mode == "observe"

        self.step(expect, run, self.held)

    def send(self, conn: Conn, table: str, new: dict[int, Row], *, by_copy: bool) -> None:
        if by_copy:
            with conn.cursor() as cur, cur.copy(COPY[table].encode()) as copy:
                for key, row in new.items():
                    start = (self.row_id(key), self.owner_key(table, row.user))
                    middle: tuple[Any, ...] = (str(key), key)
                    if table == SIGNALS:
                        bar = datetime(2026, 1, 1) + key * MINUTE
                        middle = ("BTCUSDT", "1m", "buy", key, bar)
                    copy.write_row((*start, *middle, row.source, row.machine))
            return
        forged = [row.written == FORGED for row in new.values()]
        more = sql.SQL(", arbiter_xid" if any(forged) else "")
        values = FORGERY if any(forged) else sql.SQL("")
        conn.execute(
            INSERT[table].format(more=more, values=values),
            (
                [self.row_id(key) for key in new],
                [self.owner_key(table, row.user) for row in new.values()],
                list(new),
                [row.source for row in new.values()],
                [row.machine for row in new.values()],
                forged,
            ),
        )

    # Administration ------------------------------------------------------------------------------

    def protect(self, table: str, protection: Protection | None) -> None:
        """Protect a table, or protect it no more."""
        others = {name: p for name, p in self.world.protections.items() if name != table}

        def expect() -> World:
            if protection:
                return replace(self.world, protections={**others, table: protection})
            if table not in self.world.protections:
                raise Rejected("not_protected")
            return replace(self.world, protections=others)

        def run() -> None:
            if protection:
                self.stage.protect(table, protection)
            else:
                self.conn.execute("select arbiter.unprotect(%s::regclass)", (table,))

        self.step(expect, run)

    def change_settings(self, settings: Settings) -> None:
        self.step(lambda: replace(self.world, settings=settings), lambda: self.stage.set(settings))

    def register(self, states: Mapping[str, str]) -> None:
        """The status words get other meanings."""
        if any(lease.draining for lease in self.world.leases.values()):
            return  # whether it ends now depends on the order of the user's machines
        self.step(
            lambda: register(self.world, self.rival, states, self.now),
            lambda: self.stage.register(states),
        )

    def spoil(self, change: tuple[str, str]) -> None:
        """A statement that is rejected for every role, also for the owner."""
        code, query = change

        def expect() -> World:
            raise Rejected(code)

        self.step(expect, lambda: self.conn.execute(query.encode()))

    def audit(self, table: str) -> None:
        if table not in self.world.protections:
            return
        contradictions, not_provable = audit(self.world, table)
        found = rows(
            self.conn,
            "select * from arbiter.audit(%s::regclass)"
            " where finding <> 'history' or user_id = any (%s)",
            table,
            self.users,
        )
        proved_wrong = {
            UUID(row.row_key["id"]).int & 0xFFFFFFFF: row.reason
            for row in found
            if row.finding == "contradiction"
        }
        counts = {row.reason: row.row_count for row in found if row.finding == "not_provable"}
        assert contradictions == proved_wrong
        assert not_provable == counts
        assert [row for row in found if row.finding == "history"] == []

    # Comparing -----------------------------------------------------------------------------------

    def user(self, index: int) -> str:
        return self.users[index % len(self.users)]

    def machine(self, index: int) -> str:
        """A machine of the registry, or one that the lease is for though it may be gone."""
        if index < 0:
            lease = self.world.leases.get(self.user(-1 - index))
            if lease and lease.claimant:
                return lease.claimant
        known = sorted(self.world.machines) or self.machines or self.users
        return known[index % len(known)]

    def index(self, name: str) -> int:
        """The index of a machine of the registry."""
        return sorted(self.world.machines).index(name)

    def row_id(self, key: int) -> str:
        return str(UUID(int=(self.stage.runs << 64) | (1 << 32) | key))

    def owner_key(self, table: str, user: str | None) -> str | None:
        return self.traders[user] if table == SIGNALS else user

    def step(
        self, expect: Callable[[], World], run: Callable[[], object], conn: Conn | None = None
    ) -> Rejected | None:
        """Let the model and the database do the same; their answers must be the same, too."""
        self.agrees = False
        rejection = None
        try:
            self.world = expect()
        except Rejected as rejected:
            rejection = rejected
        error = None
        try:
            run()
        except psycopg.Error as raised:
            error = raised
        if rejection is None:
            assert error is None, error
        else:
            assert error is not None, f"not rejected: {rejection.code} {rejection.detail}"
            assert error.sqlstate == SQLSTATES[rejection.code], error
            if error.sqlstate.startswith("WX") or rejection.code == "nothing_to_confirm":
                self.compare_details(rejection, detail_of(error), conn or self.conn)
        self.stage.answers[rejection.code if rejection else None] += 1
        self.look()
        self.agrees = True
        return rejection

    def compare_details(self, rejection: Rejected, found: dict[str, Any], conn: Conn) -> None:
        if rejection.code == "append_only":
            assert found["code"] == rejection.code
            return
        expected: dict[str, Any] = {**rejection.detail, "retry_at": as_detail(rejection.retry_at)}
        if rejection.code == "handover_draining":
            pids = {"self": conn.info.backend_pid, "rival": self.held.info.backend_pid}
            expected["blockers"] = sorted(pids[who] for who in rejection.blockers)
            if self.nameless:  # a lock of a savepoint that was released cannot be told whose it is
                assert set(found["blockers"]) <= set(expected["blockers"])
                del found["blockers"], expected["blockers"]
            else:
                found["blockers"].sort()
        assert found == {
            key: str(said) if isinstance(said, str) else said for key, said in expected.items()
        }

    def look(self) -> None:
        """Compare everything that is committed, and what every user would be told."""
        params = {
            "users": self.users,
            "machines": self.machines,
            "first": self.first_observation,
        }
        with self.conn.pipeline():
            cursors = {
                name: self.conn.cursor(row_factory=namedtuple_row).execute(query, params)
                for name, query in LOOK.items()
            }
        found: dict[str, list[Any]] = {name: cursor.fetchall() for name, cursor in cursors.items()}
        (clock,) = found["clock"]
        self.settle_instants(found, clock[0])
        self.compare_leases(found)
        self.compare_rows(found)
        self.compare_verdicts(found)
        self.compare_status(found)

    def settle_instants(self, found: dict[str, list[Any]], now: datetime) -> None:
        """Take over the instants of this step, which only the database knows."""
        before, self.now = self.now, now
        machines = {
            row.id: Machine(row.user_id, row.status, row.last_health_check)
            for row in found["machines"]
        }
        notes = {
            (row.user_id, row.machine_id): Note(row.left_running_at, row.entered_error_at)
            for row in found["notes"]
        }
        assert self.world.machines.keys() == machines.keys()
        assert self.world.notes.keys() == notes.keys()

        def settle(expected: datetime | None, stamped: datetime | None) -> datetime | None:
            if expected == before and stamped is not None:
                assert before <= stamped <= now
                return stamped
            return expected

        settled = {
            name: replace(m, heartbeat=settle(m.heartbeat, machines[name].heartbeat))
            for name, m in self.world.machines.items()
        }
        noted = {
            key: Note(
                settle(note.left_running, notes[key].left_running),
                settle(note.entered_error, notes[key].entered_error),
            )
            for key, note in self.world.notes.items()
        }
        self.world = replace(self.world, machines=settled, notes=noted)
        assert self.world.machines == machines
        assert self.world.notes == notes

    def compare_leases(self, found: dict[str, list[Any]]) -> None:
        assert {
            user: (source_of(at.machine), at.machine, at.epoch, at.draining, at.draining_to)
            for user, at in self.world.leases.items()
        } == {
            row.user_id: (row.holder, row.machine_id, row.epoch, row.draining, row.draining_to)
            for row in found["leases"]
        }
        expected = []
        for user, history in sorted(self.world.handovers.items()):
            for epoch, entry in enumerate(history, start=1):
                assert entry.epoch == epoch
                machine = history[epoch - 2].machine if epoch > 1 else None
                before = source_of(machine) if epoch > 1 else None
                to = source_of(entry.machine)
                expected.append((user, epoch, before, machine, to, entry.machine, entry.reason))
        assert expected == found["handovers"]

    def compare_rows(self, found: dict[str, list[Any]]) -> None:
        assert {
            self.row_id(key): (row.table, row.user, row.source, row.machine)
            for key, row in self.world.rows.items()
        } == {
            row.id: (row.table_name, row.user_id, row.source, row.machine_id)
            for row in found["rows"]
        }
        assert Counter(self.world.observed) == Counter(row.code for row in found["observations"])

    def compare_verdicts(self, found: dict[str, list[Any]]) -> None:
        admitted: Counter[str] = Counter()
        for row in found["verdicts"]:
            verdict = judge(self.world, row.user_id, row.machine_id, self.now)
            assert (row.code, row.retry_at) == (verdict.code, verdict.retry_at)
            if row.machine_id is None:
                assert row.takeover == verdict.takeover
            admitted[row.user_id] += row.code is None
        assert all(writers <= 1 for writers in admitted.values()), "two may write at once"

    def compare_status(self, found: dict[str, list[Any]]) -> None:
        self.said = {row.user_id: row for row in found["status"]}
        for user, said in self.said.items():
            assert said.machine_id in may_show(self.world, user)
            expected = status(self.world, user, said.machine_id, said.as_of)
            assert expected == {column: getattr(said, column) for column in expected}

    def teardown(self) -> None:
        if not self.agrees:
            return  # what comes after the difference would only hide it
        if self.open is not None:
            self.end(keep=True)
        for table in PROTECTIONS:
            self.audit(table)


@pytest.fixture(scope="module")
def stage(templates: Templates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The database of all runs."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    with templates.clone("installed") as db:
        yield Stage(db)


@pytest.mark.slow
def test_arbiter_does_what_its_model_says(stage: Stage) -> None:
    """Random operations; the database and the model agree on every answer and every row."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call, unused-ignore]
        lambda: Arbiter(stage),  # type: ignore[arg-type, unused-ignore]
        settings=PROFILE,
    )
    # Otherwise too few kinds of answers have been compared.
    codes = {"cloud_active", "not_holder", "wrong_identity", "handover_draining"}
    assert codes <= stage.answers.keys()
    reasons = {
        row.reason for row in rows(stage.conn, "select distinct reason from arbiter.handovers")
    }
    assert {"first_write", "registered", "activated", "heartbeat_lapsed"} <= reasons
