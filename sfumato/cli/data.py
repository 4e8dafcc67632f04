"""Pictures to train on: choose them, draw what they are like, find near duplicates, score them, check them all.

SRC is a folder of shards (img2dataset's), a captioned folder, JSON lines, or Parquet; filter and stats also take
LAION's lists, which are Parquet without pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sfumato.cli import names

if TYPE_CHECKING:  # what needs torch is imported where it runs: flags and their help do not wait for it
    from sfumato.train.data.pictures import Pictures

Parser = argparse.ArgumentParser


def add_flags(parser: Parser) -> None:
    """The actions of `sfumato data` and their flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, flags, action, about in (
        (
            "filter",
            _filter_flags,
            filter_set,
            "write what satisfies a preset or an expression, and tell why others went",
        ),
        ("stats", _stats_flags, tell_statistics, "sizes, aspect ratios, captions and scores as JSON and plots"),
        ("dedup", _dedup_flags, find_duplicates, "list near duplicates, or write the set without them"),
        ("score", _score_flags, score_set, "aesthetic scores from CLIP embeddings, or how likely watermarks are"),
        ("check", _check_flags, check_set, "read everything once and report what is broken"),
    ):
        sub = actions.add_parser(name, help=about, description=about)
        sub.add_argument("source", metavar="SRC", help="the set")
        flags(sub)
        sub.set_defaults(action=action)


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def is_list(source: str | Path) -> bool:
    """Whether a path is Parquet without pictures, as LAION's lists are: a file, or a folder of nothing else."""
    from sfumato.train.data.columns import FILES, table_library
    from sfumato.train.data.filtering import tables_of
    from sfumato.train.data.pictures import line_of

    path = Path(source)
    if path.is_dir() and any(path.glob("*.tar")):
        return False
    tables = tables_of(path) if path.suffix == ".parquet" or path.is_dir() else []
    if not tables:
        return False
    polars = table_library()
    try:
        return not set(FILES) & set(polars.read_parquet_schema(tables[0]))
    except (polars.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"data={str(tables[0])!r}: not a readable Parquet file ({line_of(error)})") from error


def _opened(source: str, need_captions: bool = False) -> Pictures:
    from sfumato.train.data import open_pictures

    pictures = open_pictures(source, need_captions=need_captions)
    print(f"{source}: a {pictures.kind}, {len(pictures):,} pictures")
    return pictures


def _told(lines: Sequence[str]) -> None:
    print("\n".join(lines))


def _told_report(pictures: Pictures) -> None:
    if pictures.report.broken or pictures.report.shards:
        _told(pictures.report.lines())


# --- filter


def _filter_flags(parser: Parser) -> None:
    about = "; ".join(f"{name}: {text}" for name, text in names.PRESETS.items())
    add = parser.add_argument
    add("out", metavar="OUT", help="a Parquet file or folder for lists, a folder of new shards for pictures")
    add("--preset", action="append", default=[], metavar="NAME", help=f"{about}; may be given more than once")
    add("--where", action="append", default=[], metavar="SQL", help="keep rows for which this is true, such as "
        "\"punsafe < 0.1 AND caption LIKE '%%cat%%'\"; may be given more than once")  # fmt: skip
    add("--facts", metavar="FILE", help="facts to add, such as what `sfumato data score` wrote")
    add("--per-shard", type=int, default=names.PER_SHARD, metavar="N",
        help="pictures of a new shard (default: %(default)s)")  # fmt: skip


def filter_set(args: argparse.Namespace) -> int:
    """Write what stays; print how many, and why the others went."""
    from sfumato.train.data.filtering import chosen_of, filter_tables
    from sfumato.train.data.writing import check_out, write_shards

    if is_list(args.source):
        if args.facts:
            raise ValueError(f"facts={args.facts!r}: only for sets of pictures; a list has columns of its own")
        _told(filter_tables(args.source, args.out, args.preset, args.where).lines())
        return 0
    pictures = _opened(args.source)
    check_out(args.out)
    more = added_facts(args.facts, pictures) if args.facts else {}
    chosen, outcome = chosen_of(pictures, args.preset, args.where, more)
    written = write_shards(pictures, tqdm(chosen, desc="writing", unit="pictures"), args.out, more, args.per_shard)
    _told([*outcome.lines(), f"{written:,} written to {args.out}"])
    _told_report(pictures)
    return 0


