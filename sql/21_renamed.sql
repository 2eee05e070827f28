-- What a guard does when its table has changed under it: a column that it names was renamed or dropped, or a foreign
-- key of the path was made anew. Writers and doctor() get the call that mends it.

create or replace function arbiter._guarded_columns(p_protection arbiter.protections)
returns text[]
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select array_agg(k.key order by k.way) || array[(p_protection).machine_column::text, 'source']
           || case when (p_protection).evidence then array['arbiter_xid'] end
    from arbiter._keys((p_protection).user_path) k;
end;
comment on function arbiter._guarded_columns(arbiter.protections) is 'The columns of a protected table that its guard names.';

-- Immutable for the same reason as _key_stands(): a column that is renamed or dropped invalidates all plans over the
-- table. Looks up the columns as they are now, not as the snapshot shows them.
create or replace function arbiter._columns_stand(p_table regclass, p_columns text[])
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_table is null then
    perform arbiter._fail('object_not_in_prerequisite_state',
      'the guard does not know its table, which was renamed: this is a copy of the schema, or the snapshot of this transaction is older than the protection',
      'In a copy run arbiter-db install; otherwise try again in a new transaction.');
  end if;
  perform pg_get_object_address('table column', t.object_names || c.name, '{}')
     from pg_identify_object_as_address('pg_class'::regclass, p_table, 0) t,
          unnest(p_columns) as c (name);
  return true;
exception
  when undefined_column or undefined_table then
    return false;
end
$$;
comment on function arbiter._columns_stand(regclass, text[]) is
  'Whether a table has columns of these names, as of the planning of the query that asks. Error 55000 for null, see _protected_table().';

-- A partition that was detached keeps its statement triggers, but not those for its rows, and its columns can then be
-- renamed alone. So where there are partitions or children, the table that a statement names is asked, too.
create or replace function arbiter._stands_expression(p_protection arbiter.protections, p_guard name)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format(
    case when p_guard = '_guard_' || (p_protection).protection_id
              and (c.relkind = 'p' or exists (select from pg_catalog.pg_inherits i where i.inhparent = c.oid))
      then '(arbiter._columns_stand(%1$s, %2$L) and (%3$I.tg_relid = %1$s '
        'or coalesce(pg_partition_root(%3$I.tg_relid) = pg_partition_root(%1$s), false) '
        'or arbiter._columns_stand(%3$I.tg_relid, %2$L)))'
      else 'arbiter._columns_stand(%1$s, %2$L)' end,
    format('arbiter._protected_table(%s, %L)', (p_protection).protection_id, (p_protection).declared_as),
    arbiter._guarded_columns(p_protection), p_guard)
    from (select (p_protection).protected_table as oid) t
    left join pg_catalog.pg_class c on c.oid = t.oid;
end;
comment on function arbiter._stands_expression(arbiter.protections, name) is
  'SQL for whether a table has the columns that its guard names; for the protected table a constant of the plan. p_guard: the name of the function.';

-- In a query of the guard n.machine_id is a column of the row n. Once there is no such column it would be an error of
-- the server, 42703, which says nothing of what to do. So a block of the name n has variables of these names, which are
-- read only where _columns_stand() is false in the same plan. Each name is quoted, because plpgsql has more words of
-- its own than SQL has. They are null, which a domain may not allow.
create or replace function arbiter._stand_ins(p_protection arbiter.protections)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select string_agg(format('%s %s; ', arbiter._quoted(c.name),
             coalesce(format_type(case when c.name = 'arbiter_xid' then 'xid8'::regtype else arbiter._base_type(a.atttypid) end, null), 'text')), ''
             order by c.name) || 'source'
    from (select distinct n.name from unnest(arbiter._guarded_columns(p_protection)) as n (name) where n.name <> 'source') c
    left join pg_catalog.pg_attribute a
      on a.attrelid = (p_protection).protected_table and a.attname = c.name and not a.attisdropped;
end;
comment on function arbiter._stand_ins(arbiter.protections) is
  'Declarations of variables that stand for columns which the table does not have any more, up to the name of the last one, whose type is text.';

create or replace function arbiter._protect_statement(p_protection arbiter.protections)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('select arbiter.protect(%L, %L, %L, %L, %L, %L, %L)',
    (p_protection).protected_table, (p_protection).user_path, (p_protection).verbs,
    (p_protection).machine_column, (p_protection).mode, (p_protection).unowned, (p_protection).evidence)
   where (p_protection).protection_id is not null;
end;
comment on function arbiter._protect_statement(arbiter.protections) is
  'The call that protects the table again; null for null.';

