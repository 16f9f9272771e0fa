"""Many runs of the trainer, each a process of its own: side by side, killed anywhere, continued where they were."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtd_jax.base.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ROOT / "launch" / "train.py"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run: a task, a method and a seed, and the overrides of the base config that make them."""

    task: str
    method: str
    seed: int
    overrides: tuple[str, ...]  # "loss.alpha=0.7"
    workdir: Path

    @property
    def name(self) -> str:
        return f"{self.task} {self.method} seed {self.seed}"

    @property
    def report(self) -> Path:
        return self.workdir / "report.json"

    @property
    def log(self) -> Path:
        return self.workdir / "log.txt"

    def command(self, base: Path) -> list[str]:
        flags = [f"--config.{override}" for override in self.overrides]
        return [sys.executable, str(TRAIN), f"--config={base}", f"--workdir={self.workdir}", *flags]


@dataclass(frozen=True)
class Preparation:
    """Something that is made once for many runs."""

    name: str
    command: tuple[str, ...]  # a script, from the repository's root, and its flags
    folder: Path  # where it puts what it makes

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")


def prepare_once(preparations: Sequence[Preparation], note: Callable[[str], None]) -> None:
    """Makes what is not made yet, one after the other, each with all cores.

    Raises:
      ValueError: one was made by another command, its script does not exist, or it failed; names its log.
    """
    for this in preparations:
        if this.record.exists():
            if read_json(this.record) != list(this.command):
                raise ValueError(
                    f"{this.folder} was made by another command ({this.record} differs); give the study another "
                    "--workdir, or delete that folder and its .json"
                )
            continue
        if not (ROOT / this.command[0]).is_file():
            raise ValueError(f"prepare.{this.name}: there is no script {this.command[0]} in {ROOT}")
        this.folder.parent.mkdir(parents=True, exist_ok=True)
        note(f"preparing {this.name}: {' '.join(this.command)}")
        started = time.monotonic()
        with this.log.open("a") as log:
            done = subprocess.run(
                [sys.executable, *this.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        if done.returncode:
            last = this.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ValueError(
                f"preparing {this.name} failed ({' '.join(last)[:300]}): its log is {this.log}. Run the same command "
                "again to continue"
            )
        write_json(this.record, list(this.command))
        note(f"prepared {this.name} in {time.monotonic() - started:.0f} s")


def run_jobs(jobs: Sequence[Job], base: Path, parallel: int, note: Callable[[str], None], compiled: Path) -> None:
    """Runs what is not finished, `parallel` at a time, each on its own share of the cores.

    A job that was begun is continued by the trainer itself; one whose report is there is not run again. Programs
    compiled by one are kept in the folder `compiled` for the others: methods under other seeds are the same programs.

    Raises:
      ValueError: a workdir holds a run with other settings (before anything starts), or jobs failed (after all others
        ran), with the place of their logs.
    """
    claim_jobs(jobs, base)
    waiting = [job for job in jobs if not job.report.exists()]
    note(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished; {parallel} at a time")
    shares = _core_shares(parallel)
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    failed: list[Job] = []
    started, done = time.monotonic(), 0
    total = len(waiting)
    asked_to_stop = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the `finally`
    try:
        while waiting or running:
            for slot in range(parallel):
                if slot not in running and waiting:
                    job = waiting.pop(0)
                    running[slot] = (job, _start(job, base, shares[slot], compiled), time.monotonic())
            time.sleep(POLL_SECONDS)
            for slot, (job, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                done += 1
                ok = process.returncode == 0 and job.report.exists()
                if not ok:
                    failed.append(job)
                left = (time.monotonic() - started) / done * (total - done)
                outcome = _headline(job) if ok else f"FAILED, see {job.log}"
                note(
                    f"[{done}/{total}] {job.name}: {outcome}, {time.monotonic() - since:.0f} s; ETA {left / 60:.0f} min"
                )
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, asked_to_stop)
    if failed:
        raise ValueError(
            f"{len(failed)} of {total} runs failed, first {failed[0].name}: its log is {failed[0].log}. The others are "
            "finished; run the same command again to repeat the failed ones"
        )


def claim_jobs(jobs: Sequence[Job], base: Path) -> None:
    """Notes in each job's workdir what it is.

    Raises:
      ValueError: a workdir was begun as something else.
    """
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    for job in jobs:
        path = job.workdir / "job.json"
        mine = {"base_sha256": digest, "overrides": list(job.overrides)}
        if not path.exists():
            job.workdir.mkdir(parents=True, exist_ok=True)
            write_json(path, mine)
        elif read_json(path) != mine:
            raise ValueError(
                f"{job.workdir} was begun with other settings ({path} differs: the base config's text or the "
                "overrides); give the study another --workdir, or delete that run"
            )


def _start(job: Job, base: Path, cores: set[int], compiled: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited; set in the child it would come after its first threads
    try:
        with job.log.open("a") as log:
            return subprocess.Popen(
                job.command(base),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=TRAIN.parents[1],
                env=environment,
            )
    finally:
        os.sched_setaffinity(0, everything)


def _core_shares(parallel: int) -> list[set[int]]:
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= parallel <= len(cores):
        raise ValueError(f"parallel is {parallel}, but there are {len(cores)} cores; use 1 to {len(cores)}")
    return [set(cores[slot::parallel]) for slot in range(parallel)]


def _headline(job: Job) -> str:
    accuracy = read_json(job.report)["student"]["chain_accuracy"]["all"]
    return f"chain accuracy {100 * accuracy['mean']:.1f}%"
