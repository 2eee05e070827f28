"""Rejections over HTTP: what a browser or a machine gets from PostgREST, and what PostgREST makes
of errors that are raised the naive way.

Every rejection is asked for twice in the same state, over HTTP and in plain SQL, and the two are
compared with each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Json
from story import (
    SETTINGS,
    User,
    activate,
    add_machine,
    add_signal,
    add_user,
    age,
    as_detail,
    beat,
    clock,
    detail_of,
    next_bar,
    rejection,
    rows,
    set_status,
    value,
)

if TYPE_CHECKING:
    from .conftest import App, Raw

#: What a rejection may have in its header; content-range is that of an answer without rows.
HEADERS = {"date", "server", "content-type", "transfer-encoding", "connection", "retry-after"}

#: Line ends in all the ways that a reader might take for one, and a header to be recognised by.
NASTY = "BTC\r\nX-Owned: 1\nX-Owned: 2\r\n\r\n<script>%0d%0aX-Owned: 3\u010d\u010a"


class Rejection(NamedTuple):
    """The parts that are the same in HTTP and SQL."""

    sqlstate: str
    message: str
    detail: dict[str, Any]
    hint: str


@dataclass
class Scene:
    """A user, and the writes of which one is rejected: as a request, and as the same statement."""

    app: App
    user: User
    machine: str | None = None
    #: A transaction that is left open until the test ends.
    writer: psycopg.Connection[Any] | None = None

    @property
    def service(self) -> str:
        return self.app.gateway.service_key

    @property
    def browser(self) -> str:
        return self.app.user_token(self.user)

    def signal(self, source: str = "local", **columns: Any) -> dict[str, Any]:
        """A signal for a bar of its own; of the cloud, with the machine."""
        return {
            "trader_id": str(self.user.trader),
            "symbol": "BTCUSDT",
            "interval": "1m",
            "signal": "buy",
            "bar_time": next_bar().isoformat(),
            "source": source,
            "machine_id": str(self.machine) if source == "cloud" else None,
            **columns,
        }

    def signals(self) -> list[Any]:
        return rows(
            self.app.owner,
            "select * from public.signals where trader_id = %s order by id",
            self.user.trader,
        )

    def history(self) -> list[Any]:
        return rows(self.app.owner, "select * from arbiter.handovers order by 1, 2")


@pytest.fixture
def scene(app: App) -> Iterator[Scene]:
    scene = Scene(app, add_user(app.owner))
    yield scene
    if scene.writer is not None:
        scene.writer.close()


# The eight rejections ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How to get a rejection: the state, and who writes what over HTTP and in SQL."""

    sqlstate: str
    code: str
    prepare: Callable[[Scene], object]
    role: str = "authenticated"
    source: str = "local"
    columns: tuple[tuple[str, str], ...] = ()
    request: tuple[str, str, str] | None = None  # method, path, body; else the row is inserted
    statement: str = ""
    has_retry_at: bool = False


def holds(scene: Scene) -> None:
    scene.machine = activate(scene.app.backend, scene.user)


def leaves_running(scene: Scene) -> None:
    holds(scene)
    assert scene.machine is not None
    set_status(scene.app.backend, scene.machine, "stopping")


def has_failed(scene: Scene) -> None:
    holds(scene)
    assert scene.machine is not None
    set_status(scene.app.backend, scene.machine, "error")


def failed_long_ago(scene: Scene) -> None:
    has_failed(scene)
    assert scene.machine is not None
    long_ago = SETTINGS["error_takeover_delay"] * 2
    age(scene.app.owner, scene.machine, entered_error=long_ago, heartbeat=long_ago)


def boots(scene: Scene) -> None:
    scene.machine = add_machine(scene.app.backend, scene.user, "starting")


def has_a_signal(scene: Scene) -> None:
    add_signal(scene.app.owner, scene.user.trader)


def is_draining(scene: Scene) -> None:
    """A browser's transaction stays open while the machine comes."""
    scene.app.owner.execute("update arbiter.settings set drain_timeout = '100 ms'")
    has_a_signal(scene)
    scene.writer = scene.app.db.connect(autocommit=False)
    add_signal(scene.writer, scene.user.trader)
    scene.machine = add_machine(scene.app.backend, scene.user, "running")
    beat(scene.app.backend, scene.machine)


#: The API serves no table of arbiter; an app's own function that tries is the way there.
REWRITE = """
create or replace function public.rewrite_history() returns void
language sql security definer begin atomic delete from arbiter.handovers; end
"""


def has_a_history(scene: Scene) -> None:
    has_a_signal(scene)
    scene.app.owner.execute(REWRITE)
    scene.app.gateway.reload_schema()


