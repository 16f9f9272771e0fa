"""Hugging Face folders of quantised models, which transformers and serving engines load.

What lies in them: `quantized_tensors`; how config.json says so: `quantization_config`.
`load_config` and `load_params` read such a folder as any other, with float weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from qwix import QArray

from rtd_jax.base.files import read_object
from rtd_jax.base.types import Params
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantization_config import check_storable, quantization_config, storage_of
from rtd_jax.models.quantized_tensors import Storage, bytes_of, encoded, nf4_state, nf4_states
from rtd_jax.models.schemes import Scheme
from rtd_jax.models.to_hf import Entry, checked_arrays, float_entry, in_order, layer_on_host, write_folder
from rtd_jax.models.weight_files import open_file, tensor_files
from rtd_jax.models.weights import Weight

_QTYPES = {"fp8": "float8_e4m3fn"}  # qwix's names for types, where they are not ours


def save_quantized(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    scheme: Scheme,
    *,
    tokenizer: Any = None,
    text: TextFormat | None = None,
) -> Path:
    """Writes params as `schemes.rounded` makes them, with the guarantees of `save_pretrained`; returns the directory.

    Scales and what is not quantised keep their dtypes. transformers loads every such folder, with compressed-tensors or
    (nf4) bitsandbytes. Engines take less: by its source, vLLM has kernels for int8 and int4, its newest releases for
    int3 and int2, and fp8 by channel alone; it keeps embeddings as they are, so none with `scheme.head`.

    Raises:
      ValueError: as `save_pretrained`; the params are not rounded by this scheme, or no format holds them.
      OSError: as `save_pretrained`.
    """
    check_storable(scheme, config)
    arrays = flatten_dict(params)
    checked_arrays(config, params, lambda weight: _shape(weight, arrays.get(weight.path), config))
    for weight, _ in in_order(config):
        _check_rounded(weight, arrays[weight.path], config, scheme)
    floats = {array.dtype for array in arrays.values() if not isinstance(array, QArray)}
    dtype = str(np.result_type(*floats))

    def entry(weight: Weight, layer: int) -> Entry:
        array = arrays[weight.path]
        if not isinstance(array, QArray):
            return float_entry(weight, layer, array, config)

        def to_host() -> dict[str, np.ndarray]:
            matrix = jax.tree.map(lambda part: layer_on_host(weight, layer, part), array)
            return encoded(weight.names(config)[layer], matrix, scheme, dtype)

        return Entry(bytes_of(scheme, weight.hf_shape(config)), to_host)

    content = config.to_hf() | {"dtype": dtype, "quantization_config": quantization_config(scheme, dtype)}
    entries = [entry(weight, layer) for weight, layer in in_order(config)]
    return write_folder(directory, content, entries, tokenizer=tokenizer, text=text)


def quantization_of(directory: str | Path) -> Scheme | None:
    """The scheme that a folder's weights are rounded to; None: they are floats.

    Raises:
      ValueError: config.json or the weights cannot be read, or they are quantised in a way that is not read here.
    """
    return read_storage(Path(directory)).scheme


def read_storage(directory: Path) -> Storage:
    """How a folder's weights are stored. Raises ValueError as `quantization_of`."""
    path = directory / "config.json"
    content = read_object(path, "give the directory of a Hugging Face checkpoint", constants=True)
    try:
        storage = storage_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if storage.scheme is None or storage.scheme.qtype != "nf4":
        return storage
    files = tensor_files(directory)
    name = next(iter(nf4_states(sorted(files))), None)
    if name is None:
        raise ValueError(f"{directory}: config.json says that weights are in nf4, but none is; download both again")
    size = nf4_state(open_file(files[name]).get_tensor(name), files[name], name).get("blocksize")
    try:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"blocksize is {size!r}, expected a whole number of inputs; download it again")
        return replace(storage, scheme=replace(storage.scheme, group_size=size))
    except ValueError as error:
        raise ValueError(f"{files[name]}: {name}: {error}") from error


def _shape(weight: Weight, array: Any, config: DecoderConfig) -> tuple[int, ...]:
    """Shape that a leaf of `schemes.rounded` should have."""
    if not isinstance(array, QArray):
        return weight.shape(config)
    return (config.layers, *weight.hf_shape(config)) if weight.stacked else weight.hf_shape(config)


def _check_rounded(weight: Weight, array: Any, config: DecoderConfig, scheme: Scheme) -> None:
    """Raises ValueError where a leaf of the params is not what `schemes.rounded` makes it."""
    name = ".".join(weight.path)
    if isinstance(array, QArray) != scheme.covers(weight):
        found = "quantised" if isinstance(array, QArray) else "not quantised"
        raise ValueError(f"params {name} is {found}; save what `rounded` makes of params in the scheme {scheme.name}")
    if not isinstance(array, QArray):
        return
    outputs, inputs = weight.hf_shape(config)
    groups = inputs // scheme.group_size if scheme.group_size else 1
    shape = (*array.shape[:-2], outputs, groups)
    expected = (_QTYPES.get(scheme.qtype, scheme.qtype), shape, None if scheme.symmetric else shape)
    qtype = array.qtype if isinstance(array.qtype, str) else np.dtype(array.qtype).name
    found_parts = (qtype, array.scale.shape, None if array.zero_point is None else array.zero_point.shape)
    if found_parts != expected:
        raise ValueError(
            f"params {name} has the type and the shapes of scales and zero points {found_parts}, the scheme "
            f"{scheme.name} makes them {expected}; save params with their own scheme"
        )
