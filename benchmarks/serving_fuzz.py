"""Thousands of wrong and odd requests to a server with all its doors: no fault, no crash, no growing memory.

`python -m benchmarks.serving_fuzz` sends 2,000 of them, drawn from `--seed`: pictures that are truncated, damaged,
bombs, of other types, of 1 px and of many; jobs, A1111's and OpenAI's requests with values of the wrong kind. It writes
what was answered, and the server's memory after a warm-up and each eighth of the requests, as JSON to
benchmarks/results/. Memory grows until the largest pictures that are allowed have been met, and then no more.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks.serving import RESULTS, Server
from sfumato.server.keys import Keys

WARM = 50  # requests before memory is looked at first
LIMITS = {"requests": 10**6, "pixels": 2 * 64 * 64, "steps": 4, "count": 2, "waiting": 40}
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e300, 1e308, "", "a", "auto", "64x64", "0x0", "../../x",
    "\x00", "\ud800", "é" * 3000, [], [1], {}, {"a": 1}, [[[]]], "data:image/png;base64,", "base64,%%%", "NaN",
)  # fmt: skip
FIELDS = {
    "/v1/jobs": ("prompt", "negative", "width", "height", "steps", "guidance", "sampler", "schedule", "seed", "count",
                 "eta", "options", "hires", "image", "mask", "controls", "strength", "upscale", "tile", "priority",
                 "variation_seed", "freeu", "left", "depth", "seamless", "like", "clip_skip", "model"),
    "/sdapi/v1/txt2img": ("prompt", "width", "height", "steps", "cfg_scale", "seed", "batch_size", "sampler_name",
                          "scheduler", "alwayson_scripts", "override_settings", "enable_hr", "hr_scale", "eta"),
    "/sdapi/v1/img2img": ("prompt", "width", "height", "steps", "init_images", "mask", "resize_mode", "mask_blur",
                          "inpainting_fill", "denoising_strength", "alwayson_scripts"),
    "/v1/images/generations": ("prompt", "n", "size", "quality", "style", "output_format", "seed", "steps"),
    "/sdapi/v1/extra-single-image": ("image", "upscaling_resize", "upscaler_1", "resize_mode", "upscaling_resize_w"),
    "/controlnet/detect": ("controlnet_module", "controlnet_input_images", "controlnet_processor_res"),
    "/sdapi/v1/options": ("CLIP_stop_at_last_layers", "eta_noise_seed_delta", "sd_model_checkpoint"),
}  # fmt: skip
SMALL = {"/v1/jobs": {"prompt": "a", "steps": 1}, "/v1/images/generations": {"prompt": "a", "steps": 1, "n": 1}}
SMALL |= {
    f"/sdapi/v1/{name}": {"prompt": "a", "steps": 1, "width": 64, "height": 64} for name in ("txt2img", "img2img")
}
LOOKS = ("/v1/jobs", "/v1/jobs/{}", "/v1/results/{}.png", "/v1/models", "/sdapi/v1/progress", "/v1/jobs/{}/events",
         "/metrics", "/sdapi/v1/samplers", "/controlnet/module_list", "/openapi.json")  # fmt: skip


def encoded(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A flat picture as a file."""
    written = io.BytesIO()
    Image.new(mode, size).save(written, kind)
    return written.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    chunk = struct.pack(">I4s", len(data), b"IDAT") + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return encoded((1, 1))[:12] + header + struct.pack(">I", zlib.crc32(header)) + chunk


