"""Which method keeps deep chains alive: KD, RTD, its ablations, controls and rivals, on tiny models.

    python launch/study.py --config=configs/study_tiny.py              # everything, five seeds; run again to continue
    python launch/study.py --config=configs/study_tiny.py:smoke        # a few updates of some methods, in minutes
    python launch/study.py --config=configs/study_tiny.py:conditions   # layer, anchor, maps, form and size of coherence
    python launch/study.py --config=configs/study_tiny.py:lift         # the lift on ten seeds, all depths at once
    python launch/study.py --config=configs/study_tiny.py:grid         # the two weights, all depths at once
    python launch/study.py --config=configs/study_tiny.py:cached       # teacher's outputs from a cache, where possible

What the runs share (chains, the reward model, other teachers, the cache) is made once, before them, in
<workdir>/prepared. `--config.only="('kd','rtd')"` makes some of the runs. Budgets were chosen with KD alone on
validation problems, so that it is neither solved nor hopeless: docs/study.md says what came out. `smoke` and `cached`
make the same runs otherwise and need workdirs of their own; the others share the runs that they have in common.
"""

import dataclasses
from collections.abc import Iterable

from ml_collections import ConfigDict

from rtd_jax.apps.study.recipe import Method, StudyRecipe
from rtd_jax.base.settings import defaults

ALIGNMENT_WEIGHTS = (0.1, 0.3, 1.0)  # the article's grid search gave 0.3 ..
COHERENCE_WEIGHTS = (0.1, 0.5, 1.0)  # .. and 0.5
# What a method has of RTD's three components, by the weights of the base config.
ALIGNED, COHERENT, STAGED = {"alignment": 0.3}, {"coherence": 0.5}, {"curriculum": True}

FEW = 250  # problems to train on where few are to be had
PLATEAU = 600  # updates on few problems, twice the budget
LIFT = 750  # updates of students that start from random weights

# Logit matching alone, all depths at once.
KD = ("loss.alignment_weight=0.0", "loss.coherence_weight=0.0", "curriculum.enabled=False")
# All eight combinations of alignment, coherence and curriculum.
PARTS = (
    *("kd", "rtd", "rtd_no_coherence", "rtd_no_alignment", "rtd_no_curriculum"),
    *("kd_curriculum", "coherence_only", "alignment_only"),
)
AT_ONCE = ("kd", "coherence_only", "alignment_only", "rtd_no_curriculum")  # those without the curriculum
# A cache holds all that these need. The others need the teacher online (states at every token, other boundaries, the
# student's own chains), or not at all.
FROM_CACHE = PARTS
# Every digit of every token: with k = V (the bundled tokenizer's 445) training is that with the teacher online.
CACHED = ("cache.top_k=445", "cache.predictions=float32", "cache.states=float32")
MEASURED = (  # in every run of any size
    "evaluation.problems_per_depth=60",
    "evaluation.every=100",
    "evaluation.curve_problems=10",
    "evaluation.drift_problems=32",
)
SMOKE = ("kd", "intermediate_kd", "cot_ft", "step_reward", "rtd", "rtd_no_coherence", "self_distillation")
# A few updates on a few problems. The first three decide what a cache holds.
SMALL = (
    "data.train.limit=60",
    "data.validation.limit=20",
    "curriculum.validation_chains=4",
    "total_updates=4",
    "batch_size=4",
    "checkpoint_every=4",
    "log_every=1",
    "data.test.limit=6",
    "evaluation.problems_per_depth=1",
    "evaluation.max_new_tokens=8",
    "evaluation.every=2",
    "evaluation.curve_problems=1",
    "evaluation.drift_problems=2",
    "reward.prompts=4",
    "reward.prompts_per_update=2",
    "reward.samples=2",
    "reward.updates_per_refresh=2",
    "reward.max_new_tokens=24",
)


