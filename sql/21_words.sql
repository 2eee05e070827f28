-- What the words of the guard's templates (22_guard.sql) stand for in the guard of one table.

-- An array, because two nulls in an array are equal. The text of a number or a string says exactly which it is, in any
-- session; for other types null sends the rows to the second query, which asks the types themselves.
create or replace function arbiter._writer_expression(p_protection arbiter.protections, p_row text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select case
           when bool_and(a.atttypid = 'uuid'::regtype) and arbiter._id_class((p_protection).protected_table, (p_protection).machine_column) = 'uuid'
             then format('array[%s, %s.%I]', string_agg(format('%s.%I', p_row, k.key), ', '),
               p_row, (p_protection).machine_column)
           when bool_and(a.atttypid = any ('{uuid,smallint,integer,bigint,text,varchar}'::regtype[]))
             then format('array[%s, %s.%I::text collate "C"]', string_agg(format('%s.%I::text collate "C"', p_row, k.key), ', '),
               p_row, (p_protection).machine_column)
           else 'null::text[]'
         end
    from arbiter._keys((p_protection).user_path) k
    -- A column that was renamed fails writes, not the installation; doctor() names it.
    left join pg_catalog.pg_attribute a on a.attrelid = (p_protection).protected_table and a.attname = k.key;
end;
comment on function arbiter._writer_expression(arbiter.protections, text) is
  'SQL for what the rows of one writer have in common: where the path to the user begins, and the machine.';

create or replace function arbiter._no_keys_expression(p_protection arbiter.protections, p_row text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('(%s)', string_agg(format('%s.%s is null', p_row, arbiter._quoted(k.key)), ' and ' order by k.way))
    from arbiter._keys((p_protection).user_path) k;
end;
comment on function arbiter._no_keys_expression(arbiter.protections, text) is
  'SQL for whether a row names nothing that leads to a user.';

-- A partition that was detached has no trigger for its rows any more, so all of them are judged.
create or replace function arbiter._judged_expression(p_protection arbiter.protections, p_row text, p_guard name)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return case when 'update' = any ((p_protection).verbs)
  then format(
    '(%3$I.tg_op = ''INSERT'' or not %5$s or (%1$s.source is distinct from ''cloud'' or %1$s.%2$I is not null) and not %4$s%6$s)',
    p_row, (p_protection).machine_column, p_guard, arbiter._no_keys_expression(p_protection, p_row),
    arbiter._stands_expression(p_protection, p_guard),
    (select format(' or pg_partition_root(%I.tg_relid) is distinct from pg_partition_root(arbiter._protected_table(%s, %L))',
              p_guard, (p_protection).protection_id, (p_protection).declared_as)
       from pg_catalog.pg_class c
      where c.oid = (p_protection).protected_table and c.relkind = 'p'))
  else 'true' end;
comment on function arbiter._judged_expression(arbiter.protections, text, name) is
  'SQL for whether the guard judges a row. p_guard: the name of the function.';

create or replace function arbiter._is_ours_expression(p_protection arbiter.protections, p_row text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case when (p_protection).evidence then format('%s.arbiter_xid = pg_current_xact_id()', p_row) else 'true' end;
comment on function arbiter._is_ours_expression(arbiter.protections, text) is
  'SQL for whether the transaction of a row is the current one; true on a table without arbiter_xid.';

create or replace function arbiter._fits_expression(p_protection arbiter.protections, p_row text, p_guard name)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
return format('(%3$s and %1$s.source = case when %1$s.%2$I is null then ''local'' else ''cloud'' end and %4$s)',
  p_row, (p_protection).machine_column, arbiter._stands_expression(p_protection, p_guard),
  arbiter._is_ours_expression(p_protection, p_row));
comment on function arbiter._fits_expression(arbiter.protections, text, name) is
  'SQL for whether the table has its columns, and source, machine and arbiter_xid of a row fit together.';

-- The lock of _share_lease(), 14_lease.sql, written out, where a call would cost too much; test_one_rule holds the two
-- together. At a higher level than read committed it may wait (_share_lease_bounded). The second argument of
-- current_setting() changes nothing; without it the condition is on no table, which is a plan node of its own. A local
-- row has no machine, so it does not call the function that asks for one.
create or replace function arbiter._lease_expression(p_protection arbiter.protections, p_row text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('(select l.user_id from arbiter.leases l '
      'where l.user_id = %1$s and case when %2$s is null then l.machine_id is null '
      'else %3$sarbiter._machine_may_write(%4$s, l.machine_id, l.user_id) end and l.draining_since is null '
      'and current_setting(''transaction_isolation'', l.user_id is null) = ''read committed'' for key share skip locked)',
      arbiter._path_expression(p_protection, p_row, 'user'),
      m.machine,
      -- Of a number there are other texts than the one that names the machine.
      case when m.registry_class = 'text' or m.class = 'text' then format('l.machine_id = %s::text collate "C" and ', m.machine) end,
      case when m.registry_class = 'text' then format('%s::text collate "default"', m.machine)
        when m.class = 'text' then arbiter._id_expression(m.registry_class, format('%s::text', m.machine))
        else m.machine end)
    from (
      select format('%s.%I', p_row, (p_protection).machine_column) as machine,
             arbiter._registry_class('machine') as registry_class,
             arbiter._id_class((p_protection).protected_table, (p_protection).machine_column) as class) m;
end;
comment on function arbiter._lease_expression(arbiter.protections, text) is
  'SQL that locks the lease of a row''s user if the environment, or machine, that the row names holds it and no drain is under way, and returns the user; otherwise null.';

create or replace function arbiter._guard_words(p_protection arbiter.protections, p_guard name)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with keys as (
    select string_agg(format('n.%I', k.key), ', ') as of_row,
           string_agg(format('new.%1$s is not distinct from old.%1$s', k.quoted), ' and ') as kept,
           string_agg(
             format('(%3$s arbiter._follows_key(tg_relid, %1$L, old.%2$s::text, new.%2$s::text))', k.key, k.quoted,
               case when k.number > 1 then format('new.%1$s is not distinct from old.%1$s or', k.quoted) end),
             ' and ') as followed,
           array_agg(k.key) as names
      from (select y.way, y.key, arbiter._quoted(y.key) as quoted, count(*) over () as number from arbiter._keys((p_protection).user_path) y) k
  )
  select jsonb_build_object(
    '__protection', (p_protection).protection_id::text,
    '__mode', quote_literal((p_protection).mode),
    '__unowned', quote_literal((p_protection).unowned),
    '__has_before', ('update' = any ((p_protection).verbs) or exists (
      select from pg_catalog.pg_class c where c.oid = (p_protection).protected_table and c.relkind = 'p'))::text,
    '__updates', ('update' = any ((p_protection).verbs))::text,
    '__machine', arbiter._quoted((p_protection).machine_column),
    '__machine_of(n)', format('n.%I::text collate "C"', (p_protection).machine_column),
    '__machine_name', quote_literal((p_protection).machine_column),
    '__keys(n)', k.of_row,
    '__columns(new)', (
      select string_agg('new.' || arbiter._quoted(c.name), ', ') from unnest(arbiter._guarded_columns(p_protection)) as c (name)),
    '__keeps_keys', k.kept,
    '__follows_keys', k.followed,
    '__key_names', format('%L::text[]', k.names),
    '__user_of(n)', arbiter._path_expression(p_protection, 'n', 'user'),
    '__user_of(old)', arbiter._path_expression(p_protection, 'old', 'user'),
    '__no_keys(new)', arbiter._no_keys_expression(p_protection, 'new'),
    '__user_of(new)', arbiter._path_expression(p_protection, 'new', 'user'),
    '__is_broken(n)', case (p_protection).unowned
      when 'allow' then arbiter._path_expression(p_protection, 'n', 'broken') else 'false' end,
    '__differ(n)', arbiter._path_expression(p_protection, 'n', 'differ'),
    '__has_flaw(new)', format('(%s or %s)', arbiter._path_expression(p_protection, 'new', 'broken'),
      arbiter._path_expression(p_protection, 'new', 'differ')),
    '__is_ours(new)', arbiter._is_ours_expression(p_protection, 'new'),
    '__is_ours(n)', arbiter._is_ours_expression(p_protection, 'n'),
    '__stands', arbiter._stands_expression(p_protection, p_guard),
    '__stand_ins', arbiter._stand_ins(p_protection),
    '__fits(n)', arbiter._fits_expression(p_protection, 'n', p_guard),
    '__lease(n)', arbiter._lease_expression(p_protection, 'n'),
    '__lease(d)', arbiter._lease_expression(p_protection, 'd'),
    '__keeps_xid', case when (p_protection).evidence
      then 'new.arbiter_xid is not distinct from old.arbiter_xid' else 'true' end,
    '__is_judged(n)', arbiter._judged_expression(p_protection, 'n', p_guard),
    '__found', format('%I.found', p_guard),
    '__any_variable', format('%I.found is not null', p_guard),
    '__op', format('%I.tg_op', p_guard),
    '__writer(n)', arbiter._writer_expression(p_protection, 'n'),
    '__has_writer', (arbiter._writer_expression(p_protection, 'n') <> 'null::text[]')::text)
    from keys k;
end;
comment on function arbiter._guard_words(arbiter.protections, name) is
  'What the words of the two templates stand for in the guard of this table. p_guard: the name of the function.';
