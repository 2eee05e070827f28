-- The schema of arbiter and its tables.
--
--   settings        one row: the periods of the decision tables
--   registry        one row: which table of the app lists the machines, and how to read it
--   machines        a view of that table under fixed names
--   machine_notes   when the database saw a machine leave `running` or enter `error`
--   leases          one row per user: who may write now; its epoch is the fencing token
--   handovers       every change of a lease's holder, append-only
--   protections     the protected tables and how each is arbitrated
--   attachments     what arbiter has attached or added to tables: triggers, columns, constraints, indexes, policies
--   observations    what `observe` admitted and `enforce` would have rejected
--   amendments      which transactions of the owner have corrected who wrote rows
--   client_roles    roles that are clients besides those of Supabase
--
-- Every statement can run twice: the migration tool marks a migration as applied in a second
-- transaction, so a crash in between repeats it.

set local lock_timeout = '5s';

-- Not `if not exists`: that needs the right to create schemas even where a DBA has made this one.
do $schema$
begin
  if to_regnamespace('arbiter') is null then
    create schema arbiter;
  end if;
end
$schema$;

comment on schema arbiter is
  'Per user, browser xor cloud: decided in the transaction of each write.';

do $types$
begin
  if to_regtype('arbiter.machine') is null then
    create type arbiter.machine as (
      machine_id text collate "C",
      user_id text collate "C",
      state text,
      heartbeat_at timestamptz,
      left_running_at timestamptz,
      entered_error_at timestamptz
    );
  end if;
  if to_regtype('arbiter.verdict') is null then
    create type arbiter.verdict as (
      code text,
      takeover text,
      retry_at timestamptz
    );
  end if;
  if to_regtype('arbiter.error') is null then
    create type arbiter.error as (
      sqlstate text,
      message text,
      detail text,
      hint text
    );
  end if;
  if to_regtype('arbiter.execution_status') is null then
    create type arbiter.execution_status as (
      environment text,
      can_write_local boolean,
      enforced boolean,
      code text,
      message text,
      retry_at timestamptz,
      machine_id text collate "C",
      machine_state text,
      heartbeat_age interval,
      epoch bigint,
      draining boolean,
      as_of timestamptz,
      poll_interval interval
    );
  end if;
  if to_regtype('arbiter.audit_finding') is null then
    create type arbiter.audit_finding as (
      finding text,
      reason text,
      user_id text collate "C",
      row_table regclass,
      row_key jsonb,
      source text,
      machine_id text collate "C",
      xid xid8,
      epoch bigint,
      holder text,
      holder_machine_id text collate "C",
      row_count bigint
    );
  end if;
end
$types$;

create table if not exists arbiter.settings (
  singleton boolean not null default true,
  heartbeat_timeout interval not null default '30 seconds',
  stop_grace interval not null default '30 seconds',
  error_takeover_delay interval not null default '2 minutes',
  error_takeover_confirm boolean not null default true,
  drain_timeout interval not null default '2 seconds',
  heartbeat_interval interval not null default '10 seconds',
  poll_interval interval not null default '5 seconds',
  user_claim text not null default 'sub',
  constraint settings_pkey primary key (singleton),
  -- One row: a second set of rules would be a second judge.
  constraint settings_singleton_check check (singleton),
  -- 100 ms and up, so that tests can run in real time; a day is beyond any sane use.
  constraint settings_heartbeat_timeout_check
    check (heartbeat_timeout between interval '100 milliseconds' and interval '24 hours'),
  constraint settings_stop_grace_check
    check (stop_grace between interval '100 milliseconds' and interval '24 hours'),
  constraint settings_error_takeover_delay_check
    check (error_takeover_delay between interval '100 milliseconds' and interval '24 hours'),
  constraint settings_drain_timeout_check
    check (drain_timeout between interval '100 milliseconds' and interval '24 hours'),
  constraint settings_heartbeat_interval_check
    check (heartbeat_interval between interval '100 milliseconds' and interval '24 hours'),
  constraint settings_poll_interval_check
    check (poll_interval between interval '100 milliseconds' and interval '24 hours'),
  -- One lost heartbeat must not look like a dead machine.
  constraint settings_timeout_covers_two_heartbeats_check
    check (heartbeat_timeout >= 2 * heartbeat_interval),
  -- Names joined by dots; one with dots or spaces is in double quotes.
  constraint settings_user_claim_check
    check (user_claim ~ '^("[^"]+"|[^".[:space:]]+)([.]("[^"]+"|[^".[:space:]]+))*$' and length(user_claim) <= 200)
);

