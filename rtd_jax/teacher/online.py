"""The outputs of student and teacher that the terms read, from one forward pass of each on a batch."""

from collections.abc import Sequence

import jax

from rtd_jax.base.boundaries import gather_boundaries
from rtd_jax.base.types import Array, Batch, Params, StudentOutputs, TeacherOutputs
from rtd_jax.models.model import LlamaModel


@jax.named_scope("student")
def student_outputs(
    model: LlamaModel,
    params: Params,
    batch: Batch,
    boundary_layers: Sequence[int] = (),
    token_layers: Sequence[int] = (),
) -> StudentOutputs:
    """The student's outputs on a batch; differentiable.

    Args:
      boundary_layers: whose states are taken at the boundaries, as `LlamaConfig.layer_index` counts them.
      token_layers: whose states are taken at every token.
    """
    return StudentOutputs(*_outputs(model, params, batch, boundary_layers, token_layers))


@jax.named_scope("teacher")
def teacher_outputs(
    model: LlamaModel,
    params: Params,
    batch: Batch,
    boundary_layers: Sequence[int] = (),
    token_layers: Sequence[int] = (),
) -> TeacherOutputs:
    """A frozen teacher's outputs on a batch; no gradient flows through them. Arguments as in `student_outputs`."""
    return jax.lax.stop_gradient(TeacherOutputs(*_outputs(model, params, batch, boundary_layers, token_layers)))


def _outputs(
    model: LlamaModel, params: Params, batch: Batch, boundary_layers: Sequence[int], token_layers: Sequence[int]
) -> tuple[Array, Array, dict[int, Array], dict[int, Array]]:
    layers = tuple(dict.fromkeys((*boundary_layers, *token_layers)))
    rows = batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL
    if not layers:
        return model.hidden(params, *rows), model.head(params), {}, {}
    hidden_BLD, states = model.hidden(params, *rows, layers=layers)
    states_BLD = dict(zip(layers, states, strict=True))
    boundaries = {
        layer: gather_boundaries(states_BLD[layer], batch.boundary_positions_BCK) for layer in boundary_layers
    }
    return hidden_BLD, model.head(params), boundaries, {layer: states_BLD[layer] for layer in token_layers}
