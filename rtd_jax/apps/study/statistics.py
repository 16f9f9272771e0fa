"""From finished runs to estimates over seeds and problems, and numbers from the curves of a run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from scipy import stats

from rtd_jax.base.types import Array
from rtd_jax.eval.estimates import (
    CONFIDENCE,
    Estimate,
    over_seeds,
    over_seeds_and_problems,
    percentile_interval,
    resampled_means,
)

RESAMPLES = 2_000
POWER = 0.8
MOST_SEEDS = 1_000  # a difference that needs more is not to be found by adding seeds
SETTLED = 0.95  # share of a curve's best at which it counts as having reached its plateau


Chosen = Callable[[Array], Array]  # depths -> which of the problems are taken


@dataclass(frozen=True, eq=False)
class Outcome:
    """One finished run on its test problems, which are the same in the same order for every run of a task."""

    task: str
    method: str
    seed: int
    depths: np.ndarray  # int [problems]
    correct: np.ndarray  # bool [problems]: every step and the answer are right, free-running
    teacher_correct: np.ndarray | None  # bool [problems]
    step_accuracy: float  # teacher-forced, over all depths
    perplexity: float  # infinite where the student diverged
    updates: int
    seconds: float  # of training, with calibration and compilation, without evaluations
    step_accuracy_by_depth: dict[str, float] = field(default_factory=dict)  # teacher-forced
    teacher_perplexity: float | None = None
    drift: dict[str, Any] | None = None  # see `rtd_jax.eval.drift.measure`
    # Evaluations during the run: {"update", "seconds", "chain_accuracy": {depth: mean}}.
    curve: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()  # see `rtd_jax.train.curriculum.StageRecord`
    tokens: int | None = None  # predicted tokens that it was trained on; None where an earlier version wrote the report
    members: int = 1  # of the ensemble that it was trained in; its time is an equal share of the ensemble's


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference of two methods over seeds and problems; `n` counts the seeds."""

    p_value: float | None = None  # of a two-sided t-test over seeds; None where that is undefined
    seeds_needed: int | None = None  # see `seeds_to_find`; None where there is no p-value


@dataclass(frozen=True)
class SolvingRatio(Estimate):
    """Updates to solve of a method over those of another, paired by seed; `n` counts the pairs. Below 1 is faster.

    Attributes:
      faster, slower: pairs in which the method came first, and second.
      p_value: of a two-sided sign test over those; None where there are none.
    """

    faster: int = 0
    slower: int = 0
    p_value: float | None = None

    def json_row(self) -> dict[str, Any]:
        """How study.json writes it."""
        names = {"value": "ratio", "n": "seeds"}
        return {names.get(x.name, x.name): getattr(self, x.name) for x in fields(self) if x.name != "stderr"}


def json_row(found: Estimate | None) -> dict[str, Any] | None:
    """How study.json writes an estimate over seeds."""
    if found is None:
        return None
    row: dict[str, Any] = {"mean": found.value, "low": found.low, "high": found.high, "seeds": found.n}
    if isinstance(found, Difference):
        row |= {"p_value": found.p_value, "seeds_needed": found.seeds_needed}
    return row


def accuracy(outcomes: Sequence[Outcome], chosen: Chosen) -> Estimate:
    """Chain accuracy of one method over its seeds, on the problems whose depth `chosen` keeps."""
    found = over_seeds_and_problems(_table(outcomes, chosen))
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def difference(outcomes: Sequence[Outcome], baseline: Sequence[Outcome], chosen: Chosen) -> Difference | None:
    """Chain accuracy of a method minus the baseline's, paired by seed and problem; None without a common seed."""
    return mean_difference([(outcomes, baseline)], chosen)


def mean_difference(pairs: Sequence[tuple[Sequence[Outcome], Sequence[Outcome]]], chosen: Chosen) -> Difference | None:
    """Mean over pairs of (method, baseline) of their paired differences, on the seeds that all of them have."""
    tables = _paired_tables([runs for pair in pairs for runs in pair], chosen)
    if not tables:
        return None
    table_SP = np.mean([tables[i] - tables[i + 1] for i in range(0, len(tables), 2)], axis=0)
    per_seed = table_SP.mean(axis=1)
    p_value = needed = None
    if len(per_seed) > 1 and np.ptp(per_seed) > 0:
        p_value, needed = float(stats.ttest_1samp(per_seed, 0.0).pvalue), seeds_to_find(per_seed)
    found = over_seeds_and_problems(table_SP)
    return Difference(found.value, found.low, found.high, found.n, p_value=p_value, seeds_needed=needed)


