-- Every query of the package, by name. Parameters are psycopg's; casts make them independent of
-- the caller's adapters.

-- name: status
select * from arbiter.status(%(user_id)s::text)

-- name: confirm_takeover
select * from arbiter.confirm_takeover(%(user_id)s::text)

-- name: heartbeat
select arbiter.heartbeat(%(machine_id)s::text)

-- name: heartbeats
select arbiter.heartbeats(%(machine_ids)s::text[])

-- name: handovers
-- One user's handovers by epoch, which does not depend on a clock; those of all users by the instant.
select user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
       handed_over_at, xid::text::bigint as xid, snapshot::text as snapshot, exact
  from (
    select *
      from arbiter.handovers h
     where %(user_id)s::text is null or h.user_id = arbiter._user_text(%(user_id)s::text)
     order by case when %(user_id)s::text is not null then h.epoch end desc,
              h.handed_over_at desc, h.user_id desc, h.epoch desc
     limit %(limit)s::bigint
  ) as newest
 order by case when %(user_id)s::text is not null then epoch end,
          handed_over_at, user_id, epoch

-- name: audit
select finding, reason, user_id, row_table::text as row_table, row_key, source, machine_id,
       xid::text::bigint as xid, epoch, holder, holder_machine_id, row_count
  from arbiter.audit(%(table)s::text::regclass, p_verbose => true)

-- name: protected_tables
select p.protected_table::text as name, p.evidence
  from arbiter.protections p
  join pg_catalog.pg_class c on c.oid = p.protected_table::oid
 order by p.protection_id

-- name: protection
-- What protect() has found and kept, for people.
select format('%%I.%%I ', c.relnamespace::regnamespace, c.relname)
       || arbiter._protection_text(p.mode, p.user_path, p.machine_column, p.unowned)
  from arbiter.protections p
  join pg_catalog.pg_class c on c.oid = p.protected_table
 where p.protected_table = %(table)s::text::regclass

-- name: observed_tables
select format('%%I.%%I', c.relnamespace::regnamespace, c.relname) as table, p.mode_since as since,
       count(o.observation_id) as writes, max(o.observed_at) as last_at
  from arbiter.protections p
  join pg_catalog.pg_class c on c.oid = p.protected_table
  left join arbiter.observations o on o.protected_table = p.protected_table and o.observed_at >= p.mode_since
 where p.mode = 'observe'
 group by p.protection_id, c.oid
 order by 1

-- name: observations
-- Those since the table is observed; of a table that is not, all.
select format('%%I.%%I', c.relnamespace::regnamespace, c.relname) as table, date_trunc('hour', o.observed_at) as hour,
       o.detail ->> 'user_id' as user_id, o.code, count(*) as writes, max(o.observed_at) as last_at
  from arbiter.observations o
  join pg_catalog.pg_class c on c.oid = o.protected_table
  left join arbiter.protections p on p.protected_table = o.protected_table and p.mode = 'observe'
 where o.observed_at >= coalesce(p.mode_since, '-infinity')
 group by 1, 2, 3, 4
 order by 1, 2, 3, 4

-- name: lost_protections
select object || ': '::text || problem || ' Remedy: '::text || remedy from arbiter._lost_protections()

-- name: protect
select arbiter.protect(
  p_table => %(table)s::text::regclass,
  p_user_path => %(user_path)s::text,
  p_verbs => %(verbs)s::text[],
  p_machine_column => %(machine_column)s::text::name,
  p_mode => %(mode)s::text,
  p_unowned => %(unowned)s::text,
  p_evidence => %(evidence)s::boolean)

-- name: unprotect
select arbiter.unprotect(%(table)s::text::regclass)

-- name: register_machines
select arbiter.register_machines(
  p_registry => %(registry)s::text::regclass,
  p_id_column => %(id_column)s::text::name,
  p_user_column => %(user_column)s::text::name,
  p_status_column => %(status_column)s::text::name,
  p_heartbeat_column => %(heartbeat_column)s::text::name,
  p_states => %(states)s::jsonb,
  p_machine_statuses => %(machine_statuses)s::text[],
  p_health_column => %(health_column)s::text::name,
  p_healthy => %(healthy)s::text[])

-- name: version
select arbiter.version()

-- name: machine_settings
-- The settings that a machine needs, and a limit for its transaction: a heartbeat that the server could
-- not do within heartbeat_timeout must not be done later, in the name of a client that is gone.
select heartbeat_interval, heartbeat_timeout
  from arbiter.settings,
       set_config('statement_timeout', ceil(extract(epoch from heartbeat_timeout) * 1000::numeric)::text, true)

-- name: stranger
-- Whose functions this role would run, unless that is the owner of the database, or one with the rights of this role.
-- A superuser runs none but a superuser's.
select pg_get_userbyid(n.nspowner)
  from pg_catalog.pg_namespace n
  join pg_catalog.pg_database d on d.datname = current_database()
  join pg_catalog.pg_roles r on r.rolname = current_user
 where n.nspname = 'arbiter'::name
   and not pg_has_role(n.nspowner, r.oid, 'usage'::text)
   and (r.rolsuper or n.nspowner <> d.datdba)

-- name: has_version
select to_regprocedure('arbiter.version()') is not null as has_version

-- name: has_schema
select to_regnamespace('arbiter') is not null

-- name: is_attached
-- False after an uninstall that was cut short: the function may then outlive the tables.
select to_regprocedure('arbiter._detach_all(boolean)') is not null
   and to_regclass('arbiter.protections') is not null

