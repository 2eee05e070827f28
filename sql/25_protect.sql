-- protect() and unprotect(): what a table must have, its columns and constraints, and its row in arbiter.protections.

-- A protected table that was dropped keeps its row in arbiter.protections until it is unprotected, or another table of
-- its name is protected: otherwise doctor() would find nothing wrong with a table that was swapped for a copy.
create or replace function arbiter._forget_dropped(p_declared_as text default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protection_id integer;
begin
  delete from arbiter.registry r
   where not exists (select from pg_catalog.pg_class c where c.oid = r.registry);
  delete from arbiter.attachments a
   where a.kind <> 'function' and not exists (select from pg_catalog.pg_class c where c.oid = a.attached_to);
  for v_protection_id in
    delete from arbiter.protections p
     where p.declared_as = p_declared_as
       and not exists (select from pg_catalog.pg_class c where c.oid = p.protected_table)
    returning p.protection_id
  loop
    perform arbiter._drop_guard(v_protection_id);
  end loop;
end
$$;
comment on function arbiter._forget_dropped(text) is
  'Forgets what was attached to tables that do not exist any more, a registry that does not, and a protected table that had this name and does not.';

-- Without a guard nothing reads the column, and its default would cost each insert a transaction id.
create or replace function arbiter._drop_xid_default(p_table regclass)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from pg_catalog.pg_attribute a
     where a.attrelid = p_table and a.attname = 'arbiter_xid' and a.atthasdef)
  then
    execute format('alter table %s alter column arbiter_xid drop default', p_table);
  end if;
end
$$;
comment on function arbiter._drop_xid_default(regclass) is 'Drops the default of arbiter_xid, if there is one.';

create or replace function arbiter._chosen_options(
  p_table regclass,
  p_user_path text,
  p_verbs text[],
  p_machine_column name,
  p_mode text,
  p_unowned text,
  p_evidence boolean)
returns arbiter.protections
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_chosen arbiter.protections;
begin
  select p.* into v_chosen from arbiter.protections p where p.protected_table = p_table;
  v_chosen.user_path := coalesce(p_user_path, v_chosen.user_path);
  v_chosen.verbs := case
    when p_verbs is null then coalesce(v_chosen.verbs, '{insert}')
    else (select array_agg(distinct v.verb) from unnest(p_verbs) as v (verb)) end;
  v_chosen.machine_column := coalesce(p_machine_column, v_chosen.machine_column,
    arbiter._find_machine_column(p_table, (select r.registry from arbiter.registry r where r.singleton)));
  v_chosen.mode := coalesce(p_mode, v_chosen.mode, 'enforce');
  v_chosen.unowned := coalesce(p_unowned, v_chosen.unowned, 'reject');
  v_chosen.evidence := coalesce(p_evidence, v_chosen.evidence, true);
  if p_table is null
     or v_chosen.verbs is null or v_chosen.verbs not in ('{insert}', '{insert,update}')
     or v_chosen.mode not in ('enforce', 'observe')
     or v_chosen.unowned not in ('reject', 'allow')
  then
    perform arbiter._fail('invalid_parameter_value',
      format('protect(%s) with p_verbs %s, p_mode %s, p_unowned %s',
        coalesce(p_table::text, 'null'), coalesce(p_verbs, v_chosen.verbs), v_chosen.mode, v_chosen.unowned),
      'p_verbs is {insert} or {insert,update}; p_mode enforce or observe; p_unowned reject or allow. What is left out stays as it is.');
  end if;
  return v_chosen;
end
$$;
comment on function arbiter._chosen_options(regclass, text, text[], name, text, text, boolean) is
  'The options of a protection: what is given, else what the table has already, else the default. Error 22023 when one is none of its words.';

-- Definer, as unprotect(): what they create must belong to arbiter's owner, whichever role calls.
create or replace function arbiter.protect(
  p_table regclass,
  p_user_path text default null,
  p_verbs text[] default null,
  p_machine_column name default null,
  p_mode text default null,
  p_unowned text default null,
  p_evidence boolean default null)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_new arbiter.protections;
  v_registry arbiter.registry;
  v_relative regclass;
