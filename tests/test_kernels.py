"""Compiled kernels: built once, shared by processes, done without where they cannot be; what they compute is right."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.kernels import build, linear
from sfumato.kernels import winograd as kernels
from sfumato.models import inference, layers
from sfumato.models.inference import Linear, Store
from sfumato.models.layers import Conv2d, hasten
from sfumato.models.room import Room
from tests.test_winograd import SHAPES, _case, _close, _run

HAS_COMPILER = any(shutil.which(each) for each in build.COMPILERS)
compiled = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
SMALL = """
extern "C" __attribute__((visibility("default"))) int answer() { return 42; }
"""


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own and one small source file, as at the start of a process."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "sources", lambda: [source])
    monkeypatch.setattr(build, "_found", build._Found())
    yield tmp_path / "cache" / "sfumato" / "kernels"


@compiled
def test_compiled_once_and_found_again(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.state().startswith("compiled when first needed") and not apart.exists()
    found = build.library()
    assert found is not None and found.answer() == 42 and build.library() is found
    (path,) = apart.iterdir()
    assert build.state() == "compiled"
    monkeypatch.setattr(build, "_found", build._Found())
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("it is there"))
    assert build.state() == f"compiled ({path})" and build.library() is not None


@compiled
def test_another_source_another_library(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    build.sources()[0].write_text(SMALL.replace("42", "43"))
    monkeypatch.setattr(build, "_found", build._Found())
    found = build.library()
    assert found is not None and found.answer() == 43 and len(list(apart.iterdir())) == 2


@compiled
def test_a_damaged_library_is_compiled_anew(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = [[each] for each in build.COMPILERS if shutil.which(each)][:1]
    path = build._place(command)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    found = build.library()
    assert found is not None and found.answer() == 42


@compiled
def test_what_is_half_written_has_another_name(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped while it compiles leaves nothing where others look."""

    def stopped(command: list[str]) -> None:
        if "-shared" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"\x7fELF")
            assert not build._place(command[:1]).exists()
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        build.library()
    assert not list(apart.glob("*.so"))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("SFUMATO_KERNELS", "0", "SFUMATO_KERNELS=0"), ("CXX", "/bin/false", "/bin/false"), ("CXX", "none", "$CXX=none")],
)
def test_done_without_and_said_once(
    name: str, value: str, says: str, apart: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, logger="sfumato"):
        assert build.library() is None and build.library() is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO and says in record.message and "\n" not in record.message
    assert build.state().startswith("none: ") and says in build.state()
    conv, x = Conv2d(32, 32, 3, padding=1), torch.randn(2, 32, 16, 16)
    hasten(conv)
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@compiled
def test_an_error_of_the_compiler_is_one_line(apart: Path, caplog: pytest.LogCaptureFixture) -> None:
    build.sources()[0].write_text("int answer() { return nothing; }")
    with caplog.at_level(logging.INFO, logger="sfumato"):
        assert build.library() is None
    (record,) = caplog.records
    assert "nothing" in record.message and "\n" not in record.message and not list(apart.iterdir())


@pytest.mark.parametrize(
    ("module", "name", "value"), [("sys", "platform", "win32"), ("platform", "machine", "riscv64")]
)
def test_elsewhere_nothing_is_compiled(module: str, name: str, value: str, apart: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(build, module), name, value if name == "platform" else lambda: value)
        assert build.library() is None and not apart.exists()


def _answer(source: str, cache: str) -> int:
    os.environ["XDG_CACHE_HOME"] = cache
    build.sources = lambda: [Path(source)]  # type: ignore[assignment]
    build._found = build._Found()
    found = build.library()
    return 0 if found is None else int(found.answer())


@compiled
def test_processes_that_begin_at_once(apart: Path, tmp_path: Path) -> None:
    given = str(build.sources()[0]), str(tmp_path / "cache")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.starmap(_answer, [given] * 3) == [42] * 3
    assert [path.suffix for path in apart.iterdir()] == [".so"]


# what they compute

has_library = pytest.mark.skipif(build.library() is None, reason="no compiled kernels")
MORE = [*SHAPES, (2, 70, 11, 9, 50), (3, 96, 8, 8, 100)]


def _compiled(case: tuple[Tensor, ...], m: int) -> list[Tensor]:
    """The result and the gradients of x, weight and bias."""
    x, weight, bias = (z.float().clone().requires_grad_() for z in case[:3])
    out = kernels.Winograd.apply(x, weight, bias, m, Room())
    return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), case[3].float())]


