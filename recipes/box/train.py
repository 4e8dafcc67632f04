"""How the model in the box was made: autoencoder, CLIP, latents, diffusion, in this order.

`python -m recipes.box.train STAGE --data FOLDER...` starts a stage or goes on with it; README.md tells the history.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import BOX
from sfumato.families.conditioning import encode_captions
from sfumato.images import grid, save_png
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIP, CLIPConfig, CLIPText, CLIPVisionConfig
from sfumato.models.layers import hasten
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.pipeline import Pipeline, box_path
from sfumato.train.autoencoder import AutoencoderLoss, AutoencoderObjective, initialise
from sfumato.train.clip import CLIPObjective
from sfumato.train.config import DECAYS, OPTIMIZERS, PRECISIONS
from sfumato.train.critic import CriticConfig, PatchCritic
from sfumato.train.data import CachedLatents, CaptionedShards
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective, frozen
from sfumato.train.loop import LoopConfig, State, ema_weights, fit
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import save_safetensors
from sfumato.weights.placing import place

log = logging.getLogger(__name__)

RUNS = Path("runs/box2")
CPU = torch.device("cpu")
AUTOENCODER = "autoencoder-2"  # the run whose weights are the box's
TOWER = BOX.texts[0]
CLIP_CONFIG = CLIPConfig(
    text=TOWER.config,
    vision=CLIPVisionConfig(image_size=BOX.size, patch_size=8, width=192, num_layers=4, num_heads=4),
    embed_dim=192,
)
WATCHED = (
    "a red apple on a white background", "3d octopus on a blue background", "a cartoon cat on a yellow background",
    "flat rocket on a black background", "a guitar", "3d hamburger on a pink background", "sticker of a sunflower",
    "a cartoon penguin on a light blue background", "3d soccer ball on a green background", "a house on white",
    "flat umbrella on a gray background", "3d crown on a purple background",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a stage is told: `run` names its folder, `start` the run whose averaged weights a new run begins with."""

    data: Sequence[Path]
    steps: int
    run: str
    start: str | None
    lr: float
    train_text: bool
    fresh: bool
    batch: int
    decay: str
    min_snr: float
    precision: str
    optimizer: str


def state_path(run: str) -> Path:
    """The checkpoint of a run."""
    return RUNS / run / "state.safetensors"


def begin(run: str, weights: Mapping[str, Tensor], origin: str) -> None:
    """A new run at step 0 with these weights; ValueError where there is one."""
    if state_path(run).exists():
        raise ValueError(f"{state_path(run)}: a run is there already")
    tensors = {f"{kind}.{name}": value.clone() for kind in ("model", "ema") for name, value in weights.items()}
    save_safetensors(state_path(run), tensors, {"step": "0", "from": origin})


def new_autoencoder(fresh: bool) -> Autoencoder:
    """The autoencoder that training starts from: the shipped box's, or random weights."""
    network = initialise(Autoencoder(BOX.autoencoder), seed=0)
    if not fresh:
        network.load_state_dict(load_model(box_path()).autoencoder.state_dict())
    place(network, CPU, torch.float32)
    return network


