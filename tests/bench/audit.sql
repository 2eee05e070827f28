-- A history that arbiter audits: every user hands over once an epoch, and writes ten rows in it.

-- name: people
insert into auth.users (id, email)
select md5('user' || n)::uuid, n || '@example.com'
  from generate_series(1, %(users)s) as n;
insert into public.traders (id, user_id, name)
select md5('trader' || n)::uuid, md5('user' || n)::uuid, 'Momentum'
  from generate_series(1, %(users)s) as n;
-- The audit does not read these, and they take most of the time to write.
alter table public.signals drop constraint signals_bar_key, drop constraint signals_pkey;

-- name: keys
-- After the writes: the audit names a row by its key.
alter table public.signals add constraint signals_pkey primary key (id)

-- name: leases
select pg_current_xact_id();
insert into arbiter.leases (user_id, epoch, holder, held_since)
select md5('user' || n)::uuid, 1, 'local', clock_timestamp()
  from generate_series(1, %(users)s) as n;
insert into arbiter.handovers (
  user_id, epoch, to_holder, reason, handed_over_at, xid, snapshot, exact, frontier, cluster)
select l.user_id, 1, 'local', 'registered', l.held_since, pg_current_xact_id(), pg_current_snapshot(),
       true, pg_snapshot_xmax(pg_current_snapshot()),
       (select c.system_identifier from pg_control_system() as c)
  from arbiter.leases as l;

-- name: machines
insert into public.cloud_machines (id, user_id, machine_id, status)
select md5('machine' || n)::uuid, md5('user' || n)::uuid, 'm' || n, 'stopped'
  from generate_series(1, %(users)s) as n;

-- name: hand_over
-- As arbiter does it, for all users at once: to the machine in even epochs, back in odd ones.
select pg_current_xact_id();
update arbiter.leases as l
   set epoch = l.epoch + 1,
       holder = case l.holder when 'local' then 'cloud' else 'local' end,
       machine_id = case l.holder when 'local' then m.id end,
       held_since = clock_timestamp()
  from public.cloud_machines as m
 where m.user_id::text = l.user_id;
insert into arbiter.handovers (
  user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
  handed_over_at, xid, snapshot, exact, frontier, cluster)
select l.user_id, l.epoch,
       case l.holder when 'local' then 'cloud' else 'local' end,
       case l.holder when 'local' then m.id end,
       l.holder,
       l.machine_id,
       case l.holder when 'local' then 'machine_stopped' else 'activated' end,
       l.held_since, pg_current_xact_id(), pg_current_snapshot(),
       true, pg_snapshot_xmax(pg_current_snapshot()),
       (select c.system_identifier from pg_control_system() as c)
  from arbiter.leases as l
  join public.cloud_machines as m on m.user_id::text = l.user_id;

-- name: run
update public.cloud_machines set status = 'running', last_health_check = clock_timestamp()

-- name: write
-- One row in a hundred is written by a transaction that began before the handover.
insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
select md5('trader' || n)::uuid, 'BTCUSDT', '1m', 'buy',
       to_timestamp(%(epoch)s),
       case %(epoch)s %% 2 when 0 then 'cloud' else 'local' end,
       case %(epoch)s %% 2 when 0 then md5('machine' || n)::uuid end
  from generate_series(0, %(rows)s - 1) as r
 cross join generate_series(1, %(users)s) as n
 where ((n + 10 * r) %% 100 = 0) = %(early)s

-- name: plant
-- In an epoch of the machine, as if the browser had written it.
update public.signals as s
   set source = 'local', machine_id = null
  from (
    select t.ctid from public.signals as t
     where t.source = 'cloud' and t.bar_time = to_timestamp(%(epoch)s)
     limit 1) as one
 where s.ctid = one.ctid
returning s.id::text

-- name: audit
select finding, row_count from arbiter.audit('public.signals', %(verbose)s)

-- name: flush
-- This session reports its statistics at once.
select pg_stat_force_next_flush()

-- name: spilled
select temp_bytes from pg_stat_database where datname = current_database()
