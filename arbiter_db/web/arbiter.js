/**
 * arbiter in the browser: shows who generates signals now, this browser or the user's cloud machine,
 * and keeps the page from trying when it may not.
 *
 *   import { Arbiter } from './arbiter.js';
 *
 *   const arbiter = new Arbiter(supabase);   // a client of supabase-js; arbiter.expose() was called
 *   arbiter.start();                         // when the user has signed in
 *   const { data, error } = await arbiter.insert('signals', rows, { select: true });
 *   arbiter.stop();                          // when the user signs out; start() again for the next one
 *
 *   <arbiter-badge></arbiter-badge>          Cloud active, Browser mode, Cooling down 0:27, Watching, Unknown ...
 *   <arbiter-toasts></arbiter-toasts>        tells when the cloud machine starts and stops
 *   <arbiter-confirm></arbiter-confirm>      asks before the browser takes over from a failed machine
 *   <button data-arbiter-generates>          off while this browser may not generate signals
 *
 * The database decides who may write, in the transaction of each write. This module asks it, shows the
 * answer, and does not send writes that the database would reject. Without a fresh answer (none yet, an old
 * one, an error, no network) the state is unknown, and then it allows no write.
 *
 * While no table is in mode enforce (`enforced` is false), the page works as if arbiter were not there: the badge
 * says Watching, and every write is allowed, after the first answer also when the state is unknown.
 *
 * Events of an Arbiter (their `detail` is the new status, null when unknown):
 *
 *   change      what is known has changed
 *   cloudstart  the cloud machine has become active; this browser only watches now
 *   cloudstop   it is active no longer: stopped, failed or silent (the status says whether the browser
 *               may write already)
 *   resume      the browser may write again, some time after a cloudstop
 *   confirm     a takeover has become possible that the user must confirm
 *
 * The last four compare an answer with the last known one, so they are not repeated after a time of
 * unknown. Of them only confirm can come with the first answer after start(), or with the first one after
 * enforcing has begun: then the machine has not started.
 *
 * Elements use the Arbiter that was started first, or the one in their property `arbiter`. Their colours
 * are custom properties (see STYLES). No build step, no dependency, no inline script or style.
 */

const DEFAULT_INTERVAL_MS = 5_000;
const SHORTEST_INTERVAL_MS = 250;
const LONGEST_INTERVAL_MS = 60_000;

/** How much less often a hidden page polls. */
const HIDDEN_FACTOR = 6;

/** A poll is given up after its interval, within these bounds: phones are slow to connect. */
const SHORTEST_TIMEOUT_MS = 3_000;
const LONGEST_TIMEOUT_MS = 10_000;

/** The longest pause after failed polls. */
const LONGEST_BACKOFF_MS = 60_000;

/** A confirmation may wait for writes in flight (arbiter.settings.drain_timeout), and is never repeated. */
const CONFIRM_TIMEOUT_MS = 15_000;

/** An answer expires this long after the latest possible end of the next poll. */
const SLACK_MS = 1_000;

/** A status has changed when one of these columns differs. The heartbeat's age differs in each answer. */
const TOLD = [
  'environment', 'can_write_local', 'enforced', 'code', 'message', 'retry_at', 'machine_id', 'machine_state', 'epoch',
  'draining',
];

const UNKNOWN = 'Unknown';

/** ms since it was made, by the clock that shows more: one may stop while the device sleeps, the other may be set. */
class Stopwatch {
  #monotonic = performance.now();
  #wall = Date.now();

  get elapsed() {
    return Math.max(performance.now() - this.#monotonic, Date.now() - this.#wall);
  }
}

/** One answer of the database, and when it was asked for and received here. */
class Answer {
  /** @returns {Answer | null} null when the data is not a status */
  static read(data, asked) {
    const status = Array.isArray(data) && data.length === 1 ? data[0] : data;
    const isStatus = typeof status?.can_write_local === 'boolean' && typeof status.message === 'string';
    return isStatus ? new Answer(status, asked) : null;
  }

  #received = new Stopwatch();

  constructor(status, asked) {
    this.status = Object.freeze({ ...status });
    this.asked = asked;
    this.interval = milliseconds(status.poll_interval);
    // Both instants are the server's. The client's clock may be wrong: it only measures the time since.
    const wait = Date.parse(status.retry_at) - Date.parse(status.as_of);
    this.wait = Number.isFinite(wait) ? wait : null;
  }

