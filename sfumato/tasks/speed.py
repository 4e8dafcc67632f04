"""How a U-Net is computed: its blocks compiled, its calls repeated as CUDA graphs, its weights kept in 8 bits.

Owns what of that a person asked for, and says in one line where a device cannot. Knows no flags.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfumato.families import Model
from sfumato.models.compiling import Compiled, compile_blocks, keep_in, why_not
from sfumato.models.graphs import Graphs
from sfumato.models.quantised import check_kind, is_quantised, quantise
from sfumato.prompts.networks import Lora, Network
from sfumato.tasks.extras import Extras
from sfumato.types import Garment
from sfumato.weights.files.hashes import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """What is asked for; `weights` is full, int8 or fp8."""

    compile: bool = False
    graphs: bool = False
    weights: str = "full"

    def check(self, device: torch.device, fast: bool) -> None:
        """ValueError for weights that are unknown, and for what `fast` excludes on a CPU."""
        check_kind(self.weights)
        if fast and device.type == "cpu" and (self.compile or self.weights != "full"):
            other = "compile" if self.compile else f"weights={self.weights!r}"
            raise ValueError(f"fast: not together with {other} on a CPU, as it computes the U-Net's layers otherwise")

    def keep(self, model: Model) -> None:
        """Turn the U-Net's weights into codes, where that is asked for."""
        if self.weights in ("int8", "fp8"):
            saved = quantise(model.unet, self.weights)  # type: ignore[arg-type]
            log.info("weights: the U-Net's are kept as %s, which saves %.0f MB", self.weights, saved / 1e6)

    def ready(self, model: Model) -> list[Compiled | Graphs]:
        """What the U-Net goes through from now on, until `remove` of each; what cannot be is told and left out."""
        found: list[Compiled | Graphs] = []
        if self.compile:
            if (reason := why_not(model.device)) is not None:
                log.warning("compile: not used, because %s", reason)
            else:
                keep_in(cache_folder() / "compiled")
                found.append(compile_blocks(model.unet))
        if self.graphs:
            if model.device.type != "cuda":
                log.warning("graphs: not used, because they are for CUDA cards, and this device is %s", model.device)
            else:
                found.append(Graphs(model.unet))
        return found


def facts_of(model: Model, weights: str, ways: Sequence[Compiled | Graphs]) -> dict[str, str]:
    """What of it decides the last bits of a picture; graphs repeat the very same work."""
    compiled = {"compiled": "yes"} if any(isinstance(way, Compiled) for way in ways) else {}
    return compiled | ({"weights": weights} if is_quantised(model.unet) else {})


class UnchangedExtras(Extras):
    """What jobs name beside a model whose weights are codes: LoRAs, which change weights, are refused."""

    def garments(self, networks: Sequence[Network]) -> tuple[Garment, ...]:
        """As of `Extras`; ValueError for a LoRA."""
        for network in networks:
            if isinstance(network, Lora):
                raise ValueError(
                    f"lora={network.name!r}: it changes weights, and the U-Net's are kept in 8 bits; load with "
                    "weights='full', or merge it into the checkpoint first"
                )
        return super().garments(networks)
