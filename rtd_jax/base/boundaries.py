"""The states of steps, and which boundaries take part in which loss."""

import chex
import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array, Batch, StepState


def gather_boundaries(hidden_BLD: Array, boundary_positions_BCK: Array) -> Array:
    """Hidden states at the boundary positions: [B, L, D], int [B, C, K] -> [B, C, K, D].

    Masked slots hold the state at position 0; the losses ignore them.
    """
    chex.assert_rank([hidden_BLD, boundary_positions_BCK], 3)
    rows, chains, boundaries = boundary_positions_BCK.shape
    flat_BX = boundary_positions_BCK.reshape(rows, chains * boundaries)
    states_BXD = jnp.take_along_axis(hidden_BLD, flat_BX[:, :, None], axis=1)
    return states_BXD.reshape(rows, chains, boundaries, hidden_BLD.shape[-1])


def mean_states(hidden: Array, spans: Array) -> Array:
    """Means of hidden states over sets of tokens: [..., L, D], [..., X, L] -> [..., X, D], of the states' type.

    Added in float32. A set without tokens gives 0.

    Args:
      spans: bool, the tokens of each set; or float, their weights, 0 or more, which need not add up to 1.
    """
    weights = spans.astype(hidden.dtype)
    sums = jnp.einsum("...xl,...ld->...xd", weights, hidden, preferred_element_type=jnp.float32)
    if spans.dtype == jnp.bool_:
        totals = jnp.maximum(jnp.sum(spans, axis=-1, dtype=jnp.float32), 1.0)
    else:  # counted as they were multiplied: rounded to the states' type
        totals = jnp.sum(weights, axis=-1, dtype=jnp.float32)
        totals = jnp.where(totals > 0.0, totals, 1.0)
    return (sums / totals[..., None]).astype(hidden.dtype)


@jax.named_scope("step_states")
def step_states(hidden_BLD: Array, batch: Batch, step_state: StepState = "end") -> Array:
    """The state of each step, and of the prompt in slot 0: [B, L, D] -> [B, C, K, D].

    Args:
      step_state: "end" takes the state at the step's last token, "mean" the mean over the step's tokens, and "result"
        the mean over the tokens of its conclusion (`data.encoding`). Where the batch has soft windows (`places_BL`),
        "mean" is the mean over the whole completion under each window's weights (`window_weights`). The prompt's is
        always that at its end: the mean over a prompt would be one over instructions and solved examples, and over the
        first token, whose states are far longer than all others.

    Returns:
      Where a slot is masked, anything; the losses ignore it.

    Raises:
      ValueError: "result", but the batch does not say where the conclusions are.
    """
    ends_BCKD = gather_boundaries(hidden_BLD, batch.boundary_positions_BCK)
    if step_state == "end" or batch.boundary_positions_BCK.shape[-1] == 1:
        return ends_BCKD
    if step_state == "result":
        spans_BCJL = _conclusions(batch)
    else:
        spans_BCJL = step_tokens(batch) if batch.places_BL is None else window_weights(batch)
    rows, chains, steps, length = spans_BCJL.shape
    means_BXD = mean_states(hidden_BLD, spans_BCJL.reshape(rows, chains * steps, length))
    means_BCJD = means_BXD.reshape(rows, chains, steps, hidden_BLD.shape[-1])
    return jnp.concatenate([ends_BCKD[:, :, :1], means_BCJD], axis=2)


def step_boundaries(boundary_mask_BCK: Array) -> Array:
    """The k step conclusions alone, without the prompt's end (slot 0): bool [B, C, K]."""
    return boundary_mask_BCK & (jnp.arange(boundary_mask_BCK.shape[-1]) > 0)


def transition_boundaries(boundary_mask_BCK: Array, anchor_prompt: bool) -> Array:
    """The boundaries between which transitions are taken: bool [B, C, K].

    With `anchor_prompt` the prompt's end is h_0 and a one-step problem has one transition; without, transitions run
    between step conclusions only, the article's formula to the letter.
    """
    return boundary_mask_BCK if anchor_prompt else step_boundaries(boundary_mask_BCK)


