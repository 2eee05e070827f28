"""The browser's side in Chromium, on the demo's page, with supabase-js, PostgREST and PostgreSQL.

The browser is that of the Debian package ``chromium``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Request,
    expect,
    sync_playwright,
)
from story import User, activate, backend, beat, count_rows, lease, next_bar, set_status

from arbiter_db.demo.gateway import Gateway
from arbiter_db.demo.story import TRADER, USER
from arbiter_db.demo.web import site

if TYPE_CHECKING:
    from conftest import Database

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

#: For what takes a few polls, or one of the demo's periods of up to four seconds.
TIMEOUT_MS = 15_000

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}

ADA = User(str(USER), str(TRADER))

STARTED = "Cloud machine started - switching to monitoring mode"
STOPPED = "Cloud machine stopped - browser mode"
COOLING = "Cloud machine stopped - cooling down before browser mode"
FAILED = "Cloud machine failed - nobody generates signals until it recovers or you take over"
RESUMED = "Browser mode - signals are generated here again"

#: What the page was told.
CONFIG = """window.config = async () => {
  const headers = { Authorization: `Bearer ${location.hash.slice(1)}` };
  return (await fetch('/config.json', { headers })).json();
}"""

#: The Arbiter of the page.
ARBITER = "document.querySelector('arbiter-badge').arbiter"


def new_signal() -> dict[str, str]:
    """A row of the browser, for a bar of its own."""
    return {
        "trader_id": TRADER,
        "symbol": "NEWUSDT",
        "interval": "1m",
        "signal": "buy",
        "bar_time": next_bar().isoformat(),
    }


class Visit:
    """A visit to the page. Notes what goes wrong in it, and its writes and polls."""

    def __init__(self, context: BrowserContext, gateway: Gateway) -> None:
        self.page = context.new_page()
        self.context = context
        self.gateway = gateway
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.add_init_script(CONFIG)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.requests.append(_name(request)))

    def _hear(self, message: ConsoleMessage) -> None:
        # That a request failed the browser says there too; the tests look for it elsewhere.
        failed = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not failed:
            self.problems.append(message.text)

    def go(self) -> None:
        self.page.goto(self.gateway.page_url)

    @property
    def badge(self) -> Locator:
        return self.page.locator("arbiter-badge")

    @property
    def buy(self) -> Locator:
        return self.page.locator("#buy")

    @property
    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog", name="Take over from the cloud machine?")

    def toast(self, text: str) -> Locator:
        return self.page.get_by_role("log").get_by_text(text, exact=True).last

    def shows(self, badge: str | re.Pattern[str]) -> None:
        expect(self.badge).to_have_text(badge, timeout=TIMEOUT_MS)

    def can_generate(self) -> bool:
        answer = self.page.evaluate(f"{ARBITER}.canGenerate")
        assert isinstance(answer, bool)
        return answer

    def insert(self) -> dict[str, Any]:
        """A guarded insert; what the app gets."""
        answer: dict[str, Any] = self.page.evaluate(
            """async (row) => {
              const { arbiter } = document.querySelector('arbiter-badge');
              const answer = await arbiter.insert('signals', row, { select: 'source' });
              return { ...answer, after: arbiter.canGenerate };
            }""",
            new_signal(),
        )
        return answer

    def press(self, *ids: str) -> None:
        for id_ in ids:
            self.page.locator(f"#{id_}").click(timeout=TIMEOUT_MS)


def _name(request: Request) -> str:
    return f"{request.method} {request.url.rpartition('/rest/v1/')[2].partition('?')[0]}"


def is_poll(request: Request) -> bool:
    return _name(request) == "POST rpc/execution_status"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def gateway(db: Database) -> Iterator[Gateway]:
    """The demo's page on a database of its own. Machines need no second heartbeat for a while."""
    with site(db.conninfo) as gateway:
        with db.connect() as conn:
            set_period(conn, heartbeat_timeout="1 minute")
        yield gateway


@contextmanager
def visiting(chromium: Browser, gateway: Gateway, **options: Any) -> Iterator[Visit]:
    """A visit by a new browser profile; nothing may go wrong in it."""
    context = chromium.new_context(**{"viewport": DESKTOP, **options})
    visit = Visit(context, gateway)
    visit.page.set_default_timeout(TIMEOUT_MS)
    try:
        yield visit
    finally:
        context.close()
    assert visit.problems == []


