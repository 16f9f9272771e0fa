"""Settings are frozen dataclasses; a config is a ConfigDict that is made from them and read back into them.

Each component owns its settings dataclass. `defaults` makes the ConfigDict with every setting of one, so every setting
is a key that a config file and the command line can change; `build` makes the dataclass from it again. A misspelt,
missing or unused key is an error that names the most similar one. A pure function never sees a ConfigDict.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

T = TypeVar("T")


def defaults(cls: type, values: Mapping[str, Any] | None = None, path: str = "config") -> ConfigDict:
    """A ConfigDict with every setting of dataclass `cls`, at its value in `values` or at its default.

    A setting without default is None until it is given, and has its type from the start. An optional group (type
    `Settings | None`) has all its keys too; `build` makes it None unless its keys without default are given. The
    ConfigDict is locked, so that a misspelt key is an error where it is written; groups of type dict stay open.

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
            config[name].unlock()  # which unlocks the groups in it, too
            for group in (value for value in config[name].values() if isinstance(value, ConfigDict)):
                group.lock()
    return config


def _entry(hint: Any, value: Any, path: str) -> Any:
    """`value` as ml_collections keeps it, so that overrides of the setting's type are accepted and others refused."""
    group = _group(hint)
    value = vars(value) if dataclasses.is_dataclass(value) else value
    if group is not None and (_is_group(value) or (value is None and len(value_types(hint)) == 1)):
        return defaults(group, value, path)
    if typing.get_origin(hint) is dict and (value is None or _is_group(value)):
        item = typing.get_args(hint)[1]
        return ConfigDict({key: _entry(item, entry, f"{path}.{key}") for key, entry in (value or {}).items()})
    kind = _kind(hint)
    if value is None:
        return placeholder(kind)
    if kind is object:
        return FieldReference(value, field_type=object)
    if kind is float and type(value) is int:
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
    """The type whose parser reads a setting on the command line; the parser of object accepts any literal."""
    option, *others = value_types(hint)
    if others:
        return object
    if typing.get_origin(option) is typing.Literal:
        return type(typing.get_args(option)[0])
    return typing.get_origin(option) or option


class Setting(NamedTuple):
    """A key of a config with its value."""

    key: str  # "loss.alpha"
    value: Any
    default: Any  # None where there is none
    meaning: str  # with its unit: the comment on the setting's line
    group: type  # dataclass that has it


def settings_of(cls: type, values: Mapping[str, Any], default: Mapping | None = None, path: str = "") -> list[Setting]:
    """Lists every setting of dataclass `cls` with its value in `values`, in the order of the dataclass.

    `default` holds the defaults where they are not those of `cls`: a group has others as a part of other settings.
    """
    settings: list[Setting] = []
    default, hints = defaults(cls).to_dict() if default is None else default, typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        hint, value, meaning = hints[name], values.get(name, default[name]), comments(cls).get(name, "")
        entries = [(hint, name, value, default[name])]
        if typing.get_origin(hint) is dict and value:
            item = typing.get_args(hint)[1]
            entries = [(item, f"{name}.{key}", entry, None) for key, entry in value.items()]
        for entry_hint, key, entry, entry_default in entries:
            group = _group(entry_hint)
            if group is not None and _is_group(entry):
                settings += settings_of(group, entry, entry_default, f"{path}{key}.")
            else:
                settings.append(Setting(path + key, entry, entry_default, meaning, cls))
    return settings


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's source, by field: what a setting means, and its unit."""
    # A field's source is its line, and below it what is indented further or closes its brackets.
    field = re.compile(r"^    (\w+): .*(?:\n(?: {5,}|    [)\]}]).*)*  # (.*)$", re.MULTILINE)
    parts = [part for part in reversed(cls.__mro__) if dataclasses.is_dataclass(part)]
    return {name: comment for part in parts for name, comment in field.findall(inspect.getsource(part))}


def unread_settings(settings: Any, path: str = "") -> dict[str, str]:
    """Keys (of settings or of whole groups) that have no effect under the values of others, with the reason.

    A settings dataclass may name its own in a method `unread_settings() -> dict[str, str]`.
    """
    unread = {path + key: reason for key, reason in getattr(settings, "unread_settings", dict)().items()}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            unread |= unread_settings(value, f"{path}{field.name}.")
    return unread


class SettingError(ValueError):
    """A setting that cannot be used. The message begins with its name, before which `build` puts the path."""


