"""Folders of quantised models: what transformers decompresses, and what we read, is what was rounded, bit for bit."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from models_tiny import positions, random_tokens, rewrite_config
from safetensors.torch import load_file, save_file

from rtd_jax.models import to_hf
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.fingerprint import weights_fingerprint
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.quantization_config import quantization_config, storage_of
from rtd_jax.models.quantized_folders import quantization_of, save_quantized
from rtd_jax.models.quantized_tensors import pack, unpack
from rtd_jax.models.schemes import Scheme, as_params, rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weights import logical_axes, table

UNTIED = DecoderConfig(61, 32, 64, 2, 4, 2, 16, init_std=0.3, max_positions=64)  # heads wider than width / heads
TIED = dataclasses.replace(UNTIED, tied_embeddings=True)
INT4 = Scheme("int4", 32)
Q = "model.layers.1.self_attn.q_proj"
CASES = [
    (INT4, UNTIED),
    (INT4, TIED),
    (Scheme("int4", 16, symmetric=False), UNTIED),
    (Scheme("int4", 32, head=True), UNTIED),
    (Scheme("int4", 32, symmetric=False, head=True), TIED),
    (Scheme("int8", 0), TIED),
    (Scheme("int8", 0, symmetric=False), UNTIED),
    (Scheme("int3", 16), UNTIED),
    (Scheme("int2", 8), UNTIED),
    (Scheme("fp8", 0), UNTIED),
    (Scheme("fp8", 32), TIED),
    (Scheme("fp8", 0, head=True), TIED),
    (Scheme("nf4", 32), UNTIED),
    (Scheme("nf4", 32), TIED),
]


def package_of(scheme: Scheme) -> str:
    return "bitsandbytes" if scheme.qtype == "nf4" else "compressed_tensors"


def needs(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed; pip install -e '.[dev]'"
    )


@functools.cache
def float_params(config: DecoderConfig):
    """Random params with norms away from one, where they would hide."""
    rng = np.random.default_rng(0)

    def draw(weight):
        shape = weight.shape(config)
        values = rng.normal(scale=0.3, size=shape) if weight.inputs else rng.uniform(0.5, 1.5, shape)
        return jnp.asarray(values, jnp.float32)

    return unflatten_dict({weight.path: draw(weight) for weight in table(config)})


@functools.cache
def quantized(scheme: Scheme, config: DecoderConfig):
    """The rounded params, and as floats."""
    params = jax.jit(rounded, static_argnums=1)(float_params(config), scheme)
    return params, jax.jit(as_params, static_argnums=1)(params, config)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0].name + ("-tied" if case[1] is TIED else ""))
def case(request, tmp_path_factory):
    scheme, config = request.param
    params, floats = quantized(scheme, config)
    return scheme, config, floats, save_quantized(tmp_path_factory.mktemp("q") / "out", config, params, scheme)


@pytest.fixture
def folder(tmp_path):
    return save_quantized(tmp_path / "out", UNTIED, quantized(INT4, UNTIED)[0], INT4)


def assert_same(found, expected) -> None:
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=str(path))


@functools.partial(jax.jit, static_argnums=0)
def logits(config: DecoderConfig, params, tokens_BL):
    model = DecoderModel(config, "float32")
    return model.logits(params, model.hidden(params, tokens_BL, positions(*tokens_BL.shape), None))


def hf_tensors(params, config: DecoderConfig):
    """The float tensors of a checkpoint, by name."""
    arrays = flatten_dict(params)
    for weight in table(config):
        array = np.asarray(arrays[weight.path])
        for layer, name in enumerate(weight.names(config)):
            yield name, weight.to_hf(array[layer] if weight.stacked else array, config)


def change_tensors(directory: Path, change) -> None:
    """Applies `change` to the dict of torch tensors in model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


# Written, and read by others and by us --------------------------------------------------------------------------------


def test_our_reading_gives_the_rounded_weights_bit_for_bit(case):
    scheme, config, floats, out = case
    assert quantization_of(out) == scheme
    assert load_config(out) == config
    assert_same(load_params(out, config), floats)


