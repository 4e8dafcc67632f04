"""The Python door: `Pipeline.from_pretrained(path)`, then `pipe("a red apple")` gives a Result."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato import __version__
from sfumato.engine import Engine
from sfumato.families import Family, Model, find_family
from sfumato.images import Picture, picture_from
from sfumato.kernels.build import library
from sfumato.memory import MAX_PICTURES, MAX_ROWS, Bounds, apply, budget, describe, free_memory, plan
from sfumato.memory.estimate import most_kept
from sfumato.memory.planning import query_rows_of
from sfumato.models.compiling import Compiled
from sfumato.models.graphs import Graphs
from sfumato.models.layers import hasten, slice_attention
from sfumato.tasks.catalogue import task_of
from sfumato.tasks.checks import complete, job_to_dict
from sfumato.tasks.extras import Extras
from sfumato.tasks.pictures import PICTURES, Pictures
from sfumato.tasks.room import check_memory
from sfumato.tasks.scenes import seeds_of
from sfumato.tasks.speed import Speed, UnchangedExtras, facts_of
from sfumato.tasks.studio import Studio
from sfumato.tasks.telling import named_files
from sfumato.tasks.together import Bar, Failed, Observe, Progress, apart, perform
from sfumato.types import Job, Result
from sfumato.weights.checkpoint import model_of, open_whole
from sfumato.weights.hub import resolve
from sfumato.weights.parts import Checkpoint
from sfumato.weights.placing import place
from sfumato.weights.shelf import Shelf, usual_folders
from sfumato.weights.upscalers import Upscaler

log = logging.getLogger(__name__)

PRECISIONS = {"full": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def box_path() -> Path:
    """The checkpoint inside the package."""
    return Path(str(resources.files("sfumato").joinpath("box.safetensors")))


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else the fastest there is; ValueError where it is unknown or absent."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r}: not available here ({str(error).splitlines()[0]})") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`full` is float32; `autocast` is half precision on a GPU and float32 on a CPU, of which few have more."""
    if precision == "autocast":
        return torch.float32 if device.type == "cpu" else torch.float16
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: one of autocast, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AVX512-BF16): there it is the quickest precision of a CPU."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())


