"""Flax linen modules: each does one step on arrays of any leading shape, holds only parameters."""
