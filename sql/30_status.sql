-- What clients ask and say: status, confirm_takeover, version.

create or replace function arbiter.version()
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return '0.1.0';
comment on function arbiter.version() is 'The version of arbiter in this database.';

-- The migrations create the type; see _left_over() (40_left_over.sql).
comment on type arbiter.execution_status is
  'What arbiter.status() returns: what a write in the instant as_of would get.';

create or replace function arbiter._uncommon_status(p_user_id text)
returns arbiter.execution_status
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_as_of timestamptz := clock_timestamp();
  v_settings arbiter.settings;
  v_lease arbiter.leases;
  v_machine arbiter.machine;
  v_local arbiter.verdict;
  v_cloud arbiter.verdict;
begin
  select s.* into strict v_settings from arbiter.settings s where s.singleton;
  select l.* into strict v_lease from arbiter.leases l where l.user_id = p_user_id;
  v_machine := arbiter._machine(p_user_id, v_lease.claimant);
  if not arbiter._is_enforced() then
    return ('local', true, false, null, 'Watching', null, v_lease.claimant, v_machine.state,
      v_as_of - v_machine.heartbeat_at, v_lease.epoch, v_lease.draining_since is not null, v_as_of,
      v_settings.poll_interval)::arbiter.execution_status;
  end if;
  v_local := arbiter._verdict('local', null, v_lease, v_machine, v_settings, v_as_of);
  v_cloud := arbiter._verdict('cloud', v_lease.claimant, v_lease, v_machine, v_settings, v_as_of);
  return (
    case when v_local.code is null then 'local' when v_cloud.code is null then 'cloud' else 'none' end,
    v_local.code is null,
    true,
    v_local.code,
    case v_local.code
      when 'cloud_active' then 'Cloud active'
      when 'cooling_down' then 'Cooling down'
      when 'takeover_unconfirmed' then 'Cloud failed'
      else 'Browser mode'
    end,
    v_local.retry_at,
    v_lease.claimant,
    v_machine.state,
    v_as_of - v_machine.heartbeat_at,
    v_lease.epoch,
    v_lease.draining_since is not null,
    v_as_of,
    v_settings.poll_interval)::arbiter.execution_status;
end
$$;
comment on function arbiter._uncommon_status(text) is
  'The status of a user whose lease is for a machine, by the verdicts; while no table is in mode enforce, that the browser may write.';

-- Definer: a browser may ask, but may read neither leases nor machines.
create or replace function arbiter.status(p_user_id text default null)
returns arbiter.execution_status
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
declare
  v_user_id text collate "C" := arbiter._caller(p_user_id);
  v_as_of timestamptz := clock_timestamp();
  v_status arbiter.execution_status;
begin
  -- The two common answers come first, each in one query: a machine is active, or the lease is for the browser. What
  -- they ask of _is_enforced() is computed when they are planned.
  select 'cloud', false, true, 'cloud_active', 'Cloud active', null::timestamptz, l.claimant, 'running',
         v_as_of - m.heartbeat_at, l.epoch, l.draining_since is not null, v_as_of,
         arbiter._poll_interval()
    into v_status
    from arbiter.leases l
    join arbiter.machines m
      on arbiter._is_machine(m.machine_id, l.claimant) and m.user_id::text collate "C" = l.user_id
   where l.user_id = v_user_id
     and arbiter._is_enforced()
     and arbiter._is_active(m.state, m.heartbeat_at);
  if found then
    return v_status;
  end if;
  -- Shown is the machine that is on its way.
  select 'local', true, arbiter._is_enforced(), null,
         case
           when not arbiter._is_enforced() then 'Watching'
           when m.state = 'starting' then 'Cloud starting'
           else 'Browser mode'
         end,
         null::timestamptz, m.machine_id, m.state, v_as_of - m.heartbeat_at, l.epoch,
         l.draining_since is not null, v_as_of, arbiter._poll_interval()
    into v_status
    from (values (v_user_id)) as u (user_id)
    left join arbiter.leases l on l.user_id = u.user_id
    left join lateral (
      select r.machine_id::text, r.state, r.heartbeat_at
        from arbiter.machines r
       where arbiter._is_user(r.user_id, u.user_id)
       order by r.heartbeat_at desc nulls last
       limit 1) as m on true
   where l.claimant is null;
  if found then
    return v_status;
  end if;
  return arbiter._uncommon_status(v_user_id);
end
$$;
comment on function arbiter.status(text) is
  'Which environment is active for a user, as a write in the instant as_of would find it. environment: local, cloud, or none while neither may write; enforced: false while no table is in mode enforce, and the browser may write; message: text for a badge. The user is the session''s (request.jwt.claims); only a trusted role may pass another: error 42501.';

-- The functions for a uuid cost nothing, because the server puts their bodies into the call; only without settings of
-- their own, which such a body does not need: it was read when it was made. Their parameters have other names, so that
-- an API that chooses by names finds one function.
create or replace function arbiter.status(p_user_uuid uuid)
returns arbiter.execution_status
language sql
stable
return arbiter.status(p_user_uuid::text);
comment on function arbiter.status(uuid) is 'The same for an id of type uuid.';

create or replace function arbiter._unconfirmable(p_user_id text, p_lease arbiter.leases)
returns arbiter.error
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings arbiter.settings;
  v_verdict arbiter.verdict;