SEED = "[0, 2147483647]"  # that JAX's, NumPy's and Python's generators all take
LAYER = "[-1000, 1000]"  # of a model; from the end where negative


def check_ranges(settings: Any, **intervals: str) -> None:
    """Checks numbers, and the entries of tuples, against intervals such as "[1, 1e6]", "(0, 1]" and "[0, inf)".

    None is not checked. Upper limits of counts lie far beyond what is useful; they catch slips that would fill the
    memory or never end.

    Raises:
      SettingError: a number is outside; with the interval in words, and the comment on the setting's line for its unit.
    """
    for name, interval in intervals.items():
        value = getattr(settings, name)
        entries = {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for key, number in entries.items():
            if isinstance(number, int | float) and not _is_inside(number, interval):
                raise SettingError(f"{key} is {number}; expected {_in_words(interval)}{_meaning(settings, name)}")


def check_filled(settings: Any, *names: str) -> None:
    """Raises SettingError where a text or a tuple is empty."""
    for name in names:
        if not getattr(settings, name):
            raise SettingError(f"{name} is empty; expected a value{_meaning(settings, name)}")


def check_distinct(settings: Any, *names: str) -> None:
    """Raises SettingError where a tuple has a value twice."""
    for name in names:
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise SettingError(f"{name} is {values}; expected each value once")


def _meaning(settings: Any, name: str) -> str:
    """What a setting means, with its unit, to be put behind a message: " (optimizer updates)"."""
    cls: type = type(settings)
    meaning = comments(cls).get(name, "")
    return f" ({meaning})" if meaning else ""


def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(", ")
    return float(low), float(high)


def _is_inside(number: float, interval: str) -> bool:
    low, high = _bounds(interval)
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    return above and below  # neither is true of NaN


def _in_words(interval: str) -> str:
    low, high = (f"{bound:,.10g}" for bound in _bounds(interval))
    if interval[0] == "[" and interval[-1] == "]":
        return f"{low} to {high}"
    begin = f"above {low}" if interval[0] == "(" else f"at least {low}"
    end = f"below {high}" if interval[-1] == ")" else f"at most {high}"
    return begin if high == "inf" else f"{begin} and {end}"


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds dataclass `cls` from a mapping or ConfigDict, nested dataclasses included.

    Integers are accepted for floats and lists for tuples; nothing else is converted. Floats are finite. An optional
    group is None if its keys without default are all None or "".

    Raises:
      ValueError: a key that `cls` does not have, a key without default that is missing, or a value of another type; the
        message names the key by its full path.
    """
    _check_known(cls, values, path)
    hints = typing.get_type_hints(cls)
    for name in _required(cls):
        if values.get(name) is None and type(None) not in typing.get_args(hints[name]):
            raise ValueError(f"{path}.{name} is missing and has no default; set it in the config")
    arguments = {key: _convert(hints[key], values[key], _below(path, key)) for key in values}
    try:
        return cls(**arguments)
    except SettingError as error:
        raise SettingError(_below(path, str(error))) from error
    except ValueError as error:
        first_word = re.match(r"\w*", str(error))
        begins_with_key = first_word is not None and first_word[0] in hints
        raise ValueError(_below(path, str(error)) if begins_with_key else f"{path}: {error}") from error


def _below(path: str, key: str) -> str:
    """A key of a group as people write it: "config.loss.alpha", and the flag "--limit"."""
    return f"{path}{key}" if path == "--" else f"{path}.{key}"


def _check_known(cls: type, values: Mapping[str, Any], path: str) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"it has {', '.join(sorted(names))}"
            raise ValueError(f"{path}.{key} is not a setting; {hint}")


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as a setting of type `hint`; ValueError where it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path} is {value!r}; expected one of {', '.join(map(repr, arguments))}{suggestion}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {value!r}; expected a tuple")
        return tuple(_convert(arguments[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(hint) or origin is dict:
        if not _is_group(value):
            raise ValueError(f"{path} is {value!r}; expected a group of settings")
        if origin is dict:
            return {key: _convert(arguments[1], entry, f"{path}.{key}") for key, entry in value.items()}
        return build(typing.cast(type, hint), value, path)
    if hint is float and type(value) in (int, float):
        if not abs(value) < math.inf or abs(value) > 1e308:
            raise ValueError(f"{path} is {value}; expected a finite number")
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
      ValueError: it has none of them, but others are not at their defaults.
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
