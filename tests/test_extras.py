"""What a job names beside its model, through the command line and the pipeline: put on, taken off, drawn again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.cli.main import main
from sfumato.images import load_png
from sfumato.models.controlnet import ControlNet
from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig
from sfumato.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.pipeline import Pipeline
from sfumato.tasks.checks import job_from_dict, job_to_dict
from sfumato.types import Control, Job
from sfumato.weights.controls import save_control, save_t2i_adapter
from sfumato.weights.embeddings import Embedding, save_embedding
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.hypernetworks import HypernetworkFile, save_hypernetwork
from tests.conftest import randomise

PROMPT = "a (house:1.2) and blob"


@pytest.fixture(scope="module")
def shelf(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as A1111 lays it out, with one of each kind made for the tiny model."""
    folder = tmp_path_factory.mktemp("shelf")
    model = Pipeline.from_pretrained(tiny_checkpoint, adapters=[]).model
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    lora: dict[str, torch.Tensor] = {}
    for part, network in (("unet", model.unet), ("te", model.texts[0])):
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v", "q_proj", "v_proj")):
                stem = f"lora_{part}_{name.replace('.', '_')}"
                lora[f"{stem}.lora_down.weight"] = noise(2, module.in_features)
                lora[f"{stem}.lora_up.weight"] = noise(module.out_features, 2)
                lora[f"{stem}.alpha"] = torch.tensor(2.0)
    save_safetensors(folder / "Lora" / "style.safetensors", lora, {})
    save_embedding_folder = folder / "embeddings"
    save_embedding_folder.mkdir()
    save_embedding(save_embedding_folder / "blob.safetensors", Embedding("blob", (noise(2, 16, scale=1.0),)))
    network = Hypernetwork(HypernetworkConfig(widths=(16,), activation="relu"))
    randomise(network, 5)
    (folder / "hypernetworks").mkdir()
    save_hypernetwork(folder / "hypernetworks" / "mood.pt", HypernetworkFile("mood", network))
    (folder / "ControlNet").mkdir()
    for seed, name in enumerate(("edges", "tones")):
        control = ControlNet.from_unet(model.unet, factor=2)
        save_control(folder / "ControlNet" / f"{name}.safetensors", randomise(control, seed))
    save_control(folder / "ControlNet" / "zero.safetensors", ControlNet.from_unet(model.unet, factor=2))
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, shelf: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, adapters=shelf)


@pytest.fixture(scope="module")
def hint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hints") / "hint.png"
    steps = np.arange(20, dtype=np.uint8)
    pixels = np.stack([steps[None, :] * 12 + steps[:, None] * 0, steps[:, None] * 12 + steps[None] * 0], -1)
    Image.fromarray(np.concatenate([pixels, pixels[..., :1]], -1)).save(path)
    return str(path)


def drawn(pipe: Pipeline, prompt: str = PROMPT, **fields: object) -> np.ndarray:
    return pipe.draw(Job(prompt, steps=3, seed=3, **fields)).images  # type: ignore[arg-type]


def weights(pipe: Pipeline) -> list[torch.Tensor]:
    return [p.detach().clone() for network in pipe.model.networks.values() for p in network.parameters()]


def test_each_changes_the_picture_and_leaves_no_bit_behind(pipe, hint):
    before, plain = weights(pipe), drawn(pipe)
    control = {"controls": (Control("edges", hint),)}
    for prompt, fields in (
        (f"{PROMPT} <lora:style:1>", {}), (f"{PROMPT}<hypernet:mood:1>", {}), (PROMPT, control),
        (PROMPT.replace("blob", "blot"), {}),
    ):  # fmt: skip
        assert not np.array_equal(drawn(pipe, prompt, **fields), plain), (prompt, fields)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(pipe), strict=True))
    assert np.array_equal(drawn(pipe), plain)


def test_what_is_nothing_changes_no_bit(pipe, hint):
    plain = drawn(pipe)
    for prompt, control in (
        (f"{PROMPT} <lora:style:0>", None), (f"{PROMPT} <hypernet:mood:0>", None), (PROMPT, Control("zero", hint)),
        (PROMPT, Control("edges", hint, weight=0.0)),
    ):  # fmt: skip
        assert np.array_equal(drawn(pipe, prompt, controls=() if control is None else (control,)), plain), prompt


