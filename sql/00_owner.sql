-- Whose schema arbiter is. Asked before anything else, because an install runs with the rights of its role, often a
-- superuser, and any role that may create schemas can have made this one, with functions and triggers of its own in it.

set local lock_timeout = '5s';

do $owner$
declare
  v_schema oid := to_regnamespace('arbiter');
  v_owner name;
  v_object text;
  v_stranger name;
begin
  select o.object, pg_get_userbyid(o.owner)
    into v_object, v_stranger
    from (
      select 1 as rank, 'schema arbiter' as object, n.nspowner as owner
        from pg_catalog.pg_namespace n where n.oid = v_schema
      union all
      select 2, format('relation arbiter.%I', c.relname), c.relowner
        from pg_catalog.pg_class c where c.relnamespace = v_schema
      union all
      select 2, format('function arbiter.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)), p.proowner
        from pg_catalog.pg_proc p where p.pronamespace = v_schema
      union all
      select 2, format('type arbiter.%I', t.typname), t.typowner
        from pg_catalog.pg_type t where t.typnamespace = v_schema) as o
   where not pg_has_role(o.owner, current_user, 'usage')
   order by o.rank, o.object
   limit 1;
  if found then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('arbiter: %s belongs to %I, who has not the rights of %I', v_object, v_stranger, current_user),
      hint = format('If arbiter was installed as %I, connect as %1$I. If not, find out who made it, and drop it. Nothing was changed.', v_stranger);
  end if;

  select case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end
    into v_stranger
    from pg_catalog.pg_namespace n
   cross join lateral aclexplode(n.nspacl) a
   where n.oid = v_schema
     and a.privilege_type = 'CREATE'
     and (a.grantee = 0 or not pg_has_role(a.grantee, current_user, 'usage'))
   limit 1;
  if found then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('arbiter: %s may create objects in schema arbiter', v_stranger),
      hint = format('Run: revoke create on schema arbiter from %s. Nothing was changed.', v_stranger);
  end if;

  -- Another role's functions would be closed to the owner of those that call them.
  select pg_get_userbyid(c.relowner)
    into v_owner
    from pg_catalog.pg_class c
   where c.oid = to_regclass('arbiter.settings');
  if v_owner <> current_user then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('arbiter: in this database it belongs to %I, not to %I', v_owner, current_user),
      hint = format('Connect as %I; nothing was changed.', v_owner);
  end if;
end
$owner$;
