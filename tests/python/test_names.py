"""What a module says that it offers is there."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import arbiter_db

MODULES = [
    "arbiter_db",
    *(found.name for found in pkgutil.walk_packages(arbiter_db.__path__, "arbiter_db.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_names_of_a_module_are_there(name: str) -> None:
    module = importlib.import_module(name)
    offered = getattr(module, "__all__", [])
    assert [each for each in offered if not hasattr(module, each)] == []


def test_the_package_offers_what_its_modules_do() -> None:
    api = importlib.import_module("arbiter_db.api")
    errors = importlib.import_module("arbiter_db.errors")
    assert {*api.__all__, *errors.__all__} <= {*arbiter_db.__all__}
