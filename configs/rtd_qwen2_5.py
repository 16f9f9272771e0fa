"""Qwen2.5-72B-Instruct -> Qwen2.5-7B-Instruct on 8 x A100 80GB. Everything else as in rtd_8b.

    python launch/train.py --config=configs/rtd_qwen2_5.py --config.data.train.location=/data/traces

Both have 152,064 rows of the embedding for 151,665 tokens; the rest is padding.
"""

from ml_collections import ConfigDict

from configs import rtd_8b


def get_config() -> ConfigDict:
    c = rtd_8b.get_config()
    c.teacher.path = "Qwen/Qwen2.5-72B-Instruct"  # in bfloat16 145 GB over the mesh
    c.student.path = "Qwen/Qwen2.5-7B-Instruct"  # no tied embeddings
    c.data.train.location = "traces/qwen2_5_72b"  # folder of train.jsonl or parquet, or a hub name
    return c
