-- The lease: reading a machine, admitting a write, draining, handing over.
--
-- Life of a lease. The first write of a user, or the user's first machine, creates it: local,
-- epoch 1. A machine that becomes healthy marks the drain (_activate, 40_registry.sql): from the
-- commit of the mark on, writes of the old holder are refused. The next write or heartbeat of the
-- machine ends the drain (_lock_lease, _hand_over): epoch + 1. A local write takes the lease back when
-- the verdict says so.
--
-- Locks. A writer holds its user's row `for key share` to the end of its transaction: that makes
-- check and write one act. A handover takes the row `for update`, which waits for every such
-- writer, and changes a key column, so that a writer with an older snapshot fails instead of being
-- admitted by what it sees. The mark of a drain changes no key column and so neither waits for
-- writers nor holds them up. A user's yes after an error (confirm_takeover, 70_status.sql) marks a drain to
-- local in the same way.
--
-- Nobody queues on the row: `skip locked` and a look again. A queue would be served one holder at a
-- time, each with a fresh lock_timeout, and new writers would overtake it. So every wait ends at
-- drain_timeout, with an error that names who is in the way, and a heartbeat waits for nobody. Where the
-- server would wait all the same, a lock_timeout bounds it: the creation of a lease (_create_lease), and
-- a snapshot older than a handover (_share_lease_bounded).
--
-- Lock order everywhere: registry row, then lease row, then data; several users by user id.
--
-- Volatile functions in plpgsql take a new snapshot for each statement at read committed, which
-- the steps below rely on: what is read after a lock is what the lock protects.

create or replace function arbiter._machine(p_user_id uuid, p_machine_id uuid)
returns arbiter.machine
language plpgsql
stable
security invoker
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
     where m.machine_id = p_machine_id and m.user_id = p_user_id;
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
revoke execute on function arbiter._machine(uuid, uuid) from public;
comment on function arbiter._machine(uuid, uuid) is
  'A machine of a user: what the registry says, and what the database noted itself.';

-- The transactions that hold a lock on the lease row. The row's xmax is one transaction or a set of
-- them; SQL cannot tell which, so both readings are tried and only transactions that have locked some
-- lease count.
create or replace function arbiter._lockers(p_xmax xid)
returns setof xid
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  return next p_xmax;
  return query select m.xid from pg_get_multixact_members(p_xmax) m;
exception
  when others then
    -- Not the number of a set.
    null;
end
$$;
revoke execute on function arbiter._lockers(xid) from public;
comment on function arbiter._lockers(xid) is 'The transactions that a row''s xmax may stand for.';

create or replace function arbiter._blockers(p_user_id uuid)
returns jsonb
language sql
volatile
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(jsonb_agg(distinct r.pid), '[]')
    from pg_catalog.pg_locks r
    left join arbiter.leases l on l.user_id = p_user_id
   where r.locktype = 'relation'
     and r.relation = 'arbiter.leases'::regclass
     and r.granted
     and case
       -- A lease that cannot be seen yet: whoever is writing leases.
       when l.user_id is null then r.mode = 'RowExclusiveLock' and r.pid <> pg_backend_pid()
       else exists (
         select from pg_catalog.pg_locks t
           join arbiter._lockers(l.xmax) as locker (xid) on locker.xid = t.transactionid
          where t.pid = r.pid and t.locktype = 'transactionid' and t.granted)
       end;
end;
revoke execute on function arbiter._blockers(uuid) from public;
comment on function arbiter._blockers(uuid) is
  'Process ids of the sessions whose open transactions lock a user''s lease. For the detail of WX007; may miss a released savepoint.';

-- Whether this very transaction has written in the epoch that it is about to end: its own lock does
-- not stop it, and its row would then belong to both environments.
create or replace function arbiter._wrote_in_epoch(p_lease arbiter.leases, p_xmax xid)
returns boolean
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_current bigint := pg_current_xact_id()::text::bigint;
  v_half bigint := 1::bigint << 31;
  v_xid bigint;
begin
  if exists (
    select from arbiter.handovers h
     where h.user_id = p_lease.user_id
       and h.epoch = p_lease.epoch
       and h.xid = pg_current_xact_id()
       and h.reason <> 'registered'
       -- In a restored database the number may be that of another transaction, elsewhere.
       and h.cluster = (select c.system_identifier from pg_catalog.pg_control_system() c))
  then
    return true;
  end if;
  -- The row is locked exclusively now, so a locker that is still in progress can only be this
  -- transaction, or a savepoint of it that was released and has no other name left. Whatever another
  -- session owns up to is a number read as what it is not.
  for v_xid in
    select (v_current >> 32 << 32) + locker.xid::text::bigint
      from arbiter._lockers(p_xmax) as locker (xid)
     where p_xmax <> '0'::xid
  loop
    -- A 32-bit transaction id means the one nearest to ours.
    v_xid := v_xid + case
      when v_xid - v_current > v_half then -2 * v_half
      when v_current - v_xid > v_half then 2 * v_half
      else 0 end;
    begin
      if v_xid > 2 and pg_xact_status(v_xid::text::xid8) = 'in progress' and not exists (
        select from pg_catalog.pg_locks k
         where k.locktype = 'transactionid'
           and k.transactionid = v_xid::text::xid8::xid
           and k.granted
           and k.pid is distinct from pg_backend_pid())
      then
        return true;
      end if;
    exception
      when invalid_parameter_value then
        -- In the future: the number of a set, read as a transaction.
        null;
    end;
  end loop;
  return false;
