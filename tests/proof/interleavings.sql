-- The users of interleavings.py: brought into a situation before their case, and looked at after it.
-- Many at once, because a procedure that commits does in one call what a situation takes. Runs on the
-- demo's trading schema, with arbiter or with a rule of naive_locks.sql.

create schema proof;
grant usage on schema proof to public;

create table proof.flaws (
  user_id uuid not null,
  flaw text not null
);

-- A heartbeat of two hours ago. Its name sorts after arbiter's stamp, which takes no client's word.
create function proof.tg_age()
returns trigger
language plpgsql
volatile
security invoker
as $$
begin
  new.last_health_check := clock_timestamp() - interval '2 hours';
  return new;
end
$$;
create trigger "~~proof_age"
  before update on public.cloud_machines
  for each row
  when (current_setting('proof.age', true) = 'on')
  execute function proof.tg_age();

create procedure proof.lapse(p_machines uuid[])
language plpgsql
security invoker
as $$
begin
  perform set_config('proof.age', 'on', true);
  update public.cloud_machines set last_health_check = clock_timestamp() where id = any (p_machines);
  perform set_config('proof.age', '', true);
end
$$;

create procedure proof.beat(p_machines uuid[])
language plpgsql
security invoker
as $$
begin
  update public.cloud_machines
     set status = 'running', last_health_check = clock_timestamp()
   where id = any (p_machines);
end
$$;

create procedure proof.write(p_traders uuid[], p_source text, p_machines uuid[] default null)
language plpgsql
security invoker
as $$
begin
  insert into public.signals (trader_id, symbol, interval, signal, bar_time, source, machine_id)
  select w.trader_id, gen_random_uuid()::text, '1m', 'buy', clock_timestamp(), p_source, w.machine_id
    from unnest(p_traders, p_machines) as w (trader_id, machine_id);
end
$$;

-- p_holder none, local or cloud; p_drain to none, local or cloud; p_machine absent, fresh, lapsed, stopped,
-- error or deleted, the last three long ago.
create procedure proof.stage(
  p_users uuid[],
  p_traders uuid[],
  p_machines uuid[],
  p_holder text,
  p_drain text,
  p_machine text)
language plpgsql
security invoker
as $$
begin
  insert into auth.users (id, email) select u.id, u.id || '@example.com' from unnest(p_users) as u (id);
  insert into public.traders (id, user_id, name)
  select w.trader_id, w.user_id, 'Momentum' from unnest(p_users, p_traders) as w (user_id, trader_id);
  commit;
  if p_holder = 'none' then
    return;
  end if;
  call proof.write(p_traders, 'local');
  commit;
  if p_machine = 'absent' then
    return;
  end if;
  insert into public.cloud_machines (id, user_id, status)
  select w.machine_id, w.user_id, 'stopped' from unnest(p_users, p_machines) as w (user_id, machine_id);
  commit;
  if p_holder = 'cloud' or p_drain = 'cloud' then
    call proof.beat(p_machines);
    commit;
  end if;
  if p_holder = 'cloud' then
    call proof.beat(p_machines);
    commit;
    call proof.write(p_traders, 'cloud', p_machines);
    commit;
  end if;

  case p_machine
    when 'lapsed' then
      call proof.lapse(p_machines);
    when 'stopped', 'error' then
      update public.cloud_machines set status = p_machine where id = any (p_machines);
    when 'deleted' then
      delete from public.cloud_machines where id = any (p_machines);
    else
      null;
  end case;
  if to_regnamespace('arbiter') is not null then
    update arbiter.machine_notes
       set left_running_at = left_running_at - interval '2 hours',
           entered_error_at = entered_error_at - interval '2 hours'
     where user_id = any (p_users::text[]);
  end if;
  if p_drain = 'local' then
    -- As confirm_takeover leaves the lease while a write of the machine is in flight.
    update arbiter.leases set draining_since = clock_timestamp() where user_id = any (p_users::text[]);
  end if;
  commit;
end
$$;

-- The answer to a write, which stays only when p_keep.
create function proof.attempt(p_trader uuid, p_source text, p_machine uuid, p_keep boolean)
returns text
language plpgsql
volatile
security invoker
as $$
begin
  call proof.write(array[p_trader], p_source, array[p_machine]);
  if not p_keep then
    raise exception using errcode = 'PR000', message = 'undo the write';
  end if;
  return 'ok';
exception
  when sqlstate 'PR000' then
    return 'ok';
  when others then
    return sqlstate;
end
$$;

-- After a case, when nothing is in flight: the environment that the status names can write and the other cannot,
-- and a machine that returns gets the lease in every case.
create procedure proof.settle(p_users uuid[], p_traders uuid[], p_machines uuid[])
language plpgsql
security invoker
as $$
declare
  v_environment text;
  v_local text;
  v_cloud text;
begin
  for i in 1 .. coalesce(cardinality(p_users), 0) loop
    select s.environment into v_environment from arbiter.status(p_users[i]) s;
    v_local := proof.attempt(p_traders[i], 'local', null, false);
    v_cloud := proof.attempt(p_traders[i], 'cloud', p_machines[i], false);
    insert into proof.flaws (user_id, flaw)
    select p_users[i], format('afterwards the status says %s, a local write gets %s, a cloud write %s', v_environment, v_local, v_cloud)
     where (v_local = 'ok') <> (v_environment = 'local') or (v_cloud = 'ok') <> (v_environment = 'cloud');
    commit;

    call proof.beat(array[p_machines[i]]);
    insert into public.cloud_machines (id, user_id, status, last_health_check)
    select p_machines[i], p_users[i], 'running', clock_timestamp()
     where not exists (select from public.cloud_machines m where m.id = p_machines[i]);
    commit;
    v_cloud := proof.attempt(p_traders[i], 'cloud', p_machines[i], true);
    commit;
    v_local := proof.attempt(p_traders[i], 'local', null, false);
    insert into proof.flaws (user_id, flaw)
    select p_users[i], format('the machine is back: a cloud write gets %s, a local write %s', v_cloud, v_local)
     where v_cloud <> 'ok' or v_local <> 'WX001';
    commit;
  end loop;
end
$$;
