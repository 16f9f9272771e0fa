"""The published recipe: Llama-3-70B-Instruct -> Llama-3-8B-Instruct on 8 x A100 80GB.

    python launch/train.py --config=configs/rtd_8b.py --config.data.train.location=/data/traces

`data.train.location` is a folder of stepwise JSONL (`prompt`, `completions`, `answer`), the teacher's own chains: the
article trains on 50,000 of them. Kept to the letter: temperature 4.0, alpha 0.7, weights 0.3 and 0.5, learning rate
2e-5 with cosine annealing (these are the settings' defaults), batch 64, 40,000 updates over the stages. The article
gives no weight decay, betas, warm-up or row length; those of the defaults are ours.
"""

from ml_collections import ConfigDict

from rtd_jax.base.settings import defaults
from rtd_jax.train.recipe import Recipe


def get_config() -> ConfigDict:
    c = defaults(Recipe)
    c.teacher.path = "meta-llama/Meta-Llama-3-70B-Instruct"  # in bfloat16 141 GB over the mesh; in int8 71
    c.student.init = "pretrained"  # the article starts from the released student
    c.student.path = "meta-llama/Meta-Llama-3-8B-Instruct"  # hub name or local Hugging Face folder
    c.student.remat = "full"  # keep one state per layer, recompute the rest

    c.data.train.schema = "stepwise"  # prompt, completions (list of steps), answer
    c.data.train.location = "traces/llama3_70b"  # folder of train.jsonl or parquet, or a hub name
    c.data.validation_fraction = 0.02  # of the training traces: 1,000 of 50,000
    c.data.test.schema = "gsm8k"  # see rtd_jax/data/sources.py
    c.data.test.location = "openai/gsm8k"  # hub name, or a folder with test.jsonl
    c.data.test.subset = "main"  # the hub's configuration name
    c.data.test.split = "test"  # of the data set
    c.data.text.kind = "chat"  # the tokenizer's own chat template
    c.data.chains_per_row = 1  # the article's batch of 64 problems; more packs several chains into a row
    c.data.max_dropped_fraction = 0.02  # of chains longer than a row; more is an error

    c.batch_size = 64  # rows per update
    c.total_updates = 40_000  # optimizer updates over all stages

    # The student's own chains, where loss.reward_weight is set.
    c.reward.prompts = 64  # training problems of a refresh
    c.reward.prompts_per_update = 16  # of these problems: 64 rows with all their chains
    c.reward.updates_per_refresh = 20  # optimizer updates; a divisor of checkpoint_every
    c.reward.max_new_tokens = 400  # of a drawn chain, as in the evaluation
    c.reward.batch_size = 64  # chains drawn at one time

    c.curriculum.threshold_factor = 1.5  # x the teacher's coherence loss against itself under another context
    c.curriculum.calibration_shots = 2  # solved problems put before the prompt to change the teacher's context
    c.curriculum.validate_every = 250  # optimizer updates
    c.curriculum.validation_chains = 256  # per stage
    c.curriculum.min_updates = 500  # before a stage may end by threshold or plateau
    c.curriculum.plateau_patience = 6  # validations without improvement
    c.curriculum.plateau_tolerance = 0.01  # relative improvement that counts

    c.evaluation.problems_per_depth = 200  # test problems
    c.evaluation.max_new_tokens = 400  # of a generated solution
    c.log_every = 20  # optimizer updates
    return c
