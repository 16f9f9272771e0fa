"""A shallow copy of SmolLM2-135M-Instruct learns word problems in whole sentences from the fine-tuned model.

    python launch/train.py --config=configs/rtd_smollm2_sentences.py

The teacher is made by configs/study_smollm2.py, which also has what to change for a CPU: here models compute in
bfloat16.
"""

from ml_collections import ConfigDict

from rtd_jax.base.settings import defaults
from rtd_jax.train.recipe import Recipe


def get_config() -> ConfigDict:
    c = defaults(Recipe)
    c.teacher.path = "runs/study_smollm2/prepared/teacher/student"  # fine-tuned by the study
    c.student.init = "teacher_layers"  # there is no smaller model with this tokenizer
    c.student.layers = 6  # evenly spaced, of the teacher's 30
    c.student.remat = "full"  # keep one state per layer, recompute the rest

    for split, limit in (("train", 4_000), ("validation", 600), ("test", 600)):
        c.data[split].schema = "synthetic"  # the generator
        c.data[split].split = split  # the generator's splits are disjoint
        c.data[split].limit = limit  # problems, of 1 to 6 steps equally often; an ensemble keeps a megabyte for each
        c.data[split].wording = "natural"  # whole sentences
        c.data[split].keep_marks = False  # the <<48/2=24>> calculator marks
    c.data.text.kind = "chat"  # the tokenizer's own chat template
    c.data.row_length = 512  # tokens; chains have 180 on average, the longest some 330
    c.data.chains_per_row = 5  # at most

    c.batch_size = 8  # rows per update, of some 2.5 chains each
    c.total_updates = 300  # optimizer updates over all stages
    c.loss.chunk_length = 128  # positions of each row whose logits exist at one time: 8 x 128 x 49,152

    c.on_policy.updates_per_refresh = 10  # optimizer updates; a divisor of checkpoint_every
    c.on_policy.max_new_tokens = 192  # of a drawn chain

    c.optimizer.learning_rate = 5e-4  # peak; the student starts with a fifth of the layers
    c.optimizer.warmup_updates = 30  # optimizer updates, of 300

    c.curriculum.validate_every = 20  # optimizer updates
    c.curriculum.validation_chains = 96  # per stage; of 600 over six depths
    c.curriculum.min_updates = 40  # two validations
    c.curriculum.plateau_patience = 4  # validations without improvement

    c.evaluation.problems_per_depth = 60  # test problems
    c.evaluation.max_new_tokens = 192  # of a generated solution; the longest has some 180
    c.evaluation.batch_size = 360  # problems decoded at one time: all of them
    c.log_every = 20  # optimizer updates
    c.checkpoint_every = 1_000  # optimizer updates: none on the way of 300, for a state has a gigabyte
    c.checkpoint_digest = False  # likewise
    return c
