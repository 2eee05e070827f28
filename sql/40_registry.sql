-- The registry: the app's table of machines, read through one generated view, stamped and watched
-- by generated triggers. Generated, because table, columns and status words are the app's; each body
-- is as short as it can be and calls what is written here.

-- The registry under fixed names.
create or replace function arbiter._make_machines_view(p_query text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._make_view('machines', p_query,
    'The registry under fixed names, with its status mapped to a machine state.');
  -- With the rights of its reader, so that what is granted here opens nothing that the registry does not.
  alter view arbiter.machines set (security_invoker = true);
  grant select, update (heartbeat_at) on arbiter.machines to public;
  comment on column arbiter.machines.machine_id is 'The machine, as machine_id of protected rows names it.';
  comment on column arbiter.machines.user_id is 'Its owner.';
  comment on column arbiter.machines.status is 'The app''s status word.';
  comment on column arbiter.machines.state is 'The machine state: starting, running, stopping, stopped or error.';
  comment on column arbiter.machines.heartbeat_at is 'The last heartbeat, stamped with the database''s clock.';
end
$$;
revoke execute on function arbiter._make_machines_view(text) from public;
comment on function arbiter._make_machines_view(text) is 'Makes the view arbiter.machines anew from a query.';

-- Until a registry is registered there are no machines.
do $no_registry$
begin
  if to_regclass('arbiter.machines') is null then
    perform arbiter._make_machines_view(
      'select null::uuid as machine_id, null::uuid as user_id, null::text as status, null::text as state, '
      'null::timestamptz as heartbeat_at where false');
  end if;
end
$no_registry$;

-- When a machine leaves running or enters error is what the database saw, not what the app says.
create or replace function arbiter._note_machine(
  p_old_user_id uuid,
  p_old_machine_id uuid,
  p_old_state text,
  p_new_user_id uuid,
  p_new_machine_id uuid,
  p_new_state text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_same boolean := (p_old_user_id, p_old_machine_id) is not distinct from (p_new_user_id, p_new_machine_id);
  v_old_state text := case when v_same then p_old_state end;
begin
  -- Deleted, or another user's from now on: its claim ends like a stop.
  if not v_same and p_old_user_id is not null then
    insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at)
    values (p_old_user_id, p_old_machine_id, clock_timestamp())
    on conflict on constraint machine_notes_pkey do update
      set left_running_at = coalesce(n.left_running_at, excluded.left_running_at),
          entered_error_at = null;
  end if;

  if p_new_user_id is null or p_new_state is not distinct from v_old_state then
    return;
  end if;
  -- Left running now, or whenever it did before; an instant from an earlier life does not count.
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at, entered_error_at)
  values (p_new_user_id, p_new_machine_id,
    case when p_new_state <> 'running' then clock_timestamp() end,
    case when p_new_state = 'error' then clock_timestamp() end)
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = case
          when v_old_state = 'running' then excluded.left_running_at
          when p_new_state <> 'running' then coalesce(n.left_running_at, excluded.left_running_at) end,
        entered_error_at = excluded.entered_error_at;
  if not v_same then
    perform arbiter._create_lease(p_new_user_id, 'registered')
      where not exists (select from arbiter.leases l where l.user_id = p_new_user_id);
  end if;
end
$$;
revoke execute on function arbiter._note_machine(uuid, uuid, text, uuid, uuid, text) from public;
comment on function arbiter._note_machine(uuid, uuid, text, uuid, uuid, text) is
  'Notes a change of a machine''s state or owner; nulls for what was not there before or is not any more.';

-- Called for a machine that is healthy but does not hold the settled lease of its user. The cloud
-- outranks the browser and does not wait: no step here waits for anybody. What does not succeed now
-- does with the next heartbeat.
create or replace function arbiter._activate(p_user_id uuid, p_machine_id uuid)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings arbiter.settings;
  v_lease arbiter.leases;
  v_incumbent uuid;
  v_machine arbiter.machine;
  v_attempt record;
