"""Changes of one weight, each kind against its peer's module (LyCORIS) or its formula written out."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules import boft, diag_oft, glora, ia3, locon, loha, lokr
from torch import Tensor, nn

from sfumato.models.deltas import (
    BOFT,
    IA3,
    OFT,
    Difference,
    DoRA,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Rows,
    check_fits,
    moved,
    tensors_in,
)

LAYERS = {
    "linear": lambda: nn.Linear(12, 16),
    "conv1": lambda: nn.Conv2d(12, 16, 1),
    "conv3": lambda: nn.Conv2d(12, 16, 3, padding=1),
}


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def layer(kind: str) -> nn.Module:
    return random(LAYERS[kind](), 1)


def merged(peer: nn.Module, strength: float, shape: torch.Size) -> Tensor:
    """What the peer makes of its weight."""
    with torch.no_grad():
        return peer.get_merged_weight(strength, shape)[0].detach().float()


def same_output(change, base: nn.Module, peer: nn.Module, strength: float) -> None:
    """The layer with our weight against the peer's own forward; its merged LoHa and LoKr count alpha / r twice."""
    x = torch.randn(2, 12, *([5, 5] if isinstance(base, nn.Conv2d) else []), generator=torch.Generator().manual_seed(5))
    ours = torch.func.functional_call(base, {"weight": change.changed(base.weight.detach(), strength)}, x)
    peer.multiplier = strength
    peer.apply_to()
    same(ours.detach(), base(x).detach())


def tensors(peer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in peer.custom_state_dict().items()}


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tucker", [False, True])
def test_lora_is_locon(kind, tucker, strength):
    base = layer(kind)
    peer = random(locon.LoConModule("x", base, 1.0, 4, 2.0, use_tucker=tucker), 2)
    made = tensors(peer)
    change = LoRA(made["lora_up.weight"], made["lora_down.weight"], 2.0, made.get("lora_mid.weight"))
    assert (change.mid is not None) == (tucker and kind == "conv3") and change.rank == 4
    same(change.changed(base.weight.detach(), strength), merged(peer, strength, base.weight.shape))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tucker", [False, True])
def test_loha(kind, tucker, strength):
    base = layer(kind)
    peer = random(loha.LohaModule("x", base, 1.0, 3, 2.0, use_tucker=tucker), 2)
    made = tensors(peer)
    made.pop("alpha")
    change = LoHa(**{name.removeprefix("hada_"): tensor for name, tensor in made.items()}, alpha=2.0)
    same_output(change, base, peer, strength)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_dim": 1},
        {"lora_dim": 1, "use_tucker": True},
        {"lora_dim": 1, "decompose_both": True},
        {"lora_dim": 100},
        {"lora_dim": 1, "factor": 2},
    ],
    ids=str,
)
def test_lokr(kind, options):
    base = layer(kind)
    peer = random(lokr.LokrModule("x", base, 1.0, alpha=0.5, **options), 2)
    made = tensors(peer)
    alpha = float(made.pop("alpha"))
    change = LoKr(**{name.removeprefix("lokr_"): tensor for name, tensor in made.items()}, alpha=alpha)
    same_output(change, base, peer, 0.7)


