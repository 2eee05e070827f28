-- protect() and unprotect(): columns, generated guards, triggers.

-- Asked by the views below while a query is planned, not each time it runs: whoever drops or makes a foreign key
-- invalidates all plans over its two tables. Hence immutable, though it reads the catalog. The answer must be
-- today's even where the snapshot is old, since a plan outlives the transaction that made it.
create or replace function arbiter._key_stands(p_table regclass, p_constraint name, p_parent regclass)
returns boolean
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key oid;
  v_parent oid;
begin
  begin
    -- These two look things up as the server itself does, past the snapshot.
    select k.objid
      into v_key
      from pg_identify_object_as_address('pg_class'::regclass, p_table, 0) t,
           pg_get_object_address('table constraint', t.object_names || p_constraint::text, '{}') k;
  exception
    when undefined_object or undefined_table then
      return false;
  end;
  select k.confrelid into v_parent from pg_catalog.pg_constraint k where k.oid = v_key;
  if not found then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = format('arbiter: foreign key %I of %s was made after the snapshot of this transaction', p_constraint, p_table),
      hint = 'Try again in a new transaction.';
  end if;
  return v_parent = p_parent;
end
$$;
revoke execute on function arbiter._key_stands(regclass, name, regclass) from public;
comment on function arbiter._key_stands(regclass, name, regclass) is
  'Whether a table has a foreign key of this name to the parent, as of the planning of the query that asks. Error 55000 when that is newer than the snapshot.';

-- Each step of a path but the first is a view of two columns, bound to the table that the foreign key
-- leads to today, and empty once that key is gone or leads elsewhere.
create or replace function arbiter._path_views(p_protection arbiter.protections)
returns table (view_name name, query text, parent regclass)
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_steps text[] := parse_ident((p_protection).user_path);
  v_table regclass := (p_protection).protected_table;
  v_key record;
begin
  for i in 1 .. cardinality(v_steps) - 1 loop
    v_key := arbiter._need_foreign_key(v_table, v_steps[i], (p_protection).user_path);
    view_name := format('_path_%s_%s', (p_protection).protection_id, i);
    query := format(
      'select p.%I as key, p.%I as value from %s p where arbiter._key_stands(%L::regclass, %L, %L::regclass)',
      v_key.parent_column, v_steps[i + 1], v_key.parent, v_table, v_key.constraint_name, v_key.parent);
    parent := v_key.parent;
    return next;
    v_table := v_key.parent;
  end loop;
end
$$;
revoke execute on function arbiter._path_views(arbiter.protections) from public;
comment on function arbiter._path_views(arbiter.protections) is
  'The views that lead from a row of a protected table to its user. Error 22023 when a foreign key of the path is gone.';

-- An SQL expression over scalar probes by key: a join would be planned by statistics that may be stale.
-- p_probe 'user' yields the user of a row; 'broken' yields true where a step of the path names a row
-- that is not there (a deferred foreign key lets it come later, and with another owner).
create or replace function arbiter._path_expression(p_protection arbiter.protections, p_row text, p_probe text)
returns text
language plpgsql
immutable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_steps text[] := parse_ident((p_protection).user_path);
  v_value text := format('%s.%I', p_row, v_steps[1]);
  v_broken text := 'false';
begin
  for i in 1 .. cardinality(v_steps) - 1 loop
    v_broken := format('(%1$s or (%2$s is not null and not exists (select from arbiter._path_%3$s_%4$s p where p.key = %2$s)))',
      v_broken, v_value, (p_protection).protection_id, i);
    v_value := format('(select p%2$s.value from arbiter._path_%1$s_%2$s p%2$s where p%2$s.key = %3$s)',
      (p_protection).protection_id, i, v_value);
  end loop;
  return case p_probe when 'user' then v_value else v_broken end;
end
$$;
revoke execute on function arbiter._path_expression(arbiter.protections, text, text) from public;
comment on function arbiter._path_expression(arbiter.protections, text, text) is
  'SQL for the user of a row (''user''), or for whether its path is broken (''broken'').';

-- The table itself and everything below it: statement triggers fire only for the table that a
-- statement names, so each partition needs its own.
create or replace function arbiter._family(p_table regclass)
returns setof regclass
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  with recursive family (member) as (
    select p_table::oid
    union
    select i.inhrelid from pg_catalog.pg_inherits i join family f on i.inhparent = f.member
  )
  select f.member::regclass
    from family f
    join pg_catalog.pg_class c on c.oid = f.member and c.relkind in ('r', 'p')
   order by f.member;
