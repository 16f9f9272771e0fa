"""States and logits against transformers in float32, layer by layer."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from models_tiny import VARIANTS, hf_model, old_spelling, positions, random_tokens, rewrite_config

from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel

TOLERANCE = 1e-4


@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hidden_state_and_the_logits_equal_transformers(variant, spelling, tmp_path):
    hf_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    if spelling == "old":
        rewrite_config(tmp_path, old_spelling)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens_BL = random_tokens(2, 48)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens_BL, dtype=torch.int64), output_hidden_states=True)

    config = load_config(tmp_path)
    model, params = DecoderModel(config), load_params(tmp_path, config)
    everything = tuple(range(config.layers + 1))
    run = jax.jit(functools.partial(model.hidden, layers=everything))
    hidden_BLD, layers = run(params, tokens_BL, positions(2, 48), np.ones_like(tokens_BL))

    assert len(expected.hidden_states) == len(layers) == 4
    for ours, theirs in zip(layers, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(hidden_BLD, layers[-1])
    np.testing.assert_allclose(model.logits(params, hidden_BLD), expected.logits.numpy(), rtol=0, atol=TOLERANCE)


def test_hidden_state_at_real_positions_needs_the_llama3_scaling(tmp_path):
    """The comparison above would notice: the same weights under plain rope give other logits."""
    hf_model(**VARIANTS["llama3"]).save_pretrained(tmp_path)
    scaled = load_config(tmp_path)
    rewrite_config(tmp_path, lambda config: config["rope_parameters"].update(rope_type="default"))
    plain = load_config(tmp_path)
    params = load_params(tmp_path, plain)
    inputs = random_tokens(1, 48), positions(1, 48), np.ones((1, 48), np.int32)
    with_scaling, without = (jax.jit(DecoderModel(config).hidden)(params, *inputs) for config in (scaled, plain))
    difference = with_scaling - without
    assert np.abs(difference).max() > 100 * TOLERANCE


def test_bfloat16_compute_is_close_to_transformers_in_bfloat16(tmp_path):
    hf = hf_model()
    hf.save_pretrained(tmp_path)
    tokens_BL = random_tokens(2, 16)
    in_bfloat16 = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = hf(torch.tensor(tokens_BL, dtype=torch.int64), output_hidden_states=True).hidden_states[-1].numpy()
        rounded = in_bfloat16(torch.tensor(tokens_BL, dtype=torch.int64), output_hidden_states=True)
    config = load_config(tmp_path)
    model, params = DecoderModel(config, compute_dtype="bfloat16"), load_params(tmp_path, config)
    hidden_BLD = jax.jit(model.hidden)(params, tokens_BL, positions(2, 16), np.ones_like(tokens_BL))
    assert hidden_BLD.dtype == "bfloat16"
    assert model.logits(params, hidden_BLD).dtype == "float32"
    ours = np.abs(np.asarray(hidden_BLD, np.float32) - exact).mean()
    theirs = np.abs(rounded.hidden_states[-1].float().numpy() - exact).mean()
    assert ours < 1.5 * theirs  # rounding errors of the same size as the reference's own
