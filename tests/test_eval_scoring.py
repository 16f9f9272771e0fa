"""Packed, chunked, teacher-forced scores against one chain at a time through dense float64 softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtd_jax.eval.scoring import ScoringSettings, score_chains, token_scores
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel

VOCAB, PADDED = 29, 32
MODEL = DecoderModel(
    DecoderConfig(vocab_size=PADDED, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, init_std=0.5)
)
LENGTHS = (9, 30, 1, 17, 64, 2, 23)  # 64 fills a row: its last token must not predict its first


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(1))
    return dict(
        params, head=params["head"].at[:, VOCAB:].mul(100.0)
    )  # loud padding: counted, it would change everything


@pytest.fixture(scope="module")
def chains():
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, size).tolist() for size in LENGTHS]


@pytest.fixture(scope="module")
def dense(params, chains):
    """(log-probability, is argmax) of each token given those before it in its chain: NumPy on the model's states."""
    result = []
    alone = jax.jit(lambda tokens, positions: MODEL.hidden(params, tokens, positions, jnp.ones_like(tokens)))
    for chain in chains:
        tokens = np.zeros((1, max(LENGTHS)), np.int32)  # causal: what stands to the right does not matter
        tokens[0, : len(chain)] = chain
        hidden = alone(tokens, np.arange(max(LENGTHS), dtype=np.int32)[None])[0, : len(chain)]
        logits = (np.asarray(hidden, np.float64) @ np.asarray(MODEL.head(params), np.float64))[:-1, :VOCAB]
        log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        labels = np.asarray(chain[1:], int)
        result.append(
            (
                np.concatenate([[0.0], log_probs[np.arange(len(labels)), labels]]),
                np.concatenate([[False], np.argmax(logits, axis=-1) == labels]),
            )
        )
    return result


@pytest.mark.parametrize(("row_length", "batch_size", "chunk"), [(64, 2, 512), (64, 2, 14), (10, 3, 1), (192, 1, 50)])
def test_packed_and_chunked_equals_dense(params, chains, dense, row_length, batch_size, chunk):
    scores = score_chains(MODEL, params, chains, ScoringSettings(row_length, batch_size, chunk), vocab_size=VOCAB)
    assert sum(chosen.sum() for _, chosen in dense) > 0  # an all-False answer would not be told from a right one
    for score, (log_probs, chosen) in zip(scores, dense, strict=True):
        np.testing.assert_allclose(score.log_probs, log_probs, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(score.chosen, chosen)


def test_long_chains_have_rows_of_their_own_beside_others_of_their_length(params, chains, dense):
    # 70 and 130 tokens do not fit into rows of 64: rows of 128 and 192, the rest packed as before.
    long = [np.arange(70) % VOCAB, np.arange(130) % VOCAB, np.arange(69) % VOCAB]
    mixed = [long[0], *chains, *long[1:]]
    seen = []
    scores, whole = (
        score_chains(
            MODEL, params, mixed, ScoringSettings(length, 2), vocab_size=VOCAB, progress=lambda *done: seen.append(done)
        )
        for length in (64, 192)
    )
    seen = seen[: seen.index((len(mixed), len(mixed))) + 1]
    for score, other in zip(scores, whole, strict=True):
        np.testing.assert_allclose(score.log_probs, other.log_probs, atol=2e-5, rtol=2e-5)
    for score, (log_probs, _) in zip(scores[1:-2], dense, strict=True):
        np.testing.assert_allclose(score.log_probs, log_probs, atol=2e-5, rtol=0)
    # Two rows of 64 are 128 tokens: one row of 192, then one of 128 at a time.
    assert seen[:3] == [(1, len(mixed)), (2, len(mixed)), (3, len(mixed))]
    assert seen[-1] == (len(mixed), len(mixed))


def test_no_logits_of_a_whole_batch_exist(params):
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p, t: token_scores(MODEL, p, t, t, t, vocab_size=VOCAB, chunk_tokens=20))(
        params, tokens
    )
    sizes = {v.aval.size for eqn in _equations(jaxpr.jaxpr) for v in eqn.outvars if v.aval.shape[-1:] == (PADDED,)}
    assert 20 * PADDED in sizes  # the logits of one chunk, found among all values of the program
    assert max(sizes) == 20 * PADDED


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from _equations(inner)


def test_sharded_batch_scores_the_same(params, chains):
    rows = NamedSharding(Mesh(np.asarray(jax.devices()[:2]), ("data",)), PartitionSpec("data", None))
    plain, sharded = (
        score_chains(MODEL, params, chains, ScoringSettings(64, 2), vocab_size=VOCAB, batch_sharding=sharding)
        for sharding in (None, rows)
    )
    for a, b in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5, rtol=0)


def test_bad_chains_are_named(params):
    with pytest.raises(ValueError, match="chain 1 has no tokens"):
        score_chains(MODEL, params, [[1], []], vocab_size=VOCAB)
    with pytest.raises(ValueError, match="chain 0 has token ids from 1 to 29, but the vocabulary has 29"):
        score_chains(MODEL, params, [[1, 29]], vocab_size=VOCAB)
    assert score_chains(MODEL, params, [], vocab_size=VOCAB) == []


def test_a_uniform_model_gives_each_word_of_the_vocabulary_the_same_probability(params, chains):
    flat = dict(params, head=jnp.zeros_like(params["head"]))
    (score,) = score_chains(MODEL, flat, [chains[1]], vocab_size=VOCAB)
    np.testing.assert_allclose(score.log_probs[1:], -np.log(VOCAB), rtol=1e-6)  # the padding has no part