end;
revoke execute on function arbiter._family(regclass) from public;
comment on function arbiter._family(regclass) is 'A table with its partitions and inheritance children.';

create or replace function arbiter._guard_triggers(p_protection arbiter.protections)
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language plpgsql
stable
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_guard text := format('execute function arbiter.%I()', '_guard_' || p_protection.protection_id);
  v_guard_row text := format('execute function arbiter.%I()', '_guard_row_' || p_protection.protection_id);
  v_provenance text := format('execute function arbiter.%I()', '_provenance_' || p_protection.protection_id);
  v_updates boolean := 'update' = any (p_protection.verbs);
  v_family oid[] := array(select f.member::oid from arbiter._family(p_protection.protected_table) as f (member));
  v_member record;
begin
  for v_member in
    select c.oid::regclass as name, c.relkind, c.relispartition
      from unnest(v_family) as f (member)
      join pg_catalog.pg_class c on c.oid = f.member
  loop
    table_name := v_member.name;
    trigger_name := 'arbiter_guard_insert';
    definition := 'after insert on {table} referencing new table as arbiter_rows for each statement ' || v_guard;
    meaning := 'Arbitrates inserts.';
    return next;
    if v_updates then
      trigger_name := 'arbiter_guard_update';
      definition := 'after update on {table} referencing new table as arbiter_rows for each statement ' || v_guard;
      meaning := 'Arbitrates updates.';
      return next;
    end if;
    -- Row triggers of a partitioned table reach its partitions, also later ones, by themselves.
    continue when v_member.relispartition;
    trigger_name := 'arbiter_provenance';
    -- Without a condition: a trigger goes with a column that its condition names.
    definition := 'after update on {table} for each row ' || v_provenance;
    meaning := 'Keeps who wrote a row.';
    return next;
    if v_updates or v_member.relkind = 'p' then
      -- Before, too: a row that moves to another partition fires no trigger after the update, and
      -- what a foreign key does to a row is only seen before other triggers have changed more of it.
      trigger_name := 'arbiter_provenance_before';
      definition := 'before update on {table} for each row ' || v_provenance;
      return next;
    end if;
    if v_updates and p_protection.evidence then
      trigger_name := 'arbiter_stamp';
      definition := format('before update on {table} for each row ' ||
        $w$when (new.source is distinct from 'cloud' or new.%I is not null) execute function arbiter.tg_stamp_xid()$w$,
        p_protection.machine_column);
      meaning := 'Names the transaction that last wrote a row.';
      return next;
    end if;
    if v_member.relkind = 'p' then
      trigger_name := 'arbiter_guard_row';
      -- A row that MERGE moves is in no transition table; it arrives as an insert.
      definition := case when v_updates
        then 'after insert or update on {table} for each row ' || v_guard_row
        else format('after insert on {table} for each row when (new.tableoid <> all (%L::oid[])) %s', v_family, v_guard_row)
        end;
      meaning := 'Arbitrates what no statement trigger sees: partitions that have come since, rows that move.';
      return next;
    end if;
  end loop;
end
$$;
revoke execute on function arbiter._guard_triggers(arbiter.protections) from public;
comment on function arbiter._guard_triggers(arbiter.protections) is
  'The triggers that a protected table and its partitions must have. definition has {table} in the place of the table.';

create or replace function arbiter._guard_words(p_protection arbiter.protections)
returns jsonb
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select jsonb_build_object(
    '__protection', (p_protection).protection_id::text,
    '__mode', quote_literal((p_protection).mode),
    '__unowned', quote_literal((p_protection).unowned),
    '__updates', ('update' = any ((p_protection).verbs))::text,
    '__machine', quote_ident((p_protection).machine_column),
    '__machine_name', quote_literal((p_protection).machine_column),
    '__key', quote_ident((parse_ident((p_protection).user_path))[1]),
    '__user_of(d)', arbiter._path_expression(p_protection, 'd', 'user'),
    '__user_of(n)', arbiter._path_expression(p_protection, 'n', 'user'),
    '__user_of(old)', arbiter._path_expression(p_protection, 'old', 'user'),
    '__user_of(new)', arbiter._path_expression(p_protection, 'new', 'user'),
    '__is_broken(n)', case (p_protection).unowned
      when 'allow' then arbiter._path_expression(p_protection, 'n', 'broken') else 'false' end,
    '__is_ours(n)', case when (p_protection).evidence then 'n.arbiter_xid = pg_current_xact_id()' else 'true' end,
    '__keeps_xid', case when (p_protection).evidence then 'new.arbiter_xid is not distinct from old.arbiter_xid' else 'true' end,
    '__is_fresh(m)', arbiter._fresh_expression(
      'm.heartbeat_at', '(select s.heartbeat_timeout from arbiter.settings s where s.singleton)', 'clock_timestamp()'));