begin
  lock table arbiter.protections in share row exclusive mode;
  perform arbiter._forget_dropped(p_table::text);
  v_new := arbiter._chosen_options(p_table, p_user_path, p_verbs, p_machine_column, p_mode, p_unowned, p_evidence);
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if p_table = v_registry.registry or p_table in (
    select c.oid from pg_catalog.pg_class c where c.relnamespace = 'arbiter'::regnamespace)
  then
    perform arbiter._fail('wrong_object_type',
      format('%s cannot be protected', p_table),
      'arbiter judges by the registry and its own tables; protect a table that clients write to.');
  end if;
  select p.protected_table
    into v_relative
    from arbiter.protections p
   where p.protected_table <> p_table
     and (p.protected_table in (select arbiter._family(p_table)) or p_table in (select arbiter._family(p.protected_table)));
  if v_relative is not null then
    perform arbiter._fail('wrong_object_type',
      format('%s cannot be protected beside %s, which inherits from it or the other way round', p_table, v_relative),
      format('Unprotect %s first: one guard is enough for both.', v_relative));
  end if;
  v_new.user_path := arbiter._need_protectable(p_table, v_new.user_path, v_new.machine_column);
  perform arbiter._need_owner(f.member) from arbiter._family(p_table) as f (member);
  v_relative := arbiter._outer_parent(p_table);
  if 'update' = any (v_new.verbs) and v_relative is not null then
    perform arbiter._fail('wrong_object_type',
      format('%s cannot be protected against updates below %s, which is not protected', p_table, v_relative),
      format('An update of %s would not be arbitrated: protect that table.', v_relative));
  end if;
  perform arbiter._need_machine_key(p_table, v_new.machine_column, v_registry.registry);
  perform arbiter._need_ids_of_registry(p_table, v_new.user_path, v_new.machine_column,
    v_registry.registry, v_registry.id_column, v_registry.user_column);

  -- No write is in flight under the old rules, and every later one is judged by the new ones. Take the strongest lock
  -- at once, which a default and a policy need: a later upgrade can deadlock with a reader.
  execute format('lock table %s in access exclusive mode', p_table);
  perform arbiter._add_column(p_table, 'source', 'source');
  if not arbiter._source_is_checked(p_table) and arbiter._ownership('constraint', p_table, 'arbiter_source_check') <> 'ours' then
    perform arbiter._need_free_name('constraint', p_table, 'arbiter_source_check');
    execute format($sql$alter table %s add constraint arbiter_source_check check (source in ('local', 'cloud')) not valid$sql$,
      p_table);
    perform arbiter._record('constraint', p_table, 'arbiter_source_check');
  end if;
  perform arbiter._add_column(p_table, v_new.machine_column, 'machine');
  perform arbiter._add_machine_key(p_table, v_new.machine_column);
  if v_new.evidence then
    perform arbiter._add_column(p_table, 'arbiter_xid', 'xid');
    execute format('alter table %s alter column arbiter_xid set default pg_current_xact_id()', p_table);
  else
    perform arbiter._drop_xid_default(p_table);
  end if;

  insert into arbiter.protections as p (protected_table, declared_as, user_path, verbs, machine_column, mode, unowned, evidence)
  values (p_table, p_table::text, v_new.user_path, v_new.verbs, v_new.machine_column, v_new.mode, v_new.unowned, v_new.evidence)
  on conflict on constraint protections_protected_table_key do update
    set declared_as = excluded.declared_as,
        user_path = excluded.user_path,
        verbs = excluded.verbs,
        machine_column = excluded.machine_column,
        mode = excluded.mode,
        mode_since = case p.mode when excluded.mode then p.mode_since else clock_timestamp() end,
        unowned = excluded.unowned,
        evidence = excluded.evidence
  returning protection_id into v_new.protection_id;
  perform arbiter._build_guard(v_new.protection_id);
  perform arbiter._build_policies(p_table);
end
$$;
comment on function arbiter.protect(regclass, text, text[], name, text, text, boolean) is
  'Protects a table: adds source, machine_id and arbiter_xid if missing (no rewrite; existing rows become local), attaches the guard to it and its partitions. Options that are left out keep their values; the first time they are: p_user_path, a column with the user''s id or a path over foreign keys, found where it is obvious; p_verbs {insert}; p_machine_column machine_id; p_mode enforce; p_unowned reject; p_evidence true. p_verbs {insert}: an update, also that of an upsert or MERGE which finds an older row, is not arbitrated. {insert,update}: it is. Idempotent; call it again after the table changed or got a partition. Errors 22023, 23514, 42501, 42703, 42804, 42809: nothing changed.';

create or replace function arbiter.unprotect(p_table regclass)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_protection arbiter.protections;
begin
  lock table arbiter.protections in share row exclusive mode;
  delete from arbiter.protections p where p.protected_table = p_table returning p.* into v_protection;
  if not found then
    perform arbiter._fail('undefined_object',
      format('table %s is not protected', coalesce(p_table::text, 'null')),
      'See arbiter.protections for the tables that are.');
  end if;
  perform arbiter._drop_guard(v_protection.protection_id);
  perform arbiter._drop_xid_default(p_table);
  perform arbiter._build_policies();
end
$$;
comment on function arbiter.unprotect(regclass) is
  'Takes the guard off a table. Its columns and rows stay as they are. Error 42704 when it is not protected.';
