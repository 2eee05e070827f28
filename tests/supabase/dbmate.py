"""dbmate, a migration tool for files in SQL.

It is the npm package's program for Linux, in the user's cache directory, into which this puts it
(nothing is downloaded otherwise)::

    PYTHONPATH=tests/supabase python -m dbmate fetch
"""

from __future__ import annotations

import sys

import click

from arbiter_db.demo.downloads import DownloadError, NpmFile

__all__ = ["DBMATE"]

DBMATE = NpmFile(
    "@dbmate/linux-x64",
    "2.36.0",
    "sha512-LdLpgyuluwJ93rWcvJjdlsjJ8rBeeAH52h3dSk0zAMaLrQn49dup1/o2tFpG1jM9f767HkuXdBrrjy6ZwG9BSg==",
    "bin/dbmate",
    "PYTHONPATH=tests/supabase python -m dbmate fetch",
)


@click.command()
@click.argument("command", type=click.Choice(["fetch"]))
def main(command: str) -> None:
    """Download dbmate for the tests."""
    try:
        DBMATE.fetch()
    except DownloadError as error:
        sys.exit(f"dbmate cannot be fetched: {error}")
    print(DBMATE.find())


if __name__ == "__main__":
    main()
