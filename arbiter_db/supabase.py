"""Migration files for the Supabase CLI: what `install` runs, as `<number>_name.sql`.

The CLI runs each file in one transaction, and takes every `<digits>_<name>.sql` for a migration:
rollbacks have no place there. It orders them by the digits as text, and rejects one that comes
before another that a database has already.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from psycopg.sql import Literal

from ._version import __version__
from .adoption import Adoption
from .errors import InstallError
from .install import migration_texts

__all__ = ["export"]

_NAME = re.compile(r"([0-9]+)_.*\.sql")
_STAMP = "%Y%m%d%H%M%S"


def export(
    directory: Path,
    *,
    expose: str | None = None,
    adoption: Adoption | None = None,
    only_plan: bool = False,
) -> list[Path]:
    """Write migration files into a Supabase project's `supabase/migrations`.

    Two of them, since the statements that read whole tables belong into a transaction of their
    own. Their numbers come after the newest one there: timestamps, or the next two numbers where
    the project counts. Nothing is written when the newest export there is of the same content;
    after an upgrade of the package, or with other options, two more files are: both can run on a
    database that has an older version already. Options that an export leaves out stay as an
    earlier one has set them.

    `expose` names a schema of the API, such as `public`: a browser's calls are created there
    (`arbiter.expose`). `adoption` says which tables the migration adopts, as of `install`. Returns
    the files written, or with `only_plan` those that would be. Raises `InstallError`, with none
    written, when the directory is missing or cannot be written to.
    """
    if not directory.is_dir():
        raise InstallError(
            f"{directory} is not a directory",
            hint="Name the project's supabase/migrations; `supabase init` makes a project.",
        )
    base = "".join(migration_texts(None))
    mark = f"-- arbiter {__version__}, export {sha256(base.encode()).hexdigest()}."
    change, finish = migration_texts(adoption)
    options = json.loads((adoption or Adoption()).as_json())
    if expose is not None:
        change += f"\nselect arbiter.expose({Literal(expose).as_string()});\n"
        options["expose"] = expose
    if options:
        mark += f"\n-- Options: {json.dumps(options)}"

    present = {
        path: match[1]
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_file()
    }
    exported = sorted(
        (path for path in present if path.name.endswith("_arbiter_finish.sql")),
        key=lambda path: present[path],
    )
    marks = [path.read_text(encoding="utf-8") for path in exported]
    if marks and mark.split("\n")[0] in marks[-1] and any(f"{mark}\n" in text for text in marks):
        return []

    first, second = _numbers_after(max(present.values(), default=""))
    texts = {
        f"{first}_arbiter.sql": (
            f"{mark}\n-- Leave it as it is: `arbiter-db supabase export` adds what comes later.\n\n"
            f"{change}"
        ),
        f"{second}_arbiter_finish.sql": (
            f"{mark}\n-- Reads whole tables, so it is a migration of its own.\n\n{finish}"
        ),
    }
    if only_plan:
        return [directory / name for name in texts]
    return _write(directory, texts)


def _numbers_after(newest: str) -> tuple[str, str]:
    """The two numbers after that one, or timestamps where there is none or it is one.

    By text, as the CLI orders them. A timestamp is not in the past.
    """
    if newest and len(newest) != len("YYYYMMDDHHMMSS"):
        first, second = (str(int(newest) + n).zfill(len(newest)) for n in (1, 2))
        if len(second) > len(newest):
            raise InstallError(
                f"no two numbers of the same length come after the newest migration's, {newest}",
                hint="The CLI orders by that number as text: give the files longer numbers.",
            )
        return first, second
    step = timedelta(seconds=1)
    instant = datetime.now(UTC)
    try:
        if f"{instant:{_STAMP}}" <= newest:
            instant = datetime.fromisoformat(f"{newest[:8]}T{newest[8:]}") + step
        return f"{instant:{_STAMP}}", f"{instant + step:{_STAMP}}"
    except (ValueError, OverflowError) as error:
        raise InstallError(
            f"no date comes after the newest migration's number, {newest}",
            hint="The CLI orders by that number as text: rename it to <YYYYMMDDHHMMSS>_name.sql.",
        ) from error


def _write(directory: Path, texts: dict[str, str]) -> list[Path]:
    """All or none, each under its name only when it is complete."""
    written: list[Path] = []
    try:
        for name, text in texts.items():
            path = directory / name
            scratch = directory / f".{name}.part"
            try:
                scratch.write_text(text, encoding="utf-8")
                scratch.rename(path)
            finally:
                scratch.unlink(missing_ok=True)
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink()
        raise InstallError(f"cannot write to {directory}: {error.strerror}") from error
    return written
