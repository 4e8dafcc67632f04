"""Samplers: coroutines that yield a Query, are sent its Answer, and return the final x. They never call a network.

One file for each kind; importing this package registers them all, in the order in which lists show them.
"""

# ruff: noqa: I001 - the order of the imports is the order of the samplers
from sfumato.diffusion.noise import Noise
from sfumato.diffusion.samplers.formulas import ancestral_split
from sfumato.diffusion.samplers.registry import SAMPLERS, Sampler, Steps, drive, find_sampler, resolve, sampler
from sfumato.diffusion.samplers import euler, single_step, multistep, dpmpp, dpm_solver
from sfumato.diffusion.samplers import predictor_corrector, exponential, cfg_pp

__all__ = [
    "SAMPLERS",
    "Noise",
    "Sampler",
    "Steps",
    "ancestral_split",
    "cfg_pp",
    "dpm_solver",
    "dpmpp",
    "drive",
    "euler",
    "exponential",
    "find_sampler",
    "multistep",
    "predictor_corrector",
    "registry",
    "resolve",
    "sampler",
    "single_step",
]
