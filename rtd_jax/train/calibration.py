"""Teacher-calibrated thresholds: the teacher's coherence loss against itself when only the context changes.

The article trains a stage "until coherence loss on that stage's validation set falls below a teacher-calibrated
threshold" without saying how it is calibrated. Here the teacher reads each validation chain twice, once as it is and
once behind solved examples. The coherence loss between the two readings is what even a perfect copy of the teacher
would have. The threshold is this loss times a factor from the settings.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from rtd_jax.base.means import Mean
from rtd_jax.base.types import Batch, StudentOutputs
from rtd_jax.methods.maps import TrajectoryTerm
from rtd_jax.methods.term import Outputs, Term
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.update import TeacherSource, teacher_on


def make_self_comparison(
    teacher: DecoderModel | None, term: Term
) -> Callable[[TeacherSource, Batch, TeacherSource, Batch], Mean]:
    """Builds (teacher, batch, teacher, same chains under another context) -> the term as (sum, denominator).

    The teacher under the other context takes the student's place, without any learned map. The teacher is given as in
    `make_train_step`: its params, or its outputs on the batch that follows.

    The two batches hold the same chains in the same rows, one a row; rows may be of different lengths.
    """
    assert isinstance(term, TrajectoryTerm), "the yardstick compares states of steps"
    alone = term.of_teacher_alone()

    @jax.jit
    def measure(on_plain: TeacherSource, plain: Batch, on_prefixed: TeacherSource, prefixed: Batch) -> Mean:
        target = teacher_on(teacher, on_plain, plain, alone.reads)
        other = teacher_on(teacher, on_prefixed, prefixed, alone.reads)
        both = plain._replace(boundary_mask_BCK=plain.boundary_mask_BCK & prefixed.boundary_mask_BCK)
        nothing = jnp.zeros(())  # a term on boundary states reads neither final states nor a head
        outputs = Outputs(StudentOutputs(nothing, nothing, other.boundary_states, {}), target, both)
        total, _ = alone.sums(outputs, {}, alone.coefficients())
        return Mean(total, alone.denominator(both))

    return measure


def mean_over(measure: Callable[..., Mean], groups: Iterable[tuple]) -> float:
    """The mean of `measure` over all groups of arguments together: sums and counts are added, then divided once."""
    total = 0.0
    count = 0.0
    for group in groups:
        mean = jax.device_get(measure(*group))
        total, count = total + float(mean.sum), count + float(mean.count)
    return total / max(count, 1.0)
