"""A small network that decides from the hidden states around a token whether a step ends there.

The teacher is causal: the state at the last token of a step cannot know that a new step follows, but the states of the
next tokens can. Chains are complete when they are cut, so the network reads both ways: each block sees its own token
and the two tokens that are `dilation` away, within the chain.

Further axis: P, the hidden units of the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Params


@dataclass(frozen=True)
class HeadSettings:
    """Shape of the network. Its receptive field is 1 + 2 * sum(dilations) tokens, and one more before."""

    width: int = 128  # hidden units
    dilations: tuple[int, ...] = (1, 2, 4)  # tokens to either side, one block each; () sees no neighbour but the last
    dropout: float = 0.1  # of hidden units, while fitting

    def __post_init__(self) -> None:
        check_ranges(self, width="[1, 1e5]", dilations="[1, 1e5]", dropout="[0, 1)")


class Scale(NamedTuple):
    """Mean and standard deviation by which each dimension of the states is standardised. float32 [N, D] each."""

    mean_ND: Array
    deviation_ND: Array


def neighbours(x_BLP: Array, chain_ids_BL: Array, offset: int) -> jax.Array:
    """x at token l + offset, zero where that is another chain, padding, or outside of the row. [B, L, ...], as x."""
    chex.assert_equal_shape_prefix([x_BLP, chain_ids_BL], 2)
    length = chain_ids_BL.shape[1]
    moved_BLP, ids_BL = jnp.roll(x_BLP, -offset, axis=1), jnp.roll(chain_ids_BL, -offset, axis=1)
    places_L = jnp.arange(length) + offset
    same_BL = (ids_BL == chain_ids_BL) & (chain_ids_BL > 0) & ((places_L >= 0) & (places_L < length))[None]
    return jnp.where(
        same_BL.reshape(same_BL.shape + (1,) * (x_BLP.ndim - 2)), moved_BLP, jnp.zeros((), moved_BLP.dtype)
    )


def turns(states_BLND: Array, chain_ids_BL: Array) -> tuple[jax.Array, jax.Array]:
    """Differences to the previous state, d_t = h_t - h_{t-1} [B, L, N, D], and cos(d_t, d_{t+1}) [B, L, N].

    The cosine says how straight the trajectory runs through token t: 1 is straight on, -1 is back. Differences and
    cosines that do not exist, where a chain begins or ends, are 0.
    """
    chex.assert_rank([states_BLND, chain_ids_BL], [4, 2])
    chex.assert_equal_shape_prefix([states_BLND, chain_ids_BL], 2)
    states_BLND = jnp.asarray(states_BLND, jnp.float32)
    first_BL = neighbours(chain_ids_BL, chain_ids_BL, -1) == 0
    d_BLND = states_BLND - neighbours(states_BLND, chain_ids_BL, -1)
    d_BLND = jnp.where(first_BL[..., None, None], 0.0, d_BLND)
    next_BLND = neighbours(d_BLND, chain_ids_BL, 1)
    squares_BLN = jnp.sum(d_BLND**2, -1) * jnp.sum(next_BLND**2, -1)
    # The gradient of the root at 0 is not a number, so zeros are replaced before it is taken.
    norms_BLN = jnp.sqrt(jnp.where(squares_BLN > 0, squares_BLN, 1.0))
    return d_BLND, jnp.sum(d_BLND * next_BLND, -1) / norms_BLN


class BoundaryHead(nnx.Module):
    """Logit that a step ends at each token. The output layer begins at zero, so every token starts at even odds."""

    def __init__(self, layers: int, width: int, settings: HeadSettings, rngs: nnx.Rngs):
        hidden = settings.width
        self.dilations = settings.dilations
        self.of_state = nnx.Linear(layers * width, hidden, rngs=rngs)
        self.of_difference = nnx.Linear(layers * width, hidden, use_bias=False, rngs=rngs)
        self.of_cosine = nnx.Linear(layers, hidden, use_bias=False, rngs=rngs)
        self.blocks = nnx.List(nnx.Linear(3 * hidden, hidden, rngs=rngs) for _ in settings.dilations)
        self.norms = nnx.List(nnx.LayerNorm(3 * hidden, rngs=rngs) for _ in settings.dilations)
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.leave = nnx.Linear(hidden, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.dropout = nnx.Dropout(settings.dropout)

    def __call__(self, states_BLND: Array, chain_ids_BL: Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits, float32 [B, L]. There is dropout only if `rngs` are given."""

        def drop(x: jax.Array) -> jax.Array:
            return self.dropout(x, deterministic=rngs is None, rngs=rngs)

        flat = (*states_BLND.shape[:2], -1)
        d_BLND, straight_BLN = turns(states_BLND, chain_ids_BL)
        entered_BLP = self.of_state(jnp.asarray(states_BLND).reshape(flat)) + self.of_difference(d_BLND.reshape(flat))
        hidden_BLP = drop(nnx.gelu(entered_BLP + self.of_cosine(straight_BLN)))
        for dilation, norm, block in zip(self.dilations, self.norms, self.blocks, strict=True):
            sides = (neighbours(hidden_BLP, chain_ids_BL, offset) for offset in (-dilation, dilation))
            read_BLP = nnx.gelu(block(norm(jnp.concatenate([hidden_BLP, *sides], axis=-1))))
            hidden_BLP = hidden_BLP + drop(read_BLP)
        return self.leave(self.norm(hidden_BLP))[..., 0]


