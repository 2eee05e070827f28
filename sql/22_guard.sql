-- The guard of a protected table: first its templates, then the slow path that they call.
--
-- protect() makes a copy of the templates for each table (_instantiate, 20_generate.sql) and puts the table's own names
-- and options in the place of these words (_guard_words):
--
--   __rows          the new rows: the transition table arbiter_rows, or (select new.*) for a row that it does not hold
--   __keys(x)       the columns where the ways from a row to its user begin, separated by commas
--   __keeps_keys    whether an update keeps these columns
--   __follows_keys  whether what it changes of them is what foreign keys do: `on update cascade`, `on delete set null`
--   __machine       the column that names the machine; __machine_name is its name as a literal
--   __machine_of(x) the machine that the row x names, as text; __machine_key(x) as an id of the registry
--   __user_of(x)    the user to whom the row x leads
--   __is_broken(x)  whether the path of x names a row that does not exist; not asked where that rejects the row anyway
--   __differ(x)     whether the ways of x lead to different users; false where there is one way
--   __has_flaw(x)   whether they do, or the path of x names a row that does not exist
--   __is_ours(x)    whether arbiter_xid of x is this transaction; true on a table without that column
--   __keeps_xid     whether an update keeps arbiter_xid; true on a table without that column
--   __is_judged(x)  whether the guard judges x; it leaves an update that took the machine away to _provenance_template,
--                   which sees the old row, too
--   __writer(x)     what the rows of one writer have in common: keys and machine; null for keys not compared so
--   __has_writer    whether keys are compared so: true or false
--   __updates       whether updates are arbitrated, too: true or false
--   __protection, __mode, __unowned   the table's row in arbiter.protections
--
-- The options stand in the code and are not read from arbiter.protections, because a transaction with an old snapshot
-- would read old ones. Constants such as `not false or ...` cost nothing: the planner removes them.
--
-- Definer: they lock leases and read the registry and the path to the user, which the client may not be allowed to.
-- With row security off a hidden row is an error, not a missing one.

create or replace function arbiter._guard_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
#variable_conflict use_variable
declare
  v_write record;
  v_error arbiter.error;
  v_several boolean := false;
begin
  -- The common case: one environment, or machine, of one user has written all rows, holds the lease, and no drain is
  -- under way. The lease is that of the first row, with the lock of _share_lease() (14_lease.sql); the other rows only
  -- have to be like it. One query, without a sort or a loop: to set these up is most of what a single row costs.
  perform
     -- If this statement fails, the table has changed under its guard: call arbiter.protect() again.
     from __rows as n
    where __is_judged(n)
      and (case when n.source = case when n.__machine is null then 'local' else 'cloud' end and __is_ours(n)
            then __writer(n) = (
              select (select __writer(d)
                        from arbiter.leases l
                       where l.user_id = __user_of(d)
                         and l.machine_id is not distinct from __machine_of(d)
                         and l.draining_since is null
                         -- At a higher level the lock may wait (_share_lease_bounded). The second argument changes
                         -- nothing; without it the condition is on no table, which is a plan node of its own.
                         and current_setting('transaction_isolation', l.user_id is null) = 'read committed'
                         and (l.machine_id is null or arbiter._machine_may_write(__machine_key(d), l.user_id))
                         for key share skip locked)
                from __rows as d
               where __is_judged(d)
               limit 1) end) is not true;
  if not found then
    return null;
  end if;

  -- The same for rows of several who all hold, and where the query above compares no keys. The rows are made distinct
  -- before their users are looked up.
  if current_setting('transaction_isolation') = 'read committed' then
    perform from __rows as n offset 1 limit 1;
    v_several := found or not __has_writer;
  end if;
  if v_several then
    perform
       from (
         select distinct __keys(n), n.__machine,
                n.source = case when n.__machine is null then 'local' else 'cloud' end and __is_ours(n) as arbiter_fits
           from __rows as n
          where __is_judged(n)) d
      where case when d.arbiter_fits then (
              select l.user_id
                from arbiter.leases l
               where l.user_id = __user_of(d)
                 and l.machine_id is not distinct from __machine_of(d)
                 and l.draining_since is null
                 and (l.machine_id is null or arbiter._machine_may_write(__machine_key(d), l.user_id))
                 for key share skip locked) end is null;
    if not found then
      return null;
    end if;
  end if;

  if __updates and tg_op = 'UPDATE' and arbiter._is_amending(__protection) then
    return null;
  end if;

  -- All other cases: each distinct (user, source, machine, flaw) is judged, in the order of the users.
  for v_write in
    select distinct
           -- If this statement fails, the table has changed under its guard: call arbiter.protect() again.
           __user_of(n) as user_id,
           n.source::text as source,
           __machine_of(n) as machine_id,
           case when (__is_ours(n)) is not true then 'evidence'
                when __is_broken(n) then 'parent'
                when __differ(n) then 'users' end as flaw
      from __rows as n
     where __is_judged(n)
     order by 1, 2, 3, 4
  loop
    -- One user without a lease sends the whole statement here; keep the others cheap.
    if v_several and v_write.flaw is null and v_write.source = 'local' and v_write.machine_id is null then
      continue when arbiter._share_lease(v_write.user_id, 'local', null);
    end if;
    v_error := arbiter._admit(__protection, __mode, __unowned,
      v_write.user_id, v_write.source, v_write.machine_id, v_write.flaw);
    if v_error.sqlstate is not null then
      raise exception using
        errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
    end if;
  end loop;
  return null;
