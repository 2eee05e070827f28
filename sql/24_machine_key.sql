-- The foreign key from the machine column of a protected table to the registry, and the index that it needs.

-- Only where the column is arbiter's and no row names a machine, which could be one of an earlier registry. A
-- partitioned table gets no foreign key, because before PostgreSQL 18 it cannot be `not valid` there; texts beside a
-- registry of uuids can have none. The guard checks the machine in any case.
create or replace function arbiter._add_machine_key(p_table regclass, p_machine_column name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key constant name := 'arbiter_machine_id_fkey';
  v_registry arbiter.registry;
  v_used boolean;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  if v_registry.registry is null then
    return;
  end if;
  if arbiter._ownership('constraint', p_table, v_key) = 'ours' and not exists (
    select from pg_catalog.pg_constraint k
      join pg_catalog.pg_attribute a
        on a.attrelid = k.conrelid and a.attname = p_machine_column and k.conkey = array[a.attnum]
     where k.conrelid = p_table
       and k.conname = v_key
       and k.confrelid = v_registry.registry)
  then
    execute format('alter table %s drop constraint %I', p_table, v_key);
    perform arbiter._forget('constraint', p_table, v_key);
  end if;
  if arbiter._ownership('column', p_table, p_machine_column) = 'ours' and exists (
    select from pg_catalog.pg_class c
      join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = p_machine_column
     where c.oid = p_table
       and c.relkind = 'r'
       and arbiter._id_class(c.oid, a.attname) = arbiter._registry_class('machine')
       and not exists (
         select from pg_catalog.pg_constraint k
          where k.conrelid = c.oid and k.contype = 'f' and k.conkey = array[a.attnum]))
  then
    execute format('select exists (select from %s where %I is not null)', p_table, p_machine_column) into v_used;
    if not v_used then
      perform arbiter._need_free_name('constraint', p_table, v_key);
      execute format(
        'alter table %s add constraint %I foreign key (%I) references %s (%I) on delete set null not valid',
        p_table, v_key, p_machine_column, v_registry.registry, v_registry.id_column);
      perform arbiter._record('constraint', p_table, v_key);
    end if;
  end if;
end
$$;
comment on function arbiter._add_machine_key(regclass, name) is
  'Adds the foreign key from arbiter''s own machine column of a protected table to the registry, not validated yet.';

create or replace function arbiter._lacks_machine_index(p_table regclass)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from pg_catalog.pg_constraint k
     where k.conrelid = p_table
       and k.conname = 'arbiter_machine_id_fkey'
       and arbiter._ownership('constraint', p_table, k.conname) = 'ours'
       and not exists (
         select from pg_catalog.pg_index i where i.indrelid = k.conrelid and i.indkey[0] = k.conkey[1]));
end;
comment on function arbiter._lacks_machine_index(regclass) is
  'Whether a table has arbiter''s foreign key to the registry, and no index on its column.';

create or replace function arbiter._add_machine_index(p_table regclass)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column name;
  v_schema name;
  v_name name;
begin
  if not arbiter._lacks_machine_index(p_table) then
    return;
  end if;
  select a.attname, n.nspname, format('arbiter_%s_machine_idx', left(c.relname, 40))
    into v_column, v_schema, v_name
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    join pg_catalog.pg_class c on c.oid = k.conrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where k.conrelid = p_table and k.conname = 'arbiter_machine_id_fkey';
  -- Another table with the same first letters may have one of this name, or the app.
  while to_regclass(format('%I.%I', v_schema, v_name)) is not null loop
    v_name := format('arbiter_%s_machine_idx', gen_random_uuid());
  end loop;
  execute format('create index %I on %s (%I) where %3$I is not null', v_name, p_table, v_column);
  perform arbiter._record('index', p_table, v_name);
end
$$;
comment on function arbiter._add_machine_index(regclass) is
  'Creates the index that the foreign key from a table''s machine column to the registry needs, if it is missing: without it deleting a machine reads the whole table. Writers wait while it reads the table.';
