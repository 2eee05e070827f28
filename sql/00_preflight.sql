-- Runs first, in a transaction of its own, before any migration: refuses a database whose tables
-- arbiter cannot adopt, so that a refusal leaves nothing behind. The functions stay: protect() and
-- register_machines() ask the same questions of other tables.

set local lock_timeout = '5s';

-- Not `if not exists`: that needs the right to create schemas even where a DBA has made this one.
do $schema$
begin
  if to_regnamespace('arbiter') is null then
    create schema arbiter;
  end if;
end
$schema$;

-- Whether the column exists; an error when it exists with another type.
create or replace function arbiter._has_column(p_table regclass, p_column name, p_types text[])
returns boolean
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_type text;
  v_generated "char";
begin
  select format_type(a.atttypid, null), a.attgenerated
    into v_type, v_generated
    from pg_catalog.pg_attribute a
   where a.attrelid = p_table
     and a.attname = p_column
     and a.attnum > 0
     and not a.attisdropped;
  if v_type is null then
    return false;
  end if;
  if v_type <> all (p_types) then
    raise exception using
      errcode = 'datatype_mismatch',
      message = format('arbiter: column %I of table %s is %s, it must be %s',
        p_column, p_table, v_type, array_to_string(p_types, ' or ')),
      hint = 'Rename that column, or name another one in the call; nothing was changed.';
  end if;
  -- Triggers see null in its place.
  if v_generated = 'v' then
    raise exception using
      errcode = 'feature_not_supported',
      message = format('arbiter: column %I of table %s is a virtual generated column', p_column, p_table),
      hint = 'Make it stored, or name another one in the call; nothing was changed.';
  end if;
  return true;
end
$$;
revoke execute on function arbiter._has_column(regclass, name, text[]) from public;
comment on function arbiter._has_column(regclass, name, text[]) is
  'Whether the column exists. Error 42804 when it exists with another type, 0A000 when it is virtual.';

-- The same, but the column must be there.
create or replace function arbiter._need_column(p_table regclass, p_column name, p_types text[])
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  if not arbiter._has_column(p_table, p_column, p_types) then
    raise exception using
      errcode = 'undefined_column',
      message = format('arbiter: table %s has no column %I', p_table, p_column),
      hint = 'Name the column in the call; nothing was changed.';
  end if;
end
$$;
revoke execute on function arbiter._need_column(regclass, name, text[]) from public;
comment on function arbiter._need_column(regclass, name, text[]) is
  'Error 42703 when the column is missing, 42804 when it has another type.';

-- Attaching needs what only an owner may do; said before anything is touched.
create or replace function arbiter._need_owner(p_table regclass)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner name;
begin
  select pg_get_userbyid(c.relowner)
    into v_owner
    from pg_catalog.pg_class c
   where c.oid = p_table;
  if not pg_has_role(v_owner, 'usage') then
    raise exception using
      errcode = 'insufficient_privilege',
      message = format('arbiter: table %s belongs to %I, not to %I', p_table, v_owner, current_user),
      hint = format('Connect as %I or as a member of it.', v_owner);
  end if;
end
$$;
revoke execute on function arbiter._need_owner(regclass) from public;
comment on function arbiter._need_owner(regclass) is
  'Error 42501 when the current role does not own the table.';

-- The foreign key that leads from one column of a table to a column of another, if any.
create or replace function arbiter._foreign_key(
  p_table regclass,
  p_column name,
  out parent regclass,
  out parent_column name,
  out constraint_name name)
returns record
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select k.confrelid::regclass, f.attname, k.conname
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    join pg_catalog.pg_attribute f on f.attrelid = k.confrelid and f.attnum = k.confkey[1]
   where k.conrelid = p_table
     and k.contype = 'f'
     and cardinality(k.conkey) = 1
     and a.attname = p_column
   order by k.oid
   limit 1;
end;
revoke execute on function arbiter._foreign_key(regclass, name) from public;
comment on function arbiter._foreign_key(regclass, name) is
  'Where the single-column foreign key of a column leads; nulls when there is none.';

create or replace function arbiter._need_foreign_key(
  p_table regclass,
  p_column name,
  p_path text,
  out parent regclass,
  out parent_column name,
  out constraint_name name)
