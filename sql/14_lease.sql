-- The lease: reading a machine, admitting a write, draining, handing over.
--
-- Life of a lease. The first write of a user, or the user's first machine, creates it: local, epoch 1. A machine that
-- becomes healthy marks the drain (_activate, 23_registry.sql): from the commit of the mark on, writes of the old
-- holder are rejected. The next write or heartbeat of the machine ends the drain (_lock_lease, _hand_over): epoch + 1.
-- A local write takes the lease back when the verdict allows it.
--
-- Locks. A writer holds its user's row `for key share` to the end of its transaction: that makes check and write one
-- act. A handover takes the row `for update`, which waits for every such writer, and changes a key column, so that a
-- writer with an older snapshot fails instead of being admitted on what it sees. The mark of a drain changes no key
-- column, so it neither waits for writers nor delays them. A user's yes after an error (confirm_takeover,
-- 30_status.sql) marks a drain to local in the same way.
--
-- No session queues on the row: it skips a locked row and looks again after a pause (_pause). A queue would be served
-- one holder at a time, each with a fresh lock_timeout, and new writers would overtake it. So every wait ends at
-- drain_timeout, with an error that names the blockers, and a heartbeat never waits. In two places the server waits
-- all the same, and a lock_timeout bounds it: the creation of a lease (_create_lease), and a snapshot older than a
-- handover (_share_lease_bounded).
--
-- Lock order everywhere: registry row, then lease row, then data; several users by user id.
--
-- At read committed each statement of a volatile plpgsql function takes a new snapshot. The steps below rely on that:
-- a statement after a lock sees what the lock protects.

create or replace function arbiter._machine(p_user_id text, p_machine_id text)
returns arbiter.machine
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_machine arbiter.machine;
begin
  v_machine.machine_id := p_machine_id;
  v_machine.user_id := p_user_id;
  if p_machine_id is not null then
    select m.state, m.heartbeat_at
      into v_machine.state, v_machine.heartbeat_at
      from arbiter.machines m
     where arbiter._is_machine(m.machine_id, p_machine_id) and m.user_id::text collate "C" = p_user_id;
    if v_machine.state is distinct from 'running' then
      select n.left_running_at, n.entered_error_at
        into v_machine.left_running_at, v_machine.entered_error_at
        from arbiter.machine_notes n
       where n.machine_id = p_machine_id and n.user_id = p_user_id;
    end if;
  end if;
  v_machine.state := coalesce(v_machine.state, 'deleted');
  return v_machine;
end
$$;
comment on function arbiter._machine(text, text) is
  'A machine of a user: what the registry says, and what the database noted itself.';

create or replace function arbiter._lock_lease(
  p_user_id text,
  out locked boolean,
  out wrote boolean,
  out lease arbiter.leases)
returns record
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_xmax xid;
begin
  select l.xmax into v_xmax from arbiter.leases l where l.user_id = p_user_id;
  select l.* into lease from arbiter.leases l where l.user_id = p_user_id for update skip locked;
  locked := found;
  wrote := locked and arbiter._wrote_in_epoch(lease, v_xmax);
end
$$;
comment on function arbiter._lock_lease(text) is
  'Tries once to lock a lease for a handover, without waiting. locked: got it; lease is the row as it now stands. wrote: this transaction has written in its epoch.';

