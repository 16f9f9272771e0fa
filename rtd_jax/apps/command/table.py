"""What can be started, and the settings of each."""

import importlib
from dataclasses import dataclass
from typing import Any

from rtd_jax.base.settings import check_ranges


@dataclass(frozen=True)
class Command:
    """One thing that a user starts. Settings and functions are named as "module:name"."""

    about: str
    main: str  # called with the recipe and the work directory; with the recipe and `flags`; or with `flags` alone
    recipe: str = ""  # settings that --config gives
    flags: str = ""  # settings that are flags themselves, one for each field
    example: str = ""  # flags of an example
    reads_all: bool = True  # whether it reads the whole recipe, so that overrides without effect are warned of
    resumes: bool = False  # whether the same command, run again, goes on where it was stopped
    saves: bool = False  # whether a signal has it save what it has
    statuses: str = ""  # exit statuses of its own, in words


@dataclass(frozen=True)
class RunFlags:
    """The flags that every command with a recipe has beside --config."""

    print_config: bool = False  # Show every key with its value, origin and meaning, and end.
    workdir: str | None = None  # Folder of what the run writes; default runs/<config>.
    distributed: bool = False  # One of several processes; JAX finds the others (SLURM, TPU pods, Open MPI, Kubernetes).
    coordinator: str | None = None  # host:port of process 0, where JAX cannot find the cluster.
    processes: int | None = None  # With --coordinator: how many processes there are.
    process: int | None = None  # With --coordinator: which of them this is, from 0.

    def __post_init__(self) -> None:
        check_ranges(self, processes="[1, 1e6]", process="[0, 1e6]")


