"""The teacher's outputs by a forward pass on every batch."""

from collections.abc import Sequence

import jax

from rtd_jax.base.boundaries import gather_boundaries
from rtd_jax.base.types import Array, Batch, Params, TeacherOutputs
from rtd_jax.models.model import LlamaModel


def states_at_boundaries(
    model: LlamaModel, params: Params, batch: Batch, hidden_layer: int = -1, token_layers: Sequence[int] = ()
) -> tuple[Array, Array, tuple[Array, ...]]:
    """A forward pass of teacher or student.

    Args:
      hidden_layer: whose states are taken at the boundaries, as `LlamaConfig.layer_index` counts; -1 is the final
        normed state.
      token_layers: whose states are returned at every token.

    Returns:
      The states that the head reads [B, L, D], the boundary states [B, C, K, D], and the states of `token_layers`,
      [B, L, D] each.
    """
    hidden_BLD, (layer_BLD, *everywhere) = model.hidden(
        params, batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL, layers=(hidden_layer, *token_layers)
    )
    return hidden_BLD, gather_boundaries(layer_BLD, batch.boundary_positions_BCK), tuple(everywhere)


@jax.named_scope("teacher")
def teacher_outputs(
    model: LlamaModel, params: Params, batch: Batch, hidden_layer: int = -1, token_layers: Sequence[int] = ()
) -> TeacherOutputs:
    """What the losses need of a frozen teacher; no gradient flows through it."""
    return jax.lax.stop_gradient(
        TeacherOutputs(*states_at_boundaries(model, params, batch, hidden_layer, token_layers))
    )
