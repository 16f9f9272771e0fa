"""Distills a student: `python launch/train.py --config=configs/rtd_tiny.py`. Run it again to resume."""

import entry

from rtd_jax.training.recipe import Recipe
from rtd_jax.training.run import train

if __name__ == "__main__":
    entry.run(Recipe, train)
