"""The arguments of a call by diffusers' names: one clear line for each that is unknown, not there yet, or wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.types import Job

NOT_YET = (
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"),
    *("negative_pooled_prompt_embeds", "cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds"),
    *("timesteps", "sigmas", "prompt_2", "negative_prompt_2", "denoising_end", "negative_original_size"),
    *("negative_crops_coords_top_left", "negative_target_size", "callback", "callback_steps"),
)
LOADING_IGNORED = ("feature_extractor", "requires_safety_checker", "use_safetensors", "low_cpu_mem_usage")
THEIR_NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "count": "num_images_per_prompt",
    "rescale": "guidance_rescale",
}


def refuse(more: Mapping[str, Any], function: Callable[..., Any], more_known: Sequence[str]) -> None:
    """ValueError for an argument that asks for what is not there yet, TypeError for one that nobody knows."""
    for name in more:
        if name in NOT_YET and not is_nothing(more[name]):
            raise ValueError(f"{name}: not there yet")
    refuse_unknown((name for name in more if name not in NOT_YET), function, more_known)


def in_their_names(error: str) -> str:
    """A job's error with the field as it is called in a call."""
    field, equals, rest = error.partition("=")
    return f"{THEIR_NAMES.get(field, field)}{equals}{rest}"


def texts_of(name: str, given: str | Sequence[str], count: int | None = None) -> list[str]:
    """`count` texts from one or as many; any number above 0 where `count` is None."""
    texts = [given] * (count or 1) if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"{name}={given!r}: a text or a list of texts is needed")
    if count is not None and len(texts) != count:
        raise ValueError(f"{name}: {len(texts)} are given for {count} prompts")
    return list(texts)


def sized(job: Job, sizes: Mapping[str, Any]) -> Job:
    """The complete job with XL's sizes, each a pair or None."""
    for name, pair in sizes.items():
        if pair is not None and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise ValueError(f"{name}={pair!r}: two numbers are needed")
    target = sizes.get("target_size")
    if target is not None and tuple(target) != (job.height, job.width):
        raise ValueError(f"target_size={target}: only the picture's own, {(job.height, job.width)}, is there yet")
    original, crop = sizes.get("original_size") or (None, None), sizes.get("crops_coords_top_left") or (None, None)
    return replace(job, original_height=original[0], original_width=original[1], crop_top=crop[0], crop_left=crop[1])


def is_nothing(value: Any) -> bool:
    """Whether an argument asks for nothing: None, False, 0 or (0, 0)."""
    return (
        value is None or (isinstance(value, (int, float)) and not value) or (value == (0, 0) and type(value) is tuple)
    )


def refuse_unknown(names: Iterable[str], function: Callable[..., Any], more_known: Sequence[str] = ()) -> None:
    """TypeError for the first of the names, with those near it among the function's arguments."""
    known = [*(p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD), *more_known]
    for name in names:
        near = " or ".join(difflib.get_close_matches(name, known, n=3))
        hint = (
            f"did you mean {near}?" if near else f"there are {', '.join(n for n in known if n not in ('self', 'cls'))}"
        )
        raise TypeError(f"{name}: no such argument; {hint}")
