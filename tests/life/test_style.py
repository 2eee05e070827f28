"""The style of the functions in sql/, checked on what the server's parser makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pglast import ast
from pglast.enums import FunctionParameterMode
from sql_files import FILES, Function, Token, codes, functions, statements, tokens

FUNCTIONS = [function for path in FILES for function in functions(path)]

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)

#: Attributes in the order in which they stand, with the server's default.
DEFAULTS = {
    "language": None,
    "volatility": "volatile",
    "security": False,
    "set": None,
}


def plain(value: object) -> object:
    """An attribute's value as Python's."""
    if isinstance(value, ast.String):
        return value.sval
    if isinstance(value, ast.Boolean):
        return value.boolval
    return value


@by_function
def test_attributes_stand_one_a_line_and_say_what_is_not_the_default(function: Function) -> None:
    """A definer then stands out."""
    options = function.options()
    assert [name for name, _, _ in options] == sorted(
        (name for name, _, _ in options), key=list(DEFAULTS).index
    )
    for name, value, _ in options:
        assert plain(value) != DEFAULTS[name], name
    starts = [function.text.rindex("\n", 0, location) + 1 for _, _, location in options]
    for start, (name, _, location) in zip(starts, options, strict=True):
        assert function.text[start:location].strip() == "", f"{name} begins its line"
    assert len(set(starts)) == len(options)
    # The lines follow one another, right after the result and right before the body.
    assert function.text[starts[0] : starts[-1]].count("\n") == len(options) - 1
    head = [t for t in tokens(function.text) if t.start < starts[0]]
    result = next(t for t in reversed(head) if t.text == "returns")
    assert function.text[: result.start].rstrip(" ").endswith("\n")
    body = function.text[starts[-1] :].split("\n", 1)[1].lstrip(" ")
    assert body.startswith(("as $", "begin atomic\n", "return "))


UNPINNED = ("arbiter._session_role", "arbiter._is_owner_session")
#: Has that of the guards, which alone call it.
INHERITED = "arbiter._machine_may_write"


@by_function
def test_a_function_pins_its_search_path(function: Function) -> None:
    """With '' a caller's temporary table still shadows the catalog.

    Some do not, so that the server puts their bodies into the call: a function for a uuid, which
    only calls the one for a text, and two that ask for the role of the session. The server read
    these bodies when the functions were made.
    """
    for_a_uuid = "_uuid uuid)" in function.text.split("\n")[0]
    call = r"return arbiter\.(\w+)\(p_\w+_uuid::text\);?"
    is_one_call = re.fullmatch(call, function.body().strip())
    if function.name == INHERITED:
        assert [name for name, _, _ in function.options() if name == "set"] == []
        return
    if for_a_uuid or function.name in UNPINNED:
        assert is_one_call or not for_a_uuid, function.text
        assert function.body().strip().startswith("return "), function.text
        assert [name for name, _, _ in function.options() if name == "set"] == []
        return
    paths = [
        [item.val.sval for item in value.args]
        for name, value, _ in function.options()
        if name == "set" and value.name == "search_path"
    ]
    assert paths == [["pg_catalog", "pg_temp"]]
    pins = [value.name for name, value, _ in function.options() if name == "set"]
    assert pins[0] == "search_path"
    assert len(set(pins)) == len(pins)


@pytest.mark.parametrize(
    "function",
    [f for f in FUNCTIONS if any(name == "security" for name, _, _ in f.options())],
    ids=lambda function: function.name,
)
def test_a_definer_function_says_why(function: Function) -> None:
    """Above it, at the head of its file, or above another one by its name."""
    statement = function.statement
    code = statement.path.read_text("ascii")
    name = function.name.removeprefix("arbiter.")
    blocks = re.findall(r"^-- Definer\b.*\n(?:--.*\n)*", code, re.MULTILINE)
    reasons = [block for block in blocks if f"{name}()" in block or block[:-1] in statement.above]
    head = code[: code.index("\n\ncreate")]
    assert reasons or any(block[:-1] in head for block in blocks)


@by_file
def test_each_function_has_its_comment_right_below(path: Path) -> None:
    found = statements(path)
    for function in functions(path):
        if function.name.startswith("app."):  # the function that makes it gives it its comment
            continue
        after = found[found.index(function.statement) + 1]
        assert isinstance(after.tree, ast.CommentStmt)
        comment: Any = dict(after.tree())
        assert comment["objtype"]["name"] == "OBJECT_FUNCTION"
        assert ".".join(part["sval"] for part in comment["object"]["objname"]) == function.name
        types = [kind(p.argType()) for p in function.tree.parameters or () if is_input(p)]
        assert [kind(argument) for argument in comment["object"]["objargs"] or ()] == types
        assert comment["comment"].endswith(".")


def kind(type_name: Any) -> str:
    """A type as it is written."""
    return ".".join(part["sval"] for part in type_name["names"]) + "[]" * len(
        type_name["arrayBounds"] or ()
    )


def is_input(parameter: ast.FunctionParameter) -> bool:
    return parameter.mode not in (
        FunctionParameterMode.FUNC_PARAM_OUT,
        FunctionParameterMode.FUNC_PARAM_TABLE,
    )


@by_function
def test_names_say_what_they_are(function: Function) -> None:
    """Parameters p_, locals v_; trigger functions tg_, but for templates of generated ones."""
    for parameter in function.tree.parameters or ():
        if is_input(parameter):
            assert parameter.name.startswith("p_"), parameter.name
    if plain(function.options()[0][1]) == "plpgsql":
        for name in declared(function.body()):
            assert name.startswith(("v_", "__")), name  # __ is a word of a template
    is_trigger = function.returns == "trigger"
    is_named = re.fullmatch(r"arbiter\.(tg_\w+|_\w+_template)", function.name) is not None
    is_asked = re.fullmatch(r"arbiter\._(machine_may_write|claimed_\w+)_template", function.name)
    assert is_trigger is (is_named and is_asked is None)


def declared(body: str) -> Iterator[str]:
    """The names that a plpgsql body declares."""
    found = iter(tokens(body))
    for token in found:
        if token.text != "declare":
            continue
        is_name = True
        for inner in found:
            if is_name and inner.text == "begin":
                break
            if is_name:
                yield inner.text
            is_name = inner.text == ";"


def test_the_lint_sees_what_is_declared() -> None:
    body = "declare\n  v_a text := ';begin';\n  b constant integer = 1;\nbegin\n  c := 2;\nend"
    assert list(declared(body)) == ["v_a", "b"]


@by_file
def test_code_is_in_lower_case(path: Path) -> None:
    for code in codes(path.read_text("ascii")):
        for token in tokens(code):
            if token.kind != "SCONST" and token.text not in ("I", "L", '"C"'):  # of %I and %L
                assert token.text == token.text.lower()


# -- files -----------------------------------------------------------------------------------------


@by_file
def test_functions_are_closed_in_one_place(path: Path) -> None:
    """By the sweep in the file of privileges; the golden matrix shows the result."""
    for statement in statements(path):
        tree: Any = statement.tree
        assert not (isinstance(tree, ast.GrantStmt) and not tree.is_grant), statement.text


@by_file
def test_no_literal_depends_on_a_setting(path: Path) -> None:
    """With standard_conforming_strings off a backslash in a literal is taken for an escape."""
    for code in codes(path.read_text("ascii")):
        assert [t.text for t in tokens(code) if t.text[0] == "'" and "\\" in t.text] == []


# -- errors ---------------------------------------------------------------------------------------

#: What raises the values of an error that another function has made.
PASSED_ON = (
    "exception using errcode = v_error . sqlstate , message = v_error . message ,"
    " detail = v_error . detail , hint = v_error . hint"
)
UNDO = "exception using errcode = 'WX000' , message = 'undo the lock'"

#: Of these two files one comes before _fail() and defines it, the other makes errors with DETAIL.
MAKE_ERRORS = {"00_owner.sql", "01_basics.sql", "10_errors.sql"}


def raised(code: str) -> Iterator[str]:
    """Each statement that raises an error: what follows the word."""
    for part in codes(code):
        found = tokens(part)
        for n, token in enumerate(found):
            if token.text != "raise" or found[n + 1].text in ("notice", "warning", ";"):
                continue
            rest = [t.text for t in found[n + 1 :]]
            yield " ".join(rest[: rest.index(";")])


@by_file
def test_an_error_is_one_call(path: Path) -> None:
    """By _fail(), with a hint; unless it undoes a savepoint, or its values were made elsewhere."""
    for statement in raised(path.read_text("ascii")):
        assert path.name in MAKE_ERRORS or statement in (PASSED_ON, UNDO), statement


def test_the_lint_sees_each_raise() -> None:
    code = (
        "do $$ begin raise 'x'; raise notice 'y'; raise exception sqlstate 'WX001'; raise; end $$"
    )
    assert list(raised(code)) == ["'x'", "exception sqlstate 'WX001'"]


@by_file
def test_nothing_raises_40001(path: Path) -> None:
    """PostgREST repeats a request for ever that fails with it. To handle one is fine."""
    for code in codes(path.read_text("ascii")):
        found = tokens(code)
        for n, token in enumerate(found):
            assert token.text != "'40001'"
            if token.text.strip("'") == "serialization_failure":
                assert is_handled(found[:n])


def is_handled(before: tuple[Token, ...]) -> bool:
    """Whether a condition's name stands after `when`, alone or joined by `or`."""
    words = [t.text for t in before]
    while words[-1] == "or":
        words = words[:-2]
    return words[-1] == "when"