insert into arbiter.settings default values on conflict on constraint settings_pkey do nothing;

comment on table arbiter.settings is
  'One row: the periods by which arbiter decides, and who its users are. A change counts from the next decision on.';
comment on column arbiter.settings.singleton is 'Always true: there is one row.';
comment on column arbiter.settings.heartbeat_timeout is
  'A machine is fresh while its last heartbeat is younger than this.';
comment on column arbiter.settings.stop_grace is
  'How long local writes are rejected after a machine left running.';
comment on column arbiter.settings.error_takeover_delay is
  'How long after a machine''s error no takeover is possible, confirmed or not.';
comment on column arbiter.settings.error_takeover_confirm is
  'Whether a takeover after an error needs the user''s yes, arbiter.confirm_takeover().';
comment on column arbiter.settings.drain_timeout is
  'How long a write waits for the transactions of the other holder before WX007.';
comment on column arbiter.settings.heartbeat_interval is
  'Told to machines: how often to send a heartbeat. At most half of heartbeat_timeout.';
comment on column arbiter.settings.poll_interval is
  'Told to browsers: how often to ask arbiter.status().';
comment on column arbiter.settings.user_claim is
  'The claim of request.jwt.claims that names the session''s user: a name, or a path such as app_metadata.org_id.';

create table if not exists arbiter.registry (
  singleton boolean not null default true,
  registry regclass not null,
  declared_as text not null,
  id_column name not null,
  user_column name not null,
  status_column name not null,
  heartbeat_column name not null,
  states jsonb not null,
  machine_statuses text[] not null,
  health_column name,
  healthy text[],
  constraint registry_pkey primary key (singleton),
  constraint registry_singleton_check check (singleton),
  constraint registry_states_check check (jsonb_typeof(states) = 'object'),
  constraint registry_health_check check ((health_column is null) = (healthy is null))
);

comment on table arbiter.registry is
  'One row, written by arbiter.register_machines(): the app''s table of machines.';
comment on column arbiter.registry.singleton is 'Always true: there is one registry.';
comment on column arbiter.registry.registry is 'The app''s table of machines.';
comment on column arbiter.registry.declared_as is 'Its schema and name when it was registered, quoted as in SQL.';
comment on column arbiter.registry.id_column is 'Its key, which machine_id of protected rows names.';
comment on column arbiter.registry.user_column is 'Its column that names the owner.';
comment on column arbiter.registry.status_column is 'Its column with the status word.';
comment on column arbiter.registry.heartbeat_column is 'Its timestamptz column that arbiter stamps.';
comment on column arbiter.registry.states is
  'Status word to machine state (starting, running, stopping, stopped, error). An absent word means running.';
comment on column arbiter.registry.machine_statuses is 'The status words that a machine''s token may set.';
comment on column arbiter.registry.health_column is
  'Its column that says whether the machine is well, or null: then every heartbeat counts.';
comment on column arbiter.registry.healthy is 'The words of that column with which a heartbeat counts.';

-- The registry under fixed names. Until a table is registered there are no machines.
do $machines$
begin
  if to_regclass('arbiter.machines') is null then
    create view arbiter.machines as
      select null::text as machine_id, null::text as user_id, null::text as status, null::text as state,
             null::timestamptz as heartbeat_at
       where false;
  end if;
end
$machines$;

