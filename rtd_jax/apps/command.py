"""The commands: `python -m rtd_jax train --config=...`, or `python launch/train.py --config=...` from a clone.

This module does what every command needs: it reads the flags, builds the settings, runs the command, and reports an
error in one line. Settings and main functions are imported when they are needed, because importing jax is slow.
"""

import dataclasses
import importlib
import io
import logging as python_logging
import os
import re
import runpy
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenised before the loop, in one process

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rtd_jax.base import signals
from rtd_jax.base.settings import build, check_ranges, comments, defaults, settings_of, unread_settings, value_types


@dataclass(frozen=True)
class Command:
    """One thing that a user starts. Settings and functions are named as "module:name"."""

    about: str
    main: str  # called with the recipe and the work directory; with the recipe and `flags`; or with `flags` alone
    recipe: str = ""  # settings that --config gives
    flags: str = ""  # settings that are flags themselves, one for each field
    example: str = ""  # flags of an example
    reads_all: bool = True  # whether it reads the whole recipe, so that overrides without effect are warned of
    resumes: bool = False  # whether the same command, run again, goes on where it was stopped
    saves: bool = False  # whether a signal has it save what it has


@dataclass(frozen=True)
class RunFlags:
    """The flags that every command with a recipe has beside --config."""

    print_config: bool = False  # Show every key with its value, origin and meaning, and end.
    workdir: str | None = None  # Folder of what the run writes; default runs/<config>.
    distributed: bool = False  # One of several processes; JAX finds the others (SLURM, TPU pods, Open MPI, Kubernetes).
    coordinator: str | None = None  # host:port of process 0, where JAX cannot find the cluster.
    processes: int | None = None  # With --coordinator: how many processes there are.
    process: int | None = None  # With --coordinator: which of them this is, from 0.

    def __post_init__(self) -> None:
        check_ranges(self, processes="[1, 1e6]", process="[0, 1e6]")


