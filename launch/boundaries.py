"""Fits a step-boundary classifier to a teacher and measures it: precision, recall and F1 against baselines.

python launch/boundaries.py --config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k
"""

from entry import run

if __name__ == "__main__":
    run("boundaries")
