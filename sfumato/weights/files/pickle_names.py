"""The names that a pickled checkpoint may ask for, and the inert things that stand for them here. Imports none of them.

A name is either known (KNOWN: storages, dtypes, and builders that make plain values and records of tensors), or a
leftover of training that becomes an inert `Leftover`, or refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from sfumato.weights.files.mapped import LARGEST, MAX_DIMENSIONS, check_shape, extent, short

MAX_KEY = 256  # letters of a storage's name; torch writes a number
MAX_EXPANDED = 1 << 20  # elements of a tensor that repeats its storage (strides of 0)


class Refused(ValueError):
    """A pickle that may be sound, and is not wanted: the message says it all."""


@dataclass(frozen=True, eq=False)
class Leftover:
    """What stands where the pickle had a class, function or object that is no weight. Its state is forgotten."""

    name: str


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and its like."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """The storage `key` of the file: elements [start, start + size), of a dtype, of the `whole` that it has."""

    dtype: torch.dtype
    key: str
    whole: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor of the pickle: `offset` in elements of `dtype` from the start of its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Builder:
    """A callable that a pickle may ask for: `make` gets the arguments and returns plain values."""

    name: str
    make: Callable[..., Any]


class Parameters(dict[Any, Any]):
    """A ParameterDict or ParameterList: what it holds comes with its state."""


@dataclass(eq=False)
class NumpyType:
    """A numpy dtype, for the numbers that numpy wrote: "f8", "<"."""

    code: str
    order: str = "<"


# --- what tensors are made of


def _counts(value: object, what: str) -> tuple[int, ...]:
    if (
        isinstance(value, tuple | list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= LARGEST for n in value)
    ):
        return tuple(value)
    raise ValueError(f"a tensor's {what} is {short(value)}: up to {MAX_DIMENSIONS} counts, not negative, are allowed")


def _tensor(storage: Storage, dtype: torch.dtype, offset: int, size: object, stride: object) -> RawTensor:
    """A record of a tensor, once it is sure to lie within its storage."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor without a storage but {short(storage)}")
    shape, steps = _counts(size, "shape"), _counts(stride, "stride")
    (start,) = _counts([offset], "offset")
    if len(shape) != len(steps):
        raise ValueError(f"a tensor of shape {short(shape)} has strides {short(steps)}")
    check_shape(shape, dtype.itemsize)
    room = storage.size * storage.dtype.itemsize // dtype.itemsize
    needed = extent(shape, steps)
    if needed and start + needed > room:
        raise ValueError(f"a tensor of shape {short(shape)} lies outside its storage of {room} elements")
    if prod(shape) > max(room, MAX_EXPANDED):
        raise ValueError(f"a tensor of shape {short(shape)} repeats a storage of {room} elements")
    return RawTensor(storage, dtype, start, shape, steps)


def _rebuild_tensor(storage: Storage, offset: int, size: object, stride: object) -> RawTensor:
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor without a storage but {short(storage)}")
    return _tensor(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v2(
    storage: Storage, offset: int, size: object, stride: object, grad: object, hooks: object, bits: object = None
) -> RawTensor:
    if bits:  # a conjugated or negated view: its numbers are not what the storage has
        raise ValueError(f"a tensor with {short(bits)} is not supported")
    return _rebuild_tensor(storage, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Storage, offset: int, size: object, stride: object, grad: object, hooks: object, dtype: torch.dtype,
    bits: object = None,
) -> RawTensor:  # fmt: skip
    if bits or not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of {short(dtype)} with {short(bits)} is not supported")
    return _tensor(storage, dtype, offset, size, stride)


def _rebuild_parameter(data: RawTensor, grad: object, hooks: object, state: object = None) -> RawTensor:
    if not isinstance(data, RawTensor):
        raise ValueError(f"a parameter without a tensor but {short(data)}")
    return data


def _rebuild_from_type(make: Builder, kind: object, args: tuple[Any, ...], state: object) -> object:
    """A tensor with attributes of its own, or of a subclass: the plain tensor."""
    if not isinstance(make, Builder) or not make.name.startswith("torch._utils."):
        raise ValueError(f"a tensor made by {short(make)}")
    return make.make(*args)


def persistent(items: list[Any]) -> Storage | Builder | Leftover:
    """The object of a persistent id: a storage, or the class of a module, which legacy files write with its source."""
    (identity,) = items
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        if isinstance(identity[1], Builder | Leftover):
            return identity[1]
        raise ValueError("a module of an unknown class")
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError("a persistent id of an unknown form")
    _, kind, key, _, size, *views = identity
    if not isinstance(kind, StorageType) or not isinstance(key, str) or len(key) > MAX_KEY:
        raise ValueError(f"a storage {short(key)} of an unknown type")
    (whole,) = _counts([size], "storage")
    start, length = 0, whole
    if views and views[0] is not None:  # (its own key, start, size), before torch 0.4
        if not isinstance(views[0], tuple) or len(views[0]) != 3:
            raise ValueError(f"a view of the storage {short(key)} of an unknown form")
        start, length = _counts(views[0][1:], "view")
    if start + length > whole or whole * kind.dtype.itemsize > LARGEST:
        raise ValueError(f"a view of elements {start} to {start + length} of a storage of {whole}")
    return Storage(kind.dtype, key, whole, start, length)


# --- plain values


def _dict(pairs: object = ()) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, list | tuple):
        raise ValueError("a dict of no pairs")
    return {as_key(pair[0]): pair[1] for pair in pairs}


def _default_dict(kind: object = None, pairs: object = ()) -> dict[Any, Any]:
    return _dict(pairs)


