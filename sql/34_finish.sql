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
      select 1, t.id, null, format('select arbiter._add_machine_index(%L)', t.id)
        from (select p.protected_table from arbiter.protections p) as t (id)
       where arbiter._lacks_machine_index(t.id)
      union all
      select 2, a.attached_to, a.name, format('alter table %s validate constraint %I', a.attached_to, a.name)
        from arbiter.attachments a
        join pg_catalog.pg_constraint k on k.conrelid = a.attached_to and k.conname = a.name
       where a.kind = 'constraint'
         and not k.convalidated
         and arbiter._ownership('constraint', a.attached_to, a.name) = 'ours'
    ) as s (step, table_id, constraint_name, statement)
   order by s.step, s.table_id, s.constraint_name;
end;
comment on function arbiter._finish_statements() is
  'The statements that finish what protect() has begun, each for a transaction of its own: an index, for which writers wait while it reads the table, and the validation of constraints, for which they do not.';
