-- Who may call and read what. First everything is closed, whichever default privileges the database has; then the
-- functions and tables for clients are opened. tests/access/golden/privileges.txt has the result.
--
-- Every security definer function, and why:
--
--   status                 a browser may ask, but may read neither leases nor machines
--   confirm_takeover       the user may confirm, but may write neither lease nor registry
--   register_machines,     what they create must belong to arbiter's owner, who alone may execute them
--   protect, unprotect
--   tg_settings            replaces a function of arbiter's owner
--   tg_registry_note       writes notes, which no client may
--   tg_registry_activate   marks leases, which no client may
--   _guard_N, _guard_row_N, _provenance_N
--                          lock leases and read the registry and the path, which clients may not
--   _guard_template, _provenance_template, _note_template, _activate_template
--                          are never called; the copies above have their attributes

create or replace function arbiter._close_all()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close('routine', p.oid::regprocedure::text, p.proacl, p.proowner)
     from pg_catalog.pg_proc p
    where p.pronamespace = 'arbiter'::regnamespace;
  perform arbiter._close(case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relacl, c.relowner)
     from pg_catalog.pg_class c
    where c.relnamespace = 'arbiter'::regnamespace
      and c.relkind in ('r', 'S');
end
$$;
comment on function arbiter._close_all() is
  'Revokes every privilege on functions, tables and sequences of schema arbiter from every role but the owner.';

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
  -- heartbeat() runs as its caller, and fails with these.
  arbiter._fail(text, text, text),
  arbiter._error(text, text, text, jsonb, integer)
  to public;

-- Clients may know the periods, and whether there is a registry.
grant select on arbiter.settings, arbiter.registry to public;

-- Users read their own rows, by the policies of 24_policies.sql; the backend reads all.
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
