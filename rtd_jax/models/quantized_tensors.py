"""The tensors that stand for a quantised weight in a Hugging Face folder.

    int8, int4, int3, int2   compressed-tensors "pack-quantized": weight_packed, weight_scale, weight_shape and, where
                             the scheme is asymmetric, weight_zero_point
    fp8                      compressed-tensors "float-quantized": weight, weight_scale
    nf4                      bitsandbytes: weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4

Read and written as compressed-tensors 0.20 and bitsandbytes 0.50 do, and without either. Packed integers are a dense
stream of bits: value i of a row, plus half the number of levels, lies from bit i * bits on, the lowest bit first.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from qwix import QArray

from rtd_jax.models.schemes import BITS, Scheme
from rtd_jax.models.weights import TABLE, Weight

_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
WAY_OUT = "use the original float weights, or dequantise it and save it again with transformers"
_FLOATS = ("F32", "F16", "BF16")
_MODULES = {weight.path: "Embedding" if weight.path == ("embedding",) else "Linear" for weight in TABLE}
# The quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
# fmt: off
_NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on


@dataclass(frozen=True)
class Storage:
    """Which weights of a folder are quantised, and how."""

    scheme: Scheme | None = None  # None: all are floats
    ignored: Callable[[str, str], bool] = lambda module, kind: True  # a module of this name and class stays as it is

    def covers(self, weight: Weight, name: str) -> bool:
        """Whether quantised tensors stand for the weight of this name."""
        is_matrix = self.scheme is not None and bool(weight.inputs)
        return is_matrix and not self.ignored(name.removesuffix(".weight"), _MODULES[weight.path])

    def names(self, weight: Weight, name: str) -> list[str]:
        """The names of the tensors that stand for the weight of this name."""
        if self.scheme is None or not self.covers(weight, name):
            return [name]
        return [_part(name, suffix) for suffix in _parts(self.scheme, (1, 1))]


class _Part(NamedTuple):
    """One tensor of those that stand for a weight."""

    dtypes: tuple[str, ...]  # of safetensors; the first is what is written
    shape: tuple[int, ...] | None  # None: any


def _parts(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, _Part]:
    """The tensors that stand for a weight of [outputs, inputs], by the ends of their names."""
    outputs, inputs = shape
    groups = inputs // scheme.group_size if scheme.group_size else 1
    scale = _Part(_FLOATS, (outputs, groups))
    if scheme.qtype == "nf4":
        weight = _Part(("U8",), (-(-outputs * inputs // 2), 1))
        absmax = _Part(("F32",), (outputs * groups,))
        return {
            "weight": weight,
            "weight.absmax": absmax,
            "weight.quant_map": _Part(("F32",), (16,)),
            _NF4_STATE: _Part(("U8",), None),
        }
    if scheme.qtype == "fp8":
        return {"weight": _Part(("F8_E4M3",), shape), "weight_scale": scale}
    bits = BITS[scheme.qtype]
    packed = _Part(("I32",), (outputs, _words(inputs, bits)))
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": _Part(("I64", "I32"), (2,))}
    if scheme.symmetric:
        return parts
    return parts | {"weight_zero_point": _Part(("I32",), (_words(outputs, bits), groups))}


def bytes_of(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """About how many bytes stand for a weight of [outputs, inputs]."""
    sizes = {"F32": 4, "I32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}
    return sum(sizes[part.dtypes[0]] * int(np.prod(part.shape or (100,))) for part in _parts(scheme, shape).values())


def encoded(name: str, matrix_OI: QArray, scheme: Scheme, dtype: str) -> dict[str, np.ndarray]:
    """The tensors that stand for the weight `name`, from the host's arrays of `schemes.rounded`.

    Args:
      dtype: of the folder's other weights; bitsandbytes notes it as that of the dequantised ones.
    """
    values, scale = np.ascontiguousarray(matrix_OI.qvalue), np.ascontiguousarray(matrix_OI.scale)
    tensors: dict[str, np.ndarray]
    if scheme.qtype == "nf4":
        flat = values.astype(np.uint8).reshape(-1)
        state = {
            "quant_type": "nf4",
            "blocksize": scheme.group_size,
            "dtype": dtype,
            "shape": list(values.shape),
        }
        tensors = {
            "weight": (flat[::2] << 4 | flat[1::2])[:, None],
            "weight.absmax": scale.astype(np.float32).reshape(-1),
            "weight.quant_map": _NF4,
            _NF4_STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
    elif scheme.qtype == "fp8":
        tensors = {"weight": values, "weight_scale": scale}
    else:
        bits = BITS[scheme.qtype]
        tensors = {
            "weight_packed": pack(values, bits),
            "weight_scale": scale,
            "weight_shape": np.array(values.shape, np.int64),
        }
        if not scheme.symmetric:
            points_OG = np.asarray(matrix_OI.zero_point)
            tensors["weight_zero_point"] = np.ascontiguousarray(pack(points_OG.T, bits).T)
    return {_part(name, suffix): tensor for suffix, tensor in tensors.items()}


class QuantizedTensor:
    """A weight that several tensors stand for, opened like a tensor of a safetensors file: its slices are float32.

    While packed integers are read, the host holds each of their bits as a byte.

    Raises:
      ValueError: one of them has another shape or dtype than the scheme and config.json make it, or says another
        shape; when it is read, a scale is no finite number.
    """

    def __init__(self, open_part: Callable[[str], tuple[Any, Path]], name: str, shape: tuple[int, ...], scheme: Scheme):
        """`open_part` gives, for a tensor's name, its slice-able tensor and the file that it lies in."""
        self.name, self.shape, self.scheme = name, shape, scheme
        if scheme.group_size and shape[1] % scheme.group_size:
            raise ValueError(
                f"{open_part(_part(name, next(iter(_parts(scheme, shape)))))[1]}: {name} has {shape[1]} inputs, which "
                f"groups of {scheme.group_size} do not divide; such a folder is not read here: {WAY_OUT}"
            )
        self.parts: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        for suffix, part in _parts(scheme, shape).items():
            full = _part(name, suffix)
            tensor, self.files[suffix] = open_part(full)
            found = (tensor.get_dtype(), tuple(tensor.get_shape()))
            if found[0] not in part.dtypes or part.shape not in (None, found[1]):
                raise ValueError(
                    f"{self.files[suffix]}: {full} has dtype {found[0]} and shape {found[1]}, but config.json "
                    f"(quantization_config, {scheme.name}) makes it {' or '.join(part.dtypes)} and "
                    f"{part.shape or 'of any shape'}; config.json and the weights must be of the same model"
                )
            self.parts[suffix] = tensor
        self._check_notes()

    def _check_notes(self) -> None:
        """Raises ValueError where the small tensors that describe the others say something else than config.json."""
        if "weight_shape" in self.parts:
            self._check("weight_shape", tuple(int(size) for size in self.parts["weight_shape"][:]), self.shape)
        if _NF4_STATE in self.parts:
            state = nf4_state(self.parts[_NF4_STATE][:], self.files[_NF4_STATE], _part(self.name, _NF4_STATE))
            found = [state.get(key) for key in ("quant_type", "blocksize", "shape")]
            self._check(_NF4_STATE, found, ["nf4", self.scheme.group_size, list(self.shape)])
            if not np.array_equal(self.parts["weight.quant_map"][:], _NF4):
                self._check("weight.quant_map", "another table of values", "that of NF4")

    def _check(self, suffix: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise ValueError(
                f"{self.files[suffix]}: {_part(self.name, suffix)} says {found}, expected {expected}; config.json and "
                "the weights must be of the same model: download both again"
            )

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        outputs, inputs = self.shape
        start, stop, _ = rows.indices(outputs)
        values = self._values(start, stop)
        scale = self._scale(start, stop)
        groups_RGI = values.reshape(stop - start, scale.shape[1], -1)
        if not self.scheme.symmetric:
            packed = np.ascontiguousarray(self.parts["weight_zero_point"][:].T)
            points_OG = unpack(packed, BITS[self.scheme.qtype], outputs).T
            groups_RGI = groups_RGI - points_OG[start:stop, :, None]
        return (groups_RGI * scale[:, :, None]).reshape(-1, inputs)[:, columns]

    def _values(self, start: int, stop: int) -> np.ndarray:
        """Rows of the values before they are scaled, float32."""
        inputs = self.shape[1]
        if self.scheme.qtype == "fp8":
            return _float8(self.files["weight"], _part(self.name, "weight"), self.shape)[start:stop].astype(np.float32)
        if self.scheme.qtype == "nf4":
            pairs = self.parts["weight"][start * inputs // 2 : stop * inputs // 2]
            return _NF4[np.concatenate([pairs >> 4, pairs & 15], axis=1)]
        return unpack(self.parts["weight_packed"][start:stop], BITS[self.scheme.qtype], inputs)

    def _scale(self, start: int, stop: int) -> np.ndarray:
        """[rows, groups] float32."""
        suffix = "weight.absmax" if self.scheme.qtype == "nf4" else "weight_scale"
        tensor = self.parts[suffix]
        per_row = tensor.get_shape()[0] // self.shape[0]
        scale = tensor[start * per_row : stop * per_row].astype(np.float32).reshape(stop - start, -1)
        if not np.isfinite(scale).all():
            raise ValueError(
                f"{self.files[suffix]}: NaN or infinite values in {_part(self.name, suffix)}; the file is damaged, or "
                "the model that was quantised had diverged: download it again, or quantise an earlier checkpoint"
            )
        return scale


def nf4_state(tensor: np.ndarray, file: Path, name: str) -> dict[str, Any]:
    """What bitsandbytes notes of a 4-bit weight. Raises ValueError where it cannot be read."""
    try:
        state = json.loads(tensor.tobytes())
    except ValueError as error:
        raise ValueError(f"{file}: {name} is no JSON ({error}); download it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: {name} is {state!r}, expected an object; download it again")
    return state


def nf4_states(names: list[str]) -> list[str]:
    """Those of some tensors that hold what bitsandbytes notes of a weight."""
    return [name for name in names if name.endswith(_NF4_STATE)]


# Bits -----------------------------------------------------------------------------------------------------------------


def _part(name: str, suffix: str) -> str:
    return name.removesuffix("weight") + suffix


def _words(values: int, bits: int) -> int:
    """32-bit words that hold a row of packed values."""
    return -(-values * bits // 32)


def pack(values_RC: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers of `bits` bits, 1 to 8, as int32 [R, words], each row by itself."""
    rows, columns = values_RC.shape
    unsigned = (values_RC.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    stream = np.pad(stream, [(0, 0), (0, 32 * _words(columns, bits) - stream.shape[1])])
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def unpack(words_RW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of `pack`, float32 [R, columns]."""
    stream = np.unpackbits(words_RW.astype("<i4").view(np.uint8), axis=-1, count=columns * bits, bitorder="little")
    unsigned = np.packbits(stream.reshape(len(words_RW), columns, bits), axis=-1, bitorder="little")[..., 0]
    return unsigned.astype(np.float32) - np.float32(1 << bits - 1)


def _float8(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float8_e4m3fn tensor of a file that was opened before; safetensors itself gives no numpy array of one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(length))[name]["data_offsets"][0]
    return np.memmap(path, np.dtype(jnp.float8_e4m3fn), "r", 8 + length + start, shape)
