"""Torch's files (.ckpt, .pt, .pth, .bin), zip and legacy: what they hold, as plain values with tensors still on disk.

Knows the two containers; pickles themselves are gone through by `unpickle`, which runs nothing. No tensor is read
here. Everything raised is a ValueError of one line.
"""

from __future__ import annotations

import logging
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sfumato.weights.files.mapped import Mapped, StoredTensor, blamed_on, short
from sfumato.weights.files.pickle_names import Leftover, RawTensor, Refused, Storage
from sfumato.weights.files.unpickle import MAX_BYTES, Machine, Window

log = logging.getLogger(__name__)

ZIP = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_DEPTH = 64  # of containers in containers
MAX_VALUES = 1_000_000  # in the whole nest, counted as often as they show: a nest may hold the same list 2^60 times
MAX_NAME = 300  # letters of a tensor's name, joined

Places = Callable[[Storage], tuple[int, int]]  # a storage -> where it starts in the file and how many bytes are there
Scalar = str | int | float | bool


def open_pickle(path: str | Path) -> Any:
    """What a torch file holds: dicts, lists, tuples, sets, scalars, bytes, torch.dtype; tensors are StoredTensor
    (`.read()` gives the Tensor), leftovers of training are Leftover. ValueError names the file."""
    path = Path(path)
    with blamed_on(path):
        return read_root(Mapped(path))


def read_root(source: Mapped) -> Any:
    """As `open_pickle`, of a mapped file."""
    try:
        return _root(source)
    except Refused:
        raise
    except ValueError as error:
        raise ValueError(f"not a readable torch file: {error}") from error


def _root(source: Mapped) -> Any:
    zipped = source.read(0, len(ZIP)) == ZIP
    raw, places = _open_zip(source) if zipped else _open_legacy(source)
    plain = _Plain(source, places)
    root, _, _ = plain.nest(raw, 0)
    if plain.leftovers:
        log.info("%s: leftovers of training put aside: %s", source.path.name, ", ".join(sorted(plain.leftovers)[:9]))
    return root


def is_torch_file(head: bytes) -> bool:
    """Whether the first bytes are those of a zip or of a pickle of protocol 2 or newer."""
    return head.startswith(ZIP) or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


# --- the zip container (torch 1.6 and newer): <name>/data.pkl, <name>/data/<key>, <name>/byteorder


def _open_zip(source: Mapped) -> tuple[Any, Places]:
    entries = _entries(source)
    prefix = next(iter(entries), "").split("/")[0]  # as torch finds it
    if f"{prefix}/constants.pkl" in entries:
        raise Refused("a TorchScript program, not weights: refused, nothing was run")
    if f"{prefix}/data.pkl" not in entries:
        raise ValueError("a zip, but not one that torch wrote (no data.pkl)")
    if f"{prefix}/byteorder" in entries:
        start, size = _locate(source, entries[f"{prefix}/byteorder"])
        order = source.read(start, start + min(size, 16))
        if order != b"little":
            raise Refused(f"written on a machine with byte order {short(order)}: only b'little' is supported")
    start, size = _locate(source, entries[f"{prefix}/data.pkl"])
    if size > MAX_BYTES:
        raise ValueError(f"its data.pkl has {size} bytes, at most {MAX_BYTES} are allowed")

    def place(storage: Storage) -> tuple[int, int]:
        name = f"{prefix}/data/{storage.key}"
        if name not in entries:
            raise ValueError(f"the storage {short(storage.key)} is missing")
        return _locate(source, entries[name])

    machine = Machine()
    machine.run(Window(source, start, start + size))
    return machine.result, place


def _entries(source: Mapped) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(source.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, ValueError, RuntimeError) as error:
        raise ValueError(f"a damaged or cut zip ({error})") from error
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("a zip with two entries of one name")
    return entries


def _locate(source: Mapped, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes start and how many there are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"its entry {short(info.filename)} is compressed or encrypted: torch stores entries plain")
    header = source.read(info.header_offset, info.header_offset + 30) if info.header_offset >= 0 else b""
    if len(header) < 30 or not header.startswith(ZIP):
        raise ValueError(f"a damaged zip (no entry where {short(info.filename)} should be)")
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_size + extra_size
    if start + info.file_size > len(source):
        raise ValueError(f"its entry {short(info.filename)} reaches beyond the end of the file")
    return start, info.file_size


# --- the legacy container: five pickles (magic number, protocol, machine, object, keys), then the storages, raw


def _open_legacy(source: Mapped) -> tuple[Any, Places]:
    first, end = _pickle_at(source, 0)
    if first.result != LEGACY_MAGIC:
        raise Refused("a bare pickle, not a file of torch: refused, nothing was run")
    second, end = _pickle_at(source, end)
    if second.result != LEGACY_PROTOCOL:
        raise ValueError(f"a torch file of protocol {short(second.result)}, only {LEGACY_PROTOCOL} is known")
    third, end = _pickle_at(source, end)
    if not isinstance(third.result, dict) or third.result.get("little_endian") is not True:
        raise Refused("written on a machine of another byte order: only little-endian is supported")
    body, end = _pickle_at(source, end)
    keys, end = _pickle_at(source, end)
    spots = _legacy_spots(source, end, keys.result, body.storages)

    def place(storage: Storage) -> tuple[int, int]:
        if storage.key not in spots:
            raise ValueError(f"the storage {short(storage.key)} is missing")
        return spots[storage.key]

    return body.result, place


