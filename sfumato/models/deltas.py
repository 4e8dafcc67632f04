"""Changes of a weight that adapters hold: low-rank, products of them, rotations, scales, plain differences.

One frozen dataclass a kind; `changed(weight, strength)` gives the weight with the change on it, float32 in and out, of
the same shape, a Linear's (O, I) or a Conv's (O, I, kh, kw); strength 0 is the identity. ValueError or RuntimeError
where shapes do not fit. Knows no names and no files.
Letters: O I outputs and inputs, r rank, kh kw kernel, s strength, W the weight, D its difference at strength 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Change")


class Change(Protocol):
    """What every kind can do."""

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        """The weight (float32, any Linear or Conv shape) with this change on it."""
        ...


class Additive(Change, Protocol):
    """A change W + s D; only GLoRA's and IA3's D depends on W."""

    def difference(self, weight: Tensor) -> Tensor:
        """D in the weight's shape, float32."""
        ...


def moved(change: C, device: torch.device | str) -> C:
    """The change with all tensors on a device, in float32."""
    new = {}
    for field in fields(change):  # type: ignore[arg-type]
        value = getattr(change, field.name)
        if isinstance(value, Tensor):
            new[field.name] = value.to(device=device, dtype=torch.float32)
        elif hasattr(value, "changed"):
            new[field.name] = moved(value, device)
    return replace(change, **new)  # type: ignore[type-var]


def tensors_in(change: Change) -> list[Tensor]:
    """Every tensor of a change."""
    found: list[Tensor] = []
    for field in fields(change):  # type: ignore[arg-type]
        value = getattr(change, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "changed"):
            found += tensors_in(value)
    return found


def check_fits(change: Change, shape: tuple[int, ...]) -> None:
    """ValueError where the change is none of a weight of this shape. Nothing is computed."""
    try:
        new = moved(change, "meta").changed(torch.empty(shape, device="meta"), 1.0)
    except (RuntimeError, IndexError) as error:  # of sizes, and of their count
        raise ValueError(f"tensors of shapes {_shapes(change)} do not fit a weight of shape {shape}") from error
    if tuple(new.shape) != shape:
        raise ValueError(f"tensors of shapes {_shapes(change)} make {tuple(new.shape)}, not {shape}")


def _shapes(change: Change) -> str:
    return " ".join(str(tuple(tensor.shape)) for tensor in tensors_in(change))


def _like(difference: Tensor, weight: Tensor) -> Tensor:
    """The difference in the weight's shape; a 1 x 1 convolution may be stored as a linear layer, and the reverse."""
    if _bare(difference.shape) != _bare(weight.shape):
        raise ValueError(f"a difference of shape {tuple(difference.shape)} and a weight of {tuple(weight.shape)}")
    return difference.reshape(weight.shape)


def _bare(shape: torch.Size) -> tuple[int, ...]:
    """A shape without the 1s behind its first two sizes."""
    sizes = tuple(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return sizes


def _pair(up: Tensor, down: Tensor) -> Tensor:
    """up (O, r) times down (r, I, kh, kw) -> (O, I, kh, kw); trailing sizes of 1 of `up` do not count."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """core (r, r, kh, kw), up (r, O), down (r, I) -> (O, I, kh, kw): Tucker's decomposition with two factors."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, up, down)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


@dataclass(frozen=True)
class LoRA:
    """D = alpha / r up down: up (O, r), down (r, I), for a Conv down (r, I, kh, kw) (Hu et al. 2021, section 4.1).

    With `mid` (r, r, kh, kw) a Conv's down is (r, I) and D is Tucker's (LyCORIS, Yeh et al. 2023, section 3.1). No
    alpha means alpha = r.
    """

    up: Tensor
    down: Tensor
    alpha: float | None = None
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def difference(self, weight: Tensor) -> Tensor:
        if self.mid is None:
            made = _pair(self.up, self.down)
        else:
            made = _tucker(self.mid, self.up.flatten(1).T, self.down.flatten(1))
        return _like(made, weight) * _scale(self.alpha, self.rank)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)

    def cut(self, rank: int) -> LoRA:
        """The first `rank` directions with the scale alpha / r kept (Valipour et al. 2023, DyLoRA, section 3.2)."""
        if rank >= self.rank:
            return self
        if rank < 1:
            raise ValueError(f"dyn={rank}: 1 or more are needed")
        mid = None if self.mid is None else self.mid[:rank, :rank]
        return LoRA(self.up[:, :rank], self.down[:rank], rank * _scale(self.alpha, self.rank), mid)


