-- The registry: the app's table of machines. First the templates of its trigger functions, then what they call: notes
-- of when a machine left running, and activation, which gives a healthy machine the lease.
--
-- register_machines() makes a copy of each template (_instantiate, 20_generate.sql) with these words replaced
-- (_registry_words):
--
--   __machine, __user, __status, __heartbeat   the registry's columns
--   __statuses                       the status words that a machine's token may set
--   __beat(new)                      the instant of a heartbeat that has left the row new
--   __state(x)                       the machine state of the row x
--   __settled_machine(x)             the machine that holds the settled lease of the user of the row x
--
-- Definer, except the limit: they read settings and write notes and leases, which roles that write the registry may
-- not.

-- As text, because a call for each row would cost more than the heartbeat itself. A lookup and not a CASE: the executor
-- sets up every branch of a CASE for each statement, 28,000 instructions for the default words.
create or replace function arbiter._state_expression(p_registry arbiter.registry, p_row text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select arbiter._state_sql((p_registry).states, format('%s.%s', p_row, arbiter._quoted((p_registry).status_column)));
end;
comment on function arbiter._state_expression(arbiter.registry, text) is
  'SQL for the machine state of a row of the registry.';

-- A heartbeat that does not count leaves the stamp of the last one that did. So nothing else needs to know of health:
-- what asks for the stamp goes on as if none had been sent. In an insert old is null.
create or replace function arbiter._beat_expression(p_registry arbiter.registry)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return case
  when (p_registry).health_column is null then 'clock_timestamp()'
  else format('case when new.%s::text = any (%L::text[]) then clock_timestamp() else old.%s end',
    arbiter._quoted((p_registry).health_column), (p_registry).healthy, arbiter._quoted((p_registry).heartbeat_column))
end;
comment on function arbiter._beat_expression(arbiter.registry) is
  'SQL for the stamp of a heartbeat in its row trigger: the clock, or the stamp that the row had when the row says that the machine is not well.';

create or replace function arbiter._registry_words(p_registry arbiter.registry)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    '__machine', arbiter._quoted((p_registry).id_column),
    '__user', arbiter._quoted((p_registry).user_column),
    '__status', arbiter._quoted((p_registry).status_column),
    '__statuses', quote_literal((p_registry).machine_statuses) || '::text[]',
    '__heartbeat', arbiter._quoted((p_registry).heartbeat_column),
    '__beat(new)', arbiter._beat_expression(p_registry),
    '__state(n)', arbiter._state_expression(p_registry, 'n'),
    '__state(new)', arbiter._state_expression(p_registry, 'new'),
    '__state(old)', arbiter._state_expression(p_registry, 'old'),
    '__settled_machine(n)', arbiter._settled_machine_expression(format('n.%I::text collate "C"', (p_registry).user_column)));
end;
comment on function arbiter._registry_words(arbiter.registry) is
  'What the words of the templates stand for in the registry''s trigger functions.';

-- Row security says which row a machine's token may change, but it cannot compare the row with the one before: another
-- session may have changed that since the statement began. A trigger gets the row that is really replaced.
--
-- Every heartbeat passes here, so the role is asked first: row security binds neither the backend nor the owner.
-- A condition on the trigger would cost more, because the server parses it in every statement.
create or replace function arbiter._limit_template()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if row_security_active(tg_relid) then
    declare
      v_new record := new;
      -- Not claimed_machine_id(), which roles that are no clients may not call.
      v_is_machine boolean := nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'machine_id' is not null;
      v_comparison text;
      v_column name;
    begin
      v_new.__heartbeat := old.__heartbeat;
      v_new.__status := old.__status;
      if v_is_machine and v_new *<> old then
        -- Generated columns have no value yet. By the images, because the text of a value depends on the session.
        select string_agg(format('select %L where row(($1).%I)::record *<> row(($2).%2$I)::record', a.attname, a.attname), ' union all ')
          into v_comparison
          from pg_catalog.pg_attribute a
         where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '';
        execute v_comparison || ' limit 1' into v_column using old, v_new;
        if v_column is not null then
          perform arbiter._fail('insufficient_privilege',
            format('a machine''s token may not change column %I of %s', v_column, tg_relid::regclass),
            'It may send heartbeats, and set the status words that the app lists for machines; let the backend do the rest.');
        end if;
      end if;
      if v_is_machine
        and new.__status is distinct from old.__status
        and (new.__status::text = any (__statuses)) is not true
      then
        perform arbiter._fail('insufficient_privilege',
          format('a machine''s token may not set the status %s of %s',
            coalesce(quote_literal(new.__status), 'null'), tg_relid::regclass),
          'Let the backend set it, or list the word: arbiter.register_machines(), p_machine_statuses.');
      end if;
    end;
  end if;
  return new;
