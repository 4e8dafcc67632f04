"""Blocks that go through torch.compile: one code for each kind, answers as before, and eager where it must be."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.cli.loading import load
from sfumato.cli.main import parser
from sfumato.models import compiling
from sfumato.models.compiling import Compiled, compile_blocks, keep_in, why_not
from sfumato.models.hypernetwork import Hypernetwork, HypernetworkConfig, worn
from sfumato.models.residuals import Residuals
from sfumato.models.unet import UNet, UNetConfig
from sfumato.pipeline import Pipeline
from sfumato.types import NetState
from tests.conftest import randomise

CONFIG = UNetConfig(
    channels=8, channel_mult=(1,), num_res_blocks=2, transformer_depth=(1,), context_dim=16, num_heads=2, norm_groups=4
)
KINDS = 3  # residual blocks of 8 and of 16 channels in, transformer blocks


def unet_of(config: UNetConfig = CONFIG) -> UNet:
    """One with random weights everywhere."""
    torch.manual_seed(0)
    unet = randomise(UNet(config)).eval().requires_grad_(False)
    return unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def inputs(rows: int, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.full((rows,), 300.0), torch.randn(rows, 7, 16, generator=generator)


class Backend:
    """Counts the graphs that are compiled, and how often one is called; computes them as they are."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1

        def call(*given: Any) -> Any:
            self.calls += 1
            return graph.forward(*given)

        return call


@pytest.fixture
def fresh() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


@torch.inference_mode()
def test_each_kind_of_block_is_compiled_once_for_any_number_of_rows(fresh: Backend) -> None:
    unet = unet_of()
    plain, compiled = copy.deepcopy(unet), Compiled(unet, backend=fresh)
    assert len(compiled.blocks) == 13
    for rows in (2, 5, 3, 8):
        assert torch.allclose(unet(*inputs(rows)), plain(*inputs(rows)), atol=1e-6)
    assert (fresh.graphs, len(compiled), fresh.calls) == (KINDS, KINDS, 4 * 13)
    for _ in range(2):
        assert torch.allclose(unet(*inputs(1)), plain(*inputs(1)), atol=1e-6)
    assert (fresh.graphs, len(compiled), fresh.calls) == (2 * KINDS, 2 * KINDS, 6 * 13)
    assert not torch._dynamo.utils.counters["graph_break"]
    compiled.remove()
    assert torch.equal(unet(*inputs(2)), plain(*inputs(2))) and fresh.calls == 6 * 13


@torch.inference_mode()
def test_weights_may_change_and_residuals_be_added(fresh: Backend) -> None:
    """In place, as adapters are put on and taken off: the same code computes with them as they are."""
    unet = unet_of()
    plain, _ = copy.deepcopy(unet), Compiled(unet, backend=fresh)
    skips = tuple(torch.randn(2, 8, 8, 8) for _ in range(3))
    added = Residuals(skips, torch.randn(2, 8, 8, 8), {1: torch.randn(2, 8, 8, 8)})
    for turn in range(2):
        for network in (unet, plain):
            network.middle_block[1].transformer_blocks[0].attn2.to_k.weight.add_(0.5 * turn)
            network.input_blocks[1][0].in_layers[2].weight.mul_(1 + turn)
        for residuals in (None, added):
            found = unet(*inputs(2), residuals=residuals)
            assert torch.allclose(found, plain(*inputs(2), residuals=residuals), atol=1e-6)
    assert fresh.graphs == KINDS


@torch.inference_mode()
def test_what_is_not_plain_goes_as_before(fresh: Backend) -> None:
    unet = unet_of()
    plain, _ = copy.deepcopy(unet), Compiled(unet, backend=fresh)
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for network, into in zip((unet, plain), maps, strict=True):
        network(*inputs(2), state=NetState(cross=True), cross=into)
    residual = fresh.calls
    assert residual == 7 and all(
        torch.allclose(a, b) for a, b in zip(*maps, strict=True)
    )  # only transformers were asked
    wrap = NetState(seamless=(True, True))
    assert torch.allclose(unet(*inputs(2), state=wrap), plain(*inputs(2), state=wrap), atol=1e-6)
    assert fresh.calls == residual + 6  # transformer blocks have no edges
    hyper = randomise(Hypernetwork(HypernetworkConfig(widths=(16,))))
    with worn(unet, [(hyper, 1.0)]), worn(plain, [(hyper, 1.0)]):
        before = fresh.calls
        assert torch.allclose(unet(*inputs(2)), plain(*inputs(2)), atol=1e-6)
        assert fresh.calls == before + 7
    seen: list[int] = []
    handle = unet.input_blocks[1][0].in_layers[2].register_forward_hook(lambda *_: seen.append(1))
    before = fresh.calls
    unet(*inputs(2))
    handle.remove()
    assert seen == [1] and fresh.calls == before + 12


def test_with_gradients_nothing_is_compiled(fresh: Backend) -> None:
    unet = unet_of().requires_grad_(True)
    Compiled(unet, backend=fresh)
    unet(*inputs(2)).sum().backward()
    assert fresh.graphs == 0 and unet.out[2].weight.grad is not None


