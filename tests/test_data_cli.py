"""`sfumato data`: what stays and why others went, plots, near duplicates, scores, checks, and bad input in one line."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import polars
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sfumato.cli.main import main
from sfumato.train.data import open_pictures
from sfumato.train.data.duplicates import bits_set, colours, dhash, groups, near_pairs, phash
from sfumato.train.data.filtering import PRESETS
from sfumato.train.data.scoring import ImageTower, Predictor, load_predictor, load_tower, prepared
from sfumato.weights.files import save_safetensors

from .test_train_data import shard_files, write_tar


def data(*words):
    return main(["data", *map(str, words)])


def laion(path, **columns):
    """A list of LAION's: rows differ in one fact each from one that satisfies every preset."""
    good = {"URL": "http://x", "TEXT": "a cat", "WIDTH": 2000, "HEIGHT": 1500, "similarity": 0.3, "punsafe": 0.01,
            "pwatermark": 0.1, "AESTHETIC_SCORE": 6.7, "LANGUAGE": "en"}  # fmt: skip
    changes = [{}, {"WIDTH": 600}, {"HEIGHT": 511}, {"WIDTH": 255}, {"AESTHETIC_SCORE": 5.0}, {"pwatermark": 0.5},
               {"AESTHETIC_SCORE": None}, {"LANGUAGE": "de"}, {"TEXT": None}]  # fmt: skip
    rows = [good | columns | change for change in changes]
    polars.DataFrame(rows, infer_schema_length=None).write_parquet(path)
    return path


STAY = {
    "laion2b-en": [0, 1, 2, 4, 5, 6, 8],
    "high-resolution": [0, 4, 5, 6, 7, 8],
    "improved-aesthetics": [0, 1, 7, 8],
    "aesthetics-v1": [0, 1, 7, 8],
    "aesthetics-v2-5": [0, 1, 2, 3, 4, 5, 7, 8],
    "aesthetics-v2-6": [0, 1, 2, 3, 5, 7, 8],
    "aesthetics-v2-6.5": [0, 1, 2, 3, 5, 7, 8],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_what_was_published(tmp_path, preset):
    source = laion(tmp_path / "list.parquet")
    assert data("filter", source, tmp_path / "out.parquet", "--preset", preset) == 0
    before, after = polars.read_parquet(source), polars.read_parquet(tmp_path / "out.parquet")
    assert after.equals(before[STAY[preset]]) and after.columns == before.columns
    assert not list(tmp_path.glob(".*part"))


def test_why_others_went_is_told(tmp_path, capsys):
    source = laion(tmp_path / "list.parquet")
    assert data("filter", source, tmp_path / "out.parquet", "--preset", "improved-aesthetics") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "4 of 9 stay (44.4 %)"
    assert set(told[1:]) == {
        "  1 went: aesthetic > 5.0", "  1 went: aesthetic > 5.0: no value", "  1 went: width >= 512",
        "  1 went: height >= 512", "  1 went: pwatermark < 0.5",
    }  # fmt: skip


def test_any_expression_with_our_names_or_the_lists(tmp_path, capsys):
    source = laion(tmp_path / "list.parquet")
    words = ("--where", "lower(caption) LIKE '%cat%' AND WIDTH > 300", "--where", "language = 'en' OR punsafe > 1")
    assert data("filter", source, tmp_path / "out.parquet", *words) == 0
    assert polars.read_parquet(tmp_path / "out.parquet").equals(polars.read_parquet(source)[[0, 1, 2, 4, 5, 6]])
    assert "1 went: lower(caption) LIKE '%cat%' AND WIDTH > 300: no value" in capsys.readouterr().out
    for expression, message in (
        ("nonsense > 1", "there is no column 'nonsense'"), ("width >", "not understood"), ("width > 'a b'", "where="),
    ):  # fmt: skip
        assert data("filter", source, tmp_path / "no.parquet", "--where", expression) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "no.parquet").exists()


