"""Settings are frozen dataclasses; a config is a ConfigDict that is made from them and read back into them.

Each component owns its settings dataclass. `defaults` gives the ConfigDict with every setting of one, so every setting
is a key that a config file and the command line can change; `build` makes the dataclass of it again. A misspelt,
missing or unused key is an error that names the near one. A pure function never sees a ConfigDict.
"""

import dataclasses
import difflib
import functools
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

T = TypeVar("T")


def defaults(cls: type, values: Mapping[str, Any] | None = None, path: str = "config") -> ConfigDict:
    """A ConfigDict with every setting of dataclass `cls`: at its default, or as `values` have it.

    A setting without default is None until it is given, and has its type from the start. An optional group (type
    `Settings | None`) has all its keys, too: it is there when its keys without default are given (see `build`). The
    ConfigDict is locked, so a misspelt key is an error where it is written; groups of type dict stay open.

    Raises:
      ValueError: `values` has a key that `cls` does not have.
    """
    given = values or {}
    _check_known(cls, given, path)
    config, hints = ConfigDict(), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value = given[field.name] if field.name in given else _default(field)
        config[field.name] = _entry(hints[field.name], value, f"{path}.{field.name}")
    config.lock()
    for name, hint in hints.items():
        if typing.get_origin(hint) is dict:
            config[name].unlock()  # with all that is in it
            for group in (x for x in config[name].values() if isinstance(x, ConfigDict)):
                group.lock()
    return config


def _entry(hint: Any, value: Any, path: str) -> Any:
    """`value` as ml_collections keeps it, so that overrides of the setting's type are taken and others refused."""
    group, is_only = _group(hint), len(value_types(hint)) == 1
    if group is not None and (_is_group(value) or dataclasses.is_dataclass(value) or (value is None and is_only)):
        return defaults(group, vars(value) if dataclasses.is_dataclass(value) else value, path)
    if typing.get_origin(hint) is dict and (value is None or _is_group(value)):
        item = typing.get_args(hint)[1]
        return ConfigDict({key: _entry(item, entry, f"{path}.{key}") for key, entry in (value or {}).items()})
    kind = _kind(hint)
    if value is None:
        return placeholder(kind)
    if kind is object:
        return FieldReference(value, field_type=object)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return tuple(value) if kind is tuple and isinstance(value, list) else value


def _default(field: dataclasses.Field) -> Any:
    """A field's default; None where it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _required(cls: type) -> list[str]:
    """Names of the settings without default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def value_types(hint: Any) -> list[Any]:
    """The types that a setting may have, None left out."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [option for option in (typing.get_args(hint) if is_union else (hint,)) if option is not type(None)]


def _group(hint: Any) -> type | None:
    """The dataclass among the types that a setting may have; None where there is none."""
    return next((typing.cast(type, option) for option in value_types(hint) if dataclasses.is_dataclass(option)), None)


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _kind(hint: Any) -> type:
    """The type whose parser reads a setting on the command line; object takes any literal."""
    options = value_types(hint)
    if len(options) > 1:
        return object
    if typing.get_origin(options[0]) is typing.Literal:
        return type(typing.get_args(options[0])[0])
    return typing.get_origin(options[0]) or options[0]


class Setting(NamedTuple):
    """A key of a config with its value."""

    key: str  # "loss.alpha"
    value: Any
    default: Any  # None where there is none
    meaning: str  # with its unit: the comment on the setting's line
    group: type  # dataclass that has it


def settings_of(cls: type, values: Mapping[str, Any], default: Mapping | None = None, path: str = "") -> list[Setting]:
    """Every setting of dataclass `cls` with its value in `values`, in the order of the dataclass.

    `default` are those that a group has of its own where it is a part of other settings.
    """
    found: list[Setting] = []
    default, hints = defaults(cls).to_dict() if default is None else default, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = field.name
        value, group = values.get(name, default[name]), _group(hints[name])
        if group is not None and _is_group(value):
            found += settings_of(group, value, default[name], f"{path}{name}.")
        elif typing.get_origin(hints[name]) is dict and value:
            group, meaning = _group(typing.get_args(hints[name])[1]), comments(cls).get(name, "")
            for key, entry in value.items():
                if group is not None and _is_group(entry):
                    found += settings_of(group, entry, None, f"{path}{name}.{key}.")
                else:
                    found.append(Setting(f"{path}{name}.{key}", entry, None, meaning, cls))
        else:
            found.append(Setting(path + name, value, default[name], comments(cls).get(name, ""), cls))
    return found


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line in the source: what a setting means, and its unit."""
    found: dict[str, str] = {}
    for part in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        name = ""
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(part)).readline):
            if token.type == tokenize.NAME and token.line.startswith(f"    {token.string}: "):
                name = token.string if token.start[1] == 4 else name
            elif token.type == tokenize.NEWLINE:
                name = ""
            elif token.type == tokenize.COMMENT and name:
                found[name] = token.string.lstrip("# ")
    return found


