-- Heartbeats: users are numbered from 1, and every second one has a machine that runs (bench.sql).

-- name: ids
-- The keys of the machines, for a backend that sends the heartbeats of all of them.
select array_agg(md5('machine' || n)::uuid order by n) from generate_series(2, %(users)s, 2) as n

-- name: update_many
update public.cloud_machines set last_health_check = clock_timestamp() where id = any (%(ids)s::uuid[])

-- name: call_many
select arbiter.heartbeats(%(ids)s::text[])

-- name: vacuum
vacuum public.cloud_machines

-- name: load_heartbeat
update public.cloud_machines set last_health_check = clock_timestamp()
 where id = md5('machine' || :user::int)::uuid

-- name: probes
-- More users, whose machines do not run yet: the browser holds.
insert into auth.users (id, email)
select md5('user' || n)::uuid, n || '@example.com'
  from generate_series(%(first)s, %(last)s) as n;
insert into public.traders (id, user_id, name)
select md5('trader' || n)::uuid, md5('user' || n)::uuid, 'Momentum'
  from generate_series(%(first)s, %(last)s) as n;
insert into public.cloud_machines (id, user_id, machine_id, status)
select md5('machine' || n)::uuid, md5('user' || n)::uuid, 'm' || n, 'provisioning'
  from generate_series(%(first)s, %(last)s) as n;

-- name: start
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()
 where id = md5('machine' || %(user)s::int)::uuid

-- name: tables
select s.schemaname || '.' || s.relname as name,
       s.n_tup_upd as updates,
       s.n_tup_hot_upd as hot,
       s.n_live_tup as live,
       s.n_dead_tup as dead,
       s.autovacuum_count as autovacuums,
       pg_relation_size(s.relid) as table_bytes,
       pg_indexes_size(s.relid) as index_bytes
  from pg_stat_user_tables as s
 where (s.schemaname, s.relname) in (
   ('public', 'cloud_machines'), ('arbiter', 'leases'), ('arbiter', 'machine_notes'))
 order by 1

-- name: autovacuum
select name, setting from pg_settings where name like 'autovacuum%' and name not like '%multixact%' order by name