end;
revoke execute on function arbiter._guard_words(arbiter.protections) from public;
comment on function arbiter._guard_words(arbiter.protections) is
  'What stands in the guard of this table for the words of the templates.';

-- Generates the guard of a table from its row in protections, and attaches it.
create or replace function arbiter._build_guard(p_protection_id integer)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protection arbiter.protections;
  v_table regclass;
  v_guard record;
  v_provenance name := '_provenance_' || p_protection_id;
  v_words jsonb;
  v_view record;
begin
  select p.* into strict v_protection from arbiter.protections p where p.protection_id = p_protection_id;
  v_table := v_protection.protected_table;
  v_words := arbiter._guard_words(v_protection);

  for v_view in
    select c.relname as name
      from pg_catalog.pg_class c
     where c.relnamespace = 'arbiter'::regnamespace
       and c.relname ~ format('^_path_%s_\d+$', p_protection_id)
       and c.relname not in (select w.view_name from arbiter._path_views(v_protection) w)
  loop
    execute format('drop view arbiter.%I', v_view.name);
  end loop;
  for v_view in
    select w.view_name as name, w.query
      from arbiter._path_views(v_protection) w
     where not arbiter._is_current_view(w.view_name, w.query, w.parent)
  loop
    perform arbiter._make_view(v_view.name, v_view.query, format('A step from a row of %s to its user.', v_table));
    execute format('comment on column arbiter.%I.key is %L', v_view.name, 'What the foreign key names.');
    execute format('comment on column arbiter.%I.value is %L', v_view.name, 'The user, or the next key on the way.');
  end loop;


  -- One function for the rows of a statement, and for partitioned tables one for a row that no statement shows.
  for v_guard in
    select g.name, g.rows
      from (values
        ('_guard_' || p_protection_id, 'arbiter_rows'),
        ('_guard_row_' || p_protection_id, '(select new.*)')) as g (name, rows)
     where g.rows = 'arbiter_rows'
        or (select c.relkind = 'p' from pg_catalog.pg_class c where c.oid = v_table)
  loop
    perform arbiter._instantiate('arbiter._guard_template()', v_guard.name,
      v_words || jsonb_build_object('__rows', v_guard.rows));
    perform arbiter._seal(format('arbiter.%I()', v_guard.name)::regprocedure,
      format('Arbitrates writes to %s.', v_table));
  end loop;

  perform arbiter._instantiate('arbiter._provenance_template()', v_provenance, v_words);
  perform arbiter._seal(format('arbiter.%I()', v_provenance)::regprocedure,
    format('Keeps who wrote a row of %s.', v_table));

  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._guard_triggers(v_protection) t;
  -- What other verbs had needed.
  perform arbiter._detach(f.member, array(
      select t.trigger_name from arbiter._guard_triggers(v_protection) t where t.table_name = f.member))
     from arbiter._family(v_table) as f (member);
end
$$;
revoke execute on function arbiter._build_guard(integer) from public;
comment on function arbiter._build_guard(integer) is
  'Generates the functions and triggers of a protected table and its partitions from its row in protections.';

create or replace function arbiter.tg_stamp_xid()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  new.arbiter_xid := pg_current_xact_id();
  return new;
end
$$;
revoke execute on function arbiter.tg_stamp_xid() from public;
comment on function arbiter.tg_stamp_xid() is 'Sets arbiter_xid to the transaction that updates the row.';

-- Adds a column unless it is there, and marks it as arbiter's; true when it was added.
create or replace function arbiter._add_column(
  p_table regclass,
  p_column name,
  p_types text[],
  p_definition text,
  p_meaning text)
returns boolean
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  if arbiter._has_column(p_table, p_column, p_types) then
    return false;
  end if;
  execute format('alter table %s add column %I %s', p_table, p_column, p_definition);
  execute format('comment on column %s.%I is %L', p_table, p_column, 'arbiter: ' || p_meaning);
  return true;
