"""Signatures: what was changed, who signed, and what a resaved picture still says."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfumato.cli.main import main
from sfumato.images import RECIPE_KEY, load_png, save_png
from sfumato.safety import provenance

RECIPE = {"job": {"prompt": 'Müller\'s "red" apple', "seed": 7, "guidance": 7.5, "eta": 1e-7}, "index": 0}


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    provenance.new_key(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def picture(tmp_path: Path, pixels, key) -> Path:
    save_png(tmp_path / "a.png", pixels, provenance.signed(RECIPE, pixels, provenance.load_key(key)))
    return tmp_path / "a.png"


def verify(*words: object) -> int:
    return main(["verify", *map(str, words)])


def test_a_signed_picture_is_sound(picture, key, capsys):
    assert verify(picture) == 0
    public = Path(f"{key}.pub")
    assert provenance.load_public(public) in capsys.readouterr().out
    assert verify(picture, "--key", public) == 0
    pixels, recipe = load_png(picture)
    assert provenance.verify(pixels, recipe).sound
    assert {name: value for name, value in recipe.items() if name != "signature"} == RECIPE


def test_one_pixel_is_found(picture, capsys):
    pixels, recipe = load_png(picture)
    pixels = pixels.copy()
    pixels[3, 4, 1] ^= 1
    save_png(picture, pixels, recipe)
    assert verify(picture) == 1
    out = capsys.readouterr().out
    assert "pixels: changed" in out and "recipe: as signed" in out


def test_other_sizes_of_the_same_bytes_are_found(picture):
    pixels, recipe = load_png(picture)
    report = provenance.verify(pixels.reshape(30, 20, 3), recipe)
    assert report.recipe_same and not report.pixels_same


@pytest.mark.parametrize("field, value", [("prompt", "a pear"), ("seed", 8), ("guidance", 7.500000000000001)])
def test_one_field_is_found(picture, field, value, capsys):
    pixels, recipe = load_png(picture)
    recipe["job"][field] = value
    save_png(picture, pixels, recipe)
    assert verify(picture) == 1
    out = capsys.readouterr().out
    assert "pixels: as signed" in out and "recipe: changed" in out


def test_added_and_removed_fields_are_found(picture):
    pixels, recipe = load_png(picture)
    assert not provenance.verify(pixels, {**recipe, "more": 1}).recipe_same
    del recipe["index"]
    assert not provenance.verify(pixels, recipe).recipe_same


def test_another_pixels_hash_in_the_signature_is_found(picture):
    pixels, recipe = load_png(picture)
    pixels = pixels.copy()
    pixels[0, 0] = 0
    recipe["signature"]["pixels"] = provenance.pixels_hash(pixels)
    report = provenance.verify(pixels, recipe)
    assert report.pixels_same and not report.recipe_same and not report.sound


def test_another_key_is_found(picture, tmp_path, capsys):
    provenance.new_key(tmp_path / "other")
    assert verify(picture, "--key", tmp_path / "other.pub") == 1
    assert "another key" in capsys.readouterr().out
    pixels, recipe = load_png(picture)
    recipe["signature"]["by"] = provenance.load_public(tmp_path / "other.pub")  # taken for one's own
    assert not provenance.verify(pixels, recipe).sound


def test_no_signature(tmp_path, pixels, capsys):
    save_png(tmp_path / "b.png", pixels, RECIPE)
    assert verify(tmp_path / "b.png") == 1
    assert "not signed" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [{"algorithm": "RSA"}, {"value": "??"}, {"by": "QUJD"}, {"value": None}])
def test_a_damaged_signature_is_one_line(picture, damage, capsys):
    pixels, recipe = load_png(picture)
    recipe["signature"] |= damage
    save_png(picture, pixels, recipe)
    assert verify(picture) == 2
    assert capsys.readouterr().err.startswith("sfumato verify: error: signature: ")


def test_a_resaved_picture_still_verifies(picture, tmp_path):
    """Another program's PNG: other compression, the recipe's JSON spelled in another order."""
    with Image.open(picture) as opened:
        info = PngImagePlugin.PngInfo()
        recipe = json.loads(opened.text[RECIPE_KEY])
        turned = dict(reversed(recipe.items()))
        info.add_itxt(RECIPE_KEY, json.dumps(turned, indent=2))
        opened.convert("RGBA").save(tmp_path / "again.png", pnginfo=info, compress_level=1)
    assert (tmp_path / "again.png").read_bytes() != picture.read_bytes()
    assert verify(tmp_path / "again.png") == 0


def test_keys_are_for_their_owner(tmp_path, capsys):
    assert main(["keys", "new", str(tmp_path / "k")]) == 0
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    before = (tmp_path / "k").read_bytes()
    assert b"PRIVATE" not in (tmp_path / "k.pub").read_bytes()
    assert main(["keys", "new", str(tmp_path / "k")]) == 2
    (tmp_path / "k.pub").unlink()
    assert main(["keys", "new", str(tmp_path / "k")]) == 2
    assert (tmp_path / "k").read_bytes() == before


def test_what_is_no_key_is_said(tmp_path, key):
    (tmp_path / "bad").write_text("no key")
    with pytest.raises(ValueError, match="no private key in PEM"):
        provenance.load_key(tmp_path / "bad")
    with pytest.raises(ValueError, match="no public key"):
        provenance.load_public(key)
    with pytest.raises(ValueError, match="No such file"):
        provenance.load_key(tmp_path / "none")


def test_not_a_number_is_not_signed(pixels, key):
    with pytest.raises(ValueError, match="not JSON compliant"):
        provenance.signed({"guidance": float("nan")}, pixels, provenance.load_key(key))
