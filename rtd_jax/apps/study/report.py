"""The report of a study: sections of tables, pictures, and the same numbers as JSON. Every line is computed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtd_jax.apps.report import article
from rtd_jax.apps.report.sections import Picture, Section, markdown_of
from rtd_jax.apps.study.claims import (
    TEACHER,
    Claim,
    TaskRuns,
    added_by,
    auroc_within,
    buckets,
    changed_coherence,
    cka_curve,
    claims_of,
    gains_by_depth,
    p_and_seeds,
    p_value,
    points,
    questions,
    shares,
    smaller_gain,
)
from rtd_jax.apps.study.recipe import StudyRecipe
from rtd_jax.apps.study.statistics import (
    SETTLED,
    Difference,
    Outcome,
    accuracy,
    accuracy_at,
    json_row,
    settled_at,
    share_of_gain_lost,
    solved_after_stage,
)
from rtd_jax.eval.estimates import Estimate

TITLE = "Study: what keeps multi-step reasoning alive in a small student"
INTRO = (
    "Written by `launch/study.py`; not edited by hand. Chain accuracy in %: every intermediate result and the answer "
    "right, by free-running greedy decoding on test problems. Intervals are 95%: of accuracies and their differences "
    "by Student's t, with the variance over seeds and that over problems added; of other measures over seeds. "
    "Differences are paired by seed and problem; p-values are of a two-sided t-test over seeds, the problems being "
    "given, not corrected for the number of comparisons. Beside those above 0.05 stands with how many seeds such a "
    "test finds a difference of the size and spread seen here four times in five.",
    "Models and problems are not the article's, so a claim is compared by its sign or order, and only shares and "
    "ratios as numbers: it agrees or disagrees when the interval lies wholly on one side, and is undecided otherwise.",
)
TESTED = ("p", "seeds for a power of 80%")
MEASURED = ("step_accuracy", "perplexity", "updates", "seconds")

Table = dict[str, dict[str, Estimate]]  # {method: {depth bucket: chain accuracy}}


@dataclass
class Report:
    """What a study found."""

    title: str = TITLE
    intro: tuple[str, ...] = INTRO
    sections: list[Section] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def study_report(recipe: StudyRecipe, outcomes: Sequence[Outcome]) -> Report:
    """Accuracy by depth, paired differences, ablation shares, claims with verdicts, drift and time, task by task.

    The baseline and the whole method are shown first, then the other methods in the order of the recipe.

    Args:
      recipe: what the methods and tasks are.
      outcomes: finished runs.
    """
    report = Report()
    tasks: dict[str, TaskRuns] = {}
    methods = {name: recipe.method(name) for name in recipe.methods}
    shown = sorted(methods, key=lambda name: (name != recipe.baseline, methods[name].role != "whole"))
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        found = {name: [o for o in outcomes if (o.task, o.method) == (task, name)] for name in shown}
        found = {name: runs for name, runs in found.items() if runs}
        tasks[task] = TaskRuns(found, methods, recipe.baseline, recipe.deep)
        _add_task(report, task, recipe.about.get(task, ""), tasks[task])
    between = smaller_gain(tasks, recipe.smaller_than)
    if between:
        report.sections.append(Section("Between tasks", 2))
        report.sections += _claim_section("A smaller student", between)
        report.numbers["between_tasks"] = [dataclasses.asdict(claim) for claim in between]
    return report


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [f"# {report.title}", ""]
    for sentence in report.intro:
        lines += [sentence, ""]
    for section in report.sections:
        lines += markdown_of(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _add_task(report: Report, task: str, about: str, runs: TaskRuns) -> None:
    table = _accuracy_table(runs)
    differences: dict[str, Difference | None] = {}
    if runs.baseline in runs.outcomes:
        differences = {name: runs.difference(name, runs.baseline) for name in runs.outcomes if name != runs.baseline}
    gains, lost = gains_by_depth(runs), shares(runs)
    claims, open_questions = claims_of(runs), questions(runs)
    added, changed = added_by(runs), changed_coherence(runs)
    others = {
        name: {key: float(np.mean([getattr(outcome, key) for outcome in found])) for key in MEASURED}
        for name, found in runs.outcomes.items()
    }
    report.sections += [
        Section(task, 2, [about] if about else ()),
        _accuracies(table, runs),
        *_differences(differences, runs),
        *_claim_section(f"Gain of `{runs.whole}` over `{runs.baseline}` by depth", gains, "steps"),
        *_claim_section("Share of the gain lost by each ablation", lost, "ablation"),
        *_claim_section("The article's claims", claims),
        *_claim_section("Questions the article leaves open", open_questions, "question"),
        *_components(added, runs.deep),
        *_changed(changed, runs),
        *_grid(table, runs),
        _others(others),
        *_drift(runs),
        *_time(runs),
        *_stages(runs),
    ]
    report.pictures += _pictures(task, table, runs)
    report.numbers[task] = {
        "chain_accuracy": {name: {key: json_row(cell) for key, cell in row.items()} for name, row in table.items()},
        "differences": {name: found and json_row(found) for name, found in differences.items()},
        "share_of_gain_lost": _shares(table, runs),
        "gains_by_depth": [dataclasses.asdict(claim) for claim in gains],
        "shares": [dataclasses.asdict(claim) for claim in lost],
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "questions": [dataclasses.asdict(claim) for claim in open_questions],
        "components": [
            {"component": component, "added_to": to, "difference": found and json_row(found)}
            for component, to, found in added
        ],
        "changed_coherence": [
            {"changed": what, "alone": alone and json_row(alone), "beside_alignment": beside and json_row(beside)}
            for what, alone, beside in changed
        ],
        "means": others,
    }


def _accuracy_table(runs: TaskRuns) -> Table:
    """Chain accuracy of every method and of the teacher, which is the same under every seed: one seed is taken."""
    known = runs.with_teacher().outcomes
    chosen = buckets(next(iter(known.values()))[0].depths.tolist(), runs.deep)
    return {
        name: {key: accuracy(found[:1] if name == TEACHER else found, keep) for key, keep in chosen.items()}
        for name, found in known.items()
    }


def _accuracies(table: Table, runs: TaskRuns) -> Section:
    rows = []
    for name, row in table.items():
        found = sorted(runs.of(name), key=lambda outcome: outcome.seed)
        by_seed = ", ".join(f"{100 * outcome.correct[runs.is_deep(outcome.depths)].mean():.0f}" for outcome in found)
        rows.append((name, len(found) or "", *(_percent(cell) for cell in row.values()), by_seed))
    head = ("method", "seeds", *next(iter(table.values())), f"{runs.deep}+, seed by seed")
    return Section("Chain accuracy by depth", 3, (), head, rows)


def _differences(differences: dict[str, Difference | None], runs: TaskRuns) -> list[Section]:
    if not differences:
        return []
    rows = [(name, points(found), *p_and_seeds(found)) for name, found in differences.items()]
    title = f"Against `{runs.baseline}` at {runs.deep} steps and more"
    return [Section(title, 3, (), ("method", "difference", *TESTED), rows)]


def _claim_section(title: str, claims: Sequence[Claim], what: str = "claim") -> list[Section]:
    rows = [(claim.claim, claim.found, claim.article, claim.verdict) for claim in claims]
    return [Section(title, 3, (), (what, "here", "article", "verdict"), rows)] if rows else []


def _components(added: Sequence[tuple[str, str, Difference | None]], deep: int) -> list[Section]:
    if not added:
        return []
    text = (
        "Every combination was run: each component's differences to the same method without it, and their mean, which "
        "says what the component is worth whatever stands beside it."
    )
    rows = [(component, to, points(found), *p_and_seeds(found)) for component, to, found in added]
    head = ("component", "added to", "difference", *TESTED)
    return [Section(f"What each component adds at {deep} steps and more", 3, [text], head, rows)]


def _changed(changed: Sequence[tuple[str, Difference | None, Difference | None]], runs: TaskRuns) -> list[Section]:
    if not changed:
        return []
    plain = runs.combination((False, False, False)) or runs.baseline
    head = ("changed", f"added to `{plain}`", "p", "added to the alignment", "p")
    rows = [
        (what, *(cell for found in pair for cell in ((points(found), p_value(found)) if found else ("-", "-"))))
        for what, *pair in changed
    ]
    text = (
        "All depths at once, without the curriculum. The first line is the loss as the article has it. The alignment "
        "it is added to is changed alike where the change is one of both."
    )
    return [Section(f"What the coherence loss adds at {runs.deep} steps and more, changed", 3, [text], head, rows)]


def _grid(table: Table, runs: TaskRuns) -> list[Section]:
    """Chain accuracy at the deep problems for every pair of weights, the best one first."""
    bucket = f"{runs.deep}+"
    found = {}
    for name in runs.with_role("grid point"):
        method = runs.methods[name]
        found[method.alignment, method.coherence] = table[name][bucket]
    if not found:
        return []
    best = sorted(found.items(), key=lambda item: -item[1].value)
    rows = [(f"{alignment:g}", f"{coherence:g}", _percent(cell)) for (alignment, coherence), cell in best]
    (weights, first), second = best[0], best[1][1] if len(best) > 1 else best[0][1]
    published = (article.ALIGNMENT_WEIGHT, article.COHERENCE_WEIGHT)
    at_published = found.get(published)
    says = "undecided"
    if weights == published and first.low > second.high:
        says = "agrees"
    elif at_published is not None and at_published.high < first.low:
        says = "disagrees"
    text = (
        f"The article's grid search on held-out data gave {published[0]:g} and {published[1]:g}. Here {weights[0]:g} "
        f"and {weights[1]:g} come out best: {says}."
    )
    head = ("alignment", "coherence", f"chains right, {bucket}")
    return [Section("Grid over the two weights", 3, [text], head, rows)]


def _others(others: dict[str, dict[str, float]]) -> Section:
    rows = [
        (
            name,
            f"{100 * row['step_accuracy']:.1f}",
            f"{row['perplexity']:.4f}",
            *(f"{row[k]:.0f}" for k in MEASURED[2:]),
        )
        for name, row in others.items()
    ]
    head = ("method", "step accuracy %", "perplexity", "updates", "seconds of training")
    return Section("What else was measured (means over seeds)", 3, (), head, rows)


def _drift(runs: TaskRuns) -> list[Section]:
    curves = {name: _mean_curve([cka_curve(outcome) for outcome in found]) for name, found in runs.outcomes.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return []
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = []
    for name, curve in curves.items():
        areas = [area for outcome in runs.of(name) if (area := auroc_within(outcome)) is not None]
        cells = [f"{curve[step]:.3f}" if step in curve else "-" for step in steps]
        rows.append((name, *cells, f"{np.mean(areas):.3f}" if areas else "-"))
    published = [f"{article.CKA[step]:.2f}" if step in article.CKA else "-" for step in steps]
    rows.append(("article (biased CKA, KD)", *published, f"{article.AUROC:.2f}"))
    text = (
        "Debiased CKA between student and teacher at the end of each step, on the validation chains that have them "
        "all; and the AUROC with which the cosine of a transition tells whether the next step is right, among steps of "
        "the same place and depth: through the run's own g where its loss trained one, else through a map fitted on "
        "one half of the chains and used on the other."
    )
    head = ("method", *(f"CKA, step {step}" for step in steps), "AUROC")
    return [Section("Drift (means over seeds)", 3, [text], head, rows)]


def _time(runs: TaskRuns) -> list[Section]:
    """When curves reach their plateau, and where each method is when the baseline has finished."""
    limits = {outcome.seed: outcome.curve[-1]["seconds"] for outcome in runs.of(runs.baseline) if outcome.curve}
    rows = []
    for name, found in _with_curves(runs).items():
        settled = [settled_at(outcome) for outcome in found]
        at_limit = [accuracy_at(outcome, limits[outcome.seed]) for outcome in found if outcome.seed in limits]
        final = np.mean([outcome.curve[-1]["chain_accuracy"]["all"] for outcome in found])
        rows.append(
            (
                name,
                f"{100 * final:.1f}",
                f"{np.mean([update for update, _ in settled]):.0f}",
                f"{np.mean([seconds for _, seconds in settled]):.0f}",
                f"{100 * np.mean(at_limit):.1f}" if at_limit else "-",
            )
        )
    if not rows:
        return []
    text = (
        "Chain accuracy on validation problems of all depths, in %. A curve has settled at the first evaluation with "
        f"{SETTLED} of its best. The last column is the accuracy at the time at which `{runs.baseline}` of the same "
        "seed had finished; a method that was not through then stood in the middle of its learning-rate schedule. "
        "Times hold for runs side by side on shared cores, and include compilation."
    )
    head = ("method", "at the end", "updates to settle", "seconds to settle", f"when {runs.baseline} had finished")
    return [Section("Accuracy against updates and time (means over seeds)", 3, [text], head, rows)]


def _with_curves(runs: TaskRuns) -> dict[str, list[Outcome]]:
    """The runs of each method that were evaluated while they trained."""
    found = {name: [outcome for outcome in outcomes if outcome.curve] for name, outcomes in runs.outcomes.items()}
    return {name: outcomes for name, outcomes in found.items() if outcomes}


def _stages(runs: TaskRuns) -> list[Section]:
    """How the stages of the whole method's curriculum ended, and what the student could do by then."""
    found = [outcome for outcome in runs.of(runs.whole) if len(outcome.stages) > 1]
    if not found:
        return []
    rows = []
    for number, first in enumerate(found[0].stages):
        records = [outcome.stages[number] for outcome in found]
        losses = [record["coherence"] for record in records if record["coherence"] is not None]  # None: no updates left
        solved = [share for outcome in found if (share := solved_after_stage(outcome, number)) is not None]
        rows.append(
            (
                first["depth"],
                f"{np.mean([record['threshold'] for record in records]):.3f}",
                f"{np.mean(losses):.3f}" if losses else "-",
                f"{sum(record['ended_by'] == 'threshold' for record in records)} of {len(records)}",
                f"{np.mean([record['updates'] for record in records]):.0f}",
                f"{100 * np.mean(solved):.1f}" if solved else "-",
            )
        )
    text = (
        "Coherence loss on validation chains of the stage's depths when it ended, and the threshold, which is the "
        "teacher's own under another context; in how many runs the threshold ended it. The last column is chain "
        "accuracy on validation problems of these depths at the first evaluation after the end."
    )
    head = ("steps", "threshold", "loss at the end", "ended by threshold", "updates", "chains right after it, %")
    return [Section(f"How the stages of `{runs.whole}` ended (means over seeds)", 3, [text], head, rows)]


