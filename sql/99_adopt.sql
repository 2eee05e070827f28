-- Runs last: generates anew what depends on the app's names and roles, and on the first installation adopts the tables
-- that the migrations have prepared.

do $adopt$
declare
  v_adopt record;
begin
  -- Before any table of the app, as protect() and register_machines() do. _build_machine_may_write() waits for a change
  -- of the settings in flight, and no write of the app must wait with it.
  lock table arbiter.protections, arbiter.registry, arbiter.settings in share row exclusive mode;
  perform arbiter._lock_for_upgrade();
  perform arbiter._drop_left_over();
  perform arbiter._forget_dropped();
  perform arbiter._renew_record();
  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._own_triggers() t;
  -- In a database in which the row was deleted past its trigger, or before there was one.
  insert into arbiter.settings default values on conflict on constraint settings_pkey do nothing;
  perform arbiter._build_machine_may_write();
  perform arbiter._build_registry();
  perform arbiter._open_machines();
  perform arbiter._build_guard(p.protection_id)
     from (
       select r.protection_id
         from arbiter.protections r
         join pg_catalog.pg_class c on c.oid = r.protected_table
        order by r.protection_id) as p;
  perform arbiter._build_policies();
  perform arbiter._expose(s.schema_name) from (select distinct e.schema_name from arbiter._exposed() e) as s;
  v_adopt := arbiter._to_adopt();
  perform arbiter._lock_tables(array_remove(array[v_adopt.signals, v_adopt.registry], null), 'access exclusive');
  if v_adopt.registry is not null then
    perform arbiter.register_machines(v_adopt.registry);
  end if;
  if v_adopt.signals is not null then
    perform arbiter.protect(v_adopt.signals);
  end if;
end
$adopt$;
