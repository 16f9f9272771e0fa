"""What the article reports, and whether a task's runs agree with it.

Agreement is about signs and orders where models and problems differ too much for numbers to be the same: a claim
"agrees" or "disagrees" when a 95% interval lies wholly on one side, and is "undecided" otherwise. Shares and ratios are
compared as numbers: they agree when the article's lies in the interval.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from rtd_jax.apps.report import article
from rtd_jax.apps.study.recipe import Method, Role
from rtd_jax.apps.study.statistics import (
    MOST_SEEDS,
    Chosen,
    Difference,
    Outcome,
    auroc_within,
    cka_curve,
    difference,
    mean_difference,
    share_interval,
)
from rtd_jax.base.types import Array
from rtd_jax.eval.estimates import CONFIDENCE, Estimate, over_seeds

TEACHER = "teacher"  # stands among the methods, with the teacher's answers to the same problems
NOT_SAID = "not in the article"
# In the order of `Method.components`.
COMPONENTS = {"alignment": "the boundary alignment", "coherence": "the coherence loss", "curriculum": "the curriculum"}
# Every combination of the three, those with few components first.
COMBINATIONS = sorted(itertools.product((False, True), repeat=3), key=lambda has: (sum(has), [not x for x in has]))


@dataclass(frozen=True)
class Claim:
    """One line: what is claimed, what was found, the article's number, and whether they agree."""

    claim: str
    found: str
    article: str
    verdict: str


@dataclass(frozen=True)
class TaskRuns:
    """The finished runs of one task by method, and what the methods are."""

    outcomes: Mapping[str, Sequence[Outcome]]  # only methods that have finished runs
    methods: Mapping[str, Method]
    baseline: str  # the method that differences are taken to
    deep: int  # steps from which a problem counts as deep

    @property
    def whole(self) -> str | None:
        """The method that the study is about; None where it has no finished runs."""
        return next(iter(self.with_role("whole")), None)

    @property
    def has_gain(self) -> bool:
        """Whether both the whole method and the baseline have finished runs."""
        return self.whole is not None and self.baseline in self.outcomes

    def finished(self, method: str | None) -> Sequence[Outcome]:
        """A method's finished runs."""
        return self.outcomes.get(method or "", ())

    def with_role(self, *roles: Role) -> list[str]:
        """Finished methods of these roles."""
        return [name for name in self.outcomes if name in self.methods and self.methods[name].role in roles]

    def combination(self, components: tuple[bool, ...]) -> str | None:
        """The finished method that has exactly these components at the study's weights."""
        names = self.with_role("baseline", "whole", "ablation", "part")
        return next((name for name in names if self.methods[name].components == components), None)

    def without(self, component: str) -> str | None:
        """The finished ablation that lacks this component."""
        lacking = tuple(name != component for name in COMPONENTS)
        return next((name for name in self.with_role("ablation") if self.methods[name].components == lacking), None)

    def difference(self, method: str | None, other: str | None, chosen: Chosen | None = None) -> Difference | None:
        """Chain accuracy of a method less another's, on the deep problems by default; None without common seeds."""
        runs, others = self.finished(method), self.finished(other)
        return difference(runs, others, chosen or self.is_deep) if runs and others else None

    def gain(self, chosen: Chosen | None = None) -> Difference | None:
        """The difference between the whole method and the baseline."""
        return self.difference(self.whole, self.baseline, chosen)

    def is_deep(self, depths: Array) -> Array:
        return depths >= self.deep

    def with_teacher(self) -> "TaskRuns":
        """The runs and, as one more method, the teacher on the same problems: the same under every seed."""
        everyone = [outcome for runs in self.outcomes.values() for outcome in runs]
        seeds = sorted({outcome.seed for outcome in everyone})
        for outcome in everyone:
            if (correct := outcome.teacher_correct) is not None:
                teacher = dataclasses.replace(outcome, method=TEACHER, correct=correct)
                taught = [dataclasses.replace(teacher, seed=seed) for seed in seeds]
                return dataclasses.replace(self, outcomes={**self.outcomes, TEACHER: taught})
        return self


def verdict(found: Estimate | None) -> str:
    """Whether a quantity is positive: "agrees", "disagrees" or "undecided".

    It is undecided where the interval holds 0, and with one seed.
    """
    if found is None or found.n < 2 or not math.isfinite(found.low):
        return "undecided"
    return _verdict(found.low > 0, found.high < 0)


def _verdict(agrees: bool, disagrees: bool) -> str:
    return "agrees" if agrees else "disagrees" if disagrees else "undecided"


