-- Adds the columns that the tables of an installation are missing. Guard, policies and constraints are attached by
-- sql/99_adopt.sql, on every install.
--
-- Which tables and columns these are, sql/06_adoption.sql has decided and left in a setting, because a migration is
-- frozen once it is released and calls no function that a later version may change. The definitions are those of
-- arbiter._columns() and the lock is arbiter._lock_tables() (sql/01_basics.sql), the record is arbiter._record()
-- (sql/02_record.sql); test_migrations holds the columns together.
--
-- Millions of rows are no obstacle: a constant default and nullable columns need no rewrite. Existing rows become
-- local; their arbiter_xid stays null, which means older than protection.

set local lock_timeout = '5s';

do $columns$
declare
  v_missing jsonb[] := array(
    select m.value
      from jsonb_array_elements(nullif(current_setting('arbiter.adopt_columns', true), '')::jsonb) as m
     where not exists (
       select from pg_catalog.pg_attribute a
        where a.attrelid = (m.value ->> 'table')::regclass
          and a.attname = m.value ->> 'column'
          and not a.attisdropped));
  v_tables regclass[] := array(select distinct (m.value ->> 'table')::regclass from unnest(v_missing) as m (value));
  v_column record;
  v_give_up_at timestamptz := clock_timestamp() + interval '5 seconds';
begin
  -- No lock where there is nothing to do: this may run again on a busy database.
  if v_tables = '{}' then
    return;
  end if;

  loop
    begin
      for i in 1 .. cardinality(v_tables) loop
        perform set_config('lock_timeout', case when i = 1 then '5s' else '200ms' end, true);
        execute format('lock table %s in access exclusive mode', v_tables[i]);
      end loop;
      exit;
    exception
      when lock_not_available then
        if clock_timestamp() >= v_give_up_at then
          raise;
        end if;
    end;
    v_tables := v_tables[2:] || v_tables[1];
  end loop;
  perform set_config('lock_timeout', '5s', true);

  for v_column in
    select (m.value ->> 'table')::regclass as of_table, m.value ->> 'column' as name,
           coalesce(k.definition, (m.value ->> 'type')::regtype::text) as definition, k.meaning
      from unnest(v_missing) as m (value)
      join (values
        ('heartbeat', 'timestamptz',
          'the last heartbeat, stamped with the database''s clock in place of the value that the client sent.'),
        ('source', 'text not null default ''local''',
          'the environment that wrote the row, local (browser) or cloud (machine).'),
        ('machine', null,
          'the machine that wrote the row when source is cloud.'),
        ('xid', 'xid8',
          'the transaction that wrote the row; null on rows older than protection.')) as k (kind, definition, meaning)
        on k.kind = m.value ->> 'kind'
  loop
    execute format('alter table %s add column %I %s', v_column.of_table, v_column.name, v_column.definition);
    execute format('comment on column %s.%I is %L', v_column.of_table, v_column.name, 'arbiter: ' || v_column.meaning);
    insert into arbiter.attachments (kind, attached_to, name, shape, object_id, database_id, cluster)
    select 'column', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnum::integer::oid,
           d.oid, c.system_identifier
      from pg_catalog.pg_attribute a, pg_catalog.pg_database d, pg_catalog.pg_control_system() c
     where a.attrelid = v_column.of_table
       and a.attname = v_column.name
       and d.datname = current_database()
    on conflict on constraint attachments_pkey do update
      set shape = excluded.shape,
          object_id = excluded.object_id,
          database_id = excluded.database_id,
          cluster = excluded.cluster;
  end loop;
end
$columns$;
