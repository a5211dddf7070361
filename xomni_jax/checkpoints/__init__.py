"""Checkpoints: released ones in, and out again."""
