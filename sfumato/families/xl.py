"""Stable Diffusion XL 1.0, base and refiner: two text encoders, a pooled vector, sizes as conditions.

Podell et al. 2023; the published configs of the base and the refiner.
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families.family import Defaults, Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIP_L_TEXT, OPENCLIP_G_TEXT
from sfumato.models.unet import UNetConfig

CLIP_L = TextTower(CLIP_L_TEXT, prefix="conditioner.embedders.0.transformer.", skip_last=1, final_norm=False)
OPENCLIP_G = TextTower(
    OPENCLIP_G_TEXT,
    prefix="conditioner.embedders.1.model.",
    openclip=True,
    skip_last=1,
    final_norm=False,
    pad_token=0,
)
XL = Family(
    name="xl",
    texts=(CLIP_L, OPENCLIP_G),
    unet=UNetConfig(
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 10),
        middle_depth=10,
        context_dim=2048,
        head_channels=64,
        linear_projection=True,
        vector_dim=2816,
    ),
    autoencoder=AutoencoderConfig(),
    schedule=ScheduleConfig(),
    prediction="eps",
    size=1024,
    latent_scale=0.13025,  # of the XL autoencoder's published config
    size_cond=("original", "crop", "target"),
    zero_empty_negative=True,
    defaults=Defaults(steps=40, guidance=5.0, sampler="euler"),
)
XL_V = replace(XL, name="xl-v", prediction="v")  # fine-tunes
XL_INPAINT = replace(XL, name="xl-inpaint", unet=replace(XL.unet, in_channels=9), concat="inpaint")
XL_REFINER = replace(
    XL,
    name="xl-refiner",
    texts=(replace(OPENCLIP_G, prefix="conditioner.embedders.0.model."),),
    unet=replace(
        XL.unet,
        channels=384,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 4, 4, 0),
        middle_depth=4,
        context_dim=1280,
        vector_dim=2560,
    ),
    size_cond=("original", "crop", "aesthetic"),
    zero_empty_negative=False,
)
