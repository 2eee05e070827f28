// What an Arbiter knows, when it asks, and which events it sends.

import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, it } from 'node:test';
import {
  bad, bareWindow, Client, clock, closePage, CLOUD, CONFIRMABLE, COOLING, FAILED, good, listen, load, LOCAL, settle,
  status, WATCHING,
} from './harness.mjs';

const { Arbiter } = await load();

let client;
let arbiter;
let events;
let page;

beforeEach(() => {
  clock.install();
  page = bareWindow();
  client = new Client();
  make();
});

afterEach(() => {
  arbiter.stop();
  clock.uninstall();
  closePage();
});

function make(options = {}) {
  arbiter = new Arbiter(client, { root: null, ...options });
  events = listen(arbiter);
}

/** Start, with this as the first answer. */
async function startWith(answer) {
  arbiter.start();
  await client.last.answer(good(answer));
  client.calls.length = 0;
}

/** One more poll, which gets this answer. */
async function poll(answer) {
  arbiter.refresh();
  await client.last.answer(good(answer));
  client.calls.length = 0;
}

/** One more poll, which fails. */
async function failPoll() {
  arbiter.refresh();
  await client.last.answer(bad({ message: 'no' }));
  client.calls.length = 0;
}

describe('an answer', () => {
  it('is unknown before the first one', async () => {
    arbiter.start();
    assert.deepEqual(client.calls.map(({ name, rest }) => [name, rest]), [['execution_status', []]]);
    assert.equal(arbiter.status, null);
    assert.equal(arbiter.canGenerate, false);
    assert.equal(arbiter.canConfirm, false);
    assert.equal(arbiter.remaining, null);
    assert.equal(arbiter.error, null);
    assert.deepEqual(events.types(), []);
    await client.last.answer(good(LOCAL));
    assert.deepEqual(arbiter.status, LOCAL);
    assert.equal(arbiter.canGenerate, true);
    assert.deepEqual(events.all(), [['change', arbiter.status]]);
  });

  it('is a frozen copy', async () => {
    const answer = status();
    await startWith(answer);
    answer.can_write_local = false;
    assert.equal(arbiter.canGenerate, true);
    assert.throws(() => {
      arbiter.status.can_write_local = false;
    }, TypeError);
  });

  it('may be the one row of a set', async () => {
    await startWith([LOCAL]);
    assert.deepEqual(arbiter.status, LOCAL);
  });

  for (const [what, data] of [
    ['nothing', null],
    ['undefined', undefined],
    ['no row', []],
    ['two rows', [LOCAL, LOCAL]],
    ['no message', status({ message: undefined })],
    ['a message that is no text', status({ message: 1 })],
    ['a yes that is text', status({ can_write_local: 'true' })],
    ['text', 'true'],
  ]) {
    it(`that is ${what} is none`, async () => {
      await startWith(LOCAL);
      events.types();
      await poll(data);
      assert.equal(arbiter.status, null);
      assert.equal(arbiter.canGenerate, false);
      assert.deepEqual(arbiter.error, { message: 'the answer is not a status' });
      assert.deepEqual(events.all(), [['change', null]]);
    });
  }

  it('that is an error says which, until a good one comes', async () => {
    await startWith(LOCAL);
    const error = { code: '42501', message: 'permission denied' };
    arbiter.refresh();
    await client.last.answer({ data: LOCAL, error, status: 403 });
    assert.equal(arbiter.status, null);
    assert.equal(arbiter.error, error);
    await poll(LOCAL);
    assert.equal(arbiter.error, null);
    assert.equal(arbiter.canGenerate, true);
  });

  it('may be a no', async () => {
    await startWith(CLOUD);
    assert.equal(arbiter.status.code, 'cloud_active');
    assert.equal(arbiter.canGenerate, false);
    assert.equal(arbiter.canConfirm, false);
  });

  it('comes from the schema that was named', async () => {
    make({ schema: 'api' });
    arbiter.start();
    assert.deepEqual(client.calls.map(({ name, schema }) => [name, schema]), [['execution_status', 'api']]);
    await client.last.answer(good(CONFIRMABLE));
    arbiter.confirmTakeover();
    assert.deepEqual([client.last.name, client.last.schema], ['confirm_takeover', 'api']);
    await client.last.answer(good(LOCAL));
    await arbiter.insert('signals', {});
    assert.equal(client.writes.length, 1);
  });
});