  /** ms until retry_at, counted from the receipt of the answer, so that it never ends early. */
  get remaining() {
    return this.wait === null ? null : Math.max(0, this.wait - this.#received.elapsed);
  }
}

/** An interval as PostgreSQL prints it, in ms and within reason. */
function milliseconds(interval) {
  const [, hours, minutes, seconds] = /^(\d+):(\d+):(\d+(?:\.\d+)?)$/.exec(interval ?? '') ?? [];
  const found = ((Number(hours) * 60 + Number(minutes)) * 60 + Number(seconds)) * 1_000;
  return Number.isNaN(found) ? DEFAULT_INTERVAL_MS : clamp(found, SHORTEST_INTERVAL_MS, LONGEST_INTERVAL_MS);
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const randomBetween = (low, high) => low + Math.random() * (high - low);
const isRejection = (error) => /^WX\d{3}$/.test(error?.code ?? '');
const isEnforced = (status) => status?.enforced !== false;
const isConfirmable = (status) => status?.code === 'takeover_unconfirmed' && !status.retry_at;

/** The result of a write that was not sent, in the shape of supabase-js. */
function refusal(status) {
  return {
    data: null,
    count: null,
    status: 0,
    statusText: '',
    error: {
      name: 'ArbiterRefusal',
      code: status ? 'arbiter_not_local' : 'arbiter_unknown',
      message: status ? status.message : UNKNOWN,
      details: status?.code ?? '',
      hint: 'Nothing was sent: this browser may not write now, or does not know whether it may.',
    },
  };
}

/** The Arbiter of all elements without one of their own. */
let fallback = null;

export class Arbiter extends EventTarget {
  #supabase;
  #functions;
  #readOnly;

  /** @type {Answer | null} */
  #answer = null;
  #error = null;
  #known = null; // the last status that was known, for the events
  #enforced = true; // as the last answer said; true without one
  #told = false; // what the last change told: a status as JSON, or whether the unknown allows writes

  // Requests are numbered as they begin; an answer counts only if nothing newer has been settled.
  #begun = 0;
  #settled = 0;

  #running = false;
  #usual = DEFAULT_INTERVAL_MS; // between polls, as the last answer said
  #polling = null;
  #next = null;
  #abort = null;
  #failures = 0;
  #timer;
  #expiry;

  /**
   * @param supabase a client of supabase-js, with the user's session
   * @param {object} [options]
   * @param {string} [options.schema] where arbiter.expose() has put the functions, if that is not the client's schema
   * @param {Document | ShadowRoot | Element | null} [options.root] where elements marked `data-arbiter-generates` are
   *   switched off; null for nowhere. One running Arbiter for each root.
   */
  constructor(supabase, { schema, root = globalThis.document } = {}) {
    super();
    this.#supabase = supabase;
    this.#functions = schema ? supabase.schema(schema) : supabase;
    this.#readOnly = root ? new ReadOnly(root, () => this.canGenerate) : null;
  }

  /** Start polling. Elements marked as generating signals are off until the database allows local writes. */
  start() {
    if (this.#running) return;
    this.#running = true;
    this.#readOnly?.start();
    globalThis.document?.addEventListener('visibilitychange', this.#onVisibility);
    globalThis.addEventListener?.('online', this.#onReturn);
    globalThis.addEventListener?.('pageshow', this.#onReturn);
    globalThis.addEventListener?.('offline', this.#onOffline);
    fallback ??= this;
    ArbiterElement.bindAll();
    this.refresh();
  }

  /** Stop polling. The state becomes unknown, so marked elements stay off until a started Arbiter allows them. */
  stop() {
    if (!this.#running) return;
    this.#running = false;
    clearTimeout(this.#timer);
    globalThis.document?.removeEventListener('visibilitychange', this.#onVisibility);
    globalThis.removeEventListener?.('online', this.#onReturn);
    globalThis.removeEventListener?.('pageshow', this.#onReturn);
    globalThis.removeEventListener?.('offline', this.#onOffline);
    this.#abort?.abort();
    this.#enforced = true;
    this.#forget();
    this.#known = null; // the next user's first answer is not compared with this user's
    this.#readOnly?.stop();
    if (fallback === this) fallback = null;
    ArbiterElement.bindAll();
  }

  /**
   * Poll now. Resolves once a request that began after this call has been answered or has failed; never rejects.
   * Polls never overlap: one under way is followed by one more.
   */
  refresh() {
    if (this.#polling) {
      this.#next ??= this.#polling.then(() => {
        this.#next = null;
        return this.refresh();
      });
      return this.#next;
    }
    clearTimeout(this.#timer);
    this.#polling = this.#poll().finally(() => {
      this.#polling = null;
      this.#schedule();
    });
    return this.#polling;
  }

  /** The last answer (the columns of arbiter.status()), null when there is none that is fresh. */
  get status() {
    return this.#answer && this.#answer.asked.elapsed < this.#lifetime() ? this.#answer.status : null;
  }

  /** Whether this browser may generate signals, as far as it knows at this moment. */
  get canGenerate() {
    const { status } = this;
    return status ? status.can_write_local : !this.#enforced;
  }

  /** Whether the takeover from a failed machine waits for the user's yes. */
  get canConfirm() {
    return isConfirmable(this.status);
  }

  /** ms until it is worth trying again (retry_at), by the server's clock; null when that is unknown. */
  get remaining() {
    return this.status && this.#answer.remaining;
  }

  /** What went wrong with the last poll, null after a good one. */
  get error() {
    return this.#error;
  }

  /**
   * Insert rows, if this browser may write, and answer as supabase-js does. Nothing is sent otherwise; `error.code`
   * is then `arbiter_not_local` or `arbiter_unknown`, and `status` 0. When the database rejects it (HTTP 409, a
   * code from WX001 to WX008), the page is in read-only mode before this resolves, and the new state is known.
   *
   * @param {string} table
   * @param {object | object[]} rows
   * @param {object} [options]
   * @param {string | boolean} [options.select] columns to return, true for all
   */
  insert(table, rows, { select = false } = {}) {
    return this.write(() => {
      const request = this.#supabase.from(table).insert(rows);
      return select ? request.select(select === true ? '*' : select) : request;
    });
  }

  /**
   * The same for any other write: `arbiter.write(() => supabase.from('trades').update(...).eq(...))`.
   *
   * @param {() => PromiseLike<object>} build makes the request; called only if this browser may write
   */
  async write(build) {
    if (!this.status) await this.refresh();
    if (!this.canGenerate) return refusal(this.status);
    try {
      const result = await build();
      if (isRejection(result.error)) await this.#reconsider();
      return result;
    } catch (error) {
      // A client with throwOnError().
      if (isRejection(error)) await this.#reconsider();
      throw error;
    }
  }

  /**
   * Confirm a takeover after a machine's error, as the user. Returns what supabase-js returns, with the new status
   * known: HTTP 409 when there is nothing to confirm (any more).
   */
  async confirmTakeover() {
    const number = ++this.#begun;
    const asked = new Stopwatch();
    const result = await this.#call('confirm_takeover', new AbortController(), CONFIRM_TIMEOUT_MS);
    const answer = result.error ? null : Answer.read(result.data, asked);
    if (answer && number > this.#settled) this.#settle(number, answer);
    else await this.refresh();
    return result;
  }

  // ---------------------------------------------------------------------------------------- polling

  async #poll() {
    const number = ++this.#begun;
    const asked = new Stopwatch();
    this.#abort = new AbortController();
    const { data, error } = await this.#call('execution_status', this.#abort, this.#timeout());
    if (number <= this.#settled) return;
    const answer = error ? null : Answer.read(data, asked);
    this.#error = answer ? null : error ?? { message: 'the answer is not a status' };
    this.#failures = answer ? 0 : this.#failures + 1;
    this.#settle(number, answer);
  }

  async #call(name, abort, limit) {
    const timer = setTimeout(() => abort.abort(new DOMException('no answer in time', 'TimeoutError')), limit);
    // Before the request supabase-js may wait for a new token. The signal does not end that wait, so race it as well.
    const aborted = new Promise((_, reject) => {
      abort.signal.addEventListener('abort', () => reject(abort.signal.reason));
    });
    try {
      return await Promise.race([this.#functions.rpc(name).abortSignal(abort.signal), aborted]);
    } catch (error) {
      return { data: null, error, status: 0 };
    } finally {
      clearTimeout(timer);
    }
  }

  #interval() {
    return globalThis.document?.hidden ? this.#usual * HIDDEN_FACTOR : this.#usual;
  }

  #timeout() {
    return clamp(this.#interval(), SHORTEST_TIMEOUT_MS, LONGEST_TIMEOUT_MS);
  }

  /** ms from a poll to the latest possible end of the next one. */
  #lifetime() {
    return this.#interval() + this.#timeout() + SLACK_MS;
  }

  #schedule() {
    clearTimeout(this.#timer);
    if (this.#running) this.#timer = setTimeout(() => this.refresh(), this.#pause());
  }

  #pause() {
    if (this.#failures) {
      return randomBetween(0.5, 1) * Math.min(LONGEST_BACKOFF_MS, this.#interval() * 2 ** (this.#failures - 1));
    }
    const usual = this.#interval() * randomBetween(0.9, 1);
    return this.remaining ? Math.min(usual, this.remaining + SHORTEST_INTERVAL_MS / 5) : usual;
  }

  #onVisibility = () => {
    this.#watch();
    this.#tell();
    if (document.hidden) this.#schedule();
    else this.refresh();
  };

  #onReturn = ({ type, persisted }) => {
    if (type === 'online' || persisted) this.refresh(); // pageshow: out of the back/forward cache
  };

  #onOffline = () => this.#forget();

  // ------------------------------------------------------------------------------ what is known

  #settle(number, answer) {
    this.#settled = number;
    this.#answer = answer;
    if (answer) {
      this.#usual = answer.interval;
      this.#enforced = isEnforced(answer.status);
    }
    this.#watch();
    this.#tell();
  }

  /** Make the state unknown, and ignore the answers to requests under way. */
  #forget() {
    this.#settle(++this.#begun, null);
  }

  #reconsider() {
    this.#enforced = true;
    this.#forget();
    return this.refresh();
  }

  /** Make the state unknown when its answer expires. */
  #watch() {
    clearTimeout(this.#expiry);
    if (!this.status) return;
    const left = this.#lifetime() - this.#answer.asked.elapsed;
    this.#expiry = setTimeout(() => {
      this.#watch();
      this.#tell();
    }, left);
  }

  #tell() {
    const status = this.status;
    const told = status ? JSON.stringify(TOLD.map((column) => status[column])) : this.canGenerate;
    if (told === this.#told) return;
    this.#told = told;
    // A machine has neither started nor stopped because enforcing has begun or ended.
    const before = isEnforced(this.#known) === isEnforced(status) ? this.#known : null;
    if (status) this.#known = status;
    this.#readOnly?.update();
    this.#emit('change', status);
    if (!status) return;
    if (before) {
      const isCloud = status.code === 'cloud_active';
      const wasCloud = before.code === 'cloud_active';
      if (isCloud && !wasCloud) this.#emit('cloudstart', status);
      else if (wasCloud && !isCloud) this.#emit('cloudstop', status);
      else if (status.can_write_local && !before.can_write_local) this.#emit('resume', status);
    }
    if (isConfirmable(status) && !isConfirmable(before)) this.#emit('confirm', status);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

// ---------------------------------------------------------------------------------- read-only mode

const MARK = 'data-arbiter-generates';
const HELD = 'data-arbiter-held';

/**
 * Switches off the marked elements under a root while generating is not allowed. Elements that the app itself had
 * switched off stay off: only those with the attribute data-arbiter-held are switched on again.
 */
class ReadOnly {
  #root;
  #isAllowed;
  #observer = null;

  constructor(root, isAllowed) {
    this.#root = root;
    this.#isAllowed = isAllowed;
  }

  start() {
    this.#observer = new MutationObserver((records) => {
      this.#digest(records);
      this.#apply();
    });
    this.#observer.observe(this.#root, {
      subtree: true,
      childList: true,
      attributeFilter: [MARK, 'disabled', 'aria-disabled'],
    });
    for (const type of ['click', 'submit']) this.#root.addEventListener(type, this.#stop, true);
    this.#apply();
  }

  stop() {
    for (const type of ['click', 'submit']) this.#root.removeEventListener(type, this.#stop, true);
    this.#observer.disconnect();
    this.#observer = null;
  }

  update() {
    if (!this.#observer) return;
    this.#digest(this.#observer.takeRecords());
    this.#apply();
  }

  /** Take in what the app has switched off. */
  #digest(records) {
    for (const { type, target, attributeName } of records) {
      // The app has switched off an element that we hold: from now on only the app may switch it on.
      if (type === 'attributes' && attributeName === switchOf(target) && isOff(target)) target.removeAttribute(HELD);
    }
  }

  #apply() {
    const isAllowed = this.#isAllowed();
    for (const element of this.#root.querySelectorAll(`[${MARK}], [${HELD}]`)) {
      if (isAllowed || !element.hasAttribute(MARK)) release(element);
      else hold(element);
    }
    this.#observer.takeRecords(); // our own changes
  }

  /** A framework may have switched an element on again a moment ago, and a link or a form cannot be switched off. */
  #stop = (event) => {
    if (this.#isAllowed()) return;
    const path = event.composedPath().filter((node) => node instanceof Element);
    const isGenerating =
      event.type === 'submit'
        ? event.submitter?.hasAttribute(MARK) || path.some((node) => node.hasAttribute(MARK))
        : // Within a marked form only sending it generates; its fields stay usable.
          path.some((node) => node.hasAttribute(MARK) && node.localName !== 'form');
    if (!isGenerating) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  };
}

const switchOf = (element) => ('disabled' in element ? 'disabled' : 'aria-disabled');

function isOff(element) {
  return 'disabled' in element ? element.disabled : element.getAttribute('aria-disabled') === 'true';
}

function hold(element) {
  if (isOff(element)) return;
  element.setAttribute(HELD, '');
  if ('disabled' in element) element.disabled = true;
  else element.setAttribute('aria-disabled', 'true');
}

function release(element) {
  if (!element.hasAttribute(HELD)) return;
  element.removeAttribute(HELD);
  if ('disabled' in element) element.disabled = false;
  else element.removeAttribute('aria-disabled');
}

// ---------------------------------------------------------------------------------------- elements

/** Set the custom properties on the elements, or any ancestor, to give them other colours. */
const STYLES = `
:host {
  --_surface: var(--arbiter-surface, #ffffff);
  --_text: var(--arbiter-text, #1b2430);
  --_muted: var(--arbiter-muted, #4b5768);
  --_line: var(--arbiter-line, #c3cbd6);
  --_accent: var(--arbiter-accent, #1d4ed8);
  --_on-accent: var(--arbiter-on-accent, #ffffff);
  --_local: var(--arbiter-local, #14532d);
  --_local-back: var(--arbiter-local-back, #e2f4e8);
  --_cloud: var(--arbiter-cloud, #1e3a8a);
  --_cloud-back: var(--arbiter-cloud-back, #e0ebff);
  --_waiting: var(--arbiter-waiting, #713f12);
  --_waiting-back: var(--arbiter-waiting-back, #fdf1cc);
  --_failed: var(--arbiter-failed, #7f1d1d);
  --_failed-back: var(--arbiter-failed-back, #fde4e4);
  --_unknown: var(--arbiter-unknown, #3b4657);
  --_unknown-back: var(--arbiter-unknown-back, #e8ebf0);
  font: 500 0.9375rem/1.4 var(--arbiter-font, system-ui, sans-serif);
  color: var(--_text);
}
@media (prefers-color-scheme: dark) {
  :host {
    --_surface: var(--arbiter-surface, #1d242e);
    --_text: var(--arbiter-text, #e8ecf2);
    --_muted: var(--arbiter-muted, #aab5c4);
    --_line: var(--arbiter-line, #48546a);
    --_accent: var(--arbiter-accent, #8fb4ff);
    --_on-accent: var(--arbiter-on-accent, #0d1730);
    --_local: var(--arbiter-local, #95e6b3);
    --_local-back: var(--arbiter-local-back, #15301f);
    --_cloud: var(--arbiter-cloud, #a9c7ff);
    --_cloud-back: var(--arbiter-cloud-back, #172a4d);
    --_waiting: var(--arbiter-waiting, #f7d774);
    --_waiting-back: var(--arbiter-waiting-back, #362a0d);
    --_failed: var(--arbiter-failed, #ffb4b4);
    --_failed-back: var(--arbiter-failed-back, #421919);
    --_unknown: var(--arbiter-unknown, #cbd3de);
    --_unknown-back: var(--arbiter-unknown-back, #2b333f);
  }
}
:host([hidden]) { display: none; }
button {
  font: inherit;
  color: inherit;
  background: none;
  border: 1px solid currentColor;
  border-radius: 0.5em;
  padding: 0.35em 0.8em;
  min-height: 1.75em;
  cursor: pointer;
}
button:disabled { cursor: default; opacity: 0.6; }
:focus-visible { outline: 3px solid var(--_accent); outline-offset: 2px; }

.badge {
  display: inline-flex;
  align-items: center;
  gap: 0.5em;
  padding: 0.25em 0.8em;
  border: 1px solid currentColor;
  border-radius: 1.2em;
  color: var(--_color);
  background: var(--_back);
  font-variant-numeric: tabular-nums;
}
.badge[data-state=unknown] { --_color: var(--_unknown); --_back: var(--_unknown-back); border-style: dashed; }
.badge[data-state=watching] { --_color: var(--_muted); --_back: var(--_surface); border-color: var(--_line); }
.badge[data-state=local] { --_color: var(--_local); --_back: var(--_local-back); }
.badge[data-state=cloud_active] { --_color: var(--_cloud); --_back: var(--_cloud-back); }
.badge[data-state=cooling_down] { --_color: var(--_waiting); --_back: var(--_waiting-back); }
.badge[data-state=takeover_unconfirmed] { --_color: var(--_failed); --_back: var(--_failed-back); }
.badge button { padding: 0 0.6em; border-radius: 1em; }
.dot { inline-size: 0.6em; block-size: 0.6em; border-radius: 50%; background: currentColor; }
.badge[data-state=unknown] .dot { background: none; box-shadow: inset 0 0 0 2px currentColor; }
.badge[data-machine=starting]:not([data-state=watching]) .dot { animation: beat 1.2s ease-in-out infinite alternate; }
@keyframes beat { to { opacity: 0.25; } }

.toasts {
  position: fixed;
  z-index: 2147483000;
  inset-block-end: 1rem;
  inset-inline-end: 1rem;
  max-inline-size: min(26rem, calc(100vw - 2rem));
  display: grid;
  gap: 0.5rem;
  pointer-events: none;
}
.toast {
  display: flex;
  align-items: center;
  gap: 0.75rem;
  padding: 0.6rem 0.6rem 0.6rem 1rem;
  color: var(--_text);
  background: var(--_surface);
  border: 1px solid var(--_line);
  border-inline-start: 4px solid var(--_accent);
  border-radius: 0.6rem;
  box-shadow: 0 6px 24px rgb(0 0 0 / 0.22);
  pointer-events: auto;
  animation: arrive 0.2s ease-out;
}
.toast span { flex: 1; }
.toast button { border-color: transparent; min-inline-size: 2rem; min-block-size: 2rem; padding: 0; }
.toast button:hover { border-color: currentColor; }
@keyframes arrive { from { opacity: 0; transform: translateY(0.5rem); } }

dialog {
  max-inline-size: min(30rem, calc(100vw - 2rem));
  padding: 1.5rem;
  color: var(--_text);
  background: var(--_surface);
  border: 1px solid var(--_line);
  border-radius: 0.9rem;
  box-shadow: 0 18px 60px rgb(0 0 0 / 0.35);
  box-sizing: border-box;
}
dialog::backdrop { background: rgb(10 14 22 / 0.55); }
dialog h2 { margin: 0 0 0.6rem; font-size: 1.2rem; line-height: 1.3; }
dialog p { margin: 0 0 0.8rem; color: var(--_muted); font-weight: 400; }
dialog .problem { color: var(--_failed); background: var(--_failed-back); padding: 0.5rem 0.75rem; border-radius: 0.5rem; }
dialog .problem:empty { display: none; }
dialog .choices { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0.6rem; margin-block-start: 1.2rem; }
dialog .yes { color: var(--_on-accent); background: var(--_accent); border-color: var(--_accent); }

@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
`;

let sheet;

/** Text and attributes only, never markup: a text of the server may contain anything. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'text') element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Put a child at the end, or take it away: a hidden child would still be part of the page's text. */
function show(parent, child, isWanted) {
  if (!isWanted) child.remove();
  else if (child.parentNode !== parent) parent.append(child);
}

/** The base of the elements: their Arbiter, and a shadow root with the styles. A server has no HTMLElement. */
class ArbiterElement extends (globalThis.HTMLElement ?? Object) {
  static #connected = new Set();

  /** To be called when the Arbiter of the elements without one of their own has changed. */
  static bindAll() {
    for (const element of ArbiterElement.#connected) element.#bind();
  }

  #given = null;
  #bound = null;

  constructor(...content) {
    super();
    if (!sheet) {
      sheet = new CSSStyleSheet();
      sheet.replaceSync(STYLES);
    }
    const shadow = this.attachShadow({ mode: 'open' });
    shadow.adoptedStyleSheets = [sheet];
    shadow.append(...content);
  }

  /** The Arbiter that this element shows. */
  get arbiter() {
    return this.#given ?? fallback;
  }

  set arbiter(arbiter) {
    this.#given = arbiter ?? null;
    this.#bind();
  }

  connectedCallback() {
    ArbiterElement.#connected.add(this);
    this.#bind();
  }

  disconnectedCallback() {
    ArbiterElement.#connected.delete(this);
    this.#bind();
  }

  #bind() {
    const arbiter = this.isConnected ? this.arbiter : null;
    if (arbiter !== this.#bound) {
      for (const type of this.constructor.events) {
        this.#bound?.removeEventListener(type, this);
        arbiter?.addEventListener(type, this);
      }
      this.#bound = arbiter;
    }
    this.update();
  }

  /** Show the present state. Called when the state or the Arbiter may have changed. */
  update() {}
}

/** `<arbiter-badge>`: the state in two words; a countdown while cooling down, a button while a confirmation is asked for. */
export class ArbiterBadge extends ArbiterElement {
  static events = ['change'];

  #badge;
  #text = make('span', { role: 'status' });
  // Next to the live region, not in it: a screen reader must not announce each second.
  #countdown = make('span', { role: 'timer', 'aria-label': 'time left' });
  #confirm = make('button', { type: 'button', text: 'Take over …', onclick: () => this.#ask() });
  #timer;

  constructor() {
    const badge = make('span', { class: 'badge', part: 'badge' });
    super(badge);
    this.#badge = badge;
    badge.append(make('span', { class: 'dot', 'aria-hidden': 'true' }), this.#text, ' ');
  }

  handleEvent() {
    this.update();
  }

  update() {
    const status = this.arbiter?.status ?? null;
    const text = status?.message ?? UNKNOWN;
    if (this.#text.textContent !== text) this.#text.textContent = text;
    this.#badge.dataset.state = status ? status.code ?? (isEnforced(status) ? 'local' : 'watching') : 'unknown';
    this.#badge.dataset.machine = status?.machine_state ?? '';
    show(this.#badge, this.#confirm, this.arbiter?.canConfirm);
    this.#count(status);
  }

  #count(status) {
    clearTimeout(this.#timer);
    const left = status?.code === 'cooling_down' && this.isConnected ? this.arbiter.remaining : null;
    show(this.#badge, this.#countdown, left !== null);
    if (left === null) return;
    const seconds = Math.ceil(left / 1_000);
    this.#countdown.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
    if (seconds > 0) this.#timer = setTimeout(() => this.update(), left - (seconds - 1) * 1_000);
  }

  #ask() {
    const { arbiter } = this;
    arbiter.dispatchEvent(new CustomEvent('confirm', { detail: arbiter.status }));
  }
}

const TOAST_MS = 8_000;
const MOST_TOASTS = 3;

/** A toast's text when the cloud is no longer active, by the code of the new status. */
const STOPPED = {
  cooling_down: 'Cloud machine stopped - cooling down before browser mode',
  takeover_unconfirmed: 'Cloud machine failed - nobody generates signals until it recovers or you take over',
};

/** `<arbiter-toasts>`: a polite live region with what has happened to the cloud machine. Esc or the button dismisses. */
export class ArbiterToasts extends ArbiterElement {
  static events = ['cloudstart', 'cloudstop', 'resume'];

  #toasts;
  #cameFrom = null;

  constructor() {
    // Additions only: a toast that goes away is not announced.
    const toasts = make('div', {
      class: 'toasts', part: 'toasts', role: 'log', 'aria-label': 'Notifications', 'aria-relevant': 'additions',
    });
    super(toasts);
    this.#toasts = toasts;
    toasts.addEventListener('focusin', ({ relatedTarget }) => {
      if (relatedTarget && !toasts.contains(relatedTarget)) this.#cameFrom = relatedTarget;
    });
  }

  handleEvent({ type, detail }) {
    if (type === 'cloudstart') this.show('Cloud machine started - switching to monitoring mode');
    if (type === 'cloudstop') this.show(STOPPED[detail.code] ?? 'Cloud machine stopped - browser mode');
    if (type === 'resume') this.show('Browser mode - signals are generated here again');
  }

  /** Show a text for some seconds, longer while it is pointed at or has the focus. */
  show(text) {
    let timer;
    const stay = () => clearTimeout(timer);
    const leave = () => {
      stay();
      timer = setTimeout(() => this.#dismiss(toast), TOAST_MS);
    };
    const toast = make(
      'div',
      {
        class: 'toast', part: 'toast', onmouseenter: stay, onmouseleave: leave, onfocusin: stay, onfocusout: leave,
        onkeydown: (event) => event.key === 'Escape' && this.#dismiss(toast),
      },
      make('span', { text }),
      make('button', { type: 'button', text: '✕', 'aria-label': 'Dismiss', onclick: () => this.#dismiss(toast) }),
    );
    this.#toasts.append(toast);
    if (this.#toasts.children.length > MOST_TOASTS) this.#toasts.firstElementChild.remove();
    leave();
  }

  #dismiss(toast) {
    const hadFocus = toast.contains(this.shadowRoot.activeElement);
    const neighbour = toast.nextElementSibling ?? toast.previousElementSibling;
    toast.remove();
    if (!hadFocus) return;
    if (neighbour) neighbour.querySelector('button').focus();
    else if (this.#cameFrom?.isConnected) this.#cameFrom.focus();
  }
}

/**
 * `<arbiter-confirm>`: asks, in a modal dialog, before the browser takes over from a machine in error. After "Not now"
 * it asks again only when the state has changed meanwhile, or when `open()` is called, or the badge's button pressed.
 */
export class ArbiterConfirm extends ArbiterElement {
  static events = ['change', 'confirm'];

  #dialog;
  #problem = make('p', { class: 'problem', role: 'alert' });
  #yes = make('button', { type: 'button', class: 'yes', text: 'Take over', onclick: () => this.#confirm() });

  constructor() {
    const dialog = make('dialog', { part: 'dialog', 'aria-labelledby': 'title', 'aria-describedby': 'text' });
    super(dialog);
    this.#dialog = dialog;
    dialog.append(
      make('h2', { id: 'title', text: 'Take over from the cloud machine?' }),
      make('p', {
        id: 'text',
        text:
          'Your cloud machine has reported an error and has not recovered. If you take over, this browser generates' +
          ' signals again and the machine is marked as stopped. Orders that it has sent already stay sent.',
      }),
      this.#problem,
      make(
        'div',
        { class: 'choices' },
        make('button', { type: 'button', text: 'Not now', autofocus: '', onclick: () => dialog.close() }),
        this.#yes,
      ),
    );
  }

  handleEvent({ type }) {
    if (type === 'confirm') this.open();
    else this.update();
  }

  update() {
    const arbiter = this.isConnected ? this.arbiter : null;
    // While the state is unknown the question stays open.
    if (!arbiter || (arbiter.status && !arbiter.canConfirm)) this.#dialog.close();
  }

  /** Ask, if there is anything to confirm. */
  open() {
    if (!this.arbiter?.canConfirm || this.#dialog.open) return;
    this.#problem.textContent = '';
    this.#dialog.showModal();
  }

  async #confirm() {
    if (this.#yes.hasAttribute('aria-disabled')) return; // on its way
    this.#problem.textContent = '';
    this.#yes.setAttribute('aria-disabled', 'true'); // not disabled: that would lose the focus
    const { error } = await this.arbiter.confirmTakeover();
    this.#yes.removeAttribute('aria-disabled');
    if (error) this.#problem.textContent = `Not taken over: ${error.message}`;
  }
}

if (globalThis.customElements && !customElements.get('arbiter-badge')) {
  customElements.define('arbiter-badge', ArbiterBadge);
  customElements.define('arbiter-toasts', ArbiterToasts);
  customElements.define('arbiter-confirm', ArbiterConfirm);
}
