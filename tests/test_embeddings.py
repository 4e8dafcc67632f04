"""Textual-inversion embeddings: every kind of file, what they do in prompts, and the same in diffusers."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.families.conditioning import TextOptions, describe, encode, encode_captions
from sfumato.models.clip import CLIPText, CLIPTextConfig
from sfumato.prompts.chunks import Place, chunks
from sfumato.prompts.emphasis import emphasis
from sfumato.weights.checkpoint import load_model, open_checkpoint, save_checkpoint
from sfumato.weights.embeddings import Embedding, find_embeddings, load_embedding, save_embedding
from sfumato.weights.files import load_safetensors, save_safetensors, sha256
from sfumato.weights.writing import parts_of, write
from tests.tiny import TINIES, random_parts


def build(kind: str, folder: Path) -> Model:
    """A random model, also as a folder of diffusers."""
    save_checkpoint(folder / f"{kind}.safetensors", TINIES[kind], random_parts(TINIES[kind]), torch.float32)
    checkpoint = open_checkpoint(folder / f"{kind}.safetensors")
    write(folder / kind, checkpoint.family, parts_of(checkpoint))
    return load_model(folder / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return build("sd1", folder)


@pytest.fixture(scope="module")
def xl(folder: Path) -> Model:
    return build("xl", folder)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def word(count: int, *widths: int, name: str = "cat") -> Embedding:
    return Embedding(name, tuple(noise(count, width, seed=width) for width in widths), hash="ab" * 32)


# -- files ------------------------------------------------------------------------------------------------------------


def a1111(vectors: Tensor, **more: object) -> dict[str, object]:
    head = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "inside", "step": 500}
    return head | {"sd_checkpoint": "abc123", "sd_checkpoint_name": "v1-5"} | more


def png(path: Path, data: dict[str, object]) -> None:
    def plain(value: object) -> object:
        return {"TORCHTENSOR": value.tolist()} if isinstance(value, Tensor) else value

    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(data, default=plain).encode()).decode())
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=info)


def test_files_of_a1111(model: Model, tmp_path: Path) -> None:
    vectors = noise(3, 8)
    torch.save(a1111(vectors), tmp_path / "plain.pt")
    torch.save(a1111(vectors, string_to_param=nn.ParameterDict({"*": nn.Parameter(vectors)})), tmp_path / "old.pt")
    torch.save(a1111(vectors), tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    save_safetensors(tmp_path / "emb.safetensors", {"emb_params": vectors}, {})
    png(tmp_path / "shared.png", a1111(vectors))
    for file, name in [
        ("plain.pt", "plain"), ("old.pt", "old"), ("legacy.bin", "legacy"), ("emb.safetensors", "emb"),
        ("shared.png", "inside"),
    ]:  # fmt: skip
        found = load_embedding(tmp_path / file, model)
        assert (found.name, found.count, found.hash) == (name, 3, sha256(tmp_path / file))
        assert found.vectors[0].dtype == torch.float32 and torch.equal(found.vectors[0], vectors)
        if file != "emb.safetensors":
            assert (found.step, found.checkpoint, found.checkpoint_hash) == (500, "v1-5", "abc123")
    assert load_embedding(tmp_path / "plain.pt", model, "mine").name == "mine"


def hide(path: Path, data: dict[str, object], seed: int = 0) -> None:
    """As A1111 does: zlib data in the low bits of two strips, dots in the high ones, a black column beside each."""

    def plain(value: object) -> object:
        return {"TORCHTENSOR": value.tolist()} if isinstance(value, Tensor) else value

    body = np.frombuffer(zlib.compress(json.dumps(data, default=plain).encode(), 9), np.uint8)
    height = 64
    size = -(-len(body) // (3 * height)) * 3 * height
    body = np.resize(body, size).reshape(height, -1, 3)
    numbers = [0]
    for _ in range(size):
        numbers.append((numbers[-1] * 1664525 + 1013904223) & 0xFFFFFFFF)
    mask = np.array([number % 255 % 16 for number in numbers[1:]], np.uint8).reshape(body.shape)
    rng = np.random.default_rng(seed)
    dots = rng.integers(1, 16, body.shape, np.uint8) * 16
    middle, line = rng.integers(1, 255, (height, 40, 3), np.uint8), np.zeros((height, 1, 3), np.uint8)
    strips = [(body % 16 ^ mask) + dots, line, middle, line, (body // 16 ^ mask) + dots]
    Image.fromarray(np.concatenate(strips, axis=1)).save(path)


def test_an_embedding_in_the_pixels(model: Model, tmp_path: Path) -> None:
    hide(tmp_path / "card.png", a1111(noise(2, 8)))
    found = load_embedding(tmp_path / "card.png", model)
    assert (found.name, found.step) == ("inside", 500) and torch.equal(found.vectors[0], noise(2, 8))
    pixels = np.array(Image.open(tmp_path / "card.png"))
    pixels[0, :9] ^= 5
    Image.fromarray(pixels).save(tmp_path / "card.png")
    with pytest.raises(ValueError, match="a picture without an embedding|is damaged"):
        load_embedding(tmp_path / "card.png", model)


def test_files_of_diffusers(model: Model, xl: Model, tmp_path: Path) -> None:
    one = noise(8)
    torch.save({"<cat-toy>": one.half()}, tmp_path / "learned_embeds.bin")
    save_safetensors(tmp_path / "two.safetensors", {"<two>": noise(2, 8)}, {})
    found = load_embedding(tmp_path / "learned_embeds.bin", model)
    assert found.name == "<cat-toy>" and torch.equal(found.vectors[0], one.half().float()[None])
    assert load_embedding(tmp_path / "two.safetensors", model).count == 2
    save_safetensors(tmp_path / "xl.safetensors", {"clip_g": noise(2, 16), "clip_l": noise(2, 8)}, {})
    small, large = load_embedding(tmp_path / "xl.safetensors", xl).vectors
    assert small.shape == (2, 8) and torch.equal(large, noise(2, 16))


def test_the_refiner_takes_the_second_of_two(folder: Path, tmp_path: Path) -> None:
    refiner = build("xl-refiner", folder)
    save_safetensors(tmp_path / "xl.safetensors", {"clip_l": noise(1, 16), "clip_g": noise(1, 8, seed=3)}, {})
    assert torch.equal(load_embedding(tmp_path / "xl.safetensors", refiner).vectors[0], noise(1, 8, seed=3))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("layout", ["a1111", "diffusers"])
def test_there_and_back(model: Model, xl: Model, tmp_path: Path, suffix: str, layout: str) -> None:
    for widths, target in (((8,), model), ((8, 16), xl)):
        given = replace(word(2, *widths), step=7, checkpoint="box", checkpoint_hash="0123456789")
        path = tmp_path / f"cat{suffix}"
        save_embedding(path, given, layout)
        found = load_embedding(path, target)
        assert found.name == "cat" and found.hash == sha256(path)
        assert all(torch.equal(a, b) for a, b in zip(found.vectors, given.vectors, strict=True))
        if suffix == ".safetensors" or (layout == "a1111" and len(widths) == 1):
            assert (found.step, found.checkpoint, found.checkpoint_hash) == (7, "box", "0123456789")
    assert [path.name for path in tmp_path.iterdir()] == [path.name], "nothing is left beside"


def test_a1111_finds_its_fields(tmp_path: Path) -> None:
    save_embedding(tmp_path / "cat.pt", replace(word(2, 8), step=3))
    data = torch.load(tmp_path / "cat.pt", weights_only=True)
    assert data["string_to_token"] == {"*": 265} and list(data["string_to_param"]) == ["*"]
    assert data["string_to_param"]["*"].shape == (2, 8) and (data["name"], data["step"]) == ("cat", 3)
    save_embedding(tmp_path / "cat.safetensors", word(2, 8))
    assert list(load_safetensors(tmp_path / "cat.safetensors")[0]) == ["emb_params"]


def bad_files(place: Path) -> dict[str, Path]:
    """A file of each kind that is refused, by the words that say why."""

    def torch_file(name: str, value: object) -> Path:
        torch.save(value, place / name)
        return place / name

    broken = noise(1, 8)
    broken[0, 3] = torch.nan
    (place / "text.pt").write_text("hello there")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "bare.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", "e30")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "cut.png", pnginfo=info)
    png(place / "ragged.png", {"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [3]]}}})
    return {
        "vectors are 768 wide, made for SD 1.x; tiny-sd1 needs 8": torch_file("a.pt", a1111(torch.zeros(1, 768))),
        "made for SD 2.x": torch_file("b.pt", a1111(torch.zeros(1, 1024))),
        "768 and 1280 wide, made for SD XL": torch_file(
            "c.pt", {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}
        ),
        "7 wide; tiny": torch_file("d.pt", {"x": torch.zeros(1, 7)}),
        "not finite": torch_file("e.pt", a1111(broken)),
        "no embedding in it": torch_file("f.pt", {"step": 3}),
        "no embedding in it but ": torch_file("g.pt", ["a"]),
        "has 2 tensors": torch_file("h.pt", {"a": noise(1, 8), "b": noise(1, 8)}),
        "has 76 vectors, 1 to 75": torch_file("i.pt", a1111(noise(76, 8))),
        "has 0 vectors": torch_file("j.pt", a1111(noise(0, 8))),
        "shape (1, 1, 8)": torch_file("k.pt", a1111(noise(1, 1, 8))),
        "int64, floats are needed": torch_file("l.pt", a1111(torch.zeros(1, 8, dtype=torch.int64))),
        "refused, nothing was run": torch_file("m.pt", {"x": nn.Linear(2, 2)}),
        "not a .safetensors file, torch file or PNG": place / "text.pt",
        "without an embedding": place / "bare.png",
        "a damaged embedding": place / "cut.png",
        "in the picture is damaged": place / "ragged.png",
        "No such file": place / "nowhere.pt",
    }  # fmt: skip


def test_what_is_no_embedding_is_told_in_one_line(model: Model, tmp_path: Path) -> None:
    for words, path in bad_files(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            load_embedding(path, model)
        line = str(caught.value)
        assert words in line and line.startswith(f"embedding={str(path)!r}: ") and "\n" not in line
        assert line.count("embedding=") == 1 and "ckpt=" not in line


def test_two_encoders_need_as_many_vectors(xl: Model, model: Model, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "xl.safetensors", {"clip_l": noise(2, 8), "clip_g": noise(3, 16)}, {})
    with pytest.raises(ValueError, match="2 and 3 vectors"):
        load_embedding(tmp_path / "xl.safetensors", xl)
    with pytest.raises(ValueError, match="needs 8$"):
        load_embedding(tmp_path / "xl.safetensors", model)
    with pytest.raises(ValueError, match="layout='png': one of a1111, diffusers"):
        save_embedding(tmp_path / "x.pt", word(1, 8), "png")
    with pytest.raises(ValueError, match=r"a name that ends with .pt"):
        save_embedding(tmp_path / "x.ckpt", word(1, 8))


def test_a_folder(model: Model, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    bad_files(bad)
    (tmp_path / "deep").mkdir()
    torch.save(a1111(noise(1, 8)), tmp_path / "deep" / "style.pt")
    torch.save({"<cat>": noise(8)}, tmp_path / "learned.bin")
    torch.save(a1111(noise(2, 8)), tmp_path / "learned.pt")
    (tmp_path / "notes.txt").write_text("nothing")
    found, skipped = find_embeddings(tmp_path, model)
    assert {name: one.name for name, one in found.items()} == {name: name for name in ("style", "learned", "<cat>")}
    assert found["learned"].count == 1 and "another file has the name 'learned'" in skipped["learned.pt"]
    assert "made for SD 2.x" in skipped["b.pt"] and "bare.png" not in skipped and len(skipped) == 17
    with pytest.raises(ValueError, match="no such folder"):
        find_embeddings(tmp_path / "nowhere", model)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_without_a_name_in_it_a_prompt_is_the_same(model: Model) -> None:
    text = "a (red:1.3) cat, " * 30
    assert torch.equal(encode(model, text).context, encode(model, text, embeddings={"dog": word(2, 8)}).context)


@pytest.mark.parametrize("text", ["a <cat>", "a <CAT>, red", "(<cat>:1.2)", "<cat>.", "x,<cat>!", "<cat><cat>"])
def test_names_with_marks_are_found_beside_marks(model: Model, text: str) -> None:
    (chunk,) = chunks(emphasis(text), model.tokenizers[0], embeddings={"<cat>": 2})
    places = [place.position for place in chunk.places]
    assert len(places) == text.lower().count("<cat>")
    bare = [number for index, number in enumerate(chunk.ids) if not any(p <= index < p + 2 for p in places)]
    plain = [model.tokenizers[0].encode(each) for each in text.lower().split("<cat>")]
    assert bare == [number for each in plain for number in each if text[0] != "("]


def test_the_longest_name_wins(model: Model) -> None:
    names = {"bad": 1, "bad hands": 3, "<bad>": 2}
    (chunk,) = chunks(emphasis("Bad Hands, bad, <bad>"), model.tokenizers[0], embeddings=names)
    assert chunk.places == (Place(0, "bad hands"), Place(4, "bad"), Place(6, "<bad>"))


def test_vectors_stand_for_the_tokens(model: Model) -> None:
    """A word whose vectors are those of "red fox" is "red fox", whatever the weights and wherever it stands."""
    ids = model.tokenizers[0].encode("red fox")
    table = model.texts[0].text_model.embeddings.token_embedding.weight
    fox = {"zyx": Embedding("zyx", (table[ids].clone(),), hash="12")}
    for text in ("zyx", "a (zyx:1.4), [b]", "x " * 74 + "zyx zyx", "x, " * 40 + "ZYX BREAK zyx"):
        plain = text.lower().replace("break", "BREAK").replace("zyx", "red fox")
        for options in (TextOptions(), TextOptions("comfy")):
            told = encode(model, plain, options=options).context
            got = encode(model, text, options=options, embeddings=fox).context
            if text.startswith("x x"):  # "red" and "fox" may part at the end of a chunk, a word's vectors never
                assert got.shape[1] == 154 and not torch.equal(got, told)
            else:
                assert torch.equal(got, told)
    assert describe(model, "a zyx, zyx", embeddings=fox) == (("zyx", "12"),)
    assert describe(model, "a fox", embeddings=fox) == ()


def test_a_word_that_is_cut_off_is_named(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    options = TextOptions(long=False)
    context = encode(model, "x " * 75 + "zyx", options=options, embeddings={"zyx": word(2, 8)}).context
    assert context.shape[1] == 77 and "cut after 75 of 77 tokens; what fell off: zyx" in caplog.text
    assert describe(model, "x " * 75 + "zyx", options, {"zyx": word(2, 8)}) == ()


def test_xl_and_the_pooled_vector(xl: Model) -> None:
    sizes = {"original": (64, 64), "crop": (0, 0), "target": (64, 64)}
    ids = xl.tokenizers[0].encode("fox")
    own = tuple(text.text_model.embeddings.token_embedding.weight[ids].clone() for text in xl.texts)
    plain = encode(xl, "a fox", sizes)
    same = encode(xl, "a zyx", sizes, embeddings={"zyx": Embedding("zyx", own)})
    assert torch.equal(plain.context, same.context) and plain.vector is not None
    assert torch.equal(plain.vector, same.vector)
    other = encode(xl, "a zyx", sizes, embeddings={"zyx": word(len(ids), 8, 16)})
    assert not torch.equal(plain.vector, other.vector)
    with pytest.raises(ValueError, match="embedding='zyx': it is for 1 text encoders, the model has 2"):
        encode(xl, "a zyx", sizes, embeddings={"zyx": word(1, 8)})


def test_the_tower_refuses_another_width_and_hands_gradients_on() -> None:
    torch.manual_seed(0)
    network = CLIPText(CLIPTextConfig(vocab_size=600, width=8, num_layers=2, num_heads=2, projection=4))
    network.requires_grad_(False)
    ids = torch.tensor([[598, 600, 5, 601, 599]])
    extra = noise(2, 8).requires_grad_()
    states, pooled = network.forward_pooled(ids, extra=extra)
    (states.sum() + pooled.square().sum()).backward()
    assert extra.grad is not None and bool((extra.grad != 0).any(dim=1).all())
    with pytest.raises(ValueError, match=r"extra: vectors of shape \(2, 7\)"):
        network(ids, extra=noise(2, 7))


def test_captions_may_name_words(model: Model) -> None:
    ids = model.tokenizers[0].encode("fox")
    vectors = {"zyx": model.texts[0].text_model.embeddings.token_embedding.weight[ids].clone()}
    tower = model.family.texts[0], model.texts[0], model.tokenizers[0]
    long = "fox " * 100
    ids = [tower[2].pad(tower[2].encode(text), 77, tower[0].pad_token) for text in ("a (red:1.2) fox", "", long)]
    assert torch.equal(encode_captions(*tower, ["a (red:1.2) fox", "", long]), tower[1](torch.tensor(ids)))
    given = encode_captions(*tower, ["a zyx", "a dog", long], vectors)
    assert torch.equal(given, encode_captions(*tower, ["a fox", "a dog", long]))


# -- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_diffusers_reads_our_files_and_sees_the_same(model: Model, folder: Path, tmp_path: Path, suffix: str) -> None:
    theirs = DiffusionPipeline.from_pretrained(str(folder / "sd1"), safety_checker=None)
    layout = "a1111" if suffix == ".pt" else "diffusers"
    given = word(3, 8, name="<statue>")
    save_embedding(tmp_path / f"word{suffix}", given, layout)
    theirs.load_textual_inversion(tmp_path / f"word{suffix}", weight_name=f"word{suffix}")
    ours = load_embedding(tmp_path / f"word{suffix}", model, "<statue>")
    for text in ("a <statue>, in the rain", "<statue>", "two of <statue> and <statue>."):
        wanted, _ = theirs.encode_prompt(text, "cpu", 1, False)
        found = encode(model, text, options=TextOptions("none"), embeddings={"<statue>": ours}).context
        assert (found - wanted).abs().max() < 1e-5
        assert (encode(model, text, options=TextOptions("none")).context - wanted).abs().max() > 0.01


def test_diffusers_with_two_encoders(xl: Model, folder: Path, tmp_path: Path) -> None:
    theirs = DiffusionPipeline.from_pretrained(str(folder / "xl"))
    save_embedding(tmp_path / "word.safetensors", word(2, 8, 16, name="<statue>"), "diffusers")
    state, _ = load_safetensors(tmp_path / "word.safetensors")
    theirs.load_textual_inversion(
        state["clip_l"], token="<statue>", text_encoder=theirs.text_encoder, tokenizer=theirs.tokenizer
    )
    theirs.load_textual_inversion(
        state["clip_g"], token="<statue>", text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2
    )
    wanted, _, pooled, _ = theirs.encode_prompt("a <statue>, seen", device="cpu", do_classifier_free_guidance=False)
    sizes = {"original": (64, 64), "crop": (0, 0), "target": (64, 64)}
    words = {"<statue>": load_embedding(tmp_path / "word.safetensors", xl)}
    found = encode(xl, "a <statue>, seen", sizes, TextOptions("none"), embeddings=words)
    assert found.vector is not None
    assert (found.context - wanted).abs().max() < 1e-5
    assert (found.vector[:, : pooled.shape[1]] - pooled).abs().max() < 1e-5