create or replace function arbiter._is_column(p_table regclass, p_column name)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
return exists (
  select from pg_catalog.pg_attribute a where a.attrelid = p_table and a.attname = p_column and not a.attisdropped);
comment on function arbiter._is_column(regclass, name) is 'Whether a table has a column of this name.';

-- Where there are several keys to the parent, nothing tells which is meant.
create or replace function arbiter._key_column(p_table regclass, p_parent regclass)
returns name
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case count(*) when 1 then max(a.attname) end
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum]
   where k.conrelid = p_table and k.confrelid = p_parent and k.contype = 'f';
end;
comment on function arbiter._key_column(regclass, regclass) is
  'The column of the only foreign key of a table to a parent; null when there is none, or more than one.';

-- A column that was renamed is still that of its foreign key: to the registry, or to the table of which the view of
-- the step was made. The column of a way without a key, and source and arbiter_xid, are known by their names only.
create or replace function arbiter._by_current_names(p_protection arbiter.protections)
returns arbiter.protections
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_number integer := 0;
  v_way record;
  v_ways text[] := '{}';
begin
  if not arbiter._is_column(p_protection.protected_table, p_protection.machine_column) then
    p_protection.machine_column := arbiter._key_column(p_protection.protected_table, (select r.registry from arbiter.registry r));
  end if;
  for v_way in select w.steps, cardinality(w.steps) as last from arbiter._ways(p_protection.user_path) w loop
    if not arbiter._is_column(p_protection.protected_table, v_way.steps[1]) then
      v_way.steps[1] := (
        select arbiter._key_column(p_protection.protected_table, d.refobjid)
          from pg_catalog.pg_rewrite w
          join pg_catalog.pg_depend d
            on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
         where w.ev_class = to_regclass(format('arbiter._path_%s_%s', p_protection.protection_id, v_number + 1))
           and d.refobjid <> w.ev_class
           and v_way.last > 1
         limit 1);
    end if;
    v_number := v_number + v_way.last - 1;
    v_ways := v_ways || (
      select case when bool_and(s.name is not null) then string_agg(quote_ident(s.name), '.' order by s.number) end
        from unnest(v_way.steps) with ordinality as s (name, number));
  end loop;
  if p_protection.machine_column is null or array_position(v_ways, null) is not null then
    return null;
  end if;
  p_protection.user_path := array_to_string(v_ways, ', ');
  return p_protection;
end
$$;
comment on function arbiter._by_current_names(arbiter.protections) is
  'The options of a protection, with columns that were renamed by the names that they have now; null when nothing tells these.';

create or replace function arbiter._columns_remedy(p_protection arbiter.protections)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select coalesce(
    (select format('If it was renamed, rename it to %s again; if it was dropped: %s', c.name,
              arbiter._protect_statement(p_protection))
       from unnest('{source,arbiter_xid}'::name[]) as c (name)
      where not arbiter._is_column((p_protection).protected_table, c.name)
        and (c.name = 'source' or (p_protection).evidence)
      limit 1),
    arbiter._protect_statement(nullif(arbiter._by_current_names(p_protection), p_protection)),
    'Call arbiter.protect() with the names that the table has now.');
end;
comment on function arbiter._columns_remedy(arbiter.protections) is
  'What mends the protection of a table that does not have a column which its guard names.';

-- A migration that makes a foreign key anew is not to be answered with rows that need no user.
create or replace function arbiter._changed_table_hint(p_protection_id integer)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protection arbiter.protections;
  v_column name;
begin
  select p.* into v_protection from arbiter.protections p where p.protection_id = p_protection_id;
  select c.name
    into v_column
    from unnest(arbiter._guarded_columns(v_protection)) with ordinality as c (name, number)
   where not arbiter._is_column(v_protection.protected_table, c.name)
   order by c.number
   limit 1;
  if found then
    return format('Table %s has no column %I any more. What mends it: %s',
      v_protection.protected_table, v_column, arbiter._columns_remedy(v_protection));
  end if;
  if exists (
    select from arbiter._path_views(v_protection) w where not arbiter._is_current_view(w.view_name, w.query, w.parent))
  then
    return format('A foreign key of the path %L has changed. The owner of the table calls arbiter.protect(%L).',
      v_protection.user_path, v_protection.protected_table);
  end if;
  return null;
exception
  when invalid_parameter_value then
    return format('A foreign key of the path %L is gone. The owner of the table makes it again, then calls arbiter.protect(%L).',
      v_protection.user_path, v_protection.protected_table);
end
$$;
comment on function arbiter._changed_table_hint(integer) is
  'What to do when a table does not have a column that its guard names, or a foreign key of the path is not the one that the guard knows; null when it has both.';
