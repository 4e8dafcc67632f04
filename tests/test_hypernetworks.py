"""Hypernetworks: what A1111 computes, worn by a U-Net and taken off again, and its files both ways."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.models.hypernetwork import ACTIVATIONS, Hypernetwork, HypernetworkConfig, worn
from sfumato.models.transformer import CrossAttention
from sfumato.models.unet import UNet, UNetConfig
from sfumato.weights.hypernetworks import HypernetworkFile, load_hypernetwork, save_hypernetwork
from tests.conftest import randomise

WIDTHS = (8, 16)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), context_dim=12, num_heads=2,
        norm_groups=4,
    )  # fmt: skip
    return randomise(UNet(config)).eval()  # type: ignore[return-value]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(seed: int = 0, std: float = 0.3, **fields: object) -> Hypernetwork:
    network = Hypernetwork(HypernetworkConfig(**({"widths": (8, 12, 16)} | fields)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def ran(unet: UNet) -> Tensor:
    with torch.no_grad():
        return unet(noise(1, 4, 8, 8), torch.tensor([500]), noise(1, 5, 12, seed=2))


def test_keys_and_values_are_made_of_changed_contexts() -> None:
    """By hand, in self-attention and in cross-attention: K = W_k (c + s h_k(c)), V = W_v (c + s h_v(c))."""
    torch.manual_seed(1)
    network, strength = made(), 0.7
    for width in (8, 12):
        attention = CrossAttention(8, width, 2)
        x, context = noise(1, 6, 8), noise(1, 5, width, seed=3)
        for_keys, for_values = (part.linear for part in network.pair(width))
        keys, values = context + strength * for_keys(context), context + strength * for_values(context)
        q, k, v = attention.to_q(x), attention.to_k(keys), attention.to_v(values)
        q, k, v = (z.unflatten(2, (2, 4)).transpose(1, 2) for z in (q, k, v))
        looks = torch.softmax(q @ k.transpose(2, 3) / 2, dim=-1)
        wanted = attention.to_out((looks @ v).transpose(1, 2).flatten(2))
        with worn(attention, [(network, strength)]):
            assert (attention(x, context) - wanted).abs().max() < 1e-6
            assert (attention.weights(x, context) - looks.mean(dim=1)).abs().max() < 1e-6
        assert (attention(x, context) - wanted).abs().max() > 0.01


def test_what_is_worn_is_taken_off(unet: UNet) -> None:
    before, one, two = ran(unet), made(), made(1)
    names = list(unet.state_dict())
    with worn(unet, [(one, 0.0)]):
        assert torch.equal(ran(unet), before), "strength 0 changes no bit"
    with worn(unet, []):
        assert torch.equal(ran(unet), before)
    with worn(unet, [(one, 1.0), (two, -0.5)]):
        both = ran(unet)
        assert list(unet.state_dict()) == names
    with worn(unet, [(one, 1.0)]), worn(unet, [(two, -0.5)]):
        assert torch.equal(ran(unet), both), "one over the other"
    with worn(unet, [(two, -0.5), (one, 1.0)]):
        assert not torch.equal(ran(unet), both), "the order counts"
    assert not torch.equal(both, before)
    with pytest.raises(RuntimeError, match="on the way"), worn(unet, [(one, 1.0)]):
        raise RuntimeError("on the way")
    assert torch.equal(ran(unet), before)


def test_only_widths_that_it_has_are_changed(unet: UNet) -> None:
    cross_alone = made(widths=(12,))
    with worn(unet, [(cross_alone, 1.0)]):
        changed = {attention.context_dim: len(attention.worn) for attention in attentions(unet)}
    assert changed == {8: 0, 12: 1, 16: 0}
    with (
        pytest.raises(ValueError, match=r"widths \(768,\), this U-Net has \[8, 12, 16\]"),
        worn(unet, [(made(widths=(768,)), 1.0)]),
    ):
        pass
    with pytest.raises(ValueError, match="strength=nan"), worn(unet, [(cross_alone, float("nan"))]):
        pass


def attentions(unet: UNet) -> list[CrossAttention]:
    return [module for module in unet.modules() if isinstance(module, CrossAttention)]


def test_a_half_precision_unet_wears_it(unet: UNet) -> None:
    attention = CrossAttention(8, 12, 2).to(torch.bfloat16)
    with worn(attention, [(made(), 1.0)]):
        assert attention(noise(1, 6, 8).bfloat16(), noise(1, 5, 12).bfloat16()).dtype == torch.bfloat16


# -- files ------------------------------------------------------------------------------------------------------------


def theirs(width: int, layers: list[float], activation: str | None, norm: bool, output: bool, drop: list[float]):
    """The layers of A1111's module by its rules, written down apart from ours."""
    parts: list[nn.Module] = []
    for index in range(len(layers) - 1):
        inner, outer = int(width * layers[index]), int(width * layers[index + 1])
        parts.append(nn.Linear(inner, outer))
        is_last = index == len(layers) - 2
        if activation not in (None, "linear") and (output or not is_last):
            parts.append({"relu": nn.ReLU, "swish": nn.Hardswish, "mish": nn.Mish, "tanh": nn.Tanh}[activation]())
        parts += [nn.LayerNorm(outer)] if norm else []
        parts += [nn.Dropout(drop[index + 1])] if drop and drop[index + 1] > 0 else []
    module = nn.Module()
    module.linear = nn.Sequential(*parts)
    return module.eval()


