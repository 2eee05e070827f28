-- How the owner corrects who wrote rows, for example when a column moves or a user's rows go to another one. The update
-- says arbiter_xid = default, so that the audit knows the rows by the transaction that has corrected them.
--
-- What marks the transaction is a row and not a setting, because any client may set a setting.

create or replace function arbiter.amend(p_table regclass, p_reason text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform arbiter._need_owner(p_table);
  if not exists (select from arbiter.protections p where p.protected_table = p_table) then
    perform arbiter._fail('undefined_object',
      format('table %s is not protected', p_table),
      'Update it: nothing keeps you from it.');
  end if;
  if coalesce(btrim(p_reason), '') = '' then
    perform arbiter._fail('invalid_parameter_value',
      format('the correction of %s has no reason', p_table),
      'Say in p_reason why; it is kept in arbiter.amendments.');
  end if;
  insert into arbiter.amendments (protected_table, reason, amended_by, amended_at, xid, cluster)
  values (p_table, p_reason, arbiter._session_role(), clock_timestamp(), pg_current_xact_id(),
    (select c.system_identifier from pg_catalog.pg_control_system() c));
end
$$;
comment on function arbiter.amend(regclass, text) is
  'Lets updates of this transaction change source, machine and user of rows of a protected table, if they say arbiter_xid = default. The audit counts these rows as not provable, amended. Inserts are arbitrated as ever. On a table without arbiter_xid nothing marks the rows. p_reason: is kept in arbiter.amendments. For the owner of the table. Errors 22023 no reason, 42501 not the owner, 42704 not protected, 42P01 no table.';

-- A restored dump brings transaction ids of another cluster, which this one will count up to.
create or replace function arbiter._is_amending(p_protection_id integer)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (
    select from arbiter.amendments a
      join arbiter.protections p on p.protected_table = a.protected_table
     where p.protection_id = p_protection_id
       and a.xid = pg_current_xact_id_if_assigned()
       and a.cluster = (select c.system_identifier from pg_catalog.pg_control_system() c));
end
$$;
comment on function arbiter._is_amending(integer) is 'Whether this transaction corrects rows of a protected table, see amend().';
