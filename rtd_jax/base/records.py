"""Small JSON files that say what lies beside them, and the arrays that they vouch for.

A record (`files.write_record`) is read into a dataclass, which names a key that is missing, unknown or of another type,
and whose `__post_init__` names a value that cannot be. Arrays beside it lie in a safetensors file whose SHA-256 the
record holds; their names, shapes and values are checked when they are read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rtd_jax.base.files import file_digest, read_record, reading, replacing
from rtd_jax.base.settings import build

T = TypeVar("T")


def load_record(cls: type[T], path: Path, format: int, way_out: str, *, undigested: Sequence[int | None] = ()) -> T:
    """The record in a file as dataclass `cls`; earlier formats as in `read_record`.

    Raises:
      ValueError: the file cannot be read, was changed, or has another shape; names the file, the key and the way out.
    """
    content = read_record(path, format, way_out, undigested=undigested)
    content.pop("format", None)
    return shaped(cls, content, path, way_out)


def shaped(cls: type[T], content: Mapping[str, Any], place: Path | str, way_out: str) -> T:
    """The content of a JSON object as dataclass `cls`.

    Raises:
      ValueError: it has another shape; names `place`, the key and the way out.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass
    for field in fields:
        if field.default is MISSING and field.default_factory is MISSING and content.get(field.name) is None:
            raise ValueError(f"{place} has no {field.name!r}; {way_out}")
    try:
        return build(cls, content, "content")
    except (ValueError, OverflowError) as error:  # an integer that no float can hold
        raise ValueError(f"{place} is damaged: {error}; {way_out}") from error


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Writes a safetensors file, atomically; returns its SHA-256."""
    with replacing(path) as temporary:
        save_file(dict(arrays), temporary)
        return file_digest(temporary)


def load_arrays(path: Path, sha256: str, way_out: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which must be the one with this SHA-256.

    Raises:
      ValueError: the file cannot be read, is another one, or has an array with a value that is not finite.
    """
    with reading(path, way_out):
        if file_digest(path) != sha256:
            raise ValueError(f"{path} is not the file that the JSON beside it was written with; {way_out}")
        try:
            arrays = load_file(path)
        except (SafetensorError, MemoryError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {way_out}") from error
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{path}: {name!r} has values that are not finite; {way_out}")
    return arrays


def check_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], way_out: str
) -> None:
    """Raises ValueError where the names or shapes of a file's arrays are not those expected; names the first."""

    def described(sizes: Mapping[str, tuple[int, ...]], name: str) -> str:
        return f"shape {list(sizes[name])}" if name in sizes else "no such array"

    found = {name: array.shape for name, array in arrays.items()}
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise ValueError(
                f"{path}: {name!r}: there is {described(found, name)}, its settings ask for {described(shapes, name)}; "
                f"{way_out}"
            )
