"""The study: every method under every seed on every task, and the report of what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rtd_jax.common.files import check_writable, replacing, write_json
from rtd_jax.study.report import markdown
from rtd_jax.study.runner import Job, run_jobs
from rtd_jax.study.statistics import Outcome, read_outcome

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class StudyRecipe:
    """Which runs are made. Methods and tasks are overrides of one base config, written as on the command line."""

    base: str  # config file of every run
    tasks: dict[str, Overrides]
    methods: dict[str, Overrides]
    seeds: tuple[int, ...]  # of params and data order; the same for every method
    baseline: str = "kd"  # what differences are taken to
    parallel: int = 1  # runs side by side; the cores are shared equally
    deep: int = 4  # steps from which a problem counts as deep in the summary
    report: str = ""  # where the report is written besides <workdir>/study.md; "" nowhere

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline is {self.baseline!r}; it must be one of the methods {', '.join(self.methods)}")
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")

    def jobs(self, workdir: Path) -> list[Job]:
        """Seed by seed, so that a study that is not finished compares all methods on the seeds it has."""
        return [
            Job(
                task,
                method,
                seed,
                (*self.tasks[task], *self.methods[method], f"seed={seed}"),
                workdir.absolute() / "runs" / task / method / f"seed_{seed}",
            )
            for seed in self.seeds
            for task in self.tasks
            for method in self.methods
        ]


def study(recipe: StudyRecipe, workdir: Path) -> Path:
    """Makes the runs that are missing, then writes study.json and study.md in `workdir`. Returns study.md's path.

    Raises:
      ValueError: the base config does not exist, or what `run_jobs` raises.
    """
    base = Path(recipe.base).absolute()
    if not base.is_file():
        raise ValueError(
            f"base config {recipe.base} does not exist; run from the repository's root, or give a full path"
        )
    check_writable(workdir)
    note: Callable[[str], None] = partial(print, flush=True)
    jobs = recipe.jobs(workdir)
    try:
        run_jobs(jobs, base, recipe.parallel, note)
    finally:
        finished = [job for job in jobs if job.report.exists()]
        if finished:
            path = _write_report(recipe, [read_outcome(j.task, j.method, j.seed, j.workdir) for j in finished], workdir)
            note(f"report over {len(finished)} of {len(jobs)} runs: {path}")
    return path


def _write_report(recipe: StudyRecipe, outcomes: list[Outcome], workdir: Path) -> Path:
    text, numbers = markdown(recipe.baseline, recipe.deep, list(recipe.methods), outcomes)
    write_json(workdir / "study.json", numbers)
    for path in (workdir / "study.md", *([Path(recipe.report)] if recipe.report else [])):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return workdir / "study.md"
