-- Ids of users and machines have the type that the app uses: uuid, text, varchar or integers. arbiter's own tables have
-- their text, collation "C": a uuid in lower case, a number without leading zeros.
--
-- What comes from outside (a claim, an argument, a text column beside a registry of uuids) first gets the text of the
-- id that it names, by the type of the registry's ids: _user_text(). So an id in upper case finds a uuid, but two
-- texts never become one where the app's ids are texts. A text that cannot be of that type finds nothing.
--
-- What depends on these types is generated (_build_ids): whenever the registry or settings.user_claim changes.

-- A CASE, because the server evaluates no branch that it does not need. A pattern for the places of the dashes and a
-- regular expression without counts are the cheapest complete test of a uuid that PostgreSQL 15 has. A number that may
-- have too many digits is compared first, so that nothing overflows.
create or replace function arbiter._id_expression(p_class text, p_text text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case p_class
  when 'uuid' then format(
    'case when %1$s collate "C" like ''________-____-____-____-____________'' '
      'and %1$s collate "C" ~ ''^[0-9a-f]*-[0-9a-f]*-[0-9a-f]*-[0-9a-f]*-[0-9a-f]*$'' then %1$s::uuid end', p_text)
  when 'bigint' then format(
    'case when translate(%1$s, ''0123456789'', '''') = '''' and length(%1$s) between 1 and 18 then %1$s::bigint '
      'else %2$s end', p_text, arbiter._any_id_expression(p_class, p_text))
  else p_text
end;
comment on function arbiter._id_expression(text, text) is
  'SQL for the id of a class (_id_class) whose text this is; null when it is the text of none.';

-- What has the form of a uuid and no capitals is a uuid as the server prints it, or none.
create or replace function arbiter._usual_expression(p_class text, p_text text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case p_class
  when 'uuid' then format(
    '(%1$s collate "C" like ''________-____-____-____-____________'' and %1$s = lower(%1$s collate "C"))', p_text)
  else 'false'
end;
comment on function arbiter._usual_expression(text, text) is
  'SQL for whether a text is surely not another form of the id that it names, which is cheaper than to read it.';

-- By the view and not by arbiter.registry, because the view follows a column that is renamed. A registry that was
-- dropped with the view has left the functions that were made for its types: guards go on with these.
create or replace function arbiter._registry_ids()
returns table (kind text, class text, type text, collation_name text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case a.attname when 'machine_id' then 'machine' else 'user' end, arbiter._id_class(a.attrelid, a.attname),
         format_type(arbiter._base_type(a.atttypid), null),
         case when l.oid is not null then format('%I.%I', l.collnamespace::regnamespace::name, l.collname) end
    from pg_catalog.pg_attribute a
    left join pg_catalog.pg_collation l on l.oid = a.attcollation
   where a.attrelid = to_regclass('arbiter.machines')
     and a.attname in ('machine_id', 'user_id')
  union all
  select substr(p.proname, 5), arbiter._class_of_type(format_type(p.proargtypes[0], null)), format_type(p.proargtypes[0], null), null
    from pg_catalog.pg_proc p
   where p.pronamespace = 'arbiter'::regnamespace
     and p.proname in ('_is_machine', '_is_user')
     and to_regclass('arbiter.machines') is null;
end;
comment on function arbiter._registry_ids() is
  'The types of the ids in arbiter.machines; text before a table was registered. class: as _id_class().';

create or replace function arbiter._registry_class(p_kind text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  -- Without the view, for example after a registry was dropped with cascade, there are no types to go by.
  select coalesce(max(i.class), 'text') from arbiter._registry_ids() i where i.kind = p_kind;
end;
comment on function arbiter._registry_class(text) is 'How the registry''s ids are written (_id_class). p_kind: user or machine.';

-- A name may have dots if it is in double quotes, as Auth0's have: "https://example.com/claims".org_id.
create or replace function arbiter._claim_path(p_user_claim text)
returns text[]
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select array_agg(coalesce(m.names[1], m.names[2]) order by m.position)
    from regexp_matches(p_user_claim, '"([^"]+)"|([^".]+)', 'g') with ordinality as m (names, position);
end;
comment on function arbiter._claim_path(text) is 'The names of settings.user_claim, from the outermost on.';

-- What is neither a text nor a number is no user. The common case comes first, because plpgsql sets up a statement only
-- when it is reached.
create or replace function arbiter._claimed_user_template()
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id text := nullif(current_setting('request.jwt.claims', true), '')::jsonb #>> __path;
begin
  if v_id is null then
    return null;
  end if;
  -- The text of a list or an object may have the dashes of a uuid.
  if __is_usual and v_id not like '[%' and v_id not like '{%' then
    return v_id;
  end if;
  if v_id = '' or jsonb_typeof(current_setting('request.jwt.claims')::jsonb #> __path) not in ('string', 'number') then
    return null;
  end if;
  return __normal;
end
$$;
comment on function arbiter._claimed_user_template() is 'The user of the session''s token, as a template.';

-- Only the claim itself counts: users can edit user_metadata. A claim that is no id names no machine, but is not null,
-- because null would make the token a browser's.
create or replace function arbiter._claimed_machine_template()
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id text := nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'machine_id';
begin
  if v_id is null then
    return null;
  end if;
  if __is_usual then
    return v_id;
  end if;
  return __normal;
end
$$;
comment on function arbiter._claimed_machine_template() is 'The machine of the session''s token, as a template.';

create or replace function arbiter._id_words(p_kind text, p_text text)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    '__is_usual', arbiter._usual_expression(k.class, p_text),
    '__normal', arbiter._normal_expression(k.class, p_text),
    -- Without settings there is no user.
    '__path', (select quote_literal(coalesce(max(arbiter._claim_path(s.user_claim)), '{sub}')) from arbiter.settings s))
    from (select arbiter._registry_class(p_kind) as class) k;
end;
comment on function arbiter._id_words(text, text) is
  'What the words of the two templates stand for. p_kind: user or machine; p_text: the variable that they read.';

-- All but the last are without settings of their own, because only so the server puts their bodies into a query, where
-- an index can serve. It reads such a body once, when the function is made: no search_path matters to it. Stable,
-- although they read no table, so that a plan knows that it depends on them (21_active.sql).
create or replace function arbiter._id_functions()
returns table (name text, parameters text, definition text, meaning text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select '_is_' || i.kind, i.type || ', text',
         format('create or replace function arbiter._is_%1$s(p_%1$s_id %2$s, p_id text) returns boolean language sql stable '
           'return p_%1$s_id = %3$s', i.kind, i.type,
           concat_ws(' collate ', arbiter._id_expression(i.class, 'p_id'), i.collation_name)),
         format('Whether an id of a %s in the registry is the one that a text names.', i.kind)
    from arbiter._registry_ids() i
  union all
  select '_user_text', 'text',
         format('create or replace function arbiter._user_text(p_id text) returns text language sql stable '
           'return case when %s then p_id else %s end',
           arbiter._usual_expression(c.class, 'p_id'), arbiter._normal_expression(c.class, 'p_id')),
         'The text by which arbiter knows the user that a text names, by the type of the registry''s users.'
    from (select arbiter._registry_class('user') as class) c
  union all
  select '_machine_keys', 'text[]',
         format('create or replace function arbiter._machine_keys(p_ids text[]) returns %s[] language sql stable '
           'set search_path = pg_catalog, pg_temp '
           'return array(select %s from unnest(p_ids) with ordinality as i (id, position) order by i.position)',
           i.class, arbiter._any_id_expression(i.class, 'i.id')),
         'The ids of machines that texts name, in their order; null for a text that names none.'
    from arbiter._registry_ids() i
   where i.kind = 'machine';
end;
comment on function arbiter._id_functions() is
  'The functions that read the texts of ids by the types of the registry''s.';

create or replace function arbiter._build_ids()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_old regprocedure;
  v_function record;
begin
  -- One at a time: of two sessions that replace a function at once, one fails.
  perform from arbiter.settings s for no key update;
  -- With other types.
  for v_old in
    select p.oid::regprocedure
      from pg_catalog.pg_proc p
      join arbiter._id_functions() f on f.name = p.proname
     where p.pronamespace = 'arbiter'::regnamespace
       and (p.oid <> coalesce(to_regprocedure(format('arbiter.%I(%s)', f.name, f.parameters)), 0)
         or f.definition not like format('%% returns %s language %%', format_type(p.prorettype, null)))
  loop
    execute format('drop function %s', v_old);
  end loop;
  for v_function in select f.*, format('arbiter.%I(%s)', f.name, f.parameters) as signature from arbiter._id_functions() f loop
    v_old := to_regprocedure(v_function.signature);
    execute v_function.definition;
    -- One that is replaced keeps its privileges: clients may call some (_open_machines, 26_register.sql).
    if v_old is null then
      perform arbiter._seal(v_function.signature::regprocedure, v_function.meaning);
    else
      perform arbiter._sign(v_old, v_function.meaning);
    end if;
  end loop;
  perform arbiter._instantiate('arbiter._claimed_user_template()', 'claimed_user_id', arbiter._id_words('user', 'v_id'));
  perform arbiter._instantiate('arbiter._claimed_machine_template()', 'claimed_machine_id',
    arbiter._id_words('machine', 'v_id'));
  -- Clients may call these, so they keep their privileges.
  perform arbiter._sign('arbiter.claimed_user_id()',
    'The user of the session''s token: its claim settings.user_claim, as text; null without one.');
  perform arbiter._sign('arbiter.claimed_machine_id()',
    'The machine of the session''s token, its claim machine_id, as text; null for a browser.');
end
$$;
comment on function arbiter._build_ids() is
  'Generates what depends on the types of the registry''s ids, and on arbiter.settings.';

do $ids$
begin
  -- In this order and before any table of the app, as protect() and register_machines() do; and before a write of the
  -- app could wait with this for a change of the settings in flight. What an install generates, no other session does.
  lock table arbiter.protections, arbiter.registry, arbiter.settings in share row exclusive mode;
  perform arbiter._build_ids();
end
$ids$;

-- The text of an id is the user. Where users become uuids, a lease by the text in upper case would be of no user; where
-- they were uuids, rows with such a text were written under another user's lease.
create or replace function arbiter._need_same_users(p_user_class text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_place record;
  v_user_id text;
begin
  for v_place in
    select 'arbiter.leases'::regclass as name, 'user_id'::name as column, p_user_class as class
    union
    select e.end_table, e.end_column, 'uuid'
      from arbiter.protections p
      join pg_catalog.pg_class c on c.oid = p.protected_table
     cross join lateral arbiter._ends(p.protected_table, p.user_path) e
     where arbiter._id_class(e.end_table, e.end_column) = 'text'
       and p_user_class <> 'uuid'
       and (to_regclass('arbiter.machines') is null or arbiter._registry_class('user') = 'uuid')
       and exists (select from arbiter.leases)
     order by 1, 2
  loop
    execute format('select u.id from (select t.%I::text collate "C" as id from %s t) u where %s <> u.id limit 1',
        v_place.column, v_place.name, arbiter._normal_expression(v_place.class, 'u.id'))
      into v_user_id;
    if v_user_id is not null then
      perform arbiter._fail('object_not_in_prerequisite_state',
        format('user %L of %s would become another user: the registry''s users were of another type', v_user_id, v_place.name),
        'Register a table whose users have the type of before, or give these rows and their leases up: arbiter-db uninstall. Nothing was changed.');
    end if;
  end loop;
end
$$;
comment on function arbiter._need_same_users(text) is
  'Error 55000 when a user that arbiter knows would be another one among users of this class (_id_class).';
