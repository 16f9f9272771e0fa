"""A process reward model on the bundled teacher: is a step of a word problem right?

    python launch/reward_model.py --config=configs/reward_tiny.py

Steps of the generator's problems, a quarter of them made wrong (rtd_jax/data/labelled.py). `--config.train.schema` may
be prm800k, processbench or stepwise, with `--config.train.location`. What it writes, runs/reward_tiny/model, is what
`reward.model` of a training run takes.
"""

from ml_collections import ConfigDict

from configs.rtd_tiny import BUNDLED_TEACHER
from rtd_jax.apps.reward_model import RewardModelRecipe
from rtd_jax.base.settings import defaults


def get_config() -> ConfigDict:
    c = defaults(RewardModelRecipe)
    c.teacher.path = str(BUNDLED_TEACHER)  # Hugging Face folder or hub name
    c.teacher.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.teacher.compute_dtype = "float32"  # likewise

    for split, limit in (("train", 6_000), ("test", 1_200)):
        c[split].schema = "synthetic"  # synthetic, processbench, prm800k or stepwise
        c[split].split = split  # of the data set; the generator's splits are disjoint
        c[split].limit = limit  # chains
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # the tiny tokenizer's words have no space in front

    c.hidden = 64  # GELU units of the head
    c.row_length = 160  # tokens; the longest chain has about 150
    c.batch_size = 32  # chains that the teacher reads at one time
    return c
