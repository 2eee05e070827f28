-- Which table an installation makes the registry, and which it protects. Without options these are
-- public.cloud_machines and public.signals, and only where the catalog leaves no doubt. What does not fit is skipped,
-- and the plan says why; what was asked for by name and does not fit is an error.

-- The options of an installation are JSON in a setting of its transaction, because its files take no parameters.
create or replace function arbiter._install_options(
  out adopt boolean,
  out registry text,
  out protect text[],
  out user_path text,
  out machine_column name,
  out mode text,
  out unowned text)
returns record
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce((o.options ->> 'adopt')::boolean, true), o.options ->> 'registry',
         array(select p.name from jsonb_array_elements_text(o.options -> 'protect') with ordinality as p (name, position)
                order by p.position),
         o.options ->> 'user_path', (o.options ->> 'machine_column')::name, o.options ->> 'mode', o.options ->> 'unowned'
    from (select coalesce(nullif(current_setting('arbiter.install_options', true), ''), '{}')::jsonb) as o (options);
end;
comment on function arbiter._install_options() is
  'The options of this installation. adopt: false for neither registry nor protected tables by default; registry, protect: tables by name; the others are those of protect().';

create or replace function arbiter._need_table(p_name text)
returns regclass
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table regclass;
begin
  begin
    v_table := to_regclass(p_name);
  exception
    when invalid_name or syntax_error then
      null;
  end;
  if v_table is null then
    perform arbiter._fail('undefined_table',
      format('there is no table %s', p_name),
      'Name it with its schema, such as public.signals; nothing was changed.');
  end if;
  return v_table;
end
$$;
comment on function arbiter._need_table(text) is
  'The table of a name, which needs its schema. Error 42P01 when there is none.';

-- A foreign key to the registry says which column names the machine, also where there is another one by the usual name.
create or replace function arbiter._find_machine_column(p_table regclass, p_registry regclass)
returns name
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_columns name[];
begin
  select array_agg(distinct a.attname order by a.attname)
    into v_columns
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]
   where k.conrelid = p_table
     and k.confrelid = p_registry
     and k.contype = 'f';
  if cardinality(v_columns) > 1 then
    perform arbiter._fail('invalid_parameter_value',
      format('table %s has several foreign keys to the registry %s', p_table, p_registry),
      'Name the column of the machine that wrote the row in p_machine_column: ' || array_to_string(v_columns, ' or ') || '.');
  end if;
  return coalesce(v_columns[1], 'machine_id');
end
$$;
comment on function arbiter._find_machine_column(regclass, regclass) is
  'The column with the only foreign key to the registry, machine_id where there is none. Error 22023 when there are several.';

-- A table of a role without the rights of arbiter's owner cannot be the registry, so it raises no doubt which one is.
create or replace function arbiter._looks_like_registry()
returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.oid::regclass
    from pg_catalog.pg_class c
   where c.oid = to_regclass('public.cloud_machines')
      or (c.relkind in ('r', 'p')
          and not c.relispartition
          and c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace, 'arbiter'::regnamespace)
          and c.relpersistence <> 't'
          and arbiter._is_trusted(c.relowner)
          and (select count(*) = 3
                 from pg_catalog.pg_attribute a
                where a.attrelid = c.oid
                  and not a.attisdropped
                  and a.attname in ('user_id', 'status', 'last_health_check')))
   order by c.oid::regclass::text;
end;
comment on function arbiter._looks_like_registry() is
  'public.cloud_machines, and tables of trusted owners with the columns user_id, status and last_health_check.';

-- A table may be named by a role that means harm, and a DBA pastes the commands of the plan.
create or replace function arbiter._shell_word(p_table regclass)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case
    when p_table::text ~ '^[a-z0-9_.]+$' then p_table::text
    else '''' || replace(p_table::text, '''', '''"''"''') || '''' end;
end;
comment on function arbiter._shell_word(regclass) is 'The name of a table as one word of a shell''s command.';

