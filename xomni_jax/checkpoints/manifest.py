"""Sizes and hashes of the files of a checkpoint."""
