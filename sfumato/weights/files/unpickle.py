"""A reader of pickles that runs nothing: it goes through the opcodes itself and calls only what pickle_names makes.

`pickle.Unpickler` would not do even with `find_class` locked: it takes registered extensions unasked, a memo index of
2^31 costs it 16 GB, and hashing a tuple nested a million times kills the process.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Callable
from typing import IO, Any, cast

from sfumato.weights.files.mapped import Mapped, short
from sfumato.weights.files.pickle_names import (
    Builder,
    Leftover,
    NumpyType,
    Parameters,
    RawTensor,
    Storage,
    as_key,
    known,
    persistent,
)

MAX_BYTES = 64 << 20  # of a pickle without its storages; Stable Diffusion's have 0.2 to 3 MB
MAX_LINE = 1 << 16  # bytes of a name or number that is written as a line
MAX_OPCODES = 2_000_000  # steps; Stable Diffusion's have 40 to 400 thousand
MAX_COPIED = 256 << 20  # bytes that calls may copy: a list that is copied 100,000 times needs 100,000 short steps only
DAMAGE = (MemoryError, IndexError, KeyError, TypeError, OverflowError, AttributeError, struct.error)


class Window:
    """Bytes [start, stop) of a file as `pickletools` wants to read them."""

    def __init__(self, source: Mapped, start: int, stop: int) -> None:
        self._start = start
        self._buffer = io.BufferedReader(_Bytes(source, start, min(stop, start + MAX_BYTES, len(source))), 1 << 16)
        self.read = self._buffer.read

    def readline(self) -> bytes:
        return self._buffer.readline(MAX_LINE)

    def place(self) -> int:
        """Where in the file the next byte lies. (No method named `tell`: it would be asked at every step.)"""
        return self._start + self._buffer.tell()


class _Bytes(io.RawIOBase):
    """What a buffered reader reads from."""

    def __init__(self, source: Mapped, start: int, stop: int) -> None:
        self.source, self.start, self.stop, self.position = source, start, stop, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:  # what `tell` asks; nobody seeks
            offset += self.position
        self.position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        start = self.start + self.position
        data = self.source.read(start, min(start + len(buffer), self.stop))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}  # every one that was named, by its key
        self.copied = 0
        self.result: Any = None

    def run(self, window: Window) -> None:
        """Find `result`; the window then stands behind the pickle. ValueError for anything damaged or refused."""
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(cast(IO[bytes], window))):
                if count == MAX_OPCODES:
                    raise ValueError(f"a pickle of more than {MAX_OPCODES} steps")
                if opcode.name in PUSHES:
                    self.stack.append(arg)
                elif opcode.name in STEPS:
                    STEPS[opcode.name](self, arg)
                elif opcode.name not in IGNORED:
                    raise ValueError(f"a pickle with {opcode.name}, which no checkpoint needs: refused")
        except DAMAGE as error:
            raise ValueError(f"a damaged pickle ({type(error).__name__})") from error
        if self.below or len(self.stack) != 1:
            raise ValueError(f"a damaged pickle ({len(self.stack)} objects at its end)")
        self.result = self.stack[0]

    def pop_mark(self) -> list[Any]:
        """The objects above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def replace(self, count: int, make: Callable[[list[Any]], Any]) -> None:
        """Put what `make` makes of the uppermost `count` objects in their place."""
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(make(items))

    def mark(self, arg: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop(self, arg: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(as_key, items))
        elif not isinstance(target, Leftover):
            raise TypeError

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, dict | Leftover):
            raise TypeError
        if isinstance(target, dict):
            target.update(pairs(items))

    def put(self, arg: Any) -> None:
        self.memo[arg] = self.stack[-1]

    def global_(self, arg: str) -> None:
        self.stack.append(known(*arg.split(" ", 1)))

    def inst(self, arg: str) -> None:
        args = self.pop_mark()
        self.stack.append(self.called([known(*arg.split(" ", 1)), tuple(args)]))

    def obj(self, arg: object) -> None:
        items = self.pop_mark()
        self.stack.append(self.called([items[0], tuple(items[1:])]))

    def called(self, items: list[Any]) -> Any:
        """What [callable, arguments] or [class, arguments, keywords] makes. Keywords are only for leftovers."""
        make, args, *keywords = items
        if not isinstance(args, tuple):
            raise TypeError
        if isinstance(make, Leftover):
            return Leftover(make.name)
        if not isinstance(make, Builder) or any(keywords):
            raise ValueError(f"a call of {short(make)}, which nothing can call")
        for value in (args, *args):
            self.spend(value)
        try:
            return make.make(*args)
        except DAMAGE as error:
            raise ValueError(f"{make.name} with unfit arguments") from error

    def persistent(self, items: list[Any]) -> Any:
        found = persistent(items)
        if isinstance(found, Storage):
            self.storages.setdefault(found.key, found)
        return found

    def spend(self, value: object) -> None:
        """Account for a copy of `value`."""
        if isinstance(value, str | bytes | bytearray):
            self.copied += len(value)
        elif isinstance(value, tuple | list | dict | set | frozenset):
            self.copied += 64 * len(value)  # a dict's slot, about
        if self.copied > MAX_COPIED:
            raise ValueError("a pickle that copies the same again and again: refused")

    def build(self, arg: object) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, NumpyType):
            target.order = state[1]
        elif isinstance(target, Parameters) and isinstance(state, dict):
            inner = state.get("_parameters")
            self.spend(inner)
            target.update(inner if isinstance(inner, dict) else {})
        elif not isinstance(target, dict | Leftover | RawTensor):
            raise TypeError