def methods() -> dict[str, Method]:
    """The methods of the study by name; configs/study_8b.py takes them too."""
    return {
        # The teacher solves the test problems once a task: they are the same for all runs.
        "kd": Method((*KD, "evaluation.teacher=True"), "baseline", caption="logit matching", pictured=True),
        "rtd": Method(
            (),
            "whole",
            {
                "kd_curriculum": "do the hidden-state losses add to the curriculum?",
                "rtd_random_boundaries": "does it matter that boundaries are where steps end?",
                "rtd_all_tokens": "are boundaries better than all tokens?",
            },
            **ALIGNED,
            **COHERENT,
            **STAGED,
            pictured=True,
        ),
        "rtd_no_coherence": Method(("loss.coherence_weight=0.0",), "ablation", **ALIGNED, **STAGED),
        "rtd_no_alignment": Method(("loss.alignment_weight=0.0",), "ablation", **COHERENT, **STAGED),
        "rtd_no_curriculum": Method(
            ("curriculum.enabled=False",),
            "ablation",
            {"random_boundaries_no_curriculum": "does it matter where there is no curriculum?"},
            **ALIGNED,
            **COHERENT,
        ),
        # Without the coherence loss nothing falls below its threshold: equal shares of the updates instead.
        "kd_curriculum": Method(
            (*KD[:2], "curriculum.threshold_factor=0.0", "curriculum.plateau_patience=0"),
            "part",
            {"kd": "is it the curriculum alone?"},
            **STAGED,
            pictured=True,
        ),
        "coherence_only": Method((KD[0], KD[2]), "part", {"kd": "does the coherence loss help plain KD?"}, **COHERENT),
        "alignment_only": Method(
            (KD[1], KD[2]), "part", {"kd": "does the boundary alignment help plain KD?"}, **ALIGNED
        ),
        "rtd_random_boundaries": Method(("data.segmentation=random",), **ALIGNED, **COHERENT, **STAGED),
        "random_boundaries_no_curriculum": Method(
            ("data.segmentation=random", "curriculum.enabled=False"), **ALIGNED, **COHERENT
        ),
        "rtd_all_tokens": Method(
            ("loss.alignment_weight=0.0", "loss.token_alignment_weight=0.3"), **COHERENT, **STAGED
        ),
        "intermediate_kd": Method(
            (*KD, "loss.intermediate_weight=1.0"), "rival", caption="intermediate-layer matching", pictured=True
        ),
        "cot_ft": Method(
            (*KD, "loss.alpha=0.0"), "rival", caption="fine-tuning on the teacher's chains", pictured=True
        ),
        "step_reward": Method(
            (*KD, "loss.reward_weight=0.3", "reward.model={reward}/model"),
            "rival",
            caption="step-level rewards",
            pictured=True,
        ),
    }


def changed(method: Method, *overrides: str) -> Method:
    """The method with more overrides."""
    return dataclasses.replace(method, overrides=(*method.overrides, *overrides))


def as_config(every: dict[str, Method]) -> ConfigDict:
    """The methods as keys of a config; their places are those in the table."""
    placed = {name: dataclasses.replace(method, place=i) for i, (name, method) in enumerate(every.items())}
    return ConfigDict({name: dataclasses.asdict(method) for name, method in placed.items()})


def weight_grid(curriculum: bool, *overrides: str) -> dict[str, Method]:
    """RTD under every pair of weights, with more overrides."""
    return {
        f"grid_a{100 * a:.0f}_c{100 * c:.0f}": Method(
            (f"loss.alignment_weight={a}", f"loss.coherence_weight={c}", *overrides),
            "grid point",
            alignment=a,
            coherence=c,
            curriculum=curriculum,
        )
        for a in ALIGNMENT_WEIGHTS
        for c in COHERENCE_WEIGHTS
    }


def only(every: dict[str, Method], names: Iterable[str]) -> dict[str, Method]:
    """Some of the methods."""
    return {name: every[name] for name in names}


def words_of(arg: str, known: tuple[str, ...]) -> set[str]:
    """The words of `smoke+cached`. Raises ValueError for one that is not known."""
    words = {word for word in arg.split("+") if word}
    if words - set(known):
        raise ValueError(f"after the colon this config knows {', '.join(known)}, not {min(words - set(known))!r}")
    return words


CHANGED = {  # one thing about the coherence loss
    "no_anchor": ("loss.anchor_prompt=False",),  # no transition from the prompt: the formula to the letter
    "lengths": ("loss.distance=squared",),
    "one_map": ("loss.projections=shared",),  # with the alignment
    "no_map": ("loss.projections=none",),
    "middle_layer": ("loss.hidden_layer=2", "loss.student_hidden_layer=1"),
    "fourfold": ("loss.coherence_weight=2.0",),
    "sixteenfold": ("loss.coherence_weight=8.0",),
}
STRONGER = {"fourfold": {"coherence": 2.0}, "sixteenfold": {"coherence": 8.0}}
CHANGES_ALIGNMENT = ("no_map", "middle_layer")  # what these change is one of the alignment too


