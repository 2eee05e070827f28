-- Triggers as inspectable objects: a trigger's comment ends with a hash of its definition, so that
-- attaching twice changes nothing and takes no lock, and drift can be seen in the catalog.

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
  v_comment text := format('%s [%s]', p_meaning, md5(p_definition));
begin
  if exists (
    select from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname = p_trigger
       and t.tgenabled = 'A'
       and obj_description(t.oid, 'pg_trigger') = v_comment)
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

select arbiter._attach('arbiter.handovers', 'arbiter_append_only',
  'before update or delete on {table} for each row execute function arbiter.tg_append_only()',
  'The history of handovers is append-only.');
select arbiter._attach('arbiter.handovers', 'arbiter_append_only_truncate',
  'before truncate on {table} for each statement execute function arbiter.tg_append_only()',
  'The history of handovers is append-only.');
