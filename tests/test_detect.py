"""Which family a file is taken for, and why: at the true shapes, without a byte of weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sfumato.families import FAMILIES, Family, find_family
from sfumato.families.detect import V_BIAS, Clues, detect, other_kind
from sfumato.weights.layouts.original_names import part_table, rightly_unused
from sfumato.weights.layouts.tables import stored_shape
from sfumato.weights.parts import shapes_of

Shapes = dict[str, tuple[int, ...]]


@cache
def stored_shapes(family: Family) -> Shapes:
    """Names and shapes of the family's single file at full size."""
    shapes: Shapes = {}
    for part, ours in shapes_of(family).items():
        for name, place in part_table(family, part, ours).items():
            shapes[place.name] = stored_shape(ours[name], place.change)
    return shapes


def found(shapes: Shapes, **clues) -> str:
    return detect(shapes, Clues(clues.pop("metadata", {}), **clues)).family.name


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("box", "sd1-v", "sd2-base", "xl-v")])
def test_by_shapes_alone(name: str) -> None:
    family = find_family(name)
    detection = detect(stored_shapes(family), Clues({}))
    assert detection.family == family
    assert detection.sure == (name != "sd2"), "of 2.x both predictions are common; v models of 1.x and XL are marked"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_header_decides(name: str) -> None:
    family = find_family(name)
    detection = detect({}, Clues({"sfumato.family": family.to_json()}))
    assert detection.family == family
    assert detection.sure


@pytest.mark.parametrize(
    "clues, base, v",
    [
        ({"metadata": {"modelspec.prediction_type": "v"}}, "sd2", "sd2"),
        ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "sd2-base", "sd2-base"),
        ({"metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}, "sd2", "sd2"),
        ({"yaml_prediction": "v"}, "sd2", "sd2"),
        ({"yaml_prediction": "eps"}, "sd2-base", "sd2-base"),
        ({"name": "512-base-ema"}, "sd2-base", "sd2-base"),
        ({"name": "v2-1_512-ema-pruned"}, "sd2-base", "sd2-base"),
        ({"name": "v2-1_768-ema-pruned"}, "sd2", "sd2"),
        ({"name": "768-v-ema"}, "sd2", "sd2"),
        ({"read": lambda name: torch.full((320,), 0.0)}, "sd2-base", "sd2-base"),
        ({"read": lambda name: torch.linspace(-1, 1, 320)}, "sd2", "sd2"),
    ],
)
def test_prediction_of_sd2(clues: dict, base: str, v: str) -> None:
    shapes = stored_shapes(FAMILIES["sd2"])
    assert V_BIAS in shapes
    detection = detect(shapes, Clues(**{"metadata": {}, **clues}))
    assert detection.family.name == base == v
    assert detection.sure


def test_prediction_of_fine_tunes() -> None:
    xl, sd1 = stored_shapes(FAMILIES["xl"]), stored_shapes(FAMILIES["sd1"])
    assert found(xl | {"v_pred": (0,)}) == "xl-v"
    assert found(sd1, name="some_vpred_model") == "sd1-v"
    assert found(sd1, name="deliberate_v2") == "sd1", "a version is no prediction"
    both = detect(xl | {"v_pred": (0,), "ztsnr": (0,)}, Clues({}))
    assert both.family.schedule.zero_terminal_snr
    assert "ztsnr" in both.why
    assert rightly_unused("ztsnr", both.family)


@pytest.mark.parametrize(
    "names, words",
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["encoder.down.0.block.0.norm1.weight"], "an autoencoder alone"),
        (["text_model.embeddings.position_ids"], "a text encoder alone"),
        (["emb_params"], "a textual inversion"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "SD 3"),
        (["conv_first.weight"], "an upscaler"),
        (["something"], "no Stable Diffusion checkpoint"),
    ],
)
def test_other_files_are_named(names: list[str], words: str) -> None:
    assert words in other_kind(names)
    with pytest.raises(ValueError, match=words):
        detect(dict.fromkeys(names, (4, 4)), Clues({}))


def test_unknown_sizes_are_told() -> None:
    shapes = dict(stored_shapes(FAMILIES["sd1"]))
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, 7, 3, 3)
    with pytest.raises(ValueError, match=r"7 input channels.*no known family"):
        detect(shapes, Clues({}))
    with pytest.raises(ValueError, match="Playground"):
        detect(stored_shapes(FAMILIES["xl"]) | {"edm_mean": (4,)}, Clues({}))


def test_parameter_counts() -> None:
    def count(name: str, part: str) -> int:
        return sum(torch.Size(shape).numel() for shape in shapes_of(FAMILIES[name])[part].values())

    assert count("sd1", "unet") == 859_520_964
    assert count("sd1", "text") == 123_060_480
    assert count("sd1", "autoencoder") == 83_653_863
    assert count("sd2", "unet") == 865_910_724
    assert count("xl", "unet") == 2_567_463_684
