-- Keeps the columns and what they hold: they are the app's record of who wrote what, and a later
-- install adopts them again. `arbiter-db uninstall --drop-columns` drops those that arbiter added.
-- The constraints go, because they are arbiter's alone.

set local lock_timeout = '5s';

alter table if exists public.signals
  drop constraint if exists arbiter_source_check,
  drop constraint if exists arbiter_machine_id_fkey;