end
$$;
revoke execute on function arbiter._add_column(regclass, name, text[], text, text) from public;
comment on function arbiter._add_column(regclass, name, text[], text, text) is
  'Adds a column of arbiter to a table of the app unless it exists; true when it was added.';

-- The foreign key from the machine column to the registry, where the column is arbiter's and no row
-- names a machine yet (of an earlier registry, say). A partitioned table does without, because `not
-- valid` is not to be had there before PostgreSQL 18; the guard checks the machine anyway.
create or replace function arbiter._add_machine_key(p_table regclass, p_machine_column name)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_used boolean;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if v_registry.registry is null then
    return;
  end if;
  if exists (
    select from pg_catalog.pg_constraint k
     where k.conrelid = p_table and k.conname = 'arbiter_machine_id_fkey' and k.confrelid <> v_registry.registry)
  then
    execute format('alter table %s drop constraint arbiter_machine_id_fkey', p_table);
  end if;
  if exists (
    select from pg_catalog.pg_class c
      join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = p_machine_column
     where c.oid = p_table
       and c.relkind = 'r'
       and col_description(c.oid, a.attnum) like 'arbiter: %'
       and not exists (
         select from pg_catalog.pg_constraint k
          where k.conrelid = c.oid and k.contype = 'f' and k.conkey = array[a.attnum]))
  then
    execute format('select exists (select from %s where %I is not null)', p_table, p_machine_column) into v_used;
    if not v_used then
      execute format(
        'alter table %s add constraint arbiter_machine_id_fkey foreign key (%I) references %s (%I) on delete set null not valid',
        p_table, p_machine_column, v_registry.registry, v_registry.id_column);
    end if;
  end if;
end
$$;
revoke execute on function arbiter._add_machine_key(regclass, name) from public;
comment on function arbiter._add_machine_key(regclass, name) is
  'Leads arbiter''s own machine column of a protected table to the registry by a foreign key, not validated yet.';

-- Without a guard nothing reads the column, and its default would give every insert a transaction id
-- for nothing.
create or replace function arbiter._drop_xid_default(p_table regclass)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from pg_catalog.pg_attribute a
     where a.attrelid = p_table and a.attname = 'arbiter_xid' and a.atthasdef)
  then
    execute format('alter table %s alter column arbiter_xid drop default', p_table);
  end if;
end
$$;
revoke execute on function arbiter._drop_xid_default(regclass) from public;
comment on function arbiter._drop_xid_default(regclass) is 'Drops the default of arbiter_xid, if there is one.';

-- Definer: what it creates must belong to the owner of arbiter, whoever calls.
create or replace function arbiter.protect(
  p_table regclass,
  p_user_path text default null,
  p_verbs text[] default '{insert}',
  p_machine_column name default 'machine_id',
  p_mode text default 'enforce',
  p_unowned text default 'reject',
  p_evidence boolean default true)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_verbs text[];
  v_path text;
  v_registry arbiter.registry;
  v_relative regclass;
  v_protection_id integer;