returns record
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  select f.parent, f.parent_column, f.constraint_name
    into parent, parent_column, constraint_name
    from arbiter._foreign_key(p_table, p_column) f;
  if parent is null then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: column %I of table %s is not a foreign key of one column', p_column, p_table),
      hint = format('In the path %s every step but the last must be one.', p_path);
  end if;
end
$$;
revoke execute on function arbiter._need_foreign_key(regclass, name, text) from public;
comment on function arbiter._need_foreign_key(regclass, name, text) is
  'Where the foreign key of a column leads. Error 22023 when it is none.';

-- A machine column of the app that leads to another table could never hold a machine.
create or replace function arbiter._need_machine_key(p_table regclass, p_machine_column name, p_registry regclass)
returns void
language plpgsql
stable
security invoker
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
     and k.conname <> 'arbiter_machine_id_fkey'
   limit 1;
  if found then
    raise exception using
      errcode = 'invalid_foreign_key',
      message = format('arbiter: column %I of table %s leads to %s, not to the registry %s',
        p_machine_column, p_table, v_key.parent, p_registry),
      hint = format('Drop constraint %I, or name another column in p_machine_column; nothing was changed.', v_key.conname);
  end if;
end
$$;
revoke execute on function arbiter._need_machine_key(regclass, name, regclass) from public;
comment on function arbiter._need_machine_key(regclass, name, regclass) is
  'Error 42830 when the machine column has a foreign key to another table than the registry.';

-- The path from a row to its user, when there is one obvious answer: a uuid column user_id, or one
-- foreign key to a table that has one. The machine's own foreign key leads to a user, too, but to
-- the one whose machine wrote the row, and that is what is to be judged.
create or replace function arbiter._find_user_path(p_table regclass, p_machine_column name)
returns text
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_paths text[];
begin
  if arbiter._has_column(p_table, 'user_id', '{uuid}') then
    return 'user_id';
  end if;
  select array_agg(format('%I.user_id', a.attname) order by a.attnum)
    into v_paths
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    join pg_catalog.pg_attribute u on u.attrelid = k.confrelid and u.attname = 'user_id'
   where k.conrelid = p_table
     and k.contype = 'f'
     and cardinality(k.conkey) = 1
     and u.atttypid = 'uuid'::regtype
     and not u.attisdropped
     and a.attname <> p_machine_column;
  if cardinality(v_paths) = 1 then
    return v_paths[1];
  end if;
  raise exception using
    errcode = 'invalid_parameter_value',
    message = format('arbiter: table %s has %s way to a user', p_table,
      case when v_paths is null then 'no obvious' else 'more than one' end),
    hint = case when v_paths is null
      then 'Name it in p_user_path: a uuid column (''owner_id'') or a path over foreign keys (''trader_id.user_id'').'
      else 'Choose one in p_user_path: ' || array_to_string(v_paths, ', ') end;
end
$$;
revoke execute on function arbiter._find_user_path(regclass, name) from public;
comment on function arbiter._find_user_path(regclass, name) is
  'The path from a row to its user when one is obvious. Error 22023 otherwise.';

-- Whether a valid check constraint already allows exactly the two environments. The words are
-- compared without the casts and brackets in which the server prints them.
create or replace function arbiter._source_is_checked(p_table regclass)
returns boolean
language sql
stable
security invoker
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
revoke execute on function arbiter._source_is_checked(regclass) from public;
comment on function arbiter._source_is_checked(regclass) is
  'Whether a valid constraint allows exactly local and cloud in the column source.';

-- A column named source may mean something else, say the name of a data feed.
create or replace function arbiter._need_source_meaning(p_table regclass)
returns void
language plpgsql
volatile
security invoker
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
    raise exception using
      errcode = 'check_violation',
      message = format('arbiter: column source of table %s does not mean the environment: its default is %s', p_table, v_word),
      hint = 'Rename that column, or make its default local; nothing was changed.';
  end if;
  select k.conname
    into v_word
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = any (k.conkey) and a.attname = 'source'
   where k.conrelid = p_table
     and k.contype = 'f';
  if found then
    raise exception using
      errcode = 'check_violation',
      message = format('arbiter: column source of table %s does not mean the environment: it is in foreign key %I', p_table, v_word),
      hint = 'Rename that column; nothing was changed.';
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
      raise exception using
        errcode = 'check_violation',
        message = format('arbiter: column source of table %s does not mean the environment: constraint %I forbids local or cloud',
          p_table, v_check.conname),
        hint = 'Rename that column; nothing was changed.';
    end if;
  end loop;
  -- The scan ends at the first stranger; it takes no lock that blocks writers.
  execute format('select source from %s where source not in (''local'', ''cloud'') limit 1', p_table)
    into v_word;
  if v_word is not null then
    raise exception using
      errcode = 'check_violation',
      message = format('arbiter: column source of table %s does not mean the environment: it holds %L', p_table, v_word),
      hint = 'Rename that column; nothing was changed.';
  end if;
