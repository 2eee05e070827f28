-- The record of what arbiter has attached or added: triggers, columns, constraints, indexes and policies of tables, and
-- the functions of expose(). What is not in it belongs to the app, and no name or comment makes it arbiter's.
--
-- A recorded object is recognised by its oid, but only in the database that has recorded it. In a restored or copied
-- database an oid may be that of any object; there the table must have an object of that name and that shape. A shape
-- contains no oid, no name that may change, and no expression as the server prints it, because another version of the
-- server may print it in another way; of a check it contains the words. An install records anew what it recognises.
--
-- A trigger that calls a function of schema arbiter is arbiter's in any case: no other role may execute these.

-- The newest of that name, because a snapshot that is older than a drop shows the dropped one, too.
create or replace function arbiter._find(
  p_kind text,
  p_attached_to regclass,
  p_name text,
  out object_id oid,
  out shape text)
returns record
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  case p_kind
    when 'trigger' then
      select t.oid, concat_ws(' ', t.tgfoid::regproc, t.tgtype)
        into object_id, shape
        from pg_catalog.pg_trigger t
       where t.tgrelid = p_attached_to and t.tgname = p_name
       order by t.oid desc
       limit 1;
    when 'column' then
      select a.attnum::integer::oid, format_type(a.atttypid, a.atttypmod)
        into object_id, shape
        from pg_catalog.pg_attribute a
       where a.attrelid = p_attached_to and a.attname = p_name and not a.attisdropped
       order by a.attnum desc
       limit 1;
    when 'constraint' then
      -- Of an expression: the words in it, and the functions that are not the server's own.
      select k.oid, concat_ws(' ', k.contype, nullif(k.confdeltype, ' '),
               (select string_agg(w.word[1], ',')
                  from regexp_matches(pg_get_expr(k.conbin, k.conrelid), format('%1$s[^%1$s]*%1$s', chr(39)), 'g') as w (word)),
               (select string_agg(d.refobjid::regprocedure::text, ',')
                  from pg_catalog.pg_depend d
                 where d.classid = 'pg_constraint'::regclass and d.objid = k.oid and d.refclassid = 'pg_proc'::regclass))
        into object_id, shape
        from pg_catalog.pg_constraint k
       where k.conrelid = p_attached_to and k.conname = p_name
       order by k.oid desc
       limit 1;
    when 'index' then
      select c.oid, concat_ws(' ', m.amname, i.indnatts, i.indisunique, i.indpred is not null)
        into object_id, shape
        from pg_catalog.pg_index i
        join pg_catalog.pg_class c on c.oid = i.indexrelid
        join pg_catalog.pg_am m on m.oid = c.relam
       where i.indrelid = p_attached_to and c.relname = p_name
       order by c.oid desc
       limit 1;
    when 'policy' then
      select p.oid, concat_ws(' ', p.polcmd, p.polpermissive, p.polqual is not null, p.polwithcheck is not null)
        into object_id, shape
        from pg_catalog.pg_policy p
       where p.polrelid = p_attached_to and p.polname = p_name
       order by p.oid desc
       limit 1;
    when 'function' then
      select p.oid, concat_ws(' ', l.lanname, p.provolatile, p.prosecdef)
        into object_id, shape
        from pg_catalog.pg_proc p
        join pg_catalog.pg_language l on l.oid = p.prolang
       where p.oid = to_regprocedure(p_name);
  end case;
end
$$;
comment on function arbiter._find(text, regclass, text) is
  'The object of a kind and a name on a table as it is now: its oid (of a column its number) and its shape; nulls when there is none.';

