-- Adds the columns that public.cloud_machines and public.signals are missing, where these tables exist. Guard, policies
-- and constraints are attached by sql/99_adopt.sql, on every install.
--
-- Millions of rows are no obstacle: a constant default and nullable columns need no rewrite. Existing rows become
-- local; their arbiter_xid stays null, which means older than protection.
--
-- Calls functions of sql/00_basics.sql, which an install runs before any migration.

set local lock_timeout = '5s';

do $columns$
declare
  v_machines regclass := to_regclass('public.cloud_machines');
  v_signals regclass := to_regclass('public.signals');
begin
  perform arbiter._lock_tables(array_remove(array[v_signals, v_machines], null));
  if v_machines is not null then
    perform arbiter._add_column(v_machines, 'last_health_check', 'heartbeat');
  end if;
  if v_signals is not null then
    perform arbiter._add_column(v_signals, 'source', 'source');
    perform arbiter._add_column(v_signals, 'machine_id', 'machine');
    perform arbiter._add_column(v_signals, 'arbiter_xid', 'xid');
  end if;
end
$columns$;
