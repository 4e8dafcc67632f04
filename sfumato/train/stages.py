"""Stages of a training: runs that start from one another, as SD v1-1 to v1-4 did; which are done, which come next.

Knows folders and weights by name, but no network and no loss: how a stage is trained, a recipe says.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sfumato.weights.files import open_tensors

log = logging.getLogger(__name__)

WEIGHTS = {"ema": "ema.", "full": "model."}  # averaged, or as the optimiser left them: names in a run's checkpoint
CHECKPOINT, RECORD = "state.safetensors", "stage.json"


@dataclass(frozen=True)
class Stage:
    """`size` px, `steps` of `batch_size` pictures (all ranks' together) out of the data filter named `data`.

    `start` names an earlier stage, whose averaged ("ema") or last ("full") `weights` this one begins with; None begins
    with random ones. `lr` is reached after `warmup` steps.
    """

    name: str
    size: int
    steps: int
    data: str
    start: str | None = None
    weights: str = "ema"
    lr: float = 1e-4
    warmup: int = 10_000
    batch_size: int = 2048
    caption_drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: stage {self.name} needs 1 or more")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r}: one of {', '.join(WEIGHTS)}")
        if not 0 <= self.caption_drop_prob <= 1:
            raise ValueError(f"caption_drop_prob={self.caption_drop_prob}: from 0 to 1 is allowed")


# The model cards of CompVis/stable-diffusion-v1-1 ... v1-4: steps, sizes, sets, batch 32 x 8 x 2 x 4, learning rate.
SD_V1 = (
    Stage("v1-1-256", 256, 237_000, "laion2b-en"),
    Stage("v1-1", 512, 194_000, "high-resolution", start="v1-1-256", weights="full"),
    Stage("v1-2", 512, 515_000, "improved-aesthetics", start="v1-1", weights="full"),
    Stage("v1-3", 512, 195_000, "improved-aesthetics", start="v1-2", weights="full", caption_drop_prob=0.1),
    Stage("v1-4", 512, 225_000, "aesthetics-v2-5", start="v1-2", weights="full", caption_drop_prob=0.1),
)

Train = Callable[[Stage, Path, "dict[str, Tensor] | None"], object]


def check_stages(stages: Sequence[Stage]) -> None:
    """ValueError where there are none, two have one name, or one starts from what does not come before it."""
    if not stages:
        raise ValueError("stages: one or more are needed")
    before: list[str] = []
    for stage in stages:
        if stage.name in before or not stage.name or Path(stage.name).name != stage.name:
            raise ValueError(f"name={stage.name!r}: every stage needs a name of its own that can be a folder's")
        if stage.start is not None and stage.start not in before:
            raise ValueError(f"start={stage.start!r}: stage {stage.name} can start from {before or 'nothing yet'}")
        before.append(stage.name)


def starting_weights(folder: str | Path, kind: str) -> dict[str, Tensor]:
    """The "ema" or "full" weights in a run's folder, by the network's own names; ValueError where it holds none."""
    path = Path(folder) / CHECKPOINT
    prefix = WEIGHTS[kind]
    file = open_tensors(path)
    found = {name.removeprefix(prefix): file.read(name) for name in file.names() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"checkpoint={str(path)!r}: it holds no {kind} weights")
    return found


def run_stages(stages: Sequence[Stage], folder: str | Path, train: Train) -> dict[str, Path]:
    """Train the stages that are not done, one after another, each in a folder of its own: name -> folder.

    `train(stage, folder, weights)` trains a network, with these weights to begin with, and leaves its checkpoint in
    the folder; a stage that was interrupted is given to it again, and it goes on from what is there, as `fit` does.
    ValueError where a stage has begun with other settings than it has now.
    """
    check_stages(stages)
    folders = {stage.name: Path(folder) / stage.name for stage in stages}
    for stage in stages:
        _check_record(stage, folders[stage.name] / RECORD)
    for stage in stages:
        place = folders[stage.name]
        if _finished(place / RECORD):
            log.info("%s: done before", stage.name)
            continue
        weights = None if stage.start is None else starting_weights(folders[stage.start], stage.weights)
        place.mkdir(parents=True, exist_ok=True)
        _write_record(stage, place / RECORD, finished=False)
        log.info("%s: %d steps at %d px from %s", stage.name, stage.steps, stage.size, stage.start or "random weights")
        train(stage, place, weights)
        _write_record(stage, place / RECORD, finished=True)
    return folders


def _check_record(stage: Stage, path: Path) -> None:
    if not path.exists():
        return
    before = _read_record(path)["stage"]
    for name, value in asdict(stage).items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}={value!r}: stage {stage.name} has begun with {before.get(name)!r} in {str(path.parent)!r}"
            )


def _finished(path: Path) -> bool:
    return path.exists() and bool(_read_record(path)["finished"])


def _read_record(path: Path) -> dict[str, dict[str, object]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["stage"], dict) or not isinstance(record["finished"], bool):
            raise KeyError("stage")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r}: not a stage's record") from error
    return record


def _write_record(stage: Stage, path: Path, *, finished: bool) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps({"stage": asdict(stage), "finished": finished}, indent=1), encoding="utf-8")
    beside.replace(path)
