-- Makes the schema, and asks whose it is before anything else: an install runs with the rights of its role, often a
-- superuser, and any role that may create schemas can have made this one, with functions and triggers of its own in it.

set local lock_timeout = '5s';

do $owner$
declare
  v_schema oid;
  v_owner name;
  v_object text;
  v_stranger name;
begin
  -- Not `if not exists`: that needs the right to create schemas even where a DBA has made this one. Made before the
  -- questions, so that no other role can make it after them; and closed, whichever default privileges the database has,
  -- so that no other role comes near the tables until the install has closed these, too.
  if to_regnamespace('arbiter') is null then
    create schema arbiter;
    for v_stranger in
      select case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end
        from pg_catalog.pg_namespace n
       cross join lateral aclexplode(n.nspacl) a
       where n.nspname = 'arbiter' and a.grantee <> n.nspowner
    loop
      execute format('revoke all on schema arbiter from %s', v_stranger);
    end loop;
  end if;
  v_schema := to_regnamespace('arbiter');

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
        from pg_catalog.pg_type t where t.typnamespace = v_schema
      union all
      select 2, format('operator arbiter.%s', p.oprname), p.oprowner
        from pg_catalog.pg_operator p where p.oprnamespace = v_schema
      union all
      select 2, format('operator class arbiter.%I', c.opcname), c.opcowner
        from pg_catalog.pg_opclass c where c.opcnamespace = v_schema
      union all
      select 2, format('operator family arbiter.%I', f.opfname), f.opfowner
        from pg_catalog.pg_opfamily f where f.opfnamespace = v_schema
      union all
      select 2, format('collation arbiter.%I', c.collname), c.collowner
        from pg_catalog.pg_collation c where c.collnamespace = v_schema
      union all
      select 2, format('conversion arbiter.%I', c.conname), c.conowner
        from pg_catalog.pg_conversion c where c.connamespace = v_schema
      union all
      select 2, format('text search configuration arbiter.%I', c.cfgname), c.cfgowner
        from pg_catalog.pg_ts_config c where c.cfgnamespace = v_schema
      union all
      select 2, format('text search dictionary arbiter.%I', d.dictname), d.dictowner
        from pg_catalog.pg_ts_dict d where d.dictnamespace = v_schema
      union all
      select 2, format('statistics arbiter.%I', s.stxname), s.stxowner
        from pg_catalog.pg_statistic_ext s where s.stxnamespace = v_schema) as o
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
