"""Which files of a folder are the model's: as transformers reads them, and nothing else."""

import errno
import json
import struct

import jax
import numpy as np
import pytest
import torch
import transformers
from models_tiny import hf_model, rewrite_config
from safetensors.torch import load_file, save_file

from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.models.fingerprint import weights_fingerprint
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.open import ModelSettings, open_model

INDEX = "model.safetensors.index.json"
SHARD = 40_000  # bytes: several files for the tiny model


def scaled(factor: float) -> transformers.LlamaForCausalLM:
    """The tiny model with every weight multiplied: another checkpoint of the same sizes."""
    model = hf_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)
    return model


def embedding(directory) -> np.ndarray:
    return np.asarray(load_params(directory, load_config(directory))["embedding"])


def rewrite_index(directory, change) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path):
    hf_model().save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    return tmp_path / "model"


@pytest.mark.parametrize("with_shards", [False, True], ids=["index alone", "index and shards"])
def test_a_single_file_comes_before_what_a_sharded_save_left(sharded, with_shards):
    shards = {path: path.read_bytes() for path in sharded.glob("model-*.safetensors")}
    index = (sharded / INDEX).read_bytes()
    scaled(2).save_pretrained(sharded)
    (sharded / INDEX).write_bytes(index)
    for path, content in shards.items() if with_shards else ():
        path.write_bytes(content)
    expected = transformers.LlamaForCausalLM.from_pretrained(sharded).model.embed_tokens.weight
    np.testing.assert_array_equal(embedding(sharded), expected.detach().numpy())
    np.testing.assert_array_equal(embedding(sharded), scaled(2).model.embed_tokens.weight.detach().numpy())


def test_files_that_are_not_read_do_not_change_the_identity(sharded):
    before = weights_fingerprint(sharded)
    for name in ("consolidated.safetensors", "model-00009-of-00009.safetensors", "pytorch_model.bin"):
        (sharded / name).write_bytes(b"of another checkpoint")
        assert weights_fingerprint(sharded) == before
    embedding(sharded)


def test_shards_may_lie_in_a_folder_of_their_own_and_count_there(sharded):
    before, values = weights_fingerprint(sharded), embedding(sharded)
    (sharded / "parts").mkdir()
    for path in list(sharded.glob("model-*.safetensors")):
        path.rename(sharded / "parts" / path.name)
    rewrite_index(sharded, lambda files: files.update({name: f"parts/{file}" for name, file in files.items()}))
    np.testing.assert_array_equal(embedding(sharded), values)
    moved = weights_fingerprint(sharded)
    assert moved != before
    path = next((sharded / "parts").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert weights_fingerprint(sharded) != moved


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b.safetensors", 7, None]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded, file):
    rewrite_index(sharded, lambda files: files.update({"model.norm.weight": file}))
    (sharded.parent / "outside.safetensors").write_bytes(next(sharded.glob("model-*")).read_bytes())
    for read in (embedding, weights_fingerprint):
        with pytest.raises(ValueError, match=rf"{INDEX}: .*model.norm.weight is in .*expected a file in this folder"):
            read(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    extra = dict(list(load_file(first).items())[:1])
    save_file(load_file(second) | extra, second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{next(iter(extra))} lies in both {first.name} and {second.name}"):
        embedding(sharded)


def test_a_tensor_that_the_index_does_not_name_is_left_over(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[0]
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match=r"left over, .*: model.layers.0.self_attn.q_proj.bias"):
        embedding(sharded)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_beside_the_weights_is_not_passed_over(sharded, name):
    (sharded / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds an adapter \({name}\).*merge_and_unload"):
        embedding(sharded)


def test_weights_of_another_name_are_not_passed_over(sharded):
    rewrite_config(sharded, lambda config: config.update(transformers_weights="best.safetensors"))
    with pytest.raises(ValueError, match=r"transformers_weights is 'best.safetensors'; .*rename the file"):
        load_config(sharded)


# Values and headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.2.mlp.down_proj.weight", float("-inf"), "float32"),
        ("model.layers.1.self_attn.k_proj.weight", float("nan"), "int8"),
        ("model.norm.weight", float("nan"), "bfloat16"),
    ],
)
def test_values_that_are_no_numbers_are_named_by_tensor_and_file(tmp_path, name, value, dtype):
    model = hf_model()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/model.safetensors: NaN or infinite values in {name};"):
        load_params(tmp_path, load_config(tmp_path), dtype=dtype)


def test_a_value_beyond_float32_is_no_number_either(tmp_path):
    hf_model().double().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] = 1e300
    save_file(weights, path, metadata={"format": "pt"})
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"NaN or infinite values in lm_head.weight"):
        embedding(tmp_path)


def test_one_value_in_the_part_of_one_device_is_enough(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[-1]
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
    weights[name][-1, -1] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    opened = open_model(ModelSettings(str(sharded), "float32"), make_mesh(MeshSettings()), lambda _: None)
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match=rf"{path}: NaN or infinite values in {name};"):
        _ = opened.params


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 90_000_000),
        struct.pack("<Q", 0),
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 2) + b"\xff\xff",
    ],
)
def test_a_header_that_cannot_be_is_named_with_its_file(tmp_path, header):
    hf_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(ValueError, match=rf"{path}: not a whole safetensors file"):
        embedding(tmp_path)
    weights_fingerprint(tmp_path)  # an identity, not a judgement


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "BOOL"])
def test_a_dtype_that_is_no_float_is_named(tmp_path, dtype):
    hf_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32, "BOOL": torch.bool}
    weights["model.norm.weight"] = weights["model.norm.weight"].to(kinds[dtype])
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path}: model.norm.weight has dtype {dtype}, expected one of F64, .*BF16"):
        embedding(tmp_path)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "chmod"), (errno.EMFILE, "ulimit"), (errno.EIO, "dmesg")]
)
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(sharded, monkeypatch, number, remedy):
    path = sorted(sharded.glob("model-*.safetensors"))[0]
    plain = type(path).open

    def refuse(self, *args, **options):
        if self == path:
            raise OSError(number, "as the system says it", str(self))
        return plain(self, *args, **options)

    monkeypatch.setattr(type(path), "open", refuse)
    for read in (embedding, weights_fingerprint):
        with pytest.raises(
            ValueError, match=rf"{path}: could not be read \(as the system says it\); .*{remedy}"
        ) as raised:
            read(sharded)
        assert "damaged" not in str(raised.value)
        assert "download" not in str(raised.value)
