-- Changes to a trading database that speed the workload up, and do not affect who may write.

drop trigger signals_queue_webhook on public.signals;
drop index public.signals_created_at_idx;
drop index public.signals_symbol_idx;

-- A deleted machine is taken out of its signals by the foreign key, which would scan them all.
create index signals_machine_id_idx on public.signals (machine_id) where machine_id is not null;
