"""`train`: from a recipe and a work directory to a distilled student and its report."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax

from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.distill.report import drift_section, own_drift_before, print_report, write_page
from rtd_jax.apps.distill.stages import Run, Trainer
from rtd_jax.base import signals
from rtd_jax.base.console import Display
from rtd_jax.base.files import finite_report, write_json, write_jsonl
from rtd_jax.base.lock import one_writer
from rtd_jax.base.types import Params
from rtd_jax.eval.evaluate import decoding_notes
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.weights import ADAPTER
from rtd_jax.train.checkpoints import Checkpoints, check_same_settings, read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.outputs import check_outputs, check_saves
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import TrainState
from rtd_jax.train.student import save_student, student_folders


@one_writer(lambda recipe, workdir: workdir)
def train(recipe: Recipe, workdir: Path) -> Path:
    """Runs or resumes a recipe. Returns the path of report.json.

    Leaves in `workdir`: settings.json, metrics.jsonl, tensorboard/, checkpoints/, student/ (a Hugging Face folder),
    generations.jsonl, report.json, and report.html with its pictures.

    Raises:
      ValueError: bad settings, data, checkpoints or disk; the message has the place and the way out.
    """
    started = time.monotonic()
    settings = dataclasses.asdict(recipe)
    checkpoints = Checkpoints(workdir, recipe.keep_checkpoints, digest=recipe.checkpoint_digest)
    latest = checkpoints.latest()
    if latest is not None:  # before anything heavy is loaded
        check_same_settings(latest, recipe)
    is_lead = jax.process_index() == 0
    if is_lead:
        check_outputs(workdir, *student_folders(recipe.student))
    clock = Clock()
    with clock.span("loading and tokenising"):
        experiment, state = prepare(recipe, functools.partial(print, flush=True) if is_lead else lambda _: None)
        check_saves(experiment.tokenizer)
        is_drift_own = recipe.evaluation.drift_problems and recipe.evaluation.drift_own
        own_before = own_drift_before(experiment, state.params) if is_drift_own else None
        run = _starting_point(experiment, state, clock, latest)
    if is_lead:
        write_json(workdir / "settings.json", settings)
    with (
        contextlib.closing(MetricsLog(workdir, int(run.state.step))) as log,
        Display(recipe.total_updates, int(run.state.step), silent=not is_lead) as display,
    ):
        display.note(_summary(experiment, run, workdir))
        # Several processes would have to stop at the same update, so a signal stops them where they are.
        with signals.finishing() if jax.process_count() == 1 else contextlib.nullcontext():
            Trainer(experiment, run, checkpoints, log, display).train_stages()
        display.note("writing the student as a Hugging Face folder, then evaluating by greedy decoding")
        with clock.span("evaluation"):
            student, params = experiment.student, run.state.params["student"]
            save_student(workdir, recipe.student, student, params, experiment.tokenizer, recipe.data.text)
            report = evaluate_run(experiment, run, display, workdir)
    if own_before is not None:
        report["drift"]["own_before"] = own_before
    report["settings"] = settings  # a study looks whether a report is of the run that it asked for
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    report["train_seconds"] = round(run.seconds, 1)  # of all processes that the run had
    report["seconds"] = clock.seconds()  # of this process: a run that was resumed has had others before
    # A student that diverged is reported as well; JSON has no infinite perplexity.
    report, not_finite = finite_report(report)
    if not_finite:
        report["not_finite"] = not_finite
    if is_lead:
        write_json(workdir / "report.json", report)
        write_page(report, workdir)
        print_report(report, workdir)
    return workdir / "report.json"


def _starting_point(experiment: Experiment, state: TrainState, clock: Clock, latest: Path | None) -> Run:
    """The workdir's newest checkpoint if it has one, else the stage checkpoint of `resume_from`, else a fresh run."""
    resume_from = experiment.recipe.resume_from
    if latest is None and not resume_from:
        return Run(state, clock)
    path = latest or Path(resume_from).expanduser().absolute()
    meta = read_meta(path)
    check_same_origin(path, meta, experiment, is_own=latest is not None)
    run = Run.from_meta(restore_state(path, state), clock, meta)
    if latest is None:
        if run.iterator is not None:
            raise ValueError(
                f"resume_from {path} was taken inside a stage; give a stage checkpoint (checkpoints/stages/<n>)"
            )
        finished = [record.depth for record in run.records]
        planned = [stage.name for stage in experiment.stages[: len(finished)]]
        if finished != planned:
            raise ValueError(
                f"{path} finished stages {finished}, but this recipe begins with {planned}; use the same "
                "curriculum.depths"
            )
    return run


