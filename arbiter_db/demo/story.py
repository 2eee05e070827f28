"""The story: one user, her browser, her cloud machine, and who may write when.

Every printed result comes from the server. Only the expectations are written down here: when the
server answers otherwise, the demo says so and fails.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import psycopg

import arbiter_db

from .embedded import EmbeddedServer
from .stage import Client, Stage, UnexpectedError, make_console, sql_file

__all__ = ["DEFAULT_ROWS", "create_app", "run"]

DEFAULT_ROWS = 10_000

DATABASE = "trading"
USER = "ada00000-0000-4000-8000-000000000001"
TRADER = "ada00000-0000-4000-8000-00000000007a"
BUILTIN_TRADER = "b0000000-0000-4000-8000-00000000007a"
MACHINE = "c10d0000-0000-4000-8000-000000000001"

# The story's signals are for the bars of this day, one after the other.
FIRST_BAR = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
BAR = timedelta(minutes=5)

# How far the machine's clock is ahead. It must not matter.
CLOCK_ERROR = timedelta(days=1)

REASONS = [
    "first_write",
    "activated",
    "machine_stopped",
    "activated",
    "heartbeat_lapsed",
    "activated",
    "confirmed",
]


@dataclass
class Cast:
    """The clients, each on a connection of its own, and the bar that the next signal is for."""

    owner: Client
    browser: Client
    machine: Client
    backend: Client
    bar: datetime = FIRST_BAR

    def next_bar(self) -> datetime:
        self.bar += BAR
        return self.bar


def run(real_time: bool = False, rows: int = DEFAULT_ROWS, major: int = 18) -> int:
    """Play the story on an embedded server of that major version. Returns the exit code.

    `real_time` keeps arbiter's default settings: the story then takes over three minutes. `rows`
    is how many signals the app has already when arbiter is installed. The exit code is 0 when
    everything happened as it must, 1 when anything did not.
    """
    console = make_console()
    begin = monotonic()
    with ExitStack() as stack:
        with console.status("Starting a server ...") if console.is_terminal else nullcontext():
            server = stack.enter_context(EmbeddedServer(major))
            create_app(server)
            cast = _enter(stack, server)
        stage = Stage(console, cast.owner, cast.browser, since=FIRST_BAR)
        try:
            _play(stage, cast, server, real_time, rows)
        except (UnexpectedError, arbiter_db.InstallError, psycopg.Error) as error:
            stage.failure(f"This must not happen: {error}")
            return 1
        _farewell(stage, monotonic() - begin, real_time)
    return 0


def create_app(server: EmbeddedServer) -> None:
    """Create the app before arbiter, without users: roles, database and schema."""
    with psycopg.connect(server.conninfo("postgres", "postgres"), autocommit=True) as connection:
        connection.execute(sql_file("roles.sql"))
        connection.execute("create database trading owner app_owner")
    with psycopg.connect(server.conninfo(DATABASE, "app_owner"), autocommit=True) as connection:
        connection.execute(sql_file("trading.sql"))


def _enter(stack: ExitStack, server: EmbeddedServer) -> Cast:
    """The people, and the clients' connections."""

    def client(name: str, color: str, user: str, become: str | None, **params: Any) -> Client:
        connection = stack.enter_context(
            psycopg.connect(server.conninfo(DATABASE, user), autocommit=True, application_name=name)
        )
        result = Client(name, color, connection)
        if become is not None:
            result.execute(become, params)
        return result

    claims = f'{{"sub": "{USER}", "role": "authenticated"}}'
    cast = Cast(
        owner=client("owner", "magenta", "app_owner", None),
        browser=client("browser", "green", "authenticator", "become_browser", claims=claims),
        machine=client("machine", "cyan", "authenticator", "become_service"),
        backend=client("backend", "yellow", "authenticator", "become_service"),
    )
    cast.owner.connection.execute(sql_file("people.sql"))
    return cast