@pytest.fixture
def visit(chromium: Browser, gateway: Gateway) -> Iterator[Visit]:
    """A visit to the page, which says that the browser may write."""
    with visiting(chromium, gateway) as visit:
        visit.go()
        visit.shows("Browser mode")
        yield visit


@pytest.fixture
def owner(db: Database) -> psycopg.Connection[Any]:
    return db.connect()


def set_period(owner: psycopg.Connection[Any], **periods: str) -> None:
    for name, period in periods.items():
        owner.execute(f"update arbiter.settings set {name} = '{period}'")


# The story ----------------------------------------------------------------------------------------


def test_a_person_drives_the_whole_story(
    visit: Visit, owner: psycopg.Connection[Any], tmp_path: Path
) -> None:
    page = visit.page
    set_period(owner, heartbeat_timeout="3 seconds")

    def shot(name: str) -> None:
        page.screenshot(path=tmp_path / f"{name}.png")

    def outcome(who: str, text: str) -> None:
        expect(page.locator(f"#{who}-outcome")).to_contain_text(text, timeout=TIMEOUT_MS)

    def may_generate() -> None:
        expect(visit.buy).to_be_enabled(timeout=TIMEOUT_MS)

    def may_watch_only() -> None:
        expect(visit.buy).to_be_disabled(timeout=TIMEOUT_MS)
        # Everything else works on.
        expect(page.locator("#symbol, #filter, #allow-sell, #strategy, #unguarded")).to_have_count(
            5
        )
        for control in page.locator("#symbol, #filter, #allow-sell, #strategy, #unguarded").all():
            expect(control).to_be_enabled()

    may_generate()
    visit.press("buy")
    outcome("browser", "written")
    shot("1-browser-mode")

    visit.press("provision", "start")
    visit.shows("Cloud starting")
    may_generate()
    visit.shows("Cloud active")
    expect(visit.toast(STARTED)).to_be_visible()
    may_watch_only()
    visit.press("batch")
    outcome("machine", "batch of 100: written")
    visit.press("unguarded")
    outcome("browser", "refused with 409, WX001")
    shot("2-cloud-active")

    visit.press("stop")
    visit.shows(re.compile(r"^Cooling down 0:0[0-3]$"))
    expect(visit.toast(COOLING)).to_be_visible()
    may_watch_only()
    visit.press("unguarded")
    outcome("browser", "refused with 409, WX002")
    rejected = page.locator("#http tbody tr").filter(has_text="WX002").first
    assert re.fullmatch("[1-3]", rejected.locator("td").last.inner_text())
    shot("3-cooling-down")
    visit.shows("Browser mode")
    expect(visit.toast(RESUMED)).to_be_visible()
    may_generate()
    visit.press("buy")
    outcome("browser", "buy: written")

    visit.press("start")
    visit.shows("Cloud active")
    page.locator("#heartbeat").uncheck()  # it crashes silently
    visit.shows("Browser mode")
    expect(visit.toast(STOPPED)).to_be_visible()
    visit.press("buy")
    outcome("browser", "buy: written")

    page.locator("#heartbeat").check()  # it was only frozen
    visit.shows("Cloud active")
    visit.press("batch")
    outcome("machine", "batch of 100: written")
    visit.press("fail")
    visit.shows("Cloud failed")
    expect(visit.toast(FAILED)).to_be_visible()
    may_watch_only()
    shot("4-cloud-failed")
    visit.shows("Cloud failed Take over …")
    expect(visit.dialog).to_be_visible()
    shot("5-confirm")
    visit.dialog.get_by_role("button", name="Take over").click()
    expect(visit.dialog).to_be_hidden()
    visit.shows("Browser mode")
    may_generate()
    visit.press("buy")
    outcome("browser", "buy: written")
    expect(page.locator("#machine-state")).to_contain_text("stopped")

    visit.press("delete")
    expect(page.locator("#machine-state")).to_have_text("none")
    visit.shows("Browser mode")

    reasons = page.locator("#history tbody tr td:nth-child(4)")
    expect(reasons).to_have_text(
        [
            "confirmed",
            "activated",
            "heartbeat_lapsed",
            "activated",
            "machine_stopped",
            "activated",
            "first_write",
        ]
    )
    # The table has exactly the rows that the page reported as written.
    sources = "select source, count(*) from public.signals group by source order by source"
    assert owner.execute(sources).fetchall() == [("cloud", 200), ("local", 4)]


