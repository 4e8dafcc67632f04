"""Pictures of every kind that a person may hand us, made with Pillow: known pixels in, the same pixels out."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from sfumato.images import reading
from sfumato.images.reading import Picture, mask_of, read_mask, read_picture

W, H = 24, 16


def colours(height=H, width=W):
    """(H, W, 3) uint8, each pixel its own colour, smooth enough for lossy formats."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 128 // (width - 1)], axis=-1).astype(
        np.uint8
    )


def saved(tmp_path, image, name="picture.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def close(got, wanted, tolerance):
    return np.abs(got.astype(int) - np.asarray(wanted).astype(int)).max() <= tolerance


def refused(path, *words, field="image"):
    """The one line of a refusal, which names the field and the path."""
    with pytest.raises(ValueError) as caught:
        read_picture(path, field)
    line = str(caught.value)
    assert line.startswith(f"{field}={str(path)!r}: ") and "\n" not in line
    for word in words:
        assert word in line
    return line


# --- kinds of files


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("a.tga", {}),
        ("a.ppm", {}),
        ("a.jp2", {"irreversible": False}),
    ],
)
def test_lossless_kinds_are_exact(tmp_path, name, options):
    picture = read_picture(saved(tmp_path, Image.fromarray(colours()), name, **options))
    assert np.array_equal(picture.pixels, colours())
    assert picture.pixels.dtype == np.uint8 and picture.alpha is None
    assert picture.sha256 == Picture(colours()).sha256


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.avif"])
def test_lossy_kinds_are_close(tmp_path, name):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture = read_picture(saved(tmp_path, Image.fromarray(colours()), name, quality=95))
    assert np.abs(picture.pixels.astype(int) - colours()).mean() < 4


def test_the_name_does_not_matter(tmp_path):
    path = saved(tmp_path, Image.fromarray(colours()), "a.png")
    path = path.rename(tmp_path / "a.jpg")
    assert np.array_equal(read_picture(str(path)).pixels, colours())


def test_pixels_can_be_written_to(tmp_path):
    picture = read_picture(saved(tmp_path, Image.fromarray(colours())))
    picture.pixels[0, 0] = 7
    assert (picture.pixels[0, 0] == 7).all()


# --- orientation


