-- The verdict: who may write, as one pure function of (lease, machine, settings, instant).
-- No table is read here and no clock; the callers in 30_lease.sql and 70_status.sql bring both.

create or replace function arbiter._is_fresh(
  p_heartbeat_at timestamptz,
  p_heartbeat_timeout interval,
  p_at timestamptz)
returns boolean
language sql
immutable
security invoker
begin atomic
  select coalesce(p_at - p_heartbeat_at < p_heartbeat_timeout, false);
end;
revoke execute on function arbiter._is_fresh(timestamptz, interval, timestamptz) from public;
comment on function arbiter._is_fresh(timestamptz, interval, timestamptz) is
  'Whether the last heartbeat is younger than the timeout at an instant; false without a heartbeat.';

-- p_machine is the machine that the lease drains to, or else the machine that holds it. A cloud
-- writer must be that machine.
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
as $$
declare
  v_holder uuid := coalesce(p_lease.draining_to, p_lease.machine_id);
  v_fresh boolean := arbiter._is_fresh(p_machine.heartbeat_at, p_settings.heartbeat_timeout, p_at);
  -- An instant that was never noted counts as this very moment: unknown means possibly alive.
  v_left_at timestamptz := coalesce(p_machine.left_running_at, p_at);
  v_error_at timestamptz := coalesce(p_machine.entered_error_at, p_at);
  v_grace_ends_at timestamptz := v_left_at + p_settings.stop_grace;
  v_delay_ends_at timestamptz := v_error_at + p_settings.error_takeover_delay;
  v_verdict arbiter.verdict;
begin
  if p_source = 'cloud' then
    -- Whatever its status: signals in flight may complete while the machine stops.
    if p_machine_id is null or v_holder is distinct from p_machine_id or not v_fresh then
      v_verdict.code := 'not_holder';
    end if;
    return v_verdict;
  end if;

  if v_holder is null then
    return v_verdict;
  end if;

  case p_machine.state
    when 'stopping' then
      if v_fresh or p_at < v_grace_ends_at then
        v_verdict.code := 'cooling_down';
        v_verdict.retry_at := greatest(
          v_grace_ends_at, p_machine.heartbeat_at + p_settings.heartbeat_timeout);
      else
        v_verdict.takeover := 'stop_stalled';
      end if;
    when 'error' then
      if p_at < v_delay_ends_at then
        v_verdict.code := 'takeover_unconfirmed';
        v_verdict.retry_at := v_delay_ends_at;
      elsif p_settings.error_takeover_confirm then
        v_verdict.code := 'takeover_unconfirmed';
      else
        v_verdict.takeover := 'error_elapsed';
      end if;
    when 'stopped', 'starting', 'deleted' then
      if p_at < v_grace_ends_at then
        v_verdict.code := 'cooling_down';
        v_verdict.retry_at := v_grace_ends_at;
      else
        v_verdict.takeover := 'machine_stopped';
      end if;
    else -- running, and whatever else: unknown means possibly alive
      if v_fresh then
        v_verdict.code := 'cloud_active';
      else
        v_verdict.takeover := 'heartbeat_lapsed';
      end if;
  end case;
  return v_verdict;
end
$$;
revoke execute on function
  arbiter._verdict(text, uuid, arbiter.leases, arbiter.machine, arbiter.settings, timestamptz) from public;
comment on function
  arbiter._verdict(text, uuid, arbiter.leases, arbiter.machine, arbiter.settings, timestamptz) is
  'What a write from an environment (source, and the machine when cloud) gets at an instant. Reads nothing but its arguments.';
