-- Triggers as inspectable objects: a trigger's comment ends with a hash of its definition, so that
-- attaching twice changes nothing and takes no lock, and drift can be seen in the catalog.

-- What was asked for, and what the server has made of it: a trigger that was replaced keeps its comment.
create or replace function arbiter._trigger_comment(p_trigger_id oid, p_definition text, p_meaning text)
returns text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
return format('%s [%s]', p_meaning, md5(p_definition || pg_get_triggerdef(p_trigger_id)));
revoke execute on function arbiter._trigger_comment(oid, text, text) from public;
comment on function arbiter._trigger_comment(oid, text, text) is
  'The comment that a trigger must have, with the hash of its definition.';

-- A row trigger of a partitioned table lives on in each partition, where it can be disabled alone.
create or replace function arbiter._is_disabled_below(p_table regclass, p_trigger name)
returns boolean
language sql
stable
security invoker
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
revoke execute on function arbiter._is_disabled_below(regclass, name) from public;
comment on function arbiter._is_disabled_below(regclass, name) is
  'Whether a trigger, or its like in a partition, does not fire always.';

create or replace function arbiter._attach(
  p_table regclass,
  p_trigger name,
  p_definition text,
  p_meaning text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname = p_trigger
       and obj_description(t.oid, 'pg_trigger') = arbiter._trigger_comment(t.oid, p_definition, p_meaning))
     and not arbiter._is_disabled_below(p_table, p_trigger)
  then
    return;
  end if;
  execute format('create or replace trigger %I ', p_trigger) || replace(p_definition, '{table}', p_table::text);
  -- Always: else session_replication_role = replica walks past it.
  execute format('alter table %s enable always trigger %I', p_table, p_trigger);
  execute (
    select format('comment on trigger %I on %s is %L', p_trigger, p_table,
             arbiter._trigger_comment(t.oid, p_definition, p_meaning))
      from pg_catalog.pg_trigger t
     where t.tgrelid = p_table and t.tgname = p_trigger
     -- A snapshot that is older than the drop of its predecessor shows both.
     order by t.oid desc
     limit 1);
end
$$;
revoke execute on function arbiter._attach(regclass, name, text, text) from public;
comment on function arbiter._attach(regclass, name, text, text) is
  'Creates or mends a trigger of arbiter, enabled always. p_definition has {table} in the place of the table.';

create or replace function arbiter._detach(p_table regclass, p_keep name[] default '{}')
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_trigger name;
begin
  for v_trigger in
    select t.tgname
      from pg_catalog.pg_trigger t
     where t.tgrelid = p_table
       and t.tgname like 'arbiter\_%'
       and t.tgparentid = 0
       and t.tgname <> all (p_keep)
  loop
    execute format('drop trigger %I on %s', v_trigger, p_table);
  end loop;
end
$$;
revoke execute on function arbiter._detach(regclass, name[]) from public;
comment on function arbiter._detach(regclass, name[]) is
  'Drops the triggers of arbiter from a table, but for those to keep.';

