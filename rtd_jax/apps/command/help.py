"""What a command says of itself and of its settings: --help, --print_config, and overrides without effect."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from rtd_jax.apps.command.table import Command
from rtd_jax.base.settings import settings_of, unread_settings

OVERRIDES = """\
Every setting of the config can be overridden:

  --config.loss.alpha=0.5           numbers and texts
  --config.curriculum.depths=(1,2)  tuples (in quotes, where the shell wants them)
  --noconfig.curriculum.enabled     switches, or --config.curriculum.enabled=False

Where one is given twice, the last one holds.

--config=FILE --print_config shows all keys with value, origin and meaning."""


def help_text(command: Command, program: str, defined: Sequence[flags.Flag]) -> str:
    """The text of --help: what the command does, its flags, how settings are overridden, and an example."""
    lines = [command.about, "", f"usage: {program} [FLAGS]", ""]
    width = max(len(flag.name) for flag in defined)
    for flag in defined:
        default = "" if flag.default in (None, "", [], False) else f"; default {flag.default_as_str}"
        lines.append(f"  --{flag.name:<{width}}  {flag.help}{default}")
    if command.recipe:
        lines += ["", *OVERRIDES.splitlines()]
    lines += ["", f"example: {program} {command.example}", ""]
    kept = "Training finishes its update and saves first; a second signal ends it at once. " if command.saves else ""
    again = "the same command, run again, continues" if command.resumes else "nothing is left half-written"
    lines += textwrap.wrap(
        f"exit status: {'; '.join(filter(None, ('0', command.statuses)))}; 2 after an error of its settings or files; "
        "128 + the signal's number where one ends it "
        f"(Ctrl-C 130, SIGTERM 143, SIGHUP 129). {kept}In any case {again}.",
        width=100,
    )
    return "\n".join(lines)


def config_text(settings: type, values: flags.FlagValues) -> str:
    """Every key of the config as an aligned table: its value, the value's origin, and its meaning with the unit."""
    overrides = config_flags.get_override_values(values["config"])
    rows = [("key", "value", "origin", "meaning")]
    for setting in settings_of(settings, values["config"].value or {}):
        is_overridden = any(f"{setting.key}.".startswith(f"{key}.") for key in overrides)
        origin = "command line" if is_overridden else "recipe" if setting.value != setting.default else "default"
        rows.append((setting.key, repr(setting.value), origin, setting.meaning))
    widths = [max(len(row[0]) for row in rows), min(40, max(len(row[1]) for row in rows)), len("command line")]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def unread_overrides(recipe: Any, overrides: Mapping[str, Any]) -> list[str]:
    """A line for each override of a setting that has no effect under the other settings."""
    unread = unread_settings(recipe)
    return [
        f"--config.{key}={value} is not read: {reason}"
        for key, value in overrides.items()
        for prefix, reason in unread.items()
        if f"{key}.".startswith(f"{prefix}.")
    ]
