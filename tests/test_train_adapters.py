"""`sfumato train lora`, `dreambooth`, `textual-inversion`, `hypernetwork` at tiny size: they learn, stop, go on, and
every command draws with what they make."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.personal import creature
from sfumato.cli.main import main
from sfumato.families import Model
from sfumato.images import load_png
from sfumato.models.beside import KINDS
from sfumato.train import personal
from sfumato.train.conditions import Told, telling, text_states, vector_of
from sfumato.train.data import open_pictures
from sfumato.train.data.decoding import decode
from sfumato.train.diffusion import DiffusionConfig, FramedBatch
from sfumato.train.dreambooth import PriorConfig, draw_class
from sfumato.train.loop import LoopConfig
from sfumato.train.lora import LoRAConfig, text_layers, unet_layers
from sfumato.train.measuring import measure, recomputed
from sfumato.train.personal import Prior, Ready, Setup
from sfumato.train.state import State
from sfumato.train.views import Captioned, Shown, Views, frame_of
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.checkpoint import load_model
from sfumato.weights.files import load_safetensors
from tests.adapters import checkpoint_of, model_of, peer_unet, pipe_of, same_bits, unet_output, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoopConfig(steps=10, batch_size=2, lr=1e-2, warmup=1, ema_decay=0.5, weight_decay=0.0, checkpoint_every=30)
PLAIN = DiffusionConfig(caption_drop_prob=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several shapes, with no captions."""
    place = tmp_path_factory.mktemp("data") / "creature"
    place.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = np.full((48 + 16 * (index % 2), 56, 3), (30, 160 + 10 * index, 170), np.float64)
        pixels[10:20, 20 + index : 30 + index] = (250, 140, 20)
        noisy = (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(place / f"{index}.png")
    return place


def setup(model: Model, folder: Path, run: Path, **changes: object) -> Setup:
    pictures = Captioned(open_pictures(folder, need_captions=False), "a photo of sks owl")
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return Setup(model, pictures, Shown(64), config, PLAIN, run, "owl")


def probe(ready: Ready, seeds: int = 6) -> float:
    """The mean loss over a fixed choice of pictures, noise and timesteps."""
    batch = ready.examples.batch(ready.examples.indices_at(0))
    with torch.no_grad():
        found = [ready.objective.loss(batch, torch.Generator().manual_seed(s))[0].item() for s in range(seeds)]
    return sum(found) / len(found)


def train(what: str, kind: str, folder: Path, run: Path, *flags: str) -> int:
    place = ["--ckpt", str(checkpoint_of(kind)), "--data", str(folder), "--out", str(run), "--size", "64"]
    return main(["train", what, *place, "--warmup", "1", "--ema-decay", "0.5", "--sample-steps", "2", *flags])


def drawn(kind: str, out: Path, *flags: str) -> np.ndarray:
    """A picture through `sfumato txt2img`."""
    place = ["--ckpt", str(checkpoint_of(kind)), "--outdir", str(out), "--n_samples", "1", "--n_iter", "1"]
    size = ["--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--skip_grid"]
    assert main(["txt2img", *place, *size, *flags]) == 0
    return load_png(sorted((out / "samples").glob("*.png"))[-1])[0]


# -- lora -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_the_model_stays(kind, folder, tmp_path):
    model = model_of("sd1")
    before, plain = weights_of(model), unet_output(model)
    targets = ("attention",) if kind in ("lora", "dora") else ("linear", "conv")
    given = setup(model, folder, tmp_path / "run")
    ready = personal.lora(given, LoRAConfig(kind, 4, 4.0, targets, train_text=kind == "lora"))
    first = probe(ready)
    path = personal.run(ready, given)
    assert probe(ready) < 0.98 * first
    assert same_bits(weights_of(model), before)
    ready.objective.detach()  # type: ignore[attr-defined]
    assert torch.equal(unet_output(model), plain)
    adapter = load_adapter(path, model)
    assert adapter.unmatched == ()
    assert set(adapter.parts) == ({"unet", "text"} if kind == "lora" else {"unet"})
    Wardrobe(model).wear([Worn(adapter)])
    assert not torch.allclose(unet_output(model), plain, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sd2-base", "sd2", "xl"])
def test_diffusers_draws_with_it(kind, folder, tmp_path, capsys):
    run = tmp_path / "owl"
    flags = ["--steps", "8", "--batch", "2", "--lr", "3e-2", "--caption", "a photo of sks owl", "--rank", "4"]
    assert train("lora", kind, folder, run, *flags, "--alpha", "2", "--target", "linear", "--train-text") == 0
    path = run / "owl.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    model, pipe = model_of(kind), pipe_of(kind)
    plain = unet_output(model)
    adapter = load_adapter(path, model)
    assert adapter.unmatched == () and set(adapter.parts) == {"unet", *model.family.text_parts}
    Wardrobe(model).wear([Worn(adapter)])
    pipe.load_lora_weights(run, weight_name="owl.safetensors")
    theirs = peer_unet(pipe, model.family)
    torch.testing.assert_close(unet_output(model), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 0.01


def test_it_stops_goes_on_and_draws(folder, tmp_path, caplog):
    run, whole = tmp_path / "half" / "owl", tmp_path / "whole" / "owl"
    flags = ["--batch", "2", "--lr", "1e-2", "--caption", "a photo of sks owl", "--rank", "4", "--dropout", "0.2"]
    watched = ["--prompt", "a photo of sks owl", "--caption-drop", "0.3", "--train-text", "--min-snr", "5"]
    with caplog.at_level("INFO"):
        assert train("lora", "sd1", folder, run, "--steps", "4", *flags, *watched, "--sample-every", "4") == 0
    assert "GiB" in caplog.text and "for 4 steps" in caplog.text
    assert sorted(path.name for path in run.glob("samples-*.png")) == ["samples-000000.png", "samples-000004.png"]
    sheets = [np.asarray(Image.open(run / f"samples-00000{step}.png")) for step in (0, 4)]
    assert not np.array_equal(*sheets), "drawn with the adapter on"
    assert train("lora", "sd1", folder, run, "--steps", "8", *flags, *watched, "--sample-every", "4") == 0
    assert train("lora", "sd1", folder, whole, "--steps", "8", *flags, *watched, "--sample-every", "4") == 0
    assert (run / "owl.safetensors").read_bytes() == (whole / "owl.safetensors").read_bytes(), "as if never stopped"
    plain = drawn("sd1", tmp_path, "--prompt", "a photo of sks owl")
    assert not np.array_equal(
        plain, drawn("sd1", tmp_path / "b", "--prompt", "a photo of sks owl", "--adapters", str(run), "--lora", "owl")
    )


def test_one_that_is_stopped_leaves_what_it_has(folder, tmp_path):
    def stop(state: State) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    given = setup(model_of("sd1"), folder, tmp_path / "run", steps=8, sample_every=2)
    ready = replace(personal.lora(given, LoRAConfig(rank=2)), samples=stop)
    with pytest.raises(KeyboardInterrupt):
        personal.run(ready, given)
    _, facts = load_safetensors(ready.result)
    assert facts["ss_steps"] == "3", "the step that was in progress is finished"


def test_what_its_header_tells(folder, tmp_path):
    run = tmp_path / "owl"
    flags = ["--steps", "3", "--batch", "2", "--lr", "1e-3", "--caption", "sks, owl", "--kind", "lokr", "--rank", "2"]
    assert train("lora", "sd1", folder, run, *flags, "--alpha", "1", "--seed", "7", "--name", "bird") == 0
    _, facts = load_safetensors(run / "bird.safetensors")
    wanted = {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1.0", "ss_seed": "7",
        "ss_output_name": "bird", "ss_steps": "3", "ss_max_train_steps": "3", "ss_unet_lr": "0.001",
        "ss_num_train_images": "5", "ss_num_reg_images": "0", "ss_num_batches_per_epoch": "3", "ss_num_epochs": "1",
        "ss_total_batch_size": "2", "ss_resolution": "(64, 64)", "ss_new_sd_model_hash": model_of("sd1").hash,
        "ss_sd_model_name": model_of("sd1").name, "ss_base_model_version": "sd_v1", "ss_mixed_precision": "no",
    }  # fmt: skip
    assert {name: facts[name] for name in wanted} == wanted
    assert json.loads(facts["ss_network_args"]) == {"algo": "lokr"}
    assert json.loads(facts["ss_tag_frequency"]) == {"creature": {"sks": 5, "owl": 5}}
    assert len(facts["sshs_model_hash"]) == 64 and "ss_text_encoder_lr" not in facts
    assert not any(str(tmp_path) in value for value in facts.values())


def test_targets():
    model = model_of("xl")
    attention = unet_layers(model.unet, ["attention"])
    linear, conv = unet_layers(model.unet, ["linear"]), unet_layers(model.unet, ["conv"])
    assert set(attention) < set(linear) and not set(linear) & set(conv)
    assert any(name.endswith("attn1.to_out.0") for name in attention) and any("in_layers.2" in name for name in conv)
    assert unet_layers(model.unet, ["attn2.to_k"]) == [name for name in attention if name.endswith("attn2.to_k")]
    assert not any(name.startswith(("time_embed", "label_emb", "out.")) for name in linear + conv)
    assert set(text_layers(model.texts[0], ["attention"])) < set(text_layers(model.texts[0], ["linear"]))


# -- what a model is told ---------------------------------------------------------------------------------------------


def test_xl_is_told_its_pictures_sizes():
    model = model_of("xl")
    states = text_states(model, ["a red wall", ""])
    assert states.pooled is not None and states.pooled.shape == (2, 12)
    assert states.context[0].any() and not states.context[1].any() and not states.pooled[1].any(), "dropped is zeros"
    batch = FramedBatch(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), ["", ""])
    told = telling(model)(batch, states)
    whole = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    assert isinstance(told, Told) and told.vector is not None
    assert torch.equal(told.vector, vector_of(model, states.pooled, whole)), "nothing was cut off"
    cut = telling(model)(replace(batch, frames=whole + torch.tensor([0, 0, 3.0, 0, 0, 0])), states)
    assert cut.vector is not None and not torch.equal(cut.vector, told.vector)
    assert cut.vector.shape == (2, model.family.unet.vector_dim)


def test_frames(folder):
    """(width, height) 400 x 200 to 100 x 100: the picture becomes 200 x 100, of which the middle begins at 50."""
    assert frame_of((400, 200), (100, 100), (0.5, 0.5), False) == (200, 400, 0, 50, 100, 100)
    assert frame_of((400, 200), (100, 100), (0.25, 0.0), False) == (200, 400, 0, 25, 100, 100)
    assert frame_of((400, 200), (100, 100), (0.25, 0.0), True) == (200, 400, 0, 75, 100, 100)
    assert frame_of((100, 400), (100, 100), (0.5, 1.0), False) == (400, 100, 300, 0, 100, 100)
    pictures = Captioned(open_pictures(folder, need_captions=False), "x")
    for shown in (Shown(64), Shown(32, crop="random", flip=True), Shown(32, [(32, 32), (64, 32)])):
        batches = shown.batches(pictures, CONFIG)
        views = Views(batches)
        for step in range(4):
            tickets = batches.indices_at(step)
            assert torch.equal(views.batch(tickets).pixels, batches.batch(tickets).pixels), "the same cut"
    assert views.batch([0]).frames.tolist()[0][:2] == [48, 56]


def test_dropped_captions_are_those_of_no_text(folder, tmp_path):
    """The loss of XL with all captions dropped does not depend on the captions."""
    found = []
    for caption in ("a red wall", "an owl"):
        given = setup(model_of("xl"), folder, tmp_path)
        given = replace(
            given, pictures=Captioned(given.pictures, caption), diffusion=DiffusionConfig(caption_drop_prob=1.0)
        )
        found.append(probe(personal.lora(given, LoRAConfig(rank=2)), 2))
    assert found[0] == found[1]


def test_less_is_kept_and_nothing_changes(folder, tmp_path):
    given = setup(model_of("sd1"), folder, tmp_path)
    ready = personal.lora(given, LoRAConfig(rank=2, dropout=0.3))
    randomise = torch.Generator().manual_seed(1)
    for parameter in ready.objective.network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=randomise)

    def gradients() -> list[torch.Tensor]:
        ready.objective.network.zero_grad()
        torch.manual_seed(0)
        batch = ready.examples.batch([0, 1])
        ready.objective.loss(batch, torch.Generator().manual_seed(0))[0].backward()
        return [p.grad.clone() for p in ready.objective.network.parameters() if p.grad is not None]

    networks = torch.nn.ModuleList(given.model.networks.values())
    before, cost = gradients(), measure(ready.objective, ready.examples, CONFIG, networks)
    with recomputed(given.model.unet):
        after, less = gradients(), measure(ready.objective, ready.examples, CONFIG, networks)
    assert len(before) == len(after) > 0 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert less.num_bytes < cost.num_bytes
    assert all(p.grad is None for p in ready.objective.network.parameters()), "measuring leaves no gradients"


# -- dreambooth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_text", [False, True])
def test_dreambooth_changes_what_it_is_asked_to(train_text, folder, tmp_path):
    model = model_of("sd1")
    before = weights_of(model)
    given = setup(model, folder, tmp_path / "run", steps=6, lr=1e-3)
    prior = Prior(PriorConfig("a photo of an owl", 4, 0.5), steps=2)
    ready = personal.dreambooth(given, train_text, prior)
    assert len(list((tmp_path / "run" / "class").glob("*.png"))) == 4
    first = probe(ready)
    path = personal.run(ready, given)
    assert probe(ready) < first
    after = weights_of(load_model(path))
    changed = {part for part, name in before if not torch.equal(before[part, name], after[part, name])}
    assert changed == ({"unet", "text"} if train_text else {"unet"})


def test_prior_counts_beside_the_subject(folder, tmp_path):
    """loss = instance + weight * prior, of one batch; captions are those of each."""
    given = setup(model_of("sd1"), folder, tmp_path)
    prior = Prior(PriorConfig("a photo of an owl", 3, 0.25), steps=1)
    ready = personal.lora(given, LoRAConfig(rank=2), prior)
    batch = ready.examples.batch(ready.examples.indices_at(0))
    assert batch.captions == ["a photo of sks owl"] * 2 + ["a photo of an owl"] * 2
    assert batch.shares is not None and batch.shares.tolist() == [0.5, 0.5, 0.125, 0.125]
    seen = torch.Generator().manual_seed(3)
    whole = ready.objective.loss(batch, seen)[0]
    parts = []
    for chosen in ([1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0]):
        part = replace(batch, shares=torch.tensor(chosen) / 2)
        parts.append(ready.objective.loss(part, torch.Generator().manual_seed(3))[0])
    torch.testing.assert_close(whole, parts[0] + 0.25 * parts[1])
    assert parts[0] != parts[1]


def test_class_pictures_are_drawn_once(folder, tmp_path):
    model, config = model_of("sd1"), PriorConfig("a photo of an owl", 5)
    every = draw_class(model, config, tmp_path / "a", 5, 64, steps=2)
    bytes_of = [path.read_bytes() for path in every]
    draw_class(model, config, tmp_path / "b", 2, 64, steps=2)
    (tmp_path / "b" / "00000.png").unlink()
    times = (tmp_path / "b" / "00001.png").stat().st_mtime_ns
    again = draw_class(model, config, tmp_path / "b", 5, 64, steps=2)
    assert (tmp_path / "b" / "00001.png").stat().st_mtime_ns == times, "what is there stays"
    for one, other in zip(bytes_of, again, strict=True):
        (tmp_path / "one.png").write_bytes(one)
        ours, theirs = load_png(tmp_path / "one.png")[0], load_png(other)[0]
        assert np.abs(ours.astype(int) - theirs).max() <= 1, "also alone"


def test_dreambooth_stops_goes_on_and_draws(folder, tmp_path):
    run, whole = tmp_path / "half" / "owl", tmp_path / "whole" / "owl"
    flags = ["--batch", "2", "--lr", "1e-3", "--instance-prompt", "a photo of sks owl", "--class-steps", "2"]
    flags += ["--class-prompt", "a photo of an owl", "--class-count", "3", "--gradient-checkpointing"]
    assert train("dreambooth", "sd2", folder, run, "--steps", "2", *flags) == 0
    assert train("dreambooth", "sd2", folder, run, "--steps", "4", *flags) == 0
    assert train("dreambooth", "sd2", folder, whole, "--steps", "4", *flags) == 0
    assert (run / "owl.safetensors").read_bytes() == (whole / "owl.safetensors").read_bytes()
    assert main(["inspect", str(run / "owl.safetensors")]) == 0


def test_dreambooth_into_a_lora_of_xl(folder, tmp_path):
    run = tmp_path / "owl"
    flags = ["--batch", "2", "--lr", "1e-2", "--caption", "a photo of sks owl", "--class-steps", "1", "--rank", "2"]
    flags += ["--class-prompt", "a photo of an owl", "--class-data", str(folder), "--class-count", "6", "--steps", "2"]
    assert train("lora", "xl", folder, run, *flags) == 0
    assert [path.name for path in (run / "class").glob("*.png")] == ["00000.png"], "one was missing"
    _, facts = load_safetensors(run / "owl.safetensors")
    assert (facts["ss_num_reg_images"], facts["ss_prior_loss_weight"]) == ("6", "1.0")


# -- words and hypernetworks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xl"])
def test_a_word_stops_goes_on_and_draws(kind, folder, tmp_path):
    run, whole = tmp_path / "half" / "owlet", tmp_path / "whole" / "owlet"
    flags = ["--batch", "2", "--lr", "0.5", "--vectors", "2", "--initial", "a bird", "--prompt", "a photo of owlet"]
    assert train("textual-inversion", kind, folder, run, "--steps", "2", *flags, "--sample-every", "2") == 0
    sheets = [np.asarray(Image.open(run / f"samples-00000{step}.png")) for step in (0, 2)]
    assert not np.array_equal(*sheets), "drawn with the word"
    assert train("textual-inversion", kind, folder, run, "--steps", "4", *flags) == 0
    assert train("textual-inversion", kind, folder, whole, "--steps", "4", *flags) == 0
    path = Path("embeddings") / "owlet.safetensors"
    assert (run / path).read_bytes() == (whole / path).read_bytes()
    plain = drawn(kind, tmp_path, "--prompt", "a photo of owlet")
    assert not np.array_equal(
        plain, drawn(kind, tmp_path / "b", "--prompt", "a photo of owlet", "--adapters", str(run))
    )


@pytest.mark.parametrize("kind", ["sd1"])
def test_a_hypernetwork_stops_goes_on_and_draws(kind, folder, tmp_path):
    run, whole = tmp_path / "half" / "mood", tmp_path / "whole" / "mood"
    flags = ["--batch", "2", "--lr", "0.05", "--caption", "an owl", "--activation", "mish", "--layer-norm"]
    watched = ["--prompt", "an owl", "--sample-every", "2"]
    assert train("hypernetwork", kind, folder, run, "--steps", "2", *flags, *watched) == 0
    sheets = [np.asarray(Image.open(run / f"samples-00000{step}.png")) for step in (0, 2)]
    assert not np.array_equal(*sheets), "drawn with the hypernetwork"
    assert train("hypernetwork", kind, folder, run, "--steps", "4", *flags) == 0
    assert train("hypernetwork", kind, folder, whole, "--steps", "4", *flags) == 0
    assert (run / "mood.pt").read_bytes() == (whole / "mood.pt").read_bytes()
    plain = drawn(kind, tmp_path, "--prompt", "an owl")
    assert not np.array_equal(
        plain, drawn(kind, tmp_path / "b", "--prompt", "an owl", "--adapters", str(run), "--hypernet", "mood")
    )


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_draws_captioned_pictures(tmp_path):
    creature.main([str(tmp_path), "--size", "32"])
    counts = {"subject": 5, "held": 10, "blueprint": 12}
    for name, count in counts.items():
        pictures = open_pictures(tmp_path / name)
        seen = [decode(pictures.data(index)) for index in range(len(pictures))]
        assert len({pixels.tobytes() for pixels in seen}) == count and {pixels.shape for pixels in seen} == {
            (32, 32, 3)
        }
        assert all(str(pictures.facts(index)["caption"]).startswith("a") for index in range(count))
    poses = set(creature.SUBJECT) & set(creature.HELD)
    assert not poses, "what is held out is not learned from"


# -- bad input --------------------------------------------------------------------------------------------------------

CAPTION = ["--caption", "a photo of sks owl"]


@pytest.mark.parametrize(
    ("what", "flags", "words"),
    [
        ("lora", [], "caption=None: 5 of 5 pictures have none"),
        ("dreambooth", [], "caption=None: 5 of 5 pictures have none"),
        ("lora", [*CAPTION, "--rank", "0"], "rank=0: 1 or more"),
        ("lora", [*CAPTION, "--alpha", "0"], "alpha=0.0: above 0"),
        ("lora", [*CAPTION, "--target", "nothing"], "target='nothing': attention, linear, conv"),
        ("lora", [*CAPTION, "--target", "conv"], "kind 'lora' has no place for large kernels"),
        ("lora", [*CAPTION, "--dropout", "1"], "dropout=1.0: 0 to below 1"),
        ("lora", [*CAPTION, "--batch", "9"], "batch_size=9: the set has only 5"),
        ("lora", [*CAPTION, "--name", "a/b"], "name='a/b': a file's name"),
        ("lora", [*CAPTION, "--size", "30"], "size=30: a multiple of"),
        ("lora", [*CAPTION, "--class-count", "5"], "class_count=5: it belongs to a --class-prompt"),
        ("dreambooth", [*CAPTION, "--class-prompt", "an owl", "--class-count", "0"], "class_count=0: 1 or more"),
        ("dreambooth", [*CAPTION, "--class-prompt", " "], "class_prompt='': words"),
        ("dreambooth", [*CAPTION, "--class-prompt", "an owl", "--prior-weight", "0"], "prior_weight=0.0: above 0"),
        ("dreambooth", [*CAPTION, "--class-prompt", "an owl", "--class-data", "nowhere"], "data='nowhere'"),
        ("dreambooth", [*CAPTION, "--class-prompt", "x", "--buckets"], "buckets: with pictures of the class"),
        ("textual-inversion", ["--vectors", "-1"], "num_vectors=-1"),
        ("textual-inversion", ["--name", "a (b)"], "name='a (b)'"),
        ("textual-inversion", ["--initial", " "], "initial=' '"),
        ("hypernetwork", [*CAPTION, "--layers", "1", "2"], "layers=(1, 2)"),
        ("hypernetwork", [], "caption=None"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(folder, tmp_path, capsys, what, flags, words):
    assert train(what, "sd1", folder, tmp_path / "run", "--steps", "2", *flags) == 2
    [line] = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert words in line
    assert not list((tmp_path / "run").glob("*")), "nothing was begun"


@pytest.mark.parametrize("what", ["lora", "dreambooth", "textual-inversion", "hypernetwork"])
@pytest.mark.parametrize("kind", ["sd1-edit", "sd2-depth"])
def test_what_sees_a_picture_or_depth_is_refused(what, kind, folder, tmp_path, capsys):
    caption = [] if what == "textual-inversion" else CAPTION
    assert train(what, kind, folder, tmp_path / "run", "--steps", "2", *caption) == 2
    assert "sees more than a text" in capsys.readouterr().err


def test_another_run_in_the_folder(folder, tmp_path, capsys):
    flags = ["--batch", "2", *CAPTION, "--rank", "2"]
    assert train("lora", "sd1", folder, tmp_path, "--steps", "1", *flags) == 0
    for other, words in (
        (["--alpha", "5"], "alpha was None, is 5.0; keep it, or begin in another folder"),
        (["--kind", "loha"], "kind was lora, is loha"),
    ):
        assert train("lora", "sd1", folder, tmp_path, "--steps", "2", *flags, *other) == 2
        assert words in capsys.readouterr().err
    assert train("hypernetwork", "sd1", folder, tmp_path, "--steps", "2", *CAPTION) == 2
    assert "trainer was lora, is hypernetwork" in capsys.readouterr().err


@pytest.mark.parametrize("name, dtype", [(None, torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_precision_of_the_file(name, dtype, folder, tmp_path):
    """As it was trained, rounded once; and what was trained is as it was: the run goes on in float32."""
    flags = ["--steps", "2", "--batch", "2", "--lr", "1e-2", *CAPTION, "--rank", "2"]
    run = tmp_path / "owl"
    assert train("lora", "sd1", folder, run, *flags, *([] if name is None else ["--save-dtype", name])) == 0
    exact = tmp_path / "exact" / "owl"
    assert train("lora", "sd1", folder, exact, *flags, "--save-dtype", "fp32") == 0
    found, wanted = (load_safetensors(path / "owl.safetensors")[0] for path in (run, exact))
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        if key.endswith(".alpha"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[key])
        else:
            assert tensor.dtype == dtype and torch.equal(tensor, wanted[key].to(dtype)), key


def test_a_control_networks_file_is_half_precision_too(folder, tmp_path):
    run = tmp_path / "grey"
    assert train("controlnet", "sd1", folder, run, "--steps", "1", "--batch", "1", *CAPTION, "--annotate", "grey") == 0
    assert {tensor.dtype for tensor in load_safetensors(run / "grey.safetensors")[0].values()} == {torch.float16}