def step_tokens(batch: Batch) -> Array:
    """Which tokens belong to which step, bool [B, C, K - 1, L]: those after boundary i - 1, up to boundary i."""
    place_L = jnp.arange(batch.tokens_BL.shape[1])
    ends, begins = batch.boundary_positions_BCK[..., 1:, None], batch.boundary_positions_BCK[..., :-1, None]
    return (place_L > begins) & (place_L <= ends) & batch.boundary_mask_BCK[..., 1:, None]


def window_weights(batch: Batch) -> Array:
    """Weight of each token in each soft window, float32 [B, C, K - 1, L]: 1 where it is largest, 0 on other chains.

    exp(-2 (s - (j - 1/2))^2) for a token at place s and window j, over the largest of the window: a Gaussian around the
    window's middle with a standard deviation of half a window. Every token of the completion takes part, so a window
    has a state even where the teacher's direction jumps over it between two tokens.
    """
    chains, boundaries = batch.boundary_positions_BCK.shape[1:]
    assert batch.places_BL is not None
    middle_J1 = jnp.arange(boundaries - 1, dtype=jnp.float32)[:, None] + 0.5
    exponents_BJL = -2.0 * jnp.square(batch.places_BL[:, None] - middle_J1)
    is_completion_BCL = jnp.arange(batch.tokens_BL.shape[1]) > batch.boundary_positions_BCK[..., :1]
    is_of_chain_BCL = batch.chain_ids_BL[:, None] == jnp.arange(1, chains + 1)[:, None]
    own_BCJL = (is_of_chain_BCL & is_completion_BCL)[:, :, None] & batch.boundary_mask_BCK[..., 1:, None]
    exponents_BCJL = jnp.where(own_BCJL, exponents_BJL[:, None], -jnp.inf)
    # The largest is taken off first: far from all tokens, every weight would be 0 in float32.
    lowest = float(jnp.finfo(jnp.float32).min)
    return jnp.exp(exponents_BCJL - jnp.max(exponents_BCJL, axis=-1, keepdims=True, initial=lowest))


def _conclusions(batch: Batch) -> Array:
    """Which tokens belong to the conclusion of which step, bool [B, C, K - 1, L]."""
    if batch.conclusions_BL is None:
        raise ValueError(
            "step_state is 'result', but the batch has no `conclusions_BL`, which say where a step's conclusion is; "
            "use 'end' or 'mean', or batches made by rtd_jax.data"
        )
    chains, boundaries = batch.boundary_positions_BCK.shape[1:]
    is_of_chain_BCL = batch.chain_ids_BL[:, None] == jnp.arange(1, chains + 1)[:, None]
    is_of_step_BJL = batch.conclusions_BL[:, None] == jnp.arange(1, boundaries)[:, None]
    return is_of_chain_BCL[:, :, None] & is_of_step_BJL[:, None] & batch.boundary_mask_BCK[..., 1:, None]


def shifted_labels(batch: Batch) -> tuple[Array, Array]:
    """Labels and loss weights, [B, L], at the position that *makes* each prediction: position l predicts token l + 1.

    The last position of a row predicts nothing. The first token of every chain has weight 0, so no label crosses from
    one packed chain into the next.
    """
    return shifted(batch.tokens_BL), shifted(batch.loss_weights_BL)


def shifted(x_BL: Array) -> Array:
    """Moves each token's value to the position before it, which predicts the token; 0 at a row's last position."""
    return jnp.pad(x_BL[:, 1:], ((0, 0), (0, min(1, x_BL.shape[1]))))


def completion_tokens(batch: Batch) -> Array:
    """The tokens of completions, bool [B, L]."""
    return batch.loss_weights_BL > 0


def chain_tokens(batch: Batch) -> Array:
    """The tokens of chains, prompts included, bool [B, L]."""
    return batch.chain_ids_BL > 0