end
$$;
comment on function arbiter._guard_template() is 'The guard of a protected table, as a template.';

-- The provenance of a row does not change, except by what a foreign key does: a machine which is deleted leaves its
-- rows without a machine (on delete set null), and a new key of a parent replaces the old one (on update cascade).
-- Where updates are arbitrated, source and machine say who writes, and only the user is kept.
create or replace function arbiter._provenance_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
#variable_conflict use_variable
declare
  v_user_id text;
  v_machine_gone boolean;
  v_error arbiter.error;
begin
  -- The common case: the provenance has not changed, or the update says who writes.
  if __keeps_keys
    and (case when __updates then new.source is distinct from 'cloud' or new.__machine is not null
         else new.source is not distinct from old.source
          and new.__machine is not distinct from old.__machine
          and __keeps_xid end)
  then
    return new;
  end if;
  if (__is_ours(new)) and arbiter._is_amending(__protection) then
    return new;
  end if;
  v_user_id := __user_of(old);
  -- Also for a row that says local: it may have had a machine before the table was protected.
  v_machine_gone := new.source is not distinct from old.source
    and old.__machine is not null
    and new.__machine is null
    and not exists (select from arbiter.machines m where arbiter._is_machine(m.machine_id, old.__machine::text collate "C"));
  -- Where the ways of the new row disagree, or one is broken, it has no user yet, and could get one without a write.
  if ((__user_of(new)) is distinct from v_user_id or __has_flaw(new))
      and not (__follows_keys)
    or not __updates and (new.source is distinct from old.source or not (__keeps_xid)
      or new.__machine is distinct from old.__machine and not v_machine_gone
        and not arbiter._follows_key(tg_relid, __machine_name, old.__machine::text, new.__machine::text))
  then
    v_error := arbiter._reject_or_record(__protection, __mode, 'provenance_immutable',
      arbiter._detail('provenance_immutable', v_user_id, null, null),
      case when arbiter._is_amending(__protection)
        then 'A correction says so in each row: set arbiter_xid = default in the same update.' end);
  -- The foreign key changes nothing but the machine, and acts from inside a trigger. Any other update that leaves
  -- cloud without a machine is a write and must say whose. Without such a key the depth of triggers proves nothing.
  elsif __updates and new.source = 'cloud' and new.__machine is null
    and not (v_machine_gone
      and (tg_when = 'AFTER'
        or to_jsonb(new) - __machine_name = to_jsonb(old) - __machine_name
        or pg_trigger_depth() > 1 and exists (
          select from pg_catalog.pg_constraint k
            join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]
           where k.conrelid = tg_relid and k.contype = 'f' and k.confdeltype = 'n' and a.attname = __machine_name)))
  then
    v_error := arbiter._reject_or_record(__protection, __mode, 'wrong_identity',
      arbiter._detail('wrong_identity', v_user_id, null, null, '{"source": "cloud", "machine_id": null}'),
      'A cloud write names its machine.');
  end if;
  if v_error.sqlstate is not null then
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;
  return new;
