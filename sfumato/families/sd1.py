"""Stable Diffusion 1.x: f = 8, 512 px, CLIP ViT-L/14 (Rombach et al. 2022), and its inpainting and editing kin."""

from __future__ import annotations

from dataclasses import replace

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families.family import Family, TextTower
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIP_L_TEXT
from sfumato.models.unet import UNetConfig

SD1 = Family(
    name="sd1",
    texts=(TextTower(CLIP_L_TEXT),),
    unet=UNetConfig(),
    autoencoder=AutoencoderConfig(),
    schedule=ScheduleConfig(),
    prediction="eps",
    size=512,
    latent_scale=0.18215,  # 1 / std of SD 1 latents, Rombach et al. 2022
)
SD1_V = replace(SD1, name="sd1-v", prediction="v")  # fine-tunes; no such model was published by the authors
SD1_INPAINT = replace(SD1, name="sd1-inpaint", unet=replace(SD1.unet, in_channels=9), concat="inpaint")
SD1_EDIT = replace(SD1, name="sd1-edit", unet=replace(SD1.unet, in_channels=8), concat="picture")  # InstructPix2Pix
