"""Depth maps: a person's own picture of depth, or found by a network that a person has as an ONNX file.

Bright is near, as MiDaS (Ranftl et al. 2020) writes it. Letters: H W pixels.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.images import resize
from sfumato.images.fitting import fitted
from sfumato.tasks.canvas import Canvas
from sfumato.tasks.studio import Studio
from sfumato.types import Job

SIDE = 384  # px, what MiDaS's hybrid network was trained on; of networks that say no size
# Of each channel in [0, 1]: the DPT networks of MiDaS want [-1, 1].
MEAN, STD = 0.5, 0.5


def depth_of(canvas: Canvas, job: Job, studio: Studio) -> np.ndarray:
    """The depth of a canvas, (H, W) float32.

    `job.depth` names a picture of the whole image's depth, in any size, whose luminance it is; or a network's .onnx
    file. ValueError without one, and where it is flat.
    """
    if job.depth is None:
        name = studio.model.name
        raise ValueError(f"depth=None: {name!r} wants a depth map of the image, or an .onnx file of a depth network")
    if Path(job.depth).suffix.lower() == ".onnx":
        return estimated(canvas.pixels, job.depth)
    found = studio.pictures.mask(job.depth, "depth")
    if found.min() == found.max():
        raise ValueError(f"depth={job.depth!r}: it is the same grey everywhere, so it says nothing")
    return canvas.carried(found)


def estimated(pixels: np.ndarray, path: str) -> np.ndarray:
    """The depth (H, W) float32 in [0, 1] that the network of an ONNX file finds in a picture (H, W, 3) uint8.

    The network takes one picture (1, 3, h, w) and gives (1, h, w) or (1, 1, h, w). ValueError where it does not.
    """
    session = _session(path)
    [wanted, *more] = session.get_inputs()
    if more or len(wanted.shape) != 4:
        raise ValueError(f"depth={path!r}: a network of one input (1, 3, h, w) is needed, it has {wanted.shape}")
    height, width = (side if isinstance(side, int) else SIDE for side in wanted.shape[2:])
    small = resize(pixels[None], width, height, "bicubic")[0].astype(np.float32) / 255
    found = np.asarray(session.run(None, {wanted.name: ((small - MEAN) / STD).transpose(2, 0, 1)[None]})[0])
    found = found.reshape(found.shape[-2:]).astype(np.float32)
    low, high = float(found.min()), float(found.max())
    if not high > low:
        raise ValueError(f"depth={path!r}: the network finds the same depth everywhere")
    return fitted((found - low) / (high - low), pixels.shape[1], pixels.shape[0], "stretch", "bicubic")


@lru_cache(maxsize=1)
def _session(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"depth={path!r}: no such file")
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"depth={path!r}: an .onnx file needs onnxruntime (pip install onnxruntime)") from error
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise ValueError(f"depth={path!r}: not a readable ONNX network ({error})") from error
