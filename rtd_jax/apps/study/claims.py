"""What the article reports, and whether runs agree with it.

Agreement is about signs and orders where models and problems differ too much for numbers to be the same: a claim
"agrees" or "disagrees" when a 95% interval lies wholly on one side, and is "undecided" otherwise. Shares and ratios are
compared as numbers: they agree when the article's lies in the interval.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rtd_jax.apps.study.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    Difference,
    Interval,
    Outcome,
    difference,
    mean_difference,
    over_seeds,
    share_interval,
    verdict,
)
from rtd_jax.base.types import Array

# Full-chain accuracy on GSM8K: RTD's gain over KD in points, by number of steps.
ARTICLE_GAINS = {"2": 1.9, "3": 8.3, "4+": 18.7, "5+": 23.1}
# At four steps and more, GSM8K and MATH: gain left without a component, and the share that the article states for it.
ARTICLE_GAIN = ARTICLE_GAINS["4+"]
ARTICLE_ABLATIONS = {"rtd_no_coherence": (7.1, 62), "rtd_no_curriculum": (11.4, 24), "rtd_no_alignment": (13.2, 14)}
ARTICLE_CKA = {1: 0.89, 2: 0.81, 3: 0.72, 4: 0.58}
ARTICLE_AUROC = 0.83
ARTICLE_STEP, ARTICLE_CHAIN = 90.4, 52.6  # % of KD's student at four steps and more
ARTICLE_OVER_TEACHER = 1.3  # points, RTD's student above the teacher at two steps
ARTICLE_OVERHEAD = 60  # % of training time that RTD adds to KD
ARTICLE_SMALL_GAIN = 9.3  # points, the 1B student's gain at four steps and more
NOT_SAID = "not in the article"

# (method, compared with, sign of the difference that the article's account expects, what it says, the article's number)
CLAIMS = (
    ("rtd", "kd", 1, "RTD keeps more deep chains than logit matching", "+18.7"),
    ("rtd", "intermediate_kd", 1, "RTD keeps more deep chains than intermediate-layer matching", "more"),
    ("rtd", "cot_ft", 1, "RTD keeps more deep chains than fine-tuning on the teacher's chains", "more"),
    ("rtd", "step_reward", 1, "RTD keeps more deep chains than step-level rewards", "more"),
    ("rtd", "rtd_no_coherence", 1, "the coherence loss helps", "+11.6"),
    ("rtd", "rtd_no_curriculum", 1, "the curriculum helps", "+7.3"),
    ("rtd", "rtd_no_alignment", 1, "the boundary alignment helps", "+5.5"),
    ("rtd_no_alignment", "rtd_no_coherence", 1, "coherence matters more than alignment", "+6.1"),
    ("self_distillation", "teacher", 1, "self-distillation with coherence improves the teacher itself", "may"),
)
# Controls that the article lacks: no sign is expected of them.
QUESTIONS = (
    ("kd_curriculum", "kd", "is it the curriculum alone?"),
    ("coherence_only", "kd", "does the coherence loss help plain KD?"),
    ("alignment_only", "kd", "does the boundary alignment help plain KD?"),
    ("rtd", "kd_curriculum", "do the hidden-state losses add to the curriculum?"),
    ("rtd", "rtd_random_boundaries", "does it matter that boundaries are where steps end?"),
    ("rtd_no_curriculum", "random_boundaries_no_curriculum", "does it matter where there is no curriculum?"),
    ("rtd", "rtd_all_tokens", "are boundaries better than all tokens?"),
    ("self_distillation", "self_kd", "does coherence add to training the teacher on?"),
    ("rtd", "kd_long", "is RTD better than KD with 1.6 times the updates, about its time?"),
    ("rtd_plateau", "kd_plateau", "is anything left when both have had many more updates?"),
)

# Every combination of the three components, (alignment, coherence, curriculum), and what it is called.
COMPONENTS = ("alignment", "coherence", "curriculum")
COMBINATIONS: dict[tuple[bool, ...], str] = {
    (False, False, False): "kd",
    (True, False, False): "alignment_only",
    (False, True, False): "coherence_only",
    (False, False, True): "kd_curriculum",
    (True, True, False): "rtd_no_curriculum",
    (True, False, True): "rtd_no_coherence",
    (False, True, True): "rtd_no_alignment",
    (True, True, True): "rtd",
}

Runs = dict[str, list[Outcome]]
Chosen = Callable[[Array], Array]


@dataclass(frozen=True)
class Claim:
    """One line: what is claimed, what was found, the article's number, and whether they agree."""

    claim: str
    found: str
    article: str
    verdict: str


