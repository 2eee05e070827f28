-- What `arbiter-db uninstall` runs before it drops the schema.

create or replace function arbiter._detach_all(p_drop_columns boolean)
returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_table regclass;
  v_constraint name;
begin
  -- Before any table of the app, as protect() and register_machines() do.
  lock table arbiter.protections, arbiter.registry in share row exclusive mode;
  perform arbiter._forget_dropped();
  for v_table in select p.protected_table from arbiter.protections p order by p.protection_id loop
    perform arbiter.unprotect(v_table);
  end loop;
  for v_table in delete from arbiter.registry r returning r.registry loop
    perform arbiter._detach(v_table);
  end loop;
  perform arbiter._build_policies();
  perform arbiter.unexpose(s.schema_name) from (select distinct e.schema_name from arbiter._exposed() e) as s;
  -- The registry's columns cannot be dropped while this view uses them.
  drop view if exists arbiter.machines;
  for v_table, v_constraint in
    select k.conrelid::regclass, k.conname
      from pg_catalog.pg_constraint k
     where k.conname in ('arbiter_source_check', 'arbiter_machine_id_fkey')
       and k.coninhcount = 0
  loop
    execute format('alter table %s drop constraint %I', v_table, v_constraint);
  end loop;
  for v_table in
    select c.oid::regclass
      from pg_catalog.pg_class c
     where c.relkind = 'i' and c.relname ~ '^arbiter_.*_machine_idx$'
  loop
    execute format('drop index %s', v_table);
  end loop;
  return query select arbiter._leave_columns(p_drop_columns);
end
$$;
comment on function arbiter._detach_all(boolean) is
  'Takes arbiter off every table of the app, and with true drops the columns that it added. One line for each column left or dropped.';
