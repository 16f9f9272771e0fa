"""SmolLM2-135M-Instruct, a real Llama: the same probabilities and the same continuation as transformers, in float32."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from models_tiny import positions
from real_weights import real_weights_dir

from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.quantized import quantize_params

pytestmark = pytest.mark.real_weights

OWN_TEXTS = (
    "Ana has 3 boxes of 12 pencils. She gives 7 pencils away. 3 * 12 = 36. 36 - 7 = 29. She has 29 pencils left.",
    "Water boils at 100 °C at sea level; on a mountain it boils earlier: the pressure is lower.\n\n\tSo pasta …",
)


@pytest.fixture(scope="module")
def smollm2():
    try:
        directory = real_weights_dir()
    except ValueError as error:
        pytest.skip(str(error))
    hf = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = load_config(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return hf, tokenizer, DecoderModel(config), load_params(directory, config)


def largest_log_probability_difference(smollm2, text: str) -> float:
    hf, tokenizer, model, params = smollm2
    tokens_BL = np.array([tokenizer(text)["input_ids"]], np.int32)
    with torch.no_grad():
        theirs = torch.log_softmax(hf(torch.tensor(tokens_BL, dtype=torch.int64)).logits, dim=-1).numpy()
    hidden_BLD = jax.jit(model.hidden)(params, tokens_BL, positions(*tokens_BL.shape), np.ones_like(tokens_BL))
    ours = jax.nn.log_softmax(model.logits(params, hidden_BLD))
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    print(f"{tokens_BL.shape[1]} tokens: max |diff| of log-probabilities {difference:.2e}")
    return difference


@pytest.mark.parametrize("text", OWN_TEXTS, ids=["problem", "prose"])
def test_log_probabilities_equal_transformers(smollm2, text):
    assert largest_log_probability_difference(smollm2, text) <= 2e-3


@pytest.mark.parametrize("row", range(3))
def test_log_probabilities_on_gsm8k_equal_transformers(smollm2, shared_data: Path, row):
    with (shared_data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines:
        problem = json.loads(next(itertools.islice(lines, row, None)))
    assert largest_log_probability_difference(smollm2, f"{problem['question']}\n{problem['answer']}") <= 2e-3


def test_in_int8_the_probabilities_are_nearly_the_same(smollm2):
    """What an int8 teacher would teach instead: mean KL per token in nats, and how often its favourite is another."""
    _, tokenizer, model, params = smollm2
    quantized = jax.jit(quantize_params)(params)
    divergences, same = [], []
    for text in OWN_TEXTS:
        tokens_BL = np.array([tokenizer(text)["input_ids"]], np.int32)
        inputs = (tokens_BL, positions(*tokens_BL.shape), np.ones_like(tokens_BL))
        whole, rounded = (
            jax.nn.log_softmax(model.logits(p, jax.jit(model.hidden)(p, *inputs))[0]) for p in (params, quantized)
        )
        divergences += np.asarray(jnp.sum(jnp.exp(whole) * (whole - rounded), axis=-1)).tolist()
        same += np.asarray(jnp.argmax(whole, -1) == jnp.argmax(rounded, -1)).tolist()
    print(f"int8: mean KL {np.mean(divergences):.4f} nats, favourite kept at {np.mean(same):.1%} of {len(same)} tokens")
    assert 0 < np.mean(divergences) < 0.05
    assert np.mean(same) > 0.9


def test_greedy_continuation_equals_transformers(smollm2):
    hf, tokenizer, model, params = smollm2
    chat = [{"role": "user", "content": "What is the capital of France, and which river crosses it?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    generated = hf.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()

    tokens_BL, lengths_B = np.array([prompt], np.int32), np.array([len(prompt)], np.int32)
    hidden_BD, cache = jax.jit(model.prefill, static_argnums=3)(params, tokens_BL, lengths_B, len(prompt) + 20)
    step, written = jax.jit(model.decode, donate_argnums=1), []
    for i in range(len(generated)):
        tokens_B = jnp.argmax(model.logits(params, hidden_BD), axis=-1).astype(jnp.int32)
        written.append(int(tokens_B[0]))
        hidden_BD, cache = step(params, cache, tokens_B, lengths_B + i)
    assert written == generated
    assert "Paris" in tokenizer.decode(written)
