"""The study: every method under every seed on every task, and the report of what came out."""

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rtd_jax.apps.report.sections import write_sections
from rtd_jax.apps.study.report import markdown, study_report
from rtd_jax.apps.study.runner import Job, Preparation, claim_jobs, prepare_once, run_jobs
from rtd_jax.apps.study.statistics import Outcome, read_outcome
from rtd_jax.base.files import check_writable, replacing, write_json

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class StudyRecipe:
    """Which runs are made. Methods and tasks are overrides of one base config, written as on the command line.

    `prepare` names what is made once, before the runs, and shared by them: a script of launch/ and its flags. Where
    overrides or other preparations write `{name}`, the folder of that preparation is put; only those that are asked for
    in this way are made.
    """

    base: str  # config file of every run
    tasks: dict[str, Overrides]  # overrides of `base` that make a task, by its name
    methods: dict[str, Overrides]  # overrides of `base` that make a method, by its name
    seeds: tuple[int, ...]  # of params and data order; the same for every method
    baseline: str = "kd"  # what differences are taken to
    parallel: int = 1  # runs side by side on equal shares of the cores; 0 makes none: the report of those there are
    deep: int = 4  # steps from which a problem counts as deep in the summary
    report: str = ""  # where the report is written besides <workdir>/study.md; "" nowhere
    prepare: dict[str, Overrides] = field(default_factory=dict)  # {"cache": ("launch/cache_teacher.py", "--config=..")}
    only: tuple[str, ...] = ()  # methods that are run; () runs all
    task_methods: dict[str, Overrides] = field(default_factory=dict)  # methods of a task that has not all of them
    about: dict[str, str] = field(default_factory=dict)  # what a task is, in words, for the report
    smaller_than: dict[str, str] = field(default_factory=dict)  # {task of a smaller student: of the larger}

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline is {self.baseline!r}; it must be one of the methods {', '.join(self.methods)}")
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        chosen = {"only": self.only} | {f"task_methods.{task}": names for task, names in self.task_methods.items()}
        for key, names in chosen.items():
            unknown = [name for name in names if name not in self.methods]
            if unknown:
                raise ValueError(f"{key} names {unknown[0]!r}; the methods are {', '.join(self.methods)}")
        named = {
            "task_methods": (*self.task_methods,),
            "about": (*self.about,),
            "smaller_than": (*self.smaller_than, *self.smaller_than.values()),
        }
        for key, tasks in named.items():
            unknown = [task for task in tasks if task not in self.tasks]
            if unknown:
                raise ValueError(f"{key} names the task {unknown[0]!r}; the tasks are {', '.join(self.tasks)}")
        for name, command in self.prepare.items():
            if not command:
                raise ValueError(f"prepare.{name} is empty; give a script of launch/ and its flags")

    def jobs(self, workdir: Path) -> list[Job]:
        """Seed by seed, so that a study that is not finished compares all methods on the seeds it has."""
        return [
            Job(
                task,
                method,
                seed,
                self._filled((*self.tasks[task], *self.methods[method], f"seed={seed}"), workdir),
                workdir.absolute() / "runs" / task / method / f"seed_{seed}",
            )
            for seed in self.seeds
            for task, method in self._pairs()
        ]

    def preparations(self, workdir: Path) -> list[Preparation]:
        """What the runs ask for, each after what it asks for itself.

        Raises:
          ValueError: preparations ask for one another in a circle.
        """
        asked = {
            name: {other for other in self.prepare if other != name and any(f"{{{other}}}" in x for x in command)}
            for name, command in self.prepare.items()
        }
        texts = [text for task, method in self._pairs() for text in (*self.tasks[task], *self.methods[method])]
        needed = {name for name in self.prepare if any(f"{{{name}}}" in text for text in texts)}
        while more := set().union(*(asked[name] for name in needed)) - needed:
            needed |= more
        ordered: list[str] = []
        while len(ordered) < len(needed):
            ready = [name for name in self.prepare if name in needed - set(ordered) and asked[name] <= set(ordered)]
            if not ready:
                raise ValueError(f"the preparations {', '.join(sorted(needed - set(ordered)))} ask for one another")
            ordered += ready
        return [
            Preparation(name, self._filled(self.prepare[name], workdir), _prepared(workdir) / name) for name in ordered
        ]

    def _pairs(self) -> list[tuple[str, str]]:
        """(task, method) of the runs; tasks that have every method come first: the others are compared with them."""
        tasks = sorted(self.tasks, key=lambda task: task in self.task_methods)
        return [
            (task, method)
            for task in tasks
            for method in self.task_methods.get(task, tuple(self.methods))
            if not self.only or method in self.only
        ]

    def _filled(self, texts: Overrides, workdir: Path) -> Overrides:
        """With the folders of preparations in place of their names."""
        for name in self.prepare:
            texts = tuple(text.replace(f"{{{name}}}", str(_prepared(workdir) / name)) for text in texts)
        return texts


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _prepared(workdir: Path) -> Path:
    return workdir.absolute() / "prepared"


def study(recipe: StudyRecipe, workdir: Path) -> Path:
    """Makes the runs that are missing, then writes study.json, study.md and report.html in `workdir`.

    Returns study.md's path.

    Raises:
      ValueError: the base config does not exist, nothing is there to report on, or what `prepare_once` and `run_jobs`
        raise.
    """
    base = Path(recipe.base).absolute()
    if not base.is_file():
        raise ValueError(
            f"base config {recipe.base} does not exist; run from the repository's root, or give a full path"
        )
    check_writable(workdir)
    note: Callable[[str], None] = partial(print, flush=True)
    jobs = recipe.jobs(workdir)
    if not recipe.parallel:
        there = [job for job in jobs if job.report.exists()]
        if not there:
            raise ValueError(f"parallel is 0: only a report of finished runs, but {workdir} has none; use 1 or more")
        claim_jobs(there, base)
    try:
        if recipe.parallel and not all(job.report.exists() for job in jobs):
            prepare_once(recipe.preparations(workdir), note)
        if recipe.parallel:
            run_jobs(jobs, base, recipe.parallel, note, _prepared(workdir) / "compiled")
    finally:
        finished = [job for job in jobs if job.report.exists()]
        if finished:
            outcomes = [read_outcome(j.task, j.method, j.seed, j.workdir) for j in finished]
            path = _write_report(recipe, outcomes, len(jobs), workdir)
            note(f"report over {len(finished)} of {len(jobs)} runs: {path}, {workdir / 'report.html'}")
    return path


def _write_report(recipe: StudyRecipe, outcomes: list[Outcome], planned: int, workdir: Path) -> Path:
    report = study_report(
        recipe.baseline, recipe.deep, list(recipe.methods), outcomes, recipe.about, recipe.smaller_than
    )
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    report.intro += (
        f"{len(outcomes)} of {planned} runs are finished: {hours:.1f} hours of training, on {os.cpu_count()} cores of "
        f"{_processor()} with Python {platform.python_version()}, {datetime.date.today()}. A method with one "
        "seed decides nothing.",
    )
    write_json(workdir / "study.json", report.numbers)
    text = markdown(report)
    for path in (workdir / "study.md", *([Path(recipe.report)] if recipe.report else [])):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_sections(workdir, report.title, report.intro, report.sections, report.pictures)
    return workdir / "study.md"
