"""The end of a run: evaluation of a model in the recipe's text form, and the tables a person reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.apps.report.page import write_report
from rtd_jax.apps.report.tables import depth_table
from rtd_jax.base.console import print_table
from rtd_jax.base.sharding import host_share, put_batch, to_host
from rtd_jax.base.types import Params
from rtd_jax.data.packing import fixed_batches
from rtd_jax.eval.drift import BoundaryStates, Map, cross_fitted, measure, transitions
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, first_of_each_depth
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.methods.maps import state_map, transition_map
from rtd_jax.methods.term import Setup
from rtd_jax.train.update import make_boundary_reader

RESAMPLES = 200  # for the intervals of the drift section


def make_evaluator(experiment: Experiment) -> ChainEvaluator:
    """What evaluates models in the recipe's form of text."""
    recipe = experiment.recipe
    return ChainEvaluator(
        experiment.tokenizer,
        recipe.data.text,
        DecodingSettings(recipe.evaluation.max_new_tokens, recipe.evaluation.batch_size),
        ScoringSettings(recipe.data.row_length, recipe.rows_at_once),
        experiment.mesh,
    )


def drift_section(experiment: Experiment, params: Params) -> dict[str, Any]:
    """Does the student leave the teacher's trajectory? On validation chains, whose states a cache has too.

    What `rtd_jax.eval.drift.measure` says: CKA and cosines by step, and whether the cosine of a transition tells right
    steps and chains from wrong ones. What is right is the student's own: steps under teacher forcing, chains by
    free-running decoding. f and g are the run's own where its loss trained them; else linear maps fitted on one half of
    the chains and used on the other.
    """
    recipe, split = experiment.recipe, experiment.validation
    problems = first_of_each_depth(split.traces, recipe.evaluation.drift_problems)
    place = {id(trace): i for i, trace in enumerate(split.traces)}
    chains = [split.encoded[place[id(trace)]] for trace in problems]
    _, records = make_evaluator(experiment)(experiment.student, params["student"], problems)
    setup = Setup(experiment.student.config, experiment.teacher_config, experiment.vocab_size)
    read = make_boundary_reader(experiment.student, experiment.teacher, recipe.loss.matched_layers(setup))
    share, shape = host_share(experiment.mesh), (recipe.rows_at_once, recipe.data.row_length, 1)
    parts = []
    for batch in fixed_batches(chains, *shape, experiment.max_boundaries, share=share):
        source = experiment.source(batch, states_only=True)
        placed = put_batch(batch, experiment.mesh)
        both = to_host((*read(params, source, placed), placed.boundary_mask_BCK))
        parts.append([x[:, 0] for x in both])
    of_student, of_teacher, mask = (np.concatenate(x)[: len(chains)] for x in zip(*parts, strict=True))
    states = BoundaryStates(of_student, of_teacher, mask.astype(bool))
    loss = recipe.loss
    trained = {"f": bool(loss.alignment_weight or loss.token_alignment_weight), "g": bool(loss.coherence_weight)}
    own = {"f": state_map(params), "g": transition_map(params)}
    maps: dict[str, Sequence[Map]] = {
        name: [None if own[name] is None else np.asarray(to_host(own[name]))] * len(chains)
        if is_own
        else cross_fitted(transitions(states) if name == "g" else states, seed=0)
        for name, is_own in trained.items()
    }
    found = measure(
        states,
        (maps["f"], maps["g"]),
        [record["teacher_forced"] for record in records],
        np.array([not record["correct"] for record in records]),
        resamples=RESAMPLES,
        seed=0,
    )
    return found | {"maps": {name: "the run's own" if is_own else "fitted" for name, is_own in trained.items()}}


def print_report(report: dict[str, Any], workdir: Path) -> None:
    """Prints what report.json says, and the next useful commands."""
    names = [name for name in ("student", "teacher") if name in report]
    for name in names:
        print_table(f"Accuracy by reasoning depth: {name} (± one standard error)", *depth_table(report[name]))
    stages = [
        (
            s["depth"],
            s["updates"],
            f"{s['threshold']:.4f}",
            "-" if s["coherence"] is None else f"{s['coherence']:.4f}",
            s["ended_by"],
        )
        for s in report["stages"]
    ]
    print_table("Curriculum", ["stage", "updates", "threshold", "coherence", "ended by"], stages)
    perplexities = ", ".join(f"{name} {report[name]['perplexity']:.3f}" for name in names)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    print(f"perplexity: {perplexities}.  {report['wall_seconds']:.0f} s in all: {spent}.")
    print(f"report: {workdir / 'report.html'}, {workdir / 'report.json'}   student: {workdir / 'student'}")
    print(f"next: look at the curves with `tensorboard --logdir {workdir / 'tensorboard'}`, or load the student with")
    print(f"      transformers.AutoModelForCausalLM.from_pretrained({str(workdir / 'student')!r})")


def write_page(report: dict[str, Any], workdir: Path) -> None:
    """report.html of a run: what report.json, metrics.jsonl and generations.jsonl in `workdir` say."""
    lines = (workdir / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    models = {name: report[name] for name in ("student", "teacher") if name in report}
    shown = {"title": f"Run {workdir.name}", "models": models, "stages": report["stages"]}
    if "drift" in report:
        shown["texts"] = {"reference": report["drift"]}
    examples = [record for record in records if record["model"] == "student"]
    write_report(workdir, shown, examples, workdir / "metrics.jsonl")
