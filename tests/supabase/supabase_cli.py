"""The Supabase CLI, and a project for it to work in.

    project = Project(folder)
    project.add("20260101000000_app.sql", "create table ...")
    project.run(url, "db", "push")

It is the npm package's program for Linux, in the user's cache directory, into which this puts it
(nothing is downloaded otherwise)::

    PYTHONPATH=tests/supabase python -m supabase_cli fetch
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from arbiter_db.demo.downloads import DownloadError, NpmFile

__all__ = ["CLI", "Project", "SupabaseError", "fetch", "find"]

CLI = NpmFile(
    "@supabase/cli-linux-x64",
    "3.1.0",
    "sha512-67aBVJQ5psQZ5ezM/uby+xjKlF2Er1GLH9EtQWpUkuOpR3uI7fQjQt9fXTfV6/oqLJA3I+X8O5Fhz/pa8lAiqg==",
    "bin/supabase",
    "PYTHONPATH=tests/supabase python -m supabase_cli fetch",
)

#: How long a command may take. Its start alone takes seconds on a busy machine.
TIMEOUT_S = 60.0


class SupabaseError(Exception):
    """The CLI is missing, or it failed: then the message is all that it said."""


def find() -> Path:
    """Where the CLI is; SupabaseError when it is not on this machine."""
    try:
        return CLI.find()
    except DownloadError as error:
        raise SupabaseError(f"the Supabase CLI is missing: {error}") from error


def fetch() -> Path:
    """Make sure that the CLI is there, downloading it if it is not; SupabaseError if that fails."""
    try:
        CLI.fetch()
    except DownloadError as error:
        raise SupabaseError(f"the Supabase CLI cannot be fetched: {error}") from error
    return find()


class Project:
    """A folder with ``supabase/migrations`` in it, as ``supabase init`` makes it.

    What the CLI keeps about its user goes into the folder too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.migrations = folder / "supabase" / "migrations"
        self.migrations.mkdir(parents=True)

    def add(self, name: str, text: str) -> Path:
        """Write a migration."""
        path = self.migrations / name
        path.write_text(text, encoding="utf-8")
        return path

    def files(self) -> list[str]:
        """The names of all that lies beside the migrations, sorted."""
        return sorted(path.name for path in self.migrations.iterdir())

    def run(self, url: str, *command: str) -> str:
        """Run a command against the database of that URL.

        Returns what it printed on stdout. Raises SupabaseError when it fails.
        """
        with self.start(url, *command) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
        if process.returncode != 0:
            raise SupabaseError(err + out)
        return out

    def start(self, url: str, *command: str) -> subprocess.Popen[str]:
        """The same without waiting for its end."""
        return subprocess.Popen(
            [find(), *command, f"--remote={url}", "--yes", "--agent=no", "--workdir", self.folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(self.folder),
                "SUPABASE_NO_KEYRING": "1",
                "SUPABASE_NO_UPDATE_NOTIFIER": "1",
                "SUPABASE_TELEMETRY_DISABLED": "1",
            },
        )


@click.group(help="The Supabase CLI, for the tests.")
def _cli() -> None:
    pass


@_cli.command("fetch", help="Download it, unless it is on this machine already.")
def _fetch_command() -> None:
    try:
        click.echo(fetch())
    except SupabaseError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    _cli(prog_name="python -m supabase_cli")
