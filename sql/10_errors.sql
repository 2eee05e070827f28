-- The eight rejections, in one place: code, SQLSTATE, message, hint, and the DETAIL that programs read;
-- and how an error reaches its reader, as SQL or over HTTP.
--
-- An error is a value until the function that the client, or the client's write, has called raises it. Each function
-- between that one and the `raise` would add two lines of CONTEXT to what the reader gets.

-- The migrations create the type; see _left_over() (40_left_over.sql).
comment on type arbiter.error is
  'An error before it is raised: the values of RAISE; all are null when there is none.';

create or replace function arbiter._rejection(
  p_code text,
  out sqlstate text,
  out message text,
  out hint text)
returns record
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  case p_code
    when 'cloud_active' then
      sqlstate := 'WX001';
      message := 'a healthy cloud machine is active for this user';
      hint := 'Switch to monitoring, or stop the cloud machine to write from the browser.';
    when 'cooling_down' then
      sqlstate := 'WX002';
      message := 'the cloud machine left running too recently';
      hint := 'Try again at retry_at, when its last writes can no longer be in flight.';
    when 'takeover_unconfirmed' then
      sqlstate := 'WX003';
      message := 'the cloud machine failed and the takeover is not confirmed';
      hint := 'Ask the user, then call arbiter.confirm_takeover().';
    when 'not_holder' then
      sqlstate := 'WX004';
      message := 'this machine does not hold the lease of the user, or its heartbeat is stale';
      hint := 'Stop trading, keep sending heartbeats, and write again once arbiter.status() names this machine.';
    when 'wrong_identity' then
      sqlstate := 'WX005';
      message := 'source, machine and user of the row do not fit together';
      hint := 'Write local without a machine, or cloud with a machine of the same user, and leave arbiter_xid to the database.';
    when 'provenance_immutable' then
      sqlstate := 'WX006';
      message := 'source, machine, user and arbiter_xid of a protected row cannot be changed';
      hint := 'Update the other columns, or insert a new row. The owner of the table corrects rows after arbiter.amend().';
    when 'handover_draining' then
      sqlstate := 'WX007';
      message := 'writes in flight keep the lease from being handed over';
      hint := 'Try again; if it lasts, end the transactions of the blockers named in the detail.';
    when 'append_only' then
      sqlstate := 'WX008';
      message := 'the history of handovers and corrections is append-only';
      hint := 'Leave it as it is: arbiter.audit() proves exclusion from it.';
  end case;
end
$$;
comment on function arbiter._rejection(text) is 'SQLSTATE, message and hint of a rejection''s code.';

-- The instant is printed in UTC, so that it does not depend on the session's time zone.
create or replace function arbiter._detail(
  p_code text,
  p_user_id text,
  p_lease arbiter.leases,
  p_retry_at timestamptz,
  p_more jsonb default '{}')
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    'code', p_code,
    'user_id', p_user_id,
    'holder', case when (p_lease).claimant is not null then 'cloud' when (p_lease).user_id is not null then 'local' end,
    'machine_id', (p_lease).claimant,
    'epoch', (p_lease).epoch,
    'retry_at', to_char(p_retry_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) || p_more;
end;
comment on function arbiter._detail(text, text, arbiter.leases, timestamptz, jsonb) is
  'The DETAIL of a rejection as a JSON object: code, user_id, holder, machine_id, epoch, retry_at (UTC), and more where a code has more to say.';

-- To an SQLSTATE that it does not know PostgREST answers HTTP 400 or 500. It takes status and headers from an error
-- with SQLSTATE PGRST, so inside its requests, for which it sets request.method, an error has that form. A client
-- that sets request.method itself gets the same error in that form. Status and headers are made of numbers only:
-- text from a client stays inside the JSON of the body.
create or replace function arbiter._error(
  p_sqlstate text,
  p_message text,
  p_hint text,
  p_detail jsonb,
  p_http_status integer)
returns arbiter.error
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if coalesce(current_setting('request.method', true), '') = '' then
    return (p_sqlstate, p_message, p_detail::text, p_hint)::arbiter.error;
  end if;
  return (
    'PGRST',
    jsonb_build_object('code', p_sqlstate, 'message', p_message, 'details', p_detail::text, 'hint', p_hint)::text,
    jsonb_build_object(
      'status', p_http_status,
      'headers', case when p_detail ->> 'retry_at' is null then '{}'
                 else jsonb_build_object('Retry-After', greatest(1,
                   ceil(extract(epoch from (p_detail ->> 'retry_at')::timestamptz - clock_timestamp())))::text) end)::text,
    p_hint)::arbiter.error;
end
$$;
comment on function arbiter._error(text, text, text, jsonb, integer) is
  'An error that programs read: with its SQLSTATE, or for a request of PostgREST with that HTTP status, and Retry-After when the detail has retry_at.';

create or replace function arbiter._rejected(p_code text, p_detail jsonb, p_hint text default null)
returns arbiter.error
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rejection record := arbiter._rejection(p_code);
begin
  return arbiter._error(
    v_rejection.sqlstate, v_rejection.message, coalesce(p_hint, v_rejection.hint), p_detail, 409);
end
$$;
comment on function arbiter._rejected(text, jsonb, text) is
  'The error of a rejection. p_hint: in place of the code''s own hint.';
