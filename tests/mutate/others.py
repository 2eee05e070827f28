"""Mutants of Python and JavaScript, made by the operators of mutmut and of Stryker.

Both tools can also run the tests, but neither draws a sample, and their runners expect unit tests
in one process. So only their lists of mutants are used.

mutmut comes with the extra ``mutate``; Stryker's instrumenter is put into the user's cache
directory by npm, which needs Node.js 20 or newer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arbiter_db.demo.downloads import cache_directory, npm, put, work_in

from .mutants import Mutant

__all__ = ["fetch_stryker", "javascript_mutants", "python_mutants"]

STRYKER_VERSION = "9.6.1"
#: Has the versions and hashes of it and of all that it needs, in npm's own files.
STRYKER_LOCK = Path(__file__).with_name("stryker")


def python_mutants(path: str, text: str) -> list[Mutant]:
    """mutmut's mutants of a file."""
    import libcst
    from libcst.metadata import MetadataWrapper, WhitespaceInclusivePositionProvider
    from mutmut.mutation import file_mutation, mutators, pragma_handling

    class Visitor(file_mutation.MutationVisitor):
        def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
            # mutmut keeps all mutants of a function side by side, which does not work for one with
            # a decorator. Here each mutant has the file for itself.
            is_function = isinstance(node, libcst.FunctionDef)
            return not is_function and bool(super()._skip_node_and_children(node))

    wrapper = MetadataWrapper(libcst.parse_module(text))
    nothing = pragma_handling.IgnoredCode(set(), set(), set())
    visitor = Visitor(mutators.mutation_operators, nothing)
    module = wrapper.visit(visitor)
    places = wrapper.resolve(WhitespaceInclusivePositionProvider)
    found = []
    for mutation in visitor.mutations:
        place = places[mutation.original_node].start
        start = _offset(text, place.line - 1, place.column)
        old = module.code_for_node(mutation.original_node)
        new = module.code_for_node(mutation.mutated_node)
        # What is printed alone lacks the indentation of the block around it.
        for indentation in range(0, 40, 4):
            lines = "\n" + " " * indentation
            if text.startswith(old.replace("\n", lines), start):
                old, new = old.replace("\n", lines), new.replace("\n", lines)
                break
        else:
            continue
        # A common beginning and end are no part of the change.
        first = _common(old, new)
        same = _common(old[first:][::-1], new[first:][::-1])
        kind = type(mutation.original_node).__name__
        found.append(
            Mutant(
                "python",
                kind,
                path,
                start + first,
                old[first : len(old) - same],
                new[first : len(new) - same],
            )
        )
    return found


def _common(one: str, other: str) -> int:
    """How many characters are the same at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def javascript_mutants(root: Path, paths: Iterable[str]) -> list[Mutant]:
    """Stryker's mutants of files below ``root``."""
    names = list(paths)
    texts = {name: (root / name).read_text(encoding="utf-8") for name in names}
    found = []
    for raw in _stryker(root, names):
        text = texts[raw["fileName"]]
        start, end = (
            _offset(text, place["line"], place["column"])
            for place in (raw["location"]["start"], raw["location"]["end"])
        )
        new = raw["replacement"]
        if text[start:end] != new and raw.get("status") != "Ignored":
            found.append(
                Mutant("js", raw["mutatorName"], raw["fileName"], start, text[start:end], new)
            )
    return found


def _offset(text: str, line: int, column: int) -> int:
    """Where a line, counted from 0, and a column of it are in the text."""
    return sum(map(len, text.splitlines(keepends=True)[:line])) + column


def _stryker(root: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    from arbiter_db.demo.processes import run

    node = shutil.which("node")
    if node is None:
        raise RuntimeError("Node.js is needed for mutants of JavaScript")
    script = Path(__file__).with_name("stryker.mjs")
    yield from json.loads(
        run([node, str(script), str(fetch_stryker()), *names], RuntimeError, 120, cwd=root)
    )


def fetch_stryker() -> Path:
    """The folder in which Stryker's instrumenter is installed, by npm if it is not there yet."""
    target = cache_directory() / "npm" / f"stryker-instrumenter-{STRYKER_VERSION}"
    if not target.is_dir():
        with work_in(target.parent) as work:
            made = work / "made"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(STRYKER_LOCK / name, made)
            npm("ci", "--silent", "--no-fund", "--ignore-scripts", cwd=made)
            put(made, target)
    return target