begin
  select s.* into strict v_settings from arbiter.settings s where s.singleton;
  select l.* into v_lease from arbiter.leases l where l.user_id = p_user_id;
  if not found and arbiter._create_lease(p_user_id, 'registered') is null then
    return;
  end if;

  if v_lease.draining_to = p_machine_id then
    v_attempt := arbiter._lock_lease(p_user_id);
    if v_attempt.locked and (v_attempt.lease).draining_to = p_machine_id then
      perform arbiter._hand_over(v_attempt.lease, v_attempt.wrote, 'cloud', p_machine_id, 'activated');
    end if;
    return;
  end if;

  -- No key column changes below, so this lock passes writers in flight by; it only keeps clear of a
  -- handover under way.
  select l.* into v_lease
    from arbiter.leases l
   where l.user_id = p_user_id
     for no key update skip locked;
  if not found then
    return;
  end if;
  v_incumbent := v_lease.claimant;
  if v_incumbent = p_machine_id then
    return;
  end if;
  -- Another machine keeps the lease while it may write, and by more than an old snapshot.
  if v_incumbent is not null then
    v_machine := arbiter._machine(p_user_id, v_incumbent);
    if (arbiter._verdict('cloud', v_incumbent, v_lease, v_machine, v_settings, clock_timestamp())).code is null
       or not arbiter._sees_now(v_machine)
    then
      return;
    end if;
  end if;
  -- Back to the machine that still holds, the drain just ends: an earlier yes to a takeover is void.
  update arbiter.leases l
     set draining_to = nullif(p_machine_id, l.machine_id),
         draining_since = case when l.machine_id is distinct from p_machine_id then clock_timestamp() end
   where l.user_id = p_user_id;
end
$$;
revoke execute on function arbiter._activate(uuid, uuid) from public;
comment on function arbiter._activate(uuid, uuid) is
  'Marks the drain of a user''s lease to a healthy machine, or ends it when no write is in flight. Never waits.';

-- The machines that hold a lease, or are about to, and are not in the registry (any more).
create or replace function arbiter._note_absent_machines()
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  -- What is noted already is left out, not just left alone: `do update` would lock it.
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at)
  select l.user_id, m.machine_id, clock_timestamp()
    from arbiter.leases l
    cross join lateral (values (l.machine_id), (l.draining_to)) as m (machine_id)
   where m.machine_id is not null
     and not exists (
       select from arbiter.machines r where r.machine_id = m.machine_id and r.user_id = l.user_id)
     and not exists (
       select from arbiter.machine_notes k
        where k.user_id = l.user_id and k.machine_id = m.machine_id and k.left_running_at is not null)
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = coalesce(n.left_running_at, excluded.left_running_at);
end
$$;
revoke execute on function arbiter._note_absent_machines() from public;
comment on function arbiter._note_absent_machines() is
  'Ends the claims of machines that are not in the registry, like a stop.';

create or replace function arbiter._registry_triggers()
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select r.registry, t.trigger_name, t.definition, t.meaning
    from arbiter.registry r
    cross join lateral (values
      ('arbiter_stamp_insert',
       format('before insert on {table} for each row when (new.%I is not null) execute function arbiter.tg_registry_stamp()',
         r.heartbeat_column),
       'A heartbeat is stamped with the database''s clock.'),
      ('arbiter_stamp_update',
       format('before update of %I on {table} for each row execute function arbiter.tg_registry_stamp()',
         r.heartbeat_column),
       'A heartbeat is any update that names the column; it is stamped with the database''s clock.'),
      ('arbiter_note',
       'after insert or delete on {table} for each row execute function arbiter.tg_registry_note()',
       'Notes machines that come and go.'),
      -- Whatever an update names: a trigger of the app may change the status. The server reads a condition anew
      -- in every statement, so this one is short; the other is only read where its columns are named.
      ('arbiter_note_update',
       format('after update on {table} for each row when (old.%1$I is distinct from new.%1$I) '
         'execute function arbiter.tg_registry_note()',
         r.status_column),
       'Notes when a machine changes its state.'),
      ('arbiter_note_owner',
       format('after update of %1$I, %2$I on {table} for each row '
         'when ((old.%1$I is distinct from new.%1$I or old.%2$I is distinct from new.%2$I) and old.%3$I is not distinct from new.%3$I) '
         'execute function arbiter.tg_registry_note()',
         r.id_column, r.user_column, r.status_column),
       'Notes when a machine changes its owner, and not its state.'),
      ('arbiter_note_truncate',
       'after truncate on {table} for each statement execute function arbiter.tg_registry_note()',
       'Notes that all machines are gone.'),
      ('arbiter_activate_insert',
       'after insert on {table} referencing new table as arbiter_rows for each statement '
         'execute function arbiter.tg_registry_activate()',
       'A healthy machine gets the lease.'),
      ('arbiter_activate_update',
       'after update on {table} referencing new table as arbiter_rows for each statement '
         'execute function arbiter.tg_registry_activate()',
       'A healthy machine gets the lease.')
    ) as t (trigger_name, definition, meaning);
