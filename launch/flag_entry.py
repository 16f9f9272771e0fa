"""Entry points whose settings are flags, not a recipe: one flag for each field of a settings dataclass."""

import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import entry  # puts the package on the path
from absl import app, flags, logging

from rtd_jax.base.settings import build

T = TypeVar("T")


def define(settings: type) -> None:
    """A flag for each field, with its default, and the comment beside it as its help."""
    hints = typing.get_type_hints(settings)
    comments = field_comments(settings)
    for field in dataclasses.fields(settings):
        default = None if field.default is dataclasses.MISSING else field.default
        hint = hints[field.name]
        text = comments.get(field.name, "")
        if typing.get_origin(hint) is typing.Literal:
            text += f" (one of {', '.join(map(str, typing.get_args(hint)))})"
        if typing.get_origin(hint) is tuple:
            flags.DEFINE_list(field.name, list(default or ()), text)
        elif hint is bool:
            flags.DEFINE_bool(field.name, bool(default), text)
        elif hint in (int, float):
            (flags.DEFINE_integer if hint is int else flags.DEFINE_float)(field.name, default, text)
        else:
            assert not isinstance(hint, types.UnionType), field.name
            flags.DEFINE_string(field.name, default, text)
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[field.name])  # --help shows these


def field_comments(settings: type) -> dict[str, str]:
    """The comment at the end of each field's line in the source: what a field means is written once."""
    comments: dict[str, str] = {}
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(settings)).readline):
        if token.type == tokenize.NAME and token.line.startswith(f"    {token.string}: "):
            name = token.string if token.start[1] == 4 else name
        elif token.type == tokenize.NEWLINE:
            name = ""
        elif token.type == tokenize.COMMENT and name:
            comments[name] = token.string.lstrip("# ")
    return comments


def values_of(settings: type) -> dict[str, Any]:
    """What the flags say, with the numbers of a list as numbers; None where a flag without default was not given.

    Raises:
      ValueError: a list flag has something in it that is no number.
    """
    hints = typing.get_type_hints(settings)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = flags.FLAGS[field.name].value
        if typing.get_origin(hints[field.name]) is tuple and typing.get_args(hints[field.name])[0] is int:
            try:
                value = [int(item) for item in value or ()]
            except ValueError as error:
                raise ValueError(f"--{field.name} is {value!r}; expected whole numbers with commas between") from error
        values[field.name] = value
    return values


def run(settings: type[T], main: Callable[[T], object]) -> None:
    """Builds `settings` from the flags and calls `main`; what a user can mend is one line, and exit status 2."""
    define(settings)

    def parse(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are given as --key=value")
        logging.set_verbosity(logging.DEBUG if entry.DEBUG.value else logging.WARNING)  # orbax narrates what it reads
        missing = [field.name for field in dataclasses.fields(settings) if flags.FLAGS[field.name].value is None]  # type: ignore[arg-type]
        if missing:
            raise app.UsageError(f"--{missing[0]} is missing")
        try:
            values = values_of(settings)
            main(build(settings, values, "--"))
        except (ValueError, OSError) as error:
            if entry.DEBUG.value:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(parse)
