"""`sfumato evaluate scores`: how a predictor of aesthetics scores a set of pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sfumato import __version__


def tell_scores(args: argparse.Namespace) -> int:
    """Print how a predictor of aesthetics scores a set, and write it where asked."""
    from sfumato.evaluate.sweep import write_json
    from sfumato.train.data import open_pictures
    from sfumato.train.data.scoring import load_predictor, load_tower, scores_of_pictures

    for name in ("data", "predictor", "clip"):
        if getattr(args, name) is None:
            raise ValueError(f"{name}: scores need --data, --predictor and --clip")
    pictures = open_pictures(args.data, need_captions=False)
    predictor, tower = load_predictor(args.predictor), load_tower(args.clip)
    rows = scores_of_pictures(predictor, tower, pictures, max(1, args.batch))
    scores = [score for _, score in tqdm(rows, total=len(pictures), unit="pictures", leave=False, disable=None)]
    if not scores:
        raise ValueError(f"data={args.data!r}: no picture could be read")
    quantiles = np.quantile(scores, (0.05, 0.5, 0.95))
    found = {
        "mean": float(np.mean(scores)),
        "deviation": float(np.std(scores)),
        "5 %": float(quantiles[0]),
        "median": float(quantiles[1]),
        "95 %": float(quantiles[2]),
        "pictures": len(scores),
    }
    print(json.dumps(found, indent=1))
    if pictures.report.broken:
        print("\n".join(pictures.report.lines()))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out) / "scores.json", {"sfumato": __version__, "data": args.data, **found})
    return 0
