"""What sets the families apart: published descriptions, keys that are left out, layers that differ, and refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from models_tiny import BASE, VARIANTS, WINDOW, hf_model, positions, random_tokens

from rtd_jax.base.sharding import FSDP, MeshSettings, make_mesh, param_shardings
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.families import FAMILIES
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.gptq import gptq
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.pruning import prune_model, pruned_config
from rtd_jax.models.quantized_folders import save_quantized
from rtd_jax.models.rope import RopeConfig
from rtd_jax.models.schemes import Scheme, as_params, rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weights import logical_axes, parameter_count

# Descriptions as published: what matters of config.json, and the number of parameters.


def sizes(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads"), (vocab, width, mlp, layers, heads, kv_heads), strict=True))


QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False}
QWEN2 |= {"sliding_window": 131_072, "max_position_embeddings": 32_768, "hidden_act": "silu"}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "sliding_window": None}
MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6}
SMOLLM3 = {
    "model_type": "smollm3",
    "rope_theta": 5e6,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "no_rope_layer_interval": 4,
    "layer_types": ["full_attention"] * 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 2,
    "max_window_layers": 28,
}
TIED = {"tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
PUBLISHED = {
    "Llama-2-7B": (LLAMA | sizes(32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    "Llama-3-8B": (LLAMA | sizes(128_256, 4096, 14_336, 32, 32, 8) | {"rope_theta": 5e5}, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA | sizes(128_256, 2048, 8192, 16, 32, 8) | TIED | {"head_dim": 64}, 1_235_814_400),
    "SmolLM2-135M": (LLAMA | sizes(49_152, 576, 1536, 30, 9, 3) | TIED | {"rope_theta": 1e5}, 134_515_008),
    "TinyLlama-1.1B": (LLAMA | sizes(32_000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "Mistral-7B-v0.1": (
        MISTRAL | sizes(32_000, 4096, 14_336, 32, 32, 8) | {"sliding_window": 4096, "rope_theta": 1e4},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (MISTRAL | sizes(32_768, 4096, 14_336, 32, 32, 8), 7_248_023_552),
    "Mistral-Nemo-2407": (MISTRAL | sizes(131_072, 5120, 14_336, 40, 32, 8) | {"head_dim": 128}, 12_247_782_400),
    "Qwen2.5-0.5B": (QWEN2 | sizes(151_936, 896, 4864, 24, 14, 2) | TIED, 494_032_768),
    "Qwen2.5-1.5B": (QWEN2 | sizes(151_936, 1536, 8960, 28, 12, 2) | TIED, 1_543_714_304),
    "Qwen2.5-7B": (QWEN2 | sizes(152_064, 3584, 18_944, 28, 28, 4), 7_615_616_512),
    "Qwen2.5-72B": (QWEN2 | sizes(152_064, 8192, 29_568, 80, 64, 8) | {"max_window_layers": 70}, 72_706_203_648),
    "Qwen3-0.6B": (QWEN3 | sizes(151_936, 1024, 3072, 28, 16, 8) | TIED, 596_049_920),
    "Qwen3-4B": (QWEN3 | sizes(151_936, 2560, 9728, 36, 32, 8) | TIED, 4_022_468_096),
    "Qwen3-8B": (QWEN3 | sizes(151_936, 4096, 12_288, 36, 32, 8), 8_190_735_360),
    "Qwen3-32B": (QWEN3 | sizes(151_936, 5120, 25_600, 64, 64, 8), 32_762_123_264),
    "SmolLM3-3B": (SMOLLM3 | sizes(128_256, 2048, 11_008, 36, 16, 4), 3_075_098_624),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_description_is_read(name):
    hf, parameters = PUBLISHED[name]
    config = DecoderConfig.from_hf(hf)
    assert parameter_count(config) == parameters
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert config.window == (4096 if name == "Mistral-7B-v0.1" else None)
    assert config.unrotated_layers == (tuple(range(3, 36, 4)) if name == "SmolLM3-3B" else ())
    assert config.qk_norm == name.startswith("Qwen3")
    assert config.qkv_bias == name.startswith("Qwen2.5")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(family, tmp_path):
    """Of a config.json with nothing but sizes, and heads that every family's own number of groups divides."""
    hf = {key: value for key, value in sizes(16, 64, 64, 8, 32, 0).items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps(hf | {"model_type": family}))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), load_config(tmp_path)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.window == (getattr(theirs, "sliding_window", None) if family == "mistral" else None)
    not_rotated = [layer for layer, rotates in enumerate(getattr(theirs, "no_rope_layers", [])) if not rotates]
    assert list(ours.unrotated_layers) == not_rotated


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "phi3"}, "'phi3', a model with fused q, k, v .*longrope.*, which the decoder does not compute"),
        ({"model_type": "gemma3_text"}, "'gemma3_text', a model with norms after attention and MLP"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe', a model with a mixture of experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral', a model with a mixture of experts"),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256},
            "'deepseek_v3', a model with a mixture of experts and latent attention",
        ),
        ({"model_type": "mllama", "text_config": {}}, "'mllama', a model with a text model inside a multimodal one"),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "'qwen2_vl', a model with a text model inside a multimodal"),
        ({"model_type": "unheard"}, "'unheard', which the decoder does not compute; supported: llama, mistral, qwen2"),
        ({}, "model_type is null; expected one of the families that are supported: llama"),
    ],
)
def test_another_architecture_is_refused_with_what_it_would_need(hf, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(sizes(16, 8, 8, 2, 2, 1) | hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers is \[1\]; expected a list of 3 numbers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 0]}, "no_rope_layers is .*expected a list of 3"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "sliding_window": "4k"}, "sliding_window is '4k'"),
        ({"model_type": "qwen3", "use_sliding_window": "yes"}, "use_sliding_window is 'yes'; expected true or false"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types is .*expected 3 of 'full_attention'"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, "layer_types is .*'sliding_attention'"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention', but use_sliding_window is False",
        ),
    ],
)
def test_switches_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(BASE | changes)


