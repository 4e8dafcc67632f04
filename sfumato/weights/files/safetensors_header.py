"""The header of a .safetensors file -> where each tensor lies. As strict as the safetensors library, and stricter with
names that come twice. Knows the format alone.

The format: 8 bytes of length (little-endian), that many bytes of JSON, then the tensors one behind the other, no gap.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import torch

from sfumato.weights.files.mapped import LARGEST, Mapped, StoredTensor, check_shape, dense, short

MAX_HEADER = 100_000_000  # the library's own limit
SPACES = b" \t\r\n"  # what JSON allows around its values


def _dtypes() -> dict[str, torch.dtype]:
    """The format's names; dtypes that this torch lacks are left out."""
    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
        "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
    }  # fmt: skip
    return {name: getattr(torch, dtype) for name, dtype in names.items() if hasattr(torch, dtype)}


DTYPES = _dtypes()


def is_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file are a length and the start of a JSON object."""
    return head[8:].lstrip(SPACES)[:1] == b"{"


def read_header(source: Mapped) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors in the header's order, and the metadata. ValueError says what is wrong."""
    size = int.from_bytes(source.read(0, 8), "little")
    start = 8 + size
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size} bytes, at most {MAX_HEADER} are allowed")
    if len(source) < start:
        raise ValueError(f"a header of {size} bytes in a file of {len(source)}: cut or damaged")
    header = _parse(source.read(8, start))
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no table of texts")
    tensors, ends = {}, []
    for name, entry in header.items():
        try:
            tensors[name], span = _tensor(source, start, entry)
        except ValueError as error:
            raise ValueError(f"tensor {short(name)}: {error}") from error
        ends.append((*span, name))
    _check_order(sorted(ends), len(source) - start)
    return tensors, metadata


def sort_metadata(file: BinaryIO) -> None:
    """Put a written file's metadata in the order of their names: the library's is another one in every process."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    if "__metadata__" not in header:
        return
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > size:
        raise ValueError(f"a header of {size} bytes grew to {len(text)} when its metadata were sorted")
    file.seek(8)
    file.write(text.ljust(size))


def _parse(data: bytes) -> dict[str, Any]:
    """The JSON object, every name in it once."""
    try:
        header = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON ({error.msg}, character {error.pos})") from error
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header has the name {short(name)} twice")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"its header has the name {short(name)}, which is not Unicode")
        found[name] = value
    return found


def _number(text: str) -> int:
    if len(text) > 20:  # digits of 2^64
        raise ValueError(f"its header has a number of {len(text)} digits")
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"its header is not JSON ({name})")


def _tensor(source: Mapped, start: int, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """One entry, and its bytes [begin, end) counted from the header's end."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError("dtype, shape and data_offsets are needed")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"dtype={short(kind)}: {', '.join(DTYPES)} can be read")
    if not _are_counts(shape):
        raise ValueError(f"shape={short(shape)}: a list of counts is needed")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets={short(offsets)}: two counts are needed")
    begin, end = offsets
    shape, dtype = _unpacked(shape) if kind == "F4" else tuple(shape), DTYPES[kind]
    check_shape(shape, dtype.itemsize)
    tensor = StoredTensor(source, start + begin, dtype, shape, dense(shape))
    if end - begin != tensor.span:
        raise ValueError(f"data_offsets={short(offsets)}: {tensor.span} bytes are needed")
    return tensor, (begin, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(count) is int and 0 <= count <= LARGEST for count in value)


def _unpacked(shape: list[int]) -> tuple[int, ...]:
    """F4 counts single numbers of four bits, torch counts bytes with two of them."""
    if not shape or shape[-1] % 2:
        raise ValueError(f"shape={short(shape)}: numbers of four bits come in pairs")
    return (*shape[:-1], shape[-1] // 2)


def _check_order(spans: list[tuple[int, int, str]], size: int) -> None:
    """ValueError unless the tensors cover the `size` bytes behind the header, each byte once."""
    place = 0
    for begin, end, name in spans:
        if begin != place:
            word = "a gap before" if begin > place else "an overlap at"
            raise ValueError(f"{word} tensor {short(name)} (data_offsets={short([begin, end])})")
        place = end
    if place != size:
        raise ValueError(f"its tensors need {place} bytes, there are {size}: cut or damaged")
