"""The teacher's outputs on disk: exact where it is asked for, small where it is not, and refused when not its own."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import recipe, source, write_teacher

import rtd_jax.apps.cache
import rtd_jax.models.open
from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import TopK
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import open_model
from rtd_jax.teacher.cache import CacheWriter, TeacherCache
from rtd_jax.teacher.identity import CacheSettings, Identity
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.records import chain_key, decode_record, encode_record
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.splits import load_splits

VOCAB = len(tiny_tokenizer())
EXACT = CacheSettings(VOCAB, "float32", "float32")


def identity(settings: CacheSettings, vocab_size: int, width: int) -> Identity:
    return Identity("t", "d", "k", vocab_size, width, (2,), 4.0, settings.top_k, settings.predictions, settings.states)


def outputs_of(predicted: int, k: int, vocab_size: int, boundaries: int, width: int, seed: int = 0):
    """As of a random teacher: the ids of the most probable tokens lie anywhere in the vocabulary."""
    rng = np.random.default_rng(seed)
    logits = np.float32(3) * rng.standard_normal((predicted, vocab_size), np.float32)
    ids = np.argsort(-logits, axis=-1)[:, :k].astype(np.int32)
    p = [np.exp(logits / T) / np.exp(logits / T).sum(-1, keepdims=True) for T in (1.0, 4.0)]
    tops = [np.take_along_axis(x, ids, -1) for x in p]
    tails = [np.maximum(1 - top.sum(-1), 0) if k < vocab_size else np.zeros(predicted) for top in tops]
    top = TopK(ids, np.log(tops[0]), *(tail.astype(np.float32) for tail in tails))
    return top, rng.standard_normal((boundaries, width), np.float32)


def test_float32_storage_gives_every_bit_back():
    settings = CacheSettings(9, "float32", "float32")
    top, states = outputs_of(5, 9, 300, 3, 16)
    found, found_states = decode_record(encode_record(top, states[None], settings), identity(settings, 300, 16))
    order = np.argsort(top.ids_BLM, -1)
    np.testing.assert_array_equal(found.ids_BLM, np.take_along_axis(top.ids_BLM, order, -1))
    np.testing.assert_array_equal(found.log_probs_BLM, np.take_along_axis(top.log_probs_BLM, order, -1))
    np.testing.assert_array_equal(found.tail_BL, top.tail_BL)
    np.testing.assert_array_equal(found.soft_tail_BL, top.soft_tail_BL)
    np.testing.assert_array_equal(found_states, states[None])


def test_compact_storage_rounds_as_it_says_and_takes_at_most_330_bytes_per_token():
    """Llama-3's sizes, every token predicted, one state per 40 tokens, ids anywhere: no text is harder to store."""
    settings, tokens = CacheSettings(64), 120
    top, states = outputs_of(tokens, 64, 128_256, tokens // 40, 8192)
    record = encode_record(top, states[None], settings)
    found, found_states = decode_record(record, identity(settings, 128_256, 8192))
    order = np.argsort(top.ids_BLM, -1)
    np.testing.assert_array_equal(found.ids_BLM, np.take_along_axis(top.ids_BLM, order, -1))
    exact = np.take_along_axis(top.log_probs_BLM, order, -1)
    # The square root of -log p is rounded to a step of sqrt(32) / 255.
    half_step = np.sqrt(32) / 255 / 2
    assert np.all(np.abs(np.sqrt(-found.log_probs_BLM) - np.sqrt(-exact)) <= half_step + 1e-6)
    np.testing.assert_allclose(found.tail_BL, top.tail_BL, rtol=1e-2)
    np.testing.assert_allclose(found.soft_tail_BL, top.soft_tail_BL, rtol=1e-2)
    largest = np.abs(states).max(-1, keepdims=True)
    assert np.all(np.abs(found_states - states) <= largest / 127 / 2 * 1.001)
    print(f"{len(record) / tokens:.1f} bytes per token")
    assert len(record) / tokens <= 330


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def cached(teacher: Path, folder: Path, settings: CacheSettings = EXACT, **changes):
    base = recipe(teacher)
    of_teacher = dataclasses.replace(base.teacher, cache=str(folder))
    return dataclasses.replace(base, **({"teacher": of_teacher, "cache": settings} | changes))


@pytest.fixture(scope="module")
def exact(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    return cache_teacher(cached(teacher, folder), folder)


def test_a_run_from_a_cache_of_every_token_is_the_online_run(teacher, exact, tmp_path, monkeypatch):
    # With this eps an update is a continuous function of the gradient (test_training_step.py).
    optimizer = OptimizerSettings(learning_rate=1e-2, warmup_updates=2, eps=1e-2)
    train(recipe(teacher, optimizer=optimizer), tmp_path / "online")

    def refuse(*args, **kwargs):
        raise AssertionError("the teacher's weights were loaded")

    monkeypatch.setattr(rtd_jax.models.open, "load_params", refuse)
    train(cached(teacher, exact, optimizer=optimizer), tmp_path / "cached")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("online", "cached")]
    assert set(reports[0]["perplexity"]) == {"student", "teacher"}
    assert set(reports[1]["perplexity"]) == {"student"}
    for online, from_cache in zip(*(report["stages"] for report in reports), strict=True):
        assert from_cache["ended_by"] == online["ended_by"]
        np.testing.assert_allclose(from_cache["teacher_coherence"], online["teacher_coherence"], rtol=1e-4)
        np.testing.assert_allclose(from_cache["validations"], online["validations"], rtol=1e-3)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("cached", "online"))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_small_cache_trains_and_is_refused_by_name_when_it_is_not_its_own(teacher, tmp_path):
    folder = tmp_path / "cache"
    small = cached(teacher, folder, CacheSettings(8))
    cache_teacher(small, folder)
    train(small, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert np.isfinite(report["perplexity"]["student"])

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(small, **changes), lambda _: None)

    refused("another top_k: 8, this run has 16", cache=CacheSettings(16))
    refused("another temperature: 4.0, this run has 2.0", loss=dataclasses.replace(small.loss, temperature=2.0))
    refused(
        r"has the states of layers \[2\], this run matches hidden_layer 1",
        loss=dataclasses.replace(small.loss, hidden_layer=1),
    )
    other = write_teacher(tmp_path / "other", seed=1)
    refused("another teacher:", teacher=dataclasses.replace(small.teacher, path=str(other)))
    refused("is not a teacher cache", teacher=dataclasses.replace(small.teacher, cache=str(tmp_path)))
    # Other chains are not in it, and adding them keeps those that are.
    more = dataclasses.replace(
        small, data=dataclasses.replace(small.data, train=dataclasses.replace(small.data.train, limit=90))
    )
    before = {path.name for path in folder.iterdir()}
    cache_teacher(more, folder)
    after = {path.name for path in folder.iterdir()}
    assert before < after
    assert len(after - before) == 2  # one shard and its keys
    cache_teacher(more, folder)
    assert {path.name for path in folder.iterdir()} == after