def buckets(depths: Sequence[int], deep: int) -> dict[str, Chosen]:
    """Depth buckets by name: each depth, the deep ones, those one step deeper, and all."""
    found: dict[str, Chosen] = {str(depth): partial(np.equal, depth) for depth in sorted(set(depths))}
    found[f"{deep}+"] = lambda depths: depths >= deep
    if max(depths) > deep:
        found[f"{deep + 1}+"] = lambda depths: depths > deep
    return found | {"all": lambda depths: depths > 0}


def gains_by_depth(runs: TaskRuns) -> list[Claim]:
    """Gain of the whole method over the baseline in each depth bucket, beside the article's where it has one."""
    if not runs.has_gain:
        return []
    claims = []
    for name, chosen in buckets(runs.finished(runs.whole)[0].depths.tolist(), runs.deep).items():
        gain, published = runs.gain(chosen), article.GAINS.get(name)
        if published is None:
            claims.append(Claim(name, points_with_p(gain), "-", NOT_SAID))
        else:
            claims.append(Claim(name, points_with_p(gain), f"{published:+.1f}", verdict(gain)))
    return claims


def shares(runs: TaskRuns) -> list[Claim]:
    """Share of the whole method's gain that each ablation loses."""
    claims = []
    for component, stated in article.SHARE_LOST.items():
        ablation = runs.without(component)
        if ablation is None or not runs.has_gain:
            continue
        gain, lost = runs.gain(), runs.difference(runs.whole, ablation)
        full, ablated, baseline = (runs.finished(name) for name in (runs.whole, ablation, runs.baseline))
        interval = share_interval(full, ablated, baseline, runs.is_deep)
        found, agreement = "no gain that is surely there to lose", "undecided"
        if gain is not None and lost is not None and gain.value > 0:
            found = f"{100 * lost.value / gain.value:.0f}%"
            if interval is not None:
                low, high = (100 * end for end in interval)
                found += f" [{low:.0f}, {high:.0f}]"
                agreement = "agrees" if low <= stated <= high else "disagrees"
        from_points = 100 * (1 - article.GAIN_WITHOUT[component] / article.DEEP_GAIN)
        claims.append(Claim(ablation, found, f"{stated}% (from its points {from_points:.0f}%)", agreement))
    return claims


def article_claims(runs: TaskRuns) -> list[Claim]:
    """The article's claims on which these runs have something to say."""
    known = runs.with_teacher()
    claims = [
        Claim(text, _difference_text(known, method, other), published, verdict(known.difference(method, other)))
        for method, other, text, published in _expected_differences(known)
        if known.finished(method) and known.finished(other)
    ]
    if known.whole and TEACHER in known.outcomes and 2 in known.finished(known.whole)[0].depths:
        found = known.difference(known.whole, TEACHER, lambda depths: depths == 2)
        shown = f"`{known.whole}` - `{TEACHER}` = {points_with_p(found)}"
        text = "the student is better than the teacher at two steps"
        claims.append(Claim(text, shown, f"{article.OVER_TEACHER:+.1f}", verdict(found)))
    return claims + _claims_on_growth(runs) + _claims_on_errors_and_cost(runs) + _claims_on_drift(runs)


def _expected_differences(runs: TaskRuns) -> list[tuple[str | None, str | None, str, str]]:
    """(method, other, what the article says of their difference, its number); all differences should be positive."""
    left = article.GAIN_WITHOUT
    expected: list[tuple[str | None, str | None, str, str]] = []
    for rival in sorted(runs.with_role("baseline", "rival"), key=lambda name: runs.methods[name].place):
        text = f"RTD keeps more deep chains than {runs.methods[rival].caption or rival}"
        published = f"{article.DEEP_GAIN:+.1f}" if runs.methods[rival].role == "baseline" else "more"
        expected.append((runs.whole, rival, text, published))
    for component, points_left in left.items():
        published = f"{article.DEEP_GAIN - points_left:+.1f}"
        expected.append((runs.whole, runs.without(component), f"{COMPONENTS[component]} helps", published))
    published = f"{left['alignment'] - left['coherence']:+.1f}"
    pair = runs.without("alignment"), runs.without("coherence")
    expected.append((*pair, "coherence matters more than alignment", published))
    text = "self-distillation with coherence improves the teacher itself"
    return expected + [(name, TEACHER, text, "may") for name in runs.with_role("self-distillation")]


