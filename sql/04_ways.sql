-- How a row leads to its user. p_user_path is one way or several, separated by commas; a way is a column of the table
-- with the user's id, or columns over foreign keys joined by dots. All ways of a row that are not null must agree.

-- A comma may stand in a quoted name.
create or replace function arbiter._ways(p_user_path text)
returns table (way bigint, steps text[])
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select w.number, parse_ident(w.path)
    from regexp_split_to_table(p_user_path, ',(?=([^"]*"[^"]*")*[^"]*$)') with ordinality as w (path, number);
end;
comment on function arbiter._ways(text) is
  'The ways of a path to the user in their order, each as its columns. Error 22023 when one is not a path.';

create or replace function arbiter._keys(p_user_path text)
returns table (way bigint, key text)
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select min(w.way), w.steps[1] from arbiter._ways(p_user_path) w group by w.steps[1] order by 1;
end;
comment on function arbiter._keys(text) is 'The columns of a table where the ways to the user begin, each once, in the order of the ways.';

create or replace function arbiter._differ_expression(p_users text[])
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('coalesce(%s, false)', string_agg(format('coalesce(%s) <> %s', array_to_string(p_users, ', '), u.value), ' or '))
    from unnest(p_users) as u (value);
end;
comment on function arbiter._differ_expression(text[]) is
  'SQL for whether the users to whom the ways of a row lead differ from the first of them that is not null. p_users: an expression for each way.';

create or replace function arbiter._need_foreign_key(
  p_table regclass,
  p_column name,
  p_path text,
  out parent regclass,
  out parent_column name,
  out constraint_name name)
returns record
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select k.confrelid::regclass, f.attname, k.conname
    into parent, parent_column, constraint_name
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    join pg_catalog.pg_attribute f on f.attrelid = k.confrelid and f.attnum = k.confkey[1]
   where k.conrelid = p_table
     and k.contype = 'f'
     and cardinality(k.conkey) = 1
     and a.attname = p_column
   order by k.oid
   limit 1;
  if parent is null then
    perform arbiter._fail('invalid_parameter_value',
      format('column %I of table %s is not a foreign key of one column', p_column, p_table),
      format('In the path %s every step but the last must be one.', p_path));
  end if;
end
$$;
comment on function arbiter._need_foreign_key(regclass, name, text) is
  'Where the single-column foreign key of a column leads. p_path: the path it is a step of, for the hint. Error 22023 when there is none.';

-- Where the ways end: the columns that hold users.
create or replace function arbiter._ends(p_table regclass, p_user_path text)
returns table (way bigint, end_table regclass, end_column name)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_steps text[];
begin
  for way, v_steps in select w.way, w.steps from arbiter._ways(p_user_path) w loop
    end_table := p_table;
    for i in 1 .. cardinality(v_steps) - 1 loop
      end_table := (arbiter._need_foreign_key(end_table, v_steps[i], p_user_path)).parent;
    end loop;
    end_column := v_steps[cardinality(v_steps)];
    return next;
  end loop;
end
$$;
comment on function arbiter._ends(regclass, text) is
  'The columns at which the ways of a path end, each with its table. Error 22023 when a foreign key of the path is gone.';

-- A path is obvious when the table has a column user_id that can be an id, or one foreign key to a table that has one.
-- A user_id that may be null says nothing where it is, so beside such a key both count. The machine's foreign key does
-- not: it leads to the owner of the machine that wrote the row, not to the row's user.
create or replace function arbiter._find_user_path(p_table regclass, p_machine_column name)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column text;
  v_paths text;
  v_found integer;
begin
  if arbiter._has_column(p_table, 'user_id', 'user') then
    if (select a.attnotnull from pg_catalog.pg_attribute a where a.attrelid = p_table and a.attname = 'user_id') then
      return 'user_id';
    end if;
    v_column := 'user_id';
  end if;
  select string_agg(format('%I.user_id', a.attname), ', ' order by a.attnum), count(*)
    into v_paths, v_found
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    join pg_catalog.pg_attribute u on u.attrelid = k.confrelid and u.attname = 'user_id'
   where k.conrelid = p_table
     and k.contype = 'f'
     and cardinality(k.conkey) = 1
     and arbiter._id_class(k.confrelid, 'user_id') is not null
     and not u.attisdropped
     and a.attname not in (p_machine_column, 'user_id')
     and arbiter._ownership('constraint', p_table, k.conname) <> 'ours';
  if v_found > 1 or v_column is null and v_found = 0 then
    perform arbiter._fail('invalid_parameter_value',
      format('table %s has %s way to a user', p_table, case v_found when 0 then 'no obvious' else 'more than one' end),
      case v_found
        when 0 then 'Name it in p_user_path: a column with the user''s id (''owner_id'') or a path over foreign keys (''trader_id.user_id'').'
        else 'Choose one in p_user_path, or several that must agree: ' || concat_ws(', ', v_column, v_paths) end);
  end if;
  return concat_ws(', ', v_column, v_paths);
end
$$;
comment on function arbiter._find_user_path(regclass, name) is
  'The path from a row to its user when one is obvious. Error 22023 otherwise.';
