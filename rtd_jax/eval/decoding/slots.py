"""Continuous batching as one program: slots are decoded together, and one whose text has ended takes the next prompt.

A loop alternates between two things. It refills: where the texts in some slots have ended, the next prompts of a queue
take their places; prompts are read a few at a time, each once however many texts continue it. And it decodes: every
step adds a token to each slot, until enough slots are free again or nothing is left to do. There is a loop of steps for
each length that is attended to, and refilling stands between loops: under a condition XLA would copy the caches.

Axes beside those of `rtd_jax.base.types`: B slots, Q texts to be written, U prompts, P tokens of a prompt, W prompts
that are read together, N new tokens (but layers, as the first axis of a cache).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rtd_jax.base.sharding import MeshAxes, mesh_spec
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import round_up
from rtd_jax.eval.decoding.next_token import next_tokens
from rtd_jax.eval.decoding.settings import PROMPT_MULTIPLE, GenerateSettings
from rtd_jax.models.model import DecoderModel

LENGTHS = 4  # most static lengths, of prompts that are read and of what a step attends to; each is compiled
ATTENDED_MULTIPLE = 128  # tokens; a step attends to a multiple of this


class Queue(NamedTuple):
    """What is to be written. The texts of one prompt are neighbours, and prompts come in the order of their texts."""

    prompts_UP: jax.Array  # int32, padded on the right
    lengths_U: jax.Array  # int32, tokens of each prompt
    prompt_of_Q: jax.Array  # int32, the prompt of each text
    streams_Q: jax.Array  # int32, the text's stream of draws
    limits_Q: jax.Array  # int32, its most new tokens, at least 1
    texts: jax.Array  # int32, how many texts there are; what follows is padding


class Shelf(NamedTuple):
    """The W prompts that were read last: texts that continue them copy their keys and values into slots."""

    cache: Any  # of P positions
    hidden_WD: jax.Array  # the state that the first new token is chosen from
    first: jax.Array  # int32, the first of these prompts


class Slots(NamedTuple):
    """The texts that are being written."""

    cache: Any  # of P + N positions
    text_B: jax.Array  # int32, the newest text of each slot; Q where there was none
    streams_B: jax.Array  # int32, the text's stream of draws
    limits_B: jax.Array  # int32, its most new tokens
    last_B: jax.Array  # int32, the newest token, which is not in the cache yet
    positions_B: jax.Array  # int32, its position
    alive_B: jax.Array  # bool, whether the text goes on
    new_BN: jax.Array  # int32
    counts_B: jax.Array  # int32, new tokens


class Progress(NamedTuple):
    """Where the program stands."""

    steps: jax.Array  # int32, tokens that were added to every slot
    taken: jax.Array  # int32, texts that have or had a slot
    slots: Slots
    shelf: Shelf
    new_QN: jax.Array  # int32, what was written; behind its end, pad ids
    counts_Q: jax.Array  # int32, new tokens before the end

    @property
    def done(self) -> Array:
        """How many texts have ended."""
        return self.taken - jnp.sum(self.slots.alive_B, dtype=jnp.int32)


def rows_read(slots: int, rows: NamedSharding | None) -> int:
    """W: a sixteenth of the slots, or more where devices share them. As many are free before any is filled again."""
    ways = 1
    if rows is not None and rows.spec and rows.spec[0]:
        names = (rows.spec[0],) if isinstance(rows.spec[0], str) else rows.spec[0]
        ways = math.prod(rows.mesh.shape[name] for name in names)
    return min(slots, round_up(-(-slots // 16), ways))


@functools.partial(jax.jit, static_argnames=("model", "slots", "settings", "rows"))
def start(
    model: DecoderModel,
    params: Params,
    queue: Queue,
    *,
    slots: int,
    settings: GenerateSettings,
    rows: NamedSharding | None = None,
) -> Progress:
    """Empty slots and an empty shelf."""
    texts, read, prompt_length = len(queue.prompt_of_Q), rows_read(slots, rows), queue.prompts_UP.shape[1]

    def empty(batch: int, length: int) -> tuple[jax.Array, Any]:
        shapes = jax.eval_shape(
            functools.partial(model.prefill, cache_length=length),
            params,
            jax.ShapeDtypeStruct((batch, prompt_length), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    zero, zeros_B = jnp.int32(0), jnp.zeros(slots, jnp.int32)
    nothing_BN = jnp.full((slots, settings.max_new_tokens), settings.pad_id, jnp.int32)
    nothing_QN = jnp.full((texts, settings.max_new_tokens), settings.pad_id, jnp.int32)
    cache = empty(slots, prompt_length + settings.max_new_tokens)[1]
    hidden_WD, shelved = empty(read, prompt_length)
    in_slots = Slots(
        cache, zeros_B + texts, zeros_B, zeros_B, zeros_B, zeros_B, jnp.zeros(slots, bool), nothing_BN, zeros_B
    )
    shelf = Shelf(shelved, hidden_WD, jnp.int32(-read))
    return _placed(Progress(zero, zero, in_slots, shelf, nothing_QN, jnp.zeros(texts, jnp.int32)), model, rows)


@functools.partial(jax.jit, static_argnames=("model", "settings", "rows"), donate_argnames="progress")
def advance(
    model: DecoderModel,
    params: Params,
    queue: Queue,
    progress: Progress,
    until_steps: Array,
    until_done: Array,
    *,
    settings: GenerateSettings,
    rows: NamedSharding | None = None,
) -> Progress:
    """Writes until `steps` or `done` of the progress have reached a limit, or all texts have ended.

    Args:
      progress: donated.
      rows: sharding of arrays with one row a slot; caches have their rows spread like the model's activations, and
        their heads over the other axes of its mesh. None leaves all to the compiler.
    """
    chex.assert_rank(list(queue), [2, 1, 1, 1, 1, 0])
    chex.assert_type(list(queue), jnp.int32)
    prompt_length = queue.prompts_UP.shape[1]
    lengths = static_lengths(prompt_length + settings.max_new_tokens, ATTENDED_MULTIPLE)

    def goes_on(progress: Progress) -> Array:
        return (progress.done < jnp.minimum(queue.texts, until_done)) & (progress.steps < until_steps)

    def needs_refill(progress: Progress) -> Array:
        waiting = queue.texts - progress.taken
        free = jnp.sum(~progress.slots.alive_B, dtype=jnp.int32)
        return (waiting > 0) & (free >= jnp.minimum(len(progress.shelf.hidden_WD), waiting))

    def longest(progress: Progress) -> Array:
        return jnp.max(jnp.where(progress.slots.alive_B, progress.slots.positions_B, -1)) + 1

    def decode(progress: Progress, length: int) -> Progress:
        def fits(progress: Progress) -> Array:
            return goes_on(progress) & ~needs_refill(progress) & (longest(progress) <= length)

        def add_token(progress: Progress) -> Progress:
            slots = with_next_token(model, params, progress.slots, length, settings)
            return progress._replace(steps=progress.steps + 1, slots=slots)

        return jax.lax.while_loop(fits, add_token, progress)

    def refill_and_decode(progress: Progress) -> Progress:
        progress = _refilled(model, params, queue, progress, settings, rows)
        return functools.reduce(decode, lengths, _placed(progress, model, rows))  # each loop goes on where texts fit it

    progress = jax.lax.while_loop(goes_on, refill_and_decode, progress)
    return _placed(_written_down(progress), model, rows)


def static_lengths(longest: int, multiple: int) -> list[int]:
    """The quarters of a length, rounded up to a multiple; few where the length is short."""
    parts = (round_up(-(-longest * part // LENGTHS), multiple) for part in range(1, LENGTHS + 1))
    return sorted({min(part, longest) for part in parts})


def with_next_token(
    model: DecoderModel, params: Params, slots: Slots, length: int, settings: GenerateSettings
) -> Slots:
    """Reads the newest token of each slot and adds the next one where the text goes on."""
    hidden_BD, cache = model.decode(params, slots.cache, slots.last_B, slots.positions_B, length)
    chosen_B, is_end_B = next_tokens(model, params, hidden_BD, slots.streams_B, slots.counts_B, settings)
    adds_B = slots.alive_B & ~is_end_B
    is_place_BN = jnp.arange(settings.max_new_tokens, dtype=jnp.int32)[None] == slots.counts_B[:, None]
    counts_B = slots.counts_B + adds_B
    return slots._replace(
        cache=cache,
        last_B=jnp.where(adds_B, chosen_B, slots.last_B),
        positions_B=slots.positions_B + adds_B,
        alive_B=adds_B & (counts_B < slots.limits_B),
        new_BN=jnp.where(is_place_BN & adds_B[:, None], chosen_B[:, None], slots.new_BN),
        counts_B=counts_B,
    )


def _refilled(
    model: DecoderModel,
    params: Params,
    queue: Queue,
    progress: Progress,
    settings: GenerateSettings,
    rows: NamedSharding | None,
) -> Progress:
    """Gives free slots to the next texts, at most W, whose prompts are or can be put on the shelf."""
    progress = _written_down(progress)
    shelf = restocked(model, params, queue, progress)
    slots, (read,) = progress.slots, shelf.hidden_WD.shape[:1]
    text_W = progress.taken + jnp.arange(read, dtype=jnp.int32)
    place_W = queue.prompt_of_Q.at[text_W].get(mode="fill", fill_value=0) - shelf.first  # on the shelf
    free_W = jnp.nonzero(~slots.alive_B, size=read, fill_value=len(slots.alive_B))[0].astype(jnp.int32)
    takes_W = (text_W < queue.texts) & (place_W < read) & (free_W < len(slots.alive_B))
    slot_W, place_W = jnp.where(takes_W, free_W, len(slots.alive_B)), jnp.clip(place_W, 0, read - 1)

    streams_W, limits_W = (x.at[text_W].get(mode="fill", fill_value=0) for x in (queue.streams_Q, queue.limits_Q))
    none_W = jnp.zeros(read, jnp.int32)
    chosen_W, is_end_W = next_tokens(model, params, shelf.hidden_WD[place_W], streams_W, none_W, settings)
    new_WN = jnp.full((read, settings.max_new_tokens), settings.pad_id, jnp.int32)
    lengths_W = queue.lengths_U.at[shelf.first + place_W].get(mode="fill", fill_value=1)
    # Positions behind the prompt have what an earlier text left there, and are written before they are read.
    prompt_length, shelved = queue.prompts_UP.shape[1], shelf.cache
    if rows is not None:  # any slot may take any of these prompts
        whole = _cache_shardings(shelved, model, rows, is_spread=False)
        shelved = jax.lax.with_sharding_constraint(shelved, whole)
    cache = jax.tree.map(
        lambda x, shelved: x.at[:, slot_W, :, :prompt_length].set(shelved[:, place_W], mode="drop"),
        slots.cache,
        shelved,
    )
    taken = Slots(
        cache,
        text_W,
        streams_W,
        limits_W,
        last_B=chosen_W,
        positions_B=lengths_W,
        alive_B=~is_end_W & (limits_W > 1),
        new_BN=new_WN.at[:, 0].set(jnp.where(is_end_W, settings.pad_id, chosen_W)),
        counts_B=(~is_end_W).astype(jnp.int32),
    )
    others = {
        name: getattr(slots, name).at[slot_W].set(getattr(taken, name), mode="drop")
        for name in Slots._fields
        if name != "cache"
    }
    count = jnp.sum(takes_W, dtype=jnp.int32)
    return progress._replace(taken=progress.taken + count, slots=Slots(cache, **others), shelf=shelf)


def restocked(model: DecoderModel, params: Params, queue: Queue, progress: Progress) -> Shelf:
    """The shelf, with the next W prompts read if the next text's prompt is not on it."""
    shelf, (read,) = progress.shelf, progress.shelf.hidden_WD.shape[:1]
    prompt_length = queue.prompts_UP.shape[1]
    first = shelf.first + read
    prompt_W = first + jnp.arange(read, dtype=jnp.int32)
    tokens_WP = queue.prompts_UP.at[prompt_W].get(mode="fill", fill_value=0)
    lengths_W = queue.lengths_U.at[prompt_W].get(mode="fill", fill_value=1)

    def read_prompts(length: int, _: Shelf) -> Shelf:
        hidden_WD, cache = model.prefill(params, tokens_WP[:, :length], lengths_W, prompt_length)
        return Shelf(cache, hidden_WD, first)

    lengths = static_lengths(prompt_length, PROMPT_MULTIPLE)
    next_prompt = queue.prompt_of_Q.at[progress.taken].get(mode="fill", fill_value=0)
    is_missing = (progress.taken < queue.texts) & (next_prompt >= first)
    shorter = jnp.sum(jnp.max(lengths_W) > jnp.asarray(lengths, jnp.int32), dtype=jnp.int32)
    branches: list[Callable[[Shelf], Shelf]] = [lambda shelf: shelf]
    branches += [functools.partial(read_prompts, length) for length in lengths]
    return jax.lax.switch(jnp.where(is_missing, 1 + shorter, 0), branches, shelf)


