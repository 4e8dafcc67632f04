"""A stranger's first hour, really: a wheel, a new environment in a new folder, and what the learning pages tell to do.

    python -m docs_tools.first_hour [--with-site-packages] [--folder DIR]

Builds the wheel, installs it with what it needs by pip, draws, edits, serves, and tells the seconds of each. With
--with-site-packages the new environment sees this one's packages instead of fetching them (torch is large). Imports
nothing of sfumato: only what is in the wheel runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "LICENSES", "sfumato")
# What docs/learn says, word for word (tests/test_first_hour.py holds it).
APPLE = "apples/samples/00000.png"
COMMANDS: Mapping[str, Sequence[str]] = {
    "is all well": ("doctor",),
    "draw": ("txt2img", "--prompt", "a red apple on a white background", "--outdir", "apples"),
    "the same again, pixel for pixel": ("replay", APPLE),
    "draw over it": (
        "img2img", "--image", APPLE, "--strength", "0.6", "--prompt", "a strawberry on a blue background",
    ),
    "draw a part of it anew": (
        "inpaint", "--image", APPLE, "--mask", "mask.png", "--prompt", "a sunflower on a white background",
    ),
    "change it by words": (
        "edit", "--image", APPLE, "--prompt", "a red apple on a white background", "--to",
        "a red apple on a green background",
    ),
}  # fmt: skip
JOB = {"prompt": "a red apple", "seed": 7}
PATIENCE = 600.0  # seconds that one command may take


class Clock:
    """What was done and the seconds that it took, by the clock and of the processor, told as it happens."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    def timed(self, what: str, do: Callable[[], Any]) -> Any:
        """Do it, keep its wall seconds, tell them; returns what it returns."""
        began, used = time.perf_counter(), _processor_seconds()
        value = do()
        self.rows.append((what, time.perf_counter() - began, _processor_seconds() - used))
        self._tell(*self.rows[-1])
        return value

    def tell_sum(self) -> None:
        """The last line of the table."""
        self._tell("all", sum(row[1] for row in self.rows), sum(row[2] for row in self.rows))

    @staticmethod
    def _tell(what: str, seconds: float, of_processor: float) -> None:
        print(f"{what:36} {seconds:7.1f} s  {of_processor:7.1f} s of the processor", flush=True)


def _processor_seconds() -> float:
    """What this process and those that it waited for have used."""
    return sum(os.times()[:4])


def built(folder: Path) -> Path:
    """The wheel, built from a copy of the sources so that nothing left over in this folder gets in."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    _run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)], folder
    )
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(folder: Path, wheel: Path, with_site_packages: bool) -> Path:
    """The programs' folder of a new environment that has the wheel and what serving needs."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    if with_site_packages:
        _run([*pip, "--no-deps", str(wheel)], folder)
        (own,) = environment.glob("[Ll]ib/**/site-packages")
        # a folder named by a .pth file comes behind the environment's own, and its own .pth files, such as that of
        # an editable sfumato, are not read
        (own / "first_hour.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    else:
        _run([*pip, f"{wheel}[serve]"], folder)
    where = _run([str(programs / "python"), "-c", "import sfumato; print(sfumato.__file__)"], folder).strip()
    if environment.resolve() not in Path(where).resolve().parents:
        raise RuntimeError(f"sfumato comes from {where}, not from the wheel")
    return programs


def write_mask(path: Path, side: int = 128) -> None:
    """The mask of docs/learn/editing.md, a white square on black, as a grey PNG written by hand."""
    inside = range(side // 4, side - side // 4)
    rows = b"".join(b"\0" + bytes(255 * (x in inside and y in inside) for x in range(side)) for y in range(side))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def served(programs: Path, folder: Path, clock: Clock) -> None:
    """A server is started, asked for one picture by a client, and stopped as by Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(programs / "sfumato"), "serve", "--port", str(port), "--data", "served/"]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=_surroundings(folder), stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            clock.timed("serve: until it answers", lambda: _answering(f"{url}/v1/models", server, folder))
            picture = clock.timed("serve: one request to its picture", lambda: _asked(url))
        finally:
            server.terminate()
            clock.timed("serve: until it has stopped", lambda: server.wait(60))
    if not picture.startswith(b"\x89PNG"):
        raise RuntimeError("serve: the result is no PNG")


def _answering(url: str, server: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:  # it does not listen yet
            time.sleep(0.1)
    raise RuntimeError(f"serve: no answer; its last words: {(folder / 'serve.log').read_text()[-500:]}")


def _asked(url: str) -> bytes:
    """The bytes of the picture of a job."""

    def call(path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"{url}{path}", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    name = json.loads(call("/v1/jobs", json.dumps(JOB).encode()))["id"]
    end = time.monotonic() + PATIENCE
    while (state := json.loads(call(f"/v1/jobs/{name}")))["state"] not in ("done", "failed", "cancelled"):
        if time.monotonic() > end:
            raise RuntimeError(f"serve: the job is {state['state']} after {PATIENCE:.0f} s")
        time.sleep(0.1)
    if state["state"] != "done":
        raise RuntimeError(f"serve: the job ended as {state}")
    result = state["results"][0]
    return call(result["url"] if isinstance(result, dict) else f"/v1/results/{result}.png")


def _surroundings(folder: Path) -> dict[str, str]:
    """The environment of a stranger: nothing of ours on the path, caches and settings in the new folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SFUMATO_"))}
    return {**kept, "SFUMATO_CACHE": str(folder / "cache"), "SFUMATO_CONFIG": str(folder / "config")}


def _run(command: Sequence[str], folder: Path) -> str:
    """What a command prints; RuntimeError with its last words where it fails."""
    done = subprocess.run(
        command, cwd=folder, env=_surroundings(folder), capture_output=True, text=True, timeout=6 * PATIENCE
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Do all of it and print the table; exit code 0 where every step did what the pages say."""
    parser = argparse.ArgumentParser(prog="python -m docs_tools.first_hour", description="A stranger's first hour.")
    parser.add_argument("--with-site-packages", action="store_true", help="see this Python's packages, fetch none")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="a new folder to work in (default: one for a while)")
    args = parser.parse_args(argv)
    clock = Clock()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if args.folder is None else args.folder.absolute()
        folder.mkdir(parents=True, exist_ok=args.folder is None)
        wheel = clock.timed("build the wheel", lambda: built(folder))
        way = "install it (packages as they are)" if args.with_site_packages else "install it with all that it needs"
        programs = clock.timed(way, lambda: installed(folder, wheel, args.with_site_packages))
        clock.timed("sfumato txt2img --help", lambda: _run([str(programs / "sfumato"), "txt2img", "--help"], folder))
        write_mask(folder / "mask.png")
        for what, words in COMMANDS.items():
            clock.timed(what, partial(_run, [str(programs / "sfumato"), *words], folder))
        served(programs, folder, clock)
        clock.tell_sum()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
