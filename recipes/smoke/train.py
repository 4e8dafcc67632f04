"""All three trainers on 200 drawn pictures, in minutes on two cores: CLIP, the autoencoder, diffusion; then a picture.

`python -m recipes.smoke.train` (make train-smoke). Each stage must bring its loss down by a stated share. It takes
every way that a real training takes: shards, checkpoints, perceptual term and critic, alignment, EMA, the pipeline.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recipes.smoke.shapes import write_shapes
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import BOX, Defaults, Family, TextTower
from sfumato.families.conditioning import encode_captions
from sfumato.images import save_png
from sfumato.models.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet, UNetConfig
from sfumato.train.alignment import Alignment, projector, teacher_of
from sfumato.train.autoencoder import AutoencoderLoss, AutoencoderObjective, initialise
from sfumato.train.clip import CLIPObjective
from sfumato.train.critic import CriticConfig, PatchCritic
from sfumato.train.data import CaptionedShards, LatentBatch
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, frozen
from sfumato.train.loop import LoopConfig, ema_weights, fit
from sfumato.train.perceptual import Perceptual, clip_tower
from sfumato.train.samples import Samples, Watched, draw
from sfumato.weights.checkpoint import load_model, save_checkpoint

log = logging.getLogger(__name__)

SIZE, PATCH = 32, 4
SMOKE = replace(
    BOX,
    name="smoke",
    texts=(TextTower(CLIPTextConfig(vocab_size=2048, width=64, num_layers=2, num_heads=4)),),
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        transformer_depth=(1, 1),
        context_dim=64,
        num_heads=4,
        norm_groups=8,
    ),
    autoencoder=AutoencoderConfig(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=4),
    size=SIZE,
    defaults=Defaults(steps=20, guidance=3.0, sampler="dpmpp_2m"),
)
TOWER = SMOKE.texts[0]
CLIP_CONFIG = CLIPConfig(TOWER.config, CLIPVisionConfig(SIZE, PATCH, width=64, num_layers=2, num_heads=4), embed_dim=64)
WATCHED = Watched(
    ("a red circle on a white background", "a blue square on a yellow background",
     "a green triangle on a black background", "a yellow cross on a blue background"),
    count=2,
)  # fmt: skip


@dataclass(frozen=True)
class Smoke:
    """Steps of each stage, and the share of its loss that must be gone at the end.

    A stage's loss is the first and the last tenth of its log's lines.
    """

    pictures: int = 200
    clip_steps: int = 160
    autoencoder_steps: int = 400
    diffusion_steps: int = 500
    clip_falls: float = 0.4
    autoencoder_falls: float = 0.6
    diffusion_falls: float = 0.35


def fallen(folder: Path, figure: str) -> float:
    """The share by which a figure in a run's log has fallen, between the first and the last tenth of its lines."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [line[figure] for line in lines if figure in line]
    tenth = max(1, len(values) // 10)
    return 1 - float(np.mean(values[-tenth:]) / np.mean(values[:tenth]))


def must_fall(folder: Path, figure: str, share: float) -> float:
    """`fallen`; ValueError where it is less than `share`."""
    found = fallen(folder, figure)
    if not found >= share:
        raise ValueError(f"{folder.name}: {figure} has fallen by {found:.0%}, {share:.0%} or more was expected")
    log.info(
        "%s: %s has fallen by %.0f %% (%.0f %% or more was expected)", folder.name, figure, 100 * found, 100 * share
    )
    return found


def train_clip(smoke: Smoke, data: CaptionedShards, folder: Path) -> CLIP:
    """Both towers with their averaged weights, frozen."""
    torch.manual_seed(0)
    network = CLIP(CLIP_CONFIG)
    config = LoopConfig(
        smoke.clip_steps,
        batch_size=32,
        lr=2e-3,
        warmup=min(20, smoke.clip_steps // 4),
        decay="cosine",
        ema_decay=0.95,
        log_every=2,
    )
    fit(CLIPObjective(network, ClipTokenizer(TOWER.config.vocab_size)), data, config, folder)
    network.load_state_dict(ema_weights(folder / "state.safetensors"))
    return network.eval().requires_grad_(False)


def train_autoencoder(smoke: Smoke, data: CaptionedShards, folder: Path, tower: CLIP) -> Autoencoder:
    """With our own image tower as the perceptual term, and a critic for the last quarter of the steps."""
    network = initialise(Autoencoder(SMOKE.autoencoder), seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    critic = PatchCritic(CriticConfig(channels=16, num_layers=2, norm_groups=4)).initialise(0)
    start = smoke.autoencoder_steps * 3 // 4
    loss = AutoencoderLoss(perceptual_weight=0.1, critic_weight=0.1, critic_start=start)
    objective = AutoencoderObjective(network, loss, Perceptual(clip_tower(tower)), critic)
    config = LoopConfig(
        smoke.autoencoder_steps,
        batch_size=16,
        lr=2e-3,
        warmup=min(20, smoke.autoencoder_steps // 4),
        decay="cosine",
        weight_decay=0.0,
        ema_decay=0.98,
        log_every=2,
    )
    fit(objective, data, config, folder)
    network.load_state_dict(ema_weights(folder / "state.safetensors"))
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class PicturedLatents(LatentBatch):
    """Latents with the pictures they are of, which the alignment's teacher looks at."""

    pixels: Tensor = field(kw_only=True)


class Encoded:
    """The set's latents, computed once, with its pictures."""

    def __init__(self, data: CaptionedShards, network: Autoencoder) -> None:
        self.data = data
        with torch.inference_mode():
            posteriors = [network.encode(data.batch([index]).pixels) for index in range(len(data))]
        self.mean = torch.cat([one.mean for one in posteriors]).clone()
        self.std = torch.cat([one.std for one in posteriors]).clone()

    @property
    def scale(self) -> float:
        """What makes the latents' deviation 1."""
        return float((self.mean.var() + self.std.square().mean()).rsqrt())

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int]) -> PicturedLatents:
        given, rows = self.data.batch(indices), torch.as_tensor(indices)
        return PicturedLatents(self.mean[rows], self.std[rows], given.captions, pixels=given.pixels)


def text_tower(network: CLIP) -> CLIPText:
    """The half of CLIP that conditions the U-Net."""
    tower = CLIPText(TOWER.config)
    tower.load_state_dict({n: value for n, value in network.state_dict().items() if n.startswith("text_model.")})
    return tower.eval().requires_grad_(False)


def train_diffusion(
    smoke: Smoke, data: Encoded, family: Family, folder: Path, clip: CLIP, resting: dict[str, nn.Module]
) -> UNet:
    """The U-Net with its averaged weights; samples of it are drawn at step 0, at half of the way and at the end."""
    torch.manual_seed(0)
    unet, text = UNet(family.unet).to(memory_format=torch.channels_last), resting["text"]  # type: ignore[call-overload]
    tokenizer = ClipTokenizer(TOWER.config.vocab_size)
    head = projector(family.unet.channels * family.unet.channel_mult[-1], CLIP_CONFIG.vision.width, hidden=128)
    alignment = Alignment(unet, teacher_of(clip_tower(clip)), head, weight=0.1)

    def states(captions: list[str]) -> Tensor:
        assert isinstance(text, CLIPText)
        return encode_captions(TOWER, text, tokenizer, captions)

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x, t, context)

    network = nn.ModuleDict({"unet": unet, "projector": head})
    denoiser = Denoiser[Tensor](predict, NoiseSchedule(family.schedule), family.prediction)
    options = DiffusionConfig(min_snr_gamma=5.0)
    objective = DiffusionObjective(network, denoiser, frozen(states), family.latent_scale, options, alignment)
    config = LoopConfig(
        smoke.diffusion_steps,
        batch_size=32,
        lr=2e-3,
        warmup=min(20, smoke.diffusion_steps // 4),
        decay="cosine",
        ema_decay=0.98,
        log_every=2,
        sample_every=max(1, smoke.diffusion_steps // 2),
    )
    samples = Samples(family, {"unet": unet, **resting}, WATCHED, folder)
    state = fit(objective, data, config, folder, on_sample=samples)
    with state.averaged():
        return _copy(unet, family)


def _copy(unet: UNet, family: Family) -> UNet:
    copied = UNet(family.unet)
    copied.load_state_dict(unet.state_dict())
    return copied.eval().requires_grad_(False)


def run(folder: Path, smoke: Smoke | None = None) -> dict[str, float]:
    """All stages in `folder`, resumed where they stopped: what fell by how much; ValueError where it is too little.

    Leaves `smoke.safetensors`, a checkpoint that any command draws from, and `smoke.png`, drawn from that file.
    """
    smoke = Smoke() if smoke is None else smoke
    data = CaptionedShards([write_shapes(folder / "data", smoke.pictures, SIZE)], SIZE)
    falls: dict[str, float] = {}

    def stage(name: str, figure: str, share: float, train: Callable[[Path], nn.Module]) -> nn.Module:
        began = time.perf_counter()
        trained = train(folder / name)
        falls[name] = must_fall(folder / name, figure, share)
        log.info("%s: %.0f s", name, time.perf_counter() - began)
        return trained

    clip = stage("clip", "contrastive", smoke.clip_falls, lambda place: train_clip(smoke, data, place))
    assert isinstance(clip, CLIP)
    autoencoder = stage(
        "autoencoder", "l1", smoke.autoencoder_falls, lambda place: train_autoencoder(smoke, data, place, clip)
    )
    assert isinstance(autoencoder, Autoencoder)
    latents = Encoded(data, autoencoder)
    family = replace(SMOKE, latent_scale=round(latents.scale, 5))
    resting = {"autoencoder": autoencoder, "text": text_tower(clip)}
    unet = stage(
        "diffusion",
        "loss",
        smoke.diffusion_falls,
        lambda place: train_diffusion(smoke, latents, family, place, clip, resting),
    )
    parts = {"unet": unet, **resting}
    save_checkpoint(folder / "smoke.safetensors", family, {name: part.state_dict() for name, part in parts.items()})
    save_png(folder / "smoke.png", draw(load_model(folder / "smoke.safetensors"), WATCHED))
    return falls


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"), metavar="FOLDER")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    began = time.perf_counter()
    try:
        run(args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"all three losses fell, in {time.perf_counter() - began:.0f} s")
    print(f"drawn from the result: {args.out / 'smoke.png'}; draw more with --ckpt {args.out / 'smoke.safetensors'}")


if __name__ == "__main__":
    main()
