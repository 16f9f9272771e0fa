"""What every entry point does: parse flags, build the settings, run, and say what went wrong in one line."""

import logging as python_logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

# From a clone that was not installed, `python launch/train.py` finds the package beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenisation is done before the loop; no forks are harmed

from absl import app, flags, logging
from ml_collections import config_flags

from rtd_jax.base.settings import build

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; JAX finds the cluster (SLURM, TPU pods, Open MPI, Kubernetes)."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find the cluster.")
PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many processes there are.")
PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which of them this is, from 0.")

T = TypeVar("T")
CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/rtd_tiny.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default runs/<config>.")
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def run(settings: type[T], main: Callable[[T, Path], object]) -> None:
    """Builds `settings` from --config and calls `main(settings, workdir)`.

    A ValueError or OSError is what a user can mend: its message is printed without traceback; the exit status is 2.
    """

    def parse(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.DEBUG if DEBUG.value else logging.WARNING)  # orbax narrates every file it writes
        if not DEBUG.value:  # a failed save or restore is reported once, below, not for each array
            python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL + 1)
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are given as --config.key=value")
        if CONFIG.value is None:
            raise app.UsageError("--config is missing; try --config=configs/rtd_tiny.py")
        try:
            recipe = build(settings, CONFIG.value.to_dict())
            _join_cluster()
            main(recipe, _workdir())
        except (ValueError, OSError) as error:
            if DEBUG.value:
                raise
            _refuse(str(error))

    app.run(parse, flags_parser=_parse_flags)


def _refuse(reason: str) -> NoReturn:
    """Exits with the reason on a line of its own, the last one: threads of a failed save complain on."""
    with os.fdopen(os.dup(2), "w") as stderr, open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        stderr.write(f"\nerror: {reason}\n")
    sys.exit(2)


def _join_cluster() -> None:
    """Connects to the other processes, if there are any; afterwards jax.devices() are those of all of them.

    Raises:
      ValueError: flags that do not fit together, or a cluster that cannot be joined.
    """
    given = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if None in given and any(value is not None for value in given):
        raise ValueError("--coordinator=host:port, --processes and --process are given together or not at all")
    if not DISTRIBUTED.value and COORDINATOR.value is None:
        return
    import jax  # it is slow to import, and flags are refused before

    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"could not join the other processes: {str(error).splitlines()[0]}. Give --coordinator=<host of process "
            "0>:<port>, --processes=<number> and --process=<index> on every host, and see that the port is reachable"
        ) from error


def _parse_flags(argv: list[str]) -> list[str]:
    """Flags by absl; an override of a key that the config does not have is one line, with the near name."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError, TypeError) as error:
        # ml_collections puts "Did you mean .." behind the key; str() of a KeyError quotes it all, line break included.
        reason = str(error).replace("\\n", ". ").replace("\\'", "").strip("'")
        _refuse(f"a --config override names what the config does not have: {reason}")


def _workdir() -> Path:
    config = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0])
    return Path(WORKDIR.value or f"runs/{config.stem}").expanduser()