def buckets(depths: Sequence[int], deep: int) -> dict[str, Chosen]:
    """Depth buckets by name: each depth, the deep ones, those one step deeper, and all."""
    found: dict[str, Chosen] = {str(depth): partial(np.equal, depth) for depth in sorted(set(depths))}
    found[f"{deep}+"] = lambda x: x >= deep
    if max(depths) > deep:
        found[f"{deep + 1}+"] = lambda x: x > deep
    return found | {"all": lambda x: x > 0}


def with_teacher(runs: Runs) -> Runs:
    """The runs and, as "teacher", the teacher on the same problems: the same under every seed."""
    everyone = [outcome for found in runs.values() for outcome in found]
    found = next(((o, o.teacher_correct) for o in everyone if o.teacher_correct is not None), None)
    if found is None:
        return runs
    taught, correct = found
    seeds = sorted({outcome.seed for outcome in everyone})
    return runs | {"teacher": [dataclasses.replace(taught, method="teacher", seed=s, correct=correct) for s in seeds]}


def deep_difference(runs: Runs, method: str, other: str, deep: int) -> Difference | None:
    return difference(runs[method], runs[other], lambda x: x >= deep)


def gains_by_depth(runs: Runs, baseline: str, deep: int) -> list[Claim]:
    """RTD's gain over the baseline in each depth bucket, beside the article's where it has one."""
    if "rtd" not in runs or baseline not in runs:
        return []
    claims = []
    for name, chosen in buckets(runs["rtd"][0].depths.tolist(), deep).items():
        found = difference(runs["rtd"], runs[baseline], chosen)
        points = ARTICLE_GAINS.get(name)
        says = NOT_SAID if points is None else verdict(1, found)
        claims.append(Claim(name, with_p(found), "-" if points is None else f"{points:+.1f}", says))
    return claims


def shares(runs: Runs, baseline: str, deep: int) -> list[Claim]:
    """Share of RTD's gain that each ablation loses."""
    claims = []
    for name, (points, stated) in ARTICLE_ABLATIONS.items():
        if name not in runs or "rtd" not in runs or baseline not in runs:
            continue
        gain, lost = (deep_difference(runs, "rtd", other, deep) for other in (baseline, name))
        interval = share_interval(runs["rtd"], runs[name], runs[baseline], lambda x: x >= deep)
        found, says = "no gain that is surely there to lose", "undecided"
        if gain is not None and lost is not None and gain.mean > 0:
            found = f"{100 * lost.mean / gain.mean:.0f}%" + ("" if interval is None else _percents(interval))
        if interval is not None:
            says = "agrees" if 100 * interval[0] <= stated <= 100 * interval[1] else "disagrees"
        article = f"{stated}% (from its points {100 * (1 - points / ARTICLE_GAIN):.0f}%)"
        claims.append(Claim(name, found, article, says))
    return claims


def claims_of(runs: Runs, baseline: str, deep: int) -> list[Claim]:
    """The article's claims that these runs can speak to."""
    claims = []
    known = with_teacher(runs)
    for method, other, sign, says, article in CLAIMS:
        if method in known and other in known:
            found = deep_difference(known, method, other, deep)
            shown = f"`{method}` - `{other}` = {with_p(found)}"
            claims.append(Claim(says, shown, article, verdict(sign, found)))
    if "rtd" in known and "teacher" in known and 2 in known["rtd"][0].depths:
        found = difference(known["rtd"], known["teacher"], lambda x: x == 2)
        shown = f"`rtd` - `teacher` = {with_p(found)}"
        article = f"{ARTICLE_OVER_TEACHER:+.1f}"
        claims.append(Claim("the student is better than the teacher at two steps", shown, article, verdict(1, found)))
    return claims + _grows_with_depth(runs, baseline, deep) + _hidden(runs, baseline, deep) + _drifts(runs, baseline)


def questions(runs: Runs, deep: int) -> list[Claim]:
    """Controls that the article does not have."""
    return [
        Claim(asks, f"`{method}` - `{other}` = {with_p(deep_difference(runs, method, other, deep))}", "-", NOT_SAID)
        for method, other, asks in QUESTIONS
        if method in runs and other in runs
    ]


