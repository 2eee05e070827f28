-- The guard of a protected table, built from its row in arbiter.protections: the copies of the templates, the views of
-- the path to the user, and the triggers on the table and its partitions.

create or replace function arbiter._guard_triggers(p_protection arbiter.protections)
returns table (table_name regclass, trigger_name name, definition text, meaning text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_guard text := format('execute function arbiter.%I()', '_guard_' || p_protection.protection_id);
  v_guard_row text := format('execute function arbiter.%I()', '_guard_row_' || p_protection.protection_id);
  v_provenance text := format('execute function arbiter.%I()', '_provenance_' || p_protection.protection_id);
  v_updates boolean := 'update' = any (p_protection.verbs);
  v_family regclass[] := array(select f.member from arbiter._family(p_protection.protected_table) as f (member));
  v_member record;
begin
  for v_member in
    select c.oid::regclass as name, c.relkind, c.relispartition,
           exists (select from pg_catalog.pg_inherits i where i.inhrelid = c.oid) as is_child
      from unnest(v_family) as f (member)
      join pg_catalog.pg_class c on c.oid = f.member
  loop
    table_name := v_member.name;
    trigger_name := 'arbiter_guard_insert';
    definition := format('after insert on %s referencing new table as arbiter_rows for each statement %s', table_name, v_guard);
    meaning := 'Arbitrates inserts.';
    return next;
    if v_updates then
      trigger_name := 'arbiter_guard_update';
      definition := format('after update on %s referencing new table as arbiter_rows for each statement %s', table_name, v_guard);
      meaning := 'Arbitrates updates.';
      return next;
    end if;
    if v_member.relkind = 'r' and not v_member.is_child then
      -- A write to a parent fires no statement trigger of its children. The server does not make a table with such a
      -- trigger a child, not even when it is disabled, and its error names the trigger. The condition is never true,
      -- and inserts and updates never come to it.
      trigger_name := 'arbiter_unprotect_it_first_then_protect_what_it_is_attached_to';
      definition := format('after delete on %s referencing old table as arbiter_rows for each row when (false) '
        'execute function arbiter.tg_no_parent()', table_name);
      meaning := 'Keeps the table from being attached to another one, whose writes would not be arbitrated.';
      return next;
    end if;
    -- The server copies row triggers of a partitioned table to its partitions, also to later ones.
    continue when v_member.relispartition;
    trigger_name := 'arbiter_provenance';
    -- Without a condition, because dropping a column drops the triggers whose condition names it.
    definition := format('after update on %s for each row %s', table_name, v_provenance);
    meaning := 'Keeps who wrote a row.';
    return next;
    if v_updates or v_member.relkind = 'p' then
      -- Before the update, too: a row that moves to another partition fires no trigger after it. And where updates are
      -- arbitrated, it is the first by its name: once others have changed more of the row, a foreign key's update looks
      -- like any other.
      trigger_name := case when v_updates then '!arbiter_provenance_before' else 'arbiter_provenance_before' end;
      definition := format('before update on %s for each row %s', table_name, v_provenance);
      return next;
    end if;
    if v_updates and p_protection.evidence then
      trigger_name := 'arbiter_stamp';
      definition := format('before update on %2$s for each row ' ||
        $w$when (new.source is distinct from 'cloud' or new.%1$I is not null) execute function arbiter.tg_stamp_xid()$w$,
        p_protection.machine_column, table_name);
      meaning := 'Names the transaction that last wrote a row.';
      return next;
    end if;
    if v_member.relkind = 'p' then
      trigger_name := 'arbiter_guard_row';
      -- A row that MERGE moves to another partition is in no transition table; it fires the trigger for inserts.
      -- Below a root that is not protected no statement trigger fires; that question has only constants in it, so the
      -- server answers it once for a statement and not for each row. Tables stand in the condition as regclass, because
      -- a dump then has their names; a number would be that of another table after a restore.
      definition := case when v_updates
        then format('after insert or update on %s for each row %s', table_name, v_guard_row)
        else format('after insert on %1$s for each row when (new.tableoid <> all (%2$L::regclass[]) '
          'or pg_partition_root(%3$L::regclass) <> %3$L::regclass) %4$s',
          table_name, v_family, p_protection.protected_table, v_guard_row)
        end;
      meaning := 'Arbitrates what no statement trigger sees: partitions that have come since, rows that move.';
      return next;
    end if;
  end loop;
end
$$;
comment on function arbiter._guard_triggers(arbiter.protections) is
  'The triggers that a protected table and its partitions must have. definition: what follows the name in CREATE TRIGGER.';

create or replace function arbiter._drop_path_views(p_protection_id integer, p_keep name[] default '{}')
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_view name;
begin
  for v_view in
    select c.relname
      from pg_catalog.pg_class c
     where c.relnamespace = 'arbiter'::regnamespace
       and c.relname ~ format('^_path_%s_[0-9]+$', p_protection_id)
       and c.relname <> all (p_keep)
  loop
    execute format('drop view arbiter.%I', v_view);
  end loop;
end
$$;
comment on function arbiter._drop_path_views(integer, name[]) is
  'Drops the views of the path of a protection, except those in p_keep.';

create or replace function arbiter._build_guard(p_protection_id integer)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_protection arbiter.protections;
  v_table regclass;
  v_guard record;
  v_provenance name := '_provenance_' || p_protection_id;
  v_view record;
begin
  select p.* into strict v_protection from arbiter.protections p where p.protection_id = p_protection_id;
  v_table := v_protection.protected_table;

  perform arbiter._drop_path_views(p_protection_id, array(select w.view_name from arbiter._path_views(v_protection) w));
  for v_view in
    select w.view_name as name, w.query
      from arbiter._path_views(v_protection) w
     where not arbiter._is_current_view(w.view_name, w.query, w.parent)
  loop
    perform arbiter._make_view(v_view.name, v_view.query, format('A step from a row of %s to its user.', v_table));
    execute format('comment on column arbiter.%I.key is %L', v_view.name, 'What the foreign key names.');
    execute format('comment on column arbiter.%I.value is %L', v_view.name, 'The user, or the key of the next step.');
  end loop;

  -- Two copies for a partitioned table: the second one is for single rows, which no statement trigger has seen.
  for v_guard in
    select g.name, g.rows
      from (values
        ('_guard_' || p_protection_id, 'arbiter_rows'),
        ('_guard_row_' || p_protection_id, '(select new.*)')) as g (name, rows)
     where g.rows = 'arbiter_rows'
        or (select c.relkind = 'p' from pg_catalog.pg_class c where c.oid = v_table)
  loop
    perform arbiter._instantiate('arbiter._guard_template()', v_guard.name,
      arbiter._guard_words(v_protection, v_guard.name) || jsonb_build_object('__rows', v_guard.rows));
    perform arbiter._seal(format('arbiter.%I()', v_guard.name)::regprocedure,
      format('Arbitrates writes to %s.', v_table));
  end loop;

  perform arbiter._instantiate('arbiter._provenance_template()', v_provenance, arbiter._guard_words(v_protection, v_provenance));
  perform arbiter._seal(format('arbiter.%I()', v_provenance)::regprocedure,
    format('Keeps who wrote a row of %s.', v_table));

  perform arbiter._attach(t.table_name, t.trigger_name, t.definition, t.meaning)
     from arbiter._guard_triggers(v_protection) t;
  -- Triggers that only other verbs need.
  perform arbiter._detach(f.member, array(
      select t.trigger_name from arbiter._guard_triggers(v_protection) t where t.table_name = f.member))
     from arbiter._family(v_table) as f (member);
end
$$;
comment on function arbiter._build_guard(integer) is
  'Generates the functions and triggers of a protected table and its partitions, by its row in arbiter.protections.';

create or replace function arbiter._is_current_guard(p_protection arbiter.protections)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select p.prosrc = arbiter._filled_in('arbiter._guard_template()',
           arbiter._guard_words(p_protection, p.proname) || '{"__rows": "arbiter_rows"}')
    from pg_catalog.pg_proc p
   where p.oid = to_regprocedure(format('arbiter.%I()', '_guard_' || (p_protection).protection_id));
end;
comment on function arbiter._is_current_guard(arbiter.protections) is
  'Whether the guard of a table is the one that protect() would generate now; null when there is none.';

-- The notices of `if exists` are no news to the caller.
create or replace function arbiter._drop_guard(p_protection_id integer)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = warning
as $$
begin
  -- Also from partitions that were detached in the meantime.
  perform arbiter._detach(t.table_name)
     from (
       select distinct t.tgrelid::regclass as table_name
         from pg_catalog.pg_trigger t
         join pg_catalog.pg_proc p on p.oid = t.tgfoid
         join pg_catalog.pg_class c on c.oid = t.tgrelid
        where p.pronamespace = 'arbiter'::regnamespace
          and p.proname ~ format('^_(guard|guard_row|provenance)_%s$', p_protection_id)
          and t.tgparentid = 0
          and pg_has_role(c.relowner, 'usage')) as t;
  -- With the triggers of a partition that was detached and given to another role.
  execute format('drop function if exists arbiter.%I(), arbiter.%I(), arbiter.%I() cascade',
    '_guard_' || p_protection_id, '_guard_row_' || p_protection_id, '_provenance_' || p_protection_id);
  perform arbiter._drop_path_views(p_protection_id);
end
$$;
comment on function arbiter._drop_guard(integer) is 'Drops the triggers, functions and views that were generated for a protected table.';