end
$$;
revoke execute on function arbiter._wrote_in_epoch(arbiter.leases, xid) from public;
comment on function arbiter._wrote_in_epoch(arbiter.leases, xid) is
  'Whether the current transaction has itself written in the lease''s epoch. Needs the row locked for update, and its xmax from before.';

-- One attempt to get a lease row exclusively; never waits.
create or replace function arbiter._lock_lease(
  p_user_id uuid,
  out locked boolean,
  out wrote boolean,
  out lease arbiter.leases)
returns record
language plpgsql
volatile
security invoker
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
revoke execute on function arbiter._lock_lease(uuid) from public;
comment on function arbiter._lock_lease(uuid) is
  'Tries to lock a lease for a handover. locked: got it; lease is the row as it now stands. wrote: this transaction has written in its epoch.';

-- The entry of the history, with the evidence that arbiter.audit() judges by. Under the lock of the lease, in
-- the transaction that hands over.
create or replace function arbiter._record_handover(
  p_from arbiter.leases,
  p_user_id uuid,
  p_holder text,
  p_machine_id uuid,
  p_reason text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_exact boolean := current_setting('transaction_isolation') = 'read committed';
  v_top bigint := pg_current_xact_id()::text::bigint;
  v_frontier xid8;
begin
  if v_exact then
    v_frontier := pg_snapshot_xmax(pg_current_snapshot());
  else
    -- The snapshot may be old, but a savepoint takes the next transaction id there is. The row shows
    -- its lower half; it follows the id of the whole transaction.
    begin
      update arbiter.leases l set held_since = l.held_since where l.user_id = p_user_id
        returning (v_top + ((l.xmin::text::bigint - v_top) & 4294967295))::text::xid8 into v_frontier;
    exception
      when sqlstate 'WX000' then
        -- Nobody raises it: a block with handlers is what makes the savepoint.
        null;
    end;
  end if;
  insert into arbiter.handovers (
    user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
    handed_over_at, xid, snapshot, exact, frontier, cluster)
  values (
    p_user_id, coalesce(p_from.epoch, 0) + 1, p_from.holder, p_from.machine_id, p_holder, p_machine_id, p_reason,
    clock_timestamp(), pg_current_xact_id(), pg_current_snapshot(), v_exact, v_frontier,
    (select c.system_identifier from pg_catalog.pg_control_system() c));
end
$$;
revoke execute on function arbiter._record_handover(arbiter.leases, uuid, text, uuid, text) from public;
comment on function arbiter._record_handover(arbiter.leases, uuid, text, uuid, text) is
  'Appends a handover to the history with its evidence. p_from: the lease until then; nulls when it was created.';

-- The lease begins with the first write of a user or with the user's first machine. Of two that come at
-- once one creates it; the other does not wait for that one's transaction but says so and looks again.
create or replace function arbiter._create_lease(p_user_id uuid, p_reason text)
returns boolean
language plpgsql
volatile
security invoker
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
revoke execute on function arbiter._create_lease(uuid, text) from public;
comment on function arbiter._create_lease(uuid, text) is
  'Creates the lease of a user, local, epoch 1. False when there is one already, null while another transaction is creating it.';

-- The lock of a writer whose environment, and machine, holds the lease while no drain is under way.
-- Found means locked, to the end of the transaction: that is the check and the write in one act.
create or replace function arbiter._share_lease(p_user_id uuid, p_source text, p_machine_id uuid)
returns boolean
language plpgsql
volatile
security invoker
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
revoke execute on function arbiter._share_lease(uuid, text, uuid) from public;
comment on function arbiter._share_lease(uuid, text, uuid) is
  'Locks the lease for a write if this environment, and machine, holds it. Never waits at read committed.';

-- The same for those who may have to try again. The lock is tried in a savepoint first and undone, for two
-- reasons. When the row was replaced since the snapshot, the server locks its newest version before it finds that it
-- does not fit: that lock would count as a write of this transaction (_wrote_in_epoch). And above read committed
-- it waits there for a handover under way, whatever `skip locked` says; the bound is drain_timeout, and the setting ends
-- with the function. The savepoint is never released: a lock of one that was has no name in pg_locks for those
-- whom it keeps waiting.
create or replace function arbiter._share_lease_bounded(p_user_id uuid, p_source text, p_machine_id uuid)
returns boolean
language plpgsql
volatile
security invoker
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
revoke execute on function arbiter._share_lease_bounded(uuid, text, uuid) from public;
comment on function arbiter._share_lease_bounded(uuid, text, uuid) is
  'Locks the lease for a write like _share_lease, without a trace when it cannot; null when a handover under way has kept it waiting for drain_timeout.';

-- Needs the row locked by _lock_lease. False, and nothing done, when this transaction has itself
-- written in the epoch that would end. A drain that ends without a change of holder is no handover.
create or replace function arbiter._hand_over(
  p_lease arbiter.leases,
  p_wrote boolean,
  p_holder text,
  p_machine_id uuid,
  p_reason text)
returns boolean
language plpgsql
volatile
security invoker
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
  -- The snapshot is taken there, under the lock: every write of the epoch that ends is visible in it.
  perform arbiter._record_handover(p_lease, p_lease.user_id, p_holder, p_machine_id, p_reason);
  return true;
end
$$;
revoke execute on function arbiter._hand_over(arbiter.leases, boolean, text, uuid, text) from public;
comment on function arbiter._hand_over(arbiter.leases, boolean, text, uuid, text) is
  'Gives a locked lease to a holder and records it with its evidence.';

-- A takeover rests on what the registry says of the machine. At repeatable read or above that may
-- be long out of date, and a machine must not lose its lease to a browser's old snapshot. Locking
-- the machine's row makes the server compare it with the newest version (and fail the transaction
-- when there is one); the savepoint gives the lock back at once, so that no heartbeat waits for it.
create or replace function arbiter._sees_now(p_machine arbiter.machine)
returns boolean
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seen boolean := true;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    begin
      if p_machine.state = 'deleted' then
        -- No row to ask; its note is written when it comes back.
        perform from arbiter.machine_notes n
          where n.user_id = p_machine.user_id and n.machine_id = p_machine.machine_id
            for no key update skip locked;
      else
        perform from arbiter.machines m
          where m.machine_id = p_machine.machine_id
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
revoke execute on function arbiter._sees_now(arbiter.machine) from public;
comment on function arbiter._sees_now(arbiter.machine) is
  'Whether the snapshot shows the newest version of the machine''s row; false while somebody is writing it.';

