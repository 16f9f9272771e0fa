"""`python -m rtd_jax train --config=...` runs a command; `python -m rtd_jax` lists them."""

import sys

from rtd_jax.apps.command import main

if __name__ == "__main__":
    main(sys.argv)
