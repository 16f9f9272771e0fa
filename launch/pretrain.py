"""Trains a tiny Llama from scratch: `python launch/pretrain.py --config=configs/pretrain_tiny.py`."""

from entry import run

if __name__ == "__main__":
    run("pretrain")
