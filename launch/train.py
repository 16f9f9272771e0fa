"""Distills a student: `python launch/train.py --config=configs/rtd_tiny.py`. Run it again to resume."""

import entry

from rtd_jax.apps.distill.run import train
from rtd_jax.train.recipe import Recipe

if __name__ == "__main__":
    entry.run(Recipe, train)
