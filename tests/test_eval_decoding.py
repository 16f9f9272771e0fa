"""Cached batched decoding against the plain loop that reads the whole text again for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtd_jax.base.sharding import (
    FSDP,
    TENSOR,
    MeshSettings,
    activation_sharding,
    make_mesh,
    param_shardings,
    row_sharding,
)
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate, placement, run, settings
from rtd_jax.eval.decoding.next_token import nucleus
from rtd_jax.eval.decoding.placement import for_writing
from rtd_jax.eval.decoding.slots import Queue, advance, start
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.weights import logical_axes

VOCAB, PADDED = 29, 32
MODEL = DecoderModel(
    DecoderConfig(vocab_size=PADDED, width=16, mlp_width=32, layers=2, heads=4, kv_heads=2, head_dim=4, init_std=0.5)
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, size).tolist() for size in (9, 3, 14, 1, 6, 7, 2)]


def uncached(params, prompt: list[int], count: int, eos_ids=()) -> list[int]:
    """Argmax over the real vocabulary, one full forward pass a token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        row = np.zeros(
            (1, 64), np.int32
        )  # causal: what stands to the right does not matter, and one shape compiles once
        row[0, : len(tokens)] = tokens
        hidden = _hidden(params, row)[0, len(tokens) - 1]
        logits = np.asarray(hidden, np.float64) @ np.asarray(MODEL.head(params), np.float64)
        chosen = int(np.argmax(logits[:VOCAB]))
        if chosen in eos_ids:
            break
        tokens.append(chosen)
    return tokens[len(prompt) :]


@jax.jit
def _hidden(params, tokens_BL):
    positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return MODEL.hidden(params, tokens_BL, positions, jnp.ones_like(tokens_BL))


def options(**changes):
    settings = {"max_new_tokens": 12, "eos_ids": (), "vocab_size": VOCAB, "batch_size": 3, "pad_id": 0, **changes}
    others = {name: settings.pop(name) for name in ("stopped", "progress", "batch_sharding") if name in settings}
    return {"settings": GenerateSettings(**settings), **others}


