-- What the words of the guard's templates (22_guard.sql) stand for in the guard of one table.

create or replace function arbiter._keys(p_user_path text)
returns table (way bigint, key text)
language sql
immutable
set search_path = pg_catalog, pg_temp
begin atomic
  select min(w.way), w.steps[1] from arbiter._ways(p_user_path) w group by w.steps[1] order by 1;
end;
comment on function arbiter._keys(text) is 'The columns of a table where the ways to the user begin, each once, in the order of the ways.';

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

create or replace function arbiter._judged_expression(p_protection arbiter.protections, p_row text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
return case when 'update' = any ((p_protection).verbs)
  then format('(tg_op = ''INSERT'' or %1$s.source is distinct from ''cloud'' or %1$s.%2$I is not null)',
    p_row, (p_protection).machine_column)
  else 'true' end;
comment on function arbiter._judged_expression(arbiter.protections, text) is
  'SQL for whether the guard judges a row.';

create or replace function arbiter._guard_words(p_protection arbiter.protections)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with keys as (
    select string_agg(format('n.%I', k.key), ', ') as of_row,
           string_agg(format('new.%1$I is not distinct from old.%1$I', k.key), ' and ') as kept,
           string_agg(
             format('(%3$s arbiter._follows_key(tg_relid, %1$L, old.%2$I::text, new.%2$I::text))', k.key, k.key,
               case when k.number > 1 then format('new.%1$I is not distinct from old.%1$I or', k.key) end),
             ' and ') as followed
      from (select y.way, y.key, count(*) over () as number from arbiter._keys((p_protection).user_path) y) k
  )
  select jsonb_build_object(
    '__protection', (p_protection).protection_id::text,
    '__mode', quote_literal((p_protection).mode),
    '__unowned', quote_literal((p_protection).unowned),
    '__updates', ('update' = any ((p_protection).verbs))::text,
    '__machine', quote_ident((p_protection).machine_column),
    '__machine_key(d)', case
      when arbiter._registry_class('machine') = 'text'
        then format('d.%I::text collate "default"', (p_protection).machine_column)
      when arbiter._id_class((p_protection).protected_table, (p_protection).machine_column) = 'text'
        then arbiter._id_expression(arbiter._registry_class('machine'), format('d.%I::text', (p_protection).machine_column))
      else format('d.%I', (p_protection).machine_column) end,
    '__machine_of(d)', format('d.%I::text collate "C"', (p_protection).machine_column),
    '__machine_of(n)', format('n.%I::text collate "C"', (p_protection).machine_column),
    '__machine_name', quote_literal((p_protection).machine_column),
    '__keys(n)', k.of_row,
    '__keeps_keys', k.kept,
    '__follows_keys', k.followed,
    '__user_of(d)', arbiter._path_expression(p_protection, 'd', 'user'),
    '__user_of(n)', arbiter._path_expression(p_protection, 'n', 'user'),
    '__user_of(old)', arbiter._path_expression(p_protection, 'old', 'user'),
    '__user_of(new)', arbiter._path_expression(p_protection, 'new', 'user'),
    '__is_broken(n)', case (p_protection).unowned
      when 'allow' then arbiter._path_expression(p_protection, 'n', 'broken') else 'false' end,
    '__differ(n)', arbiter._path_expression(p_protection, 'n', 'differ'),
    '__has_flaw(new)', format('(%s or %s)', arbiter._path_expression(p_protection, 'new', 'broken'),
      arbiter._path_expression(p_protection, 'new', 'differ')),
    '__is_ours(new)', case when (p_protection).evidence
      then 'new.arbiter_xid = pg_current_xact_id()' else 'true' end,
    '__is_ours(n)', case when (p_protection).evidence
      then 'n.arbiter_xid = pg_current_xact_id()' else 'true' end,
    '__keeps_xid', case when (p_protection).evidence
      then 'new.arbiter_xid is not distinct from old.arbiter_xid' else 'true' end,
    '__is_judged(d)', arbiter._judged_expression(p_protection, 'd'),
    '__is_judged(n)', arbiter._judged_expression(p_protection, 'n'),
    '__writer(d)', arbiter._writer_expression(p_protection, 'd'),
    '__writer(n)', arbiter._writer_expression(p_protection, 'n'),
    '__has_writer', (arbiter._writer_expression(p_protection, 'n') <> 'null::text[]')::text)
    from keys k;
end;
comment on function arbiter._guard_words(arbiter.protections) is
  'What the words of the two templates stand for in the guard of this table.';
