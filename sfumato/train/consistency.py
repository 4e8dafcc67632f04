"""Distillation into few steps: a model learns to say at once where its own guided steps from a level would end.

Luo et al. 2023 (Latent Consistency Models) and 2023b (LCM-LoRA), after Song et al. 2023. The guidance is one number,
learned into the weights: the student is drawn with the sampler `lcm` or `tcd` and guidance 1. Knows no command line.
Letters: B pictures, S levels of the teacher's solver, T training timesteps, t a timestep, sigma its level.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import Model
from sfumato.models.beside import Beside
from sfumato.models.layers import hasten
from sfumato.train.conditions import Told, check_trainable, objective_of, predicting
from sfumato.train.config import LoopConfig
from sfumato.train.data import LatentBatch
from sfumato.train.data.order import Examples
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, States
from sfumato.train.distributed import joined
from sfumato.train.loop import fit
from sfumato.train.lora import LoRAConfig, LoRAObjective, kohya_facts, lora_result, new_lora
from sfumato.train.personal import keep_settings
from sfumato.train.samples import Samples, Watched
from sfumato.train.state import State
from sfumato.train.tuning import Whole, tuned
from sfumato.weights.adapters.writing import save_adapter

LCM_LORA = LoRAConfig("locon", 64, 64.0, ("linear", "conv"))  # what the published LCM-LoRAs change, and their rank
PLAIN = DiffusionConfig(caption_drop_prob=0.0)


@dataclass(frozen=True)
class ConsistencyConfig:
    """How a student is taught; the numbers are those of the published LCM-LoRAs' training.

    guidance      the teacher's scale of guidance, > 0
    solver_steps  S: the teacher goes from one of its S even levels to the next below by a step of DDIM
    sigma_data    of the boundary's weights, with timesteps multiplied by timestep_scale (Luo et al. 2023, eq. 9)
    huber         the error below which a difference counts as its square, over all numbers of a picture
    """

    guidance: float = 7.5
    solver_steps: int = 50
    sigma_data: float = 0.5
    timestep_scale: float = 10.0
    huber: float = 0.001

    def __post_init__(self) -> None:
        for name in ("guidance", "solver_steps", "sigma_data", "timestep_scale", "huber"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: above 0 is needed")


def boundary(t: Tensor, config: ConsistencyConfig) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at timesteps t (B,): 1 and 0 at t = 0, where a consistency function is the identity.

    Luo et al. 2023, equation 9 and appendix C, as the published models have it.
    """
    scaled = config.timestep_scale * t.float()
    total = scaled.square() + config.sigma_data**2
    return config.sigma_data**2 / total, scaled * total.rsqrt()