-- Only an error that arbiter itself has made is a reason to skip a table; any other one ends the installation.
create or replace function arbiter._skip_reason(p_message text, p_hint text, out reason text, out remedy text)
returns record
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select substr(p_message, length('arbiter: ') + 1),
         regexp_replace(p_hint, '[;.] *nothing was changed[.]$', '.', 'i')
   where p_message like 'arbiter: %';
end;
comment on function arbiter._skip_reason(text, text) is
  'What an error of arbiter says of a table that is skipped; nulls for any other error.';

create or replace function arbiter._registry_steps()
returns table (step text, table_name regclass, id_column name, user_column name, reason text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_options record := arbiter._install_options();
  v_usual constant regclass := to_regclass('public.cloud_machines');
  v_found regclass[] := array(select l.candidate from arbiter._looks_like_registry() as l (candidate));
  v_named regclass;
  v_message text;
  v_hint text;
begin
  if v_options.registry is not null then
    v_named := arbiter._need_table(v_options.registry);
  end if;
  -- Only until a table was registered, also where it is named again: a later installation must not undo what a DBA has
  -- decided, such as its columns and status words.
  if to_regclass('arbiter.registry') is not null then
    select r.registry, r.id_column, r.user_column
      into table_name, id_column, user_column
      from arbiter.registry r
      join pg_catalog.pg_class c on c.oid = r.registry;
    if found and coalesce(v_named, table_name) = table_name then
      step := 'keep';
      return next;
      return;
    end if;
  end if;
  id_column := 'id';
  user_column := 'user_id';
  if v_named is not null then
    step := 'register';
    table_name := v_named;
    perform arbiter._need_registry(table_name, id_column, user_column, 'status', 'last_health_check');
    return next;
    return;
  end if;
  foreach table_name in array v_found loop
    step := 'skip';
    remedy := format('arbiter-db install --registry %s', arbiter._shell_word(table_name));
    if not v_options.adopt then
      reason := 'looks like the registry of machines, and --no-adopt was given';
    elsif cardinality(v_found) > 1 then
      reason := 'looks like the registry of machines, and so does ' || array_to_string(array_remove(v_found, table_name), ', ');
    elsif v_usual is null then
      reason := 'looks like the registry of machines, but has not the usual name, public.cloud_machines';
    else
      begin
        perform arbiter._need_registry(table_name, id_column, user_column, 'status', 'last_health_check');
        step := 'register';
        reason := null;
        remedy := null;
      exception
        when others then
          get stacked diagnostics v_message = message_text, v_hint = pg_exception_hint;
          select s.reason, s.remedy into reason, remedy from arbiter._skip_reason(v_message, v_hint) s;
          if reason is null then
            raise;
          end if;
      end;
    end if;
    return next;
  end loop;
end
$$;
comment on function arbiter._registry_steps() is
  'What an installation does about the registry. step: register, keep (it is one already) or skip; id_column, user_column: its ids. Errors when a table that was asked for does not fit.';

-- Tables that name machines, or have a name that trading apps give to what a strategy writes.
create or replace function arbiter._looks_protectable(p_registry regclass)
returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.oid::regclass
    from pg_catalog.pg_class c
   where c.oid = to_regclass('public.signals')
      or (c.relkind in ('r', 'p')
          and not c.relispartition
          and c.relpersistence <> 't'
          and c.relnamespace <> 'arbiter'::regnamespace
          and c.oid <> coalesce(p_registry, 0)
          and (c.oid in (select k.conrelid from pg_catalog.pg_constraint k where k.contype = 'f' and k.confrelid = p_registry)
               or c.relnamespace = 'public'::regnamespace and c.relname in ('trades', 'positions', 'orders')))
   order by c.oid::regclass::text;
end;
comment on function arbiter._looks_protectable(regclass) is
  'public.signals, tables with a foreign key to the registry, and those of other usual names in schema public.';

create or replace function arbiter._protect_steps()
returns table (
  step text,
  table_name regclass,
  user_path text,
  machine_column name,
  mode text,
  unowned text,
  reason text,
  remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_options record := arbiter._install_options();
  v_registry record;
  v_asked regclass[] := array(
    select arbiter._need_table(p.name) from unnest(v_options.protect) with ordinality as p (name, position) order by p.position);
  v_kept regclass[] := '{}';
  v_is_first boolean := true;
  v_is_meant boolean;
  v_message text;
  v_hint text;
begin
  select r.* into v_registry from arbiter._registry_steps() r where r.step <> 'skip';
  if to_regclass('arbiter.protections') is not null then
    v_kept := array(
      select p.protected_table
        from arbiter.protections p
        join pg_catalog.pg_class c on c.oid = p.protected_table
       where p.protected_table <> all (v_asked)
       order by p.protection_id);
    select s.last_value is null
      into strict v_is_first
      from pg_catalog.pg_sequences s
     where s.schemaname = 'arbiter' and s.sequencename = 'protections_protection_id_seq';
  end if;
  foreach table_name in array v_kept loop
    step := 'keep';
    select p.user_path, p.machine_column, p.mode, p.unowned
      into user_path, machine_column, mode, unowned
      from arbiter.protections p
     where p.protected_table = table_name;
    return next;
  end loop;
  foreach table_name in array v_asked
    || array(select l.candidate from arbiter._looks_protectable(v_registry.table_name) as l (candidate)
              where l.candidate <> all (v_asked || v_kept))
  loop
    user_path := null;
    machine_column := null;
    mode := null;
    unowned := null;
    begin
      -- What a table has already stays, as protect() does it.
      if to_regclass('arbiter.protections') is not null then
        select p.user_path, p.machine_column, p.mode, p.unowned
          into user_path, machine_column, mode, unowned
          from arbiter.protections p
         where p.protected_table = table_name;
      end if;
      -- The options are for the tables that this installation protects, if it does.
      v_is_meant := table_name = any (v_asked)
        or (v_asked = '{}' and v_is_first and table_name is not distinct from to_regclass('public.signals'));
      mode := coalesce(case when v_is_meant then v_options.mode end, mode, 'enforce');
      unowned := coalesce(case when v_is_meant then v_options.unowned end, unowned, 'reject');
      machine_column := coalesce(case when v_is_meant then v_options.machine_column end, machine_column,
        arbiter._find_machine_column(table_name, v_registry.table_name));
      user_path := arbiter._need_protectable(
        table_name, coalesce(case when v_is_meant then v_options.user_path end, user_path), machine_column);
      perform arbiter._need_machine_key(table_name, machine_column, v_registry.table_name);
      perform arbiter._need_ids_of_registry(table_name, user_path, machine_column,
        v_registry.table_name, v_registry.id_column, v_registry.user_column);
      step := 'protect';
      reason := null;
      remedy := null;
      if table_name <> all (v_asked) then
        remedy := format('arbiter-db install --protect %s', arbiter._shell_word(table_name));
        if not v_options.adopt then
          reason := 'could be protected, and --no-adopt was given';
        elsif not v_is_first or v_asked <> '{}' then
          reason := 'is not protected';
        elsif not v_is_meant then
          reason := 'is not protected; by default only public.signals is';
        elsif v_registry.table_name is null and exists (select from arbiter._registry_steps()) then
          reason := 'is not protected, because it is not decided which table is the registry of machines';
        end if;
        if reason is not null then
          step := 'skip';
        else
          remedy := null;
        end if;
      end if;
    exception
      when others then
        if table_name = any (v_asked) then
          raise;
        end if;
        get stacked diagnostics v_message = message_text, v_hint = pg_exception_hint;
        step := 'skip';
        select s.reason, s.remedy into reason, remedy from arbiter._skip_reason(v_message, v_hint) s;
        if reason is null then
          raise;
        end if;
    end;
    return next;
  end loop;
end
$$;
comment on function arbiter._protect_steps() is
  'What an installation does about protected tables. step: protect, keep (it is protected already) or skip. Errors when a table that was asked for does not fit.';
