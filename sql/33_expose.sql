-- For clients that reach one schema only, as PostgREST's do: functions of that schema that call arbiter.status() and
-- arbiter.confirm_takeover(). Opt-in. They run as their caller; the functions that they call check who asks. Their
-- columns are written out, because generators of types for clients do not look into other schemas.

create or replace function arbiter._exposed()
returns table (function_name regprocedure, schema_name name)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select p.oid::regprocedure, p.pronamespace::regnamespace::name
    from arbiter.attachments a
    join pg_catalog.pg_proc p on p.oid = to_regprocedure(a.name)
   where a.kind = 'function'
     and arbiter._ownership('function', a.attached_to, a.name) = 'ours';
end;
comment on function arbiter._exposed() is 'The functions that arbiter.expose() has made.';

create or replace function arbiter.expose(p_schema name default 'public')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_function regprocedure;
  v_columns text := (
    select string_agg(format('%I %s', a.attname, format_type(a.atttypid, null)), ', ' order by a.attnum)
      from pg_catalog.pg_attribute a
     where a.attrelid = 'arbiter.execution_status'::regclass and a.attnum > 0 and not a.attisdropped);
begin
  if p_schema is null or p_schema = 'arbiter' or to_regnamespace(quote_ident(p_schema)) is null then
    perform arbiter._fail('invalid_schema_name',
      format('cannot expose functions in schema %s', coalesce(quote_ident(p_schema), 'null')),
      'Name a schema of the app that its API serves, such as public.');
  end if;
  select f.id
    into v_function
    from (values
      (to_regprocedure(format('%I.execution_status(uuid)', p_schema))),
      (to_regprocedure(format('%I.confirm_takeover(uuid)', p_schema)))) as f (id)
   where f.id is not null
     and f.id not in (select e.function_name from arbiter._exposed() e);
  if found then
    perform arbiter._fail('duplicate_function',
      format('there is a function %s already, and it is not arbiter''s', v_function),
      'Rename it, or expose into another schema; nothing was changed.');
  end if;

  execute format($sql$
    create or replace function %1$I.execution_status(p_user_id uuid default null)
    returns table (%2$s)
    language sql
    stable
    set search_path = pg_catalog, pg_temp
    begin atomic
      select * from arbiter.status(p_user_id);
    end
    $sql$,
    p_schema, v_columns);
  execute format('comment on function %I.execution_status(uuid) is %L', p_schema,
    'arbiter: which environment is active for the user of the token, as arbiter.status() says.');
  execute format($sql$
    create or replace function %1$I.confirm_takeover(p_user_id uuid default null)
    returns table (%2$s)
    language sql
    set search_path = pg_catalog, pg_temp
    begin atomic
      select * from arbiter.confirm_takeover(p_user_id);
    end
    $sql$,
    p_schema, v_columns);
  execute format('comment on function %I.confirm_takeover(uuid) is %L', p_schema,
    'arbiter: the user''s yes to a takeover after a machine''s error, arbiter.confirm_takeover().');

  perform arbiter._record('function', '-', format('%I.%I(uuid)', p_schema, f.name)::regprocedure::text)
     from unnest('{execution_status,confirm_takeover}'::text[]) as f (name);
  -- Supabase's default privileges open every new function of public, also to anon.
  perform arbiter._close('routine', e.function_name::text, p.proacl, p.proowner)
     from arbiter._exposed() e
     join pg_catalog.pg_proc p on p.oid = e.function_name
    where e.schema_name = p_schema;
  execute (
    select format('grant execute on function %1$I.execution_status(uuid), %1$I.confirm_takeover(uuid) to %2$s', p_schema,
             string_agg(quote_ident(r.rolname), ', '))
      from pg_catalog.pg_roles r
     where r.rolname in ('authenticated', 'service_role')
    having count(*) > 0);
  perform pg_notify('pgrst', 'reload schema');
end
$$;
comment on function arbiter.expose(name) is
  'Creates execution_status and confirm_takeover in a schema that the API serves, for authenticated and service_role. Idempotent. Error 3F000 without such a schema, 42723 when the app has a function of that name.';

create or replace function arbiter.unexpose(p_schema name default 'public')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_function regprocedure;
begin
  for v_function in select e.function_name from arbiter._exposed() e where e.schema_name = p_schema loop
    perform arbiter._forget('function', '-', v_function::text);
    execute format('drop function %s', v_function);
  end loop;
  perform pg_notify('pgrst', 'reload schema');
end
$$;
comment on function arbiter.unexpose(name) is 'Drops what arbiter.expose() has created in a schema.';
