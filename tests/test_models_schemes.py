"""Rounding to a scheme: hand-worked values, straight-through gradients, and the decoder that computes with it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from models_tiny import positions, random_tokens

from rtd_jax.base.sharding import TABLES, MeshSettings, make_mesh, param_shardings
from rtd_jax.eval.decoding.placement import for_writing
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.schemes import Scheme, as_params, fake_rounded, round_matrix, rounded
from rtd_jax.models.weights import ROWS, logical_axes

CONFIG = DecoderConfig(vocab_size=61, width=32, mlp_width=48, layers=3, heads=4, kv_heads=2, head_dim=16, init_std=0.3)
SCHEMES = [
    Scheme("int3", 16),
    Scheme("int4", 0),
    Scheme("int4", 16, symmetric=False),
    Scheme("nf4", 16, head=True),
    Scheme("fp8", 0),
]


@pytest.fixture(scope="module")
def params():
    return DecoderModel(CONFIG).init(jax.random.key(0))


def test_a_matrix_worked_by_hand():
    """Scales 1 and 2 (largest magnitude over 7.5): groups of two inputs, each row of its own."""
    weight_OI = jnp.array([[7.5, 1.4, -15.0, 5.0], [-7.5, -0.6, 3.2, 15.0]])
    got = round_matrix(weight_OI, Scheme("int4", 2))
    np.testing.assert_array_equal(got.qvalue.astype(jnp.int8), [[7, 1, -7, 2], [-7, -1, 2, 7]])
    np.testing.assert_allclose(got.scale, [[1, 2], [1, 2]], rtol=2e-5)


def test_zero_points_spend_all_values_on_one_side():
    weight_OI = jnp.arange(16.0)[None]
    got = round_matrix(weight_OI, Scheme("int4", 16, symmetric=False))
    np.testing.assert_allclose(qwix.dequantize(got), weight_OI, atol=1e-6)
    assert float(jnp.abs(qwix.dequantize(round_matrix(weight_OI, Scheme("int4", 16))) - weight_OI).max()) > 0.4


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_the_decoder_computes_with_what_is_saved(params, scheme):
    """Float params through `quantization`, the params rounded once, and `deployed` give the same bits; so do grads."""
    tokens_BL, positions_BL = random_tokens(2, 12), positions(2, 12)
    plain, trained = DecoderModel(CONFIG), DecoderModel(CONFIG, quantization=scheme, remat="full")
    once = jax.jit(lambda params: as_params(rounded(params, scheme), CONFIG))(params)
    deployed_model, deployed = trained.deployed(params)
    assert deployed_model == dataclasses.replace(plain, remat="full")
    chex.assert_trees_all_equal(deployed, once)

    def loss(params, model):
        return jnp.mean(jnp.square(model.logits(params, model.hidden(params, tokens_BL, positions_BL, None))))

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, trained)
    want, want_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(once, plain)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-4, atol=1e-7)  # straight through the rounding
    assert abs(float(value) - float(jax.jit(loss, static_argnums=1)(params, plain))) > 1e-7  # it does something


def test_what_a_scheme_leaves_alone(params):
    def changed(scheme):
        after = as_params(rounded(params, scheme), CONFIG)
        before, after = logical(params), logical(after)
        return {path for path, array in before.items() if not bool(jnp.all(array == after[path]))}

    def logical(tree):
        return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    without, whole = changed(Scheme("int4", 16)), changed(Scheme("int4", 16, head=True))
    assert len(without) == 7
    assert not [path for path in whole if "norm" in path]
    assert whole - without == {"['embedding']", "['head']"}


def test_sharded_params_are_rounded_alike(params):
    """Over a mesh that cuts the inputs of groups; and what writes texts gets params that are rounded already."""
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))
    scheme = Scheme("int4", 16)
    spread = jax.device_put(params, param_shardings(params, logical_axes(params), mesh, TABLES["fsdp"]))
    model = DecoderModel(CONFIG, quantization=scheme)
    once = model.deployed(params)[1]
    chex.assert_trees_all_equal(model.deployed(spread)[1], once)
    writer, copied = for_writing(model, spread, mesh)
    assert writer.quantization is None
    chex.assert_trees_all_equal(copied, once)


def test_only_a_scheme_that_exists_and_fits_is_taken():
    with pytest.raises(ValueError, match="no scheme 'int5'; use one of int8, int4"):
        Scheme("int5")
    with pytest.raises(ValueError, match="group_size is -1"):
        Scheme("int4", -1)
    with pytest.raises(ValueError, match="nf4 has no zero points"):
        Scheme("nf4", symmetric=False)
    with pytest.raises(
        ValueError, match=r"group_size 128 does not divide the 32 inputs of .*q_proj.* use a divisor of 16"
    ):
        Scheme("int4").check(CONFIG)
    Scheme("int4", 16).check(CONFIG)


def test_the_rounded_value_is_exact_and_its_gradient_one():
    weight = ROWS["layers", "attention", "o"]
    array = jax.random.normal(jax.random.key(3), (4, 16, 32)) * 1e3  # where array + (rounded - array) would be off
    scheme = Scheme("int3", 16)
    got = jax.jit(fake_rounded, static_argnums=(1, 2))(array, weight, scheme)
    matrix = jax.jit(lambda x: qwix.dequantize(round_matrix(weight.to_matrix(x), scheme)))(array)
    np.testing.assert_array_equal(weight.to_matrix(got), matrix)
    grads = jax.grad(lambda x: jnp.sum(fake_rounded(x, weight, scheme) * array))(array)
    np.testing.assert_array_equal(grads, array)
