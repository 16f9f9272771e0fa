"""Greedy or sampled decoding in batches, with a key/value cache.

One program per (batch, padded prompt length, max_new_tokens): the right-padded prompts are read at once, then a
while-loop adds one token a row until every row has ended. Rows that have ended emit the pad id until then, so prompts
are sorted by length and padded to few lengths: a batch's rows end at similar times, and few programs are compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.base.sharding import put_same, to_host
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import LengthBatch, batches_by_length
from rtd_jax.losses.divergences import mask_padding
from rtd_jax.models.model import LlamaModel

PROMPT_MULTIPLE = 64  # tokens; prompts are padded to a multiple of this, and each length compiles a program
STOP_INTERVAL = 16  # tokens after which it is checked again whether the text written so far ends a generation


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to the most probable ids that together reach `top_p`.

    A draw depends on (seed, place of the prompt in the list or its stream, token), not on the batch it was made in.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive (for 0 use greedy decoding)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], and 1 keeps everything")

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """How prompts are continued; static under jit."""

    max_new_tokens: int  # most tokens added to a prompt, the ending id included
    eos_ids: tuple[int, ...]  # ids that end a row
    vocab_size: int  # ids from here on are padding of the vocabulary and are never chosen
    batch_size: int = 128  # rows decoded together
    pad_id: int = 0  # fills prompts on the right, and rows that have ended
    sampling: Sampling | None = None  # None takes the most probable token; for several samples, repeat the prompt

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens} and batch_size {self.batch_size}; both must be at least 1"
            )


class Decoding(NamedTuple):
    """The state of a batch that is being decoded, after `step` new tokens in each row."""

    step: Array  # int32
    cache: Any
    last_B: Array  # int32, the newest token
    alive_B: Array  # bool
    new_BN: Array  # int32
    counts_B: Array  # int32, new tokens before the end


def generate(
    model: LlamaModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSettings,
    *,
    streams: Sequence[int] | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """A continuation of each prompt, in the order of the prompts: the most probable token each time, or drawn.

    Args:
      model: static under jit.
      params: the model's parameters, on whatever devices and shardings they live; neither changed nor donated.
      prompts: token ids, each at least one.
      settings: how they are continued.
      streams: for each prompt the number of its stream of draws, in [0, 2^31); None takes its place in the list. Given,
        a draw does not depend on what else is in the list.
      stopped: called every `STOP_INTERVAL` tokens with a row's new ids; True ends the row. Such a row may have ids
        beyond what made it stop: cut its text.
      batch_sharding: where to put [batch] and [batch, length] arrays; None leaves it to the compiler.
      progress: called with (prompts done, prompts in all) after each batch.

    Returns:
      For each prompt the new ids without the ending id; so `max_new_tokens` of them exactly when no end came in time.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, or a vocabulary that the model has no logits for.
    """
    _check(prompts, settings.vocab_size)
    stream_of = np.arange(len(prompts)) if streams is None else np.asarray(streams)
    rows = settings.batch_size if batch_sharding is not None else min(settings.batch_size, max(1, len(prompts)))
    results: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in batches_by_length(prompts, rows, PROMPT_MULTIPLE, settings.pad_id):
        stream_B = np.zeros(rows, np.int32)
        stream_B[: len(batch.indices)] = stream_of[batch.indices]
        new_BN, counts_B = to_host(_continued(model, params, batch, stream_B, settings, stopped, batch_sharding))
        for row, i in enumerate(batch.indices):
            results[i] = new_BN[row, : counts_B[row]].tolist()
        done += len(batch.indices)
        if progress is not None:
            progress(done, len(prompts))
    return results


def _continued(
    model: LlamaModel,
    params: Params,
    batch: LengthBatch,
    stream_B: np.ndarray,
    settings: GenerateSettings,
    stopped: Callable[[list[int]], bool] | None,
    batch_sharding: jax.sharding.NamedSharding | None,
) -> tuple[Array, Array]:
    """New ids [B, N] of a batch of prompts, and how many of them [B] came before each row's end."""
    # A row that holds no prompt reads one pad and is never active.
    arrays = (batch.tokens_BL, np.maximum(batch.lengths_B, 1), batch.lengths_B > 0)
    tokens, lengths, active = put_same(arrays, batch_sharding)
    if settings.sampling is None and stopped is None:
        return greedy(model, params, tokens, lengths, active, settings=settings)
    (stream,) = put_same((stream_B,), batch_sharding)
    state = _start(model, params, tokens, lengths, active, stream, settings)
    most = settings.max_new_tokens
    interval = most if stopped is None else STOP_INTERVAL
    while int(state.step) < most and np.any(alive_B := np.array(to_host(state.alive_B))):
        if stopped is not None:
            new_BN = to_host(state.new_BN)
            alive_B &= [not (on and stopped(new_BN[b, : int(state.step)].tolist())) for b, on in enumerate(alive_B)]
            state = state._replace(alive_B=put_same((alive_B,), batch_sharding)[0])
        until = jnp.int32(min(int(state.step) + interval, most))
        state = _advance(model, params, lengths, stream, state, until, settings)
    return state.new_BN, state.counts_B


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def greedy(
    model: LlamaModel,
    params: Params,
    tokens_BP: Array,
    lengths_B: Array,
    active_B: Array,
    *,
    settings: GenerateSettings,
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
    streams_B = jnp.arange(tokens_BP.shape[0])  # greedy decoding draws nothing
    state = _first_token(model, params, tokens_BP, lengths_B, active_B, streams_B, settings)
    state = _more_tokens(model, params, lengths_B, streams_B, state, settings.max_new_tokens, settings)
    return state.new_BN, state.counts_B


def _first_token(
    model: LlamaModel,
    params: Params,
    tokens_BP: Array,
    lengths_B: Array,
    active_B: Array,
    streams_B: Array,
    settings: GenerateSettings,
) -> Decoding:
    """Reads the prompts and adds the first token."""
    chex.assert_rank([tokens_BP, lengths_B, active_B, streams_B], [2, 1, 1, 1])
    chex.assert_equal_shape_prefix([tokens_BP, lengths_B, active_B, streams_B], 1)
    chex.assert_type([tokens_BP, lengths_B, active_B, streams_B], [jnp.int32, jnp.int32, bool, int])
    batch, prompt_length = tokens_BP.shape
    hidden_BD, cache = model.prefill(params, tokens_BP, lengths_B, prompt_length + settings.max_new_tokens)
    empty_BN = jnp.full((batch, settings.max_new_tokens), settings.pad_id, jnp.int32)
    state = Decoding(jnp.int32(0), cache, lengths_B, active_B, empty_BN, jnp.zeros(batch, jnp.int32))
    return _choose(model, params, hidden_BD, streams_B, state, settings)


def _more_tokens(
    model: LlamaModel,
    params: Params,
    lengths_B: Array,
    streams_B: Array,
    state: Decoding,
    until: Any,
    settings: GenerateSettings,
) -> Decoding:
    """Adds tokens until there are `until` of them, or every row has ended."""

    def is_unfinished(state: Decoding) -> Array:
        return (state.step < until) & jnp.any(state.alive_B)

    def add_token(state: Decoding) -> Decoding:
        hidden_BD, cache = model.decode(params, state.cache, state.last_B, lengths_B + state.step - 1)
        return _choose(model, params, hidden_BD, streams_B, state._replace(cache=cache), settings)

    return jax.lax.while_loop(is_unfinished, add_token, state)


_start = jax.jit(_first_token, static_argnames=("model", "settings"))
_advance = jax.jit(_more_tokens, static_argnames=("model", "settings"), donate_argnums=4)


def _choose(
    model: LlamaModel,
    params: Params,
    hidden_BD: Array,
    streams_B: Array,
    state: Decoding,
    settings: GenerateSettings,
) -> Decoding:
    """Chooses the next token of each row and writes it down."""
    head_DV = model.head(params).astype(hidden_BD.dtype)
    raw_BV = jnp.einsum("bd,dv->bv", hidden_BD, head_DV, preferred_element_type=jnp.float32)
    if settings.vocab_size > raw_BV.shape[-1]:
        raise ValueError(
            f"vocab_size is {settings.vocab_size}, but the model has logits for {raw_BV.shape[-1]} ids; "
            "use the tokenizer's highest id + 1"
        )
    logits_BV = mask_padding(raw_BV, settings.vocab_size)
    sampling = settings.sampling
    if sampling is None:
        chosen_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        base = jax.random.key(sampling.seed)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(base, row), state.step))(streams_B)
        kept_BV = nucleus(logits_BV / sampling.temperature, sampling.top_p)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
    eos_ids = jnp.asarray(settings.eos_ids, jnp.int32)
    alive_B = state.alive_B & ~jnp.any(chosen_B[:, None] == eos_ids[None, :], axis=-1)
    chosen_B = jnp.where(alive_B, chosen_B, settings.pad_id)
    new_BN = jax.lax.dynamic_update_slice(state.new_BN, chosen_B[:, None], (jnp.int32(0), state.step))
    return Decoding(state.step + 1, state.cache, chosen_B, alive_B, new_BN, state.counts_B + alive_B)


def nucleus(logits_BV: Array, top_p: float) -> Array:
    """Logits of the fewest ids whose probabilities reach `top_p`, -inf elsewhere (arXiv:1904.09751)."""
    if top_p >= 1.0:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # An id is kept while those before it have not reached top_p; the first always is.
    kept_B = jnp.sum(jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < top_p, axis=-1)
    lowest_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def _check(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens; give it at least one, such as the tokenizer's bos id")
        outside = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {i} has token id {outside[0]}, outside the vocabulary of {vocab_size}; "
                "encode it with the tokenizer that came with this model"
            )
