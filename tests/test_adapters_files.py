"""Adapter files: what is said of them, what is refused, and that what is written is read again, here and by peers."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.models.deltas import BOFT, IA3, OFT, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, tensors_in
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.adapters.writing import model_hash, save_adapter, tensors_in_layout
from sfumato.weights.files import sha256
from tests.adapters import model_of, peer_texts, peer_unet, pipe_of, random_lora, text_outputs, unet_output
from tests.test_adapters_deltas import kinds
from tests.tiny import TINIES

SD1, XL = TINIES["sd1"], TINIES["xl"]
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def lora_tensors(stem: str, rank: int = 2, out: int = 8, inputs: int = 8) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": torch.ones(rank, inputs),
        f"{stem}.lora_up.weight": torch.ones(out, rank),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def test_what_is_said_of_a_file(tmp_path):
    changes = random_lora(SD1, rank=4)
    save_adapter(tmp_path / "style.safetensors", changes, SD1, metadata={"ss_output_name": "style"})
    adapter = load_adapter(tmp_path / "style.safetensors", model_of("sd1"))
    count = len(changes)
    assert adapter.describe() == f"lora style: LoRA, rank 4, {count} of {count} keys matched"
    assert (adapter.matched, adapter.total, adapter.rank, adapter.kinds) == (count, count, 4, ("LoRA",))
    assert adapter.hash == sha256(tmp_path / "style.safetensors") and adapter.metadata["ss_output_name"] == "style"
    assert set(adapter.parts) == {"unet", "text"} and adapter.num_bytes == sum(
        4 * t.numel() for made in changes.values() for change in made for t in tensors_in(change)
    )


def test_what_is_not_matched_is_named(tmp_path, caplog):
    tensors = lora_tensors(Q) | lora_tensors("lora_unet_no_such_module") | {"bundle_emb.x": torch.ones(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", SD1)
    assert (adapter.matched, adapter.total) == (1, 3)
    assert set(adapter.unmatched) == {"lora_unet_no_such_module", "bundle_emb.x"}
    assert "1 of 3 keys matched; not used: " in adapter.describe() and "bundle_emb.x" in caplog.text


def test_a_module_named_twice_is_changed_once(tmp_path):
    twice = Q.replace("down_blocks_0_attentions_0", "input_blocks_1_1")
    save_file(lora_tensors(Q) | lora_tensors(twice), tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", SD1)
    assert adapter.matched == 1 and len(adapter.unmatched) == 1
    assert [len(made) for made in adapter.changes.values()] == [1]


def xl_file() -> dict[str, Tensor]:
    """As of full-size XL: contexts of 2048."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    same = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    return lora_tensors(stem, 4, 640, 2048) | lora_tensors(same, 4, 1280, 2048)