def init_head(settings: HeadSettings, layers: int, width: int, seed: int = 0) -> Params:
    """Fresh params of a head on `layers` layers of `width` units."""
    return nnx.to_pure_dict(nnx.state(BoundaryHead(layers, width, settings, nnx.Rngs(seed)), nnx.Param))


def boundary_logits(
    settings: HeadSettings,
    params: Params,
    scale: Scale,
    states_BLND: Array,
    chain_ids_BL: Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits that a step ends at each token of packed rows; chains do not see each other. float32 [B, L]

    Args:
      states_BLND: of unit root mean square, as `token_states` gives them.
      chain_ids_BL: 0 on padding, where the logits have no meaning.
      dropout_key: given while fitting.
    """
    chex.assert_rank([states_BLND, chain_ids_BL], [4, 2])
    layers, width = states_BLND.shape[2], states_BLND.shape[3]
    abstract = nnx.eval_shape(lambda: BoundaryHead(layers, width, settings, nnx.Rngs(0)))
    graph, _, rest = nnx.split(abstract, nnx.Param, ...)  # type: ignore[misc]  # three, for one filter and the rest
    scaled_BLND = (jnp.asarray(states_BLND, jnp.float32) - scale.mean_ND) / scale.deviation_ND
    rngs = None if dropout_key is None else nnx.Rngs(dropout_key)
    return nnx.merge(graph, params, rest)(scaled_BLND, chain_ids_BL, rngs)


def boundary_loss(logits_BL: Array, labels_BL: Array, counted_BL: Array, positive_weight: Array | float) -> jax.Array:
    """Weighted binary cross-entropy per counted token, in nats.

    Only about one candidate in ten is a boundary, so a boundary has the weight `positive_weight` and another candidate
    has 1. The weighted sum is divided by the sum of the weights.
    """
    chex.assert_equal_shape([logits_BL, labels_BL, counted_BL])
    weights_BL = jnp.where(counted_BL, jnp.where(labels_BL, positive_weight, 1.0), 0.0)
    losses_BL = optax.sigmoid_binary_cross_entropy(logits_BL, jnp.asarray(labels_BL, jnp.float32))
    return jnp.sum(jnp.where(counted_BL, losses_BL * weights_BL, 0.0)) / jnp.maximum(jnp.sum(weights_BL), 1e-9)


def measure_scale(states: Sequence[np.ndarray]) -> Scale:
    """Mean and standard deviation (at least 1e-3) of every dimension over all tokens. states [T, N, D] each."""
    count = sum(len(x) for x in states)
    mean_ND = sum(x.sum(0, dtype=np.float64) for x in states) / count
    square_ND = sum(np.square(x, dtype=np.float64).sum(0) for x in states) / count
    deviation_ND = np.sqrt(np.maximum(square_ND - mean_ND**2, 0.0))
    return Scale(mean_ND.astype(np.float32), np.maximum(deviation_ND, 1e-3).astype(np.float32))
