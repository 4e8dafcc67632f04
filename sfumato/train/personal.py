"""Steering and personalising a model: five trainers with one surface. Each is made ready by a function, then `run`.

The result lies in the run's folder under the run's name, where every command finds it. On several ranks both are done
within one `joined`; the first rank writes. Knows no command line.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sfumato.families import Model
from sfumato.images import save_png
from sfumato.models.hypernetwork import HypernetworkConfig, worn
from sfumato.models.layers import hasten
from sfumato.train.checkpoints import candidates, step_of
from sfumato.train.config import LoopConfig
from sfumato.train.controlnet import control_result, new_control
from sfumato.train.data import Pictures
from sfumato.train.data.listed import Folder
from sfumato.train.data.pictures import Joined, caption_in
from sfumato.train.diffusion import DiffusionConfig
from sfumato.train.distributed import Ranks, joined
from sfumato.train.dreambooth import CLASS, Paired, PriorConfig, draw_class
from sfumato.train.hypernetwork import hypernetwork_result, new_hypernetwork
from sfumato.train.inversion import InversionConfig, inversion_result, new_inversion
from sfumato.train.loop import Objective, fit
from sfumato.train.lora import LoRAConfig, kohya_facts, lora_result, new_lora
from sfumato.train.measuring import measure, recomputed
from sfumato.train.samples import Samples, Watched
from sfumato.train.state import State
from sfumato.train.tuning import Whole, tuned
from sfumato.train.views import Annotate, Captioned, Encoded, Hints, Shown, View, latents_of
from sfumato.types import Control
from sfumato.weights.adapters.writing import save_adapter
from sfumato.weights.controls import save_control
from sfumato.weights.embeddings import save_embedding
from sfumato.weights.hypernetworks import save_hypernetwork

log = logging.getLogger(__name__)

SETTINGS = "trainer.json"  # what a run that goes on must be told again
MOST_TOLD = 1000  # pictures whose captions are counted for a file's header


@dataclass(frozen=True)
class Setup:
    """What every trainer is given: a model, its pictures and how they are shown, the loop, the loss, a folder, a name.

    `watched` is drawn on the way. The pictures have their captions, where captions are needed.
    """

    model: Model
    pictures: Pictures
    shown: Shown
    config: LoopConfig
    diffusion: DiffusionConfig
    folder: Path
    name: str
    watched: Watched | None = None

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name in ("state", "model"):
            raise ValueError(f"name={self.name!r}: a file's name without folders is needed, and not state or model")

    def samples(self, around: Callable[[State], AbstractContextManager[object]] | None = None) -> Samples | None:
        """What draws on the way; None where nothing is watched."""
        if self.watched is None:
            return None
        return Samples(self.model.family, self.model.networks, self.watched, self.folder, around)


@dataclass(frozen=True)
class Ready:
    """A trainer before its first step; `save` writes `result`, `settings` must be the same when the run goes on."""

    objective: Objective
    examples: Encoded | Paired
    save: Callable[[State], None]
    result: Path
    samples: Samples | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Prior:
    """The class of DreamBooth's subject: pictures that there are, and how many of `config.count` are to be drawn."""

    config: PriorConfig
    pictures: Pictures | None = None
    steps: int | None = None  # of the drawing; None: the model's own

    def missing(self) -> int:
        """How many must be drawn."""
        return max(0, self.config.count - (0 if self.pictures is None else len(self.pictures)))


def run(ready: Ready, setup: Setup, checkpointing: bool = False) -> Path:
    """Tell what the run will take, train, and return the result's file. A run in the folder goes on.

    `checkpointing`: activations are computed again instead of kept. A run that is stopped leaves the result of the
    steps that it did. ValueError where the run there is another's.
    """
    with joined(setup.model.device) as ranks:
        settings = ready.settings | {"base": setup.model.hash} if ranks.first else {}
        ranks.first_does(lambda: keep_settings(setup.folder, settings))
        state = _trained(ready, setup, checkpointing, ranks)
        ranks.first_does(lambda: None if ready.result.exists() else ready.save(state))
    return ready.result


def _trained(ready: Ready, setup: Setup, checkpointing: bool, ranks: Ranks) -> State:
    """The state after the last step, the networks hastened on the way."""
    left = setup.config.steps - _steps_done(setup.folder)
    networks = nn.ModuleList([*setup.model.networks.values(), ready.objective.network])
    around = recomputed(nn.ModuleList([setup.model.unet, ready.objective.network])) if checkpointing else nullcontext()
    try:
        hasten(networks)
        with around:
            if left > 0 and ranks.first:
                kept = len(ready.examples) if ready.examples.keeps else None
                all_of_it = nn.ModuleList(setup.model.networks.values())
                cost = measure(ready.objective, ready.examples, setup.config, all_of_it, ranks.count)
                log.info("%s", cost.line(left, setup.config, kept))
            return _fitted(ready, setup, ranks)
    finally:
        hasten(networks, on=False)


