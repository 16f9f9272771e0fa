"""Layer by layer, a model computes what it computes at once, and hands out what its matrices read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.models.calibration import embed, layer_inputs, layer_params
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel

CONFIG = DecoderConfig(61, 32, 48, layers=3, heads=4, kv_heads=2, head_dim=8, init_std=0.3)
MODEL = DecoderModel(CONFIG)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def packed():
    """Tokens, positions and chain ids of two rows: two chains and padding each."""
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20)).astype(np.int32)
    positions = np.tile(np.r_[np.arange(7), np.arange(10), np.zeros(3)].astype(np.int32), (2, 1))
    ids = np.tile(np.r_[np.ones(7), np.full(10, 2), np.zeros(3)].astype(np.int32), (2, 1))
    return tokens, positions, ids


def walk(params):
    """The states before and after each layer, and what each layer's matrices read."""
    tokens, positions, ids = packed()
    states, inputs = [embed(MODEL, params, tokens)], []
    for layer in range(CONFIG.layers):
        after, read = layer_inputs(MODEL, layer, layer_params(params, layer), states[-1], positions, ids)
        states.append(after)
        inputs.append(read)
    return states, inputs


def test_states_of_packed_rows_are_those_of_the_whole_model(params):
    states, _ = walk(params)
    _, wanted = MODEL.hidden(params, *packed(), layers=(0, 1, 2))
    for state, whole in zip(states, wanted, strict=False):
        np.testing.assert_allclose(state, whole, rtol=1e-5, atol=1e-5)


def test_what_matrices_read_gives_the_layer_again(params):
    """x + mixed o + neurons down is the state after the layer, and gate and up make the neurons of their inputs."""
    states, inputs = walk(params)
    for layer, (attention, mixed, mlp, neurons) in enumerate(inputs):
        own = layer_params(params, layer)
        half = states[layer] + jnp.einsum("BLHE,HED->BLD", mixed, own["attention"]["o"])
        after = half + neurons @ own["mlp"]["down"]
        np.testing.assert_allclose(after, states[layer + 1], rtol=1e-4, atol=1e-5)
        for read, x in ((attention, states[layer]), (mlp, half)):
            scale = own["attention_norm" if read is attention else "mlp_norm"]["scale"]
            norm = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + CONFIG.norm_eps) * scale
            np.testing.assert_allclose(read, norm, rtol=1e-4, atol=1e-5)
        gate = mlp @ own["mlp"]["gate"]
        np.testing.assert_allclose(neurons, jax.nn.silu(gate) * (mlp @ own["mlp"]["up"]), rtol=1e-4, atol=1e-4)
