"""The pictures of a study's report."""

from collections.abc import Mapping, Sequence

import numpy as np

from rtd_jax.apps.report.sections import Intervals, Picture
from rtd_jax.apps.study import drift
from rtd_jax.apps.study.claims import TEACHER, TaskRuns
from rtd_jax.apps.study.statistics import Difference, Outcome
from rtd_jax.eval.estimates import Estimate

Table = dict[str, dict[str, Estimate]]  # {method: {depth bucket: chain accuracy}}


def differences(task: str, found_of: Mapping[str, Difference | None], runs: TaskRuns) -> list[Picture | Intervals]:
    """Every method's difference to the baseline with its interval, the largest first; none without three seeds."""
    rows = {
        name: (100 * found.value, 100 * found.low, 100 * found.high)
        for name, found in found_of.items()
        if found is not None and found.n > 2  # the interval of two seeds would dwarf all others
    }
    if not rows:
        return []
    title = f"Against {runs.baseline} at {runs.deep} steps and more ({task})"
    caption = "Chains right, in points, of methods with three seeds or more; 95% intervals over seeds and problems."
    ordered = dict(sorted(rows.items(), key=lambda row: -row[1][0]))
    return [Intervals(f"differences_{task}", title, caption, f"points more than {runs.baseline}", ordered)]


def curves(task: str, table: Table, runs: TaskRuns) -> list[Picture | Intervals]:
    """Chain accuracy by depth, and against updates and time; likeness to the teacher by step."""
    pictured = [name for name, method in runs.methods.items() if method.pictured]
    shown = [*sorted(pictured, key=lambda name: runs.methods[name].place), TEACHER]
    by_depth = {
        name: [
            (int(key), *(100 * x for x in (v.value, v.low, v.high))) for key, v in table[name].items() if key.isdigit()
        ]
        for name in shown
        if name in table
    }
    title = f"Chain accuracy by depth ({task})"
    caption = "Every intermediate result and the answer right, free-running. Bands: 95% over seeds and problems."
    x, y = "reasoning steps of the problem", "chains right, %"
    pictures: list[Picture | Intervals] = [Picture(f"chains_{task}", title, caption, x, y, by_depth)]
    evaluated = runs_with_curves(runs)
    for key, x in (("update", "updates"), ("seconds", "seconds of training")):
        series = {name: _mean_curve(evaluated[name], key) for name in shown if name in evaluated}
        if series:
            caption = "On validation problems of all depths; means over seeds."
            pictures.append(
                Picture(f"curve_{key}_{task}", f"Chain accuracy against {x} ({task})", caption, x, y, series)
            )
    ckas = drift.mean_cka_curves(runs)
    lines = {name: list(ckas[name].items()) for name in shown if len(ckas.get(name, ())) > 1}
    if lines:
        caption = "Debiased, on the same validation chains at every step; means over seeds."
        pictures.append(Picture(f"cka_{task}", f"CKA by step ({task})", caption, "step", "linear CKA", lines))
    return pictures


def _mean_curve(outcomes: Sequence[Outcome], x: str) -> list[tuple[float, ...]]:
    """(x, chain accuracy in %) of each evaluation during the run that all seeds have."""
    count = min(len(outcome.curve) for outcome in outcomes)
    points_SEX = [[(at[x], 100 * at["chain_accuracy"]["all"]) for at in o.curve[:count]] for o in outcomes]
    return [(float(at), float(percent)) for at, percent in np.mean(points_SEX, axis=0)]


def runs_with_curves(runs: TaskRuns) -> dict[str, list[Outcome]]:
    """The runs of each method that were evaluated while they trained."""
    found = {name: [outcome for outcome in outcomes if outcome.curve] for name, outcomes in runs.outcomes.items()}
    return {name: outcomes for name, outcomes in found.items() if outcomes}
