"""All metrics that features of real and of drawn pictures allow, each with the facts that its number depends on.

A metric of Inception has its plain name; of any other network the network's name stands before it. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from sfumato.evaluate import metrics
from sfumato.evaluate.features import Clip, Network, facts_of
from sfumato.evaluate.statistics import statistics_of

LEAST = 10  # pictures of a set; below it no number means anything
PLAIN = "inception"  # the network whose metrics have no name before theirs
FID_INFINITY_LEAST = 100  # drawn pictures, from which a line can be fitted


def check_count(name: str, count: int) -> None:
    """ValueError where a set has too few pictures to measure anything."""
    if count < LEAST:
        raise ValueError(f"{name}={count}: {LEAST} readable pictures or more are needed")


def measured(
    networks: Sequence[Network],
    real: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor],
    resize: str,
    seed: int = 0,
    captions: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """metric -> {value, features, hash, resize, size, real, drawn, ...}; real and drawn are network -> (N, D).

    `captions` are those of the drawn pictures, for the CLIP score; `seed` chooses subsets. Every call with equal input
    gives equal numbers. ValueError where a set has fewer than 10 pictures.
    """
    found: dict[str, dict[str, Any]] = {}
    for network in networks:
        name = network.name
        counts = {"real": len(real[name]), "drawn": len(drawn[name])}
        for side, count in counts.items():
            check_count(side, count)
        facts = asdict(facts_of(network, resize)) | counts
        prefix = "" if name == PLAIN else f"{name}-"
        for metric, entry in _of_network(network, real[name], drawn[name], resize, seed, captions).items():
            plain = metric in ("cmmd", "clip-score", "inception-score")
            found[metric if plain else prefix + metric] = entry | facts
    return found


def _of_network(
    network: Network, real: Tensor, drawn: Tensor, resize: str, seed: int, captions: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng([seed, 0])
    facts = facts_of(network, resize)
    statistics = statistics_of(real, facts)
    found: dict[str, dict[str, Any]] = {"fid": {"value": metrics.fid(statistics, statistics_of(drawn, facts))}}
    if warning := metrics.bias_warning(min(len(real), len(drawn)), network.dim):
        found["fid"]["warning"] = warning
    elif len(drawn) >= FID_INFINITY_LEAST:  # of fewer than dimensions a line in 1 / N does not fit
        found["fid-infinity"] = {"value": metrics.fid_infinity(statistics, drawn, rng)}
    found["kid"] = asdict(metrics.kid(real, drawn, rng))
    precision, recall = metrics.precision_recall(real, drawn)
    found |= {"precision": {"value": precision}, "recall": {"value": recall}}
    if network.name == PLAIN and network.to_logits is not None:
        logits = network.to_logits(drawn.to(network.device)).cpu()
        found["inception-score"] = asdict(metrics.inception_score(logits))
    if isinstance(network, Clip):
        found["cmmd"] = {"value": metrics.cmmd(real, drawn)}
        if captions is not None and network.tokenizer is not None:
            texts = network.texts(captions)
            scores = metrics.clip_scores(drawn, texts)
            cosine = metrics.clip_scores(drawn, texts, weight=1)
            found["clip-score"] = {"value": float(scores.mean()), "weight": metrics.CLIP_WEIGHT,
                                   "cosine": float(cosine.mean()), "deviation": float(scores.std())}  # fmt: skip
    return found
