"""Ranks: the processes of one training run, what they share, and how a network is spread over them.

Started by torchrun or alone. Knows no files and no configs. n is the number of ranks, r the own one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[Any, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
SHARD_BLOCK = 1_000_000  # parameters; smaller blocks are gathered with the rest, one message for all


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` of a run."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. All ranks must call it."""
        if self.count == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32, device=_device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Averages over the ranks, which must have the same names. All ranks must call it."""
        if self.count == 1 or not figures:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64, device=_device())
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.count).tolist(), strict=True))

    def first_does(self, action: Callable[[], None]) -> None:
        """Run `action` on the first rank; what a person can mend is raised on every rank, so that none waits."""
        error: Exception | None = None
        if self.first:
            try:
                action()
            except (ValueError, OSError) as raised:
                error = raised
        if self.count > 1:
            box = [None if error is None else (isinstance(error, OSError), str(error))]
            dist.broadcast_object_list(box, src=0)
            if box[0] is not None and error is None:
                from_disk, text = box[0]
                raise (OSError if from_disk else ValueError)(f"rank 0: {text}")
        if error is not None:
            raise error


def _device() -> torch.device:
    """Where tensors for a collective must lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def is_first() -> bool:
    """Whether this is the only rank or the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors by name, those that are spread over the ranks gathered: on the first rank; empty on others.

    Every rank that holds a part must call it. Gathered tensors are copies in main memory.
    """
    found: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        gathered = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        if is_first():
            found[name] = gathered
    return found


def local_device() -> torch.device:
    """The device of this rank: its own GPU (torchrun's LOCAL_RANK) where there are some, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU


CPU = torch.device("cpu")


@contextmanager
def joined(device: torch.device, alone_too: bool = False) -> Iterator[Ranks]:
    """The ranks of this run: those of a process group that is there, those torchrun started, or one.

    `alone_too` makes a group of a single process as well, which FSDP2 needs. A group made here ends with the context.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and not alone_too:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if count == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        dist.init_process_group(backend)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
        # torch's caches of sharded tensors outlive the group, and gloo's threads with them: one that still holds the
        # last message when the interpreter ends would abort the process. Meeting once more lets them let go.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.length = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.length
        return total[start : start + ctx.length]


def gather(tensor: Tensor) -> Tensor:
    """Rows (B, ...) of every rank as (n B, ...), in the order of the ranks; differentiable. B is the same on all.

    A rank's gradient is the sum of what all ranks send back. Where each computes the same loss of the gathered rows,
    that is n times the gradient, which the average over the ranks divides by n: the result is that of one rank with
    all rows. Without other ranks the tensor itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return cast(Tensor, _Gather.apply(tensor.contiguous()))


def own_rows(length: int) -> slice:
    """Where a rank's `length` rows lie in what `gather` gives."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * length, (rank + 1) * length)


class LossModule(nn.Module):
    """An objective's loss as the forward pass of what it trains, which is where DDP and FSDP2 hook in."""

    def __init__(self, trained: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trained = trained
        self._loss = loss

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, figures)."""
        return self._loss(batch, generator)


def spread(
    trained: nn.Module, loss: Loss, ranks: Ranks, shard: bool, block: int = SHARD_BLOCK, partial: bool = False
) -> nn.Module:
    """A module whose forward pass is `loss`, and whose backward pass averages gradients over the ranks.

    With `shard` every parameter of `trained` becomes a part of itself: gathered for its block's forward and backward
    pass, gradients scattered (FSDP2; Zhao et al. 2023). Blocks are members of lists with `block` parameters or more.
    `partial`: some parameters may get no gradient, as those of text layers that a pipeline leaves out.
    """
    module = LossModule(trained, loss)
    if shard:
        mesh = init_device_mesh(next(trained.parameters()).device.type, (ranks.count,))
        whole = {p for p in trained.parameters() if p.ndim == 0}  # a single number cannot be spread
        for parameter in trained.parameters():  # FSDP2 takes no other memory order, such as channels last
            parameter.data = parameter.data.contiguous()
        for member in list(_blocks(trained, block)):
            fully_shard(member, mesh=mesh, ignored_params=whole)
        fully_shard(module, mesh=mesh, ignored_params=whole)
        return module
    return DistributedDataParallel(module, find_unused_parameters=partial) if ranks.count > 1 else module


def _blocks(network: nn.Module, block: int, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost members of lists that have `block` parameters or more and a forward pass of their own."""
    plain = type(network) in (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if listed and not plain and sum(p.numel() for p in network.parameters()) >= block:
        yield network
        return
    for child in network.children():
        yield from _blocks(child, block, listed=type(network) in (nn.ModuleList, nn.Sequential))


def average_whole(module: nn.Module, ranks: Ranks) -> None:
    """Average the gradients of a sharded module's parameters that are not spread; others' have been averaged."""
    if isinstance(module, FSDPModule) and ranks.count > 1:
        for parameter in module.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks.count


def clip_gradients(parameters: Iterable[Tensor], longest: float) -> float:
    """Length of all gradients together, which is at most `longest` afterwards; spread parameters may be among them."""
    found = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in found if isinstance(p, DTensor) == spread] for spread in (False, True)]
    if not all(kinds):
        norm = nn.utils.clip_grad_norm_(found, longest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, longest, total)
    return float(total)


def syncing(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a forward and backward pass: gradients only travel after the `last` batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return cast("AbstractContextManager[None]", module.no_sync())
    return nullcontext()
