-- The verdict: who may write, as one pure function of (lease, machine, settings, instant).
-- No table is read here and no clock; the callers in 30_lease.sql and 70_status.sql bring both.

-- Written out in the generated code that runs with every write: a call there would cost more than the question.
-- A heartbeat that lies further in the future was stamped before the clock was set back: how long ago, nobody
-- knows. Exclusion does not depend on it, but somebody must be able to write.
create or replace function arbiter._fresh_expression(p_heartbeat_at text, p_heartbeat_timeout text, p_at text)
returns text
language sql
immutable
security invoker
set search_path = pg_catalog, pg_temp
return format('coalesce(greatest(%3$s - %1$s, %1$s - %3$s) < %2$s, false)', p_heartbeat_at, p_heartbeat_timeout, p_at);
revoke execute on function arbiter._fresh_expression(text, text, text) from public;
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
    security invoker
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
revoke execute on function arbiter._is_fresh(timestamptz, interval, timestamptz) from public;
comment on function arbiter._is_fresh(timestamptz, interval, timestamptz) is
  '_fresh_expression as a function.';

-- p_machine is the machine that the lease is for (its claimant). At any instant at most one environment
-- is admitted: once a browser may take over, the machine may not write any more, whatever it believes.
create or replace function arbiter._verdict(
  p_source text,
  p_machine_id uuid,
  p_lease arbiter.leases,
  p_machine arbiter.machine,
  p_settings arbiter.settings,
  p_at timestamptz)
returns arbiter.verdict
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fresh boolean := arbiter._is_fresh(p_machine.heartbeat_at, p_settings.heartbeat_timeout, p_at);
  -- An instant that was never noted counts as this very moment: unknown means possibly alive. One that
  -- lies further in the future than its period was noted before the clock was set back: its time is over.
  v_grace_ends_at timestamptz := case
    when p_machine.left_running_at - p_settings.stop_grace > p_at then p_at
    else coalesce(p_machine.left_running_at, p_at) + p_settings.stop_grace end;
  v_delay_ends_at timestamptz := case
    when p_machine.entered_error_at - p_settings.error_takeover_delay > p_at then p_at
    else coalesce(p_machine.entered_error_at, p_at) + p_settings.error_takeover_delay end;
  v_local arbiter.verdict;
  v_cloud arbiter.verdict;
begin
  if p_lease.claimant is not null then
    case p_machine.state
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
      else -- running, and whatever else: unknown means possibly alive
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
  -- Until a takeover is possible whatever the status: signals in flight may complete during a stop.
  if p_lease.claimant is null or p_lease.claimant is distinct from p_machine_id or not v_fresh or v_local.takeover is not null then
    v_cloud.code := 'not_holder';
  end if;
  return v_cloud;
end
$$;
revoke execute on function
  arbiter._verdict(text, uuid, arbiter.leases, arbiter.machine, arbiter.settings, timestamptz) from public;
comment on function
  arbiter._verdict(text, uuid, arbiter.leases, arbiter.machine, arbiter.settings, timestamptz) is
  'What a write from an environment (source, and the machine when cloud) gets at an instant. Reads nothing but its arguments.';
