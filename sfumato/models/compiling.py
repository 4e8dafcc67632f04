"""A U-Net's repeated blocks, compiled: each kind of block once for a size, however many of them a network has.

Owns which calls go to compiled code and how many sizes there may be. What compiled code is, is torch.compile's; it
takes a block's weights as they are at each call, so these may change. Calls without gradients only; knows no rows'
meaning. Letters: B rows, C channels, h w size of a map, M cells, L tokens, D width.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.models.transformer import TransformerBlock
from sfumato.models.unet import ResBlock

log = logging.getLogger(__name__)

KINDS = (ResBlock, TransformerBlock)
SIZES = 6  # of maps and texts together, for each kind of block; each costs a compilation
ONE, MANY = "one", "many"  # rows of a call: of many, any number goes through the same code
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch.compile reads it, and so do the processes that it starts


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here, in one line; None where it can.

    On a CPU torch.compile needs a C++ compiler and Python's headers, on a GPU Triton and a C compiler; MPS is left out.
    """
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler ({compiler}; $CXX names another)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "Python's headers (Python.h) are not installed"
        return None
    if device.type != "cuda":
        return f"torch.compile is not used on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        return "there is no C compiler, which Triton needs (cc, gcc or clang; $CC names another)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a card of compute capability 7.0 or more"
    return None


def keep_in(folder: Path) -> None:
    """Keep compiled code in a folder, for this process and later ones; for before the first compilation.

    A folder that $TORCHINDUCTOR_CACHE_DIR names stays, unless it is the temporary one that the compiler itself puts
    there as soon as it is imported.
    """
    known = Path(os.environ.get(CACHE, ""))
    if not known.name or (known.parent == Path(tempfile.gettempdir()) and known.name.startswith("torchinductor_")):
        os.environ[CACHE] = str(folder)


class Compiled:
    """The blocks of a network that go through compiled code, until `remove`.

    What is not plain goes as before, and so do calls with gradients: where something is asked of attentions, where a
    block has hooks, a delta or a hypernetwork, where edges wrap, and once there are `sizes` sizes. For one thread.
    """

    def __init__(self, network: nn.Module, sizes: int = SIZES, backend: str | Callable[..., Any] = "inductor") -> None:
        if sizes < 1:
            raise ValueError(f"sizes={sizes}: 1 or more are needed")
        self.sizes, self.backend = sizes, backend
        self.blocks = [block for block in network.modules() if isinstance(block, KINDS)]
        self._made: dict[str, dict[Hashable, Callable[..., Tensor]]] = {}
        self._full = False
        for block in self.blocks:
            block._compiled_call_impl = partial(self._call, block, repr(block), tuple(block.modules()))

    def __len__(self) -> int:
        """How many codes there are: one for each kind of block, size, and one row or many."""
        return sum(len(made) for made in self._made.values())

    def remove(self) -> None:
        """Let every block go as before."""
        for block in self.blocks:
            block._compiled_call_impl = None
        self.blocks, self._made = [], {}

    def _call(self, block: nn.Module, kind: str, parts: Sequence[nn.Module], *given: Any, **named: Any) -> Tensor:
        """A call of a block; `kind` tells blocks of other layers apart."""
        asked = given[2] if len(given) > 2 else None
        if not torch.is_grad_enabled() and not named and asked is None and plain(parts):
            x, told = given[:2]
            # in one order, channels last: code is made for an order, too
            x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
            if (code := self._code(kind, x, told)) is not None:
                return code(block, x, told)
        found: Tensor = block._call_impl(*given, **named)
        return found

    def _code(self, kind: str, x: Tensor, told: Tensor) -> Callable[..., Tensor] | None:
        """What computes a block of a kind for x (B, ...) and what it is told (B, ...); None beyond the bound."""
        made = self._made.setdefault(kind, {})
        rows = ONE if x.shape[0] == 1 or told.shape[0] == 1 else MANY
        size = x.shape[1:], told.shape[1:], x.dtype, x.device
        if (found := made.get((rows, size))) is not None:
            return found
        if len({each[1] for each in made} | {size}) > self.sizes:  # type: ignore[index]
            if not self._full:
                log.warning(
                    "compile: sizes=%d of a kind of block are compiled; what comes in another goes as without it",
                    self.sizes,
                )
            self._full = True
            return None
        if rows == MANY:
            for tensor in (x, told):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        name = "".join(letter if letter.isalnum() else "_" for letter in f"{kind.partition('(')[0]}_{len(self)}")
        made[rows, size] = torch.compile(_own(_forward, name), dynamic=False, backend=self.backend)
        return made[rows, size]


def plain(parts: Sequence[nn.Module]) -> bool:
    """Whether modules do what their classes say: no hook, no other forward pass, nothing worn, no edge that wraps."""
    return not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or "forward" in vars(part)
        or getattr(part, "worn", None)
        or any(getattr(part, "wrap", ()))
        for part in parts
    )


def compile_blocks(network: nn.Module, sizes: int = SIZES) -> Compiled:
    """Let a network's repeated blocks go through torch.compile's code, made when it is first needed.

    ValueError where that cannot be on the network's device (`why_not`).
    """
    device = next(network.parameters()).device
    if (reason := why_not(device)) is not None:
        raise ValueError(f"compile: {reason}")
    return Compiled(network, sizes)


def _forward(block: nn.Module, x: Tensor, told: Tensor) -> Tensor:
    """What is compiled; the block is a parameter, so that all blocks of a kind share it."""
    found: Tensor = block.forward(x, told)
    return found


def _own(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """The function with code of its own: torch.compile counts and looks up what it made by a function's code."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