describe('while every table is only observed', () => {
  it('this browser may generate, although a machine is active', async () => {
    await startWith(WATCHING);
    assert.deepEqual(arbiter.status, WATCHING);
    assert.equal(arbiter.canGenerate, true);
    assert.equal(arbiter.canConfirm, false);
  });

  it('it may so when the state is unknown, too', async () => {
    await startWith(WATCHING);
    events.types();
    await failPoll();
    assert.deepEqual([arbiter.status, arbiter.canGenerate], [null, true]);
    await failPoll();
    assert.equal(arbiter.canGenerate, true);
    assert.deepEqual(events.all(), [['change', null]]);
  });

  it('nothing is known of it before the first answer, nor after a stop', async () => {
    arbiter.start();
    assert.equal(arbiter.canGenerate, false);
    await client.last.answer(good(WATCHING));
    await failPoll();
    events.types();
    arbiter.stop();
    assert.equal(arbiter.canGenerate, false);
    assert.deepEqual(events.all(), [['change', null]]);
    arbiter.start();
    assert.equal(arbiter.canGenerate, false);
  });

  for (const [what, answer] of [
    ['an answer that enforces', LOCAL],
    ['an answer of an older version', status({ enforced: undefined })],
  ]) {
    it(`it ends with ${what}`, async () => {
      await startWith(WATCHING);
      await failPoll();
      await poll(answer);
      assert.equal(arbiter.canGenerate, true);
      await failPoll();
      assert.equal(arbiter.canGenerate, false);
    });
  }
});

describe('the age of an answer', () => {
  // Not started, so that no later poll gets in the way.
  for (const [interval, lifetime] of [
    ['00:00:05', 11_000], // interval, timeout (as long, here) and slack
    ['00:00:01', 5_000], // the shortest timeout is 3 s
    ['00:00:04', 9_000],
    ['00:01:00', 71_000], // the longest is 10 s
  ]) {
    it(`is at most ${lifetime} ms with an interval of ${interval}, from the asking`, async () => {
      arbiter.refresh();
      await clock.advance(700);
      await client.last.answer(good(status({ poll_interval: interval })));
      events.types();
      await clock.advance(lifetime - 700 - 1);
      assert.equal(arbiter.canGenerate, true);
      assert.deepEqual(events.types(), []);
      await clock.advance(1);
      assert.equal(arbiter.canGenerate, false);
      assert.equal(arbiter.status, null);
      assert.deepEqual(events.all(), [['change', null]]);
      assert.equal(clock.timers.size, 0);
    });
  }

  it('counts the time in which a device slept and no timer ran', async () => {
    arbiter.refresh();
    await client.last.answer(good(COOLING));
    clock.wall += 10_999;
    assert.notEqual(arbiter.status, null);
    assert.equal(arbiter.remaining, 27_000 - 10_999);
    clock.wall += 1;
    assert.equal(arbiter.status, null);
    assert.equal(arbiter.remaining, null);
  });

  it('does not begin anew when the clock is set back', async () => {
    arbiter.refresh();
    await client.last.answer(good(LOCAL));
    clock.wall -= 3_600_000;
    clock.monotonic += 10_999;
    assert.equal(arbiter.canGenerate, true);
    clock.monotonic += 1;
    assert.equal(arbiter.canGenerate, false);
  });

  it('may be greater while the page is hidden, and is checked when it is shown again', async () => {
    await startWith(LOCAL);
    page.hide(true);
    events.types();
    client.replies = null;
    await clock.advance(20_000);
    assert.equal(arbiter.canGenerate, true);
    assert.deepEqual(events.types(), []);
    page.hide(false);
    assert.deepEqual(events.all(), [['change', null]]);
    assert.equal(client.count, 1);
    await client.last.answer(good(LOCAL));
    assert.deepEqual(events.types(), ['change']);
  });

  it('ends while the page is hidden, too', async () => {
    page.document.hidden = true;
    arbiter.refresh();
    await client.last.answer(good(LOCAL));
    events.types();
    await clock.advance(40_999); // 30 s, 10 s, 1 s
    assert.equal(arbiter.canGenerate, true);
    await clock.advance(1);
    assert.deepEqual(events.all(), [['change', null]]);
  });
});

