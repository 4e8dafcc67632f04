from sfumato.diffusers_style import StableDiffusionPipeline as StableDiffusionPipeline
from sfumato.diffusers_style import StableDiffusionXLPipeline as StableDiffusionXLPipeline
from sfumato.pipeline import Pipeline as Pipeline
from sfumato.types import Job as Job

__version__: str
__all__ = ["Job", "Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "__version__"]
