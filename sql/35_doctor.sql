-- doctor(): compares what is attached with what should be, and names the statement that mends each difference.

create or replace function arbiter.doctor()
returns table (object text, state text, problem text, remedy text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_protection arbiter.protections;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if not found then
    return query values ('registry', 'missing', 'No table of machines is registered: nothing can be cloud.',
      'select arbiter.register_machines(''public.cloud_machines'')');
  elsif not exists (select from pg_catalog.pg_class c where c.oid = v_registry.registry) then
    return query values ('registry', 'missing', 'The registered table of machines does not exist any more: writes of machines fail.',
      'select arbiter.register_machines(''<the new table>'')');
  else
    object := format('registry %s', v_registry.registry);
    begin
      perform arbiter._need_registry(v_registry.registry, v_registry.id_column, v_registry.user_column,
        v_registry.status_column, v_registry.heartbeat_column);
      perform arbiter._need_column(v_registry.registry, v_registry.heartbeat_column, 'heartbeat');
      perform arbiter._need_health_column(v_registry.registry, v_registry.health_column, v_registry.status_column,
        v_registry.heartbeat_column);
      state := 'ok';
      problem := null;
      remedy := null;
    exception
      when others then
        state := 'outdated';
        problem := sqlerrm;
        remedy := 'Call arbiter.register_machines() with the names that the table has now.';
    end;
    return next;
    return query
      select 'view arbiter.machines', 'outdated', 'Its query is not the one that arbiter generated.', 'Run: arbiter-db install'
       where state = 'ok'
         and not arbiter._is_current_view('machines', arbiter._machines_query(v_registry), v_registry.registry);
    return query
      select c.* from arbiter._registry_triggers() t
       cross join lateral arbiter._check_trigger(t.table_name, t.trigger_name, t.definition, t.meaning,
         arbiter._register_statement(v_registry)) c;
    return query
      select format('index %s', i.indexrelid::regclass), 'foreign',
             format('While it reads %I no heartbeat is a HOT update.', v_registry.heartbeat_column),
             format('drop index concurrently %s', i.indexrelid::regclass)
        from arbiter._heartbeat_indexes(v_registry.registry, v_registry.heartbeat_column) as i (indexrelid);
  end if;

  return query
    select format('row security of %s', h.table_name), 'outdated',
           'Its policies bind arbiter''s owner: every write that has to read this table fails.',
           case when h.is_forced then format('alter table %s no force row level security', h.table_name)
                else format('alter table %s owner to %I', h.table_name, pg_get_userbyid(a.relowner)) end
      from arbiter._hidden_tables(v_registry.registry) h, pg_catalog.pg_class a
     where a.oid = 'arbiter.registry'::regclass;
  return query select l.* from arbiter._lost_protections() l;
  return query
    select format('trigger %I on %s', o.trigger_name, o.table_name), 'outdated',
           format('The table is not part of %s any more, and is guarded in part only.', o.protected_table),
           format('drop trigger %I on %s', o.trigger_name, o.table_name)
      from arbiter._left_on_others() o;
  return query
    select format('table %s', t.table_name), 'foreign',
           'It is guarded, but not in arbiter.protections, for example by a copy of the schema: the audit does not know it.',
           format('Drop its policies whose names begin with arbiter_, then: select arbiter.protect(%L)', t.table_name)
      from arbiter._unknown_guards() t;
  for v_protection in
    select p.* from arbiter.protections p join pg_catalog.pg_class c on c.oid = p.protected_table order by p.protection_id
  loop
    object := format('protection of %s', v_protection.protected_table);
    remedy := arbiter._protect_statement(v_protection);
    begin
      perform arbiter._need_protectable(v_protection.protected_table, v_protection.user_path, v_protection.machine_column);
      perform arbiter._need_provenance(v_protection.protected_table, v_protection.user_path, v_protection.machine_column,
        v_protection.evidence);
      perform arbiter._need_ids_of_registry(v_protection.protected_table, v_protection.user_path,
        v_protection.machine_column, v_registry.registry, v_registry.id_column, v_registry.user_column);
      if exists (
        select from arbiter._path_views(v_protection) w
         where not arbiter._is_current_view(w.view_name, w.query, w.parent))
      then
        state := 'outdated';
        problem := 'The path from a row to its user leads elsewhere now.';
      elsif not exists (
        select from pg_catalog.pg_proc p
         where p.pronamespace = 'arbiter'::regnamespace
           and p.proname = '_guard_' || v_protection.protection_id)
      then
        state := 'missing';
        problem := 'The function of its guard is gone: every write fails.';
      elsif to_regclass('arbiter.machines') is not null and not arbiter._is_current_guard(v_protection) then
        state := 'outdated';
        problem := 'Its guard is not the one that protect() would make now: columns have other types, or arbiter.protections was changed past it.';
      else
        state := 'ok';
        problem := null;
        remedy := null;
      end if;
    exception
      when others then
        state := 'outdated';
        problem := sqlerrm;
        remedy := arbiter._columns_remedy(v_protection);
    end;
    return next;
    return query
      select format('parent %s of %s', o.parent, v_protection.protected_table), 'outdated',
             'Updates over it are not arbitrated.',
             format('Protect %s in the place of %s, or detach it.', o.parent, v_protection.protected_table)
        from (select arbiter._outer_parent(v_protection.protected_table) as parent) o
       where o.parent is not null and 'update' = any (v_protection.verbs);
    return query
      select c.* from arbiter._guard_triggers(v_protection) t
       cross join lateral arbiter._check_trigger(t.table_name, t.trigger_name, t.definition, t.meaning,
         arbiter._protect_statement(v_protection)) c;
    if v_protection.mode = 'observe' then
      object := format('mode of %s', v_protection.protected_table);
      state := 'note';
      problem := 'The table is observed: nothing is rejected.';
      v_protection.mode := 'enforce';
      remedy := arbiter._protect_statement(v_protection);
      return next;
      v_protection.mode := 'observe';
    end if;
    if v_protection.verbs = '{insert}' and arbiter._browsers_update(v_protection.protected_table) then
      object := format('updates of %s', v_protection.protected_table);
      state := 'note';
      problem := 'Browsers may update rows here while a machine holds, also by an upsert: only inserts are arbitrated.';
      v_protection.verbs := '{insert,update}';
      remedy := arbiter._protect_statement(v_protection);
      return next;
    end if;
    -- `on delete set null` looks up the machine's rows.
    return query
      select format('index on %s (%I)', v_protection.protected_table, v_protection.machine_column), 'missing',
             'Deleting a machine reads the whole table.',
             format('create index concurrently on %s (%2$I) where %2$I is not null',
               v_protection.protected_table, v_protection.machine_column)
        from pg_catalog.pg_constraint k
        join pg_catalog.pg_attribute a
          on a.attrelid = k.conrelid and k.conkey = array[a.attnum] and a.attname = v_protection.machine_column
       where k.conrelid = v_protection.protected_table
         and k.contype = 'f'
         and not exists (
           select from pg_catalog.pg_index i where i.indrelid = k.conrelid and i.indkey[0] = a.attnum);
  end loop;

  return query
    select format('generated function arbiter.%I', p.proname), 'outdated',
           'Its body is not the one that arbiter generated.', 'Run: arbiter-db install'
      from pg_catalog.pg_proc p
     where p.pronamespace = 'arbiter'::regnamespace
       and obj_description(p.oid, 'pg_proc') ~ '[[][0-9a-f]{32}]$'
       and obj_description(p.oid, 'pg_proc') not like '%[' || md5(pg_get_functiondef(p.oid)) || ']';
  return query
    select 'settings', 'missing', 'arbiter.settings has no row: every decision fails.', 'Run: arbiter-db install'
     where not exists (select from arbiter.settings);
  return query
    select format('generated function arbiter.%I', c.function_name), 'outdated', c.problem, 'Run: arbiter-db install'
      from arbiter._outdated_constants() c;
  -- confirm_takeover() writes the registry as arbiter's owner, so what the registry runs has that owner's rights.
  return query
    select c.object, 'foreign',
           format('confirm_takeover() is rejected: function %s of %I would run with the rights of arbiter''s owner.',
             c.function_name, c.owner),
           case when t.oid is null then format('Make it call functions of %I only.', pg_get_userbyid(r.relowner))
                else format('drop trigger %I on %s', t.tgname, t.tgrelid::regclass) end
      from pg_catalog.pg_class r
      cross join lateral arbiter._foreign_code(v_registry.registry) c
      left join pg_catalog.pg_trigger t on pg_describe_object('pg_trigger'::regclass, t.oid, 0) = c.object
     where r.oid = 'arbiter.registry'::regclass;
  return query
    select format('condition of trigger %I on %s', t.tgname, t.tgrelid::regclass), 'foreign',
           'confirm_takeover() is rejected: it does more than compare columns, and would run with the rights of arbiter''s owner.',
           'Move the condition into the function of the trigger.'
      from arbiter._opaque_triggers(v_registry.registry) t
     where pg_describe_object('pg_trigger'::regclass, t.oid, 0) not in (
       select c.object from arbiter._foreign_code(v_registry.registry) c);
  -- Supabase grants TRIGGER on each new table to its roles. What the key of a protected table does when a machine is
  -- deleted is an update by the table's owner.
  return query
    select format('grants of trigger on %s', g.table_id), 'note',
           format('May create triggers there: %s. %s', string_agg(m.role, ', ' order by m.role), g.consequence),
           arbiter._revoke_trigger_statement(g.table_id)
      from (
        select v_registry.registry, 'One that calls a function of such a role makes confirm_takeover() fail.'
        union all
        select k.conrelid, 'When a machine is deleted, they run with the rights of the table''s owner.'
          from arbiter.protections p
          join pg_catalog.pg_constraint k
            on k.conrelid = p.protected_table and k.contype = 'f' and k.confrelid = v_registry.registry and k.confdeltype = 'n'
      ) as g (table_id, consequence)
     cross join lateral arbiter._may_create_triggers(g.table_id) as m (role)
     group by g.table_id, g.consequence
     order by g.table_id = v_registry.registry desc, g.table_id;
  return query
    select format('function %s', f.id::text), 'foreign',
           format('An API that serves schema %I may answer calls of arbiter''s function of that name with HTTP 300.', s.schema_name),
           format('alter routine %s rename to %I', f.id, p.proname || '_of_the_app')
      from (select distinct e.schema_name from arbiter._exposed() e) as s
      cross join lateral arbiter._beside_exposed(s.schema_name) as f (id)
      join pg_catalog.pg_proc p on p.oid = f.id;
  return query
    select format('policy %I on %s', n.policy_name, n.table_name),
           case when o.ownership <> 'ours' then o.ownership when c.relrowsecurity then 'outdated' else 'disabled' end,
           case o.ownership
             when 'missing' then 'Browsers may claim to be what they are not.'
             when 'foreign' then 'Arbiter has not made the policy of this name: browsers may claim to be what they are not.'
             else case when c.relrowsecurity then 'It was made from another definition.'
                       else 'Row security is off: browsers may claim to be what they are not.' end end,
           case when o.ownership = 'foreign' then 'Drop or rename it first. Run: arbiter-db install'
                when o.ownership = 'missing' or c.relrowsecurity then 'Run: arbiter-db install'
                else format('alter table %s enable row level security', n.table_name) end
      from arbiter._policies() n
      join pg_catalog.pg_class c on c.oid = n.table_name
     cross join lateral (select arbiter._ownership('policy', n.table_name, n.policy_name) as ownership) o
     where o.ownership <> 'ours'
        or not arbiter._is_current_policy(n.table_name, n.policy_name, n.definition, n.meaning)
        or (not c.relrowsecurity
          and exists (
            select from arbiter._client_roles() k
             where k.kind in ('visitor', 'user')
               and case
                 when c.relnamespace = 'arbiter'::regnamespace then has_any_column_privilege(k.role, c.oid, 'select')
                 else has_any_column_privilege(k.role, c.oid, 'insert,update')
                   or c.oid = v_registry.registry and has_table_privilege(k.role, c.oid, 'delete') end));
  -- For example after unprotect(), which a migration of the app has called to move a column.
  return query
    select format('table %s', a.attached_to), 'note', 'It has columns of arbiter and is not protected.',
           format('select arbiter.protect(%L)', a.attached_to)
      from arbiter.attachments a
      join pg_catalog.pg_class c on c.oid = a.attached_to
     where a.kind = 'column'
       and a.name in ('source', 'arbiter_xid')
       and arbiter._ownership(a.kind, a.attached_to, a.name) = 'ours'
       and a.attached_to not in (select p.protected_table from arbiter.protections p)
       and a.attached_to not in (select g.table_name from arbiter._unknown_guards() g)
     group by a.attached_to
     order by a.attached_to::text;
  return query
    select format('client role %I', r.role), 'missing', 'The role that was named as a client does not exist any more.',
           format('select arbiter.remove_client_role(%L)', r.role)
      from arbiter.client_roles r
     where r.role not in (select k.role from arbiter._client_roles() k);
  -- Triggers, policies and columns are compared above, and whether an index is missing. An install does not put back
  -- what was dropped from a table of the app; protect() does.
  return query
    select concat_ws(' ', a.kind, a.name, case when a.kind <> 'function' then 'of ' || a.attached_to end), o.ownership,
           case o.ownership when 'missing' then 'It was dropped.'
                            else 'It was dropped, and the one that has its name now is not arbiter''s.' end,
           coalesce(
             (select case o.ownership when 'foreign' then 'Drop or rename it first, then: ' else '' end || arbiter._protect_statement(p)
                from arbiter.protections p
               where p.protected_table = a.attached_to),
             'Run: arbiter-db install')
      from arbiter.attachments a
     cross join lateral (select arbiter._ownership(a.kind, a.attached_to, a.name) as ownership) o
     where case a.kind
         when 'constraint' then o.ownership <> 'ours' and exists (select from pg_catalog.pg_class c where c.oid = a.attached_to)
         when 'function' then o.ownership = 'missing' end;
  return query
    select split_part(u.statement, ' validate ', 1), 'outdated', 'A constraint is not validated.', u.statement
      from arbiter._finish_statements() as u (statement)
     where u.statement like 'alter%';
  return query
    select c.* from arbiter._own_triggers() t
     cross join lateral arbiter._check_trigger(t.table_name, t.trigger_name, t.definition, t.meaning,
       'Run: arbiter-db install') c;
end
$$;
comment on function arbiter.doctor() is
  'A row for the registry, each protection and each trigger that must be there, and for everything else that is not as it should be. state: ok, missing, disabled, outdated, foreign, or note, which is no fault; remedy: the statement that mends it. For the owner of arbiter.';