-- Of two transactions that create a lease at once one succeeds. The other does not wait for the first one to end: it
-- returns null, and its caller looks again.
create or replace function arbiter._create_lease(p_user_id text, p_reason text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '1ms'
as $$
begin
  insert into arbiter.leases (user_id, epoch, holder, held_since)
  values (p_user_id, 1, 'local', clock_timestamp())
  -- On any conflict: with one index named, a simultaneous insert can fail on the other one.
  on conflict do nothing;
  if not found then
    return false;
  end if;
  perform arbiter._record_handover(null, p_user_id, 'local', null, p_reason);
  return true;
exception
  when lock_not_available then
    return null;
end
$$;
comment on function arbiter._create_lease(text, text) is
  'Creates the lease of a user, local, epoch 1. False when there is one already, null while another transaction is creating it.';

-- As text, because every heartbeat asks it for each row, where a call would cost too much.
create or replace function arbiter._settled_machine_expression(p_user text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return format('(select l.machine_id from arbiter.leases l where l.user_id = %s and l.draining_since is null)', p_user);
comment on function arbiter._settled_machine_expression(text) is
  'SQL for the machine that holds the settled lease of a user, one that no drain is under way for; null when local holds it.';

do $settled_machine$
begin
  execute format($sql$
    create or replace function arbiter._settled_machine(p_user_id text)
    returns text
    language plpgsql
    stable
    set search_path = pg_catalog, pg_temp
    as $body$
    begin
      return %s;
    end
    $body$
    $sql$,
    arbiter._settled_machine_expression('p_user_id'));
end
$settled_machine$;
comment on function arbiter._settled_machine(text) is '_settled_machine_expression() as a function.';

-- Found means locked to the end of the transaction. The guard has this lock written out (_lease_expression,
-- 21_words.sql), where a call would cost too much; test_one_rule holds the two together.
create or replace function arbiter._share_lease(p_user_id text, p_source text, p_machine_id text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform from arbiter.leases l
    where l.user_id = p_user_id
      and l.holder = p_source
      and l.machine_id is not distinct from p_machine_id
      and l.draining_since is null
      for key share skip locked;
  return found;
end
$$;
comment on function arbiter._share_lease(text, text, text) is
  'Locks the lease for a write if this environment, and machine, holds it. Never waits at read committed.';

-- For a caller that may have to try again. The lock is tried in a savepoint first and undone, for two reasons. When
-- the row was replaced since the snapshot, the server locks its newest version before it finds that it does not fit,
-- and that lock would count as a write of this transaction (_wrote_in_epoch). And above read committed the server waits
-- for a handover under way in spite of `skip locked`; lock_timeout bounds that wait and ends with this function. The
-- savepoint is rolled back and never released, because pg_locks does not show the lock of a released savepoint to the
-- sessions that wait for it.
create or replace function arbiter._share_lease_bounded(p_user_id text, p_source text, p_machine_id text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
declare
  v_found boolean;
begin
  perform set_config('lock_timeout', ceil(extract(epoch from s.drain_timeout) * 1000)::text, true)
     from arbiter.settings s
    where s.singleton;
  begin
    v_found := arbiter._share_lease(p_user_id, p_source, p_machine_id);
    raise exception using errcode = 'WX000', message = 'undo the lock';
  exception
    when sqlstate 'WX000' then
      if not v_found then
        return false;
      end if;
    when lock_not_available then
      return null;
  end;
  return arbiter._share_lease(p_user_id, p_source, p_machine_id);
end
$$;
comment on function arbiter._share_lease_bounded(text, text, text) is
  'Locks the lease for a write like _share_lease, and leaves no lock when it cannot. Null when a handover under way has kept it waiting for drain_timeout.';

-- Needs the row locked by _lock_lease. A drain that ends without a change of holder is no handover.
create or replace function arbiter._hand_over(
  p_lease arbiter.leases,
  p_wrote boolean,
  p_holder text,
  p_machine_id text,
  p_reason text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_lease.holder = p_holder and p_lease.machine_id is not distinct from p_machine_id then
    update arbiter.leases
       set draining_to = null, draining_since = null
     where user_id = p_lease.user_id
       and draining_since is not null;
    return true;
  end if;
  if p_wrote then
    return false;
  end if;
  update arbiter.leases
     set epoch = p_lease.epoch + 1,
         holder = p_holder,
         machine_id = p_machine_id,
         draining_to = null,
         draining_since = null,
         held_since = clock_timestamp()
   where user_id = p_lease.user_id;
  perform arbiter._record_handover(p_lease, p_lease.user_id, p_holder, p_machine_id, p_reason);
  return true;
end
$$;
comment on function arbiter._hand_over(arbiter.leases, boolean, text, text, text) is
  'Gives a locked lease to a holder and records the handover. False, and nothing done, when this transaction has itself written in the epoch that would end.';

-- A takeover depends on the machine's row in the registry. At repeatable read or above the snapshot may be old, and a
-- machine must not lose its lease to it. Locking the row makes the server compare it with the newest version, and fail
-- the transaction when they differ; the savepoint gives the lock back at once, so that no heartbeat waits for it.
create or replace function arbiter._sees_now(p_machine arbiter.machine)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seen boolean := true;
begin
  if not arbiter._sees_commits() then
    begin
      if p_machine.state = 'deleted' then
        -- There is no row to lock, but its note is written when the machine comes back.
        perform from arbiter.machine_notes n
          where n.user_id = p_machine.user_id and n.machine_id = p_machine.machine_id
            for no key update skip locked;
      else
        perform from arbiter.machines m
          where arbiter._is_machine(m.machine_id, p_machine.machine_id)
            for no key update skip locked;
      end if;
      v_seen := found;
      raise exception using errcode = 'WX000', message = 'undo the lock';
    exception
      when sqlstate 'WX000' then
        null;
    end;
  end if;
  return v_seen;
end
$$;
comment on function arbiter._sees_now(arbiter.machine) is
  'Whether the snapshot shows the newest version of the machine''s row; false while another transaction is writing it.';

-- 2 ms: short beside a write, long beside the query that it repeats.
create or replace function arbiter._pause(p_give_up_at timestamptz)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if clock_timestamp() >= p_give_up_at then
    return false;
  end if;
  perform pg_sleep(0.002);
  return true;
end
$$;
comment on function arbiter._pause(timestamptz) is
  'Waits a moment before another look at a lease; false, without waiting, once it is time to give up.';

-- Decides one write, and does what its admission needs: nothing, a handover, the end of a drain, or the lease's
-- creation. An admitted write returns with the lease locked to the end of the transaction. A rejection, once it is
-- raised, gives back all locks that were taken here.
create or replace function arbiter._decide(
  p_user_id text,
  p_source text,
  p_machine_id text,
  p_wait boolean,
  out verdict arbiter.verdict,
  out lease arbiter.leases)
returns record
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings arbiter.settings;
  v_machine arbiter.machine;
  v_attempt record;
  v_locked boolean := false;
  v_created boolean;
  v_shared boolean;
  v_give_up_at timestamptz;
begin
  select s.* into strict v_settings from arbiter.settings s where s.singleton;
  loop
    select l.* into lease from arbiter.leases l where l.user_id = p_user_id;
    v_machine := arbiter._machine(p_user_id, lease.claimant);
    verdict := arbiter._verdict(p_source, p_machine_id, lease, v_machine, v_settings, clock_timestamp());
    if verdict.code is not null then
      return;
    end if;

    if lease.user_id is null then
      v_created := arbiter._create_lease(p_user_id, 'first_write');
      if v_created then
        return;
      end if;
      -- False: there is a lease now; decide by it.
      continue when not v_created;
    elsif verdict.takeover is null and lease.draining_since is null then
      v_shared := arbiter._share_lease_bounded(p_user_id, p_source, p_machine_id);
      if v_shared then
        return;
      end if;
      -- Null: it has waited for drain_timeout already.
      v_give_up_at := case when v_shared is null then '-infinity' else v_give_up_at end;
    else
      -- Only once: afterwards the row's xmax is this transaction, as if it had written in the epoch.
      if not v_locked then
        v_attempt := arbiter._lock_lease(p_user_id);
        v_locked := v_attempt.locked;
      end if;
      if v_locked then
        -- Decide again by the locked row, which cannot change any more.
        lease := v_attempt.lease;
        v_machine := arbiter._machine(p_user_id, lease.claimant);
        verdict := arbiter._verdict(p_source, p_machine_id, lease, v_machine, v_settings, clock_timestamp());
        if verdict.code is not null then
          return;
        end if;
        if verdict.takeover is null or arbiter._sees_now(v_machine) then
          if not arbiter._hand_over(lease, v_attempt.wrote, p_source, p_machine_id,
            coalesce(verdict.takeover, case p_source when 'cloud' then 'activated' else 'confirmed' end))
          then
            verdict := ('handover_draining', null, null);
          end if;
          return;
        end if;
      end if;
    end if;

    v_give_up_at := coalesce(v_give_up_at, clock_timestamp() + v_settings.drain_timeout);
    if not p_wait or not arbiter._pause(v_give_up_at) then
      verdict := ('handover_draining', null, null);
      return;
    end if;
  end loop;
end
$$;
comment on function arbiter._decide(text, text, text, boolean) is
  'The verdict on one write, with the lease locked when it is admitted. p_wait: wait up to drain_timeout for other transactions.';