def _mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Means over the curves that have each step."""
    steps = sorted({step for curve in curves for step in curve})
    return {step: float(np.mean([curve[step] for curve in curves if step in curve])) for step in steps}


def _shares(table: Table, runs: TaskRuns) -> dict[str, float | None]:
    if runs.whole is None or runs.baseline not in table:
        return {}
    whole, baseline = (table[name][f"{runs.deep}+"] for name in (runs.whole, runs.baseline))
    ablations = [name for component in article.SHARE_LOST if (name := runs.without(component)) is not None]
    return {name: share_of_gain_lost(whole, table[name][f"{runs.deep}+"], baseline) for name in ablations}


def _pictures(task: str, table: Table, runs: TaskRuns) -> list[Picture]:
    pictured = [name for name, method in runs.methods.items() if method.pictured]
    shown = [*sorted(pictured, key=lambda name: runs.methods[name].place), TEACHER]
    by_depth = {
        name: [
            (int(key), *(100 * x for x in (v.value, v.low, v.high))) for key, v in table[name].items() if key.isdigit()
        ]
        for name in shown
        if name in table
    }
    found = [
        Picture(
            f"chains_{task}",
            f"Chain accuracy by depth ({task})",
            "Every intermediate result and the answer right, free-running. Bands: 95% over seeds and problems.",
            "reasoning steps of the problem",
            "chains right, %",
            by_depth,
        )
    ]
    evaluated = _with_curves(runs)
    curves = {name: evaluated[name] for name in shown if name in evaluated}
    for x, label in (("update", "updates"), ("seconds", "seconds of training")):
        series = {name: _mean_accuracies(outcomes, x) for name, outcomes in curves.items()}
        if series:
            caption = "On validation problems of all depths; means over seeds."
            title = f"Chain accuracy against {label} ({task})"
            found.append(Picture(f"curve_{x}_{task}", title, caption, label, "chains right, %", series))
    ckas = {name: _mean_curve([cka_curve(outcome) for outcome in runs.of(name)]) for name in shown}
    lines = {name: list(curve.items()) for name, curve in ckas.items() if len(curve) > 1}
    if lines:
        caption = "Debiased, on the same validation chains at every step; means over seeds."
        found.append(Picture(f"cka_{task}", f"CKA by step ({task})", caption, "step", "linear CKA", lines))
    return found


def _mean_accuracies(outcomes: Sequence[Outcome], x: str) -> list[tuple[float, float]]:
    """(x, chain accuracy in %) of each mid-run evaluation that all seeds have."""
    count = min(len(outcome.curve) for outcome in outcomes)
    return [
        (
            float(np.mean([outcome.curve[i][x] for outcome in outcomes])),
            100 * float(np.mean([outcome.curve[i]["chain_accuracy"]["all"] for outcome in outcomes])),
        )
        for i in range(count)
    ]


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"
