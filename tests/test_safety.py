"""Checkers: equal to diffusers' on random weights; what policies do; the small network; word lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sfumato.safety import opennsfw
from sfumato.safety.checking import Verdict, WordList, checked, prompts_of, refuse, treated
from sfumato.safety.choosing import is_at_hand, open_checker
from sfumato.safety.concepts import holds_concepts, open_concepts, prepared
from sfumato.types import Hires, Job, Result

SHAPE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 28, "patch_size": 14}  # fmt: skip


def pictures(count: int = 12, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def tiny_peer(seed: int = 0) -> StableDiffusionSafetyChecker:
    """Random weights, with thresholds in the middle of what random pictures give, so that some are flagged."""
    torch.manual_seed(seed)
    peer = StableDiffusionSafetyChecker(CLIPConfig(vision_config=SHAPE, projection_dim=16)).eval()
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(peer, name).copy_(torch.randn_like(getattr(peer, name)))
        seen = peer.visual_projection(peer.vision_model(prepared(pictures(), 28))[1])
        for name, share in (("concept_embeds", 0.97), ("special_care_embeds", 0.6)):
            cosines = torch.nn.functional.normalize(seen) @ torch.nn.functional.normalize(getattr(peer, name)).T
            getattr(peer, f"{name}_weights").copy_(cosines.quantile(share, dim=0))
    return peer


def peer_says(peer: StableDiffusionSafetyChecker, pixels: np.ndarray, size: int = 28) -> tuple[list[bool], list[dict]]:
    """Its flags, and its scores by our names, which it keeps to itself: read as its forward goes along."""
    given = prepared(pixels, size)
    _, flags = peer(given, [np.zeros((2, 2, 3)) for _ in pixels])
    with torch.no_grad():
        seen = torch.nn.functional.normalize(peer.visual_projection(peer.vision_model(given)[1]))
        parts = {
            name: (seen @ torch.nn.functional.normalize(getattr(peer, f"{name}_embeds")).T).numpy()
            for name in ("special_care", "concept")
        }
    scores = []
    for row in range(len(pixels)):
        own, adjustment = {}, 0.0
        for name, cosines in parts.items():
            for at, cosine in enumerate(cosines[row]):
                weight = getattr(peer, f"{name}_embeds_weights")[at].item()
                own[f"{name} {at}"] = float(round(cosine - weight + adjustment, 3))
                if name == "special_care" and own[f"{name} {at}"] > 0:
                    adjustment = 0.01
        scores.append(own)
    return flags, scores


@pytest.fixture(scope="module")
def peer_folder(tmp_path_factory) -> tuple[StableDiffusionSafetyChecker, Path]:
    folder = tmp_path_factory.mktemp("model")
    peer = tiny_peer()
    peer.save_pretrained(folder / "safety_checker")
    return peer, folder


def test_flags_and_scores_are_diffusers(peer_folder):
    peer, folder = peer_folder
    verdicts = open_concepts(folder / "safety_checker").check(pictures())
    flags, scores = peer_says(peer, pictures())
    assert [verdict.flagged for verdict in verdicts] == flags
    assert 2 < sum(flags) < 11  # both kinds are there
    for verdict, theirs in zip(verdicts, scores, strict=True):
        assert list(verdict.scores) == list(theirs) and len(theirs) == 20
        assert verdict.scores == pytest.approx(theirs, abs=1.001e-3)  # a last digit may round otherwise
        assert sum(verdict.scores[name] != pytest.approx(theirs[name], abs=1e-6) for name in theirs) <= 1
    assert any(score > 0 for verdict in verdicts for name, score in verdict.scores.items() if "special" in name)


def test_special_care_lowers_the_bar(peer_folder):
    _, folder = peer_folder
    checker = open_concepts(folder)
    for name in ("special_care_embeds_weights", "concept_embeds_weights"):
        checker.network.get_buffer(name).fill_(2.0)
    calm = checker.check(pictures(1))[0]
    checker.network.get_buffer("special_care_embeds_weights")[1] = -2.0
    care = checker.check(pictures(1))[0]
    apart = [round(care.scores[name] - calm.scores[name], 3) for name in calm.scores]
    assert apart[:3] == [0, 4.0, 0.01] and set(apart[3:]) <= {0.009, 0.01, 0.011}
    assert not calm.flagged and not care.flagged


@pytest.mark.parametrize("size", [(224, 224), (300, 451), (512, 384), (64, 64), (80, 85), (165, 110)])
def test_pictures_are_prepared_as_transformers_does(size):
    pixels = np.random.default_rng(1).integers(0, 256, (1, *size, 3)).astype(np.uint8)
    theirs = CLIPImageProcessorPil()(Image.fromarray(pixels[0]), return_tensors="pt").pixel_values
    assert torch.allclose(prepared(pixels, 224), theirs, atol=1e-5)


def test_the_checker_is_found_wherever_it_is(peer_folder, tmp_path):
    peer, folder = peer_folder
    state = {name: tensor.detach().clone() for name, tensor in peer.state_dict().items()}
    old = {name.replace("vision_model.", "vision_model.vision_model.", 1): tensor for name, tensor in state.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    config = (folder / "safety_checker" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)  # its tower has heads of 8, not of 64
    torch.save(old, tmp_path / "pytorch_model.bin")
    inside = {f"safety_checker.{name}": tensor for name, tensor in state.items()}
    save_file({**inside, "model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "whole.safetensors")
    wanted = open_concepts(folder).check(pictures())
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "whole.safetensors"):
        assert holds_concepts(path)
        assert open_concepts(path).check(pictures()) == wanted


def test_what_is_no_checker_is_said(peer_folder, tmp_path):
    peer, _ = peer_folder
    state = {name: tensor.detach().clone() for name, tensor in peer.state_dict().items()}
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert not holds_concepts(tmp_path / "other.safetensors") and not holds_concepts(tmp_path)
    with pytest.raises(ValueError, match="it holds no safety checker"):
        open_concepts(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no model.safetensors or pytorch_model.bin in it"):
        open_concepts(tmp_path)
    save_file({k: v for k, v in state.items() if k != "concept_embeds_weights"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"no tensor concept_embeds_weights; \(17,\) is needed"):
        open_concepts(tmp_path / "less.safetensors")
    save_file({**state, "concept_embeds_more": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="concept_embeds_more is not of this checker"):
        open_concepts(tmp_path / "more.safetensors")


class Odd:
    """Flags every second picture."""

    name = "odd"

    def check(self, pixels: np.ndarray) -> list[Verdict]:
        return [Verdict(index % 2 == 1, {"odd": float(index % 2)}, self.name) for index in range(len(pixels))]


def result_of(images: np.ndarray) -> Result:
    job = Job(prompt="a", count=len(images))
    return Result(images=images, job=job, seeds=(0,) * len(images), seconds=0.0, model_name="m", model_hash="0",
                  precision="fp32", made_with={})  # fmt: skip


@pytest.mark.parametrize("policy", ["off", "report", "blur", "withhold"])
def test_policies(policy):
    drawn = result_of(pictures(4))
    shown = checked(drawn, Odd(), policy)
    assert np.array_equal(drawn.images, pictures(4)), "what was drawn stays"
    assert [verdict.flagged for verdict in shown.verdicts] == ([] if policy == "off" else [False, True, False, True])
    after = shown.result.images
    assert after.shape == drawn.images.shape and after.dtype == np.uint8
    assert np.array_equal(after[::2], drawn.images[::2])
    if policy in ("off", "report"):
        assert np.array_equal(after, drawn.images)
    elif policy == "withhold":
        assert (after[1::2] == 128).all()
    else:
        assert after[1::2].std(axis=(1, 2)).max() < 0.1 * drawn.images[1::2].std(axis=(1, 2)).min()
        assert np.array_equal(after[1], treated(drawn.images[1], "blur"))


def test_a_policy_needs_a_checker_and_a_name():
    with pytest.raises(ValueError, match="safety='blur': a checker is needed"):
        checked(result_of(pictures(1)), None, "blur")
    with pytest.raises(ValueError, match="safety='loud': one of off, report, blur, withhold"):
        checked(result_of(pictures(1)), Odd(), "loud")
    assert checked(result_of(pictures(1)), None, "off").verdicts == ()


def test_word_lists(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# of a school\nblood\nvery  Bad thing\nStraße\n\n", encoding="utf-8")
    check = WordList(words)
    for prompt in ("blood", "A BLOOD moon", "a very bad\nthing, indeed", "STRASSE"):
        assert check.check(prompt).flagged
    for prompt in ("", "bloody", "a bad thing", "hot-bloodedly", "school"):
        assert not check.check(prompt).flagged
    with pytest.raises(ValueError, match=r"prompt: refused by word list words.txt \(blood\)"):
        refuse(["a cat", "blood"], [check])
    refuse(["a cat"], [check])
    assert prompts_of(Job("a cat", "blood")) == prompts_of(Job("a cat", hires=Hires())) == ["a cat"]
    with pytest.raises(ValueError, match="refused"):
        refuse(prompts_of(Job("a cat", hires=Hires(prompt="blood"))), [check])
    words.write_text("# nothing\n")
    with pytest.raises(ValueError, match="it holds no word"):
        WordList(words)
    with pytest.raises(ValueError, match="No such file"):
        WordList(tmp_path / "none.txt")


class TestOpenNsfw:
    """The network of the package, whose score of a photograph is known from its own program."""

    def test_it_scores_pictures(self):
        y, x = np.mgrid[:300, :400]
        calm = np.stack([x * 255 // 400, y * 255 // 300, (x + y) % 256], axis=-1).astype(np.uint8)
        verdicts = opennsfw.OpenNsfw().check(np.stack([calm, calm[:, ::-1]]))
        assert [verdict.flagged for verdict in verdicts] == [False, False]
        assert all(0 <= verdict.scores["nsfw"] < 0.5 for verdict in verdicts)
        assert verdicts[0].scores != verdicts[1].scores and verdicts[0].checker == "opennsfw"

    def test_its_threshold_decides(self):
        assert all(verdict.flagged for verdict in opennsfw.OpenNsfw(threshold=1e-9).check(pictures(2)))

    def test_colours_come_in_the_right_order(self):
        red = np.zeros((50, 70, 3), np.uint8)
        red[..., 0] = 200
        given = opennsfw.prepared(red)
        assert given.shape == (224, 224, 3) and given[0, 0].tolist() == [-104, -117, 77]

    def test_without_its_file(self, tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            opennsfw.OpenNsfw(tmp_path / "none.onnx")
        (tmp_path / "bad.onnx").write_bytes(b"no network")
        with pytest.raises(ValueError, match="no ONNX file"):
            opennsfw.OpenNsfw(tmp_path / "bad.onnx")


def test_which_checker_looks(peer_folder, tmp_path, monkeypatch):
    _, folder = peer_folder
    assert open_checker(None, str(folder)).name == "stable-diffusion-safety-checker"
    assert open_checker("opennsfw", str(folder)).name == "opennsfw"
    assert open_checker(str(folder / "safety_checker")).name == "stable-diffusion-safety-checker"
    assert open_checker(None, str(tmp_path)).name == "opennsfw"
    monkeypatch.setattr(opennsfw, "PACKAGE", "no_such_package_at_all")
    assert is_at_hand(str(folder)) and not is_at_hand(str(tmp_path)) and not is_at_hand(None)
    with pytest.raises(ValueError, match="none is at hand"):
        open_checker(None, str(tmp_path))


def test_verdicts_are_json():
    verdict = Verdict(True, {"nsfw": 0.9}, "opennsfw")
    assert json.loads(json.dumps(verdict.to_dict())) == {
        "flagged": True,
        "scores": {"nsfw": 0.9},
        "checker": "opennsfw",
    }