end
$$;
comment on function arbiter._limit_template() is
  'Keeps a machine''s token to its heartbeat and the status words for machines, as a template.';

create or replace function arbiter._stamp_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
  new.__heartbeat := __beat(new);
  -- The stored value never moves back, unless the clock was set back by more than the timeout (_fresh_expression). Two
  -- conditions, because one that contains a query would be run as a query each time.
  if tg_op = 'UPDATE' and old.__heartbeat > new.__heartbeat then
    if old.__heartbeat - new.__heartbeat < (select s.heartbeat_timeout from arbiter.settings s where s.singleton) then
      new.__heartbeat := old.__heartbeat;
    end if;
  end if;
  return new;
end
$$;
comment on function arbiter._stamp_template() is 'Stamps a heartbeat with the database''s clock, as a template.';

create or replace function arbiter._note_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
  case tg_op
    when 'INSERT' then
      perform arbiter._note_machine(
        null, null, null,
        new.__user::text collate "C", new.__machine::text collate "C", __state(new));
    when 'UPDATE' then
      perform arbiter._note_machine(
        old.__user::text collate "C", old.__machine::text collate "C", __state(old),
        new.__user::text collate "C", new.__machine::text collate "C", __state(new));
    when 'DELETE' then
      perform arbiter._note_machine(
        old.__user::text collate "C", old.__machine::text collate "C", __state(old),
        null, null, null);
    when 'TRUNCATE' then
      perform arbiter._note_absent_machines();
  end case;
  return null;
end
$$;
comment on function arbiter._note_template() is 'Notes when a machine leaves running, enters error, or goes, as a template.';

-- A scalar subquery by primary key for each row, so that the plan does not depend on statistics and is the same for one
-- heartbeat and for many.
create or replace function arbiter._activate_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
declare
  v_timeout interval;
  v_machine record;
begin
  -- The common case: all are machines that hold the lease already.
  perform from arbiter_rows n where n.__machine::text collate "C" is distinct from __settled_machine(n);
  if not found then
    return null;
  end if;
  select s.heartbeat_timeout into strict v_timeout from arbiter.settings s where s.singleton;
  for v_machine in
    select m.machine_id, m.user_id, m.heartbeat_at
      from (
        select n.__machine::text collate "C" as machine_id, n.__user::text collate "C" as user_id, n.__heartbeat as heartbeat_at
          from arbiter_rows n
         where n.__user is not null
           and __state(n) = 'running'
           and n.__machine::text collate "C" is distinct from __settled_machine(n)) m
     -- The machine that the lease drains to comes first: _activate() for another one locks the lease, and this
     -- transaction cannot hand over what it has locked.
     order by m.user_id, m.machine_id is distinct from (
         select l.draining_to from arbiter.leases l where l.user_id = m.user_id), m.machine_id
  loop
    if arbiter._is_fresh(v_machine.heartbeat_at, v_timeout, clock_timestamp()) then
      perform arbiter._activate(v_machine.user_id, v_machine.machine_id);
    end if;
  end loop;
  return null;
end
$$;
comment on function arbiter._activate_template() is 'Gives the lease to a machine that a write has left healthy, as a template.';

