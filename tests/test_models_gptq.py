"""GPTQ: equal to a reference, better than rounding to the nearest, and careful with what is not there."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from models_tiny import positions, random_tokens
from qwix._src.core.qarray import HowToQuantize
from qwix.contrib import gptq_core

from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.gptq import gptq, gptq_matrix
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.schemes import Scheme, as_params, round_matrix, rounded

CONFIG = DecoderConfig(vocab_size=61, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, head_dim=16, init_std=0.2)


def correlated_inputs(width: int, tokens: int = 512) -> jax.Array:
    mixing = jax.random.normal(jax.random.key(2), (width, width))
    return jax.random.normal(jax.random.key(0), (tokens, width)) @ mixing


@pytest.fixture(scope="module")
def matrix():
    weight_OI, inputs_TI = jax.random.normal(jax.random.key(1), (24, 32)), correlated_inputs(32)
    return weight_OI, inputs_TI, inputs_TI.T @ inputs_TI / len(inputs_TI)


@pytest.mark.parametrize(("qtype", "group"), [("int4", 16), ("int8", 0)])
def test_it_is_the_published_algorithm(matrix, qtype, group):
    """Against qwix's, which follows the authors' code, where its blocks are our groups."""
    weight_OI, _, gram_II = matrix
    how = HowToQuantize(
        qtype=getattr(jnp, qtype),
        channelwise_axes=(0,),
        tiled_axes={1: group or 32},
        calibration_method="absmax,1.00001",
    )
    want, _ = gptq_core.quantize_weight(weight_OI, gram_II, how, blocksize=group or 32)
    got = gptq_matrix(weight_OI, gram_II, Scheme(qtype, group))
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-5)
    assert float(jnp.mean(got.qvalue.astype(jnp.int8) != want.qvalue.astype(jnp.int8))) < 0.002


@pytest.mark.parametrize(
    "scheme", [Scheme("int4", 16), Scheme("int4", 16, symmetric=False), Scheme("int3", 0), Scheme("int2", 32)]
)
def test_outputs_are_nearer_than_by_rounding(matrix, scheme):
    weight_OI, inputs_TI, gram_II = matrix

    def error(rounded_OI):
        return float(jnp.mean(jnp.square(inputs_TI @ (weight_OI - qwix.dequantize(rounded_OI)).T)))

    assert error(gptq_matrix(weight_OI, gram_II, scheme)) < 0.7 * error(round_matrix(weight_OI, scheme))


def test_inputs_that_are_never_used_leave_rounding_to_the_nearest(matrix):
    weight_OI, _, gram_II = matrix
    scheme = Scheme("int4", 16)
    want = round_matrix(weight_OI, scheme)
    chex.assert_trees_all_equal(gptq_matrix(weight_OI, jnp.zeros_like(gram_II), scheme), want)


def test_a_model_keeps_its_logits_better_and_padding_is_not_read():
    params = DecoderModel(CONFIG).init(jax.random.key(0))
    model, scheme = DecoderModel(CONFIG), Scheme("int3", 16, head=True)
    tokens_BL, positions_BL = random_tokens(8, 24), positions(8, 24)
    chain_ids_BL = np.ones((8, 24), np.int32)
    seen: list[tuple[int, int]] = []
    by_gptq = gptq(model, params, [(tokens_BL, positions_BL, chain_ids_BL)], scheme, lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    nearest = rounded(params, scheme)
    chex.assert_trees_all_equal_shapes_and_dtypes(by_gptq, nearest)
    chex.assert_trees_all_equal(by_gptq["embedding"], nearest["embedding"])  # only layers are fitted

    def logits(params):
        return model.logits(params, model.hidden(params, tokens_BL, positions_BL, None))

    want = logits(params)
    far = [float(jnp.mean(jnp.square(logits(as_params(x, CONFIG)) - want))) for x in (by_gptq, nearest)]
    assert far[0] < far[1]

    padded = [np.concatenate([x, np.full((8, 8), fill, np.int32)], axis=1)
              for x, fill in ((tokens_BL, 5), (positions_BL, 0), (chain_ids_BL, 0))]  # fmt: skip
    again = gptq(model, params, [tuple(padded)], scheme)
    same = [
        float(jnp.mean(a.qvalue.astype(jnp.float32) == b.qvalue.astype(jnp.float32)))
        for a, b in zip(*(jax.tree.leaves(x["layers"]["mlp"], is_leaf=lambda x: hasattr(x, "qvalue"))
                          for x in (again, by_gptq)), strict=True)
    ]  # fmt: skip
    assert min(same) > 0.995  # but for ties that another order of sums decides


def test_inputs_that_are_not_finite_are_an_error_and_no_matrix(matrix):
    weight_OI, _, gram_II = matrix
    with pytest.raises(ValueError, match="not finite, or too alike"):
        gptq_matrix(weight_OI, gram_II.at[3, 3].set(jnp.nan), Scheme("int4", 16))


def test_what_it_cannot_do_is_refused():
    model, nothing = DecoderModel(CONFIG), np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="rounds to integers, not to nf4"):
        gptq(model, {}, [], Scheme("nf4", 16))
    with pytest.raises(ValueError, match="needs calibration text"):
        gptq(model, {}, [(nothing, nothing, nothing)], Scheme("int4", 16))
