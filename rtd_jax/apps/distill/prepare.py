"""From a recipe to everything that a run needs in memory: models, params, chains, mesh and the update."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.apps.distill.judged_rewards import check_judged
from rtd_jax.base.hub import place_commit, snapshot_commit
from rtd_jax.base.sharding import check_rows, host_share, make_mesh, put_batch
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.data.encoding import EncodedChain, chains_fingerprint
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.sources import is_local, load_traces
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Trace
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, first_of_each_depth
from rtd_jax.eval.judge.judge import RULES
from rtd_jax.eval.ready import check_evaluation
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.methods.maps import TrajectoryTerm
from rtd_jax.methods.own_chains import JUDGE
from rtd_jax.methods.term import Objective
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import OpenModel, open_model
from rtd_jax.steps.detector import Detector
from rtd_jax.steps.select import soft_of
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.teacher.records import key_of
from rtd_jax.teacher.reward_head import RewardModel, load_head
from rtd_jax.train.cache_identity import cache_identity, teacher_fingerprint
from rtd_jax.train.curriculum import Stage, stages
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.preflight import chain_checks, model_checks, settle
from rtd_jax.train.recipe import Recipe, StudentSettings, TeacherSettings
from rtd_jax.train.splits import Chains, encode_split, load_splits, make_detector, make_windows, prefixed_chains
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.student import (
    frozen_fingerprint,
    initial_student,
    start_folder,
    student_config,
    student_model,
)
from rtd_jax.train.update import TeacherSource, TrainStep, make_train_step


@dataclass(frozen=True)
class Experiment:
    """Everything that stays the same during a run."""

    recipe: Recipe
    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    teacher: DecoderModel | None  # None where its outputs are read from a cache, or not at all
    teacher_params: Params  # empty without a teacher
    cache: TeacherCache | None
    reward: RewardModel | None  # None where no reward is learned from, or the judge gives it
    detector: Detector | None  # of steps in the data's chains; None where the schema marks them
    student: DecoderModel
    teacher_config: DecoderConfig  # its sizes, also where its weights are not loaded
    objective: Objective
    optimizer: optax.GradientTransformation
    step: TrainStep
    train: Chains
    validation: Chains
    problems: tuple[Trace, ...]  # of the evaluation at the end, shallow ones first
    stages: tuple[Stage, ...]
    max_boundaries: int  # slots of a chain, the prompt's end included
    fingerprints: dict[str, str]
    origins: dict[str, Any]  # which models and data sets were read, as report.json has it
    kept_S: np.ndarray | None = None  # the teacher's hidden unit that each of a pruned student's was

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary that are not padding."""
        return vocab_size(self.tokenizer)

    @property
    def yardstick(self) -> TrajectoryTerm:
        """The term whose value on validation chains can end a stage."""
        assert isinstance(self.objective.yardstick, TrajectoryTerm)
        return self.objective.yardstick

    @property
    def evaluator(self) -> ChainEvaluator:
        """Evaluates models in the recipe's form of text."""
        return make_evaluator(self.recipe, self.tokenizer, self.mesh)

    def batches(
        self, chains: Sequence[EncodedChain], chains_per_row: int = 1, row_length: int | None = None
    ) -> list[Batch]:
        """The chains in order, in batches of as many rows as a micro-batch has; this process's rows, on the host."""
        rows, length = self.recipe.rows_at_once, row_length or self.recipe.data.row_length
        return fixed_batches(chains, rows, length, chains_per_row, self.max_boundaries, share=host_share(self.mesh))

    def on_devices(self, batch: Batch, states_only: bool = False) -> tuple[TeacherSource, Batch]:
        """The teacher, as an update or an evaluation of this batch takes it, and the batch: (params or outputs, batch).

        Args:
          batch: this process's rows, on the host.
          states_only: read only the boundary states from a cache, and read them whether or not the loss does.
        """
        source: TeacherSource = {}
        if self.objective.reads_teacher or states_only:
            source = self.teacher_params
            if self.cache is not None:
                dtype = self.recipe.teacher.compute_dtype
                source = put_batch(self.cache.outputs(batch, states_only=states_only, dtype=dtype), self.mesh)
        return source, put_batch(batch, self.mesh)


def make_evaluator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mesh: Mesh) -> ChainEvaluator:
    """Evaluates models as the recipe says."""
    return ChainEvaluator(
        tokenizer,
        recipe.data.text,
        DecodingSettings(recipe.evaluation.max_new_tokens, recipe.evaluation.batch_size),
        ScoringSettings(recipe.data.row_length, recipe.rows_at_once),
        mesh,
    )