def conditions() -> dict[str, Method]:
    """When does the coherence loss earn its place? Changed by itself and beside the alignment, all depths at once.

    The curriculum's harm on few problems would hide everything else.
    """
    known = methods()
    found = only(known, (*AT_ONCE, "intermediate_kd", "random_boundaries_no_curriculum"))
    # What the rival, which matches every token, has over boundaries: by the article's weight and by the rival's.
    found["tokens_only"] = Method((*KD, "loss.token_alignment_weight=0.3"))
    found["tokens_strong"] = Method((*KD, "loss.token_alignment_weight=1.0"))

    def condition(start: str, what: str, *compared_with: str) -> Method:
        """A part or both losses with one change; its difference is taken to a method without the coherence loss."""
        described = {"role": "condition", "caption": what, "compared_with": dict.fromkeys(compared_with, "")}
        return dataclasses.replace(changed(known[start], *CHANGED[what]), **described, **STRONGER.get(what, {}))

    for what in CHANGED:
        if what != "one_map":
            found[f"coherence_{what}"] = condition("coherence_only", what, "kd")
    for what in CHANGED:
        # What changes the alignment too is compared with the alignment changed alike.
        without = f"alignment_{what}" if what in CHANGES_ALIGNMENT else "alignment_only"
        found[f"both_{what}"] = condition("rtd_no_curriculum", what, without)
    for what in CHANGES_ALIGNMENT:
        found[f"alignment_{what}"] = condition("alignment_only", what)
    return found


def get_config(arg: str = "") -> ConfigDict:
    alone = ("smoke", "grid", "conditions", "lift")
    words = words_of(arg, (*alone, "cached"))
    smoke = "smoke" in words
    if len(words.intersection(alone)) > 1:
        raise ValueError(f"{arg}: these are studies of their own; give one of the words")
    if "cached" in words and words & {"conditions", "lift"}:
        raise ValueError(f"{arg}: a cache has the bundled teacher's states of one layer; give one of the words")

    c = defaults(StudyRecipe)
    c.base = "configs/rtd_tiny.py"  # config of every run
    c.parallel = 2  # runs side by side, on equal shares of the cores; 0: only the report of finished runs
    c.solved_share = 0.5  # of deep validation chains: where learning is sudden, accuracy at one budget is a coin toss
    c.seeds = (0,) if smoke else (0, 1, 2, 3, 4)  # of params and data order; the same for every method

    # Made once, where a run asks for it: a command of `python -m rtd_jax` and its flags; {name} is its folder.
    few = ("--config.train.limit=60", "--config.test.limit=60", "--config.epochs=2", "--config.resamples=20")
    c.prepare.traces = (  # the teacher's own chains, where the answer is right
        "traces",
        "--config=configs/traces_tiny.py",
        "--workdir={traces}",
        f"--config.problems.limit={60 if smoke else FEW}",  # as many as the other methods have
        "--config.sampling.samples=1",
    )
    c.prepare.reward = (
        "reward_model",
        "--config=configs/reward_tiny.py",
        "--workdir={reward}",
        *(few if smoke else ()),
    )
    c.prepare.cups_teacher = (
        "pretrain",
        "--config=configs/pretrain_tiny.py",
        "--workdir={cups_teacher}",
        "--config.train.schema=synthetic+cups",  # what helps it find a month's fact is learned on word problems
        "--config.test.schema=cups",
    )
    c.prepare.lift_teacher = (
        "pretrain",
        "--config=configs/pretrain_tiny.py",
        "--workdir={lift_teacher}",
        "--config.train.schema=lift",
        "--config.test.schema=lift",
        # With 1,000 updates it solved 99.7% on one machine, and on another 31% of the rides with four steps.
        "--config.phases=({'updates': 2000, 'max_depth': 6, 'batch_size': 16, 'row_length': 160, 'chains_per_row': 4},)",  # noqa: E501
    )
    c.prepare.cache = (
        "cache_teacher",
        "--config=configs/rtd_tiny.py",
        "--config.teacher.cache={cache}",
        *(f"--config.{override}" for override in (*CACHED, *(SMALL[:3] if smoke else ()))),
    )

    evaluation = ("evaluation.teacher=False", *(SMALL if smoke else MEASURED))
    budget = () if smoke else (f"data.train.limit={FEW}", "total_updates=300")
    c.tasks.few_problems = (*evaluation, *budget)  # the task that has all methods
    c.about.few_problems = (  # for the report
        f"Word problems, {FEW} to train on, 300 updates, the learning rate annealed over them."
    )

    every = methods()
    every["cot_ft"] = changed(every["cot_ft"], "data.train.schema=stepwise", "data.train.location={traces}")
    # The teacher's own architecture. It starts as the teacher, because the article asks whether coherence improves a
    # model without compression: at first only the labels have a gradient, and the other terms hold on to the
    # trajectory. A tenth of the learning rate, for it has nothing to learn anew; `self_kd` is the same without RTD.
    slowly = ("student.layers=4", "optimizer.learning_rate=2e-4")
    question = {"self_kd": "does coherence add to training the teacher on?"}
    every["self_distillation"] = Method(slowly, "self-distillation", question, **ALIGNED, **COHERENT, **STAGED)
    every["self_kd"] = Method((*KD, *slowly))
    if smoke:
        every = only(every, SMOKE)
    elif "grid" in words:  # all depths at once: with the curriculum every pair stands near 2% of the deep chains
        every = only(every, ["kd"]) | weight_grid(False, KD[2])
        c.about.few_problems += " The grid is without the curriculum, whose harm here would hide the weights'."
    elif "conditions" in words:
        every = conditions()
    elif "lift" in words:
        every = only(every, AT_ONCE)
        del c.tasks.few_problems, c.about.few_problems
        _add_lift(c, evaluation)
        c.seeds = tuple(range(10))  # seeds differ widely there
    else:
        _add_larger_student(c)
        if "cached" not in words:  # the cache is the bundled teacher's, on word problems
            _add_cups(c, evaluation)
            _add_lift(c, evaluation)
            c.task_methods.lift = PARTS  # all combinations
        updates, question = f"total_updates={PLATEAU}", "is anything left when both have had many more updates?"
        every["kd_plateau"] = Method((*KD, updates), "longer")
        every["rtd_plateau"] = Method((updates,), "longer", {"kd_plateau": question}, **ALIGNED, **COHERENT, **STAGED)
        c.about.few_problems += (
            f" `kd_plateau` and `rtd_plateau` have {PLATEAU} updates: what is left to be learned by then."
        )
    # Not the default: of what a cache cannot hold, times could not be compared with those of what it can.
    from_cache = FROM_CACHE if "cached" in words else ("kd",) if smoke else ()  # the smoke study tries both ways
    for name in from_cache:
        if name in every:
            every[name] = changed(every[name], "teacher.cache={cache}", *CACHED)
    if from_cache and "intermediate_kd" in every:  # a cache cannot solve problems
        every["intermediate_kd"] = changed(every["intermediate_kd"], "evaluation.teacher=True")
    c.methods = as_config(every)  # by name: overrides, role, components and what it is compared with
    return c


