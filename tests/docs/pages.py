"""The pages of the documentation: their blocks, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = [
    "PAGES",
    "REPOSITORY",
    "Block",
    "Command",
    "anchors",
    "blocks",
    "commands",
    "inline_code",
    "links",
    "prose",
]

REPOSITORY = Path(__file__).parents[2]

PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
)

_MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A fenced block: ```language word word. Its lines are numbered from 0, without the fences."""

    page: str
    language: str
    words: tuple[str, ...]
    text: str
    begins: int
    ends: int
    output: Block | None = None
    """The block `text` that follows at once: what this block prints."""

    @property
    def name(self) -> str:
        """The page and the line of its fence, as an editor counts."""
        return f"{self.page}:{self.begins}"


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the lines that it prints: their numbers in the block."""

    text: str
    begins: int
    ends: int


def _tokens(page: str) -> list[Token]:
    return _MARKDOWN.parse((REPOSITORY / page).read_text(encoding="utf-8"))


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order, each with its output."""
    found: list[Block] = []
    previous: Token | None = None
    for token in _tokens(page):
        if token.type == "fence":
            assert token.map is not None
            language, *words = token.info.split() or [""]
            first, last = token.map[0] + 1, token.map[1] - 1
            block = Block(page, language, tuple(words), token.content, first, last)
            if language == "text" and previous is not None and previous.type == "fence":
                owner = found.pop()
                block = Block(
                    page, owner.language, owner.words, owner.text, owner.begins, owner.ends, block
                )
            found.append(block)
        previous = token
    return found


def commands(text: str) -> list[Command]:
    """The commands of a console block. A line that ends in a backslash goes on in the next one."""
    found: list[Command] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        assert lines[number].startswith("$ "), f"output before a command: {lines[number]}"
        command = [lines[number][2:]]
        # A quoted text may have many lines, too: all of them are indented.
        while command[-1].endswith("\\") or "\n".join(command).count("'") % 2:
            number += 1
            command.append(lines[number])
        number += 1
        begins = number
        while number < len(lines) and not lines[number].startswith("$ "):
            number += 1
        found.append(Command("\n".join(command), begins, number))
    return found


def _inline(page: str) -> Iterator[Token]:
    for token in _tokens(page):
        yield from token.children or ()
        if token.type == "html_block":
            yield token


def inline_code(page: str) -> list[str]:
    """The code in the running text and in tables."""
    return [token.content for token in _inline(page) if token.type == "code_inline"]


def prose(page: str) -> str:
    """The running text and the tables without code, a line for each text."""
    return "\n".join(token.content for token in _inline(page) if token.type == "text")


def links(page: str) -> list[str]:
    """What a page links to or shows, pictures in HTML included."""
    found = []
    for token in _inline(page):
        if token.type == "link_open":
            found.append(str(token.attrs["href"]))
        elif token.type == "image":
            found.append(str(token.attrs["src"]))
        elif token.type in ("html_block", "html_inline"):
            found += re.findall(r'(?:src|srcset|href)="([^"]*)"', token.content)
    return found


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    tokens = _tokens(page)
    names = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(
                child.content for child in inline.children or () if child.type != "html_inline"
            )
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found.setdefault(slug, 0)
            found[slug] += 1
            names.append(slug if count == 0 else f"{slug}-{count}")
    return set(names)