def _fitted(ready: Ready, setup: Setup, ranks: Ranks) -> State:
    """The state after the last step; where a person stops it, the result of those that were done is written."""
    try:
        return fit(ready.objective, ready.examples, setup.config, setup.folder, ready.save, ready.samples)
    except KeyboardInterrupt:
        state = _as_saved(ready, setup)
        ranks.first_does(lambda: ready.save(state))
        raise


def _as_saved(ready: Ready, setup: Setup) -> State:
    """The state of the newest checkpoint: the loop begins there, and has nothing to do."""
    config = replace(setup.config, steps=_steps_done(setup.folder))
    return fit(ready.objective, ready.examples, config, setup.folder)


def _steps_done(folder: Path) -> int:
    """The step of the newest checkpoint that can be read; 0 without one."""
    return next((step for path in candidates(folder) if (step := step_of(path)) is not None), 0)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write them where there are none; ValueError, in a line, where those of the run in the folder are others."""
    path = folder / SETTINGS
    now = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        odd = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if odd and candidates(folder):
            lines = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in odd)
            raise ValueError(f"run={str(folder)!r}: {lines}; keep it, or begin in another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


# -- the five ---------------------------------------------------------------------------------------------------------


def lora(
    setup: Setup,
    config: LoRAConfig,
    prior: Prior | None = None,
    checkpointing: bool = False,
    dtype: torch.dtype | None = None,
) -> Ready:
    """A LoRA or one of its kin, `NAME.safetensors` in kohya's names; with a `prior` as DreamBooth.

    `checkpointing` is only told in the file's header. `dtype` is what the file is written in, None as it is trained.
    """
    examples = _with_prior(setup, prior)
    generator = torch.Generator().manual_seed(setup.config.seed)
    objective = new_lora(setup.model, config, generator, setup.diffusion)
    path = setup.folder / f"{setup.name}.safetensors"
    data = _data_facts(setup, prior) | {"ss_gradient_checkpointing": str(checkpointing)}

    def save(state: State) -> None:
        facts = kohya_facts(objective, state, setup.config, setup.diffusion, setup.name) | data
        save_adapter(path, lora_result(objective, state), setup.model.family, metadata=facts, dtype=dtype)

    settings = {"trainer": "lora", **asdict(config)} | _prior_settings(prior)
    return Ready(objective, examples, save, path, setup.samples(), settings)


def dreambooth(setup: Setup, train_text: bool = False, prior: Prior | None = None) -> Ready:
    """The whole U-Net, and the text encoders where asked: a checkpoint, `NAME.safetensors`."""
    examples = _with_prior(setup, prior)
    objective = tuned(setup.model, setup.diffusion, train_text)
    path = setup.folder / f"{setup.name}.safetensors"
    settings = {"trainer": "dreambooth", "train_text": train_text} | _prior_settings(prior)
    return Ready(objective, examples, Whole(setup.model, path), path, setup.samples(), settings)


def textual_inversion(setup: Setup, config: InversionConfig) -> Ready:
    """A word, `embeddings/NAME.safetensors`, as embeddings are looked for in folders of that name."""
    objective = new_inversion(setup.model, config, setup.diffusion)
    path = setup.folder / "embeddings" / f"{setup.name}.safetensors"
    examples = latents_of(setup.model, setup.pictures, setup.shown, setup.config, need_captions=False)

    def save(state: State) -> None:
        save_embedding(path, replace(inversion_result(objective, state), name=setup.name))

    settings = {"trainer": "textual-inversion", **asdict(config)}
    return Ready(objective, examples, save, path, setup.samples(_written(save)), settings)


def hypernetwork(setup: Setup, config: HypernetworkConfig | None = None) -> Ready:
    """A hypernetwork, `NAME.pt`; `config` None: A1111's shape for this U-Net."""
    generator = torch.Generator().manual_seed(setup.config.seed)
    objective = new_hypernetwork(setup.model, setup.name, generator, config, setup.diffusion)
    path = setup.folder / f"{setup.name}.pt"
    examples = latents_of(setup.model, setup.pictures, setup.shown, setup.config)

    def save(state: State) -> None:
        save_hypernetwork(path, hypernetwork_result(objective, state))

    def around(state: State) -> AbstractContextManager[None]:
        return worn(setup.model.unet, [(objective.network, 1.0)])

    settings = {"trainer": "hypernetwork", **asdict(objective.network.config)}
    return Ready(objective, examples, save, path, setup.samples(around), settings)


