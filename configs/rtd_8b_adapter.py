"""Llama-3-70B-Instruct -> Llama-3-8B-Instruct with a low-rank adapter, the teacher online, on 4 x A100 80GB.

    python launch/train.py --config=configs/rtd_8b_adapter.py --config.data.train.location=/data/traces
    python launch/plan.py --config=configs/rtd_8b_adapter.py --target=a100-80gb:4

Everything else as in rtd_8b. The student's weights stay as they were released, in bfloat16; what is trained is 0.5% of
their number. It leaves student/, merged, and student_adapter/, which `peft` loads beside the released student. It has
been planned, not run.
"""

from ml_collections import ConfigDict

from configs import rtd_8b


def get_config() -> ConfigDict:
    return with_adapter(rtd_8b.get_config())


def with_adapter(c: ConfigDict) -> ConfigDict:
    """A recipe with an adapter, and what fits it."""
    c.teacher.param_dtype = "int8"  # 71 GB over the mesh; in bfloat16 141
    c.student.adapter.rank = 16  # 42 million trained parameters of 8 billion
    c.micro_batches = 4  # 16 rows at one time
    c.optimizer.learning_rate = 2e-4  # peak; adapters take about ten times what all weights take
    return c
