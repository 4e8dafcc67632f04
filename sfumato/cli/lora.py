"""Look after adapters (LoRA and its kin): what one is, merging into a checkpoint, extracting, another rank."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sfumato.cli import names
from sfumato.cli.convert import dtype_of, save
from sfumato.weights.hub import resolve

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.families import Family
    from sfumato.weights.adapters.adapter import Adapter
    from sfumato.weights.adapters.wearing import Worn
    from sfumato.weights.parts import Checkpoint

TOLD = ("ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_network_module", "ss_network_args",
        "ss_network_dim", "ss_network_alpha", "ss_steps", "ss_epoch", "ss_clip_skip", "modelspec.title")  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The actions of `sfumato lora` and their flags."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, flags, action, about in (
        ("inspect", _inspect_flags, tell, "tell what an adapter is, what it changes and what was not understood"),
        ("merge", _merge_flags, merge, "write a checkpoint with adapters in its weights"),
        ("extract", _extract_flags, take_out, "write what a tuned checkpoint learned over its base as a LoRA"),
        ("resize", _resize_flags, resize, "write an adapter at another rank"),
    ):
        sub = actions.add_parser(name, help=about, description=about)
        flags(sub)
        sub.set_defaults(action=action)


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the adapter")
    _family_flags(parser)
    parser.add_argument("--all", action="store_true", help="list all metadata, and every key that is not used")


def _family_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", metavar="PATH", help="as on this checkpoint")
    parser.add_argument(
        "--family", metavar="NAME", help=f"as on this family (default: tried): {', '.join(names.FAMILIES)}"
    )


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="the checkpoint")
    add("out", metavar="OUT", help="a new .safetensors file, or a new folder for the diffusers layout")
    add("--lora", metavar="FILE:S[:U]", action="append", required=True, help="an adapter and its strength (default: 1) "
        "or two, on text encoders and U-Net; may be given again, and the order is kept")  # fmt: skip
    add("--dtype", choices=names.PRECISIONS, help="store in this precision (default: the checkpoint's)")


def _rank_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rank", type=int, default=32, metavar="N", help="directions kept at most (default: %(default)s)")
    add("--conv-rank", type=int, metavar="N", help="of convolutions above 1 x 1 (default: --rank; 0: none of them)")
    add("--share", type=float, default=1.0, metavar="S", help="keep as few as hold this share of the energy, as 0.98")
    add("--layout", choices=names.LAYOUTS, default="kohya", help="whose names to write (default: %(default)s)")
    add("--dtype", choices=names.PRECISIONS, default="fp16", help="store in this precision (default: %(default)s)")


def _extract_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tuned", metavar="TUNED", help="the tuned checkpoint")
    add("base", metavar="BASE", help="what it was tuned from")
    add("out", metavar="OUT", help="a new .safetensors file")
    add("--part", metavar="NAME", action="append", help="of this network alone: unet, text, text2; may be given again")
    add("--rest", action="store_true", help="take differences of biases and norms along, whole")
    _rank_flags(parser)


def _resize_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the adapter")
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file")
    _family_flags(parser)
    _rank_flags(parser)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    return args.action(args)


def tell(args: argparse.Namespace) -> int:
    """Print what the adapter is; the exit code is 0 though keys are not used."""
    adapter, family = _opened_adapter(args)
    print(adapter.describe())
    print(f"family: {family.name}{'' if args.ckpt or args.family else ' (as tried)'}")
    for part in adapter.parts:
        print(f"{part}: {sum(key[0] == part for key in adapter.changes)} parameters changed")
    print(f"sha256: {adapter.hash}")
    for name, value in adapter.metadata.items():
        if args.all or name in TOLD:
            print(f"{name}: {value}")
    if tags := _tags(adapter):
        print(f"trained on: {', '.join(tags)}")
    for name in adapter.unmatched if args.all else ():
        print(f"not used: {name}")
    return 0


def _tags(adapter: Adapter, most: int = 8) -> list[str]:
    """The commonest words of kohya's training captions; none where the entry is not as kohya writes it."""
    text = adapter.metadata.get("ss_tag_frequency", "")
    try:
        sets = json.loads(text or "{}")
    except json.JSONDecodeError:  # a hint for people, and the header's own text is shown by --all
        return []
    counts: dict[str, int] = {}
    for tags in sets.values() if isinstance(sets, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + (count if isinstance(count, int) else 0)
    return sorted(counts, key=lambda tag: -counts[tag])[:most]


def _opened_adapter(args: argparse.Namespace) -> tuple[Adapter, Family]:
    """The adapter with the family of --ckpt or --family, or else the first family that it fits best."""
    from sfumato.families import FAMILIES, find_family
    from sfumato.weights.adapters.reading import read_adapter

    if args.ckpt or args.family:
        family = _opened(args.ckpt, "ckpt").family if args.ckpt else find_family(args.family)
        return read_adapter(args.file, family), family
    best: tuple[Adapter, Family] | None = None
    problem: ValueError | None = None
    tried: set[object] = set()
    for family in FAMILIES.values():
        if (family.unet, family.texts) in tried:  # of the same shapes
            continue
        tried.add((family.unet, family.texts))
        try:
            adapter = read_adapter(args.file, family)
        except ValueError as error:
            problem = problem or error
            continue
        if best is None or adapter.matched > best[0].matched:
            best = adapter, family
        if not adapter.unmatched:
            break
    if best is None and problem is not None:
        raise problem
    assert best is not None  # there are families
    return best


def _opened(path: str, field: str) -> Checkpoint:
    from sfumato.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(resolve(path, field=field))
    if problems := checkpoint.problems():
        raise ValueError(f"{field}={path!r}: as {checkpoint.family.name}, {problems[0]}{checkpoint.hint}")
    return checkpoint


def worn_of(text: str, family: Family) -> Worn:
    """FILE, FILE:0.8 or FILE:0.8:0.6, as a worn adapter; ValueError where a strength is no number."""
    from sfumato.weights.adapters.reading import load_adapter
    from sfumato.weights.adapters.wearing import Worn

    path = text
    strengths: list[float] = []
    while not Path(path).exists() and ":" in path and len(strengths) < 2:
        path, _, end = path.rpartition(":")
        strengths.insert(0, _strength(end, text))
    on_text = strengths[0] if strengths else 1.0
    return Worn(load_adapter(path, family), on_text, strengths[-1] if strengths else on_text)


def _strength(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"lora={whole!r}: FILE, FILE:STRENGTH or FILE:TEXT:UNET is needed, and there is no such file")
    return value


def merge(args: argparse.Namespace) -> int:
    """Write the checkpoint with the adapters' changes in it."""
    from sfumato.weights.adapters.extracting import merged
    from sfumato.weights.writing import in_precision, parts_of, surplus_of

    checkpoint = _opened(args.ckpt, "ckpt")
    worn = [worn_of(text, checkpoint.family) for text in args.lora]
    surplus, metadata = surplus_of(checkpoint)
    told = ", ".join(f"{each.adapter.name}:{each.text:g}:{each.unet:g}" for each in worn)
    parts = in_precision(merged(parts_of(checkpoint), worn), dtype_of(args.dtype))
    header = {**metadata, "sfumato.family": checkpoint.family.to_json(), "sfumato.lora": told}
    save(Path(args.out), checkpoint, parts, surplus, header)
    return 0


def take_out(args: argparse.Namespace) -> int:
    """Write the difference of two checkpoints as a LoRA."""
    from sfumato.weights.adapters.extracting import Ranks, extract
    from sfumato.weights.adapters.writing import save_adapter
    from sfumato.weights.parts import shapes_of

    _new(args.out)
    tuned, base = _opened(args.tuned, "tuned"), _opened(args.base, "base")
    ranks = Ranks(args.rank, args.conv_rank, args.share)
    wanted = args.part or ("unet", *base.family.text_parts)
    total = sum(len(shapes) for part, shapes in shapes_of(base.family).items() if part in wanted)
    with tqdm(total=total, desc="extracting", leave=False, disable=None) as bar:
        changes = extract(tuned, base, ranks, args.part, args.rest, bar.update)
    told = {"sfumato.extracted": f"{tuned.path.name} - {base.path.name}"}
    save_adapter(args.out, changes, base.family, args.layout, told, dtype_of(args.dtype))
    print(args.out)
    return 0


def resize(args: argparse.Namespace) -> int:
    """Write an adapter at another rank."""
    from sfumato.weights.adapters.extracting import Ranks, resized
    from sfumato.weights.adapters.writing import save_adapter

    _new(args.out)
    adapter, family = _opened_adapter(args)
    changes = resized(adapter, family, Ranks(args.rank, args.conv_rank, args.share))
    told = {name: text for name, text in adapter.metadata.items() if name.startswith(("ss_", "modelspec."))}
    told = {name: text for name, text in told.items() if name not in ("ss_network_dim", "ss_network_alpha")}
    save_adapter(args.out, changes, family, args.layout, told, dtype_of(args.dtype))
    print(args.out)
    return 0


def _new(out: str) -> None:
    if Path(out).exists():
        raise ValueError(f"out={out!r}: it is there already; name another file")
