"""Cached decoding of right-padded prompts, token by token against transformers' generate and against no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models_tiny import VARIANTS, hf_model, positions, random_tokens

from rtd_jax.models.decoder import KVCache
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel

LENGTHS = (9, 1, 14, 6)
NEW = 16
DECODED = (
    "gqa",
    "llama3",
    "mha",
    "yarn",
    "llama_biases",
    "mistral_nemo",
    "mistral_window",
    "qwen2_windows_above",
    "qwen3_windows_by_layer",
    "smollm3_windows",
)


# Compiled once per model and shape, for all tests of this file.
prefill = jax.jit(DecoderModel.prefill, static_argnums=(0, 4))
decode = jax.jit(DecoderModel.decode, static_argnums=0)
hidden = jax.jit(DecoderModel.hidden, static_argnums=0)


@pytest.fixture(scope="module", params=DECODED)
def trio(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    hf = hf_model(**VARIANTS[request.param])
    hf.generation_config.eos_token_id = None  # or it would stop at random
    hf.save_pretrained(directory)
    config = load_config(directory)
    return hf, DecoderModel(config), load_params(directory, config)


def cached_greedy(model, params, tokens_BL, lengths_B, new):
    hidden_BD, cache = prefill(model, params, tokens_BL, lengths_B, tokens_BL.shape[1] + new)
    written, states = [], []
    for i in range(new):
        states.append(hidden_BD)
        tokens_B = jnp.argmax(model.logits(params, hidden_BD), axis=-1).astype(jnp.int32)
        written.append(tokens_B)
        hidden_BD, cache = decode(model, params, cache, tokens_B, jnp.asarray(lengths_B) + i)
    return np.stack(written, axis=1), np.stack(states, axis=1)


def padded(tokens_BL, pad: int):
    return np.where(np.arange(tokens_BL.shape[1]) < np.array(LENGTHS)[:, None], tokens_BL, pad).astype(np.int32)


def test_cached_equals_transformers_generate_and_uncached(trio):
    hf, model, params = trio
    tokens_BL = padded(random_tokens(len(LENGTHS), max(LENGTHS)), pad=0)
    written_BL, states_BLD = cached_greedy(model, params, tokens_BL, np.array(LENGTHS, np.int32), NEW)
    whole_BL = np.zeros(
        (len(LENGTHS), max(LENGTHS) + NEW), np.int32
    )  # causal: what stands to the right does not matter
    for row, length in enumerate(LENGTHS):
        prompt = torch.tensor(tokens_BL[row : row + 1, :length], dtype=torch.int64)
        generated = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
        assert written_BL[row].tolist() == generated[0, length:].tolist()
        whole_BL[row, : length + NEW] = generated[0]

    uncached_BLD = hidden(model, params, whole_BL, positions(*whole_BL.shape), np.ones_like(whole_BL))
    for row, length in enumerate(LENGTHS):
        uncached_LD = uncached_BLD[row, length - 1 : length - 1 + NEW]
        assert np.argmax(model.logits(params, uncached_LD), axis=-1).tolist() == written_BL[row].tolist()
        np.testing.assert_allclose(states_BLD[row], uncached_LD, rtol=0, atol=1e-4)
    assert len({tuple(row) for row in written_BL.tolist()}) == len(LENGTHS)  # the prompts do matter


def test_what_pads_a_prompt_does_not_matter(trio):
    _, model, params = trio
    tokens_BL = random_tokens(len(LENGTHS), max(LENGTHS))
    lengths_B = np.array(LENGTHS, np.int32)
    np.testing.assert_array_equal(
        *(cached_greedy(model, params, padded(tokens_BL, pad), lengths_B, NEW)[1] for pad in (0, 37))
    )


def test_decoding_can_start_from_an_empty_cache(trio):
    _, model, params = trio
    tokens_BL = random_tokens(4, 5)
    shape = (3, 4, model.config.kv_heads, max(LENGTHS) + NEW, model.config.head_dim)
    cache = KVCache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for i in range(5):
        hidden_BD, cache = decode(model, params, cache, tokens_BL[:, i], np.full(4, i, np.int32))
    expected = hidden(model, params, tokens_BL, positions(4, 5), np.ones_like(tokens_BL))[:, -1]
    np.testing.assert_allclose(hidden_BD, expected, rtol=0, atol=1e-4)
    assert cache.keys_NBGLE.shape == (3, 4, model.config.kv_heads, 30, model.config.head_dim)


def test_a_cache_shorter_than_the_prompts_is_refused(trio):
    _, model, params = trio
    with pytest.raises(ValueError, match="cache_length 4 is shorter than the prompts' 5 tokens"):
        model.prefill(params, random_tokens(2, 5), np.array([5, 5], np.int32), 4)
