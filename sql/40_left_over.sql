-- What an earlier version has left over: a function with other parameters, for example, which makes calls ambiguous.

-- An object that this version defines was given its comment in this transaction. So the row of that comment in
-- pg_description is not one of those that 00_basics.sql has noted at the start.
create or replace function arbiter._left_over()
returns table (kind text, object text, used_by text[])
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
    )
    select p.kind, p.object, array(select arbiter._used_by(array[p.object_id]))
      from present p
     where case p.kind
       -- An installation does not make views anew.
       when 'view' then p.object <> 'arbiter.machines' and not exists (
         select from arbiter.protections r where p.object ~ format('^arbiter\._path_%s_\d+$', r.protection_id))
       else not exists (
         select from pg_catalog.pg_description d
          where d.classoid = p.class_id and d.objoid = p.object_id and d.objsubid = 0 and d.ctid <> all (v_before)) end
     order by 1, 2;
end
$$;
comment on function arbiter._left_over() is
  'Functions, types and views of schema arbiter that this version does not define, and the objects outside the schema that use each. Error 55000 outside an installation.';

create or replace function arbiter._drop_left_over()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_uses text;
  v_kind text;
  v_objects text;
begin
  select string_agg(format('%s uses %s', u.name, o.object), ', ' order by u.name, o.object)
    into v_uses
    from arbiter._left_over() o
   cross join lateral unnest(o.used_by) as u (name);
  if v_uses is not null then
    perform arbiter._fail('dependent_objects_still_exist',
      format('the app uses what this version does not have any more: %s', v_uses),
      'Drop or change these objects, then install again; until then functions, guards and policies are those of before.');
  end if;
  if not exists (select from arbiter._left_over()) then
    return;
  end if;
  -- A write in progress runs the guard of before, which may call a function that is dropped here.
  perform arbiter._lock_tables(array(
    select p.protected_table from arbiter.protections p union all select r.registry from arbiter.registry r));
  -- A kind may use the later ones. Without cascade, so that nothing else goes with them.
  foreach v_kind in array '{view,routine,type}'::text[] loop
    select string_agg(o.object, ', ') into v_objects from arbiter._left_over() o where o.kind = v_kind;
    if v_objects is not null then
      execute format('drop %s %s', v_kind, v_objects);
    end if;
  end loop;
end
$$;
comment on function arbiter._drop_left_over() is
  'Drops what _left_over() lists. Error 2BP01, and nothing dropped, when an object of the app uses some of it.';
