"""Sfumato under the names of diffusers, so that a published example runs with its import changed."""

from sfumato.diffusers_style.output import PipelineOutput
from sfumato.diffusers_style.pipeline import StableDiffusionPipeline, StableDiffusionXLPipeline

__all__ = ["PipelineOutput", "StableDiffusionPipeline", "StableDiffusionXLPipeline"]
