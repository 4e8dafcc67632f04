"""Sfumato: a complete Stable Diffusion."""

__version__ = "0.1.0"