end;
revoke execute on function arbiter._registry_triggers() from public;
comment on function arbiter._registry_triggers() is
  'The triggers that the registry must have. definition has {table} in the place of the table.';

-- A table that was dropped takes its triggers along, and leaves its name here.
create or replace function arbiter._forget_dropped()
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protection_id integer;
begin
  delete from arbiter.registry r
   where not exists (select from pg_catalog.pg_class c where c.oid = r.registry);
  for v_protection_id in
    delete from arbiter.protections p
     where not exists (select from pg_catalog.pg_class c where c.oid = p.protected_table)
    returning p.protection_id
  loop
    perform arbiter._drop_guard(v_protection_id);
  end loop;
end
$$;
revoke execute on function arbiter._forget_dropped() from public;
comment on function arbiter._forget_dropped() is 'Forgets the registry and protected tables that do not exist any more.';

-- Written out wherever it is needed: a call for each row would cost more than the heartbeat itself. A lookup, not a
-- CASE: the executor sets up every branch of one for each statement, 28,000 instructions for the default words.
create or replace function arbiter._state_expression(p_registry arbiter.registry, p_row text)
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select format('coalesce(%L::jsonb ->> %s.%I::text, ''running'')',
           (p_registry).states, p_row, (p_registry).status_column);
end;
revoke execute on function arbiter._state_expression(arbiter.registry, text) from public;
comment on function arbiter._state_expression(arbiter.registry, text) is
  'SQL for the machine state of a row of the registry; an unmapped word counts as running: unknown means possibly alive.';

create or replace function arbiter._stamp_template()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  new.__heartbeat := clock_timestamp();
  -- Never the client's clock, and never back, unless the clock itself was: a heartbeat too far ahead is
  -- none (_is_fresh). Two questions: one that holds a query is planned and run as one, each time.
  if tg_op = 'UPDATE' and old.__heartbeat > new.__heartbeat then
    if old.__heartbeat - new.__heartbeat < (select s.heartbeat_timeout from arbiter.settings s where s.singleton) then
      new.__heartbeat := old.__heartbeat;
    end if;
  end if;
  return new;
end
$$;
revoke execute on function arbiter._stamp_template() from public;
comment on function arbiter._stamp_template() is 'Stamps a heartbeat with the database''s clock, as a template.';

-- Definer: it keeps the notes, which no client may write.
create or replace function arbiter._note_template()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
  case tg_op
    when 'INSERT' then
      perform arbiter._note_machine(null, null, null, new.__user, new.__machine, __state(new));
    when 'UPDATE' then
      perform arbiter._note_machine(
        old.__user, old.__machine, __state(old),
        new.__user, new.__machine, __state(new));
    when 'DELETE' then
      perform arbiter._note_machine(old.__user, old.__machine, __state(old), null, null, null);
    when 'TRUNCATE' then
      perform arbiter._note_absent_machines();
  end case;
  return null;
end
$$;
revoke execute on function arbiter._note_template() from public;
comment on function arbiter._note_template() is 'Notes when a machine leaves running, enters error, or goes, as a template.';

-- Definer: it reads and marks leases, which no client may. A scalar probe by primary key for each
-- row, so that the plan is the same for one heartbeat and for many, whatever the statistics.
create or replace function arbiter._activate_template()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
declare
  v_timeout interval;
  v_machine record;
