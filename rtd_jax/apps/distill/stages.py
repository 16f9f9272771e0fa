"""The curriculum at work: stage after stage, able to stop anywhere and go on with the same bits."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rtd_jax.apps.distill.own_chains import Sampler, make_sampler
from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.distill.report import make_evaluator
from rtd_jax.base.console import Display
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.sharding import host_share, put_batch
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.loader import BatchLoader
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.trace import Trace
from rtd_jax.eval.evaluate import first_of_each_depth
from rtd_jax.train.calibration import make_self_comparison, mean_over
from rtd_jax.train.checkpoints import Checkpoints
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import Stage, StageRecord, ended, record_validation, stage_budget
from rtd_jax.train.loop import Loop
from rtd_jax.train.metrics import MetricsLog, check_finite
from rtd_jax.train.splits import prefixed_chains, row_length_of
from rtd_jax.train.state import TrainState
from rtd_jax.train.update import TeacherSource, make_term_eval


@dataclass
class Run:
    """What changes while a run goes on, and what a checkpoint must bring back."""

    state: TrainState
    records: list[StageRecord] = field(default_factory=list)  # the last one is open while its `ended_by` is None
    iterator: dict[str, Any] | None = None  # data position inside the open stage
    curve: list[dict[str, Any]] = field(default_factory=list)  # accuracy on validation problems, update by update
    seconds_before: float = 0.0  # of training in the processes before this one

    def seconds(self, clock: Clock) -> float:
        """Time that training took so far, calibration, validation and compilation included, midrun evaluations not."""
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


MIDRUN = "midrun evaluations"
# Timer sections excluded from the training time.
NOT_TRAINING = ("loading and tokenising", MIDRUN, "evaluation")


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
    assert experiment.objective.yardstick is not None
    evaluate = make_term_eval(student, experiment.teacher, experiment.objective.yardstick)
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
    """Updates of one stage until its record says why it ended."""
    recipe, record = experiment.recipe, run.records[-1]
    loader = _loader(experiment, stage)
    if run.iterator is not None:
        loader.set_state(run.iterator)
    coefficients, own_chains = experiment.objective.coefficients(), _OwnChains(draw, stage, experiment, sinks)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arguments = experiment.source(batch), put_batch(batch, experiment.mesh), coefficients
        return experiment.step(state, *arguments, *own_chains.next())

    loop = Loop(
        run.state,
        loader,
        step,
        experiment.mesh,
        ("stage", stage.name),
        sinks.log,
        sinks.display,
        lambda update: update % recipe.checkpoint_every == 0 or update % recipe.log_every == 0,
        lambda means, speed: _shown_values(means, speed, record),
    )
    before = loop.update - record.updates  # updates of the run before this stage

    def count(loop: Loop) -> None:
        run.state, record.updates = loop.state, loop.update - before

    def validate_if_due(loop: Loop) -> None:
        if not (experiment.objective.reads_teacher and _validation_is_due(record, recipe.curriculum.validate_every)):
            return
        loop.settle()
        with sinks.clock.span("validation"):
            coherence = validate(loop.state)
        check_finite({"validation coherence": coherence}, loop.update, loop.place)
        record_validation(record, coherence)
        loop.write({"validation/coherence": coherence, "validation/threshold": record.threshold})

    def evaluate_if_due(loop: Loop) -> None:
        if not _evaluation_is_due(recipe.evaluation.every, recipe.total_updates, loop.update, run.curve):
            return
        loop.settle()
        with sinks.clock.span(MIDRUN):
            run.curve.append(_midrun_evaluation(experiment, run, sinks))
        found = run.curve[-1]
        values = {f"validation/{name}": found[name]["all"] for name in ("chain_accuracy", "step_accuracy")}
        loop.write(values | {"perf/train_seconds": found["seconds"]})

    def end(_: Loop) -> str | None:
        record.ended_by = ended(record, stage, recipe.curriculum)
        return record.ended_by

    def save_if_due(loop: Loop) -> None:
        # Saved here, after the validation of the same update, so that a resumed run does not repeat it; and after
        # `settle`, so that a state whose loss is not finite is never saved.
        if record.updates and loop.update % recipe.checkpoint_every == 0:
            loop.settle()
            run.iterator = loop.loader.get_state()
            with sinks.clock.span("checkpoints"):
                sinks.checkpoints.save_rolling(loop.state, run.meta(experiment, sinks))

    loop.run([count, validate_if_due, evaluate_if_due, end, save_if_due, own_chains.draw_if_due])
    run.state = loop.state


class _OwnChains:
    """The student's own chains that updates learn from, drawn anew every so many updates; none without `draw`."""

    def __init__(self, draw: Sampler | None, stage: Stage, experiment: Experiment, sinks: "Sinks"):
        self._draw, self._stage, self._sinks = draw, stage, sinks
        self._refresh = experiment.recipe.reward.updates_per_refresh
        self._drawn: list[Any] = []
        self._used = 0

    def draw_if_due(self, loop: Loop) -> None:
        if self._draw is None or (self._drawn and loop.update % self._refresh):
            return
        loop.settle()
        with self._sinks.clock.span("rollouts"):
            self._drawn, means = self._draw(loop.state, self._stage)
        self._used = 0
        loop.write(means, loop.update + 1)  # of the first update that learns from them

    def next(self) -> tuple[Any, ...]:
        """The chains of the next update, as its last argument; () where there are none."""
        if not self._drawn:
            return ()
        chosen = self._drawn[self._used % len(self._drawn)]
        self._used += 1
        return (chosen,)


