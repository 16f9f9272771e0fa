"""The arrays that travel between the parts of rtd_jax.

Axis suffixes, used in every array name of the code base:

    B  rows of a batch                L  tokens of a row             V  vocabulary (padded rows included)
    C  chains packed into a row       K  boundaries of a chain       D  model width (S: student's, where both meet)
    N  layers                         H  query heads                 G  key/value heads
    T  tokens flattened (B * L)       F  MLP width                   E  width of one head
       or tokens of one text         P  units of a boundary head
    M  the teacher's most probable tokens that a cache keeps

Boundary 0 of a chain is its last prompt token; boundary i >= 1 is the token that covers the last non-space character of
step i. A chain with k steps therefore has k + 1 valid boundary slots.
"""

from typing import Literal, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
StepState = Literal["end", "mean", "result"]  # of which tokens a step's state is made, `base.boundaries.step_states`
Params = dict  # nested dict of arrays: a pure pytree, no functions, no metadata


class Batch(NamedTuple):
    """Fixed-shape rows of packed chains.

    `loss_weights_BL[b, l]` weights the prediction *of* token l, made from position l - 1, so the first token of a chain
    always has weight 0. `chain_ids_BL` is 0 on padding and 1..C on chains; attention never crosses chains. Padding lies
    behind the last chain of its row.
    """

    tokens_BL: Array  # int32
    positions_BL: Array  # int32, restart at 0 in each chain
    chain_ids_BL: Array  # int32
    loss_weights_BL: Array  # float32; 0 on prompt and padding
    boundary_positions_BCK: Array  # int32, index into L; 0 where masked
    boundary_mask_BCK: Array  # bool
    conclusions_BL: Array | None = None  # int32: i on the tokens of the conclusion of a chain's step i, else 0
    places_BL: Array | None = None  # float32: places of completion tokens among soft windows, else 0; None: no such

    @property
    def attention_ids_BL(self) -> Array | None:
        """The chain ids where attention needs them, or None where it is causal: rows that hold at most one chain.

        What lies behind a row's only chain is padding, which no token of the chain sees.
        """
        return None if self.boundary_positions_BCK.shape[1] == 1 else self.chain_ids_BL


class TopK(NamedTuple):
    """The teacher's predictions as a cache stores them: at each token the k most probable ids, and one bucket.

    The bucket holds all other tokens together. Its mass is stored at both temperatures at which the losses read it,
    because it cannot be computed from the k entries: at temperature T it is 1 - sum_top p^(1/T) / sum_v p^(1/T), where
    the second sum includes the probabilities that were not stored. Beside 64 equally likely tokens, a bucket of mass
    0.01 has mass 0.31 at T = 4 if a hundred tokens share it, and 0.99 if 128,000 do.

    The k entries share the mass that the bucket leaves, so `log_probs_BLM` may be off by a constant for each token.
    """

    ids_BLM: Array  # int32, distinct, below the real vocabulary size
    log_probs_BLM: Array  # float, nats at temperature 1, in any order
    tail_BL: Array  # float32 in [0, 1): mass of all other tokens at temperature 1
    soft_tail_BL: Array  # the same at the temperature of the soft loss


class TeacherOutputs(NamedTuple):
    """The teacher's outputs on a batch: its predictions in one of two forms, and its states by layer.

    Online, `hidden_BLD` is the state that the LM head reads. The head is applied inside the chunked loss, so [B, L, V]
    logits never exist. From a cache, `top_k` has the predictions, and `hidden_BLD` is None.
    `boundary_states` are the states at the boundaries, [B, C, K, D] for each layer.
    `token_states` are the states at every token, [B, L, D] for each layer; online only.
    """

    hidden_BLD: Array | None
    head_DV: Array | None
    boundary_states: dict[int, Array]
    token_states: dict[int, Array]
    top_k: TopK | None = None


class StudentOutputs(NamedTuple):
    """The student's outputs on a batch: the state that its LM head reads, the head, and states by layer.

    Layers are counted from 0 (embeddings) to N (final normed states), as in `TeacherOutputs`.
    """

    hidden_BLS: Array
    head_SV: Array
    boundary_states: dict[int, Array]  # [B, C, K, S] each
    token_states: dict[int, Array]  # [B, L, S] each
