"""Textual-inversion embeddings: new words for a model's text encoders, read from and written to other programs' files.

Gal et al. 2022. Reads A1111's .pt, .safetensors and PNG and diffusers' .bin and .safetensors, by their content;
pickles go through the reader that runs nothing. Knows no prompt. Letters: n vectors, D width of a text encoder.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.families import Model
from sfumato.images.files import written_beside
from sfumato.weights.files import load_safetensors, save_safetensors, sha256
from sfumato.weights.files.mapped import StoredTensor, short
from sfumato.weights.files.pickles import is_torch_file, open_pickle
from sfumato.weights.files.safetensors_header import is_safetensors

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".bin", ".safetensors", ".png")
LAYOUTS = ("a1111", "diffusers")
MADE_FOR = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SD XL", (1280,): "the refiner of SD XL"}
PAIR = ("clip_l", "clip_g")  # XL's two encoders, in the order of its context
WORD, WORD_ID = "*", 265  # the word that A1111 writes, and its id in CLIP's vocabulary
PNG, PNG_KEY = b"\x89PNG\r\n\x1a\n", "sd-ti-embedding"
PNG_TENSOR = "TORCHTENSOR"
MOST_HIDDEN = 1 << 22  # bytes in a picture's pixels: 75 vectors of XL are far less


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word: its name in prompts, and for each text encoder of a model its vectors (n, D), float32 on the CPU.

    `step` counts the steps of its training; `checkpoint` and `checkpoint_hash` say what it was trained on, as A1111
    stores them. `hash` is the file's SHA-256, 64 hex digits, of which A1111 writes 12 into pictures; "" without a file.
    """

    name: str
    vectors: tuple[Tensor, ...]
    step: int | None = None
    checkpoint: str | None = None
    checkpoint_hash: str | None = None
    hash: str = ""

    @property
    def count(self) -> int:
        """How many of a prompt's tokens it takes."""
        return len(self.vectors[0])


def load_embedding(path: str | Path, model: Model, name: str | None = None) -> Embedding:
    """An embedding that fits the model's text encoders.

    Its name is `name`, else the word in a file of diffusers or in a PNG, else the file's own name, as in A1111.
    ValueError, in one line with the file's name: not readable, no embedding or several in it, of another width, of
    more vectors than a chunk of a prompt holds, or with numbers that are not finite.
    """
    path = Path(path)
    try:
        word, given, facts = _contents(path)
        vectors = tuple(_checked(tensor) for tensor in _fitting(given, model))
        room = min(tower.config.max_length for tower in model.family.texts) - 2
        counts = {len(tensor) for tensor in vectors}
        if len(counts) > 1 or not 1 <= max(counts) <= room:
            found = " and ".join(map(str, sorted(counts)))
            raise ValueError(f"it has {found} vectors, 1 to {room} are allowed, as many for each text encoder")
    except (ValueError, OSError) as error:
        why = str(error).removeprefix(f"ckpt={str(path)!r}: ").removeprefix(f"embedding={str(path)!r}: ")
        why = " ".join(why.split())
        raise ValueError(f"embedding={str(path)!r}: {why}") from error
    return Embedding(
        name or word or path.stem,
        vectors,
        _whole(facts.get("step")),
        _text(facts.get("sd_checkpoint_name")),
        _text(facts.get("sd_checkpoint")),
        sha256(path),
    )


