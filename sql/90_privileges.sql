-- Who may call and read what. Everything is closed first, whatever the database's default privileges have
-- opened; what is open is opened here. Every security definer function, and why:
--
--   status              a browser may ask, but reads neither leases nor machines
--   confirm_takeover    the user says yes, but writes neither lease nor registry
--   register_machines,  what they create must belong to the owner of arbiter; execute is the
--   protect, unprotect  owner's alone
--   tg_registry_note    keeps notes that no client may write
--   tg_registry_activate  marks leases, which no client may
--   _guard_N, _guard_row_N, _provenance_N  lock leases and read registry and path for clients
--                       that may not

create or replace function arbiter._close_all()
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close('function', p.oid::regprocedure::text, p.proacl, p.proowner)
     from pg_catalog.pg_proc p
    where p.pronamespace = 'arbiter'::regnamespace;
  perform arbiter._close(case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relacl, c.relowner)
     from pg_catalog.pg_class c
    where c.relnamespace = 'arbiter'::regnamespace
      and c.relkind in ('r', 'S');
end
$$;
revoke execute on function arbiter._close_all() from public;
comment on function arbiter._close_all() is
  'Revokes everything in schema arbiter from everybody but its owner, but for the view machines.';

do $close$
begin
  perform arbiter._close_all();
end
$close$;

grant usage on schema arbiter to public;
grant execute on function
  arbiter.status(uuid),
  arbiter.confirm_takeover(uuid),
  arbiter.heartbeat(uuid),
  arbiter.heartbeat(uuid[]),
  arbiter.claimed_user_id(),
  arbiter.claimed_machine_id(),
  arbiter.version(),
  -- heartbeat() runs as its caller, and raises.
  arbiter._throw(text, integer, text, jsonb, text)
  to public;

-- Periods are told to clients anyway; whether there is a registry is no secret.
grant select on arbiter.settings, arbiter.registry to public;

-- Users read what the policies (85_policies.sql) let them; the backend reads all.
do $roles$
begin
  if to_regrole('anon') is not null and to_regrole('authenticated') is not null then
    grant select on arbiter.leases, arbiter.handovers to authenticated;
  end if;
  if to_regrole('service_role') is not null then
    grant select on
      arbiter.leases, arbiter.handovers, arbiter.protections, arbiter.observations, arbiter.machine_notes
      to service_role;
  end if;
end
$roles$;
