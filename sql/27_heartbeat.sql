-- heartbeat(), heartbeats(): what a machine calls for itself, or a backend for many.

-- Not definers: a role that may update the registry may send a heartbeat.
create or replace function arbiter.heartbeats(p_machine_ids text[])
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked_at timestamptz := clock_timestamp();
  -- Compared by the collation of the registry's column, not by that of the argument: only so an index can serve.
  v_ids text[] collate "default" := p_machine_ids;
  v_count bigint;
  v_unknown text;
  v_error arbiter.error;
begin
  if not exists (select from arbiter.registry) then
    perform arbiter._fail('object_not_in_prerequisite_state',
      'no registry of machines',
      'Call arbiter.register_machines() first.');
  end if;
  -- An update locks rows in the order of their places, in which a call that began earlier may see them elsewhere.
  if cardinality(p_machine_ids) > 1 then
    perform from arbiter.machines m
      where m.machine_id = any (arbiter._machine_keys(v_ids))
      order by m.machine_id
        for no key update;
  end if;
  update arbiter.machines set heartbeat_at = clock_timestamp() where machine_id = any (arbiter._machine_keys(v_ids));
  get diagnostics v_count = row_count;
  -- A null counts as an unknown machine.
  if p_machine_ids is null or v_count <> (
    select count(distinct k.id) + count(*) filter (where k.id is null) from unnest(arbiter._machine_keys(v_ids)) as k (id))
  then
    -- A machine that the caller may see but not update has no heartbeat of this call, either.
    select i.id
      into v_unknown
      from unnest(v_ids) with ordinality as i (id, position)
     where not exists (
       select from arbiter.machines m
        where m.machine_id = (arbiter._machine_keys(v_ids))[i.position] and m.heartbeat_at >= v_asked_at)
     order by i.position
     limit 1;
    v_error := arbiter._error('P0002', format('arbiter: no machine %s', coalesce(v_unknown, 'null')),
      'Check the id against the registry''s id column; no heartbeat of this call was written.',
      jsonb_build_object('code', 'unknown_machine', 'machine_id', v_unknown), 404);
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;
  return v_count;
end
$$;
comment on function arbiter.heartbeats(text[]) is
  'Heartbeats of many machines in one statement; returns how many. Error P0002 when one is unknown, or the caller may not see or update it; then none is written.';

create or replace function arbiter.heartbeat(p_machine_id text)
returns timestamptz
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids text[] collate "default" := array[p_machine_id];
begin
  perform arbiter.heartbeats(v_ids);
  return (select m.heartbeat_at from arbiter.machines m where m.machine_id = any (arbiter._machine_keys(v_ids)));
end
$$;
comment on function arbiter.heartbeat(text) is
  'Heartbeat of one machine; returns the instant that the database stamped. Error P0002 when it is unknown, or the caller may not see or update it.';

-- As status(uuid), 30_status.sql.
create or replace function arbiter.heartbeat(p_machine_uuid uuid)
returns timestamptz
language sql
return arbiter.heartbeat(p_machine_uuid::text);
comment on function arbiter.heartbeat(uuid) is 'The same for an id of type uuid.';
