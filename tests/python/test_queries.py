"""How a file of named queries is cut."""

from __future__ import annotations

import pytest

from arbiter_db.queries import QUERIES, cut


def test_each_query_has_the_text_below_its_name() -> None:
    text = "-- the file's head\n\n-- name: one\nselect 1\n\n-- not a name\n\n"
    assert cut(text + "-- name: two\n\nselect 2;\n") == {
        "one": b"select 1\n\n-- not a name",
        "two": b"select 2;",
    }
    assert cut("-- only a head") == {}


def test_a_name_counts_at_the_begin_of_a_line_only() -> None:
    assert cut("-- name: one\nselect 1 -- name: two\n") == {"one": b"select 1 -- name: two"}


def test_text_is_utf_8() -> None:
    assert cut("-- name: one\nselect 'é'") == {"one": "select 'é'".encode()}


def test_the_same_name_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^two queries have the same name$"):
        cut("-- name: one\nselect 1\n-- name: one\nselect 2\n")


def test_the_packages_queries_are_there() -> None:
    assert {"status", "heartbeat", "machine_settings", "lock"} <= QUERIES.keys()
    assert all(QUERIES.values())