def seeds_to_find(per_seed: Array) -> int:
    """Seeds with which a two-sided t-test finds a difference of the mean and spread seen here with probability POWER.

    The power is that of Student's noncentral t. At most MOST_SEEDS.
    """
    effect = abs(np.mean(per_seed)) / np.std(per_seed, ddof=1)
    for seeds in range(2, MOST_SEEDS):
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        if not stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds)) < POWER:  # NaN for enormous effects
            return seeds
    return MOST_SEEDS


def share_of_gain_lost(full: Estimate, ablated: Estimate, baseline: Estimate) -> float | None:
    """(full - ablated) / (full - baseline); None where there is no gain to lose."""
    gain = full.value - baseline.value
    return (full.value - ablated.value) / gain if gain > 0 else None


def share_interval(
    full: Sequence[Outcome], ablated: Sequence[Outcome], baseline: Sequence[Outcome], chosen: Chosen
) -> tuple[float, float] | None:
    """95% interval of (full - ablated) / (full - baseline), by a bootstrap of seeds and problems alike for all three.

    None without a common seed, or where the gain's own interval does not lie above 0: there is nothing to share out.
    """
    tables = _paired_tables((full, ablated, baseline), chosen)
    whole = difference(full, baseline, chosen)
    if not tables or whole is None or whole.low <= 0:
        return None
    full_R, ablated_R, baseline_R = (resampled_means(table, RESAMPLES) for table in tables)
    gain_R = full_R - baseline_R
    is_positive_R = gain_R > 0  # in all but a few draws
    return percentile_interval((full_R - ablated_R)[is_positive_R] / gain_R[is_positive_R])


def share_left(
    before: tuple[Sequence[Outcome], Sequence[Outcome]],
    after: tuple[Sequence[Outcome], Sequence[Outcome]],
    chosen: Chosen,
) -> Estimate | None:
    """What share of the gain of a method over a baseline is left when both are changed: after / before, with 95%.

    By a bootstrap of seeds and problems alike for all four. None without a common seed, or where the gain's own
    interval does not lie above 0.

    Args:
      before, after: (method, baseline).
    """
    tables = _paired_tables((*before, *after), chosen)
    whole = difference(*before, chosen)
    if not tables or whole is None or whole.low <= 0:
        return None
    method_R, baseline_R, later_R, later_baseline_R = (resampled_means(table, RESAMPLES) for table in tables)
    gain_R, left_R = method_R - baseline_R, later_R - later_baseline_R
    is_positive_R = gain_R > 0  # in all but a few draws
    low, high = percentile_interval(left_R[is_positive_R] / gain_R[is_positive_R])
    means = [float(table.mean()) for table in tables]
    return Estimate((means[2] - means[3]) / (means[0] - means[1]), low, high, len(tables[0]))


def solved_after_stage(outcome: Outcome, number: int) -> float | None:
    """Chain accuracy of the first evaluation at or after the end of a stage: the mean over the stage's depths.

    Depths are written "3", "5+" or "1-2". None without such an evaluation.
    """
    end = sum(record["updates"] for record in outcome.stages[: number + 1])
    depths = outcome.stages[number]["depth"]
    low, _, high = depths.rstrip("+").partition("-")
    last = math.inf if depths.endswith("+") else int(high or low)
    found: dict[str, float] = next((at["chain_accuracy"] for at in outcome.curve if at["update"] >= end), {})
    chosen = [x for key, x in found.items() if key.isdigit() and int(low) <= int(key) <= last]
    return float(np.mean(chosen)) if chosen else None


def settled_at(outcome: Outcome) -> tuple[int, float]:
    """(update, seconds) of the first evaluation during the run with at least SETTLED of the curve's best accuracy."""
    best = max(at["chain_accuracy"]["all"] for at in outcome.curve)
    first = next(at for at in outcome.curve if at["chain_accuracy"]["all"] >= SETTLED * best)
    return first["update"], first["seconds"]


