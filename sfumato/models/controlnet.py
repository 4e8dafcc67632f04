"""ControlNet: a trained copy of the U-Net's encoder that reads a picture beside x and steers the U-Net.

Zhang et al. 2023, section 3. Names as in `control_model.*` of the published files. Knows nothing of what the picture
shows (edges, depth, a pose), nor of files. Letters: B batch, H W pixels, h = H/f and w = W/f latent size.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from sfumato.models.layers import Conv2d, zero
from sfumato.models.residuals import Residuals
from sfumato.models.unet import Block, Encoder, UNet, UNetConfig

HINT_WIDTHS = (16, 32, 96, 256)  # of the published networks: three halvings, for an autoencoder with f = 8


def hint_widths(factor: int) -> tuple[int, ...]:
    """Widths of the layers that read a hint `factor` times the latents' size, one halving each but the first.

    As published for 8. ValueError where the factor is no power of 2.
    """
    halvings = factor.bit_length() - 1
    if factor < 1 or factor != 1 << halvings:
        raise ValueError(f"factor={factor}: a power of 2 is needed")
    return (HINT_WIDTHS + (HINT_WIDTHS[-1],) * halvings)[: halvings + 1]


def _hint_block(hint_channels: int, widths: tuple[int, ...], channels: int) -> Block:
    """Convolutions from the hint's pixels to x's cells (Zhang et al. 2023, section 3.2, eq. 4); the last is zero."""
    if hint_channels < 1 or not widths:
        raise ValueError(f"hint_channels={hint_channels}, hint_widths={widths}: one channel and one width are needed")
    parts: list[nn.Module] = [Conv2d(hint_channels, widths[0], 3, padding=1), nn.SiLU()]
    for before, width in pairwise(widths):
        parts += [Conv2d(before, before, 3, padding=1), nn.SiLU()]
        parts += [Conv2d(before, width, 3, padding=1, stride=2), nn.SiLU()]
    return Block(*parts, zero(Conv2d(widths[-1], channels, 3, padding=1)))


class ControlNet(Encoder):
    """(x (B, C_in, h, w), t, context, vector as the U-Net's; hint (B, C_h, f h, f w) in [0, 1]) -> Residuals.

    Of x the first `config.in_channels` are read: beside them an inpainting U-Net may see more. f is 2^(len(hint_widths)
    - 1). `pooled`: the residuals are means over h and w, as of the "shuffle" network. ValueError where the hint's
    channels or size do not fit. As it is made it steers nothing: every way out is a convolution of zeros.
    """

    def __init__(
        self,
        config: UNetConfig,
        hint_channels: int = 3,
        hint_widths: tuple[int, ...] = HINT_WIDTHS,
        pooled: bool = False,
    ) -> None:
        super().__init__(config)
        self.hint_channels, self.hint_widths, self.pooled = hint_channels, tuple(hint_widths), pooled
        self.input_hint_block = _hint_block(hint_channels, self.hint_widths, config.channels)
        self.zero_convs = nn.ModuleList(Block(zero(Conv2d(width, width, 1))) for width in self.skip_channels)
        self.middle_block_out = Block(zero(Conv2d(self.skip_channels[-1], self.skip_channels[-1], 1)))

    @property
    def factor(self) -> int:
        """f: how many times larger than the latents the hint is."""
        return int(2 ** (len(self.hint_widths) - 1))

    @staticmethod
    def from_unet(unet: UNet, factor: int = 8, hint_channels: int = 3) -> ControlNet:
        """To train: the U-Net's own encoder, copied, and zeros in every way out (Zhang et al. 2023, section 3.1).

        On the U-Net's device, in its precision, in training mode; what reads the hint is random from torch's own
        generator. `factor` is that of the family's autoencoder.
        """
        config, first = unet.config, next(unet.parameters())
        network = ControlNet(config, hint_channels, hint_widths(factor)).to(device=first.device, dtype=first.dtype)
        own = set(network.state_dict())
        encoder = {name: tensor for name, tensor in unet.state_dict().items() if name in own}
        network.load_state_dict(encoder, strict=False)
        return network.train().requires_grad_(True)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None, hint: Tensor) -> Residuals:
        """A residual for each input block and the middle; the hint's batch is x's, or 1 for all."""
        height, width = (size * self.factor for size in x.shape[2:])
        if hint.ndim != 4 or tuple(hint.shape[1:]) != (self.hint_channels, height, width):
            needed = f"(B, {self.hint_channels}, {height}, {width})"
            raise ValueError(f"hint: of shape {tuple(hint.shape)}, {needed} is needed for x {tuple(x.shape)}")
        emb = self.embed(t, vector, x.dtype)
        seen = self.input_hint_block(hint.to(x.dtype), emb, context)
        x = x[:, : self.config.in_channels]
        outs: list[Tensor] = []
        for index, (block, way_out) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = block(x, emb, context)
            if index == 0:
                x = x + seen
            outs.append(way_out(x, emb, context))
        middle = self.middle_block_out(self.middle_block(x, emb, context), emb, context)
        if self.pooled:
            outs = [out.mean(dim=(2, 3), keepdim=True) for out in outs]
            middle = middle.mean(dim=(2, 3), keepdim=True)
        return Residuals(tuple(outs), middle)
