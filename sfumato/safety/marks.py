"""Marks in pictures, by either method: a text put in, and the text found again. Letters: H W pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.safety import dwtdct

TEXT = dwtdct.TEXT
METHODS = ("dwtdct", "strong")


@dataclass(frozen=True)
class Mark:
    """A text and how it is written. ValueError where the method is not known or the text cannot be written."""

    text: str = TEXT
    method: str = "dwtdct"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"watermark_method={self.method!r}: one of {', '.join(METHODS)}")
        if not self.text or not self.text.isprintable():
            raise ValueError(f"watermark={self.text!r}: a text of one line is needed")
        if self.method == "strong":
            from sfumato.safety.strong import MAX_LENGTH  # here, for it loads SciPy, and few ask for it

            if len(self.data) > MAX_LENGTH:
                raise ValueError(f"watermark={self.text!r}: {len(self.data)} bytes; {MAX_LENGTH} are allowed")

    @property
    def data(self) -> bytes:
        return self.text.encode()


def marked(pixels: np.ndarray, mark: Mark) -> np.ndarray:
    """pixels (H, W, 3) uint8 with a mark; ValueError where the picture is too small for it."""
    if mark.method == "strong":
        from sfumato.safety import strong

        return strong.write(pixels, mark.data)
    return dwtdct.write(pixels, mark.data)


def check_room(mark: Mark, height: int, width: int) -> None:
    """ValueError where a picture of this size in px has no room for a mark; nothing is written."""
    shortest = 0
    if mark.method == "strong":
        from sfumato.safety.strong import SHORTEST_SIDE as shortest
    if height * width < dwtdct.SMALLEST or min(height, width) < shortest:
        side = f", {shortest} or more on either side" if shortest else ""
        raise ValueError(f"watermark: a picture of {width} x {height} px; 256 x 256 or as many are needed{side}")
    room = (height // 8) * (width // 8) // 8
    if mark.method == "dwtdct" and len(mark.data) > room:
        raise ValueError(f"watermark: {len(mark.data)} bytes; a picture of {width} x {height} px holds {room}")


def found(pixels: np.ndarray, method: str | None = None, length: int = len(TEXT)) -> Mark | None:
    """The mark in pixels (H, W, 3) uint8, the strong one looked for first; None where there is none.

    `dwtdct` needs the text's `length` in bytes and has no check sum: what is printable text counts as found, of 17
    random bytes less than one in ten million.
    """
    if method not in (None, *METHODS):
        raise ValueError(f"method={method!r}: one of {', '.join(METHODS)}")
    from sfumato.safety import strong

    dwtdct.check_size(pixels)
    for each in METHODS[::-1] if method is None else (method,):
        data = strong.find(pixels) if each == "strong" else dwtdct.read(pixels, length)
        text = _text(data)
        if text is not None:
            return Mark(text, each)
    return None


def _text(data: bytes | None) -> str | None:
    """Printable text, or None."""
    try:
        text = (data or b"").decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None
