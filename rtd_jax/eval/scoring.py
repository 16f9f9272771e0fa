"""Teacher-forced scores of given text: for each token, its log-probability and whether it would have been chosen.

One jitted pass serves perplexity and step accuracy. The head is applied to a slice of the row at a time, so [B, L, V]
logits never exist and a 128k vocabulary fits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.base.sharding import put_same, to_host
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import round_up
from rtd_jax.data.packing import Features, packed_rows
from rtd_jax.losses.fused import map_logits
from rtd_jax.models.model import DecoderModel

ROW_MULTIPLE = 64  # tokens; row lengths are rounded up to it, so few programs are compiled
FEATURES = ("tokens", "tokens_positions", "tokens_segment_ids", "chain")  # of a packed row; `chain` is its number


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """The shape of the batches in which given text is scored."""

    row_length: int = 512  # tokens of a packed row
    batch_size: int = 8  # rows of that length scored together; fewer where rows are longer
    chunk_tokens: int = 512  # tokens whose float32 logits exist at one time


class TokenScores(NamedTuple):
    """Index l scores token l as predicted from the tokens before it in its chain.

    The first token of a chain has no prediction, and padding has none: log-probability 0 and chosen False there.
    """

    log_probs: Array  # float32, nats
    chosen: Array  # bool, the token is the argmax


@functools.partial(jax.jit, static_argnames=("model", "vocab_size", "chunk_tokens"))
def token_scores(
    model: DecoderModel,
    params: Params,
    tokens_BL: Array,
    positions_BL: Array,
    chain_ids_BL: Array,
    *,
    vocab_size: int,
    chunk_tokens: int = 512,
) -> TokenScores:
    """Scores packed rows; both fields [B, L].

    Args:
      tokens_BL, positions_BL, chain_ids_BL: int32 [B, L] as in `rtd_jax.base.types.Batch`.
      vocab_size: ids from here on are padding of the vocabulary and get no probability.
      chunk_tokens: tokens whose float32 logits exist at one time, rounded to whole columns of B.
    """
    chex.assert_rank([tokens_BL, positions_BL, chain_ids_BL], 2)
    chex.assert_equal_shape([tokens_BL, positions_BL, chain_ids_BL])
    chex.assert_type([tokens_BL, positions_BL, chain_ids_BL], int)
    rows, length = tokens_BL.shape
    hidden_BLD = model.hidden(params, tokens_BL, positions_BL, chain_ids_BL)
    labels_BL = jnp.roll(tokens_BL, -1, axis=1)

    def score(logits_BcV: Array, labels_Bc: Array) -> TokenScores:
        label_Bc = jnp.take_along_axis(logits_BcV, labels_Bc[..., None], axis=-1)[..., 0]
        log_probs_Bc = label_Bc - jax.nn.logsumexp(logits_BcV, axis=-1)
        return TokenScores(log_probs_Bc, jnp.argmax(logits_BcV, axis=-1) == labels_Bc)

    scores_BL = map_logits(
        score,
        hidden_BLD,
        model.head(params),
        (labels_BL,),
        vocab_size=vocab_size,
        chunk_length=max(1, chunk_tokens // rows),
    )
    # From the place that makes a prediction to the token that it predicts.
    same_chain_BL = (chain_ids_BL == jnp.roll(chain_ids_BL, 1, axis=1)) & (chain_ids_BL > 0)
    predicted_BL = same_chain_BL & (jnp.arange(length)[None, :] > 0)
    return jax.tree.map(lambda x: jnp.where(predicted_BL, jnp.roll(x, 1, axis=1), jnp.zeros((), x.dtype)), scores_BL)


def score_chains(
    model: DecoderModel,
    params: Params,
    chains: Sequence[Sequence[int]],
    settings: ScoringSettings = ScoringSettings(),
    *,
    vocab_size: int,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenScores]:
    """Scores every token of every chain; NumPy arrays as long as the chain, in the order given.

    Short chains share rows of `settings.row_length` tokens. A longer one has a row of its own, beside others of about
    its length: batches are as long as their longest row, and hold about as many tokens, whatever that length is.

    Args:
      chains: token ids, each at least one.
      settings: the shape of the batches.
      vocab_size: ids from here on are padding of the vocabulary and get no probability.
      batch_sharding: where to put [batch] and [batch, length] arrays; None leaves it to the compiler. Batches are a
        multiple of the devices that it spreads rows over.
      progress: called with (chains scored, chains in all) after each batch.

    Raises:
      ValueError: an empty chain, or an id outside the vocabulary.
    """
    for i, chain in enumerate(chains):
        if not len(chain):
            raise ValueError(f"chain {i} has no tokens; leave it out")
        if min(chain) < 0 or max(chain) >= vocab_size:
            raise ValueError(
                f"chain {i} has token ids from {min(chain)} to {max(chain)}, but the vocabulary has {vocab_size}; "
                "encode it with the tokenizer that came with this model"
            )
    row_length = round_up(settings.row_length, ROW_MULTIPLE)
    devices = 1 if batch_sharding is None else batch_sharding.num_devices
    ways = 1 if batch_sharding is None else devices // batch_sharding.shard_shape((devices, 1))[0]
    scores: list[TokenScores] = [TokenScores(np.empty(0), np.empty(0))] * len(chains)
    done = 0
    for rows, size, length in _batches(_packed(chains, row_length), row_length, settings.batch_size, ways):
        arrays_BL = np.zeros((len(FEATURES), size, length), np.int32)
        for row, features in enumerate(rows):
            for array_BL, name in zip(arrays_BL, FEATURES, strict=True):
                kept = features[name][:length]
                array_BL[row, : len(kept)] = kept
        *fed, chain_BL = arrays_BL
        placed = put_same(tuple(fed), batch_sharding)
        result = token_scores(model, params, *placed, vocab_size=vocab_size, chunk_tokens=settings.chunk_tokens)
        log_probs_BL, chosen_BL = to_host((result.log_probs, result.chosen))
        for row, numbers in enumerate(chain_BL):
            for number in np.unique(numbers[numbers > 0]):
                is_chain = numbers == number
                scores[number - 1] = TokenScores(log_probs_BL[row, is_chain], chosen_BL[row, is_chain])
                done += 1
        if progress is not None:
            progress(done, len(chains))
    return scores


def _packed(chains: Sequence[Sequence[int]], row_length: int) -> list[Features]:
    """Rows of `FEATURES`, long ones first: a chain longer than a row has its own, others share the first with room."""
    items = [
        {"tokens": np.asarray(chain, np.int32), "chain": np.full(len(chain), number, np.int32)}
        for number, chain in sorted(enumerate(chains, start=1), key=lambda pair: -len(pair[1]))
    ]
    short = [item for item in items if len(item["tokens"]) <= row_length]
    long = [packed_rows([item], len(item["tokens"]), open_rows=1)[0] for item in items[: len(items) - len(short)]]
    return long + packed_rows(short, row_length, open_rows=len(short))


def _batches(
    rows: Sequence[Features], row_length: int, batch_size: int, ways: int
) -> Iterator[tuple[Sequence[Features], int, int]]:
    """(rows, size, length) of each batch, long rows first; a few sizes and lengths only, one compiled program each."""
    used = [int(np.count_nonzero(row["chain"])) for row in rows]
    start = 0
    while start < len(rows):
        # Rows with room for several chains are all full enough; giving them one length saves programs.
        length = round_up(max(used[start], min(row_length, max(used))), ROW_MULTIPLE)
        most = max(1, batch_size * row_length // length // ways) * ways
        left = len(rows) - start
        size = min(most, ways * 2 ** math.ceil(math.log2(max(1, left / ways))))
        yield rows[start : start + size], size, length
        start += size
