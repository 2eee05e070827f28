// What the tests of arbiter.js share: a fresh copy of the module, a clock that goes when it is told to, a
// client of supabase-js that answers when it is told to, and pages of happy-dom.

import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const SOURCE =
  process.env.ARBITER_MODULE ?? fileURLToPath(new URL('../../../arbiter_db/web/arbiter.js', import.meta.url));

// Under another name, because Node takes a .js file for a CommonJS module.
const folder = mkdtempSync(join(tmpdir(), 'arbiter-module-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const copy = join(folder, 'arbiter.mjs');
copyFileSync(SOURCE, copy);

let copies = 0;

/** The module's exports, evaluated anew in the present globals. */
export function load() {
  copies += 1;
  return import(`${pathToFileURL(copy)}?${copies}`);
}

// ------------------------------------------------------------------------------------------ the clock

const real = { setImmediate, setTimeout, clearTimeout, random: Math.random, now: Date.now, performanceNow: performance.now };

/** Let promises run, and what follows from them. */
export async function settle() {
  for (let n = 0; n < 3; n += 1) await new Promise((resolve) => real.setImmediate(resolve));
}

/** Let the observers of a page's changes run: happy-dom calls them from a timer. */
export async function observed() {
  for (let n = 0; n < 3; n += 1) await new Promise((resolve) => real.setTimeout(resolve, 1));
}

/** setTimeout, Date.now, performance.now and Math.random of this process, from `install` to `uninstall`. */
class Clock {
  install() {
    this.wall = 1_800_000_000_000;
    this.monotonic = 1_000;
    this.random = 0.5;
    this.timers = new Map();
    this.count = 0;
    globalThis.setTimeout = (callback, ms = 0) => {
      this.count += 1;
      this.timers.set(this.count, { due: this.monotonic + ms, callback });
      return this.count;
    };
    globalThis.clearTimeout = (id) => this.timers.delete(id);
    Date.now = () => this.wall;
    performance.now = () => this.monotonic;
    Math.random = () => this.random;
  }

  uninstall() {
    globalThis.setTimeout = real.setTimeout;
    globalThis.clearTimeout = real.clearTimeout;
    Date.now = real.now;
    performance.now = real.performanceNow;
    Math.random = real.random;
  }

  /** Let so many ms pass. Timers run when they are due, and what follows from each runs before the next. */
  async advance(ms) {
    const end = this.monotonic + ms;
    await settle();
    for (let runs = 0; ; runs += 1) {
      if (runs > 1_000) throw new Error('timers without end');
      const [id, next] = [...this.timers].sort(([, a], [, b]) => a.due - b.due)[0] ?? [];
      if (!next || next.due > end) break;
      this.timers.delete(id);
      this.#to(Math.max(next.due, this.monotonic));
      next.callback();
      await settle();
    }
    this.#to(end);
  }

  #to(instant) {
    this.wall += instant - this.monotonic;
    this.monotonic = instant;
  }
}

export const clock = new Clock();

// ------------------------------------------------------------------------------------------ answers

const AS_OF = '2026-01-05T09:20:00.000000+00:00';

/** A row of arbiter.status(); the browser may write unless the changes say otherwise. */
export function status(changes = {}) {
  return {
    environment: 'local',
    can_write_local: true,
    enforced: true,
    code: null,
    message: 'Browser mode',
    retry_at: null,
    machine_id: null,
    machine_state: null,
    heartbeat_age: null,
    epoch: 1,
    draining: false,
    as_of: AS_OF,
    poll_interval: '00:00:05',
    ...changes,
  };
}

const MACHINE = { machine_id: 'ada00000-0000-4000-8000-0000000000c1', heartbeat_age: '00:00:01' };

export const LOCAL = status();
export const CLOUD = status({
  ...MACHINE,
  environment: 'cloud',
  can_write_local: false,
  code: 'cloud_active',
  message: 'Cloud active',
  machine_state: 'running',
  epoch: 2,
});
/** Every table is only observed, although the machine is active. */
export const WATCHING = status({ ...MACHINE, enforced: false, message: 'Watching', machine_state: 'running', epoch: 2 });
/** 27 s to go. */
export const COOLING = status({
  ...MACHINE,
  environment: 'none',
  can_write_local: false,
  code: 'cooling_down',
  message: 'Cooling down',
  machine_state: 'stopped',
  retry_at: '2026-01-05T09:20:27.000000+00:00',
  epoch: 2,
});
/** Too soon for a confirmation, then not. */
export const FAILED = status({
  ...MACHINE,
  environment: 'none',
  can_write_local: false,
  code: 'takeover_unconfirmed',
  message: 'Cloud failed',
  machine_state: 'error',
  retry_at: '2026-01-05T09:22:00.000000+00:00',
  epoch: 2,
});
export const CONFIRMABLE = { ...FAILED, retry_at: null };

/** What supabase-js resolves to. */
export const good = (data) => ({ data, error: null, status: 200 });
export const bad = (error) => ({ data: null, error, status: 500 });

/**
 * A client of supabase-js. A call of a function waits for `answer()`, unless `replies` says what it gets;
 * writes resolve to `written`.
 */
export class Client {
  calls = []; // of functions: { name, at, schema, signal, answer, fail }
  writes = []; // the chains of calls that made writes
  replies = null; // a function of the call
  written = { data: null, error: null, status: 201, count: null, statusText: 'Created' };

  rpc(name, ...rest) {
    return this.#call(name, null, rest);
  }

  schema(schema) {
    return { rpc: (name, ...rest) => this.#call(name, schema, rest) };
  }

  from(table) {
    const chain = [['from', table]];
    this.writes.push(chain);
    const request = {
      insert: (...args) => (chain.push(['insert', ...args]), request),
      select: (...args) => (chain.push(['select', ...args]), request),
      then: (resolve, reject) => Promise.resolve(this.written).then(resolve, reject),
    };
    return request;
  }

  /** The names of the functions called so far, and forget them. */
  names() {
    return this.calls.splice(0).map(({ name }) => name);
  }

  /** How many functions were called. */
  get count() {
    return this.calls.length;
  }

  get last() {
    return this.calls.at(-1);
  }

  #call(name, schema, rest) {
    const call = { name, schema, rest, at: clock.monotonic };
    const promise = new Promise((resolve, reject) => {
      call.answer = async (result) => {
        resolve(result);
        await settle();
      };
      call.fail = reject;
    });
    this.calls.push(call);
    if (this.replies) call.answer(this.replies(call));
    return {
      abortSignal: (signal) => {
        call.signal = signal;
        return promise;
      },
    };
  }
}

/** The types of the events of an Arbiter from now on, and their details. */
export function listen(arbiter) {
  const heard = [];
  for (const type of ['change', 'cloudstart', 'cloudstop', 'resume', 'confirm']) {
    arbiter.addEventListener(type, ({ detail }) => heard.push([type, detail]));
  }
  return {
    types: () => heard.splice(0).map(([type]) => type),
    all: () => heard.splice(0),
  };
}

// ------------------------------------------------------------------------------------------ the globals

const GLOBALS = ['document', 'addEventListener', 'removeEventListener'];
const PAGE = ['HTMLElement', 'customElements', 'CSSStyleSheet', 'MutationObserver', 'Element'];
const node = Object.fromEntries([...GLOBALS, ...PAGE].map((name) => [name, globalThis[name]]));

function define(values) {
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined) delete globalThis[name];
    else globalThis[name] = value;
  }
}

