"""The study of configs/study_tiny.py at the article's size: Llama-3-70B-Instruct -> Llama-3-8B-Instruct, GSM8K.

    python launch/study.py --config=configs/study_8b.py              # :grid varies the two weights
    python launch/study.py --config=configs/study_8b.py:cached       # teacher's outputs from a cache, where possible

Not run by us: each run is one of configs/rtd_8b.py, on eight A100s, one after the other. Needed are the teacher's
chains in traces/llama3_70b (launch/traces.py --config=configs/traces_llama3_70b.py) and, for step rewards, PRM800K's
train.jsonl and test.jsonl in prm800k. docs/teacher-cache.md says what a cache loses at temperature 4.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.study_tiny import FROM_CACHE, KD, as_config, changed, methods, only, weight_grid, words_of
from rtd_jax.apps.study.recipe import Method, StudyRecipe
from rtd_jax.base.settings import defaults

TEACHER = "meta-llama/Meta-Llama-3-70B-Instruct"


def get_config(arg: str = "") -> ConfigDict:
    words = words_of(arg, ("grid", "cached"))
    c = defaults(StudyRecipe)
    c.base = (
        "configs/rtd_8b.py"  # config of every run, which takes all devices; all methods train on the teacher's chains
    )
    c.seeds = (0, 1, 2)  # of projections and data order; the same for every method

    c.prepare.reward = (
        "reward_model",
        "--config=configs/reward_tiny.py",
        "--workdir={reward}",
        f"--config.teacher.path={TEACHER}",
        "--config.teacher.param_dtype=bfloat16",
        "--config.teacher.compute_dtype=bfloat16",
        *(f"--config.{split}.schema=prm800k" for split in ("train", "test")),
        *(f"--config.{split}.location=prm800k" for split in ("train", "test")),
        *(f"--config.{split}.limit={limit}" for split, limit in (("train", 50_000), ("test", 5_000))),
        "--config.text.kind=chat",
        "--config.text.prompt_template=",
        "--config.row_length=1024",
        "--config.max_dropped_fraction=0.05",
    )
    c.prepare.cache = (
        "cache_teacher",
        "--config=configs/rtd_8b.py",
        "--config.teacher.cache={cache}",
    )

    c.tasks.gsm8k = (
        "evaluation.teacher=False",
        "evaluation.problems_per_depth=300",
        "evaluation.every=4000",
        "evaluation.drift_problems=200",
    )
    every = methods()
    every["kd_long"] = Method((*KD, "total_updates=64000"), "longer")  # about RTD's time, by the article's 60%
    question = {"kd_long": "is RTD better than KD with 1.6 times the updates, about its time?"}
    every["rtd"] = dataclasses.replace(every["rtd"], compared_with=every["rtd"].compared_with | question)
    if "grid" in words:
        every = only(every, ["kd"]) | weight_grid(True)
    else:
        smaller = ("student.path=meta-llama/Llama-3.2-1B-Instruct",)
        c.tasks.smaller_student = (*c.tasks.gsm8k, *smaller)  # is the gain smaller below a capacity?
        c.task_methods.smaller_student = ("kd", "rtd", "kd_curriculum")  # of all methods
        c.smaller_than = {"smaller_student": "gsm8k"}  # {task of a smaller student: of the larger}
    if "cached" in words:
        for name in FROM_CACHE:
            if name in every:
                every[name] = changed(every[name], "teacher.cache={cache}")
        if "intermediate_kd" in every:  # a cache cannot solve problems
            every["intermediate_kd"] = changed(every["intermediate_kd"], "evaluation.teacher=True")
    c.methods = as_config(every)  # by name: overrides, role, components and what it is compared with
    return c
