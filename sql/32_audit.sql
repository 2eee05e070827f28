-- audit(): proves exclusion again from the data alone: the arbiter_xid of the rows and the snapshots of the handovers.
-- It trusts neither the guard nor a clock.
--
-- A row was written after a handover if its transaction is the handover's own, or not visible in the handover's
-- snapshot; otherwise before. A user's handovers follow one another, so the epoch of a row is the last handover that it
-- was written after, and the holder of that epoch must have written the row.
--
-- Two binary searches in the sorted transaction ids of a user's handovers place nearly every row:
--
--   frontiers   a row with this id or a later one was written after
--   floors      a row with an earlier id was written before: the snapshot's xmin
--
-- The few rows between the two were in flight during a handover; for them the snapshots themselves are asked.
--
-- Not provable, which is reported and never counted as proved:
--
--   older_than_protection  the row has no arbiter_xid
--   unowned                the row has no user, so there is no lease that it was written under
--   machine_forgotten      cloud held and wrote, but the machine's row was deleted since, and with it the id in the
--                          row (on delete set null)
--   inexact_handover       written around a handover made at repeatable read or above, whose snapshot cannot tell
--                          before from after; right in one of the two cases
--   broken_history         the user's handovers contradict each other, which is a finding of its own
--   other_cluster          the transaction id, or the handover to compare it with, was counted by
--                          another cluster: this database was restored from a dump. A row is then judged only if
--                          its xmin shows that it was written here.

-- The migrations create the type; see _left_over() (40_left_over.sql).
comment on type arbiter.audit_finding is
  'What arbiter.audit() returns. finding: contradiction (a row, with its key, and who held its epoch), history (a flaw of a user''s handovers at an epoch) or not_provable (row_count rows, for one reason).';

-- A lease without any handover is reported as a missing epoch.
create or replace function arbiter._judged_handovers()
returns table (
  user_id text,
  epoch bigint,
  holder text,
  machine_id text,
  xid xid8,
  snapshot pg_snapshot,
  frontier xid8,
  is_ours boolean,
  flaw text)
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with here as materialized (
    select c.system_identifier as cluster, pg_snapshot_xmax(pg_current_snapshot()) as next_xid
      from pg_catalog.pg_control_system() c
  )
  select h.user_id, h.epoch, h.to_holder, h.to_machine_id, h.xid, h.snapshot, h.frontier,
         bool_and(h.cluster = here.cluster) over (w rows between current row and unbounded following),
         case
           when h.epoch = lag(h.epoch) over w then 'two_holders'
           when h.epoch <> coalesce(lag(h.epoch) over w, 0) + 1 then 'missing_epoch'
           when (h.from_holder, h.from_machine_id)
                is distinct from (lag(h.to_holder) over w, lag(h.to_machine_id) over w) then 'two_holders'
           when h.cluster = here.cluster and h.xid >= here.next_xid then 'out_of_order'
           -- In its own snapshot a transaction counts as one in progress.
           when h.xid < pg_snapshot_xmin(h.snapshot) then 'out_of_order'
           when h.cluster = lag(h.cluster) over w and (
             h.frontier < lag(h.frontier) over w
             or pg_snapshot_xmin(h.snapshot) < lag(pg_snapshot_xmin(h.snapshot)) over w
             or (h.xid <> lag(h.xid) over w and not pg_visible_in_snapshot(lag(h.xid) over w, h.snapshot)))
             then 'out_of_order'
           when lead(h.epoch) over w is null
            and (l.epoch, l.holder, l.machine_id) is distinct from (h.epoch, h.to_holder, h.to_machine_id)
             then 'lease_differs'
         end
    from arbiter.handovers h
   cross join here
    left join arbiter.leases l on l.user_id = h.user_id
  window w as (partition by h.user_id order by h.epoch)
  union all
  select l.user_id, l.epoch, l.holder, l.machine_id, null, null, null, false, 'missing_epoch'
    from arbiter.leases l
   where not exists (select from arbiter.handovers h where h.user_id = l.user_id);
end;
comment on function arbiter._judged_handovers() is
  'The handovers, each with its flaw when compared with the one before, and the last one with the lease; null when there is none. is_ours: this and all later ones of the user were counted by this cluster.';

create or replace function arbiter._audit_history()
returns setof arbiter.audit_finding
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  select 'history', j.flaw, j.user_id, null::regclass, null::jsonb, null, null::text,
         j.xid, j.epoch, j.holder, j.machine_id, null::bigint
    from arbiter._judged_handovers() j
   where j.flaw is not null
   order by j.user_id, j.epoch;
