"""The package's C++ files as one shared library: compiled when a hastened layer first needs it, kept in a cache folder.

Owns when and how they are compiled, and loading. Where that cannot be, there is no library, one line of the log says
why, and PyTorch computes as it does without: no compiler, another processor, SFUMATO_KERNELS=0. Knows nothing of what
the functions do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VARIABLE = "SFUMATO_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 180  # that a compiler may take
PROCESSORS = ("x86_64", "AMD64", "aarch64", "arm64")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp")

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Missing(Exception):
    """There is no library; the message says why."""


@dataclass
class _Found:
    """What a process found, once it looked."""

    looked: bool = False
    library: ctypes.CDLL | None = None
    why: str = ""


_found = _Found()


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there are none. The first call may compile, which takes seconds."""
    if not _found.looked:
        with _lock:
            if not _found.looked:
                try:
                    _found.library = _made()
                except Missing as reason:
                    _found.why = str(reason)
                    _log.info("no compiled kernels: %s; PyTorch's own are used", reason)
                _found.looked = True
    return _found.library


def passes(name: str, forward: Sequence[Any], backward: Sequence[Any]) -> tuple[Any, Any] | None:
    """The functions NAME and NAME_backward with their arguments' types, returning nothing; None without a library."""
    found = library()
    if found is None:
        return None
    functions = getattr(found, name), getattr(found, f"{name}_backward")
    for function, types in zip(functions, (forward, backward), strict=True):
        function.argtypes, function.restype = list(types), None
    return functions


def state() -> str:
    """Whether there are compiled kernels, or why not, in words; compiles nothing."""
    if _found.looked:
        return "compiled" if _found.library else f"none: {_found.why}"
    try:
        _allowed()
        found = [command for command in _commands() if shutil.which(command[0])]
        if not found:
            raise Missing(_no_compiler())
        there = [path for command in found if (path := _place(command)).is_file()]
    except Missing as reason:
        return f"none: {reason}"
    return f"compiled ({there[0]})" if there else f"compiled when first needed, by {found[0][0]}"


def _made() -> ctypes.CDLL:
    """The library, compiled now or before; Missing where it cannot be."""
    _allowed()
    commands = [command for command in _commands() if shutil.which(command[0])]
    reasons = []
    for command in commands:
        try:
            path = _place(command)
            if not path.is_file():
                _compile(command, path)
            return _loaded(command, path)
        except Missing as reason:
            reasons.append(str(reason))
    raise Missing("; ".join(reasons) or _no_compiler())


def _allowed() -> None:
    if os.environ.get(VARIABLE, "1") == "0":
        raise Missing(f"{VARIABLE}=0 says so")
    if sys.platform == "win32":
        raise Missing("not on Windows")
    if platform.machine() not in PROCESSORS:
        raise Missing(f"not for processors of the kind {platform.machine()}")


def _commands() -> list[list[str]]:
    said = os.environ.get("CXX")
    return [shlex.split(said)] if said and shlex.split(said) else [[name] for name in COMPILERS]


def _no_compiler() -> str:
    said = os.environ.get("CXX")
    return f"$CXX={said} is no command" if said else f"no C++ compiler ({', '.join(COMPILERS)})"


def sources() -> list[Path]:
    """The package's C++ files."""
    return sorted(Path(__file__).parent.glob("*.cpp"))


def flags() -> list[str]:
    """What the compiler is told: the instructions that PyTorch uses here, so that ATEN_CPU_CAPABILITY counts."""
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    if native == ["-march=native"]:
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        native.append("-mprefer-vector-width=512" if wide else "-mno-avx512f")
    return [*FLAGS, *native]


def _openmp() -> Path:
    """The OpenMP library that PyTorch has loaded: linked against that very file, there is one pool of threads."""
    lib = Path(torch.__file__).parent
    folders = (lib / "lib", lib.parent / "torch.libs")
    kinds = "gomp", "omp", "iomp5"
    found = [path for folder in folders for kind in kinds for path in folder.glob(f"lib{kind}[-.]*")]
    if not found:
        raise Missing("PyTorch brings no OpenMP library to share")
    return found[0]


def _place(command: list[str]) -> Path:
    """Where the library lies, or would: its name tells sources, compiler, flags and processor."""
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{command[0]} --version: {error}") from None
    told = hashlib.sha256(version)
    for part in (*command, *flags(), str(_openmp()), torch.__version__, platform.machine(), _processor()):
        told.update(part.encode() + b"\0")
    for source in sorted([*sources(), *Path(__file__).parent.glob("*.h")]):
        told.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sfumato" / "kernels" / f"{told.hexdigest()[:32]}.so"


def _processor() -> str:
    """What instructions the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], path: Path) -> None:
    """Compile into a file beside `path`, then rename it: who looks sees all of it or nothing."""
    began = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem[:8]}-") as folder:
            objects = []
            for source in sources():
                objects.append(str(Path(folder) / f"{source.stem}.o"))
                _run([*command, *flags(), "-c", str(source), "-o", objects[-1]])
            made = Path(folder) / path.name
            missing = [] if sys.platform == "darwin" else ["-Wl,-z,defs"]
            _run([*command, "-shared", *missing, *objects, str(_openmp()), "-lm", "-o", str(made)])
            made.replace(path)
    except OSError as error:
        raise Missing(f"{path.parent}: {error}") from None
    _log.info("compiled kernels with %s in %.1f s: %s", command[0], time.perf_counter() - began, path)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error: " in line] or [f"exit status {error.returncode}"]
        raise Missing(f"{command[0]} failed: {lines[0]}") from None
    except subprocess.TimeoutExpired:
        raise Missing(f"{command[0]} took longer than {SECONDS} s") from None


def _loaded(command: list[str], path: Path) -> ctypes.CDLL:
    """The library at `path`; one that cannot be loaded, as a damaged one, is compiled once more."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Missing(f"{path}: {error}") from None
