"""Flax linen modules: each does one step on a batch and holds only parameters."""