SAYS = {
    "plain": {"layers": [1, 2, 1], "activation": "linear"},
    "swish": {"layers": [1, 2, 2, 1], "activation": "swish", "norm": True},
    "dropout": {"layers": [1, 1.5, 2, 1], "activation": "relu", "drop": [0, 0.1, 0.3, 0], "output": True},
    "mish": {"layers": [1, 4, 1], "activation": "mish", "norm": True, "drop": [0, 0.3, 0]},
}


@pytest.mark.parametrize("name", SAYS)
def test_files_of_a1111(name: str, tmp_path: Path) -> None:
    says = {"norm": False, "output": False, "drop": []} | SAYS[name]
    torch.manual_seed(3)
    modules = {width: (theirs(width, **says), theirs(width, **says)) for width in WIDTHS}
    data: dict[object, object] = {
        width: tuple(OrderedDict(module.state_dict()) for module in pair) for width, pair in modules.items()
    }
    data |= {
        "step": 1200, "name": "inside", "layer_structure": says["layers"], "activation_func": says["activation"],
        "is_layer_norm": says["norm"], "weight_initialization": "XavierNormal", "use_dropout": bool(says["drop"]),
        "sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5", "activate_output": says["output"],
        "dropout_structure": says["drop"] or None, "optional_info": None,
    }  # fmt: skip
    torch.save(data, tmp_path / "mine.pt")
    found = load_hypernetwork(tmp_path / "mine.pt")
    facts = (found.name, found.step, found.checkpoint, found.checkpoint_hash, len(found.hash))
    assert facts == ("mine", 1200, "v1-5", "abc", 64) and found.network.config.weight_init == "XavierNormal"
    for width, pair in modules.items():
        x = noise(2, 5, width)
        for ours, other in zip(found.network.pair(width), pair, strict=True):
            assert torch.equal(ours(x, 0.8), x + other.linear(x) * 0.8)
    save_hypernetwork(tmp_path / "again.pt", found)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    for key in data.keys() - {"name", "dropout_structure", "optional_info"} - set(WIDTHS):
        assert again[key] == data[key], key
    for width in WIDTHS:
        for ours, other in zip(again[width], modules[width], strict=True):
            assert list(ours) == list(other.state_dict())
            assert all(torch.equal(ours[key], value) for key, value in other.state_dict().items())
    same = load_hypernetwork(tmp_path / "again.pt").network
    assert replace(same.config, dropout=()) == replace(found.network.config, dropout=())


