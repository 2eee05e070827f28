-- Runs last: generates anew what depends on the app's names and roles, and adopts the tables of the plan
-- (06_adoption.sql). 20_ids.sql has locked arbiter's own tables.

do $adopt$
declare
  v_registry regclass;
  v_tables jsonb;
begin
  perform arbiter._lock_for_upgrade();
  perform arbiter._drop_left_over();
  perform arbiter._forget_dropped();
  perform arbiter._renew_record();
  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._own_triggers() t;
  -- In a database in which the row was deleted past its trigger, or before there was one.
  insert into arbiter.settings default values on conflict on constraint settings_pkey do nothing;
  perform arbiter._build_settings();
  perform arbiter._build_enforced();
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
  -- Decided before anything is adopted: the registry decides which column names the machine.
  select r.table_name into v_registry from arbiter._registry_steps() r where r.step = 'register';
  select coalesce(jsonb_agg(to_jsonb(p)), '[]')
    into v_tables
    from arbiter._protect_steps() p
   where p.step = 'protect';
  perform arbiter._lock_tables(
    array(select (t.value ->> 'table_name')::regclass from jsonb_array_elements(v_tables) t)
      || case when v_registry is not null then array[v_registry] else '{}' end, 'access exclusive');
  if v_registry is not null then
    perform arbiter.register_machines(v_registry);
  end if;
  perform arbiter.protect(
            t.table_name, p_user_path => t.user_path, p_machine_column => t.machine_column, p_mode => t.mode,
            p_unowned => t.unowned)
     from jsonb_to_recordset(v_tables) as t (
       table_name regclass, user_path text, machine_column name, mode text, unowned text);
  -- What the preflight has left in the session for a migration.
  perform set_config('arbiter.adopt_columns', '', false);
end
$adopt$;
