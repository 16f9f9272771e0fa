"""What a pruned model keeps, and that what is kept computes what it computed before."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from rtd_jax.data.encoding import EncodedChain
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.pruning import Importance, importance, prune, prune_model, pruned_config
from rtd_jax.models.quantized import quantize_params
from rtd_jax.models.weights import parameter_count

CONFIG = DecoderConfig(61, 32, 48, layers=3, heads=4, kv_heads=2, head_dim=8, init_std=0.3, norm_eps=1e-6)
MODEL = DecoderModel(CONFIG)
LARGE = DecoderConfig(128_256, 2048, 8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied_embeddings=True)


@pytest.fixture(scope="module")
def params():
    """Random weights with norms away from one."""
    drawn = MODEL.init(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 3))
    for norm in (drawn["norm"], drawn["layers"]["attention_norm"], drawn["layers"]["mlp_norm"]):
        norm["scale"] = jax.random.uniform(next(noise), norm["scale"].shape, minval=0.5, maxval=1.5)
    return drawn


def chains(*lengths: int) -> list[EncodedChain]:
    """Random chains with a prompt of three tokens."""
    drawn = np.random.default_rng(0)
    return [
        EncodedChain(
            drawn.integers(0, 61, length).astype(np.int32),
            3,
            np.array([2, length - 1], np.int32),
            np.r_[np.zeros(3), np.ones(length - 3)].astype(np.float32),
        )
        for length in lengths
    ]


def logits(config: DecoderConfig, params, tokens_L) -> jax.Array:
    model, tokens = DecoderModel(config), tokens_L[None]
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return model.logits(params, model.hidden(params, tokens, places, np.ones_like(tokens)))[0]


def greedy(config: DecoderConfig, params, chain: EncodedChain) -> EncodedChain:
    """The chain with the model's own completion of its prompt."""
    tokens = chain.tokens.copy()
    for place in range(3, len(chain)):
        tokens[place] = int(jnp.argmax(logits(config, params, tokens)[place - 1]))
    return replace(chain, tokens=tokens)


