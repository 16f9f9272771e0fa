"""Trains a process reward model on labelled steps: `python launch/reward_model.py --config=configs/reward_tiny.py`."""

import entry

from rtd_jax.apps.reward_model import RewardModelRecipe, train_reward_model

if __name__ == "__main__":
    entry.run(RewardModelRecipe, train_reward_model)
