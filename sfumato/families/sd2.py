"""Stable Diffusion 2.0 and 2.1: OpenCLIP ViT-H's penultimate layer, heads of 64 channels, linear projections.

The published configs: 512 px and noise prediction (base), 768 px and v prediction, inpainting, depth, x4 upscaler.
"""

from __future__ import annotations

from dataclasses import replace

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families.family import Defaults, Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import OPENCLIP_H_TEXT
from sfumato.models.unet import UNetConfig

# The penultimate layer is what the U-Net is told: the last of the 24, and the projection, are in the original files but
# never used, and are not in the published folders either.
OPENCLIP_H = TextTower(
    replace(OPENCLIP_H_TEXT, num_layers=23, projection=None),
    prefix="cond_stage_model.model.",
    openclip=True,
    pad_token=0,
    not_stored=1,
)
SD2_BASE = Family(
    name="sd2-base",
    texts=(OPENCLIP_H,),
    unet=UNetConfig(context_dim=1024, head_channels=64, linear_projection=True),
    autoencoder=AutoencoderConfig(),
    schedule=ScheduleConfig(),
    prediction="eps",
    size=512,
    latent_scale=0.18215,
)
SD2 = replace(SD2_BASE, name="sd2", prediction="v", size=768)
SD2_INPAINT = replace(SD2_BASE, name="sd2-inpaint", unet=replace(SD2_BASE.unet, in_channels=9), concat="inpaint")
SD2_DEPTH = replace(SD2_BASE, name="sd2-depth", unet=replace(SD2_BASE.unet, in_channels=5), concat="depth")
SD2_UPSCALER = replace(
    SD2_BASE,
    name="sd2-upscaler",
    unet=UNetConfig(
        in_channels=7,
        channels=256,
        channel_mult=(1, 2, 2, 4),
        transformer_depth=(0, 1, 1, 1),
        cross_only=(True, True, True, False),
        context_dim=1024,
        num_heads=8,
        linear_projection=True,
        num_classes=1000,  # the small picture's noise level
    ),
    autoencoder=AutoencoderConfig(channel_mult=(1, 2, 4)),  # f = 4
    schedule=ScheduleConfig(beta_start=0.0001, beta_end=0.02),
    prediction="v",
    latent_scale=0.08333,
    concat="lowres",
    defaults=Defaults(steps=75, guidance=9.0),
)
