"""The house rules of sql/: files in reading order, no ceremony, one word for one thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pglast import ast
from sql_files import FILES, codes, literals, statements, tokens

REPOSITORY = Path(__file__).parent.parent.parent

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def defined(path: Path) -> set[str]:
    """What a file, or a migration, defines in the schema."""
    return {
        name
        for code in codes(path.read_text("ascii"))
        for name in re.findall(
            r"(?:^|;| )create (?:or replace )?(?:function|view|type|table)(?: if not exists)?"
            r" arbiter \. (\w+)",
            " ".join(token.text for token in tokens(code)),
        )
    }


def used(path: Path) -> set[str]:
    """What a file names in the schema, but for what comments and texts for people say of it."""
    names: set[str] = set()
    for statement in statements(path):
        if isinstance(statement.tree, ast.CommentStmt):
            continue
        for code in codes(statement.text):
            text = " ".join(token.text for token in tokens(code) if token.kind != "SCONST")
            names.update(re.findall(r"\barbiter \. (\w+)", text))
        for text in literals(statement.text):
            is_prose = re.search(r"\b[a-z]+ [a-z]+ [a-z]+\b", text)
            if not is_prose or re.search(r"\b(execute|select|where)\b", text):
                names.update(re.findall(r"\barbiter\.(\w+)", text))
    return names


def is_generated(name: str) -> bool:
    """A function or view that is made from a template or a format, under a name of its own."""
    generated = (
        r"_path_\w*|tg_registry_\w+|_is_(user|machine|active)?|_user_text|_machine_keys"
        r"|claimed_\w+_id|_heartbeat_timeout|_poll_interval|_is_enforced"
    )
    return re.fullmatch(generated, name) is not None


def test_no_file_needs_a_later_one() -> None:
    known = {"documented_before", "install_options", "adopt_columns"}  # settings
    known.add("protect")  # what a rejection tells the owner to call
    for path in sorted((REPOSITORY / "migrations").glob("[0-9]*.sql")):
        known |= defined(path)
    for path in FILES:
        known |= defined(path)
        later = {name for name in used(path) - known if not is_generated(name)}
        assert not later, f"{path.name} uses what a later file defines"


def test_the_test_of_the_order_sees_what_is_used() -> None:
    """A call, a name in quotes, a name in a generated statement, one in a cast of a text."""
    names = set().union(*(used(path) for path in FILES))
    assert names >= {"_verdict", "_guard_template", "leases", "_judge_row", "_key_stands"}
    assert names >= {"execution_status", "tg_registry_stamp", "_guard_triggers"}


@by_file
def test_a_file_is_short_and_says_at_its_head_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    assert len(lines) <= 400
    assert lines[0].startswith("-- ")
    comments = [line for line in lines if line.lstrip().startswith("--")]
    assert [line for line in comments if len(line) > 120] == []


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
    defined |= {"_is_user", "_is_machine", "_user_text", "claimed_user_id", "claimed_machine_id"}
    defined |= {"_heartbeat_timeout", "_poll_interval", "_is_enforced"}
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
