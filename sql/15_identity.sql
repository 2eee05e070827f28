-- Who asks: what the API has read from a verified token and put into the setting request.jwt.claims. In
-- policies these are wrapped as (select ...), which the server evaluates once for a statement.

create or replace function arbiter.claimed_user_id()
returns uuid
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  return nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub';
end
$$;
revoke execute on function arbiter.claimed_user_id() from public;
comment on function arbiter.claimed_user_id() is
  'The user of the session''s token, its claim sub, as auth.uid() reads it; null without one. Error 22P02 when that is no uuid.';

-- Only the claim itself: user_metadata, which users edit, is not looked into. What is no uuid is an error, since
-- no token with such a claim is a browser's.
create or replace function arbiter.claimed_machine_id()
returns uuid
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  return nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'machine_id';
end
$$;
revoke execute on function arbiter.claimed_machine_id() from public;
comment on function arbiter.claimed_machine_id() is
  'The machine of the session''s token, its claim machine_id; null for a browser. Error 22P02 when that is no uuid.';

-- The user who asks. Only a trusted role may ask about another.
create or replace function arbiter._caller(p_user_id uuid)
returns uuid
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  -- Inside a definer function current_user is its owner; the setting is the role that the client took.
  v_role name := coalesce(nullif(current_setting('role'), 'none'), session_user);
  v_subject uuid := arbiter.claimed_user_id();
  v_user_id uuid := v_subject;
begin
  if p_user_id is distinct from v_subject and p_user_id is not null then
    -- Whoever may act as the owner of arbiter, or is beyond row security anyway.
    if pg_has_role(v_role, current_user, 'usage') then
      return p_user_id;
    end if;
    if not exists (select from pg_catalog.pg_roles r where r.rolname = v_role and r.rolbypassrls) then
      raise exception using
        errcode = 'insufficient_privilege',
        message = 'arbiter: only a trusted role may ask about another user',
        hint = 'Leave p_user_id out: the user is the sub of request.jwt.claims.';
    end if;
    v_user_id := p_user_id;
  end if;
  if v_user_id is null then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = 'arbiter: no user',
      hint = 'Pass p_user_id, or set request.jwt.claims with a sub.';
  end if;
  return v_user_id;
end
$$;
revoke execute on function arbiter._caller(uuid) from public;
comment on function arbiter._caller(uuid) is
  'The user that a call is about. Error 42501 when that is another user and the role is not trusted, 22023 when there is none.';
