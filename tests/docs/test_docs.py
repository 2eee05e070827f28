"""README and docs/: every block is run or listed here, output is real, links lead somewhere.

A new block needs nothing here when its language is console, sql or python: it is run, in the order
of the page, on a database of the demo's trading app with arbiter. In SQL :'user', :'trader' and
:'machine' are Ada's, in Python there are the names of NAMES where NEEDS says so. Words after the
language say more:

    sql typed          goes to the program that the console block before it has opened
    sql service_role   runs as that role
    sql other          runs on another database, with the tables of OTHER

A block `text` directly after another one is what that block prints, and is compared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import click
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

import arbiter_db
from arbiter_db.cli import main
from arbiter_db.demo.stage import sql_file
from arbiter_db.demo.story import MACHINE, TRADER, USER

from . import picture
from .pages import PAGES, REPOSITORY, Block, anchors, blocks, inline_code, links, prose
from .reader import Page, Reader, same

if TYPE_CHECKING:
    from conftest import Database, Templates

#: The pages that tests/supabase runs, since they need its programs.
WITH_SUPABASE = {"docs/supabase.md"}

RUN = {"console", "sql", "python"}

#: Blocks that are not run, by page and first line, and why.
NOT_RUN = {
    (
        "CONTRIBUTING.md",
        "$ make mutate ARGS='--area sql --seed 7 --number 40'",
    ): "runs the tests for hours; test_mutate has the tool",
    ("docs/architecture.md", "flowchart LR"): "a drawing, which GitHub makes",
    ("docs/architecture.md", "stateDiagram-v2"): "a drawing, which GitHub makes",
    ("docs/operations.md", "begin;"): "tests/registry/test_move.py runs it beside writers",
    ("docs/cost.md", "$ make bench ARGS='instructions clients cpu'"): "measures for an hour",
}

#: A machine of the user, which the app has provisioned.
PROVISIONED = f"""
insert into public.cloud_machines (id, user_id, machine_id)
values ('{MACHINE}', '{USER}', 'e286de4f711e86');
"""

#: The tables of an app with other names.
OTHER = """
create table public.user_fly_apps (
  id uuid primary key, user_id uuid not null, status text not null, last_health_check timestamptz
);
alter table public.signals add column fly_app_id uuid references public.user_fly_apps (id);
"""

NAMES = f"""
import os
from datetime import datetime, timezone
dsn = os.environ["DATABASE_URL"]
user_id, trader_id, machine_id = "{USER}", "{TRADER}", "{MACHINE}"
bar_time = datetime(2026, 1, 5, 9, tzinfo=timezone.utc)
"""

#: The exchange takes an order only when its intent is committed.
EXCHANGE = """
class exchange:
    def send(symbol, side, client_order_id):
        with psycopg.connect(dsn) as other:
            query = "select source, machine_id::text from public.signals where symbol = %s"
            print(side, symbol, client_order_id.version, other.execute(query, (symbol,)).fetchall())
def stop():
    print("lost")
