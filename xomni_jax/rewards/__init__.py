"""Rewards of generated images: asked, counted, combined, without jax."""
