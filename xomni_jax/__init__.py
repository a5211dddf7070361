"""X-Omni in JAX: discrete autoregressive images, from prompt to RL.

The public API is loaded on first use, so that importing the package costs
nothing and a process that only scores text never imports jax.
"""

import importlib

_PUBLIC = {
  "load": "xomni_jax.inference.loading",
  "Model": "xomni_jax.inference.pipeline",
  "Generated": "xomni_jax.inference.pipeline",
  "make_mesh": "xomni_jax.mesh",
  "InputError": "xomni_jax.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name):
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  return sorted([*globals(), *_PUBLIC])
