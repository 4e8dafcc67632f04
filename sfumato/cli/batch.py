"""Draw every row of a table, exactly once, however often the run is ended and begun again.

TABLE is Parquet, CSV or JSON lines with a column prompt and one for each other field of a Job that rows differ in; the
flags say the rest. Rows count from 0. OUT holds the pictures by their rows, and index.parquet (of Parquet) or
index.jsonl with row, picture, file, seed, sha256, verdict and error. A row without a seed has one made of its number
and --seed. The same command again goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sfumato.cli.elsewhere import Anchored, absolute_flags
from sfumato.cli.job_flags import add_job_flags, job_from_flags, texts_from_flags
from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.safety.provenance import load_key, public_text
from sfumato.types import Job, Result

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.batch.drawing import Crew, Finished, Hand

log = logging.getLogger(__name__)

FAILED = 1
TELL = 30.0  # s between lines of progress where there is no terminal
# Flags beside the job's that decide the pictures: a run is gone on with only where they are the same.
DECIDING = (
    "ema", "vae", "family", "variant", "adapters", "precision", "fast", "style_names", "wildcards", "no_choices",
    "safety", "safety_checker", "refuse_words", "watermark", "watermark_method",
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato batch`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="a .parquet, .csv or .jsonl file, a row for each job")
    add("out", type=Path, metavar="OUT", help="the folder of the pictures and the index")
    add("--batch", type=int, metavar="N", help="pictures drawn together (default: by the memory, 16 at most)")
    add("--limit", type=int, metavar="N", help="only the table's first N rows")
    add("--shard", default="1/1", metavar="I/N", help="every N-th row from the I-th on, for N programs beside each "
        "other (default: all)")  # fmt: skip
    add("--retry", action="store_true", help="try rows again that failed")
    add("--seed", type=int, default=42, metavar="N", help="where the seeds of rows without one come from (default: 42)")
    add("--deterministic", action="store_true", help="draw every row alone: pictures to the last bit, in more time")
    add("--ray", action="store_true", help="draw on a Ray cluster: that of $RAY_ADDRESS (auto: one that runs on this "
        "machine), else one started here for the run")  # fmt: skip
    add("--replicas", type=int, metavar="N", help="engines of --ray (default: one for each GPU, or one)")
    add_model_flags(parser)
    add_device_flags(parser)
    add_job_flags(parser, without=("prompt", "seed"))
    add_protecting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from sfumato.batch.ledger import Ledger, write_index
    from sfumato.batch.rows import Reader, mark_of, share
    from sfumato.batch.tables import read_table
    from sfumato.tasks.checks import job_to_dict

    base = job_from_flags(args, prompt="", seed=0)
    there = absolute_flags(args) if args.ray else args  # what draws elsewhere begins in a folder of its own
    texts = texts_from_flags(there).jobs
    reader = Reader(base, args.seed, Anchored(Path.cwd(), texts) if args.ray else texts)
    if args.replicas is not None and not args.ray:
        raise ValueError(f"replicas={args.replicas}: they are of --ray")
    shard = read_shard(args.shard)
    table = read_table(args.table)
    numbers = share(len(table), shard, args.limit)
    marks = {number: mark_of(table[number]) for number in numbers}
    crew = crew_of(there)
    try:
        crew.check([(number, table[number]) for number in numbers], reader)
        settings = {"model": crew.model, "seed": args.seed, "job": job_to_dict(base)} | settings_of(args)
        ledger = Ledger(args.out, settings, marks, shard, args.retry, usual_settings())
        try:
            rows = [(number, table[number]) for number in numbers if number not in ledger.done]
            log.info("%d rows to draw, %d are there already", len(rows), len(numbers) - len(rows))
            with Telling(len(rows)) as telling:
                for outcome in crew.draw(rows, reader):
                    ledger.put(outcome)
                    if outcome.error is not None:
                        log.warning("row=%d: %s", outcome.row, outcome.error)
                    telling.one(ledger.failed)
        finally:  # what is finished is kept, whatever ended it
            index = write_index(args.out, args.table.suffix.lower() == ".parquet", marks)
            ledger.close()
    finally:
        crew.close()
    print(index, flush=True)
    if ledger.failed:
        log.warning("%d rows failed; --retry tries them again", ledger.failed)
    return FAILED if ledger.failed else 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What flags decide of the pictures, beside the model and the jobs; a signature's key is told by its public one."""
    return {
        **{name: getattr(args, name) for name in DECIDING},
        "sign": None if args.sign is None else public_text(load_key(args.sign)),
    }


def usual_settings() -> dict[str, Any]:
    """What `settings_of` gives where no flag is given."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    return settings_of(parser.parse_args(["TABLE", "OUT"]))


def read_shard(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4); ValueError where it is no such."""
    index, slash, shards = text.partition("/")
    if not (slash and index.isascii() and index.isdigit() and shards.isascii() and shards.isdigit()):
        raise ValueError(f"shard={text!r}: I/N with I from 1 to N is needed")
    return int(index), int(shards)


def crew_of(args: argparse.Namespace) -> Crew:
    """Whoever draws: this process, or actors of a Ray cluster."""
    from sfumato.batch.drawing import Drawer, Plan

    plan = Plan(args.out.absolute(), args.batch, args.deterministic)
    if not args.ray:
        return Drawer(hand_of(args), plan)
    from sfumato.batch.ray_crew import RayCrew

    return RayCrew(partial(hand_of, args), plan, args.replicas, args.device)


def hand_of(args: argparse.Namespace) -> Hand:
    """The pipeline that the flags ask for, and what is done with its pictures. Called where pictures are drawn."""
    from sfumato.batch.drawing import Hand

    protecting = Protecting(args)
    pipeline = load(args, args.device, args.precision)

    def finish(result: Result) -> list[Finished]:
        shown = protecting.shown(result)
        verdicts = [verdict.to_dict() for verdict in shown.verdicts]
        return [
            (*protecting.finished(shown, index), verdicts[index] if verdicts else None)
            for index in range(len(result.images))
        ]

    def check(job: Job) -> None:
        protecting.check([job], pipeline.model)

    return Hand(pipeline, finish, check)


class Telling:
    """A bar of rows on a terminal; elsewhere a line now and then, on stderr as well."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._began = self._told = time.monotonic()
        self._bar: Any = tqdm(total=total, unit="row", leave=False, file=sys.stderr, disable=None)

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *what: object) -> None:
        self._bar.close()
        if self.done:
            log.info("%s", self._line())

    def one(self, failed: int) -> None:
        """One more row is over; `failed` are those of all that failed."""
        self.done += 1
        self._bar.update()
        if failed:
            self._bar.set_postfix(failed=failed)
        if self._bar.disable and time.monotonic() - self._told >= TELL:
            self._told = time.monotonic()
            log.info("%s", self._line())

    def _line(self) -> str:
        per_second = self.done / max(time.monotonic() - self._began, 1e-6)
        return f"{self.done} of {self.total} rows, {per_second:.2f} a second"
