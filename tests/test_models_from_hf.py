"""Hugging Face directories in and out: bit for bit, whole or not at all, straight to the asked sharding."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from models_tiny import VARIANTS, hf_model, random_tokens
from safetensors.torch import load_file

from rtd_jax.models import from_hf as checkpoint
from rtd_jax.models import to_hf as export
from rtd_jax.models.config import layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weights import logical_axes

SHARD = 40_000  # bytes: several files for the tiny model
KINDS = ("mistral_nemo", "mistral_window", "qwen2", "qwen2_windows_above", "qwen3_biases", "smollm3_windows")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("variant", ["gqa", "mqa_with_wide_heads", "llama3", "yarn_by_factors", "llama_biases", *KINDS])
def test_round_trip_is_bitwise_and_transformers_loads_it(variant, sharded, dtype, tmp_path, monkeypatch):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    rounded = hf_model(**VARIANTS[variant]).to(getattr(torch, dtype))
    rounded.save_pretrained(theirs, **({"max_shard_size": SHARD} if sharded else {}))
    assert (theirs / "model.safetensors.index.json").exists() == sharded

    config = load_config(theirs)
    params = load_params(theirs, config, dtype=dtype)
    if sharded:
        monkeypatch.setattr(export, "MAX_SHARD_BYTES", SHARD)
    save_pretrained(ours, config, params)
    assert (len(list(ours.glob("*.safetensors"))) > 1) == sharded
    assert_same_tensors(ours, theirs)
    assert load_config(ours) == config

    tokens = torch.tensor(random_tokens(1, 20), dtype=torch.int64)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == rounded.dtype
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(theirs)(tokens).logits
        assert torch.equal(again(tokens).logits, expected)


def test_index_accounts_for_every_tensor_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", SHARD)
    hf_model().save_pretrained(tmp_path / "theirs")
    config = load_config(tmp_path / "theirs")
    out = save_pretrained(tmp_path / "ours", config, load_params(tmp_path / "theirs", config))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, found in files.items() for name in found}
    sizes = {file: sum(x.nbytes for x in found.values()) for file, found in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= SHARD


# Shardings ------------------------------------------------------------------------------------------------------------


def shardings_of(config, mesh, rules: dict[str, str | tuple[str, ...]]):
    def sharding(axes):
        return NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in axes)))

    abstract = DecoderModel(config).abstract_params()
    return jax.tree.map(sharding, logical_axes(abstract), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    "rules",
    [
        {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
        {"embed": ("fsdp", "tensor")},
        {"head_dim": "tensor", "mlp": "fsdp"},  # cuts an axis that is inner in the checkpoint
        {},
    ],
    ids=["fsdp_tensor", "fsdp", "inner", "replicated"],
)
def test_params_arrive_with_the_asked_sharding(rules, tmp_path):
    hf_model().save_pretrained(tmp_path)
    config = load_config(tmp_path)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wanted = shardings_of(config, mesh, rules)
    params = load_params(tmp_path, config, shardings=wanted)
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path, config))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    out = save_pretrained(tmp_path / "ours", config, params)
    assert_same_tensors(out, tmp_path)


class Recorder:
    """Stands before an open safetensors file and notes how much of each tensor is read at a time."""

    def __init__(self, handle):
        self.handle, self.read = handle, {}

    def __enter__(self):
        self.handle.__enter__()
        return self

    def __exit__(self, *error):
        return self.handle.__exit__(*error)

    def keys(self):
        return self.handle.keys()

    def get_slice(self, name):
        part, log = self.handle.get_slice(name), self.read.setdefault(name, [])

        class Part:
            get_shape, get_dtype = part.get_shape, part.get_dtype

            def __getitem__(self, index):
                log.append(part[index].size)
                return part[index]

        return Part()


def test_each_device_reads_its_part_and_every_byte_is_read_once(tmp_path, monkeypatch):
    hf_model().save_pretrained(tmp_path)
    config = load_config(tmp_path)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    opened = []
    plain_open = checkpoint.open_file
    monkeypatch.setattr(checkpoint, "open_file", lambda path: opened.append(Recorder(plain_open(path))) or opened[-1])
    load_params(tmp_path, config, shardings=shardings_of(config, mesh, rules))
    reads = opened[-1].read
    sizes = {name: x.numel() for name, x in tensors(tmp_path).items()}
    assert reads.keys() == sizes.keys()
    for name, parts in reads.items():
        assert sum(parts) == sizes[name], name  # replicas share what was read
        cuts = 1 if "norm" in name else 4 if "embed" in name or "lm_head" in name else 8
        assert len(parts) == cuts, name


MEMORY = """
    import ctypes, gc, sys
    import jax
    from rtd_jax.models.config import DecoderConfig
    from rtd_jax.models.from_hf import load_params
    from rtd_jax.models.model import DecoderModel
    from rtd_jax.models.to_hf import save_pretrained

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    config = DecoderConfig(64, 256, 2048, layers=48, heads=4, kv_heads=2, head_dim=64)
    if sys.argv[2] == "save":
        save_pretrained(sys.argv[1], config, DecoderModel(config).init(jax.random.key(0)))
        sys.exit()
    jax.block_until_ready(load_params(sys.argv[1], config))  # compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the high-water mark starts again from here
    params = jax.block_until_ready(load_params(sys.argv[1], config))
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    print(sum(sizes), max(sizes), status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak memory mark in /proc")
def test_loading_holds_the_params_once(tmp_path):
    """The peak is the params, the pages of the mapped file, and less than half of the largest stacked array (100 MB).

    Many thin layers: what is above comes from single tensors, compiling and the allocator.
    """
    for action in ("save", "load"):
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path / "model"), action]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # arenas per thread would keep what others free
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert run.returncode == 0, run.stderr
    total, largest, rise = map(int, run.stdout.split())
    pages = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert total > 2.9 * largest
    assert rise < total + pages + 0.5 * largest, (
        f"{(rise - pages) / 2**20:.0f} MiB for {total / 2**20:.0f} MiB of params"
    )


