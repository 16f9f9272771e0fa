"""Many training runs, side by side in processes, and continued where they stopped when killed.

A process trains one run, or an ensemble: runs that differ in their seed alone, as one program.

Every process is `python -m rtd_jax <command>` of the package that this module belongs to, installed or not, started in
the current working directory: relative paths of configs and data mean the same to it as to the study.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from rtd_jax.apps.study.jobs import (
    SEEDS,
    Group,
    Job,
    Preparation,
    check_begun,
    groups_of,
    is_ready,
    log_before,
)
from rtd_jax.base import signals
from rtd_jax.base.files import read_json, read_object, write_json
from rtd_jax.base.lock import owner
from rtd_jax.train.ensemble import NO_ENSEMBLE

PROGRAM = (sys.executable, "-m", "rtd_jax")
POLL_SECONDS = 0.5
PATIENCE = 60.0  # seconds for what a killed study left running
# SHA-256 of the text that a base config had before configs were built from the settings' defaults. It gave the same
# settings, so runs that were begun with it are continued.
EARLIER_TEXTS = {
    "rtd_tiny.py": "39c315e0aa400fc21450c58e848d5277812db9edddd3634619ab16304bfcceec",
    "rtd_8b.py": "0fed16486aba485e1b522bb903088435a24d79a9de8ae3a46d8d2982f34566c2",
}


def prepare_once(preparations: Sequence[Preparation]) -> None:
    """Makes what is not made yet, one after the other, each with all cores.

    Raises:
      ValueError: a preparation was made by another command, or it failed; names its log.
    """
    for preparation in preparations:
        command, log = _without_script(preparation.command), preparation.folder.with_suffix(".log")
        if preparation.record.exists():
            before = read_json(preparation.record)
            if not isinstance(before, list) or not before or not all(isinstance(x, str) for x in before):
                raise ValueError(
                    f"{preparation.record} is not what a study writes, a list of texts; delete it and "
                    f"{preparation.folder}, and run again"
                )
            if _without_script(before) != command:
                raise ValueError(
                    f"{preparation.folder} was made by another command ({preparation.record} differs); give the study "
                    "another --workdir, or delete that folder and its .json"
                )
            continue
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {preparation.name}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        _wait_for([preparation.folder])
        process = _start(command, log, _environment())
        try:
            process.wait()
        finally:
            _stop([process])
        if process.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ValueError(
                f"preparing {preparation.name} {_ended(process)} ({' '.join(last)[:300]}): its log is {log}. Run the "
                "same command again to continue"
            )
        write_json(preparation.record, command)
        print(f"prepared {preparation.name} in {time.monotonic() - started:.0f} s", flush=True)


def run_jobs(jobs: Sequence[Job], base: Path, parallel: int, compiled: Path, ensemble: int = 0) -> None:
    """Runs the jobs that are not finished, in `parallel` processes at a time, each on its own share of the cores.

    With `ensemble`, up to so many runs of one method and task are trained by one process, as one program. Where a
    method cannot be trained so, which a line says, each of its runs has a process of its own.

    A job that was begun is continued by the trainer itself; one that has a report is not run again. Programs that one
    job compiled are kept in the folder `compiled` for the others: a method is the same program under every seed.

    Raises:
      ValueError: a workdir holds a run with other settings (before anything starts), or jobs failed (after all others
        ran), with the place of their logs.
    """
    with signals.stoppable():
        _run_jobs(jobs, base, parallel, compiled, ensemble)


def _run_jobs(jobs: Sequence[Job], base: Path, parallel: int, compiled: Path, ensemble: int) -> None:
    claim_jobs(jobs, base)
    check_begun(jobs)
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= parallel <= len(cores):
        raise ValueError(f"parallel is {parallel}, but there are {len(cores)} cores; use 1 to {len(cores)}")
    waiting = groups_of(jobs, ensemble)
    total = left = sum(not job.report.exists() for job in jobs)
    print(f"{len(jobs)} runs, {len(jobs) - total} of them finished; {parallel} at a time", flush=True)
    running: dict[int, tuple[Group, subprocess.Popen, float]] = {}  # by share of the cores
    failed: list[tuple[Job, Path, str]] = []  # their logs, and how they ended
    _wait_for([job.workdir for job in jobs if not job.report.exists()])
    started = time.monotonic()
    try:
        while waiting or running:
            for share in range(parallel):
                ready = next((group for group in waiting if is_ready(group)), None)
                if share not in running and ready is not None:
                    group = ready
                    waiting.remove(group)
                    process = _start_group(group, base, set(cores[share::parallel]), compiled)
                    running[share] = (group, process, time.monotonic())
            if waiting and not running:  # what is left begins with students that there are not
                lost = [job for group in waiting for job in group.jobs]
                failed += [(job, log_before(job), "begins with a run that is not finished") for job in lost]
                break
            time.sleep(POLL_SECONDS)
            for share, (group, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[share]
                _stop([process])  # it has ended: this closes its pipe
                if process.returncode == NO_ENSEMBLE and len(group.jobs) > 1:
                    waiting[:0] = [Group((job,)) for job in group.jobs if not job.report.exists()]
                    print(f"{group.name}: a process each. {_last_line(group.log)}", flush=True)
                    continue
                left = _jobs_left(waiting, running)
                lost = [job for job in group.jobs if not job.report.exists()]
                if process.returncode != 0 or lost:
                    failed += [(job, group.log, _ended(process)) for job in lost or group.jobs]
                    outcome = f"{_ended(process).upper()}, see {group.log}"
                else:
                    outcome = _chain_accuracy(group)
                now, done = time.monotonic(), total - left
                eta = (now - started) / done * left / 60
                print(f"[{done}/{total}] {group.name}: {outcome}, {now - since:.0f} s; ETA {eta:.0f} min", flush=True)
    finally:
        _stop([process for _, process, _ in running.values()])
    if failed:
        job, log, how = failed[0]
        raise ValueError(
            f"{len(failed)} of {total} runs failed, first {job.name}: its log is {log} (it {how}). The others are "
            "finished; run the same command again to repeat the failed ones"
        )


def _jobs_left(waiting: Sequence[Group], running: Mapping[int, tuple[Group, subprocess.Popen, float]]) -> int:
    """How many runs are not finished."""
    groups = [*waiting, *(group for group, *_ in running.values())]
    return sum(not job.report.exists() for group in groups for job in group.jobs)


def _last_line(log: Path) -> str:
    """The last line of a log, without the mark of an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return " ".join(lines).removeprefix("error: ")


