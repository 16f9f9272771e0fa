"""Reasoning Trace Distillation on a laptop: the bundled tiny teacher, and word problems made on the spot.

    python launch/train.py --config=configs/rtd_tiny.py
    python launch/train.py --config=configs/rtd_tiny.py --workdir=runs/no_coherence --config.loss.coherence_weight=0.0

A few minutes on two CPU cores. Every key can be overridden on the command line.
"""

from pathlib import Path

from ml_collections import ConfigDict

from rtd_jax.base.settings import defaults
from rtd_jax.train.recipe import Recipe

BUNDLED_TEACHER = Path(__file__).resolve().parents[1] / "rtd_jax" / "bundled" / "tiny_teacher"


def get_config() -> ConfigDict:
    c = defaults(Recipe)
    c.teacher.path = str(BUNDLED_TEACHER)  # 4 layers, width 128
    c.teacher.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.teacher.compute_dtype = "float32"  # likewise
    c.student.init = "teacher_layers"  # of the same tokenizer and width, so it starts with something learned
    c.student.layers = 2  # of the teacher's 4
    c.student.compute_dtype = "float32"  # CPUs have no fast bfloat16

    for split, limit in (("train", 12_000), ("validation", 600), ("test", 600)):
        c.data[split].schema = "synthetic"  # the generator
        c.data[split].split = split  # the generator's splits are disjoint
        c.data[split].limit = limit  # problems
        c.data[split].depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
    c.data.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.data.text.completion_prefix = ""  # the tiny tokenizer's words have no space in front
    c.data.row_length = 160  # tokens; the longest chain has about 150
    c.data.chains_per_row = 4  # at most

    c.batch_size = 16  # rows per update
    c.total_updates = 600  # optimizer updates over all stages: a few minutes
    c.loss.chunk_length = 160  # positions: the whole row, for the vocabulary has 445 tokens only
    c.reward.updates_per_refresh = 10  # optimizer updates; a divisor of checkpoint_every

    c.optimizer.learning_rate = 2e-3  # peak; models of this size take more
    c.optimizer.warmup_updates = 50  # optimizer updates, of 600
    c.optimizer.b2 = 0.98  # decay per update, for a run this short
    c.optimizer.weight_decay = 0.01  # on matrices

    c.curriculum.validate_every = 20  # optimizer updates
    c.curriculum.validation_chains = 96  # per stage; of 600 over six depths
    c.curriculum.min_updates = 40  # two validations
    c.curriculum.plateau_patience = 4  # validations without improvement

    c.evaluation.max_new_tokens = 128  # of a generated solution
    c.evaluation.batch_size = 100  # problems decoded at one time
    c.checkpoint_every = 100  # optimizer updates
    return c
