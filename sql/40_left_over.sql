-- An upgrade: which locks it needs, and what an earlier version has left over, for example a function with other
-- parameters, which makes calls ambiguous. 99_adopt.sql calls these first.

-- An object that this version defines was given its comment in this transaction. So the row of that comment in
-- pg_description is not one of those that 01_basics.sql has noted at the start. 99_adopt.sql generates functions and
-- views anew only later, so these are left out, as is what belongs to an extension or to a type.
create or replace function arbiter._left_over()
returns table (kind text, object text, object_id oid)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_before tid[] := string_to_array(current_setting('arbiter.documented_before', true), ' ');
begin
  if coalesce(cardinality(v_before), 0) = 0 then
    perform arbiter._fail('object_not_in_prerequisite_state',
      'nothing was noted at the start of this installation',
      'Run all files of sql/ in order and in one transaction.');
  end if;
  return query
    with present as (
      select 'pg_proc'::regclass as class_id, p.oid as object_id, 'routine' as kind, p.oid::regprocedure::text as object
        from pg_catalog.pg_proc p
       where p.pronamespace = 'arbiter'::regnamespace
         and p.proname !~ '^(tg_registry_(limit|stamp|note|activate)|_(guard|guard_row|provenance)_[0-9]+)$'
      union all
      select 'pg_type', t.oid, 'type', t.oid::regtype::text
        from pg_catalog.pg_type t
        left join pg_catalog.pg_class c on c.oid = t.typrelid
       where t.typnamespace = 'arbiter'::regnamespace
         and t.typtype in ('c', 'd', 'e', 'r')
         and coalesce(c.relkind, 'c') = 'c'
      union all
      select 'pg_class', c.oid, 'view', c.oid::regclass::text
        from pg_catalog.pg_class c
       where c.relnamespace = 'arbiter'::regnamespace
         and c.relkind = 'v'
         and c.relname !~ '^(machines|_path_[0-9]+_[0-9]+)$'
    )
    select p.kind, p.object, p.object_id
      from present p
     where not exists (
       select from pg_catalog.pg_depend d
        where d.classid = p.class_id and d.objid = p.object_id and d.deptype in ('e', 'i'))
       and not exists (
         select from pg_catalog.pg_description d
          where d.classoid = p.class_id and d.objoid = p.object_id and d.objsubid = 0 and d.ctid <> all (v_before));
end
$$;
comment on function arbiter._left_over() is
  'Functions, types and views of schema arbiter that this version does not define. Error 55000 outside an installation.';

create or replace function arbiter._left_over_triggers()
returns table (table_name regclass, trigger_name name)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgrelid::regclass, t.tgname
    from arbiter._left_over() o
    join pg_catalog.pg_trigger t on t.tgfoid = o.object_id
   where o.kind = 'routine'
     and t.tgparentid = 0;
end;
comment on function arbiter._left_over_triggers() is
  'Triggers of arbiter that call a function which this version does not define.';

-- One lock for all that follows: when a stronger one comes later, a client that reads and then writes is a deadlock's
-- victim. Readers have to wait only where a policy changes or a trigger goes. Writers also have to where a function is
-- dropped, because a write in progress runs the guard of before, which may call it.
create or replace function arbiter._lock_for_upgrade()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_tables regclass[] := array(
    select c.oid::regclass
      from pg_catalog.pg_class c
     where c.oid in (
       select p.protected_table from arbiter.protections p union all select r.registry from arbiter.registry r));
begin
  if exists (select from arbiter._left_over_triggers()) or exists (
    select from arbiter._wrong_policies(null) w
      join pg_catalog.pg_class c on c.oid = w.table_name
     where c.relnamespace <> 'arbiter'::regnamespace)
  then
    perform arbiter._lock_tables(v_tables, 'access exclusive');
  elsif exists (select from arbiter._left_over()) or exists (
    select from (
      select t.* from arbiter._registry_triggers() t
      union all
      select t.* from arbiter.protections p cross join lateral arbiter._guard_triggers(p) t) as t
     where not arbiter._is_attached(t.table_name, t.trigger_name, t.definition, t.meaning))
  then
    perform arbiter._lock_tables(v_tables, 'share row exclusive');
  end if;
end
$$;
comment on function arbiter._lock_for_upgrade() is
  'Locks the registry and the protected tables as strongly as this installation will need it; not at all when nothing changes. Error 55P03 when that takes more than 5 s.';

create or replace function arbiter._drop_left_over()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_trigger record;
  v_kind text;
  v_objects text;
  v_uses text;
begin
  for v_trigger in select t.table_name, t.trigger_name from arbiter._left_over_triggers() t loop
    execute format('drop trigger %I on %s', v_trigger.trigger_name, v_trigger.table_name);
    perform arbiter._forget('trigger', v_trigger.table_name, v_trigger.trigger_name);
  end loop;
  -- A kind may use the later ones. Without cascade, so that nothing else goes with them.
  foreach v_kind in array '{view,routine,type}'::text[] loop
    select string_agg(o.object, ', ' order by o.object) into v_objects from arbiter._left_over() o where o.kind = v_kind;
    continue when v_objects is null;
    begin
      execute format('drop %s %s', v_kind, v_objects);
    exception
      when dependent_objects_still_exist then
        get stacked diagnostics v_uses = pg_exception_detail;
        perform arbiter._fail('dependent_objects_still_exist',
          format('something uses what this version does not have any more: %s', replace(v_uses, chr(10), ', ')),
          'Drop or change what uses it, then install again; until then functions, guards and policies are those of before.');
    end;
    raise notice 'arbiter: dropped % %', v_kind, v_objects;
  end loop;
end
$$;
comment on function arbiter._drop_left_over() is
  'Drops what _left_over() lists, with a notice of it. Error 2BP01, and nothing dropped, when something else uses some of it.';
