-- The guard of a protected table: what its generated triggers (_build_guard, 60_protect.sql) call for each
-- distinct (user, environment, machine) of a statement that is not the common case. What is asked of the
-- table (mode, unowned) comes with the call, from the generated code: that is always the newest, while a row
-- of arbiter.protections is read by the snapshot of the transaction, which may be older.

-- enforce raises; observe records what enforce would have raised, and lets the write pass.
create or replace function arbiter._refuse(
  p_protection_id integer,
  p_mode text,
  p_code text,
  p_detail jsonb,
  p_hint text default null)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_mode = 'observe' then
    insert into arbiter.observations (observed_at, protected_table, code, detail, xid)
    select clock_timestamp(), p.protected_table, p_code, p_detail, pg_current_xact_id()
      from arbiter.protections p
     where p.protection_id = p_protection_id;
  else
    perform arbiter._raise(p_code, p_detail, p_hint);
  end if;
end
$$;
revoke execute on function arbiter._refuse(integer, text, text, jsonb, text) from public;
comment on function arbiter._refuse(integer, text, text, jsonb, text) is
  'Rejects a write to a protected table, or records the rejection where the table is observed.';

-- What is wrong with the claim of a row, whoever holds the lease; null when nothing is. p_flaw is
-- what the guard itself found: 'evidence' (arbiter_xid is not this transaction) or 'parent' (the row's
-- path to a user leads nowhere).
create or replace function arbiter._identity_flaw(
  p_user_id uuid,
  p_source text,
  p_machine_id uuid,
  p_flaw text,
  p_unowned text)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  return case
    when p_flaw = 'evidence' then 'arbiter_xid is not the transaction that writes the row: leave it to its default.'
    when p_flaw = 'parent' then 'The row does not lead to a user: the row that it names does not exist.'
    when p_source is null then 'source is null: write local, or cloud with a machine.'
    when p_source not in ('local', 'cloud') then 'source must be local or cloud.'
    when p_source = 'local' and p_machine_id is not null then 'A local write has no machine: leave it null, or write cloud.'
    when p_user_id is null and p_unowned = 'reject' then
      'The row has no user; a table with such rows is protected with p_unowned => ''allow''.'
    when p_user_id is null and p_machine_id is not null then 'A row without a user cannot have a machine.'
    when p_user_id is null then null
    when p_source = 'cloud' and p_machine_id is null then 'A cloud write names its machine.'
    when p_source = 'cloud' and not exists (
      select from arbiter.machines m where m.machine_id = p_machine_id and m.user_id = p_user_id)
    then 'The registry has no such machine of this user.'
  end;
end
$$;
revoke execute on function arbiter._identity_flaw(uuid, text, uuid, text, text) from public;
comment on function arbiter._identity_flaw(uuid, text, uuid, text, text) is
  'Why a row''s source, machine and user do not fit together, as a hint; null when they do.';

create or replace function arbiter._admit(
  p_protection_id integer,
  p_mode text,
  p_unowned text,
  p_user_id uuid,
  p_source text,
  p_machine_id uuid,
  p_flaw text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_hint text;
  v_decision record;
  v_more jsonb := '{}';
begin
  v_hint := arbiter._identity_flaw(p_user_id, p_source, p_machine_id, p_flaw, p_unowned);
  if v_hint is not null then
    perform arbiter._refuse(p_protection_id, p_mode, 'wrong_identity',
      arbiter._detail('wrong_identity', p_user_id, null, null,
        jsonb_build_object('source', p_source, 'machine_id', p_machine_id)),
      v_hint);
    return;
  end if;
  if p_user_id is null then
    return;
  end if;

  if p_mode = 'enforce' then
    v_decision := arbiter._decide(p_user_id, p_source, p_machine_id, true);
  else
    -- Observing must not fail a write: not even as the server does when the lease has changed since an
    -- old snapshot.
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
    elsif (v_decision.verdict).code = 'takeover_unconfirmed' and (v_decision.verdict).retry_at is not null then
      v_hint := 'Too early: ask the user at retry_at, then call arbiter.confirm_takeover().';
    end if;
    perform arbiter._refuse(p_protection_id, p_mode, (v_decision.verdict).code,
      arbiter._detail((v_decision.verdict).code, p_user_id, v_decision.lease, (v_decision.verdict).retry_at, v_more),
      v_hint);
  end if;
end
$$;
revoke execute on function arbiter._admit(integer, text, text, uuid, text, uuid, text) from public;
comment on function arbiter._admit(integer, text, text, uuid, text, uuid, text) is
  'Admits a write to a protected table, with the lease locked to the end of the transaction, or refuses it (WX001 to WX005, WX007).';