def by_hand(params, chain: EncodedChain, without: int | None = None):
    """What importance is made of, computed in NumPy for one chain: sums over its tokens, and its loss."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers, length = weights["layers"], len(chain)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * scale

    def rotate(x_LHE):
        angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = np.split(x_LHE, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x, found = weights["embedding"][chain.tokens], {"units": np.zeros(32), "neurons": [], "groups": []}
    for n in range(CONFIG.layers):
        if n == without:
            continue
        own = jax.tree.map(lambda stacked, n=n: stacked[n], layers)
        read = norm(x, own["attention_norm"]["scale"])
        q, k, v = (np.einsum("LD,DHE->LHE", read, own["attention"][name]) for name in "qkv")
        q, k, v = rotate(q), np.repeat(rotate(k), 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.where(np.tri(length, dtype=bool), np.einsum("LHE,MHE->HLM", q, k) / np.sqrt(8), -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("HLM,MHE->LHE", shares / shares.sum(axis=-1, keepdims=True), v)
        found["groups"].append(np.sqrt((mixed.reshape(length, 2, 16) ** 2).sum(axis=-1)).sum(axis=0))
        x = x + np.einsum("LHE,HED->LD", mixed, own["attention"]["o"])
        found["units"] += np.abs(read).sum(axis=0)
        read = norm(x, own["mlp_norm"]["scale"])
        gate = read @ own["mlp"]["gate"]
        neurons = gate / (1 + np.exp(-gate)) * (read @ own["mlp"]["up"])
        found["neurons"].append(np.abs(neurons).sum(axis=0))
        found["units"] += np.abs(read).sum(axis=0)
        x = x + neurons @ own["mlp"]["down"]
    final = norm(x, weights["norm"]["scale"])
    found["units"] += np.abs(final).sum(axis=0)
    logits = (final @ weights["head"])[:-1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels = chain.tokens[1:]
    found["loss"] = -(chain.loss_weights[1:] * log_probs[np.arange(length - 1), labels]).sum()
    return found


def test_importance_is_what_numpy_computes_chain_by_chain(params):
    """More chains than rows, of several lengths: padding counts for nothing, and means are over all tokens."""
    given = chains(*range(5, 14))
    found = importance(MODEL, params, given, of_layers=True)
    wanted = [by_hand(params, chain) for chain in given]
    tokens, labels = sum(map(len, given)), sum(len(chain) - 3 for chain in given)
    for name, array in (("units", found.units_D), ("neurons", found.neurons_NF), ("groups", found.groups_NG)):
        np.testing.assert_allclose(array, sum(np.array(one[name]) for one in wanted) / tokens, rtol=1e-4, err_msg=name)
    for layer in range(CONFIG.layers):
        rise = sum(
            by_hand(params, chain, layer)["loss"] - one["loss"] for chain, one in zip(given, wanted, strict=True)
        )
        np.testing.assert_allclose(found.layers_N[layer], rise / labels, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_that_do_nothing_are_those_that_go(params, tied):
    """Units that are always zero, neurons and a group that nothing is read from, a layer that adds nothing.

    The norms' scales are corrected, so that the logits stay.
    """
    config = replace(CONFIG, tied_embeddings=tied)
    idle_D, idle_F = np.array([0, 5, 6, 20, 31]), np.array([1, 2, 47])
    dead = jax.tree.map(np.array, params)  # NumPy, to be written into
    if tied:
        del dead["head"]
    dead["embedding"][:, idle_D] = 0
    layers = dead["layers"]
    for path in (("attention", "o"), ("mlp", "down")):
        layers[path[0]][path[1]][..., idle_D] = 0
        layers[path[0]][path[1]][1] = 0  # layer 1 adds nothing
    layers["mlp"]["up"][..., idle_F] = 0
    layers["attention"]["v"][:, :, 1] = 0  # group 1 mixes zeros
    dead = jax.tree.map(jnp.asarray, dead)
    target = replace(config, width=27, mlp_width=45, layers=2, heads=2, kv_heads=1)
    given = [greedy(config, dead, chain) for chain in chains(12, 9)]  # of which it predicts every label
    found = prune_model(DecoderModel(config), dead, given, target)
    np.testing.assert_array_equal(found.kept.layers_M, [0, 2])
    np.testing.assert_array_equal(found.kept.units_S, np.setdiff1d(np.arange(32), idle_D))
    np.testing.assert_array_equal(found.kept.neurons_MF, [np.setdiff1d(np.arange(48), idle_F)] * 2)
    np.testing.assert_array_equal(found.kept.groups_MG, [[0], [0]])
    np.testing.assert_array_equal(found.kept.heads_MH, [[0, 1], [0, 1]])  # a group is kept whole

    before = logits(config, dead, given[0].tokens)
    after = logits(target, found.params, given[0].tokens)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))


def test_each_layer_keeps_its_own_groups_and_neurons_and_all_the_same_units(params):
    order = np.random.default_rng(0)
    measured = Importance(
        order.permutation(32).astype(float),
        np.stack([order.permutation(48) for _ in range(3)]).astype(float),
        np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]),  # of equal ones the first is kept
        {name: np.ones((3, 32)) for name in ("attention_norm", "mlp_norm")} | {"norm": np.ones(32)},
        None,
    )
    target = replace(CONFIG, width=8, mlp_width=16, heads=2, kv_heads=1)
    cut, kept = prune(params, CONFIG, measured, target)
    np.testing.assert_array_equal(kept.units_S, np.flatnonzero(measured.units_D >= 24))
    np.testing.assert_array_equal(kept.groups_MG, [[1], [0], [0]])
    np.testing.assert_array_equal(kept.heads_MH, [[2, 3], [0, 1], [0, 1]])
    for layer in range(3):
        neurons_F = np.flatnonzero(measured.neurons_NF[layer] >= 32)
        np.testing.assert_array_equal(kept.neurons_MF[layer], neurons_F)
        up_DF = params["layers"]["mlp"]["up"][layer]
        np.testing.assert_array_equal(cut["layers"]["mlp"]["up"][layer], up_DF[kept.units_S][:, neurons_F])
        q_DHE = params["layers"]["attention"]["q"][layer]
        np.testing.assert_array_equal(
            cut["layers"]["attention"]["q"][layer], q_DHE[kept.units_S][:, kept.heads_MH[layer]]
        )
    np.testing.assert_array_equal(cut["head"], params["head"][kept.units_S])
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, DecoderModel(target).abstract_params())


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        *((share, {}) for share in (0.25, 0.5, 0.75, 0.9)),
        (0.6, {"layers": 12}),
        (0.5, {"width": 1536}),
        (0.5, {"kv_heads": 6}),
    ],
)
def test_a_share_is_reached_within_some_percent(share, sizes):
    found = pruned_config(LARGE, share, **sizes)
    assert parameter_count(found) / parameter_count(LARGE) == pytest.approx(share, rel=0.03)
    assert (found.width % 128, found.mlp_width % 128, found.head_dim) == (0, 0, 64)
    assert (found.layers, found.kv_heads) == (sizes.get("layers", 16), sizes.get("kv_heads", 8))
    assert found.heads == 4 * found.kv_heads
    if not sizes:
        assert found.mlp_width / found.width == pytest.approx(4, rel=0.25)  # width and MLP become narrower together


def test_sizes_alone_are_taken_as_they_are():
    assert pruned_config(CONFIG, width=24, kv_heads=1) == replace(CONFIG, width=24, heads=2, kv_heads=1)


def test_transformers_reads_the_width_of_a_pruned_llama(tmp_path):
    """It refuses a Llama, and no other family, whose width is not a multiple of its query heads."""
    whole = DecoderConfig(128_256, 3072, 8192, layers=28, heads=24, kv_heads=8, head_dim=128)  # Llama-3.2-3B
    for share in (0.4, 0.45, 0.5, 0.7):
        found = pruned_config(whole, share)
        assert found.width % 24 == 0
        (tmp_path / "config.json").write_text(json.dumps(found.to_hf()))
        assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == found.width
    for sizes in ({"width": 2176}, {"kv_heads": 7}, {"width": 2176, "share": 0.5}):
        with pytest.raises(ValueError, match=r"^width is \d+, no multiple of the 2[14] query heads"):
            pruned_config(whole, **sizes)
    assert pruned_config(replace(whole, family="mistral"), width=2176).width == 2176


@pytest.mark.parametrize(
    ("share", "sizes", "message"),
    [
        (1.0, {}, r"share is 1\.0; expected a number above 0 and below 1"),
        (-0.5, {}, r"share is -0\.5; expected"),
        (0.0, {}, r"share is 0, and no size is smaller than the model's"),
        (0.0, {"layers": 3}, r"share is 0, and no size is smaller than the model's"),
        (0.5, {"width": 40}, r"width is 40, but the model to be pruned has 32; expected 1 to 32"),
        (0.0, {"kv_heads": 3}, r"kv_heads is 3, but the model to be pruned has 2"),
        (0.5, {"width": 16, "mlp_width": 8}, r"share is 0\.5, but width and mlp_width, by which it is reached, are gi"),
        (
            0.9,
            {"layers": 1},
            r"share is 0\.9, .* the nearest sizes with layers 1 have .* give a share near 0\.\d\d, or",
        ),
        (0.01, {}, r"share is 0\.01, .* the nearest sizes have .* \(width 8, mlp_width 8\); give a share near"),
    ],
)
def test_what_cannot_be_reached_is_refused_by_name(share, sizes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pruned_config(CONFIG, share, **sizes)


def test_models_that_cannot_be_pruned_are_refused_by_name(params):
    target = replace(CONFIG, width=16)
    with pytest.raises(ValueError, match="there is no chain to measure importance on"):
        prune_model(MODEL, params, [], target)
    with pytest.raises(ValueError, match="cannot have width 64 of 32"):
        prune_model(MODEL, params, chains(9), replace(CONFIG, width=64))
    with pytest.raises(ValueError, match="whole attention groups only"):
        prune_model(MODEL, params, chains(9), replace(CONFIG, heads=2))
    with pytest.raises(ValueError, match=r"embedding is quantised; prune a model with float weights"):
        prune_model(MODEL, quantize_params(params), chains(9), target)
