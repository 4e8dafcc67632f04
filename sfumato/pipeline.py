"""The Python door: `Pipeline.from_pretrained(path)`, then `pipe("a red apple")` gives a Result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sfumato import __version__
from sfumato.engine import Engine
from sfumato.families import Model
from sfumato.images import to_uint8
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete
from sfumato.types import Answer, Job, Query, Result
from sfumato.weights.checkpoint import load_model

log = logging.getLogger(__name__)

PRECISIONS = {"full": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[int, int], None]


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
    """`full` is float32; `autocast` is half precision on a GPU and float32 on a CPU, where half is slower."""
    if precision == "autocast":
        return torch.float32 if device.type == "cpu" else torch.float16
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: one of autocast, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


class Pipeline:
    """A loaded model ready to draw. Holds no state between calls."""

    def __init__(self, model: Model, max_rows: int = 32) -> None:
        self.model = model
        self.engine = Engine(model, max_rows)

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str | None = None, precision: str = "autocast"
    ) -> Pipeline:
        """Load a single-file checkpoint, or the model in the box where `path` is None."""
        place = choose_device(device)
        return cls(load_model(box_path() if path is None else path, place, choose_dtype(precision, place)))

    def __call__(self, prompt: str = "", progress: Progress | None = None, **fields: Any) -> Result:
        """Draw `prompt`; further keyword arguments are fields of Job."""
        return self.draw(Job(prompt=prompt, **fields), progress)

    def draw(self, job: Job, progress: Progress | None = None) -> Result:
        """Draw a job. `progress(done, total)` is called after each network call with noise levels done."""
        began = time.perf_counter()
        job = complete(job, self.model.family)
        sigmas = txt2img.sigmas_of(job, self.model)
        total = len(sigmas) - 1

        def watch(query: Query, answer: Answer) -> None:
            if progress:
                progress(min(total, sum(sigma >= query.sigma for sigma in sigmas)), total)

        [latents] = self.engine.drive([txt2img.start(job, self.model, watch)])
        assert latents is not None, "nobody cancels this run"
        images = to_uint8(txt2img.decode(latents, sigmas[-1], self.model))
        return Result(
            images=images,
            job=job,
            seeds=txt2img.seeds_of(job),
            seconds=time.perf_counter() - began,
            model_name=self.model.name,
            model_hash=self.model.hash,
            precision=self.model.precision,
            made_with=made_with(self.model.device),
        )


def made_with(device: torch.device) -> dict[str, str]:
    """What else than the job decides the last bit of a picture."""
    return {"sfumato": __version__, "torch": torch.__version__.partition("+")[0], "device": device.type}


def recipe(result: Result, index: int) -> dict[str, Any]:
    """What picture `index` of a result carries in its PNG, enough for `sfumato replay` to draw it again."""
    return {
        "job": asdict(result.job),
        "index": index,
        "seed": result.seeds[index],
        "model": {"name": result.model_name, "hash": result.model_hash},
        "precision": result.precision,
        "made with": result.made_with,
    }