def added_by(runs: Runs, deep: int) -> list[tuple[str, str, Difference | None]]:
    """(component, added to what, difference in deep chain accuracy) over all combinations of the three components.

    Where those with the curriculum were not run, over those of the other two. First of each component is the mean of
    its differences, its main effect. [] where a combination was not run.
    """
    whole = all(name in runs for name in COMBINATIONS.values())
    known = {parts: name for parts, name in COMBINATIONS.items() if whole or not parts[2]}
    if not all(name in runs for name in known.values()):
        return []
    rows = []
    for i, component in enumerate(COMPONENTS if whole else COMPONENTS[:2]):
        pairs = {name: known[(*parts[:i], True, *parts[i + 1 :])] for parts, name in known.items() if not parts[i]}
        mean = mean_difference([(runs[b], runs[a]) for a, b in pairs.items()], lambda x: x >= deep)
        rows.append((component, f"mean of the {len(pairs)}", mean))
        rows += [(component, f"`{a}` (gives `{b}`)", deep_difference(runs, b, a, deep)) for a, b in pairs.items()]
    return rows


def changed_coherence(runs: Runs, deep: int) -> list[tuple[str, Difference | None, Difference | None]]:
    """(what was changed about the coherence loss, what it adds to KD, what it adds to the alignment), in deep chains.

    By name: `coherence_x` against `kd`; `both_x` against `alignment_x`, or `alignment_only` where x does not change the
    alignment. All depths at once. First the loss as it is. None where a run is missing; [] where nothing was changed.
    """

    def adds(method: str, other: str) -> Difference | None:
        return deep_difference(runs, method, other, deep) if method in runs and other in runs else None

    kinds = [name.partition("_") for name in runs if name not in COMBINATIONS.values()]
    changed = dict.fromkeys(what for kind, _, what in kinds if kind in ("coherence", "both"))
    if not changed:
        return []
    found = []
    for what in changed:
        without = f"alignment_{what}" if f"alignment_{what}" in runs else "alignment_only"
        found.append((what, adds(f"coherence_{what}", "kd"), adds(f"both_{what}", without)))
    return [("nothing", adds("coherence_only", "kd"), adds("rtd_no_curriculum", "alignment_only")), *found]


def smaller_gain(of_task: dict[str, Runs], smaller_than: dict[str, str], baseline: str, deep: int) -> list[Claim]:
    """Is RTD's gain smaller for a task's student than for the larger student of the task it is paired with?"""
    claims = []
    for task, larger in smaller_than.items():
        if not all(name in of_task.get(x, {}) for x in (task, larger) for name in ("rtd", baseline)):
            continue
        whole, part = (deep_difference(of_task[x], "rtd", baseline, deep) for x in (larger, task))
        if whole is None or part is None:
            continue
        margin = math.hypot(*((x.high - x.low) / 2 for x in (whole, part)))  # the two tasks' runs are independent
        mean = whole.mean - part.mean
        gap = Interval(mean, mean - margin, mean + margin, part.seeds)
        found = f"{points(whole)} for `{larger}`, {points(part)} for `{task}`: {points(gap)} less"
        article = f"{ARTICLE_GAIN:+.1f} and {ARTICLE_SMALL_GAIN:+.1f}"
        claims.append(Claim("the gain is smaller for a smaller student", found, article, verdict(1, gap)))
    return claims


def _grows_with_depth(runs: Runs, baseline: str, deep: int) -> list[Claim]:
    if "rtd" not in runs or baseline not in runs:
        return []
    deep_gain = deep_difference(runs, "rtd", baseline, deep)
    shallow_gain = difference(runs["rtd"], runs[baseline], lambda x: x < deep)
    if deep_gain is None or shallow_gain is None:
        return []
    outcome = "undecided"
    if shallow_gain.high < deep_gain.low:
        outcome = "agrees"
    elif deep_gain.high < shallow_gain.low:
        outcome = "disagrees"
    found = f"{points(shallow_gain)} below {deep} steps, {points(deep_gain)} from there on"
    return [Claim("the gain over KD grows with depth", found, "+1.9 at 2 steps to +23.1 at 5+", outcome)]


