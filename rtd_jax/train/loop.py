"""The loop: stage after stage, update after update, able to stop anywhere and go on with the same bits."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rtd_jax.apps.distill.report import evaluate_in, first_of_each_depth
from rtd_jax.base.console import Display
from rtd_jax.base.means import Mean
from rtd_jax.base.sharding import host_share, put_batch
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.loader import BatchLoader, make_loader
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.trace import Trace
from rtd_jax.losses.objective import Metrics
from rtd_jax.train.calibration import make_self_coherence, mean_over
from rtd_jax.train.checkpoints import Checkpoints
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import Stage, StageRecord, ended, record_validation, stage_budget
from rtd_jax.train.experiment import Experiment
from rtd_jax.train.metrics import MetricsLog, Window, check_finite
from rtd_jax.train.rollouts import Sampler, make_sampler
from rtd_jax.train.splits import prefixed_chains, row_length_of
from rtd_jax.train.state import TrainState
from rtd_jax.train.update import TeacherSource, make_coherence_eval


@dataclass
class Run:
    """What changes while a run goes on, and what a checkpoint must bring back."""

    state: TrainState
    records: list[StageRecord] = field(default_factory=list)  # the last one is open while its `ended_by` is None
    iterator: dict[str, Any] | None = None  # data position inside the open stage
    curve: list[dict[str, Any]] = field(default_factory=list)  # accuracy on validation problems, update by update
    seconds_before: float = 0.0  # of training in the processes before this one

    def seconds(self, clock: Clock) -> float:
        """Time that training took so far, calibration, validation and compilation included, looks at problems not."""
        return self.seconds_before + clock.total(without=NOT_TRAINING)

    def meta(self, experiment: Experiment, sinks: "Sinks") -> dict[str, Any]:
        return {
            "records": [record.to_dict() for record in self.records],
            "iterator": json.dumps(self.iterator),  # as text: orbax would turn its integers into arrays
            "curve": json.dumps(self.curve),
            "seconds": self.seconds(sinks.clock),
            "settings": sinks.settings,
            "fingerprints": experiment.fingerprints,
        }

    @classmethod
    def from_meta(cls, state: TrainState, meta: dict[str, Any]) -> "Run":
        records = [StageRecord.from_dict(record) for record in meta["records"]]
        curve, seconds = json.loads(meta.get("curve", "[]")), float(meta.get("seconds", 0.0))
        return cls(state, records, json.loads(meta["iterator"]), curve, seconds)


# Spans of the clock that are no part of what training costs.
NOT_TRAINING = ("loading and tokenising", "looks", "evaluation")


@dataclass(frozen=True)
class Sinks:
    """Where a run's results go while it trains."""

    checkpoints: Checkpoints
    log: MetricsLog
    display: Display
    settings: dict[str, Any]  # of the recipe; written into every checkpoint
    clock: Clock


def run_stages(experiment: Experiment, run: Run, sinks: Sinks) -> None:
    """Trains every stage that is not finished, from where `run` stands. Changes `run` in place.

    Raises:
      ValueError: a loss or gradient became non-finite, or a checkpoint cannot be written; earlier ones are intact.
    """
    student = experiment.student
    draw = make_sampler(experiment) if experiment.reward is not None else None
    settings = experiment.recipe.step(student.config.layers, experiment.teacher_config.layers)
    evaluate = make_coherence_eval(student, experiment.teacher, settings)
    finished = sum(record.ended_by is not None for record in run.records)
    for stage in experiment.stages[finished:]:
        with sinks.clock.span("calibration"):
            validation = _validation(experiment, stage)
            if len(run.records) == finished:
                run.records.append(_open_record(experiment, run, stage, validation))
        record = run.records[-1]
        sinks.display.note(
            f"stage {stage.name}: {len(experiment.train.of_stage(stage))} chains, budget {record.budget} updates, "
            f"threshold {record.threshold:.4f} (teacher against itself {record.teacher_coherence:.4f})"
        )
        with sinks.clock.span("updates"):
            validate = partial(_coherence, experiment, evaluate, validation.batches)
            _run_stage(experiment, run, stage, validate, draw, sinks)
        finished += 1
        run.iterator = None
        with sinks.clock.span("checkpoints"):
            sinks.checkpoints.save_stage(finished, run.state, run.meta(experiment, sinks))
        sinks.display.note(
            f"stage {stage.name} ended by {record.ended_by} after {record.updates} updates: "
            f"coherence {_shown(record.coherence)}, threshold {record.threshold:.4f}"
        )


