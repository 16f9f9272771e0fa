"""Stops real commands at random moments, starts them again, and compares what they leave with an undisturbed run's.

    python tests/kills.py                                  # 5 of each signal for each command; about half an hour
    python tests/kills.py --count=25 --only=train          # 25 of each signal
    python tests/kills.py --signals=SIGKILL --seed=3

A process gets the signal at a moment between its start and the time that the undisturbed process took: while it loads,
updates, saves, ends a stage, exports or evaluates. A process that a request to stop (SIGTERM, SIGINT, SIGHUP) ends must
print one line and no traceback, and exit with 128 + the signal's number. The same command is then run to its end. What
it leaves has to be what the undisturbed process left: every byte of weights, shards, scores and replies, and of reports
and metrics everything but times. No other files may be left, and no child process.

The command exits with status 1 if one case fails. docs/reliability.md has the table of a long run.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
    import conftest  # noqa: F401  (the compilation cache, before processes are started)

from tiny_run import recipe, write_teacher

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "rtd_jax/bundled/tiny_teacher"
TIMES = ("perf/", "seconds", "wall_seconds", "train_seconds", "created", "started")  # keys, or their beginnings
SECONDS = 600  # for one process
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that is stopped: its flags, given the folder that it writes into."""

    name: str
    flags: Callable[[Path], Sequence[str]]
    kept: Callable[[Path], bool] = lambda path: True  # files (relative paths) that have to be the same


def cases(root: Path) -> list[Case]:
    """The commands that take long enough to be stopped, on tiny models."""
    settings = dataclasses.asdict(recipe(write_teacher(root / "teacher")))
    config = _config_file(root / "tiny_config.py", settings)
    traces = ("--config.problems.limit=24", "--config.problems.depths=(1,2)", "--config.jax.batch_size=8")
    study = _study_file(root / "tiny_study.py", config)
    own = ("on_policy.fraction=0.5", "on_policy.updates_per_refresh=2", "on_policy.max_new_tokens=24")
    exact = ("cache.predictions=float32", "cache.states=float32", "cache.chains_per_shard=16")
    return [
        Case("train", lambda out: ["train", f"--config={config}", f"--workdir={out}"], _is_result),
        Case(
            "train_on_policy",
            lambda out: ["train", f"--config={config}", f"--workdir={out}", *(f"--config.{x}" for x in own)],
            _is_result,
        ),
        Case(
            "cache_teacher",
            lambda out: [
                "cache_teacher",
                f"--config={config}",
                f"--workdir={out}",
                f"--config.teacher.cache={out}/cache",
                *(f"--config.{setting}" for setting in exact),
            ],
        ),
        Case("traces", lambda out: ["traces", "--config=configs/traces_tiny.py", f"--workdir={out}", *traces]),
        Case("study", lambda out: ["study", f"--config={study}", f"--workdir={out}"], _is_result),
        Case(
            "evaluate",
            lambda out: ["evaluate", f"--model={BUNDLED}", "--tasks=synthetic", "--limit=12", f"--out={out}"],
        ),
    ]


def _is_result(path: Path) -> bool:
    """Checkpoints, event files and logs hold times, and pages, pictures and study.md show them."""
    parts = set(path.parts)
    return not parts & {"checkpoints", "tensorboard", "compiled"} and path.suffix not in (
        ".html",
        ".png",
        ".txt",
        ".md",
    )


def _config_file(path: Path, settings: dict[str, Any]) -> Path:
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    path.write_text(text)
    return path


def _study_file(path: Path, base: Path) -> Path:
    settings = {
        "base": str(base),
        "tasks": {"tiny": ()},
        "methods": {
            "kd": {"overrides": ("loss.alignment_weight=0.0", "loss.coherence_weight=0.0"), "role": "baseline"}
        },
        "seeds": (0, 1),
        "parallel": 2,
    }
    return _config_file(path, settings)