def test_a_window_that_is_switched_off_is_not_read():
    off = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 0, "max_window_layers": None}
    assert DecoderConfig.from_hf(BASE | off).window is None


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_factor_of_yarn_on_which_readers_disagree_is_refused(spelling):
    """That of DeepSeek-R1-0528-Qwen3-8B: with it vLLM multiplies by 1, and transformers by 0.1 ln 4 + 1."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    hf = BASE | {"model_type": "qwen3", "rope_theta": 1e6}
    message = rf"{spelling}.attn_factor is 0.878249: vLLM multiplies cosine and sine by 1 .* by 1.13863; put the one"
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(hf | {spelling: rope | {"attn_factor": 0.8782488562869419}})
    chosen = DecoderConfig.from_hf(hf | {spelling: rope | {"attn_factor": 0.8782488562869419, "attention_factor": 1.0}})
    assert chosen.rope.attention_factor == 1.0
    assert DecoderConfig.from_hf(hf | {spelling: rope | {"attn_factor": 1}}).rope.attention_factor > 1.1


def test_sizes_and_layers_must_fit():
    plain = DecoderConfig(16, 8, 8, 3, 1, 1, 8)
    for changes, message in (
        ({"family": "gpt2"}, "family is 'gpt2'; use one of llama, mistral"),
        ({"unrotated_layers": (3,)}, r"unrotated_layers is \(3,\), but there are layers 0 to 2"),
        ({"window": 4}, r"window is 4 and windowed_layers \(\); give both"),
        ({"windowed_layers": (1,)}, r"window is None and windowed_layers \(1,\); give both"),
        ({"windowed_layers": (1,), "window": 0}, "window is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(plain, **changes)


def test_fewer_layers_keep_what_each_of_them_is():
    whole = DecoderConfig.from_hf(PUBLISHED["SmolLM3-3B"][0])
    assert whole.layers_differ
    few = whole.of_layers((0, 3, 7, 10, 35))
    assert (few.layers, few.unrotated_layers) == (5, (1, 2, 4))
    windowed = DecoderConfig.from_hf(BASE | VARIANTS["qwen3_windows_by_layer"])
    assert windowed.of_layers((0, 1)).windowed_layers == (0,)
    assert (windowed.of_layers((1,)).windowed_layers, windowed.of_layers((1,)).window) == ((), None)
    assert not DecoderConfig.from_hf(BASE | VARIANTS["mistral_window"]).layers_differ


def test_checkpoints_of_plain_llamas_are_known_from_before_there_were_other_families():
    plain = DecoderConfig(16, 8, 8, layers=3, heads=1, kv_heads=1, head_dim=8)
    assert plain.identity == (
        "LlamaConfig(vocab_size=16, width=8, mlp_width=8, layers=3, heads=1, kv_heads=1, head_dim=8, norm_eps=1e-05, "
        "rope=RopeConfig(theta=10000.0, kind='default', factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, "
        "original_max_positions=8192), tied_embeddings=False, max_positions=2048, init_std=0.02, bos_token_id=None, "
        "eos_token_id=None, pad_token_id=None)"
    )
    others = [
        dataclasses.replace(plain, **changes)
        for changes in (
            {"family": "mistral"},
            {"qk_norm": True},
            {"window": 4, "windowed_layers": (0,)},
            {"window": 4, "windowed_layers": (1,)},
            {"rope": RopeConfig(kind="yarn", beta_fast=8.0)},
            {"rope": RopeConfig(kind="yarn")},
            {"width": 16},
        )
    ]
    assert len({one.identity for one in (plain, *others)}) == 8


# Computation ----------------------------------------------------------------------------------------------------------


def family_model(variant: str, directory) -> tuple[DecoderModel, dict]:
    hf_model(**VARIANTS[variant]).save_pretrained(directory)
    config = load_config(directory)
    return DecoderModel(config), load_params(directory, config)


hidden = jax.jit(DecoderModel.hidden, static_argnums=0)


@pytest.mark.parametrize("variant", ["mistral_window", "qwen3_windows_by_layer", "smollm3_windows", "yarn"])
def test_packed_chains_are_computed_as_if_each_were_alone(variant, tmp_path):
    model, params = family_model(variant, tmp_path)
    lengths, tokens_1L = (20, 13, 15), random_tokens(1, 48)
    ids_1L = np.repeat([1, 2, 0], lengths)[None].astype(np.int32)
    places_1L = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    packed_LD = hidden(model, params, tokens_1L, places_1L, ids_1L)[0]
    start = 0
    for length in lengths[:2]:
        alone = slice(start, start + length)
        tokens = tokens_1L[:, alone]
        # Without chain ids: a row that holds one chain has no mask but the window's.
        expected_LD = hidden(model, params, tokens, positions(1, length), None)[0]
        np.testing.assert_allclose(packed_LD[alone], expected_LD, rtol=0, atol=2e-5)
        start += length


def test_a_window_that_no_row_exceeds_costs_no_mask(tmp_path):
    """So that a flash kernel can be used; and the window does change what is longer."""
    model, params = family_model("mistral_window", tmp_path)
    open_config = dataclasses.replace(model.config, window=None, windowed_layers=())
    plain, tokens = DecoderModel(open_config), random_tokens(1, 2 * WINDOW)
    short = tokens[:, :WINDOW], positions(1, WINDOW), None
    np.testing.assert_array_equal(hidden(model, params, *short), hidden(plain, params, *short))
    texts = [str(jax.make_jaxpr(one.hidden)(params, *short)) for one in (model, plain)]
    assert texts[0] == texts[1]
    long = tokens, positions(1, 2 * WINDOW), None
    apart_LD = np.abs(hidden(model, params, *long) - hidden(plain, params, *long))[0].max(axis=-1)
    assert apart_LD[:WINDOW].max() == 0
    assert apart_LD[WINDOW:].min() > 1e-3


def test_rows_that_dynamic_rope_would_scale_anew_are_refused(tmp_path):
    model, params = family_model("dynamic", tmp_path)
    tokens = random_tokens(1, 65)
    with pytest.raises(ValueError, match=r"rows of 65 tokens: .*'dynamic'.* beyond 64 tokens; use shorter rows"):
        model.hidden(params, tokens, positions(1, 65), None)
    with pytest.raises(ValueError, match="rows of 65 tokens"):
        model.prefill(params, tokens[:, :60], np.array([60], np.int32), 65)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3_biases", "smollm3_listed"])
def test_a_sharded_model_computes_the_same(variant, tmp_path):
    model, params = family_model(variant, tmp_path)
    mesh = make_mesh(MeshSettings(data=1, fsdp=4, tensor=2))
    abstract = model.abstract_params()
    shardings = param_shardings(abstract, logical_axes(abstract), mesh, FSDP)
    spread = load_params(tmp_path, model.config, shardings=shardings)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens_BL = random_tokens(8, 16)
    inputs = [jax.device_put(x, rows) for x in (tokens_BL, positions(8, 16), np.ones_like(tokens_BL))]
    expected_BLD = hidden(model, params, tokens_BL, positions(8, 16), np.ones_like(tokens_BL))
    np.testing.assert_allclose(hidden(model, spread, *inputs), expected_BLD, rtol=0, atol=5e-5)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3_biases", "llama_biases"])
def test_random_weights_begin_with_norms_of_one_and_no_biases(variant):
    config = DecoderConfig.from_hf({"model_type": "llama"} | BASE | VARIANTS[variant])
    params = DecoderModel(config).init(jax.random.key(0))
    attention = params["layers"]["attention"]
    assert {"qwen2": "q_bias", "qwen3_biases": "q_norm", "llama_biases": "o_bias"}[variant] in attention
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            assert np.all(np.asarray(leaf) == 1)
        elif name.endswith("_bias"):
            assert np.all(np.asarray(leaf) == 0)
        else:
            assert np.std(leaf) == pytest.approx(config.init_std, rel=0.2)


def random_chains(count: int) -> list[EncodedChain]:
    drawn, weights = np.random.default_rng(0), np.r_[np.zeros(3), np.ones(17)].astype(np.float32)
    ends = np.array([2, 19], np.int32)
    return [EncodedChain(drawn.integers(0, 61, 20).astype(np.int32), 3, ends, weights) for _ in range(count)]


@pytest.mark.parametrize("variant", ["qwen2_untied", "qwen3_biases", "llama_biases", "mistral_window"])
def test_what_pruning_leaves_out_did_nothing(variant, tmp_path):
    """Neurons, heads and their biases that are zero go, and the pruned model computes the same."""
    model, params = family_model(variant, tmp_path)
    params = jax.tree.map(np.array, params)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for name in ("up", "up_bias"):
        if name in mlp:
            mlp[name][..., ::2] = 0
    for name in ("v", "v_bias"):
        if name in attention:
            attention[name][..., :1, :] = 0
    target = pruned_config(model.config, mlp_width=24, kv_heads=1)
    pruned = prune_model(model, params, random_chains(3), target)
    assert pruned.config.family == model.config.family
    tokens = random_tokens(2, 20)
    inputs = tokens, positions(2, 20), np.ones_like(tokens)
    expected, found = hidden(model, params, *inputs), hidden(DecoderModel(target), pruned.params, *inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_layers_that_differ_are_not_left_out_by_importance():
    config = DecoderConfig.from_hf(BASE | VARIANTS["smollm3_listed"])
    with pytest.raises(ValueError, match=r"layers is 2, but the layers of this smollm3 differ.*teacher_layers"):
        pruned_config(config, layers=2)
    assert pruned_config(config, mlp_width=24).unrotated_layers == config.unrotated_layers


# Few bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nearest", "gptq"])
@pytest.mark.parametrize("variant", ["qwen2", "qwen3_windows_by_layer", "smollm3_listed"])
def test_a_rounded_folder_gives_transformers_the_same_logits(variant, how, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, params = family_model(variant, tmp_path / "floats")
    scheme, tokens = Scheme("int4", 16), random_tokens(2, 24)
    inputs = tokens, positions(2, 24), np.ones_like(tokens)
    matrices = rounded(params, scheme) if how == "nearest" else gptq(model, params, [inputs], scheme)
    save_quantized(tmp_path / "int4", model.config, matrices, scheme)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    ours = as_params(matrices, model.config)
    np.testing.assert_allclose(model.logits(ours, hidden(model, ours, *inputs)), expected, rtol=0, atol=2e-4)
    again = load_params(tmp_path / "int4", load_config(tmp_path / "int4"))
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_an_int8_model_keeps_its_biases_and_norms(tmp_path):
    model, params = family_model("qwen3_biases", tmp_path)
    small = load_params(tmp_path, model.config, dtype="int8")
    tokens = random_tokens(2, 24)
    inputs = tokens, positions(2, 24), np.ones_like(tokens)
    expected, found = (np.asarray(hidden(model, one, *inputs)) for one in (params, small))
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    bias = np.asarray(small["layers"]["attention"]["q_bias"], np.float32)
    np.testing.assert_allclose(bias, params["layers"]["attention"]["q_bias"], rtol=0.01)


def test_a_model_of_fewer_layers_is_written_and_read_by_transformers(tmp_path):
    """Layers 1 and 2 of a SmolLM3 of three: the first of them has no rotary embedding, wherever it now stands."""
    model, _ = family_model("smollm3", tmp_path / "whole")
    few = model.config.of_layers((1, 2))
    params = load_params(tmp_path / "whole", model.config, layers=(1, 2))
    save_pretrained(tmp_path / "few", few, params)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.float32)
        expected = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    found = hidden(DecoderModel(few), params, tokens, positions(2, 24), np.ones_like(tokens))
    assert few.unrotated_layers == (0,)
    np.testing.assert_allclose(DecoderModel(few).logits(params, found), expected, rtol=0, atol=1e-4)
