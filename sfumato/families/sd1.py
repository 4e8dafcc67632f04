"""Stable Diffusion 1.1 to 1.5: f = 8, 512 px, CLIP ViT-L/14, noise prediction (Rombach et al. 2022)."""

from __future__ import annotations

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.families.family import Family
from sfumato.models.autoencoder import AutoencoderConfig
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.unet import UNetConfig

SD1 = Family(
    name="sd1",
    text=CLIPTextConfig(),
    unet=UNetConfig(),
    autoencoder=AutoencoderConfig(),
    schedule=ScheduleConfig(),
    prediction="eps",
    size=512,
    latent_scale=0.18215,  # 1 / std of SD 1 latents, Rombach et al. 2022
)
