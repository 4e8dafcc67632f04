"""The shape of the model that is being trained for the box: 128 px pictures, Stable Diffusion's own 4 latent channels.

It becomes `sfumato.families.BOX` when its weights are exported.
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.families import BOX as SHIPPED
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.unet import UNetConfig

BOX = replace(
    SHIPPED,
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        channels=48,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        transformer_depth=(0, 1, 1),
        context_dim=192,
        num_heads=4,
        norm_groups=16,
    ),
    autoencoder=AutoencoderConfig(
        channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, latent_channels=4, norm_groups=4
    ),
    size=128,
    latent_scale=0.70541,  # 1 / std of the latents over data/box2
)
