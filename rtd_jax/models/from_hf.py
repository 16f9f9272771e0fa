"""Reads params from Hugging Face directories (config.json, safetensors), one tensor at a time, without torch."""

import contextlib
import functools
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

from rtd_jax.base.files import read_object
from rtd_jax.base.types import Params
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantization_config import storage_of
from rtd_jax.models.quantized import INT8, quantize_weight
from rtd_jax.models.quantized_folders import read_storage
from rtd_jax.models.quantized_tensors import QuantizedTensor
from rtd_jax.models.to_hf import INDEX_FILE, TOKENIZER_FILES
from rtd_jax.models.weight_files import few, open_file, open_tensor, tensor_files
from rtd_jax.models.weights import EMBEDDING, HEAD, Weight, table

_ROWS_COMPARED = 4096  # of two matrices at one time
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name_or_dir: str | Path, *, has_weights: bool = True) -> Path:
    """The directory of a model: a local one as it is, else the hub's snapshot of that name, downloaded or cached.

    Only config, safetensors and tokenizer files are downloaded; without `has_weights` no safetensors.

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
        patterns = ["config.json", *TOKENIZER_FILES, *(["*.safetensors", INDEX_FILE] if has_weights else [])]
        # Mistral's repositories hold every weight a second time, in a file that no index names.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*"]))
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(
            f"{name}: neither a local directory nor a model the hub would give ({type(error).__name__}: {reason}). "
            f"Without a network, download it elsewhere (`hf download {name} --local-dir DIR`) and give that directory "
            "instead; for a gated model, log in first (`hf auth login`)"
        ) from error


def load_config(directory: str | Path) -> DecoderConfig:
    """The config of a Hugging Face directory, whose weights may be quantised.

    Raises:
      ValueError: it is missing, unreadable or of a family that is not supported, or the weights are quantised in a way
        that is not read here.
    """
    path = Path(directory) / "config.json"
    # With NaN and Infinity, which are no JSON: the config knows the key and what it may be.
    content = read_object(path, "give the directory of a Hugging Face checkpoint", constants=True)
    try:
        storage_of(content)
        return DecoderConfig.from_hf(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_params(
    directory: str | Path,
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    shardings: dict[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> Params:
    """The weights of a Hugging Face directory in the layout of `DecoderModel`'s params; quantised ones as floats.

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
    files = tensor_files(directory)
    rows = table(config)
    storage = read_storage(directory)
    stored = {name: storage.names(weight, name) for weight in rows for name in weight.names(config)}
    _check_names(directory, set(files), {part for names in stored.values() for part in names}, config)
    sharding_of = {} if shardings is None else flatten_dict(shardings)
    with contextlib.ExitStack() as stack:
        handles = {path: stack.enter_context(open_file(path)) for path in sorted(set(files.values()))}

        def slices(part: str) -> tuple[Any, Path]:
            return handles[files[part]].get_slice(part), files[part]

        def reader(name: str, weight: Weight) -> Any:
            if storage.scheme is not None and storage.covers(weight, name):
                return QuantizedTensor(slices, name, weight.hf_shape(config), storage.scheme)
            return open_tensor(handles[files[name]], files[name], name, weight.hf_shape(config))

        readers = {name: reader(name, weight) for weight in rows for name in weight.names(config)}
        if config.tied_embeddings and HEAD.name in files:
            _check_equal(files[HEAD.name], reader(HEAD.name, HEAD), readers[EMBEDDING.name], config)
        chosen = range(config.layers) if layers is None else layers
        finite: dict[str, jax.Array] = {}
        params = unflatten_dict(
            {row.path: _load(row, config, dtype, sharding_of.get(row.path), readers, chosen, finite) for row in rows}
        )
    _check_finite({name: files[stored[name][0]] for name, is_finite in finite.items() if not np.asarray(is_finite)})
    return params


