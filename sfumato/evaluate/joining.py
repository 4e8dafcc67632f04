"""Results of several sweeps as one: points that were measured at different times, or on different machines.

Points may stand in one figure where each metric was computed of the same features of as many pictures. Knows no flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ALIKE = ("features", "hash", "resize", "size", "real", "drawn")  # what makes a metric's numbers comparable
SETTINGS = ("steps", "sampler", "seed", "samples")


def read_results(path: Path) -> dict[str, Any]:
    """What `sfumato evaluate` wrote to a results.json; ValueError, in one line, where it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"join={str(path)!r}: not readable as results.json ({error})") from error
    needed = ("checkpoint", "model hash", "guidance", "metrics", *SETTINGS)
    points = found.get("points") if isinstance(found, dict) else None
    if (
        not isinstance(points, list)
        or not points
        or not all(isinstance(p, dict) and set(needed) <= p.keys() for p in points)
    ):
        raise ValueError(f"join={str(path)!r}: it holds no points of a sweep")
    return found


def joined(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One set of points of those in `results` (file name -> content), by checkpoint and guidance.

    ValueError where they cannot stand side by side: of other real pictures, features or settings, or one twice.
    """
    first_name, first = next(iter(results.items()))
    example = first["points"][0]
    points: dict[tuple[str, str, float], Mapping[str, Any]] = {}
    for name, content in results.items():
        if content.get("data") != first.get("data"):
            raise ValueError(
                f"join={name!r}: of data {content.get('data')!r}, {first_name!r} is of {first.get('data')!r}"
            )
        for point in content["points"]:
            _check_alike(name, point, first_name, example)
            place = (point["checkpoint"], point["model hash"], point["guidance"])
            if place in points:
                raise ValueError(f"join={name!r}: guidance {place[2]:g} of {place[0]} is there twice")
            points[place] = point
    order = list(dict.fromkeys(place[:2] for place in points))
    if len({label for label, _ in order}) < len(order):
        raise ValueError("join: two models have the same name; rename one of the checkpoints in its results.json")
    at = sorted(points, key=lambda place: (order.index(place[:2]), place[2]))
    return {"sfumato": first.get("sfumato"), "data": first.get("data"), "points": [points[place] for place in at]}


def _check_alike(name: str, point: Mapping[str, Any], first_name: str, example: Mapping[str, Any]) -> None:
    def refuse(what: str, value: object, other: object) -> ValueError:
        return ValueError(f"join={name!r}: {what} {value!r}, in {first_name!r} {other!r}: not to be compared")

    for field in SETTINGS:
        if point[field] != example[field]:
            raise refuse(field, point[field], example[field])
    ours, theirs = point["metrics"], example["metrics"]
    if ours.keys() != theirs.keys():
        raise refuse("metrics", sorted(ours), sorted(theirs))
    for metric in ours:
        for field in ALIKE:
            if ours[metric].get(field) != theirs[metric].get(field):
                raise refuse(f"{metric}'s {field}", ours[metric].get(field), theirs[metric].get(field))


def join_files(paths: Sequence[Path]) -> dict[str, Any]:
    """`joined` of files, each once."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("join: a file is named twice")
    return joined({str(path): read_results(path) for path in paths})
