"""Annotators: what each finds in pictures of known content, HED against a plain computation, the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate, zoom

from sfumato.cli.main import main
from sfumato.images.annotate import ANNOTATORS, annotate, find_annotator
from sfumato.images.annotate.registry import Option
from sfumato.models.hed import HED, HEDConfig
from sfumato.weights.controls.hed import MEAN, load_hed, soft_edges
from sfumato.weights.files import save_safetensors

SMALL = HEDConfig((4, 5, 6, 7, 8), (2, 2, 3, 3, 3))


def square(size: int = 96) -> np.ndarray:
    """A white square on black."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[24:72, 24:72] = 255
    return pixels


def noise(height: int = 70, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_every_annotator_keeps_the_size_and_has_a_summary(name: str) -> None:
    if name in ("canny", "lines"):
        pytest.importorskip("cv2")
    found = find_annotator(name)
    assert found.summary
    for option in found.options:
        assert option.checked(option.default) == option.default and option.what
    network = None if found.network is None else lambda pixels: pixels[:, :, 0].astype(np.float32) / 255
    pixels = noise()
    before = pixels.copy()
    hint = annotate(pixels, name, network)
    assert (hint.shape, hint.dtype) == (pixels.shape, np.uint8)
    assert np.array_equal(pixels, before) and hint.flags.writeable


def test_canny_is_opencvs_and_its_thresholds_count() -> None:
    cv2 = pytest.importorskip("cv2")
    assert np.array_equal(annotate(noise(), "canny", low=50, high=90)[:, :, 1], cv2.Canny(noise(), 50, 90))
    edges = annotate(square(), "canny")
    assert 150 < np.count_nonzero(edges[:, :, 0]) < 220  # the outline, one pixel wide: 4 * 48
    assert not edges[40:56, 40:56].any()
    faint = square() // 16
    assert not annotate(faint, "canny").any() and annotate(faint, "canny", low=5, high=20).any()
    with pytest.raises(ValueError, match="low=300: it must not be above high=200"):
        annotate(square(), "canny", low=300)


def test_lines_are_straight_and_long_enough() -> None:
    pytest.importorskip("cv2")
    drawn = annotate(square(), "lines")[:, :, 0]
    ys, xs = np.nonzero(drawn)
    on_outline = (np.minimum(abs(ys - 24), abs(ys - 72)) <= 3) | (np.minimum(abs(xs - 24), abs(xs - 72)) <= 3)
    assert len(ys) > 150 and on_outline.all()
    assert not annotate(square(), "lines", length=60).any()
    thick = annotate(square(), "lines", width=6)
    assert np.count_nonzero(thick) > 2 * np.count_nonzero(drawn[:, :, None].repeat(3, 2)) // 3 * 2
    assert not annotate(np.full((40, 40, 3), 90, np.uint8), "lines").any()


def test_scribble_draws_dark_lines_only() -> None:
    paper = np.full((64, 64, 3), 255, dtype=np.uint8)
    paper[:, 30:34] = 0
    drawn = annotate(paper, "scribble")[:, :, 0]
    assert (drawn[:, 31:33] == 255).all() and not drawn[:, :20].any() and not drawn[:, 45:].any()
    red = np.full((64, 64, 3), 255, dtype=np.uint8)
    red[:, 30:34, 1:] = 0  # the red channel is as bright as the paper
    assert not annotate(red, "scribble").any()
    assert not annotate(255 - paper, "scribble", threshold=254)[:, 31:33].any()


def test_plain_annotators_are_what_they_say() -> None:
    pixels = noise(128, 192)
    assert np.array_equal(annotate(pixels, "invert"), 255 - pixels)
    grey = annotate(pixels, "grey")
    weights = np.rint(pixels @ np.array([0.299, 0.587, 0.114]))
    assert abs(grey[:, :, 2].astype(int) - weights).max() <= 1
    assert np.array_equal(annotate(pixels, "threshold", level=99)[:, :, 0] == 255, grey[:, :, 0] > 99)
    blocks = annotate(pixels, "colour")
    assert len(np.unique(blocks.reshape(-1, 3), axis=0)) == 6
    assert (blocks[:64, :64] == blocks[0, 0]).all() and (blocks[64:, 128:] == blocks[-1, -1]).all()
    assert np.array_equal(annotate(pixels, "tile", factor=1), pixels)
    flat = np.full((60, 40, 3), 77, dtype=np.uint8)
    for name in ("tile", "blur", "colour"):
        assert np.array_equal(annotate(flat, name), flat)
    assert annotate(pixels, "blur").std() < annotate(pixels, "blur", sigma=1).std() < pixels.std()
    assert annotate(pixels, "tile", factor=16).std() < annotate(pixels, "tile", factor=2).std() < pixels.std()


def test_scribbles_from_soft_edges_follow_the_ridge() -> None:
    y = np.arange(64, dtype=np.float32)
    ridge = np.exp(-(((y - 30) / 6) ** 2))[:, None] * np.linspace(0.8, 1, 64, dtype=np.float32)  # else all is a ridge
    drawn = annotate(noise(64, 64), "scribble-hed", lambda pixels: ridge)[:, :, 0]
    rows = np.nonzero(drawn[:, 4:-4].any(axis=1))[0]
    assert drawn[30, 4:-4].all() and rows.min() >= 23 and rows.max() <= 37
    assert not annotate(noise(64, 64), "scribble-hed", lambda pixels: 0.3 * ridge).any()
    soft = annotate(noise(64, 64), "hed", lambda pixels: ridge)[:, 5, 0]
    assert abs(soft - 255 * ridge[:, 5]).max() <= 0.51


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="annotator='cany': one of tile, blur"):
        annotate(square(), "cany")
    with pytest.raises(ValueError, match="low: blur has no such option, but sigma"):
        annotate(square(), "blur", low=3)
    with pytest.raises(ValueError, match=r"sigma=0: a number from 0.1 to 100.0 is needed"):
        annotate(square(), "blur", sigma=0)
    with pytest.raises(ValueError, match=r"level=1.5: a whole number from 0 to 254"):
        annotate(square(), "threshold", level=1.5)
    with pytest.raises(ValueError, match="level=nan: a number is needed"):
        annotate(square(), "threshold", level=float("nan"))
    with pytest.raises(ValueError, match="annotator='hed': it needs a network that finds edges"):
        annotate(square(), "hed")
    with pytest.raises(ValueError, match=r"image=uint8 \(96, 96\)"):
        annotate(square()[:, :, 0], "grey")
    assert Option("a", 2, 0, 5, "").whole and not Option("a", 2.0, 0, 5, "").whole


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ValueError, match=r"annotator='canny': it needs OpenCV: pip install \"sfumato\[annotate\]\""):
        annotate(square(), "canny")


