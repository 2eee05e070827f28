"""The house rules of sql/: files in reading order, no ceremony, one word for one thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
FILES = sorted((REPOSITORY / "sql").glob("*.sql"))

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)

DEFINITION = re.compile(
    r"create (?:or replace )?(?:function|view|type|table(?: if not exists)?) arbiter\.(\w+)"
)


def code(path: Path) -> str:
    """The file without comments, and without the texts that people read."""
    text = re.sub(r"--[^\n]*", "", path.read_text(encoding="ascii"))
    text = re.sub(r"^ *comment on .*?;$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"'(?:[^'\n]|'')*\b[a-z]+ [a-z]+ [a-z]+(?:[^'\n]|'')*'", "''", text)


def generated(name: str) -> bool:
    """A function or view that is made from a template or a format, under a name of its own."""
    return re.fullmatch(r"_path_\w*|tg_registry_\w+", name) is not None


def test_no_file_needs_a_later_one() -> None:
    migrations = sorted((REPOSITORY / "migrations").glob("[0-9]*.sql"))
    known = {"documented_before"}  # a setting
    known |= {name for path in migrations for name in DEFINITION.findall(path.read_text("ascii"))}
    for path in FILES:
        known |= set(DEFINITION.findall(path.read_text("ascii")))
        used = set(re.findall(r"\barbiter\.(\w+)", code(path)))
        later = {name for name in used - known if not generated(name)}
        assert not later, f"{path.name} uses what a later file defines"


def test_the_test_of_the_order_sees_what_is_used() -> None:
    """A call, a name in quotes, a name in a generated statement."""
    used = {name for path in FILES for name in re.findall(r"\barbiter\.(\w+)", code(path))}
    assert used >= {"_verdict", "_guard_template", "leases", "_judge_row", "_key_stands"}


@by_file
def test_a_file_is_short_and_says_at_its_head_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    assert len(lines) <= 400
    assert lines[0].startswith("-- ")
    comments = [line for line in lines if line.lstrip().startswith("--")]
    assert [line for line in comments if len(line) > 120] == []


@by_file
def test_functions_are_closed_in_one_place(path: Path) -> None:
    """By the sweep in the file of privileges; the golden matrix shows the result."""
    assert not re.search(r"^revoke ", path.read_text(encoding="ascii"), re.MULTILINE)


#: Where an error is raised otherwise than by _fail() or as a value of arbiter.error: it is that
#: function or comes before it, or undoes a savepoint.
RAISES = {"00_basics.sql": 2, "14_lease.sql": 2}

RAISED_VALUE = re.compile(
    r"raise exception using\n *errcode = v_error\.sqlstate, message = v_error\.message,"
    r" detail = v_error\.detail, hint = v_error\.hint;"
)


@by_file
def test_an_error_is_one_call(path: Path) -> None:
    text = RAISED_VALUE.sub("", path.read_text(encoding="ascii"))
    assert len(re.findall(r"\braise exception\b", text)) == RAISES.get(path.name, 0)


@by_file
def test_one_word_for_one_thing(path: Path) -> None:
    """A write is rejected. An installation, a server or this test may refuse."""
    text = path.read_text(encoding="ascii")
    assert re.findall(r"\b(?:throw\w*|nobody's|whoever|whatever)\b", text, re.IGNORECASE) == []
    other = re.findall(r"[^\n]*\brefus\w*[^\n]*", text)
    assert [line for line in other if "adopt" not in line] == []


def test_each_column_that_arbiter_adds_is_defined_once() -> None:
    texts = [path.read_text("ascii") for path in FILES]
    for words in ("text not null default ''local''", "the machine that wrote the row when source"):
        assert sum(text.count(words) for text in texts) == 1, words


@by_file
def test_no_literal_depends_on_a_setting(path: Path) -> None:
    """With standard_conforming_strings off a backslash in a literal is taken for an escape."""
    assert "\\" not in re.sub(r"--[^\n]*", "", path.read_text(encoding="ascii"))


# -- the map --------------------------------------------------------------------------------------

PAGES = [REPOSITORY / "docs" / "architecture.md", REPOSITORY / "CONTRIBUTING.md"]

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_page
def test_a_page_names_functions_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(path.read_text("ascii") for path in FILES)
    python = [*REPOSITORY.glob("arbiter_db/*.py"), *REPOSITORY.glob("tests/*/*.py")]
    code += "\n".join(path.read_text("utf-8") for path in python)
    named = set(re.findall(r"`(?:arbiter\.)?(_?[a-z]\w*)\(\)`", text))
    assert len(named) >= 10
    defined = set(re.findall(r"(?:function arbiter\.|def )(\w+)\(", code))
    # Generated ones, the last two of which are written short.
    defined |= {"_guard_1", "tg_registry_stamp", "_note", "_activate"}
    assert named - defined == set()


@by_page
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:sql|migrations|arbiter_db|tests|docs)/[\w./-]*)`", text)
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    short = re.findall(r"`(\d\d_\w+)(?:\.sql)?`", text)
    assert [name for name in short if not (REPOSITORY / "sql" / f"{name}.sql").exists()] == []
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_map_has_every_file_of_sql_in_its_order() -> None:
    text = PAGES[0].read_text(encoding="utf-8").split("## Reading order")[1]
    assert re.findall(r"`(\d\d_\w+)`", text.split("\nPython:")[0]) == [p.stem for p in FILES]