end
$$;
revoke execute on function arbiter._need_source_meaning(regclass) from public;
comment on function arbiter._need_source_meaning(regclass) is
  'Error 23514 when an existing column source holds or demands other words than local and cloud.';

-- What register_machines() needs of a registry. The heartbeat column may be missing: it is added.
create or replace function arbiter._need_registry(
  p_registry regclass,
  p_id_column name,
  p_user_column name,
  p_status_column name,
  p_heartbeat_column name)
returns void
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._need_owner(p_registry);
  if (select c.relkind from pg_catalog.pg_class c where c.oid = p_registry) <> 'r' then
    raise exception using
      errcode = 'wrong_object_type',
      message = format('arbiter: %s is not an ordinary table', p_registry),
      hint = 'Register the table that holds one row per machine; nothing was changed.';
  end if;
  perform arbiter._need_column(p_registry, p_id_column, '{uuid}');
  perform arbiter._need_column(p_registry, p_user_column, '{uuid}');
  if not exists (
    select from pg_catalog.pg_attribute a
     where a.attrelid = p_registry and a.attname = p_status_column and not a.attisdropped)
  then
    perform arbiter._need_column(p_registry, p_status_column, '{text}');
  end if;
  perform arbiter._has_column(p_registry, p_heartbeat_column, '{timestamp with time zone}');
  if not exists (
    select from pg_catalog.pg_index i
      join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attname = p_id_column
     where i.indrelid = p_registry
       and i.indisunique
       and i.indnkeyatts = 1
       and i.indkey[0] = a.attnum
       and i.indpred is null)
  then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: column %I of table %s is not unique', p_id_column, p_registry),
      hint = 'One row must be one machine: name its primary key in p_id_column; nothing was changed.';
  end if;
end
$$;
revoke execute on function arbiter._need_registry(regclass, name, name, name, name) from public;
comment on function arbiter._need_registry(regclass, name, name, name, name) is
  'Errors when a table cannot be the registry: not ours, a column missing or of another type, ids not unique.';

-- What protect() needs of a table, given the path to its user (null: find it). Returns the path.
create or replace function arbiter._need_protectable(
  p_table regclass,
  p_user_path text,
  p_machine_column name)
returns text
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_path text := p_user_path;
  v_table regclass := p_table;
  v_steps text[];
  v_step text;
  v_next record;
begin
  perform arbiter._need_owner(p_table);
  if (select c.relkind not in ('r', 'p') or c.relispartition or c.relpersistence = 't'
        from pg_catalog.pg_class c where c.oid = p_table)
  then
    raise exception using
      errcode = 'wrong_object_type',
      message = format('arbiter: %s cannot be protected', p_table),
      hint = 'Protect an ordinary or a partitioned table; of partitions, the table at the root.';
  end if;
  if arbiter._has_column(p_table, 'source', '{text,character varying}') then
    perform arbiter._need_source_meaning(p_table);
  end if;
  perform arbiter._has_column(p_table, p_machine_column, '{uuid}');
  perform arbiter._has_column(p_table, 'arbiter_xid', '{xid8}');

  if v_path is null then
    v_path := arbiter._find_user_path(p_table, p_machine_column);
  end if;
  begin
    v_steps := parse_ident(v_path);
  exception
    when invalid_parameter_value then
      raise exception using
        errcode = 'invalid_parameter_value',
        message = format('arbiter: p_user_path is not a path: %L', v_path),
        hint = 'It is a uuid column (''user_id''), or columns over foreign keys joined by dots (''trader_id.user_id'').';
  end;
  if p_machine_column in ('source', 'arbiter_xid', v_steps[1]) then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: column %I of table %s cannot name the machine', p_machine_column, p_table),
      hint = 'p_machine_column is a column of its own; it is added when it is missing.';
  end if;
  for i in 1 .. cardinality(v_steps) - 1 loop
    v_step := v_steps[i];
    v_next := arbiter._need_foreign_key(v_table, v_step, v_path);
    v_table := v_next.parent;
  end loop;
  perform arbiter._need_column(v_table, v_steps[cardinality(v_steps)], '{uuid}');
  return v_path;