def find_embeddings(folder: str | Path, model: Model) -> tuple[dict[str, Embedding], dict[str, str]]:
    """The embeddings in a folder and below it that fit the model, by name; and those that do not, with the reason.

    Names are those of the files; words that files carry inside, such as `<cat>`, are names as well where nothing else
    has them. Of two files of one name the first in alphabetical order counts. Pictures without an embedding are
    pictures. ValueError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"embeddings={str(folder)!r}: no such folder")
    found: dict[str, Embedding] = {}
    inner: dict[str, Embedding] = {}
    skipped: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            skipped[path.name] = f"embedding={str(path)!r}: another file has the name {path.stem!r}"
            continue
        try:
            if path.suffix.lower() == ".png" and not _png_body(path):
                continue
            one = load_embedding(path, model)
        except ValueError as error:
            skipped[path.name] = str(error)
            continue
        found[path.stem] = replace(one, name=path.stem)
        inner.setdefault(one.name, one)
    if skipped:
        log.info("%d embeddings are left out: %s", len(skipped), ", ".join(skipped))
    return inner | found, skipped


def save_embedding(path: str | Path, embedding: Embedding, layout: str = "a1111") -> None:
    """Write the file whole or not at all: .safetensors, or a torch file for .pt and .bin.

    `layout` "diffusers" stores one tensor under the embedding's name, "a1111" its own fields; both programs read
    either, and XL's two tensors are named alike in both. OSError where it cannot be written.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: one of {', '.join(LAYOUTS)}")
    if path.suffix not in (".pt", ".bin", ".safetensors"):
        raise ValueError(f"out={str(path)!r}: a name that ends with .pt, .bin or .safetensors is needed")
    if len(embedding.vectors) > len(PAIR):
        raise ValueError(f"vectors: {len(embedding.vectors)} text encoders, these files have places for 1 or 2")
    tensors = [tensor.detach().float().cpu().contiguous() for tensor in embedding.vectors]
    facts = {
        "step": embedding.step,
        "sd_checkpoint": embedding.checkpoint_hash,
        "sd_checkpoint_name": embedding.checkpoint,
    }
    pair = len(tensors) == len(PAIR)
    key = embedding.name if layout == "diffusers" else "emb_params"
    named = dict(zip(PAIR, tensors, strict=True)) if pair else {key: tensors[0]}
    if path.suffix == ".safetensors":
        header = {name: str(value) for name, value in facts.items() if value is not None}
        save_safetensors(path, named, {"format": "pt", "name": embedding.name, **header})
        return
    value: dict[str, Any] = dict(named)
    if layout == "a1111" and not pair:
        value = {"string_to_token": {WORD: WORD_ID}, "string_to_param": {WORD: tensors[0]}, "name": embedding.name}
        value |= facts
    save_pickle(path, value)


def save_pickle(path: Path, value: Any) -> None:
    """A torch file, whole or not at all."""
    body = io.BytesIO()
    torch.save(value, body)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside, beside.open("wb") as file:
        file.write(body.getbuffer())
        file.flush()
        os.fsync(file.fileno())


# --- what is in a file

Contents = tuple[str | None, dict[str, Tensor], Mapping[str, Any]]  # its word, tensors by encoder or {"": one}, facts


def _contents(path: Path) -> Contents:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(PNG):
        data = _from_png(path)
        word, given, facts = _of_mapping(data, facts=data)
        return _text(data.get("name")) or word, given, facts
    if is_safetensors(head):
        tensors, metadata = load_safetensors(path)
        return _of_mapping(tensors, metadata)
    if not is_torch_file(head):
        raise ValueError("not a .safetensors file, torch file or PNG with an embedding in it")
    root = open_pickle(path)
    if not isinstance(root, dict):
        raise ValueError(f"there is no embedding in it but {short(root)}")
    return _of_mapping(root, facts=root)


def _of_mapping(data: Mapping[Any, Any], facts: Mapping[str, Any]) -> Contents:
    """Tensors and facts of what a file holds, whichever program wrote it; the word where its key is one."""
    if "string_to_param" in data:
        return None, {"": _only(data["string_to_param"])[1]}, facts
    if all(key in data for key in PAIR):
        return None, {key: _tensor(data[key]) for key in PAIR}, facts
    key, tensor = _only(data)
    word = key if isinstance(key, str) and key not in ("emb_params", WORD) else None
    return word, {"": tensor}, facts


def _only(data: object) -> tuple[Any, Tensor]:
    """The one tensor of a mapping and its key."""
    tensors = {}
    if isinstance(data, Mapping):
        tensors = {key: value for key, value in data.items() if isinstance(value, Tensor | StoredTensor)}
    if not tensors:
        raise ValueError("there is no embedding in it")
    if len(tensors) > 1:
        raise ValueError(f"it has {len(tensors)} tensors, an embedding of one word has one, or clip_l and clip_g")
    [(key, value)] = tensors.items()
    return key, _tensor(value)


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor | StoredTensor):
        raise ValueError(f"there is no embedding in it but {short(value)}")
    return value.read() if isinstance(value, StoredTensor) else value


