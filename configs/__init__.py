"""Presets: one file each, and `base` with all settings and sizes."""
