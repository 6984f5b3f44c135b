"""Makes `python -m dreamerv3_jax` the same as the command `dreamerv3-jax`."""

import sys

from dreamerv3_jax.cli import main

# Guarded because worker processes of environments import this module again.
if __name__ == '__main__':
    sys.exit(main())
