// Writes and confirmations: what is sent, what the app gets, and what is known when it gets it.

import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, it } from 'node:test';
import {
  bad, Client, clock, CLOUD, CONFIRMABLE, COOLING, FAILED, good, listen, load, LOCAL, settle, status, WATCHING,
} from './harness.mjs';

const { Arbiter } = await load();

const ROW = { symbol: 'BTCUSDT' };

let client;
let arbiter;
let events;

beforeEach(() => {
  clock.install();
  client = new Client();
  arbiter = new Arbiter(client);
  events = listen(arbiter);
});

afterEach(() => {
  arbiter.stop();
  clock.uninstall();
});

async function know(answer) {
  arbiter.refresh();
  await client.last.answer(good(answer));
  client.calls.length = 0;
  events.types();
}

const rejection = (more) => ({ code: 'WX001', message: 'arbiter: cloud active', ...more });

describe('a write', () => {
  it('asks first when nothing is known, and is sent when the answer is yes', async () => {
    const writing = arbiter.insert('signals', ROW);
    assert.deepEqual(client.writes, []);
    await client.last.answer(good(LOCAL));
    assert.equal(await writing, client.written);
    assert.deepEqual(client.names(), ['execution_status']);
    assert.deepEqual(client.writes, [[['from', 'signals'], ['insert', ROW]]]);
  });

  it('is not sent when the answer is no', async () => {
    const writing = arbiter.insert('signals', ROW);
    await client.last.answer(good(CLOUD));
    assert.equal((await writing).error.code, 'arbiter_not_local');
    assert.deepEqual(client.writes, []);
  });

  it('is not sent when there is no answer', async () => {
    const writing = arbiter.insert('signals', ROW);
    await client.last.answer(bad({ message: 'no' }));
    assert.deepEqual(await writing, {
      data: null,
      count: null,
      status: 0,
      statusText: '',
      error: {
        name: 'ArbiterRefusal',
        code: 'arbiter_unknown',
        message: 'Unknown',
        details: '',
        hint: 'Nothing was sent: this browser may not write now, or does not know whether it may.',
      },
    });
    assert.deepEqual(client.writes, []);
  });

  it('asks again when the last answer is too old', async () => {
    await know(LOCAL);
    clock.wall += 60_000;
    const writing = arbiter.insert('signals', ROW);
    assert.equal(client.count, 1);
    await client.last.answer(good(CLOUD));
    assert.equal((await writing).error.code, 'arbiter_not_local');
  });

  it('is sent while every table is only observed, with an answer or without', async () => {
    await know(WATCHING);
    assert.equal(await arbiter.insert('signals', ROW), client.written);
    assert.equal(client.count, 0);
    client.replies = () => bad({ message: 'no' });
    await arbiter.refresh();
    assert.equal(await arbiter.insert('signals', ROW), client.written);
    assert.equal(client.writes.length, 2);
  });

  it('is the last one that is sent when the database rejects it and nothing else is known', async () => {
    await know(WATCHING);
    client.replies = () => bad({ message: 'no' });
    await arbiter.refresh();
    events.types();
    client.written = { data: null, error: rejection(), status: 409 };
    assert.equal(await arbiter.insert('signals', ROW), client.written);
    assert.equal(arbiter.canGenerate, false);
    assert.deepEqual(events.all(), [['change', null]]);
    assert.equal((await arbiter.insert('signals', ROW)).error.code, 'arbiter_unknown');
    assert.equal(client.writes.length, 1);
  });

  it('is neither sent nor asked for when the state is known and forbids it', async () => {
    for (const answer of [CLOUD, COOLING, FAILED]) {
      await know(answer);
      let isBuilt = false;
      const result = await arbiter.write(() => {
        isBuilt = true;
      });
      assert.equal(isBuilt, false);
      assert.equal(result.status, 0);
      assert.deepEqual(
        [result.data, result.error.code, result.error.message, result.error.details],
        [null, 'arbiter_not_local', answer.message, answer.code],
      );
      assert.equal(client.count, 0);
    }
    await know({ ...CLOUD, code: null });
    assert.equal((await arbiter.insert('signals', ROW)).error.details, '');
    assert.deepEqual(client.writes, []);
  });

  for (const [options, selected] of [
    [undefined, []],
    [{}, []],
    [{ select: false }, []],
    [{ select: true }, [['select', '*']]],
    [{ select: 'id,source' }, [['select', 'id,source']]],
  ]) {
    it(`selects what it is told to: ${JSON.stringify(options)}`, async () => {
      await know(LOCAL);
      await arbiter.insert('signals', [ROW, ROW], options);
      assert.deepEqual(client.writes, [[['from', 'signals'], ['insert', [ROW, ROW]], ...selected]]);
    });
  }

  it('that is fine is given back as it is, without a new question', async () => {
    await know(LOCAL);
    client.written = { data: [ROW], error: null, status: 201 };
    assert.equal(await arbiter.insert('signals', ROW), client.written);
    assert.equal(client.count, 0);
    assert.equal(arbiter.canGenerate, true);
    assert.deepEqual(events.types(), []);
  });

  for (const [what, error] of [
    ['a duplicate', { code: '23505', message: 'duplicate key', details: 'Key (id)=(1) already exists.', hint: null }],
    ['no connection', { code: '', message: 'TypeError: fetch failed', details: '', hint: '' }],
    ['no code', { message: 'gateway timeout' }],
    ['a code that is null', { code: null, message: 'gateway timeout' }],
    ['a code like ours', { code: 'WX0011', message: 'other' }],
    ['a code that ends like ours', { code: 'AWX001', message: 'other' }],
    ['a code that is too short', { code: 'WX01', message: 'other' }],
  ]) {
    it(`that fails otherwise passes unchanged: ${what}`, async () => {
      await know(LOCAL);
      client.written = { data: null, error, status: 409 };
      assert.equal(await arbiter.insert('signals', ROW), client.written);
      assert.equal(client.written.error, error);
      assert.equal(client.count, 0);
      assert.equal(arbiter.canGenerate, true);

      const thrown = Object.assign(new Error(error.message), error);
      const write = arbiter.write(async () => {
        throw thrown;
      });
      await assert.rejects(write, (caught) => caught === thrown);
      assert.equal(client.count, 0);
      assert.equal(arbiter.canGenerate, true);
    });
  }

  it('may throw anything', async () => {
    await know(LOCAL);
    for (const thrown of [undefined, null, 'no', 1]) {
      const write = arbiter.write(() => Promise.reject(thrown));
      await assert.rejects(write, (caught) => caught === thrown);
    }
    const write = arbiter.write(() => {
      throw new RangeError('before it was sent');
    });
    await assert.rejects(write, RangeError);
    assert.equal(client.count, 0);
  });

  for (const [what, error] of [
    ['with everything', rejection({ details: '{"code": "cloud_active"}', hint: 'Wait.' })],
    ['without details', rejection()],
    ['with details that are null', rejection({ details: null, hint: null })],
    ['with details that are no JSON', rejection({ details: 'Key (id)=(1)' })],
    ['of a code of a later version', rejection({ code: 'WX010' })],
  ]) {
    it(`that the database rejects is given back when the new state is known: ${what}`, async () => {
      await know(LOCAL);
      client.written = { data: null, error, status: 409 };
      let result;
      const writing = arbiter.insert('signals', ROW).then((given) => {
        result = given;
      });
      await settle();
      // Until the new answer is there, nothing more is sent.
      assert.equal(result, undefined);
      assert.equal(arbiter.status, null);
      assert.deepEqual(events.all(), [['change', null]]);
      await client.last.answer(good(CLOUD));
      await writing;
      assert.equal(result, client.written);
      assert.equal(result.error, error);
      assert.equal(arbiter.status.code, 'cloud_active');
      assert.deepEqual(events.types(), ['change', 'cloudstart']);
      assert.deepEqual(client.names(), ['execution_status']);
    });
  }

  it('that a client throws is thrown when the new state is known', async () => {
    await know(LOCAL);
    const thrown = Object.assign(new Error('rejected'), rejection());
    const writing = arbiter.write(() => Promise.reject(thrown));
    await settle();
    assert.equal(arbiter.status, null);
    const seen = assert.rejects(writing, (caught) => caught === thrown && arbiter.status.code === 'cloud_active');
    await client.last.answer(good(CLOUD));
    await seen;
    assert.deepEqual(client.names(), ['execution_status']);
  });

  it('that is rejected makes an answer worthless that was asked for before', async () => {
    await know(LOCAL);
    arbiter.refresh(); // under way when the write is rejected
    client.written = { data: null, error: rejection(), status: 409 };
    const writing = arbiter.insert('signals', ROW);
    await settle();
    assert.equal(client.count, 1);
    await client.last.answer(good(LOCAL)); // the state before
    assert.equal(arbiter.status, null);
    assert.equal(client.count, 2);
    await client.last.answer(good(CLOUD));
    await writing;
    assert.equal(arbiter.status.code, 'cloud_active');
    assert.deepEqual(events.types(), ['change', 'change', 'cloudstart']);
  });
});

