"""From a clone that was not installed, `python launch/train.py` finds the package beside this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rtd_jax.apps.command import run

__all__ = ["run"]
