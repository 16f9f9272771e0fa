"""Pure losses on arrays. No model, no data, no settings: usable from any JAX training code.

>>> from rtd_jax.losses import coherence
>>> # [..., K, S], [..., K, D], bool [..., K], [S, D] -> scalar
>>> loss = coherence(student_states, teacher_states, mask, projection=g)
"""

from rtd_jax.base.boundaries import mean_states
from rtd_jax.losses.divergences import Divergence
from rtd_jax.losses.kd import KDSums, cross_entropy_sums, kd, kd_sums, kd_token_losses, top_k_kd_sums
from rtd_jax.losses.objective import Denominators, LossWeights, Projections, denominators, rtd
from rtd_jax.losses.trajectory import (
    alignment,
    boundary_losses,
    coherence,
    transition_losses,
    transition_mask,
    transitions,
)

__all__ = [
    "Denominators",
    "Divergence",
    "KDSums",
    "LossWeights",
    "Projections",
    "alignment",
    "boundary_losses",
    "coherence",
    "cross_entropy_sums",
    "denominators",
    "kd",
    "kd_sums",
    "kd_token_losses",
    "mean_states",
    "rtd",
    "top_k_kd_sums",
    "transition_losses",
    "transition_mask",
    "transitions",
]
