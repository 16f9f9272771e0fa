"""The report of a study: sections of tables, pictures, and the same numbers as JSON. Every line is computed."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtd_jax.apps.report import article
from rtd_jax.apps.report.sections import Intervals, Picture, Section, markdown_of
from rtd_jax.apps.study import claims, drift, pictures, statistics
from rtd_jax.apps.study.claims import TEACHER, Claim, TaskRuns, p_and_seeds, points
from rtd_jax.apps.study.compressed import gains_left
from rtd_jax.apps.study.pictures import Table
from rtd_jax.apps.study.recipe import StudyRecipe
from rtd_jax.apps.study.statistics import Difference, Outcome, json_row
from rtd_jax.eval.estimates import Estimate

TITLE = "Study: what keeps multi-step reasoning alive in a small student"
INTRO = (
    "Written by `launch/study.py`; not edited by hand. Chain accuracy in %: every step and the answer "
    "right, by free-running greedy decoding on test problems. Intervals are 95%: of accuracies and their differences "
    "by Student's t, with the variance over seeds and that over problems added; of other measures over seeds. "
    "Differences are paired by seed and problem; p-values are of a two-sided t-test over seeds, the problems being "
    "given, not corrected for the number of comparisons. Beside those above 0.05 stands with how many seeds such a "
    "test finds a difference of the size and spread seen here four times in five.",
    "Models and problems are not the article's, so a claim is compared by its sign or order, and only shares and "
    "ratios as numbers: it agrees or disagrees when the interval lies wholly on one side, and is undecided otherwise.",
)
TESTED = ("p", "seeds for a power of 80%")
MEASURED = {  # attributes of an outcome: their titles, forms and units in the table
    "step_accuracy": ("step accuracy %", "{:.1f}", 100),
    "perplexity": ("perplexity", "{:.4f}", 1),
    "updates": ("updates", "{:.0f}", 1),
    "seconds": ("seconds of training", "{:.0f}", 1),
    "tokens": ("tokens trained on", "{:,.0f}", 1),
}


@dataclass
class Report:
    """What a study found."""

    title: str = TITLE
    intro: tuple[str, ...] = INTRO
    sections: list[Section] = field(default_factory=list)
    pictures: list[Picture | Intervals] = field(default_factory=list)
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
        _add_task(report, task, recipe, tasks[task])
    between = claims.smaller_gain(tasks, recipe.smaller_than)
    if between:
        report.sections += [Section("Between tasks", 2), _claims("A smaller student", "claim", between)]
        report.numbers["between_tasks"] = [dataclasses.asdict(line) for line in between]
    return report


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [f"# {report.title}", ""]
    for sentence in report.intro:
        lines += [sentence, ""]
    for section in report.sections:
        lines += markdown_of(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _add_task(report: Report, task: str, recipe: StudyRecipe, runs: TaskRuns) -> None:
    about = recipe.about.get(task, "")
    table = _accuracy_table(runs)
    differences: dict[str, Difference | None] = {}
    if runs.baseline in runs.outcomes:
        differences = {name: runs.difference(name, runs.baseline) for name in runs.outcomes if name != runs.baseline}
    # By key of study.json: the section's title, what a line of it is about, and its lines.
    compared = {
        "gains_by_depth": (
            f"Gain of `{runs.whole}` over `{runs.baseline}` by depth",
            "steps",
            claims.gains_by_depth(runs),
        ),
        "shares": ("Share of the gain lost by each ablation", "ablation", claims.shares(runs)),
        "gains_left": (
            f"What is left of a gain over `{runs.baseline}` when both are made smaller",
            "method",
            gains_left(runs),
        ),
        "claims": ("The article's claims", "claim", claims.article_claims(runs)),
        "questions": ("Questions the article leaves open", "question", claims.questions(runs)),
    }
    added, changed = claims.component_gains(runs), claims.changed_coherence(runs)
    every = [outcome for outcomes in runs.outcomes.values() for outcome in outcomes]
    keys = [key for key in MEASURED if all(getattr(outcome, key) is not None for outcome in every)]
    means = {
        name: {key: float(np.mean([getattr(outcome, key) for outcome in outcomes])) for key in keys}
        for name, outcomes in runs.outcomes.items()
    }
    sections = [
        _accuracies(table, runs),
        _differences(differences, runs),
        *(_claims(*section) for section in compared.values()),
        _components(added, runs.deep),
        _changed(changed, runs),
        _grid(table, runs),
        _means(means),
        drift.likeness(runs),
        drift.on_own_chains(runs),
        _solving(runs, recipe.solved_share),
        _time(runs),
        _stages(runs),
    ]
    report.sections.append(Section(task, 2, [about] if about else ()))
    report.sections += [section for section in sections if section.rows]
    report.pictures += [*pictures.differences(task, differences, runs), *pictures.curves(task, table, runs)]
    report.numbers[task] = {
        "chain_accuracy": {name: {key: json_row(cell) for key, cell in row.items()} for name, row in table.items()},
        "differences": {name: json_row(found) for name, found in differences.items()},
        "share_of_gain_lost": _shares_lost(table, runs),
        **{key: [dataclasses.asdict(line) for line in lines] for key, (_, _, lines) in compared.items()},
        "components": [
            {"component": component, "added_to": to, "difference": json_row(found)} for component, to, found in added
        ],
        "changed_coherence": [
            {"changed": what, "alone": json_row(alone), "beside_alignment": json_row(beside)}
            for what, alone, beside in changed
        ],
        "means": means,
    }
    if recipe.solved_share:
        report.numbers[task]["updates_to_solve"] = _solving_numbers(runs, recipe.solved_share)


def _accuracy_table(runs: TaskRuns) -> Table:
    """Chain accuracy of every method and of the teacher, which is the same under every seed: one seed is taken."""
    known = runs.with_teacher().outcomes
    chosen = claims.buckets(next(iter(known.values()))[0].depths.tolist(), runs.deep)
    return {
        name: {key: statistics.accuracy(found[:1] if name == TEACHER else found, keep) for key, keep in chosen.items()}
        for name, found in known.items()
    }


# The sections of a task. One without rows is left out.


def _accuracies(table: Table, runs: TaskRuns) -> Section:
    rows = []
    for name, row in table.items():
        found = sorted(runs.finished(name), key=lambda outcome: outcome.seed)
        by_seed = ", ".join(f"{100 * outcome.correct[runs.is_deep(outcome.depths)].mean():.0f}" for outcome in found)
        rows.append((name, len(found) or "", *map(_percent, row.values()), by_seed))
    head = ("method", "seeds", *next(iter(table.values())), f"{runs.deep}+, seed by seed")
    return Section("Chain accuracy by depth", head=head, rows=rows)


def _differences(differences: Mapping[str, Difference | None], runs: TaskRuns) -> Section:
    rows = [(name, points(found), *p_and_seeds(found)) for name, found in differences.items()]
    title = f"Against `{runs.baseline}` at {runs.deep} steps and more"
    return Section(title, head=("method", "difference", *TESTED), rows=rows)


def _claims(title: str, what: str, lines: Iterable[Claim]) -> Section:
    rows = [dataclasses.astuple(line) for line in lines]
    return Section(title, head=(what, "here", "article", "verdict"), rows=rows)


def _components(added: Iterable[tuple[str, str, Difference | None]], deep: int) -> Section:
    text = (
        "Every combination was run: each component's differences to the same method without it, and their mean, which "
        "says what the component is worth whatever stands beside it."
    )
    rows = [(component, to, points(found), *p_and_seeds(found)) for component, to, found in added]
    head = ("component", "added to", "difference", *TESTED)
    return Section(f"What each component adds at {deep} steps and more", 3, [text], head, rows)


def _changed(changed: Iterable[tuple[str, Difference | None, Difference | None]], runs: TaskRuns) -> Section:
    plain = runs.combination((False, False, False)) or runs.baseline
    head = ("changed", f"added to `{plain}`", "p", "added to the alignment", "p")
    rows = [
        (what, *(cell for found in pair for cell in (points(found) if found else "-", claims.p_value(found))))
        for what, *pair in changed
    ]
    text = (
        "All depths at once, without the curriculum. The first line is the loss as the article has it. The alignment "
        "it is added to is changed alike where the change is one of both."
    )
    return Section(f"What the coherence loss adds at {runs.deep} steps and more, changed", 3, [text], head, rows)


def _grid(table: Table, runs: TaskRuns) -> Section:
    """Chain accuracy at the deep problems for every pair of weights, the best one first."""
    title, bucket = "Grid over the two weights", f"{runs.deep}+"
    grid = runs.with_role("grid point")
    found = {(runs.methods[name].alignment, runs.methods[name].coherence): table[name][bucket] for name in grid}
    if not found:
        return Section(title)
    best = sorted(found.items(), key=lambda item: -item[1].value)
    rows = [(f"{alignment:g}", f"{coherence:g}", _percent(cell)) for (alignment, coherence), cell in best]
    (weights, first), second = best[0], best[1][1] if len(best) > 1 else best[0][1]
    published = (article.ALIGNMENT_WEIGHT, article.COHERENCE_WEIGHT)
    agreement = "undecided"
    if weights == published and first.low > second.high:
        agreement = "agrees"
    elif published in found and found[published].high < first.low:
        agreement = "disagrees"
    text = (
        f"The article's grid search on held-out data gave {published[0]:g} and {published[1]:g}. Here {weights[0]:g} "
        f"and {weights[1]:g} come out best: {agreement}."
    )
    return Section(title, 3, [text], ("alignment", "coherence", f"chains right, {bucket}"), rows)


def _means(means: Mapping[str, dict[str, float]]) -> Section:
    known = next(iter(means.values()), {})
    columns = {key: column for key, column in MEASURED.items() if key in known}
    rows = [
        (name, *(form.format(scale * row[key]) for key, (_, form, scale) in columns.items()))
        for name, row in means.items()
    ]
    head = ("method", *(title for title, _, _ in columns.values()))
    return Section("What else was measured (means over seeds)", head=head, rows=rows)


def _solving(runs: TaskRuns, share: float) -> Section:
    """How many updates each method needs until a share of the deep validation chains is right."""
    rows = []
    for name, found in _updates_to_solve(runs, share).items():
        budget = max(outcome.curve[-1]["update"] for outcome in runs.finished(name) if outcome.curve)
        middle = float(np.median(list(found.values())))
        ratio = statistics.solving_ratio(runs.finished(name), runs.finished(runs.baseline), share, runs.deep)
        compared = ("-",) * 4
        if name != runs.baseline and ratio is not None:
            ends = claims.with_interval(ratio, ".2f", scale=1) if ratio.faster + ratio.slower else "-"
            compared = (ends, f"{ratio.faster}", f"{ratio.slower}", claims.p_text(ratio.p_value))
        solved = sum(math.isfinite(update) for update in found.values())
        rows.append(
            (
                name,
                f"{solved} of {len(found)}",
                f"{middle:.0f}" if math.isfinite(middle) else f"more than {budget}",
                *compared,
            )
        )
    title = f"Updates until {100 * share:g}% of the validation chains of {runs.deep} steps and more are right"
    text = (
        f"The first evaluation during the run that has them, and the ratio to `{runs.baseline}` under the same seed: "
        "the geometric mean over seeds, below 1 where the method is faster, with Student's t of the logarithms. A run "
        "that does not get there counts as if it did at its end, so such ratios are nearer to 1 than the true ones, "
        "and two runs that both do not are equal. The sign test is exact in spite of this: it takes the pairs in which "
        "one run came before the other."
    )
    head = ("method", "runs", "median", f"updates, to `{runs.baseline}`'s", "first", "second", "p (sign test)")
    return Section(title, 3, [text], head, rows)


def _solving_numbers(runs: TaskRuns, share: float) -> dict[str, Any]:
    """What `_solving` shows, as JSON; null where a run did not get there."""
    numbers: dict[str, Any] = {}
    for name, found in _updates_to_solve(runs, share).items():
        ratio = statistics.solving_ratio(runs.finished(name), runs.finished(runs.baseline), share, runs.deep)
        by_seed = {str(seed): int(update) if math.isfinite(update) else None for seed, update in found.items()}
        numbers[name] = {"by_seed": by_seed, "ratio": None if ratio is None else ratio.json_row()}
    return {"share": share, "methods": numbers}


def _updates_to_solve(runs: TaskRuns, share: float) -> dict[str, dict[int, float]]:
    """`statistics.updates_to_solve` of each method that was evaluated while it trained, by seed; {} without a share."""
    found: dict[str, dict[int, float]] = {}
    for name, outcomes in runs.outcomes.items() if share else ():
        times = {outcome.seed: statistics.updates_to_solve(outcome, share, runs.deep) for outcome in outcomes}
        known = {seed: time for seed, time in sorted(times.items()) if time is not None}
        found |= {name: known} if known else {}
    return found


def _time(runs: TaskRuns) -> Section:
    """When curves reach their plateau, and where each method is when the baseline has finished."""
    limits = {outcome.seed: outcome.curve[-1]["seconds"] for outcome in runs.finished(runs.baseline) if outcome.curve}
    rows = []
    for name, found in pictures.runs_with_curves(runs).items():
        updates, seconds = np.mean([statistics.settled_at(outcome) for outcome in found], axis=0)
        at_limit = [
            statistics.accuracy_at(outcome, limits[outcome.seed]) for outcome in found if outcome.seed in limits
        ]
        final = np.mean([outcome.curve[-1]["chain_accuracy"]["all"] for outcome in found])
        then = f"{100 * np.mean(at_limit):.1f}" if at_limit else "-"
        rows.append((name, f"{100 * final:.1f}", f"{updates:.0f}", f"{seconds:.0f}", then))
    text = (
        "Chain accuracy on validation problems of all depths, in %. A curve has settled at the first evaluation with "
        f"{statistics.SETTLED} of its best. The last column is the accuracy at the time at which `{runs.baseline}` of "
        "the same seed had finished; a method that was not through then stood in the middle of its learning-rate "
        "schedule. Times hold for runs side by side on shared cores, and include compilation."
    )
    if any(outcome.members > 1 for outcomes in runs.outcomes.values() for outcome in outcomes):
        text += " Runs that were trained as one program share its time equally."
    head = ("method", "at the end", "updates to settle", "seconds to settle", f"when {runs.baseline} had finished")
    return Section("Accuracy against updates and time (means over seeds)", 3, [text], head, rows)


def _stages(runs: TaskRuns) -> Section:
    """How the stages of the whole method's curriculum ended, and what the student could do by then."""
    found = [outcome for outcome in runs.finished(runs.whole) if len(outcome.stages) > 1]
    rows = []
    for number, first in enumerate(found[0].stages if found else ()):
        records = [outcome.stages[number] for outcome in found]
        thresholds = [record["threshold"] for record in records if record["threshold"] is not None]
        losses = [record["coherence"] for record in records if record["coherence"] is not None]  # None: no updates left
        solved = [share for outcome in found if (share := statistics.solved_after_stage(outcome, number)) is not None]
        rows.append(
            (
                first["depth"],
                f"{np.mean(thresholds):.3f}" if thresholds else "-",
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
    return Section(f"How the stages of `{runs.whole}` ended (means over seeds)", 3, [text], head, rows)


def _shares_lost(table: Table, runs: TaskRuns) -> dict[str, float | None]:
    if runs.whole is None or runs.baseline not in table:
        return {}
    deep = {name: row[f"{runs.deep}+"] for name, row in table.items()}
    ablations = [name for component in article.SHARE_LOST if (name := runs.without(component)) is not None]
    return {
        name: statistics.share_of_gain_lost(deep[runs.whole], deep[name], deep[runs.baseline]) for name in ablations
    }


def _percent(found: Estimate) -> str:
    return claims.with_interval(found, ".1f", ".0f")
