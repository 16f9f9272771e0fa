"""What is measured on a stage's validation chains: of the teacher when the stage begins, of the student on the way."""

from functools import partial
from typing import Protocol

import numpy as np

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.base.types import Batch, Params
from rtd_jax.data.trace import Trace
from rtd_jax.eval.decoding.placement import for_writing
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.calibration import make_self_comparison, mean_over
from rtd_jax.train.curriculum import Stage
from rtd_jax.train.splits import Chains, prefixed_chains, row_length_of
from rtd_jax.train.update import make_term_eval


class Measure(Protocol):
    """Something that can end a stage (`curriculum.ends_by`)."""

    name: str  # in the log, behind "validation/"

    def begin(self, stage: Stage) -> None:
        """Takes up a stage's validation chains."""

    def of_teacher(self) -> float:
        """The teacher's own value on them."""

    def of_student(self, params: Params) -> float:
        """The value of a student with these trained params (`TrainState.params`)."""


def make_measure(experiment: Experiment) -> Measure | None:
    """What the recipe measures on validation chains; None where it measures nothing."""
    measures = experiment.recipe.curriculum.measures
    if measures == "solved":
        return _Solved(experiment)
    return _Coherence(experiment) if measures == "coherence" and experiment.objective.validates else None


class _Coherence:
    """The coherence loss on validation chains."""

    name = "coherence"

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._evaluate = make_term_eval(experiment.student, experiment.teacher, experiment.yardstick)
        self._held_out = Chains((), ())
        self._batches: list[Batch] = []

    def begin(self, stage: Stage) -> None:
        recipe = self._experiment.recipe
        self._held_out = self._experiment.validation.of_stage(stage, recipe.curriculum.validation_chains)
        self._batches = self._experiment.batches(self._held_out.encoded, recipe.data.chains_per_row)

    def of_teacher(self) -> float:
        """Of the teacher against itself behind solved training examples."""
        experiment, held_out = self._experiment, self._held_out
        prefixed = prefixed_chains(experiment.recipe, experiment.tokenizer, experiment.train.traces, held_out)
        # One chain a row, so that both readings hold the same chain in the same place.
        plain = experiment.batches(held_out.encoded)
        other = experiment.batches(prefixed, row_length=row_length_of(prefixed))
        readings = (
            tuple(x for batch in pair for x in experiment.on_devices(batch, states_only=True))
            for pair in zip(plain, other, strict=True)
        )
        return mean_over(make_self_comparison(experiment.teacher, experiment.yardstick), readings)

    def of_student(self, params: Params) -> float:
        batches = (self._experiment.on_devices(batch, states_only=True) for batch in self._batches)
        return mean_over(partial(self._evaluate, params), batches)


class _Solved:
    """The share of validation problems to which a whole right chain is written, by greedy decoding."""

    name = "solved"

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._problems: tuple[Trace, ...] = ()

    def begin(self, stage: Stage) -> None:
        count = self._experiment.recipe.curriculum.validation_chains
        self._problems = self._experiment.validation.of_stage(stage, count).traces

    def of_teacher(self) -> float:
        experiment = self._experiment
        stated = experiment.recipe.curriculum.teacher_solves
        if stated:
            return stated
        assert experiment.teacher is not None, "the recipe refuses a cached teacher, and `prepare` loads this one"
        return self._share(experiment.teacher, experiment.teacher_params)

    def of_student(self, params: Params) -> float:
        return self._share(*for_writing(self._experiment.student, params["student"], self._experiment.mesh))

    def _share(self, model: DecoderModel, params: Params) -> float:
        records = self._experiment.evaluator.solutions(model, params, self._problems)
        return float(np.mean([record["correct"] for record in records]))
