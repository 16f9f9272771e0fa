"""The study's report as Markdown, and the same numbers as JSON. Every line is computed; nothing is edited by hand."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rtd_jax.common.types import Array
from rtd_jax.study.statistics import (
    Difference,
    Interval,
    Outcome,
    accuracy,
    difference,
    share_of_gain_lost,
    verdict,
)

# What the article reports for four-step problems on GSM8K and MATH, in points over KD: RTD 18.7; without coherence 7.1,
# without curriculum 11.4, without alignment 13.2; and the shares it states for the components.
ARTICLE_GAIN = 18.7
ARTICLE_ABLATIONS = {"rtd_no_coherence": (7.1, 62), "rtd_no_curriculum": (11.4, 24), "rtd_no_alignment": (13.2, 14)}
# (method, compared with, sign of the difference that the article's account expects, what it says)
CLAIMS = (
    ("rtd", "kd", 1, "RTD keeps more deep chains than logit matching"),
    ("rtd", "intermediate_kd", 1, "RTD keeps more deep chains than intermediate-layer matching"),
    ("rtd", "cot_ft", 1, "RTD keeps more deep chains than fine-tuning on the teacher's chains"),
    ("rtd", "step_reward", 1, "RTD keeps more deep chains than step-level rewards"),
    ("rtd", "rtd_no_coherence", 1, "the coherence loss helps"),
    ("rtd", "rtd_no_curriculum", 1, "the curriculum helps"),
    ("rtd", "rtd_no_alignment", 1, "the boundary alignment helps"),
    ("rtd_no_alignment", "rtd_no_coherence", 1, "coherence matters more than alignment"),
)
# Controls that the article lacks: no sign is expected of them.
QUESTIONS = (
    ("kd_curriculum", "kd", "is it the curriculum alone?"),
    ("rtd", "kd_curriculum", "do the hidden-state losses add to the curriculum?"),
    ("rtd", "rtd_random_boundaries", "does it matter that boundaries are where steps end?"),
    ("rtd", "rtd_all_tokens", "are boundaries better than all tokens?"),
)

MEASURED = ("step_accuracy", "perplexity", "updates", "seconds")

Runs = dict[str, list[Outcome]]


def markdown(
    baseline: str, deep: int, methods: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[str, dict[str, Any]]:
    """(text, numbers): chain accuracy by depth, paired differences, ablation shares and claims, task by task."""
    text, numbers = [HEADER], {}
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        of_task = [outcome for outcome in outcomes if outcome.task == task]
        runs = {name: [o for o in of_task if o.method == name] for name in methods}
        runs = {name: found for name, found in runs.items() if found}
        lines, numbers[task] = _task(task, runs, baseline, deep)
        text += lines
    return "\n".join(text) + "\n", numbers


HEADER = """# Study: what keeps multi-step reasoning alive in a small student

