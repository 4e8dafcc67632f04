"""Two small ImageNet networks of inverted bottlenecks, as features: MobileNet v2 and EfficientNet-Lite0.

Sandler et al. 2018, table 2; Tan & Le 2019, table 1, without its squeeze and with ReLU6 ("lite"). Names as in the
weights that are published for PyTorch, classes too. Knows nothing of files. Letters: B pictures, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, SIZE, CLASSES = 1280, 224, 1000  # of both: the features, pixels a side, the last layer's classes

# What each group of blocks is: expansion, channels, number, stride of the first, kernel.
MOBILENET_V2 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET_LITE0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


def blocks_of(groups: tuple[tuple[int, int, int, int, int], ...]) -> list[tuple[int, int, int, int, int]]:
    """Each block's expansion, channels before, channels after, stride, kernel."""
    found, channels = [], 32
    for expansion, after, number, stride, kernel in groups:
        for index in range(number):
            found.append((expansion, channels, after, stride if index == 0 else 1, kernel))
            channels = after
    return found


def _unit(before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU6())


class InvertedBottleneck(nn.Module):
    """Sandler et al. 2018, table 1: widen, each channel by itself, narrow; added to x where the size is kept."""

    def __init__(self, expansion: int, before: int, after: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = before * expansion
        widen = [_unit(before, wide)] if expansion > 1 else []
        narrow = [nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)]
        self.conv = nn.Sequential(*widen, _unit(wide, wide, kernel, stride, groups=wide), *narrow)
        self.added = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(nn.Module):
    """Pictures (B, 3, 224, 224), normalised by ImageNet's mean and deviation -> features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        middle = [InvertedBottleneck(*block) for block in blocks_of(MOBILENET_V2)]
        self.features = nn.Sequential(_unit(3, 32, 3, stride=2), *middle, _unit(320, WIDTH))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """x (B, C, h, w) padded as TensorFlow's SAME: where the sum is odd, right and bottom get the more."""
    sides: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class LiteBlock(nn.Module):
    """EfficientNet's block in its plain form; the padding is TensorFlow's, where it was trained."""

    def __init__(self, expansion: int, before: int, after: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = before * expansion
        self.kernel, self.stride, self.added = kernel, stride, stride == 1 and before == after
        if expansion > 1:
            self._expand_conv = nn.Conv2d(before, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=0.001)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=0.001)
        self._project_conv = nn.Conv2d(wide, after, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(pad_same(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.added else y


class EfficientNetLite0(nn.Module):
    """Pictures (B, 3, 224, 224), levels 0 to 255 as (level - 127) / 128 -> features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=0.001)
        self._blocks = nn.ModuleList(LiteBlock(*block) for block in blocks_of(EFFICIENTNET_LITE0))
        self._conv_head = nn.Conv2d(320, WIDTH, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(WIDTH, eps=0.001)
        self._fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(pad_same(x, 3, 2))))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
