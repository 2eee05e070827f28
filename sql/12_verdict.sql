-- The verdict: who may write, as one pure function of (lease, machine, settings, instant). It reads no table and no
-- clock: its callers in 14_lease.sql and 30_status.sql pass what it needs.

-- The migrations create the types; see _left_over() (40_left_over.sql).
comment on type arbiter.machine is
  'A machine as the verdict sees it. state: starting, running, stopping, stopped, error, or deleted when the registry has no such row of this user.';
comment on type arbiter.verdict is
  'code: null when admitted, else the code of the rejection. takeover: why the lease goes to local first, else null. retry_at: when to try again, where known.';

-- As text, because the guard, which runs with every write, has the expression written out: a call would cost more
-- than its result. A heartbeat further in the future than the timeout was stamped before the clock was set back, and
-- does not count: otherwise the browser could not write until the clock has caught up.
create or replace function arbiter._fresh_expression(p_heartbeat_at text, p_heartbeat_timeout text, p_at text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return format('coalesce(greatest(%3$s - %1$s, %1$s - %3$s) < %2$s, false)', p_heartbeat_at, p_heartbeat_timeout, p_at);
comment on function arbiter._fresh_expression(text, text, text) is
  'SQL for whether a heartbeat is younger than the timeout at an instant, and not that far in the future; false without a heartbeat.';

do $is_fresh$
begin
  execute format($sql$
    create or replace function arbiter._is_fresh(
      p_heartbeat_at timestamptz,
      p_heartbeat_timeout interval,
      p_at timestamptz)
    returns boolean
    language plpgsql
    immutable
    set search_path = pg_catalog, pg_temp
    as $body$
    begin
      return %s;
    end
    $body$
    $sql$,
    arbiter._fresh_expression('p_heartbeat_at', 'p_heartbeat_timeout', 'p_at'));
end
$is_fresh$;
comment on function arbiter._is_fresh(timestamptz, interval, timestamptz) is
  '_fresh_expression as a function.';

-- p_machine is the machine that the lease is for (its claimant). At any instant at most one environment is admitted:
-- from the instant at which a browser may take over, the machine's writes are rejected.
create or replace function arbiter._verdict(
  p_source text,
  p_machine_id text,
  p_lease arbiter.leases,
  p_machine arbiter.machine,
  p_settings arbiter.settings,
  p_at timestamptz)
returns arbiter.verdict
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fresh boolean := arbiter._is_fresh(p_machine.heartbeat_at, p_settings.heartbeat_timeout, p_at);
  v_state text := p_machine.state;
  v_grace_ends_at timestamptz;
  v_delay_ends_at timestamptz;
  v_local arbiter.verdict;
  v_cloud arbiter.verdict;
begin
  if p_lease.claimant is not null and p_machine.state <> 'running' then
    -- An instant that was never noted counts as p_at, because the machine may be alive. One that lies further in the
    -- future than its period was noted before the clock was set back; its period counts as over.
    v_grace_ends_at := case
      when p_machine.left_running_at - p_settings.stop_grace > p_at then p_at
      else coalesce(p_machine.left_running_at, p_at) + p_settings.stop_grace end;
    v_delay_ends_at := case
      when p_machine.entered_error_at - p_settings.error_takeover_delay > p_at then p_at
      else coalesce(p_machine.entered_error_at, p_at) + p_settings.error_takeover_delay end;
    -- A machine that starts again out of an error stays in error until it runs, is stopped, or the user confirms: a
    -- supervisor may have started it.
    if p_machine.state = 'starting' and p_machine.entered_error_at is not null then
      v_state := 'error';
    end if;
  end if;
  if p_lease.claimant is not null then
    case v_state
      when 'stopping' then
        if v_fresh or p_at < v_grace_ends_at then
          v_local.code := 'cooling_down';
          v_local.retry_at := greatest(
            v_grace_ends_at, case when v_fresh then p_machine.heartbeat_at + p_settings.heartbeat_timeout end);
        else
          v_local.takeover := 'stop_stalled';
        end if;
      when 'error' then
        if p_at < v_delay_ends_at then
          v_local.code := 'takeover_unconfirmed';
          v_local.retry_at := v_delay_ends_at;
        elsif p_settings.error_takeover_confirm then
          v_local.code := 'takeover_unconfirmed';
        else
          v_local.takeover := 'error_elapsed';
        end if;
      when 'stopped', 'starting', 'deleted' then
        if p_at < v_grace_ends_at then
          v_local.code := 'cooling_down';
          v_local.retry_at := v_grace_ends_at;
        else
          v_local.takeover := 'machine_stopped';
        end if;
      else -- running, and any word that is not known: the machine may be alive
        if v_fresh then
          v_local.code := 'cloud_active';
        else
          v_local.takeover := 'heartbeat_lapsed';
        end if;
    end case;
  end if;

  if p_source = 'local' then
    return v_local;
  end if;
  -- The state does not matter until a takeover is possible: a machine that stops may complete what it has begun.
  if p_lease.claimant is null or p_lease.claimant is distinct from p_machine_id or not v_fresh or v_local.takeover is not null then
    v_cloud.code := 'not_holder';
  end if;
  return v_cloud;
end
$$;
comment on function
  arbiter._verdict(text, text, arbiter.leases, arbiter.machine, arbiter.settings, timestamptz) is
  'What a write from an environment (source, and the machine when cloud) gets at an instant. Reads nothing but its arguments.';
