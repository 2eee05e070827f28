-- register_machines(): the view arbiter.machines, which triggers the registry needs, and the copies of
-- the templates of their functions.

create or replace function arbiter._machines_query(p_registry arbiter.registry)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return format(
  'select r.%1$I as machine_id, r.%2$I as user_id, r.%3$I as status, %6$s as state, r.%4$I as heartbeat_at from %5$s r',
  (p_registry).id_column, (p_registry).user_column, (p_registry).status_column, (p_registry).heartbeat_column,
  (p_registry).registry, arbiter._state_expression(p_registry, 'r'));
comment on function arbiter._machines_query(arbiter.registry) is 'The query of the view arbiter.machines.';

create or replace function arbiter._open_machines()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_callers text := arbiter._grantees('{user,backend}');
begin
  perform arbiter._close('table', 'arbiter.machines', c.relacl, c.relowner)
     from pg_catalog.pg_class c
    where c.oid = to_regclass('arbiter.machines');
  if v_callers is not null then
    execute format('grant select, update (heartbeat_at) on arbiter.machines to %s', v_callers);
    execute format('grant execute on function arbiter._machine_keys(text[]), arbiter._user_text(text) to %s', v_callers);
  end if;
end
$$;
comment on function arbiter._open_machines() is
  'Grants the view arbiter.machines, and the functions that read ids, to the roles of clients that may call heartbeat(), and to no other.';

