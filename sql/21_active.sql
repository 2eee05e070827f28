-- Whether a machine is active, as each of its writes and each poll ask, and whether a table is in mode enforce.
--
-- The settings that they need, and that mode, are constants in functions, because to read them from arbiter's tables
-- would cost more than to read the machine. These functions and _is_active() are without settings of their own, because
-- only so the server puts their bodies into the plan of the query that asks; it read them when they were made. A
-- transaction that has already written or asked may still use the old constant, because the server looks for replaced
-- functions only when it takes a lock; the lease excludes all the same. It may still read the old user_claim as well.

-- In seconds, because the text of an interval depends on the session. A year counts 360 days in comparisons and 365.25
-- in seconds, so months and days are balanced first. Without settings no machine is fresh.
--
-- Stable, although a constant: the server computes an immutable function when it plans, and then does not know that the
-- plan depends on that function.
create or replace function arbiter._build_settings()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_setting record;
begin
  -- One at a time: of two sessions that replace a function at once, one fails.
  perform from arbiter.settings s for no key update;
  for v_setting in
    select o.name, format('arbiter.%I()', '_' || o.name) as signature,
           extract(epoch from justify_interval((to_jsonb(s) ->> o.name)::interval)) as seconds
      from (values ('heartbeat_timeout'), ('poll_interval')) as o (name)
      left join arbiter.settings s on s.singleton
  loop
    execute format('create or replace function %s returns interval language sql stable '
      'return make_interval(secs => %s)', v_setting.signature, coalesce(v_setting.seconds::text, 'null'));
    perform arbiter._seal(v_setting.signature::regprocedure,
      format('arbiter.settings.%s as a constant.', v_setting.name));
  end loop;
end
$$;
comment on function arbiter._build_settings() is
  'Generates _heartbeat_timeout() and _poll_interval() from arbiter.settings.';

do $settings$
begin
  perform arbiter._build_settings();
end
$settings$;

-- What changes arbiter.protections locks it first, so no two sessions replace the function at once. Above read
-- committed the snapshot may be older than what another session has protected, so there true stays true.
create or replace function arbiter._build_enforced()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_enforced boolean := exists (select from arbiter.protections p where p.mode = 'enforce');
begin
  if not v_enforced
     and not arbiter._sees_commits()
     and to_regprocedure('arbiter._is_enforced()') is not null
  then
    v_enforced := arbiter._is_enforced();
  end if;
  execute format('create or replace function arbiter._is_enforced() returns boolean language sql stable return %s',
    v_enforced::text);
  perform arbiter._seal('arbiter._is_enforced()',
    'Whether a protected table is in mode enforce, by arbiter.protections as a constant.');
end
$$;
comment on function arbiter._build_enforced() is 'Generates _is_enforced() from arbiter.protections.';

do $enforced$
begin
  perform arbiter._build_enforced();
end
$enforced$;

-- The tables can be changed past their triggers, for example by a restore that disables them.
create or replace function arbiter._outdated_constants()
returns table (function_name text, problem text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select '_' || v.name, format('It does not hold the %s of arbiter.settings.', v.name)
    from arbiter.settings s
   cross join lateral (
     values ('heartbeat_timeout', s.heartbeat_timeout, arbiter._heartbeat_timeout()),
            ('poll_interval', s.poll_interval, arbiter._poll_interval())) as v (name, is_set, is_used)
   where v.is_set is distinct from v.is_used
  union all
  select '_is_enforced', 'It does not say whether arbiter.protections has a table in mode enforce.'
   where arbiter._is_enforced() <> exists (select from arbiter.protections p where p.mode = 'enforce')
  union all
  select p.proname, 'It does not hold the user_claim of arbiter.settings.'
    from pg_catalog.pg_proc p
   where p.oid = 'arbiter.claimed_user_id()'::regprocedure
     and p.prosrc <> arbiter._filled_in('arbiter._claimed_user_template()', arbiter._id_words('user', 'v_id'))
     and to_regclass('arbiter.machines') is not null
   order by 1;
end;
comment on function arbiter._outdated_constants() is
  'The generated functions that hold another value than arbiter.settings or arbiter.protections.';

-- Volatile because of the clock.
do $is_active$
begin
  execute format('create or replace function arbiter._is_active(p_state text, p_heartbeat_at timestamptz) returns boolean '
    'language sql return p_state = ''running'' and %s',
    arbiter._fresh_expression('p_heartbeat_at', 'arbiter._heartbeat_timeout()', 'clock_timestamp()'));
end
$is_active$;
comment on function arbiter._is_active(text, timestamptz) is
  'Whether a machine of this state and heartbeat is active now: it runs and has sent a heartbeat in time.';

-- A function, so that a browser's write does not pay for what only a machine's needs. Without a search_path of its own:
-- it is called by guards only, which have one, and each write of a machine would pay for setting it again.
create or replace function arbiter._machine_may_write(p_machine_id anyelement, p_holder text, p_user_id text)
returns boolean
language plpgsql
stable
as $$
begin
  perform
     from arbiter.machines m
    where m.machine_id = p_machine_id
      and m.machine_id::text collate "C" = p_holder
      and m.user_id::text collate "C" = p_user_id
      and arbiter._is_active(m.state, m.heartbeat_at);
  return found;
end
$$;
comment on function arbiter._machine_may_write(anyelement, text, text) is
  'Whether a machine of a user is the holder of a lease, runs and has sent a heartbeat in time.';