Written by `launch/study.py`; not edited by hand. Chain accuracy in %: every intermediate result and the answer right,
by free-running greedy decoding on test problems. Intervals are 95%, from a bootstrap over seeds *and* problems.
Differences are paired by seed and problem; p-values are of a two-sided t-test over seeds, not corrected for the number
of comparisons.
"""


def _task(task: str, runs: Runs, baseline: str, deep: int) -> tuple[list[str], dict[str, Any]]:
    table = _accuracies(runs, deep)
    differences = {}
    if baseline in runs:
        differences = {n: _deep_difference(runs, n, baseline, deep) for n in runs if n != baseline}
    shares = _shares(table, baseline, f"{deep}+")
    claims = _claims(runs, baseline, deep)
    others = {
        name: {key: float(np.mean([getattr(outcome, key) for outcome in found])) for key in MEASURED}
        for name, found in runs.items()
    }
    lines = [
        f"## {task}",
        "",
        *_accuracy_lines(table, runs),
        *_difference_lines(differences, baseline, deep),
        *_share_lines(shares),
        *_claim_lines(claims),
        *_question_lines(runs, deep),
        *_other_lines(others),
        "",
    ]
    numbers = {
        "chain_accuracy": {name: {k: dataclasses.asdict(v) for k, v in row.items()} for name, row in table.items()},
        "differences": {name: d and dataclasses.asdict(d) for name, d in differences.items()},
        "share_of_gain_lost": shares,
        "claims": claims,
        "means": others,
    }
    return lines, numbers


def _accuracies(runs: Runs, deep: int) -> dict[str, dict[str, Interval]]:
    """Chain accuracy of every method, and of the teacher, in every depth bucket."""
    depths = sorted(set(next(iter(runs.values()))[0].depths.tolist()))
    buckets: dict[str, Callable[[Array], Array]] = {str(depth): partial(np.equal, depth) for depth in depths}
    buckets |= {f"{deep}+": lambda x: x >= deep, "all": lambda x: x > 0}
    groups = dict(runs)
    for outcome in (outcome for found in runs.values() for outcome in found):
        if outcome.teacher_correct is not None:
            groups["teacher"] = [dataclasses.replace(outcome, correct=outcome.teacher_correct)]
            break
    return {name: {key: accuracy(found, keep) for key, keep in buckets.items()} for name, found in groups.items()}


def _deep_difference(runs: Runs, method: str, other: str, deep: int) -> Difference | None:
    return difference(runs[method], runs[other], lambda x: x >= deep)


def _accuracy_lines(table: dict[str, dict[str, Interval]], runs: Runs) -> list[str]:
    buckets = next(iter(table.values()))
    lines = [_row("method", "seeds", *buckets), _row("---", *["--:"] * (len(buckets) + 1))]
    for name, row in table.items():
        lines.append(_row(name, len(runs.get(name, [])) or "", *(_interval(cell) for cell in row.values())))
    return lines


def _difference_lines(differences: dict[str, Difference | None], baseline: str, deep: int) -> list[str]:
    if not differences:
        return []
    rows = [_row(name, *_difference(found)) for name, found in differences.items()]
    head = [_row("method", "difference", "p"), _row("---", "--:", "--:")]
    return ["", f"### Against `{baseline}` at {deep} steps and more", "", *head, *rows]


def _share_lines(shares: dict[str, float | None]) -> list[str]:
    if not shares:
        return []
    lines = ["", "### Share of the gain lost by each ablation", ""]
    lines += [_row("ablation", "here", "article, from its points", "article, as stated"), _row("---", *["--:"] * 3)]
    for name, share in shares.items():
        points, stated = ARTICLE_ABLATIONS[name]
        here = "no gain to lose" if share is None else f"{100 * share:.0f}%"
        lines.append(_row(name, here, f"{100 * (1 - points / ARTICLE_GAIN):.0f}%", f"{stated}%"))
    return lines


def _claims(runs: Runs, baseline: str, deep: int) -> list[dict[str, str]]:
    claims = []
    for method, other, sign, says in CLAIMS:
        if method in runs and other in runs:
            found = _deep_difference(runs, method, other, deep)
            shown = f"`{method}` - `{other}` = {_with_p(found)}"
            claims.append({"claim": says, "found": shown, "verdict": verdict(sign, found)})
    return claims + _grows_with_depth(runs, baseline, deep)


def _claim_lines(claims: list[dict[str, str]]) -> list[str]:
    if not claims:
        return []
    lines = [f"- {claim['claim']}: {claim['found']}: **{claim['verdict']}**" for claim in claims]
    return ["", "### The article's claims", "", *lines]


def _question_lines(runs: Runs, deep: int) -> list[str]:
    lines = [
        f"- {asks} `{method}` - `{other}` = {_with_p(_deep_difference(runs, method, other, deep))}"
        for method, other, asks in QUESTIONS
        if method in runs and other in runs
    ]
    return ["", "### Questions the article leaves open", "", *lines] if lines else []


def _other_lines(others: dict[str, dict[str, float]]) -> list[str]:
    lines = ["", "### What else was measured (means over seeds)", ""]
    lines += [_row("method", "step accuracy %", "perplexity", "updates", "seconds"), _row("---", *["--:"] * 4)]
    for name, of in others.items():
        accuracy_percent = f"{100 * of['step_accuracy']:.1f}"
        lines.append(_row(name, accuracy_percent, f"{of['perplexity']:.4f}", *(f"{of[k]:.0f}" for k in MEASURED[2:])))
    return lines


def _shares(table: dict[str, dict[str, Interval]], baseline: str, bucket: str) -> dict[str, float | None]:
    if "rtd" not in table or baseline not in table:
        return {}
    return {
        name: share_of_gain_lost(table["rtd"][bucket], table[name][bucket], table[baseline][bucket])
        for name in ARTICLE_ABLATIONS
        if name in table
    }


def _grows_with_depth(runs: Runs, baseline: str, deep: int) -> list[dict[str, str]]:
    if "rtd" not in runs or baseline not in runs:
        return []
    deep_gain = difference(runs["rtd"], runs[baseline], lambda x: x >= deep)
    shallow_gain = difference(runs["rtd"], runs[baseline], lambda x: x < deep)
    if deep_gain is None or shallow_gain is None:
        return []
    if shallow_gain.high < deep_gain.low:
        outcome = "agrees"
    elif deep_gain.high < shallow_gain.low:
        outcome = "disagrees"
    else:
        outcome = "undecided"
    found = f"{_difference(shallow_gain)[0]} below {deep} steps, {_difference(deep_gain)[0]} from there on"
    return [{"claim": "the gain over KD grows with depth", "found": found, "verdict": outcome}]


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _interval(value: Interval) -> str:
    return f"{100 * value.mean:.1f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def _difference(value: Difference | None) -> tuple[str, str]:
    if value is None:
        return "no common seed", "-"
    p_value = "-" if value.p_value is None else f"{value.p_value:.3f}" if value.p_value >= 0.001 else "< 0.001"
    return f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]", p_value


def _with_p(value: Difference | None) -> str:
    return " p=".join(_difference(value))