CASES = {
    "cloud_active": Case("WX001", "cloud_active", holds),
    "cooling_down": Case("WX002", "cooling_down", leaves_running, has_retry_at=True),
    "failed just now": Case("WX003", "takeover_unconfirmed", has_failed, has_retry_at=True),
    "failed long ago": Case("WX003", "takeover_unconfirmed", failed_long_ago),
    "not_holder": Case("WX004", "not_holder", boots, "service_role", "cloud"),
    "no machine": Case(
        "WX005", "wrong_identity", holds, "service_role", "cloud", (("machine_id", ""),)
    ),
    "provenance": Case(
        "WX006",
        "provenance_immutable",
        has_a_signal,
        "service_role",
        request=("PATCH", "/signals?trader_id=eq.{trader}", '{"source": "cloud"}'),
        statement="update public.signals set source = 'cloud' where trader_id = %(trader)s",
    ),
    "draining": Case("WX007", "handover_draining", is_draining, "service_role", "cloud"),
    "history": Case(
        "WX008",
        "append_only",
        has_a_history,
        "service_role",
        request=("POST", "/rpc/rewrite_history", "{}"),
        statement="select public.rewrite_history()",
    ),
    "confirmed too early": Case(
        "WX003",
        "takeover_unconfirmed",
        has_failed,
        request=("POST", "/rpc/confirm_takeover", "{}"),
        statement="select public.confirm_takeover()",
        has_retry_at=True,
    ),
    "confirmed without an error": Case(
        "WX001",
        "cloud_active",
        holds,
        request=("POST", "/rpc/confirm_takeover", "{}"),
        statement="select public.confirm_takeover()",
    ),
    "nothing to confirm": Case(
        "55000",
        "nothing_to_confirm",
        has_a_signal,
        request=("POST", "/rpc/confirm_takeover", "{}"),
        statement="select public.confirm_takeover()",
    ),
}


def over_http(scene: Scene, case: Case, row: dict[str, Any]) -> httpx.Response:
    token = scene.service if case.role == "service_role" else scene.browser
    if case.request is None:
        return scene.app.send(token, "POST", "/signals", row)
    method, path, body = case.request
    return scene.app.send(token, method, path.format(trader=scene.user.trader), json.loads(body))


def in_sql(scene: Scene, case: Case, row: dict[str, Any]) -> psycopg.Error:
    claims = {"sub": str(scene.user.id), "role": case.role}
    conn = scene.app.db.connect(role=case.role, claims=claims)
    if case.request is None:
        return rejection(insert, conn, row)
    return rejection(conn.execute, case.statement, {"trader": scene.user.trader})


def insert(conn: psycopg.Connection[Any], row: dict[str, Any]) -> None:
    query = sql.SQL(
        "insert into public.signals ({0})"
        " select {0} from json_populate_record(null::public.signals, %s)"
    )
    conn.execute(query.format(sql.SQL(", ").join(map(sql.Identifier, row))), (Json(row),))


@pytest.mark.parametrize("name", CASES)
def test_a_rejection_is_a_409_that_says_what_sql_says(scene: Scene, name: str) -> None:
    case = CASES[name]
    case.prepare(scene)
    row = scene.signal(case.source, **{key: text or None for key, text in case.columns})
    signals, history = scene.signals(), scene.history()

    error = in_sql(scene, case, row)
    before = clock(scene.app.owner)
    answer = over_http(scene, case, row)
    after = clock(scene.app.owner)

    assert (scene.signals(), scene.history()) == (signals, history)
    assert error.sqlstate == case.sqlstate
    detail = detail_of(error)
    assert detail["code"] == case.code
    assert error.diag.message_primary is not None
    assert error.diag.message_hint is not None

    assert (answer.status_code, answer.reason_phrase) == (409, "Conflict")
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    body = answer.json()
    assert body.keys() == {"code", "message", "details", "hint"}
    assert "\n" not in body["details"]
    said = Rejection(body["code"], body["message"], json.loads(body["details"]), body["hint"])
    assert said == Rejection(
        case.sqlstate, error.diag.message_primary, detail, error.diag.message_hint
    )

    assert (detail.get("retry_at") is not None) == case.has_retry_at
    assert ("retry-after" in answer.headers) == case.has_retry_at
    if case.has_retry_at:
        retry_at = datetime.fromisoformat(detail["retry_at"])
        assert detail["retry_at"] == as_detail(retry_at)
        header = answer.headers["retry-after"]
        assert header == str(int(header))
        # A client that waits as long as the header says does not come too early.
        shortest, longest = (math.ceil((retry_at - at).total_seconds()) for at in (after, before))
        assert 1 <= shortest <= int(header) <= longest


