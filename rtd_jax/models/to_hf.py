"""Writes Llama params as a Hugging Face directory that `transformers` loads: complete, or not at all."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rtd_jax.base.files import to_disk, write_json
from rtd_jax.base.types import Params
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.text_record import TEXT_FILE, write_text_format
from rtd_jax.models.weights import Weight, table

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30  # of one safetensors file; a larger model has several, and an index
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
    TEXT_FILE,
)


def save_pretrained(
    directory: str | Path,
    config: LlamaConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    text: TextFormat | None = None,
) -> Path:
    """Writes config.json, the tokenizer and the weights, and returns the absolute path of the directory.

    Everything is written beside `directory` and renamed when it is on the disk: a failure leaves what was there before.
    With several processes all must call it, and the first one writes. The host holds one file's tensors at a time.

    Args:
      tokenizer: an object with `save_pretrained`; without one, no tokenizer is written.
      text: the form of text that the model was trained on; noted in the folder.

    Raises:
      ValueError: the params do not fit the config, or the directory holds other files than a model's.
      OSError: a file could not be written; the message names the directory and the space that is needed.
    """
    directory = Path(directory).resolve()
    tensors = _list_tensors(config, params)
    if jax.process_index() != 0:
        for tensor in tensors:
            tensor.to_host(config)  # every process takes part in gathering arrays that are spread over them
        return directory
    check_replaceable(directory)
    partial = directory.parent / f".{directory.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
        partial.mkdir(parents=True)
        dtype = np.result_type(*{tensor.array.dtype for tensor in tensors})
        write_json(partial / "config.json", config.to_hf() | {"dtype": str(dtype)})
        _write_tensors(partial, tensors, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if text is not None:
            write_text_format(partial, text)
        for path in (*partial.iterdir(), partial):
            to_disk(path)
        _replace(directory, partial)
        to_disk(directory.parent)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.size for tensor in tensors) / 2**20
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
    size: int  # bytes

    def to_host(self, config: LlamaConfig) -> np.ndarray:
        """The tensor in the layout of a checkpoint."""
        array = self.array[self.layer] if self.weight.stacked else self.array
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            assert isinstance(array.sharding, NamedSharding)
            array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
        # safetensors writes the buffer in the order of memory, so a transposed view would be written scrambled.
        return np.ascontiguousarray(self.weight.to_hf(np.asarray(array), config))


def _list_tensors(config: LlamaConfig, params: Params) -> list[_Tensor]:
    """Every tensor in the order of a checkpoint: embedding, layer by layer, norm, head."""
    rows, arrays = table(config), flatten_dict(params)
    if len(arrays) != len(rows):
        raise ValueError(
            f"params have {len(arrays)} arrays, the config needs {len(rows)}; save params with their own config"
        )
    for weight in rows:
        shape = np.shape(arrays[weight.path])
        if shape != weight.shape(config):
            raise ValueError(
                f"params {'.'.join(weight.path)} has shape {shape}, the config makes it {weight.shape(config)}; "
                "save params with their own config"
            )

    def tensor(weight: Weight, layer: int) -> _Tensor:
        array = arrays[weight.path]
        size = int(np.prod(weight.hf_shape(config))) * array.dtype.itemsize
        return _Tensor(weight.names(config)[layer], weight, array, layer, size)

    per_layer = [tensor(weight, layer) for layer in range(config.layers) for weight in rows if weight.stacked]
    single = [tensor(weight, 0) for weight in rows if not weight.stacked]
    return [single[0], *per_layer, *single[1:]]


def _write_tensors(directory: Path, tensors: list[_Tensor], config: LlamaConfig) -> None:
    """Writes one safetensors file, or several of at most MAX_SHARD_BYTES and their index."""
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: tensor.to_host(config) for tensor in shard}
        save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors)
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_replaceable(directory: Path) -> None:
    """Raises ValueError where `save_pretrained` would have to remove what is no part of a model."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; give another directory")
    known = {"config.json", INDEX_FILE, *TOKENIZER_FILES}
    names = {path.name for path in directory.glob("*") if not (path.is_file() and path.match("model*.safetensors"))}
    if names - known:
        raise ValueError(
            f"{directory}: holds {min(names - known)}, which is no part of a Hugging Face model, and saving replaces "
            "the whole directory; give an empty or new one"
        )


def _replace(directory: Path, complete: Path) -> None:
    old = directory.parent / f".{directory.name}.replaced"
    had_one = directory.is_dir()
    if had_one:
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        complete.rename(directory)
    except OSError:
        if had_one:
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)  # also what a kill between two renames left