def stored(upright, orientation):
    """How a camera that writes this orientation would have stored the picture (EXIF 2.32, 4.6.4 A)."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[:, ::-1].transpose(1, 0, 2),  # row 0 is the right side, column 0 the top
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation](upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_exif_orientation(tmp_path, orientation, name):
    upright = colours()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = stored(upright, orientation)
    if orientation == 6:  # spelled out: first stored row is the right side read from the top
        assert np.array_equal(turned[0], upright[:, -1])
    if orientation == 8:
        assert np.array_equal(turned[0], upright[::-1, 0])
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), name, exif=exif, **options)
    assert np.array_equal(read_picture(path).pixels, upright)


def test_orientation_of_a_jpeg_and_of_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(colours()), "a.jpg", exif=exif, quality=95)
    assert read_picture(path).pixels.shape == (W, H, 3)
    grey = np.arange(H * W, dtype=np.uint16).reshape(H, W) * 100
    path = saved(tmp_path, Image.fromarray(grey), "a.png", exif=exif)
    assert np.array_equal(read_picture(path).pixels[..., 0], np.rint(grey[::-1].T / 257))


@pytest.mark.parametrize("orientation", [0, 9, 4711])
def test_an_orientation_that_is_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_picture(saved(tmp_path, Image.fromarray(colours()), exif=exif)).pixels, colours())


def test_damaged_exif_is_left_out(tmp_path):
    jpeg = saved(tmp_path, Image.fromarray(colours()), "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(9))
    assert read_picture(jpeg).pixels.shape == (H, W, 3)


# --- modes


def test_grey_and_one_bit(tmp_path):
    grey = colours()[..., 0]
    pixels = read_picture(saved(tmp_path, Image.fromarray(grey))).pixels
    assert all(np.array_equal(pixels[..., c], grey) for c in range(3))
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    assert np.array_equal(read_picture(saved(tmp_path, bits)).pixels[..., 1], np.where(grey > 100, 255, 0))


def test_alpha_of_every_mode(tmp_path):
    alpha = (colours()[..., 0] // 2 + 40).astype(np.uint8)
    rgba = np.dstack([colours(), alpha])
    picture = read_picture(saved(tmp_path, Image.fromarray(rgba)))
    assert np.array_equal(picture.pixels, colours()) and np.array_equal(picture.alpha, alpha)
    la = Image.fromarray(rgba[..., 2:])
    assert la.mode == "LA"
    picture = read_picture(saved(tmp_path, la))
    assert np.array_equal(picture.pixels[..., 0], colours()[..., 2]) and np.array_equal(picture.alpha, alpha)


def test_opaque_alpha_is_none(tmp_path):
    rgba = np.dstack([colours(), np.full((H, W), 255, np.uint8)])
    picture = read_picture(saved(tmp_path, Image.fromarray(rgba)))
    assert picture.alpha is None and picture.sha256 == Picture(colours()).sha256


def test_transparency_tells_pictures_apart():
    some = np.full((H, W), 255, np.uint8)
    some[0, 0] = 0
    assert Picture(colours(), some).sha256 != Picture(colours()).sha256


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_with_transparency(tmp_path, name):
    image = Image.fromarray((np.arange(H * W).reshape(H, W) % 3).astype(np.uint8), "L").copy()
    image = image.convert("P")
    image.putdata([i % 3 for i in range(H * W)])
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture = read_picture(saved(tmp_path, image, name, transparency=1))
    index = np.arange(H * W).reshape(H, W) % 3
    assert np.array_equal(picture.alpha, np.where(index == 1, 0, 255))
    assert (picture.pixels[index == 0] == (255, 0, 0)).all() and (picture.pixels[index == 2] == (10, 20, 30)).all()


def test_palette_with_alpha_of_each_colour(tmp_path):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    picture = read_picture(saved(tmp_path, image, transparency=bytes([0, 100, 255])))
    assert picture.alpha.tolist() == [[0, 100, 255]]
    assert picture.pixels.tolist() == [[[255, 0, 0], [0, 255, 0], [10, 20, 30]]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_transparent_colour(tmp_path, mode):
    array = colours() if mode == "RGB" else colours()[..., 0]
    key = (0, 0, 255) if mode == "RGB" else 0
    picture = read_picture(saved(tmp_path, Image.fromarray(array), transparency=key))
    wanted = (array == key).all(-1) if mode == "RGB" else array == key
    assert wanted.any() and np.array_equal(picture.alpha == 0, wanted)


def test_multiplied_alpha(tmp_path):
    """TIFF 6.0, ExtraSamples 1: colours that were multiplied by alpha."""
    rgba = np.dstack([np.full((H, W, 3), 100, np.uint8), np.full((H, W), 128, np.uint8)])
    path = saved(tmp_path, Image.fromarray(rgba), "a.tif")
    entry = struct.Struct("<HHIH")
    data = path.read_bytes()
    assert data.count(entry.pack(338, 3, 1, 2)) == 1  # what Pillow writes: not multiplied
    path.write_bytes(data.replace(entry.pack(338, 3, 1, 2), entry.pack(338, 3, 1, 1)))
    picture = read_picture(path)
    assert close(picture.pixels, np.full((H, W, 3), 200), 1) and (picture.alpha == 128).all()


# --- more than 8 bits


def png16(path, values, colour_type):
    """A PNG of 16 bits, written chunk by chunk: values (H, W, C) uint16."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )
    return path


GREYS16 = np.linspace(0, 65535, H * W).round().astype(np.uint16).reshape(H, W)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    picture = read_picture(png16(tmp_path / "a.png", GREYS16[..., None], 0))
    assert np.array_equal(picture.pixels[..., 0], np.rint(GREYS16 / 257)) and picture.alpha is None
    assert picture.pixels.max() == 255 and np.unique(picture.pixels).size > 200


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bit_tiff_of_both_byte_orders(tmp_path, byte_order):
    order = "<" if byte_order == "<u2" else ">"
    data = GREYS16.astype(byte_order).tobytes()
    entries = [(256, W), (257, H), (258, 16), (259, 1), (262, 1), (273, 0), (277, 1), (278, H), (279, len(data))]
    start = 8 + 2 + 12 * len(entries) + 4
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, value in entries:
        head += struct.pack(order + "HHII", tag, 4, 1, start if tag == 273 else value)
    path = tmp_path / "a.tif"
    path.write_bytes(head + bytes(4) + data)
    assert np.array_equal(read_picture(path).pixels[..., 0], np.rint(GREYS16 / 257))


