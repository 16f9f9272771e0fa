"""A model is opened in one way, and its weights are read only where somebody asks for them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from qwen3_like import qwen3_like
from tokenizers import pre_tokenizers

import rtd_jax.models.open
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.data.tokenizer_match import compare_tokenizers, tokenizer_fingerprint
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import ModelSettings, OpenModel, load_tokenizer, open_model
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.saved_models import load_model

CONFIG = DecoderConfig(len(tiny_tokenizer()), 8, 8, layers=2, heads=1, kv_heads=1, head_dim=8)


def write_model(directory: Path, seed: int = 0, tokenizer=None) -> Path:
    params = DecoderModel(CONFIG).init(jax.random.key(seed))
    return save_pretrained(directory, CONFIG, params, tokenizer=tokenizer)


@pytest.fixture
def directory(tmp_path) -> Path:
    return write_model(tmp_path / "model", tokenizer=tiny_tokenizer())


def opened(directory: Path, notes: list[str] | None = None, **settings) -> OpenModel:
    note = (lambda _: None) if notes is None else notes.append
    return open_model(ModelSettings(str(directory), **settings), make_mesh(MeshSettings()), note)


def test_weights_are_read_once_and_only_where_they_are_asked_for(directory, monkeypatch):
    read, load = [], rtd_jax.models.open.load_params
    monkeypatch.setattr(rtd_jax.models.open, "load_params", lambda *a, **k: read.append(a[0]) or load(*a, **k))
    notes: list[str] = []
    found = opened(directory, notes, param_dtype="float32", compute_dtype="float32")
    assert found.config.layers == 2
    assert found.model.compute_dtype == "float32"
    assert len(found.tokenizer) == CONFIG.vocab_size
    assert found.fingerprint
    assert found.tokenizer_fingerprint
    assert (found.is_loaded, read, notes) == (False, [], [])

    params = found.params
    jax.tree.map(np.testing.assert_array_equal, params, DecoderModel(CONFIG).init(jax.random.key(0)))
    assert found.params is params
    assert (found.is_loaded, read, notes) == (True, [directory], [f"loading the weights of {directory}"])


def test_weights_have_the_dtype_of_the_settings(directory):
    params = opened(directory, param_dtype="bfloat16").params
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_fingerprints_tell_weights_and_tokenizers_apart(directory, tmp_path):
    first = opened(directory)
    copied, other = tmp_path / "copied", write_model(tmp_path / "other", seed=1, tokenizer=tiny_tokenizer())
    shutil.copytree(directory, copied)
    assert opened(copied).fingerprint == first.fingerprint != opened(other).fingerprint
    assert first.tokenizer_fingerprint == opened(other).tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())


def test_a_missing_tokenizer_is_named_where_it_is_asked_for(tmp_path):
    found = opened(write_model(tmp_path / "bare"))
    assert found.params
    with pytest.raises(ValueError, match=r"(?s)bare has no tokenizer that can be loaded .*; put tokenizer.json"):
        _ = found.tokenizer


def test_a_tokenizer_with_ids_that_have_no_row_is_refused_with_both_numbers(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found = opened(write_model(tmp_path / "model", tokenizer=tokenizer))
    rows = CONFIG.vocab_size
    message = (
        rf"tokenizer in .*model has ids up to {rows + 1}, which need an embedding of {rows + 2} rows, .* has {rows};"
    )
    with pytest.raises(ValueError, match=message):
        _ = found.tokenizer
    with pytest.raises(ValueError, match=message):  # evaluate and diagnose, before they read the weights
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": [2, 100_000]}, r"eos_token_id is \[2, 100000\], but the vocabulary of \d+ has ids"),
        ({"pad_token_id": CONFIG.vocab_size}, "pad_token_id is"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'; expected a token id"),
        ([], "expected a JSON object"),
    ],
)
def test_ids_of_a_generation_config_are_checked_when_the_model_is_opened(directory, content, message):
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 3], "pad_token_id": None, "temperature": 0.6}))
    opened(directory)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{path}: .*{message}"):
        opened(directory)


def test_a_tokenizer_without_its_config_is_not_another_tokenizer_without_a_word(directory):
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer_config.json, which names the tokens that begin and end"):
        _ = opened(directory).tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"\xff\xfe{", b"null"])
def test_a_damaged_file_of_a_tokenizer_is_named(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{directory}/{name}: "):
        _ = opened(directory).tokenizer


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("llama", "GPT2Tokenizer"),  # SmolLM2's folders
        ("llama", "PreTrainedTokenizerFast"),
        ("qwen2", "LlamaTokenizerFast"),  # DeepSeek-R1-Distill-Qwen's
        ("qwen2", "Qwen2Tokenizer"),
        ("smollm3", "GPT2TokenizerFast"),
    ],
)
def test_a_tokenizer_splits_text_as_its_file_says_and_not_as_its_class_does(directory, family, named):
    tokenizer = qwen3_like()
    digits = pre_tokenizers.Digits(individual_digits=True)
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"tokenizer_class": named}
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "backend"}))

    found, text = load_tokenizer(directory), "Mia has 113 apples and 21.<|im_end|>"
    ids = found(text, add_special_tokens=False)["input_ids"]
    assert found.convert_ids_to_tokens(ids)[3:7] == core.encode(text).tokens[3:7]
    assert ids == core.encode(text).ids
    assert found.decode(ids) == text
    compare_tokenizers(tokenizer, found)
    assert (found.eos_token, found.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert found.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("change", [{"use_cache": None}, {"attention_dropout": "0"}])
def test_a_config_that_only_transformers_refuses_is_not_blamed_on_the_tokenizer(directory, change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=rf"^{path}: transformers, .* cannot read it \(.*{next(iter(change))}.*\); mend"
    ):
        _ = opened(directory).tokenizer


def test_a_folder_that_is_no_model_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"no such directory"):
        opened(tmp_path / "nowhere")
