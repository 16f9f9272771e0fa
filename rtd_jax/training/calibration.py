"""Teacher-calibrated thresholds: how coherent is the teacher with *itself* when only the context changes?

The article trains a stage "until coherence loss on that stage's validation set falls below a teacher-calibrated
threshold" without saying how it is calibrated. Here the teacher reads each validation chain twice, once as it is and
once behind solved examples. The coherence loss between the two readings is what even a perfect copy of the teacher
would show when nothing but the context differs. Times a configured factor, that is the threshold.
"""

from collections.abc import Callable, Sequence

import jax

from rtd_jax.common.boundaries import transition_boundaries
from rtd_jax.common.reductions import Mean
from rtd_jax.common.types import Batch, Params
from rtd_jax.losses import coherence
from rtd_jax.models.functional import LlamaModel
from rtd_jax.teacher.online import states_at_boundaries


def make_self_coherence(
    teacher: LlamaModel, *, hidden_layer: int = -1, anchor_prompt: bool = True
) -> Callable[[Params, Batch, Batch], Mean]:
    """Builds (teacher params, batch, same chains under another context) -> coherence as (sum over chains, chains).

    The two batches hold the same chains in the same rows, one a row; rows may be of different lengths.
    """

    @jax.jit
    def measure(params: Params, plain: Batch, prefixed: Batch) -> Mean:
        _, plain_states, _ = states_at_boundaries(teacher, params, plain, hidden_layer)
        _, prefixed_states, _ = states_at_boundaries(teacher, params, prefixed, hidden_layer)
        mask_BCK = transition_boundaries(plain.boundary_mask_BCK & prefixed.boundary_mask_BCK, anchor_prompt)
        chains = (mask_BCK[..., 1:] & mask_BCK[..., :-1]).any(-1).sum().astype(float)
        return Mean(coherence(prefixed_states, plain_states, mask_BCK) * chains, chains)

    return measure


def mean_over(measure: Callable[..., Mean], params: Params, *batches: Sequence[Batch]) -> float:
    """Runs `measure(params, *batch)` over the batches and divides once at the end."""
    total = 0.0
    count = 0.0
    for group in zip(*batches, strict=True):
        mean = jax.device_get(measure(params, *group))
        total, count = total + float(mean.sum), count + float(mean.count)
    return total / max(count, 1.0)
