"""The bundled teacher: a 4-layer, width-128 Llama trained from scratch on the generator's word problems.

    python launch/pretrain.py --config=configs/pretrain_tiny.py

The weights in rtd_jax/bundled/tiny_teacher/ are its <workdir>/model; its metrics and report stand beside them.
"""

from ml_collections import ConfigDict

from rtd_jax.apps.pretrain import PretrainRecipe
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(PretrainRecipe)
    c.model.layers = 4  # transformer blocks
    c.model.width = 128  # hidden units
    c.model.mlp_width = 384  # hidden units of the SwiGLU
    c.model.heads = 4  # query heads
    c.model.kv_heads = 2  # key/value heads, each shared by two query heads
    c.model.head_dim = 32  # units of one head

    for split, limit in (("train", 60_000), ("test", 1_200)):
        c[split].schema = "synthetic"  # the generator
        c[split].split = split  # the generator's splits are disjoint
        c[split].limit = limit  # problems
        c[split].depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # the tiny tokenizer's words have no space in front

    # One after the other under one learning-rate schedule: updates; reasoning steps of the deepest problem; rows per
    # update; tokens of a row; chains of a row, at most.
    c.phases = (
        {"updates": 2_400, "max_depth": 6, "batch_size": 20, "row_length": 160, "chains_per_row": 4},
    )  # fmt: skip
    c.shot_fraction = 0.05  # share of chains that stand behind a solved example

    c.optimizer.learning_rate = 2e-3  # peak; models of this size take more
    c.optimizer.warmup_updates = 100  # optimizer updates, of 2,400
    c.optimizer.b2 = 0.98  # decay per update, for a run this short
    c.optimizer.weight_decay = 0.01  # on matrices
    return c