-- By the database's clock, when it sees the change: the app's own columns are not trusted.
create or replace function arbiter._note_machine(
  p_old_user_id text,
  p_old_machine_id text,
  p_old_state text,
  p_new_user_id text,
  p_new_machine_id text,
  p_new_state text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_same boolean := (p_old_user_id, p_old_machine_id) is not distinct from (p_new_user_id, p_new_machine_id);
  v_old_state text := case when v_same then p_old_state end;
begin
  -- Deleted, or given to another user: its claim ends like a stop.
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
  -- It has left running now, or earlier and was noted then. A machine that runs again has its note cleared.
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at, entered_error_at)
  values (p_new_user_id, p_new_machine_id,
    case when p_new_state <> 'running' then clock_timestamp() end,
    case when p_new_state = 'error' then clock_timestamp() end)
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = case
          when v_old_state = 'running' then excluded.left_running_at
          when p_new_state <> 'running' then coalesce(n.left_running_at, excluded.left_running_at) end,
        -- One that starts again out of an error, or fails again before it has run, is still in the first one. By the
        -- old state, too, because the note may be older than a change of what the status words mean.
        entered_error_at = case
          when v_old_state in ('error', 'starting') and p_new_state in ('error', 'starting')
            then coalesce(n.entered_error_at, excluded.entered_error_at)
          else excluded.entered_error_at end;
  if not v_same then
    perform arbiter._create_lease(p_new_user_id, 'registered')
      where not exists (select from arbiter.leases l where l.user_id = p_new_user_id);
  end if;
end
$$;
comment on function arbiter._note_machine(text, text, text, text, text, text) is
  'Notes a change of a machine''s state or owner. The old values are null for a new machine, the new ones for a deleted one.';

create or replace function arbiter._note_absent_machines()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  -- Machines that are noted already are left out, because `do update` would lock their notes.
  insert into arbiter.machine_notes as n (user_id, machine_id, left_running_at)
  select l.user_id, m.machine_id, clock_timestamp()
    from arbiter.leases l
    cross join lateral (values (l.machine_id), (l.draining_to)) as m (machine_id)
   where m.machine_id is not null
     and not exists (
       select from arbiter.machines r
        where r.machine_id::text collate "C" = m.machine_id and r.user_id::text collate "C" = l.user_id)
     and not exists (
       select from arbiter.machine_notes k
        where k.user_id = l.user_id and k.machine_id = m.machine_id and k.left_running_at is not null)
  on conflict on constraint machine_notes_pkey do update
    set left_running_at = coalesce(n.left_running_at, excluded.left_running_at);
end
$$;
comment on function arbiter._note_absent_machines() is
  'Ends the claims of machines that hold a lease, or that one drains to, and are not in the registry: like a stop.';

-- For a machine that is healthy but does not hold the settled lease of its user. No step here waits for another
-- transaction; what does not succeed now succeeds with the next heartbeat.
create or replace function arbiter._activate(p_user_id text, p_machine_id text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_settings arbiter.settings;
  v_lease arbiter.leases;
  v_incumbent text;
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

  -- No key column changes below, so this lock does not conflict with writers in flight, only with a handover.
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
  -- Another machine keeps the lease while it may write, and also while an old snapshot cannot tell.
  if v_incumbent is not null then
    v_machine := arbiter._machine(p_user_id, v_incumbent);
    if (arbiter._verdict('cloud', v_incumbent, v_lease, v_machine, v_settings, clock_timestamp())).code is null
       or not arbiter._sees_now(v_machine)
    then
      return;
    end if;
  end if;
  -- When the lease was draining away from this very machine the drain just ends: an earlier yes to a takeover is void.
  update arbiter.leases l
     set draining_to = nullif(p_machine_id, l.machine_id),
         draining_since = case when l.machine_id is distinct from p_machine_id then clock_timestamp() end
   where l.user_id = p_user_id;
end
$$;
comment on function arbiter._activate(text, text) is
  'Marks the drain of a user''s lease to a healthy machine, or ends it when no write is in flight. Never waits.';
