"""The gateway itself: what it passes on, what it says when something is wrong, what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from arbiter_db.demo import gateway as gateway_module
from arbiter_db.demo.gateway import POSTGREST, Gateway, GatewayError, fetch

from .conftest import TIMEOUT_S

if TYPE_CHECKING:
    from conftest import Database

    from .conftest import App


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; fail after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {what}"
        pause.wait(0.01)


def runs(pid: int) -> bool:
    """Whether that process is there, and more than a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_requests_and_answers_pass_as_they_are(app: App) -> None:
    """Queries with encoded characters, bodies with line ends, headers both ways."""
    app.owner.execute("""
        create table public.notes (note text);
        grant all on public.notes to anon""")
    app.gateway.reload_schema()
    note = 'a/b+c%2F d&e=f"\r\n\u20ac'
    answer = app.send(
        app.gateway.anon_key, "POST", "/notes", [{"note": note}, {"note": "x" * 9999}]
    )
    assert (answer.status_code, answer.content) == (201, b"")
    quoted = note.replace('"', '\\"')
    found = app.http.get("/notes", params={"note": f'in.("{quoted}")'}, headers={"Range": "0-0"})
    assert (found.status_code, found.json()) == (200, [{"note": note}])
    assert found.headers["content-range"] == "0-0/*"
    assert found.headers["server"] == "postgrest/12.0.2"
    assert app.http.head("/notes", headers={"Prefer": "count=exact"}).status_code == 200
    assert app.http.delete("/notes").status_code == 204


