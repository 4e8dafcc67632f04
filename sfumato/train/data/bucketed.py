"""Pictures of any size -> batches of one size each, cropped and flipped the same way in every run.

Knows no network. A ticket is the number of a picture plus the number of the pass times the number of pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sfumato.train.data.buckets import Size, merged, nearest
from sfumato.train.data.captioned import CaptionedBatch
from sfumato.train.data.order import BatchOrder, share
from sfumato.train.data.pictures import Pictures, line_of, read, size_of, substitutes

log = logging.getLogger(__name__)

CROPS = ("centre", "random")
SMALL = ("merge", "refuse")


def all_sizes(pictures: Pictures) -> np.ndarray:
    """(n, 2) widths and heights, (0, 0) where a picture is broken, which the report then says."""
    sizes = np.zeros((len(pictures), 2), dtype=np.int32)
    for index in tqdm(range(len(pictures)), desc="sizes", unit="pictures", leave=False, disable=None):
        try:
            sizes[index] = size_of(pictures, index)
        except (ValueError, OSError) as error:
            pictures.report.note_broken(pictures.name(index), line_of(error))
    return sizes


def cropped(pixels: np.ndarray, size: Size, place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) of `size` (width, height): the largest part of that shape, resized.

    `place` in [0, 1] says where in what is left over the part lies, from the left and from the top.
    """
    tall, wide = pixels.shape[:2]
    scale = max(size[0] / wide, size[1] / tall)
    part_wide, part_tall = min(wide, size[0] / scale), min(tall, size[1] / scale)
    left, top = place[0] * (wide - part_wide), place[1] * (tall - part_tall)
    if (part_wide, part_tall) == size:  # nothing to resize: whole pixels
        left, top = round(left), round(top)
        return pixels[top : top + size[1], left : left + size[0]]
    box = (left, top, min(wide, left + part_wide), min(tall, top + part_tall))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=box))


