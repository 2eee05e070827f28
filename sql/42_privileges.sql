-- Who may call and read what, on every install: 34_clients.sql says how, tests/access/golden has the result.
--
-- Every security definer function, and why:
--
--   status                 a browser may ask, but may read neither leases nor machines
--   confirm_takeover       the user may confirm, but may write neither lease nor registry
--   register_machines,     what they create must belong to arbiter's owner, who alone may execute them
--   protect, unprotect
--   tg_settings,           replace functions of arbiter's owner
--   tg_protections
--   tg_registry_stamp      reads settings, which a role that sends heartbeats need not be able to
--   tg_registry_note       writes notes, which no client may
--   tg_registry_activate   marks leases, which no client may
--   _guard_N, _guard_row_N, _provenance_N
--                          lock leases and read the registry and the path, which clients may not
--   _guard_template, _provenance_template, _stamp_template, _note_template,
--   _activate_template
--                          are never called; the copies above have their attributes

do $privileges$
begin
  perform arbiter._close_all();
  perform arbiter._open_to_clients();
end
$privileges$;
