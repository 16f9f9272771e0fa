"""Hugging Face folders of adapters, which `peft` loads beside the model that they were trained on.

adapter_config.json and adapter_model.safetensors, as `peft.LoraConfig` and `PeftModel.save_pretrained` write them; the
names of tensors are in `weights.ADAPTER_TABLE`.
"""

from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from rtd_jax.base.types import Params
from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.to_hf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, float_entry, write_folder


def save_adapter(
    directory: str | Path,
    config: DecoderConfig,
    adapter: Params,
    settings: AdapterSettings,
    base: str,
    revision: str = "",
) -> Path:
    """Writes an adapter, with the guarantees of `save_pretrained`, and returns the absolute path of the folder.

    Args:
      config: of the whole model.
      adapter: its params, A and B of each matrix.
      base: folder or hub name of the model under it, which `peft` reads where it is not given one.
      revision: of the base on the hub.

    Raises:
      ValueError: the directory holds other files than a model's or an adapter's, or the params are not of these
        settings.
      OSError: as `save_pretrained`.
    """
    arrays = flatten_dict(adapter)
    shapes = {row.path: row.shape(config) for row in settings.rows}
    found = {path: array.shape for path, array in arrays.items()}
    if found != shapes:
        wrong = next(path for path in {**shapes, **found} if shapes.get(path) != found.get(path))
        raise ValueError(
            f"{'.'.join(wrong)} has shape {found.get(wrong)}, its settings make it {shapes.get(wrong)}; save it "
            "with its own settings"
        )
    layers = range(config.layers)
    entries = [float_entry(row, layer, arrays[row.path], config) for layer in layers for row in settings.rows]
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({row.name.split(".")[-3] for row in settings.rows}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return write_folder(directory, content, entries, files=(ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE))
