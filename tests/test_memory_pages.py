"""Pages of files are handed back while networks rest: no number changes, and what was written to stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.families import Model
from sfumato.memory import pages
from sfumato.memory.pages import hand_back
from sfumato.models.inference import Store
from sfumato.models.layers import hasten
from sfumato.tasks import decoding
from sfumato.tasks.decoding import decode, decode_pixels
from sfumato.weights.checkpoint import load_model, save_checkpoint
from sfumato.weights.files import open_tensors, save_safetensors
from tests.tiny import TINIES, random_parts

pytestmark = pytest.mark.skipif(not pages.PAGEMAP.exists(), reason="the system does not tell of pages")
PAGE = pages.mmap.PAGESIZE


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(weights: dict[str, Tensor]) -> nn.Module:
    """Something with these tensors themselves as its parameters."""
    module = nn.Module()
    for name, tensor in weights.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


@pytest.fixture
def mapped(tmp_path: Path) -> dict[str, Tensor]:
    """Three tensors of 25 pages each that view a file."""
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {name: noise(25 * PAGE // 16, 4, seed=i) for i, name in enumerate("abc")}, {})
    file = open_tensors(path)
    return {name: file.read(name) for name in "abc"}


def test_what_a_file_holds_is_handed_back_and_reads_the_same(mapped: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in mapped.items()}
    module = network(mapped)
    given = hand_back([module, module])
    assert 3 * 24 * PAGE <= given <= 3 * 25 * PAGE, "all but the pages that tensors share"
    assert hand_back([module]) <= 3 * PAGE, "they are gone, but what was mapped beside a shared page"
    assert all(torch.equal(mapped[name], before[name]) for name in "abc")
    assert hand_back([module]) >= 3 * 24 * PAGE, "reading brought them again"


@pytest.mark.parametrize("place", [0, 12 * PAGE // 4, -1], ids=["first", "middle", "last"])
def test_what_was_written_to_stays(place: int, mapped: dict[str, Tensor]) -> None:
    """Also past PyTorch's count of changes."""
    mapped["b"].data.view(-1)[place] = 7.0
    now = {name: tensor.clone() for name, tensor in mapped.items()}
    hand_back([network(mapped)])
    assert mapped["b"].view(-1)[place] == 7.0
    assert all(torch.equal(mapped[name], now[name]) for name in "abc")


def test_other_memory_is_left_alone(mapped: dict[str, Tensor]) -> None:
    own, gaps = noise(50 * PAGE, seed=9), mapped["a"][::2]
    held = own.clone()
    assert hand_back([network({"own": own, "gaps": gaps, "none": torch.empty(0)})]) == 0
    assert torch.equal(own, held)
    with torch.device("meta"):
        assert hand_back([nn.Linear(4096, 4096)]) == 0


def test_nothing_is_done_where_pages_are_not_told_of(
    mapped: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGEMAP", Path("/proc/self/no such file"))
    assert hand_back([network(mapped)]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(pages.sys, "platform", "win32")
    assert hand_back([network(mapped)]) == 0


@pytest.fixture
def model(tmp_path: Path) -> Model:
    family, path = TINIES["sd1"], tmp_path / "a.safetensors"
    save_checkpoint(path, family, random_parts(family), torch.float32)
    return load_model(path)


def drawn(model: Model, z: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.unet(z, torch.zeros(len(z)), noise(len(z), 3, 8))


@pytest.mark.parametrize("tile", [None, 32])
def test_a_large_decode_makes_the_others_pages_go_and_changes_no_bit(
    tile: int | None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(model.unet, keep=2**20)
    hasten(model.autoencoder)
    z = noise(2, 4, 8, 8)
    seen: list[int] = []
    monkeypatch.setattr(decoding, "hand_back", lambda networks: seen.append(hand_back(networks)))
    small, pixels, before = decode(z, 0.0, model, tile=tile), decode_pixels(z, 0.0, model, tile=tile), drawn(model, z)
    assert seen == [], "so little memory is not worth the time"
    monkeypatch.setattr(decoding, "LARGE", 0)
    assert torch.equal(decode(z, 0.0, model, tile=tile), small)
    assert seen[0] > 0
    assert (decode_pixels(z, 0.0, model, tile=tile) == pixels).all()
    assert torch.equal(drawn(model, z), before)


def test_a_large_decode_empties_what_layers_work_in(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(model.unet, keep=2**20)
    hasten(model.autoencoder)
    stores: list[Store] = [*decoding._stores(model.unet), *decoding._stores(model.autoencoder)]
    assert len(stores) == 2
    for store in stores:
        store.take("a", 100)
    z = noise(1, 4, 8, 8)
    decode(z, 0.0, model)
    assert all(store._held for store in stores)
    monkeypatch.setattr(decoding, "LARGE", 0)
    decode(z, 0.0, model)
    assert not any(store._held for store in stores)


def test_only_a_large_decode_on_this_device_counts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """SD 1.5's decoder at 512 px is one, in tiles of 64 px it is none."""
    from dataclasses import replace

    from sfumato.families import SD1
    from sfumato.models.autoencoder import Autoencoder

    asked: list[bool] = []
    monkeypatch.setattr(decoding, "hand_back", lambda _: asked.append(True))
    with torch.device("meta"):
        full = replace(model, autoencoder=Autoencoder(SD1.autoencoder))
    z = torch.empty(1, 4, 64, 64)
    for given, tile, large in ((full, None, True), (full, 64, False), (model, None, False)):
        asked.clear()
        with decoding._room_for(z, given, tile):
            assert bool(asked) is large
    asked.clear()
    with decoding._room_for(z, replace(full, device=torch.device("cuda")), None):
        assert not asked