def ddim_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x (B, C, h, w) from level sigma (B,) to sigma_next (B,) along x0: Song et al. 2021, equation 12 in sigmas."""
    share = (sigma_next / sigma)[:, None, None, None]
    return x0 + share * (x - x0)


class ConsistencyObjective:
    """`network` holds what is trained; `student` and `teacher` are denoisers, asked alike; one may be the other.

    `inner` says how captions are read and told. `plain` is entered where the teacher is asked: what makes the network
    that both share a student is off inside.
    """

    def __init__(
        self,
        inner: DiffusionObjective,
        teacher: Denoiser[Told],
        config: ConsistencyConfig,
        plain: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.inner, self.teacher, self.config, self.plain = inner, teacher, config, plain
        self.network: nn.Module = inner.network
        self.student: Denoiser[Told] = inner.denoiser
        total = len(self.student.schedule.sigmas)
        if not 2 <= config.solver_steps <= total:
            raise ValueError(f"solver_steps={config.solver_steps}: 2 to {total} are allowed")

    def loss(self, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Luo et al. 2023, algorithm 1, without a second average: the target is the student's own, held fast.

        The mean pseudo-Huber distance of what the student says at a level, and one step of the teacher lower.
        """
        device, schedule = batch.mean.device, self.student.schedule
        std = batch.std * torch.randn(batch.std.shape, generator=generator).to(device)
        x0 = self.inner.latent_scale * (batch.mean + std)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t, t_next = self._levels(len(x0), generator)
        sigmas = torch.as_tensor(schedule.sigmas, dtype=torch.float32)
        x = x0 + sigmas[t].to(device)[:, None, None, None] * noise
        told = self._told(batch, batch.captions)
        # First what has gradients: older PyTorch's autocast keeps 16-bit weights as they are first asked for, and those
        # of a pass without gradients would cut the student off from its own.
        found = self.consistent(x, t, told)
        with torch.no_grad():
            guided = self._guided(x, sigmas[t], told, self._told(batch, [""] * len(x0)))
            lower = ddim_step(x, guided, sigmas[t].to(device), sigmas[t_next].to(device))
            target = self.consistent(lower, t_next, told)
        error = found - target
        loss = ((error.square() + self.config.huber**2).sqrt() - self.config.huber).mean()
        return loss, {"loss": loss}

    def consistent(self, x: Tensor, t: Tensor, told: Told) -> Tensor:
        """f(x, t), about x0: x (B, C, h, w) with noise of the levels of t (B,) int64, on the CPU."""
        sigmas = [float(sigma) for sigma in self.student.schedule.sigmas[t.numpy()]]
        x0 = self.student(x, sigmas, told)
        c_skip, c_out = (weight.to(x.device)[:, None, None, None] for weight in boundary(t, self.config))
        small = torch.tensor([(1 + sigma**2) ** -0.5 for sigma in sigmas], device=x.device)  # to variance-preserving
        return c_skip * small[:, None, None, None] * x + c_out * x0

    def _levels(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (count,) of the solver's levels, and those one of its steps lower.

        The highest of the S even levels is T - 1, whether or not S divides T; the lowest goes to 0.
        """
        total, steps = len(self.student.schedule.sigmas), self.config.solver_steps
        index = torch.randint(1, steps + 1, (count,), generator=generator)
        t, t_next = (each * total // steps - 1 for each in (index, index - 1))
        return t, t_next.clamp(min=0)

    def _guided(self, x: Tensor, sigma: Tensor, told: Told, empty: Told) -> Tensor:
        """The teacher's x0 with guidance: both rows of each picture in one call."""
        both = Told(torch.cat([told.context, empty.context]), _both(told.vector, empty.vector))
        with self.plain():
            x0, without = self.teacher(torch.cat([x, x]), 2 * sigma.tolist(), both).chunk(2)
        return without + self.config.guidance * (x0 - without)

    def _told(self, batch: LatentBatch, captions: list[str]) -> Told:
        assert self.inner.tell is not None
        states: States = self.inner.context(captions)
        told: Told = self.inner.tell(batch, states)
        return told


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.cat([one, other])


@contextmanager
def off(beside: Mapping[str, Beside]) -> Iterator[None]:
    """Inside, deltas change nothing; afterwards they are as strong as before."""
    before = {part: each.strength for part, each in beside.items()}
    try:
        for each in beside.values():
            each.strength = 0.0
        yield
    finally:
        for part, each in beside.items():
            each.strength = before[part]


def beside_consistency(
    model: Model, config: ConsistencyConfig, lora: LoRAConfig, generator: torch.Generator
) -> tuple[ConsistencyObjective, LoRAObjective]:
    """An objective for `fit` whose student is the model with deltas on, its teacher the model without.

    The deltas stay until the second's `detach`; the U-Net's convolutions are hastened. ValueError as in `new_lora`, and
    where text encoders would change or `solver_steps` are too many: the model is then as it was.
    """
    if lora.train_text:
        raise ValueError("train_text=True: a student reads texts as its teacher does")
    check_trainable(model, sees=())
    with ExitStack() as undone:
        made = new_lora(model, lora, generator)
        undone.callback(made.detach)
        hasten(model.unet)
        undone.callback(hasten, model.unet, on=False)
        inner = objective_of(model, made.network, predicting(model), PLAIN)
        objective = ConsistencyObjective(inner, inner.denoiser, config, lambda: off(made.beside))
        undone.pop_all()  # from here on who called takes them off
    return objective, made


def whole_consistency(model: Model, config: ConsistencyConfig) -> ConsistencyObjective:
    """An objective for `fit` whose student is the model's U-Net, its teacher a copy that rests."""
    check_trainable(model, sees=())
    inner = tuned(model, PLAIN, train_text=False)
    unet = copy.deepcopy(model.unet).requires_grad_(False)

    def predict(x: Tensor, t: Tensor, told: Told) -> Tensor:
        out: Tensor = unet(x, t, told.context, told.vector)
        return out

    family = model.family
    return ConsistencyObjective(inner, Denoiser(predict, NoiseSchedule(family.schedule), family.prediction), config)


def distil(
    model: Model,
    examples: Examples,
    folder: Path,
    name: str,
    loop: LoopConfig,
    config: ConsistencyConfig,
    lora: LoRAConfig | None = LCM_LORA,
    watched: Watched | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Train, and return the result: an adapter, or a whole checkpoint without `lora`; `name`.safetensors in `folder`.

    `dtype` is what an adapter is written in, None as it is trained; a checkpoint is in float32. The run in the folder
    goes on where it stopped; under torchrun all ranks train it, and the first one writes. ValueError where it is
    another's, and for a run in shards.
    """
    if loop.shard:
        raise ValueError("shard=True: a student and its teacher lie whole on every rank")
    path = folder / f"{name}.safetensors"
    told: dict[str, Any] = {"trainer": "consistency", **asdict(config), "lora": None if lora is None else asdict(lora)}
    samples = None if watched is None else Samples(model.family, model.networks, watched, folder)
    with joined(model.device) as ranks:
        settings = told | {"base": model.hash} if ranks.first else {}
        ranks.first_does(lambda: keep_settings(folder, settings))
        if lora is None:
            fit(whole_consistency(model, config), examples, loop, folder, Whole(model, path), samples)
            return path
        objective, made = beside_consistency(model, config, lora, torch.Generator().manual_seed(loop.seed))

        def save(state: State) -> None:
            facts = kohya_facts(made, state, loop, PLAIN, name) | {"sfumato.consistency": json.dumps(asdict(config))}
            save_adapter(path, lora_result(made, state), model.family, metadata=facts, dtype=dtype)

        try:
            state = fit(objective, examples, loop, folder, save, samples)
            ranks.first_does(lambda: None if path.exists() else save(state))
        finally:
            made.detach()
            hasten(model.unet, on=False)
    return path
