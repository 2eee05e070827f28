// Read-only mode and the elements, on a page that changes only when the test changes it.

import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, it } from 'node:test';
import {
  bad, Client, clock, closePage, CLOUD, CONFIRMABLE, COOLING, FAILED, good, listen, LOCAL, observed, openPage,
  settle, WATCHING,
} from './harness.mjs';

let page;
let client;
let arbiter;

/** Open a page with this body, and start an Arbiter on it. */
async function open(body, options) {
  page = await openPage(body);
  clock.install();
  client = new Client();
  arbiter = new page.Arbiter(client, options);
}

/** Start, with this as the first answer. */
async function startWith(answer) {
  arbiter.start();
  await client.last.answer(good(answer));
}

async function poll(answer) {
  arbiter.refresh();
  await client.last.answer(good(answer));
}

async function failPoll() {
  arbiter.refresh();
  await client.last.answer(bad({ message: 'no' }));
}

const $ = (selector) => page.document.querySelector(selector);

beforeEach(() => {
  arbiter = undefined;
});

afterEach(async () => {
  arbiter?.stop();
  clock.uninstall();
  closePage();
  await page.window.happyDOM.abort();
  assert.deepEqual(page.errors, []);
});

describe('read-only mode', () => {
  const BODY = `
    <button id="buy" data-arbiter-generates>buy</button>
    <button id="sell" data-arbiter-generates disabled>sell</button>
    <button id="filter">filter</button>
    <a id="link" data-arbiter-generates>link</a>
    <a id="dead" data-arbiter-generates aria-disabled="true">dead</a>
    <form id="form" data-arbiter-generates><input id="field"><button id="send" type="button">send</button></form>
    <form id="other"><button id="marked" type="button" data-arbiter-generates><b id="bold">both</b></button></form>
    <div id="panel"></div>`;

  const isOff = (id) => {
    const element = $(`#${id}`);
    return 'disabled' in element ? element.disabled : element.getAttribute('aria-disabled') === 'true';
  };
  const off = () => ['buy', 'sell', 'filter', 'link', 'dead', 'form', 'marked'].filter(isOff);
  const ALL = ['buy', 'sell', 'link', 'dead', 'form', 'marked'];
  const APPS = ['sell', 'dead'];

  beforeEach(() => open(BODY));

  it('begins with the start, before any answer', () => {
    assert.deepEqual(off(), APPS);
    arbiter.start();
    assert.deepEqual(off(), ALL);
  });

  it('is off while every table is only observed, until a stop', async () => {
    await startWith(WATCHING);
    assert.deepEqual(off(), APPS);
    await failPoll();
    assert.deepEqual(off(), APPS);
    arbiter.stop();
    assert.deepEqual(off(), ALL);
  });

  it('begins again when enforcing does', async () => {
    await startWith(WATCHING);
    await poll(CLOUD);
    assert.deepEqual(off(), ALL);
    await poll(WATCHING);
    assert.deepEqual(off(), APPS);
  });

  it('ends with the first yes, and leaves the page as it was', async () => {
    const before = page.document.body.innerHTML;
    await startWith(LOCAL);
    assert.equal(page.document.body.innerHTML, before);
  });

  for (const answer of [CLOUD, COOLING, FAILED, CONFIRMABLE]) {
    it(`holds while the state is ${answer.message}, ${answer.retry_at}`, async () => {
      await startWith(LOCAL);
      await poll(answer);
      assert.deepEqual(off(), ALL);
      await poll(LOCAL);
      assert.deepEqual(off(), APPS);
    });
  }

  it('begins as soon as the state is unknown: a failed poll, an old answer, no network, a stop', async () => {
    await startWith(LOCAL);
    await failPoll();
    assert.deepEqual(off(), ALL);

    await poll(LOCAL);
    assert.deepEqual(off(), APPS);
    page.window.dispatchEvent(new page.window.Event('offline'));
    assert.deepEqual(off(), ALL);

    await poll(LOCAL);
    arbiter.stop();
    assert.deepEqual(off(), ALL);
    assert.deepEqual([$('#sell'), $('#filter')].map((e) => e.hasAttribute('data-arbiter-held')), [false, false]);

    await startWith(LOCAL);
    client.calls.length = 0;
    await clock.advance(9_749); // the next poll is under way, and given up at 9,750
    assert.equal(client.count, 1);
    assert.deepEqual(off(), APPS);
    await clock.advance(1);
    assert.deepEqual(off(), ALL);
  });

  it('is there already when the app hears of the change', async () => {
    await startWith(LOCAL);
    const seen = [];
    arbiter.addEventListener('change', () => seen.push(off().length));
    await poll(CLOUD);
    await poll(LOCAL);
    assert.deepEqual(seen, [ALL.length, APPS.length]);
  });

  it('takes in what is added meanwhile', async () => {
    await startWith(CLOUD);
    $('#panel').innerHTML = '<p><button id="new" data-arbiter-generates>new</button></p>';
    await observed();
    assert.equal(isOff('new'), true);
  });

  it('takes in what is added, marked and unmarked meanwhile', async () => {
    await startWith(CLOUD);
    $('#panel').innerHTML = '<p><button id="new" data-arbiter-generates>new</button></p>';
    $('#filter').setAttribute('data-arbiter-generates', '');
    $('#buy').removeAttribute('data-arbiter-generates');
    await observed();
    assert.equal(isOff('new'), true);
    assert.equal(isOff('filter'), true);
    assert.equal(isOff('buy'), false);
    assert.equal($('#buy').hasAttribute('data-arbiter-held'), false);
    await poll(LOCAL);
    assert.equal(isOff('new'), false);
    assert.equal(isOff('filter'), false);
  });

  it('switches off again what a framework switches on', async () => {
    await startWith(CLOUD);
    $('#buy').disabled = false;
    $('#link').removeAttribute('aria-disabled');
    await observed();
    assert.deepEqual(off(), ALL);
    await poll(LOCAL);
    assert.deepEqual(off(), APPS);
  });

  it('does not switch on what the app has switched off meanwhile', async () => {
    await startWith(CLOUD);
    $('#buy').setAttribute('disabled', 'disabled');
    $('#link').setAttribute('aria-disabled', 'true');
    await observed();
    await poll(LOCAL);
    assert.deepEqual(off(), ['buy', 'sell', 'link', 'dead']);
  });

  it('not even when the answer comes before the observer', async () => {
    await startWith(CLOUD);
    arbiter.addEventListener('change', () => undefined);
    arbiter.refresh();
    const answered = client.last.answer(good(LOCAL)); // read after the next line
    $('#buy').setAttribute('disabled', 'disabled');
    await answered;
    assert.deepEqual(off(), ['buy', 'sell', 'dead']);
  });

  it('lets another attribute of an element that it holds be', async () => {
    await startWith(CLOUD);
    $('#buy').setAttribute('aria-disabled', 'true'); // not the one by which a button is switched off
    await observed();
    await poll(LOCAL);
    assert.equal(isOff('buy'), false);
  });

  it('leaves alone what is below another root, or everything', async () => {
    for (const root of [null, $('#panel')]) {
      const other = new page.Arbiter(client, { root });
      other.start();
      assert.deepEqual(off(), APPS);
      other.stop();
      await settle();
    }
    $('#panel').innerHTML = '<button id="new" data-arbiter-generates>new</button>';
    const other = new page.Arbiter(client, { root: $('#panel') });
    other.start();
    assert.equal(isOff('new'), true);
    other.stop();
  });

  /** Send an event as a person does; what the page did with it. */
  function send(type, id, properties = {}) {
    const reached = [];
    const hear = (event) => reached.push(event.type);
    const target = $(`#${id}`);
    target.addEventListener(type, hear);
    const event = new page.window.Event(type, { bubbles: true, cancelable: true, composed: true });
    for (const [name, value] of Object.entries(properties)) Object.defineProperty(event, name, { value });
    const goesOn = target.dispatchEvent(event);
    target.removeEventListener(type, hear);
    assert.equal(goesOn, reached.length > 0);
    return goesOn;
  }

  it('stops clicks on what generates, and no others', async () => {
    await startWith(CLOUD);
    $('#bold').closest('button').disabled = false; // as a framework does, a moment before the click
    assert.equal(send('click', 'link'), false);
    assert.equal(send('click', 'bold'), false);
    assert.equal(send('click', 'field'), true);
    assert.equal(send('click', 'send'), true);
    assert.equal(send('click', 'filter'), true);
    await poll(LOCAL);
    for (const id of ['link', 'bold', 'field', 'filter']) assert.equal(send('click', id), true);
  });

  it('stops a marked form from being sent, and any form by a marked button', async () => {
    await startWith(CLOUD);
    assert.equal(send('submit', 'form'), false);
    assert.equal(send('submit', 'form', { submitter: null }), false);
    assert.equal(send('submit', 'other'), true);
    assert.equal(send('submit', 'other', { submitter: $('#filter') }), true);
    assert.equal(send('submit', 'other', { submitter: $('#marked') }), false);
    await poll(LOCAL);
    assert.equal(send('submit', 'form'), true);
    assert.equal(send('submit', 'other', { submitter: $('#marked') }), true);
  });

  it('stops them by what is true at that moment', async () => {
    await startWith(LOCAL);
    clock.wall += 60_000; // no timer has run
    assert.equal(send('click', 'link'), false);
    await poll(LOCAL);
    assert.equal(send('click', 'link'), true);
  });

  it('neither stops nor observes anything more when it is stopped', async () => {
    await startWith(CLOUD);
    arbiter.stop();
    assert.equal(send('click', 'link'), true);
    assert.equal(send('submit', 'form'), true);
    $('#panel').innerHTML = '<button id="new" data-arbiter-generates>new</button>';
    $('#buy').disabled = false;
    await observed();
    assert.equal(isOff('new'), false);
    assert.equal(isOff('buy'), false);
    await poll(LOCAL);
    assert.equal(isOff('link'), true); // off until an Arbiter that is started allows it
    await startWith(LOCAL);
    assert.deepEqual(off(), APPS);
  });
});

