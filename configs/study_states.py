"""What is the state of a step? Trajectory losses on means over steps, in several layers, with squared distances.

    python launch/study.py --config=configs/study_states.py    # word problems, cups, lift; run again to continue
    python launch/study.py --config=configs/study_states.py:few_problems --config.ensemble=5   # one; by five

All depths at once, so that no curriculum hides what the losses do. The states are few enough for a teacher cache:
one of each step in each layer. `--config.only="('kd','alignment_states')"` makes some of the runs.
"""

from ml_collections import ConfigDict

from configs.study_tiny import KD, as_config, methods, only, words_of
from configs.study_tiny import get_config as study_tiny
from rtd_jax.apps.study.recipe import Method

STATES = ("loss.step_state=mean", "loss.layers=evenly:4", "loss.distance=squared", "loss.projections=none")
ALIGNMENT = (*KD[1:], "loss.alignment_weight=3.0", *STATES)  # KD's first three: no alignment, no coherence, no stages
COHERENCE = (KD[0], KD[2], "loss.coherence_weight=3.0", *STATES)
NEW_SKILL = (
    *("kd", "intermediate_kd", "intermediate_strong", "alignment_states", "alignment_windows"),
    *("alignment_soft", "coherence_states", "coherence_stride", "coherence_soft"),
)  # methods outside the word problems


def states() -> dict[str, Method]:
    """The methods by name."""
    found = only(methods(), ("kd", "rtd_no_curriculum", "intermediate_kd"))
    found["intermediate_strong"] = Method((*KD, "loss.intermediate_weight=3.0"), "rival")
    found["intermediate_completions"] = Method(
        (*found["intermediate_strong"].overrides, "loss.intermediate_prompt=False"),
        "rival",
        {"intermediate_strong": "how much of every token's gain is in the prompt's tokens?"},
    )
    found["alignment_states"] = Method(
        ALIGNMENT,
        "part",
        {
            "kd": "does it help to follow the means of steps?",
            "intermediate_strong": "is a state of each step as good as one of every token?",
            "intermediate_completions": "is it as good as one of every token of the completion?",
            "alignment_ends": "is the mean over a step better than its end?",
            "alignment_mapped": "do learned maps of states do harm where widths agree?",
            "alignment_windows": "are steps better than random windows?",
            "alignment_stride": "are steps better than windows of 12 tokens?",
            "alignment_soft": "are steps better than soft windows?",
        },
        caption="alignment of the means of steps",
        alignment=3.0,
        pictured=True,
    )
    found["alignment_ends"] = Method((*ALIGNMENT, "loss.step_state=end"), alignment=3.0)
    found["alignment_results"] = Method((*ALIGNMENT, "loss.step_state=result"), alignment=3.0)
    found["alignment_mapped"] = Method((*ALIGNMENT, "loss.projections=separate"), alignment=3.0)
    found["alignment_windows"] = Method((*ALIGNMENT, "data.segmentation=random"), alignment=3.0)
    found["alignment_stride"] = Method((*ALIGNMENT, "data.segmentation=stride:12"), alignment=3.0)
    found["alignment_soft"] = Method(
        (*ALIGNMENT, "data.segmentation=soft:12"),
        compared_with={
            "kd": "does it help to follow soft windows, without finding steps?",
            "alignment_stride": "are soft windows better than hard ones?",
            "intermediate_strong": "are they as good as every token?",
        },
        alignment=3.0,
    )
    found["coherence_states"] = Method(
        COHERENCE,
        "part",
        {
            "kd": "do transitions between means help by themselves?",
            "coherence_stride": "are steps better than windows of 12 tokens?",
            "coherence_soft": "are steps better than soft windows?",
        },
        caption="coherence of the means of steps",
        coherence=3.0,
        pictured=True,
    )
    found["coherence_stride"] = Method((*COHERENCE, "data.segmentation=stride:12"), coherence=3.0)
    found["coherence_soft"] = Method(
        (*COHERENCE, "data.segmentation=soft:12"),
        compared_with={"coherence_stride": "does it help to cut where the teacher turns?"},
        coherence=3.0,
    )
    found["both_states"] = Method(
        (KD[2], "loss.alignment_weight=1.0", "loss.coherence_weight=1.0", *STATES), "part", alignment=1.0, coherence=1.0
    )
    found["look_ahead"] = Method(
        (*KD, "loss.look_ahead_weight=1.0", *STATES),
        "part",
        {"kd": "does it help to predict a step from where it begins?"},
    )
    return found


def get_config(arg: str = "") -> ConfigDict:
    words = words_of(arg, ("few_problems", "cups", "lift"))
    c, families = study_tiny("conditions"), study_tiny()
    c.seeds = (0, 1, 2, 3, 4)  # of params and data order; the same for every method
    c.tasks.cups = families.tasks.cups  # another kind of problem
    c.tasks.lift = families.tasks.lift  # where the skill is new
    for task in ("cups", "lift"):
        c.about[task] = families.about[task]  # for the report
        c.task_methods[task] = NEW_SKILL  # the others say what matters, not whether it does
    for group in (c.tasks, c.about, c.task_methods):
        for task in set(group) - words if words else ():
            del group[task]
    c.methods = as_config(states())  # by name: overrides, role, components and what it is compared with
    return c
