/**
 * The demo's page: Ada's browser and her cloud machine, each with a client of supabase-js of its own. What an app
 * needs of arbiter is in the first part; the rest shows what happens.
 */

import { Arbiter } from '/arbiter/arbiter.js';

const $ = (id) => document.getElementById(id);

// The keys of Ada and of her machine are only for who has the whole address.
const answer = await fetch('/config.json', { headers: { Authorization: `Bearer ${location.hash.slice(1)}` } });
if (!answer.ok) {
  $('about').textContent = 'Open the whole address that the demo has printed, with what comes after the #.';
  throw new Error(`no configuration: ${answer.status}`);
}
const config = await answer.json();

// The browser: the user's token, guarded inserts ------------------------------------------------------

const browser = connect('browser', config.userToken);
const arbiter = new Arbiter(browser);
arbiter.start();

async function generate(signal) {
  report('browser', signal, await arbiter.insert('signals', newSignal(signal)));
}

$('buy').addEventListener('click', () => generate('buy'));
$('sell').addEventListener('click', () => generate('sell'));

// The app's own rule for a marked button. arbiter leaves it alone.
$('allow-sell').addEventListener('change', ({ target }) => { $('sell').disabled = !target.checked; });

// A client that does not ask before it writes: the database rejects its write all the same.
$('unguarded').addEventListener('click', async () => {
  report('browser', 'insert', await browser.from('signals').insert(newSignal('buy')));
});

setInterval(() => { if ($('strategy').checked) generate('buy'); }, 2_000);
arbiter.addEventListener('change', show);

function newSignal(signal, symbol = $('symbol').value, source = {}) {
  return {
    trader_id: config.trader, symbol, interval: '1m', signal, price: 97_250.5, bar_time: nextBar(), ...source,
  };
}

// The machine: the service role's key, heartbeats, batches --------------------------------------------

const machine = connect('machine', config.serviceKey);
let row = null; // its row in the registry
let booting = null;

const change = (values) => machine.from('cloud_machines').update(values).eq('id', row.id).select().maybeSingle();

// A machine's clock may be wrong: the database stamps its own.
const heartbeat = () => ({ last_health_check: new Date(0).toISOString() });

async function act(name, request) {
  const result = await request;
  report('machine', name, result);
  await show();
  return result;
}

async function beat() {
  if (!row || !$('heartbeat').checked) return;
  const { error } = await change(heartbeat());
  if (error) report('machine', 'heartbeat', { error });
}
setInterval(beat, config.heartbeatInterval);

async function run(name) {
  const result = await act(name, change({ status: 'running', error_message: null, ...heartbeat() }));
  $('heartbeat').checked = !result.error;
  await beat();
  await show();
}

const actions = {
  provision: () =>
    act('provision', machine.from('cloud_machines').insert({ user_id: config.user, machine_id: crypto.randomUUID() })),
  start: async () => {
    await act('starting', change({ status: 'starting', started_at: new Date().toISOString() }));
    booting = setTimeout(() => run('running'), config.bootTime);
  },
  stop: async () => {
    await act('stopping', change({ status: 'stopping', stopped_at: new Date().toISOString() }));
    $('heartbeat').checked = false;
    await act('stopped', change({ status: 'stopped' }));
  },
  fail: () => act('error', change({ status: 'error', error_message: 'stop request timed out' })),
  recover: () => run('running'),
  delete: () => act('delete', machine.from('cloud_machines').delete().eq('id', row.id)),
  batch: () => {
    const source = { source: 'cloud', machine_id: row.id };
    const signals = Array.from({ length: 100 }, (_, n) => newSignal('sell', `COIN${n}USDT`, source));
    return act('batch of 100', machine.from('signals').insert(signals));
  },
};
for (const [id, action] of Object.entries(actions)) {
  $(id).addEventListener('click', () => {
    clearTimeout(booting);
    action();
  });
}
$('heartbeat').addEventListener('change', beat);

/** Which of the machine's buttons make sense, by its status; no row is `none`. */
const SENSIBLE = {
  none: ['provision'],
  provisioning: ['start', 'delete', 'batch'],
  starting: ['stop', 'fail', 'delete', 'batch'],
  running: ['stop', 'fail', 'delete', 'batch'],
  stopping: ['stop', 'fail', 'delete', 'batch'],
  stopped: ['start', 'delete', 'batch'],
  error: ['start', 'stop', 'recover', 'delete', 'batch'],
};

// What is shown ---------------------------------------------------------------------------------------

