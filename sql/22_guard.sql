-- The guard of a protected table, as templates. What they ask where the common case does not decide is in 22_admit.sql.
--
-- protect() makes a copy of the templates for each table (_instantiate, 20_generate.sql) and puts the table's own names
-- and options in the place of these words (_guard_words):
--
--   __rows          the new rows: the transition table arbiter_rows, or (select new.*) for a row that it does not hold
--   __keys(x)       the columns where the ways from a row to its user begin, separated by commas
--   __keeps_keys    whether an update keeps these columns
--   __no_keys(x)    whether they are all null
--   __follows_keys  whether what it changes of them is what foreign keys do: `on update cascade`, `on delete set null`
--   __key_names     their names, as an array
--   __columns(x)    all columns of x that the guard names, separated by commas
--   __machine       the column that names the machine; __machine_name is its name as a literal
--   __machine_of(x) the machine that the row x names, as text
--   __user_of(x)    the user to whom the row x leads
--   __is_broken(x)  whether the path of x names a row that does not exist; not asked where that rejects the row anyway
--   __differ(x)     whether the ways of x lead to different users; false where there is one way
--   __has_flaw(x)   whether they do, or the path of x names a row that does not exist
--   __is_ours(x)    whether arbiter_xid of x is this transaction; true on a table without that column
--   __keeps_xid     whether an update keeps arbiter_xid; true on a table without that column
--   __stands        whether the table still has the columns that this guard names; for most a constant in each plan
--   __stand_ins     variables for them, named like them: what a name that is no column any more means in a query
--   __any_variable  true; plpgsql hands the stand-ins to a query only if it had a variable before the table has changed
--   __fits(x)       whether source and machine of x fit together, and __stands and __is_ours(x)
--   __lease(x)      locks the lease that x needs if it is free to, and is its user; otherwise null
--   __is_judged(x)  whether the guard judges x; it leaves an update that took the machine away, or the user, to
--                   _provenance_template, which sees the old row, too
--   __writer(x)     what the rows of one writer have in common: keys and machine; null for keys not compared so
--   __has_before    whether _provenance_template also comes before an update: true or false
--   __has_writer    whether keys are compared so: true or false
--   __updates       whether updates are arbitrated, too: true or false
--   __found, __op   found and tg_op, by names that no column has
--   __protection, __mode, __unowned   the table's row in arbiter.protections
--
-- The options stand in the code and are not read from arbiter.protections, because a transaction with an old snapshot
-- would read old ones. Constants such as `not false or ...` cost nothing: the planner removes them.
--
-- Definer: they lock leases and read the registry and the path to the user, which the client may not be allowed to.
-- With row security off a hidden row is an error, not a missing one.

create or replace function arbiter._guard_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
#variable_conflict use_column
<<n>>
declare
  __stand_ins text;
begin
  declare
    v_several boolean;
  begin
    -- To set up a query costs about as much as to answer it. For one row two short queries are cheaper than one that
    -- compares rows; for many rows the lease is asked for once.
    perform from __rows as n offset 1;
    v_several := __found;
    if not v_several then
      -- The environment, or machine, that has written the row holds the lease, and no drain is under way.
      perform
         from __rows as n
        where __is_judged(n)
          and case when __fits(n) then __lease(n) end is null;
      if not __found then
        return null;
      end if;
    else
      v_several := current_setting('transaction_isolation') = 'read committed';
      -- One writer has written all rows, and holds: the lease is that of the first row, and the others only have to be
      -- like it. Inside its own query the inner n hides the outer one.
      if v_several and __has_writer then
        perform
           from __rows as n
          where __is_judged(n)
            and (case when __fits(n) then __writer(n) = (
                   select case when __lease(n) is not null then __writer(n) end
                     from __rows as n
                    where __is_judged(n)
                    limit 1) end) is not true;
        if not __found then
          return null;
        end if;
      end if;
      -- Several who all hold. The rows are made distinct before their users are looked up.
      if v_several then
        perform
           from (
             select distinct __keys(n), n.__machine, __fits(n) as arbiter_fits
               from __rows as n
              where __is_judged(n) and __any_variable) d
          where case when d.arbiter_fits then __lease(d) end is null;
        if not __found then
          return null;
        end if;
      end if;
    end if;

    if __updates and __op = 'UPDATE' and arbiter._is_amending(__protection) then
      return null;
    end if;

    -- All other cases: each distinct (user, source, machine, flaw) is judged, in the order of the users.
    declare
      v_write record;
      v_error arbiter.error;
    begin
      for v_write in
        select distinct
               __user_of(n) as user_id,
               n.source::text as source,
               __machine_of(n) as machine_id,
               case when not __stands then 'columns'
                    when (__is_ours(n)) is not true then 'evidence'
                    when __is_broken(n) then 'parent'
                    when __differ(n) then 'users' end as flaw
          from __rows as n
         where __is_judged(n) and __any_variable
         order by 1, 2, 3, 4
      loop
        -- One user without a lease sends the whole statement here; keep the others cheap.
        if v_several and v_write.flaw is null and v_write.source = 'local' and v_write.machine_id is null then
          continue when arbiter._share_lease(v_write.user_id, 'local', null);
        end if;
        v_error := arbiter._admit(__protection, __mode, __unowned,
          v_write.user_id, v_write.source, v_write.machine_id, v_write.flaw);
        if v_error.sqlstate is not null then
          raise exception using
            errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
        end if;
      end loop;
    end;
    return null;
  end;
