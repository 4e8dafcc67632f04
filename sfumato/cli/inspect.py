"""Tell what a checkpoint is: family and why, precision, EMA, what is missing or unknown, hashes. Builds no network."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sfumato.cli.loading import family_flag
from sfumato.weights.hub import resolve

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.weights.files import TensorFile
    from sfumato.weights.parts import Checkpoint

SHOWN = 8  # names of a list, unless --all


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato inspect`."""
    add = parser.add_argument
    add("ckpt", metavar="PATH", help="a checkpoint file or diffusers folder")
    add("--family", metavar="NAME", help="read it as this family (auto: forget what was remembered)")
    add("--variant", metavar="NAME", help="a folder's files of this variant, such as fp16")
    add("--ema", action="store_true", help="look at the averaged weights")
    add("--json", action="store_true", help="print JSON")
    add("--all", action="store_true", help=f"print whole lists (default: {SHOWN} names)")
    add("--no-hash", action="store_true", help="do not read the whole file for its SHA-256")


def run(args: argparse.Namespace) -> int:
    """The command; 0 where the checkpoint can be loaded, 1 where something is missing or unknown."""
    from sfumato.families.detect import other_kind
    from sfumato.weights.checkpoint import open_checkpoint
    from sfumato.weights.files import old_hash, open_tensors, sha256

    path, family = resolve(args.ckpt), family_flag(args)
    facts: dict[str, Any] = {"path": str(path)}
    try:
        checkpoint = open_checkpoint(path, family, args.ema, None, args.variant)
    except ValueError as error:
        if path.is_dir():
            raise
        file = open_tensors(path)  # not readable at all: its own error is the clearer one
        facts |= {"kind": other_kind(file.names()), "problem": str(error)} | of_file(file)
    else:
        facts |= of_checkpoint(checkpoint)
    if path.is_file() and not args.no_hash:
        digest = sha256(path)
        facts["sha256"], facts["model hash"], facts["old hash"] = digest, digest[:10], old_hash(path)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if args.json else told(facts, args.all))
    return 0 if facts.get("loads") else 1


def of_file(file: TensorFile) -> dict[str, Any]:
    """Facts that every file of tensors has."""
    return {
        "format": file.format,
        "tensors": len(file.names()),
        "precision": _precision(str(file.dtype(name)) for name in file.names()),
        "metadata": dict(file.metadata),
    }


def _precision(dtypes: Iterable[str]) -> dict[str, int]:
    return dict(Counter(dtype.removeprefix("torch.") for dtype in dtypes).most_common())


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of a checkpoint whose family is known."""
    family = checkpoint.family
    sources = [source for part in checkpoint.parts.values() for source in part.values()]
    counts = {
        part: sum(_count(source.shape) for source in tensors.values()) for part, tensors in checkpoint.parts.items()
    }
    problems = checkpoint.problems()
    return {
        "kind": f"a Stable Diffusion checkpoint, {checkpoint.layout}",
        "family": family.name,
        "because": checkpoint.detection.why,
        "sure": checkpoint.detection.sure,
        "prediction": family.prediction,
        "zero terminal snr": family.schedule.zero_terminal_snr,
        "native size": family.size,
        "parameters": counts,
        "precision": _precision(str(source.dtype) for source in sources),
        "ema": checkpoint.has_ema,
        "loads": not problems,
        "problems": problems,
        "missing": dict(checkpoint.missing),
        "misshapen": checkpoint.misshapen,
        "unknown": checkpoint.unknown,
        "rightly unused": sorted(checkpoint.unused),
        "metadata": dict(checkpoint.metadata),
    }


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def told(facts: dict[str, Any], everything: bool) -> str:
    """The facts as lines for people."""
    lines = []
    for name, value in facts.items():
        if value in ({}, [], None):
            continue
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {key}: {_short(item, everything)}" for key, item in value.items()]
        elif isinstance(value, list):
            shown = value if everything else value[:SHOWN]
            lines.append(f"{name}: {len(value)}")
            lines += [f"  {item}" for item in shown]
            if len(value) > len(shown):
                lines.append(f"  ... and {len(value) - len(shown)} more (--all)")
        else:
            lines.append(f"{name}: {_short(value, everything)}")
    return "\n".join(lines)


def _short(value: Any, everything: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return f"{len(value)}, first {value[0]}" if value and not everything else ", ".join(map(str, value))
    text = str(value)
    return text if everything or len(text) <= 200 else f"{text[:200]}... (--all)"