def prepare(recipe: Recipe, note: Callable[[str], None] = print) -> tuple[Experiment, TrainState]:
    """Everything that a run needs, and its initial state. `note` gets a line of text before each slow part.

    What is quick to check comes first, and weights are loaded last.

    Raises:
      ValueError: anything in the recipe, the data or the models that cannot work, with the place and the way out.
    """
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh, recipe.micro_batches)
    if recipe.own_rows:
        for rows, name in ((recipe.own_rows, "fraction"), (recipe.data_rows, "1 - fraction")):
            if rows:
                check_rows(rows, mesh, recipe.micro_batches, f"batch_size x {name} of on_policy =")
    has_weights = not recipe.is_served or recipe.student.init in ("teacher_layers", "pruned")
    teacher = open_model(recipe.teacher, mesh, note, has_weights=has_weights)
    config = student_config(recipe.student, teacher.config)
    settle(model_checks(recipe, teacher, config, has_teacher_weights=has_weights), note)
    note("reading and tokenising the chains")
    detector = make_detector(recipe, teacher)
    train, validation = load_splits(recipe.data, teacher.tokenizer, detector, make_windows(recipe, teacher))
    problems = _test_problems(recipe, teacher, detector)
    plan = tuple(stages(recipe.curriculum))
    splits, sizes = {"training": train, "validation": validation}, {"teacher": teacher.config, "student": config}
    settle(chain_checks(recipe, plan, splits, sizes, teacher.tokenizer), note)
    _check_drift(recipe, validation)
    cache, reward = None, None
    if recipe.teacher.cache:
        cache = TeacherCache(Path(recipe.teacher.cache).expanduser(), cache_identity(recipe, teacher))
        note(f"the teacher is read from the cache {recipe.teacher.cache}: its weights are not loaded")
    if recipe.loss.reward_weight:
        check_rows(recipe.reward.rows, mesh, recipe.micro_batches, "reward.prompts_per_update x reward.samples =")
        if recipe.reward.by_judge:
            check_judged(train.traces, plan)
        else:
            folder = Path(recipe.reward.model).expanduser()
            reward = load_head(folder, teacher.fingerprint, teacher.tokenizer_fingerprint, recipe.data.text.identity)
    is_run = not recipe.teacher.cache and bool(
        recipe.loss.teaches()
        or reward is not None
        or recipe.evaluation.teacher
        or recipe.evaluation.drift_problems
        or recipe.curriculum.solves_with_teacher
    )
    is_solver = is_run and (recipe.evaluation.teacher or recipe.curriculum.solves_with_teacher)
    models = {"student": config} | ({"teacher": teacher.config} if is_solver else {})
    evaluator, settings = make_evaluator(recipe, teacher.tokenizer, mesh), recipe.evaluation
    check_evaluation(evaluator, problems, models, "evaluation.")
    for count in (settings.curve_problems if settings.every else 0, settings.drift_problems):
        if count:  # validation problems are solved as well
            check_evaluation(evaluator, first_of_each_depth(validation.traces, count), models, "evaluation.")
    if recipe.curriculum.measures == "solved":
        check_evaluation(evaluator, _stage_problems(recipe, plan, validation), models, "evaluation.")
    objective = recipe.objective(config, teacher.config, teacher.vocab_size, mesh)
    if cache is not None and objective.reads_teacher and jax.process_count() == 1:  # others may each have a part
        _check_cached(recipe, teacher, cache, train, validation)
    student = student_model(recipe.student, config, mesh)
    model, params = (teacher.model, teacher.params) if is_run else (None, {})
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    experiment = Experiment(
        recipe=recipe,
        mesh=mesh,
        tokenizer=teacher.tokenizer,
        teacher=model,
        teacher_params=params,
        cache=cache,
        reward=reward,
        detector=detector,
        student=student,
        teacher_config=teacher.config,
        objective=objective,
        optimizer=optimizer,
        step=make_train_step(student, model, optimizer, objective, recipe.update, mesh),
        train=train,
        validation=validation,
        problems=tuple(problems),
        stages=plan,
        max_boundaries=max(
            max(1 + trace.depth, len(chain.boundaries))  # drift is measured by steps, whatever the loss is
            for split in (train, validation)
            for trace, chain in zip(split.traces, split.encoded, strict=True)
        ),
        fingerprints={
            "teacher": teacher_fingerprint(recipe, teacher),
            "cache": "" if cache is None else cache.fingerprint,
            "reward": _reward_fingerprint(recipe, reward),
            "tokenizer": teacher.tokenizer_fingerprint,
            "data": chains_fingerprint((*train.encoded, *validation.encoded)),
            "student_config": hashlib.sha256(config.identity.encode()).hexdigest(),
        },
        origins=_origins(recipe, teacher, {"train": train.traces, "validation": validation.traces, "test": problems}),
    )
    state, kept_S = _initial_state(recipe, student, teacher, objective, optimizer, train.encoded)
    fingerprints = experiment.fingerprints | {"frozen_base": frozen_fingerprint(state.params["student"])}
    return replace(experiment, kept_S=kept_S, fingerprints=fingerprints), state


