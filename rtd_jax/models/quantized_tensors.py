"""The tensors that stand for a quantised weight in a Hugging Face folder, and the `quantization_config` that says so.

    int8, int4, int3, int2   compressed-tensors "pack-quantized": weight_packed, weight_scale, weight_shape and, where
                             the scheme is asymmetric, weight_zero_point
    fp8                      compressed-tensors "float-quantized": weight, weight_scale
    nf4                      bitsandbytes: weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4

Read and written as compressed-tensors 0.20 and bitsandbytes 0.50 do, and without either. Packed integers are a dense
stream of bits: value i of a row, plus half the number of levels, lies from bit i * bits on, the lowest bit first.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from qwix import QArray

from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.schemes import BITS, QType, Scheme
from rtd_jax.models.weights import TABLE, Weight

NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_COMPRESSED, _BITSANDBYTES = "compressed-tensors", "bitsandbytes"
_WAY_OUT = "use the original float weights, or dequantise it and save it again with transformers"
_FLOATS = ("F32", "F16", "BF16")
_FORMATS: dict[QType, str] = {
    **dict.fromkeys(("int8", "int4", "int3", "int2"), "pack-quantized"),
    "fp8": "float-quantized",
}  # of compressed-tensors
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
                f"groups of {scheme.group_size} do not divide; such a folder is not read here: {_WAY_OUT}"
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


# quantization_config --------------------------------------------------------------------------------------------------


def check_storable(scheme: Scheme, config: LlamaConfig) -> None:
    """Raises ValueError where no format that transformers loads holds a model of this config in the scheme."""
    scheme.check(config)
    if scheme.qtype == "nf4" and scheme.head:
        raise ValueError(
            "bitsandbytes, the format of nf4, cannot hold a quantised embedding (head=True); leave it and the head as "
            "floats, or use int4"
        )
    if scheme.qtype == "nf4" and scheme.group_size not in NF4_BLOCKS:
        raise ValueError(
            f"group_size {scheme.group_size}: bitsandbytes, the format of nf4, has blocks of "
            f"{', '.join(map(str, NF4_BLOCKS))} inputs; use one of them"
        )


def quantization_config(scheme: Scheme, dtype: str) -> dict[str, Any]:
    """The entry of config.json from which transformers, and engines that serve, know how the weights are stored."""
    if scheme.qtype == "nf4":
        return {
            "quant_method": _BITSANDBYTES,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_threshold": 6.0,
        }
    kind, bits = _numbers(scheme.qtype)
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
        "actorder": None,
    }
    targets = ["Linear", "Embedding"] if scheme.head else ["Linear"]
    # transformers 5.23 has no place for packed zero points, packed embeddings or tied heads with scales, and fails,
    # unless it is told to dequantise each weight as it is read. Engines do not know the key.
    told = {"dequantize": True} if scheme.head or not scheme.symmetric else {}
    return {
        "quant_method": _COMPRESSED,
        "format": _FORMATS[scheme.qtype],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
        },
        "ignore": [] if scheme.head else ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **told,
    }


def storage_of(content: dict[str, Any]) -> Storage:
    """How the weights are stored by the `quantization_config` of a config.json, if there is one.

    bitsandbytes keeps the group size beside each weight, and not here: the scheme's is then 64, its default.

    Raises:
      ValueError: they are quantised in a way that is not read here.
    """
    entry = content.get("quantization_config")
    if entry is None or entry == {}:
        return Storage()
    if not isinstance(entry, dict):
        raise ValueError(f"quantization_config is {entry!r}; expected an object, or null")
    method = entry.get("quant_method")
    if method == _COMPRESSED:
        return _compressed(entry)
    if method == _BITSANDBYTES:
        return _bitsandbytes(entry)
    raise _refused(f"its quant_method is {method!r}, and only {_COMPRESSED} and {_BITSANDBYTES} are read here")


def _compressed(entry: dict[str, Any]) -> Storage:
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        raise _refused(f"config_groups is {groups!r}; only one group, with its settings in full, is read here")
    name, group = next(iter(groups.items()))
    sparsity = entry.get("sparsity_config")
    is_dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    for where, value in [
        ("kv_cache_scheme", entry.get("kv_cache_scheme")),
        ("sparsity_config", None if is_dense else sparsity),
        ("transform_config", entry.get("transform_config")),
        (f"config_groups.{name}.input_activations", group.get("input_activations")),
        (f"config_groups.{name}.output_activations", group.get("output_activations")),
    ]:
        if value:
            raise _refused(f"it has a {where}; only quantised weights are read here")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refused(f"config_groups.{name}.weights is {weights!r}; only quantised weights are read here")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    stored = group.get("format") or entry.get("format")
    qtype = next((one for one, format in _FORMATS.items() if (kind, bits, stored) == (*_numbers(one), format)), None)
    if qtype is None:
        raise _refused(
            f"its weights are {kind} of {bits} bits in the format {stored!r}; int of 2, 3, 4 or 8 bits in "
            "pack-quantized and float of 8 bits in float-quantized are read here"
        )
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel") or (strategy == "group") != (isinstance(size, int) and size > 0):
        raise _refused(
            f"its strategy is {strategy!r} with group_size {size!r}; group with a size, and channel without one, are "
            "read here"
        )
    if weights.get("dynamic") or weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(
            f"its weights have dynamic {weights.get('dynamic')!r} and actorder {weights.get('actorder')!r}; only "
            "groups of neighbouring inputs with fixed scales are read here"
        )
    targets = _patterns("targets", group.get("targets"))
    ignore = _patterns("ignore", [] if entry.get("ignore") is None else entry["ignore"])

    def ignored(module: str, kind: str) -> bool:
        def is_in(patterns: list[str]) -> bool:
            return any(
                re.match(pattern[3:], module) if pattern.startswith("re:") else pattern in (module, kind)
                for pattern in patterns
            )

        return is_in(ignore) or not is_in(targets)

    head = not ignored("lm_head", "Linear") or not ignored("model.embed_tokens", "Embedding")
    group_size = int(size) if strategy == "group" and size else 0
    return Storage(Scheme(qtype, group_size, bool(weights.get("symmetric", True)), head), ignored)


def _bitsandbytes(entry: dict[str, Any]) -> Storage:
    found = {key: entry.get(key) for key in ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")}
    if found != {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}:
        raise _refused(
            f"{', '.join(f'{key} is {value!r}' for key, value in found.items())}; of {_BITSANDBYTES}, only nf4 without "
            "double quantisation is read here"
        )
    if entry.get("bnb_4bit_quant_storage") not in (None, "uint8"):
        raise _refused(f"bnb_4bit_quant_storage is {entry['bnb_4bit_quant_storage']!r}; only uint8 is read here")
    skipped = entry.get("llm_int8_skip_modules")
    skipped = _patterns("llm_int8_skip_modules", ["lm_head"] if skipped is None else skipped)

    def ignored(module: str, kind: str) -> bool:
        # As transformers' should_convert_module: from the start up to a dot, as a pattern or as the end.
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        found = any(re.match(rf"(?:{key}){boundary}", module) or module.endswith(key) for key in skipped)
        return kind != "Linear" or found

    return Storage(Scheme("nf4", 64, head=not ignored("lm_head", "Linear")), ignored)


def _numbers(qtype: QType) -> tuple[str, int]:
    """The kind of number, and its bits, by which compressed-tensors knows a type."""
    return "float" if qtype == "fp8" else "int", BITS[qtype]


def _patterns(key: str, value: Any) -> list[str]:
    """A list of names of modules and of regular expressions. Raises ValueError where it is none."""
    try:
        if not isinstance(value, list):
            raise TypeError("it is no list")
        for pattern in value:
            re.compile(pattern.removeprefix("re:"))
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(f"quantization_config.{key} is {value!r}; expected names of modules: {error}") from error
    return value


def _refused(reason: str) -> ValueError:
    return ValueError(f"the checkpoint is quantised (quantization_config): {reason}; {_WAY_OUT}")


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
