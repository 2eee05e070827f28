-- Triggers as inspectable objects: a trigger's comment ends with a hash of its definition, so that
-- attaching twice changes nothing and takes no lock, and drift can be seen in the catalog.

create or replace function arbiter._trigger_comment(p_definition text, p_meaning text)
returns text
language sql
immutable
security invoker
return format('%s [%s]', p_meaning, md5(p_definition));
revoke execute on function arbiter._trigger_comment(text, text) from public;
comment on function arbiter._trigger_comment(text, text) is 'The comment of a trigger, with the hash of its definition.';

-- A row trigger of a partitioned table lives on in each partition, where it can be disabled alone.
create or replace function arbiter._is_disabled_below(p_table regclass, p_trigger name)
returns boolean
language sql
stable
security invoker
begin atomic
  with recursive family (trigger_id) as (
    select t.oid from pg_catalog.pg_trigger t where t.tgrelid = p_table and t.tgname = p_trigger
    union all
    select t.oid from pg_catalog.pg_trigger t join family f on t.tgparentid = f.trigger_id
  )
  select exists (
    select from family f join pg_catalog.pg_trigger t on t.oid = f.trigger_id where t.tgenabled <> 'A');
end;
revoke execute on function arbiter._is_disabled_below(regclass, name) from public;
comment on function arbiter._is_disabled_below(regclass, name) is
  'Whether a trigger, or its like in a partition, does not fire always.';

create or replace function arbiter._attach(
  p_table regclass,
  p_trigger name,
  p_definition text,
  p_meaning text)
returns void
language plpgsql
volatile
security invoker
as $$
declare
  v_comment text := arbiter._trigger_comment(p_definition, p_meaning);
begin
  if exists (
    select from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname = p_trigger
       and t.tgenabled = 'A'
       and obj_description(t.oid, 'pg_trigger') = v_comment)
     and not arbiter._is_disabled_below(p_table, p_trigger)
  then
    return;
  end if;
  execute format('create or replace trigger %I ', p_trigger) || replace(p_definition, '{table}', p_table::text);
  -- Always: else session_replication_role = replica walks past it.
  execute format('alter table %s enable always trigger %I', p_table, p_trigger);
  execute format('comment on trigger %I on %s is %L', p_trigger, p_table, v_comment);
end
$$;
revoke execute on function arbiter._attach(regclass, name, text, text) from public;
comment on function arbiter._attach(regclass, name, text, text) is
  'Creates or mends a trigger of arbiter, enabled always. p_definition has {table} in the place of the table.';

create or replace function arbiter._detach(p_table regclass, p_keep name[] default '{}')
returns void
language plpgsql
volatile
security invoker
as $$
declare
  v_trigger name;
begin
  for v_trigger in
    select t.tgname
      from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname like 'arbiter\_%'
       and t.tgparentid = 0
       and t.tgname <> all (p_keep)
  loop
    execute format('drop trigger %I on %s', v_trigger, p_table);
  end loop;
end
$$;
revoke execute on function arbiter._detach(regclass, name[]) from public;
comment on function arbiter._detach(regclass, name[]) is
  'Drops the triggers of arbiter from a table, but for those to keep.';

-- Functions that are generated carry a hash of themselves in the same way.
create or replace function arbiter._seal(p_function regprocedure, p_meaning text)
returns void
language plpgsql
volatile
security invoker
as $$
begin
  execute format('revoke execute on function %s from public', p_function);
  execute format('comment on function %s is %L', p_function,
    format('%s [%s]', p_meaning, md5(pg_get_functiondef(p_function))));
end
$$;
revoke execute on function arbiter._seal(regprocedure, text) from public;
comment on function arbiter._seal(regprocedure, text) is
  'Documents a generated function, with the hash of its definition, and takes it from public.';

create or replace function arbiter._history_triggers()
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language sql
stable
security invoker
begin atomic
  values
    ('arbiter.handovers'::regclass, 'arbiter_append_only'::name,
      'before update or delete on {table} for each row execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.'),
    ('arbiter.handovers', 'arbiter_append_only_truncate',
      'before truncate on {table} for each statement execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.');
end;
revoke execute on function arbiter._history_triggers() from public;
comment on function arbiter._history_triggers() is
  'The triggers that the history must have. definition has {table} in the place of the table.';

do $history$
begin
  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._history_triggers() t;
end
$history$;