# Student initialisation -----------------------------------------------------------------------------------------------


def test_layers_to_copy_by_hand(tmp_path):
    hf_model(num_hidden_layers=7).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    params = load_params(tmp_path, config)
    chosen = layers_to_copy(7, 3)
    assert chosen == (0, 3, 6)
    student = load_params(tmp_path, config, layers=chosen)
    for ours, theirs in zip(jax.tree.leaves(student["layers"]), jax.tree.leaves(params["layers"]), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs)[[0, 3, 6]])
    np.testing.assert_array_equal(student["embedding"], params["embedding"])
    smaller = dataclasses.replace(config, layers=3)
    out = save_pretrained(tmp_path / "student", smaller, student)
    assert transformers.LlamaForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    for layers in (0, 8):
        with pytest.raises(ValueError, match=f"{layers} evenly spaced layers of 7; use 1 to 7"):
            layers_to_copy(7, layers)


# Saves that fail ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    hf_model().save_pretrained(tmp_path / "first")
    config = load_config(tmp_path / "first")
    params = load_params(tmp_path / "first", config)
    save_pretrained(tmp_path / "model", config, params)
    return tmp_path / "model", config, jax.tree.map(lambda x: x + 1, params)


def assert_untouched(directory: Path) -> None:
    assert_same_tensors(directory, directory.parent / "first")
    assert sorted(path.name for path in directory.parent.iterdir()) == ["first", "model"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_what_was_there(saved, error, monkeypatch):
    directory, config, params = saved
    written = []

    def fail_on_the_second_file(arrays, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise error
        Path(path).write_bytes(b"half")

    monkeypatch.setattr(export, "save_file", fail_on_the_second_file)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", SHARD)
    with pytest.raises((OSError, KeyboardInterrupt)) as raised:
        save_pretrained(directory, config, params)
    assert len(written) == 2
    if isinstance(error, OSError):
        assert str(directory) in str(raised.value)
        assert "No space left" in str(raised.value)
        assert "another directory" in str(raised.value)
    assert_untouched(directory)


def test_a_full_disk_is_reported_with_the_place(saved):
    """The operating system itself refuses the bytes: files may not grow beyond 20 kB."""
    directory, config, params = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{directory}: could not save the model .* Free at least \d+ MiB"):
            save_pretrained(directory, config, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(directory)


def test_saving_again_replaces_and_clears_what_a_kill_left(saved):
    directory, config, params = saved
    leftovers = [directory.parent / name for name in (".model.partial", ".model.replaced")]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    shutil.rmtree(directory)  # a kill between the two renames of a save
    save_pretrained(directory, config, params)
    reloaded = load_params(directory, config)
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_directory_with_other_files_is_not_replaced(saved):
    directory, config, params = saved
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex.*give an empty or new one"):
        save_pretrained(directory, config, params)
    assert (directory / "thesis.tex").read_text() == "years of work"


def test_params_of_another_config_are_refused(saved):
    directory, config, params = saved
    with pytest.raises(ValueError, match=r"params layers.attention_norm.scale has shape \(3, 32\).*\(2, 32\)"):
        save_pretrained(directory, dataclasses.replace(config, layers=2), params)
    with pytest.raises(ValueError, match="params have 12 arrays, the config needs 11"):
        save_pretrained(directory, dataclasses.replace(config, tied_embeddings=True), params)
    assert_untouched(directory)
