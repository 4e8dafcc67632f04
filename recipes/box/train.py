"""How the model in the box was made: autoencoder, CLIP, latents, diffusion, in this order.

`python -m recipes.box.train STAGE --data FOLDER...` starts a stage or goes on with it; README.md tells the history.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import BOX
from sfumato.images import grid, save_png
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIP, CLIPConfig, CLIPText, CLIPVisionConfig
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.pipeline import Pipeline, box_path
from sfumato.prompts.encode import encode
from sfumato.train.autoencoder import AutoencoderObjective, initialise
from sfumato.train.clip import CLIPObjective
from sfumato.train.data import CachedLatents, CaptionedShards
from sfumato.train.diffusion import DiffusionConfig, DiffusionObjective
from sfumato.train.loop import LoopConfig, State, ema_weights, fit
from sfumato.weights.checkpoint import load_model, place, save_checkpoint
from sfumato.weights.files import save_safetensors

log = logging.getLogger(__name__)

RUNS = Path("runs/box")
CPU = torch.device("cpu")
CLIP_CONFIG = CLIPConfig(
    text=BOX.text,
    vision=CLIPVisionConfig(image_size=BOX.size, patch_size=8, width=192, num_layers=4, num_heads=4),
    embed_dim=192,
)
WATCHED = (
    "a red apple on a white background", "3d octopus on a blue background", "a cartoon cat on a yellow background",
    "flat rocket on a black background", "a guitar", "3d hamburger on a pink background", "sticker of a sunflower",
    "a cartoon penguin on a light blue background", "3d soccer ball on a green background", "a house on white",
    "flat umbrella on a gray background", "3d crown on a purple background",
)  # fmt: skip


def new_autoencoder() -> Autoencoder:
    """The box's autoencoder with the random weights that training starts from."""
    network = initialise(Autoencoder(BOX.autoencoder), seed=0)
    place(network, CPU, torch.float32)
    return network


def train_autoencoder(data: Sequence[Path], steps: int) -> None:
    """Pictures <-> latents; about 22 dB after 1,000 steps."""
    config = LoopConfig(steps, batch_size=16, lr=1e-3, decay="cosine", weight_decay=0.0, ema_decay=0.995)
    fit(AutoencoderObjective(new_autoencoder()), CaptionedShards(data, BOX.size), config, RUNS / "autoencoder")


def train_clip(data: Sequence[Path], steps: int) -> None:
    """Both towers; the text tower is kept."""
    torch.manual_seed(0)
    objective = CLIPObjective(CLIP(CLIP_CONFIG), ClipTokenizer(BOX.text.vocab_size))
    config = LoopConfig(steps, batch_size=96, lr=1e-3, decay="cosine", weight_decay=0.1, ema_decay=0.99)
    fit(objective, CaptionedShards(data, BOX.size), config, RUNS / "clip")


def trained_autoencoder() -> Autoencoder:
    """The averaged weights of stage one."""
    network = Autoencoder(BOX.autoencoder)
    network.load_state_dict(ema_weights(RUNS / "autoencoder" / "state.safetensors"))
    place(network, CPU, torch.float32)
    return network.eval().requires_grad_(False)


def trained_text() -> CLIPText:
    """The averaged text tower of stage two."""
    weights = ema_weights(RUNS / "clip" / "state.safetensors")
    network = CLIPText(BOX.text)
    network.load_state_dict({name: value for name, value in weights.items() if name.startswith("text_model.")})
    return network.eval().requires_grad_(False)


def latents_path(data: Path) -> Path:
    """Where a data set's latents are cached."""
    return RUNS / "latents" / f"{data.name}.safetensors"


@torch.inference_mode()
def cache_latents(data: Sequence[Path], steps: int) -> None:
    """Encode whole sets once; prints the latents' deviation, whose inverse is the family's latent_scale."""
    network = trained_autoencoder()
    for folder in data:
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


def text_states(text: CLIPText) -> Callable[[list[str]], Tensor]:
    """Captions -> (B, 77, D) by the frozen text tower."""
    tokenizer = ClipTokenizer(BOX.text.vocab_size)
    return lambda captions: encode(text, tokenizer, captions, BOX.skip_last, BOX.pad_token).context


def train_diffusion(data: Sequence[Path], steps: int) -> None:
    """The U-Net on cached latents; each save also exports a checkpoint and draws the watched prompts."""
    torch.manual_seed(0)
    network = UNet(BOX.unet)
    place(network, CPU, torch.float32)
    text, autoencoder = trained_text(), trained_autoencoder()

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return network(x, t, context)

    denoiser = Denoiser[Tensor](predict, NoiseSchedule(BOX.schedule), BOX.prediction)
    objective = DiffusionObjective(network, denoiser, text_states(text), BOX.latent_scale, DiffusionConfig())
    config = LoopConfig(steps, batch_size=32, lr=7e-4, warmup=300, decay="cosine", save_every=500)

    def on_save(state: State) -> None:
        path = RUNS / "box.safetensors"
        parts = {"unet": state.ema, "text": text.state_dict(), "autoencoder": autoencoder.state_dict()}
        save_checkpoint(path, BOX, parts)
        draw_watched(path, RUNS / "diffusion" / f"samples-{state.step:06}.png")

    fit(objective, CachedLatents([latents_path(folder) for folder in data]), config, RUNS / "diffusion", on_save)


def draw_watched(checkpoint: Path, sheet: Path) -> None:
    """A sheet of the watched prompts, two seeds each."""
    pipe = Pipeline(load_model(checkpoint))
    pictures = [pipe(prompt, count=2, steps=20).images for prompt in WATCHED]
    save_png(sheet, grid(np.concatenate(pictures), columns=8))


def unpack(data: Sequence[Path], steps: int) -> None:
    """Lay out the shipped box as runs at step 0, so that training goes on from it where the runs are gone."""
    model = load_model(box_path())
    for run, module in (("autoencoder", model.autoencoder), ("clip", model.text), ("diffusion", model.unet)):
        path = RUNS / run / "state.safetensors"
        if path.exists():
            raise ValueError(f"{path}: a run is there already")
        state = module.state_dict()
        tensors = {f"{kind}.{name}": tensor.clone() for kind in ("model", "ema") for name, tensor in state.items()}
        save_safetensors(path, tensors, {"step": "0", "from": model.hash})


STAGES: dict[str, Callable[[Sequence[Path], int], None]] = {
    "autoencoder": train_autoencoder,
    "clip": train_clip,
    "latents": cache_latents,
    "diffusion": train_diffusion,
    "unpack": unpack,
}


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=0, help="train up to this step")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves, as Ctrl-C does
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        STAGES[args.stage](args.data, args.steps)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
