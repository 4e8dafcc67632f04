"""Sfumato: a complete Stable Diffusion."""
