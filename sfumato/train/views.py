"""Pictures as a trainer sees them: cut to size, mirrored, each with its frame and its hint; and their latents.

The frame says what was cut out of which size, for models that are told so. A picture's cut is a function of (seed,
picture, pass). Knows no loss. Letters: B pictures, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.train.config import LoopConfig
from sfumato.train.data import Bucketed, CaptionedBatch, Pictures
from sfumato.train.data.bucketed import cropped
from sfumato.train.data.decoding import decode
from sfumato.train.data.listed import pictures_under
from sfumato.train.data.pictures import caption_in, read, size_of, substitutes
from sfumato.train.diffusion import FramedBatch
from sfumato.train.seen import depths, edited, masked, random_mask

KEPT_BYTES = 2**30  # of latents and hints that stay in memory
MASKS = 1  # of the randomness of a ticket, what its mask takes

Annotate = Callable[[np.ndarray], np.ndarray]  # a picture (H, W, 3) uint8 -> its hint, alike


@dataclass(frozen=True)
class Shown:
    """How pictures are shown to what is trained: at `size` px square, or near it in each one's own shape (`buckets`).

    `crop` is "centre" or "random", `flip` mirrors half of them.
    """

    size: int
    buckets: Sequence[tuple[int, int]] | None = None
    crop: str = "centre"
    flip: bool = False

    @property
    def augmented(self) -> bool:
        """Whether a picture looks another way in each pass."""
        return self.crop == "random" or self.flip

    def batches(self, pictures: Pictures, config: LoopConfig, need_captions: bool = True) -> Bucketed:
        """The pictures in batches, in the order that the run's seed gives."""
        sizes = self.buckets or (self.size, self.size)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says so; a batch is of all ranks together
        whole = config.batch_size * ranks
        return Bucketed(pictures, sizes, whole, config.seed, self.crop, self.flip, need_captions=need_captions)


class Captioned:
    """A set of pictures that all have the one caption."""

    def __init__(self, pictures: Pictures, caption: str) -> None:
        self.pictures, self.caption = pictures, caption
        self.path, self.kind, self.report = pictures.path, pictures.kind, pictures.report

    @property
    def near(self) -> int:
        """As the set's."""
        return self.pictures.near

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        """As the set's."""
        return self.pictures.name(index)

    def data(self, index: int) -> bytes:
        """As the set's."""
        return self.pictures.data(index)

    def facts(self, index: int) -> dict[str, Any]:
        """As the set's, with the caption."""
        return self.pictures.facts(index) | {"caption": self.caption}


def check_captions(pictures: Pictures) -> None:
    """ValueError, in a line, where a picture has no caption."""
    bare = [index for index in range(len(pictures)) if caption_in(pictures.facts(index)) is None]
    if bare:
        raise ValueError(
            f"caption=None: {len(bare)} of {len(pictures)} pictures have none, first {pictures.name(bare[0])}; write a "
            ".txt of the same name beside each, or give one caption for all"
        )


class Hints:
    """Hints that lie as pictures of the same names in another folder. ValueError, naming `field`, where one is not."""

    def __init__(self, folder: str | Path, pictures: Pictures, field: str = "hints") -> None:
        self.folder, self.pictures, self.field = Path(folder), pictures, field
        if not self.folder.is_dir():
            raise ValueError(f"{field}={str(folder)!r}: no such folder")
        found = {str(Path(name).with_suffix("")): self.folder / name for name in pictures_under(self.folder)}
        names = [self._name(index) for index in range(len(pictures))]
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"{field}={str(folder)!r}: none for {len(missing)} of {len(names)} pictures, first {missing[0]!r}"
            )
        self._paths = [found[name] for name in names]

    def _name(self, index: int) -> str:
        path = Path(self.pictures.name(index))
        if path.is_relative_to(self.pictures.path) and path.is_file():
            return str(path.relative_to(self.pictures.path).with_suffix(""))
        return str(self.pictures.facts(index).get("key", path.stem))

    def read(self, index: int, shape: tuple[int, int]) -> np.ndarray:
        """The hint (H, W, 3) uint8 of picture `index`, of (width, height) `shape`; ValueError for another shape."""
        path = self._paths[index]
        try:
            pixels = decode(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.field}={str(path)!r}: {error}") from error
        tall, wide = pixels.shape[:2]
        if abs(wide * shape[1] - tall * shape[0]) > max(wide, tall) + max(shape):  # beyond a pixel's rounding
            raise ValueError(f"{self.field}={str(path)!r}: {wide} x {tall} px, its picture is {shape[0]} x {shape[1]}")
        return pixels


