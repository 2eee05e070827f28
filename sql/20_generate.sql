-- What arbiter generates: triggers, functions and views whose text depends on the app's names.
--
-- The comment of each ends in a hash of its definition, so attaching twice changes nothing and takes no lock. The hash
-- covers what the server has, too, so doctor() sees what was changed since.

-- Hashes both what was asked for and what the server has: a trigger that somebody replaces keeps its comment.
create or replace function arbiter._trigger_comment(p_trigger_id oid, p_definition text, p_meaning text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return format('%s [%s]', p_meaning, md5(p_definition || pg_get_triggerdef(p_trigger_id)));
comment on function arbiter._trigger_comment(oid, text, text) is
  'The comment that a trigger must have, with the hash of its definition.';

-- A row trigger of a partitioned table has a copy in each partition, which can be disabled on its own.
create or replace function arbiter._is_disabled_below(p_table regclass, p_trigger name)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive family (trigger_id) as (
    select t.oid from pg_catalog.pg_trigger t where t.tgrelid = p_table and t.tgname = p_trigger
    union all
    select t.oid from pg_catalog.pg_trigger t join family f on t.tgparentid = f.trigger_id
  )
  select exists (
    select from family f join pg_catalog.pg_trigger t on t.oid = f.trigger_id where t.tgenabled <> 'A');
end;
comment on function arbiter._is_disabled_below(regclass, name) is
  'Whether a trigger, or its copy in a partition, does not fire always.';

create or replace function arbiter._is_attached(
  p_table regclass,
  p_trigger name,
  p_definition text,
  p_meaning text)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select not arbiter._is_disabled_below(p_table, p_trigger) and exists (
    select from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname = p_trigger
       and obj_description(t.oid, 'pg_trigger') = arbiter._trigger_comment(t.oid, p_definition, p_meaning));
end;
comment on function arbiter._is_attached(regclass, name, text, text) is
  'Whether a table has this trigger, made from this definition and enabled always.';

create or replace function arbiter._attach(
  p_table regclass,
  p_trigger name,
  p_definition text,
  p_meaning text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if not arbiter._is_attached(p_table, p_trigger, p_definition, p_meaning) then
    perform arbiter._need_free_name('trigger', p_table, p_trigger);
    execute format('create or replace trigger %I %s', p_trigger, p_definition);
    -- Always, because other triggers do not fire under session_replication_role = replica.
    execute format('alter table %s enable always trigger %I', p_table, p_trigger);
    execute (
      select format('comment on trigger %I on %s is %L', p_trigger, p_table,
               arbiter._trigger_comment(f.object_id, p_definition, p_meaning))
        from arbiter._find('trigger', p_table, p_trigger) f);
  end if;
  perform arbiter._record('trigger', p_table, p_trigger);
end
$$;
comment on function arbiter._attach(regclass, name, text, text) is
  'Creates or mends a trigger of arbiter, enabled always, and records it. Error 42710 when the table has a trigger of this name that is not arbiter''s.';

create or replace function arbiter._detach(p_table regclass, p_keep name[] default '{}')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_trigger name;
begin
  for v_trigger in
    select t.tgname
      from pg_catalog.pg_trigger t
      join pg_catalog.pg_proc p on p.oid = t.tgfoid and p.pronamespace = 'arbiter'::regnamespace
     where t.tgrelid = p_table
       and t.tgparentid = 0
       and t.tgname <> all (p_keep)
  loop
    execute format('drop trigger %I on %s', v_trigger, p_table);
    perform arbiter._forget('trigger', p_table, v_trigger);
  end loop;
end
$$;
comment on function arbiter._detach(regclass, name[]) is
  'Drops the triggers of arbiter from a table, except those in p_keep.';

-- Not only from PUBLIC: a database's default privileges may have opened the object to any role.
create or replace function arbiter._close(p_kind text, p_object text, p_acl aclitem[], p_owner oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_grantee text;
begin
  for v_grantee in
    select distinct case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end
      from aclexplode(coalesce(p_acl, acldefault((case p_kind when 'routine' then 'f' when 'schema' then 'n' else 'r' end)::"char", p_owner))) a
     where a.grantee <> p_owner
  loop
    execute format('revoke all on %s %s from %s', p_kind, p_object, v_grantee);
  end loop;
end
$$;
comment on function arbiter._close(text, text, aclitem[], oid) is
  'Revokes every privilege on an object of arbiter from every role but its owner. p_kind: routine, table, sequence or schema.';

create or replace function arbiter._sign(p_function regprocedure, p_meaning text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('comment on function %s is %L', p_function,
    format('%s [%s]', p_meaning, md5(pg_get_functiondef(p_function))));
end
$$;
comment on function arbiter._sign(regprocedure, text) is
  'Gives a generated function its comment, with the hash of its definition.';

create or replace function arbiter._seal(p_function regprocedure, p_meaning text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close('routine', p_function::text, p.proacl, p.proowner)
     from pg_catalog.pg_proc p
    where p.oid = p_function;
  perform arbiter._sign(p_function, p_meaning);
end
$$;
comment on function arbiter._seal(regprocedure, text) is
  'Gives a generated function its comment (_sign), and closes it (_close).';

-- %I quotes only what SQL reserves. After new. and old. plpgsql reads words of its own, too, such as by, if and begin.
create or replace function arbiter._quoted(p_name text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return '"' || replace(p_name, '"', '""') || '"';
comment on function arbiter._quoted(text) is 'A name in double quotes, for a template.';

-- A template is a real function with words like __machine or __user_of(n) in the place of the app's names. The body of
-- the copy is quoted anew, because a name may contain the quotes of the template's body. All words are replaced in one
-- pass, because a name may look like a word.
create or replace function arbiter._filled_in(p_template regprocedure, p_words jsonb)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_word constant text := '(__[a-z_]+(?:[(][a-z]+[)])?)';
  v_source text := (select p.prosrc from pg_catalog.pg_proc p where p.oid = p_template);
  v_between text[] := regexp_split_to_array(v_source, v_word);
  v_found text[] := array(select w.word[1] from regexp_matches(v_source, v_word, 'g') as w (word));
  v_body text := v_between[1];
begin
  for i in 1 .. cardinality(v_found) loop
    if p_words ->> v_found[i] is null then
      perform arbiter._fail('internal_error',
        format('nothing stands for the word %s of template %s', v_found[i], p_template),
        'Add it where the template''s words are listed: _id_words(), _guard_words() or _registry_words().');
    end if;
    v_body := v_body || (p_words ->> v_found[i]) || v_between[i + 1];
  end loop;
  return v_body;
end
$$;
comment on function arbiter._filled_in(regprocedure, jsonb) is
  'The body of a template with its words replaced. p_words: word to SQL text, already quoted. Error XX000 when a word is left over.';

create or replace function arbiter._instantiate(p_template regprocedure, p_name name, p_words jsonb)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_attributes text := split_part(pg_get_functiondef(p_template), chr(10) || 'AS $', 1);
begin
  execute replace(v_attributes, split_part(p_template::text, '(', 1) || '(', format('arbiter.%I(', p_name))
    || format(' as %L', arbiter._filled_in(p_template, p_words));
end
$$;
comment on function arbiter._instantiate(regprocedure, name, jsonb) is
  'Creates the function arbiter.<p_name> from a template (_filled_in), with its parameters and attributes.';

create or replace function arbiter._view_hash(p_view_id oid, p_query text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select md5(concat_ws('|', p_query, pg_get_viewdef(c.oid), c.reloptions))
    from pg_catalog.pg_class c
   where c.oid = p_view_id;
end;
comment on function arbiter._view_hash(oid, text) is
  'The hash of a view: of the query that was asked for, and of what the server has.';

-- A view is bound to its tables and columns by identity: it follows a table that is renamed, and does not turn to
-- another one that takes over the name. It is made again only when it would change, because that waits for every
-- transaction that has read it.
create or replace function arbiter._is_current_view(p_view name, p_query text, p_parent regclass)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_catalog.pg_class c
      join pg_catalog.pg_rewrite w on w.ev_class = c.oid
      join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid
     where c.relnamespace = 'arbiter'::regnamespace
       and c.relname = p_view
       and d.refobjid = p_parent
       and obj_description(c.oid, 'pg_class') like '%[' || arbiter._view_hash(c.oid, p_query) || ']');
end;
comment on function arbiter._is_current_view(name, text, regclass) is
  'Whether a generated view was made from this query and still reads this table.';

-- The notices of `if exists` are no news to the caller.
create or replace function arbiter._make_view(p_view name, p_query text, p_meaning text, p_options text default '')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
begin
  execute format('drop view if exists arbiter.%I', p_view);
  execute format('create view arbiter.%I %s as %s', p_view, p_options, p_query);
  execute format('comment on view arbiter.%I is %L', p_view,
    format('%s [%s]', p_meaning, arbiter._view_hash(format('arbiter.%I', p_view)::regclass, p_query)));
  perform arbiter._close('table', format('arbiter.%I', p_view), c.relacl, c.relowner)
     from pg_catalog.pg_class c
    where c.relnamespace = 'arbiter'::regnamespace and c.relname = p_view;
end
$$;
comment on function arbiter._make_view(name, text, text, text) is
  'Makes a generated view anew, gives it its comment with the hash of its query, and closes it (_close).';