def _origins(recipe: Recipe, teacher: OpenModel, splits: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """The commit that every model and data set of the hub was read at; those that are local have none."""
    models: dict[str, tuple[TeacherSettings | StudentSettings, Path]] = {"teacher": (recipe.teacher, teacher.directory)}
    if recipe.student.init == "pretrained":
        models["student"] = (recipe.student, start_folder(recipe.student))
    origins: dict[str, Any] = {
        role: {
            "path": settings.path,
            "revision": settings.revision,
            "is_local": Path(settings.path).expanduser().is_dir(),
            "commit": snapshot_commit(directory),
        }
        for role, (settings, directory) in models.items()
    }
    origins["data"] = {}
    for split, traces in splits.items():
        source = getattr(recipe.data, split) or recipe.data.train  # validation may be a part of it
        origins["data"][split] = {
            "location": source.location,
            "revision": source.revision,
            "is_local": not source.location or is_local(source.location),
            "commit": place_commit(traces[0].source) if traces else "",
        }
    return origins


def _reward_fingerprint(recipe: Recipe, reward: RewardModel | None) -> str:
    """What a resumed run has to have its rewards from; "" where it has none."""
    if reward is not None:
        return reward.digest
    return f"{JUDGE}-{RULES}" if recipe.loss.reward_weight else ""


def _test_problems(recipe: Recipe, teacher: OpenModel, detector: Detector | None) -> list[Trace]:
    """The problems of the evaluation at the end: loaded at the start, so that what is wrong with them is found there.

    Raises:
      ValueError: they cannot be read or encoded.
    """
    try:
        test = load_traces(recipe.data.test)
        if recipe.data.test.schema == "prose" and detector is not None:  # others have steps of their own
            test = detector.cut(test)
        fitting = encode_split(test, recipe.data, teacher.tokenizer).traces
    except ValueError as error:
        raise ValueError(f"data.test: {error}") from error
    return first_of_each_depth(fitting, recipe.evaluation.problems_per_depth)


def _stage_problems(recipe: Recipe, plan: Sequence[Stage], validation: Chains) -> list[Trace]:
    """The validation problems of all stages. Raises ValueError for one without an answer."""
    count = recipe.curriculum.validation_chains
    problems = [trace for stage in plan for trace in validation.of_stage(stage, count).traces]
    for trace in problems:
        if not trace.answer:
            raise ValueError(
                f"{trace.source or 'a validation problem'} has no answer, but curriculum.ends_by is 'solved': whether "
                "its chain is right could not be told. Leave such rows out of data.validation, or set "
                "curriculum.ends_by='share'"
            )
    return problems


def _check_cached(recipe: Recipe, teacher: OpenModel, cache: TeacherCache, train: Chains, validation: Chains) -> None:
    """Raises ValueError where the cache lacks a chain that the run will read: days later, perhaps."""
    chains = [*train.encoded, *validation.encoded]
    for stage in stages(recipe.curriculum) if recipe.calibrates else ():
        held_out = validation.of_stage(stage, recipe.curriculum.validation_chains)
        chains += prefixed_chains(recipe, teacher.tokenizer, train.traces, held_out)
    missing = [x for x in chains if key_of(x) not in cache]
    if missing:
        turns = ""
        if soft_of(recipe.data.segmentation):
            turns = f"; data.steps_cache {recipe.data.steps_cache!r} is not the one with the turns it was cut by"
        raise ValueError(
            f"teacher.cache {recipe.teacher.cache} has no record of {len(missing)} of {len(chains)} chains, the first "
            f"of {missing[0].source}: text, template, segmentation or curriculum settings are not those it was written "
            f"for, or it was not finished{turns}; run launch/cache_teacher.py with this recipe to add what is missing"
        )


def _check_drift(recipe: Recipe, validation: Chains) -> None:
    """Raises ValueError where drift is to be measured, and there are too few validation chains for it."""
    if not recipe.evaluation.drift_problems:
        return
    # A map is fitted on one half of the chains and used on the other.
    count = len(first_of_each_depth(validation.traces, recipe.evaluation.drift_problems))
    if count < 2:
        raise ValueError(
            f"evaluation.drift_problems is {recipe.evaluation.drift_problems}, but drift is measured on two validation "
            f"chains at least, and there is {count}; set it to 0, or add data"
        )


def _initial_state(
    recipe: Recipe,
    student: DecoderModel,
    teacher: OpenModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    chains: Sequence[EncodedChain],
) -> tuple[TrainState, np.ndarray | None]:
    """The state that training starts from, and `Experiment.kept_S`."""
    student_key, maps_key, run_key = jax.random.split(jax.random.PRNGKey(recipe.seed), 3)
    widths = (student.config.width, teacher.config.width)

    def assemble(params: Params, kept_S: Array | None) -> TrainState:
        return create_state({"student": params, **objective.init_params(maps_key, *widths, kept_S)}, optimizer, run_key)

    abstract = jax.eval_shape(assemble, student.abstract_params(), None)
    axes = objective.param_axes()
    shardings = state_shardings(abstract, optimizer, teacher.mesh, axes, recipe.optimizer.offload)
    own = shardings.params["student"]
    params, kept_S = initial_student(recipe.student, student, teacher, student_key, own, chains)
    return jax.jit(assemble, out_shardings=shardings, donate_argnums=0)(params, kept_S), kept_S