def test_steps_in_which_it_works(pipe, hint):
    """One after the other they make what none of them does, and no step is without effect."""
    plain, whole = drawn(pipe), drawn(pipe, f"{PROMPT} <lora:style:0:1>")
    first, last = (drawn(pipe, f"{PROMPT} <lora:style:0:1:{w}>") for w in ("end=0.5", "start=0.5"))
    pictures = [plain, whole, first, last]
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert np.array_equal(drawn(pipe, f"{PROMPT} <lora:style:0:1:start=0.0:end=1.0>"), whole)
    steered = [drawn(pipe, controls=(Control("edges", hint, **w),)) for w in ({}, {"end": 0.5}, {"start": 0.5})]
    assert len({picture.tobytes() for picture in steered}) == 3


def test_modes_weigh_the_layers(pipe, hint):
    pictures = {m: drawn(pipe, controls=(Control("edges", hint, mode=m),)) for m in ("balanced", "prompt", "control")}
    pictures["guess"] = drawn(pipe, controls=(Control("edges", hint, mode="guess"),))
    assert len({picture.tobytes() for picture in pictures.values()}) == 4
    unguided = [drawn(pipe, controls=(Control("edges", hint, mode=m),), guidance=1.0) for m in ("prompt", "control")]
    assert np.array_equal(*unguided), "they differ in the negative prompt's rows alone"


def test_jobs_with_different_adapters_are_drawn_together(pipe, hint):
    jobs = [
        Job(PROMPT, steps=3, seed=3),
        Job(f"{PROMPT} <lora:style:1>", steps=3, seed=3, controls=(Control("edges", hint),)),
        Job(f"{PROMPT} <lora:style:0.5>", steps=3, seed=3, controls=(Control("edges", hint), Control("tones", hint))),
        Job(f"{PROMPT} <hypernet:mood:1>", steps=3, seed=3, count=2),
    ]
    together = pipe.draw_many(jobs)
    for job, result in zip(jobs, together, strict=True):
        alone = pipe.draw(job)
        assert np.abs(result.images.astype(int) - alone.images).max() <= 1
        assert result.adapters == alone.adapters


def test_t2i_adapters_steer_too(pipe, hint, shelf):
    config = T2IAdapterConfig(channels=(8, 16), num_res_blocks=1, factor=2, unet_blocks=1)
    save_t2i_adapter(shelf / "ControlNet" / "sketch.safetensors", randomise(T2IAdapter(config), 4))
    plain = drawn(pipe)
    pictures = {mode: drawn(pipe, controls=(Control("sketch", hint, mode=mode),)) for mode in ("balanced", "prompt")}
    assert len({plain.tobytes(), *(picture.tobytes() for picture in pictures.values())}) == 3


def test_differences_are_added_to_the_unet_without_its_adapters(pipe, hint, shelf):
    """Loaded while a LoRA is on, a file of differences gives the network that it gives alone."""
    base = pipe.model.unet.state_dict()
    whole = load_safetensors(shelf / "ControlNet" / "edges.safetensors")[0]
    names = {name: name.removeprefix("control_model.") for name in whole}
    less = {name: whole[name] - base[own] if own in base else whole[name] for name, own in names.items()}
    save_safetensors(shelf / "ControlNet" / "less.safetensors", less | {"difference": torch.zeros(1)}, {})
    prompt = f"{PROMPT} <lora:style:1>"
    a, b = (drawn(pipe, prompt, controls=(Control(name, hint),)) for name in ("edges", "less"))
    assert np.abs(a.astype(int) - b).max() <= 1


def test_tiles_see_their_part_of_the_hint(pipe, hint):
    fields = {"width": 32, "height": 16, "tile": 16}
    plain = drawn(pipe, **fields)
    steered = drawn(pipe, **fields, controls=(Control("edges", hint),))
    assert not np.array_equal(plain, steered)


