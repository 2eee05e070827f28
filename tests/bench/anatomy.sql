-- Arbiter's triggers and functions, built up by name: each step does what the one before does, and a little more.
-- `lease` is the first that fences, and `decided` the first that decides all that arbiter does.

-- name: leases
-- Who holds: for every user the running machine, or the browser.
create table public.leases (
  user_id uuid primary key references auth.users,
  machine_id uuid,
  draining_since timestamptz
);
insert into public.leases (user_id, machine_id)
select u.id, m.id from auth.users u left join public.cloud_machines m on m.user_id = u.id;

-- name: column
-- Each row names the transaction that wrote it, because an audit needs that.
alter table public.signals add column xid xid8 default pg_current_xact_id();

-- name: trigger
-- A statement trigger that is handed the new rows, with rights of its own and a pinned search_path.
create function public.tg_guard()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return null;
end
$$;
create trigger signals_guard after insert on public.signals
  referencing new table as new_rows for each statement execute function public.tg_guard();

-- name: rows
-- It looks at the rows.
create or replace function public.tg_guard()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from new_rows;
  return null;
end
$$;

-- name: owner
-- It looks up the users of the rows.
create or replace function public.tg_guard()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform
     from new_rows n
    where (select t.user_id from public.traders t where t.id = n.trader_id) is null;
  return null;
end
$$;

-- name: lease
-- It locks the user's lease until the end of the transaction. Without that a handover could come in between.
create or replace function public.tg_guard()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform
     from new_rows n
    where (select l.user_id
             from public.leases l
            where l.user_id = (select t.user_id from public.traders t where t.id = n.trader_id)
              and l.machine_id is not distinct from n.machine_id
              for key share skip locked) is null;
  return null;
end
$$;

-- name: decided
-- It asks all that arbiter asks while nothing is wrong, in a query written for this table: whether the rows are of one
-- writer and name it and their transaction, whether a drain is under way, and whether the machine runs and is fresh.
-- A single row takes a query without the first of these questions, and rows of several writers take a third one.
create function public.machine_may_write(p_machine_id uuid, p_user_id uuid)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform
     from public.cloud_machines m
    where m.id = p_machine_id
      and m.user_id = p_user_id
      and m.status = 'running'
      and m.last_health_check > clock_timestamp() - interval '1 day';
  return found;
end
$$;
create or replace function public.tg_guard()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform from new_rows offset 1;
  if not found then
    perform
       from new_rows n
      where case when n.source = case when n.machine_id is null then 'local' else 'cloud' end
                  and n.xid = pg_current_xact_id()
              then (select l.user_id
                      from public.leases l
                     where l.user_id = (select t.user_id from public.traders t where t.id = n.trader_id)
                       and l.machine_id is not distinct from n.machine_id
                       and l.draining_since is null
                       and current_setting('transaction_isolation', l.user_id is null) = 'read committed'
                       and (l.machine_id is null or public.machine_may_write(l.machine_id, l.user_id))
                       for key share skip locked) end is null;
    if not found then
      return null;
    end if;
  end if;
  perform
     from new_rows n
    where (array[n.trader_id, n.machine_id] = (
             select (select array[f.trader_id, f.machine_id]
                       from public.leases l
                      where l.user_id = (select t.user_id from public.traders t where t.id = f.trader_id)
                        and l.machine_id is not distinct from f.machine_id
                        and l.draining_since is null
                        and current_setting('transaction_isolation', l.user_id is null) = 'read committed'
                        and (l.machine_id is null or public.machine_may_write(l.machine_id, l.user_id))
                        for key share skip locked)
               from new_rows f
              limit 1)
           and n.source = case when n.machine_id is null then 'local' else 'cloud' end
           and n.xid = pg_current_xact_id()) is not true;
  if not found then
    return null;
  end if;
  perform
     from (
       select distinct
              case when n.source = case when n.machine_id is null then 'local' else 'cloud' end
                    and n.xid = pg_current_xact_id()
                then n.trader_id end as trader_id,
              n.machine_id
         from new_rows n) d
    where (select l.user_id
             from public.leases l
            where l.user_id = (select t.user_id from public.traders t where t.id = d.trader_id)
              and l.machine_id is not distinct from d.machine_id
              and l.draining_since is null
              and (l.machine_id is null or public.machine_may_write(l.machine_id, l.user_id))
              for key share skip locked) is null;
  if found then
    raise exception 'another environment holds the lease' using errcode = 'WX001';
  end if;
  return null;
end
$$;

-- name: each_row
-- The same for each row, as the naive trigger does it: expensive for many rows, and it misses what later triggers
-- change in the row.
create function public.tg_guard_row()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform
     from public.leases l
    where l.user_id = (select t.user_id from public.traders t where t.id = new.trader_id)
      and l.machine_id is not distinct from new.machine_id
      for key share skip locked;
  return new;
end
$$;
create trigger signals_guard_row before insert on public.signals
  for each row execute function public.tg_guard_row();

-- name: stamped
-- A heartbeat gets the server's time.
create function public.tg_stamp()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.last_health_check := clock_timestamp();
  return new;
end
$$;
create trigger machines_stamp before update of last_health_check on public.cloud_machines
  for each row execute function public.tg_stamp();

-- name: told
-- A statement trigger is handed the machines, with rights of its own.
create function public.tg_activate()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  return null;
end
$$;
create trigger machines_activate after update on public.cloud_machines
  referencing new table as new_rows for each statement execute function public.tg_activate();

-- name: held
-- It looks whether each of them holds its user's lease.
create or replace function public.tg_activate()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  perform
     from new_rows n
    where (select l.machine_id = n.id from public.leases l where l.user_id = n.user_id) is not true;
  return null;
end
$$;

-- name: call
-- A function with rights of its own that returns a composite and reads no table.
create table public.settings (singleton boolean primary key, heartbeat_timeout interval);
insert into public.settings values (true, '24 hours');
create type public.status as (
  can_write_local boolean, environment text, code text, message text, retry_at timestamptz, machine_id uuid,
  machine_state text, heartbeat_age interval, epoch bigint, draining boolean, poll_interval interval,
  as_of timestamptz
);
create function public.ask_status(p_user_id uuid)
returns public.status
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_status public.status;
begin
  v_status.as_of := clock_timestamp();
  return v_status;
end
$$;

-- name: reads
-- It reads the rows that an answer depends on, each by its key: settings, lease, machine.
create or replace function public.ask_status(p_user_id uuid)
returns public.status
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings public.settings;
  v_lease public.leases;
  v_machine public.cloud_machines;
  v_status public.status;
begin
  select s.* into strict v_settings from public.settings s where s.singleton;
  select l.* into v_lease from public.leases l where l.user_id = p_user_id;
  select m.* into v_machine from public.cloud_machines m where m.id = v_lease.machine_id;
  v_status.machine_id := v_machine.id;
  v_status.as_of := clock_timestamp();
  return v_status;
end
$$;

-- name: ask_status
select * from public.ask_status(md5('user' || %(user)s::int)::uuid)
