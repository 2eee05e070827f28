-- A trading app's own schema, before arbiter, like that of production apps of this kind.
-- Run once, by the owner of the database (no superuser). The roles of roles.sql exist already.

-- Users ------------------------------------------------------------------------------------------

create schema auth;
grant usage on schema auth to anon, authenticated, service_role;

create table auth.users (
  id uuid not null default gen_random_uuid(),
  email text not null,
  created_at timestamptz not null default now(),
  constraint users_pkey primary key (id),
  constraint users_email_key unique (email)
);
grant all on auth.users to service_role;

-- The user of the request: the API puts the verified token's claims into this setting.
create function auth.uid()
returns uuid
language sql
stable
security invoker
as $$
  select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
$$;

-- Tables -----------------------------------------------------------------------------------------

-- A trader is a strategy. A built-in one has no user: a shared backend runs it for all users.
create table public.traders (
  id uuid not null default gen_random_uuid(),
  user_id uuid,
  name text not null,
  is_builtin boolean not null default false,
  created_at timestamptz not null default now(),
  constraint traders_pkey primary key (id),
  constraint traders_user_id_fkey foreign key (user_id) references auth.users (id) on delete cascade,
  constraint traders_owner_check check (is_builtin = (user_id is null))
);
create index traders_user_id_idx on public.traders (user_id);

-- One cloud machine per user; machine_id is the hosting provider's name for it.
create table public.cloud_machines (
  id uuid not null default gen_random_uuid(),
  user_id uuid not null,
  machine_id text,
  status text not null default 'provisioning',
  region text not null default 'fra',
  started_at timestamptz,
  stopped_at timestamptz,
  error_message text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint cloud_machines_pkey primary key (id),
  constraint cloud_machines_user_id_key unique (user_id),
  constraint cloud_machines_machine_id_key unique (machine_id),
  constraint cloud_machines_user_id_fkey
    foreign key (user_id) references auth.users (id) on delete cascade,
  constraint cloud_machines_status_check
    check (status in ('provisioning', 'starting', 'running', 'stopping', 'stopped', 'error'))
);
create index cloud_machines_status_idx on public.cloud_machines (status);

-- A trader's signals, at most one for a bar. The trader leads to the user.
create table public.signals (
  id uuid not null default gen_random_uuid(),
  trader_id uuid not null,
  symbol text not null,
  interval text not null,
  signal text not null,
  price numeric,
  bar_time timestamptz not null,
  created_at timestamptz not null default now(),
  constraint signals_pkey primary key (id),
  constraint signals_trader_id_fkey
    foreign key (trader_id) references public.traders (id) on delete cascade,
  constraint signals_bar_key unique (trader_id, symbol, interval, bar_time)
);
create index signals_created_at_idx on public.signals (created_at desc);
create index signals_symbol_idx on public.signals (symbol, interval);

create table public.positions (
  id uuid not null default gen_random_uuid(),
  user_id uuid not null,
  symbol text not null,
  quantity numeric not null default 0,
  entry_price numeric,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint positions_pkey primary key (id),
  constraint positions_user_id_fkey
    foreign key (user_id) references auth.users (id) on delete cascade,
  constraint positions_symbol_key unique (user_id, symbol)
);

-- HTTP calls that a background worker sends (Supabase has pg_net's net.http_request_queue).
create table public.webhook_queue (
  id bigint generated always as identity,
  url text not null,
  body jsonb not null,
  created_at timestamptz not null default now(),
  constraint webhook_queue_pkey primary key (id)
);

-- Triggers ---------------------------------------------------------------------------------------

create function public.tg_touch_updated_at()
returns trigger
language plpgsql
volatile
security invoker
set search_path = pg_catalog, pg_temp
as $$
begin
  new.updated_at := now();
  return new;
end
$$;

create trigger cloud_machines_touch_updated_at
  before update on public.cloud_machines
  for each row execute function public.tg_touch_updated_at();

create trigger positions_touch_updated_at
  before update on public.positions
  for each row execute function public.tg_touch_updated_at();

-- Definer: a browser may add a signal, but not queue HTTP calls of its own choice.
create function public.tg_queue_signal_webhook()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into public.webhook_queue (url, body)
  values (
    'https://hooks.example.com/signal',
    jsonb_build_object(
      'id', new.id, 'trader_id', new.trader_id, 'symbol', new.symbol, 'signal', new.signal
    )
  );
  return null;
end
$$;
revoke execute on function public.tg_queue_signal_webhook() from public;

create trigger signals_queue_webhook
  after insert on public.signals
  for each row execute function public.tg_queue_signal_webhook();

-- Privileges and row level security --------------------------------------------------------------

grant usage on schema public to anon, authenticated, service_role;
grant select, insert, update
  on public.traders, public.cloud_machines, public.signals, public.positions
  to authenticated;
grant select on public.traders, public.signals to anon;
-- Not `all`: a backend needs no TRIGGER on the table of machines (docs/operations.md, Doctor).
grant select, insert, update, delete, truncate on all tables in schema public to service_role;

alter table public.traders enable row level security;
alter table public.cloud_machines enable row level security;
alter table public.signals enable row level security;
alter table public.positions enable row level security;
alter table public.webhook_queue enable row level security;

create policy traders_read on public.traders
  for select to authenticated
  using (is_builtin or user_id = (select auth.uid()));
create policy traders_add on public.traders
  for insert to authenticated
  with check (user_id = (select auth.uid()));
create policy traders_change on public.traders
  for update to authenticated
  using (user_id = (select auth.uid()))
  with check (user_id = (select auth.uid()));

-- Machines are provisioned, started and stopped by the backend only.
create policy cloud_machines_read on public.cloud_machines
  for select to authenticated
  using (user_id = (select auth.uid()));

create policy signals_read on public.signals
  for select to authenticated
  using (
    exists (
      select
      from public.traders t
      where t.id = trader_id
        and (t.is_builtin or t.user_id = (select auth.uid()))
    )
  );
create policy signals_add on public.signals
  for insert to authenticated
  with check (
    exists (
      select
      from public.traders t
      where t.id = trader_id
        and t.user_id = (select auth.uid())
    )
  );
create policy signals_change on public.signals
  for update to authenticated
  using (
    exists (
      select
      from public.traders t
      where t.id = trader_id
        and t.user_id = (select auth.uid())
    )
  );

create policy positions_own on public.positions
  for all to authenticated
  using (user_id = (select auth.uid()))
  with check (user_id = (select auth.uid()));
