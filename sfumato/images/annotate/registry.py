"""The register of annotators: what makes a hint for a ControlNet or T2I-Adapter of a picture, by name.

To add one, write `(pixels, *, options...)` under `@annotator(...)` in a file of this package; one that needs a network
takes it as its second argument. Knows no model: a network is a callable. Letters: H W pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

Network = Callable[[np.ndarray], np.ndarray]  # pixels (H, W, 3) uint8 -> (H, W) float32 in [0, 1]
INSTALL = 'pip install "sfumato[annotate]"'


@dataclass(frozen=True)
class Option:
    """A number that an annotator takes, `low` to `high`; without a fraction where the default has none."""

    name: str
    default: float
    low: float
    high: float
    what: str

    @property
    def whole(self) -> bool:
        return isinstance(self.default, int)

    def checked(self, value: float) -> float:
        """The value; ValueError where it is out of range or has a fraction where whole numbers are wanted."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{self.name}={value!r}: a number is needed")
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            raise ValueError(f"{self.name}={value}: {kind} from {self.low} to {self.high} is needed")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Annotator:
    """A registered annotator. `network` names the kind of network that it needs: "edges" or "depth", None: none."""

    name: str
    function: Callable[..., np.ndarray]
    options: tuple[Option, ...]
    network: str | None
    summary: str


ANNOTATORS: dict[str, Annotator] = {}


def annotator(
    name: str, *options: Option, network: str | None = None
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Register the decorated function; its docstring's first line becomes the summary."""

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        summary = (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
        ANNOTATORS[name] = Annotator(name, function, options, network, summary)
        return function

    return register


def find_annotator(name: str) -> Annotator:
    """The annotator of a name; ValueError lists the names."""
    if name not in ANNOTATORS:
        raise ValueError(f"annotator={name!r}: one of {', '.join(ANNOTATORS)}")
    return ANNOTATORS[name]


def annotate(pixels: np.ndarray, name: str, network: Network | None = None, **options: float) -> np.ndarray:
    """The hint (H, W, 3) uint8 of a picture (H, W, 3) uint8, by the annotator of that name.

    ValueError names an unknown annotator or option, a value out of range, a missing network or package.
    """
    found = find_annotator(name)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image={pixels.dtype} {pixels.shape}: uint8 of shape (H, W, 3) is needed")
    known = {option.name: option for option in found.options}
    if wrong := sorted(set(options) - set(known)):
        raise ValueError(f"{wrong[0]}: {name} has no such option, but {', '.join(known) or 'none'}")
    values = {option: known[option].checked(value) for option, value in options.items()}
    values = {option.name: option.default for option in found.options} | values
    if found.network is None:
        return found.function(pixels, **values)
    if network is None:
        raise ValueError(f"annotator={name!r}: it needs a network that finds {found.network}")
    return found.function(pixels, network, **values)


def opencv(name: str) -> ModuleType:
    """OpenCV; ValueError says how to get it where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"annotator={name!r}: it needs OpenCV: {INSTALL}") from error
    return cv2


def three(grey: np.ndarray) -> np.ndarray:
    """(H, W) uint8 -> (H, W, 3) uint8."""
    return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