# The guarded insert -------------------------------------------------------------------------------


def test_a_machine_that_starts_between_two_polls(
    visit: Visit, db: Database, owner: psycopg.Connection[Any]
) -> None:
    set_period(owner, poll_interval="1 minute")
    visit.page.reload()
    visit.shows("Browser mode")
    answer = visit.insert()
    assert (answer["status"], answer["error"], answer["data"]) == (201, None, [{"source": "local"}])

    activate(backend(db), ADA)
    assert visit.can_generate()  # it cannot know yet
    visit.requests.clear()
    answer = visit.insert()
    # The rejection comes from the database, and what the page knows is new before the app gets it.
    assert (answer["status"], answer["error"]["code"]) == (409, "WX001")
    assert answer["after"] is False
    writes = [name for name in visit.requests if not name.startswith("GET")]
    assert writes == ["POST signals", "POST rpc/execution_status"]
    visit.shows("Cloud active")
    expect(visit.buy).to_be_disabled()
    expect(visit.toast(STARTED)).to_be_visible()
    assert count_rows(owner, "public.signals") == 1

    # From here on nothing is sent.
    visit.requests.clear()
    answer = visit.insert()
    assert (answer["status"], answer["error"]["code"]) == (0, "arbiter_not_local")
    assert answer["error"]["message"] == "Cloud active"
    assert "POST signals" not in visit.requests


def test_while_a_table_is_only_observed_the_page_works_as_without_arbiter(
    visit: Visit, db: Database, owner: psycopg.Connection[Any], gateway: Gateway
) -> None:
    owner.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
    activate(backend(db), ADA)
    visit.shows("Watching")
    expect(visit.buy).to_be_enabled()
    answer = visit.insert()
    assert (answer["status"], answer["error"], answer["data"]) == (201, None, [{"source": "local"}])
    visit.press("unguarded")
    expect(visit.page.locator("#browser-outcome")).to_contain_text("written")

    owner.execute("select arbiter.protect('public.signals', p_mode => 'enforce')")
    visit.shows("Cloud active")
    expect(visit.buy).to_be_disabled()
    owner.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
    visit.shows("Watching")
    expect(visit.buy).to_be_enabled()
    gateway.close()
    visit.shows("Unknown")
    expect(visit.buy).to_be_enabled()
    # The machine has neither started nor stopped.
    expect(visit.page.locator("arbiter-toasts .toast")).to_have_count(0)
    assert count_rows(owner, "public.signals") == 2


def test_a_client_that_throws_gets_the_error_and_the_state(
    visit: Visit, db: Database, owner: psycopg.Connection[Any]
) -> None:
    set_period(owner, poll_interval="1 minute")
    visit.page.reload()
    visit.shows("Browser mode")
    activate(backend(db), ADA)
    code = visit.page.evaluate(
        """async (row) => {
          const arbiter = document.querySelector('arbiter-badge').arbiter;
          const { anonKey, userToken } = await config();
          const client = supabase.createClient(location.origin, anonKey, {
            accessToken: async () => userToken,
          });
          try {
            await arbiter.write(() => client.from('signals').insert(row).throwOnError());
          } catch (error) {
            return `${error.code} ${arbiter.status.code}`;
          }
        }""",
        new_signal(),
    )
    assert code == "WX001 cloud_active"
    assert count_rows(owner, "public.signals") == 0


# Unknown ------------------------------------------------------------------------------------------


def assert_unknown(visit: Visit) -> None:
    visit.shows("Unknown")
    expect(visit.buy).to_be_disabled()
    assert not visit.can_generate()
    visit.requests.clear()
    answer = visit.insert()
    assert (answer["status"], answer["error"]["code"]) == (0, "arbiter_unknown")
    assert "POST signals" not in visit.requests


