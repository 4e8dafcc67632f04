"""The figures of docs/how-it-works, drawn by Sfumato's own code from fixed seeds; nothing is picked.

    python -m docs_tools.figures [--out docs/how-it-works/figures] [NAME ...]

Needs matplotlib (the extra `docs`). On one core the whole takes about half a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sfumato.diffusion.noise_schedule import NoiseSchedule
from sfumato.diffusion.schedule import sampling_sigmas
from sfumato.families import BOX, SD1, XL
from sfumato.images import resize
from sfumato.images.heat import heated
from sfumato.pipeline import Pipeline
from sfumato.tasks.decoding import decode
from sfumato.tasks.observing import Where, places_of
from sfumato.tasks.previews import linear
from sfumato.types import Answer, Job, Query

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "how-it-works" / "figures"
PROMPT, SEED, STEPS, SCALE = "a red apple on a blue background", 2, 12, 2
SAMPLERS = ("euler", "heun", "dpm2", "lms", "plms", "dpmpp_2m", "unipc")


def plotted(path: Path, draw: Callable[[Any], None], columns: int = 1) -> None:
    """Draw into the axes of a new figure and save it as a small PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.4), layout="constrained")
    draw(figure.subplots(1, columns, squeeze=False)[0])
    figure.savefig(path, dpi=90, metadata={"Software": None})


def noise_schedules(out: Path) -> None:
    """Sigma and what is left of the picture at each timestep as trained, and the levels that schedules visit."""

    def draw(axes: Any) -> None:
        for family in (SD1, BOX):
            trained = NoiseSchedule(family.schedule)
            axes[0].plot(trained.sigmas, label=f"sigma, {family.name}")
        for family in (SD1, BOX):
            axes[1].plot(np.sqrt(NoiseSchedule(family.schedule).alphas_cumprod), label=family.name)
        axes[0].set(yscale="log", xlabel="timestep", ylabel="sigma", title="noise level as trained")
        axes[1].set(xlabel="timestep", ylabel="share", title="share of the picture in x / sqrt(1 + sigma^2)")
        trained = NoiseSchedule(XL.schedule)
        for name in ("uniform", "karras", "exponential", "beta", "kl_optimal"):
            axes[2].plot(range(11), np.maximum(sampling_sigmas(name, trained, 10), 0.02), marker=".", label=name)
        axes[2].set(yscale="log", xlabel="step", title="sigma visited in 10 steps (0 is shown as 0.02)")
        for each in axes:
            each.legend(fontsize=8)

    plotted(out / "noise-schedules.png", draw, columns=3)


def error_against_steps(out: Path) -> None:
    """How far samplers end from the exact solution, by network calls (benchmarks/results)."""
    newest = max((ROOT / "benchmarks" / "results").glob("sampler_error-*.json"))
    errors = json.loads(newest.read_text(encoding="utf-8"))["errors"]["deterministic"]

    def draw(axes: Any) -> None:
        for name in SAMPLERS:
            calls, values = zip(*errors[name], strict=True)
            axes[0].plot(calls, values, marker=".", label=name)
        axes[0].set(xscale="log", yscale="log", xlabel="network calls", ylabel="error")
        axes[0].legend(fontsize=7, ncols=2)

    plotted(out / "error-against-steps.png", draw)


def emerging(out: Path, pipeline: Pipeline) -> None:
    """The way from noise: x as the sampler holds it, the network's x0 as a linear map of latents, and x0 decoded."""
    model = pipeline.model
    seen: list[tuple[float, Any, Any]] = []

    def observe(run: Any, scene: Any, which: slice) -> None:
        def watch(query: Query, answer: Answer) -> None:
            seen.append((query.sigma, query.x, answer.x0))

        run.watch = watch

    job = Job(prompt=PROMPT, seed=SEED, steps=STEPS, sampler="euler", schedule="karras")
    pipeline.draw(job, observe=observe)
    rough = linear(model.family)
    shown = seen[:: max(1, len(seen) // STEPS)]
    rows = [
        [rough(x / (1 + sigma**2) ** 0.5)[0] for sigma, x, _ in shown],
        [rough(x0)[0] for _, _, x0 in shown],
        [decoded(x0, model) for _, _, x0 in shown],
    ]
    save(out / "emerging.png", rows, [f"{sigma:.3g}" for sigma, _, _ in shown])


def decoded(x0: Any, model: Any) -> np.ndarray:
    """The picture (H, W, 3) uint8 of latents (1, C, h, w)."""
    from sfumato.images import to_uint8

    return to_uint8(decode(x0, 0.0, model))[0]


def words(out: Path, pipeline: Pipeline) -> None:
    """A picture, and where each word of its prompt looked, over all steps and layers."""
    where = Where(pipeline.model)
    job = Job(prompt=PROMPT, seed=SEED, steps=STEPS)
    picture = pipeline.draw(job, observe=where).images[0]
    names = ["red", "apple", "on", "blue", "background"]
    row = [picture]
    for name in names:
        heat = where.heat(0, places_of(name, job, pipeline.model))
        assert heat is not None, "the picture was just drawn"
        row.append(heated(picture, heat))
    save(out / "words.png", [row], ["picture", *names])


def guidance(out: Path, pipeline: Pipeline) -> None:
    """One seed at rising guidance."""
    scales = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    row = [pipeline(PROMPT, seed=SEED, steps=STEPS, guidance=scale).images[0] for scale in scales]
    save(out / "guidance.png", [row], [f"{scale:g}" for scale in scales])


def save(path: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> None:
    """Rows of pictures (H, W, 3) uint8, enlarged, under a line of titles."""
    high, wide = (side * SCALE for side in rows[0][0].shape[:2])
    gap, head = 4, 16
    sheet = Image.new("RGB", ((wide + gap) * len(rows[0]) - gap, head + (high + gap) * len(rows) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (wide + gap) + wide // 2, head // 2), title, fill="black", anchor="mm")
        for number, row in enumerate(rows):
            large = resize(row[column][None], wide, high, "nearest")[0]
            sheet.paste(Image.fromarray(large), (column * (wide + gap), head + number * (high + gap)))
    sheet.quantize(256).save(path, optimize=True)  # a third of the bytes


FIGURES: dict[str, Callable[..., None]] = {
    "noise-schedules": noise_schedules, "error-against-steps": error_against_steps, "emerging": emerging,
    "words": words, "guidance": guidance,
}  # fmt: skip
OF_NUMBERS = ("noise-schedules", "error-against-steps")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figures named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="docs_tools.figures", description="Draw the documentation's figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(default: docs/how-it-works/figures)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.names or list(FIGURES)
    drawn = [name for name in names if name not in OF_NUMBERS]
    pipeline = Pipeline.from_pretrained(device="cpu", adapters=[]) if drawn else None
    for name in names:
        FIGURES[name](args.out) if name in OF_NUMBERS else FIGURES[name](args.out, pipeline)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
