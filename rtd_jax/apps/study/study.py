"""A study: every method under every seed on every task, and a report of the results."""

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from rtd_jax.apps.report.sections import write_sections
from rtd_jax.apps.study.finished import read_outcome
from rtd_jax.apps.study.jobs import Job
from rtd_jax.apps.study.recipe import StudyRecipe, prepared_folder
from rtd_jax.apps.study.report import markdown, study_report
from rtd_jax.apps.study.runner import claim_jobs, prepare_once, run_jobs
from rtd_jax.apps.study.statistics import Outcome
from rtd_jax.base.files import check_writable, finite_report, replacing, write_json
from rtd_jax.base.lock import locked
from rtd_jax.base.signals import stoppable


def study(recipe: StudyRecipe, workdir: Path) -> Path:
    """Makes the runs that are missing, then writes study.json, study.md and report.html into `workdir`.

    Returns study.md's path.

    Raises:
      ValueError: the base config does not exist, there is nothing to report on, or what `prepare_once` and `run_jobs`
        raise.
    """
    base = Path(recipe.base).absolute()
    if not base.is_file():
        raise ValueError(
            f"base config {recipe.base} does not exist; run from the folder that has it, or give a full path"
        )
    if recipe.report:
        check_writable(Path(recipe.report).absolute().parent, "--config.report")
        if Path(recipe.report).is_dir():
            raise ValueError(f"report is {recipe.report!r}, which is a folder; give the name of a file")
    jobs = recipe.jobs(workdir)
    if recipe.parallel:
        with locked(workdir), stoppable():
            _make_runs(recipe, jobs, base, workdir)
        return workdir / "study.md"
    check_writable(workdir)  # a look at the runs of a study that is at work elsewhere is harmless
    finished = [job for job in jobs if job.report.exists()]
    if not finished:
        raise ValueError(f"parallel is 0: only a report of finished runs, but {workdir} has none; use 1 or more")
    claim_jobs(finished, base)
    _write_report(recipe, jobs, workdir)
    return workdir / "study.md"


def _make_runs(recipe: StudyRecipe, jobs: Sequence[Job], base: Path, workdir: Path) -> None:
    """Makes the runs that are missing and reports on all that are finished, also where some failed."""
    _outcomes(jobs)  # what is wrong with earlier runs is found before hours of others
    try:
        if not all(job.report.exists() for job in jobs):
            prepare_once(recipe.preparations(workdir))
        run_jobs(jobs, base, recipe.parallel, prepared_folder(workdir) / "compiled", recipe.ensemble)
    except Exception:  # but not a signal, which is to end this soon
        _write_report(recipe, jobs, workdir)
        raise
    _write_report(recipe, jobs, workdir)


def _outcomes(jobs: Sequence[Job]) -> list[Outcome]:
    """What the finished ones of the jobs found."""
    finished = [job for job in jobs if job.report.exists()]
    return [read_outcome(job.task, job.method, job.seed, job.workdir, job.overrides) for job in finished]


def _write_report(recipe: StudyRecipe, jobs: Sequence[Job], workdir: Path) -> None:
    """Writes the report over the jobs that are finished, if there are any."""
    outcomes, planned = _outcomes(jobs), len(jobs)
    if not outcomes:
        return
    report = study_report(recipe, outcomes)
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    report.intro += (
        f"{len(outcomes)} of {planned} runs are finished: {hours:.1f} hours of training, on {os.cpu_count()} cores of "
        f"{_processor()} with Python {platform.python_version()}, {datetime.date.today()}. A method with one "
        "seed decides nothing.",
    )
    write_json(workdir / "study.json", finite_report(report.numbers)[0])
    text = markdown(report)
    for path in (workdir / "study.md", *([Path(recipe.report)] if recipe.report else [])):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    page = write_sections(workdir, report.title, report.intro, report.sections, report.pictures)
    print(f"report over {len(outcomes)} of {planned} runs: {workdir / 'study.md'}, {page}", flush=True)


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", path.read_text(encoding="utf-8"), re.M) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