def controlnet(
    setup: Setup,
    hints: Annotate | Hints,
    told: str,
    hint_drop_prob: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Ready:
    """A ControlNet, `NAME.safetensors`; `hints` makes or reads them, `told` says how, for a run that goes on.

    What is watched is steered by the first picture's hint, `hint.png` in the run's folder. `dtype` is what the file is
    written in, None as it is trained.
    """
    objective = new_control(setup.model, setup.config.seed, setup.diffusion, hint_drop_prob)
    path = setup.folder / f"{setup.name}.safetensors"
    examples = latents_of(setup.model, setup.pictures, setup.shown, setup.config, hints)
    first = examples.pictures.batch(examples.indices_at(0)[:1])  # also shows that hints can be made
    if setup.watched is not None:
        hint = setup.folder / "hint.png"
        assert isinstance(first, View) and first.hints is not None
        pixels = first.hints[0].permute(1, 2, 0).numpy()
        with joined(setup.model.device) as ranks:
            ranks.first_does(lambda: _save_hint(hint, pixels))
        steered = replace(setup.watched, controls=(Control(setup.name, str(hint)),))
        setup = replace(setup, watched=steered)

    def save(state: State) -> None:
        save_control(path, control_result(objective, state), dtype)

    samples = setup.samples(_written(save))
    settings = {"trainer": "controlnet", "hints": told, "hint_drop_prob": hint_drop_prob}
    return Ready(objective, examples, save, path, samples, settings)


# -- their parts ------------------------------------------------------------------------------------------------------


def _written(save: Callable[[State], None]) -> Callable[[State], AbstractContextManager[None]]:
    """What is drawn on the way with the result's own file."""

    def around(state: State) -> AbstractContextManager[None]:
        save(state)
        return nullcontext()

    return around


def _save_hint(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, pixels)


def _with_prior(setup: Setup, prior: Prior | None) -> Encoded | Paired:
    """The subject's latents, with those of its class beside where there is a prior; what is missing is drawn."""
    subject = latents_of(setup.model, setup.pictures, setup.shown, setup.config)
    if prior is None:
        return subject
    if setup.shown.buckets is not None:
        raise ValueError("buckets: with pictures of the class, all pictures have one size")
    count, batch = prior.config.count, setup.config.batch_size
    if count < batch:
        raise ValueError(f"class_count={count}: a batch has {batch} of them, so many are needed")
    parts: list[Pictures] = [] if prior.pictures is None else [prior.pictures]
    if missing := prior.missing():
        folder = setup.folder / CLASS
        with joined(setup.model.device) as ranks:
            draw_class(
                setup.model, prior.config, folder, missing, setup.shown.size, setup.config.seed, steps=prior.steps,
                ranks=ranks,
            )  # fmt: skip
            ranks.any(False)  # nobody goes on before all are there
        parts.append(Folder(folder))
    told = Captioned(parts[0] if len(parts) == 1 else Joined(parts), prior.config.prompt)
    others = latents_of(setup.model, told, setup.shown, replace(setup.config, seed=setup.config.seed + 1))
    return Paired(subject, others, prior.config.weight)


def _prior_settings(prior: Prior | None) -> dict[str, Any]:
    return {} if prior is None else {f"class_{name}": value for name, value in asdict(prior.config).items()}


def _data_facts(setup: Setup, prior: Prior | None) -> dict[str, str]:
    """Kohya's `ss_` metadata of the pictures: counts, sizes, words."""
    count, config = len(setup.pictures), setup.config
    per_step = config.examples_per_step(int(os.environ.get("WORLD_SIZE", "1")))
    batches = -(-count // per_step)
    folder = setup.pictures.path.name
    facts: dict[str, object] = {
        "ss_num_train_images": count,
        "ss_num_reg_images": 0 if prior is None else prior.config.count,
        "ss_num_batches_per_epoch": batches,
        "ss_total_batch_size": per_step,
        "ss_num_epochs": -(-config.steps // batches),
        "ss_resolution": (setup.shown.size, setup.shown.size),
        "ss_enable_bucket": setup.shown.buckets is not None,
        "ss_random_crop": setup.shown.crop == "random",
        "ss_flip_aug": setup.shown.flip,
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": count}}),
    }
    if prior is not None:
        facts["ss_prior_loss_weight"] = prior.config.weight
        facts["ss_reg_dataset_dirs"] = json.dumps({CLASS: {"n_repeats": 1, "img_count": prior.config.count}})
    if count <= MOST_TOLD:
        captions = [caption_in(setup.pictures.facts(index)) or "" for index in range(count)]
        words = Counter(word.strip() for caption in captions for word in caption.split(",") if word.strip())
        facts["ss_tag_frequency"] = json.dumps({folder: dict(words)}, ensure_ascii=False)
    return {key: str(value) for key, value in facts.items()}