@torch.inference_mode()
def test_sizes_are_bounded(fresh: Backend, caplog: pytest.LogCaptureFixture) -> None:
    unet = unet_of()
    plain, compiled = copy.deepcopy(unet), Compiled(unet, sizes=1, backend=fresh)
    for side in (8, 4, 6):
        assert torch.allclose(unet(*inputs(2, side)), plain(*inputs(2, side)), atol=1e-6)
    assert len(compiled) == KINDS and fresh.calls == 13
    assert [record.message for record in caplog.records if record.name.startswith("sfumato")] == [
        "compile: sizes=1 of a kind of block are compiled; what comes in another goes as without it"
    ]
    unet(*inputs(2))
    assert fresh.calls == 26
    with pytest.raises(ValueError, match="sizes=0: 1 or more"):
        Compiled(unet, sizes=0)


def test_a_copy_is_not_compiled(fresh: Backend) -> None:
    unet = unet_of()
    Compiled(unet, backend=fresh)
    with torch.inference_mode():
        copy.deepcopy(unet)(*inputs(2))
    assert fresh.calls == 0


SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from sfumato.models.compiling import compile_blocks, keep_in
from pathlib import Path
keep_in(Path(sys.argv[1]))
from tests.test_compiling import inputs, unet_of
torch.set_num_threads(1)
with torch.inference_mode():
    unet = unet_of()
    exact = [unet(*inputs(rows)) for rows in (2, 3)]
    compiled = compile_blocks(unet)
    apart = max((unet(*inputs(rows)) - one).abs().max().item() for rows, one in zip((2, 3), exact))
found = counters["inductor"]
print(json.dumps([apart, len(compiled), found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]]))
"""


@pytest.mark.skipif(why_not(torch.device("cpu")) is not None, reason=f"compile: {why_not(torch.device('cpu'))}")
def test_inductor_computes_the_same_and_a_second_process_starts_from_its_cache(tmp_path: Path) -> None:
    """Within 1e-5, one graph for each kind; the second process compiles nothing."""
    env = {name: value for name, value in os.environ.items() if name != compiling.CACHE}
    env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    told = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    assert all(apart < 1e-5 and codes == KINDS for apart, codes, *_ in told)
    assert told[0][2:] == [KINDS, 0] and told[1][2:] == [0, KINDS]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not(cpu) == "there is no C++ compiler (no-such-compiler; $CXX names another)"
    with pytest.raises(ValueError, match=r"^compile: there is no C\+\+ compiler"):
        compile_blocks(unet_of())
    assert why_not(torch.device("mps")) == "torch.compile is not used on mps"
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    assert why_not(cuda) == "Triton is not installed"
    monkeypatch.setattr(compiling, "find_spec", lambda _: object())
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    assert "there is no C compiler" in str(why_not(cuda))
    monkeypatch.setenv(compiling.CACHE, "elsewhere")
    keep_in(tmp_path)
    assert os.environ[compiling.CACHE] == "elsewhere"
    monkeypatch.setenv(compiling.CACHE, str(Path(tempfile.gettempdir()) / "torchinductor_somebody"))
    keep_in(tmp_path)
    assert os.environ[compiling.CACHE] == str(tmp_path)


def test_without_a_compiler_a_pipeline_draws_as_before(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        pipe = Pipeline.from_pretrained(tiny_checkpoint, "cpu", compile=True, graphs=True)
    assert [record.message for record in caplog.records] == [
        "compile: not used, because there is no C++ compiler (no-such-compiler; $CXX names another)",
        "graphs: not used, because they are for CUDA cards, and this device is cpu",
    ]
    result = pipe("a", steps=1)
    assert "compiled" not in result.made_with
    assert (result.images == Pipeline.from_pretrained(tiny_checkpoint, "cpu")("a", steps=1).images).all()


def test_a_pipeline_compiles_what_it_draws_with_and_says_so(
    tiny_checkpoint: Path, fresh: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.delenv(compiling.CACHE, raising=False)
    monkeypatch.setattr(compiling, "why_not", lambda _: None)
    monkeypatch.setattr("sfumato.tasks.speed.why_not", lambda _: None)
    monkeypatch.setattr("sfumato.tasks.speed.compile_blocks", lambda unet: Compiled(unet, backend=fresh))
    args = parser().parse_args(["txt2img", "--prompt", "a", "--ckpt", str(tiny_checkpoint), "--compile"])
    pipe = load(args, "cpu", "full")
    plain = Pipeline.from_pretrained(tiny_checkpoint, "cpu")
    assert os.environ.pop(compiling.CACHE) == str(tmp_path / "compiled")
    results = [each.draw_many([]) or each("a", steps=2, count=2) for each in (pipe, plain)]
    assert fresh.graphs > 0 and results[0].made_with["compiled"] == "yes"
    assert abs(results[0].images.astype(int) - results[1].images).max() <= 1
    before = fresh.graphs
    pipe.to(dtype=torch.bfloat16)
    pipe("a", steps=1)
    assert fresh.graphs > before


def test_fast_excludes_it_on_a_cpu(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="^fast: not together with compile on a CPU"):
        Pipeline.from_pretrained(tiny_checkpoint, "cpu", fast=True, compile=True)
    with pytest.raises(ValueError, match="^fast: not together with weights='int8' on a CPU"):
        Pipeline.from_pretrained(tiny_checkpoint, "cpu", fast=True, weights="int8")