def pictures(chance: random.Random) -> dict[str, Callable[[], bytes]]:
    """What is sent as a picture, by its kind."""
    sides = [(1, 1), (1, 64), (64, 64), (64, 48), (3, 2000)]

    def good() -> bytes:
        return encoded(chance.choice(sides), chance.choice(("PNG", "JPEG", "WEBP")))

    def damaged() -> bytes:
        content = bytearray(good())
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content)

    def truncated() -> bytes:
        content = good()
        return content[: chance.randrange(len(content))]

    return {
        "good": good, "damaged": damaged, "truncated": truncated, "noise": lambda: chance.randbytes(500),
        "bomb": lambda: bomb(*chance.choice(((60_000, 60_000), (2**31 - 1, 1), (7000, 7000)))),
        "large": lambda: encoded((4000, 4000)), "too large": lambda: bytes(50 * 2**20),
        "one pixel": lambda: encoded((1, 1), "PNG", chance.choice(("L", "LA", "RGBA", "P", "I;16", "1"))),
        "other": lambda: chance.choice((b"", b"GIF89a", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF", b"II*\0")),
    }  # fmt: skip


class Fuzz:
    """Sends requests, and keeps what was answered: by kind and status, and every fault with what had been sent."""

    def __init__(self, http: httpx.Client, chance: random.Random) -> None:
        self.http, self.chance = http, chance
        self.pictures = pictures(chance)
        self.statuses: Counter[str] = Counter()
        self.faults: list[dict[str, str]] = []
        self.lost = 0  # requests that no answer came to

    def picture(self) -> tuple[str, bytes]:
        """A picture of some kind; the very large ones are rare."""
        weights = [0.2 if kind in ("large", "too large") else 2.0 for kind in self.pictures]
        [kind] = self.chance.choices(list(self.pictures), weights)
        return kind, self.pictures[kind]()

    def one(self) -> None:
        """One request."""
        act = self.chance.choice((self.body, self.body, self.body, self.file, self.inline, self.look))
        what, send = act()
        try:
            answer = send()
        except httpx.TransportError as error:
            self.lost += 1
            self.faults.append({"what": what, "said": repr(error)})
            return
        self.statuses[str(answer.status_code)] += 1
        waits = answer.status_code == 503 and "retry-after" in answer.headers
        if answer.status_code >= 500 and not waits:
            self.faults.append({"what": what, "said": f"{answer.status_code} {answer.text[:300]}"})

    def body(self) -> tuple[str, Callable[[], httpx.Response]]:
        """A JSON body with some fields of odd values."""
        path = self.chance.choice(list(FIELDS))
        names = self.chance.sample(FIELDS[path], self.chance.randint(0, 3))
        said = {**SMALL.get(path, {}), **{name: self.chance.choice(ODD) for name in names}}
        return self.json(path, said)

    def inline(self) -> tuple[str, Callable[[], httpx.Response]]:
        """A picture in base64 inside a body."""
        kind, content = self.picture()
        text = base64.b64encode(content).decode("ascii")
        unit = {"image": text, "model": "x", "module": "canny"}
        path, said = self.chance.choice((
            ("/sdapi/v1/png-info", {"image": text}), ("/sdapi/v1/extra-single-image", {"image": text}),
            ("/sdapi/v1/img2img", {"init_images": [text], **SMALL["/sdapi/v1/img2img"]}),
            ("/controlnet/detect", {"controlnet_input_images": [text], "controlnet_module": "canny"}),
            ("/v1/jobs", {"prompt": "a", "steps": 2, "image": f"base64,{text}", "strength": 0.5}),
            ("/sdapi/v1/txt2img", {"prompt": "a", "alwayson_scripts": {"ControlNet": {"args": [unit]}}}),
        ))  # fmt: skip
        what, send = self.json(path, said)
        return f"{path} {kind}" if len(content) > 2000 else what, send

    def file(self) -> tuple[str, Callable[[], httpx.Response]]:
        """A picture as a file."""
        kind, content = self.picture()
        if self.chance.random() < 0.5:
            return f"/v1/pictures {kind}", lambda: self.http.post("/v1/pictures", content=content)
        path = self.chance.choice(("/v1/images/edits", "/v1/images/variations"))
        files = {"image": ("a", content), **({"mask": ("b", self.picture()[1])} if self.chance.random() < 0.4 else {})}
        return f"{path} {kind}", lambda: self.http.post(path, data={"prompt": "a", "steps": "2"}, files=files)

    def look(self) -> tuple[str, Callable[[], httpx.Response]]:
        """Something that is read, mostly not there."""
        name = self.chance.choice(("%00", "a" * 64, "..%2fqueue.db", "0" * 32, "é"))
        path = self.chance.choice(LOOKS).format(name)
        return path, lambda: self.http.get(path)

    def json(self, path: str, said: dict[str, Any]) -> tuple[str, Callable[[], httpx.Response]]:
        """A request with a JSON body, any text and number in it."""
        content = json.dumps(said).encode("ascii")
        headers = {"content-type": "application/json"}
        return f"{path} {content[:300]!r}", lambda: self.http.post(path, content=content, headers=headers)


def memory(pid: int) -> float:
    """What a process has in memory, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


def fuzzed(server: Server, count: int, seed: int) -> dict[str, Any]:
    """What `count` requests to a server do to it; the server is started and ended."""
    key = Keys(server.data / "keys.json").add("fuzz", **LIMITS)
    server.start()
    process = server._process
    assert process is not None
    rss: list[float] = []  # after the warm-up, then after each eighth
    began = time.perf_counter()
    with httpx.Client(base_url=server.url, timeout=120, headers={"Authorization": f"Bearer {key}"}) as http:
        fuzz = Fuzz(http, random.Random(seed))
        for number in range(count):
            if number == WARM or (number > WARM and number % max(1, count // 8) == 0):
                rss.append(memory(process.pid))
            fuzz.one()
            if process.poll() is not None:
                break
        seconds = time.perf_counter() - began
        crashed = process.poll() is not None
        if not crashed:
            rss.append(memory(process.pid))
            crashed = http.get("/readyz").status_code != 200
    return {
        "requests": sum(fuzz.statuses.values()) + fuzz.lost, "statuses": dict(sorted(fuzz.statuses.items())),
        "5xx": sum(number for status, number in fuzz.statuses.items() if status >= "500"), "unanswered": fuzz.lost,
        "crashed": crashed, "faults": fuzz.faults, "MiB": rss, "seconds": round(seconds, 1), "seed": seed,
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", help="another model than the one in the box")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    flags = ["--device", "cpu", "--no-page", *(["--ckpt", args.ckpt] if args.ckpt else [])]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "data", flags)
        try:
            found = fuzzed(server, args.requests, args.seed)
        finally:
            server.stop()
    found |= {"machine": platform.machine(), "python": platform.python_version(), "date": date.today().isoformat()}
    out = args.out or RESULTS / f"serving_fuzz-{date.today().isoformat()}.json"
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in found.items() if name != "faults"}))
    for fault in found["faults"][:20]:
        print(fault)
    print(out)


if __name__ == "__main__":
    main()