def test_folders_of_lists_are_filtered_file_by_file(tmp_path, capsys):
    (tmp_path / "lists").mkdir()
    for number in range(2):
        laion(tmp_path / "lists" / f"part-{number}.parquet")
    assert data("filter", tmp_path / "lists", tmp_path / "out", "--preset", "high-resolution") == 0
    assert "12 of 18 stay" in capsys.readouterr().out
    assert [len(polars.read_parquet(path)) for path in sorted((tmp_path / "out").iterdir())] == [6, 6]
    assert data("filter", tmp_path / "lists", tmp_path / "out", "--preset", "high-resolution") == 2
    assert "there already" in capsys.readouterr().err
    assert data("filter", tmp_path / "lists", tmp_path / "new", "--preset", "nice") == 2
    assert "preset='nice': one of laion2b-en" in capsys.readouterr().err
    assert data("filter", tmp_path / "lists", tmp_path / "newer") == 2
    assert "a preset or an expression is needed" in capsys.readouterr().err
    (tmp_path / "lists" / "part-0.parquet").write_bytes(b"PAR1 broken")
    assert data("filter", tmp_path / "lists", tmp_path / "newest", "--preset", "high-resolution") == 2
    assert "not a readable Parquet" in capsys.readouterr().err


def test_a_preset_needs_its_columns(tmp_path, capsys):
    polars.DataFrame({"URL": ["a"], "WIDTH": [3000], "HEIGHT": [3000]}).write_parquet(tmp_path / "a.parquet")
    assert data("filter", tmp_path / "a.parquet", tmp_path / "b.parquet", "--preset", "aesthetics-v2-5") == 2
    assert "no column aesthetic or AESTHETIC_SCORE" in capsys.readouterr().err
    assert data("filter", tmp_path / "a.parquet", tmp_path / "b.parquet", "--preset", "laion2b-en") == 0
    assert len(polars.read_parquet(tmp_path / "b.parquet")) == 1


@pytest.fixture
def shards(tmp_path):
    """Ten pictures of 8 x 8 that were larger once; every second one is a good one."""
    folder = tmp_path / "shards"
    folder.mkdir()
    files = []
    for index in range(10):
        facts = {"original_width": 2000, "original_height": 900 if index % 2 else 1500, "AESTHETIC_SCORE": index}
        files += shard_files(index, 1, **facts)
    write_tar(folder / "00000.tar", files[:15])
    write_tar(folder / "00001.tar", files[15:])
    return folder


def test_shards_become_new_shards(shards, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--preset", "high-resolution", "--where", "aesthetic > 1", "--per-shard", "3")
    assert data("filter", shards, out, *words) == 0
    told = capsys.readouterr().out
    assert "a set of shards, 10 pictures" in told and "4 of 10 stay" in told and "5 went: height >= 1024" in told
    pictures = open_pictures(out)
    assert [pictures.facts(index)["caption"] for index in range(4)] == [f"picture {n}" for n in (2, 4, 6, 8)]
    old = open_pictures(shards)
    assert [pictures.data(index) for index in range(4)] == [old.data(n) for n in (2, 4, 6, 8)]
    assert sorted(path.name for path in out.iterdir()) == [
        f"0000{number}{end}" for number in (0, 1) for end in (".parquet", ".tar", "_stats.json")
    ]
    assert polars.read_parquet(out / "00000.parquet")["original_height"].to_list() == [1500] * 3
    with tarfile.open(out / "00001.tar") as archive:
        assert archive.getnames() == ["000000003.jpg", "000000003.txt", "000000003.json"]


def test_scores_can_be_added_to_choose_by(shards, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps({"number": n, "key": f"{n:09}", "mood": n % 3}) + "\n" for n in range(10)))
    assert data("filter", shards, tmp_path / "out", "--where", "mood = 2", "--facts", facts) == 0
    assert [open_pictures(tmp_path / "out").facts(n)["caption"] for n in range(3)] == [
        f"picture {n}" for n in (2, 5, 8)
    ]
    assert open_pictures(tmp_path / "out").facts(0)["mood"] == 2
    facts.write_text('{"number": 3, "key": "000000004", "mood": 1}\n')
    assert data("filter", shards, tmp_path / "other", "--where", "mood = 2", "--facts", facts) == 2
    assert "of another set" in capsys.readouterr().err


