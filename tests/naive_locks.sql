-- Rules that look right and go wrong when two sessions meet: the opponents of test_concurrency.py and of
-- proof/workload.py. Runs on the demo's trading schema, without arbiter. naive.use(rule) switches one of
-- them on; with none of them a client can still ask naive.is_running() before it writes.
--
--   exists    a row trigger asks whether a machine runs, or lapsed; no lock
--   policy    a restrictive RLS policy asks the same
--   advisory  a lease row, read plainly under an advisory lock per user
--   session   the same with a lock of the session instead of the transaction
--   plain     a lease row that is read, judged and then written; no lock
--   one_step  a lease row locked by writers; the handover is one update that waits for them

create schema naive;
grant usage on schema naive to public;

-- The columns that arbiter would have added, without its rules.
alter table public.cloud_machines
  drop constraint cloud_machines_user_id_key,
  add column last_health_check timestamptz;
alter table public.signals
  add column source text not null default 'local',
  add column machine_id uuid;

create table naive.settings (
  heartbeat_timeout interval not null
);
insert into naive.settings (heartbeat_timeout) values ('30 seconds');

create table naive.leases (
  user_id uuid not null,
  epoch bigint not null,
  holder text not null,
  machine_id uuid,
  constraint leases_pkey primary key (user_id),
  constraint leases_user_id_epoch_key unique (user_id, epoch)
);

create table naive.handovers (
  user_id uuid not null,
  epoch bigint not null,
  holder text not null
);

create function naive.owner_of(p_trader_id uuid)
returns uuid
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select t.user_id from public.traders t where t.id = p_trader_id;
end;

create function naive.is_running(p_user_id uuid, p_machine_id uuid default null)
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from public.cloud_machines m
      cross join naive.settings s
     where m.user_id = p_user_id
       and m.id = coalesce(p_machine_id, m.id)
       and m.status = 'running'
       and m.last_health_check > clock_timestamp() - s.heartbeat_timeout);
end;

create function naive.reject(p_source text)
returns void
language plpgsql
volatile
security invoker
as $$
begin
  raise exception using
    errcode = case p_source when 'local' then 'WX001' else 'WX004' end,
    message = 'naive: no';
end
$$;

create function naive.tg_exists()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if naive.is_running(naive.owner_of(new.trader_id), new.machine_id) <> (new.source = 'cloud') then
    perform naive.reject(new.source);
  end if;
  return new;
end
$$;

-- advisory, session, plain, one_step: the name is the trigger's argument.
create function naive.tg_lease()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_user_id uuid := naive.owner_of(new.trader_id);
  v_key bigint := hashtextextended(v_user_id::text, 0);
  v_lease naive.leases;
begin
  case tg_argv[0]
    when 'advisory' then perform pg_advisory_xact_lock_shared(v_key);
    when 'session' then perform pg_advisory_lock_shared(v_key);
    else null;
  end case;
  if tg_argv[0] = 'one_step' then
    select l.* into v_lease from naive.leases l where l.user_id = v_user_id for key share;
  else
    select l.* into v_lease from naive.leases l where l.user_id = v_user_id;
  end if;
  if v_lease.user_id is null then
    insert into naive.leases (user_id, epoch, holder) values (v_user_id, 1, 'local');
    insert into naive.handovers (user_id, epoch, holder) values (v_user_id, 1, 'local');
    return new;
  end if;
  if v_lease.holder = new.source and v_lease.machine_id is not distinct from new.machine_id then
    return new;
  end if;
  if new.source = 'cloud' or naive.is_running(v_user_id) then
    perform naive.reject(new.source);
  end if;
  update naive.leases
     set epoch = v_lease.epoch + 1, holder = 'local', machine_id = null
   where user_id = v_user_id;
  insert into naive.handovers (user_id, epoch, holder) values (v_user_id, v_lease.epoch + 1, 'local');
  return new;
end
$$;

create function naive.tg_activate()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_lease naive.leases;
begin
  if not naive.is_running(new.user_id, new.id) then
    return null;
  end if;
  if tg_argv[0] in ('advisory', 'session') then
    perform pg_advisory_xact_lock(hashtextextended(new.user_id::text, 0));
  end if;
  select l.* into v_lease from naive.leases l where l.user_id = new.user_id;
  if v_lease.user_id is null then
    insert into naive.leases (user_id, epoch, holder, machine_id) values (new.user_id, 1, 'cloud', new.id);
  elsif v_lease.machine_id is distinct from new.id then
    update naive.leases
       set epoch = v_lease.epoch + 1, holder = 'cloud', machine_id = new.id
     where user_id = new.user_id;
    insert into naive.handovers (user_id, epoch, holder) values (new.user_id, v_lease.epoch + 1, 'cloud');
  end if;
  return null;
end
$$;

-- The yes after an error: looks, then writes.
create function naive.confirm_takeover()
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_machine public.cloud_machines;
begin
  select m.* into strict v_machine from public.cloud_machines m where m.user_id = auth.uid();
  if v_machine.status <> 'error' then
    raise exception using errcode = '55000', message = 'naive: there is nothing to confirm';
  end if;
  insert into naive.handovers (user_id, epoch, holder)
  select l.user_id, l.epoch + 1, 'local' from naive.leases l where l.user_id = v_machine.user_id;
  update public.cloud_machines set status = 'stopped' where id = v_machine.id;
end
$$;

create function naive.use(p_rule text)
returns void
language plpgsql
volatile
security invoker
as $$
begin
  case p_rule
    when 'exists' then
      create trigger naive_guard before insert on public.signals
        for each row execute function naive.tg_exists();
    when 'policy' then
      create policy naive_guard on public.signals
        as restrictive for insert to authenticated
        with check (not naive.is_running(naive.owner_of(trader_id)));
    else
      execute format(
        'create trigger naive_guard before insert on public.signals
           for each row execute function naive.tg_lease(%L)', p_rule);
      execute format(
        'create trigger naive_activate after insert or update on public.cloud_machines
           for each row execute function naive.tg_activate(%L)', p_rule);
  end case;
end
$$;
