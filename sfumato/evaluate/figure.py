"""The figure of a guidance sweep: FID against CLIP score, a point for each guidance, a line for each checkpoint.

As Saharia et al. 2022, figure 4, and the model cards of Stable Diffusion show it. Knows results, no pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.images.files import written_beside


def axes_of(points: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What is shown from left to right ("cosine", or "guidance" without CLIP scores) and upwards (a metric's name)."""
    names = list(points[0]["metrics"])
    upwards = next(name for name in names if name == "fid" or name.endswith("-fid"))
    return ("cosine" if "clip-score" in names else "guidance"), upwards


def draw_figure(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of points {checkpoint, guidance, metrics}, whole or not at all. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"figure={str(path)!r}: matplotlib is needed (pip install matplotlib)") from error
    across, upwards = axes_of(points)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for checkpoint in dict.fromkeys(point["checkpoint"] for point in points):
        own = sorted((point for point in points if point["checkpoint"] == checkpoint), key=lambda p: p["guidance"])
        x = [point["metrics"]["clip-score"]["cosine"] if across == "cosine" else point["guidance"] for point in own]
        y = [point["metrics"][upwards]["value"] for point in own]
        axes.plot(x, y, marker="o", label=checkpoint)
        for point, left, up in zip(own, x, y, strict=True):
            axes.annotate(f"{point['guidance']:g}", (left, up), textcoords="offset points", xytext=(4, 4), fontsize=8)
    facts = points[0]["metrics"][upwards]
    axes.set_xlabel("CLIP score (mean cosine)" if across == "cosine" else "guidance")
    axes.set_ylabel("FID" if upwards == "fid" else f"FID of {facts['features']}")
    axes.set_title(f"{facts['drawn']:,} drawn, {facts['real']:,} real, resize {facts['resize']}", fontsize=9)
    axes.legend()
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
