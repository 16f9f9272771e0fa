"""Low-rank adapters against dense matrices, against `peft`, and over frozen weights of every dtype."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from models_tiny import VARIANTS, hf_model, positions, random_tokens
from qwix import QArray

from rtd_jax.base.sharding import MeshSettings, make_mesh, param_shardings
from rtd_jax.models.adapter_folders import save_adapter
from rtd_jax.models.adapters import AdapterSettings, frozen, init_adapter, merged
from rtd_jax.models.computation import Computation
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.quantized import as_float
from rtd_jax.models.schemes import Scheme
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weights import ADAPTER_TABLE, ROWS, logical_axes

RANK = 4
ALL = AdapterSettings(rank=RANK, alpha=6.0, base_dtype="float32")
TOKENS, PLACES = random_tokens(2, 12), positions(2, 12)


def random_adapter(settings: AdapterSettings, config) -> dict:
    """Neither A nor B is zero, so that each has a gradient and shows in the logits."""
    start = init_adapter(settings, config, jax.random.key(3))
    leaves = flatten_dict(start)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    drawn = zip(leaves.items(), keys, strict=True)
    return unflatten_dict({path: 0.3 * jax.random.normal(key, x.shape) for (path, x), key in drawn})


def dense(base: dict, adapter: dict, settings: AdapterSettings) -> dict:
    """W + (alpha / rank) A B as one matrix product of all inputs with all outputs, written out."""
    weights, thin = flatten_dict(base), flatten_dict(adapter)
    for name in settings.matrices:
        path = next(path for path in weights if path[-1] == name)
        a, b = (thin[(*path[:-1], f"{name}_adapter", part)] for part in "ab")
        change = a.reshape(a.shape[0], -1, settings.rank) @ b.reshape(b.shape[0], settings.rank, -1)
        weights[path] = weights[path] + settings.alpha / settings.rank * change.reshape(weights[path].shape)
    return unflatten_dict(weights)


def opened(folder, variant: str, settings: AdapterSettings = ALL):
    """(the transformers model, ours with a random adapter, its params)."""
    reference = hf_model(**VARIANTS[variant])
    reference.save_pretrained(folder)
    config = load_config(folder)
    params = {"base": load_params(folder, config), "adapter": random_adapter(settings, config)}
    return reference, DecoderModel(config, adapter=settings), params


@pytest.mark.parametrize(
    ("variant", "matrices"),
    [("smollm3_listed", tuple(ADAPTER_TABLE)), ("qwen2", tuple(ADAPTER_TABLE)), ("gqa", ("v", "down"))],
)
def test_values_and_gradients_equal_those_of_dense_matrices(variant, matrices, tmp_path):
    settings = dataclasses.replace(ALL, matrices=matrices)
    _, model, params = opened(tmp_path, variant, settings)
    plain = dataclasses.replace(model, adapter=None)
    target = jax.random.normal(jax.random.key(5), (*TOKENS.shape, model.config.width))

    def loss(adapter, forward):
        return jnp.sum(forward(adapter) * target), forward(adapter)

    def thin(adapter):
        return model.hidden({"base": params["base"], "adapter": adapter}, TOKENS, PLACES, None)

    def whole(adapter):
        return plain.hidden(dense(params["base"], adapter, settings), TOKENS, PLACES, None)

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (got, got_BLD), (want, want_BLD) = gradient(params["adapter"], thin), gradient(params["adapter"], whole)
    np.testing.assert_allclose(got_BLD, want_BLD, rtol=1e-4, atol=1e-4)
    for path, x in flatten_dict(want).items():
        scale = float(jnp.abs(x).max())
        assert scale > 1e-3, path
        np.testing.assert_allclose(flatten_dict(got)[path], x, rtol=0, atol=1e-4 * scale, err_msg=str(path))
    chex.assert_trees_all_close(
        merged(params, settings, "float32"), dense(params["base"], params["adapter"], settings), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("base_dtype", ["float32", "int8", "int4"])
def test_an_adapter_begins_without_effect_and_a_merged_model_computes_the_same(base_dtype, tmp_path):
    """Of the model on rows, and of prefill and decode, which run the same layers with a cache."""
    _, model, params = opened(tmp_path, "gqa", dataclasses.replace(ALL, base_dtype=base_dtype))
    params["base"] = frozen(params["base"], base_dtype)
    run = jax.jit(model.hidden)
    start = params | {"adapter": init_adapter(model.adapter, model.config, jax.random.key(0))}
    plain = dataclasses.replace(model, adapter=None)
    np.testing.assert_array_equal(
        run(start, TOKENS, PLACES, None), jax.jit(plain.hidden)(params["base"], TOKENS, PLACES, None)
    )
    whole, floats = model.deployed(params)
    assert whole == plain
    assert not any(isinstance(x, QArray) for x in flatten_dict(floats).values())
    want = jax.jit(whole.hidden)(floats, TOKENS, PLACES, None)
    np.testing.assert_allclose(run(params, TOKENS, PLACES, None), want, atol=2e-4)
    assert np.abs(want - run(start, TOKENS, PLACES, None)).max() > 0.1
    states, cache = model.prefill(params, TOKENS[:, :5], np.array([5, 5]), 12)
    np.testing.assert_allclose(states, want[:, 4], atol=2e-4)
    state, _ = model.decode(params, cache, TOKENS[:, 5], np.array([5, 5]))
    np.testing.assert_allclose(state, want[:, 5], atol=2e-4)


@pytest.mark.parametrize("variant", ["mqa_with_wide_heads", "qwen2", "qwen3", "smollm3_listed"])
def test_peft_loads_the_folder_and_gives_our_logits(variant, tmp_path):
    matrices = tuple(ADAPTER_TABLE) if variant != "qwen3" else ("q", "o", "up")
    settings = dataclasses.replace(ALL, matrices=matrices)
    reference, model, params = opened(tmp_path / "base", variant, settings)
    folder = save_adapter(tmp_path / "adapter", model.config, params["adapter"], settings, str(tmp_path / "base"))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = reference(torch.tensor(TOKENS, dtype=torch.int64)).logits.detach().numpy()
    found = peft.PeftModel.from_pretrained(reference, folder)
    assert found.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    with torch.no_grad():
        want = found(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()
    hidden = jax.jit(model.hidden)(params, TOKENS, PLACES, None)
    got = np.asarray(model.logits(params, hidden))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(before - want).max() > 0.1 * np.abs(want).max()
    # The merged folder is the same model, without peft.
    save_pretrained(tmp_path / "merged", model.config, merged(params, settings, "float32"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        same = whole(torch.tensor(TOKENS, dtype=torch.int64)).logits.numpy()
    assert np.abs(same - want).max() < 1e-5 * np.abs(want).max()


def test_a_begins_as_in_peft(tmp_path):
    """Uniform in +-1 / sqrt(inputs), which are the heads' units for `o`, and B at zero; peft's own A for comparison."""
    reference, model, _ = opened(tmp_path, "mqa_with_wide_heads")
    ours = init_adapter(dataclasses.replace(ALL, rank=16), model.config, jax.random.key(0))
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=16, target_modules=["o_proj", "down_proj"]))
    for kind, name in (("attention", "o"), ("mlp", "down")):
        a = ours["layers"][kind][f"{name}_adapter"]["a"]
        inputs = math.prod(a.shape[1:-1])
        assert 0.97 < float(jnp.abs(a).max()) * math.sqrt(inputs) <= 1
        drawn = [x for key, x in theirs.named_parameters() if f"{name}_proj.lora_A" in key]
        assert float(jnp.std(a)) == pytest.approx(float(torch.stack(drawn).std()), rel=0.1)
        assert not np.any(ours["layers"][kind][f"{name}_adapter"]["b"])


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8", "int4"])
def test_files_are_read_as_frozen_weights_on_any_mesh(base_dtype, tmp_path):
    _, model, params = opened(tmp_path, "qwen2_untied")
    want = jax.jit(frozen, static_argnums=1)(params["base"], base_dtype)
    got = load_params(tmp_path, model.config, dtype=base_dtype)
    chex.assert_trees_all_equal(got, want)
    mesh = make_mesh(MeshSettings(2, 2, 2))
    abstract = dataclasses.replace(model, adapter=dataclasses.replace(ALL, base_dtype=base_dtype)).abstract_params()
    shardings = param_shardings(abstract, logical_axes(abstract), mesh)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract["base"], want)
    spread = load_params(tmp_path, model.config, dtype=base_dtype, shardings=shardings["base"])
    chex.assert_trees_all_equal(jax.device_get(spread), jax.device_get(want))
    assert not spread["layers"]["mlp"]["gate"].sharding.is_fully_replicated if base_dtype == "bfloat16" else True


def test_int4_has_a_scale_for_each_block_and_rounds_to_the_nearest():
    """64 inputs share one, or what divides the axis: 16 of the 48 units of the MLP, 8 of a head, 32 of the width."""
    model = DecoderModel(dataclasses.replace(load_tiny(), tied_embeddings=False))
    params = model.init(jax.random.key(0))
    leaves = flatten_dict(frozen(params, "int4"))
    for name, axis, block in (("q", 1, 32), ("o", 2, 8), ("gate", 1, 32), ("down", 1, 16)):
        path = next(path for path in leaves if path[-1] == name)
        weight, array = flatten_dict(params)[path], leaves[path]
        assert array.qvalue.dtype == jnp.int4
        assert array.scale.shape[axis] * block == weight.shape[axis]
        assert [x for i, x in enumerate(array.scale.shape) if i != axis] == [
            x for i, x in enumerate(weight.shape) if i != axis
        ]
        half = 0.5 * np.repeat(array.scale, block, axis)
        assert np.all(np.abs(as_float(array, "float32") - weight) <= half * 1.001)
    for name in ("embedding", "head"):
        assert leaves[(name,)].qvalue.dtype == jnp.int8
    assert leaves["norm", "scale"].dtype == jnp.bfloat16
    assert all(leaves[path].dtype == jnp.bfloat16 for path in leaves if not ROWS[path].inputs)


def load_tiny():
    from test_train_update import TEACHER

    return TEACHER.config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"matrices": ("q", "w")}, "matrices has 'w'; expected some of q, k, v, o, gate, up, down"),
        ({"matrices": ("q", "q")}, "matrices is .*expected each value once"),
        ({"matrices": ()}, "matrices is empty"),
        ({"rank": -1}, "rank is -1; expected 0 to"),
        ({"alpha": 0.0}, "alpha is 0.0; expected above 0"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(ALL, **changes)


def test_what_does_not_go_together_is_refused(tmp_path):
    config = load_tiny()
    with pytest.raises(ValueError, match=r"rank is 17, but the matrices 'k' of this model have no more than 16 rows"):
        AdapterSettings(rank=17).check(config)
    AdapterSettings(rank=17, matrices=("q", "up")).check(config)
    for changes in ({"quantization": Scheme("int8", 0), "adapter": ALL}, {"adapter": AdapterSettings()}):
        with pytest.raises(ValueError, match="expected a rank from 1 and no quantization"):
            Computation(config, **changes)
    adapter = random_adapter(ALL, config)
    with pytest.raises(ValueError, match=r"layers\.attention\.q_adapter\.a has shape .*save it with its own settings"):
        save_adapter(tmp_path / "adapter", config, adapter, dataclasses.replace(ALL, rank=2), "x")
    folder = save_adapter(tmp_path / "adapter", config, adapter, ALL, "x")
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 6
    save_adapter(folder, config, adapter, ALL, "y")  # replaces its own files
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="is no part of a Hugging Face model"):
        save_adapter(folder, config, adapter, ALL, "x")
