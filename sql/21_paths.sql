-- From a row to its user: the path over foreign keys. Each step is a view, and the guard has the whole path as one
-- expression over these views.

-- Immutable, although it reads the catalog, so that the views below ask it once, when a query is planned: dropping or
-- making a foreign key invalidates all plans over its two tables. The plan outlives the transaction that made it, so
-- the answer must be the current one even where the snapshot is old.
create or replace function arbiter._key_stands(p_table regclass, p_constraint name, p_parent regclass)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key oid;
  v_parent oid;
begin
  begin
    -- These two functions look up objects as they are now, not as the snapshot shows them.
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
    perform arbiter._fail('object_not_in_prerequisite_state',
      format('foreign key %I of %s was made after the snapshot of this transaction', p_constraint, p_table),
      'Try again in a new transaction.');
  end if;
  return v_parent = p_parent;
end
$$;
comment on function arbiter._key_stands(regclass, name, regclass) is
  'Whether a table has a foreign key of this name to the parent, as of the planning of the query that asks. Error 55000 when that is newer than the snapshot.';

-- By its number, because a view that names the table would keep it from being dropped. Immutable for the same reason as
-- _key_stands(): a protection never gets another table. A snapshot that is older than the protection does not show it;
-- then the table still has the name that it had when the view was made.
create or replace function arbiter._protected_table(p_protection_id integer, p_name text)
returns regclass
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(
    (select p.protected_table from arbiter.protections p where p.protection_id = p_protection_id), to_regclass(p_name));
end;
comment on function arbiter._protected_table(integer, text) is 'The table of a protection. p_name: its name when it was protected.';

-- A view of two columns, bound to the table that the foreign key leads to today, and empty once that key is gone or
-- leads elsewhere. The first step of a path is a column of the row itself and needs no view.
create or replace function arbiter._path_views(p_protection arbiter.protections)
returns table (view_name name, query text, parent regclass)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_number integer := 0;
  v_table regclass;
  v_way record;
  v_key record;
  v_table_expression text;
begin
  for v_way in select w.steps, cardinality(w.steps) as last from arbiter._ways((p_protection).user_path) w loop
    v_table := (p_protection).protected_table;
    v_table_expression := format('arbiter._protected_table(%s, %L)', (p_protection).protection_id, (p_protection).declared_as);
    for i in 1 .. v_way.last - 1 loop
      v_key := arbiter._need_foreign_key(v_table, v_way.steps[i], (p_protection).user_path);
      v_number := v_number + 1;
      view_name := format('_path_%s_%s', (p_protection).protection_id, v_number);
      query := format(
        'select p.%I as key, p.%I as value from %s p where arbiter._key_stands(%s, %L, %L::regclass)',
        v_key.parent_column, v_way.steps[i + 1], v_key.parent, v_table_expression, v_key.constraint_name, v_key.parent);
      parent := v_key.parent;
      return next;
      v_table := v_key.parent;
      v_table_expression := format('%L::regclass', v_table);
    end loop;
  end loop;
end
$$;
comment on function arbiter._path_views(arbiter.protections) is
  'The views that lead from a row of a protected table to its user. Error 22023 when a foreign key of the path is gone.';

