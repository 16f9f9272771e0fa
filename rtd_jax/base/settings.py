"""ConfigDict -> frozen dataclasses. A misspelt, missing or unused key is an error that names the near one.

Each component owns its settings dataclass; this module only fills them in. A pure function never sees a ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds dataclass `cls` from a mapping (a ConfigDict is one), nested dataclasses included.

    Integers are taken for floats and lists for tuples; nothing else is converted.

    Raises:
      ValueError: a key that `cls` does not have, a key without default that is missing, or a value of another type; the
        message names the key by its full path.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"; did you mean {path}.{near[0]}?" if near else f"; it has {', '.join(sorted(fields))}"
        raise ValueError(f"{path}.{unknown[0]} is not a setting{hint}")
    arguments = {key: _convert(hints[key], values[key], f"{path}.{key}") for key in values}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ValueError(f"{path}.{name} is missing and has no default; set it in the config")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, path)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path} is {value!r}; expected one of {', '.join(map(repr, choices))}{hint_text}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; expected a group of settings")
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {value!r}; expected a tuple")
        (item, *_) = typing.get_args(hint)
        return tuple(_convert(item, entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; expected a group of settings")
        return {key: _convert(typing.get_args(hint)[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}); expected {hint.__name__}")
    return value


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))