-- Functions that are generated carry a hash of themselves in the same way.
create or replace function arbiter._seal(p_function regprocedure, p_meaning text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._close('function', p_function::text, p.proacl, p.proowner)
     from pg_catalog.pg_proc p
    where p.oid = p_function;
  execute format('comment on function %s is %L', p_function,
    format('%s [%s]', p_meaning, md5(pg_get_functiondef(p_function))));
end
$$;
revoke execute on function arbiter._seal(regprocedure, text) from public;
comment on function arbiter._seal(regprocedure, text) is
  'Documents a generated function, with the hash of its definition, and closes it.';

-- A template is a real function, with words like __machine or __user_of(n) in the place of what differs. The copy has
-- its attributes; its body is quoted anew, because a name may contain the template's quotes. All words are replaced
-- in one pass, because a name may look like a word.
create or replace function arbiter._instantiate(p_template regprocedure, p_name name, p_words jsonb)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_word constant text := '(__[a-z_]+(?:\([a-z]+\))?)';
  v_source text := (select p.prosrc from pg_catalog.pg_proc p where p.oid = p_template);
  v_attributes text := split_part(pg_get_functiondef(p_template), E'\nAS $', 1);
  v_body text;
  v_left_over text;
begin
  select string_agg(t.text || coalesce(p_words ->> w.word[1], ''), '' order by t.position),
         min(w.word[1]) filter (where p_words ->> w.word[1] is null)
    into v_body, v_left_over
    from regexp_split_to_table(v_source, v_word) with ordinality as t (text, position)
    left join regexp_matches(v_source, v_word, 'g') with ordinality as w (word, position) on w.position = t.position;
  if v_left_over is not null then
    raise exception using
      errcode = 'internal_error',
      message = format('arbiter: template %s has a word that nothing was given for: %s', p_template, v_left_over);
  end if;
  execute replace(v_attributes, p_template::text, format('arbiter.%I()', p_name)) || format(' as %L', v_body);
end
$$;
revoke execute on function arbiter._instantiate(regprocedure, name, jsonb) from public;
comment on function arbiter._instantiate(regprocedure, name, jsonb) is
  'Creates the function arbiter.<p_name> from a template. p_words: word to SQL text, already quoted. Error XX000 when a word is left over.';

-- From everybody but the owner: a database's default privileges may have opened it to any role.
create or replace function arbiter._close(p_kind text, p_object text, p_acl aclitem[], p_owner oid)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_grantee text;
begin
  for v_grantee in
    select distinct case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end
      from aclexplode(coalesce(p_acl, acldefault((case p_kind when 'function' then 'f' else 'r' end)::"char", p_owner))) a
     where a.grantee <> p_owner
  loop
    execute format('revoke all on %s %s from %s', p_kind, p_object, v_grantee);
  end loop;
end
$$;
revoke execute on function arbiter._close(text, text, aclitem[], oid) from public;
comment on function arbiter._close(text, text, aclitem[], oid) is
  'Revokes every privilege on a function, table or sequence of arbiter from everybody but its owner.';

-- Generated views bind tables and columns by identity, not by name: what is renamed is followed, and
-- what takes over a name is not believed. Made again only when it would change, because that waits
-- for every transaction that has read it.
create or replace function arbiter._is_current_view(p_view name, p_query text, p_parent regclass)
returns boolean
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_catalog.pg_class c
      join pg_catalog.pg_rewrite w on w.ev_class = c.oid
      join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid
     where c.relnamespace = 'arbiter'::regnamespace
       and c.relname = p_view
       and d.refobjid = p_parent
       and obj_description(c.oid, 'pg_class') like '%[' || md5(p_query) || ']');
end;
revoke execute on function arbiter._is_current_view(name, text, regclass) from public;
comment on function arbiter._is_current_view(name, text, regclass) is
  'Whether a generated view was made from this query and still reads this table.';

create or replace function arbiter._make_view(p_view name, p_query text, p_meaning text)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format('drop view if exists arbiter.%I', p_view);
  execute format('create view arbiter.%I as %s', p_view, p_query);
  execute format('comment on view arbiter.%I is %L', p_view, format('%s [%s]', p_meaning, md5(p_query)));
  perform arbiter._close('table', format('arbiter.%I', p_view), c.relacl, c.relowner)
     from pg_catalog.pg_class c
    where c.relnamespace = 'arbiter'::regnamespace and c.relname = p_view;
end
$$;
revoke execute on function arbiter._make_view(name, text, text) from public;
comment on function arbiter._make_view(name, text, text) is
  'Makes a generated view anew, documents it with the hash of its query, and closes it.';

create or replace function arbiter._own_triggers()
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  values
    ('arbiter.handovers'::regclass, 'arbiter_append_only'::name,
      'before update or delete on {table} for each row execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.'),
    ('arbiter.handovers', 'arbiter_append_only_truncate',
      'before truncate on {table} for each statement execute function arbiter.tg_append_only()',
      'The history of handovers is append-only.'),
    ('arbiter.leases', 'arbiter_announce',
      'after update on {table} for each row when (old.epoch <> new.epoch or old.draining_since is distinct from new.draining_since) '
        'execute function arbiter.tg_announce()',
      'Announces handovers and drains.');
end;
revoke execute on function arbiter._own_triggers() from public;
comment on function arbiter._own_triggers() is
  'The triggers that arbiter''s own tables must have. definition has {table} in the place of the table.';

do $own$
begin
  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._own_triggers() t;
end
$own$;