def _items(items: object = ()) -> list[Any]:
    if not isinstance(items, list | tuple | set | frozenset | dict):
        raise ValueError(f"a collection of {short(items)}")
    return list(items)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes that are no Latin-1")
    return text.encode("latin-1")


def _bytes(text: str | bytes = b"", encoding: str = "latin-1") -> bytes:
    return bytes(text) if isinstance(text, bytes | bytearray) else _encode(text, encoding)


def _numpy_type(code: object, *flags: object) -> NumpyType:
    return NumpyType(code if isinstance(code, str) else "")


def _numpy_scalar(kind: NumpyType, data: object = b"") -> object:
    """A number that numpy wrote as the plain number; of other types an inert leftover."""
    letters = {
        "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "f2": "e", "i4": "i", "u4": "I", "f4": "f",
        "i8": "q", "u8": "Q", "f8": "d",
    }  # fmt: skip
    letter = letters.get(kind.code) if isinstance(kind, NumpyType) else None
    raw = data.encode("latin-1") if isinstance(data, str) else data
    if letter is None or not isinstance(raw, bytes):
        return Leftover("numpy scalar")
    return struct.unpack((">" if kind.order == ">" else "<") + letter, raw)[0]


def _old_object(kind: object, base: object, state: object) -> Leftover:
    """How protocols 0 and 1 make an object of any class."""
    if not isinstance(kind, Leftover):
        raise ValueError(f"an object of {short(kind)}")
    return Leftover(kind.name)


def _typing_item(kind: object, item: object) -> Leftover:
    """How typing writes List[int]; nothing is looked up."""
    if not isinstance(kind, Leftover) or not kind.name.startswith("typing."):
        raise ValueError(f"an item of {short(kind)}")
    return Leftover(kind.name)


def as_key(value: object) -> Any:
    """A value that may be hashed without harm: anything else, tuples for one, is replaced by an inert stand-in.

    Huge integers, equal modulo 2^61 - 1, would all fall into one slot of a dict.
    """
    plain = value is None or isinstance(value, str | bytes | float | Leftover | torch.dtype)
    if plain or (isinstance(value, int) and value.bit_length() <= 60):
        return value
    return Leftover(f"a key of type {type(value).__name__}")


# --- which names are known


def _torch_names() -> dict[tuple[str, str], Any]:
    """dtypes and storage types by their names; those that this torch lacks are left out."""
    dtypes = """bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 complex32
        complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
        float4_e2m1fn_x2""".split()  # noqa: SIM905
    storages = {
        "Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
        "Half": "float16", "Float": "float32", "Double": "float64", "BFloat16": "bfloat16",
        "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    }  # fmt: skip
    found = {("torch", name): getattr(torch, name) for name in dtypes if hasattr(torch, name)}
    known: dict[tuple[str, str], Any] = dict(found)
    known |= {("torch", f"{name}Storage"): StorageType(getattr(torch, dtype)) for name, dtype in storages.items()}
    untyped = [("torch", "UntypedStorage"), ("torch.storage", "UntypedStorage"), ("torch.storage", "_UntypedStorage")]
    return known | dict.fromkeys(untyped, StorageType(torch.uint8))


BUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): lambda sizes=(): _counts(sizes, "shape"),
    ("torch.nn.modules.container", "ParameterDict"): lambda *args: Parameters(),
    ("torch.nn.modules.container", "ParameterList"): lambda *args: Parameters(),
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "dict"): _dict,
    ("builtins", "list"): _items,
    ("builtins", "tuple"): lambda items=(): tuple(_items(items)),
    ("builtins", "set"): lambda items=(): set(map(as_key, _items(items))),
    ("builtins", "frozenset"): lambda items=(): frozenset(map(as_key, _items(items))),
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _old_object,
    ("_operator", "getitem"): _typing_item,
    ("numpy", "dtype"): _numpy_type,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
}
KNOWN = _torch_names() | {name: Builder(".".join(name), make) for name, make in BUILDERS.items()}
# Packages whose every class may be left behind in a checkpoint, and single modules.
LEFTOVERS = (
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
    "torch.optim", "ldm", "sgm",
)  # fmt: skip
LEFTOVER_MODULES = ("typing", "datetime", "pathlib")
LEFTOVER_NAMES = {
    *(("builtins", name) for name in ("bool", "complex", "float", "int", "object", "range", "slice", "str")),
    *(("numpy", name) for name in ("ndarray", "bool_", "float16", "float32", "float64", "int32", "int64")),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("argparse", "Namespace"),
    ("collections", "deque"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
}
# Python 2's names, which protocol 2 writes to this day, and those that moved.
MOVED_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "operator": "_operator",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "pathlib._local": "pathlib",
}
MOVED_NAMES = {("builtins", "long"): "int", ("builtins", "unicode"): "str", ("builtins", "xrange"): "range"}


def known(module: object, name: object) -> Any:
    """What stands for a global of a pickle. Refused for a name that no checkpoint needs."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"a global named {short(module)} {short(name)}")
    place = MOVED_MODULES.get(module, module)
    name = MOVED_NAMES.get((place, name), name)
    if (place, name) in KNOWN:
        return KNOWN[place, name]
    family = place in LEFTOVER_MODULES or any(f"{place}.".startswith(f"{package}.") for package in LEFTOVERS)
    if (place, name) in LEFTOVER_NAMES or (family and name.isidentifier()):
        return Leftover(f"{place}.{name}")
    full = short(f"{module}.{name}")[1:-1]
    if module == "torch._utils" and name.startswith("_rebuild_") and name.isidentifier():
        raise Refused(f"it holds a kind of tensor that is not supported ({full})")
    raise Refused(f"the pickle asks for {full}, which no checkpoint needs: refused, nothing was run")
