"""Prompts -> Cond, for one text encoder: tokens, their limit, and what fell off.

The grammar of weights and schedules will live beside this; so far a prompt is plain text of up to 75 tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from sfumato.models.clip import CLIPText
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.types import Cond

log = logging.getLogger(__name__)


def token_ids(tokenizer: ClipTokenizer, text: str, max_length: int, pad: int | None = None) -> list[int]:
    """`max_length` ids with start, end and padding; a longer prompt is cut with a warning that names what fell off."""
    ids = tokenizer.encode(text)
    room = max_length - 2
    if len(ids) > room:
        lost = tokenizer.decode(ids[room:])
        shown = lost if len(lost) <= 60 else f"{lost[:60]}..."
        log.warning("prompt: cut after %d of %d tokens; what fell off: %s", room, len(ids), shown)
    return tokenizer.pad(ids, max_length, pad)


def encode(
    text_encoder: CLIPText,
    tokenizer: ClipTokenizer,
    texts: Sequence[str],
    skip_last: int = 0,
    pad: int | None = None,
) -> Cond:
    """One row of context (L, D) for each text, on the text encoder's device and in its dtype.

    Gradients reach the text encoder where the caller allows them.
    """
    device = text_encoder.text_model.final_layer_norm.weight.device
    length = text_encoder.config.max_length
    ids = torch.tensor([token_ids(tokenizer, text, length, pad) for text in texts], device=device)
    return Cond(context=text_encoder(ids, skip_last=skip_last))