class Bucketed:
    """Batches of pictures: `sizes` is one (width, height), or several of which each picture gets the nearest.

    `crop` "centre" or "random" (anew in each pass), `flip` mirrors half of the pictures; both are functions of
    (seed, picture, pass). A size with fewer pictures than a batch is merged into the nearest, or refused (`small`).
    A broken picture is replaced by another of its size, always the same, and told in `pictures.report`.
    """

    def __init__(
        self,
        pictures: Pictures,
        sizes: Size | Sequence[Size],
        batch_size: int,
        seed: int = 0,
        crop: str = "centre",
        flip: bool = False,
        small: str = "merge",
        need_captions: bool = True,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop={crop!r}: one of {', '.join(CROPS)}")
        if small not in SMALL:
            raise ValueError(f"small={small!r}: one of {', '.join(SMALL)}")
        self.pictures = pictures
        self.batch_size = batch_size
        self.seed = seed
        self.crop = crop
        self.flip = flip
        self.need_captions = need_captions
        self.sizes = _checked_sizes(sizes)
        self._members, self._bucket = self._assigned(small)
        used = [k for k, members in enumerate(self._members) if len(members)]
        self.sizes = [self.sizes[k] for k in used]
        self._members = [self._members[k] for k in used]
        renumbered = np.full(max(used) + 1, -1, dtype=np.int32)
        renumbered[used] = np.arange(len(used))
        self._bucket = np.where(self._bucket < 0, -1, renumbered[self._bucket])
        self.order = BatchOrder([len(members) for members in self._members], batch_size, seed, pictures.near)

    def _assigned(self, small: str) -> tuple[list[np.ndarray], np.ndarray]:
        """The pictures of each size, and the size of each picture, -1 where it is known to be broken."""
        count = len(self.pictures)
        if len(self.sizes) == 1:  # nothing needs to be known of the pictures
            bucket = np.zeros(count, dtype=np.int32)
            merged(bucket, self.sizes, self.batch_size)
            return [np.arange(count)], bucket
        found = all_sizes(self.pictures)
        usable = np.flatnonzero(found[:, 0])
        chosen = nearest(found[usable], self.sizes)
        lasting = merged(chosen, self.sizes, self.batch_size)
        lost = sorted(set(chosen.tolist()) - set(lasting.tolist()))
        if lost:
            names = ", ".join(f"{width}x{height}" for width, height in (self.sizes[k] for k in lost[:8]))
            if small == "refuse":
                raise ValueError(f"batch_size={self.batch_size}: fewer pictures than that have the size {names}")
            log.info("%d sizes with fewer than %d pictures are merged: %s", len(lost), self.batch_size, names)
        bucket = np.full(count, -1, dtype=np.int32)
        bucket[usable] = lasting
        return [np.flatnonzero(bucket == k) for k in range(len(self.sizes))], bucket

    def __len__(self) -> int:
        return len(self.pictures)

    def counts(self) -> dict[Size, int]:
        """How many pictures have which size."""
        return {size: len(members) for size, members in zip(self.sizes, self._members, strict=True)}

    def indices_at(self, step: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """Rank `rank`'s tickets of step `step`; all ranks' together are one batch of one size."""
        bucket, inside, passes = self.order.at(step)
        tickets = self._members[bucket][inside] + passes * len(self)
        return share(tickets.tolist(), rank, ranks)

    def batch(self, indices: Sequence[int]) -> CaptionedBatch:
        """Tickets -> pixels (B, 3, height, width) in [-1, 1] and captions. ValueError where they differ in size."""
        buckets = {int(self._bucket[ticket % len(self)]) for ticket in indices}
        if len(buckets) != 1 or buckets == {-1}:
            raise ValueError(f"indices={list(indices)[:4]}: pictures of different sizes, or broken ones, in one batch")
        bucket = buckets.pop()
        return _stacked([self._one(ticket, bucket) for ticket in indices])

    def members(self, bucket: int) -> list[int]:
        """The tickets, in the first pass, of the pictures of size number `bucket`."""
        found: list[int] = self._members[bucket].tolist()
        return found

    def readable(self, indices: Sequence[int]) -> CaptionedBatch | None:
        """As `batch`, without what is broken; None where nothing is left."""
        found = []
        for ticket in indices:
            index = ticket % len(self)
            size = self.sizes[self._bucket[index]]
            got = read(self.pictures, index, size, self.need_captions)
            if got is not None:
                found.append((self._made(got[0], ticket, size), got[1]))
        return _stacked(found) if found else None

    def _one(self, ticket: int, bucket: int) -> tuple[np.ndarray, str]:
        """Pixels and caption of a ticket, or of the picture that stands in for it."""
        index, size, members = ticket % len(self), self.sizes[bucket], self._members[bucket]
        got = read(self.pictures, index, size, self.need_captions)
        stand_ins = substitutes(index, len(members), self.seed)
        while got is None:
            other = next(stand_ins, None)
            if other is None:
                raise ValueError(f"data={str(self.pictures.path)!r}: a hundred pictures in a row are broken")
            got = read(self.pictures, int(members[other]), size, self.need_captions)
        return self._made(got[0], ticket, size), got[1]

    def _made(self, pixels: np.ndarray, ticket: int, size: Size) -> np.ndarray:
        """(H, W, 3) uint8 -> (height, width, 3), cropped and flipped as the ticket says."""
        epoch, index = divmod(ticket, len(self))
        draw = np.random.default_rng([self.seed, index, epoch]).random(3)
        place = (float(draw[0]), float(draw[1])) if self.crop == "random" else (0.5, 0.5)
        pixels = cropped(pixels, size, place)
        return np.ascontiguousarray(pixels[:, ::-1] if self.flip and draw[2] < 0.5 else pixels)


def _stacked(found: Sequence[tuple[np.ndarray, str]]) -> CaptionedBatch:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in found])).permute(0, 3, 1, 2)
    scaled = pixels.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1.0)
    return CaptionedBatch(scaled, [caption for _, caption in found])


def _checked_sizes(sizes: Size | Sequence[Size]) -> list[Size]:
    listed: list[Size] = [sizes] if isinstance(sizes[0], int) else list(sizes)  # type: ignore[list-item, arg-type]
    for size in listed:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"sizes={size}: (width, height) in pixels is needed")
    return list(dict.fromkeys(listed))
