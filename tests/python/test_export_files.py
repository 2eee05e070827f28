"""The files that `arbiter_db.supabase.export` writes; tests/supabase/test_export.py has what the
Supabase CLI makes of them."""

from __future__ import annotations

import errno
import os
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import arbiter_db
from arbiter_db import InstallError
from arbiter_db.adoption import Adoption
from arbiter_db.install import migration_texts
from arbiter_db.supabase import export


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def number(path: Path) -> datetime:
    """The number in a file's name, which is an instant in UTC."""
    return datetime.strptime(path.name.partition("_")[0] + "+0000", "%Y%m%d%H%M%S%z")


def test_the_files_are_what_install_runs_below_a_mark(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    first, second = export(tmp_path)
    after = datetime.now(UTC)

    assert names(tmp_path) == [first.name, second.name]
    assert [re.sub(r"^\d{14}", "", path.name) for path in (first, second)] == [
        "_arbiter.sql",
        "_arbiter_finish.sql",
    ]
    assert before <= number(first) <= after
    assert number(second) == number(first) + timedelta(seconds=1)

    change, finish = migration_texts()
    digest = sha256((change + finish).encode()).hexdigest()
    mark = f"-- arbiter {arbiter_db.__version__}, export {digest}.\n"
    explained = first.read_text("utf-8").removesuffix(change)
    assert explained.startswith(mark)
    assert re.fullmatch(r"-- Leave it as it is: .*\n\n", explained.removeprefix(mark))
    explained = second.read_text("utf-8").removesuffix(finish)
    assert explained.startswith(mark)
    assert re.fullmatch(r"-- Reads whole tables, .*\n\n", explained.removeprefix(mark))


@pytest.mark.parametrize(
    ("schema", "literal"), [("public", "'public'"), ("o'api", "'o''api'"), ("", "''")]
)
def test_a_schema_of_the_api_is_exposed_at_the_end_of_the_first(
    tmp_path: Path, schema: str, literal: str
) -> None:
    first, second = export(tmp_path, expose=schema)
    change, finish = migration_texts()
    assert first.read_text("utf-8").endswith(f"{change}\nselect arbiter.expose({literal});\n")
    assert second.read_text("utf-8").endswith(f"\n\n{finish}")
    assert "arbiter.expose(" not in second.read_text("utf-8").removesuffix(finish)


@pytest.mark.parametrize(
    "newest", ["29990101000000_app.sql", "29990101000000_arbiter_finish.sql", "29990101000000_.sql"]
)
def test_they_come_right_after_a_number_in_the_future(tmp_path: Path, newest: str) -> None:
    (tmp_path / "20260101000000_app.sql").touch()
    (tmp_path / newest).touch()
    first, second = export(tmp_path)
    assert (first.name, second.name) == (
        "29990101000001_arbiter.sql",
        "29990101000002_arbiter_finish.sql",
    )


def test_a_folder_that_is_named_like_a_migration_is_none(tmp_path: Path) -> None:
    for name in ("29990101000000_app.sql", "20000101000000_arbiter_finish.sql"):
        (tmp_path / name).mkdir()
    first, _ = export(tmp_path)
    assert number(first).year < 2999


def test_now_counts_as_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 1, 5, 9, 20, 59, 900_000, tzinfo=UTC)

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            assert tz is UTC
            return now

    monkeypatch.setattr("arbiter_db.supabase.datetime", Fixed)
    (tmp_path / "20260105092059_app.sql").touch()
    first, second = export(tmp_path)
    assert (first.name[:14], second.name[:14]) == ("20260105092100", "20260105092101")
    assert [path.name[:14] for path in export(tmp_path, expose="a")] == [
        "20260105092102",
        "20260105092103",
    ]


def test_nothing_is_written_again_until_something_differs(tmp_path: Path) -> None:
    """What an export leaves out stays as an earlier one has set it."""
    plain = export(tmp_path)
    assert export(tmp_path) == []
    exposed = export(tmp_path, expose="public")
    assert len(exposed) == 2
    chosen = Adoption(mode="observe")
    observed = export(tmp_path, adoption=chosen)
    assert len(observed) == 2
    for _ in range(2):
        assert export(tmp_path, expose="public") == []
        assert export(tmp_path) == []
        assert export(tmp_path, adoption=chosen) == []
    assert len(export(tmp_path, expose="api")) == 2
    assert names(tmp_path)[:6] == [path.name for path in [*plain, *exposed, *observed]]
    options = [path.read_text("utf-8").split("\n")[1] for path in (*exposed, *observed)]
    assert options[::2] == options[1::2]
    assert options[::2] == ['-- Options: {"expose": "public"}', '-- Options: {"mode": "observe"}']


def test_a_newer_package_exports_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path, expose="public")
    monkeypatch.setattr("arbiter_db.supabase.__version__", "9.9.9")
    assert len(export(tmp_path)) == 2
    assert export(tmp_path) == []


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["001", "039"], ["040", "041"]),
        (["0001", "20240230"], ["20240231", "20240232"]),
        (["1", "7"], ["8", "9"]),
        (["000", "007"], ["008", "009"]),
    ],
)
def test_a_project_that_counts_gets_the_next_numbers(
    tmp_path: Path, there: list[str], expected: list[str]
) -> None:
    """A timestamp would come after all numbers that the project uses next."""
    for each in there:
        (tmp_path / f"{each}_app.sql").touch()
    first, second = export(tmp_path)
    assert (first.name, second.name) == (
        f"{expected[0]}_arbiter.sql",
        f"{expected[1]}_arbiter_finish.sql",
    )


@pytest.mark.parametrize("number", ["99", "98", "9"])
def test_a_count_that_is_at_its_end_is_named(tmp_path: Path, number: str) -> None:
    (tmp_path / f"{number}_last.sql").touch()
    with pytest.raises(InstallError, match=f"come after the newest migration's, {number}") as e:
        export(tmp_path)
    assert e.value.hint == ("The CLI orders by that number as text: give the files longer numbers.")
    assert len(names(tmp_path)) == 1


def test_an_export_of_which_the_second_file_is_gone_is_repeated(tmp_path: Path) -> None:
    _, second = export(tmp_path)
    second.unlink()
    assert len(export(tmp_path)) == 2


@pytest.mark.parametrize("name", ["30001399000000_a.sql", "99991231235959_a.sql"])
def test_a_number_that_nothing_can_come_after_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InstallError) as caught:
        export(tmp_path)
    digits = name.partition("_")[0]
    assert str(caught.value) == f"no date comes after the newest migration's number, {digits}"
    assert caught.value.hint is not None
    assert "rename it to <YYYYMMDDHHMMSS>_name.sql" in caught.value.hint
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("made", [False, True])
def test_a_directory_is_wanted(tmp_path: Path, made: bool) -> None:
    place = tmp_path / "migrations"
    if made:
        place.touch()
    with pytest.raises(InstallError) as caught:
        export(place)
    assert str(caught.value) == f"{place} is not a directory"
    assert caught.value.hint == (
        "Name the project's supabase/migrations; `supabase init` makes a project."
    )


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    count = 0
    write = Path.write_text

    def full(self: Path, *args: Any, **kw: Any) -> int:
        nonlocal count
        count += 1
        written = write(self, *args, **kw)
        if count == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InstallError) as caught:
        export(tmp_path)
    assert str(caught.value) == f"cannot write to {tmp_path}: No space left on device"
    assert names(tmp_path) == []
