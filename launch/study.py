"""Compares methods over seeds: `python launch/study.py --config=configs/study_tiny.py`. Run it again to continue."""

from entry import run

if __name__ == "__main__":
    run("study")