def unread_settings(settings: Any, path: str = "") -> dict[str, str]:
    """Keys (of settings or of whole groups) that have no effect under the values of others, and why.

    A settings dataclass says so itself, in a method `unread_settings() -> dict[str, str]` about its own keys.
    """
    found = {path + key: reason for key, reason in getattr(settings, "unread_settings", dict)().items()}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= unread_settings(value, f"{path}{field.name}.")
    return found


def check_at_least(least: int, settings: Any, *names: str, group: str = "") -> None:
    """Raises ValueError where one of the named settings is below `least`; `group` goes before its name ("loss.")."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{group}{name} is {getattr(settings, name)}; it must be at least {least}")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds dataclass `cls` from a mapping (a ConfigDict is one), nested dataclasses included.

    Integers are taken for floats and lists for tuples; nothing else is converted. An optional group whose keys without
    default are all None or "" is None.

    Raises:
      ValueError: a key that `cls` does not have, a key without default that is missing, or a value of another type; the
        message names the key by its full path.
    """
    _check_known(cls, values, path)
    hints = typing.get_type_hints(cls)
    for name in _required(cls):
        if values.get(name) is None and type(None) not in typing.get_args(hints[name]):
            raise ValueError(f"{path}.{name} is missing and has no default; set it in the config")
    arguments = {key: _convert(hints[key], values[key], f"{path}.{key}") for key in values}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_known(cls: type, values: Mapping[str, Any], path: str) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in values if key not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean {path}.{near[0]}?" if near else f"; it has {', '.join(sorted(names))}"
        raise ValueError(f"{path}.{unknown[0]} is not a setting{hint}")


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
        if not _is_group(value):
            raise ValueError(f"{path} is {value!r}; expected a group of settings")
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {value!r}; expected a tuple")
        (item, *_) = typing.get_args(hint)
        return tuple(_convert(item, entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not _is_group(value):
            raise ValueError(f"{path} is {value!r}; expected a group of settings")
        return {key: _convert(typing.get_args(hint)[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}); expected {hint.__name__}")
    return value


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    if type(None) in typing.get_args(hint) and (value is None or _is_left_out(_group(hint), value, path)):
        return None
    errors = []
    for option in value_types(hint):
        try:
            return _convert(option, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _is_left_out(group: type | None, value: Any, path: str) -> bool:
    """Whether an optional group has none of the keys that it must have.

    Raises:
      ValueError: it has none of them, but others were changed.
    """
    if group is None or not _is_group(value):
        return False
    required = _required(group)
    if any(value.get(name) not in (None, "") for name in required):
        return False
    if all(value.get(name) is None for name in required):
        changed = [setting.key for setting in settings_of(group, value) if setting.value != setting.default]
        if changed:
            raise ValueError(
                f"{path}.{changed[0]} is set, but not {path}.{required[0]}, without which there is no {path}; set both"
            )
    return True