begin
  -- The common case is the heartbeat of the machine that holds the lease, and asks no more than this.
  perform from arbiter_rows n
    where (select l.machine_id = n.__machine from arbiter.leases l where l.user_id = n.__user and l.draining_since is null) is not true;
  if not found then
    return null;
  end if;
  select s.heartbeat_timeout into strict v_timeout from arbiter.settings s where s.singleton;
  for v_machine in
    select n.__machine as machine_id, n.__user as user_id, n.__heartbeat as heartbeat_at
      from arbiter_rows n
     where n.__user is not null
       and __state(n) = 'running'
       and n.__machine is distinct from (
         select l.machine_id from arbiter.leases l where l.user_id = n.__user and l.draining_since is null)
     -- The end of a drain first: a look at the lease for another machine locks it, and what this
     -- transaction has locked it cannot hand over any more.
     order by n.__user, n.__machine is distinct from (
         select l.draining_to from arbiter.leases l where l.user_id = n.__user), n.__machine
  loop
    if arbiter._is_fresh(v_machine.heartbeat_at, v_timeout, clock_timestamp()) then
      perform arbiter._activate(v_machine.user_id, v_machine.machine_id);
    end if;
  end loop;
  return null;
end
$$;
revoke execute on function arbiter._activate_template() from public;
comment on function arbiter._activate_template() is 'Gives the lease to a machine that a write has left healthy, as a template.';

create or replace function arbiter._registry_words(p_registry arbiter.registry)
returns jsonb
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    '__machine', quote_ident((p_registry).id_column),
    '__user', quote_ident((p_registry).user_column),
    '__heartbeat', quote_ident((p_registry).heartbeat_column),
    '__state(n)', arbiter._state_expression(p_registry, 'n'),
    '__state(new)', arbiter._state_expression(p_registry, 'new'),
    '__state(old)', arbiter._state_expression(p_registry, 'old'));
end;
revoke execute on function arbiter._registry_words(arbiter.registry) from public;
comment on function arbiter._registry_words(arbiter.registry) is
  'What stands in the registry''s trigger functions for the words of their templates.';

-- Generates what depends on the registry's names and words: the view machines, the trigger functions.
create or replace function arbiter._build_registry()
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_words jsonb;
  v_view text;
  v_user_id uuid;
  v_now timestamptz;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if not found then
    perform arbiter._note_absent_machines();
    return;
  end if;

  v_words := arbiter._registry_words(v_registry);
  v_view := format(
    'select r.%1$I as machine_id, r.%2$I as user_id, r.%3$I as status, %6$s as state, '
    'r.%4$I as heartbeat_at from %5$s r',
    v_registry.id_column, v_registry.user_column, v_registry.status_column, v_registry.heartbeat_column,
    v_registry.registry, arbiter._state_expression(v_registry, 'r'));
  if not arbiter._is_current_view('machines', v_view, v_registry.registry) then
    perform arbiter._make_machines_view(v_view);
  end if;

  perform arbiter._instantiate('arbiter._stamp_template()', 'tg_registry_stamp', v_words);

  perform arbiter._instantiate('arbiter._note_template()', 'tg_registry_note', v_words);

  perform arbiter._instantiate('arbiter._activate_template()', 'tg_registry_activate', v_words);

  perform arbiter._seal('arbiter.tg_registry_stamp()', 'Stamps a heartbeat with the database''s clock.');
  perform arbiter._seal('arbiter.tg_registry_note()', 'Notes when a machine leaves running, enters error, or goes.');
  perform arbiter._seal('arbiter.tg_registry_activate()', 'Gives the lease to a machine that a write has left healthy.');

  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._registry_triggers() t;

  -- Machines that were here before the triggers: all users get their leases, not running is noted as
  -- of now, the cautious reading, and healthy machines get the lease.
  for v_user_id in
    insert into arbiter.leases (user_id, epoch, holder, held_since)
    select distinct m.user_id, 1, 'local', clock_timestamp()
      from arbiter.machines m
     where m.user_id is not null
       and not exists (select from arbiter.leases l where l.user_id = m.user_id)
    on conflict do nothing
    returning user_id
  loop
    perform arbiter._record_handover(null, v_user_id, 'local', null, 'registered');
  end loop;
  perform arbiter._note_absent_machines();
  update arbiter.machine_notes n
     set left_running_at = null, entered_error_at = null
    from arbiter.machines m
   where m.user_id = n.user_id
     and m.machine_id = n.machine_id
     and m.state = 'running'
     and (n.left_running_at is not null or n.entered_error_at is not null);
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at, entered_error_at)
  select m.user_id, m.machine_id, clock_timestamp(), case when m.state = 'error' then clock_timestamp() end
    from arbiter.machines m
   where m.user_id is not null
     and m.state <> 'running'
     and not exists (
       select from arbiter.machine_notes k
        where k.user_id = m.user_id
          and k.machine_id = m.machine_id
          and k.left_running_at is not null
          and (k.entered_error_at is not null or m.state <> 'error'))
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = coalesce(n.left_running_at, excluded.left_running_at),
        entered_error_at = coalesce(n.entered_error_at, excluded.entered_error_at);
  v_now := clock_timestamp();
  perform arbiter._activate(m.user_id, m.machine_id)
     from (
       select r.user_id, r.machine_id
         from arbiter.machines r, arbiter.settings s
        where r.user_id is not null
          and r.state = 'running'
          and arbiter._is_fresh(r.heartbeat_at, s.heartbeat_timeout, v_now)
          and r.machine_id is distinct from (
            select l.machine_id from arbiter.leases l where l.user_id = r.user_id and l.draining_since is null)
        order by r.user_id, r.machine_id) as m;
