"""On-policy distillation on a laptop: the student of rtd_tiny writes, and the teacher reads every token of it.

    python launch/train.py --config=configs/opd_tiny.py
    python launch/train.py --config=configs/opd_tiny.py --workdir=runs/opd_rtd \
        --config.loss.alignment_weight=0.3 --config.loss.coherence_weight=0.5

Half of an update's rows are the student's own chains, and the divergence is the generalised Jensen-Shannon one (GKD,
arXiv:2306.13649). `--config.on_policy.fraction=1.0` is on-policy distillation alone.
"""

from ml_collections import ConfigDict

from configs import rtd_tiny


def get_config() -> ConfigDict:
    c = rtd_tiny.get_config()
    c.on_policy.fraction = 0.5  # of an update's rows: chains that the student draws
    c.on_policy.updates_per_refresh = 5  # optimizer updates; a divisor of checkpoint_every
    c.loss.divergence = "jsd"  # of teacher and student to their mixture
    c.loss.alpha = 1.0  # logit matching is the divergence alone, on the data's chains too
    c.loss.alignment_weight = 0.0  # no boundary alignment
    c.loss.coherence_weight = 0.0  # no coherence
    c.curriculum.enabled = False  # all depths at once
    return c