def test_all_at_once_is_drawn_again_from_its_file(tiny_checkpoint, shelf, hint, tmp_path, capsys):
    common = ["--ckpt", str(tiny_checkpoint), "--adapters", str(shelf)]
    flags = [
        "--prompt", PROMPT, "--lora", "style:0.7", "--hypernet", "mood:0.5", "--steps", "3", "--seed", "5",
        "--n_samples", "2", "--n_iter", "1", "--control", f"edges,image={hint},weight=0.8,end=0.9", "--control",
        f"tones,image={hint},annotate=invert,mode=prompt",
    ]  # fmt: skip
    assert main(["txt2img", *common, *flags, "--outdir", str(tmp_path), "--skip_grid"]) == 0
    saved = tmp_path / "samples" / "00001.png"
    _, made = load_png(saved)
    assert set(made["adapters"]) == {"lora:style", "hypernet:mood", "control:edges", "control:tones", "embedding:blob"}
    assert set(made["pictures"]) == {"controls[0].image", "controls[1].image"}
    assert main(["replay", str(saved), *common]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: every pixel"
    without = [flag for flag in flags if not flag.startswith(("--lora", "style"))]
    assert main(["txt2img", *common, *without, "--outdir", str(tmp_path / "b"), "--skip_grid"]) == 0
    assert not np.array_equal(load_png(tmp_path / "b" / "samples" / "00001.png")[0], load_png(saved)[0])


def test_replay_says_which_file_changed(tiny_checkpoint, shelf, tmp_path, caplog):
    import shutil

    moved = tmp_path / "shelf"
    shutil.copytree(shelf, moved)
    common = ["--ckpt", str(tiny_checkpoint), "--adapters", str(moved)]
    assert main(["txt2img", *common, "--prompt", "x", "--lora", "style", "--steps", "2", "--n_samples", "1",
                 "--n_iter", "1", "--outdir", str(tmp_path)]) == 0  # fmt: skip
    (moved / "Lora" / "style.safetensors").unlink()
    tensors = {"lora_unet_middle_block_1_proj_in.diff": torch.zeros(16, 16, 1, 1)}
    save_safetensors(moved / "Lora" / "style.safetensors", tensors, {})
    assert main(["replay", str(tmp_path / "samples" / "00000.png"), *common]) == 1
    assert "lora:style is not the file" in caplog.text


def test_a_hypernetwork_that_does_not_fit_leaves_no_lora_on(pipe, shelf):
    """What was put on before the error comes off with it."""
    network = randomise(Hypernetwork(HypernetworkConfig(widths=(24,))), 5)
    save_hypernetwork(shelf / "hypernetworks" / "wide.pt", HypernetworkFile("wide", network))
    before, plain = weights(pipe), drawn(pipe)
    with pytest.raises(ValueError, match="contexts of widths"):
        drawn(pipe, f"{PROMPT} <lora:style:1><hypernet:wide:1>")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(pipe), strict=True))
    assert np.array_equal(drawn(pipe), plain)


def test_a_job_with_controls_is_json():
    job = Job("x", controls=(Control("edges", "a.png", "canny", {"low": 50.0}, 0.5),))
    assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x <lora:nowhere:1>"}, "lora='nowhere': there is none in"),
        ({"prompt": "x <lora:stile:1>"}, "did you mean 'style'?"),
        ({"prompt": "x <hypernet:nowhere>"}, "hypernet='nowhere'"),
        ({"prompt": "x <wildcard:nowhere>"}, "<wildcard:...> is no kind"),
        ({"prompt": "x <lora:style:1:start=0.8:end=0.2>"}, "start before end"),
        ({"controls": (Control("nowhere", "{hint}"),)}, "control='nowhere'"),
        ({"controls": (Control("edges"),)}, "controls[0].image=None"),
        ({"controls": (Control("edges", "{hint}", weight=-1.0),)}, "controls[0].weight=-1"),
        ({"controls": (Control("edges", "{hint}", weight=float("nan")),)}, "controls[0].weight=nan"),
        ({"controls": (Control("edges", "{hint}", start=0.5, end=0.5),)}, "controls[0].start=0.5"),
        ({"controls": (Control("edges", "{hint}", mode="loud"),)}, "controls[0].mode='loud': one of balanced"),
        ({"controls": (Control("edges", "{hint}", annotate="nothing"),)}, "annotator='nothing': one of"),
        ({"controls": (Control("edges", "{hint}", annotate="invert", options={"low": 1.0}),)}, "low"),
        ({"controls": (Control("edges", "no-such.png"),)}, "controls[0].image='no-such.png'"),
        ({"controls": (Control("style", "{hint}"),)}, "control='"),
        ({"controls": "edges"}, "controls='edges'"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(pipe, hint, fields, words):
    before = weights(pipe)
    if isinstance(fields.get("controls"), tuple):
        fields = {
            "controls": tuple(replace(c, image=hint if c.image == "{hint}" else c.image) for c in fields["controls"])
        }
    with pytest.raises(ValueError) as error:
        drawn(pipe, **({"prompt": PROMPT} | fields))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(pipe), strict=True))