COMMANDS = {
    "train": Command(
        "Distills a student. Run it again to resume.",
        "rtd_jax.apps.distill.run:train",
        recipe="rtd_jax.train.recipe:Recipe",
        example="--config=configs/rtd_tiny.py --workdir=runs/no_coherence --config.loss.coherence_weight=0.0",
        resumes=True,
        saves=True,
    ),
    "pretrain": Command(
        "Trains a tiny Llama from scratch. Run it again to resume.",
        "rtd_jax.apps.pretrain:pretrain",
        recipe="rtd_jax.apps.pretrain:PretrainRecipe",
        example="--config=configs/pretrain_tiny.py --config.optimizer.learning_rate=1e-3",
        resumes=True,
        saves=True,
    ),
    "cache_teacher": Command(
        "Runs the teacher once over a recipe's chains and keeps its outputs, from which `train` then learns without "
        "loading the teacher. Run it again to continue.",
        "rtd_jax.apps.cache:cache_teacher",
        recipe="rtd_jax.train.recipe:Recipe",
        example="--config=configs/rtd_tiny.py --config.teacher.cache=runs/cache",
        reads_all=False,
        resumes=True,
    ),
    "traces": Command(
        "Has a teacher write chains of thought and keeps those whose answer is right. Run it again to continue.",
        "rtd_jax.apps.traces.traces:write_traces",
        recipe="rtd_jax.apps.traces.traces:TracesRecipe",
        example="--config=configs/traces_llama3_70b.py --config.openai.base_url=http://gpu-host:8000/v1",
        resumes=True,
    ),
    "boundaries": Command(
        "Fits a step-boundary classifier to a teacher and measures it: precision, recall and F1 against baselines.",
        "rtd_jax.apps.boundaries:boundaries",
        recipe="rtd_jax.apps.boundaries:BoundaryRecipe",
        example="--config=configs/boundaries_smollm2.py --config.train.location=/data/gsm8k",
    ),
    "segment": Command(
        "Cuts texts into reasoning steps: any JSONL of texts in, stepwise JSONL (`prompt`, `completions`) out.",
        "rtd_jax.apps.segment:segment",
        flags="rtd_jax.apps.segment:SegmentSettings",
        example="--teacher=MODEL --classifier=runs/boundaries_smollm2/classifier --data=texts.jsonl",
    ),
    "evaluate": Command(
        "Measures chain, step and answer accuracy by reasoning depth, of any Llama or of texts made elsewhere.",
        "rtd_jax.apps.evaluate:evaluate",
        flags="rtd_jax.apps.evaluate:EvaluateSettings",
        example="--model=runs/rtd_tiny,rtd_jax/bundled/tiny_teacher --tasks=synthetic --limit=120",
    ),
    "diagnose": Command(
        "Does a student lose its teacher's trajectory, and is that why it fails?",
        "rtd_jax.apps.diagnose.diagnose:diagnose",
        flags="rtd_jax.apps.diagnose.diagnose:DiagnoseSettings",
        example="--teacher=rtd_jax/bundled/tiny_teacher --student=runs/rtd_tiny --data=synthetic",
    ),
    "reward_model": Command(
        "Trains a process reward model on labelled steps.",
        "rtd_jax.apps.reward_model:train_reward_model",
        recipe="rtd_jax.apps.reward_model:RewardModelRecipe",
        example="--config=configs/reward_tiny.py --config.hidden=0",
    ),
    "plan": Command(
        "Says what a recipe needs on hardware that is not here. Nothing is allocated; the real compilers are asked.",
        "rtd_jax.apps.plan.plan:show_plan",
        recipe="rtd_jax.train.recipe:Recipe",
        flags="rtd_jax.apps.plan.plan:PlanSettings",
        example="--config=configs/rtd_8b.py --target=a100-80gb:8 --config.micro_batches=2",
        reads_all=False,
    ),
    "study": Command(
        "Compares methods over seeds. Run it again to continue.",
        "rtd_jax.apps.study.study:study",
        recipe="rtd_jax.apps.study.recipe:StudyRecipe",
        example="--config=configs/study_tiny.py:smoke --config.parallel=1",
        resumes=True,
    ),
}


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
        _refuse(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")


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
            _refuse(str(error))

    app.run(run_parsed, argv=argv, flags_parser=lambda arguments: _parse_flags(arguments, values))


def _run(command: Command, values: flags.FlagValues) -> None:
    own = read_flags(_import(command.flags), values) if command.flags else None
    if not command.recipe:
        _import(command.main)(own)
        return
    settings, run_flags = _import(command.recipe), read_flags(RunFlags, values)
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
    _import(command.main)(recipe, own if command.flags else workdir)


def define_flags(command: Command, argv: list[str], values: flags.FlagValues) -> list[str]:
    """Defines the flags of a command: --config and RunFlags for a recipe, and one for each field of `command.flags`.

    Returns their names.
    """
    if command.flags:
        _import(command.flags)  # what it imports defines flags too, which are not the command's
    before = set(values)
    if command.recipe:
        config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/rtd_tiny.py.", values, sys_argv=argv)
        values["config"].parser = _ConfigFile(command.recipe)
        _let_last_tuple_hold(values)
        _define_fields(RunFlags, values)
    if command.flags:
        _define_fields(_import(command.flags), values)
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
            return defaults(_import(self._recipe), values)
        except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            raise flags.Error(f"{path}: {_one_line(error)}") from error


def _parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses flags by absl; a flag or a key of the config that does not exist is refused in one line."""
    try:
        return values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError) as error:
        if "--debug" in argv:
            raise
        if isinstance(error, flags.Error):
            _refuse(f"{_one_line(error)} (--help shows all flags)")
        _refuse(f"a --config override names what the config does not have: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """An error's message in one line; ml_collections quotes its own twice and appends a group's keys and values."""
    text = str(error).replace("\\n", " ").replace("\n", " ").replace("\\'", "'")
    text = text.strip("'") if isinstance(error, KeyError | AttributeError) else text
    return re.sub(r' Other fields present: "{.*}"', "", text)


def _refuse(reason: str) -> NoReturn:
    """Exits with the reason as the last line. Later output is dropped: threads of a failed save still print."""
    with os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        stderr.write(f"\nerror: {reason}\n")
    sys.exit(2)


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


def _import(place: str) -> Any:
    """Imports what "module:name" stands for."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


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
        "exit status: 0; 2 after an error of its settings or files; 128 + the signal's number where one ends it "
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