create or replace function arbiter._make_machines_view(p_query text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._make_view('machines', p_query,
    'The registry under fixed names, with its status mapped to a machine state.',
    -- With the rights of its reader: a grant here opens nothing that the registry itself does not open.
    'with (security_invoker = true)');
  perform arbiter._build_ids();
  perform arbiter._open_machines();
  comment on column arbiter.machines.machine_id is 'The machine, as machine_id of protected rows names it.';
  comment on column arbiter.machines.user_id is 'Its owner.';
  comment on column arbiter.machines.status is 'The app''s status word.';
  comment on column arbiter.machines.state is 'The machine state: starting, running, stopping, stopped or error.';
  comment on column arbiter.machines.heartbeat_at is 'The last heartbeat, stamped with the database''s clock.';
end
$$;
comment on function arbiter._make_machines_view(text) is 'Makes the view arbiter.machines, the registry under fixed names, anew from a query.';

create or replace function arbiter._registry_triggers()
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select r.registry, t.trigger_name, t.definition, t.meaning
    from arbiter.registry r
    cross join lateral (values
      -- The server runs triggers in the order of their names. This one sees what the client has asked for, before a
      -- trigger of the app changes more of the row, for example updated_at.
      ('!arbiter_limit',
       format('before update on %s for each row execute function arbiter.tg_registry_limit()', r.registry),
       'A machine''s token sends heartbeats, and sets the status words for machines.'),
      -- The last of the row triggers before the write: a trigger of the app may set the health column.
      ('~arbiter_stamp_insert',
       format('before insert on %s for each row when (new.%I is not null) execute function arbiter.tg_registry_stamp()',
         r.registry, r.heartbeat_column),
       'A heartbeat is stamped with the database''s clock.'),
      ('~arbiter_stamp_update',
       format('before update of %I on %s for each row execute function arbiter.tg_registry_stamp()',
         r.heartbeat_column, r.registry),
       'A heartbeat is any update that names the column; it is stamped with the database''s clock.'),
      ('arbiter_note',
       format('after insert or delete on %s for each row execute function arbiter.tg_registry_note()', r.registry),
       'Notes machines that come and go.'),
      -- After any update, whichever columns it names, because a trigger of the app may change the status. Two triggers:
      -- the server parses a condition in every statement, so this one is short, and the other names its columns.
      ('arbiter_note_update',
       format('after update on %2$s for each row when (old.%1$I is distinct from new.%1$I) '
         'execute function arbiter.tg_registry_note()',
         r.status_column, r.registry),
       'Notes when a machine changes its state.'),
      ('arbiter_note_owner',
       format('after update of %1$I, %2$I on %4$s for each row '
         'when ((old.%1$I is distinct from new.%1$I or old.%2$I is distinct from new.%2$I) and old.%3$I is not distinct from new.%3$I) '
         'execute function arbiter.tg_registry_note()',
         r.id_column, r.user_column, r.status_column, r.registry),
       'Notes when a machine changes its owner, and not its state.'),
      ('arbiter_note_truncate',
       format('after truncate on %s for each statement execute function arbiter.tg_registry_note()', r.registry),
       'Notes that all machines are gone.'),
      ('arbiter_activate_insert',
       format('after insert on %s referencing new table as arbiter_rows for each statement '
         'execute function arbiter.tg_registry_activate()', r.registry),
       'A healthy machine gets the lease.'),
      ('arbiter_activate_update',
       format('after update on %s referencing new table as arbiter_rows for each statement '
         'execute function arbiter.tg_registry_activate()', r.registry),
       'A healthy machine gets the lease.')
    ) as t (trigger_name, definition, meaning);
end;
comment on function arbiter._registry_triggers() is
  'The triggers that the registry must have. definition: what follows the name in CREATE TRIGGER.';

create or replace function arbiter._take_machines()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_user_id text;
  v_at timestamptz;
begin
  for v_user_id in
    insert into arbiter.leases (user_id, epoch, holder, held_since)
    select u.user_id, 1, 'local', clock_timestamp()
      from (
        select distinct m.user_id::text collate "C" as user_id
          from arbiter.machines m
         where m.user_id is not null
           and not exists (select from arbiter.leases l where l.user_id = m.user_id::text collate "C")) u
     -- As in a write for several users, which may create some of these leases now.
     order by u.user_id
    on conflict do nothing
    returning user_id
  loop
    perform arbiter._record_handover(null, v_user_id, 'local', null, 'registered');
  end loop;
  perform arbiter._note_absent_machines();
  update arbiter.machine_notes n
     set left_running_at = null, entered_error_at = null
    from arbiter.machines m
   where m.user_id::text collate "C" = n.user_id
     and m.machine_id::text collate "C" = n.machine_id
     and m.state = 'running'
     and (n.left_running_at is not null or n.entered_error_at is not null);
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at, entered_error_at)
  select m.user_id::text, m.machine_id::text, clock_timestamp(), case when m.state = 'error' then clock_timestamp() end
    from arbiter.machines m
   where m.user_id is not null
     and m.state <> 'running'
     and not exists (
       select from arbiter.machine_notes k
        where k.user_id = m.user_id::text collate "C"
          and k.machine_id = m.machine_id::text collate "C"
          and k.left_running_at is not null
          and (k.entered_error_at is not null or m.state <> 'error'))
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = coalesce(n.left_running_at, excluded.left_running_at),
        entered_error_at = coalesce(n.entered_error_at, excluded.entered_error_at);
  -- One instant for all, taken when the many leases are there.
  v_at := clock_timestamp();
  perform arbiter._activate(m.user_id, m.machine_id)
     from (
       select r.user_id::text collate "C" as user_id, r.machine_id::text collate "C" as machine_id
         from arbiter.machines r, arbiter.settings s
        where r.user_id is not null
          and r.state = 'running'
          and arbiter._is_fresh(r.heartbeat_at, s.heartbeat_timeout, v_at)
          and r.machine_id::text collate "C" is distinct from arbiter._settled_machine(r.user_id::text collate "C")
        order by 1, 2) as m;
end
$$;
comment on function arbiter._take_machines() is
  'Takes the machines that were in the registry before its triggers as they are: all users get a lease, a machine that is not running is noted as of now, and a healthy one gets the lease.';

create or replace function arbiter._build_registry()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_words jsonb;
  v_view text;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if not found then
    -- There are no machines, and the view is empty. Their ids have the types of before: texts, or those of a registry
    -- that was dropped.
    perform arbiter._make_machines_view(
      (select format('select null::%s as machine_id, null::%s as user_id, null::text as status, null::text as state, '
                'null::timestamptz as heartbeat_at where false',
                max(i.type) filter (where i.kind = 'machine'), max(i.type) filter (where i.kind = 'user'))
         from arbiter._registry_ids() i));
    perform arbiter._note_absent_machines();
    return;
  end if;

  v_words := arbiter._registry_words(v_registry);
  v_view := arbiter._machines_query(v_registry);
  if not arbiter._is_current_view('machines', v_view, v_registry.registry) then
    perform arbiter._make_machines_view(v_view);
  end if;

  perform arbiter._instantiate('arbiter._limit_template()', 'tg_registry_limit', v_words);
  perform arbiter._instantiate('arbiter._stamp_template()', 'tg_registry_stamp', v_words);
  perform arbiter._instantiate('arbiter._note_template()', 'tg_registry_note', v_words);
  perform arbiter._instantiate('arbiter._activate_template()', 'tg_registry_activate', v_words);
  perform arbiter._seal('arbiter.tg_registry_limit()', 'Keeps a machine''s token to its heartbeat and the status words for machines.');
  perform arbiter._seal('arbiter.tg_registry_stamp()', 'Stamps a heartbeat with the database''s clock.');
  perform arbiter._seal('arbiter.tg_registry_note()', 'Notes when a machine leaves running, enters error, or goes.');
  perform arbiter._seal('arbiter.tg_registry_activate()', 'Gives the lease to a machine that a write has left healthy.');

  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._registry_triggers() t;

  perform arbiter._take_machines();
