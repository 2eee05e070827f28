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
  v_is_judged boolean;
  v_count bigint;
  v_unknown text;
  v_error arbiter.error;
begin
  select r.health_column is not null into v_is_judged from arbiter.registry r;
  if not found then
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
    -- A machine that the caller may see but not update is an unknown one, too, so only an update can tell.
    with found as (
      update arbiter.machines m
         set heartbeat_at = clock_timestamp()
       where m.machine_id = any (arbiter._machine_keys(v_ids))
      returning m.machine_id
    )
    select i.id
      into v_unknown
      from unnest(v_ids) with ordinality as i (id, position)
     where not exists (select from found f where f.machine_id = (arbiter._machine_keys(v_ids))[i.position])
     order by i.position
     limit 1;
    v_error := arbiter._error('P0002', format('arbiter: no machine %s', coalesce(v_unknown, 'null')),
      'Check the id against the registry''s id column; no heartbeat of this call was written.',
      jsonb_build_object('code', 'unknown_machine', 'machine_id', v_unknown), 404);
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;
  -- A heartbeat that does not count leaves the stamp that was there (_beat_expression, 23_registry.sql).
  if v_is_judged then
    select count(*)
      into v_count
      from arbiter.machines m
     where m.machine_id = any (arbiter._machine_keys(v_ids)) and m.heartbeat_at >= v_asked_at;
  end if;
  return v_count;
end
$$;
comment on function arbiter.heartbeats(text[]) is
  'Heartbeats of many machines in one statement; returns how many count: those of machines that the registry calls unhealthy do not. Error P0002 when one is unknown, or the caller may not see or update it; then none is written.';

create or replace function arbiter.heartbeat(p_machine_id text)
returns timestamptz
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids text[] collate "default" := array[p_machine_id];
  v_error arbiter.error;
begin
  -- An error, so that a machine that stops trading after failed heartbeats does so before the browser may take over.
  if arbiter.heartbeats(v_ids) = 0 then
    v_error := (
      select arbiter._error('55000', format('arbiter: the heartbeat of machine %s does not count', p_machine_id),
               format('Column %I of %s says that the machine is not well. Words for well: %s.',
                 r.health_column, r.registry, array_to_string(r.healthy, ', ')),
               jsonb_build_object('code', 'machine_unhealthy', 'machine_id', p_machine_id), 409)
        from arbiter.registry r);
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;
  return (select m.heartbeat_at from arbiter.machines m where m.machine_id = any (arbiter._machine_keys(v_ids)));
end
$$;
comment on function arbiter.heartbeat(text) is
  'Heartbeat of one machine; returns the instant that the database stamped. Error P0002 when it is unknown, or the caller may not see or update it; 55000 when the registry says that the machine is not well.';

-- As status(uuid), 30_status.sql.
create or replace function arbiter.heartbeat(p_machine_uuid uuid)
returns timestamptz
language sql
return arbiter.heartbeat(p_machine_uuid::text);
comment on function arbiter.heartbeat(uuid) is 'The same for an id of type uuid.';