def _written_down(progress: Progress) -> Progress:
    """Copies what stands in the slots to the places of their texts."""
    slots = progress.slots
    new_QN = progress.new_QN.at[slots.text_B].set(slots.new_BN, mode="drop")
    return progress._replace(
        new_QN=new_QN, counts_Q=progress.counts_Q.at[slots.text_B].set(slots.counts_B, mode="drop")
    )


def shardings(progress: Progress, model: DecoderModel, rows: NamedSharding) -> Progress:
    """Where the arrays of the progress lie, as `advance` says; axes that do not divide an array leave it whole."""
    mesh, of_rows = _mesh(rows), rows.spec[0] if rows.spec else None

    def placed(tree: Any, first: MeshAxes = None) -> Any:
        def of(x: Array) -> NamedSharding:
            return NamedSharding(mesh, mesh_spec(x.shape, [first, *[None] * x.ndim][: x.ndim], mesh))

        return jax.tree.map(of, tree)

    slots = placed(progress.slots, of_rows)._replace(cache=_cache_shardings(progress.slots.cache, model, rows))
    shelf = placed(progress.shelf)._replace(cache=_cache_shardings(progress.shelf.cache, model, rows))
    return placed(progress)._replace(slots=slots, shelf=shelf)


def _placed(progress: Progress, model: DecoderModel, rows: NamedSharding | None) -> Progress:
    if rows is None:
        return progress
    return jax.lax.with_sharding_constraint(progress, shardings(progress, model, rows))


def _cache_shardings(cache: Any, model: DecoderModel, rows: NamedSharding, *, is_spread: bool = True) -> Any:
    """Of a cache: its rows are spread like the model's activations, or whole, its heads over the other mesh axes.

    Where the heads are too few for these, rows are spread over them, too: a cache is large enough to be worth it.
    """
    mesh, spec = _mesh(rows), (model.activation_sharding or rows).spec
    of_rows = (spec[0],) if spec and isinstance(spec[0], str) else tuple(spec[0] or ()) if spec else ()

    def of(x: Array) -> NamedSharding:
        left = tuple(name for name in mesh.axis_names if name not in of_rows)
        taken = next(i for i in range(len(left) + 1) if not x.shape[2] % math.prod(mesh.shape[n] for n in left[i:]))
        axes = (None, (*of_rows, *left[:taken]) if is_spread else None, left[taken:], None, None)
        return NamedSharding(mesh, mesh_spec(x.shape, axes, mesh))

    return jax.tree.map(of, cache)


def _mesh(rows: NamedSharding) -> Mesh:
    assert isinstance(rows.mesh, Mesh)
    return rows.mesh