def test_the_first_files_and_those_that_say_nothing(tmp_path: Path) -> None:
    old = {
        "linear1.weight": noise(16, 8), "linear1.bias": noise(16), "linear2.weight": noise(8, 16),
        "linear2.bias": noise(8),
    }  # fmt: skip
    torch.save({8: (old, old), "step": 3}, tmp_path / "old.pt")
    network = load_hypernetwork(tmp_path / "old.pt", "mine").network
    x = noise(1, 3, 8)
    inner = x @ old["linear1.weight"].T + old["linear1.bias"]
    wanted = x + (inner @ old["linear2.weight"].T + old["linear2.bias"])
    assert (network.pair(8)[0](x) - wanted).abs().max() < 1e-5
    plain = theirs(8, [1, 2, 2, 1], "tanh", False, True, [0, 0.3, 0, 0]).state_dict()
    says = {"layer_structure": [1, 2, 2, 1], "activation_func": "tanh", "use_dropout": True}
    torch.save({8: (plain, plain), **says}, tmp_path / "some.pt")
    config = load_hypernetwork(tmp_path / "some.pt").network.config
    assert config.dropout == (0.0, 0.3, 0.0, 0.0) and config.activate_output


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_goes_through_a_file(name: str, tmp_path: Path) -> None:
    network = made(widths=(8,), activation=name)
    save_hypernetwork(tmp_path / "a.pt", HypernetworkFile("a", network, 5))
    found = load_hypernetwork(tmp_path / "a.pt")
    assert torch.equal(found.network.pair(8)[1](noise(1, 3, 8)), network.pair(8)[1](noise(1, 3, 8)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_is_no_hypernetwork_is_told_in_one_line(tmp_path: Path) -> None:
    plain = theirs(8, [1, 2, 1], None, False, False, []).state_dict()
    nan = plain | {"linear.0.bias": torch.full((16,), torch.nan)}
    bad = {
        "no width has tensors": {"step": 1},
        "is missing": {8: (plain, {})},
        "has no place": {8: (plain, plain | {"more": noise(2)})},
        "its layers need (24, 8)": {8: (plain, plain), "layer_structure": [1, 3, 1]},
        "begin and end with 1": {8: (plain, plain), "layer_structure": [2, 1]},
        "1 to 65536 are allowed": {8: (plain, plain), "layer_structure": [1, 10**9, 1]},
        "a list of numbers": {8: (plain, plain), "layer_structure": "1, 2, 1"},
        "activation='softmax2d'": {8: (plain, plain), "activation_func": "softmax2d"},
        "for keys and for values": {8: (plain,)},
        "not finite": {8: (plain, nan)},
        "refused": {8: (nn.Linear(2, 2), plain)},
        "widths=(-3,)": {-3: (plain, plain)},
    }
    for words, value in bad.items():
        torch.save(value, tmp_path / "bad.pt")
        with pytest.raises(ValueError) as caught:
            load_hypernetwork(tmp_path / "bad.pt")
        line = str(caught.value)
        assert words in line and line.startswith("hypernetwork=") and "\n" not in line and "ckpt=" not in line
    with pytest.raises(ValueError, match=r"ends with .pt"):
        save_hypernetwork(tmp_path / "x.safetensors", HypernetworkFile("x", made()))


@pytest.mark.parametrize("init", ["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"])
def test_new_weights_come_from_the_generator(init: str) -> None:
    def new(seed: int) -> Tensor:
        network = Hypernetwork(HypernetworkConfig(widths=(64,), weight_init=init, layer_norm=True))
        network.initialise(torch.Generator().manual_seed(seed))
        assert not network.pair(64)[0].linear[0].bias.any()
        return network.pair(64)[0].linear[0].weight.detach()

    assert torch.equal(new(1), new(1)) and not torch.equal(new(1), new(2))
    fan = {"Normal": 0.01, "Xavier": (2 / 192) ** 0.5, "Kaiming": (2 / 64) ** 0.5}
    wanted = next(std for name, std in fan.items() if init.startswith(name))
    assert new(1).std().item() == pytest.approx(wanted, rel=0.05)
