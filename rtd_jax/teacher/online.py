"""The teacher as a forward pass on every batch."""

from collections.abc import Sequence

import jax

from rtd_jax.base.boundaries import gather_boundaries
from rtd_jax.base.types import Array, Batch, Params, TeacherOutputs
from rtd_jax.models.model import LlamaModel


def states_at_boundaries(
    model: LlamaModel, params: Params, batch: Batch, hidden_layer: int = -1, token_layers: Sequence[int] = ()
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Forward pass of teacher or student.

    Returns the states the head reads [B, L, D], the boundary states [B, C, K, D], and the states of `token_layers` at
    every token, [B, L, D] each. `hidden_layer` names the layer whose states are taken at the boundaries, as
    `LlamaModel.hidden` numbers them; -1 is the final normed state.
    """
    hidden_BLD, (layer_BLD, *everywhere) = model.hidden(
        params, batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL, layers=(hidden_layer, *token_layers)
    )
    return hidden_BLD, gather_boundaries(layer_BLD, batch.boundary_positions_BCK), tuple(everywhere)


@jax.named_scope("teacher")
def teacher_outputs(
    model: LlamaModel, params: Params, batch: Batch, hidden_layer: int = -1, token_layers: Sequence[int] = ()
) -> TeacherOutputs:
    """What the objective needs of a frozen teacher; no gradient flows through it."""
    return jax.lax.stop_gradient(
        TeacherOutputs(*states_at_boundaries(model, params, batch, hidden_layer, token_layers))
    )