end;
comment on function arbiter._audit_history() is
  'The flaws of the handover history: missing_epoch, two_holders, out_of_order, lease_differs.';

-- For a row that the two searches do not place. Only around an inexact handover it may belong to several epochs.
create or replace function arbiter._judge_row(
  p_user_id text,
  p_source text,
  p_machine_id text,
  p_xid xid8,
  p_low bigint,
  p_high bigint,
  p_elsewhere bigint,
  p_was_counted_here boolean,
  p_is_broken boolean,
  p_has_two boolean,
  p_is_amended boolean)
returns arbiter.audit_finding
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_verdict arbiter.audit_finding;
  v_first bigint;
  v_last bigint;
  v_fits boolean;
begin
  v_verdict.finding := 'not_provable';
  if p_is_amended then
    v_verdict.reason := 'amended';
    return v_verdict;
  elsif p_user_id is null then
    v_verdict.reason := 'unowned';
    return v_verdict;
  elsif p_xid is null then
    v_verdict.reason := 'older_than_protection';
    return v_verdict;
  elsif not p_was_counted_here then
    v_verdict.reason := 'other_cluster';
    return v_verdict;
  elsif p_has_two then
    v_verdict := ('contradiction', 'two_users', p_user_id, null, null, p_source, p_machine_id, p_xid, null, null, null, null);
    return v_verdict;
  elsif p_is_broken then
    v_verdict.reason := 'broken_history';
    return v_verdict;
  end if;

  -- Written after the handovers up to p_low and before those beyond p_high; of the others, before the first one whose
  -- snapshot shows it.
  select coalesce(min(h.epoch) - 1, p_high)
    into v_last
    from arbiter.handovers h
   where h.user_id = p_user_id
     and h.epoch > p_low
     and h.epoch <= p_high
     and h.xid <> p_xid
     and pg_visible_in_snapshot(p_xid, h.snapshot);
  select coalesce(max(h.epoch), p_low)
    into v_first
    from arbiter.handovers h
   where h.user_id = p_user_id
     and h.epoch > p_low
     and h.epoch <= v_last
     and (h.exact or h.xid = p_xid);
  if v_first <= p_elsewhere and p_elsewhere > 0 then
    v_verdict.reason := 'other_cluster';
    return v_verdict;
  end if;

  v_fits := exists (
    select from arbiter.handovers h
     where h.user_id = p_user_id
       and h.epoch between v_first and v_last
       and h.to_holder = p_source
       and (h.to_machine_id is not distinct from p_machine_id
         or p_source = 'cloud' and p_machine_id is null));
  if v_fits and v_first < v_last then
    v_verdict.reason := 'inexact_handover';
    return v_verdict;
  elsif v_fits and p_source = 'cloud' and p_machine_id is null then
    v_verdict.reason := 'machine_forgotten';
    return v_verdict;
  elsif v_fits then
    return null;
  end if;

  v_verdict.finding := 'contradiction';
  v_verdict.user_id := p_user_id;
  v_verdict.source := p_source;
  v_verdict.machine_id := p_machine_id;
  v_verdict.xid := p_xid;
  v_verdict.epoch := v_last;
  select h.to_holder, h.to_machine_id
    into v_verdict.holder, v_verdict.holder_machine_id
    from arbiter.handovers h
   where h.user_id = p_user_id and h.epoch = v_last;
  v_verdict.reason := case
    when v_verdict.holder is null then 'no_lease'
    when v_verdict.holder = p_source then 'wrong_machine'
    else 'wrong_environment'
  end;
  return v_verdict;
end
$$;
comment on function arbiter._judge_row(text, text, text, xid8, bigint, bigint, bigint, boolean, boolean, boolean, boolean) is
  'What is wrong with a row, or why nothing can be proved about it; null when it is proved. p_low: the last handover that surely came before it; p_high: the last one that may have. p_has_two: its ways lead to different users. p_is_amended: its owner has corrected it, see amend().';

create or replace function arbiter._audit_step(p_block bigint, p_blocks bigint)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  raise notice 'arbiter: audited % of % blocks', p_block, p_blocks;
  return true;
end
$$;
comment on function arbiter._audit_step(bigint, bigint) is 'Tells the client how far an audit is; always true.';

