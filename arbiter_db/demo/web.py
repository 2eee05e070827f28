"""The demo in a browser: a page on which a person drives Ada's browser and her cloud machine.

Everything is real: an embedded server, PostgREST, supabase-js; the page is in the folder ``web``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
from psycopg.rows import dict_row

import arbiter_db
from arbiter_db.console import data

from .embedded import EmbeddedServer
from .gateway import Gateway, GatewayError
from .processes import until_interrupted
from .stage import STATEMENTS, make_console, sql_file
from .story import DATABASE, TRADER, USER, create_app

__all__ = ["run", "site"]

#: A page may stay open for that long.
TOKEN_LIFETIME = timedelta(days=7)

#: A machine starts for as long as this many polls of the browser take, and at least for this time.
BOOT_POLLS = 2.5
BOOT_TIME = timedelta(seconds=2)


def run(port: int = 0, real_time: bool = False, major: int = 18) -> int:
    """Serve the page on 127.0.0.1 until Ctrl-C, with an embedded server of that major version.

    ``port`` 0 takes a free one. ``real_time`` keeps arbiter's default settings. Returns the exit
    code: 0, or 1 when arbiter cannot be installed, or PostgREST and supabase-js are missing or do
    not start. Raises EmbeddedServerError when the server does not start.
    """
    console = make_console()
    try:
        with ExitStack() as stack:
            with console.status("Starting ...") if console.is_terminal else nullcontext():
                server = stack.enter_context(EmbeddedServer(major))
                create_app(server)
                arbiter_db.install(server.conninfo(DATABASE, "app_owner"))
                gateway = stack.enter_context(
                    site(lambda user: server.conninfo(DATABASE, user), port, real_time)
                )
            with suppress(KeyboardInterrupt):
                said = f"Open {gateway.page_url} (PostgreSQL {server.version}; Ctrl-C ends it)"
                console.print(data(said), soft_wrap=True)  # the address stays in one piece
                until_interrupted()
    except (GatewayError, arbiter_db.InstallError) as error:
        console.print(data(f"This must not happen: {error}", "red", lines=True))
        return 1
    return 0


@contextmanager
def site(
    conninfo_for: Callable[[str], str], port: int = 0, real_time: bool = False
) -> Iterator[Gateway]:
    """Serve the page for a database with the trading schema and arbiter, but without users.

    ``conninfo_for`` gives the connection string of a user.
    """
    with psycopg.connect(conninfo_for("app_owner"), autocommit=True, row_factory=dict_row) as owner:
        owner.execute(sql_file("people.sql"))
        owner.execute(sql_file("web/history.sql"))
        owner.execute("select arbiter.expose('public')")
        if not real_time:
            owner.execute(STATEMENTS["shorten_settings"])
        settings = owner.execute("select * from arbiter.settings").fetchone()
    assert settings is not None  # a constraint keeps that row
    periods = {name: value for name, value in settings.items() if isinstance(value, timedelta)}
    boot_time = max(BOOT_TIME, BOOT_POLLS * periods["poll_interval"])
    config: dict[str, object] = {
        "user": USER,
        "trader": TRADER,
        "periods": {name: f"{value.total_seconds():g} s" for name, value in periods.items()},
        "heartbeatInterval": _milliseconds(periods["heartbeat_interval"]),
        "bootTime": _milliseconds(boot_time),
    }
    pages = Path(__file__).parent / "web"
    with Gateway(conninfo_for, port=port, pages=pages, config=config) as gateway:
        lifetime = TOKEN_LIFETIME.total_seconds()
        gateway.config["userToken"] = gateway.token("authenticated", USER, expires_in=lifetime)
        gateway.config["serviceKey"] = gateway.token("service_role", expires_in=lifetime)
        yield gateway


def _milliseconds(period: timedelta) -> int:
    return period // timedelta(milliseconds=1)
