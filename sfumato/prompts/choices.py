"""Choices: `{red|blue}`, `{2$$a|b|c}`, `{3::often|seldom}` and `__wildcard__` files -> text, drawn at random.

The everyday part of the Dynamic Prompts extension's language. Draws only from the generator it is given, so the same
seed, text and files give the same words. Without a generator a prompt's braces are plain text, as in A1111.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import filter as matching
from pathlib import Path
from typing import TypeAlias

log = logging.getLogger(__name__)

MAX_WILDCARDS = 1000  # of one prompt: files may name each other without end
SEPARATOR = ", "
TOKEN = re.compile(r"\\.|[{}|]|__[\w./*-]+?__|[^\\{}|_]+|[\\_]", re.DOTALL)
WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{0,6})?|\.\d{1,6})::")
# `2$$`, `1-3$$`, `-3$$`, `1-$$`, and a separator of one's own: `2$$ and $$`.
COUNT = re.compile(r"\s*(?:(\d{1,4})|(\d{0,4})-(\d{0,4}))\$\$(?:([^$]*)\$\$)?")


@dataclass(frozen=True, eq=False)
class _Wildcard:
    name: str


@dataclass(frozen=True, eq=False)
class _Choice:
    """Some of the options, `fewest` to `most` of them (None: all there are), each with a weight >= 0."""

    options: tuple[tuple[float, _Node], ...]
    fewest: int = 1
    most: int | None = 1
    separator: str = SEPARATOR


_Node: TypeAlias = "str | _Wildcard | _Choice | tuple[_Node, ...]"


@dataclass
class _Open:
    """An open brace and the options read since."""

    options: list[list[_Node]] = field(default_factory=lambda: [[]])

    def items(self) -> Iterator[_Node]:
        """All that was read as it stood, the brace first."""
        yield "{"
        for index, option in enumerate(self.options):
            if index:
                yield "|"
            yield from option

    def close(self) -> _Node:
        """A choice; or plain text where there is nothing to choose."""
        first = self.options[0][0] if self.options[0] else ""
        count = COUNT.match(first) if isinstance(first, str) else None
        if count is None and len(self.options) == 1:
            return (*self.items(), "}")
        if count is None:
            return _Choice(tuple(_weighed(option) for option in self.options))
        self.options[0][0] = str(first)[count.end() :]
        fewest = int(count[1] or count[2] or 1)
        most = int(count[1] or count[3]) if count[1] or count[3] else None
        separator = SEPARATOR if count[4] is None else count[4]
        return _Choice(tuple(_weighed(option) for option in self.options), fewest, most, separator)


def _weighed(option: list[_Node]) -> tuple[float, _Node]:
    """An option and the weight in front of it, 1 where there is none."""
    weight = WEIGHT.match(option[0]) if option and isinstance(option[0], str) else None
    if weight is None:
        return 1.0, tuple(option)
    return float(weight[1]), (str(option[0])[weight.end() :], *option[1:])


def _parse(text: str) -> _Node:
    """The tree of a text; braces that do not close are text."""
    root: list[_Node] = []
    opened: list[_Open] = []
    for token in TOKEN.findall(text):
        here = opened[-1].options[-1] if opened else root
        if token == "{":
            opened.append(_Open())
        elif token == "}" and opened:
            node = opened.pop().close()
            (opened[-1].options[-1] if opened else root).append(node)
        elif token == "|" and opened:
            opened[-1].options.append([])
        elif len(token) > 4 and token.startswith("__"):
            here.append(_Wildcard(token[2:-2]))
        elif here and isinstance(here[-1], str) and token != "|":
            here[-1] += token
        else:
            here.append(token)
    for brace in opened:
        root.extend(brace.items())
    return tuple(root)


class _Files:
    """The lines of wildcard files, each file read once, for MAX_WILDCARDS requests; after them there are none.

    Names are only compared with those of the files below the folder, so no name leads out of it.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"wildcards={folder}: no such folder")
        self._folder = folder
        self._paths: dict[str, Path] | None = None
        self._lines: dict[str, list[str]] = {}
        self._num_requests = 0

    def lines(self, name: str) -> list[str]:
        """The values of a name or pattern such as `animals/*`: lines that are neither blank nor comments."""
        self._num_requests += 1
        if self._num_requests > MAX_WILDCARDS:
            return []
        if self._paths is None:
            found = sorted(self._folder.rglob("*.txt")) if self._folder else []
            self._paths = {path.relative_to(self._folder or path).with_suffix("").as_posix(): path for path in found}
        if name not in self._lines:
            names = matching(self._paths, name) if "*" in name else [name] if name in self._paths else []
            texts = [self._paths[each].read_text(encoding="utf-8-sig", errors="replace") for each in names]
            stripped = [line.strip() for text in texts for line in text.splitlines()]
            self._lines[name] = [line for line in stripped if line and not line.startswith("#")]
        return self._lines[name]


def _below(num: int, rng: random.Random) -> int:
    """A whole number in [0, num). Only `random()` itself is the same in every version of Python."""
    return int(rng.random() * num)


def _draw(choice: _Choice, rng: random.Random) -> list[_Node]:
    """Options without repetition, in the order drawn: Efraimidis and Spirakis 2006, exponential keys."""
    options = [pair for pair in choice.options if pair[0] > 0] or [(1.0, node) for _, node in choice.options]
    fewest = min(choice.fewest, len(options))
    most = len(options) if choice.most is None else min(choice.most, len(options))
    num = min(fewest, most) + _below(abs(most - fewest) + 1, rng)
    keys = [math.log(1.0 - rng.random()) / weight for weight, _ in options]
    order = sorted(range(len(options)), key=keys.__getitem__, reverse=True)
    return [options[index][1] for index in order[:num]]


def _lines_of(choice: _Choice, files: _Files) -> _Choice:
    """`{2$$__animals__}` draws two different lines: the choice among them. Any other choice as it is."""
    only = choice.options[0][1]
    if len(choice.options) > 1 or not isinstance(only, tuple):
        return choice
    nodes = [node for node in only if node != ""]
    if len(nodes) != 1 or not isinstance(nodes[0], _Wildcard):
        return choice
    lines = tuple((1.0, _parse(line)) for line in files.lines(nodes[0].name))
    return replace(choice, options=lines) if lines else choice


def choose(text: str, rng: random.Random, wildcards: Path | None = None) -> str:
    """The text with every choice made and every wildcard replaced by a line of its file in the folder `wildcards`.

    Only what was chosen is drawn on. Braces with neither `|` nor `$$`, braces that do not close, wildcards without a
    file and those past the first MAX_WILDCARDS are text; a warning names the wildcards. ValueError: no such folder.
    """
    files = _Files(wildcards)
    found: list[str] = []
    missing: dict[str, None] = {}
    todo: list[_Node] = [_parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, tuple):
            todo.extend(reversed(node))
        elif isinstance(node, _Choice):
            for index, option in enumerate(reversed(_draw(_lines_of(node, files), rng))):
                todo += [node.separator, option] if index else [option]
        else:
            lines = files.lines(node.name)
            if lines:
                todo.append(_parse(lines[_below(len(lines), rng)]))
            else:
                found.append(f"__{node.name}__")
                missing[found[-1]] = None
    if missing:
        names = ", ".join(list(missing)[:5]) + (", ..." if len(missing) > 5 else "")
        log.warning("prompt: left as text, there is no such file of wildcards, or there are too many: %s", names)
    return "".join(found)
