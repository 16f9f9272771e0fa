"""The end of a run: the drift between student and teacher, and the tables and the page that a person reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.report.page import write_report
from rtd_jax.apps.report.tables import depth_table, number, stage_table
from rtd_jax.base.console import print_table
from rtd_jax.base.files import read_jsonl
from rtd_jax.base.sharding import to_host
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.trace import Trace
from rtd_jax.eval.drift import BoundaryStates, Map, cross_fitted, measure, transitions
from rtd_jax.eval.evaluate import first_of_each_depth
from rtd_jax.eval.own_chains import own_chains
from rtd_jax.methods.maps import last_map, state_map, transition_map
from rtd_jax.steps.select import is_windows
from rtd_jax.train.update import make_boundary_reader

RESAMPLES = 200  # for the intervals of the drift section


def drift_section(experiment: Experiment, params: Params) -> dict[str, Any]:
    """Does the student leave the teacher's trajectory? Measured on validation chains: a cache has their states too.

    See `rtd_jax.eval.drift.measure`: CKA and cosines by step, and whether the cosine of a transition tells right steps
    and chains from wrong ones. Steps are judged under teacher forcing, chains by what the student decodes freely. f and
    g are the run's own where its loss trained them; else linear maps, fitted on one half of the chains and used on the
    other. With `evaluation.drift_own` under "own" the same on the chains that the student wrote for these problems,
    each step judged by itself.
    """
    loss, split = experiment.recipe.loss, experiment.validation
    problems = _drift_problems(experiment)
    place = {id(trace): i for i, trace in enumerate(split.traces)}
    chains = [split.encoded[place[id(trace)]] for trace in problems]
    data = experiment.recipe.data
    if is_windows(data.segmentation):  # steps are judged, not windows
        chains, _ = encode_traces(experiment.tokenizer, problems, data.text, row_length=data.row_length)
    _, records = experiment.evaluator(experiment.student, params["student"], problems)
    is_trained = {"f": bool(loss.alignment_weight or loss.token_alignment_weight), "g": bool(loss.coherence_weight)}
    trained = {name: maps(params) for name, maps in (("f", state_map), ("g", transition_map)) if is_trained[name]}
    failed = np.array([not record["correct"] for record in records])
    section = _drift(experiment, params, chains, trained, [record["teacher_forced"] for record in records], failed)
    section["maps"] = {name: "the run's own" if own else "fitted" for name, own in is_trained.items()}
    if experiment.recipe.evaluation.drift_own:
        section["own"] = _own_drift(experiment, params, trained, records)
    return section


def own_drift_before(experiment: Experiment, params: Params) -> dict[str, Any] | None:
    """The drift on the chains that the student writes before it is trained; None where too few have steps."""
    problems = _drift_problems(experiment)
    _, records = experiment.evaluator(experiment.student, params["student"], problems)
    return _own_drift(experiment, params, {}, records)


def _drift_problems(experiment: Experiment) -> list[Trace]:
    return first_of_each_depth(experiment.validation.traces, experiment.recipe.evaluation.drift_problems)


def _own_drift(
    experiment: Experiment, params: Params, trained: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The drift on what the student wrote; None where fewer than two texts have steps that both models can read."""
    data = experiment.recipe.data
    chains: list[EncodedChain] = []
    steps_right, failed = [], []
    for i, trace, labels in own_chains(records):
        try:
            (chain,), _ = encode_traces(experiment.tokenizer, [trace], data.text, row_length=data.row_length)
        except ValueError:  # too long, or a character that the tokenizer does not have
            continue
        if len(chain.boundaries) <= experiment.max_boundaries:
            chains.append(chain)
            steps_right.append(labels)
            failed.append(not records[i]["correct"])
    if len(chains) < 2:
        return None
    return _drift(experiment, params, chains, trained, steps_right, np.array(failed))


def _drift(
    experiment: Experiment,
    params: Params,
    chains: Sequence[EncodedChain],
    trained: Mapping[str, Any],
    steps_right: Sequence[Sequence[bool | None]],
    failed: np.ndarray,
) -> dict[str, Any]:
    """`measure` on chains that both models read, with the run's own maps f and g where they were trained.

    Of several pairs of layers the last is measured.
    """
    term = experiment.yardstick
    read = make_boundary_reader(experiment.student, experiment.teacher, term.layers[-1], term.step_state)
    parts = []
    for batch in experiment.batches(chains):
        source, placed = experiment.on_devices(batch, states_only=True)
        parts.append([x[:, 0] for x in to_host((*read(params, source, placed), placed.boundary_mask_BCK))])
    student_CKS, teacher_CKD, mask_CK = (np.concatenate(x)[: len(chains)] for x in zip(*parts, strict=True))
    states = BoundaryStates(student_CKS, teacher_CKD, mask_CK.astype(bool))
    maps: dict[str, Sequence[Map]] = {}
    for name in ("f", "g"):
        if name in trained:
            own = last_map(trained[name])
            maps[name] = [None if own is None else np.asarray(to_host(own))] * len(chains)
        else:
            maps[name] = cross_fitted(transitions(states) if name == "g" else states, seed=0)
    return measure(states, (maps["f"], maps["g"]), steps_right, failed, resamples=RESAMPLES, seed=0)


def print_report(report: dict[str, Any], workdir: Path) -> None:
    """Prints what report.json says, and the next useful commands."""
    names = [name for name in ("student", "teacher") if name in report]
    for name in names:
        print_table(f"Accuracy by reasoning depth: {name} (± one standard error)", *depth_table(report[name]))
    print_table("Curriculum", *stage_table(report["stages"]))
    perplexities = ", ".join(f"{name} {number(report[name]['perplexity'])}" for name in names)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    print(f"perplexity: {perplexities}.  {report['wall_seconds']:.0f} s in all: {spent}.")
    if report.get("not_finite"):
        shown = "; ".join(report["not_finite"][:3])
        print(f"report.json has null where a number is not finite ({shown}): the model diverged")
    print(f"report: {workdir / 'report.html'}, {workdir / 'report.json'}   student: {workdir / 'student'}")
    print(f"next: look at the curves with `tensorboard --logdir {workdir / 'tensorboard'}`, or load the student with")
    print(f"      transformers.AutoModelForCausalLM.from_pretrained({str(workdir / 'student')!r})")


def write_page(report: dict[str, Any], workdir: Path) -> None:
    """Writes report.html of a run, from its report, and metrics.jsonl and generations.jsonl in `workdir`."""
    records = (record for _, record in read_jsonl(workdir / "generations.jsonl"))
    examples = [record for record in records if record.get("model") == "student"]
    models = {name: report[name] for name in ("student", "teacher") if name in report}
    shown = {"title": f"Run {workdir.name}", "models": models, "stages": report["stages"]}
    shown["settings"] = report.get("settings", {})
    if "drift" in report:
        shown["texts"] = {"reference": report["drift"]}
    write_report(workdir, shown, examples, workdir / "metrics.jsonl")
