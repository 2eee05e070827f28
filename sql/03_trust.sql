-- Whom arbiter's owner trusts. It evaluates what the owners of the app's tables and types have written, and a write of
-- arbiter to a table of the app runs that table's triggers, which any role with the privilege TRIGGER may create. So
-- who has written these must have the rights of arbiter's owner anyway. What a function calls is not looked at.

create or replace function arbiter._is_trusted(p_role oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- Before the first migration the owner is the role that installs.
  select pg_has_role(p_role, coalesce(c.relowner, r.oid), 'usage')
    from pg_catalog.pg_roles r
    left join pg_catalog.pg_class c on c.oid = to_regclass('arbiter.registry')
   where r.rolname = current_user;
end;
comment on function arbiter._is_trusted(oid) is
  'Whether a role has the rights of arbiter''s owner anyway: it is the owner, a member of it, or a superuser.';

-- Asked first, so that nothing is half done. Only an owner may attach triggers and policies. The other way round, the
-- owner of a table writes its triggers and checks, and arbiter's owner runs them.
create or replace function arbiter._need_owner(p_table regclass)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner oid := (select c.relowner from pg_catalog.pg_class c where c.oid = p_table);
begin
  if v_owner is null then
    perform arbiter._fail('undefined_table',
      format('there is no table with the number %s', p_table::oid),
      'Name the table in the call; nothing was changed.');
  elsif not pg_has_role(v_owner, 'usage') then
    perform arbiter._fail('insufficient_privilege',
      format('table %s belongs to %I, not to %I', p_table, pg_get_userbyid(v_owner), current_user),
      format('Connect as %I; nothing was changed.', pg_get_userbyid(v_owner)));
  end if;
  perform arbiter._need_trusted_owner(p_table);
end
$$;
comment on function arbiter._need_owner(regclass) is
  'Error 42P01 when there is no such table, 42501 when the current role does not own it, or its owner has not the rights of the current role.';

create or replace function arbiter._need_trusted_owner(p_table regclass)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner oid := (select c.relowner from pg_catalog.pg_class c where c.oid = p_table);
begin
  if not arbiter._is_trusted(v_owner) then
    perform arbiter._fail('insufficient_privilege',
      format('table %s belongs to %I, who has not the rights of %I, arbiter''s owner',
        p_table, pg_get_userbyid(v_owner), current_user),
      format('What %I writes into its triggers and checks could run as %I. Give the table to %I, or install arbiter as %I; nothing was changed.',
        pg_get_userbyid(v_owner), current_user, current_user, pg_get_userbyid(v_owner)));
  end if;
end
$$;
comment on function arbiter._need_trusted_owner(regclass) is
  'Error 42501 when the owner of a table has not the rights of the current role, which is arbiter''s owner.';

create or replace function arbiter._inner_types(p_type oid)
returns setof oid
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive inner_types (id) as (
    select p_type
    union
    select u.id
      from inner_types i
      join pg_catalog.pg_type t on t.oid = i.id
     cross join lateral (
       select t.typbasetype
       union all
       select t.typelem
       union all
       select a.atttypid from pg_catalog.pg_attribute a where a.attrelid = t.typrelid and a.attnum > 0) as u (id)
     where u.id <> 0
  )
  select i.id from inner_types i;
end;
comment on function arbiter._inner_types(oid) is
  'A type with those that it is made of: of a domain its base, of an array its elements, of a row its columns.';

-- The casts and operators of a type are functions that its owner has written.
create or replace function arbiter._need_trusted_type(p_table regclass, p_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_type record;
begin
  select t.oid::regtype as name, t.typowner as owner
    into v_type
    from pg_catalog.pg_attribute a
   cross join lateral arbiter._inner_types(a.atttypid) as i (id)
    join pg_catalog.pg_type t on t.oid = i.id
   where a.attrelid = p_table
     and a.attname = p_column
     and not a.attisdropped
     and not arbiter._is_trusted(t.typowner)
   limit 1;
  if found then
    perform arbiter._fail('insufficient_privilege',
      format('column %I of table %s has the type %s of %I, who has not the rights of %I, arbiter''s owner',
        p_column, p_table, v_type.name, pg_get_userbyid(v_type.owner), current_user),
      format('Run as %I: alter type %s owner to %I; nothing was changed.',
        pg_get_userbyid(v_type.owner), v_type.name, current_user));
  end if;
end
$$;
comment on function arbiter._need_trusted_type(regclass, name) is
  'Error 42501 when the type of a column belongs to a role that has not the rights of the current role.';

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
     cross join lateral arbiter._inner_types(a.atttypid) as t (id)
      join pg_catalog.pg_constraint k on k.contypid = t.id
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

create or replace function arbiter._app_triggers(p_table regclass)
returns setof pg_catalog.pg_trigger
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive family (id) as (
    select p_table::oid
    union
    select i.inhrelid from pg_catalog.pg_inherits i join family f on f.id = i.inhparent
  )
  select t.*
    from family f
    join pg_catalog.pg_trigger t on t.tgrelid = f.id
    join pg_catalog.pg_proc p on p.oid = t.tgfoid and p.pronamespace <> 'arbiter'::regnamespace
   order by t.tgrelid, t.tgname;
end;
comment on function arbiter._app_triggers(regclass) is
  'The triggers of the table and of those that inherit from it that are not arbiter''s.';

-- A condition may call a function of the server that runs SQL from a string, or check a domain behind a cast, and
-- nothing tells who has created a trigger. So a condition may only compare columns and constants.
create or replace function arbiter._opaque_triggers(p_table regclass)
returns setof pg_catalog.pg_trigger
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.*
    from arbiter._app_triggers(p_table) t
   where exists (
     select from regexp_matches(t.tgqual::text, '[{]([A-Z_]+)', 'g') as n (name)
      where n.name[1] not in ('VAR', 'CONST', 'OPEXPR', 'DISTINCTEXPR', 'BOOLEXPR', 'NULLTEST', 'BOOLEANTEST',
        'RELABELTYPE', 'SCALARARRAYOPEXPR', 'ARRAYEXPR'));
end;
comment on function arbiter._opaque_triggers(regclass) is
  'Triggers of the app whose condition does more than compare columns and constants.';

-- A function without a search_path of its own looks names up by that of its caller, here pg_catalog and then the
-- temporary objects of the session.
create or replace function arbiter._misled_triggers(p_table regclass)
returns setof pg_catalog.pg_trigger
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.*
    from arbiter._app_triggers(p_table) t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
    join pg_catalog.pg_language l on l.oid = p.prolang and l.lanname not in ('c', 'internal')
   where not exists (select from unnest(p.proconfig) as s (setting) where starts_with(s.setting, 'search_path='))
     and (exists (select from pg_catalog.pg_class c where c.relnamespace = pg_my_temp_schema())
       or exists (select from pg_catalog.pg_type y where y.typnamespace = pg_my_temp_schema()));
end;
comment on function arbiter._misled_triggers(regclass) is
  'Triggers of the app that could take a temporary object of this session for one of the app.';

create or replace function arbiter._may_create_triggers(p_table regclass)
returns setof name
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select r.rolname
    from pg_catalog.pg_roles r
   where has_table_privilege(r.oid, p_table, 'trigger')
     and not arbiter._is_trusted(r.oid);
end;
comment on function arbiter._may_create_triggers(regclass) is
  'The roles that may create triggers on the table and have not the rights of arbiter''s owner.';

create or replace function arbiter._revoke_trigger_statement(p_table regclass)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('revoke trigger on %s from %s', p_table,
           string_agg(distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end, ', '))
    from pg_catalog.pg_class c
   cross join lateral aclexplode(c.relacl) a
   where c.oid = p_table
     and a.privilege_type = 'TRIGGER'
     and not arbiter._is_trusted(a.grantee);
end;
comment on function arbiter._revoke_trigger_statement(regclass) is
  'The statement that takes TRIGGER on the table from roles that have not the rights of arbiter''s owner.';

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
  select t.tgname as name, t.tgrelid::regclass as on_table into v_code from arbiter._opaque_triggers(p_table) t limit 1;
  if found then
    perform arbiter._fail('object_not_in_prerequisite_state',
      format('the condition of trigger %I on %s does more than compare columns', v_code.name, v_code.on_table),
      'It would run with the rights of arbiter''s owner. Move it into the function of the trigger; nothing was changed.');
  end if;
  select t.tgname as name, t.tgrelid::regclass as on_table into v_code from arbiter._misled_triggers(p_table) t limit 1;
  if found then
    perform arbiter._fail('object_not_in_prerequisite_state',
      format('trigger %I on %s could take temporary objects of this session for those of the app', v_code.name, v_code.on_table),
      'Give its function a search_path of its own, or call this from a session without temporary objects; nothing was changed.');
  end if;
  -- Above read committed the snapshot may be older than a trigger that fires all the same. Privileges are those of now.
  if not arbiter._sees_commits()
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