def _run_stage(
    experiment: Experiment,
    run: Run,
    stage: Stage,
    validate: Callable[[TrainState], float],
    draw: Sampler | None,
    sinks: Sinks,
) -> None:
    recipe, record = experiment.recipe, run.records[-1]
    weights = recipe.loss.weights()
    loader = _loader(experiment, stage)
    if run.iterator is not None:
        loader.set_state(run.iterator)
    window, pending = Window(), _Pending(stage)
    _, hosts = host_share(experiment.mesh)
    update = int(run.state.step)
    drawn, drawn_at = None, update

    while True:
        if recipe.loss.reads_teacher and _due(record, recipe.curriculum.validate_every):
            pending.settle(window)
            with sinks.clock.span("validation"):
                coherence = validate(run.state)
            check_finite({"validation coherence": coherence}, update, f"stage {stage.name}")
            record_validation(record, coherence)
            values = {"validation/coherence": coherence, "validation/threshold": record.threshold}
            sinks.log.write(update, values, stage=stage.name)
        if _look_due(recipe.evaluation.every, recipe.total_updates, update, run.curve):
            pending.settle(window)
            with sinks.clock.span("looks"):
                run.curve.append(_look(experiment, run, sinks))
            values = {f"validation/{name}": run.curve[-1][name]["all"] for name in ("chain_accuracy", "step_accuracy")}
            sinks.log.write(update, values | {"perf/train_seconds": run.curve[-1]["seconds"]}, stage=stage.name)
        record.ended_by = ended(record, stage, recipe.curriculum)
        if record.ended_by is not None:
            pending.settle(window)
            _log_window(window, sinks.log, update, stage)
            return
        # Saved here, after the validation of the same update, so that a resumed run does not repeat it; and after
        # `settle`, so that a state whose loss is not finite is never saved.
        if record.updates and update % recipe.checkpoint_every == 0:
            run.iterator = loader.get_state()
            with sinks.clock.span("checkpoints"):
                sinks.checkpoints.save_rolling(run.state, run.meta(experiment, sinks))

        if draw is not None and (drawn is None or update % recipe.reward.updates_per_refresh == 0):
            pending.settle(window)
            with sinks.clock.span("rollouts"):
                drawn, means = draw(run.state, stage)
            drawn_at = update
            sinks.log.write(update + 1, means, stage=stage.name)  # of the first update that learns from them
        own = () if drawn is None else (drawn[(update - drawn_at) % len(drawn)],)

        batch = next(loader)
        window.add_tokens(int(np.count_nonzero(batch.chain_ids_BL)) * hosts)
        # Dispatched before the metrics of the update before it are fetched, so the device never waits for Python.
        run.state, metrics = experiment.step(
            run.state, experiment.source(batch), put_batch(batch, experiment.mesh), weights, *own
        )
        update += 1
        record.updates += 1
        pending.settle(window)
        pending.hold(update, metrics)
        if update % recipe.checkpoint_every == 0 or update % recipe.log_every == 0:
            pending.settle(window)
            means, speed = _log_window(window, sinks.log, update, stage)
            sinks.display.update(update, stage.name, _values(means, speed, record))


def _look_due(every: int, total: int, update: int, curve: Sequence[dict[str, Any]]) -> bool:
    """Whether validation problems are to be solved now: every so many updates, after the last, never twice at one."""
    return bool(every and update and (update % every == 0 or update >= total)) and (
        not curve or curve[-1]["update"] < update
    )


def _look(experiment: Experiment, run: Run, sinks: Sinks) -> dict[str, Any]:
    """Chain and step accuracy of the student, by depth, on validation problems; and when that was."""
    seconds, update = run.seconds(sinks.clock), int(run.state.step)
    problems = first_of_each_depth(experiment.validation.traces, experiment.recipe.evaluation.curve_problems)
    result, _ = evaluate_in(experiment, experiment.student, run.state.params["student"], problems)
    tables = {"chain_accuracy": result.chain_accuracy, "step_accuracy": result.step_accuracy}
    means = {name: {depth: found.value for depth, found in table.items()} for name, table in tables.items()}
    return {"update": update, "seconds": round(seconds, 3), **means}


def _coherence(
    experiment: Experiment, evaluate: Callable[..., Mean], batches: Sequence[Batch], state: TrainState
) -> float:
    """The student's coherence loss over the stage's validation chains."""
    return mean_over(partial(evaluate, state.params), (_with_teacher(experiment, batch) for batch in batches))


def _with_teacher(experiment: Experiment, batch: Batch) -> tuple[TeacherSource, Batch]:
    """The teacher, for its boundary states, and the batch it is asked about, on the devices."""
    return experiment.source(batch, states_only=True), put_batch(batch, experiment.mesh)