def train_autoencoder(options: Options) -> None:
    """Pictures <-> latents, on crops of half the side; latents that may be shrunk and turned."""
    loss = AutoencoderLoss(crop=BOX.size // 2, equivariance=0.25)
    config = LoopConfig(
        options.steps, batch_size=16, lr=options.lr, decay="cosine", weight_decay=0.0, ema_decay=0.995,
        checkpoint_every=250,
    )  # fmt: skip
    data = CaptionedShards(options.data, BOX.size, keep_in_memory=False)
    network = new_autoencoder(options.fresh)
    hasten(network)
    if options.start and not state_path(options.run).exists():
        begin(options.run, ema_weights(state_path(options.start)), options.start)
    fit(AutoencoderObjective(network, loss), data, config, RUNS / options.run)


def train_decoder(options: Options) -> None:
    """Latents -> pictures once more, the latents as they are: a critic asks for edges as sharp as real ones."""
    loss = AutoencoderLoss(
        crop=BOX.size // 2, decoder_only=True, critic_weight=0.15, critic_start=options.steps // 4
    )  # fmt: skip
    config = LoopConfig(
        options.steps, batch_size=16, lr=options.lr, decay="cosine", weight_decay=0.0, ema_decay=0.998, warmup=50,
        checkpoint_every=250, precision=options.precision,
    )  # fmt: skip
    network = trained_autoencoder().requires_grad_(True)
    critic = PatchCritic(CriticConfig(channels=32, num_layers=2)).initialise(0)
    data = CaptionedShards(options.data, BOX.size, keep_in_memory=False)
    fit(AutoencoderObjective(network, loss, critic=critic), data, config, RUNS / options.run)


def train_clip(options: Options, config_of_towers: CLIPConfig = CLIP_CONFIG) -> None:
    """Both towers; the text tower is kept."""
    torch.manual_seed(0)
    objective = CLIPObjective(CLIP(config_of_towers), ClipTokenizer(TOWER.config.vocab_size))
    config = LoopConfig(
        options.steps, batch_size=96, lr=1e-3, decay="cosine", weight_decay=0.1, ema_decay=0.99,
        precision=options.precision,
    )  # fmt: skip
    fit(objective, CaptionedShards(options.data, BOX.size), config, RUNS / options.run)


def train_scorer(options: Options) -> None:
    """A CLIP for the CLIP score of the box's pictures alone: on pictures that it never saw, patches twice as large."""
    vision = replace(CLIP_CONFIG.vision, patch_size=16)
    train_clip(options, replace(CLIP_CONFIG, vision=vision))


def trained_autoencoder(run: str = AUTOENCODER) -> Autoencoder:
    """The averaged weights of a run; of one that trained the decoder alone, with the encoder that it began with."""
    network = Autoencoder(BOX.autoencoder)
    network.load_state_dict(ema_weights(state_path(AUTOENCODER)) | ema_weights(state_path(run)))
    place(network, CPU, torch.float32)
    return network.eval().requires_grad_(False)


def trained_text() -> CLIPText:
    """The averaged text tower of stage two, or the shipped one where that stage was not run."""
    network = CLIPText(TOWER.config)
    if not state_path("clip").exists():
        network.load_state_dict(load_model(box_path()).texts[0].state_dict())
        return network.eval().requires_grad_(False)
    weights = ema_weights(state_path("clip"))
    network.load_state_dict({name: value for name, value in weights.items() if name.startswith("text_model.")})
    return network.eval().requires_grad_(False)


def latents_path(data: Path) -> Path:
    """Where a data set's latents are cached."""
    return RUNS / "latents" / f"{data.name}.safetensors"


@torch.inference_mode()
def cache_latents(options: Options) -> None:
    """Encode whole sets once; prints the latents' deviation, whose inverse is the family's latent_scale."""
    network = trained_autoencoder()
    for folder in options.data:
        shards = CaptionedShards([folder], BOX.size, keep_in_memory=False)
        means, stds = [], []
        for start in tqdm(range(0, len(shards), 64), desc=f"encoding {folder}"):
            posterior = network.encode(shards.batch(range(start, min(start + 64, len(shards)))).pixels)
            means.append(posterior.mean.half())
            stds.append(posterior.std.half())
        mean, std = torch.cat(means), torch.cat(stds)
        CachedLatents.write(latents_path(folder), mean, std, shards.captions)
        deviation = (mean.float().var() + std.float().square().mean()).sqrt()
        log.info("%s: deviation %.4f, latent_scale %.5f", folder, deviation, 1 / deviation)


def new_unet(fresh: bool) -> UNet:
    """The U-Net that training starts from: the shipped box's, or random weights."""
    unet = UNet(BOX.unet)
    if not fresh:
        unet.load_state_dict(load_model(box_path()).unet.state_dict())
    return unet


def train_diffusion(options: Options) -> None:
    """The U-Net on cached latents, and the text tower with it where asked; each save also draws the watched prompts."""
    torch.manual_seed(0)
    unet, text, tokenizer = new_unet(options.fresh), trained_text(), ClipTokenizer(TOWER.config.vocab_size)
    place(unet, CPU, torch.float32)
    hasten(unet)
    parts: dict[str, nn.Module] = {"unet": unet}

    def states(captions: list[str]) -> Tensor:
        return encode_captions(TOWER, text, tokenizer, captions)

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x, t, context)

    if options.train_text:
        parts["text"] = text.requires_grad_(True)
    network = nn.ModuleDict(parts)
    denoiser = Denoiser[Tensor](predict, NoiseSchedule(BOX.schedule), BOX.prediction)
    context = states if options.train_text else frozen(states)
    weighting = DiffusionConfig(min_snr_gamma=options.min_snr or None)
    objective = DiffusionObjective(network, denoiser, context, BOX.latent_scale, weighting)
    config = LoopConfig(
        options.steps, batch_size=options.batch, lr=options.lr, decay=options.decay, checkpoint_every=1000,
        warmup=100, ema_decay=0.999, precision=options.precision, optimizer=options.optimizer,
    )  # fmt: skip
    if options.start and not state_path(options.run).exists():
        weights = network.state_dict() | ema_weights(state_path(options.start))
        begin(options.run, weights, options.start)

    def on_save(state: State) -> None:
        export_box(RUNS / "box.safetensors", options.run)
        draw_watched(RUNS / "box.safetensors", RUNS / options.run / f"samples-{state.step:06}.png")

    latents = CachedLatents([latents_path(folder) for folder in options.data])
    fit(objective, latents, config, RUNS / options.run, on_save)


