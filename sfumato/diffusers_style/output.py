"""What a call gives: the pictures in the form that was asked for, and which of them were flagged.

Letters: B pictures, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from sfumato.images import to_uint8

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class PipelineOutput:
    """Pictures of a call, as `.images`, ["images"], ["sample"] (diffusers before 0.3) or [0].

    `nsfw_content_detected` tells which pictures a checker flagged; None: no picture was looked at.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return vars(self)["images" if key == "sample" else key]
        return (self.images, self.nsfw_content_detected)[key]


def pictures_as(images: Tensor, kind: str) -> Any:
    """images (B, 3, H, W) about [-1, 1] as one of OUTPUT_TYPES but "latent".

    Pillow's, an array (B, H, W, 3) or a tensor (B, 3, H, W), both in [0, 1].
    """
    if kind == "pil":
        return [Image.fromarray(image) for image in to_uint8(images)]
    images = (images / 2 + 0.5).clamp(0, 1)
    return images.clone() if kind == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