def added_facts(path: str | Path, pictures: Pictures) -> dict[int, dict[str, Any]]:
    """Lines of JSON with the `number` and `key` of a picture and facts. ValueError where they are another set's."""
    found: dict[int, dict[str, Any]] = {}
    with Path(path).open(encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                number, key = int(row.pop("number")), row.pop("key")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"facts={str(path)!r}: line {place} has no number and key ({error})") from error
            if not 0 <= number < len(pictures) or pictures.facts(number).get("key") != key:
                raise ValueError(
                    f"facts={str(path)!r}: line {place} is of another set, picture {number} is not {key!r}"
                )
            found[number] = row
    return found


# --- stats


def _stats_flags(parser: Parser) -> None:
    parser.add_argument("--out", metavar="DIR", help="where statistics.json and the plots go (default: only printed)")


def tell_statistics(args: argparse.Namespace) -> int:
    """Print a table, and write it and its plots where asked."""
    from sfumato.train.data import statistics
    from sfumato.train.data.filtering import tables_of

    if is_list(args.source):
        found = statistics.measured_tables(tables_of(args.source))
    else:
        pictures = _opened(args.source)
        found = statistics.measured(pictures)
        _told_report(pictures)
    told = statistics.summary(found)
    _told(statistics.lines(told))
    if args.out:
        _told([f"wrote {path}" for path in statistics.write_statistics(found, told, args.out)])
        if not statistics.can_plot():
            print("no plots: matplotlib is not installed")
    return 0


# --- dedup


def _dedup_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--hash", choices=names.HASHES, default="phash", help="(default: %(default)s)")
    add("--distance", type=int, default=4, metavar="BITS",
        help=f"of 64 that may differ, 0 to {names.MOST_BITS} (default: 4)")  # fmt: skip
    add("--colour", type=float, default=16, metavar="LEVELS",
        help="of 255 that a raster of 4 x 4 colours may differ on average (default: %(default)s)")  # fmt: skip
    add("--list", metavar="FILE", help="write the groups as JSON lines, what stays first")
    add("--out", metavar="DIR", help="write the set without the duplicates as new shards; the largest of a group stays")


def find_duplicates(args: argparse.Namespace) -> int:
    """Print how many near duplicates there are; list them, or write the set without them, where asked."""
    from sfumato.train.data.duplicates import HASHES, colours, groups
    from sfumato.train.data.pictures import read
    from sfumato.train.data.writing import check_out, write_shards

    pictures = _opened(args.source)
    if args.out:
        check_out(args.out)
    numbers, hashes, seen, areas = [], [], [], {}
    for index in tqdm(range(len(pictures)), desc="reading", unit="pictures"):
        got = read(pictures, index, (64, 64), need_caption=False)
        if got is not None:
            numbers.append(index)
            hashes.append(HASHES[args.hash](got[0]))
            seen.append(colours(got[0]))
            areas[index] = got[0].shape[0] * got[0].shape[1]
    found = groups(np.array(hashes, dtype=np.uint64), np.stack(seen), args.distance, args.colour)
    ordered = [sorted((numbers[place] for place in group), key=lambda n: (-areas[n], n)) for group in found]
    gone = {number for group in ordered for number in group[1:]}
    print(f"{len(ordered):,} groups, {len(gone):,} of {len(numbers):,} pictures are near duplicates of another")
    if args.list:
        with Path(args.list).open("w", encoding="utf-8") as file:
            for group in ordered:
                row = {"stays": pictures.name(group[0]), "goes": [pictures.name(number) for number in group[1:]]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if args.out:
        written = write_shards(pictures, (number for number in numbers if number not in gone), args.out)
        print(f"{written:,} written to {args.out}")
    _told_report(pictures)
    return 0


# --- score


def _score_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--predictor", metavar="FILE", help="of aesthetics: linear or MLP, as LAION publishes them")
    add("--watermark", metavar="FILE", help="of visible watermarks: LAION's detector, watermark_model_v1.pt, instead")
    add("--clip", metavar="FILE", help="a CLIP whose image tower makes the embeddings (names of CLIPModel)")
    add("--exact-gelu", action="store_true", help="that CLIP is one of OpenCLIP's with the exact GELU")
    add("--embeddings", metavar="PATH", help="embeddings in the set's order instead: .npy, or clip-retrieval's folder")
    add("--column", metavar="NAME", help="embeddings in this column of a Parquet list instead")
    add("--name", metavar="WORD", help="what the score is called (default: aesthetic, or pwatermark)")
    add("--out", required=True, metavar="FILE", help="JSON lines for `filter --facts`; with --column, Parquet")


def score_set(args: argparse.Namespace) -> int:
    """Write a score for each picture."""
    from sfumato.train.data.scoring import load_predictor, load_tower, scores_of_pictures, scores_of_stored

    if (args.predictor is None) == (args.watermark is None):
        raise ValueError("predictor: one of --predictor and --watermark is needed")
    args.name = args.name or ("aesthetic" if args.watermark is None else "pwatermark")
    if args.watermark is not None:
        return _score_watermarks(args)
    if sum(bool(one) for one in (args.clip, args.embeddings, args.column)) != 1:
        raise ValueError("embeddings: one of --clip, --embeddings and --column is needed")
    predictor = load_predictor(args.predictor)
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"out={args.out!r}: it is there already")
    if args.column:
        return _score_column(args, predictor, out)
    pictures = _opened(args.source)
    scores: Iterator[tuple[int, float]] | Sequence[tuple[int, float]]
    if args.clip:
        scores = scores_of_pictures(predictor, load_tower(args.clip, not args.exact_gelu), pictures)
    else:
        stored = scores_of_stored(predictor, args.embeddings)
        if len(stored) != len(pictures):
            raise ValueError(f"embeddings={args.embeddings!r}: {len(stored)} of them for {len(pictures)} pictures")
        scores = list(enumerate(stored.tolist()))
    _write_facts(out, _scored(pictures, scores, args.name), len(pictures))
    _told_report(pictures)
    return 0


