"""The members of an ensemble, and what trains, validates and reports them."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rtd_jax.apps.distill.ensemble_recipe import EnsembleRecipe, NoEnsemble
from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.distill.report import own_drift_before
from rtd_jax.apps.distill.run import Evaluated, check_same_origin, evaluate_run
from rtd_jax.apps.distill.stages import MIDRUN, NOT_TRAINING, SHOWN, UPDATES, Run
from rtd_jax.apps.distill.validation import make_measure
from rtd_jax.base import signals
from rtd_jax.base.console import Display
from rtd_jax.base.files import finite_report, write_json
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.sharding import put_batch, replicated
from rtd_jax.base.types import Batch, Params, TeacherOutputs
from rtd_jax.data.loader import BatchLoader, MembersLoader
from rtd_jax.eval.evaluate import first_of_each_depth
from rtd_jax.methods.term import reads_of
from rtd_jax.train.checkpoints import Checkpoints, read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import (
    StageRecord,
    open_record,
    reason_to_end,
    record_validation,
    stage_budget,
)
from rtd_jax.train.ensemble import make_ensemble_step, of_member, over_members, put_members
from rtd_jax.train.ensemble_loop import EnsembleLoop
from rtd_jax.train.loop import Loop, stopped_after
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import TrainState
from rtd_jax.train.student import save_student
from rtd_jax.train.teacher_table import make_table
from rtd_jax.train.update import make_term_eval, make_update, teacher_on


@dataclass
class Member:
    """What a run of the ensemble has to itself, beside its arrays."""

    recipe: Recipe
    folder: Path
    record: StageRecord
    curve: list[dict[str, Any]] = field(default_factory=list)  # a row for each midrun evaluation
    tokens: int = 0  # predicted tokens that it was trained on
    failure: str = ""  # why it was left out

    def saved(self) -> dict[str, Any]:
        """What a checkpoint has of it, as JSON."""
        return {x: getattr(self, x) for x in ("curve", "tokens", "failure")} | {"record": asdict(self.record)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `saved` gave."""
        self.record = StageRecord.from_dict(saved["record"])
        self.curve, self.tokens, self.failure = saved["curve"], saved["tokens"], saved["failure"]


