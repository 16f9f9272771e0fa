"""Hidden states of two models compared at every token, through a learned regressor.

Source: intermediate-layer distillation with regressors (Romero et al. 2015, "FitNets", equation 3). The squared error
is divided by the target's own square: a Llama has states a thousand times longer than the others at a few tokens, and
without the division those alone would be fitted.
"""

import jax
import jax.numpy as jnp

from rtd_jax.base.means import safe_divide
from rtd_jax.base.types import Array
from rtd_jax.losses.trajectory import power_scale


def hint_losses(student_BLS: Array, teacher_BLD: Array, mask_BL: Array, regressor_SD: Array) -> Array:
    """|W h_S - h_T|^2 / |h_T|^2 per token, float32 [B, L]; 0 with zero gradient where masked or where h_T is 0."""
    student = jnp.where(mask_BL[..., None], student_BLS, 0).astype(jnp.float32)
    teacher = jax.lax.stop_gradient(jnp.where(mask_BL[..., None], teacher_BLD, 0).astype(jnp.float32))
    scale = power_scale(teacher, -1)
    student, teacher = student * scale, teacher * scale
    error_BL = jnp.sum(jnp.square(jnp.einsum("bls,sd->bld", student, regressor_SD) - teacher), axis=-1)
    return safe_divide(error_BL, jnp.sum(jnp.square(teacher), axis=-1))
