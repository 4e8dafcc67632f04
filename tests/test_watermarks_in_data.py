"""The detector of visible watermarks: its network beside transformers', its file's names, and `data score --watermark`.

The published weights were not at hand: what is held here is the network, the names, the preparation and the order of
its answers, not how well it finds watermarks.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel

from sfumato.cli.main import main
from sfumato.models.efficientnet import EfficientNetB3, WatermarkDetector
from sfumato.train.data.watermarks import as_input, load_detector, watermark_probs


def randomised(network):
    """Random weights that keep their scale, batch norms of their own, as if trained."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2, generator=generator)
        elif "running_mean" in name or name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.ndim >= 2:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def detector():
    return randomised(WatermarkDetector())


@pytest.fixture(scope="module")
def file(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "watermark_model_v1.pt"
    torch.save(detector.state_dict(), path)
    return path


def test_the_network_is_transformers_with_padding_alike_on_all_sides():
    config = EfficientNetConfig(width_coefficient=1.2, depth_coefficient=1.4, hidden_dim=1536, batch_norm_eps=1e-5)
    theirs = EfficientNetModel(config).eval()
    theirs.embeddings.padding = nn.ZeroPad2d(1)
    for module in theirs.modules():
        if hasattr(module, "depthwise_conv_pad"):
            module.depthwise_conv_pad = nn.ZeroPad2d(module.depthwise_conv.kernel_size[0] // 2)
    ours = randomised(EfficientNetB3())
    pairs = list(zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True))
    assert all(a.shape == b.shape for (_, a), (_, b) in pairs)
    theirs.load_state_dict({name: tensor for (_, tensor), (name, _) in pairs})
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, wanted = ours(images), theirs(images).pooler_output
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max())) and wanted.std() > 0.01


def test_the_names_and_shapes_of_the_published_file():
    """Those that timm gives efficientnet_b3, with the head of LAION's example."""
    shapes = {name: tuple(tensor.shape) for name, tensor in WatermarkDetector().state_dict().items()}
    wanted = {
        "conv_stem.weight": (40, 3, 3, 3),
        "bn1.running_mean": (40,),
        "blocks.0.0.conv_dw.weight": (40, 1, 3, 3),
        "blocks.0.0.se.conv_reduce.weight": (10, 40, 1, 1),
        "blocks.0.1.conv_pw.weight": (24, 24, 1, 1),
        "blocks.1.0.conv_pw.weight": (144, 24, 1, 1),
        "blocks.2.0.conv_dw.weight": (192, 1, 5, 5),
        "blocks.5.5.conv_pwl.weight": (232, 1392, 1, 1),
        "blocks.6.1.se.conv_expand.weight": (2304, 96, 1, 1),
        "conv_head.weight": (1536, 384, 1, 1),
        "classifier.0.weight": (625, 1536),
        "classifier.3.weight": (256, 625),
        "classifier.5.weight": (2, 256),
    }
    assert {name: shapes.get(name) for name in wanted} == wanted
    # Tan & Le's 12 million with 1,000 classes: 10.70 without their last layer
    assert sum(p.numel() for p in EfficientNetB3().parameters()) == 10_696_232


def test_pictures_become_a_square_and_the_first_answer_is_the_watermark(detector):
    grey = as_input(np.full((30, 90, 3), 128, np.uint8))
    assert grey.shape == (3, 256, 256)
    wanted = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(grey[:, 7, 9], wanted, atol=1e-5)
    batch = torch.stack([grey, -grey])
    with torch.inference_mode():
        logits = detector(batch)
    assert torch.allclose(watermark_probs(detector, batch), 1 / (1 + (logits[:, 1] - logits[:, 0]).exp()), atol=1e-6)


def test_a_file_with_old_or_wrapped_names_loads(detector, file, tmp_path):
    old = {f"module.{k}": v for k, v in detector.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    image = as_input(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[None]
    wanted = watermark_probs(detector, image)
    for path in (file, tmp_path / "old.pt"):
        assert torch.equal(watermark_probs(load_detector(path), image), wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("conv_stem.weight"), "no tensor conv_stem.weight; LAION's"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), r"bn1.bias is \(3,\), \(40,\) is needed"),
        (lambda state: state.update({"fc.weight": torch.zeros(3)}), "fc.weight is not of this network"),
    ],
)
def test_another_file_is_refused(detector, tmp_path, change, message):
    state = detector.state_dict()
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_detector(tmp_path / "other.pt")


def test_the_command(detector, file, tmp_path, capsys):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    pictures = [rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8) for index in range(3)]
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a thing")
    (folder / "9.png").write_bytes(b"broken")
    (folder / "9.txt").write_text("a thing")
    out = tmp_path / "scores.jsonl"
    assert main(["data", "score", str(folder), "--watermark", str(file), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = watermark_probs(detector, torch.stack([as_input(pixels) for pixels in pictures])).tolist()
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert [row["pwatermark"] for row in rows] == pytest.approx(wanted, abs=2e-6)
    assert "9.png" in capsys.readouterr().out
    middle = sorted(row["pwatermark"] for row in rows)[1]
    where = ["--facts", str(out), "--where", f"pwatermark < {middle}"]
    assert main(["data", "filter", str(folder), str(tmp_path / "out"), *where]) == 0
    assert "1 of 4 stay" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--watermark", "FILE", "--predictor", "p.pth"], "predictor: one of --predictor and --watermark"),
        ([], "predictor: one of --predictor and --watermark"),
        (["--watermark", "FILE", "--column", "x"], "column='x': it goes with --predictor"),
        (["--watermark", "none.pt"], "none.pt"),
    ],
)
def test_bad_flags_are_one_line(file, tmp_path, capsys, flags, message):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "0.txt").write_text("a thing")
    words = [word.replace("FILE", str(file)) for word in flags]
    assert main(["data", "score", str(tmp_path / "a"), *words, "--out", str(tmp_path / "s.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