def _png_body(path: Path) -> bytes:
    """The JSON of an embedding in a PNG, from its text or its pixels; b"" without one. ValueError: no picture."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get(PNG_KEY)
            if isinstance(text, str):
                return base64.b64decode(text, validate=True)
            return _hidden(np.asarray(picture.convert("RGB")))
    except (SyntaxError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"embedding={str(path)!r}: not a readable picture or a damaged embedding ({error})") from error


def _hidden(pixels: np.ndarray) -> bytes:
    """What A1111 hides in pixels (H, W, 3) uint8: in strips left and right of a picture, each behind a black column.

    The left strip's low four bits are the low ones of each byte of zlib data, the right one's the high ones, both
    scrambled. b"" where there is nothing of the kind.
    """
    lit: np.ndarray = np.all(pixels > 0, axis=2)
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return b""
    bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(bits.max(axis=(0, 2)) == 0)
    if len(black) < 2:
        return b""
    low, high = bits[:, : black[0]], bits[:, black[-1] + 1 :]
    if low.shape != high.shape or not 0 < low.size <= MOST_HIDDEN:
        return b""
    state, scramble = 0, bytearray()
    for _ in range(low.size):
        state = (1664525 * state + 1013904223) % 2**32  # Knuth and Lewis's generator, as in Press et al. 1992
        scramble.append(state % 255 & 15)
    mask = np.frombuffer(bytes(scramble), np.uint8).reshape(low.shape)
    packed = (((high ^ mask) << 4) | (low ^ mask)).tobytes()
    try:
        return zlib.decompressobj().decompress(packed, 8 * MOST_HIDDEN)
    except zlib.error:  # a picture that merely has two black columns
        return b""


def _from_png(path: Path) -> dict[str, Any]:
    """What A1111 stored in a picture as JSON, tensors as nested lists of numbers."""
    body = _png_body(path)
    if not body:
        raise ValueError("a picture without an embedding")

    def built(value: dict[str, Any]) -> Any:
        return torch.tensor(value[PNG_TENSOR], dtype=torch.float32) if PNG_TENSOR in value else value

    try:
        data = json.loads(body, object_hook=built)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # torch and json have all of these
        raise ValueError(f"the embedding in the picture is damaged ({error})") from error
    if not isinstance(data, dict):
        raise ValueError("the embedding in the picture is damaged (not an object)")
    return data


# --- whether it fits


def _fitting(given: Mapping[str, Tensor], model: Model) -> tuple[Tensor, ...]:
    """The tensors for each of the model's text encoders; ValueError where the widths are others."""
    towers = model.family.texts
    shaped = {key: tensor[None] if tensor.ndim == 1 else tensor for key, tensor in given.items()}
    if odd := [tensor for tensor in shaped.values() if tensor.ndim != 2]:
        raise ValueError(f"a tensor of shape {tuple(odd[0].shape)}, an embedding's is (vectors, width)")
    needed = tuple(tower.config.width for tower in towers)
    widths = tuple(tensor.shape[1] for tensor in shaped.values())
    if len(given) > 1 and len(towers) == 1 and towers[0].openclip and needed[0] == widths[-1]:
        return (shaped[PAIR[1]],)  # the refiner has XL's second encoder alone
    if widths != needed:
        made = f", made for {MADE_FOR[widths]}" if widths in MADE_FOR else ""
        wanted, found = (" and ".join(map(str, each)) for each in (needed, widths))
        raise ValueError(f"its vectors are {found} wide{made}; {model.family.name} needs {wanted}")
    return tuple(shaped.values())


def _checked(tensor: Tensor) -> Tensor:
    """float32 in memory of its own; ValueError for numbers that are none."""
    if not tensor.is_floating_point():
        raise ValueError(f"its numbers are {str(tensor.dtype).removeprefix('torch.')}, floats are needed")
    vectors = tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    if not vectors.isfinite().all():
        raise ValueError("some of its numbers are not finite (NaN or infinity)")
    return vectors


def _whole(value: object) -> int | None:
    """A count as files have it, a number or its digits; None for anything else."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
