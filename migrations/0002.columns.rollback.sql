-- Keeps the columns and their values: they are the app's record of who wrote what, and a later install adopts them
-- again. `arbiter-db uninstall --drop-columns` drops those that arbiter added.

set local lock_timeout = '5s';