def test_retry_after_is_at_least_a_second(scene: Scene) -> None:
    """Zero, or a negative number for what has passed meanwhile, would let clients come at once."""
    conn = scene.app.db.connect(role="authenticated")
    conn.execute("select set_config('request.method', 'POST', false)")
    error = (
        "select * from arbiter._error('WX002', 'm', 'h',"
        " jsonb_build_object('retry_at', clock_timestamp() + %s), 409)"
    )
    for ahead, seconds in ((-3600, "1"), (0, "1"), (0.2, "1"), (90, "90")):
        row = conn.execute(error, (timedelta(seconds=ahead),)).fetchone()
        assert row is not None
        sqlstate, _, detail, _ = row
        assert sqlstate == "PGRST"
        assert json.loads(detail) == {"status": 409, "headers": {"Retry-After": seconds}}


# All kinds of requests ---------------------------------------------------------------------------


def test_a_batch_is_rejected_or_written_as_a_whole(scene: Scene) -> None:
    holds(scene)
    send, service = scene.app.send, scene.service
    mixed = [scene.signal("cloud") for _ in range(99)] + [scene.signal("local")]
    answer = send(service, "POST", "/signals", mixed)
    assert (answer.status_code, answer.json()["code"]) == (409, "WX001")
    assert scene.signals() == []

    answer = send(
        service,
        "POST",
        "/signals",
        [scene.signal("cloud") for _ in range(100)],
        Prefer="return=representation",
    )
    assert (answer.status_code, len(answer.json())) == (201, 100)
    assert len(scene.signals()) == 100


def test_an_upsert_is_rejected_like_an_insert(scene: Scene) -> None:
    send, path = scene.app.send, "/signals?on_conflict=trader_id,symbol,interval,bar_time"
    merge = "resolution=merge-duplicates,return=representation"
    assert send(scene.browser, "POST", path, scene.signal(), Prefer=merge).status_code == 201
    holds(scene)
    before = scene.signals()
    answer = send(scene.browser, "POST", path, scene.signal(), Prefer=merge)
    assert (answer.status_code, answer.json()["code"]) == (409, "WX001")
    assert scene.signals() == before


def test_an_update_is_rejected_where_updates_are_arbitrated(scene: Scene) -> None:
    """By PATCH, and by an upsert that meets the row."""
    app, path = scene.app, f"/positions?user_id=eq.{scene.user.id}"
    app.owner.execute("select arbiter.protect('public.positions', p_verbs => '{insert,update}')")
    app.gateway.reload_schema()
    position = {"user_id": str(scene.user.id), "symbol": "BTC"}
    upsert = ("POST", "/positions?on_conflict=user_id,symbol", {**position, "quantity": 2})
    patch = ("PATCH", path, {"quantity": 1})
    merge = "resolution=merge-duplicates"
    assert app.send(scene.browser, "POST", "/positions", position).status_code == 201
    assert app.send(scene.browser, *upsert, Prefer=merge).status_code == 200
    assert app.send(scene.browser, *patch).status_code == 204

    holds(scene)
    position = app.send(scene.browser, "GET", path).json()
    for request in (upsert, patch):
        answer = app.send(scene.browser, *request, Prefer=merge)
        assert (answer.status_code, answer.json()["code"]) == (409, "WX001")
    assert app.send(scene.browser, "GET", path).json() == position


def test_reading_goes_on(scene: Scene) -> None:
    """Also while the browser's writes are rejected."""
    has_a_signal(scene)
    holds(scene)
    send, path = scene.app.send, f"/signals?trader_id=eq.{scene.user.trader}&select=source"
    assert send(scene.browser, "POST", "/signals", scene.signal()).status_code == 409
    answer = send(scene.browser, "GET", path)
    assert (answer.status_code, answer.json()) == (200, [{"source": "local"}])
    answer = send(scene.browser, "HEAD", path, Prefer="count=exact")
    assert (answer.status_code, answer.headers["content-range"]) == (200, "0-0/1")


