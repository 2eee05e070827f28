-- The roles of a Supabase project, as far as this demo needs them. Run once per server, by its superuser.
--
--   app_owner      owns the database and everything in it; not a superuser (Supabase calls it postgres)
--   authenticator  the login of the API; has no rights itself, becomes one of the next three with set role
--   anon           a visitor without a session
--   authenticated  a user's browser
--   service_role   the app's backend and its cloud machines; row level security does not apply to it

create role app_owner login;
create role authenticator login noinherit;
create role anon nologin;
create role authenticated nologin;
create role service_role nologin bypassrls;

grant anon, authenticated, service_role to authenticator;
