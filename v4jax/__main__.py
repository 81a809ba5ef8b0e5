"""`python -m v4jax` is `v4jax`."""

import sys

from v4jax.cli import main

sys.exit(main())
