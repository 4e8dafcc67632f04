"""Diffusers folders both ways: what we write is loaded by diffusers and transformers, what they write by us.

Each kind of family at a tiny size, with all weights random, so that no two tensors can be exchanged unseen; the
published configs (the fields that they hold, not their files) and the full-size families as JSON only.
"""

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.diffusion.schedule import NoiseSchedule
from sfumato.families import FAMILIES, Family
from sfumato.models.autoencoder import Autoencoder
from sfumato.models.clip import CLIPText
from sfumato.models.layers import timestep_embedding
from sfumato.models.tokenizer import ClipTokenizer
from sfumato.models.unet import UNet
from sfumato.weights.checkpoint import load_model
from sfumato.weights.layouts.diffusers_configs import components, configs_of, family_of, folder_files, stored_layers
from sfumato.weights.layouts.diffusers_names import (
    autoencoder_keys,
    canonical,
    component_files,
    rightly_unused,
    text_keys,
    unet_keys,
)
from sfumato.weights.layouts.diffusers_tokenizer import check_vocabulary
from sfumato.weights.layouts.tables import Table, from_layout, to_layout

SIZE_DIM, POOLED, VOCAB = 8, 12, 600
log = logging.getLogger(__name__)  # figures are seen with --log-cli-level=INFO


# -- tiny families ----------------------------------------------------------------------------------------------------


def tiny(family: Family) -> Family:
    """The family's structure at widths of 8."""
    towers = tuple(
        replace(
            tower,
            config=replace(
                tower.config,
                vocab_size=VOCAB,
                width=16,
                num_layers=3,
                num_heads=2,
                projection=tower.config.projection and POOLED,
            ),
        )
        for tower in family.texts
    )
    numbers = {"original": 2, "crop": 2, "target": 2, "aesthetic": 1}
    vector = POOLED + SIZE_DIM * sum(numbers[name] for name in family.size_cond)
    unet = replace(
        family.unet,
        channels=8,
        num_res_blocks=1,
        transformer_depth=tuple(min(depth, 2 + place) for place, depth in enumerate(family.unet.transformer_depth)),
        middle_depth=min(family.unet.middle_depth, 2 + len(family.unet.transformer_depth) - 1),
        context_dim=16 * len(towers),
        num_heads=family.unet.num_heads if family.unet.head_channels else 2,
        head_channels=family.unet.head_channels and 4,
        vector_dim=family.unet.vector_dim and vector,
        norm_groups=4,
        num_classes=family.unet.num_classes and 30,
    )
    if family.name == "xl-refiner":  # one depth for all
        unet = replace(unet, transformer_depth=(0, 2, 2, 0), middle_depth=2)
    autoencoder = replace(family.autoencoder, channels=4, num_res_blocks=1, norm_groups=2)
    size_dim = SIZE_DIM if family.size_cond else family.size_dim
    return replace(family, name="tiny", texts=towers, unet=unet, autoencoder=autoencoder, size=64, size_dim=size_dim)


KINDS = [
    "sd1", "sd1-inpaint", "sd1-edit", "sd2", "sd2-base", "sd2-inpaint", "sd2-depth", "sd2-upscaler",
    "xl", "xl-inpaint", "xl-refiner", "box",
]  # fmt: skip


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Matrices of deviation fan_in^-0.5, vectors 0.2 about what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * noise)
    return module.eval().requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(family: Family) -> dict[str, nn.Module]:
    texts = [CLIPText(tower.config) for tower in family.texts]
    parts = {"unet": UNet(family.unet), "autoencoder": Autoencoder(family.autoencoder)}
    return {**parts, **dict(zip(family.text_parts, texts, strict=True))}


@functools.cache
def table(family: Family, part: str) -> Table:
    if part == "unet":
        return unet_keys(family.unet)
    if part == "autoencoder":
        return autoencoder_keys(family.autoencoder)
    return text_keys(family.texts[family.text_parts.index(part)].config, num_layers=stored_layers(family, part))


def write_folder(folder: Path, family: Family, parts: Mapping[str, nn.Module]) -> None:
    for path, text in folder_files(family).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    for part, component in components(family).items():
        keys = table(family, part)
        state = to_layout({name: tensor for name, tensor in parts[part].state_dict().items() if name in keys}, keys)
        stem = "diffusion_pytorch_model" if component in ("unet", "vae") else "model"
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, str(folder / component / f"{stem}.safetensors"), {"format": "pt"})


