"""The curriculum at work: stage after stage, able to stop after any update and go on with the same bits."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rtd_jax.apps.distill.on_policy import make_on_policy_sampler
from rtd_jax.apps.distill.own_chains import Sampler
from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.distill.step_rewards import make_reward_sampler
from rtd_jax.base import signals
from rtd_jax.base.console import Display
from rtd_jax.base.means import Metrics
from rtd_jax.base.sharding import host_share
from rtd_jax.base.types import Batch
from rtd_jax.data.loader import BatchLoader, NoRows
from rtd_jax.eval.evaluate import first_of_each_depth
from rtd_jax.train.calibration import make_self_comparison, mean_over
from rtd_jax.train.checkpoints import Checkpoints
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import StageRecord, reason_to_end, record_validation, stage_budget
from rtd_jax.train.loop import Loop, stopped_after
from rtd_jax.train.metrics import MetricsLog, check_finite
from rtd_jax.train.splits import Chains, prefixed_chains, row_length_of
from rtd_jax.train.state import TrainState
from rtd_jax.train.update import TeacherSource, make_term_eval

MIDRUN = "looks"  # as report.json has always called the evaluations on the way
# Timer sections excluded from the training time.
NOT_TRAINING = ("loading and tokenising", MIDRUN, "evaluation")
# Metrics that the display shows, and their short names there.
SHOWN = {"loss": "loss", "distill/kl_div_T1": "KL", "distill/alignment": "align", "distill/coherence": "cohere"}
SHOWN |= {"own/kl_div_T1": "own KL", "own/alignment": "own align", "own/coherence": "own cohere"}
DRAWING, UPDATES = "rollouts", "updates"  # sections of the clock


@dataclass
class Run:
    """What changes during a run, and what a checkpoint must bring back."""

    state: TrainState
    clock: Clock
    records: list[StageRecord] = field(default_factory=list)  # the last one is open while its `ended_by` is None
    iterator: dict[str, Any] | None = None  # data position inside the open stage
    line: dict[str, Any] | None = None  # what the open stage measured since its last line of the log
    curve: list[dict[str, Any]] = field(default_factory=list)  # a row for each midrun evaluation
    seconds_before: float = 0.0  # of training in the processes before this one
    data_tokens: int = 0  # predicted tokens that were trained on: of the data ..
    own_tokens: int = 0  # .. and of chains that the student drew for its teacher to read

    @property
    def seconds(self) -> float:
        """Training time so far, with calibration, validation and compilation, without midrun evaluations."""
        return self.seconds_before + self.clock.total(without=NOT_TRAINING)

    def meta(self, experiment: Experiment) -> dict[str, Any]:
        """What a checkpoint holds besides the state."""
        return {
            "records": [asdict(record) for record in self.records],
            "iterator": json.dumps(self.iterator),  # as text: orbax would turn its integers into arrays
            "line": json.dumps(self.line),
            "curve": json.dumps(self.curve),
            "seconds": self.seconds,
            "tokens": [self.data_tokens, self.own_tokens],
            "settings": asdict(experiment.recipe),
            "fingerprints": experiment.fingerprints,
        }

    @classmethod
    def from_meta(cls, state: TrainState, clock: Clock, meta: dict[str, Any]) -> "Run":
        records = [StageRecord.from_dict(record) for record in meta["records"]]
        curve, seconds = json.loads(meta.get("curve", "[]")), float(meta.get("seconds", 0.0))
        line = json.loads(meta.get("line", "null"))
        tokens = (int(x) for x in meta.get("tokens", (0, 0)))
        return cls(state, clock, records, json.loads(meta["iterator"]), line, curve, seconds, *tokens)


class Trainer:
    """Trains the stages of a run that are not finished, from where the run stands; it changes `run`."""

    def __init__(
        self, experiment: Experiment, run: Run, checkpoints: Checkpoints, log: MetricsLog, display: Display
    ) -> None:
        self._experiment, self._recipe, self._run = experiment, experiment.recipe, run
        self._checkpoints, self._log, self._display = checkpoints, log, display
        self._evaluate = None
        if experiment.objective.validates:
            self._evaluate = make_term_eval(experiment.student, experiment.teacher, experiment.yardstick)
        self._draw = _sampler(experiment)
        # Of the stage that is trained:
        self._stage = experiment.stages[0]
        self._validation: list[Batch] = []
        self._own_chains: Iterator[tuple[Any, tuple[int, int]]] | None = None  # and tokens; one update after the other
        self._loop: Loop | None = None

    def train_stages(self) -> None:
        """Trains stage after stage.

        Raises:
          ValueError: a loss or gradient became non-finite, or a checkpoint cannot be written; earlier ones are intact.
          Stopped: a signal asked for it, inside `signals.finishing`; the state was saved.
        """
        experiment, run = self._experiment, self._run
        finished = sum(record.ended_by is not None for record in run.records)
        for number, stage in enumerate(experiment.stages[finished:], start=finished + 1):
            self._stage = stage
            with run.clock.span("calibration"):
                held_out = experiment.validation.of_stage(stage, self._recipe.curriculum.validation_chains)
                self._validation = experiment.batches(held_out.encoded, self._recipe.data.chains_per_row)
                if len(run.records) < number:
                    run.records.append(self._open_record(held_out))
            record = run.records[-1]
            self._display.note(
                f"stage {stage.name}: {len(experiment.train.of_stage(stage).traces)} chains, budget {record.budget} "
                f"updates, threshold {record.threshold:.4f} (teacher against itself {record.teacher_coherence:.4f})"
            )
            with run.clock.span(UPDATES):
                self._train_stage()
            with run.clock.span("checkpoints"):
                self._checkpoints.save_stage(number, run.state, run.meta(experiment))
            self._display.note(
                f"stage {stage.name} ended by {record.ended_by} after {record.updates} updates: coherence "
                f"{_number(record.coherence)}, threshold {record.threshold:.4f}"
            )
            if signals.asked():
                raise stopped_after(int(run.state.step))

    def _train_stage(self) -> None:
        run, loader = self._run, self._loader()
        if run.iterator is not None:
            loader.set_state(run.iterator)
        self._own_chains = None
        self._loop = loop = Loop(
            run.state,
            loader,
            self._update,
            self._experiment.mesh,
            ("stage", self._stage.name),
            self._log,
            self._display,
            (self._recipe.log_every, self._recipe.checkpoint_every),
            self._shown,
            run.line,
        )
        loop.run(self._before_update)
        run.state, run.iterator, run.line = loop.state, None, None

    def _update(self, state: TrainState, batch: Batch | None) -> tuple[TrainState, Metrics]:
        source: TeacherSource = self._experiment.teacher_params
        placed: Batch | None = None
        own: tuple[Any, ...] = ()
        if self._own_chains is not None:
            chains, (tokens, predicted) = next(self._own_chains)
            own = (chains,)
            self._run.own_tokens += predicted
            assert self._loop is not None
            self._loop.add_tokens(tokens)
        if batch is not None:
            source, placed = self._experiment.on_devices(batch)
            _, hosts = host_share(self._experiment.mesh)
            self._run.data_tokens += int(np.count_nonzero(batch.loss_weights_BL)) * hosts
        return self._experiment.step(state, source, placed, self._experiment.objective.coefficients(), *own)

    def _before_update(self, loop: Loop) -> bool:
        """Does what is due between two updates; True ends the stage."""
        *earlier, record = self._run.records
        record.updates = loop.update - sum(other.updates for other in earlier)
        self._validate_if_due(loop)
        self._evaluate_if_due(loop)
        record.ended_by = reason_to_end(record, self._stage, self._recipe.curriculum)
        if record.ended_by is None:
            is_asked = signals.asked() and self._can_stop(loop)
            self._save_if_due(loop, is_asked)
            if is_asked:
                raise stopped_after(loop.update)
            self._draw_if_due(loop)
        return record.ended_by is not None

    def _validate_if_due(self, loop: Loop) -> None:
        """After every so many updates and at the end of the budget: the coherence loss on validation chains."""
        record, experiment = self._run.records[-1], self._experiment
        is_last = record.updates >= record.budget
        is_due = record.updates > 0 and (is_last or record.updates % self._recipe.curriculum.validate_every == 0)
        is_done = bool(record.validations) and record.validations[-1][0] == record.updates
        if not is_due or is_done or self._evaluate is None:
            return
        loop.settle()
        with self._run.clock.span("validation"):
            batches = (experiment.on_devices(batch, states_only=True) for batch in self._validation)
            coherence = mean_over(partial(self._evaluate, loop.state.params), batches)
        check_finite({"validation coherence": coherence}, loop.update, loop.place)
        record_validation(record, coherence)
        loop.write({"validation/coherence": coherence, "validation/threshold": record.threshold})

    def _evaluate_if_due(self, loop: Loop) -> None:
        """After every so many updates and after the last: accuracy on validation problems, by depth."""
        settings, curve, update = self._recipe.evaluation, self._run.curve, loop.update
        is_due = settings.every and update and (update % settings.every == 0 or update >= self._recipe.total_updates)
        if not is_due or (curve and curve[-1]["update"] >= update):
            return
        loop.settle()
        with self._run.clock.span(MIDRUN):
            seconds = round(self._run.seconds, 3)
            problems = first_of_each_depth(self._experiment.validation.traces, settings.curve_problems)
            result, _ = self._experiment.evaluator(self._experiment.student, loop.state.params["student"], problems)
        tables = {name: result[name] for name in ("chain_accuracy", "step_accuracy")}
        means = {name: {depth: row["mean"] for depth, row in table.items()} for name, table in tables.items()}
        curve.append({"update": update, "seconds": seconds, **means})
        loop.write({f"validation/{name}": means[name]["all"] for name in means} | {"perf/train_seconds": seconds})

    def _can_stop(self, loop: Loop) -> bool:
        """Whether a run that is saved here goes on with the same bits: chains are drawn anew when it is resumed."""
        return self._draw is None or loop.update % self._recipe.updates_per_refresh == 0

    def _save_if_due(self, loop: Loop, is_asked: bool) -> None:
        # After the validation of the same update, so that a resumed run does not repeat it; and after `settle`, so that
        # a state whose loss is not finite is never saved.
        is_due = is_asked or loop.update % self._recipe.checkpoint_every == 0
        if self._run.records[-1].updates and is_due:
            loop.settle()
            self._run.iterator, self._run.line = loop.loader.get_state(), loop.line
            with self._run.clock.span("checkpoints"):
                self._checkpoints.save_rolling(loop.state, self._run.meta(self._experiment))

    def _draw_if_due(self, loop: Loop) -> None:
        """Every so many updates: new chains of the student's own, for a recipe that learns from them."""
        if self._draw is None or (self._own_chains is not None and loop.update % self._recipe.updates_per_refresh):
            return
        loop.settle()
        with self._run.clock.span(DRAWING):
            drawn = self._draw(loop.state, self._stage)
        self._own_chains = itertools.cycle(zip(drawn.chains, drawn.tokens, strict=True))
        # In the log beside the first update that learns from them.
        loop.write(drawn.means | {"perf/drawing_share": self._drawing_share()}, loop.update + 1)

    def _drawing_share(self) -> float:
        """Of the time that drawing and updates have taken so far, the part that was drawing."""
        seconds = self._run.clock.seconds()
        drawing, updates = (seconds.get(name, 0.0) for name in (DRAWING, UPDATES))
        return drawing / max(drawing + updates, 1e-9)

    def _open_record(self, held_out: Chains) -> StageRecord:
        experiment, recipe = self._experiment, self._recipe
        coherence = teacher_coherence(experiment, held_out)
        return StageRecord(
            depth=self._stage.name,
            threshold=recipe.curriculum.threshold_factor * coherence,
            teacher_coherence=coherence,
            budget=stage_budget(recipe.total_updates, int(self._run.state.step), self._stage, len(experiment.stages)),
        )

    def _loader(self) -> BatchLoader | NoRows:
        """The stage's own chains, and a share of the earlier stages'."""
        recipe, train = self._recipe, self._experiment.train
        if not recipe.data_rows:
            return NoRows()
        earlier = [chain for chain in train.encoded if chain.depth < self._stage.low]
        replay = recipe.curriculum.replay if earlier else 0.0
        own = (train.of_stage(self._stage).encoded, 1.0 - replay)
        return BatchLoader(
            [own, (earlier, replay)] if replay else [own],
            rows=recipe.data_rows,
            row_length=recipe.data.row_length,
            chains_per_row=recipe.data.chains_per_row,
            max_boundaries=self._experiment.max_boundaries,
            seed=recipe.seed * 1000 + self._stage.index,
            share=host_share(self._experiment.mesh),
        )

    def _shown(self, means: dict[str, float], speed: float) -> dict[str, str]:
        record = self._run.records[-1]
        shown = {short: f"{means[name]:.4f}" for name, short in SHOWN.items() if name in means}
        if self._draw is not None:
            shown["drawing"] = f"{100 * self._drawing_share():.0f}% of the time"
        shown["validation"] = f"{_number(record.coherence)} / {record.threshold:.4f}"
        return shown | {"tokens/s": f"{speed:,.0f}"}


def teacher_coherence(experiment: Experiment, held_out: Chains) -> float:
    """The coherence loss of the teacher against itself behind solved training examples; 0 where nothing validates."""
    if not experiment.objective.validates:
        return 0.0
    # One chain a row, so that both readings hold the same chain in the same place.
    prefixed = prefixed_chains(experiment.recipe, experiment.tokenizer, experiment.train.traces, held_out.traces)
    plain = experiment.batches(held_out.encoded)
    other = experiment.batches(prefixed, row_length=row_length_of(prefixed))
    readings = (
        tuple(x for batch in pair for x in experiment.on_devices(batch, states_only=True))
        for pair in zip(plain, other, strict=True)
    )
    return mean_over(make_self_comparison(experiment.teacher, experiment.yardstick), readings)


def _sampler(experiment: Experiment) -> Sampler | None:
    """What draws chains from the student; None where the recipe has none of its own."""
    if experiment.recipe.loss.reward_weight:
        return make_reward_sampler(experiment)
    return make_on_policy_sampler(experiment) if experiment.recipe.own_rows else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
