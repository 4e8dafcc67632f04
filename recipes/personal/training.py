"""The commands that train, as they stand in docs/personalising.md, and running one of them with a clock.

A finished run keeps what it took in `spent.json` and is not trained again. Knows no picture and no measure.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sfumato.cli.main import main

log = logging.getLogger(__name__)

DATA, RUNS = Path("data/personal"), Path("runs/personal")
SPENT = "spent.json"
SHARED = "--batch 5 --warmup 20 --decay cosine --checkpoint-every 1000"
COMMANDS: dict[str, tuple[str, ...]] = {
    "lora": (
        f"sfumato train lora --data data/personal/subject --out runs/personal/creature --steps 400 --rank 16 --lr 2e-3 "
        f"--ema-decay 0.95 {SHARED}",
    ),
    "inversion": (
        f"sfumato train textual-inversion --data data/personal/word --out runs/personal/hornling --steps 900 "
        f"--vectors 8 --initial penguin --caption-prob 1 --lr 3e-2 --ema-decay 0.95 {SHARED}",
    ),
    "dreambooth": (
        f"sfumato train dreambooth --data data/personal/subject --out runs/personal/whole --steps 250 --lr 2e-4 "
        f"--ema-decay 0.95 {SHARED} --train-text --class-prompt 'a penguin' --class-count 80 --class-steps 15",
        f"sfumato train dreambooth --data data/personal/subject --out runs/personal/alone --steps 250 --lr 2e-4 "
        f"--ema-decay 0.95 {SHARED} --train-text",
    ),
    "style": (
        f"sfumato train hypernetwork --data data/personal/style --out runs/personal/glossy --steps 500 --lr 1e-3 "
        f"--activation mish --ema-decay 0.95 {SHARED}",
    ),
    "edges": (
        "sfumato train controlnet --data data/personal/edges --annotate canny --out runs/personal/edges --steps 1300 "
        "--batch 8 --lr 2e-3 --min-snr 1 --warmup 20 --decay cosine --ema-decay 0.97 --checkpoint-every 500",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished training: its command, the model's hash, seconds by the clock and of all cores, result and folder."""

    command: str
    base: str
    seconds: float
    core_seconds: float

    @property
    def folder(self) -> Path:
        """Where its result lies."""
        words = shlex.split(self.command)
        return Path(words[words.index("--out") + 1])

    @property
    def name(self) -> str:
        """What prompts call its result by."""
        return self.folder.name


def as_given(command: str, model: str | None, steps: int | None = None) -> str:
    """A command with the model, where it is not the one in the box, and with other `steps`, to try."""
    words = shlex.split(command)
    if steps is not None:
        words[words.index("--steps") + 1] = str(steps)
    return shlex.join(words + ([] if model is None else ["--ckpt", model]))


def trained(command: str, base: str) -> Run:
    """Run a command, or find it finished; `base` is the hash of its model.

    ValueError where the folder holds a run that is not finished, or another's: seconds would not be the whole's.
    """
    folder = Run(command, base, 0.0, 0.0).folder
    if (folder / SPENT).exists():
        run = Run(**json.loads((folder / SPENT).read_text("utf-8")))
        if (run.command, run.base) != (command, base):
            raise ValueError(f"run={str(folder)!r}: of another command or model; move it away to train anew")
        return run
    if (folder / "trainer.json").exists():
        raise ValueError(f"run={str(folder)!r}: begun and not finished; move it away, so that all of it is timed")
    log.info("$ %s", command)
    began, spent = time.perf_counter(), time.process_time()
    if code := main(shlex.split(command)[1:]):
        raise ValueError(f"command={command!r}: it ended with code {code}")
    run = Run(command, base, round(time.perf_counter() - began, 1), round(time.process_time() - spent, 1))
    (folder / SPENT).write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
    return run
