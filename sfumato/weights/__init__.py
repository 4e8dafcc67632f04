"""Files of named tensors <-> networks."""