create or replace function arbiter._record(p_kind text, p_attached_to regclass, p_name text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into arbiter.attachments as a (kind, attached_to, name, shape, object_id, database_id, cluster)
  select p_kind, p_attached_to, p_name, f.shape, f.object_id, d.oid, c.system_identifier
    from arbiter._find(p_kind, p_attached_to, p_name) f, pg_catalog.pg_database d, pg_catalog.pg_control_system() c
   where d.datname = current_database()
  on conflict on constraint attachments_pkey do update
    set shape = excluded.shape,
        object_id = excluded.object_id,
        database_id = excluded.database_id,
        cluster = excluded.cluster
    where (a.shape, a.object_id, a.database_id, a.cluster)
          is distinct from (excluded.shape, excluded.object_id, excluded.database_id, excluded.cluster);
end
$$;
comment on function arbiter._record(text, regclass, text) is
  'Notes an object that arbiter has just made, or has recognised as its own, in arbiter.attachments.';

create or replace function arbiter._forget(p_kind text, p_attached_to regclass, p_name text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from arbiter.attachments a where a.kind = p_kind and a.attached_to = p_attached_to and a.name = p_name;
end
$$;
comment on function arbiter._forget(text, regclass, text) is 'Removes an object that arbiter has dropped from arbiter.attachments.';

create or replace function arbiter._ownership(p_kind text, p_attached_to regclass, p_name text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_found record := arbiter._find(p_kind, p_attached_to, p_name);
  v_ours boolean;
begin
  if v_found.object_id is null then
    return 'missing';
  end if;
  if p_kind = 'trigger' then
    select p.pronamespace = 'arbiter'::regnamespace
      into v_ours
      from pg_catalog.pg_trigger t
      join pg_catalog.pg_proc p on p.oid = t.tgfoid
     where t.oid = v_found.object_id;
  -- Before the first migration there is no record.
  elsif to_regclass('arbiter.attachments') is not null then
    select case when (a.cluster, a.database_id) = (c.system_identifier, d.oid)
             then a.object_id = v_found.object_id else a.shape = v_found.shape end
      into v_ours
      from arbiter.attachments a, pg_catalog.pg_database d, pg_catalog.pg_control_system() c
     where a.kind = p_kind and a.attached_to = p_attached_to and a.name = p_name
       and d.datname = current_database();
  end if;
  return case when v_ours then 'ours' else 'foreign' end;
end
$$;
comment on function arbiter._ownership(text, regclass, text) is
  'Whose the object of a kind and a name on a table is: ours, foreign, or missing when there is none.';

-- What was dropped, or has lost its name to another object, is the app's decision and is forgotten.
create or replace function arbiter._renew_record()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_attachment record;
begin
  for v_attachment in
    select a.kind, a.attached_to, a.name, arbiter._ownership(a.kind, a.attached_to, a.name) as ownership
      from arbiter.attachments a
  loop
    if v_attachment.ownership = 'ours' then
      perform arbiter._record(v_attachment.kind, v_attachment.attached_to, v_attachment.name);
    else
      perform arbiter._forget(v_attachment.kind, v_attachment.attached_to, v_attachment.name);
    end if;
  end loop;
end
$$;
comment on function arbiter._renew_record() is
  'Records anew what is recognised as arbiter''s, with the oids of this database, and forgets the rest.';

create or replace function arbiter._need_free_name(p_kind text, p_attached_to regclass, p_name text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if arbiter._ownership(p_kind, p_attached_to, p_name) = 'foreign' then
    perform arbiter._fail('duplicate_object',
      format('table %s has a %s %I that arbiter has not made', p_attached_to, p_kind, p_name),
      format('Drop that %s, or rename it; nothing was changed.', p_kind));
  end if;
end
$$;
comment on function arbiter._need_free_name(text, regclass, text) is
  'Error 42710 when a table has an object of this name that is not arbiter''s.';

create or replace function arbiter._add_column(p_table regclass, p_column name, p_kind text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
begin
  if not arbiter._has_column(p_table, p_column, p_kind) then
    select coalesce(c.definition, (select arbiter._id_type(r.registry, r.id_column) from arbiter.registry r), 'uuid') as definition,
           c.meaning
      into strict v_column
      from arbiter._columns() c
     where c.kind = p_kind;
    execute format('alter table %s add column %I %s', p_table, p_column, v_column.definition);
    execute format('comment on column %s.%I is %L', p_table, p_column, 'arbiter: ' || v_column.meaning);
    perform arbiter._record('column', p_table, p_column);
  end if;
end
$$;
comment on function arbiter._add_column(regclass, name, text) is
  'Adds a column to a table of the app unless it exists, and records that it is arbiter''s.';

-- Here and not with the rest of the uninstall, because an installation that was cut short has left columns, too.
create or replace function arbiter._leave_columns(p_drop boolean)
returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column record;
  v_uses text;
begin
  -- Before the first migration, and after its rollback.
  if to_regclass('arbiter.attachments') is null then
    return;
  end if;
  for v_column in
    select a.attached_to as table_name, a.name
      from arbiter.attachments a
      join pg_catalog.pg_class c on c.oid = a.attached_to
     where a.kind = 'column'
       and arbiter._ownership('column', a.attached_to, a.name) = 'ours'
       -- A table that has become a partition since keeps what its parent has.
       and not exists (
         select from pg_catalog.pg_attribute i
          where i.attrelid = a.attached_to and i.attname = a.name and i.attinhcount > 0)
     order by c.relnamespace::regnamespace::text, c.relname, a.object_id
  loop
    if p_drop then
      begin
        execute format('alter table %s drop column %I', v_column.table_name, v_column.name);
        return next format('dropped column %I of %s', v_column.name, v_column.table_name);
        continue;
      exception
        -- For example a view of another role: it must not be able to stop an uninstall.
        when dependent_objects_still_exist then
          get stacked diagnostics v_uses = pg_exception_detail;
      end;
    end if;
    return next concat_ws(', which is used: ', format('left column %I of %s', v_column.name, v_column.table_name),
      replace(v_uses, chr(10), ', '));
    v_uses := null;
  end loop;
end
$$;
comment on function arbiter._leave_columns(boolean) is
  'Drops the columns that arbiter has added to tables of the app, or leaves them; one line for each.';
