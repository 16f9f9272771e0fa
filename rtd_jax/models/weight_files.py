"""Which files of a Hugging Face folder hold its weights, and which tensor lies in which of them.

As in transformers, a single model.safetensors comes before an index with its shards: the index is what a save of
another size left there. No other file is read.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from rtd_jax.base.files import read_failure, read_object, reading
from rtd_jax.models.to_hf import INDEX_FILE, WEIGHTS_FILE

_FLOATS = ("F64", "F32", "F16", "BF16")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def weight_files(directory: Path) -> dict[str, Path]:
    """The files that hold the weights, by their names in the folder: the single file, or the index's shards.

    Raises:
      ValueError: there are none, one is missing, the index is damaged or names a file outside of the folder, or an
        adapter that would change the weights lies beside them.
    """
    return {file: directory / file for file in sorted(set(_index(directory).values()))} or {
        WEIGHTS_FILE: directory / WEIGHTS_FILE
    }


def tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, from the headers of the weight files.

    Raises:
      ValueError: as `weight_files`; a file is damaged or cannot be read, a tensor lies in two files, or the index says
        that one lies in another file than it does.
    """
    index = _index(directory)
    places: dict[str, Path] = {}
    for path in weight_files(directory).values():
        names: list[str] = open_file(path).keys()
        for name in names:
            if name in places:
                raise ValueError(
                    f"{directory}: tensor {name} lies in both {places[name].name} and {path.name}, so files of two "
                    "checkpoints may be mixed here; download it again into an empty folder"
                )
            places[name] = path
    for name, file in index.items():
        if places.get(name) != directory / file:
            raise ValueError(
                f"{directory / file}: {INDEX_FILE} says that {name} is here, but it is not; download both files again"
            )
    return places


def open_file(path: Path) -> Any:
    """A safetensors file that is open for reading, its header checked. Raises ValueError where it is damaged."""
    with reading(path, "download it again"), path.open("rb"):
        pass  # safetensors' own errors do not tell a file that may not be read from a damaged one
    try:
        return safe_open(path, framework="numpy")
    except OSError as error:
        raise ValueError(f"{path}: {read_failure(error)}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file of {path.stat().st_size} bytes ({error}); download it again "
            "(after a git clone, `git lfs pull`)"
        ) from error


def open_tensor(handle: Any, path: Path, name: str, shape: tuple[int, ...]) -> Any:
    """Opens one tensor of a file for reading in slices, and checks its shape and dtype."""
    tensor = handle.get_slice(name)
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


def _index(directory: Path) -> dict[str, str]:
    """The file of each tensor by the index of a sharded checkpoint; {} where a single file holds the weights."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give the directory of a Hugging Face checkpoint")
    adapter = next((name for name in _ADAPTER_FILES if (directory / name).exists()), None)
    if adapter:
        raise ValueError(
            f"{directory}: holds an adapter ({adapter}), which transformers would add to the weights; merge it into "
            "them (peft's merge_and_unload, then save_pretrained), or move its files away to use the weights without it"
        )
    path = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).is_file():
        return {}
    if not path.is_file():
        raise ValueError(
            f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; "
            "save the model with transformers' save_pretrained, which writes safetensors"
        )
    weight_map = read_object(path, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: 'weight_map' is {weight_map!r}, expected a file for each tensor; download it again")
    for name, file in weight_map.items():
        # By its text, because the files of the hub's cache are links that lead out of the folder.
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(
                f"{path}: 'weight_map' says that {name} is in {file!r}; expected a file in this folder; "
                "download the checkpoint again, or put its files together in one folder"
            )
    absent = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if absent:
        raise ValueError(
            f"{directory}: {INDEX_FILE} names {few(absent)}, which is not there; download the missing files"
        )
    return weight_map


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