describe('<arbiter-badge>', () => {
  const text = (badge = $('arbiter-badge')) => badge.shadowRoot.textContent.trim().replace(/\s+/g, ' ');
  const inner = (selector) => $('arbiter-badge').shadowRoot.querySelector(selector);
  const data = () =>
    Object.fromEntries(['state', 'machine'].map((name) => [name, inner('.badge').getAttribute(`data-${name}`)]));

  beforeEach(() => open('<arbiter-badge></arbiter-badge>'));

  it('says what is known', async () => {
    assert.equal(text(), 'Unknown');
    assert.deepEqual(data(), { state: 'unknown', machine: '' });
    await startWith(LOCAL);
    assert.equal(text(), 'Browser mode');
    assert.deepEqual(data(), { state: 'local', machine: '' });
    await poll(CLOUD);
    assert.equal(text(), 'Cloud active');
    assert.deepEqual(data(), { state: 'cloud_active', machine: 'running' });
    await poll(FAILED);
    assert.equal(text(), 'Cloud failed');
    assert.deepEqual(data(), { state: 'takeover_unconfirmed', machine: 'error' });
    await poll(CONFIRMABLE);
    assert.equal(text(), 'Cloud failed Take over …');
    await poll({ ...LOCAL, message: 'Cloud starting', machine_state: 'starting' });
    assert.equal(text(), 'Cloud starting');
    assert.deepEqual(data(), { state: 'local', machine: 'starting' });
    await poll(WATCHING);
    assert.equal(text(), 'Watching');
    assert.deepEqual(data(), { state: 'watching', machine: 'running' });
    await failPoll();
    assert.equal(text(), 'Unknown');
    assert.deepEqual(data(), { state: 'unknown', machine: '' });
  });

  it('shows a text of the server as text', async () => {
    await startWith({ ...LOCAL, message: '<b>bold</b>' });
    assert.equal(text(), '<b>bold</b>');
    assert.equal(inner('b'), null);
  });

  it('says in a live region what it says, and touches it only when that changes', async () => {
    await startWith(LOCAL);
    const region = inner('[role=status]');
    assert.equal(region.textContent, 'Browser mode');
    const node = region.firstChild;
    await poll({ ...LOCAL, epoch: 5 });
    assert.equal(region.firstChild, node);
    await poll(CLOUD);
    assert.equal(region.textContent, 'Cloud active');
  });

  it('counts down by the second', async () => {
    arbiter.start();
    await client.last.answer(good({ ...COOLING, retry_at: '2026-01-05T09:21:05.500+00:00', poll_interval: '00:01:00' }));
    client.replies = () => good(LOCAL);
    const timer = inner('[role=timer]');
    assert.equal(text(), 'Cooling down 1:06');
    assert.equal(inner('[role=status]').textContent, 'Cooling down');
    assert.equal(timer.getAttribute('aria-label'), 'time left');
    await clock.advance(499);
    assert.equal(timer.textContent, '1:06');
    await clock.advance(1);
    assert.equal(timer.textContent, '1:05');
    await clock.advance(999);
    assert.equal(timer.textContent, '1:05');
    await clock.advance(1);
    assert.equal(timer.textContent, '1:04');
    await clock.advance(5_000);
    assert.equal(timer.textContent, '0:59');
    await clock.advance(50_000);
    assert.equal(timer.textContent, '0:09');
  });

  it('counts minutes', async () => {
    await startWith({ ...COOLING, retry_at: '2026-01-05T09:22:01+00:00' });
    assert.equal(text(), 'Cooling down 2:01');
  });

  it('changes only what is new, so that its button keeps the focus', async () => {
    await startWith(CONFIRMABLE);
    // happy-dom gives them to the observer after a while: on a busy machine sooner than the test takes them.
    const records = [];
    const observer = new page.window.MutationObserver((found) => records.push(...found));
    observer.observe(inner('.badge'), { childList: true });
    await poll({ ...CONFIRMABLE, epoch: 3 });
    assert.deepEqual([...records, ...observer.takeRecords()], []);
    await poll(CLOUD);
    assert.equal(records.length + observer.takeRecords().length, 1);
    observer.disconnect();
  });

  it('can be styled', () => {
    assert.equal(inner('.badge').getAttribute('part'), 'badge');
    assert.equal(inner('.badge > .dot').getAttribute('aria-hidden'), 'true');
  });

  it('ends the countdown at zero, and with the state', async () => {
    await poll({ ...COOLING, retry_at: '2026-01-05T09:20:02+00:00', poll_interval: '00:01:00' });
    $('arbiter-badge').arbiter = arbiter;
    assert.equal(text(), 'Cooling down 0:02');
    await clock.advance(2_000);
    assert.equal(text(), 'Cooling down 0:00');
    assert.equal(clock.timers.size, 1); // the answer's expiry
    await poll({ ...COOLING, retry_at: null });
    assert.equal(text(), 'Cooling down');
    await poll(COOLING);
    assert.equal(text(), 'Cooling down 0:27');
    await poll(LOCAL);
    assert.equal(text(), 'Browser mode');
    assert.equal(clock.timers.size, 1);
  });

  it('has no countdown in other states', async () => {
    await startWith(FAILED);
    assert.notEqual(arbiter.remaining, null);
    assert.equal(text(), 'Cloud failed');
  });

  it('asks for a confirmation when its button is pressed', async () => {
    await startWith(CONFIRMABLE);
    const events = listen(arbiter);
    inner('button').click();
    assert.deepEqual(events.all(), [['confirm', arbiter.status]]);
  });
});