"""

RUNS = "update public.cloud_machines set status = 'running';"

#: What the pages need. A page that is not listed needs nothing but the database.
NEEDS = {
    "README.md": Page(
        prepare=PROVISIONED + RUNS,
        python=NAMES + EXCHANGE,
        prints=f"buy BTCUSDT 5 [('cloud', '{MACHINE}')]\n",
        folders=("supabase/migrations",),
    ),
    "docs/workers.md": Page(prepare=PROVISIONED, python=NAMES),
    "docs/proof.md": Page(prepare=PROVISIONED),
    "docs/reference.md": Page(python=NAMES),
    "CONTRIBUTING.md": Page(
        # The tests that it names run by themselves: here only whether there are any.
        stands_for={
            "-m pytest": "-m pytest --collect-only --quiet",
            ".venv/bin/": f"{sys.prefix}/bin/",
        },
        goes_on=(f"{sys.prefix}/bin/python -m arbiter_db.demo.embedded run",),
    ),
}

#: Pages that begin before the install.
BEFORE_INSTALL = {"docs/operations.md"}

#: Pages whose commands are for a clone of the repository.
IN_REPOSITORY = {"CONTRIBUTING.md", "docs/architecture.md"}


def first_line(block: Block) -> str:
    return block.text.splitlines()[0]


def is_run(block: Block) -> bool:
    if (block.page, first_line(block)) in NOT_RUN:
        return False
    return block.language in RUN or block.page in WITH_SUPABASE


def runnable(page: str) -> list[Block]:
    """The blocks that are run here."""
    return [block for block in blocks(page) if is_run(block) and page not in WITH_SUPABASE]


# -- every block ----------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """This repository as it is now, to be cloned."""
    copy = tmp_path / "repository"
    left_out = (".git", ".venv", ".*_cache", "__pycache__", "dist", "build")
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*left_out))
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=now"]):
        identity = ["-c", "user.name=reader", "-c", "user.email=reader@example.com"]
        subprocess.run(["git", *identity, *command], cwd=copy, check=True)
    return copy


def environment(db: Database, home: Path) -> dict[str, str]:
    """What a visitor's shell has: an empty home, and libpq's variables for the database.

    pip takes what it needs from the environment that runs the tests: no test needs a network.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    for name in ("FORCE_COLOR", "COLUMNS", "VIRTUAL_ENV", "RENEW_DOCS"):
        keep.pop(name, None)
    info = conninfo_to_dict(db.conninfo())
    paths = [f"{sys.prefix}/bin", str(Path(db.server.psql or "psql").parent), keep["PATH"]]
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return keep | {
        "HOME": str(home),
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(libraries),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # no isolation: pip reads the variable the other way round
        "PGHOST": str(info["host"]),
        "PGPORT": str(info["port"]),
        "PGDATABASE": db.name,
        "PGUSER": str(info["user"]),
        "DATABASE_URL": db.conninfo(),
        "TZ": "UTC",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_every_block_runs_and_prints_what_the_page_shows(
    page: str, templates: Templates, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = runnable(page)
    needs = NEEDS.get(page, Page())
    home = tmp_path / "home"
    home.mkdir()
    with (
        templates.clone("trading" if page in BEFORE_INSTALL else "installed") as db,
        templates.clone("installed") as other,
    ):
        with db.connect() as owner:
            owner.execute(sql_file("people.sql") + needs.prepare.encode())
        with other.connect() as owner:
            owner.execute(OTHER)
        if any("<this repository>" in block.text for block in found):
            shown = {"<this repository>": str(request.getfixturevalue("repository"))}
            needs = replace(needs, stands_for=shown)

        def psql(words: tuple[str, ...]) -> tuple[list[str], Mapping[str, str]]:
            chosen = other if "other" in words else db
            command = [db.server.psql or "psql", "-X", chosen.conninfo()]
            for name, value in (("machine", MACHINE), ("trader", TRADER), ("user", USER)):
                command += ["-v", f"{name}={value}"]
            if "service_role" in words:
                command[2] = chosen.conninfo("authenticator")
                return command, {"PGOPTIONS": "-c role=service_role"}
            return command, {}

        folder = REPOSITORY if page in IN_REPOSITORY else home
        reader = Reader(needs, home, environment(db, home), psql)
        reader.cwd = folder
        reader.read(found)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_listed(page: str) -> None:
    others = {(page, first_line(block)) for block in blocks(page) if not is_run(block)}
    assert others == {key for key in NOT_RUN if key[0] == page}


def test_a_difference_is_seen() -> None:
    shown = "2026-11-29 21:30:00.000+00:00  ada00000-0000-4000-8000-000000000001  epoch 2"
    later = "2027-01-01 00:00:00+00:00    ada00000-0000-4000-8000-000000000001  epoch 2 "
    assert same(shown, later)
    assert not same(shown, shown.replace("epoch 2", "epoch 3"))
    assert not same(shown, shown.replace("ada00000", "b0b00000"))
    assert not same(shown, f"{shown}\nCONTEXT:  more")


# -- what a page says of the code -----------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("page", PAGES)
def test_plain_words(page: str) -> None:
    """A write is rejected, and nothing has a second name."""
    riddles = r"\b(?:nobody|anybody|whoever|whatever|bargain|throws?|thrown)\b"
    text = prose(page)
    assert re.findall(rf"[^\n]*{riddles}[^\n]*", text, re.IGNORECASE) == []
    assert (
        re.findall(r"\b(?:write|insert|update|row|browser|machine)s? (?:is|are) refused", text)
        == []
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        if not target.exists() or (
            anchor and anchor not in anchors(str(target.resolve().relative_to(REPOSITORY)))
        ):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for code in inline_code(page):
        made = re.match(r"make ([a-z-]+)", code)
        if made and made[1] not in targets:
            wrong.append(code)
        if code.startswith("arbiter-db "):
            wrong += [code] * (unknown_words(code.split()[1:]) != [])
    assert wrong == []


def unknown_words(words: list[str]) -> list[str]:
    """What the command line does not know: a command, or an option of it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words:
        name, *words = words
        if name.startswith("-"):
            break
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    options = {
        option
        for parameter in command.params
        for option in parameter.opts + parameter.secondary_opts
    }
    given = re.findall(r"(?<![\w-])--[a-z-]+", " ".join(words))
    return [option for option in given if option not in options]


def test_unknown_words_are_seen() -> None:
    assert unknown_words(["audit", "--strict"]) == []
    assert unknown_words(["supabase", "export", "DIRECTORY", "--expose", "SCHEMA"]) == []
    assert unknown_words(["audits"]) == ["audits"]
    assert unknown_words(["audit", "[--stricter]"]) == ["--stricter"]


REFERENCE = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the reference, without its own heading."""
    chapter = re.split(r"^##+ ", REFERENCE, flags=re.MULTILINE)
    [text] = [part for part in chapter if part.startswith(f"{heading}\n")]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    return [[cell.strip() for cell in row] for row in cells[2:]]


def test_the_reference_has_every_function_and_parameter(db: Database) -> None:
    query = """
    select p.proname, p.proargnames::text[] as names
      from pg_proc p where p.pronamespace = 'arbiter'::regnamespace and p.proname !~ '^(_|tg_)'
    """
    calls = {match[1] for match in re.finditer(r"`arbiter\.(\w+\([^)]*\))", REFERENCE)}
    for name, names in db.connect().execute(query).fetchall():
        described = [call for call in calls if call.startswith(f"{name}(")]
        parameters = [n for n in names or [] if n.startswith("p_")]
        assert any(re.findall(r"\bp_\w+", call) == parameters for call in described), (
            f"{name}({', '.join(parameters)})"
        )


@pytest.mark.parametrize("page", PAGES)
def test_functions_in_the_text_exist(page: str, db: Database) -> None:
    query = """
    select proname from pg_proc where pronamespace = 'arbiter'::regnamespace
    union select relname from pg_class where relnamespace = 'arbiter'::regnamespace
    union select typname from pg_type where typnamespace = 'arbiter'::regnamespace
    """
    known = {name for (name,) in db.connect().execute(query).fetchall()}
    known |= {"js", "d", "refresh"}  # the browser's module, its types, a method
    used = {name for code in inline_code(page) for name in re.findall(r"\barbiter\.(\w+)", code)}
    # What is generated for a table has a number in its name, or stands for one.
    assert {name for name in used if not re.search(r"_(\d\w*)?$", name)} <= known


def test_the_reference_has_the_options_of_protect(db: Database) -> None:
    """With the values that they have after a first call that names the table only."""
    owner = db.connect()
    owner.execute("create table public.first (user_id uuid)")
    owner.execute("select arbiter.protect('public.first')")
    options = owner.cursor(row_factory=dict_row).execute(
        "select verbs::text, machine_column, mode, unowned, evidence::text"
        "  from arbiter.protections where protected_table = 'public.first'::regclass"
    )
    (first,) = options.fetchall()
    shown = {
        name.strip("`"): default.strip("` ")
        for name, default, *_ in table("The options of `protect`")
    }
    assert shown.pop("p_table") == ""
    assert shown.pop("p_user_path") == "found where there is one obvious answer"
    assert shown == {f"p_{name}": value for name, value in first.items()}


def test_the_reference_has_the_options_and_defaults_of_register_machines(db: Database) -> None:
    query = """
    select p.proargnames::text[], pg_get_expr(p.proargdefaults, 0)
      from pg_proc p where p.pronamespace = 'arbiter'::regnamespace
       and p.proname = 'register_machines'
    """
    row = db.connect().execute(query).fetchone()
    assert row is not None
    names, defaults = row
    values = [
        re.sub(r"::[\w\[\]]+|'", "", each).lower() for each in re.split(r", (?![^{]*\})", defaults)
    ]
    expected = dict(zip(names, [""] * (len(names) - len(values)) + values, strict=True))
    shown = {
        name.strip("`"): default.split(":")[0].strip("` ")
        for name, default, *_ in table("The options of `register_machines`")
    }
    assert shown == expected


def test_the_reference_has_the_settings_and_defaults(db: Database) -> None:
    row = (
        db.connect()
        .cursor(row_factory=dict_row)
        .execute("select * from arbiter.settings")
        .fetchone()
    )
    assert row is not None
    del row["singleton"]
    shown = {name.strip("`"): default for name, default, _ in table("Settings")}
    units = {"s": 1, "min": 60}
    for name, value in row.items():
        if isinstance(value, bool):
            assert shown.pop(name) == str(value).lower()
        elif isinstance(value, str):
            assert shown.pop(name) == f"`{value}`"
        else:
            number, unit = shown.pop(name).split()
            assert int(number) * units[unit] == value.total_seconds(), name
    assert shown == {}


def test_the_readme_has_the_status_words(db: Database) -> None:
    row = db.connect().execute("select states from arbiter.registry").fetchone()
    assert row is not None
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, _, rows = text.partition("| machine state | status words |\n|---|---|\n")
    shown: dict[str, str] = {}
    for line in rows.partition("\n\n")[0].splitlines():
        _, state, words, _ = line.split("|")
        shown |= {word: state.strip() for word in re.findall(r"`(\w+)`", words)}
    assert shown == row[0]


def test_the_reference_has_the_errors(db: Database) -> None:
    classes = {cls.sqlstate: cls for cls in arbiter_db.ArbiterError.__subclasses__()}
    shown = [(row[0].strip("`"), row[1].strip("`"), row[3].strip("`")) for row in table("Errors")]
    assert shown == [(state, cls.code, cls.__name__) for state, cls in sorted(classes.items())]


def test_the_reference_has_the_status_and_its_columns(db: Database) -> None:
    cursor = db.connect().execute(f"select * from arbiter.status('{USER}')")
    assert cursor.description is not None
    shown = [
        name for row in table("The row of `status`") for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert shown == [column.name for column in cursor.description]


def test_the_reference_has_every_command_and_option() -> None:
    rows = " ".join(row[0] for row in table("Command line"))
    missing = []

    def look(command: click.Command, path: str) -> None:
        if isinstance(command, click.Group):
            for name, member in command.commands.items():
                look(member, f"{path} {name}")
            return
        shown = next((row[0] for row in table("Command line") if row[0].startswith(f"`{path}")), "")
        if "ADOPTION" in shown:
            shown += next(row[0] for row in table("Command line") if "options ADOPTION" in row[0])
        for parameter in command.params:
            option = parameter.opts[0]
            if isinstance(parameter, click.Option) and option not in shown and option != "--dsn":
                missing.append(f"{path} {option}")
        if path not in rows:
            missing.append(path)

    look(main, "arbiter-db")
    assert missing == []


# -- the picture ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_picture_shows_a_real_run() -> None:
    """`make picture` draws it anew."""
    happened = picture.description(picture.play())
    assert "browser WX001" in happened
    for path in picture.FILES.values():
        drawn = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8"))
        assert drawn is not None
        assert drawn[1] == happened