@has_library
@pytest.mark.parametrize("shape", MORE)
@pytest.mark.parametrize(("m", "part"), [(2, 1e-5), (4, 1e-4)])
def test_results_and_gradients(m: int, part: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in many, with tiles kept and made again."""
    case = _case(shape)
    exact = _run("direct", case, torch.float64)
    for band, kept in ((kernels.BAND, kernels.KEPT), (kernels.BAND, 0), (4, 0)):
        monkeypatch.setattr(kernels, "BAND", band)
        monkeypatch.setattr(kernels, "KEPT", kept)
        _close(_compiled(case, m), exact, part)


@has_library
def test_many_bands_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands begin and end within a picture; what memory held before is not seen."""
    case = _case((3, 6, 40, 33, 20))
    exact = _run("direct", case, torch.float64)
    monkeypatch.setattr(kernels, "BAND", 4)
    monkeypatch.setattr(kernels, "KEPT", 0)
    for m in (2, 4):
        x, weight, bias = (z.float().requires_grad_() for z in case[:3])
        room = Room()
        room.take("work", 4_000_000).fill_(float("nan"))
        out = kernels.Winograd.apply(x, weight, bias, m, room)
        _close([out.detach(), *torch.autograd.grad(out, (x, weight, bias), case[3].float())], exact, 1e-4)


@has_library
@pytest.mark.parametrize("m", [2, 4])
def test_threads_change_no_bit(m: int) -> None:
    case, before = _case((3, 20, 13, 9, 70)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _compiled(case, m)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, _compiled(case, m), strict=True))
    finally:
        torch.set_num_threads(before)


@has_library
def test_packed_weights_and_any_order_of_memory() -> None:
    x, weight, bias = (z.float() for z in _case((2, 20, 9, 9, 40))[:3])
    for m in (2, 4):
        plain = kernels.convolve(x, weight, bias, m, Room())
        packed = kernels.pack(weight, m)
        assert packed.numel() == kernels.packed_numbers(20, 40, m)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(kernels.convolve(last, weight, bias, m, Room(), packed), plain)
        assert torch.equal(
            kernels.convolve(x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias, m, Room()), plain
        )


@has_library
def test_only_wanted_gradients() -> None:
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        tensors = [z.float().requires_grad_(want) for z, want in zip(_case((2, 4, 8, 8, 4))[:3], wants, strict=True)]
        kernels.Winograd.apply(*tensors, 4, Room()).sum().backward()
        assert [z.grad is not None for z in tensors] == list(wants)


@has_library
@pytest.mark.parametrize(("rows", "inside", "outs"), [(1, 1, 1), (5, 3, 7), (100, 70, 50), (7, 800, 130), (64, 64, 64)])
def test_linear_layers(rows: int, inside: int, outs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((rows, inside), (outs, inside), (outs,), (rows, outs))
    )
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    mine = [z.detach().float().requires_grad_() for z in (x, weight, bias)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = linear.Linear.apply(*mine, Room())
            found = torch.autograd.grad(out, mine, grad.float())
            _close([out.detach(), *found], [F.linear(x, weight, bias).detach(), *exact], 1e-6)
    finally:
        torch.set_num_threads(before)


@has_library
def test_layers_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer and a 1 x 1 convolution: PyTorch's bits until hastened, near them then, in copies as well."""
    monkeypatch.setattr(inference, "products_by_kernels", lambda: True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 5, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    for layer, given in ((Linear(24, 40), x.permute(0, 2, 3, 1)), (Conv2d(24, 40, 1), x)):
        plain = copy.deepcopy(layer)
        exact = plain(given)
        assert torch.equal(layer(given), exact)
        hasten(layer)
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            out = one(given)
            assert torch.allclose(out, exact, atol=1e-5) and out.shape == exact.shape
            with torch.no_grad():
                assert torch.equal(one(given), out)
        out.square().sum().backward()
        exact.square().sum().backward()
        assert torch.allclose(one.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(given).dtype == torch.bfloat16
        assert layer.double()(given.double()).dtype == torch.float64


@has_library
@torch.no_grad()
def test_stores_keep_packed_weights_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "quickest", lambda *_: "winograd4")
    weight, x = torch.randn(20, 12, 3, 3), torch.randn(1, 12, 8, 8)
    one = 4 * kernels.packed_numbers(12, 20, 4)
    for most, kept in ((one - 1, 0), (one, one)):
        store = Store(most)
        assert torch.allclose(store.convolution(x, weight, None, 1), F.conv2d(x, weight, None, 1, 1), atol=1e-3)
        assert store.num_bytes == kept


@has_library
def test_training_goes_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fastest", lambda *_: "winograd2")
    conv, seen = Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last), []
    hasten(conv)
    before = kernels.gradients
    monkeypatch.setattr(kernels, "gradients", lambda *given: seen.append(1) or before(*given))
    conv(torch.randn(1, 8, 8, 8)).sum().backward()
    assert seen == [1] and conv.weight.grad.stride() == conv.weight.stride()