@dataclass(frozen=True)
class View(CaptionedBatch):
    """A batch with its frames (B, 6), as in FramedBatch, and its hints (B, 3, H, W) uint8."""

    frames: Tensor
    hints: Tensor | None = None


class Views:
    """Batches of views in the order of `batches`; `hints` makes hints of what is seen, or reads them."""

    def __init__(self, batches: Bucketed, hints: Annotate | Hints | None = None) -> None:
        self.batches, self.hints = batches, hints
        self.batch_size = batches.batch_size
        self._members = [batches.members(number) for number in range(len(batches.sizes))]
        self._bucket = {index: number for number, members in enumerate(self._members) for index in members}

    def __len__(self) -> int:
        return len(self.batches)

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The tickets of a step."""
        return self.batches.indices_at(step, rank, ranks)

    def batch(self, indices: Sequence[int]) -> View:
        """Tickets -> pixels (B, 3, H, W) in [-1, 1], captions, frames and hints."""
        pixels, captions, frames, hints = zip(*(self._one(ticket) for ticket in indices), strict=True)
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        shown = stacked.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1.0)
        steering = None
        if self.hints is not None:
            steering = torch.from_numpy(np.stack(hints)).permute(0, 3, 1, 2).contiguous()
        return View(shown, list(captions), torch.tensor(frames, dtype=torch.float32), steering)

    def _one(self, ticket: int) -> tuple[np.ndarray, str, tuple[int, ...], np.ndarray | None]:
        """Pixels, caption, frame and hint of a ticket, or of the picture that stands in for a broken one."""
        seen, pictures = self.batches, self.batches.pictures
        epoch, first = divmod(ticket, len(self))
        size = seen.sizes[self._bucket[first]]
        members = self._members[self._bucket[first]]
        stand_ins = (members[other] for other in substitutes(first, len(members), seen.seed))
        for index in (first, *stand_ins):
            got = read(pictures, index, size, seen.need_captions)
            if got is not None:
                break
        else:
            raise ValueError(f"data={str(pictures.path)!r}: a hundred pictures in a row are broken")
        draw = np.random.default_rng([seen.seed, first, epoch]).random(3)
        place = (float(draw[0]), float(draw[1])) if seen.crop == "random" else (0.5, 0.5)
        mirrored = seen.flip and draw[2] < 0.5

        def cut(pixels: np.ndarray) -> np.ndarray:
            part = cropped(pixels, size, place)
            return np.ascontiguousarray(part[:, ::-1] if mirrored else part)

        original = size_of(pictures, index)
        pixels, hint = cut(got[0]), None
        if isinstance(self.hints, Hints):
            hint = cut(self.hints.read(index, original))
        elif self.hints is not None:
            hint = self.hints(pixels)
        return pixels, got[1], frame_of(original, size, place, mirrored), hint


def frame_of(
    original: tuple[int, int], size: tuple[int, int], place: tuple[float, float], mirrored: bool
) -> tuple[int, ...]:
    """A row of FramedBatch's frames, of a picture and a cut of (width, height); `place` as in `cropped`.

    The cut's corner is counted in the picture once resized and mirrored, as in the common trainers of XL.
    """
    scale = max(size[0] / original[0], size[1] / original[1])
    over = [scale * length - cut for length, cut in zip(original, size, strict=True)]
    across = 1 - place[0] if mirrored else place[0]
    return original[1], original[0], round(place[1] * over[1]), round(across * over[0]), size[1], size[0]


class Encoded:
    """Batches of latents of pictures, encoded when they are asked for, in the pictures' own order.

    With `keep` those of each picture stay in memory once they are there, each encoded alone, so that no bit depends on
    what came with it. For pictures that look the same in every pass. For a model that inpaints, a part of each picture
    is hidden as well, another one in every pass: those are not kept. A model that edits or sees depth takes the views'
    hints; ValueError where they have none.
    """

    def __init__(self, pictures: Bucketed | Views, model: Model, keep: bool = False) -> None:
        self.pictures, self.model = pictures, model
        self.batch_size = pictures.batch_size
        concat = model.family.concat
        if concat in ("picture", "depth") and (isinstance(pictures, Bucketed) or pictures.hints is None):
            seen = "the pictures that are edited" if concat == "picture" else "depth maps"
            raise ValueError(f"seen=None: {model.family.name}'s U-Net sees {seen}, a folder of them is needed")
        self._kept: dict[int, FramedBatch] | None = {} if keep and concat != "inpaint" else None

    def __len__(self) -> int:
        return len(self.pictures)

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The pictures' own order."""
        return self.pictures.indices_at(step, rank, ranks)

    @property
    def keeps(self) -> bool:
        """Whether latents stay in memory."""
        return self._kept is not None

    def batch(self, indices: Sequence[int]) -> FramedBatch:
        """Posterior means and deviations, captions, and frames and hints where the pictures have them."""
        if self._kept is None:
            return self._encoded(indices)
        rows = []
        for ticket in indices:
            index = ticket % len(self)
            if index not in self._kept:
                self._kept[index] = self._encoded([index])
            rows.append(self._kept[index])
        return joined(rows)

    @torch.no_grad()
    def _encoded(self, tickets: Sequence[int]) -> FramedBatch:
        given = self.pictures.batch(tickets)
        images = given.pixels.to(self.model.device)
        posterior = self.model.autoencoder.encode(images)
        frames, hints = (given.frames, given.hints) if isinstance(given, View) else (None, None)
        beside = self._beside(tickets, images, hints)
        hints = hints if beside is None else None
        return FramedBatch(posterior.mean, posterior.std, given.captions, frames=frames, hints=hints, beside=beside)

    def _beside(self, tickets: Sequence[int], images: Tensor, hints: Tensor | None) -> Tensor | None:
        """What the model's U-Net sees beside x."""
        concat = self.model.family.concat
        if concat == "inpaint":
            seed = self.pictures.seed if isinstance(self.pictures, Bucketed) else self.pictures.batches.seed
            rngs = [np.random.default_rng([seed, ticket, MASKS]) for ticket in tickets]
            masks = np.stack([random_mask(rng, *images.shape[2:]) for rng in rngs])
            return masked(self.model, images, torch.from_numpy(masks)[:, None].to(images))
        if concat is None or hints is None:
            return None
        shown = hints.to(images)
        return depths(self.model, shown) if concat == "depth" else edited(self.model, shown / 127.5 - 1)


def joined(parts: Sequence[FramedBatch]) -> FramedBatch:
    """Batches of one size as one; what only some have is left out."""

    def all_of(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(each is None for each in found) else torch.cat(found)

    captions = [caption for part in parts for caption in part.captions]
    mean, std = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std"))
    more = {name: all_of(name) for name in ("context", "frames", "hints", "shares", "beside")}
    return FramedBatch(mean, std, captions, **more)


def latents_of(
    model: Model, pictures: Pictures, shown: Shown, config: LoopConfig, hints: Annotate | Hints | None = None,
    need_captions: bool = True,
) -> Encoded:  # fmt: skip
    """The latents of pictures in batches; kept in memory where they are few and look alike in every pass."""
    pixels = shown.size * shown.size
    factor, channels = model.family.autoencoder.factor, model.family.autoencoder.latent_channels
    each = 8 * channels * pixels // factor**2 + (3 * pixels if hints is not None else 0)
    keep = not shown.augmented and each * len(pictures) <= KEPT_BYTES
    return Encoded(Views(shown.batches(pictures, config, need_captions), hints), model, keep)
