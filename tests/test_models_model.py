"""Properties of the pure functions: packing, layers, remat, compile size, shardings of activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rtd_jax.models.computation import REMAT_POLICIES
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel, chain_mask
from rtd_jax.models.rope import RopeConfig

CONFIG = DecoderConfig(61, 32, 48, layers=3, heads=4, kv_heads=2, head_dim=8, init_std=0.3)
MODEL = DecoderModel(CONFIG)


hidden = jax.jit(MODEL.hidden, static_argnames="layers")


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def one_chain(length: int, rows: int = 1, seed: int = 0):
    tokens = np.random.default_rng(seed).integers(0, 61, (rows, length)).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape), np.ones_like(tokens)


def packed_row(*chains, length: int):
    """Chains one after the other in one row, padded on the right with chain id 0."""
    numbered = [(tokens, positions, number * ids) for number, (tokens, positions, ids) in enumerate(chains, start=1)]
    rows = [np.concatenate(parts, axis=1) for parts in zip(*numbered, strict=True)]
    return tuple(np.pad(row, ((0, 0), (0, length - row.shape[1]))) for row in rows)


def test_packed_chains_equal_separate_runs(params):
    first, second = one_chain(7, seed=1), one_chain(10, seed=2)
    together = hidden(params, *packed_row(first, second, length=20))
    np.testing.assert_allclose(together[:, :7], hidden(params, *first), rtol=0, atol=1e-5)
    np.testing.assert_allclose(together[:, 7:17], hidden(params, *second), rtol=0, atol=1e-5)
    assert np.isfinite(together).all()  # padding too: its gradient is multiplied by zero, not removed


def test_a_row_of_one_chain_needs_no_mask(params):
    """With padding behind the chain, causal attention gives each of its tokens the state that the mask gives."""
    tokens, positions, ids = packed_row(one_chain(13, rows=2), length=20)
    masked, causal = hidden(params, tokens, positions, ids), hidden(params, tokens, positions, None)
    np.testing.assert_array_equal(causal[:, :13], masked[:, :13])
    assert np.isfinite(causal).all()


def test_no_gradient_crosses_from_one_chain_to_the_next(params):
    tokens, positions, ids = packed_row(one_chain(7, seed=1), one_chain(10, seed=2), length=20)

    def second_chain(embedding):
        changed = {**params, "embedding": embedding}
        return jnp.square(hidden(changed, tokens, positions, ids)[:, 7:17]).sum()

    gradient = jax.jit(jax.grad(second_chain))(params["embedding"])
    only_first = sorted(set(tokens[0, :7]) - set(tokens[0, 7:17]))
    assert only_first
    assert not np.asarray(gradient)[only_first].any()
    assert np.abs(gradient).max() > 0


def test_chain_mask_by_hand():
    mask = np.asarray(chain_mask(np.array([[1, 1, 2, 0]], np.int32)))[0, 0].astype(int)
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_llama3_frequencies_by_hand():
    """head_dim 4, theta 16: plain frequencies 1 and 1/4, that is 10 and 2.5 turns over an original context of 20 pi."""
    frequencies = functools.partial(RopeConfig.frequencies, head_dim=4)
    np.testing.assert_allclose(frequencies(RopeConfig(theta=16.0)), [1.0, 0.25])
    context = round(20 * np.pi * 1000)  # in thousandths, so that it is an integer
    scaled = RopeConfig(16.0, "llama3", 8.0, 1000.0, 4000.0, original_max_positions=context)
    # 10 turns are above 4: kept. 2.5 turns lie halfway between 1 and 4: half of it kept, half divided by 8.
    np.testing.assert_allclose(frequencies(scaled), [1.0, 0.25 * (0.5 + 0.5 / 8)], rtol=1e-5)
    slow = RopeConfig(16.0, "llama3", 8.0, 3000.0, 4000.0, original_max_positions=context)
    np.testing.assert_allclose(frequencies(slow), [1.0, 0.25 / 8], rtol=1e-5)


def test_remat_changes_neither_value_nor_gradient_but_keeps_less(params):
    inputs = one_chain(12, rows=2)

    def loss(model, params):
        final, (middle,) = model.hidden(params, *inputs, layers=(1,))
        return jnp.square(final).sum() + jnp.sin(middle).sum()

    def kept_bytes(model):
        backward = jax.eval_shape(lambda p: jax.vjp(functools.partial(loss, model), p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

    expected_value, expected_gradient = jax.jit(jax.value_and_grad(functools.partial(loss, MODEL)))(params)
    for remat in set(REMAT_POLICIES) - {"none"}:
        model = DecoderModel(CONFIG, remat=remat)
        value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, model)))(params)
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected_gradient)
        assert kept_bytes(model) < kept_bytes(MODEL)
    assert kept_bytes(DecoderModel(CONFIG, remat="full")) < kept_bytes(DecoderModel(CONFIG, remat="dots"))


def test_the_traced_program_does_not_grow_with_depth():
    def equations(layers: int) -> int:
        model = DecoderModel(DecoderConfig(61, 32, 48, layers=layers, heads=4, kv_heads=2, head_dim=8), remat="full")
        inputs = one_chain(8)
        grad = jax.grad(lambda params: model.hidden(params, *inputs).sum())
        return str(jax.make_jaxpr(grad)(model.abstract_params())).count("\n")

    assert equations(80) == equations(2)


def test_hidden_layers_are_numbered_as_transformers_does(params):
    inputs = one_chain(5)
    final, (embeddings, last, again, second_last, repeated) = hidden(params, *inputs, layers=(0, 3, -1, -2, 2))
    np.testing.assert_array_equal(embeddings, params["embedding"][inputs[0]])
    np.testing.assert_array_equal(last, final)
    np.testing.assert_array_equal(again, final)
    np.testing.assert_array_equal(second_last, repeated)
    assert np.abs(second_last - final).max() > 0.1


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_refused(params, layer):
    with pytest.raises(ValueError, match=rf"layer {layer} does not exist: a model of 3 layers has 0 .* to 3"):
        hidden(params, *one_chain(5), layers=(layer,))


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [("remat", "some", "none, full, dots"), ("compute_dtype", "int8", "bfloat16"), ("attention", "fast", "cudnn")],
)
def test_bad_settings_are_refused_with_the_choices(field, value, way_out):
    with pytest.raises(ValueError, match=f"{value}.*{way_out}"):
        DecoderModel(CONFIG, **{field: value})


def test_activation_sharding_spreads_rows_and_changes_nothing(params):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    inputs = one_chain(6, rows=8)
    model = DecoderModel(CONFIG, activation_sharding=sharding)
    hidden_BLD = jax.jit(model.hidden)(params, *inputs)
    assert hidden_BLD.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(hidden_BLD, hidden(params, *inputs), rtol=0, atol=1e-5)


def test_equal_models_share_one_compilation(params):
    run = jax.jit(lambda model, params, *inputs: model.hidden(params, *inputs), static_argnums=0)
    for _ in range(2):
        run(DecoderModel(DecoderConfig(**vars(CONFIG))), params, *one_chain(4))
    assert run._cache_size() == 1


def test_init_has_the_abstract_shapes_and_the_spread_of_the_config():
    params = MODEL.init(jax.random.key(1), dtype="bfloat16")
    abstract = MODEL.abstract_params("bfloat16")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    down = np.asarray(params["layers"]["mlp"]["down"], np.float32)
    assert abs(down.std() - 0.3) < 0.01
    assert np.abs(down[0] - down[1]).max() > 0.1  # layers do not share their random numbers
    np.testing.assert_array_equal(np.asarray(params["norm"]["scale"], np.float32), np.ones(32))
