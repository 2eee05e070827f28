-- Who asks: what the API has read from a verified token and put into the setting request.jwt.claims. Two generated
-- functions read it (20_ids.sql): claimed_user_id(), by the claim settings.user_claim, and claimed_machine_id(). In
-- policies these are wrapped as (select ...), which the server evaluates once for a statement.

-- In a definer function current_user is the function's owner; the setting is the role that the client has set. These
-- two are without settings of their own, so that the server puts their bodies into the caller's: it read them when they
-- were made.
create or replace function arbiter._session_role()
returns name
language sql
stable
return coalesce(nullif(current_setting('role'), 'none'), session_user);
comment on function arbiter._session_role() is 'The role that the session acts as, also inside a definer function.';

create or replace function arbiter._is_owner_session()
returns boolean
language sql
stable
return pg_has_role(arbiter._session_role(), current_user, 'usage');
comment on function arbiter._is_owner_session() is
  'Whether the session''s role may act as arbiter''s owner. For definer functions.';

create or replace function arbiter._is_trusted_session()
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if arbiter._is_owner_session() then
    return true;
  end if;
  return exists (select from pg_catalog.pg_roles r where r.rolname = arbiter._session_role() and r.rolbypassrls);
end
$$;
comment on function arbiter._is_trusted_session() is
  'Whether the session may act for any user: its role may act as arbiter''s owner, or row security does not bind it. For definer functions.';

create or replace function arbiter._caller(p_user_id text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  -- By its bytes: a caller may choose the collation of the argument, and one by which other users' ids are equal.
  v_user_id text collate "C";
begin
  if p_user_id is null then
    v_user_id := arbiter.claimed_user_id();
    if v_user_id is null then
      perform arbiter._fail('invalid_parameter_value',
        'no user',
        'Pass p_user_id, or set request.jwt.claims with the claim of arbiter.settings.user_claim.');
    end if;
    return v_user_id;
  end if;
  -- Most often it is a uuid as the server prints it, which has no other text. To see that is cheaper than to read it.
  v_user_id := p_user_id;
  if v_user_id not like '________-____-____-____-____________' or v_user_id <> lower(v_user_id) then
    v_user_id := arbiter._user_text(v_user_id);
  end if;
  -- The cheapest question first, alone, because the server sets up a whole condition before it evaluates any of it.
  if arbiter._is_owner_session() then
    return v_user_id;
  end if;
  if v_user_id is distinct from arbiter.claimed_user_id() and not arbiter._is_trusted_session() then
    perform arbiter._fail('insufficient_privilege',
      'only a trusted role may ask about another user',
      'Leave p_user_id out: the user is the one of request.jwt.claims.');
  end if;
  return v_user_id;
end
$$;
comment on function arbiter._caller(text) is
  'The user that a call is about: p_user_id, or the session''s user when that is null. Error 42501 when that is another user and the role is not trusted, 22023 when there is none.';

-- Clients are Supabase's roles, where it has made them, and the roles that the owner has named. By kind:
--
--   visitor   calls only what the policies of the app's tables call
--   user      asks, confirms and sends heartbeats; policies say which environment it may claim
--   backend   the same for all users, and reads arbiter's tables
create or replace function arbiter._client_roles()
returns table (role name, kind text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select r.rolname, k.kind
    from pg_catalog.pg_roles r
    join (values ('anon', 'visitor'), ('authenticated', 'user'), ('service_role', 'backend')) as k (role, kind)
      on r.rolname = k.role
   where k.kind = 'backend'
      or 2 = (select count(*) from pg_catalog.pg_roles o where o.rolname in ('anon', 'authenticated'))
  union all
  select r.rolname, 'user'
    from arbiter.client_roles c
    join pg_catalog.pg_roles r on r.rolname = c.role;
end;
comment on function arbiter._client_roles() is
  'The roles of clients that exist, each with its kind: visitor, user or backend. A role that is named as well has two rows.';

create or replace function arbiter._is_client_session()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
return not arbiter._is_trusted_session() and exists (
  select from arbiter._client_roles() k
   where k.kind in ('visitor', 'user') and pg_has_role(arbiter._session_role(), k.role, 'usage'));
comment on function arbiter._is_client_session() is
  'Whether the session is a browser''s or has a machine''s token: its role is that of a client, or a member of it, and is not trusted. For definer functions.';

create or replace function arbiter._grantees(p_kinds text[])
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select string_agg(quote_ident(c.role), ', ' order by c.role)
    from (select distinct r.role from arbiter._client_roles() r where r.kind = any (p_kinds)) as c;
end;
comment on function arbiter._grantees(text[]) is
  'The roles of clients of these kinds, as grants and policies list them; null when there are none.';
