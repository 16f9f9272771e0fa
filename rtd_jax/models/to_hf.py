"""Writes Llama params as a Hugging Face directory that `transformers` loads: complete, or not at all."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rtd_jax.base.types import Params
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.weights import Weight, leaf, table

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
_OWN_FILES = {"config.json", INDEX_FILE, *TOKENIZER_FILES}


def save_pretrained(
    directory: str | Path,
    config: LlamaConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    tokenizer_dir: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Writes config.json, the tokenizer and the weights, and returns the absolute path of the directory.

    Everything is written beside `directory` and renamed at the end, so that a failure leaves what was there before.
    With several processes all must call it, and the first one writes. The host holds one shard at a time.

    Args:
      tokenizer: an object with `save_pretrained`.
      tokenizer_dir: instead of it, a directory whose tokenizer files are copied.
      dtype: of the tensors written; None keeps that of the params.
      max_shard_bytes: weights beyond this go into several safetensors files and an index.

    Raises:
      ValueError: the params do not fit the config, or the directory holds other files than a model's.
      OSError: the disk refuses; with the place.
    """
    directory = Path(directory).resolve()
    tensors = _tensors(config, params, dtype)
    shards = _shards(tensors, max_shard_bytes)
    if jax.process_index() != 0:
        for tensor in itertools.chain(*shards):
            _to_host(tensor, config)  # every process takes part in gathering arrays that are spread over them
        return directory
    _check_replaceable(directory)
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise ValueError(f"tokenizer_dir {tokenizer_dir}: no such directory; give the directory the tokenizer is in")
    partial = directory.parent / f".{directory.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", config.to_hf() | {"dtype": _common_dtype(tensors)})
        _write_shards(partial, shards, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if tokenizer_dir is not None:
            for file in TOKENIZER_FILES:
                if (Path(tokenizer_dir) / file).is_file():
                    shutil.copyfile(Path(tokenizer_dir) / file, partial / file)
        _replace(directory, partial)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.size for tensor in itertools.chain(*shards)) / 2**20
        raise OSError(
            f"{directory}: could not save the model ({error}); what was there before is unchanged. "
            f"Free at least {size:.0f} MiB, or give another directory",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


class _Tensor(NamedTuple):
    """One tensor to write."""

    name: str
    weight: Weight
    array: Any  # of the params, with all layers where they are stacked
    layer: int
    dtype: np.dtype
    size: int  # bytes


def _tensors(config: LlamaConfig, params: Params, dtype: str | None) -> list[_Tensor]:
    """Every tensor in the order of a checkpoint: embedding, layer by layer, norm, head."""
    rows = table(config)
    count = len(jax.tree.leaves(params))
    if count != len(rows):
        raise ValueError(f"params have {count} arrays, the config needs {len(rows)}; save params with their own config")
    for weight in rows:
        shape = np.shape(leaf(params, weight.path))
        if shape != weight.shape(config):
            raise ValueError(
                f"params {'.'.join(weight.path)} has shape {shape}, the config makes it {weight.shape(config)}; "
                "save params with their own config"
            )

    def tensor(weight: Weight, layer: int) -> _Tensor:
        array = leaf(params, weight.path)
        stored = jax.numpy.dtype(dtype or array.dtype)
        size = int(np.prod(weight.hf_shape(config))) * stored.itemsize
        return _Tensor(weight.names(config)[layer], weight, array, layer, stored, size)

    per_layer = [tensor(weight, layer) for layer in range(config.layers) for weight in rows if weight.stacked]
    single = [tensor(weight, 0) for weight in rows if not weight.stacked]
    return [single[0], *per_layer, *single[1:]]


def _shards(tensors: list[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _to_host(tensor: _Tensor, config: LlamaConfig) -> np.ndarray:
    one = tensor.array[tensor.layer] if tensor.weight.stacked else tensor.array
    if isinstance(one, jax.Array) and not one.is_fully_addressable:
        assert isinstance(one.sharding, NamedSharding)
        one = jax.device_put(one, NamedSharding(one.sharding.mesh, PartitionSpec()))
    # safetensors writes the buffer in the order of memory, so a transposed view would be written scrambled.
    return np.ascontiguousarray(tensor.weight.to_hf(np.asarray(one), config).astype(tensor.dtype))


def _write_shards(directory: Path, shards: list[list[_Tensor]], config: LlamaConfig) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: _to_host(tensor, config) for tensor in shard}
        save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in itertools.chain(*shards))
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _common_dtype(tensors: list[_Tensor]) -> str:
    return str(np.result_type(*{tensor.dtype for tensor in tensors}))


def _check_replaceable(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; give another directory")
    strangers = [path.name for path in _entries(directory) if path.name not in _OWN_FILES and not _is_weights(path)]
    if strangers:
        raise ValueError(
            f"{directory}: holds {sorted(strangers)[0]}, which is no part of a Hugging Face model, and saving replaces "
            "the whole directory; give an empty or new one"
        )


def _entries(directory: Path) -> Iterator[Path]:
    return directory.iterdir() if directory.is_dir() else iter(())


def _is_weights(path: Path) -> bool:
    return path.is_file() and path.name.startswith("model") and path.suffix == ".safetensors"


def _replace(directory: Path, complete: Path) -> None:
    if not directory.is_dir():
        complete.rename(directory)
        return
    old = directory.parent / f".{directory.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    directory.rename(old)
    try:
        complete.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
