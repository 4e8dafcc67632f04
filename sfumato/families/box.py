"""The model in the box: Stable Diffusion's architecture at a size that two CPU cores can train, 128 px pictures.

Attention is left out at the highest of three resolutions. v prediction, and a noisier last timestep than SD 1.x, so
that the colour of a plain background does not survive in x_T (Lin et al. 2023 describe the flaw). `latent_scale` is
measured in training.
"""

from __future__ import annotations

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families.family import Defaults, Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig

BOX = Family(
    name="box",
    texts=(TextTower(CLIPTextConfig(vocab_size=4096, width=192, num_layers=4, num_heads=4)),),
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
    schedule=ScheduleConfig(beta_end=0.02),
    prediction="v",
    size=128,
    latent_scale=0.70541,  # 1 / std of the latents over data/box2
    defaults=Defaults(steps=30, guidance=4.0, sampler="dpmpp_2m"),
)
