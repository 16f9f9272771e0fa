"""The outputs of student and teacher that the terms read, from one forward pass of each on a batch."""

from collections.abc import Sequence

import jax

from rtd_jax.base.boundaries import step_states
from rtd_jax.base.types import Array, Batch, Params, StepState, StudentOutputs, TeacherOutputs
from rtd_jax.models.model import DecoderModel


@jax.named_scope("student")
def student_outputs(
    model: DecoderModel,
    params: Params,
    batch: Batch,
    boundary_layers: Sequence[int] = (),
    token_layers: Sequence[int] = (),
    step_state: StepState = "end",
) -> StudentOutputs:
    """The student's outputs on a batch; differentiable.

    Args:
      boundary_layers: whose states are taken for each step, as `DecoderConfig.layer_index` counts them.
      token_layers: whose states are taken at every token.
      step_state: of which tokens the state of a step is made (`base.boundaries.step_states`).
    """
    return StudentOutputs(*_outputs(model, params, batch, boundary_layers, token_layers, step_state))


@jax.named_scope("teacher")
def teacher_outputs(
    model: DecoderModel,
    params: Params,
    batch: Batch,
    boundary_layers: Sequence[int] = (),
    token_layers: Sequence[int] = (),
    step_state: StepState = "end",
) -> TeacherOutputs:
    """A frozen teacher's outputs on a batch; no gradient flows through them. Arguments as in `student_outputs`."""
    outputs = _outputs(model, params, batch, boundary_layers, token_layers, step_state)
    return jax.lax.stop_gradient(TeacherOutputs(*outputs))


def _outputs(
    model: DecoderModel,
    params: Params,
    batch: Batch,
    boundary_layers: Sequence[int],
    token_layers: Sequence[int],
    step_state: StepState,
) -> tuple[Array, Array, dict[int, Array], dict[int, Array]]:
    layers = tuple(dict.fromkeys((*boundary_layers, *token_layers)))
    rows = batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL
    if not layers:
        return model.hidden(params, *rows), model.head(params), {}, {}
    hidden_BLD, states = model.hidden(params, *rows, layers=layers)
    states_BLD = dict(zip(layers, states, strict=True))
    boundaries = {layer: step_states(states_BLD[layer], batch, step_state) for layer in boundary_layers}
    return hidden_BLD, model.head(params), boundaries, {layer: states_BLD[layer] for layer in token_layers}
