"""The tokenizer's files in a diffusers folder: transformers reads our ids from them, another vocabulary is refused."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sfumato.models.tokenizer import ClipTokenizer
from sfumato.weights.layouts.diffusers_tokenizer import check_vocabulary, tokenizer_configs, vocabulary_files

STRINGS = [
    "", " ", "a", "A photo of a CAT", "it's the dog's, they'll've 'em", "12345 67.89", "naïve café", "cafe\u0301",
    "\ufb01ne", "日本語の 猫", "кошка на столе", "ένα σπίτι", "\U0001f408\u200d\u2b1b on a \U0001f680", "a\tb\nc  d",
    "snake_case and kebab-case", "(word:1.3)", "[[brackets]], {braces}", "https://example.org/?q=1&r=2",
    "<lora:thing:0.5>", "<|endoftext|>", "x <|startoftext|> y", "trailing space ", " leading", "....", "a...b",
    "C++ and C#", "100%", "$5.00 €7", "½ ² ³", "İstanbul", "ß straße", "\u200bzero\u200bwidth", "\xa0nbsp\xa0",
    "\u201cquotes\u201d \u2018single\u2019", "em\u2014dash", "don't", "DON'T", "'tis", "o'clock", "@user #tag",
    "supercalifragilisticexpialidocious", "antidisestablishmentarianism", "q" * 40, "word " * 100, "a,b;c:d",
    "\\back\\slash", "`code`", "~tilde~", "한국어 텍스트", "مرحبا بالعالم",
]  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "pad"), [(49408, None), (49408, 0), (4096, None), (514, 61)])
def test_tokenizer_files(vocab_size: int, pad: int | None, tmp_path: Path) -> None:
    assert len(STRINGS) == 50
    for name, config in tokenizer_configs(vocab_size, 77, pad).items():
        (tmp_path / name).write_text(json.dumps(config))
    for name, text in vocabulary_files(vocab_size).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    check_vocabulary(tmp_path, vocab_size)
    ours, theirs = ClipTokenizer(vocab_size), CLIPTokenizer.from_pretrained(str(tmp_path))
    found = [ours.pad(ours.encode(text), 77, pad) for text in STRINGS]
    assert theirs(STRINGS, padding="max_length", truncation=True, max_length=77).input_ids == found
    assert theirs.model_max_length == 77


def test_transformers_takes_the_filler_for_a_word(tmp_path: Path) -> None:
    """Their "!" in a prompt is the filler where that is "!"; ours is the word, as OpenCLIP trained it."""
    for name, text in vocabulary_files(49408).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, config in tokenizer_configs(49408, 77, 0).items():
        (tmp_path / name).write_text(json.dumps(config))
    theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert theirs("hi !").input_ids[1:-1] == [1883, 0]
    assert ClipTokenizer().encode("hi !") == [1883, 256]


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    files = vocabulary_files(600)
    (tmp_path / "vocab.json").write_text(files["vocab.json"], encoding="utf-8")
    check_vocabulary(tmp_path, 600)
    with pytest.raises(ValueError, match="vocab.json: not the first 601 tokens"):
        check_vocabulary(tmp_path, 601)
    lines = files["merges.txt"].splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:3], lines[4], lines[3], *lines[5:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges.txt: not the first 600"):
        check_vocabulary(tmp_path, 600)
    (tmp_path / "merges.txt").write_text("one two three\n")
    with pytest.raises(ValueError, match=r"merges.txt is not readable"):
        check_vocabulary(tmp_path, 600)