def test_cached_equals_uncached_and_order_is_restored(params, prompts):
    # Prompts differ in length and in continuation, so a row in another's place, or a wrong position, would show.
    expected = [uncached(params, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == len(prompts)
    assert generate(MODEL, params, prompts, **options()) == expected


def test_rows_end_at_their_own_end(params, prompts):
    free = [uncached(params, prompt, 12) for prompt in prompts]
    eos_ids = (free[0][4], free[2][7])
    expected = [uncached(params, prompt, 12, eos_ids) for prompt in prompts]
    lengths = {len(row) for row in expected}
    assert len(lengths) > 2  # some end early, at different places
    assert generate(MODEL, params, prompts, **options(eos_ids=eos_ids)) == expected


def test_a_bucket_boundary_changes_nothing(params, prompts, monkeypatch):
    expected = generate(MODEL, params, prompts, **options())
    monkeypatch.setattr(settings, "PROMPT_MULTIPLE", 7)  # prompts of 7 fill their bucket, 9 and 14 need two
    assert generate(MODEL, params, prompts, **options()) == expected


def test_one_new_token_and_no_prompts(params, prompts):
    expected = [uncached(params, prompt, 1) for prompt in prompts]
    assert generate(MODEL, params, prompts, **options(max_new_tokens=1)) == expected
    assert generate(MODEL, params, [], **options()) == []


def test_padded_vocabulary_is_never_chosen(params, prompts):
    # The padded rows would win every argmax: their columns of the head are far larger than any other.
    loud = dict(params, head=params["head"].at[:, VOCAB:].mul(1000.0))
    hidden = _hidden(loud, np.asarray([prompts[0]], np.int32))[0, -1]
    assert np.argmax(np.abs(np.asarray(hidden @ loud["head"]))) >= VOCAB
    assert generate(MODEL, loud, prompts, **options()) == generate(MODEL, params, prompts, **options())


class Countdown:
    """A model that says: the token after t is t - 1. It counts the steps and the prompts that were asked of it."""

    activation_sharding = None

    def __init__(self):
        self.calls = self.read = 0

    def _count(self, _):
        self.calls += 1

    def _count_prompts(self, tokens_BL):
        self.read += int(np.sum(np.any(np.asarray(tokens_BL) != 0, axis=1)))  # rows that hold no prompt are zeros

    def prefill(self, params, tokens_BL, lengths_B, cache_length):
        jax.debug.callback(self._count_prompts, tokens_BL)
        last_B = jnp.take_along_axis(tokens_BL, lengths_B[:, None] - 1, axis=1)[:, 0]
        return jax.nn.one_hot(last_B, PADDED), ()

    def decode(self, params, cache, tokens_B, positions_B, length):
        jax.debug.callback(self._count, positions_B)
        return jax.nn.one_hot(tokens_B, PADDED), ()

    def head(self, params):
        return jnp.roll(jnp.eye(PADDED), -1, axis=1)


def test_decoding_stops_when_every_row_has_ended():
    model = Countdown()
    prompts = [[5], [9, 3], [1]]
    result = generate(model, {}, prompts, **options(eos_ids=(0,), max_new_tokens=500, batch_size=8, pad_id=31))
    jax.effects_barrier()
    assert result == [[4, 3, 2, 1], [2, 1], []]
    assert model.calls == 4  # prefill gives the first id of each; the longest row needs four more, its end included


def test_a_free_slot_takes_the_next_prompt_at_once():
    """Texts of 9, 5, 3 and 1 tokens and their ends: two slots are free after 10 steps, where batches of two need 12."""
    model = Countdown()
    prompts = [[9], [1], [5], [3]]  # equal in length, so their order is that of their ids: 1, 3 | 5, 9
    result = generate(model, {}, prompts, **options(eos_ids=(0,), max_new_tokens=500, batch_size=2, pad_id=20))
    jax.effects_barrier()
    assert result == [list(range(n - 1, 0, -1)) for (n,) in prompts]
    # The first token of a text comes with its prompt. 1 ends so; 5 takes its slot, and 9 that of 3 after two steps.
    assert model.calls == 2 + 8
    assert model.read == 4


def test_a_prompt_is_read_once_for_all_its_samples():
    for samples, batch_size in ((1, 2), (5, 2), (5, 8), (40, 3)):
        model, prompts = Countdown(), [prompt for prompt in ([5], [9, 3], [2, 2]) for _ in range(samples)]
        generate(model, {}, prompts, **options(eos_ids=(0,), batch_size=batch_size))
        jax.effects_barrier()
        assert model.read == 3


def test_a_texts_own_limit_ends_it(params, prompts):
    limits = [12, 1, 5, 12, 2, 7, 1]
    found = generate(MODEL, params, prompts, limits=limits, **options())
    whole = generate(MODEL, params, prompts, **options())
    assert found == [row[:limit] for row, limit in zip(whole, limits, strict=True)]
    for limit in (0, 13):
        with pytest.raises(ValueError, match=f"the limit of prompt 2 is {limit} new tokens; expected 1 to .* 12"):
            generate(MODEL, params, prompts, limits=[1, 1, limit, *limits[3:]], **options())


@pytest.mark.parametrize(
    ("sampling", "sizes", "table"),
    [(None, (2, 2, 2), FSDP), (Sampling(0.8, seed=2), (1, 8, 1), FSDP), (Sampling(0.8, seed=2), (1, 4, 2), TENSOR)],
    ids=["greedy", "sampled", "sampled, activations travel"],
)
def test_neither_slots_nor_neighbours_nor_the_mesh_change_a_text(params, prompts, sampling, sizes, table):
    """Each text as it is when it is written alone: samples of one prompt, more texts than slots, ends at once."""
    twice = [prompt for prompt in prompts for _ in range(2)]
    streams = [7 * i + 3 for i in range(len(twice))]
    free = generate(MODEL, params, twice, streams=streams, **options(sampling=sampling))
    eos_ids = (free[4][0], free[9][3])  # of one text the first token, of another the fourth
    how = {"sampling": sampling, "eos_ids": eos_ids}
    alone = [
        generate(MODEL, params, [prompt], streams=[stream], **options(**how))[0]
        for prompt, stream in zip(twice, streams, strict=True)
    ]
    assert alone[4] == []
    assert len({len(ids) for ids in alone}) > 2
    assert generate(MODEL, params, twice, streams=streams, **options(**how, batch_size=4)) == alone
    mesh = make_mesh(MeshSettings(*sizes))
    model = dataclasses.replace(MODEL, activation_sharding=activation_sharding(mesh, table))
    placed = jax.device_put(params, param_shardings(params, logical_axes(params), mesh, table))
    sharded = options(**how, batch_size=8, batch_sharding=row_sharding(mesh))
    assert generate(model, placed, twice, streams=streams, **sharded) == alone


def test_a_long_list_goes_through_several_queues(params, prompts, monkeypatch):
    expected = generate(MODEL, params, prompts, **options())
    monkeypatch.setattr(run, "MOST_BATCHES", 1)
    seen = []
    assert generate(MODEL, params, prompts, **options(progress=lambda *counts: seen.append(counts))) == expected
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("sizes", [None, (1, 8, 1)])
def test_questions_of_the_host_compile_nothing_again(params, prompts, monkeypatch, sizes):
    monkeypatch.setattr(run, "STOP_INTERVAL", 2)
    advance.clear_cache()
    rows = {} if sizes is None else {"batch_sharding": row_sharding(make_mesh(MeshSettings(*sizes))), "batch_size": 8}
    generate(MODEL, params, prompts, **options(stopped=lambda ids: len(ids) > 4, progress=lambda *counts: None, **rows))
    assert advance._cache_size() == 1


def test_the_cache_lies_like_the_model(params):
    """Rows over (data, fsdp) and heads over tensor where weights travel; where activations do, heads over both."""
    settings, queue = GenerateSettings(4, (), VOCAB), Queue(*(np.zeros(n, np.int32) for n in ((8, 64), 8, 8, 8, 8, ())))
    for table, spec in ((FSDP, (None, ("data", "fsdp"), "tensor")), (TENSOR, (None, "data", "tensor"))):
        mesh = make_mesh(MeshSettings(2, 2 if table is FSDP else 1, -1), jax.devices()[: 8 if table is FSDP else 4])
        model = dataclasses.replace(MODEL, activation_sharding=activation_sharding(mesh, table))
        state = start(model, params, queue, slots=8, settings=settings, rows=row_sharding(mesh))
        assert state.slots.cache.keys_NBGLE.sharding.spec == PartitionSpec(*spec)


def test_the_copy_for_writing_writes_the_same(params, prompts):
    """Its matrices are in the dtype in which they are used, and its norms are not rounded."""
    mesh = make_mesh(MeshSettings(1, 4, 2))
    trained = dataclasses.replace(MODEL, compute_dtype="bfloat16", activation_sharding=row_sharding(mesh))
    placed = jax.device_put(params, param_shardings(params, logical_axes(params), mesh))
    model, copied = for_writing(trained, placed, mesh)
    programs = placement._copied._cache_size()
    for_writing(trained, placed, mesh)  # at the next drawing
    assert placement._copied._cache_size() == programs
    assert copied["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    assert copied["layers"]["mlp"]["up"].sharding.spec == PartitionSpec(None, None, ("fsdp", "tensor"))
    assert copied["norm"]["scale"].dtype == jnp.float32
    sharded = options(batch_size=8, max_new_tokens=4, batch_sharding=row_sharding(mesh))
    assert generate(model, copied, prompts, **sharded) == generate(trained, placed, prompts, **sharded)


def test_refilling_and_decoding_copy_no_cache():
    """The caches of slots are updated in place: beside the arguments the program needs less memory than one of them."""
    queue = Queue(*(jax.ShapeDtypeStruct(n, jnp.int32) for n in ((64, 64), (64,), (64,), (64,), (64,), ())))
    abstract, settings = MODEL.abstract_params(), GenerateSettings(448, (3,), VOCAB)
    state = jax.eval_shape(lambda q, p: start(MODEL, p, q, slots=64, settings=settings), queue, abstract)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = advance.lower(MODEL, abstract, queue, state, limit, limit, settings=settings).compile()
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.slots.cache))
    assert compiled.memory_analysis().temp_size_in_bytes < cache


def test_sharded_params_decode_the_same_and_survive(params, prompts):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    specs = {16: "model", 32: "model"}
    placed = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 1), specs.get(x.shape[-1])))
        ),
        params,
    )
    before = jax.tree.map(np.asarray, placed)
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    result = generate(MODEL, placed, prompts, **options(batch_size=4, batch_sharding=rows))
    assert result == generate(MODEL, params, prompts, **options())
    jax.tree.map(np.testing.assert_array_equal, before, placed)  # a donated array would raise here