describe('the Arbiter of an element', () => {
  const shows = (selector = 'arbiter-badge') => $(selector).shadowRoot.querySelector('[role=status]').textContent;

  beforeEach(() => open('<arbiter-badge></arbiter-badge>', { root: null }));

  it('is the one that was started first', async () => {
    const second = new page.Arbiter(client, { root: null });
    assert.equal($('arbiter-badge').arbiter, null);
    await startWith(LOCAL);
    second.start();
    await client.last.answer(good(CLOUD));
    assert.equal($('arbiter-badge').arbiter, arbiter);
    assert.equal(shows(), 'Browser mode');
    second.stop();
    assert.equal($('arbiter-badge').arbiter, arbiter);
    arbiter.stop();
    assert.equal($('arbiter-badge').arbiter, null);
    assert.equal(shows(), 'Unknown');
    second.start();
    await client.last.answer(good(CLOUD));
    assert.equal(shows(), 'Cloud active');
    second.stop();
  });

  it('is the one that it was given, until it is given none', async () => {
    const own = new page.Arbiter(client, { root: null });
    await startWith(LOCAL);
    $('arbiter-badge').arbiter = own;
    assert.equal($('arbiter-badge').arbiter, own);
    assert.equal(shows(), 'Unknown');
    own.refresh();
    await client.last.answer(good(CLOUD));
    assert.equal(shows(), 'Cloud active');
    await poll({ ...LOCAL, message: 'Other' });
    assert.equal(shows(), 'Cloud active');
    for (const none of [null, undefined]) {
      $('arbiter-badge').arbiter = none;
      assert.equal($('arbiter-badge').arbiter, arbiter);
      assert.equal(shows(), 'Other');
      $('arbiter-badge').arbiter = own;
    }
  });

  it('is shown by an element that comes later, and not by one that went', async () => {
    await startWith(CLOUD);
    const later = page.document.createElement('arbiter-badge');
    later.id = 'later';
    page.document.body.append(later);
    assert.equal(shows('#later'), 'Cloud active');
    const first = $('arbiter-badge');
    let updates = 0;
    const { update } = first;
    first.update = () => {
      updates += 1;
      update.call(first);
    };
    first.remove();
    updates = 0;
    await poll(LOCAL);
    arbiter.stop();
    assert.equal(updates, 0);
    assert.equal(shows('#later'), 'Unknown');
    page.document.body.append(first);
    assert.equal(updates, 1);
    await startWith(LOCAL);
    assert.equal(first.shadowRoot.querySelector('[role=status]').textContent, 'Browser mode');
  });

  it('is listened to once, however often it is bound', async () => {
    const badge = $('arbiter-badge');
    badge.arbiter = arbiter;
    badge.arbiter = arbiter;
    arbiter.start();
    let updates = 0;
    badge.update = () => {
      updates += 1;
    };
    await client.last.answer(good(LOCAL));
    assert.equal(updates, 1);
  });

  it('counts no time for an element that went', async () => {
    await startWith(COOLING);
    const before = clock.timers.size;
    $('arbiter-badge').remove();
    assert.equal(clock.timers.size, before - 1);
  });

  it('has styles of its own, shared by all elements', () => {
    const badge = $('arbiter-badge');
    const [sheet] = badge.shadowRoot.adoptedStyleSheets;
    assert.equal(badge.shadowRoot.mode, 'open');
    assert.ok(sheet.cssRules.length > 30);
    const other = page.document.createElement('arbiter-toasts');
    assert.deepEqual(other.shadowRoot.adoptedStyleSheets, [sheet]);
  });
});

