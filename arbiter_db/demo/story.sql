-- The statements of the demo, by name: those of the clients first, then what the demo asks to check.

-- name: become_browser
set role authenticated;
select set_config('request.jwt.claims', %(claims)s, false);

-- name: become_service
set role service_role;

-- name: existing_signals
-- Their webhooks were sent long ago. 30 symbols, one trader each, a signal a minute.
alter table public.signals disable trigger signals_queue_webhook;
insert into public.signals (trader_id, symbol, interval, signal, price, bar_time, created_at)
select
  a.ids[1 + n %% 3],
  'COIN' || n %% 30 || 'USDT',
  '1m',
  (array['buy', 'sell'])[1 + n %% 2],
  100 + n %% 900,
  b.bar,
  b.bar
from
  (select array_agg(t.id order by t.id) as ids from public.traders as t) as a,
  generate_series(1, %(rows)s) as n,
  lateral (select timestamptz '2026-01-01 00:00+00' - n * interval '1 minute' as bar) as b;
alter table public.signals enable trigger signals_queue_webhook;

-- name: before_install
select
  current_user,
  (select rolsuper from pg_roles where rolname = current_user) as is_superuser,
  (select count(*) from public.signals) as signals,
  pg_relation_filenode('public.signals') as filenode

-- name: after_install
select
  source,
  count(*) as signals,
  pg_relation_filenode('public.signals') as filenode
from public.signals
group by source

-- name: allow_unowned
select arbiter.protect('public.signals', p_unowned => 'allow')

-- name: shorten_settings
update arbiter.settings
set
  heartbeat_interval = '1 second',
  heartbeat_timeout = '3 seconds',
  stop_grace = '3 seconds',
  error_takeover_delay = '4 seconds',
  poll_interval = '0.5 seconds'
returning heartbeat_interval, heartbeat_timeout, stop_grace, error_takeover_delay

-- name: show_settings
select heartbeat_interval, heartbeat_timeout, stop_grace, error_takeover_delay
from arbiter.settings

-- name: browser_signal
insert into public.signals (trader_id, symbol, interval, signal, price, bar_time)
values (%(trader)s, 'BTCUSDT', '5m', 'buy', 97250.5,
        %(bar)s)
returning source, machine_id

-- name: browser_retry
insert into public.signals (trader_id, symbol, interval, signal, price, bar_time)
values (%(trader)s, 'BTCUSDT', '5m', 'buy', 97250.5,
        %(bar)s)

-- name: builtin_signal
insert into public.signals (trader_id, symbol, interval, signal, price, bar_time)
values (%(trader)s, 'BTCUSDT', '5m', 'sell', 97250.5,
        %(bar)s)

-- name: machine_batch
insert into public.signals
  (trader_id, symbol, interval, signal, price, bar_time, source, machine_id)
select
  %(trader)s, 'COIN' || n || 'USDT', '5m', 'sell', 100 + n,
  %(bar)s, 'cloud', %(machine)s
from generate_series(1, 100) as n

-- name: provision
insert into public.cloud_machines (id, user_id, machine_id, region)
values (%(machine)s, %(user)s,
        %(provider_id)s, 'fra')
returning status

-- name: starting
update public.cloud_machines
set status = 'starting', started_at = %(clock)s
where id = %(machine)s

-- name: running
update public.cloud_machines
set status = 'running', last_health_check = %(clock)s
where id = %(machine)s
returning status, last_health_check, clock_timestamp() as server_clock

-- name: heartbeat
update public.cloud_machines
set last_health_check = %(clock)s
where id = %(machine)s
returning status, last_health_check

-- name: heartbeat_call
select arbiter.heartbeat(%(machine)s::uuid)

-- name: stopping
update public.cloud_machines
set status = 'stopping', stopped_at = %(clock)s
where id = %(machine)s

-- name: stopped
update public.cloud_machines
set status = 'stopped'
where id = %(machine)s

-- name: error
update public.cloud_machines
set status = 'error', error_message = 'stop request timed out'
where id = %(machine)s

-- name: confirm_takeover
select environment, can_write_local, message, epoch
from arbiter.confirm_takeover()

-- name: machine_row
select status, error_message
from public.cloud_machines
where id = %(machine)s

-- name: story_signals
select count(*)
from public.signals
where trader_id = %(trader)s
  and bar_time >= %(since)s

-- name: seconds_until
select greatest(0, extract(epoch from %(instant)s::timestamptz - clock_timestamp()))::float8

-- name: patience
select extract(epoch from heartbeat_timeout)::float8 from arbiter.settings

-- name: writers_by_epoch
select
  e.epoch,
  count(*) as signals,
  string_agg(distinct s.source, ' and ') as written_by,
  min(e.to_holder) as lease_held_by
from public.signals s
join public.traders t on t.id = s.trader_id
cross join lateral (
  select h.epoch, h.to_holder
  from arbiter.handovers h
  where h.user_id = t.user_id::text
    and (h.xid = s.arbiter_xid or not pg_visible_in_snapshot(s.arbiter_xid, h.snapshot))
  order by h.epoch desc
  limit 1
) as e
where t.user_id = %(user)s
  and s.arbiter_xid is not null
group by e.epoch
order by e.epoch

-- name: audit
select finding, reason, row_count
from arbiter.audit('public.signals', p_verbose => true)
