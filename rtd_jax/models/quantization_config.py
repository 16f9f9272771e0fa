"""The `quantization_config` of a config.json: how a folder's weights are stored, written for a scheme and read as one.

Of compressed-tensors (0.20) and bitsandbytes (0.50), as transformers and serving engines read them. What lies in the
folder then: `quantized_tensors`.
"""

import re
from typing import Any

from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantized_tensors import WAY_OUT, Storage
from rtd_jax.models.schemes import BITS, QType, Scheme

NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes
_COMPRESSED, _BITSANDBYTES = "compressed-tensors", "bitsandbytes"
_FORMATS: dict[QType, str] = {
    **dict.fromkeys(("int8", "int4", "int3", "int2"), "pack-quantized"),
    "fp8": "float-quantized",
}  # of compressed-tensors


def check_storable(scheme: Scheme, config: DecoderConfig) -> None:
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
    return ValueError(f"the checkpoint is quantised (quantization_config): {reason}; {WAY_OUT}")
