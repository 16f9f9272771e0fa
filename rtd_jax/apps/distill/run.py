"""`train`: from a recipe and a work directory to a distilled student and its report."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax

from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.distill.report import drift_section, make_evaluator, print_report, write_page
from rtd_jax.apps.distill.stages import Run, Sinks, run_stages
from rtd_jax.base.console import Display
from rtd_jax.base.files import check_writable, write_json, write_jsonl
from rtd_jax.base.types import Params
from rtd_jax.data.sources import load_traces
from rtd_jax.eval.evaluate import decoding_notes, first_of_each_depth
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.checkpoints import Checkpoints, check_same_settings, read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.splits import encode_split
from rtd_jax.train.state import TrainState


def train(recipe: Recipe, workdir: Path) -> Path:
    """Runs or resumes a recipe. Returns the path of report.json.

    Leaves in `workdir`: settings.json, metrics.jsonl, tensorboard/, checkpoints/, student/ (a Hugging Face folder),
    generations.jsonl, report.json, and report.html with its pictures.

    Raises:
      ValueError: bad settings, data, checkpoints or disk; the message has the place and the way out.
    """
    started = time.monotonic()
    check_writable(workdir)
    settings = dataclasses.asdict(recipe)
    checkpoints = Checkpoints(workdir, recipe.keep_checkpoints)
    latest = checkpoints.latest()
    if latest is not None:  # before anything heavy is loaded
        check_same_settings(latest, settings)
    speaks = jax.process_index() == 0
    clock = Clock()
    with clock.span("loading and tokenising"):
        experiment, state = prepare(recipe, functools.partial(print, flush=True) if speaks else lambda _: None)
        run = _starting_point(experiment, state, latest)
    if speaks:
        write_json(workdir / "settings.json", settings)
    log = MetricsLog(workdir, int(run.state.step))
    try:
        with Display(recipe.total_updates, int(run.state.step), silent=not speaks) as display:
            display.note(_summary(experiment, run, workdir))
            run_stages(experiment, run, Sinks(checkpoints, log, display, settings, clock))
            display.note("writing the student as a Hugging Face folder, then evaluating by greedy decoding")
            with clock.span("evaluation"):
                save_pretrained(
                    workdir / "student",
                    experiment.student.config,
                    run.state.params["student"],
                    tokenizer=experiment.tokenizer,
                )
                report = _evaluate(experiment, run, display, workdir)
    finally:
        log.close()
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    report["train_seconds"] = round(run.seconds(clock), 1)  # of all processes that the run had
    report["seconds"] = clock.seconds()  # of this process: a run that was resumed has had others before
    if speaks:
        write_json(workdir / "report.json", report)
        write_page(report, workdir)
        print_report(report, workdir)
    return workdir / "report.json"


def _starting_point(experiment: Experiment, state: TrainState, latest: Path | None) -> Run:
    """This workdir's newest checkpoint if it has one, else `resume_from`'s stage checkpoint, else a fresh run."""
    resume_from = experiment.recipe.resume_from
    if latest is None and not resume_from:
        return Run(state)
    path = latest if latest is not None else Path(resume_from).expanduser().absolute()
    meta = read_meta(path)
    own = latest is not None
    _check_fingerprints(path, meta["fingerprints"], experiment.fingerprints, data_too=own)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    run = Run.from_meta(restore_state(path, abstract), meta)
    if not own:
        if run.iterator is not None:
            raise ValueError(
                f"resume_from {path} was taken inside a stage; give a stage checkpoint (checkpoints/stages/<n>)"
            )
        names = [stage.name for stage in experiment.stages[: len(run.records)]]
        if names != [record.depth for record in run.records]:
            raise ValueError(
                f"{path} finished stages {[record.depth for record in run.records]}, but this recipe begins with "
                f"{names}; use the same curriculum.depths"
            )
    return run


def _check_fingerprints(path: Path, before: dict[str, str], now: dict[str, str], data_too: bool) -> None:
    for name in ("teacher", "tokenizer", "student_config", *(("data", "cache", "reward") if data_too else ())):
        if before.get(name, "") != now[name]:
            raise ValueError(
                f"{path} was made with another {name.replace('_', ' ')} (fingerprint {str(before.get(name))[:12]}, now "
                f"{now[name][:12]}); restore it, or start afresh in another --workdir"
            )


def _evaluate(experiment: Experiment, run: Run, display: Display, workdir: Path) -> dict[str, Any]:
    recipe = experiment.recipe
    test = load_traces(recipe.data.test)
    if recipe.data.test.schema == "prose" and experiment.detector is not None:  # others have steps of their own
        test = experiment.detector.cut(test)
    fitting = encode_split(test, recipe.data, experiment.tokenizer).traces
    problems = first_of_each_depth(fitting, recipe.evaluation.problems_per_depth)
    report: dict[str, Any] = {
        "stages": [record.to_dict() for record in run.records],
        "updates": int(run.state.step),
        "perplexity": {},
        "chain_accuracy": {},
        "step_accuracy": {},
    }
    models: dict[str, tuple[LlamaModel, Params]] = {"student": (experiment.student, run.state.params["student"])}
    if recipe.evaluation.teacher and experiment.teacher is not None:  # a cache cannot write solutions
        models["teacher"] = (experiment.teacher, experiment.teacher_params)
    generations: list[dict[str, Any]] = []
    evaluator = make_evaluator(experiment)
    for name, (model, params) in models.items():
        report[name], records = evaluator(model, params, problems, progress=decoding_notes(display.note, name))
        for key in ("chain_accuracy", "step_accuracy", "perplexity"):
            report[key][name] = report[name][key]
        generations += [{"model": name, **record} for record in records]
    if recipe.evaluation.every:
        report["curve"] = run.curve
    if recipe.evaluation.drift_problems:
        if experiment.teacher is None and experiment.cache is None:
            display.note("no drift is measured: neither the teacher nor a cache of it is there")
        else:
            display.note("reading validation chains with both models")
            report["drift"] = drift_section(experiment, run.state.params)
    if jax.process_index() == 0:
        write_jsonl(workdir / "generations.jsonl", generations)
    return report


def _summary(experiment: Experiment, run: Run, workdir: Path) -> str:
    def million(params: Params) -> str:
        return f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f}M"

    of_teacher = "not needed" if experiment.teacher is None else f"{million(experiment.teacher_params)} params"
    of_teacher = "from its cache" if experiment.cache else of_teacher
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    begin = f"resuming at update {int(run.state.step)}" if int(run.state.step) else "starting"
    return (
        f"{begin} in {workdir}: teacher {of_teacher}, student "
        f"{million(run.state.params['student'])}, {len(experiment.train.encoded)} training chains, mesh {mesh} on "
        f"{jax.devices()[0].platform}"
    )
