"""The tokenizer's files in a diffusers folder: writing CLIP's vocabulary as they hold it, reading what fills prompts.

A folder's vocabulary must be ours (or its first part, as in the box): another would turn words into wrong numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.models.tokenizer import END, START, ClipTokenizer

MERGES_HEADER = "#version: 0.2"


def vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order, of `ClipTokenizer(vocab_size)`."""
    model = json.loads(ClipTokenizer(vocab_size)._tokenizer.to_str())["model"]
    return model["vocab"], [_pair(merge) for merge in model["merges"]]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as `tokenizers` writes it: a pair, or in older versions a line."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def vocabulary_files(vocab_size: int) -> dict[str, str]:
    """Name -> text of the two files that hold a vocabulary: vocab.json and merges.txt."""
    vocab, merges = vocabulary(vocab_size)
    lines = [MERGES_HEADER, *(" ".join(pair) for pair in merges)]
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, separators=(",", ":")) + "\n",
        "merges.txt": "\n".join(lines) + "\n",
    }


def tokenizer_configs(vocab_size: int, max_length: int, pad_token: int | None) -> dict[str, dict[str, Any]]:
    """Name -> JSON of the two files that say which tokens are special, with what a prompt is filled."""
    pad = END if pad_token is None else _token(vocab_size, pad_token)
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    marks = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens: dict[str, Any] = {name: {"content": token, **marks} for name, token in special.items()}
    return {
        "special_tokens_map.json": {**tokens, "pad_token": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": max_length,
            **{name: {"__type": "AddedToken", **token} for name, token in tokens.items()},
            "pad_token": pad,
        },
    }


def _token(vocab_size: int, number: int) -> str:
    """The token of an id; ValueError where there is none."""
    for token, index in vocabulary(vocab_size)[0].items():
        if index == number:
            return token
    raise ValueError(f"pad_token={number}: 0 to {vocab_size - 1} is allowed")


def pad_token_of(files: Mapping[str, Mapping[str, Any]], vocab_size: int) -> int | None:
    """The id that fills a prompt (None: the end token), from a tokenizer's JSON files by name.

    special_tokens_map.json comes first: in the published SD 2.x the other file is wrong, and transformers, too, reads
    this one last. Where neither says anything it is transformers' default, the end token.
    """
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        pad = files.get(name, {}).get("pad_token")
        pad = pad.get("content") if isinstance(pad, Mapping) else pad
        if pad is None:
            continue
        number = 0 if pad == "!" else vocabulary(vocab_size)[0].get(pad) if pad != END else vocab_size - 1
        if number is None:
            raise ValueError(f"{name}: pad_token={pad!r}: a token of CLIP's vocabulary is needed")
        return None if number == vocab_size - 1 else number
    return None


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """ValueError where the tokenizer in `folder` is not `ClipTokenizer(vocab_size)`, by whichever files it has."""
    stored: list[tuple[str, Any, Any]] = []  # file, vocabulary, merges; None where the file does not hold it
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if name == "vocab.json":
                stored.append((name, json.loads(text), None))
            elif name == "merges.txt":
                lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
                stored.append((name, None, [_pair(line) for line in lines]))
            else:
                model = json.loads(text)["model"]
                stored.append((name, model["vocab"], [_pair(merge) for merge in model["merges"]]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder.name}/{name} is not readable as a tokenizer ({error})") from error
    vocab, merges = vocabulary(vocab_size)
    for name, their_vocab, their_merges in stored:
        if their_vocab not in (None, vocab) or their_merges not in (None, merges):
            raise ValueError(f"{folder.name}/{name}: not the first {vocab_size} tokens of CLIP's vocabulary")