def test_16_bit_pgm(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(f"P5 {W} {H} 65535\n".encode() + GREYS16.astype(">u2").tobytes())
    assert np.array_equal(read_picture(path).pixels[..., 0], np.rint(GREYS16 / 257))


def test_16_bit_colours_and_alpha(tmp_path):
    deep = colours().astype(np.uint16) * 257
    assert np.array_equal(read_picture(png16(tmp_path / "a.png", deep, 2)).pixels, colours())
    four = np.dstack([deep, np.full((H, W), 0x8080, np.uint16)])
    picture = read_picture(png16(tmp_path / "b.png", four, 6))
    assert np.array_equal(picture.pixels, colours()) and (picture.alpha == 0x80).all()
    two = np.dstack([GREYS16, np.full((H, W), 0x4040, np.uint16)])
    picture = read_picture(png16(tmp_path / "c.png", two, 4))
    assert close(picture.pixels[..., 0], GREYS16 / 257, 1) and (picture.alpha == 0x40).all()


def test_floats(tmp_path):
    values = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    path = saved(tmp_path, Image.fromarray(values), "a.tif")
    assert np.array_equal(read_picture(path).pixels[..., 2], np.rint(values * 255))
    refused(saved(tmp_path, Image.fromarray(values * 300 - 1), "b.tif"), "-1", "299", "0 to 1")
    values[3, 3] = np.nan
    refused(saved(tmp_path, Image.fromarray(values), "c.tif"), "nan", "0 to 1")


def test_32_bit_whole_numbers(tmp_path):
    values = np.arange(H * W, dtype=np.int32).reshape(H, W)
    path = saved(tmp_path, Image.fromarray(values * 100), "a.tif")
    assert np.array_equal(read_picture(path).pixels[..., 2], np.rint(values * 100 / 257))
    refused(saved(tmp_path, Image.fromarray(values * 100_000), "b.tif"), "65535")


# --- colours


def srgb_to(profile_name, mode, array):
    """The numbers in another space for colours in sRGB, by lcms."""
    srgb, other = ImageCms.createProfile("sRGB"), ImageCms.createProfile(profile_name)
    return ImageCms.profileToProfile(Image.fromarray(array), srgb, other, outputMode=mode)


def matrix_profile(gamma, swap=False):
    """An ICC v2 profile, 128 bytes of header and 9 tags: sRGB's primaries (or red and blue swapped), this gamma."""
    primaries = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
    if swap:
        primaries = primaries[::-1]

    def xyz(value):
        return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in value))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    text += bytes(-len(text) % 4)
    tags = [(b"desc", text), (b"cprt", b"text\0\0\0\0none"), (b"wtpt", xyz((0.9642, 1, 0.8249)))]
    tags += [(name, xyz(value)) for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return profile_of(b"RGB ", tags)


def grey_profile(gamma):
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return profile_of(b"GRAY", [(b"cprt", b"text\0\0\0\0none"), (b"wtpt", white), (b"kTRC", curve)])


def profile_of(space, tags):
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags:
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + data


def srgb_level(linear):
    """IEC 61966-2-1: linear light in [0, 1] -> level of 0 to 255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def test_profile_of_another_gamma(tmp_path):
    path = saved(tmp_path, Image.fromarray(colours()), icc_profile=matrix_profile(1.0))
    assert close(read_picture(path).pixels, np.rint(srgb_level(colours() / 255)), 2)


def test_profile_of_other_primaries(tmp_path):
    path = saved(tmp_path, Image.fromarray(colours()), icc_profile=matrix_profile(2.2, swap=True))
    wanted = srgb_level((colours()[..., ::-1] / 255) ** 2.2)
    assert close(read_picture(path).pixels, np.rint(wanted), 2)


def test_profile_keeps_alpha(tmp_path):
    alpha = colours()[..., 1]
    path = saved(tmp_path, Image.fromarray(np.dstack([colours(), alpha])), icc_profile=matrix_profile(1.0))
    picture = read_picture(path)
    assert np.array_equal(picture.alpha, alpha)
    assert close(picture.pixels, np.rint(srgb_level(colours() / 255)), 2)


def test_profile_of_a_palette(tmp_path):
    image = Image.fromarray(colours()).quantize(8)
    wanted = srgb_level(np.asarray(image.convert("RGB")) / 255)
    path = saved(tmp_path, image, icc_profile=matrix_profile(1.0))
    assert close(read_picture(path).pixels, np.rint(wanted), 2)


@pytest.mark.parametrize("profile", [grey_profile(1.0), matrix_profile(1.0)])
def test_profile_of_a_grey_picture(tmp_path, profile):
    grey = colours()[..., 0]
    path = saved(tmp_path, Image.fromarray(grey), icc_profile=profile)
    assert close(read_picture(path).pixels, np.rint(srgb_level(grey / 255))[..., None], 2)


def test_srgb_profile_leaves_the_pixels_alone(tmp_path, caplog):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, Image.fromarray(colours()), icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_picture(path).pixels, colours())
    assert not caplog.records


@pytest.mark.parametrize("profile", [b"rubbish", matrix_profile(1.0)[:200], b"\0" * 500, grey_profile(1.0)])
def test_damaged_and_foreign_profiles_are_logged_and_ignored(tmp_path, caplog, profile):
    path = saved(tmp_path, Image.fromarray(colours()), icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_picture(path, "init").pixels, colours())
    assert "profile" in caplog.text and "init=" in caplog.text and "ignored" in caplog.text


def test_cmyk_jpeg(tmp_path):
    """Pillow writes Adobe's inverted CMYK: 200 of 255 cyan must not come back as 55."""
    image = Image.new("CMYK", (W, H), (200, 30, 0, 20))
    picture = read_picture(saved(tmp_path, image, "a.jpg", quality=95))
    wanted = [(255 - ink) * (255 - 20) / 255 for ink in (200, 30, 0)]
    assert close(picture.pixels, np.rint(wanted), 3)
    assert close(read_picture(saved(tmp_path, image, "a.tif")).pixels, np.rint(wanted), 1)


def test_ycck_jpeg(tmp_path):
    """The same file with Adobe's transform 2: what is stored is (Y, 128, 128, K), inverted, so C = M = Y = light."""
    light, black = 150, 40
    image = Image.new("CMYK", (W, H), (255 - light, 127, 127, black))
    path = saved(tmp_path, image, "a.jpg", quality=95, subsampling=0)
    data = bytearray(path.read_bytes())
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2
    path.write_bytes(data)
    wanted = (255 - light) * (255 - black) / 255
    assert close(read_picture(path).pixels, round(wanted), 3)


def test_cmyk_with_an_rgb_profile_is_converted_plainly(tmp_path, caplog):
    image = Image.new("CMYK", (W, H), (200, 30, 0, 20))
    path = saved(tmp_path, image, "a.tif", icc_profile=matrix_profile(1.0))
    with caplog.at_level(logging.WARNING):
        assert close(read_picture(path).pixels, np.asarray(image.convert("RGB")), 0)
    assert "ignored" in caplog.text


def test_lab(tmp_path):
    muted = 70 + colours() // 4  # inside the gamut; 8 bits of Lab are coarse
    lab = srgb_to("LAB", "LAB", muted)
    assert lab.mode == "LAB"
    assert close(read_picture(saved(tmp_path, lab, "a.tif")).pixels, muted, 4)


# --- several frames


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_first_frame_of_several(tmp_path, caplog, name):
    frames = [Image.new("RGB", (W, H), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.WARNING):
        assert (read_picture(path).pixels == (255, 0, 0)).all()
    assert "first of its 3 frames" in caplog.text and str(path) in caplog.text


# --- refusals


def test_missing_folder_empty(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "a folder", field="mask")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")
    refused(str(tmp_path) + "/zero\0byte", "no such file")
    refused(tmp_path / ("n" * 5000), "")


@pytest.mark.parametrize("address", ["http://a.b/c.png", "HTTPS://a.b/c.png", "data:image/png;base64,AAAA"])
def test_addresses(address):
    refused(address, "only files")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"Dear diary,\n" * 20, "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99), "AVIF" if not features.check("avif") else "damaged"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"x", "not a picture"),
        (b"\0\0\2" + bytes(9) + b"\2\0\2\0\x18\0" + bytes(12), "not a picture"),  # a TGA of 2x2, were it named so
    ],
)
def test_no_pictures(tmp_path, data, word):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    refused(path, word)