end
$$;
revoke execute on function arbiter._build_registry() from public;
comment on function arbiter._build_registry() is
  'Generates the view, functions and triggers of the registered table, and takes its machines as they are.';

create or replace function arbiter._heartbeat_indexes(p_registry regclass, p_heartbeat_column name)
returns setof regclass
language sql
stable
security invoker
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
revoke execute on function arbiter._heartbeat_indexes(regclass, name) from public;
comment on function arbiter._heartbeat_indexes(regclass, name) is
  'Indexes that read the heartbeat column, in their keys or their predicate: with one, no heartbeat is a HOT update.';

-- Definer: what it creates must belong to the owner of arbiter, whoever calls.
create or replace function arbiter.register_machines(
  p_registry regclass,
  p_id_column name default 'id',
  p_user_column name default 'user_id',
  p_status_column name default 'status',
  p_heartbeat_column name default 'last_health_check',
  p_states jsonb default null)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_states jsonb := coalesce(p_states, '{
    "provisioning": "starting", "starting": "starting",
    "running": "running", "active": "running", "started": "running",
    "stopping": "stopping", "deprovisioning": "stopping",
    "stopped": "stopped", "deleted": "stopped", "suspended": "stopped",
    "error": "error", "failed": "error"}');
  v_known constant text[] := '{starting,running,stopping,stopped,error}';
  v_stranger text;
  v_old arbiter.registry;
  v_index text;
