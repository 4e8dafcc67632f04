"""Steered and adapted drawings held against diffusers' own pipelines: the same weights, files, picture and seed."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import Pipeline
from sfumato.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from sfumato.types import Control
from sfumato.weights.controls import save_ip_adapter
from sfumato.weights.embeddings import Embedding, save_embedding
from tests.conftest import randomise
from tests.test_cache import write_folder

SEED, SIZE, STEPS = 7, 64, 4
PROMPT, NEGATIVE = "a red apple", "blue, dull"


class Pair:
    """diffusers' pipeline and ours, of one tiny folder of SD 1.x, with ControlNets that both load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = diffusers.StableDiffusionPipeline.from_pretrained(write_folder(folder, "sd1"))
        self.shelf = folder / "shelf"
        self.nets = []
        for seed, name in enumerate(("edges", "tones")):
            net = diffusers.ControlNetModel.from_unet(self.base.unet, conditioning_channels=3)
            randomise(net, seed)
            net.save_pretrained(self.shelf / "ControlNet" / name)
            self.nets.append(net.eval())
        noise = np.random.default_rng(1).integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
        self.hint = folder / "hint.png"
        Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(self.hint)

    def ours(self, prompt: str = PROMPT, **fields: object) -> np.ndarray:
        pipe = Pipeline.from_pretrained(self.base.config._name_or_path, adapters=self.shelf)
        common = {"negative": NEGATIVE, "steps": STEPS, "seed": SEED, "like": "diffusers", "sampler": "ddim"}
        return pipe(prompt, width=SIZE, height=SIZE, guidance=7.5, **common, **fields).images[0]

    def theirs(self, pipe: object, prompt: str = PROMPT, **arguments: object) -> np.ndarray:
        config = {key: value for key, value in pipe.scheduler.config.items() if key != "timestep_spacing"}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        images = pipe(
            prompt, negative_prompt=NEGATIVE, num_inference_steps=STEPS, generator=generator, guidance_scale=7.5,
            output_type="np", height=SIZE, width=SIZE, **arguments,
        ).images  # fmt: skip
        return (images[0] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("steering"))


def agree(ours: np.ndarray, theirs: np.ndarray, plain: np.ndarray) -> None:
    """Within 2 of 255, and not because nothing happened."""
    assert np.abs(theirs.astype(int) - plain).max() > 8
    assert np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize(
    ("controls", "arguments"),
    [
        ([{}], {}),
        ([{"weight": 0.6}], {"controlnet_conditioning_scale": 0.6}),
        ([{"mode": "guess"}], {"guess_mode": True}),
        ([{"end": 0.5}], {"control_guidance_end": 0.5}),
        ([{"start": 0.5}], {"control_guidance_start": 0.5}),
        ([{}, {"weight": 0.4}], {"controlnet_conditioning_scale": [1.0, 0.4]}),
    ],
    ids=("plain", "weight", "guess", "end", "start", "two"),
)
def test_controlnets_are_diffusers(pair, controls, arguments):
    count = len(controls)
    nets, picture = pair.nets[:count], Image.open(pair.hint)
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(
        pair.base, controlnet=nets[0] if count == 1 else diffusers.MultiControlNetModel(nets)
    )
    theirs = pair.theirs(pipe, image=picture if count == 1 else [picture] * count, **arguments)
    names = ("edges", "tones")
    ours = pair.ours(
        controls=tuple(Control(name, str(pair.hint), **more) for name, more in zip(names, controls, strict=False))
    )
    agree(ours, theirs, pair.ours())


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_picture_as_a_prompt_is_diffusers(pair, weight):
    """An IP-Adapter with its image encoder, from files in the published names."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=12, hidden_act="quick_gelu")
    tower = CLIPVisionModelWithProjection(config).eval()
    tower.save_pretrained(pair.shelf / "clip_vision")
    model = Pipeline.from_pretrained(pair.base.config._name_or_path, adapters=[]).model
    width = model.family.unet.context_dim
    shape = IPAdapterConfig(image_dim=12, context_dim=width, num_tokens=4)
    adapter = IPAdapter(shape, [attention.to_q.in_features for attention in cross_attentions(model.unet)])
    save_ip_adapter(pair.shelf / "ControlNet" / "look.safetensors", randomise(adapter, 6))
    pipe = diffusers.StableDiffusionPipeline.from_pipe(pair.base)
    pipe.image_encoder = tower
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = str(pair.shelf / "ControlNet")
    pipe.load_ip_adapter(folder, subfolder="", weight_name="look.safetensors", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(weight)
    theirs = pair.theirs(pipe, ip_adapter_image=Image.open(pair.hint))
    pipe.unload_ip_adapter()
    ours = pair.ours(controls=(Control("look", str(pair.hint), weight=weight),))
    agree(ours, theirs, pair.ours())


def test_a_lora_and_a_word_are_diffusers(pair, tmp_path):
    """Both on at once, from the files that people have."""
    from peft import LoraConfig

    pipe = diffusers.StableDiffusionPipeline.from_pipe(pair.base)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config)
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(pipe.unet)
    pipe.unet.delete_adapters("default")
    (pair.shelf / "Lora").mkdir(exist_ok=True)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        pair.shelf / "Lora", unet_lora_layers=tensors, weight_name="style.safetensors"
    )
    (pair.shelf / "embeddings").mkdir(exist_ok=True)
    width = pipe.text_encoder.config.hidden_size
    vectors = 0.5 * torch.randn(2, width, generator=torch.Generator().manual_seed(2))
    path = pair.shelf / "embeddings" / "<fern>.safetensors"
    save_embedding(path, Embedding("<fern>", (vectors,)), "diffusers")
    pipe.load_lora_weights(pair.shelf / "Lora", weight_name="style.safetensors")
    pipe.load_textual_inversion(path, token="<fern>")
    pipe.set_adapters(pipe.get_active_adapters(), 0.7)
    theirs = pair.theirs(pipe, f"{PROMPT}, <fern>")
    agree(pair.ours(f"{PROMPT}, <fern><lora:style:0.7>"), theirs, pair.ours())
