"""From a recipe to everything a run needs in memory: models, params, chains, mesh, optimizer, step."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.sharding import check_rows, make_mesh, put_batch
from rtd_jax.base.types import Batch, Params
from rtd_jax.data.encoding import chains_fingerprint
from rtd_jax.data.tokenizer_match import compare_tokenizers
from rtd_jax.methods.term import Objective
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.from_hf import resolve
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import OpenModel, load_tokenizer, open_model
from rtd_jax.steps.detector import Detector
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.teacher.reward_head import RewardModel, load_head
from rtd_jax.train.curriculum import Stage, stages
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe, cache_identity
from rtd_jax.train.splits import Chains, load_splits, make_detector
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.student import initial_student, student_config, student_model
from rtd_jax.train.update import TeacherSource, TrainStep, make_train_step


@dataclass(frozen=True)
class Experiment:
    """Everything that stays the same while a run goes on."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    teacher: LlamaModel | None  # None where its outputs are read from a cache, or not at all
    teacher_config: LlamaConfig
    teacher_params: Params  # empty without a teacher
    cache: TeacherCache | None
    reward: RewardModel | None  # None where no reward is learned from
    student: LlamaModel
    objective: Objective
    optimizer: optax.GradientTransformation
    step: TrainStep
    train: Chains
    validation: Chains
    detector: Detector | None  # where a classifier cuts the chains
    stages: tuple[Stage, ...]
    max_boundaries: int  # slots of a chain, the prompt's end included
    fingerprints: dict[str, str]

    def source(self, batch: Batch, states_only: bool = False) -> TeacherSource:
        """The teacher, as a step or an evaluation of this very batch takes it: its params, or its cached outputs.

        Args:
          batch: this process's rows, on the host.
          states_only: leave the predictions out.
        """
        if not (self.objective.reads_teacher or states_only):
            return {}
        if self.cache is None:
            return self.teacher_params
        dtype = self.recipe.teacher.compute_dtype
        return put_batch(self.cache.outputs(batch, states_only=states_only, dtype=dtype), self.mesh)


def prepare(recipe: Recipe, note: Callable[[str], None] = print) -> tuple[Experiment, TrainState]:
    """Everything a run needs, and its initial state. Cheap checks come first, weights last; `note` says what goes on.

    Raises:
      ValueError: anything in the recipe, the data or the checkpoints that cannot work, with the place and the way out.
    """
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh, recipe.micro_batches)
    loaded = open_model(recipe.teacher, mesh, note)
    teacher_dir, teacher_config, tokenizer = loaded.directory, loaded.config, loaded.tokenizer
    student_dir = resolve(recipe.student.path) if recipe.student.init == "pretrained" else None
    of_student = student_config(recipe.student, teacher_config)
    if student_dir is not None:
        for line in compare_tokenizers(tokenizer, load_tokenizer(student_dir), str(teacher_dir), str(student_dir)):
            note(line)
    vocab_size = len(tokenizer)
    for name, config in (("teacher", teacher_config), ("student", of_student)):
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens but the {name}'s embedding only {config.vocab_size} rows; "
                f"give the {name} that belongs to the tokenizer in {teacher_dir}"
            )

    note("reading and tokenising the chains")
    detector = make_detector(recipe, loaded)
    train, validation = load_splits(recipe.data, tokenizer, detector)
    plan = tuple(stages(recipe.curriculum))
    _check_stages(plan, train, validation)
    for split, chains in (("train", train), ("validation", validation)):
        if chains.too_long:
            note(
                f"{split}: {chains.too_long} chains longer than a row of {recipe.data.row_length} tokens were left out"
            )

    cache = None
    if recipe.teacher.cache:
        cache = TeacherCache(Path(recipe.teacher.cache).expanduser(), cache_identity(recipe, loaded))
        note(f"the teacher is read from the cache {recipe.teacher.cache}: its weights are not loaded")
    reward = None
    if recipe.loss.reward_weight:
        check_rows(recipe.reward.rows, mesh, recipe.micro_batches, "reward.prompts_per_update x reward.samples =")
        folder = Path(recipe.reward.model).expanduser()
        reward = load_head(folder, loaded.fingerprint, loaded.tokenizer_fingerprint, recipe.data.text.identity)
    needed = _needs_weights(recipe)
    teacher = loaded.model if needed else None
    student = student_model(recipe.student, of_student, mesh)
    teacher_params = loaded.params if needed else {}
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    objective = recipe.objective(of_student, teacher_config, vocab_size, mesh)
    state = _initial_state(recipe, student, loaded, objective, optimizer)
    step = make_train_step(student, teacher, optimizer, objective, recipe.update, mesh)
    experiment = Experiment(
        recipe=recipe,
        mesh=mesh,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        teacher=teacher,
        teacher_config=teacher_config,
        teacher_params=teacher_params,
        cache=cache,
        reward=reward,
        student=student,
        objective=objective,
        optimizer=optimizer,
        step=step,
        train=train,
        validation=validation,
        detector=detector,
        stages=plan,
        max_boundaries=1 + max(t.depth for chains in (train, validation) for t in chains.traces),
        fingerprints={
            "teacher": loaded.fingerprint,
            "cache": "" if cache is None else cache.fingerprint,
            "reward": "" if reward is None else reward.digest,
            "tokenizer": loaded.tokenizer_fingerprint,
            "data": chains_fingerprint((*train.encoded, *validation.encoded)),
            "student_config": _digest(repr(of_student)),
        },
    )
    return experiment, state


def _needs_weights(recipe: Recipe) -> bool:
    """Whether anything that the recipe does runs the teacher."""
    return not recipe.teacher.cache and bool(
        recipe.loss.teaches()
        or recipe.loss.reward_weight
        or recipe.evaluation.teacher
        or recipe.evaluation.drift_problems
    )


def _check_stages(plan: Sequence[Stage], train: Chains, validation: Chains) -> None:
    for split, chains in (("training", train), ("validation", validation)):
        for stage in plan:
            if not chains.of_stage(stage):
                have = sorted({trace.depth for trace in chains.traces})
                raise ValueError(
                    f"curriculum stage {stage.name} has no {split} chain: the chains have {have} steps. Set "
                    f"curriculum.depths to depths that exist, e.g. {tuple(have[:5])}, or add data"
                )


def _initial_state(
    recipe: Recipe,
    student: LlamaModel,
    teacher: OpenModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    student_key, maps_key, run_key = jax.random.split(jax.random.PRNGKey(recipe.seed), 3)
    widths = (student.config.width, teacher.config.width)

    def assemble(params: Params) -> TrainState:
        return create_state({"student": params, **objective.init_params(maps_key, *widths)}, optimizer, run_key)

    abstract = jax.eval_shape(assemble, student.abstract_params())
    axes = objective.param_axes()
    shardings = state_shardings(abstract, optimizer, teacher.mesh, axes, recipe.optimizer.offload)
    params = initial_student(recipe.student, student, teacher, student_key, shardings.params["student"])
    return jax.jit(assemble, out_shardings=shardings, donate_argnums=0)(params)


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
