"""Training of LoRA and its kin: small changes beside the frozen weights of a U-Net, and of text encoders if asked.

The model's own loss, with the deltas of `sfumato.models.beside` on. Hu et al. 2021; the kinds are LyCORIS' (Yeh et al.
2024) and DoRA (Liu et al. 2024). Knows no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from sfumato.families import Model
from sfumato.models.beside import KINDS, Beside, Kind, attach, tensors_of
from sfumato.train.conditions import check_trainable, objective_of, predicting, rest
from sfumato.train.config import LoopConfig
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective
from sfumato.train.state import State
from sfumato.weights.adapters.adapter import Changes

TARGETS = ("attention", "linear", "conv")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of a U-Net's attentions
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
OUTSIDE = ("time_embed.", "label_emb.", "input_blocks.0.", "out.")  # of a U-Net: other programs' adapters leave them


@dataclass(frozen=True)
class LoRAConfig:
    """What is beside the weights: `kind`, `rank`, `alpha` (None: the rank), `dropout` of inputs.

    `targets`: "attention" (its projections), "linear" (every linear layer and 1 x 1 convolution within the blocks),
    "conv" (the other convolutions there; kinds lora and dora cannot), or ends of layers' names such as "attn2.to_k".
    With `train_text` the text encoders' attentions, with "linear" their other linear layers too. `factor` is LoKr's,
    `tucker` gives kernels a core.
    """

    kind: Kind = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention",)
    dropout: float = 0.0
    tucker: bool = False
    factor: int | None = None
    train_text: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: 1 or more are needed")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: above 0 is needed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: 0 to below 1 is allowed")
        if not self.targets:
            raise ValueError(f"targets: one or more of {', '.join(TARGETS)}, or ends of layers' names")
        if "conv" in self.targets and self.kind in ("lora", "dora"):
            raise ValueError(f"targets='conv': kind {self.kind!r} has no place for large kernels; locon, loha, lokr do")


def unet_layers(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the layers of a U-Net that targets mean. ValueError where one means none."""
    inside = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(OUTSIDE)
    }
    every = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found: set[str] = set()
    for target in targets:
        if target == "attention":
            hits = {name for name in inside if name.endswith(ATTENTION)}
        elif target in ("linear", "conv"):
            wide = {name for name, module in inside.items() if _is_wide(module)}
            hits = wide if target == "conv" else inside.keys() - wide
        else:
            hits = {name for name in every if name == target or name.endswith(f".{target}")}
        if not hits:
            raise ValueError(
                f"target={target!r}: {', '.join(TARGETS)}, or the end of the name of a layer of the U-Net, such as "
                "attn2.to_k"
            )
        found |= hits
    return sorted(found)


def _is_wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1


def text_layers(text: nn.Module, targets: Sequence[str]) -> list[str]:
    """The same of a text encoder: its attentions, and with "linear" every linear layer of its blocks."""
    inside = [name for name, module in text.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    return inside if "linear" in targets else [name for name in inside if name.endswith(TEXT_ATTENTION)]


class LoRAObjective:
    """`network` holds the deltas of each part; the model's weights are frozen, its forward passes wear the deltas."""

    def __init__(
        self, model: Model, config: LoRAConfig, beside: Mapping[str, Beside], inner: DiffusionObjective
    ) -> None:
        self.model, self.config, self.beside = model, config, dict(beside)
        self.network: nn.Module = inner.network
        self.loss, self.partial = inner.loss, inner.partial

    def detach(self) -> None:
        """Take the deltas off: the model is as it was."""
        for each in self.beside.values():
            each.detach()


def new_lora(
    model: Model, config: LoRAConfig, generator: torch.Generator, diffusion: DiffusionConfig | None = None
) -> LoRAObjective:
    """An objective for `fit` that learns an adapter; the deltas are on the model until `detach`.

    Without `diffusion` no caption is dropped. ValueError: an unknown target or one that the kind cannot change, a U-Net
    that sees depth or a picture to be edited.
    """
    check_trainable(model)
    names = {"unet": unet_layers(model.unet, config.targets)}
    rest(model)
    if config.train_text:
        texts = zip(model.family.text_parts, model.texts, strict=True)
        names |= {part: text_layers(text, config.targets) for part, text in texts}
    beside: dict[str, Beside] = {}
    try:
        for part, layers in names.items():
            beside[part] = attach(
                model.networks[part], layers, config.rank, config.alpha or float(config.rank), config.kind,
                generator=generator, tucker=config.tucker, factor=config.factor, dropout=config.dropout,
            )  # fmt: skip
    except ValueError:
        for each in beside.values():
            each.detach()
        raise
    options = diffusion or DiffusionConfig(caption_drop_prob=0.0)
    inner = objective_of(model, nn.ModuleDict(beside), predicting(model), options, config.train_text)
    return LoRAObjective(model, config, beside, inner)


def lora_result(objective: LoRAObjective, state: State) -> Changes:
    """The averaged changes by (part, parameter), copies at rest, as `save_adapter` writes them."""
    with state.averaged():
        return {
            (part, name): (change,)
            for part, each in objective.beside.items()
            for name, change in tensors_of(each).items()
        }


def kohya_facts(
    objective: LoRAObjective, state: State, loop: LoopConfig, diffusion: DiffusionConfig, name: str
) -> dict[str, str]:
    """Kohya's `ss_` metadata of a run. No times and no paths: the same run gives the same file."""
    config, model = objective.config, objective.model
    plain = config.kind in ("lora", "locon")
    network = {"algo": config.kind} if config.kind != "dora" else {"algo": "lora", "dora_wd": True}
    facts: dict[str, object] = {
        "ss_output_name": name,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha or float(config.rank),
        "ss_network_dropout": config.dropout or None,
        "ss_network_args": None if plain else json.dumps(network),
        "ss_sd_model_name": model.name,
        "ss_new_sd_model_hash": model.hash or None,
        "ss_steps": state.step,
        "ss_max_train_steps": loop.steps,
        "ss_learning_rate": loop.lr,
        "ss_unet_lr": loop.lr,
        "ss_text_encoder_lr": loop.part_lr.get("text", loop.lr) if config.train_text else None,
        "ss_lr_scheduler": loop.decay,
        "ss_lr_warmup_steps": loop.warmup,
        "ss_optimizer": loop.optimizer,
        "ss_mixed_precision": "no" if loop.precision == "fp32" else loop.precision,
        "ss_batch_size_per_device": loop.batch_size,
        "ss_total_batch_size": loop.batch_size * loop.accumulate,
        "ss_gradient_accumulation_steps": loop.accumulate,
        "ss_max_grad_norm": loop.clip_norm,
        "ss_seed": loop.seed,
        "ss_min_snr_gamma": diffusion.min_snr_gamma,
        "ss_noise_offset": diffusion.offset_noise or None,
        "ss_caption_dropout_rate": diffusion.caption_drop_prob,
        "sfumato.lora": json.dumps(asdict(config)),
    }
    return {key: str(value) for key, value in facts.items() if value is not None}
