"""A database in which another role was first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from psycopg import sql

from .spy import MALLORY, SPY

if TYPE_CHECKING:
    from conftest import Database, Templates


@pytest.fixture
def hostile(templates: Templates) -> Iterator[Database]:
    """A database without the app's tables, in which mallory may create schemas and tables."""
    with templates.clone("bare") as database:
        admin = database.connect("postgres")
        admin.execute(
            sql.SQL("grant create on database {} to {}").format(
                sql.Identifier(database.name), sql.Identifier(MALLORY)
            )
        )
        admin.execute(f"grant create on schema public to {MALLORY}".encode())
        database.connect(MALLORY).execute(SPY.encode())
        yield database