begin
  select array_agg(distinct v.verb order by v.verb) into v_verbs from unnest(p_verbs) as v (verb);
  if p_table is null or v_verbs is null or v_verbs not in ('{insert}', '{insert,update}')
     or p_mode is null or p_mode not in ('enforce', 'observe')
     or p_unowned is null or p_unowned not in ('reject', 'allow')
     or p_machine_column is null or p_evidence is null
  then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('arbiter: protect(%s) with p_verbs %s, p_mode %s, p_unowned %s, p_machine_column %s, p_evidence %s',
        coalesce(p_table::text, 'null'), coalesce(p_verbs::text, 'null'), coalesce(p_mode, 'null'),
        coalesce(p_unowned, 'null'), coalesce(p_machine_column, 'null'), coalesce(p_evidence::text, 'null')),
      hint = 'p_verbs is {insert} or {insert,update}; p_mode enforce or observe; p_unowned reject or allow; nothing is null.';
  end if;
  lock table arbiter.protections in share row exclusive mode;
  perform arbiter._forget_dropped();
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if p_table = v_registry.registry or p_table in (
    select c.oid from pg_catalog.pg_class c where c.relnamespace = 'arbiter'::regnamespace)
  then
    raise exception using
      errcode = 'wrong_object_type',
      message = format('arbiter: %s cannot be protected', p_table),
      hint = 'The registry and arbiter''s own tables are what arbiter judges by.';
  end if;
  select p.protected_table
    into v_relative
    from arbiter.protections p
   where p.protected_table <> p_table
     and (p.protected_table in (select arbiter._family(p_table)) or p_table in (select arbiter._family(p.protected_table)));
  if v_relative is not null then
    raise exception using
      errcode = 'wrong_object_type',
      message = format('arbiter: %s cannot be protected beside %s, which inherits from it or the other way round', p_table, v_relative),
      hint = format('Unprotect %s first: one guard is enough for both.', v_relative);
  end if;
  v_path := arbiter._need_protectable(p_table, p_user_path, p_machine_column);
  perform arbiter._need_machine_key(p_table, p_machine_column, v_registry.registry);

  -- Every write from here on is judged by the new rules, and none is in flight under the old ones. Exclusive at
  -- once: a default and a policy need that, and to ask for more later is to deadlock with who read first.
  execute format('lock table %s in access exclusive mode', p_table);
  -- A constant default and nullable columns: no rewrite, and existing rows become local.
  perform arbiter._add_column(p_table, 'source', '{text,character varying}', $def$text not null default 'local'$def$,
    'the environment that wrote the row, local (browser) or cloud (machine).');
  if not arbiter._source_is_checked(p_table) and not exists (
    select from pg_catalog.pg_constraint k where k.conrelid = p_table and k.conname = 'arbiter_source_check')
  then
    execute format($sql$alter table %s add constraint arbiter_source_check check (source in ('local', 'cloud')) not valid$sql$,
      p_table);
  end if;
  perform arbiter._add_column(p_table, p_machine_column, '{uuid}', 'uuid', 'the machine that wrote the row when source is cloud.');
  perform arbiter._add_machine_key(p_table, p_machine_column);
  if p_evidence then
    perform arbiter._add_column(p_table, 'arbiter_xid', '{xid8}', 'xid8',
      'the transaction that wrote the row; null on rows older than protection.');
    execute format('alter table %s alter column arbiter_xid set default pg_current_xact_id()', p_table);
  else
    perform arbiter._drop_xid_default(p_table);
  end if;

  insert into arbiter.protections (protected_table, user_path, verbs, machine_column, mode, unowned, evidence)
  values (p_table, v_path, v_verbs, p_machine_column, p_mode, p_unowned, p_evidence)
  on conflict on constraint protections_protected_table_key do update
    set user_path = excluded.user_path,
        verbs = excluded.verbs,
        machine_column = excluded.machine_column,
        mode = excluded.mode,
        unowned = excluded.unowned,
        evidence = excluded.evidence
  returning protection_id into v_protection_id;
  perform arbiter._build_guard(v_protection_id);
  perform arbiter._build_policies(p_table);
end
$$;
revoke execute on function arbiter.protect(regclass, text, text[], name, text, text, boolean) from public;
comment on function arbiter.protect(regclass, text, text[], name, text, text, boolean) is
  'Protects a table: adds source, machine_id and arbiter_xid if missing (no rewrite; existing rows become local), attaches the guard to it and its partitions. p_user_path: a uuid column or a path over foreign keys, found when obvious. Idempotent; call it again after the table changed or got a partition. Errors 22023, 23514, 42501, 42703, 42804, 42809: nothing changed.';

-- The generated functions and views of a protection, once no trigger calls them.
create or replace function arbiter._drop_guard(p_protection_id integer)
returns void
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
declare
  v_view name;
begin
  execute format('drop function if exists arbiter.%I(), arbiter.%I(), arbiter.%I()',
    '_guard_' || p_protection_id, '_guard_row_' || p_protection_id, '_provenance_' || p_protection_id);
  for v_view in
    select c.relname
      from pg_catalog.pg_class c
     where c.relnamespace = 'arbiter'::regnamespace
       and c.relname ~ format('^_path_%s_\d+$', p_protection_id)
  loop
    execute format('drop view arbiter.%I', v_view);
  end loop;
end
$$;
revoke execute on function arbiter._drop_guard(integer) from public;
comment on function arbiter._drop_guard(integer) is 'Drops what was generated for a protected table.';

create or replace function arbiter.unprotect(p_table regclass)
returns void
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set lock_timeout = '5s'
as $$
declare
  v_protection arbiter.protections;
