-- The slow path of a guard: the judgement on one user, source and machine of a statement, as the error that rejects it.

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
  -- A browser's own row, first, because the server sets up the whole of the last expression to answer a part of it.
  if p_source = 'local' and p_machine_id is null and p_flaw is null and octet_length(p_user_id) <= 1000 then
    return null;
  end if;
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
    when p_flaw = 'columns' then 'A column that the guard needs was renamed or dropped: the owner of the table calls arbiter.protect().'
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
  'Why source, machine and user of a row do not fit together, as a hint; null when they do. p_flaw: what the guard has found, columns (the table has other ones), evidence (arbiter_xid is not this transaction), parent (the path is broken) or users (its ways lead to different users).';

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
    if p_flaw = 'columns' or p_user_id is null and coalesce(p_flaw, 'parent') = 'parent' then
      v_hint := coalesce(arbiter._changed_table_hint(p_protection_id), v_hint);
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
