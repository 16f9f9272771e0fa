"""The runs of a study as values, and which of them one process makes: a run by itself, or an ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtd_jax.base.files import read_json

SEEDS = "seeds.json"  # in the folder of an ensemble: those of its members


@dataclass(frozen=True)
class Job:
    """One run: a task, a method and a seed, and the overrides of the base config that make them."""

    task: str
    method: str
    seed: int
    overrides: tuple[str, ...]  # "loss.alpha=0.7"; of `compress` its flags
    workdir: Path
    after: Path | None = None  # folder of the run whose student it begins with
    kind: Literal["train", "compress"] = "train"  # command of `python -m rtd_jax`

    @property
    def name(self) -> str:
        return f"{self.task} {self.method} seed {self.seed}"

    @property
    def report(self) -> Path:
        return self.workdir / "report.json"


@dataclass(frozen=True)
class Group:
    """The runs of one process: a run by itself, or an ensemble."""

    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        first = self.jobs[0]
        seeds = ", ".join(str(job.seed) for job in self.jobs)
        return first.name if len(self.jobs) == 1 else f"{first.task} {first.method} seeds {seeds}"

    @property
    def folder(self) -> Path:
        """Where the process has its log: the run's own folder, or that of the ensemble."""
        return self.jobs[0].workdir if len(self.jobs) == 1 else ensemble_folder(self.jobs[0])

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def command(self, base: Path) -> list[str]:
        """The command of `python -m rtd_jax` that trains or continues the runs."""
        first = self.jobs[0]
        if first.kind == "compress":
            places = (f"out={first.workdir / 'student'}", f"report={first.workdir}")
            return ["compress", *(f"--{flag}" for flag in (*first.overrides, *places))]
        overrides = [f"--config.{override}" for override in first.overrides]
        if len(self.jobs) == 1:
            return ["train", f"--config={base}", f"--workdir={first.workdir}", *overrides]
        shared = [override for override in overrides if not override.startswith("--config.seed=")]
        seeds = ",".join(str(job.seed) for job in self.jobs)
        flags = [f"--config={base}", f"--workdir={first.workdir.parent}", *shared, f"--config.seeds=({seeds})"]
        return ["ensemble", *flags]


@dataclass(frozen=True)
class Preparation:
    """Something that is made once for many runs."""

    name: str
    command: tuple[str, ...]  # a command of `python -m rtd_jax` and its flags
    folder: Path  # where the command puts what it makes; a record and a log stand beside it

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")


def ensemble_folder(first: Job) -> Path:
    """The folder of the ensemble whose first member this is."""
    return first.workdir.parent / f"ensemble_{first.seed}"


def check_begun(jobs: Sequence[Job]) -> None:
    """Raises ValueError where a run begins with one that is neither finished nor among the runs."""
    folders = {job.workdir for job in jobs}
    for job in jobs:
        if not (job.report.exists() or is_ready(Group((job,))) or job.after in folders):
            raise ValueError(
                f"{job.name} begins with the student of {job.after}, which is not finished and not among the runs; add "
                "its method to --config.only (or to the task's methods)"
            )


def groups_of(jobs: Sequence[Job], ensemble: int) -> list[Group]:
    """The jobs that are not finished, by process, in the order of their first ones.

    A run that was begun by itself goes on by itself, and an ensemble that was begun goes on with the same members.

    Args:
      ensemble: most runs of an ensemble; 0 and 1 make none.
    """
    groups: list[Group] = []
    taken: set[Job] = set()
    for job in jobs:
        if job in taken or job.report.exists():
            continue
        chosen: tuple[Job, ...] = (job,)
        if ensemble > 1 and job.after is None and not _is_begun(job):  # an ensemble begins with one student
            alike = [other for other in jobs if (other.task, other.method) == (job.task, job.method)]
            begun = _begun_ensembles(alike)
            free = [other for other in alike if not (other.report.exists() or _is_begun(other) or other in taken)]
            new = [other for other in free if not any(other in members for members in begun)][:ensemble]
            chosen = next((members for members in begun if job in members), tuple(new))
        taken |= set(chosen)
        groups.append(Group(chosen))
    return groups


def is_ready(group: Group) -> bool:
    """Whether the runs that the group's begin with are finished."""
    return all(job.after is None or (job.after / "report.json").exists() for job in group.jobs)


def log_before(job: Job) -> Path:
    """The log of the run that another begins with."""
    return (job.after or job.workdir) / "log.txt"


def _is_begun(job: Job) -> bool:
    """Whether a process of its own has trained this run for a while."""
    return (job.workdir / "checkpoints").exists()


def _begun_ensembles(alike: Sequence[Job]) -> list[tuple[Job, ...]]:
    """The members of each ensemble of these jobs that was trained for a while."""
    by_seed = {job.seed: job for job in alike}
    found = []
    for job in alike:
        folder = ensemble_folder(job)
        if (folder / "checkpoints").exists() and (folder / SEEDS).exists():
            seeds = read_json(folder / SEEDS, f"delete {folder}")
            if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
                raise ValueError(f"{folder / SEEDS} is not what a study writes, a list of seeds; delete {folder}")
            if set(seeds) <= by_seed.keys():
                found.append(tuple(by_seed[seed] for seed in seeds))
    return found