describe('retry_at', () => {
  it('is a time from the receipt, by the server\'s clock', async () => {
    arbiter.refresh();
    await clock.advance(2_000);
    clock.wall -= 86_400_000; // the device's own clock is a day behind
    await client.last.answer(good(COOLING));
    assert.equal(arbiter.remaining, 27_000);
    await clock.advance(1_000);
    assert.equal(arbiter.remaining, 26_000);
  });

  it('is never negative', async () => {
    arbiter.refresh();
    await client.last.answer(good({ ...COOLING, retry_at: '2026-01-05T09:20:00.5+00:00' }));
    await clock.advance(2_000);
    assert.equal(arbiter.remaining, 0);
  });

  it('is null when there is none', async () => {
    await startWith(CLOUD);
    assert.equal(arbiter.remaining, null);
  });
});

describe('polling', () => {
  const INTERVALS = [
    ['00:00:05', 5_000],
    ['00:00:01.5', 1_500],
    ['00:00:30', 30_000],
    ['00:01:00', 60_000],
    ['01:00:00', 60_000], // at most
    ['10:20:30', 60_000],
    ['00:00:00.1', 250], // at least
    ['00:00:00', 250],
    ['1 day', 5_000], // not understood
    ['1 day 00:00:30', 5_000],
    ['00:00:30 ago', 5_000],
    ['-00:00:30', 5_000], // a pause is never negative, endless or none
    ['-1 days +00:00:30', 5_000],
    ['infinity', 5_000],
    ['PT30S', 5_000],
    ['00:00:NaN', 5_000],
    ['00:00:1e9', 5_000],
    ['00:00:00.000001', 250],
    [`${'9'.repeat(400)}:00:00`, 60_000],
    [`00:00:${'9'.repeat(400)}`, 60_000],
    [30_000, 5_000],
    [{ valueOf: () => 1 }, 5_000],
    [null, 5_000],
    [undefined, 5_000],
  ];
  for (const [interval, ms] of INTERVALS) {
    it(`follows an interval of ${interval}`, async () => {
      for (const [random, pause] of [[0, 0.9 * ms], [1, ms]]) {
        clock.random = random;
        await startWith(status({ poll_interval: interval }));
        await clock.advance(pause - 1);
        assert.equal(client.count, 0);
        await clock.advance(1);
        assert.equal(client.count, 1);
        arbiter.stop();
        await settle();
      }
    });
  }

  it('begins with 5 s', async () => {
    clock.random = 1;
    arbiter.start();
    await clock.advance(4_999);
    assert.equal(client.last.signal.aborted, false);
    await clock.advance(1);
    assert.equal(client.last.signal.aborted, true);
  });

  it('counts the pause from the answer', async () => {
    clock.random = 1;
    arbiter.start();
    await clock.advance(2_000);
    await client.last.answer(good(LOCAL));
    await clock.advance(4_999);
    assert.equal(client.count, 1);
    await clock.advance(1);
    assert.equal(client.count, 2);
  });

  it('comes just after retry_at, if that is sooner', async () => {
    await startWith({ ...COOLING, retry_at: '2026-01-05T09:20:02.000000+00:00' });
    await clock.advance(2_049);
    assert.equal(client.count, 0);
    await clock.advance(1);
    assert.equal(client.count, 1);
  });

  it('is as usual when retry_at is now', async () => {
    await startWith({ ...COOLING, retry_at: COOLING.as_of });
    await clock.advance(4_749);
    assert.equal(client.count, 0);
    await clock.advance(1);
    assert.equal(client.count, 1);
  });

  it('is as usual when retry_at is later', async () => {
    await startWith(COOLING);
    await clock.advance(4_749);
    assert.equal(client.count, 0);
    await clock.advance(1);
    assert.equal(client.count, 1);
  });

  for (const [interval, limit] of [['00:00:01', 3_000], ['00:00:04', 4_000], ['00:00:30', 10_000]]) {
    it(`gives an answer up after ${limit} ms with an interval of ${interval}`, async () => {
      await startWith(status({ poll_interval: interval }));
      arbiter.refresh();
      const { signal } = client.last;
      await clock.advance(limit - 1);
      assert.equal(signal.aborted, false);
      assert.equal(arbiter.canGenerate, true);
      await clock.advance(1);
      assert.equal(signal.aborted, true);
      assert.equal(arbiter.canGenerate, false);
      assert.equal(arbiter.error.name, 'TimeoutError');
      assert.equal(arbiter.error.message, 'no answer in time');
    });
  }

  it('does not take an answer that comes after that', async () => {
    await startWith(CLOUD);
    arbiter.refresh();
    const late = client.last;
    await clock.advance(5_000);
    events.types();
    await late.answer(good(LOCAL));
    assert.equal(arbiter.status, null);
    assert.deepEqual(events.types(), []);
  });

  it('leaves no timer of an answer that came', async () => {
    arbiter.refresh();
    await client.last.answer(good(LOCAL));
    assert.equal(clock.timers.size, 1); // the answer's expiry
  });

  it('comes less and less often while it fails, up to a minute', async () => {
    for (const [random, factor] of [[0, 0.5], [1, 1]]) {
      clock.random = random;
      arbiter.start();
      for (const pause of [5_000, 10_000, 20_000, 40_000, 60_000, 60_000]) {
        await client.last.answer(bad({ message: 'no' }));
        client.calls.length = 0;
        await clock.advance(factor * pause - 1);
        assert.equal(client.count, 0);
        await clock.advance(1);
        assert.equal(client.count, 1);
      }
      // A good one ends that.
      await client.last.answer(good(LOCAL));
      client.calls.length = 0;
      await clock.advance(5_000);
      assert.equal(client.count, 1);
      await client.last.answer(bad({ message: 'no' }));
      client.calls.length = 0;
      await clock.advance(factor * 5_000);
      assert.equal(client.count, 1);
      arbiter.stop();
      await settle();
      make();
    }
  });

  it('goes on after a client that throws', async () => {
    const { rpc } = client;
    client.rpc = () => {
      throw new Error('no client');
    };
    arbiter.start();
    await arbiter.refresh();
    assert.equal(arbiter.error.message, 'no client');
    client.rpc = rpc;
    await clock.advance(10_000);
    assert.equal(client.count, 1);
  });

  it('goes on after a request that rejects', async () => {
    arbiter.start();
    const done = arbiter.refresh();
    client.last.fail(new TypeError('failed to fetch'));
    await settle();
    await client.last.answer(good(LOCAL));
    assert.equal(await done, undefined);
    assert.equal(client.count, 2);
    assert.equal(arbiter.canGenerate, true);
  });

  it('is six times as slow while the page is hidden', async () => {
    clock.random = 1;
    await startWith(LOCAL);
    page.hide(true);
    await clock.advance(29_999);
    assert.equal(client.count, 0);
    await clock.advance(1);
    assert.equal(client.count, 1);
    await client.last.answer(good(LOCAL));
    client.calls.length = 0;
    page.hide(false);
    assert.equal(client.count, 1); // at once
  });

  it('is not twice as often after a page was hidden and shown', async () => {
    clock.random = 1;
    await startWith(LOCAL);
    for (let n = 0; n < 3; n += 1) {
      page.hide(true);
      page.hide(false);
    }
    client.replies = () => good(LOCAL);
    await client.last.answer(good(LOCAL));
    await settle();
    client.calls.length = 0;
    await clock.advance(15_000);
    assert.equal(client.count, 3);
  });

  it('is not begun by hiding the page of an Arbiter that polls already', async () => {
    arbiter.start();
    page.hide(true);
    assert.equal(client.count, 1);
  });
});