def questions(runs: TaskRuns) -> list[Claim]:
    """The differences that methods ask for with a question; no sign of them is in the article.

    First come questions about the baseline. Others stand where the later of their two methods stands.
    """
    asked = [
        (method, other, question)
        for method in runs.outcomes
        for other, question in runs.methods[method].compared_with.items()
        if question and other in runs.outcomes
    ]
    asked.sort(key=lambda row: (row[1] != runs.baseline, max(runs.methods[name].place for name in row[:2])))
    return [Claim(question, _difference_text(runs, method, other), "-", NOT_SAID) for method, other, question in asked]


def component_gains(runs: TaskRuns) -> list[tuple[str, str, Difference | None]]:
    """(component, added to what, difference in deep chain accuracy) over all combinations of the three components.

    Where those with the curriculum were not run, over those of the other two. First of each component is the mean of
    its differences, its main effect. [] where a combination was not run.
    """
    finished = {has: name for has in COMBINATIONS if (name := runs.combination(has)) is not None}
    complete = len(finished) == len(COMBINATIONS)
    names = {has: name for has, name in finished.items() if complete or not has[2]}
    if len(names) < (8 if complete else 4):
        return []
    rows: list[tuple[str, str, Difference | None]] = []
    for i, component in enumerate(COMPONENTS if complete else list(COMPONENTS)[:2]):
        pairs = [(name, names[(*has[:i], True, *has[i + 1 :])]) for has, name in names.items() if not has[i]]
        mean = mean_difference([(runs.finished(b), runs.finished(a)) for a, b in pairs], runs.is_deep)
        rows.append((component, f"mean of the {len(pairs)}", mean))
        rows += [(component, f"`{a}` (gives `{b}`)", runs.difference(b, a)) for a, b in pairs]
    return rows


def changed_coherence(runs: TaskRuns) -> list[tuple[str, Difference | None, Difference | None]]:
    """(what was changed about the coherence loss, what it adds by itself, what it adds to the alignment), deep chains.

    Each condition is compared with the method that it names, all depths at once. First the loss as it is. None where a
    run is missing; [] where there are no conditions.
    """
    changed: dict[str, list[Difference | None]] = {}
    for name in runs.with_role("condition"):
        alignment, coherence, _ = runs.methods[name].components
        if not coherence:
            continue  # it is there to be compared with
        row = changed.setdefault(runs.methods[name].caption, [None, None])
        for other in runs.methods[name].compared_with:
            row[alignment] = runs.difference(name, other)
    if not changed:
        return []
    baseline, alone, aligned, both = (
        runs.combination(has) for has in itertools.product(*[(False, True)] * 2, (False,))
    )
    unchanged = ("nothing", runs.difference(alone, baseline), runs.difference(both, aligned))
    return [unchanged, *((what, by_itself, beside) for what, (by_itself, beside) in changed.items())]


def smaller_gain(tasks: Mapping[str, TaskRuns], smaller_than: Mapping[str, str]) -> list[Claim]:
    """Is the gain smaller for a task's student than for the larger student of the task it is paired with?"""
    claims = []
    for task, larger in smaller_than.items():
        whole, part = (tasks[name].gain() if name in tasks else None for name in (larger, task))
        if whole is None or part is None:
            continue
        margin = math.hypot(*((x.high - x.low) / 2 for x in (whole, part)))  # the two tasks' runs are independent
        mean = whole.value - part.value
        gap = Estimate(mean, mean - margin, mean + margin, part.n)
        found = f"{points(whole)} for `{larger}`, {points(part)} for `{task}`: {points(gap)} less"
        published = f"{article.DEEP_GAIN:+.1f} and {article.SMALL_STUDENT_GAIN:+.1f}"
        claims.append(Claim("the gain is smaller for a smaller student", found, published, verdict(gap)))
    return claims


def _claims_on_growth(runs: TaskRuns) -> list[Claim]:
    deep, shallow = runs.gain(), runs.gain(lambda depths: depths < runs.deep)
    if deep is None or shallow is None:
        return []
    found = f"{points(shallow)} below {runs.deep} steps, {points(deep)} from there on"
    published = f"{article.GAINS['2']:+.1f} at 2 steps to {article.GAINS['5+']:+.1f} at 5+"
    agreement = _verdict(shallow.high < deep.low, deep.high < shallow.low)
    return [Claim("the gain over KD grows with depth", found, published, agreement)]


