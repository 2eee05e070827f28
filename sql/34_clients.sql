-- The roles of clients (_client_roles, 11_identity.sql): what each kind may call and read, and how the owner names one.
-- First everything is closed, whichever default privileges the database has; then what clients need is opened.

create or replace function arbiter._close_all()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close('schema', 'arbiter', n.nspacl, n.nspowner)
     from pg_catalog.pg_namespace n
    where n.nspname = 'arbiter' and n.nspacl is not null;
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
  'Revokes every privilege on schema arbiter and on its functions, tables and sequences from every role but the owner.';

create or replace function arbiter._open_to_clients()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_all text := arbiter._grantees('{visitor,user,backend}');
  v_callers text := arbiter._grantees('{user,backend}');
  v_users text := arbiter._grantees('{user}');
  v_backends text := arbiter._grantees('{backend}');
begin
  if v_all is not null then
    -- A policy needs no usage of the schema.
    execute format('grant execute on function arbiter.claimed_user_id(), arbiter.claimed_machine_id() to %s', v_all);
  end if;
  if v_callers is not null then
    execute format('grant usage on schema arbiter to %s', v_callers);
    -- _fail() and _error(), because heartbeat() runs as its caller and fails with these.
    execute format('grant execute on function arbiter.status(text), arbiter.status(uuid), '
      'arbiter.confirm_takeover(text), arbiter.confirm_takeover(uuid), '
      'arbiter.heartbeat(text), arbiter.heartbeat(uuid), arbiter.heartbeats(text[]), arbiter.version(), '
      'arbiter._fail(text, text, text), arbiter._error(text, text, text, jsonb, integer) to %s', v_callers);
    -- The periods, and whether there is a registry.
    execute format('grant select on arbiter.settings, arbiter.registry to %s', v_callers);
  end if;
  -- Users read their own rows, by the policies of 24_policies.sql; the backend reads all.
  if v_users is not null then
    execute format('grant select on arbiter.leases, arbiter.handovers to %s', v_users);
  end if;
  if v_backends is not null then
    execute format('grant select on arbiter.leases, arbiter.handovers, arbiter.protections, arbiter.observations, '
      'arbiter.amendments, arbiter.machine_notes to %s', v_backends);
  end if;
end
$$;
comment on function arbiter._open_to_clients() is
  'Grants the roles of clients what each kind needs (_client_roles), but for the view of machines (_open_machines). Nothing is granted to PUBLIC.';

create or replace function arbiter._change_clients()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close_all();
  perform arbiter._open_to_clients();
  perform arbiter._open_machines();
  perform arbiter._expose(s.schema_name) from (select distinct e.schema_name from arbiter._exposed() e) as s;
  -- Policies change only under the strongest lock: take it at once, since a later upgrade can deadlock with a reader.
  perform arbiter._lock_tables(array(
    select distinct w.table_name
      from arbiter._wrong_policies(null) w
      join pg_catalog.pg_class c on c.oid = w.table_name
     where c.relnamespace <> 'arbiter'::regnamespace), 'access exclusive');
  perform arbiter._build_policies();
end
$$;
comment on function arbiter._change_clients() is 'Makes privileges and policies those of the roles of clients that there are now.';

create or replace function arbiter.add_client_role(p_role name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
begin
  perform arbiter._need_client_role(p_role);
  lock table arbiter.protections, arbiter.registry in share row exclusive mode;
  insert into arbiter.client_roles (role) values (p_role) on conflict on constraint client_roles_pkey do nothing;
  perform arbiter._change_clients();
end
$$;
comment on function arbiter.add_client_role(name) is
  'Names a role of clients, besides those of Supabase: it may call status(), confirm_takeover() and heartbeat() and read its own leases and handovers, and the policies of registry and protected tables hold for it. arbiter believes the request.jwt.claims of its sessions. Idempotent. Error 42704 when the role does not exist. For the owner of arbiter.';

create or replace function arbiter.remove_client_role(p_role name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
begin
  lock table arbiter.protections, arbiter.registry in share row exclusive mode;
  delete from arbiter.client_roles c where c.role = p_role;
  perform arbiter._change_clients();
end
$$;
comment on function arbiter.remove_client_role(name) is
  'Takes from a role what arbiter.add_client_role() has given it. The role need not exist any more; Supabase''s roles keep what they have. For the owner of arbiter.';