describe('refresh', () => {
  it('never overlaps and does not pile up', async () => {
    const resolved = [];
    for (let n = 0; n < 20; n += 1) arbiter.refresh().then(() => resolved.push(n));
    assert.equal(client.count, 1);
    await client.last.answer(good(LOCAL));
    assert.deepEqual(resolved, [0]);
    assert.equal(client.count, 2);
    await client.last.answer(good(LOCAL));
    assert.equal(resolved.length, 20);
    assert.equal(client.count, 2);
    // And again.
    arbiter.refresh();
    arbiter.refresh();
    assert.equal(client.count, 3);
    await client.last.answer(good(LOCAL));
    assert.equal(client.count, 4);
  });

  it('takes the place of the poll that was due', async () => {
    clock.random = 1;
    await startWith(LOCAL);
    await clock.advance(3_000);
    await poll(LOCAL);
    await clock.advance(4_999);
    assert.equal(client.count, 0);
    await clock.advance(1);
    assert.equal(client.count, 1);
  });

  it('does not start polling', async () => {
    await poll(LOCAL);
    await clock.advance(60_000);
    assert.equal(client.count, 0);
  });
});

describe('start and stop', () => {
  it('are harmless when repeated', async () => {
    clock.random = 1;
    arbiter.start();
    arbiter.start();
    assert.equal(client.count, 1);
    await client.last.answer(good(LOCAL));
    assert.equal(client.count, 1);
    await clock.advance(5_000);
    assert.equal(client.count, 2);
    await client.last.answer(good(LOCAL));
    events.types();
    arbiter.stop();
    arbiter.stop();
    assert.deepEqual(events.all(), [['change', null]]);
    assert.equal(arbiter.status, null);
    assert.equal(arbiter.canGenerate, false);
    await clock.advance(600_000);
    assert.equal(client.count, 2);
    assert.deepEqual(events.types(), []);
    assert.equal(clock.timers.size, 0);
  });

  it('are harmless in the other order', () => {
    arbiter.stop();
    assert.deepEqual(events.types(), []);
    arbiter.start();
    assert.equal(client.count, 1);
  });

  it('after a stop nothing is polled, whatever happens to the page', async () => {
    await startWith(LOCAL);
    arbiter.stop();
    page.hide(true);
    page.hide(false);
    page.send('online');
    page.send('pageshow', { persisted: true });
    await clock.advance(600_000);
    assert.equal(client.count, 0);
    await poll(LOCAL);
    page.send('offline');
    assert.equal(arbiter.canGenerate, true);
  });

  it('a stop gives the request under way up, and ignores its answer', async () => {
    await startWith(CLOUD);
    arbiter.refresh();
    const { signal, answer } = client.last;
    events.types();
    arbiter.stop();
    assert.equal(signal.aborted, true);
    await answer(good(LOCAL));
    assert.equal(arbiter.status, null);
    assert.deepEqual(events.types(), ['change']);
    assert.equal(arbiter.error, null);
    await clock.advance(600_000);
    assert.equal(client.count, 1);
  });

  it('the next user\'s first answer is compared with nothing', async () => {
    for (const [mine, theirs] of [[LOCAL, CLOUD], [CLOUD, LOCAL], [CLOUD, COOLING], [COOLING, LOCAL]]) {
      await startWith(mine);
      arbiter.stop();
      events.types();
      await startWith(theirs);
      assert.deepEqual(events.types(), ['change']);
      arbiter.stop();
    }
  });

  it('the next user is asked even if the last one was', async () => {
    await startWith(CONFIRMABLE);
    arbiter.stop();
    events.types();
    await startWith(CONFIRMABLE);
    assert.deepEqual(events.types(), ['change', 'confirm']);
  });

  it('a new start while the last request is being given up polls for the new user', async () => {
    arbiter.start();
    arbiter.stop();
    arbiter.start();
    await settle();
    assert.equal(client.count, 2);
    await client.calls[0].answer(good(CLOUD));
    assert.equal(arbiter.status, null);
    await client.calls[1].answer(good(LOCAL));
    assert.equal(arbiter.canGenerate, true);
    clock.random = 1;
    client.calls.length = 0;
    await clock.advance(4_750);
    assert.equal(client.count, 1);
  });
});

