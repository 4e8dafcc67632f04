"""IP-Adapters: tokens and steered answers against diffusers' at tiny size, plain and plus, and their files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.models.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from sfumato.models.unet import UNet
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.controls import load_ip_adapter, save_ip_adapter
from sfumato.weights.files import load_safetensors, save_safetensors
from sfumato.weights.layouts.diffusers_names import to_diffusers, unet_keys
from tests.test_parity_networks import UNETS, diffusers_unet, randn, randomise
from tests.tiny import TINIES, random_parts

PLAIN = IPAdapterConfig(image_dim=20, context_dim=12)
PLUS = IPAdapterConfig(
    image_dim=20, context_dim=12, num_tokens=5, depth=4, width=24, num_heads=1
)  # depth and heads as diffusers


def adapter_for(unet: UNet, config: IPAdapterConfig, seed: int = 4) -> IPAdapter:
    dims = [attention.to_q.out_features for attention in cross_attentions(unet)]
    network = randomise(IPAdapter(config, dims), seed)
    assert isinstance(network, IPAdapter)
    return network


def seen_by(config: IPAdapterConfig, batch: int = 2) -> Tensor:
    return randn(batch, 9, config.image_dim, seed=6) if config.depth else randn(batch, config.image_dim, seed=6)


def nested(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As .bin files hold it, and as diffusers wants it."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("config", [PLAIN, PLUS], ids=["plain", "plus"])
@torch.no_grad()
def test_steered_answers_are_diffusers(kind: str, config: IPAdapterConfig) -> None:
    unet, theirs = randomise(UNet(UNETS[kind]), 7), diffusers_unet(UNETS[kind]).eval()
    assert isinstance(unet, UNet)
    theirs.load_state_dict(to_diffusers(unet.state_dict(), unet_keys(UNETS[kind])), strict=True)
    network = adapter_for(unet, config)
    x, t, context = randn(2, 4, 16, 8), torch.tensor([3.0, 700.0]), randn(2, 7, 12)
    added, vector = {}, None
    if UNETS[kind].vector_dim is not None:
        embeds, numbers = randn(2, 10, seed=11), torch.arange(12.0).reshape(2, 6)
        added = {"text_embeds": embeds, "time_ids": numbers}
        vector = torch.cat([embeds, theirs.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=1)
    plain = unet(x, t, context, vector)
    seen = seen_by(config)
    with network.steering(unet, network(seen), 0.7):
        steered = unet(x, t, context, vector)
    assert torch.equal(unet(x, t, context, vector), plain), "afterwards the U-Net is as it was"

    theirs._load_ip_adapter_weights([nested(network.state_dict())], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    theirs.eval()
    tokens = theirs.encoder_hid_proj([seen[:, None]])[0][:, 0]
    torch.testing.assert_close(network(seen), tokens, rtol=1e-5, atol=1e-5)
    expected = theirs(x, t, context, added_cond_kwargs=added | {"image_embeds": [seen[:, None]]}).sample
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-4)
    assert float((steered - plain).abs().max()) > 0.05


@torch.no_grad()
def test_scales_tokens_and_several_adapters() -> None:
    unet = randomise(UNet(UNETS["sd1"]), 7)
    assert isinstance(unet, UNet)
    network, other = adapter_for(unet, PLAIN), adapter_for(unet, PLAIN, 5)
    args = (randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), randn(2, 7, 12))
    plain, tokens = unet(*args), network(seen_by(PLAIN, 1))
    count = len(cross_attentions(unet))

    def drawn(*steps: tuple[IPAdapter, float | list[float]]) -> Tensor:
        if not steps:
            return unet(*args)
        with steps[0][0].steering(unet, tokens, steps[0][1]):
            return drawn(*steps[1:])

    assert torch.equal(drawn((network, 0)), plain)
    torch.testing.assert_close(drawn((network, [0.4] * count)), drawn((network, 0.4)))
    torch.testing.assert_close(drawn((network, 0.3), (network, 0.4)), drawn((network, 0.7)))
    torch.testing.assert_close(drawn((network, 0.3), (other, 0.4)), drawn((other, 0.4), (network, 0.3)))
    only_last = drawn((network, [0.0] * (count - 1) + [1.0]))
    assert not torch.equal(only_last, plain) and not torch.equal(only_last, drawn((network, 1)))
    with network.steering(unet, tokens.expand(2, -1, -1), 0.5):
        torch.testing.assert_close(unet(*args), drawn_once := unet(*args))
    torch.testing.assert_close(drawn((network, 0.5)), drawn_once)
    with pytest.raises(RuntimeError), network.steering(unet, tokens):
        raise RuntimeError
    assert torch.equal(unet(*args), plain)
    words = f"scale: 2 given, one number or {count}"
    with pytest.raises(ValueError, match=words), network.steering(unet, tokens, [1, 2]):
        pass
    with pytest.raises(ValueError, match="the adapter is for"):
        drawn_by = UNet(UNETS["xl"])
        with network.steering(drawn_by, tokens):
            pass
    with pytest.raises(ValueError, match=r"seen: of shape \(1, 9, 20\), \(B, 20\) is needed"):
        network(seen_by(PLUS, 1))


@pytest.mark.parametrize("kind, total", [("sd1", 32), ("sd2-base", 32), ("xl", 140)])
def test_full_size_has_the_published_numbers(kind: str, total: int) -> None:
    """ip-adapter_sd15 is numbered 1 to 31, ip-adapter_sdxl 1 to 139, the middle last."""
    from sfumato.families import FAMILIES

    config = FAMILIES[kind].unet
    with torch.device("meta"):
        unet = UNet(config)
        dims = [attention.to_q.out_features for attention in cross_attentions(unet)]
        network = IPAdapter(IPAdapterConfig(context_dim=config.context_dim), dims)
    names = list(network.ip_adapter)
    assert names == [str(number) for number in range(1, total, 2)]
    assert network.state_dict()[f"ip_adapter.{total - 1}.to_k_ip.weight"].shape == (1280, config.context_dim)
    if kind == "sd1":
        keys_values, tokens = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280), (1024 + 1) * 4 * 768 + 2 * 768
        assert sum(parameter.numel() for parameter in network.parameters()) == keys_values + tokens == 22_319_616
        assert network.state_dict()["ip_adapter.1.to_v_ip.weight"].shape == (320, 768)


def model_of(kind: str, tmp_path: Path) -> Model:
    path = tmp_path / f"{kind}.safetensors"
    save_checkpoint(path, TINIES[kind], random_parts(TINIES[kind]), torch.float32)
    return load_model(path)


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_files_go_there_and_back(plus: bool, tmp_path: Path) -> None:
    model = model_of("sd1", tmp_path)
    context = model.family.unet.context_dim
    shape = {"depth": 2, "width": 24, "head_channels": 64, "num_heads": 1} if plus else {}
    network = adapter_for(model.unet, IPAdapterConfig(20, context, 4, **shape))
    save_ip_adapter(tmp_path / "ip.safetensors", network)
    torch.save(nested(network.state_dict()), tmp_path / "ip.bin")
    for name in ("ip.safetensors", "ip.bin"):
        found = load_ip_adapter(tmp_path / name, model)
        assert found.plus == plus and not found.training
        assert all(torch.equal(found.state_dict()[key], value) for key, value in network.state_dict().items())
        torch.testing.assert_close(found(seen_by(network.config)), network(seen_by(network.config)))


def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    sd1, xl = model_of("sd1", tmp_path), model_of("xl", tmp_path)
    network = adapter_for(sd1.unet, IPAdapterConfig(20, sd1.family.unet.context_dim))
    save_ip_adapter(tmp_path / "ip.safetensors", network)

    def refused(name: str, model: Model, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            load_ip_adapter(tmp_path / name, model)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("ip_adapter=")

    refused("ip.safetensors", xl, "it is for a context of 8; tiny-xl has 24")
    refused("sd1.safetensors", sd1, "it is a Stable Diffusion U-Net, no IP-Adapter")
    tensors, _ = load_safetensors(tmp_path / "ip.safetensors")
    save_safetensors(tmp_path / "more.safetensors", tensors | {"ip_adapter.0.to_k_lora.weight": torch.zeros(1)}, {})
    refused("more.safetensors", sd1, "the tensor ip_adapter.0.to_k_lora.weight is in no network")
    del tensors["ip_adapter.3.to_k_ip.weight"]
    save_safetensors(tmp_path / "less.safetensors", tensors, {})
    refused("less.safetensors", sd1, "ip_adapter.3.to_k_ip.weight is missing")
    with pytest.raises(ValueError, match="a .safetensors file is needed"):
        save_ip_adapter(tmp_path / "folder", network)