-- Scans the table in steps of blocks, so that a long audit can report its progress. Joined along the path to the user,
-- and not by scalar subqueries as in the guard, because all rows are read.
create or replace function arbiter._audit_rows(p_protection arbiter.protections, p_verbose boolean)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_blocks_a_step constant bigint := 2048;
  v_number integer := 0;
  v_way record;
  v_value text;
  v_values text[] := '{}';
  v_joins text := '';
  v_blocks bigint;
  v_step text;
begin
  for v_way in
    select w.steps, cardinality(w.steps) as last, arbiter._id_class(e.end_table, e.end_column) as class
      from arbiter._ways(p_protection.user_path) w
      join arbiter._ends(p_protection.protected_table, p_protection.user_path) e on e.way = w.way
     order by w.way
  loop
    v_value := format('r.%I', v_way.steps[1]);
    for i in 1 .. v_way.last - 1 loop
      v_number := v_number + 1;
      v_joins := v_joins || format(' left join arbiter._path_%1$s_%2$s p%2$s on p%2$s.key = %3$s',
        p_protection.protection_id, v_number, v_value);
      v_value := format('p%s.value', v_number);
    end loop;
    v_values := v_values || arbiter._user_expression(v_way.class, v_value);
  end loop;
  select max(pg_relation_size(f.member)) / current_setting('block_size')::bigint
    into v_blocks
    from arbiter._family(p_protection.protected_table) as f (member);
  v_step := format($sql$
       select t.tableoid, t.ctid, t.xmin, t.*
         from %1$s t
        where t.ctid >= format('(%%s,0)', b.block)::tid
          -- The last step takes what was appended in the meantime.
          and t.ctid < case when b.block + %2$s > %3$s then '(4294967295,0)' else format('(%%s,0)', b.block + %2$s) end::tid
       -- Keeps the step a scan of its blocks.
       offset 0$sql$,
    p_protection.protected_table, v_blocks_a_step, v_blocks);
  return format('select r.tableoid, r.ctid, r.xmin, r.source::text as source, r.%I::text collate "C" as machine_id, r.arbiter_xid as xid, ',
      p_protection.machine_column)
    || format('coalesce(%s) as user_id, %s as has_two', array_to_string(v_values, ', '), arbiter._differ_expression(v_values))
    || format(' from generate_series(0, %s, %s) as b (block) cross join lateral (%s) as r ', v_blocks, v_blocks_a_step, v_step)
    || v_joins
    || case when p_verbose then format(' where arbiter._audit_step(b.block, %s)', v_blocks) else '' end;
end
$$;
comment on function arbiter._audit_rows(arbiter.protections, boolean) is
  'SQL for the rows of a protected table with their users; with p_verbose it reports its progress.';

-- With row security off a row that is hidden from the caller is an error, not a row that is skipped. Without nested
-- loops, because the planner knows neither the rows of a step nor the number of users, and after too low a guess went
-- through all users for each row. Without jit, because a nested loop that cannot be avoided then looks so expensive
-- that servers before 18 compile each step, which takes seconds.
create or replace function arbiter.audit(p_table regclass, p_verbose boolean default false)
returns setof arbiter.audit_finding
language plpgsql
set search_path = pg_catalog, pg_temp
set row_security = off
set enable_nestloop = off
set jit = off
as $$
declare
  v_protection arbiter.protections;
  v_key text;
