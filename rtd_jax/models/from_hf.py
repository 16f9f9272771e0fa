"""Reads Llama params from Hugging Face directories (config.json, safetensors), one tensor at a time, without torch."""

import contextlib
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from qwix import QArray
from safetensors import SafetensorError, safe_open

from rtd_jax.base.files import read_json
from rtd_jax.base.types import Params
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.quantized import INT8, quantize_weight
from rtd_jax.models.to_hf import INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from rtd_jax.models.weights import Weight, table

_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name_or_dir: str | Path) -> Path:
    """The directory of a model: a local one as it is, else the hub's snapshot of that name, downloaded or cached.

    Only config, safetensors and tokenizer files are downloaded.

    Raises:
      ValueError: there is neither such a directory nor such a model on the hub, or the hub refuses it.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_dir)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: no such directory; give a folder with config.json and safetensors, or a hub name")
    # Imported here because the import is slow and most models are local.
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "*.safetensors", INDEX_FILE, *TOKENIZER_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(
            f"{name}: neither a local directory nor a model the hub would give ({type(error).__name__}: {reason}). "
            f"Without a network, download it elsewhere (`hf download {name} --local-dir DIR`) and give that directory "
            "instead; for a gated model, log in first (`hf auth login`)"
        ) from error


def load_config(directory: str | Path) -> LlamaConfig:
    """The config of a Hugging Face directory. Raises ValueError where it is missing, unreadable or no plain Llama's."""
    path = Path(directory) / "config.json"
    content = _read_object(path, "give the directory of a Hugging Face checkpoint")
    try:
        return LlamaConfig.from_hf(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 of config.json and of parts of each safetensors file: tells checkpoints apart without reading 140 GB.

    The parts are the file's name, size and header (names, dtypes, shapes and offsets of the tensors), and the first and
    last MiB of data.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            head = file.read(8)
            digest.update(head + file.read(min(int.from_bytes(head, "little"), size)) + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def load_params(
    directory: str | Path,
    config: LlamaConfig,
    *,
    dtype: str = "float32",
    shardings: dict[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> Params:
    """The weights of a Hugging Face directory in the layout of `LlamaModel`'s params.

    Tensors are read one at a time, in each process only the slices that its devices hold, and are written into the
    stacked arrays in place: the host never holds more than two tensors besides the params themselves.

    Args:
      config: the directory's own.
      dtype: of the params; with "int8", matrices are `QArray`s (see `quantized`).
      shardings: a tree of `jax.sharding.Sharding` like the params; None puts everything on the default device.
      layers: read only these layers, counted from 0, for a shallower model; its config is
        `dataclasses.replace(config, layers=len(layers))`. None reads all.

    Raises:
      ValueError: tensors are missing, left over, wrongly shaped or not floats, or files are missing or damaged; with
        their names.
    """
    directory = Path(directory)
    files = _tensor_files(directory)
    rows = table(config)
    _check_names(directory, set(files), {name for weight in rows for name in weight.names(config)}, config)
    sharding_of = {} if shardings is None else flatten_dict(shardings)
    with contextlib.ExitStack() as stack:
        handles = {path: stack.enter_context(_open(path)) for path in sorted(set(files.values()))}
        readers = {
            name: _open_tensor(handles[files[name]], files[name], name, weight.hf_shape(config))
            for weight in rows
            for name in weight.names(config)
        }
        chosen = range(config.layers) if layers is None else layers
        return unflatten_dict(
            {row.path: _load(row, config, dtype, sharding_of.get(row.path), readers, chosen) for row in rows}
        )


def _load(
    weight: Weight,
    config: LlamaConfig,
    dtype: str,
    sharding: Any,
    readers: dict[str, Any],
    layers: Sequence[int],
) -> Any:
    """One entry of the params, of all the `layers` where they are stacked."""
    raw_sharding = _hf_sharding(weight, sharding.qvalue if isinstance(sharding, QArray) else sharding)
    float_dtype = "bfloat16" if dtype == INT8 else dtype  # norms are not quantised

    def convert(raw: jax.Array) -> Any:
        array = weight.from_hf(raw, config)
        return quantize_weight(array, weight) if dtype == INT8 and weight.inputs else array.astype(float_dtype)

    def read(name: str) -> jax.Array:
        if raw_sharding is None:
            return jnp.asarray(readers[name][:])
        return _read_sharded(readers[name], weight.hf_shape(config), raw_sharding)

    if not weight.stacked:
        return jax.jit(convert, out_shardings=sharding)(read(weight.name))

    # Because of the donation the device writes in place, without a second copy of the stacked layers.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(stacked, raw, layer):
        return jax.tree.map(
            lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, layer, axis=0), stacked, convert(raw)
        )

    def empty():
        one = jax.eval_shape(convert, jax.ShapeDtypeStruct(weight.hf_shape(config), "float32"))
        return jax.tree.map(lambda x: jnp.zeros((len(layers), *x.shape), x.dtype), one)

    stacked = jax.jit(empty, out_shardings=sharding)()
    names = weight.names(config)
    for position, layer in enumerate(layers):
        raw = read(names[layer])
        # Dispatch is asynchronous: without waiting, reads would run ahead and collect a second copy on the host.
        stacked = put(jax.block_until_ready(stacked), raw, position)
    return stacked


def _hf_sharding(weight: Weight, sharding: Sharding | None) -> Sharding | None:
    """The sharding of a checkpoint tensor by which each device reads about the part that it will hold."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *[None] * (len(weight.axes) - len(sharding.spec)))
    mesh_axes = dict(zip(weight.axes, spec, strict=True))
    # A product axis can be cut along its first factor only; where another factor is cut, the device does it later.
    parts = [
        mesh_axes[group[0]] if all(mesh_axes[axis] is None for axis in group[1:]) else None for group in weight.hf_axes
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def _read_sharded(tensor: Any, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    read: dict[tuple, np.ndarray] = {}  # replicas of a part are read once

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple(s.indices(size) for s, size in zip(index, shape, strict=True))
        if key not in read:
            read[key] = tensor[tuple(slice(*bounds) for bounds in key)]
        return read[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, from the index of a sharded checkpoint or the header of the single file."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give the directory of a Hugging Face checkpoint")
    index, single = directory / INDEX_FILE, directory / WEIGHTS_FILE
    if index.is_file():
        weight_map = _read_object(index, "download it again").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: no 'weight_map' in it; download the checkpoint again")
        absent = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
        if absent:
            raise ValueError(
                f"{directory}: {INDEX_FILE} names {_few(absent)}, which is not there; download the missing files"
            )
        return {name: directory / file for name, file in weight_map.items()}
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    raise ValueError(
        f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; "
        "save the model with transformers' save_pretrained, which writes safetensors"
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file of {path.stat().st_size} bytes ({error}); download it again "
            "(after a git clone, `git lfs pull`)"
        ) from error


def _open_tensor(handle: Any, path: Path, name: str, shape: tuple[int, ...]) -> Any:
    """Opens one tensor of a file for reading in slices, and checks its shape and dtype."""
    try:
        tensor = handle.get_slice(name)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: {INDEX_FILE} says that {name} is here, but it is not; download both files again"
        ) from error
    if tuple(tensor.get_shape()) != shape:
        raise ValueError(
            f"{path}: {name} has shape {tuple(tensor.get_shape())}, but config.json makes it {shape}; "
            "config.json and the weights must be of the same model"
        )
    if tensor.get_dtype() not in _FLOATS:
        raise ValueError(
            f"{path}: {name} has dtype {tensor.get_dtype()}, expected one of {', '.join(_FLOATS)}; "
            "use the original, unquantised weights"
        )
    return tensor


def _check_names(directory: Path, found: set[str], expected: set[str], config: LlamaConfig) -> None:
    missing = sorted(expected - found)
    left_over = sorted(name for name in found - expected if not _is_ignorable(name, config))
    if missing or left_over:
        hint = "; without lm_head.weight, config.json should say tie_word_embeddings: true"
        raise ValueError(
            f"{directory}: missing tensors: {_few(missing)}; left over, read by no weight of this Llama: "
            f"{_few(left_over)}; config.json and the weights must be of the same model"
            f"{hint if 'lm_head.weight' in missing else ''}"
        )


def _is_ignorable(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor is no weight: a rotary table of an old checkpoint, or a head that repeats a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _read_object(path: Path, way_out: str) -> dict[str, Any]:
    content = read_json(path, way_out)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}; {way_out}")
    return content


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
