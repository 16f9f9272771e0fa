"""Teacher-calibrated thresholds: how coherent is the teacher with *itself* when only the context changes?

The article trains a stage "until coherence loss on that stage's validation set falls below a teacher-calibrated
threshold" without saying how it is calibrated. Here the teacher reads each validation chain twice, once as it is and
once behind solved examples. The coherence loss between the two readings is what even a perfect copy of the teacher
would show when nothing but the context differs. Times a configured factor, that is the threshold.
"""

from collections.abc import Callable, Iterable

import jax

from rtd_jax.base.boundaries import transition_boundaries
from rtd_jax.base.means import Mean
from rtd_jax.base.types import Batch
from rtd_jax.losses import coherence
from rtd_jax.losses.trajectory import TransitionForm
from rtd_jax.models.model import LlamaModel
from rtd_jax.train.update import TeacherSource, teacher_on


def make_self_coherence(
    teacher: LlamaModel | None,
    *,
    hidden_layer: int = -1,
    anchor_prompt: bool = True,
    transition_form: TransitionForm = "direction",
) -> Callable[[TeacherSource, Batch, TeacherSource, Batch], Mean]:
    """Builds (teacher, batch, teacher, same chains under another context) -> coherence as (sum over chains, chains).

    The teacher is given as in `make_train_step`: its params, or its outputs on the batch that follows.

    The two batches hold the same chains in the same rows, one a row; rows may be of different lengths.
    """

    @jax.jit
    def measure(on_plain: TeacherSource, plain: Batch, on_prefixed: TeacherSource, prefixed: Batch) -> Mean:
        plain_states, prefixed_states = (
            teacher_on(teacher, source, batch, hidden_layer)[0].boundary_states_BCKD
            for source, batch in ((on_plain, plain), (on_prefixed, prefixed))
        )
        mask_BCK = transition_boundaries(plain.boundary_mask_BCK & prefixed.boundary_mask_BCK, anchor_prompt)
        chains = (mask_BCK[..., 1:] & mask_BCK[..., :-1]).any(-1).sum().astype(float)
        return Mean(coherence(prefixed_states, plain_states, mask_BCK, form=transition_form) * chains, chains)

    return measure


def mean_over(measure: Callable[..., Mean], groups: Iterable[tuple]) -> float:
    """Runs `measure(*group)` over the groups and divides once at the end."""
    total = 0.0
    count = 0.0
    for group in groups:
        mean = jax.device_get(measure(*group))
        total, count = total + float(mean.sum), count + float(mean.count)
    return total / max(count, 1.0)
