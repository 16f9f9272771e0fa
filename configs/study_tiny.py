"""Every method of the article, and the controls that it lacks, on the tiny recipe.

    python launch/study.py --config=configs/study_tiny.py

Resumable: the same command continues where it was. Every method is a set of overrides of one recipe, written as on the
command line: same problems, same data order per seed, same number of updates.
"""

from ml_collections import ConfigDict

# Logit matching alone, all depths at once.
KD = ("loss.alignment_weight=0.0", "loss.coherence_weight=0.0", "curriculum.enabled=False")


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.base = "configs/rtd_tiny.py"  # config of every run
    c.parallel = 2  # runs side by side, on equal shares of the cores
    c.seeds = (0, 1, 2, 3, 4)  # of params and data order
    c.baseline = "kd"  # what differences are taken to
    c.deep = 4  # steps from which a problem counts as deep

    c.tasks = ConfigDict()
    c.tasks.word_problems = ("evaluation.problems_per_depth=200", "data.test.limit=1200")  # overrides

    c.methods = ConfigDict()
    c.methods.kd = KD
    c.methods.rtd = ()
    c.methods.rtd_no_coherence = ("loss.coherence_weight=0.0",)
    c.methods.rtd_no_alignment = ("loss.alignment_weight=0.0",)
    c.methods.rtd_no_curriculum = ("curriculum.enabled=False",)
    # Controls. Without the coherence loss nothing falls below its threshold: equal shares of the updates instead.
    c.methods.kd_curriculum = (*KD[:2], "curriculum.threshold_factor=0.0", "curriculum.plateau_patience=0")
    c.methods.rtd_random_boundaries = ("data.segmentation=random",)
    c.methods.rtd_all_tokens = ("loss.alignment_weight=0.0", "loss.token_alignment_weight=0.3")
    # Baselines.
    c.methods.intermediate_kd = (*KD, "loss.intermediate_weight=1.0")
    return c
