// Where there is no page: Node, a worker, a server that renders. And whether arbiter.d.ts tells the truth.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { afterEach, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Client, clock, closePage, CLOUD, good, listen, load, LOCAL } from './harness.mjs';

const TYPES = readFileSync(fileURLToPath(new URL('../../../arbiter_db/web/arbiter.d.ts', import.meta.url)), 'utf8');

afterEach(closePage);

describe('without a page', () => {
  it('the module can be imported, and nothing is defined globally', async () => {
    assert.equal(globalThis.document, undefined);
    assert.equal(globalThis.HTMLElement, undefined);
    assert.equal(globalThis.customElements, undefined);
    const before = Object.getOwnPropertyNames(globalThis);
    const module = await load();
    assert.deepEqual(Object.keys(module).sort(), ['Arbiter', 'ArbiterBadge', 'ArbiterConfirm', 'ArbiterToasts']);
    assert.deepEqual(Object.getOwnPropertyNames(globalThis), before);
  });

  it('an Arbiter polls, knows, writes and stops', async () => {
    const { Arbiter } = await load();
    const client = new Client();
    clock.install();
    try {
      const arbiter = new Arbiter(client);
      const events = listen(arbiter);
      arbiter.start();
      await client.last.answer(good(LOCAL));
      assert.equal(await arbiter.insert('signals', {}), client.written);
      await clock.advance(5_000);
      await client.last.answer(good(CLOUD));
      assert.equal((await arbiter.insert('signals', {})).error.code, 'arbiter_not_local');
      arbiter.stop();
      assert.deepEqual(events.types(), ['change', 'change', 'cloudstart', 'change']);
      assert.equal(clock.timers.size, 0);
    } finally {
      clock.uninstall();
    }
  });

  it('a page without custom elements can import it, too', async () => {
    globalThis.HTMLElement = class {};
    await load();
  });

  it('elements that are defined already stay as they are', async () => {
    const defined = [];
    globalThis.HTMLElement = class {};
    globalThis.document = { createElement: () => ({}) };
    globalThis.customElements = { get: (name) => (name === 'arbiter-badge' ? class {} : undefined), define: (name) => defined.push(name) };
    await load();
    assert.deepEqual(defined, []);
    globalThis.customElements.get = () => undefined;
    await load();
    assert.deepEqual(defined, ['arbiter-badge', 'arbiter-toasts', 'arbiter-confirm']);
  });
});

/** The body of a declaration in arbiter.d.ts. */
function declared(head) {
  const from = TYPES.indexOf(`${head} {\n`);
  assert.notEqual(from, -1, head);
  return TYPES.slice(from, TYPES.indexOf('\n}', from)).split('\n').slice(1);
}

/** The names of its members, in one level of indentation. */
function names(head, pattern) {
  return [...new Set(declared(head).map((line) => pattern.exec(line)?.[1]).filter(Boolean))].sort();
}

describe('arbiter.d.ts', () => {
  it('exports what the module exports', async () => {
    const classes = [...TYPES.matchAll(/^export class (\w+)/gm)].map((match) => match[1]).sort();
    assert.deepEqual(classes, Object.keys(await load()).sort());
  });

  it('gives an Arbiter the members that it has', async () => {
    const { prototype } = (await load()).Arbiter;
    const own = Object.entries(Object.getOwnPropertyDescriptors(prototype));
    const methods = own.filter(([name, { value }]) => value && name !== 'constructor').map(([name]) => name).sort();
    const getters = own.filter(([, { get }]) => get);
    assert.ok(getters.every(([, { set }]) => set === undefined));
    const head = 'export class Arbiter extends EventTarget';
    const found = names(head, /^  (\w+)(?:<.*)?\(/).filter((name) => !['constructor', 'addEventListener'].includes(name));
    assert.deepEqual(found, methods);
    assert.deepEqual(names(head, /^  readonly (\w+):/), getters.map(([name]) => name).sort());
  });

  it('names each event that is sent', async () => {
    const client = new Client();
    clock.install();
    try {
      const source = names('export interface ArbiterEventMap', /^  (\w+):/);
      assert.deepEqual(source, ['change', 'cloudstart', 'cloudstop', 'confirm', 'resume']);
      const { Arbiter } = await load();
      const arbiter = new Arbiter(client);
      const types = new Set();
      arbiter.dispatchEvent = ({ type }) => types.add(type);
      const { COOLING, CONFIRMABLE } = await import('./harness.mjs');
      for (const answer of [LOCAL, CLOUD, COOLING, LOCAL, CONFIRMABLE]) {
        arbiter.refresh();
        await client.last.answer(good(answer));
      }
      assert.deepEqual([...types].sort(), source);
    } finally {
      clock.uninstall();
    }
  });

  it('gives a status the columns that the answers have here', () => {
    assert.deepEqual(names('export interface ExecutionStatus', /^  readonly (\w+):/), Object.keys(LOCAL).sort());
  });

  it('gives the elements the methods that they have', async () => {
    const module = await load();
    for (const [name, method] of [['ArbiterToasts', 'show'], ['ArbiterConfirm', 'open']]) {
      assert.deepEqual(names(`export class ${name} extends ArbiterElement`, /^  (\w+)\(/), [method]);
      assert.equal(typeof module[name].prototype[method], 'function');
    }
  });
});