def part_of(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors under a part's name, without it."""
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}


def export_box(path: Path, run: str) -> None:
    """The runs' averaged weights as one checkpoint of the box family."""
    weights = ema_weights(state_path(run))
    text = part_of(weights, "text") or trained_text().state_dict()
    sharper = "decoder" if state_path("decoder").exists() else AUTOENCODER  # its latents are the same
    parts = {"unet": part_of(weights, "unet"), "text": text, "autoencoder": trained_autoencoder(sharper).state_dict()}
    save_checkpoint(path, BOX, parts)


def export(options: Options) -> None:
    """Put the weights of a diffusion run, with the text tower and the autoencoder, into the package."""
    export_box(box_path(), options.run)


def draw_watched(checkpoint: Path, sheet: Path) -> None:
    """A sheet of the watched prompts, two seeds each."""
    pipe = Pipeline(load_model(checkpoint))
    pictures = [pipe(prompt, count=2, steps=20).images for prompt in WATCHED]
    save_png(sheet, grid(np.concatenate(pictures), columns=8))


def unpack(options: Options) -> None:
    """Lay out the shipped box as runs at step 0, so that training goes on from it where the runs are gone."""
    model = load_model(box_path())
    begin(AUTOENCODER, model.autoencoder.state_dict(), model.hash)
    begin("clip", model.texts[0].state_dict(), model.hash)
    begin("diffusion", nn.ModuleDict({"unet": model.unet}).state_dict(), model.hash)


STAGES: dict[str, Callable[[Options], None]] = {
    "autoencoder": train_autoencoder,
    "decoder": train_decoder,
    "clip": train_clip,
    "scorer": train_scorer,
    "latents": cache_latents,
    "diffusion": train_diffusion,
    "export": export,
    "unpack": unpack,
}


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=0, help="train up to this step")
    parser.add_argument("--name", metavar="NAME", help="the run's folder (default: the stage; for export, diffusion)")
    parser.add_argument("--begin-with", metavar="RUN", help="begin a new run with that run's averaged weights")
    parser.add_argument("--lr", type=float, default=7e-4, help="highest learning rate of diffusion (default: 7e-4)")
    parser.add_argument("--batch", type=int, default=16, help="examples a step of diffusion (default: 16)")
    parser.add_argument("--decay", choices=DECAYS, default="constant", help="of diffusion's rate (default: constant)")
    parser.add_argument(
        "--min-snr", type=float, default=5.0, help="gamma of diffusion's weights; 0: plain (default: 5)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the arithmetic (default: fp32)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of diffusion (default: adamw)")
    parser.add_argument("--fresh", action="store_true", help="start from random weights, not the shipped")
    parser.add_argument("--train-text", action="store_true", help="diffusion trains the text tower as well")
    args = parser.parse_args()
    if args.stage in ("autoencoder", "decoder", "clip", "scorer", "diffusion") and args.steps < 1:
        parser.error(f"--steps {args.steps}: say up to which step to train")
    run = args.name or ("diffusion" if args.stage == "export" else args.stage)
    options = Options(
        args.data,
        args.steps,
        run,
        args.begin_with,
        args.lr,
        args.train_text,
        args.fresh,
        args.batch,
        args.decay,
        args.min_snr,
        args.precision,
        args.optimizer,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        STAGES[args.stage](options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