describe('<arbiter-toasts>', () => {
  const STARTED = 'Cloud machine started - switching to monitoring mode';
  const STOPPED = 'Cloud machine stopped - browser mode';
  const COOLS = 'Cloud machine stopped - cooling down before browser mode';
  const FAILS = 'Cloud machine failed - nobody generates signals until it recovers or you take over';
  const RESUMED = 'Browser mode - signals are generated here again';

  const log = () => $('arbiter-toasts').shadowRoot.querySelector('[role=log]');
  const toasts = () => [...log().children];
  const texts = () => toasts().map((toast) => toast.querySelector('span').textContent);
  const send = (element, type, properties = {}) =>
    element.dispatchEvent(Object.assign(new page.window.Event(type, { bubbles: true }), properties));

  beforeEach(() => open('<arbiter-toasts></arbiter-toasts><button id="before">before</button>', { root: null }));

  it('tell each event once, and nothing else', async () => {
    for (const [answer, told] of [
      [CLOUD, []],
      [CLOUD, []],
      [COOLING, [COOLS]],
      [COOLING, [COOLS]],
      [LOCAL, [COOLS, RESUMED]],
      [{ ...LOCAL, message: 'Cloud starting', machine_state: 'starting' }, [COOLS, RESUMED]],
      [CLOUD, [COOLS, RESUMED, STARTED]],
      [null, [COOLS, RESUMED, STARTED]],
      [CLOUD, [COOLS, RESUMED, STARTED]],
      [LOCAL, [RESUMED, STARTED, STOPPED]], // three at most
      [CLOUD, [STARTED, STOPPED, STARTED]],
      [FAILED, [STOPPED, STARTED, FAILS]],
      [CONFIRMABLE, [STOPPED, STARTED, FAILS]],
      [LOCAL, [STARTED, FAILS, RESUMED]],
    ]) {
      if (answer === null) await failPoll();
      else if (!client.count) await startWith(answer);
      else await poll(answer);
      assert.deepEqual(texts(), told);
    }
    arbiter.stop();
    await startWith(CLOUD);
    assert.deepEqual(texts(), [STARTED, FAILS, RESUMED]);
  });

  it('can be styled, and are told to a screen reader when they come', () => {
    $('arbiter-toasts').show('one');
    assert.equal(log().className, 'toasts');
    assert.equal(log().getAttribute('part'), 'toasts');
    assert.equal(log().getAttribute('aria-label'), 'Notifications');
    assert.equal(log().getAttribute('aria-relevant'), 'additions');
    assert.deepEqual(toasts().map((toast) => [toast.className, toast.getAttribute('part')]), [['toast', 'toast']]);
  });

  it('leave after 8 s, each by its own time', async () => {
    const element = $('arbiter-toasts');
    element.show('one');
    await clock.advance(3_000);
    element.show('<b>two</b>');
    assert.deepEqual(texts(), ['one', '<b>two</b>']);
    await clock.advance(4_999);
    assert.deepEqual(texts(), ['one', '<b>two</b>']);
    await clock.advance(1);
    assert.deepEqual(texts(), ['<b>two</b>']);
    await clock.advance(2_999);
    assert.deepEqual(texts(), ['<b>two</b>']);
    await clock.advance(1);
    assert.deepEqual(texts(), []);
  });

  for (const [begin, end] of [['mouseenter', 'mouseleave'], ['focusin', 'focusout']]) {
    it(`stay from ${begin} to 8 s after ${end}`, async () => {
      $('arbiter-toasts').show('one');
      const [toast] = toasts();
      await clock.advance(7_000);
      send(toast, begin);
      await clock.advance(60_000);
      assert.deepEqual(texts(), ['one']);
      send(toast, end);
      send(toast, end); // the time begins anew
      await clock.advance(7_999);
      assert.deepEqual(texts(), ['one']);
      await clock.advance(1);
      assert.deepEqual(texts(), []);
      assert.equal(clock.timers.size, 0);
    });
  }

  it('go by their button and by Escape, one at a time', () => {
    for (const text of ['one', 'two', 'three']) $('arbiter-toasts').show(text);
    assert.equal(toasts()[1].querySelector('button').getAttribute('aria-label'), 'Dismiss');
    toasts()[1].querySelector('button').click();
    assert.deepEqual(texts(), ['one', 'three']);
    send(toasts()[0], 'keydown', { key: 'Enter' });
    assert.deepEqual(texts(), ['one', 'three']);
    send(toasts()[0], 'keydown', { key: 'Escape' });
    assert.deepEqual(texts(), ['three']);
  });

  it('hand the focus on: to the next, to the one before, to where it came from', () => {
    const focused = () => $('arbiter-toasts').shadowRoot.activeElement;
    for (const text of ['one', 'two', 'three']) $('arbiter-toasts').show(text);
    const [one, two, three] = toasts().map((toast) => toast.querySelector('button'));
    const before = $('#before');
    before.focus();
    send(one, 'focusin', { relatedTarget: before });
    two.focus();
    send(two, 'focusin', { relatedTarget: one });
    two.click();
    assert.equal(focused(), three);
    three.click();
    assert.equal(focused(), one);
    one.click();
    assert.deepEqual(texts(), []);
    assert.equal(page.document.activeElement, before);
  });

  it('leave the focus where it is when they did not have it', () => {
    for (const text of ['one', 'two']) $('arbiter-toasts').show(text);
    $('#before').focus();
    toasts()[0].querySelector('button').click();
    assert.equal(page.document.activeElement, $('#before'));
    assert.equal($('arbiter-toasts').shadowRoot.activeElement, null);
  });

  it('let the focus go when it came from nowhere', () => {
    $('arbiter-toasts').show('one');
    const [button] = toasts().map((toast) => toast.querySelector('button'));
    send(button, 'focusin', { relatedTarget: null });
    button.focus();
    button.click();
    assert.deepEqual(texts(), []);
  });

  it('let the focus go when where it came from is gone', () => {
    $('arbiter-toasts').show('one');
    const [button] = toasts().map((toast) => toast.querySelector('button'));
    const before = $('#before');
    send(button, 'focusin', { relatedTarget: before });
    button.focus();
    before.remove();
    button.click();
    assert.deepEqual(texts(), []);
  });
});

