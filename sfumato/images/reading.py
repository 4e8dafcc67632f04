"""Any picture a person hands us, read whole, upright and in 8 bits of sRGB; or one clear line why not.

Knows no recipe and no model. Letters: H W pixels.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

log = logging.getLogger(__name__)

MAX_PIXELS = 170_000_000  # Pillow refuses to open more than 179 million

# Pictures of pixels only: EPS would start another program, and the scientific kinds have no known white.
KINDS = (
    *("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "TGA", "PPM", "ICO", "JPEG2000", "PSD", "QOI"),
    *("PCX", "SGI", "DDS"),
)

TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")  # its files begin with no mark: without the name, anything may be one

# What Pillow's readers are known to raise on damaged files.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError),
    *(OverflowError, RuntimeError, Image.DecompressionBombError),
)

# EXIF 2.32, 4.6.4 A, Orientation: how the stored picture is turned to stand upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SIGNATURES = (  # of kinds that are read, so that a damaged one is called damaged
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
)

PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # ICC.1:2022, table 19, data colour spaces
BLACK_POINT_COMPENSATION = 0x2000  # lcms2.h


def read_picture(path: str | Path, field: str = "image") -> Picture:
    """The picture of a file: the first frame, turned as its EXIF says, in sRGB as its ICC profile says.

    16 bits become 8 by value / 257, floats by 255 * value. A second frame, and a profile that does not work, are
    logged and left out. ValueError names `field`, the path and what is wrong with it, in one line.
    """
    where = f"{field}={str(path)!r}"
    file = _file_of(path, where)
    try:
        image = _first_frame(file, where)
    except DAMAGE as error:
        if isinstance(error, _Refusal):
            raise
        raise ValueError(f"{where}: {_reason(file, error)}") from error
    image = _eight_bits(image, where)
    alpha = _alpha_of(image)
    return Picture(_srgb(_without_alpha(image), image.info.get("icc_profile"), where), alpha)


def read_mask(path: str | Path, field: str = "mask") -> np.ndarray:
    """The mask of a file, (H, W) float32 in [0, 1]: 1 is drawn anew. As `mask_of`; ValueError as in `read_picture`."""
    return mask_of(read_picture(path, field))


def mask_of(picture: Picture) -> np.ndarray:
    """A picture as a mask, (H, W) float32 in [0, 1]: its luminance (ITU-R 601-2), times its alpha where it has one.

    Painting programs save strokes on an empty layer: where all that is seen has one colour and the alpha varies,
    the alpha alone is the mask, whatever that colour is.
    """
    light = np.asarray(Image.fromarray(picture.pixels).convert("L"), dtype=np.float32) / 255
    if picture.alpha is None:
        return light
    alpha = picture.alpha.astype(np.float32) / 255
    seen = picture.pixels[picture.alpha > 0]
    if len(seen) and bool((seen == seen[0]).all()) and int(picture.alpha.min()) < int(picture.alpha.max()):
        return alpha
    return light * alpha


def _file_of(path: str | Path, where: str) -> Path:
    """The path of a file that can be opened and is not empty."""
    if str(path).lower().startswith(("http:", "https:", "ftp:", "data:")):
        raise _Refusal(f"{where}: only files are read, no addresses; download it first")
    file = Path(path)
    try:
        if not file.is_file():
            raise _Refusal(f"{where}: {'a folder' if file.is_dir() else 'no such file'}")
        with file.open("rb") as opened:
            if not opened.read(1):
                raise _Refusal(f"{where}: the file is empty")
    except OSError as error:
        raise _Refusal(f"{where}: it cannot be opened ({error.strerror})") from error
    except ValueError as error:  # a zero byte in the name
        if isinstance(error, _Refusal):
            raise
        raise _Refusal(f"{where}: no such file") from error
    return file


def _first_frame(file: Path, where: str) -> Image.Image:
    """The first frame, decoded to its end and turned upright."""
    Image.init()
    unsure = set() if file.suffix.lower() in TGA_SUFFIXES else {"TGA"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of the size, checked below, and of tags not used here
        with Image.open(file, formats=[kind for kind in KINDS if kind in Image.OPEN and kind not in unsure]) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _Refusal(f"{where}: {opened.width}x{opened.height} pixels; at most {MAX_PIXELS} are read")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # in an MPO the others are previews or the other eye
                log.warning("%s: the first of its %d frames is read", where, frames)
            opened.load()
            turn = TURNS.get(_orientation(opened, where))
            return opened.copy() if turn is None else opened.transpose(turn)


def _orientation(image: Image.Image, where: str) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF data are damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except DAMAGE as error:
        log.warning("%s: its EXIF data are damaged and ignored (%s)", where, _line(error))
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image, where: str) -> Image.Image:
    """Grey pictures of 16 bits and of floats as mode L, everything else as it is; `info` is kept."""
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also where there are NaN
            raise _Refusal(f"{where}: floats from {low:g} to {high:g}; only 0 to 1 are understood")
        grey = np.rint(values * 255)
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise _Refusal(f"{where}: whole numbers from {low} to {high}; only 0 to 65535 are understood")
        grey = np.rint(values / 257)
        key = image.info.get("transparency")
    else:
        return image
    plain = Image.fromarray(grey.astype(np.uint8))
    plain.info = {key: value for key, value in image.info.items() if key != "transparency"}
    if image.mode != "F" and isinstance(key, int):  # one of 65536 greys is see-through
        seen = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        merged = Image.merge("LA", (plain, seen))
        merged.info = plain.info
        return merged
    return plain


def _alpha_of(image: Image.Image) -> np.ndarray | None:
    """Alpha (H, W) uint8, or None where all is opaque."""
    if not image.has_transparency_data:
        return None
    if image.mode == "La":
        image = image.convert("LA")
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return None if bool((alpha == 255).all()) else alpha.copy()


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours alone, in one of the modes L, RGB, CMYK and LAB."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return (image.convert("LA") if image.mode == "La" else image).convert("L")
    return (image.convert("RGBA") if image.mode in ("P", "PA", "RGBa") else image).convert("RGB")


def _srgb(image: Image.Image, profile: bytes | None, where: str) -> np.ndarray:
    """A picture of mode L, RGB, CMYK or LAB -> (H, W, 3) uint8 in sRGB, through its ICC profile if that works.

    A profile that is sRGB to within one level leaves the pixels as they are. Relative colorimetric, with
    compensation of the black point, as painting programs do it.
    """
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = PROFILE_MODES.get(source.profile.xcolor_space.strip())
            if mode == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            if mode == image.mode:
                return _through(image, source)
            log.warning("%s: its colour profile is for other colours (%s) and ignored", where, mode)
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("%s: its colour profile is damaged and ignored (%s)", where, _line(error))
    if image.mode == "LAB":
        return _through(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    return np.asarray(image.convert("RGB")).copy()


def _through(image: Image.Image, source: ImageCms.ImageCmsProfile) -> np.ndarray:
    """A picture in the colours of `source` -> (H, W, 3) uint8 in sRGB."""
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.buildTransform(
        *(source, target, image.mode, "RGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=BLACK_POINT_COMPENSATION,  # type: ignore[arg-type]  # ImageCms.Flags came with Pillow 10.3
    )
    if image.mode in ("L", "RGB"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(lattice if image.mode == "RGB" else levels[None])
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= 1:
            return np.asarray(image.convert("RGB")).copy()
    plain = image.copy()
    plain.info = {}  # lcms would write its profile there
    return np.asarray(ImageCms.applyTransform(plain, transform)).copy()


def _reason(file: Path, error: BaseException) -> str:
    """Why a file could not be read, in a few words."""
    with file.open("rb") as opened:
        head = opened.read(32)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        return "HEIC pictures are not read; save it as JPEG or PNG"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
            return "an AVIF that is damaged or that this Pillow does not read"
        for signature, kind in SIGNATURES:
            if head.startswith(signature):
                return f"a {kind} that is damaged or of an unusual kind"
        return "not a picture, or of a kind that is not read (PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF and a few more are)"
    return f"it is damaged or cut short ({_line(error)})"


def _line(error: BaseException) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _Refusal(ValueError):
    """A reason already told in full."""


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3) uint8, upright, sRGB; alpha (H, W) uint8 where not all is opaque, its colours not multiplied.

    `sha256` is of the size and the pixels with alpha: the same for the same picture in another file format.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the shape, the pixels and the alpha: what the picture shows, not its file."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        if self.alpha is not None:
            digest.update(np.ascontiguousarray(self.alpha).data)
        return digest.hexdigest()
