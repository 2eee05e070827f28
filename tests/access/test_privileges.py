"""Who has which privilege on arbiter's objects, compared with a golden file.

A line is an object; after it, for each role that may do anything, what it may. Columns are named
where a privilege does not cover the whole table. What each role can really do is tried in
test_matrix. When a change is wanted, review the difference; this writes the file anew::

    RENEW_GOLDEN=1 .venv/bin/python -m pytest tests/access/test_privileges.py -k reviewed
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from story import rows

if TYPE_CHECKING:
    from conftest import Database

GOLDEN = Path(__file__).parent / "golden" / "privileges.txt"

#: The role stranger has no grants of its own, so it shows what PUBLIC may do.
ROLES = ["stranger", "anon", "authenticated", "service_role"]

RELATIONS = """
select c.oid::regclass::text as object, r.role, string_agg(p.privilege, ', ' order by p.privilege)
  from pg_class c
  cross join unnest(%s::text[]) as r (role)
  cross join lateral (
    select v.privilege
      from unnest('{select,insert,update,delete,truncate,references,trigger}'::text[])
           as v (privilege)
     where has_table_privilege(r.role, c.oid, v.privilege)
    union all
    select format('%%s (%%s)', v.privilege, string_agg(a.attname, ', ' order by a.attnum))
      from unnest('{select,insert,update,references}'::text[]) as v (privilege)
      join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
     where not has_table_privilege(r.role, c.oid, v.privilege)
       and has_column_privilege(r.role, c.oid, a.attnum, v.privilege)
     group by v.privilege
  ) as p
 where c.relnamespace = 'arbiter'::regnamespace and c.relkind in ('r', 'v', 'p')
 group by 1, 2
"""

SEQUENCES = """
select c.oid::regclass::text, r.role, string_agg(p.privilege, ', ' order by p.privilege)
  from pg_class c
  cross join unnest(%s::text[]) as r (role)
  cross join unnest('{usage,select,update}'::text[]) as p (privilege)
 where c.relnamespace = 'arbiter'::regnamespace
   and c.relkind = 'S'
   and has_sequence_privilege(r.role, c.oid, p.privilege)
 group by 1, 2
"""

FUNCTIONS = """
select p.oid::regprocedure::text, r.role,
       case when p.prosecdef then 'execute (definer)' else 'execute' end
  from pg_proc p
  cross join unnest(%s::text[]) as r (role)
 where (p.pronamespace = 'arbiter'::regnamespace
        or p.oid in (select e.function_name from arbiter._exposed() e))
   and has_function_privilege(r.role, p.oid, 'execute')
"""

SCHEMA = """
select 'schema ' || n.nspname, r.role, string_agg(p.privilege, ', ' order by p.privilege)
  from pg_namespace n
  cross join unnest(%s::text[]) as r (role)
  cross join unnest('{usage,create}'::text[]) as p (privilege)
 where n.nspname = 'arbiter' and has_schema_privilege(r.role, n.oid, p.privilege)
 group by 1, 2
"""

POLICIES = """
select format('policy %%I on %%s', p.polname, p.polrelid::regclass),
       string_agg(r.rolname, ' and ' order by r.rolname),
       concat_ws(', ', case when p.polpermissive then 'permissive' else 'restrictive' end,
         case p.polcmd when '*' then 'all' when 'r' then 'select' when 'a' then 'insert'
                       when 'w' then 'update' else 'delete' end,
         'using ' || pg_get_expr(p.polqual, p.polrelid),
         'with check ' || pg_get_expr(p.polwithcheck, p.polrelid))
  from pg_policy p
  join pg_roles r on r.oid = any (p.polroles)
 where p.polname like 'arbiter%%' and %s::text[] is not null
 group by p.oid, p.polname, p.polrelid, p.polpermissive, p.polcmd, p.polqual, p.polwithcheck
"""


@pytest.fixture
def stranger(db: Database) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """The superuser's connection to a database with the role stranger and exposed functions."""
    conn = db.connect("postgres")
    conn.execute("create role stranger")
    db.connect().execute("select arbiter.expose()")
    yield conn
    conn.execute("drop owned by stranger; drop role stranger")


def matrix(conn: psycopg.Connection[tuple[object, ...]]) -> str:
    """The matrix as the golden file has it."""
    lines: dict[str, list[str]] = {}
    for query in (SCHEMA, RELATIONS, SEQUENCES, FUNCTIONS, POLICIES):
        for name, role, what in sorted(rows(conn, query, ROLES)):
            lines.setdefault(name, []).append(f"  {role}: {' '.join(what.split())}")
    return "".join(f"{name}\n" + "".join(f"{line}\n" for line in of) for name, of in lines.items())


def test_every_privilege_is_the_one_that_was_reviewed(
    stranger: psycopg.Connection[tuple[object, ...]],
) -> None:
    """Nothing is open that the golden file does not say, and nothing of it is closed."""
    found = matrix(stranger)
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/security.md", "sql/42_privileges.sql"])
def test_every_definer_function_has_its_reason(
    stranger: psycopg.Connection[tuple[object, ...]], page: str
) -> None:
    """In two lists, which name those of a table by its N; and no other function is there."""
    found = rows(
        stranger,
        "select distinct regexp_replace(proname, '_[0-9]+$', '_N') as name from pg_proc"
        " where pronamespace = 'arbiter'::regnamespace and prosecdef",
    )
    text = (REPOSITORY / page).read_text("utf-8")
    if page.endswith(".md"):
        (table,) = re.findall(r"\| function \| why \|\n((?:\|.*\n)+)", text)
        named = re.findall(r"`([a-z_]+N?)`", "".join(re.findall(r"(?m)^\|[^|]*", table)))
    else:
        lines = re.findall(r"(?m)^--   (\S.*)$", text)
        named = re.findall(r"\w+", " ".join(re.split(r"  +|,$", line)[0] for line in lines))
    assert sorted(set(named)) == sorted({row.name for row in found} | {"_guard_row_N"})


@pytest.mark.parametrize(
    "statement",
    [
        "grant select on arbiter.leases to anon",
        "grant execute on function arbiter.protect to authenticated",
        "grant update (heartbeat_timeout) on arbiter.settings to stranger",
        "alter policy arbiter_claim on public.signals with check (true)",
        "drop policy arbiter_registry_update on public.cloud_machines",
        "grant usage on sequence arbiter.protections_protection_id_seq to service_role",
        "grant create on schema arbiter to authenticated",
    ],
)
def test_the_matrix_sees_what_was_opened_by_hand(
    stranger: psycopg.Connection[tuple[object, ...]], statement: str
) -> None:
    """The twin of the test above: each of these makes it fail."""
    with stranger.transaction(force_rollback=True):
        stranger.execute(statement.encode())
        assert matrix(stranger) != GOLDEN.read_text(encoding="utf-8")
