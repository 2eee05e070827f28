-- What a table must be like: the questions that protect() and register_machines() ask before they change anything.

-- A machine column of the app that leads to another table could never hold a machine.
create or replace function arbiter._need_machine_key(p_table regclass, p_machine_column name, p_registry regclass)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key record;
begin
  select k.conname, k.confrelid::regclass as parent
    into v_key
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a
      on a.attrelid = k.conrelid and k.conkey = array[a.attnum] and a.attname = p_machine_column
   where k.conrelid = p_table
     and k.contype = 'f'
     and k.confrelid <> p_registry
     and arbiter._ownership('constraint', p_table, k.conname) <> 'ours'
   limit 1;
  if found then
    perform arbiter._fail('invalid_foreign_key',
      format('column %I of table %s leads to %s, not to the registry %s',
        p_machine_column, p_table, v_key.parent, p_registry),
      format('Drop constraint %I, or name another column in p_machine_column; nothing was changed.', v_key.conname));
  end if;
end
$$;
comment on function arbiter._need_machine_key(regclass, name, regclass) is
  'Error 42830 when the machine column has a foreign key to another table than the registry.';

-- All forms that the server reads as a uuid, and not only the one that it prints.
create or replace function arbiter._any_id_expression(p_class text, p_text text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case p_class
  when 'uuid' then format(
    'case when %1$s collate "C" ~ ''^(([0-9a-fA-F]{4}-?){7}[0-9a-fA-F]{4}|[{]([0-9a-fA-F]{4}-?){7}[0-9a-fA-F]{4}[}])$'' then %1$s::uuid end',
    p_text)
  when 'bigint' then format(
    'case when %1$s collate "C" ~ ''^[+-]?[0-9]{1,19}$'' then '
      'case when %1$s::numeric between -9223372036854775808 and 9223372036854775807 then %1$s::bigint end end', p_text)
  else p_text
end;
comment on function arbiter._any_id_expression(text, text) is
  'SQL for the id of a class that a text names in any form; null when it names none.';

create or replace function arbiter._normal_expression(p_class text, p_text text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case p_class
  when 'text' then p_text
  else format('coalesce((%s)::text, %s)', arbiter._any_id_expression(p_class, p_text), p_text)
end;
comment on function arbiter._normal_expression(text, text) is
  'SQL for the text by which arbiter knows the id that a text names; the text itself when it names none.';

-- Ids are compared as texts. A text beside a uuid is read as one (_id_expression, 20_ids.sql), so that upper case names
-- the same user. Other types that are mixed could never be equal, or only by chance.
create or replace function arbiter._need_comparable_ids(
  p_table regclass,
  p_column name,
  p_registry regclass,
  p_registry_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_class text := arbiter._id_class(p_table, p_column);
  v_registry_class text := arbiter._id_class(p_registry, p_registry_column);
  v_types text[];
begin
  if v_class <> v_registry_class and (v_class, v_registry_class) <> ('text', 'uuid') then
    select array_agg(format_type(a.atttypid, null) order by a.attrelid <> p_table)
      into v_types
      from pg_catalog.pg_attribute a
     where (a.attrelid, a.attname) in ((p_table, p_column), (p_registry, p_registry_column));
    perform arbiter._fail('datatype_mismatch',
      format('column %I of table %s is %s, but column %I of the registry %s is %s',
        p_column, p_table, v_types[1], p_registry_column, p_registry, v_types[2]),
      'Give both the same type. A column that arbiter has added: unprotect the table, drop the column, register the machines, protect again. Nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_comparable_ids(regclass, name, regclass, name) is
  'Error 42804 when the ids of a column can never be those of the registry''s column. No error while one of them does not exist.';

create or replace function arbiter._need_ids_of_registry(
  p_table regclass,
  p_user_path text,
  p_machine_column name,
  p_registry regclass,
  p_id_column name,
  p_user_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._need_comparable_ids(p_table, p_machine_column, p_registry, p_id_column);
  perform arbiter._need_comparable_ids(e.end_table, e.end_column, p_registry, p_user_column)
     from arbiter._ends(p_table, p_user_path) e;
end
$$;
comment on function arbiter._need_ids_of_registry(regclass, text, name, regclass, name, name) is
  'Error 42804 when users or machines of a table can never be those of the registry.';

-- The server prints the constraint with casts and brackets, which are removed before the comparison.
create or replace function arbiter._source_is_checked(p_table regclass)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_catalog.pg_constraint k
     where k.conrelid = p_table
       and k.contype = 'c'
       and k.convalidated
       and regexp_replace(pg_get_expr(k.conbin, k.conrelid), '::(text|character varying)|[][() ]', '', 'g')
           in ('source=ANYARRAY''local'',''cloud''', 'source=ANYARRAY''cloud'',''local'''));
end;
comment on function arbiter._source_is_checked(regclass) is
  'Whether a valid constraint allows exactly local and cloud in the column source.';

-- The app may use a column named source for something else, such as the name of a data feed.
create or replace function arbiter._need_source_meaning(p_table regclass)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_check record;
  v_fits boolean;
  v_word text;
begin
  select pg_get_expr(d.adbin, d.adrelid)
    into v_word
    from pg_catalog.pg_attrdef d
    join pg_catalog.pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum and a.attname = 'source'
   where d.adrelid = p_table;
  if v_word !~ '^''(local|cloud)''::' then
    perform arbiter._fail('check_violation',
      format('column source of table %s does not mean the environment: its default is %s', p_table, v_word),
      'Rename that column, or make its default local; nothing was changed.');
  end if;
  select k.conname
    into v_word
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = any (k.conkey) and a.attname = 'source'
   where k.conrelid = p_table
     and k.contype = 'f';
  if found then
    perform arbiter._fail('check_violation',
      format('column source of table %s does not mean the environment: it is in foreign key %I', p_table, v_word),
      'Rename that column; nothing was changed.');
  end if;
  if arbiter._source_is_checked(p_table) then
    return;
  end if;
  for v_check in
    select k.conname, pg_get_expr(k.conbin, k.conrelid) as expression,
           format_type(a.atttypid, a.atttypmod) as type
      from pg_catalog.pg_constraint k
      join pg_catalog.pg_attribute a
        on a.attrelid = k.conrelid and k.conkey = array[a.attnum] and a.attname = 'source'
     where k.conrelid = p_table
       and k.contype = 'c'
  loop
    execute format('select bool_and(coalesce(%s, true)) from unnest(''{local,cloud}''::text[]::%s[]) as v (source)',
      v_check.expression, v_check.type)
      into v_fits;
    if not v_fits then
      perform arbiter._fail('check_violation',
        format('column source of table %s does not mean the environment: constraint %I forbids local or cloud',
          p_table, v_check.conname),
        'Rename that column; nothing was changed.');
    end if;
  end loop;
  -- Ends at the first other word, and takes no lock that blocks writers.
  execute format('select source from %s where source not in (''local'', ''cloud'') limit 1', p_table)
    into v_word;
  if v_word is not null then
    perform arbiter._fail('check_violation',
      format('column source of table %s does not mean the environment: it holds %L', p_table, v_word),
      'Rename that column; nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_source_meaning(regclass) is
  'Error 23514 when an existing column source holds or demands other words than local and cloud.';

create or replace function arbiter._need_client_role(p_role name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_role is null or not exists (select from pg_catalog.pg_roles r where r.rolname = p_role) then
    perform arbiter._fail('undefined_object',
      format('there is no role %s', coalesce(quote_ident(p_role), 'null')),
      'Create the role first, or name another one; nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_client_role(name) is 'Error 42704 when the role does not exist.';

-- The heartbeat column may be missing: register_machines() adds it.
create or replace function arbiter._need_registry(
  p_registry regclass,
  p_id_column name,
  p_user_column name,
  p_status_column name,
  p_heartbeat_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._need_owner(p_registry);
  if (select c.relkind from pg_catalog.pg_class c where c.oid = p_registry) <> 'r' then
    perform arbiter._fail('wrong_object_type',
      format('%s is not an ordinary table', p_registry),
      'Register the table that holds one row per machine; nothing was changed.');
  end if;
  perform arbiter._need_column(p_registry, p_id_column, 'machine id');
  perform arbiter._need_trusted_type(p_registry, p_id_column);
  perform arbiter._need_column(p_registry, p_user_column, 'user');
  perform arbiter._need_trusted_type(p_registry, p_user_column);
  perform arbiter._need_column(p_registry, p_status_column, 'status');
  perform arbiter._need_trusted_type(p_registry, p_status_column);
  perform arbiter._has_column(p_registry, p_heartbeat_column, 'heartbeat');
  if not exists (
    select from pg_catalog.pg_index i
      join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attname = p_id_column
     where i.indrelid = p_registry
       and i.indisunique
       and i.indnkeyatts = 1
       and i.indkey[0] = a.attnum
       and i.indpred is null)
  then
    perform arbiter._fail('invalid_parameter_value',
      format('column %I of table %s is not unique', p_id_column, p_registry),
      'One row must be one machine: name its primary key in p_id_column; nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_registry(regclass, name, name, name, name) is
  'Errors when a table cannot be the registry: not ours, a column missing or of another type, ids not unique.';

create or replace function arbiter._need_health_column(
  p_registry regclass,
  p_health_column name,
  p_status_column name,
  p_heartbeat_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_health_column is null then
    return;
  end if;
  -- A machine's token may set both of these, and may not say that its machine is well.
  if p_health_column in (p_status_column, p_heartbeat_column) then
    perform arbiter._fail('invalid_parameter_value',
      format('column %I of table %s cannot say whether a machine is well', p_health_column, p_registry),
      'p_health_column is a column of its own, beside status and heartbeat; nothing was changed.');
  end if;
  perform arbiter._need_column(p_registry, p_health_column, 'health');
  perform arbiter._need_trusted_type(p_registry, p_health_column);
  if exists (
    select from pg_catalog.pg_attribute a
     where a.attrelid = p_registry and a.attname = p_heartbeat_column and not a.attisdropped and a.attnotnull)
  then
    perform arbiter._fail('invalid_table_definition',
      format('column %I of table %s is not null, and a machine that has never been well has no heartbeat',
        p_heartbeat_column, p_registry),
      format('Run: alter table %s alter column %I drop not null; nothing was changed.', p_registry, p_heartbeat_column));
  end if;
end
$$;
comment on function arbiter._need_health_column(regclass, name, name, name) is
  'Errors when a column of the registry cannot say whether a machine is well; none without such a column.';

create or replace function arbiter._need_path(p_table regclass, p_user_path text, p_machine_column name)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table regclass;
  v_way record;
  v_next record;
begin
  begin
    perform from arbiter._ways(p_user_path);
  exception
    when invalid_parameter_value then
      perform arbiter._fail('invalid_parameter_value',
        format('p_user_path is not a path: %L', p_user_path),
        'It is a column with the user''s id (''user_id''), columns over foreign keys joined by dots (''trader_id.user_id''), or several of these with commas.');
  end;
  for v_way in select w.steps, cardinality(w.steps) as last from arbiter._ways(p_user_path) w loop
    if p_machine_column in ('source', 'arbiter_xid', v_way.steps[1]) then
      perform arbiter._fail('invalid_parameter_value',
        format('column %I of table %s cannot name the machine', p_machine_column, p_table),
        'p_machine_column is a column of its own; it is added when it is missing.');
    end if;
    v_table := p_table;
    for i in 1 .. v_way.last - 1 loop
      v_next := arbiter._need_foreign_key(v_table, v_way.steps[i], p_user_path);
      perform arbiter._need_trusted_type(v_table, v_way.steps[i]);
      perform arbiter._need_trusted_owner(v_next.parent);
      perform arbiter._need_trusted_type(v_next.parent, v_next.parent_column);
      v_table := v_next.parent;
    end loop;
    perform arbiter._need_column(v_table, v_way.steps[v_way.last], 'user');
    perform arbiter._need_trusted_type(v_table, v_way.steps[v_way.last]);
  end loop;
end
$$;
comment on function arbiter._need_path(regclass, text, name) is
  'Errors when a path does not lead from the table to users: not a path, a foreign key or a column is missing, or its owner is not trusted.';

-- What an audit and a guard read, however the app uses the columns since.
create or replace function arbiter._need_provenance(
  p_table regclass,
  p_user_path text,
  p_machine_column name,
  p_evidence boolean)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._need_owner(p_table);
  perform arbiter._need_column(p_table, 'source', 'source');
  perform arbiter._need_column(p_table, p_machine_column, 'machine');
  if p_evidence then
    perform arbiter._need_column(p_table, 'arbiter_xid', 'xid');
  end if;
  perform arbiter._need_path(p_table, p_user_path, p_machine_column);
end
$$;
comment on function arbiter._need_provenance(regclass, text, name, boolean) is
  'Errors when a protected table has not the columns any more that say who wrote a row and whose it is.';

create or replace function arbiter._need_protectable(
  p_table regclass,
  p_user_path text,
  p_machine_column name)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_path text := p_user_path;
begin
  perform arbiter._need_owner(p_table);
  if (select c.relkind not in ('r', 'p') or c.relispartition or c.relpersistence = 't'
        from pg_catalog.pg_class c where c.oid = p_table)
  then
    perform arbiter._fail('wrong_object_type',
      format('%s cannot be protected', p_table),
      'Protect an ordinary or a partitioned table; of partitions, the table at the root.');
  end if;
  if arbiter._has_column(p_table, 'source', 'source') then
    perform arbiter._need_source_meaning(p_table);
  end if;
  perform arbiter._has_column(p_table, p_machine_column, 'machine');
  perform arbiter._need_trusted_type(p_table, p_machine_column);
  perform arbiter._has_column(p_table, 'arbiter_xid', 'xid');

  if v_path is null then
    v_path := arbiter._find_user_path(p_table, p_machine_column);
  end if;
  perform arbiter._need_path(p_table, v_path, p_machine_column);
  return v_path;
end
$$;
comment on function arbiter._need_protectable(regclass, text, name) is
  'The path from a row of the table to its user: p_user_path, or the obvious one when that is null (_find_user_path). Errors when the table cannot be protected.';
