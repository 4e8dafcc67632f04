"""The text that A1111 writes into pictures and shows with them: prompt, negative prompt, and a line of settings.

Source: the format of A1111's web UI 1.10.1. Knows no HTTP.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.types import Job

KEY = "parameters"
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
LEAST = 3  # pairs that make the last line one of settings


def label_of(sampler: str) -> str:
    """The name under which A1111's users know a sampler."""
    labels = SAMPLERS[sampler].labels
    return labels[0] if labels else sampler


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text


def infotext(job: Job, seed: int, model_name: str, model_hash: str, version: str) -> str:
    """What a picture of a complete job, drawn from `seed`, says of itself."""
    hires = job.hires
    strength = job.strength if job.image is not None else None if hires is None else hires.strength
    pairs: dict[str, Any] = {
        "Steps": job.steps,
        "Sampler": label_of(str(job.sampler)),
        "Schedule type": str(job.schedule).replace("_", " ").title(),
        "CFG scale": f"{job.guidance:g}",
        "Seed": seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": model_hash[:10],
        "Model": model_name,
        "Variation seed": job.variation_seed if job.variation_strength else None,
        "Variation seed strength": job.variation_strength or None,
        "Denoising strength": strength,
        "Clip skip": job.clip_skip if (job.clip_skip or 1) > 1 else None,
        "ENSD": job.ensd or None,
        "RNG": "CPU" if job.noise == "cpu" else None,
        "Tiling": True if job.seamless == "xy" else None,
        "Hires upscale": None if hires is None else f"{hires.scale:g}",
        "Hires steps": None if hires is None else hires.steps,
        "Hires upscaler": None if hires is None else hires.upscaler.title(),
        "Version": version,
    }
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    negative = f"\nNegative prompt: {job.negative}" if job.negative else ""
    return f"{job.prompt}{negative}\n{settings}".strip()


def parsed(text: str) -> dict[str, str]:
    """The settings of such a text, with "Prompt" and "Negative prompt"; a size W x H becomes two, "-1" and "-2"."""
    *lines, last = text.strip().split("\n")
    if len(PAIR.findall(last)) < LEAST:
        lines, last = [*lines, last], ""
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("Negative prompt:"):
            into, stripped = negative, stripped.removeprefix("Negative prompt:").strip()
        into.append(stripped)
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for name, value in PAIR.findall(last):
        if value.startswith('"') and value.endswith('"'):
            with suppress(json.JSONDecodeError):  # A1111 keeps such a value as it is written
                value = json.loads(value)
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            found[f"{name}-1"], found[f"{name}-2"] = size[1], size[2]
        else:
            found[name] = value
    return found
