-- The plan of an installation: what 06_adoption.sql has decided, and what a DBA should know of these tables before.
-- `install --plan` prints it. At the end the preflight, which ends the installation before anything is changed.

create or replace function arbiter._default_states()
returns jsonb
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select '{
    "provisioning": "starting", "starting": "starting",
    "running": "running", "active": "running", "started": "running",
    "stopping": "stopping", "deprovisioning": "stopping",
    "stopped": "stopped", "deleted": "stopped", "suspended": "stopped",
    "error": "error", "failed": "error"}'::jsonb;
end;
comment on function arbiter._default_states() is 'The machine states of common status words.';

create or replace function arbiter._state_sql(p_states jsonb, p_status text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('coalesce(%L::jsonb ->> %s::text, ''running'')', p_states, p_status);
end;
comment on function arbiter._state_sql(jsonb, text) is
  'SQL for the machine state of a status word. A word that is not mapped counts as running, because the machine may be alive.';

create or replace function arbiter._heartbeat_indexes(p_registry regclass, p_heartbeat_column name)
returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select i.indexrelid::regclass
    from pg_catalog.pg_index i
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attname = p_heartbeat_column
   where i.indrelid = p_registry
     and exists (
       select from pg_catalog.pg_depend d
        where d.classid = 'pg_class'::regclass
          and d.objid = i.indexrelid
          and d.refobjid = i.indrelid
          and d.refobjsubid = a.attnum)
   order by i.indexrelid;
end;
comment on function arbiter._heartbeat_indexes(regclass, name) is
  'Indexes that read the heartbeat column, in their keys or their predicate: with one, no heartbeat is a HOT update.';

create or replace function arbiter._registry_notes(p_registry regclass, p_is_kept boolean)
returns table (step text, finding text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id name := 'id';
  v_user name := 'user_id';
  v_status name := 'status';
  v_heartbeat name := 'last_health_check';
  v_health name;
  v_states jsonb := arbiter._default_states();
  v_timeout interval := '30 seconds';
  v_has_heartbeat boolean;
  v_machines bigint;
  v_silent bigint;
  v_words text;
  v_hint text;
begin
  if p_is_kept then
    select r.id_column, r.user_column, r.status_column, r.heartbeat_column, r.health_column, r.states
      into v_id, v_user, v_status, v_heartbeat, v_health, v_states
      from arbiter.registry r;
    select s.heartbeat_timeout into v_timeout from arbiter.settings s;
  end if;
  begin
    perform arbiter._need_registry(p_registry, v_id, v_user, v_status, v_heartbeat);
    perform arbiter._need_health_column(p_registry, v_health, v_status, v_heartbeat);
  exception
    when others then
      get stacked diagnostics v_words = message_text, v_hint = pg_exception_hint;
      step := 'warning';
      select s.reason, s.remedy into finding, remedy from arbiter._skip_reason(v_words, v_hint) s;
      if finding is null then
        raise;
      end if;
      return next;
      return;
  end;
  v_has_heartbeat := arbiter._has_column(p_registry, v_heartbeat, 'heartbeat');
  execute format(
    'select count(*), count(*) filter (where %s = ''running'' and coalesce(%s < clock_timestamp() - $1, true)) from %s r',
    arbiter._state_sql(v_states, format('r.%I', v_status)),
    case when v_has_heartbeat then format('r.%I', v_heartbeat) else 'null::timestamptz' end,
    p_registry)
    into v_machines, v_silent
    using v_timeout;
  step := 'note';
  finding := format('machines: %s; columns %s, %s, %s, %s%s',
    v_machines, quote_ident(v_id), quote_ident(v_user), concat_ws(', ', quote_ident(v_status), quote_ident(v_health)),
    quote_ident(v_heartbeat),
    case when v_has_heartbeat then '' else ' (is added)' end);
  return next;
  step := 'warning';
  if v_silent > 0 then
    finding := format('machines whose status says that they run, without a heartbeat in the last %s s: %s',
      extract(epoch from v_timeout)::float, v_silent);
    remedy := 'arbiter rejects the writes of such a machine (WX004) until it sends heartbeats: arbiter.heartbeat().';
    return next;
  end if;
  execute format(
    'select string_agg(distinct quote_literal(r.%1$I), '', '' order by quote_literal(r.%1$I)) from %2$s r where not (%3$L::jsonb ? r.%1$I::text)',
    v_status, p_registry, v_states)
    into v_words;
  if v_words is not null then
    finding := format('status words that are not mapped count as running: %s', v_words);
    remedy := 'Map them: arbiter-db register-machines --states.';
    return next;
  end if;
  select string_agg(i.name::text, ', ' order by i.name::text)
    into v_words
    from arbiter._heartbeat_indexes(p_registry, v_heartbeat) as i (name);
  if v_words is not null then
    finding := format('no heartbeat can be a HOT update while an index reads %I: %s', v_heartbeat, v_words);
    remedy := 'Drop it if you can.';
    return next;
  end if;
  if not exists (
    select from pg_catalog.pg_index i
      join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attname = v_user
     where i.indrelid = p_registry and i.indisvalid and i.indkey[0] = a.attnum and i.indpred is null)
  then
    finding := format('no index begins with %I, so looking up the machines of a user reads the whole table', v_user);
    remedy := format('create index on %s (%I);', p_registry, v_user);
    return next;
  end if;
  step := 'note';
  if v_health is null then
    select a.attname
      into v_health
      from pg_catalog.pg_attribute a
      join pg_catalog.pg_type t on t.oid = a.atttypid and t.typcategory in ('S', 'E')
     where a.attrelid = p_registry and a.attname in ('health_status', 'health') and a.attname <> v_status
     order by a.attname desc
     limit 1;
    if found then
      finding := format('column %I may say that a machine is not well, and every heartbeat counts all the same', v_health);
      remedy := format('If a monitor stamps %I then, too: ', v_heartbeat) || case
        when p_is_kept then 'call arbiter.register_machines() again with p_health_column and p_healthy, and with the other options as they are.'
        else format('arbiter-db register-machines %s --health-column %I --healthy WORD', arbiter._shell_word(p_registry),
          v_health) end;
      return next;
    end if;
  end if;
end
$$;
comment on function arbiter._registry_notes(regclass, boolean) is
  'What a DBA should know of a registry. p_is_kept: by the columns that were declared, else by the usual ones. Reads the table.';

-- The users of a row, without the views of a guard, which do not exist yet. A text beside a registry of uuids is read
-- as a uuid, as the guard does.
create or replace function arbiter._plain_users(p_table regclass, p_user_path text, p_user_class text)
returns table (value text, is_strange text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table regclass;
  v_way record;
  v_key record;
begin
  for v_way in select w.steps, cardinality(w.steps) as last from arbiter._ways(p_user_path) w loop
    v_table := p_table;
    value := format('t.%I', v_way.steps[1]);
    for i in 1 .. v_way.last - 1 loop
      v_key := arbiter._need_foreign_key(v_table, v_way.steps[i], p_user_path);
      value := format('(select p.%I from %s p where p.%I = %s limit 1)',
        v_way.steps[i + 1], v_key.parent, v_key.parent_column, value);
      v_table := v_key.parent;
    end loop;
    value := value || '::text';
    is_strange := 'false';
    if p_user_class = 'uuid' and arbiter._id_class(v_table, v_way.steps[v_way.last]) = 'text' then
      is_strange := format('%s is not null and (%s) is null', value, arbiter._any_id_expression('uuid', value));
      value := arbiter._normal_expression('uuid', value);
    end if;
    value := value || ' collate "C"';
    return next;
  end loop;
end
$$;
comment on function arbiter._plain_users(regclass, text, text) is
  'SQL for the users to whom the ways of a row lead, as texts, and for whether the registry can have no such user; the row is t. p_user_class: of the registry''s users, as _id_class(); null without a registry.';

create or replace function arbiter._table_notes(p_table regclass, p_user_path text, p_unowned text, p_user_class text)
returns table (step text, finding text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_users text[];
  v_strange text;
  v_found text;
  v_rows bigint;
  v_without bigint;
  v_differ bigint;
  v_strangers bigint;
begin
  select array_agg(u.value), string_agg(u.is_strange, ' or ')
    into v_users, v_strange
    from arbiter._plain_users(p_table, p_user_path, p_user_class) u;
  execute format('select count(*), count(*) filter (where coalesce(%1$s) is null), count(*) filter (where %2$s), '
      'count(*) filter (where %3$s) from %4$s t',
    array_to_string(v_users, ', '),
    arbiter._differ_expression(v_users),
    v_strange,
    p_table)
    into v_rows, v_without, v_differ, v_strangers;
  step := 'note';
  finding := format('rows: %s, %s; they stay as they are and count as local', v_rows,
    pg_size_pretty(coalesce((select sum(pg_table_size(f.relid)) from pg_partition_tree(p_table) f), pg_table_size(p_table))));
  if v_rows > 0 then
    return next;
  end if;
  step := case p_unowned when 'reject' then 'warning' else 'note' end;
  if v_without > 0 then
    finding := format('rows without a user: %s', v_without);
    remedy := case p_unowned
      when 'reject' then 'New ones are rejected (WX005). If your backend writes them: --unowned allow.'
      else 'New ones are admitted from trusted roles.' end;
    return next;
  end if;
  step := 'warning';
  if v_differ > 0 then
    finding := format('rows that lead to two users: %s, by %s', v_differ, p_user_path);
    remedy := 'New ones are rejected (WX005).';
    return next;
  end if;
  if v_strangers > 0 then
    finding := format('rows whose user is no uuid, as the users of the registry are: %s, by %s', v_strangers, p_user_path);
    remedy := 'Such a user never has a machine. If another column holds the user, name it: --user-path.';
    return next;
  end if;
  step := 'note';
  select string_agg(format('%s on %s', quote_ident(t.tgname), t.tgrelid::regclass), ', ' order by t.tgrelid, t.tgname)
    into v_found
    from arbiter._app_triggers(p_table) t
   where not t.tgisinternal;
  if v_found is not null then
    finding := format('has triggers: %s', v_found);
    remedy := 'They go on as before. What a trigger after insert does outside the database has happened when a write is rejected.';
    return next;
  end if;
  finding := 'is locked for a moment, without a rewrite; after 5 s of waiting the installation gives up';
  remedy := 'Afterwards, each in a transaction of its own: an index on the machine column, for which writers wait while it reads the table, and the validation of constraints, for which they do not.';
  return next;
end
$$;
comment on function arbiter._table_notes(regclass, text, text, text) is
  'What a DBA should know of a table before it is protected by this path. p_user_class: as for _plain_users(). Reads the table.';

create or replace function arbiter._protection_text(p_mode text, p_user_path text, p_machine_column name, p_unowned text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return format('is protected: mode %s, user by %L, machine in %I, rows without a user: %s',
              p_mode, p_user_path, p_machine_column, p_unowned);
comment on function arbiter._protection_text(text, text, name, text) is 'What the options of a protection are, for people.';

create or replace function arbiter._plan()
returns table (step text, table_name text, finding text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_step record;
  v_user_class text;
begin
  for v_step in select * from arbiter._registry_steps() loop
    return query
      select v_step.step, v_step.table_name::text,
             case v_step.step when 'register' then 'becomes the registry of machines'
                              when 'keep' then 'is the registry of machines'
                              else v_step.reason end,
             v_step.remedy;
    if v_step.step <> 'skip' then
      v_user_class := arbiter._id_class(v_step.table_name, v_step.user_column);
      return query
        select n.step, v_step.table_name::text, n.finding, n.remedy
          from arbiter._registry_notes(v_step.table_name, v_step.step = 'keep') n;
    end if;
  end loop;
  for v_step in select * from arbiter._protect_steps() loop
    return query
      select v_step.step, v_step.table_name::text,
             case v_step.step when 'skip' then v_step.reason
               else arbiter._protection_text(v_step.mode, v_step.user_path, v_step.machine_column, v_step.unowned) end,
             v_step.remedy;
    if v_step.step = 'protect' then
      return query
        select n.step, v_step.table_name::text, n.finding, n.remedy
          from arbiter._table_notes(v_step.table_name, v_step.user_path, v_step.unowned, v_user_class) n;
    end if;
  end loop;
end
$$;
comment on function arbiter._plan() is
  'The plan of this installation, in order. step: register, protect, keep, skip, or for the table above note and warning. finding: what is, or what will be done. remedy: what to do about it, or null. Reads whole tables.';

-- For migrations/0002, which is frozen and cannot ask.
create or replace function arbiter._columns_to_add()
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(jsonb_agg(jsonb_build_object(
           'table', c.table_name::text, 'column', c.column_name, 'kind', c.kind, 'type', c.type)), '[]')
    from (
      select r.table_name, 'last_health_check'::name, 'heartbeat', null from arbiter._registry_steps() r where r.step = 'register'
      union all
      select p.table_name, k.column_name, k.kind, k.type
        from arbiter._protect_steps() p
        left join arbiter._registry_steps() r on r.step <> 'skip'
       cross join lateral (
         values
           ('source'::name, 'source', null),
           (p.machine_column, 'machine', coalesce(arbiter._id_type(r.table_name, r.id_column), 'uuid')),
           ('arbiter_xid', 'xid', null)) as k (column_name, kind, type)
       where p.step = 'protect'
    ) as c (table_name, column_name, kind, type)
   where not arbiter._has_column(c.table_name, c.column_name, c.kind);
end;
comment on function arbiter._columns_to_add() is
  'The columns that the tables of this installation are missing, as a JSON array of table, column, kind (_columns()) and, where the kind has no definition, type.';

do $preflight$
declare
  v_options record;
begin
  -- Set by 01_basics.sql, for one transaction.
  if coalesce(current_setting('arbiter.documented_before', true), '') = '' then
    perform arbiter._fail('object_not_in_prerequisite_state',
      'the files of an installation do not run in one transaction',
      'Run them all between begin and commit, in order; nothing of the app was changed.');
  end if;
  if current_setting('server_version_num')::integer < 150000 then
    perform arbiter._fail('feature_not_supported',
      format('needs PostgreSQL 15 or later, this is %s', current_setting('server_version')),
      'Upgrade the server first; nothing was changed.');
  end if;
  v_options := arbiter._install_options();
  if coalesce(v_options.user_path, v_options.machine_column::text, v_options.mode, v_options.unowned) is not null
     and not exists (select from arbiter._protect_steps() p where p.step = 'protect')
  then
    perform arbiter._fail('invalid_parameter_value',
      'this installation protects no table, and was told how to',
      'Name the table: --protect public.signals; nothing was changed.');
  end if;
  perform set_config('arbiter.adopt_columns', arbiter._columns_to_add()::text, false);
end
$preflight$;
