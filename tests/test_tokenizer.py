"""Our CLIP tokenizer against transformers' on strings of many scripts, and its truncated vocabulary."""

import gzip
import json
import random
import unicodedata
from importlib import resources
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sfumato.models.tokenizer import END, FULL_VOCAB_SIZE, START, ClipTokenizer

LINES = (
    # Latin, with accents composed and decomposed, ligatures, letters whose lower case is irregular
    "a photo of the cat Sfumato RED apple naïve café CAFÉ cafe\u0301 e\u0301a\u0300 straße STRASSE İstanbul ŁÓDŹ ﬁre",
    "Æsir Đà Nẵng q\u0307\u0323 artstation 4k 8K octane-render trending_on x2 R2D2 antidisestablishmentarianism zzxqjv",
    "Привет мир ЩУКА ёлка українська їжак дім Ελλάδα ΟΔΥΣΣΕΥΣ σοφός ἀρχή",
    "مرحبا بالعالم سَلَام كتاب שלום עולם שָׁלוֹם नमस्ते दुनिया हिन्दी क्षत्रिय สวัสดี ชาวโลก น้ำใจ",
    "你好 世界 猫 漢字かな交じり文 カタカナ ｶﾅ ひらがな が か\u3099 𠮷野家 안녕하세요 세계 한글 \u1112\u1161\u11ab",
    "😀 🐈‍⬛ 👩‍👩‍👧‍👦 👍🏽 🇫🇷 ❤️ 🏴‍☠️ 1️⃣ ☃ ✨✨",
    "0 7 42 1999 3.14 1,000,000 ½ ² Ⅷ ١٢٣ १२३ ①",
    ". , ! ?! ... … -- — “quoted” 'single' (very:1.2) [less] {a|b} << >>> -> <3 :-) ;) @",
    "# $ % ^ & * ~ ` \\ / | _ __init__",
    "it's don't I'm you're we've he'll she'd IT'S DON'T 'tis rock'n'roll s' ' '' 's 'S \u2019s",
    "\u0301 \u0300\u0301 a\u0336b\u0336 \u200b \u200d \ufe0f \u202e \ufeff \x00 \x01 \x7f \ufffd \U0010ffff",
)
WORDS = [word for line in LINES for word in line.split(" ")]
SPECIALS = [START, END, "<|STARTOFTEXT|>", "<|EndOfText|>", "<|", "|>", "<|startoftext", "startoftextual"]
GAPS = [*"   \n\t\u3000\xa0\x0b\x0c\x1c\x85\u2028,", "", "", "", "  ", "\r\n"]


def strings() -> list[str]:
    """Every word alone, then mixtures of up to 12 with odd gaps between, then characters drawn from all of them."""
    draw = random.Random(0)
    pieces = WORDS + SPECIALS
    letters = "".join(WORDS)
    mixed = ["".join(draw.choice(pieces) + draw.choice(GAPS) for _ in range(draw.randint(1, 12))) for _ in range(900)]
    soup = ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(300)]
    return ["", " ", " \n ", *pieces, *mixed, *soup]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """transformers' tokenizer from the published file formats, its vocabulary written here from the merges."""
    with resources.files("sfumato.models").joinpath("clip_merges.txt.gz").open("rb") as packed:
        merges = gzip.decompress(packed.read()).decode("utf-8").splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(line.replace(" ", "") for line in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == len(set(tokens)) == 49408
    folder: Path = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def test_same_ids_as_transformers(reference: CLIPTokenizer) -> None:
    ours, texts = ClipTokenizer(), strings()
    assert len(texts) > 1000
    different = {text for text in texts if [49406, *ours.encode(text), 49407] != reference(text)["input_ids"]}
    assert not different


def test_same_text_back_as_transformers(reference: CLIPTokenizer) -> None:
    ours = ClipTokenizer()
    for text in strings():
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_known_ids() -> None:
    tokenizer = ClipTokenizer()
    assert tokenizer.pad(tokenizer.encode("a photo of a cat"), 7) == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.decode([320, 1125, 539, 320, 2368]) == "a photo of a cat"
    assert tokenizer.encode(START + END) == [tokenizer.start, tokenizer.end] == [49406, 49407]
    assert tokenizer.decode([49406, 320, 49407, 49407]) == "a"


def without_blanks(text: str) -> str:
    """In lower case letter by letter, without white space, composed (which lower case can undo)."""
    lower = "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))
    return unicodedata.normalize("NFC", "".join(lower.split()))


@pytest.mark.parametrize("vocab_size", [514, 4096, FULL_VOCAB_SIZE])
def test_any_text_comes_back_from_a_truncated_vocabulary(vocab_size: int) -> None:
    tokenizer = ClipTokenizer(vocab_size)
    assert (tokenizer.start, tokenizer.end) == (vocab_size - 2, vocab_size - 1)
    for text in strings():
        if START in text or END in text:
            continue  # they are the special tokens, which decode leaves out
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.start for index in ids)
        assert without_blanks(tokenizer.decode(ids)) == without_blanks(text)


def test_truncated_vocabulary_is_the_beginning_of_the_full_one() -> None:
    small, full = ClipTokenizer(4096), ClipTokenizer()
    assert small.encode("a photo of the") == full.encode("a photo of the")  # four of the commonest words
    assert len(small.encode("octane render")) > len(full.encode("octane render"))


@pytest.mark.parametrize("vocab_size", [-1, 0, 513, 49409, 10**9])
def test_vocabulary_out_of_range(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}: allowed are 514 to 49408"):
        ClipTokenizer(vocab_size)


def test_pad_fills_and_cuts() -> None:
    tokenizer = ClipTokenizer()
    assert tokenizer.pad([5, 6], 6) == [49406, 5, 6, 49407, 49407, 49407]
    assert tokenizer.pad([5, 6], 6, pad=0) == [49406, 5, 6, 49407, 0, 0]  # SD 2.x
    assert tokenizer.pad([], 2) == [49406, 49407]
    long = tokenizer.pad(list(range(100)))
    assert len(long) == 77
    assert long == [49406, *range(75), 49407]
