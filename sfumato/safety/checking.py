"""What checkers of pictures and prompts say, and what is done about it. Knows no checker's network.

Policies: `report` tells, `blur` makes a picture unreadable, `withhold` gives plain grey, `off` looks at nothing.
Nothing is redrawn and nobody is mocked. Letters: B pictures, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from sfumato.types import Job, Result

POLICIES = ("off", "report", "blur", "withhold")
GREY = 128
BLUR = 1 / 12  # of the longer side: the deviation of the blur


@dataclass(frozen=True)
class Verdict:
    """What a checker says of one picture or prompt: flagged or not, its scores by name, and the checker's own name."""

    flagged: bool
    scores: Mapping[str, float]
    checker: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Checker(Protocol):
    """pixels (B, H, W, 3) uint8 -> a verdict for each picture."""

    name: str

    def check(self, pixels: np.ndarray) -> list[Verdict]: ...


class PromptCheck(Protocol):
    """A prompt -> a verdict."""

    name: str

    def check(self, prompt: str) -> Verdict: ...


@dataclass(frozen=True)
class Checked:
    """A result after a policy: its pictures as they may be shown, and what was said of each (empty under `off`)."""

    result: Result
    verdicts: tuple[Verdict, ...]
    policy: str


def check_policy(policy: str) -> str:
    """The name of a policy; ValueError where there is none of it."""
    if policy not in POLICIES:
        raise ValueError(f"safety={policy!r}: one of {', '.join(POLICIES)}")
    return policy


def checked(result: Result, checker: Checker | None, policy: str) -> Checked:
    """A drawn result's pictures looked at and treated; what Pipeline.draw gave stays as it is.

    ValueError where the policy is not known, or needs a checker and there is none.
    """
    if check_policy(policy) == "off":
        return Checked(result, (), policy)
    if checker is None:
        raise ValueError(f"safety={policy!r}: a checker is needed")
    verdicts = tuple(checker.check(result.images))
    if not any(verdict.flagged for verdict in verdicts):
        return Checked(result, verdicts, policy)
    images = [
        treated(image, policy) if verdict.flagged else image
        for image, verdict in zip(result.images, verdicts, strict=True)
    ]
    return Checked(replace(result, images=np.stack(images)), verdicts, policy)


def treated(pixels: np.ndarray, policy: str) -> np.ndarray:
    """A flagged picture (H, W, 3) uint8 as a policy shows it."""
    if check_policy(policy) == "withhold":
        return np.full_like(pixels, GREY)
    if policy == "blur":
        radius = max(pixels.shape[:2]) * BLUR
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    return pixels


def prompts_of(job: Job) -> list[str]:
    """The prompts that a job draws from, which checks of prompts look at: its own and its second pass's."""
    second = None if job.hires is None else job.hires.prompt
    return [job.prompt] if second is None else [job.prompt, second]


def refuse(prompts: Sequence[str], checks: Sequence[PromptCheck]) -> None:
    """ValueError where a check flags one of the prompts, before anything is drawn."""
    for prompt in prompts:
        for check in checks:
            verdict = check.check(prompt)
            if verdict.flagged:
                raise ValueError(f"prompt: refused by {verdict.checker} ({', '.join(verdict.scores)})")


class WordList:
    """The simplest check of prompts: words and phrases, one a line; # begins a comment. Case and spaces do not count.

    It finds whole words only, in the language of the list, and is easy to write around.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = f"word list {Path(path).name}"
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"words={str(path)!r}: not UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise ValueError(f"words={str(path)!r}: {error.strerror}") from error
        entries = [" ".join(line.partition("#")[0].casefold().split()) for line in lines]
        self.entries = tuple(entry for entry in entries if entry)
        if not self.entries:
            raise ValueError(f"words={str(path)!r}: it holds no word")

    def check(self, prompt: str) -> Verdict:
        text = " ".join(prompt.casefold().split())
        found = [entry for entry in self.entries if re.search(rf"(?<!\w){re.escape(entry)}(?!\w)", text)]
        return Verdict(bool(found), dict.fromkeys(found, 1.0), self.name)