# -- HED --------------------------------------------------------------------------------------------------------------


def random_hed(seed: int = 0) -> HED:
    network = HED(SMALL).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim == 4 else 0.1
        if name == "block1.convs.0.weight":
            scale *= 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    network.norm.copy_(torch.tensor(MEAN).reshape(1, 3, 1, 1))
    return network


def plain_hed(kernels: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """HED as its authors' network computes, from arrays in a Keras file's order, by loops: BGR less its mean."""

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        kernel, bias = kernels[f"{name}/vars/0"], kernels[f"{name}/vars/1"]
        out = np.zeros((*x.shape[:2], kernel.shape[3]))
        for o in range(kernel.shape[3]):
            for i in range(kernel.shape[2]):
                out[:, :, o] += correlate(x[:, :, i], kernel[:, :, i, o], mode="constant")
            out[:, :, o] += bias[o]
        return out

    x = pixels[:, :, ::-1].astype(np.float64) - MEAN[::-1]
    sides = []
    for scale, count in enumerate(SMALL.convs, 1):
        if scale > 1:
            x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max(axis=(1, 3))
        for number in range(count):
            x = np.maximum(conv(x, f"block{scale}/layers/conv2d{f'_{number}' if number else ''}"), 0)
        factor = 2 ** (scale - 1)
        side = conv(x, f"dsn{scale}")[:, :, 0]
        sides.append(zoom(side, factor, order=1, mode="nearest", grid_mode=True))
    return 1 / (1 + np.exp(-(np.stack(sides, axis=2) @ kernels["fuse/vars/0"][0, 0, :, 0] + kernels["fuse/vars/1"])))


def test_hed_from_a_keras_file_is_the_plain_computation(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    generator = np.random.default_rng(3)
    kernels: dict[str, np.ndarray] = {}
    before = 3
    for scale, (width, count) in enumerate(zip(SMALL.widths, SMALL.convs, strict=True), 1):
        for number in range(count):
            name = f"block{scale}/layers/conv2d{f'_{number}' if number else ''}"
            kernels[f"{name}/vars/0"] = generator.normal(size=(3, 3, before, width)) * (9 * before) ** -0.5
            kernels[f"{name}/vars/1"] = generator.normal(size=width) * 0.1
            before = width
        kernels[f"dsn{scale}/vars/0"] = generator.normal(size=(1, 1, width, 1)) * 0.02
        kernels[f"dsn{scale}/vars/1"] = generator.normal(size=1) * 0.1
    kernels["fuse/vars/0"], kernels["fuse/vars/1"] = generator.normal(size=(1, 1, 5, 1)), np.array([0.1])
    kernels = {name: array.astype(np.float32) for name, array in kernels.items()}
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for name, array in kernels.items():
            file[name] = array
        file.create_group("block2/layers/max_pooling2d/vars")
    network = load_hed(tmp_path / "hed.weights.h5")
    pixels = noise(32, 48)
    found, expected = soft_edges(network, pixels), plain_hed(kernels, pixels)
    assert found.shape == (32, 48) and found.dtype == np.float32 and expected.std() > 0.02
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert soft_edges(network, noise(33, 47)).shape == (33, 47)


def test_controlnets_file_takes_the_mean_of_the_ways_out(tmp_path: Path) -> None:
    network = random_hed()
    network.fuse.weight.fill_(0.2)
    network.fuse.bias.zero_()
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fuse")}
    torch.save(state, tmp_path / "ControlNetHED.pth")
    save_safetensors(tmp_path / "hed.safetensors", state, {})
    expected = soft_edges(network, noise())
    assert expected.std() > 0.001
    for name in ("ControlNetHED.pth", "hed.safetensors"):
        np.testing.assert_allclose(soft_edges(load_hed(tmp_path / name), noise()), expected, atol=1e-6)


def test_other_files_are_no_hed(tmp_path: Path) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            load_hed(tmp_path / name)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("weights=")

    refused("none.pth", "no such file")
    save_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    refused("a.safetensors", "block1.convs.0.weight is missing: these are no weights of HED")
    state = random_hed().state_dict()
    save_safetensors(tmp_path / "b.safetensors", state | {"x": torch.zeros(1)}, {})
    refused("b.safetensors", "the tensor x is in no HED")
    save_safetensors(tmp_path / "c.safetensors", state | {"norm": torch.zeros(3)}, {})
    refused("c.safetensors", r"the tensor norm is torch.float32 \(3,\)")
    (tmp_path / "d.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    pytest.importorskip("h5py")
    refused("d.h5", "not a readable HDF5 file")


def test_full_size_has_vgg16s_convolutions() -> None:
    with torch.device("meta"):
        network = HED()
    vgg16 = 14_714_688  # the convolutions' parameters, Simonyan and Zisserman 2015
    assert sum(p.numel() for p in network.parameters()) == vgg16 + (64 + 128 + 256 + 512 + 512 + 5) + 6 + 3


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_picture_becomes_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    Image.fromarray(square()).save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    words = ["annotate", "canny", str(tmp_path / "in.png"), str(out), "--low", "10", "--high", "20", "--size", "64x32"]
    assert main(words) == 0
    assert Image.open(out).size == (64, 32)
    assert capsys.readouterr().out == f"{out}\n"
    assert main([*words[:4], "--low", "10", "--high", "20"]) == 0
    assert np.array_equal(np.asarray(Image.open(out)), annotate(square(), "canny", low=10, high=20))


def test_a_folder_is_done_and_bad_pictures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(noise()).save(folder / f"{name}.png")
    (folder / "bad.png").write_bytes(b"nothing")
    assert main(["annotate", "invert", str(folder), str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out.split() == [str(tmp_path / "out" / f"{name}.png") for name in ("a", "b")]
    assert told.err.count("\n") == 1 and "error: picture=" in told.err and "bad.png" in told.err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/a.png")), 255 - noise())


def test_hed_with_weights(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "hed.safetensors", random_hed().state_dict(), {})
    Image.fromarray(noise()).save(tmp_path / "in.png")
    words = ["annotate", "hed", str(tmp_path / "in.png"), str(tmp_path / "out.png")]
    assert main([*words, "--weights", str(tmp_path / "hed.safetensors")]) == 0
    expected = np.rint(soft_edges(random_hed(), noise()) * 255)
    found = np.asarray(Image.open(tmp_path / "out.png"))[:, :, 0]
    assert found.std() > 1 and abs(found - expected).max() <= 1  # they may round to either side


@pytest.mark.parametrize(
    "words, message",
    [
        (["nothing", "in.png", "out.png"], "annotator='nothing': one of"),
        (["grey", "in.png"], "out=None"),
        (["grey", "in.png", "out.jpg"], "out='out.jpg': a .png file"),
        (["grey", "in.png", "in.png"], "the hint would replace the picture in.png"),
        (["grey", "in.png", "other/in.png", "out"], "in.png and in.png would both become in.png"),
        (["grey", "in.png", "out.png", "--sigma", "3"], "sigma: grey has no such option, but none"),
        (["blur", "in.png", "out.png", "--size", "0x3"], "size='0x3': width x height"),
        (["blur", "in.png", "out.png", "--weights", "x.pth"], "weights='x.pth': blur needs none"),
        (["depth", "in.png", "out.png"], "weights=None: a depth network's .onnx file"),
        (["hed", "in.png", "out.png", "--weights", "x.pth"], "weights='x.pth': no such file"),
        (["grey", "none.png", "out.png"], "picture='none.png'"),
    ],
)
def test_bad_words_are_one_line_and_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise()).save("in.png")
    assert main(["annotate", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