-- A text beside a registry of uuids may name the same user in upper case; for one of texts _user_text() is the text
-- itself. No cast makes a text of a column that has become a number since, and the casts of the others cost nothing: a
-- guard that is older than the type of its column goes on by the type that it knows, or fails the write.
create or replace function arbiter._user_expression(p_class text, p_value text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format(
    case p_class
      when 'uuid' then '%s::uuid::text collate "C"'
      when 'bigint' then '%s::bigint::text collate "C"'
      else 'arbiter._user_text(%s) collate "C"' end, p_value);
end;
comment on function arbiter._user_expression(text, text) is
  'SQL for the text of the user that a column names. p_class: of the column, as _id_class().';

-- Scalar subqueries by key, because a join would be planned by statistics, which may be stale. A path is broken where a
-- step names a row that does not exist: a deferred foreign key lets that row come later, and with another owner. Of
-- several ways none may be broken, and those that are not null must agree; otherwise the row has no user.
create or replace function arbiter._path_expression(p_protection arbiter.protections, p_row text, p_probe text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_number integer := 0;
  v_way record;
  v_value text;
  v_user text;
  v_broken text := 'false';
  v_values text[] := '{}';
  v_columns text;
  v_names text[];
begin
  for v_way in
    select w.steps, cardinality(w.steps) as last, arbiter._id_class(e.end_table, e.end_column) as class
      from arbiter._ways((p_protection).user_path) w
      join arbiter._ends((p_protection).protected_table, (p_protection).user_path) e on e.way = w.way
     order by w.way
  loop
    v_value := format('%s.%s', p_row, arbiter._quoted(v_way.steps[1]));
    v_user := arbiter._user_expression(v_way.class, v_value);
    for i in 1 .. v_way.last - 1 loop
      v_number := v_number + 1;
      v_broken := format('(%1$s or (%2$s is not null and not exists (select from arbiter._path_%3$s_%4$s p where p.key = %2$s)))',
        v_broken, v_value, (p_protection).protection_id, v_number);
      v_user := format('(select %4$s from arbiter._path_%1$s_%2$s p%2$s where p%2$s.key = %3$s)',
        (p_protection).protection_id, v_number, v_value,
        arbiter._user_expression(v_way.class, format('p%s.value', v_number)));
      v_value := format('(select p%2$s.value from arbiter._path_%1$s_%2$s p%2$s where p%2$s.key = %3$s)',
        (p_protection).protection_id, v_number, v_value);
    end loop;
    v_values := v_values || v_user;
  end loop;
  if p_probe = 'broken' then
    return v_broken;
  elsif cardinality(v_values) = 1 then
    return case p_probe when 'user' then v_values[1] else 'false' end;
  end if;
  select string_agg(format('%s as way_%s', v.value, v.way), ', '), array_agg('w.way_' || v.way)
    into v_columns, v_names
    from unnest(v_values) with ordinality as v (value, way);
  return case p_probe
    when 'user' then format('(select case when %s or %s then null else coalesce(%s) end from (select %s offset 0) w)',
      arbiter._differ_expression(v_names), v_broken, array_to_string(v_names, ', '), v_columns)
    else format('(select %s from (select %s offset 0) w)', arbiter._differ_expression(v_names), v_columns) end;
end
$$;
comment on function arbiter._path_expression(arbiter.protections, text, text) is
  'An SQL expression over the row p_row. p_probe ''user'': its user; ''broken'': whether a way to it is broken; ''differ'': whether its ways lead to different users.';

-- When a foreign key with `on update cascade` has acted, its parent has the row with the new key, written by this
-- transaction, and none with the old one; after `on delete set null` only the latter. Outside the statement that
-- changes the parent no row can name a parent that is not there, if the key is not deferrable. Inside it a client could
-- do the same by hand, but only with parents that it may change; such a client may as well give the parent itself to
-- another user. The depth of triggers tells nothing: those after the cascade run when the parent's statement ends.
create or replace function arbiter._follows_key(p_table regclass, p_column name, p_old text, p_new text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key record;
  v_xmin xid;
begin
  if p_old is null or p_old = p_new then
    return false;
  end if;
  select k.confrelid::regclass as parent, r.attname as column
    into v_key
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]
    join pg_catalog.pg_attribute r on r.attrelid = k.confrelid and k.confkey = array[r.attnum]
   where k.conrelid = p_table
     and k.contype = 'f'
     and case when p_new is null then k.confdeltype = 'n' and not k.condeferrable else k.confupdtype = 'c' end
     and k.convalidated
     and a.attname = p_column
     and has_table_privilege(k.confrelid, 'select')
   limit 1;
  if not found then
    return false;
  end if;
  execute format('select p.xmin from %s p where p.%I = %L', v_key.parent, v_key.column, p_old) into v_xmin;
  if v_xmin is not null then
    return false;
  elsif p_new is null then
    return true;
  end if;
  execute format('select p.xmin from %s p where p.%I = %L', v_key.parent, v_key.column, p_new) into v_xmin;
  return v_xmin is not null and arbiter._is_in_progress(v_xmin);
end
$$;
comment on function arbiter._follows_key(regclass, name, text, text) is
  'Whether a change of a column is what a foreign key with on update cascade, or on delete set null, does. For a trigger on the table.';

-- By the images, because the text of a value depends on the session: with extra_float_digits = -15 that of 1.1 and of
-- 1.4 is the same. Before an update the row does not have the values of its generated columns yet; they say what the
-- others say.
create or replace function arbiter._changes_only(p_table regclass, p_old record, p_new record, p_columns text[])
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_comparison text;
  v_same boolean;
begin
  select string_agg(format('row(($1).%1$I)::record *= row(($2).%1$I)::record', a.attname), ' and ')
    into v_comparison
    from pg_catalog.pg_attribute a
   where a.attrelid = p_table
     and a.attnum > 0
     and not a.attisdropped
     and a.attgenerated = ''
     and a.attname <> all (p_columns);
  execute 'select ' || v_comparison into v_same using p_old, p_new;
  return v_same;
end
$$;
comment on function arbiter._changes_only(regclass, record, record, text[]) is
  'Whether the new row of an update differs from the old one in these columns only, before it is written.';

-- A statement trigger fires only for the table that a statement names, so each partition needs its own.
create or replace function arbiter._family(p_table regclass)
returns setof regclass
language sql
stable
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
comment on function arbiter._family(regclass) is 'A table with its partitions and inheritance children.';

-- A statement over a parent fires the statement triggers of that parent only.
create or replace function arbiter._outer_parent(p_table regclass)
returns regclass
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select min(i.inhparent::bigint)::oid::regclass
    from pg_catalog.pg_inherits i
   where i.inhrelid in (select f.member::oid from arbiter._family(p_table) as f (member))
     and i.inhparent not in (select f.member::oid from arbiter._family(p_table) as f (member));
end;
comment on function arbiter._outer_parent(regclass) is
  'A parent of the table, or of one of its partitions or children, that is none of them itself; null when there is none.';
