"""The flags of a command: defined from its settings, parsed by absl, and read back as settings."""

import dataclasses
import os
import re
import runpy
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from rtd_jax.apps.command.table import Command, RunFlags, imported
from rtd_jax.base.settings import build, comments, defaults, value_types


def define_flags(command: Command, argv: list[str], values: flags.FlagValues) -> list[str]:
    """Defines the flags of a command: --config and RunFlags for a recipe, and one for each field of `command.flags`.

    Returns their names.
    """
    if command.flags:
        imported(command.flags)  # what it imports defines flags too, which are not the command's
    before = set(values)
    if command.recipe:
        config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/rtd_tiny.py.", values, sys_argv=argv)
        values["config"].parser = _ConfigFile(command.recipe)
        _let_last_tuple_hold(values)
        _define_fields(RunFlags, values)
    if command.flags:
        _define_fields(imported(command.flags), values)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
    return [name for name in values if name not in before]


def _let_last_tuple_hold(values: flags.FlagValues) -> None:
    """Of a tuple that is given twice the last one holds, as of every other setting; absl would join the two.

    The flags of a config's settings are defined when --config is read, which stands before them.
    """
    config: Any = values["config"]
    read_config = config.parse

    def parse_config(argument: str) -> None:
        if config.present:
            raise flags.Error(f"--config is given twice, {config.config_filename} and {argument}; give one of them")
        read_config(argument)
        for name in values:
            if name.startswith("config.") and isinstance(values[name], flags.MultiFlag):
                _parse_alone(values[name])

    config.parse = parse_config


def _parse_alone(flag: Any) -> None:
    """Has a flag that could be repeated forget what it was given before."""
    parse = flag.parse

    def parse_last(argument: Any) -> None:
        flag.present = 0
        parse(argument)

    flag.parse = parse_last


def _define_fields(settings: type, values: flags.FlagValues) -> None:
    """Defines a flag for each field, with its default, and the comment beside it as its help."""
    hints, meanings = typing.get_type_hints(settings), comments(settings)
    define: Any = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_list,
    }
    for field in dataclasses.fields(settings):
        default = None if field.default is dataclasses.MISSING else field.default
        hint = value_types(hints[field.name])[0]
        kind, text = typing.get_origin(hint) or hint, meanings.get(field.name, "")
        if kind is typing.Literal:
            text += f" (one of {', '.join(map(str, typing.get_args(hint)))})"
        default = list(default or ()) if kind is tuple else default
        define.get(kind, flags.DEFINE_string)(field.name, default, text, flag_values=values)


def read_flags(settings: type, values: flags.FlagValues) -> Any:
    """Builds `settings` from its flags.

    Raises:
      ValueError: a flag without default is missing, a list of numbers has something else, or the settings refuse a
        value.
    """
    hints = typing.get_type_hints(settings)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = values[field.name].value
        if value is None and field.default is dataclasses.MISSING:
            raise ValueError(f"--{field.name} is missing; --help shows all flags")
        if typing.get_origin(hints[field.name]) is tuple and typing.get_args(hints[field.name])[0] is int:
            try:
                value = [int(item) for item in value or ()]
            except ValueError as error:
                raise ValueError(f"--{field.name} is {value!r}; expected whole numbers with commas between") from error
        given[field.name] = value
    return build(settings, given, "--")


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file, `path` or `path:argument`, as the ConfigDict of a recipe with all its settings."""

    def __init__(self, recipe: str):
        self._recipe = recipe

    def parse(self, path: str) -> ConfigDict:
        file, colon, argument = path.partition(":")
        if not Path(file).is_file():
            raise flags.Error(f"--config: there is no file {file}; give a config file such as configs/rtd_tiny.py")
        try:
            values = runpy.run_path(file)["get_config"](*([argument] if colon else []))
            return defaults(imported(self._recipe), values)
        except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            raise flags.Error(f"{path}: {_one_line(error)}") from error


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses flags by absl; a flag or a key of the config that does not exist is refused in one line."""
    try:
        return values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError) as error:
        if "--debug" in argv:
            raise
        if isinstance(error, flags.Error):
            refuse(f"{_one_line(error)} (--help shows all flags)")
        refuse(f"a --config override names what the config does not have: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """An error's message in one line; ml_collections quotes its own twice and appends a group's keys and values."""
    text = str(error).replace("\\n", " ").replace("\n", " ").replace("\\'", "'")
    text = text.strip("'") if isinstance(error, KeyError | AttributeError) else text
    return re.sub(r' Other fields present: "{.*}"', "", text)


def refuse(reason: str) -> NoReturn:
    """Exits with the reason as the last line. Later output is dropped: threads of a failed save still print."""
    with os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        stderr.write(f"\nerror: {reason}\n")
    sys.exit(2)
