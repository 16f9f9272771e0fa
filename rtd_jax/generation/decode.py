"""Greedy decoding in batches, with a key/value cache.

One program per (batch, prompt bucket, max_new_tokens): the right-padded prompts are read at once, then a while-loop
adds one token a row until every row has ended. Rows that ended early emit the pad id and cost nothing but their seat,
so prompts are sorted by length and padded to few buckets: neighbours end at similar times and little is compiled.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.common.sharding import put_same, to_host
from rtd_jax.common.types import Array, Params

PROMPT_BUCKET = 64  # tokens; prompt lengths are rounded up to a multiple of this, one compiled program each


class CachedModel(Protocol):
    """What decoding needs of a model: a hashable description with pure functions of params."""

    def __hash__(self) -> int: ...

    def prefill(self, params: Params, tokens_BL: Array, lengths_B: Array, cache_length: int) -> tuple[Array, Any]: ...

    def decode(self, params: Params, cache: Any, tokens_B: Array, positions_B: Array) -> tuple[Array, Any]: ...

    def head(self, params: Params) -> Array: ...


def generate(
    model: CachedModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    batch_size: int = 128,
    pad_id: int = 0,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, in the order of the prompts.

    Args:
      model: see `CachedModel`; static under jit.
      params: the model's parameters, on whatever devices and shardings they live; neither changed nor donated.
      prompts: token ids, each at least one.
      max_new_tokens: most tokens added to a prompt, the ending id included.
      eos_ids: ids that end a row.
      vocab_size: ids from here on are padding of the vocabulary and are never chosen.
      batch_size: rows decoded together.
      pad_id: fills prompts on the right, and rows that have ended.
      batch_sharding: where to put [batch] and [batch, length] arrays; None leaves it to the compiler.
      progress: called with (prompts done, prompts in all) after each batch.

    Returns:
      For each prompt the new ids without the ending id; so `max_new_tokens` of them exactly when no end came in time.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, or a limit below one.
    """
    _check(prompts, max_new_tokens, batch_size, vocab_size)
    eos = tuple(sorted({int(i) for i in eos_ids}))
    if batch_sharding is None:
        batch_size = min(batch_size, max(1, len(prompts)))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        bucket = -(-max(len(prompts[i]) for i in rows) // PROMPT_BUCKET) * PROMPT_BUCKET
        tokens_BP = np.full((batch_size, bucket), pad_id, np.int32)
        lengths_B = np.ones(batch_size, np.int32)  # rows that only fill the batch read one pad and are never active
        for row, i in enumerate(rows):
            tokens_BP[row, : len(prompts[i])] = prompts[i]
            lengths_B[row] = len(prompts[i])
        active_B = np.arange(batch_size) < len(rows)
        placed, lengths, active = put_same((tokens_BP, lengths_B, active_B), batch_sharding)
        new_BN, counts_B = greedy(
            model,
            params,
            placed,
            lengths,
            active,
            max_new_tokens=max_new_tokens,
            eos_ids=eos,
            vocab_size=vocab_size,
            pad_id=pad_id,
        )
        new_BN, counts_B = to_host((new_BN, counts_B))
        for row, i in enumerate(rows):
            results[i] = new_BN[row, : counts_B[row]].tolist()
        if progress is not None:
            progress(start + len(rows), len(prompts))
    return results


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "eos_ids", "vocab_size", "pad_id"))
def greedy(
    model: CachedModel,
    params: Params,
    tokens_BP: Array,
    lengths_B: Array,
    active_B: Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    vocab_size: int,
    pad_id: int,
) -> tuple[Array, Array]:
    """Greedy continuation of right-padded prompts, stopping when every active row has ended.

    Args:
      tokens_BP: int32 [B, P] prompts, padded on the right.
      lengths_B: int32 [B] tokens of each prompt, in [1, P].
      active_B: bool [B]; False for rows that only fill the batch.

    Returns:
      int32 [B, N] new ids, `pad_id` from the ending id on (that place included), and int32 [B] how many ids came
      before the end.
    """
    chex.assert_rank([tokens_BP, lengths_B, active_B], [2, 1, 1])
    chex.assert_equal_shape_prefix([tokens_BP, lengths_B, active_B], 1)
    chex.assert_type([tokens_BP, lengths_B, active_B], [jnp.int32, jnp.int32, bool])
    batch, prompt_length = tokens_BP.shape
    eos_1E = jnp.asarray(eos_ids, jnp.int32)[None, :]

    def choose(hidden_BD: Array) -> Array:
        head_DV = model.head(params).astype(hidden_BD.dtype)
        logits_BV = jnp.einsum("bd,dv->bv", hidden_BD, head_DV, preferred_element_type=jnp.float32)
        real_1V = jnp.arange(logits_BV.shape[-1])[None, :] < vocab_size
        return jnp.argmax(jnp.where(real_1V, logits_BV, -jnp.inf), axis=-1).astype(jnp.int32)

    def record(step: Array, chosen_B: Array, alive_B: Array, new_BN: Array, counts_B: Array) -> tuple[Array, ...]:
        alive_B = alive_B & ~jnp.any(chosen_B[:, None] == eos_1E, axis=-1)
        chosen_B = jnp.where(alive_B, chosen_B, pad_id)
        new_BN = jax.lax.dynamic_update_slice(new_BN, chosen_B[:, None], (0, step))
        return chosen_B, alive_B, new_BN, counts_B + alive_B

    def keep_going(state: tuple) -> Array:
        step, _, _, alive_B, _, _ = state
        return (step < max_new_tokens) & jnp.any(alive_B)

    def add_token(state: tuple) -> tuple:
        step, cache, last_B, alive_B, new_BN, counts_B = state
        hidden_BD, cache = model.decode(params, cache, last_B, lengths_B + step - 1)
        return (step + 1, cache, *record(step, choose(hidden_BD), alive_B, new_BN, counts_B))

    hidden_BD, cache = model.prefill(params, tokens_BP, lengths_B, prompt_length + max_new_tokens)
    new_BN = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    first = record(jnp.int32(0), choose(hidden_BD), active_B, new_BN, jnp.zeros(batch, jnp.int32))
    *_, new_BN, counts_B = jax.lax.while_loop(keep_going, add_token, (jnp.int32(1), cache, *first))
    return new_BN, counts_B


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, vocab_size: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both must be at least 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens; give it at least one, such as the tokenizer's bos id")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            worst = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(
                f"prompt {i} has token id {worst}, outside the vocabulary of {vocab_size}; "
                "encode it with the tokenizer that came with this model"
            )
