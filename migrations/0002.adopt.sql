-- Adopts public.cloud_machines and public.signals where they exist: adds the columns that are
-- missing and marks them as arbiter's by their comment, so that an uninstall can tell them from
-- the app's own. The guard is attached afterwards, by sql/95_adopt.sql, on every install.
--
-- Millions of rows are no obstacle: a constant default and a nullable column need no rewrite, and
-- the constraints are `not valid` here; the installer validates them in transactions of their own.
-- Existing rows become `local`; their arbiter_xid stays null, which says "older than protection".

set local lock_timeout = '5s';

do $adopt$
declare
  v_column record;
  v_constraint record;
  v_tables regclass[] := array_remove(array[to_regclass('public.signals'), to_regclass('public.cloud_machines')], null);
  v_give_up_at timestamptz := clock_timestamp() + interval '5 seconds';
begin
  -- Both tables in one moment. While one is held the wait for the other is short, shorter than
  -- deadlock_timeout: clients that write both would deadlock with a longer one.
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
    select c.table_name, c.column_name, c.definition, c.meaning
      from (values
        ('cloud_machines', 'last_health_check', 'timestamptz',
          'arbiter: the last heartbeat, stamped with the database''s clock whatever the client sent.'),
        ('signals', 'source', 'text not null default ''local''',
          'arbiter: the environment that wrote the row, local (browser) or cloud (machine).'),
        ('signals', 'machine_id', 'uuid',
          'arbiter: the machine that wrote the row when source is cloud.'),
        ('signals', 'arbiter_xid', 'xid8',
          'arbiter: the transaction that wrote the row; null on rows older than protection.')
      ) as c (table_name, column_name, definition, meaning)
     where to_regclass('public.' || c.table_name) is not null
       and not exists (
         select from pg_catalog.pg_attribute a
          where a.attrelid = to_regclass('public.' || c.table_name)
            and a.attname = c.column_name
            and not a.attisdropped)
  loop
    execute format('alter table public.%I add column %I %s',
      v_column.table_name, v_column.column_name, v_column.definition);
    execute format('comment on column public.%I.%I is %L',
      v_column.table_name, v_column.column_name, v_column.meaning);
  end loop;

  for v_constraint in
    select c.constraint_name, c.column_name, c.definition
      from (values
        ('arbiter_source_check', 'source', 'check (source in (''local'', ''cloud''))'),
        ('arbiter_machine_id_fkey', 'machine_id',
          'foreign key (machine_id) references public.cloud_machines (id) on delete set null')
      ) as c (constraint_name, column_name, definition)
      join pg_catalog.pg_attribute a
        on a.attrelid = to_regclass('public.signals')
       and a.attname = c.column_name
       and col_description(a.attrelid, a.attnum) like 'arbiter: %'
      join pg_catalog.pg_class t on t.oid = a.attrelid and t.relkind = 'r'
     where (c.column_name <> 'machine_id' or to_regclass('public.cloud_machines') is not null)
       and not exists (
         select from pg_catalog.pg_constraint k
          where k.conrelid = a.attrelid and k.conname = c.constraint_name)
  loop
    execute format('alter table public.signals add constraint %I %s not valid',
      v_constraint.constraint_name, v_constraint.definition);
  end loop;
end
$adopt$;
