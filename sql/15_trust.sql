-- Whose code runs with the rights of arbiter's owner. A write of arbiter to a table of the app runs that table's
-- triggers as arbiter's owner, and any role with the privilege TRIGGER may create one. So before such a write the
-- functions that it would run must belong to roles that have those rights anyway. What these call is not looked at.

create or replace function arbiter._is_trusted(p_role oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select pg_has_role(p_role, c.relowner, 'usage') from pg_catalog.pg_class c where c.oid = 'arbiter.registry'::regclass;
end;
comment on function arbiter._is_trusted(oid) is 'Whether a role has the rights of arbiter''s owner: it is a member of it, or a superuser.';

-- A trigger with a condition depends on the condition's functions and operators, too; so do checks, generated columns
-- and indexes on expressions. An update runs them all.
create or replace function arbiter._foreign_code(p_table regclass)
returns table (object text, function_name regprocedure, owner name)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive family (id) as (
    select p_table::oid
    union
    select i.inhrelid from pg_catalog.pg_inherits i join family f on f.id = i.inhparent
  ),
  code (class_id, object_id) as (
    select 'pg_trigger'::regclass, t.oid from family f join pg_catalog.pg_trigger t on t.tgrelid = f.id
    union all
    select 'pg_constraint'::regclass, k.oid
      from family f
      join pg_catalog.pg_constraint k on k.conrelid = f.id and k.contype = 'c'
    union all
    select 'pg_constraint'::regclass, k.oid
      from family f
      join pg_catalog.pg_attribute a on a.attrelid = f.id
      join pg_catalog.pg_constraint k on k.contypid = a.atttypid
    union all
    select 'pg_attrdef'::regclass, d.oid from family f join pg_catalog.pg_attrdef d on d.adrelid = f.id
    union all
    select 'pg_class'::regclass, i.indexrelid from family f join pg_catalog.pg_index i on i.indrelid = f.id
    union all
    select 'pg_rewrite'::regclass, w.oid from family f join pg_catalog.pg_rewrite w on w.ev_class = f.id
  )
  select distinct pg_describe_object(c.class_id, c.object_id, 0), p.oid::regprocedure, pg_get_userbyid(p.proowner)
    from code c
    join pg_catalog.pg_depend d on d.classid = c.class_id and d.objid = c.object_id
    left join pg_catalog.pg_operator o on d.refclassid = 'pg_operator'::regclass and o.oid = d.refobjid
    join pg_catalog.pg_proc p
      on p.oid = case when d.refclassid = 'pg_proc'::regclass then d.refobjid else o.oprcode::oid end
   where not arbiter._is_trusted(p.proowner)
   order by 1;
end;
comment on function arbiter._foreign_code(regclass) is
  'What an update of the table, or of one that inherits from it, runs and a role owns that has not the rights of arbiter''s owner.';

create or replace function arbiter._may_create_triggers(p_table regclass)
returns setof name
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select r.rolname
    from pg_catalog.pg_roles r
   where has_table_privilege(r.oid, p_table, 'trigger')
     and not arbiter._is_trusted(r.oid)
   order by r.rolname;
end;
comment on function arbiter._may_create_triggers(regclass) is
  'The roles that may create triggers on the table and have not the rights of arbiter''s owner.';

create or replace function arbiter._need_trusted_code(p_table regclass)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_code record;
begin
  -- No trigger can be created from here to the write. The question comes after the lock, with a snapshot of its own.
  execute format('lock table %s in row exclusive mode', p_table);
  select c.* into v_code from arbiter._foreign_code(p_table) c limit 1;
  if found then
    perform arbiter._fail('object_not_in_prerequisite_state',
      format('%s would run function %s of %I with the rights of arbiter''s owner',
        v_code.object, v_code.function_name, v_code.owner),
      'The owner of the table must drop it, or make it call functions of its own; nothing was changed.');
  end if;
  -- Above read committed the snapshot may be older than a trigger that fires all the same. Privileges are those of now.
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
     and exists (select from arbiter._may_create_triggers(p_table))
  then
    perform arbiter._fail('feature_not_supported',
      format('above read committed it cannot be told which triggers there are on %s', p_table),
      'Call it at read committed; nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_trusted_code(regclass) is
  'Called before arbiter writes a table of the app. Error 55000 when that would run a function of a role that has not the rights of arbiter''s owner, 0A000 above read committed while such a role may create triggers.';