def test_neither_batch_size_nor_packing_nor_mesh_shows_in_a_cache(teacher, exact, tmp_path):
    other = cached(teacher, tmp_path, batch_size=16, mesh=MeshSettings(2, 2, 2))
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, chains_per_row=1))
    cache_teacher(other, tmp_path)
    experiment, _ = prepare(other, lambda _: None)
    readers = [TeacherCache(folder, experiment.cache.identity) for folder in (exact, tmp_path)]
    assert readers[0]._places.keys() == readers[1]._places.keys()
    for key in list(readers[0]._places)[:20]:
        (top, states), (other_top, other_states) = (reader.read(key) for reader in readers)
        np.testing.assert_array_equal(top.ids_BLM, other_top.ids_BLM)  # k = V: every id, in order
        np.testing.assert_allclose(top.log_probs_BLM, other_top.log_probs_BLM, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(states, other_states, rtol=1e-4, atol=1e-5)


def test_outputs_lie_where_the_chains_were_packed(teacher, exact):
    experiment, _ = prepare(cached(teacher, exact), lambda _: None)
    online, _ = prepare(recipe(teacher), lambda _: None)
    for per_row in (1, 3):
        (batch, *_) = fixed_batches(experiment.train.encoded[:12], 8, 288, per_row, experiment.max_boundaries)
        found = experiment.cache.outputs(batch)
        want = teacher_outputs(online.teacher, online.teacher_params, jax.tree.map(jnp.asarray, batch), (2,))
        mask = batch.boundary_mask_BCK
        np.testing.assert_allclose(found.boundary_states[2][mask], want.boundary_states[2][mask], rtol=1e-4, atol=1e-5)
        log_probs = jax.nn.log_softmax(online.teacher.logits(online.teacher_params, want.hidden_BLD)[..., :VOCAB])
        counts = np.pad(batch.loss_weights_BL[:, 1:], ((0, 0), (0, 1))) > 0
        assert counts.any()
        np.testing.assert_allclose(found.top_k.log_probs_BLM[counts], log_probs[counts], rtol=1e-3, atol=1e-4)
        assert not np.any(found.top_k.log_probs_BLM[~counts])


@pytest.fixture
def copy(exact, tmp_path) -> Path:
    return Path(shutil.copytree(exact, tmp_path / "copy"))


def test_damage_is_named(teacher, exact, copy):
    settings = cached(teacher, copy)
    experiment, _ = prepare(settings, lambda _: None)
    whole = experiment.cache
    shard = max(copy.glob("*.array_record"), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()

    shard.write_bytes(content[:-100])
    with pytest.raises(
        ValueError, match=f"{shard.name} has {len(content) - 100} bytes, .* says {len(content)}; delete"
    ):
        prepare(settings, lambda _: None)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        prepare(settings, lambda _: None)

    # One bit, in the middle: every record is read, and the one that was hit is refused.
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    shard.write_bytes(bytes(flipped))
    broken = TeacherCache(copy, whole.identity)
    mine = [key for key, place in broken._places.items() if place.shard == shard.stem]
    with pytest.raises(ValueError, match=r"record \d+ is damaged"):
        list(map(broken.read, mine))

    chain = experiment.train.encoded[0]
    changed = chain.tokens.copy()
    changed[-1] += 1
    with pytest.raises(ValueError, match="has no chain"):
        whole.read(chain_key(changed, chain.boundaries, chain.loss_weights))


def test_a_shard_without_its_list_of_keys_is_written_again(tmp_path):
    """What a kill between the two files leaves."""
    settings = CacheSettings(4)
    own = identity(settings, 50, 8)
    outputs = [outputs_of(3, 4, 50, 2, 8, seed=i) for i in range(6)]
    records = [(f"{i:064x}", encode_record(top, states[None], settings)) for i, (top, states) in enumerate(outputs)]
    CacheWriter(tmp_path, own).write(records[:3])
    (listed,) = tmp_path.glob("shard-*.json")
    listed.unlink()
    writer = CacheWriter(tmp_path, own)
    assert not writer.keys
    writer.write(records[:3])
    writer.write(records[3:])
    cache = TeacherCache(tmp_path, own)
    assert sorted(cache._places) == [key for key, _ in records]
    assert len(list(tmp_path.glob("*.array_record"))) == 2
    for key, record in reversed(records):
        np.testing.assert_array_equal(cache.read(key)[1], decode_record(record, own)[1])


def test_a_cache_of_means_over_steps_in_two_layers_gives_what_the_teacher_does(teacher, tmp_path):
    few = dataclasses.replace(recipe(teacher).data, train=source("train", 40))
    base = cached(teacher, tmp_path, data=few)
    means = dataclasses.replace(base, loss=dataclasses.replace(base.loss, layers="1:1,-1:2", step_state="mean"))
    cache_teacher(means, tmp_path)
    chains = load_splits(few, tiny_tokenizer())[0].encoded[:6]
    config = load_config(teacher)
    model, params = DecoderModel(config, "float32"), load_params(teacher, config, dtype="float32")
    slots = max(len(chain.boundaries) for chain in chains)
    (batch, *_) = fixed_batches(chains, 4, 288, 2, slots)
    found = opened(means).outputs(batch, states_only=True)
    wanted = teacher_outputs(model, params, jax.tree.map(jnp.asarray, batch), (1, 2), step_state="mean")
    mask = batch.boundary_mask_BCK
    for layer in (1, 2):
        states = found.boundary_states[layer][mask]
        np.testing.assert_allclose(states, wanted.boundary_states[layer][mask], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="with another step_state: 'mean', this run has 'end'"):
        opened(base)
    with pytest.raises(ValueError, match="with another step_state: 'mean', this run has 'result'"):
        opened(dataclasses.replace(means, loss=dataclasses.replace(means.loss, step_state="result")))


def opened(recipe) -> TeacherCache:
    identity = cache_identity(recipe, open_model(recipe.teacher, make_mesh(recipe.mesh)))
    return TeacherCache(Path(recipe.teacher.cache), identity)


def test_a_cache_of_several_layers_serves_recipes_that_match_any_of_them(teacher, exact, tmp_path):
    """The states of each are those of a cache that was written for it alone, and those of the model."""
    few = dataclasses.replace(recipe(teacher).data, train=source("train", 40))
    both = cached(teacher, tmp_path / "both", dataclasses.replace(EXACT, layers=(1,)), data=few)
    cache_teacher(both, tmp_path / "both")

    def matching(layer: int):
        return dataclasses.replace(both, cache=EXACT, loss=dataclasses.replace(both.loss, hidden_layer=layer))

    last, inner, alone = opened(matching(-1)), opened(matching(1)), opened(cached(teacher, exact))
    chains = load_splits(few, tiny_tokenizer())[0].encoded[:4]
    config = load_config(teacher)
    model, params = DecoderModel(config, "float32"), load_params(teacher, config, dtype="float32")
    for chain in chains:
        key = chain_key(chain.tokens, chain.boundaries, chain.loss_weights)
        for ours, theirs in zip(last.read(key)[0], alone.read(key)[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(last.read(key)[1], alone.read(key)[1], rtol=1e-4, atol=1e-5)
        tokens_BL = chain.tokens[None]
        rows = tokens_BL, np.arange(len(chain), dtype=np.int32)[None], np.ones_like(tokens_BL)
        _, (inner_BLD,) = model.hidden(params, *rows, layers=(1,))
        np.testing.assert_allclose(inner.read(key)[1][0], inner_BLD[0, chain.boundaries], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"has the states of layers \[1, 2\], this run matches hidden_layer 0"):
        opened(matching(0))
    with pytest.raises(ValueError, match=r"of layers \[1, 2\], this run would add those of \[2\]"):
        cache_teacher(matching(-1), tmp_path / "both")
    with pytest.raises(ValueError, match=r"cache.layers is \(9,\): hidden layer 9 .* a model of 2 layers has 0"):
        cache_teacher(cached(teacher, tmp_path / "none", CacheSettings(layers=(9,))), tmp_path / "none")