def check_same_origin(path: Path, meta: dict[str, Any], experiment: Experiment, *, is_own: bool) -> None:
    """Raises ValueError where a checkpoint was made with another teacher, tokenizer or student, or with other data.

    Args:
      is_own: whether it is of the same run; another run may have had other data.
    """
    of_data = ("data", "cache", "reward") if is_own else ()
    for name in ("teacher", "tokenizer", "student_config", "frozen_base", *of_data):
        before, now = str(meta["fingerprints"].get(name, "")), experiment.fingerprints[name]
        if before != now:
            raise ValueError(
                f"{path} was made with another {name.replace('_', ' ')} (fingerprint {before[:12]}, now {now[:12]}); "
                "restore it, or start afresh in another --workdir"
            )


# What the evaluation of a model gives: its part of report.json, and a record for each problem.
Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]


def evaluate_run(
    experiment: Experiment, run: Run, display: Display, workdir: Path, known: dict[str, Evaluated] | None = None
) -> dict[str, Any]:
    """Evaluates student and teacher on the test problems: the content of report.json. Writes generations.jsonl.

    Args:
      known: what is known of models that are the same for several runs, by their names in the report. The teacher is
        added to it.
    """
    known = {} if known is None else known
    recipe = experiment.recipe
    report: dict[str, Any] = {
        "stages": [record.to_dict() for record in run.records],
        "updates": int(run.state.step),
        "tokens": {"data": run.data_tokens, "own": run.own_tokens},
        "origins": experiment.origins,
        "perplexity": {},
        "chain_accuracy": {},
        "step_accuracy": {},
    }
    models: dict[str, tuple[DecoderModel, Params]] = {"student": (experiment.student, run.state.params["student"])}
    if recipe.evaluation.teacher and experiment.teacher is not None:  # a cache cannot write solutions
        models["teacher"] = (experiment.teacher, experiment.teacher_params)
    generations: list[dict[str, Any]] = []
    for name, (model, params) in models.items():
        note = decoding_notes(display.note, name)
        found = known.get(name) or experiment.evaluator(model, params, experiment.problems, progress=note)
        if name == "teacher":
            known[name] = found
        report[name], records = found
        for key in ("chain_accuracy", "step_accuracy", "perplexity"):
            report[key][name] = report[name][key]
        generations += [{"model": name, **finite_report(record)[0]} for record in records]
    if recipe.evaluation.every:
        report["curve"] = run.curve
    if recipe.evaluation.drift_problems:
        display.note("reading validation chains with both models")
        report["drift"] = drift_section(experiment, run.state.params)
    if jax.process_index() == 0:
        write_jsonl(workdir / "generations.jsonl", generations)
    return report


def _summary(experiment: Experiment, run: Run, workdir: Path) -> str:
    """What the run begins with, in a line."""

    def millions(params: Params) -> str:
        return f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f}M"

    teacher = "from its cache" if experiment.cache else "not needed"
    if experiment.teacher is not None:
        teacher = f"{millions(experiment.teacher_params)} params"
    step, trained = int(run.state.step), ""
    if experiment.student.adapter is not None:
        trained = f" of which {millions(run.state.params['student'][ADAPTER])} are trained,"
    return (
        f"{f'resuming at update {step}' if step else 'starting'} in {workdir}: teacher {teacher}, student "
        f"{millions(run.state.params['student'])},{trained} {len(experiment.train.encoded)} training chains, mesh "
        f"{' x '.join(f'{name} {size}' for name, size in experiment.mesh.shape.items())} on {jax.devices()[0].platform}"
    )
