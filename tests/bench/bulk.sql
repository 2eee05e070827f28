-- Batches and bulk loads, by name. The users here have a trader each and no machine.

-- name: alerts
-- Like signals, except that the row names its owner in a column.
create table public.alerts (
  id uuid not null default gen_random_uuid(),
  user_id uuid not null,
  symbol text not null,
  interval text not null,
  signal text not null,
  price numeric,
  bar_time timestamptz not null,
  created_at timestamptz not null default now(),
  constraint alerts_pkey primary key (id),
  constraint alerts_user_id_fkey
    foreign key (user_id) references auth.users (id) on delete cascade,
  constraint alerts_bar_key unique (user_id, symbol, interval, bar_time)
)

-- name: protect
select arbiter.protect('public.alerts', 'user_id')

-- name: columns
-- The columns that arbiter adds, for the variants without it.
alter table public.alerts
  add column source text not null default 'local' check (source in ('local', 'cloud')),
  add column machine_id uuid references public.cloud_machines (id) on delete set null;
create index on public.alerts (machine_id) where machine_id is not null;

-- name: exists
-- The naive trigger, where the row names its user.
create function public.tg_ask_user()
returns trigger
language plpgsql
as $$
begin
  if (new.source = 'cloud') <> exists (
    select from public.cloud_machines m
     where m.user_id = new.user_id
       and m.status = 'running'
       and m.last_health_check > clock_timestamp() - interval '1 day')
  then
    raise exception 'the other environment is active' using errcode = 'WX001';
  end if;
  return new;
end
$$;
create trigger alerts_ask before insert on public.alerts
  for each row execute function public.tg_ask_user();

-- name: users
insert into auth.users (id, email)
select md5(%(kind)s || n)::uuid, %(kind)s || n || '@example.com'
  from generate_series(1, %(users)s) as n;
insert into public.traders (id, user_id, name)
select md5(%(kind)s || 'trader' || n)::uuid, md5(%(kind)s || n)::uuid, 'Momentum'
  from generate_series(1, %(users)s) as n;

-- name: has_users
select count(*) >= %(users)s from auth.users u where u.email like %(kind)s || '%%'

-- name: first_signals
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select md5(%(kind)s || 'trader' || n)::uuid, 'BTCUSDT', '1m', 'buy', to_timestamp(0)
  from generate_series(1, %(users)s) as n

-- name: first_alerts
insert into public.alerts (user_id, symbol, interval, signal, bar_time)
select md5(%(kind)s || n)::uuid, 'BTCUSDT', '1m', 'buy', to_timestamp(0)
  from generate_series(1, %(users)s) as n

-- name: batch_signals
-- So many rows over so many users, one after the other from a first one on.
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select md5(%(kind)s || 'trader' || %(first)s::int + n %% %(users)s::int)::uuid, 'COIN' || n, '1m', 'buy',
       to_timestamp(%(bar)s)
  from generate_series(1, %(rows)s) as n

-- name: batch_alerts
insert into public.alerts (user_id, symbol, interval, signal, bar_time)
select md5(%(kind)s || %(first)s::int + n %% %(users)s::int)::uuid, 'COIN' || n, '1m', 'buy',
       to_timestamp(%(bar)s)
  from generate_series(1, %(rows)s) as n

-- name: copy_signals
copy public.signals (trader_id, symbol, interval, signal, bar_time) from stdin

-- name: copy_alerts
copy public.alerts (user_id, symbol, interval, signal, bar_time) from stdin

-- name: clear_signals
truncate public.signals

-- name: clear_alerts
truncate public.alerts