def _claims_on_errors_and_cost(runs: TaskRuns) -> list[Claim]:
    """What perplexity and step accuracy do not show, and what the whole method costs."""
    claims: list[Claim] = []
    baseline = runs.finished(runs.baseline)
    gaps = []
    for outcome in baseline:
        table = outcome.step_accuracy_by_depth
        steps = [table[key] for key in table if key != "all" and int(key.rstrip("+")) >= runs.deep]
        chains = outcome.correct[runs.is_deep(outcome.depths)]
        if steps and len(chains):
            gaps.append(float(np.mean(steps)) - float(chains.mean()))
    if gaps:
        gap = over_seeds(gaps)
        text = f"`{runs.baseline}`: single steps are right far more often than whole deep chains"
        published = f"{article.DEEP_STEP_ACCURACY} - {article.DEEP_CHAIN_ACCURACY} = {article.GAP:.1f}"
        claims.append(Claim(text, points(gap), published, verdict(gap)))
    ratios = [o.perplexity / o.teacher_perplexity - 1 for o in baseline if o.teacher_perplexity]
    if ratios:
        ratio, most = over_seeds(ratios), article.PERPLEXITY_ABOVE_TEACHER
        text = f"`{runs.baseline}`'s perplexity is within {most}% of the teacher's"
        agreement = _verdict(ratio.high <= most / 100, ratio.low > most / 100)
        claims.append(Claim(text, with_interval(ratio, "+.1f", unit="%"), f"within {most}%", agreement))
    pairs = [(a, b) for a in runs.finished(runs.whole) for b in baseline if a.seed == b.seed and b.seconds]
    if pairs:
        cost = over_seeds([a.seconds / b.seconds - 1 for a, b in pairs])
        is_inside = cost.low <= article.OVERHEAD / 100 <= cost.high
        agreement = _verdict(cost.n > 1 and is_inside, not is_inside)
        text, published = "RTD adds to the training time of KD", f"+{article.OVERHEAD}%"
        claims.append(Claim(text, with_interval(cost, "+.1f", unit="%"), published, agreement))
    return claims


def _claims_on_drift(runs: TaskRuns) -> list[Claim]:
    claims: list[Claim] = []
    curves = [curve for outcome in runs.finished(runs.baseline) if len(curve := cka_curve(outcome.drift)) > 1]
    if curves:
        fall = over_seeds([curve[min(curve)] - curve[max(curve)] for curve in curves])
        first, last = article.CKA[1], article.CKA[4]
        text = (
            f"`{runs.baseline}`: likeness to the teacher (debiased CKA, same chains) falls from the first step to the "
            "last"
        )
        published = f"{first:.2f} - {last:.2f} = {first - last:.2f}"
        claims.append(Claim(text, with_interval(fall, ".3f", scale=1), published, verdict(fall)))
    areas = [area for outcome in runs.finished(runs.whole) if (area := auroc_within(outcome.drift)) is not None]
    if areas:
        above = over_seeds([area - 0.5 for area in areas])
        found = f"{with_interval(above, '.3f', scale=1)} above 0.5, among steps of the same place and depth"
        text = f"the cosine of a transition tells whether the next step is right (`{runs.whole}`)"
        claims.append(Claim(text, found, f"AUROC {article.AUROC}", verdict(above)))
    return claims


def with_interval(found: Estimate, form: str, ends: str = "", *, scale: int = 100, unit: str = "") -> str:
    """A value with its interval: "12.3% [10.1, 14.5]", and a question mark for an end that is not known.

    Args:
      form: format of the value.
      ends: format of the ends, by default that of the value.
    """
    low, high = (f"{scale * end:{ends or form}}" if math.isfinite(end) else "?" for end in (found.low, found.high))
    return f"{scale * found.value:{form}}{unit} [{low}, {high}]"


def points(found: Estimate | None) -> str:
    """A difference of accuracies in points with its interval."""
    return "no common seed" if found is None else with_interval(found, "+.1f")


def points_with_p(found: Difference | None) -> str:
    """`points`, and the p-value where there is one."""
    shown = p_value(found)
    return points(found) if shown == "-" else f"{points(found)}, p {shown if shown[0] == '<' else f'= {shown}'}"


def p_value(found: Difference | None) -> str:
    """The p-value as text, "-" where there is none."""
    return p_text(None if found is None else found.p_value)


def p_text(value: float | None) -> str:
    """A p-value as text, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def p_and_seeds(found: Difference | None) -> tuple[str, str]:
    """The p-value, and where that is not below 0.05 how many seeds would tell a difference of the size seen."""
    if found is None or found.p_value is None or found.seeds_needed is None or found.p_value < 1 - CONFIDENCE:
        return p_value(found), ""
    return p_value(found), f"{found.seeds_needed:,}" if found.seeds_needed < MOST_SEEDS else f"{MOST_SEEDS:,} or more"


def _difference_text(runs: TaskRuns, method: str | None, other: str | None) -> str:
    return f"`{method}` - `{other}` = {points_with_p(runs.difference(method, other))}"