def _hidden(runs: Runs, baseline: str, deep: int) -> list[Claim]:
    """What perplexity and step accuracy do not show, and what RTD costs."""
    claims: list[Claim] = []
    base = runs.get(baseline, [])
    gaps = []
    for outcome in base:
        keys = [key for key in outcome.steps_of_depth if key != "all" and int(key.rstrip("+")) >= deep]
        chains = outcome.correct[outcome.depths >= deep]
        if keys and len(chains):
            gaps.append(float(np.mean([outcome.steps_of_depth[key] for key in keys])) - float(chains.mean()))
    if gaps:
        gap = over_seeds(gaps)
        article = f"{ARTICLE_STEP} - {ARTICLE_CHAIN} = {ARTICLE_STEP - ARTICLE_CHAIN:.1f}"
        text = f"`{baseline}`: single steps are right far more often than whole deep chains"
        claims.append(Claim(text, points(gap), article, verdict(1, gap)))
    ratios = [o.perplexity / o.teacher_perplexity - 1 for o in base if o.teacher_perplexity]
    if ratios:
        ratio = over_seeds(ratios)
        inside = "agrees" if ratio.high <= 0.03 else "disagrees" if ratio.low > 0.03 else "undecided"
        text = f"`{baseline}`'s perplexity is within 3% of the teacher's"
        claims.append(Claim(text, _share(ratio), "within 3%", inside if len(ratios) > 1 else "undecided"))
    costs = [a.seconds / b.seconds - 1 for a in runs.get("rtd", []) for b in base if a.seed == b.seed and b.seconds]
    if costs:
        cost = over_seeds(costs)
        inside = "agrees" if cost.low <= ARTICLE_OVERHEAD / 100 <= cost.high else "disagrees"
        says = inside if len(costs) > 1 else "undecided"
        claims.append(Claim("RTD adds to the training time of KD", _share(cost), f"+{ARTICLE_OVERHEAD}%", says))
    return claims


def _drifts(runs: Runs, baseline: str) -> list[Claim]:
    claims: list[Claim] = []
    falls = []
    for outcome in runs.get(baseline, []):
        curve = cka_curve(outcome)
        if len(curve) > 1:
            falls.append(curve[min(curve)] - curve[max(curve)])
    if falls:
        fall = over_seeds(falls)
        article = f"{ARTICLE_CKA[1]:.2f} - {ARTICLE_CKA[4]:.2f} = {ARTICLE_CKA[1] - ARTICLE_CKA[4]:.2f}"
        text = (
            f"`{baseline}`: likeness to the teacher (debiased CKA, same chains) falls from the first step to the last"
        )
        claims.append(Claim(text, _plain(fall), article, verdict(1, fall)))
    areas = [area - 0.5 for outcome in runs.get("rtd", []) if (area := auroc_within(outcome)) is not None]
    if areas:
        above = over_seeds(areas)
        found = f"{_plain(above)} above 0.5, among steps of the same place and depth"
        text = "the cosine of a transition tells whether the next step is right (`rtd`)"
        claims.append(Claim(text, found, f"AUROC {ARTICLE_AUROC}", verdict(1, above)))
    return claims


def cka_curve(outcome: Outcome) -> dict[int, float]:
    """Debiased CKA by step over the same chains, from step 1 on; {} where it was not measured."""
    steps = (outcome.drift or {}).get("steps", [])
    found = {s["step"]: (s["cka_same_chains"] or {}).get("value") for s in steps if s["step"] >= 1}
    return {step: value for step, value in found.items() if value is not None}


def auroc_within(outcome: Outcome) -> float | None:
    """AUROC of the transition cosine for the next step, among steps of the same place in chains of the same depth."""
    return outcome.drift["relation"]["next_step"]["auroc_within"]["value"] if outcome.drift else None


def points(value: Interval | None) -> str:
    """A difference of accuracies in points with its interval."""
    if value is None:
        return "no common seed"
    low, high = (f"{100 * x:+.1f}" if math.isfinite(x) else "?" for x in (value.low, value.high))
    return f"{100 * value.mean:+.1f} [{low}, {high}]"


def with_p(value: Difference | None) -> str:
    shown = p_value(value)
    return points(value) if shown == "-" else f"{points(value)}, p {shown if shown[0] == '<' else f'= {shown}'}"


def p_value(value: Difference | None) -> str:
    if value is None or value.p_value is None:
        return "-"
    return f"{value.p_value:.3f}" if value.p_value >= 0.001 else "< 0.001"


def p_and_seeds(value: Difference | None) -> tuple[str, str]:
    """The p-value, and where that is not below 0.05 how many seeds would tell a difference of the size seen."""
    if value is None or value.p_value is None or value.seeds_needed is None or value.p_value < 1 - CONFIDENCE:
        return p_value(value), ""
    return p_value(value), f"{value.seeds_needed:,}" if value.seeds_needed < MOST_SEEDS else f"{MOST_SEEDS:,} or more"


def _share(value: Interval) -> str:
    low, high = (f"{100 * x:+.1f}" if math.isfinite(x) else "?" for x in (value.low, value.high))
    return f"{100 * value.mean:+.1f}% [{low}, {high}]"


def _plain(value: Interval) -> str:
    low, high = (f"{x:.3f}" if math.isfinite(x) else "?" for x in (value.low, value.high))
    return f"{value.mean:.3f} [{low}, {high}]"


def _percents(interval: tuple[float, float]) -> str:
    return f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
