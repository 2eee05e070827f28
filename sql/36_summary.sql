-- What an installation says at the end.

create or replace function arbiter._summary()
returns setof text
language sql
stable
set search_path = pg_catalog, pg_temp
begin atomic
  with
  registry (name) as (
    select r.registry from arbiter.registry r join pg_catalog.pg_class c on c.oid = r.registry
  ),
  protected as (
    select p.* from arbiter.protections p join pg_catalog.pg_class c on c.oid = p.protected_table
  ),
  lines (position, line) as (
    select 1, format('%s is the registry of machines', r.name) from registry r
    union all
    select 1, 'no table is the registry of machines, so cloud writes are rejected; next: arbiter-db register-machines TABLE'
     where not exists (select from registry)
    union all
    select 2, format('%s %s', p.protected_table,
                     arbiter._protection_text(p.mode, p.user_path, p.machine_column, p.unowned))
      from protected p
    union all
    select 2, 'no table is protected, so no write is rejected; next: arbiter-db install --plan, then arbiter-db protect TABLE'
     where not exists (select from protected)
    union all
    select 3, format('%s is only observed; next: look at arbiter.observations, then arbiter-db protect %s --mode enforce',
                     p.protected_table, arbiter._shell_word(p.protected_table))
      from protected p
     where p.mode = 'observe'
    union all
    select 4, 'next: arbiter-db doctor' where exists (select from protected)
  )
  select l.line from lines l order by l.position, l.line;
end;
comment on function arbiter._summary() is
  'The registry, the protected tables with their options, and what to do next, a line each.';
