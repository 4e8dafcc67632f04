"""The pictures that jobs name, read once, and what they were: their SHA-256."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from sfumato.images import Picture, mask_of, read_picture
from sfumato.types import Job
from sfumato.weights.files import sha256

PICTURES = ("image", "mask", "depth")  # fields of a Job that name a picture


class Pictures:
    """The pictures that jobs name: those that were handed over under their names, else files. Each is read once."""

    def __init__(self, given: Mapping[str, Picture] | None = None) -> None:
        self._given = dict(given or {})
        self._read: dict[str, Picture] = {}
        self.hints: dict[Hashable, Tensor] = {}  # made of them beforehand: see tasks/extras.py

    def picture(self, name: str, field: str) -> Picture:
        """The picture of a name; ValueError names the job's field."""
        if name in self._given:
            return self._given[name]
        if name not in self._read:
            self._read[name] = read_picture(name, field)
        return self._read[name]

    def mask(self, name: str, field: str = "mask") -> np.ndarray:
        """The mask of a name, (H, W) float32 in [0, 1]."""
        return mask_of(self.picture(name, field))

    def size(self, job: Job) -> tuple[int, int] | None:
        """(height, width) of a job's image, None where it has none."""
        if job.image is None:
            return None
        height, width = self.picture(job.image, "image").pixels.shape[:2]
        return height, width

    def hashes(self, job: Job) -> dict[str, str]:
        """SHA-256 of the pixels of each picture that a job names and that has been looked at, by field.

        Of networks' files that it names (a depth network, an upscaler) that of the file.
        """
        found = {**self._read, **self._given}
        names = {name: getattr(job, name) for name in PICTURES}
        names |= {f"controls[{number}].image": control.image for number, control in enumerate(job.controls)}
        hashes = {name: found[value].sha256 for name, value in names.items() if value in found}
        for name in ("depth", "upscaler"):
            value = getattr(job, name)
            if name not in hashes and value is not None and Path(value).is_file():
                hashes[name] = sha256(value)
        return hashes