@dataclass(frozen=True)
class LoHa:
    """D = alpha / r (w1_a w1_b) * (w2_a w2_b), elementwise (Hyeon-Woo et al. 2022, FedPara, prop. 1 and 3).

    w_a (O, r), w_b (r, I kh kw); with the cores t1, t2 (r, r, kh, kw) w_a is (r, O) and w_b (r, I).
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def difference(self, weight: Tensor) -> Tensor:
        if self.t1 is not None and self.t2 is not None:
            made = _tucker(self.t1, self.w1_a, self.w1_b) * _tucker(self.t2, self.w2_a, self.w2_b)
        else:
            made = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)
            made = made.reshape(made.shape[0], -1, *weight.shape[2:])
        return _like(made, weight) * _scale(self.alpha, self.rank)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class LoKr:
    """D = alpha / r w1 (x) w2, Kronecker's product (Yeh et al. 2023, LyCORIS, section 3.2, after Edalati et al. 2022).

    Each factor is whole (`w1`, `w2`) or a product of two (`w_a`, `w_b`); w2's may have the core t2 (r, r, kh, kw), then
    w2_a is (r, O2) and w2_b (r, I2). Two whole factors have no rank, and alpha means nothing.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    def difference(self, weight: Tensor) -> Tensor:
        first, second = self._first(), self._second(weight)
        while first.ndim < second.ndim:
            first = first.unsqueeze(-1)
        made = torch.kron(first, second.contiguous())
        return _like(made, weight) * (1.0 if self.rank is None else _scale(self.alpha, self.rank))

    def _first(self) -> Tensor:
        if self.w1 is not None:
            return self.w1
        if self.w1_a is None or self.w1_b is None:
            raise ValueError("lokr_w1: the first factor is missing")
        return self.w1_a @ self.w1_b

    def _second(self, weight: Tensor) -> Tensor:
        if self.w2 is not None:
            return self.w2
        if self.w2_a is None or self.w2_b is None:
            raise ValueError("lokr_w2: the second factor is missing")
        if self.t2 is not None:
            return _tucker(self.t2, self.w2_a, self.w2_b)
        made = self.w2_a @ self.w2_b
        return made.reshape(made.shape[0], -1, *weight.shape[2:])

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class GLoRA:
    """D = alpha / r (W a1 a2 + b1 b2): a1 (I, r), a2 (r, I), b1 (O, r), b2 (r, I kh kw) (Chavan et al. 2023, eq. 8)."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.b2.shape[0]

    def difference(self, weight: Tensor) -> Tensor:
        seen = torch.einsum("oi...,ij->oj...", weight, self.a1.flatten(1) @ self.a2.flatten(1))
        return (seen + _like(_pair(self.b1, self.b2), weight)) * _scale(self.alpha, self.rank)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class IA3:
    """D = W scaled by `scale` along its inputs or outputs (Liu et al. 2022, IA3, section 3.3): W (1 + s scale).

    `scale` has I or O numbers, or one for each entry of a bias. What is stored as a factor is given here less 1.
    """

    scale: Tensor
    on_input: bool = False

    def difference(self, weight: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        if self.scale.numel() != weight.shape[axis]:
            raise ValueError(f"{self.scale.numel()} scales and a weight of shape {tuple(weight.shape)}")
        sizes = [1] * weight.ndim
        sizes[axis] = -1
        return weight * self.scale.reshape(sizes)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class Difference:
    """D as it is: of a weight, a bias or a norm's parameters."""

    value: Tensor

    def difference(self, weight: Tensor) -> Tensor:
        return _like(self.value, weight)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class Rows:
    """One third of a LoRA's or difference's rows: OpenCLIP stacks q, k and v (`third` 0, 1, 2) in one weight."""

    inner: LoRA | Difference
    third: int

    def difference(self, weight: Tensor) -> Tensor:
        if isinstance(self.inner, LoRA):
            return replace(self.inner, up=self._mine(self.inner.up)).difference(weight)
        return _like(self._mine(self.inner.value), weight)

    def _mine(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] % 3:
            raise ValueError(f"{tensor.shape[0]} rows are not three of q, k and v")
        return tensor.chunk(3)[self.third]

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return weight + strength * self.difference(weight)