class _Pending:
    """The newest update's metrics, fetched one update late so that the device has the next one to work on."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._held: tuple[int, Metrics] | None = None

    def hold(self, update: int, metrics: Metrics) -> None:
        self._held = (update, metrics)

    def settle(self, window: Window) -> None:
        """Fetches what is held, adds it to the window, and stops the run if it is not finite."""
        if self._held is not None:
            (update, metrics), self._held = self._held, None
            check_finite(window.add(metrics), update, f"stage {self._stage.name}")


@dataclass(frozen=True)
class _Validation:
    """The stage's validation chains, and the traces they come from."""

    traces: tuple[Trace, ...]
    chains: tuple[EncodedChain, ...]
    batches: tuple[Batch, ...]


def _validation(experiment: Experiment, stage: Stage) -> _Validation:
    recipe, split = experiment.recipe, experiment.validation
    chosen = split.of_stage(stage)[: recipe.curriculum.validation_chains]
    chains = tuple(split.encoded[i] for i in chosen)
    batches = fixed_batches(
        chains,
        rows=recipe.rows_at_once,
        row_length=recipe.data.row_length,
        chains_per_row=recipe.data.chains_per_row,
        max_boundaries=experiment.max_boundaries,
        share=host_share(experiment.mesh),
    )
    return _Validation(tuple(split.traces[i] for i in chosen), chains, tuple(batches))


def _open_record(experiment: Experiment, run: Run, stage: Stage, validation: _Validation) -> StageRecord:
    recipe = experiment.recipe
    own = 0.0
    if recipe.loss.reads_teacher:
        own = teacher_self_coherence(experiment, validation.traces, validation.chains)
    return StageRecord(
        depth=stage.name,
        threshold=recipe.curriculum.threshold_factor * own,
        teacher_coherence=own,
        budget=stage_budget(recipe.total_updates, int(run.state.step), stage, len(experiment.stages)),
    )


def teacher_self_coherence(experiment: Experiment, traces: Sequence[Trace], chains: Sequence[EncodedChain]) -> float:
    """The teacher's coherence loss against itself on the same chains behind solved examples from the training split."""
    recipe = experiment.recipe
    prefixed = prefixed_chains(recipe, experiment.tokenizer, experiment.train.traces, traces)

    def batches(chains: Sequence[EncodedChain], row_length: int) -> list[tuple]:
        # One chain a row, so that both readings hold the same chain in the same place.
        return [
            _with_teacher(experiment, batch)
            for batch in fixed_batches(
                chains,
                rows=recipe.rows_at_once,
                row_length=row_length,
                chains_per_row=1,
                max_boundaries=experiment.max_boundaries,
                share=host_share(experiment.mesh),
            )
        ]

    measure = make_self_coherence(
        experiment.teacher,
        hidden_layer=recipe.loss.hidden_layer,
        anchor_prompt=recipe.loss.anchor_prompt,
        transition_form=recipe.loss.transition_form,
    )
    both = batches(chains, recipe.data.row_length), batches(prefixed, row_length_of(prefixed))
    return mean_over(measure, (plain + other for plain, other in zip(*both, strict=True)))


def _loader(experiment: Experiment, stage: Stage) -> BatchLoader:
    """The stage's own chains, and a share of the earlier stages'."""
    recipe = experiment.recipe
    own = [experiment.train.encoded[i] for i in experiment.train.of_stage(stage)]
    earlier = [chain for chain in experiment.train.encoded if chain.depth < stage.low]
    replay = recipe.curriculum.replay if earlier else 0.0
    pools = [(own, 1.0 - replay), (earlier, replay)] if replay else [(own, 1.0)]
    return make_loader(
        pools,
        rows=recipe.batch_size,
        row_length=recipe.data.row_length,
        chains_per_row=recipe.data.chains_per_row,
        max_boundaries=experiment.max_boundaries,
        seed=recipe.seed * 1000 + stage.index,
        share=host_share(experiment.mesh),
    )


def _due(record: StageRecord, every: int) -> bool:
    """Whether to validate now: every so many updates, at the end of the budget, and never twice at one update."""
    if not record.updates or (record.validations and record.validations[-1][0] == record.updates):
        return False
    return record.updates % every == 0 or record.updates >= record.budget


def _log_window(window: Window, log: MetricsLog, update: int, stage: Stage) -> tuple[dict[str, float], float]:
    means, speed = window.flush()
    if means:
        log.write(update, {**means, "perf/tokens_per_sec": speed}, stage=stage.name)
    return means, speed


def _values(means: dict[str, float], speed: float, record: StageRecord) -> dict[str, str]:
    names = {"loss": "loss", "distill/kl_div_T1": "KL", "distill/alignment": "align", "distill/coherence": "cohere"}
    shown = {short: f"{means[name]:.4f}" for name, short in names.items() if name in means}
    shown["validation"] = f"{_shown(record.coherence)} / {record.threshold:.4f}"
    return shown | {"tokens/s": f"{speed:,.0f}"}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