COMMANDS = {
    "train": Command(
        "Distills a student. Run it again to resume.",
        "rtd_jax.apps.distill.run:train",
        recipe="rtd_jax.train.recipe:Recipe",
        example="--config=configs/rtd_tiny.py --workdir=runs/no_coherence --config.loss.coherence_weight=0.0",
        resumes=True,
        saves=True,
    ),
    "check": Command(
        "Says in seconds what is wrong with a recipe's models and data, and shows chains as the student will see them.",
        "rtd_jax.apps.check.check:check",
        recipe="rtd_jax.train.recipe:Recipe",
        flags="rtd_jax.apps.check.check:CheckSettings",
        example="--config=configs/rtd_tiny.py --html=runs/check.html",
        statuses="1 where a check fails",
    ),
    "ensemble": Command(
        "Distills several students that differ in their seed alone, as one program. Run it again to resume.",
        "rtd_jax.apps.distill.ensemble:train_ensemble",
        recipe="rtd_jax.apps.distill.ensemble_recipe:EnsembleRecipe",
        example='--config=configs/rtd_tiny.py --config.curriculum.enabled=False --config.seeds="(0,1,2,3)"',
        resumes=True,
        saves=True,
    ),
    "pretrain": Command(
        "Trains a tiny Llama from scratch. Run it again to resume.",
        "rtd_jax.apps.pretrain:pretrain",
        recipe="rtd_jax.apps.pretrain:PretrainRecipe",
        example="--config=configs/pretrain_tiny.py --config.optimizer.learning_rate=1e-3",
        resumes=True,
        saves=True,
    ),
    "cache_teacher": Command(
        "Runs the teacher once over a recipe's chains, or asks a server that does, and keeps its outputs, from which "
        "`train` then learns without loading the teacher. Run it again to continue.",
        "rtd_jax.apps.cache:cache_teacher",
        recipe="rtd_jax.train.recipe:Recipe",
        example="--config=configs/rtd_tiny.py --config.teacher.cache=runs/cache",
        reads_all=False,
        resumes=True,
    ),
    "traces": Command(
        "Has a teacher write chains of thought and keeps those whose answer is right. Run it again to continue.",
        "rtd_jax.apps.traces.traces:write_traces",
        recipe="rtd_jax.apps.traces.traces:TracesRecipe",
        example="--config=configs/traces_llama3_70b.py --config.openai.base_url=http://gpu-host:8000/v1",
        resumes=True,
    ),
    "boundaries": Command(
        "Fits a step-boundary classifier to a teacher and measures it: precision, recall and F1 against baselines.",
        "rtd_jax.apps.boundaries:boundaries",
        recipe="rtd_jax.apps.boundaries:BoundaryRecipe",
        example="--config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k",
    ),
    "segment": Command(
        "Cuts texts into reasoning steps: any JSONL of texts in, stepwise JSONL (`prompt`, `completions`) out.",
        "rtd_jax.apps.segment:segment",
        flags="rtd_jax.apps.segment:SegmentSettings",
        example="--teacher=MODEL --classifier=runs/boundaries_smollm2/classifier --data=texts.jsonl",
    ),
    "evaluate": Command(
        "Measures chain, step and answer accuracy by reasoning depth, of any model or of texts made elsewhere.",
        "rtd_jax.apps.evaluate:evaluate",
        flags="rtd_jax.apps.evaluate:EvaluateSettings",
        example="--model=runs/rtd_tiny,rtd_jax/bundled/tiny_teacher --tasks=synthetic --limit=120",
    ),
    "judge": Command(
        "Says how well a judge of steps finds the first wrong one, on solutions that people labelled. Run it again to "
        "continue.",
        "rtd_jax.apps.judge:judge",
        flags="rtd_jax.apps.judge:JudgeSettings",
        example="--data=gsm8k.jsonl --references=/data --out=runs/judge",
        resumes=True,
    ),
    "diagnose": Command(
        "Does a student lose its teacher's trajectory, and is that why it fails?",
        "rtd_jax.apps.diagnose.diagnose:diagnose",
        flags="rtd_jax.apps.diagnose.diagnose:DiagnoseSettings",
        example="--teacher=rtd_jax/bundled/tiny_teacher --student=runs/rtd_tiny --data=synthetic",
    ),
    "compress": Command(
        "Makes a student smaller, by rounding its weights to a few bits or by pruning, and says what that costs.",
        "rtd_jax.apps.compress.compress:compress",
        flags="rtd_jax.apps.compress.compress:CompressSettings",
        example="--student=runs/rtd_tiny --scheme=int4 --group_size=32 --out=runs/rtd_tiny_int4",
    ),
    "export": Command(
        "Makes a folder to share of a finished run's student, with a model card and the teacher's licence, and uploads "
        "it to the Hugging Face hub where that is asked for.",
        "rtd_jax.apps.export.export:export",
        flags="rtd_jax.apps.export.export:ExportSettings",
        example="--run=runs/rtd_tiny --out=runs/rtd_tiny_export",
    ),
    "reward_model": Command(
        "Trains a process reward model on labelled steps.",
        "rtd_jax.apps.reward_model:train_reward_model",
        recipe="rtd_jax.apps.reward_model:RewardModelRecipe",
        example="--config=configs/reward_tiny.py --config.hidden=0",
    ),
    "plan": Command(
        "Says what a recipe needs on hardware that is not here. Nothing is allocated; the real compilers are asked.",
        "rtd_jax.apps.plan.plan:show_plan",
        recipe="rtd_jax.train.recipe:Recipe",
        flags="rtd_jax.apps.plan.plan:PlanSettings",
        example="--config=configs/rtd_8b.py --target=a100-80gb:8 --config.micro_batches=2",
        reads_all=False,
    ),
    "study": Command(
        "Compares methods over seeds. Run it again to continue.",
        "rtd_jax.apps.study.study:study",
        recipe="rtd_jax.apps.study.recipe:StudyRecipe",
        example="--config=configs/study_tiny.py:smoke --config.parallel=1",
        resumes=True,
    ),
}


def imported(place: str) -> Any:
    """Imports what "module:name" stands for."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)
