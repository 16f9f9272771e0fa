"""A teacher in int8: half the bytes, nearly the same function, through the same loading, sharding and decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_tiny import VARIANTS, hf_model, random_tokens
from qwix import QArray

from rtd_jax.base.sharding import MeshSettings, make_mesh, param_shardings
from rtd_jax.eval.decoding import GenerateSettings, generate
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.quantized import as_float, quantize_params, quantize_weight
from rtd_jax.models.weights import TABLE, logical_axes

WEIGHTS = {weight.path: weight for weight in TABLE}


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QArray)


@pytest.fixture(scope="module", params=["gqa", "llama3"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    hf_model(**VARIANTS[request.param]).save_pretrained(path)
    return path


def test_each_output_channel_has_its_own_scale_by_hand():
    gate_DF = jnp.array([[127.5, 0.5], [-63.4, 1.0]])
    quantized = quantize_weight(gate_DF, WEIGHTS["layers", "mlp", "gate"])
    np.testing.assert_allclose(quantized.scale, [[1.0, 1.0 / 127.5]], rtol=1e-6)
    # 0.5 is 63.75 scales; the largest is 127.5, which does not fit and becomes 127.
    np.testing.assert_array_equal(quantized.qvalue, [[127, 64], [-63, 127]])
    np.testing.assert_allclose(as_float(quantized, "float32"), [[127.0, 64 / 127.5], [-63.0, 127 / 127.5]], rtol=1e-6)


def test_scales_keep_their_digits_in_bfloat16():
    """A scale rounded to bfloat16 would multiply a whole channel by one wrong factor, of up to 0.4%."""
    gate_DF = jax.random.normal(jax.random.key(0), (4096, 8)) * jnp.linspace(1.0, 1.9, 8)
    quantized = quantize_weight(gate_DF, WEIGHTS["layers", "mlp", "gate"])
    whole, half = (np.asarray(as_float(quantized, x).astype(jnp.float32), np.float64) for x in ("float32", "bfloat16"))
    np.testing.assert_allclose(np.sum(half * whole, 0) / np.sum(whole * whole, 0), 1.0, atol=2**-11)


def test_the_error_of_a_weight_is_at_most_half_its_channels_step(directory):
    params = load_params(directory, load_config(directory))
    quantized = quantize_params(params)
    for got, want in zip(jax.tree.leaves(quantized, is_leaf=is_quantized), jax.tree.leaves(params), strict=True):
        if is_quantized(got):
            assert np.all(np.abs(as_float(got, "float32") - want) <= np.asarray(got.scale) / 2 * (1 + 1e-4))
        else:
            assert want.ndim <= 2  # norms
            np.testing.assert_array_equal(got, want)


def test_loading_gives_what_quantising_the_loaded_gives_in_half_of_bfloat16(directory):
    config = load_config(directory)
    model = DecoderModel(config)
    mesh = make_mesh(MeshSettings(1, 4, 2))
    abstract = model.abstract_params("int8")
    shardings = param_shardings(abstract, logical_axes(abstract), mesh)
    loaded = load_params(directory, config, dtype="int8", shardings=shardings)
    expected = quantize_params(load_params(directory, config))
    assert jax.tree.structure(loaded) == jax.tree.structure(abstract)
    for got, want, shape in zip(*map(jax.tree.leaves, (loaded, expected, abstract)), strict=True):
        assert (got.shape, got.dtype) == (shape.shape, shape.dtype)
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-2)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings), strict=True):
        assert got.sharding.is_equivalent_to(want, got.ndim)
    bytes_of = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.abstract_params(t))) for t in ("int8", "bfloat16")
    ]
    assert bytes_of[0] < 0.62 * bytes_of[1]  # scales and norms weigh more in a model this narrow


def test_hidden_states_and_head_are_those_of_the_rounded_weights(directory):
    config = load_config(directory)
    model = DecoderModel(config)
    params = load_params(directory, config)
    quantized = quantize_params(params)
    rounded = jax.tree.map(lambda x: as_float(x, "float32"), quantized, is_leaf=is_quantized)
    tokens = random_tokens(2, 12)
    inputs = (tokens, np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape), np.ones_like(tokens))
    hidden = jax.jit(model.hidden)
    got, want = hidden(quantized, *inputs), hidden(rounded, *inputs)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(model.head(quantized), model.head(rounded))
    assert float(jnp.max(jnp.abs(got - hidden(params, *inputs)))) > 1e-4  # the rounding is real
    prompts = [row.tolist() for row in np.asarray(tokens)]
    settings = GenerateSettings(max_new_tokens=6, eos_ids=(), vocab_size=config.vocab_size)
    assert generate(model, quantized, prompts, settings) == generate(model, rounded, prompts, settings)