def test_transformers_computes_what_we_compute_and_its_weights_are_ours(case):
    """Relative to the largest logit the difference is at most 1e-5, tokens are equal, and weights to the last bit."""
    scheme, config, floats, out = case
    pytest.importorskip(package_of(scheme), reason="the package that transformers reads this format with")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    for module in theirs.modules():
        # bitsandbytes has products in bfloat16 for CPUs with such an instruction, whatever the dtype asked for.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    expected = np.asarray(logits(config, floats, tokens))
    assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    if scheme.qtype == "nf4":
        theirs.dequantize()
    weights = theirs.state_dict()
    for name, tensor in hf_tensors(floats, config):
        np.testing.assert_array_equal(weights[name].numpy(), tensor, err_msg=name)


def test_packed_integers_have_the_size_that_their_bits_make_and_the_index_counts_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 8_000)
    params, floats = quantized(INT4, UNTIED)
    out = save_quantized(tmp_path / "out", UNTIED, params, INT4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, found in files.items() for name in found}
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors[f"{Q}.weight_packed"].nbytes == 64 * 32 // 2
    assert tensors[f"{Q}.weight_scale"].dtype == torch.float32
    assert_same(load_params(out, UNTIED), floats)


def test_weights_that_are_not_quantised_keep_their_dtype(tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), float_params(UNTIED))
    scheme = Scheme("int8", 0)
    params = jax.jit(rounded, static_argnums=1)(half, scheme)
    out = save_quantized(tmp_path / "out", UNTIED, params, scheme)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors[f"{Q}.weight_scale"].dtype == torch.float32
    assert_same(load_params(out, UNTIED), jax.jit(as_params, static_argnums=1)(params, UNTIED))


def test_sharded_and_int8_reading_is_that_of_the_dequantised_folder(folder, tmp_path):
    """A teacher in int8, weights over eight devices and fewer layers, all from quantised tensors."""
    plain = save_pretrained(tmp_path / "plain", UNTIED, quantized(INT4, UNTIED)[1])
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(folder, UNTIED, dtype="int8", layers=(1,)),
        load_params(plain, UNTIED, dtype="int8", layers=(1,)),
    )
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in axes))),
        logical_axes(float_params(UNTIED)),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert_same(load_params(folder, UNTIED, shardings=shardings), quantized(INT4, UNTIED)[1])


def test_the_fingerprint_covers_scales(folder):
    before = weights_fingerprint(folder)
    change_tensors(folder, lambda tensors: tensors[f"{Q}.weight_scale"][5, 0].mul_(2))
    assert weights_fingerprint(folder) != before


