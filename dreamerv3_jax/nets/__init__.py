"""Flax linen modules. Each does one step on arrays of any leading shape and holds only parameters."""
