-- The triggers of arbiter's own tables. Handovers and drains are announced to clients by a notification, and on
-- Supabase by a broadcast; heartbeats are not. Clients must poll arbiter.status() all the same, because poolers drop
-- notifications, and because none is sent while the server's queue fills up.

-- An announcement never fails the write that it is about. The lock_timeout bounds its wait for the broadcast's table.
create or replace function arbiter.tg_announce()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  v_event text := case when new.epoch = old.epoch then 'drain' else 'handover' end;
  v_payload jsonb := jsonb_build_object(
    'event', v_event, 'user_id', new.user_id, 'epoch', new.epoch, 'holder', new.holder,
    'machine_id', new.machine_id, 'draining', new.draining_since is not null, 'draining_to', new.draining_to);
begin
  -- Any login may listen, so the notification says nothing about the user. A transaction that has notified cannot be
  -- prepared, so there are no notifications where transactions can be. With a full queue the commit would fail: a
  -- listener in a long transaction fills it. Half of it is left for what others send before this commit.
  if current_setting('max_prepared_transactions') = '0' and pg_notification_queue_usage() < 0.5 then
    perform pg_notify('arbiter', v_event);
  end if;
  -- Only a function of an owner that is trusted: it runs with the rights of arbiter's owner, and any role that may
  -- create schemas could have made one of that name.
  if exists (
    select from pg_catalog.pg_proc p
      join pg_catalog.pg_roles r on r.oid = p.proowner
     where p.oid = to_regprocedure('realtime.send(jsonb, text, text, boolean)')
       and (r.rolsuper or r.rolname = current_user
        or r.rolname = 'supabase_realtime_admin' and exists (
          select from pg_catalog.pg_roles s where s.rolname = 'supabase_admin' and s.rolsuper)))
  then
    -- A broadcast that fails must not fail the write that hands over.
    begin
      execute 'select realtime.send($1, $2, $3, true)' using v_payload, v_event, 'arbiter:' || new.user_id;
    exception
      when others then
        raise warning 'arbiter: no broadcast of a %: %', v_event, sqlerrm;
    end;
  end if;
  return null;
end
$$;
comment on function arbiter.tg_announce() is
  'Notifies the channel arbiter of the event, handover or drain, without naming the user. Where Supabase''s realtime.send exists, broadcasts to the private topic arbiter:<user_id>: JSON with event, user_id, epoch, holder, machine_id, draining, draining_to.';

-- Definer: a role that may change the settings need not be able to replace arbiter's functions.
create or replace function arbiter.tg_settings()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
  perform arbiter._build_ids();
  perform arbiter._build_settings();
  return null;
end
$$;
comment on function arbiter.tg_settings() is 'Generates anew the functions that hold a setting.';

-- Definer, for the same reason. For each row, because a subscription applies rows and fires no other triggers.
create or replace function arbiter.tg_protections()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
as $$
begin
  perform arbiter._build_enforced();
  return null;
end
$$;
comment on function arbiter.tg_protections() is
  'Generates anew the function that says whether a protected table is in mode enforce.';

create or replace function arbiter.tg_keep_settings()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._fail('object_not_in_prerequisite_state',
    'the row of arbiter.settings cannot be deleted',
    'Update it: every decision needs it. docs/reference.md has the defaults.');
end
$$;
comment on function arbiter.tg_keep_settings() is 'Keeps the row of arbiter.settings.';

create or replace function arbiter._own_triggers()
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  values
    ('arbiter.handovers'::regclass, 'arbiter_append_only'::name,
      'before update or delete on arbiter.handovers for each row execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.'),
    ('arbiter.handovers', 'arbiter_append_only_truncate',
      'before truncate on arbiter.handovers for each statement execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.'),
    ('arbiter.amendments', 'arbiter_append_only',
      'before update or delete on arbiter.amendments for each row execute function arbiter.tg_append_only()',
      'The record of corrections is append-only.'),
    ('arbiter.amendments', 'arbiter_append_only_truncate',
      'before truncate on arbiter.amendments for each statement execute function arbiter.tg_append_only()',
      'The record of corrections is append-only.'),
    ('arbiter.leases', 'arbiter_announce',
      'after update on arbiter.leases for each row when (old.epoch <> new.epoch or old.draining_since is distinct from new.draining_since) '
        'execute function arbiter.tg_announce()',
      'Announces handovers and drains.'),
    ('arbiter.protections', 'arbiter_protections',
      'after insert or update or delete on arbiter.protections for each row execute function arbiter.tg_protections()',
      'A function holds whether a protected table is in mode enforce.'),
    ('arbiter.settings', 'arbiter_settings',
      'after insert or update on arbiter.settings for each row execute function arbiter.tg_settings()',
      'Functions hold heartbeat_timeout, poll_interval and user_claim.'),
    ('arbiter.settings', 'arbiter_keep_settings',
      'before delete or truncate on arbiter.settings for each statement execute function arbiter.tg_keep_settings()',
      'Every decision needs the settings.');
end;
comment on function arbiter._own_triggers() is
  'The triggers that arbiter''s own tables must have. definition: what follows the name in CREATE TRIGGER.';
