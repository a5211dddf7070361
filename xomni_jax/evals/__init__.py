"""Measurements of models: what they draw, read back and compared."""