begin
  delete from arbiter.protections p where p.protected_table = p_table returning p.* into v_protection;
  if not found then
    raise exception using
      errcode = 'undefined_object',
      message = format('arbiter: table %s is not protected', coalesce(p_table::text, 'null')),
      hint = 'See arbiter.protections for the tables that are.';
  end if;
  -- Also from partitions that were detached since.
  perform arbiter._detach(t.tgrelid)
     from (
       select distinct t.tgrelid::regclass
         from pg_catalog.pg_trigger t
         join pg_catalog.pg_proc p on p.oid = t.tgfoid
        where p.pronamespace = 'arbiter'::regnamespace
          and p.proname ~ format('^_(guard|guard_row|provenance)_%s$', v_protection.protection_id)
          and t.tgparentid = 0) as t;
  perform arbiter._drop_xid_default(p_table);
  perform arbiter._drop_guard(v_protection.protection_id);
  perform arbiter._build_policies();
end
$$;
revoke execute on function arbiter.unprotect(regclass) from public;
comment on function arbiter.unprotect(regclass) is
  'Takes the guard off a table. Its columns and rows stay as they are. Error 42704 when it is not protected.';

-- For uninstall: takes arbiter off every table of the app; one line for each thing that stays or goes.
create or replace function arbiter._detach_all(p_drop_columns boolean)
returns setof text
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  v_table regclass;
  v_constraint name;
begin
  perform arbiter._forget_dropped();
  for v_table in select p.protected_table from arbiter.protections p order by p.protection_id loop
    perform arbiter.unprotect(v_table);
  end loop;
  for v_table in delete from arbiter.registry r returning r.registry loop
    perform arbiter._detach(v_table);
  end loop;
  perform arbiter._build_policies();
  perform arbiter.unexpose(s.schema_name) from (select distinct e.schema_name from arbiter._exposed() e) as s;
  -- It would hold the registry's columns back.
  drop view if exists arbiter.machines;
  for v_table, v_constraint in
    select k.conrelid::regclass, k.conname
      from pg_catalog.pg_constraint k
     where k.conname in ('arbiter_source_check', 'arbiter_machine_id_fkey')
       and k.coninhcount = 0
  loop
    execute format('alter table %s drop constraint %I', v_table, v_constraint);
  end loop;
  for v_table in
    select c.oid::regclass
      from pg_catalog.pg_class c
     where c.relkind = 'i' and c.relname ~ '^arbiter_.*_machine_idx$'
  loop
    execute format('drop index %s', v_table);
  end loop;
  return query select arbiter._leave_columns(p_drop_columns);
end
$$;
revoke execute on function arbiter._detach_all(boolean) from public;
comment on function arbiter._detach_all(boolean) is
  'Takes arbiter off every table of the app, and with true drops the columns that it added. One line for each column left or dropped.';

-- What reads a whole table is left to the end, out of the transaction that takes the strong locks.
create or replace function arbiter._unfinished()
returns setof text
language sql
stable
security invoker
set search_path = pg_catalog, pg_temp
begin atomic
  select s.statement
    from (
      -- For the foreign key, which is validated through it: without one, deleting a machine reads the whole table.
      select 1, k.conrelid, k.conname,
             format('create index %I on %s (%I) where %3$I is not null',
               format('arbiter_%s_machine_idx', left(c.relname, 40)), k.conrelid::regclass, a.attname)
        from pg_catalog.pg_constraint k
        join pg_catalog.pg_class c on c.oid = k.conrelid
        join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
       where k.conname = 'arbiter_machine_id_fkey'
         and k.coninhcount = 0
         and not exists (
           select from pg_catalog.pg_index i where i.indrelid = k.conrelid and i.indkey[0] = k.conkey[1])
      union all
      select 2, k.conrelid, k.conname, format('alter table %s validate constraint %I', k.conrelid::regclass, k.conname)
        from pg_catalog.pg_constraint k
       where k.conname in ('arbiter_source_check', 'arbiter_machine_id_fkey')
         and not k.convalidated
         and k.conparentid = 0
         and k.coninhcount = 0
    ) as s (step, table_id, constraint_name, statement)
   order by s.step, s.table_id, s.constraint_name;
end;
revoke execute on function arbiter._unfinished() from public;
comment on function arbiter._unfinished() is
  'Statements that finish what protect() has begun, each for a transaction of its own: an index, which keeps writers waiting while it reads the table, and constraints to validate, which do not.';
