-- For the demo's page: the history of handovers in the schema that the API serves, with the rows that the reader
-- may see in arbiter.handovers.
create view public.handovers
with (security_invoker = true)
as
  select h.epoch, h.from_holder, h.to_holder, h.reason, h.handed_over_at
    from arbiter.handovers h;
grant select on public.handovers to authenticated;
comment on view public.handovers is 'The user''s handovers, for the demo.';
