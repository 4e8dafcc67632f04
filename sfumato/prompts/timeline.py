"""Which text is in force at which step: a prompt with `[from:to:when]` and `[a|b]` -> (until step, text) entries.

Steps are counted from 1. Rules and numbers as in A1111, among them its hires pass and its timelines before 1.6.0.
Knows nothing of AND, emphasis or tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from sfumato.prompts.grammar import Alternate, Node, Scheduled, parse, walk


def _until(when: str, steps: int, base_steps: int | None, old: bool) -> int:
    """The last step, 0 to `steps`, at which `from` still holds. `base_steps` is None in a first pass."""
    value = float(when)
    if old:
        value = value * steps if value < 1 else value
    elif "." in when:
        value = (value - (0.0 if base_steps is None else 1.0)) * steps
    else:
        value -= base_steps or 0
    return int(max(0.0, min(float(steps), value)))


def _text_at(tree: Node, step: int, until: Callable[[str], int]) -> str:
    """The text of a tree at one step."""
    found: list[str] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, Scheduled):
            todo.append(node.before if step <= until(node.when) else node.after)
        elif isinstance(node, Alternate):
            todo.append(node.options[(step - 1) % len(node.options)])
        else:
            todo.extend(reversed(node))
    return "".join(found)


@lru_cache(maxsize=256)
def _entries(text: str, steps: int, base_steps: int | None, old: bool) -> tuple[tuple[int, str], ...]:
    tree = parse(text)
    if isinstance(tree, str):
        return ((steps, tree),)
    nodes = list(walk(tree))
    until = {node.when: _until(node.when, steps, base_steps, old) for node in nodes if isinstance(node, Scheduled)}
    ends = {steps, *(step for step in until.values() if step >= 1)}
    if any(isinstance(node, Alternate) for node in nodes):
        ends.update(range(1, steps + 1))
    return tuple((end, _text_at(tree, end, until.__getitem__)) for end in sorted(ends))


def timeline(
    text: str, steps: int, *, hires: bool = False, base_steps: int | None = None, old: bool = False
) -> list[tuple[int, str]]:
    """`(until_step, text)` entries in order: an entry holds from the step after the one before it to `until_step`.

    `when` with a point in it is a fraction of `steps`, without one a step. In a hires pass of `steps` steps fractions
    count from 1.0, and steps from the `base_steps` of the first pass. `old`: the rules before A1111's 1.6.0, where
    every number below 1 is a fraction and a hires pass has the first pass's timeline, so its last entry ends at
    `base_steps`. What cannot be read is text. ValueError: steps < 1, or a hires pass without base_steps.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed")
    if hires and (base_steps is None or base_steps < 1):
        raise ValueError(f"base_steps={base_steps}: a hires pass needs the steps of the first pass, at least 1")
    if hires and old and base_steps is not None:
        return list(_entries(text, base_steps, None, True))
    return list(_entries(text, steps, base_steps if hires else None, old))