def _play(stage: Stage, cast: Cast, server: EmbeddedServer, real_time: bool, rows: int) -> None:
    _introduction(stage, cast, server, rows)
    _install(stage, cast, server, real_time)
    _browser_trades(stage, cast)
    _machine_starts(stage, cast)
    _machine_trades(stage, cast)
    _machine_stops(stage, cast)
    _machine_crashes(stage, cast)
    _machine_wakes_up(stage, cast)
    _machine_fails(stage, cast)
    _user_confirms(stage, cast)
    _history(stage, cast)
    _proof(stage, cast)


# The scenes, in order -----------------------------------------------------------------------------


def _introduction(stage: Stage, cast: Cast, server: EmbeddedServer, rows: int) -> None:
    stage.headline("arbiter: one writer per user, decided by the database")
    stage.note(
        f"A PostgreSQL {server.version} of its own, thrown away at the end, with a trading app on"
        " it. Ada's strategy runs in her browser or on her cloud machine; if both write signals,"
        " orders go out twice. Every statement below is executed as shown, each client on its own"
        " connection, and every answer is the server's. The badge is what arbiter.status() tells"
        " the browser to show."
    )
    stage.table(
        ("client", "is", "connects as"),
        [
            (cast.browser.name, "Ada's browser", "authenticated, with her token's claims"),
            (cast.machine.name, "her cloud machine", "service_role, which bypasses RLS"),
            (cast.backend.name, "the app's API and cron jobs", "service_role"),
            (cast.owner.name, "the one who runs migrations", "app_owner, not a superuser"),
        ],
        indent=2,
    )
    stage.note(f"... the app gets {rows:,} signals of the past (--rows)")
    with stage.busy("writing signals ..."):
        cast.owner.execute("existing_signals", {"rows": rows})


def _install(stage: Stage, cast: Cast, server: EmbeddedServer, real_time: bool) -> None:
    owner = cast.owner
    stage.title("Install arbiter on the running app, as the owner of its database")
    [(_, is_superuser, signals, filenode)] = stage.do(owner, "before_install", 1)
    stage.check(not is_superuser, "installing as a superuser")

    begin = monotonic()
    with stage.busy("installing ..."):
        arbiter_db.install(server.conninfo(DATABASE, "app_owner"))
    seconds = monotonic() - begin
    stage.called(owner, "arbiter_db.install(conninfo)", f"installed in {seconds:.2f} s")

    after = stage.do(owner, "after_install")
    expected = [("local", signals, filenode)] if signals else []
    stage.check(after == expected, "signals changed, or their table was rewritten")
    stage.note("Existing signals count as local. The same filenode: the table was not rewritten.")

    stage.do(owner, "allow_unowned")
    stage.note("Built-in traders have no user. Their signals are not arbitrated.")
    stage.admitted(cast.backend, "builtin_signal", 1, trader=BUILTIN_TRADER, bar=FIRST_BAR)

    stage.title(
        "Settings",
        "The defaults: this takes over three minutes."
        if real_time
        else "Seconds instead of half-minutes, to wait less (--real-time keeps the defaults).",
    )
    stage.do(owner, "show_settings" if real_time else "shorten_settings", 1)


def _browser_trades(stage: Stage, cast: Cast) -> None:
    stage.title("The browser trades", "The app's code is as it was: source is local by default.")
    stage.admitted(cast.browser, "browser_signal", 1, trader=TRADER, bar=cast.next_bar())
    stage.badge("Browser mode")


def _machine_starts(stage: Stage, cast: Cast) -> None:
    stage.title("A cloud machine starts", "Until it is healthy, the browser goes on.")
    stage.do(cast.backend, "provision", 1, machine=MACHINE, user=USER, provider_id="e286de4f711e86")
    stage.do(cast.backend, "starting", 1, machine=MACHINE, clock=_backend_clock())
    stage.admitted(cast.browser, "browser_signal", 1, trader=TRADER, bar=cast.next_bar())

    stage.note(
        "Its first heartbeat. The machine's clock is a day ahead; the database stamps its own."
    )
    _heartbeat(stage, cast, "running")
    stage.badge("Cloud active")
    stage.note("From here on the database rejects the browser, even if its code does not know.")
    stage.rejected(cast.browser, "browser_signal", "WX001", trader=TRADER, bar=cast.next_bar())