create table if not exists arbiter.machine_notes (
  user_id text collate "C" not null,
  machine_id text collate "C" not null,
  left_running_at timestamptz,
  entered_error_at timestamptz,
  constraint machine_notes_pkey primary key (user_id, machine_id)
);

comment on table arbiter.machine_notes is
  'When the database itself saw a machine change its state; the app''s own columns are not trusted.';
comment on column arbiter.machine_notes.user_id is 'The owner at that time: a machine that changes hands gets a second row.';
comment on column arbiter.machine_notes.machine_id is 'The machine''s id in the registry.';
comment on column arbiter.machine_notes.left_running_at is
  'When it left running, was deleted or changed its owner; null while it runs. Database clock.';
comment on column arbiter.machine_notes.entered_error_at is
  'When it entered error; null once it has run or was stopped after that. Database clock.';

create table if not exists arbiter.leases (
  user_id text collate "C" not null,
  epoch bigint not null,
  holder text not null,
  machine_id text collate "C",
  draining_to text collate "C",
  draining_since timestamptz,
  held_since timestamptz not null,
  claimant text collate "C" generated always as (case when draining_since is null then machine_id else draining_to end) stored,
  constraint leases_pkey primary key (user_id),
  -- Unique so that the epoch is a key column: a handover then conflicts with `for key share` on an
  -- older version of the row, also for a writer whose snapshot is older than the handover.
  constraint leases_user_id_epoch_key unique (user_id, epoch),
  constraint leases_epoch_check check (epoch > 0),
  constraint leases_holder_check check (holder in ('local', 'cloud')),
  constraint leases_machine_check check ((holder = 'cloud') = (machine_id is not null)),
  -- A drain leads to a machine, or away from one.
  constraint leases_draining_check check (
    case when draining_since is null then draining_to is null else draining_to is not null or holder = 'cloud' end),
  -- A lease does not drain to the machine that holds it.
  constraint leases_draining_elsewhere_check check (draining_to <> machine_id)
);

comment on table arbiter.leases is
  'One row per user: who may write now. Written only by arbiter; heartbeats never touch it.';
comment on column arbiter.leases.user_id is
  'The user whose strategy runs, by the text of the id, as in all tables of arbiter: a uuid in lower case.';
comment on column arbiter.leases.epoch is 'The fencing token: grows by one with every handover.';
comment on column arbiter.leases.holder is 'local (browser) or cloud (machine).';
comment on column arbiter.leases.machine_id is 'The machine that holds, when the holder is cloud.';
comment on column arbiter.leases.draining_to is
  'The machine that gets the lease once the writes in flight have ended; null while it drains to local.';
comment on column arbiter.leases.draining_since is
  'When a drain was marked: from then on the old holder''s writes are rejected. Null when no drain is under way. Database clock.';
comment on column arbiter.leases.held_since is 'When this epoch began. Database clock.';
comment on column arbiter.leases.claimant is
  'Whom the lease is for: the machine that holds it, or while it drains the one it drains to; null when that is local.';

create table if not exists arbiter.handovers (
  user_id text collate "C" not null,
  epoch bigint not null,
  from_holder text,
  from_machine_id text collate "C",
  to_holder text not null,
  to_machine_id text collate "C",
  reason text not null,
  handed_over_at timestamptz not null,
  xid xid8 not null,
  snapshot pg_snapshot not null,
  exact boolean not null,
  frontier xid8 not null,
  cluster bigint not null,
  constraint handovers_pkey primary key (user_id, epoch),
  constraint handovers_first_epoch_check check ((epoch = 1) = (from_holder is null)),
  constraint handovers_from_check
    check (coalesce(from_holder, 'local') in ('local', 'cloud')
       and (from_holder is not distinct from 'cloud') = (from_machine_id is not null)),
  constraint handovers_to_check
    check (to_holder in ('local', 'cloud') and (to_holder = 'cloud') = (to_machine_id is not null)),
  -- Each reason leads one way.
  constraint handovers_reason_check check (
    case reason
      when 'first_write' then epoch = 1 and to_holder = 'local'
      when 'registered' then epoch = 1 and to_holder = 'local'
      when 'activated' then to_holder = 'cloud'
      when 'heartbeat_lapsed' then from_holder = 'cloud' and to_holder = 'local'
      when 'stop_stalled' then from_holder = 'cloud' and to_holder = 'local'
      when 'machine_stopped' then from_holder = 'cloud' and to_holder = 'local'
      when 'confirmed' then from_holder = 'cloud' and to_holder = 'local'
      when 'error_elapsed' then from_holder = 'cloud' and to_holder = 'local'
      else false
    end)
);

