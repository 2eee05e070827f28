"""Named queries: `queries.sql` cut at its `-- name:` lines."""

from __future__ import annotations

import re
from importlib.resources import files

__all__ = ["QUERIES"]


def _load(text: str) -> dict[str, bytes]:
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError("two queries of one name in queries.sql")
    # Bytes, because psycopg takes text only as a literal: a guard against SQL built from strings.
    return {name: body.strip().encode() for name, body in zip(names, bodies, strict=True)}


QUERIES = _load((files(__package__) / "queries.sql").read_text(encoding="utf-8"))
"""Name of the query to its SQL."""
