"""PostgREST, and PgBouncer where a test asks for it, in front of a database with arbiter.

They are real programs, which must be on this machine, with Node.js 20 or newer::

    python -m arbiter_db.demo.gateway fetch
    PYTHONPATH=tests python -m proof.pgbouncer fetch
    PYTHONPATH=tests/supabase python -m happy_dom fetch

A gateway takes longer to start than a test to run, so a module's tests share one, and the database
behind it; each test has users of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
from proof.pgbouncer import PgBouncer
from story import User, value

from arbiter_db.demo.gateway import SUPABASE_JS, Gateway

if TYPE_CHECKING:
    from conftest import Database, Templates

    from arbiter_db.demo.embedded import EmbeddedServer

#: How long a request or a script may take.
TIMEOUT_S = 20.0

#: Counts how often a table is written to, whether or not the write is then rejected.
COUNT_WRITES = """
create sequence public.write_count minvalue 0 start 0;
select nextval('public.write_count');
create function public.tg_count_writes() returns trigger language plpgsql security definer as $$
begin
  perform nextval('public.write_count');
  return null;
end $$;
create trigger count_writes before insert or update on public.signals
  for each statement execute function public.tg_count_writes()
"""


class Raw(NamedTuple):
    """An answer as it came: its status line, the lines of its header, and what follows."""

    status: str
    header: list[str]
    body: str

    def names(self) -> set[str]:
        """The names of the headers."""
        return {line.partition(":")[0].lower() for line in self.header}


class App:
    """The app's database behind PostgREST, and its callers.

    ``owner`` and ``backend`` are connections past PostgREST, as the owner of the tables and with
    the service role.
    """

    def __init__(self, db: Database, gateway: Gateway, http: httpx.Client) -> None:
        self.db = db
        self.gateway = gateway
        self.http = http
        self.owner = db.connect()
        self.backend = db.connect(role="service_role")

    def user_token(self, user: User, **claims: Any) -> str:
        """What a signed-in browser sends."""
        return self.gateway.token("authenticated", user.id, **claims)

    def machine_token(self, user: User, machine: str) -> str:
        """What a machine sends that has a key of its own."""
        return self.user_token(user, machine_id=str(machine))

    def send(
        self, token: str, method: str, path: str, body: object = None, **headers: str
    ) -> httpx.Response:
        """One request to PostgREST with that token, through the gateway."""
        return self.http.request(
            method,
            path,
            json=body,
            headers={"Authorization": f"Bearer {token}", **headers},
        )

    def send_raw(
        self, token: str, method: str, path: str, body: object = None, *header_lines: str
    ) -> Raw:
        """The same straight to PostgREST; the answer as it came over the wire."""
        content = json.dumps(body).encode()
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            f"Authorization: Bearer {token}",
            *header_lines,
            "\r\n",
        ]
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as answer:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(self.gateway.postgrest_socket))
            sock.sendall("\r\n".join(lines).encode() + content)
            head, _, rest = answer.read().partition(b"\r\n\r\n")
        status, *header = head.decode("latin-1").split("\r\n")
        return Raw(status, header, rest.decode())

    def write_count(self) -> int:
        """How many statements have written signals, or tried to, since the gateway was started."""
        count: int = value(self.owner, "select last_value from public.write_count")
        return count


@pytest.fixture(scope="module")
def app(templates: Templates) -> Iterator[App]:
    """The app behind PostgREST."""
    with ExitStack() as stack:
        db = stack.enter_context(templates.clone("installed"))
        yield _open(stack, db, Gateway(db.conninfo))


@pytest.fixture(scope="module")
def pooled_app(templates: Templates, server: EmbeddedServer) -> Iterator[App]:
    """The same with PgBouncer in transaction mode between PostgREST and the database."""
    with ExitStack() as stack:
        db = stack.enter_context(templates.clone("installed"))
        bouncer = stack.enter_context(PgBouncer(server))
        gateway = Gateway(lambda user: bouncer.conninfo(db.name, user), pooled=True)
        yield _open(stack, db, gateway)


def _open(stack: ExitStack, db: Database, gateway: Gateway) -> App:
    with db.connect() as conn:
        conn.execute(COUNT_WRITES)
        conn.execute("select arbiter.expose('public')")
    stack.enter_context(gateway)
    http = stack.enter_context(httpx.Client(base_url=gateway.rest_url, timeout=TIMEOUT_S))
    return App(db, gateway, http)


class Node:
    """Runs the scripts of this folder, which find supabase-js as their first argument."""

    def __init__(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise pytest.UsageError("these tests need Node.js 20 or newer")
        # Node 20 has no WebSocket without it, and supabase-js wants one even if it opens none.
        self._command = [node, "--experimental-websocket"]
        self._node = node

    def start(self, script: str, task: object) -> subprocess.Popen[str]:
        """Start a script on a task (JSON); what it prints is to be read from ``stdout``."""
        process = subprocess.Popen(
            [*self._command, Path(__file__).with_name(script), SUPABASE_JS.find()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        with process.stdin as stdin:
            json.dump(task, stdin)
        return process

    def test(self, script: Path, **environment: str) -> str:
        """Run a script of tests; their report (TAP), which is the error's text when one fails."""
        done = subprocess.run(
            [self._node, "--test", "--test-reporter=tap", script],
            capture_output=True,
            text=True,
            timeout=6 * TIMEOUT_S,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, app: App, token: str, *calls: list[list[Any]]) -> list[Any]:
        """Let supabase-js make these calls, one after the other, with that token.

        A call is a chain of methods with their arguments:
        ``[["from", "signals"], ["insert", row]]``. Returns what supabase-js resolves each to.
        """
        task = {"url": app.gateway.url, "key": app.gateway.anon_key, "token": token, "calls": calls}
        with self.start("calls.js", task) as process:
            try:
                # stdin is closed already, which communicate() does not expect.
                process.stdin = None
                out, err = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
        assert process.returncode == 0, err
        answers: list[Any] = json.loads(out)
        return answers


@pytest.fixture(scope="session")
def node() -> Node:
    """Node.js with supabase-js."""
    return Node()
