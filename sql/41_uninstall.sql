-- What `arbiter-db uninstall` runs before it drops the schema.

create or replace function arbiter._detach_all(p_drop_columns boolean)
returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_table regclass;
  v_object record;
begin
  -- Before any table of the app, as protect() and register_machines() do.
  lock table arbiter.protections, arbiter.registry in share row exclusive mode;
  perform arbiter._forget_dropped();
  for v_table in select p.protected_table from arbiter.protections p loop
    perform arbiter.unprotect(v_table);
  end loop;
  for v_table in delete from arbiter.registry r returning r.registry loop
    perform arbiter._detach(v_table);
  end loop;
  perform arbiter._build_policies();
  perform arbiter.unexpose(s.schema_name) from (select distinct e.schema_name from arbiter._exposed() e) as s;
  -- The registry's columns cannot be dropped while this view uses them.
  drop view if exists arbiter.machines;
  for v_object in
    select a.kind, a.attached_to, a.name
      from arbiter.attachments a
     where a.kind in ('constraint', 'index')
       and arbiter._ownership(a.kind, a.attached_to, a.name) = 'ours'
  loop
    if v_object.kind = 'constraint' then
      execute format('alter table %s drop constraint %I', v_object.attached_to, v_object.name);
    else
      execute (
        select format('drop index %s', i.object_id::regclass)
          from arbiter._find('index', v_object.attached_to, v_object.name) i);
    end if;
  end loop;
  return query select arbiter._leave_columns(p_drop_columns);
end
$$;
comment on function arbiter._detach_all(boolean) is
  'Takes arbiter off every table of the app, and with true drops the columns that it added. One line for each column left or dropped.';
