-- What locks and handovers leave behind: who holds a lease's lock, what this transaction has written, and the
-- history of handovers with the evidence that arbiter.audit() judges by.

-- A row's xmax is the id of one transaction or of a set of them (a MultiXactId), and SQL cannot tell which. So both
-- readings are returned, and the callers count only transactions that really hold a lock.
create or replace function arbiter._lockers(p_xmax xid)
returns setof xid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  return next p_xmax;
  return query select m.xid from pg_get_multixact_members(p_xmax) m;
exception
  when others then
    -- Not the id of a set.
    null;
end
$$;
comment on function arbiter._lockers(xid) is 'The transactions that may hold a row''s lock, by the row''s xmax.';

-- A 32-bit transaction id stands for the nearest 64-bit one.
create or replace function arbiter._full_xid(p_xid xid)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_current constant bigint := pg_current_xact_id()::text::bigint;
  v_half constant bigint := 1::bigint << 31;
  v_xid constant bigint := (v_current >> 32 << 32) + p_xid::text::bigint;
begin
  return v_xid + case
    when v_xid - v_current > v_half then -2 * v_half
    when v_current - v_xid > v_half then 2 * v_half
    else 0 end;
end
$$;
comment on function arbiter._full_xid(xid) is
  'The 64-bit transaction id that a 32-bit one stands for, as a bigint: it may be negative or in the future when the argument is no transaction id.';

create or replace function arbiter._is_in_progress(p_xid xid)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_xid constant bigint := arbiter._full_xid(p_xid);
begin
  return coalesce(v_xid > 2 and pg_xact_status(v_xid::text::xid8) = 'in progress', false);
end
$$;
comment on function arbiter._is_in_progress(xid) is
  'Whether a transaction has not ended yet: for the xmin of a row that can be seen, whether this transaction has written it.';

create or replace function arbiter._blockers(p_user_id text)
returns jsonb
language sql
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(jsonb_agg(distinct r.pid), '[]')
    from pg_catalog.pg_locks r
    left join arbiter.leases l on l.user_id = p_user_id
   where r.locktype = 'relation'
     and r.relation = 'arbiter.leases'::regclass
     and r.granted
     and case
       -- The lease cannot be seen yet: name the sessions that are writing leases.
       when l.user_id is null then r.mode = 'RowExclusiveLock' and r.pid <> pg_backend_pid()
       else exists (
         select from pg_catalog.pg_locks t
           join arbiter._lockers(l.xmax) as locker (xid) on locker.xid = t.transactionid
          where t.pid = r.pid and t.locktype = 'transactionid' and t.granted)
       end;
end;
comment on function arbiter._blockers(text) is
  'Process ids of the sessions whose open transactions lock a user''s lease. For the detail of WX007; may miss a released savepoint.';

-- A transaction's own lock does not keep it from ending the epoch that it has written in, and its rows would then
-- belong to both environments.
create or replace function arbiter._wrote_in_epoch(p_lease arbiter.leases, p_xmax xid)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_xid bigint;
begin
  if exists (
    select from arbiter.handovers h
     where h.user_id = p_lease.user_id
       and h.epoch = p_lease.epoch
       and h.xid = pg_current_xact_id()
       and h.reason <> 'registered'
       -- In a restored database the id may be that of a transaction of another cluster.
       and h.cluster = (select c.system_identifier from pg_catalog.pg_control_system() c))
  then
    return true;
  end if;
  -- The row is locked exclusively now, so a locker in progress can only be this transaction, or a savepoint of it that
  -- was released. An id that another session holds is a MultiXactId misread as a transaction id.
  for v_xid in
    select arbiter._full_xid(locker.xid)
      from arbiter._lockers(p_xmax) as locker (xid)
     where p_xmax <> '0'::xid
  loop
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
        -- In the future: a MultiXactId misread as a transaction id.
        null;
    end;
  end loop;
  return false;
end
$$;
comment on function arbiter._wrote_in_epoch(arbiter.leases, xid) is
  'Whether the current transaction has itself written in the lease''s epoch. Needs the row locked for update, and its xmax from before.';

-- Needs the lease locked exclusively by this transaction: the snapshot then shows every write of the epoch that ends.
create or replace function arbiter._record_handover(
  p_from arbiter.leases,
  p_user_id text,
  p_holder text,
  p_machine_id text,
  p_reason text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_exact boolean := arbiter._sees_commits();
  v_xid constant xid8 := pg_current_xact_id();
  v_top constant bigint := v_xid::text::bigint;
  v_frontier xid8;
begin
  if v_exact then
    v_frontier := pg_snapshot_xmax(pg_current_snapshot());
  else
    -- The snapshot may be old, but a savepoint takes the next transaction id. The row shows the lower half of it; the
    -- whole id follows the one of this transaction.
    begin
      update arbiter.leases l set held_since = l.held_since where l.user_id = p_user_id
        returning (v_top + ((l.xmin::text::bigint - v_top) & 4294967295))::text::xid8 into v_frontier;
    exception
      when sqlstate 'WX000' then
        -- Never raised: a block needs a handler to be a savepoint.
        null;
    end;
  end if;
  insert into arbiter.handovers (
    user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
    handed_over_at, xid, snapshot, exact, frontier, cluster)
  values (
    p_user_id, coalesce(p_from.epoch, 0) + 1, p_from.holder, p_from.machine_id, p_holder, p_machine_id, p_reason,
    clock_timestamp(), v_xid, pg_current_snapshot(), v_exact, v_frontier,
    (select c.system_identifier from pg_catalog.pg_control_system() c));
end
$$;
comment on function arbiter._record_handover(arbiter.leases, text, text, text, text) is
  'Appends a handover to the history with its evidence. p_from: the lease until then; nulls when it was created.';

-- The history proves exclusion only as long as it is not rewritten.
create or replace function arbiter.tg_append_only()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  -- A correction has neither user nor epoch.
  v_row jsonb := case tg_level when 'ROW' then to_jsonb(old) end;
  v_error arbiter.error;
begin
  v_error := arbiter._rejected('append_only', arbiter._detail('append_only', v_row ->> 'user_id', null, null,
    jsonb_build_object('operation', tg_op, 'epoch', (v_row ->> 'epoch')::bigint)));
  raise exception using
    errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
end
$$;
comment on function arbiter.tg_append_only() is 'Rejects the operation with WX008.';
