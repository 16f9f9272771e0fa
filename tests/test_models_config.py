"""What a config.json may say, and how a model's layers are counted and matched with another's."""

import json
import re

import pytest
import transformers

from rtd_jax.models.config import DecoderConfig, layers_to_copy, layers_to_match
from rtd_jax.models.from_hf import load_config
from rtd_jax.models.rope import RopeConfig

CONFIG = DecoderConfig(16, 8, 8, layers=3, heads=1, kv_heads=1, head_dim=8)


def test_hidden_states_are_counted_from_both_ends():
    assert [CONFIG.layer_index(layer) for layer in (0, 1, 3, -1, -4)] == [0, 1, 3, 3, 0]
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"hidden layer {layer} does not exist: .* 3 layers has 0 .* to 3"):
            CONFIG.layer_index(layer)


@pytest.mark.parametrize(("layers", "count", "wanted"), [(7, 3, (0, 3, 6)), (4, 4, (0, 1, 2, 3)), (5, 1, (0,))])
def test_copied_layers_include_the_first_and_the_last(layers, count, wanted):
    assert layers_to_copy(layers, count) == wanted


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [(4, 4, (1, 2, 3, 4)), (2, 4, (1, 1, 2, 2)), (32, 4, (8, 16, 24, 32)), (80, 4, (20, 40, 60, 80)), (3, 1, (3,))],
)
def test_matched_layers_are_evenly_spaced_and_end_with_the_last(layers, count, wanted):
    assert layers_to_match(layers, count) == wanted


# What a config.json may say -------------------------------------------------------------------------------------------

HF = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
NUMBERS = (f"1{'0' * 400}", "NaN", "Infinity", "-Infinity", "-1", "true", '"8"', "[8]", "{}", "1e999")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WHOLE = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
BAD = {
    **dict.fromkeys(WHOLE, (*NUMBERS, "0", "2.5", "8.0", "1e9", "99999999999999999999")),
    "rms_norm_eps": (*NUMBERS, "0", "null"),
    "initializer_range": (*NUMBERS, "1.5", "null"),
    "rope_theta": (*NUMBERS, "0", "null"),
    "tie_word_embeddings": ('"false"', "0", "1", "NaN", "null", "[]"),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id"), ("NaN", "2.0", "true", '"2"', "-2", "32", "[2, 32]", "[null]", "{}")
    ),
    "pad_token_id": ("32", "-2", '"<pad>"', "1.5"),
    "rope_scaling": ('"llama3"', "8", "[]", "true", "NaN"),
    "rope_parameters": ('"llama3"', "0", "[1]", "false"),
    **dict.fromkeys(("attention_bias", "mlp_bias"), ('"false"', "NaN", "1", "[true]")),
    "hidden_act": ("null", "3", '["silu"]', '"relu"'),
}


def load(tmp_path, text: str) -> DecoderConfig:
    (tmp_path / "config.json").write_text(text)
    return load_config(tmp_path)


@pytest.mark.parametrize("key", BAD)
def test_a_value_that_cannot_be_is_named_by_file_key_and_value(tmp_path, key):
    for value in BAD[key]:
        text = json.dumps({k: v for k, v in HF.items() if k != key})
        shown = "null|None" if value == "null" else re.escape(repr(json.loads(value))[:80])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: {key} is ({shown})"):
            load(tmp_path, f'{text[:-1]}, "{key}": {value}}}')


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_null_or_absent_is_missing(key):
    for hf in (HF | {key: None}, {k: v for k, v in HF.items() if k != key}):
        with pytest.raises(ValueError, match=f"missing {key}"):
            DecoderConfig.from_hf(hf)


def test_what_is_optional_may_be_null_or_absent():
    nothing = ("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling")
    small = {key: value for key, value in HF.items() if key not in nothing}
    assert DecoderConfig.from_hf(small | dict.fromkeys(nothing)) == DecoderConfig.from_hf(small)
    derived = DecoderConfig.from_hf(small)
    assert (derived.kv_heads, derived.head_dim) == (2, 32)
    assert DecoderConfig.from_hf(HF | {"pad_token_id": -1}).pad_token_id is None  # as the first Llamas said it
    assert DecoderConfig.from_hf(HF | {"head_dim": 16}).head_dim == 16  # need not be hidden_size / heads


def test_special_tokens_lie_in_the_vocabulary():
    assert DecoderConfig.from_hf(HF | {"eos_token_id": [0, 31]}).eos_token_id == (0, 31)
    with pytest.raises(ValueError, match="eos_token_id is 16, but the vocabulary of 16 has ids 0 to 15"):
        DecoderConfig(16, 8, 8, 3, 1, 1, 8, eos_token_id=16)


# Rotary embedding in two spellings ------------------------------------------------------------------------------------

THETA = 500_000.0
SAID = {"rope_theta": THETA, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SAID | {"rope_scaling": LLAMA3}, r"rope_parameters is .*'default'.* but rope_scaling is .*'llama3'"),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}}, r"8.0.* but rope_scaling is .*4.0"),
        (SAID | {"rope_theta": 10_000.0}, r"rope_parameters.rope_theta is 500000.0 but rope_theta is 10000.0"),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 1e4}, "rope_theta": 5e5}, r"rope_scaling.rope_theta is 10000.0 but"),
        # Without a theta beside it, transformers takes 10,000 with rope_scaling.
        ({"rope_parameters": LLAMA3 | {"rope_theta": THETA}, "rope_scaling": LLAMA3}, r"but rope_scaling is"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "linear"}}, r"rope_type is 'llama3' but .*type is 'linear'"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 1024},
            r"rope_scaling.original_max_position_embeddings is 512 but original_max_position_embeddings is 1024",
        ),
        ({"rope_scaling": LLAMA3, "partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 is not supported"),
        (SAID | {"rope_scaling": YARN}, r"rope_parameters is .*'default'.* but rope_scaling is .*'yarn'"),
        ({"rope_parameters": YARN, "rope_scaling": LLAMA3}, r"rope_parameters is .*'yarn'.* but rope_scaling is"),
        ({"rope_scaling": LONG}, "rope type 'longrope' is not supported; known: default, linear"),
        ({"rope_scaling": {"type": ["yarn"]}}, "is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' lacks factor"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "needs beta_fast > beta_slow, got 0.5 and 1.0"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, "rope_scaling.mscale is '1'; expected a number of at least 0"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "rope_scaling.truncate is 'no'; expected true or false"),
        (
            {"rope_parameters": {"full_attention": SAID["rope_parameters"]}},
            "rope_parameters.full_attention is an object",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": 0.0}}, "rope_scaling.factor is 0.0; expected a positive finite number"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_parameters.rope_theta is '1e4'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is null"),
    ],
)
def test_spellings_of_the_rotary_embedding_that_contradict_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(HF | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": THETA},
        SAID | {"rope_scaling": None},
        SAID | {"rope_scaling": {}},
        SAID | {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": THETA, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": THETA}},
        {"rope_theta": 500_000, "rope_parameters": None, "rope_scaling": LLAMA3 | {"factor": 8, "type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_theta": THETA, "partial_rotary_factor": 1.0}},
        {"rope_theta": THETA, "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}},
        {
            "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")},
            "original_max_position_embeddings": 512,
        },
    ],
)
def test_what_agrees_is_read_as_transformers_reads_it(tmp_path, changes):
    ours = load(tmp_path, json.dumps(HF | changes))
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    assert ours.rope.frequencies(32) == pytest.approx(rotary.inv_freq.numpy(), rel=1e-6)
    assert RopeConfig.from_hf(ours.rope.to_hf()) == ours.rope
