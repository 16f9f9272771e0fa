"""Does the trajectory help on what the student writes itself? On-policy distillation of tiny models, with and without.

    python launch/study.py --config=configs/study_on_policy.py    # five seeds; run again to continue

All methods go on from one student, which KD has taught; what a student without training draws teaches nothing
(docs/decisions.md). `--config.only="('kd','kd_on_policy')"` makes some of the runs.
"""

from ml_collections import ConfigDict

from configs.study_states import ALIGNMENT
from configs.study_tiny import ALIGNED, COHERENT, FEW, KD, MEASURED, as_config, methods, only
from rtd_jax.apps.study.recipe import Method, StudyRecipe
from rtd_jax.base.settings import defaults

TAUGHT = 150  # updates by which KD prepares the student, and of each method after that
# Updates on chains that the student drew, new ones every few updates, without labels. At KD's own temperature: with 1,
# the usual one on policy, `kd_on_policy` came to 60% of validation problems, with 4 to 67% (one seed).
DRAWN = ("on_policy.updates_per_refresh=5", "loss.alpha=1.0")
ALL_DRAWN = (*DRAWN, "on_policy.fraction=1.0", "loss.divergence=reverse_kl")


def on_policy() -> dict[str, Method]:
    """The methods by name."""
    found = only(methods(), ("kd", "rtd_no_curriculum", "intermediate_kd"))
    found["kd_on_policy"] = Method(
        (*KD, *ALL_DRAWN),
        "rival",
        {"kd_on_policy_forward": "is it better to hold the student to what it writes, or to cover the teacher?"},
        caption="on-policy distillation, reverse KL",
        pictured=True,
    )
    found["kd_on_policy_forward"] = Method((*KD, *ALL_DRAWN, "loss.divergence=forward_kl"))
    found["gkd"] = Method(
        (*KD, *DRAWN, "on_policy.fraction=0.5", "loss.divergence=jsd"),
        "rival",
        {"kd_on_policy": "does it help to keep half of the teacher's chains?"},
        caption="half of the chains drawn, JSD",
        pictured=True,
    )
    found["rtd_on_policy"] = Method(
        (KD[2], *ALL_DRAWN),
        compared_with={"kd_on_policy": "does RTD's trajectory help on the student's own chains?"},
        **ALIGNED,
        **COHERENT,
        pictured=True,
    )
    found["intermediate_on_policy"] = Method(
        (*KD, *ALL_DRAWN, "loss.intermediate_weight=1.0"),
        compared_with={
            "kd_on_policy": "do intermediate layers help on the student's own chains?",
            "intermediate_kd": "are they better matched on own chains than on the teacher's?",
        },
        pictured=True,
    )
    found["alignment_states"] = Method(ALIGNMENT, "part", alignment=3.0)
    found["alignment_on_policy"] = Method(
        (*ALIGNMENT, *ALL_DRAWN, "loss.divergence=forward_kl"),
        "part",
        {
            "kd_on_policy_forward": "does it help to follow the means of steps on the student's own chains?",
            "alignment_states": "is it better to follow them on own chains than on the teacher's?",
        },
        caption="alignment of the means of steps, own chains, forward KL",
        alignment=3.0,
        pictured=True,
    )
    return found


def get_config() -> ConfigDict:
    c = defaults(StudyRecipe)
    c.base = "configs/rtd_tiny.py"  # config of every run
    c.parallel = 2  # runs side by side, on equal shares of the cores; 0: only the report of finished runs
    c.seeds = (0, 1, 2, 3, 4)  # of the data's order and of the draws; the same for every method
    c.prepare.taught = (
        "train",
        "--config=configs/rtd_tiny.py",
        "--workdir={taught}",
        *(f"--config.{override}" for override in (*KD, f"data.train.limit={FEW}", f"total_updates={TAUGHT}")),
        "--config.evaluation.problems_per_depth=1",
    )
    c.tasks.taught_student = (
        "evaluation.teacher=False",
        *MEASURED,
        "evaluation.every=50",
        "evaluation.drift_own=True",
        "student.init=pretrained",
        "student.path={taught}/student",
        "student.layers=0",
        f"data.train.limit={FEW}",
        f"total_updates={TAUGHT}",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_updates=20",
    )
    c.about.taught_student = (  # for the report
        f"Word problems, {FEW} to train on. All methods go on from one student, which KD has taught for {TAUGHT} "
        f"updates, for another {TAUGHT} at half of its learning rate. Methods with `on_policy` in their name learn "
        "from chains that the student draws for the same problems, `gkd` from as many of these as of the teacher's, in "
        "rows filled as the data's are. Seeds are of the data's order and of the draws; all begin with one student."
    )
    c.methods = as_config(on_policy())  # by name: overrides, role, components and what it is compared with
    return c
