"""Previews against full decodes, tiny decoders of others' files, recorders of bounded memory, and moving pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.engine import Engine
from sfumato.evaluate.quality import psnr
from sfumato.families import BOX, SD1, SD2, XL, Model
from sfumato.images import from_uint8
from sfumato.images.moving import save_moving, strip
from sfumato.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from sfumato.pipeline import Pipeline
from sfumato.tasks import txt2img
from sfumato.tasks.checks import complete
from sfumato.tasks.decoding import decode
from sfumato.tasks.previews import (
    SD_MAP,
    XL_MAP,
    LinearMap,
    Recorder,
    drawings,
    fitted,
    full,
    linear,
    linear_map,
    previewer,
    tiny,
)
from sfumato.types import Answer, Job, Query
from sfumato.weights.checkpoint import load_model
from sfumato.weights.files import save_safetensors


@pytest.fixture(scope="module")
def box() -> Model:
    return Pipeline.from_pretrained(device="cpu").model


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint)


def frames(count: int, height: int = 6, width: int = 8) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_families_have_their_maps() -> None:
    assert linear_map(SD1) is SD_MAP and linear_map(SD2) is SD_MAP and linear_map(XL) is XL_MAP
    assert linear_map(replace(SD1, latent_scale=0.5)) is None


def test_a_linear_preview_is_the_map_of_each_cell() -> None:
    """A cell of values (1, 2, 3, 4) by hand, with SD's factors; even latents give even pictures."""
    values = torch.tensor([1.0, -1.0, 0.5, 2.0])
    red = 0.3512 - 0.3250 - 0.5 * 0.2829 - 2 * 0.2120
    picture = linear(SD1)(values.reshape(1, 4, 1, 1).expand(2, 4, 5, 3))
    assert picture.shape == (2, 40, 24, 3) and picture.dtype == np.uint8
    assert (picture[..., 0] == round((red + 1) * 127.5)).all()


def test_xls_bias_is_its_grey() -> None:
    picture = linear(XL)(torch.zeros(1, 4, 2, 2))
    assert picture[0, 0, 0].tolist() == [round((bias + 1) * 127.5) for bias in XL_MAP.bias]


@torch.inference_mode()
def test_the_boxs_previews_resemble_its_decodes(box: Model) -> None:
    """On pictures that the map was not fitted to, against a picture of one colour and a map fitted to drawings."""
    x0 = box.autoencoder.encode(from_uint8(drawings(8, 64, seed=5))).mean * box.family.latent_scale
    exact = full(box)(x0)
    quick = previewer("linear", box)(x0)
    grey = np.broadcast_to(exact.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8), exact.shape)
    assert quick.shape == exact.shape == (8, 64, 64, 3)
    assert psnr(quick, exact) > psnr(grey, exact) + 3
    own = linear(box.family, fitted(box))(x0)
    assert psnr(own, exact) > psnr(grey, exact) + 3


