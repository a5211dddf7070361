"""`python -m xomni_jax` is the `xomni` command."""

import sys

from xomni_jax.cli import main

sys.exit(main())