begin
  select p.* into v_protection from arbiter.protections p where p.protected_table = p_table;
  if not found then
    perform arbiter._fail('undefined_object',
      format('table %s is not protected', coalesce(p_table::text, 'null')),
      'See arbiter.protections for the tables that are.');
  end if;
  if not v_protection.evidence then
    perform arbiter._fail('object_not_in_prerequisite_state',
      format('table %s is protected without evidence', p_table),
      'Its rows carry no arbiter_xid, so nothing can be proved from them; protect it with p_evidence => true.');
  end if;
  perform arbiter._need_provenance(p_table, v_protection.user_path, v_protection.machine_column, true);
  select 'jsonb_build_object(' || string_agg(format('%L, t.%I', a.attname, a.attname), ', ') || ')'
    into v_key
    from pg_catalog.pg_index i
   cross join lateral unnest(i.indkey::smallint[]) as k (attnum)
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
   where i.indrelid = p_table and i.indisprimary;

  return query select h.* from arbiter._audit_history() h;
  return query execute format($sql$
    with history as materialized (
      select j.* from arbiter._judged_handovers() j
    ), machines as materialized (
      -- Numbers, because an element of an array of texts is found by a walk.
      select m.machine_id, (row_number() over ())::integer as number
        from (select distinct h.machine_id from history h where h.machine_id is not null) m
    ), terms as materialized (
      select j.user_id,
             bool_or(j.flaw is not null) as is_broken,
             -- The number of handovers before those that this cluster counted.
             count(*) filter (where not j.is_ours) as elsewhere,
             array_agg(j.frontier order by j.epoch) filter (where j.is_ours) as frontiers,
             array_agg(pg_snapshot_xmin(j.snapshot) order by j.epoch) filter (where j.is_ours) as floors,
             -- 0 for local: without nulls, for the same reason.
             array_agg(coalesce(m.number, 0) order by j.epoch) filter (where j.is_ours) as holders
        from history j
        left join machines m on m.machine_id = j.machine_id
       group by j.user_id
    ), database as materialized (
      select pg_snapshot_xmax(pg_current_snapshot()) as next_xid,
             exists (select from terms t where t.elsewhere > 0) as is_restored
    ), placed as (
      -- Only the one holder that matters: the array of all, stored for each row, would fill the disk.
      select r.*, t.is_broken, coalesce(t.elsewhere, 0) as elsewhere, t.holders[i.low] as holder,
             case when r.machine_id is null then 0 else m.number end as writer,
             coalesce(t.elsewhere, 0) + i.low as low,
             coalesce(t.elsewhere, 0) + i.high as high,
             a.xid is not null as is_amended,
             r.xid < d.next_xid and (not d.is_restored or r.xid::xid = r.xmin) as was_counted_here
        from (%1$s) as r
        left join terms t on t.user_id = r.user_id
        left join machines m on m.machine_id = r.machine_id
        left join (select distinct x.xid from arbiter.amendments x where x.protected_table = %3$L::regclass) a on a.xid = r.xid
       cross join database d
       cross join lateral (
         select coalesce(width_bucket(r.xid, t.frontiers), 0) as low, coalesce(width_bucket(r.xid, t.floors), 0) as high) as i
    ), plain as (
      select p.*,
             coalesce(p.low = p.high
               and p.low > p.elsewhere
               and p.holder = p.writer
               and (p.source = 'cloud') = (p.machine_id is not null)
               and p.was_counted_here
               and not p.is_broken
               and not p.is_amended
               and not p.has_two, false) as is_plain
        from placed p
    ), judged as (
      select p.tableoid, p.ctid,
             case when not p.is_plain then arbiter._judge_row(p.user_id, p.source, p.machine_id, p.xid,
               p.low, p.high, p.elsewhere, p.was_counted_here, p.is_broken, p.has_two, p.is_amended) end as verdict
        from plain p
      offset 0
    ), counted as (
      -- Each contradiction has a row of its own; everything else is counted.
      select coalesce((j.verdict).finding, 'proved') as finding, j.verdict, k.tableoid, k.ctid, count(*) as row_count
        from judged j
       cross join lateral (select
         case when (j.verdict).finding = 'contradiction' then j.tableoid end as tableoid,
         case when (j.verdict).finding = 'contradiction' then j.ctid end as ctid) as k
       group by j.verdict, k.tableoid, k.ctid
    )
    select c.finding, (c.verdict).reason, (c.verdict).user_id, c.tableoid::regclass,
           (select %2$s from %3$s t where t.tableoid = c.tableoid and t.ctid = c.ctid),
           (c.verdict).source, (c.verdict).machine_id, (c.verdict).xid,
           (c.verdict).epoch, (c.verdict).holder, (c.verdict).holder_machine_id,
           case when c.finding <> 'contradiction' then c.row_count end
      from counted c
     where %4$L or c.finding <> 'proved'
     order by c.finding, (c.verdict).reason, (c.verdict).user_id, (c.verdict).xid
  $sql$,
    arbiter._audit_rows(v_protection, p_verbose),
    coalesce(v_key, 'jsonb_build_object(''ctid'', t.ctid)'),
    p_table,
    p_verbose);
end
$$;
comment on function arbiter.audit(regclass, boolean) is
  'What contradicts exclusion in a protected table, from its rows and the handovers alone: no row at all when everything is proved. finding contradiction: a row that the holder of its epoch did not write (wrong_environment, wrong_machine, no_lease, two_users). history: a flaw of the handovers (missing_epoch, two_holders, out_of_order, lease_differs). not_provable: rows counted by reason. p_verbose: also the number of rows that are proved, and notices of how far it is. Errors 42704 not protected, 55000 no evidence.';