def _chain_accuracy(group: Group) -> str:
    """What the runs' reports say, in words; whether they are whole is checked where all of them are read."""
    means = []
    for job in group.jobs:
        try:
            means.append(float(read_object(job.report)["student"]["chain_accuracy"]["all"]["mean"]))
        except (ValueError, KeyError, TypeError):
            return f"its report cannot be read, see {job.report}"
    return f"chain accuracy {100 * sum(means) / len(means):.1f}%"


def claim_jobs(jobs: Sequence[Job], base: Path) -> None:
    """Writes into each job's workdir what it is.

    Raises:
      ValueError: a workdir was begun as something else.
    """
    digest, earlier = hashlib.sha256(base.read_bytes()).hexdigest(), EARLIER_TEXTS.get(base.name)
    for job in jobs:
        path = job.workdir / "job.json"
        identity = {"base_sha256": digest, "overrides": list(job.overrides)}
        if not path.exists():
            job.workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, identity)
        elif read_json(path) not in (identity, identity | {"base_sha256": earlier}):
            raise ValueError(
                f"{job.workdir} was begun with other settings ({path} differs: the base config's text or the "
                "overrides); give the study another --workdir, or delete that run"
            )


def _without_script(command: Sequence[str]) -> list[str]:
    """The command with "traces" in place of "launch/traces.py", as configs and records of earlier versions have it."""
    name, *flags = command
    path = PurePosixPath(name)
    return [path.stem if path.parent.name == "launch" else name, *flags]


def _environment() -> dict[str, str]:
    """The environment of this process; from a clone that is not installed, jobs find the package by PYTHONPATH."""
    environment = dict(os.environ)
    clone = Path(__file__).resolve().parents[3]
    if (clone / "pyproject.toml").is_file():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(clone), environment.get("PYTHONPATH"))))
    return environment


def _start_group(group: Group, base: Path, cores: set[int], compiled: Path) -> subprocess.Popen:
    group.folder.mkdir(parents=True, exist_ok=True)
    if len(group.jobs) > 1:
        write_json(group.folder / SEEDS, [job.seed for job in group.jobs])
    environment = _environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the child inherits it; set in the child it would come after its first threads
    try:
        return _start(group.command(base), group.log, environment)
    finally:
        os.sched_setaffinity(0, all_cores)


def _start(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Starts a command of `python -m rtd_jax` that stops when this process is gone, however that ended."""
    with log.open("a") as file:
        return subprocess.Popen(
            [*PROGRAM, *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {signals.STOPS_WITH_PARENT: "1"},
        )


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Asks those that run to stop, and waits for them; training saves first."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _ended(process: subprocess.Popen) -> str:
    """How a process ended that did not end well: "failed", or "was stopped by SIGTERM"."""
    status = process.returncode
    number = -status if status < 0 else status - 128
    return f"was stopped by {signal.Signals(number).name}" if number in set(signal.Signals) else "failed"


def _wait_for(folders: Sequence[Path]) -> None:
    """Gives processes of a study that was killed the time to stop; one that goes on is refused by the next in it."""
    deadline = time.monotonic() + PATIENCE
    while (busy := next(filter(owner, folders), None)) and time.monotonic() < deadline:
        print(f"waiting for {owner(busy) or 'a process'} to leave {busy}", flush=True)
        time.sleep(2 * POLL_SECONDS)
