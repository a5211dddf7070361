"""Servers of rewards: PyTorch models and judges behind HTTP, without jax."""
