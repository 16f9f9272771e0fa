"""Writes params as a Hugging Face directory that `transformers` loads: complete, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rtd_jax.base.files import replacing_folder, write_json
from rtd_jax.base.types import Params
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.text_record import TEXT_FILE, write_text_format
from rtd_jax.models.weights import Weight, table

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # a folder of `peft`
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
    config: DecoderConfig,
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
    arrays = checked_arrays(config, params)
    entries = [float_entry(weight, layer, arrays[weight.path], config) for weight, layer in in_order(config)]
    dtype = np.result_type(*{array.dtype for array in arrays.values()})
    return write_folder(directory, config.to_hf() | {"dtype": str(dtype)}, entries, tokenizer=tokenizer, text=text)


class Entry(NamedTuple):
    """What is written of one weight of one layer: its tensor, or the several that stand for it."""

    size: int  # bytes
    to_host: Callable[[], dict[str, np.ndarray]]  # tensors by name; every process must call it


def write_folder(
    directory: str | Path,
    content: dict[str, Any],
    entries: list[Entry],
    *,
    tokenizer: Any = None,
    text: TextFormat | None = None,
    files: tuple[str, str] = (CONFIG_FILE, WEIGHTS_FILE),
) -> Path:
    """`save_pretrained` of any tensors.

    Args:
      content: of the first of `files`; tensors are in the second, or in several where a large model's are.
    """
    directory = Path(directory).resolve()
    if jax.process_index() != 0:
        for entry in entries:
            entry.to_host()  # every process takes part in gathering arrays that are spread over them
        return directory
    check_replaceable(directory)
    try:
        with replacing_folder(directory) as partial:
            write_json(partial / files[0], content)
            _write_tensors(partial, entries, files[1])
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
            if text is not None:
                write_text_format(partial, text)
    except (OSError, SafetensorError) as error:
        size = sum(entry.size for entry in entries) / 2**20
        raise OSError(
            f"{directory}: could not save the model ({error}); what was there before is unchanged. "
            f"Free at least {size:.0f} MiB, or give another directory",
        ) from error
    return directory


def float_entry(weight: Weight, layer: int, array: Any, config: DecoderConfig) -> Entry:
    """The one tensor of a weight that is not quantised."""

    def to_host() -> dict[str, np.ndarray]:
        tensor = weight.to_hf(layer_on_host(weight, layer, array), config)
        # safetensors writes the buffer in the order of memory, so a transposed view would be written scrambled.
        return {weight.names(config)[layer]: np.ascontiguousarray(tensor)}

    return Entry(int(np.prod(weight.hf_shape(config))) * array.dtype.itemsize, to_host)


def layer_on_host(weight: Weight, layer: int, array: Any) -> np.ndarray:
    """One layer of an array of the params, gathered from all processes. Every process must call it."""
    array = array[layer] if weight.stacked else array
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)


def checked_arrays(
    config: DecoderConfig, params: Params, shape_of: Callable[[Weight], tuple[int, ...]] | None = None
) -> dict[tuple[str, ...], Any]:
    """The leaves of the params by path. Raises ValueError where they are not those of the config.

    Args:
      shape_of: the shape of a weight in the params, where it is not the config's own.
    """
    rows, arrays = table(config), flatten_dict(params)
    if len(arrays) != len(rows):
        raise ValueError(
            f"params have {len(arrays)} arrays, the config needs {len(rows)}; save params with their own config"
        )
    for weight in rows:
        shape, expected = np.shape(arrays[weight.path]), weight.shape(config) if shape_of is None else shape_of(weight)
        if shape != expected:
            raise ValueError(
                f"params {'.'.join(weight.path)} has shape {shape}, the config makes it {expected}; "
                "save params with their own config"
            )
    return arrays


def in_order(config: DecoderConfig) -> list[tuple[Weight, int]]:
    """Every weight and layer in the order of a checkpoint: embedding, layer by layer, norm, head (layer 0)."""
    rows = table(config)
    per_layer = [(weight, layer) for layer in range(config.layers) for weight in rows if weight.stacked]
    single = [(weight, 0) for weight in rows if not weight.stacked]
    return [single[0], *per_layer, *single[1:]]


def _write_tensors(directory: Path, entries: list[Entry], single: str) -> None:
    """Writes one safetensors file; a model's into several of at most MAX_SHARD_BYTES and their index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        is_full = sum(other.size for other in shards[-1]) + entry.size > MAX_SHARD_BYTES
        if single == WEIGHTS_FILE and shards[-1] and is_full:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: tensor for entry in shard for name, tensor in entry.to_host().items()}
        save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(tensor.nbytes for tensor in arrays.values())
    if len(shards) > 1:
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_replaceable(directory: Path) -> None:
    """Raises ValueError where `save_pretrained` would have to remove what is no part of a model."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; give another directory")
    known = {CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES}
    names = {path.name for path in directory.glob("*") if not (path.is_file() and path.match("model*.safetensors"))}
    is_adapter = {path.name for path in directory.glob("*")} <= {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE}
    if names - known and not is_adapter:
        raise ValueError(
            f"{directory}: holds {min(names - known)}, which is no part of a Hugging Face model, and saving replaces "
            "the whole directory; give an empty or new one"
        )
