"""The study's report: sections of tables, pictures, and the same numbers as JSON. Every line is computed."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtd_jax.apps.report.sections import Picture, Section, markdown_of
from rtd_jax.apps.study.claims import (
    ARTICLE_ABLATIONS,
    ARTICLE_AUROC,
    ARTICLE_CKA,
    Claim,
    Runs,
    added_by,
    auroc_within,
    buckets,
    changed_coherence,
    cka_curve,
    claims_of,
    deep_difference,
    gains_by_depth,
    p_and_seeds,
    p_value,
    points,
    questions,
    shares,
    smaller_gain,
    with_teacher,
)
from rtd_jax.apps.study.statistics import (
    SETTLED,
    Difference,
    Interval,
    Outcome,
    accuracy,
    accuracy_at,
    over_seeds,
    settled_at,
    share_of_gain_lost,
    solved_after_stage,
)

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
SHOWN = ("kd", "rtd", "kd_curriculum", "cot_ft", "step_reward", "intermediate_kd", "teacher")  # in the pictures
_GRID = re.compile(r"grid_a(\d+)_c(\d+)")  # weights of alignment and coherence in hundredths


@dataclass
class Report:
    """What a study found."""

    title: str = TITLE
    intro: tuple[str, ...] = INTRO
    sections: list[Section] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def study_report(
    baseline: str,
    deep: int,
    methods: Sequence[str],
    outcomes: Sequence[Outcome],
    about: Mapping[str, str] | None = None,
    smaller_than: Mapping[str, str] | None = None,
) -> Report:
    """Accuracy by depth, paired differences, ablation shares, claims with verdicts, drift and time, task by task.

    Args:
      baseline: method that differences are taken to.
      deep: steps from which a problem counts as deep.
      methods: in the order in which they are shown, after the baseline and RTD.
      outcomes: finished runs.
      about: what a task is, in words, by its name.
      smaller_than: {task with a smaller student: task with the larger one}.
    """
    report = Report()
    of_task: dict[str, Runs] = {}
    methods = sorted(methods, key=lambda name: (name != baseline, name != "rtd"))  # the two that are compared, then all
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        runs = {name: [o for o in outcomes if (o.task, o.method) == (task, name)] for name in methods}
        of_task[task] = {name: found for name, found in runs.items() if found}
        _task(report, task, (about or {}).get(task, ""), of_task[task], baseline, deep)
    between = smaller_gain(of_task, dict(smaller_than or {}), baseline, deep)
    if between:
        report.sections.append(Section("Between tasks", 2))
        report.sections += _claim_section("A smaller student", between)
        report.numbers["between_tasks"] = [dataclasses.asdict(claim) for claim in between]
    return report


def markdown(report: Report) -> str:
    lines = [f"# {report.title}", ""]
    for sentence in report.intro:
        lines += [sentence, ""]
    for section in report.sections:
        lines += markdown_of(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _task(report: Report, task: str, about: str, runs: Runs, baseline: str, deep: int) -> None:
    known = with_teacher(runs)
    depths = next(iter(runs.values()))[0].depths.tolist()
    # The teacher is the same under every seed: its interval is over problems.
    chosen = buckets(depths, deep)
    table = {
        name: {key: accuracy(found[:1] if name == "teacher" else found, keep) for key, keep in chosen.items()}
        for name, found in known.items()
    }
    differences: dict[str, Difference | None] = {}
    if baseline in runs:
        differences = {n: deep_difference(runs, n, baseline, deep) for n in runs if n != baseline}
    gains, lost = gains_by_depth(runs, baseline, deep), shares(runs, baseline, deep)
    added, changed = added_by(runs, deep), changed_coherence(runs, deep)
    claims, open_questions = claims_of(runs, baseline, deep), questions(runs, deep)
    others = {n: {key: float(np.mean([getattr(o, key) for o in f])) for key in MEASURED} for n, f in runs.items()}
    report.sections += [
        Section(task, 2, [about] if about else ()),
        _accuracies(table, runs, deep),
        *_differences(differences, baseline, deep),
        *_claim_section(f"Gain of `rtd` over `{baseline}` by depth", gains, "steps"),
        *_claim_section("Share of the gain lost by each ablation", lost, "ablation"),
        *_claim_section("The article's claims", claims),
        *_claim_section("Questions the article leaves open", open_questions, "question"),
        *_components(added, deep),
        *_changed(changed, deep),
        *_grid(table, f"{deep}+"),
        _others(others),
        *_drift(runs),
        *_time(runs, baseline),
        *_stages(runs.get("rtd", [])),
    ]
    report.pictures += _pictures(task, table, runs)
    report.numbers[task] = {
        "chain_accuracy": {name: {k: dataclasses.asdict(v) for k, v in row.items()} for name, row in table.items()},
        "differences": {name: d and dataclasses.asdict(d) for name, d in differences.items()},
        "share_of_gain_lost": _shares(table, baseline, f"{deep}+"),
        "gains_by_depth": [dataclasses.asdict(claim) for claim in gains],
        "shares": [dataclasses.asdict(claim) for claim in lost],
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "questions": [dataclasses.asdict(claim) for claim in open_questions],
        "components": [
            {"component": c, "added_to": to, "difference": d and dataclasses.asdict(d)} for c, to, d in added
        ],
        "changed_coherence": [
            {"changed": c, "alone": a and dataclasses.asdict(a), "beside_alignment": b and dataclasses.asdict(b)}
            for c, a, b in changed
        ],
        "means": others,
    }


def _accuracies(table: dict[str, dict[str, Interval]], runs: Runs, deep: int) -> Section:
    rows = []
    for name, row in table.items():
        found = sorted(runs.get(name, []), key=lambda outcome: outcome.seed)
        by_seed = ", ".join(f"{100 * outcome.correct[outcome.depths >= deep].mean():.0f}" for outcome in found)
        rows.append((name, len(found) or "", *(_percent(cell) for cell in row.values()), by_seed))
    head = ("method", "seeds", *next(iter(table.values())), f"{deep}+, seed by seed")
    return Section("Chain accuracy by depth", 3, (), head, rows)


def _differences(differences: dict[str, Difference | None], baseline: str, deep: int) -> list[Section]:
    if not differences:
        return []
    rows = [(name, points(found), *p_and_seeds(found)) for name, found in differences.items()]
    return [Section(f"Against `{baseline}` at {deep} steps and more", 3, (), ("method", "difference", *TESTED), rows)]


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


def _changed(changed: Sequence[tuple[str, Difference | None, Difference | None]], deep: int) -> list[Section]:
    if not changed:
        return []
    head = ("changed", "added to `kd`", "p", "added to the alignment", "p")
    rows = [
        (what, *(cell for d in (a, b) for cell in ((points(d), p_value(d)) if d else ("-", "-"))))
        for what, a, b in changed
    ]
    text = (
        "All depths at once, without the curriculum. The first line is the loss as the article has it. The alignment "
        "it is added to is changed alike where the change is one of both."
    )
    return [Section(f"What the coherence loss adds at {deep} steps and more, changed", 3, [text], head, rows)]


def _grid(table: dict[str, dict[str, Interval]], bucket: str) -> list[Section]:
    """Chain accuracy at the deep problems for every pair of weights, the best one first."""
    found = {}
    for name, row in table.items():
        match = _GRID.fullmatch(name)
        if match:
            found[int(match[1]) / 100, int(match[2]) / 100] = row[bucket]
    if not found:
        return []
    best = sorted(found.items(), key=lambda item: -item[1].mean)
    rows = [(f"{a:g}", f"{c:g}", _percent(cell)) for (a, c), cell in best]
    first, second = best[0], best[1] if len(best) > 1 else best[0]
    apart = first[1].low > second[1].high
    at = found.get((0.3, 0.5))
    says = "undecided"
    if at is not None and first[0] == (0.3, 0.5) and apart:
        says = "agrees"
    elif at is not None and at.high < first[1].low:
        says = "disagrees"
    text = (
        f"The article's grid search on held-out data gave 0.3 and 0.5. Here {first[0][0]:g} and {first[0][1]:g} come "
        f"out best: {says}."
    )
    return [
        Section("Grid over the two weights", 3, [text], ("alignment", "coherence", f"chains right, {bucket}"), rows)
    ]


def _others(others: dict[str, dict[str, float]]) -> Section:
    rows = [
        (name, f"{100 * of['step_accuracy']:.1f}", f"{of['perplexity']:.4f}", *(f"{of[k]:.0f}" for k in MEASURED[2:]))
        for name, of in others.items()
    ]
    head = ("method", "step accuracy %", "perplexity", "updates", "seconds of training")
    return Section("What else was measured (means over seeds)", 3, (), head, rows)


def _drift(runs: Runs) -> list[Section]:
    curves = {name: _mean_curve([cka_curve(outcome) for outcome in found]) for name, found in runs.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return []
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = []
    for name, curve in curves.items():
        areas = [area for outcome in runs[name] if (area := auroc_within(outcome)) is not None]
        cells = [f"{curve[step]:.3f}" if step in curve else "-" for step in steps]
        rows.append((name, *cells, f"{np.mean(areas):.3f}" if areas else "-"))
    of_article = [f"{ARTICLE_CKA[step]:.2f}" if step in ARTICLE_CKA else "-" for step in steps]
    rows.append(("article (biased CKA, KD)", *of_article, f"{ARTICLE_AUROC:.2f}"))
    text = (
        "Debiased CKA between student and teacher at the end of each step, on the validation chains that have them "
        "all; and the AUROC with which the cosine of a transition tells whether the next step is right, among steps of "
        "the same place and depth: through the run's own g where its loss trained one, else through a map fitted on "
        "one half of the chains and used on the other."
    )
    head = ("method", *(f"CKA, step {step}" for step in steps), "AUROC")
    return [Section("Drift (means over seeds)", 3, [text], head, rows)]


def _time(runs: Runs, baseline: str) -> list[Section]:
    """When curves reach their plateau, and where each method is when the baseline has finished."""
    limits = {outcome.seed: outcome.curve[-1]["seconds"] for outcome in runs.get(baseline, []) if outcome.curve}
    rows = []
    for name, found in runs.items():
        seen = [outcome for outcome in found if outcome.curve]
        if not seen:
            continue
        settled = [settled_at(outcome) for outcome in seen]
        at_limit = [accuracy_at(outcome, limits[outcome.seed]) for outcome in seen if outcome.seed in limits]
        final = over_seeds([outcome.curve[-1]["chain_accuracy"]["all"] for outcome in seen])
        rows.append(
            (
                name,
                f"{100 * final.mean:.1f}",
                f"{np.mean([update for update, _ in settled]):.0f}",
                f"{np.mean([seconds for _, seconds in settled]):.0f}",
                f"{100 * np.mean(at_limit):.1f}" if at_limit else "-",
            )
        )
    if not rows:
        return []
    text = (
        "Chain accuracy on validation problems of all depths, in %. A curve has settled at the first look with "
        f"{SETTLED} of its best. The last column is the accuracy at the time at which `{baseline}` of the same seed "
        "had finished; a method that was not through then stood in the middle of its learning-rate schedule. Times "
        "hold for runs side by side on shared cores, and include compilation."
    )
    head = ("method", "at the end", "updates to settle", "seconds to settle", f"when {baseline} had finished")
    return [Section("Accuracy against updates and time (means over seeds)", 3, [text], head, rows)]


def _stages(found: Sequence[Outcome]) -> list[Section]:
    """How the stages of the curriculum ended, and what the student could do by then."""
    found = [outcome for outcome in found if len(outcome.stages) > 1]
    if not found:
        return []
    rows = []
    for number, first in enumerate(found[0].stages):
        records = [outcome.stages[number] for outcome in found]
        losses = [record["coherence"] for record in records if record["coherence"] is not None]  # None: no updates left
        seen = [share for outcome in found if (share := solved_after_stage(outcome, number)) is not None]
        rows.append(
            (
                first["depth"],
                f"{np.mean([record['threshold'] for record in records]):.3f}",
                f"{np.mean(losses):.3f}" if losses else "-",
                f"{sum(record['ended_by'] == 'threshold' for record in records)} of {len(records)}",
                f"{np.mean([record['updates'] for record in records]):.0f}",
                f"{100 * np.mean(seen):.1f}" if seen else "-",
            )
        )
    text = (
        "Coherence loss on validation chains of the stage's depths when it ended, and the threshold, which is the "
        "teacher's own under another context; in how many runs the threshold ended it. The last column is chain "
        "accuracy on validation problems of these depths at the first look after the end."
    )
    head = ("steps", "threshold", "loss at the end", "ended by threshold", "updates", "chains right after it, %")
    return [Section("How the stages of `rtd` ended (means over seeds)", 3, [text], head, rows)]


def _mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Means over the curves that have each step."""
    steps = sorted({step for curve in curves for step in curve})
    return {step: float(np.mean([curve[step] for curve in curves if step in curve])) for step in steps}