begin
  select s.* into strict v_settings from arbiter.settings s where s.singleton;
  v_verdict := arbiter._verdict('local', null, p_lease, arbiter._machine(p_user_id, p_lease.claimant), v_settings,
    clock_timestamp());
  if v_verdict.code is null then
    return arbiter._error('55000', 'arbiter: there is nothing to confirm', 'The browser may write already.',
      arbiter._detail('nothing_to_confirm', p_user_id, p_lease, null), 409);
  end if;
  if v_verdict.code <> 'takeover_unconfirmed' or v_verdict.retry_at is not null then
    return arbiter._rejected(v_verdict.code,
      arbiter._detail(v_verdict.code, p_user_id, p_lease, v_verdict.retry_at),
      case when v_verdict.code = 'takeover_unconfirmed'
        then 'Too early: the machine may recover; confirm at retry_at.'
        else 'There is nothing to confirm: the machine is not in error.' end);
  end if;
  return null;
end
$$;
comment on function arbiter._unconfirmable(text, arbiter.leases) is
  'Why the takeover of a lease''s machine cannot be confirmed: WX001, WX002, WX003 when it is too early or the machine is not in error, 55000 when there is nothing to confirm. Null when it can.';

-- Definer: the user may confirm, but may write neither lease nor registry.
create or replace function arbiter.confirm_takeover(p_user_id text default null)
returns arbiter.execution_status
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
declare
  v_user_id text collate "C" := arbiter._caller(p_user_id);
  v_give_up_at timestamptz;
  v_lease arbiter.leases;
  v_error arbiter.error;
  v_attempt record;
  v_word text;
begin
  if arbiter.claimed_machine_id() is not null then
    perform arbiter._fail('insufficient_privilege',
      'a machine''s token cannot confirm a takeover',
      'Ask the user, and call it with the user''s token or as the backend.');
  end if;
  select clock_timestamp() + s.drain_timeout into strict v_give_up_at from arbiter.settings s where s.singleton;
  loop
    select l.* into v_lease from arbiter.leases l where l.user_id = v_user_id;
    v_error := arbiter._unconfirmable(v_user_id, v_lease);
    exit when v_error.sqlstate is not null;
    -- The registry row first, as everywhere, so that its machine cannot recover before the takeover is confirmed.
    perform from arbiter.machines m
      where arbiter._is_machine(m.machine_id, v_lease.claimant)
        for no key update skip locked;
    if found then
      v_attempt := arbiter._lock_lease(v_user_id);
      if v_attempt.locked then
        v_lease := v_attempt.lease;
      else
        -- Writes are in flight. The mark of a drain does not wait for them and needs only this lock.
        select l.* into v_lease from arbiter.leases l where l.user_id = v_user_id for no key update skip locked;
      end if;
      if v_attempt.locked or found then
        -- Again by the locked rows, which cannot change any more.
        v_error := arbiter._unconfirmable(v_user_id, v_lease);
        exit;
      end if;
    end if;
    if not arbiter._pause(v_give_up_at) then
      v_error := arbiter._rejected('handover_draining',
        arbiter._detail('handover_draining', v_user_id, v_lease, null,
          jsonb_build_object('blockers', arbiter._blockers(v_user_id))));
      exit;
    end if;
  end loop;
  if v_error.sqlstate is not null then
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;

  perform arbiter._need_trusted_code(r.registry) from arbiter.registry r;
  if not v_attempt.locked
     or not arbiter._hand_over(v_lease, v_attempt.wrote, 'local', null, 'confirmed')
  then
    -- From the commit on the machine's writes are rejected, and the next local write ends the drain.
    update arbiter.leases l
       set draining_to = null,
           draining_since = case when l.holder = 'cloud' then clock_timestamp() end
     where l.user_id = v_user_id;
  end if;

  -- Clear the error. Several words may mean stopped, and the table's own check may forbid some of them.
  for v_word in
    select s.key
      from arbiter.registry r, jsonb_each_text(r.states) s
     where s.value = 'stopped'
     order by s.key <> 'stopped', s.key
  loop
    begin
      execute format('update arbiter.machines set status = %L where arbiter._is_machine(machine_id, $1)', v_word)
        using v_lease.claimant;
      return arbiter.status(v_user_id);
    exception
      when check_violation or invalid_text_representation or foreign_key_violation then
        null;
    end;
  end loop;
  perform arbiter._fail('object_not_in_prerequisite_state',
    'the registry takes none of the words that mean stopped',
    'Call arbiter.register_machines() with p_states that has the table''s own words.');
end
$$;
comment on function arbiter.confirm_takeover(text) is
  'The user''s yes after a machine''s error: hands the lease to local and sets the machine''s status to stopped. While writes of the machine are in flight, the next local write completes the handover. Only once error_takeover_delay has passed (WX003 with retry_at before; WX001, WX002 when the machine is not in error; 55000 when there is nothing to confirm, or the registry has a trigger of a role that has not the rights of arbiter''s owner). Returns the status.';

create or replace function arbiter.confirm_takeover(p_user_uuid uuid)
returns arbiter.execution_status
language sql
return arbiter.confirm_takeover(p_user_uuid::text);
comment on function arbiter.confirm_takeover(uuid) is 'The same for an id of type uuid.';
