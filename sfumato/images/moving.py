"""Several pictures as one: film strips, and moving pictures as GIF or WebP files that appear whole or not at all.

Knows nothing of models. Letters: n frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.images.files import written_beside
from sfumato.images.pixels import grid

FORMATS = {".gif": "GIF", ".webp": "WEBP"}
MOST_MILLISECONDS = 60_000
HOLD = 8  # the last frame stays this many times as long


def strip(frames: Sequence[np.ndarray] | np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """n frames (H, W, 3) uint8 side by side -> one picture, with black gaps.

    `columns` is how many are shown, spread evenly from the first to the last; None shows all of them.
    """
    shown = stacked(frames)
    if gap < 0:
        raise ValueError(f"gap={gap}: 0 px or more are needed")
    if columns is not None:
        if columns < 1:
            raise ValueError(f"columns={columns}: 1 or more are needed")
        places = np.linspace(0, len(shown) - 1, min(columns, len(shown))) if columns > 1 else [len(shown) - 1]
        shown = shown[np.round(places).astype(int)]
    return grid(shown, len(shown), gap)


def stacked(frames: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The frames as one array (n, H, W, 3) uint8; ValueError where there is none or one is of another kind or size."""
    if len(frames) == 0:
        raise ValueError("frames: there is none")
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape != (*frames[0].shape[:2], 3):
            found = f"frame {index + 1} is {frame.shape} {frame.dtype}"
            raise ValueError(f"frames: {found}; (H, W, 3) uint8 of one size are needed")
    return np.stack(list(frames))


def save_moving(
    path: str | Path,
    frames: Sequence[np.ndarray] | np.ndarray,
    milliseconds: int = 100,
    loop: int = 0,
    last: int | None = None,
) -> None:
    """Write frames (H, W, 3) uint8 as a moving picture, GIF or WebP (lossless) by the ending; beside, then renamed.

    Each frame stays for `milliseconds` (GIF counts in tens), the `last` one longer: eight times, where it is None.
    `loop` counts showings, 0 is without end. ValueError for another ending and for numbers out of range.
    """
    path, shown = Path(path), stacked(frames)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path={str(path)!r}: it must end in {' or '.join(FORMATS)}")
    last = min(HOLD * milliseconds, MOST_MILLISECONDS) if last is None else last
    for name, value in (("milliseconds", milliseconds), ("last", last)):
        if not 10 <= value <= MOST_MILLISECONDS:
            raise ValueError(f"{name}={value}: 10 to {MOST_MILLISECONDS} are allowed")
    if not 0 <= loop <= 1000:
        raise ValueError(f"loop={loop}: 0 (without end) to 1000 showings are allowed")
    pictures = [Image.fromarray(frame) for frame in shown]
    format = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"duration": [milliseconds] * (len(pictures) - 1) + [last]}
    if format == "WEBP":
        options |= {"lossless": True, "loop": loop}
    elif loop != 1:  # a GIF counts showings after the first, and without the count is shown once
        options["loop"] = max(0, loop - 1)
    with written_beside(path) as beside:
        pictures[0].save(beside, format=format, save_all=True, append_images=pictures[1:], **options)