def _pickle_at(source: Mapped, start: int) -> tuple[Machine, int]:
    """The machine that has gone through the pickle at `start`, and where that ends."""
    window = Window(source, start, len(source))
    machine = Machine()
    machine.run(window)
    return machine, window.place()


def _legacy_spots(source: Mapped, start: int, keys: Any, storages: dict[str, Storage]) -> dict[str, tuple[int, int]]:
    """Where each storage lies: one after the other, each behind its length in elements."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("a damaged list of storages")
    spots = {}
    for key in keys:
        if key not in storages:
            raise ValueError(f"the storage {short(key)} belongs to no tensor")
        storage, head = storages[key], source.read(start, start + 8)
        size = storage.whole * storage.dtype.itemsize
        if len(head) < 8 or start + 8 + size > len(source):
            raise ValueError(f"the storage {short(key)} reaches beyond the end of the file")
        if int.from_bytes(head, "little") != storage.whole:
            raise ValueError(f"the storage {short(key)} is of another size than its tensors say")
        spots[key] = (start + 8, size)
        start += 8 + size
    return spots


# --- from what the pickle made to what callers see


class _Plain:
    """Goes through a root once: places its tensors in the file, and holds the limits, so that callers may recurse."""

    def __init__(self, source: Mapped, places: Places) -> None:
        self.source, self.places = source, places
        self.spots: dict[str, tuple[int, int]] = {}
        self.done: dict[int, tuple[Any, int, int]] = {}
        self.leftovers: set[str] = set()

    def nest(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """A value made plain, how many values it shows, and in how many levels. What shows often is done once."""
        if not isinstance(value, dict | list | tuple):
            return self.leaf(value), 1, 0
        if id(value) not in self.done and depth <= MAX_DEPTH:  # a nest that holds itself is endlessly deep
            self.done[id(value)] = self.container(value, depth + 1)
        plain, count, levels = self.done.get(id(value), (None, 0, 0))
        if depth + levels > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"a nest of more than {MAX_DEPTH} levels or {MAX_VALUES} values: refused")
        return plain, count, levels

    def container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> tuple[Any, int, int]:
        inner = [self.nest(item, depth) for item in (value.values() if isinstance(value, dict) else value)]
        items = [item for item, _, _ in inner]
        plain: Any = items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            plain = dict(zip(map(self.leaf, value), items, strict=True))
        count = 1 + sum(count for _, count, _ in inner)
        return plain, count, 1 + max((levels for _, _, levels in inner), default=0)

    def leaf(self, value: Any) -> Any:
        if isinstance(value, RawTensor):
            return self.tensor(value)
        if value is None or isinstance(value, bytes | set | frozenset | torch.dtype | Scalar):
            return value
        leftover = value if isinstance(value, Leftover) else Leftover(getattr(value, "name", type(value).__name__))
        self.leftovers.add(short(leftover.name)[1:-1])
        return leftover

    def tensor(self, raw: RawTensor) -> StoredTensor:
        storage, itemsize = raw.storage, raw.dtype.itemsize
        if storage.key not in self.spots:
            self.spots[storage.key] = self.places(storage)
        start, size = self.spots[storage.key]
        if storage.whole * storage.dtype.itemsize > size:
            raise ValueError(f"the storage {short(storage.key)} has {size} bytes, its tensors say more")
        offset = start + storage.start * storage.dtype.itemsize + raw.offset * itemsize
        return StoredTensor(self.source, offset, raw.dtype, raw.shape, raw.stride)


def named(root: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a root by their names, and the scalars beside them as text.

    The dict under "state_dict" is taken where there is one, with the scalars around it; else the root itself.
    Containers in containers join their names with ".". ValueError where two tensors would have one name.
    """
    metadata: dict[str, str] = {}
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        metadata = {key: str(value) for key, value in root.items() if isinstance(key, str) and _is_scalar(value)}
        root = root["state_dict"]
    if not isinstance(root, dict | list | tuple):
        raise ValueError(f"it holds {short(root)}, not named tensors")
    tensors: dict[str, StoredTensor] = {}
    for name, value in _leaves(root, ""):
        if isinstance(value, StoredTensor):
            if name in tensors:
                raise ValueError(f"two tensors have the name {short(name)}")
            tensors[name] = value
        elif _is_scalar(value):
            metadata.setdefault(name, str(value))
    return tensors, metadata


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What lies in nested dicts, and the tensors (no scalars) in lists, by joined names."""
    if len(name) > MAX_NAME:
        raise ValueError(f"the tensor {short(name)} has a name of more than {MAX_NAME} letters")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{_key_text(key)}" if name else _key_text(key))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            if not _is_scalar(inner):
                yield from _leaves(inner, f"{name}.{place}" if name else str(place))
    else:
        yield name, value


def _key_text(key: object) -> str:
    if isinstance(key, str):
        return key
    return key.name if isinstance(key, Leftover) else short(key)


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
