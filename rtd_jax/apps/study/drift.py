"""Sections of a study's report on drift: how alike the states of student and teacher are, step by step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rtd_jax.apps.report import article
from rtd_jax.apps.report.sections import Section
from rtd_jax.apps.study import statistics
from rtd_jax.apps.study.claims import TaskRuns

MOST_STEPS = 4  # of the columns about the student's own chains


def likeness(runs: TaskRuns) -> Section:
    """CKA by step on the data's chains, and whether transitions tell right steps from wrong ones."""
    title = "Drift (means over seeds)"
    curves = mean_cka_curves(runs)
    if not curves:
        return Section(title)
    steps = sorted({step for curve in curves.values() for step in curve})

    def cells(curve: Mapping[int, float], form: str) -> list[str]:
        return [f"{curve[step]:{form}}" if step in curve else "-" for step in steps]

    rows = []
    for name, curve in curves.items():
        areas = [
            area for outcome in runs.finished(name) if (area := statistics.auroc_within(outcome.drift)) is not None
        ]
        rows.append((name, *cells(curve, ".3f"), f"{np.mean(areas):.3f}" if areas else "-"))
    rows.append(("article (biased CKA, KD)", *cells(article.CKA, ".2f"), f"{article.AUROC:.2f}"))
    text = (
        "Debiased CKA between student and teacher at the end of each step, on the validation chains that have them "
        "all; and the AUROC with which the cosine of a transition tells whether the next step is right, among steps of "
        "the same place and depth: through the run's own g where its loss trained one, else through a map fitted on "
        "one half of the chains and used on the other."
    )
    return Section(title, 3, [text], ("method", *(f"CKA, step {step}" for step in steps), "AUROC"), rows)


def on_own_chains(runs: TaskRuns) -> Section:
    """Likeness of the states on what the student writes itself, before training and after it."""
    title = "Drift on the student's own chains (means over seeds)"
    found = {
        (name, when): [drift for outcome in outcomes if (drift := (outcome.drift or {}).get(key)) is not None]
        for name, outcomes in runs.outcomes.items()
        for key, when in (("own_before", "before"), ("own", "after"))
    }
    found = {place: drifts for place, drifts in found.items() if drifts}
    deepest = max((len(d["steps"]) - 1 for drifts in found.values() for d in drifts), default=0)
    steps = range(1, 1 + min(deepest, MOST_STEPS))

    def mean(drifts: Sequence[dict[str, Any]], key: str, step: int) -> str:
        values = [d["steps"][step][key] for d in drifts if step < len(d["steps"])]
        known = [row["value"] for row in values if row is not None and row["value"] is not None]
        return f"{np.mean(known):.3f}" if known else "-"

    rows = [
        (
            *place,
            f"{np.mean([d['chains'] for d in drifts]):.0f}",
            *(mean(drifts, "cka_debiased", step) for step in steps),
            *(mean(drifts, "transition_cosine", step) for step in steps),
        )
        for place, drifts in found.items()
    ]
    text = (
        "As above, on what the student writes greedily for the same problems, as far as it has steps; both models read "
        "it. Before training the student is what it starts from. Debiased CKA at the end of a step, over the chains "
        "that have it, and the cosine between the two models' transitions into the step. Chains before and after are "
        "not the same texts, and those of a weak student have fewer steps."
    )
    head = ("method", "", "chains", *(f"CKA, step {s}" for s in steps), *(f"cosine, step {s}" for s in steps))
    return Section(title, 3, [text], head, rows)


def mean_cka_curves(runs: TaskRuns) -> dict[str, dict[int, float]]:
    """CKA by step of each method where it was measured: means over the seeds that have the step."""
    means = {}
    for name, outcomes in runs.outcomes.items():
        curves = [statistics.cka_curve(outcome.drift) for outcome in outcomes]
        steps = sorted({step for curve in curves for step in curve})
        if steps:
            means[name] = {s: float(np.mean([curve[s] for curve in curves if s in curve])) for s in steps}
    return means