@needs("compressed_tensors")
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 16, True), (4, None, False), (8, 32, False)])
def test_a_folder_that_compressed_tensors_made_is_read(bits, group, symmetric, tmp_path):
    """With some modules ignored by a pattern, and scales in bfloat16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    save_pretrained(tmp_path, UNTIED, float_params(UNTIED))
    tensors = load_file(tmp_path / "model.safetensors")
    written, expected = {}, {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        if "norm" in name or "embed" in name or "lm_head" in name or "down_proj" in name:
            written[name] = expected[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[1] // group if group else 1)
        scale = torch.rand(shape, generator=torch.manual_seed(0)).add(0.5).div(2**bits).bfloat16()
        state = {"weight": tensor, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = torch.arange(shape[0] * shape[1]).remainder(5).reshape(shape).to(torch.int8)
        packed = compressor.compress(state, scheme)
        written |= {stem + suffix: part for suffix, part in packed.items()}
        whole = packed | {"weight_scale": scale.float()}
        expected[name] = compressor.decompress(whole, scheme)["weight"]
    save_file(written, tmp_path / "model.safetensors")
    entry = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*down_proj$"],
    }
    rewrite_config(tmp_path, lambda config: config.update(quantization_config=entry))
    assert quantization_of(tmp_path) == Scheme(f"int{bits}", group or 0, symmetric)
    for name, tensor in hf_tensors(load_params(tmp_path, load_config(tmp_path)), UNTIED):
        np.testing.assert_array_equal(tensor, expected[name].numpy(), err_msg=name)


@needs("compressed_tensors")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_lie_where_compressed_tensors_puts_them_in_rows_of_any_length(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for columns in (1, 5, 31, 32, 33, 50):
        values = np.random.default_rng(columns).integers(-(1 << bits - 1), 1 << bits - 1, (3, columns), np.int8)
        packed = pack(values, bits)
        np.testing.assert_array_equal(packed, pack_to_int32(torch.tensor(values), bits).numpy())
        np.testing.assert_array_equal(unpack(packed, bits, columns), values)


@needs("bitsandbytes")
def test_a_folder_that_bitsandbytes_made_is_read(tmp_path):
    config = dataclasses.replace(UNTIED, width=64)  # blocks have 64 values
    save_pretrained(tmp_path / "plain", config, float_params(config))
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=settings
    )
    model.save_pretrained(tmp_path / "theirs")
    assert quantization_of(tmp_path / "theirs") == Scheme("nf4", 64)
    model.dequantize(dtype=torch.float32)
    weights = model.state_dict()
    for name, tensor in hf_tensors(load_params(tmp_path / "theirs", config), config):
        np.testing.assert_array_equal(tensor, weights[name].numpy(), err_msg=name)


# Refused, and left as it was ------------------------------------------------------------------------------------------


def test_a_float_folder_has_no_scheme(tmp_path):
    save_pretrained(tmp_path / "out", UNTIED, float_params(UNTIED))
    assert quantization_of(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("int4", 24), "group_size 24 does not divide the 32 inputs"),
        (Scheme("nf4", 16), r"group_size 16: bitsandbytes, .* has blocks of 32, 64"),
        (Scheme("nf4", 0), r"group_size 0: bitsandbytes"),
        (Scheme("nf4", 32, head=True), r"bitsandbytes, .* cannot hold a quantised embedding"),
        (Scheme("int4", 16), r"layers.attention.q has the type and .* \(2, 64, 1\).*int4-g16 makes .* \(2, 64, 2\)"),
        (Scheme("int8", 32), "has the type .*int4.*int8"),
        (Scheme("int4", 32, symmetric=False), "makes them"),
        (Scheme("int4", 32, head=True), r"params embedding is not quantised; save what `rounded` makes"),
    ],
)
def test_what_no_format_holds_or_was_not_rounded_so_is_refused_by_name(scheme, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_quantized(tmp_path / "out", UNTIED, quantized(INT4, UNTIED)[0], scheme)
    assert not any(tmp_path.iterdir())


def group(**changes):
    entry = quantization_config(INT4, "float32")
    return entry | {"config_groups": {"g": entry["config_groups"]["group_0"] | changes}}


def weights(**changes):
    return group(weights=quantization_config(INT4, "float32")["config_groups"]["group_0"]["weights"] | changes)


NF4 = quantization_config(Scheme("nf4", 64), "float32")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'.*original float weights"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ([4], r"quantization_config is \[4\]; expected an object"),
        (group(input_activations={"num_bits": 8}), r"it has a config_groups.g.input_activations"),
        (group(output_activations={"num_bits": 8}), r"it has a config_groups.g.output_activations"),
        (group() | {"kv_cache_scheme": {"num_bits": 8}}, "it has a kv_cache_scheme"),
        (group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "it has a sparsity_config"),
        (group() | {"transform_config": {"config_groups": {"u": {}}}}, "it has a transform_config"),
        (group() | {"config_groups": {"W4A16": ["Linear"]}}, "only one group, with its settings in full"),
        (group() | {"format": "nvfp4-pack-quantized"}, "in the format 'nvfp4-pack-quantized'"),
        (group(weights=None), "config_groups.g.weights is None"),
        (weights(num_bits=5), "int of 5 bits"),
        (weights(type="float"), "float of 4 bits"),
        (weights(actorder="group"), "actorder 'group'"),
        (weights(dynamic=True), "dynamic True"),
        (weights(strategy="tensor", group_size=None), "strategy is 'tensor'"),
        (weights(group_size=None), "strategy is 'group' with group_size None"),
        (weights(num_bits=[4]), r"int of \[4\] bits"),
        (group(targets="Linear"), "quantization_config.targets is 'Linear'; expected names of modules"),
        (group() | {"ignore": ["re:("]}, r"quantization_config.ignore is \['re:\('\]; expected"),
        (group() | {"sparsity_config": "2:4"}, "it has a sparsity_config"),
        (NF4 | {"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head'; expected"),
        (NF4 | {"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant is True"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'"),
        (NF4 | {"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit is False"),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage is 'bfloat16'"),
    ],
)
def test_other_quantisation_is_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=message):
        storage_of({"quantization_config": entry})


def becomes(suffix: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({f"{Q}.{suffix}": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), f"missing tensors: {Q}.weight_scale"),
        (lambda t: t.update({f"{Q}.weight_g_idx": torch.zeros(32)}), f"left over, .*: {Q}.weight_g_idx"),
        (becomes("weight_packed", torch.ones(64, 3).int()), r"weight_packed has .*\(64, 3\), but .*\(64, 4\)"),
        (becomes("weight_scale", torch.ones(64, 2)), r"weight_scale has dtype F32 and shape \(64, 2\)"),
        (becomes("weight_scale", torch.ones(64, 1).int()), "weight_scale has dtype I32"),
        (becomes("weight_shape", torch.tensor([32, 64])), r"weight_shape says \(32, 64\), expected \(64, 32\)"),
        (lambda t: t[f"{Q}.weight_scale"][7].fill_(torch.nan), f"NaN or infinite values in {Q}.weight_scale"),
    ],
)
def test_damaged_tensors_are_refused_by_name(change, message, folder):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=rf"^{folder}.*{message}"):
        load_params(folder, UNTIED)


def test_a_group_that_does_not_divide_is_refused_by_name(folder):
    def widen(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 24

    rewrite_config(folder, widen)
    with pytest.raises(ValueError, match=r"q_proj.weight has 32 inputs, which groups of 24 do not divide"):
        load_params(folder, UNTIED)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"blocksize": 64}, r"q_proj.weight has 32 inputs, which groups of 64 do not divide"),
        ({"shape": [32, 64]}, r"says \['nf4', 32, \[32, 64\]\], expected \['nf4', 32, \[64, 32\]\]"),
        ({"blocksize": "many"}, "blocksize is 'many'"),
        (None, "is no JSON"),
    ],
)
def test_damaged_notes_of_bitsandbytes_are_refused_by_name(state, message, tmp_path):
    scheme = Scheme("nf4", 32)
    out = save_quantized(tmp_path / "out", UNTIED, quantized(scheme, UNTIED)[0], scheme)

    def change(tensors):
        for name, tensor in tensors.items():
            if "q_proj" not in name and "blocksize" not in (state or {}):
                continue
            if "quant_state" in name:
                text = json.dumps(json.loads(bytes(tensor.numpy())) | state) if state else "{"
                tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    change_tensors(out, change)
    with pytest.raises(ValueError, match=rf"^{out}.*{message}"):
        load_params(out, UNTIED)


def test_a_failure_half_way_leaves_what_was_there_before(tmp_path, monkeypatch):
    monkeypatch.setattr(to_hf, "MAX_SHARD_BYTES", 8_000)
    params = quantized(INT4, UNTIED)[0]
    out = save_quantized(tmp_path / "out", UNTIED, params, INT4)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write, written = to_hf.save_file, []

    def fails_at_the_second_file(tensors, path, **kwargs):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(tensors, path, **kwargs)

    monkeypatch.setattr(to_hf, "save_file", fails_at_the_second_file)
    with pytest.raises(OSError, match=rf"{out}: could not save .*unchanged"):
        save_quantized(out, UNTIED, params, INT4)
    assert written
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