class Ensemble:
    """The members, and what trains them together."""

    def __init__(
        self,
        recipe: EnsembleRecipe,
        experiment: Experiment,
        state: TrainState,
        clock: Clock,
        folders: Sequence[Path],
        checkpoints: Checkpoints,
    ) -> None:
        self._recipe, self._experiment, self._clock, self._checkpoints = recipe, experiment, clock, checkpoints
        self.state = state
        # Rows are not spread over devices: members are.
        self._student = dataclasses.replace(experiment.student, activation_sharding=None)
        self._seconds_before = 0.0  # of training, in the processes before this one
        self._iterator: dict[str, Any] | None = None
        self._line: dict[str, Any] | None = None
        (stage,) = experiment.stages
        self._stage = stage
        held_out = experiment.validation.of_stage(stage, recipe.curriculum.validation_chains)
        teacher, measure = None, make_measure(experiment)
        if measure is not None:
            measure.begin(stage)
            teacher = measure.of_teacher()
        record = stage, recipe.curriculum, teacher, stage_budget(recipe.total_updates, 0, stage, 1)
        self.members = [
            Member(recipe.member(seed), folder, open_record(*record))
            for seed, folder in zip(recipe.seeds, folders, strict=True)
        ]
        self._validation = self._validation_batches(experiment.batches(held_out.encoded, recipe.data.chains_per_row))
        self._coherence = self._make_coherence()

    def drift_before(self) -> list[dict[str, Any] | None]:
        """Of each member the drift on its own chains before training; None where it is not asked for."""
        settings = self._recipe.evaluation
        if not (settings.drift_problems and settings.drift_own):
            return [None] * len(self.members)
        return [own_drift_before(self._experiment, self._params(i)) for i in range(len(self.members))]

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
          ValueError: it is damaged, or was made with another teacher, student or data.
        """
        meta = read_meta(path)
        check_same_origin(path, meta, self._experiment, is_own=True)
        self.state = restore_state(path, self.state)
        self._iterator, self._line = json.loads(meta["iterator"]), json.loads(meta["line"])
        self._seconds_before = float(meta["seconds"])
        for member, saved in zip(self.members, json.loads(meta["members"]), strict=True):
            member.restore(saved)

    def train(self, logs: Sequence[MetricsLog], display: Display) -> None:
        """Trains all members to their last update.

        Raises:
          ValueError: no member is left whose loss is finite, or a checkpoint cannot be written.
          Stopped: a signal asked for it; the state was saved.
        """
        if self.members[0].record.ended_by is not None:
            return
        recipe, experiment = self._recipe, self._experiment
        with self._clock.span("teacher"):
            step = self.make_step()
        loader = MembersLoader([self.loader(member.recipe.seed) for member in self.members])
        if self._iterator is not None:
            loader.set_state(self._iterator)
        loop = EnsembleLoop(
            self.state,
            loader,
            step,
            experiment.mesh,
            ("stage", self._stage.name),
            logs[0],
            display,
            (recipe.log_every, recipe.checkpoint_every),
            lambda means, speed: {
                **{short: f"{means[name]:.4f}" for name, short in SHOWN.items() if name in means},
                "tokens/s": f"{speed:,.0f}",
            },
            self._line,
            logs=logs,
            failures={i: member.failure for i, member in enumerate(self.members) if member.failure},
        )
        with self._clock.span(UPDATES):
            loop.run(self._before_update)
        self.state, self._iterator, self._line = loop.state, None, None
        with self._clock.span("checkpoints"):
            self._checkpoints.save_stage(1, self.state, self._meta())

    def report(self, display: Display, before: Sequence[dict[str, Any] | None], started: float) -> None:
        """Evaluates the members that have no report yet and were not left out, and writes what `train` writes."""
        known: dict[str, Evaluated] = {}
        for i, member in enumerate(self.members):
            path = member.folder / "report.json"
            if member.failure or path.exists():
                continue
            state = self.state._replace(params=of_member(self.state.params, i, self._experiment.mesh), opt_state=())
            run = Run(state, self._clock, [member.record], curve=member.curve, data_tokens=member.tokens)
            experiment = dataclasses.replace(self._experiment, recipe=member.recipe)
            student, text = state.params["student"], member.recipe.data.text
            settings = member.recipe.student
            save_student(member.folder, settings, experiment.student, student, experiment.tokenizer, text)
            report = evaluate_run(experiment, run, display, member.folder, known)
            if before[i] is not None:
                report["drift"]["own_before"] = before[i]
            share = 1 / len(self.members)
            report["settings"] = asdict(member.recipe)
            report["wall_seconds"] = round(share * (time.monotonic() - started), 1)
            report["train_seconds"] = round(self._seconds, 1)
            report["seconds"] = {name: round(share * spent, 2) for name, spent in self._clock.seconds().items()}
            report["ensemble"] = {"seeds": list(self._recipe.seeds)}  # whose time is shared out equally above
            report, not_finite = finite_report(report)
            if not_finite:
                report["not_finite"] = not_finite
            write_json(path, report)
            display.note(f"seed {member.recipe.seed}: {path}")

    @property
    def _seconds(self) -> float:
        """A member's share of the training time so far, as `Run.seconds` counts it."""
        return (self._seconds_before + self._clock.total(without=NOT_TRAINING)) / len(self.members)

    def _params(self, member: int) -> Params:
        return of_member(self.state.params, member, self._experiment.mesh)

    def loader(self, seed: int) -> BatchLoader:
        """The data in the order that the run of this seed has them."""
        recipe = self._recipe
        return BatchLoader(
            [(self._experiment.train.of_stage(self._stage).encoded, 1.0)],
            rows=recipe.data_rows,
            row_length=recipe.data.row_length,
            chains_per_row=recipe.data.chains_per_row,
            max_boundaries=self._experiment.max_boundaries,
            seed=seed * 1000 + self._stage.index,
        )

    def make_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The update of all members: (state, batches on the host) -> (state, metrics)."""
        recipe, experiment, mesh = self._recipe, self._experiment, self._experiment.mesh
        teacher = experiment.teacher
        # Without a mesh: an update is computed on one device.
        objective = recipe.objective(self._student.config, experiment.teacher_config, experiment.vocab_size)
        table = places = None
        reads = reads_of(objective.terms)
        if reads.teacher and teacher is not None:
            batches = experiment.batches(experiment.train.encoded, recipe.data.chains_per_row)
            both = ((batch, put_batch(batch, mesh)) for batch in batches)
            try:
                table, places = make_table(teacher, experiment.teacher_params, both, reads)
            except ValueError as error:
                raise NoEnsemble(str(error)) from error
            table = jax.device_put(table, replicated(mesh))
        update = make_update(self._student, teacher, experiment.optimizer, objective, recipe.update)
        step = make_ensemble_step(update, mesh, recipe.side_by_side or None)
        coefficients = objective.coefficients()

        def source_of(batch: Batch) -> Any:
            """The members' teacher: places in the table, outputs from the cache, or nothing."""
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
            found: Any = {}
            if places is not None:
                found = places.of(flat)
            elif reads.teacher and experiment.cache is not None:
                found = experiment.cache.outputs(flat, dtype=recipe.teacher.compute_dtype)
            return jax.tree.map(lambda x: x.reshape(len(self.members), -1, *x.shape[1:]), found)

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            for member, weights_BL in zip(self.members, batch.loss_weights_BL, strict=True):
                member.tokens += int(np.count_nonzero(weights_BL))
            own = put_members((batch, source_of(batch)), mesh)
            return step(state, table, *own, coefficients)

        return run

    def _before_update(self, loop: Loop) -> bool:
        """Does what is due between two updates; True at the end."""
        assert isinstance(loop, EnsembleLoop)
        for member in self.members:
            member.record.updates = loop.update
        self._validate_if_due(loop)
        self._evaluate_if_due(loop)
        for member in self.members:
            member.record.ended_by = reason_to_end(member.record, self._stage, self._recipe.curriculum)
        is_over = self.members[0].record.ended_by is not None
        is_asked = signals.asked()
        if loop.update and not is_over and (is_asked or loop.update % self._recipe.checkpoint_every == 0):
            self._save(loop)
        if is_asked and not is_over:
            raise stopped_after(loop.update)
        if is_over:
            self._note_failures(loop)
        return is_over

    def _validate_if_due(self, loop: EnsembleLoop) -> None:
        """After every so many updates and at the end: the coherence loss of all members on validation chains."""
        records, every = [member.record for member in self.members], self._recipe.curriculum.validate_every
        is_due = loop.update > 0 and (loop.update % every == 0 or loop.update >= records[0].budget)
        is_done = any(record.validations and record.validations[-1][0] == loop.update for record in records)
        if not is_due or is_done or self._coherence is None:
            return
        loop.settle()
        with self._clock.span("validation"):
            total_R, count_R = np.zeros((2, len(self.members)))
            for group in self._validation:
                mean = jax.device_get(self._coherence(loop.state.params, group))
                total_R, count_R = total_R + mean.sum, count_R + mean.count
        for i, record in enumerate(records):
            coherence = float(total_R[i] / max(count_R[i], 1.0))
            loop.check_member(i, {"validation coherence": coherence}, loop.update)
            if i not in loop.failures:  # no checkpoint could be read whose records have a NaN
                record_validation(record, coherence)
                assert record.threshold is not None, "coherence has one"
                loop.write_member(i, {"validation/coherence": coherence, "validation/threshold": record.threshold})

    def _evaluate_if_due(self, loop: EnsembleLoop) -> None:
        """After every so many updates and after the last: accuracy of each member on validation problems, by depth."""
        settings, update = self._recipe.evaluation, loop.update
        is_due = settings.every and update and (update % settings.every == 0 or update >= self._recipe.total_updates)
        if not is_due or any(member.curve and member.curve[-1]["update"] >= update for member in self.members):
            return
        loop.settle()
        with self._clock.span(MIDRUN):
            seconds = round(self._seconds, 3)
            problems = first_of_each_depth(self._experiment.validation.traces, settings.curve_problems)
            for i, member in enumerate(self.members):
                if i in loop.failures:
                    continue
                params = of_member(loop.state.params["student"], i, self._experiment.mesh)
                result, _ = self._experiment.evaluator(self._experiment.student, params, problems)
                means = {
                    name: {depth: row["mean"] for depth, row in result[name].items()}
                    for name in ("chain_accuracy", "step_accuracy")
                }
                member.curve.append({"update": update, "seconds": seconds, **means})
                scalars = {f"validation/{name}": means[name]["all"] for name in means}
                loop.write_member(i, scalars | {"perf/train_seconds": seconds})

    def _save(self, loop: EnsembleLoop) -> None:
        # After the validation of the same update, so that a resumed run does not repeat it.
        loop.settle()
        self._note_failures(loop)
        self._iterator, self._line = loop.loader.get_state(), loop.line
        with self._clock.span("checkpoints"):
            self._checkpoints.save_rolling(loop.state, self._meta())

    def _note_failures(self, loop: EnsembleLoop) -> None:
        loop.settle()
        for i, failure in loop.failures.items():
            self.members[i].failure = failure

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint holds besides the states; the records of all members stand in its `members`."""
        return {
            "records": [asdict(self.members[0].record)],
            "iterator": json.dumps(self._iterator),  # as text: orbax would turn its integers into arrays
            "line": json.dumps(self._line),
            "members": json.dumps([member.saved() for member in self.members]),
            "seconds": self._seconds * len(self.members),
            "tokens": [sum(member.tokens for member in self.members), 0],
            "settings": asdict(self._recipe),
            "fingerprints": self._experiment.fingerprints,
        }

    def _validation_batches(self, batches: Sequence[Batch]) -> list[tuple[TeacherOutputs, Batch]]:
        """Validation chains and the teacher's states on them, for which it is run once."""
        experiment = self._experiment
        if not experiment.objective.validates:
            return []
        read = jax.jit(lambda source, batch: teacher_on(experiment.teacher, source, batch, experiment.yardstick.reads))
        groups = []
        for batch in batches:
            source, placed = experiment.on_devices(batch, states_only=True)
            outputs = read(source, placed)._replace(hidden_BLD=None, head_DV=None, top_k=None)
            groups.append(jax.device_put((outputs, placed), replicated(experiment.mesh)))
        return groups

    def _make_coherence(self) -> Callable[[Params, tuple[TeacherOutputs, Batch]], Mean] | None:
        """(params of all members, (teacher, batch)) -> the coherence loss as (sum, denominator), [R] each."""
        if make_measure(self._experiment) is None:
            return None
        evaluate = make_term_eval(self._student, None, self._experiment.yardstick)
        over = over_members(
            lambda params, group: evaluate(params, *group), self._experiment.mesh, self._recipe.side_by_side or None
        )
        return jax.jit(over)
