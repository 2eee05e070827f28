-- Guards that look right and leave a path open: the opponents of test_paths.py, test_partitions.py
-- and test_identity.py. (Those that go wrong when two sessions meet are in naive_locks.sql.)
-- Runs on the demo's trading schema, without arbiter. naive.guard(kind, table) puts one on a table
-- that has trader_id, source and machine_id:
--
--   policy     a restrictive RLS policy asks; a role that bypasses row security is never asked
--   row        a row trigger asks before an insert; an update, or a replica's session, passes by
--   statement  a statement trigger asks after an insert, on the named table; partitions pass by
--   join       the same over a join with the owner's table, which is planned by its statistics
--   immutable  a row trigger rejects to change source after the fact; a row that moves passes by
--   foreign    row's question, and that the machine exists; not whose machine it is
--
-- But for join and immutable, they ask naive.may_write(), which takes the transaction's start for the time.

create schema naive;
grant usage on schema naive to public;

-- The columns that arbiter would have added, without its rules.
alter table public.cloud_machines
  add column last_health_check timestamptz;
alter table public.signals
  add column source text not null default 'local',
  add column machine_id uuid references public.cloud_machines (id) on delete set null;

create function naive.may_write(p_trader_id uuid, p_source text, p_machine_id uuid)
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select (p_source = 'cloud') = exists (
    select
      from public.cloud_machines m
      join public.traders t on t.user_id = m.user_id
     where t.id = p_trader_id
       and m.id = coalesce(p_machine_id, m.id)
       and m.status = 'running'
       and m.last_health_check > now() - interval '30 seconds');
end;

create function naive.machine_runs(p_machine_id uuid)
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from public.cloud_machines m where m.id = p_machine_id and m.status = 'running');
end;

create function naive.tg_row()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not naive.may_write(new.trader_id, new.source, new.machine_id) then
    raise exception using errcode = 'WX001', message = 'naive: no';
  end if;
  return new;
end
$$;

create function naive.tg_foreign()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if new.source = 'cloud' and not naive.machine_runs(new.machine_id)
     or new.source = 'local' and not naive.may_write(new.trader_id, new.source, new.machine_id)
  then
    raise exception using errcode = 'WX001', message = 'naive: no';
  end if;
  return new;
end
$$;

create function naive.tg_statement()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from naive_rows n where not naive.may_write(n.trader_id, n.source, n.machine_id))
  then
    raise exception using errcode = 'WX001', message = 'naive: no';
  end if;
  return null;
end
$$;

create function naive.tg_join()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform t.user_id from naive_rows n join public.traders t on t.id = n.trader_id;
  return null;
end
$$;

create function naive.tg_immutable()
returns trigger
language plpgsql
volatile
security invoker
as $$
begin
  raise exception using errcode = 'WX006', message = 'naive: no';
end
$$;

create function naive.guard(p_kind text, p_table regclass)
returns void
language plpgsql
volatile
security invoker
as $$
begin
  case p_kind
    when 'policy' then
      execute format(
        'create policy naive_guard on %s as restrictive
           using (true) with check (naive.may_write(trader_id, source, machine_id))', p_table);
    when 'row' then
      execute format(
        'create trigger naive_guard before insert on %s
           for each row execute function naive.tg_row()', p_table);
    when 'join' then
      execute format(
        'create trigger naive_guard after insert on %s referencing new table as naive_rows
           for each statement execute function naive.tg_join()', p_table);
    when 'immutable' then
      execute format(
        'create trigger naive_guard after update on %s
           for each row when (old.source is distinct from new.source)
           execute function naive.tg_immutable()', p_table);
    when 'foreign' then
      execute format(
        'create trigger naive_guard before insert on %s
           for each row execute function naive.tg_foreign()', p_table);
    when 'statement' then
      execute format(
        'create trigger naive_guard after insert on %s referencing new table as naive_rows
           for each statement execute function naive.tg_statement()', p_table);
  end case;
end
$$;
