"""What protect() and register_machines() generate, in every configuration.

`golden/generated.txt` has one line per generated function of each configuration: a hash of its
definition without comments and white space.
"""

from __future__ import annotations

import hashlib
import re
from itertools import product
from pathlib import Path
from typing import Any

import psycopg
from conftest import Database

GOLDEN = Path(__file__).parent / "golden" / "generated.txt"

#: A name that needs quotes, and looks like a format's hole, a word and the end of a body.
ODD = "Mach in%s'e __id $function$"

TABLES = f"""
create table public.firms ("Own er" uuid, id uuid primary key);
create table public.desks (id uuid primary key, user_id uuid,
  "firm %s" uuid references public.firms (id));
create table public.plain_of (user_id uuid, desk_id uuid references public.desks (id),
  day date not null, source text not null default 'local', machine_id uuid, "{ODD}" uuid,
  arbiter_xid xid8);
create table public.parts_of (user_id uuid, desk_id uuid references public.desks (id),
  day date not null, source text not null default 'local', machine_id uuid, "{ODD}" uuid,
  arbiter_xid xid8) partition by range (day);
create table public.machines (key uuid primary key, "own'er" uuid, "st%s" text, beat timestamptz);
"""

CONFIGURATIONS = product(
    ("plain_of", "parts_of"),
    ("user_id", "desk_id.user_id", 'desk_id."firm %s"."Own er"'),
    ("{insert}", "{insert,update}"),
    ("machine_id", ODD),
    ("enforce", "observe"),
    ("reject", "allow"),
    (True, False),
)

DEFINITIONS = """
select p.proname, pg_get_functiondef(p.oid), p.prosecdef, p.proconfig::text
  from pg_proc p
 where p.pronamespace = 'arbiter'::regnamespace
   and p.proname ~ '^(_(guard|guard_row|provenance)_[0-9]+|tg_registry_(stamp|note|activate))$'
 order by 1
"""


def hashes(conn: psycopg.Connection[Any], title: str) -> list[str]:
    lines = []
    for name, definition, definer, config in conn.execute(DEFINITIONS).fetchall():
        body = re.sub(r"^.*?\$function\d*\$(.*)\$function\d*\$\s*$", r"\1", definition, flags=re.S)
        bare = re.sub(r"\s+", " ", re.sub(r"--[^\n]*", "", body))
        bare = re.sub(r" ?([(),;]) ?", r"\1", bare).strip()
        bare = re.sub(r"_path_\d+", "_path_N", re.sub(r"_admit\(\d+,", "_admit(N,", bare))
        bare = re.sub(r"_refuse\(\d+,", "_refuse(N,", bare)
        kind = re.sub(r"_\d+$", "", name)
        told = hashlib.md5(f"{definer} {config} {bare}".encode()).hexdigest()
        lines.append(f"{title} {kind} {told}")
    return lines


def test_what_is_generated_is_the_golden_text(db: Database) -> None:
    conn = db.connect()
    conn.execute("select arbiter.unprotect('public.signals')")
    conn.execute(TABLES.encode())
    lines = hashes(conn, "demo's registry:")
    conn.execute(
        "select arbiter.register_machines('public.machines', 'key', 'own''er', 'st%s', 'beat', "
        "jsonb_build_object('it''s %s __state', 'running', 'off', 'stopped'))"
    )
    lines += hashes(conn, "odd registry:")
    for table, path, verbs, machine, mode, unowned, evidence in CONFIGURATIONS:
        if table == "parts_of" and machine == ODD and mode == "observe":
            continue
        conn.execute(
            "select arbiter.protect(%s::regclass, %s, %s::text[], %s::name, %s, %s, %s)",
            (f"public.{table}", path, verbs, machine, mode, unowned, evidence),
        )
        title = f"{table} {path} {verbs} {machine} {mode} {unowned} evidence={evidence}:"
        lines += [line for line in hashes(conn, title) if "tg_registry" not in line]
        conn.execute("select arbiter.unprotect(%s::regclass)", (f"public.{table}",))
    actual = "\n".join(lines) + "\n"
    if not GOLDEN.exists():  # remove the file to make it anew
        GOLDEN.write_text(actual)
    assert actual == GOLDEN.read_text()
