"""`python -m rtd_jax train --config=...` runs a command; `python -m rtd_jax` lists them."""

import sys

from rtd_jax.base.signals import stoppable

if __name__ == "__main__":
    with stoppable(ends_process=True):
        from rtd_jax.apps.command.run import main  # slow: a signal may come meanwhile

        main(sys.argv)
