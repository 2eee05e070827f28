"""What the demo's page is told: periods, keys, and the error when it cannot be served."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

import httpx
import jwt
import pytest

import arbiter_db
from arbiter_db.demo import web
from arbiter_db.demo.gateway import GatewayError
from arbiter_db.demo.story import TRADER, USER

if TYPE_CHECKING:
    from conftest import Database

DEFAULTS = {
    "heartbeat_timeout": "30 s",
    "stop_grace": "30 s",
    "error_takeover_delay": "120 s",
    "drain_timeout": "2 s",
    "heartbeat_interval": "10 s",
    "poll_interval": "5 s",
}
SHORT = {
    "heartbeat_timeout": "3 s",
    "stop_grace": "3 s",
    "error_takeover_delay": "4 s",
    "drain_timeout": "2 s",
    "heartbeat_interval": "1 s",
    "poll_interval": "0.5 s",
}


@pytest.mark.parametrize(
    ("real_time", "periods", "interval", "boot"),
    [(False, SHORT, 1_000, 2_000), (True, DEFAULTS, 10_000, 12_500)],
)
def test_the_page_knows_the_periods_and_its_keys(
    db: Database, real_time: bool, periods: dict[str, str], interval: int, boot: int
) -> None:
    with web.site(db.conninfo, real_time=real_time) as gateway:
        key = {"Authorization": f"Bearer {gateway.page_key}"}
        config = httpx.get(f"{gateway.url}/config.json", headers=key).json()
        page = httpx.get(gateway.url).text
        who = {}
        for name in ("anonKey", "userToken", "serviceKey"):
            claims = jwt.decode(config.pop(name), gateway.secret, algorithms=["HS256"])
            who[name] = (claims["role"], claims.get("sub"))
            if name != "anonKey":
                left = timedelta(seconds=claims["exp"] - time.time())
                assert timedelta(days=7, minutes=-2) < left <= timedelta(days=7)
        assert config == {
            "url": gateway.url,
            "user": USER,
            "trader": TRADER,
            "periods": periods,
            "heartbeatInterval": interval,
            "bootTime": boot,
        }
    assert who == {
        "anonKey": ("anon", None),
        "userToken": ("authenticated", USER),
        "serviceKey": ("service_role", None),
    }
    assert "<arbiter-badge>" in page


@pytest.mark.parametrize("error", [GatewayError("no port"), arbiter_db.InstallError("no rights")])
def test_what_prevents_it_is_said_in_a_line(
    db: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(conninfo: str) -> None:
        raise error

    monkeypatch.setattr("arbiter_db.demo.web.arbiter_db.install", fail)
    assert web.run(major=db.server.major) == 1
    assert capsys.readouterr().out == f"This must not happen: {error}\n"
