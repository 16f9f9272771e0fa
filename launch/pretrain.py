"""Trains a tiny Llama from scratch: `python launch/pretrain.py --config=configs/pretrain_tiny.py`."""

import entry

from rtd_jax.apps.pretrain import PretrainRecipe, pretrain

if __name__ == "__main__":
    entry.run(PretrainRecipe, pretrain)