end
$$;
comment on function arbiter._provenance_template() is 'Keeps who wrote the rows of a protected table, as a template.';

create or replace function arbiter.tg_stamp_xid()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.arbiter_xid := pg_current_xact_id();
  return new;
end
$$;
comment on function arbiter.tg_stamp_xid() is 'Sets arbiter_xid to the transaction that updates the row.';

-- Of a trigger whose condition is never true (_guard_triggers, 25_build.sql).
create or replace function arbiter.tg_no_parent()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  return null;
end
$$;
comment on function arbiter.tg_no_parent() is
  'Is never called: a trigger that names it keeps a protected table from being attached to another one.';

create or replace function arbiter._reject_or_record(
  p_protection_id integer,
  p_mode text,
  p_code text,
  p_detail jsonb,
  p_hint text default null)
returns arbiter.error
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_mode = 'observe' then
    perform arbiter._observe(p.protected_table, p_code, p_detail)
       from arbiter.protections p
      where p.protection_id = p_protection_id;
    return null;
  end if;
  return arbiter._rejected(p_code, p_detail, p_hint);
end
$$;
comment on function arbiter._reject_or_record(integer, text, text, jsonb, text) is
  'The error that rejects a write to a protected table. Where the table is observed, records the rejection and returns null.';

create or replace function arbiter._identity_flaw(
  p_user_id text,
  p_source text,
  p_machine_id text,
  p_flaw text,
  p_unowned text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  -- A query of its own: as a branch of the CASE it would be planned for each call, because the plan for arguments that
  -- need no query costs next to nothing, and so the server never settles on a plan for all.
  if p_source = 'cloud' and p_machine_id is not null and p_user_id is not null and p_flaw is null then
    -- By the text, too: a machine has one text, and the lease is for that.
    perform from arbiter.machines m
      where arbiter._is_machine(m.machine_id, p_machine_id)
        and m.machine_id::text collate "C" = p_machine_id
        and m.user_id::text collate "C" = p_user_id;
    return case when not found then 'The registry has no such machine of this user.' end;
  end if;
  return case
    when p_flaw = 'evidence' then 'arbiter_xid is not the transaction that writes the row: leave it to its default.'
    when p_flaw = 'parent' then 'The row does not lead to a user: the row that it names does not exist.'
    when p_flaw = 'users' then 'The row leads to different users: all ways of p_user_path must agree.'
    when p_source is null then 'source is null: write local, or cloud with a machine.'
    when p_source not in ('local', 'cloud') then 'source must be local or cloud.'
    when p_source = 'local' and p_machine_id is not null then 'A local write has no machine: leave it null, or write cloud.'
    when p_user_id is null and p_unowned = 'reject' then
      'The row has no user; a table with such rows is protected with p_unowned => ''allow''.'
    when p_user_id is null and arbiter._is_client_session() then
      'A browser cannot write a row without a user, nor can a machine''s token: write it as the backend.'
    when p_user_id is null and p_machine_id is not null then 'A row without a user cannot have a machine.'
    when p_user_id is null then null
    when octet_length(p_user_id) > 1000 then 'The id of the user is longer than 1,000 bytes.'
    when p_source = 'cloud' and p_machine_id is null then 'A cloud write names its machine.'
  end;
end
$$;
comment on function arbiter._identity_flaw(text, text, text, text, text) is
  'Why source, machine and user of a row do not fit together, as a hint; null when they do. p_flaw: what the guard has found, evidence (arbiter_xid is not this transaction), parent (the path is broken) or users (its ways lead to different users).';

-- A worker that beats and writes, and whose status was never set to running, must not read that it has to go on.
create or replace function arbiter._not_holder_hint(p_machine arbiter.machine)
returns text
language sql
set search_path = pg_catalog, pg_temp
begin atomic
  select case
    when p_machine.state <> 'running' then
      format('Stop trading: the status of this machine means %s. It can get the lease once its status means running and it sends heartbeats.',
        p_machine.state)
    when not arbiter._is_fresh(p_machine.heartbeat_at, s.heartbeat_timeout, clock_timestamp()) then
      format('Stop trading: this machine has sent no heartbeat in time%s. Send heartbeats, and write again once arbiter.status() names this machine.',
        ', or its registry says that it is not well, in column ' || quote_ident(r.health_column))
    end
    from arbiter.settings s
    left join arbiter.registry r on true;
end;
comment on function arbiter._not_holder_hint(arbiter.machine) is
  'What a machine lacks to hold the lease: the status, or a heartbeat. Null when it has both, so that another one holds.';

create or replace function arbiter._admit(
  p_protection_id integer,
  p_mode text,
  p_unowned text,
  p_user_id text,
  p_source text,
  p_machine_id text,
  p_flaw text)
returns arbiter.error
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_hint text;
  v_decision record;
  v_more jsonb := '{}';
begin
  v_hint := arbiter._identity_flaw(p_user_id, p_source, p_machine_id, p_flaw, p_unowned);
  if v_hint is not null then
    if p_user_id is null and coalesce(p_flaw, 'parent') = 'parent' then
      v_hint := coalesce(arbiter._changed_path_hint(p_protection_id), v_hint);
    end if;
    return arbiter._reject_or_record(p_protection_id, p_mode, 'wrong_identity',
      arbiter._detail('wrong_identity', p_user_id, null, null,
        jsonb_build_object('source', p_source, 'machine_id', p_machine_id)),
      v_hint);
  end if;
  if p_user_id is null then
    return null;
  end if;

  if p_mode = 'enforce' then
    v_decision := arbiter._decide(p_user_id, p_source, p_machine_id, true);
  else
    -- Observing must not fail a write, even where the server would because the lease is newer than the snapshot.
    begin
      v_decision := arbiter._decide(p_user_id, p_source, p_machine_id, false);
    exception
      when serialization_failure or lock_not_available then
        select row('handover_draining', null, null)::arbiter.verdict as verdict, null::arbiter.leases as lease
          into v_decision;
    end;
  end if;
  if (v_decision.verdict).code is not null then
    if (v_decision.verdict).code = 'handover_draining' then
      v_more := jsonb_build_object('blockers', arbiter._blockers(p_user_id));
      if v_more -> 'blockers' @> to_jsonb(pg_backend_pid()) then
        v_hint := 'This transaction itself keeps the lease from being handed over: commit it first.';
      elsif v_more -> 'blockers' = '[]' then
        v_hint := 'Try again; if it lasts, look into pg_prepared_xacts: no open session was found that locks the lease.';
      end if;
    elsif (v_decision.verdict).code = 'not_holder' then
      v_hint := arbiter._not_holder_hint(arbiter._machine(p_user_id, p_machine_id));
    elsif (v_decision.verdict).code = 'takeover_unconfirmed' and (v_decision.verdict).retry_at is not null then
      v_hint := 'Too early: ask the user at retry_at, then call arbiter.confirm_takeover().';
    end if;
    return arbiter._reject_or_record(p_protection_id, p_mode, (v_decision.verdict).code,
      arbiter._detail((v_decision.verdict).code, p_user_id, v_decision.lease, (v_decision.verdict).retry_at, v_more),
      v_hint);
  end if;
  return null;
end
$$;
comment on function arbiter._admit(integer, text, text, text, text, text, text) is
  'Admits a write to a protected table, with the lease locked to the end of the transaction, or returns the error that rejects it (WX001 to WX005, WX007). p_flaw as for _identity_flaw().';