def _machine_trades(stage: Stage, cast: Cast) -> None:
    stage.title("The machine trades", "A batch of 100 signals, decided once for the statement.")
    _batch(stage, cast, cast.next_bar())
    stage.badge("Cloud active")


def _machine_stops(stage: Stage, cast: Cast) -> None:
    stage.title(
        "The machine stops",
        "Its last signals may still be in flight, so the browser has to wait for a moment: until"
        " retry_at. The app's own stopped_at is not trusted.",
    )
    stage.do(cast.backend, "stopping", 1, machine=MACHINE, clock=_machine_clock())
    bar = cast.next_bar()
    stage.rejected(cast.browser, "browser_retry", "WX002", trader=TRADER, bar=bar)
    stage.do(cast.backend, "stopped", 1, machine=MACHINE)
    retry_at = stage.rejected(cast.browser, "browser_retry", "WX002", trader=TRADER, bar=bar)
    stage.badge("Cooling down")
    stage.check(retry_at is not None, "no retry_at")
    if retry_at is not None:
        stage.wait_until(retry_at, "retry_at")
    stage.admitted(cast.browser, "browser_retry", 1, trader=TRADER, bar=bar)
    stage.badge("Browser mode")


def _machine_crashes(stage: Stage, cast: Cast) -> None:
    stage.title("The machine runs again, then crashes silently")
    _heartbeat(stage, cast, "running")
    _batch(stage, cast, cast.next_bar())
    stage.note("Here it crashes. It tells nothing to the database; its heartbeats just end.")
    bar = cast.next_bar()
    stage.rejected(cast.browser, "browser_retry", "WX001", trader=TRADER, bar=bar)
    stage.poll_until_may_write()
    stage.admitted(cast.browser, "browser_retry", 1, trader=TRADER, bar=bar)
    stage.badge("Browser mode")


def _machine_wakes_up(stage: Stage, cast: Cast) -> None:
    stage.title(
        "The old machine wakes up",
        "It was only frozen, and still has a batch to write. Its status is still running.",
    )
    bar = cast.next_bar()
    stage.rejected(cast.machine, "machine_batch", "WX004", trader=TRADER, machine=MACHINE, bar=bar)
    stage.note(
        "It puts the batch back, sends a heartbeat, and tries again. A healthy machine outranks the"
        " browser."
    )
    stage.do(cast.machine, "heartbeat_call", 1, machine=MACHINE)
    _batch(stage, cast, bar)
    stage.badge("Cloud active")


def _machine_fails(stage: Stage, cast: Cast) -> None:
    stage.title(
        "The machine reports an error",
        "It may be trading all the same: so the browser takes over only after a while, and only if"
        " Ada says yes.",
    )
    stage.do(cast.backend, "error", 1, machine=MACHINE)
    bar = cast.next_bar()
    retry_at = stage.rejected(cast.browser, "browser_retry", "WX003", trader=TRADER, bar=bar)
    stage.badge("Cloud failed")
    stage.check(retry_at is not None, "no retry_at")
    if retry_at is not None:
        stage.wait_until(retry_at, "retry_at")
    retry_at = stage.rejected(cast.browser, "browser_retry", "WX003", trader=TRADER, bar=bar)
    stage.check(retry_at is None, "a retry_at where only a confirmation helps")
    stage.note("Time alone does not help now.")


