"""The pictures of docs/editing: every editing command run on the box, and what came out side by side.

    python -m recipes.box.gallery [--out docs/editing]

Everything is drawn from the box's own pictures with fixed seeds, nothing is picked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from sfumato.cli.main import main as sfumato
from sfumato.images import resize

GAP = 6
APPLE, BLUE = "a red apple on a blue background", "a blue background"


class Studio:
    """A folder in which commands leave their pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def run(self, command: str, *flags: str) -> Path:
        """Run a command; returns the folder of its pictures."""
        self.number += 1
        outdir = self.folder / f"{self.number:03}"
        code = sfumato([command, *flags, "--outdir", str(outdir)])
        if code:
            raise SystemExit(f"sfumato {command} {' '.join(flags)}: exit code {code}")
        return outdir / "samples"

    def picture(self, command: str, *flags: str) -> np.ndarray:
        """The only picture of a command."""
        return read(self.run(command, *flags) / "00000.png")


def read(path: Path) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a file."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def row(pictures: Sequence[np.ndarray], scale: int = 1) -> np.ndarray:
    """Pictures side by side on white, each pixel enlarged to `scale`."""
    large = [resize(one[None], one.shape[1] * scale, one.shape[0] * scale, "nearest")[0] for one in pictures]
    height = max(one.shape[0] for one in large)
    sheet = np.full((height, sum(one.shape[1] + GAP for one in large) - GAP, 3), 255, dtype=np.uint8)
    left = 0
    for one in large:
        sheet[: one.shape[0], left : left + one.shape[1]] = one
        left += one.shape[1] + GAP
    return sheet


def rows(*some: np.ndarray) -> np.ndarray:
    """Rows one above the other."""
    width = max(one.shape[1] for one in some)
    padded = [np.pad(one, ((0, GAP), (0, width - one.shape[1]), (0, 0)), constant_values=255) for one in some]
    return np.concatenate(padded)[:-GAP]


def masks(folder: Path) -> tuple[str, str]:
    """A disc with a hard edge and one whose edge is grey, as files."""
    y, x = np.mgrid[:128, :128]
    away = np.hypot(x - 64, y - 72)
    found = {"hard": away < 44, "soft": np.clip((68 - away) / 40, 0, 1)}
    for name, mask in found.items():
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / f"{name}.png")
    return str(folder / "hard.png"), str(folder / "soft.png")


def draw_all(folder: Path, out: Path) -> None:
    """Every picture of the gallery."""
    studio = Studio(folder)

    def save(name: str, picture: np.ndarray) -> None:
        Image.fromarray(picture).save(out / f"{name}.png", optimize=True)
        print(out / f"{name}.png")

    source = studio.run("txt2img", "--prompt", APPLE, "--seed", "4") / "00000.png"
    apple, image = read(source), ["--image", str(source)]
    hard, soft = masks(folder)

    banana = ["--prompt", "a yellow banana on a green background", "--seed", "1"]
    steps = ("0", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "1")
    strengths = [studio.picture("img2img", *image, *banana, "--strength", strength) for strength in steps]
    save("img2img", row([apple, *strengths]))

    mask = ["--prompt", "a sunflower on a blue background", "--seed", "2"]
    alone = ["--strength", "0.9", "--only-masked", "--padding", "8"]
    inpainted = [
        studio.picture("inpaint", *image, "--mask", hard, *mask),
        studio.picture("inpaint", *image, "--mask", hard, *mask, "--strength", "1", "--fill", "noise"),
        studio.picture("inpaint", *image, "--mask", hard, *mask, "--strength", "1", "--fill", "fill"),
        studio.picture("inpaint", *image, "--mask", soft, *mask, "--mask-soft", "--strength", "1"),
        studio.picture("inpaint", *image, "--mask", hard, *mask, "--strength", "1", "--mask-invert"),
        studio.picture("inpaint", *image, "--mask", hard, *mask, *alone),
    ]
    save("inpaint", row([apple, read(Path(hard)), read(Path(soft)), *inpainted]))

    beyond = ["--prompt", BLUE, "--seed", "3", "--guidance", "3"]
    save("outpaint", rows(
        row([apple, studio.picture("outpaint", *image, "--left", "64", "--right", "64", *beyond),
             studio.picture("outpaint", *image, "--left", "64", "--right", "64", "--fill", "fill", *beyond)]),
        row([studio.picture("outpaint", *image, "--left", "128", "--right", "128", "--up", "64", "--down", "64",
                            "--fill", "fill", *beyond)]),
    ))  # fmt: skip

    save("upscale", row([
        studio.picture("upscale", *image, "--factor", "4", "--upscaler", "nearest"),
        studio.picture("upscale", *image, "--factor", "4"),
        studio.picture("upscale", *image, "--factor", "4", "--prompt", APPLE, "--strength", "0.3"),
    ], 1))  # fmt: skip

    wide = studio.picture("txt2img", "--prompt", "a red apple on a white background", "--width", "384", "--tile", "128",
                          "--seed", "5")  # fmt: skip
    plain = studio.picture("txt2img", "--prompt", "a sunflower on a green background", "--seed", "6")
    meeting = studio.picture("txt2img", "--prompt", "a sunflower on a green background", "--seed", "6",
                             "--seamless", "xy")  # fmt: skip
    save("tiles", rows(row([wide]), row([np.tile(plain, (2, 2, 1)), np.tile(meeting, (2, 2, 1))])))

    seen = studio.run("txt2img", "--prompt", APPLE, "--seed", "4", "--film", "png", "--preview", "full",
                      "--where", "apple", "--where", "blue")  # fmt: skip
    linear = studio.run("txt2img", "--prompt", APPLE, "--seed", "4", "--film", "png")
    looks = [read(seen / f"00000-where-{word}.png") for word in ("apple", "blue")]
    save("seeing", rows(row([read(seen / "00000-film.png")], 1), row([read(linear / "00000-film.png")], 1), row(looks)))

    told = ["--prompt", APPLE, "--steps", "30"]
    edited = [
        studio.picture("edit", *image, *told),
        studio.picture("edit", *image, *told, "--to", "a red apple on a green background"),
        studio.picture("edit", *image, *told, "--to", "a red apple on a yellow background"),
        studio.picture("edit", *image, *told, "--to", "a strawberry on a blue background", "--guidance", "2"),
    ]
    save("edit", row([apple, *edited]))

    plot = out / "plot.png"
    code = sfumato(["plot", *image, "--prompt", "a strawberry on a blue background", "--x", "strength=0.3,0.6,0.8,1",
                    "--y", "sampler=ddim,euler_a,dpmpp_2m_sde,unipc", "--out", str(plot)])  # fmt: skip
    if code:
        raise SystemExit(f"sfumato plot: exit code {code}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/editing"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        draw_all(Path(folder), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
