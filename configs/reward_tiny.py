"""A process reward model on the bundled teacher: is a step of a word problem right?

    python launch/reward_model.py --config=configs/reward_tiny.py

Steps of the generator's problems, a quarter of them made wrong (rtd_jax/data/labelled.py). `--config.train.schema` may
be prm800k, processbench or stepwise, with `--config.train.location`. What it writes, runs/reward_tiny/model, is what
`reward.model` of a training run takes.
"""

from ml_collections import ConfigDict

from configs.rtd_tiny import BUNDLED_TEACHER


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the head and of the order of steps

    c.teacher = ConfigDict()
    c.teacher.path = str(BUNDLED_TEACHER)  # Hugging Face folder or hub name
    c.teacher.param_dtype = "float32"  # of the weights in memory
    c.teacher.compute_dtype = "float32"  # of matrix products and states

    for split, limit in (("train", 6_000), ("test", 1_200)):
        c[split] = ConfigDict()
        c[split].schema = "synthetic"  # synthetic, processbench, prm800k or stepwise
        c[split].location = ""  # folder, file or hub name; unused by synthetic
        c[split].split = split  # of the data set; the generator's splits are disjoint
        c[split].limit = limit  # chains
        c[split].depths = (1, 2, 3, 4, 5, 6)  # reasoning steps, of synthetic
        c[split].corruption = 0.25  # chance of each step to be made wrong, of synthetic
        c[split].seed = 0  # of the generator and the corruptions
    c.text = ConfigDict()
    c.text.kind = "plain"  # plain, or chat: the tokenizer's own template
    c.text.prompt_template = "Question: {prompt}\nAnswer:\n"  # what the tiny tokenizer is made for
    c.text.completion_prefix = ""  # between prompt and completion

    c.layers = (-1,)  # of the teacher, whose states at a boundary the head reads side by side
    c.surprise = True  # the head also reads the teacher's -log p of the step's tokens, mean and largest
    c.hidden = 64  # GELU units of the head; 0 is a linear head
    c.row_length = 160  # tokens
    c.batch_size = 32  # chains that the teacher reads at one time
    c.epochs = 30  # over the labelled steps
    c.steps_per_update = 512  # labelled steps
    c.learning_rate = 3e-3  # peak; cosine to zero
    c.weight_decay = 0.01  # on the head
    c.resamples = 200  # for intervals
    return c