def test_it_serves_what_a_page_needs(db: Database, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>home</p>")
    (tmp_path / "page.js").write_text("// page")
    with Gateway(db.conninfo, pages=tmp_path, config={"a": 1}) as gateway:
        gateway.config["b"] = 2
        with httpx.Client(base_url=gateway.url) as http:
            assert http.get("/").text == "<p>home</p>"
            assert http.get("/page.js").text == "// page"
            assert http.get("/no.js").status_code == 404
            assert http.get("/%2e%2e/%2e%2e/etc/passwd").status_code in (403, 404)
            assert "javascript" in http.get("/supabase.js").headers["content-type"]
            assert "class Arbiter" in http.get("/arbiter/arbiter.js").text
            own = {"Authorization": f"Bearer {gateway.page_key}"}
            config = http.get("/config.json", headers=own).json()
            assert config.keys() == {"url", "anonKey", "a", "b"}
            assert (config["url"], config["a"], config["b"]) == (gateway.url, 1, 2)
            key = {"Authorization": f"Bearer {config['anonKey']}"}
            assert http.get("/rest/v1/signals", headers=key).json() == []


@pytest.mark.parametrize(
    "host",
    ["evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", "127.0.0.1.example:{port}",
     "[::1]:{port}", "0.0.0.0:{port}", "", "localhost:{port}@evil.example", "evil.example"],
)  # fmt: skip
def test_another_name_that_leads_here_gets_nothing(app: App, host: str) -> None:
    """DNS rebinding: a stranger's page asks under a name of its own, and so may read the answer."""
    headers = {"Host": host.format(port=app.gateway.port)}
    key = {"Authorization": f"Bearer {app.gateway.page_key}"}
    for path in ("/", "/config.json", "/rest/v1/signals", "/supabase.js", "/arbiter/arbiter.js"):
        answer = httpx.get(f"{app.gateway.url}{path}", headers={**headers, **key})
        assert (answer.status_code, answer.text) == (421, "not the address of this server")


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_its_own_names_are_answered(app: App, host: str) -> None:
    own = host.format(port=app.gateway.port)
    for headers in ({"Host": own}, {"Host": own, "Origin": f"http://{own}"}):
        assert httpx.get(f"{app.gateway.url}/supabase.js", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://x"]
)
def test_a_page_of_another_origin_gets_nothing(app: App, origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = app.http.request(method, "/signals", headers={"Origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "key",
    [None, "", "Bearer", "Bearer x", "{key}", "bearer {key}", "Bearer {key}x", "Bearer \u00e4"],
)
def test_what_the_page_is_told_is_for_who_has_its_key(app: App, key: str | None) -> None:
    """Other users of this machine reach the port, too."""
    url = f"{app.gateway.url}/config.json"
    app.gateway.config["serviceKey"] = "secret"
    try:
        headers = []
        if key is not None:
            given = key.format(key=app.gateway.page_key)
            headers = [(b"Authorization", given.encode("latin-1"))]
        answer = httpx.get(url, headers=headers)
        assert (answer.status_code, "secret" in answer.text) == (401, False)
        right = {"Authorization": f"Bearer {app.gateway.page_key}"}
        answer = httpx.get(url, headers=right)
        assert answer.json()["serviceKey"] == "secret"
        assert answer.headers["cache-control"] == "no-store"
    finally:
        del app.gateway.config["serviceKey"]
    assert app.gateway.page_url == f"{app.gateway.url}/#{app.gateway.page_key}"
    assert len(app.gateway.page_key) >= 32


def test_a_dead_postgrest_is_a_502_that_says_so(db: Database) -> None:
    with Gateway(db.conninfo) as gateway, httpx.Client(base_url=gateway.rest_url) as http:
        assert http.get("/signals").status_code == 200
        pid = gateway.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: gateway.pid is None, "PostgREST ends")
        answer = http.get("/signals")
        assert answer.status_code == 502
        assert answer.json()["message"].startswith("PostgREST ended with status -9")
        with pytest.raises(GatewayError, match="PostgREST is not running"):
            gateway.reload_schema()


def test_a_port_that_cannot_be_had_is_named(app: App) -> None:
    for port in (app.gateway.port, 65536):
        gateway = Gateway(app.db.conninfo, port=port)
        with pytest.raises(GatewayError, match=f"cannot listen on 127.0.0.1, port {port}"):
            gateway.start()
        assert gateway.pid is None


def test_a_database_that_is_not_there_is_named(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "START_TIMEOUT_S", 1.0)
    gateway = Gateway(lambda user: app.db.server.conninfo("no_such_database", user))
    with pytest.raises(
        GatewayError, match=r"(?s)does not know the schema within 1 s.*no_such_database"
    ):
        gateway.start()
    assert gateway.pid is None


def test_nothing_is_left_behind(app: App) -> None:
    gateway = Gateway(app.db.conninfo)
    gateway.close()  # harmless before the start, and when repeated
    with gateway:
        pid, directory = gateway.pid, gateway.log_file.parent
        assert pid is not None
        assert runs(pid)
        assert directory.exists()
    gateway.close()
    assert not runs(pid)
    assert not directory.exists()


def test_nothing_is_left_behind_when_the_owner_is_killed(app: App) -> None:
    conninfo = app.db.conninfo("authenticator")
    script = (
        "import signal\n"
        "from arbiter_db.demo.gateway import Gateway\n"
        f"gateway = Gateway(lambda user: {conninfo!r})\n"
        "gateway.start()\n"
        "print(gateway.pid, gateway.log_file.parent, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().split()
        assert runs(int(pid))
        owner.kill()
    until(lambda: not runs(int(pid)), "PostgREST ends")
    until(lambda: not Path(directory).exists(), "its directory goes")


def test_what_is_missing_is_named_with_the_command_that_gets_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(GatewayError, match=r"python -m arbiter_db\.demo\.gateway fetch"):
        Gateway(lambda user: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GatewayError, match=r"install Node\.js"):
        fetch()
    assert not POSTGREST.cached.exists()


def test_tokens_say_who(app: App) -> None:
    """An expired one is told from one of another gateway."""
    said: dict[str, Any] = {}
    for name, token in {
        "expired": app.gateway.token("anon", expires_in=-60),
        "foreign": Gateway(app.db.conninfo).anon_key,
        "good": app.gateway.anon_key,
    }.items():
        answer = app.send(token, "GET", "/signals")
        said[name] = (answer.status_code, answer.headers.get("www-authenticate", ""))
    assert said["good"] == (200, "")
    assert said["expired"][0] == said["foreign"][0] == 401
    assert "JWT expired" in said["expired"][1]
    assert "JWT expired" not in said["foreign"][1]
