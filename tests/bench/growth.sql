-- Databases of every size. Users are numbered from 1; every tenth has a machine, which runs and holds.

-- name: people
-- Rows in the order of their keys, other indexes afterwards: random keys take ten times as long.
alter table public.traders drop constraint traders_user_id_fkey;
drop index public.traders_user_id_idx;
insert into auth.users (id, email)
select u.id, u.id || '@example.com'
  from (select md5('user' || n)::uuid as id from generate_series(1, %(users)s) as n order by 1) as u;
insert into public.traders (id, user_id, name)
select md5('trader' || n)::uuid, md5('user' || n)::uuid, 'Momentum'
  from generate_series(1, %(users)s) as n
 order by 1;
create index traders_user_id_idx on public.traders (user_id);
alter table public.traders
  add constraint traders_user_id_fkey foreign key (user_id) references auth.users (id) on delete cascade;

-- name: rows
-- Signals of all traders, from before arbiter was installed.
alter table public.signals drop constraint signals_pkey, drop constraint signals_trader_id_fkey;
insert into public.signals (trader_id, symbol, interval, signal, bar_time)
select t.id, 'ETHUSDT', '1m', 'buy', to_timestamp(n)
  from (select u.id from public.traders as u order by u.id) as t
 cross join generate_series(1, %(rows)s / %(users)s) as n;
alter table public.signals
  add constraint signals_pkey primary key (id),
  add constraint signals_trader_id_fkey
    foreign key (trader_id) references public.traders (id) on delete cascade;

-- name: leases
-- As arbiter has them after so many handovers of every user: odd epochs are the browser's.
select pg_current_xact_id();
insert into arbiter.leases (user_id, epoch, holder, machine_id, held_since)
select md5('user' || n)::uuid,
       2 * %(epochs)s - (n %% 10 > 0)::int,
       case n %% 10 when 0 then 'cloud' else 'local' end,
       case n %% 10 when 0 then md5('machine' || n)::uuid end,
       clock_timestamp()
  from generate_series(1, %(users)s) as n
 order by 1;
insert into arbiter.handovers (
  user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
  handed_over_at, xid, snapshot, exact, frontier, cluster)
select u.user_id,
       e,
       case when e %% 2 = 0 then 'local' when e > 1 then 'cloud' end,
       case when e %% 2 = 1 and e > 1 then u.machine_id end,
       case e %% 2 when 0 then 'cloud' else 'local' end,
       case e %% 2 when 0 then u.machine_id end,
       case when e = 1 then 'registered' when e %% 2 = 0 then 'activated' else 'machine_stopped' end,
       clock_timestamp(),
       pg_current_xact_id(),
       pg_current_snapshot(),
       true,
       pg_snapshot_xmax(pg_current_snapshot()),
       (select c.system_identifier from pg_control_system() as c)
  from (
    select md5('user' || n)::uuid as user_id,
           md5('machine' || n)::uuid as machine_id,
           2 * %(epochs)s - (n %% 10 > 0)::int as epochs
      from generate_series(1, %(users)s) as n
     order by 1) as u
 cross join lateral generate_series(1, u.epochs) as e;

-- name: machines
insert into public.cloud_machines (id, user_id, machine_id, status, last_health_check)
select md5('machine' || n)::uuid, md5('user' || n)::uuid, 'm' || n, 'running', clock_timestamp()
  from generate_series(10, %(users)s, 10) as n
 order by 1;
