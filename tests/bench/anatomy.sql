-- What a guard is made of, by name: each does what the one before does, and a little more. None of them decides
-- anything, so each is less than a guard; the last but one is the least that could fence at all.

-- name: leases
-- Who holds: for every user the running machine, or the browser.
create table public.leases (
  user_id uuid primary key references auth.users,
  machine_id uuid
);
insert into public.leases
select u.id, m.id from auth.users u left join public.cloud_machines m on m.user_id = u.id;

-- name: column
-- Each row names the transaction that wrote it: what an audit needs.
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
-- It finds out whose they are.
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
-- It holds the user's lease, until the end of the transaction: the least that keeps a handover out.
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

-- name: each_row
-- The same once a row, where the naive trigger asks its question: dear for many rows, and blind to what other
-- triggers do to the row after it.
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