def _load(
    weight: Weight,
    config: DecoderConfig,
    dtype: str,
    sharding: Any,
    readers: dict[str, Any],
    layers: Sequence[int],
    finite: dict[str, jax.Array],
) -> Any:
    """One entry of the params, of all the `layers` where they are stacked.

    Writes into `finite` for each tensor whether all of its values are, as an array that nobody has waited for.
    """
    raw_sharding = _hf_sharding(weight, sharding.qvalue if isinstance(sharding, QArray) else sharding)
    float_dtype = "bfloat16" if dtype == INT8 else dtype  # norms are not quantised

    def convert(raw: jax.Array) -> Any:
        array = weight.from_hf(raw, config)
        return quantize_weight(array, weight) if dtype == INT8 and weight.inputs else array.astype(float_dtype)

    def is_finite(raw: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(raw.astype(float_dtype)))  # in the dtype that it is kept in, which may be narrower

    def read(name: str) -> jax.Array:
        if raw_sharding is None:
            return jnp.asarray(readers[name][:])
        return _read_sharded(readers[name], weight.hf_shape(config), raw_sharding)

    if not weight.stacked:
        load = jax.jit(lambda raw: (convert(raw), is_finite(raw)), out_shardings=(sharding, None))
        array, finite[weight.name] = load(read(weight.name))
        return array

    # Because of the donation the device writes in place, without a second copy of the stacked layers.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(sharding, None))
    def put(stacked, raw, layer):
        written = jax.tree.map(
            lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, layer, axis=0), stacked, convert(raw)
        )
        return written, is_finite(raw)

    def empty():
        one = jax.eval_shape(convert, jax.ShapeDtypeStruct(weight.hf_shape(config), "float32"))
        return jax.tree.map(lambda x: jnp.zeros((len(layers), *x.shape), x.dtype), one)

    stacked = jax.jit(empty, out_shardings=sharding)()
    names = weight.names(config)
    for position, layer in enumerate(layers):
        raw = read(names[layer])
        # Dispatch is asynchronous: without waiting, reads would run ahead and collect a second copy on the host.
        stacked, finite[names[layer]] = put(jax.block_until_ready(stacked), raw, position)
    return stacked


def _check_finite(files: dict[str, Path]) -> None:
    """Raises ValueError if there is any tensor here that has values which are no finite numbers."""
    if files:
        raise ValueError(
            f"{next(iter(files.values()))}: NaN or infinite values in {few(list(files))}; the file is damaged, or the "
            "training that wrote it diverged: download it again, or use an earlier checkpoint"
        )


def _check_equal(file: Path, head: Any, embedding: Any, config: DecoderConfig) -> None:
    """Raises ValueError where a tied model's file has a head of its own. A head that repeats the embedding is fine."""
    for start in range(0, config.vocab_size, _ROWS_COMPARED):
        rows = slice(start, min(start + _ROWS_COMPARED, config.vocab_size))
        if not np.array_equal(head[rows].astype(np.float32), embedding[rows].astype(np.float32), equal_nan=True):
            raise ValueError(
                f"{file}: {HEAD.name} is not the embedding, but config.json says tie_word_embeddings: true; set "
                "tie_word_embeddings to false to use this head, or remove it from the file to use the embedding"
            )


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


def _check_names(directory: Path, found: set[str], expected: set[str], config: DecoderConfig) -> None:
    missing = sorted(expected - found)
    left_over = sorted(name for name in found - expected if not _is_ignorable(name, config))
    if missing or left_over:
        hint = "; without lm_head.weight, config.json should say tie_word_embeddings: true"
        raise ValueError(
            f"{directory}: missing tensors: {few(missing)}; left over, read by no weight of this model: "
            f"{few(left_over)}; config.json and the weights must be of the same model"
            f"{hint if 'lm_head.weight' in missing else ''}"
        )


def _is_ignorable(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor is no weight: a rotary table of an old checkpoint, or a head that repeats a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")
