-- Row security for the roles of clients (_client_roles, 11_identity.sql): who may claim which environment. The guard
-- decides who may write now; neither replaces the other. Restrictive policies hold in spite of the app's permissive
-- ones. Like every policy they bind neither a table's owner nor a role with BYPASSRLS.
--
-- A token with a claim machine_id belongs to that machine, any other token to a browser.
--
-- Where only inserts are arbitrated, an update claims nothing, because it cannot change who wrote the row: whether a
-- user may, for example, dismiss a machine's signal is up to the app's own policies.

create or replace function arbiter._policies()
returns table (table_name regclass, policy_name name, definition text, meaning text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_protection arbiter.protections;
  v_claimants text := arbiter._grantees('{visitor,user}');
  v_users text := arbiter._grantees('{user}');
begin
  if v_users is null then
    return;
  end if;

  for v_protection in
    select distinct on (p.protected_table) p.*
      from arbiter.protections p
     -- Without these columns the guard fails every write, until protect() is called again.
     where 2 = (
       select count(*) from pg_catalog.pg_attribute a
        where a.attrelid = p.protected_table and a.attname in ('source', p.machine_column) and not a.attisdropped)
     -- The newest, because a snapshot that is older than an unprotect shows two.
     order by p.protected_table, p.protection_id desc
  loop
    -- Each partition, because a row is checked by the policies of the table that the statement names.
    for table_name in select f.member from arbiter._family(v_protection.protected_table) as f (member) loop
      policy_name := 'arbiter_claim';
      definition := format(
        'on %4$s as restrictive for %2$s to %5$s %3$swith check ('
        'case when (select arbiter.claimed_machine_id()) is null then source = ''local'' and %1$I is null '
        'else source = ''cloud'' and %1$I::text collate "C" = (select arbiter.claimed_machine_id()) end)',
        v_protection.machine_column,
        case when 'update' = any (v_protection.verbs) then 'all' else 'insert' end,
        case when 'update' = any (v_protection.verbs) then 'using (true) ' end,
        table_name, v_claimants);
      meaning := 'Browsers write as local, a machine''s token as that machine.';
      return next;
    end loop;
  end loop;

  select r.* into v_registry from arbiter.registry r where r.singleton;
  if found then
    table_name := v_registry.registry;
    policy_name := 'arbiter_registry_insert';
    definition := format('on %s as restrictive for insert to %s with check (false)', table_name, v_claimants);
    meaning := 'Machines are added by the backend.';
    return next;
    policy_name := 'arbiter_registry_delete';
    definition := format('on %s as restrictive for delete to %s using (false)', table_name, v_claimants);
    meaning := 'Machines are deleted by the backend.';
    return next;
    policy_name := 'arbiter_registry_update';
    -- A browser passes `using`, so that it gets an error: rows that `using` hides are left out without one.
    definition := format(
      'on %4$s as restrictive for update to %3$s '
      'using ((select arbiter.claimed_machine_id()) is null or %1$I::text collate "C" = (select arbiter.claimed_machine_id())) '
      'with check (%1$I::text collate "C" = (select arbiter.claimed_machine_id()) '
      'and %2$I::text collate "C" = (select arbiter.claimed_user_id()))',
      v_registry.id_column, v_registry.user_column, v_claimants, table_name);
    meaning := 'A machine''s token changes that machine, and keeps its owner; browsers change none.';
    return next;
    -- Only where the app has no such policy of its own: two permissive policies are both checked for each row.
    if not exists (
      select from pg_catalog.pg_policy p
       where p.polrelid = v_registry.registry
         and p.polpermissive
         and p.polcmd in ('w', '*')
         and (p.polroles = '{0}' or exists (
           select from arbiter._client_roles() c
            where c.kind = 'user' and to_regrole(quote_ident(c.role)) = any (p.polroles)))
         and arbiter._ownership('policy', p.polrelid, p.polname) <> 'ours')
    then
      policy_name := 'arbiter_machine_update';
      definition := format(
        'on %4$s for update to %3$s using (%1$I::text collate "C" = (select arbiter.claimed_machine_id()) '
        'and %2$I::text collate "C" = (select arbiter.claimed_user_id()))',
        v_registry.id_column, v_registry.user_column, v_users, table_name);
      meaning := 'A machine''s token may send its heartbeat.';
      return next;
    end if;
  end if;

  policy_name := 'arbiter_own';
  meaning := 'Users read what is theirs.';
  foreach table_name in array array['arbiter.leases', 'arbiter.handovers']::regclass[] loop
    definition := format('on %s for select to %s using (user_id = (select arbiter.claimed_user_id()))', table_name, v_users);
    return next;
  end loop;
end
$$;
comment on function arbiter._policies() is
  'The policies that must be there; none without a role of clients. definition: what follows the name in CREATE POLICY.';

-- Hashes both what was asked for and what the server has, as for triggers.
create or replace function arbiter._policy_comment(p_policy_id oid, p_definition text, p_meaning text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('%s [%s]', p_meaning, md5(concat_ws('|', p_definition, p.polcmd, p.polpermissive, p.polroles,
           pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))))
    from pg_catalog.pg_policy p
   where p.oid = p_policy_id;
end;
comment on function arbiter._policy_comment(oid, text, text) is
  'The comment that a policy must have, with the hash of its definition.';

create or replace function arbiter._is_current_policy(p_table regclass, p_policy name, p_definition text, p_meaning text)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select f.object_id is not null
     and obj_description(f.object_id, 'pg_policy') is not distinct from arbiter._policy_comment(f.object_id, p_definition, p_meaning)
    from arbiter._find('policy', p_table, p_policy) f;
end;
comment on function arbiter._is_current_policy(regclass, name, text, text) is
  'Whether a table has this policy, made from this definition and not changed since.';

-- Above read committed the snapshot may be older than another session's change, so there all policies of p_table count
-- as wrong.
create or replace function arbiter._wrong_policies(p_table regclass)
returns table (table_name regclass, policy_name name, definition text, meaning text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(n.table_name, p.table_name), coalesce(n.policy_name, p.policy_name), n.definition, n.meaning
    from arbiter._policies() n
    full join (
      select a.attached_to as table_name, a.name::name as policy_name
        from arbiter.attachments a
       where a.kind = 'policy' and arbiter._ownership('policy', a.attached_to, a.name) = 'ours') p
      on p.table_name::oid = n.table_name::oid and p.policy_name = n.policy_name
   where (p_table is null or coalesce(n.table_name, p.table_name) in (select arbiter._family(p_table)))
     and (n.policy_name is null
       or p.policy_name is null
       or p_table is not null and not arbiter._sees_commits()
       or not arbiter._is_current_policy(n.table_name, n.policy_name, n.definition, n.meaning));
end;
comment on function arbiter._wrong_policies(regclass) is
  'Policies to be made anew, or dropped (definition null), on a table and its partitions or on all tables (null).';

-- Changing a policy waits for all users of its table, so only what differs is made again. The notices of `if exists`
-- are no news to the caller.
create or replace function arbiter._build_policies(p_table regclass default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
declare
  v_policy record;
begin
  for v_policy in
    select w.table_name, w.policy_name as name, w.definition, w.meaning
      from arbiter._wrong_policies(p_table) w
      join pg_catalog.pg_class c on c.oid = w.table_name
     -- A partition that was detached and given to another role keeps its policy.
     where w.definition is not null or pg_has_role(c.relowner, 'usage')
  loop
    perform arbiter._need_free_name('policy', v_policy.table_name, v_policy.name);
    execute format('drop policy if exists %I on %s', v_policy.name, v_policy.table_name);
    if v_policy.definition is null then
      perform arbiter._forget('policy', v_policy.table_name, v_policy.name);
    else
      execute format('create policy %I %s', v_policy.name, v_policy.definition);
      execute (
        select format('comment on policy %I on %s is %L', v_policy.name, v_policy.table_name,
                 arbiter._policy_comment(f.object_id, v_policy.definition, v_policy.meaning))
          from arbiter._find('policy', v_policy.table_name, v_policy.name) f);
      perform arbiter._record('policy', v_policy.table_name, v_policy.name);
    end if;
  end loop;
  for v_policy in
    select distinct n.table_name
      from arbiter._policies() n
      join pg_catalog.pg_class c on c.oid = n.table_name
     where c.relnamespace = 'arbiter'::regnamespace
       and not c.relrowsecurity
  loop
    execute format('alter table %s enable row level security', v_policy.table_name);
  end loop;
end
$$;
comment on function arbiter._build_policies(regclass) is
  'Makes the policies that must be there, on a table and its partitions or on all tables, and drops those of arbiter that must not.';
