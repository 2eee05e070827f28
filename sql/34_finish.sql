-- What protect() leaves to the end of an installation, because it reads whole tables: each statement runs after the
-- transaction that takes the strong locks, in one of its own.

create or replace function arbiter._finish_statements()
returns setof text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select s.statement
    from (
      -- The foreign key needs it: without an index, deleting a machine reads the whole table.
      select 1, k.conrelid, k.conname,
             format('create index %I on %s (%I) where %3$I is not null',
               format('arbiter_%s_machine_idx', left(c.relname, 40)), k.conrelid::regclass, a.attname)
        from pg_catalog.pg_constraint k
        join pg_catalog.pg_class c on c.oid = k.conrelid
        join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
       where k.conname = 'arbiter_machine_id_fkey'
         and k.coninhcount = 0
         and not exists (
           select from pg_catalog.pg_index i where i.indrelid = k.conrelid and i.indkey[0] = k.conkey[1])
      union all
      select 2, k.conrelid, k.conname, format('alter table %s validate constraint %I', k.conrelid::regclass, k.conname)
        from pg_catalog.pg_constraint k
       where k.conname in ('arbiter_source_check', 'arbiter_machine_id_fkey')
         and not k.convalidated
         and k.conparentid = 0
         and k.coninhcount = 0
    ) as s (step, table_id, constraint_name, statement)
   order by s.step, s.table_id, s.constraint_name;
end;
comment on function arbiter._finish_statements() is
  'The statements that finish what protect() has begun, each for a transaction of its own: an index, for which writers wait while it reads the table, and the validation of constraints, for which they do not.';