def test_progress_counts_prompts(params, prompts):
    seen = []
    generate(MODEL, params, prompts, **options(progress=lambda done, total: seen.append((done, total))))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, VOCAB]], {}, "prompt 0 has token id 29, outside the vocabulary of 29"),
        ([[-1]], {}, "prompt 0 has token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_bad_input_names_the_prompt(params, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, params, prompts, **options(**changes))


def test_samples_depend_on_the_seed_and_the_place_in_the_list_only(params, prompts):
    twice = [*prompts, *prompts]
    found = generate(MODEL, params, twice, **options(sampling=Sampling(1.0, 0.9, seed=3)))
    assert found == generate(MODEL, params, twice, **options(sampling=Sampling(1.0, 0.9, seed=3), batch_size=5))
    assert found != generate(MODEL, params, twice, **options(sampling=Sampling(1.0, 0.9, seed=4)))
    assert found[: len(prompts)] != found[len(prompts) :]  # two samples of one prompt are two draws


def test_a_cold_or_a_narrow_sample_is_greedy(params, prompts):
    expected = generate(MODEL, params, prompts, **options())
    for sampling in (Sampling(temperature=1e-4), Sampling(top_p=1e-6)):
        assert generate(MODEL, params, prompts, **options(sampling=sampling)) == expected


def test_the_first_token_is_drawn_from_the_softmax(params, prompts):
    prompt, temperature, draws = prompts[0], 0.7, 2000
    row = np.zeros((1, 64), np.int32)
    row[0, : len(prompt)] = prompt
    logits = np.asarray(_hidden(params, row)[0, len(prompt) - 1] @ MODEL.head(params), np.float64)[:VOCAB]
    expected = np.exp(logits / temperature) / np.sum(np.exp(logits / temperature))
    sampling = Sampling(temperature, seed=0)
    found = generate(MODEL, params, [prompt] * draws, **options(max_new_tokens=1, batch_size=500, sampling=sampling))
    counts = np.bincount([ids[0] for ids in found], minlength=VOCAB) / draws
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(0.25 / draws))