REFUSED = {
    "other family": (xl_file, r"looks to be made for xl, the model's family is tiny-sd1"),
    "flux": (
        lambda: lora_tensors("lora_unet_double_blocks_0_img_attn_proj"),
        r"0 of 1 keys matched .*a transformer such as Flux",
    ),
    "nothing matches": (lambda: lora_tensors("lora_unet_x"), r"0 of 1 keys matched the model's family .*lora_unet_x"),
    "shape": (lambda: lora_tensors(Q, 2, 9, 8), rf"{Q}: tensors of shapes .* make \(9, 8\), not \(8, 8\)|{Q}: a diff"),
    "half a pair": (lambda: {f"{Q}.lora_up.weight": torch.ones(8, 2)}, rf"{Q}: up: a part is missing"),
    "no adapter": (lambda: {"model.weight": torch.ones(2)}, r"it is no adapter \(its first tensor is model.weight\)"),
    "empty": (dict, r"it is no adapter \(it is empty\)"),
    "bias": (lambda: {f"{Q}.diff_b": torch.ones(8)}, rf"{Q}: a change of its bias, which it has not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_in_one_line(tmp_path, name):
    tensors, why = REFUSED[name]
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    with pytest.raises(ValueError, match=why) as error:
        load_adapter(path, SD1)
    assert str(error.value).startswith(f"lora={str(path)!r}: ") and "\n" not in str(error.value)


NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_up.weight": torch.ones(8), "lora_down.weight": torch.ones(8)},
        {"lora_up.weight": torch.ones(8, 0), "lora_down.weight": torch.ones(0, 8)},
        {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8, 3, 3)},
        {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8), "alpha": torch.ones(0)},
        {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8), "dora_scale": torch.ones(3)},
        {"hada_w1_a": torch.ones(8, 2), "hada_w1_b": torch.ones(2, 8)},
        {"lokr_w1": torch.ones(2, 2)},
        {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 3)},
        {"oft_blocks": torch.ones(4, 4)},
        {"oft_blocks": torch.ones(3, 4, 4)},
        {"oft_blocks": torch.ones(1, 3, 4, 4)},
        {f"{name}.weight": torch.ones(3, 3) for name in ("a1", "a2", "b1", "b2")},
        {"weight": torch.ones(5), "on_input": torch.tensor(0)},
        {"ia3_l": torch.ones(5, 1)},
        {"diff": torch.ones(8)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
@pytest.mark.parametrize("stem", [Q, NORM])
def test_damaged_tensors_are_refused_by_name(tmp_path, stem, tensors):
    if stem == NORM and "diff" in tensors:
        return  # a norm's weight is of that shape
    save_file({f"{stem}.{name}": tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"^lora=.*{stem}"):
        load_adapter(tmp_path / "a.safetensors", SD1)


def test_other_refusals(tmp_path):
    (tmp_path / "a.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match=r"^lora=.*web page"):
        load_adapter(tmp_path / "a.safetensors", SD1)
    with pytest.raises(ValueError, match=r"^lora=.*folder has none of adapter_model"):
        load_adapter(tmp_path, SD1)
    save_file(lora_tensors(Q), tmp_path / "b.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match=r"^lora=.*lora_adapter_metadata: not readable as JSON"):
        load_adapter(tmp_path / "b.safetensors", SD1)


def test_a_pickle_is_read_safely(tmp_path):
    torch.save(lora_tensors(Q), tmp_path / "a.pt")
    assert load_adapter(tmp_path / "a.pt", SD1).matched == 1

    class Bad:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({**lora_tensors(Q), "x": Bad()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"^lora="):
        load_adapter(tmp_path / "b.pt", SD1)


def test_stacked_q_k_v_of_openclip(tmp_path):
    family = TINIES["sd2"]
    width, generator = family.texts[0].config.width, torch.Generator().manual_seed(0)
    up, down = torch.randn(3 * width, 2, generator=generator), torch.randn(2, width, generator=generator)
    stem = "lora_te_model_transformer_resblocks_0_attn_in_proj"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", family)
    assert adapter.matched == adapter.total == 1 and len(adapter.changes) == 3
    for third, name in enumerate("qkv"):
        (change,) = adapter.changes["text", f"text_model.encoder.layers.0.self_attn.{name}_proj.weight"]
        new = change.changed(torch.zeros(width, width), 1.0)
        torch.testing.assert_close(new, (up @ down)[third * width : (third + 1) * width])


PLACE = ("unet", "output_blocks.0.0.in_layers.2.weight")  # (32, 64, 3, 3)


def every_kind() -> dict[str, tuple[tuple[str, str], object]]:
    """A change of every kind on a linear layer, and some on a convolution, a bias and a norm."""
    linear = ("unet", "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight")  # (64, 8)
    generator = torch.Generator().manual_seed(4)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora = LoRA(r(64, 2), r(2, 8), 1.0)
    return {
        "lora": (linear, lora),
        "lora without alpha": (linear, LoRA(r(64, 2), r(2, 8))),
        "loha": (linear, LoHa(r(64, 2), r(2, 8), r(64, 2), r(2, 8), 1.0)),
        "lokr": (linear, LoKr(w1=r(4, 2), w2_a=r(16, 2), w2_b=r(2, 4), alpha=1.0)),
        "glora": (linear, GLoRA(r(8, 2), r(2, 8), r(64, 2), r(2, 8), 1.0)),
        "ia3": (linear, IA3(r(64))),
        "ia3 of inputs": (linear, IA3(r(8), True)),
        "oft": (linear, OFT(r(8, 8, 8), 0.01, r(64))),
        "boft": (linear, BOFT(r(2, 16, 4, 4))),
        "dora": (linear, DoRA(lora, r(64))),
        "dora of inputs": (linear, DoRA(lora, r(8), False)),
        "difference": (linear, Difference(r(64, 8))),
        "bias": (("unet", linear[1].replace("weight", "bias")), Difference(r(64))),
        "norm": (("unet", "input_blocks.1.0.in_layers.0.weight"), Difference(r(8))),
        "norm's bias": (("unet", "input_blocks.1.1.transformer_blocks.0.norm1.bias"), Difference(r(8))),
        "convolution": (PLACE, LoRA(r(32, 2), r(2, 64, 3, 3), 1.0)),
        "tucker": (PLACE, LoRA(r(32, 2), r(2, 64), 1.0, r(2, 2, 3, 3))),
        "dora of a convolution": (PLACE, DoRA(LoRA(r(32, 2), r(2, 64, 3, 3)), r(32))),
    }


@pytest.mark.parametrize("name", every_kind())
def test_every_kind_written_is_read_again(tmp_path, name):
    key, change = every_kind()[name]
    weight = dict(model_of("sd1").unet.named_parameters())[key[1]].detach()
    save_adapter(tmp_path / "a.safetensors", {key: (change,)}, SD1)
    adapter = load_adapter(tmp_path / "a.safetensors", SD1)
    ((again,),) = (adapter.changes[key],)
    assert type(again) is type(change) and adapter.unmatched == ()
    assert torch.equal(again.changed(weight, 0.7), change.changed(weight, 0.7))


def test_every_kind_is_in_the_table():
    assert {type(change) for _, change in every_kind().values()} >= {
        type(change) for change in kinds().values() if not hasattr(change, "third")
    }


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_diffusers_reads_what_is_written(tmp_path, kind, layout):
    model, pipe = model_of(kind), pipe_of(kind)
    plain = peer_unet(pipe, model.family)
    changes = random_lora(model.family)
    save_adapter(tmp_path / "a.safetensors", changes, model.family, layout)
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    assert adapter.matched == adapter.total == len(changes)
    Wardrobe(model).wear([Worn(adapter)])
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs = peer_unet(pipe, model.family)
    torch.testing.assert_close(unet_output(model), theirs, **CLOSE)
    assert (theirs - plain).abs().max() > 0.01
    for ours, peers in zip(text_outputs(model), peer_texts(pipe, model.family), strict=True):
        torch.testing.assert_close(ours, peers, **CLOSE)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_what_is_written(tmp_path, dora):
    from peft import PeftModel

    model, pipe = model_of("sd1"), pipe_of("sd1")
    changes = random_lora(SD1, parts=("unet",))
    changes[PLACE] = (LoRA(torch.randn(32, 2), torch.randn(2, 64, 3, 3) / 10, 3.0),)
    if dora:
        changes = {key: (DoRA(made[0], torch.ones(made[0].up.shape[0])),) for key, made in changes.items()}
    save_adapter(tmp_path / "adapter_model.safetensors", changes, SD1, "peft")
    Wardrobe(model).wear([Worn(load_adapter(tmp_path, model))])
    pipe.unet = PeftModel.from_pretrained(pipe.unet, str(tmp_path))
    pipe.unet.eval()
    torch.testing.assert_close(unet_output(model), peer_unet(pipe, SD1), **CLOSE)


@pytest.mark.parametrize("name", ["loha", "lokr", "glora", "oft", "difference", "lora", "dora"])
def test_lycoris_reads_what_is_written(tmp_path, name):
    from lycoris import create_lycoris_from_weights

    model, pipe = model_of("sd1"), pipe_of("sd1")
    key, change = every_kind()[name]
    if name == "glora":  # the peer counts alpha / r twice
        change = GLoRA(change.a1, change.a2, change.b1, change.b2, 2.0)
    save_adapter(tmp_path / "a.safetensors", {key: (change,)}, SD1)
    Wardrobe(model).wear([Worn(load_adapter(tmp_path / "a.safetensors", model))])
    theirs = {n.replace("lora_unet_", "lycoris_"): t for n, t in load_file(tmp_path / "a.safetensors").items()}
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", pipe.unet, weights_sd=theirs)
        assert len(network.loras) == 1
        network.apply_to()
        out = peer_unet(pipe, SD1)
    torch.testing.assert_close(unet_output(model), out, **CLOSE)


def test_the_hash_is_of_the_bytes_behind_the_header(tmp_path):
    import hashlib

    path = tmp_path / "a.safetensors"
    save_adapter(path, random_lora(SD1), SD1, dtype=torch.float16)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + (start := int.from_bytes(data[:8], "little"))])
    told = header["__metadata__"]
    assert told["sshs_model_hash"] == hashlib.sha256(data[8 + start :]).hexdigest() == model_hash(load_file(path))
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_base_model_version"]) == ("4", "2.0", "sd_v1")
    assert {entry["dtype"] for name, entry in header.items() if name.endswith(".weight")} == {"F16"}


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_what_a_layout_cannot_hold_is_refused(tmp_path, layout):
    for name in ("loha", "ia3", "bias", "tucker", "dora of inputs"):
        key, change = every_kind()[name]
        with pytest.raises(ValueError, match=rf"layout='{layout}': .*'kohya' holds"):
            tensors_in_layout({key: (change,)}, SD1, layout)


def test_bad_targets_are_refused(tmp_path):
    changes = random_lora(SD1)
    for path, layout, given, why in (
        ("a.pt", "kohya", changes, "safetensors is written"),
        ("a.safetensors", "other", changes, "layout='other': one of kohya, diffusers, peft"),
        ("a.safetensors", "kohya", {}, "changes nothing"),
        ("a.safetensors", "peft", changes, "holds one network"),
        ("a.safetensors", "kohya", {("unet", "x.weight"): next(iter(changes.values()))}, "no module x"),
    ):
        with pytest.raises(ValueError, match=why):
            save_adapter(tmp_path / path, given, SD1, layout)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_keeps_its_metadata_when_written_again(tmp_path):
    save_adapter(tmp_path / "a.safetensors", random_lora(SD1), SD1, metadata={"ss_tag_frequency": "{}"})
    adapter = load_adapter(tmp_path / "a.safetensors", SD1)
    assert isinstance(adapter, Adapter) and {field.name for field in fields(adapter)} >= {"name", "hash", "changes"}
    save_adapter(tmp_path / "b.safetensors", adapter, SD1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