def environment() -> dict[str, str]:
    flags = "--xla_force_host_platform_device_count=1"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def start(case: Case, out: Path) -> subprocess.Popen:
    """Starts a case's command in a process group of its own, as a shell does."""
    command = [sys.executable, "-m", "rtd_jax", *case.flags(out)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for name in SIGNALS[1:]:  # what is ignored here, as under `nohup`, would be ignored there too
        if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN:
            signal.signal(signal.Signals[name], signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **streams)


def finish(case: Case, out: Path) -> float:
    """Runs a case's command to its end. Returns the seconds that it took."""
    started = time.monotonic()
    process = start(case, out)
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, f"{case.name} ended with {process.returncode}: {text[-2000:]}"
    return time.monotonic() - started


def contents(out: Path, kept: Callable[[Path], bool]) -> dict[str, Any]:
    """What a command left, by relative path: JSON without times, everything else as bytes."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        place = path.relative_to(out)
        if path.is_dir() or not kept(place) or path.name == ".lock":
            continue
        if path.suffix == ".json":
            found[str(place)] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            rows = [timeless(json.loads(line)) for line in path.read_text().split("\n") if line]
            # Replies arrive in any order; lines of the metrics have theirs.
            found[str(place)] = sorted(rows, key=str) if place.name == "responses.jsonl" else rows
        else:
            found[str(place)] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith(TIMES)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def children(group: int) -> list[int]:
    """Processes that are still in a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def stop_and_go_on(case: Case, out: Path, number: signal.Signals, after: float, whole: dict[str, Any]) -> str:
    """Stops a command after some seconds, runs it to its end, and compares. Returns what is wrong, or ""."""
    process = start(case, out)
    try:
        text, _ = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        try:
            text, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "the process did not end"
        wrong = _check_end(process, number, text)
        if wrong:
            return wrong
    deadline = time.monotonic() + 20
    while left := children(process.pid):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            return f"processes {left} were left"
        time.sleep(0.1)
    finish(case, out)
    found = contents(out, case.kept)
    other = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    return f"{', '.join(other)} differ" if other else ""


def _check_end(process: subprocess.Popen, number: signal.Signals, text: str) -> str:
    if number == signal.SIGKILL or process.returncode == 0:  # it had ended when the signal came
        return ""
    if "Traceback" in text:
        return f"a traceback: {text[-600:]}"
    # Before Python runs, and after it has ended, the system's own handling holds.
    expected = (128 + number, -number)
    return "" if process.returncode in expected else f"exit status {process.returncode}: {text[-600:]}"


def run(root: Path, count: int, seed: int, only: Sequence[str], signals: Sequence[str]) -> dict[tuple[str, str], list]:
    """What was wrong in each case, by command and signal."""
    found: dict[tuple[str, str], list] = {}
    for case in cases(root):
        if only and case.name not in only:
            continue
        finish(case, root / "warm")  # compiles its programs
        shutil.rmtree(root / "warm")
        seconds = finish(case, root / f"{case.name}-whole")
        whole = contents(root / f"{case.name}-whole", case.kept)
        rng = random.Random(f"{seed} {case.name}")
        for name in signals:
            for turn in range(count):
                after, out = rng.uniform(0, seconds), root / f"{case.name}-{name}-{turn}"
                # Where the files are is part of what some of them say.
                place = root / f"{case.name}-whole"
                shutil.rmtree(place)
                wrong = stop_and_go_on(case, place, signal.Signals[name], after, whole)
                if wrong:
                    shutil.copytree(place, out)
                found.setdefault((case.name, name), []).append(wrong)
                print(f"{case.name} {name} after {after:.1f} of {seconds:.1f} s: {wrong or 'same'}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5, help="of each signal for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands, with commas between")
    parser.add_argument("--signals", default=",".join(SIGNALS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        only = [name for name in arguments.only.split(",") if name]
        found = run(Path(folder), arguments.count, arguments.seed, only, arguments.signals.split(","))
    print(
        "\n| | " + " | ".join(arguments.signals.split(",")) + " |\n|---|" + "--:|" * len(arguments.signals.split(","))
    )
    for command in dict.fromkeys(command for command, _ in found):
        cells = [found[command, name] for name in arguments.signals.split(",")]
        print(f"| {command} | " + " | ".join(f"{cell.count('')} of {len(cell)}" for cell in cells) + " |")
    return 1 if any(wrong for cell in found.values() for wrong in cell) else 0


if __name__ == "__main__":
    sys.exit(main())
