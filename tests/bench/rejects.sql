-- A browser that does not stop trying while its user's machine is active.

-- name: insert
-- Only the user differs between calls. The client does not prepare a statement that fails, so this one
-- must have the text of one that has succeeded before.
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
values (md5('trader' || %(user)s::int)::uuid, 'REJECTUSDT', '1m', 'buy', clock_timestamp())

-- name: forget
delete from public.signals where symbol = 'REJECTUSDT'

-- name: vacuum
vacuum public.signals

-- name: keep_dead
-- Otherwise the traces depend on when autovacuum runs.
alter table public.signals set (autovacuum_enabled = off)

-- name: keep_none
alter table public.signals reset (autovacuum_enabled)

-- name: traces
-- The traces of all statements so far: bytes of tables and log, and transaction ids.
select pg_relation_size('public.signals') as table_bytes,
       pg_indexes_size('public.signals') as index_bytes,
       (select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
          from pg_class c
          join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = 'arbiter' and c.relkind = 'r') as arbiter_bytes,
       (pg_current_wal_insert_lsn() - '0/0')::bigint as wal_bytes,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint as xids
