"""Drawing for a measurement: captions -> pictures and their features, at each guidance, kept chunk by chunk.

A run that is stopped goes on where it was, and several processes share one: what a folder holds says of which run it
is. Knows no flags and no source of pictures. Letters: N pictures, D width of features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.evaluate.features import Network
from sfumato.evaluate.resizing import resized
from sfumato.evaluate.sharing import Claims
from sfumato.images.files import save_png, written_beside
from sfumato.pipeline import Pipeline, recipe
from sfumato.types import Job
from sfumato.weights.files import load_safetensors, save_safetensors

log = logging.getLogger(__name__)

RUN = "run.json"
ONCE = 2**40  # the claim's number of what is made once, above all chunks
POLL = 0.5  # s between two looks at what another process is making
Advance = Callable[[int], None]  # told how many pictures more are done
Key = Callable[[range], str]
Make = Callable[[range], Sequence[np.ndarray]]  # pictures (H, W, 3) uint8 of some numbers; fewer where some are broken


@dataclass(frozen=True)
class Sweep:
    """What is drawn: a picture of each caption, of seed + its number, at every guidance; `batch` pictures together."""

    captions: tuple[str, ...]
    guidance: tuple[float, ...]
    steps: int = 50
    sampler: str = "plms"
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("captions: none are given")
        if not self.guidance:
            raise ValueError("guidance: one value or more is needed")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: 1 or more is needed")

    def jobs(self, guidance: float, numbers: range) -> list[Job]:
        """The jobs of some pictures; the same captions and seeds at every guidance."""
        return [
            Job(prompt=self.captions[number], seed=self.seed + number, guidance=guidance, steps=self.steps,
                sampler=self.sampler)
            for number in numbers
        ]  # fmt: skip


def shuffled_numbers(size: int, count: int, seed: int) -> list[int]:
    """The first `count` numbers of a set of `size` pictures, in an order that the seed alone decides."""
    return [int(number) for number in np.random.default_rng(seed).permutation(size)[:count]]


def begin(folder: Path, run: dict[str, Any], networks: Sequence[Network], resize: str) -> None:
    """Say of which run a folder is; ValueError, in one line, where it is another's already."""
    seen = {network.name: [network.hash, resize, network.size] for network in networks}
    wanted = json.loads(json.dumps(run | {"features": seen}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if path.exists():
        try:
            found = json.loads(path.read_text("utf-8"))
            differ = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"out={str(path)!r}: damaged ({error}); another folder is needed") from error
        if differ:
            name = differ[0]
            raise ValueError(
                f"out={str(folder)!r}: it holds another run, of {name}={found.get(name)!r}, now {wanted.get(name)!r}; "
                f"another folder is needed"
            )
        return
    write_json(path, wanted)


def write_json(path: Path, content: Any) -> None:
    """Write beside, then rename."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def gathered(
    folder: Path, total: int, batch: int, networks: Sequence[Network], resize: str, make: Make, key: Key,
    advance: Advance,
) -> dict[str, Tensor]:  # fmt: skip
    """Features (N, D) by network of pictures 0 to `total` - 1, which `make` is asked for where they are not kept yet.

    Each chunk of `batch` pictures is one file that appears whole; a damaged one is made anew. Processes at the same
    folder make different chunks, and all wait for the last. `key` says what makes the pictures of a chunk: ValueError
    where a chunk that is kept is of others.
    """
    chunks: dict[int, dict[str, Tensor]] = {}
    pending = {at: range(start, min(start + batch, total)) for at, start in enumerate(range(0, total, batch))}
    with Claims(folder) as claims:
        while pending:
            before = len(pending)
            for at, numbers in list(pending.items()):
                path = folder / f"features-{numbers.start:07}-{numbers.stop:07}.safetensors"
                digest = hashlib.sha256(key(numbers).encode()).hexdigest()
                with claims.claimed(at) as is_mine:
                    if not is_mine:
                        continue
                    chunk = _kept(path, networks, digest)
                    if chunk is None:
                        pictures = make(numbers)
                        chunk = {network.name: _seen(network, pictures, resize) for network in networks}
                        save_safetensors(path, chunk, {"key": digest})
                chunks[at] = chunk
                del pending[at]
                advance(len(numbers))
            if len(pending) == before:  # others make what is left
                time.sleep(POLL)
    return {network.name: torch.cat([chunks[at][network.name] for at in sorted(chunks)]) for network in networks}


def once(path: Path, key: str, make: Callable[[], Any], wait: bool = True) -> Any:
    """What `make` gives, as JSON: kept at `path` with the `key` of what it is made from, and made by one process only.

    Without `wait`, None where another process is making it now.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()
    with Claims(path.parent) as claims:
        while True:
            with claims.claimed(ONCE) as is_mine:
                if is_mine:
                    found = _json_of(path)
                    if found.get("key") != digest:
                        found = json.loads(json.dumps({"key": digest, "content": make()}))
                        write_json(path, found)
                    return found["content"]
            if not wait:
                return None
            time.sleep(POLL)


def _json_of(path: Path) -> dict[str, Any]:
    """A kept file's content; empty where it is not there or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        log.warning("%s: made anew (%s)", path, error)
        return {}
    return found if isinstance(found, dict) and "content" in found else {}


def key_of(*parts: Mapping[str, Tensor] | str) -> str:
    """A key for `once`: the hash of tensors' numbers and of texts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            for name, tensor in part.items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def _seen(network: Network, pictures: Sequence[np.ndarray], resize: str) -> Tensor:
    if not pictures:
        return torch.zeros(0, network.dim)
    return network(resized(pictures, network.size, resize))


def _kept(path: Path, networks: Sequence[Network], digest: str) -> dict[str, Tensor] | None:
    """A chunk that is there and sound."""
    if not path.exists():
        return None
    try:
        found, metadata = load_safetensors(path)
    except ValueError as error:  # a disk may lose in a power cut what was written before it: it is made again
        log.warning("%s: made anew (%s)", path, error)
        return None
    if metadata.get("key") != digest:
        raise ValueError(f"out={str(path)!r}: it is of other pictures or captions; another folder is needed")
    return {network.name: found[network.name].clone() for network in networks}


def drawn_features(
    folder: Path, pipeline: Pipeline, sweep: Sweep, guidance: float, networks: Sequence[Network], resize: str,
    advance: Advance,
) -> dict[str, Tensor]:  # fmt: skip
    """Features by network of all pictures of a sweep at one guidance; the pictures are kept as PNGs with recipes.

    ValueError where the folder holds another run's.
    """
    run = {"model": pipeline.model.hash, "guidance": guidance, "steps": sweep.steps, "sampler": sweep.sampler,
           "seed": sweep.seed, "batch": sweep.batch}  # fmt: skip
    run |= {"fast": True, **pipeline.ways} if pipeline.fast else pipeline.ways
    if pipeline.model.dtype != torch.float32:
        run["precision"] = pipeline.model.precision
    begin(folder, run, networks, resize)

    def make(numbers: range) -> list[np.ndarray]:
        pictures = []
        for number, result in zip(numbers, pipeline.draw_many(sweep.jobs(guidance, numbers)), strict=True):
            save_png(folder / f"{number:07}.png", result.images[0], recipe(result, 0))
            pictures.append(result.images[0])
        return pictures

    return gathered(
        folder,
        len(sweep.captions),
        sweep.batch,
        networks,
        resize,
        make,
        lambda numbers: repr(sweep.jobs(guidance, numbers)),
        advance,
    )
