"""Directories that cannot be loaded: a ValueError with the culprit's name and the way out."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from models_tiny import LLAMA3_ROPE, VARIANTS, hf_model, old_spelling, rewrite_config
from safetensors.torch import load_file, save_file

from rtd_jax.models import from_hf
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.rope import RopeConfig
from rtd_jax.models.weights import logical_axes

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def directory(tmp_path):
    hf_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    hf_model().save_pretrained(tmp_path, max_shard_size=40_000)
    return tmp_path


def load(directory):
    return load_params(directory, load_config(directory))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt"})


def test_missing_tensor(directory):
    change_tensors(directory, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ValueError, match=rf"{directory}: missing tensors: {NAME}; left over, .*: none; .*same model"):
        load(directory)


def test_missing_head_suggests_tying(directory):
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: lm_head.weight.*tie_word_embeddings: true"):
        load(directory)


def test_left_over_tensor(directory):
    change_tensors(directory, lambda tensors: tensors.update({"model.layers.3.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"{directory}: .* none; left over, .*: model.layers.3.extra; .*same model"):
        load(directory)


def test_too_few_layers_in_the_config_is_not_silent(directory):
    rewrite_config(directory, lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"left over, .*: model.layers.2.input_layernorm.weight, .* and 4 more"):
        load(directory)


def test_known_non_weights_are_tolerated(tmp_path):
    """An old rotary table, and a head that repeats the tied embedding, in whatever dtype."""
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)

    def add(tensors):
        rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        tensors.update(rotary | {"lm_head.weight": tensors["model.embed_tokens.weight"].double()})

    change_tensors(tmp_path, add)
    assert "head" not in load(tmp_path)


@pytest.mark.parametrize("change", [lambda head: head[:, 31].neg_(), lambda head: head[60, 31].add_(1e-6)])
def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path, change, monkeypatch):
    """One column or one entry is enough, in the last of several parts that are compared one after the other."""
    monkeypatch.setattr(from_hf, "_ROWS_COMPARED", 16)
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        change(tensors["lm_head.weight"])

    change_tensors(tmp_path, add)
    with pytest.raises(ValueError, match=r"lm_head.weight is not the embedding.*tie_word_embeddings to false"):
        load(tmp_path)
    rewrite_config(tmp_path, lambda config: config.update(tie_word_embeddings=False))
    assert "head" in load(tmp_path)


def test_wrong_shape(directory):
    change_tensors(directory, lambda tensors: tensors.update({NAME: tensors[NAME].T}))
    with pytest.raises(ValueError, match=rf"{NAME} has shape \(32, 16\), but config.json makes it \(16, 32\)"):
        load(directory)


def test_quantised_tensor(directory):
    change_tensors(directory, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"{NAME} has dtype I8, .*unquantised"):
        load(directory)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_file(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"{path}: not a whole safetensors file of {size} bytes .*download it again"):
        load(directory)


def test_lfs_pointer_instead_of_weights(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load(directory)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{sharded}: .*names {shard.name}, .*download the missing"):
        load(sharded)


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{shard}: not a whole safetensors file"):
        load(sharded)


def test_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    wrong = next(file for file in files if file != content["weight_map"][NAME])
    content["weight_map"][NAME] = wrong
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{wrong}: model.safetensors.index.json says that {NAME} is here"):
        load(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_damaged_index(sharded, content):
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=rf"{index}: .*download"):
        load(sharded)


def test_no_safetensors(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*save_pretrained"):
        load(directory)


def test_no_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(
        ValueError, match=rf"{directory}/config.json: no such file; give the directory of a Hugging Face"
    ):
        load_config(directory)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/absent: no such directory"):
        load_params(tmp_path / "absent", DecoderConfig(8, 8, 8, 1, 1, 1, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', which the decoder does not compute; supported: llama, mistral"),
        ({"model_type": None}, "model_type is null; expected one of the families"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported.*llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' lacks low_freq_factor, high_freq"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised.*original float weights"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_key_value_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"num_hidden_layers": 0}, "layers is 0; it must be at least 1"),
        ({"vocab_size": "many"}, "'many'"),
    ],
)
def test_config_of_another_model(directory, change, message):
    rewrite_config(directory, lambda config: config.update(change))
    with pytest.raises(ValueError, match=rf"{directory}/config.json: .*{message}"):
        load_config(directory)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_give_one_config_and_it_survives_a_round_trip(variant, tmp_path):
    hf_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    rewrite_config(tmp_path, old_spelling)
    assert load_config(tmp_path) == config
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_llama3_settings_are_read_by_name(tmp_path):
    hf_model(**VARIANTS["llama3"]).save_pretrained(tmp_path)
    assert load_config(tmp_path).rope == RopeConfig(5000.0, "llama3", 8.0, 1.0, 4.0, 32)
    assert LLAMA3_ROPE["original_max_position_embeddings"] == 32


def test_several_end_tokens_survive():
    hf = {**DecoderConfig(8, 8, 8, 1, 1, 1, 8, eos_token_id=(3, 4)).to_hf()}
    assert hf["eos_token_id"] == [3, 4]
    assert DecoderConfig.from_hf(hf).eos_token_id == (3, 4)


def test_local_directory_is_used_as_it_is(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_unreachable_hub_says_how_to_point_to_a_folder(monkeypatch):
    """With the hub's own client, offline as the test process is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"meta-llama/Nothing-1B: neither a local directory nor .*give that directory"):
        resolve("meta-llama/Nothing-1B")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(ValueError, match=rf"{name}: no such directory"):
        resolve(name)


def test_logical_axes_refuse_what_is_no_llama_weight():
    with pytest.raises(ValueError, match=r"projection.f \(2, 2\) is no weight of a model"):
        logical_axes({"projection": {"f": torch.zeros(2, 2).numpy()}})


def test_torch_is_not_imported(directory):
    """transformers and torch are for the tests; loading a model must not pay for them, or need them."""
    code = (
        "import sys; from rtd_jax.models.from_hf import load_config, load_params; "
        f"load_params({str(directory)!r}, load_config({str(directory)!r})); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