def test_tga_is_known_by_its_name(tmp_path):
    path = tmp_path / "a.tga"
    path.write_bytes(b"\0\0\2" + bytes(9) + b"\2\0\2\0\x18\0" + bytes(12))
    assert (read_picture(path).pixels == 0).all()
    refused(path.rename(tmp_path / "a.png"), "not a picture")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.tga", "a.ppm"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_never_half_a_picture(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(tmp_path, Image.fromarray(noise), name).read_bytes()
    path = tmp_path / ("cut-" + name)
    path.write_bytes(data[: int(len(data) * part)])
    refused(path)


def test_damage_gives_a_picture_or_one_line(tmp_path):
    """Bytes changed at random: whatever Pillow raises comes out as one line."""
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    outcomes = {True: 0, False: 0}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(colours()).save(buffer, kind)
        for _ in range(30):
            data = bytearray(buffer.getvalue())
            for _ in range(3):
                data[random.integers(len(data))] = random.integers(256)
            path.write_bytes(data)
            try:
                read_picture(path)
                outcomes[True] += 1
            except ValueError as error:
                assert "\n" not in str(error) and str(error).startswith("image=")
                outcomes[False] += 1
    assert min(outcomes.values()) > 10


def test_too_many_pixels(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("1", (200, 100)))
    monkeypatch.setattr(reading, "MAX_PIXELS", 19_999)
    refused(path, "200x100", "19999")
    monkeypatch.setattr(reading, "MAX_PIXELS", 20_000)
    assert read_picture(path).pixels.shape == (100, 200, 3)