def updates_to_solve(outcome: Outcome, share: float, deep: int) -> float | None:
    """The first evaluation during the run, in updates, with at least `share` of the deep validation chains right.

    Infinite where no evaluation has: the run is censored at its last one. None where none looked at deep chains.
    """
    found: list[tuple[int, float]] = []
    for at in outcome.curve:
        right = [x for depth, x in at["chain_accuracy"].items() if depth != "all" and int(depth.rstrip("+")) >= deep]
        if right:
            found.append((at["update"], float(np.mean(right))))
    if not found:
        return None
    return next((float(update) for update, right in found if right >= share), math.inf)


def solving_ratio(
    outcomes: Sequence[Outcome], baseline: Sequence[Outcome], share: float, deep: int
) -> SolvingRatio | None:
    """How many times as many updates a method needs to solve a task as a baseline does; None without a common seed.

    exp of the mean over seeds of log(min(T, B) / min(T', B)), with the times T and T' of `updates_to_solve` and the
    updates B that both runs of the pair had; the interval is Student's t of the logarithms. So the ratio is that of
    times restricted to the budget: a run that has not solved the task by then counts as if it did so at that moment. It
    would have needed more, so where one of a pair has not the true ratio is further from 1; where neither has, they are
    equal within the budget. The sign test asks only who came first, which the budget cannot change; pairs in which both
    came at the same evaluation, or neither did, take no part in it.
    """
    others = {outcome.seed: outcome for outcome in baseline}
    logarithms, order = [], []
    for outcome in outcomes:
        other = others.get(outcome.seed)
        own = updates_to_solve(outcome, share, deep)
        its = None if other is None else updates_to_solve(other, share, deep)
        if other is None or own is None or its is None:
            continue
        budget = min(outcome.curve[-1]["update"], other.curve[-1]["update"])
        own, its = (time if time <= budget else math.inf for time in (own, its))
        logarithms.append(math.log(min(own, budget) / min(its, budget)))
        order.append((own > its) - (own < its))
    if not logarithms:
        return None
    found = over_seeds(logarithms)
    faster, slower = order.count(-1), order.count(1)
    p_value = float(stats.binomtest(faster, faster + slower).pvalue) if faster + slower else None
    value, low, high = (math.exp(x) for x in (found.value, found.low, found.high))
    return SolvingRatio(value, low, high, found.n, faster=faster, slower=slower, p_value=p_value)


def accuracy_at(outcome: Outcome, seconds: float) -> float:
    """Accuracy of the last evaluation during the run that is not later than `seconds`; 0 before the first."""
    accuracies = [at["chain_accuracy"]["all"] for at in outcome.curve if at["seconds"] <= seconds]
    return accuracies[-1] if accuracies else 0.0


def cka_curve(drift: dict[str, Any] | None) -> dict[int, float]:
    """Debiased CKA by step over the same chains, from step 1 on; {} where it was not measured."""
    steps = (drift or {}).get("steps", [])
    found = {s["step"]: (s["cka_same_chains"] or {}).get("value") for s in steps if s["step"] >= 1}
    return {step: value for step, value in found.items() if value is not None}


def auroc_within(drift: dict[str, Any] | None) -> float | None:
    """AUROC of the transition cosine for the next step, among steps of the same place in chains of the same depth."""
    return drift["relation"]["next_step"]["auroc_within"]["value"] if drift else None


def _paired_tables(methods: Sequence[Sequence[Outcome]], chosen: Chosen) -> list[np.ndarray]:
    """`_table` of each method on the seeds that all of them have; [] without a common seed."""
    by_seed = [{outcome.seed: outcome for outcome in outcomes} for outcomes in methods]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return [_table([outcomes[seed] for seed in seeds], chosen) for outcomes in by_seed] if seeds else []


def _table(outcomes: Sequence[Outcome], chosen: Chosen) -> np.ndarray:
    """Right (1) or wrong (0) by seed and problem, float64 [seeds, problems].

    Raises:
      ValueError: the runs were not tested on the same problems.
    """
    first = outcomes[0]
    for outcome in outcomes:
        if not np.array_equal(outcome.depths, first.depths):
            raise ValueError(
                f"{outcome.task} {outcome.method} seed {outcome.seed} was tested on other problems than seed "
                f"{first.seed}; all runs of a task need the same test set"
            )
    keep = np.asarray(chosen(first.depths), bool)
    return np.stack([outcome.correct[keep] for outcome in outcomes]).astype(np.float64)