def _score_watermarks(args: argparse.Namespace) -> int:
    from sfumato.train.data.watermarks import load_detector, watermarks_of_pictures

    for name in ("clip", "embeddings", "column"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}={getattr(args, name)!r}: it goes with --predictor")
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"out={args.out!r}: it is there already")
    pictures, detector = _opened(args.source), load_detector(args.watermark)
    _write_facts(out, _scored(pictures, watermarks_of_pictures(detector, pictures), args.name), len(pictures))
    _told_report(pictures)
    return 0


def _scored(pictures: Pictures, scores: Iterator[tuple[int, float]] | Sequence[tuple[int, float]], name: str,
            ) -> Iterator[dict[str, Any]]:  # fmt: skip
    from sfumato.train.data.pictures import line_of

    for number, score in scores:
        try:
            key = pictures.facts(number).get("key")
        except (ValueError, OSError) as error:
            pictures.report.note_broken(pictures.name(number), line_of(error))
            continue
        yield {"number": number, "key": key, name: round(score, 6)}


def _write_facts(out: Path, rows: Iterator[Mapping[str, Any]], total: int) -> None:
    beside = out.with_name(f".{out.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for row in tqdm(rows, total=total, desc="scoring", unit="pictures"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def _score_column(args: argparse.Namespace, predictor: Any, out: Path) -> int:
    import torch

    from sfumato.train.data.columns import frame_of, table_library

    frame = frame_of(args.source)
    if args.column not in frame.columns:
        raise ValueError(f"column={args.column!r}: the list has {', '.join(frame.columns)}")
    try:
        embeddings = np.array(frame[args.column].to_list(), dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"column={args.column!r}: lists of numbers of one length are needed ({error})") from error
    scores = predictor(torch.from_numpy(embeddings)).numpy()
    beside = out.with_name(f".{out.name}.part")
    try:
        frame.with_columns(table_library().Series(args.name, scores)).write_parquet(beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{len(scores):,} scored")
    return 0


# --- check


def _check_flags(parser: Parser) -> None:
    parser.add_argument("--no-captions", action="store_true", help="pictures need no caption")


def check_set(args: argparse.Namespace) -> int:
    """Decode every picture; 0 where all is well, 1 where something is broken."""
    from sfumato.train.data.pictures import read

    pictures = _opened(args.source, need_captions=not args.no_captions)
    for index in tqdm(range(len(pictures)), desc="reading", unit="pictures"):
        read(pictures, index, need_caption=not args.no_captions)
    _told(pictures.report.lines())
    return 1 if pictures.report.broken or pictures.report.shards else 0
