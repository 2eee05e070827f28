"""Named queries: SQL files cut at their `-- name:` lines, `queries.sql` above all."""

from __future__ import annotations

import re
from importlib.resources import files

__all__ = ["QUERIES", "cut"]


def cut(text: str) -> dict[str, bytes]:
    """The name of each query in that text to its SQL."""
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError("two queries have the same name")
    # Bytes, because psycopg takes text only as a literal: a guard against SQL built from strings.
    return {name: body.strip().encode() for name, body in zip(names, bodies, strict=True)}


QUERIES = cut((files(__package__) / "queries.sql").read_text(encoding="utf-8"))
"""Name of the query to its SQL."""
