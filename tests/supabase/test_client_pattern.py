"""The machine of a real app, with real supabase-js: batches of up to 100 signals with the service
role's key, put back and sent again on any error, against a guard that rejects them.

PostgREST must try each request once; the retries are the client's own, at its own rate; and once
the machine holds the lease, all rows are there, once.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from story import SETTINGS, User, activate, add_machine, add_user, age, rows, set_status, value

if TYPE_CHECKING:
    from .conftest import App, Node

#: Signals in the machine's queue: not a multiple of a batch.
SIGNALS = 250
BATCHES = 3
#: Rejections to wait for before the machine gets well; and how often it may try at most.
REJECTIONS = 6
MAX_TRIES = 400
DELAY_MS = 20


@pytest.fixture(params=["app", "pooled_app"])
def any_app(request: pytest.FixtureRequest) -> App:
    """PostgREST connected to the database directly, and through PgBouncer."""
    found: App = request.getfixturevalue(request.param)
    return found


def queue(user: User, machine: str) -> list[dict[str, Any]]:
    """What the machine wants to write."""
    return [
        {
            "trader_id": str(user.trader),
            "symbol": f"COIN{n}USDT",
            "interval": "5m",
            "signal": "buy",
            "price": n,
            "bar_time": "2026-01-05T09:20:00Z",
            "source": "cloud",
            "machine_id": str(machine),
        }
        for n in range(SIGNALS)
    ]


def beat_over_http(app: App, machine: str, **change: str) -> None:
    """The machine's heartbeat, as it sends it: with its own clock, here a day ahead."""
    answer = app.send(
        app.gateway.service_key,
        "PATCH",
        f"/cloud_machines?id=eq.{machine}",
        {"last_health_check": "2126-01-01T00:00:00Z", **change},
        Prefer="return=representation",
    )
    assert (answer.status_code, len(answer.json())) == (200, 1)


def run_machine(
    app: App, node: Node, user: User, machine: str, *, max_tries: int, recover: bool
) -> tuple[list[dict[str, Any]], int]:
    """The answers that the machine got, and its exit status; it gets well after some rejections."""
    task = {
        "url": app.gateway.url,
        "key": app.gateway.anon_key,
        "token": app.gateway.service_key,
        "signals": queue(user, machine),
        "maxTries": max_tries,
        "delay": DELAY_MS,
    }
    answers = []
    with node.start("machine.js", task) as process:
        assert process.stdout is not None
        for line in process.stdout:
            answers.append(json.loads(line))
            if recover and len(answers) == REJECTIONS:
                beat_over_http(app, machine, status="running")
                beat_over_http(app, machine)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    return answers, process.returncode


@pytest.mark.parametrize("before", ["starting", "lapsed", "error"])
def test_rejected_batches_arrive_once_the_machine_holds(
    any_app: App, node: Node, before: str
) -> None:
    app = any_app
    user = add_user(app.owner)
    if before == "starting":
        machine = add_machine(app.backend, user, "starting")
    else:
        machine = activate(app.backend, user)
        if before == "error":
            set_status(app.backend, machine, "error")
        age(app.owner, machine, heartbeat=SETTINGS["heartbeat_timeout"] * 2)
    tried = app.write_count()

    answers, status = run_machine(app, node, user, machine, max_tries=MAX_TRIES, recover=True)

    assert status == 0
    rejected = [a for a in answers if a["status"] != 201]
    assert rejected == [{"status": 409, "code": "WX004", "rows": 100}] * len(rejected)
    admitted = [a["rows"] for a in answers if a["status"] == 201]
    assert admitted == [100, 100, 50]
    # One attempt in the database for each request of the client, admitted or rejected.
    assert app.write_count() - tried == len(answers) == len(rejected) + BATCHES
    assert REJECTIONS <= len(rejected) < MAX_TRIES

    found = rows(
        app.owner,
        "select symbol, source, machine_id from public.signals where trader_id = %s",
        user.trader,
    )
    assert len(found) == SIGNALS
    assert Counter(row.symbol for row in found) == Counter(f"COIN{n}USDT" for n in range(SIGNALS))
    assert {(row.source, row.machine_id) for row in found} == {("cloud", machine)}


def test_a_machine_that_never_gets_well_writes_nothing(any_app: App, node: Node) -> None:
    """It gives up when its tries are used up: no other program tries again for it."""
    app = any_app
    user = add_user(app.owner)
    machine = add_machine(app.backend, user, "stopped")
    tried = app.write_count()
    answers, status = run_machine(app, node, user, machine, max_tries=10, recover=False)
    assert status == 1
    assert answers == [{"status": 409, "code": "WX004", "rows": 100}] * 10
    assert app.write_count() - tried == 10
    count = value(
        app.owner, "select count(*) from public.signals where trader_id = %s", user.trader
    )
    assert count == 0


def test_supabase_js_sees_the_rejection(any_app: App, node: Node) -> None:
    """The error of supabase-js has the code, and the DETAIL as its details."""
    app = any_app
    user = add_user(app.owner)
    machine = add_machine(app.backend, user, "starting")
    row = queue(user, machine)[0]
    (answer,) = node.call(app, app.gateway.service_key, [["from", "signals"], ["insert", row]])
    assert (answer["status"], answer["data"]) == (409, None)
    error = answer["error"]
    assert error["code"] == "WX004"
    assert error["message"].startswith("this machine does not hold the lease")
    assert error["hint"].startswith("Stop trading")
    assert json.loads(error["details"]) == {
        "code": "not_holder",
        "user_id": str(user.id),
        "holder": "local",
        "machine_id": None,
        "epoch": 1,
        "retry_at": None,
    }
    local = {**row, "source": "local", "machine_id": None}
    asked, written, told = node.call(
        app,
        app.user_token(user),
        [["rpc", "execution_status"]],
        [["from", "signals"], ["insert", local], ["select", "source"]],
        [["rpc", "execution_status"]],
    )
    assert [(row["environment"], row["can_write_local"]) for row in asked["data"]] == [
        ("local", True)
    ]
    assert (written["status"], written["data"]) == (201, [{"source": "local"}])
    assert [row["message"] for row in told["data"]] == ["Cloud starting"]
