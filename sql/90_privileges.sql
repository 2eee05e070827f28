-- Who may call and read what. Functions were revoked from public where they are defined; what is
-- open is opened here. Every security definer function, and why:
--
--   status              a browser may ask, but reads neither leases nor machines
--   confirm_takeover    the user says yes, but writes neither lease nor registry
--   register_machines,  what they create must belong to the owner of arbiter; execute is the
--   protect, unprotect  owner's alone
--   tg_registry_note    keeps notes that no client may write
--   tg_registry_activate  marks leases, which no client may
--   _guard_N, _provenance_N  lock leases and read registry and path for clients that may not

grant usage on schema arbiter to public;
grant execute on function
  arbiter.status(uuid),
  arbiter.confirm_takeover(uuid),
  arbiter.heartbeat(uuid),
  arbiter.heartbeat(uuid[]),
  arbiter.version()
  to public;

-- Periods are told to clients anyway; whether there is a registry is no secret.
grant select on arbiter.settings, arbiter.registry to public;

do $service_role$
begin
  if exists (select from pg_catalog.pg_roles r where r.rolname = 'service_role') then
    grant select on
      arbiter.leases, arbiter.handovers, arbiter.protections, arbiter.observations, arbiter.machine_notes
      to service_role;
  end if;
end
$service_role$;