def test_nucleus_worked_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]]))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2})):
        assert set(np.flatnonzero(np.isfinite(nucleus(logits, top_p)[1])).tolist()) == kept, top_p


def test_a_text_can_end_a_row(params, prompts, monkeypatch):
    monkeypatch.setattr(run, "STOP_INTERVAL", 3)
    free = generate(MODEL, params, prompts, **options())
    checked = []

    def stopped(ids):
        checked.append(len(ids))
        return free[0][4] in ids

    found = generate(MODEL, params, prompts, **options(stopped=stopped))
    for row, whole in zip(found, free, strict=True):
        end = whole.index(free[0][4]) if free[0][4] in whole else len(whole)
        assert row == whole[: len(row)]  # nothing else changes
        assert len(row) > end or len(row) == len(whole)
    assert min(map(len, found)) < 12
    assert max(checked) < 12  # what has ended is not asked about
    # A text is asked about after every three of its tokens at the latest.
    assert all(len(row) - whole.index(free[0][4]) <= 3 for row, whole in zip(found, free, strict=True) if len(row) < 12)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    "changes",
    [{"eos_ids": (3, 5)}, {"sampling": Sampling(0.7, 0.8), "stopped": lambda ids: len(ids) > 4}],
    ids=["greedy", "sampled and stopped"],
)
def test_64_bit_numbers_change_nothing(params, prompts, changes):
    """A program around this package may have set jax_enable_x64; what is not given a dtype is then twice as wide."""
    expected = generate(MODEL, params, prompts, **options(**changes))
    with jax.enable_x64(True):
        assert generate(MODEL, params, prompts, **options(**changes)) == expected


def test_a_vocabulary_that_the_model_has_no_logits_for_is_refused(params):
    with pytest.raises(ValueError, match=rf"vocab_size is {PADDED + 1}, but the model has logits for {PADDED} ids"):
        generate(MODEL, params, [[1]], **options(vocab_size=PADDED + 1))
