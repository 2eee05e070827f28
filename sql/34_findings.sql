-- What doctor() looks for that takes more than a query, and the calls that mend it.

create or replace function arbiter._register_statement(p_registry arbiter.registry)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select format('select arbiter.register_machines(%L, %L, %L, %L, %L, %L, %L, %L, %L)',
    (p_registry).registry, (p_registry).id_column, (p_registry).user_column,
    (p_registry).status_column, (p_registry).heartbeat_column, (p_registry).states,
    (p_registry).machine_statuses, (p_registry).health_column, (p_registry).healthy);
end;
comment on function arbiter._register_statement(arbiter.registry) is 'The call that registers the registry again.';

-- A name is not guarded any more when its table was dropped or renamed and another table has it now; the same goes for
-- the machines of the registry.
create or replace function arbiter._lost_protections()
returns table (object text, state text, problem text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_registry arbiter.registry;
  v_protection arbiter.protections;
  v_namesake regclass;
  v_exists boolean;
begin
  select r.* into v_registry from arbiter.registry r where r.singleton;
  v_namesake := to_regclass(v_registry.declared_as);
  -- One that was dropped is no registry any more, which doctor() says, too.
  if v_namesake <> v_registry.registry and exists (select from pg_catalog.pg_class c where c.oid = v_registry.registry) then
    object := format('registry %s', v_registry.declared_as);
    state := 'missing';
    problem := format('The registered table was renamed to %s, and the machines of the table that has its name now are not known.',
      v_registry.registry);
    v_registry.registry := v_namesake;
    remedy := arbiter._register_statement(v_registry);
    return next;
  end if;
  for v_protection in select p.* from arbiter.protections p order by p.protection_id loop
    v_namesake := to_regclass(v_protection.declared_as);
    v_exists := exists (select from pg_catalog.pg_class c where c.oid = v_protection.protected_table);
    object := format('protection of %s', v_protection.declared_as);
    state := 'missing';
    if v_namesake is null and not v_exists then
      problem := 'The table was dropped.';
      remedy := format('select arbiter.unprotect(%s::regclass)', v_protection.protected_table::oid);
      return next;
    elsif v_namesake <> v_protection.protected_table
      and v_namesake not in (
        select f.member from arbiter.protections p cross join lateral arbiter._family(p.protected_table) as f (member))
    then
      problem := format('The protected table was %s, and writes to the table that has its name now are not arbitrated.',
        case when v_exists then 'renamed to ' || v_protection.protected_table else 'dropped' end);
      v_protection.protected_table := v_namesake;
      remedy := arbiter._protect_statement(v_protection);
      return next;
    end if;
  end loop;
end
$$;
comment on function arbiter._lost_protections() is
  'Protected tables that were dropped, and tables that have taken the name of a protected one, or of the registry.';

create or replace function arbiter._browsers_update(p_table regclass)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select exists (
    select from arbiter._family(p_table) as f (member)
      join pg_catalog.pg_class c on c.oid = f.member
      join arbiter._client_roles() k on k.kind in ('visitor', 'user')
     where has_any_column_privilege(k.role, c.oid, 'update')
       and (not c.relrowsecurity or exists (
         select from pg_catalog.pg_policy p
          where p.polrelid = c.oid
            and p.polpermissive
            and p.polcmd in ('w', '*')
            and (p.polroles && array[0::oid, to_regrole(quote_ident(k.role))]))));
end;
comment on function arbiter._browsers_update(regclass) is
  'Whether a client that policies bind may update rows of a table or of one of its partitions.';

-- disabled: not `enable always`; outdated: another definition; foreign: calls a function that is not arbiter's.
create or replace function arbiter._check_trigger(
  p_table regclass,
  p_trigger name,
  p_definition text,
  p_meaning text,
  p_mend text)
returns table (object text, state text, problem text, remedy text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_trigger record;
begin
  object := format('trigger %I on %s', p_trigger, p_table);
  remedy := p_mend;
  select t.oid as id, obj_description(t.oid, 'pg_trigger') as comment,
         p.pronamespace = 'arbiter'::regnamespace as ours
    into v_trigger
    from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc p on p.oid = t.tgfoid
   where t.tgrelid = p_table and t.tgname = p_trigger;
  if not found then
    state := 'missing';
    problem := 'Writes to this table are not arbitrated as they should be.';
  elsif not v_trigger.ours then
    state := 'foreign';
    problem := 'A trigger of this name calls a function that is not arbiter''s.';
    remedy := 'Drop or rename it first. ' || p_mend;
  elsif arbiter._is_disabled_below(p_table, p_trigger) then
    state := 'disabled';
    problem := 'It does not fire always.';
    remedy := format('alter table %s enable always trigger %I', p_table, p_trigger);
  elsif v_trigger.comment is distinct from arbiter._trigger_comment(v_trigger.id, p_definition, p_meaning) then
    state := 'outdated';
    problem := 'It was made from another definition.';
  else
    state := 'ok';
    remedy := null;
  end if;
  return next;
end
$$;
comment on function arbiter._check_trigger(regclass, name, text, text, text) is 'Checks one trigger that must be there.';

-- A partition that was detached loses the copies of row triggers, and keeps what was attached to itself.
create or replace function arbiter._left_on_others()
returns table (table_name regclass, trigger_name name, protected_table regclass)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select t.tgrelid::regclass, t.tgname, p.protected_table
    from arbiter.protections p
    -- Of a table that was dropped unprotect() removes them.
    join pg_catalog.pg_class c on c.oid = p.protected_table
    join pg_catalog.pg_proc f
      on f.pronamespace = 'arbiter'::regnamespace
     and f.proname in ('_guard_' || p.protection_id, '_guard_row_' || p.protection_id, '_provenance_' || p.protection_id)
    join pg_catalog.pg_trigger t on t.tgfoid = f.oid and t.tgparentid = 0
   where t.tgrelid not in (select m.member from arbiter._family(p.protected_table) as m (member))
   order by 1, 2;
end;
comment on function arbiter._left_on_others() is
  'Triggers of a guard on tables that are not part of the protected table any more, such as a detached partition.';

-- A tool that compares schemas copies functions and triggers, and no rows.
create or replace function arbiter._unknown_guards()
returns table (table_name regclass)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select distinct t.tgrelid::regclass
    from pg_catalog.pg_trigger t
    join pg_catalog.pg_proc f on f.oid = t.tgfoid and f.pronamespace = 'arbiter'::regnamespace
   where f.proname ~ '^_(guard|guard_row|provenance)_[0-9]+$'
     and t.tgparentid = 0
     and substring(f.proname from '[0-9]+$') not in (select p.protection_id::text from arbiter.protections p)
   order by 1;
end;
comment on function arbiter._unknown_guards() is 'Tables with a guard of a protection that is not in arbiter.protections.';

-- Definer functions set row_security = off, with which a policy that binds arbiter's owner is an error.
create or replace function arbiter._hidden_tables(p_registry regclass)
returns table (table_name regclass, is_forced boolean)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select c.oid::regclass, c.relforcerowsecurity
    from pg_catalog.pg_class c
    join pg_catalog.pg_class a on a.oid = 'arbiter.registry'::regclass
    join pg_catalog.pg_roles r on r.oid = a.relowner
   where (c.oid = p_registry
       -- What a path leads over, as the views have it: its foreign keys may be gone.
       or c.oid in (
         select d.refobjid
           from pg_catalog.pg_class v
           join pg_catalog.pg_rewrite w on w.ev_class = v.oid
           join pg_catalog.pg_depend d
             on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
          where v.relnamespace = 'arbiter'::regnamespace and v.relname ~ '^_path_[0-9]+_[0-9]+$'))
     and c.relkind in ('r', 'p')
     and c.relrowsecurity
     and (c.relforcerowsecurity or not pg_has_role(r.oid, c.relowner, 'usage'))
     and not r.rolsuper
     and not r.rolbypassrls
   order by 1;
end;
comment on function arbiter._hidden_tables(regclass) is
  'The registry, and the tables that lead to a user, where row security binds arbiter''s owner.';