-- name: detach_all
select * from arbiter._detach_all(%(drop_columns)s::boolean)

-- name: has_leave_columns
select to_regprocedure('arbiter._leave_columns(boolean)') is not null

-- name: leave_columns
select * from arbiter._leave_columns(%(drop_columns)s::boolean)

-- name: finish_statements
select * from arbiter._finish_statements()

-- name: need_client_role
select arbiter._need_client_role(%(role)s::text::name)

-- name: name_client_role
-- Before the functions of sql/, which grant it what it needs and make policies for it.
insert into arbiter.client_roles (role) values (%(role)s::text::name) on conflict do nothing

-- name: plan
select step, table_name as table, finding, remedy from arbiter._plan()

-- name: say_plan
-- For scripts, as they are: no parameters, so no doubled percent signs.
do $say$
begin
  perform arbiter._say(array(
    select format('%s: %s %s%s', p.step, p.table_name, p.finding, '. ' || p.remedy) from arbiter._plan() p));
end
$say$

-- name: summary
select * from arbiter._summary()

-- name: say_summary
do $say$
begin
  perform arbiter._say(array(select s.line from arbiter._summary() as s (line)));
end
$say$

-- name: adopt_columns
-- The preflight has left them there, for a migration that runs in another connection.
select current_setting('arbiter.adopt_columns')

-- name: set_adopt_columns
select set_config('arbiter.adopt_columns', %(adopt_columns)s::text, false)

-- name: lock_settings
-- The connection that holds the installers' lock idles in its transaction while others work.
-- By name from pg_settings, because transaction_timeout is new in PostgreSQL 17.
select set_config(name, case name when 'lock_timeout' then '5min' else '0' end, true)
  from pg_settings
 where name in ('lock_timeout', 'statement_timeout', 'transaction_timeout',
                'idle_in_transaction_session_timeout')

-- name: lock
-- One constant for all installers of one database: the letters of the word arbiter as a bigint,
-- which nothing else is likely to lock.
select pg_advisory_xact_lock(27428839742530930)

-- name: lock_holders
-- The server shows the two halves of the key as two columns.
select format('pid %%s, role %%s, application %%s, since %%s',
              l.pid, a.usename, coalesce(nullif(a.application_name, ''), 'without a name'), a.backend_start)
  from pg_locks l
  left join pg_stat_activity a using (pid)
 where l.locktype = 'advisory'
   and l.granted
   and l.database = (select oid from pg_database where datname = current_database())
   and (l.classid::bigint << 32 | l.objid::bigint, l.objsubid) = (27428839742530930, 1)

-- name: dependents
-- The objects of the app that `drop schema arbiter cascade` would take with it: objects outside the
-- schema that depend on a table, view, function or type inside. Temporary objects of clients do not count.
select distinct pg_describe_object(d.classid, d.objid, d.objsubid)
  from pg_depend d
 cross join pg_identify_object_as_address(d.classid, d.objid, d.objsubid) as o
 where d.deptype in ('n', 'a')
   and (d.refclassid, d.refobjid) in (
     select 'pg_class'::regclass, oid from pg_class where relnamespace = to_regnamespace('arbiter')
     union all
     select 'pg_proc'::regclass, oid from pg_proc where pronamespace = to_regnamespace('arbiter')
     union all
     select 'pg_type'::regclass, oid from pg_type where typnamespace = to_regnamespace('arbiter'))
   and o.object_names[1] <> 'arbiter'
  and o.object_names[1] !~ '^pg_temp'
   and o.object_names[1] not like 'arbiter.%%'
 order by 1

-- name: drop_schema
drop schema if exists arbiter cascade

-- name: unit_settings
-- Before each unit of an install: names do not depend on the caller's search_path, a busy table
-- makes the install give up instead of queueing every other client behind it, and a scan may take
-- as long as it takes.
set local search_path to arbiter;
set local lock_timeout to '5s';
set local statement_timeout to 0;

-- name: save_settings
-- Around a file that a migration tool runs in its own transaction: the tool then writes its history, by its own
-- search_path.
do $save$
begin
  perform pg_catalog.set_config('arbiter.caller_settings', pg_catalog.jsonb_object_agg(s.name, s.setting)::text, true)
     from (
       select n.name, pg_catalog.current_setting(n.name) as setting
         from pg_catalog.unnest('{search_path,lock_timeout,statement_timeout}'::text[]) as n (name)) as s;
end
$save$

-- name: restore_settings
do $restore$
begin
  perform pg_catalog.set_config(s.key, s.value, true)
     from pg_catalog.jsonb_each_text(pg_catalog.current_setting('arbiter.caller_settings')::jsonb) s;
end
$restore$

-- name: session_settings
-- The same for yoyo's connections, which are opened and closed by an install.
set search_path to arbiter;
set lock_timeout to '5s';
set statement_timeout to 0;

-- name: script_lock
-- The same lock, without a result that psql would print.
do $lock$ begin perform pg_catalog.pg_advisory_xact_lock(27428839742530930); end $lock$;

-- name: finish
-- Where one transaction is all there is. The index last, because writers wait for it until the end.
do $finish$
declare
  v_statement text;
begin
  for v_statement in select u.statement from arbiter._finish_statements() as u (statement) order by u.statement loop
    execute v_statement;
  end loop;
end
$finish$