-- Decides one write and does what its admission needs: nothing, a handover, the end of a drain, the
-- lease's creation. Returns with the lease locked to the end of the transaction, or with a rejection,
-- which when raised gives back whatever was locked on the way to it.
create or replace function arbiter._decide(
  p_user_id uuid,
  p_source text,
  p_machine_id uuid,
  p_wait boolean,
  out verdict arbiter.verdict,
  out lease arbiter.leases)
returns record
language plpgsql
volatile
security invoker
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
      -- False: somebody else just did; decide by that one.
      continue when not v_created;
    elsif verdict.takeover is null and lease.draining_since is null then
      v_shared := arbiter._share_lease_bounded(p_user_id, p_source, p_machine_id);
      if v_shared then
        return;
      end if;
      -- Null: it has waited long enough.
      v_give_up_at := case when v_shared is null then clock_timestamp() else v_give_up_at end;
    else
      -- Once: afterwards the row names this transaction, as if it had written in the epoch.
      if not v_locked then
        v_attempt := arbiter._lock_lease(p_user_id);
        v_locked := v_attempt.locked;
      end if;
      if v_locked then
        -- Again, by what nobody can change any more.
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
    if not p_wait or clock_timestamp() >= v_give_up_at then
      verdict := ('handover_draining', null, null);
      return;
    end if;
    perform pg_sleep(0.002);
  end loop;
end
$$;
revoke execute on function arbiter._decide(uuid, text, uuid, boolean) from public;
comment on function arbiter._decide(uuid, text, uuid, boolean) is
  'The verdict on one write, with the lease locked when it is admitted. p_wait: wait up to drain_timeout for others.';

-- The history proves exclusion only while nobody rewrites it.
create or replace function arbiter.tg_append_only()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row arbiter.handovers;
begin
  if tg_level = 'ROW' then
    v_row := old;
  end if;
  perform arbiter._raise('append_only', arbiter._detail('append_only', v_row.user_id, null, null,
    jsonb_build_object('operation', tg_op, 'epoch', v_row.epoch)));
  return null;
end
$$;
revoke execute on function arbiter.tg_append_only() from public;
comment on function arbiter.tg_append_only() is 'Refuses the operation with WX008.';
