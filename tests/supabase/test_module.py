"""arbiter.js by itself, in Node: what it does on a clock, with answers and on pages that the tests
drive. test_web.py has the same module in a real browser, with a real database behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import happy_dom

if TYPE_CHECKING:
    from .conftest import Node

FOLDER = Path(__file__).with_name("module")


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_the_module(node: Node, script: str) -> None:
    report = node.test(FOLDER / script, HAPPY_DOM=str(happy_dom.find()))
    counts = dict(re.findall(r"^# (\w+) (\d+)$", report, flags=re.MULTILINE))
    assert int(counts.pop("pass")) > 5, report
    assert {counts[name] for name in ("fail", "cancelled", "skipped", "todo")} == {"0"}, report
