"""Entry points whose settings are flags, not a recipe: one flag for each field of a settings dataclass."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import entry  # puts the package on the path
from absl import app, flags, logging

from rtd_jax.settings import build

T = TypeVar("T")


def define(settings: type) -> None:
    """A flag for each field, with its default."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        default = None if field.default is dataclasses.MISSING else field.default
        hint = hints[field.name]
        text = f"see {settings.__name__}"
        if typing.get_origin(hint) is tuple:
            flags.DEFINE_list(field.name, list(default or ()), text)
        elif hint is bool:
            flags.DEFINE_bool(field.name, bool(default), text)
        elif hint in (int, float):
            (flags.DEFINE_integer if hint is int else flags.DEFINE_float)(field.name, default, text)
        else:
            assert not isinstance(hint, types.UnionType), field.name
            flags.DEFINE_string(field.name, default, text)


def run(settings: type[T], main: Callable[[T], object]) -> None:
    """Builds `settings` from the flags and calls `main`; what a user can mend is one line, and exit status 2."""
    define(settings)

    def parse(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are given as --key=value")
        values: dict[str, Any] = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
        logging.set_verbosity(logging.DEBUG if entry.DEBUG.value else logging.WARNING)  # orbax narrates what it reads
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise app.UsageError(f"--{missing[0]} is missing")
        try:
            main(build(settings, values, "--"))
        except (ValueError, OSError) as error:
            if entry.DEBUG.value:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(parse)