def test_a_writing_that_fails_leaves_no_half_shard(shards, tmp_path, monkeypatch, capsys):
    def full(archive, name, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfumato.train.data.writing._add", full)
    assert data("filter", shards, tmp_path / "out", "--where", "aesthetic > 1") == 2
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_statistics(shards, tmp_path, capsys):
    assert data("stats", shards, "--out", tmp_path / "stats") == 0
    told = json.loads((tmp_path / "stats" / "statistics.json").read_text())
    assert told["width"]["least"] == told["width"]["most"] == 8 and told["caption words"]["mean"] == 2
    assert told["aesthetic"]["percentiles"]["50"] == 4.5 and sum(told["aesthetic"]["histogram"]["counts"]) == 10
    assert "punsafe" not in told and told["aesthetic"]["missing"] == 0
    for name in ("width", "aspect-ratio", "aesthetic", "caption-words", "sizes"):
        with Image.open(tmp_path / "stats" / f"{name}.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5
    assert "aspect ratio" in capsys.readouterr().out
    laion(tmp_path / "list.parquet")
    assert data("stats", tmp_path / "list.parquet", "--out", tmp_path / "listed") == 0
    told = json.loads((tmp_path / "listed" / "statistics.json").read_text())
    assert told["aesthetic"]["missing"] == 1 and told["aspect ratio"]["most"] == pytest.approx(2000 / 511)
    assert told["caption characters"]["count"] == 8 and told["caption words"]["most"] == 2


def test_statistics_without_matplotlib(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sfumato.train.data.statistics.find_spec", lambda name: None)
    assert data("stats", shards, "--out", tmp_path / "stats") == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "stats").iterdir()] == ["statistics.json"]


# --- near duplicates


def picture(seed, side=96):
    """Soft blobs: unlike for different seeds, and not noise, which no small change leaves as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def spoilt(image, quality=35, side=60):
    file = io.BytesIO()
    image.resize((side, side)).save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("hashed", [dhash, phash])
def test_hashes_last_through_spoiling_and_tell_pictures_apart(hashed):
    originals = [hashed(np.asarray(picture(seed))) for seed in range(30)]
    others = [hashed(np.asarray(spoilt(picture(seed)))) for seed in range(30)]
    apart = [int(bits_set(np.array([a ^ b], dtype=np.uint64))[0]) for a, b in zip(originals, others, strict=True)]
    assert max(apart) <= 8 and np.mean(apart) < 3
    between = [bin(originals[i] ^ originals[j]).count("1") for i in range(30) for j in range(i)]
    assert min(between) > 8 and 20 < np.mean(between) < 40


def test_known_hashes():
    ramp = np.repeat(np.arange(0, 252, 4, dtype=np.uint8)[None, :63, None], 64, axis=0).repeat(3, axis=2)
    assert dhash(ramp) == 2**64 - 1 and dhash(ramp[:, ::-1]) == 0
    wave = 128 + 100 * np.cos(np.pi * (np.arange(32) + 0.5) / 32)  # the lowest wave along the width
    grey = np.repeat(np.rint(wave).astype(np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    assert phash(grey) >> 62 & 1 == 1 and phash(grey[:, ::-1]) >> 62 & 1 == 0


@pytest.mark.parametrize("few", [2, 32])
@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_near_pairs_are_those_of_comparing_all(distance, few, monkeypatch):
    monkeypatch.setattr("sfumato.train.data.duplicates.FEW", few)
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    for row in range(100, 300):  # copies with 0 to 10 bits turned
        turned = generator.choice(64, generator.integers(0, 11), replace=False)
        hashes[row] = hashes[row - 100] ^ np.uint64(sum(1 << int(bit) for bit in turned))
    away = bits_set(hashes[:, None] ^ hashes[None])
    wanted = {(i, j) for i, j in np.argwhere(away <= distance).tolist() if i < j}
    found = {tuple(sorted(pair)) for piece in near_pairs(hashes, distance, np.zeros(300)) for pair in piece.tolist()}
    assert found == wanted and len(wanted) > 5
    assert bits_set(np.array([0, 2**64 - 1, 5], dtype=np.uint64)).tolist() == [0, 64, 2]


def test_crowds_of_one_hash_are_grouped_by_colour(monkeypatch):
    monkeypatch.setattr("sfumato.train.data.duplicates.CHUNK", 16)
    hashes = np.zeros(100, dtype=np.uint64)
    seen = np.zeros((100, 48), dtype=np.uint8)
    seen[1::2] = 200
    assert groups(hashes, seen, 0, 16) == [list(range(0, 100, 2)), list(range(1, 100, 2))]
    assert groups(hashes[:2], seen[:2], 4, 16) == []
    for wrong in ({"distance": 9, "colour": 1}, {"distance": 1, "colour": -1}):
        with pytest.raises(ValueError, match=r"distance=9|colour=-1"):
            groups(hashes, seen, **wrong)


def test_near_duplicates_are_listed_and_left_out(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for seed in range(4):
        picture(seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"blobs {seed}")
    spoilt(picture(1)).save(folder / "1-small.jpg")
    picture(1, 192).save(folder / "1-large.webp", quality=90)
    Image.fromarray(np.asarray(picture(2))[..., ::-1]).save(folder / "2-blue.png")  # red and blue exchanged
    (folder / "broken.jpg").write_bytes(b"no picture")
    assert data("dedup", folder, "--list", tmp_path / "list.jsonl", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "1 groups, 2 of 7 pictures" in told and "1 broken" in told
    row = json.loads((tmp_path / "list.jsonl").read_text())
    assert row["stays"].endswith("1-large.webp") and sorted(row["goes"])[0].endswith("1-small.jpg")
    assert len(open_pictures(tmp_path / "out", need_captions=False)) == 5
    assert data("dedup", folder, "--distance", "20") == 2
    assert "distance=20: 0 to 8" in capsys.readouterr().err
    assert np.abs(colours(np.asarray(picture(2))).astype(int) - colours(np.asarray(picture(2))[..., ::-1])).mean() > 16


# --- scores


def mlp(path, widths=(8, 6, 5, 4, 3, 1), numbers=(0, 2, 4, 6, 7)):
    """A predictor with the names of the improved one, where 1, 3 and 5 are dropouts."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (before, after) in zip(numbers, zip(widths, widths[1:], strict=False), strict=True):
        state[f"layers.{number}.weight"] = torch.randn(after, before, generator=generator)
        state[f"layers.{number}.bias"] = torch.randn(after, generator=generator)
    torch.save(state, path)
    return state


def test_predictors_are_read_in_their_public_formats(tmp_path):
    torch.manual_seed(0)
    embeddings = torch.randn(7, 8) * 30
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    linear = torch.nn.Linear(8, 1)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    assert torch.allclose(load_predictor(tmp_path / "linear.pth")(embeddings), linear(unit)[:, 0], atol=1e-6)
    state = mlp(tmp_path / "mlp.pth")
    layers = [torch.nn.Linear(8, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 5), torch.nn.Dropout(0.2),
              torch.nn.Linear(5, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)]  # fmt: skip
    theirs = torch.nn.Module()
    theirs.layers = torch.nn.Sequential(*layers)
    theirs.load_state_dict(state)
    assert torch.allclose(load_predictor(tmp_path / "mlp.pth")(embeddings), theirs.eval().layers(unit)[:, 0], atol=1e-5)
    with pytest.raises(ValueError, match=r"takes \(N, 8\)"):
        load_predictor(tmp_path / "mlp.pth")(torch.zeros(2, 9))
    for name, wrong, message in (
        ("names", {"a": torch.zeros(1)}, "layers.N.weight"),
        ("wide", {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, "gives 2 numbers"),
        ("lacking", {"layers.0.weight": torch.zeros(1, 8)}, "do not belong together"),
        ("gap", {k: v for k, v in state.items() if ".4." not in k}, "takes 4 numbers, gets 5"),
    ):
        torch.save(wrong, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message):
            load_predictor(tmp_path / f"{name}.pth")


def tiny_clip(path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=8,
    )  # fmt: skip
    theirs = CLIPVisionModelWithProjection(config).eval()
    state = {name: torch.randn_like(value) * 0.1 if value.is_floating_point() else value
             for name, value in theirs.state_dict().items()}  # fmt: skip
    theirs.load_state_dict(state)
    save_safetensors(path, state, {})
    return theirs


def test_embeddings_of_a_clip_are_those_of_transformers(tmp_path):
    theirs = tiny_clip(tmp_path / "clip.safetensors")
    tower = load_tower(tmp_path / "clip.safetensors")
    assert isinstance(tower, ImageTower) and tower.config.num_heads == 2 and tower.config.image_size == 32
    pixels = np.asarray(picture(3, 80).crop((0, 0, 80, 50)))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    wanted = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    ours = prepared(pixels, 32)[None]
    assert (ours - wanted).abs().max() < 0.02  # a level of 255 is 0.015
    with torch.no_grad():
        embedded = torch.nn.functional.normalize(theirs(wanted).image_embeds, dim=-1)
    assert torch.allclose(tower(wanted), embedded, atol=1e-5)
    save_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="no tensor vision_model"):
        load_tower(tmp_path / "other.safetensors")


def test_scores_of_a_set(shards, tmp_path, capsys):
    tiny_clip(tmp_path / "clip.safetensors")
    mlp(tmp_path / "mlp.pth")
    words = ("score", shards, "--predictor", tmp_path / "mlp.pth")
    assert data(*words, "--clip", tmp_path / "clip.safetensors", "--out", tmp_path / "scores.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    tower, predictor = load_tower(tmp_path / "clip.safetensors"), load_predictor(tmp_path / "mlp.pth")
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(10)]
    embeddings = tower(torch.stack([prepared(np.asarray(image), 32) for image in images]))
    assert [row["number"] for row in rows] == list(range(10)) and rows[3]["key"] == "000000003"
    assert np.allclose([row["aesthetic"] for row in rows], predictor(embeddings).numpy(), atol=1e-4)

    (tmp_path / "img_emb").mkdir()
    for part, piece in enumerate(embeddings.split(4)):
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", piece.half().numpy())
    assert data(*words, "--embeddings", tmp_path, "--out", tmp_path / "stored.jsonl", "--name", "mood") == 0
    stored = [json.loads(line)["mood"] for line in (tmp_path / "stored.jsonl").read_text().splitlines()]
    assert np.allclose(stored, [row["aesthetic"] for row in rows], atol=0.05)

    median = float(np.median([row["aesthetic"] for row in rows]))
    where = ("--where", f"aesthetic > {median}", "--facts", tmp_path / "scores.jsonl")
    assert data("filter", shards, tmp_path / "best", *where) == 0
    best = [open_pictures(tmp_path / "best").facts(n)["caption"] for n in range(5)]
    assert best == [f"picture {row['number']}" for row in rows if row["aesthetic"] > median]
    capsys.readouterr()
    (tmp_path / "img_emb" / "img_emb_2.npy").unlink()
    for more, message in (
        (("--embeddings", tmp_path, "--out", tmp_path / "a"), "8 of them for 10 pictures"),
        (("--embeddings", tmp_path / "mlp.pth", "--out", tmp_path / "a"), "not a readable .npy"),
        (("--out", tmp_path / "a"), "one of --clip"),
        (("--embeddings", tmp_path, "--out", tmp_path / "scores.jsonl"), "there already"),
    ):
        assert data(*words, *more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error


def test_scores_of_a_column(tmp_path):
    state = {"weight": torch.tensor([[1.0, 0, 0, 0]]), "bias": torch.tensor([0.5])}
    torch.save(state, tmp_path / "linear.pth")
    rows = {"URL": ["a", "b"], "embedding": [[3.0, 0, 4, 0], [0.0, 2, 0, 0]]}
    polars.DataFrame(rows).write_parquet(tmp_path / "list.parquet")
    words = ("score", tmp_path / "list.parquet", "--predictor", tmp_path / "linear.pth", "--column", "embedding")
    assert data(*words, "--out", tmp_path / "scored.parquet") == 0
    assert polars.read_parquet(tmp_path / "scored.parquet")["aesthetic"].to_list() == pytest.approx([1.1, 0.5])
    assert data(*words[:-1], "none", "--out", tmp_path / "other.parquet") == 2


def test_a_predictor_is_linear_on_unit_vectors():
    layer = torch.nn.Linear(3, 1)
    predictor = Predictor([layer])
    x = torch.randn(4, 3)
    assert torch.allclose(predictor(x), predictor(7 * x)) and predictor.width == 3


# --- check


def test_check_reads_everything_once(shards, tmp_path, capsys):
    assert data("check", shards) == 0
    assert "10 pictures read, 0 broken" in capsys.readouterr().out
    files = dict(shard_files(0, 4))
    files["000000001.jpg"] = files["000000001.jpg"][:50]
    del files["000000002.txt"]
    files["000000002.json"] = b"{}"
    write_tar(shards / "00002.tar", files.items())
    (shards / "00003.tar").write_bytes(b"no tar" * 1000)
    assert data("check", shards) == 1
    told = capsys.readouterr().out
    assert "12 pictures read, 2 broken, 1 shards damaged" in told
    assert "000000001.jpg: damaged" in told and "000000002.jpg: no caption" in told and "00003.tar: not a tar" in told
    assert data("check", shards, "--no-captions") == 1
    assert "13 pictures read, 1 broken" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert data("check", tmp_path / "empty") == 2
    error = capsys.readouterr().err
    assert "no pictures in this folder" in error and error.count("\n") == 1


def test_without_polars_one_line_says_so(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    assert data("filter", shards, tmp_path / "out", "--where", "aesthetic > 1") == 2
    assert 'pip install "sfumato[data]"' in capsys.readouterr().err