def _shares(table: dict[str, dict[str, Interval]], baseline: str, bucket: str) -> dict[str, float | None]:
    if "rtd" not in table or baseline not in table:
        return {}
    return {
        name: share_of_gain_lost(table["rtd"][bucket], table[name][bucket], table[baseline][bucket])
        for name in ARTICLE_ABLATIONS
        if name in table
    }


def _pictures(task: str, table: dict[str, dict[str, Interval]], runs: Runs) -> list[Picture]:
    by_depth = {
        name: [(int(k), *(100 * x for x in (v.mean, v.low, v.high))) for k, v in table[name].items() if k.isdigit()]
        for name in SHOWN
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
    seen = {name: [o for o in runs[name] if o.curve] for name in SHOWN if name in runs}
    seen = {name: outcomes for name, outcomes in seen.items() if outcomes}
    for x, label in (("update", "updates"), ("seconds", "seconds of training")):
        series = {name: _mean_looks(outcomes, x) for name, outcomes in seen.items()}
        if series:
            caption = "On validation problems of all depths; means over seeds."
            title = f"Chain accuracy against {label} ({task})"
            found.append(Picture(f"curve_{x}_{task}", title, caption, label, "chains right, %", series))
    ckas = {name: _mean_curve([cka_curve(o) for o in runs[name]]) for name in SHOWN if name in runs}
    lines = {name: list(curve.items()) for name, curve in ckas.items() if len(curve) > 1}
    if lines:
        caption = "Debiased, on the same validation chains at every step; means over seeds."
        found.append(Picture(f"cka_{task}", f"CKA by step ({task})", caption, "step", "linear CKA", lines))
    return found


def _mean_looks(outcomes: Sequence[Outcome], x: str) -> list[tuple[float, float]]:
    """(x, chain accuracy in %), look by look; looks that not all seeds have are left out."""
    count = min(len(outcome.curve) for outcome in outcomes)
    return [
        (
            float(np.mean([o.curve[i][x] for o in outcomes])),
            100 * float(np.mean([o.curve[i]["chain_accuracy"]["all"] for o in outcomes])),
        )
        for i in range(count)
    ]


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"