def test_the_browser_asks_and_says_yes(scene: Scene) -> None:
    """One row for each answer, by POST, and by GET where nothing is written."""
    failed_long_ago(scene)
    send, browser = scene.app.send, scene.browser
    asked = send(browser, "GET", "/rpc/execution_status")
    assert asked.status_code == 200
    (row,) = asked.json()
    assert row | {"as_of": 0, "heartbeat_age": 0} == {
        "environment": "none",
        "can_write_local": False,
        "enforced": True,
        "code": "takeover_unconfirmed",
        "message": "Cloud failed",
        "retry_at": None,
        "machine_id": str(scene.machine),
        "machine_state": "error",
        "heartbeat_age": 0,
        "epoch": 2,
        "draining": False,
        "as_of": 0,
        "poll_interval": "00:00:05",
    }
    answer = send(browser, "POST", "/rpc/confirm_takeover", {})
    assert answer.status_code == 200
    assert [row["environment"] for row in answer.json()] == ["local"]
    answer = send(browser, "POST", "/rpc/execution_status", {})
    assert [row["can_write_local"] for row in answer.json()] == [True]
    assert send(browser, "POST", "/signals", scene.signal()).status_code == 201
    (signal,) = scene.signals()
    assert signal.source == "local"


def test_a_heartbeat_of_an_unknown_machine_is_a_404(scene: Scene) -> None:
    """Through an app's own function: the API serves no function of arbiter's."""
    app = scene.app
    app.owner.execute("""
        create or replace function public.beat(id uuid) returns timestamptz language sql
        security invoker begin atomic select arbiter.heartbeat(id); end;
        grant execute on function public.beat to service_role""")
    app.gateway.reload_schema()
    holds(scene)
    assert (
        app.send(scene.service, "POST", "/rpc/beat", {"id": str(scene.machine)}).status_code == 200
    )
    answer = app.send(scene.service, "POST", "/rpc/beat", {"id": str(scene.user.id)})
    assert (answer.status_code, answer.json()["code"]) == (404, "P0002")


# Line ends ---------------------------------------------------------------------------------------

#: Errors as developers raise them to tell a client what was wrong. PostgREST's manual has both
#: kinds: a SQLSTATE that is a status, whose message becomes the status line, and one with JSON.
NAIVE_ERRORS = """
create function public.naive_error(kind text, symbol text) returns void language plpgsql as $$
begin
  if kind = 'message' then
    raise exception using errcode = 'PT409', message = symbol;
  end if;
  raise exception using
    errcode = 'PGRST',
    message = '{"code": "WX001", "message": "no"}',
    detail = case kind
      when 'status_text' then
        json_build_object('status', 409, 'status_text', symbol, 'headers', '{}'::json)
      when 'header name' then
        json_build_object('status', 409, 'headers', json_build_object(symbol, 'no'))
      when 'header value' then
        json_build_object('status', 409, 'headers', json_build_object('X-Symbol', symbol))
      end;
end $$;
"""


def test_a_users_text_in_an_error_becomes_a_header(scene: Scene) -> None:
    """The naive ways, which are why nothing but numbers may get there."""
    app = scene.app
    app.owner.execute(NAIVE_ERRORS)
    app.gateway.reload_schema()

    def answer(kind: str, symbol: str) -> Raw:
        body = {"kind": kind, "symbol": symbol}
        return app.send_raw(scene.browser, "POST", "/rpc/naive_error", body)

    for kind in ("message", "status_text"):
        split = answer(kind, "BTC\r\nSet-Cookie: owned=1\r\n\r\nowned")
        assert split.status == "HTTP/1.1 409 BTC"
        assert split.header == ["Set-Cookie: owned=1"]
        assert split.body.startswith("owned")
    named = answer("header name", "X: y\r\nSet-Cookie")
    assert "Set-Cookie: no" in named.header
    # The value of a header is folded: the text is in the header, but as one value.
    valued = answer("header value", "BTC\r\nSet-Cookie: owned=1")
    assert valued.header[-2:] == ["X-Symbol: BTC", " Set-Cookie: owned=1"]


def assert_clean(answer: Raw, status: str) -> None:
    """Nothing of NASTY got out of the body."""
    assert answer.status == status
    assert answer.names() <= HEADERS
    assert "Owned" not in "".join(answer.header)


def test_a_rows_text_stays_in_the_body(scene: Scene) -> None:
    holds(scene)
    row = scene.signal(symbol=NASTY, signal=NASTY, interval=NASTY)
    answer = scene.app.send_raw(scene.browser, "POST", "/signals", row)
    assert_clean(answer, "HTTP/1.1 409 Conflict")
    assert scene.signals() == []
    # The same text in a source, which a rejection tells.
    row = scene.signal(source=NASTY)
    answer = scene.app.send_raw(scene.service, "POST", "/signals", row)
    assert_clean(answer, "HTTP/1.1 400 Bad Request")
    assert '"23514"' in answer.body
    assert scene.signals() == []


