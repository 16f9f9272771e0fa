"""Distills a student: `python launch/train.py --config=configs/rtd_tiny.py`. Run it again to resume."""

from entry import run

if __name__ == "__main__":
    run("train")
