"""Where the files of a tar lie, read from its headers alone. Knows the format alone: POSIX.1-2001 pax, GNU, ustar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
DIGITS = 19  # of a number below 2^63
LONGEST_NAME = 1 << 16  # bytes; more is no name but damage


class Damaged(ValueError):
    """The tar is unreadable from somewhere on; the text says where and why."""


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file whose bytes are all there; then Damaged where the tar is cut or wrong."""
    total = path.stat().st_size
    with path.open("rb") as file:
        place, name, size = 0, "", -1
        while True:
            file.seek(place)
            header = file.read(BLOCK)
            if len(header) == BLOCK and not header.strip(b"\0") and place:
                return
            if len(header) < BLOCK:
                raise Damaged(f"cut short (it ends at byte {total} without a tar's mark of the end)")
            _check(header, place)
            stored = size if size >= 0 else _number(header[124:136], place)
            start, kind = place + BLOCK, header[156:157]
            if start + stored > total:
                raise Damaged(f"cut short (byte {place}: {stored} bytes follow, {total - start} are there)")
            place = start + -(-stored // BLOCK) * BLOCK
            if kind in (b"L", b"x"):
                name, size = _long(file, start, stored, kind, name)
                continue
            if kind in (b"0", b"\0", b"7"):
                yield name or _name(header), start, stored
            if kind not in (b"g", b"K"):
                name, size = "", -1


def _check(header: bytes, place: int) -> None:
    """The checksum: the sum of the header's bytes, its own eight taken as spaces."""
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if found != _number(header[148:156], place):
        raise Damaged(f"{'damaged' if place else 'not a tar'} (byte {place}: the checksum is wrong)")


def _number(digits: bytes, place: int) -> int:
    """Octal text, or a large number of GNU: 256 ** n with the first bit set."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0")[0].strip()
    if text.translate(None, b"01234567"):
        raise Damaged(f"{'damaged' if place else 'not a tar'} (byte {place}: {digits!r} is no number)")
    return int(text or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _long(file: BinaryIO, start: int, stored: int, kind: bytes, name: str) -> tuple[str, int]:
    """The next file's name and size (-1: as its header says), from GNU's long name or the records of pax."""
    if stored > LONGEST_NAME:
        raise Damaged(f"damaged (byte {start}: a name of {stored} bytes)")
    file.seek(start)
    data = file.read(stored)
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "backslashreplace"), -1
    size = -1
    while data:
        length = data.split(b" ")[0]
        if not length.isdigit() or len(length) > DIGITS or not 0 < int(length) <= len(data):
            raise Damaged(f"damaged (byte {start}: a record of pax)")
        key, _, value = data[: int(length)][len(length) + 1 : -1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size" and value.isdigit() and len(value) <= DIGITS:
            size = int(value)
        data = data[int(length) :]
    return name, size