comment on table arbiter.handovers is
  'Every change of a lease''s holder, append-only (WX008). Epoch 1 is the lease''s creation.';
comment on column arbiter.handovers.user_id is 'The user whose lease changed hands.';
comment on column arbiter.handovers.epoch is 'The epoch that this handover began.';
comment on column arbiter.handovers.from_holder is 'The holder until then; null for the first epoch.';
comment on column arbiter.handovers.from_machine_id is 'Its machine, when it was cloud.';
comment on column arbiter.handovers.to_holder is 'The holder from then on.';
comment on column arbiter.handovers.to_machine_id is 'Its machine, when it is cloud.';
comment on column arbiter.handovers.reason is
  'first_write, registered (the lease''s creation), activated (to the cloud), heartbeat_lapsed, stop_stalled, machine_stopped, confirmed, error_elapsed (takeovers).';
comment on column arbiter.handovers.handed_over_at is 'For people; the proof uses xid and snapshot. Database clock.';
comment on column arbiter.handovers.xid is 'The transaction that made the handover.';
comment on column arbiter.handovers.snapshot is
  'pg_current_snapshot() under the exclusive lock: a row whose arbiter_xid is visible in it was written before.';
comment on column arbiter.handovers.exact is
  'False when made at repeatable read or above: the snapshot is then older than the lock.';
comment on column arbiter.handovers.frontier is
  'A transaction id that was not in use yet under the lock: a row whose arbiter_xid is not smaller was written after.';
comment on column arbiter.handovers.cluster is
  'system_identifier of the cluster that counted these transaction ids; a restored dump brings those of another.';

create table if not exists arbiter.protections (
  protection_id integer not null generated by default as identity,
  protected_table regclass not null,
  declared_as text not null,
  user_path text not null,
  verbs text[] not null,
  machine_column name not null,
  mode text not null,
  mode_since timestamptz not null default clock_timestamp(),
  unowned text not null,
  evidence boolean not null,
  constraint protections_pkey primary key (protection_id),
  constraint protections_protected_table_key unique (protected_table),
  constraint protections_verbs_check check (verbs in ('{insert}', '{insert,update}')),
  constraint protections_mode_check check (mode in ('enforce', 'observe')),
  constraint protections_unowned_check check (unowned in ('reject', 'allow'))
);

comment on table arbiter.protections is 'The protected tables, written by arbiter.protect().';
comment on column arbiter.protections.protection_id is 'Names the generated functions of the table.';
comment on column arbiter.protections.protected_table is 'The table whose writes are arbitrated.';
comment on column arbiter.protections.declared_as is
  'Its schema and name when protect() was called, quoted as in SQL. A table of this name that is another one is not guarded.';
comment on column arbiter.protections.user_path is
  'How a row leads to its user: a column, or columns over foreign keys joined by dots; or several ways, with commas, which must agree.';
comment on column arbiter.protections.verbs is
  '{insert}: provenance is immutable afterwards, and updates, also of an upsert, are not arbitrated. {insert,update}: each write says who writes.';
comment on column arbiter.protections.machine_column is 'The column that names the machine.';
comment on column arbiter.protections.mode is 'enforce rejects; observe admits and records.';
comment on column arbiter.protections.mode_since is 'When it got this mode. Database clock.';
comment on column arbiter.protections.unowned is 'Rows whose user is null: reject, or allow from others than clients.';
comment on column arbiter.protections.evidence is 'Whether rows carry arbiter_xid, checked by the guard.';

