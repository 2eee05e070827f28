-- name: load_probe
select * from public.cloud_machines where id = md5('machine' || :user::int)::uuid

-- name: load_status
select * from arbiter.status(md5('user' || :user::int)::uuid)

-- name: load_begin
begin

-- name: load_claims
-- As PostgREST opens every request.
select set_config('role', 'authenticated', true),
       set_config('request.jwt.claims',
         '{"role":"authenticated","sub":"' || md5('user' || :user::int)::uuid || '"}', true)

-- name: load_own_status
select * from arbiter.status()

-- name: load_commit
commit

-- name: history
-- Of one user whose machine holds at epoch 2: there and back again, %(handovers)s times, an even number.
insert into arbiter.handovers (
  user_id, epoch, from_holder, from_machine_id, to_holder, to_machine_id, reason,
  handed_over_at, xid, snapshot, exact, frontier, cluster)
select l.user_id,
       e,
       case e %% 2 when 0 then 'local' else 'cloud' end,
       case e %% 2 when 1 then l.machine_id end,
       case e %% 2 when 0 then 'cloud' else 'local' end,
       case e %% 2 when 0 then l.machine_id end,
       case e %% 2 when 0 then 'activated' else 'machine_stopped' end,
       clock_timestamp(),
       pg_current_xact_id(),
       pg_current_snapshot(),
       true,
       pg_snapshot_xmax(pg_current_snapshot()),
       (select c.system_identifier from pg_control_system() as c)
  from arbiter.leases as l
 cross join lateral generate_series(l.epoch + 1, l.epoch + %(handovers)s) as e
 where l.user_id = md5('user' || %(user)s::int)::uuid::text;
update arbiter.leases set epoch = epoch + %(handovers)s
 where user_id = md5('user' || %(user)s::int)::uuid::text;
