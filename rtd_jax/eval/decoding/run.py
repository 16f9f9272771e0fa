"""Lists of prompts, continued by the program of `slots`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rtd_jax.base.sharding import put_same, to_host
from rtd_jax.base.types import Params
from rtd_jax.data.by_length import round_up
from rtd_jax.eval.decoding import settings as sizes
from rtd_jax.eval.decoding.settings import GenerateSettings
from rtd_jax.eval.decoding.slots import Queue, advance, start
from rtd_jax.models.model import DecoderModel

STOP_INTERVAL = 16  # tokens after which it is checked again whether the text written so far ends a generation
MOST_BATCHES = 64  # texts of a queue, in batches: a queue is on the devices, with room for all that is written
_NEVER = np.int32(2**31 - 1)


def generate(
    model: DecoderModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: GenerateSettings,
    *,
    streams: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    stopped: Callable[[list[int]], bool] | None = None,
    batch_sharding: NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """A continuation of each prompt, in the order of the prompts: the most probable token each time, or drawn.

    `batch_size` texts are written at a time. One that has ended gives its place to the next. Equal prompts are read
    once.

    Args:
      model: static under jit.
      params: the model's parameters, on whatever devices and shardings they live; neither changed nor donated.
      prompts: token ids, each at least one.
      settings: how they are continued.
      streams: for each prompt the number of its stream of draws, in [0, 2^31); None takes its place in the list. Given,
        a draw does not depend on what else is in the list.
      limits: for each prompt its most new tokens, from 1 to `max_new_tokens`; None takes that for all.
      stopped: called every `STOP_INTERVAL` tokens with a row's new ids; True ends the row. Such a row may have ids
        beyond what made it stop: cut its text.
      batch_sharding: where to put arrays with one row a text; caches are spread like the model (`slots.advance`). None
        leaves it to the compiler.
      progress: called with (prompts done, prompts in all) when another `batch_size` prompts are done, and at the end.

    Returns:
      For each prompt the new ids without the ending id; so as many as its limit exactly when no end came in time.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, a vocabulary that the model has no logits for, or a
        limit beyond `max_new_tokens`.
    """
    most = settings.max_new_tokens
    stream_of = np.arange(len(prompts)) if streams is None else np.asarray(streams)
    limit_of = np.full(len(prompts), most) if limits is None else np.asarray(limits)
    _check(prompts, settings.vocab_size)
    for i in np.flatnonzero((limit_of < 1) | (limit_of > most))[:1]:
        raise ValueError(f"the limit of prompt {i} is {limit_of[i]} new tokens; expected 1 to max_new_tokens, {most}")
    rows = settings.batch_size if batch_sharding is not None else min(settings.batch_size, max(1, len(prompts)))
    results: list[list[int]] = [[] for _ in prompts]
    # Long prompts, whose texts tend to be long too, come first, so that no long text is left alone at the end.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    for begin in range(0, len(order), rows * MOST_BATCHES):
        chosen = order[begin : begin + rows * MOST_BATCHES]
        queue = _queue([prompts[i] for i in chosen], stream_of[chosen], limit_of[chosen], rows)
        report = None if progress is None else lambda done, begin=begin: progress(begin + done, len(order))
        new_QN, counts_Q = _written(model, params, queue, rows, settings, stopped, batch_sharding, report)
        for i, new_N, count in zip(chosen, new_QN, counts_Q, strict=False):  # the queue is padded
            results[i] = new_N[:count].tolist()
    return results


def _queue(prompts: Sequence[Sequence[int]], streams: np.ndarray, limits: np.ndarray, rows: int) -> Queue:
    """Texts of prompts that stand in order, equal ones together; padded, so that few programs are compiled."""
    texts = rows
    while texts < len(prompts):
        texts *= 2
    prompts_UP = np.zeros((texts, round_up(max(map(len, prompts)), sizes.PROMPT_MULTIPLE)), np.int32)
    lengths_U = np.ones(texts, np.int32)
    prompt_of_Q, streams_Q, limits_Q = (np.zeros(texts, np.int32) for _ in range(3))
    streams_Q[: len(prompts)], limits_Q[: len(prompts)] = streams, limits
    place = -1
    for text, prompt in enumerate(prompts):
        if not text or list(prompt) != list(prompts[text - 1]):
            place += 1
            prompts_UP[place, : len(prompt)] = prompt
            lengths_U[place] = len(prompt)
        prompt_of_Q[text] = place
    on_host: tuple[Any, ...] = (
        prompts_UP,
        lengths_U,
        prompt_of_Q,
        streams_Q,
        limits_Q,
        np.array(len(prompts), np.int32),
    )
    return Queue(*on_host)


def _written(
    model: DecoderModel,
    params: Params,
    queue: Queue,
    rows: int,
    settings: GenerateSettings,
    stopped: Callable[[list[int]], bool] | None,
    batch_sharding: NamedSharding | None,
    report: Callable[[int], None] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """New ids [Q, N] of the texts of a queue, and how many of them [Q] came before each text's end.

    The program runs to the end, unless the host has something to say or to ask in between. What it decides follows from
    arrays that all processes have.
    """
    texts = int(queue.texts)
    queue = put_same(queue, None if batch_sharding is None else NamedSharding(batch_sharding.mesh, PartitionSpec()))
    how = {"settings": settings, "rows": batch_sharding}
    state = start(model, params, queue, slots=rows, **how)
    reported = done = steps = 0
    while done < texts:
        until_steps = _NEVER if stopped is None else np.int32(steps + STOP_INTERVAL)
        until_done = _NEVER if report is None else np.int32(reported + rows)
        state = advance(model, params, queue, state, until_steps, until_done, **how)
        steps, taken, alive_B = to_host((state.steps, state.taken, state.slots.alive_B))
        if stopped is not None and np.any(alive_B):
            new_BN, counts_B = to_host((state.slots.new_BN, state.slots.counts_B))
            alive_B = np.array(
                [on and not stopped(new_BN[b, : counts_B[b]].tolist()) for b, on in enumerate(alive_B)], bool
            )
            # As the program left it: another way to write the same sharding would compile the program again.
            alive = jax.device_put(alive_B, None if batch_sharding is None else state.slots.alive_B.sharding)
            state = state._replace(slots=state.slots._replace(alive_B=alive))
        done = int(taken) - int(np.sum(alive_B))
        if report is not None and (done >= reported + rows or done == texts):
            report(done)
            reported = done
    return to_host((state.new_QN, state.counts_Q))


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
