-- Who wants to know at once: a notification, and on Supabase a broadcast, of handovers and drains; never of a
-- heartbeat. Polling arbiter.status() stays sufficient: poolers drop notifications.

create or replace function arbiter.tg_announce()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_event text := case when new.epoch = old.epoch then 'drain' else 'handover' end;
  v_payload jsonb := jsonb_build_object(
    'event', v_event, 'user_id', new.user_id, 'epoch', new.epoch, 'holder', new.holder,
    'machine_id', new.machine_id, 'draining', new.draining_since is not null, 'draining_to', new.draining_to);
begin
  -- A transaction that has notified cannot be prepared: where somebody might want to, nobody is notified.
  if current_setting('max_prepared_transactions') = '0' then
    perform pg_notify('arbiter', v_payload::text);
  end if;
  -- Only Supabase's own: whoever may create schemas could leave a function of that name here, and it
  -- would run with the rights of arbiter's owner.
  if exists (
    select from pg_catalog.pg_proc p
      join pg_catalog.pg_roles r on r.oid = p.proowner
     where p.oid = to_regprocedure('realtime.send(jsonb, text, text, boolean)')
       and (r.rolsuper or r.rolname in (current_user, 'supabase_admin', 'supabase_realtime_admin')))
  then
    -- The write that hands over is worth more than its announcement.
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
revoke execute on function arbiter.tg_announce() from public;
comment on function arbiter.tg_announce() is
  'Notifies the channel arbiter, and broadcasts to the private topic arbiter:<user_id> where Supabase''s realtime.send exists: JSON with event (handover, drain), user_id, epoch, holder, machine_id, draining, draining_to.';
