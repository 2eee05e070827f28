-- A handover, step by step.

-- name: keys
-- The columns that arbiter adds to signals and naive_locks.sql does not.
alter table public.signals
  add foreign key (machine_id) references public.cloud_machines (id) on delete set null;
create index on public.signals (machine_id) where machine_id is not null;

-- name: fresh
-- Users whose browser holds and whose machine is not running yet.
insert into auth.users (id, email)
select md5('user' || n)::uuid, n || '@example.com'
  from generate_series(%(first)s, %(last)s) as n;
insert into public.traders (id, user_id, name)
select md5('trader' || n)::uuid, md5('user' || n)::uuid, 'Momentum'
  from generate_series(%(first)s, %(last)s) as n;
insert into public.cloud_machines (id, user_id, machine_id, status)
select md5('machine' || n)::uuid, md5('user' || n)::uuid, 'm' || n, 'starting'
  from generate_series(%(first)s, %(last)s) as n;
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select md5('trader' || n)::uuid, 'BTCUSDT', '1m', 'buy', to_timestamp(0)
  from generate_series(%(first)s, %(last)s) as n;

-- name: patience
set statement_timeout = %(milliseconds)s

-- name: activate
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()
 where id = md5('machine' || %(user)s::int)::uuid