end
$$;
revoke execute on function arbiter._need_protectable(regclass, text, name) from public;
comment on function arbiter._need_protectable(regclass, text, name) is
  'The path from a row of the table to its user. Errors when the table cannot be protected.';

-- For uninstall: the columns that arbiter has added, by their comments.
create or replace function arbiter._leave_columns(p_drop boolean)
returns setof text
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
begin
  for v_column in
    select a.attrelid::regclass as table_name, a.attname as name
      from pg_catalog.pg_attribute a
      join pg_catalog.pg_class c on c.oid = a.attrelid and c.relkind in ('r', 'p') and not c.relispartition
     where a.attnum > 0
       and not a.attisdropped
       and a.attinhcount = 0
       and col_description(a.attrelid, a.attnum) like 'arbiter: %'
     order by c.relnamespace::regnamespace::text, c.relname, a.attnum
  loop
    if p_drop then
      execute format('alter table %s drop column %I', v_column.table_name, v_column.name);
      return next format('dropped column %I of %s', v_column.name, v_column.table_name);
    else
      return next format('left column %I of %s', v_column.name, v_column.table_name);
    end if;
  end loop;
end
$$;
revoke execute on function arbiter._leave_columns(boolean) from public;
comment on function arbiter._leave_columns(boolean) is
  'Drops the columns that arbiter has added to tables of the app, or leaves them; one line for each.';

-- Takes several tables in one moment. While one is held the wait for the next is short, shorter than
-- deadlock_timeout: clients that write both would deadlock with a longer one.
create or replace function arbiter._lock_tables(p_tables regclass[])
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_tables regclass[] := p_tables;
  v_give_up_at timestamptz := clock_timestamp() + interval '5 seconds';
begin
  loop
    begin
      for i in 1 .. cardinality(v_tables) loop
        perform set_config('lock_timeout', case when i = 1 then '5s' else '200ms' end, true);
        execute format('lock table %s in access exclusive mode', v_tables[i]);
      end loop;
      return;
    exception
      when lock_not_available then
        if clock_timestamp() >= v_give_up_at then
          raise;
        end if;
    end;
    v_tables := v_tables[2:] || v_tables[1];
  end loop;
end
$$;
revoke execute on function arbiter._lock_tables(regclass[]) from public;
comment on function arbiter._lock_tables(regclass[]) is
  'Locks tables for the transaction. Error 55P03 when that takes more than 5 s.';

-- The tables that an installation adopts by name: only until something was registered or protected,
-- so that a later install does not undo what a DBA has decided since.
create or replace function arbiter._to_adopt(out registry regclass, out signals regclass)
returns record
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_done boolean := false;
begin
  if to_regclass('arbiter.registry') is not null then
    select exists (select from arbiter.registry) into v_done;
  end if;
  if not v_done then
    registry := to_regclass('public.cloud_machines');
  end if;
  v_done := false;
  if to_regclass('arbiter.protections') is not null then
    select s.last_value is not null
      into v_done
      from pg_catalog.pg_sequences s
     where s.schemaname = 'arbiter' and s.sequencename = 'protections_protection_id_seq';
  end if;
  if not v_done then
    signals := to_regclass('public.signals');
  end if;
end
$$;
revoke execute on function arbiter._to_adopt() from public;
comment on function arbiter._to_adopt() is
  'public.cloud_machines and public.signals where they exist and nothing was ever attached; else nulls.';

do $preflight$
declare
  v_adopt record;
begin
  if current_setting('server_version_num')::integer < 150000 then
    raise exception using
      errcode = 'feature_not_supported',
      message = format('arbiter: needs PostgreSQL 15 or later, this is %s', current_setting('server_version'));
  end if;
  v_adopt := arbiter._to_adopt();
  if v_adopt.registry is not null then
    perform arbiter._need_registry(v_adopt.registry, 'id', 'user_id', 'status', 'last_health_check');
  end if;
  if v_adopt.signals is not null then
    perform arbiter._need_protectable(v_adopt.signals, null, 'machine_id');
    perform arbiter._need_machine_key(v_adopt.signals, 'machine_id', v_adopt.registry);
  end if;
end
$preflight$;
