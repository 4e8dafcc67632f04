"""Guidance as a plan: which rows a query needs and how their answers combine. It never calls a network."""

from sfumato.diffusion.guidance.attention import Perturbed, SelfAttention
from sfumato.diffusion.guidance.classifier_free import ClassifierFree, During, Positive, Told, Weighted, Window
from sfumato.diffusion.guidance.looking import Looker, Looking, heat
from sfumato.diffusion.guidance.plan import Options, plan
from sfumato.diffusion.guidance.protocol import Ask, Guidance, Moment, Reply, moment
from sfumato.diffusion.guidance.taming import Mimicked, Rescaled, Thresholded

__all__ = [
    "Ask",
    "ClassifierFree",
    "During",
    "Guidance",
    "Looker",
    "Looking",
    "Mimicked",
    "Moment",
    "Options",
    "Perturbed",
    "Positive",
    "Reply",
    "Rescaled",
    "SelfAttention",
    "Thresholded",
    "Told",
    "Weighted",
    "Window",
    "heat",
    "moment",
    "plan",
]
