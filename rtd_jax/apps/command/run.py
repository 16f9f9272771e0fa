"""The commands: `python -m rtd_jax train --config=...`, or `python launch/train.py --config=...` from a clone.

This module does what every command needs: it reads the flags, builds the settings, runs the command, and reports an
error in one line. Settings and main functions are imported when they are needed, because importing jax is slow.
"""

import io
import logging as python_logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenised before the loop, in one process

from absl import app, flags, logging
from ml_collections import config_flags

from rtd_jax.apps.command.help import config_text, help_text, unread_overrides
from rtd_jax.apps.command.parse import define_flags, parse_flags, read_flags, refuse
from rtd_jax.apps.command.table import COMMANDS, Command, RunFlags, imported
from rtd_jax.base import signals
from rtd_jax.base.settings import build
from rtd_jax.base.simulated_devices import give_threads


def main(argv: Sequence[str]) -> None:
    """Runs `argv[1]` with the flags after it; without a command, or with an unknown one, lists the commands."""
    name = argv[1] if len(argv) > 1 else ""
    if name in COMMANDS:
        run(name, [f"python -m rtd_jax {name}", *argv[2:]])
        return
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {known:<{width}}  {command.about}" for known, command in COMMANDS.items())
    print(f"usage: python -m rtd_jax COMMAND [FLAGS]\n\n{listed}\n\nCOMMAND --help shows a command's flags.")
    if name not in ("", "help", "--help", "-h"):
        refuse(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command with its flags, by default those of this process, and ends the process.

    A ValueError or OSError is a mistake that the user can correct: its message is printed without a traceback, and the
    exit status is 2. A signal that stops it gives a line too, and 128 + its number (see `rtd_jax.base.signals`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may have bytes that are no text, and terminals other alphabets
            stream.reconfigure(errors="backslashreplace")
    with signals.stoppable():
        try:
            _run_with_flags(name, list(sys.argv if argv is None else argv))
        except signals.Stopped as stop:
            stop.note = stop.note or f"; the same command {'continues' if COMMANDS[name].resumes else 'starts again'}"
            raise


def _run_with_flags(name: str, argv: list[str]) -> None:
    give_threads()
    command, values = COMMANDS[name], flags.FLAGS
    defined = define_flags(command, argv, values)
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(help_text(command, argv[0], [values[flag] for flag in defined]))
        sys.exit(0)

    def run_parsed(arguments: Sequence[str]) -> None:
        debug = values["debug"].value
        logging.set_verbosity(logging.DEBUG if debug else logging.WARNING)  # orbax logs every file it writes
        if not debug:  # a failed save or restore is reported once, below, and not for each array
            python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL + 1)
        try:
            if len(arguments) > 1:
                form = "--config.key=value" if command.recipe else "--key=value"
                raise ValueError(f"unexpected argument {arguments[1]!r}; settings are given as {form}")
            _run(command, values)
        except (ValueError, OSError) as error:
            if debug:
                raise
            refuse(str(error))

    app.run(run_parsed, argv=argv, flags_parser=lambda arguments: parse_flags(arguments, values))


def _run(command: Command, values: flags.FlagValues) -> None:
    own = read_flags(imported(command.flags), values) if command.flags else None
    if not command.recipe:
        imported(command.main)(own)
        return
    settings, run_flags = imported(command.recipe), read_flags(RunFlags, values)
    if values["config"].value is None:
        raise ValueError("--config is missing; try --config=configs/rtd_tiny.py, or --help")
    if run_flags.print_config:
        print(config_text(settings, values))
        return
    recipe = build(settings, values["config"].value.to_dict())
    _join_cluster(run_flags)
    if command.reads_all and not run_flags.process:
        for line in unread_overrides(recipe, config_flags.get_override_values(values["config"])):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    config_file = Path(config_flags.get_config_filename(values["config"]).split(":")[0])
    workdir = Path(run_flags.workdir or f"runs/{config_file.stem}").expanduser()
    imported(command.main)(recipe, own if command.flags else workdir)


def _join_cluster(run_flags: RunFlags) -> None:
    """Connects to the other processes, if there are any; afterwards jax.devices() are those of all of them.

    Raises:
      ValueError: flags that do not fit together, or a cluster that cannot be joined.
    """
    given: Any = (run_flags.coordinator, run_flags.processes, run_flags.process)
    if None in given and any(value is not None for value in given):
        raise ValueError("--coordinator=host:port, --processes and --process are given together or not at all")
    if not run_flags.distributed and given[0] is None:
        return
    import jax  # slow to import

    try:
        jax.distributed.initialize(*given)
        signals.install()  # JAX takes SIGTERM for a note to itself, which would leave the process running
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"could not join the other processes: {str(error).splitlines()[0]}. Give --coordinator=<host of process "
            "0>:<port>, --processes=<number> and --process=<index> on every host, and see that the port is reachable"
        ) from error