create table if not exists arbiter.attachments (
  kind text not null,
  attached_to regclass not null,
  name text not null,
  shape text not null,
  object_id oid not null,
  database_id oid not null,
  cluster bigint not null,
  constraint attachments_pkey primary key (kind, attached_to, name),
  constraint attachments_kind_check
    check (kind in ('trigger', 'column', 'constraint', 'index', 'policy', 'function')),
  -- A function of expose() belongs to no table.
  constraint attachments_attached_to_check check ((kind = 'function') = (attached_to = '-'::regclass))
);

comment on table arbiter.attachments is
  'What arbiter has attached or added to tables, and the functions of arbiter.expose(). What is not listed here belongs to the app: neither a name nor a comment counts.';
comment on column arbiter.attachments.kind is 'trigger, column, constraint, index, policy or function.';
comment on column arbiter.attachments.attached_to is 'The table; - for a function.';
comment on column arbiter.attachments.name is 'The object''s name; of a function, its schema, name and parameter types.';
comment on column arbiter.attachments.shape is
  'What the object is, in names and words: by this it is recognised in a database that has restored or copied this record.';
comment on column arbiter.attachments.object_id is
  'Its oid, of a column its number: by this it is recognised in the database that has recorded it.';
comment on column arbiter.attachments.database_id is 'The oid of the database that has recorded it.';
comment on column arbiter.attachments.cluster is 'The system_identifier of the cluster of that database.';

create table if not exists arbiter.observations (
  observation_id bigint not null generated always as identity,
  observed_at timestamptz not null,
  protected_table regclass not null,
  code text not null,
  detail jsonb not null,
  xid xid8 not null,
  -- In this order it also finds the newest of a table.
  constraint observations_pkey primary key (protected_table, observation_id)
);

comment on table arbiter.observations is
  'Writes that mode observe admitted and enforce would have rejected: of each table the newest 1,000.';
comment on column arbiter.observations.observation_id is 'Order of recording.';
comment on column arbiter.observations.observed_at is 'Database clock.';
comment on column arbiter.observations.protected_table is 'The table that was written.';
comment on column arbiter.observations.code is 'The code that the rejection would have had.';
comment on column arbiter.observations.detail is 'The DETAIL that the rejection would have had.';
comment on column arbiter.observations.xid is 'The transaction that wrote.';

create table if not exists arbiter.amendments (
  amendment_id bigint not null generated always as identity,
  protected_table regclass not null,
  reason text not null,
  amended_by name not null,
  amended_at timestamptz not null,
  xid xid8 not null,
  cluster bigint not null,
  constraint amendments_pkey primary key (xid, amendment_id)
);

comment on table arbiter.amendments is
  'Transactions in which the owner of a protected table has corrected who wrote its rows, by arbiter.amend(); append-only (WX008). A row that carries such a transaction in arbiter_xid is not provable.';
comment on column arbiter.amendments.amendment_id is 'Order of recording.';
comment on column arbiter.amendments.protected_table is 'The table whose rows were corrected.';
comment on column arbiter.amendments.reason is 'Why, in the owner''s words.';
comment on column arbiter.amendments.amended_by is 'The role that corrected them.';
comment on column arbiter.amendments.amended_at is 'When. Database clock.';
comment on column arbiter.amendments.xid is 'The transaction.';
comment on column arbiter.amendments.cluster is
  'system_identifier of the cluster that counted this transaction id; a restored dump brings that of another.';

create table if not exists arbiter.client_roles (
  role name not null,
  constraint client_roles_pkey primary key (role)
);

comment on table arbiter.client_roles is
  'Roles that the owner has named as clients, besides those of Supabase; written by arbiter.add_client_role().';
comment on column arbiter.client_roles.role is 'The name of the role. One that does not exist any more has no effect.';