@pytest.mark.parametrize("kind", LAYERS)
def test_glora(kind):
    base = layer(kind)
    peer = random(glora.GLoRAModule("x", base, 1.0, 4, 4.0), 2)
    made = tensors(peer)
    change = GLoRA(*(made[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2")), alpha=4.0)
    same(change.changed(base.weight.detach(), 0.7), merged(peer, 0.7, base.weight.shape))
    halved = GLoRA(change.a1, change.a2, change.b1, change.b2, 2.0)  # alpha / r counts once
    same(halved.difference(base.weight.detach()), 0.5 * change.difference(base.weight.detach()))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(kind, on_input):
    base = layer(kind)
    peer = random(ia3.IA3Module("x", base, 1.0, train_on_input=on_input), 2)
    change = IA3(peer.weight.detach(), on_input)
    same(change.changed(base.weight.detach(), 0.7), merged(peer, 0.7, base.weight.shape))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("constraint", [0.0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft(kind, constraint, rescaled):
    base = layer(kind)
    peer = random(diag_oft.DiagOFTModule("x", base, 1.0, 4, constraint=constraint, rescaled=rescaled), 2)
    change = OFT(peer.oft_blocks.detach(), constraint, peer.rescale.detach() if rescaled else None)
    same(change.changed(base.weight.detach(), 1.0), merged(peer, 1.0, base.weight.shape))
    if not rescaled:  # the peer's rescale knows no strength
        same(change.changed(base.weight.detach(), 0.4), merged(peer, 0.4, base.weight.shape))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_boft(kind, rescaled):
    base = layer(kind)
    peer = random(boft.ButterflyOFTModule("x", base, 1.0, 4, constraint=0.01, rescaled=rescaled), 2)
    change = BOFT(peer.oft_blocks.detach(), 0.01, peer.rescale.detach() if rescaled else None)
    assert change.blocks.shape[0] > 1
    same(change.changed(base.weight.detach(), 1.0), merged(peer, 1.0, base.weight.shape))
    if not rescaled:
        same(change.changed(base.weight.detach(), 0.4), merged(peer, 0.4, base.weight.shape))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("on_output", [True, False])
def test_dora(kind, on_output):
    base = layer(kind)
    peer = random(
        locon.LoConModule("x", base, 1.0, 4, 2.0, weight_decompose=True, wd_on_out=on_output, bypass_mode=False), 2
    )
    made = tensors(peer)
    change = DoRA(LoRA(made["lora_up.weight"], made["lora_down.weight"], 2.0), made["dora_scale"], on_output)
    weight = base.weight.detach()
    same(change.changed(weight, 1.0), merged(peer, 1.0, weight.shape))
    same(change.changed(weight, 0.25), 0.75 * weight + 0.25 * change.changed(weight, 1.0))
    norms = torch.linalg.vector_norm(change.turned(weight).transpose(0, 0 if on_output else 1).flatten(1), dim=1)
    same(norms, change.magnitude.flatten().abs())


def kinds() -> dict[str, object]:
    """One change of every kind for a weight (16, 12)."""
    generator = torch.Generator().manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora = LoRA(r(16, 2), r(2, 12))
    return {
        "lora": lora,
        "loha": LoHa(r(16, 2), r(2, 12), r(16, 2), r(2, 12)),
        "lokr": LoKr(w1=r(4, 3), w2=r(4, 4)),
        "glora": GLoRA(r(12, 2), r(2, 12), r(16, 2), r(2, 12)),
        "ia3": IA3(r(16)),
        "oft": OFT(r(4, 4, 4)),
        "boft": BOFT(r(2, 4, 4, 4), rescale=r(16)),
        "dora": DoRA(lora, r(16)),
        "difference": Difference(r(16, 12)),
        "rows": Rows(LoRA(r(48, 2), r(2, 12)), 1),
    }


@pytest.mark.parametrize("name", kinds())
def test_strength_0_is_the_identity_and_1_is_not(name):
    weight, change = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), kinds()[name]
    assert torch.equal(change.changed(weight, 0.0), weight)
    assert (change.changed(weight, 1.0) - weight).abs().max() > 1e-3


@pytest.mark.parametrize("name", kinds())
def test_what_does_not_fit_is_refused(name):
    change = kinds()[name]
    check_fits(change, (16, 12))
    with pytest.raises(ValueError, match="fit|make|shape"):
        check_fits(change, (20, 12) if name == "ia3" else (20, 14))
    assert all(t.dtype == torch.float32 for t in tensors_in(moved(change, "cpu")))


def test_a_transposed_weight_is_not_taken_for_fitting():
    with pytest.raises(ValueError):
        check_fits(LoRA(torch.zeros(12, 2), torch.zeros(2, 16)), (16, 12))


def test_rank_cut_keeps_the_first_directions_and_the_scale():
    up, down = torch.randn(16, 4), torch.randn(4, 12)
    change = LoRA(up, down, alpha=2.0)
    weight = torch.zeros(16, 12)
    same(change.cut(3).changed(weight, 1.0), 0.5 * up[:, :3] @ down[:3])
    assert change.cut(9) is change
    with pytest.raises(ValueError, match="dyn=0"):
        change.cut(0)


def test_rows_are_thirds():
    up, down = torch.randn(48, 2), torch.randn(2, 12)
    whole = up @ down
    for third in range(3):
        same(Rows(LoRA(up, down), third).changed(torch.zeros(16, 12), 1.0), whole[16 * third : 16 * third + 16])
    with pytest.raises(ValueError, match="three"):
        check_fits(Rows(LoRA(up[:47], down), 0), (16, 12))
