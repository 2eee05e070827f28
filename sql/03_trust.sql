-- Whom arbiter's owner trusts. It evaluates what the owners of the app's tables and types have written, so these must
-- have its rights anyway; otherwise any role that may create a table could make arbiter's owner run its functions.

-- The rule by which arbiter's owner may run what somebody has written: a trigger, a check, a type of a table.
create or replace function arbiter._is_trusted(p_role oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
return pg_has_role(p_role, current_user, 'usage');
comment on function arbiter._is_trusted(oid) is
  'Whether a role has the rights of the current role, which is arbiter''s owner, anyway.';

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
    join pg_catalog.pg_type t on t.oid = a.atttypid
   where a.attrelid = p_table and a.attname = p_column and not a.attisdropped;
  if not arbiter._is_trusted(v_type.owner) then
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