def test_a_full_preview_is_the_decode(small: Model) -> None:
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = decode(x0, 0.0, small)
    expected = ((exact.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert (previewer("full", small)(x0) == expected.numpy()).all()


def test_a_fitted_map_finds_a_linear_decoder(small: Model) -> None:
    """An autoencoder that is linear per cell: the map is its factors, and the preview its decodes' means."""

    class Means(torch.nn.Module):
        config = small.autoencoder.config

        def encode(self, images: torch.Tensor):  # type: ignore[no-untyped-def]
            cells = torch.nn.functional.avg_pool2d(images, 2)
            mixed = torch.cat([cells, cells.prod(dim=1, keepdim=True)], dim=1) / small.family.latent_scale
            return type("Posterior", (), {"mean": mixed})

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            z = z * small.family.latent_scale
            colours = torch.stack([0.5 * z[:, 1] + 0.1, z[:, 2] - 0.25 * z[:, 3], -z[:, 0]], dim=1)
            return colours.repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)

    found = fitted(replace(small, autoencoder=Means()), drawings(16, 16) // 2 + 64)  # type: ignore[arg-type]
    expected = [[0, 0, -1], [0.5, 0, 0], [0, 1, 0], [0, -0.25, 0]]
    assert np.allclose(found.factors, expected, atol=1e-4) and np.allclose(found.bias, [0.1, 0, 0], atol=1e-4)


def test_what_cannot_be_previewed_is_said_in_a_line(small: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no map is known for tiny; fit one"):
        linear(small.family)
    with pytest.raises(ValueError, match=r"preview='quick': one of linear, tiny, full"):
        previewer("quick", small)
    with pytest.raises(ValueError, match="the file of a tiny decoder is needed"):
        previewer("tiny", small)
    with pytest.raises(ValueError, match=r"more than 4 are needed"):
        fitted(small, np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\) is needed"):
        linear(SD1)(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match="tiny has 2 px a cell"):
        torch.save({}, tmp_path / "empty.pth")
        tiny(tmp_path / "empty.pth", small.family)


@pytest.fixture(scope="module")
def taesd() -> TinyAutoencoder:
    torch.manual_seed(3)
    return TinyAutoencoder(TinyAutoencoderConfig()).eval()


@pytest.mark.parametrize("layout", ["decoder alone .pth", "decoder alone .safetensors", "both", "diffusers"])
def test_tiny_decoders_are_read_in_every_layout(layout: str, taesd: TinyAutoencoder, tmp_path: Path) -> None:
    alone = {name: tensor.detach() for name, tensor in taesd.decoder.state_dict().items()}
    both = {name: tensor.detach() for name, tensor in taesd.state_dict().items()}
    path = tmp_path / ("taesd.pth" if layout.endswith(".pth") else "taesd.safetensors")
    if layout == "decoder alone .pth":
        torch.save(alone, path)
    elif layout == "decoder alone .safetensors":
        save_safetensors(path, alone, {})
    elif layout == "both":
        save_safetensors(path, both, {})
    else:
        from diffusers import AutoencoderTiny

        theirs = AutoencoderTiny()
        theirs.decoder.layers.load_state_dict({f"{int(k.split('.', 1)[0]) - 1}.{k.split('.', 1)[1]}": v
                                               for k, v in alone.items()})  # fmt: skip
        save_safetensors(path, theirs.state_dict(), {})
    x0 = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ((taesd.decode(x0).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (tiny(path, SD1)(x0) == expected).all()


SIXTEEN = replace(
    BOX,
    unet=replace(BOX.unet, in_channels=16, out_channels=16),
    autoencoder=replace(BOX.autoencoder, latent_channels=16),
)


def test_a_tiny_decoder_of_other_latents_is_refused(taesd: TinyAutoencoder, tmp_path: Path) -> None:
    torch.save(taesd.decoder.state_dict(), tmp_path / "taesd.pth")
    with pytest.raises(ValueError, match=r"taesd\.pth.*not a tiny decoder of 16 latent channels \(1\.weight"):
        tiny(tmp_path / "taesd.pth", SIXTEEN)


def levels_kept(count: int, **options: int) -> tuple[Recorder, list[np.ndarray]]:
    """A recorder after `count` falling levels; frame i shows i."""
    recorder = Recorder(lambda x0: np.full((1, 1, 1, 3), int(x0.max()), np.uint8), **options)
    for step in range(count):
        x = torch.full((1, 1, 1, 1), float(step))
        recorder(Query(x, 100.0 - step), Answer(x))
        recorder(Query(x, 100.0 - step + 0.5), Answer(x + 50))  # back up: not of the way
    return recorder, recorder.frames()


@pytest.mark.parametrize(
    "count, options, expected",
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (6, {"every": 2}, [0, 2, 4, 5]),
        (9, {"most": 4}, [0, 4, 8]),
        (8, {"most": 4}, [0, 2, 4, 6, 7]),
        (20, {"most": 3}, [0, 8, 16, 19]),
    ],
)
def test_a_recorder_keeps_an_even_way_and_its_end(count: int, options: dict[str, int], expected: list[int]) -> None:
    recorder, kept = levels_kept(count, **options)
    assert [int(frame.max()) for frame in kept] == expected
    assert len(recorder.levels) <= recorder.most


def test_a_recorder_watches_a_run(small: Model) -> None:
    job = complete(Job("a red apple", steps=5, sampler="heun", width=16, height=16), small.family)
    recorder = Recorder(full(small))
    run = txt2img.start(job, small, recorder)
    Engine(small).drive([run])
    assert len(recorder.frames()) == 5  # Heun's last step has one evaluation
    assert all(frame.shape == (1, 16, 16, 3) for frame in recorder.frames())
    assert run.result is not None
    assert (recorder.frames()[-1] == full(small)(run.result)).all()  # the last x0 is the picture


def test_recorders_refuse_nonsense() -> None:
    for options in ({"every": 0}, {"most": 1}):
        with pytest.raises(ValueError, match="or more are needed"):
            Recorder(lambda x0: x0.numpy(), **options)


def test_a_strip_shows_first_and_last() -> None:
    shown = frames(10)
    assert strip(shown).shape == (2 + 6 + 2, 2 + 10 * 10, 3)
    chosen = strip(shown, columns=4, gap=0)
    assert (chosen == np.concatenate([shown[0], shown[3], shown[6], shown[9]], axis=1)).all()
    assert (strip(shown, columns=1, gap=0) == shown[9]).all()
    assert (strip(list(shown[:2]), columns=9, gap=0) == np.concatenate([shown[0], shown[1]], axis=1)).all()


def opened(path: Path) -> tuple[list[int], int, list[np.ndarray]]:
    """Milliseconds of each frame, the loop count as written, and the frames."""
    with Image.open(path) as picture:
        times, pixels = [], []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            pixels.append(np.asarray(picture.convert("RGB")))
            times.append(int(picture.info["duration"]))
        return times, picture.info.get("loop", -1), pixels


@pytest.mark.parametrize("loop", [0, 1, 3])
@pytest.mark.parametrize("ending", ["gif", "webp", "GIF"])
def test_moving_pictures_come_back(tmp_path: Path, ending: str, loop: int) -> None:
    shown, path = frames(5), tmp_path / f"way.{ending}"
    save_moving(path, shown, milliseconds=120, loop=loop)
    times, written, pixels = opened(path)
    assert times == [120] * 4 + [960]
    if ending == "webp":
        assert written == loop and all((one == other).all() for one, other in zip(pixels, shown, strict=True))
    else:
        assert written == {0: 0, 1: -1, 3: 2}[loop]
        assert max(np.abs(one.astype(int) - other).max() for one, other in zip(pixels, shown, strict=True)) < 64
    assert [file.name for file in tmp_path.iterdir()] == [f"way.{ending}"]


def test_a_moving_picture_of_one_frame(tmp_path: Path) -> None:
    save_moving(tmp_path / "one.gif", frames(1))
    assert opened(tmp_path / "one.gif")[2][0].shape == (6, 8, 3)


def test_what_cannot_be_saved_is_said_in_a_line(tmp_path: Path) -> None:
    for call, message in (
        (lambda: save_moving(tmp_path / "way.mp4", frames(2)), r"way\.mp4'?: it must end in \.gif or \.webp"),
        (lambda: save_moving(tmp_path / "way.gif", frames(2), milliseconds=5), "milliseconds=5: 10 to 60000"),
        (lambda: save_moving(tmp_path / "way.gif", frames(2), loop=-1), "loop=-1"),
        (lambda: save_moving(tmp_path / "way.gif", []), "frames: there is none"),
        (lambda: strip([frames(1)[0], frames(1, 7)[0]]), r"frame 2 is \(7, 8, 3\) uint8"),
        (lambda: strip(frames(2), columns=0), "columns=0: 1 or more"),
        (lambda: strip(frames(2), gap=-1), "gap=-1"),
        (lambda: LinearMap(((1.0, 1.0, 1.0),))(torch.zeros(3)), "x0: its shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "way.gif"
    save_moving(path, frames(2))
    before = path.read_bytes()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_moving(path, frames(3))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
