"""CLIP's byte-pair tokenizer: strings -> token ids. OpenAI's vocabulary (MIT), run by the `tokenizers` library.

Knows nothing of chunks, weights or models. A smaller vocabulary takes the first merges only, so any text still
has an encoding; the two special tokens are always the last ids, end above start.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib import resources

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

FULL_VOCAB_SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = "</w>"
# Radford et al. 2021: special tokens, English contractions, runs of letters, single digits, runs of anything else.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes in the order of GPT-2's table (Radford et al. 2019)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = len(set(range(256)) - set(kept))
    return [chr(code) for code in kept] + [chr(256 + index) for index in range(moved)]


@lru_cache(maxsize=4)
def _tokenizer(vocab_size: int) -> Tokenizer:
    alphabet = _byte_alphabet()
    num_merges = vocab_size - 2 * len(alphabet) - 2
    with resources.files("sfumato.models").joinpath("clip_merges.txt.gz").open("rb") as packed:
        lines = gzip.decompress(packed.read()).decode("utf-8").splitlines()
    if not 0 <= num_merges <= len(lines):
        raise ValueError(f"vocab_size={vocab_size}: allowed are 514 to {FULL_VOCAB_SIZE}")
    merges = [(first, second) for first, second in (line.split() for line in lines[:num_merges])]
    tokens = [*alphabet, *(letter + WORD for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    bpe = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        end_of_word_suffix=WORD,
        unk_token=END,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


class ClipTokenizer:
    """Encodes text with the first `vocab_size` entries of CLIP's vocabulary (49,408: all of it)."""

    def __init__(self, vocab_size: int = FULL_VOCAB_SIZE) -> None:
        self._tokenizer = _tokenizer(vocab_size)
        self.vocab_size = vocab_size
        self.start = vocab_size - 2
        self.end = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no start, no end, no padding, no limit."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, words separated by single blanks, special tokens left out."""
        return self._tokenizer.decode(ids).replace(WORD, " ").strip()

    def pad(self, ids: list[int], length: int = 77, pad: int | None = None) -> list[int]:
        """start + ids + end, filled with `pad` (the end token unless given); ids beyond length - 2 are cut."""
        body = ids[: length - 2]
        filler = self.end if pad is None else pad
        return [self.start, *body, self.end, *[filler] * (length - 2 - len(body))]