/** Take away what `bareWindow` or `openPage` has defined. */
export function closePage() {
  define(node);
}

/** The events of a window and of a document that can be hidden, without elements. */
export function bareWindow() {
  const window = new EventTarget();
  const document = new EventTarget();
  document.hidden = false;
  define({
    document,
    addEventListener: window.addEventListener.bind(window),
    removeEventListener: window.removeEventListener.bind(window),
  });
  return {
    document,
    send: (type, properties = {}) => window.dispatchEvent(Object.assign(new Event(type), properties)),
    hide(isHidden) {
      document.hidden = isHidden;
      document.dispatchEvent(new Event('visibilitychange'));
    },
  };
}

/** A page of happy-dom with this body, its elements defined by a module of its own. */
export async function openPage(body) {
  const { Window } = await import(pathToFileURL(process.env.HAPPY_DOM));
  const window = new Window({ url: 'http://localhost/' });
  define(Object.fromEntries(PAGE.map((name) => [name, window[name]])));
  define({
    document: window.document,
    addEventListener: window.addEventListener.bind(window),
    removeEventListener: window.removeEventListener.bind(window),
  });
  const errors = []; // of the page's own handlers, which nobody else hears
  window.addEventListener('error', ({ error }) => errors.push(error));
  const module = await load();
  window.document.body.innerHTML = body;
  return { window, document: window.document, errors, ...module };
}
