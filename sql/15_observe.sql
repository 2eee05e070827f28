-- Mode observe: what it records. Any user can make as many observations as they like, so of each table the newest 1,000
-- are kept. A write that enforce would admit does not come here.

create or replace function arbiter._trim_observations(p_table regclass)
returns void
language sql
set search_path = pg_catalog, pg_temp
begin atomic
  delete from arbiter.observations o
   where o.protected_table = p_table
     and o.observation_id = any (array(
       select d.observation_id
         from arbiter.observations d
        where d.protected_table = p_table
          and d.observation_id <= (
            select k.observation_id
              from arbiter.observations k
             where k.protected_table = p_table
             order by k.observation_id desc
            offset 1000
             limit 1)
        order by d.observation_id
        limit 100
          for update skip locked));
end;
comment on function arbiter._trim_observations(regclass) is
  'Deletes up to 100 observations of a table that are older than its newest 1,000. Leaves those that another session has locked.';

create or replace function arbiter._observe(p_table regclass, p_code text, p_detail jsonb)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_serializable constant boolean := current_setting('transaction_isolation') = 'serializable';
begin
  -- At serializable the deletion would make transactions of others fail. So there the size of the file, with what is
  -- deleted and not vacuumed yet, bounds what is recorded: no transaction conflicts over it.
  if v_serializable and pg_relation_size('arbiter.observations') > 16 * 1024 * 1024 then
    return;
  end if;
  insert into arbiter.observations (observed_at, protected_table, code, detail, xid)
  values (clock_timestamp(), p_table, p_code, p_detail, pg_current_xact_id());
  if arbiter._sees_commits() then
    perform arbiter._trim_observations(p_table);
  elsif not v_serializable then
    begin
      perform arbiter._trim_observations(p_table);
    exception
      -- Another session has deleted since the snapshot. Observing must not fail a write.
      when serialization_failure then
        null;
    end;
  end if;
end
$$;
comment on function arbiter._observe(regclass, text, jsonb) is
  'Records a write that mode observe admits, and trims what is recorded. Never waits.';