describe('a confirmation', () => {
  it('is sent once, and its answer is the new state', async () => {
    await know(CONFIRMABLE);
    assert.equal(arbiter.canConfirm, true);
    const confirming = arbiter.confirmTakeover();
    assert.deepEqual(client.calls.map(({ name, rest }) => [name, rest]), [['confirm_takeover', []]]);
    const answer = good(LOCAL);
    await client.last.answer(answer);
    assert.equal(await confirming, answer);
    assert.equal(arbiter.canGenerate, true);
    assert.equal(arbiter.canConfirm, false);
    assert.deepEqual(events.types(), ['change', 'resume']);
    assert.deepEqual(client.names(), ['confirm_takeover']);
  });

  it('is possible only when nothing else is to be waited for', async () => {
    for (const [answer, can] of [[FAILED, false], [COOLING, false], [CLOUD, false], [LOCAL, false], [CONFIRMABLE, true]]) {
      await know(answer);
      assert.equal(arbiter.canConfirm, can);
    }
    clock.wall += 60_000;
    assert.equal(arbiter.canConfirm, false);
  });

  it('that fails is given back as it is, when the new state is known', async () => {
    await know(CONFIRMABLE);
    const answer = { data: LOCAL, error: rejection(), status: 409 };
    const confirming = arbiter.confirmTakeover();
    await client.last.answer(answer);
    assert.equal(arbiter.status.code, 'takeover_unconfirmed');
    await client.last.answer(good(CLOUD));
    assert.equal(await confirming, answer);
    assert.equal(arbiter.status.code, 'cloud_active');
  });

  it('that answers with something else asks for the state', async () => {
    await know(CONFIRMABLE);
    const confirming = arbiter.confirmTakeover();
    await client.last.answer(good(null));
    assert.deepEqual(client.calls.map(({ name }) => name), ['confirm_takeover', 'execution_status']);
    await client.last.answer(good(LOCAL));
    assert.deepEqual(await confirming, good(null));
    assert.equal(arbiter.canGenerate, true);
  });

  it('is given up after 15 s, and never repeated', async () => {
    await know(status({ ...CONFIRMABLE, poll_interval: '00:01:00' }));
    const confirming = arbiter.confirmTakeover();
    const { signal } = client.last;
    await clock.advance(14_999);
    assert.equal(signal.aborted, false);
    await clock.advance(1);
    assert.equal(signal.aborted, true);
    assert.deepEqual(client.calls.map(({ name }) => name), ['confirm_takeover', 'execution_status']);
    await client.last.answer(good(CONFIRMABLE));
    const result = await confirming;
    assert.deepEqual([result.data, result.status, result.error.name], [null, 0, 'TimeoutError']);
  });

  it('is newer than a poll that began before it', async () => {
    await know(CONFIRMABLE);
    arbiter.refresh();
    const poll = client.last;
    const confirming = arbiter.confirmTakeover();
    await client.last.answer(good(LOCAL));
    await confirming;
    await poll.answer(good(CONFIRMABLE));
    assert.equal(arbiter.canGenerate, true);
    assert.deepEqual(events.types(), ['change', 'resume']);
  });

  it('is older than a poll that began after it and has answered', async () => {
    await know(CONFIRMABLE);
    const confirming = arbiter.confirmTakeover();
    const confirmation = client.last;
    arbiter.refresh();
    await client.last.answer(good(CLOUD));
    await confirmation.answer(good(LOCAL));
    assert.equal(arbiter.status.code, 'cloud_active');
    assert.equal(client.count, 3); // it asks once more instead
    await client.last.answer(good(CLOUD));
    await confirming;
    assert.deepEqual(events.types(), ['change', 'cloudstart']);
  });
});