def _user_confirms(stage: Stage, cast: Cast) -> None:
    stage.title("Ada confirms the takeover")
    [(environment, can_write, *_)] = stage.do(cast.browser, "confirm_takeover", 1)
    stage.check(environment == "local" and can_write, "the takeover did not happen")
    stage.admitted(cast.browser, "browser_retry", 1, trader=TRADER, bar=cast.bar)
    stage.badge("Browser mode")
    [(status, _)] = stage.do(cast.backend, "machine_row", 1, machine=MACHINE)
    stage.check(status == "stopped", f"the machine's status is {status}, expected stopped")
    stage.note(
        "The old machine tries once more. It is stopped, so a heartbeat does not bring the lease"
        " back."
    )
    _heartbeat(stage, cast, "heartbeat")
    stage.rejected(
        cast.machine, "machine_batch", "WX004", trader=TRADER, machine=MACHINE, bar=cast.next_bar()
    )


def _history(stage: Stage, cast: Cast) -> None:
    stage.title("The history of Ada's lease", "From arbiter.handovers, which is append-only.")
    handovers = arbiter_db.handovers(cast.owner.connection, USER)
    stage.table(
        ("epoch", "from", "to", "reason", "handed_over_at"),
        [
            (
                handover.epoch,
                _holder(handover.from_holder, handover.from_machine_id),
                _holder(handover.to_holder, handover.to_machine_id),
                handover.reason,
                handover.handed_over_at,
            )
            for handover in handovers
        ],
        indent=2,
    )
    reasons = [handover.reason for handover in handovers]
    stage.check(reasons == REASONS, f"handovers {reasons}, expected {REASONS}")


def _proof(stage: Stage, cast: Cast) -> None:
    stage.title(
        "Who wrote in which epoch",
        "Each signal carries the id of its transaction, each handover a snapshot. From both"
        " follows each signal's epoch: no clock is involved, and no verdict of the guard.",
    )
    rows = stage.do(cast.owner, "writers_by_epoch", user=USER)
    stage.check(len(rows) > 0, "no signals")
    for epoch, _, written_by, lease_held_by in rows:
        stage.check(written_by == lease_held_by, f"epoch {epoch} was written by {written_by}")
    stage.note("The audit asks the same of every row, and counts the rows without proof.")
    for finding, reason, _ in stage.do(cast.owner, "audit"):
        stage.check(finding in ("proved", "not_provable"), f"the audit found {finding}: {reason}")


def _farewell(stage: Stage, seconds: float, real_time: bool) -> None:
    stage.headline(
        f"{stage.admitted_count + stage.rejected_count} statements to write signals:"
        f" {stage.admitted_count} admitted, {stage.rejected_count} rejected."
        " No epoch has signals of two environments."
    )
    stage.note(f"Everything was as it must be, in {seconds:.1f} s. Go on with:")
    ways = [("make test", "the tests, on real servers")]
    if not real_time:
        ways.insert(0, ("arbiter-db demo --real-time", "the same with the default settings"))
    stage.table(("command", "runs"), ways, indent=2)


# Small parts --------------------------------------------------------------------------------------


def _heartbeat(stage: Stage, cast: Cast, statement: str) -> None:
    """A heartbeat with the machine's wrong clock; the stored time must be the server's."""
    clock = _machine_clock()
    [(_, stored, *_)] = stage.do(cast.machine, statement, 1, machine=MACHINE, clock=clock)
    stage.check(abs(stored - clock) > CLOCK_ERROR / 2, "the machine's own clock was stored")


def _batch(stage: Stage, cast: Cast, bar: datetime) -> None:
    stage.admitted(cast.machine, "machine_batch", 100, trader=TRADER, machine=MACHINE, bar=bar)


def _machine_clock() -> datetime:
    return datetime.now(UTC) + CLOCK_ERROR


def _backend_clock() -> datetime:
    return datetime.now(UTC)


def _holder(holder: str | None, machine_id: str | None) -> str | None:
    return holder if machine_id is None else f"{holder} {str(machine_id)[:8]}"
