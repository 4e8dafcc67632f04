"""A probe's questions from a TOML or JSON file, its answers as a Markdown table and a montage. Knows no model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.evaluate.probe import Asked, Probe, Tally, pooled, told
from sfumato.evaluate.readers import Options
from sfumato.evaluate.sweep import write_json
from sfumato.images.files import save_png, written_beside
from sfumato.images.fitting import fitted
from sfumato.tasks.sheet import Names, Sheet

FIELDS = ("prompt", "reads", "asks", "group")
SIDE = 128  # px, the longer side of a picture on the montage, at most
NAMED = 3  # options of an attribute that are told beside a row, the commonest ones


def read_probe(path: str | Path) -> tuple[Probe, dict[str, Options]]:
    """The questions of a file, and attribute -> option -> its texts or classes, as the file has them.

    ValueError, in one line, where it cannot be read or is no probe.
    """
    content = _content(Path(path))
    unknown = sorted(set(content) - {"prompts", "attributes"})
    if unknown:
        raise ValueError(f"prompts={str(path)!r}: {unknown[0]!r} is not known; prompts and attributes are")
    attributes = content.get("attributes", {})
    if not isinstance(attributes, dict) or not all(isinstance(options, dict) for options in attributes.values()):
        raise ValueError(f"prompts={str(path)!r}: attributes must be tables of options")
    prompts = content.get("prompts", [])
    if not isinstance(prompts, list):
        raise ValueError(f"prompts={str(path)!r}: prompts must be a list")
    asked = tuple(_asked(entry, number) for number, entry in enumerate(prompts, 1))
    return Probe(asked, {name: tuple(options) for name, options in attributes.items()}), attributes


def _content(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={str(path)!r}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"prompts={str(path)!r}: {error.strerror}") from error
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else _toml().loads(text)
    except (ValueError, RecursionError) as error:  # both formats' errors are ValueErrors
        raise ValueError(f"prompts={str(path)!r}: damaged ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"prompts={str(path)!r}: a table of prompts and attributes is needed")
    return found


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError as error:
        raise ValueError("TOML needs Python 3.11; JSON is read by every one") from error


def _asked(entry: Any, number: int) -> Asked:
    """A prompt: a text, or a table of FIELDS."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise ValueError(f"prompts, {number}: a text is needed, or a table with prompt = TEXT")
    if unknown := sorted(set(entry) - set(FIELDS)):
        raise ValueError(f"prompts, {number}: {unknown[0]!r} is not known; {', '.join(FIELDS)} are")
    reads, asks, group = entry.get("reads"), entry.get("asks", {}), entry.get("group", "")
    if reads is not None and not (isinstance(reads, list) and all(isinstance(name, str) for name in reads)):
        raise ValueError(f"prompts, {number}: reads={reads!r}: a list of attributes is needed")
    if not isinstance(asks, dict) or not all(isinstance(option, str) for option in asks.values()):
        raise ValueError(f"prompts, {number}: asks={asks!r}: a table of attribute = option is needed")
    if not isinstance(group, str):
        raise ValueError(f"prompts, {number}: group={group!r}: a text is needed")
    return Asked(entry["prompt"], None if reads is None else tuple(reads), asks, group)


def percent(share: Mapping[str, float]) -> str:
    """A share with its interval, such as 50 % (31 to 69)."""
    return f"{share['share']:.0%} ({100 * share['low']:.0f} to {100 * share['high']:.0f})".replace("%", " %")


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """What was read of each prompt or group, as Markdown: the options that came, commonest first."""
    lines = ["| prompt | pictures | attribute | asked for | read as, share (95 % interval) | evenness |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for entry in entries:
        for name, found in entry["attributes"].items():
            asked = found.get("asked")
            wanted = "" if asked is None else f"{asked['option'] or 'each its own'}: {percent(asked)}"
            said = ", ".join(f"{option} {percent(share)}" for option, share in _commonest(found["options"]))
            lines.append(
                f"| {_cell(entry['name'])} | {entry['pictures']} | {_cell(name)} | {_cell(wanted)} | {_cell(said)} | "
                f"{found['evenness']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _commonest(options: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Mapping[str, float]]]:
    came = [(option, share) for option, share in options.items() if share["count"]]
    return sorted(came, key=lambda pair: -pair[1]["count"])


def label_of(entry: Mapping[str, Any]) -> str:
    """What stands beside a row of pictures: the prompt, and what was read most."""
    parts = []
    for name, found in entry["attributes"].items():
        said = [f"{option} {share['share']:.0%}" for option, share in _commonest(found["options"])[:NAMED]]
        parts.append(f"{name}: {', '.join(said)}")
    return f"{entry['name']} - {'; '.join(parts)}" if parts else str(entry["name"])


def montage(title: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """A row for each prompt, its label before it: (H, W, 3) uint8. Pictures are made smaller, never larger."""
    small = [[_small(picture) for picture in pictures] for _, pictures in rows]
    across = max(map(len, small))
    flat = [pictures[at] if at < len(pictures) else np.full((1, 1, 3), 255, np.uint8)
            for pictures in small for at in range(across)]  # fmt: skip
    sizes = [(picture.shape[1], picture.shape[0]) for picture in flat]
    sheet = Sheet((title, ""), Names(), ([""] * across, [label for label, _ in rows], [""]), sizes)
    for index, picture in enumerate(flat):
        sheet.paste(index, picture)
    return sheet.pixels


def _small(picture: np.ndarray) -> np.ndarray:
    tall, wide = picture.shape[:2]
    scale = min(1.0, SIDE / max(tall, wide))
    return fitted(picture, max(1, round(wide * scale)), max(1, round(tall * scale)), "stretch")


def write_answers(
    folder: Path, facts: Mapping[str, Any], probe: Probe, tallies: Sequence[Tally],
    shown: Sequence[Sequence[np.ndarray]], title: str,
) -> dict[str, Any]:  # fmt: skip
    """Write results.json (and return it), table.md and montage.png, each whole or not at all; `shown` are rows."""
    prompts = [told(tally, probe.attributes) for tally in tallies]
    groups = [told(tally, probe.attributes) for tally in pooled(tallies)]
    content = {**facts, "prompts": prompts, "groups": groups}
    write_json(folder / "results.json", content)
    with written_beside(folder / "table.md") as beside:
        beside.write_text(table([*groups, *prompts]), encoding="utf-8")
    labels = [label_of(entry) for entry in prompts]
    save_png(folder / "montage.png", montage(title, list(zip(labels, shown, strict=True))))
    return content
