"""A login that makes functions of its own, and notes whether another role has run them."""

from __future__ import annotations

MALLORY = "authenticator"

#: Notes as whom it ran, also in a transaction that is rolled back.
SPY = """
create schema lair;
create sequence lair.runs_of_others;
create function lair.spy(text) returns boolean language plpgsql as $$
begin
  if current_user <> 'authenticator' then
    perform nextval('lair.runs_of_others');
  end if;
  return true;
end
$$;
grant usage on schema lair to public;
grant usage on sequence lair.runs_of_others to public;
create function lair.tg_spy() returns trigger language plpgsql as $$
begin
  perform lair.spy('');
  return coalesce(new, old);
end
$$;
"""
RAN = "select is_called from lair.runs_of_others"