@dataclass(frozen=True)
class DoRA:
    """V = m (W + D) / ||W + D||, the norm of each output's (or input's) numbers (Liu et al. 2024, DoRA, eq. 5).

    `magnitude` m has O numbers, or I where `on_output` is off, as LyCORIS once wrote it. Between 0 and 1 the strength
    goes straight from W to V, as A1111 and ComfyUI do.
    """

    inner: LoRA | LoHa | LoKr
    magnitude: Tensor
    on_output: bool = True

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def difference(self, weight: Tensor) -> Tensor:
        return self.turned(weight) - weight

    def turned(self, weight: Tensor) -> Tensor:
        """V in the weight's shape."""
        axis = 0 if self.on_output else 1
        if self.magnitude.numel() != weight.shape[axis]:
            raise ValueError(f"{self.magnitude.numel()} magnitudes and a weight of shape {tuple(weight.shape)}")
        whole = weight + self.inner.difference(weight)
        others = [dim for dim in range(weight.ndim) if dim != axis]
        norm = torch.linalg.vector_norm(whole, dim=others, keepdim=True)
        return whole * (self.magnitude.reshape(norm.shape) / (norm + torch.finfo(whole.dtype).eps))

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        return torch.lerp(weight, self.turned(weight), strength)


@dataclass(frozen=True)
class OFT:
    """Rotated outputs: block k of W's rows becomes R_k^T W_k, with R = (1 + Q) (1 - Q)^-1, Q = B - B^T.

    Qiu et al. 2023, section 3.3, with blocks B (k, b, b), k b = O, as kohya and LyCORIS store it. `constraint` times O
    bounds Q's norm (0 or None: no bound); `rescale` (O numbers) scales the rows after it.
    """

    blocks: Tensor
    constraint: float | None = None
    rescale: Tensor | None = None

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        count, size, _ = self.blocks.shape
        turns = _rotations(self.blocks, self.constraint, weight.shape[0])
        rows = weight.reshape(count, size, -1)
        new = (turns.transpose(1, 2) @ rows).reshape(weight.shape)
        return weight + strength * (_rescaled(new, self.rescale) - weight)


@dataclass(frozen=True)
class BOFT:
    """Butterflies of rotations: blocks (m, k, b, b); stage i turns rows that lie 2^i b / 2 apart.

    Liu et al. 2024, BOFT, section 4, in LyCORIS' order of rows. `constraint` and `rescale` as in OFT. Each stage's
    rotation goes straight from the identity to itself with the strength.
    """

    blocks: Tensor
    constraint: float | None = None
    rescale: Tensor | None = None

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        stages, count, size, _ = self.blocks.shape
        outputs = weight.shape[0]
        if count * size != outputs:
            raise ValueError(f"{count} blocks of {size} rows and a weight of shape {tuple(weight.shape)}")
        turns = _rotations(self.blocks, self.constraint, outputs)
        one = torch.eye(size, device=weight.device)
        rows = weight.reshape(outputs, -1)
        for stage in range(stages):
            turn = one + strength * (turns[stage] - one)
            near = 2**stage * (size // 2)
            rows = rows.reshape(-1, 2, near, rows.shape[-1]).transpose(1, 2).reshape(count, size, -1)
            rows = (turn @ rows).reshape(-1, near, 2, rows.shape[-1]).transpose(1, 2).reshape(outputs, -1)
        new = rows.reshape(weight.shape)
        return new if self.rescale is None else new + strength * (_rescaled(new, self.rescale) - new)


def _rotations(blocks: Tensor, constraint: float | None, outputs: int) -> Tensor:
    """Cayley's transform of every block, (..., b, b)."""
    skew = blocks - blocks.transpose(-1, -2)
    if constraint:
        norm = torch.linalg.vector_norm(skew) + 1e-8  # so that no change is no division by 0
        skew = skew * (constraint * outputs / norm).clamp(max=1.0)
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    if rescale is None:
        return weight
    return weight * rescale.reshape(-1, *[1] * (weight.ndim - 1))
