-- The variants of the benchmark, by name: how their databases are made, and what their clients send.
-- In every variant a machine is fresh for a day, so that no answer depends on the clock.

-- name: lean
-- A signal without the app's own extras.
drop trigger signals_queue_webhook on public.signals;
drop index public.signals_created_at_idx;
drop index public.signals_symbol_idx;

-- name: people
-- Users with a trader each; every second one has a machine that runs.
insert into auth.users (id, email)
select md5('user' || n)::uuid, n || '@example.com'
  from generate_series(1, %(users)s) as n;
insert into public.traders (id, user_id, name)
select md5('trader' || n)::uuid, md5('user' || n)::uuid, 'Momentum'
  from generate_series(1, %(users)s) as n;
insert into public.cloud_machines (id, user_id, machine_id, status)
select md5('machine' || n)::uuid, md5('user' || n)::uuid, 'm' || n, 'provisioning'
  from generate_series(2, %(users)s, 2) as n;

-- name: columns
-- The columns that arbiter adds, for the variants without it.
alter table public.cloud_machines add column last_health_check timestamptz;
alter table public.signals
  add column source text not null default 'local' check (source in ('local', 'cloud')),
  add column machine_id uuid references public.cloud_machines (id) on delete set null;
create index on public.signals (machine_id) where machine_id is not null;

-- name: exists
-- The naive trigger: asks for each row whether a machine of its user runs.
create function public.tg_ask()
returns trigger
language plpgsql
as $$
begin
  if (new.source = 'cloud') <> exists (
    select from public.cloud_machines m
      join public.traders t on t.user_id = m.user_id
     where t.id = new.trader_id
       and m.status = 'running'
       and m.last_health_check > clock_timestamp() - interval '1 day')
  then
    raise exception 'the other environment is active' using errcode = 'WX001';
  end if;
  return new;
end
$$;
create trigger signals_ask before insert on public.signals
  for each row execute function public.tg_ask();

-- name: policy
-- The same question in row security, with the rights of a function's owner: a browser may not read the registry.
create function public.may_write(p_trader_id uuid, p_source text)
returns boolean
language sql
stable
security definer
set search_path = ''
begin atomic
  select (p_source = 'cloud') = exists (
    select from public.cloud_machines m
      join public.traders t on t.user_id = m.user_id
     where t.id = p_trader_id
       and m.status = 'running'
       and m.last_health_check > clock_timestamp() - interval '1 day');
end;
-- The benchmark's clients are the owner, whom row security passes by unless it is forced.
alter table public.signals enable row level security, force row level security;
create policy signals_all on public.signals using (true) with check (true);
create policy signals_one_environment on public.signals as restrictive
  using (true) with check (public.may_write(trader_id, source));

-- name: settings
update arbiter.settings set heartbeat_timeout = '24 hours', drain_timeout = '10 seconds'

-- name: run
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()

-- name: first
-- The first write of a user creates the lease: that is measured elsewhere.
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select t.id, 'BTCUSDT', '1m', 'buy', to_timestamp(0)
  from public.traders t
 where not exists (select from public.cloud_machines m where m.user_id = t.user_id)

-- name: insert_local
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (md5('trader' || %(user)s::int)::uuid, 'BTCUSDT', '1m', 'buy', to_timestamp(%(bar)s))

-- name: insert_now
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (md5('trader' || %(user)s::int)::uuid, 'C' || %(client)s::int, '1m', 'buy', clock_timestamp())

-- name: insert_cloud
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (md5('trader' || %(user)s::int)::uuid, 'BTCUSDT', '1m', 'buy', to_timestamp(%(bar)s),
        'cloud', md5('machine' || %(user)s::int)::uuid)

-- name: batch_local
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select md5('trader' || %(user)s::int)::uuid, 'COIN' || n, '1m', 'buy', to_timestamp(%(bar)s)
  from generate_series(1, 100) as n

-- name: ask
-- The question of a careful client before it inserts.
select exists (
  select from public.cloud_machines m
   where m.user_id = md5('user' || %(user)s::int)::uuid
     and m.status = 'running'
     and m.last_health_check > clock_timestamp() - interval '1 day')

-- name: lock
select pg_advisory_xact_lock(%(user)s)

-- name: heartbeat
update public.cloud_machines set last_health_check = clock_timestamp()
 where id = md5('machine' || %(user)s::int)::uuid

-- name: probe
-- The least that a poll can cost: a row by primary key.
select * from public.cloud_machines where id = md5('machine' || %(user)s::int)::uuid

-- name: status
select * from arbiter.status(md5('user' || %(user)s::int)::uuid)

-- name: load_begin
begin

-- name: load_lock
select pg_advisory_xact_lock(:user)

-- name: load_ask
select exists (
  select from public.cloud_machines m
   where m.user_id = md5('user' || :user::int)::uuid
     and m.status = 'running'
     and m.last_health_check > clock_timestamp() - interval '1 day')

-- name: load_local
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (md5('trader' || :user::int)::uuid, 'C' || :client_id::int, '1m', 'buy', clock_timestamp())

-- name: load_cloud
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
values (md5('trader' || :user::int)::uuid, 'C' || :client_id::int, '1m', 'buy', clock_timestamp(),
        'cloud', md5('machine' || :user::int)::uuid)

-- name: load_commit
commit
