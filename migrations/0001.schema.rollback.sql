-- Drops the schema's tables and types with the handover history. The schema itself stays: the migration
-- tool keeps its own tables in it.

set local lock_timeout = '5s';

drop view if exists arbiter.machines;

drop table if exists
  arbiter.client_roles, arbiter.amendments, arbiter.observations, arbiter.attachments, arbiter.protections,
  arbiter.handovers, arbiter.leases, arbiter.machine_notes, arbiter.registry, arbiter.settings
  cascade;

drop type if exists
  arbiter.audit_finding, arbiter.execution_status, arbiter.error, arbiter.verdict, arbiter.machine
  cascade;
