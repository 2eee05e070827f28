-- For clients that reach one schema only, as PostgREST's do: functions of that schema that call arbiter.status() and
-- arbiter.confirm_takeover(). Opt-in. They run as their caller; the functions that they call check who asks. Their
-- columns are written out, because generators of types for clients do not look into other schemas. One function of each
-- name: PostgREST answers HTTP 300 where two take the same call, and JSON has no uuids.

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

-- Whichever parameters they have: PostgREST answers each call with HTTP 300 when two functions take it.
create or replace function arbiter._beside_exposed(p_schema name)
returns setof regprocedure
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select p.oid::regprocedure
    from pg_catalog.pg_proc p
   where p.pronamespace = to_regnamespace(quote_ident(p_schema))
     and p.proname in ('execution_status', 'confirm_takeover')
     and p.oid not in (select e.function_name from arbiter._exposed() e)
   order by p.oid;
end;
comment on function arbiter._beside_exposed(name) is
  'Functions of a schema that have the name of one that arbiter.expose() makes there, and are not arbiter''s.';

-- An install calls this and not expose(): a function of the app that came later must not stop it.
create or replace function arbiter._expose(p_schema name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_beside regprocedure[] := array(select arbiter._beside_exposed(p_schema));
  v_callers text := arbiter._grantees('{user,backend}');
  v_columns text := (
    select string_agg(format('%I %s', a.attname, format_type(a.atttypid, null)), ', ' order by a.attnum)
      from pg_catalog.pg_attribute a
     where a.attrelid = 'arbiter.execution_status'::regclass and a.attnum > 0 and not a.attisdropped);
  v_function regprocedure;
begin
  v_function := to_regprocedure(format('%I.execution_status(text)', p_schema));
  if v_function is null or v_function <> all (v_beside) then
    execute format($sql$
      create or replace function %1$I.execution_status(p_user_id text default null)
      returns table (%2$s)
      language sql
      stable
      set search_path = pg_catalog, pg_temp
      begin atomic
        select * from arbiter.status(p_user_id);
      end
      $sql$,
      p_schema, v_columns);
    execute format('comment on function %I.execution_status(text) is %L', p_schema,
      'arbiter: which environment is active for the user of the token, as arbiter.status() says.');
    perform arbiter._record('function', '-', format('%I.execution_status(text)', p_schema)::regprocedure::text);
  end if;
  v_function := to_regprocedure(format('%I.confirm_takeover(text)', p_schema));
  if v_function is null or v_function <> all (v_beside) then
    execute format($sql$
      create or replace function %1$I.confirm_takeover(p_user_id text default null)
      returns table (%2$s)
      language sql
      set search_path = pg_catalog, pg_temp
      begin atomic
        select * from arbiter.confirm_takeover(p_user_id);
      end
      $sql$,
      p_schema, v_columns);
    execute format('comment on function %I.confirm_takeover(text) is %L', p_schema,
      'arbiter: the user''s yes to a takeover after a machine''s error, arbiter.confirm_takeover().');
    perform arbiter._record('function', '-', format('%I.confirm_takeover(text)', p_schema)::regprocedure::text);
  end if;

  for v_function in select e.function_name from arbiter._exposed() e where e.schema_name = p_schema loop
    -- Supabase's default privileges open every new function of public, also to anon.
    perform arbiter._close('routine', v_function::text, p.proacl, p.proowner)
       from pg_catalog.pg_proc p
      where p.oid = v_function;
    if v_callers is not null then
      execute format('grant execute on function %s to %s', v_function, v_callers);
    end if;
  end loop;
  perform pg_notify('pgrst', 'reload schema');
end
$$;
comment on function arbiter._expose(name) is
  'Creates the functions that arbiter.expose() makes, but for one in whose place the app has its own.';

create or replace function arbiter.expose(p_schema name default 'public')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_function regprocedure;
begin
  if p_schema is null or p_schema = 'arbiter' or to_regnamespace(quote_ident(p_schema)) is null then
    perform arbiter._fail('invalid_schema_name',
      format('cannot expose functions in schema %s', coalesce(quote_ident(p_schema), 'null')),
      'Name a schema of the app that its API serves, such as public.');
  end if;
  select f.id into v_function from arbiter._beside_exposed(p_schema) as f (id) limit 1;
  if found then
    perform arbiter._fail('duplicate_function',
      format('there is a function %s already, and it is not arbiter''s', v_function),
      'Rename it, or expose into another schema; nothing was changed.');
  end if;
  perform arbiter._expose(p_schema);
end
$$;
comment on function arbiter.expose(name) is
  'Creates execution_status and confirm_takeover in a schema that the API serves, for the roles of clients. Idempotent. Error 3F000 without such a schema, 42723 when the app has a function of that name there, whichever parameters it has.';

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
