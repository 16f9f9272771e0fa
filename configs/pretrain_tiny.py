"""The bundled teacher: a 4-layer, width-128 Llama trained from scratch on the generator's word problems.

    python launch/pretrain.py --config=configs/pretrain_tiny.py

The weights in rtd_jax/bundled/tiny_teacher/ are its <workdir>/model; its metrics and report stand beside them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of params, data order and few-shot choices

    c.model = ConfigDict()
    c.model.layers = 4  # transformer blocks
    c.model.width = 128  # hidden units
    c.model.mlp_width = 384  # hidden units of the SwiGLU
    c.model.heads = 4  # query heads
    c.model.kv_heads = 2  # key/value heads, each shared by heads / kv_heads query heads
    c.model.head_dim = 32  # units of one head
    c.model.rope_theta = 10_000.0  # base of the rotary angles
    c.model.max_positions = 1024  # tokens; written to config.json

    c.train = ConfigDict()
    c.train.schema = "synthetic"  # the generator
    c.train.split = "train"  # of the generator
    c.train.limit = 60_000  # problems
    c.train.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, equally often
    c.train.seed = 0  # of the generator

    c.test = ConfigDict()
    c.test.schema = "synthetic"  # the generator
    c.test.split = "test"  # disjoint from train
    c.test.limit = 1_200  # problems
    c.test.depths = (1, 2, 3, 4, 5, 6)  # reasoning steps
    c.test.seed = 0  # of the generator

    c.text = ConfigDict()
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # between prompt and completion

    # One after the other under one learning-rate schedule: updates; reasoning steps of the deepest problem; rows per
    # update; tokens of a row; chains of a row, at most.
    c.phases = (
        {"updates": 2_400, "max_depth": 6, "batch_size": 20, "row_length": 160, "chains_per_row": 4},
    )  # fmt: skip
    c.shot_fraction = 0.05  # share of chains that stand behind a solved example

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 2e-3  # peak
    c.optimizer.warmup_updates = 100  # optimizer updates
    c.optimizer.b2 = 0.98  # decay of the second moment, per update
    c.optimizer.weight_decay = 0.01  # on matrices
    c.optimizer.clip_norm = 1.0  # global norm of the gradient

    c.log_every = 20  # updates
    c.checkpoint_every = 250  # updates
    c.problems_per_depth = 200  # of the final evaluation
    c.max_new_tokens = 128  # of a generated solution
    return c
