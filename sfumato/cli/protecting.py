"""What commands that draw do with a picture before it is saved: look at it, mark it, sign it. The recipe says each."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.safety.checking import POLICIES, Checked, WordList, checked, prompts_of, refuse, treated
from sfumato.safety.marks import METHODS, TEXT, Mark, check_room, marked
from sfumato.safety.provenance import load_key, signed

if TYPE_CHECKING:  # networks are imported where they are used: flags and their help need none
    from sfumato.families import Model
    from sfumato.types import Job, Result

log = logging.getLogger(__name__)


def add_protecting_flags(parser: argparse.ArgumentParser, original: bool = False) -> None:
    """--safety, --watermark, --sign and what belongs to them. `original`: on as in the original scripts."""
    add = parser.add_argument_group("protecting", "told in each picture's recipe").add_argument
    usual = "blur where a checker is at hand" if original else "off"
    add("--safety", choices=POLICIES, help=f"what is done about pictures that a checker flags (default: {usual})")
    add("--safety-checker", metavar="PATH", help="the published checker's weights, or opennsfw (default: the "
        "checkpoint's own, else opennsfw)")  # fmt: skip
    add("--refuse-words", action="append", default=[], metavar="FILE",
        help="draw no prompt with one of the file's words; may be repeated")  # fmt: skip
    usual = f"{TEXT} where a picture has room; '' for none" if original else "none"
    add("--watermark", nargs="?", const=TEXT, metavar="TEXT", help=f"an invisible mark (default: {usual})")
    add("--watermark-method", choices=METHODS, default=METHODS[0], help="(default: %(default)s, the original's)")
    add("--sign", metavar="KEY", help="sign picture and recipe with this private key (see sfumato keys)")
    parser.set_defaults(original=original)


def redone(pixels: np.ndarray, made: Mapping[str, Any]) -> np.ndarray:
    """Pixels (H, W, 3) drawn again, treated and marked as the recipe says the first ones were."""
    safety, mark = made.get("safety"), made.get("watermark")
    try:
        if safety is not None and safety["flagged"]:
            pixels = treated(pixels, safety["policy"])
        return pixels if mark is None else marked(pixels, Mark(mark["text"], mark["method"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"picture: its recipe is damaged (safety or watermark: {error})") from error


def carried(made: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a recipe that stay true of a picture that was done again."""
    return {name: made[name] for name in ("safety", "watermark") if name in made}


class Protecting:
    """What the flags ask for. ValueError where a checker, a word list or a key cannot be had."""

    def __init__(self, args: argparse.Namespace) -> None:
        from sfumato.safety.choosing import is_at_hand, open_checker

        self.policy = args.safety or ("blur" if args.original and is_at_hand(args.ckpt) else "off")
        if self.policy == "off" and args.safety_checker is not None:
            raise ValueError(f"safety_checker={args.safety_checker!r}: --safety says what is done about its verdict")
        self._checker = None if self.policy == "off" else open_checker(args.safety_checker, args.ckpt)
        self._words = [WordList(path) for path in args.refuse_words]
        text = TEXT if args.watermark is None and args.original else args.watermark
        self.mark = Mark(text, args.watermark_method) if text else None
        self._only_with_room = args.watermark is None
        self._key = None if args.sign is None else load_key(args.sign)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError where a prompt is refused."""
        refuse(prompts, self._words)

    def check_size(self, height: int, width: int) -> None:
        """ValueError where a picture of this size, in px, has no room for the mark that was asked for."""
        if self.mark is not None and not self._only_with_room:
            check_room(self.mark, height, width)

    def check(self, jobs: Sequence[Job], model: Model) -> None:
        """ValueError where a prompt is refused, or a picture would have no room for the mark."""
        self.check_prompts([prompt for job in jobs for prompt in prompts_of(job)])
        if self.mark is None or self._only_with_room:
            return
        from sfumato.tasks.checks import complete
        from sfumato.tasks.pictures import Pictures
        from sfumato.tasks.plot import final_size

        pictures = Pictures()
        for job in jobs:
            width, height = final_size(complete(job, model.family, pictures.size(job)), model, pictures)
            self.check_size(height, width)

    def shown(self, result: Result) -> Checked:
        """The result as it may be shown."""
        found = checked(result, self._checker, self.policy)
        self._tell(found)
        return found

    def _tell(self, found: Checked) -> None:
        """Log how many pictures were flagged."""
        if count := sum(verdict.flagged for verdict in found.verdicts):
            done = {"report": "told in the recipe", "blur": "blurred", "withhold": "withheld"}[self.policy]
            log.warning("%d of %d pictures flagged by %s: %s", count, len(found.verdicts), self._checker_name, done)

    @property
    def _checker_name(self) -> str:
        return "nobody" if self._checker is None else self._checker.name

    def is_hidden(self, found: Checked, index: int) -> bool:
        """Whether picture `index` is not shown as it was drawn, so that nothing else may show it either."""
        return self.policy in ("blur", "withhold") and found.verdicts[index].flagged

    def finished(self, found: Checked, index: int, sign: bool = True) -> tuple[np.ndarray, dict[str, Any]]:
        """Picture `index` (H, W, 3) marked, and its recipe with what was done, signed (unless it is a part only)."""
        from sfumato.pipeline import recipe

        pixels, made = found.result.images[index], recipe(found.result, index)
        if found.verdicts:
            made["safety"] = {"policy": found.policy, **found.verdicts[index].to_dict()}
        if self.mark is not None and self._has_room(pixels):
            pixels = marked(pixels, self.mark)
            made["watermark"] = asdict(self.mark)
        return pixels, self.signed(made, pixels) if sign else made

    def protected(self, result: Result, made: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """The one picture of a result (H, W, 3) looked at, treated and marked; `made` with what was done, signed.

        For pictures whose recipe is not a job's.
        """
        pixels, own = self.finished(self.shown(result), 0, sign=False)
        return pixels, self.signed({**made, **carried(own)}, pixels)

    def signed(self, made: dict[str, Any], pixels: np.ndarray) -> dict[str, Any]:
        """A recipe with a signature over itself and the pixels (H, W, 3), where one is asked for."""
        return made if self._key is None else signed(made, pixels, self._key)

    def grid(self, pixels: np.ndarray) -> np.ndarray:
        """A grid of pictures, marked where it has room."""
        return pixels if self.mark is None or not self._has_room(pixels) else marked(pixels, self.mark)

    def _has_room(self, pixels: np.ndarray) -> bool:
        """Whether a picture is large enough; said once where it is not."""
        assert self.mark is not None
        try:
            check_room(self.mark, *pixels.shape[:2])
        except ValueError as error:
            log.info("no mark: %s", error)
            return False
        return True
