"""From a clone that was not installed, `python launch/train.py` finds the package beside this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rtd_jax.base.signals import stoppable


def run(name: str) -> None:
    """Runs a command with this process's flags."""
    with stoppable(ends_process=True):
        from rtd_jax.apps.command.run import run  # slow: a signal may come meanwhile

        run(name)
