"""Qwen3-32B -> Qwen3-4B, both without thoughts, on 8 x A100 80GB. Everything else as in rtd_8b.

    python launch/train.py --config=configs/rtd_qwen3.py --config.data.train.location=/data/traces

Traces are the teacher's own chains, asked for without thoughts (configs/traces_llama3_70b.py with this teacher and
--config.text.thinking=off). Both have 151,936 rows of the embedding for 151,669 tokens; the rest is padding.
"""

from ml_collections import ConfigDict

from configs import rtd_8b


def get_config() -> ConfigDict:
    c = rtd_8b.get_config()
    c.teacher.path = "Qwen/Qwen3-32B"  # in bfloat16 66 GB over the mesh
    c.student.path = "Qwen/Qwen3-4B"  # tied embeddings
    c.data.train.location = "traces/qwen3_32b"  # folder of train.jsonl or parquet, or a hub name
    c.data.text.thinking = "off"  # "on" for traces that begin with what the teacher thinks
    return c
