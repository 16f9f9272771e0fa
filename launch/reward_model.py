"""Trains a process reward model on labelled steps: `python launch/reward_model.py --config=configs/reward_tiny.py`."""

from entry import run

if __name__ == "__main__":
    run("reward_model")