def moved(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """The model on another device, in another precision. Its networks move: the model given is of no use after."""
    for network in model.networks.values():
        place(network, device, dtype)
    return replace(model, device=device, dtype=dtype)


def loaded(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, speed: Speed) -> Model:
    """A checkpoint's model, its weights as `speed` keeps them; never more of them on a GPU than that."""
    if speed.weights == "full":
        return model_of(checkpoint, device, dtype)
    model = model_of(checkpoint, torch.device("cpu"), dtype)
    speed.keep(model)
    return model if device.type == "cpu" else moved(model, device, dtype)


@dataclass(frozen=True)
class Memory:
    """What pictures must fit into: `vram` GiB, or what is free (None). Sizes of None are the family's own."""

    vram: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1


class Pipeline:
    """A loaded model ready to draw. Holds no state between calls; calls of several threads wait for each other.

    `max_rows` bounds the rows of a network call, `max_pictures` the pictures decoded at once; `tile` is the side of
    decoded tiles in pixels. `adapters` is where the names in prompts and controls are looked up. With `fast_bytes`
    each layer on a CPU goes its fastest way, and the U-Net may keep so many bytes for it; numbers differ by rounding.
    """

    def __init__(
        self,
        model: Model,
        max_rows: int = MAX_ROWS,
        tile: int | None = None,
        max_pictures: int = MAX_PICTURES,
        adapters: Shelf | None = None,
        fast_bytes: int | None = None,
        speed: Speed | None = None,
    ) -> None:
        self.model = model
        self.fast_bytes = fast_bytes
        self.speed = speed or Speed()
        self._ways: list[Compiled | Graphs] = []
        self._hasten()
        self.tile, self.max_pictures = tile, max_pictures
        self._upscalers: dict[str, Upscaler] = {}
        self.busy = threading.RLock()  # networks are changed while they draw: adapters, seamless edges, formats
        self.extras = self._extras(adapters)
        self.engine = Engine(model, max_rows, self.extras.wear)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        device: str | None = None,
        precision: str = "autocast",
        *,
        family: str | Family | None = None,
        use_ema: bool = False,
        vae: str | Path | None = None,
        variant: str | None = None,
        memory: Memory | None = None,
        adapters: str | Path | Sequence[str | Path] | None = None,
        fast: bool = False,
        compile: bool = False,
        graphs: bool = False,
        weights: str = "full",
    ) -> Pipeline:
        """Load a single file, a diffusers folder, or a model of the Hugging Face hub ("owner/name"); None is the box.

        `family` overrides what is detected, `use_ema` takes the averaged U-Net, `vae` is a file, folder or hub name
        to take the autoencoder from, `variant` names a folder's files ("fp16"). `memory` is what must be enough; the
        plan for it is logged before anything is loaded. `adapters` are the folders of LoRAs, embeddings, hypernetworks
        and ControlNets; None: those of $SFUMATO_ADAPTERS, else `models` and `embeddings` here. `fast`: on a CPU, each
        layer in its fastest way, with up to half of the free memory (or what a plan leaves) for it; in float32 alone.
        `compile`: the U-Net's blocks, when they are first needed; `graphs`: its calls as CUDA graphs; `weights`: the
        U-Net's in full, or int8 or fp8, which takes no LoRAs (docs/gpu.md).
        """
        chosen, speed = choose_device(device), Speed(compile, graphs, weights)
        speed.check(chosen, fast)
        dtype = choose_dtype(precision, chosen)
        if chosen.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16())):
            log.warning("precision: this CPU has no instructions for %s, which float32 is quicker than", precision)
        path = box_path() if path_or_id is None else resolve(path_or_id, variant=variant)
        family = find_family(family) if isinstance(family, str) else family
        other = None if vae is None else resolve(vae, variant=variant, field="vae")
        folders = [adapters] if isinstance(adapters, (str, Path)) else adapters
        shelf = Shelf(usual_folders() if folders is None else folders)
        checkpoint = open_whole(path, family, use_ema, other, variant)
        if memory is None:
            model = loaded(checkpoint, chosen, dtype, speed)
            fast = fast and chosen.type == "cpu"
            return cls(model, adapters=shelf, fast_bytes=free_memory(chosen) // 2 if fast else None, speed=speed)
        return cls._within(memory, checkpoint, chosen, None if precision == "autocast" else dtype, shelf, fast, speed)

    @classmethod
    def _within(
        cls,
        memory: Memory,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        shelf: Shelf,
        fast: bool,
        speed: Speed,
    ) -> Pipeline:
        """Plan, say the plan, load and set what it asks for."""
        family = checkpoint.family
        width, height = memory.width or family.size, memory.height or family.size
        if min(width, height) < family.size_step:
            raise ValueError(f"width={width}, height={height}: {family.size_step} px or more are needed")
        most = budget(memory.vram, device)
        found = plan(family, width, height, memory.count, most, device, dtype, speed.weights, fast)
        log.info("%s", describe(found))
        model = loaded(checkpoint, torch.device("cpu") if found.offload else device, found.dtype, speed)
        model = replace(model, device=device)
        apply(found, model)
        return cls(model, found.max_rows, found.tile, found.max_pictures, shelf, found.keep if fast else None, speed)

    def _hasten(self) -> None:
        """Anew after every move: what was kept is dropped. A decoder's maps are so large that it need keep nothing."""
        if self.fast_bytes is not None:  # who trains has hastened what it draws with
            hasten(self.model.unet, keep=self.fast_bytes)
            hasten(self.model.autoencoder)
            if not self.fast:
                log.warning("fast: nothing is faster on %s in %s", self.model.device, self.model.precision)
        for way in self._ways:
            way.remove()
        self._ways = self.speed.ready(self.model)

    def _extras(self, shelf: Shelf | None) -> Extras:
        return (Extras if self.speed.weights == "full" else UnchangedExtras)(self.model, shelf)

    @property
    def ways(self) -> dict[str, str]:
        """What of `speed` decides the last bits of a picture."""
        return facts_of(self.model, self.speed.weights, self._ways)

    @property
    def made_with(self) -> dict[str, str]:
        """What else than the job decides the last bit of a picture."""
        torch_version = torch.__version__.partition("+")[0]
        known = {"sfumato": __version__, "torch": torch_version, "device": self.model.device.type}
        fast = {"fast": "yes"} | ({} if library() is None else {"kernels": "compiled"}) if self.fast else {}
        return known | fast | self.ways | self.bounds.facts

    @property
    def bounds(self) -> Bounds:
        """How much is computed at once, and kept where what is asked for may not all fit."""
        short = self.fast and self.fast_bytes is not None and self.fast_bytes < most_kept(self.model.family)
        kept = self.fast_bytes if short else None
        return Bounds(self.engine.max_rows, self.max_pictures, query_rows_of(self.model), self.tile, kept)

    def bound(self, bounds: Bounds) -> None:
        """Compute so much at once from now on; hastened layers keep no more than this and what they had room for."""
        with self.busy:
            self.engine.max_rows, self.max_pictures, self.tile = bounds.max_rows, bounds.max_pictures, bounds.tile
            for network in (self.model.unet, self.model.autoencoder):
                slice_attention(network, bounds.query_rows)
            if self.fast_bytes is not None and bounds.fast_bytes is not None:
                self.fast_bytes = min(self.fast_bytes, bounds.fast_bytes)
                self._hasten()

    @property
    def fast(self) -> bool:
        """Whether what is drawn now is drawn the fast way: it was asked for, on a CPU, and there is one.

        In float32 there always is; in bfloat16, which autocast may be as well, it is the compiled kernels.
        """
        if self.fast_bytes is None or self.model.device.type != "cpu":
            return False
        half = torch.is_autocast_enabled("cpu") or self.model.dtype != torch.float32
        return not half or (self.model.dtype != torch.float16 and library() is not None)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move the model, and compute in another precision; None leaves as it is. Returns the pipeline itself."""
        there = self.model.device if device is None else choose_device(str(device))
        then = self.model.dtype if dtype is None else dtype
        if (there, then) != (self.model.device, self.model.dtype):
            self.model = moved(self.model, there, then)
            self._hasten()
            self._upscalers.clear()
            self.extras = self._extras(self.extras.shelf)
            self.engine = Engine(self.model, self.engine.max_rows, self.extras.wear)
        return self

    def __call__(self, prompt: str = "", progress: Progress | None = None, **fields: Any) -> Result:
        """Draw `prompt`; further keyword arguments are fields of Job.

        `image`, `mask` and `depth` may be pictures of Pillow or arrays (H, W, 3) uint8 instead of a file's path.
        """
        given = {}
        for name in PICTURES:
            if fields.get(name) is not None and not isinstance(fields[name], (str, Path)):
                picture = picture_from(fields[name], name)
                fields[name] = f"sha256:{picture.sha256}"
                given[fields[name]] = picture
            elif isinstance(fields.get(name), Path):
                fields[name] = str(fields[name])
        return self.draw(Job(prompt=prompt, **fields), progress, given)

    def draw(
        self,
        job: Job,
        progress: Progress | None = None,
        pictures: Mapping[str, Picture] | None = None,
        observe: Observe | None = None,
    ) -> Result:
        """Draw a job. `progress(done, total)` is called after each network call with steps done, of all passes.

        `pictures` are those that the job names and that are no files. `observe` is shown every run before it begins.
        """
        return self.draw_many([job], progress, pictures, observe)[0]

    def draw_many(
        self,
        jobs: Sequence[Job],
        progress: Progress | None = None,
        pictures: Mapping[str, Picture] | None = None,
        observe: Observe | None = None,
    ) -> list[Result]:
        """Draw jobs together, their rows in shared network calls. `progress` counts the steps of all pictures.

        `observe` is shown every run before it begins, with its scene and which of the scene's pictures it draws: it may
        set the run's `watch`, or put something around its guidance. The first error of a job ends all: see `draw_each`.
        """
        drawn = self._draw(jobs, progress, pictures, observe, None)
        return [drawn[number] for number in range(len(jobs))]

    def draw_each(
        self,
        jobs: Sequence[Job],
        progress: Progress | None = None,
        pictures: Mapping[str, Picture] | None = None,
        observe: Observe | None = None,
    ) -> list[Result | Exception]:
        """Draw jobs together as `draw_many` does, but a job that fails, fails alone: its error stands in its place."""
        failed: Failed = {}
        drawn = self._draw(jobs, progress, pictures, observe, failed)
        return [failed[number] if number in failed else drawn[number] for number in range(len(jobs))]

    def _draw(
        self,
        jobs: Sequence[Job],
        progress: Progress | None,
        pictures: Mapping[str, Picture] | None,
        observe: Observe | None,
        failed: Failed | None,
    ) -> dict[int, Result]:
        """The results by the jobs' numbers. Errors go to `failed`; where that is None the first is raised."""
        began = time.perf_counter()
        shelf = Pictures(pictures)
        whole: dict[int, Job] = {}
        for number, job in enumerate(jobs):
            with apart(number, failed):
                job = complete(job, self.model.family, shelf.size(job))
                check_memory([job], self.model, shelf, self.tile)
                whole[number] = job
        studio = self.studio(shelf)
        with self.busy:
            self.extras.pictures = shelf
            try:
                tasks = {number: task_of(job, studio) for number, job in whole.items()}
                images = perform(tasks, Bar(progress, observe), self.engine, self.extras, failed)
            finally:
                self.extras.wear(())
        seconds = time.perf_counter() - began
        results: dict[int, Result] = {}
        for number, image in images.items():
            with apart(number, failed):
                results[number] = self.result(whole[number], image, shelf.hashes(whole[number]), seconds)
        return results

    def studio(self, pictures: Pictures) -> Studio:
        """What the tasks of jobs that name these pictures work with."""
        return Studio(self.model, pictures, self.tile, self.max_pictures, self._upscalers, self.extras)

    def result(self, job: Job, images: np.ndarray, pictures: dict[str, str], seconds: float) -> Result:
        """The pictures (B, H, W, 3) uint8 of a complete job, with all that is needed to make them again."""
        return Result(
            images=images,
            job=job,
            seeds=seeds_of(job),
            seconds=seconds,
            pictures=pictures,
            adapters=named_files(job, self.model, self.extras),
            model_name=self.model.name,
            model_hash=self.model.hash,
            model_facts=self.model.facts,
            precision=self.model.precision,
            made_with=self.made_with,
        )


def recipe(result: Result, index: int) -> dict[str, Any]:
    """What picture `index` of a result carries in its PNG, enough for `sfumato replay` to draw it again."""
    return {
        "job": job_to_dict(result.job),
        "index": index,
        "seed": result.seeds[index],
        "model": {"name": result.model_name, "hash": result.model_hash, **result.model_facts},
        **({"pictures": result.pictures} if result.pictures else {}),
        **({"adapters": result.adapters} if result.adapters else {}),
        "precision": result.precision,
        "made with": result.made_with,
    }
