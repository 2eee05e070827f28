"""The release: the wheel and the source archive have all files, and the wheel installs the same
into a database as the repository does."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import psycopg
import pytest
from catalog import assert_same, schema
from conftest import Database
from markdown_it import MarkdownIt

import arbiter_db

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
VERSION = arbiter_db.__version__


def files(*folders: str) -> set[str]:
    """The files of folders of the repository, but for what tools leave there."""
    found = (path for folder in folders for path in (REPOSITORY / folder).rglob("*"))
    return {
        str(path.relative_to(REPOSITORY))
        for path in found
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both archives. `build` makes the wheel from the source archive, not from the
    repository, so all that the wheel has is in the other one too."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [found] = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a virtual environment that has arbiter from the wheel.

    The libraries that it needs come from the environment that runs the tests, by a .pth file, so
    that no test needs a network. The .pth file of this repository's own editable install lies in
    one of those folders, where Python does not look for such files.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    [packages] = home.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check",
         "install", "--no-deps", "--no-index", "--ignore-installed", wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "bin"


def run(clean: Path, *command: str, **environment: str) -> str:
    """Run a program of the clean environment in a folder where nothing lies."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PG"))}
    done = subprocess.run(
        [clean / command[0], *command[1:]],
        cwd=clean.parent,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reach(db: Database) -> dict[str, str]:
    """How libpq reaches that database, by environment variables."""
    info = psycopg.conninfo.conninfo_to_dict(db.conninfo())
    names = {"host": "PGHOST", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER"}
    return {name: str(info[key]) for key, name in names.items()}


# -- what is in them ------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_its_sql(wheel: Path) -> None:
    assert wheel.name == f"arbiter_db-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        meta = f"arbiter_db-{VERSION}.dist-info/"
        ours = {name for name in names if not name.startswith(meta)}
        expected = files("arbiter_db") | {f"arbiter_db/{n}" for n in files("migrations", "sql")}
        assert ours == expected
        assert {
            "arbiter_db/py.typed",
            "arbiter_db/queries.sql",
            "arbiter_db/demo/trading.sql",
            "arbiter_db/migrations/0001.schema.sql",
            "arbiter_db/migrations/0001.schema.rollback.sql",
            "arbiter_db/sql/01_basics.sql",
        } <= ours
        for name in ours:
            source = name if (REPOSITORY / name).exists() else name.removeprefix("arbiter_db/")
            assert archive.read(name) == (REPOSITORY / source).read_bytes(), name
        assert meta + "licenses/LICENSE" in names
        described = email.message_from_bytes(archive.read(meta + "METADATA"))
        assert (described["Name"], described["Version"]) == ("arbiter-db", VERSION)
        assert described["License-Expression"] == "PostgreSQL"
        programs = archive.read(meta + "entry_points.txt").decode()
        assert "arbiter-db = arbiter_db.cli:main" in programs


def test_the_source_archive_holds_what_it_takes_to_test(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    top = f"arbiter_db-{VERSION}"
    assert path.name == f"{top}.tar.gz"
    with tarfile.open(path) as archive:
        names = {
            name.removeprefix(f"{top}/")
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    folders = {"arbiter_db", "migrations", "sql", "docs", "tests", ".ci"}
    expected = files(*folders)
    assert {"tests/life/test_package.py", "tests/conftest.py", ".ci/run"} <= expected
    assert {name for name in names if name.split("/")[0] in folders} == expected
    others = {name for name in names if name.split("/")[0] not in folders}
    wanted = {
        "Makefile",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
    }
    assert wanted <= others
    assert others - wanted <= {".gitignore", "PKG-INFO"}, "what hatchling adds by itself"


# -- the page of the package ----------------------------------------------------------------------


def targets(text: str) -> list[str]:
    """What a page in Markdown links to or shows."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or ():
            found += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
            found += re.findall(r'(?:src|srcset|href)="([^"]*)"', child.content)
        if token.type == "html_block":
            found += re.findall(r'(?:src|srcset|href)="([^"]*)"', token.content)
    return found


def test_the_page_of_the_package_has_no_dead_links(dist: Path, wheel: Path) -> None:
    """Nothing relative: the page does not lie beside docs/."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert {"docs/reference.md", "docs/lease-light.svg"} <= set(targets(readme))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"arbiter_db-{VERSION}.dist-info/METADATA")
    described = email.message_from_bytes(metadata)
    assert described["Description-Content-Type"] == "text/markdown"
    page = described.get_payload(decode=True).decode()  # type: ignore[union-attr]
    assert [target for target in targets(page) if not target.startswith("https://")] == []
    [alt] = re.findall(r'<img alt="([^"]*)"', readme)
    assert f"\n*{alt}*\n" in page
    assert "docs/operations.md (docs/operations.md#limits) has the limits" in page
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as source:
        info = source.extractfile(f"arbiter_db-{VERSION}/PKG-INFO")
        assert info is not None
        assert info.read() == metadata


def test_links_are_complete_once_there_is_an_address() -> None:
    """pyproject.toml says what to replace by what then."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    advice = re.findall(r"^#   '(.*?)' +by '(.*)'$", text, re.MULTILINE)
    hook = tomllib.loads(text)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    picture, _, link = hook["substitutions"]
    assert [old for old, _ in advice] == [picture["replacement"], link["replacement"]]
    readme = page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for substitution, (_, new) in zip((picture, link), advice, strict=True):
        page = re.sub(substitution["pattern"], new, page)
    base = r"https://ADDRESS/(?:blob|raw)/main/"
    assert [target for target in targets(page) if not re.match(base, target)] == []
    completed = [re.sub(base, "", target) for target in targets(page)]
    assert completed == [name for name in targets(readme) if name != "docs/lease-dark.svg"]


# -- what the wheel does --------------------------------------------------------------------------


def test_the_wheel_is_what_runs(clean: Path) -> None:
    """Otherwise the tests below would test the repository."""
    code = "import arbiter_db, psycopg; print(arbiter_db.__file__); print(psycopg.__file__)"
    ours, library = run(clean, "python", "-c", code).split()
    assert Path(ours).is_relative_to(clean.parent)
    assert Path(library) == Path(psycopg.__file__)


def test_the_wheel_installs_what_the_repository_does(
    clean: Path, trading_db: Database, db: Database
) -> None:
    printed = run(clean, "arbiter-db", "install", **reach(trading_db))
    assert printed.splitlines()[-4] == f"arbiter {VERSION} is installed"
    assert_same(schema(db.conninfo()), schema(trading_db.conninfo()))
    printed = run(clean, "arbiter-db", "uninstall", "--drop-columns", "--yes", **reach(db))
    assert "dropped column arbiter_xid of public.signals" in printed


def test_the_wheel_prints_the_repositorys_script(clean: Path) -> None:
    assert run(clean, "arbiter-db", "sql") == arbiter_db.sql_text()


# -- one version ----------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere(clean: Path, db: Database) -> None:
    metadata = "from importlib.metadata import version; print(version('arbiter-db'))"
    assert run(clean, "python", "-c", metadata).strip() == VERSION
    row = db.connect().execute("select arbiter.version()").fetchone()
    assert row == (VERSION,)
    assert arbiter_db.version(db.connect()) == VERSION
    assert run(clean, "arbiter-db", "--version").split() == ["arbiter-db,", "version", VERSION]
    top = next(
        line for line in arbiter_db.sql_text().splitlines() if line.startswith("-- arbiter ")
    )
    assert top.startswith(f"-- arbiter {VERSION}:")
