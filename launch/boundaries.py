"""Fits a step-boundary classifier to a teacher and measures it: precision, recall and F1 against baselines.

python launch/boundaries.py --config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k
"""

import entry

from rtd_jax.apps.boundaries import BoundaryRecipe, boundaries

if __name__ == "__main__":
    entry.run(BoundaryRecipe, boundaries)
