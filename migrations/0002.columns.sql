-- Adds the columns that public.cloud_machines and public.signals are missing, where these tables exist. Guard, policies
-- and constraints are attached by sql/99_adopt.sql, on every install.
--
-- Millions of rows are no obstacle: a constant default and nullable columns need no rewrite. Existing rows become
-- local; their arbiter_xid stays null, which means older than protection.
--
-- A migration is frozen once it is released, so it calls no function that a later version may change. The columns are
-- those of arbiter._columns() and the lock is arbiter._lock_tables() (sql/01_basics.sql), the record is
-- arbiter._record() (sql/02_record.sql); test_migrations holds the columns together.

set local lock_timeout = '5s';

do $columns$
declare
  v_columns text[] := array[
    ['cloud_machines', 'last_health_check', 'timestamptz',
      'the last heartbeat, stamped with the database''s clock in place of the value that the client sent.'],
    ['signals', 'source', 'text not null default ''local''',
      'the environment that wrote the row, local (browser) or cloud (machine).'],
    ['signals', 'machine_id', 'uuid',
      'the machine that wrote the row when source is cloud.'],
    ['signals', 'arbiter_xid', 'xid8',
      'the transaction that wrote the row; null on rows older than protection.']];
  v_column text[];
  v_missing text[] := '{}';
  v_tables regclass[] := '{}';
  v_give_up_at timestamptz := clock_timestamp() + interval '5 seconds';
begin
  foreach v_column slice 1 in array v_columns loop
    if exists (
      select from pg_catalog.pg_class c
       where c.oid = to_regclass('public.' || v_column[1])
         and c.relkind in ('r', 'p')
         and not exists (
           select from pg_catalog.pg_attribute a
            where a.attrelid = c.oid and a.attname = v_column[2] and not a.attisdropped))
    then
      v_missing := v_missing || array[v_column];
      v_tables := array_remove(v_tables, to_regclass('public.' || v_column[1])) || to_regclass('public.' || v_column[1]);
    end if;
  end loop;
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

  foreach v_column slice 1 in array v_missing loop
    execute format('alter table public.%I add column %I %s', v_column[1], v_column[2], v_column[3]);
    execute format('comment on column public.%I.%I is %L', v_column[1], v_column[2], 'arbiter: ' || v_column[4]);
    insert into arbiter.attachments (kind, attached_to, name, shape, object_id, database_id, cluster)
    select 'column', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnum::integer::oid,
           d.oid, c.system_identifier
      from pg_catalog.pg_attribute a, pg_catalog.pg_database d, pg_catalog.pg_control_system() c
     where a.attrelid = format('public.%I', v_column[1])::regclass
       and a.attname = v_column[2]
       and d.datname = current_database()
    on conflict on constraint attachments_pkey do update
      set shape = excluded.shape,
          object_id = excluded.object_id,
          database_id = excluded.database_id,
          cluster = excluded.cluster;
  end loop;
end
$columns$;