end
$$;
comment on function arbiter._build_registry() is
  'Generates the view, functions and triggers of the registered table, and takes its machines (_take_machines).';

-- Definer: what it creates must belong to arbiter's owner, whichever role calls.
create or replace function arbiter.register_machines(
  p_registry regclass,
  p_id_column name default 'id',
  p_user_column name default 'user_id',
  p_status_column name default 'status',
  p_heartbeat_column name default 'last_health_check',
  p_states jsonb default null,
  p_machine_statuses text[] default '{}',
  p_health_column name default null,
  p_healthy text[] default null)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_states jsonb := coalesce(p_states, arbiter._default_states());
  v_known constant text[] := '{starting,running,stopping,stopped,error}';
  v_unknown text;
  v_old arbiter.registry;
  v_is_ahead boolean;
  v_retyped boolean;
  v_index text;
begin
  if p_registry is null or p_id_column is null or p_user_column is null or p_status_column is null
     or p_heartbeat_column is null
  then
    perform arbiter._fail('null_value_not_allowed',
      'register_machines() with a null for the table or one of its columns',
      'Name the app''s table of machines and its columns, or leave the defaults.');
  end if;
  if jsonb_typeof(v_states) <> 'object' then
    perform arbiter._fail('invalid_parameter_value',
      format('p_states is a JSON %s, it must be an object', jsonb_typeof(v_states)),
      'For example {"active": "running", "deleted": "stopped"}.');
  end if;
  select format('%s: %s', s.key, s.value)
    into v_unknown
    from jsonb_each(v_states) s
   where s.value #>> '{}' is null or s.value #>> '{}' <> all (v_known)
   limit 1;
  if v_unknown is not null then
    perform arbiter._fail('invalid_parameter_value',
      format('p_states maps a status word to no machine state: %s', v_unknown),
      'The machine states are ' || array_to_string(v_known, ', ') || '.');
  end if;
  if not exists (select from jsonb_each_text(v_states) s where s.value = 'stopped') then
    perform arbiter._fail('invalid_parameter_value',
      'p_states maps no status word to stopped',
      'arbiter.confirm_takeover() needs a word that says so.');
  end if;
  -- A word that is misspelt would count as running.
  select coalesce(w.word, 'null')
    into v_unknown
    from unnest(p_machine_statuses) as w (word)
   where (v_states ? w.word) is not true
   limit 1;
  if v_unknown is not null then
    perform arbiter._fail('invalid_parameter_value',
      format('p_machine_statuses has a status word that p_states does not map: %s', v_unknown),
      'Map the word to a machine state in p_states, too.');
  end if;
  if (p_health_column is null) <> (p_healthy is null) then
    perform arbiter._fail('invalid_parameter_value',
      'register_machines() with one of p_health_column and p_healthy, and not with the other',
      'For example p_health_column => ''health_status'', p_healthy => ''{healthy}''.');
  end if;
  if p_healthy is not null and not (select coalesce(bool_and(w.word is not null), false) from unnest(p_healthy) as w (word)) then
    perform arbiter._fail('invalid_parameter_value',
      'p_healthy is empty, or has a null',
      'List the words that the health column has while the machine is well.');
  end if;
  perform arbiter._need_registry(p_registry, p_id_column, p_user_column, p_status_column, p_heartbeat_column);
  perform arbiter._need_health_column(p_registry, p_health_column, p_status_column, p_heartbeat_column);
  perform arbiter._need_ids_of_registry(p.protected_table, p.user_path, p.machine_column,
      p_registry, p_id_column, p_user_column)
     from arbiter.protections p
     join pg_catalog.pg_class c on c.oid = p.protected_table;

  -- One registration at a time, and none beside protect(), which locks the first of these and changes the other one.
  lock table arbiter.protections, arbiter.registry in share row exclusive mode;
  perform arbiter._forget_dropped();
  select r.* into v_old from arbiter.registry r where r.singleton;
  -- Guards read ids by the types of the registry's: no write that is in flight may have read a user by another one. A
  -- registry that was dropped, with its view, has left guards whose types are not known. All locks at once, because a
  -- write locks its table before its guard reads the registry.
  v_retyped := to_regclass('arbiter.machines') is null
    or (arbiter._id_class(p_registry, p_id_column), arbiter._id_class(p_registry, p_user_column))
       <> (arbiter._registry_class('machine'), arbiter._registry_class('user'));
  if v_retyped then
    perform arbiter._lock_tables(array(
      select c.oid::regclass from arbiter.protections p join pg_catalog.pg_class c on c.oid = p.protected_table
      union all
      select p_registry
      union all
      select v_old.registry where v_old.registry <> p_registry), 'access exclusive');
    perform arbiter._need_same_users(arbiter._id_class(p_registry, p_user_column));
  end if;
  -- No write to the registry between here and its triggers. The first time take the strongest lock at once, which a
  -- policy needs: a later upgrade can deadlock with a reader.
  execute format('lock table %s in %s mode', p_registry,
    case v_old.registry when p_registry then 'share row exclusive' else 'access exclusive' end);
  if v_old.registry <> p_registry then
    perform arbiter._detach(v_old.registry);
  end if;
  perform arbiter._add_column(p_registry, p_heartbeat_column, 'heartbeat');
  if (v_old.registry, v_old.heartbeat_column) is distinct from (p_registry, p_heartbeat_column) then
    -- Until now clients wrote it by their own clocks. A value in the future would count as no heartbeat.
    execute format('select exists (select from %s where %2$I > clock_timestamp())', p_registry, p_heartbeat_column)
      into v_is_ahead;
    if v_is_ahead then
      perform arbiter._need_trusted_code(p_registry);
      execute format('update %s set %2$I = clock_timestamp() where %2$I > clock_timestamp()',
        p_registry, p_heartbeat_column);
    end if;
  end if;

  insert into arbiter.registry
    (registry, declared_as, id_column, user_column, status_column, heartbeat_column, states, machine_statuses,
      health_column, healthy)
  values (p_registry, p_registry::text, p_id_column, p_user_column, p_status_column, p_heartbeat_column, v_states,
    coalesce(p_machine_statuses, '{}'), p_health_column, p_healthy)
  on conflict on constraint registry_pkey do update
    set registry = excluded.registry,
        declared_as = excluded.declared_as,
        id_column = excluded.id_column,
        user_column = excluded.user_column,
        status_column = excluded.status_column,
        heartbeat_column = excluded.heartbeat_column,
        states = excluded.states,
        machine_statuses = excluded.machine_statuses,
        health_column = excluded.health_column,
        healthy = excluded.healthy;
  perform arbiter._build_registry();
  perform arbiter._build_guard(p.protection_id)
     from arbiter.protections p
     join pg_catalog.pg_class c on c.oid = p.protected_table
    where v_retyped;
  perform arbiter._add_machine_key(p.protected_table, p.machine_column) from arbiter.protections p;
  perform arbiter._build_policies(p_registry);
  perform arbiter._build_policies(v_old.registry) where v_old.registry <> p_registry;

  select string_agg(i.name::text, ', ')
    into v_index
    from arbiter._heartbeat_indexes(p_registry, p_heartbeat_column) as i (name);
  if v_index is not null then
    raise notice using
      message = format('arbiter: no heartbeat can be a HOT update while an index reads %I: %s', p_heartbeat_column, v_index),
      hint = 'Drop it if you can.';
  end if;
end
$$;
comment on function arbiter.register_machines(regclass, name, name, name, name, jsonb, text[], name, text[]) is
  'Makes a table the registry of machines: adds the heartbeat column if missing, attaches the triggers, gives leases to machines that are healthy now. p_states: status word to machine state; default fits common words. p_machine_statuses: the words that a machine''s token may set, none by default. p_health_column, p_healthy: with these a heartbeat counts only if the row then has one of the words in that column. Idempotent; another table replaces the registry. Errors 0A000, 22023, 42501, 42703, 42804, 42P16: nothing changed.';