describe('the network', () => {
  it('makes the state unknown at once when it goes', async () => {
    await startWith(LOCAL);
    events.types();
    page.send('offline');
    assert.equal(arbiter.canGenerate, false);
    assert.equal(client.count, 0);
    assert.deepEqual(events.all(), [['change', null]]);
    page.send('offline');
    assert.deepEqual(events.types(), []);
  });

  it('does not believe the answer that was on its way when it went', async () => {
    await startWith(LOCAL);
    arbiter.refresh();
    page.send('offline');
    events.types();
    await client.last.answer(good(LOCAL));
    assert.equal(arbiter.status, null);
    assert.deepEqual(events.types(), []);
  });

  it('polls at once when it comes back', async () => {
    await startWith(LOCAL);
    page.send('offline');
    page.send('online');
    assert.equal(client.count, 1);
  });

  it('polls when the page comes out of the back/forward cache, and only then', async () => {
    await startWith(LOCAL);
    page.send('pageshow', { persisted: false });
    assert.equal(client.count, 0);
    page.send('pageshow', { persisted: true });
    assert.equal(client.count, 1);
  });
});

describe('events', () => {
  const named = { LOCAL, CLOUD, COOLING, FAILED, CONFIRMABLE, WATCHING };
  const expected = {
    'LOCAL CLOUD': ['cloudstart'],
    'COOLING CLOUD': ['cloudstart'],
    'FAILED CLOUD': ['cloudstart'],
    'CONFIRMABLE CLOUD': ['cloudstart'],
    'CLOUD LOCAL': ['cloudstop'],
    'CLOUD COOLING': ['cloudstop'],
    'CLOUD FAILED': ['cloudstop'],
    'CLOUD CONFIRMABLE': ['cloudstop', 'confirm'],
    'COOLING LOCAL': ['resume'],
    'FAILED LOCAL': ['resume'],
    'CONFIRMABLE LOCAL': ['resume'],
    'LOCAL COOLING': [],
    'LOCAL FAILED': [],
    'COOLING FAILED': [],
    'CONFIRMABLE FAILED': [],
    'CONFIRMABLE COOLING': [],
    'FAILED COOLING': [],
    'LOCAL CONFIRMABLE': ['confirm'],
    'COOLING CONFIRMABLE': ['confirm'],
    'FAILED CONFIRMABLE': ['confirm'],
    // Nothing has happened to the machine.
    'LOCAL WATCHING': [],
    'CLOUD WATCHING': [],
    'COOLING WATCHING': [],
    'FAILED WATCHING': [],
    'CONFIRMABLE WATCHING': [],
    'WATCHING LOCAL': [],
    'WATCHING CLOUD': [],
    'WATCHING COOLING': [],
    'WATCHING FAILED': [],
    'WATCHING CONFIRMABLE': ['confirm'],
  };
  for (const [before, first] of Object.entries(named)) {
    for (const [after, second] of Object.entries(named)) {
      if (before === after) continue;
      const types = expected[`${before} ${after}`];
      it(`from ${before} to ${after}: ${types.join(', ') || 'no more than a change'}, once`, async () => {
        await startWith(first);
        assert.deepEqual(events.types(), first === CONFIRMABLE ? ['change', 'confirm'] : ['change']);
        await poll(second);
        assert.deepEqual(events.all(), ['change', ...types].map((type) => [type, arbiter.status]));
        await poll({ ...second, as_of: '2026-01-05T09:20:01+00:00', heartbeat_age: '00:00:02' });
        assert.deepEqual(events.types(), []);
      });

      it(`from ${before} over unknown to ${after}: the same`, async () => {
        await startWith(first);
        events.types();
        await failPoll();
        await failPoll();
        assert.deepEqual(events.all(), [['change', null]]);
        await poll(second);
        assert.deepEqual(events.types(), ['change', ...types]);
      });
    }

    it(`from ${before} over unknown to itself: nothing but changes`, async () => {
      await startWith(first);
      events.types();
      await failPoll();
      await poll(first);
      assert.deepEqual(events.types(), ['change', 'change']);
    });
  }

  it('a failed first poll changes nothing', async () => {
    arbiter.start();
    await client.last.answer(bad({ message: 'no' }));
    assert.deepEqual(events.types(), []);
  });

  for (const [column, value] of Object.entries({
    environment: 'none',
    can_write_local: false,
    enforced: false,
    code: 'handover_draining',
    message: 'Cloud starting',
    retry_at: '2026-01-05T09:30:00+00:00',
    machine_id: 'ada00000-0000-4000-8000-0000000000c2',
    machine_state: 'starting',
    epoch: 9,
    draining: true,
  })) {
    it(`${column} alone is a change`, async () => {
      await startWith(LOCAL);
      events.types();
      await poll({ ...LOCAL, [column]: value });
      assert.deepEqual(events.types(), ['change']);
      assert.equal(arbiter.status[column], value);
    });
  }

  for (const [column, value] of Object.entries({
    heartbeat_age: '00:00:09',
    as_of: '2026-01-05T09:30:00+00:00',
    poll_interval: '00:00:06',
    another: 1,
  })) {
    it(`${column} alone is none, but is known`, async () => {
      await startWith(LOCAL);
      events.types();
      await poll({ ...LOCAL, [column]: value });
      assert.deepEqual(events.types(), []);
      assert.equal(arbiter.status[column], value);
    });
  }
});