def test_a_machines_text_stays_in_the_body(scene: Scene) -> None:
    """The provider's name for it, and the word for its status."""
    owner = scene.app.owner
    owner.execute("alter table public.cloud_machines drop constraint cloud_machines_status_check")
    holds(scene)
    owner.execute(
        "update public.cloud_machines set machine_id = %(t)s, status = %(t)s, region = %(t)s,"
        " error_message = %(t)s where id = %(m)s",
        {"t": NASTY, "m": scene.machine},
    )
    answer = scene.app.send_raw(scene.browser, "POST", "/signals", scene.signal())
    assert_clean(answer, "HTTP/1.1 409 Conflict")
    assert '"WX001"' in answer.body
    answer = scene.app.send_raw(scene.browser, "POST", "/rpc/execution_status", {})
    assert answer.status == "HTTP/1.1 200 OK"
    assert "Owned" not in "".join(answer.header)
    assert scene.signals() == []


@pytest.mark.parametrize("claim", ["sub", "machine_id", "email", "user_metadata"])
def test_a_tokens_text_stays_in_the_body(scene: Scene, claim: str) -> None:
    holds(scene)
    # In a subject a colon makes a URI of it, which PostgREST would refuse before the database does.
    text = NASTY.replace(":", "") if claim == "sub" else NASTY
    claims: dict[str, Any] = {"sub": str(scene.user.id), claim: text}
    token = scene.app.gateway.token("authenticated", **claims)
    # A subject that is no uuid ends in auth.uid(), which the policies of the app call; to arbiter
    # it is a user without a lease. With a machine_id the token is a machine's; there is none such.
    write, confirm = {
        "sub": ("400 Bad Request", "409 Conflict"),
        "machine_id": ("403 Forbidden", "403 Forbidden"),
    }.get(claim, ("409 Conflict", "409 Conflict"))
    for path, body, status in (
        ("/signals", scene.signal(), write),
        ("/rpc/confirm_takeover", {}, confirm),
    ):
        answer = scene.app.send_raw(token, "POST", path, body)
        assert_clean(answer, f"HTTP/1.1 {status}")
    assert scene.signals() == []


def test_a_requests_header_stays_where_it_is(scene: Scene) -> None:
    """Encoded line ends, a continued line, and what looks like PostgREST's own settings."""
    holds(scene)
    answer = scene.app.send_raw(
        scene.browser,
        "POST",
        "/signals?select=*&symbol=eq.%0d%0aX-Owned:%201",
        scene.signal(),
        "X-Client-Info: a%0d%0aX-Owned: 1",
        "X-Continued: a\r\n X-Owned: 1",
        "Prefer: return=representation, owned=%0d%0aX-Owned",
    )
    assert_clean(answer, "HTTP/1.1 409 Conflict")
    assert '"WX001"' in answer.body
    assert scene.signals() == []


# 40001 -------------------------------------------------------------------------------------------

#: A guard that says "try again" in the server's own words.
NAIVE_RETRY = """
create sequence public.naive_calls minvalue 0 start 0;
select nextval('public.naive_calls');
create function public.tg_naive_retry() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if nextval('public.naive_calls') < 200 then
    raise exception 'the other environment writes' using errcode = '40001';
  end if;
  raise exception 'enough' using errcode = 'WX001';
end $$;
create table public.naive_retry (symbol text);
grant insert on public.naive_retry to authenticated;
create trigger naive before insert on public.naive_retry
  for each row execute function public.tg_naive_retry()
"""


def test_40001_is_tried_again_without_end_and_ours_once(scene: Scene) -> None:
    """One request: the naive guard is called until it says something else, arbiter's once."""
    app = scene.app
    app.owner.execute(NAIVE_RETRY)
    app.gateway.reload_schema()
    answer = app.send(scene.browser, "POST", "/naive_retry", {"symbol": "BTC"})
    assert answer.json()["code"] == "WX001"
    assert value(app.owner, "select last_value from public.naive_calls") == 200

    holds(scene)
    tried = app.write_count()
    answer = app.send(scene.browser, "POST", "/signals", scene.signal())
    assert (answer.status_code, answer.json()["code"]) == (409, "WX001")
    assert app.write_count() == tried + 1
    assert scene.signals() == []


@pytest.mark.parametrize("name", CASES)
def test_no_rejection_is_tried_again(scene: Scene, name: str) -> None:
    """PostgREST's log of the server: one transaction for a request."""
    case = CASES[name]
    case.prepare(scene)
    row = scene.signal(case.source, **{key: text or None for key, text in case.columns})
    tried = scene.app.write_count()
    assert over_http(scene, case, row).status_code == 409
    writes = case.request is None or case.request[0] == "PATCH"
    assert scene.app.write_count() == tried + writes