def _evaluation_is_due(every: int, total: int, update: int, curve: Sequence[dict[str, Any]]) -> bool:
    """Whether validation problems are to be solved now: every so many updates, after the last, never twice at one."""
    return bool(every and update and (update % every == 0 or update >= total)) and (
        not curve or curve[-1]["update"] < update
    )


def _midrun_evaluation(experiment: Experiment, run: Run, sinks: Sinks) -> dict[str, Any]:
    """Chain and step accuracy of the student, by depth, on validation problems; and when that was."""
    seconds, update = run.seconds(sinks.clock), int(run.state.step)
    problems = first_of_each_depth(experiment.validation.traces, experiment.recipe.evaluation.curve_problems)
    result, _ = make_evaluator(experiment)(experiment.student, run.state.params["student"], problems)
    tables = {name: result[name] for name in ("chain_accuracy", "step_accuracy")}
    means = {name: {depth: row["mean"] for depth, row in table.items()} for name, table in tables.items()}
    return {"update": update, "seconds": round(seconds, 3), **means}


def _coherence(
    experiment: Experiment, evaluate: Callable[..., Mean], batches: Sequence[Batch], state: TrainState
) -> float:
    """The student's coherence loss over the stage's validation chains."""
    return mean_over(partial(evaluate, state.params), (_with_teacher(experiment, batch) for batch in batches))


def _with_teacher(experiment: Experiment, batch: Batch) -> tuple[TeacherSource, Batch]:
    """The teacher, for its boundary states, and the batch it is asked about, on the devices."""
    return experiment.source(batch, states_only=True), put_batch(batch, experiment.mesh)


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
    if experiment.objective.reads_teacher:
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

    assert experiment.objective.yardstick is not None
    measure = make_self_comparison(experiment.teacher, experiment.objective.yardstick)
    both = batches(chains, recipe.data.row_length), batches(prefixed, row_length_of(prefixed))
    return mean_over(measure, (plain + other for plain, other in zip(*both, strict=True)))


def _loader(experiment: Experiment, stage: Stage) -> BatchLoader:
    """The stage's own chains, and a share of the earlier stages'."""
    recipe = experiment.recipe
    own = [experiment.train.encoded[i] for i in experiment.train.of_stage(stage)]
    earlier = [chain for chain in experiment.train.encoded if chain.depth < stage.low]
    replay = recipe.curriculum.replay if earlier else 0.0
    pools = [(own, 1.0 - replay), (earlier, replay)] if replay else [(own, 1.0)]
    return BatchLoader(
        pools,
        rows=recipe.batch_size,
        row_length=recipe.data.row_length,
        chains_per_row=recipe.data.chains_per_row,
        max_boundaries=experiment.max_boundaries,
        seed=recipe.seed * 1000 + stage.index,
        share=host_share(experiment.mesh),
    )


def _validation_is_due(record: StageRecord, every: int) -> bool:
    """Whether to validate now: every so many updates, at the end of the budget, and never twice at one update."""
    if not record.updates or (record.validations and record.validations[-1][0] == record.updates):
        return False
    return record.updates % every == 0 or record.updates >= record.budget


def _shown_values(means: dict[str, float], speed: float, record: StageRecord) -> dict[str, str]:
    names = {"loss": "loss", "distill/kl_div_T1": "KL", "distill/alignment": "align", "distill/coherence": "cohere"}
    shown = {short: f"{means[name]:.4f}" for name, short in names.items() if name in means}
    shown["validation"] = f"{_shown(record.coherence)} / {record.threshold:.4f}"
    return shown | {"tokens/s": f"{speed:,.0f}"}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