def read_configs(folder: Path) -> dict[str, Any]:
    paths = [path for path in folder.glob("**/*.json") if path.name not in ("vocab.json", "tokenizer.json")]
    return {path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def read_parts(folder: Path, family: Family) -> dict[str, nn.Module]:
    """Our networks with a folder's weights, strictly."""
    parts = build(family)
    for part, component in components(family, read_configs(folder)).items():
        state: dict[str, Tensor] = {}
        for path in component_files(folder, component):
            state |= {canonical(component, name): tensor for name, tensor in load_file(str(path)).items()}
        state = {name: tensor for name, tensor in state.items() if not rightly_unused(component, name)}
        parts[part].load_state_dict(from_layout(state, table(family, part)), strict=True)
        parts[part].eval().requires_grad_(False)
    return parts


def load_pipeline(folder: Path) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("depth_estimator", "feature_extractor") if "depth_estimator" in index}
    pipe = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- outputs ----------------------------------------------------------------------------------------------------------


def agree(what: str, ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.03, f"{what} must say something"
    log.info("%s: worst difference %.1e of deviation %.1e", what, float((ours - theirs).abs().max()), theirs.std())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # diffusers before 0.15
PROMPTS = ["a red cube, it's 3 o'clock", "ένα café\n in the RAIN"]


def context(family: Family, parts: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Our text encoders' states, joined, and the last one's pooled text."""
    states, pooled = [], None
    for part, tower in zip(family.text_parts, family.texts, strict=True):
        tokenizer = ClipTokenizer(tower.config.vocab_size)
        ids = torch.tensor([tokenizer.pad(tokenizer.encode(text), 77, tower.pad_token) for text in PROMPTS])
        states.append(parts[part](ids, tower.skip_last, tower.final_norm))
        if tower.config.projection is not None:
            pooled = parts[part].forward_pooled(ids)[1]
    return torch.cat(states, dim=-1), pooled


def compare(family: Family, parts: Mapping[str, nn.Module], pipe: Any) -> None:
    """Every network's outputs, and prompts through the pipeline's own encoding."""
    with torch.inference_mode():
        compare_text(family, parts, pipe)
        compare_unet(family.unet.in_channels, parts["unet"], pipe.unet)
        z, images = randn(2, family.autoencoder.latent_channels, 4, 6), randn(2, 3, 32, 48).clamp(-1, 1)
        agree("decoder", parts["autoencoder"].decode(z), pipe.vae.decode(z).sample)
        agree("encoder", parts["autoencoder"].encode(images).mean, pipe.vae.encode(images).latent_dist.mean)
    assert pipe.vae.config.scaling_factor == family.latent_scale
    assert pipe.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[family.prediction]
    found, expected = NoiseSchedule(family.schedule).alphas_cumprod, pipe.scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4)  # theirs is single precision


def compare_text(family: Family, parts: Mapping[str, nn.Module], pipe: Any) -> None:
    encoded = (
        pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        if hasattr(pipe, "encode_prompt")
        else None
    )
    if encoded is None:  # InstructPix2Pix
        encoded = (pipe._encode_prompt(PROMPTS, "cpu", 1, False),)
    states, pooled = context(family, parts)
    agree("context", states, encoded[0])
    if pooled is not None:
        agree("pooled", pooled, encoded[2])


def compare_unet(channels: int, ours: Any, theirs: Any) -> None:
    config = ours.config
    x, states, t = randn(2, channels, 8, 16), randn(2, 7, config.context_dim, seed=2), torch.tensor([3.0, 871.5])
    vector, added, classes = None, None, None
    if config.vector_dim is not None:
        pooled = randn(2, POOLED, seed=3)
        times = torch.tensor([[64.0, 128, 0, 9, 64, 128]] * 2)[:, : (config.vector_dim - POOLED) // SIZE_DIM]
        added = {"text_embeds": pooled, "time_ids": times}
        vector = torch.cat([pooled, timestep_embedding(times.flatten(), SIZE_DIM).reshape(2, -1)], dim=1)
    elif config.num_classes is not None:
        vector = classes = torch.tensor([20, 3])
    out = theirs(x, t, encoder_hidden_states=states, class_labels=classes, added_cond_kwargs=added).sample
    agree("unet", ours(x, t, states, vector), out)


# -- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_folder_both_ways(kind: str, tmp_path: Path) -> None:
    family = tiny(FAMILIES[kind])
    parts = {part: randomise(module, seed) for seed, (part, module) in enumerate(build(family).items())}
    write_folder(tmp_path / "ours", family, parts)
    assert family_of(read_configs(tmp_path / "ours"), [*FAMILIES.values(), family]) == family
    pipe = load_pipeline(tmp_path / "ours")
    compare(family, parts, pipe)

    for seed, name in enumerate(components(family).values()):  # other weights, written by them with all their fields
        randomise(getattr(pipe, name), 10 + seed)
    pipe.save_pretrained(str(tmp_path / "theirs"))
    back = family_of(read_configs(tmp_path / "theirs"), [*FAMILIES.values(), family])
    assert back == family
    assert family_of(read_configs(tmp_path / "theirs")).name == f"{kind}-like"
    for folder in (tmp_path / "theirs").glob("tokenizer*"):
        check_vocabulary(folder, VOCAB)
    compare(family, read_parts(tmp_path / "theirs", back), pipe)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_pipelines_run(kind: str, tmp_path: Path) -> None:
    family = tiny(FAMILIES[kind])
    write_folder(tmp_path, family, {part: randomise(module, 5) for part, module in build(family).items()})
    pipe = load_pipeline(tmp_path)
    images = pipe("a red cube", num_inference_steps=2, output_type="np", height=64, width=64).images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()


def test_skipped_layers_are_not_stored(tmp_path: Path) -> None:
    plain = tiny(FAMILIES["sd1"])
    family = replace(plain, texts=(replace(plain.texts[0], skip_last=1),))
    assert stored_layers(family, "text") == 2
    assert stored_layers(plain, "text") is None
    parts = {part: randomise(module, 3) for part, module in build(family).items()}
    write_folder(tmp_path, family, parts)
    pipe = load_pipeline(tmp_path)
    with torch.inference_mode():
        compare_text(family, parts, pipe)
    assert family_of(read_configs(tmp_path)).texts[0].config.num_layers == 2


def test_zero_terminal_snr(tmp_path: Path) -> None:
    for kind in ("sd2", "xl-v"):
        plain = FAMILIES[kind]
        family = replace(plain, schedule=replace(plain.schedule, zero_terminal_snr=True))
        configs = configs_of(family)
        assert replace(family_of(configs), name=kind) == family
        config = configs["scheduler/scheduler_config.json"]
        assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        theirs = getattr(diffusers, config["_class_name"]).from_pretrained(str(tmp_path)).alphas_cumprod.numpy()
        np.testing.assert_allclose(NoiseSchedule(family.schedule).alphas_cumprod[:-1], theirs[:-1], rtol=2e-3)


# -- names and files --------------------------------------------------------------------------------------------------


def test_older_names() -> None:
    block = "encoder.mid_block.attentions.0"
    for new, old in OLD_ATTENTION.items():
        for end in ("weight", "bias"):
            assert canonical("vae", f"{block}.{old}.{end}") == f"{block}.{new}.{end}"
            assert canonical("vae", f"{block}.{new}.{end}") == f"{block}.{new}.{end}"
    assert canonical("vae", f"{block}.group_norm.weight") == f"{block}.group_norm.weight"
    assert canonical("sd-vae-ft-mse", f"{block}.query.bias") == f"{block}.to_q.bias"  # a folder of another name
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert canonical("unet", name) == name
    for component in ("text_encoder", "text_encoder_2"):
        for name in ("encoder.layers.0.mlp.fc1.bias", "embeddings.position_ids", "final_layer_norm.bias"):
            assert canonical(component, name) == canonical(component, f"text_model.{name}") == f"text_model.{name}"
        assert canonical(component, "text_projection.weight") == "text_projection.weight"
        assert rightly_unused(component, "text_model.embeddings.position_ids")
        assert rightly_unused(component, "embeddings.position_ids")
        assert not rightly_unused(component, "text_projection.weight")
    assert not rightly_unused("unet", "text_model.embeddings.position_ids")


def test_component_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sfumato")

    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()

    def files(component: str, variant: str | None = None) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in component_files(tmp_path, component, variant)]

    touch("unet/config.json", "unet/diffusion_pytorch_model.onnx", "unet/diffusion_flax_model.msgpack")
    with pytest.raises(
        ValueError, match=r"the unet has no weights: looked for unet/diffusion_pytorch_model.safetensors.*none"
    ):
        files("unet")
    with pytest.raises(ValueError, match="the vae has no weights"):
        files("vae")
    touch("unet/diffusion_pytorch_model.fp16.bin")
    assert files("unet") == ["unet/diffusion_pytorch_model.fp16.bin"]
    assert "unet has only the variant fp16" in caplog.text
    touch("unet/diffusion_pytorch_model.fp16.safetensors")
    assert files("unet") == files("unet", "fp16") == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    touch("unet/diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(ValueError, match="unet has no plain weights; variant must be one of fp16, non_ema"):
        files("unet")
    touch("unet/diffusion_pytorch_model.bin")
    assert files("unet") == ["unet/diffusion_pytorch_model.bin"]
    touch("unet/diffusion_pytorch_model.safetensors")
    assert files("unet") == ["unet/diffusion_pytorch_model.safetensors"]
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.bf16.safetensors.*fp16, non_ema, plain ones"):
        files("unet", "bf16")

    touch("sd-vae-ft-mse/diffusion_pytorch_model.bin")  # an autoencoder alone
    assert files("sd-vae-ft-mse") == ["sd-vae-ft-mse/diffusion_pytorch_model.bin"]
    touch("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/model.onnx")
    assert files("text_encoder") == ["text_encoder/model.safetensors"]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    touch(*(f"text_encoder_2/{name}" for name in shards))
    for name in ("model.safetensors.index.json", "model.safetensors.index.fp16.json"):
        index = tmp_path / "text_encoder_2" / name
        index.write_text(json.dumps({"weight_map": {"a": shards[1], "b": shards[0], "c": shards[1]}}))
    assert files("text_encoder_2") == files("text_encoder_2", "fp16") == [f"text_encoder_2/{name}" for name in shards]
    (tmp_path / "text_encoder_2" / shards[1]).unlink()
    with pytest.raises(
        ValueError, match=f"text_encoder_2/model.safetensors.index.json names {shards[1]}, which is missing"
    ):
        files("text_encoder_2")
    for text, words in (
        ('{"weight_map": {"a": "../x"}}', r"names \.\./x"),
        ("[]", "not an index"),
        ("{", "not an index"),
    ):
        (tmp_path / "text_encoder_2/model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            files("text_encoder_2")


def test_a_folder_of_shards_and_older_names_is_read(tmp_path: Path) -> None:
    """A published folder of long ago: attention by its first names, position ids, weights in two files."""
    family = tiny(FAMILIES["sd1"])
    parts = {part: randomise(module, 4) for part, module in build(family).items()}
    write_folder(tmp_path, family, parts)
    vae = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(str(vae)).items():
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    assert any(".query." in name for name in state)
    vae.unlink()
    names = sorted(state)
    halves = {
        "diffusion_pytorch_model-1-of-2.safetensors": names[::2],
        "diffusion_pytorch_model-2-of-2.safetensors": names[1::2],
    }
    for file, half in halves.items():
        save_file({name: state[name] for name in half}, str(tmp_path / "vae" / file))
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    text = tmp_path / "text_encoder/model.safetensors"
    state = load_file(str(text)) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(state, str(text))
    found = read_parts(tmp_path, family)
    for part, module in parts.items():
        state = found[part].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("spelled", ["theirs", "older"])
def test_a_variant_in_shards(tmp_path: Path, spelled: str, caplog: pytest.LogCaptureFixture) -> None:
    """As diffusers writes them, `model.fp16-00001-of-00002.safetensors`, and as older ones did, `...-00002.fp16...`."""
    family = tiny(FAMILIES["sd1"])
    parts = {part: randomise(module, 4) for part, module in build(family).items()}
    write_folder(tmp_path / "plain", family, parts)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "plain", safety_checker=None)
    folder = tmp_path / "fp16"
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16", max_shard_size="60KB")
    shards = list(folder.rglob("*.fp16-*-of-*.safetensors"))
    assert {path.parent.name for path in shards} >= {"unet", "vae"}
    if spelled == "older":
        for path in shards:
            stem, number = path.stem.split(".fp16-")
            path.rename(path.with_name(f"{stem}-{number}.fp16.safetensors"))
        for path in folder.glob("*/*.index*.json"):
            stem = path.name.partition(".")[0]
            text = re.sub(r"\.fp16(-\d+-of-\d+)\.", r"\1.fp16.", path.read_text())
            path.unlink()
            path.with_name(f"{stem}.fp16.safetensors.index.json").write_text(text)
    caplog.set_level(logging.INFO, logger="sfumato")
    for variant in (None, "fp16"):
        model = load_model(folder, variant=variant)
        for part, module in parts.items():
            state = model.networks[part].state_dict()
            assert all(torch.equal(state[name], tensor.half().float()) for name, tensor in module.state_dict().items())
    assert "unet has only the variant fp16" in caplog.text
