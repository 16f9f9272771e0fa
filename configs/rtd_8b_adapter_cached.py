"""Llama-3-70B-Instruct -> Llama-3-8B-Instruct with a low-rank adapter, from the teacher's cache, on one A100 80GB.

    python launch/cache_teacher.py --config=configs/rtd_8b_adapter_cached.py    # where the teacher fits
    python launch/train.py --config=configs/rtd_8b_adapter_cached.py            # then on one device
    python launch/plan.py --config=configs/rtd_8b_adapter_cached.py --target=a100-80gb:1

As rtd_8b_adapter, but the 70B is never loaded: its predictions and boundary states are read from the folder
`teacher.cache`. It has been planned, not run.
"""

from ml_collections import ConfigDict

from configs import rtd_8b_adapter


def get_config() -> ConfigDict:
    c = rtd_8b_adapter.get_config()
    c.teacher.cache = "caches/llama3_70b"  # folder that launch/cache_teacher.py writes
    c.micro_batches = 16  # rows at one time: 4
    return c