end
$$;
comment on function arbiter._guard_template() is 'The guard of a protected table, as a template.';

-- The provenance of a row does not change, except by what a foreign key does: a machine which is deleted leaves its
-- rows without a machine (on delete set null), and a new key of a parent replaces the old one (on update cascade).
-- Where updates are arbitrated, source and machine say who writes, and only the user is kept.
create or replace function arbiter._provenance_template()
returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_seqscan = off
as $$
#variable_conflict use_variable
declare
  v_columns_gone boolean := false;
  v_user_id text;
  v_machine_gone boolean;
  v_by_keys boolean;
  v_error arbiter.error;
begin
  -- The common case: the provenance has not changed, or the update says who writes.
  begin
    if __keeps_keys
      and (case when __updates then (new.source is distinct from 'cloud' or new.__machine is not null) and not __no_keys(new)
           else new.source is not distinct from old.source
            and new.__machine is not distinct from old.__machine
            and __keeps_xid end)
    then
      return new;
    end if;
    -- A session that has asked this before reads a column only when it comes to it, so all of them are read here.
    perform num_nulls(__columns(new));
  exception
    when undefined_column then
      v_columns_gone := true;
  end;
  -- What is only observed is recorded once. Where updates are arbitrated the guard tells of columns that are gone.
  if __mode = 'observe' and tg_when = 'AFTER' and __has_before or v_columns_gone and __updates then
    return new;
  end if;
  if v_columns_gone then
    v_error := arbiter._admit(__protection, __mode, __unowned, null, null, null, 'columns');
    if v_error.sqlstate is not null then
      raise exception using
        errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
    end if;
    return new;
  end if;
  if (__is_ours(new)) and arbiter._is_amending(__protection) then
    return new;
  end if;
  v_user_id := __user_of(old);
  -- Also for a row that says local: it may have had a machine before the table was protected.
  v_machine_gone := new.source is not distinct from old.source
    and old.__machine is not null
    and new.__machine is null
    and not exists (select from arbiter.machines m where arbiter._is_machine(m.machine_id, old.__machine::text collate "C"));
  -- A foreign key changes nothing else of the row. A client that deletes or renames the parent could change more of it
  -- in the same statement. After the update, triggers of the app may have changed more.
  v_by_keys := __updates and not (__keeps_keys) and (__follows_keys)
    and (tg_when = 'AFTER' or arbiter._changes_only(tg_relid, old, new, __key_names));
  -- Where the ways of the new row disagree, or one is broken, it has no user yet, and could get one without a write.
  if ((__user_of(new)) is distinct from v_user_id or __has_flaw(new))
      and not (__follows_keys)
    or not __updates and (new.source is distinct from old.source or not (__keeps_xid)
      or new.__machine is distinct from old.__machine and not v_machine_gone
        and not arbiter._follows_key(tg_relid, __machine_name, old.__machine::text, new.__machine::text))
  then
    v_error := arbiter._reject_or_record(__protection, __mode, 'provenance_immutable',
      arbiter._detail('provenance_immutable', v_user_id, null, null),
      case when arbiter._is_amending(__protection)
        then 'A correction says so in each row: set arbiter_xid = default in the same update.' end);
  -- The machine's foreign key changes nothing else, either. Any other update that leaves cloud without a machine is a
  -- write and must say whose.
  elsif __updates and new.source = 'cloud' and new.__machine is null and not v_by_keys
    and not (v_machine_gone
      and (tg_when = 'AFTER'
        or arbiter._changes_only(tg_relid, old, new, array[__machine_name])))
  then
    v_error := arbiter._reject_or_record(__protection, __mode, 'wrong_identity',
      arbiter._detail('wrong_identity', v_user_id, null, null, '{"source": "cloud", "machine_id": null}'),
      'A cloud write names its machine.');
  -- A user who is deleted leaves the row. Any other write that leaves it without keys is one to a row without a user.
  elsif __updates and __no_keys(new) and not v_by_keys and (new.source is distinct from 'cloud' or new.__machine is not null)
  then
    v_error := arbiter._admit(__protection, __mode, __unowned, null, new.source, new.__machine::text, null);
  end if;
  if v_error.sqlstate is not null then
    raise exception using
      errcode = v_error.sqlstate, message = v_error.message, detail = v_error.detail, hint = v_error.hint;
  end if;
  return new;
end
$$;
comment on function arbiter._provenance_template() is 'Keeps who wrote the rows of a protected table, as a template.';

create or replace function arbiter.tg_stamp_xid()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.arbiter_xid := pg_current_xact_id();
  return new;
exception
  when undefined_column then
    -- The guard, which comes after it, says what mends that.
    return new;
end
$$;
comment on function arbiter.tg_stamp_xid() is 'Sets arbiter_xid to the transaction that updates the row.';

-- Of a trigger whose condition is never true (_guard_triggers, 25_build.sql).
create or replace function arbiter.tg_no_parent()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  return null;
end
$$;
comment on function arbiter.tg_no_parent() is
  'Is never called: a trigger that names it keeps a protected table from being attached to another one.';