function report(who, what, { error, status }) {
  const outcome = $(`${who}-outcome`);
  outcome.dataset.good = error ? 'no' : 'yes';
  const refused = status ? `refused with ${status}` : 'not sent';
  outcome.textContent = error ? `${what}: ${refused}, ${error.code}: ${error.message}` : `${what}: written`;
  if (who === 'browser') show();
}

let showing = false;
let outdated = false;

/** Read and show everything again. Calls during a read cause one more read, not one each. */
async function show() {
  outdated = true;
  if (showing) return;
  showing = true;
  while (outdated) {
    outdated = false;
    await Promise.all([showSignals(), showMachine(), showHistory()]);
  }
  showing = false;
}
$('filter').addEventListener('change', show);
setInterval(() => { if (!document.hidden) show(); }, 2_000);

async function showSignals() {
  const signals = browser.from('signals').select('created_at, symbol, signal, source');
  const filtered = $('filter').value ? signals.eq('source', $('filter').value) : signals;
  const { data } = await filtered.order('created_at', { ascending: false }).order('symbol').limit(30);
  if (data) fill('signals', data, ({ created_at, symbol, signal, source }) => [time(created_at), symbol, signal, { text: source, kind: source }]);
}

async function showMachine() {
  const { data, error } = await machine.from('cloud_machines').select().eq('user_id', config.user).maybeSingle();
  if (error) return;
  row = data;
  if (!row) $('heartbeat').checked = false;
  const age = row?.last_health_check ? `, last heartbeat ${time(row.last_health_check)}` : '';
  $('machine-state').textContent = row ? `${row.status}${age}` : 'none';
  $('heartbeat').disabled = !row;
  const sensible = SENSIBLE[row?.status ?? 'none'];
  for (const id of Object.keys(actions)) $(id).disabled = !sensible.includes(id);
}

async function showHistory() {
  const { data } = await browser.from('handovers').select().order('epoch', { ascending: false }).limit(30);
  if (data) {
    fill('history', data, ({ epoch, from_holder, to_holder, reason, handed_over_at }) => [
      epoch, from_holder ?? '-', { text: to_holder, kind: to_holder }, reason, time(handed_over_at),
    ]);
  }
}

for (const [name, value] of Object.entries(config.periods)) {
  const term = document.createElement('dt');
  const description = document.createElement('dd');
  term.textContent = name.replaceAll('_', ' ');
  description.textContent = value;
  $('periods').append(term, description);
}

function fill(id, items, cells) {
  $(id).tBodies[0].replaceChildren(...items.map((item) => {
    const line = document.createElement('tr');
    for (const cell of cells(item)) {
      const { text, kind } = typeof cell === 'object' ? cell : { text: cell };
      const element = line.insertCell();
      element.textContent = text;
      if (kind) element.dataset.kind = kind;
    }
    return line;
  }));
}

function time(instant) {
  return new Date(instant).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false });
}

let bar = Date.now();

/** Each signal is for a bar of its own. */
function nextBar() {
  bar += 60_000;
  return new Date(bar).toISOString();
}

// HTTP ------------------------------------------------------------------------------------------------

/** A client of supabase-js whose answers are listed. */
function connect(who, token) {
  return supabase.createClient(location.origin, config.anonKey, {
    accessToken: async () => token,
    global: { fetch: (resource, init) => listed(who, resource, init) },
  });
}

const MOST_ANSWERS = 30;
let answers = [];
let quiet = 0;

async function listed(who, resource, init) {
  const url = new URL(resource);
  const path = url.pathname.replace('/rest/v1/', '');
  const answer = { time: Date.now(), who, request: `${init.method} ${path}`, status: 'none', code: '', retryAfter: '' };
  try {
    const response = await fetch(resource, init);
    answer.status = response.status;
    answer.retryAfter = response.headers.get('Retry-After') ?? '';
    if (!response.ok) answer.code = (await response.clone().json().catch(() => ({}))).code ?? '';
    return response;
  } finally {
    list(answer, init);
  }
}

/** Reads, polls and heartbeats that went well are only counted. */
function list(answer, { method, body }) {
  const isRoutine = method === 'GET' || answer.request.endsWith('execution_status') || body === JSON.stringify(heartbeat());
  if (answer.status < 400 && isRoutine) quiet += 1;
  else answers = [answer, ...answers].slice(0, MOST_ANSWERS);
  $('not-shown').textContent = `and ${quiet} reads, polls and heartbeats that went well`;
  fill('http', answers, ({ time: at, who, request, status, code, retryAfter }) => [
    time(at), who, request, { text: status, kind: status < 400 ? 'good' : 'bad' }, code, retryAfter,
  ]);
}

await show();