def _add_lift(c: ConfigDict, evaluation: tuple[str, ...]) -> None:
    """Students that learn from nothing: every stage of the curriculum has something to learn, and updates for it."""
    c.tasks.lift = (
        *evaluation,
        *(f"data.{split}.schema=lift" for split in ("train", "validation", "test")),
        "teacher.path={lift_teacher}/model",
        "data.train.limit=6000",
        f"total_updates={LIFT}",
        "student.init=random",
        "student.width=128",
        "student.mlp_width=384",
        "student.heads=4",
        "student.kv_heads=2",
        "student.head_dim=32",
        "optimizer.learning_rate=3e-3",
    )
    c.about.lift = (
        f"Rides in a lift: chained one-digit sums without anything to search, 6,000 problems, {LIFT} updates. Students "
        "of two layers with random weights, so that there is something to learn in every stage of the curriculum. KD "
        "is still learning then, so how fast the methods learn counts."
    )


def _add_larger_student(c: ConfigDict) -> None:
    """Is the gain smaller for a smaller student?"""
    c.tasks.larger_student = (*c.tasks.few_problems, "student.layers=3")  # else the same
    c.task_methods.larger_student = ("kd", "rtd")  # their difference is what is compared
    c.about.larger_student = "As few_problems, with a student of three layers."  # for the report
    c.smaller_than = {"few_problems": "larger_student"}  # {task of a smaller student: of the larger}


def _add_cups(c: ConfigDict, evaluation: tuple[str, ...]) -> None:
    """Problems of another nature."""
    path = "{cups_teacher}/model"
    budget = ("student.layers=3", "data.train.limit=3000", "total_updates=300")
    data = tuple(f"data.{split}.schema=cups" for split in ("train", "validation", "test"))
    c.tasks.cups = (*evaluation, *data, f"teacher.path={path}", *budget)  # more problems than the others have
    c.about.cups = (
        "A ball under swapped cups: keeping track instead of reckoning, with a teacher of its own; students of three "
        "layers, 3,000 problems to train on, 300 updates. Two layers learned too little to be compared. Where the "
        "ball is follows from the words of a step, so step accuracy, which is that of results, says nothing here."
    )
    parts = ("kd", "rtd", "kd_curriculum", "alignment_only", "coherence_only", "rtd_no_curriculum")
    c.task_methods.cups = parts  # without rtd_no_coherence and rtd_no_alignment