begin
  if p_registry is null or p_id_column is null or p_user_column is null or p_status_column is null
     or p_heartbeat_column is null
  then
    raise exception using
      errcode = 'null_value_not_allowed',
      message = 'arbiter: register_machines() with a null for the table or one of its columns',
      hint = 'Name the app''s table of machines and its columns, or leave the defaults.';
  end if;
  if jsonb_typeof(v_states) <> 'object' then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: p_states is a JSON %s, it must be an object', jsonb_typeof(v_states)),
      hint = 'For example {"active": "running", "deleted": "stopped"}.';
  end if;
  select format('%s: %s', s.key, s.value)
    into v_stranger
    from jsonb_each(v_states) s
   where s.value #>> '{}' is null or s.value #>> '{}' <> all (v_known)
   order by s.key
   limit 1;
  if v_stranger is not null then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: p_states maps a status word to no machine state: %s', v_stranger),
      hint = 'The machine states are ' || array_to_string(v_known, ', ') || '.';
  end if;
  if not exists (select from jsonb_each_text(v_states) s where s.value = 'stopped') then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = 'arbiter: p_states maps no status word to stopped',
      hint = 'arbiter.confirm_takeover() needs a word that says so.';
  end if;
  perform arbiter._need_registry(p_registry, p_id_column, p_user_column, p_status_column, p_heartbeat_column);

  -- One registration at a time, and no write to the registry between here and its triggers. The first time
  -- exclusive at once: a policy needs that, and to ask for more later is to deadlock with who read first.
  lock table arbiter.registry in share row exclusive mode;
  perform arbiter._forget_dropped();
  select r.* into v_old from arbiter.registry r where r.singleton;
  execute format('lock table %s in %s mode', p_registry,
    case v_old.registry when p_registry then 'share row exclusive' else 'access exclusive' end);
  if v_old.registry <> p_registry then
    perform arbiter._detach(v_old.registry);
  end if;
  if not arbiter._has_column(p_registry, p_heartbeat_column, '{timestamp with time zone}') then
    execute format('alter table %s add column %I timestamptz', p_registry, p_heartbeat_column);
    execute format('comment on column %s.%I is %L', p_registry, p_heartbeat_column,
      'arbiter: the last heartbeat, stamped with the database''s clock whatever the client sent.');
  end if;
  if (v_old.registry, v_old.heartbeat_column) is distinct from (p_registry, p_heartbeat_column) then
    -- Written by some client's clock until now: what lies in the future cannot be a heartbeat.
    execute format('update %s set %2$I = clock_timestamp() where %2$I > clock_timestamp()',
      p_registry, p_heartbeat_column);
  end if;

  insert into arbiter.registry (registry, id_column, user_column, status_column, heartbeat_column, states)
  values (p_registry, p_id_column, p_user_column, p_status_column, p_heartbeat_column, v_states)
  on conflict on constraint registry_pkey do update
    set registry = excluded.registry,
        id_column = excluded.id_column,
        user_column = excluded.user_column,
        status_column = excluded.status_column,
        heartbeat_column = excluded.heartbeat_column,
        states = excluded.states;
  perform arbiter._build_registry();
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
revoke execute on function arbiter.register_machines(regclass, name, name, name, name, jsonb) from public;
comment on function arbiter.register_machines(regclass, name, name, name, name, jsonb) is
  'Makes a table the registry of machines: adds the heartbeat column if missing, attaches the triggers, gives leases to machines that are healthy now. p_states: status word to machine state; default fits common words. Idempotent; another table replaces the registry. Errors 42501, 42703, 42804, 22023: nothing changed.';

-- Invoker: who may heartbeat is who may update the registry.
create or replace function arbiter.heartbeat(p_machine_ids uuid[])
returns bigint
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked_at timestamptz := clock_timestamp();
  v_count bigint;
  v_unknown uuid;
begin
  if not exists (select from arbiter.registry) then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = 'arbiter: no registry of machines',
      hint = 'Call arbiter.register_machines() first.';
  end if;
  update arbiter.machines set heartbeat_at = clock_timestamp() where machine_id = any (p_machine_ids);
  get diagnostics v_count = row_count;
  -- A null among them counts as unknown, too.
  if p_machine_ids is null or v_count <> (select count(distinct coalesce(i.id::text, '')) from unnest(p_machine_ids) as i (id)) then
    -- One that the caller may see but not update has no heartbeat of this call, either.
    select i.id
      into v_unknown
      from unnest(p_machine_ids) as i (id)
     where not exists (
       select from arbiter.machines m where m.machine_id = i.id and m.heartbeat_at >= v_asked_at)
     limit 1;
    perform arbiter._throw('P0002', 404, format('arbiter: no machine %s', coalesce(v_unknown::text, 'null')),
      jsonb_build_object('code', 'unknown_machine', 'machine_id', v_unknown),
      'Check the id against the registry''s id column; no heartbeat of this call was written.');
  end if;
  return v_count;
end
$$;
revoke execute on function arbiter.heartbeat(uuid[]) from public;
comment on function arbiter.heartbeat(uuid[]) is
  'Heartbeats of many machines in one statement; returns how many. Error P0002 when one is unknown, or not visible to the caller or not for him to update: then none is written.';

create or replace function arbiter.heartbeat(p_machine_id uuid)
returns timestamptz
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter.heartbeat(array[p_machine_id]);
  return (select m.heartbeat_at from arbiter.machines m where m.machine_id = p_machine_id);
end
$$;
revoke execute on function arbiter.heartbeat(uuid) from public;
comment on function arbiter.heartbeat(uuid) is
  'Heartbeat of one machine; returns the instant that the database stamped. Error P0002 when it is unknown, or not visible to the caller or not for him to update.';
