"""EfficientNet-B3 with a head of its own: the network of LAION's watermark detector.

Tan & Le 2019, table 1, widths times 1.2 and depths times 1.4; SiLU, and squeeze-and-excitation (Hu et al. 2018). Names
are those of the published weights (timm's), whose padding is the same on all sides. Letters: B pictures, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STEM, WIDTH = 40, 1536  # channels behind the first convolution and of the features
# What each stage is: expansion, channels, number of blocks, stride of the first, kernel.
B3 = (
    (1, 24, 2, 1, 3), (6, 32, 3, 2, 3), (6, 48, 3, 2, 5), (6, 96, 5, 2, 3), (6, 136, 5, 1, 5), (6, 232, 6, 2, 5),
    (6, 384, 2, 1, 3),
)  # fmt: skip
SQUEEZE = 4  # what a block's input is divided by for its squeeze


class Squeeze(nn.Module):
    """Each channel times a number in (0, 1) that the mean of all channels decides."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, inner, 1)
        self.conv_expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.conv_expand(y).sigmoid()


class Separable(nn.Module):
    """A block of the first stage: each channel by itself, squeeze, then all together."""

    def __init__(self, before: int, after: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(before, before, kernel, stride, kernel // 2, groups=before, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.se = Squeeze(before, before // SQUEEZE)
        self.conv_pw = nn.Conv2d(before, after, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.added = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(F.silu(self.bn1(self.conv_dw(x))))
        y = self.bn2(self.conv_pw(y))
        return x + y if self.added else y


class Inverted(nn.Module):
    """A block of the others: widen, each channel by itself, squeeze, narrow."""

    def __init__(self, expansion: int, before: int, after: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = before * expansion
        self.conv_pw = nn.Conv2d(before, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv_dw = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.se = Squeeze(wide, before // SQUEEZE)
        self.conv_pwl = nn.Conv2d(wide, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.added = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv_pw(x)))
        y = self.se(F.silu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.added else y


class EfficientNetB3(nn.Module):
    """Pictures (B, 3, H, W), normalised by ImageNet's mean and deviation -> features (B, 1536)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, STEM, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        stages, channels = [], STEM
        for expansion, after, number, stride, kernel in B3:
            blocks: list[nn.Module] = []
            for index in range(number):
                step = stride if index == 0 else 1
                blocks.append(
                    Separable(channels, after, step, kernel)
                    if expansion == 1
                    else Inverted(expansion, channels, after, step, kernel)
                )
                channels = after
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(channels, WIDTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.silu(self.bn1(self.conv_stem(x))))
        return F.silu(self.bn2(self.conv_head(x))).mean((2, 3))


class WatermarkDetector(EfficientNetB3):
    """Pictures (B, 3, 256, 256), normalised -> logits (B, 2) of "has a watermark" and "is clear"."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Linear(WIDTH, 625), nn.ReLU(), nn.Identity(), nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(super().forward(x))
