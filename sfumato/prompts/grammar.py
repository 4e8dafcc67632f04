"""The grammar of schedules: a prompt -> a tree of text, scheduled parts and alternating parts.

Reads the same language as A1111's, in one pass and without recursion, so a prompt of any depth and length is safe.
Knows nothing of steps (timeline.py) or of what a weight means (emphasis.py): round brackets are only kept in balance.
A bracket that fits no rule is text. A `|` outside `[a|b]` or a lone backslash makes the whole prompt text, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

TOKEN = re.compile(r"[^\\\[\]():|]+|\\.|[\[\]():|\\]")
WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
CLOSER = {"(": ")", "[": "]"}


@dataclass(frozen=True, eq=False)
class Scheduled:
    """`[before:after:when]`: `before` up to and including the step that `when` names, then `after`."""

    before: Node
    after: Node
    when: str


@dataclass(frozen=True, eq=False)
class Alternate:
    """`[a|b|c]`: one of the options, the next one at each step."""

    options: tuple[Node, ...]


Node: TypeAlias = "str | Scheduled | Alternate | tuple[Node, ...]"


def _joined(nodes: list[Node]) -> Node:
    """One node for a row of nodes: a string where all are strings."""
    texts = [node for node in nodes if isinstance(node, str)]
    return "".join(texts) if len(texts) == len(nodes) else tuple(nodes)


@dataclass
class _Open:
    """An open bracket: what was read since, cut in parts at each separator of its own level."""

    bracket: str
    parts: list[list[Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def cut(self, separator: str) -> None:
        self.separators.append(separator)
        self.parts.append([])

    def items(self) -> Iterator[Node]:
        """All that was read as it stood, the opening bracket first."""
        yield self.bracket
        yield from self.parts[0]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            yield separator
            yield from part

    def close(self, bracket: str) -> Node | None:
        """The node that `bracket` completes, or None where the rules know no such thing."""
        separators = "".join(self.separators)
        if CLOSER[self.bracket] != bracket:
            return None
        if separators == "" or (separators == ":" and bracket == ")"):
            return _joined([*self.items(), bracket])  # emphasis: of no meaning here
        if bracket == ")":
            return None
        if separators.strip("|") == "":
            return Alternate(tuple(_joined(part) for part in self.parts))
        last = _joined(self.parts[-1])
        when = WHEN.fullmatch(last) if isinstance(last, str) else None
        if when is None or separators not in (":", "::"):
            return None
        before = _joined(self.parts[0]) if separators == "::" else ""
        return Scheduled(before, _joined(self.parts[-2]), when[1])


@lru_cache(maxsize=256)
def parse(text: str) -> Node:
    """The tree of a prompt. Never fails: what fits no rule is text. Takes time in proportion to the length.

    A bracket that cannot be closed, or closes as nothing that the rules know, is text, and so are all brackets around
    it that are still open; brackets inside it that were complete keep their meaning.
    """
    if "[" not in text:
        return text
    root: list[Node] = []
    opened: list[_Open] = []

    def give_up() -> None:
        for bracket in opened:
            root.extend(bracket.items())
        opened.clear()

    for token in TOKEN.findall(text):
        if token == "\\":  # at the end, or before a line break
            return text
        if token in CLOSER:
            opened.append(_Open(token))
        elif token in "])":
            node = opened[-1].close(token) if opened else None
            if node is None:
                give_up()
                root.append(token)
            else:
                opened.pop()
                (opened[-1].parts[-1] if opened else root).append(node)
        elif token in ":|" and opened:
            opened[-1].cut(token)
        else:
            (opened[-1].parts[-1] if opened else root).append(token)
    give_up()
    return text if "|" in root else _joined(root)


def walk(tree: Node) -> Iterator[Scheduled | Alternate]:
    """Every scheduled and alternating part of a tree, inner ones too."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, tuple):
            todo.extend(node)
        elif isinstance(node, Scheduled):
            yield node
            todo += [node.before, node.after]
        elif isinstance(node, Alternate):
            yield node
            todo.extend(node.options)
