"""Error of every sampler against its number of evaluations, on data whose denoiser and distribution are known.

`python benchmarks/sampler_error.py` draws docs/sampler-error.png (matplotlib, the `bench` extra) and writes JSON to
benchmarks/results/. The data are 0.3 N(-1, 0.4^2) + 0.7 N(1.5, 0.4^2), the levels Karras's between those of SD 1.
Deterministic samplers: root mean square error of x0 against a fine Runge-Kutta solution of the same starts. Stochastic
ones: Wasserstein distance of 20,000 numbers to the data, whose floor is the mean
distance of as many exact draws.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import karras
from sfumato.types import Answer, Query
from tests.sampler_cases import CENTRES, SD1, SHARES, WIDTH, Draws, exact_two_humps, run, two_humps

STEPS = (5, 7, 10, 14, 20, 28, 40, 56, 80)
NUM_DRAWS = 20_000
ROOT = Path(__file__).parent.parent
LEFT_OUT = {"lcm": "for distilled networks", "tcd": "for distilled networks"}


def quantiles(num_draws: int) -> np.ndarray:
    """The data's quantiles at (i + 1/2) / num_draws."""
    grid = np.linspace(-5, 5, 200_001)
    erf = torch.special.erf
    below = sum(
        share * (1 + erf(torch.from_numpy((grid - centre) / (WIDTH * 2**0.5))).numpy()) / 2
        for share, centre in zip(SHARES, CENTRES, strict=True)
    )
    return np.interp((np.arange(num_draws) + 0.5) / num_draws, below, grid)


def exact_draws(num_draws: int, seed: int) -> np.ndarray:
    """Sorted draws of the data."""
    random = np.random.default_rng(seed)
    centres = np.array(CENTRES)[(random.random(num_draws) > SHARES[0]).astype(int)]
    return np.sort(centres + WIDTH * random.standard_normal(num_draws))


def counted(name: str, x: Tensor, sigmas: list[float], noise: object, **options: object) -> tuple[Tensor, int]:
    """The final x and the number of evaluations."""
    calls = 0

    def denoise(query: Query) -> Answer:
        nonlocal calls
        calls += 1
        return two_humps(query)

    return run(name, x, sigmas, denoise, noise, **options), calls


def ode_errors(name: str, options: dict[str, object]) -> list[tuple[int, float]]:
    """(evaluations, error) of a deterministic sampler; DPM adaptive by its tolerances."""
    starts = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).reshape(1, 1, 1, -1) * SD1.sigma_max
    exact = exact_two_humps(starts, SD1.sigma_max, SD1.sigma_min, 2000)
    found = []
    for n in STEPS:
        sigmas, more = karras(SD1, n + 1)[:-1], dict(options)
        if name == "dpm_adaptive":
            more |= {"rtol": 4.0 / n**2, "atol": 1.0 / n**2}
        final, calls = counted(name, starts, sigmas, Draws(starts.shape, dtype=torch.float64), **more)
        found.append((calls, float((final - exact).square().mean().sqrt())))
    return found


def distribution_errors(name: str, options: dict[str, object]) -> list[tuple[int, float]]:
    """(evaluations, Wasserstein-1 distance) of a stochastic sampler."""
    reference, found = quantiles(NUM_DRAWS), []
    for n in STEPS:
        sigmas, noise = karras(SD1, n), Draws((1, 1, 1, NUM_DRAWS))
        x = noise() * sigmas[0] + SHARES[0] * CENTRES[0] + SHARES[1] * CENTRES[1]
        final, calls = counted(name, x, sigmas, noise, **options)
        found.append((calls, float(np.abs(np.sort(final.flatten().numpy()) - reference).mean())))
    return found


def measure() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The two panels: sampler -> points."""
    ode, distribution = {}, {}
    for name, found in SAMPLERS.items():
        if name in LEFT_OUT:
            continue
        silent = not {"eta", "s_noise"} & found.options or "s_churn" in found.options
        if silent:
            ode[name] = ode_errors(name, {})
        elif found.takes_eta:
            ode[f"{name}, eta 0"] = ode_errors(name, {"eta": 0.0})
        if not silent and name != "dpm_adaptive":
            distribution[name] = distribution_errors(name, {"eta": 1.0} if found.takes_eta else {})
    floor = float(np.mean([np.abs(exact_draws(NUM_DRAWS, i) - quantiles(NUM_DRAWS)).mean() for i in range(20)]))
    distribution["as many exact draws"] = [(STEPS[0], floor), (4 * STEPS[-1], floor)]
    return {"deterministic": ode, "stochastic": distribution}


def plot(panels: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Both panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(17, 9))
    labels = {"deterministic": "root mean square error of x0", "stochastic": "Wasserstein distance to the data"}
    for axis, (kind, lines) in zip(axes, panels.items(), strict=True):
        styles = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in plt.get_cmap("tab10")(range(10))]
        for (name, points), (colour, dash) in zip(lines.items(), styles, strict=False):
            axis.loglog(*zip(*points, strict=True), color=colour, linestyle=dash, label=name, linewidth=1.3)
        axis.set(title=kind, xlabel="evaluations", ylabel=labels[kind])
        axis.grid(which="both", alpha=0.2)
        axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print the error at about twenty evaluations, write JSON and the picture."""
    panels = measure()
    for kind, lines in panels.items():
        print(kind)
        for name, points in lines.items():
            calls, error = min(points, key=lambda point: abs(point[0] - 20))
            print(f"  {name:32s} {calls:4d} evaluations  {error:.2e}")
    made_with = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    result = {"made_with": made_with, "left_out": LEFT_OUT, "errors": panels}
    (ROOT / f"benchmarks/results/sampler_error-{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(panels, ROOT / "docs/sampler-error.png")


if __name__ == "__main__":
    main()