describe('<arbiter-confirm>', () => {
  const dialog = () => $('arbiter-confirm').shadowRoot.querySelector('dialog');
  const button = (text) => [...dialog().querySelectorAll('button')].find((b) => b.textContent === text);
  const problem = () => dialog().querySelector('[role=alert]').textContent;

  beforeEach(() => open('<arbiter-confirm></arbiter-confirm>', { root: null }));

  it('asks when a confirmation has become possible, also with the first answer', async () => {
    assert.equal(dialog().open, false);
    await startWith(CONFIRMABLE);
    assert.equal(dialog().open, true);
    assert.equal(
      dialog().querySelector('#text').textContent,
      'Your cloud machine has reported an error and has not recovered. If you take over, this browser generates' +
        ' signals again and the machine is marked as stopped. Orders that it has sent already stay sent.',
    );
    assert.equal(dialog().getAttribute('aria-labelledby'), 'title');
    assert.equal(dialog().querySelector('#title').textContent, 'Take over from the cloud machine?');
    assert.notEqual(dialog().querySelector(`#${dialog().getAttribute('aria-describedby')}`), null);
    assert.equal(button('Not now').hasAttribute('autofocus'), true);
  });

  it('can be styled', () => {
    assert.equal(dialog().getAttribute('part'), 'dialog');
    assert.equal(dialog().querySelector('[role=alert]').className, 'problem');
    assert.equal(button('Take over').className, 'yes');
    assert.equal(button('Take over').parentNode.className, 'choices');
    assert.deepEqual([...dialog().querySelectorAll('button')].map((b) => b.type), ['button', 'button']);
  });

  it('does not ask in any other state', async () => {
    arbiter.start();
    for (const answer of [LOCAL, FAILED, CLOUD, COOLING]) {
      await client.last.answer(good(answer));
      assert.equal(dialog().open, false);
      $('arbiter-confirm').open();
      assert.equal(dialog().open, false);
      arbiter.refresh();
    }
  });

  it('is modal', async () => {
    let modal = 0;
    const { showModal } = dialog();
    dialog().showModal = function () {
      modal += 1;
      showModal.call(this);
    };
    await startWith(CONFIRMABLE);
    $('arbiter-confirm').open();
    assert.equal(modal, 1);
  });

  it('does not ask again after a no, until the state has changed or somebody wants it', async () => {
    await startWith(CONFIRMABLE);
    button('Not now').click();
    assert.equal(dialog().open, false);
    await poll(CONFIRMABLE);
    await failPoll();
    await poll(CONFIRMABLE);
    assert.equal(dialog().open, false);
    $('arbiter-confirm').open();
    assert.equal(dialog().open, true);
    button('Not now').click();
    await poll(CLOUD);
    assert.equal(dialog().open, false);
    await poll(CONFIRMABLE);
    assert.equal(dialog().open, true);
    assert.deepEqual(client.calls.filter(({ name }) => name === 'confirm_takeover'), []);
  });

  it('stays while the state is unknown, and goes when there is nothing to confirm', async () => {
    await startWith(CONFIRMABLE);
    await failPoll();
    assert.equal(dialog().open, true);
    await poll(CONFIRMABLE);
    assert.equal(dialog().open, true);
    await poll(CLOUD);
    assert.equal(dialog().open, false);
  });

  it('goes with its Arbiter, and with its element', async () => {
    await startWith(CONFIRMABLE);
    arbiter.stop();
    assert.equal(dialog().open, false);
    await startWith(CONFIRMABLE);
    const element = $('arbiter-confirm');
    const its = dialog();
    assert.equal(its.open, true);
    element.remove();
    assert.equal(its.open, false);
  });

  it('without an Arbiter there is nothing to open', () => {
    $('arbiter-confirm').open();
    assert.equal(dialog().open, false);
  });

  it('takes over, once, however often yes is pressed', async () => {
    await startWith(CONFIRMABLE);
    client.calls.length = 0;
    const yes = button('Take over');
    yes.click();
    yes.click();
    assert.equal(yes.getAttribute('aria-disabled'), 'true');
    assert.deepEqual(client.calls.map(({ name }) => name), ['confirm_takeover']);
    await client.last.answer(good(LOCAL));
    assert.equal(dialog().open, false);
    assert.equal(yes.hasAttribute('aria-disabled'), false);
    assert.equal(problem(), '');
    assert.equal(arbiter.canGenerate, true);
  });

  it('says why not, as text, until it is tried or asked again', async () => {
    await startWith(CONFIRMABLE);
    const yes = button('Take over');
    client.calls.length = 0;
    yes.click();
    await client.last.answer(bad({ code: '42501', message: 'permission <b>denied</b>' }));
    await client.last.answer(good(CONFIRMABLE));
    assert.deepEqual(client.names(), ['confirm_takeover', 'execution_status']);
    assert.equal(dialog().open, true);
    assert.equal(problem(), 'Not taken over: permission <b>denied</b>');
    assert.equal(yes.hasAttribute('aria-disabled'), false);

    yes.click();
    assert.equal(problem(), '');
    assert.deepEqual(client.names(), ['confirm_takeover']);
    clock.install(); // that request stays without an answer
  });

  it('forgets the problem when it opens anew', async () => {
    await startWith(CONFIRMABLE);
    button('Take over').click();
    await client.last.answer(bad({ message: 'no' }));
    await client.last.answer(good(CONFIRMABLE));
    button('Not now').click();
    assert.equal(problem(), 'Not taken over: no');
    $('arbiter-confirm').open();
    assert.equal(problem(), '');
  });

  it('is opened by the badge\'s button', async () => {
    page.document.body.insertAdjacentHTML('beforeend', '<arbiter-badge></arbiter-badge>');
    await startWith(CONFIRMABLE);
    button('Not now').click();
    $('arbiter-badge').shadowRoot.querySelector('button').click();
    assert.equal(dialog().open, true);
  });
});
