-- What all other files need: how a wrong call fails, the columns of the app's tables that arbiter reads or adds, locks.
--
-- The files whose names begin with 0 run before any migration, so that a database that arbiter cannot adopt is refused
-- before anything is changed, and again with all the others. A first install commits them in between. PUBLIC may then
-- execute their functions, which does no harm: they have the rights of their caller.

set local lock_timeout = '5s';

-- Notes which comments functions and types have before this transaction, for _left_over() (40_left_over.sql). (0,0),
-- where no row can be, keeps the list from being empty.
do $note$
begin
  perform set_config('arbiter.documented_before', concat_ws(' ', '(0,0)', string_agg(d.ctid::text, ' ')), true)
     from pg_catalog.pg_description d
    where d.objoid in (
      select p.oid from pg_catalog.pg_proc p where p.pronamespace = 'arbiter'::regnamespace
      union all
      select t.oid from pg_catalog.pg_type t where t.typnamespace = 'arbiter'::regnamespace);
end
$note$;

create or replace function arbiter._fail(p_condition text, p_message text, p_hint text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = p_condition, message = 'arbiter: ' || p_message, hint = p_hint;
end
$$;
comment on function arbiter._fail(text, text, text) is
  'Raises an error. p_condition: an SQLSTATE or the name of its condition. p_hint: what to do next.';

-- The server treats read uncommitted as read committed.
create or replace function arbiter._sees_commits()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
return current_setting('transaction_isolation') in ('read committed', 'read uncommitted');
comment on function arbiter._sees_commits() is
  'Whether each statement of the transaction sees what others have committed before it; above read committed it does not.';

create or replace function arbiter._say(p_lines text[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  for i in 1 .. cardinality(p_lines) loop
    raise notice 'arbiter: %', p_lines[i];
  end loop;
end
$$;
comment on function arbiter._say(text[]) is
  'Says each line by NOTICE, which is how a migration tells what it finds and does.';

-- One row for each kind of column: the types that it may have, and for a column that arbiter adds its definition.
-- A constant default and nullable columns need no rewrite of the table, and existing rows become local.
create or replace function arbiter._columns()
returns table (kind text, types text[], definition text, meaning text)
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  values
    ('user', '{uuid,text,character varying,smallint,integer,bigint}'::text[], null, null),
    ('machine id', '{uuid,text,character varying,smallint,integer,bigint}', null, null),
    ('status', null, null, null),
    ('health', null, null, null),
    ('heartbeat', '{timestamp with time zone}', 'timestamptz',
      'the last heartbeat, stamped with the database''s clock in place of the value that the client sent.'),
    ('source', '{text,character varying}', 'text not null default ''local''',
      'the environment that wrote the row, local (browser) or cloud (machine).'),
    ('machine', '{uuid,text,character varying,smallint,integer,bigint}', null, 'the machine that wrote the row when source is cloud.'),
    ('xid', '{xid8}', 'xid8', 'the transaction that wrote the row; null on rows older than protection.');
end;
comment on function arbiter._columns() is
  'The kinds of columns of the app''s tables: types (null: any), and where arbiter adds such a column its definition and meaning. A machine column gets the type of the registry''s ids.';

create or replace function arbiter._base_type(p_type oid)
returns oid
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive bases (id, is_domain) as (
    select t.oid, t.typtype = 'd' from pg_catalog.pg_type t where t.oid = p_type
    union all
    select t.oid, t.typtype = 'd'
      from bases b
      join pg_catalog.pg_type d on d.oid = b.id and b.is_domain
      join pg_catalog.pg_type t on t.oid = d.typbasetype
  )
  select b.id from bases b where not b.is_domain;
end;
comment on function arbiter._base_type(oid) is 'The type that a domain is made from; any other type itself.';

-- A domain is left out: it may reject the rows that are there already.
create or replace function arbiter._id_type(p_table regclass, p_column name)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format_type(arbiter._base_type(a.atttypid), null)
    from pg_catalog.pg_attribute a
   where a.attrelid = p_table
     and a.attname = p_column
     and not a.attisdropped;
end;
comment on function arbiter._id_type(regclass, name) is
  'The type of a column''s ids, without domain and length, for columns that arbiter adds; null when there is no such column.';

-- 1 in one table and 1 in another are the same id, whichever integers they are.
create or replace function arbiter._class_of_type(p_type text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case p_type
  when 'uuid' then 'uuid'
  when 'smallint' then 'bigint'
  when 'integer' then 'bigint'
  when 'bigint' then 'bigint'
  when 'text' then 'text'
  when 'character varying' then 'text'
end;
comment on function arbiter._class_of_type(text) is
  'How ids of a type (_id_type) are written: as uuid, bigint or text; null for a type that cannot be that of ids.';

create or replace function arbiter._id_class(p_table regclass, p_column name)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return arbiter._class_of_type(arbiter._id_type(p_table, p_column));
comment on function arbiter._id_class(regclass, name) is
  'How the ids of a column are written: as uuid, bigint or text; null when it cannot hold ids, or there is no such column.';

create or replace function arbiter._has_column(p_table regclass, p_column name, p_kind text)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_types text[];
  v_type text;
  v_base text;
  v_collation text;
  v_generated "char";
begin
  select c.types into strict v_types from arbiter._columns() c where c.kind = p_kind;
  select format_type(a.atttypid, null), format_type(arbiter._base_type(a.atttypid), null), a.attgenerated,
         (select l.collname from pg_catalog.pg_collation l where l.oid = a.attcollation and not l.collisdeterministic)
    into v_type, v_base, v_generated, v_collation
    from pg_catalog.pg_attribute a
   where a.attrelid = p_table
     and a.attname = p_column
     and a.attnum > 0
     and not a.attisdropped;
  if v_type is null then
    return false;
  end if;
  -- Of other types, and by such a collation, values may be equal and have different texts: 1.0 and 1.00, Ada and ADA.
  if p_kind in ('user', 'machine id', 'machine') and (v_base <> all (v_types) or v_collation is not null) then
    perform arbiter._fail('datatype_mismatch',
      format('column %I of table %s is %s, an id must be %s', p_column, p_table,
        concat_ws(' with the nondeterministic collation ', v_type, quote_ident(v_collation)),
        case when v_collation is null then array_to_string(v_types, ' or ') else 'of a deterministic one' end),
      'arbiter compares the text of ids. Change the type of that column, or name another one in the call; nothing was changed.');
  elsif p_kind not in ('user', 'machine id', 'machine') and v_type <> all (v_types) then
    perform arbiter._fail('datatype_mismatch',
      format('column %I of table %s is %s, it must be %s', p_column, p_table, v_type, array_to_string(v_types, ' or ')),
      'Rename that column, or name another one in the call; nothing was changed.');
  end if;
  -- A trigger sees null in the place of its value, and one before the write also for a stored one.
  if v_generated = 'v' then
    perform arbiter._fail('feature_not_supported',
      format('column %I of table %s is a virtual generated column', p_column, p_table),
      'Make it stored, or name another one in the call; nothing was changed.');
  elsif v_generated = 's' and p_kind = 'health' then
    perform arbiter._fail('feature_not_supported',
      format('column %I of table %s is a generated column', p_column, p_table),
      'Name a column from which it is generated; nothing was changed.');
  end if;
  return true;
end
$$;
comment on function arbiter._has_column(regclass, name, text) is
  'Whether the column exists. p_kind: see _columns(). Error 42804 when it exists with another type, 0A000 when it is virtual, or generated and is to say whether a machine is well.';

create or replace function arbiter._need_column(p_table regclass, p_column name, p_kind text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not arbiter._has_column(p_table, p_column, p_kind) then
    perform arbiter._fail('undefined_column',
      format('table %s has no column %I', p_table, p_column),
      'Name the column in the call; nothing was changed.');
  end if;
end
$$;
comment on function arbiter._need_column(regclass, name, text) is
  'Error 42703 when the column is missing, 42804 and 0A000 as _has_column().';

-- While one table is locked the wait for the next is shorter than deadlock_timeout: clients that write both would
-- deadlock with a longer wait.
create or replace function arbiter._lock_tables(p_tables regclass[], p_mode text)
returns void
language plpgsql
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
        perform set_config('lock_timeout', '200ms', true) where i = 2;
        execute format('lock table %s in %s mode', v_tables[i], p_mode);
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
comment on function arbiter._lock_tables(regclass[], text) is
  'Locks tables for the transaction, all in one moment. p_mode as for LOCK TABLE. Error 55P03 when that takes more than 5 s.';