@pytest.mark.parametrize("side", [13_200, 60_000])  # refused by us; refused by Pillow
def test_decompression_bomb(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(path.read_bytes() + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
    with path.open("ab") as opened:
        opened.write(struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    refused(path, "170000000")


def test_no_permission(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(colours()))
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        refused(path, "cannot be opened")
    else:
        assert np.array_equal(read_picture(path).pixels, colours())  # root may read all


# --- masks


def test_mask_of_an_opaque_picture_is_luminance(tmp_path):
    mask = read_mask(saved(tmp_path, Image.fromarray(colours())))
    wanted = colours() @ np.array([0.299, 0.587, 0.114]) / 255  # ITU-R 601-2
    assert mask.shape == (H, W) and mask.dtype == np.float32
    assert np.abs(mask - wanted).max() < 1 / 255
    white = np.zeros((H, W), np.uint8)
    white[4:8, 4:8] = 255
    assert np.array_equal(read_mask(saved(tmp_path, Image.fromarray(white))), white / 255)


def test_mask_with_alpha_is_luminance_times_alpha(tmp_path):
    alpha = np.full((H, W), 255, np.uint8)
    alpha[:, :9] = 51
    rgba = np.dstack([colours(), alpha])
    plain = mask_of(Picture(colours()))
    assert np.allclose(read_mask(saved(tmp_path, Image.fromarray(rgba))), plain * alpha / 255, atol=1e-6)


@pytest.mark.parametrize("colour", [0, 255, 80])
@pytest.mark.parametrize("ground", [0, 255])
def test_mask_of_strokes_on_an_empty_layer_is_its_alpha(tmp_path, colour, ground):
    alpha = np.zeros((H, W), np.uint8)
    alpha[3:9, 3:9] = 255
    alpha[3, 3:9] = 128
    rgb = np.where(alpha[..., None] > 0, colour, ground).repeat(3, axis=2).astype(np.uint8)
    mask = read_mask(saved(tmp_path, Image.fromarray(np.dstack([rgb, alpha]))))
    assert np.array_equal(mask, alpha.astype(np.float32) / 255)


def test_mask_of_an_even_alpha_keeps_its_colour(tmp_path):
    rgba = np.zeros((H, W, 4), np.uint8)
    rgba[...] = (255, 255, 255, 51)
    assert np.allclose(read_mask(saved(tmp_path, Image.fromarray(rgba))), 0.2)
    rgba[...] = (0, 0, 0, 51)
    assert (read_mask(saved(tmp_path, Image.fromarray(rgba))) == 0).all()


def test_mask_names_its_field(tmp_path):
    with pytest.raises(ValueError, match="^mask=.*no such file$"):
        read_mask(tmp_path / "none.png")
