"""Sets of captioned pictures: every source, what is broken in them, sizes and order, caches of latents."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter

import numpy as np
import polars
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from PIL import Image

from sfumato.train.data import (
    NOVELAI,
    SDXL,
    BatchOrder,
    Bucketed,
    CachedLatents,
    bucket_sizes,
    cache_latents,
    fingerprint,
    indices_at,
    indices_of,
    open_pictures,
    share,
    shuffled,
)
from sfumato.train.data.bucketed import cropped
from sfumato.train.data.buckets import merged, nearest
from sfumato.train.data.decoding import decode, size_in
from sfumato.train.data.order import shuffled_near
from sfumato.train.data.pictures import size_of
from sfumato.train.data.shards import contents_of
from sfumato.train.data.tar_index import Damaged, members


def encoded(width=8, height=8, colour=(255, 0, 0), kind="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind, **options)
    return file.getvalue()


def write_tar(path, files, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def shard_files(first, count, size=lambda index: (8, 8), **facts):
    """What img2dataset puts into a shard: the red of a picture is its number."""
    for index in range(first, first + count):
        width, height = size(index)
        told = {"key": f"{index:09}", "caption": f"picture {index}", "width": width, "height": height} | facts
        yield f"{index:09}.jpg", encoded(width, height, (index, 0, 0))
        yield f"{index:09}.txt", f"picture {index}\n".encode()
        yield f"{index:09}.json", json.dumps(told).encode()


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        write_tar(folder / f"{shard:05}.tar", shard_files(shard * 4, 4))
    return folder


def source(kind, folder):
    """Six pictures, the same in each kind of source; the red of a picture is its number."""
    folder.mkdir()
    if kind == "shards":
        write_tar(folder / "00000.tar", shard_files(0, 6))
        return folder
    for index in range(6):
        (folder / f"{index}.png").write_bytes(encoded(colour=(index, 0, 0)))
    rows = [{"file_name": f"{index}.png", "text": f"picture {index}", "width": 8, "height": 8} for index in range(6)]
    if kind == "folder":
        for index in range(6):
            (folder / f"{index}.txt").write_text(f"picture {index}\n")
    elif kind == "imagefolder":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "jsonl":
        (folder / "list.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        return folder / "list.jsonl"
    elif kind == "parquet":
        polars.DataFrame(rows).write_parquet(folder / "list.parquet")
        return folder / "list.parquet"
    return folder


# --- sources


@pytest.mark.parametrize("kind", ["shards", "folder", "imagefolder", "jsonl", "parquet"])
def test_every_source_gives_the_same(tmp_path, kind):
    pictures = open_pictures(source(kind, tmp_path / "set"))
    for set_ in (pictures, pickle.loads(pickle.dumps(pictures))):
        assert len(set_) == 6
        for index in (5, 0, 3):
            assert decode(set_.data(index))[0, 0].tolist() == [index, 0, 0]
            assert set_.facts(index)["caption"] == f"picture {index}"
            assert size_of(set_, index) == (8, 8)
    assert not pictures.report.broken and not pictures.report.shards


def test_what_a_path_is_is_said(tmp_path):
    kinds = {"shards": "set of shards", "folder": "folder of pictures", "jsonl": "list of JSON lines",
             "parquet": "Parquet table"}  # fmt: skip
    for kind, said in kinds.items():
        assert open_pictures(source(kind, tmp_path / kind)).kind == said
    both = open_pictures(tmp_path / "shards", tmp_path / "folder")
    assert both.kind == "set of shards and folder of pictures" and len(both) == 12
    assert [decode(both.data(index))[0, 0, 0] for index in (5, 6, 11)] == [5, 0, 5]
    assert both.facts(11)["caption"] == "picture 5" and both.name(6).endswith("0.png")


def test_bad_paths_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.md").write_text("x")
    polars.DataFrame({"URL": ["http://x"], "TEXT": ["x"]}).write_parquet(tmp_path / "urls.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, message in {
        "none": "no such file", "empty": "no pictures in this folder", "text.md": "a folder, .tar",
        "urls.parquet": "img2dataset", "broken.parquet": "not a readable Parquet",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            open_pictures(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(ValueError, match="no path"):
        open_pictures()


def test_sets_that_cannot_be_used_are_refused_at_once(tmp_path):
    for name, files, message in (
        ("broken", [("0.jpg", b"no"), ("0.txt", b"a")], "none of 1 pictures tried.*not a picture"),
        ("uncaptioned", [("0.png", encoded())], "none of 1 pictures tried.*no caption"),
        ("nothing", [("readme.md", b"x")], "no pictures in this set of shards"),
    ):
        write_tar(tmp_path / f"{name}.tar", files)
        with pytest.raises(ValueError, match=message):
            open_pictures(tmp_path / f"{name}.tar")
    (tmp_path / "text.tar").write_text("no tar at all, but longer than a block" * 20)
    with pytest.raises(ValueError, match="no pictures.*not a tar"):
        open_pictures(tmp_path / "text.tar")
    assert len(open_pictures(tmp_path / "uncaptioned.tar", need_captions=False)) == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["0.png", "ü" * 20 + ".png", "folder/" * 13 + "0.png", "x" * 300 + ".png"])
def test_tars_are_indexed_as_tarfile_does(tmp_path, format, name):
    if format == tarfile.USTAR_FORMAT and len(name) > 256:
        name = "x" * 80 + ".png"
    path = tmp_path / "a.tar"
    write_tar(path, [(name, b"12345"), ("folder.txt", b""), ("b.json", bytes(1000))], format)
    with tarfile.open(path) as archive:
        assert list(members(path)) == [(m.name, m.offset_data, m.size) for m in archive]


def test_a_shard_cut_short_keeps_what_came_before(shards):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    for length in (5000, 700, 300):
        path.write_bytes(whole[:length])
        pictures = open_pictures(shards)
        assert 4 <= len(pictures) < 8 and list(pictures.report.shards) == [str(path)]
        assert "byte" in pictures.report.lines()[-1] and "1 shards damaged" in pictures.report.lines()[0]
    damaged = bytearray(whole)
    damaged[512 * 2 + 3] ^= 255  # in the second header
    path.write_bytes(bytes(damaged))
    with pytest.raises(Damaged, match="checksum"):
        list(members(path))
    path.write_bytes(whole)
    path.chmod(0o644)
    assert len(open_pictures(shards)) == 8


def test_damaged_tars_never_hang_or_raise_anything_else(tmp_path):
    """Bytes of headers are changed and the checksum mended, so that the damage is in what is then understood."""
    path = tmp_path / "a.tar"
    write_tar(path, [("x" * 200 + ".png", b"12345"), ("b.json", bytes(1000))], tarfile.PAX_FORMAT)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    damaged = 0
    for _ in range(400):
        changed = bytearray(whole)
        block = 512 * int(generator.integers(0, 7))
        for place in generator.integers(block, block + 512, 3):
            changed[place] = int(generator.choice([0, 32, 45, 48, 55, 57, 128, 255]))
        changed[block + 124 + int(generator.integers(12))] = int(generator.choice([45, 48, 57, 128]))
        header = changed[block : block + 512]
        header[148:156] = b" " * 8
        changed[block + 148 : block + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(changed))
        try:
            assert all(0 <= offset <= offset + size <= len(whole) for _, offset, size in members(path))
        except Damaged:
            damaged += 1
    assert damaged > 100


def test_counts_of_img2dataset_spare_reading_the_shards(shards):
    for number in range(2):
        (shards / f"{number:05}_stats.json").write_text(json.dumps({"count": 9, "successes": 4, "failed": 5}))
    pictures = open_pictures(shards)
    assert len(pictures) == 8 and list(pictures._contents) == [0]  # one picture was tried
    (shards / "00001.tar").write_bytes((shards / "00001.tar").read_bytes()[:3000])
    data = Bucketed(open_pictures(shards), (8, 8), 8)
    batch = data.batch(range(8))
    reds = ((batch.pixels[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert reds[:4] == [0, 1, 2, 3] and len(reds) == 8
    assert len(data.pictures.report.shards) == 1 and data.pictures.report.broken


def test_a_broken_picture_is_replaced_always_by_the_same_and_told(tmp_path, caplog):
    files = dict(shard_files(0, 12))
    files["000000003.jpg"] = files["000000003.jpg"][:50]
    files["000000005.jpg"] = b""
    del files["000000007.txt"]
    files["000000007.json"] = b"{}"
    files["000000009.json"] = b"{damaged"
    files["000000010.txt"] = b"\xff\xfe"
    write_tar(tmp_path / "00000.tar", files.items())
    data = Bucketed(open_pictures(tmp_path), (8, 8), 4)
    first, second = data.batch(range(12)), Bucketed(open_pictures(tmp_path), (8, 8), 4).batch(range(12))
    assert torch.equal(first.pixels, second.pixels) and first.captions == second.captions
    reds = ((first.pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert [f"picture {red}" for red in reds] == first.captions
    for index, red in enumerate(reds):
        assert (red == index) == (index not in (3, 5, 7, 9, 10))
    report = data.pictures.report
    assert len(report.broken) == 5 and report.read == 12
    data.batch([3, 3])
    assert len(report.broken) == 5  # each is counted once
    text = "\n".join(report.lines())
    assert "5 broken" in text and "000000003.jpg: damaged or cut short" in text and "000000007.jpg: no caption" in text
    assert "000000005.jpg" in caplog.text and not set(reds) & {3, 5, 7, 9, 10}


def test_pictures_of_files_that_went_away_are_broken_not_fatal(tmp_path):
    data = Bucketed(open_pictures(source("folder", tmp_path / "set")), (8, 8), 2)
    (tmp_path / "set" / "2.png").unlink()
    assert data.batch([2, 1]).captions[0] != "picture 2"
    assert "No such file" in data.pictures.report.broken[str(tmp_path / "set" / "2.png")]
    for index in range(6):
        (tmp_path / "set" / f"{index}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="a hundred pictures in a row"):
        data.batch([1, 0])


def test_pictures_are_read_upright_in_rgb_over_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(16, 8, kind="JPEG", exif=exif)
    assert size_in(turned) == (8, 16) and decode(turned).shape == (16, 8, 3)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    assert (decode(clear.getvalue()) == 255).all()
    grey = io.BytesIO()
    Image.new("I;16", (2, 2), 65535).save(grey, "PNG")
    assert (decode(grey.getvalue()) == 255).all()
    large = encoded(800, 400, kind="JPEG")
    assert decode(large, (50, 50)).shape == (100, 200, 3) and decode(large).shape == (400, 800, 3)
    assert size_in(large) == (800, 400)


# --- order


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1000, 4097])
def test_shuffled_is_a_permutation(length):
    found = shuffled(np.arange(length), length, [1, 2])
    assert sorted(found.tolist()) == list(range(length))
    if length > 6:
        other = shuffled(np.arange(length), length, [1, 3])
        assert (found == other).mean() < 0.5 and (found == np.arange(length)).mean() < 0.5
        assert shuffled(np.array([5]), length, [1, 2])[0] == found[5]


@pytest.mark.parametrize(("length", "near"), [(1000, 10), (1007, 10), (163, 10), (160, 10), (37, 10), (50, 1)])
def test_what_lies_together_is_read_together(length, near):
    found = shuffled_near(np.arange(length), length, [4], near)
    assert sorted(found.tolist()) == list(range(length))
    assert shuffled_near(np.array([length // 2]), length, [4], near)[0] == found[length // 2]
    if length // near > 16:
        blocks = [len(set((found[start : start + 4 * near] // near).tolist())) for start in range(0, length, 4 * near)]
        assert max(blocks) <= 2 * 16 and (found == np.arange(length)).mean() < 0.2
    if length >= 1000:
        assert len(set((found[:160] // 10).tolist())) == 16 and len(set((found[:20] // 10).tolist())) > 6


def test_many_shards_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.train.data.shards.KEPT", 17)
    for shard in range(40):
        write_tar(tmp_path / f"{shard:05}.tar", shard_files(shard * 3, 3))
    pictures = open_pictures(tmp_path)
    data = Bucketed(pictures, (8, 8), 6)
    assert pictures.near == 3 and len(pictures) == 120
    opened = []
    monkeypatch.setattr(
        "sfumato.train.data.shards.contents_of", lambda path, report: opened.append(path) or contents_of(path, report)
    )
    pictures._contents.clear()
    seen = [data.batch(data.indices_at(step)).captions for step in range(20)]
    assert Counter(sum(seen, [])) == Counter(f"picture {n}" for n in range(120))
    assert len(opened) <= 60 and len(pictures._contents) == 17


def test_shuffled_is_even():
    """Each place goes everywhere equally often, and neighbours are apart: over 4,000 keys, within 5 deviations."""
    places = np.array([shuffled(np.arange(8), 8, [key]) for key in range(4000)])
    for place in range(8):
        counts = np.bincount(places[:, place], minlength=8)
        assert abs(counts - 500).max() < 5 * 21
    follows = (np.diff(places, axis=1) == 1).mean()
    assert abs(follows - 1 / 8) < 0.01
    large = shuffled(np.arange(100_000), 100_000_000, [7])
    assert len(set(large.tolist())) == 100_000 and abs(large.mean() / 1e8 - 0.5) < 0.005


def test_every_group_is_seen_once_in_each_pass_whatever_the_batch():
    counts, size = [10, 7, 25], 4
    order = BatchOrder(counts, size, seed=3)
    seen = [Counter() for _ in counts]
    steps = order.batches_before(4)  # after four passes of 4: 10, 7 and 25 batches, all ends meet
    assert steps == sum(counts)
    for step in range(steps):
        group, inside, passes = order.at(step)
        assert len(inside) == size
        seen[group].update(zip(inside.tolist(), passes.tolist(), strict=True))
    for count, found in zip(counts, seen, strict=True):
        assert found == Counter({(index, number): 1 for index in range(count) for number in range(4)})
    groups = [order.at(step)[0] for step in range(steps)]
    assert groups != sorted(groups)
    again = BatchOrder(counts, size, seed=3)
    assert all(np.array_equal(again.at(step)[1], order.at(step)[1]) for step in (41, 0, 13))
    assert any(not np.array_equal(BatchOrder(counts, size, 4).at(step)[1], order.at(step)[1]) for step in range(5))


def test_steps_of_late_epochs_are_found():
    order = BatchOrder([100_000_003, 2051, 70_000], 2048, seed=0)
    for epoch in (0, 1, 999):
        first = order.batches_before(epoch)
        _, inside, passes = order.at(first)
        assert len(set(inside.tolist())) == 2048 or len(set(passes.tolist())) > 1
        assert set(passes.tolist()) <= {epoch - 1, epoch}
    with pytest.raises(ValueError, match="step=-1"):
        order.at(-1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_order(ranks):
    whole = indices_at(9, 8, 30, seed=1)
    assert sum((indices_at(9, 8, 30, 1, rank, ranks) for rank in range(ranks)), []) == whole
    with pytest.raises(ValueError, match="not a multiple of the 3 ranks"):
        indices_at(0, 8, 30, 1, 0, 3)
    with pytest.raises(ValueError, match="rank=2"):
        share([1, 2], 2, 2)


# --- sizes


def test_bucket_tables():
    assert all(w * h <= 512 * 768 and w % 64 == h % 64 == 0 and 256 <= min(w, h) <= 1024 for w, h in NOVELAI)
    assert {(512, 512), (512, 768), (768, 512), (1024, 384), (384, 1024), (576, 640)} <= set(NOVELAI)
    theirs = {(int(width), int(height)) for height, width in ASPECT_RATIO_1024_BIN.values()}
    assert theirs <= set(SDXL) and len(SDXL) == len(set(SDXL)) == 40
    assert all(0.9 < w * h / 1024**2 <= 1.04 for w, h in SDXL)
    with pytest.raises(ValueError, match="no bucket fits"):
        bucket_sizes(100, 64, 128, 64, 64)


def test_a_picture_gets_the_nearest_aspect_ratio():
    buckets = [(512, 512), (768, 512), (512, 768), (256, 256)]
    sizes = np.array([[100, 100], [3000, 2000], [200, 301], [1200, 1000], [1300, 1000]])
    assert nearest(sizes, buckets).tolist() == [0, 1, 2, 0, 1]


def test_small_buckets_are_merged_into_the_nearest():
    buckets = [(400, 100), (300, 100), (100, 100), (100, 200)]
    assigned = np.array([0] * 1 + [1] * 3 + [2] * 9 + [3] * 2)
    found = merged(assigned, buckets, 4)
    assert np.bincount(found, minlength=4).tolist() == [0, 4, 11, 0]
    with pytest.raises(ValueError, match="batch_size=16.*only 15"):
        merged(assigned, buckets, 16)


def test_cropping_keeps_the_part_that_was_asked_for():
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    assert (cropped(ramp, (20, 20))[0, :, 0] == np.arange(10, 30)).all()
    assert (cropped(ramp, (20, 20), (0, 0))[0, :, 0] == np.arange(20)).all()
    assert (cropped(ramp, (20, 20), (1, 1))[0, :, 0] == np.arange(20, 40)).all()
    half = cropped(ramp, (10, 10))[0, :, 0].astype(float)
    assert abs(half - np.arange(10.5, 30, 2)).max() <= 1
    assert cropped(ramp, (90, 30)).shape == (30, 90, 3)


def mixed_set(folder, count=40):
    sizes = [(16, 16), (24, 12), (12, 24), (20, 18)]
    folder.mkdir(exist_ok=True)
    write_tar(folder / "00000.tar", shard_files(0, count, lambda index: sizes[index % 4]))
    return open_pictures(folder)


def test_batches_have_one_size_and_see_everything(tmp_path):
    sizes = [(16, 16), (24, 8), (8, 24)]
    data = Bucketed(mixed_set(tmp_path / "set"), sizes, 4, seed=5)
    assert data.counts() == {(16, 16): 20, (24, 8): 10, (8, 24): 10}
    seen = Counter()
    for step in range(10 * 2):  # two passes
        tickets = data.indices_at(step)
        batch = data.batch(tickets)
        seen.update(ticket % 40 for ticket in tickets)
        height, width = batch.pixels.shape[2:]
        assert (width, height) in sizes and batch.pixels.min() >= -1 and batch.pixels.max() <= 1
        assert [data.indices_at(step, rank, 2) for rank in (0, 1)] == [tickets[:2], tickets[2:]]
        assert indices_of(data, step, 4, seed=99) == tickets
        assert batch.captions == [f"picture {ticket % 40}" for ticket in tickets]
    assert seen == Counter(list(range(40)) * 2)
    with pytest.raises(ValueError, match="different sizes"):
        data.batch([0, 1])
    with pytest.raises(ValueError, match="batches of 4"):
        indices_of(data, 0, 8, seed=0)


def test_small_buckets_of_a_set(tmp_path, caplog):
    pictures = mixed_set(tmp_path / "set", 10)
    data = Bucketed(pictures, [(16, 16), (24, 8), (8, 24)], 5)
    assert sum(data.counts().values()) == 10 and all(count >= 5 for count in data.counts().values())
    with pytest.raises(ValueError, match="fewer pictures than that have the size 24x8"):
        Bucketed(pictures, [(16, 16), (24, 8), (8, 24)], 5, small="refuse")
    with pytest.raises(ValueError, match="batch_size=11: the set has only 10"):
        Bucketed(pictures, (8, 8), 11)
    for wrong, message in (({"crop": "left"}, "crop='left'"), ({"small": "drop"}, "small='drop'")):
        with pytest.raises(ValueError, match=message):
            Bucketed(pictures, (8, 8), 2, **wrong)


def test_crops_and_flips_come_from_seed_picture_and_pass(tmp_path):
    ramp = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
    for index in range(2):
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{index}.png")
    pictures = open_pictures(tmp_path, need_captions=False)
    options = {"seed": 1, "crop": "random", "flip": True, "need_captions": False}
    data = Bucketed(pictures, (16, 64), 2, **options)
    passes = [data.batch([0 + 2 * number]).pixels for number in range(12)]
    again = Bucketed(pictures, (16, 64), 2, **options)
    assert all(torch.equal(again.batch([2 * number]).pixels, passes[number]) for number in (7, 0))
    assert len({pixels.numpy().tobytes() for pixels in passes}) > 8
    assert not torch.equal(data.batch([0]).pixels, data.batch([1]).pixels)
    fixed = Bucketed(pictures, (16, 64), 2, need_captions=False)
    assert torch.equal(fixed.batch([0]).pixels, fixed.batch([2]).pixels)
    flips = Bucketed(pictures, (64, 64), 2, seed=1, flip=True, need_captions=False)
    plain = fixed_pixels = torch.from_numpy(ramp.astype(np.uint8)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mirrored = [not torch.equal(flips.batch([2 * number]).pixels, plain) for number in range(40)]
    assert 10 < sum(mirrored) < 30
    turned = flips.batch([2 * mirrored.index(True)]).pixels
    assert torch.allclose(turned.flip(3), fixed_pixels)


def test_broken_pictures_leave_the_buckets(tmp_path):
    files = dict(shard_files(0, 8))
    files["000000002.jpg"], files["000000002.json"] = b"no", b"{}"
    write_tar(tmp_path / "00000.tar", files.items())
    data = Bucketed(open_pictures(tmp_path), [(8, 8), (16, 8)], 3)
    assert data.counts() == {(8, 8): 7} and len(data.pictures.report.broken) == 1
    assert 2 not in {ticket % 8 for step in range(14) for ticket in data.indices_at(step)}


def test_a_loader_with_workers_gives_the_same(tmp_path):
    data = Bucketed(mixed_set(tmp_path / "set"), [(16, 16), (24, 8), (8, 24)], 4, crop="random")
    steps = [data.indices_at(step) for step in range(4)]
    copy = pickle.loads(pickle.dumps(data))
    loader = torch.utils.data.DataLoader(_Steps(copy, steps), batch_size=None, num_workers=2)
    for tickets, batch in zip(steps, loader, strict=True):
        assert torch.equal(batch, data.batch(tickets).pixels)


class _Steps(torch.utils.data.Dataset):
    def __init__(self, data, steps):
        self.data, self.steps = data, steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, step):
        return self.data.batch(self.steps[step]).pixels


# --- caches of latents


def halves(pixels):
    """A stand-in for an autoencoder: means of 4 x 4 pixels and their constant deviation."""
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return mean, torch.full_like(mean, 0.5)


def lengths(captions):
    return torch.tensor([[[float(len(caption))] * 3] * 2 for caption in captions])


def test_a_set_is_cached_in_buckets_and_goes_on(tmp_path):
    data = Bucketed(mixed_set(tmp_path / "set"), [(16, 16), (24, 8), (8, 24)], 4)
    (tmp_path / "cache").mkdir()
    options = {"autoencoder": "a" * 64, "states": lengths, "text": "t" * 64, "per_file": 8}
    paths = cache_latents(data, halves, tmp_path / "cache", **options)
    assert [path.name for path in paths] == [
        "16x16-00000.safetensors", "16x16-00001.safetensors", "16x16-00002.safetensors", "24x8-00000.safetensors",
        "24x8-00001.safetensors", "8x24-00000.safetensors", "8x24-00001.safetensors",
    ]  # fmt: skip
    latents = CachedLatents(paths, "a" * 64, "t" * 64)
    assert len(latents) == 40 and sorted(latents.captions) == sorted(f"picture {n}" for n in range(40))
    assert {size: len(members) for size, members in latents.sizes().items()} == {(4, 4): 20, (2, 6): 10, (6, 2): 10}
    batches = pickle.loads(pickle.dumps(latents.in_batches(5, seed=1)))
    seen = Counter()
    for step in range(8):
        batch = batches.batch(indices_of(batches, step, 5, seed=0))
        seen.update(batch.captions)
        assert torch.equal(batch.context, lengths(batch.captions)) and batch.mean.shape[2:] == batch.std.shape[2:]
        number = int(batch.captions[0].split()[1])
        assert abs(float(batch.mean[0, 0].mean()) - (number / 127.5 - 1)) < 1e-3
    assert set(seen.values()) == {1} and len(seen) == 40
    with pytest.raises(ValueError, match="in one batch"):
        latents.batch([0, 39])
    with pytest.raises(ValueError, match="batch_size=11: only 10"):
        latents.in_batches(11, seed=0)

    stamp = paths[0].stat().st_mtime_ns
    paths[3].unlink()
    calls = []
    again = cache_latents(data, lambda x: calls.append(len(x)) or halves(x), tmp_path / "cache", **options)
    assert again == paths and sum(calls) == 8 and paths[0].stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="made by another autoencoder"):
        cache_latents(data, halves, tmp_path / "cache", **(options | {"autoencoder": "b" * 64}))


def test_a_cache_of_another_autoencoder_is_refused(tmp_path, caplog):
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(first) == fingerprint(first) != fingerprint(second)
    mean = torch.randn(3, 4, 2, 2)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    CachedLatents.write(paths[0], mean, mean, ["a"] * 3, fingerprint(first))
    CachedLatents.write(paths[1], mean, mean, ["a"] * 3, fingerprint(second))
    CachedLatents.write(paths[2], mean, mean, ["a"] * 3)
    assert len(CachedLatents(paths[:1], fingerprint(first))) == 3
    with pytest.raises(ValueError, match="made by another autoencoder"):
        CachedLatents(paths[:1], fingerprint(second))
    with pytest.raises(ValueError, match="made by another autoencoder"):
        CachedLatents(paths[:2])
    assert len(CachedLatents(paths[2:], fingerprint(first))) == 3 and "does not say which autoencoder" in caplog.text


def test_damaged_caches_are_one_line(tmp_path):
    mean = torch.randn(3, 4, 2, 2)
    path = tmp_path / "a.safetensors"
    CachedLatents.write(path, mean, mean, ["a"] * 2)
    with pytest.raises(ValueError, match="2 captions do not fit"):
        CachedLatents([path])
    CachedLatents.write(path, mean, mean, ["a"] * 3, context=torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="2 captions' states for 3"):
        CachedLatents([path])
    CachedLatents.write(path, mean[:0], mean[:0], [])
    with pytest.raises(ValueError, match="the cache is empty"):
        CachedLatents([path])
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="a.safetensors"):
        CachedLatents([path])
    with pytest.raises(ValueError, match="no files"):
        CachedLatents([])
