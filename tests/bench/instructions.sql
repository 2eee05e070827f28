-- Statements whose instructions are counted, besides those of bench.sql.

-- name: batch_local
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select md5('trader' || %(user)s::int)::uuid, 'COIN' || n, '1m', 'buy', to_timestamp(%(bar)s)
  from generate_series(1, %(rows)s) as n

-- name: batch_cloud
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
select md5('trader' || %(user)s::int)::uuid, 'COIN' || n, '1m', 'buy', to_timestamp(%(bar)s),
       'cloud', md5('machine' || %(user)s::int)::uuid
  from generate_series(1, %(rows)s) as n

-- name: probe_trader
-- A row by primary key of a user who has no machine.
select * from public.traders where id = md5('trader' || %(user)s::int)::uuid