def pairs(items: list[Any]) -> dict[Any, Any]:
    """[key, value, key, value, ...] as a dict."""
    return {as_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


Step = Callable[[Machine, Any], None]


def _step(count: int, make: Callable[[list[Any]], Any]) -> Step:
    return lambda machine, arg: machine.replace(count, make)


def _marked(make: Callable[[list[Any]], Any]) -> Step:
    def step(machine: Machine, arg: object) -> None:
        items = machine.pop_mark()
        machine.stack.append(make(items))

    return step


def _fill(count: int, fill: Callable[[Machine, list[Any]], None]) -> Step:
    """Take `count` objects, or (-1) those above the mark, and put them into the collection below."""

    def step(machine: Machine, arg: object) -> None:
        items = machine.pop_mark() if count < 0 else [machine.stack.pop() for _ in range(count)][::-1]
        fill(machine, items)

    return step


PUSHES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT""".split()  # noqa: SIM905
)
IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
# Every other opcode that a checkpoint has. EXT1, EXT2, EXT4 (registered objects), PERSID (ids of text) and
# the buffers outside the file are not among them.
STEPS: dict[str, Step] = {
    "NONE": lambda machine, arg: machine.stack.append(None),
    "NEWTRUE": lambda machine, arg: machine.stack.append(True),
    "NEWFALSE": lambda machine, arg: machine.stack.append(False),
    "BYTEARRAY8": lambda machine, arg: machine.stack.append(bytes(arg)),
    "EMPTY_LIST": lambda machine, arg: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, arg: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, arg: machine.stack.append({}),
    "EMPTY_SET": lambda machine, arg: machine.stack.append(set()),
    "TUPLE1": _step(1, tuple),
    "TUPLE2": _step(2, tuple),
    "TUPLE3": _step(3, tuple),
    "TUPLE": _marked(tuple),
    "LIST": _marked(list),
    "DICT": _marked(pairs),
    "FROZENSET": _marked(lambda items: frozenset(map(as_key, items))),
    "APPEND": _fill(1, Machine.extend),
    "APPENDS": _fill(-1, Machine.extend),
    "ADDITEMS": _fill(-1, Machine.extend),
    "SETITEM": _fill(2, Machine.set_items),
    "SETITEMS": _fill(-1, Machine.set_items),
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda machine, arg: machine.pop_mark().clear(),
    "DUP": lambda machine, arg: machine.stack.append(machine.stack[-1]),
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": lambda machine, arg: machine.put(len(machine.memo)),
    "GET": lambda machine, arg: machine.stack.append(machine.memo[arg]),
    "BINGET": lambda machine, arg: machine.stack.append(machine.memo[arg]),
    "LONG_BINGET": lambda machine, arg: machine.stack.append(machine.memo[arg]),
    "GLOBAL": Machine.global_,
    "STACK_GLOBAL": _step(2, lambda items: known(*items)),
    "INST": Machine.inst,
    "OBJ": Machine.obj,
    "REDUCE": lambda machine, arg: machine.replace(2, machine.called),
    "NEWOBJ": lambda machine, arg: machine.replace(2, machine.called),
    "NEWOBJ_EX": lambda machine, arg: machine.replace(3, machine.called),
    "BUILD": Machine.build,
    "BINPERSID": lambda machine, arg: machine.replace(1, machine.persistent),
}
