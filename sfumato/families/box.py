"""The model in the box: Stable Diffusion's architecture at a size that two CPU cores can train, 64 px pictures.

16 latent channels at f = 8 instead of 4, v prediction, and a noisier last timestep than SD 1.x, so that the colour of
a plain background does not survive in x_T (Lin et al. 2023 describe the flaw). `latent_scale` is measured in training.
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
        in_channels=16,
        out_channels=16,
        channels=96,
        channel_mult=(1, 2),
        num_res_blocks=2,
        transformer_depth=(1, 1),
        context_dim=192,
        num_heads=4,
        norm_groups=16,
    ),
    autoencoder=AutoencoderConfig(
        channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, latent_channels=16, norm_groups=4
    ),
    schedule=ScheduleConfig(beta_end=0.02),
    prediction="v",
    size=64,
    latent_scale=0.73793,  # 1 / std of the box's latents over data/common64
    defaults=Defaults(steps=30, guidance=4.0, sampler="dpmpp_2m"),
)
