"""Checkpoints: files of named tensors <-> networks, in every layout; converting, merging, caching them."""