def test_without_an_answer_nothing_is_generated(
    visit: Visit, gateway: Gateway, owner: psycopg.Connection[Any]
) -> None:
    gateway.close()
    assert_unknown(visit)
    assert count_rows(owner, "public.signals") == 0


def test_an_answer_that_does_not_come_is_given_up(visit: Visit, gateway: Gateway) -> None:
    pid = gateway.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert_unknown(visit)
    finally:
        os.kill(pid, signal.SIGCONT)
    visit.shows("Browser mode")
    expect(visit.buy).to_be_enabled()


def test_an_answer_that_is_no_yes_is_unknown(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    grant = "execute on function public.execution_status(text)"
    owner.execute(f"revoke {grant} from authenticated")
    assert_unknown(visit)
    assert visit.page.evaluate(f"{ARBITER}.error.code") == "42501"
    owner.execute(f"grant {grant} to authenticated")
    visit.shows("Browser mode")
    expect(visit.buy).to_be_enabled()
    assert visit.page.evaluate(f"{ARBITER}.error") is None


def test_offline_is_unknown_at_once(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    # No poll would notice, or end it, for a minute.
    set_period(owner, poll_interval="1 minute")
    visit.page.reload()
    visit.shows("Browser mode")
    visit.context.set_offline(True)
    assert_unknown(visit)
    visit.context.set_offline(False)
    visit.shows("Browser mode")
    expect(visit.buy).to_be_enabled()


def test_an_old_answer_is_none(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    set_period(owner, poll_interval="1 minute")
    visit.page.reload()
    visit.shows("Browser mode")
    # As on a device that wakes up: its monotonic clock stood still, and no timer has run yet.
    now = """(minutes) => {
      const now = Date.now;
      Date.now = () => now() + minutes * 60_000;
      const { canGenerate, status } = document.querySelector('arbiter-badge').arbiter;
      Date.now = now;
      return [canGenerate, status === null];
    }"""
    assert visit.page.evaluate(now, 1) == [True, False]
    assert visit.page.evaluate(now, 10) == [False, True]


def test_stopped_is_unknown_and_a_new_start_is_not(visit: Visit) -> None:
    visit.page.evaluate(f"window.ours = {ARBITER}; ours.stop()")
    visit.shows("Unknown")
    expect(visit.buy).to_be_disabled()
    visit.page.evaluate("ours.start()")
    visit.shows("Browser mode")
    expect(visit.buy).to_be_enabled()
    # Nothing started, nothing stopped: there is no news in that.
    expect(visit.page.get_by_role("log").get_by_role("button")).to_have_count(0)


# Polling ------------------------------------------------------------------------------------------


def hide(visit: Visit, is_hidden: bool) -> None:
    """Chromium without a window never hides a page, so the page is told that it is."""
    visit.page.evaluate(
        """(hidden) => {
          Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });
          document.dispatchEvent(new Event('visibilitychange'));
        }""",
        is_hidden,
    )


def poll_gap(visit: Visit) -> float:
    """Seconds between the next two polls."""
    with visit.page.expect_request(is_poll):
        pass
    first = time.monotonic()
    with visit.page.expect_request(is_poll):
        pass
    return time.monotonic() - first


def test_a_hidden_page_polls_less(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    assert poll_gap(visit) < 2
    hide(visit, True)
    with visit.page.expect_request(is_poll):
        pass  # one may have been due
    assert poll_gap(visit) > 2.5
    # Hidden is not unknown.
    assert visit.can_generate()

    set_period(owner, poll_interval="1 minute")
    with visit.page.expect_response(lambda response: is_poll(response.request)):
        pass
    began = time.monotonic()
    with visit.page.expect_request(is_poll):
        hide(visit, False)
    assert time.monotonic() - began < 5


def test_polls_neither_overlap_nor_pile_up(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    set_period(owner, poll_interval="1 minute")
    visit.page.reload()
    visit.shows("Browser mode")
    visit.requests.clear()
    visit.page.evaluate(f"Promise.all(Array.from({{length: 20}}, () => {ARBITER}.refresh()))")
    # The one under way, and one that was asked for after it.
    assert visit.requests.count("POST rpc/execution_status") == 2


def test_failed_polls_back_off(visit: Visit, gateway: Gateway) -> None:
    gateway.close()
    visit.shows("Unknown")
    visit.requests.clear()
    starts = []
    for _ in range(4):
        with visit.page.expect_request(is_poll):
            pass
        starts.append(time.monotonic())
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    # The pauses are 1, 2 and 4 s with jitter, so at least half of that; the first may be missed.
    assert gaps[-1] > 0.9
    assert sum(gaps) > 1.6


# The elements -------------------------------------------------------------------------------------


def test_the_countdown_is_the_servers(
    chromium: Browser, gateway: Gateway, db: Database, owner: psycopg.Connection[Any]
) -> None:
    set_period(owner, stop_grace="65 seconds")
    machine = activate(backend(db), ADA)
    set_status(backend(db), machine, "stopped")
    with visiting(chromium, gateway) as visit:
        # This device's clock is an hour behind: a countdown to retry_at by it would say 1:01:05.
        visit.page.add_init_script("const now = Date.now; Date.now = () => now() - 3_600_000;")
        visit.go()
        visit.shows(re.compile(r"^Cooling down 1:0[0-5]$"))
        visit.shows(re.compile(r"^Cooling down 0:5[6-9]$"))
        # A second is not announced: the live region holds the state alone.
        expect(visit.badge.get_by_role("status")).to_have_text("Cooling down")
        expect(visit.badge.get_by_role("timer")).to_have_text(re.compile("^0:5[0-9]$"))


def open_dialog(visit: Visit, db: Database, owner: psycopg.Connection[Any]) -> str:
    """A machine in error for long enough, and the dialog that comes of it."""
    set_period(owner, error_takeover_delay="200 milliseconds")
    machine = activate(backend(db), ADA)
    visit.shows("Cloud active")
    visit.page.locator("#filter").focus()
    set_status(backend(db), machine, "error")
    expect(visit.dialog).to_be_visible()
    return machine


def test_the_dialog_by_keyboard(visit: Visit, db: Database, owner: psycopg.Connection[Any]) -> None:
    keyboard = visit.page.keyboard
    open_dialog(visit, db, owner)
    expect(visit.dialog).to_contain_text("marked as stopped")
    no = visit.dialog.get_by_role("button", name="Not now")
    yes = visit.dialog.get_by_role("button", name="Take over")
    expect(no).to_be_focused()  # Enter without thinking does nothing
    expect(visit.page.get_by_role("button", name="Insert without asking")).to_be_visible()

    # Nothing behind the dialog gets the focus.
    seen = set()
    for _ in range(6):
        keyboard.press("Tab")
        seen.add(visit.page.evaluate("document.activeElement.localName"))
    assert seen <= {"arbiter-confirm", "body"}

    keyboard.press("Escape")
    expect(visit.dialog).to_be_hidden()
    expect(visit.page.locator("#filter")).to_be_focused()
    assert lease(owner, ADA).holder == "cloud"

    # It does not ask again by itself, but it can be asked to.
    for _ in range(3):
        with visit.page.expect_response(lambda response: is_poll(response.request)):
            pass
    expect(visit.dialog).to_be_hidden()
    visit.badge.get_by_role("button", name="Take over").focus()
    keyboard.press("Enter")
    expect(visit.dialog).to_be_visible()
    yes.focus()
    keyboard.press("Enter")
    expect(visit.dialog).to_be_hidden()
    visit.shows("Browser mode")
    expect(visit.toast(RESUMED)).to_be_visible()
    assert lease(owner, ADA).holder == "local"


def test_the_dialog_says_what_went_wrong_and_goes_when_the_machine_recovers(
    visit: Visit, db: Database, owner: psycopg.Connection[Any]
) -> None:
    machine = open_dialog(visit, db, owner)
    grant = "execute on function public.confirm_takeover(text)"
    owner.execute(f"revoke {grant} from authenticated")
    visit.dialog.get_by_role("button", name="Take over").click()
    expect(visit.dialog.get_by_role("alert")).to_contain_text("Not taken over: permission denied")
    owner.execute(f"grant {grant} to authenticated")

    set_status(backend(db), machine, "running")
    beat(backend(db), machine)
    expect(visit.dialog).to_be_hidden()
    visit.shows("Cloud active")
    # A later error is another question.
    set_status(backend(db), machine, "error")
    expect(visit.dialog).to_be_visible()
    expect(visit.dialog.get_by_role("alert")).to_have_count(0)


def test_toasts_by_keyboard(visit: Visit, db: Database) -> None:
    log = visit.page.get_by_role("log", name="Notifications")
    assert log.evaluate("(element) => element.ariaLive ?? 'polite'") == "polite"
    machine = activate(backend(db), ADA)
    expect(visit.toast(STARTED)).to_be_visible()
    set_status(backend(db), machine, "stopped")
    expect(visit.toast(COOLING)).to_be_visible()
    visit.page.locator("#filter").focus()
    log.get_by_role("button", name="Dismiss").first.focus()
    visit.page.keyboard.press("Escape")
    expect(log.get_by_text(STARTED)).to_have_count(0)
    expect(log.get_by_role("button", name="Dismiss").first).to_be_focused()
    while log.get_by_role("button").count():  # at most one more, or that the cool-down is over
        visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#filter")).to_be_focused()


def test_what_the_app_switched_off_stays_off(visit: Visit, db: Database) -> None:
    page = visit.page
    page.evaluate(
        """() => {
          window.done = [];
          const add = (html) => document.body.insertAdjacentHTML('beforeend', html);
          add('<button id="early" data-arbiter-generates>early</button>');
          add('<a id="link" href="#there" data-arbiter-generates>link</a>');
          add('<form id="form" data-arbiter-generates><input id="field"><button id="send">send' +
              '</button></form>');
          add('<fieldset id="set" data-arbiter-generates><button id="inner">inner</button>' +
              '</fieldset>');
          for (const id of ['early', 'link', 'inner', 'field']) {
            document.getElementById(id).addEventListener('click', () => done.push(id));
          }
          document.getElementById('form').addEventListener('submit', (event) => {
            event.preventDefault();
            done.push('form');
          });
        }"""
    )
    markup = """() => ['buy', 'sell', 'early', 'link', 'form', 'set']
      .map((id) => document.getElementById(id).outerHTML)"""
    before = page.evaluate(markup)
    expect(page.locator("#buy")).to_be_enabled()
    expect(page.locator("#sell")).to_be_disabled()

    machine = activate(backend(db), ADA)
    visit.shows("Cloud active")
    for id_ in ("buy", "sell", "early", "inner"):
        expect(page.locator(f"#{id_}")).to_be_disabled()
    expect(page.locator("#link")).to_have_attribute("aria-disabled", "true")

    # A marked element that is added later is off, too; one that loses the mark is not.
    page.evaluate(
        """() => {
          document.body.insertAdjacentHTML('beforeend',
            '<p><button id="late" data-arbiter-generates>late</button></p>');
          document.getElementById('late').addEventListener('click', () => done.push('late'));
        }"""
    )
    expect(page.locator("#late")).to_be_disabled()
    page.evaluate("document.getElementById('late').removeAttribute('data-arbiter-generates')")
    expect(page.locator("#late")).to_be_enabled()
    page.evaluate("document.getElementById('late').setAttribute('data-arbiter-generates', '')")
    expect(page.locator("#late")).to_be_disabled()

    # A framework that switches it on again, and clicks in the same turn; a link; a form.
    page.evaluate(
        """() => {
          const early = document.getElementById('early');
          early.disabled = false;
          early.click();
          document.getElementById('link').click();
          document.getElementById('form').requestSubmit();
          document.getElementById('send').click();
          document.getElementById('field').click();
        }"""
    )
    expect(page.locator("#early")).to_be_disabled()
    assert page.evaluate("done") == ["field"]  # filling in a form generates nothing
    assert "#there" not in page.url

    # Meanwhile the app has switched one off for reasons of its own, and another one on.
    page.evaluate("document.getElementById('early').disabled = true")
    page.locator("#allow-sell").check()
    expect(page.locator("#sell")).to_be_disabled()

    backend(db).execute("delete from public.cloud_machines where id = %s", (machine,))
    visit.shows("Browser mode")
    expect(page.locator("#sell")).to_be_enabled()
    expect(page.locator("#early")).to_be_disabled()
    page.evaluate("document.getElementById('early').disabled = false")
    page.locator("#allow-sell").uncheck()
    assert page.evaluate(markup) == before
    page.evaluate(
        "for (const id of ['early', 'link', 'inner', 'send']) document.getElementById(id).click()"
    )
    assert page.evaluate("done") == ["field", "early", "link", "inner", "form"]


def test_an_element_shows_the_arbiter_that_it_is_given(visit: Visit) -> None:
    visit.page.evaluate(
        """async () => {
          const { Arbiter } = await import('/arbiter/arbiter.js');
          const { anonKey } = await config();
          const client = supabase.createClient(location.origin, anonKey);
          window.nobody = new Arbiter(client, { root: null });
          const badge = document.createElement('arbiter-badge');
          badge.id = 'other';
          badge.arbiter = nobody;
          document.body.append(badge);
          await nobody.refresh();
        }"""
    )
    # A visitor who has not signed in may not ask.
    expect(visit.page.locator("#other")).to_have_text("Unknown")
    expect(visit.badge.first).to_have_text("Browser mode")
    visit.page.evaluate(f"document.getElementById('other').arbiter = {ARBITER}")
    expect(visit.page.locator("#other")).to_have_text("Browser mode")


def test_text_of_the_database_is_no_markup(visit: Visit, owner: psycopg.Connection[Any]) -> None:
    text = "<img src=x onerror='window.hacked = 1'>"
    owner.execute(
        "insert into public.signals (trader_id, symbol, interval, signal, bar_time)"
        " values (%s, %s, '1m', 'buy', now())",
        (TRADER, text),
    )
    expect(visit.page.locator("#signals").get_by_text(text)).to_be_visible()
    visit.page.evaluate("(text) => document.querySelector('arbiter-toasts').show(text)", text)
    expect(visit.toast(text)).to_be_visible()
    assert visit.page.evaluate("window.hacked ?? 0") == 0


def test_without_the_whole_address_the_page_has_no_keys(
    chromium: Browser, gateway: Gateway
) -> None:
    context = chromium.new_context()
    try:
        for key in ("", "#", "#x"):
            page = context.new_page()
            page.goto(f"{gateway.url}/{key}")
            expect(page.locator("#about")).to_contain_text("Open the whole address")
            assert page.evaluate("(async () => (await fetch('/config.json')).status)()") == 401
            page.close()
    finally:
        context.close()


def test_a_page_of_another_origin_gets_nothing(chromium: Browser, gateway: Gateway) -> None:
    """Neither one whose own name was made to lead to the demo, nor one that asks across origins."""
    port = gateway.port
    rebound = [*ARGUMENTS, "--host-resolver-rules=MAP evil.example 127.0.0.1"]
    with chromium.browser_type.launch(executable_path=CHROMIUM, args=rebound) as browser:
        page = browser.new_page()
        answer = page.goto(f"http://evil.example:{port}/")
        assert answer is not None
        assert answer.status == 421
        ask = """async (url) => {
          try {
            return (await fetch(url, { headers: { Authorization: 'Bearer x' } })).status;
          } catch (error) {
            return String(error);
          }
        }"""
        for path in ("config.json", "rest/v1/signals"):
            assert page.evaluate(ask, f"http://evil.example:{port}/{path}") == 421
            across = page.evaluate(ask, f"http://127.0.0.1:{port}/{path}")
            assert across == "TypeError: Failed to fetch"


# Everybody ----------------------------------------------------------------------------------------

#: How many texts there are, and those with less contrast than WCAG 2 AA asks for. What is disabled
#: is exempt.
LOW_CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parent = (node) => node.assignedSlot ?? node.parentElement ?? node.getRootNode().host;
  const back = (element) => {
    for (let e = element; e; e = parent(e)) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    throw new Error('nothing behind a text is opaque');
  };
  const found = [];
  let checked = 0;
  const visit = (root) => {
    for (const element of root.querySelectorAll('*')) {
      if (element.shadowRoot) visit(element.shadowRoot);
      const isText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      const isExempt = element.matches(':disabled, option, title');
      if (!isText || isExempt || !element.checkVisibility()) continue;
      const [a, b] = [rgba(getComputedStyle(element).color), back(element)].map(luminance);
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      checked += 1;
      if (contrast < 4.5) found.push(`${element.textContent.trim()}: ${contrast.toFixed(2)}`);
    }
  };
  visit(document);
  return [checked, found];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(
    chromium: Browser,
    gateway: Gateway,
    db: Database,
    owner: psycopg.Connection[Any],
    tmp_path: Path,
    scheme: str,
) -> None:
    """In both schemes and on a phone: every state's colours, and nothing wider than the screen."""
    set_period(owner, stop_grace="1 minute", error_takeover_delay="200 milliseconds")
    service = backend(db)
    with visiting(
        chromium, gateway, color_scheme=scheme, reduced_motion="reduce", viewport=PHONE
    ) as visit:
        page = visit.page

        def look(badge: str | re.Pattern[str]) -> None:
            visit.shows(badge)
            name = page.locator("arbiter-badge .badge").get_attribute("data-state")
            page.screenshot(path=tmp_path / f"{scheme}-{name}.png", full_page=True)
            checked, found = page.evaluate(LOW_CONTRAST)
            assert checked > 30
            assert found == []
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

        visit.go()
        look("Browser mode")
        owner.execute("select arbiter.protect('public.signals', p_mode => 'observe')")
        machine = activate(service, ADA)
        look("Watching")
        owner.execute("select arbiter.protect('public.signals', p_mode => 'enforce')")
        look("Cloud active")
        set_status(service, machine, "stopped")
        look(re.compile("^Cooling down"))
        set_status(service, machine, "running")
        beat(service, machine)
        visit.shows("Cloud active")
        set_status(service, machine, "error")
        expect(visit.dialog).to_be_visible()
        look("Cloud failed Take over …")
        page.keyboard.press("Escape")
        gateway.close()
        look("Unknown")


def test_the_light_and_the_dark_page_differ(chromium: Browser, gateway: Gateway) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        with visiting(chromium, gateway, color_scheme=scheme) as visit:
            visit.go()
            visit.shows("Browser mode")
            for element in ("body", "arbiter-badge .badge"):
                style = "(element) => getComputedStyle(element).backgroundColor"
                colours.add(visit.page.locator(element).evaluate(style))
    assert len(colours) == 4


def test_everything_has_a_role_and_a_name(
    visit: Visit, db: Database, owner: psycopg.Connection[Any]
) -> None:
    open_dialog(visit, db, owner)
    body = visit.page.locator("body")
    expect(body).to_match_aria_snapshot(
        """
        - main:
          - region "Browser":
            - heading "Browser" [level=2]
            - status: Cloud failed
            - button "Take over …"
            - combobox "Symbol"
            - 'button "Signal: buy" [disabled]'
        - log "Notifications":
          - text: Cloud machine started - switching to monitoring mode
          - button "Dismiss"
        - dialog "Take over from the cloud machine?":
          - heading "Take over from the cloud machine?" [level=2]
          - button "Not now"
          - button "Take over"
        """
    )
    controls = "button|checkbox|combobox|switch|region|table|dialog|log"
    lines = [line.strip() for line in body.aria_snapshot().splitlines()]
    found = [line for line in lines if re.match(rf"- '?({controls})\b", line)]
    assert len(found) > 15
    assert [line for line in found if not re.match(rf"- '?({controls}) \"\S", line)] == []


# The demo -----------------------------------------------------------------------------------------

RUN = """
import os, sys
from arbiter_db.demo.web import run

sys.exit(run(major=int(os.environ["PG"])))
"""


def test_the_demo_serves_until_it_is_interrupted(db: Database) -> None:
    major = str(db.server.major)
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PG": major, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/#([\w-]{32,})", line)
            assert found, line
            assert "PostgreSQL " + major in line
            assert "<arbiter-badge>" in httpx.get(found[0]).text
            config = found[0].partition("#")[0] + "config.json"
            assert httpx.get(config).status_code == 401
            key = {"Authorization": f"Bearer {found[1]}"}
            assert "serviceKey" in httpx.get(config, headers=key).json()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(found[0])
