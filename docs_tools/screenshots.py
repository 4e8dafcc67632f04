"""The pictures of the web page and of a terminal in the documents: really the program's, with the box.

    python -m docs_tools.screenshots [--out docs] [web-page] [terminal]

The page is looked at through Chromium (playwright), the terminal's text is what the commands print, set by Pillow in
the type that comes with matplotlib. Takes some minutes. Imports nothing of sfumato.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
DRAWN = (
    "a green car on a white background", "a cartoon of a house, yellow background", "a purple butterfly",
    "a flat design of a rocket, orange background", "3d octopus on a blue background", "a sunflower",
    "a banana and a red apple on a white background", "a cat on a pink background",
)  # fmt: skip
PROMPT, STEPS, SHOWN_AT = "a red apple on a blue background", 40, 12
SIZE: Any = {"width": 1280, "height": 853}  # pixels of the window
SHOWN = (900, 600)  # and of its picture
TERMINAL = (
    'sfumato txt2img --prompt "3d octopus on a blue background" --count 4',
    "sfumato replay outputs/txt2img-samples/samples/00000.png",
    'sfumato txt2img --prompt "a cat" --sampler eulr',
    'sfumato txt2img --prompt "a cat" --width 100',
    "sfumato inspect outputs/nothing.safetensors",
)
GROUND, TEXT, PROMPTED, WRONG = (24, 24, 28), (222, 222, 222), (125, 205, 140), (240, 140, 120)
COLUMNS, TYPE = 96, 15  # letters of a line, pixels of their height


def command(*words: str) -> list[str]:
    """The command line of this environment's program."""
    return [sys.executable, "-m", "sfumato.cli.main", *words]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server with the box, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command("serve", "--port", str(port), "--data", str(folder / "served"), "--device", "cpu")
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(lambda: _answers(f"{url}/v1/models"), "the server")
            yield url
        finally:
            server.terminate()
            server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:  # it does not listen yet
        return False


def _wait(is_so: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not ready after {seconds:.0f} s")
        time.sleep(0.1)


def _call(url: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"})) as answer:
        return json.loads(answer.read())


def web_page(out: Path) -> None:
    """web-page.png while it draws, web-page-results.png with pictures drawn before, in the dark."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary)) as url, sync_playwright() as engine:
        jobs = [_call(f"{url}/v1/jobs", {"prompt": prompt, "seed": 4}) for prompt in DRAWN]
        for job in jobs:
            _wait(lambda job=job: _call(f"{url}/v1/jobs/{job['id']}")["state"] == "done", job["id"])  # type: ignore[misc]
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(120_000)
        page.goto(f"{url}/page/")
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_label("Steps").first.fill(str(STEPS))
        page.get_by_text("Advanced", exact=True).click()
        page.locator("#prompt textarea").fill(PROMPT)
        page.locator("#prompt textarea").press("Control+Enter")
        page.get_by_text(re.compile(rf"step {SHOWN_AT} of {STEPS}")).first.wait_for()
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=out / "web-page.png")
        page.locator("#message", has_text="drawn in").wait_for()
        page.get_by_text("◐").click()
        page.get_by_role("tab", name="Results").click()
        page.locator("#found img, .grid-container img").nth(len(DRAWN)).wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=out / "web-page-results.png")
        browser.close()
    for name in ("web-page.png", "web-page-results.png"):
        _small(out / name)


def terminal(out: Path) -> None:
    """terminal.png: what a person types, and what the program says."""
    lines: list[tuple[str, tuple[int, int, int]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for typed in TERMINAL:
            words = command(*shlex.split(typed)[1:])
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            if lines:
                lines.append(("", TEXT))
            lines.append((f"$ {typed}", PROMPTED))
            lines += [(line, WRONG if "error:" in line else TEXT) for line in (done.stderr + done.stdout).splitlines()]
    _set(lines).save(out / "terminal.png", optimize=True)


def _set(lines: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """Lines of text and their colours as a picture of a terminal; long lines go on in the next."""
    import matplotlib

    type_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    letters = ImageFont.truetype(str(type_file), TYPE)
    rows = [
        (text[start : start + COLUMNS], colour) for text, colour in lines for start in range(0, len(text) or 1, COLUMNS)
    ]
    width, height = letters.getlength("m"), TYPE + 6
    picture = Image.new("RGB", (round(COLUMNS * width) + 32, len(rows) * height + 32), GROUND)
    draw = ImageDraw.Draw(picture)
    for row, (text, colour) in enumerate(rows):
        draw.text((16, 16 + row * height), text, colour, font=letters)
    return picture.quantize(32, dither=Image.Dither.NONE)


def _small(path: Path) -> None:
    """The picture of a window at the size of a page's column, in 256 colours."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").resize(SHOWN, Image.Resampling.LANCZOS).quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


SHOTS: Mapping[str, Callable[[Path], None]] = {"web-page": web_page, "terminal": terminal}


def main(argv: Sequence[str] | None = None) -> int:
    """Take the named pictures, or all."""
    parser = argparse.ArgumentParser(prog="python -m docs_tools.screenshots", description="Pictures of the program.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SHOTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.names or SHOTS:
        if name not in SHOTS:
            parser.error(f"name={name!r}: one of {', '.join(SHOTS)}")
        SHOTS[name](args.out)
        print(f"{name}: done")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
