"""Llama-3-70B-Instruct -> Llama-3-8B-Instruct on chains that the student writes, with RTD's losses on them too.

    python launch/train.py --config=configs/rtd_8b_on_policy.py --config.student.path=runs/rtd_8b/student

Not the article's: the article trains on the teacher's chains alone. Meant for a student that `rtd_8b` has trained, or
for the released one, which writes whole solutions from the start. Half of the rows stay the teacher's chains.
"""

from ml_collections import ConfigDict

from configs import rtd_8b


def get_config() -> ConfigDict:
    c = rtd_8b.get_config()
    c.on_policy.fraction = 0.5  # of an update's rows: chains that the student draws
    c.on_policy.updates_per_refresh = 4  # optimizer updates; a divisor of checkpoint_every
    c.on_policy.max_new_tokens = 400  # of a drawn chain, as in the evaluation
    c.on_policy.steps = "prose"  # what a chat model writes is laid out for a reader
    c.loss.divergence = "reverse_kl"  # the student is held to what it writes itself
    c.loss.temperature = 1.0  # the policy that draws is the one that is taught
    c.loss.alpha = 1.0  # no labels, on the teacher's chains either
    c.total_updates = 4_000  # optimizer updates: a tenth of rtd_8b's
    c.curriculum.enabled = False  # all depths at once
    return c
